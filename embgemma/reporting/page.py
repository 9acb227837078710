"""The page of a report: sections of tables and charts, as HTML and as Markdown.

HTML needs nothing beside itself: styles and charts are inside.
"""

import dataclasses
import importlib.resources
import itertools
import math
import re
import shlex
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from embgemma.evaluation import benchmark_scores, report
from embgemma.evaluation.benchmark_scores import Scores
from embgemma.evaluation.suite import (
  LOSS,
  MAIN_METRICS,
  TaskResults,
  main_scores,
  mean_score,
)
from embgemma.models.config import VECTOR_FORMATS
from embgemma.reporting import charts
from embgemma.reporting.records import Curve, Records, Run, Search
from embgemma.reporting.spaces import Space
from embgemma.training.progress import duration

_KEY = re.compile(r"-[0-9a-f]{8}$")  # of a recipe's directories
_SEED = re.compile(r"_seed\d+$")  # of a recipe's stages
_OF_CODES = (f"{metric} ({name})" for name in VECTOR_FORMATS for metric in MAIN_METRICS)
_SHOWN = (*MAIN_METRICS, *_OF_CODES, LOSS, "perplexity")


@dataclasses.dataclass(frozen=True)
class Table:
  """Cells of text.

  Attributes:
    heads: Of columns.
    rows: Of as many cells.
    title: Above it, if any.
    numbers: Columns that are aligned as numbers.
    best: Cells (row, column) that are the best of their row.
    groups: Rows that begin a group.
  """

  heads: Sequence[str]
  rows: Sequence[Sequence[str]]
  title: str = ""
  numbers: frozenset[int] = frozenset()
  best: frozenset[tuple[int, int]] = frozenset()
  groups: frozenset[int] = frozenset()

  def markdown(self) -> list[str]:
    """Lines; the best of a row in bold."""
    rule = ["---:" if i in self.numbers else "---" for i in range(len(self.heads))]
    lines = [f"### {self.title}", ""] if self.title else []
    heads = [head.replace("|", "\\|") for head in self.heads]
    rows = [
      [
        f"**{cell}**" if (i, j) in self.best else cell.replace("|", "\\|")
        for j, cell in enumerate(row)
      ]
      for i, row in enumerate(self.rows)
    ]
    return [
      *lines,
      *(f"| {' | '.join(row)} |" for row in (heads, rule, *rows)),
      "",
    ]


@dataclasses.dataclass(frozen=True)
class Detail:
  """Text that is shown on demand."""

  title: str
  text: str


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the page.

  Attributes:
    title: Its heading.
    texts: Paragraphs.
    tables: Its tables.
    charts: SVG.
    details: Texts to unfold; HTML only.
    wide: Whether charts take the page's width.
  """

  title: str
  texts: Sequence[str] = ()
  tables: Sequence[Table] = ()
  charts: Sequence[str] = ()
  details: Sequence[Detail] = ()
  wide: bool = False

  @property
  def anchor(self) -> str:
    """Of links to it."""
    return re.sub(r"\W+", "-", self.title.lower())


@dataclasses.dataclass(frozen=True)
class Page:
  """A report.

  Attributes:
    title: Its heading.
    subtitle: Below that.
    cards: What matters most: label to value.
    sections: In order.
  """

  title: str
  subtitle: str
  cards: Mapping[str, str]
  sections: Sequence[Section]

  def html(self) -> str:
    """One file, for a browser without a network."""
    source = importlib.resources.files(__package__) / "page.html"
    environment = jinja2.Environment(
      autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    cards = [{"label": label, "value": value} for label, value in self.cards.items()]
    return environment.from_string(source.read_text("utf-8")).render(
      title=self.title, subtitle=self.subtitle, cards=cards, sections=self.sections
    )

  def markdown(self) -> str:
    """Tables and texts; charts are HTML's."""
    lines = [f"# {self.title}", "", self.subtitle, ""]
    lines += [f"- {label}: {value}" for label, value in self.cards.items()]
    for section in self.sections:
      body = [line for text in section.texts for line in (text, "")]
      body += [line for table in section.tables for line in table.markdown()]
      if body:
        lines += ["", f"## {section.title}", "", *body]
    return "\n".join(lines).rstrip() + "\n"


