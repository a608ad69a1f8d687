"""sharded: operations on arrays whose types carry a sharding (a mesh with Explicit axes).

Under Auto axes XLA partitions what it is given, and a trace knows no sharding.
Under Explicit axes a reshape that cuts a sharded axis anew is an error. So an
operation here is handed to XLA's partitioner (`automatic`), or, where no block
is cut by a shard's edge, run on each shard alone (`Shards`), without any
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


def explicit(x) -> NamedSharding | None:
  """The sharding in an array's type; None where no axis of it is sharded explicitly."""
  sharding = getattr(jax.typeof(x), "sharding", None)
  if not isinstance(sharding, NamedSharding) or AxisType.Explicit not in sharding.mesh.axis_types:
    return None
  return sharding if any(axes is not None for axes in sharding.spec) else None


def has_explicit_axes(x) -> bool:
  """Whether an array is on a mesh with Explicit axes, or traced where one is set."""
  mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
  kinds = [kind for m in (mesh, jax.sharding.get_abstract_mesh()) if m for kind in m.axis_types]
  return AxisType.Explicit in kinds


def fitted(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
  """An array's sharding for what is stored for it: along the axes that it divides evenly.

  Args:
    sharding: of an array.
    shape: of another of the same rank, or of any other rank (which is replicated).

  Returns:
    The sharding of the other.
  """
  spec = sharding.spec if len(sharding.spec) == len(shape) else [None] * len(shape)
  parts = [_parts(sharding, axes) for axes in spec]
  spec = [axes if n % k == 0 else None for axes, n, k in zip(spec, shape, parts, strict=True)]
  return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _parts(sharding: NamedSharding, axes) -> int:
  """Into how many parts an axis of an array is cut."""
  names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
  return math.prod(sharding.mesh.shape[name] for name in names)


def like(x: jax.Array, parameter: jax.Array) -> jax.Array:
  """Gives x the sharding of a parameter of its shape, also where only XLA knows that."""
  sharding = explicit(parameter)
  if sharding is not None:
    return jax.sharding.reshard(x, sharding)
  if not any(isinstance(a, jax.core.Tracer) for a in (x, parameter)):
    wanted = getattr(parameter, "sharding", None) or x.sharding  # parameters may be structs
    return x if x.sharding.is_equivalent_to(wanted, x.ndim) else jax.device_put(x, wanted)
  # Shardings are propagated before this is simplified to x.
  return jnp.where(parameter == parameter, x, x)


def automatic(f: Callable, x: jax.Array, *args):
  """Calls f(*args), left to XLA's partitioner where x's type carries a sharding.

  Args:
    f: a function that closes over no tracers.
    x: the array that says how; results of its rank are sharded like it.
    *args: pytrees of arrays.

  Returns:
    What f returns.
  """
  sharding = explicit(x)
  if sharding is None:
    return f(*args)
  plain = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), args)
  result = jax.eval_shape(f, *plain)
  out = jax.tree.map(lambda r: fitted(sharding, r.shape), result)
  return jax.sharding.auto_axes(f, out_sharding=out)(*args)


def automatic_in_place(f: Callable, mesh, old, *args):
  """Calls f(*args), left to XLA's partitioner; results are sharded like the arrays of old."""
  out = jax.tree.map(lambda x: NamedSharding(mesh, spec_of(x)), old)
  return jax.sharding.auto_axes(f, out_sharding=out)(*args)


def mesh_of(arrays: Sequence[jax.Array]):
  """The mesh along whose Explicit axes some of the arrays are sharded; or None."""
  found = [sharding.mesh for sharding in map(explicit, arrays) if sharding is not None]
  return found[0] if found else None


def spec_of(x) -> PartitionSpec:
  """The spec in an array's type, with an entry for each axis."""
  sharding = explicit(x)
  return PartitionSpec(*[None] * jnp.ndim(x)) if sharding is None else sharding.spec


class Shards:
  """How leaves are stepped shard by shard, on a mesh of Explicit axes.

  Attributes:
    shapes: of the shards of the gradients.
    stacks: of the shards of the weights.
    fit_words: whether the places in each whole array fit 32 bits.
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
    """None where a block is cut by a shard's edge, or a stack along its first axis.

    Args:
      leaves: `programs.leaf.Leaf`s.
      mesh: of the leaves (`mesh_of`).
      has_index: whether they are stacks of which one array is stepped.
    """
    shardings = [NamedSharding(mesh, spec_of(leaf.low)) for leaf in leaves]
    for leaf, sharding in zip(leaves, shardings, strict=True):
      is_stack_cut = has_index and sharding.spec[0] is not None
      if is_stack_cut or not _keeps_blocks(sharding, leaf.low.shape):
        return None
    return Shards(leaves, shardings, has_index)

  def each(self, program: Callable) -> Callable:
    """A program of whole arrays that runs the given one on each shard.

    What is sharded otherwise than its weight is moved first.
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
  """Whether no block or pack of values is cut by a shard's edge (and the mesh is all Explicit)."""
  is_explicit = all(kind == AxisType.Explicit for kind in sharding.mesh.axis_types)
  is_cut = bool(shape) and sharding.spec[-1] is not None
  return is_explicit and not (is_cut and _shard_shape(sharding, shape)[-1] % BLOCK)


def _window(sharding: NamedSharding, shape: tuple[int, ...]) -> Window:
  """Which part of an array a shard is, inside `Shards.each`."""
  part = _shard_shape(sharding, shape)
  start = [
    0 if n == whole else jax.lax.axis_index(axes) * n
    for n, whole, axes in zip(part, shape, sharding.spec, strict=True)
  ]
  return Window(tuple(start), shape)
