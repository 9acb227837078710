"""Experts are the best without noise, and unlike each other."""

import ast
import json

import numpy as np
import pytest

from embgemma.mixture_search import results
from embgemma.mixture_search.trials import SearchPlan, TrialRecord

PLAN = SearchPlan({"qa": 1.0, "code": 1.0}, ("retrieval", "sts"))
SHARES = {"qa": {"nq": 0.25, "squad": 0.75}, "code": {"python": 1.0}}


def record(index, qa, scores, role="dirichlet", state="complete"):
  rates = {"qa": qa, "code": 1 - qa}
  return TrialRecord(index, role, state, rates, scores, {}, 1.0, "host:1", "")


@pytest.fixture
def trials():
  """Retrieval wants qa, sts code; their mean is best in the middle."""
  made = []
  for index, qa in enumerate(np.linspace(0, 1, 11)):
    scores = {"retrieval": 0.5 + 0.2 * qa**0.5, "sts": 0.5 + 0.2 * (1 - qa) ** 0.5}
    made.append(record(index, float(qa), {k: float(v) for k, v in scores.items()}))
  return made


def test_the_best_of_all_then_of_each_objective(trials):
  experts = results.conclude(PLAN, trials, 3).experts
  assert [e.chosen_for for e in experts] == ["mean", "retrieval", "sts"]
  assert experts[0].rates["qa"] == pytest.approx(0.5, abs=0.11)
  assert experts[1].rates["qa"] == 1.0
  assert experts[2].rates["qa"] == 0.0
  assert experts[1].scores == trials[10].scores


def test_no_two_experts_are_alike(trials):
  twins = [*trials, record(11, 1 - 1e-6, trials[10].scores)]
  chosen = results.conclude(PLAN, twins, 3).experts
  rates = [e.rates["qa"] for e in chosen]
  assert (1.0 in rates) + (1 - 1e-6 in rates) == 1


def test_there_are_as_many_experts_as_wanted_where_trials_are(trials):
  twins = [*trials, record(11, 1 - 1e-6, trials[10].scores)]
  assert len(results.conclude(PLAN, twins, 12).experts) == 12
  assert len(results.conclude(PLAN, twins, 20).experts) == 12


def test_one_lucky_trial_is_no_expert(trials):
  """Noise far above its neighbours is seen through."""
  generator = np.random.default_rng(0)
  many = []
  for index, qa in enumerate(np.linspace(0, 1, 60)):
    score = 0.6 - 0.2 * (qa - 0.3) ** 2 + generator.normal(0, 0.01)
    many.append(record(index, float(qa), {"retrieval": score, "sts": score}))
  lucky = record(60, 0.95, {"retrieval": 0.612, "sts": 0.612})
  best = results.conclude(PLAN, [*many, lucky], 1).experts[0]
  assert best.rates["qa"] == pytest.approx(0.3, abs=0.2)


def test_noise_is_that_of_the_seeds(trials):
  seeds = [
    record(i, 0.5, {"retrieval": s, "sts": 2 * s}, "seed")
    for i, s in enumerate((0.1, 0.2, 0.3))
  ]
  noise = results.conclude(PLAN, [*seeds, *trials], 1).noise
  assert noise == pytest.approx({"retrieval": 0.1, "sts": 0.2})


def test_failed_and_stopped_trials_are_shown_not_chosen(trials):
  shown = [*trials, record(11, 0.5, {}, state="failed")]
  result = results.conclude(PLAN, shown, 3)
  assert 11 not in {e.trial for e in result.experts}
  assert "| 12 | dirichlet | failed | failed |" in results.markdown(result)


def test_files(trials, tmp_path):
  result = results.conclude(PLAN, trials, 2)
  results.write(result, tmp_path, SHARES)
  lines = (tmp_path / "expert_2.gin").read_text()
  rates = ast.literal_eval(lines.partition("=")[2].strip())
  assert rates == {"nq": 0.25, "squad": 0.75, "python": 0.0}
  kept = json.loads((tmp_path / "search.json").read_text())
  assert [e["trial"] for e in kept["experts"]] == [e.trial for e in result.experts]
  assert (tmp_path / "search.md").read_text().startswith("# Mixture search")
