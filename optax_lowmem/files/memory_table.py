"""memory_table: the bytes of a training state, by part."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import optax

from optax_lowmem.states import DeltaBitsState, refuse_state
from optax_lowmem.trees import nnx_variables, pytrees
from pallas_kernels.formats.state_formats import Blocks


@dataclasses.dataclass(frozen=True)
class MemoryTable:
  """The bytes of a training state, by part; see :func:`optax_lowmem.memory_table`.

  Attributes:
    parts: bytes by part: ``"weights"``, ``"residuals"``, ``"moments"`` (optimizer
      state that follows the parameters' tree), ``"rest"`` (counters, keys, loss
      scales), ``"accumulated gradients"`` if there are some (``optax.MultiSteps``),
      and ``"gradients"`` if they were given.
    num_params: the number of parameters.
    members: the names of the leaves that each member of an ``optax.partition`` or of
      :func:`optax_lowmem.muon` steps, by its label.

  Examples:
    >>> import optax_lowmem as lowmem
    >>> table = lowmem.MemoryTable({"weights": 2_000, "residuals": 1_000}, num_params=1_000)
    >>> table.total
    3000
    >>> print(table)
    part       bytes  bytes/param
    weights    2,000        2.000
    residuals  1,000        1.000
    total      3,000        3.000
    1,000 parameters
  """

  parts: dict[str, int]
  num_params: int
  members: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

  @property
  def total(self) -> int:
    """The bytes of all parts."""
    return sum(self.parts.values())

  @property
  def bytes_per_param(self) -> dict[str, float]:
    """Bytes a parameter, by part and for ``"total"``."""
    count = max(self.num_params, 1)
    return {k: v / count for k, v in (self.parts | {"total": self.total}).items()}

  def __str__(self) -> str:
    rows = [("part", "bytes", "bytes/param")]
    for part, count in (self.parts | {"total": self.total}).items():
      rows.append((part, f"{count:,}", f"{self.bytes_per_param[part]:.3f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    lines.append(f"{self.num_params:,} parameters")
    for label, names in self.members.items():
      more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
      lines.append(f"{label}: {', '.join(names[:_MOST_NAMES]) or 'no leaf'}{more}")
    return "\n".join(lines)


_MOST_NAMES = 6


def memory_table(params, opt_state, grads=None) -> MemoryTable:
  """Counts the bytes of a training state, by part and a parameter.

  It counts the storage itself: packed bits with their padding, and 4-bit
  integers as half a byte (``nbytes`` reports a whole one).

  Args:
    params: the parameters, as arrays or ``jax.ShapeDtypeStruct``s. The settings of
      a module (see :func:`optax_lowmem.init`) do not count.
    opt_state: the optimizer state.
    grads: the gradients to count, too; None to leave them out.

  Returns:
    A :class:`optax_lowmem.MemoryTable`. Print it, or read ``parts`` and
    ``bytes_per_param``.

  Raises:
    TypeError: if the arguments are swapped, or if opt_state is a tree of names
      (``nnx.state(optimizer.opt_state)``, a restored dictionary) in which residuals
      and moments cannot be told apart.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> params, opt_state = lowmem.init(lowmem.adamw(1e-3), {"w": jnp.ones((64, 64))})
    >>> print(lowmem.memory_table(params, opt_state))
    part        bytes  bytes/param
    weights     8,192        2.000
    residuals   4,096        1.000
    moments     8,704        2.125
    rest           36        0.009
    total      21,028        5.134
    4,096 parameters
  """
  params, opt_state = nnx_variables.pure(params), nnx_variables.pure(opt_state)
  refuse_state(params, "params", "lowmem.memory_table(params, opt_state)")
  params = pytrees.without_settings(params)
  parts = {"weights": nbytes(params), "residuals": 0, "moments": 0, "rest": 0}
  leaves = jax.tree_util.tree_leaves_with_path(params)
  paths = {tuple(map(str, path)): pytrees.name_of(path) for path, _ in leaves}

  def count(tree):
    flat = jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=lambda x: isinstance(x, _NODES) and x is not tree
    )
    for path, leaf in flat:
      if isinstance(leaf, DeltaBitsState):
        parts["residuals"] += nbytes(leaf.residuals)
        parts["rest"] += nbytes((leaf.formats, leaf.step, leaf.key))
        count((leaf.inner_state,))
      elif isinstance(leaf, optax.MultiStepsState):
        accumulated = parts.get("accumulated gradients", 0) + nbytes(leaf.acc_grads)
        parts["accumulated gradients"] = accumulated
        count(leaf._replace(acc_grads=None))
      else:
        _refuse_names(path)
        steps = tuple(map(str, path))
        follows = pytrees.owner(steps, paths) is not None
        # A scalar under a parameter's path is a moment if it is a float, else a counter.
        is_moment = follows and (
          isinstance(leaf, Blocks) or jnp.shape(leaf) or pytrees.is_inexact(leaf)
        )
        parts["moments" if is_moment else "rest"] += nbytes(leaf)

  count((opt_state,))
  if grads is not None:
    parts["gradients"] = nbytes(grads)
  members = {
    str(label): _stepped(member, paths)
    for state in pytrees.find_states(opt_state, optax.PartitionState)
    for label, member in state.inner_states.items()
  }
  return MemoryTable(parts, sum(_size(x) for x in jax.tree.leaves(params)), members)


def _stepped(member, paths) -> tuple[str, ...]:
  """The names of the parameters, in order, that own leaves in a member's state."""
  steps = [tuple(map(str, path)) for path, _ in jax.tree_util.tree_leaves_with_path(member)]
  starts = [pytrees.owner(path, paths) for path in steps]
  owners = {path[i:] for path, i in zip(steps, starts, strict=True) if i is not None}
  return tuple(name for path, name in paths.items() if path in owners)


_NODES = (DeltaBitsState, Blocks, optax.MultiStepsState)


def _refuse_names(path):
  """Raises if a leaf lies in a state of ours that has become a tree of names."""
  for step, key in itertools.pairwise(map(str, path)):
    if step == "['formats']" and key.startswith("['optax_lowmem "):
      raise TypeError(
        "opt_state is a tree of names, in which residuals and moments cannot be told apart. Pass"
        " the state itself: optimizer.opt_state instead of nnx.state(optimizer.opt_state); a"
        " checkpoint restored with a target."
      )


def _size(x) -> int:
  return int(jnp.size(x)) if not hasattr(x, "size") else int(x.size)


def nbytes(tree) -> int:
  """The bytes of a tree's arrays or structs as they are stored."""
  return sum(-(-_size(x) * _bits(x) // 8) for x in jax.tree.leaves(tree))


def _bits(x) -> int:
  dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
  if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
    key = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype))
    return key.size * key.dtype.itemsize * 8
  if jnp.issubdtype(dtype, jnp.integer):
    return jnp.iinfo(dtype).bits
  if jnp.issubdtype(dtype, jnp.floating):
    return jnp.finfo(dtype).bits
  return dtype.itemsize * 8
