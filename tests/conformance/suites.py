"""Optax's test modules, loaded afresh for each subject, with the subject in Optax's place."""

from collections.abc import Callable, Collection, Iterable
import dataclasses
import functools
import importlib.util
import inspect
import os
import re
import types
from typing import Any
from unittest import mock
import warnings

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax._src import test_utils
import pytest

from .subjects import DYNAMIC, DYNAMIC_DELTA_BITS, FLOAT32_UPDATES, Subject

# Their names in Optax's suites; they demand updates in the dtype of the gradient.
GRADIENT_DTYPE_TESTS = (
  "test_preserve_dtype",
  "test_state_shape_dtype_shard_stability",
  "test_gradient_accumulation",
)
# It steps 90 times outside of jit, where each operation is compiled apart: 20 seconds a subject.
EAGER_TESTS = ("test_multi_steps_mixed_precision",)
# It chains what it has made with `alias`: of one loss scale around another nothing could be said.
CHAIN_TESTS = ("test_multi_steps_zero_nans",)


@dataclasses.dataclass(frozen=True)
class Excused:
  """Cases that cannot hold, and what holds instead.

  Attributes:
    test: the test's name.
    cases: which of them, from (subject, the case's arguments).
    reason: why they cannot hold.
    holds: (subject, original test, the case's arguments) -> the test instead.
  """

  test: str
  cases: Callable[[Subject, dict], bool]
  reason: str
  holds: Callable[[Subject, "Case"], None]


@dataclasses.dataclass(frozen=True)
class Case:
  """One case of a test: its TestCase, module, and arguments."""

  self: Any
  module: types.ModuleType
  original: Callable
  arguments: dict

  def run_original(self, close: Callable | None = None):
    """Runs the test; `close(actual, desired, **tolerances)` compares in the place of Optax's."""
    if close is None:
      return self.original(self.self)
    names = vars(self.module.test_utils) | {"assert_trees_all_close": close}
    with mock.patch.object(self.module, "test_utils", types.SimpleNamespace(**names)):
      return self.original(self.self)


class Wrapped:
  """A module of Optax whose factories make the subject's transformations."""

  def __init__(self, module, subject: Subject):
    self.module, self.subject = module, subject
    self.as_gradient = False
    self.is_jitted = False
    self.is_chain_left = False
    self.used = False

  def __getattr__(self, name):
    found = getattr(self.module, name)
    if not callable(found) or inspect.isclass(found) or (name == "chain" and self.is_chain_left):
      return found
    factory = self.subject.factory(name, found, lambda: self.as_gradient)
    self.used |= factory is not found
    return _jitted(factory) if self.is_jitted and factory is not found else factory


def _jitted(factory):
  @functools.wraps(factory)
  def make(*args, **kwargs):
    tx = optax.with_extra_args_support(factory(*args, **kwargs))
    return optax.GradientTransformationExtraArgs(jax.jit(tx.init), jax.jit(tx.update))

  return make


class Version(str):
  """A version that compares by its numbers, not by its characters."""

  def _numbers(self, other=None):
    text = str(self if other is None else other)
    return tuple(int(number) for number in re.findall(r"\d+", text))

  def __lt__(self, other):
    return self._numbers() < self._numbers(other)


class RepairedJax:
  """`jax`, its version with an order ('0.12.0' < '0.7.2' skips every test of sharding)."""

  __version__ = Version(jax.__version__)

  def __getattr__(self, name):
    return getattr(jax, name)


