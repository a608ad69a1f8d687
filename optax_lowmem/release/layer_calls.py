"""The layers that a loss function calls; each passes its gradients on and drops them.

A layer is a ``jax.custom_vjp``. Its forward rule keeps the inputs. Its backward
rule computes the layer again, differentiates it, and passes the gradients of the
weights to a ``consume`` function instead of returning them. That function is
ordinary Python, called while the backward pass is traced, and keeps the new
optimizer state in the trace that called ``jax.vjp``. So layers may be called in
that trace only, and no ``jax.Ref`` is needed. A scalar dummy input that is
differentiated makes JAX run the backward rule.
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
    names: the names of the leaves in the whole tree, in order.
  """

  def __init__(self, key, entry, subtree):
    leaves, self._treedef = jax.tree_util.tree_flatten_with_path(subtree)
    self.key = key
    self.names = [pytrees.name_of((entry, *path)) for path, _ in leaves]

  def join(self, by_name: Mapping[str, Any]):
    """The subtree with these leaves."""
    return jax.tree.unflatten(self._treedef, [by_name[name] for name in self.names])


def groups(params) -> dict[Any, Group]:
  """The groups at the top level of params: a dict, a list, a NamedTuple or another container."""
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
  """The argument of a loss function that replaces params: ``layers[key]`` is callable."""

  def __init__(self, handles: Mapping[Any, "Layer"]):
    self._handles = handles

  def __getitem__(self, key) -> "Layer":
    """The layer of a key of the parameters."""
    if key not in self._handles:
      raise KeyError(f"params have no {key!r} at the top level; they have {[*self._handles]}.")
    return self._handles[key]

  def __getattr__(self, name: str) -> "Layer":
    """The layer of a field if params are a NamedTuple or a dataclass."""
    if name.startswith("__") or name not in self._handles:
      raise AttributeError(name)
    return self._handles[name]

  def __iter__(self) -> Iterator:
    return iter(self._handles)

  def __len__(self) -> int:
    return len(self._handles)


class Layer:
  """The parameters below one key; call it with the function that uses them."""

  def __init__(self, call: Callable, scan: Callable):
    self._call, self._scan = call, scan

  def __call__(self, fn, *args):
    """Computes ``fn(params[key], *args)``."""
    return self._call(fn, args)

  def __getitem__(self, key):
    raise TypeError(
      "A layer cannot be indexed. Pass layers[key] a function that takes its parameters:"
      " layers[key](lambda params, x: ..., x)."
    )

  def scan(self, fn, x, *args):
    """Computes ``x = fn(params[key][l], x, *args)`` for each layer of a stack, l = 0 .. L-1."""
    return self._scan(fn, x, args)


def probe(all_groups: dict[Any, Group], by_name, uses: dict[Any, list[str]]) -> Layers:
  """Layers that only call their functions and record each use, "call" or "scan", in uses."""
  trace = get_opaque_trace_state(convention="flax")

  running: list[Any] = []

  def run(key, fn, *args):
    """Calls a layer's function, which must not call another layer."""
    running.append(key)
    try:
      return fn(*args)
    finally:
      running.pop()

  def used(key, how: str):
    if running:
      raise ValueError(
        f"layers[{key!r}] is called inside the function of layers[{running[-1]!r}]. Call layers one"
        " after the other."
      )
    if get_opaque_trace_state(convention="flax") != trace:
      raise ValueError(
        f"layers[{key!r}] is called inside a transformation of the loss function (scan, cond, vmap,"
        " jit, checkpoint, ...). Move the transformation into the function that the layer calls,"
        " or use layers[key].scan for stacked layers. Every layer is rematerialised already."
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
  """Raises if weights are not a stack of layers."""
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
        f" axis, but params{first} has {lengths[first]}."
      )


