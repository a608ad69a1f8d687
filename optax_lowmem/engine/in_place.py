"""in_place: an elementwise optimizer's update and step, leaf by leaf, through `LeafSteps`."""

import jax
import jax.numpy as jnp

from optax_lowmem.engine import sessions
from optax_lowmem.engine.leaf_steps import Gradient, LeafSteps, Optimizer
from optax_lowmem.trees import pytrees
from pallas_kernels.formats import arithmetic


def step(optimizer: Optimizer, updates, state, params):
  """What a member returns inside `lowmem.step`: new weights, as `Landed`, and the new state.

  Args:
    optimizer: the member's.
    updates: the gradients, as the members in front leave them.
    state: the member's.
    params: the parameters.

  Returns:
    (updates, state), or None if the composed transformation steps instead.

  Raises:
    ValueError: if the optimizer is not elementwise.
  """
  session = sessions.current(sessions.StepSession)
  assert session is not None
  steps = LeafSteps.of(optimizer, state, params, updates)
  if steps is None:
    if optimizer.implementation == "mosaic_gpu":
      raise ValueError(
        'implementation="mosaic_gpu" takes statistics in formats of ours; give mu= or'
        " accumulator= instead of mu_dtype or accumulator_dtype."
      )
    return None
  gradients = pytrees.named_leaves(updates)
  total = sum(jnp.size(gradients[name]) for name in steps.held.by_name)

  def source(g) -> Gradient:
    """The gradient to read, and the factor that the program multiplies it by."""
    _, before, factor = session.scaled.get(id(g), (g, g, None))
    g, factor = (before, factor) if jnp.result_type(before).itemsize <= 4 else (g, None)
    # XLA fuses the work of a member in front (clipping) into its own passes. For a kernel it
    # writes a copy of the leaf's gradient, which must be a small part of all gradients.
    is_copied = id(g) not in session.given and jnp.size(g) * 16 > total
    how = "xla" if optimizer.implementation is None and is_copied else optimizer.implementation
    return Gradient(jnp.asarray(g), factor, how)

  sources = {name: source(gradients[name]) for name in steps.held.by_name}
  rest_updates, rest = steps.step_rest(updates)
  stored = steps.step(steps.stored, sources, session.taken)
  if session.taken is not None:
    session.settled(list(stored.values()))
  new = {name: sessions.Landed(x.low, session) for name, x in stored.items()}
  return _with(new, rest_updates, updates), steps.state(stored, rest)


def update(optimizer: Optimizer, updates, state, params):
  """`tx.update` by the programs of `step`: float32 updates that land.

  Args:
    optimizer: the member's.
    updates: the gradients.
    state: the member's.
    params: the parameters.

  Returns:
    (updates, state), or None if the composed transformation steps instead: where
    all statistics are float32, it has Optax's own bits.
  """
  steps = LeafSteps.of(optimizer, state, params, updates)
  if steps is None or not steps.has_narrow_statistics:
    return None
  gradients = pytrees.named_leaves(updates)
  sources = {
    name: Gradient(jnp.asarray(gradients[name]), None, optimizer.implementation)
    for name in steps.held.by_name
  }
  rest_updates, rest = steps.step_rest(updates)
  stored = steps.step(steps.stored, sources, lands=True)
  new = {name: _landing(steps.stored[name].low, x.low) for name, x in stored.items()}
  return _with(new, rest_updates, updates), steps.state(stored, rest)


def _with(new, rest_updates, updates):
  """The tree of updates: those of the leaves that were stepped, and of the others."""
  return pytrees.map_named((pytrees.named_leaves(rest_updates) | new).get, updates)


# Under jit, so that leaves of one shape are traced once.
_landing = jax.jit(arithmetic.landing_update)
