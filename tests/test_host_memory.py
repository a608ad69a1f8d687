"""lowmem.step of an optimizer state in the host's memory: the same bits, and it stays there."""

import functools

from conftest import assert_trees_equal, paired, updated
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem

PARAMS = {"b": jnp.linspace(-1, 1, 300), "w": jnp.sin(jnp.arange(64.0 * 96)).reshape(64, 96)}
TXS = {
  "adamw": lowmem.adamw(1e-2),
  "clipped": optax.chain(optax.clip_by_global_norm(0.1), lowmem.adamw(1e-2, weights="bf16+3")),
  "loss scale": lowmem.dynamic_loss_scale(lowmem.lion(1e-3, weights="fp16+8")),
  "optax": optax.adamw(1e-2),
  "composed": lowmem.delta_bits(lowmem.quantize_state(optax.adafactor(1e-3), default="fp32")),
}


def on_host(tree, keeps=lambda x: False):
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
  return jax.tree.map(lambda x: x if keeps(x) else jax.device_put(x, sharding), tree)


def kinds(tree):
  return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


@pytest.mark.parametrize("name, jits", paired(TXS, [True, False]))
def test_step(name, jits):
  tx = TXS[name]
  params, state = lowmem.init(tx, PARAMS)
  grads = jax.tree.map(lambda x: jnp.cos(7 * x.astype(jnp.float32)).astype(x.dtype), params)
  step = lambda grads, state, params: lowmem.step(tx, grads, state, params)
  step = jax.jit(step) if jits else step
  expected = params, state
  found = params, on_host(state)
  for _ in range(2):
    expected = step(grads, *expected[::-1])
    found = step(grads, *found[::-1])
  assert kinds(found[1]) == {"pinned_host"} and "pinned_host" not in kinds(found[0])
  jax.tree.map(np.testing.assert_array_equal, *jax.tree.map(np.asarray, (found, expected)))


def test_a_part_of_the_state():
  """Each leaf goes back to where it was."""
  tx = TXS["adamw"]
  params, state = lowmem.init(tx, PARAMS)
  state = on_host(state, keeps=lambda x: x.ndim < 2)
  _, new = jax.jit(functools.partial(lowmem.step, tx))(params, state, params)
  place = lambda x: x.sharding.memory_kind
  assert jax.tree.map(place, new) == jax.tree.map(place, state)


def test_leaf_by_leaf():
  """A state for each leaf has the bits of one for all: docs/planning.md streams them."""
  tx = TXS["adamw"]
  params, state = lowmem.init(tx, PARAMS)
  whole = jax.jit(functools.partial(lowmem.step, tx))(params, state, params)
  for name, w in PARAMS.items():
    part, own = lowmem.init(tx, {name: w})
    new, own = jax.jit(functools.partial(lowmem.step, tx))(part, on_host(own), part)
    np.testing.assert_array_equal(np.asarray(new[name]), np.asarray(whole[0][name]))
    found, expected = own.residuals[name], whole[1].residuals[name]
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("jits", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", ["adamw", "clipped", "loss scale"])
def test_update(name, jits):
  """By Optax's protocol, our own members bring their states; Optax's hold scalars alone here."""
  tx = TXS[name]
  params, state = lowmem.init(tx, PARAMS)
  step = jax.jit(functools.partial(updated, tx)) if jits else functools.partial(updated, tx)
  expected = step(params, state, params)
  found = step(params, on_host(state), params)
  assert kinds(found[1]) == {"pinned_host"} and "pinned_host" not in kinds(found[0])
  assert_trees_equal(*jax.tree.map(np.asarray, (found, expected)))


def test_gradient_release_refuses():
  tx = TXS["adamw"]
  params, state = lowmem.init(tx, {"layer": PARAMS["w"]})
  loss = lambda layers, x: layers["layer"](lambda w, x: jnp.sum((x @ w).astype(jnp.float32)), x)
  step, x = lowmem.fused_backward(loss, tx), jnp.ones((2, 64), jnp.bfloat16)
  step(params, state, x)
  with pytest.raises(ValueError, match=r"opt_state\..* is in the host's memory; .*lowmem.step"):
    jax.jit(step)(params, on_host(state), x)
  with pytest.raises(ValueError, match=r"params\['layer'\] is in the host's memory"):
    step(on_host(params), state, x)


@pytest.mark.h100
def test_plan():
  """A CPU has one memory. For a GPU, the leaf is refused by name."""
  tx = TXS["adamw"]
  params, state = lowmem.init(tx, PARAMS)

  def step(params, state):
    return lowmem.step(tx, params, state, params)

  plan = functools.partial(lowmem.plan, step, params, donate_argnums=(0, 1))
  assert plan(on_host(state)) == plan(state)
  with pytest.raises(ValueError, match=r"args\[1\]\..* is in pinned_host"):
    plan(on_host(state), device="h100")
