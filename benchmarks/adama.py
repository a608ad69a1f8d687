"""The effect of AdamA accumulation on the loss: gradient release of a batch in n micro-batches.

  python -m benchmarks.adama

Trains the demo's GPT on Shakespeare's plays with `lowmem.adam`, from the same
weights and on the same batches for every n. n = 1 is the whole batch, which true
accumulation equals up to rounding. "/ sqrt(n)" divides the learning rate by
sqrt(n). The last column is the ratio of the blocks' largest second moments to
those of the whole batch. Writes `benchmarks/results/adama.json`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.step import log, report
from examples import data, gpt, training
import optax_lowmem as lowmem

STEPS, BATCH, CONTEXT, SEEDS, RATE = 300, 32, 64, 3, 1e-3


def train(n: int, rate: float, seed: int) -> tuple[float, float]:
  """Trains once; returns the held-out loss and the mean second moment."""
  text, held_out, alphabet = data.plays()
  model = gpt.GPT(len(alphabet), 2, 96, 4, CONTEXT, jnp.bfloat16)
  rng = np.random.default_rng(seed)
  first = data.sample_windows(text, rng, BATCH, CONTEXT)
  params = jax.jit(model.init)(jax.random.key(seed), first[:, :-1])["params"]
  tx = lowmem.adam(optax.warmup_cosine_decay_schedule(0.0, rate, STEPS // 20, STEPS))
  params, state = lowmem.init(tx, params)
  loss_fn = functools.partial(gpt.loss_fn, model)
  step = jax.jit(lowmem.fused_backward(loss_fn, tx, accumulate=n), donate_argnums=(0, 1))
  for _ in range(STEPS):
    batch = data.sample_windows(text, rng, BATCH, CONTEXT)
    _, params, state = step(params, state, batch)
  evaluate = jax.jit(lambda params, batch: gpt.loss_fn(model, training.all_layers(params), batch))
  tests = data.even_windows(held_out, 512, CONTEXT).reshape(-1, 64, CONTEXT + 1)
  held = float(np.mean([evaluate(params, batch) for batch in tests]))
  nu = state.inner_state.inner_state[0].nu
  # nu stores square roots in int8; the scale of a block is its largest root.
  scales = [x for x in jax.tree.leaves(nu) if x.dtype == jnp.bfloat16]
  mean = np.mean(np.concatenate([np.ravel(np.float32(x)) ** 2 for x in scales]))
  return held, float(mean)


def run() -> dict:
  """Measures the table."""
  rows = []
  for n in (1, 2, 4, 8):
    for name, rate in (("as it is", RATE), ("/ sqrt(n)", RATE / n**0.5)):
      if n == 1 and rows:
        continue
      results = [train(n, rate, seed) for seed in range(SEEDS)]
      held, moments = (np.array(x) for x in zip(*results, strict=True))
      if n == 1:
        base, base_moments = held, moments
      difference = held - base
      rows.append(
        {
          "micro-batches": n,
          "learning rate": name,
          "held-out loss": float(held.mean()),
          "minus whole batch": float(difference.mean()),
          "standard error": float(difference.std(ddof=1) / SEEDS**0.5),
          "second moment / whole batch's": float(np.mean(moments / base_moments)),
        }
      )
      log(rows[-1])
  return {
    "device": jax.devices()[0].device_kind,
    "tables": {f"AdamA, {STEPS} steps, batches of {BATCH}, {SEEDS} seeds": rows},
  }


if __name__ == "__main__":
  report(run, "adama")
