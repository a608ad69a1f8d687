"""Optax wrappers around a member of ours that its updates do not suit.

``lowmem.init`` refuses most of them, but ``tx.init`` sees one member at a time, and
the dtype of the gradients is known only when ``tx.update`` runs. JAX then raises from
inside Optax, or nothing raises. So a member looks for the wrapper among its callers.
"""

import sys
import types

import jax.numpy as jnp

from optax_lowmem.engine import sessions

# They return either our updates or zeros of the gradient's dtype, from a `lax.cond`.
_DEMAND_DTYPE = ("apply_if_finite", "conditionally_mask")
_CHANGE_UPDATES = (
  "conditionally_transform.",
  "mechanize.",
  "sam.<locals>.transparent_update_fn",
  "schedule_free.",
)


def check(gradients, update_dtype):
  """Raises if an Optax wrapper around the member cannot take its updates.

  Args:
    gradients: the gradients of the leaves that have a format.
    update_dtype: the dtype of the updates, as in ``delta_bits``.

  Raises:
    ValueError: if there is one. The message names it.
  """
  if not gradients:
    return  # without residuals, any change of the updates is welcome
  narrow = next((x for g in gradients if (x := jnp.result_type(g)) != jnp.float32), None)
  is_narrow = narrow is not None and update_dtype != "gradient"
  frame: types.FrameType | None = sys._getframe(1)
  while frame is not None:
    if frame.f_globals.get("__name__", "").startswith("optax."):
      name = frame.f_code.co_qualname
      wrapper = name.partition(".")[0]
      if name.startswith(_CHANGE_UPDATES):
        raise ValueError(sessions.changes_updates(wrapper))
      if is_narrow and wrapper in _DEMAND_DTYPE:
        raise ValueError(
          f"{wrapper} demands updates in the gradients' dtype, {narrow}, but those of optax_lowmem"
          f" are float32. Wrap the whole: lowmem.delta_bits(optax.{wrapper}(optax.adamw(lr), ...))."
          ' Or pass update_dtype="gradient" to the member inside, which rounds its updates.'
        )
    frame = frame.f_back
