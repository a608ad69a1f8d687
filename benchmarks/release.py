"""Gradient release: the peak memory of training steps on a GPU, and their time on a CPU.

  python -m benchmarks.release h100-compile
  python -m benchmarks.release cpu

h100-compile: compiles for an H100 and an L40S that need not be present (the
`h100` extra), and reports the peak memory of a training step by part: for a 0.8B
transformer and for a model with the shapes of Llama 3.1 8B. Nothing is executed.

cpu: times a jitted, donated training step with the optimizer in the backward
pass, relative to the same step with its gradients kept, which rematerialises the
same layers. All steps take turns within one process.

Each command prints tables and writes `benchmarks/results/release_NAME.json`.
"""

import argparse
import functools
import os
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import contenders, llama, shapes
from benchmarks.step import gpu_compiler, log, nbytes, report, seconds
import optax_lowmem as lowmem

GIB = 2**30
ADAMW = lowmem.adamw(1e-3)
FP16 = lowmem.dynamic_loss_scale(lowmem.adamw(1e-3, weights="fp16+8"))


def stacked_loss(layers, x):
  """The loss of `shapes.transformer_loss` on stacked layers."""
  y = layers["layers"].scan(lambda w, x: shapes.layer(x, w)[0], x)
  return jnp.mean(y.astype(jnp.float32) ** 2)


def separate_loss(layers, x):
  """The same loss, with its layers called one by one."""
  for key in layers:
    x = layers[key](lambda w, x: shapes.layer(x, w)[0], x)
  return jnp.mean(x.astype(jnp.float32) ** 2)


def unreleased(loss_fn, contender):
  """A training step that keeps its gradients and rematerialises each layer."""

  def step(params, state, *batch):
    def loss(params):
      layers = {key: llama.Plain(w) for key, w in params.items()}
      return lowmem.scale_loss(loss_fn(layers, *batch), state)

    grads = jax.grad(loss)(params)
    return contender.step(grads, state, params)

  return step


def h100_compile(parser) -> dict:
  """Reports peak memory, compiled for GPUs."""
  h100 = gpu_compiler(parser)
  peer = contenders.flashoptim_jax()
  ours = contenders.ours("adamw, bf16+8, int8, gradients kept", ADAMW)
  fp16 = contenders.ours("dynamic_loss_scale(adamw), fp16+8", FP16, contenders.FP16)

  def compiled(contender, params, f, batch, target="h100"):
    params, state = jax.eval_shape(contender.init, params)
    structs = h100.on_device((params, state, *batch), target)
    (device,) = h100.sharding(target).device_set
    with contender.context(device):
      return h100.compiled(f, *structs, donate=(0, 1)), params, state

  small, large = [], []
  stacked = {"layers": shapes.structs(shapes.TRANSFORMER)}
  one = {name: shape[1:] for name, shape in shapes.TRANSFORMER.items()}
  separate = {f"{i:02}": shapes.structs(one) for i in range(shapes.LAYERS)}
  count = shapes.count(shapes.TRANSFORMER)
  released = lambda loss, tx=ADAMW, **options: lowmem.fused_backward(loss, tx, **options)
  clipped = contenders.ours(
    "optax.clip_by_global_norm, gradients kept",
    optax.chain(optax.clip_by_global_norm(1.0), ADAMW),
  )
  rows: list = [
    ("released: adamw, bf16+8, int8", ours, released(stacked_loss)),
    ("released, clip_norm", ours, released(stacked_loss, clip_norm=1.0)),
    ("released, dynamic_loss_scale, fp16+8", fp16, released(stacked_loss, FP16)),
    *(
      (c.name, c, unreleased(stacked_loss, c))
      for c in (ours, clipped, contenders.FP32_ADAMW, contenders.BF16_ADAMW, *peer)
    ),
    ("one by one: released", ours, released(separate_loss)),
    ("one by one: released, clip_norm", ours, released(separate_loss, clip_norm=1.0)),
    ("one by one: gradients kept", ours, unreleased(separate_loss, ours)),
    (
      "one by one: clip_by_global_norm, gradients kept",
      clipped,
      unreleased(separate_loss, clipped),
    ),
  ]
  for name, contender, step in rows:
    params = separate if name.startswith("one by one") else stacked
    x = jax.ShapeDtypeStruct((shapes.TOKENS, shapes.WIDTH), contender.dtype)
    done, params_low, state = compiled(contender, params, step, (x,))
    peak = done.memory_analysis().peak_memory_in_bytes
    small.append(
      {
        "step": name,
        "resident bytes/param": nbytes((params_low, state)) / count,
        "peak bytes/param": peak / count,
      }
    )
    log(small[-1])

  tokens = jax.ShapeDtypeStruct((llama.TOKENS + 1,), jnp.int32)
  count = sum(x.size for x in jax.tree.leaves(llama.structs()))
  inputs = llama.LAYERS * llama.TOKENS * llama.WIDTH
  rows = [
    ("released: adamw, bf16+8, int8", ours, released(llama.loss), "h100"),
    ("released: adamw, bf16+8, int8", ours, released(llama.loss), "l40s"),
    *(
      (c.name, c, unreleased(llama.loss, c), "h100")
      for c in (ours, contenders.BF16_ADAMW, *peer, contenders.FP32_ADAMW)
    ),
  ]
  for name, contender, step, target in rows:
    done, params_low, state = compiled(contender, llama.structs(), step, (tokens,), target)
    stats = done.memory_analysis()
    table = lowmem.memory_table(params_low, state) if contender.is_ours else None
    size = table.bytes_per_param if table else {"weights": jnp.dtype(contender.dtype).itemsize}
    part = lambda key, size=size: size[key] * count / GIB if key in size else None
    saved = inputs * jnp.dtype(contender.dtype).itemsize
    large.append(
      {
        "step": name,
        "GPU": target.upper(),
        "weights": part("weights"),
        "residuals": part("residuals"),
        "other state": (nbytes((params_low, state)) / GIB)
        - sum(part(key) or 0 for key in ("weights", "residuals")),
        "layer inputs": saved / GIB,
        "other temporaries": (stats.peak_memory_in_bytes - nbytes((params_low, state)) - saved)
        / GIB,
        "peak GiB": stats.peak_memory_in_bytes / GIB,
      }
    )
    log(large[-1])
  return {
    "device": "compiled for, not run",
    "parameters": {"0.8B": shapes.count(shapes.TRANSFORMER), "Llama 3.1 8B shapes": count},
    "tables": {
      "A training step, 0.8B parameters, 256 tokens": small,
      f"A training step, Llama 3.1 8B shapes, {llama.TOKENS} tokens, GiB": large,
    },
    "absent": {} if peer else {"flashoptim-jax": "not installed"},
  }


