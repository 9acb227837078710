"""Benchmarks of mteb, run by mteb, with a checkpoint's vectors.

Tasks, metrics and files of results are mteb's own (the extra `eval`, imported by the
functions that need it); ours is how texts are embedded, and that a task that fails
keeps no other back.
"""

import contextlib
import copy
import dataclasses
import functools
import importlib
import inspect
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from embgemma.errors import ConfigError, DataError, TrainingError, of_extra
from embgemma.evaluation.mteb_encoder import MtebEncoder, model_meta
from embgemma.evaluation.retrieval import EncodeFn
from embgemma.evaluation.vector_cache import VectorCache
from embgemma.models.config import VECTOR_FORMATS
from embgemma.quiet import quiet

BATCH = 1024  # texts that mteb hands over at once; all of a call are packed together
# The paper gives 512 tokens, and more to long ones, of which it names this.
TASK_LENGTHS: Mapping[str, int] = {"LEMBPasskeyRetrieval": 2048}
DEFAULT_LENGTH = 512
# mteb's CompressionWrapper has all of ours but this one, which is binary's numbers.
FORMATS = tuple(name for name in VECTOR_FORMATS if name != "ubinary")


@dataclasses.dataclass(frozen=True)
class BenchmarkModel:
  """A model as a benchmark sees it.

  Attributes:
    name: Such as "me/my-model".
    revision: Changes with the weights.
    full_width: Of its vectors.
    max_length: Most tokens of a text, of any task.
    prompts: By mteb's keys; a task's name is one.
    encoder: From tokens after which a text is cut to what embeds texts.
    titles: See `MtebEncoder`.
  """

  name: str
  revision: str
  full_width: int
  max_length: int
  prompts: Mapping[str, str]
  encoder: Callable[[int], EncodeFn]
  titles: bool = True


@dataclasses.dataclass(frozen=True)
class TaskOutcome:
  """What became of a task at a width.

  Attributes:
    task: Its name.
    width: Components kept.
    vectors: Format in which they are kept.
    score: Mean of its main score over splits and subsets; None where it failed.
    error: Why it failed; "".
    seconds: That it took; 0 where the result was there.
    texts: Embedded for it, each once.
  """

  task: str
  width: int
  vectors: str
  score: float | None
  error: str
  seconds: float
  texts: int


def tasks(
  benchmark: str | None, names: Sequence[str], modules: Sequence[str]
) -> list[Any]:
  """mteb's tasks: those of a benchmark, single ones, and one's own.

  Args:
    benchmark: Such as "MTEB(Multilingual, v2)".
    names: Of registered tasks, or of tasks in `modules`.
    modules: Python modules whose subclasses of mteb's tasks are meant, all of them
      where no names are given.

  Raises:
    ConfigError: there is no such benchmark, task or module.
  """
  import mteb

  own = {task.metadata.name: task for name in modules for task in _defined(name)}
  found: list[Any] = []
  if benchmark:
    try:
      found += list(mteb.get_benchmark(benchmark).tasks)
    except KeyError as error:
      raise ConfigError(f"--benchmark: {_said(error)}") from error
  for name in names:
    if name in own:
      found.append(own[name])
      continue
    try:
      found.append(mteb.get_task(name))
    except KeyError as error:
      raise ConfigError(f"--tasks: {_said(error)}") from error
  return found if names else [*found, *own.values()]


def _defined(module: str) -> Iterator[Any]:
  """The tasks that a module defines, in its order."""
  from mteb.abstasks import AbsTask

  try:
    namespace = vars(importlib.import_module(module))
  except ImportError as error:
    raise ConfigError(
      f"--task_modules={module}: cannot be imported: {error}"
    ) from error
  count = 0
  for value in namespace.values():
    if (
      inspect.isclass(value)
      and issubclass(value, AbsTask)
      and value.__module__ == module
      and hasattr(value, "metadata")
    ):
      count += 1
      yield value()
  if not count:
    raise ConfigError(f"--task_modules={module}: defines no task of mteb's")


def _said(error: KeyError) -> str:
  return str(error.args[0]).removeprefix("KeyError: ")


