"""delta_bits inside Optax: laws 8 to 11 and 14, and bad input."""

import functools
import pickle
import re
import warnings

import chex
from conftest import assert_trees_equal, bits_of, float32_classes, normal_like, paired, updated
import flax.serialization
import flax.training.train_state
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem

FORMATS = ["bf16+0", "bf16+4", "bf16+8", "bf16+16", "fp16+8", "fp16+13"]


def make_params(seed=0):
  k = jax.random.split(jax.random.key(seed), 3)
  return {
    "dense": {"kernel": jax.random.normal(k[0], (40, 33)) * 0.1, "bias": jnp.zeros(7)},
    "scale": jnp.float32(1.5),
    "none": None,
    "empty": jnp.zeros((0, 4)),
    "list": [jax.random.normal(k[1], (3, 2, 64))],
  }


def jitted(how, tx):
  """`lowmem.step` or `updated`, of (grads, opt_state, params)."""
  return jax.jit(functools.partial(how, tx))


@pytest.mark.parametrize("fmt", FORMATS)
def test_landing(fmt):
  """Law 8: what apply_updates gives is the weight that the residual belongs to."""
  tx = lowmem.delta_bits(optax.adamw(1e-2), fmt)
  params, state = lowmem.init(tx, make_params())
  step = jitted(updated, tx)
  for i in range(5):
    params, state = step(normal_like(params, i), state, params)
    master = lowmem.master_params(params, state)
    low = jax.tree.map(lambda m: lowmem.split(m, fmt, key=0)[0], master)
    assert_trees_equal(low, params)  # law 3: the weight is the nearest to its master


@pytest.mark.parametrize("fmt", ["bf16+0", "bf16+8", "bf16+16", "fp16+8", "fp16+16"])
def test_landing_anywhere(fmt):
  """Law 8 on every class of value: zero crossings, subnormals, overflow, infinities."""
  x = float32_classes(4096)
  x = np.where(np.isnan(x), 1.0, x).astype(np.float32)
  rng = np.random.default_rng(0)
  target = rng.permutation(x)
  target[:2000] = -x[:2000] * (1 + 2.0 ** -rng.integers(8, 30, 2000))  # cancels
  tx = lowmem.delta_bits(optax.identity(), fmt)
  params, state = lowmem.init(tx, jnp.asarray(x))
  master = lowmem.master_params(params, state)
  new, state = jitted(updated, tx)(jnp.asarray(target) - master, state, params)
  value = lowmem.master_params(new, state)
  again, _ = lowmem.split(value, fmt, key=0)
  a, b = bits_of(again), bits_of(new)
  same = (a == b) | ((a | b) & 0x7FFF == 0) | np.isnan(np.asarray(new, np.float32))
  assert same.all()


@pytest.mark.parametrize(
  "wrap, fmt",
  paired(["inner", "chain", "partition", "masked", "schedule", "inject"], FORMATS),
)
def test_step_is_update_and_apply(wrap, fmt):
  """`step` gives the bits of update and apply_updates, wherever our member stands last."""
  tx = {
    "inner": lambda: lowmem.delta_bits(optax.adamw(1e-2), fmt),
    "chain": lambda: optax.chain(
      optax.clip_by_global_norm(1.0), optax.adamw(1e-2), lowmem.delta_bits(weights=fmt)
    ),
    "partition": lambda: optax.partition(
      {"a": lowmem.delta_bits(optax.adam(1e-2), fmt), "b": lowmem.delta_bits(optax.sgd(0.1), fmt)},
      {"dense": "a", "scale": "b", "none": "a", "empty": "b", "list": "b"},
    ),
    "masked": lambda: optax.chain(
      optax.adam(1e-2),
      optax.masked(lowmem.delta_bits(weights=fmt), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    ),
    "schedule": lambda: lowmem.delta_bits(optax.adam(optax.linear_schedule(1e-2, 0.0, 10)), fmt),
    "inject": lambda: optax.inject_hyperparams(
      lambda learning_rate, b2: lowmem.delta_bits(optax.adam(learning_rate, b2=b2), fmt),
      hyperparam_dtype=jnp.float32,
    )(1e-2, 0.999),
  }[wrap]()
  params, state = lowmem.init(tx, make_params())
  a = b = (params, state)
  update, step = jitted(updated, tx), jitted(lowmem.step, tx)
  for i in range(3):
    grads = normal_like(params, i, 0.3)
    a = update(grads, a[1], a[0])
    b = step(grads, b[1], b[0])
  assert_trees_equal(a, b)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "adabelief"])
