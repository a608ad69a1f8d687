"""tile_step: the step of a tile of blocks in registers, in a kernel for a GPU or a TPU."""

from collections.abc import Callable

import jax.numpy as jnp

from pallas_kernels.formats import arithmetic, state_formats
from pallas_kernels.formats.random_bits import statistic_bits


def tile_step(
  rule: Callable, formats, lands: bool, bits, valid, across, gradient_T, values_T, scales_K,
  **layout,
):  # fmt: skip
  """Steps a tile of blocks.

  Args:
    rule: ``(gradient, master, statistics) -> (update, statistics)``.
    formats: the weight's format, and those of the statistics.
    lands: whether the weights must land; they stay, and the new ones replace the gradients.
    bits: lane -> the random bits of each element.
    valid: which elements exist; None if all do.
    across: broadcasts a value a block to its elements.
    gradient_T: the gradients, or if the weights must land, the weights.
    values_T: the weights (or the gradients), residuals and codes that are replaced.
    scales_K: the scales that are replaced.
    **layout: how ``quantize_blocks`` reduces a block, if not along the last axis.

  Returns:
    The new (values, scales).
  """
  fmt, statistic_formats = formats
  (low_T, *rest_T), scales_K = values_T, iter(scales_K)
  if lands:
    gradient_T, low_T = low_T, gradient_T
  delta_T, dtype = None, None
  if fmt.residual_bits:
    delta_T, dtype = rest_T[0].astype(jnp.int32), rest_T.pop(0).dtype
  master_T = arithmetic.merge_values(low_T, delta_T, fmt)
  old_T = [
    state_formats.dequantize_blocks(x_T, next(scales_K) if f.has_scale else None, f, across)
    for x_T, f in zip(rest_T, statistic_formats, strict=True)
  ]
  update_T, new_T = rule(arithmetic.as_float32(gradient_T), master_T, old_T)
  if update_T is not None:
    low_T, delta_T = arithmetic.move_values(low_T, delta_T, update_T, fmt, bits(0), lands)
  values_T = [low_T] if delta_T is None else [low_T, delta_T.astype(dtype)]
  new_scales_K = []
  for i, (x_T, f) in enumerate(zip(new_T, statistic_formats, strict=True)):
    if valid is not None:
      x_T = jnp.where(valid, x_T, 0)
    draw = statistic_bits(bits, i)
    codes_T, scale_K = state_formats.quantize_blocks(x_T, f, draw, across, **layout)
    values_T.append(codes_T)
    new_scales_K += [scale_K] if f.has_scale else []
  return values_T, new_scales_K
