"""A run that is stopped in any way ends where it would have ended."""

import contextlib
import os
import pathlib
import signal
import time

import kill_resume
import pytest

pytestmark = pytest.mark.slow


STEPS = 60


@pytest.fixture(scope="module")
def training(workspace):
  """Averaged parameters are among what is compared."""
  flags = workspace.flags("--gin.EMA_DECAY=0.9", steps=STEPS)
  return kill_resume.Training(flags, workspace.environment)


@pytest.fixture(scope="module")
def whole(training, workspace):
  """The state at the end of an uninterrupted run, and how long that took.

  The first run tokenises and compiles; the second is timed.
  """
  training.finish(workspace.root / "resume" / "first")
  began = time.monotonic()
  training.finish(workspace.root / "resume" / "whole")
  seconds = time.monotonic() - began
  return kill_resume.final_state(workspace.root / "resume" / "whole"), seconds


def test_the_comparison_sees_a_last_bit(whole):
  expected, _ = whole
  assert "params/encoder/embedder/table" in expected
  assert any(name.startswith("training/opt_state/") for name in expected)
  assert any(name.startswith("ema/") for name in expected)
  changed = dict(expected)
  table = changed["params/encoder/embedder/table"].copy()
  table.view("u4")[0, 0] ^= 1
  changed["params/encoder/embedder/table"] = table
  assert kill_resume.differences(changed, expected) == ["params/encoder/embedder/table"]
  del changed["params/encoder/embedder/table"]
  assert kill_resume.differences(changed, expected) == ["params/encoder/embedder/table"]
  assert kill_resume.differences(expected, expected) == []


def test_two_uninterrupted_runs_agree(whole, workspace):
  first = kill_resume.final_state(workspace.root / "resume" / "first")
  assert kill_resume.differences(first, whole[0]) == []


def children(pid: int) -> list[int]:
  found = []
  for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
    with contextlib.suppress(FileNotFoundError):  # a thread that has ended meanwhile
      found += [int(child) for child in path.read_text().split()]
  return found


def running_with_readers(training, model_dir):
  """A process that has saved a step, and the processes that read for it."""
  process = training.start(model_dir, "--gin.train.reader_workers=2")
  while not kill_resume.saved_steps(model_dir) and process.poll() is None:
    time.sleep(0.01)
  started = children(process.pid)
  assert len(started) >= 2
  return process, started


def assert_ended(pids: list[int]) -> None:
  """In ten seconds at most."""
  for _ in range(100):
    if not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids):
      return
    time.sleep(0.1)
  pytest.fail(f"{pids} outlive the run")


@pytest.mark.parametrize(
  ("signum", "code", "readers"),
  [
    (signal.SIGTERM, 143, "--gin.train.reader_threads=1"),
    (signal.SIGINT, 130, "--gin.train.reader_workers=2"),
  ],
)
def test_a_signal_saves_and_stops(signum, code, readers, training, whole, tmp_path):
  """It reaches all processes, as Ctrl-C in a terminal does; all of them end."""
  model_dir = tmp_path / "run"
  process, started = running_with_readers(training, model_dir)
  for pid in (*started, process.pid):
    os.kill(pid, signum)
  log = model_dir.with_suffix(".log")
  assert process.wait(60) == code, log.read_text()
  assert_ended(started)
  stopped = kill_resume.saved_steps(model_dir)[-1]
  assert f"stopped by {signum.name} at step {stopped}" in log.read_text()
  assert "Traceback" not in log.read_text()
  assert 10 <= stopped < STEPS
  training.finish(model_dir, readers)
  assert f"resuming from step {stopped}" in log.read_text()
  found = kill_resume.final_state(model_dir)
  assert kill_resume.differences(found, whole[0]) == []


def test_reading_processes_end_with_a_killed_run(training, tmp_path):
  model_dir = tmp_path / "run"
  process, started = running_with_readers(training, model_dir)
  process.kill()
  process.wait(60)
  assert_ended(started)
  log = model_dir.with_suffix(".log").read_text()
  assert "Traceback" not in log
  assert "stopped by" not in log


def importing(process, log: pathlib.Path) -> bool:
  """Whether JAX's library is being loaded; the log is still empty."""
  del log
  return "jaxlib" in pathlib.Path(f"/proc/{process.pid}/maps").read_text()


def tokenising(process, log: pathlib.Path) -> bool:
  del process
  return "tokenising" in log.read_text()


@pytest.mark.parametrize(
  ("moment", "printed"),
  [(importing, ""), (tokenising, "tokenising the tasks (once)\n")],
)
def test_interrupting_before_the_first_step(moment, printed, training, tmp_path):
  model_dir = tmp_path / "run"
  log = model_dir.with_suffix(".log")
  cache = tmp_path / "cache"
  process = training.start(model_dir, f"--gin.CACHE_DIR='{cache}'")
  while not moment(process, log):
    assert process.poll() is None, log.read_text()
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  assert process.wait(60) == 130
  assert log.read_text() == f"{printed}embgemma: interrupted\n"
  assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_killed_at_random_moments(training, whole, tmp_path):
  expected, seconds = whole
  struck, finished = kill_resume.kill_and_resume(
    training, tmp_path, kills=2, seed=0, longest=seconds
  )
  assert len(struck) == 2
  for model_dir in finished:
    assert kill_resume.differences(kill_resume.final_state(model_dir), expected) == []
