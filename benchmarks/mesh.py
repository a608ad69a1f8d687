"""Compiles a fully sharded training step with the shapes of Llama 3.1 8B for eight H100s.

  python -m benchmarks.mesh

Reports the peak bytes of the whole step on each device, the temporaries of the
optimizer's part alone, and the communication of the gradient alone and of the
step. The devices need not be present (the `h100` extra); nothing is executed.
Prints tables and writes `benchmarks/results/mesh_h100_compile.json`.
"""

import argparse
import collections
import re

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from benchmarks import llama
from benchmarks.step import gpu_compiler, log, report
import optax_lowmem as lowmem

GIB = 2**30
_COLLECTIVE = re.compile(
  r"= (\S+|\(.*?\)) (all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter)(-start)?\("
)


class Sharded(llama.Plain):
  """A layer below one key of params; its input is sharded along the batch."""

  def __init__(self, params, mesh):
    super().__init__(params)
    self._whole = NamedSharding(mesh, P())

  def scan(self, fn, x, *args):
    """Like `llama.Plain.scan`."""

    def constrained(w, x, *args):
      return fn(w, jax.lax.with_sharding_constraint(x, self._whole), *args)

    return super().scan(constrained, x, *args)


def gradient(mesh):
  """The gradient of the mean loss of eight sequences, one on each device."""

  def loss(params, opt_state, tokens):
    layers = {key: Sharded(w, mesh) for key, w in params.items()}
    of_one = jax.vmap(lambda t: llama.loss(layers, t), spmd_axis_name="data")
    return lowmem.scale_loss(of_one(tokens).mean(), opt_state)

  return jax.grad(loss)


def on_mesh(tree, mesh):
  """Shards structs over the mesh along the first axis; along the second, for stacked layers."""

  def spec(path, x):
    keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    if len(keys) < 2 or not x.ndim:  # a counter, a key
      return P()
    axis = 0 if keys[-2] != "layers" else 1
    return P(*(["data" if i == axis else None for i in range(x.ndim)]))

  return jax.tree_util.tree_map_with_path(
    lambda path, x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, spec(path, x))
    ),
    tree,
  )


def communicated(program) -> dict[str, int]:
  """Counts the collectives of a compiled program, by operation and shape."""
  found = [
    f"{operation} {re.sub(r'{[0-9,:TSE()]*}', '', shape)}"
    for shape, operation, _ in _COLLECTIVE.findall(program.as_text())
  ]
  return dict(collections.Counter(found))


def run(parser) -> dict:
  """The tables."""
  devices = np.array(gpu_compiler(parser).devices("1x1x8"))
  rows = {
    "lowmem.adamw, bf16+8, int8": (lowmem.adamw(1e-3), "float32", True),
    "the same, dynamic_loss_scale, fp16+8": (
      lowmem.dynamic_loss_scale(lowmem.adamw(1e-3, weights="fp16+8")),
      "float32",
      True,
    ),
    "optax.adamw, all bf16": (optax.adamw(1e-3), "bfloat16", False),
    "optax.adamw, float32": (optax.adamw(1e-3), "float32", False),
  }
  peaks, lists = [], []
  for name, (tx, dtype, is_ours) in rows.items():
    mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(AxisType.Auto,))
    init = (lambda p, tx=tx: lowmem.init(tx, p)) if is_ours else (lambda p, tx=tx: (p, tx.init(p)))
    params, state = on_mesh(jax.eval_shape(init, llama.structs(dtype)), mesh)
    shape = (8, llama.TOKENS + 1)
    tokens = jax.ShapeDtypeStruct(shape, "int32", sharding=NamedSharding(mesh, P("data")))
    grad = gradient(mesh)

    def train(params, state, tokens, grad=grad, tx=tx):
      return lowmem.step(tx, grad(params, state, tokens), state, params)

    compile_ = lambda f, *args, **options: jax.jit(f, **options).trace(*args).lower().compile()
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    whole = compile_(train, params, state, tokens, donate_argnums=(0, 1), out_shardings=shardings)
    alone = compile_(grad, params, state, tokens, out_shardings=shardings[0])
    step = compile_(
      lambda g, p, s, tx=tx: lowmem.step(tx, g, s, p),
      params, params, state, donate_argnums=(1, 2), out_shardings=shardings,
    )  # fmt: skip
    stats, count = whole.memory_analysis(), sum(x.size for x in jax.tree.leaves(params))
    peaks.append(
      {
        "step": name,
        "peak GiB/device": stats.peak_memory_in_bytes / GIB,
        "state GiB/device": stats.argument_size_in_bytes / GIB,
        "bytes/param of all devices": 8 * stats.argument_size_in_bytes / count,
        "optimizer's temporaries GiB": step.memory_analysis().temp_size_in_bytes / GIB,
      }
    )
    log(peaks[-1])
    before, after = communicated(alone), communicated(whole)
    for what in sorted(before | after | communicated(step)):
      lists.append(
        {
          "step": name,
          "collective, a device": what,
          "gradient alone": before.get(what, 0),
          "whole step": after.get(what, 0),
          "optimizer alone": communicated(step).get(what, 0),
        }
      )
  mesh = jax.sharding.Mesh(devices, ("data",), axis_types=(AxisType.Explicit,))
  tx = lowmem.adamw(1e-3)
  params, state = jax.eval_shape(lambda p: lowmem.init(tx, p), llama.structs())
  params, state = on_mesh((params, state), mesh)
  step = jax.jit(lambda g, p, s: lowmem.step(tx, g, s, p), donate_argnums=(1, 2))
  done = step.trace(params, params, state).lower().compile()
  explicit = {
    "optimizer's step, Explicit axes": "lowmem.adamw, bf16+8, int8",
    "kernels": done.as_text().count('custom_call_target="mosaic_gpu'),
    "temporaries, bytes": done.memory_analysis().temp_size_in_bytes,
    "collectives": len(communicated(done)),
  }
  return {
    "tables": {
      "Llama 3.1 8B shapes, eight H100s, fully sharded, 8 sequences of 2048": peaks,
      "Collectives": lists,
      "The optimizer alone": [explicit],
    }
  }


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.parse_args()
  report(lambda: run(parser), "mesh_h100_compile")
