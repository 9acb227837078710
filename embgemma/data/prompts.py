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

_NO_TITLE = "title: none"


def prompt(name: str, table: Mapping[str, str] = PROMPTS) -> str:
  """Returns the string that goes in front of a text, its last space included.

  The model saw prompt and text tokenised as one string: join them before
  encoding, never afterwards.

  Raises:
    ConfigError: the table has no prompt of this name.
  """
  try:
    return table[name]
  except KeyError:
    names = ", ".join(sorted(table))
    raise ConfigError(
      f"prompt {name!r} does not exist; the names (case matters) are: {names}"
    ) from None


def has_title(template: str) -> bool:
  """Whether a document's prompt has a place for its title."""
  return _NO_TITLE in template


def document(text: str, title: str | None = None, template: str = _DOCUMENT) -> str:
  """Returns a passage in the document template, "none" where it has no title.

  A template without "title: none" has no place for a title, which then becomes the
  first words of the text.
  """
  if not title:
    return template + text
  if has_title(template):
    return template.replace(_NO_TITLE, f"title: {title}", 1) + text
  return f"{template}{title} {text}"


@dataclasses.dataclass(frozen=True)
class TaskPrompts:
  """The names of the prompts on both sides of a task, and the table they are of.

  Raises:
    ConfigError: a name is not in the table.
  """

  query: str = "query"
  document: str = "document"
  table: Mapping[str, str] = dataclasses.field(
    default_factory=lambda: PROMPTS, repr=False, hash=False
  )

  def __post_init__(self) -> None:
    for name in (self.query, self.document):
      prompt(name, self.table)

  @property
  def texts(self) -> tuple[str, str]:
    """The prompts themselves."""
    return prompt(self.query, self.table), prompt(self.document, self.table)

  @property
  def symmetric(self) -> bool:
    """Whether both sides have the same prompt."""
    query, passage = self.texts
    return query == passage

  def format_query(self, text: str) -> str:
    """Returns the query side's prompt followed by the text."""
    return self.texts[0] + text

  def format_document(self, text: str, title: str | None = None) -> str:
    """Returns the text with the document side's prompt."""
    return document(text, title, self.texts[1])


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


def task_prompts(kind: str, table: Mapping[str, str] = PROMPTS) -> TaskPrompts:
  """The prompts of a kind of task, from a table.

  Args:
    kind: A key of `TASK_PROMPTS`, or the names of two prompts: "QUERY/DOCUMENT".
    table: Prompts by name.

  Raises:
    ConfigError: there is no such kind, or the table lacks a prompt.
  """
  if kind in TASK_PROMPTS:
    names = TASK_PROMPTS[kind]
    return TaskPrompts(names.query, names.document, table)
  query, separator, passage = kind.partition("/")
  if not separator:
    raise ConfigError(
      f"unknown kind {kind!r}; there are {sorted(TASK_PROMPTS)}, and 'A/B' is prompt A "
      "for queries and prompt B for documents"
    )
  return TaskPrompts(query, passage, table)


def with_changes(changes: Mapping[str, str]) -> Mapping[str, str]:
  """`PROMPTS` with some replaced and others added.

  Raises:
    ConfigError: a name is empty, or has a "/", which separates two names.
  """
  for name in changes:
    if not name or "/" in name:
      raise ConfigError(f"PROMPTS: {name!r} is no name of a prompt; use letters")
  return types.MappingProxyType({**PROMPTS, **changes})