class _Arrays:
  """A tree whose arrays are split into differentiable ones and others.

  Leaves that are not arrays (Python scalars, strings) stay as they are.
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
    """The tree with these arrays."""
    smooth, others = iter(smooth), iter(others)
    leaves = [
      self._static[i] if i in self._static else next(smooth if is_wide else others)
      for i, is_wide in enumerate(self._is_wide)
    ]
    return jax.tree.unflatten(self._treedef, leaves)


class Backward(Protocol):
  """The use of the gradients in a backward pass."""

  def start(self, names: Collection[str]) -> Any:
    """The initial carry of a layer, a tree of arrays."""

  def lows(self, names: Collection[str], carry) -> dict[str, jax.Array]:
    """The current weights of these names."""

  def consume(self, gradients: dict[str, jax.Array], carry, index) -> Any:
    """Uses a layer's gradients; returns the new carry. index is its place in a stack, or None."""

  def after(self, ct, carry) -> Any:
    """The cotangents for the preceding layer, made to depend on the carry."""

  def finish(self, names: Collection[str], carry):
    """Takes the final carry of a layer or of a whole stack."""


class Releasing:
  """Layers whose backward pass passes gradients on.

  Args:
    all_groups: the groups at the top level of the parameters.
    released: the names of the leaves whose gradients go to backward.
    backward: a ``Backward``, which uses the gradients.
  """

  def __init__(self, all_groups: Mapping[Any, Group], released: Collection[str], backward):
    self._groups, self._released, self.backward = all_groups, released, backward

  def layers(self, dummy, collected: Mapping[str, Any], fixed: Mapping[str, Any]) -> Layers:
    """The layers to pass to the loss function.

    Args:
      dummy: a float32 scalar that is differentiated.
      collected: the leaves whose gradients JAX returns, by name.
      fixed: the leaves that have no gradient, by name.
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
    is_smooth: list[bool] = []  # whether each argument is differentiated

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
      # Otherwise XLA merges the recomputation with the forward pass and keeps its intermediates.
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
      """The last x, and the x before each layer."""
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
  """The arrays in the arguments that ``custom_vjp`` passes with symbolic_zeros."""
  return jax.tree.map(lambda x: x.value, primals)


def _with_zeros(ct):
  """Replaces symbolic zeros among cotangents by arrays."""
  is_zero = lambda x: isinstance(x, jax.custom_derivatives.SymbolicZero)

  def instantiate(x):
    if not is_zero(x):
      return x
    if x.dtype == jax.dtypes.float0:
      return np.zeros(x.shape, x.dtype)
    return jnp.zeros(x.shape, x.dtype)

  return jax.tree.map(instantiate, ct, is_leaf=is_zero)


def _choose(arrays, chosen: list[bool]):
  """The chosen arrays, and a function that puts their replacements back among the others."""
  some = [x for x, choose in zip(arrays, chosen, strict=True) if choose]

  def whole(some):
    some = iter(some)
    return [next(some) if choose else x for x, choose in zip(arrays, chosen, strict=True)]

  return some, whole


def _spread(some, chosen: list[bool]):
  """The cotangents of the chosen arrays, and None for the others."""
  some = iter(some)
  return [next(some) if choose else None for choose in chosen]


def _barrier(kept, ct):
  """Returns both unchanged, but XLA can use neither before both exist."""
  leaves, treedef = jax.tree.flatten((kept, ct))
  is_array = [getattr(x, "dtype", None) != jax.dtypes.float0 for x in leaves]
  arrays = [x for x, keep in zip(leaves, is_array, strict=True) if keep]
  through = iter(jax.lax.optimization_barrier(arrays))
  leaves = [next(through) if keep else x for x, keep in zip(leaves, is_array, strict=True)]
  return jax.tree.unflatten(treedef, leaves)


def _check_carry(key, x, y):
  """Raises if a stacked layer's output and input differ in structure, shape or dtype."""
  types = [[(jnp.shape(a), jnp.result_type(a)) for a in jax.tree.leaves(t)] for t in (x, y)]
  same = jax.tree.structure(x) == jax.tree.structure(y)  # type: ignore[operator]
  if not same or types[0] != types[1]:
    found, wanted = (jax.tree.map(jax.typeof, t) for t in (y, x))
    raise TypeError(
      f"layers[{key!r}].scan: the function returns {found}, but it takes {wanted} and must return"
      " the same structure, shapes and dtypes."
    )


@contextlib.contextmanager
def _no_closures(key):
  """Replaces JAX's error about a value of another trace by one that names the remedy."""
  try:
    yield
  except jax.errors.UnexpectedTracerError as error:
    raise ValueError(
      f"The function passed to layers[{key!r}] closes over a value that depends on the parameters"
      " of another layer, so the gradient of that layer would be lost. Pass the value as an"
      f" argument: layers[{key!r}](fn, ..., value)."
    ) from error
