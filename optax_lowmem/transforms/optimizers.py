"""adamw, adam, lion and sgd: Optax's, with weights and statistics in few bits.

Each is `delta_bits(quantize_state(optax.X(...)))` with Optax's mathematics, declared
elementwise. Parameters without a weight format keep Optax's own behaviour, statistics
included.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_lowmem.engine.leaf_steps import Fold, Optimizer
from optax_lowmem.transforms.delta_bits import Weights, delta_bits_of
from optax_lowmem.transforms.quantize_state import DEFAULT, first_format, quantize
from pallas_kernels.formats.state_formats import Name
from pallas_kernels.placement import implementations
from pallas_kernels.placement.implementations import Implementation

Array = jax.typing.ArrayLike


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: Array = 0.9,
  b2: Array = 0.999,
  eps: Array = 1e-8,
  eps_root: Array = 0.0,
  mu_dtype: Any | None = None,
  weight_decay: optax.ScalarOrSchedule = 1e-4,
  mask: Any | None = None,
  *,
  nesterov: bool = False,
  weights: Weights = "bf16+8",
  mu: Name = DEFAULT,
  nu: Name = "int8",
  key: Array = 0,
  update_dtype: Any = jnp.float32,
  implementation: Implementation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """`optax.adamw` in 5.13 bytes a parameter: weight, residual and both moments.

  Args:
    learning_rate: a float, a traced array or a schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    eps_root: added to the second moment under the root.
    mu_dtype: Optax's dtype of the first moment, in the place of mu.
    weight_decay: decoupled weight decay, multiplied by the learning rate.
    mask: which parameters decay: a tree of bools, or a callable of params.
    nesterov: whether to use Nesterov momentum.
    weights: formats of the weights, as `delta_bits` takes them.
    mu: format of the first moment: "fp32", "bf16", "fp16" or "int8".
    nu: format of the second moment.
    key: an integer seed or a `jax.random` key for stochastic rounding.
    update_dtype: as `delta_bits` takes it.
    implementation: of `lowmem.step`: None, "xla" or "mosaic_gpu", as
      `pallas_kernels.fused_update` takes it.

  Returns:
    A transformation; use it with `lowmem.init` and `lowmem.step`.

  Raises:
    ValueError: for an unknown format, or if mu and mu_dtype are both given.

  Examples:
    >>> tx = lowmem.adamw(3e-4, weight_decay=0.1)
    >>> params, opt_state = lowmem.init(tx, params)
    >>> params, opt_state = lowmem.step(tx, grads, opt_state, params)

  References:
    [Decoupled Weight Decay Regularization](https://arxiv.org/abs/1711.05101);
    [Memory Efficient Mixed-Precision Optimizers](https://arxiv.org/abs/2309.12381);
    [8-bit Optimizers via Block-wise Quantization](https://arxiv.org/abs/2110.02861)
  """
  formats = {"mu": first_format(mu, mu_dtype, "mu"), "nu": nu}

  def make(mask):
    return optax.adamw(
      learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
    )

  fold = _adam_fold(b1, b2, nesterov)
  optimizer = Optimizer(make, mask, implementation, fold)
  return _half(optimizer, weights, formats, key, update_dtype)


def adam(
  learning_rate: optax.ScalarOrSchedule,
  b1: Array = 0.9,
  b2: Array = 0.999,
  eps: Array = 1e-8,
  eps_root: Array = 0.0,
  mu_dtype: Any | None = None,
  *,
  nesterov: bool = False,
  weights: Weights = "bf16+8",
  mu: Name = DEFAULT,
  nu: Name = "int8",
  key: Array = 0,
  update_dtype: Any = jnp.float32,
  implementation: Implementation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """`optax.adam` in 5.13 bytes a parameter: weight, residual and both moments.

  Args:
    learning_rate: a float, a traced array or a schedule.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    eps_root: added to the second moment under the root.
    mu_dtype: Optax's dtype of the first moment, in the place of mu.
    nesterov: whether to use Nesterov momentum.
    weights: formats of the weights, as `delta_bits` takes them.
    mu: format of the first moment: "fp32", "bf16", "fp16" or "int8".
    nu: format of the second moment.
    key: an integer seed or a `jax.random` key for stochastic rounding.
    update_dtype: as `delta_bits` takes it.
    implementation: of `lowmem.step`: None, "xla" or "mosaic_gpu", as
      `pallas_kernels.fused_update` takes it.

  Returns:
    A transformation; use it with `lowmem.init` and `lowmem.step`.

  Raises:
    ValueError: for an unknown format, or if mu and mu_dtype are both given.

  Examples:
    >>> tx = lowmem.adam(1e-3, weights="fp16+8", mu="bf16", nu="bf16")

  References:
    [Adam](https://arxiv.org/abs/1412.6980);
    [Memory Efficient Mixed-Precision Optimizers](https://arxiv.org/abs/2309.12381);
    [8-bit Optimizers via Block-wise Quantization](https://arxiv.org/abs/2110.02861)
  """
  formats = {"mu": first_format(mu, mu_dtype, "mu"), "nu": nu}

  def make(mask):
    del mask  # there is no weight decay
    return optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)

  fold = _adam_fold(b1, b2, nesterov)
  optimizer = Optimizer(make, None, implementation, fold)
  return _half(optimizer, weights, formats, key, update_dtype)


def lion(
  learning_rate: optax.ScalarOrSchedule,
  b1: Array = 0.9,
  b2: Array = 0.99,
  mu_dtype: Any | None = None,
  weight_decay: optax.ScalarOrSchedule = 1e-3,
  mask: Any | None = None,
  *,
  weights: Weights = "bf16+8",
  mu: Name = DEFAULT,
  key: Array = 0,
  update_dtype: Any = jnp.float32,
  implementation: Implementation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """`optax.lion` in 4.07 bytes a parameter: weight, residual and momentum.

  Args:
    learning_rate: a float, a traced array or a schedule.
    b1: decay of the momentum that the update's sign is taken of.
    b2: decay of the momentum that is kept.
    mu_dtype: Optax's dtype of the momentum, in the place of mu.
    weight_decay: decoupled weight decay, multiplied by the learning rate.
    mask: which parameters decay: a tree of bools, or a callable of params.
    weights: formats of the weights, as `delta_bits` takes them.
    mu: format of the momentum: "fp32", "bf16", "fp16" or "int8".
    key: an integer seed or a `jax.random` key for stochastic rounding.
    update_dtype: as `delta_bits` takes it.
    implementation: of `lowmem.step`: None, "xla" or "mosaic_gpu", as
      `pallas_kernels.fused_update` takes it.

  Returns:
    A transformation; use it with `lowmem.init` and `lowmem.step`.

  Raises:
    ValueError: for an unknown format, or if mu and mu_dtype are both given.

  Examples:
    >>> tx = lowmem.lion(1e-4)

  References:
    [Symbolic Discovery of Optimization Algorithms](https://arxiv.org/abs/2302.06675);
    [Memory Efficient Mixed-Precision Optimizers](https://arxiv.org/abs/2309.12381)
  """
  formats = {"mu": first_format(mu, mu_dtype, "mu")}

  def make(mask):
    return optax.lion(learning_rate, b1, b2, mu_dtype, weight_decay, mask)

  fold = "lion's update is the sign of a sum in which the momentum does not occur as it is kept"
  optimizer = Optimizer(make, mask, implementation, fold)
  return _half(optimizer, weights, formats, key, update_dtype)


def sgd(
  learning_rate: optax.ScalarOrSchedule,
  momentum: Array | None = None,
  nesterov: bool = False,
  accumulator_dtype: Any | None = None,
  *,
  weights: Weights = "bf16+8",
  accumulator: Name = DEFAULT,
  key: Array = 0,
  update_dtype: Any = jnp.float32,
  implementation: Implementation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """`optax.sgd` in 4.07 bytes a parameter (3 without momentum).

  Args:
    learning_rate: a float, a traced array or a schedule.
    momentum: decay of the accumulator; None for none.
    nesterov: whether to use Nesterov momentum.
    accumulator_dtype: Optax's dtype of the accumulator, in the place of accumulator.
    weights: formats of the weights, as `delta_bits` takes them.
    accumulator: format of the accumulator: "fp32", "bf16", "fp16" or "int8".
    key: an integer seed or a `jax.random` key for stochastic rounding.
    update_dtype: as `delta_bits` takes it.
    implementation: of `lowmem.step`: None, "xla" or "mosaic_gpu", as
      `pallas_kernels.fused_update` takes it.

  Returns:
    A transformation; use it with `lowmem.init` and `lowmem.step`.

  Raises:
    ValueError: for an unknown format, or if accumulator and accumulator_dtype
      are both given.

  Examples:
    >>> tx = lowmem.sgd(0.1, momentum=0.9)

  References:
    [On the importance of initialization and momentum in deep
    learning](http://proceedings.mlr.press/v28/sutskever13.pdf);
    [Memory Efficient Mixed-Precision Optimizers](https://arxiv.org/abs/2309.12381)
  """
  formats = {"trace": first_format(accumulator, accumulator_dtype, "accumulator")}

  def make(mask):
    del mask  # there is no weight decay
    return optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)

  optimizer = Optimizer(make, None, implementation, _sgd_fold(momentum, nesterov))
  return _half(optimizer, weights, formats, key, update_dtype)


def _half(optimizer: Optimizer, weights: Weights, formats, key, update_dtype):
  """`delta_bits(quantize_state(optimizer))`; formats are the statistics', by field."""
  implementations.check_name(optimizer.implementation)
  inner = quantize(
    optimizer.make(optimizer.mask), formats, "bf16", key, only_held=True, starts_at_zero=True
  )
  return delta_bits_of(inner, weights, key, update_dtype, optimizer)


def _adam_fold(b1, b2, nesterov: bool) -> Fold | str:
  """What a micro-batch adds to Adam's moments, which decay only when the last one comes (AdamA)."""
  if nesterov:
    return "with nesterov=True the update needs the whole gradient besides the moments"
  if any(not isinstance(b, jax.core.Tracer) and b == 0 for b in (b1, b2)):
    return "a moment with b1=0 or b2=0 keeps nothing of earlier micro-batches"

  def fold(field: str, x, g):
    return x + (1 - b1) / b1 * g if field == "mu" else x + (1 - b2) / b2 * (g * g)

  return fold


def _sgd_fold(momentum, nesterov: bool) -> Fold | str:
  """What a micro-batch adds to SGD's accumulator, which decays when the last one comes."""
  is_zero = momentum is not None and not isinstance(momentum, jax.core.Tracer) and momentum == 0
  if momentum is None or nesterov or is_zero:
    return "the update of SGD needs the whole gradient, except with momentum and nesterov=False"
  return lambda field, x, g: x + g / momentum
