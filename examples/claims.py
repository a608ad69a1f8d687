"""The papers' claims beside our results; memory and time."""

import json
import pathlib

import numpy as np

from examples.compare import (
  GOAL,
  MASTER,
  Runs,
  bits_name,
  by_training_loss,
  compare,
  markdown,
  percent,
  standard_error,
  verdict,
)

EIGHT = "bf16+8:stochastic/fp32"
TIMED = ("fp32", MASTER, "bf16", EIGHT, GOAL)
MEMORY = """The peak memory of a whole training step (AdamW; with gradients, activations and batch),
compiled for H100s with JAX {jax}, {date}; nothing was executed. Activations are kept, or each layer
is computed again in the backward pass (as gradient release always does). "Lower by" is relative to
master-bf16 with the same treatment of activations: float32 weights, gradients and statistics, and a
model that computes in bfloat16. The last column divides the reduction by the baseline's weights and
statistics, which take 12 bytes a parameter at all times (its gradients come and go). `bf16+8` with
8-bit statistics keeps 5.13 of these bytes, so the bound is 57% where the peak has no gradients.
`bf16+0` keeps 4.13, and its bound is 66%. CLIP's peak is that of one device, with one option of the
recipe off at a time, and for two baselines. Sharding the similarities by hand makes no difference
there, because XLA assigns each device its own rows anyway."""
TIME = """The median time of a training step on one CPU core, relative to fp32. XLA:CPU converts
half-precision values and computes in float32, so the models themselves are slower here. Nothing has
been measured on a GPU. The README has the optimizers' own times."""

# As `python -m examples.clip` prints it; the sweep's results do not contain it.
RIDGE = {
  "Twitter's R@1": 0.191,
  "Twitter's R@5": 0.316,
  "Twitter's R@10": 0.365,
  "held-out R@1": 0.220,
  "held-out R@5": 0.346,
  "held-out R@10": 0.476,
}
RECALLS = """Means over the seeds, with their standard errors. CLIP trains on Google's drawings. The
tests are Twitter's drawings of the same concepts, and Google's drawings of held-out concepts. The
ridge regression, from 16x16 pixels to TF-IDF, uses the same split: 1,720 concepts are learnt, 191
held out. In this library's formats, the text encoder's weights are `bf16+0`, as in the paper."""


def memory_tables() -> dict:
  """The results of `python -m benchmarks.papers`: versions, date, and tables of all workloads."""
  folder = pathlib.Path(__file__).parent.parent / "benchmarks/results"
  order = ("parameters", "t5", "dlrm", "resnet18", "dcgan", "clip")
  paths = [folder / f"papers_{name}_h100_compile.json" for name in order]
  found = [json.loads(path.read_text()) for path in paths if path.exists()]
  tables = {title: rows for one in found for title, rows in one["tables"].items()}
  versions = {key: ", ".join(sorted({one[key] for one in found})) for key in ("jax", "date")}
  return versions | {"tables": tables}


def memory(found: dict) -> list[str]:
  """The section on the memory of the papers' models at full size."""
  lines = ["## What it costs in memory", "", MEMORY.format(**found)]
  text = lambda v: f"{v:.2f}" if isinstance(v, float) else str(v)
  for title, rows in found["tables"].items():
    cells = [map(text, row.values()) for row in rows]
    lines += ["", f"### {title}", "", *markdown(list(rows[0]), cells)]
  return lines


def time(examples: dict[str, Runs]) -> list[str]:
  """The section on the time of a step of each example."""
  rows = []
  for name, runs in examples.items():
    times = [
      np.median([r["seconds_per_step"] for r in runs[fmt].values()]) if fmt in runs else 0
      for fmt in TIMED
    ]
    rows.append([name, *(f"{t / times[0]:.2f}" if t else "" for t in times)])
  columns = ["example", *(f"`{fmt}`" for fmt in TIMED)]
  return ["## What it costs in time", "", TIME, "", *markdown(columns, rows)]


def recalls(runs: Runs) -> list[str]:
  """CLIP's recalls in every format, and those of the baseline."""
  rows = [["ridge regression", *(f"{value:.3f}" for value in RIDGE.values()), ""]]
  for fmt, by_seed in runs.items():
    found = np.array(
      [[*map(r["figures"].get, RIDGE), r["final training loss"]] for r in by_seed.values()]
    )
    both = zip(found.mean(0), standard_error(found), strict=True)
    rows.append([f"`{fmt}`", *(f"{mean:.3f} ± {e:.3f}" for mean, e in both)])
  return [RECALLS, "", *markdown(["", *RIDGE, "training loss"], rows)]


def claims(examples: dict[str, Runs], tables: dict[str, list[dict]]) -> list[str]:
  """The section on the papers' claims and our results."""

  def lower(activations):
    """The relative reduction of the peak of each of the papers' models."""
    found = [
      f"{title.split(',')[0].split(' (')[0]} {row['lower by']}"
      for title, rows in tables.items()
      for row in rows
      if (row.get("format"), row.get("activations")) == (GOAL, activations)
    ]
    return ", ".join(found)

  runs = examples.get("clip", {})
  recipe = "; ".join(
    f"`{fmt}` {verdict(runs, fmt)}, {verdict(by_training_loss(runs), fmt)}"
    for fmt in ("bf16+8/bf16", GOAL)
    if fmt in runs
  )

  def held(fmt):
    """The number of examples in which a format is not worse, and those in which it is."""
    there = {name: compare(runs, fmt) for name, runs in examples.items() if fmt in runs}
    good = [name for name, c in there.items() if c.is_good]
    bad = [f"{name} {percent(c)}" for name, c in there.items() if not c.is_good]
    return f"not worse in {len(good)} of {len(there)}" + (
      f"; worse: {', '.join(bad)}" if bad else ""
    )

  rows = [
    (
      "2309.12381: peak memory lower by 25%, by 54% with parameters alone",
      lower("computed again; gradients released"),
    ),
    ("the same without gradient release", lower("kept")),
    ("2309.12381: accuracy is kept (8 extra bits)", f"`{EIGHT}`: {held(EIGHT)}"),
    ("the same, with 8-bit statistics", f"`{GOAL}`: {held(GOAL)}"),
    (
      "2309.12381: stochastic rounding instead of extra bits, compared with truncation",
      f"no extra bits: stochastic {held(bits_name('bf16', 0, 'stochastic'))};"
      f" truncated {held(bits_name('bf16', 0, 'truncate'))}",
    ),
    (
      "1710.03740: float32 master weights match float32; half-precision weights do not",
      f"`{MASTER}` {held(MASTER)}; `bf16` {held('bf16')}",
    ),
    (
      "2103.00020: half-precision statistics and a half-precision text encoder do no harm",
      f"worse by, in R@1 and in the training loss: {recipe}",
    ),
  ]
  columns = ["reported", "found here"]
  return ["## Beside the papers", "", *markdown(columns, rows)]
