"""Random trees, chains, gradients and interruptions: laws 8 to 14 hold.

PROPERTY_EXAMPLES=200 (`make test-all`) looks further than `make test`.
"""

import functools
import math
import os

import chex
from conftest import assert_trees_equal
import flax.serialization
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_lowmem as lowmem

EXAMPLES = settings(
  max_examples=int(os.environ.get("PROPERTY_EXAMPLES", "12")),
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(HealthCheck),
)
SHAPES = [(), (0,), (3,), (2, 33), (4, 64)]
FORMATS = ["bf16+8", "bf16+16", "bf16+0", "fp16+8", "fp16+5", "bf16+11", "fp32"]
STATES = ["fp32", "bf16", "fp16", "int8", "int4"]

leaves = st.one_of(
  st.builds(lambda shape: ("float", shape), st.sampled_from(SHAPES)),
  st.just(("none", ())),
  st.just(("masked", ())),
)
trees = st.dictionaries(st.sampled_from("abcde"), leaves, min_size=1, max_size=4).filter(
  lambda tree: any(kind == "float" for kind, _ in tree.values())
)


def build(tree, seed: int, scale: float, dtype=np.float32):
  rng = np.random.default_rng(seed)
  make = {
    "float": lambda shape: jnp.asarray(np.asarray(rng.normal(size=shape) * scale, dtype)),
    "none": lambda shape: None,
    "masked": lambda shape: optax.MaskedNode(),
  }
  return {name: make[kind](shape) for name, (kind, shape) in sorted(tree.items())}


IN_FRONT = {
  "clip": lambda: optax.clip(0.5),
  "norm": lambda: optax.clip_by_global_norm(1.0),
  "zero nans": optax.zero_nans,
  "scale": lambda: optax.scale(0.5),
}
INNER = {
  "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
  "sgd": lambda: optax.sgd(optax.linear_schedule(0.1, 0.01, 5), momentum=0.9, nesterov=True),
  "lion": lambda: optax.lion(1e-2),
  "rmsprop": lambda: optax.rmsprop(1e-2),
  "adabelief": lambda: optax.adabelief(1e-2),
}
OURS = {
  "adamw": lowmem.adamw,
  "adam": lowmem.adam,
  "lion": lowmem.lion,
  "sgd": functools.partial(lowmem.sgd, momentum=0.9),
}


@st.composite
def transformations(draw):
  """One of Optax with ours at a random place; the formats of the weights."""
  weights = draw(st.sampled_from(FORMATS[:-1]))
  if draw(st.booleans()):  # mixed dtypes
    by_name = draw(st.fixed_dictionaries(dict.fromkeys("abcde", st.sampled_from(FORMATS))))
    weights = lambda path, leaf: by_name[path[-1].key]
  where = draw(st.sampled_from(["around", "behind", "ours", "quantized", "masked", "partition"]))
  front = [IN_FRONT[name]() for name in draw(st.lists(st.sampled_from(list(IN_FRONT)), max_size=2))]
  inner = INNER[draw(st.sampled_from(list(INNER)))]()
  ours = lowmem.delta_bits(inner, weights, key=draw(st.integers(0, 9)))
  if where == "around":
    tx = lowmem.delta_bits(optax.chain(*front, inner), weights)
  elif where == "behind":
    tx = optax.chain(*front, inner, lowmem.delta_bits(weights=weights))
  elif where == "ours":
    tx = optax.chain(*front, OURS[draw(st.sampled_from(list(OURS)))](1e-2, weights=weights))
  elif where == "quantized":
    quantized = lowmem.quantize_state(inner, {}, default=draw(st.sampled_from(STATES)))
    tx = optax.chain(*front, lowmem.delta_bits(quantized, weights))
  elif where == "masked":
    tx = optax.chain(*front, optax.masked(ours, lambda p: jax.tree.map(lambda x: x.ndim > 0, p)))
  else:
    label = lambda p: jax.tree.map(lambda x: "low" if x.ndim else "wide", p)
    tx = optax.chain(*front, optax.partition({"low": ours, "wide": optax.sgd(0.1)}, label))
  if draw(st.booleans()):
    tx = lowmem.dynamic_loss_scale(tx, init_scale=2.0 ** draw(st.integers(0, 12)))
  return tx


def half_of(params):
  return {
    k: x for k, x in params.items() if getattr(x, "dtype", None) in (jnp.bfloat16, jnp.float16)
  }


