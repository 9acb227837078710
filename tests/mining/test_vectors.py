"""Vectors of a real checkpoint, from texts to hits."""

import functools
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest

from embgemma.checkpoints import Description
from embgemma.data import prompts
from embgemma.data.task_examples import open_tasks
from embgemma.data.vocabularies import train_vocabulary
from embgemma.errors import ConfigError, DataError
from embgemma.inference.embedder import CheckpointEmbedder
from embgemma.interop import conversion
from embgemma.interop.model import Model
from embgemma.mining.ann import AnnOptions
from embgemma.mining.corpus import build_collection
from embgemma.mining.searchers import Places
from embgemma.mining.vectors import EmbeddedTexts, VectorSearcher
from embgemma.models.config import EmbedderConfig, TransformerConfig
from embgemma.models.embedder import init_params
from embgemma.teaching.teachers import open_teacher

_CONFIG = EmbedderConfig(
  TransformerConfig(
    vocab_size=640,
    num_layers=1,
    width=16,
    mlp_width=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    attention_pattern=("global",),
    window=(8, 8),
    max_length=128,
  ),
  hidden_width=24,
  embedding_width=16,
  matryoshka_widths=(16, 8),
)


def _words(seed, count):
  generator = np.random.default_rng(seed)
  letters = generator.choice(list("abcdefgh"), (count, 4))
  return " ".join("".join(row) for row in letters)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
  """A small checkpoint, and the teacher that it is."""
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  vocabulary = train_vocabulary([_words(i, 8) for i in range(200)], 640, path)
  generator = np.random.default_rng(0)
  # Drawn here: compiling the initialisation takes longer than all else.
  initialise = functools.partial(init_params, _CONFIG)
  shapes = nn.unbox(jax.eval_shape(initialise, jax.random.key(0)))
  params = jax.tree.map(
    lambda leaf: generator.normal(0, 0.2, leaf.shape).astype(np.float32), shapes
  )
  lengths = {"query": 100, "positive": 100, "negatives": 100}
  description = Description(_CONFIG, lengths, prompts.PROMPTS)
  directory = tmp_path_factory.mktemp("checkpoint")
  conversion.write_checkpoint(Model(description, vocabulary, params), directory)
  return CheckpointEmbedder(directory), open_teacher(str(directory), None)


@pytest.fixture
def collection(make_config, tmp_path):
  records = [
    {"query": _words(i, 3), "positive": _words(100 + i, 9), "title": _words(i, 1)}
    for i in range(40)
  ]
  records[5] |= {"task": "fact_checking", "title": ""}
  (task,) = open_tasks(make_config(one=records))
  return build_collection(tmp_path / "collection", task, ())


@pytest.mark.parametrize("ann", [False, True])
def test_hits_are_those_of_the_checkpoints_vectors(ann, embedder, collection, tmp_path):
  """Prompts by kind, titles in them; an index of all lists is exact after ranking."""
  own, opened = embedder
  searcher = VectorSearcher(
    EmbeddedTexts(opened, "float32"),
    block=16,
    ann_above=0 if ann else 40,
    ann=AnnOptions(lists=3, nprobe=3, part=16),
  )
  search = searcher.open(collection, None, Places(tmp_path, tmp_path), [].append)
  hits = search(np.arange(40), 10)
  queries, documents = [], []
  for i in range(40):
    kind = prompts.TASK_PROMPTS["fact_checking" if i == 5 else "search"]
    queries.append(kind.format_query(collection.query(i)[0]))
    passage = collection.passage(i)
    documents.append(kind.format_document(passage.text, passage.title or None))
  scores = own.encode(queries) @ own.encode(documents).T
  best = -np.sort(-scores, axis=1)[:, :10]
  np.testing.assert_allclose(hits.similarities, best, atol=1e-5)
  chosen = np.take_along_axis(scores, hits.passages, 1)
  np.testing.assert_allclose(hits.similarities, chosen, atol=1e-5)
  assert all(len(set(row)) == 10 for row in hits.passages.tolist())
  np.testing.assert_allclose(
    np.concatenate(hits.positives), scores[np.arange(40), np.arange(40)], atol=1e-5
  )


def test_a_corpus_is_read_in_blocks(teacher, collection, tmp_path, monkeypatch):
  """Vectors of no more than a block of passages, or of a batch of pairs, at once."""
  searcher = VectorSearcher(EmbeddedTexts(teacher), block=16)
  search = searcher.open(collection, None, Places(tmp_path, tmp_path), [].append)
  monkeypatch.setattr("embgemma.mining.vectors._PAIRS", 4)
  gathered, gather = [], search.vectors._store.gather

  def recorded(rows):
    gathered.append(len(rows))
    return gather(rows)

  monkeypatch.setattr(search.vectors._store, "gather", recorded)
  search(np.arange(12), 5)
  assert gathered == [12, 16, 16, 8] + [4, 4] * 3


def test_vectors_that_are_not_vectors(make_teacher, collection, tmp_path):
  teacher = make_teacher()
  teacher.encode = lambda inputs: np.full((len(inputs), 16), np.nan, np.float32)
  searcher = VectorSearcher(EmbeddedTexts(teacher))
  with pytest.raises(DataError, match="NaN"):
    searcher.open(collection, None, Places(tmp_path, tmp_path), [].append)


@pytest.mark.parametrize(("block", "ann_above"), [(0, 5), (5, -1)])
def test_numbers_that_cannot_work(teacher, block, ann_above):
  with pytest.raises(ConfigError, match="needs block >= 1 and ann_above >= 0"):
    VectorSearcher(EmbeddedTexts(teacher), block, ann_above)


def test_without_faiss_nothing_is_embedded(teacher, collection, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "faiss", None)
  searcher = VectorSearcher(EmbeddedTexts(teacher), ann_above=39)
  with pytest.raises(ConfigError, match=r"embgemma\[ann\]: pip install"):
    searcher.open(collection, None, Places(tmp_path, tmp_path), [].append)
  assert not teacher.calls
