import json
import os
import pathlib
import struct
import subprocess
import sys
import textwrap
import time

import pytest
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.tensorflow_stub import errors, pywrap_tensorflow

from embgemma.errors import CheckpointError, ConfigError
from embgemma.training.metric_writers import EventWriter, WandbWriter


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
    from embgemma.training.metric_writers import EventWriter, WandbWriter
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


def read_wandb(directory):
  """Histories of all runs that are kept there, by run id, in order."""
  from wandb.proto import wandb_internal_pb2

  found = {}
  for path in sorted(directory.glob("wandb/offline-run-*/*.wandb")):
    content, at = path.read_bytes(), 7  # of the file's head
    while at + 7 <= len(content):  # LevelDB's log: CRC, length, type
      _, length, kind = struct.unpack_from("<IHB", content, at)
      assert kind in (0, 1), "a record in one piece"
      if not kind:
        break
      record = wandb_internal_pb2.Record.FromString(content[at + 7 : at + 7 + length])
      at += 7 + length
      if record.WhichOneof("record_type") == "history":
        values = {
          "/".join(item.nested_key) or item.key: json.loads(item.value_json)
          for item in record.history.item
        }
        kept = {k: v for k, v in values.items() if not k.startswith("_")}
        found.setdefault(path.stem, []).append(kept)
  return found


def test_wandb_has_what_tensorboard_has(tmp_path, monkeypatch):
  """A run that goes on, from a step before its last, is the same run there."""
  pytest.importorskip("wandb", reason="of the extra wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  run = tmp_path / "run"
  run.mkdir()
  for steps in ((10, 20), (15, 25)):
    writer = WandbWriter(run, "project", {"gin": "TRAIN_STEPS = 25"})
    for step in steps:
      writer.scalars(step, {"loss": 1 / step, "evaluation/mean": 0.5})
    writer.close()
    time.sleep(1.1)  # wandb's folders are named by the second
  name = (run / "wandb_id").read_text()
  assert read_wandb(run) == {
    f"run-{name}": [
      {"step": step, "loss": 1 / step, "evaluation/mean": 0.5}
      for step in (10, 20, 15, 25)
    ]
  }


def test_what_wandb_refuses(tmp_path, monkeypatch):
  pytest.importorskip("wandb", reason="of the extra wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  with pytest.raises(ConfigError, match=r"WANDB_PROJECT=a/b: "):
    WandbWriter(tmp_path, "a/b", {})
