"""The record codec: one tokenised example as bytes, little-endian.

uint32 number of texts T (query, positive, negatives; or one segment of a document)
uint64[T] content hashes    uint32[T] lengths    int32[...] token ids, in order
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from embgemma.errors import DataError


@dataclasses.dataclass(frozen=True)
class Example:
  """Tokenised texts of one example: query, positive, then negatives; or a segment.

  Attributes:
    tokens: int32 token ids of each text.
    hashes: uint64 [T], identities of the texts: content hashes without prompts, or of
      what makes two texts the same to the loss, such as a label; of a segment, of its
      whole document.
    contents: uint64 [T], content hashes of the texts themselves; None is `hashes`.
      Kept beside the records, not in them.
  """

  tokens: tuple[np.ndarray, ...]
  hashes: np.ndarray
  contents: np.ndarray | None = None


def content_hash(text: str) -> int:
  """64-bit content hash of a text."""
  return int.from_bytes(
    hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little"
  )


def encode_example(example: Example) -> bytes:
  """The bytes of one record."""
  lengths = np.array([len(t) for t in example.tokens], "<u4")
  return b"".join(
    [
      np.uint32(len(lengths)).astype("<u4").tobytes(),
      example.hashes.astype("<u8").tobytes(),
      lengths.tobytes(),
      *(t.astype("<i4").tobytes() for t in example.tokens),
    ]
  )


@dataclasses.dataclass(frozen=True)
class Records:
  """Examples as they were read, B of them with up to T texts each.

  Attributes:
    words: int32, the records end to end.
    starts: int [B, T], where in `words` each text begins.
    lengths: int [B, T], tokens of each text; 0 is none.
    hashes: uint32 [B, 2, 2], of queries and positives, low word first; [B, 1, 2] of
      segments.
  """

  words: np.ndarray
  starts: np.ndarray
  lengths: np.ndarray
  hashes: np.ndarray


def decode_records(records: Sequence[bytes], texts: int) -> Records:
  """The examples of records.

  Args:
    records: Of a task.
    texts: T, the most that any of its examples has; 1 of segments.

  Raises:
    DataError: the size of a record does not fit its header.
  """
  sizes = np.fromiter(map(len, records), int, len(records))
  _check(sizes, (sizes % 4 == 0) & (sizes >= 4))
  words = np.frombuffer(b"".join(records), "<i4")
  begin = np.cumsum(sizes // 4) - sizes // 4
  counts = words[begin].astype("<u4").astype(int)
  header = 1 + 3 * counts
  least = min(2, texts)
  _check(sizes, (counts >= least) & (counts <= texts) & (4 * header <= sizes))
  columns = np.arange(texts)
  present = columns < counts[:, None]
  place = np.where(present, (begin + 1 + 2 * counts)[:, None] + columns, 0)
  lengths = np.where(present, words.view("<u4")[place], 0).astype(int)
  _check(sizes, 4 * (header + lengths.sum(axis=1)) == sizes)
  starts = (begin + header)[:, None] + np.cumsum(lengths, axis=1) - lengths
  hashes = words.view("<u4")[begin[:, None] + np.arange(1, 1 + 2 * least)]
  return Records(words, starts, lengths, hashes.reshape(-1, least, 2))


def _check(sizes: np.ndarray, sound: np.ndarray) -> None:
  if not sound.all():
    size = sizes[np.argmin(sound)]
    raise DataError(f"cache record of {size} bytes is damaged")
