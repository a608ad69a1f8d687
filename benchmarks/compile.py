"""The cost of compiling an optimizer step, in seconds and in kernels.

  python -m benchmarks.compile [--sets NAME ...] [--targets NAME ...] [--repeats N]
  python -m benchmarks.compile --plot docs/compile.png
  python -m benchmarks.compile --markdown

Measures the seconds of trace, lower and compile (wall clock, and CPU seconds of
the process) for a CPU, and for an H100 and an A100 that need not be present (the
`h100` extra). Counts the distinct kernels. Each shape set and target runs in a
process of its own, so no other set's caches help; of `--repeats` processes, the
fastest counts. The process first compiles every kind of step for a tiny tree,
which does the lazy imports. It clears caches between contenders and measures
`optax.adamw` first and last. Only eager `lowmem.init` is executed.

Prints tables and writes `benchmarks/results/compile.json`. `--plot` draws that
file, and `--markdown` fills docs/compile.md from it.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from benchmarks import contenders, hlo, shapes
from benchmarks.step import ROOT, gpu_compiler, log, markdown, nbytes, report
import optax_lowmem as lowmem

SETS: dict[str, shapes.Shapes] = {
  "GPT-2 124M": shapes.gpt2(),
  "Llama, 32 layers": shapes.llama_unrolled(),
  "ResNet-50": shapes.resnet50(),
  "forty ragged": shapes.forty_ragged(),
}
TINY: shapes.Shapes = {"matrix": (64, 64), "bias": (64,), "ragged": (3, 5)}
TARGETS = ("cpu", "h100", "a100")
PHASES = ("trace", "lower", "compile")
COUNTS = (
  "distinct kernels",
  "that compute",
  "instructions / leaf",
  "fusions",
  "temporaries / state",
)
WITHOUT_LIMIT = ("ResNet-50",)

ADAMW = lowmem.adamw(1e-3)
OPTAX, STEP, UPDATE = "optax.adamw, fp32", "lowmem.step", "tx.update, apply_updates"
JITTED, EAGER = "lowmem.init, jitted", "lowmem.init, eager"

# (target, contender) -> (multiple of optax.adamw's time, seconds); the larger one is the limit.
LIMITS: dict[tuple[str, str], tuple[float, float]] = {
  ("h100", STEP): (3, 8),
  ("h100", UPDATE): (5, 12),
  ("cpu", STEP): (10, 0),
  ("cpu", UPDATE): (15, 0),
  ("a100", STEP): (8, 0),
  ("cpu", EAGER): (0, 5.0),
  ("h100", JITTED): (3, 0),
}


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to compile: a contender's step, or `lowmem.init`."""

  name: str
  contender: contenders.Contender


def jobs(target: str) -> list[Job]:
  """The jobs to compare for a target; `optax.adamw` is the first and the last."""
  ours = contenders.ours("", ADAMW)
  found = [
    Job(OPTAX, contenders.FP32_ADAMW),
    Job(STEP, ours),
    Job(UPDATE, contenders.ours("", ADAMW, apply_updates=True)),
  ]
  if target == "h100":
    found += [Job(peer.name, peer) for peer in contenders.flashoptim_jax()]
  if target in ("cpu", "h100"):
    found.append(Job(JITTED, ours))
  if target == "cpu":
    found.append(Job(EAGER, ours))
  return [*found, found[0]]


def clock() -> tuple[float, float]:
  """Wall clock, and CPU seconds of this process and its children (an assembler)."""
  times = os.times()
  return time.perf_counter(), sum(times[:4])


