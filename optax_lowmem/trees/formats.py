"""Formats: the storage of a state's leaves, and the mark that identifies it in a checkpoint.

The table of formats is static. A checkpoint must not be restored silently into
other formats, or by a version that stores them differently. So ``Formats`` has
one leaf, a scalar, whose *name* in the tree spells out version and formats:
checkpoint libraries compare names, but cast dtypes silently.
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

# Increase this whenever the meaning of saved arrays or of the random stream changes.
VERSION = 1


class Statistic(NamedTuple):
  """The description of a stored statistic.

  Attributes:
    format: its format.
    parameter: the name of its parameter.
    number: its number among the parameter's statistics, which selects its random
      bits.
  """

  format: StateFormat
  parameter: str
  number: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Table:
  """The static part of ``Formats``.

  An empty table equals every other, because ``optax.tree.map_params`` compares a
  state with the one that ``init`` makes for a placeholder without leaves.
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
    """Version, formats with leaf counts, and a digest: "optax_lowmem 1: bf16+8 x 24, 1f0c3b5e"."""
    spelt = [(name, _spell(name, known), known) for name, known in self.entries]
    counts = collections.Counter(text for _, text, _ in spelt)
    formats = ", ".join(f"{text} x {count}" for text, count in sorted(counts.items()))
    lines = [f"{name} {text} {getattr(known, 'number', '')}" for name, text, known in spelt]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]
    return f"optax_lowmem {VERSION}: {formats or 'no formats'}, {digest}"


def _spell(name: str, known: DeltaFormat | Statistic) -> str:
  """A format in a label: "bf16+8", or with a statistic's field, "mu int8"."""
  if isinstance(known, Statistic):
    field = name.removesuffix(known.parameter).rsplit(".", 1)[-1]
    return f"{field} {known.format.name}{' squares' * known.format.is_square}"
  roundings = known.rounding, known.low_rounding
  is_default = known == DeltaFormat.parse(known.name)
  return known.name if is_default else f"{known.name} {'/'.join(roundings)}"


class Formats:
  """The formats of a state's leaves, by name.

  Attributes:
    mark: the leaf, a uint32 scalar; None in a table that belongs to no state.
  """

  def __init__(self, entries: tuple[tuple[str, Any], ...] = (), mark: Any = None):
    self._table = _Table(entries)
    self.mark = mark

  def marked(self, params) -> Any:
    """The formats for a new state, with a mark in a buffer of its own, as states are donated.

    Args:
      params: the argument of ``init``. ``optax.tree.map_params`` calls ``init``
        with a placeholder and maps over the result. One leaf then represents the
        formats, so the mapped state keeps its own.
    """
    if isinstance(params, _placeholder_type()):
      return _OfTheState()
    return Formats(self.table, jnp.array(VERSION, jnp.uint32))

  def get(self, name: str) -> Any | None:
    """The format of a leaf; None if the leaf is left alone."""
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
    """The name of the mark: version and formats."""
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
  """Represents any formats in the state that ``init`` makes for a placeholder."""


@functools.cache
def _placeholder_type() -> type:
  """The type of the placeholder that ``optax.tree.map_params`` passes to ``init``."""
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
      f"The checkpoint holds {found} at {flax.serialization.current_path()}, but the target is"
      f" {formats.label!r}. Restore it with the version and the formats that saved it. To change"
      " the formats afterwards, use lowmem.master_params and lowmem.init."
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
