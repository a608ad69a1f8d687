"""The kernels under the GPU interpreter, bit for bit what the XLA path gives."""

import functools

from conftest import assert_trees_equal, float32_classes, running_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_lowmem as lowmem
import pallas_kernels

SIZES = [7, 1024, 3001]
FORMATS = ["bf16+0", "bf16+8", "bf16+16", "fp16+0", "fp16+8", "fp16+16"]


@functools.cache
def values(size: int) -> np.ndarray:
  x = float32_classes(4096, seed=size)
  return np.random.default_rng(size).permutation(x)[:size]


def both(operation, *args, **kwargs):
  """The operation as XLA and as an interpreted kernel; asserts equal bits."""
  expected = operation(*args, **kwargs, implementation="xla")
  with running_kernels():
    result = operation(*args, **kwargs, implementation="mosaic_gpu")
  assert_trees_equal(result, expected)
  return expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_split_merge_apply_update(name, size):
  x = jnp.asarray(values(size))
  low, delta = both(pallas_kernels.split, x, name, key=1)
  both(pallas_kernels.merge, low, delta, name)
  update = jnp.where(jnp.isfinite(x), jnp.sin(jnp.arange(size, dtype=jnp.float32)) * 1e-3, 1.0)
  both(pallas_kernels.apply_update, low, delta, update, name, key=2)


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize(
  "low_rounding, bits", [("nearest", 8), ("stochastic", 7), ("truncate", 15)]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_roundings(dtype, bits, rounding, low_rounding):
  fmt = lowmem.DeltaFormat(dtype, bits, rounding, low_rounding)
  x = jnp.asarray(values(3000))
  low, delta = both(pallas_kernels.split, x, fmt, key=1)
  both(pallas_kernels.apply_update, low, delta, jnp.full(3000, 1e-4), fmt, key=2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("shape", [(), (13, 100), (2, 8, 128), (0,)])
def test_stochastic_round_any_shape(dtype, shape):
  x = np.resize(values(5000), shape)
  # The interpreter carries float8 NaN through another NaN pattern; test_arithmetic has them.
  x = jnp.asarray(np.where(np.isnan(x) | (np.isinf(x) & (dtype == jnp.float8_e4m3fn)), 1.5, x))
  both(functools.partial(pallas_kernels.stochastic_round, 3), x, dtype)


def test_jit_and_donation():
  """Under jit and donated, as a training step calls it."""
  x = jax.random.normal(jax.random.key(0), (33, 100))
  low, delta = lowmem.split(x, "bf16+8", key=1)
  update = jnp.full(x.shape, 1e-3)
  expected = pallas_kernels.apply_update(low, delta, update, "bf16+8", key=2)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def f(low, delta):
    return pallas_kernels.apply_update(
      low, delta, update, "bf16+8", key=2, implementation="mosaic_gpu"
    )

  with running_kernels():
    assert_trees_equal(f(low, delta), expected)


def test_bits_do_not_depend_on_the_shape_in_memory():
  """Law 7: the stream is addressed by the element's place alone."""
  x = jnp.asarray(values(4096))
  flat = lowmem.split(x, "bf16+8", key=1)
  square = lowmem.split(x.reshape(64, 64), "bf16+8", key=1)
  assert_trees_equal(jax.tree.map(lambda a: a.reshape(-1), square), flat)
