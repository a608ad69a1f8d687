"""The step as a Pallas TPU kernel, under JAX's TPU interpreter: XLA's bits, in every format."""

import functools
import itertools

from conftest import assert_trees_equal, paired, thinned
import jax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest
from test_fused_update import INT8, PACKED, STATISTICS, adam, make_leaf
from test_not_finite import lion

import optax_lowmem as lowmem
import pallas_kernels
from pallas_kernels.formats.state_formats import StateFormat
from pallas_kernels.operations.fused_update import fused_update_leaves, hoisted_rule
from pallas_kernels.placement import by_device as by_device_module
from pallas_kernels.programs import mosaic_tpu

pytestmark = pytest.mark.skipif(
  not hasattr(pltpu, "force_tpu_interpret_mode"), reason="needs a newer JAX"
)


@pytest.fixture(autouse=True)
def small_leaves_too(monkeypatch):
  monkeypatch.setattr(mosaic_tpu, "is_small", lambda shape: False)


def step(leaf, implementation, fmt="bf16+8", formats=INT8, when=None, rule=adam, **kwargs):
  fmt = lowmem.DeltaFormat.parse(fmt)

  @jax.jit
  def run(leaf, when):
    (new,) = fused_update_leaves(rule, [leaf], fmt, formats, when, implementation, **kwargs)
    return new

  if implementation == "xla":
    return run(leaf, when)
  with pltpu.force_tpu_interpret_mode():
    return run(leaf, when)


@pytest.mark.parametrize(
  "shape",
  # Rows that are no multiple of a tile's; one tile and several, along either axis; three axes.
  [(32, 128), (40, 256), (33, 384), (1, 128), (64, 4096), (34, 4224), (2, 3, 5, 128)],
  ids=str,
)
def test_shapes(shape):
  leaf = make_leaf(shape)
  assert mosaic_tpu.takes(shape, shape, True)
  assert_trees_equal(step(leaf, "mosaic_tpu"), step(leaf, "xla"))


@pytest.mark.parametrize(
  "fmt, name", paired(["bf16+8", "bf16+16", "bf16+0", "fp16+8", "fp16+0"], STATISTICS)
)
def test_formats(fmt, name):
  leaf = make_leaf((32, 256), fmt, STATISTICS[name])
  results = (step(leaf, how, fmt, STATISTICS[name]) for how in ("mosaic_tpu", "xla"))
  assert_trees_equal(*results)


@pytest.mark.parametrize(
  "shape, name", paired([(33, 512), (2, 3, 5, 256), (8, 4352)], PACKED), ids=str
)
def test_packed_codes(shape, name):
  """A register of bytes is two of codes; one tile and several."""
  fmt, formats = "bf16+0", PACKED[name]
  leaf = make_leaf(shape, fmt, formats)
  assert mosaic_tpu.takes(shape, shape, True, True)
  assert not mosaic_tpu.takes((8, 384), (8, 384), True, True)
  results = (step(leaf, how, fmt, formats) for how in ("mosaic_tpu", "xla"))
  assert_trees_equal(*results)


def test_float32_statistics_and_gradients():
  formats = StateFormat("fp32"), StateFormat("fp32")
  leaf = make_leaf((32, 256), statistic_formats=formats, dtype=jnp.float32)
  results = (step(leaf, how, formats=formats) for how in ("mosaic_tpu", "xla"))
  assert_trees_equal(*results)


@pytest.mark.parametrize("when", [True, False])
def test_skipped(when):
  leaf = make_leaf((40, 256))
  found = step(leaf, "mosaic_tpu", when=jnp.array(when))
  assert_trees_equal(found, step(leaf, "xla") if when else tuple(leaf[1:4]))


@pytest.mark.parametrize("when", [None, False])
@pytest.mark.parametrize("layer", [0, 2])
def test_one_layer_of_a_stack(layer, when):
  shape = (2, 32, 256)
  stack = make_leaf((3, *shape))
  leaf = stack._replace(gradient=stack.gradient[layer])
  when = None if when is None else jnp.array(when)
  found, wanted = (step(leaf, x, when=when, index=jnp.int32(layer)) for x in ("mosaic_tpu", "xla"))
  assert_trees_equal(found, wanted)
  for i in range(3):
    same = jax.tree.map(lambda x, y: np.array_equal(x[i], y[i]), tuple(found), tuple(leaf[1:4]))
    assert all(jax.tree.leaves(same)) == (i != layer or when is not None)


def test_weights_that_land():
  leaf = make_leaf((40, 256))
  assert_trees_equal(*(step(leaf, how, lands=True) for how in ("mosaic_tpu", "xla")))


def test_a_stream_of_the_statistics():
  leaf = make_leaf((32, 256))
  leaf = leaf._replace(stream=jnp.array([1, 2, 3, 4], jnp.uint32))
  assert_trees_equal(*(step(leaf, how) for how in ("mosaic_tpu", "xla")))


