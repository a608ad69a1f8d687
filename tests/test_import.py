"""What importing the library, and a step on a CPU, import with it."""

import subprocess
import sys

import pytest

STEP = """
import jax, jax.numpy as jnp
from optax_lowmem import adamw, init, step
params, state = init(adamw(1e-3), {"w": jnp.ones((64, 64))})
jax.jit(lambda g, s, p: step(adamw(1e-3), g, s, p))(params, state, params)
"""
LATER = ("flax.nnx", "jax.experimental.pallas", "safetensors", "orbax", "pytest")


@pytest.mark.parametrize("code", ["", STEP], ids=["import", "step"])
def test_what_is_imported_later(code):
  """Half of the time to import the library, which most users would wait for in vain."""
  program = (
    f"import optax_lowmem{code}\nimport sys; print([x for x in {LATER} if x in sys.modules])"
  )
  run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert run.stdout.strip() == "[]"


def test_nnx_is_there():
  program = "import optax_lowmem as l; assert 'nnx' in dir(l); print(l.nnx.Optimizer.__name__)"
  run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert run.stdout.strip() == "Optimizer"
