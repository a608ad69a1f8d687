"""layer_checks: tests what a user promises with layerwise=True."""

from collections.abc import Mapping
import concurrent.futures

import jax
from jax.extend.core import jaxpr_as_fun
from jax.interpreters.partial_eval import dce_jaxpr
import jax.numpy as jnp
import numpy as np
import optax

from optax_lowmem.trees import pytrees


def check_leaves(inner: optax.GradientTransformation, params):
  """Raises if the update of the first leaf, or a counter, depends on another leaf.

  It looks at a trace, so nothing is executed.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  weights = {path: x for path, x in leaves if pytrees.is_inexact(x)}
  if len(weights) < 2:
    return
  first = next(iter(weights))
  struct = lambda x: jax.ShapeDtypeStruct(
    jnp.shape(x), jnp.float32 if pytrees.is_half(x) else jnp.result_type(x)
  )
  structs = jax.tree.map(struct, params)
  state = jax.eval_shape(inner.init, structs)
  args = structs, state, structs

  def is_of_another(path) -> bool:
    start = pytrees.owner(path, weights)
    return start is not None and path[start:] != first

  def others(tree) -> list[bool]:
    return [is_of_another(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

  closed, results = jax.make_jaxpr(inner.update, return_shape=True)(*args)
  _, used = dce_jaxpr(closed.jaxpr, [not x for x in others(results)])
  if any(x and other for x, other in zip(used, others(args), strict=True)):
    raise ValueError(
      f"The optimizer is declared layerwise, but the update of params{pytrees.name_of(first)}, or"
      " a counter, depends on other leaves (on a global norm, for example). Put such a member in"
      " front, as in optax.chain(optax.clip_by_global_norm(1.0), tx), take clip_norm= of"
      " fused_backward, or leave the declaration out."
    )


def check_stacks(inner: optax.GradientTransformation, stacks: Mapping[str, jax.Array]):
  """Raises if a layer of a stack is not stepped as that layer alone.

  It steps small stacks of two layers, one of them NaN. An optimizer that closes over a traced
  value is taken at its word.

  Args:
    inner: the optimizer.
    stacks: parameters by name.
  """
  small = {name: (2, *(min(n, 4) for n in x.shape[1:])) for name, x in stacks.items()}
  holds = {shape: _is_layer_by_layer(inner, shape) for shape in set(small.values())}
  for name, x in stacks.items():
    if not holds[small[name]]:
      raise ValueError(
        f"loss_fn scans over the first axis of params{name}, of shape {x.shape}, but the optimizer"
        " does not step each layer of the stack as it steps the layer alone (it takes the norm of"
        " the whole stack, for example). Give each layer a leaf of its own, or an optimizer that"
        " takes stacks layer by layer."
      )


def _is_layer_by_layer(inner, shape: tuple[int, ...]) -> bool:
  def update(x):
    return inner.update(x, inner.init(jnp.ones_like(x)), x)[0]

  trace = jax.make_jaxpr(lambda x: (update(x)[0], update(x[0])))
  closed = trace(jax.ShapeDtypeStruct(shape, jnp.float32))
  if any(isinstance(x, jax.core.Tracer) for x in closed.consts):
    return True
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  x[1] = np.nan

  def run():
    with jax.transfer_guard("allow"), jax.debug_nans(False):
      return jax.device_get(jax.jit(jaxpr_as_fun(closed))(x))

  # In a thread of its own, it runs outside the trace and the mesh of the caller.
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    layer, alone = thread.submit(run).result()
  return np.allclose(layer, alone, rtol=0.01, atol=0.01 * np.abs(alone).max(initial=0))
