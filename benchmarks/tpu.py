"""Memory and compile time of our optimizers, compiled for TPUs that need not be present.

    python -m benchmarks.tpu  # in an environment with the `tpu` extra: make bench-tpu-compile

Nothing runs: the figures are peak memory by XLA's own analysis, kernels, and seconds to
trace, lower and compile.
"""

import argparse
import functools
import importlib.util
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

from benchmarks import contenders, llama, shapes
from benchmarks.release import GIB, stacked_loss, unreleased
from benchmarks.step import ROOT, log, nbytes, report
import optax_lowmem as lowmem

ADAMW = lowmem.adamw(1e-3)
OURS = contenders.ours("adamw, bf16+8, int8, gradients kept", ADAMW)
RELEASED = "adamw, bf16+8, int8, released"


def peers() -> list[contenders.Contender]:
  """The 8-bit AdamW of rollfast; empty if it is not installed."""
  if importlib.util.find_spec("rollfast") is None:
    return []
  import rollfast

  return [contenders.plain("rollfast 1.3.0, adamw8", rollfast.adamw8(1e-3), contenders.BF16)]


def rows_of(loss):
  """(name, contender, training step) of each row."""
  others = (OURS, contenders.FP32_ADAMW, contenders.BF16_ADAMW, *peers())
  return [
    (RELEASED, OURS, lowmem.fused_backward(loss, ADAMW)),
    *((c.name, c, unreleased(loss, c)) for c in others),
  ]


def training(tpu, target: str) -> list[dict]:
  """A training step of the 0.8B model."""
  count, rows = shapes.count(shapes.TRANSFORMER), []
  params32 = {"layers": shapes.structs(shapes.TRANSFORMER)}
  for name, contender, step in rows_of(stacked_loss):
    params, state = jax.eval_shape(contender.init, params32)
    x = jax.ShapeDtypeStruct((shapes.TOKENS, shapes.WIDTH), contender.dtype)
    args = tpu.on_device((params, state, x), target)
    row = {"TPU": target, "step": name, "resident bytes/param": nbytes((params, state)) / count}
    rows.append(row | _peak(step, args, count))
    log(rows[-1])
  return rows


def llama_on_one(tpu, target: str) -> list[dict]:
  """A training step with the shapes of Llama 3.1 8B."""
  tokens, rows = jax.ShapeDtypeStruct((llama.TOKENS + 1,), jnp.int32), []
  for name, contender, step in rows_of(llama.loss):
    params, state = jax.eval_shape(contender.init, llama.structs())
    args = tpu.on_device((params, state, tokens), target)
    rows.append({"TPU": target, "step": name} | _peak(step, args))
    log(rows[-1])
  return rows


def llama_on_sixteen(tpu) -> list[dict]:
  """The same model's optimizer step, sharded over sixteen v5e: a sixteenth on each."""
  devices, rows = np.array(tpu.devices("v5e:4x4")), []
  mesh = jax.sharding.Mesh(devices, ("fsdp",), axis_types=(AxisType.Explicit,))
  count = sum(x.size for x in jax.tree.leaves(llama.structs())) / 16

  def on_mesh(x):
    spec = [None] * len(x.shape)
    if len(x.shape) > 1:  # rows, not the blocks along the last axis
      spec[-2] = "fsdp"
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )

  # rollfast's state does not trace on a mesh with Explicit axes.
  for contender in (OURS, contenders.FP32_ADAMW, contenders.BF16_ADAMW):
    step = lambda params, state, grads, step=contender.step: step(grads, state, params)
    with jax.set_mesh(mesh):
      params, state = jax.eval_shape(contender.init, llama.structs())
      grads = llama.structs(contender.dtype)
      args = jax.tree.map(on_mesh, (params, state, grads))
      rows.append({"TPU": "sixteen v5e", "step": contender.name} | _peak(step, args, count))
      log(rows[-1])
  return rows


def optimizer_steps(tpu, target: str) -> list[dict]:
  """The optimizer's step alone."""
  rows = []
  for name, leaf_shapes in {
    "4096 x 4096": {"w": (4096, 4096)},
    "GPT-2 124M": shapes.SETS["GPT-2 124M"],
    "0.8B, stacked": shapes.TRANSFORMER,
  }.items():
    update = contenders.ours("the same through optax.apply_updates", ADAMW, apply_updates=True)
    for contender in (OURS, update, contenders.FP32_ADAMW, contenders.BF16_ADAMW, *peers()):
      params, state = jax.eval_shape(contender.init, shapes.structs(leaf_shapes))
      args = (params, state, shapes.structs(leaf_shapes, contender.dtype))
      args = tpu.on_device(args, target)
      step = lambda params, state, grads, step=contender.step: step(grads, state, params)
      row = {"TPU": target, "shapes": name, "optimizer": contender.name}
      rows.append(row | _peak(step, args, shapes.count(leaf_shapes)))
      log(rows[-1])
  return rows


def _peak(step, args, count: float | None = None) -> dict:
  """Compiles a step: peak, temporaries, kernels, seconds; or why it does not compile."""
  start = time.perf_counter()
  try:
    lowered = jax.jit(step, donate_argnums=(0, 1)).trace(*args).lower()
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:  # the compiler knows the memory of the chip
    why = "more than the TPU has" if "Ran out of memory" in str(error) else str(error)[:80]
    return {"does not compile": why}
  seconds = time.perf_counter() - start
  stats = compiled.memory_analysis()
  row: dict = (
    {"peak GiB": stats.peak_memory_in_bytes / GIB}
    if count is None
    else {
      "peak bytes/param": stats.peak_memory_in_bytes / count,
      "temporaries bytes/param": stats.temp_size_in_bytes / count,
    }
  )
  kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
  return row | {"kernels": kernels, "compile s": seconds}


def run(parser) -> dict:
  """All tables."""
  sys.path.insert(0, str(ROOT / "tests"))
  import tpu

  if tpu.devices(tpu.TOPOLOGIES["v5e"]) is None:
    parser.error("compiling for a TPU needs the tpu extra: pip install -e '.[tpu]'")
  return {
    "device": "TPU v5e, v5p (compiled for, not run)",
    "tables": {
      "The optimizer step alone": optimizer_steps(tpu, "v5e"),
      "A training step, 0.8B parameters": [x for t in ("v5p", "v5e") for x in training(tpu, t)],
      "A training step, Llama 3.1 8B shapes, one sequence of 2048": llama_on_one(tpu, "v5p"),
      "The optimizer step, Llama 3.1 8B shapes, a sixteenth on each": llama_on_sixteen(tpu),
    },
    "absent": {} if peers() else {"rollfast": "not installed"},
  }


def main():
  """Prints the tables and writes them to a file."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--out", type=pathlib.Path, help="the JSON file to write")
  args = parser.parse_args()
  report(functools.partial(run, parser), "tpu_compile", args.out)


if __name__ == "__main__":
  main()