def use_local_data(chosen: Sequence[Any], directory: pathlib.Path) -> list[str]:
  """Lets tasks read `directory`/TASK in place of the hub; names of those without.

  Each is a copy of the task's data set repository, such as `hf download --repo-type
  dataset` makes.

  Raises:
    ConfigError: there is no such directory.
  """
  if not directory.is_dir():
    raise ConfigError(f"--mteb_data={directory}: no such directory")
  missing = []
  for task in chosen:
    own = directory / task.metadata.name
    if task.is_aggregate:
      missing += use_local_data(task.metadata.tasks, directory)
    elif own.is_dir():
      source = {**task.metadata.dataset, "path": str(own)}
      task.metadata = task.metadata.model_copy(update={"dataset": source})
    else:
      missing.append(task.metadata.name)
  return missing


def run(
  model: BenchmarkModel,
  chosen: Sequence[Any],
  widths: Sequence[int],
  results: pathlib.Path,
  *,
  vectors: Sequence[str] = ("float32",),
  task_lengths: Mapping[str, int] = TASK_LENGTHS,
  length: int = DEFAULT_LENGTH,
  said: Callable[[TaskOutcome], None] = lambda outcome: None,
) -> list[TaskOutcome]:
  """Evaluates at all widths, each text of a task embedded once.

  What is in `results` is not done again; what of a task is missing there is. A task
  that fails is said so, and the next begins.

  Args:
    model: Of the vectors.
    chosen: mteb's tasks.
    widths: Components kept.
    results: Folder that gets `results/` in mteb's layout.
    vectors: Formats in which vectors are kept, of FORMATS, as mteb's own
      `CompressionWrapper` rounds them.
    task_lengths: Tokens after which texts of a task are cut.
    length: Those of all others.
    said: Called after each task at each width.

  Raises:
    ConfigError: a length or width is beyond the model's, or mteb has no such format.
  """
  import mteb

  for name, tokens in {"the default": length, **task_lengths}.items():
    if not 3 <= tokens <= model.max_length and (
      name == "the default" or any(t.metadata.name == name for t in chosen)
    ):
      raise ConfigError(
        f"{tokens} tokens of a text ({name}): the model takes 3 to {model.max_length}"
      )
  for width in widths:
    if not 1 <= width <= model.full_width:
      raise ConfigError(f"width {width} is not in 1..{model.full_width}, the model's")
  unknown = sorted(set(vectors) - set(FORMATS))
  if unknown:
    raise ConfigError(f"vectors {', '.join(unknown)}: mteb has {', '.join(FORMATS)}")
  cache = mteb.ResultCache(results)
  encoders: dict[int, EncodeFn] = {}
  outcomes = []
  for task in chosen:
    tokens = task_lengths.get(task.metadata.name, length)
    if tokens not in encoders:
      encoders[tokens] = model.encoder(tokens)
    texts, draws = VectorCache(encoders[tokens]), _Draws()
    for width in widths:
      for kept in vectors:
        outcome = _evaluated(model, task, width, kept, tokens, texts, draws, cache)
        outcomes.append(outcome)
        said(outcome)
    with contextlib.suppress(Exception):  # of a task that failed to load
      task.unload_data()
  return outcomes


def _evaluated(
  model: BenchmarkModel,
  task: Any,
  width: int,
  kept: str,
  tokens: int,
  vectors: VectorCache,
  draws: "_Draws",
  cache: Any,
) -> TaskOutcome:
  usual = min(TASK_LENGTHS.get(task.metadata.name, DEFAULT_LENGTH), model.max_length)
  experiment: dict[str, Any] = {}
  if width != model.full_width:
    experiment["embed_dim"] = width
  if tokens != usual:
    experiment["max_tokens"] = tokens
  if not model.titles:
    experiment["titles"] = "joined"
  meta = model_meta(model.name, model.revision, width, tokens, experiment)
  encoder: Any = MtebEncoder(meta, vectors, width, model.prompts, model.titles)
  if kept != "float32":
    encoder = _compressed(encoder, kept)
    meta = encoder.mteb_model_meta
  name, embedded, began = task.metadata.name, vectors.texts, time.monotonic()
  try:
    with _quiet():
      whole = _is_whole(task, meta, cache)
      if not whole and not task.is_aggregate:
        if not task.data_loaded:
          task.load_data()  # once for all widths
        draws.restart(task)
      score = _score(encoder, task, cache)
  except Exception as error:  # whatever a data set or its loader raises
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return TaskOutcome(name, width, kept, None, text, time.monotonic() - began, 0)
  seconds = 0.0 if whole else time.monotonic() - began
  return TaskOutcome(name, width, kept, score, "", seconds, vectors.texts - embedded)


