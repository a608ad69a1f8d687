"""Counts the instructions that an H100 executes for an element, from compiled kernels (SASS).

  python -m benchmarks.instructions [apply_update] [step] [elementwise]

It compiles for an H100 and needs the `h100` extra, but no GPU:

- `apply_update` with stochastic and with truncating rounding; the difference is
  the random stream (index, mixer and threshold);
- the whole step of each of our optimizers;
- the whole step of Optax's optimizers, declared elementwise:
  `delta_bits(quantize_state(optax.X(lr), elementwise=True), elementwise=True)`.

It does not show how instructions overlap with memory traffic; that takes a GPU.
"""

import argparse
import json
import os
import re
import subprocess
import sys

# Integer instructions that an H100 issues while its memory moves one byte:
# 132 multiprocessors x 64 a clock x 1.755 GHz (boost, SXM), 3.35 TB/s.
PER_BYTE = 132 * 64 * 1.755e9 / 3.352e12
ISSUED_PER_BYTE = 2 * PER_BYTE  # of all kinds, at most
ELEMENTS_A_THREAD = 8
FORMATS = {"bf16+0": 8, "bf16+8": 10, "bf16+16": 12, "fp16+8": 10}  # bytes an element

STEPS = {  # the optimizer to compile -> bytes that its step moves an element
  "adamw(1e-3)": 12.25,
  'adamw(1e-3, weights="bf16+0")': 10.25,
  'adamw(1e-3, weights="fp16+8")': 12.25,
  'adamw(1e-3, mu="bf16", nu="bf16", implementation="mosaic_gpu")': 16,
  'adamw(1e-3, nu="int4")': 11.25,
  'adamw(1e-3, weights="bf16+0", nu="int4")': 9.25,
  'adamw(1e-3, weights="bf16+0", mu="int4", nu="int4")': 8.25,
  "lion(1e-4)": 10.125,
  "sgd(0.1, momentum=0.9)": 10.125,
}

ELEMENTWISE = {  # the first arguments of quantize_state; by default mu and nu are int8, others bf16
  "adamw": "optax.adamw(1e-3)",
  "nadamw": "optax.nadamw(1e-3)",
  "adabelief": "optax.adabelief(1e-3)",
  "yogi": "optax.yogi(1e-3)",
  "radam": "optax.radam(1e-3)",
  "amsgrad": "optax.amsgrad(1e-3)",
  "amsgrad, all int8": 'optax.amsgrad(1e-3), {}, "int8"',
  "adan": "optax.adan(1e-3)",
  "rmsprop": "optax.rmsprop(1e-3)",
  "rmsprop, momentum": "optax.rmsprop(1e-3, momentum=0.9)",
}

_ELEMENTWISE = """
import sys; sys.path.insert(0, "tests")
import functools, h100, jax, jax.numpy as jnp, json, optax, optax_lowmem as lowmem
from benchmarks.hlo import count_launches
tx = lowmem.delta_bits(lowmem.quantize_state({name}, elementwise=True), elementwise=True)
params32 = {{"w": jax.ShapeDtypeStruct((1 << 10, 1 << 10), jnp.float32)}}
params, state = jax.eval_shape(functools.partial(lowmem.init, tx), params32)
args = h100.on_device((params, params, state))
found = h100.compiled(lambda g, p, s: lowmem.step(tx, g, s, p), *args, donate=(1, 2))
launches = count_launches(found.as_text())
print(json.dumps({{
    "bytes": lowmem.memory_table(params, state).bytes_per_param["total"],
    "launches": launches, "temporaries": found.memory_analysis().temp_size_in_bytes,
}}), file=sys.stderr)
"""

_STEP = """
import sys; sys.path.insert(0, "tests")
import functools, h100, jax, jax.numpy as jnp, optax_lowmem as lowmem
tx = lowmem.{name}
params32 = {{"w": jax.ShapeDtypeStruct((1 << 10, 1 << 10), jnp.float32)}}
params, state = jax.eval_shape(functools.partial(lowmem.init, tx), params32)
args = h100.on_device((params, params, state))
h100.compiled(lambda g, p, s: lowmem.step(tx, g, s, p), *args, donate=(1, 2))
"""

