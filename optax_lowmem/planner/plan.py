"""plan: what a training step needs on a device, read from the compiled program."""

from collections.abc import Callable, Sequence
import dataclasses
import math
import os
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
import numpy as np

from optax_lowmem.files.memory_table import memory_table, nbytes
from optax_lowmem.planner import targets
from optax_lowmem.states import DeltaBitsState
from optax_lowmem.trees import nnx_variables, pytrees

# A CUDA context, its libraries, and what an allocator loses to fragmentation.
RESERVE = 0.06
_LABELS = {
  "weights": "weights",
  "residuals": "residuals",
  "statistics": "statistics",
  "other arguments": "other arguments",
  "temporaries": "gradients, activations, temporaries",
}


@dataclasses.dataclass(frozen=True)
class Plan:
  """The memory of a compiled training step; see :func:`optax_lowmem.plan`.

  Attributes:
    device: the device's name.
    peak_bytes: bytes at the peak, on each device.
    parts: bytes of the peak by part: ``"weights"``, ``"residuals"``,
      ``"statistics"``, ``"other arguments"`` (batch, counters, loss scales) and
      ``"temporaries"`` (gradients, activations, results that replace no argument).
    num_params: the number of parameters; 0 if no argument was recognised.
    copied: bytes by name of the arguments that were donated, but whose memory no
      result takes.
    memory: bytes of the device; None if they are not known.

  Examples:
    >>> import optax_lowmem as lowmem
    >>> plan = lowmem.Plan("an example", 3 * 2**30, {"weights": 2**30}, 2**29, memory=4 * 2**30)
    >>> plan.verdict, plan.fits(2**31)
    ('FITS', False)
  """

  device: str
  peak_bytes: int
  parts: dict[str, int]
  num_params: int
  copied: dict[str, int] = dataclasses.field(default_factory=dict)
  memory: int | None = None

  @property
  def usable_bytes(self) -> int | None:
    """The device's memory without a reserve of 6% (context, libraries, fragmentation)."""
    return None if self.memory is None else int(self.memory * (1 - RESERVE))

  def fits(self, nbytes: int | None = None) -> bool:
    """Whether the peak is at most nbytes, by default the device's usable memory."""
    limit = self.usable_bytes if nbytes is None else nbytes
    if limit is None:
      raise ValueError(f"The memory of {self.device} is not known; pass fits(nbytes).")
    return self.peak_bytes <= limit

  @property
  def verdict(self) -> str:
    """``"FITS"``; ``"TIGHT"`` if it fits the nominal memory alone; ``"NO"``; "" if not known."""
    if self.memory is None:
      return ""
    return "FITS" if self.fits() else "TIGHT" if self.peak_bytes <= self.memory else "NO"

  def __str__(self) -> str:
    count, most = self.num_params, max(self.peak_bytes, self.usable_bytes or 0, 1)
    unit, name = unit_of(self.peak_bytes)
    rows = [(_LABELS[part], size) for part, size in self.parts.items() if size]
    rows.append(("peak", self.peak_bytes))
    if self.usable_bytes is not None:
      rows.append(("usable", self.usable_bytes))
    lines = [f"{self.device}{': ' + self.verdict if self.verdict else ''}"]
    for label, size in rows:
      per = f"{size / count:6.2f} bytes/param" if count and label != "usable" else ""
      bar = "█" * round(24 * size / most)
      lines.append(f"  {label:<36}{size / unit:8.2f} {name}{per:<18}  {bar}".rstrip())
    if self.copied:
      first = ", ".join(list(self.copied)[:3]) + (", ..." if len(self.copied) > 3 else "")
      lines.append(
        f"  {sum(self.copied.values()) / unit:.2f} {name} of donated arguments are copied: {first}."
        " Return a result of each one's shape and dtype, in the order of the arguments."
      )
    return "\n".join(lines)


