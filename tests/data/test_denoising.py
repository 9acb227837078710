"""Corruption: exact, reversible, of the rates asked for, and counted, not drawn."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embgemma.data import denoising
from embgemma.data.denoisers import (
  Denoiser,
  Sentinels,
  causal_lm,
  decoder_only,
  longest_segment,
  prefix_lm,
  sentinels_needed,
  t5gemma2,
  ul2,
)
from embgemma.data.denoising import Corruption, cut, philox
from embgemma.errors import ConfigError

_BOS, _EOS = 2, 1
_SENTINELS = Sentinels(100_000, 4096)
_ROOMY = {"inputs": 8192, "targets": 8192}
_MIXTURES = {
  "ul2": ul2(),
  "ul2 with modes": ul2({"R": 6, "S": 7, "X": 8}),
  "t5gemma2": t5gemma2(),
  "prefix_lm": prefix_lm(),
  "causal_lm": causal_lm(),
}


def _corruption(denoisers, lengths=None, longest=None, sentinels=_SENTINELS):
  lengths = dict(lengths or _ROOMY)
  longest = longest or longest_segment(denoisers, lengths)
  return Corruption(tuple(denoisers), lengths, longest, sentinels, _BOS, _EOS)


def _documents(rng, count, low, high) -> tuple[np.ndarray, np.ndarray]:
  """Lengths, and token ids end to end."""
  lengths = rng.integers(low, high + 1, count)
  return lengths, rng.integers(10, 90_000, lengths.sum()).astype(np.int32)


def _corrupted(corruption, lengths, tokens, key=5):
  draws = corruption.draw(key, np.arange(len(lengths)), lengths)
  return draws, corruption.examples(draws, tokens, np.cumsum(lengths) - lengths)


def _split(flat, lengths) -> list[list[int]]:
  return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])]


def _each(examples) -> list[tuple[list[int], list[int], list[int]]]:
  """Inputs, targets and decoder inputs of each example."""
  return list(
    zip(
      _split(examples.inputs, examples.input_lengths),
      _split(examples.targets, examples.target_lengths),
      _split(examples.decoder_inputs, examples.target_lengths),
      strict=True,
    )
  )


def _is_sentinel(token) -> bool:
  return token in _SENTINELS.ids


def _spans(tokens) -> list[list[int]]:
  """Text before, between and after sentinels, which must ascend from the first."""
  parts: list[list[int]] = [[]]
  for token in tokens:
    if _is_sentinel(token):
      assert token == _SENTINELS.first_id + len(parts) - 1
      parts.append([])
    else:
      parts[-1].append(token)
  return parts


def _restored(denoiser, inputs, targets) -> list[int]:
  """The segment, after checking everything else about the example."""
  assert targets[-1] == _EOS
  targets = targets[:-1]
  if denoiser.kind == "causal":
    assert inputs == []
    return targets
  head = [_BOS] if denoiser.mode is None else [_BOS, denoiser.mode]
  assert inputs[: len(head)] == head
  assert inputs[-1] == _EOS
  kept, noise = _spans(inputs[len(head) : -1]), _spans(targets)
  if denoiser.kind == "prefix":
    assert len(kept) == len(noise) == 1
    assert kept[0]
    assert noise[0]
    return kept[0] + noise[0]
  assert len(kept) == len(noise) > 1
  assert noise[0] == kept[-1] == []  # A sentinel begins the targets, ends the inputs.
  assert all(kept[:-1])
  assert all(noise[1:])
  if denoiser.kind == "suffix":
    assert len(kept) == 2
  alternating = itertools.zip_longest(kept, noise[1:], fillvalue=[])
  return [token for pair in alternating for part in pair for token in part]


@given(
  st.sampled_from(sorted(_MIXTURES)),
  st.lists(st.integers(2, 40), min_size=1, max_size=20),
  st.integers(0, 2**64 - 1),
)
def test_inputs_and_targets_are_the_segment(name, lengths, key):
  denoisers = _MIXTURES[name]
  corruption = _corruption(denoisers)
  segments = [np.arange(10, 10 + length, dtype=np.int32) for length in lengths]
  examples = corruption.corrupt(segments, key)
  draws = corruption.draw(key, np.arange(len(lengths)), np.array(lengths))
  np.testing.assert_array_equal(draws.sizes, examples.sizes)
  for segment, (inputs, targets, shifted), index in zip(
    segments, _each(examples), draws.denoiser, strict=True
  ):
    assert _restored(denoisers[index], inputs, targets) == segment.tolist()
    assert shifted == [_BOS, *targets[:-1]]


@pytest.mark.parametrize("name", ["ul2", "t5gemma2"])
def test_a_hundred_thousand_documents_are_restored(name):
  """The same in arrays: every token goes back between its sentinels."""
  count = 100_000
  corruption = _corruption(_MIXTURES[name])
  lengths, tokens = _documents(np.random.default_rng(0), count, 2, 50)
  draws, examples = _corrupted(corruption, lengths, tokens)
  found = []
  for side, (flat, sizes) in enumerate(
    (
      (examples.inputs, examples.input_lengths),
      (examples.targets, examples.target_lengths),
    )
  ):
    owner = np.repeat(np.arange(count), sizes)
    sentinel = flat >= _SENTINELS.first_id
    before = np.cumsum(sentinel) - sentinel
    rank = before - before[np.cumsum(sizes) - sizes][owner]
    # Ascending from the first, in every example.
    np.testing.assert_array_equal(flat[sentinel], _SENTINELS.first_id + rank[sentinel])
    spans = np.bincount(owner[sentinel], minlength=count)
    np.testing.assert_array_equal(spans, draws.spans)
    text = flat >= 10
    text &= ~sentinel
    # Text after the k-th sentinel of the targets belongs where that of the inputs is.
    key = (owner * 100 + rank - side) * 2 + side
    found.append((key[text], flat[text]))
  np.testing.assert_array_equal(
    np.bincount(found[1][0] // 200, minlength=count), draws.noise
  )
  keys, texts = (np.concatenate(parts) for parts in zip(*found, strict=True))
  np.testing.assert_array_equal(texts[np.argsort(keys, kind="stable")], tokens)


def _distinct_denoisers():
  named = {denoiser.name: denoiser for denoiser in (*ul2(), *t5gemma2())}
  return [pytest.param(denoiser, id=name) for name, denoiser in named.items()]


@pytest.mark.parametrize("denoiser", _distinct_denoisers())
def test_rates_and_mean_spans(denoiser):
  """Within 2 % over a hundred thousand documents; restored ones have these numbers."""
  lengths = np.random.default_rng(1).integers(256, 4097, 100_000)
  draws = _corruption([denoiser]).draw(3, np.arange(len(lengths)), lengths)
  assert draws.noise.sum() / lengths.sum() == pytest.approx(denoiser.rate, rel=0.02)
  if denoiser.kind == "suffix":
    assert (draws.spans == 1).all()
  else:
    mean_span = draws.noise.sum() / draws.spans.sum()
    assert mean_span == pytest.approx(denoiser.mean_span, rel=0.02)


@pytest.mark.parametrize("denoiser", _distinct_denoisers())
def test_counts_are_those_of_t5(denoiser):
  """`random_spans_noise_mask` in torch's float32, which rounds halves as TF does."""
  lengths = np.arange(2, 6000)
  draws = _corruption([denoiser]).draw(0, lengths, lengths)
  length = torch.tensor(lengths)
  noise = torch.round(length.float() * denoiser.rate).long()
  noise = torch.minimum(torch.clamp(noise, min=1), length - 1)
  mean_span = denoiser.mean_span or 1e9
  spans = torch.clamp(torch.round(noise.float() / mean_span).long(), min=1)
  np.testing.assert_array_equal(draws.noise, noise.numpy())
  np.testing.assert_array_equal(draws.spans, spans.numpy())


