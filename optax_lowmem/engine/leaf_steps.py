"""leaf_steps: steps the leaves of an elementwise optimizer, alone or with others of their kind.

``lowmem.step`` steps all of them at once. A gradient-releasing backward pass steps
each leaf when its gradient is ready. The state is that of
``delta_bits(quantize_state(optax.X))``. The mathematics is Optax's: ``update`` of one
bare array is the rule that ``pallas_kernels.fused_update`` applies to a leaf, or a
kernel to a tile of it.
"""

from collections.abc import Iterator, Mapping
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowmem.engine import matrix_steps
from optax_lowmem.engine.matrix_steps import Axes
from optax_lowmem.engine.optimizer import OTHER_STATE, Kind, Optimizer, RuleKind
from optax_lowmem.engine.portable import portable_update
from optax_lowmem.states import (
  DeltaBitsState,
  LossScaleState,
  QuantizedState,
  check_residuals,
  leaf_streams,
)
from optax_lowmem.trees import pytrees
from optax_lowmem.trees.formats import Formats
from pallas_kernels import DeltaFormat
from pallas_kernels.formats.state_formats import Blocks, StateFormat
from pallas_kernels.placement import implementations
from pallas_kernels.programs.hoist import Hoisted
from pallas_kernels.programs.leaf import Leaf, is_small
from pallas_kernels.programs.tiles import is_in_blocks

_HALF_STATISTICS = (
  "Statistics that Optax stores in half precision (mu_dtype, accumulator_dtype) cannot be stepped"
  " leaf by leaf; pass mu= or accumulator= instead."
)


class _Place(NamedTuple):
  """The role of a leaf in the optimizer's state.

  Attributes:
    path: for a statistic of a parameter with a weight format, its path in the state
      of one bare array; for any other leaf, its own path.
    parameter: the name of that parameter, or None for any other leaf.
    format: the format of the statistic.
  """

  path: tuple
  parameter: str | None = None
  format: StateFormat = StateFormat("fp32")


class Gradient(NamedTuple):
  """The gradient for a leaf's step.

  Attributes:
    value: the array; for a stack of layers, the gradient of one layer.
    factor: a float32 scalar to multiply it by, or None.
    implementation: as in ``pallas_kernels.fused_update``.
    is_copied: whether a kernel needs a copy of it that XLA's own passes do not.
  """

  value: jax.Array
  factor: jax.Array | None = None
  implementation: implementations.Implementation | None = None
  is_copied: bool = False


class Stored(NamedTuple):
  """The stored parts of a leaf: its weight, its residual, its statistics in order."""

  low: jax.Array
  residual: jax.Array | None
  statistics: tuple[Any, ...]


