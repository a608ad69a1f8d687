"""Storage of optimizer statistics between steps: 32, 16, 8 or 4 bits a value.

- "fp32": unchanged.
- "bf16": rounded stochastically. Rounding to nearest would stall an average
  with a decay of 0.999: its step of 0.1% is less than half a grid step.
- "fp16": the value divided by its block's scale, in float16, rounded
  stochastically.
- "int8": a signed integer c for the value ``scale * (c / 127)**2``, or, for a
  second moment, an unsigned c for the square root ``scale * c / 255``; rounded
  stochastically.
- "int4": two codes to a byte: ``scale * (c / 7)**2``, or, for the root of a second
  moment, zero and ``scale * (c - 1/2) / 14.5``. A second moment's scale stays while
  it is up to half an octave too large, because every change of the scale rounds all
  codes of the block again.

A block is 32 neighbours along the last axis; the last block of a row may be
short. Its scale is its largest magnitude, rounded up to bfloat16. A sharding
along any leading axis, or along the last axis in whole blocks, therefore
changes no value.

A format with scales stores a second moment (``is_square``) as its square root,
unsigned. It never rounds a positive second moment to zero, because Adam divides
by it.

Rounding is unbiased in the stored quantity. ``docs/state_formats.md`` compares
these laws with others.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.formats import arithmetic
from pallas_kernels.formats.weights import short_name

_U32, _I32 = jnp.uint32, jnp.int32

BLOCK = 32
Name = Literal["fp32", "bf16", "fp16", "int8", "int4"]
NAMES = get_args(Name)
# With a smaller scale, the largest code divided by the scale overflows.
MIN_SCALE = 2.0**-103
# The square of a smaller root does not survive a step. The smallest integer code stands for more.
MIN_ROOT = 2.0**-62
MIN_ROOT_SCALE = 2.0**-54
_NEAREST = 0x4B000000  # the bit pattern of 2.0**23; see `_nearest`


def _hint(name) -> str:
  """What to write instead of a dtype."""
  integers = {"int8": jnp.int8, "int4": jnp.int4}
  found = [short for short, x in integers.items() if name in (x, jnp.dtype(x))]
  short = found[0] if found else short_name(name)
  return "" if short is None else f' Write "{short}".'


@dataclasses.dataclass(frozen=True)
class StateFormat:
  """The format of one statistic.

  Args:
    name: ``"fp32"``, ``"bf16"``, ``"fp16"``, ``"int8"`` or ``"int4"``.
    is_square: True for a second moment, which is never negative and which the
      optimizer uses through its square root.

  Raises:
    ValueError: if the name is not one of these.

  Examples:
    >>> from pallas_kernels import StateFormat
    >>> StateFormat("int8", is_square=True).bits_per_value
    8.5

  References:
    `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`__
  """

  name: Name
  is_square: bool = False

  def __post_init__(self):
    if not isinstance(self.name, str) or self.name not in NAMES:
      raise ValueError(
        f"A state format must be one of {NAMES}; got {self.name!r}.{_hint(self.name)}"
      )

  @property
  def has_scale(self) -> bool:
    """True if the format stores values in blocks, each with a scale."""
    return self.name in ("fp16", "int8", "int4")

  @property
  def is_packed(self) -> bool:
    """True if the format stores two codes to a byte."""
    return self.name == "int4"

  @property
  def in_block(self) -> int:
    """The number of stored codes, or bytes of packed ones, in a full block."""
    return BLOCK // 2 if self.is_packed else BLOCK

  @property
  def dtype(self):
    """The dtype of the stored values, before they are packed."""
    if self.name in ("int8", "int4"):
      return jnp.dtype(jnp.uint8 if self.is_square else jnp.int8)
    return jnp.dtype({"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}[self.name])

  @property
  def bits_per_value(self) -> float:
    """Bits a value, including its share of the scale of a full block."""
    bits = 4 if self.is_packed else self.dtype.itemsize * 8
    return bits + (16 / BLOCK if self.has_scale else 0)

  @property
  def levels(self) -> int:
    """The largest integer code."""
    signed = 7 if self.is_packed else 127
    return 2 * signed + 1 if self.is_square else signed

  @property
  def top(self) -> float:
    """The value of the largest code in steps."""
    if not self.is_square:
      return float(self.levels**2)
    return self.levels - 0.5 if self.is_packed else float(self.levels)

  @property
  def holds_scale(self) -> bool:
    """True if a block keeps its scale while that is little too large."""
    return self.is_packed and self.is_square


class Blocks(NamedTuple):
  """A statistic in blocks along its last axis.

  Attributes:
    codes: [..., n], in the format's dtype: the values divided by their scales. Packed
      codes are [..., ceil(n / 2)], uint8 if n is even, otherwise int8.
    scale: bfloat16 [..., ceil(n / 32)]; a scalar for a scalar.
  """

  codes: Any  # an array, or its placeholder in a tree of shapes or shardings
  scale: Any


def stored_struct(shape: tuple[int, ...], fmt: StateFormat):
  """The result of ``quantize`` for a shape, as ``jax.ShapeDtypeStruct``s."""
  codes = _packed_struct(shape) if fmt.is_packed else jax.ShapeDtypeStruct(shape, fmt.dtype)
  if not fmt.has_scale:
    return codes
  scale = (*shape[:-1], -(-shape[-1] // BLOCK)) if shape else ()
  return Blocks(codes, jax.ShapeDtypeStruct(scale, jnp.bfloat16))


def _packed_struct(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
  """The bytes of packed codes of a shape; the dtype tells an odd last axis from an even one."""
  n = shape[-1] if shape else 1
  return jax.ShapeDtypeStruct(
    (*shape[:-1], -(-n // 2)) if shape else (), jnp.int8 if n % 2 else jnp.uint8
  )


def pack(codes: jax.Array, fmt: StateFormat) -> jax.Array:
  """Codes [..., n] -> their storage, two neighbours along the last axis to a byte if packed.

  The first neighbour takes the lower bits.
  """
  if not fmt.is_packed:
    return codes
  struct = _packed_struct(codes.shape)
  # Otherwise XLA keeps the float32 values that they come from; see `packing.pack`.
  c = jax.lax.optimization_barrier(codes)
  c = c.reshape(c.shape or (1,)).astype(_I32)
  if c.shape[-1] % 2:
    c = jnp.pad(c, [(0, 0)] * (c.ndim - 1) + [(0, 1)])
  c = c.reshape(*c.shape[:-1], c.shape[-1] // 2, 2)
  byte = arithmetic.two_integers(c[..., 0], c[..., 1], 4)
  return jax.lax.bitcast_convert_type(byte.astype(jnp.uint8), struct.dtype).reshape(struct.shape)


def unpack(stored: jax.Array, fmt: StateFormat) -> jax.Array:
  """The inverse of ``pack``."""
  if not fmt.is_packed:
    return stored
  byte = stored.reshape(*(stored.shape or (1,)), 1)
  # A broadcast: XLA would not fuse a concatenation.
  which = jax.lax.iota(_I32, 2)
  c = arithmetic.integer_in(byte, which, 4, not fmt.is_square).astype(fmt.dtype)
  c = c.reshape(*byte.shape[:-2], 2 * byte.shape[-2])
  if stored.dtype == jnp.int8:  # an odd last axis
    c = c[..., :-1]
  return c if stored.shape else c.reshape(())


def quantize(
  x: jax.Array, fmt: StateFormat, bits: jax.Array | None, scale: jax.Array | None = None
):
  """float32 -> its storage.

  A block that contains an infinity or a NaN decodes to NaN and infinity only.

  Args:
    x: float32 [...].
    fmt: the format.
    bits: random uint32 [...]; the upper 16 bits are used. None for "fp32".
    scale: ``block_scale`` of x, if the caller has computed it already.

  Returns:
    ``Blocks``, or an array if the format has no scale.
  """
  if fmt.name == "fp32":
    return x
  if fmt.name == "bf16":
    return _keep_positive(x, arithmetic.round_to(x, jnp.bfloat16, "stochastic", bits), fmt)
  x_KxB, bits_KxB = _in_blocks(jnp.sqrt(x) if fmt.is_square else x), _in_blocks(bits)
  if scale is None:
    scale = block_scale(x, fmt)
  codes = encode(x_KxB, scale.reshape(x_KxB.shape[:-1]), fmt, bits_KxB)
  return Blocks(pack(_off_blocks(codes, x.shape), fmt), scale)


def block_scale(x: jax.Array, fmt: StateFormat, old: jax.Array | None = None) -> jax.Array:
  """The scales of float32 values [...], in the layout of ``Blocks``; old are those before."""
  x_KxB = _in_blocks(jnp.sqrt(x) if fmt.is_square else x)
  # Each magnitude is rounded to a 16-bit scale first: XLA keeps nothing else between its two
  # passes. The maximum is over bit patterns, so it cannot drop a NaN.
  codes = scale_code(magnitude_bits(x_KxB), fmt)
  code_K = jnp.max(codes.astype(jnp.uint16), axis=-1, initial=0)
  if old is not None:
    code_K = held(code_K, old.reshape(code_K.shape), fmt).astype(jnp.uint16)
  scale_K = jax.lax.bitcast_convert_type(code_K, jnp.bfloat16)
  return scale_K.reshape(stored_struct(x.shape, fmt).scale.shape)


def zeros_like(x: jax.Array, fmt: StateFormat):
  """The storage of zeros, with the sharding that ``quantize`` would give x's storage."""
  codes_KxB = _in_blocks(jnp.where(x == x, 0, 0).astype(fmt.dtype))
  if not fmt.has_scale:
    return _off_blocks(codes_KxB, x.shape)
  # The sum is zero, but it propagates x's sharding before XLA simplifies it.
  scale_K = jnp.sum(codes_KxB, axis=-1, dtype=jnp.float32)
  codes_KxB = codes_KxB + scale_K[..., None].astype(fmt.dtype)
  scale = scale_K.astype(jnp.bfloat16).reshape(stored_struct(x.shape, fmt).scale.shape)
  return Blocks(pack(_off_blocks(codes_KxB, x.shape), fmt), scale)


