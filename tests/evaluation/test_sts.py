import json

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score

from embgemma.errors import ConfigError, DataError
from embgemma.evaluation import sts


def write(path, records):
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


def pair(first, second, score, key="score"):
  return {"sentence1": first, "sentence2": second, key: score}


class HashEncoder:
  """Unit vectors fixed by the text's bytes."""

  def __init__(self):
    self.texts = []

  def __call__(self, texts):
    self.texts += texts
    return np.array([self.vector(text) for text in texts], np.float32)

  def vector(self, text):
    vector = np.random.default_rng(list(text.encode())).standard_normal(12)
    return vector / np.linalg.norm(vector)


def cosine(encode, prompt, records, width):
  values = []
  for record in records:
    a, b = (
      encode.vector(prompt + record[key])[:width] for key in ("sentence1", "sentence2")
    )
    values.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
  return values


def test_spearman_of_cosine_at_each_width(tmp_path):
  records = [pair(f"s{i % 5}", f"t{i}", i % 6 / 2) for i in range(25)]
  encode = HashEncoder()
  path = write(tmp_path / "sts.jsonl", records)
  values = sts.StsEvaluator("toy", path, widths=(12, 4)).evaluate(encode)
  prompt = "task: sentence similarity | query: "
  gold = [record["score"] for record in records]
  expected = {
    f"spearman/{w}": stats.spearmanr(cosine(encode, prompt, records, w), gold).statistic
    for w in (12, 4)
  }
  assert values == pytest.approx(expected, abs=1e-9)
  # Five distinct first sentences, embedded once.
  assert len(encode.texts) == 30


def test_average_precision_of_cosine(tmp_path):
  records = [pair(f"s{i}", f"t{i}", i * i % 3, "label") for i in range(30)]
  encode = HashEncoder()
  path = write(tmp_path / "nli.jsonl", records)
  evaluator = sts.PairClassificationEvaluator("toy", path, widths=(12, 4))
  values = evaluator.evaluate(encode)
  prompt = "task: sentence similarity | query: "
  labels = [record["label"] for record in records]
  expected = {
    f"average_precision/{w}": average_precision_score(
      labels, cosine(encode, prompt, records, w)
    )
    for w in (12, 4)
  }
  assert values == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
  ("records", "message"),
  [
    ([{"sentence1": "a", "sentence2": "b"}], r":1: \"score\" .* got None"),
    ([pair("a", "b", "4")], r":1: \"score\" .* finite number, got '4'"),
    ([pair("a", "b", True)], r":1: \"score\" .* finite number, got True"),
    ([pair("a", "b", float("nan"))], r":1: \"score\" .* finite number, got nan"),
    ([pair("a", None, 1)], r":1: no \"sentence2\""),
    ([pair("a", 7, 1)], r":1: \"sentence2\" must be a string, got int"),
    ([pair("a", "b", 1)], r"1 pairs with 1 distinct scores; at least two"),
    ([], r"0 pairs with 0 distinct scores"),
  ],
)
def test_read_sts_says_where_and_what(tmp_path, records, message):
  path = write(tmp_path / "sts.jsonl", records)
  with pytest.raises(DataError, match=f"sts.jsonl.*{message}"):
    sts.StsEvaluator("toy", path).check()


def test_labels_must_be_zero_or_one(tmp_path):
  path = write(tmp_path / "nli.jsonl", [pair("a", "b", 0), pair("a", "c", 2)])
  with pytest.raises(DataError, match=r"labels are \[0.0, 2.0\]"):
    sts.PairClassificationEvaluator("toy", path).check()


def test_bad_paths_and_widths_fail_before_training(tmp_path):
  with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):
    sts.StsEvaluator("toy", tmp_path / "absent.jsonl").check()
  path = write(tmp_path / "sts.jsonl", [pair("a", "b", 0), pair("a", "c", 1)])
  with pytest.raises(ConfigError, match="toy: widths"):
    sts.StsEvaluator("toy", path, widths=(4, 4)).check()
  with pytest.raises(ConfigError, match="width 13 exceeds the embedding width 12"):
    sts.StsEvaluator("toy", path, widths=(13,)).evaluate(HashEncoder())
