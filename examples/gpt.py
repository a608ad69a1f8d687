"""A small GPT in Flax. Matrices compute in `dtype`; norms, softmax and loss compute in float32."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


class Block(nn.Module):
  """Attention and MLP, each with a pre-norm and a residual connection."""

  heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BxTxD):
    width = x_BxTxD.shape[-1]
    dense = lambda n, name: nn.Dense(n, use_bias=False, dtype=self.dtype, name=name)
    norm = lambda name: nn.LayerNorm(use_bias=False, dtype=jnp.float32, name=name)
    h = norm("norm_1")(x_BxTxD)
    qkv = dense(3 * width, "qkv")(h).reshape(*h.shape[:2], 3, self.heads, -1)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    scores = jnp.where(causal, scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jax.nn.softmax(scores).astype(self.dtype)
    h = jnp.einsum("bhts,bshd->bthd", weights, v).reshape(h.shape)
    x_BxTxD += dense(width, "out")(h)
    h = nn.gelu(dense(4 * width, "up")(norm("norm_2")(x_BxTxD)))
    return x_BxTxD + dense(width, "down")(h)


class GPT(nn.Module):
  """A model that returns next-character logits, float32 [batch, time, vocabulary]."""

  vocabulary: int
  layers: int
  width: int
  heads: int
  context: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens_BxT):
    embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="embed")
    place = nn.Embed(self.context, self.width, dtype=self.dtype, name="place")
    x_BxTxD = embed(tokens_BxT) + place(jnp.arange(tokens_BxT.shape[1]))
    for i in range(self.layers):
      x_BxTxD = Block(self.heads, self.dtype, name=f"block_{i}")(x_BxTxD)
    x_BxTxD = nn.LayerNorm(use_bias=False, dtype=jnp.float32, name="norm")(x_BxTxD)
    logits = nn.Dense(self.vocabulary, use_bias=False, dtype=self.dtype, name="head")(x_BxTxD)
    return logits.astype(jnp.float32)


def loss_fn(model: GPT, layers, windows_BxT1) -> jax.Array:
  """The mean cross-entropy of the next character, in nats.

  Args:
    model: the model.
    layers: its layers, from `lowmem.fused_backward` or `training.all_layers(params)`.
    windows_BxT1: characters, int [batch, time + 1].

  Returns:
    The loss, a float32 scalar.
  """

  def call(name, module, *args):
    return layers[name](lambda w, *args: module.apply({"params": w}, *args), *args)

  tokens_BxT, dtype = windows_BxT1[:, :-1], model.dtype
  x_BxTxD = call("embed", nn.Embed(model.vocabulary, model.width, dtype=dtype), tokens_BxT)
  places = jnp.arange(tokens_BxT.shape[1])
  x_BxTxD += call("place", nn.Embed(model.context, model.width, dtype=dtype), places)
  for i in range(model.layers):
    x_BxTxD = call(f"block_{i}", Block(model.heads, dtype), x_BxTxD)
  x_BxTxD = call("norm", nn.LayerNorm(use_bias=False, dtype=jnp.float32), x_BxTxD)
  logits = call("head", nn.Dense(model.vocabulary, use_bias=False, dtype=dtype), x_BxTxD)
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits.astype(jnp.float32), windows_BxT1[:, 1:]
  )
  return losses.mean()
