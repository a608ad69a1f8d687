"""hoist: an elementwise function, split into scalars that are computed once and the rest."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal


def hoist(f: Callable, structs) -> tuple[list[jax.Array], Callable[..., Any]]:
  """Takes what f computes of scalars alone out of f.

  f may close over traced scalars (a learning rate, a count): a kernel's body
  may not, and has no power function for a bias correction.

  Args:
    f: a function of arrays of one shape, which is not ().
    structs: its arguments, a tuple of trees of `jax.ShapeDtypeStruct`.

  Returns:
    The scalars, and a function `rest(scalars, *args)` that closes over no
    tracer. A division by one of them is a multiplication by its reciprocal
    (an error of 1 ulp, for divisors up to 2**126).
  """
  closed, out = jax.make_jaxpr(f, return_shape=True)(*structs)
  # Once more, without functions under jit, which may compute scalars and arrays.
  flat = jax.tree.leaves(structs)
  closed = jax.make_jaxpr(lambda *args: _inlined(closed.jaxpr, closed.consts, args))(*flat)
  jaxpr = closed.jaxpr
  known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  kept = []
  for eqn in jaxpr.eqns:
    is_scalar = all(isinstance(x, Literal) or x in known for x in eqn.invars)
    if is_scalar and all(getattr(x.aval, "shape", None) == () for x in eqn.outvars):
      _evaluate(eqn, known)
    else:
      kept.append(eqn)

  used: dict[Any, int] = {}  # scalars that the rest reads, and where they are passed
  inverted: dict[Any, int] = {}
  scalars: list[jax.Array] = []

  def passed(places, var, value):
    if jax.numpy.shape(value):
      raise ValueError(
        "A rule closes over scalars alone; this one closes over an array of shape"
        f" {jax.numpy.shape(value)}."
      )
    if var not in places:
      places[var] = len(scalars)
      scalars.append(value)

  for eqn in kept:
    for i, var in enumerate(eqn.invars):
      if isinstance(var, Literal) or var not in known:
        continue
      is_float = jax.numpy.issubdtype(jax.numpy.result_type(known[var]), jax.numpy.floating)
      if eqn.primitive is jax.lax.div_p and i == 1 and is_float:
        passed(inverted, var, 1 / known[var])
      else:
        passed(used, var, known[var])
  for var in jaxpr.outvars:
    if not isinstance(var, Literal) and var in known:
      passed(used, var, known[var])

  def rest(values, *args):
    env = {var: values[i] for var, i in used.items()}
    env |= dict(zip(jaxpr.invars, jax.tree.leaves(args), strict=True))
    for eqn in kept:
      divisor = eqn.invars[-1] if eqn.primitive is jax.lax.div_p else None
      if not isinstance(divisor, Literal) and divisor in inverted:
        env[eqn.outvars[0]] = _read(env, eqn.invars[0]) * values[inverted[divisor]]
      else:
        _evaluate(eqn, env)
    return jax.tree.unflatten(jax.tree.structure(out), [_read(env, x) for x in jaxpr.outvars])

  return scalars, rest


def _inlined(jaxpr, consts, args):
  """Evaluates a jaxpr, and what it calls under jit as part of it."""
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "jit":
      called = eqn.params["jaxpr"]
      results = _inlined(called.jaxpr, called.consts, [_read(env, x) for x in eqn.invars])
      env |= dict(zip(eqn.outvars, results, strict=True))
    elif eqn.primitive is jax.lax.integer_pow_p and eqn.params["y"] in (1, 2):
      x = _read(env, eqn.invars[0])  # Optax's g**1, which Mosaic GPU has no lowering for
      env[eqn.outvars[0]] = x if eqn.params["y"] == 1 else x * x
    else:
      _evaluate(eqn, env)
  return [_read(env, x) for x in jaxpr.outvars]


def _read(env, var):
  return var.val if isinstance(var, Literal) else env[var]


def _evaluate(eqn, env):
  params = eqn.primitive.get_bind_params(eqn.params)
  results = eqn.primitive.bind(*(_read(env, x) for x in eqn.invars), **params)
  results = results if eqn.primitive.multiple_results else [results]
  env |= dict(zip(eqn.outvars, results, strict=True))
