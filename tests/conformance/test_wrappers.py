"""Optax's tests of its wrappers (MultiSteps, masked, partition, ...), with ours inside of them."""

import jax
import jax.numpy as jnp
import optax
from optax._src import alias, combine, transform
import pytest

from . import suites
from .subjects import ALL, BOTH, CHAINED, DELTA_BITS, DYNAMIC, OURS, SCALE_BY_ADAM, STATIC

# (module of Optax's, class, what it makes transformations with, tests that make them with alias,
# tests that make them with transform). The other tests are about Optax alone.
SUITES = (
  (
    "optax.transforms._accumulation_test",
    "AccumulationTest",
    {"alias": alias, "combine": combine},
    (
      "test_multi_steps_every_k_schedule",
      "test_multi_steps_scan_dtype_stability",
      "test_multi_steps_zero_nans",
      "test_multi_steps_skip_not_finite",
      "test_multi_steps_mixed_precision",
    ),
    ("test_multi_steps",),
  ),
  (
    "optax.transforms._masking_test",
    "MaskedTest",
    {"alias": alias},
    (
      "test_masked",
      "test_prefix_mask",
      "test_empty",
      "test_tree_mismatch_fails",
      "test_nested_mask",
      "test_masked_state_structure",
      "test_mask_compatible_callable_pytree",
    ),
    (),
  ),
  (
    "optax.transforms._combining_test",
    "CombiningTest",
    {"transform": transform},
    (),
    ("test_chain",),
  ),
  (
    "optax.transforms._combining_test",
    "ExtraArgsTest",
    {"alias": alias},
    ("test_extra_args",),
    (),
  ),
  (
    "optax.transforms._combining_test",
    "PartitionTest",
    {"alias": alias, "transform": transform},
    ("test_empty", "test_labels_mismatch"),
    ("test_partition",),
  ),
  (
    "optax.transforms._conditionality_test",
    "ConditionalityTest",
    {"alias": alias},
    ("test_apply_if_finite", "test_apply_if_finite_pmap"),
    (),
  ),
  (
    "optax.transforms._conditionality_test",
    "ConditionallyTransformTest",
    {"transform": transform},
    (),
    ("test_stateless_inner",),
  ),
  (
    "optax.transforms._conditionality_test",
    "ConditionallyMaskTest",
    {"transform": transform},
    (),
    ("test_stateless_inner", "test_stateless_inner_with_extra_args"),
  ),
  (
    "optax.schedules._inject_test",
    "InjectHyperparamsTest",
    {"transform": transform},
    (),
    (
      "test_updates",
      "test_hyperparams_state",
      "test_constant_hyperparams",
      "test_numeric_static_args",
      "test_hyperparam_dtypes",
      "test_hyperparam_default_dtype",
      "test_inject_hyperparams_starts_with_step_count_zero",
    ),
  ),
  (
    "optax.schedules._inject_test",
    "StatefulTest",
    {"transform": transform},
    (),
    ("test_inject_stateful_hyperparams",),
  ),
  ("optax.transforms._layouts_test", "LayoutsTest", {"alias": alias}, ("test_flatten",), ()),
  (
    "optax.transforms._freezing_test",
    "SelectiveTransformTest",
    {"alias": alias},
    (
      "test_selective_transform_effect",
      "test_nested_train_all",
      "test_scalar_freeze_all",
      "test_partial_prefix_mask_behavior",
    ),
    (),
  ),
)
OF_SCALE_BY_ADAM = (
  "test_chain",
  "test_constant_hyperparams",
  "test_numeric_static_args",
  "test_hyperparam_dtypes",
  "test_hyperparam_default_dtype",
)


def _holds_trace(subject, case):
  """The suite reads the state by its place in Optax's; by its name it is what it expects."""
  params = {
    "a": [jnp.ones(1), (jnp.ones(2), jnp.ones(3))],
    "b": {"c": jnp.ones(4), "d": jnp.ones(5)},
  }
  mask = {"a": [True, (True, False)], "b": False}
  tx = optax.masked(case.module.alias.sgd(1.0, momentum=0.0), mask)
  trace = optax.tree.get(jax.jit(tx.init)(params), "trace")
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  kept = {"a": [True, (True, optax.MaskedNode())], "b": optax.MaskedNode()}
  assert jax.tree.structure(jax.tree.map(lambda _: 0, trace, is_leaf=is_masked)) == (
    jax.tree.structure(jax.tree.map(lambda _: 0, kept, is_leaf=is_masked))
  )
  assert isinstance(trace["b"], optax.MaskedNode)
  del subject


