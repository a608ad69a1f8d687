"""Law 15 in compiled kernels: an optimizer contracts the same products in every kernel of it.

LLVM turns a product and a sum into one instruction that rounds once. Of a sum
of two products it takes one or the other, depending on the program around it.
"""

import functools
import os
import re

from conftest import thinned
import h100
import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import optax
import ptx
import pytest
from test_fused_update import INT8, PACKED, adam, assert_close, make_leaf, plain
from test_not_finite import IS_BAD, SHAPE, VALUES, assert_not_finite, lion

import optax_lowmem as lowmem
from pallas_kernels.formats.state_formats import BLOCK, Blocks, StateFormat, stored_struct
from pallas_kernels.operations.fused_update import fused_update_leaves, hoisted_rule
from pallas_kernels.programs import tiles
from pallas_kernels.programs.leaf import Leaf

pytestmark = [
  pytest.mark.h100,
  pytest.mark.skipif(
    not os.environ.get("REQUIRE_H100") and h100.sharding() is None,
    reason="the h100 extra is not installed",
  ),
  pytest.mark.skipif(
    not hasattr(plgpu, "store"), reason="JAX 0.11.2 has no kernel of several leaves"
  ),
]

# What is not an operation on floats is a value: how it was read differs between tiles.
KINDS = {"mul.f32": "product", "fma.rn.f32": "sum", "add.f32": "sum", "sub.f32": "sum"}


def contractions(code: str) -> set[tuple]:
  """The float sums of a kernel: each term's kind, of a product its factors', constants by value."""
  kinds: dict[str, str] = {}

  def kind(operand: str) -> str:
    return kinds.get(operand, "value" if operand.startswith("%") else operand)

  found = set()
  for operation, written, read in re.findall(r"^\s*([a-z][\w.:]*)\s+(%r\d+), ([^;]*);", code, re.M):
    operands = [x.strip() for x in read.split(",")]
    if operation == "fma.rn.f32":
      found.add(("fma", *sorted(map(kind, operands[:2])), kind(operands[2])))
    elif operation in ("add.f32", "sub.f32"):
      found.add((operation, *sorted(map(kind, operands))))
    kinds[written] = KINDS.get(operation, "value")
  return found


def all_ptx_of(f, *args, capfd) -> list[str]:
  """The code of each kernel of f."""
  capfd.readouterr()
  h100.compiled(f, *h100.on_device(args))
  head, *codes = re.split(r"(?=\.visible \.entry)", capfd.readouterr().out)
  return codes


def ptx_of(f, *args, capfd) -> str:
  """The code of the only kernel of f."""
  (code,) = all_ptx_of(f, *args, capfd=capfd)
  return code


def step_of(tx, shapes, capfd) -> list[str]:
  params, state = jax.eval_shape(
    functools.partial(lowmem.init, tx), [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes]
  )
  step = lambda grads, params, state: lowmem.step(tx, grads, state, params)
  return all_ptx_of(step, params, params, state, capfd=capfd)


OPTIMIZERS = {
  "adamw": lambda: lowmem.adamw(1e-3),
  "nesterov": lambda: lowmem.adamw(
    1e-3, weights="fp16+8", mu="fp16", nu="fp16", nesterov=True, eps_root=1e-8
  ),
  "scaled": lambda: lowmem.static_loss_scale(lowmem.adamw(1e-3, weights="bf16+0", mu="bf16"), 8.0),
  "lion": lambda: lowmem.lion(1e-3),
  "momentum": lambda: lowmem.static_loss_scale(lowmem.sgd(0.1, momentum=0.9, nesterov=True), 8.0),
}
# Of the shapes of several, a released step and one of all leaves have differed.
GROUPS = {"a large leaf": [(1056, 544)], "several": [(352, 256)] * 3 + [(512, 192)] * 3,
          "small tiles": [(64,), (96,), (40, 32), (7, 32)],
          "joined": [(5, 7), (33,)]}  # fmt: skip


@pytest.mark.parametrize("name", thinned(OPTIMIZERS, "adamw", "lion", "scaled"))
def test_every_kernel_contracts_alike(name, monkeypatch, capfd):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
  found = {
    group: list(map(contractions, step_of(OPTIMIZERS[name](), shapes, capfd)))
    for group, shapes in GROUPS.items()
  }
  for sums in (sums for kernels in found.values() for sums in kernels):
    assert sums == found["a large leaf"][0]
    # Two terms that may both be contracted: a choice that is LLVM's.
    assert not any(x[-1] == "product" for x in sums if x[0] == "fma")
    assert not any("product" in x for x in sums if x[0] != "fma")


