"""Whether the updates of our members land, found out before the first step.

`check` makes the program of a `tx.update` in which our members only mark their
updates, and follows these: a member behind ours that changes them is refused,
also inside `lax.cond` (MultiSteps, apply_if_finite). Nothing is computed.
"""

from collections.abc import Callable
import contextlib
import contextvars
import functools
import re
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import optax

from optax_lowmem.engine import sessions, updates_flow
from optax_lowmem.trees import nnx_variables, pytrees
from optax_lowmem.trees.formats import Formats

_is_checking: contextvars.ContextVar = contextvars.ContextVar("optax_lowmem_check", default=False)
# So that no jitted function which is traced here is taken from JAX's cache in a real step.
_jit_cache = jax.make_user_context(None)


def is_checking() -> bool:
  """Whether members are called by `check`: then they only mark their updates."""
  return _is_checking.get()


def mark(updates, state, params, update_dtype=jnp.float32):
  """What a member with a `DeltaBitsState` does under `check` instead of its update.

  Args:
    updates: as the member gets them.
    state: its state.
    params: as it gets them.
    update_dtype: of its updates, as `delta_bits` takes it.

  Returns:
    (updates, state) of the member.
  """
  weights = {k: x for k, x in pytrees.named_leaves(params).items() if state.formats.get(k)}
  given = {k: u for k, u in pytrees.named_leaves(updates).items() if k in weights}
  is_gradient = update_dtype == "gradient"
  dtypes = {k: jnp.result_type(u) if is_gradient else jnp.float32 for k, u in given.items()}
  new, step = updates_flow.marked(given, weights, state.step, dtypes)
  return pytrees.map_named(lambda name, u: new.get(name, u), updates), state._replace(step=step)


def check(tx, params, opt_state, kind: type, *, for_step: bool):
  """Raises if a member of tx keeps the updates of one of ours from landing.

  Args:
    tx: the whole transformation.
    params: the parameters, in their formats.
    opt_state: tx's state.
    kind: `DeltaBitsState`.
    for_step: whether only `lowmem.step` will be called, which refuses also a
      member that reads the updates and hands them on.

  Raises:
    ValueError: it names the member.
  """
  params, opt_state = nnx_variables.pure(params), nnx_variables.pure(opt_state)
  states = list(pytrees.find_states(opt_state, kind))
  if not all(isinstance(state.formats, Formats) for state in states):
    return  # `optax.tree.map_params` asks for the state of a placeholder
  weights = pytrees.named_leaves(params)
  for state in states:
    for name, _ in state.formats.table:
      if name not in weights:
        raise ValueError(
          f"A member of optax_lowmem got the parameter {name}, which params do not have: a"
          " transformation around it gives it other leaves than params. Put the member around"
          " that transformation: lowmem.delta_bits(optax.flatten(optax.adamw(lr)))."
        )
  if not any(state.formats.table for state in states):
    return
  try:
    changing, using = _culprits(optax.with_extra_args_support(tx), params, opt_state, kind)
  except Exception as error:  # whatever tx.update needs that init cannot know
    warnings.warn(
      "optax_lowmem cannot look through tx before the first step. So a transformation behind one of"
      " optax_lowmem may change its updates unnoticed, except in lowmem.step, which refuses it."
      f" tx.update: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
      stacklevel=4,
    )
    return
  if changing:
    raise ValueError(sessions.changes_updates(_first_named(changing)))
  if using and for_step:
    raise ValueError(sessions.uses_updates(_first_named(using)))


def _culprits(tx, params, opt_state, kind) -> tuple[list[str], list[str]]:
  """The members that change our updates, and those that use them where `step` has none."""
  closed, out = _trace(tx, params, opt_state)
  program = closed.jaxpr
  flow = updates_flow.Flow()
  inputs, outputs = flow.values(program)
  _, old_state = jax.tree.unflatten(jax.tree.structure((params, opt_state)), inputs)
  _, new_state = jax.tree.unflatten(jax.tree.structure(out), outputs)
  # By the order of leaves, in which params come first, and updates: a value is a tuple, no leaf.
  weights = dict(zip(pytrees.named_leaves(params), inputs, strict=False))
  updates = dict(zip(pytrees.named_leaves(out[0]), outputs, strict=False))
  variables = dict(zip(updates, program.outvars, strict=False))
  made_by = {x: eqn for eqn in program.eqns for x in eqn.outvars}
  changing = []
  for old, new in zip(*(pytrees.find_states(x, kind) for x in (old_state, new_state)), strict=True):
    for name, _ in new.formats.table:
      update, weight = updates[name], weights[name]
      if not flow.lands(update, weight, new.step, old.step):
        variable = variables[name]
        eqn = None if hasattr(variable, "val") else made_by.get(variable)
        culprit = flow.culprit(update, weight, new.step)
        changing.append(
          culprit or ("" if eqn is None else updates_flow.member_of(eqn, is_ours=False))
        )
  return changing, flow.touched


def _first_named(members) -> str:
  return next(filter(None, members), "a transformation")


def _trace(tx, params, opt_state):
  """The program of `tx.update`, with whatever arguments it asks for, and its results' tree."""
  named: set[str] = set()
  # Gradients of the weights' dtype or float32; then what is no step's, but shows the way, too.
  attempts = [(False, False, False), (True, False, False), (True, False, True), (True, True, True)]
  while True:
    try:
      update = functools.partial(_update, tx, named, *attempts[0])
      with _checking():
        return jax.make_jaxpr(update, return_shape=True)(params, opt_state)
    except Exception as error:
      missing = _wanted(str(error)) - named
      if missing:
        named |= missing
      elif len(attempts) > 1:
        attempts.pop(0)
      else:
        raise


def _wanted(error: str) -> set[str]:
  """The extra arguments that an error of `tx.update` asks for."""
  if "required keyword-only" in error:
    return set(re.findall(r"'(\w+)'", error))
  return set(re.findall(r"\w+", error)) & set(_EXTRA_ARGS) if "must be provided" in error else set()


def _update(tx, named, has_wide_grads, has_wide_params, gives_known, params, opt_state):
  wide = jax.tree.map(lambda x: x.astype(jnp.float32) if pytrees.is_half(x) else x, params)
  grads = wide if has_wide_grads else params
  names = {*named, *(_EXTRA_ARGS if gives_known else ())}
  extra_args = {name: _EXTRA_ARGS.get(name, _scalar)(grads) for name in names}
  return tx.update(grads, opt_state, wide if has_wide_params else params, **extra_args)


@contextlib.contextmanager
def _checking():
  token = _is_checking.set(True)
  try:
    with _jit_cache(True), jax.disable_jit(False):
      yield
  finally:
    _is_checking.reset(token)


def _scalar(grads):
  del grads
  return jnp.zeros([], jnp.float32)


def _sum(params, *args, **kwargs):
  del args, kwargs
  return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(params))


# What Optax's transformations are given besides gradients, made of gradients; else a scalar.
_EXTRA_ARGS: dict[str, Callable[[Any], Any]] = {
  "value": _scalar,
  "grad": lambda grads: grads,
  "value_fn": lambda grads: _sum,
  "obj_fn": lambda grads: _sum,
  "grad_fn": lambda grads: lambda params, *args: jax.tree.map(jnp.zeros_like, grads),
}