def measure(job: Job, leaf_shapes: shapes.Shapes, target: str, gpus) -> dict[str, Any]:
  """Compiles a job; returns seconds by phase, and counts of the compiled program."""
  if job.name == EAGER:
    return _measure_eager(job, leaf_shapes)
  on_device = (lambda tree: tree) if gpus is None else lambda tree: gpus.on_device(tree, target)
  contender = job.contender
  masters = shapes.structs(leaf_shapes)
  params, state = jax.eval_shape(contender.init, masters)
  grads = shapes.structs(leaf_shapes, contender.dtype)
  if job.name == JITTED:
    f, args = jax.jit(contender.init), on_device((masters,))
  else:
    step = lambda params, state, grads: contender.step(grads, state, params)
    # In the order of the outputs; see benchmarks/step.py.
    f, args = jax.jit(step, donate_argnums=(0, 1)), on_device((params, state, grads))
  device = None if gpus is None else next(iter(gpus.sharding(target).device_set))
  jax.clear_caches()
  with contender.context(device):
    times = [clock()]
    traced = f.trace(*args)
    times.append(clock())
    lowered = traced.lower()
    times.append(clock())
    compiled = lowered.compile()
    times.append(clock())
  wall, cpu = (
    [after[i] - before[i] for before, after in itertools.pairwise(times)] for i in (0, 1)
  )
  counts = hlo.cost(compiled.as_text())
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  values = (
    counts["distinct kernels"],
    counts["that compute"],
    counts["instructions"] / len(leaf_shapes),
    counts["fusions"],
    temporaries / nbytes((params, state)),
  )
  return _row(job, leaf_shapes, wall, cpu) | dict(zip(COUNTS, values, strict=True))


def _measure_eager(job: Job, leaf_shapes: shapes.Shapes) -> dict[str, Any]:
  masters = jax.block_until_ready(shapes.normal(leaf_shapes))
  jax.clear_caches()
  before = clock()
  jax.block_until_ready(job.contender.init(masters))
  after = clock()
  row = _row(job, leaf_shapes, [after[0] - before[0]], [after[1] - before[1]])
  return row | dict.fromkeys(COUNTS)  # eager init compiles many small programs


def _row(job: Job, leaf_shapes: shapes.Shapes, wall: list[float], cpu: list[float]):
  """The columns that all jobs share; eager `init` has no phases."""
  phases = wall if len(wall) == len(PHASES) else [None] * len(PHASES)
  return {
    "contender": job.name,
    "leaves": len(leaf_shapes),
    **dict(zip((f"{phase}, s" for phase in PHASES), phases, strict=True)),
    "seconds": sum(wall),
    "CPU seconds": sum(cpu),
    "CPU seconds by phase": dict(zip(PHASES if phases[0] else ("run",), cpu, strict=True)),
  }


def work(set_name: str, target: str, parser) -> list[dict[str, Any]]:
  """Measures all rows of one set and target, in this process."""
  jax.config.update("jax_platforms", "cpu")
  gpus = None if target == "cpu" else gpu_compiler(parser)
  found = jobs(target)
  for job in found[:-1]:
    measure(job, TINY, target, gpus)
  rows = []
  for job in found:
    rows.append(measure(job, SETS[set_name], target, gpus))
    log(f"{target}: {set_name}: {job.name}: {rows[-1]['seconds']:.2f} s")
  last = rows.pop()
  rows[0] = min(rows[0], last, key=lambda row: row["seconds"])
  for row in rows:
    row["/ optax.adamw"] = row["seconds"] / rows[0]["seconds"]
    row["optax.adamw, s"] = rows[0]["seconds"]
  return rows


def in_process(set_name: str, target: str) -> list[dict[str, Any]]:
  """Runs `work` in a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "rows.json"
    command = [sys.executable, "-m", "benchmarks.compile", "--work", set_name, target]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    subprocess.run([*command, "--out", str(out)], cwd=ROOT, env=environment, check=True)
    return json.loads(out.read_text())


def fastest(repeats: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
  """For each contender, the row of the fastest repeat."""
  return [min(rows, key=lambda row: row["seconds"]) for rows in zip(*repeats, strict=True)]


def judged(set_name: str, target: str, row: dict[str, Any]) -> dict[str, Any]:
  """The row with its limit and verdict."""
  limit = LIMITS.get((target, row["contender"]))
  seconds = None if limit is None else max(limit[0] * row["optax.adamw, s"], limit[1])
  if set_name in WITHOUT_LIMIT:
    seconds = None
  verdict = "" if seconds is None else "pass" if row["seconds"] <= seconds else "miss"
  return {"shapes": set_name, **row, "limit, s": seconds, "verdict": verdict}


def run(sets: list[str], targets: list[str], repeats: int) -> dict:
  """Measures the tables, one for each target."""
  tables: dict[str, list] = {}
  load = [os.getloadavg()[0]]
  for target in targets:
    for set_name in sets:
      rows = fastest([in_process(set_name, target) for _ in range(repeats)])
      tables.setdefault(target, []).extend(judged(set_name, target, row) for row in rows)
      load.append(os.getloadavg()[0])
  peer = contenders.flashoptim_jax()
  return {
    "cores": os.cpu_count(),
    "load": load,
    "repeats": repeats,
    "tables": tables,
    "absent": {} if peer or "h100" not in targets else {"flashoptim-jax": "not installed"},
  }


BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def summary(results: dict) -> str:
  """Markdown of a report: for each target, "seconds (ratio) verdict" by contender and set."""
  parts = [
    f"JAX {results['jax']}, commit {results['commit']}, {results['date']},"
    f" {results['cores']} cores, fastest of {results['repeats']}."
  ]
  for target, rows in results["tables"].items():
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
      verdict = f" **{row['verdict']}**" if row["verdict"] == "miss" else ""
      text = f"{row['seconds']:.1f} s ({row['/ optax.adamw']:.1f}){verdict}"
      if row["distinct kernels"] is not None:
        text += f", {row['distinct kernels']} kernels"
      cells.setdefault(row["contender"], {})[row["shapes"]] = text
    sets = list(dict.fromkeys(row["shapes"] for row in rows))
    table = [
      {"": f"`{name}`"} | {set_name: row.get(set_name, "") for set_name in sets}
      for name, row in cells.items()
    ]
    parts.append(f"### For {target}\n\n{markdown(table)}")
  return "\n\n".join(parts)


def fill(page: pathlib.Path, results: dict):
  """Writes the summary between the page's markers."""
  before, _, rest = page.read_text().partition(BEGIN)
  _, _, after = rest.partition(END)
  page.write_text(f"{before}{BEGIN}\n\n{summary(results)}\n\n{END}{after}")


