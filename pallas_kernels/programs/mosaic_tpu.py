"""mosaic_tpu: the step of a leaf as a Pallas TPU kernel, in one pass over memory, in place.

A grid walks tiles of [rows, lanes] through VMEM. Inside, a tile of 32 x 128 values, the
native tile of int8, stays in registers: four blocks a row. A block's maximum goes to all of
its lanes by exchanges of lanes, and its scale is picked by a gather within the register. A
register of packed codes holds those of two such tiles.
"""

from collections.abc import Sequence
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.formats import arithmetic
from pallas_kernels.formats.random_bits import Window, element_bits, whole_place
from pallas_kernels.formats.state_formats import BLOCK
from pallas_kernels.placement import implementations
from pallas_kernels.programs.leaf import (
  Leaf,
  bound,
  from_float32,
  from_parts,
  in_float32,
  is_small,
  stored_parts,
)
from pallas_kernels.programs.tile_step import Part, tile_step

LANES, SUBLANES = 128, 32  # the native tile of int8
# A tile's lanes in VMEM: as many as 128 scales cover. Its values: 6 MB with both buffers.
MOST_LANES = LANES * BLOCK
TILE_VALUES = 1 << 17

_I32, _U32 = jnp.int32, jnp.uint32


def takes(shape, stack, is_whole: bool, is_packed: bool = False) -> bool:
  """Whether ``step`` takes a leaf: a large one, of whole registers along its last axis."""
  del is_whole
  is_in_registers = len(shape) >= 2 and shape[-1] % (LANES << is_packed) == 0
  return is_in_registers and not is_small(shape) and math.prod(stack) < implementations.MAX_SIZE


def step(rules, formats, lands, scalars, leaves: Sequence[Leaf], when, index, windows=None):
  """The step of leaves, a kernel each, with the arguments and results of ``step_leaves``."""
  windows = windows or [None] * len(leaves)
  one = jax.jit(functools.partial(_step, rules, formats, lands))  # leaves of one shape once
  return [one(scalars, x, window, when, index) for x, window in zip(leaves, windows, strict=True)]


