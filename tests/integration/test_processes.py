"""Several processes on one machine train as one does."""

import contextlib
import dataclasses
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

pytestmark = pytest.mark.slow

STEPS = 3
# A mild temperature and a large epsilon: rounding is not amplified beyond comparison.
STEADY = (
  "--gin.TEMPERATURE=0.5",
  "--gin.OptimizerConfig.epsilon=1e-3",
  "--gin.Schedule.kind=constant",
  "--gin.Schedule.warmup_steps=0",
  "--gin.Intervals.log=1",
  "--gin.LEARNING_RATE=1e-2",
)


def losses(model_dir: pathlib.Path) -> dict[int, float]:
  """Loss of each step; of a step done twice, the newer."""
  found = {}
  for path in sorted((model_dir / "tensorboard").iterdir()):
    for event in EventFileLoader(str(path)).Load():
      for value in event.summary.value:
        if value.tag == "loss":
          found[event.step] = value.tensor.float_val[0]
  return found


@dataclasses.dataclass
class Launcher:
  """Starts the processes of a run, one device each."""

  workspace: object

  def start(
    self, model_dir: pathlib.Path, count: int, *more: str, steps: int = STEPS
  ) -> list[subprocess.Popen]:
    flags = [
      "train",
      *self.workspace.flags(*STEADY, *more, steps=steps),
      f"--gin.MODEL_DIR={model_dir}",
    ]
    with socket.socket() as found:
      found.bind(("localhost", 0))
      address = f"localhost:{found.getsockname()[1]}"
    started = []
    for index in range(count):
      own = []
      if count > 1:
        own = [
          f"--coordinator_address={address}",
          f"--process_count={count}",
          f"--process_index={index}",
        ]
      started.append(
        subprocess.Popen(
          [sys.executable, "-m", "embgemma", *flags, *own],
          env=self.workspace.environment,
          cwd=self.workspace.root,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )
    return started

  def finish(self, model_dir: pathlib.Path, count: int, *more: str, **options) -> None:
    for process in self.start(model_dir, count, *more, **options):
      _, stderr = process.communicate(timeout=300)
      assert process.returncode == 0, stderr


@pytest.fixture(scope="module")
def launch(workspace):
  return Launcher(workspace)


@pytest.fixture(scope="module")
def alone(launch, workspace):
  model_dir = workspace.root / "processes" / "one"
  launch.finish(model_dir, 1, steps=3 * STEPS)
  return losses(model_dir)


@pytest.fixture(scope="module")
def evaluated(launch, workspace):
  """MODEL_DIR of two processes that evaluate. Do not change."""
  plain = workspace.root / "plain.jsonl"
  model_dir = workspace.root / "processes" / "two"
  launch.finish(model_dir, 2, f"--gin.EVALUATIONS={{'plain': '{plain}'}}")
  return model_dir


def test_processes_that_evaluate(evaluated, alone):
  found = losses(evaluated)
  assert sorted(found) == [1, 2, 3]
  assert found == pytest.approx({s: alone[s] for s in found}, rel=1e-5)


def test_another_number_of_processes_goes_on(launch, evaluated, alone, tmp_path):
  """Two, four, then one: each with the losses of one from the start."""
  not_evaluated = shutil.ignore_patterns("evaluations.json")
  model_dir = shutil.copytree(evaluated, tmp_path / "changing", ignore=not_evaluated)
  launch.finish(model_dir, 4, "--gin.Partitioner.fsdp=2", steps=2 * STEPS)
  launch.finish(model_dir, 1, steps=3 * STEPS)
  assert losses(model_dir) == pytest.approx(alone, rel=1e-5)


def test_a_lost_process_ends_the_others(launch, workspace):
  model_dir = workspace.root / "processes" / "lost"
  survivor, victim = launch.start(model_dir, 2, steps=100_000)
  try:
    began = time.monotonic()
    while not (model_dir / "checkpoints" / "10").is_dir():
      assert survivor.poll() is None, survivor.communicate()[1]
      assert time.monotonic() - began < 300
      time.sleep(0.5)
    victim.send_signal(signal.SIGKILL)
    lost = time.monotonic()
    _, stderr = survivor.communicate(timeout=60)
    assert time.monotonic() - lost < 60
    assert survivor.returncode == 1
    assert "lost contact with another process" in stderr
    assert "Traceback" not in stderr
  finally:
    for process in (survivor, victim):
      with contextlib.suppress(ProcessLookupError):
        process.kill()
      process.communicate()
  done = max(int(p.name) for p in (model_dir / "checkpoints").iterdir())
  launch.finish(model_dir, 1, steps=done + 1)
  assert done + 1 in losses(model_dir)


def test_a_signal_to_one_stops_all(launch, workspace):
  model_dir = workspace.root / "processes" / "stopped"
  first, second = launch.start(model_dir, 2, steps=100_000)
  began = time.monotonic()
  while not (model_dir / "checkpoints" / "10").is_dir():
    assert time.monotonic() - began < 300
    time.sleep(0.5)
  second.send_signal(signal.SIGTERM)
  errors = [process.communicate(timeout=120)[1] for process in (first, second)]
  assert [first.returncode, second.returncode] == [128 + signal.SIGTERM] * 2, errors
  assert all("the same command resumes" in stderr for stderr in errors)
