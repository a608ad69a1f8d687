"""Follows the updates of our members through the program of a ``tx.update``.

The program is a jaxpr in which ``marked`` stands for our members: it makes their
updates and the counter of their state. Each value of the program has a description:

- ``(NEW, n, weight)``: the unchanged update of a weight from call n of ``marked``;
  ``(NEW, n)``: the counter of that call;
- ``ZERO``: zeros, an update that moves nothing;
- ``(CHOICE, which, values)``: one of several values, as a ``lax.cond`` or a
  ``where`` chooses;
- ``(CHANGED, member)``: a value that this member computed from an update of ours;
- ``(VALUE, n)``: any other value.

An update lands if it meets two conditions. Wherever the member's state is new, the
update is NEW and made for the weight that it will be added to. Wherever the state is
the old one, the update is ZERO.
"""

import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

NEW, CHOICE, CHANGED, VALUE = "new", "choice", "changed", "value"
ZERO = ("zero",)
_NAME = "optax_lowmem_marked"
_JAX = os.path.dirname(jax.__file__)
_OPTAX = os.path.dirname(optax.__file__)
_OURS = os.path.dirname(os.path.dirname(__file__))

# These change the shape or the dtype of a value. A choice by the result is one by the operand.
_SAME_VALUE = frozenset("broadcast_in_dim convert_element_type reshape squeeze copy copy_p".split())
_SAME_ARRAY = frozenset(
  "copy copy_p optimization_barrier sharding_constraint reshard layout_constraint".split()
)
_CALLS = frozenset(
  "jit pjit closed_call core_call remat checkpoint custom_jvp_call custom_vjp_call"
  " shard_map".split()
)


def marked(updates, weights, step, dtypes):
  """Stands in for a member of ours: makes its updates in these dtypes and its next step."""

  def optax_lowmem_marked(updates, weights, step):
    del updates
    return {k: jnp.zeros_like(x, dtypes[k]) for k, x in weights.items()}, step + 1

  return jax.jit(optax_lowmem_marked)(updates, weights, step)


