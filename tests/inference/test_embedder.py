"""Order, packing, streaming and meshes must not show in the vectors."""

import dataclasses
import functools
import random

import flax.linen as nn
import jax
import numpy as np
import pytest

import embgemma
from embgemma import checkpoints
from embgemma.data.vocabularies import train_vocabulary
from embgemma.errors import CheckpointError, ConfigError, DataError
from embgemma.inference import embedder
from embgemma.inference.embedder import CheckpointEmbedder, TextEncoder
from embgemma.models.config import EmbedderConfig, TransformerConfig
from embgemma.models.embedder import Embedder, abstract_packed_texts
from embgemma.training.partitioning import Partitioner, data_shards

_VOCABULARY_SIZE = 640
_CONFIG = EmbedderConfig(
  TransformerConfig(
    vocab_size=_VOCABULARY_SIZE,
    num_layers=2,
    width=16,
    mlp_width=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    attention_pattern=("local", "global"),
    window=(8, 8),
    max_length=100,
  ),
  hidden_width=24,
  embedding_width=16,
  matryoshka_widths=(16, 8),
)


@pytest.fixture(scope="module")
def words():
  rng = random.Random(0)
  return ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(200)]


@pytest.fixture(scope="module")
def vocabulary(words, tmp_path_factory):
  rng = random.Random(1)
  lines = [" ".join(rng.choices(words, k=8)) for _ in range(300)]
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  return train_vocabulary(lines, _VOCABULARY_SIZE, path)


@pytest.fixture(scope="module")
def texts(words):
  """Of 2 to some 100 tokens."""
  rng = random.Random(2)
  counts = [0, 1, 40, 3, 60, 30, *(rng.randint(0, 40) for _ in range(34))]
  return [" ".join(rng.choices(words, k=count)) for count in counts]


@functools.cache
def _init(seed):
  params = _initialise(jax.random.key(seed), abstract_packed_texts())["params"]
  return nn.unbox(params)


_initialise = jax.jit(Embedder(_CONFIG).init)


@pytest.fixture(scope="module")
def params():
  return _init(0)


_LADDER = (32, 64, 128)


@pytest.fixture(scope="module")
def encoder(vocabulary):
  return TextEncoder(
    _CONFIG, vocabulary, max_length=100, tokens_per_batch=512, row_lengths=_LADDER
  )


@pytest.fixture(scope="module")
def alone(encoder, params, texts):
  """Each text by itself: the reference for all that follows."""
  return np.concatenate([encoder.encode(params, [text]) for text in texts])


def test_batches_hold_every_text_once(encoder):
  """Rows of several lengths, nearly full, and few shapes."""
  rng = np.random.default_rng(0)
  lengths = np.where(
    rng.random(3000) < 0.9, rng.integers(3, 20, 3000), rng.integers(40, 100, 3000)
  )
  batches = list(encoder._batches(lengths))
  texts = np.concatenate([p.texts for b in batches for p in b.placements])
  assert sorted(texts) == list(range(3000))
  assert len({batch.shape.length for batch in batches}) > 1
  assert len({batch.shape for batch in batches}) <= 8
  assert all(batch.shape.tokens <= 512 for batch in batches)
  slots = sum(batch.shape.tokens for batch in batches)
  assert lengths.sum() / slots > 0.95


def test_order_is_kept(encoder, params, texts, alone):
  vectors = encoder.encode(params, texts)
  assert vectors.dtype == np.float32
  assert vectors.shape == (len(texts), 16)
  np.testing.assert_allclose(vectors, alone, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
  # Distinct texts have distinct vectors: order could not hide.
  distance = np.linalg.norm(alone[:, None] - alone, axis=-1)
  assert np.median(distance) > 1e-2


def test_a_text_beyond_the_longest_is_cut(encoder, params, vocabulary):
  long = "abc " * 400
  cut = vocabulary.decode(vocabulary.encode(long, 100))
  assert len(cut) < len(long)
  (vector,) = encoder.encode(params, [long])
  (same,) = encoder.encode(params, [cut])
  np.testing.assert_allclose(vector, same, atol=1e-6)


def test_no_texts(encoder, params):
  assert encoder.encode(params, []).shape == (0, 16)
  assert list(encoder.stream(params, iter([]))) == []


def test_stream_takes_one_window_ahead(encoder, params, texts, alone, monkeypatch):
  monkeypatch.setattr(embedder, "WINDOW", 16)
  taken = 0

  def come():
    nonlocal taken
    for text in texts:
      taken += 1
      yield text

  chunks, takes = [], []
  for chunk in encoder.stream(params, come()):
    chunks.append(chunk)
    takes.append(taken)
  assert [len(chunk) for chunk in chunks] == [16, 16, 8]
  assert takes == [32, 40, 40]
  np.testing.assert_allclose(np.concatenate(chunks), alone, atol=1e-5)


def test_eight_devices_give_what_one_gives(vocabulary, params, texts, alone):
  partitioner = Partitioner(data=2, fsdp=4)
  mesh = partitioner.mesh(jax.devices()[:8])
  many = TextEncoder(
    _CONFIG,
    vocabulary,
    max_length=100,
    tokens_per_batch=256,
    mesh=mesh,
    batch_axes=("data", "fsdp"),
    row_lengths=_LADDER,
  )
  assert data_shards(mesh) == 8
  np.testing.assert_allclose(many.encode(params, texts), alone, atol=1e-5)
  # Fewer texts than devices.
  np.testing.assert_allclose(many.encode(params, texts[:3]), alone[:3], atol=1e-5)


def test_longest_text_must_fit_the_model(vocabulary):
  with pytest.raises(ConfigError, match="max_length 101 is beyond the model's 100"):
    TextEncoder(_CONFIG, vocabulary, max_length=101)


def test_vocabulary_must_fit_the_model(vocabulary):
  transformer = dataclasses.replace(_CONFIG.transformer, vocab_size=639)
  config = dataclasses.replace(_CONFIG, transformer=transformer)
  with pytest.raises(DataError, match="640 pieces, the model's table 639 rows"):
    TextEncoder(config, vocabulary, max_length=100)


_LENGTHS = {"query": 20, "positive": 90, "negatives": 40}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, vocabulary, params):
  """Two steps: the first without an average, the second with one."""
  directory = tmp_path_factory.mktemp("run")
  description = checkpoints.Description(_CONFIG, _LENGTHS, {"query": "ab: "})
  checkpoints.write_description(directory, description, vocabulary, "")
  policy = checkpoints.CheckpointPolicy(every_steps=1, keep_last=5)
  store = checkpoints.CheckpointStore(directory, policy)
  training, position = {"step": np.zeros(())}, {"step": 1}
  store.save(1, params, None, training, position, None)
  store.wait()
  store.save(2, _init(1), _init(2), training, position, None)
  store.close()
  return directory


