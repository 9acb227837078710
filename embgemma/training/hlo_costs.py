"""Bytes and collectives of a compiled program, read from its optimized HLO text.

XLA's own `cost_analysis` counts the body of a loop once, and says nothing of
collectives. Here a loop's body counts as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

from embgemma.training.hlo_text import Computation, Instruction, Program

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
)
# These name, group or place buffers, and move nothing.
_BOOKKEEPING = frozenset(
  {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "domain",
    "get-dimension-size",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
  }
)
# A collective that a TPU runs beside several fusions is in the first, which starts it,
# in those it runs beside, which hand on its buffers, and in the last, which ends it.
_ASYNC_START, _ASYNC_DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
_PLACEHOLDER_TARGETS = ("AllocateBuffer", "ConcatBitcast")


@dataclasses.dataclass(frozen=True)
class Collective:
  """What a chip exchanges with the others of its group, in one kind of collective.

  Attributes:
    kind: One of COLLECTIVES.
    group: Positions, in the mesh's order of devices, of the first group's members.
    count: How often it runs.
    full_bytes: Of the whole value, in all: what an all-gather makes on each chip, what
      a reduction or exchange reads on each chip.
  """

  kind: str
  group: tuple[int, ...]
  count: int
  full_bytes: int

  @property
  def sent_bytes(self) -> float:
    """Bytes that each chip sends, by the ring algorithms.

    (n - 1) / n of the value for a gather or scatter, twice that for an all-reduce
    (a scatter, then a gather), all of it for a permutation.
    """
    size = len(self.group)
    if self.kind == "collective-permute":
      return float(self.full_bytes)
    ring = self.full_bytes * (size - 1) / size
    return 2 * ring if self.kind == "all-reduce" else ring


@dataclasses.dataclass(frozen=True)
class HloCosts:
  """Costs of one run of a program on one device.

  Attributes:
    hbm_bytes: Read from and written to main memory. Operands and results of every
      instruction that runs by itself; of one that reads or writes a slice in place,
      the slice.
    collectives: By kind and group.
    unknown_loops: Loops whose length the text does not give; counted once.
  """

  hbm_bytes: int
  collectives: tuple[Collective, ...]
  unknown_loops: int


def hlo_costs(text: str, devices: int) -> HloCosts:
  """Costs of an optimized program.

  Args:
    text: `compiled.as_text()`.
    devices: The mesh's.
  """
  counter = _Counter(Program.parse(text), devices)
  counter.run(counter.program.entry, 1, {})
  collectives = tuple(
    Collective(kind, group, count, size)
    for (kind, group), (count, size) in sorted(counter.collectives.items())
    if len(group) > 1
  )
  return HloCosts(counter.hbm_bytes, collectives, counter.unknown_loops)


class _Counter:
  """Walks a program and adds up."""

  def __init__(self, program: Program, devices: int):
    self.program = program
    self.devices = devices
    self.hbm_bytes = 0
    self.collectives: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
    self.unknown_loops = 0

  def run(
    self, computation: Computation, times: int, constants: Mapping[int, int]
  ) -> None:
    """Adds `times` runs of a computation.

    Args:
      computation: Whose instructions run by themselves: none of a fusion.
      times: How often it runs.
      constants: Known integers among the elements of its parameter.
    """
    for instruction in computation.instructions.values():
      instruction = _joined(computation, instruction)
      match instruction.opcode:
        case "while":
          self._run_loop(computation, instruction, times, constants)
        case "call" | "async":
          for name in instruction.called("to_apply", "calls"):
            self.run(self.program.computations[name], times, {})
        case "conditional":
          self._run_dearest(instruction, times)
        case _:
          self.hbm_bytes += times * self._bytes(computation, instruction)
          self._add_collectives(computation, instruction, times)

  def _run_loop(self, computation, instruction, times, constants) -> None:
    (body,) = instruction.called("body")
    (condition,) = instruction.called("condition")
    body, condition = (self.program.computations[n] for n in (body, condition))
    initial = _initial_constants(computation, instruction, constants)
    trips = _trip_count(instruction, body, condition, initial)
    if trips is None:
      self.unknown_loops += 1
      trips = 1
    kept = {i: n for i, n in initial.items() if _is_invariant(body, i)}
    self.run(body, times * trips, kept)

  def _run_dearest(self, instruction: Instruction, times: int) -> None:
    names = instruction.called(
      "branch_computations", "true_computation", "false_computation"
    )
    branches = []
    for name in names:
      branch = _Counter(self.program, self.devices)
      branch.run(self.program.computations[name], times, {})
      branches.append(branch)
    dearest = max(branches, key=lambda branch: branch.hbm_bytes)
    self.hbm_bytes += dearest.hbm_bytes
    self.unknown_loops += dearest.unknown_loops
    for key, (count, size) in dearest.collectives.items():
      self._add_collective(key, count, size)

  def _add_collectives(
    self, computation: Computation, instruction: Instruction, times: int
  ) -> None:
    if instruction.opcode == "fusion":
      # TPU programs fuse collectives with what feeds them, or with what they overlap.
      (name,) = instruction.called("calls")
      inner = self.program.computations[name]
      for part in inner.instructions.values():
        if not _goes_on(inner, part):
          self._add_collectives(inner, _joined(inner, part), times)
    if instruction.opcode in COLLECTIVES:
      group = _first_group(instruction, self.devices)
      size = sum(leaf.bytes for leaf in _operand_leaves(computation, instruction))
      if instruction.opcode == "all-gather":
        size *= len(group)
      self._add_collective((instruction.opcode, group), times, size * times)

  def _add_collective(self, key, count: int, size: int) -> None:
    old_count, old_size = self.collectives.get(key, (0, 0))
    self.collectives[key] = (old_count + count, old_size + size)

  def _bytes(self, computation: Computation, instruction: Instruction) -> int:
    opcode = instruction.opcode
    if opcode in _BOOKKEEPING or opcode.endswith(("-start", "-update", "-done")):
      return 0
    if opcode == "custom-call" and instruction.target in _PLACEHOLDER_TARGETS:
      return 0
    operands = [computation.instructions[name] for name in instruction.operands]
    if opcode == "fusion":
      (name,) = instruction.called("calls")
      inner = self.program.computations[name]
      if inner.root.target == _ASYNC_DONE:
        return 0
      read = [self._read(inner, inner.parameters[i]) for i in range(len(operands))]
      written = self._written(inner, inner.root)
    else:
      read = [_read_by(computation, instruction, i) for i in range(len(operands))]
      written = _written_by(computation, instruction)
    total = 0
    for operand, size in zip(operands, read, strict=True):
      whole = sum(leaf.bytes for leaf in operand.leaves if leaf.in_hbm)
      total += whole if size is None else min(size, whole)
    if len(written) != len(instruction.leaves):
      return total + sum(leaf.bytes for leaf in instruction.leaves if leaf.in_hbm)
    for leaf, size in zip(instruction.leaves, written, strict=True):
      if leaf.in_hbm:
        total += leaf.bytes if size is None else size
    return total

  def _read(self, computation: Computation, value: Instruction) -> int | None:
    """Bytes that a fusion reads of a parameter; None is all of it."""
    total = 0
    for user, index in computation.users(value.name):
      if user.opcode == "tuple" or _goes_on(computation, user):
        continue  # handed on, as it is
      if user.opcode == "bitcast":
        size = self._read(computation, user)
      elif user.opcode == "fusion":
        (name,) = user.called("calls")
        inner = self.program.computations[name]
        size = self._read(inner, inner.parameters[index])
      else:
        size = _read_by(computation, user, index)
      if size is None:
        return None
      total += size
    return total

  def _written(self, computation: Computation, value: Instruction) -> list[int | None]:
    """Bytes that a fusion writes of each result; None is all of it."""
    operands = [computation.instructions[name] for name in value.operands]
    if value.opcode == "parameter" or _goes_on(computation, value):
      return [0] * len(value.leaves)
    if value.opcode == "tuple":
      return [size for part in operands for size in self._written(computation, part)]
    if value.opcode == "bitcast":
      return self._written(computation, operands[0])
    if value.opcode == "fusion":
      (name,) = value.called("calls")
      inner = self.program.computations[name]
      return self._written(inner, inner.root)
    return _written_by(computation, value)


def _read_by(
  computation: Computation, instruction: Instruction, index: int
) -> int | None:
  """Bytes that an instruction reads of an operand; None is all of it."""
  result = sum(leaf.bytes for leaf in instruction.leaves)
  match instruction.opcode, index:
    case (("dynamic-slice" | "slice" | "gather"), 0):
      return result
    case "dynamic-update-slice", 0:
      return 0
    case "scatter", 0:
      return _update_bytes(computation, instruction)
  return None


def _written_by(computation: Computation, instruction: Instruction) -> list[int | None]:
  if instruction.opcode in ("dynamic-update-slice", "scatter"):
    return [_update_bytes(computation, instruction)]
  return [None] * len(instruction.leaves)


def _update_bytes(computation: Computation, instruction: Instruction) -> int:
  index = 1 if instruction.opcode == "dynamic-update-slice" else -1
  update = computation.instructions[instruction.operands[index]]
  return sum(leaf.bytes for leaf in update.leaves)


def _operand_leaves(computation: Computation, instruction: Instruction) -> Iterator:
  for name in instruction.operands:
    yield from computation.instructions[name].leaves


def _joined(computation: Computation, instruction: Instruction) -> Instruction:
  """The two halves of an asynchronous instruction as one, in place of the second."""
  if not instruction.opcode.endswith("-done"):
    return instruction
  start = computation.instructions[instruction.operands[0]]
  while start.opcode.endswith("-update"):
    start = computation.instructions[start.operands[0]]
  opcode = instruction.opcode.removesuffix("-done")
  if start.opcode != f"{opcode}-start":
    return instruction
  return dataclasses.replace(
    instruction, opcode=opcode, operands=start.operands, attributes=start.attributes
  )


def _goes_on(computation: Computation, instruction: Instruction) -> bool:
  """Whether this is a collective that another fusion has started."""
  if instruction.opcode not in COLLECTIVES or "chain_id=" not in instruction.attributes:
    return False
  return all(u.target != _ASYNC_START for u, _ in computation.users(instruction.name))


def _first_group(instruction: Instruction, devices: int) -> tuple[int, ...]:
  """Members of the first group of a collective, in any of HLO's notations."""
  attributes = instruction.attributes
  pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
  if pairs:
    first = re.findall(r"\d+", pairs.group(1))[:2]
    return tuple(int(n) for n in first)
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
  if listed:
    return tuple(int(n) for n in listed.group(1).split(","))
  iota = re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
  )
  if not iota:
    return tuple(range(devices))
  groups, shape, order = (
    [int(n) for n in part.split(",")] if part else None for part in iota.groups()
  )
  assert groups is not None
  assert shape is not None
  members = np.arange(math.prod(shape)).reshape(shape).transpose(order)
  return tuple(int(n) for n in members.reshape(groups)[0])


