"""Compiled for TPUs: one kernel a large leaf, in place, without temporaries or communication."""

import functools
import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest
import tpu

import optax_lowmem as lowmem
import pallas_kernels

pytestmark = pytest.mark.skipif(
  tpu.devices(tpu.TOPOLOGIES["v5e"]) is None, reason="the tpu extra is not installed"
)
SHAPE = (4096, 8192)  # XLA:TPU keeps temporaries of smaller arrays in VMEM
# JAX pairs a donated buffer with a result by shape and dtype, so gradients are donated last.
DONATED = (0, 1, 2)


def compile_step(tx, shapes, how="step", target="v5e"):
  params32 = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
  params, state = tpu.on_device(
    jax.eval_shape(functools.partial(lowmem.init, tx), params32), target
  )

  def step(params, state, grads):
    if how == "step":
      return lowmem.step(tx, grads, state, params)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  compiled = tpu.compiled(step, params, state, params, donate=DONATED)
  stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state)))
  temporaries = compiled.memory_analysis().temp_size_in_bytes
  return compiled, temporaries / stored, stored / sum(map(math.prod, shapes.values()))


FORMATS = {
  "bf16+8, int8": lambda: lowmem.adamw(1e-3),
  "bf16+0, int8": lambda: lowmem.adamw(1e-3, weights="bf16+0"),
  "bf16+16, bf16": lambda: lowmem.adamw(1e-3, weights="bf16+16", mu="bf16", nu="bf16"),
  "bf16+8, fp32": lambda: lowmem.adamw(1e-3, mu="fp32", nu="fp32"),
  "bf16+8, int8 and int4": lambda: lowmem.adamw(1e-3, nu="int4"),
  "bf16+0, int4": lambda: lowmem.adamw(1e-3, weights="bf16+0", mu="int4", nu="int4"),
  "fp16+8, fp16": lambda: lowmem.adamw(1e-3, weights="fp16+8", mu="fp16", nu="fp16"),
  "adam": lambda: lowmem.adam(1e-3, nesterov=True),
  "lion": lambda: lowmem.lion(1e-3),
  "sgd": lambda: lowmem.sgd(0.1, momentum=0.9),
  "declared": lambda: lowmem.delta_bits(
    lowmem.quantize_state(optax.adabelief(1e-3), elementwise=True, key=1), elementwise=True
  ),
  "scaled": lambda: lowmem.dynamic_loss_scale(lowmem.adamw(1e-3)),
}


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("how", ["step", "update"])
def test_one_kernel_in_place(name, how):
  compiled, temporaries, bytes_a_value = compile_step(FORMATS[name](), {"w": SHAPE}, how)
  # `tx.update` with float32 statistics alone has Optax's own bits: XLA makes it.
  by_xla = how == "update" and name == "bf16+8, fp32"
  assert tpu.kernels(compiled) == (not by_xla)
  # Beside the state, bytes a value. float16, which Mosaic TPU lacks, is copied as its bit pattern.
  copies = {"fp16+8, fp16": 2}.get(name, 0)
  if how == "update":  # float32 gradients that a loss scale has unscaled, and new weights
    copies = {"bf16+8, fp32": 1, "fp16+8, fp16": 4, "scaled": 9.5}.get(name, 0)
  assert temporaries * bytes_a_value < copies + 0.01 * bytes_a_value


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@pytest.mark.parametrize("target", ["v5p", "v6e"])
@pytest.mark.parametrize("how", ["step", "update"])
def test_other_generations(target, how):
  compiled, temporaries, _ = compile_step(lowmem.adamw(1e-3), {"w": SHAPE}, how, target)
  assert tpu.kernels(compiled) == 1
  # New weights replace the gradients. As arguments, v5p's compiler copies these first.
  copies = 2 / 5.13 if (target, how) == ("v5p", "update") else 0
  assert temporaries < copies + 0.01


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_a_model():
  """A kernel a large leaf of any rank; small and ragged leaves go by XLA."""
  shapes = {
    "embed": (50257, 768), "stacked": (4, 768, 3072), "conv": (3, 3, 512, 512), "norm": (768,),
    "ragged": (1000, 1000), "odd rows": (1001, 1280),
  }  # fmt: skip
  compiled, temporaries, _ = compile_step(lowmem.adamw(1e-3), shapes)
  assert tpu.kernels(compiled) == 4
  ragged = math.prod(shapes["ragged"]) / sum(map(math.prod, shapes.values()))
  assert temporaries < 0.01 + 3 * ragged  # XLA needs 9.5 bytes a parameter there


