"""A trace of some steps of a run, and which operations they spent their time on."""

import contextlib
import dataclasses
import functools
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from jax.profiler import ProfileData
from rich.console import Console
from rich.table import Table

from embgemma.errors import ConfigError

_TOP = 20  # operations printed
_UNNAMED = "unnamed"
_DEVICE_PLANE = re.compile(r"/device:(GPU|TPU):\d+$")
# Parts of a JAX name that say how something is computed and not what.
_TRANSFORM = re.compile(r"(?:transpose|jvp|vmap|shard_map|checkpoint|remat)\((.*)\)$")
_WRAPPER = re.compile(
  r"(?:jit\(.*\)|while|body|cond|closed_call|checkpoint|remat|rematted_computation"
  r"|shard_map|branch_\d+_fun|.*\._.*|)$"
)


@dataclasses.dataclass(frozen=True)
class Operation:
  """What a device did at one place of the program, in a mean step.

  Attributes:
    source: JAX's name of the place, such as `encoder/layer_*/mlp/up/dot_general`;
      'unnamed' for what the compiler adds, such as copies.
    direction: 'forward', 'backward' or 'again' (computed again for the gradient).
    kind: HLO opcode; 'dot' for a fusion with a matrix product.
    example: The compiler's name of the longest of its operations, as in the trace.
    seconds: A step, on a device, without operations nested in it.
    share: Of the seconds of all operations.
  """

  source: str
  direction: str
  kind: str
  example: str
  seconds: float
  share: float


@dataclasses.dataclass(frozen=True)
class Profile:
  """What was measured, in a mean step.

  Attributes:
    operations: The longest first.
    steps: Number of steps in the trace.
    wall_seconds: Of a step.
    waited_seconds: Of a step, waiting for input.
    trace: The trace's file, for Perfetto; TensorBoard reads the profiler's folder.
  """

  operations: tuple[Operation, ...]
  steps: int
  wall_seconds: float
  waited_seconds: float
  trace: pathlib.Path

  def print(self, console: Console) -> None:
    """Prints the longest operations, and the share of input wait."""
    table = Table(title=f"operations of a step (mean of {self.steps})")
    for column in ("share", "ms"):
      table.add_column(column, justify="right")
    for column in ("kind", "direction", "operation", "in the trace"):
      table.add_column(column, overflow="fold")
    for x in self.operations[:_TOP]:
      times = (f"{x.share:.1%}", f"{x.seconds * 1e3:,.2f}")
      table.add_row(*times, x.kind, x.direction, x.source, x.example)
    console.print(table)
    busy = sum(x.seconds for x in self.operations)
    console.print(
      f"a step: {self.wall_seconds * 1e3:,.1f} ms, of which "
      f"{self.waited_seconds / self.wall_seconds:.1%} waiting for input; operations on "
      f"a device add up to {busy * 1e3:,.1f} ms\ntrace: {self.trace}",
      highlight=False,
      soft_wrap=True,
    )


