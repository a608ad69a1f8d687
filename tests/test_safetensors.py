"""Import from and export to float32 safetensors, one parameter at a time."""

import functools
import json
import os
import struct
import subprocess
import sys

from conftest import assert_trees_equal, mesh_of
from flax import nnx
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
import safetensors.numpy

import optax_lowmem as lowmem


def make_params():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)
  return {
    "dense": {"kernel": draw(64, 96), "bias": draw(96)},
    "list": [draw(7), None, draw()],
    "empty": jnp.zeros((0, 4)),
    "table": jnp.arange(5),
    "norm": draw(33),
  }


WEIGHTS = lambda path, leaf: {64: "fp16+13", 33: "fp32"}.get(
  leaf.shape[:1][0] if leaf.ndim else 0, "bf16+8"
)
TRANSFORMATIONS = {
  "adamw": lambda: lowmem.adamw(1e-3, weights=WEIGHTS, mu="fp16", key=3),
  "scaled": lambda: lowmem.dynamic_loss_scale(lowmem.lion(1e-3, weights="bf16+0", mu="bf16")),
  "chain": lambda: optax.chain(optax.adamw(1e-3), lowmem.delta_bits(weights="bf16+16")),
  # A state that depends on the parameters' values.
  "lookahead": lambda: lowmem.delta_bits(
    optax.GradientTransformation(lambda p: {"slow": jax.tree.map(lambda x: 2 * x, p)}, None)
  ),
}


def init(tx, params):
  return jax.jit(functools.partial(lowmem.init, tx))(params)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_import_equals_init(name, tmp_path):
  tx, params32 = TRANSFORMATIONS[name](), make_params()
  path = tmp_path / "model.safetensors"
  named = {
    "dense.kernel": params32["dense"]["kernel"],
    "dense.bias": params32["dense"]["bias"],
    "list.0": params32["list"][0],
    "list.2": params32["list"][2],
    **{name: params32[name] for name in ("empty", "table", "norm")},
  }
  safetensors.numpy.save_file({k: np.array(v) for k, v in named.items()}, path)
  params, state = lowmem.import_safetensors(path, tx, jax.eval_shape(make_params))
  assert_trees_equal((params, state), init(tx, params32))
  full = [x for x in jax.tree.leaves((params, state)) if x.size]
  assert len({x.unsafe_buffer_pointer() for x in full}) == len(full)  # all can be donated

  exported = tmp_path / "exported.safetensors"
  lowmem.export_safetensors(exported, params, state)
  found, master = safetensors.numpy.load_file(exported), lowmem.master_params(params, state)
  assert found.keys() == named.keys()
  assert_trees_equal(found["dense.kernel"], np.array(master["dense"]["kernel"]))
  assert_trees_equal(found["list.2"], np.array(master["list"][2]))
  assert_trees_equal(found["table"], np.array(params32["table"]))
  again = lowmem.import_safetensors(exported, tx, jax.eval_shape(make_params))
  assert_trees_equal(again[0], params)  # a value on the grid does not move
  assert_trees_equal(lowmem.master_params(*again), master)
  assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded(kind, tmp_path):
  mesh = mesh_of(4, 2, kind)
  params32 = {"kernel": make_params()["dense"]["kernel"], "bias": jnp.ones(96)}
  specs = {"kernel": P("data", "model"), "bias": P("model")}
  shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
  struct = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  like = jax.tree.map(struct, params32, shardings)
  path = tmp_path / "model.safetensors"
  safetensors.numpy.save_file(jax.tree.map(np.array, params32), path)
  tx = lowmem.adamw(1e-3, weights={"kernel": "fp16+13", "bias": "bf16+8"})
  params, state = lowmem.import_safetensors(path, tx, like)
  assert_trees_equal((params, state), init(tx, params32))
  adam = state.inner_state.inner_state[0]
  for name in params:
    assert params[name].sharding == adam.mu[name].codes.sharding == shardings[name]
  assert state.residuals["bias"].sharding == shardings["bias"]
  assert state.residuals["kernel"].sharding == shardings["kernel"]
  # Three scales a row cannot be halved.
  assert adam.nu["kernel"].scale.sharding == NamedSharding(mesh, P("data", None))
  lowmem.export_safetensors(tmp_path / "again.safetensors", params, state)
  found = safetensors.numpy.load_file(tmp_path / "again.safetensors")
  assert_trees_equal(found, jax.tree.map(np.array, lowmem.master_params(params, state)))


