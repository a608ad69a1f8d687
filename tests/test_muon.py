"""lowmem.muon against optax.contrib.muon, and its laws."""

import functools
import itertools

import chex
from conftest import thinned, updated
import flax
from flax import nnx
import hypothesis
from hypothesis import strategies
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers
import pytest
from test_mesh import collectives

import optax_lowmem as lowmem
from optax_lowmem.states import DeltaBitsState

FP32 = {"mu": "fp32", "adam_mu": "fp32", "adam_nu": "fp32"}
SHAPES = {
  "square": (48, 48),
  "tall": (96, 32),
  "wide": (32, 64),
  "ragged": (7, 45),
  "stack": (3, 32, 64),
  "experts": (2, 2, 32, 32),
  "bias": (32,),
  "scalar": (),
}

FEW = {name: SHAPES[name] for name in ("tall", "stack", "bias")}


def normal(shapes, seed=0, scale=0.1, dtype=jnp.float32):
  key = jax.random.key(seed)
  return {
    name: (scale * jax.random.normal(jax.random.fold_in(key, i), shape)).astype(dtype)
    for i, (name, shape) in enumerate(shapes.items())
  }


def stacks(params):
  """As `lowmem.muon` sees leaves by default."""
  return jax.tree.map(lambda x: MuonDimensionNumbers(-2, -1) if x.ndim > 1 else None, params)


def trained(tx, params, steps=3, by="step", dtype=jnp.float32, scale=1.0):
  """The float32 masters and the state after some steps."""
  params, state = lowmem.init(tx, params)

  train = jax.jit(functools.partial(lowmem.step if by == "step" else updated, tx))
  shapes = {name: x.shape for name, x in params.items()}
  for i in range(steps):
    params, state = train(normal(shapes, i + 1, scale, dtype), state, params)
  return lowmem.master_params(params, state), state


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"nesterov": False, "weight_decay": 0.1, "consistent_rms": 0.2},
    pytest.param({"preconditioning": "aol", "ns_steps": 4}, marks=pytest.mark.thorough),
    {"preconditioning": "schatten", "ns_coeffs": "dion", "adam_learning_rate": 1e-3},
    {"preconditioning": "spectral", "learning_rate": optax.linear_schedule(1e-2, 1e-3, 3)},
  ],
)
def test_follows_optax(options):
  options = {"learning_rate": 1e-2, **options}
  params = normal(FEW if "preconditioning" in options else SHAPES)
  with_stacks = {**options, "muon_weight_dimension_numbers": stacks}
  want, _ = trained(optax.contrib.muon(**with_stacks), params)
  for weights, by in (("fp32", "step"), ("bf16+16", "step"), ("bf16+16", "update")):
    got, _ = trained(lowmem.muon(**options, **FP32, weights=weights), params, by=by)
    chex.assert_trees_all_close(got, want, rtol=0, atol=2e-6)


def test_bfloat16_products_are_close():
  """An update's distance from Optax's, relative to the update, in bfloat16 with int8 momentum."""
  shapes = {name: SHAPES[name] for name in ("square", "tall", "wide", "stack")}
  params = normal(shapes)
  want, _ = trained(optax.contrib.muon(1e-2, muon_weight_dimension_numbers=stacks), params, steps=1)
  got, _ = trained(lowmem.muon(1e-2, weights="bf16+16"), params, steps=1)
  for name in shapes:
    moved, error = want[name] - params[name], got[name] - want[name]
    assert float(jnp.linalg.norm(error) / jnp.linalg.norm(moved)) < 0.1
    assert float(jnp.linalg.norm(moved)) > 0


def test_axes():
  """Attention kernels of Flax: several output axes, several reduction axes, a transposed matrix."""
  shapes = {"query": (24, 4, 8), "out": (4, 8, 24), "turned": (16, 24), "layers": (24, 3, 16)}
  numbers = {
    "query": MuonDimensionNumbers(0, (1, 2)),
    "out": MuonDimensionNumbers((0, 1), -1),
    "turned": MuonDimensionNumbers(1, 0),
    "layers": MuonDimensionNumbers(0, 2),
  }
  params = normal(shapes)
  options = {"muon_weight_dimension_numbers": numbers}
  want, _ = trained(optax.contrib.muon(1e-2, **options), params)
  got, _ = trained(lowmem.muon(1e-2, **options, **FP32, weights="bf16+16"), params)
  chex.assert_trees_all_close(got, want, rtol=0, atol=2e-6)


