import io

import pytest
from rich.console import Console

from embgemma.evaluation import report

RESULTS = {
  "untrained": {
    "docs": {"ndcg@10/768": 0.25, "mrr@10/768": 0.2, "ndcg@10/128": 0.125},
    "code": {"ndcg@10/768": 0.5, "ndcg@10/128": 0.4},
  },
  "trained": {
    "docs": {"ndcg@10/768": 0.75, "mrr@10/768": 0.7, "ndcg@10/128": 0.625},
  },
  "BM25": {"docs": {"ndcg@10": 0.6}, "code": {"ndcg@10": 0.3}, "sts": {}},
}


def test_markdown():
  assert report.results_markdown(RESULTS) == (
    "| task | metric | width | untrained | trained | BM25 |\n"
    "| --- | --- | ---: | ---: | ---: | ---: |\n"
    "| docs | ndcg@10 | 768 | 25.00 | 75.00 | 60.00 |\n"
    "| docs | ndcg@10 | 128 | 12.50 | 62.50 | 60.00 |\n"
    "| docs | mrr@10 | 768 | 20.00 | 70.00 | – |\n"
    "| code | ndcg@10 | 768 | 50.00 | – | 30.00 |\n"
    "| code | ndcg@10 | 128 | 40.00 | – | 30.00 |\n"
    "| mean | ndcg@10 | 768 | 37.50 | – | 45.00 |\n"
    "| mean | ndcg@10 | 128 | 26.25 | – | 45.00 |\n"
  )


def test_markdown_of_chosen_metrics_and_scale():
  table = report.results_markdown(RESULTS, metrics=("mrr@10",), scale=1.0, digits=1)
  assert table.splitlines()[2:] == ["| docs | mrr@10 | 768 | 0.2 | 0.7 | – |"]


def test_only_bm25_has_rows_without_width():
  table = report.results_markdown({"BM25": RESULTS["BM25"]})
  assert "| docs | ndcg@10 |  | 60.00 |" in table
  assert "| mean | ndcg@10 |  | 45.00 |" in table


def test_losses_are_not_scaled():
  """A mean over denoisers is none of them: each has a row of its own."""
  results = {
    "mixture": {
      "prose": {"loss": 2.5, "loss/R": 2.0, "loss/S": 3.0, "accuracy/R": 0.5},
      "code": {"loss": 1.5, "loss/R": 1.25, "loss/S": 1.75},
    },
    "decoder": {
      "prose": {"loss": 2.0, "perplexity": 7.3891, "accuracy": 0.25},
      "code": {"loss": 1.0, "perplexity": 2.7183},
    },
  }
  table = report.results_markdown(results, scale=100.0, digits=1)
  assert table.splitlines()[2:] == [
    "| prose | loss |  | 2.500 | 2.000 |",
    "| prose | loss | R | 2.000 | – |",
    "| prose | loss | S | 3.000 | – |",
    "| prose | accuracy | R | 50.0 | – |",
    "| prose | accuracy |  | – | 25.0 |",
    "| prose | perplexity |  | – | 7.389 |",
    "| code | loss |  | 1.500 | 1.000 |",
    "| code | loss | R | 1.250 | – |",
    "| code | loss | S | 1.750 | – |",
    "| code | perplexity |  | – | 2.718 |",
    "| mean | loss |  | 2.000 | 1.500 |",
    "| mean | loss | R | 1.625 | – |",
    "| mean | loss | S | 2.375 | – |",
    "| mean | perplexity |  | – | 5.054 |",
  ]


def test_markdown_escapes_bars():
  table = report.results_markdown({"a|b": {"t": {"ndcg@10": 0.5}}})
  assert "a\\|b" in table


@pytest.mark.parametrize("name", ["trained", "[bold]run[/]"])
def test_table_shows_the_same_cells(name):
  results = {name: RESULTS["trained"], "BM25": RESULTS["BM25"]}
  file = io.StringIO()
  table = report.results_table(results, title="Results [dev]")
  Console(file=file, width=100).print(table)
  text = file.getvalue()
  assert name in text
  assert "Results [dev]" in text
  rows = [line.replace("│", " ").split() for line in text.splitlines()]
  for line in report.results_markdown(results).splitlines()[2:]:
    assert line.replace("|", " ").split() in rows
