"""Held-out loss of pretraining by denoiser, and perplexity of a decoder alone."""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from embgemma.data import builtin_corpus, sequence_packing, sources
from embgemma.data.denoisers import decoder_only
from embgemma.data.denoising import Corruption
from embgemma.data.shape_plan import microbatched
from embgemma.data.text_reader import held_out_segments
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import ConfigError, DataError
from embgemma.evaluation.suite import BUILTIN
from embgemma.losses.denoising import TokenLosses, cross_entropy
from embgemma.models import encoder_decoder
from embgemma.models.config import BackboneConfig
from embgemma.typing import PackedSequences, Params

_KEY = 0  # of the corruption: that of every evaluation of every run
_IN_FLIGHT = 2  # device calls that are waited for


class SequenceScorer:
  """Losses of packed sequences under given parameters, over a mesh.

  Over a mesh of several processes, each makes the same calls with the same sequences
  and gets the results of all.

  Args:
    config: Of the model.
    mesh: Devices; each holds all parameters during an evaluation.
    batch_axes: Of the mesh, over which rows are split.

  Attributes:
    num_shards: S, by which the rows of a microbatch must be divided.
  """

  def __init__(self, config: BackboneConfig, mesh: Mesh, batch_axes: Sequence[str]):
    config = encoder_decoder.on_platform(config, mesh.devices.flat[0].platform)
    axes = tuple(batch_axes)
    self.num_shards = math.prod(mesh.shape[axis] for axis in axes)
    whole, split = PartitionSpec(), PartitionSpec(axes)
    self._replicated = NamedSharding(mesh, whole)
    self._split = NamedSharding(mesh, split)

    def sums(params: Params, sequences: PackedSequences) -> TokenLosses:
      hidden = encoder_decoder.hidden_states(config, params, sequences)
      table = encoder_decoder.output_table(config, params)
      own = cross_entropy(hidden, table, sequences.targets, sequences.weights)
      return jax.lax.psum(own, axes)

    self._sums = jax.jit(
      jax.shard_map(
        sums,
        mesh=mesh,
        in_specs=(whole, split),
        out_specs=whole,
        check_vma=False,
      )
    )

  def place(self, params: Params) -> Params:
    """The parameters whole on every device, gathered once for many calls."""
    return jax.device_put(params, self._replicated)

  def means(self, params: Params, sequences: PackedSequences) -> tuple[float, float]:
    """Cross-entropy in nats, without z-loss, and accuracy: means over all targets.

    A target than which no token is likelier counts as right.

    Args:
      params: Of `place`.
      sequences: Microbatches [K, S * R, L] of numpy arrays, one device call each.
    """
    total = np.zeros(len(TokenLosses._fields))
    pending: collections.deque[TokenLosses] = collections.deque()

    def add() -> None:
      total[:] += np.array(jax.device_get(pending.popleft()), np.float64)

    for index in range(len(sequences.targets)):
      # Dispatched, not waited for; but devices need not hold the whole set either.
      pending.append(self._sums(params, self._microbatch(sequences, index)))
      if len(pending) > _IN_FLIGHT:
        add()
    while pending:
      add()
    sums = dict(zip(TokenLosses._fields, total.tolist(), strict=True))
    return sums["cross_entropy"] / sums["weight"], sums["correct"] / sums["weight"]

  def _microbatch(self, sequences: PackedSequences, index: int) -> PackedSequences:
    def put(array: np.ndarray) -> jax.Array:
      own = array[index]
      return jax.make_array_from_callback(own.shape, self._split, own.__getitem__)

    return jax.tree.map(put, sequences)


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no one equality
class DenoisingEvaluator:
  """Held-out loss of one set of texts, by denoiser.

  Each denoiser is evaluated on all segments, corrupted alike in every evaluation of
  every run.

  Attributes:
    name: Of the set in results.
    segments: Token ids, each of 2 to `corruption.longest`: see `held_out_segments`.
    corruption: The mixture that is trained.
    scorer: Of the model.
    microbatch_tokens: Token slots, of both sides, of one shard's microbatch at most.
  """

  name: str
  segments: Sequence[np.ndarray]
  corruption: Corruption
  scorer: SequenceScorer
  microbatch_tokens: int

  @functools.cached_property
  def sequences(self) -> dict[str, PackedSequences]:
    """By denoiser, microbatches [K, S * R, L] of one shape; made once."""
    capacity = self.corruption.capacity
    examples = {
      denoiser.name: self.corruption.only(denoiser.name).corrupt(self.segments, _KEY)
      for denoiser in self.corruption.denoisers
    }
    layouts = {
      name: sequence_packing.lay_out(own.sizes, capacity)
      for name, own in examples.items()
    }
    shards = self.scorer.num_shards
    most = max(-(-layout.rows // shards) for layout in layouts.values())
    # One shape for all denoisers: one compilation.
    each = shards * microbatched(most, sum(capacity), self.microbatch_tokens)[1]
    return {
      name: sequence_packing.place(
        examples[name],
        [layout],
        sequence_packing.SequenceShape(*capacity, -(-layout.rows // each), each),
      )
      for name, layout in layouts.items()
    }

  def evaluate(self, params: Params) -> dict[str, float]:
    """Means over targets, of which the end of each segment is one.

    For a mixture of denoisers: "loss/NAME", the cross-entropy in nats without z-loss,
    and "accuracy/NAME" of each; "loss" is their mean by the mixture's shares. For a
    decoder alone: "loss", "accuracy" and "perplexity", exp(loss), by token of this
    vocabulary; a segment is predicted without what came before it.

    Args:
      params: Of `encoder_decoder`, without axis boxes: on the host, on a device or
        over the mesh, whole or split.
    """
    placed = self.scorer.place(params)
    losses, accuracies = {}, {}
    for name, own in self.sequences.items():
      losses[name], accuracies[name] = self.scorer.means(placed, own)
    denoisers = self.corruption.denoisers
    shares = [denoiser.share for denoiser in denoisers]
    loss = float(np.average(list(losses.values()), weights=shares))
    if decoder_only(denoisers):
      accuracy = float(np.average(list(accuracies.values()), weights=shares))
      with np.errstate(over="ignore"):  # infinite, of a model that went astray
        perplexity = float(np.exp(loss))
      return {"loss": loss, "perplexity": perplexity, "accuracy": accuracy}
    return {
      "loss": loss,
      **{f"loss/{name}": value for name, value in losses.items()},
      **{f"accuracy/{name}": value for name, value in accuracies.items()},
    }


def evaluators(
  entries: Mapping[str, Any],
  config: BackboneConfig,
  vocabulary: SentencePieceVocabulary,
  corruption: Corruption,
  mesh: Mesh,
  microbatch_tokens: int,
  batch_axes: Sequence[str],
  on_bad_record: str = "fail",
) -> tuple[DenoisingEvaluator, ...]:
  """Evaluators from a mapping, as gin's EVALUATIONS gives it; their texts are read.

  Args:
    entries: Name to a path, or to {"path": str or several, "limit"?: int}. The path is
      a file of documents (`sources.TextFileSource`) or "builtin:TASK", of which the
      validation split is read; the limit is of segments.
    config: Of the model.
    vocabulary: Of the model.
    corruption: The mixture that is trained.
    mesh: Devices.
    microbatch_tokens: Token slots, of both sides, of one shard's microbatch at most.
    batch_axes: Of the mesh, over which rows are split.
    on_bad_record: "fail" or "skip".

  Raises:
    ConfigError: an entry that cannot work.
    DataError: a missing or bad file, or a vocabulary of another model.
  """
  rows = min(stack.vocab_size for stack in config.stacks)
  if vocabulary.size > rows:
    raise DataError(
      f"the vocabulary has {vocabulary.size} pieces, the model's table {rows} rows; "
      "they do not belong together"
    )
  scorer = SequenceScorer(config, mesh, batch_axes)
  made = []
  for name, entry in entries.items():
    source, limit = _source(name, entry)
    segments = held_out_segments(
      source, vocabulary, corruption.longest, limit, on_bad_record
    )
    made.append(
      DenoisingEvaluator(name, segments, corruption, scorer, microbatch_tokens)
    )
  return tuple(made)


def _source(name: str, entry: Any) -> tuple[sources.PythonSource, int | None]:
  """The documents of an entry, and how many segments to take."""
  where = f"evaluation {name!r}"
  options = dict(entry) if isinstance(entry, Mapping) else {"path": entry}
  if "path" not in options or set(options) - {"path", "limit"}:
    raise ConfigError(f"{where}: needs 'path' and takes 'limit', got {sorted(options)}")
  path, limit = options["path"], options.get("limit")
  if limit is not None and (type(limit) is not int or limit < 1):
    raise ConfigError(f"{where}: limit must be a positive integer, got {limit!r}")
  paths = (path,) if isinstance(path, str) else path
  if (
    not isinstance(paths, Sequence)
    or not paths
    or not all(isinstance(part, str) for part in paths)
  ):
    raise ConfigError(f"{where}: path must be a string or several, got {path!r}")
  if not any(part.startswith(BUILTIN) for part in paths):
    return sources.TextFileSource(tuple(paths)), limit
  task = paths[0].removeprefix(BUILTIN)
  if len(paths) > 1 or task not in builtin_corpus.TEXT_TASKS:
    raise ConfigError(
      f"{where}: {path!r} is no built-in task of documents; take one of "
      f"{[BUILTIN + task for task in builtin_corpus.TEXT_TASKS]}"
    )
  return sources.BuiltinSource(task), limit
