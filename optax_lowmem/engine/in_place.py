"""in_place: updates and steps an elementwise optimizer leaf by leaf, through ``LeafSteps``."""

import jax
import jax.numpy as jnp

from optax_lowmem.engine import sessions
from optax_lowmem.engine.leaf_steps import Gradient, LeafSteps
from optax_lowmem.engine.optimizer import Optimizer
from optax_lowmem.trees import pytrees
from pallas_kernels.formats import arithmetic


def step(optimizer: Optimizer, session: sessions.StepSession, updates, state, params):
  """A member's update inside ``lowmem.step``: new weights, as ``Landed``, and the new state.

  Args:
    optimizer: the member's optimizer.
    session: the open session.
    updates: the gradients, as the members in front pass them on.
    state: the member's state.
    params: the parameters.

  Returns:
    (updates, state); None if the composed transformation must step instead.

  Raises:
    ValueError: if the optimizer is not elementwise, or if it asks for a kernel but
      only the composed transformation can step.
  """
  steps = LeafSteps.of(optimizer, state, params, updates)
  if steps is None:
    if optimizer.implementation not in (None, "xla"):
      raise ValueError(
        f'implementation="{optimizer.implementation}" takes statistics in our own formats: pass mu='
        " or accumulator= instead of mu_dtype or accumulator_dtype."
      )
    return None
  gradients = pytrees.named_leaves(updates)
  total = sum(jnp.size(gradients[name]) for name in steps.held.by_name)

  def source(g) -> Gradient:
    """The gradient to read, and the factor by which the program multiplies it."""
    _, before, factor = session.scaled.get(id(g), (g, g, None))
    g, factor = (before, factor) if jnp.result_type(before).itemsize <= 4 else (g, None)
    # XLA fuses a member in front (clipping) into its own passes. Before a kernel, it writes a
    # copy of the leaf's gradient, which must be a small part of all gradients.
    is_copied = id(g) not in session.given and jnp.size(g) * 16 > total
    return Gradient(jnp.asarray(g), factor, optimizer.implementation, is_copied)

  sources = {name: source(gradients[name]) for name in steps.held.by_name}
  rest_updates, rest = steps.step_rest(updates)
  stored = steps.step(steps.stored, sources, session.taken)
  if session.taken is not None:
    session.settled(list(stored.values()))
  new = {name: sessions.Landed(x.low, session) for name, x in stored.items()}
  return _with(new, rest_updates, updates), steps.state(stored, rest)


def update(optimizer: Optimizer, updates, state, params):
  """``tx.update`` through the programs of ``step``: float32 updates that land.

  Args:
    optimizer: the member's optimizer.
    updates: the gradients.
    state: the member's state.
    params: the parameters.

  Returns:
    (updates, state); None if the composed transformation must update instead. With
    float32 statistics alone, or if the optimizer also steps float32 weights, it
    does, because its bits are Optax's own.
  """
  steps = LeafSteps.of(optimizer, state, params, updates)
  if steps is None or not steps.has_narrow_statistics:
    return None
  if any(fmt.is_full_precision for _, fmt in steps.held.table):
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
  """Merges the updates of the stepped leaves and of the rest into one tree."""
  return pytrees.map_named((pytrees.named_leaves(rest_updates) | new).get, updates)


# jit traces leaves of one shape once.
_landing = jax.jit(arithmetic.landing_update)
