"""Gradient release: laws 15 and 16."""

from typing import NamedTuple

import chex
from conftest import assert_trees_equal, running_kernels, thinned
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem

WIDTH, LAYERS, VOCABULARY = 64, 3, 40


def make_params(seed=0):
  k = iter(jax.random.split(jax.random.key(seed), 8))
  normal = lambda *shape: 0.1 * jax.random.normal(next(k), shape)
  return {
    "embed": {"table": normal(VOCABULARY, WIDTH)},
    "blocks": {
      "up": normal(LAYERS, WIDTH, 2 * WIDTH),
      "down": normal(LAYERS, 2 * WIDTH, WIDTH),
      "bias": normal(LAYERS, 2 * WIDTH),
      "gain": jnp.ones(LAYERS),
    },
    "norm": {"scale": jnp.ones(WIDTH)},
    "head": {"kernel": normal(WIDTH, 37), "bias": jnp.zeros(37)},
    "unused": {"w": normal(5, 32)},
  }


def embed(w, tokens):
  return w["table"][tokens]


def block(w, x):
  h = jax.nn.gelu(x @ w["up"] + w["bias"])
  return x + w["gain"] * (h @ w["down"])


def norm(w, x):
  return x * w["scale"] * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


def head(w, x, targets):
  logits = (x @ w["kernel"] + w["bias"]).astype(jnp.float32)
  return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def loss_fn(layers, tokens, targets):
  x = layers["embed"](embed, tokens)
  x = layers["blocks"].scan(block, x)
  x = layers["norm"](norm, x)
  return layers["head"](head, x, targets)


class Plain:
  """Layers that JAX differentiates as usual."""

  def __init__(self, weights):
    self.weights = weights

  def __call__(self, fn, *args):
    return jax.checkpoint(fn)(self.weights, *args)

  def scan(self, fn, x, *args):
    return jax.lax.scan(jax.checkpoint(lambda x, w: (fn(w, x, *args), None)), x, self.weights)[0]


def plain_step(tx, loss_fn=loss_fn, clip_norm=None):
  """value_and_grad, then lowmem.step."""

  def step(params, opt_state, *batch):
    def scaled(params):
      loss = loss_fn({key: Plain(w) for key, w in params.items()}, *batch)
      return lowmem.scale_loss(loss, opt_state), loss

    grads, loss = jax.grad(scaled, has_aux=True)(params)
    return loss, *lowmem.step(tx, grads, opt_state, params)

  return jax.jit(step)


def batches(count, size=8):
  rng = np.random.default_rng(0)
  shape = (count, size)
  return [*zip(rng.integers(0, VOCABULARY, shape), rng.integers(0, 37, shape), strict=True)]


def weights(path, leaf):
  return "fp32" if "norm" in jax.tree_util.keystr(path) else "bf16+8"


def decayed(params):
  return jax.tree.map(lambda x: x.ndim > 1, params)


OPTIMIZERS = {
  "adamw": lambda **kw: lowmem.adamw(1e-2, weight_decay=0.1, mask=decayed, **kw),
  "adam": lambda **kw: lowmem.adam(optax.linear_schedule(1e-2, 1e-3, 4), nesterov=True, **kw),
  "lion": lambda **kw: lowmem.lion(1e-3, mask=decayed, **kw),
  "momentum": lambda **kw: lowmem.sgd(0.1, momentum=0.9, **kw),
  "sgd": lambda **kw: lowmem.sgd(0.1, **kw),
}


def check_same(tx, count=4, released=None, loss_fn=loss_fn, params=None, traces=1):
  """Law 15: the same losses and, bit for bit, the same states."""
  a = b = lowmem.init(tx, make_params() if params is None else params)
  chex.clear_trace_counter()
  released = lowmem.fused_backward(loss_fn, tx) if released is None else released
  released = jax.jit(chex.assert_max_traces(released, n=traces))
  plain = plain_step(tx, loss_fn)
  for batch in batches(count):
    loss, *a = released(*a, *batch)
    wanted, *b = plain(*b, *batch)
    assert float(loss) == float(wanted)
    assert_trees_equal(a, b)
  return a


@pytest.mark.parametrize("name", thinned(OPTIMIZERS, "adamw", "momentum"))
def test_law_15(name):
  check_same(OPTIMIZERS[name](weights=weights))


