"""From a checkpoint and texts to vectors, at the speed of packed batches."""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from embgemma.data import packing, prompts, shape_plan
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import ConfigError, DataError
from embgemma.interop import conversion
from embgemma.losses.matryoshka import truncate
from embgemma.models import attention
from embgemma.models.config import EmbedderConfig
from embgemma.models.embedder import (
  CPU_TOKENS,
  Embedder,
  computed,
  computed_config,
  on_platform,
)
from embgemma.models.quantization import is_quantized
from embgemma.typing import Float, Int, PackedTexts, Params

# Texts sorted by length together: enough to pack well, few enough to hold.
WINDOW = 16_384
_SAMPLE = 1024  # texts of a window that its row lengths are chosen from
_IN_FLIGHT = 2  # device calls that are waited for
_ACCELERATOR_TOKENS = 8192


class TextEncoder:
  """Embeds texts with given parameters: packed by length, answered in order.

  Over a mesh of several processes, each makes the same calls with the same texts and
  gets all vectors.

  Args:
    config: Of the model.
    vocabulary: Of the model.
    max_length: Tokens after which a text is cut, BOS and EOS included.
    tokens_per_batch: Token slots of one device's part of a call; None is what suits it.
    mesh: None is one device.
    batch_axes: Of the mesh, over which texts are split.
    row_lengths: That batches may use, if the attention of these devices takes them.
  """

  def __init__(
    self,
    config: EmbedderConfig,
    vocabulary: SentencePieceVocabulary,
    max_length: int,
    tokens_per_batch: int | None = None,
    mesh: Mesh | None = None,
    batch_axes: tuple[str, ...] = (),
    row_lengths: Sequence[int] = packing.ROW_LENGTHS,
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
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    config = on_platform(config, device.platform)
    self.config = config
    # Of a model with formats: once a call, not once a batch.
    self._computed = jax.jit(functools.partial(computed, config=config))
    self.max_length = max_length
    self._vocabulary = vocabulary
    on_cpu = device.platform == "cpu"
    self._tokens_per_batch = tokens_per_batch or (
      CPU_TOKENS if on_cpu else _ACCELERATOR_TOKENS
    )
    self._row_lengths = attention.row_lengths(config.transformer, row_lengths)
    self._sharding = None
    self._num_shards = 1
    embed = Embedder(computed_config(config)).embed
    if mesh is not None:
      split = PartitionSpec(batch_axes)
      self._sharding = NamedSharding(mesh, split)
      self._num_shards = math.prod(mesh.shape[axis] for axis in batch_axes)
      embed = jax.shard_map(
        embed,
        mesh=mesh,
        in_specs=(PartitionSpec(), split),
        out_specs=split,
        check_vma=False,
      )
    self._embed = jax.jit(embed)

  def encode(self, params: Params, texts: Sequence[str]) -> Float[np.ndarray, "N E"]:
    """Unit vectors, float32, in the order of the texts (prompts included)."""
    chunks = list(self.stream(params, texts))
    if not chunks:
      return np.zeros((0, self.config.embedding_width), np.float32)
    return np.concatenate(chunks)

  def stream(
    self, params: Params, texts: Iterable[str]
  ) -> Iterator[Float[np.ndarray, "N E"]]:
    """`encode` for texts of any number: vectors of up to WINDOW texts at a time.

    One window more is read and tokenised meanwhile.
    """
    texts = iter(texts)
    if self.config.quantization is not None and not is_quantized(params):
      params = self._computed(params)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:

      def tokenize() -> concurrent.futures.Future[list[np.ndarray]] | None:
        window = list(itertools.islice(texts, WINDOW))
        encode = self._vocabulary.encode_batch
        return pool.submit(encode, window, self.max_length) if window else None

      tokens = tokenize()
      while tokens is not None:
        following = tokenize()
        yield self._encode_window(params, tokens.result())
        tokens = following

  def _encode_window(
    self, params: Params, tokens: Sequence[np.ndarray]
  ) -> Float[np.ndarray, "N E"]:
    out = np.empty((len(tokens), self.config.embedding_width), np.float32)
    pending: collections.deque[tuple[_Batch, jax.Array]] = collections.deque()
    for batch in self._batches(np.array([len(text) for text in tokens])):
      packed = self._place(batch, tokens)
      # Dispatched, not waited for: the host packs the next batch meanwhile.
      pending.append((batch, self._embed(params, packed)))
      if len(pending) > _IN_FLIGHT:
        _collect(*pending.popleft(), out)
    for batch, vectors in pending:
      _collect(batch, vectors, out)
    return out

  def _place(self, batch: "_Batch", tokens: Sequence[np.ndarray]) -> PackedTexts:
    texts = [tokens[i] for p in batch.placements for i in p.texts.tolist()]
    packed = packing.place_texts(texts, batch.placements, batch.shape)
    packed = jax.tree.map(lambda array: array[0], packed)
    sharding = self._sharding
    if sharding is None:
      return jax.device_put(packed)
    return jax.tree.map(
      lambda a: jax.make_array_from_callback(a.shape, sharding, a.__getitem__), packed
    )

  def _batches(self, lengths: Int[np.ndarray, " N"]) -> Iterator["_Batch"]:
    """Batches of all texts, those of shorter rows first."""
    sample = lengths[:: max(1, len(lengths) // _SAMPLE)]
    longest = int(lengths.max())
    classes = shape_plan.row_classes(sample, self._row_lengths, longest)
    left = lengths.copy()
    for length in classes:
      fitting = np.where(left <= length, left, 0)
      rows = max(1, self._tokens_per_batch // length)
      whole = rows * self._num_shards
      count = None
      if length != classes[-1]:
        # Whole batches only; what is left fills the holes of longer rows.
        count = int(0.98 * fitting.sum() / length) // whole * whole
      layout = packing.best_fit(fitting, length, count)
      left[layout.row >= 0] = 0
      yield from self._layout_batches(layout, length, rows)

  def _layout_batches(
    self, layout: packing.Layout, length: int, rows: int
  ) -> Iterator["_Batch"]:
    """Whole batches of `rows` rows a shard, and one of what is left."""
    whole = rows * self._num_shards
    split = layout.rows // whole * whole
    first = dataclasses.replace(
      layout, row=np.where(layout.row < split, layout.row, -1), rows=split
    )
    last = dataclasses.replace(
      layout, row=np.maximum(layout.row - split, -1), rows=layout.rows - split
    )
    if first.rows:
      yield from self._dealt(first, length, rows)
    if last.rows:
      few = _round_up_rows(-(-last.rows // self._num_shards))
      yield from self._dealt(last, length, min(few, rows))

  def _dealt(
    self, layout: packing.Layout, length: int, rows: int
  ) -> Iterator["_Batch"]:
    """Batches of `rows` rows a shard."""
    shards = self._num_shards
    units = -(-layout.rows // (rows * shards)) * shards
    # Powers of two: few shapes, few compilations.
    slots = 1 << max(3, (packing.crowding(layout, units) - 1).bit_length())
    shape = packing.GroupShape(length, units, rows, slots)
    dealt = packing.deal(layout, shape)
    unit = dealt.slot // slots
    order = np.argsort(unit, kind="stable")
    bounds = np.searchsorted(unit[order], np.arange(units + 1))
    parts = [
      packing.Placement(
        dealt.texts[own],
        dealt.row[own] % rows,
        dealt.offset[own],
        dealt.slot[own] % slots,
      )
      for own in (order[a:b] for a, b in itertools.pairwise(bounds))
    ]
    shape = dataclasses.replace(shape, microbatches=1)
    for start in range(0, units, shards):
      yield _Batch(shape, parts[start : start + shards])


@dataclasses.dataclass(frozen=True)
class _Batch:
  """What one device call embeds: the texts of each shard."""

  shape: packing.GroupShape
  placements: Sequence[packing.Placement]


def _collect(batch: _Batch, vectors: jax.Array, out: np.ndarray) -> None:
  if not vectors.is_fully_addressable:
    vectors = multihost_utils.process_allgather(vectors, tiled=True)
  by_shard = np.asarray(vectors).reshape(len(batch.placements), -1, out.shape[1])
  for placement, own in zip(batch.placements, by_shard, strict=True):
    out[placement.texts] = own[placement.slot]


def _round_up_rows(rows: int) -> int:
  """The next multiple of an eighth of the octave: 8 shapes between powers of two."""
  quantum = 1 << max(0, rows.bit_length() - 4)
  return -(-rows // quantum) * quantum


class CheckpointEmbedder:
  """A checkpoint or a Hugging Face directory, ready to embed.

  Args:
    checkpoint: A MODEL_DIR, MODEL_DIR/checkpoints/STEP, or the directory of an
      EmbeddingGemma-like model as sentence-transformers keeps it.
    max_length: Tokens after which a text is cut; None is the longest in training.
    tokens_per_batch: Token slots of one device's part of a call; None is what suits it.
    devices: Over which texts are split, the weights on each; None is the first.

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
    tokens_per_batch: int | None = None,
    devices: Sequence[jax.Device] | None = None,
  ):
    model = conversion.open_embedder(checkpoint, codes=True)
    self.notes = model.notes
    directory = pathlib.Path(checkpoint).resolve()
    self.name = directory.name if model.step is None else f"step {model.step}"
    self.description = model.description
    config = model.description.embedder
    self._config = config
    self._vocabulary = model.vocabulary
    self._tokens_per_batch = tokens_per_batch
    self._mesh = None if devices is None else Mesh(np.asarray(devices), ("data",))
    where: jax.Device | NamedSharding = jax.devices()[0]
    if self._mesh is not None:
      where = NamedSharding(self._mesh, PartitionSpec())
    self._params: Params = jax.device_put(model.params, where)
    if not is_quantized(self._params):  # formats are rounded once, here
      round_all = functools.partial(computed, config=config)
      self._params = jax.jit(round_all, donate_argnums=0)(self._params)
      self._config = computed_config(config)
    self._encoder = self._text_encoder(max_length or model.description.max_length)

  def _text_encoder(self, max_length: int) -> TextEncoder:
    return TextEncoder(
      self._config,
      self._vocabulary,
      max_length,
      self._tokens_per_batch,
      self._mesh,
      () if self._mesh is None else ("data",),
    )

  def cut_at(
    self, max_length: int
  ) -> Callable[[Sequence[str]], Float[np.ndarray, "N E"]]:
    """`encode` for texts that are cut after another number of tokens.

    Raises:
      ConfigError: more than the model has positions.
    """
    return functools.partial(self._text_encoder(max_length).encode, self._params)

  @functools.cached_property
  def fingerprint(self) -> str:
    """16 hexadecimal digits that change with all that vectors depend on but lengths."""
    found = hashlib.blake2b(digest_size=8)
    config = self.description.embedder.to_json()
    settings = {**config, "prompts": dict(self.description.prompts)}
    found.update(json.dumps(settings, sort_keys=True).encode())
    found.update(self._vocabulary.fingerprint.encode())
    leaves, structure = jax.tree.flatten(jax.device_get(self._params))
    found.update(str(structure).encode())
    for leaf in leaves:
      found.update(np.ascontiguousarray(leaf).data)
    return found.hexdigest()

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

  def encode(
    self,
    texts: Sequence[str],
    prompt: str | None = None,
    width: int | None = None,
  ) -> Float[np.ndarray, "N W"]:
    """Unit vectors, float32, in the order of the texts.

    Args:
      texts: Any number.
      prompt: Name of the prompt that goes in front of each, such as "STS"; None is of
        texts that carry theirs.
      width: Matryoshka components kept; None is all.

    Raises:
      ConfigError: no such prompt, or wider than the model's embeddings.
    """
    kept = self.check_width(width)
    if prompt is not None:
      front = self.prompt(prompt)
      texts = [front + text for text in texts]
    vectors = self._encoder.encode(self._params, texts)
    if kept == vectors.shape[1]:
      return vectors
    return np.asarray(truncate(vectors, kept))

  def encode_query(
    self, texts: Sequence[str], width: int | None = None, prompt: str = "query"
  ) -> Float[np.ndarray, "N W"]:
    """`encode` of what is searched for; `prompt` may name that of another task."""
    return self.encode(texts, prompt, width)

  def encode_document(
    self,
    texts: Sequence[str],
    titles: Sequence[str] | None = None,
    width: int | None = None,
    prompt: str = "document",
  ) -> Float[np.ndarray, "N W"]:
    """`encode` of what is found, each with its title in the prompt's place for it.

    Raises:
      ConfigError: as of `encode`; or as many titles as texts are not there.
    """
    titles = [""] * len(texts) if titles is None else titles
    if len(titles) != len(texts):
      raise ConfigError(f"{len(titles)} titles of {len(texts)} texts")
    front = self.prompt(prompt)
    joined = [
      prompts.document(text, title, front)
      for text, title in zip(texts, titles, strict=True)
    ]
    return self.encode(joined, width=width)

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
