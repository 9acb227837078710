"""Recipes as configuration: references, order, seeds, command lines, messages."""

import gin
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embgemma import gin_config
from embgemma.errors import ConfigError
from embgemma.recipe.config import Recipe, Stage


def make(**stages):
  return Recipe("runs/r", stages)


def test_references_are_what_a_stage_needs():
  stage = Stage(
    gin_files=("a.gin", ("b.gin", "{search}/expert_1.gin")),
    macros=({"X": "{base}"}, {"Y": {"deep": ["{mined}/a.jsonl", 3]}}),
    flags={"data": ["n={base}/d"]},
    inputs=("{soup}",),
    after=("teach", "base"),
  )
  assert stage.needs == ("search", "base", "mined", "soup", "teach")


def test_what_looks_like_a_reference_and_is_none_stays():
  stage = Stage(macros={"PROMPTS": {"a": "{ text }", "b": "{0}", "c": "{}"}})
  assert stage.needs == ()
  assert stage.with_references(str.upper).all_macros == stage.all_macros


def test_references_become_directories_everywhere():
  stage = Stage(
    gin_files=("{a}/x.gin",), macros={"P": "{a}", "Q": ["{b}/{a}"]}, flags={"f": "{b}"}
  ).with_references(lambda name: f"runs/{name}-1")
  assert stage.arguments == [
    "--gin_file=runs/a-1/x.gin",
    "--gin.P=runs/a-1",
    "--gin.Q=('runs/b-1/runs/a-1',)",
    "--f=runs/b-1",
  ]


def test_later_macros_go_over_earlier_ones_and_lists_repeat_a_flag():
  stage = Stage(
    "eval",
    gin_files=("a.gin",),
    macros=({"A": 1, "B": 2}, {"A": 3}),
    flags=(
      {"checkpoint": "c", "bm25": True, "overwrite": True, "widths": "8"},
      {"data": ("x=1", "y=2"), "overwrite": False, "widths": None},
    ),
  )
  assert stage.arguments == [
    "--gin_file=a.gin",
    "--gin.A=3",
    "--gin.B=2",
    "--checkpoint=c",
    "--bm25",
    "--data=x=1",
    "--data=y=2",
  ]


_LITERALS = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats(allow_nan=False, allow_infinity=False)
  | st.text("abc/_-.' \"0é", max_size=8),
  lambda inner: (
    st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(st.text("ab'", max_size=3), inner, max_size=3)
  ),
  max_leaves=6,
)


@given(_LITERALS)
def test_gin_reads_a_macro_as_it_was(value):
  gin.clear_config()
  gin.parse_config("X = None")
  (binding,) = Stage(macros={"X": value}).bindings
  gin.parse_config(gin_config._quoted(binding))
  found = gin.query_parameter("X/gin.macro.value")
  assert found == value.strip() if isinstance(value, str) else found == value


@pytest.mark.parametrize("text", ["@ul2()", "%LEARNING_RATE", "(@Nce(), @SpreadOut())"])
def test_references_of_gin_stay_references(text):
  (binding,) = Stage(macros={"X": text}).bindings
  assert gin_config._quoted(binding) == f"X = {text}"


def test_stages_run_after_what_they_need_else_as_listed():
  recipe = make(
    c=Stage(macros={"P": "{a}"}), b=Stage(), a=Stage(), d=Stage(macros={"P": "{c}"})
  )
  assert list(recipe.ordered()) == ["b", "a", "c", "d"]


def test_only_some_stages_and_what_they_need():
  recipe = make(
    a=Stage(), b=Stage(macros={"P": "{a}"}), c=Stage(macros={"P": "{b}"}), d=Stage()
  )
  assert recipe.closure(["b"]) == {"a", "b"}
  with pytest.raises(ConfigError, match="no stage e; there are a, b, c, d"):
    recipe.closure(["e"])


def test_seeds_repeat_what_is_not_shared():
  recipe = Recipe(
    "r",
    {
      "base": Stage(shared=True),
      "expert": Stage(macros={"P": "{base}"}),
      "soup": Stage("soup", inputs=("{base}", "{expert}"), after=("expert",)),
    },
    seeds=(0, 7),
  )
  seeded = recipe.seeded()
  assert list(seeded) == [
    "base",
    "expert_seed0",
    "expert_seed7",
    "soup_seed0",
    "soup_seed7",
  ]
  assert seeded["base"].stage.all_macros == {}
  assert seeded["expert_seed7"].stage.all_macros == {"P": "{base}", "RANDOM_SEED": 7}
  assert seeded["soup_seed7"].stage.inputs == ("{base}", "{expert_seed7}")
  assert seeded["soup_seed7"].stage.needs == ("base", "expert_seed7")
  assert (seeded["soup_seed7"].arm, seeded["soup_seed7"].seed) == ("soup", 7)


@pytest.mark.parametrize(
  ("build", "message"),
  [
    (
      lambda: Stage("tran"),
      "Stage.command 'tran' is none of a recipe's: train, search",
    ),
    (lambda: Stage(macros={"MODEL_DIR": "x"}), "MODEL_DIR of `embgemma train` is set"),
    (lambda: Stage("soup", flags={"output": "x"}), "output of `embgemma soup` is set"),
    (lambda: Stage("soup", gin_files=("a",)), "`embgemma soup` takes no gin files"),
    (lambda: Stage(macros={"TASKS": object()}), "write a literal, or a reference in"),
    (lambda: make(), "Recipe.stages is empty"),
    (lambda: make(logs=Stage()), "'logs': RECIPE_DIR/logs is the recipe's own"),
    (lambda: make(**{"a-b": Stage()}), "stage name 'a-b': use letters, digits"),
    (
      lambda: make(base=Stage(), b=Stage(macros={"P": "{bass}"})),
      r"stage 'b' refers to \{bass\}, which is none; did you mean \{base\}",
    ),
    (
      lambda: make(a=Stage(macros={"P": "{b}"}), b=Stage(macros={"P": "{a}"})),
      "stages need each other in a circle: ",
    ),
    (
      lambda: Recipe(
        "r", {"a": Stage(), "b": Stage(macros={"P": "{a}"}, shared=True)}, seeds=(0, 1)
      ),
      "stage 'b' is shared by all seeds and needs 'a', which is not",
    ),
  ],
)
def test_messages(build, message):
  with pytest.raises(ConfigError, match=message):
    build()
