"""Launching Mosaic GPU kernels on blocks of 32 neighbours, each with a scale.

A kernel treats arrays as [blocks, 32], 32 blocks (one warpgroup) a program. The
remainder of an array is cut into tiles of 8 blocks; its last two tiles may
overlap. Several arrays can share a launch. Updates are in place, as in
``elementwise``.
"""

from collections.abc import Callable, Sequence
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.random_bits import Window, element_bits, whole_place
from pallas_kernels.formats.state_formats import BLOCK
from pallas_kernels.programs import tiles
from pallas_kernels.programs.leaf import from_float32, in_float32
from pallas_kernels.programs.tiles import HAS_STORE, TILE_ROWS, BlockLeaf


def _block_layout(rows: int, width: int = BLOCK):
  """The layout of a tile of whole blocks over 128 threads; a block stays within one warp.

  With 32 rows, a lane holds 8 neighbouring elements, or 4 pairs: 16-byte accesses
  at 16 bits an element.
  """
  tiling = plgpu.Tiling(((rows, width), (rows // 4, width), (rows * width // 128,)))
  return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def blockwise(
  tile: Callable,
  leaves: Sequence[BlockLeaf],
  scalars: Sequence[jax.Array],
  when: jax.Array | None,
  index: jax.Array | None = None,
  parts: Sequence[tuple[tuple[int, ...], tuple[int, ...]] | None] | None = None,
):
  """Runs ``tile`` over the blocks of some arrays, as one kernel, in place.

  Args:
    tile: ``(draws, across, scalars, read, values, scales) -> (values, scales)``, on
      arrays [rows, 32], or [rows, 16] pairs of values, and [rows] for scales. draws
      has (bits, valid), of pairs one for the first and one for the second values.
      bits(lane) are the stream's ``element_bits``. valid is a mask of the elements
      that exist, or None if all do. across broadcasts [rows] to an array.
    leaves: the arrays, all of one width.
    scalars: the scalars for tile: float32, or exact in it (bools, integers).
    when: a bool; if False, nothing is written. None means True.
    index: an integer, the place of the arrays to step in their stacks; or None.
    parts: for each array with a start, its shape and that of its whole, in
      blocks along the last axis.
  """
  parts = parts or [None] * len(leaves)
  numbers = [in_float32(scalars)] if scalars else []
  flags = [] if when is None else [jnp.asarray(when).astype(jnp.int32).reshape(1)]
  indices = [] if index is None else [jnp.asarray(index).astype(jnp.int32).reshape(1)]
  groups = tiles.groups([leaf.read.shape[0] for leaf in leaves])
  table = np.concatenate([group.table for group in groups])
  tables = [jnp.asarray(table)] if any(len(group.leaves) > 1 for group in groups) else []
  operands, treedef = jax.tree.flatten((numbers, flags, indices, tables, list(leaves)))

  def body(*refs):
    unflattened = jax.tree.unflatten(treedef, refs[: len(operands)])
    number_refs, flag_refs, index_refs, table_refs, leaf_refs = unflattened
    program = jax.lax.axis_index("tile")
    numbers = [x for ref in number_refs for x in from_float32(ref, scalars)]
    taken = [flag_refs[0][0] != 0] if flag_refs else []
    index = index_refs[0][0] if index_refs else None
    first = 0
    for group in groups:

      def run(group=group, first=first):
        mine = [leaf_refs[i] for i in group.leaves]
        wholes = [_in_whole(leaf_refs[i].start, parts[i]) for i in group.leaves]
        if len(mine) > 1:
          which, *starts = (table_refs[0][program, i] for i in range(3))
        else:
          which = None
          starts = [(program - first) * group.rows + int(start) for start in group.table[0, 1:]]
        starts = starts if group.is_pair else starts[:1]
        shared = refs[len(operands) :]
        _run_tiles(tile, group.rows, mine, wholes, which, starts, index, numbers, shared)

      last = first + len(group.table)
      conditions = taken + ([(program >= first) & (program < last)] if len(groups) > 1 else [])
      if conditions:
        pl.when(functools.reduce(jnp.logical_and, conditions))(run)
      else:
        run()
      first = last

  most_scales = max(len(leaf.scale_refs) for leaf in leaves)
  plgpu.kernel(
    body,
    grid=(len(table),),
    grid_names=("tile",),
    scratch_types=[] if HAS_STORE else [plgpu.SMEM((TILE_ROWS,), jnp.bfloat16)] * most_scales,
    compiler_params=_compiler_params(any(group.is_pair for group in groups)),
  )(*operands)


def rectangle(tile: Callable, leaf: BlockLeaf, scalars: Sequence[jax.Array], when):
  """``blockwise`` of an array whose rows end in a short block; covers its whole tiles only.

  Args:
    tile: as in ``blockwise``.
    leaf: arrays [rows, n] and scales [rows, blocks a row]. The last rows % 32
      rows and the last n % 32 columns stay as they are.
    scalars: as in ``blockwise``.
    when: as in ``blockwise``.
  """
  rows, n = leaf.read.shape
  columns = n // BLOCK
  layout = _row_layout() if n % 8 else _block_layout(TILE_ROWS)
  numbers = [in_float32(scalars)] if scalars else []
  flags = [] if when is None else [jnp.asarray(when).astype(jnp.int32).reshape(1)]
  operands, treedef = jax.tree.flatten((numbers, flags, leaf))

  def body(*refs):
    number_refs, flag_refs, leaf = jax.tree.unflatten(treedef, refs)
    program = jax.lax.axis_index("tile")
    numbers = [x for ref in number_refs for x in from_float32(ref, scalars)]

    def run():
      first_row, block = program // columns * TILE_ROWS, program % columns
      here = pl.ds(first_row, TILE_ROWS), pl.ds(block * BLOCK, BLOCK)
      row, column = (
        plgpu.broadcasted_iota(jnp.uint32, (TILE_ROWS, BLOCK), axis, layout=layout)
        for axis in (0, 1)
      )
      place = (row + first_row.astype(jnp.uint32)) * jnp.uint32(n)
      place = place + (column + (block * BLOCK).astype(jnp.uint32))
      words = [leaf.key[i] for i in range(leaf.key.shape[0])]
      bits = lambda lane: element_bits(words, place, lane=lane)
      load = lambda ref: plgpu.load(ref.at[here], layout=layout, optimized=False)
      of_scales = [ref.at[here[0], block] for ref in leaf.scale_refs]
      scales = [plgpu.load(x, layout=layout.reduce(1), optimized=False) for x in of_scales]
      values = list(map(load, leaf.refs))
      across = _across(layout, (TILE_ROWS, BLOCK))
      values, scales = tile([(bits, None)], across, numbers, load(leaf.read), values, scales)
      for ref, value in zip(leaf.refs, values, strict=True):
        plgpu.store(ref.at[here], value, optimized=False)
      for ref, scale in zip(of_scales, scales, strict=True):
        plgpu.store(ref, scale, optimized=False)

    if flag_refs:
      pl.when(flag_refs[0][0] != 0)(run)
    else:
      run()

  plgpu.kernel(
    body,
    grid=(rows // TILE_ROWS * columns,),
    grid_names=("tile",),
    compiler_params=_compiler_params(),
  )(*operands)


def _compiler_params(overlaps: bool = False) -> plgpu.CompilerParams:
  """The compiler parameters of a kernel; overlaps says whether its tiles may overlap."""
  return plgpu.CompilerParams(
    # The code gives every layout: inferring them takes two thirds of the time to lower a kernel.
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    # Unless tiles overlap, a thread writes only values that no other thread reads, and a warp only
    # scales that no other warp reads.
    unsafe_no_auto_barriers=not overlaps,
  )


def _across(layout, shape: tuple[int, int]):
  """A function that broadcasts [rows] to [rows, columns] in a layout."""
  return lambda x: plgpu.layout_cast(jax.lax.broadcast_in_dim(x, shape, (0,)), layout)


def _row_layout():
  """The layout of a tile of 32 blocks, each over the lanes of a warp: rows need no alignment."""
  tiling = plgpu.Tiling(((TILE_ROWS, BLOCK), (TILE_ROWS // 4, BLOCK), (1,)))
  return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-2,), vector_dim=-1)


def _in_whole(start_ref, part):
  """A function (first block, row) -> the block's place in the whole; just first for a whole."""
  if part is None:
    return lambda first, row: first
  shape, whole = part
  starts = [
    0 if n == m else start_ref[i] for i, (n, m) in enumerate(zip(shape, whole, strict=True))
  ]
  return lambda first, row: whole_place(first + row, shape, Window(tuple(starts), whole))


def _run_tiles(
  tile, rows: int, leaves: list[BlockLeaf], wholes, which, starts, index, scalars, shared_refs
):
  """Steps the tiles of one program in a kernel: those of the only array, or of number which."""
  shape = rows, leaves[0].read.shape[1]
  in_one = BLOCK // shape[1]
  layout = _block_layout(*shape)
  row, column = (plgpu.broadcasted_iota(jnp.uint32, shape, axis, layout=layout) for axis in (0, 1))

  def first(leaf: BlockLeaf, start):
    """The place of the tile's first block in the array, and in the stack."""
    return start, start if index is None else index * leaf.read.shape[0] + start

  def load(leaf: BlockLeaf, in_whole, start):
    in_array, in_stack = first(leaf, start)

    def array(ref, first=in_stack, layout=layout):
      return plgpu.load(ref.at[pl.ds(first, rows)], layout=layout, optimized=False)

    by_row = lambda ref, first=in_stack: array(ref, first, layout.reduce(1))
    if leaf.key is None:
      place = [by_row(ref, in_array) for ref in leaf.draws]
    else:
      place = [leaf.key[i] for i in range(leaf.key.shape[0])]
      place.append(in_whole(in_stack.astype(jnp.uint32), row))
    return (
      place,
      array(leaf.read, in_array),
      [array(ref) for ref in leaf.refs],
      [by_row(ref) for ref in leaf.scale_refs],
    )

  def store(leaf: BlockLeaf, in_whole, start, values, scales):
    del in_whole
    blocks = pl.ds(first(leaf, start)[1], rows)
    for ref, value in zip(leaf.refs, values, strict=True):
      if rows == TILE_ROWS and in_one == 1:
        ref[blocks] = value
      else:  # Mosaic GPU cannot optimize a store of so narrow a tile
        plgpu.store(ref.at[blocks], value, optimized=False)
    if HAS_STORE:
      for ref, scale in zip(leaf.scale_refs, scales, strict=True):
        plgpu.store(ref.at[blocks], scale, optimized=False)
      return
    for shared, scale in zip(shared_refs, scales, strict=True):
      shared[...] = scale
    plgpu.commit_smem()
    for ref, shared in zip(leaf.scale_refs, shared_refs, strict=True):
      plgpu.copy_smem_to_gmem(shared, ref.at[blocks])
    plgpu.wait_smem_to_gmem(0)

  def choose(f, *args):
    branches = [functools.partial(f, *of) for of in zip(leaves, wholes, strict=True)]
    return branches[0](*args) if which is None else jax.lax.switch(which, branches, *args)

  across = _across(layout, shape)

  def run(loaded):
    (*words, blocks), read, values, scales = loaded
    length = None
    if leaves[0].key is None:
      if len(leaves[0].draws) % 2 == 0:
        *words, first_places, length = map(across, (*words, blocks))
      else:
        *words, first_places = map(across, (*words, blocks))
    else:
      blocks = blocks if blocks.shape else row + blocks
      first_places = blocks * jnp.uint32(BLOCK)

    def draw(which: int):
      element = column * jnp.uint32(in_one) + jnp.uint32(which) if in_one > 1 else column
      place = first_places + element
      valid = None if length is None else element.astype(jnp.int32) < length
      return lambda lane: element_bits(words, place, lane=lane), valid

    draws = list(map(draw, range(in_one)))
    return tile(draws, across, scalars, read, values, scales)

  # Reads everything before it writes anything, because tiles may overlap.
  loaded = [choose(load, start) for start in starts]
  for start, new in zip(starts, list(map(run, loaded)), strict=True):
    choose(store, start, *new)
