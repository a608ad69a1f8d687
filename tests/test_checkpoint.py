"""Checkpoints by Orbax, Flax and pickle: a restored run continues bit for bit (law 14)."""

import functools
import pickle

from conftest import assert_trees_equal
import flax
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import optax_lowmem as lowmem
from optax_lowmem.trees import formats as formats_module

SHAPES = {
  "dense": {"kernel": (24, 96), "bias": (7,)},
  "scalar": (),
  "list": [(3, 2, 33), None],
}
FP32_NORMS = lambda path, leaf: "fp32" if leaf.ndim < 2 else "bf16+5"
PACKED = lambda path, leaf: "fp16+13" if leaf.ndim == 2 else "bf16+8"
SEVEN = lowmem.DeltaFormat(extra_bits=7, rounding="nearest", low_rounding="stochastic")
MAKERS = {
  "bf16+8": lambda: lowmem.adamw(1e-2),
  "fp16+13": lambda: lowmem.adam(1e-2, weights="fp16+13", mu="fp16", nu="bf16", key=7),
  "bf16+0": lambda: lowmem.lion(1e-3, weights="bf16+0"),
  "int4": lambda: lowmem.adamw(1e-2, mu="int4", nu="int4"),
  "scaled": lambda: lowmem.dynamic_loss_scale(
    lowmem.adamw(optax.cosine_decay_schedule(1e-2, 9), weights=FP32_NORMS), growth_interval=2
  ),
  "meshes": lambda: lowmem.adamw(1e-2, weights=PACKED),
  "chain": lambda: optax.chain(
    optax.masked(optax.trace(0.9), {"dense": True, "scalar": False, "list": True}),
    lowmem.scale_by_adam(mu="bf16"),
    optax.scale(-1e-2),
    lowmem.delta_bits(weights=SEVEN),
  ),
}
is_shape = lambda x: isinstance(x, tuple)


def make_params(only=tuple(SHAPES)):
  draw = lambda shape: jnp.array(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)
  return jax.tree.map(draw, {k: SHAPES[k] for k in only}, is_leaf=is_shape)


def gradient(index, like):
  """By step; not finite at step 4, so that counters and scales have something to keep."""
  values = np.random.default_rng(index).normal(size=10000)
  values[0] = np.inf if index == 4 else 1.0
  draw = lambda x: np.resize(values, x.shape).astype(x.dtype)
  return jax.tree.map(lambda x: jax.device_put(draw(x), x.sharding), like)


@functools.cache
def stepper(name):
  tx = MAKERS[name]()
  return tx, jax.jit(
    lambda params, state, grads: lowmem.step(tx, grads, state, params), donate_argnums=(0, 1)
  )


def run(name, params, state, start, stop):
  _, step = stepper(name)
  for index in range(start, stop):
    params, state = step(params, state, gradient(index, params))
  return params, state


def abstract(tree):
  return jax.eval_shape(lambda: tree)


def save(path, tree):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, tree)


def restore(path, target):
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(path, target)


def new_state(name):
  tx, _ = stepper(name)
  only = ("dense",) if name == "meshes" else tuple(SHAPES)
  return jax.jit(lambda params: lowmem.init(tx, params))(make_params(only))


@functools.cache
def uninterrupted(name):
  """The state after 6 steps and after 9, on the host."""
  tx, _ = stepper(name)
  at_six = run(name, *new_state(name), 0, 6)
  kept = jax.tree.map(np.array, at_six)
  return kept, jax.tree.map(np.array, run(name, *at_six, 6, 9))


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "meshes"])
def test_bare_states(name, tmp_path):
  at_six, at_nine = uninterrupted(name)
  tx, _ = stepper(name)
  save(tmp_path / "saved", jax.tree.map(jnp.array, at_six))
  target = jax.eval_shape(lambda: lowmem.init(tx, make_params()))
  restored = restore(tmp_path / "saved", target)
  assert_trees_equal(restored, at_six)
  assert_trees_equal(run(name, *restored, 6, 9), at_nine)


@pytest.mark.parametrize("name", ["scaled", "fp16+13"])
def test_flax_serialization_and_pickle(name):
  at_six, at_nine = uninterrupted(name)
  blank = jax.tree.map(jnp.zeros_like, at_six)
  by_flax = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(at_six))
  by_pickle = pickle.loads(pickle.dumps(at_six))
  for restored in (by_flax, by_pickle):
    assert_trees_equal(restored, at_six)
    assert_trees_equal(run(name, *jax.tree.map(jnp.array, restored), 6, 9), at_nine)