DECLARED = {
  "adabelief": lambda: lowmem.delta_bits(optax.adabelief(1e-2), weights, elementwise=True),
  "chain": lambda: lowmem.delta_bits(
    optax.chain(optax.clip(0.5), optax.scale_by_adam(), optax.scale_by_schedule(lambda n: -1e-2 / (n + 1))),
    "bf16+3", key=3, elementwise=True,
  ),
  "quantized": lambda: lowmem.delta_bits(
    lowmem.quantize_state(optax.adamw(1e-2), key=5, elementwise=True), weights, elementwise=True
  ),
  "statistics": lambda: lowmem.quantize_state(optax.rmsprop(1e-2, momentum=0.9), {"nu": "int8"}, elementwise=True),
}  # fmt: skip


@pytest.mark.parametrize("name", thinned(DECLARED, "quantized"))
def test_law_15_declared_elementwise(name):
  check_same(DECLARED[name]())


@pytest.mark.thorough
@pytest.mark.parametrize(
  "fmt, moments",
  [("bf16+0", "bf16"), ("bf16+16", "fp32"), ("fp16+8", "fp16"), ("bf16+5", "int8")],
)
def test_law_15_formats(fmt, moments):
  check_same(lowmem.adamw(1e-2, weights=fmt, mu=moments, nu=moments), count=2)


def test_law_15_int4():
  check_same(lowmem.adamw(1e-2, weights="bf16+0", mu="int4", nu="int4"), count=2)


def test_it_is_released():
  """No gradient of the whole model: compiled, the temporaries are a small part of one."""
  width, count = 256, 32
  params = {"layers": {"w": 0.1 * jax.random.normal(jax.random.key(0), (count, width, width))}}
  loss = lambda layers, x: jnp.mean(
    layers["layers"].scan(lambda w, x: jnp.tanh(x @ w["w"]), x) ** 2
  )
  tx = lowmem.adamw(1e-3)
  state = lowmem.init(tx, params)
  x = jnp.ones((4, width), jnp.bfloat16)
  temporaries = [
    jax.jit(step, donate_argnums=(0, 1))
    .lower(*state, x)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for step in (lowmem.fused_backward(loss, tx), plain_step(tx, loss))
  ]
  gradient = 2 * count * width * width
  assert temporaries[0] < 0.5 * gradient and temporaries[1] > gradient


def overflowing(layers, tokens, targets, boost):
  """A loss whose gradient overflows where boost is infinite."""
  return loss_fn(layers, tokens, targets) * boost


@pytest.mark.parametrize("accumulate", thinned([1, 2], 2))
def test_law_16_overflow(accumulate):
  """A skipped step leaves everything but the loss scale; the others are law 15's."""
  tx = lowmem.dynamic_loss_scale(
    lowmem.adamw(1e-2, weights=weights, weight_decay=0.1), init_scale=2.0**10, growth_interval=2
  )
  released = jax.jit(lowmem.fused_backward(overflowing, tx, accumulate=accumulate))
  plain = plain_step(tx, overflowing)
  a = b = lowmem.init(tx, make_params())
  for i, batch in enumerate(batches(6)):
    boost = jnp.float32(np.inf if i in (1, 4) else 1.0)
    before = a
    if accumulate > 1:
      boost = jnp.stack([jnp.float32(1.0), boost])[:, None]
      boosted = lambda layers, t, y, boost: overflowing(layers, t, y, boost[0, 0])
      if i == 0:
        released = jax.jit(lowmem.fused_backward(boosted, tx, accumulate=2))
    _, *a = released(*a, *batch, boost)
    if i in (1, 4):
      assert_trees_equal((before[0], before[1].inner_state), (a[0], a[1].inner_state))
      assert a[1].scale == before[1].scale / 2 and a[1].skipped == before[1].skipped + 1
    if accumulate == 1:
      _, *b = plain(*b, *batch, boost)
      assert_trees_equal(a, b)
  assert a[1].skipped == 2 and lowmem.loss_scale(a[1]) == 2.0**9