LAYERS, WIDTH, VOCABULARY = 8, 512, 4096
MODEL = {
  "embed": {"table": (VOCABULARY, WIDTH)},
  "layers": {
    "qkv": (LAYERS, WIDTH, 3 * WIDTH),
    "out": (LAYERS, WIDTH, WIDTH),
    "up": (LAYERS, WIDTH, 4 * WIDTH),
    "down": (LAYERS, 4 * WIDTH, WIDTH),
  },
  "head": {"kernel": (WIDTH, VOCABULARY)},
}


def language_loss(layers, tokens):
  """The mean cross-entropy of the next tokens of a batch of sequences, in nats."""

  def block(w, x):
    return jax.vmap(lambda x: shapes.layer(x, w)[0])(x)

  def head(w, x, targets):
    logits = (x @ w["kernel"]).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)

  x = layers["embed"](lambda w, t: w["table"][t], tokens[:, :-1])
  x = layers["layers"].scan(block, x)
  return layers["head"](head, x, tokens[:, 1:])


def cpu(parser) -> dict:
  """Times training steps."""
  del parser
  jax.config.update("jax_platforms", "cpu")
  is_shape = lambda x: isinstance(x, tuple)
  key = jax.random.key(0)
  params = jax.tree.map(lambda s: 0.02 * jax.random.normal(key, s), MODEL, is_leaf=is_shape)
  count = sum(x.size for x in jax.tree.leaves(params))
  scaled = lowmem.dynamic_loss_scale(ADAMW)
  ours = lambda tx: unreleased(language_loss, contenders.ours("", tx))
  steps = {
    "gradients kept": (ADAMW, ours(ADAMW)),
    "released": (ADAMW, lowmem.fused_backward(language_loss, ADAMW)),
    "released, clip_norm": (ADAMW, lowmem.fused_backward(language_loss, ADAMW, clip_norm=1.0)),
    "loss scale, gradients kept": (scaled, ours(scaled)),
    "loss scale, released": (scaled, lowmem.fused_backward(language_loss, scaled)),
    "released, accumulate=4": (ADAMW, lowmem.fused_backward(language_loss, ADAMW, accumulate=4)),
  }
  rows = []
  for tokens in ((4, 64), (4, 256)):
    batch = np.random.default_rng(0).integers(0, VOCABULARY, (tokens[0], tokens[1] + 1))
    runs, temporaries = {}, {}
    for name, (tx, step) in steps.items():
      state = lowmem.init(tx, params)
      # fused_backward returns the loss, too.
      last_two = lambda *args, step=step: step(*args)[-2:]
      done = jax.jit(last_two, donate_argnums=(0, 1)).lower(*state, batch).compile()
      stats = done.memory_analysis()
      # Buffers are donated in the order of the results, so every step is in place.
      assert stats.alias_size_in_bytes == nbytes(state), name
      temporaries[name] = stats.temp_size_in_bytes
      runs[name] = _Stepper(done, state, batch)
      seconds(runs[name], 2)
      log(f"{tokens}: {name}: warm")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(7):
      for name, run in runs.items():
        times[name].append(seconds(run))
    first = times["gradients kept"]
    for name, values in times.items():
      rows.append(
        {
          "tokens": f"{tokens[0]} x {tokens[1]}",
          "step": name,
          "ms, min": min(values) * 1e3,
          "ms, median": statistics.median(values) * 1e3,
          "ratio of min": min(values) / min(first),
          "ratio of median": statistics.median(values) / statistics.median(first),
          "temporaries, bytes/param": temporaries[name] / count,
        }
      )
  about = dict(cores=os.cpu_count(), load=os.getloadavg()[0], parameters=count, rounds=7)
  return {**about, "tables": {"A training step on the CPU": rows}}


class _Stepper:
  """A compiled step and its state."""

  def __init__(self, step, state, batch):
    self.step, self.state, self.batch = step, state, batch

  def __call__(self):
    self.state = self.step(*self.state, self.batch)
    return self.state


def main():
  """Runs one command, prints its tables and writes them to a file."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  commands = {"h100-compile": h100_compile, "cpu": cpu}
  parser.add_argument("command", choices=commands)
  args = parser.parse_args()
  name = "release_" + args.command.replace("-", "_")
  report(functools.partial(commands[args.command], parser), name)


if __name__ == "__main__":
  main()
