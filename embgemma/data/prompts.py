"""The prompt templates of EmbeddingGemma, and which one each kind of task uses."""

import dataclasses
import types
from collections.abc import Mapping

from embgemma.errors import ConfigError

_SEARCH = "task: search result | query: "
_DOCUMENT = "title: none | text: "
_CLASSIFICATION = "task: classification | query: "
_SIMILARITY = "task: sentence similarity | query: "

OFFICIAL_PROMPTS: Mapping[str, str] = types.MappingProxyType(
  {
    "query": _SEARCH,
    "document": _DOCUMENT,
    "BitextMining": _SEARCH,
    "Clustering": "task: clustering | query: ",
    "Classification": _CLASSIFICATION,
    "InstructionRetrieval": "task: code retrieval | query: ",
    "MultilabelClassification": _CLASSIFICATION,
    "PairClassification": _SIMILARITY,
    "Reranking": _SEARCH,
    "Retrieval": _SEARCH,
    "Retrieval-query": _SEARCH,
    "Retrieval-document": _DOCUMENT,
    "STS": _SIMILARITY,
    "Summarization": "task: summarization | query: ",
  }
)
"""The 14 named prompts released with EmbeddingGemma-300M
(`config_sentence_transformers.json`). Its successor has another table: the two
must not be mixed."""

MODEL_CARD_PROMPTS: Mapping[str, str] = types.MappingProxyType(
  {
    "QuestionAnswering": "task: question answering | query: ",
    "FactChecking": "task: fact checking | query: ",
  }
)
"""Task strings that only the model card gives; the names are ours."""

NO_PROMPT = "none"
"""The name of the empty prompt."""

PROMPTS: Mapping[str, str] = types.MappingProxyType(
  {**OFFICIAL_PROMPTS, **MODEL_CARD_PROMPTS, NO_PROMPT: ""}
)
"""Every prompt by name: what checkpoints carry."""

_TITLED = frozenset({"document", "Retrieval-document"})


def prompt(name: str) -> str:
  """Returns the string that goes in front of a text, its last space included.

  The model saw prompt and text tokenised as one string: join them before
  encoding, never afterwards.

  Raises:
    ConfigError: no prompt has this name.
  """
  try:
    return PROMPTS[name]
  except KeyError:
    names = ", ".join(sorted(PROMPTS))
    raise ConfigError(
      f"prompt {name!r} does not exist; the names (case matters) are: {names}"
    ) from None


def document(text: str, title: str | None = None) -> str:
  """Returns a passage in the document template, "none" where it has no title."""
  return f"title: {title or 'none'} | text: {text}"


@dataclasses.dataclass(frozen=True)
class TaskPrompts:
  """The names of the prompts on both sides of a task.

  Raises:
    ConfigError: a name is not in the table.
  """

  query: str = "query"
  document: str = "document"

  def __post_init__(self) -> None:
    prompt(self.query)
    prompt(self.document)

  def format_query(self, text: str) -> str:
    """Returns the query side's prompt followed by the text."""
    return prompt(self.query) + text

  def format_document(self, text: str, title: str | None = None) -> str:
    """Returns the text with the document side's prompt.

    Only the document template has a place for a title; with any other prompt the
    title becomes the first words of the text.
    """
    if self.document in _TITLED:
      return document(text, title)
    return prompt(self.document) + (f"{title} {text}" if title else text)


TASK_PROMPTS: Mapping[str, TaskPrompts] = types.MappingProxyType(
  {
    "search": TaskPrompts(),
    "qa": TaskPrompts(query="QuestionAnswering"),
    "fact_checking": TaskPrompts(query="FactChecking"),
    "code": TaskPrompts(query="InstructionRetrieval"),
    "similarity": TaskPrompts("STS", "STS"),
    "bitext": TaskPrompts("BitextMining", "BitextMining"),
    "classification": TaskPrompts("Classification", "Classification"),
    "clustering": TaskPrompts("Clustering", "Clustering"),
    "summarization": TaskPrompts("Summarization", "Summarization"),
    "reranking": TaskPrompts("Reranking", "Reranking"),
  }
)
"""Prompts by the `task` of a JSONL record. Where MTEB evaluates with one prompt for
the task type on both sides (reranking too), training does the same."""
