"""Options of `make conformance`, and the table that it writes (docs/conformance.md)."""

import collections
import datetime
import importlib.metadata
import os
import pathlib
import platform
import time

# Nearly all time goes into compiling thousands of tiny programs, not into running them.
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
).strip()

import jax
import pytest


def pytest_addoption(parser):
  parser.addoption("--table", default=None, help="write what passes to this Markdown file")


def pytest_configure(config):
  if config.getoption("--table") and not hasattr(config, "workerinput"):
    config.pluginmanager.register(Table(config.getoption("--table")), "conformance_table")


def pytest_collection_modifyitems(items):
  for item in items:
    callspec = getattr(item, "callspec", None)
    subject = getattr(item.cls, "subject", None)
    name = callspec.params.get("name", "adam") if callspec else "adam"
    item.user_properties += [
      ("suite", item.cls.suite),
      ("subject", subject.name if subject else name),
    ]
    if reason := getattr(item.cls, "excused", {}).get(item.name):
      item.user_properties.append(("reason", reason))


_tests_since_clearing = 0


@pytest.fixture(autouse=True)
def _clear_compiled_programs():
  """XLA crashes where a process holds too many programs: each maps memory, up to 65,530 times."""
  global _tests_since_clearing
  yield
  _tests_since_clearing += 1
  if _tests_since_clearing == 200:
    _tests_since_clearing = 0
    jax.clear_caches()


class Table:
  """Collects every test's outcome, in the process that all reports come to, and writes them."""

  def __init__(self, path: str):
    self.path = pathlib.Path(path)
    self.start = time.time()
    self.outcomes: dict[str, str] = {}
    self.properties: dict[str, dict] = {}

  def pytest_runtest_logreport(self, report):
    self.properties[report.nodeid] = dict(report.user_properties) or self.properties.get(
      report.nodeid, {}
    )
    if report.failed:  # of a subtest, too
      self.outcomes[report.nodeid] = "failed"
    elif report.when == "call" or report.skipped:
      self.outcomes.setdefault(report.nodeid, report.outcome)

  def pytest_terminal_summary(self, terminalreporter):
    parts, _ = terminalreporter.build_summary_stats_line()
    seconds = time.time() - self.start
    last = ", ".join(text for text, _ in parts) + f" in {seconds:.0f}s"
    self.path.write_text(self.markdown(last))
    terminalreporter.write_line(f"wrote {self.path}")

  def markdown(self, last_line: str) -> str:
    cells: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    reasons: dict[tuple[str, str], collections.Counter] = {}
    for nodeid, outcome in self.outcomes.items():
      known = self.properties[nodeid]
      suite, subject, reason = (known.get(key) for key in ("suite", "subject", "reason"))
      kind = "excused" if reason and outcome == "passed" else outcome
      cells[suite, subject][kind] += 1
      if reason:
        test = nodeid.split("::")[-1].rstrip("0123456789")
        test = next((t for t in _TESTS if test.startswith(t)), test)
        reasons.setdefault((suite, reason), collections.Counter())[test, subject] += 1
    suites = sorted({suite for suite, _ in cells})
    lines = [INTRODUCTION]
    lines += [f"- {name} {version}" for name, version in _versions().items()]
    lines += [
      "",
      f"{datetime.date.today()}. The last line of the run:",
      "",
      "```",
      last_line,
      "```",
    ]
    lines += ["", "## What passes", ""]
    for suite in suites:
      lines += [f"### {suite}", "", "| | passed | excused | skipped by the suite | failed |"]
      lines += ["| --- | --- | --- | --- | --- |"]
      rows = sorted(subject for s, subject in cells if s == suite)
      for subject in rows:
        count = cells[suite, subject]
        lines.append(
          f"| `{subject}` | {count['passed']} | {count['excused']} | {count['skipped']}"
          f" | {count['failed']} |"
        )
      lines.append("")
    lines += ["## The excused cases", ""]
    for (suite, reason), where in sorted(reasons.items()):
      lines += [f"- {suite}. {reason}", ""]
      for (test, subject), count in sorted(where.items()):
        lines.append(f"  - `{test}`, `{subject}`: {count}")
      lines.append("")
    return "\n".join(lines).rstrip() + "\n"


# Longest first: where one test's name begins with another's.
_TESTS = (
  "test_state_sharding_type_init_match_update",
  "test_state_sharding_type_preserved_with_jit",
  "test_init_with_abstract_input",
  "test_hyperparam_default_dtype",
  "test_hyperparam_dtypes",
  "test_apply_if_finite_pmap",
  "test_apply_if_finite",
)


def _versions() -> dict[str, str]:
  names = ("optax_lowmem", "jax", "jaxlib", "optax", "flax", "numpy")
  return {"Python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}


INTRODUCTION = """# Conformance

`make conformance` writes this file; nothing in it is counted by hand. It runs the test suites that
ship in Optax's wheel with our transformations in the place of Optax's: each module is loaded once
for each row below, its optimizers wrapped (or replaced by ours), and its own tests are run, with its
own tolerances. Flax's wheel ships no tests: the suites called Flax are ours, in our words, of the
behaviours that Flax tests in its repository.

`optax.X` stands for every optimizer that the suite names. Rows called "step" go through
`lowmem.init` and `lowmem.step`: the suite's float32 parameters are bfloat16 with 8 residual bits
inside, and it sees the float32 masters. So its convergence tests say how low-memory weights and
statistics converge. In the other rows parameters keep the suite's dtype; half-precision ones have
the format of their dtype with 8 residual bits, float32 ones are left alone (law 10).

What the suites are given, where they stand around ours:

- Gradients are multiplied by the loss scale, as `lowmem.scale_loss` does to the loss.
- Three tests demand updates of the gradient's dtype: `delta_bits` gets `update_dtype="gradient"`,
  the float32 updates of others are cast.
- Where a test gives no parameters, `delta_bits`, which needs them, gets zeros.
- The version compare of `sharding_test` is repaired: it compares strings, by which "0.12.0" is
  older than "0.7.2", so that Optax's own run skips these tests.
- Programs are compiled without optimization, which halves the time.

Left out are tests in which none of ours would be (their number is not in the table),
`test_selective_bad_structure` (it expects the text of an error that this JAX words otherwise), and
for "step" the tests of the dtype of updates, of which it has none.

Run with:
"""
