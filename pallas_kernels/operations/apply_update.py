"""apply_update: merge, add a float32 update and split again, in one pass and in place."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.formats import arithmetic, packing
from pallas_kernels.formats.random_bits import random_bits
from pallas_kernels.formats.weights import DeltaFormat
from pallas_kernels.operations import checks
from pallas_kernels.placement import implementations, sharded
from pallas_kernels.programs.elementwise import elementwise


def apply_update(
  low: jax.Array,
  delta: jax.Array | None,
  update: jax.typing.ArrayLike,
  fmt: str | DeltaFormat,
  *,
  key: jax.typing.ArrayLike | None = None,
  implementation: implementations.Implementation | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """`split(merge(low, delta) + update)`, in place where the buffers are donated.

  Args:
    low: weights in the format's dtype, [...].
    delta: their residuals as `split` packed them; None where there are none.
    update: float32 [...].
    fmt: the format.
    key: an integer seed or a `jax.random` key, where the format needs one.
    implementation: None, "xla" or "mosaic_gpu" (residuals of 0, 8 or 16 bits).

  Returns:
    The new (low, delta).

  Raises:
    TypeError: if a dtype is not the format's, or update is not float32.
    ValueError: if shapes do not belong together, a key is missing, or the
      platform lacks the implementation.

  Examples:
    >>> low, delta = apply_update(low, delta, -lr * grads, "bf16+8", key=key)

  References:
    [Memory Efficient Mixed-Precision Optimizers](https://arxiv.org/abs/2309.12381),
    section 3.1
  """
  fmt = DeltaFormat.parse(fmt)
  update = checks.float32_array(update, "update")
  stream = checks.stream_of(key, fmt, f"apply_update in {fmt.name}")
  return apply_update_stream(low, delta, update, fmt, stream, implementation)


def apply_update_stream(low, delta, update, fmt: DeltaFormat, stream, implementation=None):
  """`apply_update` with a stream's words (`stream_keys`) instead of a key."""
  checks.residual(low, delta, fmt)
  if update.shape != low.shape:
    raise ValueError(f"The update has the weight's shape {low.shape}; got {update.shape}.")
  if fmt.is_full_precision:
    return low + update, None
  if implementations.resolve(implementation, low, update, residual_bits=fmt.residual_bits) == "xla":
    return sharded.automatic(functools.partial(_xla, fmt), low, low, delta, update, stream)

  def tile(bits, update_T, low_T, delta_T=None):
    wide_T = None if delta_T is None else delta_T.astype(jnp.int32)
    low_T, new_T = arithmetic.apply_values(low_T, wide_T, update_T, fmt, bits)
    return (low_T,) if delta_T is None else (low_T, new_T.astype(delta_T.dtype))

  low, *delta = elementwise(
    tile,
    key=stream if fmt.needs_key else None,
    reads=[update],
    in_place=[low] if delta is None else [low, delta],
  )
  return low, delta[0] if delta else None


def _xla(fmt: DeltaFormat, low, delta, update, stream):
  bits = random_bits(stream, low.shape) if fmt.needs_key else None
  unpacked = packing.unpack(delta, low.shape, fmt)
  low, new_delta = arithmetic.apply_values(low, unpacked, update, fmt, bits)
  return low, packing.pack(new_delta, fmt)
