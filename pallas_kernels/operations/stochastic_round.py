"""stochastic_round: rounds float32 to a narrow float, up or down at random and without bias."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.formats import arithmetic
from pallas_kernels.formats.random_bits import key_words, random_bits, stream_keys
from pallas_kernels.formats.weights import GRIDS
from pallas_kernels.operations import checks
from pallas_kernels.placement import implementations
from pallas_kernels.programs.elementwise import elementwise


def stochastic_round(
  key: jax.typing.ArrayLike,
  x: jax.typing.ArrayLike,
  dtype: jax.typing.DTypeLike,
  *,
  implementation: implementations.Implementation | None = None,
) -> jax.Array:
  """Rounds each value to one of its two neighbours in a dtype, without bias.

  The expectation of the result is the value. A value that the dtype represents
  never changes. Finite values saturate at the largest finite one. Infinity stays
  infinity (NaN in float8_e4m3fn, which has no infinity), and NaN stays NaN.

  Args:
    key: an integer seed or a ``jax.random`` key.
    x: float32 [...].
    dtype: ``bfloat16``, ``float16``, ``float8_e4m3fn`` or ``float8_e5m2``.
    implementation: None, ``"xla"`` or ``"mosaic_gpu"``.

  Returns:
    An array [...] of the dtype.

  Raises:
    TypeError: if x is not float32, or key is not a key.
    ValueError: if the dtype is not one of these, or the platform lacks the
      implementation.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from pallas_kernels import stochastic_round
    >>> x = jnp.full(10_000, 1.002)  # between 1 and 1.0078125
    >>> rounded = stochastic_round(jax.random.key(0), x, jnp.bfloat16)
    >>> print(jnp.unique(rounded), f"{rounded.mean(dtype=jnp.float32):.3f}")
    [1 1.00781] 1.002

  References:
    `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`__, section 3.1
  """
  dtype = jnp.dtype(dtype)
  if dtype not in GRIDS:
    accepted = ", ".join(str(d) for d in GRIDS)
    raise ValueError(f"The dtype of stochastic_round must be one of {accepted}; got {dtype}.")
  x = checks.float32_array(x, "x")
  stream = stream_keys(key_words(key))[0]
  if implementations.resolve(implementation, x) == "xla":
    return _xla(dtype, x, stream)

  def tile(bits, x_T):
    return (arithmetic.round_to(x_T, dtype, "stochastic", bits),)

  return elementwise(tile, key=stream, reads=[x], outputs=[dtype])[0]


@functools.partial(jax.jit, static_argnums=0)  # outside of jit, compiled as a whole
def _xla(dtype, x, stream):
  return arithmetic.round_to(x, dtype, "stochastic", random_bits(stream, x.shape))
