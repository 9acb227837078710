"""`embgemma recipe` and `embgemma report`: stages are real commands."""

import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from embgemma.interop import conversion

pytestmark = pytest.mark.slow

_RECIPE = """
RECIPE_DIR = %gin.REQUIRED
Recipe.directory = %RECIPE_DIR
Recipe.stages = {{
  'base': @base/Stage(),
  'tuned': @tuned/Stage(),
  'soup': @soup/Stage(),
  'evaluation': @evaluation/Stage(),
}}
RATE = 1e-3
Stage.gin_files = ('{stage}',)
base/Stage.macros = {{'TRAIN_STEPS': 10, 'CHECKPOINT_STEPS': 5}}
tuned/Stage.macros = (
  {{'TRAIN_STEPS': 10, 'INITIAL_CHECKPOINT_PATH': '{{base}}'}},
  {{'LEARNING_RATE': %RATE}},
)
soup/Stage:
  command = 'soup'
  gin_files = ()
  inputs = ('{{base}}', '{{tuned}}')
evaluation/Stage:
  command = 'eval'
  flags = {{'checkpoint': '{{soup}}', 'bm25': True}}
"""


@pytest.fixture(scope="module")
def files(workspace):
  """A stage's and the recipe's gin file."""
  stage, recipe = workspace.root / "recipe_stage.gin", workspace.root / "recipe.gin"
  flags = workspace.flags(
    f"--gin.EVALUATIONS={{'own': '{workspace.root}/plain.jsonl'}}"
  )
  lines = []
  for flag in flags:
    name, _, value = flag.partition("=")
    if name == "--gin_file":
      lines.append(f"include {value!r}")
    else:
      lines.append(f"{name.removeprefix('--gin.')} = {value}")
  stage.write_text("\n".join(lines) + "\n")
  recipe.write_text(_RECIPE.format(stage=stage))
  return stage, recipe


def flags(files, directory, *more):
  return (f"--gin_file={files[1]}", f"--gin.RECIPE_DIR={directory}", *more)


@pytest.fixture(scope="module")
def done(workspace, files):
  directory = workspace.root / "recipe"
  finished = workspace.run("recipe", *flags(files, directory, "--jobs=2"))
  assert finished.returncode == 0, finished.stdout + finished.stderr
  return directory, finished


def params(directory):
  model = conversion.open_embedder(str(directory), lambda config: None)
  return model.params


def assert_equal(one, other):
  import jax

  jax.tree.map(np.testing.assert_array_equal, params(one), params(other))


def test_every_stage_left_what_its_name_points_to(done):
  directory, finished = done
  said = json.loads((directory / "recipe.json").read_text())["stages"]
  assert {name: of["state"] for name, of in said.items()} == dict.fromkeys(
    ("base", "tuned", "soup", "evaluation"), "complete"
  )
  for name, of in said.items():
    assert os.readlink(directory / name) == of["directory"]
    assert f"{name}: complete in 0:" in finished.stdout
  results = json.loads((directory / "evaluation" / "results.json").read_text())
  assert "BM25" in results


def test_a_complete_recipe_does_nothing_again(workspace, files, done):
  directory, _ = done
  again = workspace.run("recipe", *flags(files, directory))
  assert again.returncode == 0, again.stderr
  assert again.stdout == ""


def test_a_change_runs_what_reads_it(workspace, files, done):
  directory, _ = done
  before = {name: os.readlink(directory / name) for name in ("base", "tuned", "soup")}
  again = workspace.run("recipe", *flags(files, directory, "--gin.RATE=2e-3"))
  assert again.returncode == 0, again.stderr
  ran = re.findall(r"^(\w+): running", again.stdout, re.MULTILINE)
  assert ran == ["tuned", "soup", "evaluation"]
  after = {name: os.readlink(directory / name) for name in before}
  assert {name for name in before if before[name] != after[name]} == {"tuned", "soup"}
  # And back: what was made before is still there.
  back = workspace.run("recipe", *flags(files, directory))
  assert back.stdout == ""
  assert os.readlink(directory / "soup") == before["soup"]


def test_a_deleted_directory_is_made_again_whole(workspace, files, done, tmp_path):
  directory = tmp_path / "copy"
  shutil.copytree(done[0], directory, symlinks=True)
  soup = directory / os.readlink(directory / "soup")
  shutil.rmtree(soup)
  bad = "--gin.soup/Stage.inputs=('{base}', '{tuned}', 'nothing')"
  assert workspace.run("recipe", *flags(files, directory, bad)).returncode == 1
  again = workspace.run("recipe", *flags(files, directory))
  assert re.findall(r"^(\w+): running", again.stdout, re.MULTILINE) == ["soup"]
  assert_equal(directory / "soup", done[0] / "soup")


