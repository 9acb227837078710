"""Errors that a user can mend. The command line prints them as one message."""

import contextlib
from collections.abc import Iterator


class EmbgemmaError(Exception):
  """What is wrong, where (file and line, record, parameter path) and the remedy."""


class ConfigError(EmbgemmaError):
  """A gin binding, a flag or a combination of settings that cannot work."""


class DataError(EmbgemmaError):
  """A record, file or cache that cannot be read as what it should be."""


class EmptyTextError(DataError):
  """A record whose text is empty."""


class CheckpointError(EmbgemmaError):
  """A checkpoint that is missing, damaged or of another architecture."""


class TrainingError(EmbgemmaError):
  """A run that cannot go on, such as a loss that is not finite."""


class RecipeError(EmbgemmaError):
  """A recipe of which a stage failed."""


@contextlib.contextmanager
def of_extra(what: str, extra: str) -> Iterator[None]:
  """A block that imports what an extra brings.

  Args:
    what: Needs it.
    extra: Its name.

  Raises:
    ConfigError: a package is not there.
  """
  try:
    yield
  except ModuleNotFoundError as error:
    raise ConfigError(
      f"{what} needs {error.name}: pip install 'embgemma[{extra}]'"
    ) from error
