"""Optimizer steps: their time on a CPU, their memory on an H100, their speed on a GPU.

  python -m benchmarks.step cpu [--sets NAME ...]
  python -m benchmarks.step h100-compile
  python -m benchmarks.step gpu

cpu: times a jitted, donated step on given gradients. All contenders take turns
within one process. Reports ratios to the first contender of each group, with our
limits; the bandwidth (gradients count once, weights and state twice); the CPU
time a parameter; and the resident bytes.

h100-compile: compiles for an H100 that need not be present (the `h100` extra).
Reports the peak bytes a parameter of a training step of a 0.8B transformer, and
the temporaries and kernel launches of the optimizer step alone. Nothing is
executed.

gpu: runs the tests of bits and kernels on the device (benchmarks.device_tests),
then compares a step with a copy of the same bytes; both take turns within one
process. The gradients count once (read), weights and state twice (read and
written). The times include dispatch from Python, which matters for small sizes.
It ends within `--seconds` (eight minutes); rows without time say so.

Every contender donates its buffers in the order in which it returns them (see
`check_in_place`). Each command prints tables and writes
`benchmarks/results/NAME.json`.
"""

import argparse
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

from benchmarks import contenders, device_tests, hlo, shapes, torch_peers
import optax_lowmem as lowmem

ROOT = pathlib.Path(__file__).parents[1]
ROUNDS = 7
# (shapes, optimizer) -> the largest allowed ratio to optax.adamw, for the default formats.
RATIO_LIMITS = {
  ("one matrix, 50M", contenders.DEFAULT.name): 2.0,
  ("ragged, 5000 x 5000", contenders.DEFAULT.name): 4.0,
  ("GPT-2 124M", contenders.DEFAULT.name): 2.5,
  ("GPT-2 124M", contenders.DEFAULT_UPDATE.name): 3.0,
}
TEMPORARIES_LIMIT = 0.5  # bytes a parameter, for the same formats
GPU_SIZES = [10**8, 10**9, 10**7, 10**6]  # the most telling first
GPU_BYTES = 2e10  # least bytes between two readings of the clock, in at most 200 steps


