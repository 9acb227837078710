"""A model outside a run: what every format is read into and written from."""

import dataclasses
import pathlib

import jax

from embgemma.checkpoints import Description
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import CheckpointError
from embgemma.interop import tokenizer_reader
from embgemma.interop.layout import NumpyTree

BACKBONE_LENGTH = 2048
"""Most tokens of a text in a pretrained stack, until a run says otherwise."""

_MULTIPLES = (1, 64, 128)  # tables are padded to these, for the hardware's sake


@dataclasses.dataclass(frozen=True)
class Model:
  """Weights and all that belongs to them.

  Attributes:
    description: As in a checkpoint directory.
    vocabulary: Of the token table.
    params: Nested dict of float32 arrays, without adapters.
    notes: What a user should know about how it was read.
    directory: Where it was read from.
    step: Of the run that it was read from.
  """

  description: Description
  vocabulary: SentencePieceVocabulary
  params: NumpyTree
  notes: tuple[str, ...] = ()
  directory: pathlib.Path | None = None
  step: int | None = None

  @property
  def size(self) -> int:
    """Parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(self.params))


def equal_lengths(length: int) -> dict[str, int]:
  """`Description.lengths` of a model that has one limit for all texts."""
  return dict.fromkeys(("query", "positive", "negatives"), length)


def read_vocabulary(
  directory: pathlib.Path, rows: int, tokenizer: pathlib.Path | None = None
) -> tuple[SentencePieceVocabulary, tuple[str, ...]]:
  """The vocabulary of a model, and notes about it.

  Args:
    directory: Has tokenizer.model, or tokenizer.json.
    rows: Of the token table.
    tokenizer: A SentencePiece model to take instead.

  Raises:
    CheckpointError: there is no tokenizer, or its size is not the table's.
    DataError: the tokenizer is not one that we can read.
  """
  model_path, json_path = directory / "tokenizer.model", directory / "tokenizer.json"
  notes: list[str] = []
  if tokenizer is not None:
    vocabulary = SentencePieceVocabulary(tokenizer)
  elif json_path.exists():
    vocabulary, notes = _from_json(json_path, model_path, rows)
  elif model_path.exists():
    vocabulary = SentencePieceVocabulary(model_path)
  else:
    raise CheckpointError(
      f"{directory}: has neither tokenizer.model nor tokenizer.json; give --tokenizer, "
      "such as Gemma's tokenizer.model"
    )
  if not _fits(vocabulary, rows):
    raise CheckpointError(
      f"{tokenizer or directory}: the tokenizer has {vocabulary.size:,} pieces, the "
      f"model's table {rows:,} rows; they do not belong together. Give the model's own "
      "tokenizer."
    )
  return vocabulary, tuple(notes)


def _fits(vocabulary: SentencePieceVocabulary, rows: int) -> bool:
  return rows in {-(-vocabulary.size // n) * n for n in _MULTIPLES}


def _from_json(
  json_path: pathlib.Path, model_path: pathlib.Path, rows: int
) -> tuple[SentencePieceVocabulary, list[str]]:
  """The vocabulary where there is a tokenizer.json: what transformers reads.

  A tokenizer.model beside it is better, as it holds Gemma's own scores, but it may be
  left over from before tokens were added.
  """
  content = json_path.read_bytes()
  facts = tokenizer_reader.inspect(content, rows, str(json_path))
  notes = [
    f"{token} (id {number}) has no row in the table of {rows:,}: it stays text"
    for token, number in facts.beyond.items()
  ]
  if not (facts.adds_bos and facts.adds_eos):
    missing = "BOS" if facts.adds_eos else "EOS" if facts.adds_bos else "BOS and EOS"
    notes.append(
      f"its tokenizer does not add {missing}; embgemma adds both, as EmbeddingGemma "
      "does: vectors differ from those of sentence-transformers"
    )
  if model_path.exists():
    vocabulary = SentencePieceVocabulary(model_path)
    if _fits(vocabulary, rows):
      return vocabulary, notes + _disagreements(vocabulary, facts)
  serialized = tokenizer_reader.sentencepiece_model(content, str(json_path), rows)
  notes.append("tokenizer.model was made from tokenizer.json")
  return SentencePieceVocabulary.from_serialized(serialized, str(json_path)), notes


def _disagreements(
  vocabulary: SentencePieceVocabulary, facts: tokenizer_reader.TokenizerFacts
) -> list[str]:
  own = {i: piece.piece for i, piece in enumerate(vocabulary.effective_model.pieces)}
  # transformers' converter writes the byte so.
  same = {("<0x09>", "\t")}
  differing = [
    (i, piece, facts.pieces.get(i))
    for i, piece in own.items()
    if piece != facts.pieces.get(i) and (piece, facts.pieces.get(i)) not in same
  ]
  if not differing:
    return []
  i, ours, theirs = differing[0]
  return [
    f"tokenizer.model and tokenizer.json disagree on {len(differing):,} tokens, such "
    f"as {i}: {ours!r} and {theirs!r}; tokenizer.model is taken. Remove it if tokens "
    "were added since."
  ]
