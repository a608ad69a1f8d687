"""The Flax TrainState, and the memory table."""

from typing import Any

import chex
from conftest import assert_trees_equal
import flax
import flax.linen as nn
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem


class Net(nn.Module):
  dtype: Any = jnp.bfloat16

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(64, dtype=self.dtype)(x))
    return nn.Dense(1, dtype=jnp.float32)(x)[..., 0]


def make(tx=None, cls=lowmem.TrainState, **kwargs):
  model = Net()
  x = jnp.linspace(-1, 1, 32)[:, None]
  params = model.init(jax.random.key(0), x)["params"]
  tx = lowmem.delta_bits(optax.adamw(1e-2), "bf16+8") if tx is None else tx
  return cls.create(apply_fn=model.apply, params=params, tx=tx, **kwargs), x


def train(state, x, steps=60):
  chex.clear_trace_counter()

  @jax.jit
  @chex.assert_max_traces(n=2)  # `step` is a Python integer at first, as in Flax
  def step(state):
    def loss_fn(params):
      loss = jnp.mean((state.apply_fn({"params": params}, x) - jnp.sin(3 * x[:, 0])) ** 2)
      return state.scale_loss(loss), loss

    grads, loss = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), loss

  for _ in range(steps):
    state, loss = step(state)
  return state, float(loss)


@pytest.mark.parametrize("loss_scale", [None, "dynamic", 1024.0])
def test_trains(loss_scale):
  state, x = make(loss_scale=loss_scale)
  assert isinstance(state, train_state.TrainState)
  chex.assert_type(jax.tree.leaves(state.params), jnp.bfloat16)
  state, loss = train(state, x)
  assert loss < 0.1
  assert state.step == 60
  assert state.loss_scale == {None: 1.0, "dynamic": 2.0**15}.get(loss_scale, 1024.0)
  chex.assert_trees_all_equal_structs(state.residuals, state.params)
  assert_trees_equal(optax.tree.cast(state.master_params(), jnp.bfloat16), state.params)


def test_subclass_with_fields_without_default():
  class BatchNormState(lowmem.TrainState):
    batch_stats: Any

  state, x = make(cls=BatchNormState, batch_stats={"mean": jnp.zeros(3)})
  grads = jax.tree.map(jnp.ones_like, state.params)
  state = state.apply_gradients(grads=grads, batch_stats={"mean": jnp.ones(3)})
  assert (state.batch_stats["mean"] == 1).all() and state.step == 1


def test_step_counts_every_call():
  state, x = make(loss_scale="dynamic")
  bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), state.params)
  after = state.apply_gradients(grads=bad)
  assert after.step == 1 and after.opt_state.skipped == 1
  assert optax.tree.get(after.opt_state, "count") == 0
  assert_trees_equal(after.params, state.params)


def test_overwrite_with_gradient():
  params = {
    "params": {"w": jnp.ones((4, 40))},
    OVERWRITE_WITH_GRADIENT: {"scale": jnp.ones(1), "history": jnp.ones(8)},
  }
  tx = lowmem.delta_bits(optax.sgd(0.5), "bf16+8")
  state = lowmem.TrainState.create(apply_fn=None, params=params, tx=tx, loss_scale=4.0)
  grads = {
    "params": {"w": jnp.full((4, 40), 4.0, jnp.bfloat16)},
    # Neither checked nor unscaled.
    OVERWRITE_WITH_GRADIENT: {"scale": jnp.full(1, jnp.inf), "history": jnp.full(8, 3.0)},
  }
  state = state.apply_gradients(grads=grads)
  moved = jnp.full((4, 40), 0.5)
  assert_trees_equal(state.params["params"]["w"], moved.astype(jnp.bfloat16))
  assert_trees_equal(state.params[OVERWRITE_WITH_GRADIENT], grads[OVERWRITE_WITH_GRADIENT])
  assert_trees_equal(state.master_params()["params"]["w"], moved)
  assert state.opt_state.skipped == 0
  chex.assert_shape(state.residuals["w"], (4, 40))


def test_serialization():
  state, x = make(loss_scale="dynamic")
  state, _ = train(state, x, 3)
  restored = flax.serialization.from_bytes(
    make(loss_scale="dynamic")[0], flax.serialization.to_bytes(state)
  )
  restored = jax.tree.map(jnp.asarray, restored)
  a, _ = train(state, x, 2)
  b, _ = train(restored, x, 2)
  assert_trees_equal((a.params, a.opt_state), (b.params, b.opt_state))


def test_create_refuses():
  with pytest.raises(ValueError, match="nothing of optax_lowmem"):
    make(optax.adamw(1e-3))
  with pytest.raises(ValueError, match="2 loss scales"):
    make(lowmem.dynamic_loss_scale(lowmem.delta_bits()), loss_scale="dynamic")
  with pytest.raises(ValueError, match="positive"):
    make(loss_scale=0.0)
  with pytest.raises(ValueError, match="dynamic"):
    make(loss_scale="static")
  state, _ = make(lowmem.delta_bits(optax.adamw(1e-3), "fp32"))
  chex.assert_type(jax.tree.leaves(state.params), jnp.float32)


def test_per_leaf_formats():
  weights = lambda path, leaf: "fp32" if leaf.ndim < 2 else "fp16+8"
  state, _ = make(lowmem.delta_bits(optax.adamw(1e-3), weights))
  for p in jax.tree.leaves(state.params):
    assert p.dtype == (jnp.float16 if p.ndim == 2 else jnp.float32)


def test_memory_table():
  n, m = 64 * 64, 5
  params32 = {"w": jnp.ones((64, 64)), "b": jnp.ones(m)}
  tx = lowmem.dynamic_loss_scale(lowmem.delta_bits(optax.adamw(1e-3), {"w": "bf16+4", "b": "fp32"}))
  params, state = lowmem.init(tx, params32)
  table = lowmem.memory_table(params, state, params)
  assert table.num_params == n + m
  assert table.parts["weights"] == 2 * n + 4 * m == table.parts["gradients"]
  assert table.parts["residuals"] == n // 2
  assert table.parts["moments"] == 8 * (n + m)
  # step, key, the mark of the formats, Adam's count, loss scale
  assert table.parts["rest"] == 4 + 8 + 4 + 4 + 4 * 4
  assert table.total == sum(table.parts.values())
  real = sum(x.nbytes for x in jax.tree.leaves((params, state, params)))
  assert table.total == real
  text = str(table)
  assert "residuals" in text and f"{n // 2:,}" in text and "bytes/param" in text
  assert table.bytes_per_param["total"] == pytest.approx(real / (n + m))


def test_memory_table_counts_packed_bits_truly():
  params = {"w": jnp.zeros((10,), jnp.bfloat16)}
  state = {
    "mu": {"w": jnp.zeros((10,), jnp.int4)},
    "nu": {"w": jax.ShapeDtypeStruct((10,), jnp.uint2)},
  }
  assert lowmem.memory_table(params, state).parts["moments"] == 5 + 3
  factored = optax.adafactor(1e-3, min_dim_size_to_factor=2)
  p = {"w": jnp.zeros((8, 8))}
  table = lowmem.memory_table(p, factored.init(p))
  assert table.parts["moments"] >= 64 and table.parts["weights"] == 256
  key = {"rng": jax.random.key(0)}
  assert lowmem.memory_table(p, key).parts["rest"] == 8
  assert np.isfinite(lowmem.memory_table({}, {}).bytes_per_param["total"])
