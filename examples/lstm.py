"""A character LSTM on Shakespeare's plays: a small version of 1710.03740, section 4.5.

Figure: the loss on four held-out plays, in nats a character.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import data, training


def make_task(args, dtype) -> training.Task:
  """The task: to predict next characters from up to `args.context` characters."""
  text, held_out, alphabet = data.plays()
  embed = nn.Embed(len(alphabet), args.width, dtype=dtype)
  lstm = nn.RNN(nn.OptimizedLSTMCell(args.width, dtype=dtype))
  head = nn.Dense(len(alphabet), dtype=dtype)

  def init(key):
    keys = jax.random.split(key, args.layers + 2)
    x_BxTxD = jnp.zeros((1, 1, args.width))
    params = {f"lstm_{i}": lstm.init(keys[i], x_BxTxD)["params"] for i in range(args.layers)}
    params["embed"] = embed.init(keys[-2], jnp.zeros((1, 1), int))["params"]
    params["head"] = head.init(keys[-1], x_BxTxD)["params"]
    return params, {}

  def loss_fn(layers, kept, windows_BxT1):
    def call(name, module, *inputs):
      return layers[name](lambda w, *inputs: module.apply({"params": w}, *inputs), *inputs)

    x_BxTxD = call("embed", embed, windows_BxT1[:, :-1])
    for i in range(args.layers):
      x_BxTxD = call(f"lstm_{i}", lstm, x_BxTxD)
    logits = call("head", head, x_BxTxD).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows_BxT1[:, 1:])
    return losses.mean(), kept

  def batches(rng):
    while True:
      yield (data.sample_windows(text, rng, args.batch, args.context),)

  tests = data.even_windows(held_out, 512, args.context).reshape(4, 128, -1)
  evaluated = jax.jit(lambda params, windows: loss_fn(training.all_layers(params), {}, windows)[0])

  def evaluate(params, kept):
    return {"held-out loss": float(np.mean([evaluated(params, windows) for windows in tests]))}

  return training.Task(init, loss_fn, batches, evaluate)


def make_parser():
  """The options."""
  sizes, quick = {"width": 128, "layers": 1, "context": 32}, {"steps": 60, "width": 64}
  return training.make_parser(
    "lstm", __doc__, sizes, quick, steps=800, batch=32, learning_rate=3e-3, clip_norm=1.0
  )


def main(argv=None):
  """Trains every format, prints the table and saves the figure."""
  training.main("lstm", make_task, training.parse(make_parser(), argv))


if __name__ == "__main__":
  main()
