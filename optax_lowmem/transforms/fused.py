"""The in-place path of adamw, adam, lion and sgd: a leaf's step in one operation.

`delta_bits(quantize_state(optax.X))` makes the state, and does what this path
does not: statistics that Optax stores in its own way (`mu_dtype`), and
`tx.update` where all of them are float32, with Optax's own bits.
"""

import jax
import jax.numpy as jnp
import optax

from optax_lowmem.engine import landing, sessions
from optax_lowmem.engine.leaf_steps import Gradient, LeafSteps, Optimizer
from optax_lowmem.transforms.delta_bits import Weights, delta_bits
from optax_lowmem.transforms.quantize_state import quantize
from optax_lowmem.trees import nnx_variables, pytrees
from pallas_kernels.formats import arithmetic
from pallas_kernels.placement import implementations


def fused(
  optimizer: Optimizer, weights: Weights, formats: dict[str, str | None], key
) -> optax.GradientTransformationExtraArgs:
  """`delta_bits(quantize_state(optimizer))` with a step of its own.

  Args:
    optimizer: Optax's, which is elementwise.
    weights: formats of the weights, as `delta_bits` takes them.
    formats: formats of the statistics by field, as `quantize` takes them.
    key: an integer seed or a `jax.random` key.

  Returns:
    The transformation.
  """
  implementation = optimizer.implementation
  implementations.check_name(implementation)
  inner = quantize(
    optimizer.make(optimizer.mask), formats, "bf16", key, only_held=True, starts_at_zero=True
  )
  composed = delta_bits(inner, weights, key=key)

  def update_fn(updates, state, params=None, **extra_args):
    if landing.is_checking():
      return composed.update(updates, state, params, **extra_args)
    session = sessions.current(sessions.StepSession)
    if not LeafSteps.can_step(state, params):
      if session is not None and implementation == "mosaic_gpu":
        raise ValueError(
          'implementation="mosaic_gpu" takes statistics in formats of ours; give mu= or'
          " accumulator= in the place of mu_dtype or accumulator_dtype."
        )
      return composed.update(updates, state, params, **extra_args)
    pytrees.check_gradients(updates, params)
    steps = LeafSteps(optimizer, state, params, updates)
    if session is None and not steps.has_narrow_statistics:  # Optax's own bits
      return composed.update(updates, state, params, **extra_args)
    rest_updates, rest = steps.step_rest(updates)
    gradients = pytrees.named_leaves(updates)
    scaled = {} if session is None else session.scaled
    total = sum(jnp.size(gradients[name]) for name in steps.held.by_name)

    def source(name) -> Gradient:
      """The gradient to read, and what it is to be multiplied by there."""
      g = gradients[name]
      _, before, factor = scaled.get(id(g), (g, g, None))
      g, factor = (before, factor) if jnp.result_type(before).itemsize <= 4 else (g, None)
      # What a member in front computes (clipping) XLA fuses into its own passes; for a kernel it
      # writes a copy of the leaf's gradient, which must be a small part of all gradients.
      is_copied = session is not None and id(g) not in session.given and jnp.size(g) * 16 > total
      how = "xla" if implementation is None and is_copied else implementation
      return Gradient(jnp.asarray(g), factor, how)

    sources = {name: source(name) for name in steps.held.by_name}
    if session is None:
      stored = steps.step(steps.stored, sources, lands=True)
      new = {name: _landing(steps.stored[name].low, x.low) for name, x in stored.items()}
    else:
      stored = steps.step(steps.stored, sources, session.taken)
      if session.taken is not None:
        session.settled(list(stored.values()))
      new = {name: sessions.Landed(x.low, session) for name, x in stored.items()}
    updates_by_name = pytrees.named_leaves(rest_updates)
    new_updates = pytrees.map_named((updates_by_name | new).get, updates)
    return new_updates, steps.state(stored, rest)

  update_fn.optimizer = optimizer  # type: ignore[attr-defined] # what gradient release asks for
  return nnx_variables.transformation(composed.init, update_fn)


# Under jit, so that leaves of one shape are traced once.
_landing = jax.jit(arithmetic.landing_update)
