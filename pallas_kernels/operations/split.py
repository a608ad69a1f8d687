"""split: stores a float32 master as a half-precision weight and a few residual bits."""

import functools

import jax

from pallas_kernels.formats import arithmetic, packing
from pallas_kernels.formats.random_bits import random_bits
from pallas_kernels.formats.weights import DeltaFormat
from pallas_kernels.operations import checks
from pallas_kernels.operations.merge import merge
from pallas_kernels.placement import implementations, sharded
from pallas_kernels.placement.by_device import by_device
from pallas_kernels.programs import joined
from pallas_kernels.programs.elementwise import elementwise
from pallas_kernels.programs.leaf import is_small


def split(
  x: jax.typing.ArrayLike,
  fmt: str | DeltaFormat,
  *,
  key: jax.typing.ArrayLike | None = None,
  implementation: implementations.Implementation | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """Splits float32 masters into half-precision weights and packed residuals.

  Args:
    x: float32 [...].
    fmt: a format, for example ``"bf16+8"``. ``"fp32"`` gives ``(x, None)``.
    key: an integer seed or a ``jax.random`` key. A format that rounds
      stochastically requires it: every format string but ``"bf16+16"`` and
      ``"fp32"``.
    implementation: None, ``"xla"`` or ``"mosaic_gpu"`` (residuals of 0, 8 or 16
      bits).

  Returns:
    ``(low, delta)``. ``low`` [...] has the format's dtype and is a value nearest
    to ``merge(low, delta)``, unless ``low_rounding`` is not ``"nearest"``.
    ``delta`` is the packed residual: an array of the rank of x, or None if the
    format has no residual bits.

  Raises:
    TypeError: if x is not float32, or key is not a key.
    ValueError: if the format is unknown, a key is missing, or the platform
      lacks the implementation.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from pallas_kernels import split
    >>> low, delta = split(jnp.array([0.1, 1.0]), "bf16+8", key=jax.random.key(0))
    >>> print(low, low.dtype, delta.dtype)
    [0.100098 1] bfloat16 int8

  References:
    `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`__, section 3.1
  """
  fmt = DeltaFormat.parse(fmt)
  x = checks.float32_array(x, "x")
  stream = checks.stream_of(key, fmt, f"split to {fmt.name}")
  return split_stream(x, fmt, stream, implementation)


def split_stream(x, fmt: DeltaFormat, stream, implementation=None):
  """``split`` with the words of a stream (``stream_keys``) instead of a key."""
  if fmt.is_full_precision:
    return x, None
  if implementations.resolve(implementation, x, residual_bits=fmt.residual_bits) == "xla":
    return sharded.automatic(functools.partial(_xla, fmt), x, x, stream)
  residual = packing.stored_struct(x.shape, fmt)

  def tile(bits, x_T):
    low_T, delta_T = arithmetic.split_values(x_T, fmt, bits)
    return (low_T,) if residual is None else (low_T, delta_T.astype(residual.dtype))

  outputs = [fmt.dtype] if residual is None else [fmt.dtype, residual.dtype]
  low, *delta = elementwise(tile, key=stream if fmt.needs_key else None, reads=[x], outputs=outputs)
  return low, delta[0] if delta else None


@functools.partial(jax.jit, static_argnums=(1, 3))
def split_leaves(xs, fmt: DeltaFormat, streams, merges: bool):
  """``split_stream`` of several arrays in one program, which joins small ones.

  Args:
    xs: float32 arrays.
    fmt: their half-precision format.
    streams: the words of each array's stream, uint32 [2].
    merges: whether to return the masters, too.

  Returns:
    (low, delta, master) of each array; master is float32, or None without merges.
  """
  if any(map(sharded.has_explicit_axes, xs)):
    results = [split_stream(x, fmt, stream) for x, stream in zip(xs, streams, strict=True)]
    return [(low, delta, merge(low, delta, fmt) if merges else None) for low, delta in results]
  each = functools.partial(_xla_leaves, fmt, merges)
  together = functools.partial(_joined_leaves, fmt, merges)
  on_one = {kind: functools.partial(together, kind == "gpu") for kind in ("cpu", "gpu")}
  return by_device({"any": each} | on_one, xs, streams)


def _xla_leaves(fmt: DeltaFormat, merges: bool, xs, streams):
  one = jax.jit(functools.partial(_split_and_merge, fmt, merges))
  return [one(x, stream) for x, stream in zip(xs, streams, strict=True)]


def _split_and_merge(fmt, merges, x, stream):
  low, delta = _xla(fmt, x, stream)
  value = arithmetic.merge_values(low, packing.unpack(delta, low.shape, fmt), fmt)
  return low, delta, value if merges else None


def _joined_leaves(fmt: DeltaFormat, merges: bool, on_gpu: bool, xs, streams):
  small = [i for i, x in enumerate(xs) if joined.takes(x, x, fmt) and is_small(x.shape)]
  small = small if len(small) > 1 else []
  large = [i for i in range(len(xs)) if i not in set(small)]
  found = _xla_leaves(fmt, merges, [xs[i] for i in large], [streams[i] for i in large])
  results = dict(zip(large, found, strict=True))
  if small:
    some, words = [xs[i] for i in small], [streams[i] for i in small]
    shapes = [x.shape for x in some]
    joint = joined.Joint(shapes, on_gpu=on_gpu)
    draws = joined.draws(joint, shapes, words)
    low, wide = arithmetic.split_values(joint.values(some), fmt, draws.bits(0))
    value = arithmetic.merge_values(low, wide, fmt) if merges else None
    delta = packing.pack(wide, fmt)
    structs = [packing.stored_struct(shape, fmt) for shape in shapes]
    nones = [None] * len(small)
    parts = (
      joint.cut(low, some),
      nones if delta is None else joint.cut(delta, structs),
      nones if value is None else joint.cut(value, some),
    )
    results |= dict(zip(small, zip(*parts, strict=True), strict=True))
  return [results[i] for i in range(len(xs))]


@functools.partial(jax.jit, static_argnums=0)  # outside of jit, compiled as a whole
def _xla(fmt: DeltaFormat, x, stream):
  bits = random_bits(stream, x.shape) if fmt.needs_key else None
  low, delta = arithmetic.split_values(x, fmt, bits)
  return low, packing.pack(delta, fmt)
