"""mosaic_gpu: the step of leaves as Mosaic GPU kernels, in one pass over memory, in place.

A kernel holds a tile of blocks in registers while it computes their scales and then their
codes. XLA takes a second pass over memory for the codes. With packed codes, it reads
pairs of values.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.random_bits import Window
from pallas_kernels.formats.state_formats import BLOCK
from pallas_kernels.placement import implementations
from pallas_kernels.programs import joined, pairs, tiles
from pallas_kernels.programs.leaf import Leaf, bound, from_parts, is_small, stored_parts
from pallas_kernels.programs.tile_step import Part, tile_step

# Leaves of one size in a kernel: more would save launches but add seconds of compile time.
MOST_IN_A_KERNEL = 4
# Each size of small leaves compiles a kernel. Beyond this number of sizes, small leaves are joined.
MOST_SIZES = 24


def takes(shape, stack, is_whole: bool, is_packed: bool = False) -> bool:
  """Whether ``step`` takes a leaf: rows of whole blocks, or a small leaf of any shape.

  A whole array may also be large if tiles of 32 x 32 leave little of it uncovered; they do not
  take it in pairs.
  """
  if all(map(tiles.takes_blocks, (shape, stack))):
    return True
  if not 0 < math.prod(stack) < implementations.MAX_SIZE:
    return False
  return is_small(shape) or (
    is_whole and not is_packed and tiles.takes_rectangle(*joined.rows_of(shape))
  )


def step(rules, formats, lands, scalars, leaves: Sequence[Leaf], when, index, windows=None):
  """The step as Mosaic GPU kernels: one a leaf, or one for a few small leaves of one size."""
  from pallas_kernels.programs import block_kernel  # imported here because it imports Pallas

  windows = windows or [None] * len(leaves)
  kinds = _kinds(formats, leaves[0]) if any(f.is_packed for f in formats[1]) else None
  tile = functools.partial(_tile, rules, formats, lands, kinds)
  operands = functools.partial(_operands, lands, kinds)
  results: dict[int, Any] = {}

  @jax.jit  # lowers groups of one kind once
  def kernel(scalars, group, of, when, index):
    parts = [
      None if x is None else ((*leaf.low.shape[:-1], leaf.low.shape[-1] // BLOCK), x.shape)
      for leaf, x in zip(group, of, strict=True)
    ]
    block_leaves = [operands(leaf, window) for leaf, window in zip(group, of, strict=True)]
    block_kernel.blockwise(tile, block_leaves, scalars, when, index, parts)
    return list(map(_frozen, group, block_leaves))

  def run(those: Sequence[int]):
    of = [_in_blocks(windows[i]) for i in those]
    found = kernel(scalars, [leaves[i] for i in those], of, when, index)
    results.update(zip(those, found, strict=True))

  @jax.jit
  def joined_kernel(leaf: Leaf, draws):
    written = operands(leaf, None, draws)
    block_kernel.blockwise(tile, [written], scalars, when)
    return _frozen(leaf, written)

  sizes: dict[int, list[int]] = {}
  rest = []
  for i, leaf in enumerate(leaves):
    if not is_small(leaf.gradient.shape) and leaf.gradient.shape[-1] % BLOCK:
      results[i] = _ragged(tile, joined_kernel, formats[1], lands, scalars, leaf, when)
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
  in_pools = functools.partial(joined.step_in_pools, on_gpu=True, tile=tiles.TILE_ROWS)
  found = in_pools(joined_kernel, of(leaves), formats[1], index, of(windows), joined.MOST)
  results.update(zip(rest, found, strict=True))
  return [results[i] for i in range(len(leaves))]


def _ragged(tile, joined_kernel, statistic_formats, lands, scalars, leaf: Leaf, when):
  """Steps a large leaf whose rows end in a short block: by a kernel, then its ends joined."""
  from pallas_kernels.programs import block_kernel  # imported here because it imports Pallas

  rows, n = joined.rows_of(leaf.gradient.shape)
  written = _operands(lands, None, leaf, None, row=n)
  block_kernel.rectangle(tile, written, scalars, when)
  whole_rows, whole_columns = (x // BLOCK * BLOCK for x in (rows, n))
  right = np.arange(whole_rows, dtype=np.uint32) * np.uint32(n) + np.uint32(whole_columns)
  parts = [(slice(0, whole_rows), whole_columns, right)]
  if rows > whole_rows:
    below = joined.firsts((rows - whole_rows, n)) + np.uint32(whole_rows * n)
    parts.append((slice(whole_rows, rows), 0, below))

  def cut(of_rows, start: int) -> Leaf:
    place = of_rows, slice(start, n)
    values = [ref[place] for ref in written.refs]
    scales = [ref[of_rows, start // BLOCK :] for ref in written.scale_refs]
    read = written.read[place]
    low, delta, statistics = from_parts(leaf[1:4], values, scales)
    gradient, low = (low, read) if lands else (read, low)
    return Leaf(gradient, low, delta, statistics, leaf.stream)

  # The ends get the same number of blocks and step in sequence, so that they share one kernel and
  # the memory of one.
  blocks = max(-(-len(first) // tiles.TILE_ROWS) * tiles.TILE_ROWS for _, _, first in parts)
  for of_rows, start, first in parts:
    some = [cut(of_rows, start)]
    (new,) = joined.step(
      joined_kernel, some, statistic_formats, None, None, on_gpu=True, whole_tiles=blocks,
      places=[first],
    )  # fmt: skip
    values, scales = stored_parts(*new)
    for ref, x in zip(written.refs, values, strict=True):
      ref[of_rows, start:] = x
    for ref, x in zip(written.scale_refs, scales, strict=True):
      ref[of_rows, start // BLOCK :] = x
  return _frozen(leaf, written)


def _kinds(formats, leaf: Leaf) -> list[pairs.Kind]:
  """The kinds of a leaf's weight (and gradient), residual and statistics."""
  of_weight = [x.dtype for x in (leaf.low, leaf.delta) if x is not None]
  return of_weight + [f if f.is_packed else f.dtype for f in formats[1]]


