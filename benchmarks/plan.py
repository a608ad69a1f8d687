"""How true is a plan? Planned peaks of six examples against measured ones, on this CPU.

  python -m benchmarks.plan [NAME ...]
  python -m benchmarks.plan --h100

Each model has a process of its own, with synthetic data. The process compiles the step, and notes
its resident memory. Then it makes parameters, state and batch, and takes two steps. Measured is
the most that was resident during these steps, less what was noted. So it holds the arguments, what
XLA allocates, what its libraries allocate without telling XLA, and what the allocator loses.

Prints a table and writes `benchmarks/results/plan_cpu.json`.

--h100: plans the step of `make demo` and of Llama 3.1 8B's shapes, compares the peak with that of
the same step compiled by hand, and takes the seconds. Writes `benchmarks/results/plan_h100.json`.
"""

import argparse
from collections.abc import Callable, Mapping
import ctypes
import functools
import gc
import json
import os
import platform
import subprocess
import sys
import time
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import llama
from benchmarks.step import gpu_compiler, log, report, verdict
from examples import dcgan, dlrm, lstm, resnet18, shakespeare, t5, training
import optax_lowmem as lowmem
from optax_lowmem.planner.estimate import estimate

FORMAT = "bf16+8/int8"
# glibc keeps what is freed below its threshold, which grows: what one step freed would be missing
# in the peak of the next.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "65536"}
MIB = 2**20


class Workload(NamedTuple):
  """A model of `examples/` that takes some hundred MiB.

  Attributes:
    title: its name and sizes.
    make: dtype -> task.
    batch: the shapes and dtypes of a batch.
    checkpointing: whether its layers are computed again in the backward pass.
    sizes: what the formula is told of its activations.
  """

  title: str
  make: Callable[[Any], training.Task]
  batch: tuple[jax.ShapeDtypeStruct, ...]
  checkpointing: bool = False
  sizes: Mapping[str, int] = types.MappingProxyType({})


def _task(init, loss) -> training.Task:
  return training.Task(init, loss, lambda rng: iter(()), lambda params, kept: {})


def _shakespeare(dtype):
  sizes = {"layers": 8, "width": 768, "heads": 12, "context": 256, "eval_windows": 1}
  return shakespeare.make_task(types.SimpleNamespace(**sizes), dtype)


def _lstm(dtype):
  return lstm.make_task(types.SimpleNamespace(layers=2, width=1024, context=64), dtype)


def _t5(dtype):
  sizes = types.SimpleNamespace(layers=4, width=512, heads=8, head_width=64, hidden=2048)
  model = t5.T5(sizes, (32128, 32128), dtype)
  loss = lambda layers, kept, *batch: (model.loss(layers, *batch), kept)
  return _task(lambda key: (model.init(key), {}), loss)


def _dlrm(dtype):
  model = dlrm.DLRM((500_000,) * 4 + (1000,) * 22, 13, 32, (512, 256), dtype)
  return _task(lambda key: (model.init(key), {}), model.loss)


def _resnet18(dtype):
  model = resnet18.ResNet18(64, 10, dtype)
  return _task(lambda key: model.init(key, (28, 28, 1)), model.loss)


def _dcgan(dtype):
  model = dcgan.DCGAN(64, 32, 1, dtype)
  return _task(model.init, model.loss)


def _struct(dtype, *shape):
  return jax.ShapeDtypeStruct(shape, dtype)


F32, I32 = jnp.float32, jnp.int32
WORKLOADS = {
  "shakespeare": Workload(
    "GPT, 8 layers of 768, batch 4 x 256, rematerialised",
    _shakespeare,
    (_struct(I32, 4, 257),),
    True,
    {"layers": 8, "width": 768, "batch": 4, "sequence": 256, "vocabulary": 96},
  ),
  "lstm": Workload("LSTM, 2 layers of 1024, batch 32 x 64", _lstm, (_struct(I32, 32, 65),)),
  "t5": Workload(
    "T5, 4 + 4 layers of 512, batch 8 x (64 + 64), rematerialised",
    _t5,
    (_struct(I32, 8, 64), _struct(I32, 8, 65)),
    True,
    {"layers": 8, "width": 512, "batch": 8, "sequence": 64, "vocabulary": 32128},
  ),
  "dlrm": Workload(
    "DLRM, 4 tables of 500,000 rows of 32, batch 2048",
    _dlrm,
    (_struct(I32, 2048, 26), _struct(F32, 2048, 13), _struct(F32, 2048)),
  ),
  "resnet18": Workload(
    "ResNet-18, 28 px, batch 32", _resnet18, (_struct(F32, 32, 28, 28, 1), _struct(I32, 32))
  ),
  "dcgan": Workload(
    "DCGAN, 32 px, batch 192",
    _dcgan,
    (_struct(F32, 192, 32, 32, 1), _struct(F32, 192, dcgan.NOISE)),
  ),
}


