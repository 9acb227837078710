"""Hard negatives for the tasks of a run: searched, filtered, written as JSONL.

All that takes time is done in pieces (`pieces`): texts embedded, blocks of queries
searched, blocks of examples chosen. What is held in memory is a block of queries and of
passages, and some numbers an entry; texts and vectors stay on disk.
"""

import collections
import dataclasses
import gzip
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from embgemma.data.config import DataConfig
from embgemma.data.fingerprints import digest
from embgemma.data.records import content_hash
from embgemma.data.task_examples import TaskExamples, open_tasks
from embgemma.data.tokenization import passages
from embgemma.errors import ConfigError, DataError
from embgemma.mining import corpus, pieces, report
from embgemma.mining.corpus import Collection
from embgemma.mining.filters import Candidates, MiningOptions, select
from embgemma.mining.searchers import Hits, Log, Places, Searcher
from embgemma.mining.vectors import CollectionVectors, EmbeddedTexts, VectorSearcher
from embgemma.mining.workspace import Workspace, open_workspace, write_json
from embgemma.outputs import new_path
from embgemma.teaching.teachers import Teacher

_FORMAT = 2  # of pieces and results
# Of `MiningOptions`: what a search depends on, and what only says where things are.
_SEARCH_OPTIONS = ("depth", "query_block")
_ELSEWHERE = ("corpus",)


def mine(
  config: DataConfig,
  searcher: Searcher,
  judge: Teacher | None,
  options: MiningOptions,
  output: pathlib.Path,
  log: Log,
  overwrite: bool = False,
  keep_work: bool = False,
) -> report.MiningReport:
  """Mines negatives for all tasks of a run; returns what was found.

  Writes OUTPUT/TASK.jsonl.gz (examples in their order with "negatives"), tasks.gin
  (TASKS are these files) and report.json. A run that was killed goes on where it
  was and writes the same bytes; one that is done is not done again.

  Args:
    config: The run, whose tasks' examples are mined for before any cleaning.
    searcher: Finds passages.
    judge: Gives the similarities that the rules compare; None is the searcher.
    options: The rules.
    output: The directory; see `open_workspace`.
    log: Takes lines of progress.
    overwrite: Whether another run's results there may be replaced.
    keep_work: Whether OUTPUT/.work stays: vectors and indexes, for other options.

  Raises:
    ConfigError: the run has documents or tasks whose names make one file's, or an
      extra is missing.
    DataError: a bad record, a corpus file that cannot be read, or an output that is
      not free.
  """
  if config.content != "pairs":
    raise ConfigError("mining needs queries and positives, and these tasks have none")
  tasks = open_tasks(config)
  _check_names(tasks)
  runs = [_TaskRun(task, config, searcher, judge, options, log) for task in tasks]
  fingerprint = digest([run.key for run in runs])
  with open_workspace(output, fingerprint, overwrite) as workspace:
    if workspace.finished is not None:
      log(f"{output} is done already")
      found = report.MiningReport.of_json(workspace.finished)
    else:
      results = {run.file: run.finish(workspace, keep_work) for run in runs}
      judged = None if judge is None else judge.name
      found = report.MiningReport(fingerprint, searcher.name, judged, results)
      _publish(workspace, runs, found)
    if not keep_work:
      workspace.clear()
  return found


def _file_name(task: str) -> str:
  """A task's name as JSONL_TASKS takes it."""
  return re.sub(r"[^\w.]", "_", task)


def _check_names(tasks: Sequence[TaskExamples]) -> None:
  named: dict[str, str] = {}
  for task in tasks:
    other = named.setdefault(_file_name(task.name), task.name)
    if other != task.name:
      raise ConfigError(
        f"tasks {other!r} and {task.name!r} would both be written as "
        f"{_file_name(task.name)!r}; rename one, or mine them one by one"
      )


