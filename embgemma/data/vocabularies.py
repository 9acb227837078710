"""SentencePiece vocabularies: Gemma's, or one trained here in the same layout."""

import hashlib
import heapq
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]
  ModelProto,
  TrainerSpec,
)

from embgemma.errors import ConfigError, DataError

_Piece = ModelProto.SentencePiece

# Some of these are USER_DEFINED in Gemma's file, and those match in plain text.
_CONTROL_NAME = re.compile(
  r"<(?:pad|eos|bos|unk|mask|2mass|unused\d+|(?:start|end)_of_\w+|\w+_soft_token)>"
  r"|\[(?:multimodal|@BOS@|toxicity=\d+)\]"
)
_INNER_SPACE = re.compile("[^▁ ][▁ ]")
_PART = 1 << 16  # characters of a document that are encoded at a time

_ROLES: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
_ROLES |= {"eos_piece": "<eos>", "bos_piece": "<bos>"}
_LOW_UNUSED = 99
_FIRST_SENTINEL = _LOW_UNUSED + 1
_LOW_SPECIALS = ["<mask>", "[multimodal]"]
_LOW_SPECIALS += [f"<unused{i}>" for i in range(_LOW_UNUSED)]
_LOW_SPECIALS += ["<start_of_turn>", "<end_of_turn>"]


