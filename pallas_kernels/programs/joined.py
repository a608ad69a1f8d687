"""joined: concatenates many leaves into one array of blocks, steps it, and cuts it up again.

A program takes seconds to compile, however small its leaf. So small leaves of one kind are
copied behind each other, with each row padded to whole blocks of 32. An element keeps its random
bits, because a block carries the words of its leaf's stream and its place in the leaf.
"""

from collections.abc import Callable, Sequence
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats import state_formats
from pallas_kernels.formats.random_bits import Window, element_bits, whole_place
from pallas_kernels.formats.state_formats import BLOCK, Blocks

_U32 = jnp.uint32
MOST = 1 << 17  # blocks in one pool on a GPU: 80 MB


class Draws(NamedTuple):
  """The random bits of joined blocks, and the number of values in each.

  Attributes:
    words: two or four uint32 [blocks, 1], the words of each block's stream.
    first: uint32 [blocks, 1], the place of each block's first element.
    length: int32 [blocks], the number of values in each block; None if every block is full.
  """

  words: tuple[jax.Array, ...]
  first: jax.Array
  length: Any

  @property
  def valid(self):
    """A mask of the values that exist, bool [blocks, 32]; None if all do."""
    if self.length is None:
      return None
    column = jax.lax.broadcasted_iota(jnp.int32, (len(self.length), BLOCK), 1)
    return column < self.length[:, None]

  def bits(self, lane: int) -> jax.Array:
    """The random bits of every element, uint32 [blocks, 32]."""
    return element_bits(self.words, self.places(), lane=lane)

  def places(self) -> jax.Array:
    """The place of every element, uint32 [blocks, 32]."""
    shape = (self.first.shape[0], BLOCK)
    return self.first + jax.lax.broadcasted_iota(_U32, shape, 1)


def rows_of(shape: tuple[int, ...]) -> tuple[int, int]:
  """(rows, values a row) of an array; a scalar is one row of one value."""
  return math.prod(shape[:-1]), shape[-1] if shape else 1


