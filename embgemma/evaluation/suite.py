"""Evaluations declared by name, and what a run keeps of their results."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from embgemma.data import builtin_corpus
from embgemma.data.prompts import PROMPTS, TASK_PROMPTS, TaskPrompts, task_prompts
from embgemma.errors import ConfigError, DataError
from embgemma.evaluation.bm25 import bm25_metrics
from embgemma.evaluation.mteb_runner import MtebEvaluator
from embgemma.evaluation.retrieval import EncodeFn, RetrievalData, RetrievalEvaluator
from embgemma.evaluation.statistics import Sample
from embgemma.evaluation.sts import PairClassificationEvaluator, StsEvaluator

BUILTIN = "builtin:"
MTEB = "mteb:"
# The metric that stands for a task in means and in keep-best.
MAIN_METRICS = ("ndcg@10", "spearman", "average_precision", "main_score")
LOSS = "loss"  # likewise, of pretrained stacks: the lower the better

TaskResults = dict[str, dict[str, float]]


@runtime_checkable
class Evaluator(Protocol):
  """A named evaluation of an encode function."""

  @property
  def name(self) -> str: ...

  def check(self) -> None: ...

  def evaluate(self, encode: EncodeFn) -> dict[str, float]: ...


@runtime_checkable
class SampledEvaluator(Evaluator, Protocol):
  """One that also has what its main metric is made of, by example."""

  @property
  def main_metric(self) -> str: ...

  def sample(self, encode: EncodeFn) -> Sample: ...


def builtin_retrieval(task: str) -> RetrievalData:
  """The held-out pairs of a built-in task: each query's document is its positive."""
  if task not in builtin_corpus.TASKS:
    raise ConfigError(
      f"unknown built-in task {task!r}; there are {sorted(builtin_corpus.TASKS)}"
    )
  return RetrievalData.from_pairs(
    (record["query"], record.get("title", ""), record["positive"], "")
    for record in builtin_corpus.examples(task, "validation")
  )


def evaluators(
  entries: Mapping[str, str | Mapping[str, Any]],
  widths: Sequence[int],
  vectors: Sequence[str] = ("float32",),
  table: Mapping[str, str] = PROMPTS,
) -> tuple[Evaluator, ...]:
  """Evaluators from a mapping, as gin's EVALUATIONS gives it.

  Args:
    entries: Name to a path, or to {"path": str, "kind"?: str}. The path is a folder
      in the BEIR layout, a JSONL file of pairs, "builtin:TASK", "mteb:TASK" (mteb's
      task of that name, with its own prompts and main score), or for the kinds
      "sts" and "pair_classification" a JSONL file of sentence pairs; any other kind
      picks the prompts of a retrieval task (default "search"), "A/B" prompt A for
      queries and B for documents.
    widths: Matryoshka widths.
    vectors: Formats in which vectors are kept (`vector_formats`); mteb's tasks have
      float32.
    table: The model's prompts by name; those that it lacks are of PROMPTS.

  Raises:
    ConfigError: unknown kind or key.
  """
  made: list[Evaluator] = []
  table = {**PROMPTS, **table}
  for name, entry in entries.items():
    options: dict[str, Any]
    options = {"path": entry} if isinstance(entry, str) else dict(entry)
    if "path" not in options or set(options) - {"path", "kind"}:
      raise ConfigError(
        f"evaluation {name!r}: needs 'path' and takes 'kind', got {sorted(options)}"
      )
    path = options["path"]
    if path.startswith(MTEB):
      if "kind" in options:
        raise ConfigError(f"evaluation {name!r}: a task of mteb's has its own kind")
      if tuple(vectors) != ("float32",):
        raise ConfigError(
          f"evaluation {name!r}: of mteb's tasks vectors of other formats are for "
          "`embgemma eval --tasks`"
        )
      made.append(MtebEvaluator(name, path.removeprefix(MTEB), widths, table))
      continue
    builtin = path.removeprefix(BUILTIN) if path.startswith(BUILTIN) else ""
    default = builtin_corpus.TASKS.get(builtin, "search")
    kind = options.get("kind", default)
    if kind == "sts":
      both = TaskPrompts("STS", "STS", table)
      made.append(StsEvaluator(name, path, both, widths, vectors))
    elif kind == "pair_classification":
      both = TaskPrompts("PairClassification", "PairClassification", table)
      made.append(PairClassificationEvaluator(name, path, both, widths, vectors))
    elif kind in TASK_PROMPTS or "/" in kind:
      data = builtin_retrieval(builtin) if builtin else path
      sides = task_prompts(kind, table)
      made.append(RetrievalEvaluator(name, data, sides, widths, vectors=vectors))
    else:
      raise ConfigError(
        f"evaluation {name!r}: unknown kind {kind!r}; there are "
        f"{sorted([*TASK_PROMPTS, 'sts', 'pair_classification'])}"
      )
  return tuple(made)


def sampled(chosen: Sequence[Evaluator]) -> list[SampledEvaluator]:
  """Those of which intervals and paired tests can be had: not mteb's tasks."""
  return [each for each in chosen if isinstance(each, SampledEvaluator)]


def bm25_results(chosen: Sequence[Any]) -> TaskResults:
  """BM25 on the retrieval tasks among the evaluators."""
  return {
    evaluator.name: bm25_metrics(evaluator.collection)
    for evaluator in chosen
    if isinstance(evaluator, RetrievalEvaluator)
  }


def main_scores(results: TaskResults) -> dict[str, float]:
  """What stands for each task; higher is better.

  It is the main metric at the widest width, in 0..1, or a loss with its sign turned.
  Tasks that have neither, such as those of other vectors than float32, have none.
  """
  scores = {}
  for task, metrics in results.items():
    if LOSS in metrics:
      scores[task] = -metrics[LOSS]
      continue
    widest: dict[int, float] = {}
    for key, value in metrics.items():
      metric, _, width = key.rpartition("/")
      if metric in MAIN_METRICS:
        widest[int(width)] = value
    if widest:
      scores[task] = widest[max(widest)]
  return scores


def mean_score(results: TaskResults) -> float:
  """Mean over tasks of `main_scores`."""
  return float(np.mean(list(main_scores(results).values())))


def read_results(path: pathlib.Path) -> dict[str, TaskResults]:
  """Results of a run by step, as a run keeps them; {} if there are none.

  Raises:
    DataError: the file is damaged.
  """
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return {}
  except json.JSONDecodeError as error:
    raise DataError(f"{path}: damaged ({error}); delete it") from error
