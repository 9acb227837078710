"""The training loop: one function that takes the whole configuration."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from embgemma import checkpoints
from embgemma.checkpoints import CheckpointPolicy, CheckpointStore
from embgemma.data import cache, reader
from embgemma.data.config import DataConfig, TextDataConfig
from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import ConfigError
from embgemma.evaluation import suite
from embgemma.evaluation.report import results_table
from embgemma.losses.denoising import Denoising
from embgemma.losses.objective import Objective
from embgemma.models import adaptation
from embgemma.models.config import BackboneConfig, EmbedderConfig
from embgemma.training import distributed, hardware, warm_start
from embgemma.training.activation_memory import device_memory, fitting_tokens
from embgemma.training.metric_writers import EventWriter, WandbWriter
from embgemma.training.optimizers import OptimizerConfig
from embgemma.training.partitioning import Partitioner, place_batch
from embgemma.training.profiling import Profiler
from embgemma.training.progress import Progress, duration
from embgemma.training.resuming import check_same_model, initial_state, resume_step
from embgemma.training.stage_protocol import Evaluation, Evaluator
from embgemma.training.stages import make_stage
from embgemma.training.step_metrics import Interval, epoch_metrics
from embgemma.training.stopping import Stopped, stop_requests
from embgemma.training.train_state import TrainState, abstract_state, save_state
from embgemma.training.train_step import make_train_step
from embgemma.typing import PyTree

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

  def logs_at(self, step: int) -> bool:
    return step % self.log == 0

  def evaluates_at(self, step: int) -> bool:
    return bool(self.evaluate) and step % self.evaluate == 0


@dataclasses.dataclass(frozen=True)
class Run:
  """A run with everything checked and built, before its first step."""

  model_dir: pathlib.Path
  train_steps: int
  batch_size: int
  mesh: Mesh
  source: reader.BatchSource
  batch_specs: PyTree
  position: dict[str, Any]
  train_step: Any
  learning_rate: Any
  evaluation: Evaluation
  store: CheckpointStore
  policy: CheckpointPolicy
  intervals: Intervals
  profiler: Profiler | None
  wandb_project: str | None
  operative_gin: str
  console: Console

  @property
  def evaluators(self) -> tuple[Evaluator, ...]:
    return self.evaluation.evaluators

  def save(
    self, state: TrainState, step: int, metrics: Mapping[str, float] | None
  ) -> None:
    """Starts an asynchronous checkpoint of the state."""
    position = {**self.position, "next_step": step}
    save_state(self.store, state, step, position, metrics)

  def evaluate(self, state: TrainState, step: int) -> dict[str, float] | None:
    """Runs the evaluations and keeps their results.

    Returns:
      The mean score, and each metric as TASK/METRIC, with /WIDTH or /DENOISER where it
      has one; None without evaluations.

    Raises:
      ConfigError: the policy's best metric is not among them.
    """
    if not self.evaluators:
      return None
    path = self.model_dir / EVALUATIONS_FILE
    kept = suite.read_results(path)
    if not distributed.first_says(str(step) in kept):
      kept[str(step)] = self.evaluation.results(state.inference_params)
      _write_results(path, kept)
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
      _write_results(path, kept)


def _write_results(path: pathlib.Path, results: Mapping[str, Any]) -> None:
  if distributed.is_first():
    checkpoints.write_atomically(path, json.dumps(results, indent=1).encode())


def _check_least(least: int, **values: int) -> None:
  for name, value in values.items():
    if value < least:
      raise ConfigError(f"{name} must be at least {least}, got {value}")


class _Reports:
  """Progress lines and points of curves of a run; of its first process only."""

  def __init__(self, run: Run, start: int, exits: contextlib.ExitStack):
    self._run = run
    self._progress = exits.enter_context(Progress(run.console, start, run.train_steps))
    self._writers: list[EventWriter | WandbWriter] = []
    if distributed.is_first():
      self._open(EventWriter(run.model_dir / "tensorboard"), exits)
      if run.wandb_project is not None:
        configuration = {"gin": run.operative_gin}
        project = run.wandb_project
        self._open(WandbWriter(run.model_dir, project, configuration), exits)

  def _open(
    self, writer: EventWriter | WandbWriter, exits: contextlib.ExitStack
  ) -> None:
    self._writers.append(exits.enter_context(contextlib.closing(writer)))

  def interval(self, step: int, values: dict[str, float]) -> None:
    values["learning_rate"] = float(self._run.learning_rate(step - 1))
    values["compilations"] = float(self._run.train_step._cache_size())
    values |= epoch_metrics(self._run.source.epochs(step))
    self._write(step, values)
    self._progress.show(step, values)

  def scores(self, step: int, scores: Mapping[str, float]) -> None:
    self._write(step, {f"evaluation/{k}": v for k, v in scores.items()})
    mean = scores["mean"]
    # Losses have their sign turned.
    lower = any(name.endswith(f"/{suite.LOSS}") for name in scores)
    said = f"mean loss {-mean:.4f}" if lower else f"mean score {mean:.4f}"
    self._progress.note(f"step {step:,}: {said}")

  def _write(self, step: int, values: Mapping[str, float]) -> None:
    for writer in self._writers:
      writer.scalars(step, values)


def _profiler(
  directory: pathlib.Path,
  steps: Sequence[int] | None,
  train_steps: int,
  console: Console,
) -> Profiler | None:
  if steps is None:
    return None
  profiler = Profiler(directory / "profile", steps, train_steps, console)
  return profiler if distributed.is_first() else None


def _profiled(
  profiler: Profiler | None, step: int, interval: Interval, last_saved: int
) -> contextlib.AbstractContextManager[None]:
  if profiler is None:
    return contextlib.nullcontext()
  return profiler.step(step, functools.partial(interval.collect, last_saved))


def _run_steps(
  run: Run, state: TrainState, start: int, batches: Iterator[reader.StepBatch]
) -> TrainState:
  """Trains from `start` to the end of the run."""
  last_saved = start
  interval = Interval(run.batch_size)
  with contextlib.ExitStack() as exits:
    signals = exits.enter_context(stop_requests())
    reports = _Reports(run, start, exits)
    if run.profiler is not None:
      exits.callback(run.profiler.close)
    for step in range(start + 1, run.train_steps + 1):
      last = step == run.train_steps
      logs = last or run.intervals.logs_at(step)
      evaluates = run.evaluators and (last or run.intervals.evaluates_at(step))
      with _profiled(run.profiler, step, interval, last_saved):
        asked = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - asked
        interval.waited_for_input(waited)
        if run.profiler is not None:
          run.profiler.waited(waited)
        arrays = place_batch(batch.arrays, run.batch_specs, run.mesh)
        with jax.transfer_guard("disallow"):
          state, metrics = run.train_step(state, arrays)
        interval.add(step, batch, metrics)

      # Several processes look up from their steps at logs only, all at the same.
      asks = logs or jax.process_count() == 1
      stop = asks and distributed.any_process(bool(signals))
      saves = last or stop or evaluates or step % run.policy.every_steps == 0
      # Between these the device computes while the host prepares the next step.
      interval.collect(last_saved, in_flight=0 if logs or saves else 1)
      if logs:
        reports.interval(step, interval.summary())
        interval = Interval(run.batch_size)
      scores = None
      if evaluates:
        evaluating = time.monotonic()
        scores = run.evaluate(state, step)
        if scores is not None:
          reports.scores(step, scores)
        interval.paused(time.monotonic() - evaluating)
      if saves:
        run.save(state, step, scores)
        last_saved = step
      if stop:
        run.store.wait()
        raise Stopped(signals[0] if signals else signal.SIGTERM, step)
  return state


def train(
  *,
  model_dir: str,
  model: EmbedderConfig | BackboneConfig,
  objective: Objective | Denoising,
  data: DataConfig | TextDataConfig,
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
  initial_decoder_checkpoint_path: str | None = None,
  microbatch_tokens: int | None = None,
  reader_threads: int = 2,
  reader_workers: int = 0,
  profile_steps: Sequence[int] | None = None,
  eval_max_length: int | None = None,
  eval_tokens_per_batch: int | None = None,
  baselines: bool = True,
  wandb_project: str | None = None,
  operative_gin: str = "",
) -> dict[str, suite.TaskResults]:
  """Trains one stage, from its newest checkpoint if it has one.

  An embedder trains on pairs, pretrained stacks on documents; model, objective and
  data are all of one kind.

  Args:
    model_dir: Everything the run writes (see `embgemma.checkpoints`).
    model: Shape of the model; an embedder's Matryoshka widths are evaluated.
    objective: The loss.
    data: What to train on; its caches must be complete (`embgemma cache`).
    optimizer: Update rule and schedule.
    train_steps: Steps of the whole run.
    batch_size: Examples of a step, over all devices: pairs, or segments of documents.
    seed: Of parameters and data order.
    partitioner: The mesh.
    evaluations: See `evaluation.suite.evaluators` and, of documents,
      `evaluation.denoising.evaluators`.
    checkpoint_policy: When to save, what to keep.
    intervals: How often to log and evaluate.
    ema_decay: Decay of averaged parameters, which then are evaluated and shipped.
    initial_checkpoint_path: A checkpoint that a new run starts from: its embedder, or
      its stacks, adapted.
    initial_decoder_checkpoint_path: Another one for the decoder.
    microbatch_tokens: Token slots that a device takes at a time; a batch of more is
      done in parts, exactly. None is as many as its memory holds.
    reader_threads: Threads that read ahead.
    reader_workers: Processes that read ahead; 0 is none.
    profile_steps: First and last step of a profile; None is none.
    eval_max_length: Tokens a text is cut to in evaluation; None is the longest in
      training.
    eval_tokens_per_batch: Token slots of a device in one evaluation batch; None is what
      suits it.
    baselines: Whether to evaluate before the first step, too, and BM25 in the end.
    wandb_project: Of Weights & Biases, which gets what TensorBoard gets; None is none.
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
  mesh = partitioner.mesh()
  stage = make_stage(model, objective, data, mesh.devices.flat[0].platform)
  manifest = cache.manifest(data)
  if manifest is None:
    raise ConfigError("the tasks are not cached; run `embgemma cache` with these flags")
  console = Console(quiet=not distributed.is_first())
  directory = pathlib.Path(model_dir)
  description = checkpoints.Description(model, data.lengths, data.prompt_table)
  check_same_model(directory, description)
  vocabulary = SentencePieceVocabulary(manifest.vocabulary)
  evaluation = stage.evaluation(
    evaluations or {}, vocabulary, mesh, eval_max_length, eval_tokens_per_batch
  )
  begun = warm_start.find_start(
    directory,
    initial_checkpoint_path,
    initial_decoder_checkpoint_path,
    model,
    vocabulary,
  )
  points, report = begun
  if report is not None:
    optimizer = warm_start.training_alone(optimizer, report)
  optimizer.check_steps(train_steps)
  learner = stage.learner
  init, abstract = abstract_state(
    learner, optimizer, train_steps, ema_decay is not None, partitioner, mesh
  )
  if microbatch_tokens is None:
    microbatch_tokens = fitting_tokens(
      stage.config, stage.row, abstract, device_memory(mesh), optimizer.trainable
    )
  source = stage.source(manifest, mesh, batch_size, seed, microbatch_tokens)
  run = Run(
    model_dir=directory,
    train_steps=train_steps,
    batch_size=batch_size,
    mesh=mesh,
    source=source,
    batch_specs=learner.batch_specs,
    position={
      "seed": seed,
      "batch_size": batch_size,
      "mixture": data.mixture_key(),
      **source.settings,
    },
    train_step=make_train_step(
      learner, optimizer, train_steps, mesh, abstract, ema_decay, seed
    ),
    learning_rate=optimizer.schedule.build(train_steps),
    evaluation=evaluation,
    store=CheckpointStore(directory, checkpoint_policy),
    policy=checkpoint_policy,
    intervals=intervals,
    profiler=_profiler(directory, profile_steps, train_steps, console),
    wandb_project=wandb_project,
    operative_gin=operative_gin,
    console=console,
  )
  with contextlib.closing(run.store):
    done = resume_step(run.store, directory, train_steps, run.position)
    if done is None and report is not None:
      console.print(adaptation.report_text(report), highlight=False, soft_wrap=True)
      if optimizer.alone and optimizer.alone_steps:
        console.print(f"what is random trains alone for {optimizer.alone_steps} steps")
    state = initial_state(run.store, done, init, abstract, stage.config, seed, points)
    if done is not None:
      console.print(f"resuming from step {done:,}")
    start = done or 0
    if distributed.is_first():
      run.forget_results(start)
      hardware.write_system(directory, mesh)
      if not start:
        lineage = warm_start.lineage(begun, stage.config, seed)
        description = dataclasses.replace(description, lineage=lineage)
        checkpoints.write_description(directory, description, vocabulary, operative_gin)
        warm_start.keep_report(directory, report)
    distributed.wait_for_all("description")
    if start == train_steps or (start == 0 and baselines):
      run.evaluate(state, start)
    began = time.monotonic()
    if start < train_steps:
      batches = reader.read_batches(run.source, start, reader_threads, reader_workers)
      _run_steps(run, state, start, batches)
  console.print(
    f"trained to step {train_steps:,} in {duration(time.monotonic() - began)}, "
    f"{run.train_step._cache_size()} shapes compiled: {directory}",
    highlight=False,
    soft_wrap=True,
  )
  start_name = "start" if initial_checkpoint_path else "untrained"
  return _report(run, start_name, baselines)


def _report(run: Run, start: str, baselines: bool) -> dict[str, suite.TaskResults]:
  """Prints the first step (under the name `start`), the last, and BM25 side by side."""
  kept = suite.read_results(run.model_dir / EVALUATIONS_FILE)
  if kept:
    columns = {start: kept["0"]} if "0" in kept else {}
    columns["trained"] = kept[str(run.train_steps)]
    lexical = suite.bm25_results(run.evaluators) if baselines else {}
    if lexical:
      columns["BM25"] = lexical
    shown = (*suite.MAIN_METRICS, suite.LOSS, "perplexity")
    run.console.print(results_table(columns, "held-out evaluation", shown))
  return kept
