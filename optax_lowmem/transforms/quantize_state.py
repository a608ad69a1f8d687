"""quantize_state: stores the statistics of any transformation in 16, 8 or 4 bits."""

from collections.abc import Collection, Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_lowmem.engine import landing, sessions
from optax_lowmem.engine.optimizer import Optimizer
from optax_lowmem.engine.portable import portable_update
from optax_lowmem.states import QuantizedState, check_state, leaf_streams, was_taken
from optax_lowmem.trees import nnx_variables, pytrees
from optax_lowmem.trees.formats import Formats, Statistic
from pallas_kernels.formats import state_formats
from pallas_kernels.formats.random_bits import key_words, random_bits, statistic_bits
from pallas_kernels.formats.state_formats import StateFormat
from pallas_kernels.placement import sharded
from pallas_kernels.placement.by_device import by_device

# Fields of Optax's states that average squares. They are stored as second moments.
SQUARES = frozenset({"nu", "nu_max", "sum_of_squares", "e_g", "e_x", "n"})
DEFAULT_FORMATS = {"mu": "int8", "nu": "int8"}


class _Default(str):
  """A default that differs from an equal string that the caller passes."""


DEFAULT: Any = _Default("int8")


def quantize_state(
  inner: optax.GradientTransformation,
  formats: Mapping[str, state_formats.Name] | None = None,
  default: state_formats.Name = "bf16",
  *,
  key: jax.typing.ArrayLike = 0,
  elementwise: bool = False,
  layerwise: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Stores the statistics of any Optax transformation in 16, 8 or 4 bits between steps.

  A statistic is an array in inner's state that has the path and the shape of a
  parameter, in a field like ``mu``, ``nu`` or ``trace``. inner sees its statistics
  in float32. It sees half-precision gradients and parameters in float32, too, and
  returns float32 updates. Statistics that inner does not make in float32 stay as
  inner makes them.

  Args:
    inner: the transformation to wrap.
    formats: ``"fp32"``, ``"bf16"``, ``"fp16"``, ``"int8"`` or ``"int4"`` for each
      named field of inner's state; by default ``{"mu": "int8", "nu": "int8"}``.
    default: the format of every other field.
    key: an integer seed or a ``jax.random`` key for stochastic rounding.
    elementwise: declares that the update of an element depends only on that
      element and on counters; see :func:`optax_lowmem.delta_bits`.
    layerwise: declares that the update of a leaf depends only on that leaf and on
      counters; see :func:`optax_lowmem.delta_bits`.

  Returns:
    A transformation with a :class:`optax_lowmem.QuantizedState`.

  Raises:
    ValueError: if a format is unknown, if inner's state has no statistics in a
      field that ``formats`` names, or if both declarations are made.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.quantize_state(optax.sgd(0.1, momentum=0.9), {"trace": "int8"})
    >>> opt_state = tx.init({"w": jnp.ones((4, 32))})
    >>> trace = opt_state.inner_state[0].trace["w"]
    >>> print(trace.codes.dtype, trace.scale.dtype, trace.scale.shape)
    int8 bfloat16 (4, 1)

  References:
    `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`__

    `Learning Transferable Visual Models From Natural Language Supervision
    <https://arxiv.org/abs/2103.00020>`__ (CLIP), section 2.5: Adam statistics in
    half precision
  """
  by_field = dict(DEFAULT_FORMATS if formats is None else formats)
  tx = quantize(inner, by_field, default, key, required=formats or (), elementwise=elementwise)
  if is_declared(elementwise, layerwise):  # gradient release and delta_bits read it
    inner = optax.with_extra_args_support(inner)
    tx.update.optimizer = Optimizer.declared(inner, layerwise=layerwise)
  return tx


def is_declared(elementwise: bool, layerwise: bool) -> bool:
  """Whether a user makes one of the two declarations; raises if both."""
  if elementwise and layerwise:
    raise ValueError(
      "elementwise=True and layerwise=True contradict each other. Declare elementwise=True if each"
      " element's update depends on that element alone, otherwise layerwise=True."
    )
  return elementwise or layerwise


def scale_by_adam(
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  eps_root: jax.typing.ArrayLike = 0.0,
  mu_dtype: jax.typing.DTypeLike | None = None,
  *,
  nesterov: bool = False,
  mu: state_formats.Name = DEFAULT,
  nu: state_formats.Name = "int8",
  key: jax.typing.ArrayLike = 0,
) -> optax.GradientTransformationExtraArgs:
  """``optax.scale_by_adam`` with moments in 16, 8 or 4 bits, as a member of a chain.

  Args:
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    eps: added to the square root of the second moment.
    eps_root: added to the second moment under the square root.
    mu_dtype: Optax's dtype for the first moment, instead of ``mu``.
    nesterov: whether to use Nesterov momentum.
    mu: the format of the first moment: ``"fp32"``, ``"bf16"``, ``"fp16"``, ``"int8"``
      or ``"int4"``.
    nu: the format of the second moment.
    key: an integer seed or a ``jax.random`` key for stochastic rounding.

  Returns:
    A transformation with a :class:`optax_lowmem.QuantizedState`.

  Raises:
    ValueError: if a format is unknown, or if both ``mu`` and ``mu_dtype`` are
      given.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_lowmem as lowmem
    >>> tx = optax.chain(lowmem.scale_by_adam(), optax.scale(-1e-3), lowmem.delta_bits())
    >>> params, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
    >>> moments = opt_state[0].inner_state
    >>> print(moments.mu["w"].codes.dtype, moments.nu["w"].codes.dtype)
    int8 uint8

  References:
    `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`__

    `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`__
  """
  inner = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
  return quantize(
    inner, {"mu": first_format(mu, mu_dtype, "mu"), "nu": first_format(nu, None, "nu")}, "bf16", key
  )


def first_format(name, dtype, argument: str) -> str | None:
  """The format of a statistic; None if Optax's dtype argument is given."""
  if dtype is None:
    if name is None:
      raise ValueError(f'{argument}=None names no format. Write {argument}="fp32".')
    return name
  if not isinstance(name, _Default):
    raise ValueError(
      f"{argument}={name!r} and {argument}_dtype={dtype!r} both set how {argument} is stored;"
      " pass only one of them."
    )
  return None


def quantize(
  inner,
  by_field: Mapping[str, str | None],
  default,
  key,
  *,
  required: Collection[str] = (),
  only_held: bool = False,
  elementwise: bool = False,
  starts_at_zero: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """``quantize_state`` for our own transformations, too.

  Args:
    inner: the transformation to wrap.
    by_field: formats by field; None leaves a field as inner makes it.
    default: the format of other fields.
    key: as in ``quantize_state``.
    required: fields in which inner's state must have statistics.
    only_held: whether to leave the statistics of parameters without a weight
      format alone (inside ``delta_bits``).
    elementwise: as in ``quantize_state``.
    starts_at_zero: whether every statistic starts at zero, whatever the
      parameters are.

  Returns:
    The transformation.
  """
  inner = optax.with_extra_args_support(inner)
  update_of_inner = functools.partial(portable_update, inner) if elementwise else inner.update
  for name in (*by_field.values(), default):
    if name is not None:
      StateFormat(name)

  def init_fn(params):
    inner_state = pytrees.sharded_like(inner.init(jax.tree.map(_widen, params)), params)
    table = _find_statistics(inner_state, params, by_field, default, required, only_held)
    words = jnp.array(key_words(key), copy=True)
    if (session := sessions.current(sessions.InitSession)) is not None:
      session.found_ours = True
    if starts_at_zero:
      inner_state = _zeros_of(inner_state, table, pytrees.named_leaves(params), words)
      return QuantizedState(table.marked(params), jnp.zeros([], jnp.int32), words, inner_state)
    # Otherwise XLA would fold the quantization of constants, mostly zeros, for minutes.
    if table.table:
      inner_state = jax.tree.map(jax.lax.optimization_barrier, inner_state)
    return QuantizedState(
      formats=table.marked(params),
      step=jnp.zeros([], jnp.int32),
      key=words,
      inner_state=_store(inner_state, table, words, 0, _block_scales(inner_state, table)),
    )

  def update_fn(updates, state, params=None, **extra_args):
    check_state(state, QuantizedState, "quantize_state")
    table = state.formats

    wide, wide_params = (jax.tree.map(_widen, tree) for tree in (updates, params))
    if landing.is_checking():
      return wide, state

    def inner_update(stored):
      return update_of_inner(wide, _load(stored, table), wide_params, **extra_args)

    updates, after = inner_update(state.inner_state)
    # With scales, the codes need a second pass, which computes the statistics again.
    if scales := _block_scales(after, table, state.inner_state):
      updates, after = inner_update(_read_again(state.inner_state, table, scales))
    step = state.step + was_taken(state.inner_state, after)
    stored = _store(after, table, state.key, step, scales)
    return updates, QuantizedState(table, step, state.key, stored)

  init_fn.starts_at_zero = starts_at_zero  # type: ignore[attr-defined] # then delta_bits merges nothing
  return nnx_variables.transformation(init_fn, update_fn)


def _zeros_of(inner_state, table: Formats, parameters, words):
  """The state with stored zeros as its statistics, sharded like their parameters."""
  traced, formats = {}, {}

  def zeros(name, x):
    if (known := table.get(name)) is None:
      return x
    fmt = known.format
    if any(isinstance(a, jax.core.Tracer) for a in (x, parameters[known.parameter])):
      if sharded.explicit(x) is not None:
        return sharded.automatic(functools.partial(state_formats.zeros_like, fmt=fmt), x, x)
      traced[name], formats[name] = x, fmt
      return x
    if len(x.sharding.device_set) == 1:
      # From the host, so no shape needs a compilation.
      struct = state_formats.stored_struct(x.shape, fmt)
      return jax.tree.map(lambda s: jax.device_put(np.zeros(s.shape, s.dtype), x.sharding), struct)
    return _quantize(x, fmt, known.number, words, _block_scale(x, fmt) if fmt.has_scale else None)

  state = pytrees.map_named(zeros, inner_state)
  if not traced:
    return state
  if sessions.is_leaf_by_leaf():
    stored = {name: _traced_zeros({name: x}, formats)[name] for name, x in traced.items()}
  else:
    stored = _traced_zeros(traced, formats)
  return pytrees.map_named(lambda name, x: stored.get(name, x), state)


def _traced_zeros(traced: dict[str, jax.Array], formats: dict[str, StateFormat]) -> dict[str, Any]:
  """Stored zeros by name, made in one program."""
  struct = {name: state_formats.stored_struct(x.shape, formats[name]) for name, x in traced.items()}

  def each(xs):
    return {name: state_formats.zeros_like(x, formats[name]) for name, x in xs.items()}

  def alone(xs):  # no shardings to propagate, and less to compile
    del xs
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), struct)

  return by_device({"any": each, "cpu": alone, "gpu": alone}, traced, like=struct)


