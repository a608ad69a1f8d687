"""delta_bits and quantize_state with layerwise=True: optimizers that need a whole leaf."""

import functools

import chex
from conftest import paired
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon
import pytest
from test_muon import batch, released_and_kept

import optax_lowmem as lowmem


def muon():
  stacks = lambda tree: jax.tree.map(lambda x: MuonDimensionNumbers(-2, -1), tree)
  return optax.chain(scale_by_muon(weight_dimension_numbers=stacks), optax.scale(-1e-2))


def declared(inner, weights="bf16+8", **formats):
  inner = lowmem.quantize_state(inner, formats, "bf16", key=3, layerwise=True)
  return lowmem.delta_bits(inner, weights, layerwise=True)


def model():
  keys = jax.random.split(jax.random.key(0), 3)
  normal = lambda key, *shape: 0.1 * jax.random.normal(key, shape)
  blocks = {"up": normal(keys[0], 3, 32, 64), "down": normal(keys[1], 3, 64, 32)}
  return {"blocks": blocks, "head": normal(keys[2], 32, 48)}


def block(w, x):
  return x + jnp.tanh(x @ w["up"]) @ w["down"]


def scanned(weights, x):
  return jax.lax.scan(lambda x, w: (block(w, x), None), x, weights)[0]


def released_loss(layers, x, y, scans=True):
  x = layers["blocks"].scan(block, x) if scans else layers["blocks"](scanned, x)
  error = layers["head"](lambda w, x, y: x @ w - y, x, y)
  return jnp.mean(error.astype(jnp.float32) ** 2)


def kept_loss(params, x, y):
  return jnp.mean((scanned(params["blocks"], x) @ params["head"] - y).astype(jnp.float32) ** 2)


def trained(tx, scans):
  """(parameters and state of the released step, of the kept step)."""
  start = lowmem.init(tx, model())
  losses = functools.partial(released_loss, scans=scans), kept_loss
  return released_and_kept(tx, start, losses, batch(start[0]["head"].dtype), 2)[:2]


@pytest.mark.parametrize(
  "tx, scans",
  [
    (lambda: declared(muon(), mu="int8"), True),
    (lambda: declared(optax.lamb(1e-2), mu="int8", nu="int4"), False),
    (lambda: lowmem.dynamic_loss_scale(declared(optax.adafactor(1e-2, 16))), False),
    pytest.param(
      lambda: lowmem.delta_bits(optax.novograd(1e-2), "bf16+0", key=5, layerwise=True),
      False,
      marks=pytest.mark.thorough,
    ),
    (lambda: lowmem.quantize_state(optax.lamb(1e-2), layerwise=True), False),
  ],
  ids=["muon", "lamb", "adafactor", "novograd", "statistics alone"],
)
def test_released_is_the_step(tx, scans):
  """Law 15, within rounding where XLA computes gradients or products in another order."""
  before, _ = lowmem.init(tx(), model())
  ours, theirs = trained(tx(), scans)
  half = ours[0]["head"].dtype != jnp.float32
  weights = [lowmem.master_params(*x) if half else x[0] for x in (ours, theirs)]
  if scans or not half:
    chex.assert_trees_all_close(*weights, rtol=0, atol=1e-3 if half else 1e-6)
  else:
    chex.assert_trees_all_equal(ours, theirs)
  moved = jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), weights[0], before)
  assert min(jax.tree.leaves(moved)) > 2e-3


def test_step_is_the_composed_one():
  """The same optimizer with and without the declaration."""
  inner = lambda: optax.lamb(1e-2, weight_decay=0.1)
  plain = lowmem.delta_bits(lowmem.quantize_state(inner(), {}, "bf16", key=3), "bf16+8")
  masters = []
  for tx in (declared(inner()), plain):
    params, state = lowmem.init(tx, model())
    for _ in range(2):
      grads = jax.grad(kept_loss)(params, *batch())
      params, state = jax.jit(functools.partial(lowmem.step, tx))(grads, state, params)
    masters.append(lowmem.master_params(params, state))
  chex.assert_trees_all_close(*masters, rtol=0, atol=1e-5)


def test_update_lands():
  """Law 8, and the same weights as from lowmem.step."""
  tx = declared(optax.lamb(1e-2), mu="int8")
  params, state = lowmem.init(tx, model())
  grads = jax.grad(kept_loss)(params, *batch())
  updates, updated = jax.jit(tx.update)(grads, state, params)
  landed = optax.apply_updates(params, updates)
  stepped, _ = jax.jit(functools.partial(lowmem.step, tx))(grads, state, params)
  chex.assert_trees_all_equal(landed, stepped)
  masters = lowmem.master_params(landed, updated)
  chex.assert_trees_all_equal(lowmem.load_master(masters, updated)[0], landed)


def test_the_gradient_is_released():
  """Temporaries: float32 values of one leaf at a time, and no gradient of the model."""
  tx = declared(muon())
  shapes = {"blocks": {"up": (64, 128, 128), "down": (64, 128, 128)}, "head": (128, 48)}
  struct = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  params = jax.tree.map(struct, shapes, is_leaf=lambda x: isinstance(x, tuple))
  params, state = jax.eval_shape(functools.partial(lowmem.init, tx), params)
  x, y = (jax.ShapeDtypeStruct((16, n), jnp.bfloat16) for n in (128, 48))
  step = jax.jit(lowmem.fused_backward(released_loss, tx), donate_argnums=(0, 1))
  compiled = step.lower(params, state, x, y).compile()
  gradients = 2 * 2 * 64 * 128 * 128
  assert compiled.memory_analysis().temp_size_in_bytes < gradients / 2