def page(
  records: Records,
  title: str,
  places: Mapping[str, np.ndarray],
  spaces: Mapping[str, Space] = types.MappingProxyType({}),
  benchmark: str = "",
  scores: Mapping[str, Scores] = types.MappingProxyType({}),
  kinds: Mapping[str, str] = types.MappingProxyType({}),
) -> Page:
  """The report of what was read.

  Args:
    records: As of `records.read`.
    title: Of the page.
    places: Of a map of texts, [N, 2] by set; {} is none.
    spaces: Of sets of texts, for numbers and neighbours.
    benchmark: Name of a benchmark, if any.
    scores: In it, by model and task.
    kinds: Of its tasks.
  """
  results = final_results(records)
  sections = [
    *_benchmark_sections(benchmark, scores, kinds),
    *_recipe_section(records),
    *_seeds_section(results),
    *_results_sections(results),
    *(_search_section(search) for search in records.searches),
    *_map_section(places),
    *_spaces_section(spaces),
    *(_run_section(run) for run in records.runs if run.curves),
    *_ingredients_section(records),
  ]
  seconds = [s.seconds for s in records.stages if s.seconds is not None]
  cards = {}
  if records.stages:
    complete = sum(stage.state == "complete" for stage in records.stages)
    cards["stages complete"] = f"{complete} of {len(records.stages)}"
    cards["in all stages"] = duration(float(sum(seconds)))
  scored = {
    name: mean_score(of)
    for name, of in results.items()
    if name != "BM25" and _of_embedder(of) and main_scores(of)
  }
  if scored:
    # Means of other tasks are no rivals.
    sets = [frozenset(results[name]) for name in scored]
    usual = max(sets, key=sets.count)
    best = max(scored, key=lambda name: (set(results[name]) == usual, scored[name]))
    cards[f"best mean score: {best}"] = f"{100 * scored[best]:.2f}"
  systems = dict.fromkeys(_hardware(run.system) for run in records.runs if run.system)
  if systems:
    cards["hardware"] = "; ".join(systems)
  versions = [run.system["versions"] for run in records.runs if run.system]
  subtitle = ", ".join(f"{k} {v}" for k, v in versions[-1].items()) if versions else ""
  return Page(title, subtitle, cards, sections)


def _benchmark_sections(
  benchmark: str, scores: Mapping[str, Scores], kinds: Mapping[str, str]
) -> list[Section]:
  if not scores:
    return []
  found = benchmark_scores.standings(scores, kinds)
  sections = []
  for title, (heads, rows), first, text in (
    (
      benchmark,
      benchmark_scores.standings_table(found, kinds),
      1,
      "Means over tasks, over types of tasks, and of each type, in percent; rank by "
      "Borda count among these models. Without one of its tasks a mean is not there.",
    ),
    (f"{benchmark}: tasks", benchmark_scores.tasks_table(scores, kinds), 2, ""),
  ):
    numbers = frozenset(range(first, len(heads)))
    table = Table(heads, rows, numbers=numbers)
    sections.append(Section(title, [text] if text else [], [table], wide=True))
  return sections


def _of_embedder(results: TaskResults) -> bool:
  """Whether results are an embedder's."""
  return bool(results) and not any(LOSS in metrics for metrics in results.values())


def final_results(records: Records) -> dict[str, TaskResults]:
  """Of each model that is done and was evaluated, its last results by its name."""
  found = {run.name: run.final for run in records.runs if run.complete and run.final}
  for evaluation in records.evaluations:
    for column, of in evaluation.results.items():
      found[_KEY.sub("", column)] = of
  return found


def _recipe_section(records: Records) -> list[Section]:
  if not records.stages:
    return []
  rows = [
    [
      stage.name,
      stage.state,
      "" if stage.seconds is None else duration(stage.seconds),
      stage.command[0],
      ", ".join(stage.needs),
    ]
    for stage in records.stages
  ]
  heads = ["stage", "state", "time", "command", "reads"]
  commands = "\n\n".join(
    f"# {stage.name}\nembgemma " + " \\\n  ".join(map(shlex.quote, stage.command))
    for stage in records.stages
  )
  table = Table(heads, rows, numbers=frozenset({2}))
  details = [Detail("commands", commands)]
  return [Section("Stages", tables=[table], details=details)]


