"""Makes docs/results.md and its plots from what `make sweep` left in docs/results/."""

import itertools
import json
import pathlib

import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from examples import sweep
from examples.compare import (
  Runs,
  bits_name,
  compare,
  enough_bits,
  load,
  metric_of,
  percent,
  verdict,
)
from examples.training import HALF
import optax_lowmem as lowmem
import pallas_kernels

GOAL = "bf16+8/int8"
EIGHT = "bf16+8:stochastic/fp32"
TIMED = ("fp32", "master-bf16", "bf16", EIGHT, GOAL)

INTRODUCTION = """Made by `python -m examples.results` from what `make sweep` left in
[results/](results) and `python -m benchmarks.papers` in benchmarks/results. The examples are small
models on real data ([examples/README.md](../examples/README.md)), five seeds each. A format is
not worse than fp32 if the mean of its paired differences (same seed: same weights, same batches)
is at most two standard errors, or at most 0.5% of fp32's figure; signs are turned so that above
zero is worse. Formats are named weights/statistics: `fp32`, `bf16` and `fp16` are Optax with
weights of that dtype, `master-bf16` is Optax with float32 weights and a model that computes in
bfloat16; the rest are this library's, with stochastic rounding where none is named. Vectors
(biases, gains) stay in float32 in this library's formats."""
ENOUGH = """The least number of extra bits (of those tried: 0, 1, 2, 4, 8, 16; float32 statistics)
from which on no format is worse than fp32. 16 bits beside bfloat16 are float32 itself."""
DIRECTION = """One more bit lets the half-precision part, too, be rounded stochastically
(`low_rounding="stochastic"`; 2309.12381's direction bit), where "nearest" sends ties away from
zero. Bias is the mean of low - x in steps of low, for x uniform between 1 and 2: with k extra
bits one value in 2^k is a tie, and half a step too large."""
MEMORY = """Peak memory of a whole training step (AdamW; gradients, activations and batch included),
compiled for H100s with JAX {jax}, {date}; nothing was run. Activations are kept, or those of each
layer computed again in the backward pass (which gradient release does by itself). "Lower by" is
against master-bf16 with the same: float32 weights, gradients and statistics, a model that computes
in bfloat16. The last column divides that by the baseline's weights and statistics, 12 bytes a
parameter at every moment (its gradients come and go): `bf16+8` with 8-bit statistics keeps 5.13 of
them, so that 57% is the bound where the peak has no gradients, `bf16+0` 4.13, 66%.

CLIP is compiled with xla_gpu_enable_latency_hiding_scheduler=False, without which XLA computes
activations again long before they are needed, and everything takes 59 GiB a device."""
TIME = """Of a training step on one CPU core, over fp32's, in the median. XLA:CPU computes in
float32 what is stored in half precision and converts, so the models themselves are slower here.
Nothing has been measured on a GPU; README has the optimizers' own times."""


def table(runs: Runs) -> list[str]:
  """Markdown rows: every format against fp32, and what it takes."""
  metric = metric_of(runs)
  lines = [
    f"| format | {metric} | worse by | standard error | relative | not worse | seeds"
    " | bytes a parameter | peak MB | ms a step |",
    "|" + " --- |" * 10,
  ]
  for fmt, by_seed in runs.items():
    c, one = compare(runs, fmt), next(iter(by_seed.values()))
    milliseconds = 1e3 * np.median([r["seconds_per_step"] for r in by_seed.values()])
    lines.append(
      f"| `{fmt}` | {c.mean:.4f} | {c.worse:+.4f} | {c.error:.4f} | {c.relative:+.2%}"
      f" | {'yes' if c.is_good else 'no'} | {c.seeds} | {one['bytes_per_param']['total']:.2f}"
      f" | {one['peak_bytes'] / 1e6:.1f} | {milliseconds:.1f} |"
    )
  return lines


