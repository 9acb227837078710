"""Removal of examples that evaluations are made of."""

import dataclasses
import functools
import glob
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from embgemma.data import beir
from embgemma.data.cleaners import Example, Filter, sides
from embgemma.data.files import fingerprint, match, read_lines
from embgemma.data.jsonl import read_jsonl, string_field
from embgemma.data.records import content_hash
from embgemma.data.words import ngram_hashes, normalize, word_hashes
from embgemma.errors import ConfigError, DataError
from embgemma.typing import UInt64

_DOCUMENTS = ("none", "relevant", "all")
_FIELDS = ("query", "positive", "text", "sentence1", "sentence2")


@dataclasses.dataclass(frozen=True)
class Decontamination(Filter):
  """Drops examples of which a query, positive or document is in an evaluation set.

  It is there if its letters and digits are those of a text of the set, or if the two
  have a run of `ngram` words in common. The latter is the procedure of GPT-3 (Brown et
  al. 2020, appendix C), with departures: it cuts 200 characters around a run out of a
  document, where an example is dropped here; it lets runs pass that many documents
  have; and it compares shorter texts as runs of 8 words and more, which here count as
  a whole. Titles and negatives are not looked at.

  Attributes:
    against: Name to path of evaluation sets. A folder is in the layout of BEIR: the
      queries that any split but "train" judges. A file is JSONL, plain or .gz, with
      one or more of query, positive, text, sentence1 and sentence2.
    ngram: Words of a run (`words.tokenize`). 13 is GPT-3's.
    least_words: Texts of evaluations with fewer are left alone: a label, a name.
    documents: Of a BEIR folder's corpus: "none", "relevant" (those that a judgement
      above 0 names) or "all". Training on a set's own training split shares its
      corpus, so that "all" would leave little.
  """

  against: Mapping[str, str]
  ngram: int = 13
  least_words: int = 3
  documents: str = "none"

  def __post_init__(self):
    if not self.against:
      raise ConfigError(
        "Decontamination: nothing to compare with; give against = {'name': 'path'}"
      )
    for name, least in (("ngram", 2), ("least_words", 1)):
      if getattr(self, name) < least:
        raise ConfigError(
          f"Decontamination: {name} must be >= {least}, got {getattr(self, name)!r}"
        )
    if self.documents not in _DOCUMENTS:
      raise ConfigError(
        f"Decontamination: documents must be one of {_DOCUMENTS}, got "
        f"{self.documents!r}"
      )

  def fingerprint(self) -> list[Any]:
    files = [
      [name, [fingerprint(file) for file in _files(path)]]
      for name, path in self.against.items()
    ]
    return [self.name, self.ngram, self.least_words, self.documents, files]

  def check(self) -> None:
    self.fingerprint()

  def fault(self, example: Example) -> str | None:
    against = tuple(self.against.items())
    known = _evaluations(against, self.ngram, self.least_words, self.documents)
    pair = {**example, "title": ""}
    for side, text in sides(pair, "pair").items():
      if (name := known.texts.owner(_whole(text))) is not None:
        return f"{side} is a text of {name}"
      if (name := known.runs.owner(ngram_hashes(text, self.ngram))) is not None:
        return f"{side} has {self.ngram} words in a row of {name}"
    return None


@dataclasses.dataclass(frozen=True)
class _Owners:
  """Hashes, and which evaluation each is of.

  Attributes:
    hashes: uint64, ascending, distinct.
    numbers: Of each, into `names`.
    names: Of evaluations.
  """

  hashes: np.ndarray
  numbers: np.ndarray
  names: tuple[str, ...]

  def owner(self, hashes: UInt64[np.ndarray, " N"]) -> str | None:
    """The evaluation of the first hash that is known."""
    if not len(self.hashes):
      return None
    places = np.searchsorted(self.hashes, hashes)
    places = np.minimum(places, len(self.hashes) - 1)
    found = np.flatnonzero(self.hashes[places] == hashes)
    return self.names[self.numbers[places[found[0]]]] if len(found) else None


