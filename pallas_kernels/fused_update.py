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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import (
  arithmetic,
  checks,
  chunked,
  launch,
  launch_blocks,
  packing,
  sharded,
  state_formats,
)
from pallas_kernels.by_device import by_device
from pallas_kernels.formats import DeltaFormat
from pallas_kernels.hoist import hoist
from pallas_kernels.random_bits import (
  Window,
  key_words,
  random_bits,
  statistic_bits,
  stream_keys,
)
from pallas_kernels.state_formats import BLOCK, Blocks, StateFormat

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
      statistics in "bf16", "fp16" or "int8"; a leaf whose rows end in a short
      block is XLA's); or None, which takes the kernel on one GPU from Hopper
      on if a statistic has block scales and the gradient is not wider than the
      weight, and XLA elsewhere. XLA's program for one CPU is `chunked`.

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
  leaf = Leaf(gradient, low, delta, list(statistics), stream_keys(key_words(key))[0])
  fmt = DeltaFormat.parse(fmt)
  return fused_update_leaves(rule, [leaf], fmt, statistic_formats, when, implementation)[0]


def fused_update_leaves(
  rule: Rule, leaves: Sequence["Leaf"], fmt: DeltaFormat, statistic_formats, when,
  implementation: launch.Implementation | None, index: jax.Array | None = None,
) -> list[tuple[jax.Array, jax.Array | None, list[Any]]]:  # fmt: skip
  """`fused_update` of leaves with the same rule and formats, as one kernel where it is one.

  With an index, each leaf but its gradient is a stack of arrays, of which the
  one at that place is stepped: in place, with the random bits of the stack's
  elements. An array of a stack is no scalar.

  A rule that returns None for the update leaves the weight as it is.
  """
  for leaf in leaves:
    _check(leaf, fmt, statistic_formats, index)
  formats = (fmt, tuple(statistic_formats))
  leaves, reason = list(leaves), _unfit(fmt, statistic_formats)
  if implementation is not None:
    low = leaves[0].low
    implementation = launch.resolve(implementation, low, residual_bits=fmt.residual_bits)
  if implementation == "mosaic_gpu" and reason:
    raise ValueError(f'"mosaic_gpu" takes {reason}; "xla" takes every format.')
  shapes, stacks = ([getattr(x, name).shape for x in leaves] for name in ("gradient", "low"))
  mesh = sharded.mesh_of([leaf.low for leaf in leaves])
  shards = None if mesh is None else sharded.Shards.of(leaves, mesh, index is not None)
  if shards is not None:
    shapes, stacks = shards.shapes, shards.stacks
  takes_kernel = not reason and all(map(launch_blocks.takes_blocks, shapes + stacks))
  takes_kernel &= mesh is None or (shards is not None and shards.fit_words)
  tiles = [(n, BLOCK) for n in launch_blocks.tile_rows(shapes)] if takes_kernel else []
  if implementation == "mosaic_gpu" and takes_kernel:
    scalars, rules = _hoisted(rule, formats, tiles)
    kernel = functools.partial(_kernel, rules, formats)
    if shards is not None:
      return shards.each(kernel)(scalars, leaves, when, index)
    if launch.interpreter_is_forced():  # its effects are none of by_device's
      return kernel(scalars, leaves, when, index)
    return by_device({"any": kernel, "several": _refuse_several}, scalars, leaves, when, index)
  # A float32 gradient of a 16-bit weight is the result of something (unscaling, clipping) that
  # XLA fuses into its own passes and would have to write to memory for a kernel.
  is_narrow = all(x.gradient.dtype.itemsize <= x.low.dtype.itemsize for x in leaves)
  has_scales = any(f.has_scale for f in statistic_formats)
  is_whole = any(x.statistics_stream is not None for x in leaves) or _is_wide(rule, formats)
  is_chunked = not is_whole and all(chunked.takes(shape, fmt) for shape in stacks)
  chunks = [(n, BLOCK) for shape in shapes for n in chunked.sizes(shape)] if is_chunked else []
  is_kernel = not is_whole and implementation is None and takes_kernel and is_narrow and has_scales
  # A program for a device closes over no tracer, as the rule may.
  scalars, rules = _hoisted(rule, formats, shapes + chunks + (tiles if is_kernel else []))
  programs: dict[str, Any] = {
    "any": functools.partial(_xla_leaves, rules, formats),
    "gpu": functools.partial(_xla_leaves, rules, formats, contracts=True),
  }
  if mesh is not None and shards is None:  # XLA moves what belongs together
    run, old = functools.partial(by_device, programs), [leaf[1:4] for leaf in leaves]
    return sharded.automatic_in_place(run, mesh, old, scalars, leaves, when, index)
  programs |= {"cpu": functools.partial(_chunked, rules, formats)} if is_chunked else {}
  programs |= {"mosaic_gpu": functools.partial(_kernel, rules, formats)} if is_kernel else {}
  if shards is not None:
    programs = {kind: shards.each(program) for kind, program in programs.items()}
  return by_device(programs, scalars, leaves, when, index, on_each=shards is not None)


