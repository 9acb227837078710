"""Makes a workload's folder: data, vocabulary and random weights."""

import argparse
import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import workload

from embgemma.checkpoints import Description
from embgemma.data.prompts import PROMPTS
from embgemma.data.vocabularies import SentencePieceVocabulary, train_vocabulary
from embgemma.errors import DataError
from embgemma.interop import sentence_transformers_writer
from embgemma.interop.model import Model, equal_lengths
from embgemma.models.config import EmbedderConfig
from embgemma.models.embedder import init_params

# Letters of made-up words, and how many of these there are.
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_WORDS = 2000
_SYNTHETIC_VOCABULARY = 4096


def prepare(options: argparse.Namespace) -> tuple[pathlib.Path, Sequence[Any]]:
  """Makes the folder; returns it and the examples, or the texts to embed.

  Args:
    options: Flags of `compare`.

  Raises:
    DataError: too few pairs.
  """
  root = pathlib.Path(options.work)
  root.mkdir(parents=True, exist_ok=True)
  config = _config(options)
  embeds = options.mode == "embed"
  count = options.examples if embeds else options.batch * options.batches
  pieces = vocabulary(options, config.transformer.vocab_size, root)
  if options.synthetic:
    spans = [options.query_tokens] + [options.passage_tokens] * (1 + options.negatives)
    pairs = workload.synthetic_pairs(config.transformer.vocab_size, count, spans)
    # Texts only where they are embedded.
    texts = synthetic_texts(count if embeds else 1, options.passage_tokens)
  else:
    pairs, texts = real_pairs(options, count, pieces)
  folder = root / options.preset
  chosen = embedding_texts(texts)
  write(folder, config, pieces, pairs, chosen, _settings(options, config))
  print(f"{count} examples: {pairs.describe()}", flush=True)
  return folder, chosen[options.texts] if embeds else pairs.columns[0]


def precision(options: argparse.Namespace) -> str:
  """Of computation; parameters and moments are float32."""
  return options.dtype or ("bfloat16" if options.device == "gpu" else "float32")


def _config(options: argparse.Namespace) -> EmbedderConfig:
  changes: dict[str, Any] = {"dtype": precision(options), "remat": options.remat}
  if options.vocabulary:
    changes["vocab_size"] = SentencePieceVocabulary(options.vocabulary).size
  return workload.preset(options.preset, **changes)


def _settings(options: argparse.Namespace, config: EmbedderConfig) -> dict[str, Any]:
  return {
    "device": options.device,
    "max_tokens": options.max_tokens,
    "attention": options.their_attention,
    "precision": precision(options),
    "objective": {
      "widths": list(config.matryoshka_widths),
      "temperature": 0.05,
      "hardness": 5.0,
      "spread_out": not options.no_spread_out,
    },
    "optimizer": {
      "rate": 1e-4,
      "weight_decay": 0.01,
      "b1": 0.9,
      "b2": 0.95,
      "epsilon": 1e-8,
      "clip_norm": 1.0,
    },
  }


def vocabulary(
  options: argparse.Namespace, size: int, root: pathlib.Path
) -> SentencePieceVocabulary:
  """The given one, or one of this size trained on the pairs; kept in the folder."""
  if options.vocabulary:
    return SentencePieceVocabulary(options.vocabulary)
  stats = [(file, pathlib.Path(file).stat().st_mtime_ns) for file in options.pairs]
  digest = hashlib.blake2b(repr((stats, size)).encode(), digest_size=8).hexdigest()
  path = root / f"vocabulary_{digest}.model"
  if path.exists():
    return SentencePieceVocabulary(path)
  if options.synthetic:
    return train_vocabulary(_words(2 * _WORDS), _SYNTHETIC_VOCABULARY, path)
  rows = workload.Texts.read(options.pairs, negatives=0).rows
  return train_vocabulary((text for row in rows for text in row), size, path)


