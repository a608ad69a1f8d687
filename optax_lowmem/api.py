"""Functions on a transformation: init, step, and the float32 master weights."""

import functools

import jax
import jax.numpy as jnp
import optax

from optax_lowmem.engine import landing, sessions
from optax_lowmem.states import (
  DeltaBitsState,
  check_residuals,
  first_state,
  leaf_streams,
  refuse_state,
)
from optax_lowmem.transforms import loss_scaling
from optax_lowmem.trees import host_memory, pytrees
from pallas_kernels.operations.merge import merge
from pallas_kernels.operations.split import split_stream


def init(tx: optax.GradientTransformation, params):
  """Converts float32 parameters to their formats and creates the optimizer state.

  The residuals in the state hold the difference between the float32 parameters
  and the half-precision weights, up to the grid of each format.

  Args:
    tx: a transformation that contains :func:`optax_lowmem.delta_bits` or one of
      our optimizers, at any depth.
    params: the float32 parameters; other leaves stay unchanged. In a module (of
      Equinox, say), leaves that are no arrays are settings: functions, strings,
      numbers. ``tx`` sees None in their places.

  Returns:
    ``(params, opt_state)``.

  Raises:
    TypeError: if a leaf of a dictionary or a list is a Python float, or if a leaf
      is float64 that JAX would round to float32. The message names the leaf.
    ValueError: if two members claim one leaf, or if a member behind one of
      optax_lowmem would change its updates. (The residual would then belong to
      an update other than the one that lands.) The message names the member.
      Put it in front, or wrap the whole chain:
      ``lowmem.delta_bits(optax.chain(optax.adamw(lr), optax.scale(0.25)))``.
      See :func:`optax_lowmem.delta_bits` for errors about formats.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.delta_bits(optax.adamw(1e-3), "bf16+8")
    >>> params, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
    >>> print(params["w"].dtype, opt_state.residuals["w"].dtype)
    bfloat16 int8
  """
  params, opt_state, _ = _init_and_find(tx, params, for_step=False)
  return params, opt_state


def init_ours(tx, params):
  """``init`` of a tx that must contain one of ours and at most one loss scale."""
  params, opt_state, found_ours = _init_and_find(tx, params, for_step=True)
  if not found_ours:
    raise ValueError(
      "tx holds nothing of optax_lowmem, so the parameters would stay float32. Wrap it:"
      ' lowmem.delta_bits(tx, "bf16+8").'
    )
  loss_scaling.loss_scale(opt_state)  # raises if there are two
  return params, opt_state


def _init_and_find(tx, params, *, for_step: bool):
  _check_transformation(tx, "lowmem.init(tx, params)")
  refuse_state(params, "params", "lowmem.init(tx, params)")
  trained = pytrees.without_settings(params)
  with sessions.open_session(sessions.InitSession) as session:
    opt_state = tx.init(trained)
  trained = pytrees.map_named(session.weights.get, trained)
  landing.check(tx, trained, opt_state, DeltaBitsState, for_step=for_step)
  return pytrees.map_named(session.weights.get, params), opt_state, session.found_ours


def _check_transformation(tx, call: str):
  """Raises if the first argument is no transformation."""
  if not (hasattr(tx, "init") and hasattr(tx, "update")):
    raise TypeError(
      f"tx is a {type(tx).__name__}, not a transformation with init and update. The order is"
      f" {call}."
    )


def step(tx: optax.GradientTransformation, grads, opt_state, params, **extra_args):
  """Takes one optimizer step, which writes weights and residuals in one pass.

  No tree of updates exists in between. The step is in place if jit donates
  params and opt_state. A transformation that ends in one of ours (a chain, masked
  or partition) takes this path. A transformation with nothing of ours, or with
  ours inside a wrapper that has a ``jax.lax.cond``, runs ``tx.update`` and
  ``optax.apply_updates``. What of opt_state lies in the host's memory
  (``"pinned_host"``) comes to the device for the step, and goes back.

  Args:
    tx: any Optax transformation.
    grads: the gradients, in the tree of params; of the scaled loss if tx has a
      loss scale.
    opt_state: the state of tx.
    params: the parameters, in their formats. A setting of a module (see
      :func:`optax_lowmem.init`) has None as its gradient.
    **extra_args: extra arguments for ``tx.update``.

  Returns:
    ``(params, opt_state)``.

  Raises:
    ValueError: if params is None, if grads do not match params, or if a
      transformation stands behind one of ours, so its update could not land. The
      message names the leaf or the transformation.
    TypeError: if a gradient or a parameter has the wrong dtype. The message names
      the leaf.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.adamw(1e-3)
    >>> params, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
    >>> def train_step(params, opt_state, x):
    ...   grads = jax.grad(lambda params: (x @ params["w"]).mean())(params)
    ...   return lowmem.step(tx, grads, opt_state, params)
    >>> train_step = jax.jit(train_step, donate_argnums=(0, 1))
    >>> params, opt_state = train_step(params, opt_state, jnp.ones(4))
    >>> print(opt_state.step, params["w"].dtype)
    1 bfloat16
  """
  _check_transformation(tx, _STEP)
  if params is None:
    raise ValueError(f"lowmem.step needs params: {_STEP}; got None.")
  refuse_state(params, "params", _STEP)
  refuse_state(grads, "grads", _STEP)
  given = params
  params = _trained(grads, opt_state, given)
  pytrees.check_gradients(grads, params)
  tx = optax.with_extra_args_support(tx)
  opt_state, put_back = host_memory.on_device(opt_state)
  with sessions.refuse_members_behind(), sessions.open_session(sessions.StepSession) as session:
    session.given = {id(g): g for g in jax.tree.leaves(grads)}
    updates, opt_state = tx.update(grads, opt_state, params, **extra_args)

  def land(p, u):
    return u.take() if isinstance(u, sessions.Landed) else optax.apply_updates(p, u)

  params = jax.tree.map(land, params, updates)
  if session.landed:
    raise ValueError(
      "lowmem.step: a transformation behind one of optax_lowmem dropped its updates, but the step"
      " has already written the residuals. Put that transformation in front."
    )
  return pytrees.map_named(pytrees.named_leaves(params).get, given), put_back(opt_state)


