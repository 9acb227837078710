"""What a task is, and tasks of files."""

import jaxtyping
import pytest

from embgemma.data import tasks
from embgemma.data.sources import JsonlSource, TextFileSource
from embgemma.data.tasks import Task
from embgemma.errors import ConfigError


@pytest.fixture
def untyped():
  """Without the type checks of tests, as users run it."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize("name", ["", "my-task", "a/b", "a b", "a:b"])
def test_task_names(name):
  with pytest.raises(ConfigError, match="use letters, digits, '_' and '.' only"):
    Task(name, JsonlSource("x"))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("rate", [0, -1.0, float("nan"), "1"])
def test_task_rate(rate):
  with pytest.raises(ConfigError, match="task 't': rate must be > 0, got"):
    Task("t", JsonlSource("x"), rate=rate)


def test_jsonl_tasks():
  entry = {"path": ["b.jsonl", "c.jsonl"], "kind": "qa", "rate": 2.0, "limit": 5}
  assert tasks.jsonl_tasks({"a": "a.jsonl", "b": entry}) == (
    Task("a", JsonlSource("a.jsonl")),
    Task("b", JsonlSource(("b.jsonl", "c.jsonl"), 5), "qa", 2.0),
  )


@pytest.mark.parametrize("entry", [{"rate": 1.0}, {"path": "a", "weight": 1.0}])
def test_jsonl_tasks_with_other_keys(entry):
  with pytest.raises(ConfigError, match="JSONL task 'a': needs 'path' and takes"):
    tasks.jsonl_tasks({"a": entry})


def test_text_tasks():
  entry = {"path": ["b.jsonl", "c.txt.gz"], "rate": 2.0, "limit": 5}
  assert tasks.text_tasks({"a": "a.txt", "b": entry}) == (
    Task("a", TextFileSource("a.txt")),
    Task("b", TextFileSource(("b.jsonl", "c.txt.gz"), 5), rate=2.0),
  )
  for entry in ({"rate": 1.0}, {"path": "a", "kind": "qa"}):
    with pytest.raises(
      ConfigError, match=r"text task 'a': needs 'path' and takes \['f"
    ):
      tasks.text_tasks({"a": entry})


def test_builtin_text_tasks():
  assert {task.source.content for task in tasks.builtin_text_tasks()} == {"text"}
  assert {task.source.content for task in tasks.builtin_tasks()} == {"pairs"}


def test_documents_get_no_prompts():
  with pytest.raises(
    ConfigError, match="'t': documents have one side and no prompts; drop kind"
  ):
    Task("t", TextFileSource("x"), "qa")
