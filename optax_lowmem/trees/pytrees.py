"""Pytrees: leaf names for errors, and our states within an opt_state."""

from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.placement import sharded

HALF_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def name_of(path) -> str:
  """A leaf's name in errors and in format tables, for example "['dense']['kernel']"."""
  return jax.tree_util.keystr(plain_path(path)) or "params"


def plain_path(path):
  """A leaf's path without the part that NNX variables add."""
  return path[:-1] if path and path[-1] == jax.tree_util.GetAttrKey("value") else path


def named_leaves(tree) -> dict[str, Any]:
  """The leaves by name; None and MaskedNode are not leaves."""
  return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(f, tree, *rest):
  """``jax.tree.map`` of a function whose first argument is the leaf's name."""
  return jax.tree_util.tree_map_with_path(lambda path, *xs: f(name_of(path), *xs), tree, *rest)


def owner(path, weights) -> int | None:
  """Finds the parameter of an array in an optimizer state.

  The array's path ends in the path of its parameter.

  Args:
    path: the path of the array.
    weights: the paths of the parameters.

  Returns:
    The index in path at which the longest matching parameter path begins; None if
    none matches.
  """
  return next((i for i in range(1, len(path) + 1) if path[i:] in weights), None)


def prefix_in(path, entries) -> tuple | None:
  """The shortest prefix of a path, the path included, that is in entries; None if none is."""
  return next((path[:i] for i in range(len(path) + 1) if path[:i] in entries), None)


def is_setting(path, leaf) -> bool:
  """True for a leaf that is not trained: no array and no number, or a number in a module.

  Equinox modules have such leaves: activation functions, the rate of a dropout. A
  number in a dictionary or a list is a parameter.
  """
  if hasattr(leaf, "dtype"):
    return False
  path = plain_path(path)
  is_attribute = bool(path) and isinstance(path[-1], jax.tree_util.GetAttrKey)
  return is_attribute or not isinstance(leaf, (bool, int, float, complex))


def without_settings(params, but: Collection[str] = ()):
  """Replaces each setting by None, except those whose names are in ``but``."""
  drop = lambda path, x: None if is_setting(path, x) and name_of(path) not in but else x
  return jax.tree_util.tree_map_with_path(drop, params)


def is_half(x) -> bool:
  """True for a bfloat16 or float16 array."""
  return getattr(x, "dtype", None) in HALF_DTYPES


def is_float(x) -> bool:
  """True for a real floating-point array or scalar (not float0)."""
  return jnp.issubdtype(jnp.result_type(x), jnp.floating) if _has_value(x) else False


def is_inexact(x) -> bool:
  """True for a floating-point or complex array or scalar (not float0)."""
  return jnp.issubdtype(jnp.result_type(x), jnp.inexact) if _has_value(x) else False


def _has_value(x) -> bool:
  dtype = getattr(x, "dtype", None)
  return dtype != jax.dtypes.float0 and not (
    dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
  )


def sharded_like(inner_state, params):
  """Shards the arrays of a state like their parameters, where the shapes are equal."""
  weights = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

  def place(path, x):
    start = owner(path, weights)
    if start is None or not isinstance(x, jax.Array):
      return x
    parameter = weights[path[start:]]
    is_alike = is_float(parameter) and jnp.shape(parameter) == x.shape
    return sharded.like(x, parameter) if is_alike else x

  return jax.tree_util.tree_map_with_path(place, inner_state)


def find_states(tree, kind: type) -> Iterator[Any]:
  """Yields every state of a type in an opt_state, outer ones first."""
  for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind)):
    if isinstance(node, kind):
      yield node
      yield from find_states(getattr(node, "inner_state", None), kind)


def check_same_structure(tree, params, what: str, hint: str = ""):
  """Raises a ValueError that names the first leaf that only one of two trees has."""
  if jax.tree.structure(tree) == jax.tree.structure(params):  # type: ignore[operator]
    return
  found, wanted = named_leaves(tree), named_leaves(params)
  for name in wanted:
    if name not in found:
      raise ValueError(f"{what} have no leaf {name}, but params do.{hint}")
  for name in found:
    if name not in wanted:
      raise ValueError(f"{what} have a leaf {name}, but params do not.")
  raise ValueError(
    f"{what} and params have the same leaves but different containers:"
    f" {jax.tree.structure(tree)} and {jax.tree.structure(params)}."
  )


_FROZEN = (
  " If it is frozen, put None in its place in params before lowmem.init, and merge it in the loss;"
  " or pass a gradient of zeros. Otherwise differentiate with respect to all of params."
)


def check_gradients(grads, params, what: str = "grads"):
  """Raises if gradients do not match params; the message names the leaf."""
  check_same_structure(grads, params, what, _FROZEN)
  wanted = named_leaves(params)
  for name, g in named_leaves(grads).items():
    p = wanted[name]
    if jnp.shape(g) != jnp.shape(p):
      raise ValueError(f"{what}{name} has shape {jnp.shape(g)}; its parameter has {jnp.shape(p)}.")
    if is_float(p) and not is_float(g):
      raise TypeError(
        f"{what}{name} is {jnp.result_type(g)}; the gradient of a {p.dtype} parameter must be a"
        " float."
      )