@pytest.mark.parametrize("scaled", thinned([False, True], True))
def test_law_16_clipping(scaled):
  """As optax.clip_by_global_norm of the float32 gradients, in front of the optimizer."""
  tx = lowmem.sgd(0.1, weights="bf16+16")
  chain = optax.chain(optax.clip_by_global_norm(0.01), tx)
  if scaled:
    tx, chain = (lowmem.static_loss_scale(x, 2.0**8) for x in (tx, chain))
  free = jax.jit(lowmem.fused_backward(loss_fn, tx, clip_norm=1e6))
  clipped = jax.jit(lowmem.fused_backward(loss_fn, tx, clip_norm=0.01))

  def plain(params, opt_state, *batch):
    def loss(params):
      return lowmem.scale_loss(loss_fn({k: Plain(w) for k, w in params.items()}, *batch), opt_state)

    grads = jax.tree.map(lambda g: g.astype(jnp.float32), jax.grad(loss)(params))
    return lowmem.step(chain, grads, opt_state, params)

  start = lowmem.init(tx, make_params())
  (batch,) = batches(1)
  _, *a = clipped(*start, *batch)
  b = jax.jit(plain)(*lowmem.init(chain, make_params()), *batch)
  old, new, wanted = (lowmem.master_params(*t) for t in (start, a, b))
  moved = optax.tree.norm(jax.tree.map(jnp.subtract, new, old))
  np.testing.assert_allclose(moved, 0.1 * 0.01, rtol=1e-3)
  chex.assert_trees_all_close(new, wanted, rtol=1e-6, atol=1e-8)
  # A norm below the limit changes nothing, to the bit.
  unclipped = jax.jit(lowmem.fused_backward(loss_fn, tx))
  assert_trees_equal(free(*start, *batch), unclipped(*start, *batch))


def test_clipping_what_is_not_finite():
  """Without a loss scale a NaN goes everywhere, as in Optax; nothing is silently skipped."""
  tx = lowmem.sgd(0.1)
  step = jax.jit(lowmem.fused_backward(overflowing, tx, clip_norm=1.0))
  _, params, _ = step(*lowmem.init(tx, make_params()), *batches(1)[0], jnp.float32(np.nan))
  assert np.isnan(np.asarray(params["head"]["kernel"], np.float32)).all()


def micro_losses(tx, n, params, batch):
  """Gradients of n micro-batches, in float32."""

  def loss(params, tokens, targets):
    return loss_fn({k: Plain(w) for k, w in params.items()}, tokens, targets)

  cut = lambda x, i: x[i * len(x) // n : (i + 1) * len(x) // n]
  return [jax.grad(loss)(params, *(cut(x, i) for x in batch)) for i in range(n)]


def assert_norms_close(x, y, rtol):
  """Up to the rounding of bfloat16 activations and gradients, which depends on the program."""
  x, y = (np.asarray(t, np.float64) for t in (x, y))
  assert np.linalg.norm(x - y) <= rtol * np.linalg.norm(y) + 1e-12


def test_accumulation_of_momentum_is_exact():
  """SGD with momentum: the sum of the micro-batches is the batch."""
  tx = lowmem.sgd(0.1, momentum=0.9, weights="bf16+16", accumulator="fp32")
  whole = jax.jit(lowmem.fused_backward(loss_fn, tx))
  parts = jax.jit(lowmem.fused_backward(loss_fn, tx, accumulate=4))
  a = b = lowmem.init(tx, make_params())
  for batch in batches(3):
    loss_a, *a = whole(*a, *batch)
    loss_b, *b = parts(*b, *batch)
    np.testing.assert_allclose(loss_a, loss_b, rtol=1e-2)  # activations are bfloat16
  for x, y, z in zip(
    *map(jax.tree.leaves, (lowmem.master_params(*a), lowmem.master_params(*b), make_params())),
    strict=True,
  ):
    assert_norms_close(x - z, y - z, 0.03)


def test_adama():
  """Adam's moments after a step are those of the AdamA paper, the update is Adam's from them."""
  b1, b2, lr, n = 0.9, 0.99, 1e-2, 4
  tx = lowmem.adam(lr, b1, b2, weights="bf16+16", mu="fp32", nu="fp32")
  params, state = lowmem.init(tx, make_params())
  step = jax.jit(lowmem.fused_backward(loss_fn, tx, accumulate=n))
  m = v = jax.tree.map(jnp.zeros_like, lowmem.master_params(params, state))
  for t, batch in enumerate(batches(2), 1):
    grads = micro_losses(tx, n, params, batch)
    old = lowmem.master_params(params, state)
    _, params, state = step(params, state, *batch)
    m = jax.tree.map(
      lambda m, *g: b1 * m + (1 - b1) * sum(x.astype(jnp.float32) / n for x in g), m, *grads
    )
    v = jax.tree.map(
      lambda v, *g: b2 * v + (1 - b2) * sum((x.astype(jnp.float32) / n) ** 2 for x in g), v, *grads
    )
    (adam_state,) = [
      s
      for s in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))
      if isinstance(s, optax.ScaleByAdamState)
    ]
    new = lowmem.master_params(params, state)
    for key in ("embed", "blocks", "head", "unused"):
      for x, y in zip(
        jax.tree.leaves((adam_state.mu[key], adam_state.nu[key])),
        jax.tree.leaves((m[key], v[key])),
        strict=True,
      ):
        if x.ndim > 1:  # stacked scalars keep their gradients, which are summed
          assert_norms_close(x, y, 0.03)
      hat = jax.tree.map(
        lambda m, v: -lr * (m / (1 - b1**t)) / (jnp.sqrt(v / (1 - b2**t)) + 1e-8),
        adam_state.mu[key],
        adam_state.nu[key],
      )
      wanted = jax.tree.map(jnp.add, old[key], hat)
      chex.assert_trees_all_close(new[key], wanted, rtol=1e-5, atol=1e-7)
  assert adam_state.count == 2