def on_mesh(tree, shape):
  """The tree's shapes with shardings on a mesh, as a user of FSDP lays them out."""
  axes = ("data", "model")[: len(shape)]
  devices = jax.devices()[: int(np.prod(shape))]
  mesh = jax.make_mesh(shape, axes, (AxisType.Auto,) * len(shape), devices=devices)

  def place(x):
    spec = P(*("data",) * (x.ndim == 2), *("model",) * (x.shape == (24, 96) and len(axes) == 2))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(place, tree)


def test_other_mesh(tmp_path):
  at_six, at_nine = uninterrupted("meshes")
  save(tmp_path / "one", jax.tree.map(jnp.array, at_six))
  new = new_state("meshes")
  shardings = jax.tree.map(lambda x: x.sharding, on_mesh(new, (4, 2)))
  from_mesh = run("meshes", *jax.device_put(new, shardings), 0, 6)
  assert_trees_equal(from_mesh, at_six)
  save(tmp_path / "4x2", from_mesh)
  for saved, shape in (("one", (2, 4)), ("4x2", (2, 4)), ("4x2", (8,)), ("4x2", (1,))):
    target = on_mesh(at_six, shape)
    restored = restore(tmp_path / saved, target)
    assert_trees_equal(restored, at_six)
    for x, like in zip(*map(jax.tree.leaves, (restored, target)), strict=True):
      assert x.sharding == like.sharding
    assert_trees_equal(run("meshes", *restored, 6, 9), at_nine)


def test_manager_saves_while_training(tmp_path):
  """Asynchronously, every third step, with buffers donated to the step behind the save."""

  def make():
    params = make_params(("dense",))
    tx = lowmem.adamw(1e-2, weights="fp16+13")
    return lowmem.TrainState.create(apply_fn=None, params=params, tx=tx, loss_scale="dynamic")

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, grads):
    return state.apply_gradients(grads=grads)

  state, kept = jax.jit(make)(), {}
  options = ocp.CheckpointManagerOptions(save_interval_steps=3, max_to_keep=2)
  with ocp.CheckpointManager(tmp_path, options=options) as manager:
    for index in range(10):
      state = step(state, gradient(index, state.params))
      kept[index + 1] = jax.tree.map(np.array, state)
      manager.save(index + 1, args=ocp.args.StandardSave(state))
  with ocp.CheckpointManager(tmp_path, options=options) as manager:
    assert manager.all_steps() == [6, 9]
    restored = manager.restore(6, args=ocp.args.StandardRestore(jax.eval_shape(make)))
  # A new process has a transformation of its own; Flax compares them by identity.
  restored = restored.replace(tx=state.tx)
  assert_trees_equal(restored, kept[6])
  assert int(restored.opt_state.skipped) == 1 and int(restored.step) == 6
  for index in range(6, 10):
    restored = step(restored, gradient(index, restored.params))
  assert_trees_equal(restored, kept[10])


@pytest.mark.parametrize("optimizer", [nnx.Optimizer, lowmem.nnx.Optimizer])
def test_nnx(optimizer, tmp_path):
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.first = nnx.Linear(16, 40, rngs=rngs, param_dtype=dtype)

    def __call__(self, x):
      return self.first(x)

  dtype = jnp.bfloat16 if optimizer is nnx.Optimizer else jnp.float32

  def make(weights="bf16+8"):
    model = Model(nnx.Rngs(0))
    return model, optimizer(model, lowmem.adamw(1e-2, weights=weights), wrt=nnx.Param)

  @nnx.jit
  def step(model, tx, index):
    x = jax.random.normal(jax.random.key(index), (8, 16))
    grads = nnx.grad(lambda model: jnp.sum(model(x).astype(jnp.float32) ** 2))(model)
    tx.update(model, grads)

  first = nnx.jit(make)()
  for index in range(2):
    step(*first, index)
  save(tmp_path / "saved", nnx.state(first))
  step(*first, 2)
  second = nnx.jit(make)()
  nnx.update(second, restore(tmp_path / "saved", nnx.state(nnx.eval_shape(make))))
  step(*second, 2)
  assert_trees_equal(nnx.as_pure(nnx.state(first)), nnx.as_pure(nnx.state(second)))
  with pytest.raises(ValueError, match=r"bf16\+16 x 2") as error:
    restore(tmp_path / "saved", nnx.state(nnx.eval_shape(lambda: make("bf16+16"))))
  assert "bf16+8 x 2" in str(error.value)


FORMAT = lowmem.DeltaFormat
OTHERS = {
  "weights": ({"weights": "fp16+8"}, "bf16+8", "fp16+8"),
  "more bits": ({"weights": "bf16+16"}, "bf16+8", "bf16+16"),
  "packed": ({"weights": "bf16+4"}, "bf16+8", "bf16+4"),
  "no residual": ({"weights": "bf16+0"}, "bf16+8", "bf16+0"),
  "rounding": ({"weights": FORMAT(rounding="nearest")}, "bf16+8", "bf16+8 nearest/nearest"),
  "direction": (
    {"weights": FORMAT(extra_bits=7, low_rounding="truncate")},  # as many bits
    "bf16+8",
    "bf16+7 stochastic/truncate",
  ),
  "one leaf": ({"weights": FP32_NORMS}, "bf16+8 x 2", "bf16+5 x 1"),
  "mu": ({"mu": "fp16"}, "mu int8", "mu fp16"),
  "nu": ({"nu": "bf16"}, "nu int8", "nu bf16"),
}