@pytest.mark.parametrize("fmt", ["bf16+8", "bf16+16", "bf16+0"])
@pytest.mark.parametrize("operation", ["stochastic_round", "split", "merge", "apply_update"])
def test_operations_need_no_temporaries(operation, fmt):
  fmt = pallas_kernels.DeltaFormat.parse(fmt)
  struct = lambda dtype: tpu.on_device(jax.ShapeDtypeStruct(SHAPE, dtype))
  delta = {0: None, 8: jnp.int8, 16: jnp.int16}[fmt.residual_bits]
  wide, stored = struct(jnp.float32), (struct(fmt.dtype), delta and struct(delta))
  calls = {
    "stochastic_round": (
      lambda x: pallas_kernels.stochastic_round(jax.random.key(0), x, fmt.dtype), (wide,), ()
    ),
    "split": (lambda x: pallas_kernels.split(x, fmt, key=1), (wide,), ()),
    "merge": (lambda low, delta: pallas_kernels.merge(low, delta, fmt), stored, ()),
    "apply_update": (
      lambda low, delta, u: pallas_kernels.apply_update(low, delta, u, fmt, key=1),
      (*stored, wide), (0, 1),
    ),
  }  # fmt: skip
  call, args, donated = calls[operation]
  stats = tpu.compiled(call, *args, donate=donated).memory_analysis()
  assert stats.temp_size_in_bytes < 0.02 * math.prod(SHAPE)


def test_gradient_release():
  """Each layer is stepped in place, by a kernel that indexes the stack."""
  n, width = 8, 1024
  tx = lowmem.adamw(1e-3)
  params32 = {"w": jax.ShapeDtypeStruct((n, width, width), jnp.float32)}
  params, state = tpu.on_device(jax.eval_shape(functools.partial(lowmem.init, tx), params32))

  def loss_fn(layers, x):
    x = layers["w"].scan(lambda w, x: x + jnp.tanh(x @ w), x)
    return jnp.sum(x.astype(jnp.float32) ** 2)

  x = tpu.on_device(jax.ShapeDtypeStruct((8, width), jnp.bfloat16))
  step = lowmem.fused_backward(loss_fn, tx)
  compiled = tpu.compiled(step, params, state, x, donate=(0, 1))
  assert tpu.kernels(compiled) == 1
  # Less than the gradients of the model.
  assert compiled.memory_analysis().temp_size_in_bytes < 2 * n * width * width


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("spec", [("fsdp", "tensor"), (("fsdp", "tensor"), None)], ids=str)
@pytest.mark.parametrize("is_scaled", [False, True])
def test_mesh(kind, spec, is_scaled):
  """Sixteen v5e: nothing is communicated but the check of a loss scale."""
  tx = lowmem.adamw(1e-3)
  tx = lowmem.dynamic_loss_scale(tx) if is_scaled else tx
  devices = np.array(tpu.devices("v5e:4x4")).reshape(4, 4)
  mesh = jax.sharding.Mesh(devices, ("fsdp", "tensor"), axis_types=(kind,) * 2)
  params32 = {"w": jax.ShapeDtypeStruct((8192, 8192), jnp.float32)}
  init = functools.partial(lowmem.init, tx)

  def on_mesh(x):
    here = PartitionSpec(*spec) if len(x.shape) == 2 else PartitionSpec()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, here))

  with jax.set_mesh(mesh):
    params, state = jax.tree.map(on_mesh, jax.eval_shape(init, params32))
    step = lambda params, state, grads: lowmem.step(tx, grads, state, params)
    compiled = tpu.compiled(step, params, state, params, donate=(0, 1))
  # With Auto axes XLA makes the step: https://github.com/jax-ml/jax/issues/38196
  assert tpu.kernels(compiled) == (kind == AxisType.Explicit)
  names = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
  found = re.findall(rf" ({names})(?:-start)?\(", compiled.as_text())
  assert found == ["all-reduce"] * is_scaled