def test_shares():
  """Of 100,000 segments, within five standard deviations."""
  count = 100_000
  for denoisers in (ul2(), t5gemma2()):
    lengths = np.full(count, 100)
    drawn = _corruption(denoisers).draw(9, np.arange(count), lengths).denoiser
    shares = np.array([denoiser.share for denoiser in denoisers])
    shares = shares / shares.sum()
    deviation = np.sqrt(shares * (1 - shares) / count)
    counts = np.bincount(drawn, minlength=len(denoisers))
    assert (np.abs(counts / count - shares) < 5 * deviation).all()


def test_presets():
  spans = {d.name: (d.mean_span, d.rate, d.share) for d in ul2() if d.kind == "span"}
  assert spans == {
    "R_3_15": (3, 0.15, 1.0),
    "R_8_15": (8, 0.15, 1.0),
    "X_3_50": (3, 0.5, 1.0),
    "X_8_50": (8, 0.5, 1.0),
    "X_64_15": (64, 0.15, 1.0),
    "X_64_50": (64, 0.5, 1.0),
  }
  assert [d for d in ul2() if d.kind == "suffix"] == [
    Denoiser("S_25", "suffix", rate=0.25)
  ]
  five = {d.name: (d.kind, d.mean_span, d.rate, d.share / 8) for d in t5gemma2()}
  assert five == {
    "R_3_15": ("span", 3, 0.15, 1 / 8),
    "X_12_50": ("span", 12, 0.5, 1 / 8),
    "X_32_15": ("span", 32, 0.15, 1 / 8),
    "X_32_50": ("span", 32, 0.5, 1 / 8),
    "S_75": ("suffix", None, 0.75, 4 / 8),
  }
  modes = {d.name[0]: d.mode for d in t5gemma2({"R": 6, "S": 7, "X": 8})}
  assert modes == {"R": 6, "S": 7, "X": 8}


