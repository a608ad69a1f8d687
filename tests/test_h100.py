"""What an H100 would run, compiled here: no spills, no copies, wide accesses, one pass."""

import functools
import math
import os
import re
import subprocess
import sys

from conftest import paired
import h100
import jax
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import optax
import pytest

import optax_lowmem as lowmem
import pallas_kernels
from pallas_kernels.formats import packing

pytestmark = [
  pytest.mark.h100,
  pytest.mark.skipif(
    not os.environ.get("REQUIRE_H100") and h100.sharding() is None,
    reason="the h100 extra is not installed",
  ),
]

SHAPE = (1 << 12, 1 << 10)
RAGGED = (1021, 1031)
KEY = ((2,), jnp.uint32)


def operations(fmt, shape, implementation):
  """Each operation with its arguments' structs: what runs, and what is donated."""
  f = functools.partial
  struct, base = h100.struct, lowmem.DeltaFormat.parse(fmt)
  stored = packing.stored_struct(shape, base)
  low, key = struct(shape, base.dtype), struct(*KEY)
  delta = None if stored is None else struct(stored.shape, stored.dtype)
  x = struct(shape, jnp.float32)
  kwargs = {"implementation": implementation}
  return {
      "stochastic_round": (
          lambda key, x: pallas_kernels.stochastic_round(key, x, base.dtype, **kwargs), (key, x), ()
      ),
      "split": (lambda x, key: pallas_kernels.split(x, fmt, key=key, **kwargs), (x, key), ()),
      "merge": (f(lambda low, delta: pallas_kernels.merge(low, delta, fmt, **kwargs)), (low, delta), ()),
      "apply_update": (
          lambda low, delta, u, key: pallas_kernels.apply_update(low, delta, u, fmt, key=key, **kwargs),
          (low, delta, x, key), (0, 1),
      ),
  }  # fmt: skip


@pytest.mark.parametrize("operation", ["stochastic_round", "split", "merge", "apply_update"])
@pytest.mark.parametrize("fmt", ["bf16+8", "bf16+16", "fp16+8", "bf16+0"])
def test_kernel(operation, fmt, monkeypatch, capfd):
  """One call in place; SASS without spills (local memory); accesses of 16 bytes where types allow."""
  if operation == "stochastic_round" and fmt not in ("bf16+8", "fp16+8"):
    pytest.skip("the same kernel as another format's")
  monkeypatch.setenv("MOSAIC_GPU_DUMP_SASS", "1")
  call, structs, donated = operations(fmt, SHAPE, "mosaic_gpu")[operation]
  compiled = h100.compiled(call, *structs, donate=donated)
  sass = capfd.readouterr().out
  assert "EXIT" in sass, "no disassembly: is nvidia-cuda-nvdisasm installed?"
  assert not re.search(r"\b(LDL|STL)\b", sass)
  text, stats = compiled.as_text(), compiled.memory_analysis()
  assert text.count('custom_call_target="mosaic_gpu_v2"') == 1
  assert stats.temp_size_in_bytes < 4096
  if donated:
    low_and_delta = sum(s.size * s.dtype.itemsize for s in structs[:2] if s is not None)
    assert stats.alias_size_in_bytes == low_and_delta
  widths = [
    int(w or 32) for w in re.findall(r"\bLD(?:G)?\.E(?:\.CONSTANT)?(?:\.(64|128))?\b", sass)
  ]
  bulk = [w for w in widths if w > 32]  # the two words of the key are single
  if operation == "merge":  # float32 results: 16 bytes stored, 4 elements
    assert re.search(r"\bST(?:G)?\.E\.128\b", sass)
  else:
    assert 128 in bulk
  assert (bulk and min(bulk) >= 64) or (fmt == "bf16+8" and operation == "merge")


@pytest.mark.parametrize("operation", ["stochastic_round", "split", "merge", "apply_update"])
@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
@pytest.mark.parametrize("shape", [SHAPE, RAGGED], ids=["even", "ragged"])
def test_no_temporaries(operation, implementation, shape):
  """None of the parameter's size, ragged or not; and XLA needs one pass over memory, too."""
  call, structs, donated = operations("bf16+8", shape, implementation)[operation]
  compiled = h100.compiled(call, *structs, donate=donated)
  assert compiled.memory_analysis().temp_size_in_bytes < 8192
  if implementation == "xla":
    text = compiled.as_text()
    shapes = rf"\[{shape[0]},{shape[1]}\]"
    passes = [line for line in text.splitlines() if " fusion(" in line and re.search(shapes, line)]
    assert len(passes) == 1


