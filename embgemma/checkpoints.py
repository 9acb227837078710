"""Checkpoint directories: what a run writes and every other command reads.

    MODEL_DIR/
      model.json         configuration, prompts, lengths, format version
      tokenizer.model    the vocabulary
      operative.gin      the configuration that wrote it, where there was one
      checkpoints/STEP/  params, ema (if kept), training, position (Orbax)

A step directory appears under its number only when all of it is written.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from embgemma.data.vocabularies import SentencePieceVocabulary
from embgemma.errors import CheckpointError, ConfigError
from embgemma.models.config import BackboneConfig, EmbedderConfig
from embgemma.typing import PyTree

CHECKPOINT_FORMAT = 1
_KINDS: dict[str, type[EmbedderConfig] | type[BackboneConfig]] = {
  "embedder": EmbedderConfig,
  "backbone": BackboneConfig,
}


@dataclasses.dataclass(frozen=True)
class Description:
  """What a checkpoint directory says about its model.

  Attributes:
    config: Shapes of an embedder, or of pretrained stacks.
    lengths: Most tokens of query, positive and negatives in training; of pretrained
      stacks, of rows of inputs and targets.
    prompts: Names of prompts to their strings.
    lineage: The same for all that was trained from the same first parameters; "" is
      not known, as of checkpoints of before.
  """

  config: EmbedderConfig | BackboneConfig
  lengths: Mapping[str, int]
  prompts: Mapping[str, str]
  lineage: str = ""

  @property
  def embedder(self) -> EmbedderConfig:
    """`config` of an embedder.

    Raises:
      CheckpointError: the checkpoint holds none.
    """
    if isinstance(self.config, EmbedderConfig):
      return self.config
    raise CheckpointError(
      "the checkpoint holds pretrained stacks without pooling and heads; "
      "`embgemma extract` makes an embedder of them"
    )

  @property
  def max_length(self) -> int:
    """Most tokens of any text in training."""
    return max(self.lengths.values())


def write_atomically(path: pathlib.Path, content: bytes) -> None:
  """Writes a file that is seen whole or not at all.

  Raises:
    CheckpointError: the disk is full or the directory cannot be written.
  """
  unfinished = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(unfinished, "wb") as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(unfinished, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      unfinished.unlink()
    raise _write_error(path, error) from error


def _write_error(path: os.PathLike[str] | str, error: OSError) -> CheckpointError:
  """What to raise where a run's directory cannot be written."""
  full = error.errno in (errno.ENOSPC, errno.EDQUOT)
  remedy = "free space or choose another MODEL_DIR" if full else "check the directory"
  return CheckpointError(
    f"{path}: cannot be written: {error.strerror or error}; {remedy}. Complete "
    "checkpoints there are untouched; the same command resumes from the last."
  )


@contextlib.contextmanager
def write_errors(path: os.PathLike[str] | str) -> Iterator[None]:
  """Turns what a failed write below `path` raises into a CheckpointError.

  Args:
    path: The file or directory that the message names.
  """
  try:
    yield
  except OSError as error:
    raise _write_error(path, error) from error
  except ValueError as error:
    # What the system said, as tensorstore passes it on.
    found = re.search(r"os_error_code='(\d+)'", str(error))
    if not found and "No space left" not in str(error):
      raise
    code = int(found[1]) if found else errno.ENOSPC
    system = OSError(code, os.strerror(code))
    raise _write_error(path, system) from system


def write_description(
  model_dir: pathlib.Path,
  description: Description,
  vocabulary: SentencePieceVocabulary,
  operative_gin: str,
) -> None:
  """Writes everything of a checkpoint directory but the weights."""
  content = {
    "format": CHECKPOINT_FORMAT,
    "kind": _kind(description.config),
    "model": description.config.to_json(),
    "lengths": dict(description.lengths),
    "prompts": dict(description.prompts),
    "lineage": description.lineage,
  }
  write_atomically(model_dir / "tokenizer.model", vocabulary.serialized)
  if operative_gin:
    write_atomically(model_dir / "operative.gin", operative_gin.encode())
  write_atomically(
    model_dir / "model.json", json.dumps(content, indent=1).encode() + b"\n"
  )


def is_checkpoint(model_dir: pathlib.Path) -> bool:
  """Whether a directory has a checkpoint's description."""
  return (model_dir / "model.json").exists()


def has_steps(model_dir: pathlib.Path) -> bool:
  """Whether a run in this directory has come to a checkpoint."""
  directory = model_dir / "checkpoints"
  return directory.is_dir() and any(p.name.isdigit() for p in directory.iterdir())


