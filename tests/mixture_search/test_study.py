"""Workers share a study: no trial is lost, and none is done twice."""

import collections
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from embgemma.errors import ConfigError
from embgemma.mixture_search.study import MixtureStudy
from embgemma.mixture_search.trials import SearchPlan, TrialError, TrialKilledError

GROUPS = {"qa": 2.0, "code": 1.0, "web": 1.0}


def plan(**changes):
  counts = {"seed_repeats": 2, "dirichlet_trials": 3, "proposed_trials": 2}
  return SearchPlan(GROUPS, ("score",), **{**counts, **changes})


@pytest.fixture
def url(tmp_path):
  return f"sqlite:///{tmp_path / 'study.db'}"


def score_qa(trial, report):
  del report
  return {"score": trial.rates["qa"]}


def silent(line):
  del line


def test_a_search_has_its_trials_in_order(url):
  study = MixtureStudy(url, "s", plan())
  ran = []

  def run(trial, report):
    ran.append(trial)
    return score_qa(trial, report)

  study.work(run, silent)
  roles = ["seed"] * 2 + ["dirichlet"] * 3 + ["proposed"] * 2
  assert [(t.index, t.role) for t in ran] == list(enumerate(roles))
  assert [t.rates for t in ran[:2]] == [{"qa": 0.5, "code": 0.25, "web": 0.25}] * 2
  assert len({t.seed for t in ran[:2]}) == 2
  assert {t.seed for t in ran[2:]} == {0}
  assert all(sum(t.rates.values()) == pytest.approx(1) for t in ran)
  records = study.records()
  assert [r.scores for r in records] == [{"score": t.rates["qa"]} for t in ran]
  assert {r.state for r in records} == {"complete"}


def test_a_failed_trial_is_recorded_and_the_search_goes_on(url):
  study = MixtureStudy(url, "s", plan())

  def run(trial, report):
    if trial.index == 1:
      raise TrialError("out of memory")
    if trial.index == 3:
      return {"score": float("nan")}
    return score_qa(trial, report)

  study.work(run, silent)
  failed = {r.index: r.error for r in study.records() if r.state == "failed"}
  assert failed == {1: "out of memory", 3: "no finite score of score"}
  assert len(study.records()) == 7


def test_a_killed_trial_stays_open(url):
  """What was killed from outside says nothing of its mixture: it is done again."""
  study = MixtureStudy(url, "s", plan())

  def killed(trial, report):
    if trial.index == 2:
      raise TrialKilledError("killed (-9)")
    return score_qa(trial, report)

  with pytest.raises(SystemExit, match=r"killed \(-9\)"):
    study.work(killed, silent)
  assert [r.state for r in study.records() if r.is_done] == ["complete"] * 2
  again = MixtureStudy(url, "s", plan())
  again.work(score_qa, silent)
  assert {r.state for r in again.records() if r.is_done} == {"complete"}
  assert sum(r.state == "complete" for r in again.records()) == 7


def test_hopeless_trials_end_early(url):
  """Those far below the others at the same step, seeds never."""
  study = MixtureStudy(url, "s", plan(dirichlet_trials=8, proposed_trials=0))
  ended = []

  def run(trial, report):
    final = -1.0 if trial.index in (0, 8) else 1.0 + trial.index / 100
    for step in (10, 20):
      report(step, {"score": final * step})
    ended.append(trial.index)
    return {"score": final}

  study.work(run, silent)
  assert {r.index: r.state for r in study.records()}[8] == "stopped"
  assert ended == [0, 1, 2, 3, 4, 5, 6, 7, 9]
  assert study.records()[0].steps == {10: {"score": -10}, 20: {"score": -20}}


def test_more_trials_of_a_finished_search(url):
  MixtureStudy(url, "s", plan()).work(score_qa, silent)
  study = MixtureStudy(url, "s", plan(proposed_trials=4))
  study.work(score_qa, silent)
  assert [r.index for r in study.records()] == list(range(9))


def test_another_search_in_the_same_study_is_refused(url):
  MixtureStudy(url, "s", plan(), "TRAIN_STEPS = 100")
  with pytest.raises(ConfigError, match="TRAIN_STEPS = 100; TRAIN_STEPS = 200"):
    MixtureStudy(url, "s", plan(), "TRAIN_STEPS = 200")
  with pytest.raises(ConfigError, match="random_seed = 0; random_seed = 1"):
    MixtureStudy(url, "s", plan(random_seed=1), "TRAIN_STEPS = 100")


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/directory/s.db"])
def test_storage_that_cannot_be_opened(url):
  with pytest.raises(ConfigError, match=r"the study's storage"):
    MixtureStudy(url, "s", plan())


