"""The arithmetic of split and merge: pure functions on arrays of any shape.

XLA programs call them on whole arrays; kernels call them on tiles in registers.
They use integer arithmetic on float bit patterns. The results are therefore
bit-identical on every backend, and subnormals do not depend on a flush mode.
No function relies on a float32 -> bfloat16 -> float32 round trip, because
XLA:GPU removes it.

Vocabulary. A ``code`` is the magnitude of a float on the fine grid (dtype +
extra bits), an integer: adjacent codes are adjacent magnitudes. The weight
stores the upper part of the code, ``low``. The residual is the difference,
``delta = code - (low << extra_bits)``. A ``low`` of zero cannot carry the sign,
so ``delta`` does.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.formats.weights import GRIDS, DeltaFormat, FloatGrid, Rounding

_U32, _I32 = jnp.uint32, jnp.int32
F32_INF = 0x7F800000
F32_MAX = 0x7F7FFFFF
F32_MANTISSA = 23
F32_BIAS = 127


def bits_of(x):
  """float32 -> its bit pattern, uint32."""
  return jax.lax.bitcast_convert_type(x, _U32)


def float_of(bits):
  """uint32 bit pattern -> float32."""
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def least(a, b):
  """The minimum of uint32 below 2**31: as signed integers, because a TPU has no other."""
  return jnp.minimum(a.astype(_I32), b.astype(_I32)).astype(_U32)


def most(a, b):
  """The maximum of uint32 below 2**31; see ``least``."""
  return jnp.maximum(a.astype(_I32), b.astype(_I32)).astype(_U32)


def integer_in(word, which, width: int, is_signed: bool):
  """The first (0) or second (1) integer of ``width`` bits in a word, from its low end; int32."""
  # The first shift puts the sign in place.
  x = word.astype(_U32).astype(_I32) << (32 - width - width * which)
  return x >> (32 - width) if is_signed else (x.astype(_U32) >> _U32(32 - width)).astype(_I32)


def two_integers(first, second, width: int):
  """The inverse of ``integer_in``: the word of two integers, uint32."""
  first, second = (x.astype(_U32) & _U32((1 << width) - 1) for x in (first, second))
  return first | (second << _U32(width))


def low_bits_of(low):
  """A narrow float -> its bit pattern, uint32."""
  unsigned = jnp.dtype(f"uint{low.dtype.itemsize * 8}")
  return jax.lax.bitcast_convert_type(low, unsigned).astype(_U32)


def low_of(bits, dtype):
  """uint32 bit pattern -> a narrow float."""
  unsigned = jnp.dtype(f"uint{jnp.dtype(dtype).itemsize * 8}")
  return jax.lax.bitcast_convert_type(bits.astype(unsigned), dtype)


def _round_off(code, shift, rounding: Rounding, bits):
  """``code / 2**shift`` rounded to an integer; shift is 0 to 31, scalar or array."""
  if isinstance(shift, int) and shift == 0:
    return code
  if rounding == "stochastic":
    # Adding `shift` uniform bits carries into the floor with probability rest / 2**shift. They
    # are the top ones of `bits`. An array of shifts takes two steps: a shift by 32 is undefined.
    if isinstance(shift, int):
      uniform = ~bits >> _U32(32 - shift)
    else:
      uniform = (~bits >> _U32(1)) >> (_U32(31) - shift)
    return (code + uniform) >> _U32(shift)
  shift = _U32(shift) if isinstance(shift, int) else shift
  floor = code >> shift
  if rounding == "truncate":
    return floor
  rest = code & ((_U32(1) << shift) - _U32(1))
  # Compares twice the rest with 2**shift. Ties go to even: an odd floor tips a tie upwards.
  return floor + ((rest << _U32(1)) + (floor & _U32(1)) > (_U32(1) << shift)).astype(_U32)


def to_code(magnitude, grid: FloatGrid, extra_bits: int, rounding: Rounding, bits, max_code: int):
  """Rounds a float32 magnitude onto a grid.

  Args:
    magnitude: uint32, float32 bit patterns without their sign.
    grid: the narrow dtype.
    extra_bits: how many bits finer than the dtype the grid is.
    rounding: "nearest" (ties to even), "stochastic" or "truncate".
    bits: random uint32 if rounding is stochastic; the upper bits are used.
    max_code: the code at which finite values saturate.

  Returns:
    uint32 codes. Infinity and NaN map to the dtype's codes for them, shifted
    left by extra_bits.
  """
  drop = F32_MANTISSA - grid.mantissa_bits - extra_bits  # float32 bits that the grid lacks
  if grid.bias == F32_BIAS:
    code = _round_off(magnitude, drop, rounding, bits)
  else:
    # Below the dtype's normal range the grid has a constant step: the significand,
    # with an explicit leading one, loses one more bit in each lower binade.
    exponent = magnitude >> _U32(F32_MANTISSA)
    first_normal = F32_BIAS + 1 - grid.bias
    depth = most(exponent, _U32(first_normal)) - exponent
    significand = (magnitude & _U32(0x7FFFFF)) | _U32(0x800000)
    # The power of two above the largest finite value saturates, and its code stays below 2**31.
    beyond_exponent = (grid.max_code >> grid.mantissa_bits) + 1 + F32_BIAS - grid.bias
    beyond = _U32(beyond_exponent << F32_MANTISSA)
    normal = least(magnitude, beyond) - _U32((first_normal - 1) << F32_MANTISSA)
    code = jnp.where(depth > _U32(0), significand, normal)
    if drop < 0:  # a grid finer than float32's own
      code = code << _U32(-drop)
    shift = depth + _U32(max(drop, 0))
    excess = least(most(shift, _U32(31)), _U32(62)) - _U32(31)  # a shift by 62 clears every bit
    code = _round_off(code >> excess, least(shift, _U32(31)), rounding, bits)
  code = least(code, _U32(max_code))
  code = jnp.where(magnitude == _U32(F32_INF), _U32(grid.inf_code << extra_bits), code)
  return jnp.where(magnitude > _U32(F32_INF), _U32(grid.nan_code << extra_bits), code)


def _vanishes(x_bits, low):
  """Where a ``low`` code is zero, and x is not."""
  return (low == _U32(0)) & ((x_bits << _U32(1)) != _U32(0))


def _narrow(x_bits, grid: FloatGrid, low):
  """Adds x's sign to ``low`` codes; a zero is negative only where x is -0.0."""
  signed = low | ((x_bits >> _U32(31)) << _U32(grid.width - 1))
  return jnp.where(_vanishes(x_bits, low), _U32(0), signed)


