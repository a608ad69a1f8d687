"""A Flax TrainState with half-precision parameters."""

from typing import Any, Literal, Self

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
import jax

from optax_lowmem import api
from optax_lowmem.transforms import loss_scaling


class TrainState(train_state.TrainState):
  """A ``flax.training.train_state.TrainState`` with low-memory parameters.

  It has Flax's own five fields, so code that takes a Flax TrainState takes this
  one. ``residuals`` and ``loss_scale`` are views into ``opt_state``.

  Attributes:
    step: the number of calls of ``apply_gradients``, skipped steps included.
    apply_fn: usually ``model.apply``.
    params: the parameters, in their formats.
    tx: the transformation, with the loss scale if ``create`` added one.
    opt_state: its state: moments, residuals, loss scale.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> import optax_lowmem as lowmem
    >>> state = lowmem.TrainState.create(
    ...     apply_fn=lambda variables, x: x @ variables["params"]["w"],
    ...     params={"w": jnp.ones((32, 32))}, loss_scale="dynamic",
    ...     tx=lowmem.delta_bits(optax.adamw(1e-3), "fp16+8"))
    >>> loss_fn = lambda params: state.apply_fn({"params": params}, jnp.ones(32)).mean()
    >>> grads = jax.grad(lambda params: state.scale_loss(loss_fn(params)))(state.params)
    >>> state = state.apply_gradients(grads=grads)
    >>> print(state.params["w"].dtype, state.step, state.loss_scale)
    float16 1 32768.0
  """

  @classmethod
  def create(
    cls,
    *,
    apply_fn,
    params,
    tx,
    loss_scale: Literal["dynamic"] | float | None = None,
    **kwargs,
  ) -> Self:
    """Converts float32 parameters to their formats and creates the state.

    Args:
      apply_fn: usually ``model.apply``.
      params: float32 parameters.
      tx: a transformation that contains one of optax_lowmem.
      loss_scale: the loss scale to wrap around tx: None, ``"dynamic"``
        (:func:`optax_lowmem.dynamic_loss_scale` with its defaults), or a number
        (:func:`optax_lowmem.static_loss_scale`).
      **kwargs: the fields that a subclass adds.

    Returns:
      The state at step 0.

    Raises:
      ValueError: if tx contains nothing of optax_lowmem, if loss_scale is not
        positive and finite, if tx already has a loss scale, or if a member of tx
        behind one of optax_lowmem would change its updates (the message names
        the member; see :func:`optax_lowmem.init`).
      TypeError: if loss_scale is not a number.
    """
    tx = loss_scaling.with_loss_scale(tx, loss_scale)
    has_overwritten = not isinstance(params, jax.Array) and OVERWRITE_WITH_GRADIENT in params
    optimized = params["params"] if has_overwritten else params
    optimized, opt_state = api.init_ours(tx, optimized)
    params = {**params, "params": optimized} if has_overwritten else optimized
    return cls(step=0, apply_fn=apply_fn, params=params, tx=tx, opt_state=opt_state, **kwargs)

  def apply_gradients(self, *, grads, **kwargs) -> Self:
    """Takes one step, in place under donation; see :func:`optax_lowmem.step`.

    Args:
      grads: gradients of the loss; of the scaled loss if there is a loss scale.
      **kwargs: fields to replace, as in Flax.

    Returns:
      The next state.
    """
    if OVERWRITE_WITH_GRADIENT in grads:
      optimized, opt_state = api.step(
        self.tx, grads["params"], self.opt_state, self.params["params"]
      )
      params: Any = {
        "params": optimized,
        OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT],
      }
    else:
      params, opt_state = api.step(self.tx, grads, self.opt_state, self.params)
    return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)

  @property
  def residuals(self):
    """The packed residuals, in the tree of params; None for a leaf without one."""
    return api.residuals(self._optimized, self.opt_state)

  @property
  def loss_scale(self) -> jax.Array:
    """The loss scale, a float32 scalar; 1.0 if there is none."""
    return loss_scaling.loss_scale(self.opt_state)

  def scale_loss(self, loss: jax.typing.ArrayLike) -> jax.Array:
    """Multiplies the loss by the loss scale; differentiate the result.

    Args:
      loss: the loss, a scalar.

    Returns:
      The scaled loss, a float32 scalar.
    """
    return loss_scaling.scale_loss(loss, self.opt_state)

  def master_params(self):
    """Merges weights and residuals; see :func:`optax_lowmem.master_params`.

    Returns:
      The tree of params, with float32 masters for leaves with a format.
    """
    masters = api.master_params(self._optimized, self.opt_state)
    return masters if self._optimized is self.params else {**self.params, "params": masters}

  @property
  def _optimized(self):
    if not isinstance(self.params, jax.Array) and OVERWRITE_WITH_GRADIENT in self.params:
      return self.params["params"]
    return self.params
