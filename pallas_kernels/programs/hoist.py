"""hoist: splits an elementwise function into scalars, computed once, and the rest.

The rest can be evaluated without contracting multiplications and additions. Its bits
then do not depend on the program around it. The compiler of a GPU kernel always
contracts; there, the rest chooses which of two products the compiler may contract.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, TypeGuard

import jax
from jax.extend.core import Literal, Var
import jax.numpy as jnp

from pallas_kernels.formats.arithmetic import keep_apart, rounded, sign_of

# No compiler contracts these with an addition. Any other result may be a product.
_NO_PRODUCTS = {
  "add", "sub", "div", "sqrt", "rsqrt", "cbrt", "max", "min", "clamp", "select_n", "sign", "abs",
  "exp", "log", "pow", "tanh", "logistic", "floor", "ceil", "round",
}  # fmt: skip


_SUMS = (jax.lax.add_p, jax.lax.sub_p)

# These keep an array's shape but are not elementwise.
_NOT_ELEMENTWISE = (
  "cum", "sort", "rev", "fft", "iota", "random", "threefry", "gather", "scatter", "dynamic", "roll",
  "conv_general", "dot", "triangular", "cholesky", "while", "scan",
)  # fmt: skip


def hoist(f: Callable, structs) -> tuple[list[jax.Array], "Hoisted"]:
  """``Hoisted(f, structs)`` and its scalars, for a function of arrays alone."""
  hoisted = Hoisted(f, structs)
  return hoisted.scalars(), hoisted


class Hoisted:
  """An elementwise function whose scalars are computed outside of it.

  A function may close over traced scalars (a learning rate) and compute with them. A
  kernel's body may not, and has no power function for a bias correction.

  Attributes:
    takes_any_shape: whether it also accepts arrays of another common shape.
    is_wide: whether scalars turn its arrays into float64.
    closes_over_tracers: whether it closes over tracers, so it is valid in one trace
      only.
  """

  def __init__(self, f: Callable, structs, scalars=()):
    """Traces f and splits it.

    Args:
      f: a function of arrays of one shape other than (), then of scalars.
      structs: the arrays, as a tuple of trees of ``jax.ShapeDtypeStruct``.
      scalars: the scalars, in the same form.

    Raises:
      ValueError: if f is not elementwise, or closes over an array.
    """
    self._f, self._scalars = f, scalars
    closed, self._out = jax.make_jaxpr(f, return_shape=True)(*structs, *scalars)
    # Traces again with jitted functions inlined, because they may compute scalars and arrays.
    self._args, self._structs = structs, jax.tree.leaves(structs)
    flat = jax.tree.leaves((structs, scalars))
    for rewritten in (_inlined, _with_roots_of_statistics):
      run = functools.partial(rewritten, closed.jaxpr, closed.consts)
      closed = jax.make_jaxpr(run)(*flat)
    jaxpr, self._consts = closed.jaxpr, closed.consts
    self._invars, self._outvars = jaxpr.invars[: len(self._structs)], jaxpr.outvars
    self._known = [*jaxpr.constvars, *jaxpr.invars[len(self._structs) :]]
    self._before, self._eqns = _parted(_live(jaxpr), self._known)
    known = {*self._known, *(var for eqn in self._before for var in eqn.outvars)}
    # The scalars that the rest reads: variable -> position. Those in `_inverted` are divisors.
    self._used: dict[Var, int] = {}
    self._inverted: dict[Var, int] = {}
    self._find_passed(known)
    shapes = {x.shape for x in self._structs}
    _check_elementwise(self._eqns, shapes)
    self._products = {
      var
      for eqn in self._eqns
      for var in eqn.outvars
      if eqn.primitive.name not in _NO_PRODUCTS or _is_in(eqn.invars[-1], self._inverted)
    }
    read = {var for eqn in self._eqns for var in eqn.invars if not isinstance(var, Literal)}
    self._kept = {var for var in self._outvars if _is_in(var, read)}
    self.takes_any_shape = len(shapes) == 1 and not any(map(_calls, self._eqns))
    self.is_wide = any(
      x.aval.shape and x.aval.dtype == "float64" for eqn in self._eqns for x in eqn.outvars
    )
    self.closes_over_tracers = any(isinstance(x, jax.core.Tracer) for x in self._consts)

  def at(self, shape: tuple[int, ...]) -> "Hoisted":
    """The same function, split for arrays of another shape."""
    if self.takes_any_shape or all(x.shape == shape for x in self._structs):
      return self
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, x.dtype), self._args)
    return Hoisted(self._f, structs, self._scalars)

  def _find_passed(self, known: set[Var]):
    """Numbers the scalars that the rest reads."""
    for eqn in self._eqns:
      for i, var in enumerate(eqn.invars):
        if _is_in(var, known):
          divides = eqn.primitive is jax.lax.div_p and i == 1 and _is_float(var.aval)
          self._pass(self._inverted if divides else self._used, var)
    for var in self._outvars:
      if _is_in(var, known):
        self._pass(self._used, var)

  def _pass(self, places: dict[Var, int], var: Var):
    if shape := getattr(var.aval, "shape", ()):
      raise ValueError(
        f"A rule may close over scalars only; this one closes over an array of shape {shape}."
      )
    places.setdefault(var, len(self._used) + len(self._inverted))

  def scalars(self, *values) -> list[jax.Array]:
    """Computes the scalars that the rest reads from the scalars of the function."""
    env = dict(zip(self._known, [*self._consts, *jax.tree.leaves(values)], strict=True))
    for eqn in self._before:
      evaluate(eqn, env, env)
    places = {i: env[var] for var, i in self._used.items()}
    places |= {i: 1 / env[var] for var, i in self._inverted.items()}
    found = [places[i] for i in range(len(places))]
    found = [rounded(x) if _is_float(x) else x for x in found]
    return [*found, jnp.zeros((), jnp.float32)]  # the last is the zero of `keep_apart`

  def __call__(
    self, scalars, *args, contracts: bool = False, products: Sequence[bool] | None = None, keep=None
  ):
    """Evaluates the rest, which closes over no tracer.

    A division by a scalar becomes a multiplication by its reciprocal, with an error
    of 1 ulp for divisors up to 2**126.

    Args:
      scalars: the result of ``scalars``.
      *args: arrays of one shape, in trees like structs.
      contracts: whether a compiler may contract multiplications and additions.
      products: in a Mosaic GPU kernel, for each array whether it may be a product.
      keep: a barrier for those results that the rest itself reads.

    Returns:
      The results of f.
    """
    if products is not None:
      given = {var for var, is_one in zip(self._invars, products, strict=True) if is_one}
      step = functools.partial(
        _evaluate_in_kernel, products=self._products | given, zero=scalars[-1]
      )
    else:
      step = functools.partial(
        evaluate, products=frozenset() if contracts else self._products.union(self._invars)
      )
    arrays = jax.tree.leaves(args)
    env = {var: scalars[i] for var, i in self._used.items()}
    env |= dict(zip(self._invars, arrays, strict=True))
    is_other = any(x.shape != s.shape for x, s in zip(arrays, self._structs, strict=True))
    for eqn in self._eqns:
      if is_other and eqn.primitive is jax.lax.broadcast_in_dim_p:
        (value,) = read(env, eqn.invars)
        env[eqn.outvars[0]] = jnp.broadcast_to(value, arrays[0].shape)
      elif eqn.primitive is jax.lax.div_p and _is_in(eqn.invars[1], self._inverted):
        (value,) = read(env, eqn.invars[:1])
        env[eqn.outvars[0]] = value * scalars[self._inverted[eqn.invars[1]]]
      else:
        step(eqn, env)
      if keep is not None:
        env |= {var: keep(env[var]) for var in eqn.outvars if var in self._kept}
    return jax.tree.unflatten(jax.tree.structure(self._out), read(env, self._outvars))


def _live(jaxpr):
  """The equations that the results depend on."""
  needed, live = {x for x in jaxpr.outvars if not isinstance(x, Literal)}, []
  for eqn in reversed(jaxpr.eqns):
    if not needed.isdisjoint(eqn.outvars):
      live.append(eqn)
      needed.update(x for x in eqn.invars if not isinstance(x, Literal))
  return live[::-1]


def _parted(eqns, known):
  """The equations that compute scalars from known scalars alone, and the others."""
  known, before, after = set(known), [], []
  for eqn in eqns:
    is_scalar = {x for x in eqn.invars if not isinstance(x, Literal)} <= known
    if is_scalar and {getattr(x.aval, "shape", None) for x in eqn.outvars} == {()}:
      known.update(eqn.outvars)
      before.append(eqn)
    else:
      after.append(eqn)
  return before, after


def _calls(eqn) -> bool:
  """Whether an equation contains a program, which takes only the shapes it was traced with."""
  return any(hasattr(x, "jaxpr") or hasattr(x, "eqns") for x in jax.tree.leaves(eqn.params))


def _check_elementwise(eqns, shapes):
  """Raises for an equation that mixes elements; with several shapes, its name alone decides."""
  one_shape = len(shapes) == 1 and () not in shapes
  for eqn in eqns:
    name, outs = eqn.primitive.name, [getattr(x.aval, "shape", ()) for x in eqn.outvars]
    if name.startswith(("reduce", "arg")) and name != "reduce_precision":
      mixes = any(x.aval.shape for x in eqn.invars)
    else:
      mixes = name.startswith(_NOT_ELEMENTWISE) or (one_shape and not set(outs) <= shapes)
    if mixes:
      raise ValueError(
        f"An optimizer that steps one leaf at a time must be elementwise; this one uses {name!r} of"
        f" {', '.join(str(x.aval) for x in eqn.invars)}. (Clipping by norms, trust ratios and noise"
        " depend on more than one element.)"
      )


def _inlined(jaxpr, consts, *args):
  """Evaluates a jaxpr, with its jitted functions inlined."""
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "jit":
      called = eqn.params["jaxpr"]
      results = _inlined(called.jaxpr, called.consts, *read(env, eqn.invars))
      env |= dict(zip(eqn.outvars, results, strict=True))
    elif eqn.primitive is jax.lax.integer_pow_p and eqn.params["y"] in (1, 2):
      (x,) = read(env, eqn.invars)  # Optax's g**1; Mosaic GPU has no lowering for it
      env[eqn.outvars[0]] = x if eqn.params["y"] == 1 else x * x
    else:
      evaluate(eqn, env)
  return read(env, jaxpr.outvars)


def _with_roots_of_statistics(jaxpr, consts, *args):
  """Evaluates a jaxpr with ``sqrt(x / scalar)`` as ``sqrt(x) / sqrt(scalar)``.

  Adam takes the root of ``nu / (1 - b2**t)``, and the storage that of nu. Now they share it.
  Where both are negative, the root of the quotient would exist; no statistic is.
  """
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
  quotients: dict[Var, Any] = {}  # the equations of quotients, through sums with eps_root = 0
  for eqn in jaxpr.eqns:
    x, *others = eqn.invars or [None]
    if eqn.primitive is jax.lax.div_p and x.aval.shape and not others[0].aval.shape:
      quotients[eqn.outvars[0]] = eqn
    elif eqn.primitive is jax.lax.add_p and _is_in(x, quotients) and _is_zero(others[0]):
      quotients[eqn.outvars[0]] = quotients[x]
    if eqn.primitive is jax.lax.sqrt_p and _is_in(x, quotients):
      x, scalar = read(env, quotients[x].invars)
      env[eqn.outvars[0]] = jnp.sqrt(x) / jnp.sqrt(scalar)
    else:
      evaluate(eqn, env)
  return read(env, jaxpr.outvars)


def _is_zero(x) -> bool:
  return isinstance(x, Literal) and x.val == 0


def read(env, variables) -> list[Any]:
  """The values of variables and literals."""
  return [x.val if isinstance(x, Literal) else env[x] for x in variables]


def evaluate(eqn, env, products=frozenset()):
  """Adds an equation's results to env; in a sum, rounds the terms that are in products."""
  operands = read(env, eqn.invars)
  if products and eqn.primitive in _SUMS and _is_float(operands[0]):
    pairs = zip(eqn.invars, operands, strict=True)
    operands = [rounded(x) if _is_in(var, products) else x for var, x in pairs]
  _bind(eqn, env, operands)


def _evaluate_in_kernel(eqn, env, products, zero):
  """``evaluate`` for Mosaic GPU."""
  operands = read(env, eqn.invars)
  is_float = _is_float(operands[0]) if operands else False
  if is_float and eqn.primitive in _SUMS and all(_is_in(x, products) for x in eqn.invars):
    # LLVM contracts either of two products, not the same one in every kernel. This rounds the
    # first: Optax's share of the gradient, where rounding is the smaller error.
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
  return jnp.issubdtype(jnp.result_type(x), jnp.floating)
