"""lowmem.plan: the memory of a compiled step, by part, for devices that need not be there."""

import functools
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys

from flax import nnx
import h100
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import optax
import pytest

from examples import compare
import optax_lowmem as lowmem
from optax_lowmem.planner import choices, targets
from optax_lowmem.planner.estimate import estimate

ROOT = pathlib.Path(__file__).parent.parent
SHAPE = (1024, 1024)
X = jax.ShapeDtypeStruct((8, SHAPE[0]), jnp.bfloat16)


def loss_fn(params, x):
  return jnp.sum(jnp.tanh(x @ params["w"].astype(jnp.bfloat16)).astype(jnp.float32))


def structs(tx, init=lowmem.init):
  params = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
  return jax.eval_shape(functools.partial(init, tx), params)


def train_step(tx):
  def step(params, opt_state, x):
    return lowmem.step(tx, jax.grad(loss_fn)(params, x), opt_state, params)

  return step


N = SHAPE[0] * SHAPE[1]


def test_parts():
  tx = lowmem.adamw(1e-3)
  plan = lowmem.plan(train_step(tx), *structs(tx), X, donate_argnums=(0, 1))
  assert plan.num_params == N
  assert plan.parts["weights"] == 2 * N and plan.parts["residuals"] == N
  assert plan.parts["statistics"] == 2.125 * N
  assert X.size * 2 <= plan.parts["other arguments"] < X.size * 2 + 4096
  assert sum(plan.parts.values()) == plan.peak_bytes
  assert plan.copied == {} and plan.memory is None and not plan.verdict
  assert plan.fits(plan.peak_bytes) and not plan.fits(plan.peak_bytes - 1)
  with pytest.raises(ValueError, match="not known"):
    plan.fits()
  assert "bytes/param" in str(plan) and "residuals" in str(plan)


@pytest.mark.parametrize("weights", ["bf16+0", "bf16+16"])
def test_other_optimizers(weights):
  tx = lowmem.sgd(0.1, weights=weights)
  plan = lowmem.plan(train_step(tx), *structs(tx), X, donate_argnums=(0, 1))
  assert plan.parts["residuals"] == {"bf16+0": 0, "bf16+16": 2 * N}[weights]
  assert plan.parts["statistics"] == 0 and plan.num_params == N


def test_temporaries_of_a_cpu():
  """XLA:CPU leaves them out of its own peak; memory that a step touches is memory."""

  def step(x):
    y = jnp.sort(jnp.exp(x @ x.T), axis=0)
    return jnp.sum(y @ y)

  plan = lowmem.plan(step, jax.ShapeDtypeStruct((1024, 8), jnp.float32))
  assert plan.parts["temporaries"] >= 4 * 1024**2


def test_workspaces_of_a_cpu():
  """Transposed convolutions: 48 MiB that XLA does not count. Measured in all: 60.8 MiB."""
  x, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((192, 8, 8, 128), (4, 4, 128, 64)))

  def step(x, kernel, lhs_dilation):
    axes = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), [(2, 2)] * 2, lhs_dilation=lhs_dilation, dimension_numbers=axes
    )

  of_kernel = jax.grad(lambda kernel, x: jnp.sum(step(x, kernel, (2, 2))))
  assert lowmem.plan(of_kernel, kernel, x).parts["temporaries"] < 48 * 2**20
  temporaries = lambda n: lowmem.plan(
    functools.partial(step, lhs_dilation=(n, n)), x, kernel
  ).parts["temporaries"]
  assert temporaries(1) < 30 * 2**20
  assert temporaries(2) == (48 + 12) * 2**20  # the products and the result


def test_plain_optax():
  tx = optax.adamw(1e-3)
  params, opt_state = structs(tx, lambda tx, params: (params, tx.init(params)))

  def step(params, opt_state, x):
    updates, opt_state = tx.update(jax.grad(loss_fn)(params, x), opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  plan = lowmem.plan(step, params, opt_state, X, donate_argnums=(0, 1))
  assert plan.parts["weights"] == 4 * N and plan.parts["statistics"] == 8 * N


def test_train_state_and_a_jitted_step():
  params = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
  create = functools.partial(
    lowmem.TrainState.create, apply_fn=None, tx=lowmem.adamw(1e-3), loss_scale="dynamic"
  )
  state = jax.eval_shape(lambda params: create(params=params), params)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, x):
    grads = jax.grad(lambda p: state.scale_loss(loss_fn(p, x)))(state.params)
    return state.apply_gradients(grads=grads)

  plan = lowmem.plan(step, state, X)
  assert plan.parts["weights"] == 2 * N and plan.parts["statistics"] == 2.125 * N
  assert plan.copied == {}
  with pytest.raises(ValueError, match="donate_argnums"):
    lowmem.plan(step, state, X, donate_argnums=0)


