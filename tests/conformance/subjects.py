"""What is put in the place of Optax's transformations: a `Subject` for each of our wrappers."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_lowmem as lowmem

HALF = {jnp.bfloat16: "bf16+8", jnp.float16: "fp16+8"}


def by_dtype(path, leaf):
  """Half-precision leaves have a format with 8 residual bits; others are left alone."""
  del path
  return HALF.get(jnp.result_type(leaf).type, "fp32")


def converting(fmt="bf16+8"):
  """`by_dtype`, with a format for float32 leaves, which `lowmem.init` converts."""

  def weights(path, leaf):
    return fmt if jnp.result_type(leaf) == jnp.float32 else by_dtype(path, leaf)

  return weights


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
  """One of our wrappers, or our optimizers with one choice of formats.

  Attributes:
    name: in the table.
    wrap: (transformation, as_gradient) -> the transformation that the suite
      gets; as_gradient asks for updates of the gradient's dtype.
    own: factories that stand in for Optax's of the same name, if not wrapped.
    has_updates: False where `lowmem.step` writes the weights: the dtype of the
      updates is then the adapter's, and tests of it would test nothing.
  """

  name: str
  wrap: Callable[[Any, bool], Any]
  own: Mapping[str, Callable] | None = None
  has_updates: bool = True

  @property
  def identifier(self) -> str:
    return "".join(c if c.isalnum() else "_" for c in self.name)

  def covers(self, name: str) -> bool:
    return self.own is None or name in self.own

  def factory(self, name: str, original: Callable, as_gradient: Callable[[], bool]) -> Callable:
    """The factory that a suite finds under a name of Optax's."""
    made_by = original if self.own is None else self.own.get(name)
    if made_by is None:
      return original

    @functools.wraps(made_by)  # inject_hyperparams reads the signature
    def make(*args, **kwargs):
      inner = made_by(*args, **kwargs)
      if not isinstance(inner, optax.GradientTransformation):
        return inner
      return self.wrap(inner, as_gradient())

    return make


# How a wrapper is made to stand where a suite expects Optax's.


def with_params(tx):
  """Where a test gives no parameters, zeros: delta_bits needs them, the tests' SGD does not."""
  tx = optax.with_extra_args_support(tx)

  def update(updates, state, params=None, **extra_args):
    params = jax.tree.map(jnp.zeros_like, updates) if params is None else params
    return tx.update(updates, state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update)


def like_gradient(tx, as_gradient: bool):
  """Casts float32 updates for tests (MultiSteps, lax.cond) that demand the gradient's dtype."""
  if not as_gradient:
    return tx
  tx = optax.with_extra_args_support(tx)

  def update(updates, state, params=None, **extra_args):
    dtypes = jax.tree.map(jnp.result_type, updates)
    updates, state = tx.update(updates, state, params, **extra_args)
    for u, dtype in zip(jax.tree.leaves(updates), jax.tree.leaves(dtypes), strict=True):
      assert u.dtype in (dtype, jnp.float32)
    return jax.tree.map(lambda u, dtype: u.astype(dtype), updates, dtypes), state

  return optax.GradientTransformationExtraArgs(tx.init, update)


def scaling(tx):
  """Multiplies the suite's gradients by the loss scale, as `scale_loss` would have done."""
  tx = optax.with_extra_args_support(tx)

  def update(updates, state, params=None, **extra_args):
    scale = lowmem.loss_scale(state)

    def scaled(g):
      if not jnp.issubdtype(jnp.result_type(g), jnp.inexact):
        return g
      g = jnp.asarray(g)
      return g * scale.astype(jnp.finfo(g.dtype).dtype)

    return tx.update(jax.tree.map(scaled, updates), state, params, **extra_args)

  return optax.GradientTransformationExtraArgs(tx.init, update)


class Stepped(NamedTuple):
  """State of `stepping`."""

  weights: Any
  opt_state: Any


def stepping(tx):
  """`lowmem.init` and `lowmem.step` as a transformation of float32 parameters.

  The weights are half precision inside; the suite gets the difference to the
  new float32 masters, so that it sees how low-memory weights converge.
  """
  tx = optax.with_extra_args_support(tx)

  def init(params):
    return Stepped(*lowmem.init(tx, params))

  def update(updates, state, params=None, **extra_args):
    dtypes = jax.tree.map(jnp.result_type, updates)
    if params is None:
      params = lowmem.master_params(state.weights, state.opt_state)
    weights, opt_state = lowmem.step(tx, updates, state.opt_state, state.weights, **extra_args)
    masters = lowmem.master_params(weights, opt_state)
    updates = jax.tree.map(lambda m, p, dtype: (m - p).astype(dtype), masters, params, dtypes)
    return updates, Stepped(weights, opt_state)

  return optax.GradientTransformationExtraArgs(init, update)


# The subjects.


