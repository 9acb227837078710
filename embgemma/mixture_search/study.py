"""A search shared by any number of workers: who does which trial, and its record.

Optuna's study holds all state. A trial whose worker dies is queued again under its
index.
"""

import contextlib
import dataclasses
import datetime
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import optuna
import sqlalchemy
from optuna.exceptions import (
  ExperimentalWarning,
  TrialPruned,
  UpdateFinishedTrialError,
)
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from embgemma.errors import ConfigError
from embgemma.mixture_search.simplex import SCORES, SimplexSampler
from embgemma.mixture_search.trials import (
  MixtureTrial,
  RunTrial,
  Scores,
  SearchPlan,
  TrialError,
  TrialKilledError,
  TrialRecord,
)

_SETTINGS = "settings"  # user attribute of a study: what its trials share
_WORKER, _ERROR, _STEPS = "worker", "error", "steps"  # user attributes of a trial
_RETRIED = "failed_trial"  # Optuna's system attribute: the number of the first
_HEARTBEAT_SECONDS, _GRACE_SECONDS = 15, 60
_POLL_SECONDS = 2.0
_STATES = {
  TrialState.WAITING: "waiting",
  TrialState.RUNNING: "running",
  TrialState.COMPLETE: "complete",
  TrialState.PRUNED: "stopped",
  TrialState.FAIL: "failed",
}


class _SurplusError(Exception):
  """Another worker took the last trial in the same moment."""


