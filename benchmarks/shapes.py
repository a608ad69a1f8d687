"""The parameters to step: leaf shapes of known models, and a transformer to train."""

import math
import random

import jax
import jax.numpy as jnp

Shapes = dict[str, tuple[int, ...]]


def gpt2(layers=12, width=768, vocabulary=50257, context=1024) -> Shapes:
  """GPT-2's leaves, with a tied output embedding."""
  shapes: Shapes = {"wte": (vocabulary, width), "wpe": (context, width)}
  matrices = {"qkv": (1, 3), "proj": (1, 1), "up": (1, 4), "down": (4, 1)}
  for i in range(layers):
    for name, (rows, columns) in matrices.items():
      shapes[f"{i}.{name}.w"] = (rows * width, columns * width)
      shapes[f"{i}.{name}.b"] = (columns * width,)
    shapes |= {f"{i}.ln{j}.{part}": (width,) for j in (1, 2) for part in ("scale", "bias")}
  return shapes | {"ln.scale": (width,), "ln.bias": (width,)}


def resnet50() -> Shapes:
  """ResNet-50's leaves: convolutions (height, width, in, out), norms, the classifier."""
  shapes: Shapes = {}

  def convolution(name, size, channels, out):
    shapes[f"{name}.w"] = (size, size, channels, out)
    shapes[f"{name}.scale"] = shapes[f"{name}.bias"] = (out,)

  convolution("stem", 7, 3, 64)
  channels = 64
  for stage, blocks in enumerate((3, 4, 6, 3)):
    inner = 64 << stage
    for i in range(blocks):
      convolution(f"{stage}.{i}.a", 1, channels, inner)
      convolution(f"{stage}.{i}.b", 3, inner, inner)
      convolution(f"{stage}.{i}.c", 1, inner, 4 * inner)
      if i == 0:
        convolution(f"{stage}.{i}.skip", 1, channels, 4 * inner)
      channels = 4 * inner
  return shapes | {"head.w": (channels, 1000), "head.b": (1000,)}


def llama_unrolled(layers=32, width=512, kv=128, inner=1408, vocabulary=32000) -> Shapes:
  """A narrow Llama's leaves, layer by layer, with grouped keys and values and gated MLPs."""
  shapes: Shapes = {"embed": (vocabulary, width), "head": (width, vocabulary), "norm": (width,)}
  matrices = {
    "q": (width, width),
    "k": (width, kv),
    "v": (width, kv),
    "o": (width, width),
    "gate": (width, inner),
    "up": (width, inner),
    "down": (inner, width),
    "norm1": (width,),
    "norm2": (width,),
  }
  for i in range(layers):
    shapes |= {f"{i}.{name}": shape for name, shape in matrices.items()}
  return shapes


def forty_ragged(leaves=40, largest=300_000, longest=4000, seed=0) -> Shapes:
  """Distinct shapes of 1 to 4 axes; one last axis in eight is a multiple of 32."""
  rng = random.Random(seed)
  found: dict[tuple[int, ...], None] = {}
  while len(found) < leaves:
    shape: list[int] = []
    axes = 1 + len(found) % 4
    for axis in range(axes):
      # Log-uniform, with room for later axes of at least 3.
      room = largest // math.prod(shape) // 3 ** (axes - axis - 1)
      shape.append(round(math.exp(rng.uniform(math.log(3), math.log(min(room, longest))))))
    if len(found) % 8 == 7:
      shape[-1] = -(-shape[-1] // 32) * 32
    elif shape[-1] % 32 == 0:
      shape[-1] += 1
    found[tuple(shape)] = None
  return {f"{i:02}": shape for i, shape in enumerate(found)}


LAYERS, WIDTH, HEAD, TOKENS = 16, 2048, 128, 256
TRANSFORMER: Shapes = {
  "qkv": (LAYERS, WIDTH, 3 * WIDTH),
  "out": (LAYERS, WIDTH, WIDTH),
  "up": (LAYERS, WIDTH, 4 * WIDTH),
  "down": (LAYERS, 4 * WIDTH, WIDTH),
}

SETS: dict[str, Shapes] = {
  "GPT-2 124M": gpt2(),
  "ResNet-50": resnet50(),
  "one matrix, 50M": {"w": (6250, 8000)},
  "ragged, 5000 x 5000": {"w": (5000, 5000)},
}


def matrix(size: int) -> Shapes:
  """One matrix of about size elements, with 1024 columns."""
  return {"w": (round(size / 1024), 1024)}


def count(shapes: Shapes) -> int:
  """The number of parameters."""
  return sum(math.prod(shape) for shape in shapes.values())


def structs(shapes: Shapes, dtype=jnp.float32):
  """The tree without values."""
  return {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}


def normal(shapes: Shapes, dtype=jnp.float32, seed: int = 0, scale: float = 0.02):
  """The tree with Gaussian values."""
  key = jax.random.key(seed)
  return {
    name: (scale * jax.random.normal(jax.random.fold_in(key, i), shape)).astype(dtype)
    for i, (name, shape) in enumerate(shapes.items())
  }


def _norm(x):
  wide = x.astype(jnp.float32)
  return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def layer(x, w):
  """A pre-norm transformer layer on x [TOKENS, WIDTH], as the body of a `scan`."""
  q, k, v = jnp.split((_norm(x) @ w["qkv"]).reshape(len(x), -1, HEAD), 3, axis=1)
  heads = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  x = x + heads.reshape(x.shape) @ w["out"]
  return x + jax.nn.gelu(_norm(x) @ w["up"]) @ w["down"], None


def transformer_loss(params, x):
  """The loss of `TRANSFORMER`, whose layers are scanned and rematerialised."""
  y, _ = jax.lax.scan(jax.checkpoint(layer), x, params)
  return jnp.mean(y.astype(jnp.float32) ** 2)
