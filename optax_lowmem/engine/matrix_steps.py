"""matrix_steps: steps matrices by Muon, one matrix of a stack at a time.

A step is three programs: the momentum, in place and in its format; the matrix
products of Newton-Schulz iterations; and the update of weight and residual, in
place. Momentum and update are elementwise, so the programs of
``pallas_kernels.fused_update`` run them. Nothing larger than one layer's matrices
exists in between.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, MuonState

from pallas_kernels.formats import state_formats
from pallas_kernels.operations.fused_update import check, step_leaves
from pallas_kernels.placement import sharded
from pallas_kernels.programs.leaf import Leaf


@dataclasses.dataclass(frozen=True)
class Axes:
  """The axes of a leaf that form a matrix; all others number the matrices of a stack.

  Attributes:
    reduction: the axes that a matrix-vector product sums over, not negative.
    output: the other axes of the matrix.
  """

  reduction: tuple[int, ...]
  output: tuple[int, ...]

  @classmethod
  def of(cls, numbers: MuonDimensionNumbers, shape: tuple[int, ...], name: str) -> "Axes":
    """Reads Optax's dimension numbers; raises a ValueError that names the leaf."""

    def axes(given) -> tuple[int, ...]:
      return tuple(i % len(shape) for i in _several(given))

    given = [*_several(numbers.reduction_axis), *_several(numbers.output_axis)]
    if len(shape) < 2 or any(not -len(shape) <= i < len(shape) for i in given):
      raise ValueError(
        f"params{name} has shape {shape}; {numbers} does not select two of its axes. Muon takes"
        " matrices: give this leaf None in muon_weight_dimension_numbers, and AdamW steps it."
      )
    found = cls(axes(numbers.reduction_axis), axes(numbers.output_axis))
    every = found.reduction + found.output
    if len(set(every)) != len(every) or not found.reduction or not found.output:
      raise ValueError(
        f"params{name} has shape {shape}; in {numbers}, the reduction axes and the output axes must"
        " be different axes, at least one each."
      )
    return found

  @property
  def is_stack(self) -> bool:
    """Whether the first axis numbers matrices."""
    return 0 not in self.reduction + self.output

  @property
  def numbers(self) -> MuonDimensionNumbers:
    """As Optax takes them."""
    return MuonDimensionNumbers(self.reduction, self.output)

  def of_layer(self) -> "Axes":
    """The axes of one layer of a stack."""
    less = lambda axes: tuple(i - 1 for i in axes)
    return Axes(less(self.reduction), less(self.output))

  def fans(self, shape: tuple[int, ...]) -> tuple[int, int]:
    """(fan in, fan out) of a leaf of this shape."""
    size = lambda axes: math.prod(shape[i] for i in axes)
    return size(self.reduction), size(self.output)


def _several(axis) -> tuple[int, ...]:
  return (axis,) if isinstance(axis, int) else tuple(axis)


@dataclasses.dataclass(frozen=True, eq=False)
class Matrices:
  """Muon, as the step of one matrix.

  Attributes:
    axes: the function from a tree to the axes of its matrices, by leaf name.
    beta: decay rate of the momentum.
    nesterov: whether the update looks one step ahead.
    newton_schulz: ``optax.contrib.scale_by_muon`` without momentum.
    dtype: the dtype of the matrix products.
    consistent_rms: as in ``optax.contrib.muon``.
    replicates: whether every device of a mesh multiplies whole matrices.
    tail: the function from a weight-decay mask to weight decay and learning rate.
  """

  axes: Callable[[Any], dict[str, Axes]]
  beta: Any
  nesterov: bool
  newton_schulz: optax.GradientTransformation
  dtype: Any
  consistent_rms: Any
  replicates: bool
  tail: Callable[[Any], optax.GradientTransformation]

  def momentum(self, g, mu, count):
    """(the new momentum, the matrix to orthogonalize), as in ``optax.contrib.scale_by_muon``."""
    mu = optax.tree.update_moment(g, mu, self.beta, 1)
    count = optax.safe_increment(count)
    if not self.nesterov:
      return mu, optax.tree.bias_correction(mu, self.beta, count)
    ahead = optax.tree.bias_correction(mu, self.beta, optax.safe_increment(count))
    here = optax.tree.bias_correction(g, self.beta, count)
    return mu, self.beta * ahead + (1 - self.beta) * here

  def orthogonalize(self, x, ns_coeffs, axes: Axes):
    """Orthogonalizes a matrix, or each matrix of a stack, one after the other."""

    def every(x, ns_coeffs):
      one = functools.partial(self._one, ns_coeffs=ns_coeffs)
      batch = [i for i in range(x.ndim) if i not in axes.reduction + axes.output]
      order = (*batch, *axes.reduction, *axes.output)
      moved = jnp.transpose(x, order)
      matrices = moved.reshape(-1, *axes.fans(x.shape))
      new = one(matrices[0])[None] if len(matrices) == 1 else jax.lax.map(one, matrices)
      back = [order.index(i) for i in range(x.ndim)]
      return _row_major(jnp.transpose(new.reshape(moved.shape), back))

    return sharded.automatic(every, x, x, ns_coeffs)

  def _one(self, matrix, ns_coeffs):
    put = sharded.replicated if self.replicates else lambda x: x
    matrix = put(matrix)
    state = MuonState(jnp.zeros([], jnp.int32), jnp.zeros_like(matrix), ns_coeffs)
    return put(self.newton_schulz.update(matrix, state)[0])

  def scale(self, shape: tuple[int, ...], axes: Axes):
    """The factor of an orthogonalized matrix, by its shape."""
    fan_in, fan_out = axes.fans(shape)
    if self.consistent_rms is None:
      return jnp.sqrt(jnp.maximum(1, fan_out / max(fan_in, 1)))
    return jnp.sqrt(jnp.maximum(fan_in, fan_out)) * self.consistent_rms


