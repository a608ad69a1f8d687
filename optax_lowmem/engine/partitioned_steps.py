"""partitioned_steps: steps the leaves of a partition, each by the optimizer of its label."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from optax_lowmem.engine.leaf_steps import Gradient, LeafSteps, Stored, why_composed
from optax_lowmem.engine.optimizer import Fold, Optimizer
from optax_lowmem.trees import pytrees
from optax_lowmem.trees.formats import Formats


class Partitioned(NamedTuple):
  """The optimizers of a partition.

  Attributes:
    optimizers: by label.
    labels: the function from a tree to its labels, by leaf name.
  """

  optimizers: Mapping[str, Optimizer]
  labels: Callable[[Any], dict[str, str]]

  @property
  def implementation(self):
    """As in ``pallas_kernels.fused_update``."""
    return next(iter(self.optimizers.values())).implementation

  @property
  def fold(self) -> Fold | str:
    """As in ``Optimizer``: the reason why one of them has none, if so."""
    folds = [optimizer.fold for optimizer in self.optimizers.values()]
    return next((x for x in folds if isinstance(x, str)), folds[0])


class PartitionedSteps:
  """``LeafSteps`` of several optimizers, with the same methods.

  Attributes:
    held: as in ``LeafSteps``.
    stored: as in ``LeafSteps``.
    old_rest: as in ``LeafSteps``, by label.
  """

  def __init__(self, partitioned: Partitioned, state: optax.PartitionState, params):
    self._labels = partitioned.labels(params)
    self._steps = {}
    for label, optimizer in partitioned.optimizers.items():
      own, member = self._own(label, params), state.inner_states[label].inner_state
      steps = LeafSteps.of(optimizer, member, own, own)
      if steps is None:
        raise ValueError(why_composed(member))
      self._steps[label] = steps
    every = self._steps.values()
    self.held = Formats(tuple(entry for steps in every for entry in steps.held.table))
    self.stored = {name: x for steps in every for name, x in steps.stored.items()}
    self.old_rest = {label: steps.old_rest for label, steps in self._steps.items()}

  def step(
    self, stored: Mapping[str, Stored], gradients: Mapping[str, Gradient], *args
  ) -> dict[str, Stored]:
    """As in ``LeafSteps``."""
    new = dict(stored)
    for label, steps in self._steps.items():
      own = {name: g for name, g in gradients.items() if self._labels[name] == label}
      new = steps.step(new, own, *args) if own else new
    return new

  def step_rest(self, updates):
    """As in ``LeafSteps``."""
    pairs = {
      label: steps.step_rest(self._own(label, updates)) for label, steps in self._steps.items()
    }
    by_name: dict[str, Any] = {}
    for new, _ in pairs.values():
      by_name |= pytrees.named_leaves(new)
    rest = {label: rest for label, (_, rest) in pairs.items()}
    return pytrees.map_named(lambda name, x: by_name.get(name, x), updates), rest

  def state(self, stored: Mapping[str, Stored], rest, taken: jax.Array | None = None):
    """As in ``LeafSteps``."""

    def of(label, steps):
      own = {name: x for name, x in stored.items() if self._labels[name] == label}
      return optax.MaskedState(steps.state(own, rest[label], taken))

    return optax.PartitionState({label: of(label, steps) for label, steps in self._steps.items()})

  def _own(self, label: str, tree):
    """The tree without the leaves of other labels, as ``optax.partition`` passes it."""
    return pytrees.map_named(
      lambda name, x: x if self._labels[name] == label else optax.MaskedNode(), tree
    )