def test_bf16_16_follows_a_float32_master(optimizer):
  """Law 9, 1,000 steps of given gradients: equal bits."""
  inner = {
    "adamw": lambda: optax.adamw(1e-2),
    "sgd": lambda: optax.sgd(1e-2, momentum=0.9),
    "lion": lambda: optax.lion(1e-3),
    "adabelief": lambda: optax.adabelief(1e-2),
  }[optimizer]()
  tx = lowmem.delta_bits(inner, "bf16+16")
  params32 = {"w": jax.random.normal(jax.random.key(1), (32, 40)), "b": jnp.zeros(5)}
  params, state = lowmem.init(tx, params32)
  # One program for both, so that no compiler contracts in one of them only.
  state32 = inner.init(params32)

  def both(carry, i):
    params, state, params32, state32 = carry
    grads = jax.tree.map(
      lambda p: jnp.sin(i * 0.37 + jnp.arange(p.size, dtype=jnp.float32)).reshape(p.shape), params32
    )
    params, state = lowmem.step(tx, grads, state, params)
    updates, state32 = inner.update(grads, state32, params32)
    params32 = optax.apply_updates(params32, updates)
    return (params, state, params32, state32), None

  carry = (params, state, params32, state32)
  run = jax.jit(lambda c: jax.lax.scan(both, c, jnp.arange(1000.0))[0])
  params, state, params32, state32 = run(carry)
  assert_trees_equal(lowmem.master_params(params, state), params32)
  assert_trees_equal(state.inner_state, state32)


def test_inner_sees_float32_master_and_gradients():
  """Law 9."""
  seen = {}

  def update(updates, state, params=None):
    seen.update(updates=updates, params=params)
    return updates, state

  spy = optax.GradientTransformation(lambda p: optax.EmptyState(), update)
  tx = lowmem.delta_bits(spy, "bf16+8")
  params, state = lowmem.init(tx, make_params())
  tx.update(normal_like(params, 0), state, params)
  assert_trees_equal(seen["params"], lowmem.master_params(params, state))
  chex.assert_type(jax.tree.leaves(seen), jnp.float32)


def test_other_leaves_pass_through():
  """Law 10: float32, float64, complex and integer leaves have Optax's own behaviour."""
  with jax.enable_x64(True):
    params = {
      "f32": jnp.arange(3.0, dtype=jnp.float32),
      "f64": jnp.arange(3.0, dtype=jnp.float64),
      "c64": jnp.arange(3.0).astype(jnp.complex64),
      "i32": jnp.arange(3, dtype=jnp.int32),
    }
    grads = jax.tree.map(jnp.ones_like, params)
    inner = optax.sgd(1)
    tx = lowmem.delta_bits(inner, "bf16+8")
    expected = inner.update(grads, inner.init(params), params)
    updates, state = tx.update(grads, tx.init(params), params)
    assert_trees_equal((updates, state.inner_state), expected)
    assert jax.tree.leaves(state.residuals) == []


def test_weights_prefix_and_callable():
  params32 = make_params()
  prefix = {"dense": "bf16+8", "scale": "fp32", "none": "fp32", "empty": "fp32", "list": ["fp16+4"]}
  for weights in (
    prefix,
    lambda path, leaf: prefix[path[0].key] if path[0].key != "list" else "fp16+4",
  ):
    params, state = lowmem.init(lowmem.delta_bits(optax.sgd(0.1), weights), params32)
    assert params["dense"]["kernel"].dtype == jnp.bfloat16
    assert params["scale"].dtype == jnp.float32
    assert params["list"][0].dtype == jnp.float16
    assert state.residuals["dense"]["kernel"].dtype == jnp.int8 and state.residuals["scale"] is None
    assert state.residuals["list"][0].shape == (3, 2, 32)


def test_init_from_half_precision_params():
  """tx.init without lowmem.init: the residuals start at zero."""
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())
  tx = lowmem.delta_bits(optax.adam(1e-3), "bf16+8")
  state = tx.init(params)
  assert_trees_equal(
    lowmem.master_params(params, state), jax.tree.map(lambda x: x.astype(jnp.float32), params)
  )
  chex.assert_type(jax.tree.leaves(state.inner_state[0].mu), jnp.float32)
  jitted(updated, tx)(normal_like(params, 0), state, params)


