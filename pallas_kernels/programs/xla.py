"""xla: the step of leaves as an XLA program; with scales, it takes two passes over memory."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.formats import arithmetic, packing, state_formats
from pallas_kernels.formats.random_bits import Window, random_bits, statistic_bits
from pallas_kernels.programs import joined
from pallas_kernels.programs.leaf import Leaf, bound, is_small


def step(
  rules, formats, lands, scalars, leaves: Sequence[Leaf], when, index, windows=None, *,
  contracts=False, joins=False,
):  # fmt: skip
  """The step as an XLA program; leaves of one shape are traced once.

  ``contracts`` permits contracted multiplications and additions. Without them, XLA:GPU
  keeps more in memory between its passes (8 bytes a value of a leaf behind clipping).
  ``joins`` joins small leaves; it requires a program that XLA does not partition.
  """
  rule = bound(rules, scalars, contracts)
  windows = windows or [None] * len(leaves)
  xla = jax.jit(functools.partial(step_in_stack, rule, formats, lands))

  def alone(leaf, window):
    return xla(leaf, when, index, window)

  if not joins:
    return list(map(alone, leaves, windows))
  program = lambda leaf, draws: step_leaf(rule, formats, lands, leaf, when, draws=draws)
  small = [i for i, leaf in enumerate(leaves) if is_small(leaf.gradient.shape)]
  small = [i for i in small if joined.takes(leaves[i].gradient, leaves[i].low, formats[0])]
  return joined.step_small(
    small, program, alone, leaves, formats[1], index, windows, joined.MOST, on_gpu=True
  )


def step_in_stack(
  rule, formats, lands, leaf: Leaf, when, index, window: Window | None = None, *, copies=False
):
  """Steps one leaf; with an index, that array of a stack, in place.

  ``copies`` copies the array first. Otherwise XLA copies the whole stack if the rule takes
  several passes and one of them reads what another has written.
  """
  if index is None:
    return step_leaf(rule, formats, lands, leaf, when, window)
  stack = leaf[1:4]
  stored = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stack)
  if copies:
    stored = jax.lax.optimization_barrier(stored)
  window = window or Window((0,) * leaf.low.ndim, leaf.low.shape)
  window = Window((index, *window.start[1:]), window.shape)
  low, delta, statistics = stored
  one = leaf._replace(low=low, delta=delta, statistics=statistics)
  new = step_leaf(rule, formats, lands, one, when, window)
  put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, 0)
  return jax.tree.map(put, stack, new)


def step_leaf(
  rule, formats, lands, leaf: Leaf, when, window: Window | None = None, draws: Any = None
):  # fmt: skip
  """Steps one leaf, or with draws, joined ones."""
  gradient, low, delta, statistics, stream = leaf
  fmt, statistic_formats = formats
  valid = None
  if draws is None:
    bits = functools.partial(random_bits, stream, low.shape, window=window)
  else:
    bits, valid = draws.bits, draws.valid
  gradient = arithmetic.as_float32(gradient)
  wide = packing.unpack(delta, low.shape, fmt)
  master = low if fmt.is_full_precision else arithmetic.merge_values(low, wide, fmt)

  def run(stored):
    update, values = rule(
      gradient, master, list(map(state_formats.dequantize, stored, statistic_formats))
    )
    if valid is not None:
      values = [jnp.where(valid, x, 0) for x in values]
    return update, values

  update, values = run(statistics)
  scales = [
    state_formats.block_scale(x, f, old.scale) if f.has_scale else None
    for x, old, f in zip(values, statistics, statistic_formats, strict=True)
  ]
  # With scales, the codes need a second pass, which computes the statistics again.
  if any(scale is not None for scale in scales):
    update, values = run(
      [
        x if scale is None else state_formats.read_again(x, scale, f)
        for x, scale, f in zip(statistics, scales, statistic_formats, strict=True)
      ]
    )
  new_statistics = [
    state_formats.quantize(x, f, statistic_bits(bits, i), scales[i])
    for i, (x, f) in enumerate(zip(values, statistic_formats, strict=True))
  ]
  new = low, delta, new_statistics
  if update is not None:
    new = (*_moved(fmt, lands, low, wide, update, bits(0)), new_statistics)
  if when is None:
    return new
  return jax.tree.map(lambda x, y: jnp.where(when, x, y), new, (low, delta, statistics))


def _moved(fmt, lands, low, wide, update, bits):
  """The new weight and its packed residual, after an update."""
  if fmt.is_full_precision:
    return low + update, None
  new_low, new_wide = arithmetic.move_values(low, wide, update, fmt, bits, lands)
  return new_low, packing.pack(new_wide, fmt)
