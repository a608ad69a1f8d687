"""layer_checks: tests whether an optimizer takes a stack layer by layer, as layerwise=True says."""

from collections.abc import Mapping
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax


def check_stacks(inner: optax.GradientTransformation, stacks: Mapping[str, jax.Array]):
  """Raises if the update of one layer of a stack depends on another layer.

  It steps small stacks of two layers, one of them NaN. An optimizer that closes over a
  traced value cannot be tested.

  Args:
    inner: the optimizer.
    stacks: parameters by name.
  """
  small = {name: (2, *(min(n, 4) for n in x.shape[1:])) for name, x in stacks.items()}
  results = {shape: _first_layer(inner, shape) for shape in set(small.values())}
  for name, x in stacks.items():
    update = results[small[name]]
    if not isinstance(update, jax.core.Tracer) and not np.isfinite(update).all():
      raise ValueError(
        f"loss_fn scans over the first axis of params{name}, of shape {x.shape}, but the optimizer"
        " takes the whole stack at once (its norm, for example), so that one layer's update depends"
        " on the others. Give each layer a leaf of its own, or an optimizer that takes stacks layer"
        " by layer."
      )


def _first_layer(inner, shape: tuple[int, ...]):
  """The update of a stack's first layer; the second one is NaN."""

  @jax.jit
  def run(x):
    return inner.update(x, inner.init(jnp.ones(shape)), x)[0][0]

  with jax.ensure_compile_time_eval(), jax.debug_nans(False):
    x = np.linspace(0.5, 1.0, math.prod(shape), dtype=np.float32).reshape(shape)
    x[1] = np.nan
    return run(x)
