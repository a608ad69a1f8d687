"""Traps on the way in: each error says what was found, where, and what to write instead."""

import functools
import pathlib
import re
import warnings

import chex
from conftest import assert_trees_equal, normal_like, updated
import equinox as eqx
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
import pytest

import optax_lowmem as lowmem

TX = lowmem.adamw(1e-2)


def params32():
  return {"w": jnp.full((4, 32), 0.5), "b": jnp.zeros(32)}


def started(tx=TX):
  params, state = lowmem.init(tx, params32())
  return normal_like(params, 0), state, params


# Leaves that look like float32 arrays.


@pytest.mark.parametrize(
  ("leaf", "message"),
  [
    (0.5, r"params\['s'\] is the Python float 0.5.*jnp.float32\(0.5\)"),
    (np.ones(3), r"params\['s'\] is a NumPy array of float64.*astype\(np.float32\)"),
    (np.float64(2), r"params\['s'\] is a NumPy array of float64.*astype\(np.float32\)"),
  ],
)
def test_leaf_without_a_float32_dtype(leaf, message):
  for tree in ({"w": jnp.ones(32), "s": leaf}, {"s": [leaf]}):
    where = message.replace(r"\['s'\]", r"\['s'\]\[0\]") if "w" not in tree else message
    with pytest.raises(TypeError, match=where):
      lowmem.init(TX, tree)


def test_weights_callable_meets_no_python_float():
  weights = lambda path, leaf: "bf16+8" if leaf.ndim > 1 else "fp32"
  with pytest.raises(TypeError, match=r"params\['s'\] is the Python float"):
    lowmem.init(lowmem.adamw(1e-2, weights=weights), {"s": 0.5})


# Arguments in the wrong place.

_UNPACK = r"params, opt_state = lowmem.init\(tx, params32\)"


def test_result_of_init_not_unpacked():
  grads, state, params = started()
  pair = params, state
  with pytest.raises(TypeError, match=rf"params\[1\] is a DeltaBitsState.*{_UNPACK}"):
    lowmem.step(TX, grads, state, pair)
  for call in (lowmem.step, lambda tx, *args: tx.update(*args)):
    for tx in (TX, optax.chain(optax.clip(1.0), TX), lowmem.static_loss_scale(TX, 2.0)):
      state = lowmem.init(tx, params32())[1]
      with pytest.raises(TypeError, match=r"state, and got a tuple.*lowmem.init"):
        call(tx, grads, (params, state), params)
  with pytest.raises(TypeError, match=rf"got a tuple with a DeltaBitsState at \[1\].*{_UNPACK}"):
    lowmem.step(TX, grads, pair, params)
  with pytest.raises(TypeError, match=_UNPACK):
    lowmem.master_params(pair, pair[1])
  with pytest.raises(TypeError, match=_UNPACK):
    lowmem.init(TX, pair)


def test_swapped_arguments():
  grads, state, params = started()
  order = r"lowmem.step\(tx, grads, opt_state, params\)"
  with pytest.raises(TypeError, match=f"params is a DeltaBitsState.*{order}"):
    lowmem.step(TX, grads, params, state)
  with pytest.raises(TypeError, match=f"grads is a DeltaBitsState.*{order}"):
    lowmem.step(TX, state, grads, params)
  with pytest.raises(TypeError, match=f"got a dict.*{order}"):
    lowmem.step(TX, grads, params, params)
  with pytest.raises(TypeError, match=r"got a dict.*tx.update\(grads, opt_state, params\)"):
    TX.update(grads, params, state)
  with pytest.raises(TypeError, match=f"tx is a dict.*{order}"):
    lowmem.step(grads, TX, state, params)
  with pytest.raises(TypeError, match=r"tx is a dict.*lowmem.init\(tx, params\)"):
    lowmem.init(params32(), TX)
  for function in (lowmem.master_params, lowmem.load_master, lowmem.memory_table):
    with pytest.raises(TypeError, match=rf"{function.__name__}\(params, opt_state\)"):
      function(state, params)


def test_gradients_without_a_frozen_leaf():
  grads, state, params = started()
  for given in ({"w": grads["w"]}, {"w": grads["w"], "b": None}):
    for call in (lowmem.step, lambda tx, *args: tx.update(*args)):
      with pytest.raises(ValueError, match=r"grads have no leaf \['b'\].*None in its place"):
        call(TX, given, state, params)


# Formats.


