"""A task of every type of mteb's, made from the standard library's documentation.

For checks without a network: `embgemma eval --task_modules=stdlib_tasks`, with this
folder on PYTHONPATH. Scores say little of a model; each type's path through mteb is
the real one.
"""

import random
import re
from collections import Counter
from typing import Any

from datasets import Dataset, DatasetDict
from mteb._evaluators.retrieval_metrics import evaluate_p_mrr_change
from mteb.abstasks import (
  AbsTaskClassification,
  AbsTaskClustering,
  AbsTaskMultilabelClassification,
  AbsTaskPairClassification,
  AbsTaskRetrieval,
  AbsTaskSTS,
)
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.text.bitext_mining import AbsTaskBitextMining
from mteb.abstasks.text.summarization import AbsTaskSummarization

from embgemma.data import builtin_corpus

_COUNT = 120  # pairs of most tasks
_CANDIDATES = 12
_LABELS = ("return", "file", "string", "error", "object")


def _metadata(kind: Any, name: str, main_score: str) -> TaskMetadata:
  return TaskMetadata(
    type=kind,
    name=f"Stdlib{name}",
    main_score=main_score,
    description="Made from the documentation of Python's standard library.",
    reference=None,
    dataset={"path": "stdlib", "revision": builtin_corpus.fingerprint()},
    category="t2t",
    eval_splits=["test"],
    eval_langs=["eng-Latn"],
    date=None,
    domains=None,
    task_subtypes=None,
    license=None,
    annotations_creators=None,
    dialect=None,
    sample_creation=None,
    bibtex_citation=None,
  )


def _train_and_test(texts: list[str], labels: list[Any]) -> DatasetDict:
  """Every other one."""
  halves = {"train": slice(0, None, 2), "test": slice(1, None, 2)}
  return DatasetDict(
    {
      split: Dataset.from_dict({"text": texts[half], "label": labels[half]})
      for split, half in halves.items()
    }
  )


def _pairs() -> list[dict[str, str]]:
  """Summaries and what follows them, with the name of what is documented."""
  return list(builtin_corpus.examples("stdlib_docs", "validation"))[:_COUNT]


def _split(**columns: list[Any]) -> DatasetDict:
  return DatasetDict({"test": Dataset.from_dict(columns)})


def _retrieval(ranked: bool, instructions: bool = False) -> Any:
  pairs, draw = _pairs(), random.Random(0)
  ids = [f"d{i}" for i in range(len(pairs))]
  corpus = [
    {"id": of, "title": pair.get("title", ""), "text": pair["positive"]}
    for of, pair in zip(ids, pairs, strict=True)
  ]
  queries, relevant, top = [], {}, {}
  for i, pair in enumerate(pairs):
    if ranked:
      others = draw.sample([of for of in ids if of != ids[i]], _CANDIDATES - 1)
      candidates = draw.sample([ids[i], *others], _CANDIDATES)
    for end in ("-og", "-changed") if instructions else ("",):
      name = f"q{i}{end}"
      query = {"id": name, "text": pair["query"]}
      if instructions:
        query["instruction"] = (
          "Give what documents it."
          if end == "-og"
          else "Give only what is not about the library."
        )
      queries.append(query)
      relevant[name] = {ids[i]: 0 if end == "-changed" else 1}
      if ranked:
        top[name] = candidates
  split = RetrievalSplitData(
    corpus=Dataset.from_list(corpus),
    queries=Dataset.from_list(queries),
    relevant_docs=relevant,
    top_ranked=top or None,
  )
  return {"default": {"test": split}}


class StdlibRetrieval(AbsTaskRetrieval):
  metadata = _metadata("Retrieval", "Retrieval", "ndcg_at_10")

  def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
    self.dataset, self.data_loaded = _retrieval(ranked=False), True


class StdlibReranking(AbsTaskRetrieval):
  metadata = _metadata("Reranking", "Reranking", "map_at_1000")

  def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
    self.dataset, self.data_loaded = _retrieval(ranked=True), True


class StdlibInstructionReranking(AbsTaskRetrieval):
  metadata = _metadata("InstructionReranking", "InstructionReranking", "p-MRR")

  def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
    self.dataset, self.data_loaded = _retrieval(ranked=True, instructions=True), True

  def task_specific_scores(
    self, scores: Any, qrels: Any, results: Any, hf_split: str, hf_subset: str
  ) -> dict[str, float]:
    ids = range(len(_pairs()))
    changed = {f"q{i}": [f"d{i}"] for i in ids}  # relevant before, and no longer
    return evaluate_p_mrr_change(qrels, results, changed, self.k_values)


