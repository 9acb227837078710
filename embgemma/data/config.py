"""What a stage trains on, as configuration: tasks, lengths, vocabulary, cache."""

import abc
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from etils import epath

from embgemma.data import prompts
from embgemma.data.bad_records import BAD_RECORD_POLICIES
from embgemma.data.cache_dirs import default_cache_dir
from embgemma.data.cleaning import Cleaner
from embgemma.data.denoisers import (
  Denoiser,
  Sentinels,
  check_segment,
  feature_names,
  longest_segment,
  sentinels_needed,
  t5gemma2,
)
from embgemma.data.denoising import Corruption
from embgemma.data.fingerprints import digest, module_fingerprint
from embgemma.data.mixture import check_rates
from embgemma.data.tasks import Task
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import ConfigError, DataError

FEATURES = ("query", "positive", "negatives")
TRAINED_SENTINELS = 128  # of a vocabulary trained here, if a mixture needs no more
# Part of every fingerprint: a cache of another format is another cache.
CACHE_FORMAT = 3


@dataclasses.dataclass(frozen=True)
class CachedData(abc.ABC):
  """What data of both kinds is described by: tasks and a vocabulary.

  Attributes:
    mixture_or_task_name: A task of `tasks`; or one registered with seqio by
      `modules`; or any other name, which then means the mixture of all `tasks`.
    lengths: TASK_FEATURE_LENGTHS.
    tasks: Tasks declared in gin.
    modules: Python modules that register seqio tasks and mixtures on import.
    vocabulary: A SentencePiece model file; None trains one of `vocabulary_size`
      pieces on the mixture's texts.
    vocabulary_size: Pieces of a vocabulary trained here.
    cache_dir: Where tokenised tasks are kept; None is `default_cache_dir`.
    on_bad_record: "fail" or "skip".
    cleaning: What is left out of the tasks, in this order; see
      `embgemma.data.cleaning`.
    rates: Of the mixture: "explicit" are those of the tasks; see
      `mixture.mixture_rates`.
  """

  mixture_or_task_name: str
  lengths: Mapping[str, int]
  tasks: Sequence[Task] = ()
  modules: Sequence[str] = ()
  vocabulary: str | None = None
  vocabulary_size: int | None = None
  cache_dir: str | None = None
  on_bad_record: str = "fail"
  cleaning: Sequence[Cleaner] = ()
  rates: str | float | Mapping[str, int | float] = "explicit"

  content: ClassVar[str]  # of its tasks' sources
  _macro: ClassVar[str]  # that declares tasks

  def __post_init__(self):
    object.__setattr__(self, "tasks", tuple(self.tasks))
    object.__setattr__(self, "modules", tuple(self.modules))
    object.__setattr__(self, "cleaning", tuple(self.cleaning))
    names = [task.name for task in self.tasks]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
      raise ConfigError(f"tasks named twice: {duplicates}")
    if not self.tasks and not self.modules:
      raise ConfigError(
        f"no tasks: give {self._macro}, or MODULES that register seqio tasks"
      )
    for task in self.tasks:
      if task.source.content != self.content:
        raise ConfigError(
          f"task {task.name!r} has {task.source.content}, and this stage trains on "
          f"{self.content}; give {self._macro}"
        )
    self._check_lengths()
    check_rates(self.rates)
    if self.on_bad_record not in BAD_RECORD_POLICIES:
      raise ConfigError(
        f"on_bad_record must be one of {BAD_RECORD_POLICIES}, "
        f"got {self.on_bad_record!r}"
      )
    if self.vocabulary is None and self.vocabulary_size is None:
      raise ConfigError(
        "no vocabulary: set VOCABULARY to a SentencePiece model (such as Gemma's "
        "tokenizer.model) or VOCABULARY_SIZE to train one on the mixture"
      )

  @property
  @abc.abstractmethod
  def features(self) -> tuple[str, ...]:
    """Keys of `lengths`."""

  @property
  def sentinels_trained(self) -> int:
    """Sentinels of a vocabulary trained here."""
    return TRAINED_SENTINELS

  def _check_lengths(self) -> None:
    if set(self.lengths) != set(self.features):
      raise ConfigError(
        f"TASK_FEATURE_LENGTHS must have the keys {self.features}, got "
        f"{dict(self.lengths)}"
      )
    for feature, length in self.lengths.items():
      if not isinstance(length, int) or length < 3:
        raise ConfigError(
          f"TASK_FEATURE_LENGTHS[{feature!r}] must be at least 3 (BOS, a piece, EOS), "
          f"got {length!r}"
        )

  @property
  def cache_root(self) -> epath.Path:
    """May be remote, such as gs://bucket/cache."""
    return epath.Path(self.cache_dir or default_cache_dir())

  @property
  def max_length(self) -> int:
    return max(self.lengths.values())

  def selected(self) -> tuple[Task, ...]:
    """The declared tasks that the run reads: the named one, or all."""
    named = tuple(t for t in self.tasks if t.name == self.mixture_or_task_name)
    return named or tuple(self.tasks)

  @property
  def prompt_table(self) -> Mapping[str, str]:
    """Prompts by name."""
    return prompts.PROMPTS

  def task_fingerprint(self, name: str) -> list[Any]:
    """Identifies the texts of one task, prompts included, before tokenisation."""
    declared = {task.name: task for task in self.tasks}
    if name in declared:
      own = declared[name].fingerprint(self.prompt_table)
    else:
      own = [name, self._modules_fingerprint()]
    return [own, self.on_bad_record, self.cleaning_fingerprint()]

  def cleaned_directory(self, name: str) -> str:
    """Of what cleaning left of a task, relative to the root; prompts do not count."""
    declared = {task.name: task for task in self.tasks}
    if name in declared:
      own = [declared[name].source.fingerprint()]
    else:
      own = [module_fingerprint(module) for module in self.modules]
    key = [CACHE_FORMAT, own, self.on_bad_record, self.cleaning_fingerprint()]
    return f"cleaned/{name}-{digest(key)}"

  def cleaning_fingerprint(self) -> list[Any]:
    """What the decisions of the cleaners depend on beside a task's texts."""
    return [cleaner.fingerprint() for cleaner in self.cleaning]

  def corpus_fingerprint(self) -> list[Any]:
    """Identifies the texts of all tasks, prompts included, before tokenisation."""
    return [
      self.mixture_or_task_name,
      [task.fingerprint(self.prompt_table) for task in self.selected()],
      self._modules_fingerprint(),
      self.on_bad_record,
      self.cleaning_fingerprint(),
    ]

  def _modules_fingerprint(self) -> list[Any]:
    """What tasks of modules depend on: any prompt, as their records may name any."""
    if not self.modules:
      return []
    modules = [module_fingerprint(name) for name in self.modules]
    return [modules, sorted(self.prompt_table.items())]

  def vocabulary_path(self) -> epath.Path:
    """The vocabulary's file; a trained one lies in the cache, under what it saw.

    Raises:
      DataError: the file named does not exist.
    """
    if self.vocabulary is not None:
      path = epath.Path(self.vocabulary)
      if not path.exists() or path.is_dir():
        raise DataError(f"{path}: no such SentencePiece model; check VOCABULARY")
      return path
    seen = ["vocabulary", self.vocabulary_size, self.corpus_fingerprint()]
    if self.sentinels_trained != TRAINED_SENTINELS:
      seen.append(self.sentinels_trained)
    return self.cache_root / "vocabularies" / digest(seen) / "tokenizer.model"

  @abc.abstractmethod
  def record_key(self) -> list[Any]:
    """What records depend on beside texts and vocabulary."""

  def reading_key(self) -> list[Any]:
    """What batches depend on beside the records."""
    return []

  def task_directory(self, name: str, vocabulary_fingerprint: str) -> str:
    """Of a task's cache, relative to the root; named by all that its records hold."""
    key = [
      CACHE_FORMAT,
      self.task_fingerprint(name),
      *self.record_key(),
      vocabulary_fingerprint,
    ]
    return f"tasks/{name}-{digest(key)}"

  def manifest_path(self) -> epath.Path:
    """The file that names the caches of this configuration, once they are complete."""
    path = self.vocabulary_path()
    vocabulary = digest([path.read_bytes().hex()]) if path.exists() else str(path)
    key = digest(
      [
        CACHE_FORMAT,
        self.corpus_fingerprint(),
        sorted((task.name, task.rate, task.symmetric) for task in self.selected()),
        *self.record_key(),
        vocabulary,
        *self.reading_key(),
      ]
    )
    name = f"{self.mixture_or_task_name}-{key}.json"
    return self.cache_root / "mixtures" / name

  def mixture_key(self) -> str:
    """What tells mixtures apart, rates included: the same for the same batches."""
    rates = (
      sorted(self.rates.items()) if isinstance(self.rates, Mapping) else self.rates
    )
    return f"{self.manifest_path().stem}-{digest(rates)}"


