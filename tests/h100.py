"""Compiling for an H100 (an A100, an L40S, a B200) on a machine that has none."""

import jax

from optax_lowmem.planner import targets


def devices(topology: str, target: str = "h100"):
  """Such devices, "1x1x8" of them; None where the `h100` extra is not installed."""
  try:
    return targets.gpus(target, topology)
  except ModuleNotFoundError:
    return None


def sharding(target: str = "h100"):
  """A sharding on one such device; None where the `h100` extra is not installed."""
  found = devices("1x1x1", target)
  return found and jax.sharding.SingleDeviceSharding(found[0])


def struct(shape, dtype, target: str = "h100") -> jax.ShapeDtypeStruct:
  """An argument that lies on the device."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(target))


def on_device(tree, target: str = "h100"):
  """The structs of a tree of arrays or structs, on the device."""
  return jax.tree.map(lambda x: struct(x.shape, x.dtype, target), tree)


def compiled(f, *structs, donate=()):
  """f compiled for the structs' device."""
  return jax.jit(f, donate_argnums=donate).trace(*structs).lower().compile()