def test_a_stack_is_its_matrices():
  """The matrices of a stack do not see each other."""
  stack = normal({"w": (3, 32, 64)})["w"]
  options = {**FP32, "weights": "bf16+16"}
  together, _ = trained(lowmem.muon(1e-2, **options), {"w": stack}, steps=1)
  grads = normal({"w": (3, 32, 64)}, 1, 1.0)["w"]
  tx = lowmem.muon(1e-2, **options)
  for i in range(3):
    params, state = lowmem.init(tx, {"w": stack[i]})
    params, state = lowmem.step(tx, {"w": grads[i]}, state, params)
    chex.assert_trees_all_close(
      lowmem.master_params(params, state)["w"], together["w"][i], rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("weights, at_rest", [("bf16+8", 4.1), ("bf16+0", 3.1)])
def test_resident_bytes(weights, at_rest):
  shapes = {"w": (4, 128, 256), "v": (256, 128)}
  params, state = jax.eval_shape(
    functools.partial(lowmem.init, lowmem.muon(1e-2, weights=weights)),
    {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()},
  )
  assert lowmem.memory_table(params, state).bytes_per_param["total"] < at_rest


@pytest.mark.parametrize(
  "weights, mu",
  [
    ("bf16+8", "int8"),
    pytest.param("bf16+0", "bf16", marks=pytest.mark.thorough),
    pytest.param("fp16+13", "int8", marks=pytest.mark.thorough),
    ("bf16+5", "fp32"),
  ],
)
def test_update_lands(weights, mu):
  """Law 8: the updates reach the weights that the residuals belong to; the step's weights."""
  tx = lowmem.muon(1e-2, weights=weights, mu=mu)
  params, state = lowmem.init(tx, normal(FEW))
  grads = normal(FEW, 1, 1.0, jnp.float32)
  updates, updated = jax.jit(tx.update)(grads, state, params)
  landed = optax.apply_updates(params, updates)
  stepped, state = jax.jit(functools.partial(lowmem.step, tx))(grads, state, params)
  chex.assert_trees_all_equal_dtypes(landed, params)
  masters = lowmem.master_params(landed, updated), lowmem.master_params(stepped, state)
  if mu != "fp32":  # Otherwise Optax itself updates.
    chex.assert_trees_all_equal(landed, stepped)
  chex.assert_trees_all_close(*masters, rtol=0, atol=1e-3 if weights == "bf16+0" else 1e-4)


def test_float32_leaves_and_prefixes():
  """Leaves in fp32 keep Optax's own behaviour, statistics included."""
  params = normal(SHAPES)
  by_name = lambda path, x: "fp32" if path[0].key in ("wide", "bias") else "bf16+16"
  got, state = trained(lowmem.muon(1e-2, weights=by_name), params)
  want, _ = trained(optax.contrib.muon(1e-2, muon_weight_dimension_numbers=stacks), params)
  chex.assert_trees_all_close(
    {"wide": got["wide"], "bias": got["bias"]},
    {"wide": want["wide"], "bias": want["bias"]},
    rtol=0,
    atol=2e-6,
  )
  mu = state.inner_states["muon"].inner_state.inner_state.inner_state[0].mu
  assert mu["wide"].dtype == jnp.float32
  prefix = {name: "fp32" if name == "wide" else "bf16+8" for name in SHAPES}
  low, _ = lowmem.init(lowmem.muon(1e-2, weights=prefix), params)
  assert low["wide"].dtype == jnp.float32 and low["tall"].dtype == jnp.bfloat16


def block(w, x):
  return x + jnp.tanh((x * w["scale"]) @ w["up"]) @ w["down"]


def released_loss(layers, x, y):
  x = layers["blocks"].scan(block, x)
  error = layers["head"](lambda w, x, y: x @ w - y, x, y)
  return jnp.mean(error.astype(jnp.float32) ** 2)


def kept_loss(params, x, y):
  x, _ = jax.lax.scan(lambda x, w: (block(w, x), None), x, params["blocks"])
  return jnp.mean((x @ params["head"] - y).astype(jnp.float32) ** 2)


NUMBERS = {
  "blocks": {"up": MuonDimensionNumbers(-2, -1), "down": MuonDimensionNumbers(-2, -1), "scale": None},
  "head": MuonDimensionNumbers(),
}  # fmt: skip


def model():
  key = jax.random.key(0)
  blocks = {"up": (3, 32, 64), "down": (3, 64, 32)}
  return {
    "blocks": normal(blocks) | {"scale": jnp.ones((3, 32))},
    "head": 0.1 * jax.random.normal(key, (32, 48)),
  }


def batch(dtype=jnp.bfloat16):
  keys = jax.random.split(jax.random.key(1))
  return jax.random.normal(keys[0], (16, 32), dtype), jax.random.normal(keys[1], (16, 48), dtype)


def released_and_kept(tx, start, losses, x_and_y, steps):
  """(parameters and state by released steps, by kept ones, the last loss)."""
  released_loss, kept_loss = losses
  released = jax.jit(lowmem.fused_backward(released_loss, tx))

  @jax.jit
  def kept(params, state, x, y):
    loss = lambda params: lowmem.scale_loss(kept_loss(params, x, y), state)
    return lowmem.step(tx, jax.grad(loss)(params), state, params)

  ours = theirs = start
  for _ in range(steps):
    loss, *ours = released(*ours, *x_and_y)
    theirs = kept(*theirs, *x_and_y)
  return tuple(ours), theirs, loss


@pytest.mark.parametrize("scaled, mu", [(False, "int8"), (True, "fp32")])
def test_released_is_the_step(scaled, mu):
  """Law 15, with a mask of weight decay."""
  mask = lambda params: jax.tree.map(lambda x: x.ndim == 3, params)
  tx = lowmem.muon(
    1e-2, weight_decay=0.1, weight_decay_mask=mask, muon_weight_dimension_numbers=NUMBERS, mu=mu
  )
  tx = lowmem.dynamic_loss_scale(tx) if scaled else tx
  losses = released_loss, kept_loss
  ours, theirs, loss = released_and_kept(tx, lowmem.init(tx, model()), losses, batch(), 3)
  chex.assert_trees_all_equal(ours, theirs)
  assert jnp.isfinite(loss)


def test_released_clips():
  """Law 16; the factor of the clipping is rounded elsewhere, so it is not the same bit for bit."""
  tx = lowmem.muon(1e-2, muon_weight_dimension_numbers=NUMBERS, weights="bf16+16", **FP32)
  params, state = lowmem.init(tx, jax.tree.map(lambda x: 10 * x, model()))
  x, y = batch()
  clip = optax.clip_by_global_norm(0.1)
  loss, *ours = jax.jit(lowmem.fused_backward(released_loss, tx, clip_norm=0.1))(
    params, state, x, y
  )
  grads = jax.jit(jax.grad(kept_loss))(params, x, y)
  grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
  assert optax.tree.norm(grads) > 1
  grads, _ = clip.update(grads, optax.EmptyState())
  theirs = lowmem.step(tx, grads, state, params)
  chex.assert_trees_all_close(
    lowmem.master_params(*ours), lowmem.master_params(*theirs), rtol=0, atol=2e-4
  )


def test_accumulates_into_the_momentum():
  """Exact for Muon's momentum, as for SGD's; refused with Nesterov's, which needs the whole."""
  options = {"muon_weight_dimension_numbers": NUMBERS, "weights": "bf16+16", **FP32}
  tx = lowmem.muon(1e-2, nesterov=False, **options)
  params, state = lowmem.init(tx, model())
  x, y = batch()
  step = jax.jit(lowmem.fused_backward(released_loss, tx, accumulate=2))
  _, after, state_after = step(params, state, x, y)
  halves = [jax.grad(kept_loss)(params, x[i : i + 8], y[i : i + 8]) for i in (0, 8)]
  mean = jax.tree.map(lambda a, b: (a.astype(jnp.float32) + b.astype(jnp.float32)) / 2, *halves)
  _, state_want = lowmem.step(tx, mean, state, params)
  momenta = [
    x.inner_states["muon"].inner_state.inner_state.inner_state[0].mu
    for x in (state_after, state_want)
  ]
  chex.assert_trees_all_close(*momenta, rtol=2e-2, atol=2e-5)
  # The products amplify the rounding of small singular values, so weights are not compared.
  assert not np.array_equal(after["head"], params["head"])
  with pytest.raises(ValueError, match="nesterov"):
    lowmem.fused_backward(released_loss, lowmem.muon(1e-2), accumulate=2)


def test_scanned_vectors_are_refused():
  tx = lowmem.muon(1e-2)  # takes the stacked scales for a matrix
  params, state = lowmem.init(tx, model())
  with pytest.raises(ValueError, match=r"\['blocks'\]\['scale'\].*muon_weight_dimension_numbers"):
    lowmem.fused_backward(released_loss, tx)(params, state, *batch())


@pytest.mark.parametrize(
  "make, match",
  [
    (lambda: lowmem.muon(1e-2, mu="int3"), "int3"),
    (lambda: lowmem.muon(1e-2, products="gathered"), "products.*gathered"),
    (lambda: lowmem.muon(1e-2, mu="int8", mu_dtype=jnp.bfloat16), "mu_dtype"),
    (lambda: lowmem.muon(1e-2, adam_mu="int8", mu_dtype=jnp.bfloat16), "adam_mu"),
    (lambda: lowmem.muon(1e-2, ns_coeffs="unknown"), "unknown"),
    (lambda: lowmem.muon(1e-2, implementation="cuda"), "cuda"),
    (lambda: _init(muon_weight_dimension_numbers=MuonDimensionNumbers()), r"params\['b'\]"),
    (lambda: _init(muon_weight_dimension_numbers={"w": MuonDimensionNumbers()}), r"params\['b'\]"),
    (lambda: _init(muon_weight_dimension_numbers={"w": (0, 1), "b": None}), r"params\['w'\]"),
    (
      lambda: _init(muon_weight_dimension_numbers={"w": MuonDimensionNumbers(0, 0), "b": None}),
      r"params\['w'\].*different axes",
    ),
    (
      lambda: _init(muon_weight_dimension_numbers={"w": MuonDimensionNumbers(0, 5), "b": None}),
      r"params\['w'\]",
    ),
    (lambda: _init(adaptive=True), r"params\['w'\].*stack"),
  ],
)
def test_bad_input(make, match):
  with pytest.raises((ValueError, TypeError), match=match):
    make()


def _init(**options):
  return lowmem.init(lowmem.muon(1e-2, **options), {"w": jnp.ones((2, 32, 32)), "b": jnp.ones(32)})


def test_zero_size_and_none_leaves():
  params = {
    "empty": jnp.ones((0, 32, 32)),
    "none": None,
    "w": jnp.ones((32, 0)),
    "x": jnp.ones((4, 8)),
  }
  tx = lowmem.muon(1e-2)
  low, state = lowmem.init(tx, params)
  low, state = lowmem.step(tx, jax.tree.map(jnp.ones_like, low), state, low)
  assert low["empty"].shape == (0, 32, 32) and low["none"] is None and low["w"].shape == (32, 0)


def test_loss_scale_skips():
  """Law 12: an infinite gradient leaves everything but the loss scale as it was."""
  tx = lowmem.dynamic_loss_scale(lowmem.muon(1e-2, weights="fp16+8"))
  params, state = lowmem.init(tx, normal(FEW))
  grads = normal(FEW, 1, 1.0, jnp.float16)
  params, state = lowmem.step(tx, grads, state, params)
  bad = dict(grads, tall=grads["tall"].at[0, 0].set(jnp.inf))
  after, skipped = jax.jit(functools.partial(lowmem.step, tx))(bad, state, params)
  chex.assert_trees_all_equal(after, params)
  chex.assert_trees_all_equal(skipped.inner_state, state.inner_state)
  assert lowmem.loss_scale(skipped) == lowmem.loss_scale(state) / 2
  good, _ = jax.jit(functools.partial(lowmem.step, tx))(grads, skipped, after)
  assert not np.array_equal(good["tall"], params["tall"])


@pytest.mark.parametrize(
  "wrap",
  [
    lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    lambda tx: optax.MultiSteps(tx, 2),
    lambda tx: optax.apply_if_finite(tx, 3),
    lambda tx: optax.masked(tx, {name: name != "bias" for name in FEW}),
  ],
)
def test_composes(wrap):
  tx = wrap(lowmem.muon(1e-2, update_dtype=jnp.float32))
  params, state = lowmem.init(tx, normal(FEW))
  for i in range(2):
    grads = normal(FEW, i + 1, 1.0)
    params, state = jax.jit(functools.partial(lowmem.step, tx))(grads, state, params)
  assert all(bool(jnp.all(jnp.isfinite(x.astype(jnp.float32)))) for x in params.values())
  assert not np.array_equal(params["tall"], lowmem.init(tx, normal(FEW))[0]["tall"])


def test_injected_hyperparameters():
  tx = optax.inject_hyperparams(lowmem.muon, hyperparam_dtype=jnp.float32)(learning_rate=1e-2)
  params, state = lowmem.init(tx, normal(FEW))
  step = jax.jit(functools.partial(lowmem.step, tx))
  state.hyperparams["learning_rate"] = jnp.float32(0.0)
  still, state = step(normal(FEW, 1, 1.0), state, params)
  chex.assert_trees_all_equal(still["tall"], params["tall"])
  state.hyperparams["learning_rate"] = jnp.float32(0.1)
  moved, _ = step(normal(FEW, 1, 1.0), state, still)
  assert not np.array_equal(moved["tall"], params["tall"])


def test_resumes():
  """Law 14."""
  tx = lowmem.muon(1e-2)
  params, state = lowmem.init(tx, normal(FEW))
  step = jax.jit(functools.partial(lowmem.step, tx))
  params, state = step(normal(FEW, 1, 1.0), state, params)
  saved = flax.serialization.to_bytes((params, state))
  restored = flax.serialization.from_bytes(lowmem.init(tx, normal(FEW)), saved)
  chex.assert_trees_all_equal(
    step(normal(FEW, 2, 1.0), state, params), step(normal(FEW, 2, 1.0), *restored[::-1])
  )


def test_train_state_and_nnx():
  state = lowmem.TrainState.create(
    apply_fn=None, params=normal(FEW), tx=lowmem.muon(1e-2), loss_scale="dynamic"
  )
  new = state.apply_gradients(grads=normal(FEW, 1, 1.0, jnp.bfloat16))
  assert new.residuals["tall"].dtype == jnp.int8 and new.step == 1

  layers = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
  optimizer = lowmem.nnx.Optimizer(layers, lowmem.muon(1e-2), wrt=nnx.Param)
  before = jnp.array(layers.kernel[...])
  loss = lambda layer: jnp.mean(layer(jnp.ones((4, 16), jnp.bfloat16)).astype(jnp.float32) ** 2)
  optimizer.update(layers, nnx.grad(loss)(layers))
  assert layers.kernel[...].dtype == jnp.bfloat16 and not np.array_equal(before, layers.kernel[...])


@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.given(strategies.integers(1, 70), strategies.integers(1, 70), strategies.integers(0, 3))
def test_any_shape(rows, columns, layers):
  shape = (layers, rows, columns) if layers else (rows, columns)
  params = {"w": normal({"w": shape})["w"]}
  want, _ = trained(optax.contrib.muon(1e-2, muon_weight_dimension_numbers=stacks), params, steps=1)
  got, _ = trained(lowmem.muon(1e-2, **FP32, weights="bf16+16"), params, steps=1)
  chex.assert_trees_all_close(got, want, rtol=0, atol=5e-6)


MESH = {"stack": (4, 64, 128), "tall": (128, 64), "bias": (128,)}


SPECS = {
  "FSDP": {"stack": P(None, "x", None), "tall": P("x", None), "bias": P("x")},
  "tensor": {"stack": P(None, None, "x"), "tall": P(None, "x"), "bias": P(None)},
  "layers": {"stack": P("x"), "tall": P(None, None), "bias": P(None)},
}
ON_MESHES = list(itertools.product(SPECS, [AxisType.Auto, AxisType.Explicit]))


@pytest.mark.parametrize("case", thinned(ON_MESHES, *ON_MESHES[::3]), ids=str)
def test_on_a_mesh(case):
  """Weights near those of one device, and updates that land (law 8)."""
  specs, kind = SPECS[case[0]], case[1]
  tx = lowmem.muon(1e-2, weights="bf16+16")
  step, update = jax.jit(functools.partial(lowmem.step, tx)), jax.jit(tx.update)

  def run(put):
    params, state = lowmem.init(tx, put(normal(MESH)))
    grads = put(normal(MESH, 1, 1.0, jnp.bfloat16))
    updates, updated = update(grads, state, params)
    landed = optax.apply_updates(params, updates)
    low, state = step(grads, state, params)
    return low, lowmem.master_params(low, state), lowmem.master_params(landed, updated)

  _, want, _ = run(lambda tree: tree)
  mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,), devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    put = lambda tree: {
      name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in tree.items()
    }
    low, got, landed = run(put)
  for name in MESH:
    assert low[name].sharding.is_equivalent_to(NamedSharding(mesh, specs[name]), low[name].ndim)
    for masters in (got, landed):
      np.testing.assert_allclose(masters[name], want[name], rtol=0, atol=5e-4)


