"""Peak memory of the papers' models at full size, and of CLIP's recipe, compiled for H100s.

  python -m benchmarks.papers [NAME ...]

The devices need not be present (the `h100` extra), and nothing is executed. Prints tables and
writes `benchmarks/results/papers_NAME_h100_compile.json`. Every row is a whole training step with
AdamW.
"""

import argparse
from collections.abc import Callable
import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

from benchmarks.step import gpu_compiler, log, report
from examples import clip, clip_model, dcgan, dlrm, resnet18, t5, training

GIB = 2**30
BASELINE = "master-bf16"
KEPT, AGAIN, RELEASE = "kept", "computed again", "computed again; gradients released"
# (format, treatment of a layer's activations, and of gradients).
ROWS = (
  ("fp32", KEPT),
  (BASELINE, KEPT),
  ("bf16+8/int8", KEPT),
  (BASELINE, AGAIN),
  ("bf16+8/int8", AGAIN),
  ("bf16+8/int8", RELEASE),
  ("bf16+0/int8", RELEASE),
)
# On several devices, XLA's scheduler hides communication by recomputing the layers' activations
# long before they are needed, and then keeps them all.
IN_ORDER = {"xla_gpu_enable_latency_hiding_scheduler": False}
OPTIONS = dict(optimizer="adamw", learning_rate=1e-3, steps=1000, clip_norm=None)


class Workload(NamedTuple):
  """A model at its full size.

  Attributes:
    title: its name and sizes.
    make: dtype -> task.
    batch: the shapes and dtypes of a batch.
  """

  title: str
  make: Callable[[Any], training.Task]
  batch: tuple[jax.ShapeDtypeStruct, ...]


def _task(init, loss_fn) -> training.Task:
  return training.Task(init, loss_fn, lambda rng: iter(()), lambda params, kept: {})


def _resnet18(dtype):
  model = resnet18.ResNet18(64, 1000, dtype)
  return _task(lambda key: model.init(key, (224, 224, 3)), model.loss)


def _dcgan(dtype):
  model = dcgan.DCGAN(64, 64, 3, dtype)
  return _task(model.init, model.loss)


def _t5_large(dtype):
  sizes = types.SimpleNamespace(layers=24, width=1024, heads=16, head_width=64, hidden=4096)
  model = t5.T5(sizes, (32128, 32128), dtype)
  loss = lambda layers, kept, *batch: (model.loss(layers, *batch), kept)
  return _task(lambda key: (model.init(key), {}), loss)


def _dlrm(dtype):
  model = dlrm.DLRM((10_000_000,) * 4 + (1000,) * 22, 13, 64, (512, 256), dtype)
  return _task(lambda key: (model.init(key), {}), model.loss)


def _parameters(dtype):
  """A model of parameters alone, each with a gradient (the synthetic case of 2309.12381)."""

  def loss(layers, kept, x):
    for i in range(16):
      x = layers[f"w{i}"](lambda w, x: (x @ w.astype(dtype)).astype(x.dtype), x)
    return jnp.mean(x.astype(jnp.float32) ** 2), kept

  init = lambda key: ({f"w{i}": jnp.zeros((8192, 8192)) for i in range(16)}, {})
  return _task(init, loss)


def _struct(dtype, *shape):
  return jax.ShapeDtypeStruct(shape, dtype)


F32, I32 = jnp.float32, jnp.int32
WORKLOADS = {
  "resnet18": Workload(
    "ResNet-18, 224 px, batch 256",
    _resnet18,
    (_struct(F32, 256, 224, 224, 3), _struct(I32, 256)),
  ),
  "t5": Workload(
    "T5-large, batch 8, 512 source and 128 target tokens",
    _t5_large,
    (_struct(I32, 8, 512), _struct(I32, 8, 129)),
  ),
  "dlrm": Workload(
    "DLRM, four tables of 10M rows, batch 2048",
    _dlrm,
    (_struct(I32, 2048, 26), _struct(F32, 2048, 13), _struct(F32, 2048)),
  ),
  "dcgan": Workload(
    "DCGAN, 64 px, batch 128",
    _dcgan,
    (_struct(F32, 128, 64, 64, 3), _struct(F32, 128, dcgan.NOISE)),
  ),
  "parameters": Workload(
    "1.1B parameters alone (16 matrices, batch 1)", _parameters, (_struct(jnp.bfloat16, 1, 8192),)
  ),
}


def compiled(task, fmt, args, batch, place, make_optimizer=training.make_optimizer, options=None):
  """Compiles a training step.

  Args:
    task: the task.
    fmt: the format of weights and statistics.
    args: the options.
    batch: structs on devices.
    place: tree of structs -> the same structs on devices.
    make_optimizer: as in `training.train`.
    options: compiler options.

  Returns:
    The compiled program, and the number of parameters.
  """
  tx = make_optimizer(fmt, args, 0)
  params32, kept = jax.eval_shape(task.init, jax.random.key(0))
  params, opt_state = jax.eval_shape(lambda p: training.init(fmt, tx, p), params32)
  step = training.make_step(task, tx, args, training.is_released(fmt, args))
  traced = jax.jit(step, donate_argnums=(0, 1, 2)).trace(*place((params, opt_state, kept)), *batch)
  return traced.lower().compile(options), sum(x.size for x in jax.tree.leaves(params))


