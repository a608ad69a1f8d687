"""lowmem.nnx.Optimizer, and a stock nnx.Optimizer with our transformations."""

import contextlib
import functools

import chex
from conftest import assert_trees_equal, mesh_of, updated
from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem

X = np.linspace(-1, 1, 32, dtype=np.float32)[:, None] * np.ones(8, np.float32)
Y = np.sin(3 * X[:, :1])


class Net(nnx.Module):
  def __init__(self, rngs, width=64, kernel_metadata=None, **kwargs):
    linear = functools.partial(
      nnx.Linear, rngs=rngs, kernel_metadata=kernel_metadata or {}, **kwargs
    )
    self.first = linear(8, width)
    self.norm = nnx.BatchNorm(width, rngs=rngs)
    self.last = linear(width, 8, use_bias=False)

  def __call__(self, x):
    return self.last(nnx.relu(self.norm(self.first(x)))).astype(jnp.float32)


def linear(**kwargs):
  """Two leaves, for what compiles each of them apart."""
  return nnx.Linear(8, 64, rngs=nnx.Rngs(0), **kwargs)


def matrices_alone(path, leaf):
  assert isinstance(path[-1], jax.tree_util.DictKey)  # no variable's ".value"
  return "bf16+8" if leaf.ndim > 1 else "fp32"


TXS = {
  "fp16 under a loss scale": lambda: lowmem.dynamic_loss_scale(
    lowmem.adamw(1e-2, weights="fp16+4"), init_scale=256.0),
  "some leaves": lambda: lowmem.lion(1e-3, weights=matrices_alone),
  "chain": lambda: optax.chain(
    optax.clip_by_global_norm(1.0),
    lowmem.delta_bits(lowmem.quantize_state(optax.adabelief(1e-2)), "bf16+3"),
  ),
  "partition": lambda: optax.partition(
    {"a": lowmem.adamw(1e-2), "b": lowmem.delta_bits(optax.adam(1e-3), "bf16+16")},
    lambda params: jax.tree.map(lambda p: "a" if p.ndim > 1 else "b", params),
  ),
}  # fmt: skip


def loss_of(model, x, y):
  return jnp.mean((model(x)[:, :1] - y) ** 2)


def train_step(model, optimizer, x, y):
  def scaled(model):
    loss = loss_of(model, x, y)
    return optimizer.scale_loss(loss), loss

  grads, loss = nnx.grad(scaled, has_aux=True)(model)
  assert optimizer.update(model, grads) is None
  return loss


donated_step = nnx.jit(train_step, donate_argnames=("model", "optimizer"))


def pure(optimizer):
  return nnx.as_pure(optimizer.opt_state)


def params_of(model, wrt=nnx.Param):
  return nnx.as_pure(nnx.state(model, wrt))


