"""estimate: the memory of a training step by formula, from numbers of parameters alone."""

from collections.abc import Mapping

import jax.numpy as jnp

from optax_lowmem.planner import targets
from optax_lowmem.planner.plan import Plan
from pallas_kernels import DeltaFormat
from pallas_kernels.formats.state_formats import StateFormat

# Statistics that an optimizer keeps of each parameter; "muon" of each in a matrix that it steps.
STATISTICS: Mapping[str, int] = {"adamw": 2, "adam": 2, "lion": 1, "muon": 1, "sgd": 1}
# Bytes a token and unit of width that a transformer's layer keeps between its forward and its
# backward pass, in 16 bits and without attention scores: Korthikanti et al., arXiv 2205.05198,
# section 4.
_LAYER = 34


def estimate(
  num_params: float,
  *,
  weights: str = "bf16+8",
  statistics: str = "int8",
  optimizer: str = "adamw",
  release: bool = False,
  layers: int | None = None,
  width: int | None = None,
  batch: int = 1,
  sequence: int | None = None,
  vocabulary: int = 0,
  device: str | None = None,
) -> Plan:
  """Estimates a training step whose layers are rematerialised.

  Weights, residuals and statistics are exact for leaves of whole blocks. Gradients are those
  of the model in the weights' dtype, or of one layer with gradient release. Activations are
  the inputs of all layers, one layer's own, and the logits in float32 with their gradient:
  an estimate, 0 without width and sequence.

  Args:
    num_params: the number of parameters.
    weights: their format.
    statistics: the format of the optimizer's statistics; or one for each, as in
      ``"int8-int4"`` for the two moments.
    optimizer: ``"adamw"``, ``"adam"``, ``"lion"``, ``"muon"`` (all parameters as
      matrices) or ``"sgd"`` (with momentum).
    release: whether the backward pass applies the optimizer; needs layers.
    layers: the number of layers.
    width: the width of the residual stream.
    batch: sequences a step.
    sequence: tokens a sequence.
    vocabulary: the number of logits a token.
    device: a name in ``targets.TARGETS``, or None.

  Returns:
    A :class:`optax_lowmem.Plan`.

  Raises:
    ValueError: for an unknown name, or numbers that are missing or not positive.
  """
  if optimizer not in STATISTICS:
    raise ValueError(f"optimizer must be one of {', '.join(STATISTICS)}; got {optimizer!r}.")
  target = None if device is None else targets.named(device)
  if release and layers is None:
    raise ValueError("release needs layers: the gradients of one of them exist at a time.")
  numbers = {"num_params": num_params, "layers": layers, "width": width, "sequence": sequence}
  for name, x in (numbers | {"batch": batch}).items():
    if x is not None and not x > 0:
      raise ValueError(f"{name} must be positive; got {x}.")
  fmt, kinds, count = DeltaFormat.parse(weights), statistics.split("-"), STATISTICS[optimizer]
  if len(kinds) not in (1, count):
    raise ValueError(f"{optimizer} takes {count} formats of statistics or one; got {statistics!r}.")
  formats = [StateFormat(kind) for kind in kinds * (count // len(kinds))]  # type: ignore[arg-type]
  weight_bits = 32 if fmt.is_full_precision else jnp.finfo(fmt.dtype).bits
  residual_bits = 0 if fmt.is_full_precision else fmt.residual_bits
  nbytes = lambda bits: int(num_params * bits / 8)
  gradients = nbytes(weight_bits) // (layers if release and layers else 1)
  tokens = batch * (sequence or 0)
  activations = tokens * (width or 0) * (2 * (layers or 1) + _LAYER) + tokens * vocabulary * 8
  parts = {
    "weights": nbytes(weight_bits),
    "residuals": nbytes(residual_bits),
    "statistics": nbytes(sum(f.bits_per_value for f in formats)),
    "other arguments": 0,
    "temporaries": gradients + activations,
  }
  name = "estimate" if target is None else f"{target.name}, estimate"
  memory = None if target is None else target.memory
  return Plan(name, sum(parts.values()), parts, int(num_params), memory=memory)
