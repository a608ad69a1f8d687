r"""Will it fit? The memory of a training step, from a shell.

By formula, at once, from the number of parameters:

    python -m optax_lowmem.plan --params 8.03e9 --layers 32 --width 4096 --sequence 2048 \
      --vocabulary 128256 --release --device h100

Compiled, from a function without arguments that returns (step, args) or
(step, args, donate_argnums), with arrays or jax.ShapeDtypeStructs as args:

    python -m optax_lowmem.plan --step my_module:make_step --device h100

Exit status: 0 if it fits (or no device is named), 1 if it does not, 2 for unusable arguments.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import sys
import threading
import time
import types

from optax_lowmem.planner import targets
from optax_lowmem.planner.estimate import STATISTICS, estimate
from optax_lowmem.planner.plan import Plan, plan


def main(argv: list[str] | None = None) -> int:
  """Prints a plan; returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m optax_lowmem.plan",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--params", type=float, help="the number of parameters, such as 8.03e9")
  source.add_argument("--step", metavar="MODULE:FUNCTION", help="compile this step")
  parser.add_argument("--device", choices=targets.TARGETS, help="the GPU or TPU")
  parser.add_argument("--json", action="store_true", help="print JSON")
  parser.add_argument("--png", metavar="FILE", help="save a chart, too; needs matplotlib")
  formula = parser.add_argument_group("by formula")
  formula.add_argument("--weights", default="bf16+8", help="their format; default: bf16+8")
  formula.add_argument(
    "--statistics", default="int8", help="their format, or two: int8-int4 (int8)"
  )
  formula.add_argument("--optimizer", choices=STATISTICS, default="adamw")
  formula.add_argument("--release", action="store_true", help="gradient release; needs --layers")
  formula.add_argument("--layers", type=int)
  formula.add_argument("--width", type=int, help="of the residual stream, for activations")
  formula.add_argument("--batch", type=int, default=1, help="sequences a step")
  formula.add_argument("--sequence", type=int, help="tokens a sequence, for activations")
  formula.add_argument("--vocabulary", type=int, default=0, help="logits a token")
  args = parser.parse_args(argv)
  try:
    found = _compiled(args) if args.step else _estimated(args)
    if args.png:
      _save_chart(found, args.png)
  except (ValueError, TypeError, ImportError, AttributeError, OSError) as error:
    parser.error(str(error))  # exits with 2
  if args.json:
    print(json.dumps(_as_dict(found)))
  else:
    print(found)
  return int(found.verdict == "NO")


def _estimated(args) -> Plan:
  names = ("weights", "statistics", "optimizer", "release", "layers", "width", "batch", "sequence")
  given = {name: getattr(args, name) for name in (*names, "vocabulary", "device")}
  return estimate(args.params, **given)


def _compiled(args) -> Plan:
  module, colon, function = args.step.partition(":")
  if not colon:
    raise ValueError(f"--step is MODULE:FUNCTION; got {args.step!r}.")
  sys.path.insert(0, "")
  step, step_args, *donated = getattr(importlib.import_module(module), function)()
  donate_argnums = donated[0] if donated else ()
  with _progress(f"compiling for {args.device or 'this machine'}"):
    return plan(step, *step_args, device=args.device, donate_argnums=donate_argnums)


def _as_dict(found: Plan) -> dict:
  more = {"usable_bytes": found.usable_bytes, "verdict": found.verdict}
  return dataclasses.asdict(found) | more


@contextlib.contextmanager
def _progress(what: str):
  """Says on stderr what takes long and, on a terminal, for how long already."""
  start, done, is_live = time.monotonic(), threading.Event(), sys.stderr.isatty()

  def say(end: str):
    seconds = f"{time.monotonic() - start:.0f} s"
    print(f"\r{what} ... {seconds}" if is_live else f"{what}: {seconds}", end=end, file=sys.stderr)
    sys.stderr.flush()

  def tick():
    while not done.wait(1.0):
      say("")

  ticking = threading.Thread(target=tick, daemon=True)
  print(f"{what} ...", end="" if is_live else "\n", file=sys.stderr, flush=True)
  if is_live:
    ticking.start()
  try:
    yield
  finally:
    done.set()
    if is_live:
      ticking.join()
    say("\n")


def _save_chart(found: Plan, path: str):
  """Saves the parts as one stacked bar, against the device's usable memory."""
  try:
    from matplotlib.figure import Figure  # here: only --png needs it
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      '--png needs matplotlib: pip install "optax_lowmem[plan]".'
    ) from error
  figure = Figure(figsize=(8, 2.2), layout="constrained")
  axes, left = figure.subplots(), 0.0
  for part, nbytes in found.parts.items():
    axes.barh(0, nbytes / 2**30, left=left, label=part)
    left += nbytes / 2**30
  if found.usable_bytes is not None:
    axes.axvline(found.usable_bytes / 2**30, color="black", linestyle="--", label="usable")
  axes.set(title=f"{found.device} {found.verdict}", xlabel="GiB", yticks=[])
  figure.legend(loc="outside lower center", ncols=3)
  figure.savefig(path)


class _Callable(types.ModuleType):
  def __call__(self, *args, **kwargs) -> Plan:
    return plan(*args, **kwargs)


if __name__ == "__main__":
  sys.exit(main())
# `import optax_lowmem.plan` replaces the function `optax_lowmem.plan` by this module.
sys.modules[__name__].__class__ = _Callable
__wrapped__ = plan  # what `inspect.signature` and `inspect.unwrap` look at
