"""Loss scaling: law 12."""

import functools

import chex
from conftest import assert_trees_equal, paired, updated
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem


def make(fmt="fp16+8", scaled=lowmem.dynamic_loss_scale, **kwargs):
  inner = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(1e-2), optax.add_noise(0.1, 0.5, 0)
  )
  return scaled(lowmem.delta_bits(inner, fmt), **kwargs)


PARAMS32 = {
  "w": jnp.linspace(-2, 2, 96).reshape(3, 32),
  "b": jnp.zeros(5),
  "z": jnp.array([-0.0, 0.0, 1e-7]),
}


def apply(tx, how=lowmem.step):
  return jax.jit(functools.partial(how, tx))


STOCHASTIC = lowmem.DeltaFormat(jnp.bfloat16, 4, low_rounding="stochastic")


@pytest.mark.parametrize(
  "fmt, how, bad",
  paired(["fp16+8", "bf16+0", STOCHASTIC], [updated, lowmem.step], ["nan", "inf", "-inf"]),
)
def test_a_bad_step_changes_nothing_but_the_scale(fmt, how, bad):
  tx = make(fmt)
  params, state = lowmem.init(tx, PARAMS32)
  f = apply(tx, how)
  grads = jax.tree.map(lambda p: jnp.ones_like(p) * 100, params)
  params, state = f(grads, state, params)
  broken = {**grads, "b": grads["b"].at[2].set(float(bad))}
  after, new = f(broken, state, params)
  assert_trees_equal(after, params)
  assert_trees_equal(new.inner_state, state.inner_state)
  assert new.scale == state.scale / 2 and new.growth_count == 0
  assert new.skipped == 1 and new.skipped_in_a_row == 1
  _, third = f(broken, new, after)
  assert third.skipped == 2 and third.skipped_in_a_row == 2
  resumed, state4 = f(grads, third, after)
  expected, _ = f(
    jax.tree.map(lambda g: g * (third.scale / state.scale).astype(g.dtype), grads), third, after
  )
  assert state4.skipped_in_a_row == 0 and state4.skipped == 2
  chex.assert_trees_all_equal_structs(resumed, expected)


def test_a_skipped_step_is_as_if_not_there():
  """The random stream and the counters stand still, too."""
  tx = make()
  params, state = lowmem.init(tx, PARAMS32)
  f = apply(tx)
  g = lambda state: jax.tree.map(
    lambda p: (jnp.ones_like(p, jnp.float32) * lowmem.loss_scale(state) * 0.01).astype(p.dtype),
    params,
  )
  bad = jax.tree.map(lambda p: p * jnp.inf + jnp.nan, g(state))
  a_params, a_state = f(g(state), state, params)
  a_params, a_state = f(g(a_state), a_state, a_params)
  b_params, b_state = f(g(state), state, params)
  b_params, b_state = f(bad, b_state, b_params)
  b_params, b_state = f(g(b_state), b_state, b_params)
  assert_trees_equal(a_params, b_params)
  assert_trees_equal(a_state.inner_state, b_state.inner_state)


def test_updates_of_a_skipped_step_are_minus_zero():
  params = {"a": jnp.array([-0.0, 0.0, 1e-40]), "n": None, "i": jnp.arange(2)}
  grads = {"a": jnp.full(3, jnp.inf), "n": None, "i": np.zeros(2, jax.dtypes.float0)}
  scaled = lowmem.dynamic_loss_scale(optax.identity())
  updates, _ = scaled.update(grads, scaled.init(params), params)
  assert_trees_equal(updates["a"], np.full(3, -0.0, np.float32))


def test_unscaling_is_in_float32():
  """A float16 gradient that only the scale holds up survives."""
  tx = lowmem.static_loss_scale(optax.identity(), 2.0**15)
  grads = {"w": jnp.full(3, 2.0**-20, jnp.float16)}
  updates, _ = tx.update(grads, tx.init(grads), grads)
  assert_trees_equal(updates["w"], jnp.full(3, 2.0**-35))


