"""plan_formats and largest_batch: what fits, found by compiling one choice after the other."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import jax

from optax_lowmem import api
from optax_lowmem.planner.plan import Plan, plan, unit_of
from pallas_kernels import DeltaFormat
from pallas_kernels.formats.state_formats import StateFormat

FORMATS = ("fp32/fp32", "bf16+16/bf16", "bf16+8/int8", "bf16+0/int8")
# docs/results.md: how many examples were trained in a format, and by how much the worst of them
# differs from float32, as a mean over five seeds (`long`: one).
EVIDENCE: Mapping[str, tuple[int, str, float]] = {
  "bf16+8/bf16": (4, "t5", 0.0060),
  "bf16+8/int8": (13, "lstm", 0.0039),
  "bf16+0/int8": (7, "lstm", 0.0041),
  "bf16+0/int4": (5, "t5", 0.0124),
  "fp16+8/int8": (6, "dcgan", 0.0672),
}
_Make = Callable[[str, str], tuple[Any, Callable]]


@dataclasses.dataclass(frozen=True)
class PlanTable:
  """The plans of a step in several formats; see :func:`optax_lowmem.plan_formats`.

  Attributes:
    plans: a plan for each choice, the smallest peak first. A choice is named
      WEIGHTS/STATISTICS; with gradient release, ``", released"`` follows.
    base: the choice that the others are compared with.

  Examples:
    >>> import optax_lowmem as lowmem
    >>> sizes = {"bf16+8/int8": 2**32, "fp32/fp32": 2**33}
    >>> plans = {name: lowmem.Plan("cpu", n, {"weights": n}, 2**30) for name, n in sizes.items()}
    >>> table = lowmem.PlanTable(plans, "fp32/fp32")
    >>> str(table).splitlines()[1].split()[:5]
    ['bf16+8/int8', '4.00', 'GiB', '4.00', 'GiB']
  """

  plans: dict[str, Plan]
  base: str

  def __str__(self) -> str:
    first = next(iter(self.plans.values()))
    unit, unit_name = unit_of(max(found.peak_bytes for found in self.plans.values()))
    rows = [[first.device, "peak", "saves", "", "evidence", "change"]]
    for name, found in self.plans.items():
      saved = self.plans[self.base].peak_bytes - found.peak_bytes
      sizes = [f"{x / unit:.2f} {unit_name}" for x in (found.peak_bytes, saved)]
      rows.append([name, *sizes, found.verdict, self._evidence(name), _change(name)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [f"{{:{side}{width}}}" for side, width in zip("<>><<<", widths, strict=True)]
    return "\n".join("  ".join(aligned).format(*row).rstrip() for row in rows)

  def _evidence(self, name: str) -> str:
    if name == self.base:
      return "the base"
    formats, _, released = name.partition(", ")
    if released:
      return "same bits, layers computed twice"
    if formats not in EVIDENCE:
      return "not in the sweep"
    count, worst, relative = EVIDENCE[formats]
    return f"{count} examples: {worst} {relative:+.1%}"


def _change(name: str) -> str:
  formats, _, released = name.partition(", ")
  weights, _, statistics = formats.partition("/")
  change = f'weights="{weights}", mu="{statistics}", nu="{statistics}"'
  return "step = lowmem.fused_backward(loss_fn, tx)" if released else change


def plan_formats(
  make_step: _Make,
  params,
  *batch,
  make_released: _Make | None = None,
  device: str | jax.Device | Sequence[jax.Device] | None = None,
  formats: Sequence[str] = FORMATS,
) -> PlanTable:
  """Plans the same training step in several formats, and with gradient release.

  Formats reach the step through a function, because a step closes over its
  transformation, and the state depends on it. The function is the code that
  builds your step, with two strings in place of two constants.

  Args:
    make_step: a function of a format of weights and one of statistics, such as
      ``"bf16+8"`` and ``"int8"``. It returns ``(tx, step)``, where step takes
      ``(params, opt_state, *batch)``, which it may overwrite.
    params: the float32 parameters, arrays or ``jax.ShapeDtypeStruct``s.
    *batch: the step's other arguments, likewise.
    make_released: the same for a step that releases its gradients
      (:func:`optax_lowmem.fused_backward`); None leaves release out.
    device: as in :func:`optax_lowmem.plan`.
    formats: the choices, each WEIGHTS/STATISTICS. The first is the base of the
      comparison.

  Returns:
    A :class:`optax_lowmem.PlanTable`. Print it, or read ``plans``.

  Raises:
    ValueError: for an unknown format.
    TypeError: if make_step does not return two values.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> def make_step(weights, statistics):
    ...   tx = lowmem.adamw(1e-3, weights=weights, mu=statistics, nu=statistics)
    ...   def step(params, opt_state, x):
    ...     grads = jax.grad(lambda p: jnp.mean((x @ p["w"]) ** 2))(params)
    ...     return lowmem.step(tx, grads, opt_state, params)
    ...   return tx, step
    >>> params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    >>> x = jax.ShapeDtypeStruct((8, 1024), jnp.float32)
    >>> table = lowmem.plan_formats(make_step, params, x, formats=("fp32/fp32", "bf16+8/int8"))
    >>> list(table.plans)
    ['bf16+8/int8', 'fp32/fp32']
  """
  plans: dict[str, Plan] = {}
  for name in formats:
    weights, statistics = _parse(name)
    for label, make in ((name, make_step), (f"{name}, released", make_released)):
      if make is None:
        continue
      made = make(weights, statistics)
      if not isinstance(made, tuple) or len(made) != 2:
        raise TypeError(f"make_step returns (tx, step); got {type(made).__name__}.")
      tx, step = made
      state = jax.eval_shape(lambda p, tx=tx: api.init(tx, p), params)
      donated = () if hasattr(step, "trace") else (0, 1)
      plans[label] = plan(step, *state, *batch, device=device, donate_argnums=donated)
  ordered = sorted(plans.items(), key=lambda item: item[1].peak_bytes)
  return PlanTable(dict(ordered), formats[0])


def _parse(name: str) -> tuple[str, str]:
  weights, slash, statistics = name.partition("/")
  if not slash:
    raise ValueError(f'formats are WEIGHTS/STATISTICS, such as "bf16+8/int8"; got {name!r}.')
  DeltaFormat.parse(weights)  # raises with what is accepted
  StateFormat(statistics)  # type: ignore[arg-type]
  return weights, statistics


def largest_batch(
  step: Callable,
  *args,
  batch_argnums: int | Sequence[int],
  device: str | jax.Device | Sequence[jax.Device] | None = None,
  donate_argnums: int | Sequence[int] = (),
  nbytes: int | None = None,
) -> tuple[int, Plan]:
  """Finds the largest batch that fits, by compiling the step for one after the other.

  It doubles the batch while it fits, then halves the gap, until the result is
  within a sixteenth of the largest.

  Args:
    step: the training step, as in :func:`optax_lowmem.plan`.
    *args: its arguments.
    batch_argnums: the arguments that hold the batch. The first axis of each of
      their leaves is the batch's size, with which the search starts.
    device: as in :func:`optax_lowmem.plan`.
    donate_argnums: likewise.
    nbytes: the memory to fill; by default what is usable of the device.

  Returns:
    ``(size, plan)``: the largest size that was compiled and fits, and its plan;
    ``(0, plan)`` with the plan of one example if not even that fits.

  Raises:
    ValueError: if the batch's leaves differ in their first axis, if memory does not
      grow with them, or if the device's memory is not known.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> step = lambda w, x: jnp.sum(jnp.sin(x @ w))
    >>> args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, 64), (8, 64))]
    >>> size, plan = lowmem.largest_batch(step, *args, batch_argnums=1, nbytes=2**20)
    >>> plan.fits(2**20) and size > 1000
    True
  """
  numbers = (batch_argnums,) if isinstance(batch_argnums, int) else tuple(batch_argnums)
  leaves = jax.tree.leaves([args[i] for i in numbers])
  sizes = {x.shape[0] if getattr(x, "shape", ()) else None for x in leaves}
  if len(sizes) != 1 or None in sizes:
    raise ValueError(
      f"The leaves of arguments {numbers} must share their first axis, the batch's size; it is"
      f" {sorted(map(str, sizes))}."
    )

  def of_size(n: int) -> Plan:
    def resized(x):
      sharding = getattr(x, "sharding", None)
      return jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype, sharding=sharding)

    new = [jax.tree.map(resized, x) if i in numbers else x for i, x in enumerate(args)]
    return plan(step, *new, device=device, donate_argnums=donate_argnums)

  (low,) = sizes
  assert low is not None
  found = of_size(low)
  while not found.fits(nbytes) and low > 1:
    low //= 2
    found = of_size(low)
  if not found.fits(nbytes):
    return 0, found
  high = 2 * low
  while (larger := of_size(high)).fits(nbytes):
    if larger.peak_bytes == found.peak_bytes:
      raise ValueError(f"The step's memory does not grow with its arguments {numbers}.")
    low, high, found = high, 2 * high, larger
  while high - low > max(low // 16, 1):
    middle = (low + high) // 2
    tried = of_size(middle)
    if tried.fits(nbytes):
      low, found = middle, tried
    else:
      high = middle
  return low, found
