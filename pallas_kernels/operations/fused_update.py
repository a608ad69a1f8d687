"""fused_update: the whole optimizer step of a leaf.

The step reads weight and statistics from their formats, applies an elementwise rule
in float32, and stores both again, in place if the buffers are donated. The codes of
a block depend on its largest value. So XLA makes two passes over memory, with 16
bits a scale between them. The kernel holds a tile of blocks in registers and makes
one pass.
"""

from collections.abc import Sequence
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.formats import state_formats
from pallas_kernels.formats.random_bits import key_words, stream_keys
from pallas_kernels.formats.state_formats import StateFormat
from pallas_kernels.formats.weights import DeltaFormat
from pallas_kernels.operations import checks
from pallas_kernels.placement import implementations, sharded
from pallas_kernels.placement.by_device import by_device
from pallas_kernels.placement.partitioned import partitioned
from pallas_kernels.programs import cpu, mosaic_gpu, mosaic_tpu, tiles, xla
from pallas_kernels.programs.hoist import Hoisted
from pallas_kernels.programs.leaf import Leaf, Rule


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
  implementation: implementations.Implementation | None = None,
) -> tuple[jax.Array, jax.Array | None, list[Any]]:
  """Applies an elementwise optimizer to a weight and statistics in their formats.

  Args:
    rule: an elementwise function
      ``(gradient, master, statistics) -> (update, statistics)`` of float32 arrays
      of one shape. It may close over scalars.
    gradient: [...], any real float dtype.
    low: the weight [...], in the format's dtype.
    delta: its residual, packed by :func:`optax_lowmem.split`; None if the format
      has none.
    statistics: the statistics [...], each stored in its format: an array for
      ``"fp32"`` and ``"bf16"``; otherwise codes and scales
      (``state_formats.Blocks``).
    fmt: the format of the weight, for example ``"bf16+8"``.
    statistic_formats: a :class:`pallas_kernels.StateFormat` for each statistic.
    key: an integer seed or a ``jax.random`` key. The weight rounds with lane 0 of
      the key's stream, each pair of statistics with the halves of a further lane.
    when: a bool scalar. If it is False, nothing changes, bit for bit.
    implementation: None, ``"xla"``, ``"mosaic_gpu"`` (residuals of 0, 8 or 16
      bits; every statistic but ``"fp32"``; XLA steps large leaves whose rows end in a
      short block, unless the kernel's tiles cover nearly all of them, and with
      ``"int4"`` gradients of another dtype than the weight's) or ``"mosaic_tpu"``
      (the same residuals, every statistic; XLA steps small leaves and those whose
      last axis is no multiple of 128, with ``"int4"`` of 256). None
      takes the kernel on GPUs from Hopper on if a statistic has block scales and the
      gradient is no wider than the weight, and on TPUs from v5e on. Otherwise it
      takes XLA, which works in chunks on one CPU.

  Returns:
    The new ``(low, delta, statistics)``.

  Raises:
    TypeError: if the gradient is not a real float, or low does not have its
      format's dtype.
    ValueError: if shapes, residual or statistics do not match the formats, if the
      rule is not elementwise, or if the platform lacks the implementation.

  Examples:
    >>> import jax.numpy as jnp
    >>> from pallas_kernels import StateFormat, fused_update, split
    >>> def momentum(gradient, master, statistics):
    ...   trace = gradient + 0.9 * statistics[0]
    ...   return -0.1 * trace, [trace]
    >>> low, delta = split(jnp.ones((4, 32)), "bf16+8", key=0)
    >>> gradient, trace = jnp.ones((4, 32)), jnp.zeros((4, 32), jnp.bfloat16)
    >>> low, delta, (trace,) = fused_update(
    ...   momentum, gradient, low, delta, [trace], "bf16+8", [StateFormat("bf16")], key=0
    ... )
    >>> print(low[0, 0], delta.dtype, trace[0, 0])
    0.898438 int8 1

  References:
    `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`__, section 3.1

    `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`__
  """
  leaf = Leaf(gradient, low, delta, list(statistics), stream_keys(key_words(key))[0])
  fmt = DeltaFormat.parse(fmt)
  return fused_update_leaves(rule, [leaf], fmt, statistic_formats, when, implementation)[0]


