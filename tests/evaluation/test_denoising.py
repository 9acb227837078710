"""Held-out losses against each example alone in its row, and what may be evaluated."""

import dataclasses
import functools
import gzip
import json
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util

from embgemma.data.denoisers import Denoiser, Sentinels, causal_lm
from embgemma.data.denoising import Corruption
from embgemma.data.sources import TextFileSource
from embgemma.data.text_reader import held_out_segments
from embgemma.data.vocabularies import train_vocabulary
from embgemma.errors import ConfigError, DataError
from embgemma.evaluation import denoising
from embgemma.evaluation.denoising import DenoisingEvaluator, SequenceScorer
from embgemma.models import encoder_decoder
from embgemma.models.config import BackboneConfig, TransformerConfig
from embgemma.training.partitioning import BATCH_AXES, Partitioner
from embgemma.typing import PackedSequences

_VOCAB = 98
_DECODER = TransformerConfig(
  vocab_size=_VOCAB,
  num_layers=2,
  width=16,
  mlp_width=24,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  attention_pattern=("local", "global"),
  mask="causal",
  window=(5, 0),
  max_length=64,
)
_ENCODER = dataclasses.replace(_DECODER, mask="bidirectional", window=(3, 3))
_MODELS = {
  "encoder-decoder": BackboneConfig(_ENCODER, _DECODER),
  "decoder": BackboneConfig(decoder=_DECODER),
}
# Of unlike sizes and shares: none may stand for another.
_DENOISERS = (
  Denoiser("R", mean_span=3.0, rate=0.15, share=3.0),
  Denoiser("S", "suffix", rate=0.75),
  Denoiser("X", mean_span=4.0, rate=0.5, share=2.0, mode=95),
)
_LONGEST = 30
_DENOISING = Corruption(
  _DENOISERS, {"inputs": 40, "targets": 36}, _LONGEST, Sentinels(70, 25), 2, 1
)
_CAUSAL = Corruption(causal_lm(), {"targets": 36}, _LONGEST, None, 2, 1)
_CORRUPTIONS = {"encoder-decoder": _DENOISING, "decoder": _CAUSAL}
_RNG = np.random.default_rng(5)
_SEGMENTS = [
  _RNG.integers(4, 70, length).astype(np.int32)
  for length in _RNG.integers(2, _LONGEST + 1, 61)
]
_BOTH = pytest.mark.parametrize("model", list(_MODELS))


@functools.cache
def _mesh(devices: int) -> jax.sharding.Mesh:
  partitioner = Partitioner(data=4, fsdp=2) if devices == 8 else Partitioner(data=1)
  return partitioner.mesh(jax.devices()[:devices])


@functools.cache
def _scorer(model: str, devices: int) -> SequenceScorer:
  return SequenceScorer(_MODELS[model], _mesh(devices), BATCH_AXES)


def _evaluator(model: str, devices: int = 1, corruption=None) -> DenoisingEvaluator:
  return DenoisingEvaluator(
    "set",
    _SEGMENTS,
    corruption or _CORRUPTIONS[model],
    _scorer(model, devices),
    # Of a shard: several microbatches on eight devices too, the last not full.
    {1: 700, 8: 100}[devices],
  )