@pytest.mark.parametrize(
  ("dtype", "name"),
  [
    (jnp.bfloat16, "bf16"),
    ("bfloat16", "bf16"),
    (jnp.dtype(jnp.float16), "fp16"),
    (jnp.float32, "fp32"),
    (np.int8, "int8"),
  ],
)
def test_dtype_as_a_format_of_statistics(dtype, name):
  for make in (
    lambda: lowmem.adamw(1e-3, mu=dtype),
    lambda: lowmem.adam(1e-3, nu=dtype),
    lambda: lowmem.sgd(1e-3, accumulator=dtype),
    lambda: lowmem.quantize_state(optax.adam(1e-3), {"mu": dtype}),
  ):
    with pytest.raises(ValueError, match=f'Write "{name}"'):
      make()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "bfloat16", "bf16", jnp.dtype(jnp.bfloat16)])
def test_dtype_as_a_format_of_weights(dtype):
  with pytest.raises((TypeError, ValueError), match=r'Write "bf16\+8"'):
    lowmem.adamw(1e-3, weights=dtype)
  with pytest.raises((TypeError, ValueError), match=r"weights= for \['w'\].*Write"):
    lowmem.delta_bits(weights={"w": dtype})


def test_no_format_of_weights():
  with pytest.raises(ValueError, match=r'weights=None is no format. Write "fp32"'):
    lowmem.adamw(1e-3, weights=None)
  with pytest.raises(ValueError, match=r"no format for params\['w'\].*fp32"):
    lowmem.init(lowmem.adamw(1e-3, weights={"w": None, "b": "fp32"}), params32())
  with pytest.raises(TypeError, match=r"weights= for \['b'\].*got None"):
    lowmem.init(lowmem.adamw(1e-3, weights=lambda path, leaf: None), params32())


# Optax's wrappers: docs/wrappers.md.


@pytest.mark.parametrize("call", [lowmem.step, updated])
@pytest.mark.parametrize(
  ("name", "wrap"),
  [
    ("apply_if_finite", lambda tx: optax.apply_if_finite(tx, 5)),
    ("conditionally_mask", lambda tx: optax.conditionally_mask(tx, lambda step: step >= 0)),
  ],
)
def test_wrappers_that_demand_the_gradients_dtype(name, wrap, call):
  tx = wrap(optax.chain(optax.clip(1.0), TX))
  grads, state, params = started(tx)
  message = rf"{name} demands.*bfloat16.*delta_bits\(optax.{name}.*update_dtype=\"gradient\""
  with pytest.raises(ValueError, match=message):
    call(tx, grads, state, params)
  call(tx, jax.tree.map(jnp.float32, grads), state, params)  # float32 gradients are fine


@pytest.mark.parametrize("call", [lowmem.step, updated])
@pytest.mark.parametrize(
  ("name", "wrap"),
  [
    ("mechanize", contrib.mechanize),
    ("sam", lambda tx: contrib.sam(tx, optax.sgd(0.1))),
    ("schedule_free", lambda tx: contrib.schedule_free(tx, 0.1)),
    ("conditionally_transform", lambda tx: optax.conditionally_transform(tx, lambda step: True)),
  ],
)
def test_wrappers_that_change_updates(name, wrap, call):
  """`lowmem.init` refuses them; `tx.init` cannot, so the step does."""
  with pytest.raises(ValueError, match=rf"^{name} stands.*lowmem.delta_bits\("):
    lowmem.init(wrap(TX), params32())
  grads, _, params = started()
  for tx in (wrap(TX), wrap(lowmem.adamw(1e-2, update_dtype="gradient"))):
    with pytest.raises(ValueError, match=rf"^{name} stands.*lowmem.delta_bits\("):
      call(tx, grads, tx.init(params), params)


@pytest.mark.parametrize(
  "wrap", [contrib.mechanize, lambda tx: optax.conditionally_transform(tx, lambda step: True)]
)
def test_wrappers_may_change_updates_without_residuals(wrap):
  tx, params = wrap(TX), params32()
  updates, _ = tx.update(normal_like(params, 0), tx.init(params), params)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def rows():
  text = (pathlib.Path(__file__).parent.parent / "docs/wrappers.md").read_text()
  return re.findall(r"^\| `(.*X.*)` \| (.*) \|$", text, re.MULTILINE)


def after_four_steps(tx):
  """The weights after two calls of `lowmem.step` and two of `tx.update`."""
  params, state = lowmem.init(tx, params32())
  for i, call in enumerate([lowmem.step, updated] * 2):
    grads = normal_like(jax.tree.map(jnp.bfloat16, params32()), i)
    grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
    if hasattr(state, "adv_state") or hasattr(getattr(state, "inner_state", None), "adv_state"):
      call = functools.partial(call, grad_fn=lambda params, _, grads=grads: grads)
    params, state = call(tx, grads, state, params)
  return lowmem.master_params(params, state)


