"""Whether steps see the same examples whatever reads them.

    python benchmarks/determinism.py --directory=SCRATCH

Caches the built-in corpus, gives most of its texts random teacher vectors, and reads
the first steps with 1, 2 and 8 hosts, with 0, 2 and 4 worker processes, and from a
random step on, as a resumed run does. One task is symmetric and duplicates are avoided.
Prints a line each: a digest of the example ids of all steps (task, epoch and records),
and one of what was read for them (hashes, slots and teacher vectors, in the order of
shards). Lines that should be equal and are not make it fail.
"""

import argparse
import dataclasses
import hashlib
import pathlib
import random
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from embgemma.data import cache_builder, teacher_vectors
from embgemma.data.cache import CachedTask
from embgemma.data.config import FEATURES, DataConfig
from embgemma.data.reader import Shards, StepBatch, StepSource, read_batches
from embgemma.data.schedule import RecordSchedule
from embgemma.data.tasks import builtin_tasks
from embgemma.data.teacher_vectors import TeacherVectors
from embgemma.data.vector_store import VectorStore

SHARDS = 8
WIDTH = 8  # of teacher vectors
PIECES = 2000


def cached_tasks(directory: pathlib.Path) -> list[CachedTask]:
  """The built-in corpus; its first task counts as symmetric."""
  data = DataConfig(
    "builtin",
    dict.fromkeys(FEATURES, 64),
    builtin_tasks(),
    vocabulary_size=PIECES,
    cache_dir=str(directory / "cache"),
  )
  first, *others = cache_builder.build(data, print).tasks
  return [dataclasses.replace(first, symmetric=True), *others]


def taught(task: CachedTask, directory: pathlib.Path) -> TeacherVectors:
  """Random vectors of nine in ten texts."""
  store_directory = directory / "vectors" / task.name
  if not teacher_vectors.directory(task.directory, "random").is_dir():
    store = VectorStore.create_or_open(store_directory, WIDTH, "float16", "random")
    rng = np.random.default_rng(0)
    given = (task.lengths() > 0) & (rng.random(task.lengths().shape) < 0.9)
    vectors = rng.normal(size=(int(given.sum()), WIDTH)).astype(np.float16)
    store.add(np.arange(len(vectors), dtype=np.uint64), vectors)
    rows = np.where(given, np.cumsum(given).reshape(given.shape) - 1, -1)
    teacher_vectors.write(task.directory, "random", store, rows.shape, [rows])
  return TeacherVectors(task.directory, "random")


@dataclasses.dataclass
class Digests:
  """Of steps, in order."""

  ids: "hashlib._Hash" = dataclasses.field(default_factory=hashlib.blake2b)
  read: "hashlib._Hash" = dataclasses.field(default_factory=hashlib.blake2b)

  def add(self, parts: Sequence[StepBatch]) -> None:
    """Adds a step as its hosts read it.

    Raises:
      SystemExit: they do not agree on its examples.
    """
    ids = {repr((p.step, p.task, p.epoch, p.records.tolist())) for p in parts}
    if len(ids) != 1:
      sys.exit(f"hosts disagree on step {parts[0].step}")
    self.ids.update(ids.pop().encode())
    for name in ("query_hash", "positive_hash", "slots", "teacher", "teacher_mask"):
      for part in parts:
        self.read.update(getattr(part.arrays, name).tobytes())

  def __str__(self) -> str:
    return f"ids {self.ids.hexdigest()[:16]}  read {self.read.hexdigest()[:16]}"


def digests(
  hosts: Sequence[Iterator[StepBatch]], steps: range, resumed: int
) -> tuple[Digests, Digests]:
  """Of all steps, and of those from `resumed` on."""
  whole, end = Digests(), Digests()
  for step in steps:
    parts = [next(host) for host in hosts]
    whole.add(parts)
    if step >= resumed:
      end.add(parts)
  return whole, end


def main() -> None:
  """Prints the digests of each setting."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--directory", type=pathlib.Path, required=True)
  parser.add_argument("--steps", type=int, default=10_000)
  parser.add_argument("--batch_size", type=int, default=16)
  args = parser.parse_args()
  tasks = cached_tasks(args.directory)
  teachers = [taught(task, args.directory) for task in tasks]
  resumed = random.Random().randrange(1, args.steps)
  print(
    f"{args.steps:,} steps of {args.batch_size} over {len(tasks)} tasks", flush=True
  )

  def source(own: Sequence[int]) -> StepSource:
    schedule = RecordSchedule(tasks, args.batch_size, 0, PIECES, avoid_duplicates=True)
    # Rows of one length: to lay texts out in several is most of the time.
    return StepSource(
      schedule, Shards(SHARDS, own), row_lengths=(64,), teachers=teachers
    )

  expected: tuple[str, str] | None = None
  for hosts, workers, start in (
    (1, 0, 0),
    (2, 1, 0),  # a process each, on all cores
    (8, 1, 0),
    (1, 2, 0),
    (1, 4, 0),
    (1, 0, resumed),
    (2, 2, resumed),
  ):
    began = time.monotonic()
    each = SHARDS // hosts
    sources = [source(range(i * each, (i + 1) * each)) for i in range(hosts)]
    batches = [read_batches(s, start, 1, workers) for s in sources]
    found = digests(batches, range(start, args.steps), resumed)
    seconds = time.monotonic() - began
    said = str(found[1] if start else found[0])
    expected = expected or (str(found[0]), str(found[1]))
    same = said == expected[1 if start else 0]
    print(
      f"{hosts} hosts, {workers} workers each, from step {start:>5,}: {said}  "
      f"{'same' if same else 'DIFFERENT'}  {seconds:.0f} s",
      flush=True,
    )
    if not same:
      sys.exit("the examples of a step depend on who reads them")
  print(f"steps from {resumed:,} on, uninterrupted: {expected[1]}")


if __name__ == "__main__":
  main()
