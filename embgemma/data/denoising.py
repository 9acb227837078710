"""Denoising: segments of text become the inputs and targets of a model.

What happens to a record is a function of (key, record), the key standing for seed,
task and epoch, and of nothing else: random numbers are counted, not drawn in turn.

Spans follow T5's `random_spans_noise_mask` (google-research/text-to-text-transfer-
transformer, t5/data/preprocessors.py). Sentinels ascend from a block of the
vocabulary, as Gemma has one; in T5 they descend from its end.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from embgemma.data.denoisers import (
  POSITION_BITS,
  Denoiser,
  Sentinels,
  check_segment,
  mixture_table,
  sentinels_needed,
)
from embgemma.errors import ConfigError
from embgemma.typing import Int, UInt32

# Of the sorting keys of `_segment_ends`, below those of a place.
_RANDOM_BITS = 26
_MOST_OWNERS = 2 ** (64 - POSITION_BITS - _RANDOM_BITS)


def cut(tokens: Int[np.ndarray, " n"], longest: int) -> list[np.ndarray]:
  """A document's tokens in as few segments of at most `longest` as there can be.

  Their lengths differ by one token at most; none has one token only, if `longest` is 3
  or more and the document has two.
  """
  return np.array_split(tokens, -(-len(tokens) // longest)) if len(tokens) else []


def philox(
  counters: Sequence[Int[np.ndarray, " n"]], key: int
) -> UInt32[np.ndarray, "n 4"]:
  """Random words: Philox 4x32, ten rounds.

  Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), section 4. NumPy
  has it of another width, and for one stream at a time.

  Args:
    counters: Four words of each counter, low one first, values below 2**32.
    key: 64 bits.
  """
  low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
  a, b, c, d = (np.asarray(word).astype(np.uint64) for word in counters)
  keys = [key & 0xFFFFFFFF, key >> 32]
  for _ in range(10):
    first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
    a, b = (second >> shift) ^ b ^ np.uint64(keys[0]), second & low
    c, d = (first >> shift) ^ d ^ np.uint64(keys[1]), first & low
    keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
  return np.stack([a, b, c, d], axis=1).astype(np.uint32)


# Counters of one record: what they are for.
_CHOICE, _NOISE, _KEPT = range(3)


def _words(
  records: Int[np.ndarray, " n"], stream: int, counts: Int[np.ndarray, " n"], key: int
) -> UInt32[np.ndarray, " m"]:
  """Random words of records, end to end: counts[i] of records[i]."""
  blocks = -(-counts // 4)
  owner, block = _ramps(blocks)
  record = records[owner]
  streams = np.full(len(record), stream)
  words = philox((block, streams, record & 0xFFFFFFFF, record >> 32), key)
  return words.reshape(-1)[_ramps(4 * blocks)[1] < np.repeat(counts, 4 * blocks)]


def _ramps(
  counts: Int[np.ndarray, " n"],
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
  """0, …, counts[i] - 1 for each i, end to end: (i, number)."""
  owner = np.repeat(np.arange(len(counts)), counts)
  first = np.cumsum(counts) - counts
  return owner, np.arange(len(owner)) - first[owner]


def _segment_ends(
  items: Int[np.ndarray, " n"],
  segments: Int[np.ndarray, " n"],
  records: Int[np.ndarray, " n"],
  stream: int,
  key: int,
) -> Int[np.ndarray, " m"]:
  """Ends of the parts of random segmentations, all equally likely, end to end.

  Record i has items[i] cut into segments[i] parts of one item or more.
  """
  if len(items) > _MOST_OWNERS:
    halves = np.array_split(np.arange(len(items)), 2)
    parts = [(items[half], segments[half], records[half]) for half in halves]
    return np.concatenate([_segment_ends(*part, stream, key) for part in parts])
  places = np.where(segments > 1, items - 1, 0)
  owner, rank = _ramps(places)
  # Sorted by record, then by random number: the first few places are a random choice.
  # The widths are fixed, so that nothing depends on which records come together.
  keys = _words(records, stream, places, key).astype(np.uint64)
  keys >>= np.uint64(32 - _RANDOM_BITS)
  keys |= owner.astype(np.uint64) << np.uint64(_RANDOM_BITS)
  keys = keys << np.uint64(POSITION_BITS) | rank.astype(np.uint64)
  keys.sort()
  chosen = rank < (segments - 1)[owner]
  place = (keys[chosen] & np.uint64(2**POSITION_BITS - 1)).astype(int)
  ascending = np.sort(owner[chosen] << POSITION_BITS | place)
  ends = np.empty(segments.sum(), int)
  last = np.cumsum(segments) - 1
  inner = np.ones(len(ends), bool)
  inner[last] = False
  ends[last] = items
  ends[inner] = (ascending & 2**POSITION_BITS - 1) + 1
  return ends


def _span_lengths(
  ends: Int[np.ndarray, " m"], spans: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " m"]:
  lengths = np.diff(ends, prepend=0)
  first = np.cumsum(spans) - spans
  lengths[first] = ends[first]
  return lengths


@dataclasses.dataclass(frozen=True)
class Draws:
  """What becomes of B segments, but for where their spans lie.

  Attributes:
    key: Of the random numbers.
    records: int [B], by which they are counted.
    lengths: int [B], tokens of the segments.
    denoiser: int [B], index in the mixture.
    noise: int [B], tokens that are predicted.
    spans: int [B], in which they lie.
    input_lengths: int [B], tokens of the inputs, 0 of a decoder alone.
    target_lengths: int [B].
  """

  key: int
  records: np.ndarray
  lengths: np.ndarray
  denoiser: np.ndarray
  noise: np.ndarray
  spans: np.ndarray
  input_lengths: np.ndarray
  target_lengths: np.ndarray

  @property
  def sizes(self) -> Int[np.ndarray, "B 2"]:
    """Tokens of inputs and targets."""
    return np.stack([self.input_lengths, self.target_lengths], axis=1)

  def take(self, indices: Int[np.ndarray, " b"]) -> "Draws":
    """Those of some segments, in that order."""
    arrays = {
      field.name: getattr(self, field.name)[indices]
      for field in dataclasses.fields(self)
      if field.name != "key"
    }
    return Draws(self.key, **arrays)


@dataclasses.dataclass(frozen=True)
class Examples:
  """B corrupted segments, end to end.

  Attributes:
    inputs: int32 [sum of input_lengths].
    input_lengths: int [B], 0 of a decoder alone.
    targets: int32 [sum of target_lengths].
    target_lengths: int [B].
    decoder_inputs: int32, the targets shifted right within each example, BOS first.
  """

  inputs: np.ndarray
  input_lengths: np.ndarray
  targets: np.ndarray
  target_lengths: np.ndarray
  decoder_inputs: np.ndarray

  @property
  def sizes(self) -> Int[np.ndarray, "B 2"]:
    """Tokens of inputs and targets."""
    return np.stack([self.input_lengths, self.target_lengths], axis=1)


@dataclasses.dataclass(frozen=True)
class Corruption:
  """A mixture of denoisers over a vocabulary.

  Attributes:
    denoisers: Of the mixture.
    lengths: Most tokens of inputs and targets, controls included; of targets alone
      for a decoder alone.
    longest: Most tokens of a segment.
    sentinels: None where no denoiser needs any.
    bos_id: Begins inputs and decoder inputs.
    eos_id: Ends inputs and targets.

  Raises:
    ConfigError: a segment of `longest` tokens does not fit the lengths, or has more
      spans than there are sentinels.
  """

  denoisers: tuple[Denoiser, ...]
  lengths: Mapping[str, int]
  longest: int
  sentinels: Sentinels | None
  bos_id: int
  eos_id: int

  def __post_init__(self):
    check_segment(self.denoisers, self.lengths, self.longest)
    needed = sentinels_needed(self.denoisers, self.longest)
    found = 0 if self.sentinels is None else self.sentinels.count
    if needed > found:
      raise ConfigError(
        f"segments of {self.longest} tokens have up to {needed} spans, and there are "
        f"{found} sentinels; shorten TASK_FEATURE_LENGTHS or SEGMENT_TOKENS, or take a "
        "vocabulary with more <unusedN> pieces at its end"
      )

  @property
  def capacity(self) -> tuple[int, int]:
    """Tokens of a row of inputs and of one of targets."""
    return self.lengths.get("inputs", 0), self.lengths["targets"]

  def only(self, name: str) -> "Corruption":
    """The same with one denoiser of the mixture."""
    chosen = tuple(d for d in self.denoisers if d.name == name)
    return dataclasses.replace(self, denoisers=chosen)

  def draw(
    self, key: int, records: Int[np.ndarray, " B"], lengths: Int[np.ndarray, " B"]
  ) -> Draws:
    """Draws a denoiser for each segment, and what sizes follow from it.

    Args:
      key: 64 bits.
      records: Numbers by which the random numbers are counted.
      lengths: Tokens of the segments, from 2 to `longest`.
    """
    records, lengths = records.astype(int), lengths.astype(int)
    table = mixture_table(self.denoisers)
    words = _words(records, _CHOICE, np.full(len(records), 2), key).reshape(-1, 2)
    shares = words[:, 0] * (table.edges[-1] / 2**32)
    denoiser = np.searchsorted(table.edges, shares, side="right")
    noise = table.noise(denoiser, lengths)
    prefix = 1 + (words[:, 1].astype(np.uint64) * (lengths - 1).astype(np.uint64) >> 32)
    noise = np.where(table.splits[denoiser], lengths - prefix.astype(int), noise)
    spans = table.spans(denoiser, lengths, noise)
    inputs, targets = table.sizes(denoiser, lengths, noise)
    return Draws(key, records, lengths, denoiser, noise, spans, inputs, targets)

  def examples(
    self, draws: Draws, words: Int[np.ndarray, " n"], starts: Int[np.ndarray, " B"]
  ) -> Examples:
    """The corrupted segments.

    Args:
      draws: Of the segments.
      words: Token ids, among them the segments'.
      starts: Where in `words` each segment begins.
    """
    table, index = mixture_table(self.denoisers), draws.denoiser
    kept, noise, spans = draws.lengths - draws.noise, draws.noise, draws.spans
    noise_ends = _segment_ends(noise, spans, draws.records, _NOISE, draws.key)
    kept_ends = _segment_ends(kept, spans, draws.records, _KEPT, draws.key)
    pieces = np.empty(2 * len(kept_ends), int)
    pieces[::2] = _span_lengths(kept_ends, spans)
    pieces[1::2] = _span_lengths(noise_ends, spans)
    masked = np.repeat(np.arange(len(pieces)) % 2 == 1, pieces)
    owner, place = _ramps(draws.lengths)
    tokens = words[starts[owner] + place]

    example, span = _ramps(spans)
    marked = table.marked[index][example]
    example, span = example[marked], span[marked]
    kept_before = kept_ends[marked]
    noise_before = (noise_ends - pieces[1::2])[marked]
    marks = span + (0 if self.sentinels is None else self.sentinels.first_id)

    targets = _interleaved(
      tokens[masked],
      draws.target_lengths,
      [
        (example, noise_before + span, marks),
        (np.arange(len(index)), draws.target_lengths - 1, self.eos_id),
      ],
    )
    decoder_inputs = np.roll(targets, 1)
    first = np.cumsum(draws.target_lengths) - draws.target_lengths
    decoder_inputs[first] = self.bos_id
    mode = table.mode[index]
    text = np.flatnonzero(~table.causal[index])
    moded = np.flatnonzero(mode >= 0)
    inputs = _interleaved(
      tokens[~masked],
      draws.input_lengths,
      [
        (text, np.zeros_like(text), self.bos_id),
        (moded, np.ones_like(moded), mode[moded]),
        (example, 1 + (mode >= 0)[example] + kept_before + span, marks),
        (text, draws.input_lengths[text] - 1, self.eos_id),
      ],
    )
    return Examples(
      inputs, draws.input_lengths, targets, draws.target_lengths, decoder_inputs
    )

  def corrupt(self, segments: Sequence[np.ndarray], key: int) -> Examples:
    """The segments corrupted, counted as records 0, 1, …

    Args:
      segments: Token ids, each of 2 to `longest`.
      key: 64 bits.
    """
    lengths = np.fromiter(map(len, segments), int, len(segments))
    draws = self.draw(key, np.arange(len(segments)), lengths)
    starts = np.cumsum(lengths) - lengths
    return self.examples(draws, np.concatenate(segments), starts)


def _interleaved(
  tokens: Int[np.ndarray, " n"],
  lengths: Int[np.ndarray, " B"],
  controls: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray | int]],
) -> Int[np.ndarray, " m"]:
  """Examples end to end, of control ids at given places and tokens at all others.

  Args:
    tokens: In order.
    lengths: Of the examples, controls included.
    controls: Examples, places in them, and the ids there.
  """
  first = np.cumsum(lengths) - lengths
  out = np.empty(lengths.sum(), np.int32)
  free = np.ones(len(out), bool)
  for example, place, ids in controls:
    at = first[example] + place
    out[at] = ids
    free[at] = False
  out[free] = tokens
  return out