def test_examples_by_hand():
  segment = np.array([11, 12, 13, 14], np.int32)
  first = _SENTINELS.first_id
  suffix = _corruption([Denoiser("s", "suffix", rate=0.75, mode=7)])
  assert _each(suffix.corrupt([segment], 0)) == [
    (
      [_BOS, 7, 11, first, _EOS],
      [first, 12, 13, 14, _EOS],
      [_BOS, first, 12, 13, 14],
    )
  ]
  causal = _corruption(causal_lm(), {"targets": 9}, sentinels=None)
  assert _each(causal.corrupt([segment], 0)) == [
    ([], [11, 12, 13, 14, _EOS], [_BOS, 11, 12, 13, 14])
  ]
  assert causal.capacity == (0, 9)
  # Four of six tokens in two spans: before each is one token.
  spans = _corruption([Denoiser("x", mean_span=2.0, rate=0.67)])
  ((inputs, targets, _),) = _each(spans.corrupt([np.arange(11, 17)], 0))
  assert inputs == [_BOS, 11, first, *inputs[3:4], first + 1, _EOS]
  assert sorted(set(inputs[1:-1]) & set(targets)) == [first, first + 1]


def test_prefixes_are_uniform():
  """Chi-squared within five standard deviations of its freedom."""
  count, length = 60_000, 13
  draws = _corruption(prefix_lm()).draw(1, np.arange(count), np.full(count, length))
  counts = np.bincount(length - draws.noise, minlength=length)[1:]
  expected = count / (length - 1)
  statistic = ((counts - expected) ** 2 / expected).sum()
  freedom = length - 2
  assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def test_segmentations_are_uniform():
  """All ten ways to cut six tokens into three spans; chi-squared as above."""
  count = 50_000
  ends = denoising._segment_ends(
    np.full(count, 6), np.full(count, 3), np.arange(count), 1, 4
  ).reshape(count, 3)
  assert (ends[:, 2] == 6).all()
  ways, counts = np.unique(ends, axis=0, return_counts=True)
  assert len(ways) == math.comb(5, 2)
  expected = count / len(ways)
  statistic = ((counts - expected) ** 2 / expected).sum()
  assert abs(statistic - 9) < 5 * math.sqrt(2 * 9)


def test_masks_are_equally_likely():
  """Twelve tokens, two spans of six: each cut of the text meets each of the noise."""
  count = 50_000
  corruption = _corruption([Denoiser("d", mean_span=3.0, rate=0.5)])
  segment = np.arange(10, 22, dtype=np.int32)
  draws = corruption.draw(2, np.arange(count), np.full(count, 12))
  examples = corruption.examples(draws, segment, np.zeros(count, int))
  inputs = examples.inputs.reshape(count, -1)
  kept = inputs[(inputs >= 10) & (inputs < 22)].reshape(count, 6)
  ways, counts = np.unique(kept, axis=0, return_counts=True)
  assert len(ways) == 5 * 5
  expected = count / len(ways)
  statistic = ((counts - expected) ** 2 / expected).sum()
  assert abs(statistic - 24) < 5 * math.sqrt(2 * 24)


