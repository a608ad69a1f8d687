"""Law 13: what is not finite stays so, in every program, format and place in a block."""

import functools
import math

import chex
from conftest import assert_trees_equal, float32_classes, updated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_fused_update import INT4, STATISTICS, adam, bound, make_leaf, step

import optax_lowmem as lowmem
from pallas_kernels.formats import arithmetic, state_formats
from pallas_kernels.formats.state_formats import BLOCK, Blocks, StateFormat
from pallas_kernels.programs import cpu
from pallas_kernels.programs.hoist import hoist
from pallas_kernels.programs.xla import step_in_stack, step_leaf

BAD = (np.nan, np.inf, -np.inf)
# Every second row has one such value, at each place of a block. From 128 blocks on, XLA:CPU's
# maximum is another one.
SHAPE = (2 * len(BAD) * BLOCK, BLOCK)
IS_BAD = np.zeros(SHAPE, bool)
IS_BAD[np.arange(0, SHAPE[0], 2), np.tile(np.arange(BLOCK), len(BAD))] = True
VALUES = np.zeros(SHAPE, np.float32)
VALUES[IS_BAD] = np.repeat(BAD, BLOCK)


def lion(g, w, values):
  (m,) = values
  return -1e-2 * (jnp.sign(0.9 * m + 0.1 * g) + 0.01 * w), [0.99 * m + 0.01 * g]


def momentum(g, w, values):
  (m,) = values
  return -0.1 * (g + 0.9 * m), [g + 0.9 * m]


def run(program, rule, leaf, fmt, formats):
  """One step of the leaf."""
  if program == "kernel":
    return step([leaf], "mosaic_gpu", fmt, formats, rule=rule)[0]
  if program.startswith("chunk"):
    return step([leaf], None, fmt, formats, rule=rule)[0]
  both = lowmem.DeltaFormat.parse(fmt), formats
  if program == "plain":
    return jax.jit(functools.partial(step_leaf, bound(rule, both, leaf), both, False))(leaf, None)
  stack = jax.tree.map(lambda x: jnp.stack([x, x]), leaf[1:4])
  leaf = leaf._replace(**dict(zip(("low", "delta", "statistics"), stack, strict=True)))
  call = jax.jit(functools.partial(step_in_stack, bound(rule, both, leaf), both, False))
  return jax.tree.map(lambda x: x[1], call(leaf, None, jnp.int32(1)))


def assert_not_finite(stored, formats):
  """The bad values in the stored statistics; and nothing in the blocks without one."""
  for x, f in zip(stored, formats, strict=True):
    finite = np.isfinite(np.asarray(state_formats.dequantize(x, f)))
    assert not finite[IS_BAD].any(), f
    assert finite[1::2].all(), f


CASES = [
  (adam, "bf16+8", "int8"),
  (adam, "bf16+0", "fp16"),
  (adam, "bf16+16", "bf16"),
  (adam, "fp16+8", "int8"),
  (lion, "bf16+8", "int8"),
  (momentum, "bf16+8", "fp16"),
]
# No kernel takes "int4".
EVERY = [(program, *case) for program in ("plain", "stack", "chunk", "chunks") for case in
         [*CASES, (adam, "bf16+0", "int4")]] + [("kernel", *case) for case in CASES]  # fmt: skip


@pytest.mark.parametrize("program, rule, fmt, name", EVERY, ids=lambda x: getattr(x, "__name__", x))
def test_programs(program, rule, fmt, name, monkeypatch):
  """One gradient that is not finite, then finite ones."""
  if program == "chunks":
    monkeypatch.setattr(cpu, "CHUNK", 50)
    assert math.prod(SHAPE) // BLOCK > 2 * cpu.CHUNK
  formats = (STATISTICS | {"int4": INT4})[name]
  leaf = make_leaf(SHAPE, fmt, formats)
  formats = formats[: 2 if rule is adam else 1]
  leaf = leaf._replace(statistics=leaf.statistics[: len(formats)])
  good = leaf.gradient
  bad = jnp.where(IS_BAD, jnp.asarray(VALUES, good.dtype), good)
  wide = lowmem.merge(leaf.low, leaf.delta, fmt)
  old = [state_formats.dequantize(x, f) for x, f in zip(leaf.statistics, formats, strict=True)]
  wanted = wide + rule(arithmetic.as_float32(bad), wide, old)[0]
  for gradient in (bad, good):
    low, delta, statistics = run(program, rule, leaf._replace(gradient=gradient), fmt, formats)
    assert_not_finite(statistics, formats)
    # The sign of an infinity is finite; what is NaN stays so.
    finite = np.isfinite(np.asarray(lowmem.merge(low, delta, fmt)))
    assert not finite[~np.isfinite(wanted)].any()
    assert finite[1::2].all()
    leaf = leaf._replace(low=low, delta=delta, statistics=statistics)
  # Finite gradients do not cure it, either.
  assert not finite[np.isnan(VALUES)].any()


