"""fused_update: kernel, chunks and plain XLA agree; what is skipped stays; what runs where."""

import functools
import math

from conftest import assert_trees_equal, paired, running_kernels, thinned
import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
import pallas_kernels
from pallas_kernels.formats import state_formats
from pallas_kernels.formats.random_bits import key_words, random_bits, stream_keys
from pallas_kernels.formats.state_formats import Blocks, StateFormat
from pallas_kernels.operations.fused_update import fused_update_leaves, hoisted_rule
from pallas_kernels.placement.by_device import by_device
from pallas_kernels.programs import cpu, mosaic_gpu, tiles
from pallas_kernels.programs import leaf as leaf_module
from pallas_kernels.programs.hoist import hoist
from pallas_kernels.programs.leaf import Leaf
from pallas_kernels.programs.xla import step_in_stack, step_leaf

HAS_STORE = hasattr(plgpu, "store")
INT8 = (StateFormat("int8"), StateFormat("int8", is_square=True))
STATISTICS = {
  "int8": INT8,
  "bf16": (StateFormat("bf16"), StateFormat("bf16", is_square=True)),
  "fp16": (StateFormat("fp16"), StateFormat("fp16", is_square=True)),
  "mixed": (StateFormat("bf16"), StateFormat("int8", is_square=True)),
}
INT4 = (StateFormat("int4"), StateFormat("int4", is_square=True))
PACKED = {"int4": INT4, "int8-int4": (StateFormat("int8"), StateFormat("int4", is_square=True))}


def adam(g, w, values):
  m, v = values
  m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * (g * g)
  return -1e-2 * (m / (jnp.sqrt(v) + 1e-8) + 0.01 * w), [m, v]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def make_leaf(shape, fmt="bf16+8", statistic_formats=INT8, seed=0, dtype=None) -> Leaf:
  fmt = lowmem.DeltaFormat.parse(fmt)
  keys = jax.random.split(jax.random.key(seed), 4)
  w, g, m, v = (jax.random.normal(key, shape) for key in keys)
  low, delta = pallas_kernels.split(0.02 * w, fmt, key=seed)
  stream = stream_keys(key_words(seed))[0]
  bits = random_bits(stream, shape, 3)
  stored = [
    state_formats.quantize(x, f, bits)
    for x, f in zip((0.1 * m, v * v), statistic_formats, strict=True)
  ]
  return Leaf(g.astype(dtype or fmt.dtype), low, delta, stored, stream)


def step(
  leaves, implementation, fmt="bf16+8", statistic_formats=INT8, when=None, rule=adam, index=None
):
  fmt = lowmem.DeltaFormat.parse(fmt)
  call = functools.partial(
    fused_update_leaves, rule, leaves, fmt, statistic_formats, when, implementation, index
  )
  if implementation != "mosaic_gpu":
    return call()
  with running_kernels():
    return call()


def plain(leaf: Leaf, fmt="bf16+8", statistic_formats=INT8, when=None):
  """The program of a sharded array or an old GPU."""
  formats = lowmem.DeltaFormat.parse(fmt), statistic_formats
  return jax.jit(functools.partial(step_leaf, bound(adam, formats, leaf), formats, False))(
    leaf, when
  )


def bound(rule, formats, leaf: Leaf):
  """The rule as plain XLA calls it."""
  shape = leaf.gradient.shape or (1,)
  rest = hoisted_rule(rule, len(formats[1]), shape)
  return leaf_module.bound({shape: rest}, rest.scalars())


