"""The random stream: 32 bits for each (key, step, leaf, 64-bit element index).

The stream is counter-based: an element's bits do not depend on how its array is
tiled or sharded, and no generator state is stored. It has two stages:

- Once a leaf, Threefry-2x32 (``jax.extend.random``) turns key, step and leaf
  name into two 32-bit words. Related seeds, consecutive steps and neighbouring
  leaves give unrelated words.
- Once an element, a 32-bit mixer of three multiplications turns the index and
  these words into the bits. Its multipliers and shifts are those of Wellons'
  ``triple32``, the best three-round mixer that hash-prospector found (exact
  bias 0.021 of 1). The first word enters before the first round, the second in
  the middle, so no exclusive or on the index turns one leaf's stream into
  another's.

A weight's statistics need bits of their own, which come from further lanes of
the same element. Each lane multiplies the weight's bits once more and serves
two statistics, 16 bits each.

Why this mixer: a memory-bound update moves 8 to 10 bytes an element, and an
H100 issues about 35 to 44 integer instructions in that time. For bfloat16, this
mixer with index and threshold takes 15 to 17 of them (``python -m
benchmarks.instructions`` counts them in the compiled kernels). Philox and
Threefry produce 64 or 128 bits at once, which a tile cannot distribute over its
elements without shuffles. Run once an element, their rounds (7 of two wide
multiplications; 13 of add, rotate and exclusive or) would dominate the update.

``tests/test_random_bits.py`` checks the quality of the bits in the ways they
are used: consecutive elements, steps, leaves and seeds; low and high bits.
``benchmarks/random_stream.py`` runs the Dieharder battery;
``docs/random_stream.md`` keeps its output.
"""

from collections.abc import Callable, Sequence
import dataclasses
import hashlib
import math
from typing import Any

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np

_U32 = jnp.uint32
# Odd, with evenly spread bits: 2**32 over the golden ratio, and primes of xxHash.
_LANES = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
  """The position of a part (a shard, or one array of a stack) in a whole array.

  Attributes:
    start: the part's first place along each axis, integers, possibly traced; 0
      where the part is as long as the whole.
    shape: the shape of the whole. It may have additional leading axes; the part
      has one place along each of them.
  """

  start: tuple[Any, ...]
  shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def key_words(key: jax.typing.ArrayLike) -> jax.Array:
  """Converts an integer seed or a key array to raw key data.

  Args:
    key: an integer seed, a typed key, or raw key data (uint32 [2] or [4]).

  Returns:
    uint32 [2].

  Raises:
    TypeError: for anything else.
  """
  if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    words = jax.random.key_data(key)
  elif _is_integer(key):
    words = jax.random.key_data(jax.random.key(key, impl="threefry2x32"))
  else:
    words = key if isinstance(key, jax.Array) else np.asarray(key)  # type: ignore[assignment]
  if words.dtype != jnp.uint32 or words.shape not in ((2,), (4,)):
    raise TypeError(
      "key is an integer seed, a jax.random key, or raw key data (uint32 [2]"
      f" or [4]); got {words.dtype}{list(words.shape)}."
    )
  words = jnp.asarray(words)
  if words.shape == (4,):  # RBG keys: hash two words with the other two as the key
    words = jax.extend.random.threefry_2x32((words[0], words[1]), words[2:])
  return words


def _is_integer(x) -> bool:
  if isinstance(x, int):
    return not isinstance(x, bool)
  dtype = getattr(x, "dtype", None)
  return dtype is not None and jnp.issubdtype(dtype, jnp.integer) and x.shape == ()


def leaf_id(path: str) -> tuple[int, int]:
  """64 bits that identify a leaf by its path; equal paths give equal bits."""
  digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
  return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def stream_keys(
  words: jax.Array,
  step: jax.typing.ArrayLike = 0,
  leaf_ids: Sequence[tuple[int, int]] = ((0, 0),),
  part: jax.typing.ArrayLike = 0,
) -> jax.Array:
  """The two words that key each leaf's stream at one step.

  Args:
    words: raw key data, uint32 [2].
    step: the number of the step, an integer scalar.
    leaf_ids: 64 bits (``leaf_id``) for each of L leaves.
    part: the number of a part of the step, an integer scalar; 0 is the step
      itself.

  Returns:
    uint32 [L, 2].
  """
  step_word = jnp.asarray(step).astype(_U32)
  count = jnp.stack([step_word, jnp.asarray(part).astype(_U32)])
  k = jax.extend.random.threefry_2x32((words[0], words[1]), count)
  first, second = zip(*leaf_ids, strict=True)
  flat = jnp.array([*first, *second], _U32)
  return jax.extend.random.threefry_2x32((k[0], k[1]), flat).reshape(2, -1).T


