"""One step of training."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import optax
from jax.sharding import Mesh, PartitionSpec

from embgemma.training import partitioning
from embgemma.training.learners import Learner, parameter_parts
from embgemma.training.optimizers import OptimizerConfig, join, split_trainable
from embgemma.training.partitioning import BATCH_AXES
from embgemma.training.train_state import TrainState
from embgemma.typing import Array, Metrics, Params, PyTree


@dataclasses.dataclass(frozen=True, eq=False)  # jit hashes it: by identity
class TrainStep:
  """Gradient, clip, update: (state, batch) -> (state, metrics).

  Attributes:
    learner: The model and its loss.
    optimizer: Clipping and update rule.
    mesh: Devices of the step.
    specs: How the parameters are split over them, see `partitioning.manual_specs`.
    ema_decay: Of the averaged parameters, if the state keeps them.
    trainable: See `OptimizerConfig.trainable`; other parameters and their averages
      leave a step bit for bit as they entered it.
    seed: Of dropout.
  """

  learner: Learner
  optimizer: optax.GradientTransformation
  mesh: Mesh
  specs: PyTree
  ema_decay: float | None = None
  trainable: Sequence[str] | None = None
  seed: int = 0

  def __call__(self, state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
    gradients, metrics = self.gradients(state.params, batch, state.step)
    trainable, frozen = split_trainable(state.params, self.trainable)
    updates, opt_state = self.optimizer.update(gradients, state.opt_state, trainable)
    trainable = optax.apply_updates(trainable, updates)
    ema = state.ema
    if ema is not None and self.ema_decay is not None:
      ema = self._averaged(trainable["model"], ema, self.ema_decay)
    params = join(trainable, frozen)
    new_state = TrainState(state.step + 1, params, opt_state, ema)
    return new_state, metrics | gradient_norms(gradients)

  def gradients(
    self, params: Params, batch: PyTree, step: Array
  ) -> tuple[Params, Metrics]:
    """Gradients of the trainable parameters, split as these are, and the metrics."""
    specs, frozen_specs = split_trainable(self.specs, self.trainable)
    trainable, frozen = split_trainable(params, self.trainable)

    def on_shard(trainable, frozen, batch, step):
      gradients, metrics = self.learner.gradients(
        partitioning.gather(trainable, specs),
        partitioning.gather(frozen, frozen_specs),
        batch,
        self._dropout_key(step),
      )
      return partitioning.sum_gradients(gradients, specs), metrics

    return jax.shard_map(
      on_shard,
      mesh=self.mesh,
      in_specs=(specs, frozen_specs, self.learner.batch_specs, PartitionSpec()),
      out_specs=(specs, PartitionSpec()),
      axis_names=partitioning.manual_axes(self.mesh),
      check_vma=False,  # losses are differentiated as shares of the whole
    )(trainable, frozen, batch, step)

  def _dropout_key(self, step: Array) -> Array:
    key = jax.random.fold_in(jax.random.key(self.seed), step)
    return jax.random.fold_in(key, jax.lax.axis_index(BATCH_AXES))

  def _averaged(self, trainable: Params, ema: Params, decay: float) -> Params:
    # The average of equal values may round to another one: frozen ones stay out.
    moving, still = split_trainable({"model": ema}, self.trainable)
    moved = optax.incremental_update(trainable, moving["model"], 1.0 - decay)
    return join({"model": moved}, still)["model"]


def make_train_step(
  learner: Learner,
  optimizer: OptimizerConfig,
  train_steps: int,
  mesh: Mesh,
  abstract: TrainState,
  ema_decay: float | None = None,
  seed: int = 0,
) -> Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]:
  """The jitted step of a run; it donates the state.

  Args:
    learner: The model and its loss.
    optimizer: Update rule and schedule.
    train_steps: Of the run.
    mesh: Devices of the step, which need not be there to lower and compile it.
    abstract: The state's shapes and shardings, see `abstract_state`.
    ema_decay: Of the averaged parameters, if the state keeps them.
    seed: Of dropout.
  """
  step = TrainStep(
    learner,
    optimizer.build(train_steps),
    mesh,
    partitioning.manual_specs(abstract.params, mesh),
    ema_decay,
    optimizer.trainable,
    seed,
  )

  def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
    return step(state, batch)  # a function: programs and traces get its name

  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def gradient_norms(gradients: Params) -> Metrics:
  """Global norms of the gradient: of all, and of each part that is trained."""
  parts = parameter_parts(gradients["model"])
  norms = {f"gradient_norm/{k}": optax.tree.norm(v) for k, v in parts.items()}
  return {"gradient_norm": optax.tree.norm(gradients), **norms}
