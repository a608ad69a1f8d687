"""A model with the shapes of Llama 3.1 8B, written for gradient release."""

import jax
import jax.numpy as jnp

WIDTH, LAYERS, HEADS, KV_HEADS, HIDDEN, VOCABULARY = 4096, 32, 32, 8, 14336, 128256
HEAD = WIDTH // HEADS
TOKENS = 2048

SHAPES = {
  "embed": {"table": (VOCABULARY, WIDTH)},
  "layers": {
    "attention_norm": (LAYERS, WIDTH),
    "q": (LAYERS, WIDTH, WIDTH),
    "k": (LAYERS, WIDTH, KV_HEADS * HEAD),
    "v": (LAYERS, WIDTH, KV_HEADS * HEAD),
    "o": (LAYERS, WIDTH, WIDTH),
    "mlp_norm": (LAYERS, WIDTH),
    "gate": (LAYERS, WIDTH, HIDDEN),
    "up": (LAYERS, WIDTH, HIDDEN),
    "down": (LAYERS, HIDDEN, WIDTH),
  },
  "head": {"norm": (WIDTH,), "kernel": (WIDTH, VOCABULARY)},
}


def structs(dtype=jnp.float32):
  """The parameters without values."""
  is_shape = lambda x: isinstance(x, tuple)
  return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, dtype), SHAPES, is_leaf=is_shape)


def _norm(x, scale):
  wide = x.astype(jnp.float32)
  wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-5)
  return (wide * scale.astype(jnp.float32)).astype(x.dtype)


def _rotated(x_TxNxH):
  """Applies rotary embeddings, which rotate the two halves of a head."""
  frequency = 500000.0 ** (-jnp.arange(0, HEAD, 2) / HEAD)
  angle = jnp.arange(len(x_TxNxH))[:, None, None] * frequency
  x, y = jnp.split(x_TxNxH.astype(jnp.float32), 2, axis=-1)
  turned = [x * jnp.cos(angle) - y * jnp.sin(angle), y * jnp.cos(angle) + x * jnp.sin(angle)]
  return jnp.concatenate(turned, -1).astype(x_TxNxH.dtype)


def _layer(w, x_TxD):
  h = _norm(x_TxD, w["attention_norm"])
  heads = lambda name: (h @ w[name]).reshape(len(h), -1, HEAD)
  q, k, v = _rotated(heads("q")), _rotated(heads("k")), heads("v")
  h = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  x_TxD = x_TxD + h.reshape(x_TxD.shape) @ w["o"]
  h = _norm(x_TxD, w["mlp_norm"])
  return x_TxD + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]


def _head(w, x_TxD, targets_T):
  logits = jnp.dot(_norm(x_TxD, w["norm"]), w["kernel"], preferred_element_type=jnp.float32)
  picked = jnp.take_along_axis(logits, targets_T[:, None], axis=-1)[:, 0]
  return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def loss(layers, tokens_T1):
  """The mean cross-entropy of the next tokens of one sequence, in nats."""
  x_TxD = layers["embed"](lambda w, t: w["table"][t], tokens_T1[:-1])
  x_TxD = layers["layers"].scan(_layer, x_TxD)
  return layers["head"](_head, x_TxD, tokens_T1[1:])


class Plain:
  """A layer below one key of params, differentiated as usual; rematerialised like released ones."""

  def __init__(self, params):
    self._params = params

  def __call__(self, fn, *args):
    """Calls fn on the parameters and args."""
    return jax.checkpoint(fn)(self._params, *args)

  def scan(self, fn, x, *args):
    """Calls fn on the parameters of each layer of a stack in turn, x and args."""
    body = jax.checkpoint(lambda x, w: (fn(w, x, *args), None))
    return jax.lax.scan(body, x, self._params)[0]
