"""A model in mteb's protocol: mteb's batches in, vectors of our packed embedder out.

mteb (the extra `eval`) is imported by the functions that need it.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from embgemma.data import prompts
from embgemma.evaluation.retrieval import EncodeFn, encode_checked
from embgemma.losses.matryoshka import truncate
from embgemma.typing import Float


@dataclasses.dataclass
class MtebEncoder:
  """mteb's `EncoderProtocol`: one model at one width.

  Prompts are found as mteb finds those of sentence-transformers models: by task name
  and prompt type, task name, task type and prompt type, task type, prompt type.

  Attributes:
    mteb_model_meta: Under which mteb keeps the results.
    vectors: Texts, with their prompts, to vectors of full width.
    width: Components kept.
    model_prompts: Prompt by key, such as "STS", "Retrieval-query" or a task's name.
    titles: Whether a document with a title has it in the prompt's place for one, as
      the model was trained; without, title and text are one text, as mteb's own
      wrapper has it.
  """

  mteb_model_meta: Any
  vectors: EncodeFn
  width: int
  model_prompts: Mapping[str, str]
  titles: bool = True

  def encode(
    self,
    inputs: Iterable[Mapping[str, Any]],
    *,
    task_metadata: Any,
    hf_split: str,
    hf_subset: str,
    prompt_type: Any = None,
    **kwargs: Any,
  ) -> Float[np.ndarray, "N W"]:
    """Unit vectors of the texts of a loader, float32.

    Raises:
      ConfigError: the width exceeds the model's.
      TrainingError: a vector is not finite.
    """
    from mteb.models.abs_encoder import get_prompt_name

    del hf_split, hf_subset, kwargs
    name = get_prompt_name(dict(self.model_prompts), task_metadata, prompt_type)
    prompt = "" if name is None else self.model_prompts[name]
    texts: list[str] = []
    for batch in inputs:
      texts += self._texts(batch, prompt)
    where = task_metadata.name
    vectors = encode_checked(self.vectors, texts, where, [self.width])
    return np.asarray(truncate(vectors, self.width))

  def _texts(self, batch: Mapping[str, Any], prompt: str) -> list[str]:
    if not (self.titles and "body" in batch and prompts.has_title(prompt)):
      return [prompt + text for text in batch["text"]]
    bodies = batch["body"]
    titles = batch.get("title") or [""] * len(bodies)
    return [
      prompts.document(body, title, prompt)
      for body, title in zip(bodies, titles, strict=True)
    ]

  def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
    """[N, M] cosines, a torch tensor; codes of vectors have no unit norm."""
    from mteb.similarity_functions import cos_sim

    return cos_sim(embeddings1, embeddings2)

  def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
    """[N] cosines, a torch tensor."""
    from mteb.similarity_functions import pairwise_cos_sim

    return pairwise_cos_sim(embeddings1, embeddings2)


def model_meta(
  name: str,
  revision: str,
  width: int,
  max_length: int,
  experiment: Mapping[str, Any],
) -> Any:
  """mteb's description of a model at a width.

  Args:
    name: Such as "me/my-model".
    revision: Changes with the weights.
    width: Components kept.
    max_length: Tokens after which texts are cut.
    experiment: What is not as in the paper, such as {"embed_dim": 128}; its results
      have a folder of their own.
  """
  from mteb.models.model_meta import ModelMeta, ScoringFunction

  return ModelMeta.create_empty(
    overwrites={
      "name": name,
      "revision": revision,
      "embed_dim": width,
      "max_tokens": max_length,
      "similarity_fn_name": ScoringFunction.COSINE,
      "framework": ["JAX"],
      "experiment_kwargs": dict(experiment) or None,
    }
  )
