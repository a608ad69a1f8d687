"""optax/_src/float64_test.py: float32 and float64 leaves in one tree."""

import functools

import jax
import pytest

from . import suites
from .subjects import ALL, STEP_OURS


@pytest.fixture(autouse=True)
def _float64_off():
  """The suite switches it on, and off again only where the test passes."""
  yield
  jax.config.update("jax_enable_x64", False)


def _named(subject, entries):
  """The suite's table of constructors, each made by the subject."""
  for name, constructor, arguments in entries:
    if subject.covers(name):
      factory = subject.factory(name, constructor, lambda: False)
      yield name, functools.partial(factory), arguments


for _subject in ALL:
  if _subject in STEP_OURS[1:]:
    continue  # the statistics' format is of no consequence to dtypes
  _module = suites.load("optax._src.float64_test", _subject, named=_named)
  suites.add(globals(), _module, "Float64Test", _subject)
