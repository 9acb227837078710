"""Optimized HLO text as objects: what `compiled.as_text()` prints."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

from embgemma.errors import EmbgemmaError

_LEAF = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Leaf:
  """An array, or one of a tuple's.

  Attributes:
    dtype: HLO's name, such as "bf16".
    dims: Its shape.
    in_hbm: Whether it lies in the device's main memory; TPU programs place some
      arrays in on-chip memory, others on the host.
  """

  dtype: str
  dims: tuple[int, ...]
  in_hbm: bool

  @property
  def bytes(self) -> int:
    """Its size, tile padding left out."""
    bits = {"pred": 8, "token": 0, "opaque": 0}.get(self.dtype)
    if bits is None:
      # bf16, f32, s4, u8, c64, f8e4m3fn, …
      match = re.match(r"[a-z]+(\d+)", self.dtype)
      bits = int(match.group(1)) if match else 0
    return math.prod(self.dims) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: Unique in its computation.
    opcode: Such as "all-gather-start".
    leaves: Arrays of its result, tuples flattened.
    operands: Names.
    attributes: The rest of the line.
  """

  name: str
  opcode: str
  leaves: tuple[Leaf, ...]
  operands: tuple[str, ...]
  attributes: str

  def called(self, *keys: str) -> list[str]:
    """Computations named by these attributes, in order."""
    names = []
    for key in keys:
      match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
      names += _NAME.findall(match.group(1)) if match else []
    return names

  @property
  def target(self) -> str:
    """What a custom call calls."""
    match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
    return match.group(1) if match else ""


@dataclasses.dataclass(frozen=True)
class Computation:
  """A function of the program.

  Attributes:
    instructions: By name, in order.
    root: Its result.
  """

  instructions: Mapping[str, Instruction]
  root: Instruction

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """Parameters by number."""
    return {
      int(i.attributes): i
      for i in self.instructions.values()
      if i.opcode == "parameter"
    }

  @functools.cached_property
  def _users(self) -> dict[str, list[tuple[Instruction, int]]]:
    users: dict[str, list[tuple[Instruction, int]]] = {}
    for instruction in self.instructions.values():
      for index, name in enumerate(instruction.operands):
        users.setdefault(name, []).append((instruction, index))
    return users

  def users(self, name: str) -> list[tuple[Instruction, int]]:
    """Instructions that take this one, and as which operand."""
    return self._users.get(name, [])

  def source(self, value: Instruction) -> Instruction:
    """The instruction whose value this is, through copies."""
    while value.opcode in ("copy", "copy-done", "copy-start", "bitcast", "convert"):
      value = self.instructions[value.operands[0]]
    return value

  def element(self, value: Instruction) -> int | None:
    """Which element of the computation's one parameter this is, if it is one."""
    value = self.source(value)
    if value.opcode != "get-tuple-element":
      return None
    if self.instructions[value.operands[0]].opcode != "parameter":
      return None
    match = re.search(r"\bindex=(\d+)", value.attributes)
    return int(match.group(1)) if match else None

  def constant(self, value: Instruction, known: Mapping[int, int]) -> int | None:
    """The integer this is, given known elements of the parameter, if it is one."""
    value = self.source(value)
    if value.opcode == "constant":
      match = re.match(r"-?\d+$", value.attributes.split(";", 1)[0])
      return int(match.group()) if match else None
    index = self.element(value)
    return None if index is None else known.get(index)


@dataclasses.dataclass(frozen=True)
class Program:
  """A module.

  Attributes:
    computations: By name.
    entry: Where it starts.
  """

  computations: Mapping[str, Computation]
  entry: Computation

  @classmethod
  def parse(cls, text: str) -> "Program":
    """The program of an optimized module's text.

    Raises:
      EmbgemmaError: it is no such text.
    """
    computations: dict[str, Computation] = {}
    entry = name = None
    instructions: dict[str, Instruction] = {}
    root = None
    for line in text.splitlines():
      header = _COMPUTATION.match(line)
      if header:
        name, instructions, root = header.group(2), {}, None
        entry = name if header.group(1) else entry
      elif line.startswith("}") and name is not None and root is not None:
        computations[name] = Computation(instructions, root)
        name = None
      elif name is not None and (match := _INSTRUCTION.match(line)):
        instruction = _instruction(match.group(2), match.group(3))
        instructions[instruction.name] = instruction
        root = instruction if match.group(1) else root
    if entry is None or entry not in computations:
      raise EmbgemmaError("the compiled program's text cannot be read as HLO")
    return cls(computations, computations[entry])


def _instruction(name: str, rest: str) -> Instruction:
  end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  opening = rest.index("(")
  closing = _closing(rest, opening)
  opcode, inside = rest[:opening], rest[opening + 1 : closing - 1]
  attributes = rest[closing:].lstrip(", ")
  operands = tuple(_NAME.findall(inside))
  if opcode == "parameter":
    attributes = inside
  elif opcode == "constant":
    attributes = f"{inside};{attributes}"
  return Instruction(name, opcode, _leaves(shape), operands, attributes)


def _closing(text: str, start: int) -> int:
  """One past the parenthesis that closes the one at `start`."""
  depth = 0
  for index in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[index], 0)
    if not depth:
      return index + 1
  raise EmbgemmaError(f"the compiled program's text cannot be read: {text[:80]}")


def _leaves(shape: str) -> tuple[Leaf, ...]:
  leaves = []
  for dtype, dims, layout in _LEAF.findall(shape):
    sizes = tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)
    space = re.search(r"S\((\d+)\)", layout)
    leaves.append(Leaf(dtype, sizes, space is None or space.group(1) == "0"))
  return tuple(leaves)