def _publish(
  workspace: Workspace, runs: Sequence["_TaskRun"], found: report.MiningReport
) -> None:
  """Moves what is finished to the output."""
  files = {run.output: workspace.staged(run.staged) for run in runs}
  entries = []
  for run in runs:
    task, path = run.task, workspace.output.resolve() / run.output
    entry: dict[str, Any] = {"path": str(path), "kind": task.kind, "rate": task.rate}
    entry |= {"symmetric": task.symmetric, "unique_ids": task.unique_ids}
    kept = {name: value for name, value in entry.items() if value}
    entries.append(f"  {run.file!r}: {kept!r},\n")
  files["tasks.gin"] = workspace.staged("tasks.gin")
  with new_path(files["tasks.gin"]) as made:
    # Whatever the run's tasks were made by: a mixture's functions, or modules.
    made.write_text(
      f"JSONL_TASKS = {{\n{''.join(entries)}}}\nTASKS = @jsonl_tasks()\nMODULES = ()\n"
    )
  workspace.publish(files, found.as_json())


def _corpus_key(path: str) -> list[Any]:
  try:
    stat = os.stat(path)
  except OSError as error:
    raise DataError(
      f'{path}: no such corpus file; give JSONL of {{"text", "title"?}}'
    ) from error
  return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]


