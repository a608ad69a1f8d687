"""all_finite: whether every value of some arrays is finite.

On a mesh, each device checks its shards of all arrays and reduces one bool over the
devices. (XLA alone would reduce one for each set of mesh axes that shards an array.)
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import SdyShardingRule, custom_partitioning
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from pallas_kernels.placement import sharded
from pallas_kernels.placement.by_device import by_device

_EVERYWHERE = PartitionSpec()


def all_finite(arrays: Sequence[jax.Array], factor: jax.Array) -> jax.Array:
  """Whether every value times a factor, in float32 or wider, is finite.

  Args:
    arrays: floating-point or complex, any shapes.
    factor: float32 scalar.

  Returns:
    A bool of shape ().
  """
  arrays = [x for x in arrays if x.size]  # an empty one in a shard_map crashes jaxlib 0.11.2
  mesh = sharded.mesh_of(arrays)
  if mesh is None:
    partitioned = dict.fromkeys(("cpus", "gpus"), _partitioned)
    return by_device({"any": _all_finite} | partitioned, arrays, factor)
  if any(kind != AxisType.Explicit for kind in mesh.axis_types):
    return _all_finite(arrays, factor)
  specs = [sharded.spec_of(x) for x in arrays]

  def local(arrays, factor):
    return jax.lax.pmin(_all_finite(arrays, factor), mesh.axis_names)

  in_specs = (specs, _EVERYWHERE)
  check = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=_EVERYWHERE, check_vma=False)
  return check(arrays, factor)


def scaled(x, factor):
  """The product of x and a float32 factor, in float32 or wider."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  return x.astype(dtype) * factor.astype(jnp.finfo(dtype).dtype)


def _all_finite(arrays, factor):
  checks = [jnp.all(jnp.isfinite(scaled(x, factor))) for x in arrays]
  return jnp.all(jnp.stack(checks)) if checks else jnp.array(True)


def _partitioned(arrays, factor):
  """A custom call that XLA's partitioner replaces by a check of each device's shards."""
  if not arrays:
    return jnp.array(True)

  def partition(mesh, args, result):
    del mesh, result
    # In the device order of the partitioned program.
    devices = args[-1].sharding.devices_indices_map(())
    mesh = Mesh(np.array(list(devices)), ("device",))

    def on_shards(*flat):
      return jax.lax.pmin(_all_finite(flat[:-1], flat[-1]), "device")

    everywhere = NamedSharding(mesh, _EVERYWHERE)
    # XLA pads uneven shards with arbitrary values, which may not be finite.
    on_each = tuple(x.sharding if _is_even(x.sharding, x.shape) else everywhere for x in args)
    return mesh, on_shards, everywhere, on_each

  call = custom_partitioning(lambda *flat: _all_finite(flat[:-1], flat[-1]))
  operands: list[Any] = [
    tuple(f"x{i}_{axis}" for axis in range(x.ndim)) for i, x in enumerate(arrays)
  ]
  one_value: Any = ()
  rule = SdyShardingRule((*operands, one_value), (one_value,))
  call.def_partition(partition, decode_shardings=False, sharding_rule=rule)
  return call(*arrays, factor)


def _is_even(sharding, shape: tuple[int, ...]) -> bool:
  """Whether all shards of an array have the same shape, without padding."""
  count = len(sharding.device_set)
  parts = (count // n for n in sharding.shard_shape((count,) * len(shape)))
  return all(n % k == 0 for n, k in zip(shape, parts, strict=True))
