"""Launching, tiling and aliasing of Mosaic GPU kernels, in one place.

A kernel here is a function on arrays that is called on one tile in registers.
Arrays of any shape are walked as one dimension, 1,024 elements (one warpgroup)
a program: in a row for `elementwise`, as 32 blocks of 32 for `blockwise`. What
is updated in place is a `jax.Ref`, so that XLA aliases it to the donated buffer
and needs no temporary; the ragged end is computed by XLA, on the refs and
after the kernel (slicing it off before would copy everything).
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Literal, NamedTuple, get_args

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels.random_bits import element_bits

Implementation = Literal["xla", "mosaic_gpu"]

TILE = 1024  # elements a program


def _layout(vector: int):
  """A tile over 128 threads, `vector` neighbouring elements at a time."""
  tiling = plgpu.Tiling(((128 * vector,), (32 * vector,), (vector,)))
  return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


MAX_SIZE = 2**31 - 1  # a program's first element is an int32


def check_name(implementation):
  """Raises a ValueError for what is no implementation."""
  if implementation not in (None, *get_args(Implementation)):
    raise ValueError(f'implementation is None, "xla" or "mosaic_gpu"; got {implementation!r}.')


def resolve(
  implementation: Implementation | None, *arrays: jax.Array, residual_bits: int = 0
) -> Implementation:
  """Checks an operation's `implementation`, and chooses it where it is None.

  None is "xla" here: XLA compiles each of these operations into one fusion
  with the kernel's traffic (`tests/test_h100.py` counts both), and no
  measurement on a GPU has shown the kernel to be faster. (`fused_update`,
  which XLA needs two passes for, chooses by the device it is compiled for.)

  Args:
    implementation: None, "xla" or "mosaic_gpu".
    *arrays: the operands; the first decides the size.
    residual_bits: bits a value of the operation's residual.

  Returns:
    "xla" or "mosaic_gpu".

  Raises:
    ValueError: for another name, or where the kernel cannot run.
  """
  check_name(implementation)
  if implementation in (None, "xla"):
    return "xla"
  if residual_bits not in (0, 8, 16):
    raise ValueError(
      '"mosaic_gpu" takes residuals of 0, 8 or 16 bits, which need no packing; got'
      f' {residual_bits} bits. "xla" takes every width.'
    )
  if arrays[0].size > MAX_SIZE:
    raise ValueError(f'"mosaic_gpu" takes at most {MAX_SIZE} elements; got {arrays[0].size}.')
  _check_devices(arrays)
  return implementation


def _check_devices(arrays):
  """Raises where the platform lacks Mosaic GPU, before anything is lowered.

  (Below compute capability 9.0, LLVM would abort the whole process.) Tracers
  have no device: under jit the default backend speaks if it is a GPU; if it is
  a CPU, the program may be compiled for another machine, or interpreted.
  """
  if _interpreter_is_forced():
    return
  concrete = [x for x in arrays if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
  if concrete:
    device = next(iter(concrete[0].devices()))
  elif jax.default_backend() == "gpu":
    device = jax.devices()[0]
  else:
    return
  if device.platform != "gpu" or float(getattr(device, "compute_capability", 0)) < 9.0:
    raise ValueError(
      '"mosaic_gpu" runs on NVIDIA GPUs of compute capability 9.0 (Hopper) or later, or on a'
      " CPU under jax.experimental.pallas.mosaic_gpu.force_gpu_interpret_mode();"
      f' the arrays are on {device.device_kind!r}. Use "xla" or None.'
    )


def _interpreter_is_forced() -> bool:
  # JAX has no public getter for what `force_gpu_interpret_mode` sets.
  from jax._src import config

  state = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
  return state is not None and state.value is not None


def elementwise(
  tile: Callable,
  *,
  key: jax.Array | None = None,
  reads: Sequence[jax.Array] = (),
  in_place: Sequence[jax.Array] = (),
  outputs: Sequence[jax.typing.DTypeLike] = (),
) -> list[jax.Array]:
  """Runs `tile` over arrays of one shape, as a kernel.

  Args:
    tile: `(bits, *reads, *in_place) -> (*in_place, *outputs)`, elementwise;
      bits are the stream's (`element_bits`) at the elements' places.
    key: uint32 [2], the stream's words, or None (then bits are None).
    reads: arrays that are only read.
    in_place: arrays that are replaced, in place where their buffers are donated.
    outputs: dtypes of the fresh results.

  Returns:
    The arrays of in_place, replaced, and the outputs, all in the common shape.
  """
  shape = (*reads, *in_place)[0].shape
  n = math.prod(shape)
  n_main = n // TILE * TILE
  reads = [x.reshape(n) for x in reads]
  refs = [jax.new_ref(x.reshape(n)) for x in in_place]
  refs += [jax.new_ref(jax.lax.empty((n,), dtype)) for dtype in outputs]
  keys = [] if key is None else [key]
  # 16-byte accesses at 16 bits each; a store wider than 16 bytes does not compile.
  layout = _layout(4 if any(ref.dtype.itemsize == 4 for ref in refs) else 8)

  def body(*operands):
    key_refs, read_refs = operands[: len(keys)], operands[len(keys) : len(keys) + len(reads)]
    written_refs = operands[len(keys) + len(reads) :]
    start = jax.lax.axis_index("tile") * TILE
    here = pl.ds(start, TILE)
    loaded = [
      plgpu.load(ref.at[here], layout=layout, optimized=False)
      for ref in (*read_refs, *written_refs[: len(in_place)])
    ]
    bits = None
    if key_refs:
      lane = plgpu.broadcasted_iota(jnp.uint32, (TILE,), 0, layout=layout)
      index = lane + start.astype(jnp.uint32)
      bits = element_bits((key_refs[0][0], key_refs[0][1]), index)
    for ref, value in zip(written_refs, tile(bits, *loaded), strict=True):
      ref[here] = value

  if n_main:
    plgpu.kernel(body, grid=(n_main // TILE,), grid_names=("tile",))(*keys, *reads, *refs)
  if n_main < n:
    end = slice(n_main, n)
    index = jax.lax.iota(jnp.uint32, n - n_main) + jnp.uint32(n_main)
    bits = None if key is None else element_bits((key[0], key[1]), index)
    loaded = [*(x[end] for x in reads), *(ref[end] for ref in refs[: len(in_place)])]
    for ref, value in zip(refs, tile(bits, *loaded), strict=True):
      ref[end] = value
  return [jax.freeze(ref).reshape(shape) for ref in refs]


BLOCK = 32  # neighbours with one scale
_HAS_STORE = hasattr(plgpu, "store")  # not in JAX 0.11.2
# Blocks in a tile; fewer than 32 for the end of an array, so that it needs no launch of its own.
_ROWS = (32, 16, 8, 4, 2, 1) if _HAS_STORE else (32,)


def _block_layout(rows: int):
  """A tile of whole blocks over 128 threads: a maximum over a block stays within a warp.

  Of 32 rows a lane has 8 neighbouring elements (16-byte accesses at 16 bits
  each); below 4 rows, some warps do the same work.
  """
  if rows >= 8:
    tiling = plgpu.Tiling(((rows, BLOCK), (rows // 4, BLOCK), (rows // 4,)))
    warp_dims, lane_dims = (-5,), (-3, -2)
  else:
    tiling = plgpu.Tiling(((rows, BLOCK), (1,)))
    warp_dims = {4: (-3,), 2: (-3, plgpu.Replicated(2)), 1: (plgpu.Replicated(4),)}[rows]
    lane_dims = (-2,)
  return plgpu.Layout.TILED(tiling, warp_dims=warp_dims, lane_dims=lane_dims, vector_dim=-1)


def takes_blocks(shape: tuple[int, ...]) -> bool:
  """Whether `blockwise` takes arrays of a shape: rows of whole blocks."""
  n = math.prod(shape)
  is_even = bool(shape) and shape[-1] % BLOCK == 0 and n % (_ROWS[-1] * BLOCK) == 0
  return is_even and 0 < n <= MAX_SIZE


class BlockLeaf(NamedTuple):
  """The operands of `blockwise` that belong to one array.

  Attributes:
    key: uint32 [2], the stream's words.
    reads: arrays of one shape that are only read, [blocks, 32].
    refs: what is replaced, likewise, of at most 16 bits a value.
    scale_refs: what is replaced, bfloat16 [blocks].
  """

  key: jax.Array
  reads: list[jax.Array]
  refs: list[jax.Ref]
  scale_refs: list[jax.Ref]


def blockwise(
  tile: Callable,
  leaves: Sequence[BlockLeaf],
  scalars: Sequence[jax.Array],
  when: jax.Array | None,
):
  """Runs `tile` over the blocks of some arrays, as one kernel, in place.

  Args:
    tile: `(bits, scalars, reads, values, scales) -> (values, scales)`, on
      lists of arrays: [rows, 32] for some blocks, and [rows] for their scales;
      bits(lane) are the stream's (`element_bits`).
    leaves: the arrays.
    scalars: float32, what tile's scalars are.
    when: a bool: where it is False nothing is written; or None.
  """
  numbers = [jnp.stack([jnp.asarray(x, jnp.float32) for x in scalars])] if scalars else []
  flags = [] if when is None else [jnp.asarray(when).astype(jnp.int32).reshape(1)]
  groups = _groups([leaf.refs[0].shape[0] for leaf in leaves])
  table = np.concatenate([group.table for group in groups])
  tables = [jnp.asarray(table)] if any(len(group.leaves) > 1 for group in groups) else []
  operands, treedef = jax.tree.flatten((numbers, flags, tables, list(leaves)))

  def body(*refs):
    number_refs, flag_refs, table_refs, leaf_refs = treedef.unflatten(refs[: len(operands)])
    program = jax.lax.axis_index("tile")
    numbers = [ref[i] for ref in number_refs for i in range(len(scalars))]
    taken = [flag_refs[0][0] != 0] if flag_refs else []
    first = 0
    for group in groups:

      def run(group=group, first=first):
        mine = [leaf_refs[i] for i in group.leaves]
        if len(mine) > 1:
          place = table_refs[0][program, 0], table_refs[0][program, 1]
        else:
          place = None, (program - first) * group.rows + int(group.table[0, 1])
        _run_tile(tile, group.rows, mine, *place, numbers, refs[len(operands) :])

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
    scratch_types=[] if _HAS_STORE else [plgpu.SMEM((_ROWS[0],), jnp.bfloat16)] * most_scales,
    # From 4 rows on, every thread writes what it alone has read (a warp, of the scales).
    compiler_params=plgpu.CompilerParams(
      unsafe_no_auto_barriers=min(group.rows for group in groups) >= 4
    ),
  )(*operands)


class _Group(NamedTuple):
  """The tiles of one size.

  Attributes:
    rows: how many blocks they have.
    leaves: the arrays that have such tiles.
    table: int32 [tiles, 2]: each tile's place in leaves, and its first block.
  """

  rows: int
  leaves: list[int]
  table: np.ndarray


def _groups(blocks: Sequence[int]) -> list[_Group]:
  """How arrays of so many blocks are cut: tiles of 32 blocks, and smaller ones for the rest."""
  groups, done = [], [0] * len(blocks)
  for rows in _ROWS:
    leaves, table = [], []
    for i, n in enumerate(blocks):
      if n - done[i] >= rows:
        starts = range(done[i], n - rows + 1, rows)
        table += [(len(leaves), start) for start in starts]
        leaves.append(i)
        done[i] += len(starts) * rows
    if table:
      groups.append(_Group(rows, leaves, np.array(table, np.int32)))
  return groups


def tile_rows(shapes: Sequence[tuple[int, ...]]) -> list[int]:
  """How many blocks the tiles have that `blockwise` walks arrays of these shapes in."""
  return [group.rows for group in _groups([math.prod(shape) // BLOCK for shape in shapes])]


def _run_tile(tile, rows: int, leaves: list[BlockLeaf], which, start, scalars, shared_refs):
  """One tile, in a kernel: of the only array, or of number `which`."""
  layout, blocks = _block_layout(rows), pl.ds(start, rows)

  def load(leaf: BlockLeaf):
    def array(ref, layout=layout):
      return plgpu.load(ref.at[blocks], layout=layout, optimized=False)

    return (
      (leaf.key[0], leaf.key[1]),
      [array(ref) for ref in leaf.reads],
      [array(ref) for ref in leaf.refs],
      [array(ref, layout.reduce(1)) for ref in leaf.scale_refs],
    )

  def store(leaf: BlockLeaf, values, scales):
    for ref, value in zip(leaf.refs, values, strict=True):
      if rows == _ROWS[0]:
        ref[blocks] = value
      else:  # too narrow for stores that count as optimized
        plgpu.store(ref.at[blocks], value, optimized=False)
    if _HAS_STORE:
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
    branches = [functools.partial(f, leaf) for leaf in leaves]
    return branches[0](*args) if which is None else jax.lax.switch(which, branches, *args)

  words, reads, values, scales = choose(load)
  row, column = (
    plgpu.broadcasted_iota(jnp.uint32, (rows, BLOCK), axis, layout=layout) for axis in (0, 1)
  )
  index = (row + start.astype(jnp.uint32)) * jnp.uint32(BLOCK) + column
  bits = lambda lane: element_bits(words, index, lane=lane)
  choose(store, *tile(bits, scalars, reads, values, scales))
