"""Members behind ours and around them: each lands, or is refused by name. Makes docs/members_behind.md.

`python -m tests.test_members_behind` writes the page; the tests say that it is true.
"""

import functools
import inspect
import pathlib
import re
import warnings

import chex
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_lowmem as lowmem

pytestmark = [
  pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Optax's own functions
  pytest.mark.filterwarnings("ignore:Specifying a key"),
]

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "members_behind.md"
LOW = "bf16+16"
FORMATS = {"kernel": LOW, "bias": "fp32"}

# What stands in the table: X is the optimizer. Each is run as it is written here.
BEHIND = """
chain(X, identity())
named_chain(("x", X), ("y", identity()))
chain(X, scale(0.25))
chain(X, scale_by_learning_rate(0.5))
chain(X, scale_by_schedule(lambda count: 1 / (count + 1)))
chain(X, inject_hyperparams(scale)(step_size=0.25))
chain(X, contrib.reduce_on_plateau(patience=1))
chain(X, masked(scale(0.25), {"kernel": True, "bias": False}))
chain(X, masked(scale(0.25), {"kernel": False, "bias": True}))
chain(X, partition({"a": scale(0.25), "b": identity()}, {"kernel": "a", "bias": "b"}))
chain(X, set_to_zero())
chain(X, freeze({"kernel": True, "bias": False}))
chain(X, freeze({"kernel": False, "bias": True}))
chain(X, selective_transform(scale(0.25), freeze_mask={"kernel": True, "bias": False}))
chain(X, clip(0.01))
chain(X, clip_by_global_norm(0.01))
chain(X, clip_by_block_rms(0.01))
chain(X, adaptive_grad_clip(0.01))
chain(X, normalize_by_update_norm())
chain(X, contrib.normalize())
chain(X, centralize())
chain(X, add_decayed_weights(0.1))
chain(X, add_noise(0.1, 0.5, key=0))
chain(X, keep_params_nonnegative())
chain(X, zero_nans())
chain(X, trace(0.9))
chain(X, ema(0.9))
chain(X, apply_every(2))
chain(X, scale_by_trust_ratio())
chain(X, scale_by_param_block_norm())
chain(X, scale_by_param_block_rms())
chain(X, scale_by_sign())
chain(X, scale_by_polyak())
chain(X, scale_by_backtracking_linesearch(3))
chain(X, scale_by_zoom_linesearch(3))
chain(X, stateless(lambda updates, params: updates))
chain(X, stateless_with_tree_map(lambda update, param: 0.5 * update))
chain(X, snapshot("norm", tree.norm))
chain(X, monitor({"norm": tree.norm, "mean": measure_with_ema(tree.norm, 0.9)}))
chain(X, flatten(scale(0.25)))
chain(X, contrib.split_real_and_imaginary(scale(0.25)))
chain(X, conditionally_transform(scale(0.25), lambda step: step % 2 == 0))
chain(X, conditionally_mask(identity(), lambda step: step % 2 == 0))
chain(X, apply_if_finite(identity(), 2))
chain(X, MultiSteps(identity(), 2).gradient_transformation())
chain(X, sgd(0.5))
"""
AROUND = """
MultiSteps(X, 2).gradient_transformation()
MultiSteps(X, 2, should_skip_update_fn=skip_not_finite).gradient_transformation()
MultiSteps(chain(X, scale(0.25)), 2).gradient_transformation()
chain(MultiSteps(X, 2).gradient_transformation(), scale(0.25))
apply_if_finite(X, 2)
apply_if_finite(chain(X, scale(0.25)), 2)
conditionally_mask(X, lambda step: step % 2 == 0)
conditionally_transform(X, lambda step: step % 2 == 0)
masked(X, {"kernel": True, "bias": False})
partition({"a": X, "b": sgd(0.1)}, {"kernel": "a", "bias": "b"})
multi_transform({"a": X, "b": set_to_zero()}, {"kernel": "a", "bias": "b"})
selective_transform(X, freeze_mask={"kernel": False, "bias": True})
with_extra_args_support(X)
inject_hyperparams(lambda rate: chain(scale(rate), X), hyperparam_dtype=jnp.float32)(rate=0.5)
inject_stateful_hyperparams(lambda rate: chain(scale(rate), X), hyperparam_dtype=jnp.float32)(rate=0.5)
contrib.split_real_and_imaginary(X)
flatten(X)
lookahead(X, 2, 0.5)
contrib.schedule_free(X, 0.1)
contrib.mechanize(X)
contrib.sam(X, sgd(0.1))
contrib.sam(X, sgd(0.1), opaque_mode=True)
"""
ROWS = [row for row in (BEHIND + AROUND).splitlines() if row]

