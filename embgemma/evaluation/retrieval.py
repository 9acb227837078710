"""Retrieval: reading judged collections, and the evaluator."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from embgemma.data.beir import collection_file, qrels_file, qrels_row
from embgemma.data.files import read_lines
from embgemma.data.jsonl import read_jsonl, string_field
from embgemma.data.prompts import TaskPrompts
from embgemma.errors import ConfigError, DataError, TrainingError
from embgemma.evaluation import metrics
from embgemma.evaluation.statistics import Sample
from embgemma.evaluation.stored_vectors import metric_key, search_kept

EncodeFn = Callable[[Sequence[str]], np.ndarray]
"""Prompted texts to float32 [N, E] vectors of unit norm, at full width."""

MATRYOSHKA_WIDTHS = (768, 512, 256, 128)
"""EmbeddingGemma's widths (Vera et al. 2025, section 2.2)."""

Rankings = Mapping[str, Sequence[str]]


@dataclasses.dataclass
class RetrievalData:
  """A judged collection.

  Attributes:
    ids: Document ids, one per document.
    texts: Document texts.
    titles: Document titles, "" where there is none.
    queries: Query id to text; only the queries that have a relevant document.
    qrels: Query id to document id to grade.
    languages: Query id to language, for the queries whose language is known.
    document_languages: Likewise of documents.
  """

  ids: list[str]
  texts: list[str]
  titles: list[str]
  queries: dict[str, str]
  qrels: dict[str, dict[str, int]]
  languages: dict[str, str] = dataclasses.field(default_factory=dict)
  document_languages: dict[str, str] = dataclasses.field(default_factory=dict)

  @classmethod
  def from_pairs(cls, pairs: Iterable[tuple[str, str, str, str]]) -> "RetrievalData":
    """Pairs as a collection: every query must find its own positive.

    The corpus is the distinct (title, positive); equal queries are one query with
    several relevant documents. Ids are "d0"… and "q0"… in order of appearance.

    Args:
      pairs: (query, title, positive, language); the last two may be "".
    """
    documents: dict[tuple[str, str], str] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    languages: dict[str, str] = {}
    for query, title, positive, language in pairs:
      document_id = documents.setdefault((title, positive), f"d{len(documents)}")
      query_id = queries.setdefault(query, f"q{len(queries)}")
      qrels.setdefault(query_id, {})[document_id] = 1
      if language:
        languages.setdefault(query_id, language)
    return cls(
      ids=list(documents.values()),
      texts=[text for _, text in documents],
      titles=[title for title, _ in documents],
      queries={identifier: text for text, identifier in queries.items()},
      qrels=qrels,
      languages=languages,
    )


def _read_qrels(
  path: str, queries: Mapping[str, str], documents: set[str]
) -> dict[str, dict[str, int]]:
  qrels: dict[str, dict[str, int]] = {}
  for number, line in read_lines(path):
    where, row = f"{path}:{number}", qrels_row(path, number, line)
    if row is None:
      continue
    query, document, grade = row
    if query not in queries:
      raise DataError(f"{where}: query {query!r} is not in the queries file; add it")
    if document not in documents:
      raise DataError(
        f"{where}: document {document!r} is not in the corpus; add it or drop the row"
      )
    if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
      raise DataError(
        f"{where}: query {query!r}, document {document!r} has two scores; keep one"
      )
  judged = {q: grades for q, grades in qrels.items() if max(grades.values()) > 0}
  if not judged:
    raise DataError(f"{path}: no query has a relevant document (score above 0)")
  return judged


def _records_by_id(path: str) -> Iterator[tuple[str, str, dict]]:
  seen: dict[str, int] = {}
  for number, record in read_jsonl(path):
    where = f"{path}:{number}"
    identifier = string_field(record, "_id", where)
    if identifier in seen:
      raise DataError(
        f"{where}: _id {identifier!r} is already on line {seen[identifier]}; "
        "ids must be unique"
      )
    seen[identifier] = number
    yield where, identifier, record


def read_beir(folder: str | pathlib.Path, split: str | None = None) -> RetrievalData:
  """Returns a collection in the layout of BEIR (Thakur et al. 2021).

  Queries without a relevant document are left out: their metrics are undefined.
  (BEIR's own loader keeps those with zero grades only and counts them as 0.)

  Args:
    folder: Holds `corpus.jsonl` {"_id", "text", "title"?, "language"?} and
      `queries.jsonl` {"_id", "text", "language"?}, plain or .gz, and `qrels.tsv` or
      `qrels/SPLIT.tsv` with a header line.
    split: The file under `qrels/`; None takes `qrels.tsv` or the only split.

  Raises:
    DataError: a missing or malformed file, several splits and none named, ids that
      repeat or that the judgements name in vain, no documents, nothing judged.
  """
  folder = pathlib.Path(folder)
  if not folder.is_dir():
    raise DataError(f"{folder}: no such folder; give a folder in the BEIR layout")
  corpus_file = collection_file(folder, "corpus.jsonl")
  query_file = collection_file(folder, "queries.jsonl")
  judgements = qrels_file(folder, split)
  ids, texts, titles = [], [], []
  of_documents = {}
  for where, identifier, record in _records_by_id(corpus_file):
    ids.append(identifier)
    texts.append(string_field(record, "text", where))
    titles.append(string_field(record, "title", where, default=""))
    of_documents[identifier] = string_field(record, "language", where, default="")
  if not ids:
    raise DataError(f"{corpus_file}: the corpus is empty; add documents")
  queries, languages = {}, {}
  for where, identifier, record in _records_by_id(query_file):
    queries[identifier] = string_field(record, "text", where)
    languages[identifier] = string_field(record, "language", where, default="")
  qrels = _read_qrels(judgements, queries, set(ids))
  return RetrievalData(
    ids,
    texts,
    titles,
    queries={q: text for q, text in queries.items() if q in qrels},
    qrels=qrels,
    languages={q: name for q, name in languages.items() if name and q in qrels},
    document_languages={d: name for d, name in of_documents.items() if name},
  )


