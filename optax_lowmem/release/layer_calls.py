"""The layers that a loss function calls, each of which hands its gradients on and forgets them.

A layer is a `jax.custom_vjp`: forward it keeps its inputs, backward it computes
the layer again, takes its gradients, and gives the weights' gradients to a
`consume` function instead of returning them. That function is ordinary Python,
called while the backward pass is traced: it keeps the new optimizer state in
the very trace that called `jax.vjp`. So layers are called in that trace alone,
and no `jax.Ref` is needed. A scalar input that is differentiated makes JAX run
the backward rule.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
from typing import Any, Protocol

import jax
from jax.extend.core import get_opaque_trace_state
import jax.numpy as jnp
import numpy as np

from optax_lowmem.trees import pytrees


class Group:
  """The leaves below one key of the parameters' top level.

  Attributes:
    key: the key.
    names: the leaves' names in the whole tree, in order.
  """

  def __init__(self, key, entry, subtree):
    leaves, self._treedef = jax.tree_util.tree_flatten_with_path(subtree)
    self.key = key
    self.names = [pytrees.name_of((entry, *path)) for path, _ in leaves]

  def join(self, by_name: Mapping[str, Any]):
    """The subtree, with these leaves."""
    return jax.tree.unflatten(self._treedef, [by_name[name] for name in self.names])


def groups(params) -> dict[Any, Group]:
  """The top level of the parameters: a dict, a list, a NamedTuple or another container."""
  children, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: x is not params)
  if not children or not children[0][0]:
    raise ValueError(
      "fused_backward takes params in a container (a dict, a list, ...) with one entry for each"
      f" layer; got {type(params).__name__}."
    )
  found = {}
  for (entry,), subtree in children:
    key = next(getattr(entry, x) for x in ("key", "idx", "name") if hasattr(entry, x))
    found[key] = Group(key, entry, subtree)
  return found


class Layers(Mapping):
  """What a loss function gets in the place of params: `layers[key]` can be called."""

  def __init__(self, handles: Mapping[Any, "Layer"]):
    self._handles = handles

  def __getitem__(self, key) -> "Layer":
    """The layer of a key of the parameters."""
    if key not in self._handles:
      raise KeyError(f"params have no {key!r} at their top level; they have {[*self._handles]}.")
    return self._handles[key]

  def __getattr__(self, name: str) -> "Layer":
    """The layer of a field, where params are a NamedTuple or a dataclass."""
    if name.startswith("__") or name not in self._handles:
      raise AttributeError(name)
    return self._handles[name]

  def __iter__(self) -> Iterator:
    return iter(self._handles)

  def __len__(self) -> int:
    return len(self._handles)


class Layer:
  """The parameters below one key, to be called with the function that uses them."""

  def __init__(self, call: Callable, scan: Callable):
    self._call, self._scan = call, scan

  def __call__(self, fn, *args):
    """`fn(params[key], *args)`."""
    return self._call(fn, args)

  def __getitem__(self, key):
    raise TypeError(
      "A layer's parameters are what the function that it is called with gets:"
      " layers[key](lambda params, x: ..., x)."
    )

  def scan(self, fn, x, *args):
    """`x = fn(params[key][l], x, *args)` for each layer of a stack, l = 0 .. L-1."""
    return self._scan(fn, x, args)


def probe(all_groups: dict[Any, Group], by_name, uses: dict[Any, list[str]]) -> Layers:
  """Layers that only call their functions, and add to uses how: "call" or "scan"."""
  trace = get_opaque_trace_state(convention="flax")

  running: list[Any] = []

  def run(key, fn, *args):
    """The function's result; it calls no other layer."""
    running.append(key)
    try:
      return fn(*args)
    finally:
      running.pop()

  def used(key, how: str):
    if running:
      raise ValueError(
        f"layers[{key!r}] is called inside the function of layers[{running[-1]!r}]; layers are"
        " called one after the other."
      )
    if get_opaque_trace_state(convention="flax") != trace:
      raise ValueError(
        f"layers[{key!r}] is called inside a transformation of the loss function (scan, cond, vmap,"
        " jit, checkpoint, ...). Put that inside the function that the layer is called with, or"
        " use layers[key].scan for stacked layers; every layer is rematerialised already."
      )
    uses[key].append(how)

  def handle(key, group: Group) -> Layer:
    def call(fn, args):
      used(key, "call")
      return run(key, fn, group.join(by_name), *args)

    def scan(fn, x, args):
      used(key, "scan")
      weights = group.join(by_name)
      check_stack(group, weights)

      def body(x, w):
        y = run(key, fn, w, x, *args)
        _check_carry(key, x, y)
        return y, None

      return jax.lax.scan(body, jax.tree.map(jnp.asarray, x), weights)[0]

    return Layer(call, scan)

  return Layers({key: handle(key, group) for key, group in all_groups.items()})


