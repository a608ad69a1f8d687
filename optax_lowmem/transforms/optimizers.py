"""adamw, adam, lion and sgd: Optax's optimizers, with weights and statistics in few bits.

Each is ``delta_bits(quantize_state(optax.X(...)))``, declared elementwise. The
mathematics is Optax's. Parameters without a weight format keep Optax's own behaviour,
including their statistics.
"""

from typing import Any

import jax
import optax

from optax_lowmem.engine.optimizer import Fold, Optimizer
from optax_lowmem.transforms.delta_bits import Weights, delta_bits
from optax_lowmem.transforms.quantize_state import DEFAULT, first_format, quantize
from pallas_kernels.formats.state_formats import Name
from pallas_kernels.placement import implementations
from pallas_kernels.placement.implementations import Implementation

Array = jax.typing.ArrayLike
# `jnp.float32` can be called, so `optax.inject_hyperparams` would take it for a schedule.
FLOAT32 = "float32"


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
  update_dtype: Any = FLOAT32,
  implementation: Implementation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """``optax.adamw`` in 5.13 bytes a parameter: weight, residual and both moments.

  Optax's arguments come first, with Optax's defaults.

  Args:
    learning_rate: a float, a traced scalar or a schedule.
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    eps: added to the square root of the second moment.
    eps_root: added to the second moment under the square root.
    mu_dtype: Optax's dtype for the first moment, instead of ``mu``.
    weight_decay: decoupled weight decay, multiplied by the learning rate.
    mask: which parameters decay: a tree of bools, or a callable from params to
      one.
    nesterov: whether to use Nesterov momentum.
    weights: the formats of the weights, as in :func:`optax_lowmem.delta_bits`.
    mu: the format of the first moment: ``"fp32"``, ``"bf16"``, ``"fp16"``, ``"int8"``
      or ``"int4"``.
    nu: the format of the second moment.
    key: an integer seed or a ``jax.random`` key for stochastic rounding.
    update_dtype: the dtype of the updates, as in :func:`optax_lowmem.delta_bits`.
    implementation: None, ``"xla"``, ``"mosaic_gpu"`` or ``"mosaic_tpu"``, as in
      :func:`pallas_kernels.fused_update`.

  Returns:
    A transformation. Use it with :func:`optax_lowmem.init` and
    :func:`optax_lowmem.step`.

  Raises:
    ValueError: if a format or the implementation is unknown, or if both ``mu``
      and ``mu_dtype`` are given.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.adamw(3e-4, weight_decay=0.1)
    >>> params, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
    >>> grads = {"w": jnp.ones((4, 32), jnp.bfloat16)}
    >>> params, opt_state = lowmem.step(tx, grads, opt_state, params)
    >>> print(opt_state.step, params["w"].dtype, opt_state.residuals["w"].dtype)
    1 bfloat16 int8

  References:
    `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`__

    `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`__

    `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`__
  """
  formats = {"mu": first_format(mu, mu_dtype, "mu"), "nu": first_format(nu, None, "nu")}

  def make(mask):
    return optax.adamw(
      learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
    )

  fold = average_fold({"mu": b1, "nu": b2}, nesterov)
  optimizer = Optimizer(make, mask, implementation, fold)
  return in_few_bits(optimizer, weights, formats, key, update_dtype)


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
  update_dtype: Any = FLOAT32,
  implementation: Implementation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """``optax.adam`` in 5.13 bytes a parameter: weight, residual and both moments.

  Args:
    learning_rate: a float, a traced scalar or a schedule.
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    eps: added to the square root of the second moment.
    eps_root: added to the second moment under the square root.
    mu_dtype: Optax's dtype for the first moment, instead of ``mu``.
    nesterov: whether to use Nesterov momentum.
    weights: as in :func:`optax_lowmem.adamw`.
    mu: as in :func:`optax_lowmem.adamw`.
    nu: as in :func:`optax_lowmem.adamw`.
    key: as in :func:`optax_lowmem.adamw`.
    update_dtype: as in :func:`optax_lowmem.adamw`.
    implementation: as in :func:`optax_lowmem.adamw`.

  Returns:
    A transformation. Use it with :func:`optax_lowmem.init` and
    :func:`optax_lowmem.step`.

  Raises:
    ValueError: if a format or the implementation is unknown, or if both ``mu``
      and ``mu_dtype`` are given.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.adam(1e-3, weights="fp16+8", mu="bf16", nu="bf16")
    >>> params, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
    >>> grads = {"w": jnp.ones((4, 32), jnp.float16)}
    >>> params, opt_state = lowmem.step(tx, grads, opt_state, params)
    >>> print(opt_state.step, params["w"].dtype)
    1 float16

  References:
    `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`__

    `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`__

    `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`__
  """
  formats = {"mu": first_format(mu, mu_dtype, "mu"), "nu": first_format(nu, None, "nu")}

  def make(mask):
    del mask  # there is no weight decay
    return optax.adam(learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)

  fold = average_fold({"mu": b1, "nu": b2}, nesterov)
  optimizer = Optimizer(make, None, implementation, fold)
  return in_few_bits(optimizer, weights, formats, key, update_dtype)


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
  update_dtype: Any = FLOAT32,
  implementation: Implementation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """``optax.lion`` in 4.07 bytes a parameter: weight, residual and momentum.

  Args:
    learning_rate: a float, a traced scalar or a schedule.
    b1: decay rate of the average whose sign is the update.
    b2: decay rate of the stored momentum.
    mu_dtype: Optax's dtype for the momentum, instead of ``mu``.
    weight_decay: decoupled weight decay, multiplied by the learning rate.
    mask: as in :func:`optax_lowmem.adamw`.
    weights: as in :func:`optax_lowmem.adamw`.
    mu: the format of the momentum: ``"fp32"``, ``"bf16"``, ``"fp16"``, ``"int8"``
      or ``"int4"``.
    key: as in :func:`optax_lowmem.adamw`.
    update_dtype: as in :func:`optax_lowmem.adamw`.
    implementation: as in :func:`optax_lowmem.adamw`.

  Returns:
    A transformation. Use it with :func:`optax_lowmem.init` and
    :func:`optax_lowmem.step`.

  Raises:
    ValueError: if a format or the implementation is unknown, or if both ``mu``
      and ``mu_dtype`` are given.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.lion(1e-4)
    >>> params, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
    >>> grads = {"w": jnp.ones((4, 32), jnp.bfloat16)}
    >>> params, opt_state = lowmem.step(tx, grads, opt_state, params)
    >>> print(opt_state.step, params["w"].dtype)
    1 bfloat16

  References:
    `Symbolic Discovery of Optimization Algorithms
    <https://arxiv.org/abs/2302.06675>`__

    `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`__
  """
  formats = {"mu": first_format(mu, mu_dtype, "mu")}

  def make(mask):
    return optax.lion(learning_rate, b1, b2, mu_dtype, weight_decay, mask)

  fold = "lion's update averages with b1, but the momentum that it stores averages with b2"
  optimizer = Optimizer(make, mask, implementation, fold)
  return in_few_bits(optimizer, weights, formats, key, update_dtype)


