"""A character-level GPT on Shakespeare's plays, in full and in low precision.

The same model, seed and batches for every format:

  fp32     optax.adamw on float32 weights
  bf16     optax.adamw on bfloat16 weights: what people do naively
  bf16+0   bfloat16 weights, stochastically rounded
  bf16+8   bfloat16 weights and 8 residual bits
  fp16+8   float16 weights and 8 residual bits, under the dynamic loss scale

and, with the optimizer's statistics in 8 bits as well, bf16+8/int8. --release
trains that again with gradient release: the backward pass applies the optimizer,
and computes every layer a second time (which alone lowers the peak of so small a
model; examples/release_nnx.py shows what release adds to that).

Prints a table and saves `shakespeare.png` and `shakespeare.json` in --out.
"""

import argparse
import functools
import json
import pathlib
import time

import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from examples import gpt, plays, report
import optax_lowmem as lowmem

FORMATS = ("fp32", "bf16", "bf16+0", "bf16+8", "fp16+8", "bf16+8/int8")
OPTIMIZERS = {
  "adamw": (optax.adamw, lowmem.adamw, {"weight_decay": 0.01}),
  "lion": (optax.lion, lowmem.lion, {"weight_decay": 0.01}),
  "sgd": (optax.sgd, lowmem.sgd, {"momentum": 0.9}),
}


def make_state(fmt: str, params, model: gpt.GPT, args, schedule):
  """The training state of a format, from float32 parameters."""
  theirs, ours, kwargs = OPTIMIZERS[args.optimizer]
  if args.optimizer == "adamw":
    kwargs = kwargs | {"b2": args.b2}
  clip = optax.clip_by_global_norm(1.0)
  if fmt in ("fp32", "bf16"):
    dtype = jnp.float32 if fmt == "fp32" else jnp.bfloat16
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    tx = optax.chain(clip, theirs(schedule, **kwargs))
    return flax.training.train_state.TrainState.create(apply_fn=model.apply, params=params, tx=tx)
  fmt, *variant = fmt.split("/")

  def weights(path, leaf):
    del path
    return fmt if leaf.ndim > 1 else "fp32"  # norms stay in float32

  if variant:
    tx = ours(schedule, **kwargs, weights=weights)
    if "release" not in variant:  # fused_backward clips by itself
      tx = optax.chain(clip, tx)
  else:
    tx = lowmem.delta_bits(optax.chain(clip, theirs(schedule, **kwargs)), weights)
  return lowmem.TrainState.create(
    apply_fn=model.apply,
    params=params,
    tx=tx,
    loss_scale="dynamic" if fmt.startswith("fp16") else None,
  )


