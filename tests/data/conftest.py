import pathlib
from collections.abc import Callable, Iterable
from typing import ClassVar

import fsspec
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from embgemma.data.cache import CachedTask
from embgemma.data.records import Example


@pytest.fixture(scope="session")
def cached(write_examples) -> Callable[..., CachedTask]:
  """A complete cache of pairs."""

  def make(
    parent: pathlib.Path,
    name: str,
    examples: Iterable[Example],
    rate: float = 1.0,
    **options: bool,
  ) -> CachedTask:
    directory = parent / name
    directory.mkdir()
    statistics = write_examples(directory, examples, (99, 99, 99))
    return CachedTask(name, rate, epath.Path(directory), statistics, **options)

  return make


class _Bucket(MemoryFileSystem):
  """A memory that answers to gs://; says of files what Google's storage says."""

  protocol = ("gs", "gcs")
  store: ClassVar[dict] = {}
  pseudo_dirs: ClassVar[list] = [""]

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.removeprefix("gs://"))

  def unstrip_protocol(self, name):
    return "gs:/" + name

  def info(self, path, **options):
    found = super().info(path, **options)
    if found["type"] == "file":
      content = self.store[self._strip_protocol(path)].getvalue()
      del found["created"]
      found |= {"crc32c": str(hash(content)), "updated": "the same always"}
    return found


@pytest.fixture
def bucket(monkeypatch) -> MemoryFileSystem:
  """What lies on gs://, for fsspec and for epath."""
  for protocol in ("gs", "gcs"):
    monkeypatch.setitem(_registry, protocol, _Bucket)
  _Bucket.store.clear()
  _Bucket.clear_instance_cache()
  system = fsspec.filesystem("gs")
  monkeypatch.setattr(  # it keeps those that it made
    backend.fsspec_backend,
    "_get_filesystem",
    lambda name: system if name == "gcs" else fsspec.filesystem(name),
  )
  return system
