"""The optimizers to compare, each with its own init and step, as data."""

from collections.abc import Callable
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_lowmem as lowmem

F32, BF16, FP16 = jnp.float32, jnp.bfloat16, jnp.float16


@dataclasses.dataclass(frozen=True)
class Contender:
  """An optimizer with the weights that it steps.

  Attributes:
    name: its name in the tables.
    init: float32 parameters -> (params, state).
    step: (grads, state, params) -> (params, state).
    dtype: the dtype of the weights that the forward pass sees, and of their gradients.
    is_ours: whether it belongs to optax_lowmem.
    most_temporaries: the largest ratio temporaries / state; for plain Optax only, which
      XLA runs in place.
    context: a context manager for tracing a step for an absent device.
  """

  name: str
  init: Callable[[Any], tuple[Any, Any]]
  step: Callable[[Any, Any, Any], tuple[Any, Any]]
  dtype: Any
  is_ours: bool = False
  most_temporaries: float | None = None
  context: Callable[[Any], Any] = lambda device: contextlib.nullcontext()


def ours(name: str, tx, dtype=BF16, apply_updates: bool = False) -> Contender:
  """A contender that uses `lowmem.step`, or `tx.update` and `optax.apply_updates`."""

  def step(grads, state, params):
    return lowmem.step(tx, grads, state, params)

  def update(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return Contender(
    name, lambda params: lowmem.init(tx, params), update if apply_updates else step, dtype, True
  )


def plain(name: str, tx, dtype=F32, most_temporaries: float = 0.01) -> Contender:
  """Optax with weights, gradients and state in one dtype."""

  def init(params):
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return params, tx.init(params)

  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return Contender(name, init, step, dtype, most_temporaries=most_temporaries)


def mixed(name: str, tx, dtype=BF16) -> Contender:
  """Optax on float32 masters; each step writes a half-precision copy of them."""

  def init(params):
    return jax.tree.map(lambda x: x.astype(dtype), params), (params, tx.init(params))

  def step(grads, state, params):
    master, state = state
    grads = jax.tree.map(lambda g: g.astype(F32), grads)
    updates, state = tx.update(grads, state, master)
    master = optax.apply_updates(master, updates)
    return jax.tree.map(lambda x: x.astype(dtype), master), (master, state)

  return Contender(name, init, step, dtype, most_temporaries=0.01)


def _abstract_mesh(device):
  """The description of an absent device that a Pallas Triton kernel needs."""
  mesh = jax.sharding.AbstractMesh(
    (),
    (),
    abstract_device=jax.sharding.AbstractDevice(
      device_kind=device.device_kind, num_cores=132, platform="cuda"
    ),
  )
  return jax.sharding.use_abstract_mesh(mesh)


def flashoptim_jax() -> list[Contender]:
  """flashoptim-jax's AdamW through its own step; empty if it is not installed."""
  if importlib.util.find_spec("flashoptim_jax") is None:
    return []
  from flashoptim_jax import flash_adamw

  tx = flash_adamw(1e-3)

  def init(params):
    params = jax.tree.map(lambda x: x.astype(BF16), params)
    return params, tx.init(params)

  def step(grads, state, params):
    return tx.step(params, state, grads)

  version = importlib.metadata.version("flashoptim-jax")
  return [Contender(f"flashoptim-jax {version}, AdamW", init, step, BF16, context=_abstract_mesh)]


FP32_ADAMW = plain("optax.adamw, fp32", optax.adamw(1e-3))
BF16_ADAMW = plain("optax.adamw, all bf16", optax.adamw(1e-3), BF16)
MIXED_ADAMW = mixed("optax.adamw, fp32 master", optax.adamw(1e-3))

DEFAULT = ours("adamw, bf16+8, int8, int8", lowmem.adamw(1e-3))
DEFAULT_UPDATE = ours("adamw, bf16+8: apply_updates", lowmem.adamw(1e-3), apply_updates=True)

OURS = [
  DEFAULT,
  ours("adamw, bf16+0, int8, int8", lowmem.adamw(1e-3, weights="bf16+0")),
  ours("adamw, bf16+16, bf16, bf16", lowmem.adamw(1e-3, weights="bf16+16", mu="bf16", nu="bf16")),
]

# Compared within each group; times are relative to the group's first contender.
CPU = {
  "adamw": [
    FP32_ADAMW,
    BF16_ADAMW,
    MIXED_ADAMW,
    *OURS,
    ours("adamw, bf16+8, fp32, fp32", lowmem.adamw(1e-3, mu="fp32", nu="fp32")),
    DEFAULT_UPDATE,
  ],
  "lion": [
    # XLA:CPU copies mu because two of its loops read it; donation cannot prevent that.
    plain("optax.lion, fp32", optax.lion(1e-4), most_temporaries=0.51),
    ours("lion, bf16+8, int8", lowmem.lion(1e-4)),
  ],
  "sgd": [
    plain("optax.sgd, momentum, fp32", optax.sgd(0.1, momentum=0.9)),
    ours("sgd, momentum, bf16+8, int8", lowmem.sgd(0.1, momentum=0.9)),
  ],
}

TRAINING = [
  *OURS,
  DEFAULT_UPDATE,
  ours(
    "adamw, bf16+16: apply_updates",
    lowmem.adamw(1e-3, weights="bf16+16", mu="bf16", nu="bf16"),
    apply_updates=True,
  ),
  ours(
    "clip_by_global_norm, adamw, bf16+8",
    optax.chain(optax.clip_by_global_norm(1.0), lowmem.adamw(1e-3)),
  ),
  ours(
    "dynamic_loss_scale(adamw), fp16+8",
    lowmem.dynamic_loss_scale(lowmem.adamw(1e-3, weights="fp16+8")),
    FP16,
  ),
  ours("lion, bf16+8, int8", lowmem.lion(1e-4)),
  ours("sgd, momentum, bf16+8, int8", lowmem.sgd(0.1, momentum=0.9)),
  FP32_ADAMW,
  BF16_ADAMW,
  MIXED_ADAMW,
]

STEPS = [*OURS, CPU["lion"][1], CPU["sgd"][1], FP32_ADAMW]
INT4 = ours("adamw, bf16+0, int8, int4", lowmem.adamw(1e-3, weights="bf16+0", nu="int4"))
GPU = [*OURS, INT4, CPU["lion"][1], CPU["sgd"][1], FP32_ADAMW, BF16_ADAMW]
