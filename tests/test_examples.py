"""The examples run, small, and refuse bad values."""

import json

import pytest

from examples import shakespeare, shakespeare_seeds

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


@pytest.mark.parametrize(
  "arguments, words",
  [
    ("--steps 0", "--steps is at least 1"),
    ("--width 10 --heads 3", "does not divide"),
    ("--formats bf16+99", "bf16+99"),
    ("--formats ,", "names no format"),
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