def blocks_in(shape: tuple[int, ...]) -> int:
  """The number of blocks in an array, short ones included."""
  rows, n = rows_of(shape)
  return rows * -(-n // BLOCK)


def takes(x, low, fmt) -> bool:
  """Whether a leaf x of weights low can be joined: residuals by block, places within 32 bits."""
  shape, whole = x.shape, low.shape
  is_in_blocks = fmt.residual_bits in (0, 8, 16) or (bool(shape) and shape[-1] >= BLOCK)
  return is_in_blocks and 0 < math.prod(whole) < 1 << 32


def _pools(sizes: Sequence[int], most: int) -> list[list[int]]:
  """Groups leaves with these numbers of blocks into runs of at most ``most`` blocks."""
  result: list[list[int]] = [[]]
  total = 0
  for i, size in enumerate(sizes):
    if result[-1] and total + size > most:
      result.append([])
      total = 0
    result[-1].append(i)
    total += size
  return result if result[0] else []


def fill(x: jax.Array, n: int) -> jax.Array:
  """[..., n] -> [blocks, 32]; pads each row with zeros."""
  x = x.reshape(-1, n) if x.size else x.reshape(0, n)
  x = jnp.pad(x, ((0, 0), (0, -n % BLOCK))) if n % BLOCK else x
  return x.reshape(-1, BLOCK)


def cut_off(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The inverse of ``fill``."""
  rows, n = rows_of(shape)
  if n % BLOCK:
    blocks = blocks.reshape(rows, -(-n // BLOCK) * BLOCK)[:, :n]
  return blocks.reshape(shape)


class Joint:
  """Arrays of given shapes behind each other, in blocks.

  Attributes:
    count: the number of blocks.
    counts: the number of blocks of each array.
    spare: the number of blocks that belong to no array.
  """

  def __init__(self, shapes: Sequence[tuple[int, ...]], whole_tiles: int = 1, on_gpu: bool = False):
    """Pads the number of blocks to a multiple of whole_tiles, with blocks of zeros.

    on_gpu selects the slices that cut the arrays apart again, so that they compile quickly:
    static slices of one dimension for XLA:GPU, dynamic slices for XLA:CPU, which compiles
    those of equal shape into one kernel.
    """
    self._shapes = list(shapes)
    self.counts = [blocks_in(shape) for shape in shapes]
    self.spare = -sum(self.counts) % whole_tiles
    self.count = sum(self.counts) + self.spare
    starts = list(itertools.accumulate(self.counts, initial=0))[:-1]
    # Without the barrier, each slice is a kernel of its own.
    self._starts = None if on_gpu else jax.lax.optimization_barrier(list(map(jnp.int32, starts)))

  def lengths(self) -> np.ndarray:
    """The number of values in each block, without the spare ones, int32."""
    pairs = map(rows_of, self._shapes)
    of = [np.tile(np.minimum(n - np.arange(0, n, BLOCK), BLOCK), rows) for rows, n in pairs]
    return np.concatenate(of).astype(np.int32)

  def values(self, xs) -> jax.Array:
    """Arrays of the shapes -> [blocks, 32]."""
    pairs = zip(xs, self._shapes, strict=True)
    return self._behind_each_other([fill(x, rows_of(shape)[1]) for x, shape in pairs])

  def by_block(self, xs) -> jax.Array:
    """Arrays with k values a block, in order -> [blocks, k]."""
    pairs = zip(xs, self.counts, strict=True)
    return self._behind_each_other([x.reshape(count, -1) for x, count in pairs])

  def _behind_each_other(self, parts):
    if self.spare:
      parts = [*parts, jnp.zeros((self.spare, *parts[0].shape[1:]), parts[0].dtype)]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

  def cut(self, x: jax.Array, like: Sequence[Any]) -> list[jax.Array]:
    """[blocks, k] -> the arrays, in the shapes of like."""
    if self._starts is None:
      return self._cut_flat(x, like)
    take = functools.partial(jax.lax.dynamic_slice_in_dim, x)
    parts = list(map(take, self._starts, self.counts))
    return self._shaped(parts, like, is_filled=x.shape[1] == BLOCK)

  def _cut_flat(self, x: jax.Array, like: Sequence[Any]) -> list[jax.Array]:
    is_filled, sizes = x.shape[1] == BLOCK, [count * x.shape[1] for count in self.counts]
    if is_filled and any(n % BLOCK for _, n in map(rows_of, self._shapes)):
      x, is_filled, sizes = self._without_filling(x), False, list(map(math.prod, self._shapes))
    flat, starts = x.reshape(-1), itertools.accumulate(sizes[:-1], initial=0)
    pairs = zip(starts, sizes, strict=True)
    parts = [jax.lax.slice_in_dim(flat, start, start + size) for start, size in pairs]
    return self._shaped(parts, like, is_filled)

  def _shaped(self, parts, like, is_filled: bool):
    if is_filled:
      return list(map(cut_off, parts, self._shapes))
    return [x.reshape(of.shape) for x, of in zip(parts, like, strict=True)]

  def _without_filling(self, x: jax.Array) -> jax.Array:
    """[blocks, 32] -> the arrays' values behind each other."""
    starts = itertools.accumulate(map(math.prod, self._shapes[:-1]), initial=0)
    pairs = zip(self._shapes, starts, strict=True)
    places = np.concatenate([firsts(shape).astype(np.int32) + start for shape, start in pairs])
    first = jnp.asarray(np.pad(places, (0, self.spare)))
    length = jnp.asarray(np.pad(self.lengths(), (0, self.spare)))
    size = sum(map(math.prod, self._shapes))
    column = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    # Padding gets unique places beyond the end, which the scatter drops.
    beyond = jax.lax.iota(jnp.int32, len(x) * BLOCK).reshape(x.shape) + size
    place = jnp.where(column < length[:, None], first[:, None] + column, beyond)
    empty = jnp.zeros((size,), x.dtype)
    return empty.at[place].set(x, mode="drop", unique_indices=True)


def step_small(
  small: Sequence[int], program: Callable, alone: Callable, leaves: Sequence[Any],
  statistic_formats, index, windows, most: int, *, on_gpu: bool,
):  # fmt: skip
  """Steps the leaves numbered in small joined, if there are several, and the others alone.

  ``step_in_pools`` joins them; alone(leaf, window) steps one leaf.
  """
  small = small if len(small) > 1 else []
  of = lambda xs: [xs[i] for i in small]
  found = step_in_pools(
    program, of(leaves), statistic_formats, index, of(windows), most, on_gpu=on_gpu
  )
  results = dict(zip(small, found, strict=True))
  for i in set(range(len(leaves))) - set(small):
    results[i] = alone(leaves[i], windows[i])
  return [results[i] for i in range(len(leaves))]


def step_in_pools(
  program: Callable, leaves: Sequence[Any], statistic_formats, index, windows, most: int, *,
  on_gpu: bool, tile: int | None = None,
):  # fmt: skip
  """Calls ``step`` on pools of leaves with at most ``most`` blocks each.

  With tile, the blocks in a tile, all pools get the same number of whole tiles and share a kernel.
  """
  counts = [blocks_in(leaf.gradient.shape) for leaf in leaves]
  pools, whole_tiles = _pools(counts, most), 1
  if tile is not None:
    largest = max((sum(counts[i] for i in pool) for pool in pools), default=0)
    whole_tiles = -(-largest // tile) * tile
  results: list[Any] = []
  for pool in pools:
    of = lambda xs, pool=pool: [xs[i] for i in pool]
    after = results[-1][0] if results and not on_gpu else None
    results += step(
      program, of(leaves), statistic_formats, index, of(windows), on_gpu=on_gpu,
      whole_tiles=whole_tiles, after=after,
    )  # fmt: skip
  return results


def _after(low: jax.Array, tree):
  """Returns arrays unchanged, but makes them depend on another pool's new weights.

  Otherwise XLA:CPU joins all pools before it steps the first, and holds the inputs of
  all of them. It has removed barriers by the time that it schedules operations.
  """
  word = {2: jnp.uint16, 4: _U32}[low.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(low.reshape(-1)[0], word).astype(_U32)
  never = bits >> _U32(8 * low.dtype.itemsize - 8) > _U32(0xFF)
  return jax.tree.map(lambda x: jnp.where(never, jnp.zeros((), x.dtype), x), tree)


def step(
  program: Callable,
  leaves: Sequence[Any],
  statistic_formats: Sequence[state_formats.StateFormat],
  index: jax.Array | None,
  windows: Sequence[Window | None] | None,
  *,
  on_gpu: bool,
  whole_tiles: int = 1,
  places: Sequence[np.ndarray] | None = None,
  after: jax.Array | None = None,
):
  """Steps leaves as one.

  Args:
    program: (leaf, draws) -> (low, delta, statistics), for a leaf [blocks, 32].
    leaves: ``leaf.Leaf``s with the same formats, all accepted by ``takes``.
    statistic_formats: the formats of their statistics.
    index: the place of each leaf in a stack, or None.
    windows: the position of each leaf in a whole, or None.
    on_gpu: as in ``Joint``.
    whole_tiles: the number of blocks is padded to a multiple of it.
    places: for each leaf, the places of its blocks' first elements; None if they are
      the places in the leaf.
    after: new weights of the pool to step first, or None.

  Returns:
    (low, delta, statistics) of each leaf.
  """
  stored, gradients = [leaf[1:4] for leaf in leaves], [leaf.gradient for leaf in leaves]
  streams = [leaf.stream for leaf in leaves]
  if index is not None:
    take = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    stored = jax.tree.map(take, stored)
  if after is not None:
    stored, gradients, streams = _after(after, (stored, gradients, streams))
  shapes = [x.shape for x in gradients]
  joint = Joint(shapes, whole_tiles, on_gpu)
  # A leaf's packed codes end with each of its rows; the joined ones end with each block.
  packed = functools.partial(_with_codes, state_formats.pack, statistic_formats)
  unpacked = functools.partial(_with_codes, state_formats.unpack, statistic_formats)
  stored = list(map(unpacked, stored))

  def statistic(xs):
    if not isinstance(xs[0], Blocks):
      return joint.values(xs)
    return Blocks(joint.values([x.codes for x in xs]), joint.by_block([x.scale for x in xs]))

  lows, deltas, statistics = zip(*stored, strict=True)
  residuals = None
  if deltas[0] is not None:  # packed residuals have equally many bytes for every block
    join = joint.by_block if deltas[0].dtype == jnp.uint8 else joint.values
    residuals = join(deltas)
  old = joint.values(lows), residuals, [statistic(xs) for xs in zip(*statistics, strict=True)]
  leaf = type(leaves[0])(joint.values(gradients), *packed(old), stream=None)
  if index is not None or windows:
    given = windows or [None] * len(leaves)
    places = [_first_in_whole(x, index, window) for x, window in zip(leaves, given, strict=True)]
  new = unpacked(program(leaf, draws(joint, shapes, streams, places)))
  flat_new, treedef = jax.tree.flatten(new)
  likes = zip(*(jax.tree.leaves(old) for old in stored), strict=True)
  parts = [joint.cut(x, like) for x, like in zip(flat_new, likes, strict=True)]
  results = [packed(jax.tree.unflatten(treedef, part)) for part in zip(*parts, strict=True)]
  if index is None:
    return results
  put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, 0)
  return [
    jax.tree.map(put, leaf[1:4], result) for leaf, result in zip(leaves, results, strict=True)
  ]


def _with_codes(f: Callable, statistic_formats, stored):
  """Applies ``state_formats.pack`` or ``unpack`` to a leaf's (low, delta, statistics)."""
  low, delta, statistics = stored
  statistics = [
    x._replace(codes=f(x.codes, fmt)) if fmt.is_packed else x
    for x, fmt in zip(statistics, statistic_formats, strict=True)
  ]
  return low, delta, statistics


def firsts(shape: tuple[int, ...]) -> np.ndarray:
  """The place of each block's first element, uint32 [blocks]."""
  rows, n = rows_of(shape)
  return (np.arange(rows)[:, None] * n + np.arange(0, n, BLOCK)).reshape(-1).astype(np.uint32)


def _first_in_whole(leaf, index, window: Window | None):
  """The place of each block's first element in the whole that contains a leaf."""
  shape = leaf.gradient.shape
  first = firsts(shape)
  if index is not None:
    window = window or Window((0,) * leaf.low.ndim, leaf.low.shape)
    window = Window((index, *window.start[1:]), window.shape)
    shape = (1, *shape)
  return first if window is None else whole_place(jnp.asarray(first), shape, window)


def draws(joint: Joint, shapes, streams, places=None) -> Draws:
  """The streams and places of joined blocks.

  Args:
    joint: the joined arrays.
    shapes: their shapes.
    streams: the words of each array's stream.
    places: as in ``step``.

  Returns:
    The ``Draws`` of the blocks.
  """
  which = np.repeat(np.arange(len(shapes)), joint.counts)
  which = np.concatenate([which, np.zeros(joint.spare, which.dtype)])

  table = jnp.stack(streams).at[which].get(mode="promise_in_bounds")
  zeros = np.zeros(joint.spare, np.uint32)
  places = list(map(firsts, shapes)) if places is None else places
  is_constant = all(isinstance(x, np.ndarray) for x in places)
  first = (np if is_constant else jnp).concatenate([*places, zeros])
  length = joint.lengths()
  is_ragged = (length < BLOCK).any()
  return Draws(
    tuple(jnp.split(table, table.shape[1], axis=1)),
    jnp.asarray(first)[:, None].astype(_U32),
    jnp.asarray(np.pad(length, (0, joint.spare))) if is_ragged else None,
  )