def fused_update_leaves(
  rule: Rule, leaves: Sequence[Leaf], fmt: DeltaFormat, statistic_formats, when,
  implementation: implementations.Implementation | None, index: jax.Array | None = None,
  lands: bool = False,
) -> list[tuple[jax.Array, jax.Array | None, list[Any]]]:  # fmt: skip
  """``fused_update`` of leaves with the same rule and formats; small ones share programs.

  With an index, every part of a leaf except its gradient is a stack of arrays. The
  array at the index is stepped in place, with the random bits of the stack's
  elements. It is not a scalar.

  With lands, ``optax.apply_updates`` reaches the new weight from the old one, by
  ``arithmetic.landing_update``, and the residual belongs to that weight.

  A rule that returns None as the update leaves the weight unchanged.
  """
  check(leaves, fmt, statistic_formats, index)
  rest = hoisted_rule(rule, len(statistic_formats), leaves[0].gradient.shape)
  return step_leaves(
    rest, rest.scalars(), leaves, fmt, statistic_formats, when, implementation, index, lands
  )


def hoisted_rule(rule: Rule, count: int, shape: tuple[int, ...], scalars=()) -> Hoisted:
  """Hoists the rule of leaves with count statistics, traced on a shape and on scalars."""
  x = jax.ShapeDtypeStruct(shape or (1,), jnp.float32)
  return Hoisted(rule, (x, x, [x] * count), scalars)


def step_leaves(
  rest: Hoisted, scalars, leaves: Sequence[Leaf], fmt: DeltaFormat, statistic_formats, when,
  implementation: implementations.Implementation | None, index: jax.Array | None = None,
  lands: bool = False, is_copied: bool = False,
) -> list[tuple[jax.Array, jax.Array | None, list[Any]]]:  # fmt: skip
  """``fused_update_leaves`` of a ``hoisted_rule`` and its scalars; expects checked leaves."""
  formats = (fmt, tuple(statistic_formats))
  leaves = list(leaves)
  unfit = {name: _unfit(name, fmt, statistic_formats) for name in _KERNELS}
  if implementation is not None:
    implementation = implementations.resolve(
      implementation, leaves[0].low, residual_bits=fmt.residual_bits, has_tpu_kernel=True
    )
  if reason := unfit.get(implementation or ""):
    raise ValueError(f'"{implementation}" takes {reason}; "xla" takes every format.')
  shapes, stacks = ([getattr(x, name).shape for x in leaves] for name in ("gradient", "low"))
  mesh = sharded.mesh_of([leaf.low for leaf in leaves])
  shards = None if mesh is None else sharded.Shards.of(leaves, mesh, index is not None)
  if shards is not None:
    shapes, stacks = shards.shapes, shards.stacks
  # A rule that contains programs takes only the shapes that it was traced with.
  known = shapes[:1] if rest.takes_any_shape else shapes
  rules = {shape or (1,): rest.at(shape or (1,)) for shape in known}
  is_flat = rest.takes_any_shape and not rest.is_wide
  fits = is_flat and (mesh is None or (shards is not None and shards.fit_words))
  is_packed = any(f.is_packed for f in statistic_formats)
  # With lands, the new weights replace the gradients; a GPU's kernel has no other memory for them.
  # With packed codes, it reads both in pairs.
  has_room = not (lands or is_packed) or all(x.gradient.dtype == x.low.dtype for x in leaves)
  is_whole = mesh is None and index is None
  kernels = {
    name: functools.partial(kernel.step, rules, formats, lands)
    for name, kernel in _KERNELS.items()
    if fits and not unfit[name] and (has_room or name == "mosaic_tpu")
    if all(kernel.takes(*of, is_whole, is_packed) for of in zip(shapes, stacks, strict=True))
  }
  if implementation in kernels:
    kernel = kernels[implementation]
    if shards is not None:
      return shards.each(kernel)(scalars, leaves, when, index)
    if implementations.interpreter_is_forced():  # by_device would hide its effects
      return kernel(scalars, leaves, when, index)
    several = {"gpus": _refuse, "tpus": _refuse}
    if implementation == "mosaic_gpu":
      several |= _on_shards(rules, formats, lands, leaves)
    return by_device({"any": kernel} | several, scalars, leaves, when, index)
  # A float32 gradient of a 16-bit weight comes from another operation (unscaling, clipping). XLA
  # fuses that into its own passes, but for a kernel it would write the gradient to memory.
  is_narrow = all(x.gradient.dtype.itemsize <= x.low.dtype.itemsize for x in leaves)
  has_scales = any(f.has_scale for f in statistic_formats)
  is_chunked = is_flat and all(cpu.takes(leaf, fmt) for leaf in leaves)
  chosen = dict(kernels) if implementation is None else {}
  # XLA:TPU needs temporaries of several times the gradients, and ten times as long to compile.
  if is_copied or not is_narrow or not has_scales:
    chosen.pop("mosaic_gpu", None)
  by_xla = functools.partial(xla.step, rules, formats, lands)
  programs: dict[str, Any] = {
    "any": by_xla,
    "gpu": functools.partial(by_xla, contracts=True, joins=is_flat),
    "gpus": functools.partial(by_xla, contracts=True),
    "tpu": functools.partial(by_xla, joins=is_flat),
  }
  if mesh is not None and shards is None:  # XLA moves the operands
    programs["gpu"] = programs["gpus"]
    run, old = functools.partial(by_device, programs), [leaf[1:4] for leaf in leaves]
    return sharded.automatic_in_place(run, mesh, old, scalars, leaves, when, index)
  if is_chunked:
    programs["cpu"] = functools.partial(cpu.step, rules, formats, lands)
  programs |= chosen
  if shards is not None:
    programs = {kind: shards.each(program) for kind, program in programs.items()}
  elif "mosaic_gpu" in chosen:
    programs |= _on_shards(rules, formats, lands, leaves)
  like = [leaf[1:4] for leaf in leaves]
  return by_device(programs, scalars, leaves, when, index, on_each=shards is not None, like=like)