def nbytes(tree) -> int:
  """The bytes of a tree of arrays or structs."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def log(x):
  """Reports progress on stderr; only the tables go to stdout."""
  print(x, file=sys.stderr, flush=True)


def check_in_place(contender: contenders.Contender, compiled, resident: int):
  """Raises if plain Optax is needlessly slow because of copies from mispaired donation.

  JAX pairs donated buffers of one shape and dtype with results in order. A step
  that takes (state, params) and returns (params, state) would write new weights
  over mu. The copies that this takes would slow fp32 Adam down by 3 to 4 times.

  Args:
    contender: the contender whose step was compiled, with donated params and state.
    compiled: the step, which keeps its arguments.
    resident: the bytes of params and state.
  """
  if contender.most_temporaries is None:
    return  # the tables show its temporaries
  stats = compiled.memory_analysis()
  for result, argument in hlo.donated(compiled.as_text()):
    assert result == argument, f"{contender.name}: result {result} goes over argument {argument}"
  missing = resident - stats.alias_size_in_bytes
  assert missing == 0, f"{contender.name}: {missing} bytes of the state are not in place"
  temporaries = stats.temp_size_in_bytes / resident
  assert temporaries <= contender.most_temporaries, f"{contender.name}: temporaries {temporaries}"


class Run:
  """A contender with its arrays, ready to step."""

  def __init__(self, contender: contenders.Contender, leaf_shapes: shapes.Shapes, grads):
    # Not jitted: XLA would spend minutes on folding the stored zeros of int8 statistics.
    self.params, self.state = contender.init(shapes.normal(leaf_shapes))
    self.grads = grads
    # keep_unused also donates weights that are only written (the copies of masters).
    step = jax.jit(lambda p, s, g: contender.step(g, s, p), donate_argnums=(0, 1), keep_unused=True)
    self.step = step.lower(self.params, self.state, grads).compile()
    self.temporaries = self.step.memory_analysis().temp_size_in_bytes
    self.bytes = nbytes((self.params, self.state))
    check_in_place(contender, self.step, self.bytes)
    self.moved = nbytes(grads) + 2 * self.bytes
    table = lowmem.memory_table(self.params, self.state)
    if contender.is_ours:  # checks the count in a second way
      assert table.total == self.bytes
    self.parts = table.bytes_per_param

  def __call__(self):
    """Dispatches one step, without waiting for its result."""
    self.params, self.state = self.step(self.params, self.state, self.grads)
    return self.params, self.state


def seconds(run, repeats: int = 1) -> float:
  """The mean time of a call, in seconds."""
  start = time.perf_counter()
  for _ in range(repeats):
    result = run()
  jax.block_until_ready(result)
  return (time.perf_counter() - start) / repeats


def both_seconds(run) -> tuple[float, float]:
  """The time of one call, and the CPU time of all its threads, in seconds."""
  start = time.process_time()
  wall = seconds(run)
  return wall, time.process_time() - start


def verdict(value: float, limit: float | None) -> str:
  """Compares a figure with its limit, for a table."""
  return "" if limit is None else f"{'pass' if value <= limit else 'miss'} (<= {limit})"


def cpu(parser, args) -> dict:
  """Measures times on the CPU, and bytes."""
  del parser
  jax.config.update("jax_platforms", "cpu")
  rows, load = [], [os.getloadavg()[0]]
  for set_name in args.sets:
    leaf_shapes = shapes.SETS[set_name]
    count = shapes.count(leaf_shapes)
    for group in contenders.CPU.values():
      grads = {
        dtype: shapes.normal(leaf_shapes, dtype, seed=1, scale=1.0)
        for dtype in {contender.dtype for contender in group}
      }
      runs, times = [], [[] for _ in group]
      for contender in group:
        runs.append(Run(contender, leaf_shapes, grads[contender.dtype]))
        seconds(runs[-1], 2)
        log(f"{set_name}: {contender.name}: warm")
      for _ in range(ROUNDS):
        for run, values in zip(runs, times, strict=True):
          values.append(both_seconds(run))
      base = [wall for wall, _ in times[0]]
      for contender, run, values in zip(group, runs, times, strict=True):
        walls = [wall for wall, _ in values]
        ratio, temporaries = min(walls) / min(base), run.temporaries / count
        is_default = contender in (contenders.DEFAULT, contenders.DEFAULT_UPDATE)
        rows.append(
          {
            "shapes": set_name,
            "optimizer": contender.name,
            "bytes/param": run.bytes / count,
            "temporary bytes/param": temporaries,
            "ms, min": min(walls) * 1e3,
            "ms, median": statistics.median(walls) * 1e3,
            "GB/s": run.moved / min(walls) / 1e9,
            "CPU ns/param": min(values)[1] / count * 1e9,  # of the fastest call
            "ratio of min": ratio,
            "ratio of median": statistics.median(walls) / statistics.median(base),
            "ratio's limit": verdict(ratio, RATIO_LIMITS.get((set_name, contender.name))),
            "temporaries' limit": verdict(temporaries, TEMPORARIES_LIMIT if is_default else None),
            "parts": run.parts,
          }
        )
      load.append(os.getloadavg()[0])
      del runs, run, grads
      gc.collect()
  about = dict(device=platform.machine() + " CPU", cores=os.cpu_count(), load=load, rounds=ROUNDS)
  # The PyTorch peers run on a GPU only; here the report just says why they are missing.
  why = "measured on a GPU only" if importlib.util.find_spec("torch") else "not installed"
  return {**about, "tables": {"A step on the CPU": rows}, "absent": {"PyTorch": why}}


def gpu_compiler(parser):
  """The module `tests/h100.py`; exits with an error if its compiler is not installed."""
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  jax.config.update("jax_platforms", "cpu")
  sys.path.insert(0, str(ROOT / "tests"))
  import h100

  if h100.sharding() is None:
    parser.error("compiling for an H100 needs the h100 extra: pip install -e '.[h100]'")
  return h100


def h100_compile(parser, args) -> dict:
  """Reports memory and launches, compiled for an H100."""
  del args
  h100 = gpu_compiler(parser)
  (device,) = h100.sharding().device_set
  peer = contenders.flashoptim_jax()

  def compiled(contender, leaf_shapes, f, *more):
    params, state = jax.eval_shape(contender.init, shapes.structs(leaf_shapes))
    structs = h100.on_device((params, state, *more))
    with contender.context(device):
      return h100.compiled(f, *structs, donate=(0, 1)), nbytes((params, state))

  def train(contender, params, state, x):
    loss = lambda params: lowmem.scale_loss(shapes.transformer_loss(params, x), state)
    return contender.step(jax.grad(loss)(params), state, params)

  peaks, steps = [], []
  for contender in contenders.TRAINING + peer:
    count = shapes.count(shapes.TRANSFORMER)
    x = jax.ShapeDtypeStruct((shapes.TOKENS, shapes.WIDTH), contender.dtype)
    f = functools.partial(train, contender)
    done, resident = compiled(contender, shapes.TRANSFORMER, f, x)
    stats = done.memory_analysis()
    peaks.append(
      {
        "optimizer": contender.name,
        "resident bytes/param": resident / count,
        "peak bytes/param": stats.peak_memory_in_bytes / count,
        "peak - resident": (stats.peak_memory_in_bytes - resident) / count,
      }
    )
    log(peaks[-1])
  for name in ("0.8B, stacked", "one matrix, 50M", "ResNet-50"):
    leaf_shapes = shapes.SETS.get(name, shapes.TRANSFORMER)
    for contender in contenders.STEPS + peer:
      grads = shapes.structs(leaf_shapes, contender.dtype)
      f = lambda params, state, grads, step=contender.step: step(grads, state, params)
      done, resident = compiled(contender, leaf_shapes, f, grads)
      stats = done.memory_analysis()
      check_in_place(contender, done, resident)
      steps.append(
        {
          "shapes": name,
          "leaves": len(leaf_shapes),
          "optimizer": contender.name,
          "temporaries / state": stats.temp_size_in_bytes / resident,
          "state not in place": 1 - stats.alias_size_in_bytes / resident,
          **hlo.count_launches(done.as_text()),
        }
      )
      log(steps[-1])
  return {
    "device": f"{device.device_kind} (compiled for, not run)",
    "model": dict(shapes.TRANSFORMER, tokens=shapes.TOKENS),
    "tables": {"A training step, 0.8B parameters": peaks, "The optimizer step alone": steps},
    "absent": {} if peer else {"flashoptim-jax": "not installed"},
  }


def gpu(parser, args) -> dict:
  """Runs tests on a GPU, then compares steps with copies of the same bytes."""
  end = time.perf_counter() + args.seconds
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves room for PyTorch
  try:
    device = jax.devices("gpu")[0]
  except RuntimeError as error:
    parser.error(f"this benchmark needs a GPU, and JAX finds none: {error}")
  tested = device_tests.run(min(device_tests.SECONDS, args.seconds / 2))
  rows, absent = gpu_rows(GPU_SIZES, end)
  return {
    "device": device.device_kind,
    "tables": {"Tests on the GPU": tested, "A step on the GPU": rows},
    "absent": absent,
  }


def gpu_rows(sizes, end: float) -> tuple[list[dict], dict[str, str]]:
  """Measures JAX's and PyTorch's optimizers for some sizes, until the clock reads end."""
  peer = contenders.flashoptim_jax()
  absent = {} if peer else {"flashoptim-jax": "not installed"}
  peers = {}
  for candidate in torch_peers.PEERS:
    try:
      peers[candidate] = torch_peers.load(candidate)
    except Exception as error:  # a foreign package can fail at import in any way
      absent[candidate.name] = f"{type(error).__name__}: {error}"
  rows = []
  for size in sizes:
    shape = shapes.matrix(size)
    for contender in contenders.GPU + peer:
      prepare = functools.partial(prepare_jax, contender, shape)
      rows.append(attempt(size, contender.name, prepare, seconds, end))
    for candidate, module in peers.items():
      prepare = functools.partial(torch_peers.prepare, candidate, module, shape["w"])
      rows.append(attempt(size, candidate.name, prepare, torch_peers.seconds, end))
  return rows, absent


def prepare_jax(contender, leaf_shapes):
  """(step, copy, bytes that a step reads and writes, resident bytes)."""
  grads = shapes.normal(leaf_shapes, contender.dtype, seed=1, scale=1.0)
  run = Run(contender, leaf_shapes, grads)
  source = jnp.zeros(run.moved // 8, jnp.float32)
  copy = jax.jit(jnp.copy)
  return run, lambda: copy(source), run.moved, run.bytes


def attempt(size: int, name: str, prepare, seconds, end: float) -> dict:
  """Measures a row of the GPU's table; if an optimizer does not run, the row says why."""
  row: dict = {"parameters": size, "optimizer": name}
  numbers = ("bytes/param", "moved/param", "ms", "GB/s", "copy's time / step's")
  try:
    if time.perf_counter() > end:
      raise TimeoutError("no time was left")
    step, copy, moved, resident = prepare()
    repeats = max(3, min(200, int(GPU_BYTES / moved)))
    times: dict[str, list[float]] = {"step": [], "copy": []}
    for run in (step, copy):
      seconds(run, 3)
    for _ in range(ROUNDS):
      times["step"].append(seconds(step, repeats))
      times["copy"].append(seconds(copy, repeats))
    medians = {key: statistics.median(values) for key, values in times.items()}
    took = medians["step"]
    values = (resident / size, moved / size, took * 1e3, moved / took / 1e9, medians["copy"] / took)
    row |= dict(zip(numbers, values, strict=True))
  except Exception as error:  # out of memory or time, or a fault in a peer: the others go on
    row |= dict.fromkeys(numbers) | {"failed": f"{type(error).__name__}: {error}"[:300]}
  gc.collect()
  log(row)
  return row