def round_to(x, dtype, rounding: Rounding, bits=None, *, saturate=True):
  """float32 -> a narrow dtype. Beyond its range, values saturate or overflow as in IEEE 754."""
  grid = GRIDS[jnp.dtype(dtype)]
  x_bits = bits_of(x)
  top = grid.max_code if saturate else grid.inf_code
  code = to_code(x_bits & _U32(0x7FFFFFFF), grid, 0, rounding, bits, top)
  return low_of(_narrow(x_bits, grid, code), dtype)


def widen(low):
  """bfloat16 or float16 -> float32, exactly, on bit patterns (see the module docstring)."""
  return merge_values(low, None, DeltaFormat(low.dtype, 0))


def as_float32(x):
  """Any real float array -> float32; half precision goes through ``widen``."""
  return widen(x) if x.dtype in (jnp.bfloat16, jnp.float16) else x.astype(jnp.float32)


def rounded(x):
  """Rounds a product to float32 before it enters a sum.

  A compiler may contract a multiplication and an addition into one operation,
  which rounds once, in one program and not in another. This select prevents
  that, because no compiler can prove that it is the identity. (XLA removes
  ``jax.lax.reduce_precision``.)
  """
  return jax.lax.select(x == x, x, jnp.full_like(x, jnp.nan))


def keep_apart(x, zero):
  """``rounded`` in one instruction; zero is a float32 0 whose value the compiler cannot know."""
  return float_of(bits_of(x) ^ bits_of(jnp.full_like(x, zero)))


def sign_of(x):
  """``jnp.sign`` that keeps NaN in a Mosaic GPU kernel, too, where JAX's own gives 1 or -1."""
  one = float_of((bits_of(x) & _U32(0x80000000)) | _U32(0x3F800000))
  return jnp.where(jnp.abs(x) > 0, one, x)  # keeps zeros and NaN


