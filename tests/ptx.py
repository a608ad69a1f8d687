"""Executes a compiled Mosaic GPU kernel (PTX) on a CPU: what JAX's own interpreter cannot see.

Takes what `pallas_kernels.programs.block_kernel` compiles to: blocks of 128 threads that
branch together, no shared memory. A division and a root are NumPy's, correctly
rounded, where a GPU's are approximate.
"""

import operator
import re

import numpy as np

THREADS = 128
_TYPES = {
  "f32": np.float32, "u16": np.uint16, "s16": np.int16, "b16": np.uint16, "u32": np.uint32,
  "s32": np.int32, "b32": np.uint32, "u64": np.uint64, "s64": np.int64, "b64": np.uint64,
  "s8": np.int8, "u8": np.uint8, "b8": np.uint8,
}  # fmt: skip
_COMPARISONS = {
  "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
  "ge": operator.ge,
}  # fmt: skip


def run(ptx: str, arrays, blocks: int) -> list[np.ndarray]:
  """Runs the kernel and returns the arrays, its parameters, as they are afterwards."""
  places, size = [], 256
  for x in arrays:
    places.append(size)
    size += -(-x.nbytes // 256) * 256
  memory = np.zeros(size, np.uint8)
  for x, place in zip(arrays, places, strict=True):
    memory[place : place + x.nbytes] = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
  program, labels, tables = _parsed(ptx)
  with np.errstate(all="ignore"):
    for block in range(blocks):
      _Block(memory, places, block).run(program, labels, tables)
  return [
    memory[place : place + x.nbytes].view(x.dtype).reshape(x.shape)
    for x, place in zip(arrays, places, strict=True)
  ]


def _parsed(ptx: str):
  """Instructions (predicate, operation, operands); places of labels; labels of branch tables."""
  body = ptx[ptx.index("{\n") : ptx.rindex("ret;")] + "ret;"
  body = re.sub(r"//[^\n]*", "", body)
  tables = {
    name: re.findall(r"\$\w+", inside)
    for name, inside in re.findall(r"(\w+):\s*\.branchtargets([^;]*);", body)
  }
  body = re.sub(r"\w+:\s*\.branchtargets[^;]*;", "", body)
  program, labels = [], {}
  for line in re.split(r"[;\n]", body.replace(",\n", ", ")):
    line = line.strip()
    if line.endswith(":"):
      labels[line[:-1]] = len(program)
    elif line and not line.startswith((".", "{")):
      predicate, operation, operands = re.fullmatch(
        r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*)", line
      ).groups()
      operands = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", operands)
      program.append((predicate, operation, operands))
  return program, labels, tables


