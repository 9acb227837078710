"""Which of the passages found for a query become its negatives."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from embgemma.errors import ConfigError

RULES = (
  "rank",
  "positive",
  "same_text",
  "same_label",
  "duplicate",
  "max_share",
  "margin",
  "min_similarity",
)
"""Why a passage that was found is no negative; the first that applies is counted."""


@dataclasses.dataclass(frozen=True)
class MiningOptions:
  """What is searched and what is kept.

  Attributes:
    depth: Passages searched for a query, its positives among them.
    negatives: Mined for an example, at most.
    pick: "hardest", the first that pass, or "random" among those that pass, drawn for
      each example by its texts and `seed`.
    first_rank: Best rank in the search that counts, from 1.
    last_rank: Worst rank that counts; None is `depth`.
    max_share: A negative's similarity must be below this share of the positive's:
      TopK-PercPos at 95 % of NV-Retriever (arXiv 2407.15831). None is no rule.
    margin: A negative's similarity must be below the positive's by more than this. None
      is no rule.
    min_similarity: A negative's similarity must be at least this. None is no rule.
    existing: "keep" puts an example's own negatives first; "replace" drops them.
    corpus: Files of passages to search beside the positives, see `corpus.read_corpus`:
      a path or several for all tasks, or by the name of a task.
    query_block: Queries searched at a time.
    seed: Of "random".

  Raises:
    ConfigError: values that cannot work.
  """

  depth: int = 50
  negatives: int = 1
  pick: str = "hardest"
  first_rank: int = 1
  last_rank: int | None = None
  max_share: float | None = 0.95
  margin: float | None = None
  min_similarity: float | None = None
  existing: str = "keep"
  corpus: str | Sequence[str] | Mapping[str, str | Sequence[str]] = ()
  query_block: int = 4096
  seed: int = 0

  def __post_init__(self):
    for name in ("depth", "negatives", "first_rank", "query_block"):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ConfigError(f"mining: {name} must be at least 1, got {value!r}")
    if not self.first_rank <= self.worst_rank <= self.depth:
      raise ConfigError(
        f"mining: ranks {self.first_rank} to {self.worst_rank} are not within the "
        f"depth of {self.depth} that is searched"
      )
    if self.max_share is not None and not 0 < self.max_share <= 1:
      raise ConfigError(f"mining: max_share must be in (0, 1], got {self.max_share!r}")
    for name, choices in (
      ("pick", ("hardest", "random")),
      ("existing", ("keep", "replace")),
    ):
      if getattr(self, name) not in choices:
        raise ConfigError(
          f"mining: {name} must be one of {choices}, got {getattr(self, name)!r}"
        )

  @property
  def worst_rank(self) -> int:
    """The worst rank that counts."""
    return self.depth if self.last_rank is None else self.last_rank

  def corpus_files(self, task: str) -> tuple[str, ...]:
    """The corpus files of a task."""
    files = self.corpus
    if isinstance(files, Mapping):
      files = files.get(task, ())
    return (files,) if isinstance(files, str) else tuple(files)


@dataclasses.dataclass(frozen=True)
class Candidates:
  """The passages found for a query, best first.

  Attributes:
    passages: int64 [K].
    similarities: float32 [K], to the query.
    keys: uint64 [K]: equal ones are the same text.
    positive: bool [K]: known positives of the query; of an example of a symmetric task
      its pairs in both directions, and those of its positive.
    same_text: bool [K]: as the query, or as one of its positives.
    same_label: bool [K].
  """

  passages: Int[np.ndarray, " K"]
  similarities: Float[np.ndarray, " K"]
  keys: UInt64[np.ndarray, " K"]
  positive: Bool[np.ndarray, " K"]
  same_text: Bool[np.ndarray, " K"]
  same_label: Bool[np.ndarray, " K"]


def _repeated(
  keys: UInt64[np.ndarray, " K"],
  live: Bool[np.ndarray, " K"],
  taken: UInt64[np.ndarray, " n"],
) -> Bool[np.ndarray, " K"]:
  """Which live candidates have a text that is taken, or that a live one before has."""
  repeated = np.isin(keys, taken)
  places = np.flatnonzero(live)
  _, first = np.unique(keys[places], return_index=True)
  again = np.ones(len(places), bool)
  again[first] = False
  repeated[places[again]] = True
  return repeated


def _words(*values: int) -> UInt64[np.ndarray, " n"]:
  return np.array([value % 2**64 for value in values], np.uint64)


def select(
  found: Candidates,
  positive: float,
  taken: UInt64[np.ndarray, " n"],
  options: MiningOptions,
  key: int,
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " R"]]:
  """Which candidates become negatives of an example, and how many each rule dropped.

  A positive of negative similarity p bounds negatives by p - (1 - max_share) |p|: the
  rule stays one that asks for less than the positive's.

  Args:
    found: Of the example's query.
    positive: Similarity of the example's own positive.
    taken: Keys of negatives that the example has already.
    options: The rules.
    key: Identifies the example, 64 bits; draws for "random" depend on it.

  Returns:
    Places among the candidates, best first; counts in the order of RULES.
  """
  similarities = found.similarities.astype(np.float64)
  positive = float(positive)
  ranks = np.arange(1, len(similarities) + 1)
  nothing = np.zeros(len(ranks), bool)
  rules = {
    "rank": (ranks < options.first_rank) | (ranks > options.worst_rank),
    "positive": found.positive,
    "same_text": found.same_text,
    "same_label": found.same_label,
    "duplicate": None,
    "max_share": nothing
    if options.max_share is None
    else similarities >= positive - (1 - options.max_share) * abs(positive),
    "margin": nothing
    if options.margin is None
    else similarities >= positive - options.margin,
    "min_similarity": nothing
    if options.min_similarity is None
    else similarities < options.min_similarity,
  }
  live = np.ones(len(ranks), bool)
  dropped = np.zeros(len(RULES), np.int64)
  for number, rule in enumerate(RULES):
    applies = rules[rule]
    if applies is None:
      applies = _repeated(found.keys, live, taken)
    dropped[number] = np.count_nonzero(live & applies)
    live &= ~applies
  places = np.flatnonzero(live)
  if options.pick == "random" and len(places) > options.negatives:
    generator = np.random.Generator(np.random.Philox(key=_words(key, options.seed)))
    places = np.sort(generator.choice(places, options.negatives, replace=False))
  return places[: options.negatives], dropped
