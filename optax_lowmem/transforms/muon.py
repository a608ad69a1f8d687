"""muon: Optax's Muon, with weights and statistics in few bits, one matrix at a time."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, MuonState

from optax_lowmem.engine.matrix_steps import Axes, Matrices
from optax_lowmem.engine.optimizer import Optimizer
from optax_lowmem.engine.partitioned_steps import Partitioned
from optax_lowmem.transforms.delta_bits import Weights, warning_once
from optax_lowmem.transforms.optimizers import FLOAT32, adamw, average_fold, in_few_bits
from optax_lowmem.transforms.quantize_state import DEFAULT, first_format
from optax_lowmem.trees import nnx_variables, pytrees
from pallas_kernels.formats.state_formats import Name
from pallas_kernels.placement.implementations import Implementation

Array = jax.typing.ArrayLike
Coefficients = Sequence[Array] | Sequence[Sequence[Array]] | str
_STANDARD = (3.4445, -4.7750, 2.0315)


def muon(
  learning_rate: optax.ScalarOrSchedule,
  ns_coeffs: Coefficients = _STANDARD,
  ns_steps: int = 5,
  beta: Array = 0.95,
  eps: Array = 1e-8,
  weight_decay: Array = 0.0,
  weight_decay_mask: Any | None = None,
  mu_dtype: Any | None = None,
  *,
  nesterov: bool = True,
  adaptive: bool = False,
  preconditioning: Literal["frobenius", "spectral", "aol", "schatten"] = "frobenius",
  adam_b1: Array = 0.9,
  adam_b2: Array = 0.999,
  adam_eps_root: Array = 0.0,
  adam_weight_decay: Array = 0.0,
  adam_learning_rate: optax.ScalarOrSchedule | None = None,
  muon_weight_dimension_numbers: Any | None = None,
  consistent_rms: Array | None = None,
  products: Literal["sharded", "replicated"] = "sharded",
  weights: Weights = "bf16+8",
  mu: Name = DEFAULT,
  adam_mu: Name = DEFAULT,
  adam_nu: Name = "int8",
  key: Array = 0,
  update_dtype: Any = FLOAT32,
  implementation: Implementation | None = None,
) -> optax.GradientTransformationExtraArgs:
  """``optax.contrib.muon`` in 4.06 bytes a parameter: weight, residual and momentum.

  Muon steps the matrices and :func:`optax_lowmem.adamw` everything else. A leaf of
  more than two axes is a stack of matrices, in its last two axes. (Optax gives such
  a leaf to AdamW.) ``muon_weight_dimension_numbers`` says otherwise, for example
  for the kernels of a convolution.

  The matrices are orthogonalized one after the other, in bfloat16, so a step needs
  the memory of one layer's matrices and not of the whole stack. With ``mu="fp32"``
  or ``preconditioning="spectral"``, the products are float32. Matrices without a
  weight format keep Optax's own behaviour.

  Args:
    learning_rate: a float, a traced scalar or a schedule.
    ns_coeffs: coefficients of the Newton-Schulz iterations: three, or three for
      each iteration, or the name of Optax's ``"standard"`` or ``"dion"``.
    ns_steps: the number of iterations.
    beta: decay rate of the momentum.
    eps: added to denominators, also to AdamW's.
    weight_decay: decoupled weight decay of the matrices, multiplied by the learning
      rate.
    weight_decay_mask: which matrices decay: a tree of bools, or a callable from
      params to one.
    mu_dtype: Optax's dtype for the momenta, instead of ``mu`` and ``adam_mu``.
    nesterov: whether to use Nesterov momentum.
    adaptive: whether to scale each update by the dual norm of the momentum; not for
      stacks.
    preconditioning: ``"frobenius"``, ``"spectral"``, ``"aol"`` or ``"schatten"``, as
      in Optax.
    adam_b1: AdamW's b1.
    adam_b2: AdamW's b2.
    adam_eps_root: AdamW's eps_root.
    adam_weight_decay: AdamW's weight decay.
    adam_learning_rate: AdamW's learning rate; None takes ``learning_rate``.
    muon_weight_dimension_numbers: which axes form a matrix: a pytree prefix of
      ``optax.contrib.MuonDimensionNumbers``, with None for the leaves that AdamW
      steps, or a callable from params to one.
    consistent_rms: scales updates by ``sqrt(max(fan_in, fan_out)) * consistent_rms``
      instead of ``sqrt(max(1, fan_out / fan_in))``.
    products: on a mesh, ``"sharded"`` divides the matrix products among the devices;
      ``"replicated"`` gathers each matrix, and every device multiplies all of it:
      less communication, more arithmetic. It takes the mesh from ``jax.set_mesh``,
      and has no effect where Optax's own products run (docs/muon.md, Limits).
    weights: as in :func:`optax_lowmem.adamw`.
    mu: the format of Muon's momentum: ``"fp32"``, ``"bf16"``, ``"fp16"``,
      ``"int8"`` or ``"int4"`` (too coarse: docs/muon.md).
    adam_mu: the format of AdamW's first moment.
    adam_nu: the format of AdamW's second moment.
    key: as in :func:`optax_lowmem.adamw`.
    update_dtype: as in :func:`optax_lowmem.adamw`.
    implementation: as in :func:`optax_lowmem.adamw`.

  Returns:
    A transformation. Use it with :func:`optax_lowmem.init` and
    :func:`optax_lowmem.step`.

  Raises:
    ValueError: if a format, the implementation, ``products`` or a name is unknown, if
      ``mu_dtype`` is given together with ``mu`` or ``adam_mu``, or if the axes of a
      leaf do not form a matrix. The message names the leaf.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax_lowmem as lowmem
    >>> tx = lowmem.muon(0.02)
    >>> params = {"blocks": jnp.ones((4, 64, 32)), "scale": jnp.ones(32)}
    >>> params, opt_state = lowmem.init(tx, params)
    >>> grads = {"blocks": jnp.ones((4, 64, 32), jnp.bfloat16), "scale": jnp.ones(32)}
    >>> grads["scale"] = grads["scale"].astype(jnp.bfloat16)
    >>> params, opt_state = lowmem.step(tx, grads, opt_state, params)
    >>> print(params["blocks"].dtype, sorted(opt_state.inner_states))
    bfloat16 ['adam', 'muon']

  References:
    `Muon: An optimizer for hidden layers in neural networks
    <https://kellerjordan.github.io/posts/muon/>`__

    `Muon is Scalable for LLM Training <https://arxiv.org/abs/2502.16982>`__

    `Memory Efficient Mixed-Precision Optimizers
    <https://arxiv.org/abs/2309.12381>`__
  """
  coefficients: Any = _preset(ns_coeffs, ns_steps) if isinstance(ns_coeffs, str) else ns_coeffs
  mu_format = first_format(mu, mu_dtype, "mu")
  first_format(adam_mu, mu_dtype, "adam_mu")

  if products not in ("sharded", "replicated"):
    raise ValueError(f'products must be "sharded" or "replicated"; got {products!r}.')

  def axes_of(tree) -> dict[str, Axes]:
    return _axes(muon_weight_dimension_numbers, tree, adaptive)

  def numbers_of(tree):
    axes = axes_of(tree)
    return pytrees.map_named(lambda name, x: axes[name].numbers, tree)

  def scale_by_shape(updates):
    axes = axes_of(updates)
    return pytrees.map_named(lambda name, u: matrices.scale(u.shape, axes[name]) * u, updates)

  def tail(mask):
    decay = optax.add_decayed_weights(weight_decay, mask)
    return decay, optax.scale_by_learning_rate(learning_rate)

  def make(mask):
    return optax.chain(
      optax.contrib.scale_by_muon(
        coefficients, ns_steps, beta, eps, mu_dtype, nesterov=nesterov, adaptive=adaptive,
        preconditioning=preconditioning, weight_dimension_numbers=numbers_of,
      ),
      optax.stateless(lambda updates, params: scale_by_shape(updates)),
      *tail(mask),
    )  # fmt: skip

  newton_schulz = optax.contrib.scale_by_muon(
    coefficients, ns_steps, 0.0, eps, nesterov=False, adaptive=adaptive,
    preconditioning=preconditioning, weight_dimension_numbers=MuonDimensionNumbers(),
  )  # fmt: skip
  is_wide = mu_format in (None, "fp32") or preconditioning == "spectral"
  matrices = Matrices(
    axes_of, beta, nesterov, newton_schulz, jnp.float32 if is_wide else jnp.bfloat16,
    consistent_rms, products == "replicated", lambda mask: optax.chain(*tail(mask)),
  )  # fmt: skip
  fold = average_fold({"mu": beta}, nesterov)
  optimizer = Optimizer(make, weight_decay_mask, implementation, fold, matrices=matrices)
  of_matrices = in_few_bits(optimizer, weights, {"mu": mu_format}, key, update_dtype)
  of_others = adamw(
    learning_rate if adam_learning_rate is None else adam_learning_rate,
    adam_b1, adam_b2, eps, adam_eps_root, mu_dtype, adam_weight_decay, nesterov=nesterov,
    weights=weights, mu=adam_mu, nu=adam_nu, key=key, update_dtype=update_dtype,
    implementation=implementation,
  )  # fmt: skip

  def labels(tree) -> dict[str, str]:
    axes = axes_of(tree)
    return {name: "muon" if name in axes else "adam" for name in pytrees.named_leaves(tree)}

  def label_tree(tree):
    by_name = labels(tree)
    return pytrees.map_named(lambda name, x: by_name[name], tree)

  members = {"muon": of_matrices, "adam": of_others}
  parts = optax.partition(members, label_tree)
  # Gradient release reads it.
  optimizers = {label: member.update.optimizer for label, member in members.items()}
  parts.update.optimizer = Partitioned(optimizers, labels)

  def init(params):
    with warning_once():
      return parts.init(params)

  return nnx_variables.transformation(init, parts.update)


def _preset(name: str, steps: int) -> Array:
  """The coefficients that Optax knows by a name."""
  state = optax.contrib.muon(0.0, name, steps).init(jnp.zeros((1, 1)))
  return next(pytrees.find_states(state, MuonState)).ns_coeffs


def _axes(numbers, tree, adaptive: bool) -> dict[str, Axes]:
  """The axes of the leaves that are matrices, by name."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  given = numbers(tree) if callable(numbers) else numbers
  is_entry = lambda x: x is None or isinstance(x, (MuonDimensionNumbers, optax.MaskedNode))
  entries = dict(jax.tree_util.tree_leaves_with_path(given, is_leaf=is_entry))
  found = {}
  for path, leaf in leaves:
    name, shape = pytrees.name_of(path), jnp.shape(leaf)
    if numbers is None:
      is_matrix = len(shape) >= 2 and pytrees.is_inexact(leaf)
      entry = MuonDimensionNumbers(-2, -1) if is_matrix else None
    else:
      prefix = pytrees.prefix_in(path, entries)
      if prefix is None:
        raise ValueError(f"muon_weight_dimension_numbers has no entry for params{name}.")
      entry = entries[prefix]
    if entry is None:
      continue
    if not isinstance(entry, MuonDimensionNumbers):
      raise TypeError(
        f"muon_weight_dimension_numbers has a {type(entry).__name__} for params{name}; it takes"
        " optax.contrib.MuonDimensionNumbers, or None for AdamW."
      )
    found[name] = axes = Axes.of(entry, shape, name)
    if adaptive and len(axes.reduction + axes.output) < len(shape):
      raise ValueError(
        f"params{name} of shape {shape} is a stack of matrices, over which Optax's adaptive=True"
        " would take one norm. Give each matrix a leaf of its own, or leave adaptive out."
      )
  return found