def _results_sections(results: Mapping[str, TaskResults]) -> list[Section]:
  """One of embedders, one of pretrained stacks."""
  sections = []
  for title, wanted in (("Held-out evaluation", True), ("Held-out loss", False)):
    chosen = {
      name: of for name, of in results.items() if of and _of_embedder(of) is wanted
    }
    if chosen:
      said = "In percent, by Matryoshka width" if wanted else "Nats a token"
      text = f"{said}; the best of a row is bold."
      sections.append(Section(title, [text], [_results_table(chosen, wanted)]))
  return sections


def _results_table(results: Mapping[str, TaskResults], higher: bool) -> Table:
  heads, rows = report.results_cells(results, _SHOWN)
  labels = len(heads) - len(results)
  if higher:
    rows = [row for row in rows if row[0] != "mean"] + _mean_rows(results)
  best: set[tuple[int, int]] = set()
  for i, row in enumerate(rows):
    values = {j: _number(row[j]) for j in range(labels, len(row))}
    known = {j: value for j, value in values.items() if not math.isnan(value)}
    if len(known) > 1:
      top = max(known.values()) if higher else min(known.values())
      best |= {(i, j) for j, value in known.items() if value == top}
  begins = [i for i in range(1, len(rows)) if rows[i][:2] != rows[i - 1][:2]]
  numbers = frozenset(range(labels - 1, len(heads)))
  return Table(heads, rows, "", numbers, frozenset(best), frozenset(begins))


def _seeds_section(results: Mapping[str, TaskResults]) -> list[Section]:
  """Means of models that differ in their seed alone."""
  arms: dict[str, list[TaskResults]] = {}
  for name, of in results.items():
    if _SEED.search(name) and _of_embedder(of) and main_scores(of):
      arms.setdefault(_SEED.sub("", name), []).append(of)
  arms = {name: seeds for name, seeds in arms.items() if len(seeds) > 1}
  if not arms:
    return []
  means = {name: _mean_results(seeds) for name, seeds in arms.items()}
  rows = []
  for name, seeds in arms.items():
    scores = [100 * mean_score(of) for of in seeds]
    cells = (np.mean(scores), min(scores), max(scores))
    rows.append([name, str(len(seeds)), *(f"{cell:.2f}" for cell in cells)])
  heads = ["model", "seeds", "mean score", "lowest", "highest"]
  ranges = Table(heads, rows, "At the widest width", frozenset({1, 2, 3, 4}))
  return [
    Section("Means over seeds", tables=[ranges, _results_table(means, higher=True)])
  ]


def _mean_results(seeds: Sequence[TaskResults]) -> TaskResults:
  """Of the tasks and metrics that all have."""
  tasks = [task for task in seeds[0] if all(task in of for of in seeds)]
  return {
    task: {
      key: float(np.mean([of[task][key] for of in seeds]))
      for key in seeds[0][task]
      if all(key in of[task] for of in seeds)
    }
    for task in tasks
  }


def _mean_rows(results: Mapping[str, TaskResults]) -> list[list[str]]:
  """Means over tasks of main metrics, of models that have them all at a width."""
  keys = {key for of in results.values() for metrics in of.values() for key in metrics}
  parts = [key.partition("/") for key in keys]  # those of BM25 have no width
  widths = {int(width) for name, _, width in parts if name in MAIN_METRICS and width}
  tasks = {task for of in results.values() for task in of}
  rows = []
  for width in sorted(widths, reverse=True):
    cells = []
    for of in results.values():
      scores = [
        next((value for key, value in metrics.items() if _at(key, width)), None)
        for metrics in of.values()
      ]
      known = [score for score in scores if score is not None]
      complete = set(of) == tasks and len(known) == len(scores)
      cells.append(f"{100 * np.mean(known):.2f}" if complete else report.MISSING)
    rows.append(["mean", "of main metrics", str(width), *cells])
  return rows


