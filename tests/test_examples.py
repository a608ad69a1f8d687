"""The examples run, small, and refuse bad values."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import gpt, release_nnx, shakespeare, shakespeare_seeds

SMALL = "--steps 3 --layers 1 --width 32 --heads 2 --context 16 --batch 2 --eval-windows 4".split()


def test_shakespeare(tmp_path, capsys):
  shakespeare.main([*SMALL, "--out", str(tmp_path), "--formats", "fp32,bf16,bf16+8,fp16+8"])
  out = capsys.readouterr().out
  assert "held-out loss" in out and str(tmp_path / "shakespeare.png") in out
  assert (tmp_path / "shakespeare.png").stat().st_size > 10_000
  results = json.loads((tmp_path / "shakespeare.json").read_text())
  totals = {r["format"]: round(r["bytes_per_param"]["total"]) for r in results}
  assert totals == {"fp32": 16, "bf16": 8, "bf16+8": 13, "fp16+8": 13}
  assert all(len(r["losses"]) == 3 for r in results)


def test_shakespeare_release(tmp_path):
  options = "--release --optimizer lion --formats bf16+8/int8".split()
  shakespeare.main([*SMALL, "--out", str(tmp_path), *options])
  plain, released = json.loads((tmp_path / "shakespeare.json").read_text())
  assert (plain["format"], released["format"]) == ("bf16+8, int8", "bf16+8, int8, release")
  for name in ("losses", "held_out"):
    np.testing.assert_allclose(released[name], plain[name], rtol=1e-3)
  assert released["bytes_per_param"]["gradients"] == 0 < plain["bytes_per_param"]["gradients"]
  assert released["peak_bytes"] < plain["peak_bytes"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_layered_loss(dtype):
  model = gpt.GPT(vocabulary=20, layers=2, width=32, heads=2, context=16, dtype=dtype)
  windows = np.random.default_rng(0).integers(0, 20, (2, 17))
  params = model.init(jax.random.key(0), windows[:, :-1])["params"]
  layers = {key: lambda fn, *args, w=w: fn(w, *args) for key, w in params.items()}
  layered = gpt.layered_loss_fn(model, layers, windows)
  assert float(layered) == float(gpt.loss_fn(model, params, windows))


def test_release_nnx(monkeypatch, capsys):
  monkeypatch.setattr(release_nnx, "WIDTH", 128)
  monkeypatch.setattr(release_nnx, "LAYERS", 1)
  release_nnx.main(["--steps", "3"])
  head, plain, released = capsys.readouterr().out.splitlines()
  assert "loss before" in head and "peak MB" in head
  before, after, nbytes, peak = np.array([plain.split()[-4:], released.split()[-4:]], float).T
  assert before[0] == before[1] and (after < before).all()
  np.testing.assert_allclose(after[1], after[0], rtol=1e-3)
  assert nbytes[1] < nbytes[0] and peak[1] < peak[0]


@pytest.mark.parametrize(
  "arguments, words",
  [
    ("--steps 0", "--steps is at least 1"),
    ("--width 10 --heads 3", "does not divide"),
    ("--formats bf16+99", "bf16+99"),
    ("--formats ,", "names no format"),
    ("--formats fp32,bf16+8 --release", '"/int8"'),
    ("--learning-rate -1", "positive"),
    ("--b2 1", "between 0 and 1"),
    ("--eval-windows 65", "multiple"),
    ("--steps many", "invalid int"),
  ],
)
def test_bad_values(arguments, words, capsys):
  with pytest.raises(SystemExit):
    shakespeare.parse_args(arguments.split())
  assert words in capsys.readouterr().err


def test_seeds_summary_can_tell():
  rows = shakespeare_seeds.summary({"fp32": [2.0, 2.1], "worse": [2.1, 2.2], "same": [2.0, 2.1001]})
  assert rows[2].endswith("yes |") and rows[3].endswith("no |") and rows[4].endswith("yes |")