def plot(results: dict, out: pathlib.Path):
  """Draws grouped bars of seconds, one panel for each target; black lines mark limits."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  tables = results["tables"]
  names = list(dict.fromkeys(row["contender"] for rows in tables.values() for row in rows))
  figure, panels = pyplot.subplots(len(tables), figsize=(9, 3 * len(tables)), squeeze=False)
  for (target, rows), axes in zip(tables.items(), panels[:, 0], strict=True):
    here = [name for name in names if any(row["contender"] == name for row in rows)]
    sets = list(dict.fromkeys(row["shapes"] for row in rows))
    width = 0.8 / len(here)
    for row in rows:
      slot = here.index(row["contender"])
      x = sets.index(row["shapes"]) + (slot - (len(here) - 1) / 2) * width
      axes.bar(x, row["seconds"], 0.9 * width, color=f"C{names.index(row['contender'])}")
      axes.annotate(f"{row['seconds']:.1f}", (x, row["seconds"]), ha="center", va="bottom", size=7)
      if row["limit, s"] is not None:
        axes.hlines(row["limit, s"], x - width / 2, x + width / 2, color="black", linewidth=2)
    axes.set(yscale="log", title=f"compiled for {target}", ylabel="seconds")
    axes.set_xticks(range(len(sets)), sets)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
  handles = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(names))]
  handles.append(pyplot.Line2D([], [], color="black", linewidth=2))
  figure.legend(handles, [*names, "limit"], loc="outside lower center", ncols=3, frameon=False)
  figure.tight_layout(rect=(0, 0.09, 1, 1))
  figure.savefig(out, dpi=150)


def main():
  """Measures, or shows the measurements of a JSON file."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
  parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
  parser.add_argument("--repeats", type=int, default=3, help="processes for each set and target")
  parser.add_argument("--plot", type=pathlib.Path, metavar="PNG", help="draw the JSON file")
  parser.add_argument(
    "--markdown", action="store_true", help="fill docs/compile.md from the JSON file"
  )
  parser.add_argument("--out", type=pathlib.Path, help="the JSON file to write or to show")
  parser.add_argument("--work", nargs=2, metavar=("SET", "TARGET"), help=argparse.SUPPRESS)
  args = parser.parse_args()
  out = args.out or ROOT / "benchmarks/results/compile.json"
  if args.work:
    out.write_text(json.dumps(work(*args.work, parser)))
  elif args.plot or args.markdown:
    results = json.loads(out.read_text())
    if args.plot:
      plot(results, args.plot)
    if args.markdown:
      fill(ROOT / "docs/compile.md", results)
  else:
    if set(args.targets) - {"cpu"}:
      gpu_compiler(parser)  # fails at once if the compiler is missing
    report(lambda: run(args.sets, args.targets, args.repeats), "compile", out)


if __name__ == "__main__":
  main()