def test_nnx_names(tmp_path):
  params32 = nnx.state(nnx.Linear(8, 40, rngs=nnx.Rngs(0)), nnx.Param)
  tx = lowmem.adamw(1e-3)
  params, state = init(tx, params32)
  lowmem.export_safetensors(tmp_path / "model.safetensors", params, state)
  assert safetensors.numpy.load_file(tmp_path / "model.safetensors").keys() == {"kernel", "bias"}
  like = nnx.eval_shape(lambda: params32)
  again = lowmem.import_safetensors(tmp_path / "model.safetensors", tx, like)
  assert_trees_equal(nnx.as_pure(again[0]), nnx.as_pure(params))


def test_errors_name_the_leaf(tmp_path):
  tx, path = lowmem.adamw(1e-3), tmp_path / "model.safetensors"
  params32 = {"a": {"w": np.ones((2, 3), np.float32)}, "b": np.ones(4, np.float32)}
  flat = {"a.w": params32["a"]["w"], "b": params32["b"]}

  def refused(tensors, match, like=params32):
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(ValueError, match=match):
      lowmem.import_safetensors(path, tx, like)

  refused({"b": flat["b"]}, r"no tensor 'a.w' for params\['a'\]\['w'\]")
  refused(flat | {"c": flat["b"]}, "tensor 'c', which the parameters do not have")
  refused(flat | {"a.w": np.ones((3, 2), np.float32)}, r"'a.w' has shape \(3, 2\).*\(2, 3\)")
  refused(flat | {"b": np.ones(4, np.float16)}, r"'b' is F16; params\['b'\] is F32 \(float32\)")
  refused(flat, "would both be named 'a.w'", params32 | {"a.w": params32["b"]})
  with pytest.raises(ValueError, match=r"params\['k'\] is key<fry>"):
    lowmem.export_safetensors(path, {"k": jax.random.key(0)}, None)

  whole = path.read_bytes()
  for broken in (
    b"",
    whole[:-1],
    whole[:20],
    b"\xff" * 8 + whole[8:],
    b"\x08" + bytes(7) + b"not json",
  ):
    path.write_bytes(broken)
    with pytest.raises(ValueError, match="no valid safetensors file: "):
      lowmem.import_safetensors(path, tx, params32)
  norm = optax.GradientTransformation(lambda p: {"norm": optax.tree.norm(p)}, None)
  safetensors.numpy.save_file(flat, path)
  with pytest.raises(ValueError, match=r"\['norm'\] of several parameters"):
    lowmem.import_safetensors(path, lowmem.delta_bits(norm), params32)


@pytest.mark.parametrize(
  "header",
  [
    {},
    [],
    {"a": 3},
    {"a": {"shape": [4], "data_offsets": [0, 16]}},
    {"a": {"dtype": "F32", "data_offsets": [0, 16]}},
    {"a": {"dtype": "F32", "shape": [4]}},
    {"a": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 16]}},
    {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
    {"a": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}},
    {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}},
    {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
    {
      "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
      "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    },
  ],
)
def test_bad_headers(header, tmp_path):
  """Each is a ValueError that says what is wrong; nothing is half loaded."""
  encoded = json.dumps(header).encode()
  path = tmp_path / "bad.safetensors"
  path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(16))
  with pytest.raises(ValueError, match=r"bad\.safetensors is no valid safetensors file: "):
    lowmem.import_safetensors(path, lowmem.adamw(1e-3), {"a": np.ones(4, np.float32)})


