"""The in-place path of adamw, adam, lion and sgd: a leaf's step in one operation.

The state is that of `delta_bits(quantize_state(optax.X))`, which also does what
this path does not: `tx.update`, and statistics that Optax stores in its own way
(`mu_dtype`). The mathematics is Optax's, too: `optax.X.update` of one bare
array is the rule that `pallas_kernels.fused_update` applies to a leaf, or a
kernel to a tile of it.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowmem import _session, _tree
from optax_lowmem._delta_bits import Weights, _check_residuals, _streams, delta_bits
from optax_lowmem._quantize_state import owner, quantize
from pallas_kernels import launch
from pallas_kernels.fused_update import Leaf, fused_update_leaves, is_small
from pallas_kernels.state_formats import Blocks, StateFormat


class _Place(NamedTuple):
  """What a leaf of the optimizer's state is.

  Attributes:
    path: where it stands in the state of one bare array (of another parameter
      and without a weight format: where it stands).
    parameter: the name of the parameter with a weight format whose statistic
      it is, or None.
    format: the statistic's.
  """

  path: tuple
  parameter: str | None = None
  format: StateFormat = StateFormat("fp32")


def fused(
  make: Callable[[Any], optax.GradientTransformation],
  mask,
  weights: Weights,
  formats: dict[str, str | None],
  key,
  implementation: launch.Implementation | None,
) -> optax.GradientTransformationExtraArgs:
  """`delta_bits(quantize_state(make(mask)))` with a step of its own.

  Args:
    make: weight-decay mask (None, a tree of bools, one bool) -> Optax's
      transformation, which is elementwise.
    mask: None, a tree of bools or a prefix of it, or a callable of params.
    weights: formats of the weights, as `delta_bits` takes them.
    formats: formats of the statistics by field, as `quantize` takes them.
    key: an integer seed or a `jax.random` key.
    implementation: as `pallas_kernels.fused_update` takes it.

  Returns:
    The transformation.
  """
  launch.check_name(implementation)
  composed = delta_bits(
    quantize(make(mask), formats, "bf16", key, only_held=True), weights, key=key
  )

  # Under jit, so that groups of one kind are traced once.
  @functools.partial(jax.jit, static_argnums=0)
  def step_group(kind, leaves, scalars, taken, scale):
    inner, paths = make(kind.decays), [path for path, _ in kind.statistics]

    def rule(g, w, values):
      struct = jax.eval_shape(inner.init, jax.ShapeDtypeStruct(w.shape, w.dtype))
      values, others = dict(zip(paths, values, strict=True)), iter(scalars)
      state = [values[path] if path in values else next(others) for path, _ in _leaves(struct)]
      state = jax.tree.unflatten(jax.tree.structure(struct), state)
      update, state = inner.update(g if scale is None else g * scale, state, w)
      new = dict(_leaves(state))
      # A float64 learning rate makes float64 of them.
      return update.astype(w.dtype), [new[path].astype(w.dtype) for path in paths]

    formats = [fmt for _, fmt in kind.statistics]
    return fused_update_leaves(rule, leaves, kind.weight, formats, taken, kind.implementation)

  def update_fn(updates, state, params=None, **extra_args):
    session = _session.current(_session.StepSession)
    places = None if session is None else _places(state, params)
    if session is None or places is None:
      if session is not None and implementation == "mosaic_gpu":
        raise ValueError(
          'implementation="mosaic_gpu" takes statistics in formats of ours; give mu= or'
          " accumulator= in the place of mu_dtype or accumulator_dtype."
        )
      return composed.update(updates, state, params, **extra_args)
    _tree.check_gradients(updates, params)
    held, quantized = state.formats, state.inner_state
    weights_by_name, gradients = _tree.named_leaves(params), _tree.named_leaves(updates)
    residuals = _check_residuals(state.residuals, weights_by_name, held)
    masks, decays = _evaluated(mask, updates, held)

    # Counters, and leaves without a format, are left to Optax.
    def rest(tree):
      return _tree.map_named(lambda name, x: optax.MaskedNode() if held.get(name) else x, tree)

    leaves, treedef = jax.tree.flatten(quantized.inner_state, is_leaf=_is_blocks)
    kept = [optax.MaskedNode() if p.parameter else x for p, x in zip(places, leaves, strict=True)]
    old_rest = jax.tree.unflatten(treedef, kept)
    rest_updates, new_rest = make(masks).update(rest(updates), old_rest, rest(params))

    one = make(None if mask is None else True)
    fixed = dict(_leaves(jax.eval_shape(one.init, jax.ShapeDtypeStruct((), jnp.float32))))
    scalars = [x for path, x in _leaves(old_rest) if path in fixed]
    step = state.step + 1
    streams = _streams(state.key, step, held.by_name)
    stored: dict[str, dict] = {name: {} for name in held.by_name}
    for place, leaf in zip(places, leaves, strict=True):
      if place.parameter:
        stored[place.parameter][place] = leaf

    total = sum(weights_by_name[name].size for name in held.by_name)

    def source(name):
      """The gradient to read, and what it is to be multiplied by there."""
      g = gradients[name]
      _, scaled, factor = session.scaled.get(id(g), (g, g, None))
      return (scaled, factor) if jnp.result_type(scaled).itemsize <= 4 else (g, None)

    def operands(name) -> Leaf:
      parts = jnp.asarray(source(name)[0]), weights_by_name[name], residuals.get(name)
      return Leaf(*parts, list(stored[name].values()), streams[name])

    def kind_of(name) -> _Kind:
      kinds = tuple((place.path, place.format) for place in stored[name])
      g, factor = source(name)
      # What a member in front computes (clipping) XLA fuses into its own passes; for a kernel it
      # writes a copy of the leaf's gradient, which must be a small part of all gradients.
      is_copied = id(g) not in session.given and jnp.size(g) * 16 > total
      how = "xla" if implementation is None and is_copied else implementation
      parts = decays.get(name), held.get(name), kinds, jnp.result_type(g), factor is not None
      return _Kind(*parts, how)

    new_weights, new_residuals = {}, {}
    new_statistics: dict[_Place, Any] = {}
    for kind, names in _groups(weights_by_name, {name: kind_of(name) for name in held.by_name}):
      group = list(map(operands, names))
      results = step_group(kind, group, scalars, session.taken, source(names[0])[1])
      for name, (low, residual, statistics) in zip(names, results, strict=True):
        new_weights[name], new_residuals[name] = low, residual
        new_statistics |= zip(stored[name], statistics, strict=True)
    if session.taken is not None:
      session.settled(new_weights, new_residuals, list(new_statistics.values()))

    others, updates_by_name = iter(jax.tree.leaves(new_rest)), _tree.named_leaves(rest_updates)
    new_leaves = [new_statistics[p] if p.parameter else next(others) for p in places]
    landed = {name: _session.Landed(x, session) for name, x in new_weights.items()}
    return _tree.map_named((updates_by_name | landed).get, updates), state._replace(
      step=step,
      residuals=_tree.map_named(lambda name, _: new_residuals.get(name), params),
      inner_state=quantized._replace(
        step=quantized.step + 1, inner_state=jax.tree.unflatten(treedef, new_leaves)
      ),
    )

  return optax.GradientTransformationExtraArgs(composed.init, update_fn)


def _evaluated(mask, updates, held):
  """A mask as Optax takes it, and by name of the leaf."""
  if callable(mask):  # which sees what an inner transformation sees
    mask = mask(
      _tree.map_named(lambda name, g: g.astype(jnp.float32) if held.get(name) else g, updates)
    )
  if mask is None:
    return None, {}
  # Perhaps a prefix.
  spread = jax.tree.map(lambda m, x: jax.tree.map(lambda _: bool(m), x), mask, updates)
  return mask, _tree.named_leaves(spread)


class _Kind(NamedTuple):
  """What leaves have in common that can be stepped in one kernel: static.

  Attributes:
    decays: the weight-decay mask of them, None without one.
    weight: the weights' format.
    statistics: (path, format) of the statistics, as in `_Place`.
    gradient: the gradients' dtype.
    is_scaled: whether the step is to unscale them.
    implementation: as `pallas_kernels.fused_update` takes it.
  """

  decays: bool | None
  weight: Any
  statistics: tuple
  gradient: Any
  is_scaled: bool
  implementation: launch.Implementation | None


MOST_IN_A_KERNEL = 16


def _groups(weights, kinds: dict[str, _Kind]):
  """(kind, names) of the leaves that are stepped together: small ones, some at a time."""
  small: dict[_Kind, list[str]] = {}
  for name, kind in kinds.items():
    if is_small(weights[name].shape):
      small.setdefault(kind, []).append(name)
    else:
      yield kind, [name]
  for kind, names in small.items():
    # Of one shape, if possible: a group that occurs again is not traced again.
    names.sort(key=lambda name: weights[name].shape)
    for i in range(0, len(names), MOST_IN_A_KERNEL):
      yield kind, names[i : i + MOST_IN_A_KERNEL]


def _is_blocks(x) -> bool:
  return isinstance(x, Blocks)


def _leaves(tree):
  return jax.tree_util.tree_leaves_with_path(tree)


def _places(state, params) -> list[_Place] | None:
  """What the leaves of inner's state are; None where the composed path has to do the step."""
  if params is None:
    return None
  weights = dict(_leaves(params))
  places = []
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    state.inner_state.inner_state, is_leaf=_is_blocks
  ):
    start = owner(path, weights)
    weight = None if start is None else weights[path[start:]]
    known = state.inner_state.formats.get(_tree.name_of(path))
    is_statistic = known or (
      weight is not None and jnp.shape(leaf) == weight.shape and _tree.is_inexact(leaf)
    )
    if not is_statistic or not state.formats.get(_tree.name_of(path[start:])):
      places.append(_Place(path))
    elif known is None and leaf.dtype != jnp.float32:
      return None
    else:
      fmt = known.format if known else StateFormat("fp32")
      places.append(_Place(path[:start], _tree.name_of(path[start:]), fmt))
  return places