def check_stack(group: Group, weights):
  """Raises where weights are no stack of layers."""
  lengths = {
    name: jnp.shape(x)[:1] for name, x in zip(group.names, jax.tree.leaves(weights), strict=True)
  }
  if not lengths:
    raise ValueError(f"params[{group.key!r}] has no arrays to scan over.")
  for name, length in lengths.items():
    first = next(iter(lengths))
    if not length or length != lengths[first]:
      raise ValueError(
        f"layers[{group.key!r}].scan: params{name} has {length or 'no'} layers along its first"
        f" axis and params{first} has {lengths[first]}."
      )


class _Arrays:
  """A tree whose arrays are split into those with a derivative and others.

  Python scalars, strings and the like stay as they are.
  """

  def __init__(self, tree):
    leaves, self._treedef = jax.tree.flatten(tree)
    is_array = lambda x: isinstance(x, (jax.Array, np.ndarray, np.generic))
    self._static = {i: x for i, x in enumerate(leaves) if not is_array(x)}
    self._is_wide = [pytrees.is_inexact(x) for x in leaves]
    self.smooth = [x for i, x in self._dynamic(leaves) if self._is_wide[i]]
    self.others = [x for i, x in self._dynamic(leaves) if not self._is_wide[i]]

  def _dynamic(self, leaves):
    return [(i, x) for i, x in enumerate(leaves) if i not in self._static]

  def join(self, smooth, others):
    """The tree again, with these arrays."""
    smooth, others = iter(smooth), iter(others)
    leaves = [
      self._static[i] if i in self._static else next(smooth if is_wide else others)
      for i, is_wide in enumerate(self._is_wide)
    ]
    return jax.tree.unflatten(self._treedef, leaves)


class Backward(Protocol):
  """What is done with the gradients in a backward pass."""

  def start(self, names: Collection[str]) -> Any:
    """A tree of arrays to begin a layer with."""

  def lows(self, names: Collection[str], carry) -> dict[str, jax.Array]:
    """The weights of these names, as they are now."""

  def consume(self, gradients: dict[str, jax.Array], carry, index) -> Any:
    """The carry after a layer's gradients; index is its place in a stack, or None."""

  def after(self, ct, carry) -> Any:
    """The cotangents that go on to the layer before, once the carry is there."""

  def finish(self, names: Collection[str], carry):
    """Takes the carry when a layer, or a whole stack, is done."""


