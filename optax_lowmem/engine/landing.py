"""Checks before the first step whether the updates of our members land.

``check`` traces ``tx.update`` while our members only mark their updates, and
follows the marks through the program. It refuses a member behind ours that changes
an update, even inside ``lax.cond`` (MultiSteps, apply_if_finite). Nothing is
computed.
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
# A cache of its own: a real step must not reuse the jitted functions that are traced here.
_jit_cache = jax.make_user_context(None)


def is_checking() -> bool:
  """Whether ``check`` calls the members. They then only mark their updates."""
  return _is_checking.get()


def mark(updates, state, params, update_dtype=jnp.float32):
  """Marks the updates of a member with a ``DeltaBitsState`` under ``check``.

  Args:
    updates: the updates that the member receives.
    state: the member's state.
    params: the parameters that the member receives.
    update_dtype: the dtype of the member's updates, as in ``delta_bits``.

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
  """Raises if a member of tx keeps an update of ours from landing.

  Args:
    tx: the whole transformation.
    params: the parameters, in their formats.
    opt_state: the state of tx.
    kind: ``DeltaBitsState``.
    for_step: whether only ``lowmem.step`` will be called. It also refuses a member
      that reads the updates and passes them on.

  Raises:
    ValueError: if there is one. The message names the member.
  """
  params, opt_state = nnx_variables.pure(params), nnx_variables.pure(opt_state)
  states = list(pytrees.find_states(opt_state, kind))
  if not all(isinstance(state.formats, Formats) for state in states):
    return  # a placeholder's state, from `optax.tree.map_params`
  weights = pytrees.named_leaves(params)
  for state in states:
    for name, _ in state.formats.table:
      if name not in weights:
        raise ValueError(
          f"A member of optax_lowmem received the parameter {name}, which params do not have: a"
          " transformation around it passes it other leaves than params. Put the member around"
          " that transformation: lowmem.delta_bits(optax.flatten(optax.adamw(lr)))."
        )
  if not any(state.formats.table for state in states):
    return
  try:
    changing, using = _culprits(optax.with_extra_args_support(tx), params, opt_state, kind)
  except Exception as error:  # tx.update may need something that init cannot know
    warnings.warn(
      "optax_lowmem cannot look through tx before the first step. A transformation behind one of"
      " optax_lowmem may therefore change its updates unnoticed; only lowmem.step would refuse it."
      f" tx.update: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
      stacklevel=4,
    )
    return
  if changing:
    raise ValueError(sessions.changes_updates(_first_named(changing)))
  if using and for_step:
    raise ValueError(sessions.uses_updates(_first_named(using)))


def _culprits(tx, params, opt_state, kind) -> tuple[list[str], list[str]]:
  """The members that change our updates, and those that use updates that ``step`` lacks."""
  closed, out = _trace(tx, params, opt_state)
  program = closed.jaxpr
  flow = updates_flow.Flow()
  inputs, outputs = flow.values(program)
  _, old_state = jax.tree.unflatten(jax.tree.structure((params, opt_state)), inputs)
  _, new_state = jax.tree.unflatten(jax.tree.structure(out), outputs)
  # A value is a tuple, not a leaf, so the zip is by order: params and updates come first.
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
  """The program of ``tx.update``, with the arguments that it asks for, and its results' tree."""
  named: set[str] = set()
  # Gradients in the weights' dtype, then in float32. The last two match no real step, but show
  # where the updates go, too.
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
  """The extra arguments that an error of ``tx.update`` asks for."""
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


# Extra arguments of Optax's transformations, made from gradients. Any other is a scalar.
_EXTRA_ARGS: dict[str, Callable[[Any], Any]] = {
  "value": _scalar,
  "grad": lambda grads: grads,
  "value_fn": lambda grads: _sum,
  "obj_fn": lambda grads: _sum,
  "grad_fn": lambda grads: lambda params, *args: jax.tree.map(jnp.zeros_like, grads),
}