def test_small_updates_are_not_lost():
  """What it is all for: updates under half a bfloat16 ulp arrive, in every format."""
  for fmt, tolerance in (("bf16+16", 1e-3), ("bf16+8", 0.01), ("fp16+8", 0.01), ("bf16+0", 0.05)):
    tx = lowmem.delta_bits(optax.identity(), fmt)
    params, state = lowmem.init(tx, jnp.ones(4096))
    update = jnp.full(4096, 2.0**-17)
    run = jax.jit(
      lambda c: jax.lax.fori_loop(0, 1000, lambda i, c: lowmem.step(tx, update, c[1], c[0]), c)
    )
    params, state = run((params, state))
    moved = float(jnp.mean(lowmem.master_params(params, state))) - 1
    assert abs(moved / (1000 * 2.0**-17) - 1) < tolerance, fmt
  naive = jnp.ones(4, jnp.bfloat16)
  assert (optax.apply_updates(naive, jnp.full(4, 1e-5, jnp.bfloat16)) == 1).all()


@pytest.mark.parametrize("low_rounding", ["stochastic", "truncate"])
def test_other_low_roundings(low_rounding):
  fmt = lowmem.DeltaFormat(jnp.bfloat16, 8, low_rounding=low_rounding)
  tx = lowmem.delta_bits(optax.sgd(0.1), fmt)
  params, state = lowmem.init(tx, make_params())
  before = lowmem.master_params(params, state)
  new, state = jitted(lowmem.step, tx)(jax.tree.map(jnp.zeros_like, params), state, params)
  assert_trees_equal(new, params)  # no update, no new draw
  assert_trees_equal(lowmem.master_params(new, state), before)
  args = normal_like(params, 0), state, params
  assert_trees_equal(jitted(updated, tx)(*args), jitted(lowmem.step, tx)(*args))


def test_update_dtype_gradient():
  """Updates in the gradient's dtype: they land, and the master follows within 2**-8."""
  tx = lowmem.delta_bits(optax.sgd(0.1), "bf16+8", update_dtype="gradient")
  params, state = lowmem.init(tx, {"w": jax.random.normal(jax.random.key(0), (64, 64))})
  for i in range(5):
    grads = normal_like(params, i)
    updates, new_state = jax.jit(tx.update)(grads, state, params)
    assert updates["w"].dtype == jnp.bfloat16
    new = optax.apply_updates(params, updates)
    before, after = lowmem.master_params(params, state), lowmem.master_params(new, new_state)
    update = -0.1 * grads["w"].astype(jnp.float32)
    wanted = before["w"] + update
    # 2**-8 of the weights' update, and the grid of the residual
    moved = jnp.abs(new["w"].astype(jnp.float32) - params["w"].astype(jnp.float32))
    slack = jnp.maximum(moved, jnp.abs(update)) * 2.0**-8 + jnp.abs(wanted) * 2.0**-15
    assert (jnp.abs(after["w"] - wanted) <= slack).all()
    cell = jnp.abs(after["w"] - new["w"].astype(jnp.float32))
    assert (cell <= jnp.abs(new["w"].astype(jnp.float32)) * 2.0**-7).all()
    params, state = new, new_state


@pytest.mark.parametrize("wrapper", ["apply_if_finite", "multi_steps"])
def test_wrappers_with_a_cond(wrapper):
  tx = lowmem.delta_bits(optax.adam(1e-2), "bf16+8", update_dtype="gradient")
  if wrapper == "apply_if_finite":
    tx = optax.apply_if_finite(tx, 3)
  else:
    tx = optax.MultiSteps(tx, 2).gradient_transformation()
  params, state = lowmem.init(tx, make_params())
  start = params
  for i in range(4):
    grads = normal_like(params, i)
    a = jitted(updated, tx)(grads, state, params)
    assert_trees_equal(a, jitted(lowmem.step, tx)(grads, state, params))
    if wrapper == "multi_steps" and i == 0:
      assert_trees_equal(a[0], start)
    params, state = a
  assert (params["dense"]["kernel"] != start["dense"]["kernel"]).any()
  if wrapper == "apply_if_finite":
    bad = jax.tree.map(lambda g: g * jnp.nan, normal_like(params, 0))
    after, _ = jitted(updated, tx)(bad, state, params)
    assert_trees_equal(after, params)


