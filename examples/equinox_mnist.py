"""Equinox: a convolutional network learns kinds of clothes, in float32 and in half precision.

`lowmem.init` and `lowmem.step` take the module as it is, with its activation functions and
strides: what is no array passes unchanged. `eqx.filter_value_and_grad` gives None as their
gradients.
"""

import argparse

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import data
import optax_lowmem as lowmem

BATCH = 64
OPTIMIZERS = {
  "optax.adamw, float32": optax.adamw(1e-3),
  "lowmem.adamw, bf16+8": lowmem.adamw(1e-3),
  "lowmem.adamw, bf16+0": lowmem.adamw(1e-3, weights="bf16+0"),
}


def make_model(key) -> eqx.nn.Sequential:
  """Two convolutions and two linear layers, for images of 28 x 28."""
  keys = jax.random.split(key, 4)
  pool = eqx.nn.MaxPool2d(2, 2)
  relu = eqx.nn.Lambda(jax.nn.relu)
  return eqx.nn.Sequential(
    [
      eqx.nn.Conv2d(1, 32, 3, padding=1, key=keys[0]), relu, pool,
      eqx.nn.Conv2d(32, 64, 3, padding=1, key=keys[1]), relu, pool,
      eqx.nn.Lambda(jnp.ravel),
      eqx.nn.Linear(64 * 7 * 7, 128, key=keys[2]), relu,
      eqx.nn.Linear(128, 10, key=keys[3]),
    ]
  )  # fmt: skip


def logits_of(model, images) -> jax.Array:
  """Computes in the weights' dtype, because a convolution takes no other; float32 [batch, 10]."""
  dtype = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))[0].dtype
  x = jnp.asarray(images[:, None], dtype) / 255
  return jax.vmap(model)(x).astype(jnp.float32)


def loss_fn(model, images, labels) -> jax.Array:
  """The mean cross-entropy, in nats."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits_of(model, images), labels)
  return losses.mean()


def train(tx, args, training: data.Images, test: data.Images) -> dict:
  """Trains the network; returns a row of the table."""

  @eqx.filter_jit
  def init(key):
    return lowmem.init(tx, make_model(key))

  model, opt_state = init(jax.random.key(args.seed))

  @eqx.filter_jit(donate="all-except-first")
  def train_step(batch, model, opt_state):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, *batch)
    model, opt_state = lowmem.step(tx, grads, opt_state, model)
    return model, opt_state, loss

  rng = np.random.default_rng(args.seed)
  losses = []
  for _ in range(args.steps):
    chosen = rng.integers(0, len(training.labels), BATCH)
    batch = training.images[chosen], training.labels[chosen].astype(np.int32)
    model, opt_state, loss = train_step(batch, model, opt_state)
    losses.append(float(loss))
  correct = eqx.filter_jit(logits_of)(model, test.images[:2000]).argmax(1) == test.labels[:2000]
  table = lowmem.memory_table(model, opt_state)
  return {
    "loss, last 20 steps": f"{np.mean(losses[-20:]):.4f}",
    "test accuracy": f"{correct.mean():.4f}",
    "bytes a parameter": f"{table.bytes_per_param['total']:.2f}",
  }


def main(argv=None):
  """Trains with each optimizer and prints the table."""
  parser = argparse.ArgumentParser(
    prog="python -m examples.equinox_mnist",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--steps", type=int, default=300, help="training steps (%(default)s)")
  parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
  args = parser.parse_args(argv)
  if args.steps < 1:
    parser.error(f"--steps is at least 1; got {args.steps}")
  training, test = data.fashion_mnist()
  rows = {name: train(tx, args, training, test) for name, tx in OPTIMIZERS.items()}
  heads = list(next(iter(rows.values())))
  for name, row in [("", dict(zip(heads, heads, strict=True))), *rows.items()]:
    print("  ".join([f"{name:<22}", *(f"{row[head]:>{len(head)}}" for head in heads)]))


if __name__ == "__main__":
  main()
