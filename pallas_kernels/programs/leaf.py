"""leaf: the operands of a step, and the rule that every program calls on them."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax

from pallas_kernels.formats import arithmetic

Rule = Callable[[jax.Array, jax.Array, list[jax.Array]], tuple[jax.Array, list[jax.Array]]]


class Leaf(NamedTuple):
  """A weight with its gradient and state; see :func:`pallas_kernels.fused_update`.

  Attributes:
    gradient: [...], any real float dtype.
    low: the weight.
    delta: its residual, or None.
    statistics: its stored statistics.
    stream: uint32 [2], the words of its random stream (``stream_keys``); [4] if
      its statistics have a stream of their own, whose words come last.
  """

  gradient: jax.Array
  low: jax.Array
  delta: jax.Array | None
  statistics: list[Any]
  stream: jax.Array


def is_small(shape: tuple[int, ...]) -> bool:
  """Whether it is faster to step a leaf together with others.

  A launch takes an H100 about as long as 8 MB of memory traffic; a step moves
  12 bytes a value.
  """
  return math.prod(shape) < 1 << 18


def bound(rules, scalars, contracts: bool = False, products=None, keep=None) -> Rule:
  """Binds scalars to hoisted rules; the last three arguments go to the hoisted rule.

  Unless contracts is True, the rule's results and the weights that its update
  moves have the same bits in every XLA program, and the same bits in every kernel.
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
