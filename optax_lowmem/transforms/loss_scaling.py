"""Loss scaling: unscales the gradients of a scaled loss and skips steps that overflowed."""

import contextlib
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_lowmem.engine import landing, sessions
from optax_lowmem.states import LossScaleState, check_state
from optax_lowmem.trees import host_memory, nnx_variables, pytrees
from pallas_kernels.operations.all_finite import all_finite, scaled


def dynamic_loss_scale(
  inner: optax.GradientTransformation,
  init_scale: float = 2.0**15,
  growth_interval: int = 2000,
  growth_factor: float = 2.0,
  backoff_factor: float = 0.5,
  min_scale: float = 1.0,
  max_scale: float = 2.0**24,
) -> optax.GradientTransformationExtraArgs:
  """Unscales gradients, skips steps that overflowed, and adapts the scale.

  Differentiate the scaled loss, :func:`optax_lowmem.scale_loss`. The
  transformation unscales the gradients in float32 before ``inner`` sees them, so
  clipping belongs inside. If a gradient is not finite, the parameters and inner's
  state stay the same bit for bit (the updates are -0.0), and the scale shrinks.

  Args:
    inner: the transformation that receives the unscaled gradients.
    init_scale: the initial scale. 2**15 times a loss of 1 is finite in float16.
    growth_interval: the number of consecutive finite steps after which the scale
      grows.
    growth_factor: the scale grows by this factor, above 1.
    backoff_factor: the scale shrinks by this factor at an overflow, between 0 and
      1.
    min_scale: the smallest scale.
    max_scale: the largest scale.

  Returns:
    A transformation with a :class:`optax_lowmem.LossScaleState`.

  Raises:
    ValueError: if a scale is not positive and finite, or if init_scale, a factor
      or the interval is out of range.
    TypeError: if a scale is not a number.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.dynamic_loss_scale(lowmem.adamw(1e-3, weights="fp16+8"))
    >>> params, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
    >>> def loss_fn(params, opt_state):
    ...   return lowmem.scale_loss(params["w"].mean(), opt_state)
    >>> grads = jax.grad(loss_fn)(params, opt_state)
    >>> params, opt_state = lowmem.step(tx, grads, opt_state, params)
    >>> print(grads["w"][0, 0], opt_state.scale, opt_state.skipped)
    256.0 32768.0 0

  References:
    `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`__, section 3.2
  """
  for name, scale in (
    ("init_scale", init_scale),
    ("min_scale", min_scale),
    ("max_scale", max_scale),
  ):
    _check_scale(name, scale)
  if not min_scale <= init_scale <= max_scale:
    raise ValueError(
      f"init_scale must lie between min_scale and max_scale; got {min_scale}, {init_scale},"
      f" {max_scale}."
    )
  if growth_interval < 1:
    raise ValueError(f"growth_interval must be at least 1; got {growth_interval}.")
  if not growth_factor > 1.0:
    raise ValueError(f"growth_factor must be above 1; got {growth_factor}.")
  if not 0.0 < backoff_factor < 1.0:
    raise ValueError(f"backoff_factor must lie between 0 and 1; got {backoff_factor}.")

  def next_scale(state: LossScaleState, finite):
    count = jnp.where(finite, state.growth_count + 1, 0)
    grows = count >= growth_interval
    grown = jnp.minimum(state.scale * growth_factor, max_scale)
    shrunk = jnp.maximum(state.scale * backoff_factor, min_scale)
    scale = jnp.where(finite, jnp.where(grows, grown, state.scale), shrunk)
    return scale.astype(jnp.float32), jnp.where(grows, 0, count)

  return _loss_scaled(inner, init_scale, next_scale)


def static_loss_scale(
  inner: optax.GradientTransformation, scale: float
) -> optax.GradientTransformationExtraArgs:
  """Unscales gradients by a constant scale, and skips steps that overflowed.

  Like :func:`optax_lowmem.dynamic_loss_scale`, except that the scale never changes.
  The state counts the skipped steps.

  Args:
    inner: the transformation that receives the unscaled gradients.
    scale: the factor of the loss.

  Returns:
    A transformation with a :class:`optax_lowmem.LossScaleState`.

  Raises:
    ValueError: if the scale is not positive and finite.
    TypeError: if the scale is not a number.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.static_loss_scale(lowmem.sgd(0.1, weights="fp16+8"), 128.0)
    >>> params, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
    >>> grads = {"w": jnp.full((4, 32), 128.0, jnp.float16)}  # of the scaled loss
    >>> params, opt_state = lowmem.step(tx, grads, opt_state, params)
    >>> print(opt_state.scale, params["w"][0, 0])
    128.0 0.9

  References:
    `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`__, section 3.2
  """
  _check_scale("scale", scale)
  return _loss_scaled(
    inner, scale, lambda state, finite: (state.scale, state.growth_count + finite)
  )


def with_loss_scale(tx, loss_scale: Literal["dynamic"] | float | None):
  """Wraps tx in the loss scale that the ``loss_scale=`` of a train state asks for."""
  if loss_scale is None:
    return tx
  if isinstance(loss_scale, str):
    if loss_scale != "dynamic":
      raise ValueError(f'loss_scale must be None, "dynamic" or a number; got {loss_scale!r}.')
    return dynamic_loss_scale(tx)
  return static_loss_scale(tx, loss_scale)


