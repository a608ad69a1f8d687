"""Declared elementwise (contract, law 18): a user's optimizer takes the programs of lowmem.adamw."""

import functools
import pathlib
import re

from conftest import assert_trees_equal, normal_like, paired, thinned, updated
import h100
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import instructions
import optax_lowmem as lowmem

PARAMS = {"w": (24, 96), "conv": (3, 3, 5, 40), "bias": (10,), "scalar": (), "norm": (7,)}


def weights(path, leaf):
  return "fp32" if leaf.shape == PARAMS["norm"] else "bf16+8"


def make_params():
  return normal_like({name: jnp.zeros(shape) for name, shape in PARAMS.items()}, 0)


def declared(inner, key=0, weights=weights, formats=None):
  formats = {"mu": "int8", "nu": "int8"} if formats is None else formats
  inner = lowmem.quantize_state(inner, formats, "int8", key=key, elementwise=True)
  return lowmem.delta_bits(inner, weights, elementwise=True)


def run(tx, how, count=3):
  params, state = lowmem.init(tx, make_params())

  train_step = jax.jit(functools.partial(lowmem.step if how == "step" else updated, tx))
  for i in range(count):
    params, state = train_step(normal_like(params, i + 1), state, params)
  return params, state


INNERS = {
  "adabelief": optax.adabelief,
  "rmsprop": functools.partial(optax.rmsprop, momentum=0.9),
  "nadamw": optax.nadamw,
  "adan": optax.adan,
  "yogi": optax.yogi,
  "amsgrad": optax.amsgrad,
  "radam": optax.radam,
  "adamax": optax.adamax,
}
# A field of each that there is a format for.
FIELDS = {"rmsprop": {"nu": "int8"}, "adan": {"m": "int8", "n": "int8"}}


def make(name, **kwargs):
  return declared(INNERS[name](1e-2), formats=FIELDS.get(name, {"nu": "int8"}), **kwargs)


def test_adamw_is_its_own_declaration():
  """The same bits, a float32 leaf's statistics apart, which lowmem.adamw leaves in float32."""
  half = lambda path, leaf: "bf16+8"
  ours = run(lowmem.adamw(1e-2, weights=half), "step")
  theirs = run(declared(optax.adamw(1e-2), weights=half), "step")
  assert_trees_equal(jax.tree.leaves(ours), jax.tree.leaves(theirs))


@pytest.mark.parametrize("name", thinned(INNERS, "rmsprop", "adan", "amsgrad", "radam"))
def test_step_is_update(name):
  """`lowmem.step`, leaf by leaf, moves as the composed transformation does."""
  stepped, updated = (run(make(name, key=5), how) for how in ("step", "update"))
  assert_trees_equal(stepped, updated)


def test_step_takes_the_leaf_programs(monkeypatch):
  """And not the composed update: with statistics' words of their own, too."""
  from optax_lowmem.transforms import delta_bits

  monkeypatch.setattr(delta_bits, "_composed", None)
  run(make("adabelief", key=5), "step", 1)


@pytest.mark.h100
@pytest.mark.parametrize("name", INNERS)
@pytest.mark.parametrize("key", [0, 5])
def test_one_kernel_in_place(name, key):
  if key and name != "adabelief":
    pytest.skip("one optimizer with a key of its own is enough")
  tx = make(name, key=key, weights="bf16+8")
  params = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}
  params, state = h100.on_device(jax.eval_shape(functools.partial(lowmem.init, tx), params))
  step = lambda params, state, grads: lowmem.step(tx, grads, state, params)
  compiled = h100.compiled(step, params, state, params, donate=(0, 1))
  assert compiled.as_text().count('"mosaic_gpu_v2"') == 1
  assert compiled.memory_analysis().temp_size_in_bytes < 8192


def test_what_is_not_elementwise_is_refused():
  tx = lowmem.delta_bits(
    optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), elementwise=True
  )
  params, state = lowmem.init(tx, make_params())
  with pytest.raises(ValueError, match="elementwise"):
    lowmem.step(tx, normal_like(params, 1), state, params)


def test_masks_and_extra_arguments_go_by_the_composed_update():
  """A mask cannot be looked through; an extra argument may be read."""

  def scaled(factor=2.0):
    def update(updates, state, params=None, *, value, **extra):
      return jax.tree.map(lambda u: u * value * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

  tx = lowmem.delta_bits(optax.chain(scaled(), optax.sgd(0.1)), elementwise=True)
  params, state = lowmem.init(tx, make_params())
  grads = normal_like(params, 1)
  new, _ = lowmem.step(tx, grads, state, params, value=jnp.float32(0.5))
  plain = lowmem.delta_bits(optax.sgd(0.1))
  wanted, _ = lowmem.step(plain, grads, lowmem.init(plain, make_params())[1], params)
  assert_trees_equal(new, wanted)

  masked = optax.masked(optax.trace(0.9), {name: name != "bias" for name in PARAMS})
  tx = lowmem.delta_bits(optax.chain(masked, optax.scale(-0.1)), elementwise=True)
  params, state = lowmem.init(tx, make_params())
  new, _ = lowmem.step(tx, grads, state, params)
  assert all(np.any(np.asarray(new[k] != params[k])) for k in PARAMS)


@pytest.mark.parametrize(
  "make_tx, wrapper",
  paired([lowmem.adamw, lowmem.adam, lowmem.lion, lowmem.sgd], ["apply_if_finite", "MultiSteps"]),
)
def test_update_dtype(make_tx, wrapper):
  """For wrappers that demand updates in the gradient's dtype."""
  tx = make_tx(1e-2, update_dtype="gradient")
  if wrapper == "apply_if_finite":
    tx = optax.apply_if_finite(tx, 3)
  else:
    tx = optax.MultiSteps(tx, 2).gradient_transformation()
  params, state = lowmem.init(tx, make_params())
  before = params
  for i in range(2):
    updates, state = jax.jit(tx.update)(normal_like(params, i), state, params)
    assert all(updates[name].dtype == params[name].dtype for name in PARAMS)
    params = optax.apply_updates(params, updates)
  master = lowmem.master_params(params, state)
  for name in PARAMS:
    assert np.any(np.asarray(params[name] != before[name]))
    # The master is clamped to the cell of the weight that the update reaches.
    np.testing.assert_allclose(master[name], np.float32(params[name]), rtol=2.0**-8)


def test_documented_bytes():
  """The table in docs/performance.md, from benchmarks/instructions.py."""
  page = (
    (pathlib.Path(__file__).parent.parent / "docs/performance.md")
    .read_text()
    .partition("| Optax's |")[2]
  )
  rows = dict(re.findall(r"^\| (.+?) \| ([0-9.]+) \| (?:[0-9]+|XLA's) \|", page, re.MULTILINE))
  assert rows.keys() == instructions.ELEMENTWISE.keys()
  params32 = {"w": jax.ShapeDtypeStruct((1 << 10, 1 << 10), jnp.float32)}
  for name, arguments in instructions.ELEMENTWISE.items():
    inner = eval(f"quantize({arguments})", {"quantize": lowmem.quantize_state, "optax": optax})
    tx = lowmem.delta_bits(inner)
    table = lowmem.memory_table(*jax.eval_shape(functools.partial(lowmem.init, tx), params32))
    assert f"{table.bytes_per_param['total']:.2f}" == rows[name]
