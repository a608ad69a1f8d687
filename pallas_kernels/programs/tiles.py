"""How arrays are cut into tiles of blocks, for `block_kernel`.

Apart from the kernels, since importing Pallas takes 0.2 s, which a program without
kernels does not need.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import jax
import numpy as np

from pallas_kernels.formats.state_formats import BLOCK
from pallas_kernels.placement.implementations import MAX_SIZE

HAS_STORE = jax.__version_info__ >= (0, 12)  # `plgpu.store`
# Blocks in a tile; fewer than 32 for the end of an array, so that it needs no launch of its own.
# Each size is a program of its own to compile.
_ROWS = (32, 8) if HAS_STORE else (32,)
TILE_ROWS = _ROWS[0]


def is_in_blocks(shape: tuple[int, ...]) -> bool:
  """Whether the rows of an array, which is not empty, are whole blocks."""
  return bool(shape) and shape[-1] % BLOCK == 0 and 0 < math.prod(shape) <= MAX_SIZE


def takes_blocks(shape: tuple[int, ...]) -> bool:
  """Whether `blockwise` takes arrays of a shape: rows of whole blocks, and enough for a tile."""
  count, least = math.prod(shape) // BLOCK, _ROWS[-1]
  return is_in_blocks(shape) and (count % least == 0 or (HAS_STORE and count > least))


def takes_rectangle(rows: int, n: int) -> bool:
  """Whether `rectangle` takes arrays [rows, n]: little is left of tiles of 32 x 32."""
  left = rows * n - rows // TILE_ROWS * TILE_ROWS * (n // BLOCK * BLOCK)
  return HAS_STORE and rows >= TILE_ROWS and left * 16 <= rows * n


class BlockLeaf(NamedTuple):
  """The operands of `blockwise` that belong to one array.

  Attributes:
    key: uint32 [2], the stream's words; of joined arrays, None.
    read: what is only read, [blocks, 32].
    refs: what is replaced, likewise, of at most 16 bits a value; or a stack of
      such arrays, [count * blocks, 32].
    scale_refs: what is replaced, bfloat16 [blocks] or [count * blocks].
    start: where the array, or the stack, is a part of a whole: its first place
      along each axis, int32 [axes], in blocks along the last; else None.
    draws: of joined arrays: uint32 [blocks] each, the two words of a block's
      stream and the place of its first element; perhaps int32 [blocks], the
      number of its elements.
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
    rows: how many blocks they have.
    leaves: the arrays that have such tiles.
    table: int32 [programs, 3]: each program's place in leaves, and the first blocks
      of its tiles.
    is_pair: whether a program has two tiles, which overlap, and not one.
  """

  rows: int
  leaves: list[int]
  table: np.ndarray
  is_pair: bool = False


def groups(blocks: Sequence[int]) -> list[Group]:
  """How arrays of so many blocks are cut: tiles of 32 blocks, and smaller ones for the rest."""
  result: list[Group] = []
  least = _ROWS[-1]
  # A pair of the smallest tiles takes what is left of them, and the last of them with it.
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
  """How many blocks the tiles have that `blockwise` walks arrays of these shapes in."""
  cut = groups([math.prod(shape) // BLOCK for shape in shapes])
  return [group.rows for group in cut]