def test_nnx_variables():
  model = nnx.eval_shape(lambda: nnx.Linear(*SHAPE, use_bias=False, rngs=nnx.Rngs(0)))
  tx = lowmem.adamw(1e-3)
  params, opt_state = jax.eval_shape(
    functools.partial(lowmem.init, tx), nnx.state(model, nnx.Param)
  )

  def step(params, opt_state, x):
    grads = jax.grad(lambda p: jnp.sum(jnp.tanh(x @ jax.tree.leaves(p)[0])))(params)
    return lowmem.step(tx, grads, opt_state, params)

  assert lowmem.plan(step, params, opt_state, X).parts["weights"] == 2 * N


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donated_arguments_that_are_copied():
  tx = lowmem.adamw(1e-3)
  params, opt_state = structs(tx)

  def step(params, opt_state, x):  # a new dtype: nothing can take the place of the weights
    new, opt_state = train_step(tx)(params, opt_state, x)
    return jax.tree.map(lambda w: w.astype(jnp.float32), new), opt_state

  plan = lowmem.plan(step, params, opt_state, X, donate_argnums=(0, 1))
  assert plan.copied == {"params['w']": 2 * N}
  assert "donated arguments are copied: params['w']. Return" in str(plan)


def test_several_devices():
  mesh = jax.make_mesh((8,), ("data",), devices=jax.devices()[:8])
  tx = lowmem.adamw(1e-3)

  def shard(x):
    spec = PartitionSpec("data") if len(x.shape) == 2 else PartitionSpec()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  args = jax.tree.map(shard, (*structs(tx), X))
  one = lowmem.plan(train_step(tx), *structs(tx), X, donate_argnums=(0, 1))
  with jax.set_mesh(mesh):
    eight = lowmem.plan(
      train_step(tx), *args, device=list(mesh.devices.flat), donate_argnums=(0, 1)
    )
  assert eight.device.startswith("8 x ") and eight.peak_bytes < one.peak_bytes
  assert eight.num_params == N
  for part in ("weights", "residuals", "statistics"):
    assert eight.parts[part] == one.parts[part] / 8


@pytest.mark.h100
@pytest.mark.parametrize("device", ["h100", "rtx5090"])
def test_gpus(device):
  tx = lowmem.adamw(1e-3)
  args = *structs(tx), X
  plan = lowmem.plan(train_step(tx), *args, device=device, donate_argnums=(0, 1))
  compiled = h100.compiled(train_step(tx), *h100.on_device(args, device), donate=(0, 1))
  assert plan.peak_bytes == compiled.memory_analysis().peak_memory_in_bytes
  assert plan.verdict == "FITS" and "FITS" in str(plan)
  assert plan.usable_bytes < plan.memory == targets.TARGETS[device].memory


def test_verdicts():
  plan = functools.partial(lowmem.Plan, "x", parts={}, num_params=0, memory=1000)
  assert [plan(n).verdict for n in (940, 941, 1000, 1001)] == ["FITS", "TIGHT", "TIGHT", "NO"]


def test_bad_input(monkeypatch):
  tx = lowmem.adamw(1e-3)
  args = *structs(tx), X
  with pytest.raises(ValueError, match="h100.*v6e.*h300"):
    lowmem.plan(train_step(tx), *args, device="h300")

  def missing(*args, **kwargs):
    raise RuntimeError("Unknown backend cuda")

  monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", missing)
  targets.gpus.cache_clear()
  with pytest.raises(ModuleNotFoundError, match=r"b200.*optax_lowmem\[plan\]"):
    lowmem.plan(train_step(tx), *args, device="b200")


@pytest.mark.skipif(h100.sharding() is None, reason="the h100 extra is not installed")
def test_a_gpu_after_jax_has_started():
  """Without a driver, JAX drops its plugin when it starts; the plan brings it back."""
  program = """
import jax, jax.numpy as jnp, optax_lowmem as lowmem
x = jnp.ones(8)
print(lowmem.plan(lambda x: x + 1, x, device="h100").device, x.sum())
"""
  ours = ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
  fresh = {name: value for name, value in os.environ.items() if name not in ours}
  done = subprocess.run(
    [sys.executable, "-c", program], env=fresh, capture_output=True, text=True, check=True
  )
  assert done.stdout == "NVIDIA H100 80GB HBM3 8.0\n"