def rules(matrices: Matrices, decays, struct):
  """The elementwise rules of a step, as ``Optimizer.rule`` takes them.

  Args:
    matrices: Muon.
    decays: the weight-decay mask of the leaf.
    struct: the state of one bare array, a chain's.

  Returns:
    By name: ``"ahead"``, whose update is the matrix to orthogonalize;
    ``"momentum"``, which moves the momentum alone; and ``"update"``, which moves
    the weight alone.
  """

  def moved(g, w, values, scalars, factor):
    g, (mu,) = g if factor is None else g * factor, values
    new, ahead = matrices.momentum(g, mu, state_of(struct, scalars)[0].count)
    return new.astype(w.dtype), ahead.astype(w.dtype)

  def ahead(*args):
    return moved(*args)[1], []

  def momentum(*args):
    return None, [moved(*args)[0]]

  def update(u, w, values, scalars, factor):
    del values
    tail, state = matrices.tail(decays), state_of(struct, scalars)[2:]
    return tail.update(u * factor, state, w)[0].astype(w.dtype), []

  return {"ahead": ahead, "momentum": momentum, "update": update}


def state_of(struct, scalars):
  """The state of one bare array without its momentum, from its other leaves."""
  struct = (struct[0]._replace(mu=()), *struct[1:])
  return jax.tree.unflatten(jax.tree.structure(struct), scalars)


def step_matrices(
  matrices: Matrices, programs, kind, axes: Axes, leaf: Leaf, ns_coeffs, numbers, taken, index,
  lands=False,
):  # fmt: skip
  """The step of a leaf: (weight, residual, [momentum]).

  Args:
    matrices: Muon.
    programs: the hoisted ``rules``, in their order.
    kind: the leaf's kind.
    axes: the axes of the leaf, with the stack's.
    leaf: the leaf; with an index, its gradient is that of one layer.
    ns_coeffs: the coefficients of the Newton-Schulz iterations.
    numbers: the scalars of the programs.
    taken: a bool scalar, or None. If it is False, nothing changes.
    index: the layer of a stack, or None.
    lands: as in ``fused_update_leaves``.

  Returns:
    The new parts of the leaf.
  """
  check([leaf], kind.weight, kind.formats, index)
  if not leaf.low.size:
    return leaf[1:4]
  (fmt,), (ahead, momentum, update) = kind.formats, zip(programs, numbers, strict=True)

  def step(program, leaf, formats, index, lands=False):
    rule, scalars = program
    return step_leaves(
      rule, scalars, [leaf], kind.weight, formats, taken, kind.implementation, index, lands
    )[0]

  def layer(leaf: Leaf, axes: Axes, index):
    (stored,) = leaf.statistics
    if index is not None:
      at = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
      stored = jax.tree.map(at, stored)

    def matrix(g, stored, scalars):
      g, (rule, _) = g.astype(jnp.float32), ahead
      x, _ = rule(scalars, g, g, [state_formats.dequantize(stored, fmt)])
      return _row_major(x.astype(matrices.dtype))

    x = sharded.automatic(matrix, leaf.gradient, leaf.gradient, stored, ahead[1])
    # The programs overwrite what the products read.
    x, leaf = jax.lax.optimization_barrier((x, leaf))
    # In place, the weight goes through the first program, too.
    low, delta, new = step(momentum, leaf, kind.formats, index)
    u = matrices.orthogonalize(x, ns_coeffs, axes)
    moved = Leaf(u, low, delta, [], leaf.stream)
    low, delta, _ = step(update, moved, (), index, lands)
    return low, delta, new

  if index is not None:
    return layer(leaf, axes.of_layer(), index)
  sharding = sharded.explicit(leaf.low)
  is_split = sharding is not None and sharding.spec[0] is not None  # JAX cannot slice it
  if lands or is_split or not axes.is_stack:
    return layer(leaf, axes, None)

  def one(i, stored):
    g = jax.lax.dynamic_index_in_dim(leaf.gradient, i, keepdims=False)
    low, delta, statistics = stored
    return layer(Leaf(g, low, delta, statistics, leaf.stream), axes.of_layer(), i)

  return jax.lax.fori_loop(0, len(leaf.low), one, leaf[1:4])


def _row_major(x):
  """Keeps XLA from transposing whole stacks because the products read a transposed matrix."""
  return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