def peaks_of(workload: Workload, place) -> list[dict]:
  """Compiles a row for each format and treatment of activations."""
  rows: list[dict] = []
  for name, activations in ROWS:
    fmt = training.parse_format(name)
    args = types.SimpleNamespace(
      **OPTIONS, release=activations == RELEASE, checkpointing=activations == AGAIN
    )
    task = workload.make(fmt.dtype)
    program, count = compiled(task, fmt, args, place(workload.batch), place)
    peak = program.memory_analysis().peak_memory_in_bytes
    rows.append(
      {
        "format": name,
        "activations": activations,
        "peak GiB": peak / GIB,
        "peak bytes/param": peak / count,
      }
    )
    log(rows[-1])
  return compared(rows)


def compared(rows: list[dict]) -> list[dict]:
  """Compares each row with the baseline of the same treatment of activations.

  Args:
    rows: format, activations, peak GiB, peak bytes/param.

  Returns:
    The rows with two more columns: the relative reduction of the peak, and that
    reduction divided by the baseline's weights and statistics. Those take 12
    bytes a parameter at all times (gradients come and go).
  """
  bases = {row["activations"]: row for row in rows if row["format"] == BASELINE}
  out = []
  for row in rows:
    base = bases[KEPT if row["activations"] == KEPT else AGAIN]
    state = 12 / base["peak bytes/param"]
    less = 1 - row["peak GiB"] / base["peak GiB"]
    if row is base:
      new = {"lower by": "", "of weights and state": f"({state:.0%} of the peak)"}
    elif row["format"] == "fp32":
      new = {"lower by": f"{less:.0%}", "of weights and state": ""}
    else:
      new = {"lower by": f"{less:.0%}", "of weights and state": f"{less / state:.0%}"}
    out.append(row | new)
  return out


def clip_peaks(devices) -> list[dict]:
  """Compiles CLIP at full size for sixteen devices, with each option of its recipe on and off."""
  mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
  whole, cut = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
  on = lambda sharding: (
    lambda tree: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )
  )
  size, context = clip_model.VIT_B_32.image_size, clip_model.VIT_B_32.context
  batch = (_struct(F32, 32768, size, size, 3), _struct(I32, 32768, context))
  everything = dict(
    format="bf16+8/bf16", text_format="bf16+0", checkpointing=True, shards_similarities=True
  )
  variants = {
    "everything": {},
    "no gradient checkpointing": {"checkpointing": False},
    "similarities not sharded": {"shards_similarities": False},
    "statistics in float32": {"format": "bf16+8/fp32"},
    "text encoder as elsewhere": {"text_format": ""},
    "mixed precision with float32 masters": {"format": "master-bf16"},
    "float32": {"format": "fp32"},
  }
  rows = []
  for name, changed in variants.items():
    options = everything | changed
    fmt = training.parse_format(options["format"])
    args = types.SimpleNamespace(
      **OPTIONS,
      release=False,
      checkpointing=options["checkpointing"],
      text_format=options["text_format"],
    )
    model = clip_model.CLIP(clip_model.VIT_B_32, fmt.dtype)
    shards = mesh if options["shards_similarities"] else None

    def loss(layers, kept, images, tokens, model=model, shards=shards):
      return model.loss(layers, images, tokens, shards), kept

    task = _task(lambda key, model=model: (model.init(key), {}), loss)
    task = task._replace(project=clip_model.clip_temperature)
    program, _ = compiled(task, fmt, args, on(cut)(batch), on(whole), clip.make_optimizer, IN_ORDER)
    stats = program.memory_analysis()
    rows.append(
      {
        "CLIP ViT-B/32, batch 32,768, sixteen H100s": name,
        "peak GiB/device": stats.peak_memory_in_bytes / GIB,
        "state and batch GiB/device": stats.argument_size_in_bytes / GIB,
      }
    )
    log(rows[-1])
  return rows


def run(name: str, parser) -> dict:
  """Compiles the table of a workload."""
  h100 = gpu_compiler(parser)
  if name == "clip":
    return {"tables": {"CLIP's memory recipe": clip_peaks(h100.devices("2x1x8"))}}
  return {"tables": {WORKLOADS[name].title: peaks_of(WORKLOADS[name], h100.on_device)}}


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  choices = [*WORKLOADS, "clip"]
  parser.add_argument("names", nargs="*", help=f"any of {', '.join(choices)}; default: all")
  names = parser.parse_args().names or choices
  if unknown := set(names) - set(choices):
    parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(choices)}")
  for name in names:
    report(functools.partial(run, name, parser), f"papers_{name}_h100_compile")
