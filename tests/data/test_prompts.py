import dataclasses
import subprocess
import sys

import pytest

from embgemma.data import prompts
from embgemma.errors import ConfigError

# The released table, grouped by string.
_EXPECTED = {
  "task: search result | query: ": {
    "query",
    "Retrieval-query",
    "Retrieval",
    "Reranking",
    "BitextMining",
  },
  "title: none | text: ": {"document", "Retrieval-document"},
  "task: clustering | query: ": {"Clustering"},
  "task: classification | query: ": {"Classification", "MultilabelClassification"},
  "task: code retrieval | query: ": {"InstructionRetrieval"},
  "task: sentence similarity | query: ": {"PairClassification", "STS"},
  "task: summarization | query: ": {"Summarization"},
}


def test_official_table_is_the_released_one():
  expected = {name: text for text, names in _EXPECTED.items() for name in names}
  assert len(expected) == 14
  assert dict(prompts.OFFICIAL_PROMPTS) == expected
  assert {name: prompts.prompt(name) for name in expected} == expected


def test_model_card_prompts_are_reachable_but_not_official():
  assert prompts.prompt("QuestionAnswering") == "task: question answering | query: "
  assert prompts.prompt("FactChecking") == "task: fact checking | query: "
  assert not set(prompts.MODEL_CARD_PROMPTS) & set(prompts.OFFICIAL_PROMPTS)


def test_tables_cannot_be_changed():
  with pytest.raises(TypeError):
    prompts.OFFICIAL_PROMPTS["query"] = ""


def test_empty_prompt():
  bare = prompts.TaskPrompts(query="none", document="none")
  assert prompts.prompt("none") == ""
  assert bare.format_query("a") == "a"
  assert bare.format_document("a") == "a"
  assert bare.format_document("a", "T") == "T a"


@pytest.mark.parametrize("name", ["Query", "", "passage", "title: none | text: "])
def test_unknown_prompt_lists_the_names(name):
  with pytest.raises(ConfigError, match=r"InstructionRetrieval.*QuestionAnswering"):
    prompts.prompt(name)
  with pytest.raises(ConfigError):
    prompts.TaskPrompts(document=name)
  with pytest.raises(ConfigError):
    prompts.TaskPrompts(query=name)


@pytest.mark.parametrize("title", [None, ""])
def test_document_without_a_title_is_the_official_prompt(title):
  assert prompts.document("x", title) == prompts.prompt("document") + "x"


@pytest.mark.parametrize("name", ["document", "Retrieval-document"])
def test_document_names_use_the_title_template(name):
  task = prompts.TaskPrompts(document=name)
  assert task.format_query("q") == "task: search result | query: q"
  assert task.format_document("d", "T") == "title: T | text: d"
  assert task.format_document("d") == "title: none | text: d"


def test_symmetric_task_puts_the_title_in_the_text():
  task = prompts.TASK_PROMPTS["similarity"]
  assert task.format_query("a") == task.format_document("a")
  assert task.format_document("a", "T") == "task: sentence similarity | query: T a"


@pytest.mark.parametrize(
  ("kind", "query", "document"),
  [
    ("search", "task: search result | query: ", "title: none | text: "),
    ("qa", "task: question answering | query: ", "title: none | text: "),
    ("fact_checking", "task: fact checking | query: ", "title: none | text: "),
    ("code", "task: code retrieval | query: ", "title: none | text: "),
    ("similarity", *["task: sentence similarity | query: "] * 2),
    ("bitext", *["task: search result | query: "] * 2),
    ("classification", *["task: classification | query: "] * 2),
    ("clustering", *["task: clustering | query: "] * 2),
    ("summarization", *["task: summarization | query: "] * 2),
    ("reranking", *["task: search result | query: "] * 2),
  ],
)
def test_prompts_of_each_kind_of_task(kind, query, document):
  assert prompts.TASK_PROMPTS[kind].format_query("") == query
  assert prompts.TASK_PROMPTS[kind].format_document("") == document


def test_task_prompts_are_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    prompts.TaskPrompts().query = "STS"


def test_data_definitions_import_no_framework():
  script = (
    "import sys, embgemma.data.prompts, embgemma.data.vocabularies,"
    " embgemma.data.builtin_corpus;"
    "print([m for m in ('jax', 'tensorflow', 'seqio', 'torch') if m in sys.modules])"
  )
  result = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, check=True
  )
  assert result.stdout.strip() == "[]"
