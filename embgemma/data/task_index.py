"""Making one task's cache of the parts of its shards: tables, statistics, index.

Statistics are examples, tokens, max_text_tokens, max_token_id; lengths: by role, how
many texts have up to 8, 16, … 2,048 tokens, and more; duplicates: examples whose texts
are those of an earlier one; skipped: bad records left out, of which empty had an empty
text; unused: by reason, sound records that give no example; dropped: by cleaner,
examples left out. Of pairs max_negatives and truncated texts; of documents documents,
and short: those of fewer tokens than a segment has at least.
"""

import collections
import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from embgemma.data.bad_records import MAX_LISTED_SKIPS
from embgemma.data.config import CACHE_FORMAT
from embgemma.data.distinct import example_keys
from embgemma.data.files import new_file
from embgemma.data.shard_writer import LARGEST, SUMS, Part, part_path, read_part
from embgemma.errors import DataError

_BLOCK = 1 << 18  # rows of a table looked at together
_HISTOGRAM = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_DISTINCT_AT_ONCE = 1 << 26  # hashes sorted together


def finish_task(
  directory: epath.Path,
  task: str,
  num_shards: int,
  dropped: dict[str, int],
  pairs: bool,
) -> dict[str, Any]:
  """Puts the parts of all shards together, and marks the cache as complete.

  Args:
    directory: Of the task's cache.
    task: Its name.
    num_shards: Of the source.
    dropped: Examples left out, by cleaner.
    pairs: Whether its examples are pairs.

  Returns:
    The index.

  Raises:
    DataError: there is no example.
  """
  paths, facts = _all_parts(directory, num_shards)
  statistics = _statistics(facts, pairs)
  if not statistics["examples"]:
    raise DataError(
      f"task {task!r} has no examples" + (" left by cleaning" if dropped else "")
    )
  files: dict[str, int] = {}
  for fact in facts:
    if fact["statistics"]["examples"]:
      files |= fact["files"]
  shape = (statistics["examples"], 2 + statistics["max_negatives"] if pairs else 1)
  small = np.uint16 if statistics["max_text_tokens"] < 2**16 else np.uint32
  with new_file(directory / "lengths.npy") as made:
    _write_table(made, shape, small, (_part(path).lengths for path in paths))
    files["lengths.npy"] = made.stat().st_size
    statistics["lengths"] = _histogram(np.load(made, mmap_mode="r"), pairs)
  with new_file(directory / "hashes.npy") as made:
    _write_table(made, shape, np.uint64, (_part(path).hashes for path in paths))
    files["hashes.npy"] = made.stat().st_size
    hashes = np.load(made, mmap_mode="r")
    statistics["duplicates"] = _duplicates(hashes) if pairs else 0
  statistics["dropped"] = dropped
  listed = [
    line for fact in facts if fact["last"] for line in fact["skipped"]["listed"]
  ]
  index = {
    "format": CACHE_FORMAT,
    "task": task,
    "files": files,
    "statistics": statistics,
    "skipped": listed[:MAX_LISTED_SKIPS],
  }
  for fact in facts:
    if not fact["statistics"]["examples"]:  # no reader should open such a file
      (directory / next(iter(fact["files"]))).unlink(missing_ok=True)
  with new_file(directory / "index.json") as made:
    made.write_text(json.dumps(index, indent=1))
  for path in paths:
    path.unlink()
  return index


def _all_parts(
  directory: epath.Path, num_shards: int
) -> tuple[list[epath.Path], list[dict[str, Any]]]:
  """Paths of the parts of all shards in order, and their facts."""
  paths, facts = [], []
  for shard in range(num_shards):
    for number in itertools.count():
      paths.append(part_path(directory, shard, number))
      facts.append(_part(paths[-1]).facts)
      if facts[-1]["last"]:
        break
  return paths, facts


def _part(path: epath.Path) -> Part:
  """A part that has been written.

  Raises:
    DataError: something took it away.
  """
  part = read_part(path)
  if part is None:
    raise DataError(f"{path}: gone or damaged meanwhile; run the command again")
  return part


def _write_table(
  path: pathlib.Path, shape: tuple[int, int], dtype: Any, tables: Iterable[np.ndarray]
) -> None:
  """Writes tables one under another as one .npy, narrower ones filled up with zeros."""
  header = {
    "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
    "fortran_order": False,
    "shape": shape,
  }
  with path.open("wb") as file:
    np.lib.format.write_array_header_1_0(file, header)
    for table in tables:
      out = np.zeros((len(table), shape[1]), dtype)
      out[:, : table.shape[1]] = table
      file.write(out.tobytes())


def _statistics(facts: Sequence[dict[str, Any]], pairs: bool) -> dict[str, Any]:
  """Over all parts."""
  own = [part["statistics"] for part in facts]
  total: dict[str, Any] = {name: sum(part[name] for part in own) for name in SUMS}
  total |= {name: max(part[name] for part in own) for name in LARGEST}
  texts = total.pop("texts")
  # A log counts from its shard's beginning: the last part's is the shard's.
  ends = [part["skipped"] for part in facts if part["last"]]
  total["skipped"] = sum(end["count"] for end in ends)
  total["empty"] = sum(end["empty"] for end in ends)
  unused: collections.Counter[str] = collections.Counter()
  for end in ends:
    unused.update(end["unused"])
  total["unused"] = dict(unused)
  if pairs:
    total["max_negatives"] = max(0, texts - 2)
  for name in ("documents", "short") if pairs else ("truncated",):
    del total[name]
  return total


def _blocks(table: np.ndarray) -> Iterator[np.ndarray]:
  """Rows of a memory-mapped table, a block at a time."""
  for start in range(0, len(table), _BLOCK):
    yield np.asarray(table[start : start + _BLOCK])


def _histogram(lengths: np.ndarray, pairs: bool) -> dict[str, list[int]]:
  """Texts by length: up to 8 tokens, 16, …, and longer than the last."""
  edges = (1, *(edge + 1 for edge in _HISTOGRAM), 2**32)
  roles = {"query": slice(0, 1), "positive": slice(1, 2), "negatives": slice(2, None)}
  counts = {
    name: np.zeros(len(edges) - 1, int) for name in (roles if pairs else ("text",))
  }
  for block in _blocks(lengths):
    for name, count in counts.items():
      count += np.histogram(block[:, roles.get(name, slice(None))], edges)[0]
  return {name: count.tolist() for name, count in counts.items()}


def _duplicates(hashes: np.ndarray) -> int:
  """Rows whose query and positive are those of an earlier row."""
  passes = np.uint64(-(-len(hashes) // _DISTINCT_AT_ONCE))
  distinct = 0
  for number in range(int(passes)):
    own = []
    for block in _blocks(hashes):
      keys = example_keys(block)
      own.append(keys[keys % passes == number])
    distinct += len(np.unique(np.concatenate(own)))
  return len(hashes) - distinct