class _Block:
  """128 threads: every register is an array of bit patterns, or of bools."""

  def __init__(self, memory, places, block: int):
    self.memory, self.places, self.registers = memory, places, {}
    self.special = {"%tid.x": np.arange(THREADS, dtype=np.uint32), "%ctaid.x": np.uint32(block)}

  def run(self, program, labels, tables):
    at = 0
    while True:
      predicate, operation, operands = program[at]
      at += 1
      if predicate is not None:
        taken = self.read(predicate.lstrip("!"), "pred") ^ predicate.startswith("!")
        assert taken.all() or not taken.any(), "threads part"
        if not taken[0]:
          continue
      if operation == "ret":
        return
      if operation.startswith("bra"):
        at = labels[operands[0]]
      elif operation.startswith("brx"):
        at = labels[tables[operands[1]][int(self.read(operands[0], "u32")[0])]]
      else:
        self.execute(operation, operands)

  def read(self, operand: str, kind: str):
    if kind == "pred":
      return self.registers[operand]
    dtype = np.dtype(_TYPES[kind])
    if operand in self.special:
      bits = self.special[operand]
    elif operand.startswith("%"):
      bits = self.registers[operand]
    elif operand.startswith("0f"):
      bits = np.uint32(int(operand[2:], 16))
    else:
      bits = np.uint64(int(operand.rstrip("U"), 0) & (2**64 - 1))
    unsigned = np.dtype(f"u{dtype.itemsize}")
    return np.broadcast_to(np.asarray(bits).astype(unsigned), (THREADS,)).view(dtype)

  def write(self, operand: str, value, kind: str):
    if kind == "pred":
      self.registers[operand] = value
    else:
      value = np.ascontiguousarray(np.broadcast_to(value, (THREADS,)).astype(_TYPES[kind]))
      self.registers[operand] = value.view(f"u{value.dtype.itemsize}")

  def address(self, operand: str):
    base, _, offset = operand.strip("[]").partition("+")
    return self.read(base, "u64").astype(np.int64) + int(offset or 0)

  def execute(self, operation: str, operands):
    name, *more = operation.replace("::entry", "").split(".")
    kind = more[-1] if more else ""
    if name in ("fence", "bar", "elect"):
      return
    if name == "ld" and more[0] == "param":
      self.write(operands[0], self.places[int(operands[1].strip("[]").rsplit("_", 1)[1])], "u64")
    elif name in ("ld", "st"):
      self.access(name, kind, operands)
    elif name == "mov" and any(x.startswith("{") for x in operands):
      self.move_parts(operands, kind)
    elif name in ("mov", "cvta"):
      self.write(operands[0], self.read(operands[1], kind), kind)
    elif name == "shfl":
      self.shuffle(more, operands)
    elif name == "setp":
      a, b = (self.read(x, kind) for x in operands[1:3])
      how = more[0] if more[0] in _COMPARISONS else more[0].removesuffix("u")
      found = _COMPARISONS[how](a, b)
      if more[0] not in _COMPARISONS:  # true where they cannot be compared
        found = found | np.isnan(a) | np.isnan(b)
      elif kind == "f32" and how == "ne":
        found = found & ~np.isnan(a) & ~np.isnan(b)
      for other in operands[3:]:  # setp.eq.and: combined with a predicate
        assert "!" not in other
        found = self.combined(more[1], found, self.registers[other])
      self.write(operands[0], found, "pred")
    elif kind == "pred":
      self.write(operands[0], self.logic(name, operands[1:]), "pred")
    elif name == "selp":
      a, b = (self.read(x, kind) for x in operands[1:3])
      self.write(operands[0], np.where(self.read(operands[3], "pred"), a, b), kind)
    elif name == "cvt":
      # A narrow integer is kept in 16 bits, extended.
      kind = more[-2].replace("s8", "s16").replace("u8", "u16")
      self.write(operands[0], self.converted(more, operands[1]), kind)
    elif name == "mul" and more[0] == "wide":
      a, b = (self.read(x, kind) for x in operands[1:])
      wide = np.int64 if kind == "s32" else np.uint64
      self.write(operands[0], a.astype(wide) * b.astype(wide), "b64")
    elif name == "prmt":
      self.permute(operands)
    else:
      values = [self.read(x, kind) for x in operands[1:]]
      if name in ("shl", "shr"):
        values[1] = self.read(operands[2], "u32").astype(values[0].dtype)
      self.write(operands[0], self.arithmetic(name, more, kind, values), kind)

  def logic(self, name, operands):
    a, *b = (self.registers[x] for x in operands)
    return ~a if name == "not" else self.combined(name, a, *b)

  def combined(self, name, a, b):
    return {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[name](a, b)

  def arithmetic(self, name, more, kind, values):
    a, *others = values
    if name in ("fma", "mad"):
      if kind != "f32":
        return a * others[0] + others[1]
      exact = [np.longdouble(x) for x in values]  # 64 bits
      return (exact[0] * exact[1] + exact[2]).astype(np.float32)
    if name in ("max", "min") and kind == "f32":
      assert "NaN" in more, "drops NaN"
    if name == "copysign":  # of the first
      return np.copysign(others[0], a)
    return {
      "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "max": np.maximum,
      "min": np.minimum, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
      "not": np.invert, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt,
      "shl": np.left_shift, "shr": np.right_shift,
    }[name](a, *others)  # fmt: skip

  def converted(self, more, operand):
    x = self.read(operand, more[-1])
    if more[-1] == "f32" and more[-2] != "f32":
      bounds = np.iinfo(_TYPES[more[-2]])
      return np.clip(np.nan_to_num(np.trunc(x)), bounds.min, bounds.max)
    return x.astype(_TYPES[more[-2]])

  def access(self, name, kind, operands):
    dtype = np.dtype(_TYPES[kind])
    pointer, parts = operands if name == "st" else operands[::-1]
    start = self.address(pointer)
    for i, register in enumerate(parts.strip("{}").replace(" ", "").split(",")):
      places = start[:, None] + i * dtype.itemsize + np.arange(dtype.itemsize)
      if name == "st":
        self.memory[places] = np.ascontiguousarray(self.read(register, kind))[:, None].view("u1")
      else:
        self.write(register, np.ascontiguousarray(self.memory[places]).view(dtype)[:, 0], kind)

  def move_parts(self, operands, kind):
    half = {"b32": "b16", "b64": "b32"}[kind]
    width = np.dtype(_TYPES[half]).itemsize * 8
    split = lambda x: x.strip("{}").replace(" ", "").split(",")
    if operands[0].startswith("{"):
      value = self.read(operands[1], kind)
      for i, register in enumerate(split(operands[0])):
        self.write(register, value >> value.dtype.type(i * width), half)
    else:
      low, high = (self.read(x, half).astype(_TYPES[kind]) for x in split(operands[1]))
      self.write(operands[0], low | high << high.dtype.type(width), kind)

  def shuffle(self, more, operands):
    value, lane = self.read(operands[1], "b32"), np.arange(THREADS)
    by = self.read(operands[2], "u32").astype(int)
    source = lane ^ by if more[1] == "bfly" else lane // 32 * 32 + by
    self.write(operands[0], value[source], "b32")

  def permute(self, operands):
    a, b, selector = (self.read(x, "u32") for x in operands[1:])
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(THREADS, np.uint64)
    for i in range(4):
      chosen = selector.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
      byte = both >> (chosen & np.uint64(7)) * np.uint64(8) & np.uint64(255)
      sign = np.where(byte >> np.uint64(7) == 1, np.uint64(255), np.uint64(0))
      result |= np.where(chosen >= 8, sign, byte) << np.uint64(8 * i)
    self.write(operands[0], result, "b32")