def real_pairs(
  options: argparse.Namespace, count: int, vocabulary: SentencePieceVocabulary
) -> tuple[workload.Pairs, workload.Texts]:
  """The first examples whose lengths are in range: token ids, and the texts.

  Raises:
    DataError: there are fewer than `count`.
  """
  texts = workload.Texts.read(options.pairs, options.negatives).rows
  spans = [options.query_tokens] + [options.passage_tokens] * (1 + options.negatives)
  rows: list[tuple[str, ...]] = []
  columns: list[list[np.ndarray]] = [[] for _ in spans]
  for row in texts:
    ids = [
      # One more than the longest tells what is longer.
      vocabulary.encode_batch([text], high + 1, num_threads=1)[0]
      for text, (_, high) in zip(row, spans, strict=True)
    ]
    if all(low <= len(x) <= high for x, (low, high) in zip(ids, spans, strict=True)):
      rows.append(row)
      for column, text in zip(columns, ids, strict=True):
        column.append(_cut(text, options.max_tokens))
    if len(rows) == count:
      return workload.Pairs(tuple(columns)), workload.Texts(rows)
  raise DataError(
    f"{len(rows)} examples have queries of {spans[0]} tokens and passages of "
    f"{spans[1]}, {count} are needed; add --pairs, widen --query_tokens or "
    "--passage_tokens, or lower --batch, --batches or --examples"
  )


def _cut(text: np.ndarray, size: int) -> np.ndarray:
  """Its first tokens and EOS, as tokenizers cut."""
  return text if len(text) <= size else np.append(text[: size - 1], text[-1])


def embedding_texts(texts: workload.Texts, seed: int = 0) -> dict[str, list[str]]:
  """Passages; and mixed lengths: first words of them, their number log-uniform."""
  passages = [row[1] for row in texts.rows]
  generator = np.random.default_rng(seed)
  mixed = []
  for passage in passages:
    words = passage.split(" ")
    count = np.exp(generator.uniform(np.log(4), np.log(max(5, len(words)))))
    mixed.append(" ".join(words[: round(count)]))
  return {"passages": passages, "mixed": mixed}


def synthetic_texts(count: int, tokens: tuple[int, int]) -> workload.Texts:
  """Made-up passages; a word is about one token."""
  words = _words(_WORDS)
  generator = np.random.default_rng(1)
  rows = []
  for _ in range(count):
    size = generator.integers(tokens[0], tokens[1] + 1)
    rows.append(("", " ".join(generator.choice(words, max(1, int(size) - 2)))))
  return workload.Texts(rows)


def _words(count: int) -> list[str]:
  generator = np.random.default_rng(0)
  letters = list(_ALPHABET)
  return [
    "".join(generator.choice(letters, generator.integers(3, 9))) for _ in range(count)
  ]


def write(
  folder: pathlib.Path,
  config: EmbedderConfig,
  vocabulary: SentencePieceVocabulary,
  pairs: workload.Pairs,
  texts: Mapping[str, Sequence[str]],
  settings: Mapping[str, Any],
) -> None:
  """Fills a workload's folder; weights that are there already stay."""
  (folder / "model").mkdir(parents=True, exist_ok=True)
  made_of = [config.to_json(), vocabulary.fingerprint, settings["max_tokens"]]
  mark = folder / "weights.json"
  if not mark.exists() or mark.read_text() != json.dumps(made_of):
    shutil.rmtree(folder / "model")
    (folder / "model").mkdir()
    _write_weights(folder / "model", config, vocabulary, settings["max_tokens"])
    mark.write_text(json.dumps(made_of))
  pairs.save(folder / "pairs.npz")
  (folder / "texts.json").write_text(json.dumps(texts), "utf-8")
  spec = {**settings, "model": config.to_json()}
  (folder / "spec.json").write_text(json.dumps(spec, indent=2))


def _write_weights(
  directory: pathlib.Path,
  config: EmbedderConfig,
  vocabulary: SentencePieceVocabulary,
  max_tokens: int,
) -> None:
  params = jax.device_get(nn.unbox(init_params(config, jax.random.key(0))))
  description = Description(config, equal_lengths(max_tokens), dict(PROMPTS))
  model = Model(description, vocabulary, params)
  sentence_transformers_writer.write(model, directory, "float32", max_tokens)