def check_landed(params, opt_state):
  """Law 3 by law 8: each weight is a nearest one of its master."""
  masters = lowmem.master_params(params, opt_state)
  for name, low in half_of(params).items():
    master = np.asarray(masters[name], np.float64)
    low = np.asarray(low, np.float64)
    finite = np.isfinite(low)
    info = jnp.finfo(params[name].dtype)
    # Half the distance to the next of the weight's dtype, at the larger of both.
    size = np.maximum(np.abs(master), np.abs(low))
    exponent = np.floor(np.log2(np.maximum(size, float(info.smallest_normal))))
    spacing = 2.0 ** (exponent - info.nmant)
    assert (np.abs(master - low) <= spacing / 2)[finite].all(), name


@EXAMPLES
@given(trees, transformations(), st.integers(0, 1 << 16), st.data())
def test_laws(tree, tx, seed, data):
  params, opt_state = lowmem.init(tx, build(tree, seed, 1.0))
  check_landed(params, opt_state)
  has_scale = isinstance(opt_state, lowmem.LossScaleState)
  step = jax.jit(functools.partial(lowmem.step, tx))
  update = jax.jit(tx.update)
  bad_step = data.draw(st.integers(0, 3)) if has_scale else None
  stop = data.draw(st.integers(0, 3))
  for i in range(4):
    grads = build(tree, seed + i + 1, 0.1)
    grads = {k: g.astype(params[k].dtype) if hasattr(g, "dtype") else g for k, g in grads.items()}
    if i == bad_step:
      names = [k for k, g in grads.items() if hasattr(g, "size") and g.size]
      if names:
        name = data.draw(st.sampled_from(names))
        bad = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        flat = grads[name].reshape(-1)
        grads[name] = (
          flat.at[data.draw(st.integers(0, flat.size - 1))].set(bad).reshape(grads[name].shape)
        )
        before, (after, skipped) = (params, opt_state), step(grads, opt_state, params)
        assert_trees_equal(after, params)  # law 12
        assert_trees_equal(skipped.inner_state, opt_state.inner_state)
        assert int(skipped.skipped) == 1 and float(skipped.scale) <= float(before[1].scale)
        updates, by_update = update(grads, opt_state, params)
        assert_trees_equal(optax.apply_updates(params, updates), params)
        assert_trees_equal(by_update, skipped)
        opt_state = skipped
        continue
    if i == stop:  # law 14
      target = jax.tree.map(jnp.zeros_like, (params, opt_state))
      saved = flax.serialization.to_bytes((params, opt_state))
      restored = flax.serialization.from_bytes(target, saved)
      assert_trees_equal(step(grads, *restored[::-1]), step(grads, opt_state, params))
    # Law 8: apply_updates lands on weights that the residuals belong to.
    updates, state_by_update = update(grads, opt_state, params)
    chex.assert_type(jax.tree.leaves(updates), jnp.float32)
    check_landed(optax.apply_updates(params, updates), state_by_update)
    chex.assert_trees_all_equal_structs(state_by_update, opt_state)
    params, opt_state = step(grads, opt_state, params)
    check_landed(params, opt_state)


@EXAMPLES
@given(trees, st.sampled_from(sorted(INNER)), st.integers(0, 1 << 16))
def test_exact_and_untouched_leaves_follow_optax(tree, inner, seed):
  """Laws 9 and 10: bf16+16 is float32 (within 1 ulp a step); a leaf in "fp32" is Optax's own."""
  params32 = build(tree, seed, 1.0)
  tx, plain = lowmem.delta_bits(INNER[inner](), "bf16+16"), INNER[inner]()
  untouched = lowmem.delta_bits(INNER[inner](), "fp32")
  params, opt_state = lowmem.init(tx, params32)
  same, same_state = lowmem.init(untouched, params32)

  @jax.jit
  def both(grads, opt_state, params, plain_state, wide, same_state, same):
    updates, opt_state = tx.update(grads, opt_state, params)
    u, plain_state = plain.update(grads, plain_state, wide)
    v, same_state = untouched.update(grads, same_state, same)
    return (updates, opt_state), (u, plain_state), (v, same_state)

  wide, plain_state = params32, plain.init(params32)
  for i in range(3):
    grads = build(tree, seed + i + 1, 0.1)
    ours, theirs, third = both(grads, opt_state, params, plain_state, wide, same_state, same)
    params, opt_state = optax.apply_updates(params, ours[0]), ours[1]
    wide, plain_state = optax.apply_updates(wide, theirs[0]), theirs[1]
    same, same_state = optax.apply_updates(same, third[0]), third[1]
    assert_trees_equal(same, wide)
    masters = lowmem.master_params(params, opt_state)
    chex.assert_trees_all_close(masters, wide, rtol=3e-7 * (i + 1), atol=2e-8 * (i + 1))
