"""portable_update: an elementwise update with the same bits in every program.

Programs of different shapes step a leaf: with all other leaves, in chunks, as one
layer of a stack. A compiler may contract a multiplication and an addition in one of
them and not in another. ``pallas_kernels.programs.hoist`` prevents that.
"""

import jax
import jax.numpy as jnp

from optax_lowmem.trees import pytrees
from pallas_kernels.formats.arithmetic import rounded
from pallas_kernels.programs.hoist import hoist


def portable_update(inner, updates, state, params, **extra_args):
  """``inner.update(updates, state, params, **extra_args)``."""
  if not jax.tree.leaves(updates):  # only counters
    return inner.update(updates, state, params, **extra_args)
  weights = dict(jax.tree_util.tree_leaves_with_path(params))
  named, treedef = jax.tree_util.tree_flatten_with_path(state)

  def is_statistic(path, leaf) -> bool:
    start = pytrees.owner(path, weights)
    return start is not None and jnp.shape(leaf) == jnp.shape(weights[path[start:]])

  places = [i for i, (path, leaf) in enumerate(named) if is_statistic(path, leaf)]

  def call(updates, statistics, params):
    leaves = [leaf for _, leaf in named]
    for i, x in zip(places, statistics, strict=True):
      leaves[i] = x
    state = jax.tree.unflatten(treedef, leaves)
    updates, state = inner.update(updates, state, params, **extra_args)
    return updates, state

  args = updates, [named[i][1] for i in places], params
  scalars, rest = hoist(call, jax.tree.map(jax.typeof, args))
  updates, state = rest(scalars, *args)
  # The next operation is the sum with the weight.
  return jax.tree.map(lambda u: rounded(u) if pytrees.is_float(u) else u, updates), state
