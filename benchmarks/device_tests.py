"""Runs the tests of bits and kernels on this machine's GPU, without JAX's interpreter.

  python -m benchmarks.device_tests

Elsewhere the same tests run the kernels under the interpreter, and what they compare
with on a CPU.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
FILES = ["test_kernels", "test_fused_update", "test_arithmetic", "test_random_bits"]
PLATFORM = "cuda"
SECONDS = 200  # leaves five minutes of eight to the benchmark
PROCESSES = 8


def run(seconds: float = SECONDS) -> list[dict]:
  """Runs the tests for at most some seconds.

  Args:
    seconds: when to stop them.

  Returns:
    A row for the whole, and one for each test that failed, with its error.
  """
  command = [sys.executable, "-m", "pytest", "-q", "-n", str(PROCESSES), "-p", "no:warnings"]
  command += [f"tests/{name}.py" for name in FILES]
  environment = os.environ | {
    "JAX_PLATFORMS": f"{PLATFORM},cpu",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the processes share one GPU
  }
  start = time.perf_counter()
  with tempfile.TemporaryFile("w+") as output:
    try:
      subprocess.run(command, cwd=ROOT, env=environment, stdout=output, timeout=seconds)
      end = ""
    except subprocess.TimeoutExpired:
      end = f"stopped after {seconds:.0f} s; "
    took = time.perf_counter() - start
    output.seek(0)
    printed = output.read()
  print(printed, file=sys.stderr)
  failures = re.findall(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$", printed, re.MULTILINE)
  lines = printed.strip().splitlines() or ["nothing was printed"]
  whole = {"tests": ", ".join(FILES), "result": f"{end}{lines[-1]}", "seconds": took}
  return [whole] + [
    {"tests": name, "result": error[:300], "seconds": None} for name, error in failures
  ]


if __name__ == "__main__":
  for row in run():
    print(row)
