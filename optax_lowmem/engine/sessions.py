"""How `init` and `step` reach through an Optax transformation to our members.

Optax's combinators keep their members in closures. So `init` and `step` open a
session around `tx.init` and `tx.update`, and our members find it:

- under `init`, they turn float32 leaves into their formats and leave the
  weights in the session;
- under `step`, they return a `Landed` in the place of an update: the new
  weight itself. Chain, masked and partition hand it through untouched.
  Whatever computes with it stands behind our member and is refused by name.

A session holds in the trace that opened it. Inside `lax.cond` (MultiSteps,
apply_if_finite) our members see none and return ordinary updates.
"""

import contextlib
import contextvars
import dataclasses
from typing import Any

import jax
from jax.extend.core import get_opaque_trace_state

_current: contextvars.ContextVar = contextvars.ContextVar("optax_lowmem_session", default=None)


@dataclasses.dataclass
class InitSession:
  """What our members did with the parameters: the weights by leaf name."""

  trace: Any
  weights: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  found_ours: bool = False

  def convert(self, name: str, low: jax.Array):
    """Records the weight that a member keeps for a float32 leaf."""
    if name in self.weights:
      raise ValueError(
        f"params{name} is held by two delta_bits in one transformation; mask one of them."
      )
    self.weights[name] = low


@dataclasses.dataclass
class StepSession:
  """What our members tell each other inside `step`.

  Attributes:
    trace: the trace that it holds in.
    given: the gradients that `step` was called with, by id.
    landed: the landed weights that have not reached `step` yet.
    taken: a bool of the loss scales around the member that is called: whether
      the step is taken; None without one.
    scaled: by id of an unscaled gradient, it, the one that it was made of, and
      the factor between them.
    settled_arrays: results that are what they were where the step is not taken.
  """

  trace: Any
  given: dict[int, Any] = dataclasses.field(default_factory=dict)
  landed: "set[Landed]" = dataclasses.field(default_factory=set)
  taken: jax.Array | None = None
  scaled: dict[int, tuple[Any, Any, Any]] = dataclasses.field(default_factory=dict)
  settled_arrays: dict[int, Any] = dataclasses.field(default_factory=dict)

  @contextlib.contextmanager
  def unless_skipped(self, taken, scaled, unscaled, factor):
    """For the call of a loss scale's inner transformation, with unscaled gradients."""
    outside = self.taken, self.scaled
    self.taken = taken if self.taken is None else self.taken & taken
    pairs = zip(jax.tree.leaves(scaled), jax.tree.leaves(unscaled), strict=True)
    self.scaled = self.scaled | {id(u): (u, s, factor) for s, u in pairs if s is not u}
    try:
      yield
    finally:
      self.taken, self.scaled = outside

  def settled(self, *trees):
    """A member declares arrays as its work where the step is taken, else the old ones."""
    self.settled_arrays |= {id(x): x for x in jax.tree.leaves(trees)}

  def is_settled(self, x) -> bool:
    """Whether a member has declared this very array."""
    return id(x) in self.settled_arrays


@contextlib.contextmanager
def open_session(kind):
  """Opens an InitSession or a StepSession for the members called inside."""
  session = kind(trace=get_opaque_trace_state(convention="flax"))
  token = _current.set(session)
  try:
    yield session
  finally:
    _current.reset(token)


def current(kind):
  """The open session of this kind and of this trace, or None."""
  session = _current.get()
  if isinstance(session, kind) and session.trace == get_opaque_trace_state(convention="flax"):
    return session
  return None


_held: contextvars.ContextVar = contextvars.ContextVar("optax_lowmem_held", default=None)


@contextlib.contextmanager
def holding(names: frozenset[str]):
  """Tells the members called inside which parameters have a weight format."""
  token = _held.set(names)
  try:
    yield
  finally:
    _held.reset(token)


def held_names() -> frozenset[str] | None:
  """The names that `holding` gave, or None outside of it."""
  return _held.get()


_apart: contextvars.ContextVar = contextvars.ContextVar("optax_lowmem_apart", default=False)


@contextlib.contextmanager
def leaf_by_leaf():
  """Tells the members called inside to compute no two parameters in one operation."""
  token = _apart.set(True)
  try:
    yield
  finally:
    _apart.reset(token)


def is_leaf_by_leaf() -> bool:
  """Whether a call is inside `leaf_by_leaf`."""
  return _apart.get()


class Landed:
  """A leaf of `updates` inside `step`: the new weight, no update to add."""

  def __init__(self, low: jax.Array, session: StepSession):
    self.low = low
    self._session = session
    session.landed.add(self)

  def take(self) -> jax.Array:
    """The weight; each has to be taken once."""
    self._session.landed.remove(self)
    return self.low

  def map(self, f) -> "Landed":
    """This leaf with f of its weight (a wrapper of ours)."""
    return Landed(f(self.take()), self._session)

  def __getattr__(self, name):
    raise TypeError("Landed")  # `step` says who did it

  def _touched(self, *args, **kwargs):
    raise TypeError("Landed")


for _operator in (
  "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul"
  " rmatmul neg pos abs lt le gt ge array iter len getitem float int bool"
).split():
  setattr(Landed, f"__{_operator}__", Landed._touched)


@contextlib.contextmanager
def refuse_members_behind():
  """Turns an error about a touched `Landed` into one that names the transformation."""
  try:
    yield
  except TypeError as error:
    if "Landed" not in str(error):
      raise
    member, traceback = "a transformation", error.__traceback__
    while traceback is not None:
      parts = traceback.tb_frame.f_code.co_qualname.split(".<locals>.")
      if len(parts) > 1 and parts[-1].startswith("update"):
        member = parts[0]
      traceback = traceback.tb_next
    raise ValueError(f"lowmem.step: {uses_updates(member)}") from error


def changes_updates(member: str) -> str:
  """What is wrong with a member behind ours that changes its updates, and the ways out."""
  return (
    f"{member} stands behind a transformation of optax_lowmem, or around it, and changes its"
    " updates. The residual would belong to another update than the one that lands."
    f" {_WAYS_OUT}"
  )


def uses_updates(member: str) -> str:
  """What is wrong with one that `step` has no updates for, and the ways out."""
  return (
    f"{member} stands behind a transformation of optax_lowmem and uses its updates. lowmem.step has"
    f" none: it writes the new weights and residuals at once. {_WAYS_OUT}"
  )


_WAYS_OUT = (
  "Wrap the whole chain: lowmem.delta_bits(optax.chain(optax.adamw(lr), optax.scale(0.25))). Or put"
  " it in front."
)
