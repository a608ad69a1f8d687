"""Launching, tiling and aliasing of elementwise Mosaic GPU kernels, in one place.

A kernel here is a function on arrays that is called on one tile in registers:
`tile(bits, *reads, *in_place) -> (*in_place, *outputs)`. Arrays of any shape
are walked as one dimension, 1,024 elements (one warpgroup) a program. What is
updated in place is a `jax.Ref`, so that XLA aliases it to the donated buffer
and needs no temporary; the ragged end is computed by XLA, on the refs and
after the kernel (slicing it off before would copy everything).
"""

from collections.abc import Callable, Sequence
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.random_bits import element_bits

Implementation = Literal["xla", "mosaic_gpu"]

TILE = 1024  # elements a program


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
  if interpreter_is_forced():
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


def interpreter_is_forced() -> bool:
  """Whether kernels run on a CPU under JAX's GPU interpreter."""
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
  # Here, since importing them takes 0.2 s, which a program without kernels does not need.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import mosaic_gpu as plgpu

  shape = (*reads, *in_place)[0].shape
  n = math.prod(shape)
  n_main = n // TILE * TILE
  reads = [x.reshape(n) for x in reads]
  refs = [jax.new_ref(x.reshape(n)) for x in in_place]
  refs += [jax.new_ref(jax.lax.empty((n,), dtype)) for dtype in outputs]
  keys = [] if key is None else [key]
  # 16-byte accesses at 16 bits each; a store wider than 16 bytes does not compile.
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
