"""embgemma's side: its packing, train step and embedder.

A step is packing on the host, the transfer, and the train step of a run. On a GPU
nothing here needs gin, grain, seqio or TensorFlow.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import workload
from jax.sharding import Mesh

from embgemma.data import packing, shape_plan
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.inference.embedder import TextEncoder
from embgemma.losses.objective import Nce, Objective, SpreadOut
from embgemma.models import attention
from embgemma.models.config import EmbedderConfig
from embgemma.models.embedder import init_params
from embgemma.training import activation_memory, partitioning
from embgemma.training.flops import forward_flops
from embgemma.training.learners import EmbeddingLearner
from embgemma.training.optimizers import OptimizerConfig, Schedule
from embgemma.training.partitioning import Partitioner
from embgemma.training.train_state import abstract_state
from embgemma.training.train_step import make_train_step
from embgemma.typing import Params

# A square product of this size runs at the device's best rate.
_MATMUL_SIZE = {"gpu": 8192, "cpu": 1024}
_THREADS = 2  # that read and pack ahead, as in a run
_STEPS = 1_000_000  # of the run that a step believes to be part of


class Ours:
  """Methods are requests; see `workload.serve`."""

  def __init__(self, spec: Mapping[str, Any], folder: pathlib.Path):
    self._spec = spec
    self._folder = folder
    self._device = jax.devices()[0]
    config = EmbedderConfig.from_json(spec["model"])
    transformer = attention.resolve(config.transformer, self._device.platform)
    self._config = dataclasses.replace(config, transformer=transformer)

  def about(self) -> dict[str, Any]:
    """Versions, device and settings."""
    return {
      "jax": jax.__version__,
      "device": self._device.device_kind,
      "attention": self._config.transformer.attention,
      "dtype": self._config.transformer.dtype,
      "remat": self._config.transformer.remat,
    }

  def begin_training(self, batch: int, microbatch_tokens: int | None) -> None:
    """Makes the state and the step, and plans shapes for the pairs' lengths."""
    pairs = workload.Pairs.load(self._folder / "pairs.npz")
    self._batches = pairs.batches(batch)
    lengths = np.array([[len(text) for text in column] for column in pairs.columns]).T
    mesh = Partitioner(data=1).mesh([self._device])
    optimizer = self._optimizer()
    learner = EmbeddingLearner(self._config, self._objective())
    init, abstract = abstract_state(
      learner, optimizer, _STEPS, False, Partitioner(data=1), mesh
    )
    if microbatch_tokens is None:
      longest = packing.row_length(int(lengths.max()))
      memory = activation_memory.device_memory(mesh)
      microbatch_tokens = activation_memory.fitting_tokens(
        self._config, (longest,), abstract, memory
      )
    self._plan = shape_plan.plan_shapes(
      lengths, batch, microbatch_tokens=microbatch_tokens
    )
    state = init(jax.random.key(0))
    weights = jax.tree.map(
      lambda values, leaf: jax.device_put(values, leaf.sharding),
      self._weights(),
      abstract.params["model"],
    )
    params = {**state.params, "model": weights}
    self._state = dataclasses.replace(state, params=params)
    self._mesh: Mesh = mesh
    self._specs = learner.batch_specs
    self._step = make_train_step(learner, optimizer, _STEPS, mesh, abstract)

  def _weights(self) -> Params:
    """The workload's weights, drawn as it draws them: on the host."""
    with jax.default_device(jax.devices("cpu")[0]):
      return nn.unbox(init_params(self._config, jax.random.key(0)))

  def _objective(self) -> Objective:
    settings = self._spec["objective"]
    widths = settings["widths"]
    terms: list[Any] = [
      Nce(
        widths=widths,
        temperature=settings["temperature"],
        hardness=settings["hardness"],
      )
    ]
    if settings["spread_out"]:
      terms.append(SpreadOut(widths=widths))
    return Objective(terms)

  def _optimizer(self) -> OptimizerConfig:
    settings = dict(self._spec["optimizer"])
    schedule = Schedule(kind="constant", peak=settings.pop("rate"), warmup_steps=0)
    return OptimizerConfig(schedule=schedule, **settings)

  def train(self, steps: int) -> dict[str, Any]:
    """Seconds and losses of steps, from the first batch on."""
    start = time.perf_counter()
    losses = []
    for batch in workload.cycled(self._batches, steps):
      packed = self._packed(batch)
      pairs = partitioning.place_batch(packed, self._specs, self._mesh)
      # Dispatched, not waited for: the host packs the next batch meanwhile.
      self._state, metrics = self._step(self._state, pairs)
      losses.append(metrics["loss"])
    jax.block_until_ready(self._state)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "losses": [float(loss) for loss in losses]}

  def _packed(self, batch: workload.Pairs) -> packing.PackedPairs:
    query, positive, *negatives = batch.columns
    size = len(query)
    # Example by example.
    texts = [
      *query,
      *positive,
      *(t for own in zip(*negatives, strict=True) for t in own),
    ]
    shapes, placements = self._plan.lay_out([np.array([len(text) for text in texts])])
    slots, groups, first = np.zeros(len(texts), np.int32), [], 0
    for shape, placement in zip(shapes, placements[0], strict=True):
      own = [texts[i] for i in placement.texts]
      groups.append(packing.place_texts(own, [placement], shape))
      slots[placement.texts] = first + placement.slot
      first += shape.vectors
    # No text is there twice: any distinct hashes do.
    hashes = np.stack([np.arange(size), np.zeros(size)], axis=1).astype(np.uint32)
    mask = np.ones((size, len(negatives)), bool)
    return packing.PackedPairs(tuple(groups), slots, hashes, hashes, mask)

  def packing(self) -> dict[str, Any]:
    """Token slots of all batches, shapes, microbatches, and seconds of packing."""
    start = time.perf_counter()
    packed = [self._packed(batch).groups for batch in self._batches]
    seconds = time.perf_counter() - start
    shapes = {tuple((g.tokens.shape, g.starts.shape) for g in own) for own in packed}
    return {
      "slots": sum(group.tokens.size for own in packed for group in own),
      "shapes": len(shapes),
      "microbatches": [len(group.tokens) for group in packed[0]],
      "rows": ["x".join(map(str, group.tokens.shape)) for group in packed[0]],
      "seconds": seconds / len(packed),
    }

  def flops(self) -> float:
    """Of the steps over all batches, for real tokens alone: three forward passes."""
    total = 0.0
    for batch in self._batches:
      lengths = np.array([len(text) for column in batch.columns for text in column])
      total += 3.0 * forward_flops(self._config, lengths)
    return total

  def matmul_rate(self, dtype: str) -> float:
    """FLOP/s of a loop of square matrix products."""
    size = _MATMUL_SIZE["cpu" if self._device.platform == "cpu" else "gpu"]
    products = 8
    right = jnp.eye(size, dtype=dtype)

    @jax.jit
    def chain(left):
      return jax.lax.fori_loop(0, products, lambda _, x: x @ right, left)

    left = jnp.ones((size, size), dtype)
    chain(left).block_until_ready()
    best = np.inf
    for _ in range(5):
      start = time.perf_counter()
      chain(left).block_until_ready()
      best = min(best, time.perf_counter() - start)
    return products * 2.0 * size**3 / best

  def profile(self, steps: int, directory: str) -> None:
    """Writes a trace of steps for TensorBoard or Perfetto."""
    with jax.profiler.trace(directory):
      self.train(steps)

  def read(
    self,
    files: Sequence[str],
    batch: int,
    microbatch_tokens: int | None,
    seconds: float,
  ) -> dict[str, Any]:
    """Batches a second of the input pipeline alone: a cache of JSONL pairs, packed."""
    # Where the input pipeline runs, grain is; a cache is built with seqio.
    from embgemma.data import cache, cache_builder, reader, schedule, tasks
    from embgemma.data.config import FEATURES, DataConfig

    length = self._spec["max_tokens"]
    negatives = len(self._batches[0].columns) - 2
    config = DataConfig(
      "pairs",
      dict.fromkeys(FEATURES, length),
      tasks.jsonl_tasks({"pairs": {"path": list(files)}}),
      vocabulary=str(self._folder / "model" / "tokenizer.model"),
      max_negatives=negatives,
      cache_dir=str(self._folder / "cache"),
    )
    manifest = cache.manifest(config) or cache_builder.build(config, print)
    vocab_size = self._config.transformer.vocab_size
    drawn = schedule.RecordSchedule(manifest.tasks, batch, 0, vocab_size, True)
    source = reader.StepSource(drawn, microbatch_tokens=microbatch_tokens)
    batches = reader.read_batches(source, 0, num_threads=_THREADS, num_workers=0)
    next(batches)
    start, steps, real, slots = time.perf_counter(), 0, 0, 0
    while time.perf_counter() - start < seconds:
      found = next(batches)
      steps, real, slots = steps + 1, real + found.real_tokens, slots + found.slots
    rate = steps / (time.perf_counter() - start)
    return {"steps_per_second": rate, "real_tokens_per_slot": real / slots}

  def begin_embedding(self, kind: str, vectors: str) -> None:
    """Reads the texts, and saves their vectors."""
    self._texts = json.loads((self._folder / "texts.json").read_text("utf-8"))[kind]
    tokenizer = self._folder / "model" / "tokenizer.model"
    self._vocabulary = SentencePieceVocabulary(tokenizer)
    self._params = jax.device_put(self._weights(), self._device)
    self._encoder = TextEncoder(
      self._config, self._vocabulary, self._spec["max_tokens"]
    )
    np.save(vectors, self._encoder.encode(self._params, self._texts))

  def embed(self) -> float:
    """Seconds of embedding all texts, tokenisation included."""
    start = time.perf_counter()
    self._encoder.encode(self._params, self._texts)
    return time.perf_counter() - start

  def text_tokens(self) -> int:
    """Tokens of the texts that are embedded."""
    encoded = self._vocabulary.encode_batch(self._texts, self._spec["max_tokens"])
    return sum(map(len, encoded))

  def peak(self) -> int:
    """Most bytes since `forget_peak`: resident, or of the device since the start."""
    stats = self._device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
      return int(stats["peak_bytes_in_use"])
    return workload.resident_bytes("VmHWM")

  def forget_peak(self) -> None:
    """Starts the peak anew; the device's own count has no such thing."""
    workload.forget_peak()


if __name__ == "__main__":
  workload.serve(Ours)
