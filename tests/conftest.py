"""Shared by all tests: eight CPU devices, float32 bit patterns, trees compared bit for bit."""

import contextlib
import itertools
import os
import zlib

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import chex
import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType
import numpy as np
import optax
import pytest

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))


def pytest_addoption(parser):
  parser.addoption("--every", type=int, default=1, help="run every n-th test, chosen by its name")


def pytest_collection_modifyitems(config, items):
  every, has_time = config.getoption("--every"), bool(os.environ.get("THOROUGH"))
  kept = [
    item
    for item in items
    if zlib.crc32(item.nodeid.encode()) % every == 0
    and (has_time or item.get_closest_marker("thorough") is None)
  ]
  config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
  items[:] = kept


def thinned(names, *kept):
  """Parametrizes an expensive test: `make test` runs what is kept, `make test-all` everything."""
  assert set(kept) <= set(names)
  mark = lambda name: () if name in kept else pytest.mark.thorough
  return [pytest.param(name, marks=mark(name)) for name in names]


def paired(*columns):
  """Parametrizes by all combinations; `make test` runs enough to hold every name once."""
  columns = [list(column) for column in columns]
  kept = {tuple(x[i % len(x)] for x in columns) for i in range(max(map(len, columns)))}
  mark = lambda names: () if names in kept else pytest.mark.thorough
  return [pytest.param(*names, marks=mark(names)) for names in itertools.product(*columns)]


def float32_classes(count: int = 1 << 16, seed: int = 0) -> np.ndarray:
  """float32 values of every class of bit patterns: ties, subnormals, infinities, NaN payloads."""
  rng = np.random.default_rng(seed)
  random_bits = rng.integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)
  upper = rng.integers(0, 1 << 16, 2048, dtype=np.uint32) << 16
  ties = [upper | (1 << shift) for shift in range(16)]
  off_ties = [t ^ np.uint32(flip) for t in ties[12:] for flip in (1, 0x8001)]
  small = rng.integers(0, 1 << 24, 2048, dtype=np.uint32)  # subnormals and the least normals
  half_range = rng.uniform(-70000, 70000, 2048).astype(np.float32).view(np.uint32)
  half_tiny = (rng.uniform(-1, 1, 2048) * 2.0**-14).astype(np.float32).view(np.uint32)
  edges = np.array(
      [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x18000, 0x007FFFFF, 0x00800000,
       0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000,
       0x7FFFFFFF, 0x477FE000, 0x477FEFFF, 0x477FF000, 0x47800000, 0x38800000, 0x33800000,
       0x33000000, 0x33000001],
      np.uint32,
  )  # fmt: skip
  positive = np.concatenate(
    [random_bits, *ties, *off_ties, small, half_range, half_tiny, edges]
  ).astype(np.uint32)
  return np.concatenate([positive, positive ^ np.uint32(1 << 31)]).view(np.float32)


@pytest.fixture(scope="session")
def classes() -> np.ndarray:
  """About 250,000 float32 values of every class."""
  return float32_classes()


def bits_of(x) -> np.ndarray:
  """Floats -> their bit patterns."""
  x = np.asarray(x)
  return x.view(np.dtype(f"u{x.dtype.itemsize}"))


def assert_trees_equal(a, b):
  """Equal structure, dtypes and bits.

  `chex.assert_trees_all_equal` compares values: to it -0.0 is 0.0, every NaN is NaN, and a
  bfloat16 array equals a float32 one.
  """
  chex.assert_trees_all_equal_comparator(_has_same_bits, _difference, a, b)


def _has_same_bits(x, y) -> bool:
  x, y = _plain(x), _plain(y)
  return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def _difference(x, y) -> str:
  x, y = _plain(x), _plain(y)
  if x.dtype != y.dtype or x.shape != y.shape:
    return f"{x.dtype}{list(x.shape)} is not {y.dtype}{list(y.shape)}"
  where = bits_of(x) != bits_of(y)
  first = (f"{t[where][:3]} (bits {bits_of(t)[where][:3]})" for t in (x, y))
  return f"{np.sum(where)} of {x.size} values, {' is not '.join(first)}"


def _plain(x) -> np.ndarray:
  is_key = isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return np.asarray(jax.random.key_data(x) if is_key else x)


def running_kernels():
  """Runs GPU kernels on the GPU that the tests were given, or else under JAX's interpreter."""
  on_gpu = jax.default_backend() == "gpu"
  return contextlib.nullcontext() if on_gpu else plgpu.force_gpu_interpret_mode()


def normal_like(tree, seed: int, scale: float = 1.0):
  """Random gradients in the dtypes of the tree's leaves."""
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  draw = lambda key, x: (jax.random.normal(key, x.shape) * scale).astype(x.dtype)
  return structure.unflatten(map(draw, keys, leaves))


def updated(tx, grads, opt_state, params, **extra_args):
  """What `lowmem.step` does, by Optax's protocol."""
  updates, opt_state = tx.update(grads, opt_state, params, **extra_args)
  return optax.apply_updates(params, updates), opt_state


def mesh_of(data: int, model: int = 1, kind=AxisType.Auto):
  """A mesh of the first data * model devices."""
  devices = jax.devices()[: data * model]
  return jax.make_mesh((data, model), ("data", "model"), axis_types=(kind,) * 2, devices=devices)