class Flow:
  """Follows the updates through one program.

  Attributes:
    touched: the members that use an update of ours made outside ``lax.cond`` and
      similar calls. There, ``step`` would hold the weight itself.
  """

  def __init__(self):
    self.touched: list[str] = []
    self._numbers = itertools.count()
    self._bools: set[tuple] = set()
    self._top_level: set[tuple] = set()
    self._choosers: dict[tuple, str] = {}
    self._callers: dict[int, str] = {}
    self._caller: str | None = None

  def values(self, jaxpr) -> tuple[list, list]:
    """Describes the inputs and the outputs of a program that calls ``marked``."""
    inputs = [self._other(v) for v in jaxpr.invars]
    if not _has_marked(jaxpr):
      raise RuntimeError("it calls no member of optax_lowmem.")
    return inputs, self._run(jaxpr, inputs, is_top=True)

  def lands(self, update, weight, step, old_step) -> bool:
    """Whether a member's update lands on a weight while its old_step becomes step."""
    made_for = {x[2] for x in _parts(update) if x[0] == NEW}
    return made_for == {weight} and _kept(update, ZERO) == _kept(step, old_step)

  def culprit(self, update, weight, step) -> str:
    """The member that keeps an update from landing; "" if the values do not show it."""
    parts = [*_parts(update), *_parts(step)]
    changed = [x[1] for x in parts if x[0] == CHANGED]
    chosen = [self._choosers[x] for x in _parts(update) if x in self._choosers]
    around = [self._callers[x[1]] for x in _parts(update) if x[0] == NEW and x[2] != weight]
    return next(filter(None, (*changed, *around, *chosen)), "")

  def _run(self, jaxpr, inputs, *, is_top=False) -> list:
    env: dict[Any, tuple] = dict(zip(jaxpr.invars, inputs, strict=True))
    env |= {v: self._other(v) for v in jaxpr.constvars}

    def read(atom):
      if not hasattr(atom, "val"):  # a variable
        return env[atom]
      is_zero = np.ndim(atom.val) == 0 and _is_number(atom.val) and atom.val == 0
      return ZERO if is_zero else (VALUE, str(atom.val))

    for eqn in jaxpr.eqns:
      outs = self._equation(eqn, [read(x) for x in eqn.invars], is_top)
      env |= {v: x for v, x in zip(eqn.outvars, outs, strict=True)}
    return [read(x) for x in jaxpr.outvars]

  def _equation(self, eqn, ins, is_top) -> list:
    name = eqn.primitive.name
    if any(x in self._top_level for x in ins):
      self.touched.append(self._member(eqn))
    if name in _CALLS and eqn.params.get("name") == _NAME:
      return self._marked(eqn, ins, is_top)
    if name in _CALLS and (inner := _only_jaxpr(eqn)) and len(inner.invars) == len(ins):
      return self._call(eqn, inner, ins)
    if name == "cond" and not _is_from_ours(ins[0]):
      branches = [self._run(branch.jaxpr, ins[1:]) for branch in eqn.params["branches"]]
      return [self._choice(eqn, ins[0], values) for values in zip(*branches, strict=True)]
    if name == "select_n" and not _is_from_ours(ins[0]):
      return [self._choice(eqn, ins[0], tuple(ins[1:]))]
    if name == "mul" and (index := self._bool_factor(eqn, ins)) is not None:
      return [self._choice(eqn, ins[index], (ZERO, ins[1 - index]))]
    if name in _SAME_ARRAY:
      return ins
    if any(map(_is_from_ours, ins)) or any(map(_has_marked, _jaxprs(eqn.params))):
      member = next(filter(None, map(_changed_by, ins)), None) or self._member(eqn)
      return [(CHANGED, member)] * len(eqn.outvars)
    if name == "not" and (ins[0] in self._bools or ins[0][0] == "not"):
      return [ins[0][1] if ins[0][0] == "not" else ("not", ins[0])]
    if name in _SAME_VALUE:
      return [ins[0]]
    return [self._other(v) for v in eqn.outvars]

  def _call(self, eqn, inner, ins) -> list:
    caller = self._caller
    # JAX traces its own jitted functions once, so their equations name the first caller.
    if caller is None and inner.debug_info.func_filename.startswith(_JAX):
      self._caller = self._member(eqn)
    outs = self._run(inner, ins)
    self._caller = caller
    return outs

  def _member(self, eqn) -> str:
    return self._caller or member_of(eqn)

  def _marked(self, eqn, ins, is_top) -> list:
    behind = [x for x in ins if _is_from_ours(x)]
    if behind:  # another member of ours made them
      return [(CHANGED, _changed_by(behind[0]) or self._member(eqn))] * len(eqn.outvars)
    number = next(self._numbers)
    self._callers[number] = member_of(eqn, is_ours=False)
    weights = ins[len(ins) // 2 : -1]  # ins: updates, as many weights, the step
    new = [(NEW, number, weight) for weight in weights]
    if is_top:
      self._top_level |= set(new)
    return [*new, (NEW, number)]

  def _choice(self, eqn, which, values) -> tuple:
    if all(x == values[0] for x in values):
      return values[0]
    if not any(map(_is_from_ours, values)):
      return self._other(eqn.outvars[0])
    if member := next(filter(None, map(_changed_by, values)), None):
      return CHANGED, member
    if which[0] == "not":
      which, values = which[1], values[::-1]
    choice = (CHOICE, which, tuple(values))
    self._choosers[choice] = self._member(eqn)
    return choice

  def _bool_factor(self, eqn, ins) -> int | None:
    for i in (0, 1):
      if ins[i] in self._bools and _is_from_ours(ins[1 - i]):
        if eqn.invars[1 - i].aval == eqn.outvars[0].aval:
          return i
    return None

  def _other(self, variable) -> tuple:
    value = (VALUE, next(self._numbers))
    if getattr(variable.aval, "dtype", None) == jnp.bool_:
      self._bools.add(value)
    return value


def member_of(eqn, *, is_ours: bool = True) -> str:
  """The transformation whose code made an equation; with is_ours=False, one that is not ours."""
  traceback = eqn.source_info.traceback
  frames = () if traceback is None else traceback.frames
  inside = ""
  for frame in frames:  # the innermost first
    if frame.file_name.startswith(_JAX) or (not is_ours and frame.file_name.startswith(_OURS)):
      continue
    *owners, function = frame.function_name.replace(".<locals>", "").split(".")
    # Optax's transformations are functions of a module; others may be made anywhere.
    owner = "".join(owners[:1] if frame.file_name.startswith(_OPTAX) else owners[-1:])
    if owner and function.startswith("update"):
      if not frame.file_name.endswith("_combining.py"):  # Optax's chain only passes values on
        return owner
      if inside:
        return inside
    inside = inside or owner or function
  return inside


def _parts(value):
  """A value and, if it is a choice, all the values it may be."""
  yield value
  if value[0] == CHOICE:
    for x in value[2]:
      yield from _parts(x)


def _changed_by(value) -> str | None:
  return next((x[1] for x in _parts(value) if x[0] == CHANGED), None)


def _is_from_ours(value) -> bool:
  return value[0] in (NEW, CHOICE, CHANGED)


def _kept(value, old):
  """A value with "old" for the old value, and without the weights of NEW updates."""
  if value[0] == CHOICE:
    return CHOICE, value[1], tuple(_kept(x, old) for x in value[2])
  return "old" if value == old else value[:2]


def _jaxprs(params):
  for x in params.values():
    for y in x if isinstance(x, tuple | list) else (x,):
      y = getattr(y, "jaxpr", y)
      if hasattr(y, "eqns"):
        yield y


def _only_jaxpr(eqn):
  found = list(_jaxprs(eqn.params))
  return found[0] if found else None


def _has_marked(jaxpr) -> bool:
  return any(
    eqn.params.get("name") == _NAME or any(map(_has_marked, _jaxprs(eqn.params)))
    for eqn in jaxpr.eqns
  )


def _is_number(x) -> bool:
  return jnp.issubdtype(jnp.result_type(x), jnp.number) or jnp.result_type(x) == jnp.bool_
