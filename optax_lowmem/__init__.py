"""Low-memory training for JAX: half-precision weights with the accuracy of float32 masters.

Examples:
  >>> import jax.numpy as jnp
  >>> import optax_lowmem as lowmem
  >>> tx = lowmem.adamw(1e-3)
  >>> params, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
  >>> grads = {"w": jnp.ones((4, 32), jnp.bfloat16)}
  >>> params, opt_state = lowmem.step(tx, grads, opt_state, params)
  >>> print(params["w"].dtype, lowmem.master_params(params, opt_state)["w"].dtype)
  bfloat16 float32
"""

import importlib
from typing import Any

from optax_lowmem.api import init as init
from optax_lowmem.api import load_master as load_master
from optax_lowmem.api import master_params as master_params
from optax_lowmem.api import step as step
from optax_lowmem.files.memory_table import MemoryTable as MemoryTable
from optax_lowmem.files.memory_table import memory_table as memory_table
from optax_lowmem.files.safetensors import export_safetensors as export_safetensors
from optax_lowmem.files.safetensors import import_safetensors as import_safetensors
from optax_lowmem.flax.train_state import TrainState as TrainState
from optax_lowmem.planner.choices import PlanTable as PlanTable
from optax_lowmem.planner.choices import largest_batch as largest_batch
from optax_lowmem.planner.choices import plan_formats as plan_formats
from optax_lowmem.planner.plan import Plan as Plan
from optax_lowmem.planner.plan import plan as plan
from optax_lowmem.release.fused_backward import fused_backward as fused_backward
from optax_lowmem.states import DeltaBitsState as DeltaBitsState
from optax_lowmem.states import EmaState as EmaState
from optax_lowmem.states import LossScaleState as LossScaleState
from optax_lowmem.states import QuantizedState as QuantizedState
from optax_lowmem.transforms.averages import ema as ema
from optax_lowmem.transforms.averages import ema_params as ema_params
from optax_lowmem.transforms.delta_bits import delta_bits as delta_bits
from optax_lowmem.transforms.loss_scaling import dynamic_loss_scale as dynamic_loss_scale
from optax_lowmem.transforms.loss_scaling import loss_scale as loss_scale
from optax_lowmem.transforms.loss_scaling import scale_loss as scale_loss
from optax_lowmem.transforms.loss_scaling import static_loss_scale as static_loss_scale
from optax_lowmem.transforms.muon import muon as muon
from optax_lowmem.transforms.optimizers import adam as adam
from optax_lowmem.transforms.optimizers import adamw as adamw
from optax_lowmem.transforms.optimizers import lion as lion
from optax_lowmem.transforms.optimizers import sgd as sgd
from optax_lowmem.transforms.quantize_state import quantize_state as quantize_state
from optax_lowmem.transforms.quantize_state import scale_by_adam as scale_by_adam
from pallas_kernels import DeltaFormat as DeltaFormat
from pallas_kernels import merge as merge
from pallas_kernels import split as split
from pallas_kernels import stochastic_round as stochastic_round

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
  """Imports ``nnx`` on its first use."""
  if name == "nnx":
    return importlib.import_module("optax_lowmem.nnx")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
  return [*globals(), "nnx"]