def split_values(x, fmt: DeltaFormat, bits):
  """float32 -> (low, delta); see :func:`pallas_kernels.split`.

  Args:
    x: float32, any shape.
    fmt: the format.
    bits: random uint32 of x's shape if the format needs them, else None. The
      upper bits choose the grid point, the lower bits the direction.

  Returns:
    low in the format's dtype and delta as int32 (None if the format has no
    residual bits), both of x's shape.
  """
  k = fmt.extra_bits
  x_bits = bits_of(x)
  code = to_code(x_bits & _U32(0x7FFFFFFF), fmt.grid, k, fmt.rounding, bits, fmt.max_code)
  if k == 0:
    return low_of(_narrow(x_bits, fmt.grid, code), fmt.dtype), None
  if fmt.low_rounding == "nearest":  # ties go away from zero: -2**(k-1) fits, 2**(k-1) does not
    low = (code + _U32(1 << (k - 1))) >> _U32(k)
  elif fmt.low_rounding == "stochastic":
    low = (code + (bits & _U32((1 << k) - 1))) >> _U32(k)
    if fmt.max_code != F32_MAX:  # rounding up must not overflow to infinity
      low = jnp.where(code <= _U32(fmt.max_code), least(low, _U32(fmt.grid.max_code)), low)
  else:
    low = code >> _U32(k)
  delta = (code - (low << _U32(k))).astype(_I32)
  is_negative = x_bits.astype(_I32) < _I32(0)
  delta = jnp.where(_vanishes(x_bits, low) & is_negative, -delta, delta)
  return low_of(_narrow(x_bits, fmt.grid, low), fmt.dtype), delta


def _fine_code(low, delta, k: int):
  """(low, delta) -> (sign, code on the fine grid), both uint32."""
  low_bits = low_bits_of(low)
  code, sign = low_bits & _U32(0x7FFF), low_bits >> _U32(15)
  if k == 0:
    return sign, code
  total = (code << _U32(k)).astype(_I32) + delta
  takes_sign = (code == _U32(0)) & (delta != _I32(0))
  sign = jnp.where(takes_sign, (delta < _I32(0)).astype(_U32), sign)
  return sign, jnp.abs(total).astype(_U32)


def _is_special(code, fmt: DeltaFormat):
  """Where a weight's code alone determines the value: NaN and infinities.

  At bf16+16, infinity may represent a finite value just below it.
  """
  holds_all = fmt.dtype == jnp.bfloat16 and fmt.extra_bits == 16
  return code >= _U32(fmt.grid.inf_code + holds_all)


def merge_values(low, delta, fmt: DeltaFormat):
  """(low, delta) -> float32: the exact inverse of ``split_values`` on its range.

  Args:
    low: the weight, in the format's dtype.
    delta: int32 of low's shape, or None if the format has no residual.
    fmt: the format.

  Returns:
    float32 of low's shape.
  """
  grid, k = fmt.grid, fmt.extra_bits
  if grid.bias == F32_BIAS:
    return _merge_bfloat16(low, delta, k)
  sign, fine = _fine_code(low, delta, k)
  drop = F32_MANTISSA - grid.mantissa_bits - k
  magnitude = fine << _U32(drop) if drop >= 0 else fine >> _U32(-drop)
  # The product is exact: at most 24 significant bits times a power of two.
  ulp = 2.0 ** (1 - grid.bias - grid.mantissa_bits - k)
  subnormal = bits_of(fine.astype(_I32).astype(jnp.float32) * jnp.float32(ulp))
  magnitude = jnp.where(
    fine < _U32(1 << (grid.mantissa_bits + k)),
    subnormal,
    magnitude + _U32((F32_BIAS - grid.bias) << F32_MANTISSA),
  )
  code = low_bits_of(low) & _U32(0x7FFF)
  special = (code << _U32(F32_MANTISSA - grid.mantissa_bits)) | _U32(F32_INF)
  return float_of(jnp.where(_is_special(code, fmt), special, magnitude) | (sign << _U32(31)))


def _merge_bfloat16(low, delta, k: int):
  """``merge_values`` of bfloat16, the upper half of float32: adds the residual to the bits."""
  bits = low_bits_of(low) << _U32(16)
  if delta is None or k == 0:
    return float_of(bits)
  moved = delta << _I32(16 - k)
  magnitude, size = (bits & _U32(0x7FFFFFFF)).astype(_I32), jnp.abs(moved)
  from_zero = (size | (moved & _I32(-(1 << 31)))).astype(_U32)
  # A zero takes the residual's sign, if there is one. Other magnitudes exceed every residual.
  value = jnp.where(magnitude < size, from_zero, bits + moved.astype(_U32))
  # With 16 bits, infinity may represent a finite value just below it. NaN has no residual.
  is_special = magnitude > _I32(F32_INF) if k == 16 else magnitude >= _I32(F32_INF)
  return float_of(jnp.where(is_special, bits, value))


