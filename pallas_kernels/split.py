"""split: a float32 value into a half-precision weight and a few residual bits."""

import functools

import jax

from pallas_kernels import arithmetic, checks, launch, packing, sharded
from pallas_kernels.formats import DeltaFormat
from pallas_kernels.random_bits import random_bits


def split(
  x: jax.typing.ArrayLike,
  fmt: str | DeltaFormat,
  *,
  key: jax.typing.ArrayLike | None = None,
  implementation: launch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """Splits float32 values into half-precision weights and packed residuals.

  Args:
    x: float32 [...].
    fmt: a format, such as "bf16+8". "fp32" gives (x, None).
    key: an integer seed or a `jax.random` key; needed where the format rounds
      stochastically (every format that a string names, but "bf16+16").
    implementation: None, "xla" or "mosaic_gpu" (residuals of 0, 8 or 16 bits).

  Returns:
    low: the format's dtype [...], a nearest value of `merge(low, delta)`
      (unless `low_rounding` says otherwise).
    delta: the residual, packed as `packing.stored_struct` describes; None
      where the format has no residual bits.

  Raises:
    TypeError: if x is not float32 or key is no key.
    ValueError: for an unknown format, a missing key, or an implementation that
      the platform lacks.

  Examples:
    >>> low, delta = split(x, "bf16+8", key=jax.random.key(0))

  References:
    [Memory Efficient Mixed-Precision Optimizers](https://arxiv.org/abs/2309.12381),
    section 3.1
  """
  fmt = DeltaFormat.parse(fmt)
  x = checks.float32_array(x, "x")
  stream = checks.stream_of(key, fmt, f"split to {fmt.name}")
  return split_stream(x, fmt, stream, implementation)


def split_stream(x, fmt: DeltaFormat, stream, implementation=None):
  """`split` with a stream's words (`stream_keys`) in the place of a key."""
  if fmt.is_full_precision:
    return x, None
  if launch.resolve(implementation, x, residual_bits=fmt.residual_bits) == "xla":
    return sharded.automatic(functools.partial(_xla, fmt), x, x, stream)
  residual = packing.stored_struct(x.shape, fmt)

  def tile(bits, x_T):
    low_T, delta_T = arithmetic.split_values(x_T, fmt, bits)
    return (low_T,) if residual is None else (low_T, delta_T.astype(residual.dtype))

  outputs = [fmt.dtype] if residual is None else [fmt.dtype, residual.dtype]
  low, *delta = launch.elementwise(
    tile, key=stream if fmt.needs_key else None, reads=[x], outputs=outputs
  )
  return low, delta[0] if delta else None


def _xla(fmt: DeltaFormat, x, stream):
  bits = random_bits(stream, x.shape) if fmt.needs_key else None
  low, delta = arithmetic.split_values(x, fmt, bits)
  return low, packing.pack(delta, fmt)