@functools.cache
def fresh(what):
  arguments = OTHERS[what][0] if what else {}
  tx = lowmem.adamw(1e-2, **arguments)
  return jax.jit(lambda params: lowmem.init(tx, params))(make_params(("dense",)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp("formats")
  for what in (None, *OTHERS):
    save(path / str(what), fresh(what))
  return path


@pytest.mark.parametrize("what", OTHERS)
def test_other_formats_are_refused(what, saved):
  _, ours, theirs = OTHERS[what]
  for found, target in ((None, fresh(what)), (what, fresh(None))):
    attempts = (
      lambda found=found, target=target: restore(saved / str(found), abstract(target)),
      lambda found=found, target=target: restore(saved / str(found), target),
      lambda found=found, target=target: ocp.PyTreeCheckpointer().restore(
        saved / str(found), item=target
      ),
      lambda found=found, target=target: flax.serialization.from_bytes(
        target, flax.serialization.to_bytes(fresh(found))
      ),
    )
    for attempt in attempts:
      with pytest.raises(ValueError, match="optax_lowmem 1: ") as error:
        attempt()
      assert ours in str(error.value) and theirs in str(error.value)
  restore(saved / str(what), abstract(fresh(what)))


def test_other_versions_are_refused(monkeypatch, tmp_path):
  now = fresh(None)
  pickled, serialized = pickle.dumps(now), flax.serialization.to_bytes(now)
  save(tmp_path / "saved", now)
  monkeypatch.setattr(formats_module, "VERSION", 2)
  tx = lowmem.adamw(1e-2)
  later = jax.jit(lambda params: lowmem.init(tx, params))(make_params(("dense",)))
  for target in (later, abstract(later)):
    with pytest.raises(ValueError, match="optax_lowmem 2: bf16") as error:
      restore(tmp_path / "saved", target)
    assert "optax_lowmem 1: bf16" in str(error.value)
  with pytest.raises(ValueError, match=r"optax_lowmem 1: bf16.*optax_lowmem 2: bf16"):
    flax.serialization.from_bytes(later, serialized)
  with pytest.raises(ValueError, match=r"version 1; this is version 2"):
    pickle.loads(pickled)


def test_without_formats_is_refused(tmp_path):
  """Of another optimizer, or from before there were marks."""
  params, state = fresh(None)
  save(tmp_path / "saved", (params, state._replace(formats={})))
  with pytest.raises(ValueError, match="formats"):
    restore(tmp_path / "saved", abstract((params, state)))
  stripped = flax.serialization.to_state_dict(state) | {"formats": {}}
  with pytest.raises(ValueError, match="no formats at all"):
    flax.serialization.from_state_dict(state, stripped)


def test_marks_live_like_other_leaves():
  tx = lowmem.adamw(1e-2)
  params, state = lowmem.init(tx, {"w": jnp.ones((2, 33))})  # no jit: results of one never share
  marks = [state.formats.mark, state.inner_state.formats.mark]
  assert {m.dtype for m in marks} == {jnp.dtype(jnp.uint32)} and {m.shape for m in marks} == {()}
  buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((params, state))]
  assert len(set(buffers)) == len(buffers)  # or they could not be donated together
  master = lowmem.master_params(
    params, state
  )  # the way to other formats that docs/checkpoints.md names
  assert_trees_equal(
    lowmem.master_params(*lowmem.init(lowmem.adamw(1e-2, weights="bf16+16"), master)), master
  )
  mapped = optax.tree.map_params(tx, lambda x: x, state)
  assert_trees_equal(mapped, state)
  assert mapped.formats.table == state.formats.table
  stacked = jax.tree.map(lambda *x: jnp.stack(x), params, params)
  states = jax.jit(jax.vmap(tx.init))(stacked)
  assert states.formats.mark.shape == (2,)
  grads = jax.tree.map(jnp.ones_like, stacked)
  _, states = jax.jit(jax.vmap(tx.update))(grads, states, stacked)
  assert states.formats.label == state.formats.label
  donated = jax.jit(lambda s: s, donate_argnums=0)(state)
  assert int(donated.formats.mark) == 1 and state.formats.mark.is_deleted()
  assert lowmem.memory_table(params, donated).total == sum(
    x.nbytes for x in jax.tree.leaves((params, donated))
  )
