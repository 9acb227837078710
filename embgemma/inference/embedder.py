"""From a checkpoint and texts to vectors, at the speed of packed batches."""

import collections
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding

from embgemma.data import packing
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import ConfigError, DataError
from embgemma.interop import conversion
from embgemma.losses.matryoshka import truncate
from embgemma.models.config import EmbedderConfig
from embgemma.models.embedder import Embedder
from embgemma.typing import Float, PackedTexts, Params

# Texts sorted by length together: enough to pack well, few enough to hold.
WINDOW = 16_384


class TextEncoder:
  """Embeds texts with given parameters: packed by length, answered in order.

  Args:
    config: Of the model.
    vocabulary: Of the model.
    max_length: Tokens after which a text is cut, BOS and EOS included.
    tokens_per_batch: Token slots of one device call.
    sharding: How a batch's leading axis lies on a mesh; None is one device.
    num_shards: Data shards of that mesh.
  """

  def __init__(
    self,
    config: EmbedderConfig,
    vocabulary: SentencePieceVocabulary,
    max_length: int,
    tokens_per_batch: int = 8192,
    sharding: NamedSharding | None = None,
    num_shards: int = 1,
  ):
    if max_length > config.transformer.max_length:
      raise ConfigError(
        f"max_length {max_length} is beyond the model's "
        f"{config.transformer.max_length} positions"
      )
    if vocabulary.size > config.transformer.vocab_size:
      raise DataError(
        f"the vocabulary has {vocabulary.size} pieces, the model's table "
        f"{config.transformer.vocab_size} rows; they do not belong together"
      )
    self.config = config
    self.max_length = max_length
    self._vocabulary = vocabulary
    self._tokens_per_batch = tokens_per_batch
    self._sharding = sharding
    self._num_shards = num_shards
    self._embed = jax.jit(Embedder(config).embed)

  def encode(self, params: Params, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
    """Unit vectors, float32, in the order of the texts (prompts included)."""
    chunks = list(self.stream(params, texts))
    if not chunks:
      return np.zeros((0, self.config.embedding_width), np.float32)
    return np.concatenate(chunks)

  def stream(
    self, params: Params, texts: Iterable[str]
  ) -> Iterator[Float[np.ndarray, "N E"]]:
    """`encode` for texts of any number: vectors of up to WINDOW texts at a time."""
    texts = iter(texts)
    while window := list(itertools.islice(texts, WINDOW)):
      yield self._encode_window(params, window)

  def _encode_window(
    self, params: Params, texts: Sequence[str]
  ) -> Float[np.ndarray, "N E"]:
    tokens = self._vocabulary.encode_batch(texts, self.max_length)
    out = np.empty((len(texts), self.config.embedding_width), np.float32)
    pending = []
    for indices, packed in self._batches(tokens):
      # Dispatched, not waited for: the host packs the next batch meanwhile.
      pending.append((indices, self._embed(params, self._place(packed))))
      if len(pending) > 1:
        self._collect(*pending.pop(0), out)
    for indices, vectors in pending:
      self._collect(indices, vectors, out)
    return out

  def _place(self, packed: PackedTexts) -> PackedTexts:
    return jax.device_put(packed, self._sharding)

  def _collect(
    self, indices: Sequence[Sequence[int]], vectors: jax.Array, out: np.ndarray
  ) -> None:
    by_shard = np.asarray(vectors).reshape(self._num_shards, -1, out.shape[1])
    for shard, own in enumerate(indices):
      out[list(own)] = by_shard[shard, : len(own)]

  def _batches(
    self, tokens: Sequence[np.ndarray]
  ) -> Iterator[tuple[list[list[int]], PackedTexts]]:
    """Batches of texts of like length: text indices of each shard, and the pack."""
    classes = collections.defaultdict(list)
    for index, text in enumerate(tokens):
      classes[packing.row_length(len(text))].append(index)
    for length, members in sorted(classes.items()):
      layout = packing.best_fit([len(tokens[i]) for i in members], length)
      of_row: list[list[int]] = [[] for _ in range(layout.rows)]
      for member, row in enumerate(layout.row):
        of_row[row].append(member)
      shard_rows = max(1, self._tokens_per_batch // self._num_shards // length)
      for first in range(0, layout.rows, shard_rows * self._num_shards):
        yield self._batch(tokens, members, layout, of_row[first:], length, shard_rows)

  def _batch(
    self,
    tokens: Sequence[np.ndarray],
    members: Sequence[int],
    layout: packing.Layout,
    of_row: Sequence[Sequence[int]],
    length: int,
    shard_rows: int,
  ) -> tuple[list[list[int]], PackedTexts]:
    """The next rows of a layout as one batch of a ladder's shape."""
    used = min(len(of_row), shard_rows * self._num_shards)
    rows = packing.round_up_rows(-(-used // self._num_shards))
    indices, texts, layouts = [], [], []
    for first in range(0, rows * self._num_shards, rows):
      chosen = of_row[first : min(first + rows, used)]
      row = [r for r, own in enumerate(chosen) for _ in own]
      own = [member for row_members in chosen for member in row_members]
      indices.append([members[member] for member in own])
      texts.append([tokens[index] for index in indices[-1]])
      layouts.append(packing.Layout(row, [layout.offset[m] for m in own], len(chosen)))
    # Powers of two: few shapes, few compilations.
    slots = 1 << max(len(own) - 1 for own in (*indices, [0])).bit_length()
    return indices, packing.place_texts(texts, layouts, length, rows, slots)


class CheckpointEmbedder:
  """A checkpoint or a Hugging Face directory, ready to embed.

  Args:
    checkpoint: A MODEL_DIR, MODEL_DIR/checkpoints/STEP, or the directory of an
      EmbeddingGemma-like model as sentence-transformers keeps it.
    max_length: Tokens after which a text is cut; None is the longest in training.
    tokens_per_batch: Token slots of one device call.

  Attributes:
    description: Of the model.
    name: "step N", or the directory's name.
    notes: What a user should know about how it was read.

  Raises:
    CheckpointError: neither of them, or a damaged one.
  """

  def __init__(
    self,
    checkpoint: str | os.PathLike[str],
    max_length: int | None = None,
    tokens_per_batch: int = 8192,
  ):
    model = conversion.open_embedder(checkpoint)
    self.notes = model.notes
    directory = pathlib.Path(checkpoint).resolve()
    self.name = directory.name if model.step is None else f"step {model.step}"
    self.description = model.description
    self._config = model.description.embedder
    self._encoder = TextEncoder(
      self._config,
      model.vocabulary,
      max_length or model.description.max_length,
      tokens_per_batch,
    )
    self._params = jax.device_put(model.params, jax.devices()[0])

  def prompt(self, name: str) -> str:
    """The text of a named prompt.

    Raises:
      ConfigError: the checkpoint has no such prompt.
    """
    if name not in self.description.prompts:
      raise ConfigError(
        f"no prompt {name!r}; the checkpoint has {sorted(self.description.prompts)}"
      )
    return self.description.prompts[name]

  def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
    """Unit vectors at full width, float32; the texts carry their prompts."""
    return self._encoder.encode(self._params, texts)

  def check_width(self, width: int | None) -> int:
    """The width itself, or the full one.

    Raises:
      ConfigError: wider than the model's embeddings.
    """
    full = self._config.embedding_width
    if width is not None and not 1 <= width <= full:
      raise ConfigError(f"width {width} is not in 1..{full}, the model's width")
    return width or full

  def stream(
    self, texts: Iterable[str], width: int | None = None
  ) -> Iterator[Float[np.ndarray, "N E"]]:
    """`encode`, up to WINDOW texts at a time, cut to a Matryoshka width.

    Args:
      texts: With their prompts.
      width: Components kept and brought back to unit norm; None is all.
    """
    width = self.check_width(width)
    for vectors in self._encoder.stream(self._params, texts):
      yield np.asarray(truncate(vectors, width))
