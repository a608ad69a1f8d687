"""Operand checks that the operations share."""

import jax
import jax.numpy as jnp

from pallas_kernels.formats import packing
from pallas_kernels.formats.random_bits import key_words, stream_keys
from pallas_kernels.formats.weights import DeltaFormat


def float32_array(x, name: str) -> jax.Array:
  """An array of x; one that has a dtype must be float32."""
  if getattr(x, "dtype", jnp.float32) != jnp.float32:
    raise TypeError(f"{name} is float32; got {x.dtype}{list(x.shape)}.")
  return jnp.asarray(x, jnp.float32)


def stream_of(key, fmt: DeltaFormat, what: str) -> jax.Array | None:
  """The stream's words for a user's key; None where the format draws nothing."""
  if not fmt.needs_key:
    return None
  if key is None:
    raise ValueError(f"{what} rounds stochastically and needs a key: pass key=jax.random.key(...).")
  return stream_keys(key_words(key))[0]


def residual(low: jax.Array, delta: jax.Array | None, fmt: DeltaFormat, what: str = "The weight"):
  """Checks that a weight and its residual belong to a format and to each other."""
  if low.dtype != fmt.dtype:
    raise TypeError(f"{what} is {low.dtype}; its format {fmt.name} is for {fmt.dtype}.")
  expected = packing.stored_struct(low.shape, fmt)
  if _describe(delta) != _describe(expected):
    raise ValueError(
      f"{what} of shape {low.shape} in format {fmt.name} has the residual"
      f" {_describe(expected)}; got {_describe(delta)}."
    )


def _describe(x) -> str:
  return "None" if x is None else f"{x.dtype}{list(x.shape)}"
