"""The page of a report, from what commands left behind."""

import dataclasses
import re
import shlex
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from embgemma.evaluation import benchmark_scores
from embgemma.evaluation.benchmark_scores import Scores
from embgemma.evaluation.report import MISSING
from embgemma.evaluation.suite import main_scores, mean_score
from embgemma.reporting import charts, held_out
from embgemma.reporting.document import Detail, Page, Section, Table
from embgemma.reporting.records import RECIPE_KEY, Curve, Records, Run, Search
from embgemma.reporting.spaces import Space
from embgemma.training.progress import duration


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
  results = held_out.final_results(records)
  sections = [
    *_benchmark_sections(benchmark, scores, kinds),
    *_recipe_section(records),
    *held_out.seeds_sections(results),
    *held_out.results_sections(results),
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
    if name != "BM25" and held_out.of_embedder(of) and main_scores(of)
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
    [
      [
        name,
        *(MISSING if of[key] is None else f"{of[key]:.3f}" for key in names),
      ]
      for name, of in numbers.items()
    ],
    numbers=frozenset(range(1, len(names) + 1)),
  )
  text = (
    "Alignment: mean squared distance of a query and its document. Uniformity: log of "
    "the mean of exp(-2 d²) over pairs of documents; lower is more even. Anisotropy: "
    "their mean cosine. "
    "Effective rank: directions in use. Hubness: skewness of how often a document is "
    "among the ten nearest of the others, some .3 without hubs. Length bias: "
    "correlation of length and how often queries find a document. Language bias: how "
    "much more of the ten nearest than of all documents is in the query's language."
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
  scale = (
    100 if held_out.of_embedder(run.final) else -1
  )  # losses have their sign turned
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
  return [RECIPE_KEY.sub("", listed["path"]), str(listed["step"]), str(weight)]
