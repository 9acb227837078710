"""Tasks as configuration, without TensorFlow.

`embgemma.data.task_examples` opens what is declared here; seqio comes in only where a
task needs it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from embgemma.data import builtin_corpus, prompts, sources
from embgemma.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Task:
  """One data set, of pairs or of documents.

  Attributes:
    name: Unique in the run; letters, digits, "_" and ".", as seqio has it.
    source: Where its examples come from.
    kind: Which prompts both sides of a pair get: a key of `prompts.TASK_PROMPTS`, or
      the names of two prompts, "QUERY/DOCUMENT". None is each record's own "task" if it
      has one, else "search". Documents have none.
    rate: Its weight in the mixture.
    symmetric: Whether query and positive change places in half of the examples, drawn
      anew in each epoch; both sides must have the same prompt.
    unique_ids: Whether an id of the example begins each of its texts, which makes texts
      of one label separable within a batch: Gecko (arXiv 2403.20327), section 3.3, for
      classification, which has it at the end. Labels then make no positives of each
      other.
  """

  name: str
  source: sources.Source
  kind: str | None = None
  rate: float = 1.0
  symmetric: bool = False
  unique_ids: bool = False

  def __post_init__(self):
    if not self.name or not all(c.isalnum() or c in "_." for c in self.name):
      raise ConfigError(
        f"task name {self.name!r}: use letters, digits, '_' and '.' only"
      )
    if self.source.content == "text":
      for option in ("kind", "symmetric", "unique_ids"):
        if getattr(self, option):
          raise ConfigError(
            f"task {self.name!r}: documents have one side and no prompts; drop {option}"
          )
    if self.symmetric and self.kind is None:
      raise ConfigError(
        f"task {self.name!r}: give a symmetric task a kind, such as 'similarity', "
        "whose prompts are the same on both sides"
      )
    if not isinstance(self.rate, int | float) or not self.rate > 0:
      raise ConfigError(f"task {self.name!r}: rate must be > 0, got {self.rate!r}")

  def check_kind(self, table: Mapping[str, str]) -> None:
    """Returns nothing if the table has the prompts of the kind.

    Raises:
      ConfigError: it lacks them, or a symmetric task has two.
    """
    if self.kind is None:
      return
    try:
      chosen = prompts.task_prompts(self.kind, table)
    except ConfigError as error:
      raise ConfigError(f"task {self.name!r}: {error}") from None
    if self.symmetric and not chosen.symmetric:
      raise ConfigError(
        f"task {self.name!r}: kind {self.kind!r} has two prompts, so its sides cannot "
        "change places; drop symmetric, or choose a kind such as 'similarity'"
      )

  def fingerprint(self, table: Mapping[str, str] = prompts.PROMPTS) -> list[Any]:
    """What its records depend on beside vocabulary and lengths.

    Without a kind these are all prompts: records may name any two.
    """
    if self.source.content == "text":
      return [self.name, self.source.fingerprint()]
    texts: list[Any] = sorted(table.items())
    if self.kind is not None:
      texts = list(prompts.task_prompts(self.kind, table).texts)
    return [self.name, self.kind, self.source.fingerprint(), texts, self.unique_ids]


def builtin_tasks() -> tuple[Task, ...]:
  """All tasks of the built-in corpus, at equal rates."""
  return tuple(
    Task(name, sources.BuiltinSource(name), kind)
    for name, kind in builtin_corpus.TASKS.items()
  )


def builtin_text_tasks() -> tuple[Task, ...]:
  """All documents of the built-in corpus: batches of each in proportion to its size."""
  rates = {"stdlib_modules": 30.0, "stdlib_reference": 1.0}
  return tuple(
    Task(name, sources.BuiltinSource(name), rate=rates[name])
    for name in builtin_corpus.TEXT_TASKS
  )


_TASK_KEYS = {"kind", "rate", "symmetric", "unique_ids"}
_PAIR_KEYS = {"path", "limit", "format", "fields", *_TASK_KEYS}
_TEXT_KEYS = {"path", "limit", "fields", "rate"}


def _file_entry(
  what: str, name: str, entry: str | Mapping[str, Any], keys: set[str]
) -> dict[str, Any]:
  """An entry's options, its path a string or a tuple of them."""
  options: dict[str, Any]
  options = {"path": entry} if isinstance(entry, str) else dict(entry)
  if set(options) - keys or "path" not in options:
    raise ConfigError(
      f"{what} task {name!r}: needs 'path' and takes {sorted(keys)}, got "
      f"{sorted(options)}"
    )
  path = options["path"]
  return options | {"path": path if isinstance(path, str) else tuple(path)}


def _file_tasks(
  what: str,
  entries: Mapping[str, str | Mapping[str, Any]],
  keys: set[str],
  text_source: Callable[..., sources.Source],
) -> tuple[Task, ...]:
  """Tasks from files: Parquet by their names, all others as `text_source` has it."""
  tasks = []
  for name, entry in entries.items():
    options = _file_entry(what, name, entry, keys)
    own = {key: options.pop(key) for key in _TASK_KEYS & set(options)}
    path = options["path"]
    paths = (path,) if isinstance(path, str) else path
    parquet = [p.endswith(".parquet") for p in paths]
    if any(parquet) and not all(parquet):
      raise ConfigError(
        f"{what} task {name!r}: Parquet and other files; make two tasks"
      )
    if "fields" in options and not all(parquet):
      raise ConfigError(f"{what} task {name!r}: 'fields' is for Parquet files")
    make = sources.ParquetSource if all(parquet) else text_source
    if make is sources.ParquetSource and text_source is sources.TextFileSource:
      options.setdefault("fields", {"text": "text"})
    tasks.append(Task(name, make(**options), **own))
  return tuple(tasks)


def text_tasks(files: Mapping[str, str | Mapping[str, Any]]) -> tuple[Task, ...]:
  """Tasks from files of documents, one entry each.

  Args:
    files: Task name to a path, or to {"path": str or list, "rate"?: float,
      "limit"?: int}: see `sources.TextFileSource`; of .parquet files also "fields", see
      `sources.ParquetSource`.

  Raises:
    ConfigError: an entry has an unknown key or no path.
  """
  return _file_tasks("text", files, _TEXT_KEYS, sources.TextFileSource)


def jsonl_tasks(files: Mapping[str, str | Mapping[str, Any]]) -> tuple[Task, ...]:
  """Tasks from files of pairs, one entry each.

  Args:
    files: Task name to a path, or to {"path": str or list, "limit"?: int, "format"?:
      str}: see `sources.JsonlSource`; of .parquet files "fields" in place of "format",
      see `sources.ParquetSource`. Also "kind", "rate", "symmetric" and "unique_ids":
      see `Task`.

  Raises:
    ConfigError: an entry has an unknown key or no path.
  """
  return _file_tasks("JSONL", files, _PAIR_KEYS, sources.JsonlSource)
