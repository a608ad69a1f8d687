"""hoist: an elementwise function, split into scalars that are computed once and the rest.

The rest can be evaluated so that its bits do not depend on the program that it
is compiled in: no multiplication is contracted with an addition; or, in a GPU
kernel, whose compiler always contracts, of two products the second alone.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, TypeGuard

import jax
from jax.extend.core import Literal, Var

from pallas_kernels.formats.arithmetic import keep_apart, rounded, sign_of

# What no compiler contracts with an addition; everything else may be, or hand on, a product.
_NO_PRODUCTS = {
  "add", "sub", "div", "sqrt", "rsqrt", "cbrt", "max", "min", "clamp", "select_n", "sign", "abs",
  "exp", "log", "pow", "tanh", "logistic", "floor", "ceil", "round",
}  # fmt: skip


_SUMS = (jax.lax.add_p, jax.lax.sub_p)

# Of one array's shape, and yet not elementwise.
_NOT_ELEMENTWISE = (
  "cum", "sort", "rev", "fft", "iota", "random", "threefry", "gather", "scatter", "dynamic", "roll",
  "conv_general", "dot", "triangular", "cholesky", "while", "scan",
)  # fmt: skip


def hoist(f: Callable, structs) -> tuple[list[jax.Array], Callable[..., Any]]:
  """Takes what f computes of scalars alone out of f.

  f may close over traced scalars (a learning rate, a count): a kernel's body
  may not, and has no power function for a bias correction.

  Args:
    f: a function of arrays of one shape, which is not ().
    structs: its arguments, a tuple of trees of `jax.ShapeDtypeStruct`.

  Returns:
    The scalars, and a function `rest(scalars, *args, contracts=False,
    products=None, keep=None)` that closes over no tracer. A division by one of them is a
    multiplication by its reciprocal (an error of 1 ulp, for divisors up to
    2**126). With contracts, multiplications and additions may be contracted.
    A Mosaic GPU kernel gives products: which of the arrays may be products.
    Results that the rest goes on with pass keep, a barrier, as soon as they are
    computed.
    It takes arrays of another common shape, too, where `rest.takes_any_shape`.

  Raises:
    ValueError: if f is not elementwise, or closes over an array.
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
      evaluate(eqn, known, known)
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
      if not _is_in(var, known):
        continue
      if eqn.primitive is jax.lax.div_p and i == 1 and _is_float(known[var]):
        passed(inverted, var, 1 / known[var])
      else:
        passed(used, var, known[var])
  for var in jaxpr.outvars:
    if _is_in(var, known):
      passed(used, var, known[var])
  _check_elementwise(kept, {x.shape for x in flat})
  scalars = [rounded(x) if _is_float(x) else x for x in scalars]
  scalars.append(jax.numpy.zeros((), jax.numpy.float32))  # of `keep_apart`
  computed_products = {
    var
    for eqn in kept
    for var in eqn.outvars
    if eqn.primitive.name not in _NO_PRODUCTS or _is_in(eqn.invars[-1], inverted)
  }

  results = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
  inner_results = results & {var for eqn in kept for var in eqn.invars if _is_in(var, results)}

  def rest(values, *args, contracts=False, products: Sequence[bool] | None = None, keep=None):
    evaluate_one = evaluate
    if products is not None:
      given = {var for var, is_one in zip(jaxpr.invars, products, strict=True) if is_one}
      evaluate_one = functools.partial(
        _evaluate_in_kernel, products=computed_products | given, zero=values[-1]
      )
    elif not contracts:
      evaluate_one = functools.partial(evaluate, products={*jaxpr.invars} | computed_products)
    arrays = jax.tree.leaves(args)
    env = {var: values[i] for var, i in used.items()}
    env |= dict(zip(jaxpr.invars, arrays, strict=True))
    is_other = any(x.shape != struct.shape for x, struct in zip(arrays, flat, strict=True))
    for eqn in kept:
      if is_other and eqn.primitive is jax.lax.broadcast_in_dim_p:
        env[eqn.outvars[0]] = jax.numpy.broadcast_to(read(env, eqn.invars[0]), arrays[0].shape)
        continue
      if eqn.primitive is jax.lax.div_p and _is_in(eqn.invars[1], inverted):
        env[eqn.outvars[0]] = read(env, eqn.invars[0]) * values[inverted[eqn.invars[1]]]
      else:
        evaluate_one(eqn, env)
      if keep is not None:
        env |= {var: keep(env[var]) for var in eqn.outvars if var in inner_results}
    return jax.tree.unflatten(jax.tree.structure(out), [read(env, x) for x in jaxpr.outvars])

  is_flat = not any(map(_calls, kept))
  takes_any_shape = len({x.shape for x in flat}) == 1 and is_flat
  rest.takes_any_shape = takes_any_shape  # type: ignore[attr-defined]
  return scalars, rest