@pytest.mark.parametrize("case", thinned(ON_MESHES[:-1], *ON_MESHES[:2], ON_MESHES[3]), ids=str)
def test_replicated_products(case):
  """The bits of one device; nothing is communicated but what gathers a matrix."""
  how, kind = case
  tx = lowmem.muon(1e-2, products="replicated")
  step = jax.jit(functools.partial(lowmem.step, tx))
  grads = normal(MESH, 1, 1.0, jnp.bfloat16)
  params, state = lowmem.init(tx, normal(MESH))
  want = step(grads, state, params)
  mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,), devices=jax.devices()[:4])
  put = lambda tree: {
    name: jax.device_put(x, NamedSharding(mesh, SPECS[how][name])) for name, x in tree.items()
  }
  with jax.set_mesh(mesh):
    params, state = lowmem.init(tx, put(normal(MESH)))
    program = step.lower(put(grads), state, params).compile()
    got = step(put(grads), state, params)
  chex.assert_trees_all_equal(jax.device_get(got), jax.device_get(want))
  communicated = {operation for _, operation in collectives(program.as_text())}
  is_cut = how == "tensor"  # its shards cut the blocks of these small matrices
  assert is_cut or communicated <= {"all-gather"}
  assert how == "layers" or "all-gather" in communicated


