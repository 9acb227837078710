"""What the one trainer does differently for pairs and for documents."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from embgemma.data import packing, sequence_packing
from embgemma.data.cache import Manifest
from embgemma.data.config import CachedData, DataConfig, TextDataConfig
from embgemma.data.denoisers import Sentinels, sentinels_needed
from embgemma.data.denoising import Corruption
from embgemma.data.reader import BatchSource, Shards, StepSource
from embgemma.data.schedule import RecordSchedule
from embgemma.data.shape_plan import plan_shapes
from embgemma.data.teacher_vectors import TeacherVectors
from embgemma.data.text_reader import TextSource
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import ConfigError
from embgemma.evaluation import denoising, suite
from embgemma.inference.embedder import TextEncoder
from embgemma.losses.denoising import Denoising
from embgemma.losses.objective import Objective
from embgemma.models import attention, embedder, encoder_decoder
from embgemma.models.config import BackboneConfig, EmbedderConfig
from embgemma.training.flops import forward_flops, sequence_flops
from embgemma.training.learners import DenoisingLearner, EmbeddingLearner, Learner
from embgemma.training.partitioning import BATCH_AXES, data_shards, own_shards
from embgemma.training.stage_protocol import Evaluation, Stage, TypicalBatch
from embgemma.typing import Int

# Slots of a device at a time in evaluating documents: forward passes need little.
_EVALUATION_TOKENS = 8192
_CHECKED_EXAMPLES = 64  # of each task whose teacher vectors are read before a run


def make_stage(
  model: EmbedderConfig | BackboneConfig,
  objective: Objective | Denoising,
  data: CachedData,
  platform: str | None = None,
) -> Stage:
  """The stage of a model, its loss and its data, checked.

  Args:
    model: Of the run.
    objective: Its loss.
    data: What to train on.
    platform: Of its devices; None leaves the model's attention open.

  Raises:
    ConfigError: they do not belong together.
  """
  if (
    isinstance(model, EmbedderConfig)
    and isinstance(objective, Objective)
    and isinstance(data, DataConfig)
  ):
    embedding = model if platform is None else embedder.on_platform(model, platform)
    return EmbeddingStage(embedding, objective, data)
  if (
    isinstance(model, BackboneConfig)
    and isinstance(objective, Denoising)
    and isinstance(data, TextDataConfig)
  ):
    stacks = model if platform is None else encoder_decoder.on_platform(model, platform)
    return DenoisingStage(stacks, objective, data)
  names = ", ".join(type(part).__name__ for part in (model, objective, data))
  raise ConfigError(
    f"the run's model, objective and data are {names}, which do not belong together: "
    "an EmbedderConfig trains on pairs (gin/stages/prefinetune.gin, finetune.gin), a "
    "BackboneConfig (gin/models/decoder.gin, encoder_decoder.gin after a model file) "
    "on documents (gin/stages/pretrain.gin, adapt.gin)"
  )


@dataclasses.dataclass(frozen=True)
class EmbeddingStage:
  """An embedder trained on pairs."""

  config: EmbedderConfig
  objective: Objective
  data: DataConfig

  def __post_init__(self):
    self.objective.check(self.config.embedding_width)
    embedder.check_formats(self.config)
    if self.objective.needs_teacher and self.data.teacher is None:
      raise ConfigError(
        "the objective has a distillation term, and there is no teacher: make "
        "vectors with `embgemma teach` and set TEACHER to their name, or drop the term"
      )
    if self.data.teacher is not None and not self.objective.needs_teacher:
      raise ConfigError(
        f"TEACHER is {self.data.teacher!r}, and the objective has no distillation "
        "term, so its vectors would not be read; use gin/stages/distill.gin, or set "
        "TEACHER to None"
      )
    longest = self.config.transformer.max_length
    if self.data.max_length > longest:
      raise ConfigError(
        f"TASK_FEATURE_LENGTHS reaches {self.data.max_length}, the model's max_length "
        f"is {longest}"
      )

  @property
  def learner(self) -> Learner:
    return EmbeddingLearner(self.config, self.objective)

  @property
  def row_lengths(self) -> tuple[int, ...]:
    """Lengths of rows that its attention takes."""
    return attention.row_lengths(self.config.transformer, packing.ROW_LENGTHS)

  @property
  def row(self) -> tuple[int, ...]:
    return (packing.row_length(self.data.max_length, self.row_lengths),)

  def source(
    self,
    manifest: Manifest,
    mesh: Mesh,
    batch_size: int,
    seed: int,
    microbatch_tokens: int,
  ) -> BatchSource:
    schedule = RecordSchedule(
      manifest.tasks,
      batch_size,
      seed,
      self.config.transformer.vocab_size,
      self.data.avoid_duplicates,
    )
    return StepSource(
      schedule,
      Shards(data_shards(mesh), own_shards(mesh)),
      microbatch_tokens,
      self.row_lengths,
      self._teachers(manifest) if self.objective.needs_teacher else None,
      self.data.one_shape,
    )

  def _teachers(self, manifest: Manifest) -> list[TeacherVectors]:
    """The teacher vectors of each task, checked.

    Raises:
      ConfigError: a term cannot work with their width.
      DataError: they are not there, or damaged.
    """
    assert self.data.teacher is not None
    teachers = []
    for task in manifest.tasks:
      vectors = TeacherVectors(task.directory, self.data.teacher)
      # A store that is not there shows now, and not at the task's first step.
      vectors.gather(np.arange(min(len(vectors), _CHECKED_EXAMPLES)))
      self.objective.check(self.config.embedding_width, vectors.width)
      teachers.append(vectors)
    return teachers

  def typical_batch(
    self,
    lengths: Int[np.ndarray, "n texts"],
    batch_size: int,
    num_shards: int,
    microbatch_tokens: int,
  ) -> TypicalBatch:
    groups = plan_shapes(
      lengths,
      batch_size,
      num_shards,
      microbatch_tokens,
      self.row_lengths,
      one_shape=self.data.one_shape,
    ).typical
    negatives = lengths.shape[1] - 2
    share = batch_size / len(lengths)
    return TypicalBatch(
      groups,
      packing.abstract_pairs(
        groups,
        batch_size,
        negatives,
        num_shards,
        self.objective.teacher_width(self.config.embedding_width),
      ),
      round(share * int(lengths.sum())),
      share * forward_flops(self.config, lengths.reshape(-1)),
    )

  def evaluation(
    self,
    entries: Mapping[str, Any],
    vocabulary: SentencePieceVocabulary,
    mesh: Mesh,
    max_length: int | None,
    tokens: int | None,
  ) -> Evaluation:
    widths = self.config.matryoshka_widths
    evaluators = suite.evaluators(entries, widths, table=self.data.prompt_table)
    for evaluator in evaluators:
      evaluator.check()
    length = max_length or self.data.max_length
    encoder = TextEncoder(self.config, vocabulary, length, tokens, mesh, BATCH_AXES)
    return Evaluation(
      evaluators, lambda params: functools.partial(encoder.encode, params)
    )


@dataclasses.dataclass(frozen=True)
class DenoisingStage:
  """Stacks trained on documents."""

  config: BackboneConfig
  objective: Denoising
  data: TextDataConfig

  def __post_init__(self):
    if self.config.decoder is None:
      raise ConfigError(
        "MODEL is an encoder alone, which predicts nothing; give BackboneConfig a "
        "decoder (gin/models/encoder_decoder.gin)"
      )
    sides = {"inputs": self.config.encoder, "targets": self.config.decoder}
    wanted = tuple(side for side, stack in sides.items() if stack is not None)
    if self.data.features != wanted:
      kind = "a decoder alone" if self.config.encoder is None else "an encoder-decoder"
      raise ConfigError(
        f"MODEL is {kind}, and the denoisers make {' and '.join(self.data.features)}; "
        "causal_lm is for a decoder alone (gin/models/decoder.gin), all others for an "
        "encoder-decoder (gin/models/encoder_decoder.gin)"
      )
    for stack in self.config.stacks:
      # Rows may be longer: positions begin anew with each segment.
      if self.data.longest > stack.max_length:
        raise ConfigError(
          f"segments have up to {self.data.longest} tokens, the model's max_length is "
          f"{stack.max_length}; set SEGMENT_TOKENS to that or less"
        )

  @property
  def learner(self) -> Learner:
    return DenoisingLearner(self.config, self.objective)

  @property
  def row(self) -> tuple[int, ...]:
    return tuple(self.data.lengths[side] for side in self.data.features)

  @property
  def table_rows(self) -> int:
    """Of the smaller table: ids of both sides must be below."""
    return min(stack.vocab_size for stack in self.config.stacks)

  def source(
    self,
    manifest: Manifest,
    mesh: Mesh,
    batch_size: int,
    seed: int,
    microbatch_tokens: int,
  ) -> BatchSource:
    vocabulary = SentencePieceVocabulary(manifest.vocabulary)
    return TextSource(
      RecordSchedule(manifest.tasks, batch_size, seed, self.table_rows),
      self.data.corruption(vocabulary, self.table_rows),
      Shards(data_shards(mesh), own_shards(mesh)),
      microbatch_tokens,
    )

  def typical_batch(
    self,
    lengths: Int[np.ndarray, "n texts"],
    batch_size: int,
    num_shards: int,
    microbatch_tokens: int,
  ) -> TypicalBatch:
    denoisers, longest = tuple(self.data.denoisers), self.data.longest
    # Sizes depend on no id: there need not be a vocabulary yet.
    sentinels = Sentinels(0, max(1, sentinels_needed(denoisers, longest)))
    corruption = Corruption(denoisers, self.data.lengths, longest, sentinels, 0, 0)
    sizes = corruption.draw(0, np.arange(len(lengths)), lengths[:, 0]).sizes
    shape = sequence_packing.plan_rows(
      sizes, corruption.capacity, batch_size, num_shards, microbatch_tokens
    ).typical
    share = batch_size / len(lengths)
    return TypicalBatch(
      (shape,),
      sequence_packing.abstract_sequences(shape, num_shards),
      round(share * int(sizes.sum())),
      share * sequence_flops(self.config, sizes),
    )

  def evaluation(
    self,
    entries: Mapping[str, Any],
    vocabulary: SentencePieceVocabulary,
    mesh: Mesh,
    max_length: int | None,
    tokens: int | None,
  ) -> Evaluation:
    if max_length is not None:
      raise ConfigError(
        "train.eval_max_length is for embedders: held-out documents are cut into "
        "segments as in training; remove it"
      )
    evaluators = denoising.evaluators(
      entries,
      self.config,
      vocabulary,
      self.data.corruption(vocabulary, self.table_rows),
      mesh,
      tokens or _EVALUATION_TOKENS,
      BATCH_AXES,
      self.data.on_bad_record,
    )
    return Evaluation(evaluators, lambda params: params)