@pytest.mark.parametrize(("code", "verdict"), rows())
def test_table_of_wrappers(code, verdict):
  wrap = eval(f"lambda X: {code}", {"optax": optax, "contrib": contrib, "jnp": jnp})
  ours = functools.partial(lowmem.adamw, 1e-2, weights="bf16+16", mu="fp32", nu="fp32")
  outermost = lambda: after_four_steps(lowmem.delta_bits(wrap(optax.adamw(1e-2)), "bf16+16"))
  if verdict == "does not work":
    for run in (lambda: lowmem.init(wrap(ours()), params32()), outermost):
      with pytest.raises((AttributeError, ValueError)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after_four_steps(wrap(ours()))
        run()
    return
  expected = after_four_steps(wrap(optax.adamw(1e-2)))
  found = {}
  if verdict == "works":
    found["works"] = after_four_steps(wrap(ours()))
  else:
    with pytest.raises(ValueError):
      after_four_steps(wrap(ours()))
  if verdict == 'needs `update_dtype="gradient"`':
    found["needs"] = after_four_steps(wrap(ours(update_dtype="gradient")))
  if verdict in ("wrap outermost", 'needs `update_dtype="gradient"`'):
    found["outermost"] = outermost()
  assert found  # the verdict is one of these
  for params in found.values():
    chex.assert_trees_all_close(params, expected, atol=5e-4)


def test_table_of_wrappers_is_whole():
  assert len(rows()) >= 15 and {verdict for _, verdict in rows()} == {
    "works", 'needs `update_dtype="gradient"`', "wrap outermost", "does not work",
  }  # fmt: skip


@pytest.mark.parametrize("inner", [lambda x: x, lambda x: lowmem.quantize_state(x, {"z": "fp32"})])
def test_schedule_free_eval_params(inner):
  """They are those of Optax on float32 weights."""
  plain = contrib.schedule_free(optax.sgd(0.1), 0.1)
  tx = lowmem.delta_bits(inner(plain), "bf16+16")
  grads, state, params = started(tx)
  params, state = lowmem.step(tx, grads, state, params)
  wide = jax.tree.map(jnp.float32, grads)
  params_of_plain, plain_state = updated(plain, wide, plain.init(params32()), params32())
  expected = contrib.schedule_free_eval_params(plain_state, params_of_plain)
  masters = lowmem.master_params(params, state)
  found = contrib.schedule_free_eval_params(state, masters)
  chex.assert_trees_all_close(found, expected, rtol=1e-6)
  with pytest.raises(AttributeError):
    contrib.schedule_free_eval_params(started()[1], masters)


# Modules with leaves that are no arrays.


class Layer(eqx.Module):
  weight: jax.Array
  activation: object = jax.nn.relu
  rate: float = 0.5
  name: str = "layer"

  def __call__(self, x):
    return self.activation(x @ self.weight) * self.rate


def module_loss(model, x):
  return jnp.sum(model(x).astype(jnp.float32) ** 2)


@pytest.mark.parametrize("make", [lowmem.adamw, optax.adamw])
def test_settings_of_a_module(make):
  tx, model = make(1e-2), Layer(jnp.full((32, 32), 0.1))
  x = jnp.ones((2, 32))
  model, state = lowmem.init(tx, model)
  assert model.activation is jax.nn.relu and model.rate == 0.5 and model.name == "layer"
  half = make is lowmem.adamw
  assert model.weight.dtype == (jnp.bfloat16 if half else jnp.float32)
  grads = eqx.filter_grad(module_loss)(model, x)
  assert grads.rate is None
  stepped, state = eqx.filter_jit(lambda *args: lowmem.step(tx, *args))(grads, state, model)
  assert stepped.activation is jax.nn.relu and stepped.rate == 0.5 and stepped.name == "layer"
  assert module_loss(stepped, x) < module_loss(model, x)
  masters = lowmem.master_params(stepped, state)
  assert masters.activation is jax.nn.relu and masters.weight.dtype == jnp.float32
  table = lowmem.memory_table(stepped, state)
  assert table.num_params == 32 * 32
  assert table.parts["weights"] == stepped.weight.nbytes
  # The same bits as with the arrays alone.
  arrays = lambda tree: eqx.filter(tree, eqx.is_array)
  alone, alone_state = lowmem.init(tx, arrays(Layer(jnp.full((32, 32), 0.1))))
  alone, alone_state = lowmem.step(tx, arrays(grads), alone_state, alone)
  chex.assert_trees_all_close(*(jax.tree.map(jnp.float32, arrays(m)) for m in (alone, stepped)))
  assert_trees_equal(lowmem.load_master(masters, state)[0].weight, stepped.weight)


def test_setting_with_a_gradient():
  """A number that the user differentiates is no setting; nothing is dropped in silence."""
  layer = Layer(jnp.full((32, 32), 0.1), activation=None, name=None)
  model, state = lowmem.init(TX, layer)
  grads = jax.grad(lambda model: jnp.sum(model.weight) * model.rate)(model)
  with pytest.raises(TypeError, match=r"params.rate is 0.5, no array.*jnp.asarray\(0.5\)"):
    lowmem.step(TX, grads, state, model)


# The dtype of the computation.


@pytest.mark.parametrize("weights", ["bf16+0", "bf16+8", "fp16+8", "bf16+16"])
def test_gradient_through_master_params(weights):
  """It equals the masters' gradient, rounded to the weights' dtype. It was zero once."""
  params, state = lowmem.init(lowmem.adamw(1e-2, weights=weights), {"w": jnp.full((4, 32), 0.3)})
  loss = lambda masters: jnp.sum(masters["w"] ** 3)
  grads = jax.jit(jax.grad(lambda p: loss(lowmem.master_params(p, state))))(params)
  expected = jax.grad(loss)(lowmem.master_params(params, state))["w"].astype(params["w"].dtype)
  chex.assert_trees_all_close(grads["w"].astype(float), expected.astype(float), rtol=2**-8)
  assert grads["w"].dtype == params["w"].dtype and jnp.all(grads["w"] > 0.25)


def test_logits_of_flax_modules_without_a_dtype():
  tokens = jnp.arange(3)
  linen = nn.Sequential([nn.Embed(10, 32), nn.Dense(32), nn.LayerNorm()])
  params = linen.init(jax.random.key(0), tokens)["params"]
  params, state = lowmem.init(TX, params)
  apply = jax.jit(lambda params: linen.apply({"params": params}, tokens))
  assert apply(params).dtype == jnp.bfloat16
  assert apply(lowmem.master_params(params, state)).dtype == jnp.float32
  model, x = nnx.Linear(32, 32, rngs=nnx.Rngs(0)), jnp.ones((1, 32), jnp.bfloat16)
  optimizer = lowmem.nnx.Optimizer(model, TX)
  assert model(x).dtype == jnp.bfloat16
  assert nnx.merge(nnx.graphdef(model), optimizer.master_params(model))(x).dtype == jnp.float32


# memory_table.


def test_memory_table_of_accumulated_gradients():
  params = {"w": jnp.ones((64, 64))}
  plain = lowmem.memory_table(*lowmem.init(TX, params)).parts
  for tx in (
    optax.MultiSteps(TX, 2),
    optax.MultiSteps(TX, 2).gradient_transformation(),
    lowmem.delta_bits(optax.MultiSteps(lowmem.quantize_state(optax.adamw(1.0)), 2)),
  ):
    parts = lowmem.memory_table(*lowmem.init(tx, params)).parts
    assert parts["accumulated gradients"] == 4 * 64 * 64
    assert all(parts[x] == plain[x] for x in ("weights", "residuals", "moments"))
  assert "accumulated gradients" not in plain


def test_memory_table_of_an_nnx_state():
  model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
  optimizer = lowmem.nnx.Optimizer(model, TX)
  params = nnx.state(model, nnx.Param)
  assert lowmem.memory_table(params, optimizer.opt_state).parts["residuals"] == 64 * 65
  with pytest.raises(TypeError, match=r"tree of names.*optimizer.opt_state"):
    lowmem.memory_table(params, nnx.state(optimizer.opt_state))
  plain = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
  tables = [lowmem.memory_table(params, x) for x in (plain.opt_state, nnx.state(plain.opt_state))]
  assert tables[0].parts == tables[1].parts and tables[0].parts["moments"]


@pytest.mark.parametrize(
  "make",
  [
    lambda: lowmem.adamw(1e-3, mu=None),
    lambda: lowmem.adam(1e-3, nu=None),
    lambda: lowmem.scale_by_adam(nu=None),
    lambda: lowmem.sgd(0.1, 0.9, accumulator=None),
    lambda: lowmem.muon(0.1, adam_mu=None),
  ],
)
def test_no_format(make):
  with pytest.raises(ValueError, match="=None names no format"):
    make()


def test_quantize_state_of_another_state():
  tx = lowmem.quantize_state(optax.adam(1e-3))
  params = {"w": jnp.ones((4, 32))}
  with pytest.raises(TypeError, match="quantize_state takes a QuantizedState"):
    tx.update(params, optax.adam(1e-3).init(params), params)
