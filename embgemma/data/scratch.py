"""Directories of unfinished work, and those that killed processes left.

    DIRECTORY/.unfinished-PPPP-SSSSSSSS-PID-…/

PPPP is the part of the work, and S says where PID is the number of one process only.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator

_NAME = re.compile(r"\.unfinished-\d{4,}-([0-9a-f]{8})-(\d+)-.*")
_LEFT_SECONDS = 6 * 3600.0  # without a change, after which any counts as left


@contextlib.contextmanager
def scratch(directory: pathlib.Path, part: int) -> Iterator[pathlib.Path]:
  """A directory within another that vanishes when the block ends.

  Args:
    directory: Of the work.
    part: Of the work, from 0.
  """
  owner = f"{_process_space() or '0' * 8}-{os.getpid()}"
  prefix = f".unfinished-{part:04d}-{owner}-"
  work = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=directory))
  try:
    yield work
  finally:
    shutil.rmtree(work, ignore_errors=True)


def clear(directory: pathlib.Path, part: int) -> None:
  """Removes what killed processes left of a part.

  At once where this process can see that the owner is dead. Else only what is six hours
  old: the owner may live elsewhere. Its older files are open, and need no names.
  """
  for left in directory.glob(f".unfinished-{part:04d}-*"):
    with contextlib.suppress(FileNotFoundError):
      if _is_dead(left.name) or time.time() - left.stat().st_mtime > _LEFT_SECONDS:
        shutil.rmtree(left, ignore_errors=True)


def _is_dead(name: str) -> bool:
  """Whether a directory's owner was a process of this space, which has ended."""
  match = _NAME.fullmatch(name)
  if match is None or match[1] != _process_space():
    return False
  try:
    os.kill(int(match[2]), 0)
  except ProcessLookupError:
    return True
  except (PermissionError, OverflowError):
    pass
  return False


@functools.cache
def _process_space() -> str | None:
  """Names the boot of a machine and its namespace of processes; None if unknown.

  Containers of one machine have their own, and may have the same host name.
  """
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
    space = os.readlink("/proc/self/ns/pid")
  except OSError:
    return None
  return hashlib.blake2b(f"{boot} {space}".encode(), digest_size=4).hexdigest()
