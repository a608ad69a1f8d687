"""What a checkpoint holds: the states of our transformations, and what all of them are asked."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_lowmem.trees import pytrees
from optax_lowmem.trees.formats import Formats
from pallas_kernels.formats.random_bits import leaf_id, stream_keys
from pallas_kernels.operations import checks


class DeltaBitsState(NamedTuple):
  """State of `delta_bits`.

  Attributes:
    formats: the formats by leaf name, static but for a uint32 scalar whose name
      in the tree spells them, so that a restore into others is refused.
    step: int32 scalar, the updates so far; it numbers the random bits.
    key: uint32 [2], raw key data.
    residuals: the parameters' tree, each leaf packed as
      `pallas_kernels.formats.packing` describes, or None where there is none.
    inner_state: the wrapped transformation's, over float32 master weights.
  """

  formats: Formats  # first, so that what compares trees leaf by leaf names it first
  step: jax.Array
  key: jax.Array
  residuals: Any
  inner_state: Any


class QuantizedState(NamedTuple):
  """State of `quantize_state`.

  Attributes:
    formats: a `Statistic` by leaf name, static but for the scalar that spells
      them; see `DeltaBitsState`.
    step: int32 scalar, the updates so far; it numbers the random bits.
    key: uint32 [2], raw key data.
    inner_state: the wrapped transformation's, its statistics as
      `pallas_kernels.formats.state_formats` stores them.
  """

  formats: Formats
  step: jax.Array
  key: jax.Array
  inner_state: Any


class LossScaleState(NamedTuple):
  """State of `dynamic_loss_scale` and `static_loss_scale`.

  Attributes:
    scale: float32 scalar, what the next loss is multiplied by.
    growth_count: int32 scalar, finite steps since the scale last changed.
    skipped: int32 scalar, steps skipped so far.
    skipped_in_a_row: int32 scalar, steps skipped since the last finite one.
    inner_state: the wrapped transformation's.
  """

  scale: jax.Array
  growth_count: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array
  inner_state: Any


class EmaState(NamedTuple):
  """State of `ema`.

  Attributes:
    formats: the formats by leaf name, as in `DeltaBitsState`.
    count: int32 scalar, the updates so far; it numbers the random bits.
    key: uint32 [2], raw key data.
    ema: the sums, the parameters' tree, each leaf in its format.
    residuals: their residuals, packed as the weights' are; None where there is none.
    correction: float32 scalar, what the sums are divided by: `1 - decay**count`,
      or 1 with `debias=False`.
  """

  formats: Formats
  count: jax.Array  # type: ignore[assignment] # Optax's name, and a method of tuples
  key: jax.Array
  ema: Any
  residuals: Any
  correction: jax.Array


def leaf_streams(
  words, step, names: Iterable[str], micro_batch: jax.typing.ArrayLike = 0
) -> dict[str, jax.Array]:
  """Each leaf's words of the random stream at a step, by name."""
  names = sorted(names)
  if not names:
    return {}
  keys = stream_keys(words, step, [leaf_id(name) for name in names], micro_batch)
  # Behind a barrier: fused into a leaf's program, its place in keys would make it one of its own.
  words = jax.lax.optimization_barrier([keys[i] for i in range(len(names))])
  return dict(zip(names, words, strict=True))


def check_residuals(residuals, weights_by_name, formats: Formats) -> dict[str, jax.Array]:
  """The residuals by leaf name, each checked against its weight."""
  by_name = pytrees.named_leaves(residuals)
  for name, leaf in weights_by_name.items():
    fmt = formats.get(name)
    if fmt is None:
      if pytrees.is_half(leaf):
        raise TypeError(
          f"params{name} is {leaf.dtype}, but it had no format when the state was made from"
          " float32 parameters. Make the state with lowmem.init(tx, params32), or after casting."
        )
      continue
    checks.residual(leaf, by_name.get(name), fmt, f"params{name}")
  for name, _ in formats.table:
    if name not in weights_by_name:
      raise ValueError(f"The state holds a residual for params{name}, which params do not have.")
  return by_name


def was_taken(old_inner, new_inner) -> jax.Array | int:
  """1, or 0 where a loss scale inside skipped the step: then no random bits are used up."""
  skips = [
    new.skipped != old.skipped
    for old, new in zip(
      pytrees.find_states(old_inner, LossScaleState),
      pytrees.find_states(new_inner, LossScaleState),
      strict=True,
    )
  ]
  if not skips:
    return 1
  return 1 - jnp.any(jnp.stack(skips)).astype(jnp.int32)
