"""Cuts arrays into tiles of blocks for ``block_kernel``.

It is a module of its own because importing Pallas takes 0.2 s, which a program
without kernels should not pay.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import jax
import numpy as np

from pallas_kernels.formats.state_formats import BLOCK
from pallas_kernels.placement.implementations import MAX_SIZE

HAS_STORE = jax.__version_info__ >= (0, 12)  # JAX has `plgpu.store`
# Tile sizes, in blocks. The smaller tiles cover the end of an array, which then needs no launch of
# its own. Each size compiles to code of its own.
_ROWS = (32, 8) if HAS_STORE else (32,)
TILE_ROWS = _ROWS[0]


def is_in_blocks(shape: tuple[int, ...]) -> bool:
  """Whether an array is not empty and its rows are whole blocks."""
  return bool(shape) and shape[-1] % BLOCK == 0 and 0 < math.prod(shape) <= MAX_SIZE


def takes_blocks(shape: tuple[int, ...]) -> bool:
  """Whether ``blockwise`` takes arrays of a shape: rows of whole blocks, enough for a tile."""
  count, least = math.prod(shape) // BLOCK, _ROWS[-1]
  return is_in_blocks(shape) and (count % least == 0 or (HAS_STORE and count > least))


def takes_rectangle(rows: int, n: int) -> bool:
  """Whether ``rectangle`` takes arrays [rows, n]: tiles of 32 x 32 leave little uncovered."""
  left = rows * n - rows // TILE_ROWS * TILE_ROWS * (n // BLOCK * BLOCK)
  return HAS_STORE and rows >= TILE_ROWS and left * 16 <= rows * n


class BlockLeaf(NamedTuple):
  """The operands of ``blockwise`` for one array.

  Attributes:
    key: uint32 [2] or [4], the words of the stream; None for joined arrays.
    read: [blocks, 32], the values that are only read.
    refs: [blocks, 32] each, the values that are replaced, at most 16 bits each;
      or [count * blocks, 32] for a stack of arrays.
    scale_refs: bfloat16 [blocks] or [count * blocks] each, the scales that are
      replaced.
    start: int32 [axes], the first place of the array or stack along each axis of
      the whole, in blocks along the last axis; None if it is the whole.
    draws: for joined arrays, uint32 [blocks] each: the two or four words of a
      block's stream and the place of its first element; then, if blocks can be
      short, int32 [blocks], the number of elements in each.
  """

  key: jax.Array | None
  read: jax.Array
  refs: list[jax.Ref]
  scale_refs: list[jax.Ref]
  start: jax.Array | None = None
  draws: tuple[jax.Array, ...] = ()


class Group(NamedTuple):
  """The tiles of one size.

  Attributes:
    rows: the number of blocks in a tile.
    leaves: the arrays that have tiles of this size.
    table: int32 [programs, 3]: the index of each program's array in leaves, and the
      first block of each of its two tiles.
    is_pair: whether a program steps two tiles, which overlap, instead of one.
  """

  rows: int
  leaves: list[int]
  table: np.ndarray
  is_pair: bool = False


def groups(blocks: Sequence[int]) -> list[Group]:
  """Cuts arrays with these numbers of blocks into tiles of 32 blocks, then into smaller ones."""
  result: list[Group] = []
  least = _ROWS[-1]
  # Too few blocks may be left for a smallest tile. A pair of smallest tiles then covers the end of
  # the array: the last whole one, and one that ends with the array and overlaps it.
  ends = [n if n % least == 0 else n // least * least - least for n in blocks]
  done = [0] * len(blocks)
  for rows in _ROWS:
    starts = [np.arange(at, end - rows + 1, rows) for at, end in zip(done, ends, strict=True)]
    done = [at + len(of) * rows for at, of in zip(done, starts, strict=True)]
    if leaves := [i for i, of in enumerate(starts) if len(of)]:
      which = np.repeat(np.arange(len(leaves)), [len(starts[i]) for i in leaves])
      first = np.concatenate([starts[i] for i in leaves])
      table = np.stack([which, first, first], axis=1)
      result.append(Group(rows, leaves, table.astype(np.int32)))
  if pairs := [i for i, end in enumerate(ends) if end < blocks[i]]:
    table = np.array([[k, ends[i], blocks[i] - least] for k, i in enumerate(pairs)])
    result.append(Group(least, pairs, table.astype(np.int32), is_pair=True))
  return result


def tile_rows(shapes: Sequence[tuple[int, ...]]) -> list[int]:
  """The tile sizes, in blocks, that ``blockwise`` uses for arrays of these shapes."""
  cut = groups([math.prod(shape) // BLOCK for shape in shapes])
  return [group.rows for group in cut]
