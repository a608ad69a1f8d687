"""The code that the examples share: options, formats, training step and loop.

An example wraps its model and data in a `Task`. `main` trains it in each format of
--format, one after the other, from the same weights and on the same batches.
"""

import argparse
from collections.abc import Callable, Iterator
import functools
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from examples import report
import optax_lowmem as lowmem

FORMATS_HELP = """a format, or several separated by commas, each WEIGHTS or WEIGHTS/STATISTICS.
WEIGHTS: fp32 (Optax, float32); master-bf16, master-fp16 (Optax, float32 weights, the model computes
in half precision); bf16, fp16 (Optax, naive half-precision weights); or a format of this library,
for example bf16+8, optionally with roundings: bf16+4:truncate or bf16+4:nearest:stochastic (the
second one rounds the half-precision part). STATISTICS: int8, int4, bf16, fp16 or fp32 (int8), or
two of them, such as int8-int4, the second one for second moments"""
HALF = {"bf16": jnp.bfloat16, "fp16": jnp.float16}
STATISTICS = ("int8", "int4", "bf16", "fp16", "fp32")
# (Optax's optimizer, ours, arguments of both, our names of the statistics).
OPTIMIZERS: dict[str, tuple[Callable, Callable, dict, tuple[str, ...]]] = {
  "adam": (optax.adam, lowmem.adam, {"b1": 0.9, "b2": 0.999}, ("mu", "nu")),
  "adamw": (
    optax.adamw,
    lowmem.adamw,
    {"b1": 0.9, "b2": 0.999, "weight_decay": 0.01},
    ("mu", "nu"),
  ),
  "lion": (optax.lion, lowmem.lion, {"weight_decay": 0.1}, ("mu",)),
  "muon": (
    optax.contrib.muon,
    lowmem.muon,
    {"consistent_rms": 0.2},  # as large as AdamW's updates
    ("mu", "adam_mu", "adam_nu"),
  ),
  "sgd": (optax.sgd, lowmem.sgd, {"momentum": 0.9}, ("accumulator",)),
}


class Task(NamedTuple):
  """A model and its data.

  Attributes:
    init: key -> (float32 params, kept); kept is state besides the parameters, or {}.
    loss_fn: (layers, kept, *batch) -> (loss, kept), as for `lowmem.fused_backward`:
      `layers[name](fn, *args)` is `fn(params[name], *args)`.
    batches: a numpy generator -> an endless iterator of batches.
    evaluate: (params, kept) -> held-out figures by name; plots show the first.
    project: params -> params, applied after each step.
  """

  init: Callable[[jax.Array], tuple[Any, Any]]
  loss_fn: Callable[..., tuple[jax.Array, Any]]
  batches: Callable[[np.random.Generator], Iterator[tuple]]
  evaluate: Callable[[Any, Any], dict[str, float]]
  project: Callable[[Any], Any] = lambda params: params


class Format(NamedTuple):
  """The storage of weights and statistics.

  Attributes:
    name: its text in --format.
    weights: a format of this library; None for Optax.
    statistics: the format of our optimizers' statistics; if it is two, such as
      "int8-int4", the second one is for second moments.
    stored: the dtype of the stored weights.
    dtype: the dtype that the model computes in.
  """

  name: str
  weights: lowmem.DeltaFormat | None
  statistics: str
  stored: Any
  dtype: Any

  @property
  def loss_scale(self) -> bool:
    """Whether gradients can leave the range of their dtype and need a loss scale."""
    return self.dtype == jnp.float16


def parse_format(text: str) -> Format:
  """Parses one format of --format; the ValueError for a bad one says what is accepted."""
  weights, slash, statistics = text.partition("/")
  if slash and not all(x in STATISTICS for x in statistics.split("-", 1)):
    raise ValueError(f"format {text!r}: the accepted statistics are {', '.join(STATISTICS)}")
  if weights == "fp32" or weights in HALF or weights.removeprefix("master-") in HALF:
    if slash:
      raise ValueError(f"format {text!r}: only formats such as bf16+8 have /STATISTICS")
    dtype = HALF.get(weights.removeprefix("master-"), jnp.float32)
    stored = dtype if weights in HALF else jnp.float32
    return Format(text, None, "fp32", stored, dtype)
  bits, *roundings = weights.split(":")
  fmt = lowmem.DeltaFormat.parse(bits)
  if len(roundings) > 2:
    raise ValueError(f"format {text!r}: only rounding and low_rounding may follow the bits")
  names = ("rounding", "low_rounding")[: len(roundings)]
  fmt = lowmem.DeltaFormat(fmt.dtype, fmt.extra_bits, **dict(zip(names, roundings, strict=True)))
  return Format(text, fmt, statistics or "int8", fmt.dtype, fmt.dtype)


def make_optimizer(fmt: Format, args, seed: int = 0, weights=None):
  """The optimizer of a run, from the options; see `bare_optimizer` and `guarded`."""
  return guarded(bare_optimizer(fmt, args, seed, weights), fmt, args)