@pytest.mark.parametrize("name", sorted(_MIXTURES))
def test_an_example_depends_on_its_record_and_the_key_alone(name):
  corruption = _corruption(_MIXTURES[name])
  rng = np.random.default_rng(2)
  lengths, tokens = _documents(rng, 500, 2, 90)
  starts = np.cumsum(lengths) - lengths
  draws, examples = _corrupted(corruption, lengths, tokens)
  expected = _each(examples)
  # Any part, in any order, of any batch.
  for size in (1, 7, 400):
    part = rng.permutation(500)[:size]
    again = corruption.examples(draws.take(part), tokens, starts[part])
    assert _each(again) == [expected[i] for i in part]
    alone = corruption.draw(5, part, lengths[part])
    np.testing.assert_array_equal(alone.sizes, draws.sizes[part])
    again = corruption.examples(alone, tokens, starts[part])
    assert _each(again) == [expected[i] for i in part]


@pytest.mark.parametrize("name", ["ul2", "t5gemma2", "prefix_lm"])
def test_another_key_or_record_is_another_corruption(name):
  corruption = _corruption(_MIXTURES[name])
  segment = np.arange(10, 210, dtype=np.int32)
  drawn = {}
  for key, record in itertools.product((0, 1, 2**63), (0, 1, 2**32, 2**40)):
    draws = corruption.draw(key, np.array([record]), np.array([200]))
    examples = corruption.examples(draws, segment, np.array([0]))
    # One span lies at the end: only the denoiser is drawn.
    if draws.spans[0] > 1 or name == "prefix_lm":
      drawn[key, record] = str(_each(examples))
  random_spans = list(drawn.values())
  assert len(random_spans) >= 3
  assert len(set(random_spans)) == len(random_spans)


def test_more_segments_than_a_sorting_key_counts(monkeypatch):
  corruption = _corruption(ul2())
  lengths, tokens = _documents(np.random.default_rng(3), 300, 2, 60)
  _, expected = _corrupted(corruption, lengths, tokens)
  monkeypatch.setattr(denoising, "_MOST_OWNERS", 16)
  _, found = _corrupted(corruption, lengths, tokens)
  np.testing.assert_array_equal(found.inputs, expected.inputs)
  np.testing.assert_array_equal(found.targets, expected.targets)


def _worst_sizes(denoiser, length) -> tuple[int, int]:
  """The most tokens of inputs and of targets, in plain arithmetic."""
  if denoiser.kind == "causal":
    return 0, length + 1
  extra = 2 + (denoiser.mode is not None)
  if denoiser.kind == "prefix":
    return length - 1 + extra, length
  noise = round(np.float32(length) * np.float32(denoiser.rate))
  noise = min(max(noise, 1), length - 1)
  spans = 1
  if denoiser.kind == "span":
    spans = round(np.float32(noise) / np.float32(denoiser.mean_span))
    spans = max(1, min(spans, length - noise))
  return length - noise + spans + extra, noise + spans + 1


@given(st.sampled_from(sorted(_MIXTURES)), st.integers(8, 300), st.integers(8, 300))
def test_longest_segment_is_the_longest_that_fits(name, inputs, targets):
  denoisers = _MIXTURES[name]
  causal = name == "causal_lm"
  lengths = {"targets": targets} | ({} if causal else {"inputs": inputs})
  longest = longest_segment(denoisers, lengths)
  room = (lengths.get("inputs", 0), targets)

  def fits(length):
    worst = [_worst_sizes(denoiser, length) for denoiser in denoisers]
    return all(a <= room[0] and b <= room[1] for a, b in worst)

  assert all(map(fits, range(2, longest + 1)))
  assert not fits(longest + 1)
  # And nothing drawn is ever larger.
  corruption = _corruption(denoisers, lengths, longest)
  drawn = np.random.default_rng(0).integers(2, longest + 1, 200)
  sizes = corruption.draw(0, np.arange(200), drawn).sizes
  assert (sizes <= room).all()


@pytest.mark.parametrize(
  ("tokens", "mean_span", "rate", "needed"),
  [
    (512, 3.0, 0.15, 26),
    (2048, 3.0, 0.15, 102),
    (2048, 12.0, 0.5, 85),
    (8192, 3.0, 0.15, 410),
    (16384, 12.0, 0.5, 683),
    (16384, 3.0, 0.15, 819),
  ],
)
def test_sentinels_needed(tokens, mean_span, rate, needed):
  denoiser = Denoiser("d", mean_span=mean_span, rate=rate)
  assert sentinels_needed((denoiser,), tokens) == needed
  assert sentinels_needed((denoiser, *prefix_lm()), tokens) == needed
  assert sentinels_needed(prefix_lm(), tokens) == 0


