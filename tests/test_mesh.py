"""On a mesh: the same bits as on one device, the parameters' shardings, no communication."""

import functools
import math
import os
import re
import sys

from conftest import assert_trees_equal, mesh_of, paired, running_kernels, thinned, updated
import h100
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem
from pallas_kernels.programs import mosaic_gpu, xla

by_device_module = sys.modules["pallas_kernels.placement.by_device"]

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
THOROUGH = pytest.mark.thorough
COLLECTIVE = re.compile(
  r"(\S+) (all-reduce|all-gather|collective-permute|all-to-all|reduce-scatter)(?:-start)?\("
)
# Shapes and how they are sharded over a mesh of the axes "data" and "model". In "even" ones no
# block of 32 is cut by a shard's edge.
EVEN = {
  "rows": ((16, 96), P("data")),
  "columns": ((8, 256), P(None, "model")),
  "both": ((16, 128), P("data", "model")),
  "middle": ((3, 8, 64), P(None, ("data", "model"), None)),
  "vector": ((512,), P("data")),
  "scalar": ((), P()),
  "empty": ((0, 32), P()),
  "everywhere": ((5, 70), P()),
}
CUT = {
  "cut": ((8, 96), P(None, ("data", "model"))),  # 12 of 96
  "cut_vector": ((40,), P("data")),
  "padded": ((8, 1000), P("data", "model")),
}


def parameters(table):
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=shape).astype(np.float32) for name, (shape, _) in table.items()}


def placed(tree, table, mesh):
  return {k: jax.device_put(x, NamedSharding(mesh, table[k][1])) for k, x in tree.items()}


def gradients(table, step: int):
  rng = np.random.default_rng(step + 1)
  return {
    name: (rng.normal(size=shape) * 0.1).astype(jnp.bfloat16) for name, (shape, _) in table.items()
  }


def trained(tx, table, mesh, how=lowmem.step, steps=2):
  """Weights and state after some steps, on the host; and the step's program."""
  params, opt_state = jax.jit(functools.partial(lowmem.init, tx))(
    placed(parameters(table), table, mesh)
  )
  step = jax.jit(functools.partial(how, tx))
  for i in range(steps):
    grads = placed(gradients(table, i), table, mesh)
    if i == 0:
      step = step.lower(grads, opt_state, params).compile()
    params, opt_state = step(grads, opt_state, params)
  return jax.device_get((params, opt_state)), collectives(step.as_text())


def collectives(text: str) -> list[tuple[str, str]]:
  """What a compiled program communicates: (type, operation)."""
  # Without its kernels, megabytes without a space, which a regular expression searches for minutes.
  lines = [line for line in text.splitlines() if "custom_call_target" not in line]
  return COLLECTIVE.findall("\n".join(lines))


@functools.cache
def on_one_device(name, table_name, how):
  table = {"even": EVEN, "all": EVEN | CUT}[table_name]
  return trained(OPTIMIZERS[name](), table, mesh_of(1), how)[0]


OPTIMIZERS = {
  "adamw": lambda: lowmem.adamw(1e-2, weight_decay=0.1),
  "adamw packed": lambda: lowmem.adamw(1e-2, weights="bf16+5", mu="bf16", nu="fp16"),
  "adamw int4": lambda: lowmem.adamw(1e-2, weights="bf16+0", mu="int4", nu="int4"),
  "lion exact": lambda: lowmem.lion(1e-2, weights="bf16+16"),
  "sgd stochastic": lambda: lowmem.sgd(0.1, 0.9, weights="bf16+0", accumulator="fp16"),
  "adam fp16": lambda: lowmem.adam(1e-2, weights="fp16+13"),
  "wrapped": lambda: lowmem.delta_bits(optax.adabelief(1e-2), "fp16+8"),
  "scaled": lambda: lowmem.dynamic_loss_scale(lowmem.adamw(1e-2), init_scale=8.0),
}


