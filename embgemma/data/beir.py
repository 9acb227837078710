"""Collections in the layout of BEIR (Thakur et al. 2021), as pairs to train on.

A folder with `corpus.jsonl` {"_id", "text", "title"?}, `queries.jsonl` {"_id", "text"},
and `qrels/SPLIT.tsv` with a header line: query-id, corpus-id, score.
"""

import contextlib
import glob
import os
import sqlite3
import tempfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from embgemma.data import files
from embgemma.data.bad_records import SkipLog, leave_out
from embgemma.data.files import read_lines
from embgemma.data.jsonl import decode_line, parse_json_line, string_field
from embgemma.data.record_formats import passage_example
from embgemma.errors import DataError

_LAYOUT = "query-id, corpus-id and an integer score, separated by tabs"
_INSERT = "INSERT INTO texts VALUES (?, ?, ?)"
_SELECT = "SELECT title, text FROM texts WHERE id = ?"


def collection_file(folder: str | os.PathLike[str], name: str) -> str:
  """A file of the folder, plain or compressed.

  Raises:
    DataError: there is none.
  """
  found = files.match_compressed(os.path.join(glob.escape(os.fspath(folder)), name))
  if not found:
    raise DataError(
      f"{folder}: no {name} or {name}.gz; a BEIR folder holds corpus.jsonl, "
      "queries.jsonl and qrels/SPLIT.tsv or qrels.tsv"
    )
  return found[0]


def qrels_file(folder: str | os.PathLike[str], split: str | None) -> str:
  """The file of judgements.

  Args:
    folder: In the layout of BEIR.
    split: The file under `qrels/`; None takes `qrels.tsv` or the only split.

  Raises:
    DataError: there is none, or there are several and none is named.
  """
  root = glob.escape(os.fspath(folder))
  splits = {
    os.path.basename(path).removesuffix(".tsv"): path
    for path in files.match(os.path.join(root, "qrels", "*.tsv"))
  }
  if split is None and (single := files.match(os.path.join(root, "qrels.tsv"))):
    return single[0]
  if split is not None:
    splits = {name: path for name, path in splits.items() if name == split}
  if len(splits) == 1:
    return next(iter(splits.values()))
  where = os.path.join(folder, "qrels")
  if splits:
    raise DataError(f"{where}: several splits ({', '.join(splits)}); name one as split")
  wanted = f"qrels/{split}.tsv" if split else "qrels.tsv and no qrels/*.tsv"
  raise DataError(f"{folder}: no {wanted}; the judgements are needed")


def qrels_row(path: str, number: int, line: bytes) -> tuple[str, str, int] | None:
  """Query, document and grade of a line of judgements; None of the header.

  Raises:
    DataError: another layout, or a file without a header.
  """
  where = f"{path}:{number}"
  columns = decode_line(path, number, line).split("\t")
  if len(columns) != 3:
    raise DataError(f"{where}: {len(columns)} columns; a row is {_LAYOUT}")
  try:
    grade = int(columns[2])
  except ValueError:
    if number == 1:
      return None
    raise DataError(f"{where}: score {columns[2]!r}; a row is {_LAYOUT}") from None
  if number == 1:
    # BEIR's loader skips the first line whatever it says, and loses a judgement.
    raise DataError(f"{where}: no header; add one: query-id<TAB>corpus-id<TAB>score")
  return columns[0], columns[1], grade


_Judgements = dict[str, dict[str, tuple[int, int]]]  # query: document: grade, line


def _read_judgements(path: str, on_bad_record: str, skipped: SkipLog) -> _Judgements:
  """The judgements of the queries that have a relevant document."""
  judged: _Judgements = {}
  for number, line in read_lines(path):
    try:
      row = qrels_row(path, number, line)
      if row is None:
        continue
      query, document, grade = row
      if judged.setdefault(query, {}).setdefault(document, (grade, number))[0] != grade:
        raise DataError(
          f"{path}:{number}: query {query!r}, document {document!r} has two scores; "
          "keep one"
        )
    except DataError as error:
      leave_out(error, on_bad_record, skipped)
  return {
    query: documents
    for query, documents in judged.items()
    if any(grade > 0 for grade, _ in documents.values())
  }