def test_too_few_sentinels():
  needed = sentinels_needed(t5gemma2(), 512)
  _corruption(t5gemma2(), longest=512, sentinels=Sentinels(100, needed))
  for sentinels, found in ((Sentinels(100, needed - 1), needed - 1), (None, 0)):
    with pytest.raises(ConfigError, match=f"up to {needed} spans, .* {found} sentinel"):
      _corruption(t5gemma2(), longest=512, sentinels=sentinels)


@pytest.mark.parametrize("longest", [2, 600])
def test_segments_that_do_not_fit(longest):
  lengths = {"inputs": 256, "targets": 256}
  with pytest.raises(ConfigError, match=f"segments of {longest} tokens: .*holds 3 to"):
    _corruption(t5gemma2(), lengths, longest)


@pytest.mark.parametrize("lengths", [{"inputs": 4, "targets": 9}, {"targets": 3}])
def test_no_room_for_any_segment(lengths):
  denoisers = t5gemma2() if "inputs" in lengths else causal_lm()
  with pytest.raises(ConfigError, match="no room for a segment of 3 tokens"):
    longest_segment(denoisers, lengths)


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"kind": "infix"}, r"kind must be one of .* got 'infix'"),
    (
      {"mean_span": 3.0},
      r"kind .* takes \['mean_span', 'rate'\] .*, got \['mean_span'\]",
    ),
    ({"kind": "suffix"}, r"kind .* takes \['rate'\] of mean_span and rate, got none"),
    ({"kind": "prefix", "rate": 0.5}, r"kind .* takes neither of .* got \['rate'\]"),
    ({"mean_span": 3.0, "rate": 1.0}, "rate must be between 0 and 1, got 1.0"),
    ({"mean_span": 0.5, "rate": 0.5}, "mean_span must be >= 1, got 0.5"),
    ({"kind": "prefix", "share": 0.0}, "share must be > 0, got 0.0"),
    ({"kind": "prefix", "share": float("inf")}, "share must be > 0, got inf"),
    ({"kind": "causal", "mode": 6}, "mode 6 must be .* not of a causal denoiser"),
    ({"kind": "prefix", "mode": -1}, "mode -1 must be a token id"),
  ],
)
def test_bad_denoisers(settings, message):
  with pytest.raises(ConfigError, match=f"denoiser 'd': {message}"):
    Denoiser("d", **settings)


@pytest.mark.parametrize(
  ("denoisers", "message"),
  [
    ((), "no denoisers: take one of ul2"),
    ((*prefix_lm(), *prefix_lm()), r"named twice: \['prefix_lm'\]"),
    ((*prefix_lm(), *causal_lm()), "a causal one has no inputs and cannot be mixed"),
  ],
)
def test_bad_mixtures(denoisers, message):
  with pytest.raises(ConfigError, match=message):
    decoder_only(denoisers)


@pytest.mark.parametrize(("first", "count"), [(-1, 5), (5, 0)])
def test_bad_sentinels(first, count):
  with pytest.raises(ConfigError, match="first_id must be >= 0 and count >= 1"):
    Sentinels(first, count)


def test_mode_tokens_of_other_letters():
  with pytest.raises(ConfigError, match=r"keys R, S and X, got \['R'\]"):
    ul2({"R": 6})


def test_one_denoiser_of_a_mixture():
  corruption = _corruption(t5gemma2())
  alone = corruption.only("X_32_50")
  assert [denoiser.name for denoiser in alone.denoisers] == ["X_32_50"]
  assert dataclasses.replace(alone, denoisers=corruption.denoisers) == corruption


@given(st.integers(0, 500), st.integers(3, 60))
def test_cut_is_even(count, longest):
  parts = cut(np.arange(count), longest)
  assert [token for part in parts for token in part] == list(range(count))
  assert len(parts) == -(-count // longest)
  sizes = [len(part) for part in parts]
  assert not sizes or max(sizes) - min(sizes) <= 1
  assert not sizes or max(sizes) <= longest
  assert count < 2 or min(sizes) >= 2


@pytest.mark.parametrize(
  ("counter", "key", "words"),
  [
    (0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (2**128 - 1, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
      0x0370734413198A2E85A308D3243F6A88,
      0x299F31D0A4093822,
      "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
  ],
)
def test_philox_known_answers(counter, key, words):
  """kat_vectors of Random123, philox4x32 with ten rounds."""
  counters = [np.array([counter >> shift & 0xFFFFFFFF]) for shift in (0, 32, 64, 96)]
  (found,) = philox(counters, key)
  assert " ".join(f"{word:08x}" for word in found) == words
