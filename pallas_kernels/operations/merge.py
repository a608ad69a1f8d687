"""merge: restores the float32 master from a half-precision weight and its residual."""

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
  """Restores the float32 masters that ``split`` stored, on the format's grid.

  Args:
    low: weights [...] in the format's dtype.
    delta: their residuals, packed by ``split``; None if the format has none.
    fmt: the format that split them.
    implementation: None, ``"xla"`` or ``"mosaic_gpu"`` (residuals of 0, 8 or 16
      bits).

  Returns:
    float32 [...].

  Raises:
    TypeError: if low does not have the format's dtype.
    ValueError: if the shape or dtype of delta does not match low and the
      format, or the platform lacks the implementation.

  Examples:
    >>> import jax.numpy as jnp
    >>> from pallas_kernels import merge, split
    >>> x = jnp.array([0.1, -2.7, 1e-30])
    >>> low, delta = split(x, "bf16+16")
    >>> bool((merge(low, delta, "bf16+16") == x).all())
    True

  References:
    `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`__, section 3.1
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


@functools.partial(jax.jit, static_argnums=0)  # outside of jit, compiled as a whole
def _xla(fmt: DeltaFormat, low, delta):
  return arithmetic.merge_values(low, packing.unpack(delta, low.shape, fmt), fmt)
