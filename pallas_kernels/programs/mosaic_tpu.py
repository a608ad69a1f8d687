"""mosaic_tpu: the step of a leaf as a Pallas TPU kernel, in one pass over memory, in place.

A grid walks tiles of [rows, lanes] through VMEM. Inside, a tile of 32 x 128 values, the
native tile of int8, stays in registers: four blocks a row. A block's maximum goes to all of
its lanes by exchanges of lanes, and its scale is picked by a gather within the register.
"""

from collections.abc import Sequence
import functools
import math

import jax
import jax.numpy as jnp

from pallas_kernels.formats import arithmetic
from pallas_kernels.formats.random_bits import Window, element_bits, whole_place
from pallas_kernels.formats.state_formats import BLOCK, Blocks
from pallas_kernels.placement import implementations
from pallas_kernels.programs.leaf import Leaf, bound, is_small
from pallas_kernels.programs.tile_step import tile_step

LANES, SUBLANES = 128, 32  # the native tile of int8
# A tile's lanes in VMEM: as many as 128 scales cover. Its values: 6 MB with both buffers.
MOST_LANES = LANES * BLOCK
TILE_VALUES = 1 << 17

_I32, _U32 = jnp.int32, jnp.uint32


def takes(shape: tuple[int, ...], stack: tuple[int, ...], is_whole: bool) -> bool:
  """Whether ``step`` takes a leaf: a large one, of whole registers along its last axis."""
  del is_whole
  is_in_registers = len(shape) >= 2 and shape[-1] % LANES == 0
  return is_in_registers and not is_small(shape) and math.prod(stack) < implementations.MAX_SIZE


def step(rules, formats, lands, scalars, leaves: Sequence[Leaf], when, index, windows=None):
  """The step of leaves, a kernel each, with the arguments and results of ``step_leaves``."""
  windows = windows or [None] * len(leaves)
  one = jax.jit(functools.partial(_step, rules, formats, lands))  # leaves of one shape once
  return [one(scalars, x, window, when, index) for x, window in zip(leaves, windows, strict=True)]