def plot(runs: Runs, title: str, path: pathlib.Path):
  """How much worse a format is by its extra bits, with two standard errors."""
  fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
  for axis, dtype in zip(axes, ("bf16", "fp16"), strict=True):
    for rounding in (*sweep.ROUNDINGS, "stochastic:stochastic"):
      points = [
        (bits, compare(runs, name))
        for bits in range(17)
        if (name := bits_name(dtype, bits, rounding)) in runs
      ]
      points = [(bits, c) for bits, c in points if np.isfinite(c.worse)]
      if points:
        x, y = zip(*((bits, 100 * c.relative) for bits, c in points), strict=True)
        bars = [200 * c.error / abs(c.base) for _, c in points]
        axis.errorbar(x, y, bars, marker="o", ms=3, capsize=2, label=rounding)
    axis.axhline(0, color="black", lw=0.5)
    axis.set(title=f"{title}: {dtype}", xlabel="extra bits", yscale="symlog")
  axes[0].set_ylabel(f"{metric_of(runs)}: worse than fp32 by, %")
  axes[0].legend(title="rounding", fontsize="small")
  fig.savefig(path, dpi=100)
  plt.close(fig)


def markdown(columns: list[str], rows) -> list[str]:
  """The lines of a table."""
  line = lambda cells: f"| {' | '.join(cells)} |"
  return [line(columns), "|" + " --- |" * len(columns), *map(line, rows)]


def swept(examples: dict[str, Runs]) -> dict[str, Runs]:
  """The examples with all bits and roundings."""
  return {name: runs for name, runs in examples.items() if bits_name("bf16", 0, "nearest") in runs}


def lost(examples: dict[str, Runs]) -> list[str]:
  """Whether the goal holds in each example, and what does not."""
  rows = []
  for name, runs in examples.items():
    if GOAL not in runs:
      continue
    c, found = compare(runs, GOAL), {fmt: compare(runs, fmt) for fmt in runs}
    fails = sorted((f for f in runs if not found[f].is_good), key=lambda f: found[f].worse)
    worst = [f"`{f}` {percent(found[f])}" for f in fails]
    if len(worst) > 3:
      worst = [worst[0], f"{len(worst) - 2} more", worst[-1]]
    figures = [f"{c.base:.4f}", f"{c.worse:+.4f}", f"{c.error:.4f}", percent(c)]
    answer = "yes" if c.is_good else "no"
    rows.append([name, metric_of(runs), *figures, answer, ", ".join(worst) or "none"])
  columns = ["example", "figure", "fp32", "worse by", "standard error", "relative", "not worse"]
  title = f"`{GOAL}` against fp32, and the formats that are worse."
  return ["## Is anything lost?", "", title, "", *markdown([*columns, "worse"], rows)]


def extra_bits(examples: dict[str, Runs]) -> list[str]:
  """How many bits are needed, and where stochastic rounding matters."""
  least = [
    [name, dtype, *(enough_bits(runs, dtype, rounding) for rounding in sweep.ROUNDINGS)]
    for name, runs in swept(examples).items()
    for dtype in HALF
  ]
  worse = [
    [name, dtype, str(k), *(verdict(runs, bits_name(dtype, k, r)) for r in sweep.ROUNDINGS)]
    for name, runs in swept(examples).items()
    for dtype, k in itertools.product(HALF, sweep.EXTRA_BITS)
  ]
  lines = ["## How many extra bits are enough?", "", ENOUGH, ""]
  lines += markdown(["example", "dtype", *sweep.ROUNDINGS], least)
  lines += ["", "## Where does stochastic rounding matter?", "", "How much worse than fp32:", ""]
  return lines + markdown(["example", "dtype", "extra bits", *sweep.ROUNDINGS], worse)


def direction(examples: dict[str, Runs]) -> list[str]:
  """What ties away from zero do, and a bit against it."""
  columns = ["dtype", "extra bits", "bias: nearest", "stochastic"]
  for name in swept(examples):
    columns += [f"{name}: nearest", "stochastic"]
  rows = []
  for dtype, k in itertools.product(HALF, range(5)):
    biases = [f"{bias(dtype, k, low):+.4f}" for low in ("nearest", "stochastic")]
    pair = [bits_name(dtype, k, rounding) for rounding in ("stochastic", "stochastic:stochastic")]
    found = [verdict(runs, fmt) for runs in swept(examples).values() for fmt in pair]
    rows.append([dtype, str(k), *biases, *found])
  return ["## The direction bit", "", DIRECTION, "", *markdown(columns, rows)]


def bias(dtype: str, bits: int, low_rounding: str) -> float:
  """The mean of low - x in steps of low, for uniform x between 1 and 2."""
  fmt = lowmem.DeltaFormat(HALF[dtype], bits, "stochastic", low_rounding)
  x = np.random.default_rng(0).uniform(1, 2, 1 << 20).astype(np.float32)
  low, _ = pallas_kernels.split(x, fmt, key=0)
  step = float(jnp.finfo(HALF[dtype]).eps)
  return float(np.mean(np.asarray(low, np.float64) - x) / step)


