"""Tasks and mixtures as configuration, without TensorFlow.

What is declared here is registered with seqio by `embgemma.data.seqio_registry` when
a cache is built, and only then.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from embgemma.data import builtin_corpus, prompts, sources
from embgemma.errors import ConfigError, DataError

FEATURES = ("query", "positive", "negatives")
# Part of every fingerprint: a cache of another format is another cache.
CACHE_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Task:
  """One data set of pairs.

  Attributes:
    name: Unique in the run; letters, digits, "_" and ".", as seqio has it.
    source: Where its examples come from.
    kind: Which prompts both sides get, a key of `prompts.TASK_PROMPTS`; None is
      each record's own "task" if it has one, else "search".
    rate: Its weight in the mixture.
  """

  name: str
  source: sources.Source
  kind: str | None = None
  rate: float = 1.0

  def __post_init__(self):
    if not self.name or not all(c.isalnum() or c in "_." for c in self.name):
      raise ConfigError(
        f"task name {self.name!r}: use letters, digits, '_' and '.' only"
      )
    if self.kind is not None and self.kind not in prompts.TASK_PROMPTS:
      raise ConfigError(
        f"task {self.name!r}: unknown kind {self.kind!r}; there are "
        f"{sorted(prompts.TASK_PROMPTS)}"
      )
    if not isinstance(self.rate, int | float) or not self.rate > 0:
      raise ConfigError(f"task {self.name!r}: rate must be > 0, got {self.rate!r}")

  def fingerprint(self) -> list[Any]:
    kinds = {kind: dataclasses.astuple(p) for kind, p in prompts.TASK_PROMPTS.items()}
    return [self.name, self.kind, self.source.fingerprint(), kinds]


def builtin_tasks() -> tuple[Task, ...]:
  """All tasks of the built-in corpus, at equal rates."""
  return tuple(
    Task(name, sources.BuiltinSource(name), kind)
    for name, kind in builtin_corpus.TASKS.items()
  )


_JSONL_KEYS = {"path", "kind", "rate", "limit"}


def jsonl_tasks(files: Mapping[str, str | Mapping[str, Any]]) -> tuple[Task, ...]:
  """Tasks from JSONL files, one entry each.

  Args:
    files: Task name to a path, or to {"path": str or list, "kind"?: str,
      "rate"?: float, "limit"?: int}.

  Raises:
    ConfigError: an entry has an unknown key or no path.
  """
  tasks = []
  for name, entry in files.items():
    options: dict[str, Any]
    options = {"path": entry} if isinstance(entry, str) else dict(entry)
    unknown = set(options) - _JSONL_KEYS
    if unknown or "path" not in options:
      raise ConfigError(
        f"JSONL task {name!r}: needs 'path' and takes {sorted(_JSONL_KEYS)}, "
        f"got {sorted(options)}"
      )
    path = options["path"]
    path = path if isinstance(path, str) else tuple(path)
    source = sources.JsonlSource(path, options.get("limit"))
    tasks.append(Task(name, source, options.get("kind"), options.get("rate", 1.0)))
  return tuple(tasks)


def default_cache_dir() -> str:
  """$EMBGEMMA_CACHE, or embgemma/ in the user's cache directory."""
  base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return os.environ.get("EMBGEMMA_CACHE") or os.path.join(base, "embgemma")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What is trained on.

  Attributes:
    mixture_or_task_name: A task of `tasks`; or one registered with seqio by
      `modules`; or any other name, which then means the mixture of all `tasks`.
    lengths: Most tokens of a query, a positive and a negative, BOS, EOS and prompt
      included: TASK_FEATURE_LENGTHS with keys query, positive, negatives.
    tasks: Tasks declared in gin.
    modules: Python modules that register seqio tasks and mixtures on import.
    vocabulary: A SentencePiece model file; None trains one of `vocabulary_size`
      pieces on the mixture's texts.
    vocabulary_size: Pieces of a vocabulary trained here.
    max_negatives: Hard negatives kept of each example, M.
    cache_dir: Where tokenised tasks are kept; None is `default_cache_dir`.
    on_bad_record: "fail" or "skip".
  """

  mixture_or_task_name: str
  lengths: Mapping[str, int]
  tasks: Sequence[Task] = ()
  modules: Sequence[str] = ()
  vocabulary: str | None = None
  vocabulary_size: int | None = None
  max_negatives: int = 1
  cache_dir: str | None = None
  on_bad_record: str = "fail"

  def __post_init__(self):
    object.__setattr__(self, "tasks", tuple(self.tasks))
    object.__setattr__(self, "modules", tuple(self.modules))
    names = [task.name for task in self.tasks]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
      raise ConfigError(f"tasks named twice: {duplicates}")
    if not self.tasks and not self.modules:
      raise ConfigError(
        "no tasks: give JSONL_TASKS = {'name': 'pairs.jsonl'}, or MODULES that "
        "register seqio tasks"
      )
    if set(self.lengths) != set(FEATURES):
      raise ConfigError(
        f"TASK_FEATURE_LENGTHS must have the keys {FEATURES}, got {dict(self.lengths)}"
      )
    for feature, length in self.lengths.items():
      if not isinstance(length, int) or length < 3:
        raise ConfigError(
          f"TASK_FEATURE_LENGTHS[{feature!r}] must be at least 3 (BOS, a piece, EOS), "
          f"got {length!r}"
        )
    if self.on_bad_record not in sources.BAD_RECORD_POLICIES:
      raise ConfigError(
        f"on_bad_record must be one of {sources.BAD_RECORD_POLICIES}, "
        f"got {self.on_bad_record!r}"
      )
    if not isinstance(self.max_negatives, int) or self.max_negatives < 0:
      raise ConfigError(f"max_negatives must be >= 0, got {self.max_negatives!r}")
    if self.vocabulary is None and self.vocabulary_size is None:
      raise ConfigError(
        "no vocabulary: set VOCABULARY to a SentencePiece model (such as Gemma's "
        "tokenizer.model) or VOCABULARY_SIZE to train one on the mixture"
      )

  @property
  def cache_root(self) -> pathlib.Path:
    return pathlib.Path(self.cache_dir or default_cache_dir())

  @property
  def max_length(self) -> int:
    return max(self.lengths.values())

  def selected(self) -> tuple[Task, ...]:
    """The declared tasks that the run reads: the named one, or all."""
    named = tuple(t for t in self.tasks if t.name == self.mixture_or_task_name)
    return named or tuple(self.tasks)

  def corpus_fingerprint(self) -> list[Any]:
    """Identifies the texts, prompts included, before tokenisation."""
    return [
      self.mixture_or_task_name,
      [task.fingerprint() for task in self.selected()],
      [sources.module_fingerprint(name) for name in self.modules],
      self.on_bad_record,
    ]

  def vocabulary_path(self) -> pathlib.Path:
    """The vocabulary's file; a trained one lies in the cache, under what it saw.

    Raises:
      DataError: the file named does not exist.
    """
    if self.vocabulary is not None:
      path = pathlib.Path(self.vocabulary)
      if not path.is_file():
        raise DataError(f"{path}: no such SentencePiece model; check VOCABULARY")
      return path
    key = digest(["vocabulary", self.vocabulary_size, self.corpus_fingerprint()])
    return self.cache_root / "vocabularies" / key / "tokenizer.model"

  def manifest_path(self) -> pathlib.Path:
    """The file that names the caches of this configuration, once they are complete."""
    path = self.vocabulary_path()
    vocabulary = digest([path.read_bytes().hex()]) if path.is_file() else str(path)
    key = digest(
      [
        CACHE_FORMAT,
        self.corpus_fingerprint(),
        sorted((task.name, task.rate) for task in self.selected()),
        sorted(self.lengths.items()),
        self.max_negatives,
        vocabulary,
      ]
    )
    name = f"{self.mixture_or_task_name}-{key}.json"
    return self.cache_root / "mixtures" / name


def digest(value: Any) -> str:
  """16 hexadecimal digits that identify a JSON value."""
  encoded = json.dumps(value, sort_keys=True).encode()
  return hashlib.blake2b(encoded, digest_size=8).hexdigest()