def _at(key: str, width: int) -> bool:
  """Whether a key is of a main metric at a width, or of one without (BM25's)."""
  metric, _, at = key.partition("/")
  return metric in MAIN_METRICS and at in (str(width), "")


def _number(cell: str) -> float:
  try:
    return float(cell)
  except ValueError:
    return math.nan


def _search_section(search: Search) -> Section:
  content = search.content
  objectives, groups = content["objectives"], list(content["groups"])
  trials = [trial for trial in content["trials"] if trial["scores"]]
  trials.sort(key=lambda trial: -np.mean([trial["scores"][o] for o in objectives]))
  experts = {expert["trial"]: expert["name"] for expert in content["experts"]}
  labels = [
    f"{trial['index'] + 1} {experts.get(trial['index'], trial['role'])}"
    for trial in trials
  ]
  rates = [{group: trial["rates"][group] for group in groups} for trial in trials]
  values = {o: [100 * trial["scores"][o] for trial in trials] for o in objectives}
  noise = {o: 100 * s for o, s in content["noise"].items()}
  states = [trial["state"] for trial in content["trials"]]
  counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
  texts = [f"Trials: {counts}; from the best mean score to the worst."]
  if noise:
    spread = ", ".join(f"{o} {s:.2f}" for o, s in noise.items())
    texts.append(
      f"Noise, the standard deviation of seeds of the first mixture: {spread} points."
    )
  rows = [
    [
      expert["name"],
      str(expert["trial"] + 1),
      expert["chosen_for"],
      *(f"{100 * expert['scores'][o]:.2f}" for o in objectives),
      *(f"{expert['rates'][g]:.3f}" for g in groups),
    ]
    for expert in content["experts"]
  ]
  heads = ["expert", "trial", "best of", *objectives, *groups]
  table = Table(heads, rows, "Experts", frozenset({1, *range(3, len(heads))}))
  drawn = []
  if trials:
    drawn = [
      charts.mixtures("Mixtures", rates, labels),
      charts.scores("Scores in percent, with their noise", values, labels, noise),
    ]
  return Section(f"Mixtures: {search.name}", texts, [table], drawn, wide=True)


def _map_section(places: Mapping[str, np.ndarray]) -> list[Section]:
  if not places:
    return []
  count = sum(map(len, places.values()))
  text = f"{count:,} held-out texts by their first two principal components."
  return [Section("Map", [text], charts=[charts.scatter("Texts", places)], wide=True)]


def _spaces_section(spaces: Mapping[str, Space]) -> list[Section]:
  known = {name: space for name, space in spaces.items() if len(space.documents) > 1}
  if not known:
    return []
  numbers = {name: dataclasses.asdict(of.numbers()) for name, of in known.items()}
  names = list(next(iter(numbers.values())))
  table = Table(
    ["set", *(name.replace("_", " ") for name in names)],
    [[name, *(f"{of[key]:.3f}" for key in names)] for name, of in numbers.items()],
    numbers=frozenset(range(1, len(names) + 1)),
  )
  text = (
    "Alignment: mean squared distance of a query and its document. Uniformity: log of "
    "the mean of exp(-2 d²) over pairs of documents; lower is more even. Anisotropy: "
    "their mean cosine. "
    "Effective rank: directions in use. Hubness: skewness of how often a document is "
    "among the ten nearest; length bias: its correlation with length."
  )
  details = [
    Detail(f"nearest documents ({n})", of.neighbours()) for n, of in known.items()
  ]
  return [Section("Spaces", [text], [table], details=details, wide=True)]


