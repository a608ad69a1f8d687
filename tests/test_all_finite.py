"""Every value is looked at, whatever the mesh; and what is no value of an array is not."""

from conftest import mesh_of
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from pallas_kernels.operations.all_finite import all_finite

SHAPES = {
  "rows": ((16, 96), P("data")),
  "columns": ((8, 256), P(None, "model")),
  "both": ((16, 128), P("data", "model")),
  "middle": ((3, 8, 64), P(None, ("data", "model"), None)),
  "scalar": ((), P()),
  "empty": ((0, 32), P()),
  "everywhere": ((5, 70), P()),
}
CHECK = jax.jit(all_finite)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_every_array_of_a_mesh(kind):
  mesh = mesh_of(4, 2, kind)
  rng = np.random.default_rng(0)
  good = {name: rng.normal(size=shape) for name, (shape, _) in SHAPES.items()}

  def is_finite(arrays, factor=1.0):
    placed = [
      jax.device_put(x.astype(jnp.bfloat16), NamedSharding(mesh, SHAPES[name][1]))
      for name, x in arrays.items()
    ]
    return bool(CHECK(placed, jnp.float32(factor)))

  assert is_finite(good)
  assert not is_finite(good, np.inf)
  for name, x in good.items():
    for bad in (np.nan, -np.inf):
      if x.size:
        changed = x.reshape(-1).copy()
        changed[rng.integers(x.size)] = bad
        assert not is_finite(good | {name: changed.reshape(x.shape)}), name


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.complex64])
def test_one_device(dtype):
  for value in (jnp.nan, jnp.inf, -jnp.inf):
    x = jnp.zeros((3, 5), dtype).at[2, 4].set(value)
    assert not CHECK([jnp.ones(7), x], jnp.float32(1))
  # The product counts, in float32.
  x = jnp.ones((3, 5), dtype)
  assert CHECK([x], jnp.float32(1e38)) and not CHECK([100 * x], jnp.float32(1e38))
  assert CHECK([], jnp.float32(1))


def test_under_vmap():
  x = jnp.zeros((4, 8)).at[2, 3].set(jnp.nan)
  found = jax.vmap(lambda x: all_finite([x], jnp.float32(1)))(x)
  assert found.tolist() == [True, True, False, True]


def test_uneven_shards():
  """XLA pads them, here with 1 / 0."""
  sharding = NamedSharding(mesh_of(4, 2), P("data", "model"))

  @jax.jit
  def check(x):
    return all_finite([1 / jax.lax.with_sharding_constraint(x, sharding)], jnp.float32(1))

  x = jnp.ones((10, 7))
  assert check(x) and not check(x.at[9, 6].set(0))