def dequantize(stored, fmt: StateFormat) -> jax.Array:
  """Storage -> float32.

  Args:
    stored: the result of ``quantize``.
    fmt: the format.

  Returns:
    float32 of the statistic's shape.
  """
  if fmt.name == "fp32":
    return stored
  if fmt.name == "bf16":
    return arithmetic.widen(stored)
  codes = unpack(stored.codes, fmt)
  codes_KxB = _in_blocks(codes)
  x_KxB = decode(codes_KxB, stored.scale.reshape(codes_KxB.shape[:-1]), fmt)
  return _off_blocks(x_KxB * x_KxB if fmt.is_square else x_KxB, codes.shape)


def dequantize_blocks(codes_KxB, scale_K, fmt: StateFormat, across):
  """``dequantize`` of a tile of blocks; scale_K is None if the format has no scale.

  across broadcasts [K] to [K, B].
  """
  if not fmt.has_scale:
    return dequantize(codes_KxB, fmt)
  x_KxB = decode(codes_KxB, scale_K, fmt, across)
  return x_KxB * x_KxB if fmt.is_square else x_KxB


def _largest(magnitudes_KxB):
  return jnp.max(magnitudes_KxB, axis=-1)


def quantize_blocks(parts_KxB, fmt: StateFormat, bits_KxB, across, largest=_largest, old_K=None):
  """``quantize`` of a tile of blocks: (codes, scales); scales is None if the format has none.

  parts_KxB are the blocks' values in one or more parts, and bits_KxB their random
  bits; the codes come in the same parts. across broadcasts [K] to [K, B]; largest
  reduces int32 [K, B] to [K]; old_K are the scales before.
  """
  if not fmt.has_scale:
    return [quantize(x, fmt, bits) for x, bits in zip(parts_KxB, bits_KxB, strict=True)], None
  parts_KxB = [jnp.sqrt(x) if fmt.is_square else x for x in parts_KxB]
  of_parts_K = [largest(magnitude_bits(x).astype(_I32)) for x in parts_KxB]
  code_K = scale_code(functools.reduce(jnp.maximum, of_parts_K).astype(_U32), fmt)
  scale_K = arithmetic.low_of(held(code_K, old_K, fmt), jnp.bfloat16)
  pairs = zip(parts_KxB, bits_KxB, strict=True)
  return [encode(x, scale_K, fmt, bits, across) for x, bits in pairs], scale_K


