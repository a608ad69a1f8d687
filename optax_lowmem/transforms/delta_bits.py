"""delta_bits: half-precision weights, with the rest of their float32 masters in residual bits."""

from collections.abc import Callable
import contextlib
import contextvars
import functools
from typing import Any, Literal
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_lowmem.engine import in_place, landing, sessions
from optax_lowmem.engine.optimizer import Optimizer
from optax_lowmem.engine.portable import portable_update
from optax_lowmem.states import (
  DeltaBitsState,
  check_residuals,
  check_state,
  leaf_streams,
  was_taken,
)
from optax_lowmem.transforms import wrappers
from optax_lowmem.transforms.quantize_state import is_declared
from optax_lowmem.trees import nnx_variables, pytrees
from optax_lowmem.trees.formats import Formats
from pallas_kernels import DeltaFormat
from pallas_kernels.formats import arithmetic, packing
from pallas_kernels.formats.random_bits import key_words
from pallas_kernels.operations.apply_update import apply_update_stream
from pallas_kernels.operations.merge import merge
from pallas_kernels.operations.split import split_leaves
from pallas_kernels.placement import sharded

Weights = Any  # a format, a pytree prefix of formats, or a callable (path, leaf) -> format


def delta_bits(
  inner: optax.GradientTransformation | None = None,
  weights: Weights = "bf16+8",
  *,
  key: jax.typing.ArrayLike = 0,
  update_dtype: jax.typing.DTypeLike | Literal["gradient"] = jnp.float32,
  elementwise: bool | Optimizer = False,
  layerwise: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """Stores float32 master weights as half-precision weights and a few residual bits.

  The wrapped transformation sees float32 master weights and float32 gradients.
  Without one, ``delta_bits`` stands last in a chain:
  ``optax.chain(optax.adamw(lr), lowmem.delta_bits())``.

  After ``optax.apply_updates``, the parameters are exactly the weights that the
  new residuals belong to (up to the sign of zero). No float32 update can do that
  if the weight crosses zero to a far smaller one, or if it leaves infinity. The
  residual then belongs to the weight that the update does reach.
  :func:`optax_lowmem.step` does not have this limit.

  Leaves that are not half precision pass through with inner's own behaviour.

  Args:
    inner: the transformation to wrap; by default ``optax.identity()``.
    weights: a format (``"bf16+8"``, ``"fp16+8"``, ``"bf16+0"``, ...; ``"fp32"``
      leaves weights alone), a pytree prefix of formats, or a callable
      ``(path, leaf) -> format``, with path as in
      ``jax.tree_util.tree_map_with_path``.
    key: an integer seed or a ``jax.random`` key for stochastic rounding.
    update_dtype: float32, or ``"gradient"`` for wrappers that demand updates in
      the gradient's dtype (``optax.apply_if_finite`` on bfloat16 gradients). With
      ``"gradient"``, the master is clamped to the cell of the weight that the
      coarse update reaches; the error is at most 2**-8 of the update.
    elementwise: declares that the update of an element depends only on that
      element and on counters, and not on masks. :func:`optax_lowmem.step` then
      runs the programs of :func:`optax_lowmem.adamw`, and
      :func:`optax_lowmem.fused_backward` accepts the transformation.
    layerwise: declares that the update of a leaf depends only on that leaf and on
      counters. In a stack over which ``loss_fn`` scans, the update of a layer must be
      that of the layer alone.
      :func:`optax_lowmem.fused_backward` then accepts the transformation, and
      :func:`optax_lowmem.step` steps one leaf at a time, by XLA.

  Returns:
    A transformation with a :class:`optax_lowmem.DeltaBitsState`.

  Raises:
    ValueError: if a format is unknown, if params are missing, if gradients or
      residuals do not match the parameters, if declarations contradict each other,
      or if a hyperparameter of ``inner`` is traced in half precision (pass
      ``hyperparam_dtype=jnp.float32`` to ``optax.inject_hyperparams``). The message
      names the leaf.
    TypeError: if a half-precision leaf does not have its format's dtype. The
      message names the leaf.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.delta_bits(optax.adamw(1e-3), "bf16+8")
    >>> params, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
    >>> grads = {"w": jnp.ones((4, 32), jnp.bfloat16)}
    >>> updates, opt_state = tx.update(grads, opt_state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> print(updates["w"].dtype, params["w"].dtype)
    float32 bfloat16

  References:
    `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`__, section 3.1

    `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`__, section 3.1
  """
  inner = optax.with_extra_args_support(optax.identity() if inner is None else inner)
  optimizer = None
  if isinstance(elementwise, Optimizer):  # one of our own
    optimizer = elementwise
  elif is_declared(elementwise, layerwise):
    optimizer = getattr(inner.update, "optimizer", None)  # of quantize_state
    if optimizer is None:
      optimizer = Optimizer.declared(inner, layerwise=layerwise)
      if elementwise:
        update = functools.partial(portable_update, inner)
        inner = optax.GradientTransformationExtraArgs(inner.init, update)
    elif not isinstance(optimizer, Optimizer) or optimizer.is_layerwise != layerwise:
      raise ValueError(
        "delta_bits declares its inner transformation elementwise or layerwise, but that is an"
        " optimizer of this library, or a quantize_state with another declaration. quantize_state"
        " and the delta_bits around it must declare the same."
      )
  _refuse_half_hyperparameters(inner)
  _check_update_dtype(update_dtype)
  if weights is None:
    raise ValueError('weights=None is no format. Write "fp32" to leave all weights alone.')
  if isinstance(weights, type) or not callable(weights):  # jnp.bfloat16 can be called
    weights = pytrees.map_named(lambda name, spec: _parse(spec, name), weights)
  starts_at_zero = getattr(inner.init, "starts_at_zero", False)

  def init_fn(params):
    return _init(inner, weights, key, starts_at_zero, params)

  def update_fn(updates, state, params=None, **extra_args):
    if params is None:
      raise ValueError("delta_bits needs params: tx.update(grads, state, params); got None.")
    check_state(state, DeltaBitsState, "A member of optax_lowmem")
    if landing.is_checking():
      return landing.mark(updates, state, params, update_dtype)
    pytrees.check_gradients(updates, params)
    formats = state.formats
    wrappers.check(
      [g for name, g in pytrees.named_leaves(updates).items() if formats.get(name)], update_dtype
    )
    session = sessions.current(sessions.StepSession)
    new = None
    # Our own optimizers take no extra arguments; a declared one may read them.
    if optimizer is not None and not (optimizer.is_declared and extra_args):
      if session is not None:
        new = in_place.step(optimizer, session, updates, state, params)
      elif update_dtype != "gradient":
        new = in_place.update(optimizer, updates, state, params)
    if new is None:
      new = _composed(inner, update_dtype, session, updates, state, params, extra_args)
    return new

  if optimizer is not None:
    update_fn.optimizer = optimizer  # type: ignore[attr-defined] # gradient release reads it
  return nnx_variables.transformation(init_fn, update_fn)


def _init(inner, weights, key, starts_at_zero: bool, params) -> DeltaBitsState:
  """The initial state; an open session receives the weights of float32 leaves."""
  seed = jnp.array(key_words(key), copy=True)  # the state may be donated; the caller's key is not
  session = sessions.current(sessions.InitSession)
  formats = _formats_for(weights, params, converting=session is not None)
  streams = leaf_streams(seed, 0, formats.by_name)
  residuals, masters = {}, {}
  whole: dict[DeltaFormat, dict[str, jax.Array]] = {}
  for name, leaf in pytrees.named_leaves(params).items():
    fmt = formats.get(name)
    if fmt is None:
      continue
    if leaf.dtype == jnp.float32:
      whole.setdefault(fmt, {})[name] = jnp.asarray(leaf)
    else:
      residuals[name] = _zeros(leaf, fmt)
      masters[name] = arithmetic.widen(leaf)
  for fmt, leaves in whole.items():
    pairs = [(leaf, streams[name]) for name, leaf in leaves.items()]
    # In one program, unless the caller slices the program by leaf.
    runs = [[pair] for pair in pairs] if sessions.is_leaf_by_leaf() else [pairs]
    parts = [x for run in runs for x in split_leaves(*_columns(run, fmt), not starts_at_zero)]
    for name, (low, residuals[name], master) in zip(leaves, parts, strict=True):
      session.convert(name, low)
      # The state is zeros whatever the weights are.
      masters[name] = leaves[name] if starts_at_zero else master
  if session is not None:
    session.found_ours = True
  with sessions.holding(frozenset(formats.by_name)):
    inner_state = inner.init(pytrees.map_named(masters.get, params))
    inner_state = pytrees.sharded_like(inner_state, params)
  return DeltaBitsState(
    formats=formats.marked(params),
    step=jnp.zeros([], jnp.int32),
    key=seed,
    residuals=pytrees.map_named(lambda name, _: residuals.get(name), params),
    inner_state=inner_state,
  )


def _composed(inner, update_dtype, session, updates, state, params, extra_args):
  """Updates inner on the master weights, then moves each weight: (updates, state)."""
  formats = state.formats
  weights_by_name = pytrees.named_leaves(params)
  residuals = check_residuals(state.residuals, weights_by_name, formats)
  grads_by_name = pytrees.named_leaves(updates)

  def master(name, leaf):
    fmt = formats.get(name)
    return leaf if fmt is None else merge(leaf, residuals.get(name), fmt)

  def wide(name, g):
    return g if formats.get(name) is None else jnp.asarray(g).astype(jnp.float32)

  inner_updates, inner_state = inner.update(
    pytrees.map_named(wide, updates),
    state.inner_state,
    pytrees.map_named(master, params),
    **extra_args,
  )
  next_step = state.step + was_taken(state.inner_state, inner_state)
  streams = leaf_streams(state.key, next_step, formats.by_name)
  new_residuals = {}

  def land(name, u):
    fmt = formats.get(name)
    if fmt is None:
      return u
    low, u = weights_by_name[name], u.astype(jnp.float32)
    new_low, residual = _apply(low, residuals.get(name), u, fmt, streams[name])
    if session is not None:
      new_residuals[name] = residual
      return sessions.Landed(new_low, session)
    dtype = jnp.result_type(grads_by_name[name]) if update_dtype == "gradient" else update_dtype
    u, new_residuals[name] = _land(low, new_low, residual, fmt, dtype)
    return u

  new_updates = pytrees.map_named(land, inner_updates)
  new_state = DeltaBitsState(
    formats=formats,
    step=next_step,
    key=state.key,
    residuals=pytrees.map_named(lambda name, _: new_residuals.get(name), params),
    inner_state=inner_state,
  )
  return new_updates, new_state


# jit traces leaves of one shape and format once.
# XLA fuses the update's arithmetic into the split; before a kernel, it would write the update.
_apply = jax.jit(functools.partial(apply_update_stream, implementation="xla"), static_argnums=3)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _land(low, new_low, residual, fmt: DeltaFormat, dtype):
  """The update from low to new_low, and the residual of the weight that it reaches."""

  def land(low, new_low, residual):
    delta = packing.unpack(residual, low.shape, fmt)
    update, delta = arithmetic.land_values(low, new_low, delta, fmt, dtype)
    return update, packing.pack(delta, fmt)

  return sharded.automatic(land, low, low, new_low, residual)


def _columns(pairs, fmt):
  """(leaf, words) pairs as the first arguments of ``split_leaves``."""
  leaves, words = zip(*pairs, strict=True)
  return list(leaves), fmt, list(words)


def _check_update_dtype(update_dtype):
  if update_dtype == "gradient":
    return
  try:
    is_float32 = jnp.dtype(update_dtype) == jnp.float32
  except TypeError:
    is_float32 = False
  if not is_float32:
    raise ValueError(f'update_dtype must be jnp.float32 or "gradient"; got {update_dtype!r}.')


_warned: contextvars.ContextVar[list | None] = contextvars.ContextVar("warned", default=None)


@contextlib.contextmanager
def warning_once():
  """A context in which float32 leaves cause one warning, though several members see them."""
  token = _warned.set([])
  try:
    yield
  finally:
    _warned.reset(token)


def _formats_for(weights, params, *, converting: bool) -> Formats:
  """The formats of the leaves that get one; checks each leaf's dtype."""
  find = weights if callable(weights) else _prefix_lookup(weights, params)
  table, left = [], []
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = pytrees.name_of(path)
    if converting:
      _check_number(name, leaf)
    fmt = _parse(find(path, leaf), name)
    if pytrees.is_half(leaf) and leaf.dtype != fmt.dtype:
      raise TypeError(
        f"params{name} is {leaf.dtype}, but its format {fmt.name} is for {fmt.dtype}; pass the"
        " matching format in weights=, or float32 parameters to lowmem.init."
      )
    if fmt.is_full_precision:
      continue
    is_float32 = jnp.result_type(leaf) == jnp.float32
    if pytrees.is_half(leaf) or (converting and is_float32):
      table.append((name, fmt))
    elif is_float32:
      left.append((name, fmt.name))
  seen = _warned.get()
  if left and not seen:
    if seen is not None:
      seen.append(left)
    (name, fmt_name), *others = left
    warnings.warn(
      f"params{name} is float32 and stays so{f' (and {len(others)} more)' if others else ''}: its"
      f" format {fmt_name} saves nothing, because tx.init converts no weights. Call"
      " params, opt_state = lowmem.init(tx, params) instead (or lowmem.TrainState.create,"
      ' lowmem.nnx.Optimizer); or pass weights="fp32" for leaves that are to stay float32.',
      UserWarning,
      stacklevel=5,
    )
  return Formats(tuple(table))


def _check_number(name: str, leaf):
  """Raises for a leaf that only looks like a float32 array."""
  if isinstance(leaf, float) and not hasattr(leaf, "dtype"):
    raise TypeError(
      f"params{name} is the Python float {leaf!r}, not an array. Write jnp.float32({leaf!r}) to"
      " train it, or keep it out of params."
    )
  dtype = getattr(leaf, "dtype", None)
  if dtype == np.float64 and jnp.result_type(leaf) == jnp.float32:
    raise TypeError(
      f"params{name} is a NumPy array of float64, which JAX would round to float32 in silence."
      " Write x.astype(np.float32), or enable jax_enable_x64 to keep float64."
    )


def _parse(spec, name: str) -> DeltaFormat:
  """The format that ``weights=`` gives; an error names the leaf."""
  try:
    return DeltaFormat.parse(spec)
  except (TypeError, ValueError) as error:
    where = "" if name == "params" else f"weights= for {name}: "
    raise type(error)(f"{where}{error}") from None


def _prefix_lookup(weights, params) -> Callable[[Any, Any], DeltaFormat]:
  """A function that looks up a leaf's format in a pytree prefix of the parameters."""
  prefix = dict(jax.tree_util.tree_leaves_with_path(weights))

  def find(path, leaf):
    del leaf
    if (found := pytrees.prefix_in(path, prefix)) is None:
      raise ValueError(
        f"weights= has no format for params{pytrees.name_of(path)}. Give it one, such as"
        ' "bf16+8", or "fp32" to leave it alone.'
      )
    return prefix[found]

  # An entry may be for a leaf, for an empty node (None, MaskedNode), or for anything below one.
  nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: not jax.tree.leaves(x))
  used = {pytrees.prefix_in(path, prefix) for path, _ in nodes}
  empty = {path for path, node in nodes if not jax.tree.leaves(node)}
  for path in prefix:
    if path not in used and pytrees.prefix_in(path, empty) is None:
      raise ValueError(
        f"weights= has a format for {pytrees.name_of(path)}, which params do not have."
      )
  return find


