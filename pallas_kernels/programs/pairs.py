"""pairs: two neighbouring values as one, for a GPU's kernel that steps 4-bit statistics.

Two 4-bit codes share a byte. So a thread reads everything in pairs of neighbours: weights of 16
bits as uint32, residuals of 8 as uint16, 4-bit codes as bytes. It takes the pairs apart in
registers. XLA:GPU views an array as pairs without a copy.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.formats import arithmetic, state_formats
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
  """Pairs -> their first and their second values; codes in int32."""
  pairs_T = pairs_T.astype(_U32)
  if isinstance(kind, StateFormat):
    return tuple(state_formats.code_in(pairs_T.astype(_I32), i, kind) for i in (0, 1))
  width = 8 * kind.itemsize
  first_T, second_T = pairs_T & _U32((1 << width) - 1), pairs_T >> _U32(width)
  return arithmetic.low_of(first_T, kind), arithmetic.low_of(second_T, kind)


def put_together(first_T, second_T, kind: Kind, dtype):
  """The inverse of ``taken_apart``, in a dtype."""
  if isinstance(kind, StateFormat):
    return state_formats.byte_of(first_T.astype(_I32), second_T.astype(_I32)).astype(dtype)
  first_T, second_T = map(arithmetic.low_bits_of, (first_T, second_T))
  return (first_T | (second_T << _U32(8 * kind.itemsize))).astype(dtype)
