"""Operand checks shared by the operations."""

import jax
import jax.numpy as jnp

from pallas_kernels.formats import packing
from pallas_kernels.formats.random_bits import key_words, stream_keys
from pallas_kernels.formats.weights import DeltaFormat


def float32_array(x, name: str) -> jax.Array:
  """Converts x to a float32 array; raises if x has another dtype."""
  if getattr(x, "dtype", jnp.float32) != jnp.float32:
    raise TypeError(f"{name} must be float32; got {x.dtype}{list(x.shape)}.")
  return jnp.asarray(x, jnp.float32)


def stream_of(key, fmt: DeltaFormat, what: str) -> jax.Array | None:
  """The words of the stream for a user's key; None if the format draws no random bits."""
  if not fmt.needs_key:
    return None
  if key is None:
    raise ValueError(f"{what} rounds stochastically and needs a key: pass key=jax.random.key(...).")
  return stream_keys(key_words(key))[0]


def residual(low: jax.Array, delta: jax.Array | None, fmt: DeltaFormat, what: str = "The weight"):
  """Checks that a weight and its residual match their format and each other."""
  if low.dtype != fmt.dtype:
    raise TypeError(f"{what} is {low.dtype}, but its format {fmt.name} stores {fmt.dtype}.")
  expected = packing.stored_struct(low.shape, fmt)
  if _describe(delta) != _describe(expected):
    raise ValueError(
      f"{what} of shape {low.shape} in format {fmt.name} must have the residual"
      f" {_describe(expected)}; got {_describe(delta)}."
    )


def _describe(x) -> str:
  return "None" if x is None else f"{x.dtype}{list(x.shape)}"
