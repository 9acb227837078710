import jax.numpy as jnp
import numpy as np
import pytest

from embgemma.data.reader import StepBatch
from embgemma.training.step_metrics import Interval, epoch_metrics


def batch(step, duplicates):
  return StepBatch(step, "task", 0, np.arange(8), None, 100, 125, duplicates)


@pytest.mark.parametrize(
  ("duplicates", "share"), [((0, 2, 4), 0.25), ((None, 4, None), 0.5), ((None,), None)]
)
def test_duplicates_of_an_interval(duplicates, share):
  interval = Interval(batch_size=8)
  for step, count in enumerate(duplicates):
    interval.add(step, batch(step, count), {"loss": jnp.float32(step)})
  interval.collect(0)
  summary = interval.summary()
  assert summary.get("duplicate_share") == share
  assert summary["loss"] == np.mean(range(len(duplicates)))
  assert summary["real_token_share"] == 0.8


def test_epochs_by_task_unless_there_are_very_many():
  assert epoch_metrics({"a": 0.5, "b": 2.0}) == {"epoch/a": 0.5, "epoch/b": 2.0}
  many = {f"task_{i}": i / 10 for i in range(65)}
  assert epoch_metrics(many) == {"epoch/least": 0.0, "epoch/most": 6.4}
  many.pop("task_0")
  assert len(epoch_metrics(many)) == 64
