"""Weight formats: a half-precision dtype plus a few residual bits.

``FloatGrid`` describes a narrow floating-point dtype to the arithmetic.
:class:`pallas_kernels.DeltaFormat` is the format that a user names.
"""

import dataclasses
import re
from typing import Any, Literal, Self, get_args

import jax.numpy as jnp

Rounding = Literal["nearest", "stochastic", "truncate"]
ROUNDINGS = get_args(Rounding)
MAX_EXTRA_BITS = 16


@dataclasses.dataclass(frozen=True)
class FloatGrid:
  """The magnitudes of a narrow float, as consecutive integers ("codes").

  A code is the dtype's bit pattern without its sign. The next code is the next
  representable magnitude, subnormals included.
  """

  width: int  # bits of storage, the sign included
  mantissa_bits: int
  bias: int
  max_code: int  # the largest finite magnitude
  inf_code: int  # the code of NaN if the dtype has no infinity
  nan_code: int


GRIDS = {
  jnp.dtype(jnp.bfloat16): FloatGrid(16, 7, 127, 0x7F7F, 0x7F80, 0x7FC0),
  jnp.dtype(jnp.float16): FloatGrid(16, 10, 15, 0x7BFF, 0x7C00, 0x7E00),
  jnp.dtype(jnp.float8_e4m3fn): FloatGrid(8, 3, 7, 0x7E, 0x7F, 0x7F),
  jnp.dtype(jnp.float8_e5m2): FloatGrid(8, 2, 15, 0x7B, 0x7C, 0x7E),
}

SHORT_NAMES = {
  "bf16": jnp.dtype(jnp.bfloat16),
  "fp16": jnp.dtype(jnp.float16),
  "fp32": jnp.dtype(jnp.float32),
}


def short_name(dtype) -> str | None:
  """The short name of a dtype, or of a dtype's name: "bf16" for jnp.bfloat16; None without one."""
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    return None
  return next((name for name, known in SHORT_NAMES.items() if known == found), None)


def _hint(spec) -> str:
  """What to write instead of a dtype."""
  short = spec if spec in ("bf16", "fp16") else short_name(spec)
  return "" if short is None else f' Write "{short}{"" if short == "fp32" else "+8"}".'


_ACCEPTED = '"bf16+K" or "fp16+K" with K = 0..16, or "fp32"'


