"""Batches of corrupted, packed segments: functions of (seed, step, batch size).

The schedule is that of pairs (`embgemma.data.schedule`). A segment's corruption depends
on seed, task, record and epoch; rows on lengths and drawn denoisers alone, so that
every process knows the shapes of the global batch without reading texts.
"""

import itertools
from typing import Any

import numpy as np

from embgemma.data import sequence_packing, sources, tokenization
from embgemma.data.bad_records import SkipLog
from embgemma.data.denoising import Corruption
from embgemma.data.fingerprints import digest
from embgemma.data.reader import Shards, StepBatch
from embgemma.data.schedule import RecordSchedule
from embgemma.data.shape_plan import deal_examples
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import DataError
from embgemma.typing import Int


class TextSource:
  """The batch of sequences of any step.

  Args:
    schedule: Which segments a step sees.
    corruption: What becomes of a segment; its lengths are those of a row.
    shards: Of the mesh.
    microbatch_tokens: Token slots, of both sides, of one shard's microbatch; None is
      all at once.

  Attributes:
    plans: Shapes of each task's batches.

  Raises:
    ConfigError: the batch size is not divided by the shards.
    DataError: a cache holds segments longer than the corruption's, or none.
  """

  def __init__(
    self,
    schedule: RecordSchedule,
    corruption: Corruption,
    shards: Shards = Shards(),
    microbatch_tokens: int | None = None,
  ):
    shards.check(schedule.batch_size)
    for task in schedule.tasks:
      if task.texts != 1 or task.statistics["max_text_tokens"] > corruption.longest:
        raise DataError(
          f"{task.directory} does not hold segments of up to {corruption.longest} "
          "tokens; run `embgemma cache` with these flags"
        )
    self._schedule = schedule
    self._corruption = corruption
    self._shards = shards
    self.plans = tuple(
      sequence_packing.plan_rows(
        self._sampled_sizes(index),
        corruption.capacity,
        schedule.batch_size,
        shards.count,
        microbatch_tokens,
      )
      for index in range(len(schedule.tasks))
    )

  @property
  def settings(self) -> dict[str, Any]:
    """See `reader.BatchSource`."""
    return {}

  def epochs(self, step: int) -> dict[str, float]:
    """Of each task, the epochs that the steps before this one took."""
    return self._schedule.epochs(step)

  def _sampled_sizes(self, index: int) -> Int[np.ndarray, "n 2"]:
    """Tokens of inputs and targets that segments of a task may become."""
    lengths = self._schedule.sample(index)[:, 0]
    return self._corruption.draw(0, np.arange(len(lengths)), lengths).sizes

  def batch(self, step: int) -> StepBatch:
    """The batch of a step, from 0."""
    scheduled = self._schedule.at(step)
    name = self._schedule.tasks[scheduled.index].name
    seed = self._schedule.seed
    key = int(digest([seed, name, scheduled.epoch, "corruption"]), 16)
    draws = self._corruption.draw(key, scheduled.records, scheduled.lengths[:, 0])
    shards = deal_examples(draws.sizes, self._shards.count)
    layouts = [
      sequence_packing.lay_out(draws.sizes[shard], self._corruption.capacity)
      for shard in shards
    ]
    shape = self.plans[scheduled.index].shape(max(layout.rows for layout in layouts))
    own = np.concatenate([shards[shard] for shard in self._shards.indices])
    records = self._schedule.read(scheduled, own)
    examples = self._corruption.examples(
      draws.take(own), records.words, records.starts[:, 0]
    )
    own_layouts = [layouts[shard] for shard in self._shards.indices]
    return StepBatch(
      step=step,
      task=name,
      epoch=scheduled.epoch,
      records=scheduled.records,
      arrays=sequence_packing.place(examples, own_layouts, shape),
      real_tokens=int(draws.sizes.sum()),
      slots=self._shards.count * shape.tokens,
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
  builtin = isinstance(source, sources.BuiltinSource)
  shards = (("validation",),) if builtin else source.shards()
  skipped = SkipLog()
  documents = (
    example["text"]
    for shard in shards
    for example in source.read(shard, on_bad_record, skipped)
  )
  segments = (
    segment.tokens[0]
    for own in tokenization.segments(documents, vocabulary, longest)
    for segment in own
  )
  found = list(itertools.islice(segments, limit))
  if not found:
    raise DataError(f"{source} has no text to evaluate on")
  return found
