"""Laws 1 to 6 of the formats, on every class of float32 bit patterns."""

import functools

import chex
from conftest import assert_trees_equal, bits_of, float32_classes
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_lowmem as lowmem
from pallas_kernels.formats import packing

NEAREST = {"rounding": "nearest"}
FEW = float32_classes(2048)
DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}


def fmt_of(name, **kwargs):
  base = lowmem.DeltaFormat.parse(name)
  return lowmem.DeltaFormat(base.dtype, base.extra_bits, **kwargs)


# Not under jit: operation by operation, formats share what is compiled.
split = functools.partial(lowmem.split, key=3)
merge = lowmem.merge


def all_formats(step=1):
  for dtype in DTYPES.values():
    for bits in range(0, 17, step):
      for rounding in ("nearest", "stochastic", "truncate"):
        for low_rounding in ("nearest", "stochastic", "truncate"):
          yield lowmem.DeltaFormat(dtype, bits, rounding, low_rounding)


@pytest.mark.parametrize(
  "fmt", list(all_formats()), ids=lambda f: f"{f.name}-{f.rounding}-{f.low_rounding}"
)
def test_round_trip(fmt):
  x = FEW
  low, delta = split(x, fmt)
  back = np.asarray(merge(low, delta, fmt))
  nan = np.isnan(x)
  assert np.isnan(back[nan]).all() and np.isnan(np.asarray(low, np.float32)[nan]).all()
  chex.assert_trees_all_equal(back[np.isinf(x)], x[np.isinf(x)])
  chex.assert_tree_all_finite(back[np.isfinite(x)])
  if fmt.name != "bf16+16":
    chex.assert_tree_all_finite(np.asarray(low, np.float32)[np.isfinite(x)])
  again_low, again_delta = split(back, fmt)
  if fmt.low_rounding == "nearest":  # law 5
    assert_trees_equal(again_low[~nan], low[~nan])
    if delta is not None:
      assert_trees_equal(unpack(again_delta, x, fmt)[~nan], unpack(delta, x, fmt)[~nan])
  again = np.asarray(merge(again_low, again_delta, fmt))
  assert_trees_equal(again[~nan], back[~nan])  # a value on the grid stays


def finite_values(dtype) -> np.ndarray:
  """Every finite value of a narrow dtype, ascending, as float64."""
  width = jnp.dtype(dtype).itemsize
  codes = np.arange(1 << (8 * width), dtype=np.uint32).astype(f"u{width}")
  with np.errstate(invalid="ignore"):  # NaN payloads
    every = codes.view(jnp.dtype(dtype)).astype(np.float64)
  return np.unique(every[np.isfinite(every)])


def unpack(delta, x, fmt):
  return packing.unpack(delta, x.shape, fmt)


def check_bf16_16(bits):
  """Law 1 on an array of bit patterns, inside jit: counts of what fails."""
  x = jax.lax.bitcast_convert_type(bits, jnp.float32)
  low, delta = lowmem.split(x, "bf16+16")
  back = jax.lax.bitcast_convert_type(lowmem.merge(low, delta, "bf16+16"), jnp.uint32)
  is_nan = (bits & jnp.uint32(0x7FFFFFFF)) > jnp.uint32(0x7F800000)
  low_bits = jax.lax.bitcast_convert_type(low, jnp.uint16)
  back_nan = (back & jnp.uint32(0x7FFFFFFF)) > jnp.uint32(0x7F800000)
  low_nan = (low_bits & jnp.uint16(0x7FFF)) > jnp.uint16(0x7F80)
  wrong = jnp.where(is_nan, ~(back_nan & low_nan), back != bits)
  # low is -0.0 only where x is; and the nearest, where it is not a tie
  wrong |= (low_bits == jnp.uint16(0x8000)) & (bits != jnp.uint32(0x80000000))
  tie = (bits & jnp.uint32(0xFFFF)) == jnp.uint32(0x8000)
  nearest = (bits + jnp.uint32(0x7FFF) + ((bits >> 16) & jnp.uint32(1))) >> 16
  vanishes = (low_bits & jnp.uint16(0x7FFF)) == jnp.uint16(0)
  wrong |= ~(is_nan | tie | vanishes) & (low_bits.astype(jnp.uint32) != nearest)
  return wrong.sum()


