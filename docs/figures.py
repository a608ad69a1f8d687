"""What the pages' code cells share: reading benchmark results, and tables."""

import json
import pathlib

from IPython.display import Markdown

ROOT = pathlib.Path(__file__).parent.parent


def results(name: str) -> dict:
  """benchmarks/results/NAME.json."""
  return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(columns: list[str], rows) -> Markdown:
  """A table of the page; numbers have two decimals."""
  text = lambda cell: f"{cell:.2f}" if isinstance(cell, float) else str(cell)
  line = lambda cells: f"| {' | '.join(map(text, cells))} |"
  rule = "| --- |" + " ---: |" * (len(columns) - 1)
  return Markdown("\n".join([line(columns), rule, *map(line, rows)]))


def source(found: dict) -> Markdown:
  """Where a figure is from."""
  return Markdown(f"*JAX {found['jax']}, commit {found['commit'].split('-')[0]}, {found['date']}.*")
