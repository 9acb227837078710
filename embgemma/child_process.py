"""Commands that run beside this process and end with it."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import IO

_SECONDS_TO_END = 60.0  # of a child that is told to: a run saves before

# Of a Python that becomes a command: on Linux the kernel ends it with its parent.
_ENDING_WITH_PARENT = """
import ctypes, os, signal, sys
prctl = getattr(ctypes.CDLL(None), "prctl", None)
if prctl is not None:
  prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
  try:
    os.execvp(sys.argv[2], sys.argv[2:])
  except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


@contextlib.contextmanager
def child_process(
  command: Sequence[str],
  log: IO[bytes],
  descriptors: Sequence[int] = (),
  seconds_to_end: float = _SECONDS_TO_END,
) -> Iterator[subprocess.Popen[bytes]]:
  """A running command that ends with the block and, on Linux, with this process.

  Args:
    command: Its first is a program.
    log: Takes what it prints.
    descriptors: Of files that it shall have open, too.
    seconds_to_end: Before it is killed, if it was told to end and has not.
  """
  starter = [sys.executable, "-c", _ENDING_WITH_PARENT, str(os.getpid())]
  started = subprocess.Popen(
    [*starter, *command],
    stdout=log,
    stderr=subprocess.STDOUT,
    process_group=0,
    pass_fds=descriptors,
  )
  try:
    yield started
  finally:
    started.terminate()
    try:
      started.wait(seconds_to_end)
    except subprocess.TimeoutExpired:
      started.kill()
      started.wait()
