"""CLIP on emoji, with its whole memory recipe (arXiv 2103.00020, section 2.5).

The model learns Google's drawings with their names and keywords; a tenth of the concepts is held
out. The data set is small, so convolutions precede a small transformer of 8x8 patches. Figures:
how often a drawing's own text is among the 1, 5 and 10 nearest, for Twitter's drawings of the
learnt concepts and for drawings of the held-out concepts. A ridge regression from 16x16 pixels to
TF-IDF is the baseline.

All of the recipe is on by default, and each part can be switched off: gradient checkpointing,
similarities sharded over the devices, stochastically rounded weights of the text encoder, and
half-precision Adam statistics (--format bf16+8/fp32).
"""

import functools
import re

import jax
import numpy as np
import optax

from examples import clip_model, data, training

CONTEXT = 20
UNKNOWN, END = 1, 2  # and data.PAD


class Concepts:
  """The emoji: drawings, texts, and the split into learnt and held-out concepts."""

  def __init__(self):
    self.emoji = data.emoji()
    self.names = [_words(name) for name in self.emoji.names]
    self.tags = [[_words(tag) for tag in tags] for tags in self.emoji.keywords]
    order = np.random.default_rng(0).permutation(len(self.names))
    self.held_out, self.learnt = np.split(order, [len(order) // 10])
    known = sorted({w for i in self.learnt for words in self.all_words(i) for w in words})
    self.code = {word: 3 + i for i, word in enumerate(known)}

  def all_words(self, i: int) -> list[list[str]]:
    """The words of the name, and those of each keyword."""
    return [self.names[i], *self.tags[i]]

  @property
  def vocabulary(self) -> int:
    """The number of tokens; the last one ends a text."""
    return len(self.code) + 4

  def tokens(self, rows, rng: np.random.Generator | None = None) -> np.ndarray:
    """Texts of concepts, int32 [count, CONTEXT]: name and keywords, randomized with `rng`."""
    out = np.zeros((len(rows), CONTEXT), np.int32)
    for line, i in zip(out, rows, strict=True):
      parts = self.all_words(i)
      if rng is not None:
        tags = [parts[1 + j] for j in rng.permutation(len(parts) - 1)]
        parts = [parts[0], *tags[: rng.integers(0, len(tags) + 1)]]
        if rng.random() < 0.2 and len(parts) > 1:
          parts = parts[1:]
      codes = [self.code.get(word, UNKNOWN) for words in parts for word in words]
      if rng is not None:  # held-out concepts will contain unknown words, too
        codes = np.where(rng.random(len(codes)) < 0.1, UNKNOWN, codes).tolist()
      codes = [*codes[: CONTEXT - 1], self.vocabulary - 1]
      line[: len(codes)] = codes
    return out

  def images(self, style: str, rows) -> np.ndarray:
    """Drawings between 0 and 1, float32 [count, 32, 32, 3]."""
    return self.emoji.drawings[style][rows].astype(np.float32) / 255


def _words(text: str) -> list[str]:
  return re.findall(r"\w+|[^\w\s]", text.lower())


def augment(images_BxHxWxC, rng: np.random.Generator) -> np.ndarray:
  """Varies sizes, positions and colours, and hides a twentieth of the patches."""
  batch, size = images_BxHxWxC.shape[:2]
  scale = rng.uniform(0.8, 1.25, (batch, 1))
  shift = rng.uniform(-3, 3, (2, batch, 1))
  grid = np.arange(size) - size / 2 + 0.5

  def places(offset):
    return np.clip(np.rint(grid * scale + offset + size / 2 - 0.5), 0, size - 1).astype(int)

  y, x = places(shift[0]), places(shift[1])
  images = images_BxHxWxC[np.arange(batch)[:, None, None], y[:, :, None], x[:, None, :]]
  gain = rng.uniform(0.8, 1.2, (batch, 1, 1, 3))
  offset = rng.uniform(-0.12, 0.12, (batch, 1, 1, 3))
  images = np.clip(images * gain + offset, 0, 1)
  hidden = rng.random((batch, 4, 4, 1)) < 0.05
  hidden = hidden.repeat(size // 4, 1).repeat(size // 4, 2)
  return np.where(hidden, images[:, :1, :1], images).astype(np.float32)


def ridge(concepts: Concepts, penalty: float = 10.0) -> dict[str, float]:
  """The baseline: a ridge regression from 16x16 pixels to TF-IDF of names and keywords."""
  code = {w: i for i, w in enumerate(concepts.code)}
  counts = np.zeros((len(concepts.names), len(code)))
  for i in range(len(counts)):
    for word in (w for words in concepts.all_words(i) for w in words if w in code):
      counts[i, code[word]] += 1
  frequency = (counts[concepts.learnt] > 0).sum(0)
  texts = counts * np.log(len(concepts.learnt) / np.maximum(frequency, 1))
  texts /= np.maximum(np.linalg.norm(texts, axis=1, keepdims=True), 1e-9)

  def pixels(style, rows):
    x = concepts.images(style, rows).reshape(-1, 16, 2, 16, 2, 3).mean((2, 4))
    return np.concatenate([x.reshape(len(rows), -1), np.ones((len(rows), 1))], 1)

  x, y = pixels("google", concepts.learnt), texts[concepts.learnt]
  weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
  said = lambda style, rows: pixels(style, rows) @ weights
  return figures(said, lambda rows: texts[rows], concepts)


def figures(of_images, of_texts, concepts: Concepts) -> dict[str, float]:
  """The recalls of both tests, from functions that return unit vectors (or multiples of them)."""
  found = {}
  for name, style, rows in (
    ("Twitter's", "twitter", concepts.learnt),
    ("held-out", "google", concepts.held_out),
  ):
    recalls = clip_model.recalls(of_images(style, rows), of_texts(rows))
    found |= {f"{name} {k}": value for k, value in recalls.items()}
  return found


def make_task(args, dtype) -> training.Task:
  """The task: to match texts and drawings."""
  concepts = Concepts()
  encoder = clip_model.Encoder(args.layers, args.width, args.heads)
  sizes = clip_model.Sizes(
    encoder, encoder, args.patch, args.width, concepts.vocabulary, CONTEXT, 32, has_stem=True
  )
  model = clip_model.CLIP(sizes, dtype)
  mesh = None
  if args.shard_similarities and len(jax.devices()) > 1:
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(auto,))

  def loss_fn(layers, kept, images, tokens):
    return model.loss(layers, images, tokens, mesh), kept

  def batches(rng):
    while True:
      rows = rng.choice(concepts.learnt, args.batch, replace=False)
      yield augment(concepts.images("google", rows), rng), concepts.tokens(rows, rng)

  of_images = jax.jit(lambda p, x: model.encode_images(training.all_layers(p), x))
  of_texts = jax.jit(lambda p, x: model.encode_texts(training.all_layers(p), x))

  def evaluate(params, kept):
    del kept
    return figures(
      lambda style, rows: of_images(params, concepts.images(style, rows)),
      lambda rows: of_texts(params, concepts.tokens(rows)),
      concepts,
    )

  init = lambda key: (model.init(key), {})
  return training.Task(init, loss_fn, batches, evaluate, clip_model.clip_temperature)


def is_text(path) -> bool:
  """Whether a leaf of the parameters belongs to the text encoder."""
  return path[0].key.startswith("text")


def make_optimizer(fmt: training.Format, args, seed: int = 0):
  """An optimizer for the text encoder, with its own weight format, and one for the rest."""
  text = training.parse_format(f"{args.text_format}/{fmt.statistics}") if args.text_format else fmt
  if fmt.weights is None or text == fmt:
    return training.make_optimizer(fmt, args, seed)
  if args.release:  # gradient release takes one optimizer, with formats by leaf

    def weights(path, leaf):
      if leaf.ndim < 2:
        return "fp32"
      return text.weights if is_text(path) else fmt.weights

    return training.make_optimizer(fmt, args, seed, weights)
  parts = {
    "text": training.bare_optimizer(text, args, seed),
    "others": training.bare_optimizer(fmt, args, seed + 1),
  }
  label = lambda path, _: "text" if is_text(path) else "others"
  tx = optax.partition(parts, functools.partial(jax.tree_util.tree_map_with_path, label))
  return training.guarded(tx, fmt, args)


def make_parser():
  """The options."""
  parser = training.make_parser(
    "clip",
    __doc__,
    {"width": 96, "layers": 1, "heads": 4, "patch": 8},
    {"steps": 20, "width": 64},
    format="fp32,bf16,bf16+8/bf16",
    steps=1200,
    batch=128,
    learning_rate=2e-3,
    clip_norm=1.0,
    weight_decay=0.2,
    checkpointing=True,
    shard_similarities=True,
  )
  add = parser.add_argument
  for name in ("checkpointing", "shard-similarities"):
    add(f"--no-{name}", dest=name.replace("-", "_"), action="store_false")
  add(
    "--text-format",
    default="bf16+0",
    help='format of the text encoder\'s weights; "" for that of --format (%(default)s)',
  )
  return parser


def main(argv=None):
  """Trains every format, prints the table and saves the figure."""
  args = training.parse(make_parser(), argv)
  print("ridge regression:", {k: round(v, 3) for k, v in ridge(Concepts()).items()})
  training.main("clip", make_task, args, make_optimizer)


if __name__ == "__main__":
  main()