def read_again(stored: Blocks, scale: jax.Array, fmt: StateFormat) -> Blocks:
  """The same statistic, for a second pass over memory that needs its new scale.

  Otherwise XLA would keep the float32 values of the first pass, 4 bytes each:
  its cost model prefers a read to a recomputation, and it removes optimization
  barriers before it decides. Scales are never negative, but XLA does not know
  that. Adding their sign bit makes these codes depend on the scales.
  """
  codes_KxB = _in_blocks(stored.codes, fmt.in_block)
  sign_K = (arithmetic.low_bits_of(scale) >> _U32(15)).astype(stored.codes.dtype)
  sign_K = sign_K.reshape(codes_KxB.shape[:-1])
  codes_KxB = codes_KxB + sign_K[..., None]
  return Blocks(_off_blocks(codes_KxB, stored.codes.shape), stored.scale)


def magnitude_bits(x):
  """float32 -> the bit pattern without its sign, uint32; monotone in the magnitude."""
  return arithmetic.bits_of(x) & _U32(0x7FFFFFFF)


def scale_code(magnitude, fmt: StateFormat):
  """``magnitude_bits`` rounded up to the bit pattern of a bfloat16, uint32; monotone."""
  lowest = MIN_ROOT_SCALE if fmt.is_square else MIN_SCALE
  code = (magnitude + _U32(0xFFFF)) >> _U32(16)
  lowest = (math.frexp(lowest)[1] - 1 + arithmetic.F32_BIAS) << 7
  code = arithmetic.least(
    arithmetic.most(code, _U32(lowest)), _U32(0x7F7F)
  )  # the largest finite value stays finite
  # An infinite scale marks NaN, too: its block decodes to NaN and infinity only.
  code = jnp.where(magnitude < _U32(arithmetic.F32_INF), code, _U32(arithmetic.F32_INF >> 16))
  return jnp.where(magnitude > _U32(0), code, _U32(0))


