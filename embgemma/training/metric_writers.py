"""Scalars to TensorBoard event files, without TensorFlow.

`clu.metric_writers` and `tensorboard.summary.Writer` import TensorFlow where it is
installed: seconds and half a gigabyte that a trainer must not pay. The record format
and the protocol messages are the tensorboard package's own.
"""

import os
import pathlib
import socket
import time
from collections.abc import Mapping

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from embgemma.checkpoints import write_errors


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
