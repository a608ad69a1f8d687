"""partitioned: steps leaves shard by shard, inside a program that XLA partitions.

On a mesh with Auto axes, a trace does not know how XLA will shard its operands, and
XLA cannot partition a kernel. So the step becomes a custom call with a rule that says
which axes correspond. Once XLA has chosen the shardings, it replaces the call by the
program of one shard, with the random bits of the shard's place in the whole.
"""

from collections.abc import Callable, Sequence
import itertools
import math
from typing import Any, NamedTuple

import jax
from jax.experimental.custom_partitioning import SdyShardingRule, custom_partitioning
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from pallas_kernels.formats.random_bits import Window
from pallas_kernels.formats.state_formats import BLOCK
from pallas_kernels.placement.by_device import by_device


def partitioned(program: Callable, scalars, leaves: Sequence[Any], when, index):
  """Runs a program on each shard.

  All arrays of one weight are cut like the part of its state that has the most
  shards; an array with another sharding is moved there and back. If that would cut
  a block, or a stack along its first axis, another axis is cut instead. If no other
  axis can be, that cut is dropped.

  Args:
    program: (scalars, leaves, when, index, windows=) -> new (low, delta,
      statistics) of each leaf, on shards of any shape.
    scalars: arrays of shape ().
    leaves: ``programs.leaf.Leaf``s whose rows are whole blocks.
    when: a bool, or None.
    index: the place of each leaf in a stack, or None.

  Returns:
    The results of program, as whole arrays.
  """
  flat, treedef = jax.tree.flatten((scalars, leaves, when, index))
  wholes = [leaf.low.shape for leaf in leaves]
  has_index = index is not None

  def types(*flat):  # traced for the types of the results, but never run
    return jax.tree.leaves(_written(jax.tree.unflatten(treedef, flat)[1]))

  def partition(mesh, args, results):
    del mesh, results
    leaves = jax.tree.unflatten(treedef, args)[1]
    cuts = [_cut_of(*of_one, has_index) for of_one in zip(leaves, wholes, strict=True)]

    def on_shards(*flat):
      device = jax.lax.axis_index("device")
      args = jax.tree.unflatten(treedef, flat)
      windows = [
        _window(cut, leaf.low.shape, whole, device)
        for cut, leaf, whole in zip(cuts, args[1], wholes, strict=True)
      ]
      return jax.tree.leaves(program(*args, windows=windows))

    mesh = Mesh(np.array(cuts[0].devices), ("device",))
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), list(args))
    before, own, *after = jax.tree.unflatten(treedef, shardings)
    own = [_shardings(leaf, cut, has_index) for leaf, cut in zip(own, cuts, strict=True)]
    # by_device hides the effects of refs, which custom_partitioning does not lower.
    lower = lambda *flat: by_device({"any": on_shards}, *flat)
    return mesh, lower, jax.tree.leaves(_written(own)), tuple(jax.tree.leaves((before, own, after)))

  call = custom_partitioning(types)
  rule = _rule(jax.tree.unflatten(treedef, flat))
  call.def_partition(partition, decode_shardings=False, sharding_rule=rule)
  written = call(*flat)
  return jax.tree.unflatten(jax.tree.structure(_written(leaves)), written)


def _written(leaves):
  """The parts of leaves that a step replaces: (low, delta, statistics)."""
  return [leaf[1:4] for leaf in leaves]


class _Cut(NamedTuple):
  """How an array is sharded.

  Attributes:
    sharding: a sharding of the class to construct.
    devices: all devices, in the order of the partitioned program.
    parts: the number of parts along each axis, int [axes].
    places: the part that each device holds, int [devices, axes].
  """

  sharding: Any
  devices: tuple
  parts: np.ndarray
  places: np.ndarray


def _cut_of(leaf, whole: tuple[int, ...], has_index: bool) -> _Cut:
  """Chooses a leaf's cut: that of its array with the most shards, but through no block."""
  rank = len(whole)
  cuts = []
  for sharding in dict.fromkeys(x.sharding for x in jax.tree.leaves(leaf[1:4])):
    # Looks at an array with as many elements along each axis as there are devices, because every
    # sharding divides it.
    count = len(sharding.device_set)
    indices = sharding.devices_indices_map((count,) * rank)
    starts = np.array([[x.start or 0 for x in slices] for slices in indices.values()])
    parts = np.array([len(set(column)) for column in starts.T])
    cuts.append(_Cut(sharding, tuple(indices), parts, starts * parts // count))
  cut = max(cuts, key=lambda cut: math.prod(cut.parts))
  units = [1] * (rank - 1) + [BLOCK]
  firsts = range(1 if has_index else 0, rank)
  for axis in range(rank):
    if axis in firsts and whole[axis] % (cut.parts[axis] * units[axis]) == 0:
      continue
    part, place = cut.parts[axis], cut.places[:, axis].copy()
    cut.parts[axis], cut.places[:, axis] = 1, 0
    for other in firsts:  # cuts another axis instead
      if other != axis and whole[other] % (cut.parts[other] * part * units[other]) == 0:
        cut.places[:, other] = cut.places[:, other] * part + place
        cut.parts[other] *= part
        break
  return cut


def _window(cut: _Cut, part: tuple[int, ...], whole: tuple[int, ...], device) -> Window:
  place = jnp.asarray(cut.places.astype(np.int32))[device]
  starts = [0 if n == whole[axis] else place[axis] * n for axis, n in enumerate(part)]
  return Window(tuple(starts), whole)


def _shardings(leaf, cut: _Cut, has_index: bool):
  """A leaf of shardings: those of the cut for gradient and state, the given ones for the rest."""
  rank = len(cut.parts)
  first = 1 if has_index else 0
  state = jax.tree.map(lambda _: _tiled(cut, range(rank)), leaf[1:4])
  return type(leaf)(_tiled(cut, range(first, rank)), *state, *leaf[4:])


def _tiled(cut: _Cut, axes: range):
  """The sharding that a cut gives an array with these axes."""
  parts = [int(cut.parts[axis]) for axis in axes]
  copies = len(cut.places) // math.prod(parts)
  # In XLA's own form: a NamedSharding cannot express every order of the devices.
  proto = type(cut.sharding._to_xla_hlo_sharding(len(parts)).to_proto())()
  if copies == len(cut.places):
    proto.type = proto.Type.REPLICATED
  else:
    proto.type = proto.Type.OTHER
    proto.tile_assignment_dimensions = [*parts, copies]
    proto.tile_assignment_devices = [int(i) for i in np.lexsort(cut.places[:, axes].T[::-1])]
    proto.replicate_on_last_tile_dim = True
  return type(cut.sharding)(cut.devices, proto)


def _rule(args) -> SdyShardingRule:
  """The rule of the custom call: a gradient is sharded like its weight if XLA can choose."""
  unused = map("axis{}_".format, itertools.count())
  new = lambda x: tuple(itertools.islice(unused, jnp.ndim(x)))
  operands = jax.tree.map(new, args)
  like_weight = lambda leaf: leaf._replace(gradient=leaf.low[len(leaf.low) - len(leaf.gradient) :])
  operands = (operands[0], [like_weight(leaf) for leaf in operands[1]], *operands[2:])
  is_axes = lambda x: isinstance(x, tuple) and all(isinstance(name, str) for name in x)
  flat = lambda tree: tuple(jax.tree.leaves(tree, is_leaf=is_axes))
  return SdyShardingRule(flat(operands), flat(_written(operands[1])))