class MixtureStudy:
  """A study of a plan; all workers of a search open the same.

  Args:
    url: Of SQLAlchemy, such as sqlite:///study.db.
    name: Of the study there.
    plan: Its trials.
    settings: What else every trial shares, as text. Workers whose plan or settings
      differ from those of the first are refused.

  Raises:
    ConfigError: `url` is none, its database cannot be opened, or the study is another.
  """

  def __init__(self, url: str, name: str, plan: SearchPlan, settings: str = ""):
    self.plan = plan
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ExperimentalWarning)
      pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
      if plan.stop_below is not None:
        pruner = optuna.pruners.PercentilePruner(
          100 - plan.stop_below, n_startup_trials=plan.seed_repeats + 4, n_min_trials=4
        )
      try:
        self._storage = RDBStorage(
          url,
          heartbeat_interval=_HEARTBEAT_SECONDS,
          grace_period=_GRACE_SECONDS,
          heartbeat_stale_trial_callback=_requeue,
        )
        self._study = optuna.create_study(
          storage=self._storage,
          study_name=name,
          direction="maximize",
          load_if_exists=True,
          sampler=SimplexSampler(
            plan.groups,
            plan.objectives,
            plan.random_seed,
            self._index,
            self._fixed_rates,
          ),
          pruner=pruner,
        )
      except (sqlalchemy.exc.SQLAlchemyError, ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the study's storage {url}: {reason}") from error
    shared = dataclasses.asdict(plan)
    del shared["proposed_trials"]  # a search may be given more
    lines = (f"{name} = {value}" for name, value in shared.items())
    self._check_settings(url, "\n".join([*lines, settings]))

  def _check_settings(self, url: str, settings: str) -> None:
    kept = self._study.user_attrs.get(_SETTINGS)
    if kept is None:
      self._study.set_user_attr(_SETTINGS, settings)
    elif kept != settings:
      changed = sorted(set(kept.splitlines()) ^ set(settings.splitlines()))
      raise ConfigError(
        f"{url}: study {self._study.study_name!r} was begun with other settings: "
        f"{'; '.join(changed)}; give these again, or another SEARCH_DIR"
      )

  def _index(self, trial: FrozenTrial) -> int:
    return trial_index(trial, self._study.get_trials(deepcopy=False))

  def _fixed_rates(self, trial: FrozenTrial) -> Mapping[str, float] | None:
    return self.plan.fixed_rates(self._index(trial))

  def work(self, run: RunTrial, say: Callable[[str], None]) -> None:
    """Does trials until all of the search are done, its own and those of others.

    Args:
      run: Trains and evaluates a mixture.
      say: Takes a line about each trial.
    """
    waiting = False
    while sum(record.is_done for record in self.records()) < self.plan.trials:
      self._requeue_lost()
      if self._has_work():
        waiting = False
        self._do_one(run, say)
        continue
      if not waiting:
        running = (r for r in self.records() if r.state == "running")
        others = ", ".join(f"{r.index + 1} ({r.worker})" for r in running)
        say(f"waiting for trials of other workers: {others}")
      waiting = True
      time.sleep(_POLL_SECONDS)

  def records(self) -> list[TrialRecord]:
    """The trials of the search, by index; those not begun are left out."""
    trials = self._study.get_trials(deepcopy=False)
    found: dict[int, TrialRecord] = {}
    for trial in trials:
      record = _record(trial, trial_index(trial, trials), self.plan)
      kept = found.get(record.index)
      # Of an index that two workers had, what was finished first counts.
      if record.index < self.plan.trials and not (kept and kept.is_done):
        found[record.index] = record
    return [found[index] for index in sorted(found) if found[index].state != "lost"]

  def _has_work(self) -> bool:
    trials = self._study.get_trials(deepcopy=False)
    if any(t.state is TrialState.WAITING for t in trials):
      return True
    return sum(not _is_retry(t) for t in trials) < self.plan.trials

  def _do_one(self, run: RunTrial, say: Callable[[str], None]) -> None:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ExperimentalWarning)
      self._study.optimize(
        lambda trial: self._objective(trial, run, say),
        n_trials=1,
        catch=(TrialError, _SurplusError),
      )

  def _objective(
    self, trial: optuna.Trial, run: RunTrial, say: Callable[[str], None]
  ) -> float:
    trial.set_user_attr(_WORKER, _this_worker())
    trials = self._study.get_trials(deepcopy=False)
    index = trial_index(trials[trial.number], trials)
    done = {record.index for record in self.records() if record.is_done}
    if index >= self.plan.trials or index in done:
      raise _SurplusError
    rates = {group: trial.suggest_float(group, 0.0, 1.0) for group in self.plan.groups}
    role = self.plan.role(index)
    seed = self.plan.random_seed + (index if role == "seed" else 0)
    name = f"trial {index + 1} of {self.plan.trials} ({role})"
    say(f"{name}: {' '.join(f'{g}={r:.3f}' for g, r in rates.items())}")
    try:
      scores = run(
        MixtureTrial(index, role, rates, seed),
        lambda step, scores: self._report(trial, index, step, scores),
      )
      self._check_scores(scores)
    except TrialError as error:
      trial.set_user_attr(_ERROR, str(error))
      say(f"{name}: failed: {error}")
      raise
    except TrialPruned:
      say(f"{name}: stopped early")
      raise
    # No Exception to Optuna: the trial stays open, and is queued again.
    except TrialKilledError as error:
      raise SystemExit(f"embgemma: error: {error}") from None
    except KeyboardInterrupt:
      raise SystemExit(128 + signal.SIGINT) from None
    trial.set_user_attr(SCORES, dict(scores))
    say(f"{name}: {' '.join(f'{o}={s:.4f}' for o, s in scores.items())}")
    return float(np.mean([scores[o] for o in self.plan.objectives]))

  def _check_scores(self, scores: Scores) -> None:
    wrong = [
      o for o in self.plan.objectives if o not in scores or not np.isfinite(scores[o])
    ]
    if wrong:
      raise TrialError(f"no finite score of {', '.join(wrong)}")

  def _report(self, trial: optuna.Trial, index: int, step: int, scores: Scores) -> None:
    """Keeps the scores of a step; ends a trial that is behind on every objective."""
    steps = {**trial.user_attrs.get(_STEPS, {}), str(step): dict(scores)}
    trial.set_user_attr(_STEPS, steps)
    seed = self.records()[0]
    if seed.index != 0 or step not in seed.steps:
      return
    reference = seed.steps[step]
    trial.report(max(scores[o] - reference[o] for o in self.plan.objectives), step)
    if self.plan.role(index) != "seed" and trial.should_prune():
      raise TrialPruned(f"at step {step}")

  def _requeue_lost(self) -> None:
    """Queues the trials of dead workers again, each once.

    Optuna's heartbeats tell those of other machines; here a process can be looked up.
    """
    trials = self._study.get_trials(deepcopy=False)
    for trial in trials:
      if trial.state is TrialState.RUNNING and _is_dead(trial):
        with contextlib.suppress(UpdateFinishedTrialError):
          if self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL):
            _requeue(self._study, self._storage.get_trial(trial._trial_id))
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", ExperimentalWarning)
      optuna.storages.fail_stale_trials(self._study)
    self._requeue_dropped()

  def _requeue_dropped(self) -> None:
    """Those whose worker died between failing and queueing again."""
    trials = self._study.get_trials()
    done = {record.index for record in self.records() if record.is_done}
    newest: dict[int, FrozenTrial] = {}
    for trial in trials:
      newest[trial_index(trial, trials)] = trial
    for index, trial in newest.items():
      lost = _record(trial, index, self.plan).state == "lost" and index not in done
      if lost and index < self.plan.trials and _seconds_since(trial) > _GRACE_SECONDS:
        _requeue(self._study, trial)


