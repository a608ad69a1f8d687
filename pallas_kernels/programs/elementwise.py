"""Launching, tiling and aliasing of elementwise Mosaic GPU kernels, in one place.

The body of a kernel is a function of one tile in registers:
``tile(bits, *reads, *in_place) -> (*in_place, *outputs)``. A kernel treats arrays
of any shape as one dimension, 1,024 elements (one warpgroup) a program. An array
that is updated in place is a ``jax.Ref``, so XLA aliases it to the donated buffer
and needs no temporary. XLA computes the ragged end on the refs, after the kernel;
slicing it off before the kernel would copy everything.
"""

from collections.abc import Callable, Sequence
import math

import jax
import jax.numpy as jnp

from pallas_kernels.formats.random_bits import element_bits

TILE = 1024  # elements a program


def elementwise(
  tile: Callable,
  *,
  key: jax.Array | None = None,
  reads: Sequence[jax.Array] = (),
  in_place: Sequence[jax.Array] = (),
  outputs: Sequence[jax.typing.DTypeLike] = (),
) -> list[jax.Array]:
  """Runs ``tile`` over arrays of one shape, as a kernel.

  Args:
    tile: ``(bits, *reads, *in_place) -> (*in_place, *outputs)``, elementwise;
      bits are the stream's ``element_bits`` at the elements' places.
    key: uint32 [2], the words of the stream; None if tile takes no bits.
    reads: arrays that are only read.
    in_place: arrays that are replaced, in place if their buffers are donated.
    outputs: the dtypes of the fresh results.

  Returns:
    The new arrays of in_place, then the outputs, all in the common shape.
  """
  # Imported here: it takes 0.2 s, which a program without kernels should not pay.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  shape = (*reads, *in_place)[0].shape
  n = math.prod(shape)
  n_main = n // TILE * TILE
  reads = [x.reshape(n) for x in reads]
  refs = [jax.new_ref(x.reshape(n)) for x in in_place]
  refs += [jax.new_ref(jax.lax.empty((n,), dtype)) for dtype in outputs]
  keys = [] if key is None else [key]
  # A thread accesses 16 bytes at once if values have 16 bits. A wider store does not compile.
  vector = 4 if any(ref.dtype.itemsize == 4 for ref in refs) else 8
  tiling = plgpu.Tiling(((128 * vector,), (32 * vector,), (vector,)))  # over 128 threads
  layout = plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

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
