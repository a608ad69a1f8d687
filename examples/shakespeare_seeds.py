"""The Shakespeare demo over several seeds: held-out loss, paired with fp32's.

  python -m examples.shakespeare_seeds --seeds 5 --out docs/shakespeare_seeds.md

Weights, batches and rounding all change with the seed; within a seed every
format has the same. A format is not worse if its mean paired difference is at
most two standard errors, or at most 0.3% of fp32's loss. Other options are the
demo's (`python -m examples.shakespeare --help`).
"""

import argparse
import pathlib

import jax
import numpy as np

from examples import plays, shakespeare

TOLERANCE = 0.003


def summary(losses: dict[str, list[float]]) -> list[str]:
  """Markdown rows of held-out losses by format, paired with fp32's."""
  base = np.array(losses["fp32"])
  rows = [
    "| format | held-out loss, each seed | mean | minus fp32 | standard error | relative"
    " | not worse |",
    "|" + " --- |" * 7,
  ]
  for fmt, values in losses.items():
    difference = np.array(values) - base
    mean, error = difference.mean(), difference.std(ddof=1) / np.sqrt(len(difference))
    good = mean <= max(2 * error, TOLERANCE * base.mean())
    rows.append(
      f"| {fmt} | {' '.join(f'{v:.4f}' for v in values)} | {np.mean(values):.4f} | {mean:+.4f}"
      f" | {error:.4f} | {mean / base.mean():+.2%} | {'yes' if good else 'no'} |"
    )
  return rows


def main():
  """Trains every format with every seed and writes the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--seeds", type=int, default=5, help="number of seeds, at least 2 (5)")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/shakespeare_seeds.md"))
  own, rest = parser.parse_known_args()
  if own.seeds < 2:
    parser.error(f"--seeds is at least 2; got {own.seeds}")
  args = shakespeare.parse_args(rest)
  if args.formats[0] != "fp32":
    parser.error("--formats starts with fp32, which the others are compared with")
  training, held_out, alphabet = plays.load()
  losses: dict[str, list[float]] = {fmt: [] for fmt in args.formats}
  for args.seed in range(own.seeds):
    for fmt in args.formats:
      result = shakespeare.train(fmt, args, training, held_out, len(alphabet))
      losses[fmt].append(result["held_out"])
      print(f"seed {args.seed} {fmt} {result['held_out']:.4f}", flush=True)
  rows = summary(losses)
  print("\n".join(rows))
  own.out.parent.mkdir(parents=True, exist_ok=True)
  command = " ".join([f"--seeds {own.seeds}", *rest])
  own.out.write_text(
    f"# The Shakespeare demo over seeds\n\nMade by `python -m examples.shakespeare_seeds {command}`"
    f" ({args.optimizer}, {args.steps} steps, {result['num_params']:,} parameters, learning rate"
    f" {args.learning_rate:g}; {jax.devices()[0].device_kind}, JAX {jax.__version__}).\n\n"
    "Held-out loss in nats a character after the last step. A format is not worse if its mean"
    " paired difference from fp32 is at most two standard errors, or at most 0.3%.\n\n"
    + "\n".join(rows)
    + "\n"
  )


if __name__ == "__main__":
  main()