def test_resume(tmp_path):
  """Interrupted, saved and restored: bit for bit the same."""
  tx = lowmem.dynamic_loss_scale(lowmem.adamw(1e-2))
  step = jax.jit(lowmem.fused_backward(loss_fn, tx, clip_norm=1.0))
  a = lowmem.init(tx, make_params())
  for i, batch in enumerate(batches(4)):
    _, *a = step(*a, *batch)
    if i == 1:
      saved = jax.tree.map(np.asarray, a)
  b = saved
  for batch in batches(4)[2:]:
    _, *b = step(*jax.tree.map(jnp.asarray, b), *batch)
  assert_trees_equal(list(a), list(b))


def test_train_state_and_aux():
  """With a TrainState; aux, integers, booleans, dropout keys and statistics pass through."""

  def dropped(w, x, key, train, stats):
    keep = jax.random.bernoulli(key, 0.8, x.shape) if train else jnp.ones(x.shape, bool)
    stats = {"mean": 0.9 * stats["mean"] + 0.1 * jnp.mean(x), "count": stats["count"] + 1}
    return jnp.where(keep, x, 0) @ w["w"], keep, stats

  def loss_fn(layers, x, mask, key, stats):
    h, keep, stats = layers["a"](dropped, x, key, True, stats)
    h = jnp.where(mask, h, 0)  # between layers
    (h, _), none = layers["b"].scan(scanned, ((h, key), None))
    return jnp.mean(h.astype(jnp.float32) ** 2), {"stats": stats, "kept": keep.sum()}

  def scanned(w, carry):
    (h, key), none = carry
    key, now = jax.random.split(key)
    keep = jax.random.bernoulli(now, 0.8, h.shape)
    return (h + jnp.where(keep, h @ w, 0), key), none

  k = jax.random.split(jax.random.key(0), 3)
  params = {
    "a": {"w": jax.random.normal(k[0], (32, 64))},
    "b": 0.1 * jax.random.normal(k[1], (3, 64, 64)),
  }
  tx = lowmem.adam(1e-2)
  state = lowmem.TrainState.create(apply_fn=None, params=params, tx=tx, loss_scale="dynamic")
  step = jax.jit(lowmem.fused_backward(loss_fn, has_aux=True), donate_argnums=0)
  x, mask = jnp.ones((4, 32), jnp.bfloat16), jnp.array([[True], [False], [True], [True]])
  stats = {"mean": jnp.float32(0), "count": jnp.int32(0)}

  def plain(state, *batch):
    def loss(params):
      loss, aux = loss_fn({key: Plain2(w) for key, w in params.items()}, *batch)
      return state.scale_loss(loss), (loss, aux)

    grads, out = jax.grad(loss, has_aux=True)(state.params)
    return out, state.apply_gradients(grads=grads)

  other = lowmem.TrainState.create(apply_fn=None, params=params, tx=tx, loss_scale="dynamic")
  for i in range(3):
    key = jax.random.key(i)
    (loss, aux), state = step(state, x, mask, key, stats)
    (wanted, wanted_aux), other = jax.jit(plain)(other, x, mask, key, stats)
    assert loss == wanted
    assert_trees_equal(aux, wanted_aux)
    stats = aux["stats"]
  assert stats["count"] == 3 and state.step == 3
  assert_trees_equal(
    (state.params, state.opt_state.inner_state), (other.params, other.opt_state.inner_state)
  )


