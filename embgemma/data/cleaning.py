"""Cleaning: which examples of a task are left out, decided before it is cached.

Cleaners act in the order given, and one sees what those before it left. There are two
phases, each made of pieces that are whole files or not there: `scan` reads one shard of
the source, in any process; `decide` joins the scans of all shards in one process. What
comes out, `dropped` of each shard and a `report`, depends on the order of the examples
and on nothing else.
"""

import array
import collections
import contextlib
import dataclasses
import io
import json
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from embgemma.data.cleaners import Cleaner, Deduplicator, Example, Filter, Keys
from embgemma.data.files import is_remote, writing
from embgemma.errors import DataError
from embgemma.typing import Int

MAX_LISTED = 10  # dropped examples that a report shows of each cleaner
_SHOWN_CHARACTERS = 60
_KEPT = 255  # in place of a cleaner's position


def _scan_name(shard: int, what: str) -> str:
  return f"scan-{shard:05d}.{what}"


def _keys_name(cleaner: int | str) -> str:
  return f"{cleaner}.keys"


def _drops_name(shard: int) -> str:
  return f"drops-{shard:05d}.npy"


@contextlib.contextmanager
def _local_scans(directory: epath.Path) -> Iterator[pathlib.Path]:
  """The directory, or a local one with the scans of a remote one."""
  if not is_remote(directory):
    yield pathlib.Path(directory)
    return
  with tempfile.TemporaryDirectory() as local:
    for path in directory.glob("scan-*"):
      path.copy(epath.Path(local, path.name))
    yield pathlib.Path(local)


def _shown(example: Example) -> str:
  text = example["text"] if "text" in example else example["query"]
  return " ".join(text[: 4 * _SHOWN_CHARACTERS].split())[:_SHOWN_CHARACTERS]


def scan(
  examples: Iterable[Example],
  cleaners: Sequence[Cleaner],
  directory: epath.PathLike,
  shard: int,
) -> None:
  """Phase 1: writes what `decide` needs of one shard; nothing if that is there.

  Filters judge; examples that no filter before a deduplicator drops give it their
  keys, which go to disk as they are made.

  Args:
    examples: Of the shard, in order: pairs or documents.
    cleaners: In order.
    directory: Of this task and these cleaners alone; local or remote.
    shard: Its number.

  Raises:
    DataError: it cannot be written, or what reading the examples raises.
  """
  directory = epath.Path(directory)
  done = directory / _scan_name(shard, "json")
  if done.exists() or is_decided(directory):
    return
  phrases: dict[tuple[int, str], int] = {}
  codes = array.array("h")  # of each example, into `phrases`; -1 is kept
  keys = {str(i): 0 for i, c in enumerate(cleaners) if isinstance(c, Deduplicator)}
  with contextlib.ExitStack() as stack:
    files = {
      name: stack.enter_context(writing(directory / _scan_name(shard, name)))
      for name in ("codes", "shown", *map(_keys_name, keys))
    }
    for example in examples:
      files["shown"].write(_shown(example).encode() + b"\n")
      code = -1
      for i, cleaner in enumerate(cleaners):
        if isinstance(cleaner, Deduplicator):
          files[_keys_name(i)].write(cleaner.key(example).tobytes())
          keys[str(i)] += 1
        elif isinstance(cleaner, Filter) and (fault := cleaner.fault(example)):
          code = phrases.setdefault((i, fault), len(phrases))
          break
      codes.append(code)
    files["codes"].write(codes.tobytes())
  meta = {"examples": len(codes), "phrases": list(phrases), "keys": keys}
  with writing(done) as file:
    file.write(json.dumps(meta).encode())


@dataclasses.dataclass(frozen=True)
class _Scans:
  """The scans of all shards.

  Attributes:
    metas: What each shard's JSON says.
    starts: int64 [shards + 1], number of each shard's first example, and of all.
    filtered: uint8 [examples], position of the filter that drops each, or 255.
  """

  directory: pathlib.Path
  metas: list[dict[str, Any]]
  starts: np.ndarray
  filtered: np.ndarray

  def codes(self, shard: int) -> np.ndarray:
    path = self.directory / _scan_name(shard, "codes")
    return _load_codes(path, self.metas[shard]["examples"])

  def phrase(self, shard: int, index: int) -> str:
    """Why a filter drops an example."""
    return self.metas[shard]["phrases"][self.codes(shard)[index]][1]

  def place(self, example: int) -> tuple[int, int]:
    """Shard and index of an example."""
    shard = int(np.searchsorted(self.starts, example, side="right")) - 1
    return shard, example - int(self.starts[shard])


