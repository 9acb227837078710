"""`embgemma search`: trials are runs, the outcome is gin files of mixtures."""

import json

import pytest

pytestmark = pytest.mark.slow


def search(workspace, directory, *more):
  plain = workspace.root / "plain.jsonl"
  return workspace.run(
    "search",
    *workspace.flags(
      "--gin_file=gin/stages/search.gin",
      f"--gin.EVALUATIONS={{'own': '{plain}'}}",
      f"--gin.SEARCH_DIR={directory}",
      "--gin.PROXY={'TRAIN_STEPS': 4, 'BATCH_SIZE': 8}",
      "--gin.MixtureSearch.seed_repeats=2",
      "--gin.MixtureSearch.dirichlet_trials=0",
      *more,
    ),
  )


@pytest.fixture(scope="module")
def searched(workspace):
  directory = workspace.root / "search"
  done = search(workspace, directory, "--gin.PROPOSED_TRIALS=1")
  assert done.returncode == 0, done.stderr
  return directory, done


def test_trials_are_runs_of_their_mixture(searched):
  directory, _ = searched
  found = json.loads((directory / "search.json").read_text())
  assert [t["role"] for t in found["trials"]] == ["seed", "seed", "proposed"]
  assert [t["rates"] for t in found["trials"][:2]] == [{"plain": 0.5, "hard": 0.5}] * 2
  for index, trial in enumerate(found["trials"]):
    run = directory / "trials" / f"{index:04d}"
    results = json.loads((run / "evaluations.json").read_text())
    assert list(results) == ["4"]  # the start is the same for all
    assert trial["scores"] == {"mean": results["4"]["own"]["ndcg@10/32"]}
    assert "tokenising" not in (run / "train.log").read_text()
    gin = (run / "operative.gin").read_text()
    assert f"RANDOM_SEED = {index if index < 2 else 0}" in gin
    assert str(trial["rates"]["plain"]) in gin
  assert set(found["noise"]) == {"mean"}


def test_an_expert_is_a_mixture_to_train_on(workspace, searched):
  directory, done = searched
  assert "| expert_1 (trial" in done.stdout
  found = json.loads((directory / "search.json").read_text())
  explained = workspace.run(
    "explain",
    *workspace.flags(f"--gin_file={directory / 'expert_1.gin'}"),
    "--gin.MODEL_DIR=unused",
  )
  assert explained.returncode == 0, explained.stderr
  assert "given rates" in explained.stdout
  share = found["experts"][0]["rates"]["plain"]
  assert f"{share:.3f}" in explained.stdout


def test_a_finished_search_does_nothing_again(workspace, searched):
  directory, done = searched
  again = search(workspace, directory, "--gin.PROPOSED_TRIALS=1")
  assert again.returncode == 0, again.stderr
  assert again.stdout == done.stdout
  assert "trial" not in again.stderr


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--gin.EVALUATIONS={}", "a search needs EVALUATIONS"),
    ("--gin.GROUPS={'a': 'plain'}", "tasks in no group: hard"),
    ("--gin.OBJECTIVES={'a': 'none'}", "objective 'a' names none"),
    ("--gin.PROXY={'RANDOM_SEED': 1}", "the search sets RANDOM_SEED itself"),
    ("--gin.SEARCH_STORAGE=nonsense", "the study's storage nonsense"),
    ("--gin.LEARNING_RATE=1.0", "was begun with other settings: LEARNING_RATE"),
  ],
)
def test_refused(workspace, searched, flag, message):
  directory, _ = searched
  done = search(workspace, directory, flag)
  assert done.returncode == 1
  assert message in done.stderr
  assert "Traceback" not in done.stderr