def test_bf16_16_is_exact_for_every_float32():
  """All 2**32 bit patterns (law 1)."""
  chunk = 1 << 25

  @jax.jit
  def count(start):
    return check_bf16_16(start + jax.lax.iota(jnp.uint32, chunk))

  wrong = sum(int(count(jnp.uint32(start))) for start in range(0, 1 << 32, chunk))
  assert wrong == 0


def test_fp16_13_is_exact_in_the_normal_range():
  """Every float32 from 2**-14 to fp16's largest value, both signs (law 2)."""
  fmt = fmt_of("fp16+13", **NEAREST)
  first, last = 0x38800000, 0x477FEFFF  # 2**-14, and just below the tie to infinity
  chunk = 1 << 24

  @jax.jit
  def count(start):
    bits = jnp.minimum(start + jax.lax.iota(jnp.uint32, chunk), jnp.uint32(last))
    wrong = jnp.int32(0)
    for sign in (0, 1 << 31):
      signed = bits | jnp.uint32(sign)
      x = jax.lax.bitcast_convert_type(signed, jnp.float32)
      back = lowmem.merge(*lowmem.split(x, fmt), fmt)
      wrong += (jax.lax.bitcast_convert_type(back, jnp.uint32) != signed).sum()
    return wrong

  assert sum(int(count(jnp.uint32(s))) for s in range(first, last + 1, chunk)) == 0


@pytest.mark.parametrize("bits", range(17))
@pytest.mark.parametrize("short", ["bf16", "fp16"])
def test_nearest_error_bound(short, bits):
  """Law 2, in exact (float64) arithmetic."""
  fmt = fmt_of(f"{short}+{bits}", **NEAREST)
  x = FEW
  info = jnp.finfo(fmt.dtype)
  x = x[np.isfinite(x) & (np.abs(x) <= float(info.max))].astype(np.float64)
  back = np.asarray(merge(*split(x.astype(np.float32), fmt), fmt)).astype(np.float64)
  normal = np.abs(x) >= float(info.tiny)
  mantissa = 8 if short == "bf16" else 11
  assert (np.abs(back - x)[normal] <= np.abs(x)[normal] * 2.0 ** -(mantissa + bits)).all()
  step = float(info.smallest_subnormal) / 2**bits
  assert (np.abs(back - x)[~normal] <= step / 2).all()


@pytest.mark.parametrize("name", ["bf16+3", "bf16+8", "bf16+16", "fp16+5", "fp16+13", "fp16+16"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "truncate"])
def test_low_is_a_nearest_value_of_merge(name, rounding):
  """Law 3."""
  fmt = fmt_of(name, rounding=rounding)
  x = FEW[np.isfinite(FEW)]
  low, delta = split(x, fmt)
  value = np.asarray(merge(low, delta, fmt)).astype(np.float64)
  low_bits = bits_of(low)
  distance = np.abs(np.asarray(low).astype(np.float64) - value)
  for step in (-1, 1):
    magnitude = np.clip((low_bits & 0x7FFF).astype(int) + step, 0, fmt.grid.max_code)
    other = ((low_bits & 0x8000) | magnitude.astype(np.uint16)).astype(np.uint16)
    other = other.view(np.asarray(low).dtype).astype(np.float64)
    finite = np.isfinite(np.asarray(low).astype(np.float64))
    assert (distance <= np.abs(other - value))[finite].all()


def test_sign_of_zero():
  """Law 1: where low is zero the delta carries the sign."""
  x = np.array([-1e-45, 1e-45, -1e-41, 1e-41, -0.0, 0.0], np.float32)
  low, delta = lowmem.split(x, "bf16+16")
  assert list(bits_of(low)) == [0, 0, 0, 0, 0x8000, 0]
  assert list(np.asarray(delta)) == [-1, 1, -7136, 7136, 0, 0]
  flipped = jnp.where(delta == 0, low, -low)
  assert_trees_equal(lowmem.merge(flipped, delta, "bf16+16"), x)


@pytest.mark.parametrize("name", ["bf16+0", "bf16+8", "fp16+0", "fp16+8"])
def test_saturation(name):
  """Law 4: finite values saturate, infinities stay."""
  x = np.array([3.4028235e38, -3.4028235e38, np.inf, -np.inf], np.float32)
  low, delta = lowmem.split(x, name, key=0)
  value = np.asarray(lowmem.merge(low, delta, name))
  top = float(jnp.finfo(low.dtype).max)
  assert (np.abs(np.asarray(low, np.float32)[:2]) == top).all()
  chex.assert_tree_all_finite(value[:2])
  assert (np.abs(value[:2]) >= top).all()
  chex.assert_trees_all_equal(value[2:], x[2:])