def load(name: str, subject: Subject, named: Callable | None = None) -> types.ModuleType:
  """A copy of a test module with only the cases that the subject covers.

  Args:
    name: the module's.
    subject: what is tested.
    named: (subject, entries of a table of cases by name) -> the entries instead.

  Returns:
    The module.
  """
  spec = importlib.util.find_spec(name)
  assert spec is not None and spec.loader is not None, f"{name} is not in this Optax"
  module = importlib.util.module_from_spec(spec)
  product, named_parameters = parameterized.product, parameterized.named_parameters

  def covered(*sequences, **grid):
    def is_covered(entry) -> bool:
      name = entry.get("opt_name", "") if isinstance(entry, dict) else entry
      return not name or subject.covers(name.removesuffix("_mom"))

    if "opt_name" in grid:
      grid["opt_name"] = tuple(filter(is_covered, grid["opt_name"]))
    return product(*(tuple(filter(is_covered, entries)) for entries in sequences), **grid)

  def replaced(*entries):
    if named is None:
      return named_parameters(*entries)
    return named_parameters(*named(subject, entries[0] if len(entries) == 1 else entries))

  with (
    mock.patch.object(parameterized, "product", covered),
    mock.patch.object(parameterized, "named_parameters", replaced),
    mock.patch.dict(os.environ),  # sharding_test writes XLA_FLAGS
    warnings.catch_warnings(action="ignore"),  # and makes noisy_sgd without a key
  ):
    spec.loader.exec_module(module)
  return module


def arguments_of(test: Callable) -> dict:
  """The arguments of a parameterized case, by name."""
  case = inspect.getclosurevars(test).nonlocals if inspect.isfunction(test) else {}
  params = case.get("testcase_params")
  if params is None:
    return {}
  if isinstance(params, dict):
    return dict(params)
  params = params if isinstance(params, tuple | list) else (params,)
  names = list(inspect.signature(inspect.unwrap(test)).parameters)[1:]
  return dict(zip(names, params, strict=False))


def name_of(test: str) -> str:
  """A test's name without the number of its case."""
  return re.sub(r"\d+$", "", test)


def add(
  namespace: dict,
  module: types.ModuleType,
  class_name: str,
  subject: Subject,
  *,
  wrapped: Iterable[Wrapped] = (),
  only: Collection[str] | None = None,
  without: Collection[str] = (),
  excused: Iterable[Excused] = (),
  ignored: Iterable[str] = (),
):
  """Puts a suite's class, with a subject in Optax's place, into a module of ours.

  Args:
    namespace: `globals()` of that module.
    module: from `load`, the subject in the place of Optax's modules.
    class_name: of the suite's class in it.
    subject: what is tested.
    wrapped: the modules of Optax that were replaced.
    only: the tests that use them; all by default.
    without: tests that are not about the subject.
    excused: the cases that cannot hold.
    ignored: warnings that the suite itself causes.
  """
  original = getattr(module, class_name)
  wrapped = tuple(wrapped)

  def set_up(self):
    original.setUp(self)
    self.longMessage = True
    for proxy in wrapped:
      proxy.as_gradient = name_of(self._testMethodName) in GRADIENT_DTYPE_TESTS
      proxy.is_jitted = name_of(self._testMethodName) in EAGER_TESTS
      proxy.is_chain_left = name_of(self._testMethodName) in CHAIN_TESTS
      proxy.used = False

  def tear_down(self):
    original.tearDown(self)

  contents: dict[str, Any] = {
    "setUp": set_up,
    "tearDown": tear_down,
    "subject": subject,
    "suite": module.__name__.removeprefix("optax.").replace(".", "/") + ": " + class_name,
    "wrapped": wrapped,
    "pytestmark": [pytest.mark.filterwarnings(text) for text in ignored],
    "excused": {},
  }
  for name in dir(original):
    if not name.startswith("test"):
      continue
    test = getattr(original, name)
    base = next((t for t in _bases(original, name)), name)
    if (only is not None and base not in only) or base in without:
      contents[name] = None
      continue
    arguments = arguments_of(test) | {"name": name}
    for exception in excused:
      if exception.test == base and exception.cases(subject, arguments):
        contents[name] = _instead(exception, subject, module, test, arguments)
        contents["excused"][name] = exception.reason
        break
    contents.setdefault(name, _used(test, wrapped))
  cls = type(original)(f"{class_name}_{subject.identifier}", (original,), contents)
  cls.__module__, cls.__qualname__ = namespace["__name__"], cls.__name__
  namespace[cls.__name__] = cls


