"""DCGAN on Fashion-MNIST: a generator and a discriminator, trained against each other.

The networks of arXiv 1511.06434, as trained in 2309.12381 and 1710.03740. Both step together, with
one optimizer. Figure: the Fréchet distance between generated images and test images, each modelled
as a normal distribution on the 64 largest principal components of the training images.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import batch_stats, data, training

NOISE, COMPONENTS = 64, 64


class Up(nn.Module):
  """A step of the generator, which doubles the size of an image; a vector becomes 4x4."""

  width: int
  dtype: jnp.dtype
  is_last: bool = False

  @nn.compact
  def __call__(self, x, is_training: bool):
    if x.ndim == 2:
      x = nn.Dense(16 * self.width, use_bias=False, dtype=self.dtype)(x)
      x = x.reshape(len(x), 4, 4, self.width)
    else:
      conv = nn.ConvTranspose(
        self.width, (4, 4), (2, 2), use_bias=self.is_last, dtype=self.dtype
      )  # fmt: skip
      x = conv(x)
    if self.is_last:
      return jnp.tanh(x)
    return nn.relu(nn.BatchNorm(not is_training, momentum=0.9, dtype=self.dtype)(x))


class Down(nn.Module):
  """A step of the discriminator, which halves the size of an image; the last returns a logit."""

  width: int
  dtype: jnp.dtype
  has_norm: bool = True
  is_last: bool = False

  @nn.compact
  def __call__(self, x, is_training: bool):
    if self.is_last:
      return nn.Dense(1, dtype=self.dtype)(x.reshape(len(x), -1))[:, 0]
    x = nn.Conv(self.width, (4, 4), 2, use_bias=not self.has_norm, dtype=self.dtype)(x)
    if self.has_norm:
      x = nn.BatchNorm(not is_training, momentum=0.9, dtype=self.dtype)(x)
    return nn.leaky_relu(x, 0.2)


class DCGAN:
  """Both networks as functions of their layers, with batch statistics by layer.

  Args:
    width: the width of the layer at half the size of the images.
    size: the size of the images, 8 times a power of two.
    channels: the channels of the images.
    dtype: the dtype that they compute in.
  """

  def __init__(self, width: int, size: int, channels: int, dtype):
    steps = size.bit_length() - 3  # from 4x4 to the image
    self.dtype = dtype
    widths = [width * 2**i for i in range(steps)]
    self.generator = {f"up_{i}": Up(w, dtype) for i, w in enumerate(reversed(widths))}
    self.generator[f"up_{steps}"] = Up(channels, dtype, is_last=True)
    self.discriminator = {f"down_{i}": Down(w, dtype, i > 0) for i, w in enumerate(widths)}
    self.discriminator[f"down_{steps}"] = Down(1, dtype, is_last=True)

  def init(self, key):
    """The float32 parameters and the batch statistics, with an entry for each layer."""
    blocks = self.generator | self.discriminator
    return batch_stats.init_blocks(blocks, jnp.zeros((1, NOISE)), key)[:2]

  def run(self, network, layers, kept, x, is_training=True, is_fixed=False):
    """A network's result and its new statistics; fixed weights get no gradient."""

    def call(block, weights, stats, x):
      if is_fixed:
        weights = jax.lax.stop_gradient(weights)
      return batch_stats.call_block(block, is_training, weights, stats, x)

    x, new = x.astype(self.dtype), {}
    for name, block in network.items():
      x, new[name] = layers[name](functools.partial(call, block), kept[name], x)
    return x, new

  def loss(self, layers, kept, images, noise):
    """The sum of both losses, each with gradients for its own network; and new statistics."""
    fakes, of_generator = self.run(self.generator, layers, kept, noise)
    judge = functools.partial(self.run, self.discriminator, layers, kept)
    reals_B, of_discriminator = judge(images)
    fakes_B, _ = judge(jax.lax.stop_gradient(fakes))
    fooled_B, _ = judge(fakes, is_fixed=True)
    cross_entropy = lambda logits, label: optax.sigmoid_binary_cross_entropy(
      logits.astype(jnp.float32), label
    ).mean()
    loss = cross_entropy(reals_B, 1.0) + cross_entropy(fakes_B, 0.0) + cross_entropy(fooled_B, 1.0)
    return loss, of_generator | of_discriminator


def frechet_distance(a_NxF, b_NxF) -> float:
  """The distance of two sets of features, each modelled as a normal distribution."""
  covariances = [np.cov(x, rowvar=False) for x in (a_NxF, b_NxF)]
  values, vectors = np.linalg.eigh(covariances[0])
  root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
  both = np.linalg.eigvalsh(root @ covariances[1] @ root)
  traces = sum(np.trace(c) for c in covariances) - 2 * np.sqrt(np.maximum(both, 0)).sum()
  return float(((a_NxF.mean(0) - b_NxF.mean(0)) ** 2).sum() + traces)


def make_task(args, dtype) -> training.Task:
  """The task: to generate images of clothes, padded to 32 pixels, with values from -1 to 1."""
  train, test = data.fashion_mnist()
  model = DCGAN(args.width, 32, 1, dtype)

  def scaled(images):
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return (images.astype(np.float32) / 127.5 - 1)[..., None]

  def batches(rng):
    while True:
      images = scaled(train.images[rng.integers(0, len(train.images), args.batch)])
      yield images, rng.standard_normal((args.batch, NOISE), np.float32)

  flat = scaled(train.images[:10_000]).reshape(10_000, -1)
  center = flat.mean(0)
  axes = np.linalg.eigh(np.cov(flat, rowvar=False))[1][:, -COMPONENTS:]

  def features(images):
    return (np.asarray(images, np.float32).reshape(len(images), -1) - center) @ axes

  tests = features(scaled(test.images))
  noise = np.random.default_rng(0).standard_normal((4, 500, NOISE), np.float32)

  @jax.jit
  def generate(params, kept, noise):
    layers = training.all_layers(params)
    return model.run(model.generator, layers, kept, noise, is_training=False)[0]

  def evaluate(params, kept):
    images = np.concatenate([generate(params, kept, z) for z in noise])
    return {"Fréchet distance": frechet_distance(features(images), tests)}

  return training.Task(model.init, model.loss, batches, evaluate)


def make_parser():
  """The options."""
  return training.make_parser(
    "dcgan",
    __doc__,
    {"width": 16},
    {"steps": 30, "width": 8},
    steps=600,
    batch=64,
    learning_rate=1e-3,
    optimizer="adam",
    b1=0.5,  # as in the paper; with 0.9 the two networks oscillate
  )


def main(argv=None):
  """Trains every format, prints the table and saves the figure."""
  training.main("dcgan", make_task, training.parse(make_parser(), argv))


if __name__ == "__main__":
  main()
