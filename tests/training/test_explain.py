"""What is said of tasks, before they are cached and after."""

import io

import pytest
from rich.console import Console

from embgemma.data.cache import Manifest
from embgemma.data.config import FEATURES, DataConfig
from embgemma.data.tasks import jsonl_tasks
from embgemma.training import explain


def data(rates) -> DataConfig:
  files = {"first": {"path": "a.jsonl", "rate": 3.0}, "second": "b.jsonl"}
  lengths = dict.fromkeys(FEATURES, 16)
  tasks = jsonl_tasks(files)
  return DataConfig("both", lengths, tasks, vocabulary_size=1000, rates=rates)


def cells(config) -> list[list[str]]:
  """Rows of the printed table."""
  file = io.StringIO()
  Console(file=file, width=200).print(explain._task_table(config, 100, 8))
  lines = [line.split("│")[1:-1] for line in file.getvalue().splitlines()]
  return [[cell.strip() for cell in line] for line in lines if line]


@pytest.mark.parametrize(
  ("rates", "first", "second"),
  [
    ("explicit", ["0.750", "75"], ["0.250", "25"]),
    ("even", ["0.500", "50"], ["0.500", "50"]),
    ("proportional", ["–", "–"], ["–", "–"]),
    (2.0, ["–", "–"], ["–", "–"]),
  ],
)
def test_before_caching(rates, first, second, monkeypatch):
  monkeypatch.setattr(explain, "complete_caches", lambda _: None)
  rows = cells(data(rates))
  assert rows == [["first", *first, *"–––"], ["second", *second, *"–––"]]


def test_after_caching_rates_are_those_of_the_caches(make_task, tmp_path, monkeypatch):
  tasks = (make_task("first", 300, 0), make_task("second", 100, 0))
  manifest = Manifest(tasks, tmp_path / "tokenizer.model")
  monkeypatch.setattr(explain, "complete_caches", lambda _: manifest)
  # 50 steps of 8 examples are 1.33 and 4 epochs of pairs of 10 tokens.
  assert cells(data("even")) == [
    ["first", "0.500", "50", "300", "1.33", "4,000"],
    ["second", "0.500", "50", "100", "4.00", "4,000"],
  ]
