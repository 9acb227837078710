import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.tensorflow_stub import errors, pywrap_tensorflow

from embgemma.errors import CheckpointError
from embgemma.training.metric_writers import EventWriter


def read_events(directory: pathlib.Path) -> list[event_pb2.Event]:
  """Events of the only file, by TensorBoard's own reader, which checks the CRCs."""
  (path,) = directory.iterdir()
  reader = pywrap_tensorflow.PyRecordReader_New(str(path))
  events = []
  try:
    while True:
      reader.GetNext()
      events.append(event_pb2.Event.FromString(reader.record()))
  except errors.OutOfRangeError:
    return events


def test_tensorboard_reads_what_was_written(tmp_path):
  directory = tmp_path / "new" / "tensorboard"
  writer = EventWriter(directory)
  writer.scalars(1, {"loss": 0.5, "nce/768": -2.0})
  flushed = read_events(directory)
  writer.scalars(2, {"loss": 0.25})
  writer.close()
  events = read_events(directory)
  assert len(flushed) == 2
  assert events[0].file_version == "brain.Event:2"
  assert [
    (event.step, {value.tag: value.simple_value for value in event.summary.value})
    for event in events[1:]
  ] == [(1, {"loss": 0.5, "nce/768": -2.0}), (2, {"loss": 0.25})]
  assert all(event.wall_time > 0 for event in events)


def test_a_second_writer_appends_a_file(tmp_path):
  for _ in range(2):
    EventWriter(tmp_path).close()
  assert len(list(tmp_path.iterdir())) == 2


def test_a_directory_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError, match="cannot be written"):
    EventWriter(tmp_path / "file" / "tensorboard")


def test_full_disk(tmp_path):
  writer = EventWriter(tmp_path)
  # As /dev/full does, the disk takes nothing.
  full = os.open("/dev/full", os.O_WRONLY)
  (path,) = tmp_path.iterdir()
  [handle] = [
    int(entry)
    for entry in os.listdir("/proc/self/fd")
    if os.path.realpath(f"/proc/self/fd/{entry}") == str(path.resolve())
  ]
  os.dup2(full, handle)
  os.close(full)
  with pytest.raises(CheckpointError, match="No space left on device"):
    writer.scalars(1, {"loss": 1.0})
  with pytest.raises(CheckpointError, match="No space left on device"):
    writer.close()


def test_writing_imports_no_tensorflow(tmp_path):
  program = textwrap.dedent(
    """
    import pathlib, sys
    from embgemma.training.metric_writers import EventWriter
    writer = EventWriter(pathlib.Path(sys.argv[1]))
    writer.scalars(1, {"loss": 1.0})
    writer.close()
    print(sorted({"tensorflow", "torch", "seqio"} & set(sys.modules)))
    """
  )
  done = subprocess.run(
    [sys.executable, "-c", program, str(tmp_path)],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout == "[]\n"