class Profiler:
  """Traces the steps from the first to the last of `steps`, and prints a `Profile`.

  Args:
    directory: Where the trace goes, in TensorBoard's layout.
    steps: First and last, counted from 1. Tracing costs memory and time: few.
    train_steps: Of the run.
    console: Where to print.

  Raises:
    ConfigError: the steps are not two of the run.
  """

  def __init__(
    self,
    directory: pathlib.Path,
    steps: Sequence[int],
    train_steps: int,
    console: Console,
  ):
    if len(steps) != 2 or not 1 <= steps[0] <= steps[1] <= train_steps:
      raise ConfigError(
        f"PROFILE_STEPS is {tuple(steps)}, but the run has steps 1 to {train_steps}; "
        "give the first and the last step to profile, such as (10, 12), or None"
      )
    self._directory = directory
    self._steps = range(steps[0], steps[1] + 1)
    self._console = console
    self._began: float | None = None
    self._done = 0
    self._waited = 0.0

  @contextlib.contextmanager
  def step(self, number: int, settle: Callable[[], Any]) -> Iterator[None]:
    """The context of step `number`; traces and reports as its turn comes.

    A run that resumes amid the steps profiles those left, and one that resumes after
    them none.

    Args:
      number: From 1.
      settle: Returns when the devices have done all that they were given, so that the
        trace has these steps whole and no other.
    """
    if number not in self._steps:
      yield
      return
    try:
      if self._began is None:
        settle()
        self._start()
      with jax.profiler.StepTraceAnnotation("train", step_num=number):
        yield
      self._done += 1
      if number == self._steps[-1]:
        settle()
        self._finish().print(self._console)
    except BaseException:
      self.close()
      raise

  def waited(self, seconds: float) -> None:
    """Counts time in which a step waited for its input."""
    if self._began is not None:
      self._waited += seconds

  def close(self) -> None:
    """Ends a trace whose last step never came."""
    if self._began is not None:
      self._began = None
      jax.profiler.stop_trace()

  def _start(self) -> None:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # calls of Python would be most of the file
    jax.profiler.start_trace(self._directory, profiler_options=options)
    self._began = time.perf_counter()

  def _finish(self) -> Profile:
    assert self._began is not None
    wall = time.perf_counter() - self._began
    self.close()
    folder = max(self._directory.glob("plugins/profile/*"))
    return Profile(
      operations=read_operations(next(folder.glob("*.xplane.pb")), self._done),
      steps=self._done,
      wall_seconds=wall / self._done,
      waited_seconds=self._waited / self._done,
      trace=next(folder.glob("*.trace.json.gz")),
    )


def read_operations(path: pathlib.Path, steps: int) -> tuple[Operation, ...]:
  """The operations of a trace of some steps, the longest first.

  Args:
    path: An `xplane.pb`.
    steps: How many steps the trace has.
  """
  named = _instructions(path)
  times: dict[tuple[str, str, str], dict[str, float]] = {}
  devices: set[Any] = set()
  for device, program, name, seconds in _self_times(ProfileData.from_file(str(path))):
    devices.add(device)
    place = named.get((program, name)) or named.get(name)
    # A kernel that is none of the program's, such as a transfer, says what it is.
    key = place or (_UNNAMED, "forward", name.rstrip(".0123456789"))
    operations = times.setdefault(key, {})
    operations[name] = operations.get(name, 0.0) + seconds
  total = sum(sum(operations.values()) for operations in times.values())
  found = [
    Operation(
      *key,
      example=max(operations, key=lambda name: operations[name]),
      seconds=sum(operations.values()) / steps / len(devices),
      share=sum(operations.values()) / total,
    )
    for key, operations in times.items()
  ]
  return tuple(sorted(found, key=lambda x: x.seconds, reverse=True))


def _self_times(data: ProfileData) -> Iterator[tuple[Any, str, str, float]]:
  """Device, program, name and seconds of operations, less those nested in each."""
  planes = list(data.planes)
  devices = [plane for plane in planes if _DEVICE_PLANE.match(plane.name)]
  for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
    # TPUs say operations in a line of their own, GPUs kernels in one a stream, and a
    # CPU in those of its threads, among much else.
    lines = list(plane.lines)
    own = [line for line in lines if line.name == "XLA Ops"]
    streams = [line for line in lines if line.name.startswith("Stream")]
    for line in (own or streams) if devices else lines:
      for event, stats, nanoseconds in _nested(line.events, bool(devices)):
        device = plane.name if devices else stats.get("device_ordinal")
        # A TPU's events are named by the whole instruction.
        name = re.sub(r"^%?([^ ]*) = .*", r"\1", stats.get("hlo_op", event), flags=re.S)
        yield device, str(stats.get("program_id", "")), name, nanoseconds * 1e-9


def _nested(
  events: Iterable[Any], all_are_operations: bool
) -> list[tuple[str, Mapping[str, Any], float]]:
  """Name, statistics and self time in ns of a line's events that are operations."""
  found: list[tuple[str, Mapping[str, Any], float]] = []
  around: list[tuple[float, int]] = []  # end, and place among those found
  timed = (event for event in events if event.duration_ns > 0)
  for event in sorted(timed, key=lambda x: (x.start_ns, -x.duration_ns)):
    stats = dict(event.stats)
    if not all_are_operations and "hlo_op" not in stats:
      continue
    while around and around[-1][0] <= event.start_ns:
      around.pop()
    if around:
      outer, others, left = found[around[-1][1]]
      found[around[-1][1]] = (outer, others, max(left - event.duration_ns, 0.0))
    around.append((event.start_ns + event.duration_ns, len(found)))
    found.append((event.name, stats, event.duration_ns))
  return found