def test_extra_args_and_traced_learning_rate():
  tx = lowmem.delta_bits(optax.polyak_sgd(), "bf16+8")
  params, state = lowmem.init(tx, make_params())
  lowmem.step(tx, normal_like(params, 0), state, params, value=jnp.float32(1.0))

  @jax.jit
  def train(lr, grads, state, params):
    return lowmem.step(lowmem.delta_bits(optax.sgd(lr), "bf16+8"), grads, state, params)

  tx = lowmem.delta_bits(optax.sgd(0.25), "bf16+8")
  params, state = lowmem.init(tx, make_params())
  grads = normal_like(params, 0)
  assert_trees_equal(
    train(jnp.float32(0.25), grads, state, params),
    jitted(lowmem.step, tx)(grads, state, params),
  )


def test_half_precision_hyperparameters_are_refused():
  make = lambda b2: lowmem.delta_bits(optax.adam(1e-3, b2=b2), "bf16+8")
  tx = optax.inject_hyperparams(make)(0.999)
  params, _ = lowmem.init(lowmem.delta_bits(optax.adam(1e-3)), make_params())
  with pytest.raises(ValueError, match="hyperparam_dtype=jnp.float32"):
    jax.jit(tx.update)(normal_like(params, 0), jax.eval_shape(tx.init, params), params)


def test_member_behind_is_refused_by_name():
  for behind, name in (
    (optax.scale(0.5), "scale"),
    (optax.clip(1.0), "clip"),
    (optax.add_decayed_weights(0.1), "add_decayed_weights"),
    (lowmem.delta_bits(), "delta_bits"),
  ):
    tx = optax.chain(lowmem.delta_bits(optax.sgd(0.1)), behind)
    params, state = lowmem.init(
      optax.chain(lowmem.delta_bits(optax.sgd(0.1)), optax.identity()), make_params()
    )
    state = tx.init(params)
    with pytest.raises(ValueError, match=f": {name} stands behind"):
      lowmem.step(tx, normal_like(params, 0), state, params)
  harmless = optax.chain(lowmem.delta_bits(optax.sgd(0.1)), optax.identity())
  params, state = lowmem.init(harmless, make_params())
  lowmem.step(harmless, normal_like(params, 0), state, params)


def test_step_with_nothing_of_ours():
  tx = optax.adam(1e-3)
  params = make_params()
  grads = normal_like(params, 0)
  expected = updated(tx, grads, tx.init(params), params)
  assert_trees_equal(lowmem.step(tx, grads, tx.init(params), params), expected)


def test_donation_in_place():
  """Every buffer of weights, residuals and moments is used again (test_h100: no temporaries)."""
  tx = lowmem.delta_bits(optax.adamw(1e-3), "bf16+8")
  params, state = lowmem.init(tx, {"w": jnp.zeros((512, 512))})
  grads = jax.tree.map(jnp.ones_like, params)
  step = jax.jit(functools.partial(lowmem.step, tx), donate_argnums=(1, 2))
  stats = step.lower(grads, state, params).compile().memory_analysis()
  assert stats.alias_size_in_bytes >= 512 * 512 * (2 + 1 + 8)
  step(grads, state, params)


def test_resume_is_bit_exact():
  """Law 14, through bytes and through pickle."""
  tx = lowmem.dynamic_loss_scale(lowmem.delta_bits(optax.adamw(1e-2), "bf16+5"))
  params, state = lowmem.init(tx, make_params())
  step = jitted(lowmem.step, tx)
  grads = normal_like(params, 0, 100.0)
  params, state = step(grads, state, params)
  saved = flax.serialization.to_bytes((params, state))
  restored = flax.serialization.from_bytes((params, tx.init(params)), saved)
  restored = jax.tree.map(jnp.asarray, restored)
  assert_trees_equal(step(grads, restored[1], restored[0]), step(grads, state, params))
  pickled = pickle.loads(pickle.dumps((params, state)))
  assert_trees_equal(step(grads, pickled[1], pickled[0]), step(grads, state, params))


@pytest.mark.filterwarnings("ignore")  # Orbax's own
def test_resume_through_orbax(tmp_path):
  """Law 14: what Orbax saves is the arrays; the formats come from the target."""
  ocp = pytest.importorskip("orbax.checkpoint")
  tx = lowmem.dynamic_loss_scale(lowmem.delta_bits(optax.adamw(1e-2), "bf16+5"))
  params32 = {k: v for k, v in make_params().items() if k not in ("none", "empty")}
  saved = lowmem.init(tx, params32)
  step = jitted(lowmem.step, tx)
  grads = normal_like(saved[0], 0, 100.0)
  saved = step(grads, saved[1], saved[0])
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "saved", saved)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "saved", jax.tree.map(jnp.zeros_like, saved))
  assert_trees_equal(restored, saved)
  assert_trees_equal(step(grads, restored[1], restored[0]), step(grads, saved[1], saved[0]))


