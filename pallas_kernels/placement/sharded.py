"""sharded: operations on arrays whose types carry a sharding (a mesh with Explicit axes).

Under Auto axes, XLA partitions the program, and a trace knows no sharding. Under
Explicit axes, a reshape that splits a sharded axis is an error. An operation on
those arrays takes one of two ways. ``automatic`` hands it to XLA's partitioner.
If no shard's edge cuts a block, ``Shards`` runs it on each shard alone, without
communication and with the random bits of the shard's place in the whole.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.formats.random_bits import Window
from pallas_kernels.formats.state_formats import BLOCK
from pallas_kernels.placement.by_device import by_device


def explicit(x) -> NamedSharding | None:
  """The sharding in an array's type; None if none of its axes is sharded explicitly."""
  sharding = getattr(jax.typeof(x), "sharding", None)
  if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
    return None
  return sharding if any(axes is not None for axes in sharding.spec) else None


def has_explicit_axes(x) -> bool:
  """Whether an array is on a mesh with Explicit axes, or is traced under one."""
  mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
  kinds = [kind for m in (mesh, jax.sharding.get_abstract_mesh()) if m for kind in m.axis_types]
  return AxisType.Explicit in kinds


def fitted(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
  """Adapts an array's sharding to the storage of that array: keeps the axes that divide evenly.

  Args:
    sharding: the sharding of the array.
    shape: the shape of its storage; a storage of another rank is replicated.

  Returns:
    The sharding of the storage.
  """
  spec = sharding.spec if len(sharding.spec) == len(shape) else [None] * len(shape)
  parts = [_parts(sharding, axes) for axes in spec]
  spec = [axes if n % k == 0 else None for axes, n, k in zip(spec, shape, parts, strict=True)]
  return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _parts(sharding: NamedSharding, axes) -> int:
  """The number of parts that a spec's entry cuts an axis into."""
  names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
  return math.prod(sharding.mesh.shape[name] for name in names)


def like(x: jax.Array, parameter: jax.Array) -> jax.Array:
  """Gives x the sharding of a parameter of its shape, even if only XLA knows that sharding."""
  sharding = explicit(parameter)
  if sharding is not None:
    return jax.sharding.reshard(x, sharding)
  if not any(isinstance(a, jax.core.Tracer) for a in (x, parameter)):
    wanted = getattr(parameter, "sharding", None) or x.sharding  # parameters may be structs
    return x if x.sharding.is_equivalent_to(wanted, x.ndim) else jax.device_put(x, wanted)
  # XLA propagates shardings before it simplifies this to x.
  return jnp.where(parameter == parameter, x, x)


def replicated(x: jax.Array) -> jax.Array:
  """Gathers x onto every device of the mesh in the context."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    programs = dict.fromkeys(("cpus", "gpus", "tpus"), _refuse)
    return by_device({"any": lambda x: x} | programs, x)
  is_local = all(kind == AxisType.Manual for kind in mesh.axis_types)
  return x if is_local else jax.lax.with_sharding_constraint(x, PartitionSpec())


def _refuse(x):
  raise ValueError(
    "Replicated products of matrices on several devices take their mesh from the context: with"
    " jax.set_mesh(mesh), around the first call of the step."
  )


def automatic(f: Callable, x: jax.Array, *args):
  """Calls f on args; XLA's partitioner shards it if the type of x carries a sharding.

  Args:
    f: a function that closes over no tracers.
    x: the array whose sharding the results take, if they have its rank.
    *args: pytrees of arrays.

  Returns:
    The results of f.
  """
  sharding = explicit(x)
  if sharding is None:
    return f(*args)
  plain = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), args)
  result = jax.eval_shape(f, *plain)
  out = jax.tree.map(lambda r: fitted(sharding, r.shape), result)
  return jax.sharding.auto_axes(f, out_sharding=out)(*args)


def automatic_in_place(f: Callable, mesh, old, *args):
  """Calls f on args through XLA's partitioner; the results take the shardings of old."""
  out = jax.tree.map(lambda x: NamedSharding(mesh, spec_of(x)), old)
  return jax.sharding.auto_axes(f, out_sharding=out)(*args)


def mesh_of(arrays: Sequence[jax.Array]):
  """The mesh whose Explicit axes shard some of the arrays; None if there is none."""
  found = [sharding.mesh for sharding in map(explicit, arrays) if sharding is not None]
  return found[0] if found else None


def spec_of(x) -> PartitionSpec:
  """The partition spec in an array's type, with an entry for each axis."""
  sharding = explicit(x)
  return PartitionSpec(*[None] * jnp.ndim(x)) if sharding is None else sharding.spec


class Shards:
  """A step of leaves shard by shard, on a mesh with Explicit axes.

  Attributes:
    shapes: the shapes of the gradients' shards.
    stacks: the shapes of the weights' shards.
    fit_words: whether the places in each whole array fit in 32 bits.
  """

  def __init__(self, leaves: Sequence[Any], shardings: list[NamedSharding], has_index: bool):
    self._shardings, self._wholes = shardings, [leaf.low.shape for leaf in leaves]
    self.stacks = list(map(_shard_shape, shardings, self._wholes))
    self.shapes = [shape[1:] if has_index else shape for shape in self.stacks]
    self.fit_words = all(math.prod(shape) < 1 << 32 for shape in self._wholes)
    self._specs: list[Any] = []
    for leaf, sharding in zip(leaves, shardings, strict=True):
      spec, one = sharding.spec, sharding.spec[1:] if has_index else sharding.spec
      state = jax.tree.map(lambda _, spec=spec: spec, leaf[1:4])
      keys = jax.tree.map(lambda _: PartitionSpec(), leaf[4:])
      self._specs.append(type(leaf)(PartitionSpec(*one), *state, *keys))

  @staticmethod
  def of(leaves: Sequence[Any], mesh, has_index: bool) -> "Shards | None":
    """The step of these leaves; None if a shard's edge cuts a block, or a stack's first axis.

    Args:
      leaves: ``programs.leaf.Leaf``s.
      mesh: the leaves' mesh (``mesh_of``).
      has_index: whether the leaves are stacks; the program then steps one array
        of each.
    """
    shardings = [NamedSharding(mesh, spec_of(leaf.low)) for leaf in leaves]
    for leaf, sharding in zip(leaves, shardings, strict=True):
      is_stack_cut = has_index and sharding.spec[0] is not None
      if is_stack_cut or not _keeps_blocks(sharding, leaf.low.shape):
        return None
    return Shards(leaves, shardings, has_index)

  def each(self, program: Callable) -> Callable:
    """A program on whole arrays that runs the given one on each shard.

    It first moves every array that is sharded unlike its weight.
    """
    mesh = self._shardings[0].mesh

    def local(*args):
      windows = list(map(_window, self._shardings, self._wholes))
      return program(*args, windows=windows)

    def call(*args):
      everywhere = jax.tree.map(lambda _: PartitionSpec(), args)
      specs = (everywhere[0], self._specs, *everywhere[2:])
      out = [leaf[1:4] for leaf in self._specs]
      move = lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec))
      mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
      return mapped(*jax.tree.map(move, args, specs))

    return call


def _shard_shape(sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of a shard."""
  return tuple(n // _parts(sharding, axes) for n, axes in zip(shape, sharding.spec, strict=True))


def _keeps_blocks(sharding: NamedSharding, shape: tuple[int, ...]) -> bool:
  """Whether all axes of the mesh are Explicit and no shard's edge cuts a block or packed group."""
  is_explicit = all(kind == AxisType.Explicit for kind in sharding.mesh.axis_types)
  is_cut = bool(shape) and sharding.spec[-1] is not None
  return is_explicit and not (is_cut and _shard_shape(sharding, shape)[-1] % BLOCK)


def _window(sharding: NamedSharding, shape: tuple[int, ...]) -> Window:
  """The window of the current shard in its array, inside ``Shards.each``."""
  part = _shard_shape(sharding, shape)
  start = [
    0 if n == whole else jax.lax.axis_index(axes) * n
    for n, whole, axes in zip(part, shape, sharding.spec, strict=True)
  ]
  return Window(tuple(start), shape)