def one(name: str) -> dict:
  """Plans, runs and measures one workload."""
  workload, fmt = WORKLOADS[name], training.parse_format(FORMAT)
  task = workload.make(fmt.dtype)
  args = types.SimpleNamespace(
    optimizer="adamw", learning_rate=1e-3, steps=1000, clip_norm=None, release=False,
    checkpointing=workload.checkpointing,
  )  # fmt: skip
  tx = training.make_optimizer(fmt, args)

  @jax.jit
  def make(key):
    params, kept = task.init(key)
    batch = [jnp.zeros(x.shape, x.dtype) for x in workload.batch]
    return *lowmem.init(tx, params), kept, *batch

  step = jax.jit(training.make_step(task, tx, args), donate_argnums=(0, 1, 2))
  key = jax.random.key(0)
  structs = jax.eval_shape(make, key)
  planned = lowmem.plan(step, *structs)
  done, made = step.lower(*structs).compile(), make.lower(key).compile()
  settle()
  before = status("VmRSS")
  params, opt_state, kept, *batch = made(key)
  jax.block_until_ready((params, opt_state, kept, batch))
  settle()
  with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts here
  for _ in range(2):
    result, params, opt_state = done(params, opt_state, kept, *batch)
    kept = result[1]
    jax.block_until_ready((result, params, opt_state))
    del result
  measured = status("VmHWM") - before
  settle()
  arguments = planned.peak_bytes - planned.parts["temporaries"]
  kept_bytes = status("VmRSS") - before - arguments
  formula = estimate(planned.num_params, weights="bf16+8", **workload.sizes)
  return {
    "example": name,
    "model": workload.title,
    "parameters": planned.num_params,
    "arguments": arguments,
    "planned": planned.peak_bytes,
    "measured": measured,
    "kept": kept_bytes,
    "formula": formula.peak_bytes,
  }


ADAMW = lowmem.adamw(1e-3)


def llama_released(tx=ADAMW):
  """A step with the shapes of Llama 3.1 8B, released, for `optax_lowmem.plan --step`."""
  state = jax.eval_shape(lambda params: lowmem.init(tx, params), llama.structs())
  tokens = jax.ShapeDtypeStruct((llama.TOKENS + 1,), I32)
  return lowmem.fused_backward(llama.loss, tx), (*state, tokens), (0, 1)


def llama_int4_nu():
  """The same with weights in bf16+0 and a second moment in int4."""
  return llama_released(lowmem.adamw(1e-3, weights="bf16+0", nu="int4"))


def llama_int4():
  """The same with weights in bf16+0 and both moments in int4."""
  return llama_released(lowmem.adamw(1e-3, weights="bf16+0", mu="int4", nu="int4"))


def demo():
  """The step of `make demo`, for `optax_lowmem.plan --step`."""
  args, fmt = shakespeare.make_parser().parse_args([]), training.parse_format(FORMAT)
  task, tx = shakespeare.make_task(args, fmt.dtype), training.make_optimizer(fmt, args)
  params, kept = jax.eval_shape(task.init, jax.random.key(0))
  state = jax.eval_shape(lambda params: lowmem.init(tx, params), params)
  windows = jax.ShapeDtypeStruct((args.batch, args.context + 1), I32)
  return training.make_step(task, tx, args), (*state, kept, windows), (0, 1, 2)


def on_an_h100(parser) -> dict:
  """Plans two steps for an H100 that need not be present, and compiles them by hand."""
  h100 = gpu_compiler(parser)
  (device,) = h100.sharding().device_set
  rows = []
  for name, make in {"make demo": demo, "Llama 3.1 8B, released": llama_released}.items():
    step, args, donated = make()
    start = time.perf_counter()
    planned = lowmem.plan(step, *args, device="h100", donate_argnums=donated)
    took = time.perf_counter() - start
    done = h100.compiled(step, *h100.on_device(args), donate=donated)
    peak = done.memory_analysis().peak_memory_in_bytes
    rows.append(
      {
        "step": name,
        "planned, MiB": planned.peak_bytes / MIB,
        "compiled by hand, MiB": peak / MIB,
        "planned / compiled": planned.peak_bytes / peak,
        "seconds to plan": took,
        "limit": verdict(took, 60),
      }
    )
    log(rows[-1])
  return {"device": device.device_kind, "tables": {"Plans for an H100": rows}}


def settle():
  """Returns free memory to the system."""
  gc.collect()
  ctypes.CDLL("libc.so.6").malloc_trim(0)


def status(field: str) -> int:
  """Bytes that the kernel counts for this process."""
  with open("/proc/self/status") as file:
    (line,) = [line for line in file if line.startswith(field)]
  return int(line.split()[1]) * 1024


def every(names) -> dict:
  """Measures workloads, each in a process of its own."""
  rows = []
  for name in names:
    command = [sys.executable, "-m", "benchmarks.plan", "--one", name]
    found = subprocess.run(
      command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT
    )
    row = json.loads(found.stdout)
    sizes = ("arguments", "planned", "measured", "kept", "formula")
    rows.append(
      {"example": row["example"], "model": row["model"], "parameters": row["parameters"]}
      | {f"{size}, MiB": row[size] / MIB for size in sizes}
      | {
        "planned / measured": row["planned"] / row["measured"],
        "planned / (measured - kept)": row["planned"] / (row["measured"] - row["kept"]),
        "formula / planned": row["formula"] / row["planned"],
      }
    )
    log(rows[-1])
  about = {"format": FORMAT, "device": platform.processor() or platform.machine()}
  return {**about, "tables": {"Planned against measured peaks on the CPU": rows}}


def main():
  """Measures all workloads, or one."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(WORKLOADS)}")
  parser.add_argument("--h100", action="store_true", help="plan for an H100 instead")
  parser.add_argument("--one", choices=WORKLOADS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if unknown := set(args.names) - set(WORKLOADS):
    parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(WORKLOADS)}")
  if args.one:
    print(json.dumps(one(args.one)))
  elif args.h100:
    report(functools.partial(on_an_h100, parser), "plan_h100")
  else:
    report(functools.partial(every, args.names or list(WORKLOADS)), "plan_cpu")


if __name__ == "__main__":
  main()
