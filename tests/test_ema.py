"""ema: an average of the weights in the weights' formats."""

import functools

import chex
from conftest import assert_trees_equal, mesh_of
from flax import nnx
import flax.serialization
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_lowmem as lowmem

FORMATS = ["bf16+0", "bf16+3", "bf16+8", "bf16+16", "fp16+8", "fp16+13"]


def make_values(seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    "kernel": normal(8, 64),
    "bias": normal(33),
    "scalar": normal(),
    "empty": normal(0, 4),
    "none": None,
    "masked": optax.MaskedNode(),
  }


# The averages themselves.


def weights_at(t, start):
  """A slow drift under noise, as weights late in a training run."""
  noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), t), start.shape)
  return start * (1 + 0.2 * jnp.tanh(t / 2000)) + 0.01 * noise


@functools.cache
def averaged(make, decay, steps=5000):
  """(average, exact average in float64) of 2,048 weights."""
  ema, start = make(decay), jnp.asarray(np.random.default_rng(0).normal(size=2048), jnp.float32)

  @jax.jit
  def run(state):
    def body(state, t):
      values = weights_at(t, start)
      average, state = ema.update(values, state)
      return state, values

    return jax.lax.scan(body, state, jnp.arange(steps))

  state, values = run(ema.init(start))
  factors = (1 - decay) * decay ** np.arange(steps - 1, -1, -1, dtype=np.float64)
  exact = factors @ np.asarray(values, np.float64) / factors.sum()
  if isinstance(state, lowmem.EmaState):
    average = lowmem.ema_params(state)
  else:
    average = optax.tree.bias_correction(state.ema.astype(jnp.float32), decay, steps)
  return np.asarray(average, np.float64), exact, np.asarray(start, np.float64)


def relative_error(make, decay):
  average, exact, start = averaged(make, decay)
  return np.sqrt(np.mean(((average - exact) / start) ** 2)), np.mean((average - exact) / start)


def default(decay):
  return lowmem.ema(decay)


def exact_format(decay):
  return lowmem.ema(decay, weights="bf16+16")


def half_precision(decay):
  return optax.ema(decay, accumulator_dtype=jnp.bfloat16)


@pytest.mark.parametrize("decay", [0.999, 0.9999])
def test_follows_the_exact_average(decay):
  """Within 0.05% of the weight (rms), and without bias, where bfloat16 stalls."""
  rms, mean = relative_error(default, decay)
  assert rms < 5e-4 and abs(mean) < 4 * rms / np.sqrt(2048)
  assert relative_error(exact_format, decay)[0] < 2e-6
  assert relative_error(optax.ema, decay)[0] < 5e-4  # 0.9999 in float32 is a decay of another 1e-4
  stalled, _ = relative_error(half_precision, decay)
  assert stalled > 0.05  # what this test would say of it


def beginning_at(values, **kwargs):
  """An average without debias that has seen these values alone."""
  ema = lowmem.ema(0.0, debias=False, **kwargs)
  return ema.update(values, ema.init(values))


def test_is_unbiased():
  """One weight 2**16 times: the mean goes where the average goes, in steps of 1/20 of an ulp."""
  count, decay, ulp = 1 << 16, 0.999, 2.0**-7
  ema = lowmem.ema(decay, debias=False, weights="bf16+0")
  start, goal = 1.6875, 1.6875 + ulp / 2  # the first is on the grid
  average, state = beginning_at(jnp.full(count, start), weights="bf16+0")
  chex.assert_trees_all_equal(average, jnp.full(count, start))
  for _ in range(20):
    average, state = jax.jit(ema.update)(jnp.full(count, goal), state)
  moved = np.asarray(average, np.float64) - start
  expected = (goal - start) * (1 - decay**20)
  assert set(np.unique(moved)) == {0.0, ulp}
  chance = expected / ulp
  assert abs(moved.mean() - expected) < 4 * ulp * np.sqrt(chance * (1 - chance) / count)


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_agrees_with_optax(name, debias):
  ema, reference = lowmem.ema(0.9, debias, weights=name), optax.ema(0.9, debias)
  state, other = ema.init(make_values()), reference.init(make_values())
  assert_trees_equal(optax.tree.zeros_like(make_values()), other.ema)
  for i in range(5):
    average, state = jax.jit(ema.update)(make_values(i), state)
    expected, other = jax.jit(reference.update)(make_values(i), other)
  assert state.count == other.count == 5
  chex.assert_type(jax.tree.leaves(average), jnp.float32)
  fmt = lowmem.DeltaFormat.parse(name)
  bits = fmt.extra_bits + (8 if fmt.dtype == jnp.bfloat16 else 11)
  tolerance = 5 * 2.0 ** -min(bits, 22) * (2 if fmt.extra_bits else 4)
  chex.assert_trees_all_close(average, expected, rtol=0, atol=tolerance * 4)
  assert_trees_equal(lowmem.ema_params(state), average)