def element_bits(key, index, index_high=0, lane: int = 0):
  """32 random bits for each element of an array or a tile, of any shape.

  Args:
    key: the two uint32 scalars of one row of ``stream_keys``. Four scalars are two
      keys: lane 0 takes the first, every other lane the second.
    index: uint32, the low half of the element's place in the whole array.
    index_high: uint32 (or 0), the high half of that place.
    lane: 0 for a weight. Each further lane gives more bits for the same element
      (its statistics), for one more multiplication.

  Returns:
    uint32 of index's shape.
  """
  return lane_bits(_mixed(key[-2:] if lane else key[:2], index, index_high), lane)


def _mixed(key, index, index_high):
  """An element's bits in lane 0."""
  k0, k1 = key
  h = index ^ k0
  h = (h ^ (h >> _U32(17))) * _U32(0xED5AD4BB)
  k1 = k1 ^ (index_high * _U32(0x9E3779B9))
  h = (h ^ (h >> _U32(11))) * _U32(0xAC4C1B51) + k1
  h = (h ^ (h >> _U32(15))) * _U32(0x31848BAB)
  return h ^ (h >> _U32(14))


def lane_bits(h, lane: int):
  """The bits of a lane, from the same elements' bits in lane 0."""
  for i in range(lane):
    h = h * _U32(_LANES[i % len(_LANES)])
    h = h ^ (h >> _U32(16))
  return h


def statistic_bits(bits: Callable[[int], jax.Array], index: int) -> jax.Array:
  """Random bits for one of an element's statistics: 16 bits of lane 1, 2, ...

  Args:
    bits: lane -> uint32, ``element_bits`` of the elements.
    index: the number of the statistic.

  Returns:
    uint32; the upper 16 bits are random.
  """
  half = bits(1 + index // 2)
  return half << _U32(16) if index % 2 else half


def place(coordinates, shape: tuple[int, ...]):
  """Row-major places in an array, as two uint32 halves.

  Args:
    coordinates: uint32 for each axis, of any common shape.
    shape: the shape of the whole array.

  Returns:
    (low, high); high is the Python integer 0 if every place fits in 32 bits.
  """
  is_huge = math.prod(shape) > 1 << 32
  low, high, stride = _U32(0), _U32(0) if is_huge else 0, 1
  for i, n in zip(reversed(coordinates), reversed(shape), strict=True):
    step = _U32(stride & 0xFFFFFFFF)
    total = low + i * step
    if is_huge:
      carry = (total < low).astype(_U32)
      high = high + jax.lax.mulhi(*jnp.broadcast_arrays(i, step)) + i * _U32(stride >> 32) + carry
    low, stride = total, stride * n
  return low, high


def element_index(shape: tuple[int, ...], window: Window | None = None):
  """The ``place`` of every element in an array, or in the whole that contains it.

  It is a sum of iotas, which XLA computes in registers and partitions along any
  axis.
  """
  coordinates = [jax.lax.broadcasted_iota(_U32, shape, axis) for axis in range(len(shape))]
  whole = shape
  if window is not None:
    whole, start = window.shape, [jnp.asarray(x).astype(_U32) for x in window.start]
    front = len(whole) - len(shape)
    coordinates = start[:front] + [i + x for i, x in zip(coordinates, start[front:], strict=True)]
  low, high = place(coordinates, whole)
  return jnp.broadcast_to(low, shape), high


def whole_place(places, shape: tuple[int, ...], window: Window | None):
  """Converts row-major places in a part to places in the whole, of under 2**32 elements.

  Args:
    places: uint32, of any shape, on arrays or on tiles.
    shape: the shape of the part, with as many axes as the whole.
    window: the part; None if it is the whole.

  Returns:
    uint32 of places' shape.
  """
  if window is None:
    return places
  runs, length, whole_length = [], 1, 1  # runs of axes; only the first axis of a run is cut
  for n, whole, start in zip(shape[::-1], window.shape[::-1], window.start[::-1], strict=True):
    length, whole_length, stride = length * n, whole_length * whole, whole_length
    if n != whole:
      offset = jnp.asarray(start).astype(_U32) * _U32(stride)
      runs.append((length, whole_length, offset))
      length, whole_length = 1, 1
  runs += [(length, whole_length, _U32(0))] if length > 1 else []
  result, stride = _U32(0), 1
  for i, (length, whole_length, offset) in enumerate(runs):
    is_last = i + 1 == len(runs)
    here = places if is_last else places % _U32(length)
    places = places // _U32(length) if not is_last else places
    result, stride = result + (here + offset) * _U32(stride), stride * whole_length
  return result


def random_bits(
  key: jax.Array, shape: tuple[int, ...], lane: int = 0, window: Window | None = None
) -> jax.Array:
  """The stream of a whole array or of a part of one.

  Args:
    key: uint32 [2] or [4], as ``element_bits`` takes it.
    shape: the shape of the array or the part.
    lane: see ``element_bits``.
    window: the part's position in the whole; None for a whole array.

  Returns:
    uint32 of ``shape``.
  """
  low, high = element_index(shape, window)
  return element_bits(tuple(key), low, high, lane)