def read_description(model_dir: pathlib.Path) -> Description:
  """The description in a checkpoint directory.

  Raises:
    CheckpointError: there is none, it is damaged, or of a newer format.
  """
  path = model_dir / "model.json"
  try:
    content = json.loads(path.read_text())
    if content["format"] > CHECKPOINT_FORMAT:
      raise CheckpointError(
        f"{path}: format {content['format']} is newer than this embgemma reads "
        f"({CHECKPOINT_FORMAT}); upgrade embgemma"
      )
    config = _model_config(content["kind"], content["model"], path)
    return Description(
      config, content["lengths"], content["prompts"], content.get("lineage", "")
    )
  except FileNotFoundError as error:
    foreign = (model_dir / "config.json").exists()
    remedy = (
      "take it over with `embgemma import --from=hf`"
      if foreign
      else "give a MODEL_DIR that embgemma wrote"
    )
    raise CheckpointError(
      f"{model_dir}: not a checkpoint directory (no model.json); {remedy}"
    ) from error
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f"{path}: damaged: {error!r}") from error


def _kind(config: EmbedderConfig | BackboneConfig) -> str:
  return next(kind for kind, of in _KINDS.items() if isinstance(config, of))


def _model_config(
  kind: str, content: Any, path: pathlib.Path
) -> EmbedderConfig | BackboneConfig:
  try:
    return _KINDS[kind].from_json(content)
  except ConfigError as error:
    raise CheckpointError(f"{path}: {error}") from error