def held(code, old, fmt: StateFormat):
  """The bit pattern of a block's scale: the old scale's if the format holds that one."""
  if not fmt.holds_scale:
    return code
  code, old = code.astype(_U32), arithmetic.low_bits_of(old)
  # 128 patterns are an octave. An infinite scale belongs to values that are not finite.
  stays = (code <= old) & (old <= code + _U32(64)) & (old < _U32(arithmetic.F32_INF >> 16))
  return jnp.where(stays, old, code)


def encode(x_KxB, scale_K, fmt: StateFormat, bits_KxB, across=None):
  """Values (square roots of a second moment) -> codes, on arrays or tiles of blocks."""
  # A kernel divides once a block. The select avoids 0 / 0 in a block of zeros.
  top = 1.0 if fmt.name == "fp16" else fmt.top * (1 << 15 if fmt.is_square else 1)
  scale_KxB = _along(scale_K, x_KxB.shape, across)
  # No product may be contracted with a sum (see `arithmetic.rounded`); |ratio| is not one.
  ratio = x_KxB * jnp.where(scale_KxB > 0, jnp.float32(top) / scale_KxB, jnp.float32(0))
  if fmt.name == "fp16":
    return _keep_positive(
      x_KxB, arithmetic.round_to(ratio, jnp.float16, "stochastic", bits_KxB), fmt
    )
  # Rounds up with the probability that keeps the mean. Codes carry `_NEAREST` in their upper bits,
  # which the stored ones lack.
  if fmt.is_square:  # 15 binary places and as many random bits
    half = _U32(1 << 14 if fmt.is_packed else 0)
    zero = _U32(_NEAREST >> 15)
    c = (_nearest(jnp.abs(ratio)) + half + (bits_KxB >> _U32(17))) >> _U32(15)
    some = arithmetic.least(magnitude_bits(x_KxB), _U32(1))  # no zero where x is positive
    c = arithmetic.most(c, zero + some)
    if fmt.is_packed:
      c = jnp.where(some > _U32(0), c, zero)
    return arithmetic.least(c, zero + _U32(fmt.levels)).astype(fmt.dtype)
  # The ratio lies between c**2 and (c + 1)**2. For an exact square, c may be one too small; it is
  # then always raised.
  ratio = jnp.abs(ratio)
  c = _nearest(jnp.sqrt(ratio), less=0.5)
  c = arithmetic.least(arithmetic.most(c, _U32(_NEAREST)), _U32(_NEAREST + fmt.levels - 1))
  floor = arithmetic.float_of(c) - jnp.float32(2.0**23)
  # A float from 2**23 on holds an integer in its lower bits.
  uniform = arithmetic.float_of((bits_KxB >> _U32(16)) | _U32(_NEAREST))
  uniform = uniform * jnp.float32(2.0**-16) - jnp.float32(2.0**7 - 2.0**-17)
  c = (c + (uniform * (2 * floor + 1) < ratio - floor * floor).astype(_U32)).astype(_I32)
  return jnp.where(x_KxB < 0, -c, c).astype(fmt.dtype)


