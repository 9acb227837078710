"""Tasks of benchmarks/caching/all_pairs.gin as a user of seqio alone writes them.

JSON lines are read and parsed by tf.data, prompts are put before texts, SentencePiece
tokenises as a TensorFlow op; ids are cut to the same lengths. For `seqio_cache_tasks`:
$PAIRS is the directory of the files, $NAMES those to register, $VOCABULARY a model.
"""

import functools
import json
import os
import pathlib

import seqio
import tensorflow as tf

_LENGTHS = {"query": 256, "positive": 512}
_PROMPTS = {
  "query": "task: search result | query: ",
  "positive": "title: none | text: ",
}


def _parse(line: tf.Tensor) -> tuple[bytes, bytes]:
  record = json.loads(line.numpy())
  return record["query"].encode(), record["positive"].encode()


def _examples(dataset: tf.data.Dataset) -> tf.data.Dataset:
  def read(line):
    query, positive = tf.py_function(_parse, [line], [tf.string, tf.string])
    query.set_shape([])
    positive.set_shape([])
    return {
      "query": _PROMPTS["query"] + query,
      "positive": _PROMPTS["positive"] + positive,
    }

  return dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE)


def _cut(dataset: tf.data.Dataset) -> tf.data.Dataset:
  def cut(example):
    return {
      name: tf.concat([[2], example[name][: length - 2], [1]], 0)
      for name, length in _LENGTHS.items()
    }

  return dataset.map(cut, num_parallel_calls=tf.data.AUTOTUNE)


def register(directory: pathlib.Path, names: list[str], vocabulary: str) -> None:
  """One task a file."""
  model = seqio.SentencePieceVocabulary(vocabulary)
  feature = seqio.Feature(model, add_eos=False, dtype=tf.int32)
  for name in names:
    reader = functools.partial(tf.data.TextLineDataset, compression_type="GZIP")
    source = seqio.FileDataSource(
      reader, {"train": str(directory / f"{name}.jsonl.gz")}, cycle_length=1
    )
    seqio.TaskRegistry.add(
      name,
      source=source,
      preprocessors=[
        _examples,
        functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False),
        _cut,
        seqio.CacheDatasetPlaceholder(),
      ],
      output_features=dict.fromkeys(_LENGTHS, feature),
    )


register(
  pathlib.Path(os.environ["PAIRS"]),
  os.environ["NAMES"].split(","),
  os.environ["VOCABULARY"],
)
