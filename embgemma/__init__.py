"""embgemma: train text embedding models in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from embgemma.inference.embedder import CheckpointEmbedder as Embedder

__all__ = ["Embedder", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
  """`Embedder`, imported when it is asked for: `embgemma --help` is instant."""
  if name == "Embedder":
    from embgemma.inference.embedder import CheckpointEmbedder

    return CheckpointEmbedder
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
