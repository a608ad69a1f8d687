"""Optax's own alias_test, which ships in its wheel, run against delta_bits(optax.<each>).

The tests' table of optimizers stays; what each name makes is wrapped. Where a
parameter is half precision its format is dtype+8. `update_dtype="gradient"`
is used where a test demands the gradient's dtype back. What cannot pass:

- `test_explicit_dtype` with bfloat16 parameters and no dtype given for the
  moment expects the parameters' dtype; `inner` sees float32 masters (law 9),
  so the moment is float32.
"""

import functools

import jax.numpy as jnp
import optax
from optax._src import alias as optax_alias
from optax._src import alias_test

import optax_lowmem as lowmem

GRADIENT_DTYPE_TESTS = (
  "test_preserve_dtype",
  "test_state_shape_dtype_shard_stability",
  "test_gradient_accumulation",
)


def weights(path, leaf):
  del path
  return {jnp.bfloat16: "bf16+8", jnp.float16: "fp16+8"}.get(jnp.dtype(leaf.dtype).type, "fp32")


class Wrapped:
  """`optax._src.alias` with every optimizer inside delta_bits."""

  update_dtype = jnp.float32

  def __getattr__(self, name):
    factory = getattr(optax_alias, name)

    @functools.wraps(factory)  # inject_hyperparams reads the signature
    def make(*args, **kwargs):
      return lowmem.delta_bits(factory(*args, **kwargs), weights, update_dtype=self.update_dtype)

    return make


class AliasTest(alias_test.AliasTest):
  """The same tests, on the wrapped module."""

  def setUp(self):
    super().setUp()
    wrapped = Wrapped()
    if any(name in self._testMethodName for name in GRADIENT_DTYPE_TESTS):
      wrapped.update_dtype = "gradient"
    self._original = alias_test.alias
    alias_test.alias = wrapped

  def tearDown(self):
    alias_test.alias = self._original
    super().tearDown()


def _expects_float32(self):
  """The exceptions of `test_explicit_dtype` (see above): the moment is float32, not bfloat16."""
  params = jnp.array([0.0, 0.0], jnp.bfloat16)
  for inner, name in (
    (optax_alias.sgd(0.1, momentum=0.9), "trace"),
    (optax_alias.adamw(0.1), "mu"),
  ):
    state = lowmem.delta_bits(inner, weights).init(params)
    self.assertEqual(optax.tree.get(state, name).dtype, jnp.float32)


# bfloat16 parameters without a state dtype, of sgd, adam and adamw
for _number in (9, 10, 11):
  setattr(AliasTest, f"test_explicit_dtype{_number}", _expects_float32)