def _delta_bits(make_inner):
  def wrap(inner, as_gradient):
    dtype = "gradient" if as_gradient else jnp.float32
    return with_params(lowmem.delta_bits(make_inner(inner), by_dtype, update_dtype=dtype))

  return wrap


def _chained(inner, as_gradient):
  dtype = "gradient" if as_gradient else jnp.float32
  last = lowmem.delta_bits(weights=by_dtype, update_dtype=dtype)
  return with_params(optax.chain(inner, last))


def _quantized(*args):
  return lambda inner, as_gradient: like_gradient(lowmem.quantize_state(inner, *args), as_gradient)


def _scaled(wrapper):
  return lambda inner, as_gradient: with_params(like_gradient(scaling(wrapper(inner)), as_gradient))


def _stepped(wrapper=lambda inner: inner, fmt="bf16+8"):
  def wrap(inner, as_gradient):
    del as_gradient
    return stepping(lowmem.delta_bits(wrapper(inner), converting(fmt)))

  return wrap


def _scale_by_adam(learning_rate, *args, **kwargs):
  return optax.chain(
    lowmem.scale_by_adam(*args, **kwargs), optax.scale_by_learning_rate(learning_rate)
  )


# inject_hyperparams finds Optax's names and no others.
functools.update_wrapper(_scale_by_adam, optax.adam)


def _ours(weights, statistics: str | None = None):
  """adam, adamw, lion and sgd of ours, every statistic in one format."""

  def partial(name):
    factory, arguments = getattr(lowmem, name), {"weights": weights}
    if statistics is not None:
      fields = {"sgd": ("accumulator",), "lion": ("mu",)}.get(name, ("mu", "nu"))
      arguments |= dict.fromkeys(fields, statistics)

    @functools.wraps(getattr(optax, name))  # inject_hyperparams finds Optax's arguments
    def make(*args, **kwargs):
      return factory(*args, **kwargs, **arguments)

    return make

  return {name: partial(name) for name in ("adam", "adamw", "lion", "sgd")}


def _identity(inner, as_gradient):
  return with_params(like_gradient(inner, as_gradient))


def _step_of_ours(inner, as_gradient):
  del as_gradient
  return stepping(inner)


DELTA_BITS = Subject("delta_bits(optax.X)", _delta_bits(lambda inner: inner))
CHAINED = Subject("chain(optax.X, delta_bits())", _chained)
QUANTIZED = Subject("quantize_state(optax.X)", _quantized())
QUANTIZED_FP32 = Subject('quantize_state(optax.X, "fp32")', _quantized({}, "fp32"))
QUANTIZED_BF16 = Subject('quantize_state(optax.X, "bf16")', _quantized({}, "bf16"))
BOTH = Subject("delta_bits(quantize_state(optax.X))", _delta_bits(lowmem.quantize_state))
DYNAMIC = Subject("dynamic_loss_scale(optax.X)", _scaled(lowmem.dynamic_loss_scale))
STATIC = Subject(
  "static_loss_scale(delta_bits(optax.X))",
  _scaled(lambda inner: lowmem.static_loss_scale(lowmem.delta_bits(inner, by_dtype), 128.0)),
)
# Not a row of the table: what stands in for DYNAMIC where a bare transformation cannot.
DYNAMIC_DELTA_BITS = Subject(
  "dynamic_loss_scale(delta_bits(optax.X))",
  _scaled(lambda inner: lowmem.dynamic_loss_scale(lowmem.delta_bits(inner, by_dtype))),
)
STEP = Subject("step of delta_bits(optax.X)", _stepped(), has_updates=False)
STEP_BOTH = Subject(
  "step of delta_bits(quantize_state(optax.X))",
  _stepped(lowmem.quantize_state),
  has_updates=False,
)
OURS = Subject("adam, adamw, lion, sgd", _identity, own=_ours(by_dtype))
STEP_OURS = tuple(
  Subject(
    f'step of adam, adamw, lion, sgd, "{statistics}"',
    _step_of_ours,
    own=_ours(converting(), statistics),
    has_updates=False,
  )
  for statistics in ("int8", "bf16", "fp16", "fp32")
)
SCALE_BY_ADAM = Subject(
  "scale_by_adam",
  lambda inner, as_gradient: like_gradient(inner, as_gradient),
  own={"adam": _scale_by_adam, "scale_by_adam": lowmem.scale_by_adam},
)

WRAPPERS = (
  DELTA_BITS,
  CHAINED,
  QUANTIZED,
  QUANTIZED_FP32,
  QUANTIZED_BF16,
  BOTH,
  DYNAMIC,
  STATIC,
  STEP,
  STEP_BOTH,
)
# Their updates are float32, whatever the gradients are.
FLOAT32_UPDATES = (
  QUANTIZED,
  QUANTIZED_FP32,
  QUANTIZED_BF16,
  DYNAMIC,
  STATIC,
  OURS,
  SCALE_BY_ADAM,
)
ALL = (*WRAPPERS, OURS, *STEP_OURS, SCALE_BY_ADAM)
