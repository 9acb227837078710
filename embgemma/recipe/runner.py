"""Runs the stages of a recipe: each a process, those that are complete left out."""

import contextlib
import json
import os
import pathlib
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping, Sequence

from embgemma import outputs
from embgemma.child_process import child_process
from embgemma.errors import RecipeError
from embgemma.recipe.plan import RECIPE_FILE, PlannedStage
from embgemma.recipe.view import StageStatus, View

_POLL_SECONDS = 0.5
_TAIL_BYTES = 4096
_SECONDS_TO_END = 120.0  # of a stage that is told to: a search waits for its trial


def run(
  stages: Sequence[PlannedStage],
  wanted: Collection[str],
  root: pathlib.Path,
  jobs: int,
  view: View,
) -> None:
  """Runs the stages that are wanted and not complete.

  A stage that fails keeps those back that need it; the others go on. Stopped, it ends
  the running stages, which go on from where they were the next time. Several processes
  may run one recipe, on machines that share its directory: each stage runs in one.

  Args:
    stages: Of `plan`, in its order.
    wanted: Names of those to run, and of all that they need.
    root: RECIPE_DIR.
    jobs: Stages that may run at a time.
    view: Is told what happens.

  Raises:
    RecipeError: a stage failed.
    DataError: a record is damaged, or one cannot be written.
  """
  root.mkdir(parents=True, exist_ok=True)
  with view:
    _Run(stages, wanted, root, view).run(jobs)


class _Run:
  """One pass over the stages."""

  def __init__(
    self,
    stages: Sequence[PlannedStage],
    wanted: Collection[str],
    root: pathlib.Path,
    view: View,
  ):
    self._stages = {stage.name: stage for stage in stages}
    self._wanted = wanted
    self._root = root
    self._view = view
    self._status: dict[str, StageStatus] = {}
    for stage in stages:
      seconds = stage.seconds()
      state = "waiting" if seconds is None else "complete"
      self._status[stage.name] = StageStatus(stage, state, seconds)

  def run(self, jobs: int) -> None:
    running: dict[str, _Running] = {}
    self._changed()
    with contextlib.ExitStack() as exits, self._stopping(running):
      while True:
        for name in self._ready():
          if len(running) < jobs and (process := self._start(name, exits)):
            running[name] = process
        if not running and not self._ready():
          break
        time.sleep(_POLL_SECONDS)
        for name, process in list(running.items()):
          if process.code() is None:
            self._view.progress(name, process.seconds, process.last_line())
            continue
          del running[name]
          self._ended(name, process)
    failed = [name for name, of in self._status.items() if of.state == "failed"]
    if failed:
      logs = ", ".join(str(self._stages[name].log) for name in failed)
      raise RecipeError(
        f"{', '.join(failed)} failed: see {logs}; mend it and run the recipe again"
      )

  @contextlib.contextmanager
  def _stopping(self, running: Mapping[str, "_Running"]) -> Iterator[None]:
    """Tells all stages to end where the block does early, before any is waited for."""
    try:
      yield
    except BaseException:
      for name, process in running.items():
        process.terminate()
        self._status[name] = StageStatus(self._stages[name], "waiting", None)
      self._write()
      raise

  def _ready(self) -> list[str]:
    return [
      name
      for name, status in self._status.items()
      if name in self._wanted
      and status.state in ("waiting", "elsewhere")
      and all(self._status[need].state == "complete" for need in status.stage.needs)
    ]

  def _start(self, name: str, exits: contextlib.ExitStack) -> "_Running | None":
    """A stage's process; None if another has it, or had it to the end."""
    stage = self._stages[name]
    own = contextlib.ExitStack()
    try:
      stage.lock.parent.mkdir(parents=True, exist_ok=True)
      lock = own.enter_context(outputs.locked(stage.lock, _busy))
    except _BusyError:
      if self._status[name].state != "elsewhere":
        self._set(name, "elsewhere", None)
      return None
    seconds = stage.seconds()
    if seconds is not None:
      own.close()
      self._set(name, "complete", seconds)
      return None
    # Until it is done again; its directory may have been deleted, and be half of one.
    stage.record.unlink(missing_ok=True)
    process = _Running(stage, lock, exits.enter_context(own))
    self._set(name, "running", None)
    return process

  def _ended(self, name: str, process: "_Running") -> None:
    failed = bool(process.code())
    if not failed:
      self._stages[name].write_record(process.seconds)
    process.close()
    self._set(name, "failed" if failed else "complete", process.seconds)

  def _set(self, name: str, state: str, seconds: float | None) -> None:
    stage = self._stages[name]
    self._status[name] = StageStatus(stage, state, seconds)
    self._changed()
    line = _last_line(stage.log) if state == "failed" else ""
    self._view.changed(name, line)

  def _changed(self) -> None:
    """Shows and keeps how all stages are, and what their names stand for."""
    for name, status in self._status.items():
      seconds = status.stage.seconds() if status.state == "waiting" else None
      if seconds is not None:  # by another process
        self._status[name] = StageStatus(status.stage, "complete", seconds)
    self._view.show(list(self._status.values()))
    for status in self._status.values():
      if status.stage.writes and status.state in ("running", "complete"):
        _point(self._root / status.stage.name, status.stage.directory.name)
      elif status.state == "waiting" and status.stage.name in self._wanted:
        _point(self._root / status.stage.name, None)
    self._write()

  def _write(self) -> None:
    values = {name: status.to_json() for name, status in self._status.items()}
    with outputs.new_file(self._root / RECIPE_FILE) as file:
      file.write(json.dumps({"stages": values}, indent=1).encode() + b"\n")


class _BusyError(Exception):
  """Another process holds a stage's lock."""


def _busy() -> None:
  raise _BusyError


class _Running:
  """A stage's process.

  It holds the stage's lock, too: of a recipe that was killed it may be saving still.

  Args:
    stage: Which.
    lock: Descriptor of its lock's file.
    exits: What it holds and what ends it, in the end.
  """

  def __init__(self, stage: PlannedStage, lock: int, exits: contextlib.ExitStack):
    self._exits = exits
    self._log = stage.log
    self._began = time.monotonic()
    self.seconds = 0.0
    stage.log.parent.mkdir(parents=True, exist_ok=True)
    log = self._exits.enter_context(stage.log.open("ab"))
    self._process: subprocess.Popen[bytes] = self._exits.enter_context(
      child_process(stage.command, log, (lock,), _SECONDS_TO_END)
    )

  def code(self) -> int | None:
    """Its exit status; None while it runs."""
    code = self._process.poll()
    self.seconds = time.monotonic() - self._began
    return code

  def terminate(self) -> None:
    """Tells it to end."""
    self._process.terminate()

  def last_line(self) -> str:
    """What it printed last."""
    return _last_line(self._log)

  def close(self) -> None:
    """Closes its log."""
    self._exits.close()


def _last_line(log: pathlib.Path) -> str:
  with log.open("rb") as file:
    file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
    lines = file.read().decode(errors="replace").splitlines()
  return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _point(link: pathlib.Path, target: str | None) -> None:
  """Makes a symbolic link, in place of another; None leaves none."""
  current = os.readlink(link) if link.is_symlink() else None
  if current == target or (current is None and os.path.lexists(link)):
    return  # or someone's own
  if target is None:
    link.unlink(missing_ok=True)
    return
  made = link.with_name(f".{link.name}.{os.getpid()}")
  os.symlink(target, made)
  os.replace(made, link)
