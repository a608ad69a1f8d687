"""The errors of Adam's statistics in 8-bit and 4-bit formats: `python -m benchmarks.state_formats`.

A candidate is a list of magnitudes between 0 and 1, relative to the largest in a
block of 32: 127 magnitudes (4 bits: 7) and a sign for mu, 255 (15) for the root of
nu, or for nu itself in some candidates. Prints the tables of
`docs/state_formats.md`. A row takes a minute or two on two cores. The argument 8 or
4 prints one table.
"""

import dataclasses
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np

BLOCK, BLOCKS = 32, 1024
WARM, STEPS = 2000, 20_000
B1, B2 = 0.9, 0.999


def power(p):
  """Levels (c / n)**p."""
  return lambda n: (np.arange(n + 1) / n) ** p


def softsign(n):
  """FlashOptim's levels: y = 2x / (1 + x)."""
  y = np.arange(n + 1) / n
  return y / (2 - y)


def logarithmic(n):
  """Zero, and levels of equal ratios from 2**-16 to 1."""
  return np.concatenate([[0], 2.0 ** np.linspace(-16, 0, n)])


def float8(n):
  """The levels of e4m3 (n = 127), or with one more mantissa bit for unsigned values."""
  mantissa = 3 if n == 127 else 4
  code = np.arange(n)  # the last code is NaN
  e, m = code >> mantissa, (code & ((1 << mantissa) - 1)) / (1 << mantissa)
  value = np.where(e == 0, m * 2.0**-6, (1 + m) * 2.0 ** (e - 7.0))
  return value / value[-1]


def without_zero(n):
  """Linear levels without a zero, as torchao's for a 4-bit nu."""
  return np.arange(1, n + 2) / (n + 1)


def half_step(n):
  """Zero, and linear levels from half a step."""
  return np.concatenate([[0], 2 * np.arange(n) + 1]) / (2 * n - 1)


def dynamic(n):
  """Bitsandbytes' dynamic map: decades, each with twice the levels of the one below."""
  decades = int(np.log2(n + 1))
  edges = [np.linspace(0.1, 1, 2**i + 1) * 10.0 ** (i + 1 - decades) for i in range(decades)]
  return np.concatenate([[0], *((x[1:] + x[:-1]) / 2 for x in edges), [1]])


def dynamic_below(n):
  """The magnitudes of the dynamic map's negative levels: -1 has no code."""
  return dynamic(n)[:-1]


def normal(n):
  """NF4's positive levels: quantiles of a normal distribution, 8 of them beside zero."""
  return _quantiles(n + 1)


def normal_negative(n):
  """The magnitudes of NF4's negative levels, 7 of them beside zero."""
  return _quantiles(n)


def _quantiles(n):
  share = np.linspace(0.5, 0.9677083, n + 1)
  value = np.array([statistics.NormalDist().inv_cdf(x) for x in share])
  return value / value[-1]


@dataclasses.dataclass(frozen=True)
class Candidate:
  """The levels of mu and of nu (or its root), and the rounding to them."""

  name: str
  mu: object
  nu: object
  rounding: str = "stochastic"
  nu_by_root: bool = True
  never_zero: bool = True  # a positive nu keeps the smallest magnitude
  bits: int = 8
  mu_below: object = None  # the levels of a negative mu, if they differ
  holds: bool = False  # the scale of nu stays while it is up to half an octave too large


def four(*args, **kwargs):
  """A candidate of 4 bits."""
  return Candidate(*args, **kwargs, bits=4)


CANDIDATES = [
  Candidate("linear, nu itself", power(1), power(1), "nearest", False, False),
  Candidate("linear", power(1), power(1), "nearest", never_zero=False),
  Candidate("softsign / linear (FlashOptim)", softsign, power(1), "nearest", never_zero=False),
  Candidate("linear", power(1), power(1)),
  Candidate("softsign / linear", softsign, power(1)),
  Candidate("square / linear (chosen)", power(2), power(1)),
  Candidate("square", power(2), power(2)),
  Candidate("square / softsign", power(2), softsign),
  Candidate("fourth power", power(4), power(4)),
  Candidate("logarithmic, 2^-16", logarithmic, logarithmic),
  Candidate("float8", float8, float8),
  four(
    "dynamic / linear, nu itself, no 0", dynamic, without_zero, "nearest", False,
    mu_below=dynamic_below,
  ),
  four("NF4 / linear", normal, power(1), "nearest", mu_below=normal_negative),
  four("NF4 / linear", normal, power(1), mu_below=normal_negative),
  four("NF4 / linear, held", normal, power(1), mu_below=normal_negative, holds=True),
  four("NF4 / half step, held", normal, half_step, mu_below=normal_negative, holds=True),
  four("linear / half step, held", power(1), half_step, holds=True),
  four("softsign / half step, held", softsign, half_step, holds=True),
  four("square / half step, held (chosen)", power(2), half_step, holds=True),
  four("square / half step, held", power(2), half_step, "ZIP-SR", holds=True),
  four("square / square, held", power(2), power(2), holds=True),
]  # fmt: skip