@pytest.mark.parametrize(
  ("name", "shape", "kind", "how"),
  [
    ("adamw", (4, 2), AUTO, lowmem.step),
    ("adamw", (4, 2), EXPLICIT, lowmem.step),
    pytest.param("adamw", (2, 2), EXPLICIT, updated, marks=THOROUGH),
    pytest.param("adamw packed", (2, 1), AUTO, lowmem.step, marks=THOROUGH),
    ("adamw int4", (4, 2), AUTO, updated),
    pytest.param("adamw int4", (4, 2), EXPLICIT, lowmem.step, marks=THOROUGH),
    pytest.param("adamw int4", (2, 2), EXPLICIT, updated, marks=THOROUGH),
    pytest.param("adamw packed", (4, 2), EXPLICIT, updated, marks=THOROUGH),
    pytest.param("lion exact", (8, 1), EXPLICIT, lowmem.step, marks=THOROUGH),
    pytest.param("sgd stochastic", (2, 2), AUTO, lowmem.step, marks=THOROUGH),
    pytest.param("adam fp16", (2, 4), EXPLICIT, lowmem.step, marks=THOROUGH),
    ("wrapped", (4, 2), AUTO, updated),
    pytest.param("scaled", (4, 2), EXPLICIT, lowmem.step, marks=THOROUGH),
  ],
)
def test_the_same_bits(name, shape, kind, how):
  table = EVEN | CUT
  result, _ = trained(OPTIMIZERS[name](), table, mesh_of(*shape, kind), how)
  assert_trees_equal(result, on_one_device(name, "all", how))


@pytest.mark.parametrize(
  "case, kind",
  paired(
    [("adamw", lowmem.step), ("adamw", updated), ("adamw packed", lowmem.step)], [AUTO, EXPLICIT]
  ),
)
def test_no_communication(case, kind):
  name, how = case
  _, found = trained(OPTIMIZERS[name](), EVEN, mesh_of(4, 2, kind), how, steps=1)
  assert not found


@pytest.mark.parametrize("kind", thinned([AUTO, EXPLICIT], AUTO))
def test_one_scalar_for_the_finite_check_and_one_for_a_norm(kind):
  """Of a norm, one for each set of axes that a leaf is sharded over, which is Optax's and XLA's."""
  tx = lowmem.dynamic_loss_scale(OPTIMIZERS["adamw"](), init_scale=8.0)
  for shape in ((4, 2), (4, 1)):
    _, found = trained(tx, EVEN, mesh_of(*shape, kind), steps=1)
    assert [operation for _, operation in found] == ["all-reduce"] and "pred[]" in found[0][0]
  clipped = optax.chain(optax.clip_by_global_norm(1.0), lowmem.adamw(1e-2))
  _, found = trained(clipped, EVEN, mesh_of(4, 2, kind), steps=1)
  assert {operation for _, operation in found} == {"all-reduce"}
  assert all(re.fullmatch(r"\(?(f32\[\](, )?)+\)?", shape) for shape, _ in found), found


@pytest.mark.thorough
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("name", ["adamw", "lion exact"])
def test_kernels_run_on_each_shard(name, shape):
  make = {"adamw": lowmem.adamw, "lion exact": functools.partial(lowmem.lion, weights="bf16+16")}
  table = {k: EVEN[k] for k in ("rows", "columns", "both", "middle", "vector")}

  def run(mesh):
    with running_kernels():
      return trained(make[name](1e-2, implementation="mosaic_gpu"), table, mesh, steps=1)

  reference = run(mesh_of(1))[0]
  result, found = run(mesh_of(*shape, EXPLICIT))
  assert_trees_equal(result, reference)
  assert not found


# Leaves of whole blocks, of which XLA may shard rows, columns or both, evenly or not.
BLOCKS = {k: EVEN[k] for k in ("rows", "columns", "both", "middle", "vector")} | {
  "cut": CUT["cut"],
  "cut_vector": ((96,), P("data")),
  "stack": ((8, 8, 64), P("data", None, "model")),
}


@pytest.fixture
def calls_on_shards(monkeypatch):
  """On a CPU, XLA's program in the place of the kernel, partitioned as only GPUs do; its calls."""
  kind_of, calls = by_device_module._kind, []

  def kind(devices, *args):
    return "mosaic_gpus" if len(devices) > 1 else kind_of(devices, *args)

  def xla_on_shards(rules, formats, lands, scalars, leaves, when, index, windows):
    calls.append((index, [leaf.low.shape for leaf in leaves]))
    return xla.step(rules, formats, lands, scalars, leaves, when, index, windows=windows)

  monkeypatch.setattr(by_device_module, "_kind", kind)
  monkeypatch.setattr(mosaic_gpu, "step", xla_on_shards)
  return calls


