"""The states of our transformations, which checkpoints hold, and functions that they share."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_lowmem.trees import pytrees
from optax_lowmem.trees.formats import Formats
from pallas_kernels.formats.random_bits import leaf_id, stream_keys
from pallas_kernels.operations import checks


class DeltaBitsState(NamedTuple):
  """The state of :func:`optax_lowmem.delta_bits`.

  Attributes:
    formats: the formats by leaf name. They are static except for a uint32 scalar,
      whose name in the tree spells them, so a restore into other formats fails.
    step: int32 scalar, the number of updates so far, which selects the random
      bits.
    key: uint32 [2], raw key data.
    residuals: the residuals in the tree of the parameters, each packed as in
      ``pallas_kernels.formats.packing``; None for a leaf without a format or
      residual bits.
    inner_state: the state of the wrapped transformation, for float32 masters.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> params, opt_state = lowmem.init(lowmem.adamw(1e-3), {"w": jnp.ones((4, 32))})
    >>> isinstance(opt_state, lowmem.DeltaBitsState)
    True
    >>> print(opt_state.residuals["w"].dtype, opt_state.step)
    int8 0
  """

  formats: Formats  # first, so a leaf-by-leaf comparison of trees reports it first
  step: jax.Array
  key: jax.Array
  residuals: Any
  inner_state: Any

  @property
  def b1(self):
    """That of an ``optax.contrib.ScheduleFreeState`` inside.

    ``optax.contrib.schedule_free_eval_params`` reads ``b1`` and ``z`` of the state that
    it is given.
    """
    return _inside(self).b1

  @property
  def z(self):
    """The sequence z of an ``optax.contrib.ScheduleFreeState`` inside, as ``b1``."""
    return _inside(self).z


class QuantizedState(NamedTuple):
  """The state of :func:`optax_lowmem.quantize_state`.

  Attributes:
    formats: the statistics' formats by leaf name, static except for a scalar as in
      :class:`optax_lowmem.DeltaBitsState`.
    step: int32 scalar, the number of updates so far, which selects the random
      bits.
    key: uint32 [2], raw key data.
    inner_state: the state of the wrapped transformation; its statistics are stored
      as in ``pallas_kernels.formats.state_formats``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_lowmem as lowmem
    >>> opt_state = lowmem.quantize_state(optax.adam(1e-3)).init({"w": jnp.ones((4, 32))})
    >>> isinstance(opt_state, lowmem.QuantizedState)
    True
    >>> print(opt_state.inner_state[0].mu["w"].codes.dtype)
    int8
  """

  formats: Formats
  step: jax.Array
  key: jax.Array
  inner_state: Any


class LossScaleState(NamedTuple):
  """The state of a loss scale.

  :func:`optax_lowmem.dynamic_loss_scale` and :func:`optax_lowmem.static_loss_scale`
  share it.

  Attributes:
    scale: float32 scalar, the factor for the next loss.
    growth_count: int32 scalar, the finite steps since the scale last changed.
    skipped: int32 scalar, the steps skipped so far.
    skipped_in_a_row: int32 scalar, the steps skipped since the last finite one.
    inner_state: the state of the wrapped transformation.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.dynamic_loss_scale(lowmem.adamw(1e-3, weights="fp16+8"))
    >>> params, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
    >>> overflow = {"w": jnp.full((4, 32), jnp.inf, jnp.float16)}
    >>> params, opt_state = lowmem.step(tx, overflow, opt_state, params)
    >>> print(opt_state.scale, opt_state.skipped)
    16384.0 1
  """

  scale: jax.Array
  growth_count: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array
  inner_state: Any


class EmaState(NamedTuple):
  """The state of :func:`optax_lowmem.ema`.

  Attributes:
    formats: the formats by leaf name, as in :class:`optax_lowmem.DeltaBitsState`.
    count: int32 scalar, the number of updates so far, which selects the random
      bits.
    key: uint32 [2], raw key data.
    ema: the sums in the tree of the parameters, each leaf in its format.
    residuals: the residuals of the sums, packed like those of weights; None for a
      leaf without one.
    correction: float32 scalar, the divisor of the sums: ``1 - decay**count``, or 1
      with ``debias=False``.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> average = lowmem.ema(0.9)
    >>> _, state = average.update({"w": jnp.ones(32)}, average.init({"w": jnp.ones(32)}))
    >>> print(state.count, f"{state.correction:.1f}", state.ema["w"].dtype)
    1 0.1 bfloat16
  """

  formats: Formats
  count: jax.Array  # type: ignore[assignment] # Optax's name, and a method of tuples
  key: jax.Array
  ema: Any
  residuals: Any
  correction: jax.Array


def _inside(state):
  """The state of Optax's own transformation inside ours."""
  while isinstance(state, _STATES):
    state = state.inner_state
  return state