class _TaskRun:
  """Mining of one task.

  Args:
    See `mine`.

  Attributes:
    task: As given.
    key: Identifies its results.
    file: Name of its file, without suffixes.
    output: Its file.
    staged: The file's name until the run is done.
  """

  def __init__(
    self,
    task: TaskExamples,
    config: DataConfig,
    searcher: Searcher,
    judge: Teacher | None,
    options: MiningOptions,
    log: Log,
  ):
    self.task, self._options = task, options
    self._searcher, self._log = searcher, log
    self.file = _file_name(task.name)
    self._judge = None if judge is None else EmbeddedTexts(judge)
    if (
      self._judge is not None
      and isinstance(searcher, VectorSearcher)
      and searcher.texts.teacher.fingerprint == self._judge.teacher.fingerprint
    ):
      self._judge = None  # the searcher's similarities are the judge's
    self._corpus = options.corpus_files(task.name)
    own = dataclasses.asdict(options)
    searched = [own.pop(name) for name in _SEARCH_OPTIONS]
    for name in _ELSEWHERE:
      del own[name]
    self._texts_key = digest(
      [
        _FORMAT,
        config.task_fingerprint(task.name),
        task.symmetric,
        [_corpus_key(path) for path in self._corpus],
      ]
    )
    self._hits_key = digest(searched)
    self._chosen_key = digest([own, None if self._judge is None else self._judge.key])
    self.key = digest(
      [
        [task.name, task.kind, task.rate, task.symmetric, task.unique_ids],
        [self._texts_key, searcher.fingerprint, self._hits_key, self._chosen_key],
      ]
    )
    self.output = f"{self.file}.jsonl.gz"
    self.staged = f"{self.file}-{self.key}.jsonl.gz"
    self._depths = report.recall_depths(options.depth)
    self._range = (-1.0, 1.0) if self._judge else searcher.similarity_range

  def finish(self, workspace: Workspace, keep_work: bool) -> dict[str, Any]:
    """Makes the task's file, unless it is there; returns its part of the report."""
    done = workspace.staged(f"{self.file}-{self.key}.json")
    work = workspace.work / "tasks" / f"{self.file}-{self._texts_key}"
    if not done.is_file():
      result = self._run(Places(work, workspace.work), workspace)
      write_json(done, result)
    if not keep_work:
      shutil.rmtree(work, ignore_errors=True)
    return json.loads(done.read_text())

  def _run(self, places: Places, workspace: Workspace) -> dict[str, Any]:
    began = time.monotonic()
    collection = corpus.build_collection(
      places.own / "collection", self.task, self._corpus
    )
    self._say(
      f"{collection.records:,} examples, {collection.queries:,} queries, "
      f"{collection.passages:,} passages"
    )
    index = places.own / f"search-{self._searcher.fingerprint}"
    hits = _HitFiles(index / f"hits-{self._hits_key}")
    self._search(collection, Places(index, places.shared), hits)
    chosen = hits.directory / f"chosen-{self._chosen_key}"
    totals = self._choose(collection, Places(chosen, places.shared), hits)
    self._write(collection, chosen, workspace.staged(self.staged))
    return {
      "examples": collection.records,
      "queries": collection.queries,
      "passages": collection.passages,
      "skipped": collection.skipped,
      **report.summary(totals, self._depths, self._range),
      "seconds": round(time.monotonic() - began, 3),
    }

  def _say(self, line: str) -> None:
    self._log(f"{self.task.name}: {line}")

  def _blocks(self, collection: Collection) -> Iterator[Int[np.ndarray, " Q"]]:
    for start in range(0, collection.queries, self._options.query_block):
      stop = min(start + self._options.query_block, collection.queries)
      yield np.arange(start, stop)

  def _search(self, collection: Collection, places: Places, hits: "_HitFiles") -> None:
    """Searches the blocks of queries that have not been."""
    search = None
    for queries in self._blocks(collection):
      if hits.has(queries):
        continue
      if search is None:
        search = self._searcher.open(collection, self.task.kind, places, self._log)
      hits.write(queries, search(queries, self._options.depth))
      self._say(f"searched {queries[-1] + 1:,} of {collection.queries:,} queries")

  def _choose(
    self, collection: Collection, places: Places, hits: "_HitFiles"
  ) -> dict[str, np.ndarray]:
    """Chooses negatives in blocks; returns the sums of their tallies."""
    vectors = None
    totals: collections.defaultdict[str, Any] = collections.defaultdict(int)
    for queries in self._blocks(collection):
      path = _block_path(places.own, queries)
      if not path.is_file():
        if self._judge is not None and vectors is None:
          needed = self._judged(collection, hits)
          vectors = self._judge.embed(
            collection, self.task.kind, places, self._log, needed
          )
        found = hits.read(collection, queries)
        if vectors is not None:
          found = _judged_hits(collection, queries, found, vectors)
        pieces.save_arrays(path, **self._choose_block(collection, queries, found))
      for name, values in pieces.load_arrays(path).items():
        if name not in ("records", "negatives"):
          totals[name] = totals[name] + values
    return dict(totals)

  def _judged(self, collection: Collection, hits: "_HitFiles") -> Int[np.ndarray, " n"]:
    """Passages whose similarities are asked for."""
    needed = np.zeros(collection.passages, bool)
    needed[collection.record_passage] = True
    for queries in self._blocks(collection):
      found = hits.read(collection, queries).passages
      needed[found[found >= 0]] = True
    return np.flatnonzero(needed)

  def _choose_block(
    self, collection: Collection, queries: Int[np.ndarray, " Q"], hits: Hits
  ) -> dict[str, np.ndarray]:
    options = self._options
    tally = report.Tally(options.negatives, self._depths, self._range)
    order, starts = collection.by_query
    records = order[starts[queries[0]] : starts[queries[-1] + 1]]
    negatives = np.full((len(records), options.negatives), -1, np.int32)
    row = 0
    for place, query in enumerate(queries.tolist()):
      found = _candidates(collection, query, hits, place)
      positives = collection.positives(query)
      tally.query(found.passages, positives)
      for record in order[starts[query] : starts[query + 1]].tolist():
        own = np.searchsorted(positives, collection.record_passage[record])
        positive = float(hits.positives[place][own])
        own_found = found
        if collection.symmetric:
          paired = collection.paired(
            query, int(collection.record_passage[record]), found.passages
          )
          own_found = dataclasses.replace(found, positive=found.positive | paired)
        key, taken = _identity(collection.record(record), options.existing == "keep")
        places, dropped = select(own_found, positive, taken, options, key)
        tally.example(positive, found.similarities[places], dropped)
        negatives[row, : len(places)] = found.passages[places]
        row += 1
    return {"records": records, "negatives": negatives, **tally.arrays}

  def _write(
    self, collection: Collection, chosen: pathlib.Path, path: pathlib.Path
  ) -> None:
    """Writes the examples with what was chosen."""
    # In memory: a mapped file is sparse, and a full disk then kills the process.
    table = np.zeros((collection.records, self._options.negatives), np.int32)
    for queries in self._blocks(collection):
      block = pieces.load_arrays(_block_path(chosen, queries))
      table[block["records"]] = block["negatives"]
    keep = self._options.existing == "keep"
    with (
      new_path(path) as made,
      open(made, "wb") as file,
      # No name and no time: the same bytes whenever and wherever it is written.
      gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
    ):
      for index in range(collection.records):
        record = collection.record(index)
        kept = passages(record)[1:] if keep else []
        mined = [collection.passage(int(i)) for i in table[index] if i >= 0]
        record.pop("negative_titles", None)
        record["negatives"] = [
          {"title": title, "text": text} if title else text
          for title, text in (*kept, *((p.title, p.text) for p in mined))
        ]
        packed.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    self._say(f"wrote {collection.records:,} examples")


