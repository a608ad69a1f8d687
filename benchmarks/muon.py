"""Muon: the peak memory of training steps on a GPU, and the time of its step on a CPU.

  python -m benchmarks.muon h100-compile
  python -m benchmarks.muon cpu
  python -m benchmarks.muon mesh
  python -m benchmarks.muon rounding

h100-compile: compiles training steps for GPUs that need not be present (the `plan` extra)
and reads their memory with `lowmem.plan`: 0.5B parameters in 16 stacked layers, and a model
with the shapes of Llama 3.1 8B, whose embedding, head and norms AdamW steps. Nothing is
executed.

cpu: times the step alone, ours relative to `optax.contrib.muon` in bfloat16 on the same
leaves. All take turns within one process.

mesh: lists what the optimizer's step communicates on eight H100s, by collectives of the
compiled program; one in a loop over layers counts once.

rounding: trains the GPT of the sweep (`examples.sweep`, plan "muon") with momenta in several
formats, rounded stochastically and to nearest, and compares held-out losses with those of
`optax.contrib.muon` in float32, seed by seed (half an hour on a core; needs `make data`).

Each command prints tables and writes `benchmarks/results/muon_NAME.json`.
"""

import argparse
import functools
import itertools
import math
import os
import statistics
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from benchmarks import contenders, llama, shapes
from benchmarks.release import stacked_loss, unreleased
from benchmarks.step import both_seconds, log, nbytes, report
import optax_lowmem as lowmem
from optax_lowmem.planner import targets
from pallas_kernels.formats import state_formats

GIB = 2**30
SEEDS = range(3)
WIDTH = 1664
HALF_BILLION = {
  "layers": {
    "qkv": (16, WIDTH, 3 * WIDTH),
    "out": (16, WIDTH, WIDTH),
    "up": (16, WIDTH, 4 * WIDTH),
    "down": (16, 4 * WIDTH, WIDTH),
  }
}
LEAVES = {"stack": (8, 512, 2048), "wide": (512, 2048), "tall": (2048, 512), "square": (768, 768)}


def stacks(params):
  """Every leaf of two or more axes as matrices, for `optax.contrib.muon`."""
  return jax.tree.map(lambda x: MuonDimensionNumbers(-2, -1) if x.ndim > 1 else None, params)


def llama_numbers(params):
  """Matrices are those of Llama's layers; AdamW steps embedding, head and norms."""

  def numbers(path, x):
    is_matrix = path[0].key == "layers" and x.ndim == 3
    return MuonDimensionNumbers(-2, -1) if is_matrix else None

  return jax.tree_util.tree_map_with_path(numbers, params)


def _optax(name, dtype, numbers):
  tx = optax.contrib.muon(1e-3, muon_weight_dimension_numbers=numbers)
  return contenders.plain(name, tx, dtype)


def _structs(tree):
  is_shape = lambda x: isinstance(x, tuple)
  struct = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.tree.map(struct, tree, is_leaf=is_shape)


def h100_compile() -> dict:
  """Reports peak memory, compiled for GPUs."""
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  jax.config.update("jax_platforms", "cpu")

  def planned(contender, params, step, batch, device="h100"):
    params, state = jax.eval_shape(contender.init, params)
    plan = lowmem.plan(step, params, state, *batch, device=device, donate_argnums=(0, 1))
    return plan, nbytes((params, state))

  def rows_of(make, loss, numbers):
    tx8, tx0 = make("bf16+8"), make("bf16+0")
    ours8, ours0 = (
      contenders.ours(f"lowmem.muon, {name}, int8", tx)
      for name, tx in (("bf16+8", tx8), ("bf16+0", tx0))
    )
    plain = [
      _optax("optax.contrib.muon, all bfloat16", jnp.bfloat16, numbers),
      _optax("optax.contrib.muon, float32", jnp.float32, numbers),
    ]
    return [
      *((f"{c.name}: gradients kept", c, unreleased(loss, c)) for c in (ours8, ours0)),
      *(
        (f"{c.name}: released", c, lowmem.fused_backward(loss, tx))
        for c, tx in ((ours8, tx8), (ours0, tx0))
      ),
      *((f"{c.name}: gradients kept", c, unreleased(loss, c)) for c in plain),
    ]

  params = _structs(HALF_BILLION)
  count = sum(x.size for x in jax.tree.leaves(params))
  small, large = [], []
  make = lambda weights: lowmem.muon(1e-3, weights=weights)
  for name, contender, step in rows_of(make, stacked_loss, stacks):
    x = jax.ShapeDtypeStruct((shapes.TOKENS, WIDTH), contender.dtype)
    plan, resident = planned(contender, params, step, (x,))
    small.append(
      {
        "step": name,
        "resident bytes/param": resident / count,
        "peak bytes/param": plan.peak_bytes / count,
      }
    )
    log(small[-1])

  tokens = jax.ShapeDtypeStruct((llama.TOKENS + 1,), jnp.int32)
  make = lambda weights: lowmem.muon(
    1e-3, weights=weights, muon_weight_dimension_numbers=llama_numbers
  )
  rows = rows_of(make, llama.loss, llama_numbers)
  released = rows[3]
  for (name, contender, step), device in [*((row, "h100") for row in rows), (released, "rtx5090")]:
    plan, resident = planned(contender, llama.structs(), step, (tokens,), device)
    large.append(
      {
        "step": name,
        "GPU": device,
        "resident GiB": resident / GIB,
        "peak GiB": plan.peak_bytes / GIB,
        "": plan.verdict,
      }
    )
    log(large[-1])
  return {
    "device": "compiled for, not run",
    "tables": {
      f"A training step, {count / 1e9:.2f}B parameters in 16 layers, {shapes.TOKENS} tokens": small,
      f"A training step, Llama 3.1 8B shapes, {llama.TOKENS} tokens": large,
    },
  }


