"""What a run prints: one live line on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.live import Live
from rich.text import Text

_SECONDS_BETWEEN_LINES = 15.0


def duration(seconds: float) -> str:
  """Seconds as h:mm:ss or m:ss."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
  """The progress line.

  Args:
    console: Where to print.
    start_step: Steps done before.
    train_steps: Of the run.
  """

  def __init__(self, console: Console, start_step: int, train_steps: int):
    self._console = console
    self._first = start_step
    self._total = train_steps
    self._began = time.monotonic()
    self._printed = 0.0
    self._live = Live(console=console, refresh_per_second=4, transient=True)

  def __enter__(self) -> "Progress":
    if self._console.is_terminal:
      self._live.start()
    return self

  def __exit__(self, *unused) -> None:
    self._live.stop()

  def show(self, step: int, values: Mapping[str, float]) -> None:
    """Updates the line.

    Args:
      step: Steps done.
      values: loss, examples_per_second, tokens_per_second, real_token_share, and
        where there are any epoch/TASK.
    """
    now = time.monotonic()
    done = step - self._first
    left = (now - self._began) / max(done, 1) * (self._total - step)
    line = (
      f"step {step:,}/{self._total:,}  loss {values['loss']:.4f}  "
      f"{values['examples_per_second']:,.1f} examples/s  "
      f"{values['tokens_per_second']:,.0f} tokens/s  "
      f"{values['real_token_share']:.1%} real{_epochs(values)}  ETA {duration(left)}"
    )
    if self._console.is_terminal:
      self._live.update(Text(line))
    elif now - self._printed >= _SECONDS_BETWEEN_LINES or step == self._total:
      self._printed = now
      self._console.print(line, highlight=False, soft_wrap=True)

  def note(self, line: str) -> None:
    """Prints a line above the live one."""
    self._console.print(line, highlight=False, soft_wrap=True)


def _epochs(values: Mapping[str, float]) -> str:
  """The epochs that tasks have come to, from the least to the most."""
  epochs = [value for name, value in values.items() if name.startswith("epoch/")]
  if not epochs:
    return ""
  ends = dict.fromkeys(f"{end:.2f}" for end in (min(epochs), max(epochs)))
  return f"  epoch {'–'.join(ends)}"
