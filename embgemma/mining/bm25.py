"""BM25 over corpora larger than memory: an index a segment, scores of the whole.

bm25s makes an index in memory. So the corpus is cut into segments; each is indexed with
the statistics of all, and queries are scored segment by segment.
"""

import array
import collections
import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from embgemma.data.fingerprints import digest
from embgemma.data.records import content_hash
from embgemma.data.words import tokenize
from embgemma.errors import ConfigError
from embgemma.mining import pieces
from embgemma.mining.corpus import Collection
from embgemma.mining.searchers import Hits, Log, Places, Search


@dataclasses.dataclass(frozen=True)
class Bm25Searcher:
  """BM25 of title and text, Lucene's formula; passages that share no term are no hits.

  Terms as of `data.words.tokenize`: no stemming, no stop words.

  Attributes:
    k1: Saturation of term frequency; 0.9 and b = 0.4 are BEIR's (Thakur et al. 2021,
      section 4).
    b: Share of normalisation by length.
    segment: Passages indexed at a time: what building and searching hold.

  Raises:
    ConfigError: a value is out of range.
  """

  k1: float = 0.9
  b: float = 0.4
  segment: int = 131_072

  def __post_init__(self):
    if self.k1 <= 0 or not 0 <= self.b < 1 or self.segment < 1:
      raise ConfigError(
        "BM25 needs k1 > 0, 0 <= b < 1 and segment >= 1, got "
        f"{self.k1}, {self.b}, {self.segment}"
      )

  @property
  def name(self) -> str:
    return "bm25"

  @property
  def fingerprint(self) -> str:
    return digest(["bm25", dataclasses.astuple(self)])

  @property
  def similarity_range(self) -> tuple[float, float]:
    return 0.0, 100.0

  def open(
    self, collection: Collection, kind: str | None, places: Places, log: Log
  ) -> Search:
    """See `Searcher.open`; segments that are there are not indexed again."""
    del kind  # terms have no prompts
    starts = range(0, collection.passages, self.segment)
    directories = [places.own / f"segment-{start:012d}" for start in starts]
    missing = [d for d in directories if not d.is_dir()]
    if missing:
      terms = [places.own / f"terms-{start:012d}" for start in starts]
      for start, path in zip(starts, terms, strict=True):
        if not path.is_dir():
          stop = min(start + self.segment, collection.passages)
          _write_terms(path, collection, start, stop)
          log(f"read the terms of {stop:,} of {collection.passages:,} passages")
      statistics = _statistics(terms)
      for path, directory in zip(terms, directories, strict=True):
        if not directory.is_dir():
          self._index(path, directory, statistics)
      log(f"indexed {collection.passages:,} passages in {len(terms)} segments")
    return _Bm25Search(collection, directories, self.segment)

  def _index(
    self, terms: pathlib.Path, directory: pathlib.Path, whole: "_Statistics"
  ) -> None:
    """Makes the index of one segment, whose scores are those of the whole corpus."""
    bm25s = _bm25s()
    segment = _SegmentTerms(terms)
    own_average = len(segment.flat) / len(segment)
    with pieces.new_piece(directory) as made:
      if own_average:
        # bm25s divides lengths by the segment's own mean. Term frequency's part is
        # tf / (tf + k1 (1 - b) + k1 b length / mean): other k1 and b that give the
        # same function of length with this mean in place of the whole's.
        fixed, sloped = self.k1 * (1 - self.b), self.k1 * self.b
        sloped *= own_average / whole.average_length
        index = bm25s.BM25(
          k1=fixed + sloped,
          b=sloped / (fixed + sloped),
          method="lucene",
          backend="numpy",
        )
        index.index(segment, create_empty_token=False, show_progress=False)
        counts = np.diff(index.scores["indptr"])
        ratio = _idf(whole.frequencies(segment.vocab), whole.passages)
        ratio /= _idf(counts, len(segment))
        index.scores["data"] *= np.repeat(ratio, counts).astype(np.float32)
        index.save(made, show_progress=False)


def _idf(frequencies: Int[np.ndarray, " n"], passages: int) -> Float[np.ndarray, " n"]:
  """Lucene's (Kamphuis et al. 2020, table 1)."""
  return np.log(1 + (passages - frequencies + 0.5) / (frequencies + 0.5))


