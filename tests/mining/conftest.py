"""A teacher that knows words, files of pairs, and runs of mining over them."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from embgemma.data.config import DataConfig
from embgemma.data.tasks import jsonl_tasks
from embgemma.data.words import word_hashes
from embgemma.teaching.teachers import Input

_WIDTH = 16
_WORDS = np.random.default_rng(0).standard_normal((4096, _WIDTH))


class WordTeacher:
  """Sums of random vectors of words; tells queries and documents apart."""

  def __init__(self, name: str = "words", window: int = 16):
    self.name = self.fingerprint = name
    self.width, self.window = _WIDTH, window
    self.calls: list[int] = []

  def query(self, text: str, kind: str | None) -> Input:
    return Input(f"{kind} query: {text}")

  def document(self, text: str, title: str | None, kind: str | None) -> Input:
    return Input(f"{kind} title {title}: {text}")

  def encode(self, inputs: Sequence[Input]) -> np.ndarray:
    self.calls.append(len(inputs))
    salt = sum(self.name.encode())
    rows = [_WORDS[(word_hashes(each.text) + salt) % 4096].sum(0) for each in inputs]
    vectors = np.array(rows).reshape(len(inputs), _WIDTH)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def teacher() -> WordTeacher:
  return WordTeacher()


@pytest.fixture(scope="session")
def make_teacher() -> type[WordTeacher]:
  return WordTeacher


def write_jsonl(path: pathlib.Path, records: Sequence[dict[str, Any]]) -> pathlib.Path:
  path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
  return path


@pytest.fixture
def make_config(tmp_path) -> Callable[..., DataConfig]:
  """A run over tasks given as records, or as an entry of JSONL_TASKS with them."""

  def make(**tasks: Any) -> DataConfig:
    entries = {}
    for name, task in tasks.items():
      options = dict(task) if isinstance(task, dict) else {"records": task}
      path = write_jsonl(tmp_path / f"{name}.jsonl", options.pop("records"))
      entries[name] = options | {"path": str(path)}
    lengths = {"query": 32, "positive": 64, "negatives": 64}
    return DataConfig("all", lengths, jsonl_tasks(entries), vocabulary_size=100)

  return make
