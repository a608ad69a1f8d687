"""Storage of residuals: k bits a value, with the weight's rank and leading axes.

- 8 and 16 bits: int8 and int16 of the weight's shape.
- Other widths, last axis of 32 values or more: uint8 [..., groups * 4 * bits].
  A group is 32 neighbours along the last axis, the only axis with padding, so a
  sharding of the last axis by whole groups carries over. The bits of the values
  are cut into parts of 8, 4, 2 or 1 bits, and each part fills consecutive bytes
  of the group. A part of w < 8 bits puts ``8 // w`` contiguous slices of the
  group into one run of bytes, which takes shifts but no shuffles.
- Other widths, last axis under 32: the next whole number of bytes a value.
- A scalar: the next wider integer type.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.formats.weights import DeltaFormat

_U32, _I32 = jnp.uint32, jnp.int32
GROUP = 32


def stored_struct(shape: tuple[int, ...], fmt: DeltaFormat) -> jax.ShapeDtypeStruct | None:
  """Shape and dtype of the stored residual of a weight of a shape; None if it has none."""
  bits = fmt.residual_bits
  if bits == 0:
    return None
  if bits <= 16 and (bits in (8, 16) or not shape or shape[-1] < GROUP):
    return jax.ShapeDtypeStruct(shape, jnp.int8 if bits <= 8 else jnp.int16)
  if not shape:
    return jax.ShapeDtypeStruct(shape, jnp.int32)
  if shape[-1] < GROUP:
    return jax.ShapeDtypeStruct((*shape[:-1], 3 * shape[-1]), jnp.uint8)
  groups = -(-shape[-1] // GROUP)
  return jax.ShapeDtypeStruct((*shape[:-1], groups * 4 * bits), jnp.uint8)


def pack(delta: jax.Array | None, fmt: DeltaFormat) -> jax.Array | None:
  """int32 residuals of a weight's shape -> their storage (see ``stored_struct``)."""
  if delta is None or (struct := stored_struct(delta.shape, fmt)) is None:
    return None
  if struct.dtype != jnp.uint8:
    return delta.astype(struct.dtype)
  # XLA cannot fuse packing with the fusion that writes the weight, because the
  # shapes differ. The barrier makes XLA keep these 1 or 2 bytes a value between
  # its two passes instead of the float32 values that they come from.
  if fmt.residual_bits <= 16:
    delta = delta.astype(jnp.int8 if fmt.residual_bits <= 8 else jnp.int16)
  delta = jax.lax.optimization_barrier(delta)
  v = delta.astype(_U32)
  if delta.shape[-1] < GROUP:
    return _bytes_of(v)[..., :3].reshape(struct.shape)
  v = jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, -v.shape[-1] % GROUP)])
  v = v.reshape(*v.shape[:-1], v.shape[-1] // GROUP, GROUP)
  parts = []
  for offset, width in _parts(fmt.residual_bits):
    field = (v >> _U32(offset)) & _U32((1 << width) - 1)
    columns = jnp.split(field, 8 // width, axis=-1)
    shifted = [c << _U32(i * width) for i, c in enumerate(columns)]
    parts.append(functools.reduce(jnp.bitwise_or, shifted).astype(jnp.uint8))
  return jnp.concatenate(parts, axis=-1).reshape(struct.shape)


def unpack(stored: jax.Array | None, shape: tuple[int, ...], fmt: DeltaFormat) -> jax.Array | None:
  """The inverse of ``pack`` for a weight of a shape: int32 residuals."""
  if stored is None:
    return None
  if stored.dtype != jnp.uint8:
    return stored.astype(_I32)
  if shape[-1] < GROUP:
    b = stored.reshape(*shape, 3).astype(_U32)
    v = b[..., 0] | (b[..., 1] << _U32(8)) | (b[..., 2] << _U32(16))
    return _sign_extend(v, 24)
  bits = fmt.residual_bits
  b = stored.reshape(*shape[:-1], stored.shape[-1] // (4 * bits), 4 * bits)
  v, start = _U32(0), 0
  for offset, width in _parts(bits):
    byte = b[..., None, start : start + 4 * width].astype(_U32)
    start += 4 * width
    # A broadcast: XLA would not fuse a concatenation.
    shifts = width * jax.lax.broadcasted_iota(_U32, (8 // width, 1), 0)
    field = (byte >> shifts) & _U32((1 << width) - 1)
    v = v | (field.reshape(*field.shape[:-2], GROUP) << _U32(offset))
  v = v.reshape(*shape[:-1], v.shape[-2] * GROUP)[..., : shape[-1]]
  return _sign_extend(v, bits)


def _parts(bits: int):
  """(offset, width) of each part of the packed bits."""
  widths = [8] * (bits // 8) + [w for w in (4, 2, 1) if bits & w]
  return [(sum(widths[:i]), w) for i, w in enumerate(widths)]


def _bytes_of(v):
  return jax.lax.bitcast_convert_type(v, jnp.uint8)


def _sign_extend(v, bits: int):
  spare = 32 - bits
  return (v << _U32(spare)).astype(_I32) >> _I32(spare)
