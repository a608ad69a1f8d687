"""Storage of optimizer statistics: rounding, blocks, range, and law 13."""

import chex
from conftest import assert_trees_equal
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from optax_lowmem.transforms.quantize_state import _load
from pallas_kernels.formats import state_formats
from pallas_kernels.formats.random_bits import random_bits
from pallas_kernels.formats.state_formats import BLOCK, NAMES, StateFormat

FORMATS = [StateFormat(name, is_square) for name in NAMES for is_square in (False, True)]
SCALED = [fmt for fmt in FORMATS if fmt.has_scale]
SHAPES = [
  (),
  (0,),
  (3, 0),
  (0, 5),
  (0, 64),
  (1,),
  (31,),
  (32,),
  (33,),
  (5, 7),
  (2, 3, 64),
  (4, 100),
]


def ids(fmt):
  return f"{fmt.name}{'-square' * fmt.is_square}"


def draw(seed, shape):
  return random_bits(jnp.array([seed, 7], jnp.uint32), shape)


def store_and_load(x, fmt, seed=0):
  return state_formats.dequantize(state_formats.quantize(x, fmt, draw(seed, x.shape)), fmt)


def sample(shape, fmt, seed=0):
  x = jax.random.normal(jax.random.key(seed), shape)
  return x * x if fmt.is_square else x


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(fmt, shape):
  """The state keeps the rank; what is stored is what `stored_struct` says."""
  x = sample(shape, fmt)
  stored = state_formats.quantize(x, fmt, draw(0, shape))
  chex.assert_trees_all_equal_shapes_and_dtypes(stored, state_formats.stored_struct(shape, fmt))
  y = state_formats.dequantize(stored, fmt)
  chex.assert_shape(y, shape)
  chex.assert_type(y, jnp.float32)
  tolerance = {"fp32": 0, "bf16": 2**-7, "fp16": 2**-9, "int8": 0.05, "int4": 0.1}[fmt.name]
  top = np.max(np.abs(x), initial=0)
  np.testing.assert_allclose(np.sqrt(np.abs(y)), np.sqrt(np.abs(x)), atol=3 * tolerance * top + 0)


@pytest.mark.parametrize("fmt", SCALED, ids=ids)
def test_blocks_do_not_depend_on_what_stands_around(fmt):
  """Any split of the leading axes, and of the last in whole blocks, stores the same."""
  x, bits = sample((6, 128), fmt), draw(3, (6, 128))
  whole = state_formats.quantize(x, fmt, bits)
  part = state_formats.quantize(x[2:5, 32:96], fmt, bits[2:5, 32:96])
  assert_trees_equal(part.codes, whole.codes[2:5, fmt.in_block : 3 * fmt.in_block])
  assert_trees_equal(part.scale, whole.scale[2:5, 1:3])


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_rounding_is_unbiased(fmt):
  """The mean of what is stored (of its root, for scaled squares) is the value: within 5 SE."""
  n = 4096
  x = jnp.tile(sample((1, BLOCK), fmt, seed=5) * 0.37, (n, 1))
  if fmt.is_square and fmt.is_packed:  # a root below the smallest code becomes that code
    x = jnp.maximum(x, jnp.max(x) / 28**2)
  y = store_and_load(x, fmt)
  if fmt.is_square and fmt.has_scale:
    x, y = jnp.sqrt(x), jnp.sqrt(y)
  error = np.asarray(y - x, np.float64)
  # 2**-17 of a step may be missing, the probability's resolution.
  slack = 2.0**-17 * np.max(np.abs(error), axis=0) + 1e-6 * np.abs(np.asarray(x[0]))
  assert np.all(np.abs(error.mean(0)) <= 5 * error.std(0) / np.sqrt(n) + slack)
  if fmt.name != "fp32":
    assert error.std() > 0  # it does round


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_stored_values_stay(fmt):
  """A value on the grid is stored again, but for float32's own error at a level."""
  x = sample((512, BLOCK), fmt).at[:, 0].set(64.0)  # a scale that bfloat16 holds
  x = store_and_load(x, fmt)
  again = store_and_load(x, fmt, seed=1)
  assert np.mean(np.isclose(again, x, rtol=1e-5, atol=0)) > 0.999