@pytest.mark.parametrize(
  "shape",
  [(), (1,), (31,), (32,), (33,), (64,), (3, 5), (2, 3, 100), (0,), (4, 0), (129, 65), (200, 40)],
)
@pytest.mark.parametrize("bits", range(17))
@pytest.mark.parametrize("low_rounding", ["nearest", "stochastic"])
def test_storage(shape, bits, low_rounding):
  """Law 6: bits a value, rank and leading axes."""
  fmt = lowmem.DeltaFormat(jnp.bfloat16, bits, low_rounding=low_rounding)
  x = jax.random.normal(jax.random.key(0), shape)
  low, delta = lowmem.split(x, fmt, key=1)
  chex.assert_equal_shape([low, x])
  width = bits + (low_rounding != "nearest" and bits > 0)
  if width == 0:
    assert delta is None
    return
  assert delta.ndim == x.ndim and delta.shape[:-1] == x.shape[:-1]
  if width in (8, 16):
    assert delta.dtype == jnp.dtype(f"int{width}") and delta.shape == x.shape
  elif shape and shape[-1] >= 32:
    padded = -(-shape[-1] // 32) * 32
    assert delta.nbytes * 8 == x.size // shape[-1] * padded * width
  elif shape:
    assert delta.nbytes == x.size * -(-width // 8)
  else:
    assert delta.nbytes <= 4
  expected = lowmem.merge(low, delta, fmt)
  chex.assert_trees_all_equal(lowmem.merge(*lowmem.split(expected, fmt, key=9), fmt), expected)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_packing_is_a_bijection(data):
  """pack and unpack are inverse for any residuals of the format's range."""
  bits = data.draw(st.integers(1, 16))
  low_rounding = data.draw(st.sampled_from(["nearest", "stochastic"]))
  fmt = lowmem.DeltaFormat(jnp.bfloat16, bits, low_rounding=low_rounding)
  shape = data.draw(st.sampled_from([(), (1,), (7,), (32,), (70,), (3, 5), (2, 64), (2, 3, 33)]))
  seed = data.draw(st.integers(0, 2**31))
  half = 1 << (fmt.residual_bits - 1)
  delta = np.random.default_rng(seed).integers(-half, half, shape, dtype=np.int32)
  stored = packing.pack(jnp.asarray(delta), fmt)
  struct = packing.stored_struct(shape, fmt)
  chex.assert_trees_all_equal_shapes_and_dtypes(stored, struct)
  assert_trees_equal(packing.unpack(stored, shape, fmt), delta)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_stochastic_round_picks_a_neighbour(dtype, classes):
  """Law 4, against every value that the dtype has."""
  result = np.asarray(lowmem.stochastic_round(0, classes, dtype)).astype(np.float64)
  grid = finite_values(dtype)
  finite = np.isfinite(classes)
  x = np.clip(classes[finite].astype(np.float64), grid[0], grid[-1])
  below = grid[np.searchsorted(grid, x, side="right") - 1]
  above = grid[np.searchsorted(grid, x, side="left")]
  assert ((result[finite] == below) | (result[finite] == above)).all()
  assert np.isnan(result[np.isnan(classes)]).all()
  inf = np.isinf(classes)
  if dtype == jnp.float8_e4m3fn:
    assert np.isnan(result[inf]).all()
  else:
    chex.assert_trees_all_equal(result[inf], classes[inf])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("x", [1.0007, -3.14159, 1e-7, 2.0**-16 * 1.3, 0.0117, 57.123, 0.00390625])
def test_stochastic_round_is_right_on_average(dtype, x):
  """Law 4: the count of upward roundings is binomial (5 sigma: a false alarm in 1.7 million)."""
  n = 1 << 18
  x = np.float32(x)
  result = np.asarray(lowmem.stochastic_round(5, jnp.full(n, x), dtype)).astype(np.float64)
  values = np.unique(result)
  assert len(values) <= 2
  if len(values) == 1:
    grid = finite_values(dtype)
    spacing = np.diff(grid)[np.searchsorted(grid, float(x)) - 1]
    chance = abs(float(x) - values[0]) / spacing  # of the neighbour that was not seen
    assert chance * n < 25
    return
  chance = (float(x) - values[0]) / (values[1] - values[0])
  up = (result == values[1]).sum()
  sigma = np.sqrt(n * chance * (1 - chance))
  assert abs(up - n * chance) < 5 * sigma + n * 2.0**-16


@pytest.mark.parametrize("name", ["bf16+4", "bf16+8", "fp16+4", "fp16+8"])
@pytest.mark.parametrize("low_rounding", ["nearest", "stochastic"])
def test_split_is_right_on_average(name, low_rounding):
  """E[merge] = x; and E[low] = merge where low is stochastic, too (5 sigma)."""
  fmt = fmt_of(name, low_rounding=low_rounding)
  n = 1 << 18
  x = np.float32(0.0234567)
  low, delta = split(jnp.full(n, x), fmt)
  value = np.asarray(merge(low, delta, fmt)).astype(np.float64)
  assert abs(value.mean() - float(x)) < 5 * value.std() / np.sqrt(n) + 1e-12
  if low_rounding == "stochastic":
    low = np.asarray(low).astype(np.float64)
    assert len(np.unique(low)) == 2
    assert abs(low.mean() - float(x)) < 5 * low.std() / np.sqrt(n)


def test_under_transformations():
  """jit, vmap, scan and eval_shape; the same bits inside and outside jit."""
  x = jax.random.normal(jax.random.key(0), (4, 64))
  f = lambda x: lowmem.split(x, "bf16+5", key=2)
  eager = f(x)
  assert_trees_equal(jax.jit(f)(x), eager)
  scanned = jax.lax.scan(lambda c, row: (c, f(row)), 0, x)[1]
  assert_trees_equal(jax.vmap(f)(x), scanned)
  chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(f, x), eager)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda x: lowmem.split(x, "bf16+17", key=0), ValueError, "bf16+17"),
        (lambda x: lowmem.split(x, "bf8+1", key=0), ValueError, "accepted"),
        (lambda x: lowmem.split(x, 8, key=0), TypeError, "DeltaFormat"),
        (lambda x: lowmem.split(x, "bf16+8"), ValueError, "key"),
        (lambda x: lowmem.split(x.astype(jnp.bfloat16), "bf16+8", key=0), TypeError, "float32"),
        (lambda x: lowmem.split(np.ones(3), "bf16+8", key=0), TypeError, "float64"),
    (lambda x: lowmem.split(x, "bf16+8", key=0.5), TypeError, "key"),
        (lambda x: lowmem.split(x, "bf16+8", key=0, implementation="triton"), ValueError, "triton"),
        (lambda x: lowmem.split(x, "bf16+8", key=0, implementation="mosaic_gpu"), ValueError, "Hopper"),
        (lambda x: lowmem.split(x, "bf16+5", key=0, implementation="mosaic_gpu"), ValueError, "5 bits"),
        (lambda x: lowmem.merge(x.astype(jnp.bfloat16), None, "bf16+8"), ValueError, "residual"),
        (lambda x: lowmem.merge(x.astype(jnp.float16), None, "bf16+0"), TypeError, "bfloat16"),
        (lambda x: lowmem.stochastic_round(0, x, jnp.int8), ValueError, "int8"),
        (lambda x: lowmem.DeltaFormat(jnp.bfloat16, 17), ValueError, "extra_bits"),
        (lambda x: lowmem.DeltaFormat(jnp.bfloat16, -1), ValueError, "extra_bits"),
        (lambda x: lowmem.DeltaFormat(jnp.bfloat16, 8, "up"), ValueError, "rounding"),
        (lambda x: lowmem.DeltaFormat(jnp.float64, 8), ValueError, "float64"),
        (lambda x: lowmem.DeltaFormat(jnp.float32, 8), ValueError, "float32"),
    ],
)  # fmt: skip
def test_bad_input(call, error, words):
  with pytest.raises(error, match=words.replace("+", r"\+")):
    call(jnp.ones(64))


def test_format_strings():
  fmt = lowmem.DeltaFormat.parse("bf16+8")
  assert fmt == lowmem.DeltaFormat() and fmt.name == "bf16+8" and fmt.bits_per_param == 24
  assert lowmem.DeltaFormat(jnp.float16, 4, low_rounding="stochastic").bits_per_param == 21
  assert lowmem.DeltaFormat.parse("fp32").bits_per_param == 32
  x = jnp.ones(3)
  assert lowmem.split(x, "fp32")[0] is x and lowmem.split(x, "fp32")[1] is None
