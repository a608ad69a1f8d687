"""A character-level GPT on Shakespeare's plays: the demo (`make demo`).

It trains the same model with the same seed and batches in every format:

  fp32         optax.adamw on float32 weights
  bf16         optax.adamw on bfloat16 weights: naive half precision
  bf16+0/fp32  bfloat16 weights, stochastically rounded; float32 statistics
  bf16+8/fp32  bfloat16 weights and 8 residual bits
  fp16+8/fp32  float16 weights and 8 residual bits, with a dynamic loss scale
  bf16+8/int8  the optimizer's statistics in 8 bits as well

With --release, the backward pass applies the optimizer and computes every layer a second time.
For so small a model, that recomputation alone lowers the peak; examples/release_nnx.py shows the
effect of release itself. Figure: the loss on four held-out plays, in nats a character.
"""

import jax
import numpy as np

from examples import data, gpt, training

FORMATS = "fp32,bf16,bf16+0/fp32,bf16+8/fp32,fp16+8/fp32,bf16+8/int8"


def make_task(args, dtype) -> training.Task:
  """The task: to predict next characters."""
  text, held_out, alphabet = data.plays()
  model = gpt.GPT(len(alphabet), args.layers, args.width, args.heads, args.context, dtype)

  def init(key):
    return model.init(key, np.zeros((1, args.context), np.int32))["params"], {}

  def loss_fn(layers, kept, windows):
    return gpt.loss_fn(model, layers, windows), kept

  def batches(rng):
    while True:
      yield (data.sample_windows(text, rng, args.batch, args.context),)

  tests = data.even_windows(held_out, args.eval_windows, args.context)
  tests = np.array_split(tests, max(args.eval_windows // 64, 1))
  evaluated = jax.jit(lambda p, windows: gpt.loss_fn(model, training.all_layers(p), windows))

  def evaluate(params, kept):
    del kept
    losses = [len(windows) * float(evaluated(params, windows)) for windows in tests]
    return {"held-out loss": sum(losses) / args.eval_windows}

  return training.Task(init, loss_fn, batches, evaluate)


def make_parser():
  """The options."""
  sizes = {"layers": 4, "width": 144, "heads": 4, "context": 64, "eval_windows": 512}
  quick = {"steps": 40, "layers": 1, "width": 64, "eval_windows": 64}
  return training.make_parser(
    "shakespeare",
    __doc__,
    sizes,
    quick,
    format=FORMATS,
    steps=400,
    batch=16,
    learning_rate=1e-3,
    clip_norm=1.0,
  )


def main(argv=None):
  """Trains every format, prints the table and saves the figure."""
  parser = make_parser()
  args = training.parse(parser, argv)
  if args.width % args.heads:
    parser.error(f"--heads {args.heads} does not divide --width {args.width} evenly")
  training.main("shakespeare", make_task, args)


if __name__ == "__main__":
  main()
