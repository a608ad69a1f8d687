"""Formats: how a state's leaves are stored, and the mark by which a checkpoint tells.

The table of formats is static. So that a restore into other formats, or by a
version that stores them otherwise, cannot go unseen, a `Formats` has one leaf,
a scalar, whose *name* in the tree says both: checkpoint libraries compare
names, and cast dtypes without a word.
"""

import collections
import dataclasses
import functools
import hashlib
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import optax

from pallas_kernels.formats.state_formats import StateFormat
from pallas_kernels.formats.weights import DeltaFormat

# Raised whenever saved arrays, or the random stream, come to mean something else.
VERSION = 1


class Statistic(NamedTuple):
  """What is known of a statistic that is stored.

  Attributes:
    format: how.
    parameter: the name of the parameter that it belongs to.
    number: which of that parameter's statistics it is; says where its random
      bits come from.
  """

  format: StateFormat
  parameter: str
  number: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Table:
  """The static part.

  An empty table equals every other: `optax.tree.map_params` compares a state
  with the one that `init` makes of a placeholder without leaves.
  """

  entries: tuple[tuple[str, Any], ...]

  def __eq__(self, other):
    if not isinstance(other, _Table):
      return NotImplemented
    return not self.entries or not other.entries or self.entries == other.entries

  def __hash__(self):
    return hash(_Table)

  @functools.cached_property
  def by_name(self) -> dict[str, Any]:
    return dict(self.entries)

  @functools.cached_property
  def label(self) -> str:
    """Version, formats with their leaves, and a digest: "optax_lowmem 1: bf16+8 x 24, 1f0c3b5e"."""
    spelt = [(name, _spell(name, known), known) for name, known in self.entries]
    counts = collections.Counter(text for _, text, _ in spelt)
    formats = ", ".join(f"{text} x {count}" for text, count in sorted(counts.items()))
    lines = [f"{name} {text} {getattr(known, 'number', '')}" for name, text, known in spelt]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
    return f"optax_lowmem {VERSION}: {formats or 'no formats'}, {digest}"


def _spell(name: str, known: DeltaFormat | Statistic) -> str:
  """A format as labels spell it: "bf16+8", or "mu int8" with the statistic's field."""
  if isinstance(known, Statistic):
    field = name.removesuffix(known.parameter).rsplit(".", 1)[-1]
    return f"{field} {known.format.name}{' squares' * known.format.is_square}"
  roundings = known.rounding, known.low_rounding
  is_default = known == DeltaFormat.parse(known.name)
  return known.name if is_default else f"{known.name} {'/'.join(roundings)}"


class Formats:
  """The formats of the leaves that a state holds, by name.

  Attributes:
    mark: the leaf, a uint32 scalar; None in a table that belongs to no state.
  """

  def __init__(self, entries: tuple[tuple[str, Any], ...] = (), mark: Any = None):
    self._table = _Table(entries)
    self.mark = mark

  def marked(self, params) -> Any:
    """For a new state: with a buffer of its own, since states are donated.

    Args:
      params: what `init` was called with. `optax.tree.map_params` calls it with
        a placeholder, and maps over what comes out: there a leaf stands for
        the formats, so that the state keeps its own.
    """
    if isinstance(params, _placeholder_type()):
      return _OfTheState()
    return Formats(self.table, jnp.array(VERSION, jnp.uint32))

  def get(self, name: str) -> Any | None:
    """The format of a leaf, or None where it is left alone."""
    return self.by_name.get(name)

  @property
  def table(self) -> tuple[tuple[str, Any], ...]:
    """(name, format) of each leaf."""
    return self._table.entries

  @property
  def by_name(self) -> dict[str, Any]:
    """The table as a dictionary."""
    return self._table.by_name

  @property
  def label(self) -> str:
    """The mark's name: version and formats."""
    return self._table.label

  def __eq__(self, other):
    if not isinstance(other, Formats):
      return NotImplemented
    return (self._table, self.mark) == (other._table, other.mark)

  def __hash__(self):
    return hash(self._table)

  def __repr__(self):
    return f"Formats({self.label!r})"

  def __reduce__(self):
    return _unpickle, (VERSION, self.table, self.mark)


class _OfTheState:
  """Stands for any formats in the state that `init` makes of a placeholder."""


@functools.cache
def _placeholder_type() -> type:
  """The type of the parameters that `optax.tree.map_params` calls `init` with."""
  found: list[type] = []
  optax.tree.map_params(lambda params: found.append(type(params)), lambda x: x, None)
  return found[0]


def _flatten_with_keys(formats: Formats):
  return ((jax.tree_util.DictKey(formats.label), formats.mark),), formats._table


def _flatten(formats: Formats):
  return (formats.mark,), formats._table


def _unflatten(table: _Table, children) -> Formats:
  formats = object.__new__(Formats)
  formats._table = table
  (formats.mark,) = children
  return formats


jax.tree_util.register_pytree_with_keys(Formats, _flatten_with_keys, _unflatten, _flatten)


def _to_state_dict(formats: Formats) -> dict[str, Any]:
  return {formats.label: formats.mark}


def _from_state_dict(formats: Formats, state: dict[str, Any]) -> Formats:
  if state is None or set(state) != {formats.label}:
    found = ", ".join(map(repr, state or ())) or "no formats at all"
    raise ValueError(
      f"The checkpoint holds {found} at {flax.serialization.current_path()}, and the target is"
      f" {formats.label!r}: restore it with the version and the formats that it was saved with."
      " lowmem.master_params and lowmem.init take it to other formats from there."
    )
  return Formats(formats.table, state[formats.label])


flax.serialization.register_serialization_state(Formats, _to_state_dict, _from_state_dict)


def _unpickle(version: int, table, mark) -> Formats:
  if version != VERSION:
    raise ValueError(
      f"The pickle holds an optimizer state of optax_lowmem's storage version {version}; this is"
      f" version {VERSION}."
    )
  return Formats(table, mark)