def _pairs(path: str | pathlib.Path) -> Iterator[tuple[str, str, str, str]]:
  for number, record in read_jsonl(path):
    where = f"{path}:{number}"
    bitext = "sentence1" in record and "query" not in record
    query_key, key = ("sentence1", "sentence2") if bitext else ("query", "positive")
    yield (
      string_field(record, query_key, where),
      string_field(record, "title", where, default=""),
      string_field(record, key, where),
      string_field(record, "language", where, default=""),
    )


def read_pairs(path: str | pathlib.Path) -> RetrievalData:
  """Returns a file of pairs as a collection; see `RetrievalData.from_pairs`.

  Args:
    path: JSONL, plain or .gz: {"query", "positive", "title"?, "language"?}, or
      bitext, {"sentence1", "sentence2", "language"?}; other keys are ignored.

  Raises:
    DataError: a missing, malformed or empty file.
  """
  data = RetrievalData.from_pairs(_pairs(path))
  if not data.ids:
    raise DataError(f"{path}: no pairs; the corpus is empty")
  return data


def without_self_matches(data: RetrievalData, rankings: Rankings) -> Rankings:
  """The rankings without the document whose id is the query's own.

  BEIR does so (`ignore_identical_ids`), since in Quora and ArguAna queries are
  documents. We keep it where it is judged relevant: then the ids are equal by
  chance, as in files numbered from 0 on both sides.
  """
  return {
    query: [d for d in ranking if d != query or data.qrels[query].get(d, 0) > 0]
    for query, ranking in rankings.items()
  }


def ranking_metrics(
  data: RetrievalData,
  rankings: Rankings,
  k: int = 10,
  recall_k: int = 100,
  by_language: bool = False,
) -> dict[str, float]:
  """Means over queries of nDCG@k, MRR@k, Recall@k and Recall@recall_k, in 0..1.

  Keys are such as "ndcg@10"; by language also "ndcg@10:de".
  """
  kinds = {
    f"ndcg@{k}": functools.partial(metrics.ndcg, k=k),
    f"mrr@{k}": functools.partial(metrics.reciprocal_rank, k=k),
    f"recall@{k}": functools.partial(metrics.recall, k=k),
    f"recall@{recall_k}": functools.partial(metrics.recall, k=recall_k),
  }
  groups: dict[str, list[str]] = {"": list(data.queries)}
  if by_language:
    for query, language in data.languages.items():
      groups.setdefault(f":{language}", []).append(query)
  return {
    f"{name}{group}": float(
      np.mean([metric(rankings[q], data.qrels[q]) for q in queries])
    )
    for name, metric in kinds.items()
    for group, queries in groups.items()
  }


def check_widths(name: str, widths: Sequence[int], full: int | None = None) -> None:
  """Raises ConfigError unless widths are distinct, positive and at most the full."""
  if not widths or len(set(widths)) < len(widths) or min(widths) < 1:
    raise ConfigError(
      f"{name}: widths {tuple(widths)} must be one or more distinct positive numbers"
    )
  if full is not None and max(widths) > full:
    raise ConfigError(
      f"{name}: width {max(widths)} exceeds the embedding width {full}; "
      f"set widths of at most {full}"
    )


def encode_checked(
  encode: EncodeFn, texts: Sequence[str], name: str, widths: Sequence[int]
) -> Float[np.ndarray, "N E"]:
  """The vectors of prompted texts, as float32.

  Raises:
    ConfigError: a width exceeds E.
    TrainingError: a vector is not finite.
  """
  vectors = np.asarray(encode(texts), np.float32)
  if vectors.ndim != 2 or len(vectors) != len(texts):
    raise ValueError(f"encode gave {vectors.shape} for {len(texts)} texts")
  check_widths(name, widths, vectors.shape[1])
  bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
  if len(bad):
    raise TrainingError(
      f"{name}: the embedding of text {bad[0]} is not finite ({len(bad)} of "
      f"{len(texts)} are not); the parameters are damaged or overflow in this dtype"
    )
  return vectors


