"""Law 15 in compiled kernels: an optimizer contracts the same products in every kernel of it.

LLVM turns a product and a sum into one instruction that rounds once. Of a sum
of two products it takes one or the other, depending on the program around it.
"""

import functools
import os
import re

import h100
import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import optax
import pytest

import optax_lowmem as lowmem
from pallas_kernels.fused_programs import Leaf
from pallas_kernels.fused_update import fused_update_leaves
from pallas_kernels.state_formats import StateFormat, stored_struct

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


def contractions(ptx: str) -> set[tuple]:
  """The float sums of a kernel: each term's kind, of a product its factors', constants by value."""
  kinds: dict[str, str] = {}

  def kind(operand: str) -> str:
    return kinds.get(operand, "value" if operand.startswith("%") else operand)

  found = set()
  for operation, written, read in re.findall(r"^\s*([a-z][\w.:]*)\s+(%r\d+), ([^;]*);", ptx, re.M):
    operands = [x.strip() for x in read.split(",")]
    if operation == "fma.rn.f32":
      found.add(("fma", *sorted(map(kind, operands[:2])), kind(operands[2])))
    elif operation in ("add.f32", "sub.f32"):
      found.add((operation, *sorted(map(kind, operands))))
    kinds[written] = KINDS.get(operation, "value")
  return found


def ptx_of(f, *args, capfd) -> str:
  """The code of the only kernel of f."""
  capfd.readouterr()
  h100.compiled(f, *h100.on_device(args))
  ptx = capfd.readouterr().out
  assert ptx.count(".visible .entry") == 1
  return ptx


def step_of(tx, shapes, capfd) -> str:
  params, state = jax.eval_shape(
    functools.partial(lowmem.init, tx), [jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes]
  )
  step = lambda grads, params, state: lowmem.step(tx, grads, state, params)
  return ptx_of(step, params, params, state, capfd=capfd)


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
GROUPS = {"a large leaf": [(1024, 512)], "several": [(352, 256)] * 3 + [(512, 192)] * 3,
          "small tiles": [(64,), (96,), (40, 32), (7, 32)]}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_kernel_contracts_alike(name, monkeypatch, capfd):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
  found = {
    group: contractions(step_of(OPTIMIZERS[name](), shapes, capfd))
    for group, shapes in GROUPS.items()
  }
  for sums in found.values():
    assert sums == found["a large leaf"]
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
        ([leaf((3, 352, 256), (352, 256)), leaf((3, 512, 192), (512, 192))], index),
      )
    )
    assert whole == layer == layers
    assert not any(x[-1] == "product" for x in whole if x[0] == "fma")


def test_sign_keeps_nan(monkeypatch, capfd):
  """Its comparison with zero is false for NaN."""
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
  ptx = step_of(lowmem.lion(1e-3), [(64, 64)], capfd)
  assert len(re.findall(r"setp\.gt\.f32\s+%p\d+, %r\d+, 0f00000000", ptx)) >= 8
  assert not re.search(r"setp\.(ne|neu|ltu|leu|gtu|geu|equ)\.f32", ptx)


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
  ptx = ptx_of(call, leaf, capfd=capfd)
  found = re.findall(r"\b(?:max|min)\.(?:\w+\.)*f32", ptx)
  assert len(found) >= 8 and all(".NaN." in x for x in found)