def markdown(rows: list[dict]) -> str:
  """The rows as a Markdown table, without columns whose cells are dictionaries."""

  def cell(value, row):
    if value is None:
      return "failed" if "failed" in row else ""
    return f"{value:,.3f}" if isinstance(value, float) else str(value)

  columns = [name for name in rows[0] if not isinstance(rows[0][name], dict)]
  right = [isinstance(rows[0][name], (int, float)) for name in columns]
  lines = [columns, ["---:" if r else "---" for r in right]]
  lines += [[cell(row[name], row) for name in columns] for row in rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


COMMANDS = {"cpu": cpu, "h100-compile": h100_compile, "gpu": gpu}


def main():
  """Runs one command, prints its tables and writes them to a file."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("command", choices=COMMANDS)
  parser.add_argument("--sets", nargs="+", choices=shapes.SETS, default=list(shapes.SETS))
  parser.add_argument("--seconds", type=float, default=480, help="the limit of gpu")
  parser.add_argument("--out", type=pathlib.Path, help="the JSON file to write")
  args = parser.parse_args()
  report(lambda: COMMANDS[args.command](parser, args), args.command.replace("-", "_"), args.out)


def report(run, name: str, out: pathlib.Path | None = None):
  """Prints the tables that run returns and writes them with versions, commit and date."""
  # Read before the run, because the working tree may change during it.
  commit = subprocess.run(
    ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
  ).stdout.strip()
  results = run()
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}
  results = {**versions, "commit": commit, "date": time.strftime("%Y-%m-%d"), **results}
  for title, rows in results["tables"].items():
    print(f"\n{title}\n\n{markdown(rows)}")
  for absent, why in results.get("absent", {}).items():
    print(f"absent: {absent} ({why})")
  out = out or ROOT / f"benchmarks/results/{name}.json"
  out.parent.mkdir(parents=True, exist_ok=True)
  out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
  main()
