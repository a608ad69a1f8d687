"""A small training run that saves asynchronously and resumes; `test_kills.py` kills it.

python train_and_checkpoint.py DIRECTORY STEPS INTERVAL PAUSE

Appends "resume STEP" and then "STEP LOSS" for each step to DIRECTORY/log; an
INTERVAL of 0 saves nothing.
"""

import functools
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import optax_lowmem as lowmem


def main(directory: pathlib.Path, steps: int, interval: int, pause: float):
  def make():
    k1, k2 = jax.random.split(jax.random.key(0))
    params = {"in": jax.random.normal(k1, (8, 64)) / 8, "out": jax.random.normal(k2, (64, 8)) / 8}
    weights = {"in": "fp16+8", "out": "fp16+13"}
    tx = lowmem.adamw(optax.cosine_decay_schedule(0.02, steps), weights=weights)
    return lowmem.TrainState.create(apply_fn=None, params=params, tx=tx, loss_scale="dynamic")

  @functools.partial(jax.jit, donate_argnums=0)
  def train_step(state, index):
    def loss_fn(params):
      x = jax.random.normal(jax.random.fold_in(jax.random.key(1), index), (16, 8))
      y = jnp.tanh(x.astype(jnp.float16) @ params["in"]) @ params["out"]
      loss = jnp.mean((y.astype(jnp.float32) - jnp.sin(3 * x)) ** 2)
      return state.scale_loss(loss), loss

    grads, loss = jax.grad(loss_fn, has_aux=True)(state.params)
    # An overflow now and then.
    grads = jax.tree.map(lambda g: jnp.where(index % 13 == 5, jnp.inf, g), grads)
    return state.apply_gradients(grads=grads), loss

  start, manager = 0, None
  log = os.open(directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

  def append(line: str):
    os.write(log, f"{line}\n".encode())
    os.fsync(log)

  (directory / "started").touch()
  if interval:
    options = ocp.CheckpointManagerOptions(save_interval_steps=interval, max_to_keep=3)
    manager = ocp.CheckpointManager(directory / "checkpoints", options=options)
    start = manager.latest_step() or 0
  if start:
    state = manager.restore(start, args=ocp.args.StandardRestore(jax.eval_shape(make)))
  else:
    state = jax.jit(make)()
  append(f"resume {start}")
  for index in range(start, steps):
    state, loss = train_step(state, index)
    append(f"{index} {float(loss).hex()}")
    if manager is not None:
      manager.save(index + 1, args=ocp.args.StandardSave(state))
    time.sleep(pause)
  if manager is not None:
    manager.wait_until_finished()
    manager.close()
  append("done")


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