OPTIMIZERS = {
  "adamw int8": lambda **how: lowmem.adamw(1e-3, **how),
  "adamw int4": lambda **how: lowmem.adamw(1e-3, mu="int4", nu="int4", **how),
  "adamw fp16": lambda **how: lowmem.adamw(1e-3, mu="fp16", nu="fp16", **how),
  "adamw bf16": lambda **how: lowmem.adamw(1e-3, mu="bf16", nu="bf16", **how),
  "adamw fp32": lambda **how: lowmem.adamw(1e-3, mu="fp32", nu="fp32", **how),
  "lion": lambda **how: lowmem.lion(1e-3, **how),
  "sgd": lambda **how: lowmem.sgd(0.1, momentum=0.9, nesterov=True, **how),
}


@pytest.mark.parametrize("how", [lowmem.step, updated])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(how, name):
  """`lowmem.step` on a CPU, and `tx.update`, where float32 weights of Optax have it."""
  tx, inner = OPTIMIZERS[name](), None
  weights = {"w": 0.02 * jax.random.normal(jax.random.key(0), SHAPE)}
  params, state = lowmem.init(tx, weights)

  call = jax.jit(functools.partial(how, tx))
  bad = {"w": jnp.asarray(np.where(IS_BAD, VALUES, 1), jnp.bfloat16)}
  good = {"w": jnp.ones(SHAPE, jnp.bfloat16)}
  for number, grads in enumerate((bad, good)):
    params, state = call(grads, state, params)
    finite = np.isfinite(np.asarray(lowmem.master_params(params, state)["w"]))
    chex.assert_trees_all_equal(np.isfinite(np.asarray(params["w"], np.float32)), finite)
    assert finite[1::2].all()
    # The sign of infinity is finite.
    wanted = np.isnan(VALUES) if name == "lion" else IS_BAD
    assert not finite[wanted].any(), number
    inner = state.inner_state
    table = dict(inner.formats.table)
    found = [
      state_formats.dequantize(x, table[jax.tree_util.keystr(path)].format)
      if jax.tree_util.keystr(path) in table
      else x
      for path, x in jax.tree_util.tree_leaves_with_path(
        inner.inner_state, is_leaf=lambda x: isinstance(x, Blocks)
      )
    ]
    found = [np.asarray(x) for x in found if x.shape == SHAPE]
    assert len(found) == (2 if name.startswith("adamw") else 1)
    for x in found:
      assert not np.isfinite(x[IS_BAD]).any()
      chex.assert_tree_all_finite(x[1::2])


@pytest.mark.parametrize("is_square", [False, True])
@pytest.mark.parametrize("name", state_formats.NAMES)
def test_stored(name, is_square):
  """Every class of NaN, and negative squares, whose roots are NaN."""
  f = StateFormat(name, is_square)
  x = float32_classes(1 << 12)
  x = x[~np.isfinite(x)]
  rows = np.ones((len(x), BLOCK), np.float32)
  places = np.arange(len(x)), np.arange(len(x)) % BLOCK
  rows[places] = x
  bits = jax.random.bits(jax.random.key(0), rows.shape)
  for quantize in (state_formats.quantize, jax.jit(state_formats.quantize, static_argnums=1)):
    stored = quantize(jnp.asarray(rows), f, bits)
    assert not np.isfinite(np.asarray(state_formats.dequantize(stored, f)))[places].any()


def test_sign_in_kernels():
  """`jnp.sign`, but for the NaN that Mosaic GPU's own would make 1 or -1 of; zeros keep theirs."""
  x = float32_classes(1 << 12)
  x = jnp.asarray(x[(np.abs(x) >= 2.0**-126) | (x == 0) | np.isnan(x)])
  same_nan = lambda x: jnp.where(jnp.isnan(x), jnp.nan, x)
  assert_trees_equal(same_nan(arithmetic.sign_of(x)), same_nan(jnp.sign(x)))
  struct = jax.ShapeDtypeStruct((32, 32), jnp.float32)
  scalars, rest = hoist(jnp.sign, (struct,))
  in_kernel = jax.make_jaxpr(functools.partial(rest, products=(False,)))
  assert " sign " not in str(in_kernel(scalars, struct))
