"""The Flax NNX optimizer, ``lowmem.nnx.Optimizer``."""

from typing import Literal

from flax import nnx
from flax.nnx import filterlib
from flax.nnx.training.optimizer import to_opt_state
import jax
import optax

from optax_lowmem import api
from optax_lowmem.states import DeltaBitsState
from optax_lowmem.transforms import loss_scaling
from optax_lowmem.trees import nnx_variables, pytrees


class Optimizer(nnx.Optimizer):
  """A ``flax.nnx.Optimizer`` with low-memory parameters.

  The constructor converts the model's float32 parameters to their formats, in
  place. ``update`` is one :func:`optax_lowmem.step`. It updates the buffers in
  place if ``nnx.jit`` donates model and optimizer
  (``donate_argnames=("model", "optimizer")``). Code that takes a
  ``flax.nnx.Optimizer`` takes this one.

  Attributes:
    step: the number of calls of ``update``, skipped steps included.
    tx: the transformation, with the loss scale if one was requested.
    opt_state: its state: moments, residuals, loss scale. Each array is a
      variable with the sharding metadata of its parameter.
    wrt: the filter of the parameters.

  Examples:
    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> model = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
    >>> optimizer = lowmem.nnx.Optimizer(model, lowmem.adamw(1e-3), wrt=nnx.Param)
    >>> def train_step(model, optimizer, x):
    ...   grads = nnx.grad(lambda model: optimizer.scale_loss(model(x).mean()))(model)
    ...   optimizer.update(model, grads)
    >>> train_step = nnx.jit(train_step, donate_argnames=("model", "optimizer"))
    >>> train_step(model, optimizer, jnp.ones((1, 32)))
    >>> print(model.kernel.dtype, optimizer.step[...])
    bfloat16 1
  """

  def __init__(
    self,
    model,
    tx: optax.GradientTransformation,
    wrt: filterlib.Filter = nnx.Param,
    loss_scale: Literal["dynamic"] | float | None = None,
    *,
    graph: bool | None = None,
  ):
    """Converts the model's float32 parameters and creates the optimizer state.

    Args:
      model: an NNX module; its parameters are converted in place.
      tx: a transformation that contains one of optax_lowmem.
      wrt: the filter of the parameters, the same as for ``nnx.grad``.
      loss_scale: the loss scale to wrap around tx: None, ``"dynamic"``
        (:func:`optax_lowmem.dynamic_loss_scale` with its defaults), or a number
        (:func:`optax_lowmem.static_loss_scale`).
      graph: Flax's graph mode (True) or tree mode (False); None for the current
        one.

    Raises:
      ValueError: if tx contains nothing of optax_lowmem, if loss_scale is not
        positive and finite, if tx already has a loss scale, or if a member of tx
        behind one of optax_lowmem would change its updates (the message names
        the member; see :func:`optax_lowmem.init`).
      TypeError: if loss_scale is not a number.
    """
    tx = loss_scaling.with_loss_scale(tx, loss_scale)
    super().__init__(model, optax.identity(), wrt=wrt, graph=graph)
    variables = nnx.state(model, wrt, graph=graph)
    params = nnx.as_pure(variables)
    params, opt_state = api.init_ours(tx, params)
    self.tx = tx
    self.opt_state = nnx.data(to_opt_state(nnx_variables.annotate(opt_state, variables)))
    nnx.update(model, params)

  def update(self, model, grads, /, **kwargs) -> None:
    """Takes one step, in place under donation; see :func:`optax_lowmem.step`.

    Args:
      model: the model, whose parameters are replaced.
      grads: gradients from ``nnx.grad``; of the scaled loss if there is a loss
        scale.
      **kwargs: extra arguments of ``tx.update``.

    Raises:
      ValueError: if grads do not match the parameters. The message names the
        leaf.
    """
    params, grads = (nnx.as_pure(nnx.state(x, self.wrt, graph=self.graph)) for x in (model, grads))
    params, opt_state = api.step(self.tx, grads, self._pure, params, **nnx.as_pure(kwargs))
    nnx.update(model, params)
    nnx.update(self.opt_state, nnx.state(opt_state, graph=self.graph))
    self.step[...] += 1

  @property
  def residuals(self) -> nnx.State:
    """The packed residuals of the parameters that have one."""
    residuals = [state.residuals for state in pytrees.find_states(self._pure, DeltaBitsState)]
    flat = [pair for tree in residuals for pair in nnx.to_flat_state(tree)]
    return nnx.from_flat_state([(path, x) for path, x in flat if jax.tree.leaves(x)])

  @property
  def loss_scale(self) -> jax.Array:
    """The loss scale, a float32 scalar; 1.0 if there is none."""
    return loss_scaling.loss_scale(self._pure)

  def scale_loss(self, loss: jax.typing.ArrayLike) -> jax.Array:
    """Multiplies the loss by the loss scale; differentiate the result.

    Args:
      loss: the loss, a scalar.

    Returns:
      The scaled loss, a float32 scalar.
    """
    return loss_scaling.scale_loss(loss, self._pure)

  def master_params(self, model) -> nnx.State:
    """Merges weights and residuals, to evaluate or to export the model.

    Args:
      model: the model.

    Returns:
      The parameters as an ``nnx.State`` of variables, with float32 masters for
      leaves with a format.
    """
    variables = nnx.state(model, self.wrt, graph=self.graph)
    masters = api.master_params(nnx.as_pure(variables), self._pure)
    return nnx_variables.like(variables, masters)

  @property
  def _pure(self):
    return nnx.as_pure(self.opt_state)
