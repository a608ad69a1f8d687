"""Runs Dieharder on the random stream, in the ways that the stream is used.

  python -m benchmarks.random_stream [--tests 0,2,...] [--out docs/random_stream.md]

Needs Debian's package `dieharder`. Each use is a stream of 32-bit words that is
piped into it: consecutive elements of one leaf; eight elements of a leaf over
consecutive steps, consecutive leaves and consecutive seeds; and the upper or the
lower 16 bits of consecutive elements, two in each word.
"""

import argparse
import functools
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.random_bits import element_bits, key_words, leaf_id, stream_keys

CHUNK = 1 << 20
FEW = 8  # elements for each step, leaf or seed
# A selection of the tests that Dieharder rates as good; it takes about five minutes.
TESTS = "0,2,8,15,100,101,205,209"

INTRODUCTION = """# The random stream

Stochastic rounding needs random bits for every element at every step. They are a function of four
things: the key, the step, the leaf's name, and the element's index in the whole array. So they are
the same on every backend and under every sharding, and nothing is stored.

The function has two stages. Once a leaf and step, Threefry-2x32 turns key, step and name into two
32-bit words. Once an element, a mixer of three multiplications turns the index and these words into
32 bits. With index and threshold it costs an H100 15 to 17 instructions an element. Threefry or
Philox for each element would dominate the update.
`pallas_kernels/formats/random_bits.py` is the definition.

## Dieharder

Each row is one Dieharder test on the bits in one way of use: consecutive elements of a leaf, the
upper and lower halves of their bits, eight elements at each step, of each leaf, for each seed.
{summary}.
Dieharder calls p-values under 0.005 or over 0.995 weak (1 in 100 by chance), and under 1e-6 failed.
`python -m benchmarks.random_stream --out docs/random_stream.md` makes this page.

"""


def _few(keys):
  index = jnp.arange(FEW, dtype=jnp.uint32)
  return jax.vmap(lambda k: element_bits((k[0], k[1]), index))(keys).reshape(-1)


@functools.partial(jax.jit, static_argnums=0)
def chunk(use: str, i):
  """The i-th chunk of 2**20 words of a use."""
  start = i * jnp.uint32(CHUNK)
  words = key_words(0)
  if use in ("elements", "upper halves", "lower halves"):
    k = stream_keys(words)[0]
    index = start + jax.lax.iota(jnp.uint32, CHUNK)
    if use == "elements":
      return element_bits((k[0], k[1]), index)
    twice = index * jnp.uint32(2)
    a, b = (element_bits((k[0], k[1]), twice + jnp.uint32(j)) for j in (0, 1))
    if use == "upper halves":
      return (a & jnp.uint32(0xFFFF0000)) | (b >> jnp.uint32(16))
    return (a << jnp.uint32(16)) | (b & jnp.uint32(0xFFFF))
  n = start // jnp.uint32(FEW) + jax.lax.iota(jnp.uint32, CHUNK // FEW)
  if use == "steps":
    return _few(jax.vmap(lambda s: stream_keys(words, s, [leaf_id("w")])[0])(n))
  if use == "leaves":  # consecutive names are unrelated ids; consecutive ids are harder
    k = jax.extend.random.threefry_2x32((words[0], words[1]), jnp.concatenate([n, 0 * n]))
    return _few(k.reshape(2, -1).T)
  return _few(jax.vmap(lambda s: stream_keys(jnp.stack([jnp.uint32(0), s]))[0])(n))  # seeds


USES = ("elements", "upper halves", "lower halves", "steps", "leaves", "seeds")


def write(use: str):
  """Writes the words of a use to stdout until the reader closes the pipe."""
  i = 0
  try:
    while True:
      sys.stdout.buffer.write(np.asarray(chunk(use, jnp.uint32(i))).tobytes())
      i += 1
  except BrokenPipeError:
    sys.stderr.close()


def dieharder(use: str, tests) -> list[list[str]]:
  """Runs the battery; returns rows (test, ntup, tsamples, psamples, p-value, assessment)."""
  rows = []
  for test in tests:
    source = subprocess.Popen(
      [sys.executable, "-m", "benchmarks.random_stream", "--write", use], stdout=subprocess.PIPE
    )
    command = ["dieharder", "-g", "200", "-d", str(test)]
    done = subprocess.run(command, stdin=source.stdout, capture_output=True, text=True, check=True)
    source.stdout.close()
    source.wait()
    for line in done.stdout.splitlines():
      cells = [c.strip() for c in line.split("|")]
      if len(cells) == 6 and re.match(r"\d", cells[1]):
        rows.append(cells)
        print(use, *cells, sep=" | ", flush=True)
  return rows


def main():
  """Runs the battery on every use and writes the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--write", choices=USES, help=argparse.SUPPRESS)
  parser.add_argument("--tests", default=TESTS, help="Dieharder's test numbers")
  parser.add_argument("--uses", default=",".join(USES), help="the uses to test")
  parser.add_argument("--out", type=pathlib.Path, default=None, help="the Markdown file to write")
  args = parser.parse_args()
  if args.write:
    return write(args.write)
  lines = ["| use | test | ntup | samples | p-samples | p-value | assessment |", "|" + " --- |" * 7]
  counts: dict[str, int] = {}
  for use in args.uses.split(","):
    for row in dieharder(use, args.tests.split(",")):
      lines.append("| " + " | ".join([use, *row]) + " |")
      counts[row[-1]] = counts.get(row[-1], 0) + 1
  summary = ", ".join(f"{n} {assessment}" for assessment, n in sorted(counts.items()))
  print(summary)
  if args.out:
    args.out.write_text(INTRODUCTION.format(summary=summary) + "\n".join(lines) + "\n")


if __name__ == "__main__":
  main()
