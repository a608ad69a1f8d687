"""fused_programs: the programs of `fused_update`: XLA's, XLA's for one CPU, and the kernel."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import arithmetic, chunked, launch_blocks, packing, state_formats
from pallas_kernels.random_bits import Window, random_bits, statistic_bits
from pallas_kernels.state_formats import BLOCK, Blocks

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


def on_xla(
  rules, formats, scalars, leaves: Sequence[Leaf], when, index, contracts=False, windows=None
):
  """The step as an XLA program; leaves of one shape are traced once.

  XLA:GPU may contract: kept from it, it keeps more in memory between its passes
  (8 bytes a value of a leaf with clipping in front).
  """
  rule = _bound(rules, scalars, contracts)
  xla = jax.jit(functools.partial(_xla_in_stack, rule, formats))
  windows = windows or [None] * len(leaves)
  return [xla(leaf, when, index, window) for leaf, window in zip(leaves, windows, strict=True)]


def _xla_in_stack(rule, formats, leaf: Leaf, when, index, window: Window | None = None):
  if index is None:
    return _xla(rule, formats, leaf, when, window)
  stack = leaf[1:4]
  stored = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stack)
  window = window or Window((0,) * leaf.low.ndim, leaf.low.shape)
  window = Window((index, *window.start[1:]), window.shape)
  low, delta, statistics = stored
  one = leaf._replace(low=low, delta=delta, statistics=statistics)
  new = _xla(rule, formats, one, when, window)
  put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, 0)
  return jax.tree.map(put, stack, new)


def _xla(rule, formats, leaf: Leaf, when, window: Window | None = None):
  gradient, low, delta, statistics, stream, own = leaf
  fmt, statistic_formats = formats
  bits, own_bits = (
    functools.partial(random_bits, words, low.shape, window=window)
    for words in (stream, stream if own is None else own)
  )
  gradient = arithmetic.as_float32(gradient)
  wide = packing.unpack(delta, low.shape, fmt)
  master = low if fmt.is_full_precision else arithmetic.merge_values(low, wide, fmt)

  def run(stored):
    values = map(state_formats.dequantize, stored, statistic_formats)
    return rule(gradient, master, list(values))

  update, values = run(statistics)
  scales = [
    state_formats.block_scale(x, f) if f.has_scale else None
    for x, f in zip(values, statistic_formats, strict=True)
  ]
  # Where there are scales, the statistics are computed again for the codes.
  if any(scale is not None for scale in scales):
    update, values = run(
      [
        x if scale is None else state_formats.read_again(x, scale)
        for x, scale in zip(statistics, scales, strict=True)
      ]
    )
  new_statistics = [
    state_formats.quantize(x, f, statistic_bits(own_bits, i), scales[i])
    for i, (x, f) in enumerate(zip(values, statistic_formats, strict=True))
  ]
  new = low, delta, new_statistics
  if update is not None:
    if fmt.is_full_precision:
      new_low, new_wide = low + update, None
    else:
      new_low, new_wide = arithmetic.apply_values(low, wide, update, fmt, bits(0))
    new = new_low, packing.pack(new_wide, fmt), new_statistics
  if when is None:
    return new
  return jax.tree.map(lambda x, y: jnp.where(when, x, y), new, (low, delta, statistics))


def _bound(rules, scalars, contracts: bool = False, products=None) -> Rule:
  """The rule again, on arrays of some shapes; contracts and products are those of `hoist`'s rest.

  Its bits, and those of the weight that the update is added to, are the same in
  whatever program, or in whatever kernel, unless it contracts.
  """

  def rule(gradient, *others):
    shape = gradient.shape
    args = jax.tree.map(lambda x: x.reshape(shape or (1,)), (gradient, *others))
    rest = rules.get(shape or (1,)) or next(iter(rules.values()))  # of some shard
    update, values = rest(scalars, *args, contracts=contracts, products=products)
    if update is not None and not contracts and products is None:
      update = arithmetic.rounded(update)
    return jax.tree.map(lambda x: x.reshape(shape), (update, values))

  return rule


def on_one_cpu(rules, formats, scalars, leaves: Sequence[Leaf], when, index, windows=None):
  """The step as an XLA program for one CPU."""
  rule = _bound(rules, scalars)
  windows = map(_in_blocks, windows or [None] * len(leaves))
  pairs = zip(leaves, windows, strict=True)
  return [chunked.step(rule, formats, *leaf[:5], when, index, window) for leaf, window in pairs]


def as_kernel(rules, formats, scalars, leaves: Sequence[Leaf], when, index, windows=None):
  """The step as a Mosaic GPU kernel."""
  fmt, statistic_formats = formats

  def tile(bits, scalars, gradient_T, values_T, scales_K):
    (low_T, *rest_T), scales_K = values_T, iter(scales_K)
    delta_T = rest_T.pop(0).astype(jnp.int32) if fmt.residual_bits else None
    master_T = arithmetic.merge_values(low_T, delta_T, fmt)
    old_T = [
      state_formats.dequantize_blocks(x_T, next(scales_K) if f.has_scale else None, f)
      for x_T, f in zip(rest_T, statistic_formats, strict=True)
    ]
    # What is read by its bits is no product.
    products = False, False, *(f.has_scale for f in statistic_formats)
    update_T, new_T = _bound(rules, scalars, products=products)(
      arithmetic.as_float32(gradient_T), master_T, old_T
    )
    if update_T is not None:
      low_T, delta_T = arithmetic.apply_values(low_T, delta_T, update_T, fmt, bits(0))
    values_T = [low_T] if delta_T is None else [low_T, delta_T.astype(values_T[1].dtype)]
    new_scales_K = []
    for i, (x_T, f) in enumerate(zip(new_T, statistic_formats, strict=True)):
      codes_T, scale_K = state_formats.quantize_blocks(x_T, f, statistic_bits(bits, i))
      values_T.append(codes_T)
      new_scales_K += [scale_K] if f.has_scale else []
    return values_T, new_scales_K

  def operands(leaf: Leaf, window: Window | None) -> launch_blocks.BlockLeaf:
    blocks = lambda x: x.reshape(-1, BLOCK)
    values = [x for x in (leaf.low, leaf.delta) if x is not None]
    values += [x.codes if isinstance(x, Blocks) else x for x in leaf.statistics]
    scales = [x.scale.reshape(-1) for x in leaf.statistics if isinstance(x, Blocks)]
    refs, scale_refs = [jax.new_ref(blocks(x)) for x in values], list(map(jax.new_ref, scales))
    start = None
    if window is not None:
      start = jnp.stack([jnp.asarray(x, jnp.int32) for x in window.start])
    return launch_blocks.BlockLeaf(leaf.stream, blocks(leaf.gradient), refs, scale_refs, start)

  in_blocks = list(map(_in_blocks, windows or [None] * len(leaves)))
  block_leaves = list(map(operands, leaves, in_blocks))
  parts = [
    None if x is None else ((*leaf.low.shape[:-1], leaf.low.shape[-1] // BLOCK), x.shape)
    for leaf, x in zip(leaves, in_blocks, strict=True)
  ]
  launch_blocks.blockwise(tile, block_leaves, scalars, when, index, parts)
  return [_frozen(leaf, written) for leaf, written in zip(leaves, block_leaves, strict=True)]


def _frozen(leaf: Leaf, written: launch_blocks.BlockLeaf):
  """What the kernel wrote, in the shapes of the leaf."""
  values, scales = iter(written.refs), iter(written.scale_refs)

  def take(refs, x):
    return jax.freeze(next(refs)).reshape(x.shape)

  low = take(values, leaf.low)
  delta = None if leaf.delta is None else take(values, leaf.delta)
  statistics = [
    Blocks(take(values, x.codes), take(scales, x.scale))
    if isinstance(x, Blocks)
    else take(values, x)
    for x in leaf.statistics
  ]
  return low, delta, statistics


def _in_blocks(window: Window | None) -> Window | None:
  """A window of rows of whole blocks, in blocks along the last axis."""
  if window is None:
    return None
  *start, last = window.start
  last = 0 if isinstance(last, int) else last // BLOCK
  return Window((*start, last), (*window.shape[:-1], window.shape[-1] // BLOCK))