def _zeros(leaf, fmt: DeltaFormat) -> jax.Array:
  """A residual of zeros for a half-precision leaf, sharded like the leaf."""

  def zeros(leaf):
    return packing.pack(sharded.like(jnp.zeros(leaf.shape, jnp.int32), leaf), fmt)

  return sharded.automatic(zeros, leaf, leaf)


def _refuse_half_hyperparameters(inner: optax.GradientTransformation):
  """Raises if inner closes over a traced half-precision scalar.

  ``optax.inject_hyperparams`` casts hyperparameters to the parameters' dtype, and
  bfloat16 rounds b2 = 0.999 to 1.
  """
  seen: set[int] = set()
  pending: list[Any] = [inner.init, inner.update]
  while pending:
    x = pending.pop()
    if id(x) in seen:
      continue
    seen.add(id(x))
    if isinstance(x, jax.core.Tracer):
      if jnp.ndim(x) == 0 and pytrees.is_half(x):
        raise ValueError(
          f"A hyperparameter arrives as a traced {x.dtype} value, which rounds b2 = 0.999 to 1."
          " Pass hyperparam_dtype=jnp.float32 to optax.inject_hyperparams."
        )
    elif isinstance(x, functools.partial):
      pending += [x.func, *x.args, *x.keywords.values()]
    elif isinstance(x, (tuple, list)):
      pending += x
    elif isinstance(x, dict):
      pending += x.values()
    elif callable(x):
      for cell in getattr(x, "__closure__", None) or ():
        try:
          pending.append(cell.cell_contents)
        except ValueError:  # an empty cell
          pass
