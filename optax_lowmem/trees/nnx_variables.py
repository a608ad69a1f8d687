"""Flax NNX variables in the arguments of transformations.

``nnx.Optimizer`` calls ``tx.init`` with a State of variables and ``tx.update``
with plain arrays. A loop that splits a model passes variables to both. Our
transformations see plain arrays only. Their states then hold each array as a
variable with the metadata of its parameter, because NNX uses the metadata to
shard and to save.
"""

import functools
import math
import sys
from typing import Any

from flax.core import meta, spmd
import jax
from jax.sharding import NamedSharding, PartitionSpec
import optax

from optax_lowmem.trees import host_memory, pytrees
from pallas_kernels.formats.state_formats import Blocks


def transformation(init, update) -> optax.GradientTransformationExtraArgs:
  """A transformation made of two functions that see plain arrays in the device's memory only."""

  @functools.wraps(init)
  def init_variables(params):
    if not _has_variables(params):
      return init(params)
    return annotate(init(pure(params)), params)

  @functools.wraps(update)
  def call(updates, state, params=None, **extra_args):
    state, put_back = host_memory.on_device(state)
    if not _has_variables((updates, state, params)):
      updates, state = update(updates, state, params, **extra_args)
      return updates, put_back(state)
    trees = map(pure, (updates, state, params))
    new_updates, new_state = update(*trees, **extra_args)
    return like(updates, new_updates), put_back(like(state, new_state))

  return optax.GradientTransformationExtraArgs(init_variables, call)


def like(tree, arrays):
  """Puts a tree of plain arrays into the variables of another tree."""
  return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(arrays))


def pure(tree):
  """Replaces the variables in a tree by their arrays."""
  # Importing NNX takes 0.2 s, and without that import there are no variables.
  nnx = sys.modules.get("flax.nnx")
  return tree if nnx is None else nnx.as_pure(tree)


def annotate(state, params):
  """Makes variables of the arrays in an optimizer state whose parameters are variables."""
  variables = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_variable)
  owners = {
    (*path, *rest): (variable, leaf)
    for path, variable in variables
    if _is_variable(variable)
    for rest, leaf in jax.tree_util.tree_leaves_with_path(pure(variable))
  }

  def wrap(path, node):
    start = pytrees.owner(path, owners)
    if start is None:
      return node
    return jax.tree.map(lambda x: _variable_like(*owners[path[start:]], x), node)

  is_leaf = lambda x: isinstance(x, Blocks)
  return jax.tree_util.tree_map_with_path(wrap, state, is_leaf=is_leaf)


def _variable_like(variable, parameter, x):
  """Makes an array a variable like its parameter; an array of another rank stays as it is."""
  if x.ndim != parameter.ndim:
    return x
  metadata = variable.get_metadata()
  fitted = {
    name: _fit(metadata[name], metadata, x.shape)
    for name in ("out_sharding", "optimizer_sharding")
    if x.shape != parameter.shape and metadata.get(name)
  }
  return variable.replace(x, **fitted)


def _fit(sharding, metadata: dict[str, Any], shape):
  """A parameter's sharding, without the mesh axes that do not divide this last axis.

  Packed residuals and block scales have the parameter's axes, but the last one
  differs in size. JAX refuses shards of unequal size.
  """
  if isinstance(sharding, NamedSharding):
    spec = _fit(sharding.spec, metadata | {"mesh": sharding.mesh}, shape)
    return NamedSharding(sharding.mesh, spec)
  mesh = metadata.get("mesh") or meta.get_global_mesh()
  if not isinstance(sharding, tuple | PartitionSpec) or len(sharding) < len(shape) or mesh is None:
    return sharding
  names = spmd.get_pspec(sharding, metadata.get("sharding_rules"))[-1]
  names = names if isinstance(names, tuple) else (names,)
  if shape[-1] % math.prod(mesh.shape.get(name, 1) for name in names) == 0:
    return sharding
  fitted = (*sharding[:-1], None)
  return PartitionSpec(*fitted) if isinstance(sharding, PartitionSpec) else fitted


def _is_variable(x) -> bool:
  nnx = sys.modules.get("flax.nnx")
  return nnx is not None and isinstance(x, nnx.Variable)


def _has_variables(tree) -> bool:
  if "flax.nnx" not in sys.modules:
    return False
  return any(map(_is_variable, jax.tree.leaves(tree, is_leaf=_is_variable)))
