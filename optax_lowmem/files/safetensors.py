"""Float32 checkpoints as safetensors, written and read one parameter at a time.

A file consists of eight bytes with the length of the header, the header (JSON:
dtype, shape and place of each tensor), and the values. This module writes it
itself, because the safetensors package takes a whole model at once. It reads a
file after that package has checked it. The name of a tensor is the path of its
parameter, joined by dots.
"""

from collections.abc import Callable
import functools
import json
import math
import os
import struct
from typing import Any

import jax
from jax.extend.core import Literal
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np
import optax

from optax_lowmem import api
from optax_lowmem.engine import sessions
from optax_lowmem.trees import pytrees
from pallas_kernels.operations.merge import merge
from pallas_kernels.placement import sharded
from pallas_kernels.programs import hoist

_NAMES = {
  "bool": "BOOL",
  "complex64": "C64",
  "bfloat16": "BF16",
  "float8_e4m3fn": "F8_E4M3",
  "float8_e5m2": "F8_E5M2",
  **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
  **{f"int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
  **{f"uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}


def export_safetensors(path: str | os.PathLike, params, opt_state) -> None:
  """Writes the float32 master weights to a safetensors file, one at a time.

  At most one float32 master exists at any time. Leaves without a format are
  written unchanged. The file appears under its name once it is complete.

  Args:
    path: the file to write.
    params: the parameters, in their formats; sharded ones are gathered.
    opt_state: their optimizer state.

  Raises:
    ValueError: if a residual does not match its parameter, two parameters map to
      one name, or a leaf cannot be written. The message names the leaf.

  Examples:
    >>> import os, tempfile
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> params, opt_state = lowmem.init(lowmem.adamw(1e-3), {"w": jnp.ones((4, 32))})
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> lowmem.export_safetensors(path, params, opt_state)
    >>> os.path.exists(path)
    True
  """
  leaves = _by_tensor_name(params)
  parts = api.master_parts(params, opt_state)
  structs = {}
  for name, (where, x) in leaves.items():
    if not getattr(x, "is_fully_addressable", True):
      raise ValueError(f"params{where} has shards in other processes; gather it first.")
    structs[name] = jax.ShapeDtypeStruct(
      jnp.shape(x), jnp.float32 if where in parts else jnp.result_type(x)
    )
  # Wide dtypes come first, so every tensor is aligned.
  order = sorted(leaves, key=lambda name: (-structs[name].dtype.itemsize, name))
  header: dict[str, Any] = {"__metadata__": {"format": "flax"}}
  start = 0
  for name in order:
    dtype = _dtype_name(structs[name], leaves[name][0])
    stop = start + _nbytes(structs[name])
    header[name] = {"dtype": dtype, "shape": structs[name].shape, "data_offsets": [start, stop]}
    start = stop
  encoded = json.dumps(header).encode()
  encoded += b" " * (-len(encoded) % 8)
  partial = f"{os.fspath(path)}.partial"
  with open(partial, "wb") as file:
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    for name in order:
      where, x = leaves[name]
      x = np.asarray(_merge(*parts[where]) if where in parts else x)
      file.write(np.ascontiguousarray(x).view(np.uint8) if x.ndim else x.tobytes())
      del x
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def import_safetensors(path: str | os.PathLike, tx: optax.GradientTransformation, like):
  """Initializes parameters from a safetensors file, read one at a time.

  The result equals :func:`optax_lowmem.init` of the same float32 parameters, bit
  for bit. At most one float32 parameter exists at any time.

  Args:
    path: the file to read.
    tx: a transformation, as in :func:`optax_lowmem.init`. Its state for one
      parameter must not depend on the values of another.
    like: the tree of parameters, as arrays or ``jax.ShapeDtypeStruct``s. If a
      leaf has a sharding, its weight, residual and statistics take it (along the
      axes that it divides evenly), and each device reads its own part of the
      file.

  Returns:
    ``(params, opt_state)``.

  Raises:
    ValueError: if the file is not valid, or if a tensor is missing, has no
      parameter, or differs in shape or dtype. The message names the tensor.
    ModuleNotFoundError: if the safetensors package is not installed.

  Examples:
    >>> import os, tempfile
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.adamw(1e-3)
    >>> params, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
    >>> path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
    >>> lowmem.export_safetensors(path, params, opt_state)
    >>> like = {"w": jax.ShapeDtypeStruct((4, 32), jnp.float32)}
    >>> params, opt_state = lowmem.import_safetensors(path, tx, like)
    >>> params["w"].dtype
    dtype(bfloat16)
  """
  structs = jax.tree.map(_struct, like)
  names = _by_tensor_name(structs)
  tensors = _read_header(path)
  for name, (where, x) in names.items():
    if name not in tensors:
      raise ValueError(f"{path} has no tensor {name!r} for params{where}.")
    found_dtype, found_shape, _ = tensors[name]
    if found_shape != x.shape:
      raise ValueError(f"{path}: {name!r} has shape {found_shape}; params{where} has {x.shape}.")
    if found_dtype != (dtype := _dtype_name(x, where)):
      raise ValueError(f"{path}: {name!r} is {found_dtype}; params{where} is {dtype} ({x.dtype}).")
  for name in tensors:
    if name not in names:
      raise ValueError(f"{path} has a tensor {name!r}, which the parameters do not have.")

  def read(i: int, x: jax.ShapeDtypeStruct):
    offset = tensors[in_order[i]][2]
    if not x.size:
      values: Any = np.zeros(x.shape, x.dtype)
    else:  # each tensor gets a mapping, and dropping it releases its pages
      values = np.memmap(path, x.dtype, "r", offset, x.shape)
    part = lambda index: np.array(values[index])  # a copy, because the file may change later
    if x.sharding is None:
      return jnp.asarray(part(...))
    return jax.make_array_from_callback(x.shape, x.sharding, part)

  in_order = list(names)
  init = functools.partial(_init_by_leaf, lambda params: api.init(tx, params))
  meshes: set[Any] = {
    x.sharding.mesh for x in jax.tree.leaves(structs) if isinstance(x.sharding, NamedSharding)
  }
  for name, x in pytrees.named_leaves(structs).items():
    if isinstance(getattr(x.sharding, "mesh", None), AbstractMesh):
      raise ValueError(
        f"like{name} has a sharding without devices, as jax.eval_shape returns it; pass arrays, or"
        " jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))."
      )
  explicit = [mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types]
  if not explicit:
    return init(structs, read)
  # With Explicit axes, the types in each part of the program would carry shardings. With Auto axes,
  # XLA finds the same shardings.
  (mesh,) = explicit
  kinds = (AxisType.Auto,) * len(mesh.axis_names)
  automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
  with jax.set_mesh(automatic):
    results = init(jax.tree.map(lambda x: _moved(x, mesh, automatic), structs), read)
  return jax.tree.map(lambda x: _moved(x, automatic, mesh), results)


def _moved(x, source: Mesh, target: Mesh):
  """Moves the sharding of an array or struct to another mesh of the same devices."""
  if not isinstance(x.sharding, NamedSharding) or x.sharding.mesh != source:
    return x
  sharding = NamedSharding(target, x.sharding.spec)
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  return jax.device_put(x, sharding)


def _init_by_leaf(init: Callable, structs, read: Callable):
  """``init`` of a tree whose leaves are read one by one.

  It traces init once. Then it runs, for each leaf, the part of the program that
  its results need, compiled once for all leaves of one shape and format.
  """
  with sessions.leaf_by_leaf():
    closed, out = jax.make_jaxpr(init, return_shape=True)(structs)
  jaxpr = closed.jaxpr
  leaves = jax.tree.leaves(structs)
  number = {var: i for i, var in enumerate(jaxpr.invars)}
  small, values = _small_values(jaxpr, closed.consts)
  producers = {var: i for i, eqn in enumerate(jaxpr.eqns) if i not in small for var in eqn.outvars}
  places = {path: i for i, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(structs))}
  out_leaves = jax.tree_util.tree_leaves_with_path(out)
  groups: dict[int | None, list[int]] = {}
  for k, (path, _) in enumerate(out_leaves):
    _, sources = _slice(jaxpr, producers, [jaxpr.outvars[k]])
    read_by = sorted(number[var] for var in sources if var in number)
    if len(read_by) > 1:
      raise ValueError(
        f"tx.init computes {jax.tree_util.keystr(path)} of several parameters, so it cannot run"
        " one parameter at a time. Load the file another way and call lowmem.init."
      )
    groups.setdefault(read_by[0] if read_by else _parameter(path, places), []).append(k)

  given_leaf = lambda var: read(number[var], leaves[number[var]])
  results: list[Any] = [None] * len(out_leaves)
  compiled: dict[Any, Callable] = {}
  for i, outputs in groups.items():
    outvars = [jaxpr.outvars[k] for k in outputs]
    program, sources = _slice(jaxpr, producers, outvars)
    eqns = [jaxpr.eqns[j] for j in program]
    shardings = tuple(_sharding(i, leaves, out_leaves[k][1]) for k in outputs)
    key: Any = shardings, _structure(eqns, sources, outvars)
    try:
      run = compiled.get(key)
    except TypeError:  # a parameter of an equation is not hashable
      run, key = None, id(eqns)
    if run is None:
      given = None if set(shardings) == {None} else list(shardings)
      run = jax.jit(functools.partial(_run, eqns, sources, outvars), out_shardings=given)
      compiled[key] = run
    new = run([given_leaf(var) if var in number else values[var] for var in sources])
    jax.block_until_ready(new)  # otherwise reading runs ahead of converting
    for k, x in zip(outputs, new, strict=True):
      results[k] = x
    del new
  return jax.tree.unflatten(jax.tree.structure(out), results)


def _small_values(jaxpr, consts) -> tuple[set[int], dict[Any, Any]]:
  """The equations of small values that depend on no parameter (mainly keys), and the values."""
  known, small = set(jaxpr.constvars), set()
  for i, eqn in enumerate(jaxpr.eqns):
    is_small = all(math.prod(getattr(x.aval, "shape", ())) <= 1024 for x in eqn.outvars)
    if is_small and all(isinstance(x, Literal) or x in known for x in eqn.invars):
      small.add(i)
      known |= set(eqn.outvars)
  values = dict(zip(jaxpr.constvars, consts, strict=True))
  for i in sorted(small):  # without jit: compiling takes far longer
    hoist.evaluate(jaxpr.eqns[i], values)
  return small, values


def _slice(jaxpr, producers, outvars) -> tuple[list[int], list[Any]]:
  """The equations that compute variables, and the inputs that they read."""
  pending = [var for var in outvars if not isinstance(var, Literal)]
  seen, eqns = dict.fromkeys(pending), set()
  while pending:
    i = producers.get(pending.pop())
    if i is None or i in eqns:
      continue
    eqns.add(i)
    for var in jaxpr.eqns[i].invars:
      if not isinstance(var, Literal) and var not in seen:
        seen[var] = None
        pending.append(var)
  return sorted(eqns), [var for var in seen if var not in producers]


def _structure(eqns, sources, outvars):
  """A key that is equal for programs that differ only in the names of variables."""
  numbers = {var: i for i, var in enumerate(sources)}

  def spell(x):
    if isinstance(x, Literal):
      return "literal", str(x.aval), np.asarray(x.val).tobytes()
    return numbers[x]

  lines: list[Any] = [tuple(str(var.aval) for var in sources)]
  for eqn in eqns:
    reads = tuple(map(spell, eqn.invars))
    numbers |= {var: len(numbers) + i for i, var in enumerate(eqn.outvars)}
    lines.append((eqn.primitive, reads, tuple(sorted(eqn.params.items(), key=lambda x: x[0]))))
  return (*lines, tuple(map(spell, outvars)))


def _run(eqns, sources, outvars, values):
  """Runs equations; no result shares its buffer with another result or with an input."""
  env = dict(zip(sources, values, strict=True))
  for eqn in eqns:
    hoist.evaluate(eqn, env)
  return [jnp.array(x) for x in hoist.read(env, outvars)]


def _parameter(path, places) -> int | None:
  """The number of the parameter that an array in the state belongs to."""
  for whole in (path, path[:-1]):  # the second path is for codes and scales
    if (start := pytrees.owner(whole, places)) is not None:
      return places[whole[start:]]
  return None


def _sharding(i: int | None, leaves, x):
  """The sharding of parameter i, adapted to an array that belongs to it."""
  sharding = None if i is None else leaves[i].sharding
  if not isinstance(sharding, NamedSharding):
    return sharding
  missing = [None] * (len(leaves[i].shape) - len(sharding.spec))
  whole = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, *missing))
  return sharding if x.shape == leaves[i].shape else sharded.fitted(whole, x.shape)