def cpu() -> dict:
  """Times the step."""
  jax.config.update("jax_platforms", "cpu")
  leaves = [
    *((f"lowmem.muon {w}", lowmem.muon(1e-3, weights=w), None) for w in ("bf16+8", "bf16+0")),
    ("optax.contrib.muon, all bfloat16", None, jnp.bfloat16),
    ("optax.contrib.muon, float32", None, jnp.float32),
  ]
  steps, times = {}, {}
  for name, tx, dtype in leaves:
    c = contenders.ours(name, tx) if tx is not None else _optax(name, dtype, stacks)
    grads = shapes.normal(LEAVES, c.dtype, seed=1, scale=1.0)
    state = c.init(shapes.normal(LEAVES))
    steps[name] = [jax.jit(c.step, donate_argnums=(1, 2)), grads, *state]
    times[name] = []

  def run(of):
    f, grads, params, state = of
    of[2:] = f(grads, state, params)
    return of[2:]

  for i in range(6):
    for name, of in steps.items():
      wall_and_cpu = both_seconds(functools.partial(run, of))
      if i:
        times[name].append(wall_and_cpu)
  medians = {
    name: [statistics.median(x) for x in zip(*pairs, strict=True)] for name, pairs in times.items()
  }
  base = medians["optax.contrib.muon, all bfloat16"]
  rows = [
    {
      "step": name,
      "seconds": wall,
      "CPU seconds": cpu_time,
      "ratio": wall / base[0],
      "ratio of CPU seconds": cpu_time / base[1],
    }
    for name, (wall, cpu_time) in medians.items()
  ]
  return {"device": "CPU", "tables": {f"The step alone, {LEAVES}": rows}}


def mesh() -> dict:
  """Lists what the optimizer's step communicates on eight H100s, compiled."""
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  jax.config.update("jax_platforms", "cpu")
  from benchmarks import mesh as fsdp

  on = Mesh(np.array(targets.gpus("h100", "1x1x8")), ("data",), axis_types=(AxisType.Auto,))
  numbers = {"muon_weight_dimension_numbers": llama_numbers}
  rows = [
    ("lowmem.muon, bf16+8, int8", lowmem.muon(1e-3, **numbers), jnp.float32),
    (
      'lowmem.muon, bf16+8, int8, products="replicated"',
      lowmem.muon(1e-3, products="replicated", **numbers),
      jnp.float32,
    ),
    ("optax.contrib.muon, all bfloat16", optax.contrib.muon(1e-3, **numbers), jnp.bfloat16),
  ]
  found = []
  for name, tx, dtype in rows:
    init = functools.partial(lowmem.init, tx)
    params, state = fsdp.on_mesh(jax.eval_shape(init, llama.structs(dtype)), on)
    step = jax.jit(
      lambda grads, params, state, tx=tx: lowmem.step(tx, grads, state, params),
      donate_argnums=(1, 2),
      out_shardings=jax.tree.map(lambda x: x.sharding, (params, state)),
    )
    with jax.set_mesh(on):
      done = step.trace(params, params, state).lower().compile()
    temporaries = done.memory_analysis().temp_size_in_bytes / GIB
    for what, times in sorted(fsdp.communicated(done).items()):
      found.append(
        {"step": name, "collective, a device": what, "times": times, "temporaries GiB": temporaries}
      )
      log(found[-1])
  title = "The optimizer's step, Llama 3.1 8B shapes, sharded over eight H100s"
  return {"device": "compiled for, not run", "tables": {title: found}}


def _trained(fmt: str) -> list[float]:
  """The held-out losses of the plan's GPT in a format, by seed."""
  from examples import shakespeare, sweep, training

  options = ["--format", fmt, *sweep.PLAN["muon"].options.split()]
  args = training.parse(shakespeare.make_parser(), options)
  found = training.train(shakespeare.make_task, args.formats[0], args, SEEDS, show=False)
  return [run["figures"]["held-out loss"] for run in found]


def rounding() -> dict:
  """Compares roundings of the momentum by training."""
  jax.config.update("jax_platforms", "cpu")
  encode = state_formats.encode

  def to_nearest(x, scale, fmt, bits, across=None):
    if not fmt.is_square:
      bits = jnp.full_like(bits, 1 << 31)  # one half
    return encode(x, scale, fmt, bits, across)

  base, rows = np.array(_trained("fp32")), []
  roundings = {"stochastic": encode, "nearest": to_nearest}
  for momentum, name in [("fp32", "stochastic"), ("bf16", "stochastic"),
                         *itertools.product(("int8", "int4"), roundings)]:  # fmt: skip
    with mock.patch.object(state_formats, "encode", roundings[name]):
      jax.clear_caches()
      worse = np.array(_trained(f"bf16+8/{momentum}-int8")) - base
    rows.append(
      {
        "momentum": momentum,
        "rounding": "none" if momentum == "fp32" else name,
        "held-out loss, worse by": worse.mean(),
        "standard error": worse.std(ddof=1) / math.sqrt(len(worse)),
        "relative": f"{worse.mean() / base.mean():+.2%}",
      }
    )
    log(rows[-1])
  title = f"Muon, the sweep's GPT, bf16+8, {len(SEEDS)} seeds; float32: {base.mean():.4f}"
  return {"device": "CPU", "tables": {title: rows}}


def main():
  """Runs one command, prints its tables and writes them to a file."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  commands = {"h100-compile": h100_compile, "cpu": cpu, "mesh": mesh, "rounding": rounding}
  parser.add_argument("command", choices=commands)
  args = parser.parse_args()
  report(commands[args.command], "muon_" + args.command.replace("-", "_"))


if __name__ == "__main__":
  main()
