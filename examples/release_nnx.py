"""Gradient release with Flax NNX: batch statistics and dropout, layer by layer.

An MLP predicts the next character of Shakespeare's plays. It trains twice from the
same weights, with the same batches and dropout: once with the gradients of the whole
model, because clipping needs their global norm, and once with `lowmem.fused_backward`.
Both compute every layer again in the backward pass, so the peaks (the memory of the
compiled step) differ by the size of the gradients.
"""

import argparse
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import data, report
import optax_lowmem as lowmem

CONTEXT, WIDTH, LAYERS, BATCH = 16, 256, 4, 64


class Block(nnx.Module):
  """A residual MLP after a batch norm."""

  def __init__(self, rngs: nnx.Rngs):
    linear = functools.partial(nnx.Linear, use_bias=False, dtype=jnp.bfloat16, rngs=rngs)
    self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
    self.up = linear(WIDTH, 4 * WIDTH)
    self.dropout = nnx.Dropout(0.1)
    self.down = linear(4 * WIDTH, WIDTH)

  def __call__(self, x_BxD, key):
    """The sum of x and the MLP's result; dropout uses key."""
    h = nnx.gelu(self.up(self.norm(x_BxD)))
    return x_BxD + self.down(self.dropout(h, rngs=key))


def make_model(vocabulary: int, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
  """The layers, each with its own parameters."""
  model = {f"block_{i}": Block(rngs) for i in range(LAYERS)}
  model["embed"] = nnx.Embed(vocabulary, WIDTH // CONTEXT, dtype=jnp.bfloat16, rngs=rngs)
  model["head"] = nnx.Linear(WIDTH, vocabulary, dtype=jnp.bfloat16, rngs=rngs)
  return model


def cross_entropy(call, windows_BxT1, key) -> jax.Array:
  """The mean cross-entropy of the last character, in nats; `call(name, *args)` calls a layer."""
  x_BxD = call("embed", windows_BxT1[:, :-1]).reshape(len(windows_BxT1), WIDTH)
  for i in range(LAYERS):
    x_BxD = call(f"block_{i}", x_BxD, jax.random.fold_in(key, i))
  logits = call("head", x_BxD).astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, windows_BxT1[:, -1]).mean()


def train(is_released: bool, args, training, held_out, vocabulary: int) -> dict:
  """Trains the model; returns a row of the table."""
  model = make_model(vocabulary, nnx.Rngs(args.seed))
  graphdef, params, stats = nnx.split(model, nnx.Param, ...)
  params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
  graphdefs = {name: nnx.graphdef(layer) for name, layer in model.items()}

  def run(name, weights, stats, *args):
    """Calls a layer; returns its result and new batch statistics."""
    layer = nnx.merge(graphdefs[name], weights, stats)
    return layer(*args), nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

  def loss_fn(layers, stats, windows, key):
    new = {}

    def call(name, *args):
      y, new[name] = layers[name](functools.partial(run, name), stats.get(name, {}), *args)
      return y

    return cross_entropy(call, windows, key), {name: new[name] for name in stats}

  tx = lowmem.adamw(1e-3, weights=lambda path, leaf: "bf16+8" if leaf.ndim > 1 else "fp32")
  if not is_released:  # fused_backward does its own clipping
    tx = optax.chain(optax.clip_by_global_norm(1.0), tx)
  params, opt_state = lowmem.init(tx, params)

  def unreleased(params, opt_state, *batch):
    def loss(params):
      call = lambda w, fn, *args: jax.checkpoint(fn)(w, *args)
      return loss_fn({key: functools.partial(call, w) for key, w in params.items()}, *batch)

    loss_and_stats, grads = jax.value_and_grad(loss, has_aux=True)(params)
    return loss_and_stats, *lowmem.step(tx, grads, opt_state, params)

  step = unreleased
  if is_released:
    step = lowmem.fused_backward(loss_fn, tx, has_aux=True, clip_norm=1.0)

  @jax.jit
  def evaluate(params, stats):
    model = nnx.merge(graphdef, params, stats)
    for layer in model.values():
      layer.eval()
    return cross_entropy(lambda name, *args: model[name](*args), test, jax.random.key(0))

  rng = np.random.default_rng(args.seed)
  test = data.even_windows(held_out, 1024, CONTEXT)
  batches = [
    (data.sample_windows(training, rng, BATCH, CONTEXT), jax.random.key(i))
    for i in range(args.steps)
  ]
  before = evaluate(params, stats)
  lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, opt_state, stats, *batches[0])
  compiled = lowered.compile()
  for batch in batches:
    (_, stats), params, opt_state = compiled(params, opt_state, stats, *batch)
  table = lowmem.memory_table(params, opt_state, () if is_released else params)
  return {
    "gradients": "released" if is_released else "all at once",
    "loss before": f"{before:.4f}",
    "after": f"{evaluate(params, stats):.4f}",
    "bytes a parameter": f"{table.bytes_per_param['total']:.2f}",
    "peak MB": f"{report.peak_bytes(compiled) / 1e6:.1f}",
  }


def main(argv=None):
  """Trains both ways and prints the table."""
  parser = argparse.ArgumentParser(
    prog="python -m examples.release_nnx",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--steps", type=int, default=100, help="training steps (%(default)s)")
  parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and dropout")
  args = parser.parse_args(argv)
  if args.steps < 1:
    parser.error(f"--steps is at least 1; got {args.steps}")
  training, held_out, alphabet = data.plays()
  rows = [train(way, args, training, held_out, len(alphabet)) for way in (False, True)]
  for row in [list(rows[0]), *(row.values() for row in rows)]:
    print("  ".join(f"{x:>{max(len(name), 11)}}" for x, name in zip(row, rows[0], strict=True)))


if __name__ == "__main__":
  main()