def test_targets_are_consistent():
  for name, target in targets.TARGETS.items():
    assert target.memory > 2**33 and (target.is_tpu or target.cores > 0), name
  assert np.all([x.topology.startswith(n) for n, x in targets.TARGETS.items() if x.is_tpu])


LLAMA = "--params 8.03e9 --layers 32 --width 4096 --sequence 2048 --vocabulary 128256".split()


@pytest.mark.parametrize(
  "arguments, status",
  [
    ([*LLAMA, "--release", "--device", "h100"], 0),
    ([*LLAMA, "--release"], 0),
    ([*LLAMA, "--device", "rtx5090"], 1),
    (["--params", "1.2e9", "--weights", "fp32", "--statistics", "fp32", "--device", "v5e"], 1),
    (["--params", "1e9", "--release"], 2),
    (["--params", "-1"], 2),
    (["--params", "1e9", "--weights", "fp8"], 2),
    (["--params", "1e9", "--device", "abacus"], 2),
    (["--step", "no_such_module:f"], 2),
    (["--step", "json"], 2),
    ([], 2),
  ],
  ids=str,
)
def test_command(arguments, status, capsys):
  main = importlib.import_module("optax_lowmem.plan").main
  assert callable(lowmem.plan)  # the command's module, imported, can be called, too
  if status == 2:
    with pytest.raises(SystemExit) as error:
      main(arguments)
    assert error.value.code == 2
    assert "error: " in capsys.readouterr().err
    return
  assert main(arguments) == status
  said = capsys.readouterr().out
  assert "bytes/param" in said
  assert main([*arguments, "--json"]) == status
  found = json.loads(capsys.readouterr().out)
  assert found["peak_bytes"] == sum(found["parts"].values())


def sessions() -> list[tuple[str, list[str], str]]:
  """(page, arguments, output) of the commands that README.md and the docs show."""
  found = []
  for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
    for block in re.findall(r"^```console\n(\$ .*?)^```$", page.read_text(), re.M | re.S):
      command, _, output = re.sub(r"\\\n *", "", block).partition("\n")
      program = "$ python -m optax_lowmem.plan "
      if command.startswith(program) and "--step" not in command:
        found.append((page.name, command.removeprefix(program).split(), output))
  return found


@pytest.mark.parametrize("page, arguments, output", sessions(), ids=lambda x: str(x)[:20])
def test_shown_output(page, arguments, output, capsys):
  importlib.import_module("optax_lowmem.plan").main(arguments)
  assert capsys.readouterr().out == output


def test_the_readme_shows_a_plan():
  assert "README.md" in [page for page, _, _ in sessions()]


def test_png(tmp_path, capsys, monkeypatch):
  main = importlib.import_module("optax_lowmem.plan").main
  assert main([*LLAMA, "--device", "h100", "--png", str(tmp_path / "plan.png")]) == 0
  assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(SystemExit) as error:
    main([*LLAMA, "--png", "plan.png"])
  assert error.value.code == 2 and "optax_lowmem[plan]" in capsys.readouterr().err


def test_formula():
  """Exact for what stays in memory; near what is compiled for the rest (41.8 GiB on an H100)."""
  found = estimate(
    8.03e9, release=True, layers=32, width=4096, sequence=2048, vocabulary=128256, device="h100"
  )
  assert found.parts["weights"] == 2 * 8.03e9 and found.parts["statistics"] == 2.125 * 8.03e9
  assert abs(found.peak_bytes / 2**30 - 41.8) < 1
  sgd = estimate(1000, weights="fp16+13", statistics="bf16", optimizer="sgd")
  assert sgd.parts["residuals"] == 1625 and sgd.parts["statistics"] == 2000
  assert estimate(1024, statistics="int8-int4").parts["statistics"] == 1024 + 512 + 2 * 64
  assert estimate(1024, optimizer="muon").parts["statistics"] == 1024 + 64
  with pytest.raises(ValueError, match="lion takes 1 formats.*'int8-int4'"):
    estimate(1024, optimizer="lion", statistics="int8-int4")


def make_kept(weights, statistics):
  tx = lowmem.adamw(1e-3, weights=weights, mu=statistics, nu=statistics)
  return tx, train_step(tx)


def make_released(weights, statistics):
  tx, _ = make_kept(weights, statistics)
  loss = lambda layers, x: layers["w"](lambda w, x: loss_fn({"w": w}, x), x)
  return tx, lowmem.fused_backward(loss, tx)


