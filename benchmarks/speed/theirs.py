"""sentence-transformers' side: its model, its losses, its encode.

A step is what its trainer does and nothing beside: pad each column to its longest
text, loss, backward, clip, AdamW; its data loader, callbacks and logging cost nothing
here. Tokenisation is done ahead. The loss is its MultipleNegativesRankingLoss (or the
cached one) with EmbeddingGemma's hardness, plus its
GlobalOrthogonalRegularizationLoss with the paper's weights, under its MatryoshkaLoss.
"""

import contextlib
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import workload
from sentence_transformers import SentenceTransformer, util
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses


class OwnNegatives:
  """Cosines in which other queries' hard negatives are out, as in EmbeddingGemma.

  Rows come in order: all at once, or block by block in the cached loss.
  """

  __name__ = "own_negatives"

  def __init__(self, columns: int):
    self._columns = columns - 1
    self._row = 0

  def __call__(self, query: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    similarity = util.cos_sim(query, documents)
    batch = len(documents) // self._columns
    rows = self._row + torch.arange(len(query), device=query.device)
    self._row = (self._row + len(query)) % batch
    columns = torch.arange(len(documents), device=query.device)
    others = (columns >= batch) & (columns % batch != rows[:, None])
    return similarity.masked_fill(others, -torch.inf)


def _contrastive(columns: int, objective: Mapping[str, float]) -> dict[str, Any]:
  arguments: dict[str, Any] = {"scale": 1.0 / objective["temperature"]}
  if columns > 2:
    arguments |= {"similarity_fct": OwnNegatives(columns)}
    arguments |= {"hardness_mode": "hard_negatives"}
    arguments |= {"hardness_strength": objective["hardness"]}
  return arguments


class PlainLoss(torch.nn.Module):
  """Contrastive and, where wanted, spread-out loss of one forward pass."""

  def __init__(
    self, model: SentenceTransformer, columns: int, objective: Mapping[str, float]
  ):
    super().__init__()
    self.model = model
    self._contrastive = losses.MultipleNegativesRankingLoss(
      model, **_contrastive(columns, objective)
    )
    self._spread = _spread_out(model) if objective["spread_out"] else None

  def forward(self, features, labels):
    del labels
    return self.of_embeddings(embed_columns(self.model, features))

  def of_embeddings(self, embeddings: list[torch.Tensor]) -> torch.Tensor:
    """The loss of each column's vectors."""
    loss = self._contrastive.compute_loss_from_embeddings(embeddings, torch.empty(0))
    if self._spread is not None:
      # Queries and positives, as in the paper.
      terms = self._spread.compute_loss_from_embeddings(embeddings[:2])
      loss = loss + sum(terms.values())
    return loss


class CachedLoss(losses.CachedMultipleNegativesRankingLoss):
  """The same with its gradient caching."""

  def __init__(
    self,
    model: SentenceTransformer,
    columns: int,
    objective: Mapping[str, float],
    mini_batch: int,
  ):
    super().__init__(
      model, mini_batch_size=mini_batch, **_contrastive(columns, objective)
    )
    self._spread = _spread_out(model) if objective["spread_out"] else None

  def calculate_loss(self, reps, labels=None, *, with_backward=False):
    loss = super().calculate_loss(reps, labels, with_backward=with_backward)
    if self._spread is None:
      return loss
    embeddings = [torch.cat(parts) for parts in reps[:2]]
    spread = sum(self._spread.compute_loss_from_embeddings(embeddings).values())
    if with_backward:
      spread.backward()
      spread = spread.detach()
    return loss + spread


def _spread_out(model: SentenceTransformer) -> Any:
  return losses.GlobalOrthogonalRegularizationLoss(
    model, mean_weight=0.0, aggregation="sum"
  )


class Theirs:
  """Methods are requests; see `workload.serve`."""

  def __init__(self, spec: Mapping[str, Any], folder: pathlib.Path):
    self._spec = spec
    self._folder = folder
    self._cuda = spec["device"] == "gpu"
    torch.set_num_threads(os.cpu_count() or 1)
    self._model = SentenceTransformer(
      str(folder / "model"),
      device="cuda" if self._cuda else "cpu",
      local_files_only=True,
      model_kwargs={"attn_implementation": spec["attention"]},
    )
    self._pairs = workload.Pairs(())
    self._batches: list[workload.Pairs] = []

  def about(self) -> dict[str, Any]:
    """Version and device."""
    import sentence_transformers
    import transformers

    return {
      "sentence-transformers": sentence_transformers.__version__,
      "transformers": transformers.__version__,
      "torch": torch.__version__,
      "device": torch.cuda.get_device_name() if self._cuda else "cpu",
      "threads": torch.get_num_threads(),
      "attention": self._spec["attention"],
      "precision": self._spec["precision"],
    }

  def begin_training(self, batch: int, mini_batch: int | None) -> None:
    """Sets loss and optimizer; `mini_batch` texts at a time with caching."""
    self._pairs = workload.Pairs.load(self._folder / "pairs.npz")
    self._batches = self._pairs.batches(batch)
    columns = len(self._pairs.columns)
    objective = self._spec["objective"]
    loss: torch.nn.Module
    if mini_batch is None:
      loss = PlainLoss(self._model, columns, objective)
    else:
      loss = CachedLoss(self._model, columns, objective, mini_batch)
    self._loss = losses.MatryoshkaLoss(self._model, loss, objective["widths"])
    self._model.train()
    self._optimizer = self._build_optimizer()

  def _build_optimizer(self) -> torch.optim.Optimizer:
    optimizer = self._spec["optimizer"]
    named = [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if "norm" in n or "embed_tokens" in n]
    kernels = [p for n, p in named if not ("norm" in n or "embed_tokens" in n)]
    return torch.optim.AdamW(
      [
        {"params": kernels, "weight_decay": optimizer["weight_decay"]},
        {"params": plain, "weight_decay": 0.0},
      ],
      lr=optimizer["rate"],
      betas=(optimizer["b1"], optimizer["b2"]),
      eps=optimizer["epsilon"],
      fused=True,
    )

  def train(self, steps: int) -> dict[str, Any]:
    """Seconds and losses of steps, from the first batch on."""
    self._wait()
    start = time.perf_counter()
    found = [self._step(batch) for batch in workload.cycled(self._batches, steps)]
    self._wait()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "losses": [float(loss) for loss in found]}

  def _step(self, batch: workload.Pairs) -> torch.Tensor:
    features = [self._padded(column) for column in batch.columns]
    with self._precision():
      loss = self._loss(features, None)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(
      self._model.parameters(), self._spec["optimizer"]["clip_norm"]
    )
    self._optimizer.step()
    self._optimizer.zero_grad(set_to_none=True)
    return loss.detach()

  def _padded(self, column: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    longest = max(map(len, column))
    ids = np.zeros((len(column), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(column):
      ids[row, : len(text)] = text
      mask[row, : len(text)] = 1
    device = self._model.device
    return {
      "input_ids": torch.from_numpy(ids).to(device, non_blocking=True),
      "attention_mask": torch.from_numpy(mask).to(device, non_blocking=True),
    }

  def _precision(self) -> contextlib.AbstractContextManager:
    if self._spec["precision"] == "float32":
      return contextlib.nullcontext()
    device = "cuda" if self._cuda else "cpu"
    return torch.autocast(device, dtype=torch.bfloat16)

  def slots(self, batch: int, mini_batch: int | None) -> int:
    """Token slots, padding included, of all batches."""
    total = 0
    for part in workload.Pairs.load(self._folder / "pairs.npz").batches(batch):
      for column in part.columns:
        size = mini_batch or len(column)
        for first in range(0, len(column), size):
          texts = column[first : first + size]
          total += len(texts) * max(map(len, texts))
    return total

  def begin_embedding(self, kind: str, vectors: str) -> None:
    """Reads the texts, and saves their vectors."""
    self._texts = json_texts(self._folder, kind)
    self._model.eval()
    np.save(vectors, self._encode(32))

  def embed(self, batch: int) -> float:
    """Seconds of embedding all texts, tokenisation included."""
    self._wait()
    start = time.perf_counter()
    self._encode(batch)
    return time.perf_counter() - start

  def _encode(self, batch: int) -> np.ndarray:
    with torch.inference_mode(), self._precision():
      return self._model.encode(
        self._texts, batch_size=batch, show_progress_bar=False, convert_to_numpy=True
      )

  def peak(self) -> int:
    """Most bytes since `forget_peak`: resident, or of the device."""
    if self._cuda:
      return torch.cuda.max_memory_allocated()
    return workload.resident_bytes("VmHWM")

  def forget_peak(self) -> None:
    """Starts the peak anew."""
    if self._cuda:
      torch.cuda.reset_peak_memory_stats()
    else:
      workload.forget_peak()

  def _wait(self) -> None:
    if self._cuda:
      torch.cuda.synchronize()


def json_texts(folder: pathlib.Path, kind: str) -> list[str]:
  """Texts of one kind of a workload."""
  import json

  return json.loads((folder / "texts.json").read_text("utf-8"))[kind]


if __name__ == "__main__":
  workload.serve(Theirs)