def sgd(
  learning_rate: optax.ScalarOrSchedule,
  momentum: Array | None = None,
  nesterov: bool = False,
  accumulator_dtype: Any | None = None,
  *,
  weights: Weights = "bf16+8",
  accumulator: Name = DEFAULT,
  key: Array = 0,
  update_dtype: Any = FLOAT32,
  implementation: Implementation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """``optax.sgd`` in 4.07 bytes a parameter (3 without momentum).

  Args:
    learning_rate: a float, a traced scalar or a schedule.
    momentum: decay rate of the accumulator; None keeps no accumulator.
    nesterov: whether to use Nesterov momentum.
    accumulator_dtype: Optax's dtype for the accumulator, instead of
      ``accumulator``.
    weights: as in :func:`optax_lowmem.adamw`.
    accumulator: the format of the accumulator: ``"fp32"``, ``"bf16"``, ``"fp16"``,
      ``"int8"`` or ``"int4"``.
    key: as in :func:`optax_lowmem.adamw`.
    update_dtype: as in :func:`optax_lowmem.adamw`.
    implementation: as in :func:`optax_lowmem.adamw`.

  Returns:
    A transformation. Use it with :func:`optax_lowmem.init` and
    :func:`optax_lowmem.step`.

  Raises:
    ValueError: if a format or the implementation is unknown, or if both ``accumulator``
      and ``accumulator_dtype`` are given.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.sgd(0.1, momentum=0.9)
    >>> params, opt_state = lowmem.init(tx, {"w": jnp.ones((4, 32))})
    >>> grads = {"w": jnp.ones((4, 32), jnp.bfloat16)}
    >>> params, opt_state = lowmem.step(tx, grads, opt_state, params)
    >>> print(opt_state.step, params["w"].dtype)
    1 bfloat16

  References:
    `On the importance of initialization and momentum in deep learning
    <http://proceedings.mlr.press/v28/sutskever13.pdf>`__

    `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`__
  """
  formats = {"trace": first_format(accumulator, accumulator_dtype, "accumulator")}

  def make(mask):
    del mask  # there is no weight decay
    return optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)

  optimizer = Optimizer(make, None, implementation, _sgd_fold(momentum, nesterov))
  return in_few_bits(optimizer, weights, formats, key, update_dtype)


def in_few_bits(optimizer: Optimizer, weights: Weights, formats, key, update_dtype):
  """``delta_bits(quantize_state(optimizer))``; formats are the statistics', by field."""
  implementations.check_name(optimizer.implementation)
  inner = quantize(
    optimizer.make(optimizer.mask), formats, "bf16", key, only_held=True, starts_at_zero=True
  )
  return delta_bits(inner, weights, key=key, update_dtype=update_dtype, elementwise=optimizer)


def average_fold(decays: dict[str, Any], nesterov: bool) -> Fold | str:
  """How a micro-batch enters averages, which decay only at the last one (AdamA).

  Args:
    decays: the decay rates by field; ``"nu"`` averages squares.
    nesterov: whether the update looks one step ahead.

  Returns:
    The function, or the reason why there is none.
  """
  if nesterov:
    return "with nesterov=True, the update also needs the gradient of the whole batch"
  if any(not isinstance(b, jax.core.Tracer) and b == 0 for b in decays.values()):
    return "with a decay rate of 0, a moment keeps nothing of earlier micro-batches"

  def fold(field: str, x, g):
    b = decays[field]
    return x + (1 - b) / b * (g * g if field == "nu" else g)

  return fold


def _sgd_fold(momentum, nesterov: bool) -> Fold | str:
  """How a micro-batch enters SGD's accumulator, which decays only at the last one."""
  is_zero = momentum is not None and not isinstance(momentum, jax.core.Tracer) and momentum == 0
  if momentum is None or nesterov or is_zero:
    return "SGD needs the gradient of the whole batch, except with momentum and nesterov=False"
  return lambda field, x, g: x + g / momentum
