"""Counts of a compiled program's parts, from the text of its module."""

import re

FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
MOVES = FREE | {
  *("slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad", "copy"),
  *("reshape", "transpose", "broadcast", "convert"),
}
_OPERATION = re.compile(r"\s+(?:ROOT )?%?\S+ = .*? ([a-z][\w-]*)\(")
_METADATA = re.compile(r", (?:metadata|origin|original_value)=\{[^}]*\}")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition)=%?([\w.-]+)")
_NAME = re.compile(r"%[\w.-]+")


def computations(text: str) -> tuple[dict[str, list[str]], str]:
  """The instructions of each computation, and the name of the entry computation."""
  bodies: dict[str, list[str]] = {}
  entry = name = ""
  for line in text.splitlines():
    if head := re.match(r"(ENTRY )?%?(\S+) .*\{$", line):
      name = head[2]
      bodies[name] = []
      entry = name if head[1] else entry
    elif line.startswith("  ") and name and _OPERATION.match(line):
      bodies[name].append(line)
  return bodies, entry


def operation(line: str) -> str:
  """The operation of an instruction."""
  found = _OPERATION.match(line)
  assert found, line
  return found[1]


def count_launches(text: str) -> dict[str, int]:
  """The number of operations in a compiled module that launch work on the GPU, by kind."""
  bodies, entry = computations(text)
  counts: dict[str, int] = {"fusions": 0, "kernels": 0, "others": 0}
  pending = [entry]
  while pending:
    for line in bodies[pending.pop()]:
      kind = operation(line)
      if kind in FREE:
        continue
      inner = re.search(r"(?:to_apply|body)=%?([\w.-]+)", line)
      if kind in ("call", "while") and inner:  # `call` is a CUDA graph
        pending.append(inner[1])
        continue
      counts[{"fusion": "fusions", "custom-call": "kernels"}.get(kind, "others")] += 1
  return counts


def donated(text: str) -> list[tuple[int, int]]:
  """Pairs (result, argument) of numbers: the result overwrites the argument."""
  pairs = re.findall(r"\{(\d+)\}: \((\d+), \{\}", text.partition("\n")[0])
  return [(int(result), int(argument)) for result, argument in pairs]


def cost(text: str) -> dict[str, int]:
  """Counts the work of the compiler: distinct kernels, fusions, instructions.

  Two fusions count as one kernel if their computations differ only in names and
  metadata, because XLA:GPU then compiles them once. Custom calls (Mosaic, Triton)
  are distinguished by target and payload. "that compute" counts the kernels that
  do more than copy, cut, join and convert. Instructions are counted over all
  computations.
  """
  bodies, _ = computations(text)
  every = [line for lines in bodies.values() for line in lines]
  inner = {_called(line) for line in every if operation(line) == "fusion"}
  calls: set[str] = set()
  # (kind, computation) -> whether the kernel computes anything.
  kernels: dict[tuple[str, str], bool] = {}
  fusions = 0
  for line in (line for name in bodies if name not in inner for line in bodies[name]):
    if operation(line) == "custom-call":
      calls.add(_payload(line))
    elif operation(line) == "fusion":
      fusions += 1
      body = bodies[_called(line)]
      key = _word(r"kind=\w+", line), _plain(bodies, _called(line))
      kernels[key] = any(operation(inner_line) not in MOVES for inner_line in body)
  return {
    "distinct kernels": len(kernels) + len(calls),
    "that compute": sum(kernels.values()) + len(calls),
    "fusions": fusions,
    "instructions": len(every),
  }


def _word(pattern: str, line: str) -> str:
  found = re.search(pattern, line)
  assert found, line[:200]
  return found[0]


def _called(line: str) -> str:
  return _word(r"calls=%?[\w.-]+", line).removeprefix("calls=").removeprefix("%")


def _plain(bodies, name: str) -> str:
  """The text of a computation and its callees, without names and metadata."""
  text = _METADATA.sub("", "\n".join(bodies[name]))
  called = _CALLED.findall(text)
  names: dict[str, str] = {}
  text = _CALLED.sub("called", text)
  text = _NAME.sub(lambda match: names.setdefault(match[0], f"%{len(names)}"), text)
  return "\n".join([text, *(_plain(bodies, other) for other in called)])


def _payload(line: str) -> str:
  """The target of a custom call, and the payload that it compiles."""
  target = _word(r'custom_call_target="[^"]*"', line)
  return target + line.partition("backend_config=")[2]