def test_two_at_once_share_the_stages(workspace, files, done, tmp_path):
  directory = tmp_path / "shared"
  command = [sys.executable, "-m", "embgemma", "recipe"]
  both = [
    subprocess.Popen(
      [*command, *flags(files, directory)],
      env=workspace.environment,
      cwd=workspace.root,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for _ in range(2)
  ]
  said = [process.communicate() for process in both]
  assert [process.returncode for process in both] == [0, 0], said
  ran = [re.findall(r"^(\w+): running", out, re.MULTILINE) for out, _ in said]
  assert sorted(ran[0] + ran[1]) == ["base", "evaluation", "soup", "tuned"]
  assert_equal(directory / "soup", done[0] / "soup")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_recipe_goes_on(workspace, files, done, tmp_path, signum):
  directory = tmp_path / "killed"
  command = [sys.executable, "-m", "embgemma", "recipe"]
  for wanted in ("base-*/checkpoints/5", "tuned-*/model.json"):
    started = subprocess.Popen(
      [*command, *flags(files, directory)],
      env=workspace.environment,
      cwd=workspace.root,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    deadline = time.monotonic() + 120
    while not list(directory.glob(wanted)) and time.monotonic() < deadline:
      assert started.poll() is None, started.stderr.read()
      time.sleep(0.05)
    started.send_signal(signum)
    started.communicate()
    assert started.returncode != 0
  finished = workspace.run("recipe", *flags(files, directory))
  assert finished.returncode == 0, finished.stdout + finished.stderr
  assert "base: running" not in finished.stdout
  assert_equal(directory / "soup", done[0] / "soup")


def test_a_failed_stage_keeps_back_what_needs_it(workspace, files, tmp_path):
  bad = "--gin.tuned/Stage.macros={'LEARNING_RATE': -1.0}"
  failed = workspace.run("recipe", *flags(files, tmp_path / "r", bad))
  assert failed.returncode == 1
  assert re.search(r"tuned: failed in 0:\d\d: embgemma: error: .*peak", failed.stdout)
  assert "embgemma: error: tuned failed: see" in failed.stderr
  said = json.loads((tmp_path / "r" / "recipe.json").read_text())["stages"]
  states = {name: of["state"] for name, of in said.items()}
  assert states == {
    "base": "complete",
    "tuned": "failed",
    "soup": "waiting",
    "evaluation": "waiting",
  }


def test_a_dry_run_is_a_script(workspace, files, done, tmp_path):
  shown = workspace.run("recipe", *flags(files, tmp_path / "new", "--dry_run"))
  assert shown.returncode == 0, shown.stderr
  assert not (tmp_path / "new").exists()
  commands = [
    line for line in shown.stdout.splitlines() if line.startswith("embgemma ")
  ]
  assert [line.split()[1] for line in commands] == ["train", "train", "soup", "eval"]
  assert "# tuned: after base; TRAIN_STEPS 10" in shown.stdout
  subprocess.run(["sh", "-n"], input=shown.stdout, text=True, check=True)
  complete = workspace.run("recipe", *flags(files, done[0], "--dry_run"))
  assert "\nembgemma " not in complete.stdout


def test_some_stages(workspace, files, tmp_path):
  shown = workspace.run(
    "recipe", *flags(files, tmp_path / "r", "--dry_run", "--stages=tuned")
  )
  assert re.findall(r"^# (\w+):", shown.stdout, re.MULTILINE) == ["base", "tuned"]


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--gin.tuned/Stage.macros={'TRAIN_STEPS': '{bse}'}", "did you mean {base}?"),
    (
      "--gin.tuned/Stage.macros={'TRAIN_STEP': 3}",
      "stage 'tuned': --gin.TRAIN_STEP: no",
    ),
    ("--gin.tuned/Stage.command=tran", "Stage.command 'tran' is none of a recipe's"),
    ("--gin.soup/Stage.flags={'lest': 3}", "stage 'soup': `embgemma soup`: unrecog"),
    ("--stages=three", "no stage three; there are base, tuned"),
    ("--jobs=0", "--jobs=0: write 1 or more"),
  ],
)
def test_messages(workspace, files, tmp_path, flag, message):
  refused = workspace.run("recipe", *flags(files, tmp_path / "r", flag))
  assert refused.returncode == 1
  assert message in refused.stderr
  assert refused.stderr.count("\n") == 1
  assert not (tmp_path / "r").exists()


class _Page(html.parser.HTMLParser):
  """Checks that what opens closes; collects what a browser would fetch."""

  void = frozenset({"meta", "path", "use", "br", "line", "rect"})

  def __init__(self):
    super().__init__()
    self.open, self.fetched, self.headings, self._in = [], [], [], ""

  def handle_starttag(self, tag, attrs):
    for name, value in attrs:
      if name in ("src", "href", "xlink:href") and not value.startswith("#"):
        self.fetched.append(value)
    self._in = tag
    if tag not in self.void:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    pass

  def handle_endtag(self, tag):
    if tag not in self.void:
      assert self.open.pop() == tag
    self._in = ""

  def handle_data(self, data):
    if self._in == "h2":
      self.headings.append(data)


def test_a_report_of_a_recipe(workspace, done):
  directory, _ = done
  page, tables = workspace.root / "report.html", workspace.root / "report.md"
  plain = workspace.root / "plain.jsonl"
  made = workspace.run(
    "report",
    str(directory),
    f"--output={page}",
    f"--markdown={tables}",
    f"--map=own={plain}",
    f"--checkpoint={directory / 'soup'}",
  )
  assert made.returncode == 0, made.stderr
  read = _Page()
  read.feed(page.read_text())
  assert read.open == []
  assert read.fetched == []
  for heading in ("Stages", "Held-out evaluation", "Map", "Run: base", "Soups"):
    assert heading in read.headings
  for chart in (
    "Gradient norm of each term, by vectors (tuned)",
    "Share of real tokens",
  ):
    assert f'aria-label="{chart}' in page.read_text()
  text = tables.read_text()
  results = json.loads((directory / "evaluation" / "results.json").read_text())
  soup = next(of for name, of in results.items() if name != "BM25")
  row = next(line for line in text.splitlines() if "| own | ndcg@10 | 32 |" in line)
  assert f"{100 * soup['own']['ndcg@10/32']:.2f}" in row
  assert "| base | complete |" in text


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("nothing", "--output=r.html"), "nothing: neither a recipe, a run, a search nor"),
    (("nothing", "--output=r.txt"), "give the path of an .html file"),
    (("x", "--output=r.html", "--map=a=b"), "--checkpoint=DIR go together"),
  ],
)
def test_a_report_refuses(workspace, flags, message):
  refused = workspace.run("report", *flags)
  assert refused.returncode == 1
  assert message in refused.stderr