class LeafSteps:
  """One step of an optimizer, leaf by leaf.

  Attributes:
    held: the formats of the leaves that are stepped leaf by leaf.
    stored: these leaves before the step, by name.
    old_rest: the state from which ``step_rest`` starts.
  """

  @classmethod
  def of(cls, optimizer: Optimizer, state, params, like) -> "LeafSteps | None":
    """Reads a ``DeltaBitsState`` or a ``QuantizedState``.

    Args:
      optimizer: the optimizer of the state.
      state: the state.
      params: the parameters.
      like: the tree on which a callable mask is evaluated.

    Returns:
      The steps; None if only the composed transformation can step.

    Raises:
      ValueError: if the state does not belong to the optimizer, or not to an
        elementwise one.
    """
    delta, quantized, inner_state = parts = _parts(state)
    if optimizer.is_declared and _wrapper_in(inner_state) is not None:
      return None
    optimizer.check_declaration(params)
    weights = pytrees.named_leaves(params)
    held = _held(optimizer, delta, weights)
    one = _init_one(optimizer, weights)
    own = {path for path, _ in _leaves(one)} if optimizer.is_layerwise else set()
    places = _places(quantized, inner_state, params, held, own)
    if places is None:
      return None
    return cls(optimizer, state, params, like, parts, weights, held, places, one)

  def __init__(
    self, optimizer: Optimizer, state, params, like, parts, weights, held: Formats, places, one
  ):
    """Called by ``of``, with what it has read of the state and the parameters."""
    self._optimizer, self._state, self._params, self._like = optimizer, state, params, like
    self._delta, self._quantized, inner_state = parts
    self.held, self._places = held, places
    residuals = {}
    if self._delta is not None:
      residuals = check_residuals(self._delta.residuals, weights, self._delta.formats)
    leaves, self._treedef = jax.tree.flatten(inner_state, is_leaf=_is_blocks)
    kept = [optax.MaskedNode() if p.parameter else x for p, x in zip(places, leaves, strict=True)]
    self.old_rest = jax.tree.unflatten(self._treedef, kept)
    self._one = one
    fixed = dict(_leaves(self._one))
    self._scalars = [x for path, x in _leaves(self.old_rest) if path in fixed]
    self._step = state.step + 1
    self._of: dict[str, list[_Place]] = {name: [] for name in self.held.by_name}
    statistics: dict[str, list[Any]] = {name: [] for name in self._of}
    # The statistics of a parameter's shape come first, as quantize_state numbers them.
    for place, leaf in sorted(
      zip(places, leaves, strict=True),
      key=lambda x: bool(x[0].parameter) and not _is_like(weights[x[0].parameter], x[1]),
    ):
      if place.parameter:
        self._of[place.parameter].append(place)
        statistics[place.parameter].append(leaf)
    if any(len(self._scalars) + len(of) != len(fixed) for of in self._of.values()):
      raise ValueError(OTHER_STATE)
    self.stored = {
      name: Stored(weights[name], residuals.get(name), tuple(values))
      for name, values in statistics.items()
    }

  @functools.cached_property
  def _mask(self) -> tuple[Any, dict[str, bool]]:
    """The weight-decay mask as Optax takes it, and by leaf name."""
    return _evaluated(self._optimizer.mask, self._like, self.held)

  @property
  def has_narrow_statistics(self) -> bool:
    """Whether a statistic is stored in fewer bits than float32."""
    return any(place.format.name != "fp32" for of in self._of.values() for place in of)

  def step(
    self,
    stored: Mapping[str, Stored],
    gradients: Mapping[str, Gradient],
    taken: jax.Array | None = None,
    index: jax.Array | None = None,
    micro_batch: jax.Array | None = None,
    lands: bool = False,
  ) -> dict[str, Stored]:
    """Steps the leaves that have a gradient.

    Args:
      stored: leaves by name.
      gradients: gradients by name; all their factors are the same scalar.
      taken: a bool scalar, or None. If it is False, nothing changes.
      index: the layer of the stacked leaves to which the gradients belong, or None.
      micro_batch: the number of a micro-batch, from 1, or None. With a number, the
        gradients enter the statistics alone.
      lands: whether ``optax.apply_updates`` must reach the new weights, by updates of
        ``pallas_kernels.formats.arithmetic.landing_update``.

    Returns:
      stored, with the new parts of the leaves that have a gradient.
    """
    names = list(gradients)
    part = 0 if micro_batch is None else micro_batch
    streams = leaf_streams(self._state.key, self._step, names, part)
    if self._optimizer.is_declared and self._delta is not None and self._quantized is not None:
      own = leaf_streams(self._quantized.key, self._quantized.step + 1, names, part)
      streams = {name: jnp.concatenate([streams[name], own[name]]) for name in names}
    kinds = {name: self._kind(name, gradients[name], micro_batch is not None) for name in names}
    new = dict(stored)
    if self._optimizer.is_layerwise:
      for name in names:
        (g, factor, *_), (low, residual, statistics) = gradients[name], stored[name]
        leaf = Leaf(g, low, residual, list(statistics), streams[name])
        if index is not None:
          self._check_stack(name, leaf)
        low, residual, statistics = self._optimizer.step_layer(
          kinds[name], leaf, self._scalars, factor, taken, index, lands=lands
        )
        new[name] = Stored(low, residual, tuple(statistics))
      return new
    if self._optimizer.matrices is not None and micro_batch is None:
      for name in names:
        leaf = Leaf(gradients[name].value, *stored[name][:2], list(stored[name][2]), streams[name])
        new[name] = self._step_matrix(
          name, kinds[name], leaf, gradients[name].factor, taken, index, lands
        )
      return new
    rules: dict[RuleKind, tuple[Hoisted, list[jax.Array]]] = {}
    shapes = {name: g.value.shape for name, g in gradients.items()}
    largest = max(shapes.values(), key=math.prod, default=())
    for kind, group in _groups(shapes, kinds):
      leaves = [
        Leaf(gradients[name].value, *x[:2], list(x.statistics), streams[name])
        for name, x in ((name, stored[name]) for name in group)
      ]
      if kind.rule not in rules:
        factor = gradients[group[0]].factor
        rules[kind.rule] = self._optimizer.rule(kind.rule, largest, self._scalars, factor)
      rule, scalars = rules[kind.rule]
      results = self._optimizer.step_group(rule, kind, leaves, scalars, taken, index, lands=lands)
      for name, (low, residual, statistics) in zip(group, results, strict=True):
        new[name] = Stored(low, residual, tuple(statistics))
    return new

  def _check_stack(self, name: str, leaf: Leaf):
    """Raises if the state of a stack is not the state of each of its layers."""
    of_layer = dict(_leaves(_init_one(self._optimizer, {name: leaf.gradient})))
    for place, x in zip(self._of[name], leaf.statistics, strict=True):
      wanted = (len(leaf.low), *of_layer[place.path].shape)
      if not isinstance(x, Blocks) and x.shape != wanted:
        raise ValueError(
          f"loss_fn scans over the first axis of params{name}, of shape {leaf.low.shape}, but the"
          f" optimizer's state{pytrees.name_of(place.path)} for it has the shape {x.shape} instead"
          f" of {wanted}: it is not layerwise on stacks. Give each layer a leaf of its own."
        )

  @functools.cached_property
  def _axes(self) -> dict[str, Axes]:
    """The axes of each matrix, by leaf name."""
    assert self._optimizer.matrices is not None
    return self._optimizer.matrices.axes(self._params)

  def _step_matrix(self, name: str, kind: Kind, leaf: Leaf, factor, taken, index, lands):
    optimizer, axes = self._optimizer, self._axes[name]
    assert optimizer.matrices is not None
    if index is not None and not axes.is_stack:
      raise ValueError(
        f"params{name} of shape {leaf.low.shape} is one matrix for lowmem.muon, but loss_fn scans"
        " over its first axis. Give it None in muon_weight_dimension_numbers, and AdamW steps it."
      )
    ahead = kind.rule._replace(matrix_rule="ahead")
    update = RuleKind(kind.rule.decays, (), is_scaled=True, folds=False, matrix_rule="update")
    scale = optimizer.matrices.scale(leaf.low.shape, axes)
    pairs = [
      optimizer.rule(of, leaf.gradient.shape, self._scalars, by)
      for of, by in (
        (ahead, factor),
        (ahead._replace(matrix_rule="momentum"), factor),
        (update, scale),
      )
    ]
    programs, numbers = zip(*pairs, strict=True)
    state = matrix_steps.state_of(self._one, self._scalars)
    low, residual, statistics = optimizer.step_matrix(
      programs, kind, axes, leaf, state[0].ns_coeffs, numbers, taken, index, lands=lands
    )
    return Stored(low, residual, tuple(statistics))

  def _kind(self, name: str, gradient: Gradient, folds: bool) -> Kind:
    places, is_scaled = self._of[name], gradient.factor is not None
    paths = tuple(place.path for place in places)
    return Kind(
      RuleKind(self._mask[1].get(name), paths, is_scaled, folds),
      self.held.get(name),
      tuple(place.format for place in places),
      jnp.result_type(gradient.value),
      gradient.implementation,
      gradient.is_copied,
    )

  def step_rest(self, updates):
    """Steps counters and leaves without a format as Optax does: (updates, state)."""
    inner = self._optimizer.make(self._mask[0])
    args = self._rest(updates), self.old_rest, self._rest(self._params)
    if self._optimizer.is_layerwise:
      return _update_of_counters(inner, *args)
    if self._optimizer.matrices is not None:
      return inner.update(*args)
    return portable_update(inner, *args)

  def _rest(self, tree):
    return pytrees.map_named(lambda name, x: optax.MaskedNode() if self.held.get(name) else x, tree)

  def state(self, stored: Mapping[str, Stored], rest, taken: jax.Array | None = None):
    """The new state, from the leaves and from the state that ``step_rest`` returned."""
    others = iter(jax.tree.leaves(rest))
    values = {
      place: value
      for name, x in stored.items()
      for place, value in zip(self._of[name], x.statistics, strict=True)
    }
    leaves = [values[place] if place.parameter else next(others) for place in self._places]
    state = jax.tree.unflatten(self._treedef, leaves)
    more = 1 if taken is None else taken.astype(jnp.int32)
    if self._quantized is not None:
      state = self._quantized._replace(step=self._quantized.step + more, inner_state=state)
    if self._delta is None:
      return state
    residuals = {name: x.residual for name, x in stored.items()}
    return self._delta._replace(
      step=self._delta.step + more,
      residuals=pytrees.map_named(lambda name, _: residuals.get(name), self._params),
      inner_state=state,
    )


