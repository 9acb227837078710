"""A model outside a run: what every format is read into and written from."""

import dataclasses
import pathlib

import jax

from embgemma.checkpoints import Description
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import CheckpointError
from embgemma.interop import tokenizer_files
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
  model_path = tokenizer or directory / "tokenizer.model"
  json_path = directory / "tokenizer.json"
  notes: tuple[str, ...] = ()
  content = None
  if tokenizer is None and json_path.exists():
    content = json_path.read_bytes()
    beyond = tokenizer_files.tokens_beyond(content, rows)
    notes = tuple(
      f"{token} (id {number}) has no row in the table of {rows:,}: text that spells it "
      "is tokenised as any text"
      for token, number in beyond.items()
    )
  if tokenizer is not None or model_path.exists():
    vocabulary = SentencePieceVocabulary(model_path)
  elif content is not None:
    serialized = tokenizer_files.sentencepiece_model(content, str(json_path), rows)
    vocabulary = SentencePieceVocabulary.from_serialized(serialized, str(json_path))
    model_path = json_path
    notes += ("tokenizer.model was made from tokenizer.json",)
  else:
    raise CheckpointError(
      f"{directory}: has neither tokenizer.model nor tokenizer.json; give --tokenizer, "
      "such as Gemma's tokenizer.model"
    )
  sizes = {-(-vocabulary.size // multiple) * multiple for multiple in _MULTIPLES}
  if rows not in sizes:
    raise CheckpointError(
      f"{model_path}: has {vocabulary.size:,} pieces, the model's table {rows:,} rows; "
      "they do not belong together. Give the model's own tokenizer."
    )
  return vocabulary, notes