@dataclasses.dataclass(frozen=True)
class _Evaluations:
  texts: _Owners
  runs: _Owners


def _whole(text: str) -> np.ndarray:
  return np.array([content_hash(normalize(text))], np.uint64)


# Read once in a process; a cleaner that goes to workers takes no index along.
@functools.lru_cache(maxsize=2)
def _evaluations(
  against: tuple[tuple[str, str], ...], ngram: int, least_words: int, documents: str
) -> _Evaluations:
  names = tuple(name for name, _ in against)
  wholes: list[np.ndarray] = []
  runs: list[np.ndarray] = []
  for _, path in against:
    own = [_hashed(text, ngram, least_words) for text in _texts(path, documents)]
    if not own:
      raise DataError(f"{path}: holds no text to compare with; drop it from `against`")
    wholes.append(np.concatenate([whole for whole, _ in own]))
    runs.append(np.concatenate([run for _, run in own]))
  return _Evaluations(_owners(wholes, names), _owners(runs, names))


def _hashed(text: str, ngram: int, least_words: int) -> tuple[np.ndarray, np.ndarray]:
  """The hashes of a text as a whole, and of its runs; none of one too short."""
  if len(word_hashes(text)) < least_words:
    return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
  return _whole(text), ngram_hashes(text, ngram)


def _owners(hashes: list[np.ndarray], names: tuple[str, ...]) -> _Owners:
  numbers = np.repeat(np.arange(len(hashes), dtype=np.uint16), [len(h) for h in hashes])
  distinct, first = np.unique(np.concatenate(hashes), return_index=True)
  return _Owners(distinct, numbers[first], names)


def _texts(path: str, documents: str) -> Iterator[str]:
  if epath.Path(path).is_dir():
    yield from _beir_texts(path, documents)
    return
  for number, record in read_jsonl(path):
    where = f"{path}:{number}"
    fields = [field for field in _FIELDS if field in record]
    if not fields:
      raise DataError(
        f"{where}: has none of {', '.join(_FIELDS)}; the record has {sorted(record)}"
      )
    for field in fields:
      yield string_field(record, field, where)


def _beir_texts(folder: str, documents: str) -> Iterator[str]:
  queries, relevant = set(), set()
  for path in _qrels(folder):
    for number, line in read_lines(path):
      row = beir.qrels_row(path, number, line)
      if row is not None:
        queries.add(row[0])
        if row[2] > 0:
          relevant.add(row[1])
  yield from _selected(beir.collection_file(folder, "queries.jsonl"), queries)
  if documents != "none":
    corpus = beir.collection_file(folder, "corpus.jsonl")
    yield from _selected(corpus, relevant if documents == "relevant" else None)


def _selected(path: str, ids: set[str] | None) -> Iterator[str]:
  for number, record in read_jsonl(path):
    where = f"{path}:{number}"
    if ids is None or string_field(record, "_id", where) in ids:
      yield string_field(record, "text", where)


def _files(path: str) -> list[str]:
  """The files of an evaluation set, a corpus whether it is read or not.

  Raises:
    DataError: one is missing.
  """
  if epath.Path(path).is_dir():
    names = ("queries.jsonl", "corpus.jsonl")
    return [*(beir.collection_file(path, name) for name in names), *_qrels(path)]
  if not match(path):
    raise DataError(
      f"{path}: no such file or BEIR folder; check Decontamination.against"
    )
  return [path]


def _qrels(folder: str) -> list[str]:
  """Judgements: of all splits but the training split."""
  root = glob.escape(folder)
  if single := match(f"{root}/qrels.tsv"):
    return single
  splits = match(f"{root}/qrels/*.tsv")
  if evaluated := [path for path in splits if not path.endswith("/train.tsv")]:
    return evaluated
  raise DataError(
    f"{folder}: no qrels.tsv and no qrels/*.tsv but train; the judgements say which "
    "queries are evaluated"
  )
