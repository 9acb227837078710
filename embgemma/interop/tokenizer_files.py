"""The tokenizer files of a Hugging Face checkpoint, from a vocabulary.

Ids are those of `SentencePieceVocabulary` where the tokenizer that reads the files
leaves text that spells a control token alone: transformers does, as
`tokenizer_config` asks for it; whoever loads tokenizer.json with the tokenizers
library must set `tokenizer.encode_special_tokens = True`.

SentencePiece merges by the score of the merged piece, the leftmost pair first where
scores tie; tokenizers ranks each pair of pieces. Two pieces of equal score, which
SentencePiece's trainer never gives, would make ids differ (`inexact`). Splits of one
piece also tie, yet no text is known where that shows: random vocabularies and
texts over two letters gave equal ids, even with these ranks reversed.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]
  ModelProto,
  TrainerSpec,
)

from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import ConfigError

_Piece = ModelProto.SentencePiece
_Pieces = Sequence[Any]  # of _Piece, which type checkers do not see
_Merge = tuple[str, str]

NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
# Splits nothing, as no space is left; Gemma's file has it.
PRE_TOKENIZER = {
  "type": "Split",
  "pattern": {"String": " "},
  "behavior": "MergedWithPrevious",
  "invert": False,
}
_DECODER = {
  "type": "Sequence",
  "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
  ],
}


def tokenizer_json(vocabulary: SentencePieceVocabulary) -> bytes:
  """Returns the tokenizer.json that gives the vocabulary's ids, BOS and EOS included.

  The pipeline is that of Gemma's own file: space to "▁", BPE with byte fallback. As
  in transformers' converters, the merges are all splits of a piece into two pieces,
  by the score of the whole, longer left halves first. Unlike them, only NORMAL
  pieces take part: text never reaches a USER_DEFINED piece by merges, because
  SentencePiece matches it first, and so do we: as an added token, after
  normalisation, or runs of spaces would not match their runs of "▁".

  Raises:
    ConfigError: tokenizer.json cannot express the vocabulary (see also `inexact`).
  """
  model = vocabulary.effective_model
  pieces = model.pieces
  if reason := not_gemmas(model):
    raise ConfigError(
      f"the vocabulary has no tokenizer.json: {reason}; use Gemma's tokenizer.model"
      " or a vocabulary made by train_vocabulary"
    )
  merges = list(merges_of(_normal(pieces)))
  content = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
      _added_token(i, piece.piece, special=piece.type != _Piece.USER_DEFINED)
      for i, piece in enumerate(pieces)
      if piece.type not in (_Piece.NORMAL, _Piece.BYTE)
    ],
    "normalizer": NORMALIZER,
    "pre_tokenizer": PRE_TOKENIZER,
    "post_processor": _between(pieces, vocabulary.bos_id, vocabulary.eos_id),
    "decoder": _DECODER,
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": _unknown(pieces),
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": True,
      "byte_fallback": True,
      "ignore_merges": False,
      "vocab": {piece.piece: i for i, piece in enumerate(pieces)},
      "merges": merges,
    },
  }
  return json.dumps(content, ensure_ascii=False).encode()


def inexact(vocabulary: SentencePieceVocabulary) -> str:
  """Returns why some texts get other ids from its tokenizer.json; "" if none does."""
  pieces = vocabulary.effective_model.pieces
  return not_in_both(pieces) or _tied(_normal(pieces))


def tokenizer_config(
  vocabulary: SentencePieceVocabulary, max_length: int
) -> dict[str, Any]:
  """Returns the content of tokenizer_config.json.

  `max_length` counts BOS and EOS. Read by transformers 4.57 and 5; the special tokens
  are in it, so neither needs a special_tokens_map.json. PreTrainedTokenizerFast
  takes tokenizer.json as it is, where GemmaTokenizer builds its own pipeline from
  the pieces and merges. Unlike Google's, `split_special_tokens` is set, so that text
  that spells a control token stays text, as it was in training.
  """
  pieces = vocabulary.effective_model.pieces
  config = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": max_length,
    "model_input_names": ["input_ids", "attention_mask"],
    "padding_side": "right",
    "truncation_side": "right",
    "add_bos_token": True,
    "add_eos_token": True,
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
    "spaces_between_special_tokens": False,
    "bos_token": pieces[vocabulary.bos_id].piece,
    "eos_token": pieces[vocabulary.eos_id].piece,
    "pad_token": pieces[vocabulary.pad_id].piece,
    "unk_token": _unknown(pieces),
  }
  if any(piece.piece == "<mask>" for piece in pieces):
    config["mask_token"] = "<mask>"
  return config


def _added_token(token_id: int, content: str, special: bool) -> dict[str, Any]:
  return {
    "id": token_id,
    "content": content,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": not special,
    "special": special,
  }


def _between(pieces: _Pieces, bos_id: int, eos_id: int) -> dict[str, Any]:
  """Returns the post-processor that puts each text between BOS and EOS."""
  bos, eos = pieces[bos_id].piece, pieces[eos_id].piece

  def template(sequence: str, type_id: int) -> list[dict[str, Any]]:
    return [
      {"SpecialToken": {"id": bos, "type_id": type_id}},
      {"Sequence": {"id": sequence, "type_id": type_id}},
      {"SpecialToken": {"id": eos, "type_id": type_id}},
    ]

  return {
    "type": "TemplateProcessing",
    "single": template("A", 0),
    "pair": template("A", 0) + template("B", 1),
    "special_tokens": {
      bos: {"id": bos, "ids": [bos_id], "tokens": [bos]},
      eos: {"id": eos, "ids": [eos_id], "tokens": [eos]},
    },
  }


def _unknown(pieces: _Pieces) -> str:
  return next(piece.piece for piece in pieces if piece.type == _Piece.UNKNOWN)


def _normal(pieces: _Pieces) -> dict[str, float]:
  """Returns the scores of the pieces that BPE makes."""
  return {piece.piece: piece.score for piece in pieces if piece.type == _Piece.NORMAL}


def merges_of(normal: Mapping[str, float]) -> Iterator[_Merge]:
  """Yields every split of a piece into two, pieces of the highest score first."""
  for piece in sorted(normal, key=normal.__getitem__, reverse=True):
    for left, right in splits(piece):
      if left in normal and right in normal:
        yield left, right


def splits(piece: str) -> Iterator[_Merge]:
  """Yields the splits in two, the longest left half first."""
  for i in range(len(piece) - 1, 0, -1):
    yield piece[:i], piece[i:]


def not_gemmas(model: ModelProto) -> str:
  """Returns in which setting a model differs from Gemma's; empty if in none."""
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  reasons = {
    "it is no BPE model": trainer.model_type != TrainerSpec.BPE,
    "it has no byte fallback": not trainer.byte_fallback,
    "it normalises text": bool(normalizer.precompiled_charsmap),
    "it puts a space before the text (add_dummy_prefix)": normalizer.add_dummy_prefix,
    "it drops repeated spaces (remove_extra_whitespaces)": (
      normalizer.remove_extra_whitespaces
    ),
    "it keeps spaces as they are (escape_whitespaces is off)": (
      not normalizer.escape_whitespaces
    ),
  }
  return next((reason for reason, found in reasons.items() if found), "")


