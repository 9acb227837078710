"""Removal of exact and of near duplicates."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse

from embgemma.data.cleaners import Deduplicator, Example, Keys, check_side, sides
from embgemma.data.records import content_hash
from embgemma.data.words import hash_rows, ngram_hashes, normalize, word_hashes
from embgemma.errors import ConfigError
from embgemma.typing import Bool, Int, UInt32, UInt64

# Candidates are verified, so a false one costs a comparison and a missed one a
# duplicate: at the threshold itself nine in ten are found.
_LSH_WEIGHTS = (0.05, 0.95)
_SKETCHED = 4096  # shingles at a time, so that a text of megabytes fits
_VERIFIED = 1 << 14  # pairs at a time
_REACH = 256

_Alike = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ExactDuplicates(Deduplicator):
  """Drops examples whose text an earlier one has.

  Equality is that of 64-bit hashes.

  Attributes:
    on: "pair": query and positive are both the same; "query" or "positive" (with its
      title): that one is. Documents are compared by their text.
    normalized: Compare letters and digits only, in one case and after NFKC, so that
      punctuation and spacing make no difference. Set False for code.
  """

  on: str = "pair"
  normalized: bool = True

  row = "uint64"
  relation = "repeats"
  width = 1

  def __post_init__(self):
    check_side("ExactDuplicates", self.on)

  def key(self, example: Example) -> UInt64[np.ndarray, "1"]:
    texts = list(sides(example, self.on).values())
    if self.normalized:
      texts = [normalize(text) or text for text in texts]
    return np.array([content_hash("\0".join(texts))], "uint64")

  def first(self, keys: Keys) -> Int[np.ndarray, " N"]:
    hashes = np.concatenate([np.zeros(0, "uint64"), *(b[:, 0] for b in keys.blocks())])
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    begins = np.ones(len(hashes), bool)
    begins[1:] = hashes[1:] != hashes[:-1]
    first = np.empty(len(order), np.int64)
    first[order] = order[begins][np.cumsum(begins) - 1]
    return first


@dataclasses.dataclass(frozen=True)
class NearDuplicates(Deduplicator):
  """Drops examples whose text resembles an earlier one's: MinHash (extra `clean`).

  Resemblance is the Jaccard similarity of the sets of runs of words (Broder 1997). Its
  estimate from sketches of datasketch is computed for pairs that agree in a whole band
  of their sketches; datasketch chooses the bands. Examples linked by pairs, directly or
  through others, are one cluster, of which the first stays, as in Lee et al. 2022
  ("Deduplicating training data makes language models better", section 4.2 and appendix
  A; they verify by edit distance). A band's value that very many share links each to
  the 256 that follow it at most.

  Attributes:
    on: "pair": both sides resemble those of one other example, so that another question
      about the same passage stays; "query" or "positive" (with its title): that one
      does. Documents are compared by their text.
    threshold: Least similarity of duplicates.
    shingle: Words of a run; a shorter text is one run. In scripts without spaces a
      word is two characters (`words.tokenize`).
    permutations: Length of a sketch; the estimate's standard error is
      sqrt(s (1 - s) / permutations). A sketch takes 4 bytes each on disk until all is
      decided, and a pair has two.
  """

  on: str = "pair"
  threshold: float = 0.8
  shingle: int = 5
  permutations: int = 128

  row = "uint32"
  relation = "resembles"

  def __post_init__(self):
    check_side("NearDuplicates", self.on)
    if not 0.1 <= self.threshold < 1:
      raise ConfigError(
        "NearDuplicates: threshold must be at least 0.1 and below 1 (use "
        f"ExactDuplicates for 1), got {self.threshold!r}"
      )
    if self.shingle < 1:
      raise ConfigError(f"NearDuplicates: shingle must be >= 1, got {self.shingle!r}")
    if not 16 <= self.permutations <= 4096:
      raise ConfigError(
        "NearDuplicates: permutations must be between 16 and 4096, got "
        f"{self.permutations!r}"
      )

  @property
  def width(self) -> int:
    return self.permutations * self._sketches

  @property
  def _sketches(self) -> int:
    return 2 if self.on == "pair" else 1

  def check(self) -> None:
    self.bands()

  def bands(self) -> tuple[int, int]:
    """Bands, and entries of a sketch in each."""
    return _bands(self.threshold, self.permutations)

  def key(self, example: Example) -> UInt32[np.ndarray, " P"]:
    own = [
      sketch(shingles(text, self.shingle), self.permutations)
      for text in sides(example, self.on).values()
    ]
    if len(own) < self._sketches:  # a document
      own *= 2
    # Side by side, so that a band has entries of both.
    return np.stack(own, axis=1).reshape(-1)

  def first(self, keys: Keys) -> Int[np.ndarray, " N"]:
    parent = np.arange(len(keys))
    bands, rows = self.bands()
    for start in range(0, bands * rows, rows):
      # Of two sketches a band has half its entries each, so that a pair as like as the
      # threshold on both sides is found as often as a single text.
      part = slice(self._sketches * start, self._sketches * start + rows)
      parts = [hash_rows(block[:, part]) for block in keys.blocks()]
      hashes = np.concatenate([np.zeros(0, np.uint64), *parts])
      _join_band(parent, hashes, self._alike(keys))
      parent[:] = _roots(parent, parent)
    return parent

  def _alike(self, keys: Keys) -> _Alike:
    needed = math.ceil(self.threshold * self.permutations - 1e-9)

    def alike(
      left: Int[np.ndarray, " M"], right: Int[np.ndarray, " M"]
    ) -> Bool[np.ndarray, " M"]:
      equal = keys.take(left) == keys.take(right)
      sketches = equal.reshape(len(left), -1, self._sketches)
      return (np.count_nonzero(sketches, axis=1) >= needed).all(axis=1)

    return alike


def shingles(text: str, n: int) -> UInt64[np.ndarray, " N"]:
  """The uint64 hashes of a text's runs of n words; of one run if it has fewer."""
  words = word_hashes(text)
  if len(words) >= n:
    return ngram_hashes(text, n)
  if len(words):
    return hash_rows(words[None])
  return np.array([content_hash(text)], np.uint64)  # punctuation only