def _params(model: str) -> dict:
  """Norms too are drawn: zeros would hide them."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    scale = 0.3 if leaf.ndim == 1 else leaf.shape[-2] ** -0.5
    return (scale * rng.normal(size=leaf.shape)).astype(np.float32)

  return jax.tree.map(draw, encoder_decoder.abstract_params(_MODELS[model]))


def _alone(texts: list[np.ndarray], length: int) -> tuple[np.ndarray, ...]:
  """Tokens, positions and ids of one text a row."""
  tokens, positions, ids = np.zeros((3, len(texts), length), np.int32)
  for row, text in enumerate(texts):
    tokens[row, : len(text)], ids[row, : len(text)] = text, 1
    positions[row, : len(text)] = np.arange(len(text))
  return tokens, positions, ids


@functools.cache
def _expected(model: str) -> dict[str, tuple[float, float]]:
  """Loss and accuracy by denoiser: of each example alone, in float64."""
  corruption, params = _CORRUPTIONS[model], _params(model)
  logits = jax.jit(encoder_decoder.logits, static_argnums=0)
  found = {}
  for denoiser in corruption.denoisers:
    examples = corruption.only(denoiser.name).corrupt(_SEGMENTS, 0)
    inputs = np.split(examples.inputs, np.cumsum(examples.input_lengths)[:-1])
    ends = np.cumsum(examples.target_lengths)[:-1]
    targets = np.split(examples.targets, ends)
    sides = [None] * 3
    if denoiser.kind != "causal":
      sides = _alone(inputs, 40)
    before = _alone([np.concatenate([[2], own[:-1]]) for own in targets], 36)
    sequences = PackedSequences(*sides, before[0], *before, np.ones((61, 36), "f4"))
    scores = np.asarray(logits(_MODELS[model], params, sequences), np.float64)
    losses, right = [], []
    for own, rows in zip(targets, scores, strict=True):
      rows = rows[: len(own)]
      log_z = np.log(np.exp(rows).sum(axis=1))
      losses.extend(log_z - rows[np.arange(len(own)), own])
      right.extend(rows.argmax(axis=1) == own)
    found[denoiser.name] = float(np.mean(losses)), float(np.mean(right))
  return found


def _expected_metrics(model: str) -> dict[str, float]:
  by_name = _expected(model)
  if model == "decoder":
    loss, accuracy = by_name["causal_lm"]
    return {"loss": loss, "perplexity": math.exp(loss), "accuracy": accuracy}
  losses = {name: loss for name, (loss, _) in by_name.items()}
  return {
    "loss": (3 * losses["R"] + losses["S"] + 2 * losses["X"]) / 6,
    **{f"loss/{name}": loss for name, loss in losses.items()},
    **{f"accuracy/{name}": accuracy for name, (_, accuracy) in by_name.items()},
  }


def _split(model: str, params: dict) -> dict:
  """As a training run holds them: over `fsdp`."""
  init = functools.partial(encoder_decoder.init_params, _MODELS[model])
  boxed = jax.eval_shape(init, jax.random.key(0))
  shardings = Partitioner(data=4, fsdp=2).state_shardings(boxed, _mesh(8))
  split = jax.device_put(params, shardings)
  assert not all(leaf.is_fully_replicated for leaf in jax.tree.leaves(split))
  return split


@_BOTH
@pytest.mark.parametrize("devices", [1, 8])
def test_against_examples_alone(model, devices):
  evaluator, params = _evaluator(model, devices), _params(model)
  if devices == 8:
    params = _split(model, params)
  found = evaluator.evaluate(params)
  assert found == pytest.approx(_expected_metrics(model), rel=1e-5)
  assert next(iter(found)) == "loss"
  # Corrupted anew, and alike.
  again = _evaluator(model, devices).evaluate(params)
  assert again == pytest.approx(found, rel=1e-7)
  shapes = {own.targets.shape[1:] for own in evaluator.sequences.values()}
  assert len(shapes) == 1, "one compilation is enough"
  slots = sum(evaluator.corruption.capacity) * shapes.pop()[0] // devices
  assert slots <= evaluator.microbatch_tokens
  for name, own in evaluator.sequences.items():
    assert len(own.targets) >= 2
    assert own.target_ids[-1].any(), f"an empty microbatch of {name}"


@_BOTH
def test_an_untrained_model_guesses(model):
  init = jax.jit(functools.partial(encoder_decoder.init_params, _MODELS[model]))
  found = _evaluator(model).evaluate(nn.unbox(init(jax.random.key(0))))
  for key, value in found.items():
    if key.startswith("loss"):
      assert value == pytest.approx(math.log(_VOCAB), abs=1.0)
    elif key.startswith("accuracy"):
      assert value < 0.2


def test_a_zero_table_knows_nothing():
  """All tokens are equally likely, and a target among the likeliest."""
  flat = traverse_util.flatten_dict(_params("decoder"))
  flat["decoder", "embedder", "table"] *= 0
  found = _evaluator("decoder").evaluate(traverse_util.unflatten_dict(flat))
  assert found["perplexity"] == pytest.approx(_VOCAB, rel=1e-6)
  assert found["accuracy"] == 1.0


def test_a_denoiser_is_evaluated_alike_in_every_mixture():
  params = _params("encoder-decoder")
  alone = _evaluator("encoder-decoder", corruption=_DENOISING.only("X"))
  found = alone.evaluate(params)
  whole = _expected("encoder-decoder")["X"]
  assert found == pytest.approx(
    {"loss": whole[0], "loss/X": whole[0], "accuracy/X": whole[1]}, rel=1e-5
  )


def test_an_infinite_perplexity():
  flat = traverse_util.flatten_dict(_params("decoder"))
  flat["decoder", "embedder", "table"] *= 1e4
  found = _evaluator("decoder").evaluate(traverse_util.unflatten_dict(flat))
  assert 1e3 < found["loss"] < math.inf
  assert found["perplexity"] == math.inf


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
  path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.model"
  return train_vocabulary(["some words of a few letters " * 30], 520, path)


def _evaluators(entries, vocabulary, config=None, corruption=_DENOISING):
  if config is None:
    stacks = (dataclasses.replace(s, vocab_size=520) for s in (_ENCODER, _DECODER))
    config = BackboneConfig(*stacks)
  return denoising.evaluators(
    entries, config, vocabulary, corruption, _mesh(1), 700, BATCH_AXES
  )


@pytest.fixture
def files(tmp_path):
  """Plain lines, and packed JSONL."""
  lines = tmp_path / "lines.txt"
  lines.write_text("few letters of some words\n\n" + "some words " * 40 + "\n")
  objects = tmp_path / "objects.jsonl.gz"
  with gzip.open(objects, "wt") as file:
    file.write(json.dumps({"text": "a few words"}) + "\n")
  return str(lines), str(objects)


def test_entries(vocabulary, files, monkeypatch):
  def documents(task, split):
    return iter([{"text": f"{task} {split}"}])

  monkeypatch.setattr("embgemma.data.sources.builtin_corpus.documents", documents)
  entries = {
    "lines": files[0],
    "both": {"path": list(files)},
    "first": {"path": files[0], "limit": 2},
    "builtin": "builtin:stdlib_reference",
  }
  made = {each.name: each for each in _evaluators(entries, vocabulary)}
  assert list(made) == list(entries)
  texts = {name: _text(vocabulary, each.segments) for name, each in made.items()}
  lines = "few letters of some words" + "some words " * 40
  assert texts == {
    "lines": lines,
    "both": lines + "a few words",
    "first": _text(vocabulary, made["lines"].segments[:2]),
    "builtin": "stdlib_reference validation",
  }
  expected = held_out_segments(TextFileSource(files[0]), vocabulary, _LONGEST)
  for ours, own in zip(made["lines"].segments, expected, strict=True):
    np.testing.assert_array_equal(ours, own)


def _text(vocabulary, segments) -> str:
  return vocabulary.decode(np.concatenate(segments))


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    ({"limit": 3}, r"needs 'path' and takes 'limit', got \['limit'\]"),
    ({"path": "a.txt", "kind": "search"}, r"got \['kind', 'path'\]"),
    ({"path": "a.txt", "limit": 0}, "limit must be a positive integer, got 0"),
    ({"path": "a.txt", "limit": True}, "limit must be a positive integer, got True"),
    (3, "path must be a string or several, got 3"),
    ([], r"path must be a string or several, got \[\]"),
    ({"path": ["a.txt", 3]}, r"path must be a string or several, got \['a.txt', 3\]"),
    ("builtin:stdlib_docs", "'builtin:stdlib_docs' is no built-in task of documents"),
    (["a.txt", "builtin:stdlib_modules"], "take one of .*'builtin:stdlib_reference'"),
  ],
)
def test_wrong_entries(vocabulary, entry, message):
  with pytest.raises(ConfigError, match=f"^evaluation 'name': .*{message}"):
    _evaluators({"name": entry}, vocabulary)


def test_bad_files(vocabulary, tmp_path):
  path = tmp_path / "bad.jsonl"
  with pytest.raises(DataError, match="no such file"):
    _evaluators({"name": str(path)}, vocabulary)
  path.write_text('{"text": "fine"}\n{"query": "none"}\n')
  with pytest.raises(DataError, match=f'{path}:2: no "text"'):
    _evaluators({"name": str(path)}, vocabulary)


def test_another_models_vocabulary(vocabulary):
  with pytest.raises(DataError, match="has 520 pieces, the model's table 98 rows"):
    _evaluators({}, vocabulary, _MODELS["encoder-decoder"])
