"""host_memory: an optimizer state in the host's memory, which a step brings to the device."""

import jax


def on_device(tree):
  """Moves what lies on the host to the device.

  Args:
    tree: arrays; a traced one knows its memory from its type.

  Returns:
    ``(tree, put_back)``. ``put_back`` moves a tree of the same structure to where the
    leaves of this one lay.
  """
  spaces = jax.tree.map(_space, tree)
  if jax.memory.Space.Host not in jax.tree.leaves(spaces):
    return tree, lambda new: new

  def moved(x, space, to):
    return jax.device_put(x, to) if space == jax.memory.Space.Host else x

  def put_back(new):
    return jax.tree.map(lambda x, space: moved(x, space, jax.memory.Space.Host), new, spaces)

  here = jax.tree.map(lambda x, space: moved(x, space, jax.memory.Space.Device), tree, spaces)
  return here, put_back


def refuse(tree, name: str, instead: str):
  """Raises if a leaf lies on the host, where it cannot be used.

  Args:
    tree: arrays.
    name: what the caller calls the tree.
    instead: what to do about it, the end of the message.

  Raises:
    ValueError: names the leaf.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if _space(leaf) == jax.memory.Space.Host:
      raise ValueError(f"{name}{jax.tree_util.keystr(path)} is in the host's memory; {instead}.")


def _space(x):
  return getattr(jax.typeof(x), "memory_space", jax.memory.Space.Device)
