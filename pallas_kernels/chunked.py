"""The step of a leaf on one CPU: chunk after chunk, each small enough to stay in the cache.

XLA:CPU computes every result in a loop of its own and either repeats what they
share or writes it to memory. Here what they share is computed once a chunk,
behind an optimization barrier, which XLA:CPU keeps (XLA:GPU does not). The
results of a chunk pass a last barrier together, before any of them is written:
what reads the old state after the first write makes XLA copy all of it.
`python -m benchmarks.step cpu` measures it.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import arithmetic, state_formats
from pallas_kernels.random_bits import element_bits, statistic_bits, whole_place
from pallas_kernels.state_formats import BLOCK, Blocks

_U32 = jnp.uint32
_keep = jax.lax.optimization_barrier
CHUNK = 12_500  # blocks, 400,000 values; half and twice as many are alike


def takes(shape: tuple[int, ...], fmt) -> bool:
  """Whether `step` takes a leaf: rows of whole blocks, a residual that needs no packing."""
  is_even = bool(shape) and shape[-1] % BLOCK == 0 and 0 < math.prod(shape) < 1 << 32
  return is_even and not fmt.is_full_precision and fmt.residual_bits in (0, 8, 16)


def sizes(shape: tuple[int, ...]) -> list[int]:
  """How many blocks the chunks of a leaf have."""
  blocks = math.prod(shape) // BLOCK
  if blocks < 2 * CHUNK:  # no loop
    return [blocks]
  return [CHUNK, blocks % CHUNK] if blocks % CHUNK else [CHUNK]


def step(rule, formats, gradient, low, delta, statistics, stream, when, index=None, window=None):
  """`fused_update_leaves`' arguments and results; the rule closes over no array.

  With a window in units of blocks along the last axis, low is a part of a whole.
  """
  state = (low, delta, statistics)
  in_blocks = lambda x: x.reshape(-1, BLOCK) if x.size == low.size else x.reshape(-1)
  flat, gradient = jax.tree.map(in_blocks, state), gradient.reshape(-1, BLOCK)
  blocks = gradient.shape[0]
  first = 0 if index is None else jnp.asarray(index).astype(jnp.int32) * blocks

  def at(start, count: int, flat):
    cut = lambda x, start=first + start: jax.lax.dynamic_slice_in_dim(x, start, count)
    # As a sum with the row, or XLA takes it out of the loop and keeps it in memory.
    row = jax.lax.broadcasted_iota(_U32, (count, 1), 0) + jnp.asarray(first + start).astype(_U32)
    row = whole_place(row, (*low.shape[:-1], low.shape[-1] // BLOCK), window)
    place = row * _U32(BLOCK) + jax.lax.broadcasted_iota(_U32, (count, BLOCK), 1)
    cut_low, cut_delta, cut_statistics = jax.tree.map(cut, flat)
    stored = cut(gradient, start), cut_low, cut_delta, cut_statistics
    new = _chunk(rule, formats, *stored, place, stream, when)
    put = lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, first + start, 0)
    return jax.tree.map(put, flat, new)

  whole = blocks // CHUNK if blocks >= 2 * CHUNK else 0
  if whole:
    flat = jax.lax.fori_loop(0, whole, lambda i, flat: at(i * CHUNK, CHUNK, flat), flat)
  if rest := blocks - whole * CHUNK:
    flat = at(whole * CHUNK, rest, flat)
  return jax.tree.map(lambda x, y: x.reshape(y.shape), flat, state)


def _chunk(rule, formats, gradient, low, delta, statistics, place, stream, when):
  """The step of [blocks, 32] values; scales are [blocks]."""
  fmt, statistic_formats = formats
  bits = lambda lane: element_bits((stream[0], stream[1]), place, lane=lane)
  gradient = arithmetic.as_float32(gradient)
  wide = None if delta is None else delta.astype(jnp.int32)
  master = arithmetic.merge_values(low, wide, fmt)
  codes = [x.codes if isinstance(x, Blocks) else x for x in statistics]
  scales = [x.scale if isinstance(x, Blocks) else None for x in statistics]
  old = list(map(state_formats.dequantize_blocks, codes, scales, statistic_formats))
  update, values = rule(gradient, master, old)
  new_statistics = []
  for i, (x, f) in enumerate(zip(values, statistic_formats, strict=True)):
    draw = statistic_bits(bits, i)
    if not f.has_scale:
      new_statistics.append(state_formats.quantize(x, f, draw))
      continue
    x = jnp.sqrt(x) if f.is_square else x
    # As floats: XLA:CPU has a vectorized maximum of those, which drops a NaN but no infinity.
    x = _keep(jnp.where(x == x, x, jnp.inf))
    largest = _keep(jnp.max(jnp.abs(x), axis=-1))
    scale_code = state_formats.scale_code(state_formats.magnitude_bits(largest), f)
    scale = _keep(arithmetic.low_of(scale_code, jnp.bfloat16))
    new_statistics.append(Blocks(state_formats.encode(x, scale, f, draw), scale))
  word = old_word = _word(low, wide)
  if update is not None:
    word = _word(*arithmetic.apply_values(low, wide, update, fmt, bits(0)))
  if when is not None:
    word, new_statistics = jax.tree.map(
      lambda x, y: jnp.where(when, x, y), (word, new_statistics), (old_word, statistics)
    )
  word, new_statistics = _keep((word, new_statistics))
  if delta is None:
    return arithmetic.low_of(word, fmt.dtype), None, new_statistics
  new_delta = (word & _U32(0xFFFF)).astype(jnp.uint16)
  new_delta = jax.lax.bitcast_convert_type(new_delta, jnp.int16).astype(delta.dtype)
  return arithmetic.low_of(word >> _U32(16), fmt.dtype), new_delta, new_statistics


def _word(low, wide):
  """Weight and residual in one word, so that one loop computes both."""
  bits = arithmetic.low_bits_of(low)
  return bits if wide is None else (bits << _U32(16)) | (wide.astype(_U32) & _U32(0xFFFF))