def unit_of(size: int) -> tuple[int, str]:
  """The unit to print a size in: (its bytes, its name)."""
  return (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")


def plan(
  step: Callable,
  *args,
  device: str | jax.Device | Sequence[jax.Device] | None = None,
  donate_argnums: int | Sequence[int] = (),
) -> Plan:
  """Compiles a training step for a device that need not be there, and reads its memory.

  Nothing is allocated and nothing runs.

  Args:
    step: the whole training step. A jitted function keeps its own donation.
    *args: its arguments, arrays or ``jax.ShapeDtypeStruct``s (``jax.eval_shape``
      makes them). The parameters and the optimizer state are recognised among
      them, also inside a ``TrainState``.
    device: None for the default device; ``"h100"``, ``"h200"``, ``"a100"``,
      ``"l40s"``, ``"b200"``, ``"rtx5090"``, ``"v5e"``, ``"v5p"`` or ``"v6e"``; a
      ``jax.Device``; or several, if the arguments' shardings name them.
    donate_argnums: the arguments that the step may overwrite, as in ``jax.jit``.

  Returns:
    A :class:`optax_lowmem.Plan`. Print it, or read its fields.

  Raises:
    ModuleNotFoundError: if the device's compiler is not installed. The message
      names the extra.
    ValueError: for an unknown device, donate_argnums of a jitted step, or arguments in
      the host's memory.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.adamw(1e-3)
    >>> params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    >>> params, opt_state = jax.eval_shape(lambda p: lowmem.init(tx, p), params)
    >>> def step(params, opt_state, x):
    ...   grads = jax.grad(lambda p: jnp.sum(jnp.tanh(x @ p["w"])))(params)
    ...   return lowmem.step(tx, grads, opt_state, params)
    >>> x = jax.ShapeDtypeStruct((8, 1024), jnp.bfloat16)
    >>> plan = lowmem.plan(step, params, opt_state, x, donate_argnums=(0, 1))
    >>> plan.parts["weights"], plan.parts["residuals"]
    (2097152, 1048576)
  """
  is_jitted = hasattr(step, "trace")
  if is_jitted and donate_argnums not in ((), None):
    raise ValueError("step is jitted and has its own donate_argnums; leave them out here.")
  args = nnx_variables.pure(args)
  name, memory, platform, placed = _placed(args, device)
  _check_memory(args, platform)
  jitted: Any = step if is_jitted else jax.jit(step, donate_argnums=donate_argnums)
  traced = jitted.trace(*placed)
  lowered = traced.lower()
  compiled = lowered.compile()
  stats = compiled.memory_analysis()
  parts, count = _parts(placed)
  peak, given = stats.peak_memory_in_bytes, stats.argument_size_in_bytes
  if platform == "cpu":
    # XLA:CPU leaves the temporaries out of its peak. It allocates them as one buffer.
    results = stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = given + results + stats.temp_size_in_bytes + _workspaces(lowered.as_text())
  parts["other arguments"] = max(given - sum(parts.values()), 0)
  parts["temporaries"] = max(peak - given, 0)
  copied = _copied(traced, lowered, compiled)
  return Plan(name, peak, parts, count, copied, memory)


# Kernels' gradients, whose order of axes starts with the features, need no such memory.
_CONVOLUTION = re.compile(
  r"stablehlo\.convolution\(.*?dim_numbers = \[b,.*?x\[(.*?)\]->.*?lhs_dilate = \[(.*?)\]"
  r".*?feature_group_count = 1 .*?: \(tensor<([\dx]+)x\w+>, tensor<([\dx]+)x\w+>\)"
)


def _workspaces(text: str) -> int:
  """Bytes that XLA:CPU allocates for transposed convolutions without counting them.

  One keeps the products of each input place with the whole kernel, in float32. As many as
  there are cores run at once.
  """
  found = []
  for order, dilation, x, kernel in _CONVOLUTION.findall(text):
    if set(dilation.split(", ")) != {"1"}:
      sizes = [int(n) for n in kernel.split("x")]
      features = sizes[order.split(", ").index("i")]
      places = math.prod(map(int, x.split("x"))) // features
      found.append(4 * places * math.prod(sizes) // features)
  return sum(sorted(found)[-(os.cpu_count() or 1) :])


def _copied(traced, lowered, compiled) -> dict[str, int]:
  """The bytes of donated arguments of the program that no result replaces, by name."""
  infos = zip(
    traced.jaxpr.jaxpr.debug_info.arg_names, jax.tree.leaves(lowered.args_info), strict=True
  )
  donated = {name: info for name, info in infos if info.donated}
  if not donated:
    return {}
  text = compiled.as_text()
  header, entry = text.partition("\n")[0], text[text.index("\nENTRY ") :]
  aliases = re.search(r"input_output_alias=\{(.*?)\}, \w+=", header)
  replaced = set(re.findall(r": \((\d+), \{", aliases[1])) if aliases else set()
  names = re.findall(r'parameter\((\d+)\).*?op_name="((?:[^"\\]|\\.)*)"', entry)
  lost = [name.replace("\\'", "'") for number, name in names if number not in replaced]
  return {
    name: nbytes(jax.ShapeDtypeStruct(donated[name].shape, donated[name].dtype))
    for name in lost
    if name in donated
  }


def _placed(args, device) -> tuple[str, int | None, str, Any]:
  """(the device's name, its memory, its platform, the arguments as structs on it)."""
  if isinstance(device, str):
    target = targets.named(device)
    found = targets.device(device)
    return target.name, target.memory, found.platform, _on(args, SingleDeviceSharding(found))
  if device is None or isinstance(device, jax.Device):
    found = jax.devices()[0] if device is None else device
    return found.device_kind, None, found.platform, _on(args, SingleDeviceSharding(found))
  devices = list(device)
  everywhere = NamedSharding(Mesh(np.array(devices), ("devices",)), PartitionSpec())
  name = f"{len(devices)} x {devices[0].device_kind}"
  return name, None, devices[0].platform, _on(args, everywhere, keeps=True)


def _on(args, sharding, keeps: bool = False):
  def place(x):
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
      return x
    given = getattr(x, "sharding", None)
    placed = given if keeps and isinstance(given, NamedSharding) else sharding
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

  return jax.tree.map(place, args)


def _check_memory(args, platform: str):
  # JAX 0.12 leaves memory kinds out of a program that it lowers for structs.
  for path, x in jax.tree_util.tree_leaves_with_path(args):
    kind = getattr(getattr(x, "sharding", None), "memory_kind", None)
    if kind == "pinned_host" and platform != "cpu":
      raise ValueError(
        f"args{jax.tree_util.keystr(path)} is in pinned_host, but a plan knows one memory. Plan the"
        " step with everything on the device, and take off the parts that are to be on the host."
      )


def _parts(args) -> tuple[dict[str, int], int]:
  """Bytes on each device of weights, residuals and statistics; the number of parameters."""
  pairs = [
    (x.params, x.opt_state) for x in args if hasattr(x, "params") and hasattr(x, "opt_state")
  ]
  pairs += [(p, s) for p in args for s in args if p is not s and _belongs(p, s)]
  if not pairs:
    return {"weights": 0, "residuals": 0, "statistics": 0}, 0

  def on_one_device(x):
    sharding = getattr(x, "sharding", None)
    if sharding is None:
      return x
    return jax.ShapeDtypeStruct(sharding.shard_shape(x.shape), x.dtype)

  table = memory_table(*jax.tree.map(on_one_device, pairs[0]))
  names = {"weights": "weights", "residuals": "residuals", "statistics": "moments"}
  count = sum(x.size for x in jax.tree.leaves(pairs[0][0]) if hasattr(x, "size"))
  return {new: table.parts[old] for new, old in names.items()}, count


def _belongs(params, opt_state) -> bool:
  """Whether an argument is the parameters of another: by our formats, else by paths and shapes."""
  leaves = pytrees.named_leaves(params)
  tables = [x.formats.by_name for x in pytrees.find_states(opt_state, DeltaBitsState)]
  if any(tables):
    return all(name in leaves for table in tables for name in table)
  found = [
    (path, x.shape) for path, x in jax.tree_util.tree_leaves_with_path(opt_state) if np.shape(x)
  ]
  wanted = jax.tree_util.tree_leaves_with_path(params)
  return bool(wanted) and all(
    any(len(path) > len(own) and path[len(path) - len(own) :] == own and shape == x.shape
        for path, shape in found)
    for own, x in wanted
  )  # fmt: skip
