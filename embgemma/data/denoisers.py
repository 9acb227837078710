"""Denoisers and their mixtures: settings, and the sizes that follow from them.

Mixtures are UL2's (arXiv 2205.05131, section 3.1) and T5Gemma 2's (arXiv 2512.14856).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from embgemma.errors import ConfigError
from embgemma.typing import Int

KINDS = ("span", "suffix", "prefix", "causal")
LEAST_TOKENS = 2  # of a segment: one is given, one predicted
_LEAST_LONGEST = 3  # Then no even cut of a document has a part of one token.
POSITION_BITS = 18  # of a place in a segment


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """One way to split a segment of L tokens.

  "span": of round(rate * L) tokens in round(noise / mean_span) spans, each is
  replaced by a sentinel, and the targets are sentinel, span, sentinel, span, …
  "suffix" is one such span, at the end. "prefix" cuts the segment in two at a place
  that is equally likely everywhere, without sentinels. "causal" has no inputs: a
  decoder alone predicts all. Inputs are BOS, `mode` if there is one, text, EOS;
  targets end with EOS.

  Attributes:
    name: Unique in a mixture; metrics carry it.
    kind: One of KINDS.
    mean_span: Tokens of a span on average; of "span" only.
    rate: Share of the tokens that is predicted; of "span" and "suffix" only.
    share: Its weight in the mixture.
    mode: Id of a token that tells the model which denoiser it is; None is no such.
  """

  name: str
  kind: str = "span"
  mean_span: float | None = None
  rate: float | None = None
  share: float = 1.0
  mode: int | None = None

  def __post_init__(self):
    where = f"denoiser {self.name!r}"
    if self.kind not in KINDS:
      raise ConfigError(f"{where}: kind must be one of {KINDS}, got {self.kind!r}")
    takes = {"span": {"mean_span", "rate"}, "suffix": {"rate"}}.get(self.kind, set())
    given = {name for name in ("mean_span", "rate") if getattr(self, name) is not None}
    if given != takes:
      raise ConfigError(
        f"{where}: kind {self.kind!r} takes {sorted(takes) or 'neither'} of mean_span "
        f"and rate, got {sorted(given) or 'none'}"
      )
    if self.rate is not None and not 0 < self.rate < 1:
      raise ConfigError(f"{where}: rate must be between 0 and 1, got {self.rate}")
    if self.mean_span is not None and not self.mean_span >= 1:
      raise ConfigError(f"{where}: mean_span must be >= 1, got {self.mean_span}")
    if not 0 < self.share < float("inf"):
      raise ConfigError(f"{where}: share must be > 0, got {self.share}")
    if self.mode is not None and (self.kind == "causal" or self.mode < 0):
      raise ConfigError(
        f"{where}: mode {self.mode} must be a token id, and not of a causal denoiser, "
        "which has no inputs to hold it"
      )


def ul2(mode_tokens: Mapping[str, int] | None = None) -> tuple[Denoiser, ...]:
  """UL2's seven denoisers, at equal shares: arXiv 2205.05131, table 1.

  Args:
    mode_tokens: Ids of the tokens of "R", "S" and "X", which UL2 has and T5Gemma 2
      does not mention; None is none.
  """
  spans = [("R", 3.0, 0.15), ("R", 8.0, 0.15)]
  spans += [("X", 3.0, 0.5), ("X", 8.0, 0.5), ("X", 64.0, 0.15), ("X", 64.0, 0.5)]
  return _mixture(spans, suffix=0.25, suffix_share=1.0, mode_tokens=mode_tokens)


def t5gemma2(mode_tokens: Mapping[str, int] | None = None) -> tuple[Denoiser, ...]:
  """T5Gemma 2's five denoisers: arXiv 2512.14856; half of the segments are S.

  Args:
    mode_tokens: See `ul2`.
  """
  spans = [("R", 3.0, 0.15), ("X", 12.0, 0.5), ("X", 32.0, 0.15), ("X", 32.0, 0.5)]
  return _mixture(spans, suffix=0.75, suffix_share=4.0, mode_tokens=mode_tokens)


def prefix_lm() -> tuple[Denoiser, ...]:
  """Prefix language modelling alone."""
  return (Denoiser("prefix_lm", "prefix"),)


def causal_lm() -> tuple[Denoiser, ...]:
  """Language modelling by a decoder alone."""
  return (Denoiser("causal_lm", "causal"),)


def _mixture(
  spans: Sequence[tuple[str, float, float]],
  suffix: float,
  suffix_share: float,
  mode_tokens: Mapping[str, int] | None,
) -> tuple[Denoiser, ...]:
  modes = dict(mode_tokens or {})
  if modes and set(modes) != {"R", "S", "X"}:
    raise ConfigError(f"mode_tokens must have the keys R, S and X, got {sorted(modes)}")
  made = [
    Denoiser(
      f"{letter}_{mean_span:g}_{round(100 * rate)}",
      mean_span=mean_span,
      rate=rate,
      mode=modes.get(letter),
    )
    for letter, mean_span, rate in spans
  ]
  name = f"S_{round(100 * suffix)}"
  mode = modes.get("S")
  made.append(Denoiser(name, "suffix", rate=suffix, share=suffix_share, mode=mode))
  return tuple(made)


@dataclasses.dataclass(frozen=True)
class Sentinels:
  """Ids that stand for spans; span k of a segment has first_id + k.

  Gemma 3 has Sentinels(256002, 6142): `<unused100>`, … (256001 is the image token of
  T5Gemma 2).

  Attributes:
    first_id: Of the block.
    count: Ids in it.
  """

  first_id: int
  count: int

  def __post_init__(self):
    if self.first_id < 0 or self.count < 1:
      raise ConfigError(
        f"Sentinels: first_id must be >= 0 and count >= 1, got {self.first_id} and "
        f"{self.count}"
      )

  @property
  def ids(self) -> range:
    return range(self.first_id, self.first_id + self.count)


@dataclasses.dataclass(frozen=True)
class MixtureTable:
  """A mixture's settings as arrays, one entry a denoiser."""

  rate: np.ndarray
  mean_span: np.ndarray
  marked: np.ndarray  # Whether spans have sentinels.
  splits: np.ndarray  # Whether the cut is drawn.
  causal: np.ndarray
  mode: np.ndarray  # -1 for none
  edges: np.ndarray  # Of the shares, summed up.

  def noise(
    self, index: Int[np.ndarray, " B"], lengths: Int[np.ndarray, " B"]
  ) -> Int[np.ndarray, " B"]:
    """Predicted tokens, of "prefix" those of the shortest prefix."""
    # In float32, as T5 has it: halves go to the even number, if they are halves there.
    noise = np.rint(lengths.astype(np.float32) * self.rate[index]).astype(int)
    noise = np.clip(noise, 1, lengths - 1)
    noise = np.where(self.splits[index], lengths - 1, noise)
    return np.where(self.causal[index], lengths, noise)

  def spans(
    self,
    index: Int[np.ndarray, " B"],
    lengths: Int[np.ndarray, " B"],
    noise: Int[np.ndarray, " B"],
  ) -> Int[np.ndarray, " B"]:
    """Spans of predicted tokens; text comes before each, but in "causal"."""
    spans = np.rint(noise.astype(np.float32) / self.mean_span[index]).astype(int)
    return np.maximum(1, np.minimum(spans, lengths - noise))

  def sizes(
    self,
    index: Int[np.ndarray, " B"],
    lengths: Int[np.ndarray, " B"],
    noise: Int[np.ndarray, " B"],
  ) -> tuple[Int[np.ndarray, " B"], Int[np.ndarray, " B"]]:
    """Tokens of inputs and of targets, controls included."""
    marks = self.marked[index] * self.spans(index, lengths, noise)
    inputs = 2 + (self.mode[index] >= 0) + lengths - noise + marks
    return np.where(self.causal[index], 0, inputs), 1 + noise + marks


