"""Makes docs/results.md and its plots from what `make sweep` left in docs/results/.

A format is not worse than fp32 if the mean of its paired differences (same seed: same weights,
same batches) is at most two standard errors, or at most 0.5% of fp32's figure.
"""

import collections
import json
import pathlib
from typing import NamedTuple

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from examples import sweep

TOLERANCE = 0.005
HIGHER_IS_BETTER = ("accuracy", "AUC", "words right", "R@1", "R@5", "R@10")


class Comparison(NamedTuple):
  """A format against fp32, over seeds.

  Attributes:
    mean: of the figure.
    base: fp32's.
    worse: mean of the paired differences; above zero is worse.
    error: their standard error.
    seeds: how many.
  """

  mean: float
  base: float
  worse: float
  error: float
  seeds: int

  @property
  def relative(self) -> float:
    """How much worse, over fp32's figure."""
    return self.worse / abs(self.base)

  @property
  def is_good(self) -> bool:
    """Whether the format is not worse than fp32."""
    return bool(self.worse <= 2 * self.error or self.relative <= TOLERANCE)


Runs = dict[str, dict[int, dict]]  # by format and seed


def load(path: pathlib.Path) -> Runs:
  """The results of an example."""
  runs: Runs = collections.defaultdict(dict)
  for line in path.read_text().splitlines():
    result = json.loads(line)
    runs[result["format"]][result["seed"]] = result
  return runs


def metric_of(runs: Runs) -> str:
  """The figure that formats are compared by: an example's first."""
  return next(iter(next(iter(runs["fp32"].values()))["figures"]))


def compare(runs: Runs, fmt: str) -> Comparison:
  """A format against fp32; runs that did not stay finite are as bad as can be."""
  metric = metric_of(runs)
  seeds = sorted(set(runs["fp32"]) & set(runs[fmt]))
  base, values = (
    np.array([runs[f][seed]["figures"][metric] for seed in seeds]) for f in ("fp32", fmt)
  )
  sign = -1 if metric.split()[-1] in HIGHER_IS_BETTER or metric in HIGHER_IS_BETTER else 1
  worse, error = sign * (values - base), 0.0
  if not np.all(np.isfinite(worse)):
    worse = np.full(len(worse), np.inf)
  elif len(worse) > 1:
    error = worse.std(ddof=1) / np.sqrt(len(worse))
  return Comparison(values.mean(), base.mean(), worse.mean(), error, len(seeds))


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


def bits_name(dtype: str, bits: int, rounding: str) -> str:
  """The sweep's name of a format."""
  return f"{dtype}+{bits}:{rounding}/fp32"


def enough_bits(runs: Runs, dtype: str, rounding: str) -> str:
  """The least number of extra bits from which on no format of the sweep is worse."""
  least = "none"
  for bits in sorted(sweep.EXTRA_BITS, reverse=True):
    name = bits_name(dtype, bits, rounding)
    if name not in runs or not compare(runs, name).is_good:
      break
    least = str(bits)
  return least


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


def page(examples: dict[str, Runs]) -> str:
  """The text of docs/results.md."""
  lines = [__doc__.split("\n\n", 1)[1].strip(), "", "## How many extra bits are enough?", ""]
  lines += ["| example | dtype | " + " | ".join(sweep.ROUNDINGS) + " |", "|" + " --- |" * 5]
  for name, runs in examples.items():
    for dtype in ("bf16", "fp16"):
      if bits_name(dtype, 0, "stochastic") in runs:
        found = [enough_bits(runs, dtype, rounding) for rounding in sweep.ROUNDINGS]
        lines.append(f"| {name} | {dtype} | " + " | ".join(found) + " |")
  for name, runs in examples.items():
    lines += ["", f"## {name}", "", *table(runs)]
    if (sweep.FOLDER / f"bits_{name}.png").exists():
      lines += ["", f"![Extra bits and rounding: {name}](results/bits_{name}.png)"]
  return "\n".join(["# The papers' experiments", "", *lines]) + "\n"


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