def apply_values(low, delta, update, fmt: DeltaFormat, bits):
  """Adds a float32 update to the master and splits the sum.

  Args:
    low: the weight, in the format's dtype.
    delta: int32 of low's shape, or None if the format has no residual.
    update: float32 of low's shape.
    fmt: the format.
    bits: random uint32 of low's shape if the format needs them, else None.

  Returns:
    The new (low, delta).
  """
  x = merge_values(low, delta, fmt)
  new_x = x + update
  new_low, new_delta = split_values(new_x, fmt, bits)
  if fmt.low_rounding == "stochastic" and new_delta is not None:
    # An unchanged master keeps the direction that was drawn for it.
    stays = bits_of(x) == bits_of(new_x)
    new_low, new_delta = jnp.where(stays, low, new_low), jnp.where(stays, delta, new_delta)
  return new_low, new_delta


def landing_update(old_low, low):
  """The float32 update of ``land_values``, which depends on the weights alone."""
  return _landing(old_low, low, jnp.float32)[0]


def _landing(old_low, low, update_dtype):
  """(float32 update, where the weight must stay as it is, where both weights are finite)."""
  old, new = widen(old_low), widen(low)
  top = jnp.float32(jnp.finfo(update_dtype).max)
  # On bit patterns, which kernels support.
  old_is_finite, new_is_finite = (
    (bits_of(x) & _U32(0x7FFFFFFF)) < _U32(F32_INF) for x in (old, new)
  )
  old_is_inf = (bits_of(old) & _U32(0x7FFFFFFF)) == _U32(F32_INF)
  difference = new - old
  finite = old_is_finite & new_is_finite
  clipped = jnp.minimum(jnp.maximum(difference, -top), top)
  update = jnp.where(finite, clipped, difference)
  # x + (-0.0) is x for every x. No update takes an infinite weight to a finite one.
  stays = (low_bits_of(old_low) == low_bits_of(low)) | (old_is_inf & new_is_finite)
  return jnp.where(stays, jnp.float32(-0.0), update), stays, finite


def land_values(old_low, low, delta, fmt: DeltaFormat, update_dtype):
  """The update that ``optax.apply_updates`` adds to ``old_low``, and the residual where it lands.

  ``optax.apply_updates`` computes ``(old + update).astype(old.dtype)``. Usually
  a float32 update reaches ``low`` exactly. Sometimes none does: the weight
  crosses zero to a far smaller one, it leaves infinity, or the difference
  overflows. The residual then belongs to the weight that the update does reach,
  and is the nearest one to the master in that weight's cell.

  Args:
    old_low: the weight that receives the update.
    low: the weight that the new master was split into.
    delta: int32, the residual of low, or None if the format has none.
    fmt: the format.
    update_dtype: float32 or a half-precision dtype.

  Returns:
    (update, delta): the residual belongs to the weight that the update reaches.
  """
  k = fmt.extra_bits
  old = widen(old_low)
  update, stays, finite = _landing(old_low, low, update_dtype)
  if jnp.dtype(update_dtype) != jnp.float32:
    # If this dtype cannot hold the difference of the weights, aim at the master.
    rounded = round_to(update, update_dtype, "nearest")
    aimed = round_to(merge_values(low, delta, fmt) - old, update_dtype, "nearest")
    exact = (widen(rounded) == update) | stays | ~finite
    update = jnp.where(exact, rounded, aimed)
  if k == 0:
    return update, None
  reached = old + (update if update.dtype == jnp.float32 else widen(update))
  landed = low_bits_of(round_to(reached, fmt.dtype, "nearest", saturate=False))
  landed_code = landed & _U32(0x7FFF)
  sign, fine = _fine_code(low, delta, k)
  # The master's code, signed along the landed weight's direction; upwards where that is zero.
  is_zero = landed_code == _U32(0)
  against = sign != jnp.where(is_zero, _U32(0), landed >> _U32(15))
  fine = fine.astype(_I32)
  along = jnp.where(against, -fine, fine)
  base = (landed_code << _U32(k)).astype(_I32)
  lowest = jnp.where(is_zero, _I32(-fmt.max_delta), base - _I32(fmt.half_cell))
  in_cell = jnp.clip(along, lowest, base + _I32(fmt.max_delta)) - base
  in_cell = jnp.where(_is_special(landed_code, fmt), _I32(0), in_cell)
  lands = (landed == low_bits_of(low)) | (is_zero & ((low_bits_of(low) & _U32(0x7FFF)) == _U32(0)))
  return update, jnp.where(lands, delta, in_cell)


def move_values(low, delta, update, fmt: DeltaFormat, bits, lands: bool):
  """``apply_values``; if lands, the residual of the weight that ``landing_update`` reaches."""
  new_low, new_delta = apply_values(low, delta, update, fmt, bits)
  if lands:
    _, new_delta = land_values(low, new_low, new_delta, fmt, jnp.float32)
  return new_low, new_delta
