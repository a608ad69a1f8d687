"""ema: an exponential moving average of the weights, in a weight format."""

import jax
import jax.numpy as jnp
import optax

from optax_lowmem.states import EmaState, check_residuals, leaf_streams
from optax_lowmem.transforms.delta_bits import Weights, _formats_for, _zeros
from optax_lowmem.trees import nnx_variables, pytrees
from pallas_kernels import DeltaFormat
from pallas_kernels.formats import arithmetic
from pallas_kernels.formats.random_bits import key_words
from pallas_kernels.operations.merge import merge
from pallas_kernels.operations.split import split_stream


def ema(
  decay: jax.typing.ArrayLike,
  debias: bool = True,
  *,
  weights: Weights = "bf16+8",
  key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
  """``optax.ema`` of the weights in 3 bytes a parameter.

  A bfloat16 average with a decay of 0.999 stalls, because its steps are below half
  a unit in the last place. This average has a residual and is rounded
  stochastically, like the weights. It averages the values that ``update``
  receives, in float32. It is not a member of a chain.

  Without ``debias``, an average can start at the weights instead of zero. Make its
  first update with a decay of 0:
  ``lowmem.ema(0.0, debias=False).update(params32, ema.init(params))``.

  Args:
    decay: the decay rate, at least 0 and below 1; may be a traced float32 scalar.
    debias: whether to divide by ``1 - decay**count``, so the initial zeros do not
      count.
    weights: the formats of the average, as in :func:`optax_lowmem.delta_bits`.
      Leaves in ``"fp32"``, and leaves that are neither half precision nor float32,
      are averaged in float32 (float64 and complex in their own precision).
    key: an integer seed or a ``jax.random`` key for stochastic rounding.

  Returns:
    A transformation with an :class:`optax_lowmem.EmaState`. ``init`` takes the
    parameters, in half precision or float32. ``update`` takes float32 values and
    returns the average in float32, like :func:`optax_lowmem.ema_params`.

  Raises:
    ValueError: if the decay is out of range or in half precision, if a format is
      unknown, or if values do not match the state. The message names the leaf.
    TypeError: if values are not float32. Pass
      :func:`optax_lowmem.master_params`. The message names the leaf.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> params, opt_state = lowmem.init(lowmem.adamw(1e-3), {"w": jnp.ones((4, 32))})
    >>> ema = lowmem.ema(0.999)
    >>> ema_state = ema.init(params)
    >>> params32 = lowmem.master_params(params, opt_state)
    >>> average, ema_state = ema.update(params32, ema_state)
    >>> print(ema_state.ema["w"].dtype, f"{average['w'][0, 0]:.3f}")
    bfloat16 1.000

  References:
    `Acceleration of Stochastic Approximation by Averaging
    <https://epubs.siam.org/doi/10.1137/0330046>`__
  """
  _check_decay(decay)
  if not callable(weights):
    weights = jax.tree.map(DeltaFormat.parse, weights)

  def init_fn(params):
    formats = _formats_for(weights, jax.tree.map(_float32_struct, params), converting=True)

    def zeros(name, leaf):
      fmt = formats.get(name)
      dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32) if fmt is None else fmt.dtype
      return jnp.zeros_like(leaf, dtype=dtype)

    def residual(name, leaf):
      fmt = formats.get(name)
      return None if fmt is None else _zeros(leaf, fmt)

    return EmaState(
      formats=formats.marked(params),
      count=jnp.zeros([], jnp.int32),
      key=jnp.array(key_words(key), copy=True),  # the state may be donated; the caller's key is not
      ema=pytrees.map_named(zeros, params),
      residuals=pytrees.map_named(residual, params),
      correction=jnp.full([], 0.0 if debias else 1.0, jnp.float32),
    )

  def update_fn(updates, state, params=None, **extra_args):
    del params, extra_args
    formats = state.formats
    _check_values(updates, state)
    sums = pytrees.named_leaves(state.ema)
    residuals = check_residuals(state.residuals, sums, formats)
    count = optax.safe_increment(state.count)
    # No parameter has these names, so the weights draw other bits from an equal key.
    streams = leaf_streams(state.key, count, [f"ema of {name}" for name in formats.by_name])

    def step(name, value):
      fmt = formats.get(name)
      old = sums[name] if fmt is None else merge(sums[name], residuals.get(name), fmt)
      # Not (1 - decay) * value + decay * old: in float32, these factors do not add up to 1.
      new = old + arithmetic.rounded((1 - decay) * (value - old))
      return (new, None) if fmt is None else split_stream(new, fmt, streams[f"ema of {name}"])

    stepped = {name: step(name, value) for name, value in pytrees.named_leaves(updates).items()}
    state = EmaState(
      formats=formats,
      count=count,
      key=state.key,
      ema=pytrees.map_named(lambda name, _: stepped[name][0], updates),
      residuals=pytrees.map_named(lambda name, _: stepped[name][1], updates),
      correction=_correction(1 - decay, count) if debias else jnp.ones([], jnp.float32),
    )
    return ema_params(state), state

  return nnx_variables.transformation(init_fn, update_fn)