class StdlibSTS(AbsTaskSTS):
  metadata = _metadata("STS", "STS", "cosine_spearman")
  min_score, max_score = 0, 1

  def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
    pairs = _pairs()
    ones = [pair["query"] for pair in pairs]
    twos = [pairs[i - i % 3]["positive"] for i in range(len(pairs))]
    scores = [_overlap(one, two) for one, two in zip(ones, twos, strict=True)]
    self.dataset = _split(sentence1=ones, sentence2=twos, score=scores)
    self.data_loaded = True


class StdlibPairClassification(AbsTaskPairClassification):
  metadata = _metadata("PairClassification", "PairClassification", "max_ap")

  def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
    pairs = _pairs()
    labels = [i % 2 for i in range(len(pairs))]
    self.dataset = _split(
      sentence1=[pair["query"] for pair in pairs],
      sentence2=[pairs[i - 1 + label]["positive"] for i, label in enumerate(labels)],
      labels=labels,
    )
    self.data_loaded = True


class StdlibClassification(AbsTaskClassification):
  metadata = _metadata("Classification", "Classification", "accuracy")

  def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
    texts, labels = _by_module("train")
    self.dataset, self.data_loaded = _train_and_test(texts, labels), True


class StdlibMultilabelClassification(AbsTaskMultilabelClassification):
  metadata = _metadata("MultilabelClassification", "MultilabelClassification", "lrap")

  def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
    texts, labels = [], []
    for record in builtin_corpus.examples("stdlib_docs", "train"):
      text = record["positive"][:300]
      own = [i for i, word in enumerate(_LABELS) if word in text.lower()]
      if own and len(texts) < 4 * _COUNT:
        texts.append(text)
        labels.append(own)
    self.dataset, self.data_loaded = _train_and_test(texts, labels), True


class StdlibClustering(AbsTaskClustering):
  metadata = _metadata("Clustering", "Clustering", "v_measure")
  max_fraction_of_documents_to_embed = None
  max_document_to_embed = 2 * _COUNT

  def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
    texts, labels = _by_module("train")
    self.dataset, self.data_loaded = _split(sentences=texts, labels=labels), True


class StdlibBitextMining(AbsTaskBitextMining):
  metadata = _metadata("BitextMining", "BitextMining", "f1")

  def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
    pairs = _pairs()
    self.dataset = _split(
      sentence1=[pair["query"] for pair in pairs],
      sentence2=[pair["positive"] for pair in pairs],
    )
    self.data_loaded = True


class StdlibSummarization(AbsTaskSummarization):
  metadata = _metadata("Summarization", "Summarization", "cosine_spearman")
  min_score, max_score = 0, 1

  def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
    pairs = _pairs()
    texts, humans, machines, relevance = [], [], [], []
    for i, pair in enumerate(pairs):
      made = [pairs[(i + step) % len(pairs)]["query"] for step in (0, 1, 7, 31)]
      texts.append(pair["positive"])
      humans.append([pair["query"]])
      machines.append(made)
      relevance.append([_overlap(pair["positive"], summary) for summary in made])
    self.dataset = _split(
      text=texts,
      human_summaries=humans,
      machine_summaries=machines,
      relevance=relevance,
    )
    self.data_loaded = True


def _by_module(split: str) -> tuple[list[str], list[int]]:
  """Texts of the modules that have most, and the number of each one's module."""
  records = list(builtin_corpus.examples("stdlib_docs", split))
  modules = [record["source"].split("/")[0].split(".")[0] for record in records]
  common = [name for name, _ in Counter(modules).most_common(8)]
  chosen = [
    (record["positive"][:400], common.index(module))
    for record, module in zip(records, modules, strict=True)
    if module in common
  ]
  random.Random(0).shuffle(chosen)
  chosen = chosen[: 4 * _COUNT]
  return [text for text, _ in chosen], [label for _, label in chosen]


def _overlap(one: str, two: str) -> float:
  """Share of words that two texts have in common."""
  words = [set(re.findall(r"\w+", text.lower())) for text in (one, two)]
  return len(words[0] & words[1]) / max(1, len(words[0] | words[1]))