_STEP = "lowmem.step(tx, grads, opt_state, params)"


def _trained(grads, opt_state, params):
  """The parameters without the settings that have no gradient."""
  with_gradient = pytrees.named_leaves(grads).keys()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = pytrees.name_of(path)
    if pytrees.is_setting(path, leaf) and name in with_gradient and first_state(opt_state):
      raise TypeError(
        f"params{name} is {leaf!r}, no array, so lowmem.init took it for a setting; grads have a"
        f" gradient for it. To train it, write jnp.asarray({leaf!r}) before lowmem.init. Otherwise"
        " give it None as its gradient (eqx.filter_grad does)."
      )
  return pytrees.without_settings(params, but=with_gradient)


def master_params(params, opt_state):
  """Merges weights and residuals into the float32 master weights.

  Inside a loss, it computes with the masters instead of the weights. The gradient of
  a master is the gradient of its weight, in the weight's dtype.

  Args:
    params: the parameters, in their formats.
    opt_state: their optimizer state.

  Returns:
    The tree of params, with float32 masters for leaves with a format; other
    leaves are unchanged.

  Raises:
    ValueError: if a residual does not match its parameter. The message names the
      leaf.
    TypeError: if a leaf does not have its format's dtype.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.adamw(1e-3, weights="bf16+16")
    >>> params, opt_state = lowmem.init(tx, {"w": jnp.full(32, 0.1)})
    >>> print(params["w"][0], lowmem.master_params(params, opt_state)["w"][0])
    0.100098 0.1
    >>> loss_fn = lambda params: lowmem.master_params(params, opt_state)["w"].sum()
    >>> print(f"{loss_fn(params):.3f}", jax.grad(loss_fn)(params)["w"].dtype)
    3.200 bfloat16
  """
  refuse_state(params, "params", "lowmem.master_params(params, opt_state)")
  masters = {name: _merge(*parts) for name, parts in master_parts(params, opt_state).items()}
  return pytrees.map_named(masters.get, params)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _merge(low, residual, fmt):
  return merge(low, residual, fmt)


@_merge.defjvp
def _merge_jvp(fmt, primals, tangents):
  # Otherwise the gradient would be zero in silence, because bits have no derivative.
  return _merge(*primals, fmt), tangents[0].astype(jnp.float32)


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
  """Loads float32 master weights into the formats of an optimizer state.

  Values on a format's grid, as :func:`optax_lowmem.master_params` returns them,
  are kept exactly. Other values are rounded to the grid as the format specifies.

  Args:
    params: the parameters; leaves with a format are float32 masters.
    opt_state: a state with the formats. Its moments stay; its residuals are
      replaced.

  Returns:
    ``(params, opt_state)``.

  Raises:
    ValueError: if a leaf with a format is missing.
    TypeError: if a leaf with a format is not float32.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.adamw(1e-3)
    >>> params, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
    >>> params32 = {"w": jnp.full((4, 32), 0.5)}
    >>> params, opt_state = lowmem.load_master(params32, opt_state)
    >>> print(params["w"].dtype, params["w"][0, 0])
    bfloat16 0.5
  """
  refuse_state(params, "params", "lowmem.load_master(params, opt_state)")
  by_name = pytrees.named_leaves(params)
  weights = {}

  def load(node):
    if not isinstance(node, DeltaBitsState):
      return node
    streams = leaf_streams(node.key, node.step, node.formats.by_name)
    residuals = {}
    for name, fmt in node.formats.table:
      if name not in by_name:
        raise ValueError(f"params have no leaf {name}, but the state has a format for it.")
      x = by_name[name]
      if jnp.result_type(x) != jnp.float32:
        raise TypeError(f"params{name} is {jnp.result_type(x)}; load_master takes float32.")
      weights[name], residuals[name] = split_stream(jnp.asarray(x), fmt, streams[name])
    return node._replace(residuals=pytrees.map_named(residuals.get, node.residuals))

  opt_state = jax.tree.map(load, opt_state, is_leaf=lambda x: isinstance(x, DeltaBitsState))
  return pytrees.map_named(weights.get, params), opt_state


def residuals(params, opt_state):
  """The packed residuals, in the tree of params; None for a leaf without one."""
  found = {}
  for state in pytrees.find_states(opt_state, DeltaBitsState):
    found.update(pytrees.named_leaves(state.residuals))
  return pytrees.map_named(lambda name, _: found.get(name), params)
