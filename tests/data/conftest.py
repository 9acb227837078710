import pathlib
from collections.abc import Callable, Iterable

import pytest
from etils import epath

from embgemma.data.cache import CachedTask
from embgemma.data.records import Example
from embgemma.data.task_writer import write_examples


@pytest.fixture(scope="session")
def cached() -> Callable[..., CachedTask]:
  """A complete cache of pairs."""

  def make(
    parent: pathlib.Path,
    name: str,
    examples: Iterable[Example],
    rate: float = 1.0,
    symmetric: bool = False,
  ) -> CachedTask:
    directory = parent / name
    directory.mkdir()
    statistics = write_examples(directory, examples, (99, 99, 99))
    return CachedTask(name, rate, epath.Path(directory), statistics, symmetric)

  return make