_PROGRAM = """
import sys; sys.path.insert(0, "tests")
import h100, jax.numpy as jnp, optax_lowmem as lowmem, pallas_kernels
from pallas_kernels.formats import packing
base = lowmem.DeltaFormat.parse({name!r})
fmt = lowmem.DeltaFormat(base.dtype, base.extra_bits, {rounding!r})
n = (1 << 20,)
delta = packing.stored_struct(n, fmt)
h100.compiled(
    lambda low, delta, update, key: pallas_kernels.apply_update(
        low, delta, update, fmt, key=key, implementation="mosaic_gpu"),
    h100.struct(n, fmt.dtype), None if delta is None else h100.struct(n, delta.dtype),
    h100.struct(n, jnp.float32), h100.struct((2,), jnp.uint32), donate=(0, 1))
"""


def count(program: str) -> tuple[int, str]:
  """The instructions of one thread in the program's kernel, and what the program reports."""
  environment = os.environ | {
    "MOSAIC_GPU_DUMP_SASS": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "JAX_PLATFORMS": "cpu",
  }
  done = subprocess.run(
      [sys.executable, "-c", program],
      env=environment, capture_output=True, text=True, check=True,
  )  # fmt: skip
  instructions = re.findall(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]\s+)?([A-Z0-9]+)", done.stdout, re.M
  )
  return sum(op not in ("NOP", "BRA") for op in instructions), done.stderr


def apply_update():
  """Prints the table of `apply_update`."""
  print("apply_update, SASS instructions an element (one thread has 8)")
  print("format    truncate  stochastic  stream  H100 issues while it moves the element")
  for name, nbytes in FORMATS.items():
    plain, full = (
      count(_PROGRAM.format(name=name, rounding=rounding))[0] / ELEMENTS_A_THREAD
      for rounding in ("truncate", "stochastic")
    )
    print(
      f"{name:8}  {plain:8.1f}  {full:10.1f}  {full - plain:6.1f}"
      f"  {PER_BYTE * nbytes:.0f} ({nbytes} bytes)"
    )


def step():
  """Prints the table of our optimizers."""
  print("\nlowmem.step, SASS instructions an element, and those an H100 issues while it moves one")
  for name, nbytes in STEPS.items():
    found = count(_STEP.format(name=name))[0] / ELEMENTS_A_THREAD
    print(f"{name:64}  {found:6.1f}  {ISSUED_PER_BYTE * nbytes:5.0f} ({nbytes} bytes)")


def elementwise():
  """Prints the table of Optax's optimizers, in Markdown."""
  print(
    "\n| Optax's | bytes a parameter | instructions an element | those an H100 issues meanwhile"
    " | launches: kernel + scalars |"
  )
  print("| --- | --- | --- | --- | --- |")
  for name, expression in ELEMENTWISE.items():
    instructions, report = count(_ELEMENTWISE.format(name=expression))
    found = json.loads(report.strip().splitlines()[-1])
    kernels = found["launches"].pop("kernels")
    launches = f"{kernels} + {sum(found['launches'].values())}" if kernels else "XLA's"
    executed = f"{instructions / ELEMENTS_A_THREAD:.0f}" if kernels else "XLA's"
    issued = ISSUED_PER_BYTE * (2 + 2 * found["bytes"])  # the gradient, and all else in and out
    print(
      f"| {name} | {found['bytes']:.2f} | {executed} | {issued:.0f} | {launches} |",
      flush=True,
    )


def main():
  """Prints the tables."""
  tables = {f.__name__: f for f in (apply_update, step, elementwise)}
  parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions")
  parser.add_argument("tables", nargs="*", help=f"of {', '.join(tables)}; all by default")
  for name in parser.parse_args().tables or tables:
    tables[name]()


if __name__ == "__main__":
  main()