def _run_section(run: Run) -> Section:
  curves = run.curves
  tags = [tag for tag in curves if re.fullmatch(r"\w+/\d+", tag)]
  tags.sort(key=lambda tag: (tag.partition("/")[0], -int(tag.partition("/")[2])))
  terms = {tag: curves[tag] for tag in tags}
  norms = _with_prefix(curves, "vector_gradient_norm/")
  parts = _with_prefix(curves, "gradient_norm/")
  wanted: list[tuple[str, Mapping[str, Curve], bool]] = [
    ("Loss", _named(curves, "loss"), False),
    ("Terms of the loss, by width", terms, True),
    ("Gradient norm of each term, by vectors", norms, True),
    ("Gradient norm of parts", {**_named(curves, "gradient_norm"), **parts}, True),
    ("Similarities", _with_prefix(curves, "similarity/"), False),
    ("Held-out results", _evaluation_curves(run), False),
    ("Learning rate", _named(curves, "learning_rate"), False),
    ("Share of real tokens", _named(curves, "real_token_share"), False),
    ("Tokens a second", _named(curves, "tokens_per_second"), False),
  ]
  drawn = [
    charts.lines(f"{title} ({run.name})", of, logarithmic)
    for title, of, logarithmic in wanted
    if of
  ]
  facts = [fact for fact in (_time(run), _hardware(run.system), _lineage(run)) if fact]
  details = [Detail("configuration", run.gin)] if run.gin else []
  return Section(f"Run: {run.name}", ["; ".join(facts)], charts=drawn, details=details)


def _named(curves: Mapping[str, Curve], name: str) -> dict[str, Curve]:
  return {name: curves[name]} if name in curves else {}


def _with_prefix(curves: Mapping[str, Curve], prefix: str) -> dict[str, Curve]:
  return {
    tag.removeprefix(prefix): curve
    for tag, curve in curves.items()
    if tag.startswith(prefix)
  }


def _evaluation_curves(run: Run) -> dict[str, Curve]:
  """Of each task what stands for it, and their mean; {} of less than two steps."""
  if len(run.evaluations) < 2:
    return {}
  steps = sorted(run.evaluations, key=int)
  scores = [main_scores(run.evaluations[step]) for step in steps]
  scale = 100 if _of_embedder(run.final) else -1  # losses have their sign turned
  numbers = np.array([int(step) for step in steps])
  curves = {
    task: Curve(numbers, np.array([scale * of[task] for of in scores]))
    for task in scores[-1]
    if all(task in of for of in scores)
  }
  if not curves:
    return {}
  mean = np.mean([curve.values for curve in curves.values()], axis=0)
  return {"mean": Curve(numbers, mean), **curves}


def _time(run: Run) -> str:
  if run.seconds is None:
    return ""
  last = int(run.curves["loss"].steps[-1]) if "loss" in run.curves else 0
  return f"{last:,} steps in {duration(run.seconds)}, pauses included"


def _hardware(system: Mapping[str, Any]) -> str:
  if not system:
    return ""
  processes = system["processes"]
  several = f", {processes} processes" if processes > 1 else ""
  cores = f" ({system['cores']} cores)" if system["device_kind"] == "cpu" else ""
  return f"{system['devices']} × {system['device_kind']}{cores}{several}"


def _lineage(run: Run) -> str:
  facts = []
  # gin puts a long value on a line of its own; an argument of None goes over a macro.
  start = re.search(
    r"^INITIAL_CHECKPOINT_PATH = (?:\\\s+)?'(.*)'$", run.gin, re.MULTILINE
  )
  random = "train.initial_checkpoint_path = None" in run.gin
  if start and not random:
    facts.append(f"from {start[1]}")
  if run.description.get("lineage"):
    facts.append(f"lineage {run.description['lineage']}")
  return ", ".join(facts)


def _ingredients_section(records: Records) -> list[Section]:
  rows = [
    [run.name, *_ingredient(each)] for run in records.runs for each in run.ingredients
  ]
  if not rows:
    return []
  return [
    Section("Soups", tables=[Table(["soup", "ingredient", "step", "weight"], rows)])
  ]


def _ingredient(listed: Mapping[str, Any]) -> list[str]:
  weight = listed.get("weight", "kept" if listed.get("kept", True) else "left out")
  return [_KEY.sub("", listed["path"]), str(listed["step"]), str(weight)]


def principal_components(vectors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Places in a plane, [N, 2] by set, of vectors [N, E] by set."""
  everything = np.concatenate(list(vectors.values())).astype(np.float64)
  centred = everything - everything.mean(0)
  _, _, directions = np.linalg.svd(centred, full_matrices=False)
  places = centred @ directions[:2].T
  ends = list(itertools.accumulate(len(of) for of in vectors.values()))
  return dict(zip(vectors, np.split(places, ends[:-1]), strict=True))