@dataclasses.dataclass(frozen=True)
class DataConfig(CachedData):
  """Pairs to train an embedder on.

  Attributes:
    lengths: Most tokens of a query, a positive and a negative, BOS, EOS and prompt
      included: TASK_FEATURE_LENGTHS with keys query, positive, negatives.
    max_negatives: Hard negatives kept of each example, M.
    prompts: Prompts by name that replace those of `prompts.PROMPTS`, or are new.
    avoid_duplicates: Whether no text shall be twice among the queries or the positives
      of a batch, nor an example where `Task.unique_ids` tell texts apart.
    teacher: Name of the vectors of `embgemma teach` to distil from.
    one_shape: Whether the batches of a task share one shape, with room for nearly all
      of them: fewer programs to compile, more padding. Results differ by rounding.
  """

  max_negatives: int = 1
  prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  avoid_duplicates: bool = True
  teacher: str | None = None
  one_shape: bool = False

  content = "pairs"
  _macro = "JSONL_TASKS = {'name': 'pairs.jsonl'}"

  def __post_init__(self):
    super().__post_init__()
    if not isinstance(self.max_negatives, int) or self.max_negatives < 0:
      raise ConfigError(f"max_negatives must be >= 0, got {self.max_negatives!r}")
    if self.teacher is not None and not re.fullmatch(r"[A-Za-z0-9_.-]+", self.teacher):
      raise ConfigError(
        f"TEACHER {self.teacher!r}: a name of letters, digits, '_', '-' and '.', as "
        "given to `embgemma teach`"
      )
    table = self.prompt_table
    for task in self.tasks:
      task.check_kind(table)

  @property
  def features(self) -> tuple[str, ...]:
    return FEATURES

  @property
  def prompt_table(self) -> Mapping[str, str]:
    return prompts.with_changes(self.prompts)

  def record_key(self) -> list[Any]:
    return [sorted(self.lengths.items()), self.max_negatives]


