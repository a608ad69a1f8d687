"""pairs: two neighbouring values as one, for a GPU's kernel that steps 4-bit statistics.

Two 4-bit codes share a byte. So a thread reads everything in pairs of neighbours: weights of 16
bits as uint32, residuals of 8 as uint16, 4-bit codes as bytes. It takes the pairs apart in
registers. XLA:GPU views an array as pairs without a copy.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.formats import arithmetic
from pallas_kernels.formats.state_formats import BLOCK, StateFormat

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
  is_signed = not kind.is_square if isinstance(kind, StateFormat) else kind.kind == "i"
  read = functools.partial(arithmetic.integer_in, pairs_T, width=_width(kind), is_signed=is_signed)
  parts_T = read(0), read(1)
  # Integers stay int32: in a Mosaic GPU kernel, a bitcast from uint8 to int8 stays unsigned.
  if _is_integer(kind):
    return parts_T
  return tuple(arithmetic.low_of(x_T.astype(jnp.uint32), kind) for x_T in parts_T)


def put_together(first_T, second_T, kind: Kind, dtype):
  """The inverse of ``taken_apart``, in a dtype."""
  if not _is_integer(kind):
    first_T, second_T = map(arithmetic.low_bits_of, (first_T, second_T))
  return arithmetic.two_integers(first_T, second_T, _width(kind)).astype(dtype)


def _width(kind: Kind) -> int:
  return 4 if isinstance(kind, StateFormat) else 8 * kind.itemsize


def _is_integer(kind: Kind) -> bool:
  return isinstance(kind, StateFormat) or kind.kind in "iu"
