"""Public sets as tasks. Nothing is downloaded: a few records of the same layouts."""

import gzip
import json
import pathlib
import re

import pytest

from embgemma import gin_config
from embgemma.data.bad_records import SkipLog
from embgemma.data.prompts import TASK_PROMPTS
from embgemma.data.public_sets import PUBLIC_SETS, public_tasks, public_tfds_tasks
from embgemma.errors import ConfigError, DataError

_ROOT = pathlib.Path(__file__).parents[2]
_MIXTURES = [
  path
  for path in sorted((_ROOT / "gin" / "mixtures").glob("*.gin"))
  if not path.stem.startswith("builtin")  # of no public sets
]
_RECORDS = {
  "nli": [
    {"sentence1": "a", "sentence2": "b", "gold_label": "entailment"},
    {"sentence1": "a", "sentence2": "c", "gold_label": "contradiction"},
  ],
  "tevatron": [
    {
      "query_id": "1",
      "query": "a",
      "positive_passages": [{"docid": "1#1", "title": "", "text": "b"}],
      "negative_passages": [{"docid": "2#1", "title": "", "text": "c"}],
    }
  ],
  "code_search_net": [{"docstring": "a", "code": "b", "language": "go"}],
  "embedding_training_data": [{"texts": ["a", "b"], "tags": []}],
  "title_body": [{"title": "a", "text": "b"}],
}


def _make(directory, public):
  """The files of a set, as docs/data.md says that they lie."""
  path = directory / public.path
  if public.format == "beir":
    (path / "qrels").mkdir(parents=True)
    (path / "corpus.jsonl").write_text('{"_id": "d", "title": "", "text": "b"}\n')
    (path / "queries.jsonl").write_text('{"_id": "q", "text": "a"}\n')
    (path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    return
  path = pathlib.Path(f"{path}.gz".replace("*", "_0"))
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps(record) + "\n" for record in _RECORDS[public.format]]
  path.write_bytes(gzip.compress("".join(lines).encode()))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp("public")
  for public in PUBLIC_SETS.values():
    _make(path, public)
  return str(path)


def test_all_sets(directory):
  tasks = public_tasks(directory)
  assert [task.name for task in tasks] == list(PUBLIC_SETS)
  assert len({task.source.fingerprint() for task in tasks}) == len(tasks)
  for task in tasks:
    (shard,) = task.source.shards()
    (example,) = task.source.read(shard, "fail", SkipLog())
    assert (example["query"], example["positive"]) == ("a", "b")
    assert task.rate == 1.0


def test_kinds():
  kinds = {public.family: public.kind for public in PUBLIC_SETS.values()}
  assert kinds["msmarco"] == kinds["miracl"] == kinds["mr_tydi"] == "search"
  assert kinds["nq"] == kinds["hotpotqa"] == "qa"
  assert kinds["fever"] == "fact_checking"
  assert kinds["snli"] == kinds["mnli"] == "similarity"
  assert kinds["code_search_net"] == "code"
  for public in PUBLIC_SETS.values():
    sides = TASK_PROMPTS[public.kind]
    assert public.symmetric == (sides.query == sides.document)


def test_names_and_families(directory):
  names = ("miracl_sw", "code_search_net", "nq", "code_search_net_go")
  chosen = [task.name for task in public_tasks(directory, names)]
  languages = ["go", "java", "javascript", "php", "python", "ruby"]
  assert chosen == ["nq", "miracl_sw", *(f"code_search_net_{n}" for n in languages)]
  (snli,) = public_tasks(directory, ["snli"])
  assert (snli.kind, snli.symmetric) == ("similarity", True)
  for names, message in (
    (("nq", "squad"), r"no sets \['squad'\]; there are .*'nq'"),
    ((), r"no sets \[\]"),
  ):
    with pytest.raises(ConfigError, match=message):
      public_tasks(directory, names)


def test_balance(directory):
  names = ("nq", "hotpotqa", "snli", "miracl", "mr_tydi_thai", "msmarco", "fever")
  tasks = public_tasks(directory, names, "kinds")
  share: dict[str, float] = {}
  for task in tasks:
    share[task.kind] = share.get(task.kind, 0) + task.rate
  assert share == pytest.approx(dict.fromkeys(share, 1.0))
  assert sorted(share) == ["fact_checking", "qa", "search", "similarity"]
  rates = {task.name: task.rate for task in tasks}
  assert rates["msmarco"] == rates["mr_tydi_thai"] == pytest.approx(1 / 3)
  assert rates["miracl_sw"] == pytest.approx(1 / 3 / 16)
  with pytest.raises(ConfigError, match="balance 'even' of public tasks: one of"):
    public_tasks(directory, names, "even")


@pytest.mark.parametrize("name", ["snli", "miracl_sw", "msmarco", "web_title_body"])
def test_missing_files_say_where_to_read(tmp_path, name):
  public = PUBLIC_SETS[name]
  with pytest.raises(DataError) as caught:
    public_tasks(str(tmp_path), (name,))
  message = str(caught.value)
  assert str(tmp_path / public.path) in message
  assert f"docs/data.md, section '{public.family}'" in message
  assert f"leave '{name}' out of PUBLIC_SETS" in message
  assert "\n" not in message


def test_documentation_has_a_section_of_each_family():
  text = (_ROOT / "docs" / "data.md").read_text()
  sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^#|\Z)", text, re.M | re.S))
  assert set(sections) == {public.family for public in PUBLIC_SETS.values()}
  for public in PUBLIC_SETS.values():
    folder = public.path.split("/")[0]
    assert folder in sections[public.family]


def test_sets_of_tfds():
  """Names, splits and features as TFDS's own builder declares them."""
  from tensorflow_datasets.datasets.beir import beir_dataset_builder

  configs = {c.name: c for c in beir_dataset_builder.Builder.BUILDER_CONFIGS}
  for task in public_tfds_tasks(data_dir="data"):
    builder, config, version = re.fullmatch(
      r"(\w+)/(\w+):([\d.]+)", task.source.name
    ).groups()
    assert builder == "beir"
    assert task.source.split in configs[config].qrel_splits
    assert version == str(beir_dataset_builder.Builder.VERSION)
    assert task.source.data_dir == "data"
    assert task.kind == PUBLIC_SETS[task.name].kind
    features = pathlib.Path(beir_dataset_builder.__file__).read_text()
    for theirs in task.source.fields.values():
      assert f"'{theirs}': tfds.features.Text()" in features
  with pytest.raises(ConfigError, match=r"not in TFDS: \['snli'\]; there are"):
    public_tfds_tasks(("snli",))


@pytest.mark.parametrize("path", _MIXTURES, ids=lambda path: path.stem)
def test_mixtures(directory, path):
  """What a mixture binds makes tasks, after any stage."""
  stage = _ROOT / "gin" / "stages" / "finetune.gin"
  bindings = [f"PUBLIC_DATA={directory}"]
  if path.stem == "public":
    bindings.append("PUBLIC_SETS=('nq', 'snli')")
  gin_config.register()
  gin_config.parse([str(stage), str(path)], bindings, [])
  tasks = gin_config.resolve("public_tasks")
  shares: dict[str, float] = {}
  for task in tasks:
    shares[task.kind] = shares.get(task.kind, 0) + task.rate
  expected = {
    "public": {"qa": 1, "similarity": 1},
    "paper_groups": dict.fromkeys(("qa", "similarity", "code", "search"), 1),
    "retrieval_en": {"search": 1, "qa": 2, "fact_checking": 1},
    "multilingual": {"search": 1},
    "code": {"code": 6},
  }
  assert shares == pytest.approx(expected[path.stem])
