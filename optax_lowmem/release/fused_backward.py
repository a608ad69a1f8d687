"""fused_backward: the backward pass applies the optimizer, layer by layer.

The gradient of a layer is used where it is computed and then forgotten, so that
the gradient of the whole model never exists (arXiv 2309.12381, section 3.2).
Forward and backward pass are `jax.vjp` of the loss over `_layers`; where a
factor of all gradients has to be known first (whether they are finite, their
global norm), the backward pass runs twice, the first time to measure.
"""

from collections.abc import Mapping

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
import jax
import optax

from optax_lowmem.engine.leaf_steps import Optimizer
from optax_lowmem.release.released_step import Chain, Options, Step

# What to use in the place of a transformation that sees the gradients of the whole model.
_INSTEAD = {
  "chain": "give its only member instead",
  "loss scale": "use one around the optimizer",
  "clip_by_global_norm": "pass clip_norm= to fused_backward, which clips exactly",
  "MultiSteps": "pass accumulate= to fused_backward",
  "apply_if_finite": "wrap the optimizer in lowmem.dynamic_loss_scale, which skips such steps",
  "add_decayed_weights": "pass weight_decay= to lowmem.adamw or lowmem.lion",
  "inject_hyperparams": "pass a schedule, or make tx of a traced learning rate inside jit",
  "masked": 'give the leaves that are left alone the weight format "fp32", or a mask= for decay',
  "partition": "use one optimizer, with weights= by leaf",
  "clip": "wrap the whole: lowmem.delta_bits(optax.chain(optax.clip(x), optax.adamw(lr)),"
  " elementwise=True)",
  "scale_by_learning_rate": "pass learning_rate= to the optimizer, perhaps a schedule",
  "scale_by_schedule": "pass learning_rate= to the optimizer, perhaps a schedule",
  "scale": "pass learning_rate= to the optimizer, perhaps a schedule",
  "delta_bits": "pass weights= to lowmem.adamw, adam, lion or sgd, or declare elementwise=True",
  "quantize_state": "pass mu= and nu= to lowmem.adamw or adam, or declare elementwise=True",
}


def fused_backward(
  loss_fn,
  tx: optax.GradientTransformation | None = None,
  *,
  has_aux: bool = False,
  clip_norm: float | None = None,
  accumulate: int = 1,
  accumulation: str = "adama",
):
  """A training step whose backward pass applies the optimizer as it goes.

  `loss_fn(layers, *batch)` calls the model through `layers`, which mirrors the
  top level of params: `layers[key](fn, *args)` is `fn(params[key], *args)`,
  and `layers[key].scan(fn, x, *args)` runs stacked layers,
  `x = fn(params[key][l], x, *args)`. What is differentiated goes through
  `*args`. Every layer is rematerialised: its inputs are kept, and the backward
  pass computes it again (about a third more time than without).

  Kept until the end of the backward pass are the gradients of leaves without a
  weight format, of layers that are called more than once (their cotangents are
  summed, and applied once), and of stacked scalars.

  Args:
    loss_fn: `(layers, *batch) -> loss`, a real scalar, or `(loss, aux)`.
    tx: `lowmem.adamw`, `adam`, `lion` or `sgd`, perhaps inside
      `dynamic_loss_scale` or `static_loss_scale`; also `delta_bits(inner,
      elementwise=True)` and `quantize_state(inner, elementwise=True)`. None to
      take it from a `lowmem.TrainState`.
    has_aux: whether loss_fn returns `(loss, aux)`.
    clip_norm: largest global norm of the (unscaled) gradients, as
      `optax.clip_by_global_norm`; costs a backward pass more, as a loss scale
      does.
    accumulate: into how many micro-batches the batch is cut: every array of it
      along its first axis, except scalars (PRNG keys are folded with the
      micro-batch's number).
    accumulation: "adama": each micro-batch's gradient goes into the moments at
      once. Adam's second moment then averages the squares of the micro-batches'
      gradients, in the place of their sum's square; SGD's momentum is exact.

  Returns:
    With tx a function `(params, opt_state, *batch) -> (loss, params,
    opt_state)`, else `(state, *batch) -> (loss, state)`; `(loss, aux)` in the
    place of loss with has_aux (the micro-batches' stacked). Jit it with the
    state donated. The loss is unscaled, the mean of the micro-batches'.

  Raises:
    ValueError: for a transformation that cannot run leaf by leaf (it is named),
      for an option that the optimizer has no meaning for, or for a layer that
      is called where its gradients cannot be released.

  Examples:
    >>> def loss_fn(layers, tokens, targets):
    ...     x = layers["embed"](lambda w, t: w[t], tokens)
    ...     x = layers["blocks"].scan(block, x)
    ...     return layers["head"](cross_entropy, x, targets)
    >>> step = jax.jit(lowmem.fused_backward(loss_fn), donate_argnums=0)
    >>> loss, state = step(state, tokens, targets)

  References:
    [Memory Efficient Mixed-Precision Optimizers](https://arxiv.org/abs/2309.12381),
    section 3.2; [Adam Accumulation](https://arxiv.org/abs/2305.19982), section 3
  """
  if clip_norm is not None and not isinstance(clip_norm, jax.core.Tracer) and not clip_norm > 0:
    raise ValueError(f"clip_norm is positive; got {clip_norm}.")
  if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
    raise ValueError(f"accumulate is a number of micro-batches, at least 1; got {accumulate!r}.")
  if accumulation != "adama":
    raise ValueError(f'accumulation is "adama"; got {accumulation!r}.')
  if accumulate > 1 and clip_norm is not None:
    raise ValueError(
      "clip_norm needs the norm of the whole batch's gradient, which accumulate= never has."
    )
  options = Options(loss_fn, has_aux, clip_norm, accumulate)

  if tx is not None:
    chain = _chain_of(tx, options)

    def step(params, opt_state, *batch):
      return Step(options, chain, params, opt_state).run(batch)

    return step

  def step_state(state, *batch):
    if not hasattr(state, "tx"):
      raise TypeError(
        f"Without tx= the step takes a lowmem.TrainState; got {type(state).__name__}. With it:"
        " fused_backward(loss_fn, tx)(params, opt_state, *batch)."
      )
    chain = _chain_of(state.tx, options)
    if isinstance(state.params, Mapping) and OVERWRITE_WITH_GRADIENT in state.params:
      raise ValueError(
        f"fused_backward does not take params with {OVERWRITE_WITH_GRADIENT!r} collections."
      )
    loss, params, opt_state = Step(options, chain, state.params, state.opt_state).run(batch)
    return loss, state.replace(step=state.step + 1, params=params, opt_state=opt_state)

  return step_state