def given_gradients(model, seed=0, wrt=nnx.Param):
  """Gradients that do not depend on how a sum is cut into shards."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda p: jax.device_put(rng.normal(size=p.shape).astype(p.dtype), p.sharding),
    nnx.state(model, wrt),
  )


_given_step = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads) and None)


@pytest.mark.parametrize("name", TXS)
def test_same_bits_as_train_state(name):
  model, tx = Net(nnx.Rngs(0)), TXS[name]()
  graphdef, params, stats = nnx.split(model, nnx.Param, ...)
  params, stats = jax.tree.map(jnp.copy, nnx.as_pure((params, stats)))  # not donated
  state = lowmem.TrainState.create(apply_fn=None, params=params, tx=tx)
  optimizer = lowmem.nnx.Optimizer(model, tx, wrt=nnx.Param)
  assert isinstance(optimizer, nnx.Optimizer)
  assert_trees_equal(params_of(model), state.params)
  assert_trees_equal(pure(optimizer), state.opt_state)

  @jax.jit
  def step(state, stats):
    def loss_fn(params):
      model = nnx.merge(graphdef, params, stats)
      loss = state.scale_loss(loss_of(model, X, Y))
      return loss, nnx.as_pure(nnx.state(model, nnx.BatchStat))

    grads, stats = jax.grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads), stats

  losses = []
  for i in range(5):
    losses.append(float(donated_step(model, optimizer, X, Y)))
    state, stats = step(state, stats)
    assert optimizer.step[...] == i + 1
  assert losses[-1] < 0.9 * losses[0]
  assert_trees_equal(params_of(model), state.params)
  assert_trees_equal(pure(optimizer), state.opt_state)
  assert_trees_equal(nnx.as_pure(nnx.state(model, nnx.BatchStat)), stats)
  assert optimizer.loss_scale == state.loss_scale
  assert_trees_equal(nnx.as_pure(optimizer.master_params(model)), state.master_params())
  named = lambda tree: {str(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  assert_trees_equal(named(optimizer.residuals), named(state.residuals))
  assert len(named(state.residuals)) == (2 if name == "some leaves" else 5)


def test_master_params_are_a_state_to_update_a_model_with():
  model = Net(nnx.Rngs(0))
  before = params_of(model)
  optimizer = lowmem.nnx.Optimizer(model, lowmem.adamw(1e-2, weights="bf16+16"))
  masters = optimizer.master_params(model)
  assert all(
    isinstance(x, nnx.Param)
    for x in jax.tree.leaves(masters, is_leaf=lambda x: isinstance(x, nnx.Param))
  )
  assert_trees_equal(nnx.as_pure(masters), before)
  evaluated = Net(nnx.Rngs(1))
  nnx.update(evaluated, masters)
  assert_trees_equal(params_of(evaluated), before)


def test_a_skipped_step_changes_no_bit():
  model = linear()
  tx = lowmem.adamw(1e-2, weights="fp16+8")
  optimizer = lowmem.nnx.Optimizer(model, tx, loss_scale="dynamic")
  assert optimizer.loss_scale == 2.0**15
  _given_step(model, optimizer, given_gradients(model))
  before = jax.tree.map(jnp.copy, (params_of(model), pure(optimizer)))
  grads = nnx.state(model, nnx.Param)
  grads["bias"] = grads["bias"].replace(jnp.full(64, jnp.inf, jnp.float16))
  _given_step(model, optimizer, grads)
  after = params_of(model), pure(optimizer)
  assert_trees_equal(after[0], before[0])
  assert_trees_equal(after[1].inner_state, before[1].inner_state)
  assert optimizer.step[...] == 2 and after[1].skipped == 1
  assert optimizer.loss_scale == 2.0**14
  assert optimizer.scale_loss(jnp.bfloat16(3.0)).dtype == jnp.float32


def test_in_place():
  model = Net(nnx.Rngs(0))
  optimizer = lowmem.nnx.Optimizer(model, TXS["fp16 under a loss scale"]())
  old = jax.tree.leaves((nnx.as_pure(nnx.state(model)), pure(optimizer)))
  donated_step(model, optimizer, X, Y)
  assert all(x.is_deleted() for x in old)
  memory = donated_step.lower(model, optimizer, X, Y).compile().memory_analysis()
  assert memory.alias_size_in_bytes >= sum(x.nbytes for x in old)


class WithAdapter(nnx.Module):
  """A frozen network, a LoRA, and a backbone by name."""

  def __init__(self, rngs):
    self.backbone = nnx.Linear(8, 64, rngs=rngs)
    self.adapter = nnx.LoRA(64, 4, 64, rngs=rngs)
    self.head = nnx.Linear(64, 8, rngs=rngs)

  def __call__(self, x):
    h = self.backbone(x)
    return self.head(nnx.relu(h + self.adapter(h))).astype(jnp.float32)


@pytest.mark.parametrize(
  "wrt", [nnx.LoRAParam, nnx.All(nnx.Param, nnx.PathContains("head")), nnx.Nothing]
)
def test_wrt_selects_a_part(wrt):
  model = WithAdapter(nnx.Rngs(0))
  before = nnx.as_pure(nnx.state(model))
  optimizer = lowmem.nnx.Optimizer(model, lowmem.adamw(1e-1), wrt=wrt)
  chosen = {path for path, _ in nnx.to_flat_state(nnx.state(model, wrt))}
  assert len(chosen) == (0 if wrt is nnx.Nothing else 2)

  @nnx.jit
  def step(model, optimizer):
    loss = lambda model: jnp.mean((model(X)[:, :1] - Y) ** 2)
    optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model))

  for _ in range(2):
    step(model, optimizer)
  after = dict(nnx.to_flat_state(nnx.as_pure(nnx.state(model))))
  for path, old in nnx.to_flat_state(before):
    if path in chosen:
      assert after[path].dtype == jnp.bfloat16
      assert (after[path].astype(jnp.float32) != old).any()
    else:
      assert_trees_equal(after[path], old)
  assert {path for path, _ in nnx.to_flat_state(optimizer.residuals)} == chosen


def test_shared_parameters_are_stepped_once():
  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.embed = nnx.Embed(32, 64, rngs=rngs)
      self.head = self.embed

    def __call__(self, tokens):
      return self.head.attend(self.embed(tokens)).astype(jnp.float32)

  model = Tied(nnx.Rngs(0))
  optimizer = lowmem.nnx.Optimizer(model, lowmem.sgd(0.5, weights="bf16+16"))
  before = optimizer.master_params(model)["embed"]["embedding"][...]

  @nnx.jit
  def step(model, optimizer):
    grads = nnx.grad(lambda model: jnp.sum(model(jnp.arange(8))[:, 0]))(model)
    optimizer.update(model, grads)
    return nnx.as_pure(grads["embed"]["embedding"])

  gradient = step(model, optimizer)
  assert model.head is model.embed and model.embed.embedding.dtype == jnp.bfloat16
  assert len(jax.tree.leaves(optimizer.residuals)) == 1
  after = optimizer.master_params(model)["embed"]["embedding"][...]
  np.testing.assert_allclose(after, before - 0.5 * gradient.astype(jnp.float32), rtol=2e-7)


def test_stacked_layers_and_loops():
  """vmapped layers that a scan runs through, trained in a scan over steps."""

  class Stack(nnx.Module):
    def __init__(self, rngs):
      @nnx.split_rngs(splits=3)
      @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
      def create(rngs):
        return nnx.Linear(64, 64, rngs=rngs, kernel_metadata={"out_sharding": ("in", "out")})

      with nnx.use_eager_sharding(False):
        self.layers = create(rngs)

    def __call__(self, x):
      run = nnx.scan(
        lambda x, layer: nnx.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
      )
      return run(x, self.layers).astype(jnp.float32)

  def make():
    model = Stack(nnx.Rngs(0))
    with nnx.use_eager_sharding(False):
      return model, lowmem.nnx.Optimizer(model, lowmem.adamw(1e-2), loss_scale="dynamic")

  batches = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16, 64)), jnp.float32)

  def step(carry, x):
    model, optimizer = carry
    loss = lambda model: optimizer.scale_loss(jnp.mean(model(x) ** 2))
    optimizer.update(model, nnx.grad(loss)(model))
    return carry, None

  model, optimizer = make()
  assert model.layers.kernel.shape == (3, 64, 64) and model.layers.kernel.dtype == jnp.bfloat16
  specs = nnx.get_partition_spec(nnx.state(optimizer))
  mu = nnx.as_pure(specs)["opt_state"]["inner_state"]["inner_state"]["inner_state"][0]["mu"]
  assert mu["layers"]["kernel"]["scale"] == P("layers", "in", "out")
  nnx.jit(nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)))(
    (model, optimizer), batches
  )
  unrolled = make()
  one_step = nnx.jit(lambda carry, x: step(carry, x)[1])
  for x in batches:
    one_step(unrolled, x)
  assert_trees_equal(params_of(model), params_of(unrolled[0]))
  assert_trees_equal(pure(optimizer), pure(unrolled[1]))


def test_ensemble_under_vmap():
  @nnx.vmap
  def create(key):
    model = nnx.Linear(8, 64, rngs=nnx.Rngs(key))
    return model, lowmem.nnx.Optimizer(model, lowmem.adamw(1e-2), loss_scale="dynamic")

  keys = jax.random.split(jax.random.key(0), 3)
  models, optimizers = create(keys)
  nnx.jit(nnx.vmap(train_step, in_axes=(0, 0, None, None)))(models, optimizers, X, Y)
  assert (optimizers.step[...] == 1).all()
  assert models.kernel.dtype == jnp.bfloat16
  model = nnx.Linear(8, 64, rngs=nnx.Rngs(keys[1]))
  optimizer = lowmem.nnx.Optimizer(model, lowmem.adamw(1e-2), loss_scale="dynamic")
  optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
  one = jax.tree.map(lambda x: x[1], pure(optimizers))
  chex.assert_trees_all_equal_structs(one, pure(optimizer))


def test_split_and_merge_continue_bit_for_bit():
  model = linear()
  optimizer = lowmem.nnx.Optimizer(model, lowmem.adamw(1e-2), loss_scale="dynamic")
  for _ in range(2):
    donated_step(model, optimizer, X, Y)
  graphdef, state = nnx.split((model, optimizer))
  saved = jax.tree.map(np.asarray, nnx.to_pure_dict(state))
  merged = nnx.merge(graphdef, jax.tree.map(jnp.asarray, state))
  fresh_model = nnx.Linear(8, 64, rngs=nnx.Rngs(7))
  fresh = fresh_model, lowmem.nnx.Optimizer(fresh_model, lowmem.adamw(1e-2), loss_scale="dynamic")
  into = nnx.state(fresh)
  nnx.replace_by_pure_dict(into, jax.tree.map(jnp.asarray, saved))
  nnx.update(fresh, into)
  cloned = nnx.clone((model, optimizer))
  runs = (model, optimizer), merged, fresh, cloned
  step = nnx.jit(train_step)
  for run in runs:
    step(*run, X, Y)
  for run in runs[1:]:
    assert_trees_equal(params_of(run[0]), params_of(model))
    assert_trees_equal(pure(run[1]), pure(optimizer))
    assert run[1].step[...] == 3 and isinstance(run[1], lowmem.nnx.Optimizer)


def test_extra_arguments_reach_the_transformation():
  model = linear()
  plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=1)
  tx = optax.chain(optax.sgd(1e-2), plateau, lowmem.delta_bits())
  optimizer = lowmem.nnx.Optimizer(model, tx, graph=False)  # tree mode
  grads = nnx.grad(lambda model: loss_of(model, X, Y), graph=False)(model)
  for _ in range(3):
    optimizer.update(model, grads, value=nnx.Variable(jnp.array(1.0)))
  assert pure(optimizer)[1].scale == 0.25


def test_in_a_trainer_with_metrics():
  class Trainer(nnx.Module):
    def __init__(self):
      self.model = Net(nnx.Rngs(0))
      self.optimizer = lowmem.nnx.Optimizer(self.model, lowmem.adamw(1e-2), loss_scale=8.0)
      self.metrics = nnx.MultiMetric(loss=nnx.metrics.Average())

    def step(self, x, y):
      self.metrics.update(values=train_step(self.model, self.optimizer, x, y))

  trainer = Trainer()
  chex.clear_trace_counter()
  step = nnx.jit(chex.assert_max_traces(Trainer.step, n=1))
  step(trainer, X, Y)
  first = float(trainer.metrics.compute()["loss"])
  trainer.metrics.reset()
  for _ in range(20):
    step(trainer, X, Y)
  assert trainer.metrics.compute()["loss"] < first and trainer.optimizer.step[...] == 21
  assert trainer.model.norm.mean.dtype == jnp.float32  # no Param: left alone


def spec_of(x):
  return (*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec)))


def test_sharded_model():
  """A last axis of 64 over 4 devices: two block scales, which no 4 devices share."""

  def make(metadata):
    model = linear(kernel_metadata=metadata)
    return model, lowmem.nnx.Optimizer(
      model, lowmem.adamw(1e-2, weights="bf16+3"), loss_scale="dynamic"
    )

  def step(model, optimizer, grads):
    optimizer.update(model, grads)

  alone, step_alone = make({}), nnx.jit(step)
  for i in range(2):
    step_alone(*alone, given_gradients(alone[0], i))

  with jax.set_mesh(mesh_of(4, 2)):
    create = functools.partial(make, {"out_sharding": ("model", "data")})
    model, optimizer = nnx.jit(create)()

    def check():
      assert model.kernel.sharding.spec == P("model", "data")
      residual = optimizer.residuals["kernel"]
      assert residual.shape == (8, 24) and spec_of(residual) == ("model", "data")
      mu = pure(optimizer).inner_state.inner_state.inner_state[0].mu["kernel"]
      assert spec_of(mu.codes) == ("model", "data")
      assert spec_of(mu.scale) == ("model", None)

    check()
    state = nnx.state((model, optimizer))
    specs = nnx.get_partition_spec(state)
    chex.assert_trees_all_equal_structs(specs, state)
    assert all(isinstance(x, P) for x in jax.tree.leaves(specs))
    moved = jax.device_put(state, nnx.get_named_sharding(state, jax.sharding.get_mesh()))
    nnx.update((model, optimizer), moved)
    step_sharded = nnx.jit(step, donate_argnums=(0, 1))
    for i in range(2):
      step_sharded(model, optimizer, given_gradients(model, i))
    check()
  assert_trees_equal(params_of(model), params_of(alone[0]))
  assert_trees_equal(pure(optimizer), pure(alone[1]))


@pytest.mark.parametrize("rules", [None, (("rows", "model"), ("columns", "data"))])
def test_optimizer_sharding_and_rules(rules):
  """optimizer_sharding is for the state alone; logical names go through the rules."""
  names = ("model", "data") if rules is None else ("rows", "columns")
  metadata = {"out_sharding": (None, None), "optimizer_sharding": names}
  if rules is not None:
    metadata["sharding_rules"] = rules
  with jax.set_mesh(mesh_of(4, 2)):
    model = linear(kernel_metadata=metadata)
    optimizer = lowmem.nnx.Optimizer(model, lowmem.adamw(1e-2))
    assert spec_of(model.kernel) == (None, None)
    assert spec_of(optimizer.residuals["kernel"]) == ("model", "data")
    mu = pure(optimizer).inner_state.inner_state[0].mu["kernel"]
    assert spec_of(mu.codes) == ("model", "data") and spec_of(mu.scale) == ("model", None)
    donated_step(model, optimizer, X, Y)
    assert spec_of(optimizer.residuals["kernel"]) == ("model", "data")


def test_refuses():
  make = lambda *args, **kwargs: lowmem.nnx.Optimizer(Net(nnx.Rngs(0)), *args, **kwargs)
  with pytest.raises(ValueError, match="nothing of optax_lowmem"):
    make(optax.adamw(1e-3))
  with pytest.raises(ValueError, match="2 loss scales"):
    make(lowmem.dynamic_loss_scale(lowmem.adamw(1e-3)), loss_scale="dynamic")
  with pytest.raises(ValueError, match="\"dynamic\" or a number; got 'static'"):
    make(lowmem.adamw(1e-3), loss_scale="static")
  for bad in (0.0, -1, float("nan"), np.float32("inf")):
    with pytest.raises(ValueError, match="positive and finite"):
      make(lowmem.adamw(1e-3), loss_scale=bad)
  for bad in (True, [8.0], {"init_scale": 8.0}):
    with pytest.raises(TypeError, match="scale is a number; got"):
      make(lowmem.adamw(1e-3), loss_scale=bad)
  with pytest.raises(TypeError, match=r"\['first'\]\['bias'\] is bfloat16, but its format fp16\+8"):
    lowmem.nnx.Optimizer(
      Net(nnx.Rngs(0), param_dtype=jnp.bfloat16), lowmem.adamw(1e-3, weights="fp16+8")
    )
  assert make(lowmem.adamw(1e-3, weights="fp32")).residuals == nnx.State({})
  model = Net(nnx.Rngs(0))
  untouched = params_of(model)
  with pytest.raises(ValueError):
    lowmem.nnx.Optimizer(model, optax.adamw(1e-3))
  assert_trees_equal(params_of(model), untouched)

  optimizer = lowmem.nnx.Optimizer(model, lowmem.adamw(1e-3))
  grads = nnx.state(model, nnx.Param)
  with pytest.raises(TypeError, match="grads"):
    optimizer.update(grads)
  del grads["first"]["bias"]
  with pytest.raises(ValueError, match=r"no leaf \['first'\]\['bias'\]"):
    optimizer.update(model, grads)
  other = nnx.state(Net(nnx.Rngs(0), width=32), nnx.Param)
  with pytest.raises(ValueError, match=r"\['first'\]\['bias'\] has shape \(32,\)"):
    optimizer.update(model, other)


def test_parameters_that_are_half_precision_already():
  model = linear(param_dtype=jnp.bfloat16)
  before = params_of(model)
  optimizer = lowmem.nnx.Optimizer(model, lowmem.adamw(1e-2))
  assert_trees_equal(params_of(model), before)
  assert not any(x.any() for x in jax.tree.leaves(optimizer.residuals))
  assert nnx.jit(train_step)(model, optimizer, X, Y) > loss_of(model, X, Y)


# A stock nnx.Optimizer.


@nnx.jit(donate_argnames=("model", "optimizer"))
def stock_step(model, optimizer, x, y):
  def scaled(model):
    return lowmem.scale_loss(loss_of(model, x, y), optimizer.opt_state)

  optimizer.update(model, nnx.grad(scaled)(model))


@pytest.mark.parametrize("name", ["fp16 under a loss scale", "some leaves", "chain"])
def test_stock_optimizer_of_a_converted_model(name):
  """The lines that the README recommends; then the bits of `tx.update`."""
  tx, model = TXS[name](), linear()
  params, opt_state = lowmem.init(tx, params_of(model))
  nnx.update(model, params)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  chex.assert_trees_all_equal_structs(pure(optimizer), opt_state)
  nnx.update(optimizer.opt_state, nnx.state(opt_state))
  assert_trees_equal(pure(optimizer), opt_state)
  assert isinstance(lowmem.loss_scale(optimizer.opt_state), jax.Array)
  masters = lowmem.master_params(nnx.state(model, nnx.Param), optimizer.opt_state)
  assert_trees_equal(nnx.as_pure(masters), lowmem.master_params(params, opt_state))

  update = jax.jit(functools.partial(updated, tx))
  for i in range(3):
    grads = given_gradients(model, i)
    params, opt_state = update(nnx.as_pure(grads), opt_state, params)
    _given_step(model, optimizer, grads)
  assert_trees_equal(params_of(model), params)
  assert_trees_equal(pure(optimizer), opt_state)


@pytest.mark.parametrize("sharded", [False, True])
def test_stock_optimizer_of_a_half_precision_model(sharded):
  metadata = {"out_sharding": ("model", "data")} if sharded else {}
  mesh = jax.set_mesh(mesh_of(4, 2)) if sharded else contextlib.nullcontext()
  with mesh:
    model = linear(param_dtype=jnp.bfloat16, kernel_metadata=metadata)
    tx = lowmem.dynamic_loss_scale(lowmem.adamw(1e-2, weights="bf16+3"))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    first = loss_of(model, X, Y)
    for _ in range(5):
      stock_step(model, optimizer, X, Y)
    state = pure(optimizer).inner_state
    mu = state.inner_state.inner_state[0].mu["kernel"]
    if sharded:
      assert spec_of(mu.codes) == ("model", "data") and spec_of(mu.scale) == ("model", None)
    assert loss_of(model, X, Y) < first and model.kernel.dtype == jnp.bfloat16
    assert state.residuals["kernel"].dtype == jnp.uint8 and state.residuals["kernel"].any()


def test_stock_optimizer_of_a_float32_model_is_optax():
  ours, theirs = linear(), linear()
  stock_step(ours, nnx.Optimizer(ours, lowmem.adamw(1e-2), wrt=nnx.Param), X, Y)
  stock_step(theirs, nnx.Optimizer(theirs, optax.adamw(1e-2), wrt=nnx.Param), X, Y)
  assert_trees_equal(params_of(ours), params_of(theirs))


# Without an optimizer object: the model split into a State of variables.


@pytest.mark.parametrize("name", TXS)
def test_states_of_variables(name):
  """The state's tree stays the same, and has the bits of plain arrays."""
  tx = TXS[name]()
  variables = nnx.state(linear(), nnx.Param)
  arrays = nnx.as_pure(variables)

  a, b = lowmem.init(tx, variables), lowmem.init(tx, arrays)
  grads = jax.tree.map(jnp.ones_like, a[0])
  for how in (lowmem.step, updated):
    step, before = jax.jit(functools.partial(how, tx)), a
    a, b = step(grads, a[1], a[0]), step(nnx.as_pure(grads), b[1], b[0])
    chex.assert_trees_all_equal_structs(a, before)
    assert_trees_equal(nnx.as_pure(a), b)
  masters = lowmem.master_params(*a)
  assert_trees_equal(nnx.as_pure(masters), lowmem.master_params(*b))
  assert_trees_equal(
    nnx.as_pure(lowmem.load_master(masters, a[1])), lowmem.load_master(nnx.as_pure(masters), b[1])
  )
  assert lowmem.memory_table(*a) == lowmem.memory_table(*b)


def test_gradient_release_of_states_of_variables():
  layers = {"a": nnx.Linear(8, 64, rngs=nnx.Rngs(0)), "b": nnx.Linear(64, 1, rngs=nnx.Rngs(1))}
  graphdefs = {name: nnx.graphdef(layer) for name, layer in layers.items()}

  def loss_fn(layers, x):
    for name in "ab":
      x = layers[name](lambda w, x, name=name: nnx.merge(graphdefs[name], w)(x), x)
    return jnp.mean((x - 1) ** 2)

  tx = lowmem.adamw(1e-2)
  variables = nnx.state(layers, nnx.Param)
  step = jax.jit(lowmem.fused_backward(loss_fn, tx))
  a, b = lowmem.init(tx, variables), lowmem.init(tx, nnx.as_pure(variables))
  for _ in range(2):
    before = a
    a, b = step(*a, X)[1:], step(*b, X)[1:]
    chex.assert_trees_all_equal_structs(a, before)
  assert_trees_equal(nnx.as_pure(a), b)
