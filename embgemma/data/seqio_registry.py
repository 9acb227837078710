"""Tasks and mixtures in seqio. Imports TensorFlow: only tasks that need it come here.

A task of pairs, ours or a user's, yields these features, all tf.string and without
prompts: `query` and `positive` (rank 0), and, where it has them, `negatives` and as
many `negative_titles` (rank 1),
`title`, `task` (the kind that picks the prompts) and `label` (rank 0; examples of
one label are no negatives of each other). A task of documents yields `text` (rank 0),
with TEXT_FEATURES. Register one in a module named in MODULES:

    seqio.TaskRegistry.add(
      "faq", source=seqio.TfdsDataSource(...), preprocessors=[...],
      output_features=embgemma.data.seqio_registry.OUTPUT_FEATURES)
"""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import seqio
import tensorflow as tf

from embgemma.data import sources
from embgemma.data.bad_records import SkipLog
from embgemma.data.config import CachedData
from embgemma.data.record_formats import pair_example, text_example
from embgemma.data.task_examples import TaskExamples
from embgemma.data.tasks import Task
from embgemma.errors import ConfigError, DataError

tf.config.set_visible_devices([], "GPU")  # JAX needs the memory

# Prompts and tokenisation come after seqio, in Python (`cache`): SentencePiece
# with Gemma's rules is not expressible as a TF op.
_TEXT = seqio.PassThroughVocabulary(size=0)


def _feature(required: bool, rank: int) -> seqio.Feature:
  return seqio.Feature(
    _TEXT, add_eos=False, required=required, dtype=tf.string, rank=rank
  )


TEXT_FEATURES = {"text": _feature(True, 0)}
OUTPUT_FEATURES = {
  name: _feature(required, rank)
  for name, required, rank in (
    ("query", True, 0),
    ("positive", True, 0),
    ("negatives", False, 1),
    ("negative_titles", False, 1),
    ("title", False, 0),
    ("task", False, 0),
    ("label", False, 0),
  )
}


_FEATURES = {"pairs": OUTPUT_FEATURES, "text": TEXT_FEATURES}


class PythonDataSource(seqio.DataSource):
  """A seqio source over one of our pure-Python sources."""

  def __init__(self, source: sources.PythonSource, policy: str):
    self.source = source
    self.policy = policy
    super().__init__(splits=("train",))

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  def list_shards(self, split: str) -> list[str]:
    del split
    return [" ".join(shard) for shard in self.source.shards()]

  def _examples(self, index: int, count: int) -> Iterator[dict[str, Any]]:
    absent: dict[str, Any]
    absent = {"negative_titles": []} if self.source.content == "pairs" else {}
    for shard in self.source.shards()[index::count]:
      for example in self.source.read(shard, self.policy, SkipLog()):
        yield absent | example

  def get_dataset(
    self,
    split: str = "train",
    shuffle: bool = False,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused: Any,
  ) -> tf.data.Dataset:
    """Examples in the source's order; `shuffle` is left to the cache's reader."""
    del split, shuffle, seed, unused
    index, count = (shard_info.index, shard_info.num_shards) if shard_info else (0, 1)
    return tf.data.Dataset.from_generator(
      functools.partial(self._examples, index, count),
      output_signature={
        name: tf.TensorSpec([None] * feature.rank, feature.dtype)
        for name, feature in _FEATURES[self.source.content].items()
      },
    )


def _rename(
  dataset: tf.data.Dataset, task_name: str, fields: Mapping[str, str]
) -> tf.data.Dataset:
  unknown = sorted(set(fields.values()) - set(dataset.element_spec))
  if unknown:
    raise DataError(
      f"task {task_name!r}: the records have no {unknown}, they have "
      f"{sorted(dataset.element_spec)}; check the source's fields"
    )

  def select(example):
    return {ours: example[theirs] for ours, theirs in fields.items()}

  return dataset.map(select, num_parallel_calls=tf.data.AUTOTUNE)


def _data_source(task: Task, policy: str) -> seqio.DataSource:
  source = task.source
  if isinstance(source, sources.TfdsSource):
    return seqio.TfdsDataSource(
      tfds_name=source.name,
      tfds_data_dir=source.data_dir,
      splits={"train": source.split},
    )
  if isinstance(source, sources.TfrecordSource):
    features = {
      theirs: tf.io.VarLenFeature(tf.string)
      if ours == "negatives"
      else tf.io.FixedLenFeature([], tf.string)
      for ours, theirs in source.fields.items()
    }
    return seqio.TFExampleDataSource(
      split_to_filepattern={"train": source.pattern},
      feature_description=features,
      reader_cls=_read_tfrecords,
    )
  return PythonDataSource(source, policy)


def _read_tfrecords(path: tf.Tensor) -> tf.data.Dataset:
  zipped = tf.strings.regex_full_match(path, r".*\.gz")
  return tf.data.TFRecordDataset(path, compression_type=tf.where(zipped, "GZIP", ""))


def _densify(dataset: tf.data.Dataset) -> tf.data.Dataset:
  def dense(example):
    return {
      key: tf.sparse.to_dense(value) if isinstance(value, tf.SparseTensor) else value
      for key, value in example.items()
    }

  return dataset.map(dense, num_parallel_calls=tf.data.AUTOTUNE)