def _parts(state):
  """The states of delta_bits and of quantize_state, None if absent, and the one inside them."""
  delta = state if isinstance(state, DeltaBitsState) else None
  state = state if delta is None else delta.inner_state
  quantized = state if isinstance(state, QuantizedState) else None
  return delta, quantized, state if quantized is None else quantized.inner_state


# A leaf's step cannot look through these states: they hold masks, or statistics in our formats.
_WRAPPERS = (
  optax.MaskedState, optax.PartitionState, optax.MultiStepsState, optax.ApplyIfFiniteState,
  QuantizedState, DeltaBitsState, LossScaleState,
)  # fmt: skip


def _wrapper_in(inner_state) -> str | None:
  """The type name of a state that a leaf's step cannot look through, or None."""
  nodes = jax.tree.leaves(inner_state, is_leaf=lambda x: isinstance(x, _WRAPPERS))
  return next((type(x).__name__ for x in nodes if isinstance(x, _WRAPPERS)), None)


def why_composed(state) -> str:
  """The reason why ``LeafSteps.of`` returned None."""
  wrapper = _wrapper_in(_parts(state)[2])
  if wrapper is None:
    return _HALF_STATISTICS
  return (
    f"The optimizer is declared elementwise or layerwise, but has a {wrapper} inside. A mask"
    " selects whole leaves (lowmem.adamw and lion take mask=). Put quantize_state directly inside"
    " delta_bits, with the same declaration in both, and a loss scale around them."
  )


