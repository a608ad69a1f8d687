"""Equinox modules: filter_jit, frozen layers, ensembles, saved leaves, and a trap that names itself."""

import functools

import chex
from conftest import assert_trees_equal
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import data, equinox_mnist
import optax_lowmem as lowmem

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
Y = np.sin(X[:, :1])


def make_model(seed=0):
  return eqx.nn.MLP(8, 1, 64, 2, key=jax.random.key(seed))


def loss_fn(weights, static):
  model = eqx.combine(weights, static)
  return jnp.mean((jax.vmap(model)(jnp.asarray(X, jnp.bfloat16)).astype(jnp.float32) - Y) ** 2)


def trained(tx, frozen=lambda model: (), steps=20):
  model = make_model()
  spec = jax.tree.map(eqx.is_inexact_array, model)
  if frozen(model):
    spec = eqx.tree_at(frozen, spec, replace_fn=lambda _: False)
  weights, static = eqx.partition(model, spec)
  weights, state = lowmem.init(tx, weights)

  @eqx.filter_jit(donate="all-except-first")
  def step(static, weights, state):
    loss, grads = eqx.filter_value_and_grad(loss_fn)(weights, static)
    weights, state = lowmem.step(tx, grads, state, weights)
    return weights, state, loss

  losses = []
  for _ in range(steps):
    weights, state, loss = step(static, weights, state)
    losses.append(float(loss))
  return weights, state, static, losses


def test_training():
  weights, state, static, losses = trained(lowmem.adamw(1e-2))
  assert losses[-1] < 0.5 * losses[0]
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(weights))
  model = eqx.combine(lowmem.master_params(weights, state), static)
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(eqx.filter(model, eqx.is_array)))
  assert lowmem.memory_table(weights, state).parts["residuals"] > 0


def test_frozen_layers():
  """Their weights and gradients are None."""
  layer = lambda model: (model.layers[0].weight, model.layers[0].bias)
  weights, state, static, losses = trained(lowmem.adamw(1e-2), layer)
  assert losses[-1] < losses[0]
  assert weights.layers[0].weight is None
  assert_trees_equal(static.layers[0].weight, make_model().layers[0].weight)


def test_ensemble():
  """`filter_vmap` over init and step: members do not mix."""
  tx = lowmem.sgd(0.05, weights="bf16+16")
  static = eqx.partition(make_model(), eqx.is_inexact_array)[1]
  models = [eqx.partition(make_model(i), eqx.is_inexact_array)[0] for i in range(3)]

  def run(weights):
    weights, state = lowmem.init(tx, weights)
    grads = jax.grad(loss_fn)(weights, static)
    return lowmem.step(tx, grads, state, weights)

  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *models)
  together = eqx.filter_jit(eqx.filter_vmap(run))(stacked)
  for i, weights in enumerate(models):
    alone = eqx.filter_jit(run)(weights)
    one = jax.tree.map(lambda x, i=i: x[i], together[0])
    chex.assert_trees_all_close(
      jax.tree.map(jnp.float32, one), jax.tree.map(jnp.float32, alone[0]), rtol=2e-2, atol=1e-3
    )


def test_saved_leaves(tmp_path):
  weights, state, _, _ = trained(lowmem.adamw(1e-2), steps=2)
  eqx.tree_serialise_leaves(tmp_path / "run.eqx", (weights, state))
  start, _ = eqx.partition(make_model(), eqx.is_inexact_array)
  like = lowmem.init(lowmem.adamw(1e-2), start)
  assert_trees_equal(eqx.tree_deserialise_leaves(tmp_path / "run.eqx", like), (weights, state))


def test_updates_added_without_a_cast():
  """`eqx.apply_updates` widens the weights; the next step says so and how to go on."""
  tx = lowmem.adamw(1e-2)
  start, static = eqx.partition(make_model(), eqx.is_inexact_array)
  weights, state = lowmem.init(tx, start)
  grads = jax.grad(loss_fn)(weights, static)
  updates, state = tx.update(grads, state, weights)
  widened = eqx.apply_updates(weights, updates)
  with pytest.raises(TypeError, match=r"layers\[0\].weight is float32.*optax.apply_updates"):
    tx.update(grads, state, widened)
  with pytest.raises(TypeError, match=r"layers\[0\].weight is float32.*lowmem.step"):
    lowmem.step(tx, grads, state, widened)
  assert_trees_equal(
    optax.apply_updates(weights, updates),
    jax.tree.map(lambda w, x: x.astype(w.dtype), weights, widened),
  )
  half = lowmem.adamw(1e-2, update_dtype="gradient")
  weights, state = lowmem.init(half, start)
  run = jax.jit(functools.partial(jax.grad(loss_fn), static=static))
  for _ in range(2):
    updates, state = half.update(run(weights), state, weights)
    weights = eqx.apply_updates(weights, updates)
  assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(weights))


def test_example(monkeypatch, capsys):
  """A bright band in one of ten places."""
  labels = np.arange(256, dtype=np.uint8) % 10
  pictures = np.zeros((256, 28, 28), np.uint8)
  for picture, label in zip(pictures, labels, strict=True):
    picture[2 * label : 2 * label + 6] = 255
  images = data.Images(pictures, labels)
  monkeypatch.setattr(data, "fashion_mnist", lambda: (images, images))
  monkeypatch.setattr(equinox_mnist, "BATCH", 16)
  only = {"ours": lowmem.adamw(1e-3)}
  monkeypatch.setattr(equinox_mnist, "OPTIMIZERS", only)
  equinox_mnist.main(["--steps", "20"])
  _, *rows = capsys.readouterr().out.splitlines()
  accuracy, size = zip(*(map(float, row.split()[-2:]) for row in rows), strict=True)
  assert min(accuracy) > 0.9
  assert size == (5.18,)