def _calls(eqn) -> bool:
  """Whether an equation holds a program of its own, on arrays of the shapes it was traced with."""
  return any(hasattr(x, "jaxpr") or hasattr(x, "eqns") for x in jax.tree.leaves(eqn.params))


def _check_elementwise(eqns, shapes):
  """Raises for what mixes elements; of arrays of several shapes only by its name."""
  one_shape = len(shapes) == 1 and () not in shapes
  for eqn in eqns:
    name, outs = eqn.primitive.name, [getattr(x.aval, "shape", ()) for x in eqn.outvars]
    if name.startswith(("reduce", "arg")) and name != "reduce_precision":
      mixes = any(x.aval.shape for x in eqn.invars)
    else:
      mixes = name.startswith(_NOT_ELEMENTWISE) or (one_shape and not set(outs) <= shapes)
    if mixes:
      raise ValueError(
        f"An optimizer that steps one leaf at a time is elementwise; this one uses {name!r} of"
        f" {', '.join(str(x.aval) for x in eqn.invars)}. (Clipping by norms, trust ratios, noise"
        " and the like see more than one element.)"
      )


def _inlined(jaxpr, consts, args):
  """Evaluates a jaxpr, and what it calls under jit as part of it."""
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "jit":
      called = eqn.params["jaxpr"]
      results = _inlined(called.jaxpr, called.consts, [read(env, x) for x in eqn.invars])
      env |= dict(zip(eqn.outvars, results, strict=True))
    elif eqn.primitive is jax.lax.integer_pow_p and eqn.params["y"] in (1, 2):
      x = read(env, eqn.invars[0])  # Optax's g**1, which Mosaic GPU has no lowering for
      env[eqn.outvars[0]] = x if eqn.params["y"] == 1 else x * x
    else:
      evaluate(eqn, env)
  return [read(env, x) for x in jaxpr.outvars]


def read(env, var):
  """A variable's value, or a literal's."""
  return var.val if isinstance(var, Literal) else env[var]


def evaluate(eqn, env, products=frozenset()):
  """Adds an equation's results to env; of a sum, rounds the terms that are in products."""
  operands = [read(env, x) for x in eqn.invars]
  if eqn.primitive in _SUMS and _is_float(operands[0]):
    pairs = zip(eqn.invars, operands, strict=True)
    operands = [rounded(x) if _is_in(var, products) else x for var, x in pairs]
  _bind(eqn, env, operands)


def _evaluate_in_kernel(eqn, env, products, zero):
  """`evaluate` for Mosaic GPU."""
  operands = [read(env, x) for x in eqn.invars]
  is_float = _is_float(operands[0]) if operands else False
  if is_float and eqn.primitive in _SUMS and all(_is_in(x, products) for x in eqn.invars):
    # LLVM contracts one of two products, in one kernel this, in another that one. The first is
    # Optax's share of the gradient: the smaller error.
    operands[0] = keep_apart(operands[0], zero)
  if is_float and eqn.primitive is jax.lax.sign_p:
    env[eqn.outvars[0]] = sign_of(operands[0])
  else:
    _bind(eqn, env, operands)


def _bind(eqn, env, operands):
  params = eqn.primitive.get_bind_params(eqn.params)
  results = eqn.primitive.bind(*operands, **params)
  results = results if eqn.primitive.multiple_results else [results]
  env |= dict(zip(eqn.outvars, results, strict=True))


def _is_in(var, variables) -> TypeGuard[Var]:
  return not isinstance(var, Literal) and var in variables


def _is_float(x) -> bool:
  return jax.numpy.issubdtype(jax.numpy.result_type(x), jax.numpy.floating)
