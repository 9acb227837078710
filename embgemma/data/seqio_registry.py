"""Tasks and mixtures in seqio. Imports TensorFlow: only cache building comes here.

A task of pairs, ours or a user's, yields these features, all tf.string and without
prompts: `query` and `positive` (rank 0), and, where it has them, `negatives` (rank 1),
`title`, `task` (the kind that picks the prompts) and `label` (rank 0; examples of
one label are no negatives of each other). A task of documents yields `text` (rank 0),
with TEXT_FEATURES. Register one in a module named in MODULES:

    seqio.TaskRegistry.add(
      "faq", source=seqio.TfdsDataSource(...), preprocessors=[...],
      output_features=embgemma.data.seqio_registry.OUTPUT_FEATURES)
"""

import functools
import importlib
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import seqio
import tensorflow as tf

from embgemma.data import sources
from embgemma.data.tasks import CachedData, Task
from embgemma.errors import ConfigError, DataError

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
    ("title", False, 0),
    ("task", False, 0),
    ("label", False, 0),
  )
}


_FEATURES = {"pairs": OUTPUT_FEATURES, "text": TEXT_FEATURES}


class PythonDataSource(seqio.DataSource):
  """A seqio source over one of our pure-Python sources."""

  def __init__(self, source: sources.PythonSource, policy: str):
    self._source = source
    self._policy = policy
    self.skipped = sources.SkipLog()
    self.error: DataError | None = None
    super().__init__(splits=source.splits)

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return False

  def list_shards(self, split: str) -> list[str]:
    return [split]

  def _examples(self, split: str) -> Iterator[dict[str, Any]]:
    # A source is read once for its vocabulary and once for its cache.
    self.skipped, self.error = sources.SkipLog(), None
    try:
      yield from self._source.examples(split, self._policy, self.skipped)
    except DataError as error:
      # tf.data buries an exception in a stack of its own: keep the message.
      self.error = error
      raise

  def get_dataset(
    self,
    split: str = "train",
    shuffle: bool = False,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused: Any,
  ) -> tf.data.Dataset:
    """Examples in the source's order; `shuffle` is left to the cache's reader."""
    del shuffle, seed, unused
    if shard_info is not None and shard_info.num_shards > 1:
      raise ConfigError(f"{self._source} cannot be split into shards")
    return tf.data.Dataset.from_generator(
      functools.partial(self._examples, split),
      output_signature={
        name: tf.TensorSpec([None] * feature.rank, feature.dtype)
        for name, feature in _FEATURES[self._source.content].items()
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
      split_to_filepattern={"train": source.pattern}, feature_description=features
    )
  return PythonDataSource(source, policy)


def _densify(dataset: tf.data.Dataset) -> tf.data.Dataset:
  def dense(example):
    return {
      key: tf.sparse.to_dense(value) if isinstance(value, tf.SparseTensor) else value
      for key, value in example.items()
    }

  return dataset.map(dense, num_parallel_calls=tf.data.AUTOTUNE)


def register(config: CachedData) -> list[tuple[seqio.Task, float]]:
  """Registers what the configuration declares; the run's tasks with their rates.

  Raises:
    ConfigError: the mixture or task is not known to seqio, or a task of it does not
      have the features `query` and `positive`, or `text`.
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


def examples(
  task: seqio.Task, split: str, content: str
) -> Generator[dict[str, Any], None, None]:
  """Examples of a seqio task as Python strings, in source order.

  Args:
    task: Registered.
    split: Of the task.
    content: "pairs" or "text".

  Raises:
    DataError: a bad record, or one that seqio, TFDS or TensorFlow could not read.
      `on_bad_record` is for built-in and JSONL sources; other tasks filter in their
      preprocessors.
  """
  failure: DataError | None = None
  try:
    dataset = task.get_dataset(
      sequence_length=None, split=split, shuffle=False, num_epochs=1
    )
    for index, example in enumerate(dataset.as_numpy_iterator()):
      texts = {
        key: [text.decode("utf-8") for text in value]
        if key == "negatives"
        else value.decode("utf-8")
        for key, value in example.items()
        if key in _FEATURES[content]
      }
      if isinstance(task.source, PythonDataSource):
        yield texts  # checked where its file and line were known
      else:
        check = sources.text_example if content == "text" else sources.pair_example
        yield check(texts, f"task {task.name!r}, example {index}")
  except (tf.errors.OpError, ValueError) as error:
    # What follows the first line is a graph, or a list of a thousand datasets.
    reason = str(error).partition("\n")[0]
    failure = getattr(task.source, "error", None) or DataError(
      f"task {task.name!r}, split {split!r}: {reason}"
    )
  # Not in the handler: TensorFlow's error holds its iterator, and an iterator that is
  # alive when Python ends has threads that may wait for Python forever.
  if failure is not None:
    raise failure


def skipped(task: seqio.Task) -> sources.SkipLog:
  """What the task's source left out so far."""
  return getattr(task.source, "skipped", sources.SkipLog())
