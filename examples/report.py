"""The table and the figure that the examples share."""

import pathlib

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PARTS = ("weights", "residuals", "moments", "gradients")


def peak_bytes(compiled) -> int:
  """Device memory that a compiled step needs: arguments, temporaries and new outputs."""
  stats = compiled.memory_analysis()
  new_outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  return stats.argument_size_in_bytes + stats.temp_size_in_bytes + new_outputs


def table(results: list[dict]) -> str:
  """One row a run: loss, bytes a parameter by part, peak, speed, skipped steps."""
  head = ["format", "held-out loss", *PARTS, "total", "peak MB", "steps/s", "skipped"]
  rows = [head]
  for r in results:
    per = r["bytes_per_param"]
    rows.append(
      [
        r["format"],
        f"{r['held_out']:.4f}",
        *(f"{per[part]:.2f}" for part in PARTS),
        f"{per['total']:.2f}",
        f"{r['peak_bytes'] / 1e6:.1f}",
        f"{r['steps_per_second']:.1f}",
        str(r["skipped"]),
      ]
    )
  widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
  lines = ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
  note = f"bytes a parameter; {results[0]['num_params']:,} parameters"
  return "\n".join([*lines, note])


def figure(results: list[dict], path: pathlib.Path):
  """Saves the loss curves and the memory bars as a PNG."""
  fig, (curves, late, bars) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
  for r in results:
    window = max(len(r["losses"]) // 40, 1)
    smooth = np.convolve(r["losses"], np.ones(window) / window, mode="valid")
    (line,) = curves.plot(np.arange(len(smooth)) + window, smooth, label=r["format"], lw=1)
    late.plot(*zip(*r["evals"], strict=True), marker="o", ms=3, lw=1, color=line.get_color())
  curves.set(xlabel="step", ylabel="training loss (nats a character)", title="Training")
  curves.legend()
  half = [loss for r in results for step, loss in r["evals"] if step >= r["evals"][-1][0] / 2]
  late.set(xlabel="step", ylabel="held-out loss", title="Held-out plays, second half")
  late.set_xlim(left=results[0]["evals"][-1][0] / 2)
  late.set_ylim(min(half) - 0.02, max(half) + 0.02)
  names = [r["format"].replace(", ", "\n") for r in results]
  bottom = np.zeros(len(results))
  for part in PARTS:
    height = np.array([r["bytes_per_param"][part] for r in results])
    bars.bar(names, height, bottom=bottom, label=part)
    bottom += height
  bars.set(ylabel="bytes a parameter", title="Memory")
  bars.set_ylim(top=bottom.max() * 1.2)
  bars.legend(loc="upper center", ncols=2, fontsize="small")
  fig.savefig(path, dpi=110)
  plt.close(fig)
