"""Where the updates of our members go in the program of a `tx.update`.

The program is a jaxpr in which `marked` stands for what our members do: it
makes their updates, and the counter of their state. Each value of the program
is followed by what it is:

- `(NEW, n, weight)`: the update of a weight that call n of `marked` made,
  unchanged; `(NEW, n)`: the counter of that call;
- `ZERO`: zeros, an update that moves nothing;
- `(CHOICE, which, values)`: one of several, as a `lax.cond` or a `where` says;
- `(CHANGED, member)`: computed from an update of ours, by that member;
- `(VALUE, n)`: any other value.

An update lands if it is NEW, and of the very weight that it will be added to,
wherever the member's state is new, and ZERO wherever that is the old one.
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

# One value in the shape or the dtype of another: what it says of a choice is the same.
_SAME_VALUE = frozenset("broadcast_in_dim convert_element_type reshape squeeze copy copy_p".split())
_SAME_ARRAY = frozenset(
  "copy copy_p optimization_barrier sharding_constraint reshard layout_constraint".split()
)
_CALLS = frozenset(
  "jit pjit closed_call core_call remat checkpoint custom_jvp_call custom_vjp_call"
  " shard_map".split()
)


def marked(updates, weights, step, dtypes):
  """The stand-in for a member of ours: its updates in these dtypes, and its next step."""

  def optax_lowmem_marked(updates, weights, step):
    del updates
    return {k: jnp.zeros_like(x, dtypes[k]) for k, x in weights.items()}, step + 1

  return jax.jit(optax_lowmem_marked)(updates, weights, step)


class Flow:
  """Follows the updates through one program.

  Attributes:
    touched: the members that did anything with an update of ours which was
      made outside of `lax.cond` and the like: where `step` has the weight itself.
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
    """What the inputs and the outputs of a program with `marked` in it are."""
    inputs = [self._other(v) for v in jaxpr.invars]
    if not _has_marked(jaxpr):
      raise RuntimeError("it calls no member of optax_lowmem.")
    return inputs, self._run(jaxpr, inputs, is_top=True)

  def lands(self, update, weight, step, old_step) -> bool:
    """Whether an update of a member lands on a weight, where old_step becomes step."""
    made_for = {x[2] for x in _parts(update) if x[0] == NEW}
    return made_for == {weight} and _kept(update, ZERO) == _kept(step, old_step)

  def culprit(self, update, weight, step) -> str:
    """The member that keeps an update from landing; "" if the values do not tell."""
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
    # JAX traces its own jitted functions once: their equations name who called them first.
    if caller is None and inner.debug_info.func_filename.startswith(_JAX):
      self._caller = self._member(eqn)
    outs = self._run(inner, ins)
    self._caller = caller
    return outs

  def _member(self, eqn) -> str:
    return self._caller or member_of(eqn)

  def _marked(self, eqn, ins, is_top) -> list:
    behind = [x for x in ins if _is_from_ours(x)]
    if behind:  # of another member of ours
      return [(CHANGED, _changed_by(behind[0]) or self._member(eqn))] * len(eqn.outvars)
    number = next(self._numbers)
    self._callers[number] = member_of(eqn, is_ours=False)
    weights = ins[len(ins) // 2 : -1]  # behind as many updates, in front of the step
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
  """The transformation whose code an equation is from; with is_ours=False, none of ours."""
  traceback = eqn.source_info.traceback
  frames = () if traceback is None else traceback.frames
  inside = ""
  for frame in frames:  # the innermost first
    if frame.file_name.startswith(_JAX) or (not is_ours and frame.file_name.startswith(_OURS)):
      continue
    *owners, function = frame.function_name.replace(".<locals>", "").split(".")
    # Optax's transformations are functions of a module, others may be made anywhere.
    owner = "".join(owners[:1] if frame.file_name.startswith(_OPTAX) else owners[-1:])
    if owner and function.startswith("update"):
      if not frame.file_name.endswith("_combining.py"):  # of Optax: chain hands on what it is given
        return owner
      if inside:
        return inside
    inside = inside or owner or function
  return inside


def _parts(value):
  """The values that one may be, and the choices between them."""
  yield value
  if value[0] == CHOICE:
    for x in value[2]:
      yield from _parts(x)


def _changed_by(value) -> str | None:
  return next((x[1] for x in _parts(value) if x[0] == CHANGED), None)


def _is_from_ours(value) -> bool:
  return value[0] in (NEW, CHOICE, CHANGED)


def _kept(value, old):
  """A value with "old" where it is the one that changes nothing, and calls for what they made."""
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
