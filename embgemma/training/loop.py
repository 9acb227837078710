"""The training loop: one function that takes the whole configuration."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from embgemma import checkpoints
from embgemma.checkpoints import CheckpointPolicy, CheckpointStore
from embgemma.data import cache, prompts, reader
from embgemma.data.tasks import DataConfig
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import CheckpointError, ConfigError, TrainingError
from embgemma.evaluation import suite
from embgemma.evaluation.report import results_table
from embgemma.inference.embedder import TextEncoder
from embgemma.losses.objective import Objective
from embgemma.models.config import EmbedderConfig
from embgemma.models.embedder import Embedder
from embgemma.training.metric_writers import EventWriter
from embgemma.training.optimizers import OptimizerConfig
from embgemma.training.partitioning import Partitioner, data_shards
from embgemma.training.progress import Progress, duration
from embgemma.training.stopping import Stopped, stop_requests
from embgemma.training.train_state import (
  TrainState,
  abstract_state,
  restored_state,
  save_state,
  state_from_checkpoint,
)
from embgemma.training.train_step import TrainStep

EVALUATIONS_FILE = "evaluations.json"


@dataclasses.dataclass(frozen=True)
class Intervals:
  """How often a run reports and evaluates, in steps.

  Attributes:
    log: Between progress lines and TensorBoard points (means over the interval).
    evaluate: Between evaluations; 0 evaluates before the first step and after the
      last only.
  """

  log: int = 10
  evaluate: int = 0

  def __post_init__(self):
    _check_least(1, **{"Intervals.log": self.log})
    _check_least(0, **{"Intervals.evaluate": self.evaluate})


@dataclasses.dataclass(frozen=True)
class Run:
  """A run with everything checked and built, before its first step."""

  model_dir: pathlib.Path
  train_steps: int
  batch_size: int
  mesh: Mesh
  batch_sharding: jax.sharding.NamedSharding
  source: reader.StepSource
  position: dict[str, Any]
  train_step: Any
  learning_rate: Any
  evaluators: tuple[suite.Evaluator, ...]
  encoder: TextEncoder
  store: CheckpointStore
  policy: CheckpointPolicy
  intervals: Intervals
  console: Console

  def save(
    self, state: TrainState, step: int, metrics: Mapping[str, float] | None
  ) -> None:
    """Starts an asynchronous checkpoint of the state."""
    position = {**self.position, "next_step": step}
    save_state(self.store, state, step, position, metrics)

  def evaluate(self, state: TrainState, step: int) -> dict[str, float] | None:
    """Runs the evaluations and keeps their results.

    Returns:
      The mean score, and each metric as TASK/METRIC/WIDTH; None without evaluations.

    Raises:
      ConfigError: the policy's best metric is not among them.
    """
    if not self.evaluators:
      return None
    path = self.model_dir / EVALUATIONS_FILE
    kept = suite.read_results(path)
    if str(step) not in kept:
      encode = functools.partial(self.encoder.encode, state.inference_params)
      kept[str(step)] = {e.name: e.evaluate(encode) for e in self.evaluators}
      checkpoints.write_atomically(path, json.dumps(kept, indent=1).encode())
    results = kept[str(step)]
    scores = {"mean": suite.mean_score(results)} | {
      f"{task}/{key}": value
      for task, values in results.items()
      for key, value in values.items()
    }
    if self.policy.best_metric not in scores:
      raise ConfigError(
        f"CheckpointPolicy.best_metric {self.policy.best_metric!r} is not evaluated; "
        f"there are {sorted(scores)}"
      )
    return scores

  def forget_results(self, start: int) -> None:
    """Drops results of steps that the run has yet to do, perhaps in another way."""
    path = self.model_dir / EVALUATIONS_FILE
    found = suite.read_results(path)
    kept = {step: found[step] for step in found if start and int(step) <= start}
    if kept != found:
      checkpoints.write_atomically(path, json.dumps(kept, indent=1).encode())


def _check_least(least: int, **values: int) -> None:
  for name, value in values.items():
    if value < least:
      raise ConfigError(f"{name} must be at least {least}, got {value}")


def _initial_state(
  init: Any, abstract: TrainState, run: Run, seed: int, initial: str | None
) -> tuple[TrainState, int]:
  """The newest checkpoint of the run, or a new state; and the steps done."""
  if run.store.steps():
    step = run.store.resolve_step(None)
    if not run.store.can_resume(step):
      raise ConfigError(
        f"{run.model_dir} holds imported weights, not a run; train in a new MODEL_DIR "
        f"with INITIAL_CHECKPOINT_PATH = '{run.model_dir}'"
      )
    if step > run.train_steps:
      raise ConfigError(
        f"{run.model_dir} is at step {step} already; set TRAIN_STEPS to at least that, "
        "or use another MODEL_DIR"
      )
    saved = run.store.position(step)
    expected = {**run.position, "next_step": step}
    changed = sorted(k for k in expected if saved.get(k) != expected[k])
    if changed:
      detail = ", ".join(
        f"{k}: {saved.get(k)} then, {expected[k]} now" for k in changed
      )
      raise ConfigError(
        f"{run.model_dir} holds a run with other data settings ({detail}); restore "
        "them to resume, or start a new MODEL_DIR with "
        f"INITIAL_CHECKPOINT_PATH = '{run.model_dir}'"
      )
    state = restored_state(run.store, step, abstract)
    run.console.print(f"resuming from step {step:,}")
    return state, step
  key = jax.random.key(seed)
  if initial is None:
    return init(key), 0
  return state_from_checkpoint(init, key, initial, abstract, run.encoder.config), 0


_METRIC_ORDER = ("similarity", "accuracy", "", "loss", "gradient_norm")


def _check_finite(
  metrics: Mapping[str, float], step: int, task: str, last: int
) -> None:
  """Stops on the first metric, in order of computation, that is not finite."""

  def order(name: str) -> tuple[int, str]:
    prefix = name.split("/")[0]
    return (_METRIC_ORDER.index(prefix if prefix in _METRIC_ORDER else ""), name)

  for name in sorted(metrics, key=order):
    if not math.isfinite(metrics[name]):
      raise TrainingError(
        f"step {step}, task {task!r}: {name} is {metrics[name]}; stopped. The last "
        f"saved step is {last}. Lower the learning rate, clip gradients or look at "
        "the task's data, then run again to resume from there; if that stops at once, "
        "delete that step to resume from the one before."
      )


@dataclasses.dataclass
class _Window:
  """Sums since the last log line."""

  metrics: list[dict[str, float]] = dataclasses.field(default_factory=list)
  tokens: int = 0
  slots: int = 0
  waited: float = 0.0
  began: float = dataclasses.field(default_factory=time.monotonic)

  def summary(self, batch_size: int) -> dict[str, float]:
    seconds = time.monotonic() - self.began
    count = len(self.metrics)
    names = self.metrics[0].keys()
    means = {n: float(np.mean([m[n] for m in self.metrics])) for n in names}
    return means | {
      "examples_per_second": count * batch_size / seconds,
      "tokens_per_second": self.tokens / seconds,
      "real_token_share": self.tokens / self.slots,
      "input_wait_share": self.waited / seconds,
    }


def _run_steps(run: Run, state: TrainState, start: int, batches: Any) -> TrainState:
  """Trains from `start` to the end of the run."""
  writer = EventWriter(run.model_dir / "tensorboard")
  last_saved = start
  window = _Window()
  with (
    stop_requests() as stop,
    Progress(run.console, start, run.train_steps) as progress,
    contextlib.closing(writer),
  ):
    for step in range(start + 1, run.train_steps + 1):
      asked = time.monotonic()
      batch = next(batches)
      window.waited += time.monotonic() - asked
      pairs = jax.device_put(batch.pairs, run.batch_sharding)
      with jax.transfer_guard("disallow"):
        state, on_device = run.train_step(state, pairs)
        metrics = {k: float(v) for k, v in jax.device_get(on_device).items()}
      _check_finite(metrics, step, batch.task, last_saved)
      window.metrics.append(metrics)
      window.tokens += batch.real_tokens
      window.slots += batch.pairs.texts.tokens.size

      last = step == run.train_steps
      if step % run.intervals.log == 0 or last:
        values = window.summary(run.batch_size)
        values["learning_rate"] = float(run.learning_rate(step - 1))
        values["compilations"] = float(run.train_step._cache_size())
        writer.scalars(step, values)
        progress.show(step, values)
        window = _Window()
      scores = None
      if last or (run.intervals.evaluate and step % run.intervals.evaluate == 0):
        evaluating = time.monotonic()
        scores = run.evaluate(state, step)
        if scores is not None:
          writer.scalars(step, {f"evaluation/{k}": v for k, v in scores.items()})
          progress.note(f"step {step:,}: mean score {scores['mean']:.4f}")
        window.began += time.monotonic() - evaluating
      if last or stop or scores or step % run.policy.every_steps == 0:
        run.save(state, step, scores)
        last_saved = step
      if stop:
        run.store.wait()
        raise Stopped(stop[0], step)
  return state


def train(
  *,
  model_dir: str,
  model: EmbedderConfig,
  objective: Objective,
  data: DataConfig,
  optimizer: OptimizerConfig,
  train_steps: int,
  batch_size: int,
  seed: int = 0,
  partitioner: Partitioner = Partitioner(),
  evaluations: Mapping[str, Any] | None = None,
  checkpoint_policy: CheckpointPolicy = CheckpointPolicy(),
  intervals: Intervals = Intervals(),
  ema_decay: float | None = None,
  initial_checkpoint_path: str | None = None,
  reader_threads: int = 2,
  reader_workers: int = 0,
  eval_max_length: int | None = None,
  eval_tokens_per_batch: int = 8192,
  operative_gin: str = "",
) -> dict[str, suite.TaskResults]:
  """Trains one stage, from its newest checkpoint if it has one.

  Args:
    model_dir: Everything the run writes (see `embgemma.checkpoints`).
    model: Shape of the embedder; its Matryoshka widths are evaluated.
    objective: The loss.
    data: What to train on; its caches must be complete (`embgemma cache`).
    optimizer: Update rule and schedule.
    train_steps: Steps of the whole run.
    batch_size: Examples of a step, over all devices.
    seed: Of parameters and data order.
    partitioner: The mesh.
    evaluations: See `evaluation.suite.evaluators`.
    checkpoint_policy: When to save, what to keep.
    intervals: How often to log and evaluate.
    ema_decay: Decay of averaged parameters, which then are evaluated and shipped.
    initial_checkpoint_path: A checkpoint whose embedder a new run starts from.
    reader_threads: Threads that read ahead.
    reader_workers: Processes that read ahead; 0 is none.
    eval_max_length: Tokens a text is cut to in evaluation; None is the longest in
      training.
    eval_tokens_per_batch: Token slots of one evaluation batch.
    operative_gin: Kept beside the weights.

  Returns:
    Evaluation results by step.

  Raises:
    ConfigError, DataError, CheckpointError: bad input, before the first step.
    TrainingError: a metric is not finite; nothing of it is saved.
    Stopped: SIGINT or SIGTERM, after saving.
  """
  _check_least(1, TRAIN_STEPS=train_steps, BATCH_SIZE=batch_size)
  _check_least(
    0,
    RANDOM_SEED=seed,
    **{"train.reader_threads": reader_threads, "train.reader_workers": reader_workers},
  )
  if ema_decay is not None and not 0 < ema_decay < 1:
    raise ConfigError(f"EMA_DECAY must be between 0 and 1, got {ema_decay}")
  objective.check(model.embedding_width)
  if objective.needs_teacher:
    raise ConfigError(
      "the objective has a distillation term, but the caches hold no teacher "
      "embeddings; remove the term"
    )
  if data.max_length > model.transformer.max_length:
    raise ConfigError(
      f"TASK_FEATURE_LENGTHS reaches {data.max_length}, the model's max_length is "
      f"{model.transformer.max_length}"
    )
  manifest = cache.manifest(data)
  if manifest is None:
    raise ConfigError("the tasks are not cached; run `embgemma cache` with these flags")
  console = Console()
  directory = pathlib.Path(model_dir)
  mesh = partitioner.mesh()
  embedder = Embedder(model)
  evaluators = suite.evaluators(evaluations or {}, model.matryoshka_widths)
  for evaluator in evaluators:
    evaluator.check()
  vocabulary = SentencePieceVocabulary(manifest.vocabulary)
  step_fn = TrainStep(
    embedder,
    objective,
    optimizer.build(train_steps),
    ema_decay,
    optimizer.trainable,
  )
  init, abstract = abstract_state(
    embedder,
    objective,
    optimizer,
    train_steps,
    ema_decay is not None,
    partitioner,
    mesh,
  )
  shards = data_shards(mesh)
  sharding = partitioner.batch_sharding(mesh)
  description = checkpoints.Description(model, data.lengths, prompts.PROMPTS)
  _check_same_model(directory, description)
  if initial_checkpoint_path is not None and not checkpoints.is_checkpoint(directory):
    initial, step = checkpoints.locate(initial_checkpoint_path)
    CheckpointStore(initial).resolve_step(step)
  run = Run(
    model_dir=directory,
    train_steps=train_steps,
    batch_size=batch_size,
    mesh=mesh,
    batch_sharding=sharding,
    source=reader.StepSource(
      manifest.tasks, batch_size, seed, shards, model.transformer.vocab_size
    ),
    position={
      "seed": seed,
      "batch_size": batch_size,
      "mixture": data.manifest_path().stem,
    },
    train_step=jax.jit(
      step_fn,
      donate_argnums=0,
      out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, abstract), None),
    ),
    learning_rate=optimizer.schedule.build(train_steps),
    evaluators=evaluators,
    encoder=TextEncoder(
      model,
      vocabulary,
      eval_max_length or data.max_length,
      eval_tokens_per_batch,
      sharding,
      shards,
    ),
    store=CheckpointStore(directory, checkpoint_policy),
    policy=checkpoint_policy,
    intervals=intervals,
    console=console,
  )
  with contextlib.closing(run.store):
    state, start = _initial_state(init, abstract, run, seed, initial_checkpoint_path)
    run.forget_results(start)
    if not start:
      checkpoints.write_description(directory, description, vocabulary, operative_gin)
    if start in (0, train_steps):
      run.evaluate(state, start)
    began = time.monotonic()
    if start < train_steps:
      batches = reader.read_batches(run.source, start, reader_threads, reader_workers)
      _run_steps(run, state, start, batches)
  console.print(
    f"trained to step {train_steps:,} in {duration(time.monotonic() - began)}: "
    f"{directory}",
    highlight=False,
    soft_wrap=True,
  )
  return _report(run, "start" if initial_checkpoint_path else "untrained")


def _check_same_model(
  directory: pathlib.Path, description: checkpoints.Description
) -> None:
  if not checkpoints.is_checkpoint(directory):
    return
  kept, config = checkpoints.read_description(directory).embedder, description.embedder
  # How the backward pass is computed changes no number that is kept.
  transformer = dataclasses.replace(config.transformer, remat=kept.transformer.remat)
  config = dataclasses.replace(config, transformer=transformer)
  if kept != config:
    new, old = config.to_json(), kept.to_json()
    pairs = [(k, old[k], new[k]) for k in new if k != "transformer"]
    inner_new, inner_old = new["transformer"], old["transformer"]
    pairs += [(f"transformer.{k}", inner_old[k], inner_new[k]) for k in inner_new]
    detail = ", ".join(f"{k}: {a} there, {b} here" for k, a, b in pairs if a != b)
    raise CheckpointError(
      f"{directory} holds a model of another configuration ({detail}); use another "
      "MODEL_DIR"
    )


def _report(run: Run, start: str) -> dict[str, suite.TaskResults]:
  """Prints the first step (under the name `start`), the last, and BM25 side by side."""
  kept = suite.read_results(run.model_dir / EVALUATIONS_FILE)
  if kept:
    columns = {
      start: kept.get("0", {}),
      "trained": kept[str(run.train_steps)],
      "BM25": suite.bm25_results(run.evaluators),
    }
    run.console.print(results_table(columns, "held-out evaluation", suite.MAIN_METRICS))
  return kept
