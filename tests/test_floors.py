"""Imports run downwards: docs/architecture.md's floors."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# From the ground up; what shares a line does not import each other.
FLOORS = {
    "pallas_kernels": [["formats"], ["placement"], ["programs"], ["operations"], ["__init__"]],
    "optax_lowmem": [
      ["trees"], ["states"], ["engine"], ["transforms"], ["api"],
      ["release", "flax", "files", "nnx"], ["planner"], ["__init__", "plan"],
    ],
}  # fmt: skip


def imports(path: pathlib.Path) -> set[str]:
  """The modules that a file imports, `from package import module` included."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {name.name for name in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {f"{node.module}.{name.name}" for name in node.names}
  return found


@pytest.mark.parametrize("package", FLOORS)
def test_imports_run_downwards(package):
  height = {part: i for i, parts in enumerate(FLOORS[package]) for part in parts}
  folder = ROOT / package
  for path in folder.rglob("*.py"):
    part = path.relative_to(folder).with_suffix("").parts[0]
    for module in imports(path):
      first, *rest = module.split(".")
      if first == package and rest[0] in height and rest[0] != part:
        assert height[rest[0]] < height[part], f"{path} imports {module}"


def test_the_ground_floor_stands_on_jax_alone():
  for path in (ROOT / "pallas_kernels").rglob("*.py"):
    above = {"optax", "flax", "optax_lowmem", "chex"}
    assert not above & {module.split(".")[0] for module in imports(path)}, path