_merge = jax.jit(merge, static_argnums=2)


def _by_tensor_name(tree) -> dict[str, tuple[str, Any]]:
  """(name for errors, leaf) by name in the file."""
  found: dict[str, tuple[str, Any]] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    where = pytrees.name_of(path)
    name = jax.tree_util.keystr(pytrees.plain_path(path), simple=True, separator=".") or "params"
    if name in found:
      raise ValueError(
        f"params{where} and params{found[name][0]} would both be named {name!r} in the file."
      )
    found[name] = where, leaf
  return found


def _struct(x) -> jax.ShapeDtypeStruct:
  sharding = getattr(x, "sharding", None)
  if isinstance(x, jax.Array) and not x.committed:
    sharding = None
  return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=sharding)


def _nbytes(x) -> int:
  return math.prod(x.shape) * x.dtype.itemsize


def _dtype_name(x, where: str) -> str:
  name = str(x.dtype)
  if name not in _NAMES:
    raise ValueError(f"params{where} is {name}, a dtype that safetensors does not support.")
  return _NAMES[name]


def _read_header(path) -> dict[str, tuple[str, tuple[int, ...], int]]:
  """(dtype, shape, offset in bytes) by tensor name; raises if the file is not valid."""
  try:
    import safetensors
  except ModuleNotFoundError:
    raise ModuleNotFoundError(
      'import_safetensors needs the safetensors package: pip install "optax_lowmem[safetensors]".'
    ) from None
  try:
    with safetensors.safe_open(path, "numpy"):  # checks the header, and that it fits the file
      pass
  except safetensors.SafetensorError as error:
    raise ValueError(f"{path} is no valid safetensors file: {error}.") from error
  with open(path, "rb") as file:
    (count,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(count))
  header.pop("__metadata__", None)
  return {
    name: (entry["dtype"], tuple(entry["shape"]), 8 + count + entry["data_offsets"][0])
    for name, entry in header.items()
  }
