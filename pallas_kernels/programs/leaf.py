"""leaf: what a step is given, and the rule that every program calls on it."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax

from pallas_kernels.formats import arithmetic

Rule = Callable[[jax.Array, jax.Array, list[jax.Array]], tuple[jax.Array, list[jax.Array]]]


class Leaf(NamedTuple):
  """A weight and what belongs to it; see `fused_update`'s arguments.

  Attributes:
    gradient: any real float dtype, [...].
    low: the weight.
    delta: its residual, or None.
    statistics: as they are stored.
    stream: uint32 [2], the words of its random stream (`stream_keys`).
    statistics_stream: likewise of its statistics, where they have their own.
  """

  gradient: jax.Array
  low: jax.Array
  delta: jax.Array | None
  statistics: list[Any]
  stream: jax.Array
  statistics_stream: jax.Array | None = None


def is_small(shape: tuple[int, ...]) -> bool:
  """Whether a leaf is better stepped with others.

  A launch takes an H100 about as long as 8 MB of memory traffic; a step moves
  12 bytes a value.
  """
  return math.prod(shape) < 1 << 18


def bound(rules, scalars, contracts: bool = False, products=None, keep=None) -> Rule:
  """The rule again, on arrays of some shapes; the last three arguments are those of `hoist`'s rest.

  Its bits, and those of the weight that the update is added to, are the same in
  whatever program, or in whatever kernel, unless it contracts.
  """

  def rule(gradient, *others):
    shape = gradient.shape
    args = jax.tree.map(lambda x: x.reshape(shape or (1,)), (gradient, *others))
    rest = rules.get(shape or (1,)) or next(iter(rules.values()))
    update, values = rest(scalars, *args, contracts=contracts, products=products, keep=keep)
    if update is not None and not contracts and products is None:
      update = arithmetic.rounded(update)
    return jax.tree.map(lambda x: x.reshape(shape), (update, values))

  return rule