def loss_scale(opt_state) -> jax.Array:
  """Returns the loss scale of an optimizer state.

  Args:
    opt_state: any Optax state.

  Returns:
    float32 scalar; 1.0 if the state has no loss scale.

  Raises:
    ValueError: if the state has more than one loss scale.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.dynamic_loss_scale(lowmem.adamw(1e-3))
    >>> _, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
    >>> print(lowmem.loss_scale(opt_state))
    32768.0
  """
  scales = [nnx_variables.pure(s.scale) for s in pytrees.find_states(opt_state, LossScaleState)]
  if len(scales) > 1:
    raise ValueError(f"opt_state holds {len(scales)} loss scales; a loss takes only one.")
  return scales[0] if scales else jnp.ones([], jnp.float32)


def scale_loss(loss: jax.typing.ArrayLike, opt_state) -> jax.Array:
  """Multiplies a loss by the loss scale of an optimizer state, in float32.

  Args:
    loss: a scalar of any float dtype.
    opt_state: any Optax state; without a loss scale, the factor is 1.

  Returns:
    float32 scalar.

  Raises:
    ValueError: if the state has more than one loss scale.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.static_loss_scale(lowmem.adamw(1e-3), 128.0)
    >>> _, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
    >>> print(lowmem.scale_loss(jnp.bfloat16(0.5), opt_state))
    64.0
  """
  return jnp.asarray(loss).astype(jnp.float32) * loss_scale(opt_state)


def _check_scale(name: str, scale):
  if isinstance(scale, jax.core.Tracer):
    return
  if isinstance(scale, bool) or not isinstance(scale, float | int | np.number | jax.Array):
    raise TypeError(f"{name} is a number; got {scale!r}.")
  if not (scale > 0 and math.isfinite(scale)):
    raise ValueError(f"{name} is positive and finite; got {scale}.")


def _loss_scaled(inner, init_scale, next_scale) -> optax.GradientTransformationExtraArgs:
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    session = sessions.current(sessions.InitSession)
    if session is not None:
      session.found_ours = True
    return LossScaleState(
      scale=jnp.array(init_scale, jnp.float32),
      growth_count=jnp.zeros([], jnp.int32),  # not one zero for all: each can be donated
      skipped=jnp.zeros([], jnp.int32),
      skipped_in_a_row=jnp.zeros([], jnp.int32),
      inner_state=inner.init(params),
    )

  def advance(state, finite, inner_state) -> LossScaleState:
    scale, growth_count = next_scale(state, finite)
    return LossScaleState(
      scale=scale,
      growth_count=growth_count,
      skipped=state.skipped + (1 - finite.astype(jnp.int32)),
      skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
      inner_state=inner_state,
    )

  def update_fn(updates, state, params=None, **extra_args):
    check_state(state, LossScaleState, "The loss scale")
    state, put_back = host_memory.on_device(state)
    inverse = 1.0 / state.scale
    unscaled = jax.tree.map(lambda g: unscale(g, inverse), updates)
    finite = _all_finite(updates, inverse)
    session = sessions.current(sessions.StepSession)
    if session is None:
      is_settled, guarded = lambda x: False, contextlib.nullcontext()
    else:  # our optimizers unscale gradients as they read them, and keep their arrays at a skip
      is_settled = session.is_settled
      guarded = session.unless_skipped(finite, updates, unscaled, inverse)
    with guarded:
      new_updates, inner_state = inner.update(unscaled, state.inner_state, params, **extra_args)
    if landing.is_checking():
      return new_updates, put_back(advance(state, finite, inner_state))
    weights = {} if params is None else pytrees.named_leaves(params)
    inner_state = jax.tree.map(
      lambda new, old: new if is_settled(new) else _new_if(finite, new, old),
      inner_state,
      state.inner_state,
    )
    new_state = advance(state, finite, inner_state)

    def keep(name, update):
      if not isinstance(update, sessions.Landed):
        return _keep_if(finite, update)
      if is_settled(update.low):
        return update
      return update.map(lambda low: jnp.where(finite, low, weights[name]))

    return pytrees.map_named(keep, new_updates), put_back(new_state)

  update_fn.inner, update_fn.advance = inner, advance  # type: ignore[attr-defined] # for release
  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def unscale(g, inverse):
  """A gradient times the factor, in float32 or wider; others (int, float0) are unchanged."""
  return scaled(jnp.asarray(g), inverse) if pytrees.is_inexact(g) else g


def _all_finite(grads, inverse) -> jax.Array:
  leaves = [jnp.asarray(g) for g in jax.tree.leaves(grads) if pytrees.is_inexact(g)]
  return all_finite(leaves, inverse)


def _new_if(finite, new, old):
  """The new statistic if finite, otherwise the old one; in old's dtype.

  A bare Optax optimizer keeps bfloat16 statistics for bfloat16 parameters.
  Unscaled gradients are float32, so without the cast a step would make these
  statistics float32.
  """
  kept = jnp.where(finite, new, old)
  dtype = getattr(old, "dtype", kept.dtype)
  return kept if kept.dtype == dtype else kept.astype(dtype)


def _keep_if(finite, update):
  """The update if finite, otherwise -0.0 (x + -0.0 is x for every x, even -0.0)."""
  if not pytrees.is_inexact(update):
    is_number = getattr(update, "dtype", None) != jax.dtypes.float0
    return jnp.where(finite, update, 0).astype(update.dtype) if is_number else update
  update = jnp.asarray(update)
  return jnp.where(finite, update, jnp.asarray(-0.0, update.dtype))
