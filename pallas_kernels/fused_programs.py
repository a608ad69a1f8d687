"""fused_programs: the programs of `fused_update`: XLA's, XLA's for one CPU, and the kernel."""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import arithmetic, chunked, joined, launch, packing, state_formats, tiles
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
  rules, formats, lands, scalars, leaves: Sequence[Leaf], when, index, windows=None, *,
  contracts=False, joins=False,
):  # fmt: skip
  """The step as an XLA program; leaves of one shape are traced once.

  XLA:GPU may contract: kept from it, it keeps more in memory between its passes
  (8 bytes a value of a leaf with clipping in front). Small leaves are joined where
  XLA does not partition its program.
  """
  rule = _bound(rules, scalars, contracts)
  windows = windows or [None] * len(leaves)
  xla = jax.jit(functools.partial(_xla_in_stack, rule, formats, lands))

  def alone(leaf, window):
    return xla(leaf, when, index, window)

  if not joins:
    return list(map(alone, leaves, windows))
  program = lambda leaf, draws: _xla(rule, formats, lands, leaf, when, draws=draws)
  return _small_joined(program, alone, formats, leaves, index, windows)


def _small_joined(program, alone, formats, leaves, index, windows):
  """Calls alone(leaf, window) for large leaves, and program(leaf, draws) for small ones joined."""
  small = [i for i, leaf in enumerate(leaves) if is_small(leaf.gradient.shape)]
  small = [i for i in small if joined.takes(leaves[i].gradient, leaves[i].low, formats[0])]
  small = small if len(small) > 1 else []
  of = lambda xs: [xs[i] for i in small]
  found = joined.step_in_pools(program, of(leaves), index, of(windows), MOST_JOINED, on_gpu=True)
  results = dict(zip(small, found, strict=True))
  for i in set(range(len(leaves))) - set(small):
    results[i] = alone(leaves[i], windows[i])
  return [results[i] for i in range(len(leaves))]


def is_small(shape: tuple[int, ...]) -> bool:
  """Whether a leaf is better stepped with others.

  A launch takes an H100 about as long as 8 MB of memory traffic; a step moves
  12 bytes a value.
  """
  return math.prod(shape) < 1 << 18


def _xla_in_stack(rule, formats, lands, leaf: Leaf, when, index, window: Window | None = None):
  if index is None:
    return _xla(rule, formats, lands, leaf, when, window)
  stack = leaf[1:4]
  stored = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stack)
  window = window or Window((0,) * leaf.low.ndim, leaf.low.shape)
  window = Window((index, *window.start[1:]), window.shape)
  low, delta, statistics = stored
  one = leaf._replace(low=low, delta=delta, statistics=statistics)
  new = _xla(rule, formats, lands, one, when, window)
  put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, 0)
  return jax.tree.map(put, stack, new)


def _xla(
  rule, formats, lands, leaf: Leaf, when, window: Window | None = None, draws: Any = None
):  # fmt: skip
  gradient, low, delta, statistics, stream, own = leaf
  fmt, statistic_formats = formats
  valid = None
  if draws is None:
    bits, own_bits = (
      functools.partial(random_bits, words, low.shape, window=window)
      for words in (stream, stream if own is None else own)
    )
  else:
    bits, own_bits, valid = draws.bits, draws.own_bits, draws.valid
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
    new = (*_moved(fmt, lands, low, wide, update, bits(0)), new_statistics)
  if when is None:
    return new
  return jax.tree.map(lambda x, y: jnp.where(when, x, y), new, (low, delta, statistics))


def _moved(fmt, lands, low, wide, update, bits):
  """The new weight and its packed residual."""
  if fmt.is_full_precision:
    return low + update, None
  new_low, new_wide = arithmetic.move_values(low, wide, update, fmt, bits, lands)
  return new_low, packing.pack(new_wide, fmt)


def _bound(rules, scalars, contracts: bool = False, products=None, keep=None) -> Rule:
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


def on_one_cpu(rules, formats, lands, scalars, leaves: Sequence[Leaf], when, index, windows=None):
  """The step as an XLA program for one CPU."""
  rule = _bound(rules, scalars, keep=jax.lax.optimization_barrier)
  return chunked.step(rule, formats, lands, leaves, when, index, windows)


