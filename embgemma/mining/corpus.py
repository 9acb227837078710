"""What is mined of a task, on disk: records, distinct queries and distinct passages.

A collection is one file of lines (first the corpus file's, then the task's records) and
arrays of numbers about them: 8 bytes an entry, memory-mapped. Texts are read by line.
"""

import array
import dataclasses
import functools
import json
import mmap
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt64

from embgemma.data.bad_records import SkipLog
from embgemma.data.jsonl import read_jsonl, string_field
from embgemma.data.records import content_hash
from embgemma.data.task_examples import TaskExamples
from embgemma.data.words import normalize
from embgemma.errors import DataError
from embgemma.mining import pieces

_COLUMNS = ("query", "passage", "query_key", "text_key", "full_key", "label")
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # odd, 2**64 / golden ratio


def normal_key(text: str) -> int:
  """64 bits of what makes two texts the same: their letters and digits, folded.

  A text without any letter or digit keeps all its characters.
  """
  return content_hash(normalize(text) or text.strip())


def join_title(title: str, text: str) -> str:
  """A passage as one text: what identifies a titled positive in caches, too."""
  return f"{title}\n{text}" if title else text


@dataclasses.dataclass(frozen=True)
class Passage:
  """A passage; of a task whose records name their own kinds, the first record's."""

  title: str
  text: str
  kind: str | None

  @property
  def whole(self) -> str:
    """As `join_title` makes it."""
    return join_title(self.title, self.text)


@dataclasses.dataclass(frozen=True)
class Groups:
  """Lists of numbers, one list a group, end to end.

  Attributes:
    starts: int64 [G + 1].
    values: [n], sorted within each group and without repeats.
  """

  starts: np.ndarray
  values: np.ndarray

  def __getitem__(self, group: int) -> np.ndarray:
    return self.values[self.starts[group] : self.starts[group + 1]]

  @classmethod
  def of(cls, groups: Int[np.ndarray, " n"], values: np.ndarray, count: int):
    """The values of `count` groups, distinct and sorted in each."""
    order = np.lexsort((values, groups))
    groups, values = groups[order], values[order]
    new = np.ones(len(values), bool)
    new[1:] = (groups[1:] != groups[:-1]) | (values[1:] != values[:-1])
    starts = np.searchsorted(groups[new], np.arange(count + 1))
    return cls(starts.astype(np.int64), values[new])


