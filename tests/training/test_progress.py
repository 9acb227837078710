import io

import pytest
from rich.console import Console

from embgemma.training import progress
from embgemma.training.progress import Progress, duration

VALUES = {
  "loss": 1.25,
  "examples_per_second": 1234.5,
  "tokens_per_second": 98765.4,
  "real_token_share": 0.875,
}


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0.0, "0:00"),
    (59.4, "0:59"),
    (59.6, "1:00"),
    (3599.0, "59:59"),
    (3661.0, "1:01:01"),
  ],
)
def test_duration(seconds, text):
  assert duration(seconds) == text


@pytest.fixture
def clock(monkeypatch):
  """A clock that tests set."""
  now = [1000.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  return now


def test_without_a_terminal_lines_come_now_and_then(clock):
  file = io.StringIO()
  console = Console(file=file, width=40)
  with Progress(console, start_step=100, train_steps=400) as line:
    for step in range(110, 410, 10):
      clock[0] += 1.0
      line.show(step, VALUES)
    line.note("step 400: mean score 0.5000")
  lines = file.getvalue().splitlines()
  # The first, one each 15 s, and the last step; never wrapped, no escape codes.
  assert [text.split()[1] for text in lines] == [
    "110/400",
    "260/400",
    "400/400",
    "400:",
  ]
  assert lines[0] == (
    "step 110/400  loss 1.2500  1,234.5 examples/s  98,765 tokens/s  87.5% real"
    "  ETA 0:29"
  )
  assert lines[-1] == "step 400: mean score 0.5000"
  assert "\x1b" not in file.getvalue()


@pytest.mark.parametrize(
  ("epochs", "said"),
  [((0.5,), "real  epoch 0.50  ETA"), ((2.25, 0.5), "real  epoch 0.50–2.25  ETA")],
)
def test_epochs_from_the_least_to_the_most(epochs, said):
  file = io.StringIO()
  with Progress(Console(file=file), start_step=0, train_steps=10) as line:
    named = {f"epoch/task_{i}": epoch for i, epoch in enumerate(epochs)}
    line.show(10, VALUES | named)
  assert said in file.getvalue()


def test_on_a_terminal_the_line_lives_and_vanishes():
  file = io.StringIO()
  console = Console(file=file, width=120, force_terminal=True, color_system=None)
  with Progress(console, start_step=0, train_steps=100) as line:
    line.show(10, VALUES)
    line.note("a note")
  output = file.getvalue()
  assert "a note" in output
  assert "\x1b[2K" in output  # the live line is erased
