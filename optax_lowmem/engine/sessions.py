"""How ``init`` and ``step`` reach our members inside an Optax transformation.

Optax's combinators keep their members in closures. So ``init`` and ``step`` open a
session around ``tx.init`` and ``tx.update``, and our members find it:

- under ``init``, they convert float32 leaves to their formats and leave the
  weights in the session;
- under ``step``, they return a ``Landed`` instead of an update: the new weight
  itself. Chain, masked and partition pass it on untouched. A transformation that
  computes with it stands behind our member and is refused by name.

A session is valid in the trace that opened it. Inside ``lax.cond`` (MultiSteps,
apply_if_finite), our members see no session and return ordinary updates.
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
  """The weights that our members make of the parameters, by leaf name."""

  trace: Any
  weights: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  found_ours: bool = False

  def convert(self, name: str, low: jax.Array):
    """Records the weight that a member makes of a float32 leaf."""
    if name in self.weights:
      raise ValueError(
        f"params{name} is held by two delta_bits in one transformation; mask one of them."
      )
    self.weights[name] = low


@dataclasses.dataclass
class StepSession:
  """Facts that our members share inside ``step``.

  Attributes:
    trace: the trace in which the session is valid.
    given: the gradients that ``step`` received, by id.
    landed: the ``Landed`` weights that have not reached ``step`` yet.
    taken: a bool scalar from the loss scales around the current member, whether
      the step is taken; None without a loss scale.
    scaled: (unscaled gradient, its original, the factor between them), by id of the
      unscaled gradient.
    settled_arrays: results that already hold their old values if the step is
      skipped.
  """

  trace: Any
  given: dict[int, Any] = dataclasses.field(default_factory=dict)
  landed: "set[Landed]" = dataclasses.field(default_factory=set)
  taken: jax.Array | None = None
  scaled: dict[int, tuple[Any, Any, Any]] = dataclasses.field(default_factory=dict)
  settled_arrays: dict[int, Any] = dataclasses.field(default_factory=dict)

  @contextlib.contextmanager
  def unless_skipped(self, taken, scaled, unscaled, factor):
    """Wraps a loss scale's call of its inner transformation with unscaled gradients."""
    outside = self.taken, self.scaled
    self.taken = taken if self.taken is None else self.taken & taken
    pairs = zip(jax.tree.leaves(scaled), jax.tree.leaves(unscaled), strict=True)
    self.scaled = self.scaled | {id(u): (u, s, factor) for s, u in pairs if s is not u}
    try:
      yield
    finally:
      self.taken, self.scaled = outside

  def settled(self, *trees):
    """Declares arrays that are new if the step is taken, and the old ones otherwise."""
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
  """The open session of this kind in this trace, or None."""
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
  """The names that ``holding`` received; None outside it."""
  return _held.get()


_apart: contextvars.ContextVar = contextvars.ContextVar("optax_lowmem_apart", default=False)


@contextlib.contextmanager
def leaf_by_leaf():
  """Tells the members called inside to compute each parameter in operations of its own."""
  token = _apart.set(True)
  try:
    yield
  finally:
    _apart.reset(token)


def is_leaf_by_leaf() -> bool:
  """Whether a call is inside ``leaf_by_leaf``."""
  return _apart.get()


class Landed:
  """A leaf of ``updates`` inside ``step`` that holds the new weight, not an update."""

  def __init__(self, low: jax.Array, session: StepSession):
    self.low = low
    self._session = session
    session.landed.add(self)

  def take(self) -> jax.Array:
    """Returns the weight. Each must be taken exactly once."""
    self._session.landed.remove(self)
    return self.low

  def map(self, f) -> "Landed":
    """Applies f to the weight, for a wrapper of ours."""
    return Landed(f(self.take()), self._session)

  def __getattr__(self, name):
    raise TypeError("Landed")  # `step` turns it into an error that names the transformation

  def _touched(self, *args, **kwargs):
    raise TypeError("Landed")


for _operator in (
  "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow matmul"
  " rmatmul neg pos abs lt le gt ge array iter len getitem float int bool"
).split():
  setattr(Landed, f"__{_operator}__", Landed._touched)


@contextlib.contextmanager
def refuse_members_behind():
  """Turns an error about a touched ``Landed`` into one that names the transformation."""
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
  """The error for a member behind ours that changes our updates."""
  return (
    f"{member} stands behind a transformation of optax_lowmem, or around it, and changes its"
    " updates. The residual would belong to an update other than the one that lands."
    f" {_WAYS_OUT}"
  )


def uses_updates(member: str) -> str:
  """The error for a member that uses our updates, which ``step`` does not make."""
  return (
    f"{member} stands behind a transformation of optax_lowmem and uses its updates. lowmem.step has"
    f" none, because it writes the new weights and residuals at once. {_WAYS_OUT}"
  )


_WAYS_OUT = (
  "Wrap the whole chain: lowmem.delta_bits(optax.chain(optax.adamw(lr), optax.scale(0.25))). Or put"
  " it in front."
)
