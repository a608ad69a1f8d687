"""Functions around a transformation: init, step, and the float32 master weights."""

import jax
import jax.numpy as jnp
import optax

from optax_lowmem.engine import landing, sessions
from optax_lowmem.states import DeltaBitsState, check_residuals, leaf_streams
from optax_lowmem.transforms import loss_scaling
from optax_lowmem.trees import pytrees
from pallas_kernels.operations.merge import merge
from pallas_kernels.operations.split import split_stream


def init(tx: optax.GradientTransformation, params):
  """Converts float32 parameters to their formats, and makes the optimizer state.

  What the half-precision weights cannot hold goes into the residuals of the
  state, up to each format's grid.

  Args:
    tx: a transformation with `lowmem.delta_bits` in it, wherever it stands.
    params: the float32 parameters; other leaves stay as they are.

  Returns:
    (params, opt_state).

  Raises:
    ValueError: if two members claim one leaf, or if a member that stands behind
      one of optax_lowmem would change its updates: the residual would belong to
      another update than the one that lands. It is named; wrap the whole chain,
      `lowmem.delta_bits(optax.chain(optax.adamw(lr), optax.scale(0.25)))`, or
      put it in front. See `delta_bits` for formats.

  Examples:
    >>> tx = lowmem.delta_bits(optax.adamw(1e-3), "bf16+8")
    >>> params, opt_state = lowmem.init(tx, params)
  """
  params, opt_state, _ = _init_and_find(tx, params, for_step=False)
  return params, opt_state


def init_ours(tx, params):
  """`init`, where tx has to hold something of ours and one loss scale at most."""
  params, opt_state, found_ours = _init_and_find(tx, params, for_step=True)
  if not found_ours:
    raise ValueError(
      "tx holds nothing of optax_lowmem, so that the parameters would stay float32; wrap it:"
      ' lowmem.delta_bits(tx, "bf16+8").'
    )
  loss_scaling.loss_scale(opt_state)  # raises if there are two
  return params, opt_state


def _init_and_find(tx, params, *, for_step: bool):
  with sessions.open_session(sessions.InitSession) as session:
    opt_state = tx.init(params)
  params = pytrees.map_named(session.weights.get, params)
  landing.check(tx, params, opt_state, DeltaBitsState, for_step=for_step)
  return params, opt_state, session.found_ours


def step(tx: optax.GradientTransformation, grads, opt_state, params, **extra_args):
  """One optimizer step: weights and residuals are written at once, no updates in between.

  Donate `opt_state` and `params` to jit, and the step is in place. A
  transformation that ends in one of ours (a chain, masked or partition) takes
  this path; with ours inside a wrapper that has a `lax.cond`, or nothing of
  ours, it is `tx.update` and `optax.apply_updates`.

  Args:
    tx: any Optax transformation.
    grads: gradients, the tree of params; scaled where tx has a loss scale.
    opt_state: tx's state.
    params: the parameters.
    **extra_args: for `tx.update`.

  Returns:
    (params, opt_state).

  Raises:
    ValueError: if params is None, if grads do not belong to params, or if a
      transformation stands behind one of ours (it is named: its update could
      not land).

  Examples:
    >>> params, opt_state = lowmem.step(tx, grads, opt_state, params)
  """
  if params is None:
    raise ValueError("lowmem.step needs params; got None.")
  pytrees.check_gradients(grads, params)
  tx = optax.with_extra_args_support(tx)
  with sessions.refuse_members_behind(), sessions.open_session(sessions.StepSession) as session:
    session.given = {id(g): g for g in jax.tree.leaves(grads)}
    updates, opt_state = tx.update(grads, opt_state, params, **extra_args)

  def land(p, u):
    return u.take() if isinstance(u, sessions.Landed) else optax.apply_updates(p, u)

  params = jax.tree.map(land, params, updates)
  if session.landed:
    raise ValueError(
      "lowmem.step: a transformation behind one of optax_lowmem dropped its updates, but the"
      " residuals are already written. Put it in front."
    )
  return params, opt_state


def master_params(params, opt_state):
  """The float32 master weights: each weight with its residual.

  Args:
    params: the parameters, in their formats.
    opt_state: the state that belongs to them.

  Returns:
    The tree of params, float32 where a leaf has a format.

  Raises:
    ValueError: if a residual does not belong to its parameter; it is named.
    TypeError: if a leaf is not of its format's dtype.

  Examples:
    >>> params32 = lowmem.master_params(params, opt_state)
  """
  masters = {name: merge(*parts) for name, parts in master_parts(params, opt_state).items()}
  return pytrees.map_named(masters.get, params)


def master_parts(params, opt_state) -> dict[str, tuple]:
  """(weight, residual, format) of each leaf that has a format, by name."""
  weights = pytrees.named_leaves(params)
  parts = {}
  for state in pytrees.find_states(opt_state, DeltaBitsState):
    held = {name: weights[name] for name, _ in state.formats.table if name in weights}
    residuals = check_residuals(state.residuals, held, state.formats)
    for name, low in held.items():
      parts[name] = low, residuals.get(name), state.formats.by_name[name]
  return parts


def load_master(params, opt_state):
  """Puts float32 master weights into the formats of an optimizer state.

  Values on a format's grid (from `master_params`) are kept exactly; others are
  rounded onto it as the format says.

  Args:
    params: the parameters, float32 where a leaf has a format.
    opt_state: a state with the formats; its moments stay.

  Returns:
    (params, opt_state).

  Raises:
    ValueError: if a leaf with a format is missing.
    TypeError: if a leaf with a format is not float32.

  Examples:
    >>> params, opt_state = lowmem.load_master(params32, opt_state)
  """
  by_name = pytrees.named_leaves(params)
  weights = {}

  def load(node):
    if not isinstance(node, DeltaBitsState):
      return node
    streams = leaf_streams(node.key, node.step, node.formats.by_name)
    residuals = {}
    for name, fmt in node.formats.table:
      if name not in by_name:
        raise ValueError(f"params have no leaf {name}, which the state has a format for.")
      x = by_name[name]
      if jnp.result_type(x) != jnp.float32:
        raise TypeError(f"params{name} is {jnp.result_type(x)}; load_master takes float32.")
      weights[name], residuals[name] = split_stream(jnp.asarray(x), fmt, streams[name])
    return node._replace(residuals=pytrees.map_named(residuals.get, node.residuals))

  opt_state = jax.tree.map(load, opt_state, is_leaf=lambda x: isinstance(x, DeltaBitsState))
  return pytrees.map_named(weights.get, params), opt_state


def residuals(params, opt_state):
  """The packed residuals, in the tree of params; None where a leaf has none."""
  found = {}
  for state in pytrees.find_states(opt_state, DeltaBitsState):
    found.update(pytrees.named_leaves(state.residuals))
  return pytrees.map_named(lambda name, _: found.get(name), params)
