"""A small T5 pronounces words: from letters to phonemes (CMUdict), one word in twenty held out.

The encoder-decoder of arXiv 1910.10683, as trained in 2309.12381, section 4: root-mean-square
norms, no biases, relative positions shared by the layers. Figures: the held-out loss a phoneme in
nats, and the share of words that greedy decoding gets right.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import data, training

BUCKETS = 32


class Attention(nn.Module):
  """Multi-head attention with a bias on the scores; T5 does not scale the scores."""

  heads: int
  head_width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BxQxD, memory_BxKxD, bias_BxHxQxK):
    dense = lambda name, scale: nn.DenseGeneral(
      (self.heads, self.head_width),
      use_bias=False,
      dtype=self.dtype,
      kernel_init=nn.initializers.variance_scaling(scale, "fan_in", "normal"),
      name=name,
    )
    q = dense("query", 1 / self.head_width)(x_BxQxD)
    k, v = dense("key", 1.0)(memory_BxKxD), dense("value", 1.0)(memory_BxKxD)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores + bias_BxHxQxK).astype(self.dtype)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    width = x_BxQxD.shape[-1]
    return nn.DenseGeneral(width, (-2, -1), use_bias=False, dtype=self.dtype, name="out")(y)


class Block(nn.Module):
  """Self-attention, attention to the encoder if there is one, and an MLP."""

  heads: int
  head_width: int
  hidden: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BxTxD, bias_BxHxTxT, memory_BxSxD=None, memory_bias_Bx1x1xS=None):
    attend = lambda name: Attention(self.heads, self.head_width, self.dtype, name=name)
    norm = lambda x: nn.RMSNorm(dtype=jnp.float32)(x).astype(self.dtype)
    dense = lambda width: nn.Dense(width, use_bias=False, dtype=self.dtype)
    h = norm(x_BxTxD)
    x_BxTxD += attend("self")(h, h, bias_BxHxTxT)
    if memory_BxSxD is not None:
      x_BxTxD += attend("cross")(norm(x_BxTxD), memory_BxSxD, memory_bias_Bx1x1xS)
    h = nn.relu(dense(self.hidden)(norm(x_BxTxD)))
    return x_BxTxD + dense(x_BxTxD.shape[-1])(h)


def bucket(length: int, is_causal: bool):
  """T5's buckets of relative positions, int [length, length]; far ones are logarithmic."""
  distance = np.arange(length)[None, :] - np.arange(length)[:, None]
  count, offset = BUCKETS, 0
  if is_causal:
    distance = np.maximum(-distance, 0)
  else:
    count //= 2
    offset = count * (distance > 0)
    distance = np.abs(distance)
  exact = count // 2
  far = exact + np.log(np.maximum(distance, 1) / exact) / np.log(128 / exact) * (count - exact)
  return offset + np.where(distance < exact, distance, np.minimum(far, count - 1)).astype(np.int32)


