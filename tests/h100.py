"""Compiling for an H100 (an A100, an L40S, a B200) on a machine that has none: `../shared/AOT.md`.

The target descriptions are facts about the chips, written from their data
sheets; the compiler wants them because there is no device to ask.
"""

import functools

import jax
from jax.experimental import topologies

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: {shared_per_core}
  shared_memory_per_block_optin: {shared_optin}
  threads_per_core_limit: {threads_per_core} core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} {features} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{name}"
  platform_version: "Compute Capability {major}.{minor}"
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""

TARGETS = {
    "h100": dict(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, cores=132, clock=1.98,
        features="feature_extension: ACCELERATED_FEATURES", bandwidth=3352320000000, l2=52428800,
        memory=84942979072, shared_per_core=233472, shared_optin=232448, threads_per_core=2048,
    ),
    "a100": dict(
        name="NVIDIA A100-SXM4-80GB", major=8, minor=0, cores=108, clock=1.41,
        features="", bandwidth=2039000000000, l2=41943040,
        memory=85175894016, shared_per_core=167936, shared_optin=166912, threads_per_core=2048,
    ),
    "l40s": dict(
        name="NVIDIA L40S", major=8, minor=9, cores=142, clock=2.52,
        features="", bandwidth=864000000000, l2=100663296,
        memory=47697362944, shared_per_core=102400, shared_optin=101376, threads_per_core=1536,
    ),
    "b200": dict(
        name="NVIDIA B200", major=10, minor=0, cores=148, clock=1.965,
        features="feature_extension: ACCELERATED_FEATURES", bandwidth=8000000000000, l2=132644864,
        memory=191503138816, shared_per_core=233472, shared_optin=232448, threads_per_core=2048,
    ),
}  # fmt: skip


@functools.cache
def devices(topology: str, target: str = "h100"):
  """Such devices, "1x1x8" of them; None where the `h100` extra is not installed."""
  text = _TARGET.format(**TARGETS[target])
  try:
    found = topologies.get_topology_desc("", platform="cuda", target_config=text, topology=topology)
  except Exception as error:  # the plugin's own kinds; only a missing plugin is expected
    if "cuda" not in str(error).lower():
      raise
    return None
  return found.devices


def sharding(target: str = "h100"):
  """A sharding on one such device; None where the `h100` extra is not installed."""
  found = devices("1x1x1", target)
  return found and jax.sharding.SingleDeviceSharding(found[0])


def struct(shape, dtype, target: str = "h100") -> jax.ShapeDtypeStruct:
  """An argument that lies on the device."""
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(target))


def on_device(tree, target: str = "h100"):
  """The structs of a tree of arrays or structs, on the device."""
  return jax.tree.map(lambda x: struct(x.shape, x.dtype, target), tree)


def compiled(f, *structs, donate=()):
  """f compiled for the structs' device."""
  return jax.jit(f, donate_argnums=donate).trace(*structs).lower().compile()
