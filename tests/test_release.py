"""Gradient release: laws 15 and 16."""

import functools

from conftest import assert_trees_equal
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


def check_same(tx, count=4, released=None, loss_fn=loss_fn, params=None):
  """Law 15: the same losses and, bit for bit, the same states."""
  a = b = lowmem.init(tx, make_params() if params is None else params)
  released = jax.jit(lowmem.fused_backward(loss_fn, tx) if released is None else released)
  plain = plain_step(tx, loss_fn)
  for batch in batches(count):
    loss, *a = released(*a, *batch)
    wanted, *b = plain(*b, *batch)
    assert float(loss) == float(wanted)
    assert_trees_equal(a, b)
  return a


@pytest.mark.parametrize("name", OPTIMIZERS)
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


@pytest.mark.parametrize("name", DECLARED)
def test_law_15_declared_elementwise(name):
  check_same(DECLARED[name]())


@pytest.mark.parametrize("fmt", ["bf16+0", "bf16+16", "fp16+8", "bf16+5"])
@pytest.mark.parametrize("moments", ["bf16", "fp16", "fp32"])
def test_law_15_formats(fmt, moments):
  check_same(lowmem.adamw(1e-2, weights=fmt, mu=moments, nu=moments), count=2)
