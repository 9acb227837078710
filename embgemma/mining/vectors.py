"""Search with the vectors of a teacher: each distinct text embedded once, on disk."""

import array
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float, Int, UInt64

from embgemma.data.fingerprints import digest
from embgemma.data.vector_store import VectorStore
from embgemma.errors import ConfigError
from embgemma.mining import pieces
from embgemma.mining.ann import AnnIndex, AnnOptions, faiss, open_index
from embgemma.mining.corpus import Collection
from embgemma.mining.searchers import Hits, Log, Places, Search, exact_search
from embgemma.teaching.embedding import embed_missing
from embgemma.teaching.teachers import Input, Teacher

_PAIRS = 8192  # of vectors that are multiplied at a time


class CollectionVectors:
  """Vectors of a collection's queries and passages, memory-mapped.

  Args:
    store: Holds them.
    queries: [queries], rows of the store.
    passages: [passages], rows of the store; -1 where a vector is not needed.
  """

  def __init__(
    self,
    store: VectorStore,
    queries: Int[np.ndarray, " q"],
    passages: Int[np.ndarray, " p"],
  ):
    self._store = store
    self._queries = queries
    self._passages = passages

  def queries(self, which: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n W"]:
    """Vectors of queries, by number."""
    return self._gather(self._queries[which])

  def passages(self, which: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n W"]:
    """Vectors of passages, by number."""
    return self._gather(self._passages[which])

  def passage_range(self, start: int, stop: int) -> Float[np.ndarray, "n W"]:
    """Vectors of passages from one number up to another."""
    return self._gather(self._passages[start:stop])

  def _gather(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n W"]:
    return np.asarray(self._store.gather(rows), np.float32)

  def similarities(
    self, queries: Int[np.ndarray, " n"], passages: Int[np.ndarray, " n"]
  ) -> Float[np.ndarray, " n"]:
    """Inner products of pairs, a bounded number of vectors at a time."""
    out = np.empty(len(queries), np.float32)
    for start in range(0, len(queries), _PAIRS):
      part = slice(start, start + _PAIRS)
      # Queries come in runs: each is read once.
      distinct, places = np.unique(queries[part], return_inverse=True)
      own = self.queries(distinct)[places]
      out[part] = np.einsum("nw,nw->n", own, self.passages(passages[part]))
    return out

  def positives(
    self, collection: Collection, queries: Int[np.ndarray, " Q"]
  ) -> list[Float[np.ndarray, " n"]]:
    """Similarities of each query to its known positives."""
    known = [collection.positives(int(query)) for query in queries]
    counts = [len(own) for own in known]
    flat = self.similarities(np.repeat(queries, counts), np.concatenate(known))
    return np.split(flat, np.cumsum(counts)[:-1])


@dataclasses.dataclass(frozen=True)
class EmbeddedTexts:
  """Makes a teacher's vectors of collections; one store serves all of a run.

  Attributes:
    teacher: Embeds.
    dtype: Of the vectors kept, "float16" or "float32".
  """

  teacher: Teacher
  dtype: str = "float16"

  @property
  def key(self) -> str:
    """Identifies the vectors."""
    return digest([self.teacher.fingerprint, self.teacher.width, self.dtype])

  def embed(
    self,
    collection: Collection,
    kind: str | None,
    places: Places,
    log: Log,
    passages: Int[np.ndarray, " n"] | None = None,
  ) -> CollectionVectors:
    """Vectors of a collection, made unless they are there.

    Args:
      collection: Of a task.
      kind: Of the task; None is each text's own.
      places: For pieces; `own` must be of these passages.
      log: Takes lines of progress.
      passages: Those whose vectors are needed; None is all.
    """
    teacher = self.teacher
    store = VectorStore.create_or_open(
      places.shared / f"vectors-{self.key}",
      teacher.width,
      self.dtype,
      teacher.fingerprint,
    )

    def query(index: int) -> Input:
      text, own = collection.query(index)
      return teacher.query(text, kind or own)

    def document(index: int) -> Input:
      passage = collection.passage(index)
      return teacher.document(passage.text, passage.title or None, kind or passage.kind)

    needed = np.arange(collection.passages) if passages is None else passages
    keys = {}
    for role, which, make in (
      ("queries", np.arange(collection.queries), query),
      ("passages", needed, document),
    ):
      path = places.own / f"keys-{role}.npz"
      if path.is_file():
        keys[role] = pieces.load_arrays(path)["keys"]
      # A damaged segment may have been deleted since.
      if role not in keys or store.missing(keys[role]).any():
        keys[role] = _embed(store, teacher, which, make, log)
        pieces.save_arrays(path, keys=keys[role])
    rows = np.full(collection.passages, -1, np.int64)
    rows[needed] = store.locate(keys["passages"])
    return CollectionVectors(store, store.locate(keys["queries"]), rows)


def _embed(
  store: VectorStore,
  teacher: Teacher,
  which: Int[np.ndarray, " n"],
  make: Callable[[int], Input],
  log: Log,
) -> UInt64[np.ndarray, " n"]:
  """Embeds what the store lacks of some inputs; returns the keys of all."""
  keys = array.array("Q")

  def inputs() -> Iterator[Input]:
    for index in which:
      made = make(int(index))
      keys.append(made.key())
      yield made

  with store.writing(0):
    embed_missing(store, teacher, inputs(), log)
  return np.array(keys, np.uint64)


@dataclasses.dataclass(frozen=True)
class VectorSearcher:
  """Cosine of a teacher's vectors: exact, or by an ANN index of large corpora.

  Attributes:
    texts: The teacher's vectors.
    block: Passages scored at a time.
    ann_above: Passages above which an index is made.
    ann: Of that index.

  Raises:
    ConfigError: a number is out of range.
  """

  texts: EmbeddedTexts
  block: int = 4096
  ann_above: int = 2_000_000
  ann: AnnOptions = AnnOptions()

  def __post_init__(self):
    if self.block < 1 or self.ann_above < 0:
      raise ConfigError(
        "VectorSearcher needs block >= 1 and ann_above >= 0, got "
        f"{self.block}, {self.ann_above}"
      )

  @property
  def name(self) -> str:
    return self.texts.teacher.name

  @property
  def fingerprint(self) -> str:
    ann = dataclasses.astuple(self.ann)
    return digest([self.texts.key, self.block, self.ann_above, ann])

  @property
  def similarity_range(self) -> tuple[float, float]:
    return -1.0, 1.0

  def open(
    self, collection: Collection, kind: str | None, places: Places, log: Log
  ) -> Search:
    """See `Searcher.open`.

    Raises:
      ConfigError: an index is needed and faiss is not installed.
    """
    indexed = collection.passages > self.ann_above
    if indexed:
      faiss()  # before hours of embedding
    vectors = self.texts.embed(collection, kind, places, log)
    if not indexed:
      return _ExactVectorSearch(collection, vectors, self.block)
    width = self.texts.teacher.width
    index = open_index(places.own, collection.passages, width, vectors, self.ann, log)
    return _AnnVectorSearch(collection, vectors, index)


@dataclasses.dataclass(frozen=True)
class _ExactVectorSearch:
  collection: Collection
  vectors: CollectionVectors
  block: int

  def __call__(self, queries: Int[np.ndarray, " Q"], depth: int) -> Hits:
    similarities, passages = exact_search(
      self.vectors.queries(queries),
      self.collection.passages,
      self.vectors.passage_range,
      depth,
      self.block,
    )
    positives = self.vectors.positives(self.collection, queries)
    return Hits(passages, similarities, positives)


@dataclasses.dataclass(frozen=True)
class _AnnVectorSearch:
  collection: Collection
  vectors: CollectionVectors
  index: AnnIndex

  def __call__(self, queries: Int[np.ndarray, " Q"], depth: int) -> Hits:
    # Twice as many by quantised vectors, of which the exact order says the best.
    found = self.index.search(self.vectors.queries(queries), 2 * depth)
    exact = np.full(found.shape, -np.inf, np.float32)
    rows, columns = np.nonzero(found >= 0)
    exact[rows, columns] = self.vectors.similarities(
      queries[rows], found[rows, columns]
    )
    order = np.lexsort((found, -exact), axis=1)[:, :depth]
    positives = self.vectors.positives(self.collection, queries)
    passages = np.take_along_axis(found, order, 1)
    return Hits(passages, np.take_along_axis(exact, order, 1), positives)
