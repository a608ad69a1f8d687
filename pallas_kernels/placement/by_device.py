"""by_device: the program that suits the device it is compiled for, chosen while it is lowered.

A traced function does not know where it will run: `jax.jit` may compile it for
another device than the default one, or for several. JAX's `platform_dependent`
sees "cuda" alone, but a Mosaic GPU kernel that is compiled for a GPU before
Hopper aborts the process, and one inside a partitioned program needs to be
partitioned by us. So this is a primitive of our own, whose lowering looks at the
devices.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax

# Private, and the only way for a lowering rule to be told its devices; without
# it `device_assignment` is None and everything takes the XLA path.
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
  """Calls one of several programs with equal results.

  Args:
    programs: by kind of device: "any" (needed), "cpu" and "gpu" (one device),
      "cpus" and "gpus" (several, in one program that XLA partitions),
      "mosaic_gpu" and "mosaic_gpus" (NVIDIA GPUs that the kernels compile for;
      without them "gpu" and "gpus"). They close over no tracers.
    *args: pytrees of arrays, the arguments of each program.
    on_each: whether the programs run the same on each of several devices
      (`jax.shard_map`): the device is then any of them.
    like: arrays of the results' types, where they are known; otherwise a trace
      of the program for "any" tells them.

  Returns:
    What the program returns, a pytree of arrays.
  """
  flat, treedef = jax.tree.flatten(args)
  # Types, with whatever they carry besides shape and dtype (shardings, varying mesh axes).
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
  """Whether a type says no more than shape and dtype."""
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
  with jax.disable_jit(False):  # it would come back here
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
  return mlir.lower_fun(flat, multiple_results=True)(ctx, *args)


def _kind(devices, platforms) -> str:
  if len(platforms) != 1 or not devices:
    return "gpu" if platforms == ("cuda",) else "any"
  kinds = {_kind_of_one(device, platforms) for device in devices}
  (kind,) = kinds if len(kinds) == 1 else ("any",)
  if len(devices) == 1 or kind == "any":
    return kind
  return kind + "s"


def _kind_of_one(device, platforms) -> str:
  if platforms != ({"cpu": "cpu", "gpu": "cuda"}.get(device.platform),):  # exported for another
    return "any"
  if device.platform == "cpu":
    return "cpu"
  capability = float(getattr(device, "compute_capability", 0)) if _is_nvidia(device) else 0
  return "mosaic_gpu" if capability >= 9.0 else "gpu"


def _generation(device):
  return device.platform, getattr(device, "compute_capability", None)


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
