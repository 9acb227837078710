"""Asking a run to stop: SIGINT and SIGTERM between two steps."""

import contextlib
import signal
from collections.abc import Iterator


class Stopped(Exception):  # noqa: N818 (asked for, no error)
  """The run was asked to stop; its state is saved.

  Attributes:
    signum: The signal.
    step: Steps done and saved.
  """

  def __init__(self, signum: int, step: int):
    super().__init__(f"stopped by {signal.Signals(signum).name} at step {step}")
    self.signum = signum
    self.step = step


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
  """Signals asking to stop, as they come in; a second one interrupts at once."""
  received: list[int] = []

  def handler(signum, frame):
    if received:
      signal.default_int_handler(signum, frame)
    received.append(signum)

  previous = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield received
  finally:
    for signum, old in previous.items():
      signal.signal(signum, old)