@pytest.mark.parametrize(
  ("name", "shape"), [("adamw", (4, 2)), pytest.param("sgd stochastic", (1, 2), marks=THOROUGH)]
)
def test_shards_of_a_partitioned_program(name, shape, calls_on_shards):
  """Only leaves whose blocks are cut are moved."""
  result, found = trained(OPTIMIZERS[name](), BLOCKS, mesh_of(*shape))
  assert found
  table = {k: BLOCKS[k] for k in BLOCKS if not k.startswith("cut")}
  _, found = trained(OPTIMIZERS[name](), table, mesh_of(*shape), steps=1)
  assert not found
  stepped = {shape for _, shapes in calls_on_shards for shape in shapes}
  rows, columns = shape
  assert stepped >= {(16 // rows, 128 // columns), (8 // rows, 8, 64 // columns)}
  calls_on_shards.clear()
  assert_trees_equal(result, trained(OPTIMIZERS[name](), BLOCKS, mesh_of(1))[0])
  assert not calls_on_shards


def test_statistics_may_be_cut_where_weights_are_not(calls_on_shards):
  """ZeRO: a device steps the part whose statistics it has."""
  mesh, tx = mesh_of(8), lowmem.adamw(1e-2)
  params32 = parameters({"w": ((16, 64), None)})
  grads = gradients({"w": ((16, 64), None)}, 0)
  params, opt_state = lowmem.init(tx, params32)
  expected = jax.jit(functools.partial(lowmem.step, tx))(grads, opt_state, params)
  cut, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
  place = lambda x: jax.device_put(x, cut if x.shape[:1] == (16,) else whole)
  args = jax.device_put(grads, whole), jax.tree.map(place, opt_state), jax.device_put(params, whole)
  step = jax.jit(functools.partial(lowmem.step, tx), out_shardings=jax.tree.map(
    lambda x: x.sharding, args[:0:-1]
  ))  # fmt: skip
  assert_trees_equal(jax.device_get(step(*args)), jax.device_get(expected))
  assert all(shapes == [(2, 64)] for _, shapes in calls_on_shards) and calls_on_shards


@pytest.mark.parametrize(
  ("name", "under_jit", "kind"),
  [
    pytest.param("adamw packed", False, AUTO, marks=THOROUGH),
    pytest.param("adamw packed", False, EXPLICIT, marks=THOROUGH),
    ("adamw", True, AUTO),
    ("adamw", True, EXPLICIT),
    ("adamw int4", True, AUTO),
    ("adamw int4", True, EXPLICIT),
    ("wrapped", True, AUTO),
  ],
)
def test_state_is_sharded_like_its_parameter(name, under_jit, kind):
  mesh, tx = mesh_of(4, 2, kind), OPTIMIZERS[name]()
  init = functools.partial(lowmem.init, tx)
  params = placed(parameters(EVEN), EVEN, mesh)
  tree = (jax.jit(init) if under_jit else init)(params)
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    if len(names) != 1 or names[0] not in EVEN or not x.size:
      continue
    wanted = NamedSharding(mesh, EVEN[names[0]][1])
    if x.shape[-1:] == (3,) or x.ndim != len(EVEN[names[0]][0]):
      continue
    assert x.sharding.is_equivalent_to(wanted, x.ndim), (path, x.shape, x.sharding)


def test_half_precision_parameters_give_sharded_residuals():
  mesh = mesh_of(4, 2)
  params = placed(parameters(EVEN), EVEN, mesh)
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  for init in (lowmem.adamw(1e-2, weights="bf16+5").init, lowmem.adamw(1e-2).init):
    for residual, name in ((init(params).residuals[k], k) for k in ("rows", "columns", "both")):
      wanted = NamedSharding(mesh, EVEN[name][1])
      assert residual.sharding.is_equivalent_to(wanted, residual.ndim)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_gradient_release(kind):
  """Sharded layers, a sharded batch: the state that value_and_grad and step give there."""
  tx, mesh = lowmem.adamw(1e-2, weight_decay=0.1), mesh_of(4, 2, kind)
  rng = np.random.default_rng(0)
  table = {"up": (None, P(None, "data", None)), "out": (None, P("data", None))}
  params32 = {"up": rng.normal(size=(3, 64, 64)) / 8, "out": rng.normal(size=(64, 32)) / 8}
  params32 = {k: x.astype(np.float32) for k, x in params32.items()}
  x = jax.device_put(rng.normal(size=(8, 64)).astype(jnp.bfloat16), NamedSharding(mesh, P()))
  matmul = functools.partial(jnp.einsum, "bi,ij->bj")
  if kind == EXPLICIT:
    matmul = functools.partial(matmul, out_sharding=P())
  block = lambda w, x: jnp.tanh(matmul(x, w))

  def loss_fn(layers, x):
    x = layers["up"].scan(block, x)
    return jnp.mean(layers["out"](block, x).astype(jnp.float32) ** 2)

  def plain(params, x):
    for i in range(3):
      x = block(params["up"][i], x)
    return jnp.mean(block(params["out"], x).astype(jnp.float32) ** 2)

  with jax.set_mesh(mesh):
    params, opt_state = lowmem.init(tx, placed(params32, table, mesh))
    _, released_params, released = jax.jit(lowmem.fused_backward(loss_fn, tx))(params, opt_state, x)

    @jax.jit
    def step(params, opt_state, x):
      return lowmem.step(tx, jax.grad(plain)(params, x), opt_state, params)

    expected = step(params, opt_state, x)
  if kind == EXPLICIT:
    assert_trees_equal(jax.device_get((released_params, released)), jax.device_get(expected))
  else:  # XLA may add the parts of a product in another order, and Adam divides by small gradients
    masters = lowmem.master_params(released_params, released), lowmem.master_params(*expected)
    for x, y in zip(*map(jax.tree.leaves, masters), strict=True):
      assert np.mean(np.abs(np.asarray(x) - np.asarray(y))) < 1e-4  # a step is about 1e-2
      assert x.sharding == y.sharding


def eight_gpus(kind, target):
  """A mesh of eight GPUs to compile for."""
  devices = h100.devices("1x1x8", target)
  if devices is None and not os.environ.get("REQUIRE_H100"):
    pytest.skip("the h100 extra is not installed")
  return jax.sharding.Mesh(np.array(devices), ("data",), axis_types=(kind,))


H100_TABLE = {
  "down": ((4, 2048, 1024), P(None, None, "data")),
  "norm": ((1024,), P("data")),
}


def compiled_for_h100s(tx, kind, target="h100"):
  mesh = eight_gpus(kind, target)

  def struct(path, x):
    names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    spec = H100_TABLE[names[0]][1] if len(names) == 1 and names[0] in H100_TABLE else P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  params32 = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, (shape, _) in H100_TABLE.items()}
  params, opt_state = jax.eval_shape(lambda p: lowmem.init(tx, p), params32)
  grads, opt_state, params = jax.tree_util.tree_map_with_path(struct, (params, opt_state, params))
  step = jax.jit(lambda g, p, s: lowmem.step(tx, g, s, p), donate_argnums=(1, 2))
  return step.trace(grads, params, opt_state).lower().compile()


@pytest.mark.h100
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_eight_h100s(kind):
  """The optimizer communicates nothing; each device runs the kernel."""
  program = compiled_for_h100s(lowmem.adamw(1e-3, weight_decay=0.1), kind)
  text, memory = program.as_text(), program.memory_analysis()
  assert not collectives(text)
  values = sum(math.prod(shape) for shape, _ in H100_TABLE.values()) // 8
  assert memory.argument_size_in_bytes < 7.14 * values
  assert text.count('custom_call_target="mosaic_gpu') == 2
  assert memory.temp_size_in_bytes < 16384  # of joined leaves: copies


@pytest.mark.h100
def test_eight_h100s_check_with_one_scalar():
  tx = lowmem.dynamic_loss_scale(lowmem.adamw(1e-3, implementation="mosaic_gpu"))
  program = compiled_for_h100s(tx, AUTO)
  text = program.as_text()
  assert [operation for _, operation in collectives(text)] == ["all-reduce"]
  assert text.count('custom_call_target="mosaic_gpu') == 2
  assert program.memory_analysis().temp_size_in_bytes < 1 << 20


@pytest.mark.h100
@pytest.mark.parametrize(("kind", "kernels"), [(AUTO, 2), (EXPLICIT, 1)])
def test_replicated_weights_on_eight_h100s(kind, kernels, monkeypatch):
  """On Explicit axes XLA's program steps them."""
  monkeypatch.setitem(H100_TABLE, "norm", ((64, 1024), P()))
  with jax.set_mesh(eight_gpus(kind, "h100")):
    text = compiled_for_h100s(lowmem.adamw(1e-3), kind).as_text()
  assert not collectives(text) and text.count('custom_call_target="mosaic_gpu') == kernels


@pytest.mark.h100
def test_gpus_before_hopper():
  """XLA's program; the kernel by name is refused."""
  assert "mosaic_gpu" not in compiled_for_h100s(lowmem.adamw(1e-3), AUTO, "a100").as_text()
  with pytest.raises(ValueError, match="from Hopper on"):
    compiled_for_h100s(lowmem.adamw(1e-3, implementation="mosaic_gpu"), AUTO, "a100")