def memory_tables() -> dict:
  """What `python -m benchmarks.papers` found: versions, date, and the tables of all workloads."""
  folder = pathlib.Path(__file__).parent.parent / "benchmarks/results"
  order = ("parameters", "t5", "dlrm", "resnet18", "dcgan", "clip")
  paths = [folder / f"papers_{name}_h100_compile.json" for name in order]
  found = [json.loads(path.read_text()) for path in paths if path.exists()]
  tables = {title: rows for one in found for title, rows in one["tables"].items()}
  versions = {key: ", ".join(sorted({one[key] for one in found})) for key in ("jax", "date")}
  return versions | {"tables": tables}


def memory(found: dict) -> list[str]:
  """What the papers' models take at their full sizes."""
  lines = ["## What it costs in memory", "", MEMORY.format(**found)]
  text = lambda v: f"{v:.2f}" if isinstance(v, float) else str(v)
  for title, rows in found["tables"].items():
    cells = [map(text, row.values()) for row in rows]
    lines += ["", f"### {title}", "", *markdown(list(rows[0]), cells)]
  return lines


def time(examples: dict[str, Runs]) -> list[str]:
  """What a step of the examples took."""
  rows = []
  for name, runs in examples.items():
    times = [
      np.median([r["seconds_per_step"] for r in runs[fmt].values()]) if fmt in runs else 0
      for fmt in TIMED
    ]
    rows.append([name, *(f"{t / times[0]:.2f}" if t else "" for t in times)])
  columns = ["example", *(f"`{fmt}`" for fmt in TIMED)]
  return ["## What it costs in time", "", TIME, "", *markdown(columns, rows)]


def claims(examples: dict[str, Runs], tables: dict[str, list[dict]]) -> list[str]:
  """What the papers report, and what is found here."""

  def lower(activations):
    """By how much the peak of each of the papers' models is lower."""
    found = [
      f"{title.split(',')[0].split(' (')[0]} {row['lower by']}"
      for title, rows in tables.items()
      for row in rows
      if (row.get("format"), row.get("activations")) == (GOAL, activations)
    ]
    return ", ".join(found)

  recipe = [f"`{fmt}` {verdict(examples.get('clip', {}), fmt)}" for fmt in ("bf16+8/bf16", GOAL)]

  def held(fmt):
    """In which examples a format is not worse."""
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
      "2309.12381: stochastic rounding in the place of extra bits, against truncation",
      f"no extra bits: stochastic {held(bits_name('bf16', 0, 'stochastic'))};"
      f" truncated {held(bits_name('bf16', 0, 'truncate'))}",
    ),
    (
      "1710.03740: float32 master weights match float32; half-precision weights do not",
      f"`master-bf16` {held('master-bf16')}; `bf16` {held('bf16')}",
    ),
    (
      "2103.00020: half-precision statistics and a half-precision text encoder hinder nothing",
      "; ".join(recipe),
    ),
  ]
  columns = ["what they report", "found here"]
  return ["## Beside the papers", "", *markdown(columns, rows)]


def page(examples: dict[str, Runs]) -> str:
  """The text of docs/results.md."""
  found = memory_tables()
  lines = ["# The papers' experiments", "", INTRODUCTION]
  parts = [lost(examples), extra_bits(examples), direction(examples)]
  parts += [claims(examples, found["tables"]), memory(found), time(examples)]
  for part in parts:
    lines += ["", *part]
  for name, runs in examples.items():
    lines += ["", f"## {name}", "", *table(runs)]
    if (sweep.FOLDER / f"bits_{name}.png").exists():
      lines += ["", f"![Extra bits and rounding: {name}](results/bits_{name}.png)"]
  return "\n".join(lines) + "\n"


def main():
  """Writes the page and its plots."""
  examples = {}
  for name in sweep.PLAN:
    path = sweep.FOLDER / f"{name}.jsonl"
    if path.exists() and "fp32" in (runs := load(path)):
      examples[name] = runs
      if bits_name("bf16", 0, "stochastic") in runs:
        plot(runs, name, sweep.FOLDER / f"bits_{name}.png")
  out = sweep.FOLDER.parent / "results.md"
  out.write_text(page(examples))
  print(f"wrote {out}: {', '.join(examples) or 'nothing, run `make sweep`'}")


if __name__ == "__main__":
  main()