def test_seeds_steps_and_leaves_draw_differently():
  x = jnp.full((64, 64), 1.001)
  params32 = {"a": x, "b": x}
  low = {}
  for key in (0, 1):
    tx = lowmem.delta_bits(optax.identity(), "bf16+0", key=key)
    params, state = lowmem.init(tx, params32)
    low[key] = params
    stay = jax.tree.map(lambda p: 1.001 - p.astype(jnp.float32), params)
    low[key, "next"], _ = lowmem.step(tx, stay, state, params)
  draws = [low[0]["a"], low[0]["b"], low[1]["a"], low[0, "next"]["a"]]
  for i, a in enumerate(draws):
    for b in draws[:i]:
      assert (a != b).any()
  assert_trees_equal(lowmem.init(tx, params32)[0], low[1])  # and the same again


def test_load_master_and_map_params():
  tx = optax.chain(optax.clip(1.0), lowmem.delta_bits(optax.adam(1e-2), "bf16+8"))
  params, state = lowmem.init(tx, make_params())
  params, state = jitted(updated, tx)(normal_like(params, 0), state, params)
  master = lowmem.master_params(params, state)
  for f in (lowmem.load_master, jax.jit(lowmem.load_master)):
    assert_trees_equal(f(master, state), (params, state))
  assert_trees_equal(optax.tree.map_params(tx, lambda x: x, state), state)
  with pytest.raises(TypeError, match="bias.*load_master takes float32"):
    lowmem.load_master(params, state)
  assert (optax.tree.get(state, "count") == 1).all()


def test_under_transformations():
  tx = lowmem.delta_bits(optax.sgd(0.25, momentum=0.5), "bf16+8")
  params32 = make_params()
  shapes = jax.eval_shape(functools.partial(lowmem.init, tx), params32)
  params, state = lowmem.init(tx, params32)
  chex.assert_trees_all_equal_shapes_and_dtypes(shapes, (params, state))
  assert_trees_equal(jitted(lowmem.init, tx)(params32), (params, state))
  stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params32)
  many = jax.vmap(functools.partial(lowmem.init, tx))(stacked)
  one = jax.tree.map(lambda x: x[0], many)
  assert_trees_equal(one, (params, state))
  grads = normal_like(params, 0)
  many = jax.vmap(functools.partial(lowmem.step, tx), in_axes=(None, 0, 0))(grads, *many[::-1])
  assert_trees_equal(jax.tree.map(lambda x: x[0], many), lowmem.step(tx, grads, state, params))