class Collection:
  """The records, queries and passages of a task; see `build_collection`.

  Queries are distinct texts (of one kind each), passages distinct titles and texts,
  both in order of appearance. Queries with the same `normal_key` make a group: a
  positive of one is no negative of another.

  Args:
    directory: That `build_collection` made.

  Attributes:
    records: Number of them.
    queries: Number of distinct ones.
    passages: Number of distinct ones.
    record_query: int64 [records], the query of each.
    record_passage: int64 [records], the positive of each.
    query_group: int64 [queries].
    passage_text_key: uint64 [passages], `normal_key` without title.
    passage_full_key: uint64 [passages], `normal_key` with it.
    symmetric: Whether queries and positives may change places.
    skipped: Bad records that were left out.

  Raises:
    DataError: it is damaged.
  """

  def __init__(self, directory: pathlib.Path):

    def mapped(name: str) -> np.ndarray:
      return pieces.map_array(directory / f"{name}.npy")

    self.record_query = mapped("record_query")
    self.record_passage = mapped("record_passage")
    self.query_group = mapped("query_group")
    self.passage_text_key = mapped("passage_text_key")
    self.passage_full_key = mapped("passage_full_key")
    self._query_line = mapped("query_line")
    self._passage_line = mapped("passage_line")
    self._group_key = mapped("group_key")
    self._offsets = mapped("offsets")
    self._positives = Groups(mapped("positive_starts"), mapped("positives"))
    self._labels = Groups(mapped("label_starts"), mapped("labels"))
    self._labelled = mapped("labelled")
    self._pair_key = mapped("pair_key")
    self._pairs = Groups(mapped("pair_starts"), mapped("pairs"))
    self.symmetric = len(self._pair_key) > 0
    self.skipped = int(mapped("skipped")[0])
    self.records = len(self.record_query)
    self.queries = len(self._query_line)
    self.passages = len(self._passage_line)
    self._first_record = len(self._offsets) - 1 - self.records
    with open(directory / "lines.jsonl", "rb") as file:
      self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

  @functools.cached_property
  def by_query(self) -> tuple[np.ndarray, np.ndarray]:
    """Records sorted by query, and where each query's begin, int64 [queries + 1]."""
    order = np.argsort(self.record_query, kind="stable")
    starts = np.searchsorted(self.record_query[order], np.arange(self.queries + 1))
    return order, starts

  def _line(self, line: int) -> dict[str, Any]:
    begin, end = self._offsets[line : line + 2]
    return json.loads(self._lines[begin:end])

  def record(self, index: int) -> dict[str, Any]:
    """A record as its task had it."""
    return self._line(self._first_record + index)

  def query(self, index: int) -> tuple[str, str | None]:
    """Text and own kind of a query."""
    line = self._line(int(self._query_line[index]))
    return line["query"], line.get("task")

  def passage(self, index: int) -> Passage:
    """A passage."""
    line = self._line(int(self._passage_line[index]))
    text = line["positive"] if "positive" in line else line["text"]
    return Passage(line.get("title", ""), text, line.get("task"))

  def positives(self, query: int) -> Int[np.ndarray, " n"]:
    """All passages that are a positive of a query, or of one of its group; sorted."""
    return self._positives[int(self.query_group[query])]

  def same_text(
    self, query: int, passages: Int[np.ndarray, " n"]
  ) -> Bool[np.ndarray, " n"]:
    """Which passages have the normal key of a query or of one of its positives."""
    own = self.positives(query)
    keys = np.concatenate(
      [
        self._group_key[self.query_group[query], None],
        self.passage_text_key[own],
        self.passage_full_key[own],
      ]
    )
    return np.isin(self.passage_text_key[passages], keys) | np.isin(
      self.passage_full_key[passages], keys
    )

  def paired(
    self, query: int, positive: int, passages: Int[np.ndarray, " n"]
  ) -> Bool[np.ndarray, " n"]:
    """Which passages make a known pair with a query or with one positive of it.

    Of a symmetric task, whose pairs hold in both directions; none of another.
    """
    own = [
      self._group_key[self.query_group[query]],
      self.passage_text_key[positive],
      self.passage_full_key[positive],
    ]
    known = [np.zeros(0, np.uint64)]
    for key in own:
      place = int(np.searchsorted(self._pair_key, key))
      if place < len(self._pair_key) and self._pair_key[place] == key:
        known.append(self._pairs[place])
    keys = np.concatenate(known)
    return np.isin(self.passage_text_key[passages], keys) | np.isin(
      self.passage_full_key[passages], keys
    )

  def same_label(
    self, query: int, passages: Int[np.ndarray, " n"]
  ) -> Bool[np.ndarray, " n"]:
    """Which passages are a positive somewhere with a label that the query has."""
    found = np.zeros(len(passages), bool)
    for label in self._labels[int(self.query_group[query])]:
      keys = _labelled(passages, label[None])
      places = np.searchsorted(self._labelled, keys)
      inside = places < len(self._labelled)
      found[inside] |= self._labelled[places[inside]] == keys[inside]
    return found


def _labelled(passages: np.ndarray, labels: np.ndarray) -> UInt64[np.ndarray, " n"]:
  return passages.astype(np.uint64) * _SPREAD ^ labels


class _Writer:
  """Writes lines, and numbers about them."""

  def __init__(self, path: pathlib.Path):
    self._file = open(path, "wb")  # noqa: SIM115
    self.offsets = array.array("q", [0])
    self.columns = {name: array.array("Q") for name in _COLUMNS}

  def close(self) -> None:
    self._file.close()

  def add(self, line: dict[str, Any], title: str, text: str, query: str = "") -> None:
    kept = {key: value for key, value in line.items() if value}
    data = json.dumps(kept, ensure_ascii=False).encode() + b"\n"
    self._file.write(data)
    self.offsets.append(self.offsets[-1] + len(data))
    label, text_key = line.get("label"), normal_key(text)
    values = {
      # Lengths keep ("a", "bc") and ("ab", "c") apart.
      "query": content_hash(f"{line.get('task') or ''}\n{query}") if query else 0,
      "passage": content_hash(f"{len(title)}\n{title}{text}"),
      "query_key": normal_key(query) if query else 0,
      "text_key": text_key,
      "full_key": normal_key(join_title(title, text)) if title else text_key,
      "label": content_hash(label) if label else 0,
    }
    for name, value in values.items():
      self.columns[name].append(value)