# Two take gradients by example, one is a part of muon's.
LEFT_OUT = {"differentially_private_aggregate", "dpsgd", "scale_by_muon"}
UNANNOTATED = {"dog", "dowg", "scale_by_factored_rms"}


PAGE_TEXT = """# What may stand behind an optimizer of ours, or around it

`python -m tests.test_members_behind` writes this page, and `tests/test_members_behind.py` says that
it is true: nothing in the tables is filled in by hand.

A member of optax_lowmem writes a residual that belongs to one weight: the weight that its own update
leads to. A member behind it in `optax.chain` that changes the update makes another weight land. Then
the residual is wrong, and the weights keep bfloat16's precision. So `lowmem.init`,
`lowmem.TrainState.create` and `lowmem.nnx.Optimizer` trace `tx.update` once, without computing
anything, follow the updates through it, and refuse by name whoever changes them. They look into
`lax.cond`, too (`optax.MultiSteps`, `optax.apply_if_finite`). `lowmem.step` refuses a member that
uses the updates in any way, because it has none: it writes the new weights at once.

Two ways lead out:

- Put the member in front of ours, where it gets gradients.
- Wrap the whole chain: `lowmem.delta_bits(optax.chain(optax.adamw(lr), optax.scale(0.25)))`. It
  does exactly what the chain does on float32 weights.

"works" means: after six steps the float32 masters are where Optax's own optimizer gets to on float32
weights, and each residual belongs to its weight. "refused: X" means an error that names X. The
optimizer is SGD with momentum (`lowmem.sgd`; `optax.sgd` to compare with, and inside of
`lowmem.delta_bits`). "kernel" has the format bf16+16, "bias" is float32. All names are Optax's.

## Behind

{behind}

Every other transformation of `optax` and `optax.contrib` is refused there as well:
{names}.

Left out are `differentially_private_aggregate` and `dpsgd`, which take a gradient for each example,
and `scale_by_muon`, which is a part of `muon`.

## Around

{around}

## What is not seen

- `tx.init` alone (a stock Flax `TrainState`, a stock `nnx.Optimizer`) sees one member at a time. Then
  only `lowmem.step` refuses.
- Where `tx.update` needs arguments that cannot be guessed, or cannot be traced by `jax.jit`,
  `lowmem.init` warns that it could not look through.
"""


def optimizer():
  return lowmem.sgd(0.1, momentum=0.9, accumulator="fp32", weights=formats)


def formats(path, leaf):
  del leaf
  name = [key.key for key in path if hasattr(key, "key")]
  return FORMATS[name[-1]] if name else LOW


def reference():
  return optax.sgd(0.1, momentum=0.9)


def make(row: str, x) -> optax.GradientTransformationExtraArgs:
  names = {"X": x, "jnp": jnp, "tree": optax.tree} | vars(optax) | OWN
  names["contrib"] = optax.contrib
  return optax.with_extra_args_support(eval(row, names))


def make_params(row=""):
  k1, k2 = jax.random.split(jax.random.key(0))
  params = {"kernel": 0.1 * jax.random.normal(k1, (4, 33)), "bias": jax.random.normal(k2, (7,))}
  return optax.LookaheadParams.init_synced(params) if row.startswith("lookahead") else params


