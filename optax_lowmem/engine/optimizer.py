"""optimizer: what the programs of a leaf's step need to know of an optimizer of Optax."""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_lowmem.engine import layer_checks, matrix_steps
from optax_lowmem.engine.matrix_steps import Matrices
from pallas_kernels.formats.arithmetic import rounded
from pallas_kernels.formats.state_formats import StateFormat
from pallas_kernels.operations.fused_update import check, hoisted_rule, step_leaves
from pallas_kernels.placement import implementations, sharded
from pallas_kernels.programs import xla
from pallas_kernels.programs.hoist import Hoisted
from pallas_kernels.programs.leaf import Leaf

# A statistic's name, its value and a micro-batch's gradient -> its value with that gradient.
Fold = Callable[[str, jax.Array, jax.Array], jax.Array]

OTHER_STATE = (
  "The state is not this optimizer's, or it holds more than counters and arrays of the"
  " parameters' shapes (with layerwise=True, arrays of any shape, one for each parameter)."
)


class RuleKind(NamedTuple):
  """The static properties that leaves with the same rule share.

  Attributes:
    decays: their weight-decay mask, None without one.
    paths: the paths of their statistics, as in ``_Place``.
    is_scaled: whether the step multiplies the gradients by a factor.
    folds: whether the gradients enter the statistics alone.
    matrix_rule: the rule of ``matrix_steps.rules``; "" for an elementwise optimizer.
  """

  decays: bool | None
  paths: tuple
  is_scaled: bool
  folds: bool
  matrix_rule: str = ""


class Kind(NamedTuple):
  """The static properties of leaves that one kernel can step together.

  Attributes:
    rule: the rule's kind.
    weight: the weights' format.
    formats: the statistics' formats.
    gradient: the gradients' dtype.
    implementation: as in ``pallas_kernels.fused_update``.
    is_copied: as in ``Gradient``.
  """

  rule: RuleKind
  weight: Any
  formats: tuple[StateFormat, ...]
  gradient: Any
  implementation: implementations.Implementation | None
  is_copied: bool


class Optimizer:
  """An optimizer of Optax that is elementwise or layerwise, or Muon.

  Attributes:
    make: a function from a weight-decay mask (None, a tree of bools, one bool) to
      Optax's transformation.
    mask: None, a tree of bools or a prefix of it, or a callable of params.
    implementation: as in ``pallas_kernels.fused_update``.
    fold: the function that adds a micro-batch to a statistic, or the reason why
      there is none.
    is_declared: whether a user declared it elementwise or layerwise. Then its float32
      leaves are stepped leaf by leaf, too, and its statistics have a stream of their own.
    is_layerwise: whether it needs a whole leaf, or a whole layer of a stack.
    matrices: Muon's step of a matrix; None for an elementwise optimizer.
  """

  def __init__(
    self,
    make: Callable[[Any], optax.GradientTransformation],
    mask,
    implementation: implementations.Implementation | None,
    fold: Fold | str,
    is_declared: bool = False,
    is_layerwise: bool = False,
    matrices: Matrices | None = None,
  ):
    self.is_declared, self.is_layerwise = is_declared, is_layerwise
    self.make = make
    self.mask = mask
    self.implementation = implementation
    self.fold = fold
    self.matrices = matrices
    # jit traces groups of one kind once.
    self.step_group = jax.jit(_step_group, static_argnums=(0, 1), static_argnames="lands")
    if matrices is not None:
      step_matrix = functools.partial(matrix_steps.step_matrices, matrices)
      self.step_matrix = jax.jit(step_matrix, static_argnums=(0, 1, 2), static_argnames="lands")
    if is_layerwise:
      self.step_layer = jax.jit(self._step_layer, static_argnums=0, static_argnames="lands")
    self._rules: dict[Any, Hoisted] = {}
    self._is_checked = False

  @classmethod
  def declared(cls, inner: optax.GradientTransformation, *, layerwise: bool = False) -> "Optimizer":
    """Makes one of a transformation that the user declares elementwise or layerwise."""
    fold = "only lowmem.adamw, adam and sgd define how a micro-batch enters the statistics"
    return cls(lambda mask: inner, None, None, fold, is_declared=True, is_layerwise=layerwise)

  def check_declaration(self, params):
    """Raises if a declared layerwise optimizer turns out not to be; tests it once."""
    if self.is_layerwise and not self._is_checked:
      layer_checks.check_leaves(self.make(None), params)
      self._is_checked = True

  def rule(self, kind: RuleKind, shape, scalars, factor) -> tuple[Hoisted, list[jax.Array]]:
    """The rule for leaves of a kind, traced once on arrays of a shape, and its scalars."""
    key = kind, jax.dtypes.canonicalize_dtype(float)
    rule = self._rules.get(key)
    if rule is None:
      structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (scalars, factor))
      rule = hoisted_rule(self._traced(kind), len(kind.paths), shape, structs)
      if not rule.closes_over_tracers:
        self._rules[key] = rule
    return rule, rule.scalars(scalars, factor)

  def _step_layer(self, kind: Kind, leaf: Leaf, scalars, factor, taken, index, lands=False):
    """Steps a leaf, or the layer of a stack, by XLA; its statistics have any shape."""
    update = self._traced(kind.rule)

    def run(leaf, scalars, factor, taken, index):
      def rule(g, w, values):
        u, values = update(g, w, values, scalars, factor)
        return rounded(u), values

      formats = kind.weight, kind.formats
      return xla.step_in_stack(rule, formats, lands, leaf, taken, index, copies=True)

    args = leaf, scalars, factor, taken, index
    mesh = sharded.mesh_of([leaf.low])
    return run(*args) if mesh is None else sharded.automatic_in_place(run, mesh, leaf[1:4], *args)

  def _traced(self, kind: RuleKind):
    inner, paths = self.make(kind.decays), kind.paths
    if kind.matrix_rule:
      struct = jax.eval_shape(inner.init, jax.ShapeDtypeStruct((), jnp.float32))
      assert self.matrices is not None
      return matrix_steps.rules(self.matrices, kind.decays, struct)[kind.matrix_rule]

    def rule(g, w, values, scalars, factor):
      struct = jax.eval_shape(inner.init, jax.ShapeDtypeStruct(w.shape, w.dtype))
      if len(jax.tree.leaves(struct)) != len(paths) + len(scalars):
        raise ValueError(OTHER_STATE)
      values, others = dict(zip(paths, values, strict=True)), iter(scalars)
      state = [values[path] if path in values else next(others) for path, _ in _leaves(struct)]
      state = jax.tree.unflatten(jax.tree.structure(struct), state)
      update, state = inner.update(g if factor is None else g * factor, state, w)
      new = dict(_leaves(state))
      # A float64 learning rate turns them into float64.
      return update.astype(w.dtype), [new[path].astype(w.dtype) for path in paths]

    def fold(g, w, values, scalars, factor):
      del scalars
      assert callable(self.fold)  # otherwise accumulate= is refused
      g, pairs = g if factor is None else g * factor, zip(paths, values, strict=True)
      return None, [self.fold(path[-1].name, x, g).astype(w.dtype) for path, x in pairs]

    return fold if kind.folds else rule


def _step_group(rule: Hoisted, kind: Kind, leaves, scalars, taken, index, lands=False):
  check(leaves, kind.weight, kind.formats, index)
  return step_leaves(
    rule, scalars, leaves, kind.weight, kind.formats, taken, kind.implementation, index, lands,
    kind.is_copied,
  )  # fmt: skip


def _leaves(tree):
  return jax.tree_util.tree_leaves_with_path(tree)
