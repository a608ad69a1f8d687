"""Flax modules with batch statistics, one after the other: ResNet-18's blocks, DCGAN's networks."""

import jax


def init_blocks(blocks, x, key):
  """Float32 parameters and batch statistics of Flax modules that follow each other, and the result.

  Args:
    blocks: a dict of modules, called with (x, is_training).
    x: an input of the first.
    key: of the parameters.

  Returns:
    (params, batch statistics, result), both by the blocks' names.
  """
  params, kept = {}, {}
  for i, (name, block) in enumerate(blocks.items()):
    x, variables = block.init_with_output(jax.random.fold_in(key, i), x, False)
    params[name], kept[name] = variables["params"], variables.get("batch_stats", {})
  return params, kept, x


def call_block(block, is_training: bool, weights, stats, x):
  """A Flax module's result, and its new batch statistics (the same where it is not trained)."""
  variables = {"params": weights, "batch_stats": stats}
  if not is_training:
    return block.apply(variables, x, False), stats
  x, state = block.apply(variables, x, True, mutable="batch_stats")
  return x, state.get("batch_stats", {})