def _write_terms(
  path: pathlib.Path, collection: Collection, start: int, stop: int
) -> None:
  """Writes the terms of passages as numbers, and the vocabulary of these passages."""
  numbers: dict[str, int] = {}
  flat, offsets = array.array("i"), array.array("q", [0])
  frequencies: collections.Counter[int] = collections.Counter()
  for index in range(start, stop):
    passage = collection.passage(index)
    terms = tokenize(f"{passage.title} {passage.text}")
    own = [numbers.setdefault(term, len(numbers)) for term in terms]
    flat.extend(own)
    offsets.append(len(flat))
    frequencies.update(set(own))
  with pieces.new_piece(path) as made:
    (made / "vocabulary.json").write_text(json.dumps(list(numbers)))
    counts = [frequencies[number] for number in range(len(numbers))]
    np.save(made / "flat.npy", np.array(flat, np.int32))
    np.save(made / "offsets.npy", np.array(offsets, np.int64))
    np.save(made / "frequencies.npy", np.array(counts, np.int64))


class _SegmentTerms:
  """The terms of a segment's passages, as bm25s takes them, read as they are needed."""

  def __init__(self, path: pathlib.Path):
    terms = json.loads((path / "vocabulary.json").read_text())
    self.vocab = {term: number for number, term in enumerate(terms)}
    self.flat = pieces.map_array(path / "flat.npy")
    self._offsets = pieces.map_array(path / "offsets.npy")

  @property
  def ids(self) -> "_SegmentTerms":
    return self

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def __iter__(self) -> Iterator[list[int]]:
    for begin, end in zip(self._offsets[:-1], self._offsets[1:], strict=True):
      yield self.flat[begin:end].tolist()


@dataclasses.dataclass(frozen=True)
class _Statistics:
  """Of the whole corpus: 16 bytes a distinct term, by the term's hash."""

  passages: int
  average_length: float
  hashes: np.ndarray
  counts: np.ndarray

  def frequencies(self, vocabulary: dict[str, int]) -> Int[np.ndarray, " n"]:
    """Passages that have each term."""
    return self.counts[np.searchsorted(self.hashes, _hashes(vocabulary))]


def _hashes(terms) -> np.ndarray:
  return np.array([content_hash(term) for term in terms], np.uint64)


def _statistics(paths: list[pathlib.Path]) -> _Statistics:
  hashes, counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
  passages = tokens = 0
  for path in paths:
    segment = _SegmentTerms(path)
    passages, tokens = passages + len(segment), tokens + len(segment.flat)
    found = np.concatenate([hashes, _hashes(segment.vocab)])
    added = np.concatenate([counts, pieces.map_array(path / "frequencies.npy")])
    hashes, places = np.unique(found, return_inverse=True)
    # Sums of counts are exact in float64.
    counts = np.bincount(places, added, len(hashes)).astype(np.int64)
  return _Statistics(passages, tokens / passages, hashes, counts)


def _best(scores: Float[np.ndarray, " n"], depth: int) -> Int[np.ndarray, " k"]:
  """Places of up to `depth` highest scores above 0, best first, equal ones in order."""
  least = np.float32(0)
  if depth < len(scores):
    least = np.partition(scores, -depth)[-depth]
  found = np.flatnonzero((scores >= least) & (scores > 0))
  return found[np.argsort(-scores[found], kind="stable")[:depth]]


@dataclasses.dataclass(frozen=True)
class _Bm25Search:
  collection: Collection
  directories: list[pathlib.Path]
  segment: int

  def __call__(self, queries: Int[np.ndarray, " Q"], depth: int) -> Hits:
    terms = [tokenize(self.collection.query(int(query))[0]) for query in queries]
    known = [self.collection.positives(int(query)) for query in queries]
    positives = [np.zeros(len(own), np.float32) for own in known]
    shape = (len(queries), depth)
    best, passages = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
    for number, directory in enumerate(self.directories):
      if not any(directory.iterdir()):
        continue  # no passage of it has a term
      index, start = _load(directory), number * self.segment
      for row, own in enumerate(terms):
        scores = index.get_scores_from_ids(index.get_tokens_ids(own))
        found = _best(scores, depth)
        joined = np.concatenate([best[row], scores[found]])
        # Stable: of equal scores, those of earlier segments stay first.
        order = np.argsort(-joined, kind="stable")[:depth]
        best[row] = joined[order]
        passages[row] = np.concatenate([passages[row], start + found])[order]
        inside = (known[row] >= start) & (known[row] < start + len(scores))
        positives[row][inside] = scores[known[row][inside] - start]
    return Hits(passages, best, positives)


def _bm25s() -> Any:
  # Importing bm25s runs an operation on JAX's default device.
  import bm25s

  # It logs at level DEBUG unless it is told not to.
  logging.getLogger("bm25s").setLevel(logging.WARNING)
  return bm25s


def _load(directory: pathlib.Path) -> Any:
  return _bm25s().BM25.load(directory, mmap=True)