_STATES = (DeltaBitsState, QuantizedState, LossScaleState)
_UNPACK = "Unpack what lowmem.init returns: params, opt_state = lowmem.init(tx, params32)."


def first_state(tree) -> tuple[str, str] | None:
  """(name, type) of the first state of ours in a tree; None without one."""
  is_ours = lambda x: isinstance(x, _STATES)
  nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_ours)
  named = ((jax.tree_util.keystr(path), type(x).__name__) for path, x in nodes if is_ours(x))
  return next(named, None)


def refuse_state(tree, what: str, call: str):
  """Raises if gradients or parameters hold an optimizer state: a pair, or swapped arguments."""
  found = first_state(tree)
  if found is None:
    return
  name, kind = found
  way_out = _UNPACK if _is_pair(tree) else f"The order is {call}."
  raise TypeError(f"{what}{name} is a {kind}, an optimizer state. {way_out}")


def check_state(state, kind: type, member: str):
  """Raises if a member of ours receives another state than its own."""
  if isinstance(state, kind):
    return
  found = first_state(state)
  holds = "" if found is None else f" with a {found[1]} at {found[0]}"
  if _is_pair(state):
    way_out = _UNPACK
  elif found is None:
    way_out = (
      "The order is tx.update(grads, opt_state, params) and lowmem.step(tx, grads, opt_state,"
      " params); opt_state comes from lowmem.init(tx, params32)."
    )
  else:
    way_out = "Pass the state that lowmem.init made for this tx."
  raise TypeError(
    f"{member} takes a {kind.__name__} as its state, and got a {type(state).__name__}{holds}."
    f" {way_out}"
  )


def _is_pair(x) -> bool:
  """Whether x looks like ``(params, opt_state)``."""
  is_plain = type(x) in (tuple, list) and len(x) == 2
  return is_plain and first_state(x[0]) is None and first_state(x[1]) is not None


def leaf_streams(
  words, step, names: Iterable[str], micro_batch: jax.typing.ArrayLike = 0
) -> dict[str, jax.Array]:
  """The words of each leaf's random stream at a step, uint32 [2] by name."""
  names = sorted(names)
  if not names:
    return {}
  keys = stream_keys(words, step, [leaf_id(name) for name in names], micro_batch)
  # Without the barrier, XLA fuses keys[i] into the leaf's program, and i makes each program unique.
  words = jax.lax.optimization_barrier([keys[i] for i in range(len(names))])
  return dict(zip(names, words, strict=True))


def check_residuals(residuals, weights_by_name, formats: Formats) -> dict[str, jax.Array]:
  """The residuals by leaf name, each checked against its weight."""
  by_name = pytrees.named_leaves(residuals)
  for name, leaf in weights_by_name.items():
    fmt = formats.get(name)
    if fmt is None:
      if pytrees.is_half(leaf):
        raise TypeError(
          f"params{name} is {leaf.dtype}, but it was float32 and had no format when the state was"
          " made. Make the state with lowmem.init(tx, params32), or after casting."
        )
      continue
    if jnp.result_type(leaf) == jnp.float32:
      raise TypeError(
        f"params{name} is float32, but its format {fmt.name} stores {fmt.dtype}. Adding float32"
        " updates without a cast widens weights (eqx.apply_updates does): use optax.apply_updates"
        ' or lowmem.step, or pass update_dtype="gradient" to the transformation.'
      )
    checks.residual(leaf, by_name.get(name), fmt, f"params{name}")
  for name, _ in formats.table:
    if name not in weights_by_name:
      raise ValueError(
        f"The state holds a residual for params{name}, but params lack that leaf. Pass the params"
        " that belong to the state, as lowmem.init or the last step returned them."
      )
  return by_name


def was_taken(old_inner, new_inner) -> jax.Array | int:
  """1, or 0 if a loss scale inside skipped the step; a skipped step uses no random bits."""
  skips = [
    new.skipped != old.skipped
    for old, new in zip(
      pytrees.find_states(old_inner, LossScaleState),
      pytrees.find_states(new_inner, LossScaleState),
      strict=True,
    )
  ]
  if not skips:
    return 1
  return 1 - jnp.any(jnp.stack(skips)).astype(jnp.int32)