def prefix(vectors: Float[np.ndarray, "N E"], width: int) -> Float[np.ndarray, "N W"]:
  """The first `width` components at unit norm (Kusupati et al. 2022)."""
  cut = vectors[:, :width]
  norms = np.linalg.norm(cut, axis=1, keepdims=True)
  return cut / np.maximum(norms, np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class RetrievalEvaluator:
  """nDCG, MRR and recall of exact search by cosine, at each Matryoshka width.

  Attributes:
    name: The task's name in results.
    data: A collection, a folder in the BEIR layout or a JSONL file of pairs; read
      at the first `check` or `evaluate` and kept.
    prompts: The prompts of queries and documents.
    widths: Prefixes to cut; texts are embedded once for all of them.
    k: Cutoff of nDCG@k, MRR@k and Recall@k.
    recall_k: Cutoff of the second recall.
    split: The file under `qrels/` of a BEIR folder.
    by_language: Whether to add the metrics of each language's queries.
    block_size: Queries and documents scored at a time.
    vectors: Formats in which the documents are kept (`vector_formats`).
  """

  name: str
  data: RetrievalData | str | pathlib.Path
  prompts: TaskPrompts = TaskPrompts()
  widths: Sequence[int] = MATRYOSHKA_WIDTHS
  k: int = 10
  recall_k: int = 100
  split: str | None = None
  by_language: bool = False
  block_size: int = 2048
  vectors: Sequence[str] = ("float32",)

  @functools.cached_property
  def collection(self) -> RetrievalData:
    """The data, read once.

    Raises:
      DataError: see `read_beir` and `read_pairs`.
    """
    if isinstance(self.data, RetrievalData):
      return self.data
    path = pathlib.Path(self.data)
    if path.is_dir():
      return read_beir(path, self.split)
    if not path.exists():
      raise DataError(
        f"{path}: no such file or folder; give evaluation {self.name!r} a folder in "
        "the BEIR layout or a JSONL file of pairs"
      )
    if self.split is not None:
      raise ConfigError(f"{self.name}: split needs a BEIR folder, {path} is a file")
    return read_pairs(path)

  @property
  def passages(self) -> list[str]:
    """The documents with their prompts.

    Raises:
      DataError: see `collection`.
    """
    data = self.collection
    return [
      self.prompts.format_document(text, title or None)
      for text, title in zip(data.texts, data.titles, strict=True)
    ]

  def check(self) -> None:
    """Reads the data, so that a mistake shows before training starts.

    Raises:
      DataError: the data is missing or malformed.
      ConfigError: widths, cutoffs or block size cannot work.
    """
    check_widths(self.name, self.widths)
    if min(self.k, self.recall_k, self.block_size) < 1:
      raise ConfigError(f"{self.name}: k, recall_k and block_size must be positive")
    _ = self.collection

  def evaluate(self, encode: EncodeFn) -> dict[str, float]:
    """Means over the queries, in 0..1, by key such as "ndcg@10/768".

    With `by_language` also "ndcg@10:de/768"; of other `vectors` "ndcg@10 (int8)/768".

    Raises:
      DataError: the data is missing or malformed.
      ConfigError: settings that cannot work, or a width above the embedding's.
      TrainingError: an embedding is not finite.
    """
    queries, documents = self._embedded(encode)
    data = self.collection
    return {
      metric_key(key, name, width): value
      for name in self.vectors
      for width in self.widths
      for key, value in ranking_metrics(
        data,
        self._rankings(queries, documents, width, name),
        self.k,
        self.recall_k,
        self.by_language,
      ).items()
    }

  @property
  def main_metric(self) -> str:
    """What `sample` is of."""
    return f"ndcg@{self.k}"

  def sample(self, encode: EncodeFn) -> Sample:
    """nDCG@k of each query at the widest of the widths.

    Raises:
      DataError, ConfigError, TrainingError: see `evaluate`.
    """
    data, width = self.collection, max(self.widths)
    rankings = self._rankings(*self._embedded(encode), width, "float32")
    scores = [metrics.ndcg(rankings[q], data.qrels[q], self.k) for q in data.queries]
    return Sample(np.array(scores))

  def _embedded(
    self, encode: EncodeFn
  ) -> tuple[Float[np.ndarray, "Q E"], Float[np.ndarray, "N E"]]:
    """Vectors of queries and documents."""
    self.check()
    # Queries are few: a bad width fails before the corpus is embedded.
    texts = [
      self.prompts.format_query(text) for text in self.collection.queries.values()
    ]
    queries = encode_checked(encode, texts, self.name, self.widths)
    return queries, encode_checked(encode, self.passages, self.name, self.widths)

  def _rankings(
    self,
    queries: Float[np.ndarray, "Q E"],
    documents: Float[np.ndarray, "N E"],
    width: int,
    name: str,
  ) -> Rankings:
    data, depth = self.collection, max(self.k, self.recall_k)
    # One more than needed, as a self-match may drop out.
    indices = search_kept(
      prefix(queries, width), prefix(documents, width), name, depth + 1, self.block_size
    )
    rankings: Rankings = {
      query: [data.ids[i] for i in row]
      for query, row in zip(data.queries, indices, strict=True)
    }
    return without_self_matches(data, rankings)
