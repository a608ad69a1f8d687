"""by_device: selects a program for the target device while JAX lowers it.

A traced function does not know where it will run: ``jax.jit`` may compile it for
a device other than the default one, or for several. JAX's ``platform_dependent``
sees only "cuda". That is not enough: compiling a Mosaic GPU kernel for a GPU
before Hopper aborts the process, and XLA cannot partition a kernel in a program
for several devices. So this module defines a primitive whose lowering inspects
the devices.
"""

from collections.abc import Callable, Mapping
import contextlib
import functools
import re
from typing import Any

import jax

# Private, but the only way for a lowering rule to learn its devices. Without it,
# `device_assignment` is None and every call takes the XLA program.
from jax._src import dispatch
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
import numpy as np

_by_device_p = Primitive("by_device")
_by_device_p.multiple_results = True
dispatch.prim_requires_devices_during_lowering.add(_by_device_p)


def by_device(
  programs: Mapping[str, Callable], *args, on_each: bool = False, like: Any = None
) -> Any:
  """Calls one of several programs that compute the same results.

  Args:
    programs: a program for each kind of device: "any" (required), "cpu" and
      "gpu" (one device), "cpus" and "gpus" (several, in one program that XLA
      partitions), "mosaic_gpu" and "mosaic_gpus" (NVIDIA GPUs that support the
      kernels; they default to "gpu" and "gpus"), "mosaic_tpu" and "mosaic_tpus"
      likewise (TPUs from v5e on). They close over no tracers.
    *args: pytrees of arrays, the arguments of each program.
    on_each: whether each of several devices runs the program alone
      (``jax.shard_map``). Any one of them then determines the kind.
    like: arrays of the results' types, if known. Otherwise a trace of the
      program for "any" determines the types.

  Returns:
    The results of the program, a pytree of arrays.
  """
  flat, treedef = jax.tree.flatten(args)
  # Types carry more than shape and dtype: shardings, varying mesh axes.
  if like is not None and all(map(_is_plain, map(jax.typeof, flat))):
    struct = like
    types = [jax.typeof(x).update(weak_type=False) for x in jax.tree.leaves(like)]
  else:
    jaxpr, struct = jax.make_jaxpr(programs["any"], return_shape=True)(*args)
    types = jaxpr.out_avals
  outputs = _by_device_p.bind(
    *flat,
    programs=tuple(programs.items()),
    treedef=treedef,
    result=tuple(types),
    on_each=on_each,
  )
  return jax.tree.unflatten(jax.tree.structure(struct), outputs)


def _is_plain(aval) -> bool:
  """Whether a type carries nothing but shape and dtype."""
  mesh = getattr(getattr(aval, "sharding", None), "mesh", None)
  return not getattr(aval, "vma", None) and (mesh is None or mesh.empty)


def _flat_program(kind: str, programs, treedef):
  by_kind: dict[str, Callable] = dict(programs)
  program = by_kind.get(kind) or by_kind.get(kind.removeprefix("mosaic_")) or by_kind["any"]
  return lambda *flat: jax.tree.leaves(program(*jax.tree.unflatten(treedef, flat)))


def _abstract_eval(*avals, result, **params):
  del avals, params
  return list(result)


def _impl(*args, **params):
  bind = functools.partial(_by_device_p.bind, **params)
  with jax.disable_jit(False):  # otherwise jit would call this function again
    return jax.jit(bind)(*args)


def _jvp(primals, tangents, *, programs, treedef, result, on_each):
  del result, on_each

  def instantiate(x, t):
    if type(t) is not ad.Zero:
      return t
    is_inexact = jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)
    return jax.numpy.zeros_like(x) if is_inexact else np.zeros(x.shape, jax.dtypes.float0)

  tangents = [instantiate(x, t) for x, t in zip(primals, tangents, strict=True)]
  return jax.jvp(_flat_program("any", programs, treedef), tuple(primals), tuple(tangents))


def _lower(ctx, *args, programs, treedef, result, on_each):
  del result
  devices = getattr(ctx.module_context.axis_context, "device_assignment", None) or ()
  platforms = tuple(ctx.platforms or ctx.module_context.platforms)
  if on_each and len(set(map(_generation, devices))) == 1:
    devices = devices[:1]
  flat = _flat_program(_kind(devices, platforms), programs, treedef)
  with _tracing_for(devices):
    return mlir.lower_fun(flat, multiple_results=True)(ctx, *args)


def _tracing_for(devices):
  """Tells Pallas the TPU that it traces for, which need not be there."""
  if not devices or devices[0].platform != "tpu":
    return contextlib.nullcontext()
  device = jax.sharding.AbstractDevice(
    device_kind=devices[0].device_kind,
    num_cores=getattr(devices[0], "num_cores", 1),
    platform="tpu",
  )
  mesh = jax.sharding.get_abstract_mesh().update(abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def _kind(devices, platforms) -> str:
  if len(platforms) != 1 or not devices:
    return "gpu" if platforms == ("cuda",) else "any"
  kinds = {_kind_of_one(device, platforms) for device in devices}
  (kind,) = kinds if len(kinds) == 1 else ("any",)
  if len(devices) == 1 or kind == "any":
    return kind
  return kind + "s"


def _kind_of_one(device, platforms) -> str:
  # An exported program can target a platform other than its devices'.
  if platforms != ({"gpu": "cuda"}.get(device.platform, device.platform),):
    return "any"
  if device.platform == "cpu":
    return "cpu"
  if device.platform == "tpu":
    generation = re.search(r"TPU ?v?(\d+)", device.device_kind)
    return "mosaic_tpu" if generation and int(generation[1]) >= 5 else "tpu"
  capability = float(getattr(device, "compute_capability", 0)) if _is_nvidia(device) else 0
  return "mosaic_gpu" if capability >= 9.0 else "gpu"


def _generation(device):
  return device.platform, device.device_kind, getattr(device, "compute_capability", None)


def _is_nvidia(device) -> bool:
  return device.platform == "gpu" and "NVIDIA" in device.device_kind


def _batch(args, axes, *, programs, treedef, result, on_each):
  del result, on_each
  flat = jax.vmap(_flat_program("any", programs, treedef), in_axes=axes)(*args)
  return flat, [0] * len(flat)


_by_device_p.def_abstract_eval(_abstract_eval)
_by_device_p.def_impl(_impl)
ad.primitive_jvps[_by_device_p] = _jvp
mlir.register_lowering(_by_device_p, _lower)
batching.primitive_batchers[_by_device_p] = _batch