def _bases(cls, name):
  """The names that a case's name may have come from, the test's own first."""
  test = inspect.unwrap(getattr(cls, name))
  yield getattr(test, "__name__", name)


def _used(test, wrapped):
  """The test, which then has to have made something of ours."""

  def run(self):

    test(self)
    assert not wrapped or any(proxy.used for proxy in wrapped), "a test of nothing of ours"

  return run


def _instead(exception, subject, module, test, arguments):
  def instead(self):
    exception.holds(subject, Case(self, module, test, arguments))

  return instead


DTYPE_OF_UPDATES = Excused(
  "test_preserve_dtype",
  lambda subject, arguments: subject in FLOAT32_UPDATES and arguments["dtype"] == "bfloat16",
  "The suite expects bfloat16 updates of bfloat16 gradients. Gradients are unscaled, and stored"
  " statistics computed with, in float32, and so are the updates (`optax.apply_updates` takes"
  " them): that is asserted, and the test is run on them cast.",
  lambda subject, case: case.run_original(),
)


def _close_by_codes(actual, desired, **tolerances):
  """Codes and residuals may differ by one, everything else by the suite's tolerances."""
  for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
    if x.dtype in (jnp.int8, jnp.uint8):
      np.testing.assert_allclose(x.astype(int), y.astype(int), atol=1)
    else:
      test_utils.assert_trees_all_close(x, y, **tolerances)


STORED_CODES = Excused(
  "test_optimizers_can_be_wrapped_in_inject_hyperparams",
  lambda subject, arguments: not subject.has_updates,
  "A hyperparameter that is an array and one that is a constant give updates that differ in the"
  " last place, by which a stochastically rounded residual or code may differ by one, which is more"
  " than the suite's relative tolerance of such a small integer: it is run with a difference of one"
  " allowed.",
  lambda subject, case: case.run_original(_close_by_codes),
)


def wide(test: str, cases: Callable[[Subject, dict], bool], reason: str) -> Excused:
  """A test of convergence, run with a tolerance of 0.1 in the place of 0.03 and 3%."""

  def close(actual, desired, **tolerances):
    del tolerances
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=0.1, rtol=0), actual, desired)

  return Excused(test, cases, reason, lambda subject, case: case.run_original(close))


def _inside_delta_bits(subject, case):
  """The same with delta_bits between a loss scale and the transformation."""
  proxies = [x for x in vars(case.module).values() if isinstance(x, Wrapped)]
  for proxy in proxies:
    proxy.subject = DYNAMIC_DELTA_BITS
  try:
    case.run_original()
  finally:
    for proxy in proxies:
      proxy.subject = subject


def of_one_dtype(test: str, cases: Callable[[dict], bool]) -> Excused:
  """A transformation that demands gradients of its half-precision statistics' dtype."""
  return Excused(
    test,
    lambda subject, arguments: (
      subject is DYNAMIC
      and jnp.dtype(arguments["dtype"]).name in ("float16", "bfloat16")
      and cases(arguments)
    ),
    "`optax.novograd`, `optax.lbfgs` and `optax.contrib.mechanize`, bare on half-precision"
    " parameters, keep half-precision statistics and combine them with gradients of no other dtype"
    " (`lax.cond`, `lax.clamp`, `lax.dynamic_update_slice`); a loss scale hands on unscaled, float32"
    " gradients. With `delta_bits` between them they pass: that is asserted instead.",
    _inside_delta_bits,
  )


__all__ = [
  "DTYPE_OF_UPDATES",
  "STORED_CODES",
  "Case",
  "Excused",
  "Wrapped",
  "add",
  "load",
  "of_one_dtype",
  "optax",
  "wide",
]