def _holds_loss_scale_skips(subject, case):
  """What `apply_if_finite` lets through after so many errors, the loss scale skips."""
  del subject
  opt = optax.apply_if_finite(case.module.alias.sgd(1.0, momentum=0.0), 2)
  params = jnp.array(0.0)
  state = opt.init(params)
  for x, expected, rejected, skipped in (
    (1.0, -1.0, 0, 0),
    (jnp.nan, -1.0, 1, 0),
    (jnp.nan, -1.0, 2, 0),
    (1.0, -2.0, 2, 0),
    (jnp.nan, -2.0, 3, 0),
    (jnp.nan, -2.0, 4, 0),
    (jnp.nan, -2.0, 5, 1),
  ):
    updates, state = opt.update(jnp.array(x), state, params)
    params = optax.apply_updates(params, updates)
    assert params == expected and state.last_finite == (x == 1.0)
    assert state.total_notfinite == rejected
    assert optax.tree.get(state, "skipped") == skipped


def _holds_refused(subject, case):
  """delta_bits refuses hyperparameters that are traced in half precision, naming the argument."""
  del subject
  with pytest.raises(ValueError, match="hyperparam_dtype=jnp.float32"):
    case.run_original()


def _has_half_hyperparameters(subject, arguments):
  if subject not in (DELTA_BITS, BOTH, STATIC):
    return False
  return arguments.get("hyperparam_dtype", arguments["param_dtype"]) == jnp.bfloat16


def _holds_with_params(subject, case):
  """The same update with the parameters given."""
  dtype, param_dtype, grad_dtype = (
    case.arguments[name] for name in ("hyperparam_dtype", "param_dtype", "grad_dtype")
  )
  tx = optax.inject_hyperparams(
    lambda b1, b2: subject.wrap(optax.scale_by_adam(b1, b2), False), hyperparam_dtype=dtype
  )(b1=0.9, b2=0.95)
  params = [jnp.ones(shape, param_dtype) for shape in ((1, 2), (2,), (1, 1, 1))]
  state = jax.jit(tx.init)(params)
  grads = jax.tree.map(lambda x: x.astype(grad_dtype), params)
  _, state = jax.jit(tx.update)(grads, state, params)
  assert state.hyperparams["b1"].dtype == state.hyperparams["b2"].dtype == dtype


EXCUSED = (
  suites.Excused(
    "test_masked_state_structure",
    lambda subject, arguments: True,
    "The suite reads the momentum at its place in Optax's state, which our wrapper's state has"
    " around it. By name (`optax.tree.get`) it is masked as expected: that is asserted instead.",
    _holds_trace,
  ),
  suites.Excused(
    "test_apply_if_finite",
    lambda subject, arguments: subject in (DYNAMIC, STATIC),
    "After so many errors in a row `optax.apply_if_finite` lets a NaN through, and the suite expects"
    " it in the weights. A loss scale inside skips that step: that weights stand still, and that the"
    " loss scale counts it, is asserted instead.",
    _holds_loss_scale_skips,
  ),
  suites.Excused(
    "test_apply_if_finite_pmap",
    lambda subject, arguments: subject in (DYNAMIC, STATIC),
    "As test_apply_if_finite.",
    _holds_loss_scale_skips,
  ),
  *(
    suites.Excused(
      test,
      _has_half_hyperparameters,
      "`inject_hyperparams` casts b2 to bfloat16, in which 0.999 is 1. `delta_bits` refuses it and"
      " names `hyperparam_dtype` (law 11): that is asserted instead.",
      _holds_refused,
    )
    for test in ("test_hyperparam_dtypes", "test_hyperparam_default_dtype")
  ),
  suites.Excused(
    "test_hyperparam_dtypes",
    lambda subject, arguments: (
      subject in (DELTA_BITS, BOTH, STATIC, CHAINED)
      and arguments["param_dtype"] != arguments["grad_dtype"]
    ),
    "The test gives no parameters, which `delta_bits` needs (zeros of the gradients' dtype are"
    " given elsewhere; here it is not the parameters'). It is run with parameters instead.",
    _holds_with_params,
  ),
)  # fmt: skip

for _subject in ALL:
  if not _subject.has_updates:
    continue  # exact sums of float32, which are no low-memory weights
  for _name, _class, _modules, _of_alias, _of_transform in SUITES:
    if _subject is OURS:
      _only = _of_alias
    elif _subject is SCALE_BY_ADAM:
      _only = tuple(test for test in _of_transform if test in OF_SCALE_BY_ADAM)
    else:
      _only = (*_of_alias, *_of_transform)
    if not _only:
      continue
    _module = suites.load(_name, _subject)
    _wrapped = {name: suites.Wrapped(module, _subject) for name, module in _modules.items()}
    for _attribute, _proxy in _wrapped.items():
      setattr(_module, _attribute, _proxy)
    suites.add(
      globals(),
      _module,
      _class,
      _subject,
      wrapped=_wrapped.values(),
      only=_only,
      excused=EXCUSED,
    )