def test_what_is_not_differentiated():
  """Batch inputs need no derivative: operations without one; a stack's constants."""

  def first(w, x):
    x = jax.lax.while_loop(lambda x: jnp.max(jnp.abs(x)) > 1, lambda x: x / 2, x)
    return x @ w["w"]

  def loss_fn(layers, x, table):
    def block(w, carry, table):
      table = jax.lax.while_loop(lambda t: jnp.max(t) > 1, lambda t: t / 2, table)
      return jnp.tanh(carry[0] @ w + table), 1

    h, one = layers["b"].scan(block, (layers["a"](first, x), 1), table)
    return jnp.mean(h.astype(jnp.float32) ** 2) * one

  k = jax.random.split(jax.random.key(0), 2)
  params = {
    "a": {"w": jax.random.normal(k[0], (32, 64))},
    "b": jax.random.normal(k[1], (3, 64, 64)),
  }
  tx = lowmem.adam(1e-2)
  batch = 4 * jnp.ones((4, 32), jnp.bfloat16), 4 * jnp.ones(64, jnp.bfloat16)
  found = jax.jit(lowmem.fused_backward(loss_fn, tx))(*lowmem.init(tx, params), *batch)
  assert_trees_equal(found, plain_step(tx, loss_fn)(*lowmem.init(tx, params), *batch))


def test_integer_and_unused_parameters():
  """Integers get what Optax makes of zero gradients; a loss of no parameter at all steps, too."""
  params = {"a": {"w": jnp.ones((4, 32)), "i": jnp.arange(3), "flag": jnp.array(True)}}
  loss = lambda layers, x: jnp.mean(layers["a"](lambda w, x: x @ w["w"] + w["i"][1], x) ** 2)
  tx = lowmem.dynamic_loss_scale(lowmem.sgd(0.1))
  x = jnp.ones((2, 4), jnp.bfloat16)
  start = lowmem.init(tx, params)
  _, new, _ = jax.jit(lowmem.fused_backward(loss, tx))(*start, x)
  assert_trees_equal(new["a"]["i"], params["a"]["i"])
  assert (new["a"]["w"] != start[0]["a"]["w"]).all()
  still = lambda layers, x: jax.lax.stop_gradient(loss(layers, x))
  _, new, state = jax.jit(lowmem.fused_backward(still, tx, clip_norm=1.0))(*start, x)
  assert_trees_equal(new, start[0])
  assert state.growth_count == 1


class Plain2(Plain):
  """Without jax.checkpoint, which does not take True for a static argument."""

  def __call__(self, fn, *args):
    return fn(self.weights, *args)


