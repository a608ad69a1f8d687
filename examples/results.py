"""Builds docs/results.md and its plots from the results of `make sweep` in docs/results/."""

import itertools
import pathlib

import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from examples import sweep
from examples.claims import claims, memory, memory_tables, recalls, time
from examples.compare import (
  COMPARED,
  GOAL,
  MASTER,
  Runs,
  bits_name,
  by_training_loss,
  cells,
  compare,
  enough_bits,
  load,
  markdown,
  metric_of,
  percent,
  verdict,
)
from examples.training import HALF
import optax_lowmem as lowmem
import pallas_kernels

INTRODUCTION = """`python -m examples.results` builds this page from the results of `make sweep` in
[results/](results) and of `python -m benchmarks.papers` in benchmarks/results. The examples are
small models on real data ([examples/README.md](../examples/README.md)), with five seeds each; some
formats of DCGAN, the noisiest, have ten. Differences from fp32 are paired: same seed, same weights,
same batches. A format is not worse than fp32 if the mean difference is at most two standard errors,
or at most 0.5% of fp32's figure. Positive differences are worse. Formats are named
weights/statistics. `fp32`, `bf16` and `fp16` are Optax with weights of that dtype. `master-bf16` is
Optax with float32 weights and a model that computes in bfloat16. The others are this library's,
with stochastic rounding where none is named; they keep vectors (biases, gains) in float32."""
LOST = f"""`{GOAL}` compared with fp32, and the formats that are worse. `{MASTER}` stores everything
in float32 and only computes in bfloat16; no storage format can recover its loss. CLIP's recalls are
too coarse to distinguish its formats; its training loss is not."""
ENOUGH = """The smallest number of extra bits (of 0, 1, 2, 4, 8, 16, with float32 statistics) from
which on no format is worse than fp32. 16 bits beside bfloat16 are float32 itself."""
DIRECTION = """With one more bit, the half-precision part is rounded stochastically, too
(`low_rounding="stochastic"`; the direction bit of 2309.12381), whereas "nearest" rounds ties away
from zero. Bias is the mean of low - x in steps of low, for x uniform between 1 and 2. With k extra
bits, one value in 2^k is a tie, and is rounded half a step too high."""

FOUR_BITS = """Optimizer statistics in 4 bits, compared with fp32: both moments in 8
bits; mu in 8 bits and nu in 4 (`int8-int4`); both in 4. The test is stricter here: bold is worse by
more than two standard errors (in brackets) and by more than 0.3%. `b2` is the GPT with Adam's b2 at
0.95 instead of 0.999. `long` is the GPT over 4,000 steps, ten times the demo's, with one seed."""


def table(runs: Runs) -> list[str]:
  """The table of an example: every format compared with fp32, its memory and time."""
  rows = []
  for fmt, by_seed in runs.items():
    c, one = compare(runs, fmt), next(iter(by_seed.values()))
    milliseconds = 1e3 * np.median([r["seconds_per_step"] for r in by_seed.values()])
    takes = [f"{one['bytes_per_param']['total']:.2f}", f"{one['peak_bytes'] / 1e6:.1f}"]
    figures = [f"{c.mean:.4f}", *cells(c), str(c.seeds), *takes, f"{milliseconds:.1f}"]
    rows.append([f"`{fmt}`", *figures])
  columns = ["seeds", "bytes a parameter", "peak MB", "ms a step"]
  return markdown(["format", metric_of(runs), *COMPARED, *columns], rows)


def plot(runs: Runs, title: str, path: pathlib.Path):
  """Plots the relative differences over the extra bits, with two standard errors."""
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


def swept(examples: dict[str, Runs]) -> dict[str, Runs]:
  """The examples that were trained with all bits and roundings."""
  return {name: runs for name, runs in examples.items() if bits_name("bf16", 0, "nearest") in runs}


