"""CLIP's two encoders and its loss (arXiv 2103.00020), as functions of their layers."""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

MAX_SCALE = 100.0


class Encoder(NamedTuple):
  """The sizes of a transformer."""

  layers: int
  width: int
  heads: int


class Sizes(NamedTuple):
  """The sizes of a model; with a stem, a patch is a power of two, and a `Stem` embeds it."""

  image: Encoder
  text: Encoder
  patch: int
  embedding: int
  vocabulary: int
  context: int
  image_size: int
  has_stem: bool = False


VIT_B_32 = Sizes(Encoder(12, 768, 12), Encoder(12, 512, 8), 32, 512, 49408, 77, 224)


class Block(nn.Module):
  """Attention and MLP, each with a pre-norm and a residual connection."""

  heads: int
  is_causal: bool
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BxTxD):
    width = x_BxTxD.shape[-1]
    dense = functools.partial(nn.Dense, dtype=self.dtype)
    norm = lambda x: nn.LayerNorm(dtype=jnp.float32)(x).astype(self.dtype)
    qkv = dense(3 * width)(norm(x_BxTxD)).reshape(*x_BxTxD.shape[:2], 3, self.heads, -1)
    if self.dtype == jnp.float16:  # XLA:CPU cannot multiply float16 with float32 sums
      qkv = qkv.astype(jnp.float32)
    attended = jax.nn.dot_product_attention(
      qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=self.is_causal
    )
    x_BxTxD += dense(width)(attended.astype(self.dtype).reshape(x_BxTxD.shape))
    h = dense(4 * width)(norm(x_BxTxD))
    return x_BxTxD + dense(width)(h * jax.nn.sigmoid(1.702 * h))


class Stem(nn.Module):
  """Convolutions of stride 2 instead of a matrix for each patch (arXiv 2106.14881)."""

  patch: int
  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BxHxWxC):
    init = nn.initializers.he_normal()
    for i in reversed(range(self.patch.bit_length() - 1)):
      conv = nn.Conv(self.width >> i, (3, 3), 2, dtype=self.dtype, kernel_init=init)
      x_BxHxWxC = conv(nn.relu(x_BxHxWxC))
    return x_BxHxWxC.reshape(len(x_BxHxWxC), -1, self.width)