def _requeue(study: optuna.Study, trial: FrozenTrial) -> None:
  """Queues a trial again that was lost; nothing but its mixture stays."""
  trial.user_attrs = {}  # its worker is not the next one
  with warnings.catch_warnings():
    warnings.simplefilter("ignore", ExperimentalWarning)
    RetryHeartbeatStaleTrialCallback()(study, trial)


def trial_index(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> int:
  """The index of a trial in the search: that of the one it repeats.

  Args:
    trial: Of the study.
    trials: All of the study, by number.
  """
  number = trial.system_attrs.get(_RETRIED, trial.number)
  return number - sum(_is_retry(t) for t in trials[:number])


def _is_retry(trial: FrozenTrial) -> bool:
  return _RETRIED in trial.system_attrs


def _record(trial: FrozenTrial, index: int, plan: SearchPlan) -> TrialRecord:
  attributes = trial.user_attrs
  state = _STATES[trial.state]
  if state == "failed" and _ERROR not in attributes:
    state = "lost"  # its worker died, or it was one too many
  seconds = trial.duration.total_seconds() if trial.duration else None
  return TrialRecord(
    index=index,
    role=plan.role(index),
    state=state,
    rates=dict(trial.params),
    scores=attributes.get(SCORES, {}),
    steps={int(step): scores for step, scores in attributes.get(_STEPS, {}).items()},
    seconds=seconds,
    worker=attributes.get(_WORKER, ""),
    error=attributes.get(_ERROR, ""),
  )


def _this_worker() -> str:
  return f"{socket.gethostname()}:{os.getpid()}"


def _is_dead(trial: FrozenTrial) -> bool:
  """Whether a running trial's worker is known to have ended.

  One that ended before it could say who it was has no heartbeat either.
  """
  worker = trial.user_attrs.get(_WORKER)
  if worker is None:
    return _seconds_since(trial) > _GRACE_SECONDS
  host, _, pid = worker.rpartition(":")
  if host != socket.gethostname() or int(pid) == os.getpid():
    return False
  try:
    os.kill(int(pid), 0)
  except ProcessLookupError:
    return True
  except PermissionError:
    return False
  return False


def _seconds_since(trial: FrozenTrial) -> float:
  """Since a trial ended, or began if it has not."""
  moment = trial.datetime_complete or trial.datetime_start
  if moment is None:
    return 0.0
  return (datetime.datetime.now() - moment).total_seconds()
