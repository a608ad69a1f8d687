"""A Flax TrainState whose parameters are half precision."""

from typing import Any, Literal, Self

from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
import jax

from optax_lowmem import api
from optax_lowmem.transforms import loss_scaling


class TrainState(train_state.TrainState):
  """`flax.training.train_state.TrainState` with low-memory parameters.

  The state is Flax's own five fields; whatever takes a Flax TrainState takes
  this one. What is added are views into `opt_state`.

  Attributes:
    step: calls of `apply_gradients` so far; a skipped step counts, too.
    apply_fn: usually `model.apply`.
    params: the parameters, half precision where they have such a format.
    tx: the transformation, with the loss scale if `create` added one.
    opt_state: its state: moments, residuals, loss scale.

  Examples:
    >>> state = lowmem.TrainState.create(
    ...     apply_fn=model.apply, params=params, loss_scale="dynamic",
    ...     tx=lowmem.delta_bits(optax.adamw(1e-3), "fp16+8"))
    >>> grads = jax.grad(lambda p: state.scale_loss(loss_fn(p)))(state.params)
    >>> state = state.apply_gradients(grads=grads)
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
    """Converts float32 parameters to their formats and makes the state.

    Args:
      apply_fn: usually `model.apply`.
      params: float32 parameters.
      tx: a transformation with one of optax_lowmem in it.
      loss_scale: None, "dynamic" (`dynamic_loss_scale` with its defaults), or a
        number (`static_loss_scale`); wraps tx.
      **kwargs: the fields that a subclass adds.

    Returns:
      The state at step 0.

    Raises:
      ValueError: if tx has nothing of optax_lowmem in it, if loss_scale is not
        positive and finite, if tx has a loss scale already, or if a member that
        stands behind one of optax_lowmem does anything with its updates (it is
        named; see `lowmem.init`).
      TypeError: if loss_scale is no number.
    """
    tx = loss_scaling.with_loss_scale(tx, loss_scale)
    has_overwritten = not isinstance(params, jax.Array) and OVERWRITE_WITH_GRADIENT in params
    optimized = params["params"] if has_overwritten else params
    optimized, opt_state = api.init_ours(tx, optimized)
    params = {**params, "params": optimized} if has_overwritten else optimized
    return cls(step=0, apply_fn=apply_fn, params=params, tx=tx, opt_state=opt_state, **kwargs)

  def apply_gradients(self, *, grads, **kwargs) -> Self:
    """One step in place: see `lowmem.step`.

    Args:
      grads: gradients of the loss, scaled where there is a loss scale.
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
    """The packed residuals, in the tree of params; None where a leaf has none."""
    return api.residuals(self._optimized, self.opt_state)

  @property
  def loss_scale(self) -> jax.Array:
    """The loss scale, float32; 1.0 where there is none."""
    return loss_scaling.loss_scale(self.opt_state)

  def scale_loss(self, loss: jax.typing.ArrayLike) -> jax.Array:
    """The loss in float32, times the loss scale: what to differentiate."""
    return loss_scaling.scale_loss(loss, self.opt_state)

  def master_params(self):
    """The parameters as float32 master weights."""
    masters = api.master_params(self._optimized, self.opt_state)
    return masters if self._optimized is self.params else {**self.params, "params": masters}

  @property
  def _optimized(self):
    if not isinstance(self.params, jax.Array) and OVERWRITE_WITH_GRADIENT in self.params:
      return self.params["params"]
    return self.params
