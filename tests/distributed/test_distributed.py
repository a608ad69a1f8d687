"""Two and four processes (jax.distributed, CPU collectives) give the bits of one.

Stochastic rounding included: every replica of a shard is the same, too.
"""

import pathlib
import pickle
import socket
import subprocess
import sys

import pytest
import worker


def run(directory: pathlib.Path, count: int, layout: str):
  """Every process's shards, together."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
  command = [sys.executable, worker.__file__, str(port), str(count)]
  processes = [
    subprocess.Popen(
      [*command, str(i), layout, str(directory / f"{layout}{count}_")],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(count)
  ]
  try:
    outputs = [process.communicate(timeout=240)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == 0, output[-3000:]
  files = [directory / f"{layout}{count}_{i}" for i in range(count)]
  return [shard for file in files for shard in pickle.loads(file.read_bytes())]


def whole(shards):
  """Each shard once; replicas have to agree."""
  found = {}
  for name, place, dtype, data in shards:
    assert found.setdefault((name, place), (dtype, data)) == (dtype, data), (name, place)
  return found


@pytest.mark.parametrize("layout", worker.LAYOUTS)
def test_the_bits_of_one_process(layout, tmp_path):
  expected = whole(run(tmp_path, 1, layout))
  assert len(expected) > 15
  for count in (2, 4):
    assert whole(run(tmp_path, count, layout)) == expected
