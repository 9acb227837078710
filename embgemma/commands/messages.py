"""What commands say on stderr, and how errors of the file system end them."""

import contextlib
import sys
from collections.abc import Iterable, Iterator

from embgemma.errors import DataError


def say(line: str) -> None:
  """Prints a line of progress."""
  print(line, file=sys.stderr, flush=True)


def say_notes(notes: Iterable[str]) -> None:
  """Prints what a reader or writer of a model notes."""
  for note in notes:
    say(f"note: {note}")


@contextlib.contextmanager
def said_errors(what: str) -> Iterator[None]:
  """Has errors of the file system end in a message; what is done stays."""
  try:
    yield
  except OSError as error:
    raise DataError(
      f"{error.filename or what}: {error.strerror or error}; what is done is kept: "
      "free space or allow writing there, and run the command again"
    ) from error
