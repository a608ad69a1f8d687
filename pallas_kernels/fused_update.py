"""fused_update: a leaf's whole optimizer step, gradient in, stored weight and statistics out.

Weight and statistics are read from their formats, an elementwise rule is
applied in float32, and both are stored again, in place where the buffers are
donated. A block's scale needs its largest value before the first of its codes
can be written, so XLA makes two passes over memory, keeping 16 bits a scale
between them; the kernel holds a tile of blocks in registers and makes one.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import arithmetic, checks, launch, packing, state_formats
from pallas_kernels.by_device import by_device
from pallas_kernels.formats import DeltaFormat
from pallas_kernels.hoist import hoist
from pallas_kernels.random_bits import (
  element_bits,
  element_index,
  key_words,
  statistic_bits,
  stream_keys,
)
from pallas_kernels.state_formats import Blocks, StateFormat

Rule = Callable[[jax.Array, jax.Array, list[jax.Array]], tuple[jax.Array, list[jax.Array]]]


def fused_update(
  rule: Rule,
  gradient: jax.Array,
  low: jax.Array,
  delta: jax.Array | None,
  statistics: Sequence[Any],
  fmt: str | DeltaFormat,
  statistic_formats: Sequence[StateFormat],
  *,
  key: jax.typing.ArrayLike,
  when: jax.typing.ArrayLike | None = None,
  implementation: launch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array | None, list[Any]]:
  """Applies an elementwise optimizer to a weight and statistics in their formats.

  Args:
    rule: `(gradient, master weight, statistics) -> (update, statistics)`,
      float32 arrays of one shape, elementwise. It may close over scalars.
    gradient: any real float dtype, [...].
    low: the weight, in the format's dtype, [...].
    delta: its residual as `split` packed it; None where there is none.
    statistics: as `state_formats.quantize` stores them.
    fmt: the weight's format.
    statistic_formats: the statistics' formats.
    key: an integer seed or a `jax.random` key: the weight rounds by lane 0 of
      its stream, each pair of statistics by the halves of a further lane.
    when: a bool; where it is False nothing changes, bit for bit.
    implementation: "xla"; "mosaic_gpu" (residuals of 0, 8 or 16 bits,
      statistics in "bf16", "fp16" or "int8"; rows that end in a short block
      and what is left of a leaf after tiles of 1,024 elements are XLA's); or
      None, which takes the kernel on one GPU from Hopper on if a statistic
      has block scales, and XLA elsewhere.

  Returns:
    The new (low, delta, statistics).

  Raises:
    TypeError: if a dtype is not its format's.
    ValueError: if shapes do not belong together, or an implementation is not
      to be had.

  Examples:
    >>> momentum = lambda g, w, m: (-0.1 * (g + 0.9 * m[0]), [g + 0.9 * m[0]])
    >>> low, delta, (m,) = fused_update(
    ...     momentum, g, low, delta, [m], "bf16+8", [StateFormat("int8")], key=0)

  References:
    [Memory Efficient Mixed-Precision Optimizers](https://arxiv.org/abs/2309.12381),
    section 3.1; [8-bit Optimizers via Block-wise
    Quantization](https://arxiv.org/abs/2110.02861)
  """
  stream = stream_keys(key_words(key))[0]
  fmt = DeltaFormat.parse(fmt)
  leaf = (gradient, low, delta, list(statistics))
  return fused_update_stream(rule, *leaf, fmt, statistic_formats, stream, when, implementation)


def fused_update_stream(
  rule: Rule, gradient, low, delta, statistics, fmt: DeltaFormat, statistic_formats, stream, when,
  implementation: launch.Implementation | None,
):  # fmt: skip
  """`fused_update` with a stream's words (`stream_keys`) in the place of a key."""
  _check(gradient, low, delta, statistics, fmt, statistic_formats)
  formats = (fmt, tuple(statistic_formats))
  operands = (gradient, low, delta, statistics, stream, when)
  reason = _unfit(fmt, statistic_formats)
  if implementation is not None:
    implementation = launch.resolve(implementation, low, residual_bits=fmt.residual_bits)
  main = _main_blocks(low.shape)
  if implementation == "mosaic_gpu" and reason:
    raise ValueError(f'"mosaic_gpu" takes {reason}; "xla" takes every format.')
  if implementation == "mosaic_gpu" and main:
    scalars, rules = _hoisted(rule, low.size // launch.BLOCK - main, len(statistics))
    return _kernel(rules, formats, scalars, *operands)
  has_scales = any(f.has_scale for f in statistic_formats)
  # A float32 gradient of a 16-bit weight is the result of something (unscaling, clipping) that
  # XLA fuses into its own passes and would have to write to memory for a kernel.
  is_narrow = gradient.dtype.itemsize <= low.dtype.itemsize
  if implementation or reason or not (has_scales and is_narrow and main):
    return _xla(rule, formats, *operands)
  # The rule may close over tracers, a program for a device may not.
  whole = functools.partial(_xla, rule, formats)
  closed, result = jax.make_jaxpr(whole, return_shape=True)(*operands)
  scalars, rules = _hoisted(rule, low.size // launch.BLOCK - main, len(statistics))

  def any_device(consts, scalars, *operands):
    del scalars
    flat = jax.core.eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves(operands))
    return jax.tree.unflatten(jax.tree.structure(result), flat)

  def kernel(consts, scalars, *operands):
    del consts
    return _kernel(rules, formats, scalars, *operands)

  return by_device({"any": any_device, "mosaic_gpu": kernel}, closed.consts, scalars, *operands)


def _check(gradient, low, delta, statistics, fmt, statistic_formats):
  checks.residual(low, delta, fmt)
  if gradient.shape != low.shape:
    raise ValueError(f"The gradient has the weight's shape {low.shape}; got {gradient.shape}.")
  if not jnp.issubdtype(gradient.dtype, jnp.floating):
    raise TypeError(f"The gradient is a real float; got {gradient.dtype}.")
  if len(statistics) != len(statistic_formats):
    raise ValueError(
      f"{len(statistics)} statistics have {len(statistic_formats)} formats; each has one."
    )
  for stored, f in zip(statistics, statistic_formats, strict=True):
    found, wanted = (
      [(x.shape, jnp.dtype(x.dtype)) for x in jax.tree.leaves(tree)]
      for tree in (stored, state_formats.stored_struct(low.shape, f))
    )
    if found != wanted:
      raise ValueError(f"A statistic in {f.name!r} of shape {low.shape} is {wanted}; got {found}.")


def _unfit(fmt: DeltaFormat, statistic_formats) -> str:
  """What the kernel takes, where a leaf's formats are something else."""
  if fmt.is_full_precision or fmt.residual_bits not in (0, 8, 16):
    return "half-precision weights with residuals of 0, 8 or 16 bits, which need no packing"
  if any(f.name == "fp32" for f in statistic_formats):
    return 'statistics in "bf16", "fp16" or "int8"'
  return ""


def _main_blocks(shape: tuple[int, ...]) -> int:
  """How many blocks the kernel takes: whole tiles, and none where rows end in a short block."""
  n = math.prod(shape)
  is_even = bool(shape) and shape[-1] % launch.BLOCK == 0
  return n // launch.TILE * launch.ROWS if is_even and n <= launch.MAX_SIZE else 0


def _xla(
  rule, formats, gradient, low, delta, statistics, stream, when, place=None
) -> tuple[jax.Array, jax.Array | None, list[Any]]:
  """The step as an XLA program; place is `element_index` where the leaf is part of another."""
  fmt, statistic_formats = formats
  low_index, high_index = element_index(low.shape) if place is None else place
  bits = lambda lane: element_bits((stream[0], stream[1]), low_index, high_index, lane)
  gradient = _as_float32(gradient)
  wide = packing.unpack(delta, low.shape, fmt)
  master = arithmetic.merge_values(low, wide, fmt)

  def run(stored):
    values = map(state_formats.dequantize, stored, statistic_formats)
    return rule(gradient, master, list(values))

  update, values = run(statistics)
  scales = [
    state_formats.block_scale(x, f) if f.has_scale else None
    for x, f in zip(values, statistic_formats, strict=True)
  ]
  # Where there are scales, the statistics are computed again for the codes.
  if any(scale is not None for scale in scales):
    update, values = run(
      [
        x if scale is None else state_formats.read_again(x, scale)
        for x, scale in zip(statistics, scales, strict=True)
      ]
    )
  new_statistics = [
    state_formats.quantize(x, f, statistic_bits(bits, i), scales[i])
    for i, (x, f) in enumerate(zip(values, statistic_formats, strict=True))
  ]
  new_low, new_wide = arithmetic.apply_values(low, wide, update, fmt, bits(0))
  new = new_low, packing.pack(new_wide, fmt), new_statistics
  if when is None:
    return new
  return jax.tree.map(lambda x, y: jnp.where(when, x, y), new, (low, delta, statistics))


def _as_float32(x):
  # By bits: XLA:GPU may drop a conversion.
  return arithmetic.widen(x) if x.dtype in (jnp.bfloat16, jnp.float16) else x.astype(jnp.float32)


def _hoisted(rule, rest: int, count: int):
  """The rule's scalars, and the rule without them: for tiles, and for `rest` blocks."""
  structs = [
    jax.ShapeDtypeStruct((blocks, launch.BLOCK), jnp.float32)
    for blocks in ([launch.ROWS, rest] if rest else [launch.ROWS])
  ]
  scalars, rules = zip(*(hoist(rule, (x, x, [x] * count)) for x in structs), strict=True)
  return scalars[0], rules


def _kernel(
  rules, formats, scalars, gradient, low, delta, statistics, stream, when
) -> tuple[jax.Array, jax.Array | None, list[Any]]:
  """The step as a Mosaic GPU kernel, and as an XLA program on what it leaves."""
  fmt, statistic_formats = formats
  main = _main_blocks(low.shape)
  has_scale = [f.has_scale for f in statistic_formats]
  codes = [x.codes if isinstance(x, Blocks) else x for x in statistics]
  values = [low, *([] if delta is None else [delta]), *codes]
  scales = [x.scale for x in statistics if isinstance(x, Blocks)]
  first = len(values) - len(codes)

  def tile(bits, scalars, reads_T, values_T, scales_K):
    (gradient_T,) = reads_T
    low_T = values_T[0]
    delta_T = None if delta is None else values_T[1].astype(jnp.int32)
    scales_K = iter(scales_K)
    master_T = arithmetic.merge_values(low_T, delta_T, fmt)
    old_T = [
      state_formats.dequantize_blocks(x_T, next(scales_K) if f.has_scale else None, f)
      for x_T, f in zip(values_T[first:], statistic_formats, strict=True)
    ]
    update_T, new_T = rules[0](scalars, _as_float32(gradient_T), master_T, old_T)
    low_T, delta_T = arithmetic.apply_values(low_T, delta_T, update_T, fmt, bits(0))
    written = [low_T] if delta is None else [low_T, delta_T.astype(delta.dtype)]
    new_scales = []
    for i, (x_T, f) in enumerate(zip(new_T, statistic_formats, strict=True)):
      codes_T, scale_K = state_formats.quantize_blocks(x_T, f, statistic_bits(bits, i))
      written.append(codes_T)
      new_scales += [scale_K] if f.has_scale else []
    return written, new_scales

  in_blocks = lambda x: x.reshape(-1, launch.BLOCK)
  gradient = in_blocks(gradient)
  refs = [jax.new_ref(in_blocks(x)) for x in values]
  scale_refs = [jax.new_ref(x.reshape(-1)) for x in scales]
  launch.blockwise(
    tile,
    main // launch.ROWS,
    key=stream,
    scalars=scalars,
    reads=[gradient],
    refs=refs,
    scale_refs=scale_refs,
    when=when,
  )

  def leaf(values, scales):
    scales = iter(scales)
    stored = [
      Blocks(x, next(scales)) if has else x for x, has in zip(values[first:], has_scale, strict=True)
    ]
    return values[0], None if delta is None else values[1], stored

  if (rest := gradient.shape[0] - main) > 0:
    end = slice(main, None)
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, (rest, launch.BLOCK), i) for i in (0, 1))
    place = (row + jnp.uint32(main)) * jnp.uint32(launch.BLOCK) + column, 0
    old = leaf([ref[end] for ref in refs], [ref[end][:, None] for ref in scale_refs])
    rest_rule = functools.partial(rules[1], scalars)
    rest = _xla(rest_rule, formats, gradient[end], *old, stream, when, place)
    new_values = [x for x in (rest[0], rest[1]) if x is not None]
    new_values += [x.codes if isinstance(x, Blocks) else x for x in rest[2]]
    for ref, x in zip(refs, new_values, strict=True):
      ref[end] = x
    for ref, x in zip(scale_refs, (x.scale for x in rest[2] if isinstance(x, Blocks)), strict=True):
      ref[end] = x[:, 0]
  return leaf(
    [jax.freeze(ref).reshape(x.shape) for ref, x in zip(refs, values, strict=True)],
    [jax.freeze(ref).reshape(x.shape) for ref, x in zip(scale_refs, scales, strict=True)],
  )
