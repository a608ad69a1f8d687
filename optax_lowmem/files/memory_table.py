"""memory_table: where the bytes of a training state are."""

import dataclasses

import jax
import jax.numpy as jnp

from optax_lowmem.states import DeltaBitsState
from optax_lowmem.trees import nnx_variables, pytrees
from pallas_kernels.formats.state_formats import Blocks


@dataclasses.dataclass(frozen=True)
class MemoryTable:
  """Bytes of a training state by part.

  Attributes:
    parts: bytes by part: "weights", "residuals", "moments" (optimizer state
      that follows the parameters' tree), "rest" (counters, keys, scales), and
      "gradients" where they were given.
    num_params: values in the parameters.
  """

  parts: dict[str, int]
  num_params: int

  @property
  def total(self) -> int:
    """Bytes altogether."""
    return sum(self.parts.values())

  @property
  def bytes_per_param(self) -> dict[str, float]:
    """Bytes a parameter by part, and "total"."""
    count = max(self.num_params, 1)
    return {k: v / count for k, v in (self.parts | {"total": self.total}).items()}

  def __str__(self) -> str:
    rows = [("part", "bytes", "bytes/param")]
    for part, nbytes in (self.parts | {"total": self.total}).items():
      rows.append((part, f"{nbytes:,}", f"{self.bytes_per_param[part]:.3f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows]
    return "\n".join([*lines, f"{self.num_params:,} parameters"])


def memory_table(params, opt_state, grads=None) -> MemoryTable:
  """Bytes and bytes a parameter of a training state, by part.

  Counts what is stored: packed bits as they are packed, 4-bit integers as half
  a byte (`nbytes` says a whole one), padding included.

  Args:
    params: the parameters (arrays, or their `jax.ShapeDtypeStruct`).
    opt_state: the optimizer state.
    grads: gradients, if they are to be counted, too.

  Returns:
    A `MemoryTable`; print it, or read `.parts` and `.bytes_per_param`.

  Examples:
    >>> print(lowmem.memory_table(params, opt_state))
  """
  params, opt_state = nnx_variables.pure(params), nnx_variables.pure(opt_state)
  parts = {"weights": _nbytes(params), "residuals": 0, "moments": 0, "rest": 0}
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  suffixes = {tuple(map(str, path)) for path in paths}

  def count(tree):
    flat = jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=lambda x: isinstance(x, (DeltaBitsState, Blocks)) and x is not tree
    )
    for path, leaf in flat:
      if isinstance(leaf, DeltaBitsState):
        parts["residuals"] += _nbytes(leaf.residuals)
        parts["rest"] += _nbytes((leaf.formats, leaf.step, leaf.key))
        count(leaf.inner_state)
      else:
        steps = tuple(map(str, path))
        follows = any(steps[i:] in suffixes for i in range(len(steps) + 1))
        # A scalar under a parameter's path is a moment if it is a float, else a counter.
        is_moment = follows and (
          isinstance(leaf, Blocks) or jnp.shape(leaf) or pytrees.is_inexact(leaf)
        )
        parts["moments" if is_moment else "rest"] += _nbytes(leaf)

  count((opt_state,))
  if grads is not None:
    parts["gradients"] = _nbytes(grads)
  return MemoryTable(parts, sum(_size(x) for x in jax.tree.leaves(params)))


def _size(x) -> int:
  return int(jnp.size(x)) if not hasattr(x, "size") else int(x.size)


def _nbytes(tree) -> int:
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
