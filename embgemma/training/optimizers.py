"""Optimizers and learning-rate schedules, all from optax."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from embgemma.errors import ConfigError
from embgemma.models import lora
from embgemma.typing import Params, PyTree

SCHEDULES = ("constant", "cosine", "linear", "wsd")
OPTIMIZERS = ("adamw", "adafactor")
# Zero-centred norm scales and the token table are not decayed.
NOT_DECAYED = r"(^|/)(scale|table)$"


def _path(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A learning rate over steps: linear warm-up, then by kind.

  Attributes:
    kind: "constant", "cosine", "linear" or "wsd" (warm-up, stable, linear decay
      over the last `decay_steps`).
    peak: Rate after the warm-up.
    warmup_steps: Steps from 0 to the peak; a fraction < 1 is of the run's steps.
    decay_steps: Of "wsd"; a fraction < 1 is of the run's steps.
    final_ratio: Rate at the end over the peak ("cosine", "linear", "wsd").
  """

  kind: str = "cosine"
  peak: float = 1e-4
  warmup_steps: int | float = 0.05
  decay_steps: int | float = 0.1
  final_ratio: float = 0.0

  def __post_init__(self):
    if self.kind not in SCHEDULES:
      raise ConfigError(f"Schedule.kind must be one of {SCHEDULES}, got {self.kind!r}")
    if not 0 < self.peak < math.inf:
      raise ConfigError(f"Schedule.peak must be > 0 and finite, got {self.peak!r}")

  def build(self, train_steps: int) -> optax.Schedule:
    """Step to learning rate, for a run of `train_steps`.

    Raises:
      ConfigError: warm-up and decay are longer than the run.
    """

    def steps(value: int | float) -> int:
      return round(value * train_steps) if 0 < value < 1 else int(value)

    warmup = steps(self.warmup_steps)
    decay = steps(self.decay_steps) if self.kind == "wsd" else 0
    rest = train_steps - warmup
    if warmup < 0 or decay < 0 or warmup + decay > train_steps:
      raise ConfigError(
        f"Schedule: {warmup} warm-up and {decay} decay steps do not fit into "
        f"TRAIN_STEPS {train_steps}; raise that, or lower Schedule.warmup_steps "
        "(WARMUP_STEPS) and decay_steps"
      )
    final = self.peak * self.final_ratio
    if self.kind == "cosine":
      after = optax.cosine_decay_schedule(self.peak, max(rest, 1), self.final_ratio)
    elif self.kind == "linear":
      after = optax.linear_schedule(self.peak, final, max(rest, 1))
    elif self.kind == "wsd":
      stable = optax.constant_schedule(self.peak)
      fall = optax.linear_schedule(self.peak, final, max(decay, 1))
      after = optax.join_schedules([stable, fall], [rest - decay])
    else:
      after = optax.constant_schedule(self.peak)
    if not warmup:
      return after
    # The first step already moves: (step + 1) / warmup.
    rise = optax.linear_schedule(self.peak / warmup, self.peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Clipping, then AdamW or Adafactor, then the schedule.

  Attributes:
    name: "adamw" or "adafactor".
    schedule: Of the learning rate.
    clip_norm: Largest global norm of the gradient; None does not clip.
    weight_decay: Decoupled; not on norm scales and the token table.
    b1: AdamW's first moment decay.
    b2: AdamW's second moment decay.
    epsilon: AdamW's.
    rate_multipliers: Pattern searched in a parameter's path, such as
      "projection_(up|down)", to a factor on its learning rate.
    trainable: Patterns searched in the model's parameter paths, such as
      "projection_up/kernel"; what none of them finds stays as it is. None is
      everything, or the adapters alone where the model has any.
    alone: Patterns of the parameters that train alone in the first `alone_steps`.
      Where there are none, those that a run from another checkpoint draws at random
      (see `adaptation.warm_up_patterns`).
    alone_steps: T5Gemma has 1,000, where cross-attention is random (arXiv 2504.06225,
      section 3); 0 trains everything from the start.
  """

  name: str = "adamw"
  schedule: Schedule = Schedule()
  clip_norm: float | None = 1.0
  weight_decay: float = 0.01
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8
  rate_multipliers: Mapping[str, float] = dataclasses.field(default_factory=dict)
  trainable: Sequence[str] | None = None
  alone: Sequence[str] = ()
  alone_steps: int = 0

  def __post_init__(self):
    if self.name not in OPTIMIZERS:
      raise ConfigError(
        f"OptimizerConfig.name must be one of {OPTIMIZERS}, got {self.name!r}"
      )
    if self.clip_norm is not None and not self.clip_norm > 0:
      raise ConfigError(
        f"OptimizerConfig.clip_norm must be > 0 or None, got {self.clip_norm!r}"
      )
    _check_patterns("rate_multipliers", self.rate_multipliers)
    if self.trainable is not None:
      if isinstance(self.trainable, str) or not self.trainable:
        raise ConfigError(
          "OptimizerConfig.trainable must be a list of patterns, or None, got "
          f"{self.trainable!r}"
        )
      object.__setattr__(self, "trainable", tuple(self.trainable))
      _check_patterns("trainable", self.trainable)
    if isinstance(self.alone, str):
      raise ConfigError(
        f"OptimizerConfig.alone must be a list of patterns, got {self.alone!r}"
      )
    object.__setattr__(self, "alone", tuple(self.alone))
    _check_patterns("alone", self.alone)
    if self.alone_steps < 0:
      raise ConfigError(
        f"OptimizerConfig.alone_steps must be >= 0, got {self.alone_steps}"
      )

  def check_steps(self, train_steps: int) -> None:
    """Refuses a run in which most parameters would never train.

    Raises:
      ConfigError: it ends while some still train alone.
    """
    if self.alone and self.alone_steps >= train_steps:
      raise ConfigError(
        f"{list(self.alone)} train alone for {self.alone_steps} steps, and the run has "
        f"TRAIN_STEPS {train_steps}; raise that or lower OptimizerConfig.alone_steps "
        "(ALONE_STEPS)"
      )

  def build(self, train_steps: int) -> optax.GradientTransformation:
    """The optax transformation of a run's trainable parameters."""

    def decayed(params: PyTree) -> PyTree:
      return jax.tree_util.tree_map_with_path(
        lambda path, _: not re.search(NOT_DECAYED, _parameter(path)), params
      )

    parts = []
    if self.clip_norm is not None:
      parts.append(optax.clip_by_global_norm(self.clip_norm))
    if self.name == "adamw":
      parts.append(optax.scale_by_adam(self.b1, self.b2, self.epsilon))
    else:
      parts += [optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)]
    parts.append(optax.add_decayed_weights(self.weight_decay, decayed))
    if self.rate_multipliers:
      parts.append(self._multiply_rates())
    parts.append(optax.scale_by_learning_rate(self.schedule.build(train_steps)))
    chain = optax.chain(*parts)
    return self._with_some_alone(chain) if self.alone and self.alone_steps else chain

  def _with_some_alone(
    self, inner: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    """Gradients and updates of all other parameters are zero in the first steps."""

    def init(params):
      _check_matches("alone", self.alone, params)
      return jnp.zeros((), jnp.int32), inner.init(params)

    def update(updates, state, params=None):
      step, inner_state = state

      def held(path, update):
        if any(re.search(p, _parameter(path)) for p in self.alone):
          return update
        return jnp.where(step < self.alone_steps, jnp.zeros_like(update), update)

      hold = functools.partial(jax.tree_util.tree_map_with_path, held)
      updates, inner_state = inner.update(hold(updates), inner_state, params)
      return hold(updates), (step + 1, inner_state)

    return optax.GradientTransformation(init, update)

  def _multiply_rates(self) -> optax.GradientTransformation:
    def check(params):
      _check_matches("rate_multipliers", self.rate_multipliers, params)
      return optax.EmptyState()

    def scale(updates, state, params=None):
      del params

      def scaled(path, update):
        name = _parameter(path)
        matching = (p for p in self.rate_multipliers if re.search(p, name))
        return update * math.prod(self.rate_multipliers[p] for p in matching)

      return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(check, scale)


def split_trainable(
  params: Params, patterns: Sequence[str] | None
) -> tuple[Params, Params]:
  """The parameters that training changes, and the others: subtrees without holes.

  Args:
    params: {"model": ..., "objective": ...}; the objective's are all trainable.
    patterns: `OptimizerConfig.trainable`.

  Raises:
    ConfigError: a pattern matches no parameter of the model.
  """
  flat = traverse_util.flatten_dict(params, keep_empty_nodes=True)
  names = {path: "/".join(path[1:]) for path in flat if path[0] == "model"}
  adapters = [name for name in names.values() if re.search(lora.PATTERN, name)]
  if patterns is None:
    patterns = (lora.PATTERN,) if adapters else ("",)
  for pattern in patterns:
    if not any(re.search(pattern, name) for name in names.values()):
      examples = ", ".join(sorted(names.values())[:4])
      raise ConfigError(
        f"OptimizerConfig.trainable: {pattern!r} matches no parameter of the model; "
        f"it has {len(names)}, such as {examples}"
      )
  if adapters and not any(re.search(p, name) for p in patterns for name in adapters):
    raise ConfigError(
      f"OptimizerConfig.trainable {list(patterns)} leaves every adapter as it is: add "
      "'lora_' to train them, or train without LoraConfig"
    )
  frozen = {
    path: flat.pop(path)
    for path, name in names.items()
    if not any(re.search(pattern, name) for pattern in patterns)
  }
  return traverse_util.unflatten_dict(flat), traverse_util.unflatten_dict(frozen)


def join(trainable: Params, frozen: Params) -> Params:
  """The leaves of both trees: what `split_trainable` took apart."""
  flat = traverse_util.flatten_dict(trainable, keep_empty_nodes=True)
  return traverse_util.unflatten_dict(flat | traverse_util.flatten_dict(frozen))


def _check_patterns(field: str, patterns: Iterable[str]) -> None:
  for pattern in patterns:
    try:
      re.compile(pattern)
    except re.error as error:
      raise ConfigError(
        f"OptimizerConfig.{field}: {pattern!r} is no pattern: {error}"
      ) from error


def _check_matches(field: str, patterns: Iterable[str], params: PyTree) -> None:
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  names = [_parameter(path) for path, _ in leaves]
  unmatched = [p for p in patterns if not any(re.search(p, name) for name in names)]
  if unmatched:
    raise ConfigError(
      f"OptimizerConfig.{field}: {sorted(unmatched)} match no parameter that is trained"
    )


def _parameter(path: tuple) -> str:
  """Path of a parameter, without the field of a flax metadata box."""
  keys = [key for key in path if not isinstance(key, jax.tree_util.GetAttrKey)]
  return _path(tuple(keys))