def guarded(tx, fmt: Format, args):
  """Adds the steps that need the whole gradient to an optimizer: clipping and the loss scale."""
  if args.clip_norm and not is_released(fmt, args):  # fused_backward does its own clipping
    tx = optax.chain(optax.clip_by_global_norm(args.clip_norm), tx)
  return lowmem.dynamic_loss_scale(tx) if fmt.loss_scale else tx


def bare_optimizer(fmt: Format, args, seed: int = 0, weights=None):
  """An optimizer for some or all leaves, from the options.

  Args:
    fmt: the format of weights and statistics.
    args: the options: optimizer, learning_rate, steps; an example may also set b1,
      weight_decay or momentum.
    seed: the seed of stochastic rounding.
    weights: formats by leaf; by default `fmt.weights`, but float32 for vectors and
      scalars.

  Returns:
    The transformation.
  """
  theirs, ours, options, statistics = OPTIMIZERS[args.optimizer]
  warmup = min(max(args.steps // 20, 1), args.steps - 1)
  schedule = optax.warmup_cosine_decay_schedule(0.0, args.learning_rate, warmup, args.steps)
  options = {name: getattr(args, name, value) for name, value in options.items()}
  if "weight_decay" in options:
    options["mask"] = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
  if fmt.weights is None:
    return theirs(schedule, **options)
  formats = weights or (lambda path, leaf: fmt.weights if leaf.ndim > 1 else "fp32")
  first, _, second = fmt.statistics.partition("-")
  stored = {name: second if second and name.endswith("nu") else first for name in statistics}
  return ours(schedule, **options, **stored, weights=formats, key=seed)


def init(fmt: Format, tx, params):
  """Converts float32 weights to their format; returns them and the optimizer state."""
  if fmt.weights is not None:
    return lowmem.init(tx, params)
  params = jax.tree.map(lambda x: x.astype(fmt.stored), params)
  return params, tx.init(params)


def is_released(fmt: Format, args) -> bool:
  """Whether the backward pass applies the optimizer; it cannot apply Optax's."""
  return args.release and fmt.weights is not None


def all_layers(params, checkpointing: bool = False):
  """The layers that a loss function calls: `layers[name](fn, *args)` is `fn(params[name], *args)`.

  Args:
    params: the parameters, a dict by layer.
    checkpointing: whether the backward pass computes each layer again.

  Returns:
    The layers, a dict of functions.
  """
  wrap = jax.checkpoint if checkpointing else lambda fn: fn
  return {name: lambda fn, *args, w=w: wrap(fn)(w, *args) for name, w in params.items()}


def make_step(task: Task, tx, args, release: bool = False):
  """A step (params, opt_state, kept, *batch) -> ((loss, kept), params, opt_state)."""

  def step(params, opt_state, kept, *batch):
    def scaled_loss(params):
      loss, kept_next = task.loss_fn(all_layers(params, args.checkpointing), kept, *batch)
      return lowmem.scale_loss(loss, opt_state), (loss, kept_next)

    grads, loss_and_kept = jax.grad(scaled_loss, has_aux=True)(params)
    return loss_and_kept, *lowmem.step(tx, grads, opt_state, params)

  if release:
    step = lowmem.fused_backward(task.loss_fn, tx, has_aux=True, clip_norm=args.clip_norm)

  def projected(*args):
    loss_and_kept, params, opt_state = step(*args)
    return loss_and_kept, task.project(params), opt_state

  return projected


def train(
  make_task: Callable[..., Task],
  fmt: Format,
  args,
  seeds,
  make_optimizer: Callable[..., Any] = make_optimizer,
  show: bool = True,
) -> list[dict]:
  """Trains a format once for each seed, with one compiled step.

  Args:
    make_task: (options, dtype) -> task.
    fmt: the format of weights and statistics.
    args: the options.
    seeds: the seeds of weights, batches and rounding.
    make_optimizer: (fmt, args, seed) -> transformation.
    show: whether to show a progress bar.

  Returns:
    A result for each seed: held-out figures, losses, bytes.
  """
  task = make_task(args, fmt.dtype)
  tx = make_optimizer(fmt, args, 0)  # only the state depends on the seed
  release = is_released(fmt, args)
  compiled = None
  results = []
  for seed in seeds:
    rng = np.random.default_rng(seed)
    batches = task.batches(rng)
    params, kept = jax.jit(task.init)(jax.random.key(seed))
    params, opt_state = init(fmt, make_optimizer(fmt, args, seed), params)
    batch = next(batches)
    if compiled is None:
      step = jax.jit(make_step(task, tx, args, release), donate_argnums=(0, 1, 2))
      compiled = step.lower(params, opt_state, kept, *batch).compile()
    losses, seconds, evaluations = [], [], []
    progress = tqdm.tqdm(range(args.steps), fmt.name, unit="step", disable=not show)
    for i in progress:
      start = time.perf_counter()
      (loss, kept), params, opt_state = compiled(params, opt_state, kept, *batch)
      losses.append(float(loss))
      seconds.append(time.perf_counter() - start)
      batch = next(batches)
      if (i + 1) % max(args.steps // 5, 1) == 0 and i + 1 < args.steps and show:
        evaluations.append((i + 1, task.evaluate(params, kept)))
        progress.set_postfix(loss=f"{loss:.3f}", **_rounded(evaluations[-1][1]))
    evaluations.append((args.steps, task.evaluate(params, kept)))
    table = lowmem.memory_table(params, opt_state, () if release else params)
    results.append(
      {
        "format": fmt.name,
        "optimizer": args.optimizer,
        "release": release,
        "seed": seed,
        "steps": args.steps,
        "figures": evaluations[-1][1],
        "final training loss": float(np.mean(losses[-max(args.steps // 20, 1) :])),
        "skipped": sum(int(s.skipped) for s in _loss_scales(opt_state)),
        "bytes_per_param": table.bytes_per_param,
        "num_params": table.num_params,
        "peak_bytes": report.peak_bytes(compiled),
        "seconds_per_step": float(np.median(seconds)),
        "losses": losses,
        "evaluations": evaluations,
      }
    )
  return results


def _rounded(figures: dict[str, float]) -> dict[str, str]:
  return {name: f"{value:.4f}" for name, value in figures.items()}


def _loss_scales(opt_state) -> list[lowmem.LossScaleState]:
  is_scale = lambda x: isinstance(x, lowmem.LossScaleState)
  return [s for s in jax.tree.leaves(opt_state, is_leaf=is_scale) if is_scale(s)]


def make_parser(
  name: str, doc: str, sizes: dict[str, int], quick: dict[str, Any], **defaults
) -> argparse.ArgumentParser:
  """A parser with the options that all examples share.

  Args:
    name: the name of the example's module.
    doc: the text of --help.
    sizes: the sizes of the model and its data; each becomes an option with a default.
    quick: the options that --quick sets unless they are given.
    **defaults: defaults of the shared options: steps, batch, learning_rate, ...

  Returns:
    The parser; an example may add options.
  """
  parser = argparse.ArgumentParser(
    f"python -m examples.{name}",
    description=doc,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--format", default="fp32,bf16,bf16+8/int8", help=FORMATS_HELP + ". Default: %(default)s")
  add("--optimizer", choices=OPTIMIZERS, default="adamw", help="optimizer (%(default)s)")
  add(
    "--release",
    action="store_true",
    help="apply the optimizer in the backward pass, for formats of this library",
  )
  add("--seed", type=int, default=0, help="seed of weights, batches and rounding (%(default)s)")
  add("--steps", type=positive(int), help="training steps (%(default)s)")
  add("--batch", type=positive(int), help="examples in a batch (%(default)s)")
  add("--learning-rate", type=positive(float), help="peak learning rate (%(default)s)")
  add("--b2", type=positive(float), default=0.999, help="Adam's second decay (%(default)s)")
  add("--clip-norm", type=positive(float), help="largest global norm of gradients (%(default)s)")
  add("--out", type=pathlib.Path, default=pathlib.Path("out"), help="output folder (%(default)s)")
  flag = lambda option: "--" + option.replace("_", "-")
  for size, default in sizes.items():
    add(flag(size), type=positive(int), default=default, help="(%(default)s)")
  short = ", ".join(f"{flag(option)} {value}" for option, value in quick.items())
  add("--quick", action="store_true", help=f"a minute's run: {short}")
  parser.set_defaults(checkpointing=False, quick_options=quick)
  parser.set_defaults(**defaults)
  return parser


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
  """An argparse type for numbers above zero."""

  def read(text):
    value = kind(text)
    if not value > 0:
      raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value

  return functools.wraps(kind, assigned=("__name__",), updated=())(read)


def parse(parser: argparse.ArgumentParser, argv=None) -> argparse.Namespace:
  """Parses the command line; a bad option exits with an error message."""
  args = parser.parse_args(argv)
  if args.quick:
    parser.set_defaults(**args.quick_options)
    args = parser.parse_args(argv)
  try:
    args.formats = [parse_format(text.strip()) for text in args.format.split(",")]
  except ValueError as error:
    parser.error(f"--format: {error}")
  if args.steps < 2:
    parser.error(f"--steps is at least 2; got {args.steps}")
  if args.release and all(fmt.weights is None for fmt in args.formats):
    parser.error("--release needs a format of this library: --format bf16+8/int8")
  return args


def main(name: str, make_task: Callable[..., Task], args, make_optimizer=make_optimizer):
  """Trains every format, prints the table, and saves the figure and the results."""
  print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
  results = []
  for fmt in args.formats:
    results += train(make_task, fmt, args, [args.seed], make_optimizer)
  args.out.mkdir(parents=True, exist_ok=True)
  print("\n" + report.table(results))
  (args.out / f"{name}.json").write_text(json.dumps(results))
  report.figure(results, args.out / f"{name}.png")
  print(f"\nsaved {args.out / name}.png and {args.out / name}.json")