def _check_size(path: pathlib.Path, size: int) -> None:
  """Refuses a file of a scan that is not of the size that was written."""
  if (found := path.stat().st_size) != size:
    raise DataError(
      f"{path}: {found} bytes where the scan wrote {size}; delete {path.parent} and "
      "run the command again"
    )


def _load_codes(path: pathlib.Path, count: int) -> np.ndarray:
  _check_size(path, 2 * count)
  return np.fromfile(path, np.int16)


def _load_scans(directory: pathlib.Path, num_shards: int) -> _Scans:
  metas, filtered = [], []
  for shard in range(num_shards):
    meta = json.loads((directory / _scan_name(shard, "json")).read_bytes())
    codes = _load_codes(directory / _scan_name(shard, "codes"), meta["examples"])
    positions = [position for position, _ in meta["phrases"]] + [_KEPT]
    filtered.append(np.array(positions, np.uint8)[codes])  # code -1: the last
    metas.append(meta)
  starts = np.cumsum([0, *(meta["examples"] for meta in metas)])
  return _Scans(directory, metas, starts, np.concatenate(filtered))


def _alike(
  scans: _Scans, position: int, cleaner: Deduplicator, left: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Examples that a deduplicator drops of those left, and what each is like."""
  # Keys are those of all that no filter before it dropped.
  numbered = np.flatnonzero(scans.filtered > position)
  rows = np.flatnonzero(left[numbered])
  counts = [meta["keys"][str(position)] for meta in scans.metas]
  paths = [
    scans.directory / _scan_name(shard, _keys_name(position))
    for shard in range(len(scans.metas))
  ]
  shape = (cleaner.row, cleaner.width)
  for path, count in zip(paths, counts, strict=True):
    _check_size(path, count * cleaner.width * np.dtype(cleaner.row).itemsize)
  first = cleaner.first(Keys(paths, counts, shape, rows))
  again = np.flatnonzero(first != np.arange(len(first)))
  examples = numbered[rows]
  return examples[again], examples[first[again]]


def is_decided(directory: epath.PathLike) -> bool:
  """Whether `decide` has finished here."""
  return (epath.Path(directory) / "report.json").exists()


def decide(
  cleaners: Sequence[Cleaner], directory: epath.PathLike, num_shards: int
) -> dict[str, Any]:
  """Phase 2: writes each shard's drop list, then the report; removes the scans.

  Holds about 30 bytes an example in memory, and of keys no more than a deduplicator
  asks for at a time. Does nothing where the report is there.

  Args:
    cleaners: As `scan` had them.
    directory: As `scan` had it.
    num_shards: Of the source, at least one, each scanned.

  Returns:
    See `report`.

  Raises:
    DataError: the scan of a shard is missing or damaged.
  """
  directory = epath.Path(directory)
  if not is_decided(directory):
    try:
      with _local_scans(directory) as local:
        _decide(cleaners, directory, _load_scans(local, num_shards))
    except (OSError, ValueError) as error:
      # Another process may have finished the same, and removed what this one reads.
      if not is_decided(directory):
        raise DataError(
          f"{directory}: a shard's scan cannot be read ({error}); run the command "
          "again, or delete the directory and run it then"
        ) from error
  for pattern in ("scan-*", ".scan-*", ".drops-*", ".report.json.*"):
    for path in directory.glob(pattern):
      path.unlink(missing_ok=True)
  return report(directory)


def _decide(cleaners: Sequence[Cleaner], directory: epath.Path, scans: _Scans) -> None:
  by = np.full(len(scans.filtered), _KEPT, np.uint8)  # which cleaner drops an example
  reasons: dict[int, str] = {}  # of examples that are listed and like others
  for position, cleaner in enumerate(cleaners):
    left = by == _KEPT
    if isinstance(cleaner, Deduplicator):
      again, like = _alike(scans, position, cleaner, left)
      by[again] = position
      for example, first in zip(again[:MAX_LISTED], like[:MAX_LISTED], strict=True):
        shard, index = scans.place(int(first))
        reasons[int(example)] = f"{cleaner.relation} example {index} of shard {shard}"
    else:
      by[left & (scans.filtered == position)] = position
  for shard in range(len(scans.metas)):
    own = by[scans.starts[shard] : scans.starts[shard + 1]]
    with writing(directory / _drops_name(shard)) as file:
      np.save(file, np.flatnonzero(own != _KEPT).astype(np.int64))
  entries = _entries(cleaners, scans, by, reasons)
  result = {
    "examples": len(by),
    "kept": int(np.count_nonzero(by == _KEPT)),
    "dropped": {entry["name"]: entry["dropped"] for entry in entries},
    "cleaners": entries,
  }
  with writing(directory / "report.json") as file:
    file.write(json.dumps(result, indent=1, ensure_ascii=False).encode())


def _entries(
  cleaners: Sequence[Cleaner], scans: _Scans, by: np.ndarray, reasons: dict[int, str]
) -> list[dict[str, Any]]:
  """What the report says of each cleaner."""
  phrases = _phrases(len(cleaners), scans, by)
  listed = [np.flatnonzero(by == i)[:MAX_LISTED].tolist() for i in range(len(cleaners))]
  shown = _shown_texts(scans, [e for examples in listed for e in examples])
  entries = []
  for position, cleaner in enumerate(cleaners):
    rows = []
    for example in listed[position]:
      shard, index = scans.place(example)
      reason = reasons.get(example) or scans.phrase(shard, index)
      text = shown[example]
      rows.append({"shard": shard, "index": index, "text": text, "reason": reason})
    # Of a cleaner given twice, on different sides, say, the second has a number.
    earlier = sum(other.name == cleaner.name for other in cleaners[:position])
    entries.append(
      {
        "name": f"{cleaner.name} {earlier + 1}" if earlier else cleaner.name,
        "dropped": int(np.count_nonzero(by == position)),
        "reasons": dict(phrases[position].most_common()),
        "listed": rows,
      }
    )
  return entries


def _phrases(
  cleaners: int, scans: _Scans, by: np.ndarray
) -> list[collections.Counter[str]]:
  """How many examples each filter drops, by its phrase."""
  phrases: list[collections.Counter[str]] = [
    collections.Counter() for _ in range(cleaners)
  ]
  # A deduplicator may have dropped what a later filter has a phrase for.
  counted = by == scans.filtered
  for shard, meta in enumerate(scans.metas):
    own = slice(scans.starts[shard], scans.starts[shard + 1])
    codes = scans.codes(shard)
    codes = codes[counted[own] & (codes >= 0)]
    numbers = np.bincount(codes, minlength=len(meta["phrases"]))
    for (position, phrase), number in zip(meta["phrases"], numbers, strict=True):
      if number:
        phrases[position][phrase] += int(number)
  return phrases


def _shown_texts(scans: _Scans, examples: list[int]) -> dict[int, str]:
  """The beginnings of these examples; reads no file further than it must."""
  wanted: dict[int, dict[int, int]] = {}
  for example in examples:
    shard, index = scans.place(example)
    wanted.setdefault(shard, {})[index] = example
  shown = {}
  for shard, indices in wanted.items():
    with open(scans.directory / _scan_name(shard, "shown"), "rb") as file:
      for index, line in enumerate(file):
        if index in indices:
          shown[indices[index]] = line.decode()[:-1]
        if index >= max(indices):
          break
  return shown


def dropped(directory: epath.PathLike, shard: int) -> Int[np.ndarray, " N"]:
  """Indices of the shard's examples that are left out, int64 ascending.

  Raises:
    DataError: the list is missing or damaged.
  """
  path = epath.Path(directory) / _drops_name(shard)
  try:
    return np.load(io.BytesIO(path.read_bytes()))
  except (OSError, ValueError, EOFError) as error:
    raise DataError(
      f"{path}: cannot be read ({error}); delete {directory} and run the command again"
    ) from error


def report(directory: epath.PathLike) -> dict[str, Any]:
  """What cleaning did to a task.

  Returns:
    examples: How many there were; kept: how many are left; dropped: how many each
    cleaner dropped, by name; cleaners: of each in order {"name", "dropped", "reasons":
    how many by a filter's phrase, "listed": the first few, {"shard", "index", "text":
    its first 60 characters, "reason"}}.

  Raises:
    DataError: there is none, or it is damaged.
  """
  path = epath.Path(directory) / "report.json"
  try:
    return json.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    raise DataError(
      f"{path}: cannot be read ({error}); delete {directory} and run the command again"
    ) from error


def report_lines(report: Mapping[str, Any]) -> list[str]:
  """A report as lines to print."""
  lines = [f"cleaning kept {report['kept']:,} of {report['examples']:,} examples"]
  for entry in report["cleaners"]:
    lines.append(f"  {entry['name']} dropped {entry['dropped']:,}")
    lines += [f"    {count:,}: {phrase}" for phrase, count in entry["reasons"].items()]
    lines += [
      f"    shard {listed['shard']}, example {listed['index']}: {listed['reason']}: "
      f"{listed['text']}"
      for listed in entry["listed"]
    ]
  return lines
