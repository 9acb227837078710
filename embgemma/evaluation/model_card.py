"""README.md of an exported model, from what its checkpoint directory says."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence

from embgemma.checkpoints import Description
from embgemma.evaluation import suite
from embgemma.evaluation.report import results_markdown
from embgemma.interop.model import Model
from embgemma.models.config import EmbedderConfig

# Absolute paths in a configuration are their writer's business; names are kept.
_ABSOLUTE_PATH = re.compile(r"""(?<=['"])(?:/|~/|[A-Za-z]:\\)[^'"\n]*[/\\]""")
_FENCE = "```"
_TARGETS: Mapping[str, tuple[str, str]] = {
  # Of an export that sentence-transformers does not read: the library, and its use.
  "onnx": (
    "onnx",
    "onnxruntime runs `onnx/`'s file: int64 `input_ids` and `attention_mask` [texts, "
    "tokens] of prompt and text, as tokenizer.json gives them, to "
    "`sentence_embedding`, unit vectors.",
  ),
  "litert": (
    "litert",
    "LiteRT runs `model.tflite`: int32 `input_ids` and `attention_mask` [1, tokens] of "
    "prompt and text, as tokenizer.json gives them, padded on the right, to "
    "`sentence_embedding`, a unit vector.",
  ),
}


def model_card(
  model: Model, name: str, dtype: str, max_length: int, target: str = "hf"
) -> str:
  """Returns markdown with use, prompts, widths, evaluation, data and recipe.

  Recipe and results come from the directory of the model's run, if it has one;
  directories of absolute paths are left out.

  Args:
    model: An embedder.
    name: Heading.
    dtype: Of the exported weights.
    max_length: Tokens a text is cut to.
    target: Of the export: hf, onnx or litert.

  Raises:
    CheckpointError: the model is no embedder.
    DataError: the run's results are damaged.
  """
  description = model.description
  config = description.embedder
  transformer = config.transformer
  library, use = _TARGETS.get(target, ("sentence-transformers", ""))
  head = {
    "library_name": library,
    "pipeline_tag": "sentence-similarity",
    "tags": [library, "feature-extraction", "embgemma"],
  }
  # JSON is YAML.
  front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items())
  widths = ", ".join(map(str, config.matryoshka_widths))
  heads = (
    f"two linear heads ({transformer.width} → {config.hidden_width} → "
    f"{config.embedding_width})"
    if config.hidden_width
    else "no heads"
  )
  sections = [
    f"---\n{front}---\n# {name}\n\n"
    "A text embedding model trained or converted with embgemma: a "
    f"{transformer.mask} Gemma 3 encoder of {transformer.num_layers} layers, "
    f"{config.pooler} pooling, {heads}, unit norm. Vectors have "
    f"{config.embedding_width} components; texts are cut to {max_length} tokens; "
    f"weights are {dtype}. Activations overflow float16: use float32 or bfloat16.\n",
    f"## Use\n\n{use}\n" if use else _usage(description),
    "## Matryoshka widths\n\n"
    f"Trained to be cut to: {widths}. Bring cut vectors back to unit norm"
    + (
      ".\n"
      if use
      else ": `model.encode(texts, truncate_dim=N, normalize_embeddings=True)`.\n"
    ),
    _prompts(description),
  ]
  if model.directory is not None and model.step is not None:
    sections += _evaluation(model.directory, model.step, config)
    sections += _training(model.directory)
  return "\n".join(sections)


def _usage(description: Description) -> str:
  named = [name for name in ("query", "document") if name in description.prompts]
  lines = ["from sentence_transformers import SentenceTransformer", ""]
  lines += ['model = SentenceTransformer("PATH")']
  if len(named) == 2:
    lines += ["queries = model.encode_query([…])", "texts = model.encode_document([…])"]
    lines += ["scores = model.similarity(queries, texts)"]
  else:
    lines += ["vectors = model.encode([…])"]
  return "\n".join(["## Use", "", f"{_FENCE}python", *lines, _FENCE, ""])


def _prompts(description: Description) -> str:
  escaped = {n: text.replace("|", "\\|") for n, text in description.prompts.items()}
  rows = [f"| {name} | `{text}` |" for name, text in escaped.items() if text]
  intro = "Put in front of the text (the last space belongs to it), by name:"
  return "\n".join(
    ["## Prompts", "", intro, "", "| name | prompt |", "| --- | --- |", *rows, ""]
  )


def _evaluation(
  directory: pathlib.Path, step: int, config: EmbedderConfig
) -> Sequence[str]:
  kept = suite.read_results(directory / "evaluations.json")
  columns = {f"step {n}": kept[n] for n in ("0", str(step)) if n in kept}
  if not columns:
    return []
  table = results_markdown(columns, metrics=suite.MAIN_METRICS)
  text = "Held-out tasks of the run (x100)."
  if config.quantization is not None:
    formats = ", ".join(dict.fromkeys(name for _, name in config.quantization.rules))
    text += (
      f" The run trained for weights of {formats}, and these results are of weights so "
      "rounded, not of others."
    )
  return [f"## Evaluation\n\n{text}\n\n{table}"]


def _training(directory: pathlib.Path) -> Sequence[str]:
  path = directory / "operative.gin"
  if not path.exists():
    return []
  recipe = _ABSOLUTE_PATH.sub("", path.read_text("utf-8")).strip()
  tasks = re.search(r"^JSONL_TASKS = ((?:.*\\\n)*.*)$", recipe, re.MULTILINE)
  data = "Tasks and rates are in the configuration below (`TASKS`, `MODULES`).\n"
  if tasks and tasks[1].strip() != "{}":
    data = f"{_FENCE}python\n{tasks[1].replace(chr(92), '').strip()}\n{_FENCE}\n"
  return [
    f"## Data\n\n{data}",
    "## Recipe\n\nThe configuration of the last stage, as `embgemma train` ran it.\n\n"
    f"<details><summary>operative.gin</summary>\n\n{_FENCE}\n{recipe}\n{_FENCE}\n\n"
    "</details>\n",
  ]