def not_in_both(pieces: _Pieces) -> str:
  """Returns why SentencePiece and tokenizers would differ on pieces; empty if not."""
  control = (_Piece.CONTROL, _Piece.UNKNOWN)
  for piece in pieces:
    if piece.type == _Piece.UNUSED:
      return f"piece {piece.piece!r} is UNUSED"
    if piece.type == _Piece.USER_DEFINED and " " in piece.piece:
      return f"the user-defined piece {piece.piece!r} holds a space, not '▁'"
    if piece.type in control and len(piece.piece) == 1:
      return f"{piece.piece!r} is a control piece of one character, which text may hold"
  if piece := _merged_from_no_pieces(pieces):
    return f"piece {piece!r} holds a character that is no piece itself"
  return ""


def _merged_from_no_pieces(pieces: _Pieces) -> str:
  """Returns a piece that SentencePiece merges from a character that is no piece."""
  text = (_Piece.NORMAL, _Piece.USER_DEFINED)
  alone = {piece.piece for piece in pieces if piece.type in text}
  normal = [piece.piece for piece in pieces if piece.type == _Piece.NORMAL]
  reached: set[str] = set().union(*normal)  # All characters.
  if not (strange := reached - alone):
    return ""
  for piece in sorted(normal, key=len):
    for halves in splits(piece):
      if reached.issuperset(halves):
        reached.add(piece)
        if not strange.isdisjoint(halves):
          return piece
  return ""


def _tied(scores: Mapping[str, float]) -> str:
  merged = [piece for piece, _ in itertools.groupby(map("".join, merges_of(scores)))]
  for piece, following in itertools.pairwise(merged):
    if scores[piece] == scores[following]:
      return f"pieces {piece!r} and {following!r} have the same score"
  return ""