def scale_of(x, old=None):
  """The largest of a block, rounded up to bfloat16; the old scale while it is close above."""
  bits = jax.lax.bitcast_convert_type(jnp.max(x, axis=-1, keepdims=True), jnp.uint32)
  bits = (bits + jnp.uint32(0xFFFF)) >> 16
  if old is not None:
    old = jax.lax.bitcast_convert_type(old, jnp.uint32) >> 16
    bits = jnp.where((bits <= old) & (old <= bits + 64), old, bits)
  return jax.lax.bitcast_convert_type(bits << 16, jnp.float32)


def store(x, scale, levels, rounding, uniform, never_zero):
  """Rounds non-negative x [K, B] to a block's levels and back."""
  ratio = jnp.where(scale > 0, x / jnp.where(scale > 0, scale, 1), 0)
  i = jnp.clip(jnp.searchsorted(levels, ratio, side="right") - 1, 0, len(levels) - 2)
  low, high = levels[i], levels[i + 1]
  fraction = (ratio - low) / (high - low)
  up = fraction >= 0.5 if rounding == "nearest" else uniform < fraction
  if rounding == "ZIP-SR":  # keeps the mean of 1 / (y + eps), eps far below the levels
    up = uniform >= (1 - fraction) * low / jnp.where(ratio > 0, ratio, 1)
  y = jnp.where(up, high, low)
  y = jnp.where(never_zero & (x > 0), jnp.maximum(y, levels[1]), y)
  return y * scale


def stored_moments(mu, nu, c: Candidate, key, old):
  """Both moments after a round trip through their formats, and the scale of nu."""
  u = jax.random.uniform(key, (2, *mu.shape))
  most = 2 ** (c.bits - 1) - 1
  levels = [jnp.asarray(f(n), jnp.float32) for f, n in ((c.mu, most), (c.nu, 2 * most + 1))]
  args = jnp.abs(mu), scale_of(jnp.abs(mu))
  # ZIP-SR is for nu.
  mu_rounding = "stochastic" if c.rounding == "ZIP-SR" else c.rounding
  size = store(*args, levels[0], mu_rounding, u[0], False)
  if c.mu_below is not None:
    below = jnp.asarray(c.mu_below(most), jnp.float32)
    size = jnp.where(mu < 0, store(*args, below, mu_rounding, u[0], False), size)
  mu = jnp.sign(mu) * size
  root = jnp.sqrt(nu) if c.nu_by_root else nu
  scale = scale_of(root, old if c.holds else None)
  root = store(root, scale, levels[1], c.rounding, u[1], c.never_zero)
  return mu, root**2 if c.nu_by_root else root, scale


def one_shot(c: Candidate):
  """The errors of one round trip.

  Returns:
    The rms error of mu in Gaussian blocks. For log-normal blocks (sigma 2), the
    share of weights with nu = 0 but mu != 0, and the share of roots that are off
    by a factor of 2 or more.
  """
  k = jax.random.split(jax.random.key(0), 4)
  shape = (BLOCKS, BLOCK)
  mu = jax.random.normal(k[0], shape)
  none = jnp.zeros((BLOCKS, 1))
  q, *_ = stored_moments(mu, mu**2, c, k[1], none)
  noise = float(jnp.sqrt(jnp.mean((q - mu) ** 2) / jnp.mean(mu**2)))
  mu = jnp.exp(2 * jax.random.normal(k[2], shape))
  q, nu, _ = stored_moments(mu, mu**2, c, k[3], none)
  lost = float(jnp.mean((nu == 0) & (mu != 0)))
  off = float(jnp.mean(jnp.abs(jnp.log2(jnp.sqrt(nu) / mu)) >= 1))
  return noise, lost, off


@jax.jit
def _exact(mu, nu, g):
  return B1 * mu + (1 - B1) * g, B2 * nu + (1 - B2) * g**2