def _chain_of(tx, options: Options) -> Chain:
  """What tx is made of; raises for what cannot be stepped leaf by leaf."""
  if not callable(getattr(tx, "update", None)):
    raise TypeError(f"tx is an Optax transformation; got {type(tx).__name__}.")
  update, advance = tx.update, None
  if hasattr(update, "advance"):
    update, advance = update.inner.update, update.advance
  if hasattr(update, "optimizer"):
    optimizer = update.optimizer
  elif hasattr(update, "elementwise"):
    inner = getattr(update.elementwise.update, "elementwise", update.elementwise)
    fold = "how a micro-batch goes into the statistics is known of lowmem.adamw, adam and sgd alone"
    optimizer = Optimizer(lambda mask: inner, None, None, fold, is_declared=True)
  else:
    _refuse(update)
  chain = Chain(optimizer, advance)
  if options.accumulate > 1 and isinstance(chain.optimizer.fold, str):
    raise ValueError(f"accumulate= has no meaning for this optimizer: {chain.optimizer.fold}.")
  return chain


def _refuse(update):
  """Raises a ValueError that names the member that is no optimizer of ours."""
  names = []
  for member in _members(update):
    if not any(hasattr(member, x) for x in ("optimizer", "advance", "elementwise")):
      name = getattr(member, "__qualname__", type(member).__name__).split(".")[0]
      names.append("quantize_state" if name == "quantize" else name)
  # The one that there is another way for is the one to name first.
  names.sort(key=lambda name: name not in _INSTEAD)
  name = names[0] if names else "loss scale" if hasattr(update, "advance") else "chain"
  instead = _INSTEAD.get(
    name,
    "leave it out, or, if each element's update depends on that element alone, wrap the whole:"
    " lowmem.delta_bits(tx, elementwise=True)",
  )
  raise ValueError(
    f"fused_backward steps one leaf at a time, and does not take {name}: {instead}. It takes"
    " lowmem.adamw, adam, lion and sgd, alone or inside a loss scale."
  )


def _members(update):
  """The update functions of a chain, as Optax's closures hold them; else this one."""
  kind = getattr(update, "__qualname__", type(update).__name__).split(".")[0]
  cells = [cell.cell_contents for cell in getattr(update, "__closure__", None) or ()]
  if kind == "with_extra_args_support":
    return [m for x in cells if hasattr(x, "update") for m in _members(x.update)]
  if kind in ("chain", "named_chain"):
    for found in cells:
      if isinstance(found, (tuple, list)) and found and all(map(callable, found)):
        return [member for x in found for member in _members(x)]
  return [update]
