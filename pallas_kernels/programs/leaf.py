"""leaf: the operands of a step, and the rule that every program calls on them."""

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.formats import arithmetic
from pallas_kernels.formats.state_formats import Blocks

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


def stored_parts(low, delta, statistics) -> tuple[list[Any], list[Any]]:
  """The arrays of a weight and its state: the values, one an element, and the scales."""
  values = [low] if delta is None else [low, delta]
  values += [x.codes if isinstance(x, Blocks) else x for x in statistics]
  return values, [x.scale for x in statistics if isinstance(x, Blocks)]


def from_parts(like, values, scales) -> tuple[Any, Any, list[Any]]:
  """The inverse of ``stored_parts``: (low, delta, statistics), with the structure of like."""
  _, delta, statistics = like
  (low, *others), scales = values, iter(scales)
  delta = None if delta is None else others.pop(0)
  statistics = [
    Blocks(x, next(scales)) if isinstance(old, Blocks) else x
    for x, old in zip(others, statistics, strict=True)
  ]
  return low, delta, statistics


def in_float32(scalars) -> jax.Array:
  """The scalars of a rule as a kernel's operand: float32, or exact in it (bools, integers)."""
  return jnp.stack([jnp.asarray(x, jnp.float32) for x in scalars])


def from_float32(numbers, scalars) -> list[jax.Array]:
  """Reads the scalars in a kernel, in their dtypes again; the inverse of ``in_float32``."""
  read = ((numbers[i], x.dtype) for i, x in enumerate(scalars))
  return [x != 0 if dtype == jnp.bool_ else x.astype(dtype) for x, dtype in read]


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
