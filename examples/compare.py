"""Compares a format with fp32, over the seeds of a sweep.

A format is not worse than fp32 if the mean of its paired differences (same seed: same weights,
same batches) is at most two standard errors, or at most 0.5% of fp32's figure.
"""

import collections
import json
import pathlib
from typing import NamedTuple

import numpy as np

from examples import sweep

GOAL, MASTER = "bf16+8/int8", "master-bf16"
COMPARED = ["worse by", "standard error", "relative", "not worse"]
TOLERANCE = 0.005
HIGHER_IS_BETTER = ("accuracy", "AUC", "words right", "R@1", "R@5", "R@10")


class Comparison(NamedTuple):
  """A comparison of a format with fp32, over seeds.

  Attributes:
    mean: the mean of the figure.
    base: the mean of fp32's figure.
    worse: the mean of the paired differences; positive is worse.
    error: the standard error of that mean.
    seeds: the number of seeds.
  """

  mean: float
  base: float
  worse: float
  error: float
  seeds: int

  @property
  def relative(self) -> float:
    """The mean difference, relative to fp32's figure."""
    return self.worse / abs(self.base)

  @property
  def is_good(self) -> bool:
    """Whether the format is not worse than fp32."""
    return bool(self.worse <= 2 * self.error or self.relative <= TOLERANCE)


Runs = dict[str, dict[int, dict]]  # by format and seed


def load(path: pathlib.Path) -> Runs:
  """Loads the results of an example."""
  runs: Runs = collections.defaultdict(dict)
  for line in path.read_text().splitlines():
    result = json.loads(line)
    runs[result["format"]][result["seed"]] = result
  return runs


def metric_of(runs: Runs) -> str:
  """The name of the figure that compares formats: the first one of an example."""
  return next(iter(next(iter(runs["fp32"].values()))["figures"]))


def by_training_loss(runs: Runs) -> Runs:
  """The same runs, compared by the loss at the end of training."""
  figures = lambda r: {"figures": {"training loss": r["final training loss"]}}
  return {f: {seed: r | figures(r) for seed, r in found.items()} for f, found in runs.items()}


def standard_error(values):
  """The standard error of the mean along the first axis; 0 for a single value."""
  values = np.asarray(values)
  return values.std(0) / np.sqrt(max(len(values) - 1, 1))


def compare(runs: Runs, fmt: str) -> Comparison:
  """Compares a format with fp32; a figure or loss that is not finite is infinitely worse."""
  metric = metric_of(runs)
  seeds = sorted(set(runs["fp32"]) & set(runs[fmt]))
  base, values = (
    np.array([runs[f][seed]["figures"][metric] for seed in seeds]) for f in ("fp32", fmt)
  )
  sign = -1 if metric.split()[-1] in HIGHER_IS_BETTER or metric in HIGHER_IS_BETTER else 1
  worse, error = sign * (values - base), 0.0
  losses = [runs[fmt][seed]["final training loss"] for seed in seeds]
  if not np.all(np.isfinite([*worse, *losses])):
    worse = np.full(len(worse), np.inf)
  else:
    error = standard_error(worse)
  return Comparison(values.mean(), base.mean(), worse.mean(), error, len(seeds))


def bits_name(dtype: str, bits: int, rounding: str) -> str:
  """The name of a format in the sweep."""
  return f"{dtype}+{bits}:{rounding}/fp32"


def enough_bits(runs: Runs, dtype: str, rounding: str) -> str:
  """The smallest number of extra bits from which on no format of the sweep is worse."""
  least = "none"
  for bits in sorted(sweep.EXTRA_BITS, reverse=True):
    name = bits_name(dtype, bits, rounding)
    if name not in runs or not compare(runs, name).is_good:
      break
    least = str(bits)
  return least


def percent(c: Comparison) -> str:
  """The relative difference, for a table."""
  return f"{c.relative:+.2%}" if np.isfinite(c.worse) else "not finite"


def cells(c: Comparison) -> list[str]:
  """The cells of a comparison, for the columns COMPARED."""
  return [f"{c.worse:+.4f}", f"{c.error:.4f}", percent(c), "yes" if c.is_good else "no"]


def verdict(runs: Runs, fmt: str) -> str:
  """The relative difference of a format; bold if it counts as worse."""
  if fmt not in runs:
    return ""
  c = compare(runs, fmt)
  return percent(c) if c.is_good else f"**{percent(c)}**"


def markdown(columns: list[str], rows) -> list[str]:
  """The lines of a table."""
  line = lambda cells: f"| {' | '.join(cells)} |"
  return [line(columns), "|" + " --- |" * len(columns), *map(line, rows)]
