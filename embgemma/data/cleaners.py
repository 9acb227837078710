"""What leaves examples out of a task: the two kinds of cleaners, and their keys."""

import abc
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from embgemma.errors import ConfigError
from embgemma.typing import Int, Shaped

Example = Mapping[str, Any]

SIDES = ("pair", "query", "positive")
_BLOCK = 1 << 14  # keys read at a time
_OPEN_FILES = 128  # of keys; a task may have more shards than a process may have files


@dataclasses.dataclass(frozen=True)
class Cleaner:
  """A `Filter` or a `Deduplicator`: frozen and picklable, for gin and for workers."""

  @property
  def name(self) -> str:
    return type(self).__name__

  def fingerprint(self) -> list[Any]:
    """What its decisions depend on beside the examples, as JSON."""
    return [self.name, dataclasses.asdict(self)]

  def check(self) -> None:
    """Refuses, before anything is read, what cannot work.

    Raises:
      ConfigError: a setting or an extra that is missing.
      DataError: a file that is missing.
    """
    return


class Filter(Cleaner, abc.ABC):
  """Judges an example alone."""

  @abc.abstractmethod
  def fault(self, example: Example) -> str | None:
    """Why an example is dropped, one of a few phrases; None keeps it."""


class Deduplicator(Cleaner, abc.ABC):
  """Needs the keys of all examples; of those alike the first stays."""

  row: ClassVar[str]  # numpy's type of an entry of a key
  relation: ClassVar[str]  # of what is dropped to what stays

  @property
  @abc.abstractmethod
  def width(self) -> int:
    """Entries of a key."""

  @abc.abstractmethod
  def key(self, example: Example) -> Shaped[np.ndarray, " K"]:
    """What examples are compared by: K entries of type `row`."""

  @abc.abstractmethod
  def first(self, keys: "Keys") -> Int[np.ndarray, " N"]:
    """The place of the first key alike of each of N in order; its own if it stays."""


class Keys:
  """Keys on disk, in the order of the examples.

  Args:
    paths: Files of keys, those of the source's shards in order.
    counts: Keys in each.
    shape: Type and width of a key.
    rows: int64 [N], places in the files laid end to end of the keys asked for.
  """

  def __init__(
    self,
    paths: Sequence[pathlib.Path],
    counts: Sequence[int],
    shape: tuple[str, int],
    rows: Int[np.ndarray, " N"],
  ):
    self._paths = list(paths)
    self._starts = np.cumsum([0, *counts])
    self._dtype, self._width = np.dtype(shape[0]), shape[1]
    self._rows = rows
    self._open = functools.lru_cache(maxsize=_OPEN_FILES)(self._map)

  def __len__(self) -> int:
    return len(self._rows)

  def _map(self, part: int) -> np.ndarray:
    count = self._starts[part + 1] - self._starts[part]
    return np.memmap(
      self._paths[part], self._dtype, mode="r", shape=(int(count), self._width)
    )

  def take(self, places: Int[np.ndarray, " M"]) -> Shaped[np.ndarray, "M K"]:
    """The keys at these places."""
    rows = self._rows[places]
    parts = np.searchsorted(self._starts, rows, side="right") - 1
    out = np.empty((len(rows), self._width), self._dtype)
    for part in np.unique(parts):
      own = parts == part
      out[own] = self._open(int(part))[rows[own] - self._starts[part]]
    return out

  def blocks(self) -> Iterator[np.ndarray]:
    """All keys in order, [up to 16,384, width] at a time."""
    for start in range(0, len(self), _BLOCK):
      yield self.take(np.arange(start, min(start + _BLOCK, len(self))))


def check_side(name: str, on: str) -> None:
  """Refuses a side that pairs do not have.

  Raises:
    ConfigError: it is none of `SIDES`.
  """
  if on not in SIDES:
    raise ConfigError(f"{name}: on must be one of {SIDES}, got {on!r}")


def sides(example: Example, on: str) -> dict[str, str]:
  """The texts that a cleaner looks at, by name: a document's own, whatever `on` is.

  A positive has its title in front. Negatives are not looked at: they serve other
  queries as positives, or nobody.
  """
  if "text" in example:
    return {"text": example["text"]}
  texts = {}
  if on != "positive":
    texts["query"] = example["query"]
  if on != "query":
    title = example.get("title")
    texts["positive"] = (
      f"{title}\n{example['positive']}" if title else example["positive"]
    )
  return texts