@functools.cache
def mixture_table(denoisers: tuple[Denoiser, ...]) -> MixtureTable:
  """The mixture's settings by index."""
  kinds = np.array([denoiser.kind for denoiser in denoisers])
  return MixtureTable(
    rate=np.array([denoiser.rate or 0.0 for denoiser in denoisers], np.float32),
    mean_span=np.array([d.mean_span or np.inf for d in denoisers], np.float32),
    marked=(kinds == "span") | (kinds == "suffix"),
    splits=kinds == "prefix",
    causal=kinds == "causal",
    mode=np.array([-1 if d.mode is None else d.mode for d in denoisers]),
    edges=np.cumsum([float(denoiser.share) for denoiser in denoisers]),
  )


def decoder_only(denoisers: Sequence[Denoiser]) -> bool:
  """Whether the mixture is for a decoder alone.

  Raises:
    ConfigError: it is empty, or names one denoiser twice, or a part of it only is for
      a decoder alone.
  """
  names = [denoiser.name for denoiser in denoisers]
  if not names:
    raise ConfigError("no denoisers: take one of ul2, t5gemma2, prefix_lm, causal_lm")
  if duplicates := sorted({name for name in names if names.count(name) > 1}):
    raise ConfigError(f"denoisers named twice: {duplicates}")
  causal = {denoiser.kind == "causal" for denoiser in denoisers}
  if len(causal) > 1:
    raise ConfigError(
      f"denoisers {names}: a causal one has no inputs and cannot be mixed with others; "
      "take a prefix denoiser"
    )
  return causal.pop()


