"""Batches of corrupted, packed segments: functions of (seed, step, batch size).

The schedule is that of pairs (`embgemma.data.reader`). A segment's corruption depends
on seed, task, record and epoch; rows on lengths and drawn denoisers alone, so that
every process knows the shapes of the global batch without reading texts.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from embgemma.data import sequence_packing, sources, tokenization
from embgemma.data.cache import CachedTask
from embgemma.data.denoising import Corruption
from embgemma.data.reader import RecordSchedule, StepBatch
from embgemma.data.shape_plan import deal_examples
from embgemma.data.tasks import digest
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import DataError
from embgemma.typing import Int


class TextSource:
  """The batch of sequences of any step.

  Args:
    tasks: Complete caches of segments.
    corruption: What becomes of a segment; its lengths are those of a row.
    batch_size: B, segments of the global batch.
    seed: Of the run.
    num_shards: Data shards of the mesh; divides batch_size.
    vocabulary_size: Rows of the model's table, against which caches are checked.
    own_shards: Shards that this process reads and packs, in the order in which their
      arrays lie end to end; None is all.
    microbatch_tokens: Token slots, of both sides, of one shard's microbatch; None is
      all at once.

  Attributes:
    plans: Shapes of each task's batches.

  Raises:
    ConfigError: batch_size is larger than a task, or not divided by num_shards.
    DataError: a cache holds token ids outside the table, or cannot be read, or holds
      segments longer than the corruption's.
  """

  def __init__(
    self,
    tasks: Sequence[CachedTask],
    corruption: Corruption,
    batch_size: int,
    seed: int,
    num_shards: int,
    vocabulary_size: int,
    own_shards: Sequence[int] | None = None,
    microbatch_tokens: int | None = None,
  ):
    for task in tasks:
      if task.texts != 1 or task.statistics["max_text_tokens"] > corruption.longest:
        raise DataError(
          f"{task.directory} does not hold segments of up to {corruption.longest} "
          "tokens; run `embgemma cache` with these flags"
        )
    self._schedule = RecordSchedule(
      tasks, batch_size, seed, num_shards, vocabulary_size
    )
    self._corruption = corruption
    self._seed = seed
    self._num_shards = num_shards
    self._own_shards = list(range(num_shards) if own_shards is None else own_shards)
    self.plans = tuple(
      sequence_packing.plan_rows(
        self._sampled_sizes(index),
        corruption.capacity,
        batch_size,
        num_shards,
        microbatch_tokens,
      )
      for index in range(len(tasks))
    )

  def _sampled_sizes(self, index: int) -> Int[np.ndarray, "n 2"]:
    """Tokens of inputs and targets that segments of a task may become."""
    lengths = self._schedule.sample(index)[:, 0]
    return self._corruption.draw(0, np.arange(len(lengths)), lengths).sizes

  def batch(self, step: int) -> StepBatch:
    """The batch of a step, from 0."""
    scheduled = self._schedule.at(step)
    name = self._schedule.tasks[scheduled.index].name
    key = int(digest([self._seed, name, scheduled.epoch, "corruption"]), 16)
    draws = self._corruption.draw(key, scheduled.records, scheduled.lengths[:, 0])
    shards = deal_examples(draws.sizes, self._num_shards)
    layouts = [
      sequence_packing.lay_out(draws.sizes[shard], self._corruption.capacity)
      for shard in shards
    ]
    shape = self.plans[scheduled.index].shape(max(layout.rows for layout in layouts))
    own = np.concatenate([shards[shard] for shard in self._own_shards])
    records = self._schedule.read(scheduled, own)
    examples = self._corruption.examples(
      draws.take(own), records.words, records.starts[:, 0]
    )
    arrays = sequence_packing.place(
      examples, [layouts[shard] for shard in self._own_shards], shape
    )
    return StepBatch(
      step, name, arrays, int(draws.sizes.sum()), self._num_shards * shape.tokens
    )


def held_out_segments(
  source: sources.PythonSource,
  vocabulary: SentencePieceVocabulary,
  longest: int,
  limit: int | None = None,
  on_bad_record: str = "fail",
) -> list[np.ndarray]:
  """Segments of a source's documents, tokenised and cut as a cache holds them.

  Args:
    source: Of documents; of the built-in corpus its validation split is read.
    vocabulary: Of the model.
    longest: Most tokens of a segment.
    limit: Only the first so many; None is all of them.
    on_bad_record: "fail" or "skip".

  Raises:
    DataError: the first bad record, or no segment at all.
  """
  split = source.splits[-1]
  examples = source.examples(split, on_bad_record, sources.SkipLog())
  documents = (example["text"] for example in examples)
  segments = itertools.chain.from_iterable(
    own for _, own in tokenization.document_segments(documents, vocabulary, longest)
  )
  found = list(itertools.islice(segments, limit))
  if not found:
    raise DataError(f"{source} has no text to evaluate on")
  return found
