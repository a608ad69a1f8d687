"""One training step with gradient release: forward, optionally a measuring backward, backward.

``layer_calls`` calls the classes here with each layer's gradients;
``engine.leaf_steps`` steps the leaves.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_lowmem.engine import layer_checks, leaf_steps
from optax_lowmem.engine.leaf_steps import Gradient, LeafSteps, Stored
from optax_lowmem.engine.optimizer import Optimizer
from optax_lowmem.engine.partitioned_steps import Partitioned, PartitionedSteps
from optax_lowmem.release import layer_calls
from optax_lowmem.states import DeltaBitsState, QuantizedState
from optax_lowmem.transforms import loss_scaling
from optax_lowmem.trees import host_memory, nnx_variables, pytrees


class Options(NamedTuple):
  """The arguments of ``fused_backward``."""

  loss_fn: Any
  has_aux: bool
  clip_norm: Any
  accumulate: int


class Chain(NamedTuple):
  """The parts of a transformation: one of our optimizers, optionally inside a loss scale."""

  optimizer: Optimizer | Partitioned
  advance: Any = None  # the loss scale's function; None without a loss scale


class _Measure:
  """A backward pass that only measures: whether gradients are finite, and their squared norms."""

  def __init__(self, lows: Mapping[str, jax.Array], inverse, clips: bool):
    self._lows, self._clips = lows, clips
    self._inverse = jnp.ones([], jnp.float32) if inverse is None else inverse
    self.measured: dict[str, tuple[jax.Array, jax.Array]] = {}

  def start(self, names):
    return {name: (jnp.zeros([], jnp.float32), jnp.array(True)) for name in names}

  def lows(self, names, carry):
    del carry
    return {name: self._lows[name] for name in names}

  def consume(self, gradients, carry, index):
    del index
    new = dict(carry)
    for name, g in gradients.items():
      total, finite = carry[name]
      g = loss_scaling.unscale(g, self._inverse)
      if self._clips:
        total = total + jnp.sum(jnp.abs(g) ** 2 if jnp.iscomplexobj(g) else g * g)
      new[name] = total, finite & jnp.all(jnp.isfinite(g))
    return new

  def after(self, ct, carry):
    # Otherwise XLA measures many layers together at the end, and keeps their gradients until then.
    # The condition always holds, but no compiler can prove that.
    marks = [jax.lax.bitcast_convert_type(total, jnp.uint32) for total, _ in carry.values()]
    marks += [finite.astype(jnp.uint32) for _, finite in carry.values()]
    if not marks:
      return ct
    holds = jnp.all(jnp.stack(marks) != jnp.uint32(0xFFFFFFFF))
    return jax.tree.map(lambda x: jnp.where(holds, x, jnp.zeros_like(x)), ct)

  def finish(self, names, carry):
    self.measured |= {name: carry[name] for name in names}


class _Apply:
  """A backward pass that steps each leaf."""

  def __init__(
    self, steps: LeafSteps | PartitionedSteps, stored: Mapping[str, Stored], how, micro_batch=None
  ):
    self._steps, self._how, self._micro_batch = steps, how, micro_batch
    self.stored = dict(stored)
    self.stepped: set[str] = set()

  def start(self, names):
    return {name: self.stored[name] for name in names}

  def lows(self, names, carry):
    return {name: carry[name].low for name in names}

  def consume(self, gradients, carry, index):
    taken, factor, implementation = self._how
    sources = {name: Gradient(g, factor, implementation) for name, g in gradients.items()}
    return self._steps.step(carry, sources, taken, index, self._micro_batch)

  def after(self, ct, carry):
    del carry
    return ct

  def finish(self, names, carry):
    if again := self.stepped & set(names):
      raise ValueError(
        f"params{min(again)} belongs to a layer that loss_fn calls once in its first trace, but"
        " more than once afterwards. loss_fn must make the same calls every time."
      )
    self.stored |= carry
    self.stepped |= set(names)

  def step(self, gradients):
    """Steps leaves at once."""
    self.finish(gradients, self.consume(gradients, self.start(gradients), None))

  def step_left(self, released):
    """Steps the leaves that had no backward pass, because the loss does not depend on them."""
    left = sorted(released - self.stepped)
    self.step({name: jnp.zeros_like(self.stored[name].low) for name in left})


def _steps_of(optimizer, state, params) -> LeafSteps | PartitionedSteps:
  if isinstance(optimizer, Partitioned):
    return PartitionedSteps(optimizer, state, params)
  steps = LeafSteps.of(optimizer, state, params, params)
  if steps is None:
    raise ValueError(leaf_steps.why_composed(state))
  return steps


class Step:
  """One training step."""

  def __init__(self, options: Options, chain: Chain, params, opt_state):
    self._options, self._chain = options, chain
    self._groups = layer_calls.groups(params)  # layers get parameters as given, variables included
    self._given = params, opt_state
    params, opt_state = nnx_variables.pure((params, opt_state))
    self._params, self._opt_state = params, opt_state
    for tree, name in ((params, "params"), (opt_state, "opt_state")):
      host_memory.refuse(
        tree, name, "gradient release steps on the device. jax.device_put it there, or take"
        " lowmem.step, which streams a state from the host"
      )  # fmt: skip
    is_scaled = isinstance(opt_state, loss_scaling.LossScaleState)
    inner = opt_state.inner_state if is_scaled else opt_state
    is_partition = isinstance(chain.optimizer, Partitioned)
    kinds = (optax.PartitionState,) if is_partition else (DeltaBitsState, QuantizedState)
    if is_scaled != (chain.advance is not None) or not isinstance(inner, kinds):
      raise ValueError(
        f"opt_state is not this optimizer's, but a {type(opt_state).__name__}. With tx=, the step"
        " takes (params, opt_state, *batch); without it, a lowmem.TrainState."
      )
    self._steps = _steps_of(chain.optimizer, inner, params)
    self._by_name = pytrees.named_leaves(params)

  def run(self, batch):
    """Runs the step; returns (loss, params, opt_state)."""
    first, micro_batch = self._micro_batches(batch)
    self._plan(first)
    scale = loss_scaling.loss_scale(self._opt_state)
    inverse = None if self._chain.advance is None else 1.0 / scale
    if self._options.accumulate > 1:
      result = self._accumulated(micro_batch, scale, inverse)
    else:
      result = self._once(batch, scale, inverse)
    loss, taken, factor, stored, gradients = result
    finished = self._finished(stored, gradients, taken, factor)
    return loss, *map(nnx_variables.like, self._given, finished)

  # The methods below are in the order in which they run.

  def _plan(self, batch):
    """Traces the loss once to record how it calls each layer."""
    uses: dict[Any, list[str]] = {key: [] for key in self._groups}

    def loss_fn():
      handles = layer_calls.probe(self._groups, self._by_name, uses)
      return self._options.loss_fn(handles, *batch)

    out = jax.eval_shape(loss_fn)
    if self._options.has_aux and not (isinstance(out, tuple) and len(out) == 2):
      raise TypeError(f"With has_aux, loss_fn must return (loss, aux); got {type(out).__name__}.")
    loss = out[0] if self._options.has_aux else out
    if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
      raise TypeError(f"loss_fn must return a real scalar; got {loss}.")
    self._loss_dtype = loss.dtype
    released, optimizer = set(), self._chain.optimizer
    for key, group in self._groups.items():
      if uses[key] not in (["call"], ["scan"]):
        continue
      is_stack = uses[key] == ["scan"]
      here = {
        name
        for name in group.names
        if self._steps.held.get(name) and self._by_name[name].ndim > is_stack
      }
      if is_stack and isinstance(optimizer, Optimizer) and optimizer.is_layerwise:
        stacks = {name: self._by_name[name] for name in sorted(here)}
        layer_checks.check_stacks(optimizer.make(None), stacks)
      released |= here
    self._released = released
    kept = {name: x for name, x in self._by_name.items() if name not in released}
    self._collected = {name: x for name, x in kept.items() if pytrees.is_inexact(x)}
    self._fixed = {name: x for name, x in kept.items() if not pytrees.is_inexact(x)}

  def _micro_batches(self, batch):
    """The first micro-batch, and a function from a number to that micro-batch."""
    n = self._options.accumulate
    if n == 1:
      return batch, lambda i: batch

    def cut(path, x, i):
      if not hasattr(x, "shape"):
        return x
      if not x.shape:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(x, i) if is_key else x
      if x.shape[0] % n:
        raise ValueError(
          f"accumulate={n} must divide the first axis of the batch; batch{pytrees.name_of(path)}"
          f" has shape {x.shape}."
        )
      size = x.shape[0] // n
      return jax.lax.dynamic_slice_in_dim(x, i * size, size)

    def micro(i):
      return jax.tree_util.tree_map_with_path(lambda path, x: cut(path, x, i), batch)

    return micro(0), micro

  def _vjp(self, batch, backward):
    """(loss or (loss, aux), its vjp, the layers); their backward may change between calls."""
    layers = layer_calls.Releasing(self._groups, self._released, backward)

    def loss_fn(dummy, collected):
      return self._options.loss_fn(layers.layers(dummy, collected, self._fixed), *batch)

    dummy = jnp.zeros([], jnp.float32)
    if self._options.has_aux:
      loss, vjp, aux = jax.vjp(loss_fn, dummy, self._collected, has_aux=True)
      return (loss, aux), vjp, layers
    loss, vjp = jax.vjp(loss_fn, dummy, self._collected)
    return loss, vjp, layers

  def _measure(self, vjp, layers, seed, inverse):
    """Measures in a backward pass: (whether all gradients are finite, their global norm)."""
    lows = {name: x.low for name, x in self._steps.stored.items()}
    layers.backward = _Measure(lows, inverse, self._options.clip_norm is not None)
    _, gradients = vjp(seed)
    start = layers.backward.start(gradients)
    layers.backward.finish(gradients, layers.backward.consume(gradients, start, None))
    measured = layers.backward.measured
    in_order = [measured[name] for name in self._by_name if name in measured]
    norm = jnp.sqrt(sum((total for total, _ in in_order), start=jnp.zeros([], jnp.float32)))
    return jnp.all(jnp.array([finite for _, finite in in_order], bool)), norm

  def _once(self, batch, scale, inverse):
    """Runs forward and backward of the whole batch."""
    clip_norm = self._options.clip_norm
    seed = scale.astype(self._loss_dtype)
    measures = clip_norm is not None or inverse is not None
    taken, factor = None, inverse
    backward = self._apply(None, None)
    loss, vjp, layers = self._vjp(batch, backward)
    if measures:
      finite, norm = self._measure(vjp, layers, seed, inverse)
      # Makes the second pass depend on the end of the first, in a way that XLA cannot simplify.
      go = finite if clip_norm is None else finite | (norm >= 0) | jnp.isnan(norm)
      seed = jnp.where(go, seed, 0).astype(seed.dtype)
      if inverse is not None:
        taken = finite
      if clip_norm is not None:
        clip = jnp.where(norm < clip_norm, 1.0, clip_norm / norm).astype(jnp.float32)
        factor = clip if inverse is None else inverse * clip
      backward = layers.backward = self._apply(taken, factor)
    _, gradients = vjp(seed)
    backward.step_left(self._released)
    return loss, taken, factor, backward.stored, gradients

  def _accumulated(self, micro_batch, scale, inverse):
    """Runs forward and backward of one micro-batch after the other."""
    n = self._options.accumulate
    seed, taken = scale.astype(self._loss_dtype), None
    if inverse is not None:

      def measure(finite, i):
        _, vjp, layers = self._vjp(micro_batch(i), self._apply(None, None))
        return finite & self._measure(vjp, layers, seed, inverse)[0], None

      taken, _ = jax.lax.scan(measure, jnp.array(True), jnp.arange(n))
      seed = jnp.where(taken, seed, 0).astype(seed.dtype)
    factor = (jnp.float32(1.0) if inverse is None else inverse) / n

    def run(i, stored, sums, number):
      backward = self._apply(taken, factor, stored, number)
      loss, vjp, _ = self._vjp(micro_batch(i), backward)
      _, gradients = vjp(seed)
      more = {name: loss_scaling.unscale(g, factor) for name, g in gradients.items()}
      return backward, jax.tree.map(jnp.add, sums, more), loss

    def fold(carry, i):
      stored, sums = carry
      backward, sums, loss = run(i, stored, sums, i + 1)
      return (backward.stored, sums), loss

    sums = {
      name: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
      for name, x in self._collected.items()
    }
    carry, losses = jax.lax.scan(fold, (dict(self._steps.stored), sums), jnp.arange(n - 1))
    stored, sums = carry
    backward, sums, last = run(n - 1, stored, sums, None)
    backward.step_left(self._released)
    losses = jax.tree.map(lambda x, y: jnp.concatenate([x, jnp.asarray(y)[None]]), losses, last)
    mean = lambda x: jnp.mean(x, axis=0)
    loss = (mean(losses[0]), losses[1]) if self._options.has_aux else mean(losses)
    return loss, taken, None, backward.stored, sums

  def _apply(self, taken, factor, stored=None, micro_batch=None) -> _Apply:
    how = taken, factor, self._chain.optimizer.implementation
    return _Apply(self._steps, self._steps.stored if stored is None else stored, how, micro_batch)

  def _finished(self, stored, gradients, taken, factor):
    """Steps the leaves whose gradients were kept; returns the new (params, opt_state)."""
    steps = self._steps
    held = {name: g for name, g in gradients.items() if steps.held.get(name)}
    apply = self._apply(taken, factor, stored)
    apply.step(held)

    def whole(name, x):
      if name in gradients:
        g = gradients[name]
        return g if factor is None else loss_scaling.unscale(g, factor)
      # Integers have no gradient. Zeros give the same result as in `lowmem.step`.
      is_number = not jnp.issubdtype(x.dtype, jax.dtypes.extended)
      return jnp.zeros_like(x) if is_number else np.zeros(x.shape, jax.dtypes.float0)

    updates, rest = steps.step_rest(pytrees.map_named(whole, self._params))
    if taken is not None:
      rest = jax.tree.map(lambda x, y: jnp.where(taken, x, y), rest, steps.old_rest)
    updates_by_name = pytrees.named_leaves(updates)

    def landed(name, x):
      if name in apply.stored:
        return apply.stored[name].low
      new = optax.apply_updates(x, updates_by_name[name])
      return new if taken is None else jnp.where(taken, new, x)

    state = steps.state(apply.stored, rest, taken)
    if self._chain.advance is not None:
      state = self._chain.advance(self._opt_state, taken, state)
    return pytrees.map_named(landed, self._params), state
