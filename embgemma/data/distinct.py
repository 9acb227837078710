"""Batches without duplicates: examples exchanged between some batches of an epoch.

Two examples of a batch that share a query or a positive are no negatives of each other:
the loss masks them, and a batch of many such pairs teaches less. Here the few that
conflict change places with examples of other batches.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from embgemma.typing import Int, UInt64

MOST_BATCHES = 64  # one bit each of where a text lies
_ROUNDS = 4
_TRIES = 64  # places to exchange with, of one example in a round
_STRIDE = 7919  # spreads partners over a batch


@dataclasses.dataclass(frozen=True)
class Exchange:
  """Examples of some batches, end to end, in an order with few conflicts.

  Attributes:
    order: int [n], the example at each place.
    conflicts: int [c], places whose example shares a text with one before it in its
      batch: no exchange was found.
  """

  order: np.ndarray
  conflicts: np.ndarray


def exchanged(texts: Int[np.ndarray, "n 2"], batches: int) -> Exchange:
  """An order of examples in which no batch has a text twice, where that can be.

  Each example that conflicts changes places with one of another batch, if there is one
  such that both batches are then free of their texts. What a text is looked up in are
  sets of batches that may hold too many, never too few; each round makes them anew.
  The result depends on the arguments alone.

  Args:
    texts: Of each example, see `repeated_texts`; batch after batch.
    batches: Of equal size; at most `MOST_BATCHES`.
  """
  order = np.arange(len(texts))
  for turn in range(_ROUNDS + 1):
    conflicts, holders = _conflicts(texts[order], batches)
    if turn == _ROUNDS or not len(conflicts):
      break
    if not _exchange(texts, order, conflicts, holders, batches, turn):
      break
  return Exchange(order, conflicts)


def repeated_texts(
  hashes: UInt64[np.ndarray, "n 2"], one_kind: bool
) -> Int[np.ndarray, "n 2"]:
  """Numbers, from 1, of texts that occur more than once among these; 0 for others.

  Args:
    hashes: Of queries and positives.
    one_kind: Whether a query and a positive may be the same text, as where the two
      change places; else they count apart.
  """
  numbers = np.zeros(hashes.shape, np.int64)
  first = 1
  columns = [slice(0, 2)] if one_kind else [slice(0, 1), slice(1, 2)]
  for column in columns:
    own = hashes[:, column]
    _, inverse, counts = np.unique(own, return_inverse=True, return_counts=True)
    repeated = counts > 1
    number = np.where(repeated, first - 1 + np.cumsum(repeated), 0)
    numbers[:, column] = number[inverse.reshape(own.shape)]
    first += int(np.count_nonzero(repeated))
  if one_kind:
    numbers[numbers[:, 0] == numbers[:, 1], 1] = 0  # no example conflicts with itself
  return numbers


def repeated_examples(hashes: UInt64[np.ndarray, "n 2"]) -> Int[np.ndarray, "n 2"]:
  """As `repeated_texts`, where texts are the same only in one and the same example.

  Args:
    hashes: Of queries and positives.
  """
  _, inverse, counts = np.unique(
    example_keys(hashes), return_inverse=True, return_counts=True
  )
  repeated = counts > 1
  number = np.where(repeated, np.cumsum(repeated), 0)[inverse]
  return np.stack([number, np.zeros_like(number)], axis=1)


def example_keys(hashes: UInt64[np.ndarray, "n _"]) -> UInt64[np.ndarray, " n"]:
  """One number for the query and the positive of each example.

  Args:
    hashes: Of queries, positives and more.
  """
  # One odd multiple: (a, b) and (b, a) differ.
  return hashes[:, 0] * np.uint64(0x9E3779B97F4A7C15) + hashes[:, 1]


def _conflicts(
  texts: Int[np.ndarray, "n 2"], batches: int
) -> tuple[Int[np.ndarray, " c"], UInt64[np.ndarray, " t"]]:
  """Places of examples that repeat a text of their batch; the batches of each text.

  The latter are bits, of text 0 none.
  """
  size = len(texts) // batches
  holders = np.zeros(int(texts.max(initial=0)) + 1, np.uint64)
  place, _ = divmod(np.flatnonzero(texts), 2)
  if not len(place):
    return place, holders
  keys = texts[texts > 0] * batches + place // size
  by_key = np.argsort(keys, kind="stable")  # among equal ones, in order of place
  keys = keys[by_key]
  again = np.flatnonzero(keys[1:] == keys[:-1]) + 1
  text, batch = divmod(keys, batches)
  starts = np.flatnonzero(np.diff(text, prepend=0))
  bits = np.uint64(1) << batch.astype(np.uint64)
  holders[text[starts]] = np.bitwise_or.reduceat(bits, starts)
  return np.unique(place[by_key[again]]), holders


def _exchange(
  texts: Int[np.ndarray, "n 2"],
  order: Int[np.ndarray, " n"],
  conflicts: Int[np.ndarray, " c"],
  holders: UInt64[np.ndarray, " t"],
  batches: int,
  turn: int,
) -> int:
  """Exchanges examples in place, and returns how many conflicts that solved."""
  size, everywhere = len(texts) // batches, (1 << batches) - 1
  waiting = np.zeros(len(texts), bool)
  waiting[conflicts] = True
  taken = np.bitwise_or.reduce(holders[texts[order[conflicts]]], axis=1)
  # Of a text that all batches have, none can get rid.
  solvable = conflicts[taken != np.uint64(everywhere)]
  held = holders.tolist()
  solved = 0
  for place in solvable.tolist():
    own = texts[order[place]].tolist()
    free = everywhere & ~(held[own[0]] | held[own[1]])
    home = place // size
    tries = enumerate(itertools.islice(_batches_of(free, place % batches), _TRIES))
    for number, batch in tries:
      other = batch * size + (_STRIDE * (place + turn) + number) % size
      theirs = texts[order[other]].tolist()
      if waiting[other] or (held[theirs[0]] | held[theirs[1]]) >> home & 1:
        continue
      order[place], order[other] = order[other], order[place]
      for text, at in ((own, batch), (theirs, home)):
        held[text[0]] |= 1 << at
        held[text[1]] |= 1 << at
      held[0] = 0  # texts that occur once are in nobody's way
      solved += 1
      break
  return solved


def _batches_of(bits: int, first: int) -> Iterator[int]:
  """The batches of a set, from one on, over and over; nothing of an empty one."""
  below = bits & ((1 << first) - 1)
  while bits:
    for rest in (bits ^ below, below):
      while rest:
        yield (rest & -rest).bit_length() - 1
        rest &= rest - 1