@dataclasses.dataclass(frozen=True)
class DeltaFormat:
  """A half-precision dtype and the residual bits that complete a float32 master.

  Args:
    dtype: ``bfloat16`` or ``float16``; ``float32`` (with ``extra_bits=0``)
      leaves a weight alone.
    extra_bits: residual bits a value, 0 to 16. The master lies on a grid
      ``2**extra_bits`` times finer than that of ``dtype``.
    rounding: how a float32 value is rounded to that grid: ``"nearest"`` (ties
      to even), ``"stochastic"`` or ``"truncate"`` (towards zero).
    low_rounding: how the half-precision weight is rounded from the grid. Any
      value but ``"nearest"`` takes one more bit, which records the direction.

  Raises:
    ValueError: if the dtype, bit count or rounding is not one of these.

  Examples:
    >>> import jax.numpy as jnp
    >>> from pallas_kernels import DeltaFormat
    >>> DeltaFormat(jnp.bfloat16, extra_bits=8).name
    'bf16+8'
    >>> DeltaFormat.parse("bf16+8").bits_per_param
    24

  References:
    `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`__, section 3.1
  """

  dtype: Any = jnp.bfloat16
  extra_bits: int = 8
  rounding: Rounding = "stochastic"
  low_rounding: Rounding = "nearest"

  def __post_init__(self):
    try:
      dtype = jnp.dtype(self.dtype)
    except TypeError:
      dtype = self.dtype
    if dtype not in SHORT_NAMES.values():
      raise ValueError(
        "The dtype of a weight format must be bfloat16, float16, or float32"
        f" (which leaves the weight alone); got {self.dtype!r}."
      )
    object.__setattr__(self, "dtype", dtype)  # one spelling: hashable, equal
    bits = self.extra_bits
    if isinstance(bits, bool) or not isinstance(bits, int) or not 0 <= bits <= MAX_EXTRA_BITS:
      raise ValueError(f"extra_bits must be an integer from 0 to {MAX_EXTRA_BITS}; got {bits!r}.")
    if self.is_full_precision and bits:
      raise ValueError(f"A float32 weight takes no extra bits; got extra_bits={bits}.")
    for name in ("rounding", "low_rounding"):
      if getattr(self, name) not in ROUNDINGS:
        raise ValueError(f"{name} must be one of {ROUNDINGS}; got {getattr(self, name)!r}.")

  @classmethod
  def parse(cls, spec: str | Self) -> Self:
    """Parses a short string, for example ``"bf16+8"``; a format passes through.

    Args:
      spec: ``"bf16+K"`` or ``"fp16+K"`` (K = 0..16), ``"fp32"``, or a format.

    Returns:
      The format. A string gives the default roundings.

    Raises:
      ValueError: if the string names no format.
      TypeError: if spec is neither a string nor a format.

    Examples:
      >>> from pallas_kernels import DeltaFormat
      >>> DeltaFormat.parse("fp16+13").extra_bits
      13
    """
    if isinstance(spec, cls):
      return spec
    if not isinstance(spec, str):
      raise TypeError(
        f"A weight format must be {_ACCEPTED}, or a DeltaFormat; got {spec!r}.{_hint(spec)}"
      )
    match = re.fullmatch(r"(bf16|fp16)\+(\d{1,2})|fp32", spec)
    if match is None or int(match[2] or 0) > MAX_EXTRA_BITS:
      raise ValueError(f"Unknown weight format {spec!r}; accepted: {_ACCEPTED}.{_hint(spec)}")
    return cls(SHORT_NAMES[match[1] or "fp32"], int(match[2] or 0))

  @property
  def name(self) -> str:
    """The short string, for example ``"bf16+8"``, without the roundings."""
    short = next(k for k, v in SHORT_NAMES.items() if v == self.dtype)
    return short if self.is_full_precision else f"{short}+{self.extra_bits}"

  @property
  def is_full_precision(self) -> bool:
    """True if the format leaves a weight alone."""
    return self.dtype == jnp.float32

  @property
  def residual_bits(self) -> int:
    """Residual bits a value: the extra bits, plus the direction bit if there is one."""
    has_direction = self.extra_bits > 0 and self.low_rounding != "nearest"
    return self.extra_bits + has_direction

  @property
  def bits_per_param(self) -> int:
    """Bits a parameter: those of the weight plus those of its residual."""
    return self.dtype.itemsize * 8 + self.residual_bits

  @property
  def needs_key(self) -> bool:
    """True if ``split`` draws random bits."""
    if self.is_full_precision:
      return False
    holds_all = self.dtype == jnp.bfloat16 and self.extra_bits == 16
    draws_low = self.low_rounding == "stochastic" and self.extra_bits > 0
    return draws_low or (self.rounding == "stochastic" and not holds_all)

  @property
  def grid(self) -> FloatGrid:
    """The codes of the dtype."""
    return GRIDS[self.dtype]

  @property
  def half_cell(self) -> int:
    """Half a cell, in steps of the fine grid: residuals lie in ``[-half_cell, max_delta]``."""
    return (1 << self.residual_bits) // 2

  @property
  def max_delta(self) -> int:
    """The largest residual of a weight in the dtype's normal range."""
    # There, fp16 with 14 bits or more is finer than float32.
    spare = max(self.extra_bits - (23 - self.grid.mantissa_bits), 0)
    return max(self.half_cell - (1 << spare), 0)

  @property
  def max_code(self) -> int:
    """The largest finite code on the fine grid."""
    if self.dtype == jnp.bfloat16 and self.extra_bits == 16:
      return 0x7F7FFFFF  # the largest float32: here the weight may be inf
    return (self.grid.max_code << self.extra_bits) + self.max_delta
