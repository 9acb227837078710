"""What a store lacks, embedded window by window."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from embgemma.data.vector_store import VectorStore, check_vectors, have_directions
from embgemma.errors import DataError
from embgemma.teaching.teachers import Input, PartlyEncodedError, Teacher
from embgemma.typing import Float

_LOOKED_UP = 4096  # inputs whose keys are looked up together
# Groups and windows also end here: long texts take no more memory than short ones.
_GROUP_CHARACTERS = 1 << 24
_WINDOW_CHARACTERS = 1 << 27
_LOG_SECONDS = 10
_SHOWN = 60  # first characters of a text in a message


def embed_missing(
  store: VectorStore,
  teacher: Teacher,
  inputs: Iterable[Input],
  log: Callable[[str], None],
  shard: tuple[int, int] = (0, 1),
) -> int:
  """Embeds each distinct input that the store lacks, once; returns how many.

  Inputs are read as they are needed, and a window is kept before the next is begun:
  what was kept when this is killed is skipped the next time.

  Args:
    store: Of the teacher.
    teacher: That embeds.
    inputs: Any number, with repetitions.
    log: Takes lines of progress.
    shard: (i, n): embeds only inputs whose key is i modulo n.

  Raises:
    DataError: the teacher failed, or gave what is no vector of its width. Earlier
      windows are kept, and of this one the vectors that the teacher gave.
  """
  index, count = shard
  windows = _Windows(store, teacher, log, index)
  for group in _groups(inputs):
    own = {
      key: each
      for each in group
      if (key := each.key()) % count == index and key not in windows.waiting
    }
    keys = np.fromiter(own, np.uint64, len(own))
    for key in keys[store.missing(keys)].tolist():
      windows.take(key, own[key])
  windows.keep()
  return windows.embedded


def _groups(inputs: Iterable[Input]) -> Iterator[list[Input]]:
  group: list[Input] = []
  characters = 0
  for each in inputs:
    group.append(each)
    characters += len(each.text)
    if len(group) == _LOOKED_UP or characters >= _GROUP_CHARACTERS:
      yield group
      group, characters = [], 0
  if group:
    yield group


class _Windows:
  """Gathers inputs to windows and keeps their vectors.

  Attributes:
    waiting: Inputs of the window that is being gathered, by key.
    embedded: Inputs whose vectors were kept.
  """

  def __init__(
    self,
    store: VectorStore,
    teacher: Teacher,
    log: Callable[[str], None],
    part: int,
  ):
    self._store, self._teacher, self._log, self._part = store, teacher, log, part
    self.waiting: dict[int, Input] = {}
    self.embedded = 0
    self._characters = 0
    self._began = self._logged = time.monotonic()

  def take(self, key: int, each: Input) -> None:
    """Gathers an input that neither the store nor the window has."""
    self.waiting[key] = each
    self._characters += len(each.text)
    full = len(self.waiting) >= self._teacher.window
    if full or self._characters >= _WINDOW_CHARACTERS:
      self.keep()

  def keep(self) -> None:
    """Embeds the window, and keeps it.

    Raises:
      DataError: see `embed_missing`.
    """
    if not self.waiting:
      return
    window = list(self.waiting.values())
    try:
      vectors = self._vectors(window)
    except DataError as error:
      if isinstance(error, PartlyEncodedError):
        sound = np.flatnonzero(have_directions(error.vectors))
        self._add([error.places[i] for i in sound], error.vectors[sound])
      raise DataError(
        f"{error}. The {self.embedded:,} texts embedded before are kept: the same "
        "command goes on from there"
      ) from error
    self._add(range(len(window)), vectors)
    self.waiting, self._characters = {}, 0
    now = time.monotonic()
    if now - self._logged >= _LOG_SECONDS:
      rate = self.embedded / (now - self._began)
      self._log(
        f"{self._teacher.name}: {self.embedded:,} texts embedded, {rate:,.0f} a second"
      )
      self._logged = now

  def _add(self, places: Sequence[int], vectors: Float[np.ndarray, "n W"]) -> None:
    keys = np.fromiter(self.waiting, np.uint64, len(self.waiting))
    self._store.add(keys[list(places)], vectors, self._part)
    self.embedded += len(places)

  def _vectors(self, window: Sequence[Input]) -> Float[np.ndarray, "N W"]:
    teacher, first = self._teacher, self.embedded

    def describe(number: int) -> str:
      return (
        f"teacher {teacher.name}: the vector of text {first + number}, which begins "
        f"{window[number].text[:_SHOWN]!r},"
      )

    vectors = teacher.encode(window)
    if len(vectors) != len(window):
      raise DataError(
        f"teacher {teacher.name}: {len(vectors)} vectors for {len(window)} texts, of "
        f"which text {first} begins {window[0].text[:_SHOWN]!r}"
      )
    try:
      check_vectors(vectors, teacher.width, describe)
    except DataError as error:
      if vectors.shape[1] != teacher.width:
        raise
      # The others may have cost money.
      raise PartlyEncodedError(str(error), range(len(window)), vectors) from error
    return vectors