def _widen(x):
  return x.astype(jnp.float32) if pytrees.is_half(x) else x


def _find_statistics(inner_state, params, by_field, default, required, only_held) -> Formats:
  """The statistics in inner's state, by their names there."""
  weights = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
  held = sessions.held_names() if only_held else None
  table: list[tuple[str, Statistic]] = []
  fields, counts = set(), dict.fromkeys(weights, 0)
  signed = _signed_squares(inner_state)
  for path, leaf in jax.tree_util.tree_leaves_with_path(inner_state):
    start = pytrees.owner(path, weights)
    if start is None or not isinstance(path[start - 1], jax.tree_util.GetAttrKey):
      continue
    weight, parameter = weights[path[start:]], pytrees.name_of(path[start:])
    if jnp.shape(weight) != jnp.shape(leaf) or leaf.dtype != jnp.float32:
      continue
    field = path[start - 1].name
    fields.add(field)
    number = counts[path[start:]]
    counts[path[start:]] += 1
    name = by_field.get(field, default)
    if name not in (None, "fp32") and (held is None or parameter in held):
      fmt = StateFormat(name, is_square=field in SQUARES and path[: start - 1] not in signed)
      table.append((pytrees.name_of(path), Statistic(fmt, parameter, number)))
  missing = set(required) - fields
  if missing and weights:
    raise ValueError(
      f"formats= names {sorted(missing)}, but the state has no float32 statistics there; it has"
      f" them in {sorted(fields)}."
    )
  return Formats(tuple(table))


