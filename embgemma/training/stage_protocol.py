"""What the one trainer asks of a stage, and what it gets."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from embgemma.data.cache import Manifest
from embgemma.data.config import CachedData
from embgemma.data.packing import GroupShape
from embgemma.data.reader import BatchSource
from embgemma.data.sequence_packing import SequenceShape
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.evaluation import suite
from embgemma.models.config import BackboneConfig, EmbedderConfig
from embgemma.training.learners import Learner
from embgemma.typing import Int, Params, PyTree


@runtime_checkable
class Evaluator(Protocol):
  """A named evaluation."""

  @property
  def name(self) -> str: ...

  def evaluate(self, subject: Any, /) -> dict[str, float]: ...


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Evaluators, and what they take.

  Attributes:
    evaluators: In order.
    subject: What an evaluator takes, of a model's parameters.
  """

  evaluators: tuple[Evaluator, ...]
  subject: Callable[[Params], Any]

  def results(self, params: Params) -> suite.TaskResults:
    """Metrics of each evaluator."""
    subject = self.subject(params)
    return {each.name: each.evaluate(subject) for each in self.evaluators}


@dataclasses.dataclass(frozen=True)
class TypicalBatch:
  """A batch as it is expected.

  Attributes:
    groups: Rows of one shard, by their shape.
    arrays: Shapes and dtypes of the global batch, as ShapeDtypeStruct.
    tokens: Real tokens of all shards.
    forward_flops: Of one forward pass over the real tokens.
  """

  groups: tuple[GroupShape | SequenceShape, ...]
  arrays: PyTree
  tokens: int
  forward_flops: float


@runtime_checkable
class Stage(Protocol):
  """A model, its loss and its data, on given devices.

  Attributes:
    config: Of the model, with the attention that suits the devices.
    data: What it trains on.
  """

  @property
  def config(self) -> EmbedderConfig | BackboneConfig: ...

  @property
  def data(self) -> CachedData: ...

  @property
  def learner(self) -> Learner:
    """The model and its loss."""
    ...

  @property
  def row(self) -> tuple[int, ...]:
    """Tokens of the longest row, on each side of the model."""
    ...

  def source(
    self,
    manifest: Manifest,
    mesh: Mesh,
    batch_size: int,
    seed: int,
    microbatch_tokens: int,
  ) -> BatchSource:
    """The batches of a run.

    Raises:
      ConfigError, DataError: see the sources; the vectors of a teacher are not there,
        or damaged.
    """
    ...

  def typical_batch(
    self,
    lengths: Int[np.ndarray, "n texts"],
    batch_size: int,
    num_shards: int,
    microbatch_tokens: int,
  ) -> TypicalBatch:
    """A batch of texts of such lengths, without reading any.

    Args:
      lengths: Tokens of query, positive and negatives of examples, 0 is none; or of
        segments.
      batch_size: B, a multiple of num_shards.
      num_shards: S.
      microbatch_tokens: Token slots of one shard's microbatch.
    """
    ...

  def evaluation(
    self,
    entries: Mapping[str, Any],
    vocabulary: SentencePieceVocabulary,
    mesh: Mesh,
    max_length: int | None,
    tokens: int | None,
  ) -> Evaluation:
    """What a run is judged by.

    Args:
      entries: EVALUATIONS.
      vocabulary: Of the run.
      mesh: Of the run.
      max_length: Tokens a text is cut to; None is the longest in training.
      tokens: Slots of a device at a time; None is what suits it.

    Raises:
      ConfigError, DataError: an entry is wrong, or its data is.
    """
    ...