def _tile(rules, formats, lands, kinds, draws, across, scalars, read_T, values_T, scales_K):
  """Steps a tile of blocks in registers."""
  # Values that are read by their bits are no products.
  products = False, False, *(f.has_scale for f in formats[1])
  rule = bound(rules, scalars, products=products)
  tiles_T, types = [(read_T, *values_T)], [x.dtype for x in values_T]
  if kinds is not None:
    apart = map(pairs.taken_apart, (read_T, *values_T), (kinds[0], *kinds))
    tiles_T = list(zip(*apart, strict=True))
  parts = [
    Part(bits, valid, of_read, of_values)
    for (bits, valid), (of_read, *of_values) in zip(draws, tiles_T, strict=True)
  ]
  new, scales_K = tile_step(rule, formats, lands, parts, across, scales_K)
  return (new[0] if kinds is None else list(map(pairs.put_together, *new, kinds, types))), scales_K


def _operands(
  lands, kinds, leaf: Leaf, window: Window | None, draws=None, row: int = BLOCK
) -> tiles.BlockLeaf:
  gradient, low = leaf.gradient, leaf.low
  if lands:
    gradient, low = low, gradient
  values, scales = stored_parts(low, leaf.delta, leaf.statistics)
  scales = [x.reshape(-1) if row == BLOCK else x.reshape(-1, -(-row // BLOCK)) for x in scales]
  if kinds is None:
    gradient, *values = (x.reshape(-1, row) for x in (gradient, *values))
  else:
    gradient, *values = map(pairs.view, (gradient, *values), (kinds[0], *kinds))
  refs, scale_refs = list(map(jax.new_ref, values)), list(map(jax.new_ref, scales))
  start, rows = None, tuple[jax.Array, ...]()
  if window is not None:
    start = jnp.stack([jnp.asarray(x, jnp.int32) for x in window.start])
  if draws is not None:
    rows = tuple(x.reshape(-1) for x in (*draws.words, draws.first))
    if draws.length is not None:
      rows = (*rows, draws.length)
  return tiles.BlockLeaf(leaf.stream, gradient, refs, scale_refs, start, rows)


def _frozen(leaf: Leaf, written: tiles.BlockLeaf):
  """The results of the kernel, in the shapes of the leaf."""
  values, scales = (list(map(jax.freeze, refs)) for refs in (written.refs, written.scale_refs))
  old = leaf[1:4]
  return jax.tree.map(pairs.restored, from_parts(old, values, scales), old)


def _in_blocks(window: Window | None) -> Window | None:
  """Converts a window of rows of whole blocks to blocks along the last axis."""
  if window is None:
    return None
  *start, last = window.start
  last = 0 if isinstance(last, int) else last // BLOCK
  return Window((*start, last), (*window.shape[:-1], window.shape[-1] // BLOCK))