def sketch(hashes: UInt64[np.ndarray, " N"], length: int) -> UInt32[np.ndarray, " P"]:
  """MinHash of a set given by 64-bit hashes, uint32 [length], by datasketch."""
  minhash = _empty_sketch(length).copy()
  values = (hashes >> np.uint64(32)).astype(np.uint32)
  for start in range(0, len(values), _SKETCHED):
    minhash.update_batch(values[start : start + _SKETCHED].tolist())
  return minhash.hashvalues


def _datasketch() -> Any:
  try:
    import datasketch
  except ImportError as error:
    raise ConfigError(
      "NearDuplicates needs embgemma[clean]: pip install 'embgemma[clean]'"
    ) from error
  return datasketch


@functools.cache
def _empty_sketch(length: int) -> Any:
  # Given hashes, its own hash function has nothing to do.
  return _datasketch().MinHash(length, seed=1, hashfunc=int, scheme="affine32")


@functools.cache
def _bands(threshold: float, length: int) -> tuple[int, int]:
  lsh = _datasketch().MinHashLSH(threshold, length, weights=_LSH_WEIGHTS)
  return lsh.b, lsh.r


def _join_band(
  parent: Int[np.ndarray, " N"],
  hashes: UInt64[np.ndarray, " N"],
  alike: _Alike,
) -> None:
  """Joins the clusters of examples that agree in a band and are alike.

  Args:
    parent: The clusters, as `_join` has them; changed.
    hashes: uint64 [N], of each example's band.
    alike: Which of two lists of places are.
  """
  places = np.argsort(hashes, kind="stable")
  hashes = hashes[places]
  for distance in range(1, _REACH + 1):
    # Buckets that are one cluster already need nothing more.
    open_ = _mixed(hashes, _roots(parent, places))
    places, hashes = places[open_], hashes[open_]
    pairs = np.flatnonzero(hashes[distance:] == hashes[:-distance])
    if not len(pairs):
      return
    left, right = places[pairs], places[pairs + distance]
    apart = _roots(parent, left) != _roots(parent, right)
    left, right = left[apart], right[apart]
    for start in range(0, len(left), _VERIFIED):
      a, b = left[start : start + _VERIFIED], right[start : start + _VERIFIED]
      linked = alike(a, b)
      _join(parent, a[linked], b[linked])


def _mixed(
  hashes: UInt64[np.ndarray, " N"], roots: Int[np.ndarray, " N"]
) -> Bool[np.ndarray, " N"]:
  """Which lie in a run of equal hashes with different roots."""
  inside = hashes[1:] == hashes[:-1]
  runs = np.concatenate([np.zeros(min(1, len(hashes)), int), np.cumsum(~inside)])
  mixed = np.zeros(len(hashes), bool)
  mixed[runs[1:][inside & (roots[1:] != roots[:-1])]] = True
  return mixed[runs]


def _roots(
  parent: Int[np.ndarray, " N"], nodes: Int[np.ndarray, " M"]
) -> Int[np.ndarray, " M"]:
  """The first of each node's cluster."""
  roots = parent[nodes]
  while not np.array_equal(above := parent[roots], roots):
    roots = above
  return roots


def _join(
  parent: Int[np.ndarray, " N"],
  left: Int[np.ndarray, " M"],
  right: Int[np.ndarray, " M"],
) -> None:
  """Makes one cluster of each two; a node's parent is never after it."""
  if not len(left):
    return
  ends = _roots(parent, np.concatenate([left, right]))
  roots, ends = np.unique(ends, return_inverse=True)
  a, b = np.split(ends, 2)
  graph = sparse.coo_array((np.ones(len(a), bool), (a, b)), (len(roots), len(roots)))
  _, component = sparse.csgraph.connected_components(graph, directed=False)
  # `roots` ascend, so the first of a component is its smallest.
  _, first = np.unique(component, return_index=True)
  parent[roots] = roots[first][component]
