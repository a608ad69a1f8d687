"""SIGKILL at random moments loses nothing but the steps since the last complete checkpoint."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

KILLS = int(os.environ.get("KILLS", "5"))  # `make test-all` says 50
INTERVAL, PAUSE, LONGEST = 4, 0.02, 0.8
STEPS = round(KILLS * LONGEST / PAUSE)  # so many that no run ends before its kill
SCRIPT = pathlib.Path(__file__).with_name("train_and_checkpoint.py")


def start(directory: pathlib.Path, interval: int, pause: float) -> subprocess.Popen:
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "XLA_FLAGS": "",
  }
  directory.mkdir(exist_ok=True)
  (directory / "started").unlink(missing_ok=True)
  args = [sys.executable, str(SCRIPT), str(directory), str(STEPS), str(interval), str(pause)]
  with open(directory / "output", "ab") as output:
    return subprocess.Popen(args, env=environment, stdout=output, stderr=output)


def lines(directory: pathlib.Path) -> list[str]:
  log = directory / "log"
  return log.read_text().splitlines() if log.exists() else []


def wait_for(process: subprocess.Popen, directory: pathlib.Path, condition):
  deadline = time.monotonic() + 120
  while not condition():
    assert process.poll() is None, (directory / "output").read_text()[-3000:]
    assert time.monotonic() < deadline
    time.sleep(0.001)


def checkpoints(directory: pathlib.Path) -> tuple[list[int], list[str]]:
  """The complete ones, and those that are being written."""
  names = [path.name for path in directory.glob("checkpoints/*")]
  return [int(n) for n in names if n.isdigit()], [n for n in names if "tmp" in n]


def test_killed_at_random_moments(tmp_path):
  reference = start(tmp_path / "reference", 0, 0)
  wait_for(
    reference, tmp_path / "reference", lambda: lines(tmp_path / "reference")[-1:] == ["done"]
  )
  reference.wait()
  expected = lines(tmp_path / "reference")[1:-1]
  assert len(expected) == STEPS and len({line.split()[1] for line in expected}) > STEPS // 2

  directory, seed = tmp_path / "killed", random.randrange(1 << 32)
  rng, while_writing, repeated = random.Random(seed), 0, 0
  print("seed", seed)  # pytest shows it where the test fails
  for kill in range(KILLS):
    before = lines(directory)
    complete, _ = checkpoints(directory)
    process = start(directory, INTERVAL, PAUSE)
    if rng.random() < 0.2:  # while it starts or restores
      wait_for(process, directory, (directory / "started").exists)
    else:
      wait_for(process, directory, lambda before=before: len(lines(directory)) > len(before) + 1)
    time.sleep(rng.uniform(0, LONGEST))
    if kill % 3 == 0:
      wait_for(process, directory, lambda: checkpoints(directory)[1])
    assert process.poll() is None, (directory / "output").read_text()[-3000:]
    process.send_signal(signal.SIGKILL)
    process.wait()
    while_writing += bool(checkpoints(directory)[1])
    repeated += check_resumed(before, lines(directory)[len(before) :], complete)
  before, (complete, _) = lines(directory), checkpoints(directory)
  process = start(directory, INTERVAL, PAUSE)
  assert process.wait(timeout=600) == 0, (directory / "output").read_text()[-3000:]
  rest = lines(directory)[len(before) :]
  repeated += check_resumed(before, rest, complete)
  assert rest[-1] == "done"

  steps = [line for line in lines(directory) if line[0].isdigit()]
  assert sorted(set(steps), key=lambda line: int(line.split()[0])) == expected
  assert len(steps) == STEPS + repeated
  assert while_writing >= 1
  print(f"{KILLS} kills, {while_writing} of them while writing; {repeated} steps repeated")


def check_resumed(before: list[str], new: list[str], complete: list[int]) -> int:
  """That a run began behind the newest checkpoint, and how many steps it repeated."""
  if not new:
    return 0  # killed before it had begun
  first = max(complete, default=0)
  assert new[0] == f"resume {first}", (new[0], complete)
  steps = [int(line.split()[0]) for line in new[1:] if line != "done"]
  assert steps == list(range(first, first + len(steps)))
  reached = [int(line.split()[0]) for line in before if line[0].isdigit()]
  last = max(reached, default=-1)
  assert last - first < 2 * INTERVAL  # one checkpoint may be on its way
  return sum(step <= last for step in steps)
