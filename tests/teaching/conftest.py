"""A small model as a checkpoint and as sentence-transformers reads it; cached pairs."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import random
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
import pytest

from embgemma.checkpoints import Description
from embgemma.data import cache_builder, prompts, tasks
from embgemma.data.config import DataConfig
from embgemma.data.vocabularies import train_vocabulary
from embgemma.interop import conversion, sentence_transformers_writer
from embgemma.interop.model import Model
from embgemma.models.config import EmbedderConfig, TransformerConfig
from embgemma.models.embedder import init_params
from embgemma.teaching.teachers import Input

_CONFIG = EmbedderConfig(
  TransformerConfig(
    vocab_size=640,
    num_layers=2,
    width=16,
    mlp_width=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    attention_pattern=("local", "global"),
    window=(8, 8),
    max_length=128,
  ),
  hidden_width=24,
  embedding_width=16,
  matryoshka_widths=(16, 8),
)


def _words(seed: int, count: int) -> str:
  rng = random.Random(seed)
  return " ".join(
    "".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(count)
  )


@pytest.fixture(scope="session")
def texts() -> list[str]:
  return [_words(seed, 3 + 4 * (seed % 3)) for seed in range(12)]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Model:
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  vocabulary = train_vocabulary([_words(i, 8) for i in range(200)], 640, path)
  rng = np.random.default_rng(0)
  # Drawn here: compiling the initialisation takes longer than all else.
  initialise = functools.partial(init_params, _CONFIG)
  shapes = nn.unbox(jax.eval_shape(initialise, jax.random.key(0)))
  params = jax.tree.map(
    lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes
  )
  lengths = {"query": 100, "positive": 100, "negatives": 100}
  return Model(Description(_CONFIG, lengths, prompts.PROMPTS), vocabulary, params)


@pytest.fixture(scope="session")
def checkpoint(model, tmp_path_factory) -> pathlib.Path:
  directory = tmp_path_factory.mktemp("checkpoint")
  conversion.write_checkpoint(model, directory)
  return directory


@pytest.fixture(scope="session")
def exported(model, tmp_path_factory) -> pathlib.Path:
  """What `SentenceTransformer` opens."""
  directory = tmp_path_factory.mktemp("exported")
  sentence_transformers_writer.write(model, directory, "float32", 100)
  return directory


@dataclasses.dataclass
class FakeTeacher:
  """Vectors drawn from the hash of an input; counts what it embeds.

  Attributes:
    embedded: Of each call, the inputs.
    fail_at: The call that raises, from 0.
  """

  width: int = 4
  window: int = 8
  name: str = "fake"
  fingerprint: str = "fake/1"
  fail_at: int | None = None
  error: BaseException = dataclasses.field(default_factory=KeyboardInterrupt)
  embedded: list[list[Input]] = dataclasses.field(default_factory=list)

  def query(self, text: str, kind: str | None) -> Input:
    return Input(f"q: {text}", kind or "")

  def document(self, text: str, title: str | None, kind: str | None) -> Input:
    return Input(f"d: {title or '-'}: {text}", kind or "")

  def vector(self, each: Input) -> np.ndarray:
    seed = hashlib.sha256(repr(each).encode()).digest()[:8]
    rng = np.random.default_rng(int.from_bytes(seed, "big"))
    vector = rng.standard_normal(self.width).astype(np.float32)
    return vector / np.linalg.norm(vector)

  def encode(self, inputs: Sequence[Input]) -> np.ndarray:
    if len(self.embedded) == self.fail_at:
      raise self.error
    self.embedded.append(list(inputs))
    return np.stack([self.vector(each) for each in inputs])


@pytest.fixture(scope="session")
def fake() -> type[FakeTeacher]:
  return FakeTeacher


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Two cached tasks that share texts: one with titles, negatives and kinds.

  Attributes:
    config: Of the run.
    records: Of each task, as they stand in its file.
    files: Of each task.
  """

  config: DataConfig
  records: dict[str, list[dict]]
  files: dict[str, pathlib.Path]


def _records(seed: int, count: int) -> list[dict]:
  """Queries and passages come again; negatives of 0 to 3 are cut to 2."""
  rng = random.Random(seed)
  passages = [_words(i, 4) for i in range(count // 2)]
  records = []
  for i in range(count):
    record: dict = {"query": _words(i // 2, 3), "positive": rng.choice(passages)}
    if seed:
      record["negatives"] = rng.sample(passages, rng.randint(0, 3))
      record["title"] = rng.choice(["", "a title"])
      record["task"] = rng.choice(["search", "similarity"])
    records.append(record)
  return records


@pytest.fixture
def pairs(model, tmp_path) -> Pairs:
  records = {"plain": _records(0, 24), "hard": _records(1, 30)}
  files = {name: tmp_path / f"{name}.jsonl" for name in records}
  for name, own in records.items():
    files[name].write_text("".join(f"{json.dumps(record)}\n" for record in own))
  vocabulary = tmp_path / "tokenizer.model"
  vocabulary.write_bytes(model.vocabulary.serialized)
  config = DataConfig(
    mixture_or_task_name="both",
    lengths={"query": 16, "positive": 32, "negatives": 32},
    tasks=tasks.jsonl_tasks({name: str(path) for name, path in files.items()}),
    vocabulary=str(vocabulary),
    cache_dir=str(tmp_path / "cache"),
    max_negatives=2,
  )
  cache_builder.build(config, lambda line: None)
  return Pairs(config, records, files)