def test_a_layer_of_a_stack(monkeypatch, capfd):
  """As all layers at once, with and without an update."""
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
  formats = StateFormat("int8"), StateFormat("int8", is_square=True)
  fmt, inner = lowmem.DeltaFormat.parse("bf16+8"), optax.scale_by_adam()

  def rule(g, w, values):
    state = inner.init(w)._replace(mu=values[0], nu=values[1])
    update, state = inner.update(g, state, w)
    return -1e-3 * update, [state.mu, state.nu]

  fold = lambda g, w, values: (None, [values[0] + 0.1 * g, values[1] + 0.001 * (g * g)])

  def leaf(shape, gradient):
    struct = jax.ShapeDtypeStruct
    statistics = [stored_struct(shape, f) for f in formats]
    low, delta = struct(shape, jnp.bfloat16), struct(shape, jnp.int8)
    return Leaf(struct(gradient, jnp.bfloat16), low, delta, statistics, struct((2,), jnp.uint32))

  def call(rule, leaves, index):
    return fused_update_leaves(rule, leaves, fmt, formats, None, "mosaic_gpu", index)

  index = jax.ShapeDtypeStruct((), jnp.int32)
  for one in (rule, fold):
    whole, layer, layers = (
      contractions(ptx_of(functools.partial(call, one), leaves, at, capfd=capfd))
      for leaves, at in (
        ([leaf((3, 352, 256), (3, 352, 256))], None),
        ([leaf((3, 352, 256), (352, 256))], index),
        ([leaf((3, 352, 256), (352, 256)), leaf((3, 256, 352), (256, 352))], index),
      )
    )
    assert whole == layer == layers
    assert not any(x[-1] == "product" for x in whole if x[0] == "fma")


def test_sign_keeps_nan(monkeypatch, capfd):
  """Its comparison with zero is false for NaN."""
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
  (code,) = step_of(lowmem.lion(1e-3), [(64, 64)], capfd)
  assert len(re.findall(r"setp\.gt\.f32\s+%p\d+, %r\d+, 0f00000000", code)) >= 8
  assert not re.search(r"setp\.(ne|neu|ltu|leu|gtu|geu|equ)\.f32", code)


def code_of(rule, leaves, formats, monkeypatch, capfd) -> str:
  """The kernel that steps the leaves."""
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
  fmt = lowmem.DeltaFormat.parse("bf16+8")
  call = lambda leaves: fused_update_leaves(rule, leaves, fmt, formats, None, "mosaic_gpu")
  return ptx_of(call, leaves, capfd=capfd)