def test_tied_embedding():
  """A layer that is called twice gets the sum of its cotangents, once."""

  def loss_fn(layers, tokens, targets):
    x = layers["embed"](embed, tokens)
    x = layers["blocks"].scan(block, x)
    logits = layers["embed"](lambda w, x: (x @ w["table"].T).astype(jnp.float32), x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

  check_same(lowmem.adamw(1e-2, weight_decay=0.1), loss_fn=loss_fn, count=2)


def test_other_containers():
  """Lists and NamedTuples; without jit, too."""
  w = jax.random.normal(jax.random.key(0), (2, 32, 32))
  x = jnp.ones((4, 32), jnp.bfloat16)
  tx = lowmem.lion(1e-2)
  f = lambda w, x: jnp.tanh(x @ w)
  loss = lambda layers, x: jnp.mean(layers[1](f, layers[0](f, x)) ** 2)
  a = lowmem.init(tx, [w[0], w[1]])
  found = lowmem.fused_backward(loss, tx)(*a, x)
  jitted = jax.jit(lowmem.fused_backward(loss, tx))(*a, x)
  chex.assert_trees_all_close(found[1], jitted[1], rtol=2**-7)

  class Two(NamedTuple):
    first: jax.Array
    second: jax.Array

  loss = lambda layers, x: jnp.mean(layers.second(f, layers["first"](f, x)) ** 2)
  params, state = lowmem.init(tx, Two(w[0], w[1]))
  _, params, _ = jax.jit(lowmem.fused_backward(loss, tx))(params, state, x)
  # Other names, so other random bits.
  chex.assert_trees_all_close(params, Two(*jitted[1]), rtol=2**-7)


REFUSED = {
  "clip": (lambda: optax.chain(optax.clip_by_global_norm(1.0), lowmem.adamw(1e-3)), "clip_by_global_norm.*clip_norm="),
  "MultiSteps": (lambda: optax.MultiSteps(lowmem.adamw(1e-3), 4), "MultiSteps.*accumulate="),
  "finite": (lambda: optax.apply_if_finite(lowmem.adamw(1e-3), 4), "apply_if_finite.*loss_scale"),
  "decay": (lambda: optax.chain(lowmem.adamw(1e-3), optax.add_decayed_weights(0.1)), "add_decayed_weights.*weight_decay="),
  "delta_bits": (lambda: lowmem.delta_bits(optax.adamw(1e-3)), "delta_bits.*elementwise=True"),
  "quantize_state": (lambda: lowmem.quantize_state(optax.adamw(1e-3)), "quantize_state.*elementwise=True"),
  "optax": (lambda: optax.adamw(1e-3), "weight_decay= to lowmem.adamw"),
  "rmsprop": (lambda: optax.rmsprop(1e-3), "scale_by_rms.*elementwise=True|learning_rate"),
  "scaled": (lambda: lowmem.dynamic_loss_scale(optax.chain(optax.clip_by_global_norm(1.0), lowmem.adam(1e-3))), "clip_norm="),
  "one": (lambda: optax.chain(lowmem.adamw(1e-3)), "only member"),
  "two scales": (
    lambda: lowmem.static_loss_scale(lowmem.static_loss_scale(lowmem.adamw(1e-3), 2.0), 2.0),
    "loss scale.*one",
  ),
  "masked": (lambda: optax.masked(lowmem.adamw(1e-3), True), "masked"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_transformations(name):
  make, words = REFUSED[name]
  with pytest.raises(ValueError, match=words):
    lowmem.fused_backward(loss_fn, make())


def test_bad_input():
  tx = lowmem.adamw(1e-3)
  start = lowmem.init(tx, make_params())
  (batch,) = batches(1)
  run = lambda loss_fn, *batch, **kw: jax.jit(
    lowmem.fused_backward(loss_fn, kw.pop("tx", tx), **kw)
  )(*start, *batch)
  with pytest.raises(ValueError, match="clip_norm is positive"):
    run(loss_fn, *batch, clip_norm=0.0)
  with pytest.raises(ValueError, match="at least 1"):
    run(loss_fn, *batch, accumulate=0)
  with pytest.raises(ValueError, match="adama"):
    run(loss_fn, *batch, accumulation="sum")
  with pytest.raises(ValueError, match="accumulate="):
    run(loss_fn, *batch, accumulate=2, clip_norm=1.0)
  with pytest.raises(ValueError, match=r"accumulate=3.*batch\[0\].*\(8,\)"):
    run(loss_fn, *batch, accumulate=3)
  for bad in (
    lowmem.lion(1e-3),
    lowmem.sgd(0.1),
    lowmem.adam(1e-3, nesterov=True),
    lowmem.adam(1e-3, b1=0.0),
  ):
    with pytest.raises(ValueError, match="accumulate= has no meaning"):
      lowmem.fused_backward(loss_fn, bad, accumulate=2)
  with pytest.raises(TypeError, match="real scalar"):
    run(lambda layers, t, y: layers["embed"](embed, t), *batch)
  with pytest.raises(TypeError, match=r"\(loss, aux\)"):
    run(loss_fn, *batch, has_aux=True)
  with pytest.raises(KeyError, match="'heads'.*'head'"):
    run(lambda layers, t, y: layers["heads"](embed, t), *batch)

  def looped(layers, t, y):
    x = jax.lax.fori_loop(0, 2, lambda i, x: layers["norm"](norm, x), layers["embed"](embed, t))
    return layers["head"](head, x, y)

  with pytest.raises(ValueError, match=r"layers\['norm'\].*inside a transformation"):
    run(looped, *batch)

  def nested(layers, t, y):
    x = layers["embed"](lambda w, t: layers["norm"](norm, embed(w, t)), t)
    return layers["head"](head, x, y)

  with pytest.raises(ValueError, match=r"layers\['norm'\].*inside the function.*'embed'"):
    run(nested, *batch)
  with pytest.raises(TypeError, match="layers"):
    run(lambda layers, t, y: layers["embed"]["table"].sum(), *batch)
  calls: list[int] = []

  def changing_calls(layers, t, y):
    x = layers["embed"](embed, t)
    calls.append(1 if calls else 0)
    for _ in range(1 + calls[-1]):
      x = layers["norm"](lambda w, x: x @ w["w"], x)
    return x.sum().astype(jnp.float32)

  square = {"embed": make_params()["embed"], "norm": {"w": jnp.ones((WIDTH, WIDTH))}}
  with pytest.raises(ValueError, match="more than once"):
    lowmem.fused_backward(changing_calls, tx)(*lowmem.init(tx, square), *batch)
  for bad in (jnp.float32(0.0), np.float32(0.0)):
    with pytest.raises(ValueError, match="accumulate= has no meaning"):
      lowmem.fused_backward(loss_fn, lowmem.adam(1e-3, b2=bad), accumulate=2)
  with pytest.raises(TypeError, match="got int"):
    lowmem.fused_backward(loss_fn, 3)
  with pytest.raises(TypeError, match="TrainState; got dict"):
    lowmem.fused_backward(loss_fn)(start[0], *batch)

  def closing(layers, t, y):
    x = layers["embed"](embed, t)
    return layers["head"](lambda w: head(w, x, y))

  for call in (run, lambda f, *batch: lowmem.fused_backward(f, tx)(*start, *batch)):
    with pytest.raises(ValueError, match=r"layers\['head'\].*closes over.*argument"):
      call(closing, *batch)

  def changing(layers, t, y):
    x = layers["blocks"].scan(
      lambda w, x: block(w, x).astype(jnp.float32), layers["embed"](embed, t)
    )
    return layers["head"](head, x, y)

  with pytest.raises(TypeError, match=r"layers\['blocks'\].scan.*float32.*bfloat16"):
    run(changing, *batch)
  with pytest.raises(ValueError, match=r"layers\['head'\].scan.*64.*37"):
    run(lambda layers, t, y: layers["head"].scan(block, layers["embed"](embed, t)).sum(), *batch)
  with pytest.raises(ValueError, match="container"):
    lowmem.fused_backward(lambda layers: 0.0, tx)(*lowmem.init(tx, jnp.ones((4, 32))))
  with pytest.raises(ValueError, match="not this optimizer's"):
    lowmem.fused_backward(loss_fn, tx)(start[0], optax.adam(1e-3).init(start[0]), *batch)
  for inner, words in {
    optax.adamw(1e-3, mask=decayed): "mask",
    optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)): "elementwise.*reduce_sum",
    optax.lamb(1e-3): "elementwise.*reduce_sum",
    optax.chain(optax.add_noise(0.1, 0.1, 0), optax.sgd(0.1)): "elementwise.*random",
    optax.sm3(0.1): "counters",
    optax.adafactor(0.1): "counters",
    lowmem.dynamic_loss_scale(optax.adam(1e-3)): "loss scale around",
  }.items():
    declared = lowmem.delta_bits(inner, elementwise=True)
    with pytest.raises(ValueError, match=words):
      lowmem.fused_backward(loss_fn, declared)(*lowmem.init(declared, make_params()), *batch)


@pytest.mark.parametrize("name", thinned(["adamw", "momentum"], "adamw"))
def test_law_15_interpreted_kernels(name):
  """A kernel on a layer of a stack is the kernel on the stack, bit for bit."""
  tx = OPTIMIZERS[name](implementation="mosaic_gpu")
  params = {"blocks": make_params()["blocks"], "last": {"w": jnp.ones((WIDTH, 32))}}
  del params["blocks"]["bias"], params["blocks"]["gain"]

  def loss_fn(layers, tokens, targets):
    x = jax.nn.one_hot(tokens, WIDTH, dtype=jnp.bfloat16)
    x = layers["blocks"].scan(lambda w, x: x + jax.nn.gelu(x @ w["up"]) @ w["down"], x)
    y = layers["last"](lambda w, x: x @ w["w"], x)
    return jnp.mean((y - targets[:, None]).astype(jnp.float32) ** 2)

  with running_kernels():
    # Pallas's interpreter changes JAX's context when it first runs.
    check_same(tx, loss_fn=loss_fn, params=params, count=2, traces=2)
