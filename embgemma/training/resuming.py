"""What a run starts from: its own newest checkpoint, another's weights, or nothing."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from embgemma import checkpoints
from embgemma.checkpoints import CheckpointStore
from embgemma.errors import CheckpointError, ConfigError
from embgemma.models.config import EmbedderConfig
from embgemma.training.train_state import (
  TrainState,
  restored_state,
  state_from_checkpoint,
)


def check_same_model(
  directory: pathlib.Path, description: checkpoints.Description
) -> None:
  """Refuses a directory that holds another model.

  Raises:
    CheckpointError: naming what differs.
  """
  if not checkpoints.is_checkpoint(directory):
    return
  kept, config = checkpoints.read_description(directory).embedder, description.embedder
  # How things are computed changes no number that is kept.
  transformer = dataclasses.replace(
    config.transformer,
    remat=kept.transformer.remat,
    attention=kept.transformer.attention,
    dropout_rate=kept.transformer.dropout_rate,
  )
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
  config: EmbedderConfig,
  seed: int,
  initial: str | None,
) -> TrainState:
  """The state of a step of the run; without one, of another's weights, or new.

  Args:
    store: Of the run.
    step: Of `resume_step`.
    init: Of `abstract_state`.
    abstract: Of `abstract_state`.
    config: Of the model.
    seed: Of new parameters.
    initial: A MODEL_DIR, or MODEL_DIR/checkpoints/STEP; None is new parameters.

  Raises:
    CheckpointError: see `restored_state` and `state_from_checkpoint`.
  """
  if step is not None:
    return restored_state(store, step, abstract)
  key = jax.random.key(seed)
  if initial is None:
    return init(key)
  return state_from_checkpoint(init, key, initial, abstract, config)