def assert_close(found, wanted, leaf, fmt="bf16+8"):
  """Section 5: float32 within some ulp before it is stored, so that a code may differ by one."""
  fmt = lowmem.DeltaFormat.parse(fmt)
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert x.shape == y.shape and x.dtype == y.dtype
  a, b = (np.asarray(pallas_kernels.merge(*t[:2], fmt), np.float64) for t in (found, wanted))
  # A step of the fine grid, or 8 ulp of float32.
  mantissa = {jnp.bfloat16: 7, jnp.float16: 10}[fmt.dtype.type] + fmt.extra_bits
  size = np.maximum(np.maximum(np.abs(a), np.abs(b)), 2.0**-14)
  assert np.all(np.abs(a - b) <= 2.0 ** (1 - min(mantissa, 20)) * size + 1e-8)
  if a.size > 500 and mantissa < 20:
    assert np.mean(a != b) < (0.01 if mantissa < 18 else 0.03)
  for x, y in zip(found[2], wanted[2], strict=True):
    if not isinstance(x, Blocks):
      x, y = (np.asarray(t).view(np.int16).astype(int) for t in (x, y))
      assert np.all(np.abs(x - y) <= 1) and np.sum(x != y) <= 0.01 * x.size + 1
      continue
    ratio = np.asarray(x.scale, np.float32) / np.asarray(y.scale, np.float32)
    assert np.all((np.abs(ratio - 1) < 2**-7) | (np.asarray(y.scale) == 0))
    assert np.sum(ratio != 1) <= 0.01 * ratio.size + 1
    if x.codes.dtype == jnp.float16:
      np.testing.assert_allclose(np.float32(x.codes), np.float32(y.codes), atol=2**-9)
    else:
      x, y = (np.asarray(t.codes, int) for t in (x, y))
      if x.size < a.size:  # two codes a byte; a signed one may go from 0 to -1, 15
        x, y = (np.stack([t & 15, (t >> 4) & 15]) for t in (x, y))
        difference = np.abs((x - y + 8) % 16 - 8)
      else:
        difference = np.abs(x - y)
      assert np.all(difference <= 1) and np.sum(difference) <= 0.01 * x.size + 1


