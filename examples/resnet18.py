"""ResNet-18 on Fashion-MNIST: images of ten kinds of clothes.

The network of arXiv 1512.03385, as trained in 2309.12381 and 1710.03740. For images under 64
pixels, the stem is a 3x3 convolution without pooling. Figures: accuracy and loss on 2,000 test
images.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import batch_stats, data, training

STAGES = (1, 2, 4, 8)  # widths relative to the first stage


class Stem(nn.Module):
  """The first convolution."""

  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BxHxWxC, is_training: bool):
    is_small = x_BxHxWxC.shape[1] < 64
    size, stride = ((3, 3), 1) if is_small else ((7, 7), 2)
    x = nn.Conv(self.width, size, stride, use_bias=False, dtype=self.dtype)(x_BxHxWxC)
    x = nn.relu(nn.BatchNorm(not is_training, momentum=0.9, dtype=self.dtype)(x))
    return x if is_small else nn.max_pool(x, (3, 3), (2, 2), "SAME")


class Block(nn.Module):
  """Two convolutions and a residual connection."""

  width: int
  stride: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x_BxHxWxC, is_training: bool):
    conv = functools.partial(nn.Conv, self.width, use_bias=False, dtype=self.dtype)
    norm = functools.partial(nn.BatchNorm, not is_training, momentum=0.9, dtype=self.dtype)
    h = nn.relu(norm()(conv((3, 3), self.stride)(x_BxHxWxC)))
    h = norm(scale_init=nn.initializers.zeros)(conv((3, 3))(h))
    if x_BxHxWxC.shape != h.shape:
      x_BxHxWxC = norm()(conv((1, 1), self.stride)(x_BxHxWxC))
    return nn.relu(x_BxHxWxC + h)


class ResNet18:
  """The network as functions of its layers, with batch statistics by layer.

  Args:
    width: the width of the first stage; 64 in the paper.
    classes: the number of classes.
    dtype: the dtype that it computes in.
  """

  def __init__(self, width: int, classes: int, dtype):
    self.dtype = dtype
    self.blocks: dict[str, nn.Module] = {"stem": Stem(width, dtype)}
    for stage, factor in enumerate(STAGES):
      for i in range(2):
        stride = 2 if stage and not i else 1
        self.blocks[f"block_{stage}_{i}"] = Block(width * factor, stride, dtype)
    self.head = nn.Dense(classes, dtype=dtype)

  def init(self, key, image_shape):
    """The float32 parameters and the batch statistics, with an entry for each layer."""
    params, kept, x = batch_stats.init_blocks(self.blocks, jnp.zeros((1, *image_shape)), key)
    params["head"] = self.head.init(key, x.mean((1, 2)))["params"]
    return params, kept

  def logits(self, layers, kept, images_BxHxWxC, is_training: bool):
    """The logits, float32 [batch, classes], and the new batch statistics."""
    x, new = images_BxHxWxC.astype(self.dtype), {}
    for name, block in self.blocks.items():
      call = functools.partial(batch_stats.call_block, block, is_training)
      x, new[name] = layers[name](call, kept[name], x)
    # Not x.mean((1, 2)): XLA:CPU (jaxlib 0.12.0.1) computes NaN for it here in bfloat16.
    pooled = lambda x: nn.avg_pool(x, x.shape[1:3])[:, 0, 0]
    x = layers["head"](lambda w, x: self.head.apply({"params": w}, pooled(x)), x)
    return x.astype(jnp.float32), new

  def loss(self, layers, kept, images, labels):
    """The mean cross-entropy in nats, and the new batch statistics."""
    logits, kept = self.logits(layers, kept, images, True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), kept


def make_task(args, dtype) -> training.Task:
  """The task: to classify ten kinds of clothes."""
  train, test = data.fashion_mnist()
  model = ResNet18(args.width, 10, dtype)
  scaled = lambda images: ((images - np.float32(73)) / np.float32(90))[..., None]

  def batches(rng):
    while True:
      rows = rng.integers(0, len(train.labels), args.batch)
      images = scaled(train.images[rows])
      flip = rng.integers(0, 2, args.batch)[:, None, None, None]
      yield np.where(flip, images[:, :, ::-1], images), train.labels[rows].astype(np.int32)

  @jax.jit
  def predict(params, kept, images):
    return model.logits(training.all_layers(params), kept, images, False)[0]

  def evaluate(params, kept):
    count = args.test_images
    chunks = scaled(test.images[:count]).reshape(-1, 500, 28, 28, 1)
    logits = np.concatenate([predict(params, kept, images) for images in chunks])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, test.labels[:count])
    right = (logits.argmax(-1) == test.labels[:count]).mean()
    return {"accuracy": float(right), "test loss": float(losses.mean())}

  return training.Task(lambda key: model.init(key, (28, 28, 1)), model.loss, batches, evaluate)


def make_parser():
  """The options."""
  return training.make_parser(
    "resnet18",
    __doc__,
    {"width": 16},
    {"steps": 30, "width": 8},
    steps=400,
    batch=64,
    learning_rate=2e-3,
    test_images=2000,
  )


def main(argv=None):
  """Trains every format, prints the table and saves the figure."""
  training.main("resnet18", make_task, training.parse(make_parser(), argv))


if __name__ == "__main__":
  main()