@pytest.mark.parametrize("fmt", SCALED, ids=ids)
def test_zeros_and_signs(fmt):
  x = sample((64, BLOCK), fmt).at[:, ::3].set(0.0).at[5].set(0.0)
  y = store_and_load(x, fmt)
  assert np.all(np.asarray(y)[np.asarray(x) == 0] == 0)
  assert np.all(np.sign(y) * np.sign(x) >= 0)


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_a_square_is_never_rounded_to_zero(fmt):
  """In log-normal blocks whose spread is far beyond the format's."""
  if not fmt.is_square:
    pytest.skip("for second moments")
  root = jnp.exp(4 * jax.random.normal(jax.random.key(0), (1000, BLOCK))) * 1e-6
  y = store_and_load(root**2, fmt)
  assert np.all(np.asarray(y) > 0)


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
@pytest.mark.parametrize("size", [1e-15, 1e-9, 1.0, 1e9, 1e15])
def test_range(fmt, size):
  """Statistics of gradients from 1e-15 to 1e15 are as exact as those of 1."""
  x = jnp.abs(sample((64, BLOCK), StateFormat(fmt.name))) + 0.1
  factor = np.float32(size) ** 2 * np.float32(1e-3) if fmt.is_square else np.float32(size)
  y = store_and_load(x * factor, fmt)
  rtol, atol = {"int8": (0.5, 0), "int4": (0, 0.3 * np.max(x))}.get(fmt.name, (0.02, 0))
  np.testing.assert_allclose(np.asarray(y) / factor, x, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name, rtol", [("int8", 0.05), ("int4", 0.4)])
def test_extreme_blocks(name, rtol):
  """The largest float32 values, subnormals, and all magnitudes at once: finite, in order."""
  fmt = StateFormat(name)
  for top in (3.4028235e38, 3.39e38, 1e-37, 1e-42, 1.4e-45):
    x = jnp.full((1, BLOCK), top, jnp.float32).at[0, 1:].multiply(0.5)
    y = store_and_load(x, fmt)
    chex.assert_tree_all_finite(y)
    if top > 1e-37:
      np.testing.assert_allclose(y, x, rtol=rtol)


@pytest.mark.parametrize("fmt", SCALED, ids=ids)
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_non_finite_values_are_seen(fmt, bad):
  """A block with an infinity or a NaN does not come back finite; other blocks do."""
  x = sample((4, BLOCK), fmt).at[2, 7].set(bad)
  y = np.asarray(store_and_load(x, fmt))
  assert not np.isfinite(y[2, 7])
  chex.assert_tree_all_finite(y[[0, 1, 3]])


@pytest.mark.parametrize("is_square", [False, True])
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33])
def test_packing(n, is_square):
  """Every code comes back; neighbours share a byte, the first in its lower half."""
  fmt = StateFormat("int4", is_square)
  codes = jnp.arange(2 * n).reshape(2, n) % (2 * fmt.levels + 1 - fmt.levels * is_square)
  codes = (codes - (0 if is_square else fmt.levels)).astype(fmt.dtype)
  stored = state_formats.pack(codes, fmt)
  assert stored.dtype == (jnp.int8 if n % 2 else jnp.uint8)  # it alone tells n from n + 1
  assert_trees_equal(state_formats.unpack(stored, fmt), codes)
  byte, c = np.asarray(stored).view(np.uint8), np.asarray(codes).view(np.uint8) & 0xF
  np.testing.assert_array_equal(byte & 0xF, c[:, ::2])
  np.testing.assert_array_equal((byte >> 4)[:, : n // 2], c[:, 1::2])
  assert n % 2 == 0 or np.all(byte[:, -1] >> 4 == 0)


@pytest.mark.parametrize("fmt", SCALED, ids=ids)
@pytest.mark.parametrize("shape", [(), (3, 0), (31,), (5, 33), (4, 100)], ids=str)
def test_a_second_read_and_zeros(fmt, shape):
  """`read_again` changes nothing; `zeros_like` has what `quantize` stores of zeros."""
  x = sample(shape, fmt)
  stored = state_formats.quantize(x, fmt, draw(0, shape))
  assert_trees_equal(state_formats.read_again(stored, stored.scale, fmt), stored)
  zeros = state_formats.quantize(jnp.zeros(shape), fmt, draw(0, shape))
  assert_trees_equal(state_formats.zeros_like(x, fmt), zeros)


@pytest.mark.parametrize(
  "name, found", [("int2", "int2"), (jnp.int8, 'Write "int8"'), (jnp.dtype("int4"), 'Write "int4"')]
)
def test_bad_format(name, found):
  with pytest.raises(ValueError, match=found):
    StateFormat(name)


@pytest.mark.parametrize(
  "weights, mu, nu, wanted",
  [
    ("bf16+0", "int8", "int4", 3.625),
    ("bf16+8", "int8", "int4", 4.625),
    ("bf16+0", "int4", "int4", 3.125),
  ],
)
def test_bytes_of_int4(weights, mu, nu, wanted):
  """What `memory_table` counts."""
  tx = lowmem.adamw(1e-3, weights=weights, mu=mu, nu=nu)
  tree = lowmem.init(tx, {"w": jnp.ones((128, 128))})
  assert lowmem.memory_table(*tree).bytes_per_param["total"] == pytest.approx(wanted, abs=0.005)


# Law 13. Half of every block rests after `warm` steps, over 1,024 blocks.


@pytest.mark.parametrize(
  "name, warm, size, steps, part, rtol",
  [
    ("int8", 500, 1.0, 20_000, 64, 0.1),
    pytest.param("int4", 500, 1.0, 8_000, 8, 0.15, marks=pytest.mark.thorough),
    pytest.param("int4", 2000, 1e15, 8_000, 8, 0.15, marks=pytest.mark.thorough),
    pytest.param("fp16", 100, 1e-9, 20_000, 64, 0.1, marks=pytest.mark.thorough),
  ],
)
def test_idle_weights(name, warm, size, steps, part, rtol):
  """Law 13: averages that get no more gradients follow the exact ones; weights stand still."""
  shape = (1024, BLOCK)
  resting = jnp.arange(BLOCK) % 2 == 0
  exact_tx = optax.scale_by_adam(eps=0.0)
  tx = lowmem.scale_by_adam(eps=0.0, mu=name, nu=name)

  def body(carry, t):
    state, exact, moved, moved_exactly = carry
    g = jax.random.normal(jax.random.fold_in(jax.random.key(warm), t), shape) * size
    g = jnp.where(resting & (t >= warm), 0.0, g)
    u, state = tx.update(g, state)
    u_exact, exact = exact_tx.update(g, exact)
    moved += jnp.where(t >= warm, u, 0)
    moved_exactly += jnp.where(t >= warm, u_exact, 0)
    stored = _load(state.inner_state, state.formats)

    def sums(x):
      x = jnp.abs(x)
      return jnp.mean(x[:, ::2]), jnp.mean(jnp.max(x, axis=1))

    found = (*sums(stored.mu), *sums(jnp.sqrt(stored.nu)))
    wanted = (*sums(exact.mu), *sums(jnp.sqrt(exact.nu)))
    lost = jnp.sum((stored.nu == 0) & (stored.mu != 0))
    return (state, exact, moved, moved_exactly), (found, wanted, lost)

  zeros = jnp.zeros(shape)
  carry = (tx.init(zeros), exact_tx.init(zeros), zeros, zeros)
  run = jax.jit(lambda c: jax.lax.scan(body, c, jnp.arange(warm + steps)))
  (_, _, moved, exactly), (found, wanted, lost) = run(carry)
  assert int(jnp.sum(lost)) == 0
  for i in (0, 2):  # mean |mu|, mean sqrt(nu)
    mean, top = np.asarray(wanted[i])[warm:], np.asarray(wanted[i + 1])[warm:]
    near = mean >= top / part
    assert near.sum() >= 10
    np.testing.assert_allclose(np.asarray(found[i])[warm:][near], mean[near], rtol=rtol)
  if name == "int4":  # it goes on falling: here, to twice the smallest root of a block
    assert found[2][-1] < 2 * found[3][-1] / 29
    return
  moved, exactly = np.asarray(moved)[:, ::2], np.asarray(exactly)[:, ::2]
  assert np.all(np.abs(moved - exactly) <= 0.1 * np.abs(exactly) + 1.0)