def train(fmt: str, args, training, held_out, vocabulary: int) -> dict:
  """Trains one format; returns its curves and figures."""
  dtype = {"fp": jnp.float32, "bf": jnp.bfloat16}[fmt[:2]] if fmt[:4] != "fp16" else jnp.float16
  model = gpt.GPT(vocabulary, args.layers, args.width, args.heads, args.context, dtype)
  rng = np.random.default_rng(args.seed)
  first = plays.sample(training, rng, args.batch, args.context)
  params = jax.jit(model.init)(jax.random.key(args.seed), first[:, :-1])["params"]
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, args.learning_rate, min(max(args.steps // 20, 1), args.steps - 1), args.steps
  )
  state = jax.jit(lambda params: make_state(fmt, params, model, args, schedule))(params)

  def train_step(state, batch):
    def scaled_loss(params):
      loss = gpt.loss_fn(model, params, batch)
      return lowmem.scale_loss(loss, state.opt_state), loss

    grads, loss = jax.grad(scaled_loss, has_aux=True)(state.params)
    return loss, state.apply_gradients(grads=grads)

  is_released = fmt.endswith("/release")
  if is_released:
    layered_loss = functools.partial(gpt.layered_loss_fn, model)
    train_step = lowmem.fused_backward(layered_loss, clip_norm=1.0)
  compiled = jax.jit(train_step, donate_argnums=0).lower(state, first).compile()
  evaluate = jax.jit(lambda params, batch: gpt.loss_fn(model, params, batch))
  test_batches = plays.windows(held_out, args.eval_windows, args.context)
  test_batches = test_batches.reshape(-1, min(64, args.eval_windows), args.context + 1)

  losses, evals, seconds = [], [], 0.0
  progress = tqdm.tqdm(range(args.steps), desc=f"{fmt:>11}", unit="step")
  for i in progress:
    batch = plays.sample(training, rng, args.batch, args.context)
    start = time.perf_counter()
    loss, state = compiled(state, batch)
    losses.append(float(loss))
    seconds += time.perf_counter() - start
    if (i + 1) % max(args.steps // 10, 1) == 0 or i + 1 == args.steps:
      held = float(np.mean([evaluate(state.params, b) for b in test_batches]))
      evals.append((i + 1, held))
      progress.set_postfix(loss=f"{loss:.3f}", held_out=f"{held:.4f}")
  grads = () if is_released else state.params  # their size, or none
  table = lowmem.memory_table(state.params, state.opt_state, grads)
  skipped = [
    s.skipped
    for s in jax.tree.leaves(
      state.opt_state, is_leaf=lambda x: isinstance(x, lowmem.LossScaleState)
    )
    if isinstance(s, lowmem.LossScaleState)
  ]
  return {
    "format": fmt.replace("/", ", "),
    "seed": args.seed,
    "losses": losses,
    "evals": evals,
    "held_out": evals[-1][1],
    "bytes_per_param": table.bytes_per_param,
    "num_params": table.num_params,
    "peak_bytes": report.peak_bytes(compiled),
    "steps_per_second": args.steps / seconds,
    "skipped": int(sum(skipped)),
  }


def parse_args(argv=None) -> argparse.Namespace:
  """Reads the command line; exits with an error that says what is wrong."""
  parser = argparse.ArgumentParser(
    prog="python -m examples.shakespeare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  integers = {
    "steps": (400, "training steps a format"),
    "layers": (4, "transformer blocks"),
    "width": (144, "width of the model"),
    "heads": (4, "attention heads; they divide the width"),
    "context": (64, "characters a window"),
    "batch": (16, "windows a step"),
    "eval_windows": (512, "held-out windows that the loss is averaged over"),
  }
  for name, (default, text) in integers.items():
    flag = "--" + name.replace("_", "-")
    parser.add_argument(flag, type=int, default=default, help=f"{text} ({default})")
  parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="(%(default)s)")
  parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak (%(default)s)")
  parser.add_argument("--b2", type=float, default=0.999, help="Adam's b2 (%(default)s)")
  parser.add_argument("--seed", type=int, default=0, help="of weights, batches and rounding")
  parser.add_argument("--formats", default=",".join(FORMATS), help="comma-separated (%(default)s)")
  parser.add_argument(
    "--release", action="store_true", help='train each "/int8" format with gradient release, too'
  )
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder (out)")
  args = parser.parse_args(argv)
  for name in integers:
    if getattr(args, name) < 1:
      parser.error(f"--{name.replace('_', '-')} is at least 1; got {getattr(args, name)}")
  if args.width % args.heads:
    parser.error(f"--heads {args.heads} does not divide --width {args.width}")
  if not args.learning_rate > 0:
    parser.error(f"--learning-rate is positive; got {args.learning_rate}")
  if not 0 <= args.b2 < 1:
    parser.error(f"--b2 lies between 0 and 1; got {args.b2}")
  if args.eval_windows > 64 and args.eval_windows % 64:
    parser.error(f"--eval-windows is at most 64 or a multiple of it; got {args.eval_windows}")
  args.formats = [f.strip() for f in args.formats.split(",") if f.strip()]
  for fmt in args.formats:
    if fmt == "bf16":
      continue
    try:
      lowmem.DeltaFormat.parse(fmt.removesuffix("/int8"))
    except ValueError as error:
      parser.error(f'--formats: {error} (here also bf16, and "/int8" behind a format)')
  if not args.formats:
    parser.error("--formats names no format")
  if args.release:
    with_int8 = {fmt for fmt in args.formats if fmt.endswith("/int8")}
    if not with_int8:
      parser.error('--release needs a format with "/int8"')
    both = lambda fmt: [fmt, fmt + "/release"] if fmt in with_int8 else [fmt]
    args.formats = [variant for fmt in args.formats for variant in both(fmt)]
  return args


def main(argv=None):
  """Trains every format, prints the table, saves figure and figures."""
  args = parse_args(argv)
  training, held_out, alphabet = plays.load()
  args.out.mkdir(parents=True, exist_ok=True)
  print(
    f"{len(training):,} characters of plays, {len(held_out):,} held out"
    f" ({', '.join(plays.HELD_OUT)}); {jax.devices()[0].device_kind}, JAX {jax.__version__}"
  )
  results = [train(fmt, args, training, held_out, len(alphabet)) for fmt in args.formats]
  print("\n" + report.table(results))
  (args.out / "shakespeare.json").write_text(json.dumps(results))
  report.figure(results, args.out / "shakespeare.png")
  print(f"\nsaved {args.out / 'shakespeare.png'} and {args.out / 'shakespeare.json'}")


if __name__ == "__main__":
  main()
