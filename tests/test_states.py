"""What Optax's own suites (tests/conformance) found in the states of our wrappers."""

import chex
from conftest import assert_trees_equal
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem

PARAMS = {"w": jnp.linspace(-2, 2, 192, dtype=jnp.float32).reshape(3, 64), "b": jnp.ones(64)}
GRADS = jax.tree.map(lambda x: jnp.sin(7 * x), PARAMS)
TXS = {
  "adamw": lambda: lowmem.adamw(1e-2),
  "delta_bits": lambda: lowmem.delta_bits(optax.adam(1e-2), "bf16+3"),
  "quantize_state": lambda: optax.chain(
    lowmem.quantize_state(
      lowmem.quantize_state(optax.adam(1e-2), {"mu": "int8", "nu": "fp32"}), {"nu": "int8"}
    ),
    lowmem.delta_bits(),
  ),
  "loss scale, masked": lambda: lowmem.static_loss_scale(
    optax.masked(lowmem.sgd(1e-2, 0.9), {"w": True, "b": False}), 2.0
  ),
}


@pytest.mark.parametrize("name", TXS)
def test_map_params_keeps_the_formats(name):
  tx = TXS[name]()
  params, state = lowmem.init(tx, PARAMS)
  mapped = optax.tree.map_params(tx, lambda x: x, state)
  assert_trees_equal(mapped, state)  # a table without entries equals every other
  assert repr(jax.tree.structure(mapped)) == repr(jax.tree.structure(state))
  after = lowmem.step(tx, GRADS, mapped, params)
  assert_trees_equal(after, lowmem.step(tx, GRADS, state, params))


def test_map_params_maps_statistics_and_residuals():
  tx = TXS["adamw"]()
  _, state = lowmem.init(tx, PARAMS)
  mapped = optax.tree.map_params(tx, lambda x: x.shape, state, transform_non_params=lambda x: None)
  assert mapped.residuals == {"w": (3, 64), "b": (64,)}
  assert optax.tree.get(mapped, "mu")["w"].codes == (3, 64)
  assert mapped.step is None


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("bad", [False, True])
def test_a_loss_scale_keeps_the_dtypes_of_a_bare_optimizers_state(dtype, bad):
  tx = lowmem.static_loss_scale(optax.adam(1e-2), 8.0)
  params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
  grads = jax.tree.map(lambda x: x.astype(dtype), GRADS)
  if bad:
    grads["b"] = grads["b"].at[3].set(jnp.inf)
  state = tx.init(params)

  def body(state, _):
    updates, state = tx.update(grads, state, params)
    return state, updates["w"].dtype == jnp.float32

  after, _ = jax.lax.scan(body, state, length=2)  # refuses a state that changes
  mu = optax.tree.get(after, "mu")
  assert mu["w"].dtype == dtype
  if bad:
    assert_trees_equal(after.inner_state, state.inner_state)
  else:
    expected = 0.19 / 8 * np.asarray(grads["w"], np.float32)  # 1 - 0.9**2, unscaled
    np.testing.assert_allclose(np.asarray(mu["w"], np.float32), expected, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("name", ["int8", "fp16", "bf16"])
def test_the_nu_of_sm3_has_signs(name):
  """Its field `nu` is a momentum; stored as a square it was NaN after the first step."""
  tx = lowmem.quantize_state(optax.chain(optax.scale(1.0), optax.sm3(0.1)), {"nu": name})
  reference = optax.chain(optax.scale(1.0), optax.sm3(0.1))
  state, expected = tx.init(PARAMS), reference.init(PARAMS)
  for _ in range(3):
    updates, state = tx.update(GRADS, state, PARAMS)
    wanted, expected = reference.update(GRADS, expected, PARAMS)
  chex.assert_trees_all_close(updates, wanted, rtol=1e-7, atol=0.005)
  assert optax.tree.get(expected, "nu")["w"].min() < 0