def _step(rules, formats, lands, scalars, leaf: Leaf, window: Window | None, when, index):
  """The step of one leaf as one kernel."""
  from jax.experimental import pallas as pl  # here: importing Pallas takes 0.2 s
  from jax.experimental.pallas import tpu as pltpu

  shape = leaf.gradient.shape
  *lead, rows, n = shape
  lanes = min(n, MOST_LANES)
  tile_rows = min(TILE_VALUES // lanes // SUBLANES * SUBLANES, -(-rows // SUBLANES) * SUBLANES)
  grid = math.prod(lead), -(-rows // tile_rows), -(-n // lanes)

  # Arrays as [leading axes, rows, lanes]: merging leading axes moves nothing.
  merged = lambda x: _as_bits(x).reshape(-1, *x.shape[-2:])
  read, written = leaf.gradient, leaf.low
  if lands:
    read, written = written, read
  values = [written] if leaf.delta is None else [written, leaf.delta]
  values += [x.codes if isinstance(x, Blocks) else x for x in leaf.statistics]
  scales = [x.scale for x in leaf.statistics if isinstance(x, Blocks)]
  in_place = list(map(merged, (*values, *scales)))

  # Scalars: what the rule reads, the place, the stream, whether the step is taken.
  numbers = jnp.stack([jnp.asarray(x, jnp.float32) for x in scalars])
  start = [jnp.asarray(0 if index is None else index, _I32)]
  if window is not None:
    start += [jnp.asarray(x, _I32) for x in window.start]
  taken = jnp.asarray(True if when is None else when).astype(_I32)
  places = jnp.stack([taken, *start])

  full = leaf.low.shape if window is None else window.shape

  def place(start_ref, row, lane):
    """The place of each element in the whole leaf, uint32."""
    here = (pl.program_id(0).astype(_U32) * _U32(rows) + row) * _U32(n) + lane
    if window is None and index is None:
      return here
    begin = [0] * len(full) if window is None else [start_ref[i + 2] for i in range(len(full))]
    if index is None:
      return whole_place(here, shape, Window(tuple(begin), full))
    return whole_place(here, (1, *shape), Window((start_ref[1], *begin[1:]), full))

  def body(places_ref, numbers_ref, words_ref, read_ref, *refs):
    olds, news = refs[: len(in_place)], refs[len(in_place) :]
    words = [words_ref[i] for i in range(leaf.stream.shape[0])]
    scalars_in = [_as(numbers_ref[i], x.dtype) for i, x in enumerate(scalars)]
    rule = bound(rules, scalars_in)
    row_T = jax.lax.broadcasted_iota(_I32, (SUBLANES, LANES), 0)
    lane_T = jax.lax.broadcasted_iota(_I32, (SUBLANES, LANES), 1)

    def run_rows(i, carry):
      first_row = pl.multiple_of(i * SUBLANES, SUBLANES)
      here = 0, pl.ds(first_row, SUBLANES)
      old_scales = [_as_registers(ref[here]) for ref in olds[len(values) :]]

      def run(j, new_scales):
        first_lane = pl.multiple_of(j * LANES, LANES)
        at = (*here, pl.ds(first_lane, LANES))
        places_T = place(
          places_ref,
          (row_T + (pl.program_id(1) * tile_rows + first_row)).astype(_U32),
          (lane_T + (pl.program_id(2) * lanes + first_lane)).astype(_U32),
        )
        bits = lambda lane: element_bits(words, places_T, lane=lane)
        # Of 128 scales in a register, four belong here.
        which = j * (LANES // BLOCK) + lane_T // BLOCK
        scales_T = [_low(jnp.take_along_axis(x, which, axis=1)) for x in old_scales]
        values_T = [_of_bits(ref[at], x.dtype) for ref, x in zip(olds, values, strict=False)]
        new, scales_T = tile_step(
          rule, formats, lands, bits, None, lambda x: x, _of_bits(read_ref[at], read.dtype),
          values_T, scales_T, largest=functools.partial(_largest, lane_T, pltpu.roll),
        )  # fmt: skip
        for ref, x in zip(news[: len(values)], new, strict=True):
          ref[at] = _as_bits(x)
        is_mine = lane_T // (LANES // BLOCK) == j
        back = lane_T % (LANES // BLOCK) * BLOCK
        scales_T = [jnp.take_along_axis(_wide(x), back, axis=1) for x in scales_T]
        return [jnp.where(is_mine, x, y) for x, y in zip(scales_T, new_scales, strict=True)]

      zeros = [jnp.zeros((SUBLANES, LANES), jnp.float32)] * len(scales)
      new_scales = jax.lax.fori_loop(0, lanes // LANES, run, zeros)
      for ref, x in zip(news[len(values) :], new_scales, strict=True):
        ref[here] = _low(x)[:, : ref.shape[-1]]
      return carry

    def run():
      jax.lax.fori_loop(0, tile_rows // SUBLANES, run_rows, 0)

    def copy():
      for new, old in zip(news, olds, strict=True):
        new[...] = old[...]

    if when is None:
      run()
    else:
      pl.when(places_ref[0] != 0)(run)
      pl.when(places_ref[0] == 0)(copy)

  count = math.prod(lead)
  in_stack = lambda i, j, k, places: (places[1] * count + i, j, k)
  in_array = lambda i, j, k, places: (i, j, k)
  where = in_array if index is None else in_stack

  def spec(x, where):
    width = lanes if x.shape[-1] == n else min(x.shape[-1], lanes // BLOCK)
    return pl.BlockSpec((1, tile_rows, width), where)

  # A layer of stacked weights that stay is read from the stack, its gradient replaced alone.
  first = in_array if lands else where
  specs = [spec(in_place[0], first), *(spec(x, where) for x in in_place[1:])]
  scalar = pl.BlockSpec(memory_space=pltpu.SMEM)
  # New weights that land replace the gradients if these have their dtype.
  types = [_as_bits(leaf.low).dtype, *(x.dtype for x in in_place[1:])]
  aliases = {4 + i: i for i, x in enumerate(in_place) if x.dtype == types[i]}
  if implementations.interpreter_is_forced() and (rows % tile_rows or n % lanes):
    aliases = {}  # the interpreter gives an aliased result the shape of whole tiles
  results = pl.pallas_call(
    body,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=grid,
      in_specs=[scalar, scalar, spec(merged(read), where if lands else in_array), *specs],
      out_specs=specs,
    ),
    out_shape=[jax.ShapeDtypeStruct(x.shape, t) for x, t in zip(in_place, types, strict=True)],
    input_output_aliases=aliases,
  )(places, numbers, leaf.stream, merged(read), *in_place)

  found = iter(results)
  take = lambda x: _of_bits(next(found), x.dtype).reshape(x.shape)
  low = _of_bits(next(found), leaf.low.dtype).reshape(written.shape)
  delta = None if leaf.delta is None else take(leaf.delta)
  codes = [take(x.codes if isinstance(x, Blocks) else x) for x in leaf.statistics]
  statistics = [
    Blocks(x, take(old.scale)) if isinstance(old, Blocks) else x
    for x, old in zip(codes, leaf.statistics, strict=True)
  ]
  return low, delta, statistics


def _largest(lane_T, roll, x_T):
  """The largest of each block of 32 lanes, in all of its lanes: int32."""
  shift = 1
  while shift < BLOCK:
    other_T = jnp.where((lane_T & shift) != 0, roll(x_T, shift, 1), roll(x_T, LANES - shift, 1))
    x_T = jnp.maximum(x_T, other_T)
    shift *= 2
  return x_T


def _as_registers(scales):
  """bfloat16 [rows, k] -> float32 [rows, 128]."""
  wide = _wide(scales)
  rest = LANES - wide.shape[-1]
  return jnp.concatenate([wide, jnp.zeros((SUBLANES, rest), jnp.float32)], 1) if rest else wide


def _wide(x):
  return arithmetic.widen(x)


def _as_bits(x):
  """float16, which Mosaic TPU cannot load, as its bit pattern."""
  return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.float16 else x


def _of_bits(x, dtype):
  return jax.lax.bitcast_convert_type(x, dtype) if dtype == jnp.float16 else x


def _low(x):
  """float32 that is a bfloat16 -> bfloat16."""
  return arithmetic.low_of(arithmetic.bits_of(x) >> _U32(16), jnp.bfloat16)


def _as(number, dtype):
  """A scalar that was passed as float32."""
  return number != 0 if dtype == jnp.bool_ else number.astype(dtype)
