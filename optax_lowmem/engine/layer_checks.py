"""layer_checks: tests an optimizer that is declared layerwise on small arrays, one of them NaN.

An optimizer that closes over a traced value cannot be tested and is taken at its word.
"""

from collections.abc import Mapping
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax


def check_leaves(inner: optax.GradientTransformation):
  """Raises if the update of one leaf depends on another leaf."""
  leaves = {"first": np.ones((2, 2), np.float32), "second": np.full((2, 2), np.nan, np.float32)}
  if _is_reached(_update(inner, leaves, lambda update: update["first"])):
    raise ValueError(
      "The optimizer is declared layerwise, but the update of one leaf depends on other leaves (on"
      " a global norm, for example). Put such a member in front, as in optax.chain("
      "optax.clip_by_global_norm(1.0), tx), or take clip_norm= of fused_backward."
    )


def check_stacks(inner: optax.GradientTransformation, stacks: Mapping[str, jax.Array]):
  """Raises if the update of one layer of a stack depends on another layer.

  Args:
    inner: the optimizer.
    stacks: parameters by name.
  """
  small = {name: (2, *(min(n, 4) for n in x.shape[1:])) for name, x in stacks.items()}
  results = {}
  for shape in set(small.values()):
    stack = np.linspace(0.5, 1.0, math.prod(shape), dtype=np.float32).reshape(shape)
    stack[1] = np.nan
    results[shape] = _is_reached(_update(inner, stack, lambda update: update[0]))
  for name, x in stacks.items():
    if results[small[name]]:
      raise ValueError(
        f"loss_fn scans over the first axis of params{name}, of shape {x.shape}, but the optimizer"
        " takes the whole stack at once (its norm, for example), so that one layer's update depends"
        " on the others. Give each layer a leaf of its own, or an optimizer that takes stacks layer"
        " by layer."
      )


def _update(inner, x, part):
  """A part of the update of x, which is also the gradient."""

  @jax.jit
  def run(x):
    return part(inner.update(x, inner.init(jax.tree.map(jnp.ones_like, x)), x)[0])

  with jax.ensure_compile_time_eval(), jax.debug_nans(False):
    return run(x)


def _is_reached(update) -> bool:
  """Whether the NaN of another array reached an update."""
  return not isinstance(update, jax.core.Tracer) and not np.isfinite(update).all()