def lost(examples: dict[str, Runs]) -> list[str]:
  """The section on the goal in each example, and on the formats that are worse."""
  rows = []
  compared = list(examples.items())
  if "clip" in examples:
    compared.append(("clip", by_training_loss(examples["clip"])))
  for name, runs in compared:
    if GOAL not in runs:
      continue
    c, found = compare(runs, GOAL), {fmt: compare(runs, fmt) for fmt in runs}
    fails = sorted((f for f in runs if not found[f].is_good), key=lambda f: found[f].worse)
    worst = [f"`{f}` {percent(found[f])}" for f in fails]
    if len(worst) > 3:
      worst = [worst[0], f"{len(worst) - 2} more", worst[-1]]
    figures = [f"{c.base:.4f}", *cells(c), verdict(runs, MASTER)]
    rows.append([name, metric_of(runs), *figures, ", ".join(worst) or "none"])
  columns = ["example", "figure", "fp32", *COMPARED, f"`{MASTER}`", "worse formats"]
  return ["## Is anything lost?", "", LOST, "", *markdown(columns, rows)]


def extra_bits(examples: dict[str, Runs]) -> list[str]:
  """The sections on the bits that are enough, and on stochastic rounding."""
  least = [
    [name, dtype, *(enough_bits(runs, dtype, rounding) for rounding in sweep.ROUNDINGS)]
    for dtype in HALF
    for name, runs in swept(examples).items()
  ]
  order = [*map(str, sweep.EXTRA_BITS), "none"]
  for dtype in HALF:
    found = [row[2:] for row in least if row[1] == dtype]
    if found:
      most = (max(column, key=order.index) for column in zip(*found, strict=True))
      least.append([f"all {len(found)}", dtype, *most])
  worse = [
    [name, dtype, str(k), *(verdict(runs, bits_name(dtype, k, r)) for r in sweep.ROUNDINGS)]
    for name, runs in swept(examples).items()
    for dtype, k in itertools.product(HALF, sweep.EXTRA_BITS)
  ]
  lines = ["## How many extra bits are enough?", "", ENOUGH, ""]
  lines += markdown(["example", "dtype", *sweep.ROUNDINGS], least)
  lines += ["", "## Where does stochastic rounding matter?", "", "Worse than fp32 by:", ""]
  return lines + markdown(["example", "dtype", "extra bits", *sweep.ROUNDINGS], worse)


def four_bits(examples: dict[str, Runs]) -> list[str]:
  """The section on statistics in 4 bits."""
  formats = ("bf16", "bf16+8/int8", "bf16+0/int8", *sweep.INT4)

  def cell(runs: Runs, fmt: str) -> str:
    if fmt not in runs:
      return ""
    c = compare(runs, fmt)
    text = f"{percent(c)} ({c.error / abs(c.base):.2%})" if c.seeds > 1 else percent(c)
    return text if c.worse <= 2 * c.error or c.relative <= 0.003 else f"**{text}**"

  rows = [
    [name, *(cell(runs, fmt) for fmt in formats)]
    for name, runs in examples.items()
    if any(fmt in runs for fmt in sweep.INT4)
  ]
  columns = ["example", *(f"`{fmt}`" for fmt in formats)]
  return ["## Statistics in 4 bits", "", FOUR_BITS, "", *markdown(columns, rows)]


def direction(examples: dict[str, Runs]) -> list[str]:
  """The section on the bias of ties, and on the direction bit, which removes it."""
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


def page(examples: dict[str, Runs]) -> str:
  """The text of docs/results.md."""
  found = memory_tables()
  lines = ["# The papers' experiments", "", INTRODUCTION]
  parts = [lost(examples), four_bits(examples), extra_bits(examples), direction(examples)]
  parts += [claims(examples, found["tables"]), memory(found), time(examples)]
  for part in parts:
    lines += ["", *part]
  for name, runs in examples.items():
    lines += ["", f"## {name}", "", *table(runs)]
    if name == "clip":
      lines += ["", *recalls(runs)]
    if name in swept(examples):
      lines += ["", f"![Extra bits and rounding: {name}](results/bits_{name}.png)"]
  return "\n".join(lines) + "\n"


def main():
  """Writes the page and its plots."""
  examples = {}
  for name in sweep.PLAN:
    path = sweep.FOLDER / f"{name}.jsonl"
    if path.exists() and "fp32" in (runs := load(path)):
      examples[name] = runs
  for name, runs in swept(examples).items():
    plot(runs, name, sweep.FOLDER / f"bits_{name}.png")
  out = sweep.FOLDER.parent / "results.md"
  out.write_text(page(examples))
  print(f"wrote {out}: {', '.join(examples) or 'no results; run `make sweep`'}")


if __name__ == "__main__":
  main()