class _Tiling(NamedTuple):
  """How a grid walks a leaf [lead, rows, n] through VMEM.

  Attributes:
    lead: the product of the leading axes.
    rows: the leaf's.
    n: the leaf's.
    tile_rows: rows of a tile, a multiple of 32.
    lanes: lanes of a tile, a multiple of 128.
  """

  lead: int
  rows: int
  n: int
  tile_rows: int
  lanes: int

  @classmethod
  def of(cls, shape: tuple[int, ...]) -> "_Tiling":
    *lead, rows, n = shape
    lanes = min(n, MOST_LANES)
    most = TILE_VALUES // lanes // SUBLANES * SUBLANES
    return cls(math.prod(lead), rows, n, min(most, -(-rows // SUBLANES) * SUBLANES), lanes)

  @property
  def grid(self) -> tuple[int, int, int]:
    return self.lead, -(-self.rows // self.tile_rows), -(-self.n // self.lanes)

  @property
  def is_exact(self) -> bool:
    """Whether the tiles cover nothing but the leaf."""
    return self.rows % self.tile_rows == 0 and self.n % self.lanes == 0


def _step(rules, formats, lands, scalars, leaf: Leaf, window: Window | None, when, index):
  """The step of one leaf as one kernel."""
  from jax.experimental import pallas as pl  # here: importing Pallas takes 0.2 s
  from jax.experimental.pallas import tpu as pltpu

  tiling = _Tiling.of(leaf.gradient.shape)
  merged = lambda x: _as_bits(x).reshape(-1, *x.shape[-2:])  # merging leading axes moves nothing
  read, written = (leaf.low, leaf.gradient) if lands else (leaf.gradient, leaf.low)
  values, scales = stored_parts(written, leaf.delta, leaf.statistics)
  in_place = list(map(merged, (*values, *scales)))
  of_weight = len(values) - len(leaf.statistics)
  packed = {of_weight + i: f for i, f in enumerate(formats[1]) if f.is_packed}
  # New weights that land replace the gradients only if these have their dtype.
  types = [_as_bits(leaf.low).dtype, *(x.dtype for x in in_place[1:])]

  whole = leaf.low.shape if window is None else window.shape
  start = [0] * len(whole) if window is None else window.start
  begin = [when is None or when, 0 if index is None else index, *start]
  integers = jnp.stack([jnp.asarray(x).astype(_I32) for x in begin])

  def places(begin_ref, rows_T, lanes_T):
    """The place of each element in the whole leaf, uint32."""
    rows_T = rows_T + pl.program_id(0) * tiling.rows
    here = rows_T.astype(_U32) * _U32(tiling.n) + lanes_T.astype(_U32)
    if window is None and index is None:
      return here
    begin = [begin_ref[i + 2] for i in range(len(whole))]
    if index is None:
      return whole_place(here, leaf.gradient.shape, Window(tuple(begin), whole))
    layer = Window((begin_ref[1], *begin[1:]), whole)
    return whole_place(here, (1, *leaf.gradient.shape), layer)

  def step_tile(rule, bits, read_T, values_T, scales_T, largest):
    read_T = _of_bits(read_T, read.dtype)
    values_T = [
      x_T if i in packed else _of_bits(x_T, x.dtype)
      for i, (x_T, x) in enumerate(zip(values_T, values, strict=True))
    ]
    parts = [Part(bits, None, read_T, values_T)]
    (new_T,), scales_T = tile_step(
      rule, formats, lands, parts, lambda x: x, scales_T, largest=largest
    )
    return list(map(_as_bits, new_T)), scales_T

  def body(integers_ref, numbers_ref, words_ref, read_ref, *refs):
    olds, news = refs[: len(in_place)], refs[len(in_place) :]
    rule = bound(rules, from_float32(numbers_ref, scalars))
    words = [words_ref[i] for i in range(leaf.stream.shape[0])]
    split = lambda refs: (refs[: len(values)], refs[len(values) :])
    run = functools.partial(
      _run_tile, tiling, packed, functools.partial(step_tile, rule),
      functools.partial(places, integers_ref), words, read_ref, split(olds), split(news),
    )  # fmt: skip

    def copy():
      for new, old in zip(news, olds, strict=True):
        new[...] = old[...]

    if when is None:
      run()
    else:
      pl.when(integers_ref[0] != 0)(run)
      pl.when(integers_ref[0] == 0)(copy)

  def spec(x, is_stacked: bool, in_lane: int = 1):
    width = min(x.shape[-1], tiling.lanes // in_lane)
    where = lambda i, j, k, integers: (i, j, k)
    if is_stacked:
      where = lambda i, j, k, integers: (integers[1] * tiling.lead + i, j, k)
    return pl.BlockSpec((1, tiling.tile_rows, width), where)

  is_stacked = index is not None
  in_lane = [2 if i in packed else 1 for i in range(len(values))] + [BLOCK] * len(scales)
  specs = [spec(in_place[0], is_stacked and not lands)]
  specs += [spec(x, is_stacked, k) for x, k in zip(in_place[1:], in_lane[1:], strict=True)]
  scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
  aliases = {4 + i: i for i, x in enumerate(in_place) if x.dtype == types[i]}
  if implementations.interpreter_is_forced() and not tiling.is_exact:
    aliases = {}  # the interpreter gives an aliased result the shape of whole tiles
  found = pl.pallas_call(
    body,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=tiling.grid,
      in_specs=[scalar, scalar, spec(merged(read), is_stacked and lands), *specs],
      out_specs=specs,
    ),
    out_shape=[jax.ShapeDtypeStruct(x.shape, t) for x, t in zip(in_place, types, strict=True)],
    input_output_aliases=aliases,
  )(integers, in_float32(scalars), leaf.stream, merged(read), *in_place)

  old = leaf[1:4]
  new = from_parts(old, found[: len(values)], found[len(values) :])
  return jax.tree.map(lambda x, y: _of_bits(x, y.dtype).reshape(y.shape), new, old)


def _run_tile(tiling: _Tiling, packed, step_tile, places, words, read_ref, olds, news):
  """Steps a tile in VMEM, 32 x 128 values at a time.

  Args:
    tiling: the grid's.
    packed: the values that are packed codes: their number -> their format.
    step_tile: ``(bits, read, values, scales, largest) -> (values, scales)``, in registers.
    places: (rows, lanes) -> the elements' places in the whole leaf.
    words: the words of the stream.
    read_ref: the values that are only read.
    olds: the values that are replaced, and the scales.
    news: where they go.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  (old_values, old_scales), (new_values, new_scales) = olds, news
  row_T = jax.lax.broadcasted_iota(_I32, (SUBLANES, LANES), 0)
  lane_T = jax.lax.broadcasted_iota(_I32, (SUBLANES, LANES), 1)
  in_register = LANES // BLOCK  # scales
  registers = 2 if packed else 1  # to a register of bytes
  largest = functools.partial(_largest, lane_T, pltpu.roll)

  def run_rows(i, carry):
    first_row = pl.multiple_of(i * SUBLANES, SUBLANES)
    rows = 0, pl.ds(first_row, SUBLANES)
    old = [_as_register(ref[rows]) for ref in old_scales]

    def step_register(j, codes):
      first_lane = pl.multiple_of(j * LANES, LANES)
      here = (*rows, pl.ds(first_lane, LANES))
      places_T = places(
        row_T + (pl.program_id(1) * tiling.tile_rows + first_row),
        lane_T + (pl.program_id(2) * tiling.lanes + first_lane),
      )
      which_T = j * in_register + lane_T // BLOCK
      values_T, scales_T = step_tile(
        lambda lane: element_bits(words, places_T, lane=lane),
        read_ref[here],
        [codes[i] if i in packed else ref[here] for i, ref in enumerate(old_values)],
        [_low(jnp.take_along_axis(x, which_T, axis=1)) for x in old],
        largest,
      )
      for i, (ref, x_T) in enumerate(zip(new_values, values_T, strict=True)):
        if i not in packed:
          ref[here] = x_T
      first_T = lane_T % in_register * BLOCK
      scales_T = [jnp.take_along_axis(arithmetic.widen(x), first_T, axis=1) for x in scales_T]
      return lane_T // in_register == j, scales_T, {i: values_T[i] for i in packed}

    def run(j, new):
      here = (*rows, pl.ds(pl.multiple_of(j * LANES, LANES), LANES))
      bytes_T = {i: old_values[i][here].astype(_I32) for i in packed}
      made = []
      for half in range(registers):
        codes = {i: _codes_in(lane_T, half, bytes_T[i], f) for i, f in packed.items()}
        is_here_T, scales_T, codes = step_register(registers * j + half, codes)
        new = [jnp.where(is_here_T, x, y) for x, y in zip(scales_T, new, strict=True)]
        made.append(codes)
      for i in packed:
        new_values[i][here] = _bytes_of(lane_T, pltpu.roll, *(codes[i] for codes in made))
      return new

    zeros = [jnp.zeros((SUBLANES, LANES), jnp.float32)] * len(old)
    new = jax.lax.fori_loop(0, tiling.lanes // LANES // registers, run, zeros)
    for ref, x in zip(new_scales, new, strict=True):
      ref[rows] = _low(x)[:, : ref.shape[-1]]
    return carry

  jax.lax.fori_loop(0, tiling.tile_rows // SUBLANES, run_rows, 0)


def _largest(lane_T, roll, x_T):
  """The largest of each block of 32 lanes, in all of its lanes: int32."""
  shift = 1
  while shift < BLOCK:
    other_T = jnp.where((lane_T & shift) != 0, roll(x_T, shift, 1), roll(x_T, LANES - shift, 1))
    x_T = jnp.maximum(x_T, other_T)
    shift *= 2
  return x_T


def _codes_in(lane_T, half: int, bytes_T, fmt):
  """A register of bytes, int32 -> the codes in its first or second half, int32."""
  of_T = jnp.take_along_axis(bytes_T, half * (LANES // 2) + lane_T // 2, axis=1)
  return arithmetic.integer_in(of_T, lane_T & 1, 4, not fmt.is_square)


def _bytes_of(lane_T, roll, *codes):
  """The inverse: two registers of codes -> one of bytes, uint8."""
  # An even lane gets both codes.
  wide_T = [x_T.astype(_I32) for x_T in codes]
  bytes_T = [arithmetic.two_integers(x_T, roll(x_T, LANES - 1, 1), 4) for x_T in wide_T]
  even_T = lane_T % (LANES // 2) * 2
  first_T, second_T = (jnp.take_along_axis(x_T, even_T, axis=1) for x_T in bytes_T)
  return jnp.where(lane_T < LANES // 2, first_T, second_T).astype(jnp.uint8)


def _as_register(scales):
  """bfloat16 [rows, k] -> float32 [rows, 128]."""
  wide = arithmetic.widen(scales)
  rest = LANES - wide.shape[-1]
  return jnp.concatenate([wide, jnp.zeros((SUBLANES, rest), jnp.float32)], 1) if rest else wide


def _as_bits(x):
  """float16, which Mosaic TPU cannot load, as its bit pattern."""
  return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.float16 else x


def _of_bits(x, dtype):
  return jax.lax.bitcast_convert_type(x, dtype) if dtype == jnp.float16 else x


def _low(x):
  """float32 that is a bfloat16 -> bfloat16."""
  return arithmetic.low_of(arithmetic.bits_of(x) >> _U32(16), jnp.bfloat16)
