"""An embedder as torch computes it, for the exporters that start there."""

import contextlib
import dataclasses
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from embgemma.interop import sentence_transformers_writer
from embgemma.interop.model import Model
from embgemma.quiet import quiet

_MODULES = "modules.json"
INPUTS, OUTPUT = ("input_ids", "attention_mask"), "sentence_embedding"


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """A model loaded by sentence-transformers.

  Attributes:
    vectors: torch module of INPUTS, integer [texts, tokens] with BOS, EOS and prompt,
      whose result's OUTPUT is float32 [texts, E] of unit norm.
    files: The directory that it was loaded from.
    notes: What the user should know about the export.
  """

  vectors: Any
  files: pathlib.Path
  notes: tuple[str, ...]

  def copy_settings(self, directory: pathlib.Path) -> None:
    """Tokenizer, configuration, prompts and card, without weights."""
    for file in self.files.iterdir():
      # Its modules are in the graph, whose folders would be missing here.
      if file.is_file() and file.suffix != ".safetensors" and file.name != _MODULES:
        shutil.copy2(file, directory / file.name)


@contextlib.contextmanager
def loaded(model: Model, max_length: int, card: str) -> Iterator[Pipeline]:
  """The model in torch, while the block lasts; exporters say nothing in it.

  Args:
    model: An embedder.
    max_length: Tokens a text is cut to.
    card: Content of README.md.

  Raises:
    CheckpointError, ConfigError: see `sentence_transformers_writer.write`.
  """
  import torch
  from sentence_transformers import SentenceTransformer
  from transformers.utils import logging as transformers_logging

  class Vectors(torch.nn.Module):
    """All modules of the pipeline, as a function of tensors."""

    def __init__(self, modules: Any) -> None:
      super().__init__()
      self.modules_of_it = modules

    def forward(self, input_ids: Any, attention_mask: Any) -> Any:
      features = {"input_ids": input_ids, "attention_mask": attention_mask}
      return {OUTPUT: self.modules_of_it(features)[OUTPUT]}

  with tempfile.TemporaryDirectory() as made, quiet(), torch.no_grad():
    files = pathlib.Path(made)
    notes = sentence_transformers_writer.write(
      model, files, "float32", max_length, card
    )
    transformers_logging.disable_progress_bar()
    whole = SentenceTransformer(
      str(files),
      device="cpu",
      local_files_only=True,
      model_kwargs={"attn_implementation": "eager"},
    )
    yield Pipeline(Vectors(whole).eval(), files, notes)