def loss_fn(params, *args):
  del args
  params = getattr(params, "fast", params)
  return sum(jnp.mean((x - 0.3) ** 2 * jnp.arange(1, x.size + 1).reshape(x.shape))
             for x in jax.tree.leaves(params))  # fmt: skip


def extra_args(row, grads, value):
  """What Optax's transformations are given besides gradients; SAM refuses what it does not know."""
  if row.split("(")[0] in OWN:
    return {}
  if "sam(" in row:
    return {"grad_fn": lambda params, i: grads} if "opaque" in row else {}
  return {"value": value, "grad": grads, "value_fn": loss_fn}


def train(row, tx, params, state, *, in_place: bool, is_ours: bool = True):
  """Six steps; the float32 masters. Asserts law 3 after each."""

  # Nearly all time goes into compiling.
  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
  def step(params, state):
    masters = lowmem.master_params(params, state) if is_ours else params
    value, grads = jax.value_and_grad(loss_fn)(masters)
    grads = getattr(grads, "fast", grads)
    extra = extra_args(row, grads, value)
    if in_place:
      return lowmem.step(tx, grads, state, params, **extra)
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state

  for _ in range(6):
    params, state = step(params, state)
    masters = lowmem.master_params(params, state) if is_ours else params
    for low, master in zip(*map(jax.tree.leaves, (params, masters)), strict=True):
      low, master = np.asarray(low), np.asarray(master)
      off, least = (np.abs(np.float32(x) - master) for x in (low, master.astype(low.dtype)))
      assert np.all(off <= least), "a residual does not belong to its weight"
  return masters


@functools.cache
def expected(row: str):
  """Where Optax's optimizer gets to on float32 weights."""
  tx, params = make(row, reference()), make_params(row)
  return train(row, tx, params, tx.init(params), in_place=False, is_ours=False)


