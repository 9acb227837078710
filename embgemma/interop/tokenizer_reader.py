"""tokenizer.json of the tokenizers library, read: facts, and a SentencePiece model."""

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]
  ModelProto,
  TrainerSpec,
)

from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import DataError
from embgemma.interop.tokenizer_files import (
  NORMALIZER,
  PRE_TOKENIZER,
  merges_of,
  not_in_both,
)

_Piece = ModelProto.SentencePiece
_Pieces = Sequence[Any]  # of _Piece, which type checkers do not see
_Merge = tuple[str, str]

_STRIPS = ("lstrip", "rstrip", "single_word")
_ROLES = {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>"}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclasses.dataclass(frozen=True)
class TokenizerFacts:
  """What a tokenizer.json says, whether or not we can make a model of it.

  Attributes:
    beyond: Added tokens whose id has no row in the table, to that id; by id.
    pieces: Token of every other id.
    adds_bos: Whether its post-processor puts a token before the text.
    adds_eos: And one after it.
  """

  beyond: Mapping[str, int]
  pieces: Mapping[int, str]
  adds_bos: bool
  adds_eos: bool


def inspect(content: bytes, rows: int, name: str = "tokenizer.json") -> TokenizerFacts:
  """Returns facts about a tokenizer.json of whatever pipeline.

  Such as Gemma's `<image_soft_token>`, id 262,144 of a table of as many rows.

  Raises:
    DataError: `content`, called `name` in the message, is no tokenizer.json.
  """
  with _malformed(name):
    parsed = json.loads(content)
    ids = {str(token): int(i) for token, i in parsed["model"]["vocab"].items()}
    ids |= {t["content"]: int(t["id"]) for t in parsed["added_tokens"]}
    ordered = sorted(ids.items(), key=lambda item: item[1])
    adds_bos, adds_eos = _adds(parsed.get("post_processor") or {})
    return TokenizerFacts(
      beyond={token: i for token, i in ordered if i >= rows},
      pieces={i: token for token, i in ordered if i < rows},
      adds_bos=adds_bos,
      adds_eos=adds_eos,
    )


def _adds(processor: Mapping[str, Any]) -> tuple[bool, bool]:
  """Returns whether a post-processor puts tokens before and after the text."""
  processors = [processor, *processor.get("processors", [])]
  found = [p["single"] for p in processors if p.get("type") == "TemplateProcessing"]
  parts = found[0] if found else [{}]
  return "SpecialToken" in parts[0], "SpecialToken" in parts[-1]


@contextlib.contextmanager
def _malformed(name: str) -> Iterator[None]:
  try:
    yield
  except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
    raise DataError(
      f"{name} is not a tokenizer.json of the tokenizers library ({error!r}); download"
      " it again, or add Gemma's tokenizer.model to its folder"
    ) from error


def sentencepiece_model(content: bytes, name: str, rows: int) -> bytes:
  """Returns a serialized SentencePiece model with the ids of a tokenizer.json.

  For checkpoints without tokenizer.model. Settings are Gemma's, ids as in the file,
  scores minus the rank of a piece's first merge; special added tokens are CONTROL,
  others USER_DEFINED, and tokens at or beyond `rows` are left out (`inspect`).
  BOS and EOS are always added, whatever the file's post-processor. A "\\t" in the
  place of `<0x09>`, as transformers writes it for Gemma, is the byte again.

  Ids differ from the tokenizers library's in three cases, where they are those of
  Gemma's tokenizer.model as `SentencePieceVocabulary` reads it. Text with "▁" in it:
  transformers' files match runs of "▁" before spaces become "▁", SentencePiece
  after. Runs of spaces longer than any piece, in files that transformers 5 converted:
  it ranks short runs first. Text that spells a control token stays text.

  Raises:
    DataError: `content`, called `name` in the message, is no tokenizer.json, or one
      whose ids no SentencePiece model gives.
  """
  source = _read(content, name)
  tokens = _by_id(source, name, rows)
  types = [_piece_type(token, source) for token in tokens]
  pieces = [_Piece(piece=p, type=t) for p, t in zip(tokens, types, strict=True)]
  if reason := not_in_both(pieces):
    raise _no_model(name, reason)
  normal = [piece.piece for piece in pieces if piece.type == _Piece.NORMAL]
  scores = _scores(source.merges, normal, name)
  known = set(tokens)
  for piece in pieces:
    piece.score = scores.get(piece.piece, 0.0)
    if (byte := _byte(piece.piece)) and byte not in known:
      piece.CopyFrom(_Piece(piece=byte, type=_Piece.BYTE))
  model = _gemmas(pieces, source.unknown).SerializeToString(deterministic=True)
  SentencePieceVocabulary.from_serialized(model, name)  # Or says what is wrong.
  return model


@dataclasses.dataclass(frozen=True)
class _Source:
  """What defines the ids of a tokenizer.json."""

  vocab: Mapping[str, int]
  merges: Sequence[_Merge]
  unknown: str
  added: Mapping[str, Mapping[str, Any]]


def _read(content: bytes, name: str) -> _Source:
  with _malformed(name):
    parsed = json.loads(content)
    model = parsed["model"]
    if reason := _not_gemmas_pipeline(parsed):
      raise _no_model(name, reason)
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    return _Source(
      vocab={str(token): int(i) for token, i in model["vocab"].items()},
      merges=[(str(left), str(right)) for left, right in merges],
      unknown=str(model["unk_token"]),
      added={t["content"]: {**t, "id": int(t["id"])} for t in parsed["added_tokens"]},
    )


def _not_gemmas_pipeline(parsed: Mapping[str, Any]) -> str:
  """Returns in which part a tokenizer.json differs from Gemma's; empty if in none."""
  model, normalizer = parsed["model"], parsed.get("normalizer")
  if normalizer == {"type": "Sequence", "normalizers": [NORMALIZER]}:
    normalizer = NORMALIZER
  options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
  reasons = {
    f"its model is {model.get('type')}, not BPE": model.get("type", "BPE") != "BPE",
    "it has no byte fallback": not model.get("byte_fallback"),
    "it sets ignore_merges": bool(model.get("ignore_merges")),
    "its normalizer is not ' ' to '▁'": normalizer != NORMALIZER,
    "its pre-tokenizer is not Gemma's": (
      parsed.get("pre_tokenizer") not in (None, PRE_TOKENIZER)
    ),
    **{f"it sets {option}": bool(model.get(option)) for option in options},
  }
  return next((reason for reason, found in reasons.items() if found), "")


def _no_model(name: str, reason: str) -> DataError:
  return DataError(
    f"{name} has no exact SentencePiece model: {reason}; add the tokenizer.model that"
    " it was made from to its folder"
  )


def _by_id(source: _Source, name: str, rows: int) -> list[str]:
  """Returns the tokens in the order of their ids, which must be 0, 1, 2, …"""
  ids = dict(source.vocab)
  for token, entry in source.added.items():
    if ids.setdefault(token, entry["id"]) != entry["id"]:
      raise _no_model(name, f"token {token!r} has two ids")
    if entry["id"] >= rows:
      del ids[token]
    elif not entry.get("special") and any(map(entry.get, _STRIPS)):
      raise _no_model(name, f"token {token!r} takes part of the text around it")
  tokens = sorted(ids, key=ids.__getitem__)
  for i, token in enumerate(tokens):
    if ids[token] != i:
      raise _no_model(name, f"id {min(i, ids[token])} is missing or taken twice")
  if len(tokens) > rows:
    raise _no_model(
      name, f"it has {len(tokens)} pieces, the embedding table {rows} rows"
    )
  return tokens


def _piece_type(token: str, source: _Source) -> int:
  if token == source.unknown:
    return _Piece.UNKNOWN
  if _BYTE.fullmatch(token):
    return _Piece.BYTE
  if token not in source.added:
    return _Piece.NORMAL
  return _Piece.CONTROL if source.added[token].get("special") else _Piece.USER_DEFINED


def _byte(piece: str) -> str:
  """Returns the name of the byte that an ASCII character is; empty for others."""
  return f"<0x{ord(piece):02X}>" if len(piece) == 1 and piece.isascii() else ""


def _scores(
  merges: Sequence[_Merge], normal: Sequence[str], name: str
) -> dict[str, float]:
  """Returns minus the rank of each piece that merges give.

  Merges of pieces that match whole have no effect in SentencePiece, and are ignored.
  """
  known = set(normal)
  kept = [m for m in merges if known.issuperset((*m, "".join(m)))]
  order = [piece for piece, _ in itertools.groupby(map("".join, kept))]
  scores = {piece: -float(rank) for rank, piece in enumerate(order)}
  if len(order) > len(scores) or set(kept) != set(
    merges_of(dict.fromkeys(normal, 0.0))
  ):
    raise _no_model(name, "its merges are not all splits of each piece, one by one")
  return scores


def _gemmas(pieces: _Pieces, unknown: str) -> ModelProto:
  """Returns a model with Gemma's settings."""
  model = ModelProto(pieces=pieces)
  ids = {piece.piece: i for i, piece in enumerate(pieces)}
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  trainer.model_type = TrainerSpec.BPE
  trainer.vocab_size = len(pieces)
  trainer.byte_fallback = True
  trainer.split_digits = True
  trainer.allow_whitespace_only_pieces = True
  for role, piece in (*_ROLES.items(), ("unk", unknown)):
    setattr(trainer, f"{role}_piece", piece)
    setattr(trainer, f"{role}_id", ids.get(piece, -1))
  normalizer.name = "identity"
  normalizer.add_dummy_prefix = False
  normalizer.remove_extra_whitespaces = False
  normalizer.escape_whitespaces = True
  return model