class Releasing:
  """Layers whose backward pass gives gradients away.

  Args:
    all_groups: the parameters' top level.
    released: names of the leaves whose gradients are given away.
    backward: what to do with the gradients.
  """

  def __init__(self, all_groups: Mapping[Any, Group], released: Collection[str], backward):
    self._groups, self._released, self.backward = all_groups, released, backward

  def layers(self, dummy, collected: Mapping[str, Any], fixed: Mapping[str, Any]) -> Layers:
    """What the loss function gets.

    Args:
      dummy: a float32 scalar that is differentiated.
      collected: leaves whose gradients JAX returns, by name.
      fixed: leaves that have no gradient, by name.
    """

    def handle(group: Group) -> Layer:
      mine = {name: collected[name] for name in group.names if name in collected}
      others = {name: fixed[name] for name in group.names if name in fixed}
      released = [name for name in group.names if name in self._released]

      def call(fn, args):
        return self._call(group, released, mine, others, dummy, fn, args)

      def scan(fn, x, args):
        return self._scan(group, released, mine, others, dummy, fn, x, args)

      return Layer(call, scan)

    return Layers({key: handle(group) for key, group in self._groups.items()})

  def _now(self, names):
    return self.backward.lows(names, self.backward.start(names))

  def _call(self, group: Group, released, mine, others, dummy, fn, args):
    split = _Arrays(args)
    is_smooth: list[bool] = []  # whether something is differentiated by an argument

    def compute(lows, mine, smooth, exact):
      with _no_closures(group.key):
        return fn(group.join(lows | mine | others), *split.join(smooth, exact))

    @jax.custom_vjp
    def layer(dummy, mine, smooth, exact):
      del dummy
      return compute(self._now(released), mine, smooth, exact)

    def forward(dummy, *inputs):
      del dummy
      is_smooth[:] = [x.perturbed for x in inputs[1]]
      inputs = _values(inputs)
      return compute(self._now(released), *inputs), inputs

    def backward(inputs, ct):
      ct = _with_zeros(ct)
      state = self.backward.start(released)
      lows = self.backward.lows(released, state)
      # Or the recomputation would be found to be the forward pass, and all of that kept.
      (lows, (mine, smooth, exact)), ct = _barrier((lows, inputs), ct)
      wrt, whole = _choose(smooth, is_smooth)

      def of(lows, mine, wrt):
        return compute(lows, mine, whole(wrt), exact)

      _, vjp = jax.vjp(of, lows, mine, wrt)
      gradients, ct_mine, ct_wrt = vjp(ct)
      state = self.backward.consume(gradients, state, None)
      self.backward.finish(released, state)
      ct_smooth = _spread(self.backward.after(ct_wrt, state), is_smooth)
      return jnp.zeros([], jnp.float32), ct_mine, ct_smooth, None

    layer.defvjp(forward, backward, symbolic_zeros=True)
    with _no_closures(group.key):
      return layer(dummy, mine, split.smooth, split.others)

  def _scan(self, group: Group, released, mine, others, dummy, fn, x, args):
    x = jax.tree.map(jnp.asarray, x)
    split_x, split_args = _Arrays(x), _Arrays(args)
    is_smooth: list[bool] = []

    def compute(lows, mine, others, x, smooth, exact):
      with _no_closures(group.key):
        w = group.join(lows | mine | others)
        return fn(w, split_x.join(*x), *split_args.join(smooth, exact))

    def run(mine, x, smooth, exact):
      """The last x, and all before it."""
      stacks = self._now(released), mine, others

      def body(x, w):
        lows, mine, others = w
        y = _Arrays(jax.tree.map(jnp.asarray, compute(lows, mine, others, x, smooth, exact)))
        return (y.smooth, y.others), x

      return jax.lax.scan(body, x, stacks)

    @jax.custom_vjp
    def stack(dummy, mine, x, smooth, exact):
      del dummy
      return run(mine, x, smooth, exact)[0]

    def forward(dummy, mine, x, smooth, exact):
      is_smooth[:] = [x.perturbed for x in smooth]
      mine, x, smooth, exact = _values((mine, x, smooth, exact))
      y, xs = run(mine, x, smooth, exact)
      return y, (mine, xs, smooth, exact)

    def backward(saved, ct):
      ct = _with_zeros(ct)
      mine, xs, smooth, exact = saved
      wrt, whole = _choose(smooth, is_smooth)
      length = jax.tree.leaves((self._now(released), mine, others))[0].shape[0]

      def body(carry, layer):
        ct_x, ct_wrt, state = carry
        i, mine, others, (x, x_exact) = layer
        lows = {
          name: jax.lax.dynamic_index_in_dim(low, i, keepdims=False)
          for name, low in self.backward.lows(released, state).items()
        }

        def of(lows, mine, x, wrt):
          y = compute(lows, mine, others, (x, x_exact), whole(wrt), exact)
          return _Arrays(jax.tree.map(jnp.asarray, y)).smooth

        _, vjp = jax.vjp(of, lows, mine, x, wrt)
        gradients, ct_mine, ct_x, more = vjp(ct_x)
        state = self.backward.consume(gradients, state, i)
        return (ct_x, jax.tree.map(jnp.add, ct_wrt, more), state), ct_mine

      zeros = jax.tree.map(jnp.zeros_like, wrt)
      xs = jnp.arange(length), mine, others, xs
      start = ct[0], zeros, self.backward.start(released)
      (ct_x, ct_wrt, state), ct_mine = jax.lax.scan(body, start, xs, reverse=True)
      self.backward.finish(released, state)
      ct_smooth = _spread(ct_wrt, is_smooth)
      return jnp.zeros([], jnp.float32), ct_mine, (ct_x, None), ct_smooth, None

    stack.defvjp(forward, backward, symbolic_zeros=True)
    inputs = (split_x.smooth, split_x.others), split_args.smooth, split_args.others
    with _no_closures(group.key):
      return split_x.join(*stack(dummy, mine, *inputs))


