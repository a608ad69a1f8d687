"""implementations: the names of an operation's programs and the devices that run them."""

from typing import Literal, get_args

import jax

Implementation = Literal["xla", "mosaic_gpu"]

MAX_SIZE = 2**31 - 1  # a kernel program keeps the place of its first element in an int32


def check_name(implementation):
  """Raises a ValueError if the name is not that of an implementation."""
  if implementation not in (None, *get_args(Implementation)):
    raise ValueError(f'implementation must be None, "xla" or "mosaic_gpu"; got {implementation!r}.')


def resolve(
  implementation: Implementation | None, *arrays: jax.Array, residual_bits: int = 0
) -> Implementation:
  """Checks an operation's ``implementation``, and chooses one for None.

  None means "xla" here. XLA compiles each of these operations into one fusion
  with the memory traffic of the kernel (``tests/test_h100.py`` counts both), and
  no measurement on a GPU has shown the kernel to be faster. (``fused_update``,
  for which XLA needs two passes, chooses by the target device.)

  Args:
    implementation: None, "xla" or "mosaic_gpu".
    *arrays: the operands; the first determines the size.
    residual_bits: residual bits a value.

  Returns:
    "xla" or "mosaic_gpu".

  Raises:
    ValueError: if the name is unknown or the kernel cannot run.
  """
  check_name(implementation)
  if implementation in (None, "xla"):
    return "xla"
  if residual_bits not in (0, 8, 16):
    raise ValueError(
      '"mosaic_gpu" takes residuals of 0, 8 or 16 bits, which need no packing; got'
      f' {residual_bits} bits. "xla" takes every width.'
    )
  if arrays[0].size > MAX_SIZE:
    raise ValueError(f'"mosaic_gpu" takes at most {MAX_SIZE} elements; got {arrays[0].size}.')
  _check_devices(arrays)
  return implementation


def _check_devices(arrays):
  """Raises before lowering if the platform does not support Mosaic GPU.

  (Below compute capability 9.0, LLVM would abort the process.) Tracers have no
  device. Under jit, the check uses the default backend if that is a GPU; if it is
  a CPU, the program may target another machine or the interpreter.
  """
  if interpreter_is_forced():
    return
  concrete = [x for x in arrays if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)]
  if concrete:
    device = next(iter(concrete[0].devices()))
  elif jax.default_backend() == "gpu":
    device = jax.devices()[0]
  else:
    return
  if device.platform != "gpu" or float(getattr(device, "compute_capability", 0)) < 9.0:
    raise ValueError(
      '"mosaic_gpu" runs on NVIDIA GPUs of compute capability 9.0 (Hopper) or later, or on a'
      " CPU under jax.experimental.pallas.mosaic_gpu.force_gpu_interpret_mode();"
      f' the arrays are on {device.device_kind!r}. Use "xla" or None.'
    )


def interpreter_is_forced() -> bool:
  """Whether JAX's GPU interpreter runs kernels on a CPU."""
  # JAX has no public getter for the setting of `force_gpu_interpret_mode`.
  from jax._src import config

  state = getattr(config, "pallas_tpu_interpret_mode_context_manager", None)
  return state is not None and state.value is not None
