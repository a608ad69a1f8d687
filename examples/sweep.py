"""The sweep: how many extra bits are enough, and which rounding? (`make sweep`)

It trains every example in every format with five seeds, one process on each core, and compiles
the step of a format once. Results go to docs/results/EXAMPLE.jsonl as they arrive. Runs with a
result there are skipped, so a sweep can be interrupted and resumed. `python -m examples.results`
builds docs/results.md from the results.
"""

import argparse
import concurrent.futures
import datetime
import importlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

FOLDER = pathlib.Path(__file__).parent.parent / "docs" / "results"
BASELINES = ("fp32", "master-bf16", "master-fp16", "bf16", "fp16")
EXTRA_BITS, ROUNDINGS = (0, 1, 2, 4, 8, 16), ("truncate", "nearest", "stochastic")
BITS = tuple(
  f"{dtype}+{bits}:{rounding}/fp32"
  for dtype, bits, rounding in itertools.product(("bf16", "fp16"), EXTRA_BITS, ROUNDINGS)
)
# One more bit records the direction in which the half-precision part was rounded.
LOW_ROUNDING = tuple(
  f"{dtype}+{bits}:stochastic:stochastic/fp32"
  for dtype, bits in itertools.product(("bf16", "fp16"), (0, 1, 2, 3, 4))
) + tuple(f"{dtype}+3:stochastic/fp32" for dtype in ("bf16", "fp16"))
STATISTICS = ("bf16+8/int8", "bf16+8/bf16", "fp16+8/int8", "bf16+0/int8")
INT4 = ("bf16+8/int8-int4", "bf16+0/int8-int4", "bf16+0/int4")
BY_STATISTICS = ("fp32", "bf16", "bf16+8/int8", "bf16+0/int8", *INT4)
SHORT = (
  *("fp32", "master-bf16", "bf16", "bf16+0:truncate/fp32", "bf16+0:stochastic/fp32"),
  *("bf16+8:stochastic/fp32", "bf16+8/int8", "fp16+8/int8"),
)
CLIP = ("fp32", "master-bf16", "bf16", "bf16+8/bf16", "bf16+8/int8")
OTHERS = ("fp32", "bf16", "bf16+8/int8")
SMALL = "--layers 2 --width 96 --steps 300"
T5 = "--layers 1 --width 64 --hidden 128 --steps 400"


class Plan(NamedTuple):
  """The runs of an example.

  Attributes:
    formats: the formats of weights and statistics.
    options: options that override the example's defaults.
    example: the module of the example; None if the plan has its name.
    seeds: the most seeds that it runs.
  """

  formats: tuple[str, ...]
  options: str = ""
  example: str | None = None
  seeds: int = 1 << 10


EVERYTHING = (*BASELINES, *STATISTICS, *BITS, *LOW_ROUNDING)
PLAN = {
  "t5": Plan((*EVERYTHING, *INT4), T5),
  "dlrm": Plan(EVERYTHING),
  "lstm": Plan((*EVERYTHING, *INT4)),
  "resnet18": Plan(SHORT, "--width 8 --steps 300"),
  "dcgan": Plan((*SHORT, "fp16"), "--width 8 --steps 500"),
  "clip": Plan(CLIP, "--no-checkpointing"),  # checkpointing changes only memory and time
  "shakespeare": Plan((*SHORT, *INT4)),
  "b2": Plan(BY_STATISTICS, f"{SMALL} --b2 0.95", "shakespeare"),
  "long": Plan(BY_STATISTICS, f"{SMALL} --steps 4000", "shakespeare", seeds=1),
  "lion": Plan(OTHERS, f"{SMALL} --optimizer lion --learning-rate 1e-4", "shakespeare"),
  "muon": Plan(
    ("fp32", "bf16", "bf16+8/int8", "bf16+0/int8"),
    f"{SMALL} --optimizer muon --learning-rate 3e-3",
    "shakespeare",
  ),
  "muon_lstm": Plan(
    ("fp32", "master-bf16", "bf16", "bf16+8/int8", "bf16+0/int8"),
    "--optimizer muon --learning-rate 3e-2",
    "lstm",
  ),
  "sgd": Plan(OTHERS, f"{SMALL} --optimizer sgd --learning-rate 0.1", "shakespeare"),
}


def run(name: str, fmt: str, seeds: list[int]):
  """Trains one format of a plan; prints a line of JSON for each seed."""
  from examples import training

  plan = PLAN[name]
  module = importlib.import_module(f"examples.{plan.example or name}")
  args = training.parse(module.make_parser(), ["--format", fmt, *plan.options.split()])
  make_optimizer = getattr(module, "make_optimizer", training.make_optimizer)
  for result in training.train(
    module.make_task, args.formats[0], args, seeds, make_optimizer, show=False
  ):
    del result["losses"], result["evaluations"]
    print(json.dumps({"example": name} | result), flush=True)


def done(example: str) -> set[tuple[str, int]]:
  """The formats and seeds that have results."""
  path = FOLDER / f"{example}.jsonl"
  if not path.exists():
    return set()
  lines = (json.loads(line) for line in path.read_text().splitlines())
  return {(line["format"], line["seed"]) for line in lines}


def main():
  """Runs every format and seed that has no result yet."""
  parser = argparse.ArgumentParser(
    prog="python -m examples.sweep",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("examples", nargs="*", help=f"any of {', '.join(PLAN)}; default: all")
  parser.add_argument("--seeds", type=int, default=5, help="number of seeds (%(default)s)")
  parser.add_argument("--minutes", type=float, default=360, help="time limit (%(default)s)")
  parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    example, fmt, seeds = args.one
    return run(example, fmt, json.loads(seeds))
  if unknown := set(args.examples) - set(PLAN):
    parser.error(f"unknown example: {', '.join(sorted(unknown))}; choose from {', '.join(PLAN)}")
  FOLDER.mkdir(parents=True, exist_ok=True)
  until = datetime.datetime.now() + datetime.timedelta(minutes=args.minutes)
  cores = sorted(os.sched_getaffinity(0))
  free = list(cores)

  def train(job):
    """Trains one format with all its seeds; returns whether it succeeded."""
    example, fmt, seeds = job
    if datetime.datetime.now() > until:
      return True
    core = free.pop()
    command = [sys.executable, "-m", "examples.sweep", "--one", example, fmt, json.dumps(seeds)]
    found = subprocess.run(
      ["taskset", "-c", str(core), *command],
      capture_output=True,
      text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    free.append(core)
    if found.returncode:
      print(f"{example} {fmt} failed:\n{found.stderr[-2000:]}", flush=True)
      return False
    with open(FOLDER / f"{example}.jsonl", "a") as file:
      file.write(found.stdout)
    figures = [json.loads(line)["figures"] for line in found.stdout.splitlines()]
    print(example, fmt, [round(next(iter(f.values())), 4) for f in figures], flush=True)
    return True

  jobs = []
  for example in args.examples or PLAN:
    known = done(example)
    for fmt in dict.fromkeys(PLAN[example].formats):
      count = min(args.seeds, PLAN[example].seeds)
      seeds = [seed for seed in range(count) if (fmt, seed) not in known]
      if seeds:
        jobs.append((example, fmt, seeds))
  print(f"{len(jobs)} formats to train, on {len(cores)} cores", flush=True)
  with concurrent.futures.ThreadPoolExecutor(len(cores)) as pool:
    sys.exit(not all(list(pool.map(train, jobs))))  # a failure does not stop the other formats


if __name__ == "__main__":
  main()