@pytest.mark.parametrize(
  "changes",
  [{"groups": {"qa": 1.0}}, {"groups": {"qa": 1.0, "code": 0.0}}, {"seed_repeats": 0}],
)
def test_plans_that_are_none(changes):
  with pytest.raises(ConfigError):
    SearchPlan(**{"groups": GROUPS, "objectives": ("score",), **changes})


WORKER = textwrap.dedent("""
  import sys, time
  from embgemma.mixture_search.study import MixtureStudy
  from embgemma.mixture_search.trials import SearchPlan
  plan = SearchPlan({"qa": 2.0, "code": 1.0, "web": 1.0}, ("score",), seed_repeats=2,
                    dirichlet_trials=6, proposed_trials=0)

  def run(trial, report):
    with open(sys.argv[2], "a") as file:
      file.write(f"{sys.argv[3]} {trial.index} begin\\n")
    time.sleep(60 if sys.argv[3] == "slow" else 0.3)
    with open(sys.argv[2], "a") as file:
      file.write(f"{sys.argv[3]} {trial.index} end\\n")
    return {"score": trial.rates["qa"]}

  MixtureStudy(sys.argv[1], "s", plan).work(run, lambda line: None)
""")


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_worker_loses_no_trial(tmp_path, url, signum):
  """Two workers, one killed within a trial: all trials end, each once."""
  log = tmp_path / "log"

  def start(name):
    command = [sys.executable, "-c", WORKER, url, str(log), name]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

  slow = start("slow")
  deadline = time.monotonic() + 120
  while not log.exists():
    assert slow.poll() is None, slow.communicate()[1]
    assert time.monotonic() < deadline
    time.sleep(0.1)
  quick = start("quick")
  while "quick" not in log.read_text():
    assert quick.poll() is None, quick.communicate()[1]
    time.sleep(0.1)
  os.kill(slow.pid, signum)
  slow.wait()
  slow.stderr.close()
  _, said = quick.communicate(timeout=120)
  assert quick.returncode == 0, said
  ends = collections.Counter(
    int(line.split()[1]) for line in log.read_text().splitlines() if "end" in line
  )
  assert ends == dict.fromkeys(range(8), 1)
  records = MixtureStudy(url, "s", SearchPlan(GROUPS, ("score",), 2, 6, 0)).records()
  assert [r.index for r in records] == list(range(8))
  assert {r.state for r in records} == {"complete"}


DYING = textwrap.dedent("""
  import os, pathlib, sys
  from embgemma.mixture_search.study import MixtureStudy
  from embgemma.mixture_search.trials import SearchPlan
  plan = SearchPlan({"qa": 2.0, "code": 1.0, "web": 1.0}, ("a", "b"), seed_repeats=2,
                    dirichlet_trials=2, proposed_trials=3)
  died = pathlib.Path(sys.argv[2])

  def run(trial, report):
    mark = died / str(trial.index)
    if str(trial.index) in sys.argv[3:] and not mark.exists():
      mark.touch()
      os.kill(os.getpid(), 9)
    qa, code = trial.rates["qa"], trial.rates["code"]
    return {"a": qa - qa**2 + trial.seed / 100, "b": code - code**3}

  MixtureStudy(sys.argv[1], "s", plan).work(run, lambda line: None)
""")


@pytest.mark.slow
def test_mixtures_are_those_of_a_search_that_nobody_killed(tmp_path):
  """Trials that are done again change neither the order nor the draws of the others."""
  found = []
  for name, dying in (("whole", ()), ("killed", ("0", "5"))):
    directory = tmp_path / name
    directory.mkdir()
    url = f"sqlite:///{directory / 'study.db'}"
    command = [sys.executable, "-c", DYING, url, str(directory), *dying]
    codes = [subprocess.run(command, check=False).returncode for _ in range(3)]
    assert codes == ([-9, -9, 0] if dying else [0, 0, 0])
    plan = SearchPlan(GROUPS, ("a", "b"), 2, 2, 3)
    records = MixtureStudy(url, "s", plan).records()
    found.append([(r.index, r.state, r.rates, r.scores) for r in records])
  assert len(found[0]) == 7
  assert found[0] == found[1]