class SentencePieceVocabulary:
  """Text to token ids and back.

  Ids are BOS + pieces + EOS, as EmbeddingGemma's tokenizer gives them. Text that
  spells a control token (`<start_of_turn>`, `<unused7>`, `<mask>`) stays text,
  where Hugging Face's tokenizer gives the control id. HTML tags and runs of
  newlines or spaces, user-defined pieces in Gemma's file, do match. Decoding gives
  back the text, but for U+2581 ("▁"): SentencePiece's mark for a space.
  """

  def __init__(self, path: str | os.PathLike[str]) -> None:
    """Reads a SentencePiece model, such as Gemma's `tokenizer.model`.

    Raises:
      DataError: the file is missing, no SentencePiece model, or lacks pad, eos or bos.
    """
    try:
      serialized = Path(path).read_bytes()
    except OSError as error:
      raise DataError(
        f"vocabulary {os.fspath(path)} cannot be read ({error.strerror}); give the"
        " path of a SentencePiece model such as Gemma's tokenizer.model"
      ) from error
    self._load(serialized, os.fspath(path))

  @classmethod
  def from_serialized(
    cls, serialized: bytes, name: str = "(in memory)"
  ) -> "SentencePieceVocabulary":
    """Returns the vocabulary of a model's bytes; `name` stands for it in errors."""
    vocabulary = cls.__new__(cls)
    vocabulary._load(serialized, name)
    return vocabulary

  def __reduce__(self):
    return type(self).from_serialized, (self.serialized, self._name)

  def _load(self, serialized: bytes, name: str) -> None:
    model = _parse(serialized, name)
    self._name = name
    self.serialized = serialized
    self.fingerprint = hashlib.blake2b(serialized, digest_size=16).hexdigest()
    self.size = len(model.pieces)
    self._longest = max(len(piece.piece) for piece in model.pieces)
    self._splits_at_spaces = _splits_at_spaces(model)
    self._prepends_space = model.normalizer_spec.add_dummy_prefix
    processor = sentencepiece.SentencePieceProcessor()
    try:
      processor.LoadFromSerializedProto(_without_control_matches(model, serialized))
    except RuntimeError as error:
      raise DataError(f"vocabulary {name} does not load: {error}") from error
    self._processor = processor
    ids = {role: getattr(processor, f"{role}_id")() for role in ("pad", "eos", "bos")}
    if missing := [role for role, token_id in ids.items() if token_id < 0]:
      raise DataError(
        f"vocabulary {name} lacks pieces that the model needs ({', '.join(missing)});"
        " use Gemma's tokenizer.model or train one with train_vocabulary"
      )
    self.pad_id, self.eos_id, self.bos_id = ids.values()

  @property
  def effective_model(self) -> ModelProto:
    """The model that encodes: the file's, its control-named pieces made CONTROL."""
    return ModelProto.FromString(self._processor.serialized_model_proto())

  def is_text(self, token_id: int) -> bool:
    """Returns whether encoding a text can give the id."""
    if not 0 <= token_id < self.size:
      return False
    piece = self._processor
    return not (piece.is_control(token_id) or piece.is_unused(token_id))

  def sentinel_ids(self) -> range:
    """Returns the ids of `<unused100>`, `<unused101>`, … that lie end to end.

    The high block of Gemma's layout but for its first piece, which T5Gemma 2 takes for
    images: 256002 to 262143 in Gemma 3, and the last ids of a vocabulary trained here.
    """
    first = self._processor.piece_to_id(f"<unused{_FIRST_SENTINEL}>")
    count = 0
    while (
      first + count < self.size
      and self._processor.id_to_piece(first + count)
      == f"<unused{_FIRST_SENTINEL + count}>"
    ):
      count += 1
    return range(first, first + count)

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the model as it was read, byte for byte and atomically."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
      temporary.write_bytes(self.serialized)
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)

  def encode(self, text: str, max_length: int) -> list[int]:
    """Returns BOS + pieces + EOS, at most `max_length` ids; see encode_batch."""
    return self.encode_batch([text], max_length, num_threads=1)[0].tolist()

  def encode_batch(
    self, texts: Sequence[str], max_length: int, num_threads: int = -1
  ) -> list[np.ndarray]:
    """Returns an int32 array of ids [<= max_length] for each text.

    A text that is too long keeps BOS, its first max_length - 2 pieces, and EOS; an
    empty text is [BOS, EOS]. `num_threads` -1 uses every core.

    Raises:
      ConfigError: max_length < 3 leaves no room for text.
      DataError: a text holds a lone surrogate.
    """
    if max_length < 3:
      raise ConfigError(
        f"max_length {max_length} has no room for BOS, text and EOS; set 3 or more"
      )
    room = max_length - 2
    _check_texts(texts)
    pieces = self._processor.encode(
      [self._cut(text, room) for text in texts], out_type=int, num_threads=num_threads
    )
    return [np.array([self.bos_id, *p[:room], self.eos_id], np.int32) for p in pieces]

  def encode_documents(
    self, texts: Sequence[str], num_threads: int = -1
  ) -> list[np.ndarray]:
    """Returns an int32 array of all pieces of each text, without BOS and EOS.

    Raises:
      DataError: a text holds a lone surrogate.
    """
    _check_texts(texts)
    parts = [self._parts(text) for text in texts]
    encoded = self._processor.encode(
      [part for own in parts for part in own], out_type=int, num_threads=num_threads
    )
    pieces = iter(encoded)
    return [np.array([i for _ in own for i in next(pieces)], np.int32) for own in parts]

  def decode(self, ids: Iterable[int] | np.ndarray) -> str:
    """Returns the text of ids; control ids (pad, bos, eos, unused) give no text.

    Raises:
      DataError: an id is outside the vocabulary.
    """
    ids = [int(i) for i in ids]
    if outside := [i for i in ids if not 0 <= i < self.size]:
      raise DataError(
        f"id {outside[0]} is outside vocabulary {self._name} of {self.size} pieces;"
        " was the text encoded with another vocabulary?"
      )
    return self._processor.decode(ids)

  def _cut(self, text: str, room: int) -> str:
    """Returns a prefix of the text whose first `room` pieces are the whole text's.

    Exact: where no piece holds a space after another character, neither a merge nor
    a user-defined match crosses such a place in the text, so the pieces up to it do
    not depend on what follows; and as a piece covers at most `_longest` characters,
    there are at least `room` of them.
    """
    bound = room * self._longest
    if len(text) <= bound or not self._splits_at_spaces:
      return text
    place = _INNER_SPACE.search(text, bound)
    return text[: place.start() + 1] if place else text

  def _parts(self, text: str) -> list[str]:
    """Returns the text in parts whose pieces, end to end, are the whole text's.

    For the reason that `_cut` gives; parts are encoded in parallel, in little memory.
    """
    if not self._splits_at_spaces or self._prepends_space:
      return [text]
    parts, start = [], 0
    while place := _INNER_SPACE.search(text, start + _PART):
      parts.append(text[start : place.start() + 1])
      start = place.start() + 1
    return [*parts, text[start:]]


def _parse(serialized: bytes, name: str) -> ModelProto:
  try:
    if (model := ModelProto.FromString(serialized)).pieces:
      return model
  except DecodeError:
    pass
  raise DataError(
    f"vocabulary {name} is not a SentencePiece model (perhaps a tokenizer.json or a Git"
    " LFS pointer); give Gemma's tokenizer.model"
  )


def _splits_at_spaces(model: ModelProto) -> bool:
  normalizer, trainer = model.normalizer_spec, model.trainer_spec
  return (
    trainer.model_type == TrainerSpec.BPE
    and trainer.byte_fallback  # Else a run of unknown characters is one piece.
    and not trainer.treat_whitespace_as_suffix
    and not normalizer.precompiled_charsmap
    and not normalizer.remove_extra_whitespaces
    and not any(_INNER_SPACE.search(piece.piece) for piece in model.pieces)
  )


