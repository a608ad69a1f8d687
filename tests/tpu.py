"""Compiling for a TPU on a machine that has none: `../shared/AOT.md`."""

import functools
import os

import jax
from jax.experimental import topologies

# Topologies as libtpu spells them.
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


@functools.cache
def devices(topology: str):
  """The devices of a topology, such as "v5e:4x4"; None where the `tpu` extra is not installed."""
  try:
    return topologies.get_topology_desc(topology, platform="tpu").devices
  except RuntimeError as error:  # JAX says that TPU support is not installed
    if os.environ.get("REQUIRE_TPU") or "not installed" not in str(error):
      raise
    return None


def on_device(tree, target: str = "v5e"):
  """The structs of a tree of arrays or structs, on one such TPU."""
  found = devices(TOPOLOGIES[target])
  sharding = found and jax.sharding.SingleDeviceSharding(found[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compiled(f, *structs, donate=()):
  """f compiled for the structs' device."""
  return jax.jit(f, donate_argnums=donate).trace(*structs).lower().compile()


def kernels(compiled) -> int:
  """How many Pallas kernels a program has."""
  return compiled.as_text().count('custom_call_target="tpu_custom_call"')