def ema_params(ema_state: EmaState):
  """Returns the average in an ``EmaState`` as float32, to evaluate or to export.

  Args:
    ema_state: the state of :func:`optax_lowmem.ema`.

  Returns:
    The average in the tree of the parameters: float32, or the leaf's own dtype for
    float64 and complex. With ``debias``, it is NaN before the first update.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> ema = lowmem.ema(0.9)
    >>> params32 = {"w": jnp.full((4, 32), 0.5)}
    >>> _, ema_state = ema.update(params32, ema.init(params32))
    >>> average = lowmem.ema_params(ema_state)["w"]
    >>> print(average.dtype, f"{average[0, 0]:.3f}")
    float32 0.500
  """
  state = nnx_variables.pure(ema_state)
  # A product has the same bits in every program; a division by a scalar does not.
  factor = 1 / state.correction
  residuals = pytrees.named_leaves(state.residuals)

  def average(name, x):
    fmt = state.formats.get(name)
    x = x if fmt is None else merge(x, residuals.get(name), fmt)
    return x * factor.astype(x.dtype)

  return nnx_variables.like(ema_state.ema, pytrees.map_named(average, state.ema))


def _correction(rest, count):
  """``1 - decay**count`` from ``rest = 1 - decay``.

  From a decay of 0.9999 in float32, the result would be 1e-4 off.
  """
  correction = -jnp.expm1(count * jnp.log1p(jnp.asarray(-rest, jnp.float32)))
  # The barrier gives the state and the average the same value.
  return jax.lax.optimization_barrier(correction.astype(jnp.float32))


def _check_decay(decay):
  if jnp.result_type(decay) in pytrees.HALF_DTYPES:
    raise ValueError(
      f"decay is a {jnp.result_type(decay)} value, which rounds 0.999 to 1. Pass"
      " hyperparam_dtype=jnp.float32 to optax.inject_hyperparams."
    )
  if not isinstance(decay, jax.core.Tracer) and not 0 <= decay < 1:
    raise ValueError(f"decay is at least 0 and below 1; got {decay}.")


def _float32_struct(leaf):
  """The float32 struct of a half-precision leaf; other leaves are unchanged."""
  return jax.ShapeDtypeStruct(leaf.shape, jnp.float32) if pytrees.is_half(leaf) else leaf


def _check_values(values, state: EmaState):
  pytrees.check_same_structure(values, state.ema, "The values to average")
  sums = pytrees.named_leaves(state.ema)
  for name, x in pytrees.named_leaves(values).items():
    if pytrees.is_half(x):
      raise TypeError(
        f"The value to average at {name} is {x.dtype}; ema averages float32 weights: pass"
        " lowmem.master_params(params, opt_state)."
      )
    if state.formats.get(name) and jnp.result_type(x) != jnp.float32:
      raise TypeError(f"The value to average at {name} is {jnp.result_type(x)}, not float32.")
    if jnp.shape(x) != sums[name].shape:
      raise ValueError(
        f"The value to average at {name} has shape {jnp.shape(x)}; the average has"
        f" {sums[name].shape}."
      )