def _trip_count(
  instruction: Instruction,
  body: Computation,
  condition: Computation,
  initial: Mapping[int, int],
) -> int | None:
  """How often a loop runs: as XLA noted it, or of the form `i < n; i += step`."""
  noted = re.search(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)', instruction.attributes)
  if noted:
    return int(noted.group(1))
  test = condition.root
  if test.opcode != "compare" or "direction=LT" not in test.attributes:
    return None
  counter, bound = (condition.instructions[name] for name in test.operands)
  index = condition.element(counter)
  last = condition.constant(bound, initial)
  if index is None or last is None or index not in initial:
    return None
  step = _step(body, index, initial)
  return None if not step else max(0, -(-(last - initial[index]) // step))


def _step(body: Computation, index: int, initial: Mapping[int, int]) -> int | None:
  """What a loop's body adds to its counter."""
  update = body.source(body.instructions[body.root.operands[index]])
  if update.opcode != "add":
    return None
  kept = {i: n for i, n in initial.items() if i != index}
  terms = [body.instructions[name] for name in update.operands]
  known = [body.constant(term, kept) for term in terms]
  counters = [body.element(term) for term in terms]
  for step, other in zip(known, reversed(counters), strict=True):
    if step is not None and other == index:
      return step
  return None


def _initial_constants(
  computation: Computation, instruction: Instruction, constants: Mapping[int, int]
) -> dict[int, int]:
  """Known integers among the elements of a loop's first value."""
  value = computation.source(computation.instructions[instruction.operands[0]])
  if value.opcode != "tuple":
    return {}
  found = {}
  for index, name in enumerate(value.operands):
    number = computation.constant(computation.instructions[name], constants)
    if number is not None:
      found[index] = number
  return found


def _is_invariant(body: Computation, index: int) -> bool:
  """Whether a loop's body hands an element on as it came."""
  if body.root.opcode != "tuple":
    return False
  return body.element(body.instructions[body.root.operands[index]]) == index