def test_a_constant_is_a_fixed_point():
  """Not only on average: weights that do not move have an average that does not."""
  for name in ("bf16+0", "bf16+8"):
    ema = lowmem.ema(0.999, debias=False, weights=name)
    on_the_grid, state = beginning_at(make_values(), weights=name)
    average, _ = ema.update(on_the_grid, state)
    assert_trees_equal(average, on_the_grid)


def test_begins_at_the_weights():
  """The recipe of the docstring is the average of torch and timm."""
  decay = 0.99
  ema = lowmem.ema(decay, debias=False, weights="bf16+16")
  average, state = beginning_at(make_values(), weights="bf16+16")
  assert_trees_equal(average, make_values())
  expected = jax.tree.map(lambda x: np.asarray(x, np.float64), make_values())
  for i in range(5):
    expected = jax.tree.map(
      lambda e, v: decay * e + (1 - decay) * np.float64(v), expected, make_values(i)
    )
    average, state = ema.update(make_values(i), state)
  chex.assert_trees_all_close(average, expected, rtol=2e-6, atol=2e-6)


# The state.


def test_formats_and_bytes():
  params = {
    "w": jnp.ones((8, 64), jnp.bfloat16),
    "h": jnp.ones((8, 64), jnp.float16),
    "norm": jnp.ones(64),
    "step": jnp.array(3),
  }
  weights = lambda path, leaf: "bf16+3" if leaf.ndim == 2 else "fp32"
  state = lowmem.ema(0.9, weights=weights).init(params)
  assert jax.tree.map(lambda x: x.dtype.name, state.ema) == {
    "w": "bfloat16", "h": "bfloat16", "norm": "float32", "step": "float32",
  }  # fmt: skip
  assert state.residuals["w"].shape == (8, 24) and state.residuals["norm"] is None
  chex.assert_trees_all_equal_structs(state.ema, params)
  prefixed = lowmem.ema(
    0.9, weights={"w": "fp16+8", "h": "fp16+0", "norm": "bf16+16", "step": "fp32"}
  )
  state = prefixed.init(params)
  assert state.ema["w"].dtype == jnp.float16 and state.residuals["h"] is None
  assert state.residuals["norm"].dtype == jnp.int16


def test_leaves_without_a_format():
  """float32, also integers'; float64 as Optax has it."""
  with jax.enable_x64(True):
    values = {
      "a": jnp.linspace(-1, 1, 64, dtype=jnp.float32),
      "b": jnp.linspace(0, 1, 7, dtype=jnp.float64),
      "c": jnp.array(7),
    }
    ema, reference = lowmem.ema(0.99, weights="fp32"), optax.ema(0.99)
    state, other = ema.init(values), reference.init(values)
    for _ in range(3):
      average, state = ema.update(values, state)
      expected, other = reference.update(values, other)
    for name, dtype in dict(a=jnp.float32, b=jnp.float64, c=jnp.float32).items():
      assert average[name].dtype == state.ema[name].dtype == dtype
      np.testing.assert_allclose(average[name], expected[name], rtol=2e-6)
  values = {"steps": jnp.array(7), "w": jnp.ones(4)}
  ema = lowmem.ema(0.5)
  average, state = ema.update(values, ema.init(values))
  assert average["steps"] == 7.0 and state.ema["steps"].dtype == jnp.float32


