"""targets: GPUs and TPUs as data, and the devices that XLA compiles for without having them."""

import functools
import importlib
import os
import pkgutil
from typing import NamedTuple

import jax


class Target(NamedTuple):
  """What a compiler asks about a chip: facts from its data sheet.

  Attributes:
    name: the device's own name.
    memory: bytes that the driver (or the TPU runtime) reports.
    topology: a TPU's topology, as libtpu spells it; else "".
    major: a GPU's compute capability.
    minor: likewise.
    cores: streaming multiprocessors.
    clock: GHz.
    bandwidth: bytes a second.
    l2: bytes of the level-2 cache.
    shared_per_core: bytes of shared memory on a multiprocessor.
    threads_per_core: threads on a multiprocessor.
  """

  name: str
  memory: int
  topology: str = ""
  major: int = 0
  minor: int = 0
  cores: int = 0
  clock: float = 0.0
  bandwidth: int = 0
  l2: int = 0
  shared_per_core: int = 0
  threads_per_core: int = 0

  @property
  def is_tpu(self) -> bool:
    """Whether it is a TPU."""
    return bool(self.topology)

  @property
  def description(self) -> str:
    """The GPU as XLA's target configuration."""
    accelerated = "feature_extension: ACCELERATED_FEATURES" if self.major >= 9 else ""
    capability = f"major: {self.major} minor: {self.minor} {accelerated}"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_per_core}
  shared_memory_per_block_optin: {self.shared_per_core - 1024}
  threads_per_core_limit: {self.threads_per_core} core_count: {self.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {self.bandwidth} l2_cache_size: {self.l2} clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ {capability} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{self.name}"
  platform_version: "Compute Capability {self.major}.{self.minor}"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.name}"
"""


# NVIDIA's data sheets and architecture papers; Google's Cloud TPU documentation. A GPU's memory
# is what its driver reports, a little less than the nominal size.
TARGETS = {
  "h100": Target(
    "NVIDIA H100 80GB HBM3", 84942979072, major=9, minor=0, cores=132, clock=1.98,
    bandwidth=3352320000000, l2=52428800, shared_per_core=233472, threads_per_core=2048,
  ),
  "h200": Target(
    "NVIDIA H200", 150110011392, major=9, minor=0, cores=132, clock=1.98,
    bandwidth=4800000000000, l2=62914560, shared_per_core=233472, threads_per_core=2048,
  ),
  "a100": Target(
    "NVIDIA A100-SXM4-80GB", 85175894016, major=8, minor=0, cores=108, clock=1.41,
    bandwidth=2039000000000, l2=41943040, shared_per_core=167936, threads_per_core=2048,
  ),
  "l40s": Target(
    "NVIDIA L40S", 47697362944, major=8, minor=9, cores=142, clock=2.52,
    bandwidth=864000000000, l2=100663296, shared_per_core=102400, threads_per_core=1536,
  ),
  "b200": Target(
    "NVIDIA B200", 191503138816, major=10, minor=0, cores=148, clock=1.965,
    bandwidth=8000000000000, l2=132644864, shared_per_core=233472, threads_per_core=2048,
  ),
  "rtx5090": Target(
    "NVIDIA GeForce RTX 5090", 33668988928, major=12, minor=0, cores=170, clock=2.41,
    bandwidth=1792000000000, l2=100663296, shared_per_core=102400, threads_per_core=1536,
  ),
  "v5e": Target("TPU v5e", 16 * 2**30, topology="v5e:2x2"),
  "v5p": Target("TPU v5p", 95 * 2**30, topology="v5p:2x2x1"),
  "v6e": Target("TPU v6e", 32 * 2**30, topology="v6e:2x2"),
}  # fmt: skip


@functools.cache
def gpus(target: str, topology: str = "1x1x1"):
  """GPUs that need not be there, "1x1x8" of them.

  Raises:
    ModuleNotFoundError: if the compiler is not installed; it names the extra.
  """
  from jax.experimental import topologies  # here: it is not imported with JAX

  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver to check
  describe = functools.partial(
    topologies.get_topology_desc, "", platform="cuda", topology=topology,
    target_config=TARGETS[target].description,
  )  # fmt: skip
  try:
    try:
      found = describe()
    except NotImplementedError:  # JAX started before, checked for cuDNN, and dropped the plugin
      _start_plugin()
      found = describe()
  except Exception as error:  # the plugin's own kinds; only a missing plugin is expected
    if "cuda" not in str(error).lower():
      raise
    raise ModuleNotFoundError(_missing(target, "plan")) from error
  return found.devices


def _start_plugin():
  """Starts JAX's plugin for NVIDIA GPUs; without one, it does nothing."""
  try:
    plugins = importlib.import_module("jax_plugins")
  except ModuleNotFoundError:
    return
  for module in pkgutil.iter_modules(plugins.__path__):
    if module.name.startswith("xla_cuda"):
      importlib.import_module(f"jax_plugins.{module.name}").initialize()


@functools.cache
def tpus(topology: str):
  """TPUs that need not be there, such as "v5e:4x4".

  Raises:
    ModuleNotFoundError: if the compiler is not installed; it names the extra.
  """
  from jax.experimental import topologies

  try:
    return topologies.get_topology_desc(topology, platform="tpu").devices
  except jax.errors.JaxRuntimeError:
    raise
  except RuntimeError as error:  # JAX: "TPU support not installed"
    raise ModuleNotFoundError(_missing(topology, "tpu")) from error


def named(target: str) -> Target:
  """A target, by its name in TARGETS; raises a ValueError for another name."""
  if target not in TARGETS:
    raise ValueError(f"device must be one of {', '.join(TARGETS)}; got {target!r}.")
  return TARGETS[target]


def device(target: str):
  """One device of a target, by its name in TARGETS."""
  found = named(target)
  return tpus(found.topology)[0] if found.is_tpu else gpus(target)[0]


def _missing(target: str, extra: str) -> str:
  return (
    f"Compiling for {target} on a machine without one needs JAX's plugin for it:"
    f' pip install "optax_lowmem[{extra}]".'
  )
