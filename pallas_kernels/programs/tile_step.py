"""tile_step: the step of a tile of blocks in registers, in a kernel for a GPU or a TPU."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.formats import arithmetic, state_formats
from pallas_kernels.formats.random_bits import statistic_bits


class Part(NamedTuple):
  """Some elements of each block of a tile, the same ones of every block.

  Attributes:
    bits: lane -> the random bits of each element.
    valid: which elements exist; None if all do.
    gradient_T: the gradients, or if the weights must land, the weights.
    values_T: the weights (or the gradients), residuals and codes that are replaced.
  """

  bits: Callable
  valid: Any
  gradient_T: Any
  values_T: Sequence[Any]


def tile_step(
  rule: Callable, formats, lands: bool, parts: Sequence[Part], across, scales_K, **layout
):
  """Steps a tile of blocks.

  Args:
    rule: ``(gradient, master, statistics) -> (update, statistics)``.
    formats: the weight's format, and those of the statistics.
    lands: whether the weights must land; they stay, and the new ones replace the gradients.
    parts: the elements of the blocks, in one or more parts.
    across: broadcasts a value a block to its elements in a part.
    scales_K: the scales that are replaced.
    **layout: how ``quantize_blocks`` reduces a block, if not along the last axis.

  Returns:
    The new values of each part, and the new scales.
  """
  scales_K = iter(scales_K)
  old_K = [next(scales_K) if f.has_scale else None for f in formats[1]]
  values, new = zip(
    *(_moved(rule, formats, lands, part, across, old_K) for part in parts), strict=True
  )
  new_scales_K = []
  for i, (f, old) in enumerate(zip(formats[1], old_K, strict=True)):
    draws = [statistic_bits(part.bits, i) for part in parts]
    of_parts = [new_T[i] for new_T in new]
    codes, scale_K = state_formats.quantize_blocks(of_parts, f, draws, across, old_K=old, **layout)
    for values_T, codes_T in zip(values, codes, strict=True):
      values_T.append(codes_T)
    new_scales_K += [scale_K] if f.has_scale else []
  return values, new_scales_K


def _moved(rule, formats, lands: bool, part: Part, across, scales_K):
  """The new weights and residuals of a part, and its new statistics in float32."""
  fmt, statistic_formats = formats
  gradient_T, (low_T, *rest_T) = part.gradient_T, part.values_T
  if lands:
    gradient_T, low_T = low_T, gradient_T
  delta_T, dtype = None, None
  if fmt.residual_bits:
    delta_T, dtype = rest_T[0].astype(jnp.int32), rest_T.pop(0).dtype
  master_T = arithmetic.merge_values(low_T, delta_T, fmt)
  old_T = [
    state_formats.dequantize_blocks(x_T, scale_K, f, across)
    for x_T, scale_K, f in zip(rest_T, scales_K, statistic_formats, strict=True)
  ]
  update_T, new_T = rule(arithmetic.as_float32(gradient_T), master_T, old_T)
  if update_T is not None:
    low_T, delta_T = arithmetic.move_values(low_T, delta_T, update_T, fmt, part.bits(0), lands)
  if part.valid is not None:
    new_T = [jnp.where(part.valid, x_T, 0) for x_T in new_T]
  return [low_T] if delta_T is None else [low_T, delta_T.astype(dtype)], new_T
