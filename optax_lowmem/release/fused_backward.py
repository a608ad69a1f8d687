"""fused_backward: the backward pass applies the optimizer, layer by layer.

The step uses the gradient of a layer as soon as it is computed and then drops it,
so the gradient of the whole model never exists (arXiv 2309.12381, section 3.2).
Forward and backward pass are ``jax.vjp`` of the loss on ``layer_calls.Layers``. If
the step depends on all gradients (whether they are finite, their global norm), the
backward pass runs twice, first to measure.
"""

from collections.abc import Mapping

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
import jax
import optax

from optax_lowmem.release.released_step import Chain, Options, Step

# Alternatives to transformations that need the gradients of the whole model.
_INSTEAD = {
  "chain": "pass its only member instead",
  "loss scale": "use one around the optimizer",
  "clip_by_global_norm": "pass clip_norm= to fused_backward, which clips exactly",
  "MultiSteps": "pass accumulate= to fused_backward",
  "apply_if_finite": "wrap the optimizer in lowmem.dynamic_loss_scale, which skips such steps",
  "add_decayed_weights": "pass weight_decay= to lowmem.adamw or lowmem.lion",
  "inject_hyperparams": "pass a schedule, or build tx inside jit from a traced learning rate",
  "masked": 'give the leaves to leave alone the weight format "fp32", or pass mask= for decay',
  "partition": "use one optimizer, with weights= by leaf",
  "clip": "wrap the whole chain: lowmem.delta_bits(optax.chain(optax.clip(x), optax.adamw(lr)),"
  " elementwise=True)",
  "scale_by_learning_rate": "pass learning_rate= (a number or a schedule) to the optimizer",
  "scale_by_schedule": "pass learning_rate= (a number or a schedule) to the optimizer",
  "scale": "pass learning_rate= (a number or a schedule) to the optimizer",
  "delta_bits": "pass weights= to lowmem.adamw, adam, lion or sgd, or declare elementwise=True or"
  " layerwise=True",
  "quantize_state": "pass mu= and nu= to lowmem.adamw or adam, or declare elementwise=True or"
  " layerwise=True",
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
  """Builds a training step whose backward pass applies the optimizer layer by layer.

  ``loss_fn(layers, *batch)`` calls the model through ``layers``, which mirrors the
  top level of params. ``layers[key](fn, *args)`` is ``fn(params[key], *args)``.
  ``layers[key].scan(fn, x, *args)`` runs stacked layers,
  ``x = fn(params[key][l], x, *args)`` for each l. Differentiable inputs must come
  through ``*args``, not through a closure. Every layer is rematerialised: the step
  keeps the layer's inputs, and the backward pass computes the layer again (about a
  third more time).

  Some gradients live until the end of the backward pass: those of leaves without a
  weight format, of layers that are called more than once (their cotangents are
  summed and applied once), and of stacked scalars.

  Args:
    loss_fn: ``(layers, *batch) -> loss``, a real scalar, or ``(loss, aux)``.
    tx: :func:`optax_lowmem.adamw`, :func:`optax_lowmem.adam`,
      :func:`optax_lowmem.lion`, :func:`optax_lowmem.sgd` or
      :func:`optax_lowmem.muon`, optionally inside a loss scale; also
      ``delta_bits(inner, elementwise=True)`` and
      ``quantize_state(inner, elementwise=True)``, or both with ``layerwise=True``.
      None takes the transformation of an :class:`optax_lowmem.TrainState`.
    has_aux: whether loss_fn returns ``(loss, aux)``.
    clip_norm: the largest global norm of the unscaled gradients, as in
      ``optax.clip_by_global_norm``. Like a loss scale, it costs another backward
      pass.
    accumulate: the number of micro-batches. Every array of the batch is cut along
      its first axis, except scalars. (PRNG keys are folded with the number of the
      micro-batch.)
    accumulation: ``"adama"``: the gradient of each micro-batch enters the moments
      at once. Adam's second moment then adds up the squares of the micro-batches'
      gradients, each divided by their number, instead of squaring the mean
      gradient. SGD's momentum is exact.

  Returns:
    With tx, a function ``(params, opt_state, *batch) -> (loss, params,
    opt_state)``, otherwise ``(state, *batch) -> (loss, state)``. With has_aux,
    ``(loss, aux)`` replaces loss, with aux stacked over micro-batches. The loss is
    unscaled, and the mean over micro-batches. Jit the function with the state
    donated.

  Raises:
    ValueError: if a transformation cannot run leaf by leaf (the message names it),
      if one declared layerwise looks at a whole stack that ``loss_fn`` scans, if an
      option has no meaning for the optimizer, if a layer is called where its
      gradients cannot be released, or if parameters or state lie in the host's
      memory.
    TypeError: if tx is not a transformation, or loss_fn does not return a real
      scalar (with has_aux, a pair).

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> def loss_fn(layers, x, y):
    ...   x = layers["blocks"].scan(lambda w, x: jax.nn.relu(x @ w), x)
    ...   return layers["head"](lambda w, x, y: ((x @ w - y) ** 2).mean(), x, y)
    >>> params = {"blocks": jnp.ones((4, 32, 32)) / 32, "head": jnp.ones((32, 8))}
    >>> state = lowmem.TrainState.create(apply_fn=None, params=params, tx=lowmem.adamw(1e-3))
    >>> step = jax.jit(lowmem.fused_backward(loss_fn), donate_argnums=0)
    >>> x, y = jnp.ones((2, 32), jnp.bfloat16), jnp.zeros((2, 8), jnp.bfloat16)
    >>> loss, state = step(state, x, y)
    >>> print(loss, state.step, state.params["blocks"].dtype)
    1024 1 bfloat16

  References:
    `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`__, section 3.2

    `Adam Accumulation <https://arxiv.org/abs/2305.19982>`__, section 3
  """
  if clip_norm is not None and not isinstance(clip_norm, jax.core.Tracer) and not clip_norm > 0:
    raise ValueError(f"clip_norm is positive; got {clip_norm}.")
  if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
    raise ValueError(
      f"accumulate must be a number of micro-batches, an integer of at least 1; got {accumulate!r}."
    )
  if accumulation != "adama":
    raise ValueError(f'accumulation must be "adama"; got {accumulation!r}.')
  if accumulate > 1 and clip_norm is not None:
    raise ValueError(
      "clip_norm needs the gradient norm of the whole batch, which never exists with accumulate=."
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
        f"Without tx=, the step takes a lowmem.TrainState; got {type(state).__name__}. With tx=,"
        " call fused_backward(loss_fn, tx)(params, opt_state, *batch)."
      )
    chain = _chain_of(state.tx, options)
    if isinstance(state.params, Mapping) and OVERWRITE_WITH_GRADIENT in state.params:
      raise ValueError(
        f"fused_backward does not support params with {OVERWRITE_WITH_GRADIENT!r} collections."
      )
    loss, params, opt_state = Step(options, chain, state.params, state.opt_state).run(batch)
    return loss, state.replace(step=state.step + 1, params=params, opt_state=opt_state)

  return step_state


def _chain_of(tx, options: Options) -> Chain:
  """Takes tx apart; raises if it contains anything that cannot be stepped leaf by leaf."""
  if not callable(getattr(tx, "update", None)):
    raise TypeError(f"tx must be an Optax transformation; got {type(tx).__name__}.")
  update, advance = tx.update, None
  if hasattr(update, "advance"):
    update, advance = update.inner.update, update.advance
  if not hasattr(update, "optimizer"):
    _refuse(update)
  optimizer = update.optimizer
  if options.accumulate > 1 and isinstance(optimizer.fold, str):
    raise ValueError(f"accumulate= has no meaning for this optimizer: {optimizer.fold}.")
  return Chain(optimizer, advance)


def _refuse(update):
  """Raises a ValueError that names the member that is not one of our optimizers."""
  names = []
  for member in _members(update):
    if not any(hasattr(member, x) for x in ("optimizer", "advance")):
      name = getattr(member, "__qualname__", type(member).__name__).split(".")[0]
      names.append("quantize_state" if name == "quantize" else name)
  # Names a member with a known alternative first.
  names.sort(key=lambda name: name not in _INSTEAD)
  name = names[0] if names else "loss scale" if hasattr(update, "advance") else "chain"
  instead = _INSTEAD.get(
    name,
    "leave it out, or wrap the whole transformation: lowmem.delta_bits(tx, elementwise=True) if the"
    " update of each element depends on that element alone, layerwise=True if it depends on that"
    " leaf alone",
  )
  raise ValueError(
    f"fused_backward steps one leaf at a time and does not take {name}: {instead}. It takes"
    " lowmem.adamw, adam, lion, sgd and muon, alone or inside a loss scale."
  )


def _members(update):
  """The update functions of a chain, from Optax's closures; of anything else, update itself."""
  kind = getattr(update, "__qualname__", type(update).__name__).split(".")[0]
  cells = [cell.cell_contents for cell in getattr(update, "__closure__", None) or ()]
  if kind == "with_extra_args_support":
    return [m for x in cells if hasattr(x, "update") for m in _members(x.update)]
  if kind in ("chain", "named_chain"):
    for found in cells:
      if isinstance(found, (tuple, list)) and found and all(map(callable, found)):
        return [member for x in found for member in _members(x)]
  return [update]
