"""The examples of README.md, of the pages in docs/, and of the docstrings run as they stand.

Pages: each ```python block, in order, in one namespace a page. Those of docs/ import what they use;
README.md finds a small model and its data, and what a block defines is called.
A block behind `<!-- skip: next "reason" -->` does not run. The site's build runs its {code-cell}s.
"""

import doctest
import functools
import importlib
import inspect
import pathlib
import pkgutil
import re
import unittest

import equinox as eqx
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sybil import Document
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

import optax_lowmem as lowmem
import pallas_kernels

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("optax_lowmem", "pallas_kernels")
WIDTH = 32  # of everything: what runs without jit compiles once a shape


class Linen(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(WIDTH, use_bias=False)(nn.relu(nn.Dense(WIDTH, use_bias=False)(x)))


class NNX(nnx.Module):
  def __init__(self, rngs):
    self.hidden, self.out = (nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs) for _ in range(2))

  def __call__(self, x):
    return self.out(nnx.relu(self.hidden(x)))


def cross_entropy(logits, labels):
  losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
  return losses.mean()


def training() -> dict:
  """A classifier in each library, data, and a loss of whichever model or parameters it gets."""
  rng = np.random.default_rng(0)
  linen, batch = (
    Linen(),
    (rng.normal(size=(16, WIDTH)).astype(np.float32), rng.integers(0, WIDTH, 16)),
  )

  def loss_fn(model, batch):
    x, labels = batch
    if isinstance(model, eqx.Module):
      return cross_entropy(jax.vmap(model)(x), labels)
    logits = model(x) if isinstance(model, nnx.Module) else linen.apply({"params": model}, x)
    return cross_entropy(logits, labels)

  return {
    "apply_fn": linen.apply,
    "params": linen.init(jax.random.key(0), batch[0])["params"],
    "loss_fn": loss_fn,
    "batch": batch,
  }


def release() -> dict:
  """A model of layers, a stack of them in the middle, and its state."""
  k = jax.random.split(jax.random.key(0), 3)
  params = {
    "embed": {"table": jax.random.normal(k[0], (WIDTH, WIDTH))},
    "blocks": 0.1 * jax.random.normal(k[1], (3, WIDTH, WIDTH)),
    "head": 0.1 * jax.random.normal(k[2], (WIDTH, WIDTH)),
  }
  return {
    "block": lambda w, x: x + jnp.tanh(x @ w),
    "cross_entropy": lambda w, x, targets: cross_entropy(x @ w, targets),
    "tokens": np.arange(16).reshape(2, 8),
    "targets": np.arange(1, 17).reshape(2, 8),
    "state": lowmem.TrainState.create(apply_fn=None, params=params, tx=lowmem.adamw(1e-3)),
  }


# What README.md does not make itself. A section's names are there from its heading on; where a block
# defines `train_step`, the section's call of it follows the block.
README = dict(jax=jax, functools=functools, optax=optax, nnx=nnx, eqx=eqx)
SECTIONS = {
  "Two lines with Optax": (training, "train_step(params, opt_state, batch)"),
  "Two lines with a Flax `TrainState`": (training, "train_step(state, batch)"),
  "Two lines with NNX": (
    lambda: training() | {"model": NNX(nnx.Rngs(0))}, "train_step(model, optimizer, batch)",
  ),
  "Two lines with Equinox": (
    lambda: training() | {"model": eqx.nn.MLP(WIDTH, WIDTH, WIDTH, 1, key=jax.random.key(0))},
    "train_step(batch, model, opt_state)",
  ),
  "Gradient release": (release, "assert np.isfinite(loss)"),
}  # fmt: skip


class Evaluator(PythonEvaluator):
  """Runs blocks and counts them."""

  def __init__(self):
    super().__init__()
    self.count = 0

  def __call__(self, example):
    super().__call__(example)
    self.count += 1


class ReadmeEvaluator(Evaluator):
  """A section's names before its block, and its call of what the block defines."""

  def __call__(self, example):
    heading = re.findall(r"^## (.*)$", example.document.text[: example.start], re.MULTILINE)[-1]
    names, call = SECTIONS[heading]
    example.namespace.update(README | names())
    super().__call__(example)
    exec(call, {"np": np} | example.namespace)


def blocks_of(page: str) -> int:
  """How many blocks of a page are to run."""
  text = (ROOT / page).read_text()
  fences = re.findall(r"^```python$", text, re.MULTILINE)
  return len(fences) - len(re.findall(r"^<!-+ skip: next\b.*-->$", text, re.MULTILINE))


def pages() -> list[str]:
  found = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
  return [name for name in (str(page.relative_to(ROOT)) for page in found) if blocks_of(name)]


@pytest.mark.parametrize("page", pages())
def test_page(page, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)  # pages write files
  evaluator = ReadmeEvaluator() if page == "README.md" else Evaluator()
  document = Document.parse(str(ROOT / page), CodeBlockParser("python", evaluator), SkipParser())
  document.namespace["__name__"] = "page"  # classes want to know their module
  for example in document.examples():
    try:
      example.evaluate()
    except unittest.SkipTest:
      pass
  assert evaluator.count == blocks_of(page)


def test_there_are_pages():
  assert blocks_of("README.md") == len(SECTIONS) and sum(map(blocks_of, pages())) >= 10


def docstrings() -> dict[str, doctest.DocTest]:
  """The examples of each docstring. They find no names but their own."""
  found = {}
  for package in (lowmem, pallas_kernels):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
      for test in doctest.DocTestFinder().find(importlib.import_module(module.name), globs={}):
        if test.examples:
          found[test.name] = test
  return found


DOCSTRINGS = docstrings()


@pytest.mark.parametrize("name", DOCSTRINGS)
def test_docstring(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  said = []
  doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(DOCSTRINGS[name], out=said.append)
  assert not said, "".join(said)


def test_public_names_have_examples():
  """Of their own; one that is skipped counts as none."""
  public = {
    x
    for package in (lowmem, pallas_kernels, lowmem.nnx)
    for name, x in ((name, inspect.unwrap(x)) for name, x in vars(package).items())
    if name[0] != "_" and callable(x) and x.__module__.split(".")[0] in PACKAGES
  }
  # What nobody calls: functions return them.
  public -= {x for x in public if hasattr(x, "_fields")} | {lowmem.MemoryTable}
  names = {f"{x.__module__}.{x.__qualname__}" for x in public}
  run = {
    name
    for name, test in DOCSTRINGS.items()
    if not all(example.options.get(doctest.SKIP) for example in test.examples)
  }
  assert not names - run, sorted(names - run)
