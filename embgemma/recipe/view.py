"""What a running recipe shows: a live table on a terminal, lines elsewhere."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from embgemma.recipe.plan import PlannedStage
from embgemma.training.progress import duration

_STYLES = {"complete": "green", "running": "bold cyan", "failed": "bold red"}
_SECONDS_BETWEEN_LINES = 60.0


@dataclasses.dataclass(frozen=True)
class StageStatus:
  """How a stage is.

  Attributes:
    stage: Which.
    state: "waiting", "running", "elsewhere" (another process has it), "complete" or
      "failed".
    seconds: Of its last process, once that ended.
  """

  stage: PlannedStage
  state: str
  seconds: float | None

  def to_json(self) -> dict[str, Any]:
    """As recipe.json has it."""
    return {
      "arm": self.stage.arm,
      "seed": self.stage.seed,
      "state": self.state,
      "seconds": self.seconds,
      "needs": list(self.stage.needs),
      "directory": self.stage.directory.name if self.stage.writes else None,
      "log": str(self.stage.log.relative_to(self.stage.root)),
      "command": self.stage.arguments,
    }


class View:
  """Shows the stages of a recipe.

  Args:
    console: Where.
  """

  def __init__(self, console: Console):
    self._console = console
    self._live = Live(console=console, refresh_per_second=2)
    self._statuses: Sequence[StageStatus] = ()
    self._lines: dict[str, tuple[float, str]] = {}
    self._printed: dict[str, float] = {}

  def __enter__(self) -> "View":
    if self._console.is_terminal:
      self._live.start()
    return self

  def __exit__(self, *unused) -> None:
    self._live.stop()

  def show(self, statuses: Sequence[StageStatus]) -> None:
    """All stages, as they are now."""
    self._statuses = statuses
    self._draw()

  def changed(self, name: str, line: str) -> None:
    """A stage began or ended; `line` is what a failed one said last."""
    status = next(each for each in self._statuses if each.stage.name == name)
    took = f" in {duration(status.seconds)}" if status.seconds is not None else ""
    self._lines.pop(name, None)
    self._say(f"{name}: {status.state}{took}{f': {line}' if line else ''}")

  def progress(self, name: str, seconds: float, line: str) -> None:
    """What a running stage printed last."""
    self._lines[name] = (seconds, line)
    if self._console.is_terminal:
      self._draw()
      return
    now = time.monotonic()
    if line and now - self._printed.setdefault(name, now) >= _SECONDS_BETWEEN_LINES:
      self._printed[name] = now
      self._say(f"{name}: {line}")

  def _say(self, text: str) -> None:
    self._console.print(text, highlight=False, soft_wrap=True, markup=False)

  def _draw(self) -> None:
    if self._console.is_terminal:
      self._live.update(self._table())

  def _table(self) -> Table:
    table = Table("stage", "state", "time", "last line", expand=True)
    for status in self._statuses:
      seconds, line = self._lines.get(status.stage.name, (status.seconds, ""))
      table.add_row(
        status.stage.name,
        Text(status.state, _STYLES.get(status.state, "dim")),
        "" if seconds is None else duration(seconds),
        Text(line, overflow="ellipsis", no_wrap=True),
      )
    return table