class CLIP:
  """The model as functions of its layers.

  Args:
    sizes: the sizes of both encoders.
    dtype: the dtype that they compute in.
  """

  def __init__(self, sizes: Sizes, dtype):
    self.sizes, self.dtype = sizes, dtype
    if sizes.has_stem and (sizes.patch < 2 or sizes.patch.bit_count() != 1):
      raise ValueError(f"with a stem, a patch must be a power of two above 1, not {sizes.patch}")
    self.stem = Stem(sizes.patch, sizes.image.width, dtype)
    self.blocks = {
      "image": Block(sizes.image.heads, False, dtype),
      "text": Block(sizes.text.heads, True, dtype),
    }

  def init(self, key):
    """The float32 parameters, with a top-level entry for each layer."""
    s = self.sizes
    keys = iter(jax.random.split(key, s.image.layers + s.text.layers + 8))
    normal = lambda scale, *shape: scale * jax.random.normal(next(keys), shape)
    norm = lambda width: {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
    patches = (s.image_size // s.patch) ** 2
    pixels, wide, narrow = 3 * s.patch**2, s.image.width, s.text.width
    if s.has_stem:
      embed = self.stem.init(next(keys), jnp.zeros((1, s.image_size, s.image_size, 3)))["params"]
    else:
      embed = {"kernel": normal(pixels**-0.5, pixels, wide)}
    params = {
      "image_embed": {
        "patches": embed,
        "class": normal(wide**-0.5, wide),
        "positions": normal(wide**-0.5, patches + 1, wide),
        "norm": norm(wide),
      },
      "image_head": {"norm": norm(wide), "kernel": normal(wide**-0.5, wide, s.embedding)},
      "text_embed": {
        "tokens": normal(0.02, s.vocabulary, narrow),
        "positions": normal(0.01, s.context, narrow),
      },
      "text_head": {"norm": norm(narrow), "kernel": normal(narrow**-0.5, narrow, s.embedding)},
      "temperature": {"log_scale": jnp.log(1 / 0.07)},
    }
    for name, encoder in (("image", s.image), ("text", s.text)):
      for i in range(encoder.layers):
        x = jnp.zeros((1, 1, encoder.width))
        params[f"{name}_{i}"] = self.blocks[name].init(next(keys), x)["params"]
    return params

  def _norm(self, weights, x):
    return nn.LayerNorm(dtype=jnp.float32).apply({"params": weights}, x).astype(self.dtype)

  def _blocks(self, name, layers, x):
    apply = lambda weights, x: self.blocks[name].apply({"params": weights}, x)
    for i in range(getattr(self.sizes, name).layers):
      x = layers[f"{name}_{i}"](apply, x)
    return x

  def _head(self, weights, x_BxD):
    """Unit vectors, in float32."""
    y = self._norm(weights["norm"], x_BxD) @ weights["kernel"].astype(self.dtype)
    y = y.astype(jnp.float32)
    return y / jnp.maximum(jnp.linalg.norm(y, axis=-1, keepdims=True), 1e-6)

  def encode_images(self, layers, images_BxHxWxC):
    """Unit vectors, float32 [batch, embedding], of images between 0 and 1."""
    batch, size, patch = len(images_BxHxWxC), self.sizes.image_size, self.sizes.patch

    def embed(weights, images):
      if self.sizes.has_stem:  # convolutions pad with 0; after 1 - images, that is white
        x = self.stem.apply({"params": weights["patches"]}, 1 - images)
      else:
        side = size // patch
        x = images.reshape(batch, side, patch, side, patch, 3).swapaxes(2, 3)
        x = (2 * x.reshape(batch, side * side, -1) - 1).astype(self.dtype)
        x = x @ weights["patches"]["kernel"].astype(self.dtype)
      first = jnp.broadcast_to(weights["class"], (batch, 1, x.shape[-1])).astype(self.dtype)
      x = jnp.concatenate([first, x], 1) + weights["positions"].astype(self.dtype)
      return self._norm(weights["norm"], x)

    x = self._blocks("image", layers, layers["image_embed"](embed, images_BxHxWxC))
    return layers["image_head"](self._head, x[:, 0])

  def encode_texts(self, layers, tokens_BxT):
    """Unit vectors, float32 [batch, embedding], of texts that end in the largest token."""

    def embed(weights, tokens):
      x = weights["tokens"].astype(self.dtype)[tokens]
      return x + weights["positions"].astype(self.dtype)[: tokens.shape[1]]

    x = self._blocks("text", layers, layers["text_embed"](embed, tokens_BxT))
    ends = tokens_BxT.argmax(-1)
    return layers["text_head"](self._head, x[jnp.arange(len(x)), ends])

  def loss(self, layers, images, tokens, mesh=None):
    """The symmetric contrastive loss of pairs; see `contrastive_loss`."""
    image_BxE = self.encode_images(layers, images)
    text_BxE = self.encode_texts(layers, tokens)
    scale = layers["temperature"](lambda weights: jnp.exp(weights["log_scale"]))
    return contrastive_loss(image_BxE, text_BxE, scale, mesh)


def clip_temperature(params):
  """Limits the scale of logits to 100 (up to the rounding of a half-precision weight)."""
  log_scale = jnp.minimum(params["temperature"]["log_scale"], math.log(MAX_SCALE))
  return params | {"temperature": {"log_scale": log_scale}}


def contrastive_loss(image_BxE, text_BxE, scale, mesh=None):
  """The mean cross-entropy of finding the text of each image, and the image of each text.

  Args:
    image_BxE: unit vectors of images [batch, embedding].
    text_BxE: unit vectors of texts [batch, embedding]; equal rows match.
    scale: the factor of the similarities.
    mesh: devices along "data"; each computes the similarities of its own rows
      with all rows. None computes the whole matrix in one place.

  Returns:
    The loss in nats, a float32 scalar.
  """
  if mesh is None:
    logits = scale * image_BxE @ text_BxE.T
    labels = jnp.arange(len(logits))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)).mean() / 2

  def of_rows(image_RxE, text_RxE, scale):
    rows = len(image_RxE)
    labels = jax.lax.axis_index("data") * rows + jnp.arange(rows)
    total = 0.0
    for mine, theirs in ((image_RxE, text_RxE), (text_RxE, image_RxE)):
      all_BxE = jax.lax.all_gather(theirs, "data", tiled=True)
      logits_RxB = scale * mine @ all_BxE.T
      total += optax.softmax_cross_entropy_with_integer_labels(logits_RxB, labels).mean() / 2
    return jax.lax.pmean(total, "data")

  P = jax.sharding.PartitionSpec
  specs = (P("data"), P("data"), P())
  return jax.shard_map(of_rows, mesh=mesh, in_specs=specs, out_specs=P())(
    image_BxE, text_BxE, scale
  )


def recalls(image_NxE, text_NxE) -> dict[str, float]:
  """How often an image's own text is among the 1, 5 and 10 nearest; NaN if there are NaNs."""
  similarities = np.asarray(image_NxE) @ np.asarray(text_NxE).T
  own = np.diag(similarities)[:, None]
  ranks = (similarities > own).sum(1) + ((similarities == own).sum(1) - 1) / 2
  found = np.mean(ranks[:, None] < [1, 5, 10], 0)
  if not np.all(np.isfinite(similarities)):
    found[:] = np.nan
  return dict(zip(("R@1", "R@5", "R@10"), found.tolist(), strict=True))
