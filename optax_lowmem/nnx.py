"""The Flax NNX optimizer: `lowmem.nnx.Optimizer`."""

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
  """`flax.nnx.Optimizer` with low-memory parameters.

  Making it converts the model's float32 parameters to their formats, in place.
  `update` is one `lowmem.step`; under `nnx.jit` with both donated
  (`donate_argnames=("model", "optimizer")`) it is in place, too. Whatever
  takes a `flax.nnx.Optimizer` takes this one.

  Attributes:
    step: calls of `update` so far; a skipped step counts, too.
    tx: the transformation, with the loss scale if one was asked for.
    opt_state: its state: moments, residuals, loss scale. Each array is a
      variable with its parameter's sharding metadata.
    wrt: the filter of the parameters.

  Examples:
    >>> optimizer = lowmem.nnx.Optimizer(model, lowmem.adamw(1e-3), wrt=nnx.Param)
    >>> @nnx.jit(donate_argnames=("model", "optimizer"))
    ... def train_step(model, optimizer, batch):
    ...   grads = nnx.grad(lambda model: optimizer.scale_loss(loss_fn(model, batch)))(model)
    ...   optimizer.update(model, grads)
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
    """Converts the model's float32 parameters and makes the optimizer state.

    Args:
      model: an NNX module; its parameters are converted in place.
      tx: a transformation with one of optax_lowmem in it.
      wrt: filter of the parameters, the one that `nnx.grad` gets.
      loss_scale: None, "dynamic" (`dynamic_loss_scale` with its defaults), or a
        number (`static_loss_scale`); wraps tx.
      graph: Flax's graph or tree mode; None for the current one.

    Raises:
      ValueError: if tx has nothing of optax_lowmem in it, if loss_scale is not
        positive and finite, if tx has a loss scale already, or if a member that
        stands behind one of optax_lowmem does anything with its updates (it is
        named; see `lowmem.init`).
      TypeError: if loss_scale is no number.
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
    """One step in place: see `lowmem.step`. There are no updates to return.

    Args:
      model: the model; weights and residuals are written at once.
      grads: gradients from `nnx.grad`, scaled where there is a loss scale.
      **kwargs: extra arguments of `tx.update`.
    """
    params, grads = (nnx.as_pure(nnx.state(x, self.wrt, graph=self.graph)) for x in (model, grads))
    params, opt_state = api.step(self.tx, grads, self._pure, params, **nnx.as_pure(kwargs))
    nnx.update(model, params)
    nnx.update(self.opt_state, nnx.state(opt_state, graph=self.graph))
    self.step[...] += 1

  @property
  def residuals(self) -> nnx.State:
    """The packed residuals of the parameters that have any."""
    residuals = [state.residuals for state in pytrees.find_states(self._pure, DeltaBitsState)]
    flat = [pair for tree in residuals for pair in nnx.to_flat_state(tree)]
    return nnx.from_flat_state([(path, x) for path, x in flat if jax.tree.leaves(x)])

  @property
  def loss_scale(self) -> jax.Array:
    """The loss scale, float32; 1.0 where there is none."""
    return loss_scaling.loss_scale(self._pure)

  def scale_loss(self, loss: jax.typing.ArrayLike) -> jax.Array:
    """The loss in float32, times the loss scale: what to differentiate."""
    return loss_scaling.scale_loss(loss, self._pure)

  def master_params(self, model) -> nnx.State:
    """The model's parameters as float32 master weights, to evaluate or to export."""
    variables = nnx.state(model, self.wrt, graph=self.graph)
    masters = api.master_params(nnx.as_pure(variables), self._pure)
    return nnx_variables.like(variables, masters)

  @property
  def _pure(self):
    return nnx.as_pure(self.opt_state)
