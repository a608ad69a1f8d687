"""implementations: the names of an operation's programs and the devices that run them."""

from typing import Literal, get_args

import jax

Implementation = Literal["xla", "mosaic_gpu", "mosaic_tpu"]

MAX_SIZE = 2**31 - 1  # a kernel program keeps the place of its first element in an int32


def check_name(implementation):
  """Raises a ValueError if the name is not that of an implementation."""
  if implementation not in (None, *get_args(Implementation)):
    names = ", ".join(f'"{name}"' for name in get_args(Implementation))
    raise ValueError(f"implementation must be None or one of {names}; got {implementation!r}.")


def resolve(
  implementation: Implementation | None,
  *arrays: jax.Array,
  residual_bits: int = 0,
  has_tpu_kernel: bool = False,
) -> Implementation:
  """Checks an operation's ``implementation``, and chooses one for None.

  None means "xla" here. XLA compiles each of these operations into one fusion
  with the memory traffic of the kernel (``tests/test_h100.py`` counts both), and
  no measurement on a GPU has shown the kernel to be faster. (``fused_update``,
  for which XLA needs two passes, chooses by the target device.)

  Args:
    implementation: None or a name.
    *arrays: the operands; the first determines the size.
    residual_bits: residual bits a value.
    has_tpu_kernel: whether the operation has one.

  Returns:
    The name.

  Raises:
    ValueError: if the name is unknown or the kernel cannot run.
  """
  check_name(implementation)
  if implementation in (None, "xla"):
    return "xla"
  if implementation == "mosaic_tpu" and not has_tpu_kernel:
    raise ValueError(
      'Only fused_update and apply_update have a kernel "mosaic_tpu"; XLA makes one pass of this'
      ' operation. Pass "xla" or None.'
    )
  if residual_bits not in (0, 8, 16):
    raise ValueError(
      f'"{implementation}" takes residuals of 0, 8 or 16 bits, which need no packing; got'
      f' {residual_bits} bits. "xla" takes every width.'
    )
  if arrays[0].size > MAX_SIZE:
    raise ValueError(f'"{implementation}" takes at most {MAX_SIZE} elements; got {arrays[0].size}.')
  _check_devices(implementation, arrays)
  return implementation


def _check_devices(implementation, arrays):
  """Raises before lowering if the platform does not support the kernel.

  (Below compute capability 9.0, LLVM would abort the process.) Tracers have no
  device. Under jit, the check uses the default backend unless it is a CPU: then the
  program may target another machine or the interpreter.
  """
  if interpreter_is_forced():
    return
  concrete = [x for x in arrays if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
  if concrete:
    device = next(iter(concrete[0].devices()))
  elif jax.default_backend() != "cpu":
    device = jax.devices()[0]
  else:
    return
  if implementation == "mosaic_tpu":
    if device.platform != "tpu":
      raise ValueError(
        '"mosaic_tpu" runs on TPUs from v5e on, or on a CPU under'
        " jax.experimental.pallas.tpu.force_tpu_interpret_mode(); the arrays are on"
        f' {device.device_kind!r}. Use "xla" or None.'
      )
  elif device.platform != "gpu" or float(getattr(device, "compute_capability", 0)) < 9.0:
    raise ValueError(
      '"mosaic_gpu" runs on NVIDIA GPUs of compute capability 9.0 (Hopper) or later, or on a'
      " CPU under jax.experimental.pallas.mosaic_gpu.force_gpu_interpret_mode();"
      f' the arrays are on {device.device_kind!r}. Use "xla" or None.'
    )


def interpreter_is_forced() -> bool:
  """Whether JAX's interpreter for GPUs or TPUs runs kernels on a CPU."""
  # JAX has no public getter for the setting of `force_gpu_interpret_mode`, which is also the
  # setting for TPUs.
  from jax._src import config

  state = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
  return state is not None and state.value is not None