def test_in_place():
  params = {"w": jnp.ones((64, 64), jnp.bfloat16), "b": jnp.ones(64)}
  ema = lowmem.ema(0.999)
  state = ema.init(params)
  values = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  step = jax.jit(lambda state, values: ema.update(values, state)[1], donate_argnums=0)
  memory = step.lower(state, values).compile().memory_analysis()
  total = sum(x.nbytes for x in jax.tree.leaves(state))
  assert memory.alias_size_in_bytes == total - 4  # of the correction, which is not read
  old = jax.tree.leaves((state.ema, state.residuals))
  step(state, values)
  assert all(x.is_deleted() for x in old)


def test_the_same_bits_under_transformations():
  ema = lowmem.ema(0.9, key=3)
  eager = jitted = ema.init(make_values())
  for i in range(3):
    _, eager = ema.update(make_values(i), eager)
    _, jitted = jax.jit(ema.update)(make_values(i), jitted)
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *map(make_values, range(3)))
  scanned, _ = jax.lax.scan(
    lambda state, values: (ema.update(values, state)[1], None), ema.init(make_values()), stacked
  )
  assert_trees_equal(jitted, eager)
  assert_trees_equal(scanned, eager)
  chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(ema.init, make_values()), eager)
  two = jax.tree.map(lambda x: jnp.stack([x, x]), make_values())
  states = jax.vmap(ema.init)(two)
  _, states = jax.vmap(ema.update)(two, states)
  _, alone = ema.update(make_values(), ema.init(make_values()))
  assert_trees_equal(jax.tree.map(lambda x: x[1], states), alone)
  other = lowmem.ema(0.9, key=4)
  _, other = other.update(make_values(), other.init(make_values()))
  assert (other.residuals["kernel"] != alone.residuals["kernel"]).any()


def test_other_random_bits_than_the_weights():
  """A weight is rounded with the same key, at the same step, in the same format."""
  values = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)}
  tx = lowmem.delta_bits(optax.sgd(1.0))
  params, opt_state = lowmem.init(tx, {"w": jnp.zeros((64, 64))})
  params, opt_state = lowmem.step(tx, {"w": -values["w"]}, opt_state, params)
  ema = lowmem.ema(0.0, debias=False)
  average, _ = ema.update(values, ema.init(params))
  rounded = lowmem.master_params(params, opt_state)["w"]
  differ = np.mean(np.asarray(rounded) != np.asarray(average["w"]))
  assert 0.2 < differ < 0.45  # 1/3 of independent roundings differ


def test_sharded_like_the_weights():
  ema = lowmem.ema(0.9, weights="bf16+3")
  values = [{"kernel": make_values(i)["kernel"]} for i in range(3)]
  sharding = jax.sharding.NamedSharding(mesh_of(4, 2), P("model", "data"))
  alone, sharded = ema.init(values[0]), ema.init(jax.device_put(values[0], sharding))
  assert sharded.ema["kernel"].sharding.spec == P("model", "data")
  update = jax.jit(ema.update)
  for x in values:
    _, alone = update(x, alone)
    average, sharded = update(jax.device_put(x, sharding), sharded)
  for x in (average["kernel"], sharded.ema["kernel"], sharded.residuals["kernel"]):
    assert x.sharding.is_equivalent_to(sharding, 2)
  assert_trees_equal(sharded, alone)


def test_saved_and_restored(tmp_path):
  ema = lowmem.ema(0.9)
  values = {name: make_values()[name] for name in ("kernel", "bias", "scalar", "none")}
  _, state = ema.update(values, ema.init(values))
  target = ema.init(values)
  restored = flax.serialization.from_bytes(target, flax.serialization.to_bytes(state))
  assert_trees_equal(jax.tree.map(jnp.asarray, restored), state)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "ema", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "ema", target)
  assert_trees_equal(restored, state)
  assert_trees_equal(ema.update(values, restored), ema.update(values, state))