def idle(c: Candidate):
  """The errors when half of every block stops receiving gradients after WARM steps.

  Returns:
    For the active half, the mean ratio of the stored root of nu to the exact one
    (1 + bias) and its standard deviation. For the idle half, the mean |mu| and the
    mean root relative to the exact ones, when those reach 1/64 (4 bits: 1/8) of the
    block's largest. For its displacement, the largest error beyond 10% of exact Adam's, in
    units of the learning rate, and the mean relative to exact Adam's.
  """
  shape = (BLOCKS, BLOCK)
  resting = jnp.arange(BLOCK) % 2 == 0
  zeros = jnp.zeros(shape)

  def body(carry, t):
    mu, nu, scale, mu_x, nu_x, d, d_x = carry
    k = jax.random.split(jax.random.fold_in(jax.random.key(1), t))
    g = jax.random.normal(k[0], shape)
    g = jnp.where(resting & (t >= WARM), 0, g)
    mu, nu = _exact(mu, nu, g)
    mu_x, nu_x = _exact(mu_x, nu_x, g)
    c1, c2 = 1 - B1 ** (t + 1.0), 1 - B2 ** (t + 1.0)

    def update(mu, nu):
      return (mu / c1) / (jnp.sqrt(nu / c2) + 1e-8)

    d = d + jnp.where(t >= WARM, update(mu, nu), 0)
    d_x = d_x + jnp.where(t >= WARM, update(mu_x, nu_x), 0)
    mu, nu, scale = stored_moments(mu, nu, c, k[1], scale)
    rows = [jnp.abs(mu), jnp.sqrt(nu), jnp.abs(mu_x), jnp.sqrt(nu_x)]
    sums = [jnp.mean(r[:, ::2]) for r in rows] + [jnp.mean(jnp.max(r, -1)) for r in rows[2:]]
    ratio = jnp.sqrt(nu / nu_x)[:, 1::2]
    return (mu, nu, scale, mu_x, nu_x, d, d_x), (*sums, jnp.mean(ratio), jnp.std(ratio))

  scan = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(WARM + STEPS)))
  (*_, d, d_x), trace = scan((zeros, zeros, zeros[:, :1], *(zeros,) * 4))
  mu, root, mu_x, root_x, mu_top, root_top, bias, spread = (np.asarray(x)[WARM:] for x in trace)
  part = 64 if c.bits == 8 else 8
  at = [int(np.sum(x * part >= top)) - 1 for x, top in ((mu_x, mu_top), (root_x, root_top))]
  d, d_x = np.asarray(d)[:, ::2], np.asarray(d_x)[:, ::2]
  beyond = np.max(np.abs(d - d_x) - 0.1 * np.abs(d_x))
  return (
    bias[-1],
    spread[-1],
    mu[at[0]] / mu_x[at[0]],
    root[at[1]] / root_x[at[1]],
    beyond,
    np.abs(d).mean() / np.abs(d_x).mean(),
  )


def main():
  """Measures and prints the tables."""
  for bits in map(int, sys.argv[1:] or ("8", "4")):
    print_table(bits)
  print_uneven()


def print_table(bits: int):
  """Measures and prints the table of candidates of 8 or of 4 bits."""
  print(
    "| mu / root of nu | rounding | Gaussian: error of mu | log-normal: nu = 0, mu not"
    f" | root off 2x | active root: mean | std | idle at 1/{64 if bits == 8 else 8}: mu | root"
    " | displacement: beyond 10%, lr | mean |"
  )
  print("| --- | --- |" + " ---: |" * 9)
  for c in (c for c in CANDIDATES if c.bits == bits):
    noise, lost, off = one_shot(c)
    bias, spread, mu, root, beyond, mean = idle(c)
    print(
      f"| {c.name} | {c.rounding} | {noise:.2%} | {lost:.1%} | {off:.1%} | {bias:.3f}"
      f" | {spread:.1%} | {mu:.2f} | {root:.2f} | {beyond:.2f} | {mean:.2f} |",
      flush=True,
    )


def print_uneven():
  """Prints the rms error of a 4-bit mu, relative to each weight's own size.

  The sizes in a block are log-normal.
  """
  spreads = (0, 0.5, 1, 2)
  print("\n| 4-bit mu, stochastic |" + "".join(f" spread {x} |" for x in spreads))
  print("| --- |" + " ---: |" * len(spreads))
  k = jax.random.split(jax.random.key(0), 3)
  shape = (4 * BLOCKS, BLOCK)
  sizes, normals = (jax.random.normal(key, shape) for key in k[:2])
  uniform = jax.random.uniform(k[2], shape)
  laws = {"linear": power(1), "NF4": normal, "softsign": softsign, "square": power(2)}
  for name, law in (laws | {"cube": power(3)}).items():
    errors = []
    for spread in spreads:
      size = jnp.exp(spread * sizes)
      mu = jnp.abs(size * normals)
      levels = jnp.asarray(law(7), jnp.float32)
      q = store(mu, scale_of(mu), levels, "stochastic", uniform, False)
      errors.append(float(jnp.sqrt(jnp.mean(((q - mu) / size) ** 2))))
    print(f"| {name} |" + "".join(f" {x:.0%} |" for x in errors), flush=True)


if __name__ == "__main__":
  main()
