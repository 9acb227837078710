"""Reading files that are local or remote, plain or compressed.

A path with "://" is remote: `gs://bucket/name` and whatever else fsspec knows. The
suffix says how a file is compressed: .gz, .bz2, .xz or .zst.
"""

import bz2
import contextlib
import glob
import gzip
import io
import lzma
import os
import pathlib
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any, cast

from etils import epath

from embgemma import outputs
from embgemma.errors import ConfigError, DataError, EmbgemmaError

# Or epath would import TensorFlow, where it is installed, for a path on gs://.
os.environ.setdefault("EPATH_USE_TF", "false")

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of compressed files."""

_BUFFER = 1 << 20
# Bytes of a .zst file taken at a time: what they become is held whole.
_ZSTD_INPUT = 1 << 13
# What a remote file system may say of a file that changes with its content, the
# surest first. A checksum is not the time of a copy.
_VERSIONS = (
  *("md5Hash", "crc32c", "etag", "ETag"),
  *("mtime", "LastModified", "last_modified", "updated", "created"),
)


def is_remote(path: epath.PathLike) -> bool:
  """Whether a path is fsspec's to open, such as gs://bucket/name."""
  return "://" in os.fspath(path)


@contextlib.contextmanager
def new_file(path: epath.Path) -> Iterator[pathlib.Path]:
  """A local path whose file becomes `path`, here or remote, when the block ends.

  Raises:
    DataError: it cannot be written.
  """
  if not is_remote(path):
    with outputs.new_path(pathlib.Path(path)) as made:
      yield made
    return
  with tempfile.TemporaryDirectory() as directory:
    made = pathlib.Path(directory, path.name)
    yield made
    epath.Path(made).copy(path, overwrite=True)  # an object is there whole or not


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[IO[bytes]]:
  """The file of `new_file`, open."""
  with new_file(path) as made, made.open("wb") as file:
    yield file


def plain_name(path: str) -> str:
  """The path without the suffix of its compression."""
  for suffix in COMPRESSED:
    if path.endswith(suffix):
      return path.removesuffix(suffix)
  return path


def _filesystem(path: str) -> tuple[Any, str]:
  """The file system of a remote path, and the path in it.

  Raises:
    ConfigError: there is none for the protocol, or its package is not installed.
  """
  import fsspec  # 0.1 s, only where a path is remote

  try:
    return fsspec.core.url_to_fs(path)
  except ImportError as error:
    if path.startswith(("gs://", "gcs://")):
      raise ConfigError(
        f"{path}: needs embgemma[gcs]: pip install 'embgemma[gcs]'"
      ) from error
    raise ConfigError(f"{path}: {error}") from error  # names what to install
  except ValueError as error:
    raise ConfigError(f"{path}: {error}; use a local path or gs://") from error


def match(pattern: str) -> list[str]:
  """Files that a path or glob names, sorted; none if there are none.

  A path that exists is itself, whatever it means as a pattern.

  Raises:
    ConfigError: a remote path that no installed package can open.
    DataError: a remote file system that does not answer.
  """
  if not is_remote(pattern):
    return [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern))
  system, inner = _filesystem(pattern)
  try:
    system.invalidate_cache()  # or a listing of minutes ago would be the answer
    if system.exists(inner):
      return [pattern]
    return sorted(system.unstrip_protocol(path) for path in system.glob(inner))
  except Exception as error:
    raise DataError(f"{pattern}: cannot be listed: {_said(error)}") from error


def match_compressed(pattern: str) -> list[str]:
  """As `match`; where nothing matches, files of the pattern with a suffix of one kind.

  Plain files first: a file and its compressed copy are not read both.
  """
  for suffix in ("", *COMPRESSED):
    if found := match(pattern + suffix):
      return found
  return []


def fingerprint(path: str) -> list[Any]:
  """What changes when a file is replaced or written to, without reading it.

  Local files: absolute path, size and time of change. Remote ones: path, size, and
  the checksum, tag or time that the file system gives.

  Raises:
    DataError: there is no such file.
  """
  try:
    if not is_remote(path):
      status = os.stat(path)
      return [os.path.abspath(path), status.st_size, status.st_mtime_ns]
    system, inner = _filesystem(path)
    info: Mapping[str, Any] = system.info(inner)
  except EmbgemmaError:
    raise
  except Exception as error:
    raise read_error(path, error) from error
  version = next((info[key] for key in _VERSIONS if info.get(key) is not None), None)
  return [path, info.get("size"), None if version is None else str(version)]


