"""Scalars to TensorBoard event files, without TensorFlow, and to Weights & Biases.

`clu.metric_writers` and `tensorboard.summary.Writer` import TensorFlow where it is
installed: seconds and half a gigabyte that a trainer must not pay. The record format
and the protocol messages are the tensorboard package's own.
"""

import os
import pathlib
import secrets
import socket
import time
from collections.abc import Mapping

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from embgemma.checkpoints import write_atomically, write_errors
from embgemma.errors import ConfigError, of_extra

_WANDB_ID = "wandb_id"  # in MODEL_DIR: a run that resumes is the same there


class EventWriter:
  """Appends scalars to a new event file in a directory.

  Args:
    directory: TensorBoard's log directory; made if missing.

  Raises:
    CheckpointError: the disk is full or the directory cannot be written; also from
      every method.
  """

  def __init__(self, directory: pathlib.Path):
    self._directory = directory
    name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
    with write_errors(self._directory):
      directory.mkdir(parents=True, exist_ok=True)
      file = open(directory / name, "wb")  # noqa: SIM115 (closed by `close`)
    self._records = RecordWriter(file)
    self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

  def _write(self, event: event_pb2.Event) -> None:
    self._records.write(event.SerializeToString())

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes named values of a step and flushes."""
    summary = summary_pb2.Summary(
      value=[
        summary_pb2.Summary.Value(tag=tag, simple_value=value)
        for tag, value in sorted(values.items())
      ]
    )
    with write_errors(self._directory):
      self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))
      self._records.flush()

  def close(self) -> None:
    with write_errors(self._directory):
      self._records.close()


class WandbWriter:
  """Logs scalars to a run of Weights & Biases, which goes on where training resumes.

  The account's key and WANDB_MODE are as wandb reads them from the environment;
  "offline" keeps the run in the directory, for `wandb sync`.

  Args:
    model_dir: Of the training; its name is the run's.
    project: Where the run is shown.
    configuration: Shown with the run.

  Raises:
    ConfigError: wandb is not installed, or refuses.
    CheckpointError: the directory cannot be written.
  """

  def __init__(
    self, model_dir: pathlib.Path, project: str, configuration: Mapping[str, str]
  ):
    with of_extra("WANDB_PROJECT", "wandb"):
      import wandb
    kept = model_dir / _WANDB_ID
    if not kept.exists():
      write_atomically(kept, secrets.token_hex(4).encode())
    try:
      self._run = wandb.init(
        project=project,
        name=model_dir.resolve().name,
        id=kept.read_text(),
        resume="allow",
        dir=model_dir,
        config=dict(configuration),
        # No console: what a run prints is its own, and may be a user's.
        settings=wandb.Settings(console="off", silent=True),
      )
    except (wandb.errors.Error, OSError) as error:
      raise ConfigError(f"WANDB_PROJECT={project}: {error}") from error
    # wandb's own step cannot go back, where a run that was killed does.
    self._run.define_metric("*", step_metric="step")

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Sends named values of a step."""
    self._run.log({"step": step, **values})

  def close(self) -> None:
    self._run.finish()