def test_formats():
  params = {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
  formats = ("fp32/fp32", "bf16+8/int8", "bf16+1/fp32")
  table = lowmem.plan_formats(make_kept, params, X, make_released=make_released, formats=formats)
  assert set(table.plans) == {*formats, *(f"{name}, released" for name in formats)}
  peaks = [plan.peak_bytes for plan in table.plans.values()]
  assert peaks == sorted(peaks)
  tx = lowmem.adamw(1e-3)
  alone = lowmem.plan(train_step(tx), *structs(tx), X, donate_argnums=(0, 1))
  assert table.plans["bf16+8/int8"] == alone
  lines = {line.split("  ")[0]: line for line in str(table).splitlines()}
  assert "the base" in lines["fp32/fp32"] and "0.00 MiB" in lines["fp32/fp32"]
  assert 'weights="bf16+8", mu="int8", nu="int8"' in lines["bf16+8/int8"]
  assert "13 examples: lstm +0.4%" in lines["bf16+8/int8"]
  assert "not in the sweep" in lines["bf16+1/fp32"]
  assert "fused_backward" in lines["bf16+8/int8, released"]


def test_formats_of_a_device():
  memory = 2**30
  plan = functools.partial(lowmem.Plan, "a card", parts={}, num_params=0, memory=memory)
  text = str(lowmem.PlanTable({"bf16+8/int8": plan(2**29), "fp32/fp32": plan(2**31)}, "fp32/fp32"))
  assert text.startswith("a card") and "FITS" in text and "NO" in text and "1.50 GiB" in text


def test_evidence():
  """What the table says of a format is what the sweep found."""
  results = {path.stem: compare.load(path) for path in (ROOT / "docs/results").glob("*.jsonl")}
  for fmt, (count, worst, relative) in choices.EVIDENCE.items():
    found = {
      name: compare.compare(runs, fmt).relative for name, runs in results.items() if fmt in runs
    }
    assert len(found) == count and max(found, key=lambda name: found[name]) == worst
    assert round(found[worst], 4) == relative


@pytest.mark.parametrize(
  "make, formats, error, message",
  [
    (make_kept, ("bf16+8",), ValueError, "WEIGHTS/STATISTICS.*'bf16\\+8'"),
    (make_kept, ("bf17/int8",), ValueError, "bf17"),
    (make_kept, ("bf16/int9",), ValueError, "bf16"),
    (make_kept, ("bf16+8/int9",), ValueError, "int9"),
    (
      lambda *names: make_kept(*names)[1],
      ("bf16+8/int8",),
      TypeError,
      r"\(tx, step\); got function",
    ),
  ],
)
def test_formats_that_are_none(make, formats, error, message):
  with pytest.raises(error, match=message):
    lowmem.plan_formats(make, {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}, X, formats=formats)


def test_largest_batch():
  step = lambda w, x: jnp.sum(jnp.sin(x @ w))
  w = jax.ShapeDtypeStruct((SHAPE[0], 32), jnp.bfloat16)
  planned = lambda n: lowmem.plan(step, w, jax.ShapeDtypeStruct((n, SHAPE[0]), X.dtype))
  run = functools.partial(lowmem.largest_batch, step, w, X, batch_argnums=1)
  limit = 8 * 2**20
  size, plan = run(nbytes=limit)
  assert plan == planned(size) and plan.fits(limit) and size > 1000
  assert not planned(size + size // 8).fits(limit)
  assert run(nbytes=planned(5).peak_bytes)[0] == 5  # below the size that it starts with
  assert run(nbytes=1000) == (0, planned(1))
  with pytest.raises(ValueError, match="not known"):
    run()


def test_largest_batch_of_no_batch():
  with pytest.raises(ValueError, match=r"\(0, 1\).*share their first axis"):
    lowmem.largest_batch(
      lambda x, y: x, X, jax.ShapeDtypeStruct((), jnp.int32), batch_argnums=(0, 1), nbytes=1
    )
  with pytest.raises(ValueError, match="does not grow"):
    lowmem.largest_batch(lambda x, y: y * 2, X, X, batch_argnums=0, nbytes=2**30)


def make_step():
  tx = lowmem.adamw(1e-3)
  return train_step(tx), (*structs(tx), X), (0, 1)


def test_command_compiles(capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, "a_training_script", sys.modules[__name__])
  main = importlib.import_module("optax_lowmem.plan").main
  assert main(["--step", "a_training_script:make_step", "--json"]) == 0
  captured = capsys.readouterr()
  assert "compiling" in captured.err
  assert json.loads(captured.out)["parts"]["weights"] == 2 * N
