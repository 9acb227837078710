"""The comparison with sentence-transformers: both sides see and compute the same."""

import importlib
import json
import pathlib
from xml.etree import ElementTree

import gin
import numpy as np
import pytest

from embgemma import gin_config
from embgemma.losses.objective import Nce, Objective, PairBatch, SpreadOut
from embgemma.models import config

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks" / "speed"
OBJECTIVE = {"temperature": 0.05, "hardness": 5.0, "spread_out": True}


@pytest.fixture
def module(monkeypatch):
  monkeypatch.syspath_prepend(str(FOLDER))
  return importlib.import_module


@pytest.mark.parametrize("name", ["tiny", "mini", "small", "embeddinggemma_300m"])
def test_preset_is_what_gin_makes_of_the_file(name, module):
  gin_config.register()
  gin_config.parse([f"gin/models/{name}.gin"], [], [])
  try:
    expected = gin_config.resolve("EmbedderConfig")
  finally:
    gin.clear_config()
  assert module("workload").preset(name) == expected
  changed = module("workload").preset(name, remat="dots")
  assert isinstance(changed, config.EmbedderConfig)
  assert changed.transformer.remat == "dots"


def test_pairs_survive_the_file(tmp_path, module):
  workload = module("workload")
  pairs = workload.synthetic_pairs(100, 7, [(2, 5), (10, 20), (8, 8)])
  pairs.save(tmp_path / "pairs.npz")
  read = workload.Pairs.load(tmp_path / "pairs.npz")
  assert len(read.columns) == 3
  for mine, theirs in zip(pairs.columns, read.columns, strict=True):
    assert [text.tolist() for text in mine] == [text.tolist() for text in theirs]
  assert {len(text) for text in read.columns[2]} == {8}
  first, second, third = read.batches(2)
  assert [len(column) for column in second.columns] == [2, 2, 2]
  assert first.tokens + second.tokens + third.tokens < read.tokens


def test_texts_come_once_with_their_prompts(tmp_path, module):
  records = [
    {"query": "a", "positive": "b", "negative": "c", "task": "search"},
    {"query": "a", "positive": "d", "negative": "e"},
    {"query": "f", "positive": "b", "negative": "g"},
    {"query": "h", "positive": "i"},
    {"query": "k", "positive": "l", "negatives": ["m", "n"], "task": "bitext"},
  ]
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(record) + "\n" for record in records))
  rows = module("workload").Texts.read([str(path)], negatives=1).rows
  assert sorted(rows) == [
    ("task: search result | query: a", *(f"title: none | text: {x}" for x in "bc")),
    tuple(f"task: search result | query: {text}" for text in "klm"),
  ]


@pytest.mark.parametrize("negatives", [0, 2])
def test_losses_agree_but_for_the_constant(negatives, module):
  torch = pytest.importorskip("torch")
  theirs = module("theirs")
  rng = np.random.default_rng(0)
  vectors = rng.normal(size=(2 + negatives, 6, 16)).astype(np.float32)
  vectors += 1.0  # else the spread-out term, which is clipped there, would be zero
  vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
  hashes = np.stack([np.arange(6), np.zeros(6)], axis=1).astype(np.uint32)
  batch = PairBatch(
    query=vectors[0],
    positive=vectors[1],
    negative=vectors[2:].transpose(1, 0, 2),
    negative_mask=np.ones((6, negatives), bool),
    query_hash=hashes,
    positive_hash=hashes,
  )
  loss, _ = Objective([Nce(widths=(16,)), SpreadOut(widths=(16,))])(batch, {})
  columns = [torch.from_numpy(column) for column in vectors]
  plain = theirs.PlainLoss(torch.nn.Identity(), len(columns), OBJECTIVE)
  plain_loss = plain.of_embeddings(columns)
  assert float(plain_loss) + 2 / 16 == pytest.approx(float(loss), abs=1e-5)
  blocks = [list(column.split(4)) for column in columns]
  cached = theirs.CachedLoss([torch.nn.Identity()], len(columns), OBJECTIVE, 4)
  assert float(cached.calculate_loss(blocks)) == pytest.approx(float(plain_loss))


def test_plot_shows_each_report_with_two_sides(module):
  side = {"seconds": [2.0, 1.0, 4.0], "examples_per_second": 64.0}
  found = {
    "mode": "train",
    "preset": "mini",
    "batch": 128,
    "cached": False,
    "ratio": 2.5,
    "sides": {"ours": side, "theirs": {**side, "examples_per_second": 16.0}},
  }
  text = module("report").svg([found, {"mode": "input"}, found])
  root = ElementTree.fromstring(text)
  assert text.count("mini: train, batch 128<") == 2
  assert len(root.findall("{*}circle")) == 2 * 6
  bars = [float(rect.get("width")) for rect in root.findall("{*}rect")[3:]]
  assert bars[0] == pytest.approx(4 * bars[1], rel=0.01)