@pytest.mark.parametrize("rule", [adam, lion], ids=["adam", "lion"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite_stays_in_its_block(rule, value):
  formats = INT8 if rule is adam else INT8[:1]
  leaf = make_leaf((32, 256), statistic_formats=INT8)
  leaf = leaf._replace(
    gradient=leaf.gradient.at[5, 70].set(value), statistics=leaf.statistics[: len(formats)]
  )
  found, wanted = (step(leaf, how, formats=formats, rule=rule) for how in ("mosaic_tpu", "xla"))
  assert_trees_equal(found, wanted)
  bad = ~np.isfinite(np.asarray(found[2][0].scale, np.float32))
  assert bad[5, 2] and bad.sum() == 1


SPECS = [*itertools.product((None, "x"), (None, "y"), (False, True))]


@pytest.mark.parametrize("spec", thinned(SPECS, SPECS[3], SPECS[4], SPECS[7]))
def test_shards(spec):
  """On a mesh with Explicit axes: the bits of the whole array."""
  *spec, is_stacked = spec
  if spec == [None, None]:
    pytest.skip("not sharded")
  leaf = make_leaf((3, 64, 512) if is_stacked else (64, 512))
  index = jnp.int32(1) if is_stacked else None
  leaf = leaf._replace(gradient=leaf.gradient[1] if is_stacked else leaf.gradient)
  wanted = step(leaf, "xla", index=index)
  mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
  with jax.set_mesh(mesh):
    put = lambda x, *front: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*front, *spec)))
    stacked = (None,) if is_stacked else ()
    old = jax.tree.map(lambda x: put(x, *stacked), leaf[1:4])
    everywhere = jax.device_put(leaf.stream, NamedSharding(mesh, PartitionSpec()))
    found = step(type(leaf)(put(leaf.gradient), *old, everywhere), "mosaic_tpu", index=index)
  assert_trees_equal(jax.device_get(found), jax.device_get(wanted))


@pytest.mark.parametrize("fmt", ["bf16+8", "bf16+16", "fp16+8", "bf16+0"])
def test_apply_update(fmt):
  leaf = make_leaf((40, 256), fmt)
  update = 1e-3 * leaf.gradient.astype(jnp.float32)
  call = functools.partial(pallas_kernels.apply_update, leaf.low, leaf.delta, update, fmt, key=3)
  with pltpu.force_tpu_interpret_mode():
    found = call(implementation="mosaic_tpu")
  assert_trees_equal(found, call(implementation="xla"))


def test_what_is_refused():
  leaf = make_leaf((32, 256))
  with pytest.raises(ValueError, match="mosaic_tpu.*TPU"):
    fused_update_leaves(adam, [leaf], lowmem.DeltaFormat.parse("bf16+8"), INT8, None, "mosaic_tpu")
  leaf = make_leaf((32, 256), "bf16+4")
  with pytest.raises(ValueError, match="mosaic_tpu.*0, 8 or 16"):
    step(leaf, "mosaic_tpu", "bf16+4")
  with pytest.raises(ValueError, match="mosaic_gpu.*mosaic_tpu"):
    lowmem.adamw(1e-3, implementation="tpu")
  for implementation in ("mosaic_tpu",):
    with pytest.raises(ValueError, match="fused_update"):
      lowmem.merge(leaf.low, leaf.delta, "bf16+4", implementation=implementation)


def test_what_goes_by_xla():
  assert not mosaic_tpu.takes((4096, 100), (4096, 100), True)
  assert not mosaic_tpu.takes((4096,), (4096,), True)
  leaf = make_leaf((37, 5))
  assert_trees_equal(step(leaf, "mosaic_tpu"), step(leaf, "xla"))


def test_optimizer():
  """`lowmem.step` by name, under the interpreter, takes the kernel; bits as by XLA."""
  params = {"w": jax.random.normal(jax.random.key(0), (32, 256)), "b": jnp.zeros(7)}
  grads = jax.tree.map(lambda x: jnp.ones_like(x, jnp.bfloat16), params)
  results = []
  for implementation in ("xla", "mosaic_tpu"):
    tx = lowmem.adamw(1e-2, implementation=implementation)
    half, state = lowmem.init(tx, params)
    with pltpu.force_tpu_interpret_mode():
      results.append(jax.jit(functools.partial(lowmem.step, tx))(grads, state, half))
  assert_trees_equal(*results)


class Device:
  platform = "tpu"

  def __init__(self, device_kind):
    self.device_kind = device_kind


@pytest.mark.parametrize(
  "kind, wanted",
  [("TPU v5 lite", "mosaic_tpu"), ("TPU v5p", "mosaic_tpu"), ("TPU v6 lite", "mosaic_tpu"),
   ("TPU7x", "mosaic_tpu"), ("TPU v4", "tpu"), ("TPU v2", "tpu")],
)  # fmt: skip
def test_kind_of_device(kind, wanted):
  assert by_device_module._kind([Device(kind)], ("tpu",)) == wanted
  assert by_device_module._kind([Device(kind)] * 4, ("tpu",)) == wanted + "s"


def test_traffic():
  """The kernel reads and writes each operand once: 12.25 bytes a value for AdamW."""
  leaf, formats = make_leaf((64, 8192)), (lowmem.DeltaFormat.parse("bf16+8"), INT8)
  rest = hoisted_rule(adam, 2, leaf.gradient.shape)
  step = functools.partial(mosaic_tpu.step, {leaf.gradient.shape: rest}, formats, False)
  jaxpr = jax.make_jaxpr(lambda leaf: step(rest.scalars(), [leaf], None, None))(leaf)
  (call,) = equations(jaxpr.jaxpr, "pallas_call")
  moved = [x.aval for x in (*call.invars, *call.outvars) if x.aval.ndim == 3]
  assert sum(x.size * x.dtype.itemsize for x in moved) == 12.25 * leaf.gradient.size
  mapping = call.params["grid_mapping"]
  for block in mapping.block_mappings:
    if len(block.block_shape) == 3:  # no block is visited twice: an axis of the grid for each
      index_map = block.index_map_jaxpr.jaxpr
      assert [*map(str, index_map.outvars)] == [*map(str, index_map.invars[:3])]


def equations(jaxpr, name: str):
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == name:
      yield eqn
    for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from equations(inner, name)
