"""The random stream in the ways it is used: law 7, and statistics with stated confidence.

Each statistic is compared with a two-sided bound of 6 sigma (a false alarm in
500 million) or a chi-square p-value above 1e-6; seeds are fixed.
"""

from conftest import assert_trees_equal, mesh_of
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from pallas_kernels.formats import random_bits as rb

N = 1 << 18


def stream(use: str) -> np.ndarray:
  words = rb.key_words(7)
  if use == "elements":
    return np.asarray(rb.random_bits(rb.stream_keys(words)[0], (N,)))
  if use == "high elements":  # past 2**32 elements of a leaf
    k = rb.stream_keys(words)[0]
    return np.asarray(rb.element_bits((k[0], k[1]), jnp.arange(N, dtype=jnp.uint32), jnp.uint32(3)))
  if use == "lanes":  # the bits for a weight and its statistics, one after the other
    k = rb.stream_keys(words)[0]
    return np.stack([rb.random_bits(k, (N // 4,), lane) for lane in range(4)], 1).reshape(-1)
  if use == "statistics":  # 16 bits each
    k = rb.stream_keys(words)[0]
    each = [rb.statistic_bits(lambda lane: rb.random_bits(k, (N,), lane), i) for i in (0, 1)]
    return np.asarray(each[0]) & np.uint32(0xFFFF0000) | np.asarray(each[1]) >> np.uint32(16)
  n = jnp.arange(N // 4)
  few = jnp.arange(4, dtype=jnp.uint32)
  if use == "steps":
    keys = jax.vmap(lambda s: rb.stream_keys(words, s)[0])(n)
  elif use == "leaves":
    keys = rb.stream_keys(words, 0, [(i, 0) for i in range(N // 4)])
  else:
    keys = jax.vmap(lambda s: rb.stream_keys(rb.key_words(s))[0])(n)
  return np.asarray(jax.vmap(lambda k: rb.element_bits((k[0], k[1]), few))(keys)).reshape(-1)


USES = ["elements", "high elements", "lanes", "statistics", "steps", "leaves", "seeds"]


@pytest.mark.parametrize("use", USES)
def test_bits_are_balanced_and_uncorrelated(use):
  bits = (stream(use)[:, None] >> np.arange(32, dtype=np.uint32)) & 1
  signs = 2.0 * bits - 1
  sigma = 1 / np.sqrt(N)
  assert (np.abs(signs.mean(0)) < 6 * sigma).all()  # each bit
  pairs = signs.T @ signs / N - np.eye(32)
  assert (np.abs(pairs) < 6 * sigma).all()  # each pair of bits of a word
  for lag in (1, 2, 3, 4, 5, 8, 32, 128, 1024, 4096):  # each pair of bits across words
    assert (np.abs(signs[:-lag].T @ signs[lag:] / N) < 6 / np.sqrt(N - lag)).all()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_bytes_and_pairs_of_bytes_are_uniform(use, shift):
  byte = (stream(use) >> np.uint32(shift)) & 0xFF
  assert scipy.stats.chisquare(np.bincount(byte, minlength=256)).pvalue > 1e-6
  pair = (byte[:-1:2].astype(int) >> 2) * 64 + (byte[1::2] >> 2)
  assert scipy.stats.chisquare(np.bincount(pair, minlength=4096)).pvalue > 1e-6


@pytest.mark.parametrize("use", USES)
def test_runs_and_gaps(use):
  """Kolmogorov-Smirnov on the words, and on the gaps between small ones."""
  u = stream(use) / 2.0**32
  assert scipy.stats.kstest(u, "uniform").pvalue > 1e-6
  gaps = np.diff(np.flatnonzero(u < 1 / 16))
  counts = np.bincount(np.minimum(gaps, 64), minlength=65)[1:]
  p = 15.0 / 16
  chance = np.array([p ** (g - 1) / 16 for g in range(1, 64)] + [p**63])
  assert scipy.stats.chisquare(counts, chance * counts.sum()).pvalue > 1e-6


@pytest.mark.parametrize("use", USES)
def test_matrix_rank(use):
  """Ranks of 32 x 32 bit matrices (over GF(2)): linear generators fail this."""
  words = stream(use).reshape(-1, 32)
  rows = words.copy()
  rank = np.zeros(len(rows), int)
  for bit in range(32):
    has = (rows >> np.uint32(bit)) & 1 == 1
    found = has.any(1)
    pivot = has.argmax(1)
    row = rows[np.arange(len(rows)), pivot]
    reduced = np.where(has, rows ^ row[:, None], rows)
    reduced[np.arange(len(rows)), pivot] = 0
    rows = np.where(found[:, None], reduced, rows)
    rank += found
  counts = [(rank <= 30).sum(), (rank == 31).sum(), (rank == 32).sum()]
  expected = np.array([0.1335734, 0.5775762, 0.2888504])
  assert scipy.stats.chisquare(counts, expected * len(rank) / expected.sum()).pvalue > 1e-6


def test_streams_of_leaves_do_not_overlap_as_permutations():
  """Two leaves' words are no exclusive-or permutation of each other."""
  keys = rb.stream_keys(rb.key_words(0), 0, [rb.leaf_id("a"), rb.leaf_id("b")])
  a, b = (np.asarray(rb.random_bits(k, (1 << 16,))) for k in keys)
  assert len(np.intersect1d(a, b)) < 20  # chance: 1 expected


def test_element_index_is_the_row_major_place():
  shape = (3, 4, 5)
  low, high = rb.element_index(shape)
  assert (np.asarray(low).reshape(-1) == np.arange(60)).all() and high == 0


@pytest.mark.parametrize("shape", [(1 << 17, 1 << 17), (5, 1 << 31, 3), ((1 << 32) - 1, 7)])
def test_places_in_huge_arrays(shape):
  """64-bit places, in arrays that nobody could allocate."""
  rng = np.random.default_rng(0)
  corners = np.stack([rng.integers(0, n, 1000) for n in shape] + [])
  corners = np.concatenate([corners, np.array([[0, n - 1] for n in shape])], axis=1)
  low, high = rb.place([jnp.asarray(c.astype(np.uint32)) for c in corners], shape)
  expected = np.ravel_multi_index(tuple(corners), shape)
  assert ((np.asarray(high).astype(np.int64) << 32) + np.asarray(low) == expected).all()
  assert jax.eval_shape(lambda: rb.element_index(shape))[1].shape == shape


def test_same_bits_inside_and_outside_jit_and_sharded():
  """Law 7: on 1 device and on 8."""
  key = rb.stream_keys(rb.key_words(1))[0]
  plain = rb.random_bits(key, (16, 24))
  for spec in (("data",), (None, "data")):
    sharding = jax.sharding.NamedSharding(mesh_of(8), jax.sharding.PartitionSpec(*spec))
    sharded = jax.jit(lambda k: rb.random_bits(k, (16, 24)), out_shardings=sharding)(key)
    assert_trees_equal(sharded, plain)


@pytest.mark.parametrize("key", [0, np.int64(5), jax.random.PRNGKey(0)], ids=repr)
def test_keys(key):
  assert rb.key_words(key).shape == (2,)


def test_key_kinds_agree():
  typed = jax.random.key(11, impl="threefry2x32")
  assert_trees_equal(rb.key_words(11), rb.key_words(typed))
  assert_trees_equal(rb.key_words(typed), rb.key_words(jax.random.key_data(typed)))
  assert rb.key_words(jax.random.key(0, impl="rbg")).shape == (2,)
  assert_trees_equal(jax.jit(rb.key_words)(11), rb.key_words(11))


@pytest.mark.parametrize("key", [True, 1.5, np.zeros(3, np.uint32), np.zeros(2, np.float32), None])
def test_bad_keys(key):
  with pytest.raises(TypeError, match="key"):
    rb.key_words(key)