@hypothesis.settings(deadline=None)
@hypothesis.given(st.data())
def test_damaged_files(tmp_path_factory, data):
  """One byte of the header is another: the same parameters, or a ValueError that names the file."""
  path = tmp_path_factory.mktemp("damaged") / "model.safetensors"
  params32 = {"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 3), np.float32)}
  safetensors.numpy.save_file(params32, path)
  whole = bytearray(path.read_bytes())
  place = data.draw(st.integers(0, len(whole) - 41))  # 40 bytes of values
  whole[place] = data.draw(st.integers(0, 255))
  path.write_bytes(whole)
  tx = lowmem.adamw(1e-3)
  try:
    found = lowmem.import_safetensors(path, tx, params32)
  except ValueError as error:
    assert "model.safetensors" in str(error)
    return
  assert_trees_equal(found[0], lowmem.init(tx, params32)[0])


def test_without_the_package(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "safetensors", None)
  with pytest.raises(ModuleNotFoundError, match=r"optax_lowmem\[safetensors\]"):
    lowmem.import_safetensors(tmp_path / "x", lowmem.adamw(1e-3), {"a": np.ones(4, np.float32)})


def test_a_failed_export_leaves_the_old_file(tmp_path):
  path = tmp_path / "model.safetensors"
  path.write_text("old")
  params, state = init(lowmem.adamw(1e-3), {"w": jnp.ones((8, 32))})
  state = state._replace(residuals={"w": jnp.zeros((8, 31), jnp.int8)})
  with pytest.raises(ValueError, match=r"params\['w'\]"):
    lowmem.export_safetensors(path, params, state)
  assert path.read_text() == "old"


MEMORY = """
import sys
import jax, jax.numpy as jnp, numpy as np
import optax_lowmem as lowmem

source, target = sys.argv[1:]
COUNT, SHAPE = 48, (512, 1024)
tx = lowmem.adamw(1e-3)
def status(field):
  lines = open("/proc/self/status").read().splitlines()
  return next(int(x.split()[1]) for x in lines if x.startswith(field)) * 1024
def peak_of(f):
  before = status("VmRSS")
  open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
  result = jax.block_until_ready(f())
  print(status("VmHWM") - before)
  return result
def import_(path, count):
  like = {f"w{i}": jax.ShapeDtypeStruct(SHAPE, jnp.float32) for i in range(count)}
  return lowmem.import_safetensors(path, tx, like)
lowmem.export_safetensors(target, *import_(source + ".small", 1))  # imports and compiles
params, state = peak_of(lambda: import_(source, COUNT))
peak_of(lambda: lowmem.export_safetensors(target, params, state))
peak_of(lambda: [jnp.full(SHAPE, i, jnp.float32) for i in range(COUNT)])  # a second copy
"""


def write_zeros(path: str, count: int, shape):
  """A file of zeros without holes in its header, and hardly a block on the disk."""
  size = 4 * int(np.prod(shape))
  header = {
    f"w{i}": {"dtype": "F32", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
    for i in range(count)
  }
  encoded = json.dumps(header).encode()
  encoded += b" " * (-len(encoded) % 8)
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(encoded)) + encoded)
    file.truncate(8 + len(encoded) + count * size)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux")
def test_never_two_copies(tmp_path):
  count, shape = 48, (512, 1024)
  source, target = str(tmp_path / "model.safetensors"), str(tmp_path / "exported.safetensors")
  write_zeros(source, count, shape)
  write_zeros(source + ".small", 1, shape)
  environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  args = [sys.executable, "-c", MEMORY, source, target]
  params32 = 4 * count * int(np.prod(shape))
  formats = 5.125 / 4 * params32  # what stays: weights, residuals, moments
  for _ in range(3):  # on a busy machine the system leaves read pages of the file with the process
    done = subprocess.run(args, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    importing, exporting, a_copy = (int(x) / params32 for x in done.stdout.split())
    assert a_copy > 0.8  # so that the others can fail
    is_small = importing < formats / params32 + 0.7 and exporting < 0.3
    if is_small:
      break
  assert is_small, (importing, exporting)
  assert os.path.getsize(target) >= params32


def test_shardings_without_devices_are_refused(tmp_path):
  """`jax.eval_shape` of sharded arrays gives such."""
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Explicit,))
  params = jax.device_put({"w": jnp.ones((64, 8))}, NamedSharding(mesh, P("x")))
  tx = lowmem.adamw(1e-3)
  path = tmp_path / "model.safetensors"
  lowmem.export_safetensors(path, *lowmem.init(tx, params))
  with pytest.raises(ValueError, match=r"like\['w'\].*without devices"):
    lowmem.import_safetensors(path, tx, jax.eval_shape(lambda: params))