def _held(optimizer: Optimizer, delta, weights) -> Formats:
  """The formats of the leaves that are stepped leaf by leaf."""
  table = [] if delta is None else list(delta.formats.table)
  if optimizer.is_declared:
    known = dict(table)
    for name, x in weights.items():
      if name not in known and pytrees.is_half(x):
        raise ValueError(
          f"params{name} is {x.dtype} and has no weight format. Wrap tx in lowmem.delta_bits."
        )
      if name not in known and getattr(x, "dtype", None) == jnp.float32:
        table.append((name, DeltaFormat.parse("fp32")))
  return Formats(tuple(table))


def _evaluated(mask, like, held):
  """A mask as Optax takes it, and by leaf name."""
  if callable(mask):  # like an inner transformation, it sees float32 leaves
    mask = mask(
      pytrees.map_named(lambda name, x: x.astype(jnp.float32) if held.get(name) else x, like)
    )
  if mask is None:
    return None, {}
  # The mask may be a prefix.
  spread = jax.tree.map(lambda m, x: jax.tree.map(lambda _: bool(m), x), mask, like)
  return mask, pytrees.named_leaves(spread)


def _groups(shapes, kinds: dict[str, Kind]) -> Iterator[tuple[Kind, list[str]]]:
  """(kind, names) of the leaves that are stepped together: all small ones of a kind.

  Leaves with rows of whole blocks form a group of their own, because a kernel takes
  them on a mesh, too.
  """
  small: dict[tuple[Kind, bool], list[str]] = {}
  for name, kind in kinds.items():
    if is_small(shapes[name]):
      small.setdefault((kind, is_in_blocks(shapes[name])), []).append(name)
    else:
      yield kind, [name]
  for (kind, _), names in small.items():
    yield kind, names


def _is_blocks(x) -> bool:
  return isinstance(x, Blocks)


def _leaves(tree):
  return jax.tree_util.tree_leaves_with_path(tree)


def _update_of_counters(inner, *args):
  """``inner.update`` of a tree without the leaves that are stepped one by one."""
  try:
    return inner.update(*args)
  except Exception as error:
    raise ValueError(
      "The optimizer is declared layerwise, but cannot update its counters without its leaves."
      " Leave the declaration out."
    ) from error


def _init_one(optimizer: Optimizer, weights):
  """The state of one bare array, as structs."""
  one = optimizer.make(None if optimizer.mask is None else True)
  shape = jnp.shape(next(iter(weights.values()), 0.0)) if optimizer.is_layerwise else ()
  return jax.eval_shape(one.init, jax.ShapeDtypeStruct(shape, jnp.float32))


def _is_like(weight, leaf) -> bool:
  """Whether a statistic has the parameter's shape."""
  return _is_blocks(leaf) or jnp.shape(leaf) == jnp.shape(weight)


def _places(quantized, inner_state, params, held: Formats, own: set) -> list[_Place] | None:
  """The places of the leaves in inner's state; None if the composed path must step.

  ``own`` has the paths in the state of one bare array, if statistics may have any shape.
  """
  weights = dict(_leaves(params))
  places = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(inner_state, is_leaf=_is_blocks):
    start = pytrees.owner(path, weights)
    weight = None if start is None else weights[path[start:]]
    known = None if quantized is None else quantized.formats.get(pytrees.name_of(path))
    is_statistic = known or (
      weight is not None
      and (path[:start] in own or jnp.shape(leaf) == weight.shape)
      and pytrees.is_inexact(leaf)
    )
    if not is_statistic or not held.get(pytrees.name_of(path[start:])):
      places.append(_Place(path))
    elif known is None and leaf.dtype != jnp.float32:
      return None
    else:
      fmt = known.format if known else StateFormat("fp32")
      places.append(_Place(path[:start], pytrees.name_of(path[start:]), fmt))
  return places