def read_corpus(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
  """Passages of a JSONL file: {"text", "title"?}, as in BEIR's corpus.jsonl.

  Raises:
    DataError: a malformed line, or one without text.
  """
  for number, record in read_jsonl(path):
    where = f"{path}:{number}"
    text = string_field(record, "text", where)
    title = string_field(record, "title", where, default="")
    # BEIR's collections have passages without text: they answer nothing.
    if text.strip():
      yield {"title": title, "text": text}


def build_collection(
  directory: pathlib.Path, task: TaskExamples, corpus: Sequence[str]
) -> Collection:
  """The collection of a task, made unless it is there.

  The passages are those of the corpus files, then the task's positives that they lack.
  Building holds about 200 bytes a line, and no text.

  Args:
    directory: Where it is kept.
    task: Whose records are read.
    corpus: Files, see `read_corpus`; none makes the positives the corpus.

  Raises:
    DataError: a bad record or file, or a task without records.
  """
  if not directory.is_dir():
    with pieces.new_piece(directory) as made:
      writer = _Writer(made / "lines.jsonl")
      try:
        first, skipped = _write_lines(writer, task, corpus)
      finally:
        writer.close()
      arrays = _arrays(writer, first) | {"skipped": np.array([skipped.count])}
      arrays |= _pairs(writer, first, task.symmetric)
      for name, values in arrays.items():
        np.save(made / f"{name}.npy", values)
  return Collection(directory)


def _write_lines(
  writer: _Writer, task: TaskExamples, corpus: Iterable[str]
) -> tuple[int, SkipLog]:
  """Writes all lines; returns which is the first record, and what was left out."""
  for path in corpus:
    for line in read_corpus(path):
      writer.add(line, line["title"], line["text"])
  first, skipped = len(writer.offsets) - 1, SkipLog()
  for shard in range(task.num_shards):
    for example in task.examples(shard, skipped):
      writer.add(example, example["title"], example["positive"], example["query"])
  if len(writer.offsets) - 1 == first:
    raise DataError(f"task {task.name!r} has no examples; nothing can be mined")
  return first, skipped


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """First places of the distinct values in order of appearance; which each is."""
  _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
  order = np.argsort(first)
  rank = np.empty(len(order), np.int64)
  rank[order] = np.arange(len(order))
  return first[order].astype(np.int64), rank[inverse]


def _arrays(writer: _Writer, first: int) -> dict[str, np.ndarray]:
  columns = {name: np.array(c, np.uint64) for name, c in writer.columns.items()}
  records = slice(first, None)
  passage_line, passages = _distinct(columns["passage"])
  query_first, record_query = _distinct(columns["query"][records])
  group_first, record_group = _distinct(columns["query_key"][records])
  own, labels = passages[records], columns["label"][records]
  positives = Groups.of(record_group, own, len(group_first))
  known = labels != 0
  by_group = Groups.of(record_group[known], labels[known], len(group_first))
  return {
    "offsets": np.array(writer.offsets, np.int64),
    "record_query": record_query,
    "record_passage": own,
    "query_line": query_first + first,
    "query_group": record_group[query_first],
    "group_key": columns["query_key"][records][group_first],
    "passage_line": passage_line,
    "passage_text_key": columns["text_key"][passage_line],
    "passage_full_key": columns["full_key"][passage_line],
    "positive_starts": positives.starts,
    "positives": positives.values,
    "label_starts": by_group.starts,
    "labels": by_group.values,
    "labelled": np.unique(_labelled(own[known], labels[known])),
  }


def _pairs(writer: _Writer, first: int, symmetric: bool) -> dict[str, np.ndarray]:
  """By the key of a text of a symmetric task, the keys of those it makes pairs with."""
  records = slice(first, None if symmetric else first)
  query, text, full = (
    np.array(writer.columns[name], np.uint64)[records]
    for name in ("query_key", "text_key", "full_key")
  )
  keys, which = np.unique(
    np.concatenate([query, query, text, full]), return_inverse=True
  )
  pairs = Groups.of(which, np.concatenate([text, full, query, query]), len(keys))
  return {"pair_key": keys, "pair_starts": pairs.starts, "pairs": pairs.values}
