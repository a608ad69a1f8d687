"""Sequences of Flax modules with batch statistics: ResNet-18's blocks and DCGAN's networks."""

import jax


def init_blocks(blocks, x, key):
  """Initializes a sequence of Flax modules.

  Args:
    blocks: a dict of modules, each called with (x, is_training).
    x: an input of the first module.
    key: the random key of the parameters.

  Returns:
    (params, batch statistics, result): float32 parameters and batch statistics by
    the names of the modules, and the result of the last module.
  """
  params, kept = {}, {}
  for i, (name, block) in enumerate(blocks.items()):
    x, variables = block.init_with_output(jax.random.fold_in(key, i), x, False)
    params[name], kept[name] = variables["params"], variables.get("batch_stats", {})
  return params, kept, x


def call_block(block, is_training: bool, weights, stats, x):
  """A Flax module's result, and its batch statistics, which only training changes."""
  variables = {"params": weights, "batch_stats": stats}
  if not is_training:
    return block.apply(variables, x, False), stats
  x, state = block.apply(variables, x, True, mutable="batch_stats")
  return x, state.get("batch_stats", {})