class T5:
  """The model as functions of its layers.

  Args:
    sizes: layers (of encoder and decoder each), width, heads, head_width, hidden.
    vocabularies: the numbers of source tokens and of target tokens.
    dtype: the dtype that it computes in.
  """

  def __init__(self, sizes, vocabularies: tuple[int, int], dtype):
    self.sizes, self.vocabularies, self.dtype = sizes, vocabularies, dtype
    self.block = Block(sizes.heads, sizes.head_width, sizes.hidden, dtype)

  def init(self, key):
    """The float32 parameters, with a top-level entry for each layer."""
    s = self.sizes
    keys = iter(jax.random.split(key, 2 * s.layers + 5))
    x, bias = jnp.zeros((1, 1, s.width)), jnp.zeros((1, s.heads, 1, 1))
    norm = {"scale": jnp.ones(s.width)}
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    params = {
      "source": normal(self.vocabularies[0], s.width) * s.width**-0.5,
      "target": normal(self.vocabularies[1], s.width) * s.width**-0.5,
      "source_bias": normal(BUCKETS, s.heads) * s.width**-0.5,
      "target_bias": normal(BUCKETS, s.heads) * s.width**-0.5,
      "source_norm": norm,
      "head": {
        "norm": dict(norm),
        "kernel": normal(s.width, self.vocabularies[1]) * s.width**-0.5,
      },
    }
    for i in range(s.layers):
      params[f"encoder_{i}"] = self.block.init(next(keys), x, bias)["params"]
      params[f"decoder_{i}"] = self.block.init(next(keys), x, bias, x, bias)["params"]
    return params

  def _norm(self, scale, x_BxTxD):
    norm = nn.RMSNorm(dtype=jnp.float32)
    return norm.apply({"params": scale}, x_BxTxD).astype(self.dtype)

  def _embed(self, table, tokens_BxT):
    return table.astype(self.dtype)[tokens_BxT]

  def _apply(self, weights, *inputs):
    return self.block.apply({"params": weights}, *inputs)

  def _position_bias(self, layer, length: int, is_causal: bool):
    buckets = bucket(length, is_causal)
    bias_TxTxH = layer(lambda table: table.astype(jnp.float32)[buckets])
    return jnp.moveaxis(bias_TxTxH, -1, 0)[None]

  def encode(self, layers, source_BxS):
    """The memory of the decoder [batch, source, width], and the bias that masks padding."""
    hidden_Bx1x1xS = jnp.where(source_BxS == data.PAD, -1e9, 0.0)[:, None, None, :]
    x_BxSxD = layers["source"](self._embed, source_BxS)
    bias = self._position_bias(layers["source_bias"], source_BxS.shape[1], False) + hidden_Bx1x1xS
    for i in range(self.sizes.layers):
      x_BxSxD = layers[f"encoder_{i}"](self._apply, x_BxSxD, bias)
    return layers["source_norm"](self._norm, x_BxSxD), hidden_Bx1x1xS

  def decode(self, layers, target_BxT, memory_BxSxD, hidden_Bx1x1xS):
    """The logits of the next target token, float32 [batch, target, vocabulary]."""
    length = target_BxT.shape[1]
    x_BxTxD = layers["target"](self._embed, target_BxT)
    bias = self._position_bias(layers["target_bias"], length, True)
    bias += jnp.where(np.tril(np.ones((length, length), bool)), 0.0, -1e9)
    for i in range(self.sizes.layers):
      layer = layers[f"decoder_{i}"]
      x_BxTxD = layer(self._apply, x_BxTxD, bias, memory_BxSxD, hidden_Bx1x1xS)

    def head(weights, x):
      return self._norm(weights["norm"], x) @ weights["kernel"].astype(self.dtype)

    return layers["head"](head, x_BxTxD).astype(jnp.float32)

  def loss(self, layers, source_BxS, target_BxT1):
    """The mean cross-entropy of the tokens that are not padding, in nats."""
    logits = self.decode(layers, target_BxT1[:, :-1], *self.encode(layers, source_BxS))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target_BxT1[:, 1:])
    return losses.mean(where=target_BxT1[:, 1:] != data.PAD)

  def greedy(self, params, source_BxS, length: int):
    """Greedy decoding, int32 [batch, length]; the first token is `data.START`."""
    layers = training.all_layers(params)
    memory = self.encode(layers, source_BxS)

    def extend(i, target_BxT):
      logits = self.decode(layers, target_BxT, *memory)
      return target_BxT.at[:, i + 1].set(logits[:, i].argmax(-1))

    target_BxT = jnp.zeros((len(source_BxS), length), jnp.int32).at[:, 0].set(data.START)
    return jax.lax.fori_loop(0, length - 1, extend, target_BxT)


def make_task(args, dtype) -> training.Task:
  """The task: to find the phonemes of a word."""
  words = data.cmudict()
  model = T5(args, (3 + len(words.letters), 3 + len(words.phonemes)), dtype)
  train, test = words.training, data.Pairs(*(x[:2048] for x in words.held_out))

  def loss_fn(layers, kept, source_BxS, target_BxT1):
    return model.loss(layers, source_BxS, target_BxT1), kept

  def batches(rng):
    while True:
      rows = rng.integers(0, len(train.source), args.batch)
      yield train.source[rows], train.target[rows]

  @jax.jit
  def evaluated(params, source, target):
    loss = model.loss(training.all_layers(params), source, target)
    said = model.greedy(params, source[:512], target.shape[1])
    is_end = jnp.cumsum(target[:512] == data.END, 1) - (target[:512] == data.END)
    return loss, jnp.mean(jnp.all((said == target[:512]) | (is_end > 0), 1))

  def evaluate(params, kept):
    del kept
    loss, right = evaluated(params, *test)
    return {"held-out loss": float(loss), "words right": float(right)}

  return training.Task(lambda key: (model.init(key), {}), loss_fn, batches, evaluate)


def make_parser():
  """The options."""
  quick = {"steps": 60, "width": 64, "hidden": 128, "layers": 1}
  sizes = {"layers": 2, "width": 96, "heads": 4, "head_width": 24, "hidden": 256}
  return training.make_parser(
    "t5", __doc__, sizes, quick, steps=1500, batch=64, learning_rate=3e-3, clip_norm=1.0
  )


def main(argv=None):
  """Trains every format, prints the table and saves the figure."""
  training.main("t5", make_task, training.parse(make_parser(), argv))


if __name__ == "__main__":
  main()
