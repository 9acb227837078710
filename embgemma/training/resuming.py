"""What a run starts from: its own newest checkpoint, another's weights, or nothing."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from embgemma import checkpoints
from embgemma.checkpoints import CheckpointStore
from embgemma.errors import CheckpointError, ConfigError
from embgemma.models.config import BackboneConfig, EmbedderConfig, settings
from embgemma.training.train_state import TrainState, restored_state
from embgemma.training.warm_start import StartingPoint, state_from_checkpoints


def check_same_model(
  directory: pathlib.Path, description: checkpoints.Description
) -> None:
  """Refuses a directory that holds another model.

  Raises:
    CheckpointError: naming what differs.
  """
  if not checkpoints.is_checkpoint(directory):
    return
  kept = checkpoints.read_description(directory).config
  new, old = (settings(config) for config in (description.config, kept))
  if new != old:
    differing = [
      f"{key}: {old.get(key)} there, {new.get(key)} here"
      for key in dict.fromkeys((*new, *old))
      if old.get(key) != new.get(key)
    ]
    raise CheckpointError(
      f"{directory} holds a model of another configuration ({', '.join(differing)}); "
      "use another MODEL_DIR"
    )


def resume_step(
  store: CheckpointStore,
  directory: pathlib.Path,
  train_steps: int,
  position: Mapping[str, Any],
) -> int | None:
  """The newest step to resume from; None where there is none yet.

  Args:
    store: Of the run.
    directory: Of the run, for messages.
    train_steps: Of the run.
    position: What a batch depends on beside the step.

  Raises:
    ConfigError: the directory holds imported weights, more steps than the run is to
      have, or steps on other data.
  """
  if not store.steps():
    return None
  step = store.resolve_step(None)
  if not store.can_resume(step):
    raise ConfigError(
      f"{directory} holds imported weights, not a run; train in a new MODEL_DIR "
      f"with INITIAL_CHECKPOINT_PATH = '{directory}'"
    )
  if step > train_steps:
    raise ConfigError(
      f"{directory} is at step {step} already; set TRAIN_STEPS to at least that, "
      "or use another MODEL_DIR"
    )
  saved = store.position(step)
  expected = {**position, "next_step": step}
  changed = sorted(k for k in expected if saved.get(k) != expected[k])
  if changed:
    detail = ", ".join(f"{k}: {saved.get(k)} then, {expected[k]} now" for k in changed)
    raise ConfigError(
      f"{directory} holds a run with other data settings ({detail}); restore "
      "them to resume, or start a new MODEL_DIR with "
      f"INITIAL_CHECKPOINT_PATH = '{directory}'"
    )
  return step


def initial_state(
  store: CheckpointStore,
  step: int | None,
  init: Callable[[jax.Array], TrainState],
  abstract: TrainState,
  config: EmbedderConfig | BackboneConfig,
  seed: int,
  points: Sequence[StartingPoint],
) -> TrainState:
  """The state of a step of the run; without one, of others' weights, or new.

  Args:
    store: Of the run.
    step: Of `resume_step`.
    init: Of `abstract_state`.
    abstract: Of `abstract_state`.
    config: Of the model.
    seed: Of new parameters.
    points: Of `open_starting_points`; none is new parameters.

  Raises:
    CheckpointError: see `restored_state` and `state_from_checkpoints`.
  """
  if step is not None:
    return restored_state(store, step, abstract)
  key = jax.random.key(seed)
  if not points:
    return init(key)
  return state_from_checkpoints(init, key, points, abstract, config)
