"""Haiku's parameters are plain dicts, so its loops work as they are."""

from conftest import updated
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem

X = jnp.linspace(-1, 1, 64).reshape(32, 2)
LABELS = (X.sum(1) > 0).astype(jnp.int32)


def forward(x):
  x = jax.nn.relu(hk.Linear(64)(x))
  x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(x, is_training=True)
  return hk.Linear(2)(x).astype(jnp.float32)


def trained(tx, x, start, advance):
  """The losses of 30 steps, and the parameters after them."""
  net = hk.without_apply_rng(hk.transform_with_state(forward))
  params, averages = net.init(jax.random.key(0), X)
  params, opt_state = start(tx, params)

  @jax.jit
  def step(params, averages, opt_state):
    def loss(params):
      logits, new = net.apply(params, averages, x)
      return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), new

    (value, averages), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return value, averages, *advance(tx, grads, opt_state, params)

  losses = []
  for _ in range(30):
    value, averages, params, opt_state = step(params, averages, opt_state)
    losses.append(float(value))
  return losses, params, opt_state


@pytest.mark.parametrize("advance", [lowmem.step, updated])
def test_a_loop_of_haiku(advance):
  """Inputs in bfloat16, as docs/recipes.md says; the averages of the batch norm stay float32."""
  plain = lambda tx, params: (params, tx.init(params))
  wanted = trained(optax.adamw(3e-3), X, plain, updated)[0]
  tx = lowmem.adamw(3e-3)
  losses, params, opt_state = trained(tx, X.astype(jnp.bfloat16), lowmem.init, advance)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
  np.testing.assert_allclose(losses, wanted, atol=0.03)
  assert losses[-1] < 0.5 * losses[0]
  assert list(lowmem.master_params(params, opt_state)) == ["batch_norm", "linear", "linear_1"]