def outcome(tx, row, init, *, in_place: bool) -> str:
  """The verdict on an init and six steps."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", UserWarning)
      params, state = init(tx, make_params(row))
    masters = train(row, tx, params, state, in_place=in_place)
  except (ValueError, TypeError) as error:
    name = re.search(r"(\w+) stands behind", str(error))
    return f"refused: {name[1] if name else reason(str(error))}"
  chex.assert_trees_all_close(masters, expected(row), rtol=1e-5, atol=1e-6)
  return "works"


def reason(error: str) -> str:
  return next(text for text in ("other leaves than params", "grads have no leaf") if text in error)


def create(tx, params):
  state = lowmem.TrainState.create(apply_fn=None, params=params, tx=tx)
  return state.params, state.opt_state


@functools.cache
def cells(row: str) -> tuple[str, str, str]:
  """lowmem.init with tx.update, TrainState.create with lowmem.step, delta_bits around all."""
  tx = make(row, optimizer())
  updates = outcome(tx, row, lowmem.init, in_place=False)
  in_place = outcome(tx, row, create, in_place=True)
  if updates == in_place == "works":
    return updates, in_place, ""
  whole = lowmem.delta_bits(make(row, reference()), formats)
  return updates, in_place, outcome(whole, row, create, in_place=True)


def page() -> str:
  head = "| X is the optimizer | `lowmem.init`, `tx.update` | `TrainState`, `nnx.Optimizer` |"
  head += " `lowmem.delta_bits` around all |\n| --- | --- | --- | --- |"
  tables = ([head, *(line(row) for row in rows.splitlines() if row)] for rows in (BEHIND, AROUND))
  behind, around = ("\n".join(lines) for lines in tables)
  names = ", ".join(f"`{name}`" for name in sorted(others()))
  return PAGE_TEXT.format(behind=behind, around=around, names=names)


def line(row: str) -> str:
  return f"| `{row}` | " + " | ".join(cells(row)) + " |"


@pytest.mark.parametrize("row", ROWS)
def test_lands_or_is_refused(row):
  assert line(row) in PAGE.read_text().splitlines()


def others() -> dict[str, optax.GradientTransformation]:
  """Every other transformation of Optax and optax.contrib, made with numbers."""
  made = {}
  for module in (optax, optax.contrib):
    for name, f in inspect.getmembers(module, inspect.isfunction):
      if name[0] == "_" or name in LEFT_OUT or re.search(rf"\b{name}\(", "".join(ROWS)):
        continue
      signature = inspect.signature(f)
      required = [p for p in signature.parameters.values() if p.default is p.empty]
      if "GradientTransformation" in str(signature.return_annotation) or name in UNANNOTATED:
        made[name] = f(*[0.1 for _ in required])
  return made


def refused(init, tx) -> str | None:
  """By name, or None."""
  try:
    init(tx, make_params())
  except ValueError as error:
    return re.search(r"(\w+) stands behind", str(error))[1]
  return None


def test_every_other_one_is_refused():
  found = {name: refused(lowmem.init, optax.chain(optimizer(), x)) for name, x in others().items()}
  assert len(found) > 60 and None not in found.values()
  assert all(f"`{name}`" in PAGE.read_text() for name in found)


def wrapper(update):
  """A transformation around another, of update(inner.update, updates, state, params)."""

  def wrap(inner):
    inner = optax.with_extra_args_support(inner)

    def update_fn(updates, state, params=None, **extra_args):
      return update(functools.partial(inner.update, **extra_args), updates, state, params)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)

  return wrap


def scanned(update, updates, state, params):
  def body(state, _):
    new_updates, state = update(updates, state, params)
    return state, new_updates

  state, stacked = jax.lax.scan(body, state, length=1)
  return jax.tree.map(lambda u: u[0], stacked), state


def half_left_out(update, updates, state, params):
  keeps = updates["bias"][0] > 0
  updates, state = update(updates, state, params)
  return jax.tree.map(lambda u: jnp.where(keeps, u, 0), updates), state


def other_weights(update, updates, state, params):
  return update(updates, state, jax.tree.map(lambda p: 0.5 * p, params))


def old_state(update, updates, state, params):
  return update(updates, state, params)[0], state


def left_out(where, update, updates, state, params):
  keeps = where(updates["bias"][0] > 0)
  new_updates, new_state = update(updates, state, params)
  updates = jax.tree.map(lambda u: jnp.where(keeps, u, -0.0), new_updates)
  return updates, jax.tree.map(lambda x, y: jnp.where(~keeps, y, x), new_state, state)


def jitted(update, updates, state, params):
  return jax.jit(update)(updates, state, params)


OWN = {
  "left_out": wrapper(functools.partial(left_out, lambda keeps: keeps)),
  "left_out_at_rest": wrapper(functools.partial(left_out, jnp.logical_not)),
  "jitted": wrapper(jitted),
  # A function that JAX has in its cache when the first step comes.
  "cached": lambda x: optax.with_extra_args_support(x)._replace(update=jax.jit(x.update)),
}


@pytest.mark.parametrize("update", [scanned, half_left_out, other_weights, old_state])
def test_a_wrapper_of_ones_own_is_refused(update):
  """An update and its residual come together, or are both left out."""
  with pytest.raises(ValueError, match="^wrap stands behind .*delta_bits"):
    lowmem.init(wrapper(update)(optimizer()), make_params())


@pytest.mark.parametrize("row", [f"{name}(X)" for name in OWN])
def test_a_wrapper_of_ones_own_works(row):
  assert outcome(make(row, optimizer()), row, lowmem.init, in_place=False) == "works"


def test_who_is_named():
  """Also inside of other transformations, and where JAX has traced a function before."""
  scaled = optax.chain(optimizer(), optax.scale(0.5))
  where = optax.stateless_with_tree_map(lambda u, p: jnp.where(u > 0, u, 0))
  for tx, name in (
    (lowmem.dynamic_loss_scale(scaled), "scale"),
    (optax.with_extra_args_support(scaled)._replace(update=jax.jit(scaled.update)), "scale"),
    (optax.chain(optimizer(), optax.zero_nans()), "zero_nans"),
    (optax.chain(optimizer(), where), "stateless_with_tree_map"),
    (optax.chain(lowmem.delta_bits(optax.sgd(0.1), LOW), optax.scale(2.0)), "scale"),
    (optax.chain(optax.sgd(0.1), lowmem.delta_bits(None, LOW), optax.scale(2.0)), "scale"),
  ):
    assert refused(lowmem.init, tx) == refused(create, tx) == name
    assert refused(lambda tx, params: jax.jit(lambda p: lowmem.init(tx, p))(params), tx) == name
  with jax.disable_jit():
    assert refused(lowmem.init, scaled) == "scale"
    lowmem.init(optimizer(), make_params())
  low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_params())
  twice = optax.chain(lowmem.delta_bits(optax.sgd(0.1)), lowmem.delta_bits())
  assert refused(lambda tx, _: lowmem.init(tx, low), twice) == "delta_bits"


def test_what_stays_allowed():
  params = make_params() | {"none": None, "count": jnp.zeros(3, jnp.int32), "z": jnp.ones(2, "c8")}
  kernel = lambda p: {k: k == "kernel" for k in p}
  bias = lambda p: {k: k == "bias" for k in p}
  for tx in (
    optax.chain(optax.scale(0.5), optax.adamw(1e-3), lowmem.delta_bits()),
    optax.chain(
      optax.masked(lowmem.delta_bits(optax.sgd(0.1)), kernel),
      optax.masked(lowmem.delta_bits(optax.sgd(0.1)), bias),
    ),
    lowmem.dynamic_loss_scale(optax.chain(lowmem.scale_by_adam(), lowmem.delta_bits())),
    optax.MultiSteps(lowmem.dynamic_loss_scale(lowmem.adamw(1e-3)), 2),
  ):
    lowmem.init(tx, params)
    create(tx, params)
    jax.eval_shape(functools.partial(lowmem.init, tx), params)


def test_nnx():
  tx = optax.chain(optimizer(), optax.scale(0.5))
  model = nnx.Linear(4, 33, use_bias=False, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="^scale stands behind"):
    lowmem.nnx.Optimizer(model, tx, wrt=nnx.Param)
  variables = nnx.state(model, nnx.Param)
  with pytest.raises(ValueError, match="^scale stands behind"):
    lowmem.init(tx, variables)
  assert model.kernel[...].dtype == jnp.float32  # nothing has been converted
  lowmem.init(optimizer(), variables)


def test_arguments_that_init_does_not_have():
  """A number is guessed; what cannot be guessed is said."""

  def needs(use):
    def update_fn(updates, state, params=None, *, temperature, **extra_args):
      return jax.tree.map(lambda u: u * use(temperature), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)

  number = needs(lambda x: x)
  lowmem.init(optax.chain(number, optimizer()), make_params())
  assert refused(lowmem.init, optax.chain(optimizer(), number)) == "needs"
  assert refused(lowmem.init, optax.chain(number, optimizer(), optax.scale(0.5))) == "scale"
  a_dict = needs(lambda x: x["of"])
  for tx in (optax.chain(a_dict, optimizer()), optax.chain(optimizer(), a_dict)):
    with pytest.warns(UserWarning, match="cannot look through tx .*tx.update: TypeError"):
      lowmem.init(tx, make_params())


def test_other_leaves_are_refused():
  tx = optax.chain(optax.flatten(optimizer()))
  with pytest.raises(ValueError, match="other leaves than params"):
    lowmem.init(tx, make_params())


if __name__ == "__main__":
  PAGE.write_text(page())