def _values(primals):
  """What `custom_vjp` gives a forward function with symbolic_zeros, as arrays."""
  return jax.tree.map(lambda x: x.value, primals)


def _with_zeros(ct):
  """The cotangents, with arrays for symbolic zeros."""
  is_zero = lambda x: isinstance(x, jax.custom_derivatives.SymbolicZero)

  def instantiate(x):
    if not is_zero(x):
      return x
    if x.dtype == jax.dtypes.float0:
      return np.zeros(x.shape, x.dtype)
    return jnp.zeros(x.shape, x.dtype)

  return jax.tree.map(instantiate, ct, is_leaf=is_zero)


def _choose(arrays, chosen: list[bool]):
  """The chosen arrays, and a function that puts such back among the others."""
  some = [x for x, choose in zip(arrays, chosen, strict=True) if choose]

  def whole(some):
    some = iter(some)
    return [next(some) if choose else x for x, choose in zip(arrays, chosen, strict=True)]

  return some, whole


def _spread(some, chosen: list[bool]):
  """The chosen ones' cotangents, and None for the others."""
  some = iter(some)
  return [next(some) if choose else None for choose in chosen]


def _barrier(kept, ct):
  """Both again, but nothing can be computed of one before the other is there."""
  leaves, treedef = jax.tree.flatten((kept, ct))
  is_array = [getattr(x, "dtype", None) != jax.dtypes.float0 for x in leaves]
  arrays = [x for x, keep in zip(leaves, is_array, strict=True) if keep]
  through = iter(jax.lax.optimization_barrier(arrays))
  leaves = [next(through) if keep else x for x, keep in zip(leaves, is_array, strict=True)]
  return jax.tree.unflatten(treedef, leaves)


def _check_carry(key, x, y):
  """Raises where a layer does not return what it takes."""
  types = [[(jnp.shape(a), jnp.result_type(a)) for a in jax.tree.leaves(t)] for t in (x, y)]
  same = jax.tree.structure(x) == jax.tree.structure(y)  # type: ignore[operator]
  if not same or types[0] != types[1]:
    found, wanted = (jax.tree.map(jax.typeof, t) for t in (y, x))
    raise TypeError(
      f"layers[{key!r}].scan: the function returns {found}; it takes {wanted}, and has to return"
      " the same structure, shapes and dtypes."
    )


@contextlib.contextmanager
def _no_closures(key):
  """Turns JAX's error about a value of another trace into one that says what to do."""
  try:
    yield
  except jax.errors.UnexpectedTracerError as error:
    raise ValueError(
      f"The function that layers[{key!r}] is called with closes over a value that depends on the"
      " parameters of another layer, whose gradient would be lost. Pass it as an argument:"
      f" layers[{key!r}](fn, ..., value)."
    ) from error