def _block_path(
  directory: pathlib.Path, queries: Int[np.ndarray, " Q"]
) -> pathlib.Path:
  return directory / f"{queries[0]:012d}.npz"


def _identity(record: dict[str, Any], keep: bool) -> tuple[int, np.ndarray]:
  """A number of an example's own; keys of the negatives that it keeps."""
  key = content_hash(f"{record['query']}\n{record['positive']}")
  kept = record.get("negatives", []) if keep else []
  return key, np.array([corpus.normal_key(text) for text in kept], np.uint64)


def _candidates(
  collection: Collection, query: int, hits: Hits, place: int
) -> Candidates:
  present = hits.passages[place] >= 0
  passages = hits.passages[place][present]
  return Candidates(
    passages,
    hits.similarities[place][present],
    np.asarray(collection.passage_text_key[passages]),
    np.isin(passages, collection.positives(query)),
    collection.same_text(query, passages),
    collection.same_label(query, passages),
  )


def _judged_hits(
  collection: Collection,
  queries: Int[np.ndarray, " Q"],
  found: Hits,
  vectors: CollectionVectors,
) -> Hits:
  """The same passages in the same order, with a judge's similarities."""
  similarities = np.full(found.passages.shape, -np.inf, np.float32)
  rows, columns = np.nonzero(found.passages >= 0)
  similarities[rows, columns] = vectors.similarities(
    queries[rows], found.passages[rows, columns]
  )
  return Hits(found.passages, similarities, vectors.positives(collection, queries))


@dataclasses.dataclass(frozen=True)
class _HitFiles:
  """What a search found, a piece a block of queries."""

  directory: pathlib.Path

  def has(self, queries: Int[np.ndarray, " Q"]) -> bool:
    return _block_path(self.directory, queries).is_file()

  def write(self, queries: Int[np.ndarray, " Q"], hits: Hits) -> None:
    pieces.save_arrays(
      _block_path(self.directory, queries),
      passages=hits.passages.astype(np.int32),
      similarities=hits.similarities,
      positives=np.concatenate(hits.positives),
    )

  def read(self, collection: Collection, queries: Int[np.ndarray, " Q"]) -> Hits:
    arrays = pieces.load_arrays(_block_path(self.directory, queries))
    counts = [len(collection.positives(int(query))) for query in queries]
    return Hits(
      arrays["passages"].astype(np.int64),
      arrays["similarities"],
      np.split(arrays["positives"], np.cumsum(counts)[:-1]),
    )