def test_replicated_products_need_a_mesh():
  mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  params = {"w": jax.device_put(jnp.ones((32, 32)), NamedSharding(mesh, P("x")))}
  tx = lowmem.muon(1e-2, products="replicated")
  params, state = lowmem.init(tx, params)
  with pytest.raises(ValueError, match=r"jax\.set_mesh"):
    jax.jit(functools.partial(lowmem.step, tx))(params, state, params)


def test_which_leaf_goes_where():
  params, state = lowmem.init(lowmem.muon(1e-2), normal(SHAPES))
  table = lowmem.memory_table(params, state)
  assert table.members["adam"] == ("['bias']", "['scalar']")
  assert set(table.members["muon"]) == {f"['{name}']" for name in SHAPES} - {
    "['bias']",
    "['scalar']",
  }
  assert "adam: ['bias'], ['scalar']" in str(table)
  fp32, state = lowmem.init(lowmem.muon(1e-2, weights="fp32"), normal(SHAPES))
  assert lowmem.memory_table(fp32, state).members == table.members


def test_leaves_whose_names_end_alike():
  params = {"w": jnp.ones(32), "block": {"w": jnp.ones((32, 32))}}
  members = lowmem.memory_table(*lowmem.init(lowmem.muon(1e-2), params)).members
  assert members == {"adam": ("['w']",), "muon": ("['block']['w']",)}


@pytest.mark.filterwarnings("always::UserWarning")
def test_warns_once():
  with pytest.warns(UserWarning, match="stays so") as warned:
    lowmem.muon(1e-2).init(normal(SHAPES))
  assert len(warned) == 1


def test_one_state_of_each():
  """Each part holds its own residuals; the words of the random streams are the same."""
  _, state = lowmem.init(lowmem.muon(1e-2, key=3), normal(SHAPES))
  parts = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, DeltaBitsState))]
  parts = [x for x in parts if isinstance(x, DeltaBitsState)]
  assert len(parts) == 2
  chex.assert_trees_all_equal(parts[0].key, parts[1].key)