def _signed_squares(inner_state) -> set[tuple]:
  """The paths of SM3's states, whose ``nu`` is a momentum and can be negative."""
  is_sm3 = lambda x: isinstance(x, optax.ScaleBySM3State)
  nodes = jax.tree_util.tree_leaves_with_path(inner_state, is_leaf=is_sm3)
  return {path for path, node in nodes if is_sm3(node)}


def _block_scales(inner_state, table: Formats, before=None) -> dict[str, jax.Array]:
  """The block scales by name, of statistics whose format has scales.

  before is the stored state before them, None if there is none.
  """
  named = pytrees.named_leaves(inner_state)
  formats = {name: x.format for name, x in table.table if x.format.has_scale}
  old: dict[str, jax.Array] = {}
  if before is not None:
    _map_stored(lambda name, x: old.update({name: x.scale}) if name in formats else None, before)
  return {name: _block_scale(named[name], fmt, old.get(name)) for name, fmt in formats.items()}


def _store(inner_state, table: Formats, words, step, scales):
  """Inner's state with its statistics in their formats."""
  streams = leaf_streams(words, step, {x.parameter for _, x in table.table})

  def store(name, x):
    known = table.get(name)
    if known is None:
      return x
    stream = streams[known.parameter]
    return _quantize(x, known.format, known.number, stream, scales.get(name))

  return pytrees.map_named(store, inner_state)