@contextlib.contextmanager
def _needed_texts(
  path: str, needed: Collection[str], on_bad_record: str, skipped: SkipLog
) -> Iterator[sqlite3.Connection]:
  """The titles and texts of the needed ids, on disk until the block ends."""
  with (
    tempfile.TemporaryDirectory(prefix="embgemma-") as folder,
    contextlib.closing(
      sqlite3.connect(
        os.path.join(folder, "texts"),
        isolation_level=None,
        check_same_thread=False,  # a generator may be read by one thread after another
      )
    ) as database,
  ):
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("PRAGMA synchronous = OFF")
    database.execute("CREATE TABLE texts (id TEXT PRIMARY KEY, title TEXT, text TEXT)")
    database.execute("BEGIN")
    for number, line in read_lines(path):
      try:
        record = parse_json_line(path, number, line)
        if (row := _needed_row(record, f"{path}:{number}", needed)) is not None:
          database.execute(_INSERT, row)
      except sqlite3.IntegrityError:
        repeated = DataError(f"{path}:{number}: _id {record['_id']!r} is there twice")
        leave_out(repeated, on_bad_record, skipped)
      except DataError as error:
        leave_out(error, on_bad_record, skipped)
    database.execute("COMMIT")
    yield database


def _needed_row(
  record: Mapping[str, Any], where: str, needed: Collection[str]
) -> tuple[str, str, str] | None:
  identifier = string_field(record, "_id", where)
  if identifier not in needed:
    return None
  text = string_field(record, "text", where)
  title = string_field(record, "title", where, default="")
  return identifier, title.strip(), text


def read_pairs(
  corpus: str, queries: str, qrels: str, on_bad_record: str, skipped: SkipLog
) -> Iterator[dict[str, Any]]:
  """Relevant documents with their queries, in the order of the judgements.

  Corpus and queries are read once. Memory holds the judgements (some 300 bytes each);
  the texts that they name lie in a temporary database below $TMPDIR.

  Args:
    corpus: File of documents.
    queries: File of queries.
    qrels: File of judgements.
    on_bad_record: "fail" or "skip".
    skipped: Takes the records that are left out.

  Raises:
    DataError: the first bad record, unless `on_bad_record` is "skip"; also a judgement
      of a query or document that is not there.
  """
  judged = _read_judgements(qrels, on_bad_record, skipped)
  documents = {document for own in judged.values() for document in own}
  policy = (on_bad_record, skipped)
  with (
    _needed_texts(queries, judged, *policy) as query_texts,
    _needed_texts(corpus, documents, *policy) as document_texts,
  ):
    rows = [
      (line, query, document)
      for query, own in judged.items()
      for document, (grade, line) in own.items()
      if grade > 0
    ]
    for line, query, document in sorted(rows):
      where = f"{qrels}:{line}"
      try:
        _, text = _look_up(query_texts, query, where, "query", queries)
        positive = _look_up(document_texts, document, where, "document", corpus)
        negatives = [
          _look_up(document_texts, other, f"{qrels}:{at}", "document", corpus)
          for other, (grade, at) in judged[query].items()
          if grade <= 0
        ]
      except DataError as error:
        leave_out(error, *policy)
        continue
      # BEIR's collections have documents and queries without text.
      if not (text.strip() and positive[1].strip()):
        skipped.add_unused("judgements of a query or document without text")
        continue
      negatives = [(title, text) for title, text in negatives if text.strip()]
      yield passage_example(text, positive, negatives)


def _look_up(
  texts: sqlite3.Connection, identifier: str, where: str, what: str, path: str
) -> tuple[str, str]:
  found = texts.execute(_SELECT, (identifier,)).fetchone()
  if found is None:
    raise DataError(
      f"{where}: {what} {identifier!r} is not in {path}; add it or drop the row"
    )
  return found
