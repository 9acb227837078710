"""A checkpoint through our runner, and exported through plain mteb: the same scores.

    python benchmarks/mteb/parity.py --checkpoint=DIR --output=DIR

Plain mteb has a SentenceTransformer of what `embgemma export --to=hf` writes; it is
told to normalise what it has cut, which it does not by itself. Titles of documents are
joined to their texts on both sides, as mteb has it. Prints main scores
and seconds of each task, at the full width and the narrowest.
"""

import argparse
import pathlib
import time
import warnings

import mteb
from sentence_transformers import SentenceTransformer

from embgemma.evaluation import mteb_runner
from embgemma.evaluation.mteb_runner import BenchmarkModel
from embgemma.inference.embedder import CheckpointEmbedder
from embgemma.interop import conversion, sentence_transformers_writer

TASKS = ["stdlib_tasks"]  # beside this file


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--checkpoint", required=True)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  options = parser.parse_args()
  warnings.simplefilter("ignore")  # of prompts that are no task's
  options.output.mkdir(parents=True, exist_ok=True)
  embedder = CheckpointEmbedder(options.checkpoint)
  config = embedder.description.embedder
  length = min(512, config.transformer.max_length)
  widths = (config.embedding_width, min(config.matryoshka_widths))
  exported = options.output / "exported"
  if not exported.exists():
    exported.mkdir()
    model = conversion.open_embedder(options.checkpoint)
    sentence_transformers_writer.write(model, exported, "float32", length, "")
  ours = BenchmarkModel(
    name="embgemma/ours",
    revision=embedder.fingerprint,
    full_width=config.embedding_width,
    max_length=config.transformer.max_length,
    prompts=embedder.description.prompts,
    encoder=embedder.cut_at,
    titles=False,
  )
  print("| task | width | ours | plain mteb | apart | seconds | plain |")
  print("|---|---:|---:|---:|---:|---:|---:|")
  chosen = mteb_runner.tasks(None, (), TASKS)
  seconds, worst = 0.0, 0.0
  began = time.monotonic()
  outcomes = mteb_runner.run(ours, chosen, widths, options.output, length=length)
  own_seconds = time.monotonic() - began
  plain_tasks = {task.metadata.name: type(task) for task in chosen}
  for outcome in outcomes:
    assert not outcome.error, outcome
    theirs = SentenceTransformer(
      str(exported), device="cpu", truncate_dim=outcome.width, local_files_only=True
    )
    began = time.monotonic()
    result = mteb.evaluate(
      theirs,
      plain_tasks[outcome.task](),
      cache=None,
      co2_tracker=False,
      show_progress_bar=False,
      encode_kwargs={
        "batch_size": 32,
        "show_progress_bar": False,
        "normalize_embeddings": True,  # after the cut, as ours are
      },
    )
    taken = time.monotonic() - began
    seconds += taken
    score = result.task_results[0].get_score()
    apart = abs(score - outcome.score)
    worst = max(worst, apart)
    print(
      f"| {outcome.task} | {outcome.width} | {outcome.score:.5f} | {score:.5f} "
      f"| {apart:.1e} | {outcome.seconds:.1f} | {taken:.1f} |",
      flush=True,
    )
  found = mteb.ResultCache(options.output).load_results(
    validate_and_filter=False, load_experiments="match_name"
  )
  read = sum(len(model.task_results) for model in found.model_results)
  print(f"largest difference {worst:.1e}; mteb reads {read} of our results")
  print(f"ours {own_seconds:.1f} s, plain mteb {seconds:.1f} s")


if __name__ == "__main__":
  main()