def _is_whole(task: Any, meta: Any, cache: Any) -> bool:
  """Whether all splits and subsets of a task are in the results."""
  name = task.metadata.name
  try:
    found = cache.load_task_result(name, meta)
  except json.JSONDecodeError:  # mteb was killed while it wrote
    cache.get_task_result_path(name, meta).unlink()
    return False
  return found is not None and not found.get_missing_evaluations(task)


def _compressed(encoder: MtebEncoder, kept: str) -> Any:
  """An encoder whose vectors mteb rounds."""
  from mteb.models import CompressionWrapper
  from mteb.types import OutputDType

  return CompressionWrapper(encoder, OutputDType(kept))


def _score(encoder: Any, task: Any, cache: Any) -> float:
  """The mean of a task's main score over its splits and subsets."""
  import mteb

  result = mteb.evaluate(
    encoder,
    task,
    co2_tracker=False,
    cache=cache,
    overwrite_strategy="only-missing",
    encode_kwargs={"batch_size": BATCH, "show_progress_bar": False},
    show_progress_bar=False,
  )
  (of_task,) = result.task_results
  # Of its own: another benchmark may have asked for more of the task.
  score = float(of_task.validate_and_filter_scores(task).get_score())
  if not math.isfinite(score):
    raise TrainingError("its score is not a number: all texts are as close")
  return score


@dataclasses.dataclass(frozen=True)
class MtebEvaluator:
  """A task of mteb's among the evaluations of a run.

  Attributes:
    name: The task's name in results.
    task: Its name in mteb.
    widths: Prefixes to cut; texts are embedded once for all of them.
    prompts: By mteb's keys.
  """

  name: str
  task: str
  widths: Sequence[int]
  prompts: Mapping[str, str]

  @functools.cached_property
  def _loaded(self) -> tuple[Any, "_Draws"]:
    """The task with its data, read once, and its samples.

    Raises:
      ConfigError: mteb has no such task, or is not installed.
      DataError: its data cannot be read.
    """
    with of_extra(f"evaluation {self.name!r}", "eval"):
      (task,) = tasks(None, [self.task], ())
    try:
      with _quiet():
        task.load_data()
    except Exception as error:  # whatever a data set or its loader raises
      raise DataError(
        f"evaluation {self.name!r}: mteb cannot load {self.task}: {error}"
      ) from error
    return task, _Draws()

  def check(self) -> None:
    """Reads the data, so that a mistake shows before training starts.

    Raises:
      ConfigError, DataError: see above.
    """
    _ = self._loaded

  def evaluate(self, encode: EncodeFn) -> dict[str, float]:
    """The main score at each width, by key such as "main_score/768"."""
    vectors, found = VectorCache(encode), {}
    task, draws = self._loaded
    for width in self.widths:
      meta = model_meta("embgemma/run", "none", width, 0, {})
      encoder = MtebEncoder(meta, vectors, width, self.prompts)
      with _quiet():
        draws.restart(task)
        found[f"main_score/{width}"] = _score(encoder, task, None)
    return found


class _Draws:
  """Samples that a task draws, such as clustering's: the same at every width.

  Of a task of several subsets, as long as all are evaluated: one that goes on in their
  midst draws others for the rest, as it does in mteb.
  """

  def __init__(self) -> None:
    self._states: dict[str, Any] = {}

  def restart(self, task: Any) -> None:
    """Takes the task's generators back to where they were at the first call."""
    if not self._states:
      numbers = copy.deepcopy(task.np_rng.bit_generator.state)
      self._states = {"python": task.rng_state.getstate(), "numpy": numbers}
    task.rng_state.setstate(self._states["python"])
    task.np_rng.bit_generator.state = copy.deepcopy(self._states["numpy"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without what mteb and its data sets say of their progress."""
  with open(os.devnull, "w") as null, contextlib.redirect_stderr(null), quiet():
    yield