def _refuse_several(*args):
  raise ValueError(
    '"mosaic_gpu" in a program for several GPUs: XLA cannot partition a kernel, and would run all'
    " of it on each of them. On a mesh with Explicit axes, or inside jax.shard_map, it runs on each"
    ' shard; "xla" and None work everywhere.'
  )


def _in_blocks(window: Window | None) -> Window | None:
  """A window of rows of whole blocks, in blocks along the last axis."""
  if window is None:
    return None
  *start, last = window.start
  last = 0 if isinstance(last, int) else last // BLOCK
  return Window((*start, last), (*window.shape[:-1], window.shape[-1] // BLOCK))


def is_small(shape: tuple[int, ...]) -> bool:
  """Whether a leaf is better stepped in one kernel with others.

  A launch takes an H100 about as long as 8 MB of memory traffic; a step moves
  12 bytes a value.
  """
  return launch_blocks.takes_blocks(shape) and math.prod(shape) < 1 << 18


class Leaf(NamedTuple):
  """A weight and what belongs to it; see `fused_update`'s arguments.

  Attributes:
    gradient: any real float dtype, [...].
    low: the weight.
    delta: its residual, or None.
    statistics: as they are stored.
    stream: uint32 [2], the words of its random stream (`stream_keys`).
    statistics_stream: likewise of its statistics, where they have their own.
  """

  gradient: jax.Array
  low: jax.Array
  delta: jax.Array | None
  statistics: list[Any]
  stream: jax.Array
  statistics_stream: jax.Array | None = None


def _check(leaf: Leaf, fmt: DeltaFormat, statistic_formats, index):
  gradient, low, delta, statistics = leaf[:4]
  checks.residual(low, delta, fmt)
  if gradient.shape != low.shape[0 if index is None else 1 :]:
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


def _xla_leaves(
  rules, formats, scalars, leaves: Sequence[Leaf], when, index, contracts=False, windows=None
):
  """The step as an XLA program; leaves of one shape are traced once.

  XLA:GPU may contract: kept from it, it keeps more in memory between its passes
  (8 bytes a value of a leaf with clipping in front).
  """
  rule = _bound(rules, scalars, contracts)
  xla = jax.jit(functools.partial(_xla_in_stack, rule, formats))
  windows = windows or [None] * len(leaves)
  return [xla(leaf, when, index, window) for leaf, window in zip(leaves, windows, strict=True)]


def _xla_in_stack(rule, formats, leaf: Leaf, when, index, window: Window | None = None):
  if index is None:
    return _xla(rule, formats, leaf, when, window)
  stack = leaf[1:4]
  stored = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stack)
  window = window or Window((0,) * leaf.low.ndim, leaf.low.shape)
  window = Window((index, *window.start[1:]), window.shape)
  low, delta, statistics = stored
  one = leaf._replace(low=low, delta=delta, statistics=statistics)
  new = _xla(rule, formats, one, when, window)
  put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, index, 0)
  return jax.tree.map(put, stack, new)


def _xla(rule, formats, leaf: Leaf, when, window: Window | None = None):
  gradient, low, delta, statistics, stream, own = leaf
  fmt, statistic_formats = formats
  bits, own_bits = (
    functools.partial(random_bits, words, low.shape, window=window)
    for words in (stream, stream if own is None else own)
  )
  gradient = arithmetic.as_float32(gradient)
  wide = packing.unpack(delta, low.shape, fmt)
  master = low if fmt.is_full_precision else arithmetic.merge_values(low, wide, fmt)

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
    state_formats.quantize(x, f, statistic_bits(own_bits, i), scales[i])
    for i, (x, f) in enumerate(zip(values, statistic_formats, strict=True))
  ]
  new = low, delta, new_statistics
  if update is not None:
    if fmt.is_full_precision:
      new_low, new_wide = low + update, None
    else:
      new_low, new_wide = arithmetic.apply_values(low, wide, update, fmt, bits(0))
    new = new_low, packing.pack(new_wide, fmt), new_statistics
  if when is None:
    return new
  return jax.tree.map(lambda x, y: jnp.where(when, x, y), new, (low, delta, statistics))


def _is_wide(rule, formats) -> bool:
  """Whether a scalar turns the rule's arrays into float64, for which there is plain XLA alone."""
  if jnp.result_type(float) != jnp.float64:
    return False
  struct = jax.ShapeDtypeStruct((BLOCK, BLOCK), jnp.float32)
  jaxpr = jax.make_jaxpr(rule)(struct, struct, [struct] * len(formats[1]))
  return f"f64[{BLOCK},{BLOCK}]" in str(jaxpr)