def _nearest(x, less: float = 0.0):
  """float32 from 0 to 2**23 - 1 -> the integer nearest to x - less, plus ``_NEAREST``, uint32.

  The integer is in the lower bits of 2**23 + x. A conversion would clamp on both
  sides first, and cost a GPU as much as a square root. Below zero, the result is
  less than ``_NEAREST``.
  """
  return arithmetic.bits_of(x + jnp.float32(2.0**23 - less))


def decode(codes_KxB, scale_K, fmt: StateFormat, across=None):
  """Codes -> float32 values (square roots of a second moment), on arrays or tiles of blocks."""
  scale_KxB = _along(scale_K, codes_KxB.shape, across)
  if fmt.name == "fp16":
    x = arithmetic.widen(codes_KxB) * scale_KxB
    if fmt.is_square:
      x = jnp.where(x == 0, x, jnp.maximum(x, jnp.float32(MIN_ROOT)))
    return x
  c = codes_KxB.astype(_I32).astype(jnp.float32)
  if not fmt.is_square:
    c = c * jnp.abs(c)
  elif fmt.is_packed:
    c = jnp.where(c > 0, c - jnp.float32(0.5), c)
  return c * (scale_KxB * jnp.float32(1 / fmt.top))


def _keep_positive(x, rounded, fmt: StateFormat):
  """Replaces a zero by the format's smallest value where a second moment was positive."""
  if not fmt.is_square:
    return rounded
  # On bit patterns: a TPU kernel cannot hold float16. The smallest value's pattern is 1.
  pattern = arithmetic.low_bits_of(rounded)
  pattern = jnp.where((x > 0) & (pattern == _U32(0)), _U32(1), pattern)
  return arithmetic.low_of(pattern, rounded.dtype)


def _along(scale_K, shape, across=None):
  """bfloat16 for each block -> float32 for each of its elements.

  It broadcasts before it converts, so XLA reads the stored scales and keeps no
  copy of its own.
  """
  if across is None:
    across = lambda x: jax.lax.broadcast_in_dim(x, shape, tuple(range(len(shape) - 1)))
  scale_KxB = across(scale_K)
  return arithmetic.float_of(arithmetic.low_bits_of(scale_KxB) << _U32(16))


def _in_blocks(x, block: int = BLOCK):
  """[..., n] -> [..., blocks, block]; pads the last block with zeros."""
  x = x.reshape(x.shape or (1,))
  n = x.shape[-1]
  if n < block:
    return x.reshape(*x.shape[:-1], min(n, 1), n)  # one short block
  if n % block:
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % block)])
  return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def _off_blocks(x_KxB, shape):
  """The inverse of ``_in_blocks``."""
  n = shape[-1] if shape else 1
  return (
    x_KxB.reshape(*shape[:-1], -1)[..., :n].reshape(shape) if x_KxB.size else x_KxB.reshape(shape)
  )