SHAPES = [(32, 64), (64,), (96,), (992,), (2, 3, 5, 32), (37,), (5, 40), (), (0, 32), (4, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_any_shape(shape):
  leaf = make_leaf(shape)
  assert_close(step([leaf], "mosaic_gpu")[0], plain(leaf), leaf)


@pytest.mark.skipif(not HAS_STORE, reason="JAX 0.11.2 stores whole tiles alone")
@pytest.mark.parametrize(
  "shape", thinned([(65, 1001), (33, 1000), (2, 32, 545)], (65, 1001)), ids=str
)
def test_kernel_of_a_large_ragged_leaf(shape, monkeypatch):
  """Tiles of 32 x 32 in place, and what they leave in another kernel; a skipped step."""
  monkeypatch.setattr(mosaic_gpu, "is_small", lambda shape: False)
  leaf = make_leaf(shape)
  assert tiles.takes_rectangle(math.prod(shape[:-1]), shape[-1])
  assert_close(step([leaf], "mosaic_gpu")[0], plain(leaf), leaf)
  assert_trees_equal(step([leaf], "mosaic_gpu", when=jnp.array(False))[0], leaf[1:4])


@pytest.mark.parametrize(
  "statistics, fmt", paired(STATISTICS, ["bf16+8", "bf16+0", "bf16+16", "fp16+8"])
)
def test_kernel_any_format(statistics, fmt):
  formats = STATISTICS[statistics]
  leaf = make_leaf((3, 11, 32), fmt, formats)
  assert_close(step([leaf], "mosaic_gpu", fmt, formats)[0], plain(leaf, fmt, formats), leaf, fmt)


@pytest.mark.skipif(not HAS_STORE, reason="needs JAX 0.12")
@pytest.mark.parametrize(
  ("fmt", "statistics"),
  [
    ("bf16+0", "int4"),
    ("bf16+8", "int8-int4"),
    ("bf16+16", "int4"),
    pytest.param("fp16+8", "int8-int4", marks=pytest.mark.thorough),
  ],
)
def test_kernel_of_packed_codes(fmt, statistics):
  """In pairs of values, tiles of 32 and of 8 blocks; a skipped step; a stack."""
  formats = PACKED[statistics]
  leaf = make_leaf((3, 13, 32), fmt, formats)
  wanted = plain(leaf, fmt, formats)
  assert_close(step([leaf], "mosaic_gpu", fmt, formats)[0], wanted, leaf, fmt)
  kept = step([leaf], "mosaic_gpu", fmt, formats, when=jnp.array(False))[0]
  assert_trees_equal(kept, leaf[1:4])
  one = leaf._replace(gradient=leaf.gradient[1])
  found = step([one], "mosaic_gpu", fmt, formats, index=jnp.int32(1))[0]
  at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
  assert_trees_equal(at(found, 0), at(leaf[1:4], 0))
  assert_close(at(found, 1), at(wanted, 1), one, fmt)


@pytest.mark.skipif(not HAS_STORE, reason="needs JAX 0.12")
@pytest.mark.parametrize(
  "shapes", [[(37,), (5, 40), ()], [(13, 33)], [(64,), (96,), (40, 32)]], ids=str
)
def test_kernel_of_packed_codes_joined(shapes):
  leaves = [make_leaf(shape, statistic_formats=INT4, seed=i) for i, shape in enumerate(shapes)]
  for leaf, found in zip(leaves, step(leaves, "mosaic_gpu", statistic_formats=INT4), strict=True):
    assert_close(found, plain(leaf, statistic_formats=INT4), leaf)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_kernel_any_gradient(dtype):
  leaf = make_leaf((32, 32), dtype=dtype)
  assert_close(step([leaf], "mosaic_gpu")[0], plain(leaf), leaf)


@pytest.mark.parametrize(
  "statistics, fmt",
  paired([*STATISTICS, "int4"], ["bf16+8", "bf16+0", "bf16+16", "fp16+8"]),
)
def test_chunks(statistics, fmt, monkeypatch):
  """On a CPU: several chunks and a shorter last one, in a loop; plain XLA's bits."""
  monkeypatch.setattr(cpu, "CHUNK", 5)
  formats = (STATISTICS | {"int4": INT4})[statistics]
  leaf = make_leaf((13, 64), fmt, formats)
  assert cpu.chunk_rows(26, 1) == [5, 1]
  assert_trees_equal(step([leaf], None, fmt, formats)[0], plain(leaf, fmt, formats))
  assert_trees_equal(step([leaf], "xla", fmt, formats)[0], plain(leaf, fmt, formats))


@pytest.mark.parametrize(
  "shape, fmt", [((13, 1), "bf16+8"), ((13, 56), "bf16+7"), ((13, 50), "bf16+8")]
)
def test_chunks_of_short_rows(shape, fmt, monkeypatch):
  """A row may be as long as its scales are (1), or its packed residual (56 bytes at 7 bits)."""
  monkeypatch.setattr(cpu, "CHUNK", 5)
  leaf = make_leaf(shape, fmt)
  assert_trees_equal(step([leaf], None, fmt)[0], plain(leaf, fmt))


@pytest.mark.parametrize(
  "n, fmt", [(1, "bf16+0"), (16, "bf16+0"), (33, "bf16+8"), (50, "bf16+0"), (64, "bf16+4")]
)
def test_chunks_of_packed_codes(n, fmt, monkeypatch):
  """Rows that end within a byte or a block; or are as long as packed codes are (16)."""
  monkeypatch.setattr(cpu, "CHUNK", 5)
  leaf = make_leaf((13, n), fmt, INT4)
  assert_trees_equal(step([leaf], None, fmt, INT4)[0], plain(leaf, fmt, INT4))


@pytest.mark.parametrize("index", [None, 1])
def test_packed_codes_joined(index):
  """Leaves whose rows end within a byte or a block, in one pool: what each gets alone."""
  shapes = [(2, 5, 33), (2, 3, 1), (2, 3, 64), (2, 7, 31), (2, 4, 2)] + [()] * (index is None)
  leaves = [make_leaf(shape, "bf16+8", INT4, seed=i) for i, shape in enumerate(shapes)]
  if index is not None:
    leaves = [x._replace(gradient=x.gradient[index]) for x in leaves]
  together = step(leaves, None, statistic_formats=INT4, index=index)
  alone = [step([x], "xla", statistic_formats=INT4, index=index)[0] for x in leaves]
  assert_trees_equal(together, alone)


def test_extreme_gradients():
  """Infinities, NaN, zeros and subnormals make a block what plain XLA makes of it."""
  leaf = make_leaf((64, 32), statistic_formats=INT8)
  g = np.array(leaf.gradient, np.float32)
  g[0, 3], g[1, 4], g[2], g[3, :5], g[4, 0] = np.inf, np.nan, 0, 1e-40, 3e38
  leaf = leaf._replace(gradient=jnp.asarray(g, jnp.bfloat16))
  wanted = plain(leaf)
  for found in (step([leaf], None)[0], step([leaf], "mosaic_gpu")[0]):
    for x, y, f in zip(found[2], wanted[2], INT8, strict=True):
      x, y = (np.asarray(state_formats.dequantize(t, f)) for t in (x, y))
      assert (np.isfinite(x) == np.isfinite(y)).all()
      assert not np.isfinite(x[:2]).any() and np.isfinite(x[2:4]).all()
    x, y = (np.asarray(t[0], np.float32) for t in (found, wanted))
    np.testing.assert_allclose(x[2:], y[2:], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("implementation", [None, "mosaic_gpu", "plain"])
@pytest.mark.parametrize("shapes", [[(32, 32)], [(64,), (3, 32)]], ids=str)
def test_when(implementation, shapes):
  """False: not a bit changes. True: as without it."""
  leaves = [make_leaf(shape, seed=i) for i, shape in enumerate(shapes)]

  def run(when):
    if implementation == "plain":
      return [plain(leaf, when=when) for leaf in leaves]
    return step(leaves, implementation, when=when)

  assert_trees_equal(run(jnp.array(False)), [leaf[1:4] for leaf in leaves])
  assert_trees_equal(run(jnp.array(True)), run(None))


@pytest.mark.skipif(not HAS_STORE, reason="JAX 0.11.2 stores whole tiles alone")
def test_a_group_is_its_leaves():
  """Leaves of all tile sizes in one kernel: each gets what it gets alone, bit for bit."""
  shapes = [(64,), (96,), (40, 32), (1024,), (33, 64), (32,), (7, 32), (64,)]
  leaves = [make_leaf(shape, seed=i) for i, shape in enumerate(shapes)]
  together = step(leaves, "mosaic_gpu")
  alone = [step([leaf], "mosaic_gpu")[0] for leaf in leaves]
  assert_trees_equal(together, alone)


STACKS = [
  *((shape, "bf16+8") for shape in [(3, 4, 64), (3, 1, 32), (2, 37), (4, 96), (3, 0), (5, 33, 64)]),
  *(((2, 2, 3, 40), fmt) for fmt in ("bf16+3", "fp16+16")),
]


@pytest.mark.parametrize(
  "stack, implementation", paired(STACKS, ["mosaic_gpu", None, "plain"]), ids=str
)
def test_stacks(stack, implementation, monkeypatch):
  """One array of a stack after the other is the stack at once, bit for bit."""
  shape, fmt = stack
  monkeypatch.setattr(cpu, "CHUNK", 5)
  if fmt == "bf16+3" and implementation == "mosaic_gpu":
    pytest.skip("needs packing")
  leaf = make_leaf(shape, fmt)
  if implementation == "plain":
    wanted = plain(leaf, fmt)
    formats = lowmem.DeltaFormat.parse(fmt), INT8
    call = jax.jit(
      lambda leaf, i: step_in_stack(bound(adam, formats, leaf), formats, False, leaf, None, i)
    )
  else:
    (wanted,) = step([leaf], implementation, fmt)
    call = lambda leaf, i: step([leaf], implementation, fmt, index=i)[0]
  found = leaf
  for i in reversed(range(shape[0])):
    old, now = found[1:4], jnp.int32(i)
    found = leaf._replace(
      **dict(
        zip(
          ("low", "delta", "statistics"),
          call(found._replace(gradient=leaf.gradient[i]), now),
          strict=True,
        )
      )
    )
    others = lambda tree: jax.tree.map(lambda x: np.delete(np.asarray(x), i, 0), tree)
    assert_trees_equal(others(found[1:4]), others(old))
  assert_trees_equal(found[1:4], wanted)


def test_stacks_in_one_kernel():
  """Several stacks in a launch, one of them skipped by `when`; a rule without an update."""
  leaves = [make_leaf(shape, seed=i) for i, shape in enumerate([(3, 64, 32), (3, 32, 64)])]
  at = lambda leaf, i: leaf._replace(gradient=leaf.gradient[i])
  found = step([at(leaf, 1) for leaf in leaves], "mosaic_gpu", index=jnp.int32(1))
  alone = [step([at(leaf, 1)], "mosaic_gpu", index=jnp.int32(1))[0] for leaf in leaves]
  assert_trees_equal(found, alone)
  skipped = step(
    [at(leaf, 1) for leaf in leaves], "mosaic_gpu", when=jnp.array(False), index=jnp.int32(1)
  )
  assert_trees_equal(skipped, [leaf[1:4] for leaf in leaves])


@pytest.mark.parametrize("implementation", [None, "mosaic_gpu", "plain"])
def test_a_rule_without_an_update(implementation):
  """The statistics move as they would; the weight stays."""
  leaf = make_leaf((64, 32))
  rule = lambda *args: (None, adam(*args)[1])
  formats = lowmem.DeltaFormat.parse("bf16+8"), INT8
  run = lambda rule: (
    jax.jit(functools.partial(step_leaf, bound(rule, formats, leaf), formats, False))(leaf, None)
    if implementation == "plain" else step([leaf], implementation, rule=rule)[0]
  )  # fmt: skip
  assert_trees_equal(run(rule), (*leaf[1:3], run(adam)[2]))


def test_one_program_covers_each_block():
  least = tiles._ROWS[-1]
  for blocks in ([8], [32], [33, 9, 64], [95, 95, 15], [*range(9, 100)], [1_000 - 3]):
    if not HAS_STORE:
      blocks = [32 * n for n in blocks]
    programs = [np.zeros(n, int) for n in blocks]
    for group in tiles.groups(blocks):
      assert group.rows >= least
      for which, *starts in group.table:
        first, last = starts[0], starts[group.is_pair]
        assert 0 <= first <= last <= first + group.rows
        assert last + group.rows <= blocks[group.leaves[which]]
        programs[group.leaves[which]][first : last + group.rows] += 1
    assert all((x == 1).all() for x in programs)


def test_streams_are_the_composition_s():
  """fused_update rounds a weight as apply_update does with the same key."""
  leaf = make_leaf((5, 64))
  rule = lambda g, w, values: (2.0**-7 * g, values)  # exact, however it is contracted
  low, delta, _ = pallas_kernels.fused_update(rule, *leaf[:4], "bf16+8", INT8, key=3)
  update = 2.0**-7 * leaf.gradient.astype(jnp.float32)
  wanted = pallas_kernels.apply_update(leaf.low, leaf.delta, update, "bf16+8", key=3)
  assert_trees_equal((low, delta), wanted)


@pytest.mark.parametrize("size", [8, 32])
def test_hoist(size):
  """What Optax computes of scalars leaves the function, and the function stays what it was."""
  tx = optax.adamw(optax.linear_schedule(1e-2, 1e-3, 10), nesterov=True)
  state = tx.init(jnp.zeros((size, 32)))
  x = jnp.linspace(-1, 1, size * 32).reshape(size, 32)

  def call(count, x):
    def f(g, w, values):
      full = jax.tree.map(lambda leaf: leaf if leaf.shape else count, state)
      full = (full[0]._replace(mu=values[0], nu=values[1]), *full[1:])
      u, new = tx.update(g, full, w)
      return u, [new[0].mu, new[0].nu]

    struct = jax.ShapeDtypeStruct(x.shape, x.dtype)
    scalars, rest = hoist(f, (struct, struct, [struct, struct]))
    assert all(s.shape == () for s in scalars)
    text = str(jax.make_jaxpr(rest)(scalars, x, x, [x, x * x]))
    assert "pow" not in text.replace("integer_pow", "") and "jit" not in text
    assert text.count(" div ") == 1  # bias corrections are multiplications
    other = x.reshape(4, 8 * size)  # some shard's
    assert rest.takes_any_shape
    again = rest(scalars, other, other, [other, other * other])
    found = rest(scalars, x, x, [x, x * x])
    return f(x, x, [x, x * x]), found, jax.tree.map(lambda y: y.reshape(x.shape), again)

  wanted, found, again = jax.jit(call)(jnp.int32(3), x)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9), found, wanted)
  jax.tree.map(np.testing.assert_array_equal, again, found)


def test_hoisted_roots_of_statistics():
  """A rule divides the root of the statistic, which the storage shares, and not the statistic."""
  struct = jax.ShapeDtypeStruct((4, 32), jnp.float32)
  x = np.append(np.geomspace(1e-37, 1e34, 126), [0, np.inf]).astype(np.float32).reshape(4, 32)
  for divisor in (1e-3, 1 - 0.999, 1.0):
    f = lambda x, divisor=divisor: (x, jnp.sqrt(x / jnp.float32(divisor) + 0.0))
    scalars, rest = hoist(f, (struct,))
    # a is the scalar, b the statistic
    assert "= sqrt b" in str(jax.make_jaxpr(lambda x, rest=rest, s=scalars: rest(s, x))(x))
    statistic, root = rest(scalars, x)
    np.testing.assert_array_equal(statistic, x)
    wanted = np.sqrt(np.asarray(x, np.float64) / divisor)
    np.testing.assert_allclose(root, wanted, rtol=4 * 2.0**-23)
  shifted = hoist(lambda x: jnp.sqrt(x / jnp.float32(0.1) + 1e-3), (struct,))
  np.testing.assert_allclose(shifted[1](shifted[0], x), np.sqrt(x / np.float32(0.1) + 1e-3), 1e-6)
  with pytest.raises(ValueError, match="must be elementwise; this one uses 'iota'"):
    hoist(lambda x: x + jax.lax.broadcasted_iota(jnp.float32, x.shape, 1), (struct,))


def test_hoisted_functions_that_hold_others_keep_their_shape():
  struct = jax.ShapeDtypeStruct((4, 32), jnp.float32)
  assert hoist(lambda x: jnp.where(x > 0, 2 * x, jnp.zeros_like(x)), (struct,))[1].takes_any_shape
  held = lambda x: jax.lax.cond(jnp.array(True), lambda x: x + 1, lambda x: x, x)
  assert not hoist(held, (struct,))[1].takes_any_shape


PROGRAMS = {"any": lambda x: {"y": x + 1}, "cpu": lambda x: {"y": x + 2}}


def test_by_device():
  """One CPU: its program. Several devices, vmap: the one for any."""
  call = functools.partial(by_device, PROGRAMS)
  one = jnp.zeros(8)
  assert call(one)["y"][0] == 2 and jax.jit(call)(one)["y"][0] == 2
  scanned, _ = jax.lax.scan(lambda c, _: (call(c)["y"], None), one, length=3)
  assert scanned[0] == 6
  assert jax.vmap(call)(one.reshape(2, 4))["y"][0, 0] == 1
  assert jax.eval_shape(call, one)["y"].shape == (8,)
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  sharded = jax.jit(call)(jax.device_put(one, sharding))["y"]
  assert sharded[0] == 1 and sharded.sharding.is_equivalent_to(sharding, 1)
  mapped = jax.shard_map(
    lambda x: call(x)["y"], mesh=mesh, in_specs=jax.sharding.PartitionSpec("x"),
    out_specs=jax.sharding.PartitionSpec("x"),
  )  # fmt: skip
  assert jax.jit(mapped)(one)[0] == 1


def test_bad_input():
  leaf = make_leaf((4, 32))
  call = lambda *args, **kwargs: pallas_kernels.fused_update(adam, *args, key=0, **kwargs)
  args = (leaf.gradient, leaf.low, leaf.delta, leaf.statistics)
  with pytest.raises(ValueError, match=r"gradient.*\(4, 32\).*\(32,\)"):
    call(leaf.gradient[0], *args[1:], "bf16+8", INT8)
  with pytest.raises(TypeError, match="int32"):
    call(leaf.gradient.astype(jnp.int32), *args[1:], "bf16+8", INT8)
  with pytest.raises(TypeError, match="bfloat16"):
    call(leaf.gradient, leaf.low.astype(jnp.float16), *args[2:], "bf16+8", INT8)
  with pytest.raises(ValueError, match="residual"):
    call(leaf.gradient, leaf.low, None, leaf.statistics, "bf16+8", INT8)
  with pytest.raises(ValueError, match="2 statistics have 1 formats"):
    call(*args, "bf16+8", INT8[:1])
  with pytest.raises(ValueError, match="int8.*uint8"):
    call(*args[:3], leaf.statistics[::-1], "bf16+8", INT8)
  with pytest.raises(ValueError, match="triton"):
    call(*args, "bf16+8", INT8, implementation="triton")
  if jax.default_backend() == "cpu":
    with pytest.raises(ValueError, match="compute capability"):
      call(*args, "bf16+8", INT8, implementation="mosaic_gpu")
  with running_kernels():
    values = [jnp.zeros((4, 32)), jnp.zeros((4, 32))]
    fp32 = (StateFormat("fp32"), StateFormat("fp32"))
    with pytest.raises(ValueError, match='statistics in "bf16"'):
      call(*args[:3], values, "bf16+8", fp32, implementation="mosaic_gpu")
  with pytest.raises(ValueError, match=r"'int4' of shape \(4, 32\).*\(4, 16\).*uint8"):
    call(*args, "bf16+8", INT4)


def test_rules_close_over_scalars():
  """Of any dtype, traced or not; an array is refused."""
  leaf = make_leaf((32, 32))

  def run(implementation, flag, k):
    rule = lambda g, w, v: (jnp.where(flag, -g, g) / 8.0 * k.astype(jnp.float32), v)
    return step([leaf], implementation, rule=rule)[0]

  with running_kernels():
    found = jax.jit(functools.partial(run, "mosaic_gpu"))(jnp.array(True), jnp.int32(2))
  wanted = jax.jit(functools.partial(run, None))(jnp.array(True), jnp.int32(2))
  assert_close(found, wanted, leaf)
  assert not np.array_equal(np.asarray(found[0]), np.asarray(run(None, False, jnp.int32(2))[0]))
  row = jnp.arange(32.0)
  with pytest.raises(ValueError, match="array of shape"):
    step([leaf], None, rule=lambda g, w, v: (g * row, v))


def test_exported_for_another_platform():
  """No CPU's chunks in a program for CUDA, no kernel without a device to look at."""
  leaf = make_leaf((32, 32))
  call = jax.jit(lambda leaf: step([leaf], None))
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), leaf)
  text = jax.export.export(call, platforms=("cuda",))(args).mlir_module()
  assert "optimization_barrier" not in text and "mosaic" not in text
  assert "optimization_barrier" in jax.export.export(call, platforms=("cpu",))(args).mlir_module()
