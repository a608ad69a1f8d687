"""Compiling for a TPU on a machine that has none."""

import os

from h100 import compiled as compiled
import jax

from optax_lowmem.planner import targets

# Topologies as libtpu spells them.
TOPOLOGIES = {name: x.topology for name, x in targets.TARGETS.items() if x.is_tpu}


def devices(topology: str):
  """The devices of a topology, such as "v5e:4x4"; None where the `tpu` extra is not installed."""
  try:
    return targets.tpus(topology)
  except ModuleNotFoundError:
    if os.environ.get("REQUIRE_TPU"):
      raise
    return None


def on_device(tree, target: str = "v5e"):
  """The structs of a tree of arrays or structs, on one such TPU."""
  found = devices(TOPOLOGIES[target])
  sharding = found and jax.sharding.SingleDeviceSharding(found[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def kernels(compiled) -> int:
  """How many Pallas kernels a program has."""
  return compiled.as_text().count('custom_call_target="tpu_custom_call"')