class _ZstdFile(io.RawIOBase):
  """What a stream of zstd frames holds.

  zstandard's own reader takes the end of a truncated file for the end of the data.
  """

  def __init__(self, raw: io.BufferedIOBase, name: str):
    try:
      import zstandard
    except ImportError as error:
      raise ConfigError(
        f"{name}: needs embgemma[zstd]: pip install 'embgemma[zstd]'"
      ) from error
    self._raw = raw
    # The largest window that `zstd --long=31` writes.
    self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    self._error = zstandard.ZstdError
    self._frame: Any = None
    self._input = b""
    self._output = memoryview(b"")

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._output:
      self._input = self._input or self._raw.read(_ZSTD_INPUT)
      if not self._input:
        if self._frame is not None:
          raise EOFError("Compressed file ended before the end of a frame was reached")
        return 0
      self._output = memoryview(self._decompress())
    count = min(len(buffer), len(self._output))
    buffer[:count] = self._output[:count]
    self._output = self._output[count:]
    return count

  def _decompress(self) -> bytes:
    """What the input gives; keeps of it what belongs to the next frame."""
    frame = self._frame or self._decompressor.decompressobj()
    try:
      output = frame.decompress(self._input)
    except self._error as error:
      raise OSError(str(error)) from error
    self._input = frame.unused_data if frame.eof else b""
    self._frame = None if frame.eof else frame
    return output


def _decompressed(raw: io.BufferedIOBase, path: str) -> io.BufferedIOBase:
  if path.endswith(".gz"):
    return gzip.GzipFile(fileobj=raw)
  if path.endswith(".bz2"):
    return bz2.BZ2File(raw)
  if path.endswith(".xz"):
    return lzma.LZMAFile(cast(IO[bytes], raw))
  if path.endswith(".zst"):
    return io.BufferedReader(_ZstdFile(raw, path), _BUFFER)
  return raw


@contextlib.contextmanager
def opened(path: str) -> Iterator[io.BufferedIOBase]:
  """A file's content as a binary stream, decompressed.

  Raises:
    ConfigError: a remote path or a compression whose package is not installed.
    Exception: what else the file system says; `read_error` makes it an error of ours.
  """
  with contextlib.ExitStack() as stack:
    raw: io.BufferedIOBase
    if is_remote(path):
      system, inner = _filesystem(path)
      remote = stack.enter_context(system.open(inner, "rb"))
      # fsspec looks for the ends of lines in Python.
      raw = stack.enter_context(io.BufferedReader(remote, _BUFFER))
    else:
      raw = stack.enter_context(open(path, "rb"))
    yield stack.enter_context(_decompressed(raw, path))


def read_error(path: str, error: Exception, line: int | None = None) -> Exception:
  """The error to raise for one in opening or reading a file.

  Args:
    path: Of the file.
    error: As it was caught.
    line: That could not be read.

  Returns:
    A DataError where the file is the cause; else the error itself.
  """
  if isinstance(error, FileNotFoundError):
    return DataError(f"{path}: no such file")
  damaged = (OSError, EOFError, zlib.error, lzma.LZMAError)
  # Clients of remote file systems have errors of their own: no login, no bucket.
  remote = is_remote(path) and not isinstance(error, EmbgemmaError)
  if isinstance(error, damaged) or remote:
    where = path if line is None else f"{path}:{line}"
    return DataError(f"{where}: cannot be read: {_said(error)}")
  return error


def _said(error: Exception) -> str:
  """An error on one line."""
  return " ".join(str(error).split()) or type(error).__name__


def read_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, bytes]]:
  """Line numbers (from 1) and lines, without line ends; they may be of any length.

  Raises:
    DataError: the file is missing, unreadable or a damaged stream.
    ConfigError: see `opened`.
  """
  name, number = os.fspath(path), 0
  try:
    with opened(name) as file:
      for number, line in enumerate(file, 1):
        yield number, line.rstrip(b"\r\n")
  except Exception as error:
    raised = read_error(name, error, number + 1)
    if raised is error:
      raise
    raise raised from error