def test_with_train_state_and_nnx():
  """The two lines, with each way to hold a model."""
  tx, ema = lowmem.adamw(1e-2), lowmem.ema(0.9)
  model = nnx.Linear(8, 64, rngs=nnx.Rngs(0))
  arrays = nnx.as_pure(nnx.state(model, nnx.Param))
  state = lowmem.TrainState.create(apply_fn=None, params=arrays, tx=tx)
  optimizer = lowmem.nnx.Optimizer(model, tx)
  a, b = ema.init(state.params), ema.init(nnx.state(model, nnx.Param))
  average, a = ema.update(state.master_params(), a)
  nnx_average, b = ema.update(optimizer.master_params(model), b)
  assert_trees_equal(nnx.as_pure(nnx_average), average)
  assert_trees_equal(nnx.as_pure(b), a)
  evaluated = nnx.clone(model)
  nnx.update(evaluated, lowmem.ema_params(b))
  assert evaluated.kernel.dtype == jnp.float32 and isinstance(evaluated.kernel, nnx.Param)
  assert_trees_equal(nnx.as_pure(nnx.state(evaluated, nnx.Param)), average)


def test_decay_may_be_traced():
  values = make_values()

  @jax.jit
  def update(decay, state):
    return lowmem.ema(decay).update(values, state)

  state = lowmem.ema(0.9).init(values)
  average, state = update(jnp.float32(0.5), state)
  expected, _ = lowmem.ema(np.float32(0.5)).update(values, lowmem.ema(0.5).init(values))
  assert_trees_equal(average, expected)
  tx = optax.inject_hyperparams(
    lowmem.ema, static_args=("debias", "weights", "key"), hyperparam_dtype=jnp.float32
  )(decay=0.5)
  injected, _ = tx.update(values, tx.init(values))
  assert_trees_equal(injected, expected)
  with pytest.raises(ValueError, match="hyperparam_dtype=jnp.float32"):
    jax.jit(update)(jnp.bfloat16(0.5), state)


def test_refuses():
  for decay in (-0.1, 1.0, 2, float("nan")):
    with pytest.raises(ValueError, match="decay is at least 0 and below 1"):
      lowmem.ema(decay)
  with pytest.raises(ValueError, match="bf16\\+99"):
    lowmem.ema(0.9, weights="bf16+99")
  with pytest.raises(ValueError, match=r"no format for params\['bias'\]"):
    lowmem.ema(0.9, weights={"kernel": "bf16+8", "scalar": "fp32", "empty": "fp32"}).init(
      make_values()
    )
  ema, values = lowmem.ema(0.9), make_values()
  state = ema.init(values)
  half = values | {"bias": values["bias"].astype(jnp.bfloat16)}
  with pytest.raises(TypeError, match=r"\['bias'\] is bfloat16.*lowmem.master_params"):
    ema.update(half, state)
  with pytest.raises(TypeError, match=r"\['bias'\] is int32, not float32"):
    ema.update(values | {"bias": jnp.zeros(33, jnp.int32)}, state)
  with pytest.raises(ValueError, match=r"\['bias'\] has shape \(3,\); the average has \(33,\)"):
    ema.update(values | {"bias": jnp.zeros(3)}, state)
  with pytest.raises(ValueError, match=r"have no leaf \['bias'\]"):
    ema.update({k: x for k, x in values.items() if k != "bias"}, state)
  with pytest.raises(ValueError, match="residual"):
    ema.update(values, state._replace(residuals=state.residuals | {"bias": None}))


def test_nothing_seen_yet_is_no_average():
  state = lowmem.ema(0.9).init(make_values())
  assert np.isnan(lowmem.ema_params(state)["kernel"]).all()
  state = lowmem.ema(0.9, debias=False).init(make_values())
  assert not lowmem.ema_params(state)["kernel"].any()
