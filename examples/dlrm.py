"""DLRM on MovieLens-100k: embedding tables, an MLP of numbers, and their pairwise products.

The model of arXiv 1906.00091, as trained in 2309.12381, section 4. It predicts which ratings are 4
or 5. It trains on the earlier 80% and is tested on the later 20%, whose users are mostly new.
Figures: the area under the ROC curve, and the loss.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import data, training


class MLP(nn.Module):
  """Dense layers with ReLU; with `is_last`, the last layer has none."""

  widths: tuple[int, ...]
  dtype: jnp.dtype
  is_last: bool = False

  @nn.compact
  def __call__(self, x_BxF):
    for i, width in enumerate(self.widths):
      x_BxF = nn.Dense(width, dtype=self.dtype)(x_BxF)
      if not (self.is_last and i + 1 == len(self.widths)):
        x_BxF = nn.relu(x_BxF)
    return x_BxF


class DLRM:
  """The model as functions of its layers.

  Args:
    rows: the rows of each embedding table.
    numbers: the number of numerical features.
    width: the width of the embeddings.
    top: the widths of the last MLP's hidden layers.
    dtype: the dtype that it computes in.
  """

  def __init__(self, rows: tuple[int, ...], numbers: int, width: int, top: tuple[int, ...], dtype):
    self.rows, self.numbers, self.width, self.dtype = rows, numbers, width, dtype
    self.bottom = MLP((4 * width, width), dtype)
    self.top = MLP((*top, 1), dtype, is_last=True)

  def init(self, key):
    """The float32 parameters, with a top-level entry for each layer."""
    keys = jax.random.split(key, len(self.rows) + 2)
    params = {
      f"table_{i}": jax.random.uniform(keys[i], (n, self.width), minval=-1, maxval=1) * n**-0.5
      for i, n in enumerate(self.rows)
    }
    pairs = (len(self.rows) + 1) * len(self.rows) // 2
    params["bottom"] = self.bottom.init(keys[-2], jnp.zeros((1, self.numbers)))["params"]
    params["top"] = self.top.init(keys[-1], jnp.zeros((1, self.width + pairs)))["params"]
    return params

  def logits(self, layers, categories_BxC, numbers_BxN):
    """The logits, float32 [batch]."""
    dense_BxD = layers["bottom"](lambda w, x: self.bottom.apply({"params": w}, x), numbers_BxN)
    look_up = lambda table, rows: table.astype(self.dtype)[rows]
    vectors = [dense_BxD] + [
      layers[f"table_{i}"](look_up, categories_BxC[:, i]) for i in range(len(self.rows))
    ]
    v_BxVxD = jnp.stack(vectors, 1)
    products_BxVxV = jnp.einsum("bvd,bwd->bvw", v_BxVxD, v_BxVxD)
    pairs_BxP = products_BxVxV[:, *np.triu_indices(len(vectors), 1)]
    x_BxF = jnp.concatenate([dense_BxD, pairs_BxP], 1)
    logits = layers["top"](lambda w, x: self.top.apply({"params": w}, x), x_BxF)[:, 0]
    return logits.astype(jnp.float32)

  def loss(self, layers, kept, categories_BxC, numbers_BxN, likes_B):
    """The mean cross-entropy in nats, and kept, unchanged."""
    logits_B = self.logits(layers, categories_BxC, numbers_BxN)
    return optax.sigmoid_binary_cross_entropy(logits_B, likes_B).mean(), kept


def make_task(args, dtype) -> training.Task:
  """The task: a binary classification."""
  train, test, rows = data.movielens()
  model = DLRM(rows, train.numbers.shape[1], args.width, args.top, dtype)

  def batches(rng):
    while True:
      rows = rng.integers(0, len(train.likes), args.batch)
      yield tuple(x[rows] for x in train)

  predict = jax.jit(lambda params, c, n: model.logits(training.all_layers(params), c, n))

  def evaluate(params, kept):
    del kept
    logits_N = np.asarray(predict(params, test.categories, test.numbers))
    losses = optax.sigmoid_binary_cross_entropy(logits_N, test.likes)
    return {"AUC": area_under_curve(logits_N, test.likes), "held-out loss": float(losses.mean())}

  return training.Task(lambda key: (model.init(key), {}), model.loss, batches, evaluate)


def area_under_curve(scores_N, labels_N) -> float:
  """The probability that a positive scores higher than a negative; NaN if a score is not finite.

  Ties count half.
  """
  if not np.all(np.isfinite(scores_N)):
    return float("nan")
  values, inverse, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
  ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
  positives = labels_N == 1
  n, m = positives.sum(), (~positives).sum()
  return float((ranks[positives].sum() - n * (n + 1) / 2) / (n * m))


def make_parser():
  """The options."""
  return training.make_parser(
    "dlrm",
    __doc__,
    {"width": 16},
    {"steps": 150},
    steps=1000,
    batch=256,
    learning_rate=3e-4,
    top=(128, 64),
  )


def main(argv=None):
  """Trains every format, prints the table and saves the figure."""
  training.main("dlrm", make_task, training.parse(make_parser(), argv))


if __name__ == "__main__":
  main()
