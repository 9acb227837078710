"""Model configurations: frozen dataclasses that gin builds and checkpoints keep."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from embgemma.errors import ConfigError

ATTENTION_KINDS = ("local", "global")
MASK_KINDS = ("bidirectional", "causal")
CROSS_ATTENTIONS = ("merged", "separate")
POOLERS = ("mean", "first", "last", "attention")
ATTENTION_BACKENDS = ("auto", "reference", "block_local", "splash", "cudnn")
REMAT_POLICIES = ("none", "full", "dots")
COMPUTE_DTYPES = ("float32", "bfloat16")
VECTOR_FORMATS = ("float32", "float16", "int8", "uint8", "binary", "ubinary")
WEIGHT_FORMATS = ("q4_0", "q8_0", "int4_channel", "int8_channel")

# Gemma 3: five sliding-window layers, then a global one; layer i is global iff
# (i + 1) % 6 == 0.
GEMMA3_PATTERN = ("local",) * 5 + ("global",)


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


@contextlib.contextmanager
def _known_keys() -> Iterator[None]:
  """Turns what a wrong key raises into a ConfigError."""
  try:
    yield
  except (KeyError, TypeError) as error:
    raise ConfigError(
      f"model configuration: {error}; it was written by another version of embgemma"
    ) from error


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  """Shape of a Gemma 3 text stack (architecture of arXiv 2503.19786).

  Attributes:
    vocab_size: Rows of the embedding table, V.
    num_layers: Blocks; the last repetition of `attention_pattern` may be partial.
    width: Residual stream width, D.
    mlp_width: Hidden width of the gated feed-forward.
    num_heads: Query heads, H.
    num_kv_heads: Key/value heads, K; divides H.
    head_dim: Width of a head; even, because RoPE rotates halves.
    attention_pattern: Kinds of the layers of one repeating group; kept as a tuple.
    mask: "bidirectional" or "causal".
    window: (left, right) keys that a query of a local layer sees besides itself,
      both inclusive. EmbeddingGemma: (256, 256); causal Gemma 3 with
      sliding_window 512: (511, 0).
    rope_base_local: RoPE base of local layers.
    rope_base_global: RoPE base of global layers.
    rope_factor_global: Positions of global layers are divided by it ("linear"
      scaling): 8 in T5Gemma 2 and in Gemma 3 from 4B on.
    query_scalar: Queries are scaled by query_scalar ** -0.5; None is head_dim.
    query_key_norm: Whether queries and keys are normed; Gemma 3's are, Gemma 2's
      (and so T5Gemma's) are not.
    norm_epsilon: Added to the mean square inside RMSNorm.
    initial_branch_gain: Gain (1 + scale) that the norms after attention and
      feed-forward start with. Gemma's is 1; below it a stack trained from scratch
      starts close to the sum of its token embeddings and learns sooner
      (docs/performance.md), as with LayerScale (arXiv 2103.17239).
    max_length: Longest text in tokens, BOS and EOS included.
    dtype: Compute dtype, "float32" or "bfloat16". Parameters are float32.
    remat: What the backward pass recomputes: "none", "full" (keep only the
      input of each layer group) or "dots" (keep matmul outputs).
    attention: How attention is computed: "auto" (what suits the devices),
      "reference", "block_local", "splash" (TPU) or "cudnn" (GPU); see
      `embgemma.models.attention`. The result is the same but for rounding.
    dropout_rate: Of the outputs of attention and feed-forward, in training. None of
      Gemma's models has any; T5Gemma's configuration does.
  """

  vocab_size: int
  num_layers: int
  width: int
  mlp_width: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  attention_pattern: Sequence[str] = GEMMA3_PATTERN
  mask: str = "bidirectional"
  window: Sequence[int] = (256, 256)
  rope_base_local: float = 10_000.0
  rope_base_global: float = 1_000_000.0
  rope_factor_global: float = 1.0
  query_scalar: float | None = None
  query_key_norm: bool = True
  norm_epsilon: float = 1e-6
  initial_branch_gain: float = 1.0
  max_length: int = 2048
  dtype: str = "float32"
  remat: str = "none"
  attention: str = "auto"
  dropout_rate: float = 0.0

  def __post_init__(self):
    # gin and JSON give lists; a configuration must be hashable.
    object.__setattr__(self, "attention_pattern", tuple(self.attention_pattern))
    window = tuple(self.window) if isinstance(self.window, Sequence) else self.window
    object.__setattr__(self, "window", window)
    name = "TransformerConfig"
    for field in (
      "vocab_size",
      "num_layers",
      "width",
      "mlp_width",
      "num_heads",
      "num_kv_heads",
      "head_dim",
      "max_length",
    ):
      value = getattr(self, field)
      _require(
        isinstance(value, int) and value > 0,
        f"{name}.{field} must be a positive integer, got {value!r}",
      )
    _require(
      self.num_heads % self.num_kv_heads == 0,
      f"{name}.num_heads ({self.num_heads}) must be a multiple of "
      f"num_kv_heads ({self.num_kv_heads})",
    )
    _require(
      self.head_dim % 2 == 0,
      f"{name}.head_dim must be even for RoPE, got {self.head_dim}",
    )
    _require(
      bool(self.attention_pattern)
      and all(kind in ATTENTION_KINDS for kind in self.attention_pattern),
      f"{name}.attention_pattern must list {ATTENTION_KINDS}, "
      f"got {self.attention_pattern}",
    )
    for field in (
      "rope_base_local",
      "rope_base_global",
      "rope_factor_global",
      "norm_epsilon",
      *(() if self.query_scalar is None else ("query_scalar",)),
    ):
      value = getattr(self, field)
      _require(
        isinstance(value, int | float) and 0 < value < math.inf,
        f"{name}.{field} must be > 0 and finite, got {value!r}",
      )
    _require(
      self.mask in MASK_KINDS,
      f"{name}.mask must be one of {MASK_KINDS}, got {self.mask!r}",
    )
    _require(
      isinstance(self.window, tuple)
      and len(self.window) == 2
      and all(isinstance(side, int) and side >= 0 for side in self.window),
      f"{name}.window must be two non-negative integers (left, right), "
      f"got {self.window}",
    )
    _require(
      self.dtype != "float16",
      f"{name}.dtype float16 is not supported: Gemma 3 activations exceed its "
      "largest value (65,504); use 'bfloat16' or 'float32'",
    )
    _require(
      self.dtype in COMPUTE_DTYPES,
      f"{name}.dtype must be one of {COMPUTE_DTYPES}, got {self.dtype!r}",
    )
    _require(
      self.remat in REMAT_POLICIES,
      f"{name}.remat must be one of {REMAT_POLICIES}, got {self.remat!r}",
    )
    _require(
      self.attention in ATTENTION_BACKENDS,
      f"{name}.attention must be one of {ATTENTION_BACKENDS}, got {self.attention!r}",
    )
    _require(
      isinstance(self.dropout_rate, int | float) and 0 <= self.dropout_rate < 1,
      f"{name}.dropout_rate must be >= 0 and < 1, got {self.dropout_rate!r}",
    )

  @property
  def layer_kinds(self) -> tuple[str, ...]:
    """Attention kind of every layer, first to last."""
    pattern = self.attention_pattern
    return tuple(pattern[i % len(pattern)] for i in range(self.num_layers))


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters beside frozen kernels (arXiv 2106.09685).

  Attributes:
    rank: r, columns of A and rows of B.
    alpha: The adapters' product is scaled by alpha / rank (section 4.1).
    targets: Patterns searched in the path of a linear map, such as
      "encoder/groups/layer_0/attention/query". The default is every map of the
      encoder's layers, as QLoRA advises (arXiv 2305.14314, section 4).
  """

  rank: int = 16
  alpha: float = 32.0
  targets: Sequence[str] = (
    "encoder/.*/attention/(query|key|value|output)$",
    "encoder/.*/mlp/(gate|up|down)$",
  )

  def __post_init__(self):
    _require(
      isinstance(self.rank, int) and self.rank > 0,
      f"LoraConfig.rank must be a positive integer, got {self.rank!r}",
    )
    _require(
      0 < self.alpha < math.inf,
      f"LoraConfig.alpha must be > 0 and finite, got {self.alpha!r}",
    )
    _require(
      isinstance(self.targets, Sequence)
      and not isinstance(self.targets, str)
      and bool(self.targets),
      f"LoraConfig.targets must be a list of patterns, got {self.targets!r}",
    )
    object.__setattr__(self, "targets", tuple(self.targets))
    for pattern in self.targets:
      try:
        re.compile(pattern)
      except re.error as error:
        raise ConfigError(
          f"LoraConfig.targets: {pattern!r} is no pattern: {error}"
        ) from error

  @property
  def scale(self) -> float:
    """Factor on the product of the adapters."""
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
  """Which parameters have which format (`models.quantization`).

  Attributes:
    rules: (pattern, format): a pattern is searched in the path of a matrix, such as
      "encoder/groups/layer_0/attention/query/kernel", and the first that is found
      counts. What follows no rule stays as it is; so do vectors.

  Raises:
    ConfigError: a pattern or a format that is none.
  """

  rules: Sequence[Sequence[str]]

  def __post_init__(self) -> None:
    object.__setattr__(self, "rules", tuple(map(tuple, self.rules)))
    _require(bool(self.rules), "QuantizationConfig.rules: none; leave quantization out")
    for rule in self.rules:
      _require(
        len(rule) == 2 and rule[1] in WEIGHT_FORMATS,
        f"QuantizationConfig.rules: {rule} must be (pattern, format) with one of the "
        f"formats {', '.join(WEIGHT_FORMATS)}",
      )
      try:
        re.compile(rule[0])
      except re.error as error:
        raise ConfigError(
          f"QuantizationConfig.rules: {rule[0]!r} is no pattern: {error}"
        ) from error


@dataclasses.dataclass(frozen=True)
class EmbedderConfig:
  """An encoder, a pooler and the two linear heads (arXiv 2509.20354, section 2.1).

  Attributes:
    transformer: The encoder.
    pooler: "mean", "first", "last" or "attention".
    pooler_heads: Heads of the attention pooler; divides the encoder's width.
    hidden_width: d_U, between the two heads (EmbeddingGemma: 3072); None is a model
      without heads.
    embedding_width: d, of the result (EmbeddingGemma: 768); without heads the
      encoder's width.
    matryoshka_widths: Prefix lengths trained to stand alone, widest first.
    lora: Adapters beside the kernels; None is a model without.
    quantization: Formats that it computes with, whose parameters are kept as they are;
      None is none.
  """

  transformer: TransformerConfig
  pooler: str = "mean"
  pooler_heads: int = 4
  hidden_width: int | None = 3072
  embedding_width: int = 768
  matryoshka_widths: Sequence[int] = (768, 512, 256, 128)
  lora: LoraConfig | None = None
  quantization: QuantizationConfig | None = None

  def __post_init__(self):
    object.__setattr__(self, "matryoshka_widths", tuple(self.matryoshka_widths))
    _require(
      self.quantization is None or isinstance(self.quantization, QuantizationConfig),
      "EmbedderConfig.quantization must be a QuantizationConfig or None, got "
      f"{self.quantization!r}",
    )
    _require(
      self.lora is None or isinstance(self.lora, LoraConfig),
      f"EmbedderConfig.lora must be a LoraConfig or None, got {self.lora!r}",
    )
    _require(
      isinstance(self.transformer, TransformerConfig),
      "EmbedderConfig.transformer must be a TransformerConfig, "
      f"got {self.transformer!r}",
    )
    _require(
      self.pooler in POOLERS,
      f"EmbedderConfig.pooler must be one of {POOLERS}, got {self.pooler!r}",
    )
    _require(
      self.pooler != "attention"
      or (self.pooler_heads > 0 and self.transformer.width % self.pooler_heads == 0),
      f"EmbedderConfig.pooler_heads ({self.pooler_heads}) must divide the encoder's "
      f"width ({self.transformer.width})",
    )
    for field in ("hidden_width", "embedding_width"):
      value = getattr(self, field)
      _require(
        (isinstance(value, int) and value > 0)
        or (value is None and field == "hidden_width"),
        f"EmbedderConfig.{field} must be a positive integer, got {value!r}",
      )
    _require(
      self.hidden_width is not None or self.embedding_width == self.transformer.width,
      f"EmbedderConfig.embedding_width ({self.embedding_width}) must be the encoder's "
      f"width ({self.transformer.width}) where hidden_width is None (no heads)",
    )
    for width in self.matryoshka_widths:
      _require(
        0 < width <= self.embedding_width,
        f"EmbedderConfig.matryoshka_widths: {width} is not in "
        f"1..{self.embedding_width} (embedding_width)",
      )

  def to_json(self) -> dict[str, Any]:
    """A JSON object from which `from_json` builds an equal configuration."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> "EmbedderConfig":
    """The configuration kept in a checkpoint.

    Raises:
      ConfigError: a key is unknown or missing.
    """
    with _known_keys():
      parts: dict[str, Any] = {
        "transformer": TransformerConfig(**values["transformer"])
      }
      if values.get("lora") is not None:
        parts["lora"] = LoraConfig(**values["lora"])
      if values.get("quantization") is not None:
        parts["quantization"] = QuantizationConfig(**values["quantization"])
      return cls(**{**values, **parts})


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
  """Pretrained stacks that are no embedder yet: without pooling and heads.

  Attributes:
    encoder: None in a decoder-only model.
    decoder: None where an encoder alone was imported.
    cross_attention: How the decoder reads the encoder. "merged": its self-attention
      sees the encoder's states as further keys (T5Gemma 2, arXiv 2512.14856);
      "separate": a sublayer of its own does (T5Gemma, arXiv 2504.06225), and the
      two stacks may differ in width, depth and heads.
    shared_table: Whether the encoder's token table is the decoder's too (T5Gemma 2)
      or the decoder has its own (T5Gemma). Either is the output matrix as well.
  """

  encoder: TransformerConfig | None = None
  decoder: TransformerConfig | None = None
  cross_attention: str = "merged"
  shared_table: bool = True

  def __post_init__(self):
    for field, mask in (("encoder", "bidirectional"), ("decoder", "causal")):
      stack = getattr(self, field)
      if stack is None:
        continue
      _require(
        isinstance(stack, TransformerConfig),
        f"BackboneConfig.{field} must be a TransformerConfig or None, got {stack!r}",
      )
      _require(
        stack.mask == mask,
        f"BackboneConfig.{field}: TransformerConfig.mask must be {mask!r}, got "
        f"{stack.mask!r}",
      )
    _require(
      self.encoder is not None or self.decoder is not None,
      "BackboneConfig needs an encoder or a decoder",
    )
    _require(
      self.cross_attention in CROSS_ATTENTIONS,
      f"BackboneConfig.cross_attention must be one of {CROSS_ATTENTIONS}, got "
      f"{self.cross_attention!r}",
    )
    if self.shared_table:
      self._require_equal(
        ("width", "vocab_size"),
        "they share one token table (BackboneConfig.shared_table): make them equal, "
        "or give each its own",
      )
    if self.cross_attention == "merged":
      self._require_equal(
        ("width", "num_heads", "num_kv_heads", "head_dim"),
        "merged attention (BackboneConfig.cross_attention) needs them equal, "
        "'separate' does not",
      )

  @property
  def stacks(self) -> tuple[TransformerConfig, ...]:
    """Encoder and decoder, as far as they are there."""
    return tuple(s for s in (self.encoder, self.decoder) if s is not None)

  def _require_equal(self, fields: Sequence[str], why: str) -> None:
    if self.encoder is None or self.decoder is None:
      return
    for field in fields:
      encoder, decoder = getattr(self.encoder, field), getattr(self.decoder, field)
      _require(
        encoder == decoder,
        f"{field} of the encoder is {encoder}, of the decoder {decoder}; {why}",
      )

  def to_json(self) -> dict[str, Any]:
    """A JSON object from which `from_json` builds an equal configuration."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> "BackboneConfig":
    """The configuration kept in a checkpoint.

    Raises:
      ConfigError: a key is unknown or missing.
    """
    with _known_keys():
      stacks = {
        field: TransformerConfig(**values[field])
        for field in ("encoder", "decoder")
        if values.get(field) is not None
      }
      return cls(**{**values, **stacks})


# How a stack is computed: no number that is kept depends on it.
_COMPUTED = ("remat", "attention", "dropout_rate")


def settings(config: EmbedderConfig | BackboneConfig) -> dict[str, Any]:
  """What a model is, by name, such as "transformer.width"; not how it is computed."""
  values: dict[str, Any] = {"kind": type(config).__name__}
  for key, value in config.to_json().items():
    if isinstance(value, dict):
      values |= {f"{key}.{name}": inner for name, inner in value.items()}
    else:
      values[key] = value
  return {k: v for k, v in values.items() if k.rpartition(".")[2] not in _COMPUTED}
