import io
import pathlib

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from embgemma.errors import ConfigError
from embgemma.training import profiling
from embgemma.training.profiling import Profiler


@jax.jit
def gradient(x, w):
  def loss(w):
    with jax.named_scope("layer_3"):
      x_ = jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x)
    return jnp.sum(jnp.sort(x_, axis=0) ** 2)

  return jax.grad(loss)(w)


@pytest.fixture
def console():
  return Console(file=io.StringIO(), width=200)


@pytest.fixture
def profiler(tmp_path, console):
  made = Profiler(tmp_path / "profile", (2, 4), 5, console)
  yield made
  made.close()


def run_steps(profiler, numbers):
  x, w = jnp.ones((128, 256)), jnp.eye(256)
  jax.block_until_ready(gradient(x, w))
  done = [w]
  for number in numbers:
    with profiler.step(number, lambda: jax.block_until_ready(done)):
      profiler.waited(1e-3)
      done.append(gradient(x, done[-1]))


def test_the_longest_operations_and_the_wait(profiler, console, tmp_path):
  run_steps(profiler, range(1, 6))
  printed = console.file.getvalue()
  assert "mean of 3" in printed
  assert "waiting for input" in printed
  (trace,) = tmp_path.rglob("*.trace.json.gz")
  assert str(trace) in printed

  (planes,) = tmp_path.rglob("*.xplane.pb")
  operations = profiling.read_operations(planes, steps=3)
  assert operations == tuple(sorted(operations, key=lambda x: -x.seconds))
  assert sum(x.share for x in operations) == pytest.approx(1)
  assert all(0 < x.share <= 1 and x.seconds > 0 for x in operations[:3])
  products = [x for x in operations if x.kind == "dot"]
  assert {x.direction for x in products} == {"forward", "backward"}
  assert "layer_*/dot_general" in {x.source for x in products}
  for x in products:
    assert f"{x.share:.1%}" in printed
    assert x.source in printed


def test_operations_do_not_count_those_nested_in_them(profiler, tmp_path):
  run_steps(profiler, range(2, 5))
  (planes,) = tmp_path.rglob("*.xplane.pb")
  operations = profiling.read_operations(planes, steps=3)
  loops = sum(x.share for x in operations if x.kind == "while")
  products = sum(x.share for x in operations if x.kind == "dot")
  assert loops < products


def test_shares_of_wall_time():
  operation = profiling.Operation("a", "forward", "dot", "dot.1", 0.25, 1.0)
  console = Console(file=io.StringIO(), width=200)
  profiling.Profile((operation,), 2, 0.5, 0.1, pathlib.Path("here")).print(console)
  printed = console.file.getvalue()
  assert "500.0 ms, of which 20.0% waiting" in printed
  assert "add up to 250.0 ms" in printed


def test_a_run_that_resumes_amid_the_steps_profiles_those_left(profiler, console):
  run_steps(profiler, range(4, 6))
  assert "mean of 1" in console.file.getvalue()


def test_a_run_that_resumes_after_the_steps_profiles_none(profiler, tmp_path):
  run_steps(profiler, [5])
  assert not list(tmp_path.iterdir())


def test_a_run_that_fails_ends_its_trace(profiler, console):
  with pytest.raises(KeyError), profiler.step(2, lambda: None):
    raise KeyError("a step")
  run_steps(profiler, [2, 3, 4])  # starts another, which only one at a time can be
  assert "mean of 3" in console.file.getvalue()


@pytest.mark.parametrize("steps", [(0, 2), (3, 2), (4, 6), (1,), (1, 2, 3)])
def test_steps_that_are_not_of_the_run(tmp_path, console, steps):
  with pytest.raises(ConfigError, match=r"PROFILE_STEPS.*1 to 5.*\(10, 12\)"):
    Profiler(tmp_path, steps, 5, console)