# The programs that are kernels, by the name of the implementation and of the device.
_KERNELS: dict[str, Any] = {"mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}


def _on_shards(rules, formats, lands, leaves: Sequence[Leaf]) -> dict[str, Any]:
  """The program for several GPUs, if the rule takes shards, whose shapes only XLA knows.

  It is not for leaves that are replicated on a mesh with Explicit axes. For several TPUs,
  JAX has no such program (https://github.com/jax-ml/jax/issues/38196).
  """
  is_explicit = any(sharded.has_explicit_axes(leaf.low) for leaf in leaves)
  if is_explicit or not all(map(tiles.is_in_blocks, (x.gradient.shape for x in leaves))):
    return {}

  def program(scalars, leaves, when, index, windows):
    shapes = ((leaf.gradient.shape, leaf.low.shape, False) for leaf in leaves)
    takes_kernel = all(itertools.starmap(mosaic_gpu.takes, shapes))
    run = mosaic_gpu.step if takes_kernel else xla.step
    return run(rules, formats, lands, scalars, leaves, when, index, windows=windows)

  return {"mosaic_gpus": functools.partial(partitioned, program)}


def _refuse(*args):
  raise ValueError(
    "A kernel in a program for several devices needs NVIDIA GPUs from Hopper on, or TPUs and a mesh"
    " with Explicit axes; rules without functions of their own (jax.lax.cond, jax.custom_jvp); and,"
    ' on a mesh with Explicit axes, weights that are sharded. "xla" and None take all.'
  )


def check(leaves: Sequence[Leaf], fmt: DeltaFormat, statistic_formats, index):
  """Raises if dtypes or shapes do not match the formats or each other."""
  for leaf in leaves:
    _check(leaf, fmt, statistic_formats, index)


def _check(leaf: Leaf, fmt: DeltaFormat, statistic_formats, index):
  gradient, low, delta, statistics = leaf[:4]
  checks.residual(low, delta, fmt)
  if gradient.shape != low.shape[0 if index is None else 1 :]:
    raise ValueError(
      f"The gradient must have the weight's shape {low.shape}; got {gradient.shape}."
    )
  if not jnp.issubdtype(gradient.dtype, jnp.floating):
    raise TypeError(f"The gradient must be a real float; got {gradient.dtype}.")
  if len(statistics) != len(statistic_formats):
    raise ValueError(
      f"{len(statistics)} statistics have {len(statistic_formats)} formats; each needs one."
    )
  for stored, f in zip(statistics, statistic_formats, strict=True):
    found, wanted = (
      [(x.shape, jnp.dtype(x.dtype)) for x in jax.tree.leaves(tree)]
      for tree in (stored, state_formats.stored_struct(low.shape, f))
    )
    if found != wanted:
      raise ValueError(
        f"A statistic in {f.name!r} of shape {low.shape} must be {wanted}; got {found}."
      )


def _unfit(name: str, fmt: DeltaFormat, statistic_formats) -> str:
  """The formats that a kernel takes, if a leaf's are others."""
  if fmt.is_full_precision or fmt.residual_bits not in (0, 8, 16):
    return "half-precision weights with residuals of 0, 8 or 16 bits, which need no packing"
  found = {f.name for f in statistic_formats}
  if name == "mosaic_gpu" and "fp32" in found:
    return 'statistics in "bf16", "fp16", "int8" or "int4"'
  if name == "mosaic_gpu" and "int4" in found and not tiles.HAS_STORE:
    return 'statistics in "int4" with JAX 0.12 or newer'
  return ""
