"""pairs: two neighbouring values as one, for a GPU's kernel that steps 4-bit statistics.

Two 4-bit codes share a byte. So a thread reads everything in pairs of neighbours: weights of 16
bits as uint32, residuals of 8 as uint16, 4-bit codes as bytes. It takes the pairs apart in
registers. XLA:GPU views an array as pairs without a copy.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.formats import arithmetic
from pallas_kernels.formats.state_formats import BLOCK, StateFormat

_U32, _I32 = jnp.uint32, jnp.int32
IN_BLOCK = BLOCK // 2
Kind = StateFormat | jnp.dtype  # the format of packed codes, or else the dtype of the values


def view(x: jax.Array, kind: Kind) -> jax.Array:
  """Whole blocks of values, or their packed codes -> pairs, unsigned [blocks, 16]."""
  if isinstance(kind, StateFormat):
    return x.reshape(-1, IN_BLOCK)
  wide = jnp.dtype(f"uint{16 * x.dtype.itemsize}")
  return jax.lax.bitcast_convert_type(x.reshape(-1, IN_BLOCK, 2), wide)


def restored(pairs: jax.Array, like: jax.Array) -> jax.Array:
  """The inverse of ``view``, in the shape and dtype of like."""
  return jax.lax.bitcast_convert_type(pairs, like.dtype).reshape(like.shape)


def taken_apart(pairs_T, kind: Kind):
  """Pairs -> their first and their second values; integers and codes in int32."""
  pairs_T = pairs_T.astype(_U32)
  width = _width(kind)
  if not _is_integer(kind):
    first_T, second_T = pairs_T & _U32((1 << width) - 1), pairs_T >> _U32(width)
    return arithmetic.low_of(first_T, kind), arithmetic.low_of(second_T, kind)
  # By shifts: in a Mosaic GPU kernel, a bitcast from uint8 to int8 stays unsigned.
  at_top = pairs_T << _U32(32 - width), pairs_T << _U32(32 - 2 * width)
  is_signed = not kind.is_square if isinstance(kind, StateFormat) else kind.kind == "i"
  shift = lambda x: x.astype(_I32) >> (32 - width) if is_signed else x >> _U32(32 - width)
  return tuple(shift(x).astype(_I32) for x in at_top)


def put_together(first_T, second_T, kind: Kind, dtype):
  """The inverse of ``taken_apart``, in a dtype."""
  width = _width(kind)
  if _is_integer(kind):
    mask = _U32((1 << width) - 1)
    first_T, second_T = (x.astype(_U32) & mask for x in (first_T, second_T))
  else:
    first_T, second_T = map(arithmetic.low_bits_of, (first_T, second_T))
  return (first_T | (second_T << _U32(width))).astype(dtype)


def _width(kind: Kind) -> int:
  return 4 if isinstance(kind, StateFormat) else 8 * kind.itemsize


def _is_integer(kind: Kind) -> bool:
  return isinstance(kind, StateFormat) or kind.kind in "iu"