def test_bad_input():
  tx = lowmem.delta_bits(optax.sgd(0.1), "bf16+8")
  params, state = lowmem.init(tx, make_params())
  grads = normal_like(params, 0)
  kernel = "dense.*kernel"
  with pytest.raises(ValueError, match="params"):
    tx.update(grads, state)
  with pytest.raises(ValueError, match="params"):
    lowmem.step(tx, grads, state, None)
  with pytest.raises(ValueError, match=kernel):
    tx.update({**grads, "dense": {"bias": grads["dense"]["bias"]}}, state, params)
  with pytest.raises(ValueError, match=kernel):
    wrong = {**grads, "dense": {**grads["dense"], "kernel": jnp.zeros((2, 2))}}
    tx.update(wrong, state, params)
  with pytest.raises(TypeError, match=kernel):
    wrong = {**grads, "dense": {**grads["dense"], "kernel": jnp.zeros((40, 33), jnp.int32)}}
    tx.update(wrong, state, params)
  with pytest.raises(ValueError, match=kernel + ".*residual"):
    residuals = {
      **state.residuals,
      "dense": {**state.residuals["dense"], "kernel": jnp.zeros((40, 32), jnp.int8)},
    }
    tx.update(grads, state._replace(residuals=residuals), params)
  with pytest.raises(TypeError, match=kernel + ".*float16"):
    wrong = {
      **params,
      "dense": {**params["dense"], "kernel": params["dense"]["kernel"].astype(jnp.float16)},
    }
    tx.update(grads, state, wrong)
  with pytest.raises(TypeError, match="scale.*float16.*bf16"):
    tx.init({"scale": jnp.ones(3, jnp.float16)})
  with pytest.raises(TypeError, match="lowmem.init"):
    tx.update(grads, tx.init(make_params()), params)
  with pytest.raises(ValueError, match=r"bf16\+99"):
    lowmem.delta_bits(optax.sgd(0.1), "bf16+99")
  with pytest.raises(ValueError, match="no format for.*list"):
    lowmem.delta_bits(weights={"dense": "bf16+8", "scale": "bf16+8", "empty": "bf16+8"}).init(
      params
    )
  with pytest.raises(ValueError, match="typo"):
    lowmem.delta_bits(weights={"w": "bf16+8", "typo": "fp32"}).init({"w": jnp.ones(3)})
  with pytest.raises(ValueError, match="update_dtype"):
    lowmem.delta_bits(update_dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match="two delta_bits"):
    lowmem.init(optax.chain(lowmem.delta_bits(), lowmem.delta_bits()), make_params())


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_random_trees(data):
  """Laws 8, 10 and 11 on random trees of shapes, dtypes and formats."""
  shapes = st.sampled_from([(), (1,), (5,), (33,), (2, 3), (4, 32), (0,), (3, 0)])
  leaf = st.one_of(
    st.none(),
    st.tuples(shapes, st.sampled_from(["bf16+8", "bf16+3", "fp16+8", "bf16+0", "fp32"])),
  )
  tree = {"root": data.draw(st.recursive(leaf, lambda x: st.one_of(
      st.lists(x, max_size=3), st.dictionaries(st.sampled_from("abc"), x, max_size=3)
  ), max_leaves=5))}  # fmt: skip
  is_leaf = lambda x: isinstance(x, tuple)
  params32 = jax.tree.map(
    lambda s: jnp.linspace(-1, 1, int(np.prod(s[0]))).reshape(s[0]), tree, is_leaf=is_leaf
  )
  weights = jax.tree.map(lambda s: s[1], tree, is_leaf=is_leaf)
  tx = lowmem.delta_bits(optax.adam(1e-2), weights)
  params, state = lowmem.init(tx, params32)
  formats = jax.tree.leaves(weights)
  chex.assert_type(
    jax.tree.leaves(params), [lowmem.DeltaFormat.parse(fmt).dtype for fmt in formats]
  )
  grads = normal_like(params, 0)
  stepped, step_state = lowmem.step(tx, grads, state, params)
  assert_trees_equal(updated(tx, grads, state, params), (stepped, step_state))
  masters = lowmem.master_params(stepped, step_state)
  for m, p, fmt in zip(jax.tree.leaves(masters), jax.tree.leaves(stepped), formats, strict=True):
    assert_trees_equal(lowmem.split(m, fmt, key=0)[0], p)
    chex.assert_type(m, jnp.float32)


def warned(f) -> list[str]:
  with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    f()
  return [str(x.message) for x in found if x.category is UserWarning]


def test_init_of_float32_leaves_warns():
  """Law 17: they stay float32 and nothing is saved; once, with the first leaf and both ways out."""
  params = {"a": jnp.ones((4, 32)), "b": jnp.ones(3), "half": jnp.ones(3, jnp.bfloat16)}
  stock = functools.partial(flax.training.train_state.TrainState.create, apply_fn=None)
  for init in (
    lowmem.adamw(1e-3).init,
    lowmem.delta_bits(optax.sgd(0.1)).init,
    optax.chain(optax.clip(1.0), lowmem.adamw(1e-3)).init,
    jax.jit(lowmem.adamw(1e-3).init),
    lambda params: stock(params=params, tx=lowmem.adamw(1e-3)),
  ):
    (message,) = warned(lambda init=init: init(params))
    assert re.search(r"params\['a'\].*1 more.*lowmem\.init.*weights=\"fp32\"", message)


def test_no_warning_where_nothing_is_lost():
  params = {"a": jnp.ones((4, 32)), "b": jnp.ones(3)}
  accumulated = optax.MultiSteps(lowmem.adamw(1e-3), 2).gradient_transformation()
  injected = optax.inject_hyperparams(lowmem.adamw, hyperparam_dtype=jnp.float32)(1e-3)
  for tx in (lowmem.adamw(1e-3), accumulated, injected):
    assert not warned(lambda tx=tx: lowmem.init(tx, params))
  assert not warned(lambda: lowmem.adamw(1e-3, weights="fp32").init(params))
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  assert not warned(lambda: lowmem.adamw(1e-3).init(half))
  assert not warned(lambda: lowmem.ema(0.9).init(params))
