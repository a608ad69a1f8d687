"""Compares the kernels with XLA's fusions of the same arithmetic, on a GPU.

  python -m benchmarks.kernels [--out benchmarks/results/kernels.json]

Times every case of `CASES` as a ratio within one run. Both implementations
alternate, operations that work in place get donated inputs, and the median of
the rounds counts. Compilation and the rest of a training step are excluded.
`implementation=None` must follow this benchmark; there is no result yet.
"""

import argparse
import json
import pathlib
import statistics
import time

import jax

import optax_lowmem as lowmem
import pallas_kernels

CASES = [
  dict(operation=operation, fmt=fmt, size=size)
  for operation in ("split", "merge", "apply_update", "stochastic_round")
  for fmt in ("bf16+8", "bf16+16", "fp16+8", "bf16+0")
  for size in (1 << 16, 1 << 22, 1 << 27)
]


def prepare(operation: str, fmt: str, size: int, implementation: str):
  """A compiled call that runs the operation once, and the bytes that it must move."""
  base = lowmem.DeltaFormat.parse(fmt)
  x = jax.random.normal(jax.random.key(0), (size,))
  low, delta = lowmem.split(x, fmt, key=1)
  kwargs = dict(implementation=implementation)
  stored = 0 if delta is None else delta.dtype.itemsize
  if operation == "split":
    f = jax.jit(lambda x: pallas_kernels.split(x, fmt, key=2, **kwargs))
    return lambda: f(x), size * (4 + 2 + stored)
  if operation == "merge":
    f = jax.jit(lambda low, delta: pallas_kernels.merge(low, delta, fmt, **kwargs))
    return lambda: f(low, delta), size * (4 + 2 + stored)
  if operation == "stochastic_round":
    f = jax.jit(lambda x: pallas_kernels.stochastic_round(2, x, base.dtype, **kwargs))
    return lambda: f(x), size * (4 + 2)
  f = jax.jit(
    lambda low, delta: pallas_kernels.apply_update(low, delta, x, fmt, key=2, **kwargs),
    donate_argnums=(0, 1),
  )
  state = [low, delta]

  def run():
    state[:] = f(*state)
    return state

  return run, size * (4 + 2 * (2 + stored))


def seconds(run, repeats: int) -> float:
  """The mean time of a call, in seconds."""
  start = time.perf_counter()
  for _ in range(repeats):
    result = run()
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / repeats


def measure(case: dict, rounds: int = 7, repeats: int = 20) -> dict:
  """Measures the median times of both implementations, alternating."""
  runs = {name: prepare(**case, implementation=name) for name in ("xla", "mosaic_gpu")}
  times: dict[str, list[float]] = {name: [] for name in runs}
  for run, _ in runs.values():
    seconds(run, 3)
  for _ in range(rounds):
    for name, (run, _) in runs.items():
      times[name].append(seconds(run, repeats))
  median = {name: statistics.median(values) for name, values in times.items()}
  nbytes = runs["xla"][1]
  return {
    **case,
    **{f"{name}_us": value * 1e6 for name, value in median.items()},
    **{f"{name}_gb_per_s": nbytes / value / 1e9 for name, value in median.items()},
    "kernel_over_xla": median["mosaic_gpu"] / median["xla"],
  }


def main():
  """Prints one line for each case, and writes them to a file."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    "--out", type=pathlib.Path, default=pathlib.Path("benchmarks/results/kernels.json")
  )
  args = parser.parse_args()
  device = jax.devices()[0]
  if device.platform != "gpu":
    parser.error(f"this benchmark needs a GPU; the device is {device.device_kind!r}")
  rows = []
  for case in CASES:
    rows.append(measure(case))
    print(json.dumps(rows[-1]), flush=True)
  args.out.parent.mkdir(parents=True, exist_ok=True)
  about = dict(device=device.device_kind, jax=jax.__version__, date=time.strftime("%Y-%m-%d"))
  args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
  main()