@dataclasses.dataclass(frozen=True)
class TextDataConfig(CachedData):
  """Documents to pretrain an encoder-decoder or a decoder on.

  Documents are cut into segments, of which the cache has one a record; segments are
  corrupted as they are read, and packed into rows of the lengths.

  Attributes:
    lengths: Tokens of a row of inputs and of one of targets, controls included:
      TASK_FEATURE_LENGTHS with keys inputs and targets; targets alone where all
      denoisers are causal.
    denoisers: The mixture, such as `denoisers.t5gemma2()`.
    segment_tokens: Most tokens of a segment; None is as many as fit the lengths under
      every denoiser. Fewer fill rows better: more than one segment fits a row.
    sentinels: None is those of the vocabulary, `<unused100>` and on. For a vocabulary
      that has none: ids that no text gives, such as rows of the model's table beyond
      the vocabulary.
  """

  denoisers: Sequence[Denoiser] = t5gemma2()
  segment_tokens: int | None = None
  sentinels: Sentinels | None = None

  content = "text"
  _macro = "TEXT_TASKS = {'name': 'documents.jsonl'}"

  def __post_init__(self):
    object.__setattr__(self, "denoisers", tuple(self.denoisers))
    super().__post_init__()
    check_segment(self.denoisers, self.lengths, self.longest)

  @property
  def features(self) -> tuple[str, ...]:
    return feature_names(self.denoisers)

  @property
  def longest(self) -> int:
    """Most tokens of a segment."""
    if self.segment_tokens is not None:
      return self.segment_tokens
    return longest_segment(self.denoisers, self.lengths)

  @property
  def sentinels_trained(self) -> int:
    # `sentinel_ids` leaves the block's first to others.
    return max(TRAINED_SENTINELS, 1 + sentinels_needed(self.denoisers, self.longest))

  def record_key(self) -> list[Any]:
    return ["segments", self.longest]

  def reading_key(self) -> list[Any]:
    sentinels = self.sentinels and dataclasses.astuple(self.sentinels)
    mixture = [dataclasses.astuple(denoiser) for denoiser in self.denoisers]
    return [sorted(self.lengths.items()), mixture, sentinels]

  def corruption(
    self, vocabulary: SentencePieceVocabulary, table_rows: int
  ) -> Corruption:
    """What is done to segments of this vocabulary.

    Args:
      vocabulary: Of the run.
      table_rows: Of the model's table: ids must be below.

    Raises:
      ConfigError: there are too few sentinels, or a sentinel or mode token is an id
        that texts have, or outside the table.
    """
    sentinels, found = self.sentinels, vocabulary.sentinel_ids()
    if sentinels is None and found:
      sentinels = Sentinels(found.start, len(found))
    modes = [d.mode for d in self.denoisers if d.mode is not None]
    controls = {vocabulary.pad_id, vocabulary.bos_id, vocabulary.eos_id}
    used = [] if sentinels is None else list(sentinels.ids)
    for what, ids in (("sentinel", used), ("mode token", modes)):
      for token_id in ids:
        reason = None
        if token_id >= table_rows:
          reason = f"the model's table has {table_rows} rows"
        elif vocabulary.is_text(token_id) or token_id in controls:
          reason = "it is a piece of the vocabulary that texts use"
        elif what == "mode token" and token_id in used:
          reason = "it is a sentinel too"
        if reason is not None:
          raise ConfigError(
            f"{what} {token_id}: {reason}; choose an id of an <unusedN> piece, or one "
            "between the vocabulary's size and the table's"
          )
    return Corruption(
      tuple(self.denoisers),
      self.lengths,
      self.longest,
      sentinels,
      vocabulary.bos_id,
      vocabulary.eos_id,
    )