def _load(inner_state, table: Formats):
  """The inverse of ``_store``."""

  def load(name, x):
    known = table.get(name)
    return x if known is None else _dequantize(x, known.format)

  return _map_stored(load, inner_state)


def _read_again(inner_state, table: Formats, scales):
  """The stored state for a second pass; see ``state_formats.read_again``."""

  def again(name, x):
    if name not in scales:
      return x
    read = functools.partial(state_formats.read_again, fmt=table.by_name[name].format)
    return sharded.automatic(read, x.codes, x, scales[name])

  return _map_stored(again, inner_state)


def _map_stored(f, inner_state):
  return jax.tree_util.tree_map_with_path(
    lambda path, x: f(pytrees.name_of(path), x),
    inner_state,
    is_leaf=lambda x: isinstance(x, state_formats.Blocks),
  )


# jit traces leaves of one shape and format once.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _quantize(x, fmt: StateFormat, index: int, stream, scale):
  def quantize(x, stream, scale):
    bits = lambda lane: random_bits(stream, x.shape, lane)
    return state_formats.quantize(x, fmt, statistic_bits(bits, index), scale)

  return sharded.automatic(quantize, x, x, stream, scale)


@functools.partial(jax.jit, static_argnums=1)
def _block_scale(x, fmt: StateFormat, old=None):
  block_scale = lambda x, old: state_formats.block_scale(x, fmt, old)
  return sharded.automatic(block_scale, x, x, old)


def _dequantize(stored, fmt: StateFormat):
  like = stored.codes if isinstance(stored, state_formats.Blocks) else stored
  return sharded.automatic(functools.partial(state_formats.dequantize, fmt=fmt), like, stored)
