"""merge: a half-precision weight and its residual bits back into float32."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.formats import arithmetic, packing
from pallas_kernels.formats.weights import DeltaFormat
from pallas_kernels.operations import checks
from pallas_kernels.placement import implementations, sharded
from pallas_kernels.programs.elementwise import elementwise


def merge(
  low: jax.Array,
  delta: jax.Array | None,
  fmt: str | DeltaFormat,
  *,
  implementation: implementations.Implementation | None = None,
) -> jax.Array:
  """The float32 values that `split` was given, on the format's grid.

  Args:
    low: weights in the format's dtype, [...].
    delta: their residuals as `split` packed them; None where there are none.
    fmt: the format that they were split with.
    implementation: None, "xla" or "mosaic_gpu" (residuals of 0, 8 or 16 bits).

  Returns:
    float32 [...].

  Raises:
    TypeError: if low is not of the format's dtype.
    ValueError: if delta's shape or dtype does not belong to low and the
      format, or the platform lacks the implementation.

  Examples:
    >>> merge(*split(x, "bf16+16"), "bf16+16")  # x, bit for bit

  References:
    [Memory Efficient Mixed-Precision Optimizers](https://arxiv.org/abs/2309.12381),
    section 3.1
  """
  fmt = DeltaFormat.parse(fmt)
  low = low if isinstance(low, jax.Array) else jnp.asarray(low)
  checks.residual(low, delta, fmt)
  if fmt.is_full_precision:
    return low
  if implementations.resolve(implementation, low, residual_bits=fmt.residual_bits) == "xla":
    return sharded.automatic(functools.partial(_xla, fmt), low, low, delta)

  def tile(bits, low_T, delta_T=None):
    del bits
    delta_T = None if delta_T is None else delta_T.astype(jnp.int32)
    return (arithmetic.merge_values(low_T, delta_T, fmt),)

  reads = [low] if delta is None else [low, delta]
  return elementwise(tile, reads=reads, outputs=[jnp.float32])[0]


def _xla(fmt: DeltaFormat, low, delta):
  return arithmetic.merge_values(low, packing.unpack(delta, low.shape, fmt), fmt)