def _without_control_matches(model: ModelProto, serialized: bytes) -> bytes:
  """Returns the model, ids unchanged, where text matches no control-named piece."""
  textual = (p for p in model.pieces if p.type in (_Piece.USER_DEFINED, _Piece.NORMAL))
  matching = [piece for piece in textual if _CONTROL_NAME.fullmatch(piece.piece)]
  for piece in matching:
    piece.type = _Piece.CONTROL
  return model.SerializeToString() if matching else serialized


def _check_texts(texts: Sequence[str]) -> None:
  for i, text in enumerate(texts):
    try:
      text.encode()
    except UnicodeEncodeError as error:
      raise DataError(
        f"text {i} of the batch is not Unicode text ({error}); mend the escapes in its"
        " source, or drop the record"
      ) from None


def train_vocabulary(
  texts: Iterable[str],
  size: int,
  output: str | os.PathLike[str],
  *,
  sentinels: int = 128,
  max_bytes: int = 24_000_000,
) -> SentencePieceVocabulary:
  """Trains a BPE vocabulary of exactly `size` pieces and writes it to `output`.

  The layout is Gemma 3's on a small scale: pad 0, eos 1, bos 2, unk 3, `<mask>` 4,
  `[multimodal]` 5, `<unused0..98>` 6-104, `<start_of_turn>` 105, `<end_of_turn>`
  106, then 256 byte pieces and the learned pieces, and at the top
  `<start_of_image>`, `<end_of_image>` and `sentinels` pieces `<unused99>`, … for
  UL2. All specials are CONTROL. As in Gemma there is no dummy prefix and no
  normalisation, spaces are kept, digits are split and unknown characters fall back
  to bytes. The same texts, in any order, give the same bytes. Of a larger corpus the
  `max_bytes` of text with the smallest hashes are used: pieces that matter are
  frequent, and training time grows faster than the text.

  Raises:
    ConfigError: `size` has no room for the specials and the corpus's alphabet.
    DataError: the corpus has too few distinct substrings for `size`.
  """
  top = ["<start_of_image>", "<end_of_image>"]
  top += [f"<unused{_LOW_UNUSED + i}>" for i in range(sentinels)]
  model = _train_bpe(list(_sample(texts, max_bytes)), size, len(top))
  if (found := len(model.pieces) + len(top)) < size:
    raise DataError(
      f"the corpus is too small for a vocabulary of {size} pieces: the largest size"
      f" that works is {found}; lower the size or add text"
    )
  for piece in top:
    model.pieces.add(piece=piece, score=0.0, type=_Piece.CONTROL)
  model.trainer_spec.vocab_size = size
  model.trainer_spec.ClearField("num_threads")  # Bytes depend on the texts only.
  vocabulary = SentencePieceVocabulary.from_serialized(
    model.SerializeToString(deterministic=True), os.fspath(output)
  )
  vocabulary.save(output)
  return vocabulary


def _train_bpe(lines: Sequence[str], size: int, top: int) -> ModelProto:
  if not lines:
    raise DataError("no text to train a vocabulary on: the corpus is empty")
  writer = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=writer,
      model_type="bpe",
      vocab_size=max(size - top, 4),
      hard_vocab_limit=False,  # We report the size that works ourselves.
      **_ROLES,
      control_symbols=_LOW_SPECIALS,
      byte_fallback=True,
      split_digits=True,
      allow_whitespace_only_pieces=True,
      normalization_rule_name="identity",
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      character_coverage=0.9995,  # Rarer characters are spelt in bytes.
      max_sentence_length=1 << 30,
      shuffle_input_sentence=False,
      num_threads=os.cpu_count() or 1,
      minloglevel=2,
    )
  except RuntimeError as error:
    if match := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
      raise ConfigError(
        f"vocabulary size {size} is too small: specials, bytes and the corpus's"
        f" alphabet take {int(match[1]) + top}; set a larger size"
      ) from error
    raise
  return ModelProto.FromString(writer.getvalue())


def _sample(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
  """Yields lines of the texts of smallest hash, in their order, up to `max_bytes`."""
  kept: list[tuple[int, bytes]] = []  # a heap with the largest hash on top
  total = 0
  for text in texts:
    encoded = text.encode("utf-8", "replace")
    digest = hashlib.blake2b(encoded, digest_size=8).digest()
    heapq.heappush(kept, (-int.from_bytes(digest, "big"), encoded))
    total += len(encoded)
    while total > max_bytes and len(kept) > 1:
      total -= len(heapq.heappop(kept)[1])
  for _, encoded in sorted(kept, reverse=True):
    # Split where SentencePiece's trainer would skip the whole text.
    yield from filter(str.strip, re.split("[\n\r\t\0▅]", encoded.decode()))
