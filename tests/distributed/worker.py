"""One of several processes that train together; `test_distributed.py` starts them.

python worker.py PORT COUNT INDEX LAYOUT FILE

COUNT processes form a mesh of four devices. Each writes to FILE, with its
index, the shards of the final state that it holds: (name, place, bytes).
"""

import functools
import os
import pickle
import sys

LAYOUTS = ("replicated", "fsdp", "fsdp_and_tensor")


def main(port: int, count: int, index: int, layout: str, file: str):
  os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={4 // count}"
  os.environ["JAX_PLATFORMS"] = "cpu"
  import jax

  if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
  from jax.sharding import NamedSharding
  from jax.sharding import PartitionSpec as P
  import numpy as np

  import optax_lowmem as lowmem

  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  specs = {
    "replicated": {"w": P(), "v": P(), "b": P(), "c": P()},
    "fsdp": {
      "w": P(("data", "model")),
      "v": P(None, ("data", "model")),
      "b": P("data"),
      "c": P(),
    },
    "fsdp_and_tensor": {
      "w": P("data", "model"),
      "v": P("model", "data"),
      "b": P("model"),
      "c": P(None, "data"),
    },
  }[layout]
  shapes = {"w": (64, 96), "v": (96, 128), "b": (128,), "c": (3, 40)}

  def everywhere(seed: int, scale: float, sharded: bool):
    rng = np.random.default_rng(seed)
    whole = {k: (rng.normal(size=s) * scale).astype(np.float32) for k, s in shapes.items()}
    return {
      k: jax.make_array_from_callback(
        x.shape, NamedSharding(mesh, specs[k] if sharded else P()), lambda i, x=x: x[i]
      )
      for k, x in whole.items()
    }

  weights = {"w": "bf16+8", "v": "bf16+5", "b": "fp32", "c": "bf16+0"}
  tx = lowmem.adamw(1e-2, weights=weights, weight_decay=0.1, nu="fp16")
  tx = lowmem.dynamic_loss_scale(tx, init_scale=8.0)
  params, opt_state = jax.jit(functools.partial(lowmem.init, tx))(everywhere(0, 1.0, True))
  step = jax.jit(functools.partial(lowmem.step, tx), donate_argnums=(1, 2))
  for i in range(4):
    grads = everywhere(i + 1, 0.1, True)
    if i == 2:  # a step that is skipped, since one value on one shard is not finite
      grads["w"] = jax.jit(lambda g: g.at[5, 70].set(np.inf), out_shardings=grads["w"].sharding)(
        grads["w"]
      )
    params, opt_state = step(grads, opt_state, params)
  shards = []
  for path, x in jax.tree_util.tree_leaves_with_path((params, opt_state)):
    for shard in x.addressable_shards:
      place = tuple((s.start or 0, s.stop or n) for s, n in zip(shard.index, x.shape, strict=True))
      data = np.asarray(shard.data)
      shards.append((jax.tree_util.keystr(path), place, str(data.dtype), data.tobytes()))
  assert int(opt_state.skipped) == 1
  with open(f"{file}{index}", "wb") as f:
    pickle.dump(shards, f)


if __name__ == "__main__":
  port, count, index, layout, file = sys.argv[1:]
  main(int(port), int(count), int(index), layout, file)