def executed(code, rule, leaves, formats):
  """The leaves' (low, delta, *codes, *scales) after the step."""
  shapes = [x.gradient.shape for x in leaves]
  found = [(n, BLOCK) for n in tiles.tile_rows(shapes)]
  scalars = hoisted_rule(rule, len(formats), found[0]).scalars()
  groups = tiles.groups([x.gradient.size // BLOCK for x in leaves])
  table = np.concatenate([group.table for group in groups])
  arrays = [np.asarray([float(x) for x in scalars], np.float32)]
  arrays += [table] if len(leaves) > 1 else []
  # A kernel's parameters stand in the order of their first use in it; the default of a switch,
  # which is its last branch, comes first.
  for leaf in (leaves[-1], *leaves[:-1]):
    codes = [x.codes if isinstance(x, Blocks) else x for x in leaf.statistics]
    scales = [x.scale for x in leaf.statistics if isinstance(x, Blocks)]
    parts = leaf.stream, leaf.gradient, leaf.low, leaf.delta, *codes, *scales
    arrays += [np.asarray(x) for x in parts]
  after = ptx.run(code, arrays, len(table))[-len(parts) * len(leaves) :]
  after = [after[i + 2 : i + len(parts)] for i in range(0, len(after), len(parts))]
  return after[1:] + after[:1]


def test_executed_together_and_alone(monkeypatch, capfd):
  """Bit for bit; and as XLA's step but for the last bits of float32."""
  leaves = [make_leaf(shape, seed=i) for i, shape in enumerate([(64, 64), (32, 128), (128, 32)])]

  run = lambda code, leaves: executed(code, adam, leaves, INT8)
  together = run(code_of(adam, leaves, INT8, monkeypatch, capfd), leaves)
  code = code_of(adam, leaves[:1], INT8, monkeypatch, capfd)  # of one size, so of all
  alone = [run(code, [leaf])[0] for leaf in leaves]
  for x, y, leaf in zip(together, alone, leaves, strict=True):
    assert [t.tobytes() for t in x] == [t.tobytes() for t in y]
    low, delta, mu, nu, *scales = map(jnp.asarray, x)
    statistics = [Blocks(*of) for of in zip((mu, nu), scales, strict=True)]
    assert_close((low, delta, statistics), plain(leaf), leaf)


@pytest.mark.parametrize("name", PACKED)
def test_executed_in_pairs(name, monkeypatch, capfd):
  """Runs tiles of 32 and of 8 blocks. The last two tiles overlap. A register holds two values."""
  formats = PACKED[name]
  leaf = make_leaf((3, 33, 32), statistic_formats=formats)
  code = code_of(adam, [leaf], formats, monkeypatch, capfd)
  ((low, delta, mu, nu, *scales),) = executed(code, adam, [leaf], formats)
  statistics = [Blocks(*map(jnp.asarray, of)) for of in zip((mu, nu), scales, strict=True)]
  found = jnp.asarray(low), jnp.asarray(delta), statistics
  assert_close(found, plain(leaf, statistic_formats=formats), leaf)


@pytest.mark.parametrize("rule", [adam, lion], ids=["adam", "lion"])
def test_executed_on_what_is_not_finite(rule, monkeypatch, capfd):
  """Law 13, in what an H100 would run, at each place of a block."""
  formats = INT8[: 2 if rule is adam else 1]
  leaf = make_leaf(SHAPE, statistic_formats=INT8)
  leaf = leaf._replace(statistics=leaf.statistics[: len(formats)])
  good = leaf.gradient
  code = code_of(rule, [leaf], formats, monkeypatch, capfd)
  for gradient in (jnp.where(IS_BAD, jnp.asarray(VALUES, good.dtype), good), good):
    leaf = leaf._replace(gradient=gradient)
    (after,) = executed(code, rule, [leaf], formats)
    low, delta, *rest = map(jnp.asarray, after)
    statistics = list(map(Blocks, rest[: len(formats)], rest[len(formats) :]))
    assert_not_finite(statistics, formats)
    finite = np.isfinite(np.asarray(lowmem.merge(low, delta, "bf16+8")))
    assert not finite[IS_BAD if rule is adam else np.isnan(VALUES)].any()
    assert finite[1::2].all()
    leaf = leaf._replace(low=low, delta=delta, statistics=statistics)
  if rule is lion:  # the neighbours' momentum is NaN, and so is its sign
    assert not finite[::2].any(axis=None, where=~IS_BAD[::2])


@pytest.mark.parametrize("name", ["maximum", "minimum", "clip"])
def test_bounds_keep_nan(name, monkeypatch, capfd):
  """PTX's maximum is the other operand where one is NaN, unless it is asked for NaN."""
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
  bound = {
    "maximum": jnp.maximum, "minimum": jnp.minimum, "clip": lambda x, y: jnp.clip(x, -y * y, y * y)
  }[name]  # fmt: skip
  struct = jax.ShapeDtypeStruct
  leaf = Leaf(
    struct((64, 64), jnp.bfloat16), struct((64, 64), jnp.bfloat16), struct((64, 64), jnp.int8),
    [struct((64, 64), jnp.bfloat16)], struct((2,), jnp.uint32),
  )  # fmt: skip
  rule = lambda g, w, values: (-g, [bound(values[0], g)])
  fmt, formats = lowmem.DeltaFormat.parse("bf16+8"), (StateFormat("bf16"),)
  call = lambda leaf: fused_update_leaves(rule, [leaf], fmt, formats, None, "mosaic_gpu")
  code = ptx_of(call, leaf, capfd=capfd)
  found = re.findall(r"\b(?:max|min)\.(?:\w+\.)*f32", code)
  assert len(found) >= 8 and all(".NaN." in x for x in found)