def read_vocabulary(model_dir: pathlib.Path) -> SentencePieceVocabulary:
  """The vocabulary in a checkpoint directory."""
  return SentencePieceVocabulary(model_dir / "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class CheckpointPolicy:
  """When checkpoints are written and which are kept.

  Attributes:
    every_steps: Steps between checkpoints.
    keep_last: Newest to keep.
    keep_best: Best to keep, by `best_metric`.
    best_metric: Of the evaluations, "mean" or TASK/METRIC/WIDTH. Higher is better, of
      losses and perplexities lower; "mean" of losses has its sign turned.
  """

  every_steps: int = 1000
  keep_last: int = 2
  keep_best: int = 1
  best_metric: str = "mean"

  def __post_init__(self):
    for name, least in (("every_steps", 1), ("keep_last", 1), ("keep_best", 0)):
      if getattr(self, name) < least:
        raise ConfigError(
          f"CheckpointPolicy.{name} must be at least {least}, got {getattr(self, name)}"
        )


class CheckpointStore:
  """The step directories of a MODEL_DIR.

  Args:
    model_dir: The run's directory.
    policy: What to keep; None opens for reading.
  """

  def __init__(self, model_dir: pathlib.Path, policy: CheckpointPolicy | None = None):
    self._directory = model_dir / "checkpoints"
    if policy is None and not self._directory.is_dir():
      raise CheckpointError(f"{model_dir}: holds no checkpoints yet")
    preservation = best = None
    if policy is not None:
      best = functools.partial(_best_metric, policy.best_metric)
      preservation = checkpoint_managers.AnyPreservationPolicy(
        [
          checkpoint_managers.LatestN(policy.keep_last),
          checkpoint_managers.BestN(
            get_metric_fn=best,
            n=policy.keep_best,
            keep_checkpoints_without_metrics=False,
          ),
        ]
      )
    options = ocp.CheckpointManagerOptions(
      create=policy is not None,
      read_only=policy is None,
      cleanup_tmp_directories=policy is not None,
      preservation_policy=preservation,
      best_fn=best,  # without it Orbax keeps metrics in memory only
      enable_async_checkpointing=policy is not None,
    )
    with write_errors(self._directory):
      self._manager = ocp.CheckpointManager(self._directory.absolute(), options=options)

  def steps(self) -> list[int]:
    """Complete checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def save(
    self,
    step: int,
    params: PyTree,
    ema: PyTree | None,
    training: PyTree,
    position: Mapping[str, Any],
    metrics: Mapping[str, float] | None,
  ) -> None:
    """Starts to write a checkpoint; the state may be donated once this returns.

    Args:
      step: Steps done.
      params: The model's parameters.
      ema: Their average, or None.
      training: Whatever else resuming needs.
      position: Of the data, as JSON.
      metrics: Of an evaluation at this step.

    Raises:
      CheckpointError: it, or the one before it, could not be written.
    """
    items = {
      "params": ocp.args.StandardSave(params),
      "training": ocp.args.StandardSave(training),
      "position": ocp.args.JsonSave(dict(position)),
    }
    if ema is not None:
      items["ema"] = ocp.args.StandardSave(ema)
    with write_errors(self._directory):
      self._manager.save(
        step, args=ocp.args.Composite(**items), metrics=metrics and dict(metrics)
      )

  def wait(self) -> None:
    """Returns once every checkpoint is on disk."""
    with write_errors(self._directory):
      self._manager.wait_until_finished()

  def close(self) -> None:
    self.wait()
    self._manager.close()

  def resolve_step(self, step: int | None) -> int:
    """The step itself, or the newest.

    Raises:
      CheckpointError: there is none.
    """
    steps = self.steps()
    if not steps:
      raise CheckpointError(f"{self._directory}: holds no complete checkpoint")
    if step is None:
      return steps[-1]
    if step not in steps:
      raise CheckpointError(f"{self._directory}: no step {step}; there are {steps}")
    return step

  def shipped_item(self, step: int) -> str:
    """The item to evaluate and to ship: averaged parameters or codes, where kept."""
    kept = (self._directory / str(step) / item for item in ("ema", "codes"))
    return next((path.name for path in kept if path.is_dir()), "params")

  def can_resume(self, step: int) -> bool:
    """Whether a run wrote this step, rather than an import."""
    return (self._directory / str(step) / "position").is_dir()

  def position(self, step: int) -> dict[str, Any]:
    """The data position saved at a step."""
    return self._restore(step, {"position": ocp.args.JsonRestore()})["position"]

  def restore(self, step: int, items: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Items of a step, as arrays placed like the abstract ones given.

    Args:
      step: From `resolve_step`.
      items: Item name to a tree of ShapeDtypeStruct with shardings.

    Raises:
      CheckpointError: the checkpoint is damaged or of another architecture; the
        message names parameters that differ.
    """
    for name, abstract in items.items():
      self._check_shapes(step, name, abstract)
    restore = {n: ocp.args.StandardRestore(tree) for n, tree in items.items()}
    return self._restore(step, restore)

  def _restore(self, step: int, items: Mapping[str, Any]) -> dict[str, Any]:
    try:
      restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    except Exception as error:  # Orbax and tensorstore raise many types
      raise _damaged(self._directory / str(step), error) from error
    return {name: restored[name] for name in items}

  def _check_shapes(self, step: int, item: str, abstract: PyTree) -> None:
    directory = self._directory / str(step) / item
    try:
      metadata = ocp.StandardCheckpointHandler().metadata(directory.absolute())
      found = _shapes(metadata.tree)
    except Exception as error:
      raise _damaged(directory, error) from error
    expected = _shapes(abstract)
    problems = []
    for path in sorted(found.keys() | expected.keys()):
      here, there = expected.get(path), found.get(path)
      if here != there:
        problems.append(f"{path}: checkpoint {_or_dash(there)}, model {_or_dash(here)}")
    if problems:
      shown = "\n  ".join(problems[:10])
      more = f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else ""
      raise CheckpointError(
        f"{directory}: another architecture or optimizer than this configuration's:"
        f"\n  {shown}{more}\nUse the model's own gin file, or another MODEL_DIR."
      )


class _OneAtATime(ocp.type_handlers.NumpyHandler):
  """Writes array after array; Orbax would copy all of them first."""

  async def serialize(
    self, values: Any, infos: Any, args: Any = None
  ) -> Sequence[ocp.future.Future]:
    args = args or [ocp.SaveArgs()] * len(values)
    for value, info, arg in zip(values, infos, args, strict=True):
      for written in await super().serialize([value], [info], [arg]):
        written.result()
    return []


def write_weights(
  model_dir: pathlib.Path, params: PyTree, item: str = "params"
) -> None:
  """Writes weights without a run, as step 0: what a new run can start from.

  Beyond the weights one array is in memory. Not compressed: zstd takes off 8 % of
  float32 weights, and five times as long.

  Args:
    model_dir: The checkpoint directory.
    params: Numpy arrays.
    item: Their name in the step.

  Raises:
    CheckpointError: the directory cannot be written.
  """
  directory = (model_dir / "checkpoints").absolute()
  handler = ocp.PyTreeCheckpointHandler(
    use_compression=False,
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (np.ndarray, _OneAtATime())
    ),
  )
  options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
  with (
    write_errors(directory),
    ocp.CheckpointManager(
      directory, options=options, item_handlers={item: handler}
    ) as manager,
  ):
    items = ocp.args.Composite(**{item: ocp.args.PyTreeSave(params)})
    manager.save(0, args=items)


def _damaged(path: pathlib.Path, error: Exception) -> CheckpointError:
  # Tensorstore's messages go on with a specification of hundreds of characters.
  reason = str(error).partition(" [")[0]
  return CheckpointError(
    f"{path}: damaged or missing: {reason}; delete the step's directory to fall back "
    "to an older one"
  )


def _best_metric(name: str, metrics: Mapping[str, float]) -> float:
  # Steps of before the policy changed may lack it.
  value = metrics.get(name, -math.inf)
  lower_is_better = {"loss", "perplexity"} & set(name.split("/")[1:])
  return -value if lower_is_better and name in metrics else value


def _or_dash(shape: tuple[int, ...] | None) -> str:
  return "-" if shape is None else str(shape)


def _shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
    for path, leaf in leaves
  }


def locate(path: str | os.PathLike[str]) -> tuple[pathlib.Path, int | None]:
  """MODEL_DIR and step of `--checkpoint`: a MODEL_DIR or MODEL_DIR/checkpoints/STEP."""
  directory = pathlib.Path(path)
  model_dir = directory.parent.parent
  is_step = directory.name.isdigit() and directory.parent.name == "checkpoints"
  if is_step and is_checkpoint(model_dir):
    return model_dir, int(directory.name)
  return directory, None
