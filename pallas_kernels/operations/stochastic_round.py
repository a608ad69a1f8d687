"""stochastic_round: float32 to a narrow float, up or down at random, right on average."""

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
  """Rounds to one of the two neighbours in `dtype`, with the value as expectation.

  A value that `dtype` represents never moves. Finite values beyond the largest
  finite one become that one; infinities stay (NaN in float8_e4m3fn, which has
  none), NaN stays NaN.

  Args:
    key: an integer seed or a `jax.random` key.
    x: float32 [...].
    dtype: bfloat16, float16, float8_e4m3fn or float8_e5m2.
    implementation: None, "xla" or "mosaic_gpu".

  Returns:
    `dtype` [...].

  Raises:
    TypeError: if x is not float32 or key is no key.
    ValueError: for another dtype or an implementation that the platform lacks.

  Examples:
    >>> stochastic_round(jax.random.key(0), jnp.full(4, 1.003), jnp.bfloat16)

  References:
    [Memory Efficient Mixed-Precision Optimizers](https://arxiv.org/abs/2309.12381),
    section 3.1
  """
  dtype = jnp.dtype(dtype)
  if dtype not in GRIDS:
    accepted = ", ".join(str(d) for d in GRIDS)
    raise ValueError(f"stochastic_round rounds to {accepted}; got {dtype}.")
  x = checks.float32_array(x, "x")
  stream = stream_keys(key_words(key))[0]
  if implementations.resolve(implementation, x) == "xla":
    return arithmetic.round_to(x, dtype, "stochastic", random_bits(stream, x.shape))

  def tile(bits, x_T):
    return (arithmetic.round_to(x_T, dtype, "stochastic", bits),)

  return elementwise(tile, key=stream, reads=[x], outputs=[dtype])[0]
