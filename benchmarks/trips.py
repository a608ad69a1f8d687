"""Counts how far one step travels through our code.

    python -m benchmarks.trips

The script traces and lowers an optimizer's step under ``sys.setprofile``. It counts the
calls of functions in ``optax_lowmem`` and ``pallas_kernels``, the modules and functions
visited, the changes from one module to another, and the rules that are hoisted.
"""

import argparse
import collections
from collections.abc import Callable
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp

import optax_lowmem as lowmem
import pallas_kernels

ROOTS = tuple(str(pathlib.Path(x.__file__).parent) for x in (lowmem, pallas_kernels))


class Trips(NamedTuple):
  """The counts of a profile of our code.

  Attributes:
    calls: calls of functions and resumptions of generators.
    modules: files visited.
    functions: functions visited.
    changes: calls whose caller, the last function of ours on the stack, is in
      another file.
    hoists: rules traced and split (``pallas_kernels.programs.hoist``).
    of: calls by (file, function).
  """

  calls: int
  modules: int
  functions: int
  changes: int
  hoists: int
  of: collections.Counter


def count(run: Callable[[], object]) -> Trips:
  """Runs a function under the profile."""
  calls: collections.Counter = collections.Counter()
  changes, stack = 0, []

  def profile(frame, event, _):
    nonlocal changes
    code = frame.f_code
    if not code.co_filename.startswith(ROOTS):
      return
    if event == "call":
      calls[(code.co_filename, code.co_qualname)] += 1
      changes += bool(stack) and stack[-1] != code.co_filename
      stack.append(code.co_filename)
    elif event == "return":
      stack.pop()

  sys.setprofile(profile)
  try:
    run()
  finally:
    sys.setprofile(None)
  files = {file for file, _ in calls}
  hoists = sum(n for (file, name), n in calls.items() if name == "Hoisted.__init__")
  return Trips(calls.total(), len(files), len(calls), changes, hoists, calls)


def shapes(n: int) -> dict[str, jax.ShapeDtypeStruct]:
  """The structs of n leaves: the first is 64 x 128, each next one has twice the rows."""
  return {f"w{i}": jax.ShapeDtypeStruct((64 << i, 128), jnp.float32) for i in range(n)}


def step(n: int) -> Callable[[], object]:
  """A function that traces and lowers ``lowmem.step`` of AdamW on n leaves."""
  return _lowering(n, lambda tx: lambda g, s, p: lowmem.step(tx, g, s, p))


def update(n: int) -> Callable[[], object]:
  """A function that traces and lowers ``tx.update`` of AdamW on n leaves."""
  return _lowering(n, lambda tx: tx.update)


def _lowering(n, make):
  tx = lowmem.adamw(1e-3)
  params, state = jax.eval_shape(lambda p: lowmem.init(tx, p), shapes(n))
  return lambda: jax.jit(make(tx)).lower(params, state, params)


def released(n: int) -> Callable[[], object]:
  """A function that traces and lowers a step of ``lowmem.fused_backward``."""
  tx = lowmem.adamw(1e-3)
  params, state = jax.eval_shape(lambda p: lowmem.init(tx, p), shapes(n))

  def loss_fn(layers, x):
    return sum(layers[name](lambda w, x: jnp.sum(w * x), x) for name in params)

  run = jax.jit(lowmem.fused_backward(loss_fn, tx))
  return lambda: run.lower(params, state, jax.ShapeDtypeStruct((), jnp.float32))


def main():
  """Prints a row for each kind of step."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    "--top", type=int, default=0, help="how many of the most called functions to print"
  )
  args = parser.parse_args()
  print(f"{'':34}{'calls':>8}{'modules':>9}{'functions':>11}{'changes':>9}{'hoists':>8}")
  for name, make, n in [
    ("lowmem.step, one leaf", step, 1),
    ("lowmem.step, seven leaves", step, 7),
    ("tx.update, one leaf", update, 1),
    ("fused_backward, one leaf", released, 1),
  ]:
    trips = count(make(n))
    print(
      f"{name:34}" + "".join(f"{x:{w}}" for x, w in zip(trips[:5], (8, 9, 11, 9, 8), strict=True))
    )
    for (file, function), calls in trips.of.most_common(args.top):
      print(f"  {calls:5} {pathlib.Path(file).stem}.{function}")


if __name__ == "__main__":
  main()