@pytest.mark.parametrize(
  ("step", "seed"), [(None, 2), (1, 0), (2, 2)], ids=["newest", "step 1", "average"]
)
def test_checkpoint_embeds_as_its_parameters_do(model_dir, encoder, texts, step, seed):
  path = model_dir if step is None else model_dir / "checkpoints" / str(step)
  loaded = CheckpointEmbedder(path)
  assert loaded.name == f"step {step or 2}"
  assert not loaded.notes
  short = texts[6:12]
  expected = encoder.encode(_init(seed), short)
  np.testing.assert_allclose(loaded.encode(short), expected, atol=1e-6)


@pytest.fixture(scope="module")
def loaded(model_dir):
  return CheckpointEmbedder(model_dir / "checkpoints" / "1")


def test_longest_text_is_that_of_training(loaded, model_dir, params, vocabulary):
  long = "abc " * 400
  for checkpoint, length in (
    (loaded, 90),
    (CheckpointEmbedder(model_dir / "checkpoints" / "1", max_length=30), 30),
  ):
    expected = TextEncoder(_CONFIG, vocabulary, length).encode(params, [long])
    np.testing.assert_allclose(checkpoint.encode([long]), expected, atol=1e-6)


def test_prompts_of_the_checkpoint(loaded):
  assert loaded.prompt("query") == "ab: "
  with pytest.raises(
    ConfigError, match=r"no prompt 'passage'; the checkpoint has \['query'\]"
  ):
    loaded.prompt("passage")


def test_widths(loaded, texts):
  full = loaded.encode(texts[:5])
  (cut,) = loaded.stream(texts[:5], 8)
  expected = full[:, :8] / np.linalg.norm(full[:, :8], axis=1, keepdims=True)
  np.testing.assert_allclose(cut, expected, atol=1e-6)
  (same,) = loaded.stream(texts[:5])
  np.testing.assert_allclose(same, full, atol=1e-6)
  assert loaded.check_width(None) == 16
  assert loaded.check_width(8) == 8
  for width in (0, 17, -1):
    with pytest.raises(ConfigError, match=rf"width {width} is not in 1\.\.16"):
      loaded.check_width(width)


def test_the_python_interface(model_dir, loaded, texts):
  """Prompts by name, titles in their place, widths."""
  embedder = embgemma.Embedder(model_dir / "checkpoints" / "1")
  assert embgemma.Embedder is CheckpointEmbedder
  few = texts[6:9]
  full = loaded.encode([f"ab: {text}" for text in few])
  np.testing.assert_allclose(embedder.encode_query(few), full, atol=1e-6)
  np.testing.assert_allclose(embedder.encode(few, "query"), full, atol=1e-6)
  cut = embedder.encode_query(few, width=8)
  norms = np.linalg.norm(full[:, :8], axis=1, keepdims=True)
  np.testing.assert_allclose(cut, full[:, :8] / norms, atol=1e-6)
  titled = embedder.encode_document(few, ["A", "", "C"], prompt="query")
  joined = [f"ab: A {few[0]}", f"ab: {few[1]}", f"ab: C {few[2]}"]
  np.testing.assert_allclose(titled, loaded.encode(joined), atol=1e-6)
  with pytest.raises(ConfigError, match="no prompt 'document'"):
    embedder.encode_document(few)
  with pytest.raises(ConfigError, match="2 titles of 3 texts"):
    embedder.encode_document(few, ["A", "B"], prompt="query")
  with pytest.raises(AttributeError, match="no attribute 'Encoder'"):
    _ = embgemma.Encoder


def test_directories_that_are_no_checkpoints(tmp_path, model_dir):
  with pytest.raises(CheckpointError, match="not a checkpoint directory"):
    CheckpointEmbedder(tmp_path)
  with pytest.raises(CheckpointError, match=r"no step 7; there are \[1, 2\]"):
    CheckpointEmbedder(model_dir / "checkpoints" / "7")