def feature_names(denoisers: Sequence[Denoiser]) -> tuple[str, ...]:
  """The keys of TASK_FEATURE_LENGTHS."""
  return ("targets",) if decoder_only(denoisers) else ("inputs", "targets")


def longest_segment(denoisers: Sequence[Denoiser], lengths: Mapping[str, int]) -> int:
  """The most tokens of a segment that each denoiser fits into both budgets.

  Args:
    denoisers: Of the mixture.
    lengths: Most tokens of inputs and targets, controls included.

  Raises:
    ConfigError: there is no room for a segment of three tokens.
  """
  table = mixture_table(tuple(denoisers))
  candidates = np.arange(
    _LEAST_LONGEST, min(1 + sum(lengths.values()), 2**POSITION_BITS)
  )
  fits = np.ones(len(candidates), bool)
  for denoiser in range(len(denoisers)):
    index = np.full(len(candidates), denoiser)
    most = table.noise(index, candidates)
    least = np.where(table.splits[index], 1, most)
    for noise in (least, most):
      inputs, targets = table.sizes(index, candidates, noise)
      fits &= (inputs <= lengths.get("inputs", 0)) & (targets <= lengths["targets"])
  # Sizes grow with the segment.
  count = int(np.count_nonzero(np.logical_and.accumulate(fits)))
  if not count:
    raise ConfigError(
      f"TASK_FEATURE_LENGTHS {dict(lengths)} has no room for a segment of "
      f"{_LEAST_LONGEST} tokens under every denoiser; raise it"
    )
  return int(candidates[count - 1])


def check_segment(
  denoisers: Sequence[Denoiser], lengths: Mapping[str, int], longest: int
) -> None:
  """Whether segments of up to `longest` tokens fit both budgets.

  Raises:
    ConfigError: they do not.
  """
  fitting = longest_segment(denoisers, lengths)
  if not _LEAST_LONGEST <= longest <= fitting:
    raise ConfigError(
      f"segments of {longest} tokens: TASK_FEATURE_LENGTHS {dict(lengths)} holds "
      f"{_LEAST_LONGEST} to {fitting} under every denoiser; set SEGMENT_TOKENS so"
    )


def sentinels_needed(denoisers: Sequence[Denoiser], longest: int) -> int:
  """The most sentinels of one segment of up to `longest` tokens."""
  table, index = mixture_table(tuple(denoisers)), np.arange(len(denoisers))
  lengths = np.full(len(denoisers), longest)
  spans = table.spans(index, lengths, table.noise(index, lengths))
  return int((table.marked * spans).max())
