"""sentence-transformers' side: its trainer and the recipe of its documentation.

MultipleNegativesRankingLoss under MatryoshkaLoss, no duplicates in a batch, data sets
in proportion to their sizes, a warm-up of 5 % and cosine decay.
"""

import argparse
import json
import pathlib
import time

import datasets
from sentence_transformers import (
  SentenceTransformer,
  SentenceTransformerTrainer,
  SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.training_args import BatchSamplers, MultiDatasetBatchSamplers
from transformers import TrainerCallback


class StepTimes(TrainerCallback):
  """Writes when each step ended, a line each."""

  def __init__(self, path: pathlib.Path):
    self._file = path.open("w", buffering=1)

  def on_step_end(self, args, state, control, **kwargs):
    print(state.global_step, time.monotonic(), file=self._file)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", required=True)
  parser.add_argument("--pairs", type=pathlib.Path, required=True)
  parser.add_argument("--output", type=pathlib.Path, required=True)
  parser.add_argument("--steps", type=int, required=True)
  parser.add_argument("--batch", type=int, required=True)
  parser.add_argument("--rate", type=float, required=True)
  parser.add_argument("--widths", required=True)
  parser.add_argument("--bf16", action="store_true")
  options = parser.parse_args()
  options.output.mkdir(parents=True, exist_ok=True)
  model = SentenceTransformer(options.model, device="cpu", local_files_only=True)
  model.max_seq_length = 128
  sets = {
    path.stem: datasets.Dataset.from_list(
      [json.loads(line) for line in path.open(encoding="utf-8")]
    )
    for path in sorted(options.pairs.glob("*.jsonl"))
  }
  contrastive = losses.MultipleNegativesRankingLoss(model)
  widths = [int(width) for width in options.widths.split(",")]
  trainer = SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(
      output_dir=str(options.output / "trainer"),
      max_steps=options.steps,
      per_device_train_batch_size=options.batch,
      learning_rate=options.rate,
      lr_scheduler_type="cosine",
      warmup_steps=0.05,
      weight_decay=0.01,
      bf16=options.bf16,
      use_cpu=True,
      batch_sampler=BatchSamplers.NO_DUPLICATES_HASHED,
      multi_dataset_batch_sampler=MultiDatasetBatchSamplers.PROPORTIONAL,
      dataloader_drop_last=True,
      save_strategy="no",
      logging_steps=20,
      report_to="none",
      disable_tqdm=True,
    ),
    train_dataset=datasets.DatasetDict(sets),
    loss=losses.MatryoshkaLoss(model, contrastive, widths),
    callbacks=[StepTimes(options.output / "steps.txt")],
  )
  trainer.train()
  model.save_pretrained(str(options.output / "model"))


if __name__ == "__main__":
  main()