def test_scaling_does_not_change_the_steps():
  """A power-of-two scale is exact: scaled and unscaled training agree bit for bit."""
  plain = lowmem.delta_bits(optax.adamw(1e-2), "bf16+8")
  scaled = lowmem.dynamic_loss_scale(plain, growth_interval=2)
  a = lowmem.init(plain, PARAMS32)
  b = lowmem.init(scaled, PARAMS32)
  fa, fb = apply(plain), apply(scaled)
  for i in range(6):
    grads = jax.tree.map(lambda p: jnp.cos(p.astype(jnp.float32) + i).astype(p.dtype), a[0])
    scale = lowmem.loss_scale(b[1])
    assert scale == 2.0 ** (15 + i // 2)
    a = fa(grads, a[1], a[0])
    b = fb(jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), b[1], b[0])
  assert_trees_equal(a[0], b[0])


def test_growth_backoff_and_bounds():
  tx = lowmem.dynamic_loss_scale(
      optax.sgd(0.0), init_scale=8.0, growth_interval=3, growth_factor=4.0, backoff_factor=0.25,
      min_scale=2.0, max_scale=64.0,
  )  # fmt: skip
  params = {"w": jnp.ones(2)}
  state = tx.init(params)
  update = jax.jit(tx.update)
  good, bad = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, jnp.nan])}
  scales = []
  for grads in [good] * 7 + [bad] * 4 + [good] * 3:
    _, state = update(grads, state, params)
    scales.append(float(state.scale))
  assert scales == [8, 8, 32, 32, 32, 64, 64, 16, 4, 2, 2, 2, 2, 8]


def test_static_scale_never_moves_and_skips():
  tx = lowmem.static_loss_scale(optax.sgd(1.0), 128.0)
  params = {"w": jnp.ones(2)}
  state = tx.init(params)
  updates, state = tx.update({"w": jnp.full(2, 128.0)}, state, params)
  assert_trees_equal(updates["w"], -jnp.ones(2))
  updates, state = tx.update({"w": jnp.full(2, jnp.inf)}, state, params)
  assert (updates["w"] == 0).all() and state.skipped == 1 and state.scale == 128
  assert lowmem.loss_scale((state, "x")) == 128


def test_loss_scale_inside_delta_bits():
  """The other order: a skipped step uses up no random bits either."""
  tx = lowmem.delta_bits(
    lowmem.dynamic_loss_scale(optax.sgd(0.1)),
    lowmem.DeltaFormat(jnp.bfloat16, 4, low_rounding="stochastic"),
  )
  params, state = lowmem.init(tx, PARAMS32)
  bad = jax.tree.map(lambda p: p * jnp.nan, params)
  after, new = apply(tx)(bad, state, params)
  assert_trees_equal(after, params)
  assert new.step == state.step == 0
  assert_trees_equal(new.residuals, state.residuals)


def test_scale_loss():
  tx = lowmem.dynamic_loss_scale(optax.sgd(0.1))
  state = tx.init({"w": jnp.ones(1)})
  scaled = lowmem.scale_loss(jnp.float16(1.5), state)
  assert scaled.dtype == jnp.float32 and scaled == 1.5 * 2**15
  assert jnp.isfinite(jnp.float16(1.0) * state.scale.astype(jnp.float16))  # 2**16 would not be
  assert lowmem.scale_loss(2.0, optax.EmptyState()) == 2.0
  assert lowmem.loss_scale(optax.adam(1.0).init({"w": jnp.ones(1)})) == 1.0
  two = lowmem.dynamic_loss_scale(tx).init({"w": jnp.ones(1)})
  with pytest.raises(ValueError, match="2 loss scales"):
    lowmem.loss_scale(two)


def test_no_unscaled_copy_of_the_gradients():
  """Buffers apart: a donated state can be donated."""
  tx = make()
  params, state = lowmem.init(tx, PARAMS32)
  step = jax.jit(functools.partial(lowmem.step, tx), donate_argnums=(1, 2))
  step(jax.tree.map(jnp.ones_like, params), state, params)


@pytest.mark.parametrize(
    "kwargs",
    [dict(init_scale=0.0), dict(init_scale=-1.0), dict(init_scale=np.inf), dict(init_scale=np.nan), dict(growth_factor=1.0),
     dict(backoff_factor=1.0), dict(growth_interval=0), dict(min_scale=0.0), dict(min_scale=2.0**16), dict(max_scale=1.0)],
)  # fmt: skip
def test_bad_arguments(kwargs):
  with pytest.raises(ValueError):
    lowmem.dynamic_loss_scale(optax.sgd(0.1), **kwargs)


def test_bad_static_scale():
  with pytest.raises(ValueError, match="scale is positive"):
    lowmem.static_loss_scale(optax.sgd(0.1), 0)
