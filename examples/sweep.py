"""The sweep: how many extra bits are enough, and which rounding? (`make sweep`)

Every example and format over five seeds, one process on each core; a format's step is compiled
once. Results are added to docs/results/EXAMPLE.jsonl as they come, and what is there already is
not run again, so that a sweep may be stopped and gone on with. `python -m examples.results`
makes docs/results.md of them.
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
# With one more bit for the direction in which the half-precision part was rounded.
LOW_ROUNDING = tuple(
  f"{dtype}+{bits}:stochastic:stochastic/fp32"
  for dtype, bits in itertools.product(("bf16", "fp16"), (0, 1, 2, 3, 4))
) + tuple(f"{dtype}+3:stochastic/fp32" for dtype in ("bf16", "fp16"))
STATISTICS = ("bf16+8/int8", "bf16+8/bf16", "fp16+8/int8", "bf16+0/int8")
SHORT = (
  *("fp32", "master-bf16", "bf16", "bf16+0:truncate/fp32", "bf16+0:stochastic/fp32"),
  *("bf16+8:stochastic/fp32", "bf16+8/int8", "fp16+8/int8"),
)
CLIP = ("fp32", "master-bf16", "bf16", "bf16+8/bf16", "bf16+8/int8")
OTHERS = ("fp32", "bf16", "bf16+8/int8")
SMALL = "--layers 2 --width 96 --steps 300"
T5 = "--layers 1 --width 64 --hidden 128 --steps 400"


class Plan(NamedTuple):
  """What an example is trained with.

  Attributes:
    formats: of weights and statistics.
    options: besides the example's own.
    example: its module; None where that is the plan's name.
  """

  formats: tuple[str, ...]
  options: str = ""
  example: str | None = None


EVERYTHING = (*BASELINES, *STATISTICS, *BITS, *LOW_ROUNDING)
PLAN = {
  "t5": Plan(EVERYTHING, T5),
  "dlrm": Plan(EVERYTHING),
  "lstm": Plan(EVERYTHING),
  "resnet18": Plan(SHORT, "--width 8 --steps 300"),
  "dcgan": Plan((*SHORT, "fp16"), "--width 8 --steps 500"),
  "clip": Plan(CLIP, "--no-checkpointing"),  # which changes memory and time alone
  "shakespeare": Plan(SHORT),
  "lion": Plan(OTHERS, f"{SMALL} --optimizer lion --learning-rate 1e-4", "shakespeare"),
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
  """The formats and seeds that are there."""
  path = FOLDER / f"{example}.jsonl"
  if not path.exists():
    return set()
  lines = (json.loads(line) for line in path.read_text().splitlines())
  return {(line["format"], line["seed"]) for line in lines}


def main():
  """Runs what is not there yet."""
  parser = argparse.ArgumentParser(
    prog="python -m examples.sweep",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("examples", nargs="*", help=f"of {', '.join(PLAN)}; all by default")
  parser.add_argument("--seeds", type=int, default=5, help="how many (%(default)s)")
  parser.add_argument("--minutes", type=float, default=360, help="at most (%(default)s)")
  parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    example, fmt, seeds = args.one
    return run(example, fmt, json.loads(seeds))
  if unknown := set(args.examples) - set(PLAN):
    parser.error(f"there is no example {', '.join(sorted(unknown))}; there are {', '.join(PLAN)}")
  FOLDER.mkdir(parents=True, exist_ok=True)
  until = datetime.datetime.now() + datetime.timedelta(minutes=args.minutes)
  cores = sorted(os.sched_getaffinity(0))
  free = list(cores)

  def train(job):
    """One format, all its seeds; returns whether it worked."""
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
      seeds = [seed for seed in range(args.seeds) if (fmt, seed) not in known]
      if seeds:
        jobs.append((example, fmt, seeds))
  print(f"{len(jobs)} formats to train, on {len(cores)} cores", flush=True)
  with concurrent.futures.ThreadPoolExecutor(len(cores)) as pool:
    sys.exit(not all(list(pool.map(train, jobs))))  # a format that fails stops no other


if __name__ == "__main__":
  main()
