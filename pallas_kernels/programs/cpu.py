"""The step of leaves on one CPU: chunk by chunk, each small enough to stay in the cache.

XLA:CPU computes every result in a loop of its own. It either recomputes values
that several results share or writes them to memory. Here an optimization barrier,
which XLA:CPU keeps (XLA:GPU does not), computes shared values once a chunk. The
results of a chunk pass one last barrier together before any of them is written,
because XLA copies the whole state if anything reads it after the first in-place
write. ``python -m benchmarks.step cpu`` measures the step.
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.formats import arithmetic, packing, state_formats
from pallas_kernels.formats.random_bits import element_bits, lane_bits, statistic_bits, whole_place
from pallas_kernels.formats.state_formats import BLOCK, Blocks
from pallas_kernels.programs import joined
from pallas_kernels.programs.leaf import Leaf, bound

_U32 = jnp.uint32
_keep = jax.lax.optimization_barrier
CHUNK = 6_250  # blocks, 200,000 values; half or twice as many are as fast
# A leaf with fewer blocks is joined with others: alone, it would take half a second to compile for
# a step of a millisecond.
JOINED = 1 << 13


def takes(leaf, fmt) -> bool:
  """Whether ``step`` takes a leaf."""
  return joined.takes(leaf.gradient, leaf.low, fmt)


def step(rules, formats, lands, scalars, leaves: Sequence[Leaf], when, index=None, windows=None):
  """The step on one CPU, with the arguments and results of ``fused_update_leaves``."""
  rule = bound(rules, scalars, keep=_keep)
  windows = windows or [None] * len(leaves)
  small = [i for i, x in enumerate(leaves) if joined.blocks_in(x.gradient.shape) < JOINED]
  program = functools.partial(_step_joined, rule, formats, lands, when)

  def alone(leaf, window):
    return _step_large(rule, formats, lands, leaf, when, index, window)

  return joined.step_small(
    small, program, alone, leaves, formats[1], index, windows, CHUNK, on_gpu=False
  )


def _step_joined(rule, formats, lands, when, leaf, draws):
  gradient, low, delta, statistics = leaf[:4]
  new = _chunk(
    rule, formats, lands, gradient, low, delta, statistics, draws.words, draws.places(),
    draws.valid, when,
  )  # fmt: skip
  return _keep(new)  # otherwise every leaf that is cut off is a kernel that computes codes


def chunk_rows(rows: int, blocks_a_row: int) -> list[int]:
  """The rows in a leaf's chunks: one size if a good one divides the leaf, else a remainder, too."""
  best = max(1, CHUNK // blocks_a_row)
  if rows == 1 or rows * blocks_a_row < min(JOINED, 2 * CHUNK):  # no loop
    return [rows]
  for count in range(max(2, -(-rows // (2 * best))), max(2, 2 * rows // best) + 1):
    if rows % count == 0 and rows // count <= 2 * best:
      return [rows // count]
  return [best, rows % best] if rows % best else [best]


def _step_large(rule, formats, lands, leaf, when, index=None, window=None):
  """The step of a leaf in chunks of whole rows."""
  fmt, statistic_formats = formats
  gradient, low, delta, statistics, stream = leaf
  shape = gradient.shape
  rows, n = joined.rows_of(shape)
  if n % BLOCK == 0:  # makes every block a row, so a chunk can be any number of blocks
    rows, n = rows * n // BLOCK, BLOCK
  in_row = -(-n // BLOCK)
  is_packed = delta is not None and delta.dtype == jnp.uint8

  def by_row(x):
    count = low.size // n  # rows in the whole stack
    return x.reshape(count, x.size // count)

  state = low, delta, statistics
  flat, gradient = jax.tree.map(by_row, state), gradient.reshape(rows, n)
  # With `lands`, the new weights take the gradients' memory, and the old weights stay.
  landed = None
  if lands:
    landed = gradient if gradient.dtype == low.dtype else jnp.zeros((rows, n), low.dtype)
  first = 0 if index is None else jnp.asarray(index).astype(jnp.int32) * rows
  column = jax.lax.broadcasted_iota(jnp.int32, (in_row, BLOCK), 0) * BLOCK
  column += jax.lax.broadcasted_iota(jnp.int32, (in_row, BLOCK), 1)

  def at(start, count: int, carry):
    flat, landed = carry
    values = gradient if landed is None or landed.dtype != gradient.dtype else landed
    cut = lambda x, start=first + start: jax.lax.dynamic_slice_in_dim(x, start, count)
    # The sum includes the row; otherwise XLA hoists it out of the loop and keeps it in memory.
    places = jax.lax.broadcasted_iota(_U32, (count, in_row, BLOCK), 0)
    places = (places + jnp.asarray(first + start).astype(_U32)) * _U32(n)
    places += jax.lax.broadcasted_iota(_U32, (count, in_row, BLOCK), 1) * _U32(BLOCK)
    places += jax.lax.broadcasted_iota(_U32, (count, in_row, BLOCK), 2)
    places = whole_place(places, low.shape, window).reshape(-1, BLOCK)
    valid = None
    if n % BLOCK:
      valid = jnp.broadcast_to(column < n, (count, in_row, BLOCK)).reshape(-1, BLOCK)
    cut_low, cut_delta, cut_statistics = jax.tree.map(cut, flat)
    cut_delta = cut_delta if cut_delta is None else (
      cut_delta.reshape(count * in_row, -1) if is_packed else _filled_up(cut_delta)
    )  # fmt: skip
    cut_statistics = [
      Blocks(_filled_up(_as_dtype(x.codes, f), f.in_block), x.scale.reshape(-1, 1))
      if isinstance(x, Blocks)
      else _filled_up(x)
      for x, f in zip(cut_statistics, statistic_formats, strict=True)
    ]
    new = _chunk(
      rule, formats, lands, _filled_up(cut(values, start)), _filled_up(cut_low), cut_delta,
      cut_statistics, tuple(stream), places, valid, when,
    )  # fmt: skip
    if n % BLOCK:
      new = _keep(new)

    def put(x, y):
      y = y.reshape(count, -1)[:, : x.shape[-1]]
      if y.dtype != x.dtype:
        y = jax.lax.bitcast_convert_type(y, x.dtype)
      return jax.lax.dynamic_update_slice_in_dim(x, y, first + start, 0)

    if not lands:
      return jax.tree.map(put, flat, new), None
    y = joined.cut_off(new[0], (count, n))
    landed = jax.lax.dynamic_update_slice_in_dim(landed, y, start, 0)
    return (flat[0], *jax.tree.map(put, flat[1:], new[1:])), landed

  size, *rest = chunk_rows(rows, in_row)
  whole = rows // size
  carry = flat, landed
  if whole > 1:
    carry = jax.lax.fori_loop(
      0, whole, lambda i, carry: at(_in_threads(i) * size, size, carry), carry
    )
  else:
    carry = at(0, size, carry)
  if rest:
    carry = at(whole * size, rest[0], carry)
  flat, landed = carry
  low, delta, statistics = jax.tree.map(lambda x, y: x.reshape(y.shape), flat, state)
  return low if landed is None else landed.reshape(shape), delta, statistics


def _filled_up(x, block: int = BLOCK):
  """Rows -> [blocks, block]; pads a short end once, because finding it is costly."""
  rows, n = x.shape
  if n % block:
    # XLA:CPU computes a pad value by value. The barriers keep it from turning this into one.
    zeros = _keep(jnp.zeros((rows, -(-n // block) * block), x.dtype))
    x = _keep(jax.lax.dynamic_update_slice(zeros, x, (0, 0)))
  return x.reshape(-1, block)


def _as_dtype(codes, fmt):
  """Packed codes as those of an even last axis: here, every row is whole blocks."""
  return jax.lax.bitcast_convert_type(codes, jnp.uint8) if fmt.is_packed else codes


def _in_threads(i):
  """The counter of a loop, computed so that XLA:CPU runs the loop on several threads.

  XLA:CPU compiles a loop into one function for one thread, unless the loop contains an
  instruction that this function cannot hold, like a sort:
  https://github.com/openxla/xla/blob/main/xla/service/cpu/small_while_loop_hoisting_pass.cc
  """
  return jax.lax.sort(jnp.stack([i, i + 1]))[0]


def _chunk(
  rule, formats, lands, gradient, low, delta, statistics, words, places, valid, when
):  # fmt: skip
  """Steps [blocks, 32] values; scales are [blocks, 1]."""
  fmt, statistic_formats = formats
  shape = gradient.shape
  word = own_word = _keep(element_bits(words[:2], places))
  if len(words) == 4:
    own_word = _keep(element_bits(words[2:], places))
  gradient = arithmetic.as_float32(gradient)
  wide = packing.unpack(delta, shape, fmt)
  master = low if fmt.is_full_precision else arithmetic.merge_values(low, wide, fmt)
  old = [state_formats.dequantize(x, f) for x, f in zip(statistics, statistic_formats, strict=True)]
  update, values = rule(gradient, master, old)
  weight = low, delta
  if update is not None:
    weight = _weight(fmt, lands, low, wide, delta, update, word)
  scales = []
  for i, (x, f) in enumerate(zip(values, statistic_formats, strict=True)):
    if valid is not None:  # padding must not enter a block's scale
      x = jnp.where(valid, x, 0)
    values[i] = _keep(jnp.sqrt(x) if f.has_scale and f.is_square else x)
    if f.has_scale:
      code = state_formats.scale_code(_largest(values[i]), f)
      code = state_formats.held(code, statistics[i].scale[:, 0], f)
      scales.append(arithmetic.low_of(code, jnp.bfloat16))
    else:
      scales.append(None)
  # Every read of the state happens before this barrier. Codes are computed as they are written.
  weight, values, scales, own_word = _keep((weight, values, scales, own_word))
  new_statistics = []
  for i, (x, scale, f) in enumerate(zip(values, scales, statistic_formats, strict=True)):
    draw = statistic_bits(functools.partial(lane_bits, own_word), i)
    if f.has_scale:
      codes = state_formats.encode(x, scale, f, draw)
      new_statistics.append(Blocks(state_formats.pack(codes, f), scale[:, None]))
    else:
      new_statistics.append(state_formats.quantize(x, f, draw))
  new = (*_stored(weight, fmt, delta), new_statistics)
  if when is None:
    return new
  return _keep(jax.tree.map(lambda x, y: jnp.where(when, x, y), new, (low, delta, statistics)))


def _largest(x):
  """The bit pattern of each block's largest magnitude; a maximum of patterns drops no NaN."""
  # Two steps: the first works on whole vectors.
  pattern = state_formats.magnitude_bits(x).astype(jnp.int32)
  pattern = _keep(jnp.max(pattern.reshape(-1, 4, BLOCK // 4), axis=1))
  return jnp.max(pattern, axis=-1).astype(_U32)


def _weight(fmt, lands, low, wide, delta, update, word):
  """The new weight and residual; if they fit, as one 32-bit word, which one loop computes."""
  if fmt.is_full_precision:
    return low + update, None
  new_low, new_wide = arithmetic.move_values(low, wide, update, fmt, word, lands)
  if delta is None or delta.dtype == jnp.uint8:
    return new_low, packing.pack(new_wide, fmt)
  return ((arithmetic.low_bits_of(new_low) << _U32(16)) | (new_wide.astype(_U32) & _U32(0xFFFF)),)


def _stored(weight, fmt, delta):
  """Splits the result of ``_weight`` into weight and residual."""
  if len(weight) == 2:
    return weight
  (word,) = weight
  residual = jax.lax.bitcast_convert_type((word & _U32(0xFFFF)).astype(jnp.uint16), jnp.int16)
  return arithmetic.low_of(word >> _U32(16), fmt.dtype), residual.astype(delta.dtype)