@pytest.mark.parametrize("bits", [1, 4, 5, 13])
def test_packed_widths_need_little(bits):
  """Packed residuals pass through narrow integers at most: no float32 or int32 copy."""
  call, structs, donated = operations(f"bf16+{bits}", SHAPE, "xla")["apply_update"]
  stats = h100.compiled(call, *structs, donate=donated).memory_analysis()
  size = SHAPE[0] * SHAPE[1]
  assert stats.temp_size_in_bytes <= size * (1 if bits <= 8 else 2) * 1.3 + 8192


def train_step(tx, params32, how, target="h100"):
  params, state = jax.eval_shape(functools.partial(lowmem.init, tx), params32)
  args = h100.on_device((params, params, state), target)

  def step(grads, params, state):
    if how == "step":
      return lowmem.step(tx, grads, state, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return h100.compiled(step, *args, donate=(1, 2))


@pytest.mark.parametrize("how", ["step", "update"])
@pytest.mark.parametrize("scaled", [False, True])
def test_optimizer_step_is_in_place(how, scaled):
  """delta_bits(adamw), bare and scaled: nothing of the parameter's size but what is donated."""
  tx = lowmem.delta_bits(optax.adamw(1e-3), "bf16+8")
  tx = lowmem.dynamic_loss_scale(tx) if scaled else tx
  params32 = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
  stats = train_step(tx, params32, how).memory_analysis()
  n = SHAPE[0] * SHAPE[1]
  assert stats.temp_size_in_bytes < n // 8
  assert stats.alias_size_in_bytes >= n * (2 + 1 + 8)


# Temporary bytes a value: of lowmem.step, a kernel that needs none; and of tx.update, the same
# kernel, which writes the new weights where the gradients were: a copy, as no gradient here is
# donated. Where XLA makes the step, it keeps copies of the scales and what they are made of.
OPTIMIZERS = {
  "adamw": (lambda: lowmem.adamw(1e-3), 5.125, 0.001, 2.001),
  "clipped": (
    # XLA, which keeps the only leaf's clipped bfloat16 gradient: no gradient here is donated.
    lambda: optax.chain(optax.clip_by_global_norm(1.0), lowmem.adamw(1e-3)), 5.125, 2.45, 2.45
  ),
  "scaled": (lambda: lowmem.dynamic_loss_scale(lowmem.adamw(1e-3)), 5.125, 0.001, 0.6),
  "scaled and clipped": (
    # Clipping wants unscaled float32 gradients, which XLA fuses and a kernel would not.
    lambda: lowmem.dynamic_loss_scale(
      optax.chain(optax.clip_by_global_norm(1.0), lowmem.adamw(1e-3))
    ), 5.125, 0.6, 0.6
  ),
  "bf16 moments": (
    lambda: lowmem.adamw(1e-3, weights="bf16+16", mu="bf16", nu="bf16"), 8.0, 0.001, 0.001
  ),
  "int4 second moments": (lambda: lowmem.adamw(1e-3, nu="int4"), 4.625, 0.001, 2.001),
  "int4": (
    lambda: lowmem.adamw(1e-3, weights="bf16+0", mu="int4", nu="int4"), 3.125, 0.001, 2.001
  ),
  "lion": (lambda: lowmem.lion(1e-3), 4.0625, 0.001, 2.001),
  "momentum": (lambda: lowmem.sgd(0.1, momentum=0.9), 4.0625, 0.001, 2.001),
}  # fmt: skip


@pytest.mark.parametrize("name, how", paired(OPTIMIZERS, ["update", "step"]))
def test_low_bit_optimizer(name, how):
  """Everything in place; beside it nothing, or copies of the scales."""
  make, resident, *temporary = OPTIMIZERS[name]
  params32 = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
  compiled = train_step(make(), params32, how)
  stats = compiled.memory_analysis()
  n = SHAPE[0] * SHAPE[1]
  assert stats.alias_size_in_bytes >= n * resident
  assert stats.temp_size_in_bytes <= n * temporary[how == "update"] + 8192
  by_xla = {"step": ("clipped",), "update": ("scaled",)}[how]
  is_kernel = name not in ("bf16 moments", "scaled and clipped", *by_xla)
  assert compiled.as_text().count('"mosaic_gpu_v2"') == is_kernel


STEP_KERNELS = {
  "adamw": (lowmem.adamw, {}),
  "everything": (
    lowmem.adamw,
    {"weights": "fp16+16", "mu": "fp16", "nu": "fp16", "nesterov": True, "eps_root": 1e-8},
  ),
  "bf16+0": (lowmem.adamw, {"weights": "bf16+0", "mu": "bf16"}),
  "int4": (lowmem.adamw, {"nu": "int4"}),
  "lion": (lowmem.lion, {}),
  "momentum": (lowmem.sgd, {"momentum": 0.9, "nesterov": True}),
}


@pytest.mark.parametrize("name, shape", paired(STEP_KERNELS, [(64, 64), (31, 32), (64,)]), ids=str)
def test_step_kernel(name, shape, monkeypatch, capfd):
  """One call without spills, whole tiles or not; 16-byte loads of the weights in whole ones."""
  if shape != (64, 64) and not hasattr(plgpu, "store"):
    pytest.skip("JAX 0.11.2 stores whole tiles alone")
  monkeypatch.setenv("MOSAIC_GPU_DUMP_SASS", "1")
  optimizer, kwargs = STEP_KERNELS[name]
  compiled = train_step(
    lowmem.static_loss_scale(optimizer(1e-3, **kwargs), 8.0),
    {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}, "step",
  )  # fmt: skip
  sass = capfd.readouterr().out
  assert compiled.as_text().count('"mosaic_gpu_v2"') == 1
  assert "EXIT" in sass and not re.search(r"\b(LDL|STL)\b", sass)
  if shape == (64, 64):
    assert re.search(r"\bLD(?:G)?\.E(?:\.CONSTANT)?\.128\b", sass)
    assert re.search(r"\bST(?:G)?\.E\.128\b", sass)


def test_small_leaves_share_kernels():
  """300 leaves of a ResNet's kind: fewer launches than leaves, and next to no temporaries."""
  shapes = [(3, 3, 64, 64), (64,), (64,), (1, 1, 64, 256), (256,), (256,)] * 50
  params32 = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  compiled = train_step(lowmem.adamw(1e-3), params32, "step")
  text, n = compiled.as_text(), sum(math.prod(shape) for shape in shapes)
  if hasattr(plgpu, "store"):
    assert text.count('"mosaic_gpu_v2"') <= len(shapes) / 3
    assert compiled.memory_analysis().temp_size_in_bytes < 0.01 * 5.125 * n
  assert compiled.memory_analysis().alias_size_in_bytes >= 5.125 * n


def test_large_ragged_leaves():
  """A kernel for tiles of 32 x 32 and one for what they leave, whose copies are small."""
  for shape in ((5000, 5000), (768, 50257), (2048, 1000)):
    params32 = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    compiled = train_step(lowmem.adamw(1e-3), params32, "step")
    if hasattr(plgpu, "store"):
      left = shape[0] * shape[1] - (shape[0] // 32) * (shape[1] // 32) * 1024
      # Copies of the larger of two parts.
      assert compiled.memory_analysis().temp_size_in_bytes < 24 * left + (1 << 18)
      assert 2 <= compiled.as_text().count('"mosaic_gpu_v2"') <= 3
    assert compiled.memory_analysis().alias_size_in_bytes >= 5.125 * shape[0] * shape[1]


def test_small_ragged_leaves_are_joined():
  """Sixteen shapes, one kernel."""
  params32 = [jax.ShapeDtypeStruct((5 + i, 33 + 7 * i), jnp.float32) for i in range(16)]
  compiled = train_step(lowmem.adamw(1e-3), params32, "step")
  # The second holds shapes of whole blocks.
  assert 1 <= compiled.as_text().count('"mosaic_gpu_v2"') <= 2


def test_clipping_in_front_of_many_leaves():
  """The kernel, and a copy of one leaf's gradient at a time, which is a small part of all."""
  params32 = [jax.ShapeDtypeStruct((512, 1024), jnp.float32)] * 20
  tx = optax.chain(optax.clip_by_global_norm(1.0), lowmem.adamw(1e-3))
  compiled = train_step(tx, params32, "step")
  assert compiled.as_text().count('"mosaic_gpu_v2"') == 20
  n = 20 * 512 * 1024
  assert compiled.memory_analysis().temp_size_in_bytes <= n * 2 / 16


def test_before_hopper():
  """Compiled for an A100, a step is XLA's."""
  params32 = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
  compiled = train_step(lowmem.adamw(1e-3), params32, "step", "a100")
  assert "mosaic" not in compiled.as_text()
  assert compiled.memory_analysis().temp_size_in_bytes <= SHAPE[0] * SHAPE[1] * 0.3 + 8192


def test_after_hopper():
  """Compiled for a B200, it is the kernel.

  In a process of its own: jaxlib's Mosaic GPU assembles for the architecture
  of the first kernel that a process compiles.
  """
  program = """
import h100, jax, jax.numpy as jnp, optax_lowmem as lowmem, test_h100
params32 = {"w": jax.ShapeDtypeStruct(test_h100.SHAPE, jnp.float32)}
compiled = test_h100.train_step(lowmem.adamw(1e-3), params32, "step", "b200")
print("kernels:", compiled.as_text().count('"mosaic_gpu_v2"'))
print("temporaries:", compiled.memory_analysis().temp_size_in_bytes)
"""
  paths = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(
    [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert "kernels: 1\n" in done.stdout
  assert int(done.stdout.split("temporaries: ")[1]) < 8192


def test_no_float32_bfloat16_round_trip():
  """Law 8: the arithmetic has no conversion for XLA:GPU to remove.

  XLA:GPU drops float32 -> bfloat16 -> float32 pairs. The update converts
  nothing to bfloat16; it reads weights by their bits. Two steps in one program
  are the case where a pair could be shortened: there the second step has to
  read the bits of the weights that `apply_updates` rounded.
  """
  tx = lowmem.delta_bits(optax.sgd(0.1), "bf16+8")
  params, state = lowmem.init(tx, {"w": jnp.zeros(SHAPE)})
  jaxpr = str(jax.make_jaxpr(tx.update)(params, state, params))
  narrowing = re.findall(r"bf16\[[0-9,]*\] = convert_element_type", jaxpr)
  assert not narrowing

  def two_steps(grads, state, params):
    for _ in range(2):
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
    return params, state

  text = h100.compiled(two_steps, *h100.on_device((params, state, params))).as_text()
  # Both weights are rounded, and both are read as 16-bit patterns.
  assert len(re.findall(r"= bf16\[[0-9,]+\]\S* convert\(", text)) >= 2
  reads = re.findall(r"= u16\[[0-9,]+\]\S* bitcast(?:-convert)?\((\S+)\)", text)
  defined = dict(re.findall(r"(%\S+) = (bf16\[[0-9,]+\]\S* \w+)\(", text))
  sources = [defined[x].split()[-1] for x in reads if x in defined]
  assert "convert" in sources and "parameter" in sources  # step two's weights, and step one's


def test_l40s_or_older_would_not_get_a_kernel():
  """apply_update's implementation=None lowers to XLA alone: nothing that an older GPU lacks."""
  call, structs, donated = operations("bf16+8", SHAPE, None)["apply_update"]
  assert "mosaic" not in h100.compiled(call, *structs, donate=donated).as_text()


RELEASED = {
  "plain": ({}, lambda: lowmem.adamw(1e-3)),
  "clipped": ({"clip_norm": 1.0}, lambda: lowmem.dynamic_loss_scale(lowmem.adamw(1e-3))),
  "accumulated": ({"accumulate": 4}, lambda: lowmem.adamw(1e-3)),
}


@pytest.mark.parametrize("name, target", paired(RELEASED, ["h100", "l40s"]))
def test_gradient_release(name, target):
  """The state is in place; besides it there is a layer or two, and no gradient of all of them."""
  options, make = RELEASED[name]
  count, width, tx = 16, 1024, make()
  matrix = width * width
  params = {
    "layers": {key: jax.ShapeDtypeStruct((count, width, width), jnp.float32) for key in "ab"},
    "last": jax.ShapeDtypeStruct((width, width), jnp.float32),
  }

  def loss(layers, x):
    x = layers["layers"].scan(lambda w, x: x + jnp.tanh(x @ w["a"]) @ w["b"], x)
    return jnp.mean(layers["last"](lambda w, x: x @ w, x).astype(jnp.float32) ** 2)

  state = jax.eval_shape(lambda p: lowmem.init(tx, p), params)
  x = h100.struct((8, width), jnp.bfloat16, target)
  done = h100.compiled(
    lowmem.fused_backward(loss, tx, **options), *h100.on_device(state, target), x, donate=(0, 1)
  )
  stats, resident = (
    done.memory_analysis(),
    sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
  )
  assert stats.alias_size_in_bytes > 0.999 * resident
  # Gradients of a layer, with what XLA keeps of a leaf besides (the unreleased step has 33 * 2).
  most = (4 if target == "h100" else 13) * 2 * matrix
  assert stats.temp_size_in_bytes < most
  kernels = len(re.findall(r"custom_call_target=\"mosaic_gpu", done.as_text()))
  folds = 3 if name == "accumulated" else 0
  assert kernels == (0 if target == "l40s" else 3 + folds)
