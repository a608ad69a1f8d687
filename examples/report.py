"""The table and the figure that the examples share."""

import pathlib

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PARTS = ("weights", "residuals", "moments", "gradients")


def peak_bytes(compiled) -> int:
  """The device memory of a compiled step in bytes: arguments, temporaries and new outputs."""
  stats = compiled.memory_analysis()
  new_outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  return stats.argument_size_in_bytes + stats.temp_size_in_bytes + new_outputs


def label(result: dict) -> str:
  """The name of a run: its format, and whether it released gradients."""
  return result["format"] + (", release" if result["release"] else "")


def table(results: list[dict]) -> str:
  """A row for each run: held-out figures, bytes a parameter by part, peak, time, skipped steps."""
  metrics = list(results[0]["figures"])
  rows = [["format", *metrics, *PARTS, "total", "peak MB", "ms/step", "skipped"]]
  for r in results:
    per = r["bytes_per_param"]
    rows.append(
      [
        label(r),
        *(f"{r['figures'][metric]:.4f}" for metric in metrics),
        *(f"{per.get(part, 0):.2f}" for part in (*PARTS, "total")),
        f"{r['peak_bytes'] / 1e6:.1f}",
        f"{1e3 * r['seconds_per_step']:.1f}",
        str(r["skipped"]),
      ]
    )
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = ["  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in rows]
  note = f"bytes a parameter; {results[0]['num_params']:,} parameters"
  return "\n".join([*lines, note])


def figure(results: list[dict], path: pathlib.Path):
  """Saves the loss curves, the first held-out figure and the memory bars as a PNG."""
  fig, (curves, late, bars) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
  metric = next(iter(results[0]["figures"]))
  second_half = []
  for r in results:
    window = max(len(r["losses"]) // 40, 1)
    smooth = np.convolve(r["losses"], np.ones(window) / window, mode="valid")
    (line,) = curves.plot(np.arange(len(smooth)) + window, smooth, label=label(r), lw=1)
    points = [(step, figures[metric]) for step, figures in r["evaluations"]]
    late.plot(*zip(*points, strict=True), marker="o", ms=3, lw=1, color=line.get_color())
    second_half += [value for step, value in points if step >= points[-1][0] / 2]
  curves.set(xlabel="step", ylabel="training loss", title="Training")
  curves.legend()
  late.set(xlabel="step", ylabel=metric, title=f"{metric}, second half")
  late.set_xlim(left=results[0]["evaluations"][-1][0] / 2)
  room = 0.2 * (max(second_half) - min(second_half)) or 0.01
  late.set_ylim(min(second_half) - room, max(second_half) + room)
  names = [label(r).replace("/", "\n").replace(", ", "\n") for r in results]
  bottom = np.zeros(len(results))
  for part in PARTS:
    height = np.array([r["bytes_per_param"].get(part, 0) for r in results])
    bars.bar(names, height, bottom=bottom, label=part)
    bottom += height
  bars.set(ylabel="bytes a parameter", title="Memory")
  bars.set_ylim(top=bottom.max() * 1.2)
  bars.legend(loc="upper center", ncols=2, fontsize="small")
  fig.savefig(path, dpi=110)
  plt.close(fig)