@dataclasses.dataclass(frozen=True)
class SeqioTask:
  """A task of seqio's registry; see `task_examples.TaskExamples`.

  Another process registers it again from the configuration.
  """

  config: CachedData
  name: str
  kind: str | None
  rate: float
  symmetric: bool
  unique_ids: bool
  num_shards: int

  def alone(self, shard: int) -> "SeqioTask":
    del shard  # found again from the configuration
    return self

  def examples(
    self, shard: int, skipped: SkipLog
  ) -> Generator[dict[str, Any], None, None]:
    task = self._task()
    if isinstance(task.source, PythonDataSource):
      source = task.source.source  # no detour through tensors
      yield from source.read(source.shards()[shard], task.source.policy, skipped)
      return
    info = seqio.ShardInfo(index=shard, num_shards=self.num_shards)
    # Closed with this generator: an iterator of TensorFlow that is alive when Python
    # ends has threads that may wait for Python forever.
    with contextlib.closing(_examples(task, info, self.config.content)) as found:
      yield from found

  def _task(self) -> seqio.Task:
    if self.name not in seqio.TaskRegistry.names():
      register(self.config)
    return seqio.TaskRegistry.get(self.name)


def register(config: CachedData) -> list[TaskExamples]:
  """Registers what the configuration declares; returns the run's tasks.

  Raises:
    ConfigError: the mixture or task is not known to seqio, or a task of it does not
      have the features `query` and `positive`, or `text`.
    DataError: the files of a task cannot be found.
  """
  for module in config.modules:
    importlib.import_module(module)
  for task in config.tasks:
    preprocessors = []
    if isinstance(task.source, sources.TfdsSource | sources.TfrecordSource):
      rename = functools.partial(
        _rename, task_name=task.name, fields=task.source.fields
      )
      preprocessors = [rename, _densify]
    seqio.TaskRegistry.remove(task.name)
    seqio.TaskRegistry.add(
      task.name,
      source=_data_source(task, config.on_bad_record),
      preprocessors=preprocessors,
      output_features=_FEATURES[config.content],
    )
  declared = {task.name: task for task in config.tasks}
  return [
    SeqioTask(
      config,
      task.name,
      declared[task.name].kind if task.name in declared else None,
      rate,
      task.name in declared and declared[task.name].symmetric,
      task.name in declared and declared[task.name].unique_ids,
      _num_shards(task),
    )
    for task, rate in _rated(config)
  ]


def _num_shards(task: seqio.Task) -> int:
  try:
    count = len(task.source.list_shards("train"))
  except (tf.errors.OpError, ValueError) as error:
    raise _failed(task.name, error) from error
  if not count:
    raise DataError(f"task {task.name!r} has no files; check its source's pattern")
  return count


def _rated(config: CachedData) -> list[tuple[seqio.Task, float]]:
  """The run's tasks with their rates, checked."""
  name = config.mixture_or_task_name
  known = set(seqio.TaskRegistry.names()) | set(seqio.MixtureRegistry.names())
  if name in known:
    chosen = seqio.get_mixture_or_task(name)
  elif config.tasks:
    chosen = seqio.Mixture(name, [(task.name, task.rate) for task in config.tasks])
  else:
    raise ConfigError(
      f"MIXTURE_OR_TASK_NAME {name!r} is not registered by {config.modules}; "
      f"seqio knows {sorted(known)}"
    )
  if isinstance(chosen, seqio.Task):
    rated = [(chosen, 1.0)]
  else:
    rated = [(task, float(chosen.get_rate(task))) for task in chosen.tasks]
  expected = _FEATURES[config.content]
  required = {name for name, feature in expected.items() if feature.required}
  for task, _ in rated:
    missing = required - set(task.output_features)
    if missing:
      raise ConfigError(
        f"seqio task {task.name!r} has no feature {sorted(missing)}; see "
        "embgemma.data.seqio_registry, OUTPUT_FEATURES of pairs and TEXT_FEATURES"
      )
  return rated


def _examples(
  task: seqio.Task, shard: seqio.ShardInfo, content: str
) -> Generator[dict[str, Any], None, None]:
  """Examples of a shard of a seqio task as Python strings, in its order.

  Raises:
    DataError: a bad record, or one that seqio, TFDS or TensorFlow could not read.
      `on_bad_record` is for built-in and file sources; other tasks filter in their
      preprocessors.
  """
  failure: DataError | None = None
  check = text_example if content == "text" else pair_example
  try:
    dataset = task.get_dataset(
      sequence_length=None,
      split="train",
      shuffle=False,
      num_epochs=1,
      shard_info=shard,
      try_in_mem_cache=False,
    )
    for index, example in enumerate(dataset.as_numpy_iterator()):
      texts = {
        key: value.decode("utf-8")
        if isinstance(value, bytes)
        else [text.decode("utf-8") for text in value]
        for key, value in example.items()
        if key in _FEATURES[content]
      }
      where = f"task {task.name!r}, shard {shard.index}, example {index}"
      yield check(texts, where)
  except (tf.errors.OpError, ValueError) as error:
    failure = _failed(task.name, error)
  # Not in the handler: TensorFlow's error holds its iterator.
  if failure is not None:
    raise failure


def _failed(task: str, error: Exception) -> DataError:
  # What follows the first line is a graph, or a list of a thousand datasets.
  reason = str(error).partition("\n")[0]
  return DataError(f"task {task!r}: {reason}")