def _instructions(path: pathlib.Path) -> dict[Any, tuple[str, str, str]]:
  """Source, direction and kind by (program, instruction), and by instruction alone.

  The profiler keeps the programs of a trace in a plane of metadata.
  """
  found: dict[Any, tuple[str, str, str]] = {}
  space = _message("Space").FromString(path.read_bytes())
  for plane in space.planes:
    if plane.name != "/host:metadata":
      continue
    for entry in plane.events:
      program = re.sub(r".*\((\d+)\)$", r"\1", entry.value.name)
      for statistic in entry.value.statistics:
        hlo = _message("Hlo").FromString(statistic.bytes)
        computations = {x.id: x.instructions for x in hlo.module.computations}
        for instruction in (i for x in computations.values() for i in x):
          place = _place(instruction, computations)
          found[program, instruction.name] = found[instruction.name] = place
  return found


def _place(instruction: Any, computations: Mapping[int, Any]) -> tuple[str, str, str]:
  """Source, direction and kind of an instruction; of a fusion, by what is in it."""
  kind, path = instruction.opcode, instruction.metadata.op_name
  if kind == "fusion":
    inner = [x for i in instruction.called for x in computations.get(i, ())]
    products = [x for x in inner if x.opcode in ("dot", "convolution")]
    if products:
      kind = "dot"
    names = (products and products[-1].metadata.op_name, path)
    path = next(filter(None, names), "")
    if not path and inner:
      path = inner[-1].metadata.op_name
  return _source(path) or _UNNAMED, _direction(path), kind


def _direction(path: str) -> str:
  if "rematted_computation" in path:
    return "again"
  return "backward" if "transpose(" in path else "forward"


def _source(path: str) -> str:
  """The place in the program without transformations; layers of one kind are one."""
  parts = []
  for part in path.split("/"):
    while match := _TRANSFORM.match(part):
      part = match[1]
    if not _WRAPPER.match(part):
      parts.append(re.sub(r"_\d+$", "_*", part))
  return "/".join(parts)


# The fields that are read here of messages of XLA's (xplane.proto, hlo.proto): number,
# type ("*": repeated). No package without TensorFlow has them.
_MESSAGES = {
  "Space": {"planes": (1, "Plane*")},
  "Plane": {"name": (2, "string"), "events": (4, "Entry*")},
  "Entry": {"value": (2, "Event")},
  "Event": {"name": (2, "string"), "statistics": (5, "Statistic*")},
  "Statistic": {"bytes": (6, "bytes")},
  "Hlo": {"module": (1, "Module")},
  "Module": {"computations": (3, "Computation*")},
  "Computation": {"id": (5, "int64"), "instructions": (2, "Instruction*")},
  "Instruction": {
    "name": (1, "string"),
    "opcode": (2, "string"),
    "metadata": (7, "Metadata"),
    "called": (38, "int64*"),
  },
  "Metadata": {"op_name": (2, "string")},
}


@functools.cache
def _message(name: str) -> Any:
  """The class of one of `_MESSAGES`."""
  field_types = descriptor_pb2.FieldDescriptorProto
  file = descriptor_pb2.FileDescriptorProto(
    name="embgemma/profile.proto", package="embgemma", syntax="proto3"
  )
  for message, fields in _MESSAGES.items():
    made = file.message_type.add(name=message)
    for field, (number, kind) in fields.items():
      base = kind.rstrip("*")
      repeated = field_types.LABEL_REPEATED, field_types.LABEL_OPTIONAL
      made.field.add(
        name=field,
        number=number,
        label=repeated[base == kind],
        type=(
          field_types.TYPE_MESSAGE
          if base in _MESSAGES
          else field_types.Type.Value(f"TYPE_{base.upper()}")
        ),
        type_name=f".embgemma.{base}" if base in _MESSAGES else None,
      )
  pool = descriptor_pool.DescriptorPool()
  pool.AddSerializedFile(file.SerializeToString())
  return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"embgemma.{name}"))