def test_whole_stacks_are_refused():
  def step(inner, scans=True):
    tx = lowmem.delta_bits(inner, layerwise=True)
    loss = functools.partial(released_loss, scans=scans)
    return lowmem.fused_backward(loss, tx)(*lowmem.init(tx, model()), *batch())

  with pytest.raises(ValueError, match=r"\['blocks'\]\['down'\].*whole stack.*leaf of its own"):
    step(optax.lamb(1e-2))
  step(optax.lamb(1e-2), scans=False)
  factored = optax.chain(optax.scale_by_factored_rms(True, 0.8, 0, 16), optax.scale(-1e-2))
  with pytest.raises(ValueError, match=r"\['blocks'\]\['down'\].*\.v .*\(1,\).*leaf of its own"):
    step(factored)  # Optax keeps one placeholder, whatever the length of the stack
  by_rank = lambda updates, params: jax.tree.map(
    lambda u, p: u + p if p.ndim > 2 else u, updates, params
  )
  with pytest.raises(ValueError, match=r"\['blocks'\].*layer alone.*leaf of its own"):
    step(optax.chain(optax.stateless(by_rank), optax.sgd(1e-2)))
  with pytest.raises(ValueError, match="MaskedState"):
    step(optax.lars(1e-2))

  @jax.jit
  def traced(lr):  # cannot be tested, so it is taken at its word
    return step(optax.sgd(lr))[0]

  assert np.isfinite(traced(0.1))


def counting_norms():
  """Only the state of the first step depends on all leaves."""

  def update(updates, state, params=None):
    norm = 0.9 * state + 0.1 * optax.tree.norm(updates)
    return jax.tree.map(lambda u: u / state, updates), norm

  return optax.GradientTransformation(lambda params: jnp.float32(1.0), update)


@pytest.mark.parametrize(
  "how, member",
  paired(
    ["step", "update", "released", "traced"], [counting_norms(), optax.clip_by_global_norm(1.0)]
  ),
)
def test_what_looks_at_other_leaves_is_refused(how, member):
  def make(lr):
    inner = lowmem.quantize_state(optax.chain(member, optax.lamb(lr)), layerwise=True)
    return lowmem.delta_bits(inner, layerwise=True)

  tx = make(1e-2)
  params, state = lowmem.init(tx, model())
  with pytest.raises(ValueError, match=r"\['blocks'\]\['down'\].*depends on other leaves"):
    if how == "traced":
      jax.jit(lambda lr: lowmem.step(make(lr), params, state, params))(0.1)
    elif how == "released":
      lowmem.fused_backward(released_loss, tx)(params, state, *batch())
    elif how == "step":
      jax.jit(functools.partial(lowmem.step, tx))(params, state, params)
    else:
      tx.update(params, state, params)


def test_bad_declarations():
  with pytest.raises(ValueError, match="contradict"):
    lowmem.delta_bits(optax.lamb(1e-2), elementwise=True, layerwise=True)
  with pytest.raises(ValueError, match="contradict"):
    lowmem.quantize_state(optax.lamb(1e-2), elementwise=True, layerwise=True)
  inner = lowmem.quantize_state(optax.adam(1e-2), elementwise=True)
  with pytest.raises(ValueError, match="the same"):
    lowmem.delta_bits(inner, layerwise=True)
  with pytest.raises(ValueError, match="optimizer of this library"):
    lowmem.delta_bits(lowmem.muon(1e-2), layerwise=True)
  with pytest.raises(ValueError, match="accumulate"):
    lowmem.fused_backward(released_loss, declared(optax.lamb(1e-2)), accumulate=2)


def test_loss_scale_skips():
  """Law 12."""
  tx = lowmem.dynamic_loss_scale(declared(optax.lamb(1e-2), "fp16+8", mu="int8"))
  params, state = lowmem.init(tx, model())
  x, y = batch(jnp.float16)
  loss = functools.partial(released_loss, scans=False)
  step = jax.jit(lowmem.fused_backward(loss, tx))
  _, params, state = step(params, state, x, y)
  _, after, skipped = step(params, state, x.at[0, 0].set(jnp.inf), y)
  chex.assert_trees_all_equal((after, skipped.inner_state), (params, state.inner_state))
  assert skipped.skipped == 1


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_on_a_mesh(kind):
  """The trust ratio is the whole leaf's; the rows of the shards have different norms."""
  mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,), devices=jax.devices()[:4])
  place = lambda x: jax.device_put(
    x, jax.NamedSharding(mesh, jax.P(*[None] * (x.ndim - 2), "x", None))
  )
  start = jax.tree.map(lambda x: x * jnp.arange(1, x.shape[-2] + 1)[:, None], model())
  tx = declared(optax.lamb(1e-2), mu="int8")
  masters = []
  for params in (start, jax.tree.map(place, start)):
    grads = jax.tree.map(lambda x: jnp.cos(100 * x).astype(jnp.bfloat16), params)
    params, state = lowmem.init(tx, params)
    params, state = jax.jit(functools.partial(lowmem.step, tx))(grads, state, params)
    masters.append(jax.device_get(lowmem.master_params(params, state)))
  chex.assert_trees_all_close(*masters, rtol=2e-3, atol=2e-3)


def test_a_transfer_guard():
  """The check of stacks runs outside the trace, the mesh and the guard of the caller."""
  tx = declared(muon())
  params, state = lowmem.init(tx, model())
  x_and_y = batch()
  step = jax.jit(lowmem.fused_backward(released_loss, tx))
  with jax.transfer_guard("disallow"):
    loss, *_ = step(params, state, *x_and_y)
  assert np.isfinite(loss)