def _hoisted(rule, formats, shapes: Sequence[tuple[int, ...]]):
  """The rule's scalars, and the rule without them, by the shape that it is called on."""
  shapes = list(dict.fromkeys(shape or (1,) for shape in shapes))
  structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  scalars, rules = zip(*(hoist(rule, (x, x, [x] * len(formats[1]))) for x in structs), strict=True)
  return scalars[0], dict(zip(shapes, rules, strict=True))


def _bound(rules, scalars, contracts: bool = False) -> Rule:
  """The rule again, on arrays of some shapes.

  Its bits, and those of the weight that the update is added to, are the same in
  whatever program, unless it contracts.
  """

  def rule(gradient, *others):
    shape = gradient.shape
    args = jax.tree.map(lambda x: x.reshape(shape or (1,)), (gradient, *others))
    update, values = rules[shape or (1,)](scalars, *args, contracts=contracts)
    if update is not None and not contracts:
      update = arithmetic.rounded(update)
    return jax.tree.map(lambda x: x.reshape(shape), (update, values))

  return rule


def _chunked(rules, formats, scalars, leaves: Sequence[Leaf], when, index, windows=None):
  """The step as an XLA program for one CPU."""
  rule = _bound(rules, scalars)
  windows = map(_in_blocks, windows or [None] * len(leaves))
  pairs = zip(leaves, windows, strict=True)
  return [chunked.step(rule, formats, *leaf[:5], when, index, window) for leaf, window in pairs]


def _kernel(rules, formats, scalars, leaves: Sequence[Leaf], when, index, windows=None):
  """The step as a Mosaic GPU kernel."""
  fmt, statistic_formats = formats

  def tile(bits, scalars, gradient_T, values_T, scales_K):
    (low_T, *rest_T), scales_K = values_T, iter(scales_K)
    delta_T = rest_T.pop(0).astype(jnp.int32) if fmt.residual_bits else None
    master_T = arithmetic.merge_values(low_T, delta_T, fmt)
    old_T = [
      state_formats.dequantize_blocks(x_T, next(scales_K) if f.has_scale else None, f)
      for x_T, f in zip(rest_T, statistic_formats, strict=True)
    ]
    update_T, new_T = _bound(rules, scalars, True)(
      arithmetic.as_float32(gradient_T), master_T, old_T
    )
    if update_T is not None:
      low_T, delta_T = arithmetic.apply_values(low_T, delta_T, update_T, fmt, bits(0))
    values_T = [low_T] if delta_T is None else [low_T, delta_T.astype(values_T[1].dtype)]
    new_scales_K = []
    for i, (x_T, f) in enumerate(zip(new_T, statistic_formats, strict=True)):
      codes_T, scale_K = state_formats.quantize_blocks(x_T, f, statistic_bits(bits, i))
      values_T.append(codes_T)
      new_scales_K += [scale_K] if f.has_scale else []
    return values_T, new_scales_K

  def operands(leaf: Leaf, window: Window | None) -> launch_blocks.BlockLeaf:
    blocks = lambda x: x.reshape(-1, BLOCK)
    values = [x for x in (leaf.low, leaf.delta) if x is not None]
    values += [x.codes if isinstance(x, Blocks) else x for x in leaf.statistics]
    scales = [x.scale.reshape(-1) for x in leaf.statistics if isinstance(x, Blocks)]
    refs, scale_refs = [jax.new_ref(blocks(x)) for x in values], list(map(jax.new_ref, scales))
    start = None
    if window is not None:
      start = jnp.stack([jnp.asarray(x, jnp.int32) for x in window.start])
    return launch_blocks.BlockLeaf(leaf.stream, blocks(leaf.gradient), refs, scale_refs, start)

  in_blocks = list(map(_in_blocks, windows or [None] * len(leaves)))
  block_leaves = list(map(operands, leaves, in_blocks))
  parts = [
    None if x is None else ((*leaf.low.shape[:-1], leaf.low.shape[-1] // BLOCK), x.shape)
    for leaf, x in zip(leaves, in_blocks, strict=True)
  ]
  launch_blocks.blockwise(tile, block_leaves, scalars, when, index, parts)
  return [_frozen(leaf, written) for leaf, written in zip(leaves, block_leaves, strict=True)]


def _frozen(leaf: Leaf, written: launch_blocks.BlockLeaf):
  """What the kernel wrote, in the shapes of the leaf."""
  values, scales = iter(written.refs), iter(written.scale_refs)

  def take(refs, x):
    return jax.freeze(next(refs)).reshape(x.shape)

  low = take(values, leaf.low)
  delta = None if leaf.delta is None else take(values, leaf.delta)
  statistics = [
    Blocks(take(values, x.codes), take(scales, x.scale))
    if isinstance(x, Blocks)
    else take(values, x)
    for x in leaf.statistics
  ]
  return low, delta, statistics
