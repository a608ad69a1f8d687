"""apply_update: merges, adds a float32 update and splits again, in one pass and in place."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.formats import arithmetic, packing
from pallas_kernels.formats.random_bits import random_bits
from pallas_kernels.formats.weights import DeltaFormat
from pallas_kernels.operations import checks
from pallas_kernels.placement import implementations, sharded
from pallas_kernels.placement.by_device import by_device
from pallas_kernels.programs import mosaic_tpu
from pallas_kernels.programs.elementwise import elementwise
from pallas_kernels.programs.hoist import hoist
from pallas_kernels.programs.leaf import Leaf


def apply_update(
  low: jax.Array,
  delta: jax.Array | None,
  update: jax.typing.ArrayLike,
  fmt: str | DeltaFormat,
  *,
  key: jax.typing.ArrayLike | None = None,
  implementation: implementations.Implementation | None = None,
) -> tuple[jax.Array, jax.Array | None]:
  """Adds a float32 update to the master weights: ``split(merge(low, delta) + update)``.

  It works in place if the caller donates the buffers.

  Args:
    low: weights [...] in the format's dtype.
    delta: their residuals, packed by ``split``; None if the format has none.
    update: float32 [...].
    fmt: the format, for example ``"bf16+8"``.
    key: an integer seed or a ``jax.random`` key. A format that rounds
      stochastically requires it.
    implementation: None, ``"xla"``, ``"mosaic_gpu"`` or ``"mosaic_tpu"``
      (residuals of 0, 8 or 16 bits). None takes the kernel on TPUs from v5e on.

  Returns:
    The new ``(low, delta)``, in the shapes and dtypes of the old.

  Raises:
    TypeError: if a weight or residual does not have the format's dtype, or
      update is not float32.
    ValueError: if shapes do not match, a key is missing, or the platform lacks
      the implementation.

  Examples:
    >>> import jax.numpy as jnp
    >>> from pallas_kernels import apply_update, merge, split
    >>> low, delta = split(jnp.full(4, 1.0), "bf16+16")
    >>> low, delta = apply_update(low, delta, jnp.full(4, -1e-4), "bf16+16")
    >>> print(merge(low, delta, "bf16+16"))
    [0.9999 0.9999 0.9999 0.9999]

  References:
    `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`__, section 3.1
  """
  fmt = DeltaFormat.parse(fmt)
  update = checks.float32_array(update, "update")
  stream = checks.stream_of(key, fmt, f"apply_update in {fmt.name}")
  return apply_update_stream(low, delta, update, fmt, stream, implementation)


def apply_update_stream(low, delta, update, fmt: DeltaFormat, stream, implementation=None):
  """``apply_update`` with the words of a stream (``stream_keys``) instead of a key."""
  checks.residual(low, delta, fmt)
  if update.shape != low.shape:
    raise ValueError(f"The update must have the weight's shape {low.shape}; got {update.shape}.")
  if fmt.is_full_precision:
    return low + update, None
  chosen = implementations.resolve(
    implementation, low, update, residual_bits=fmt.residual_bits, has_tpu_kernel=True
  )
  by_xla, by_tpu = functools.partial(_xla, fmt), functools.partial(_mosaic_tpu, fmt)
  takes_kernel = mosaic_tpu.takes(low.shape, low.shape, True)
  if chosen == "mosaic_tpu" and takes_kernel:
    return by_tpu(low, delta, update, stream)
  has_two_results = fmt.residual_bits in (8, 16)
  is_explicit = sharded.has_explicit_axes(low)
  if implementation is None and takes_kernel and has_two_results and not is_explicit:
    # XLA:TPU makes two passes, one for each result, and a copy of the residual.
    programs = {"any": by_xla, "mosaic_tpu": by_tpu}
    return by_device(programs, low, delta, update, stream, like=(low, delta))
  if chosen != "mosaic_gpu":
    return sharded.automatic(by_xla, low, low, delta, update, stream)

  def tile(bits, update_T, low_T, delta_T=None):
    wide_T = None if delta_T is None else delta_T.astype(jnp.int32)
    low_T, new_T = arithmetic.apply_values(low_T, wide_T, update_T, fmt, bits)
    return (low_T,) if delta_T is None else (low_T, new_T.astype(delta_T.dtype))

  low, *delta = elementwise(
    tile,
    key=stream if fmt.needs_key else None,
    reads=[update],
    in_place=[low] if delta is None else [low, delta],
  )
  return low, delta[0] if delta else None


def _mosaic_tpu(fmt: DeltaFormat, low, delta, update, stream):
  """The step of an optimizer without statistics, whose update is the gradient."""
  x = jax.ShapeDtypeStruct(low.shape, jnp.float32)
  scalars, rule = hoist(lambda update, master, statistics: (update, statistics), (x, x, []))
  stream = jnp.zeros(2, jnp.uint32) if stream is None else stream
  leaf = Leaf(update, low, delta, [], stream)
  rules, formats = {low.shape: rule}, (fmt, ())
  ((low, delta, _),) = mosaic_tpu.step(rules, formats, False, scalars, [leaf], None, None)
  return low, delta


@functools.partial(jax.jit, static_argnums=0)  # outside of jit, compiled as a whole
def _xla(fmt: DeltaFormat, low, delta, update, stream):
  bits = random_bits(stream, low.shape) if fmt.needs_key else None
  unpacked = packing.unpack(delta, low.shape, fmt)
  low, new_delta = arithmetic.apply_values(low, unpacked, update, fmt, bits)
  return low, packing.pack(new_delta, fmt)