# Leaves of one size in a kernel: more of them are fewer launches, and seconds more to compile.
MOST_IN_A_KERNEL = 4
# Small leaves of more sizes than these are joined: each is a kernel of its own to compile.
MOST_SIZES = 24
MOST_JOINED = 1 << 16  # blocks


def takes_kernel(shape: tuple[int, ...], stack: tuple[int, ...], is_whole: bool) -> bool:
  """Whether `as_kernel` takes a leaf: rows of whole blocks, or a small one of any shape.

  Of whole arrays also large ones in which little is left of tiles of 32 x 32.
  """
  if all(map(tiles.takes_blocks, (shape, stack))):
    return True
  if not 0 < math.prod(stack) < launch.MAX_SIZE:
    return False
  return is_small(shape) or (is_whole and tiles.takes_rectangle(*joined.rows_of(shape)))


def as_kernel(rules, formats, lands, scalars, leaves: Sequence[Leaf], when, index, windows=None):
  """The step as Mosaic GPU kernels: one a leaf, small leaves of one size a few at a time."""
  from pallas_kernels import launch_blocks  # which imports Pallas

  windows = windows or [None] * len(leaves)
  tile = functools.partial(_tile, rules, formats, lands)
  results: dict[int, Any] = {}

  @jax.jit  # groups of one kind are lowered once
  def kernel(scalars, group, of, when, index):
    parts = [
      None if x is None else ((*leaf.low.shape[:-1], leaf.low.shape[-1] // BLOCK), x.shape)
      for leaf, x in zip(group, of, strict=True)
    ]
    block_leaves = list(map(functools.partial(_operands, lands), group, of))
    launch_blocks.blockwise(tile, block_leaves, scalars, when, index, parts)
    return list(map(_frozen, group, block_leaves))

  def run(those: Sequence[int]):
    of = [_in_blocks(windows[i]) for i in those]
    found = kernel(scalars, [leaves[i] for i in those], of, when, index)
    results.update(zip(those, found, strict=True))

  @jax.jit
  def joined_kernel(leaf: Leaf, draws):
    written = _operands(lands, leaf, None, draws)
    launch_blocks.blockwise(tile, [written], scalars, when)
    return _frozen(leaf, written)

  sizes: dict[int, list[int]] = {}
  rest = []
  for i, leaf in enumerate(leaves):
    if not is_small(leaf.gradient.shape) and leaf.gradient.shape[-1] % BLOCK:
      results[i] = _ragged(tile, joined_kernel, lands, scalars, leaf, when)
    elif tiles.takes_blocks(leaf.gradient.shape):
      sizes.setdefault(leaf.gradient.size, []).append(i)
    else:
      rest.append(i)
  small = [n for n in sizes if is_small((n,))]
  if len(small) > MOST_SIZES:
    rest += [i for n in small for i in sizes.pop(n)]
  for n, those in sizes.items():
    most = MOST_IN_A_KERNEL if is_small((n,)) else 1
    count = next(k for k in range(most, 0, -1) if len(those) % k == 0)
    for i in range(0, len(those), count):
      run(those[i : i + count])

  of = lambda xs: [xs[i] for i in rest]
  found = joined.step_in_pools(
    joined_kernel,
    of(leaves),
    index,
    of(windows),
    MOST_JOINED,
    on_gpu=True,
    whole_tiles=tiles.TILE_ROWS,
  )
  results.update(zip(rest, found, strict=True))
  return [results[i] for i in range(len(leaves))]


def _ragged(tile, joined_kernel, lands, scalars, leaf: Leaf, when):
  """A large leaf whose rows end in a short block: a kernel, and joined, what that leaves."""
  from pallas_kernels import launch_blocks

  rows, n = joined.rows_of(leaf.gradient.shape)
  written = _operands(lands, leaf, None, row=n)
  launch_blocks.rectangle(tile, written, scalars, when)
  whole_rows, whole_columns = (x // BLOCK * BLOCK for x in (rows, n))
  right = np.arange(whole_rows, dtype=np.uint32) * np.uint32(n) + np.uint32(whole_columns)
  parts = [(slice(0, whole_rows), whole_columns, right)]
  if rows > whole_rows:
    below = joined.firsts((rows - whole_rows, n)) + np.uint32(whole_rows * n)
    parts.append((slice(whole_rows, rows), 0, below))

  def cut(of_rows, start: int) -> Leaf:
    place = of_rows, slice(start, n)
    values = [ref[place] for ref in written.refs]
    scales = iter([ref[of_rows, start // BLOCK :] for ref in written.scale_refs])
    read = written.read[place]
    low, *others = values
    delta = None if leaf.delta is None else others.pop(0)
    statistics = [
      Blocks(x, next(scales)) if isinstance(old, Blocks) else x
      for x, old in zip(others, leaf.statistics, strict=True)
    ]
    gradient, low = (low, read) if lands else (read, low)
    return Leaf(gradient, low, delta, statistics, leaf.stream)

  # One after the other, in the memory of one, by one kernel: as many blocks.
  blocks = max(-(-len(first) // tiles.TILE_ROWS) * tiles.TILE_ROWS for _, _, first in parts)
  for of_rows, start, first in parts:
    some = [cut(of_rows, start)]
    ((low, delta, statistics),) = joined.step(
      joined_kernel, some, None, None, on_gpu=True, whole_tiles=blocks, places=[first]
    )
    values = [low] if delta is None else [low, delta]
    values += [x.codes if isinstance(x, Blocks) else x for x in statistics]
    scales = [x.scale for x in statistics if isinstance(x, Blocks)]
    for ref, x in zip(written.refs, values, strict=True):
      ref[of_rows, start:] = x
    for ref, x in zip(written.scale_refs, scales, strict=True):
      ref[of_rows, start // BLOCK :] = x
  return _frozen(leaf, written)


def _tile(rules, formats, lands, bits, valid, across, scalars, gradient_T, values_T, scales_K):
  """The step of a tile of blocks in registers."""
  fmt, statistic_formats = formats
  # Weights that are to land stay; the new ones take the gradients' place.
  (low_T, *rest_T), scales_K = values_T, iter(scales_K)
  if lands:
    gradient_T, low_T = low_T, gradient_T
  delta_T, dtype = None, None
  if fmt.residual_bits:
    delta_T, dtype = rest_T[0].astype(jnp.int32), rest_T.pop(0).dtype
  master_T = arithmetic.merge_values(low_T, delta_T, fmt)
  old_T = [
    state_formats.dequantize_blocks(x_T, next(scales_K) if f.has_scale else None, f, across)
    for x_T, f in zip(rest_T, statistic_formats, strict=True)
  ]
  # What is read by its bits is no product.
  products = False, False, *(f.has_scale for f in statistic_formats)
  update_T, new_T = _bound(rules, scalars, products=products)(
    arithmetic.as_float32(gradient_T), master_T, old_T
  )
  if update_T is not None:
    low_T, delta_T = arithmetic.move_values(low_T, delta_T, update_T, fmt, bits(0), lands)
  values_T = [low_T] if delta_T is None else [low_T, delta_T.astype(dtype)]
  new_scales_K = []
  for i, (x_T, f) in enumerate(zip(new_T, statistic_formats, strict=True)):
    if valid is not None:
      x_T = jnp.where(valid, x_T, 0)
    codes_T, scale_K = state_formats.quantize_blocks(x_T, f, statistic_bits(bits, i), across)
    values_T.append(codes_T)
    new_scales_K += [scale_K] if f.has_scale else []
  return values_T, new_scales_K


def _operands(
  lands, leaf: Leaf, window: Window | None, draws=None, row: int = BLOCK
) -> tiles.BlockLeaf:
  blocks = lambda x: x.reshape(-1, row)
  gradient, low = leaf.gradient, leaf.low
  if lands:
    gradient, low = low, gradient
  values = [low] if leaf.delta is None else [low, leaf.delta]
  values += [x.codes if isinstance(x, Blocks) else x for x in leaf.statistics]
  scales = [x.scale.reshape(-1) for x in leaf.statistics if isinstance(x, Blocks)]
  if row != BLOCK:
    scales = [x.reshape(-1, -(-row // BLOCK)) for x in scales]
  refs, scale_refs = [jax.new_ref(blocks(x)) for x in values], list(map(jax.new_ref, scales))
  start, rows = None, tuple[jax.Array, ...]()
  if window is not None:
    start = jnp.stack([jnp.asarray(x, jnp.int32) for x in window.start])
  if draws is not None:
    rows = tuple(x.reshape(-1) for x in (*draws.words, draws.first))
    if draws.length is not None:
      rows = (*rows, draws.length)
  return tiles.BlockLeaf(leaf.stream, blocks(gradient), refs, scale_refs, start, rows)


def _frozen(leaf: Leaf, written: tiles.BlockLeaf):
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
