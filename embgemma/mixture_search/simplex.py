"""Mixtures proposed by Bayesian optimisation on the simplex of rates.

EmbeddingGemma's mixtures come from Bayesian optimisation that starts from one mixture
and ten Dirichlet draws (arXiv 2509.20354, section 2.3); algorithm, objective and number
of trials are not published.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import torch
from botorch import acquisition, fit, models
from botorch.acquisition.objective import GenericMCObjective
from botorch.models.transforms import input as input_transforms
from botorch.models.transforms.outcome import Standardize
from botorch.optim import optimize_acqf
from botorch.utils.multi_objective.scalarization import get_chebyshev_scalarization
from gpytorch.mlls import SumMarginalLogLikelihood
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from embgemma.typing import Float

SCORES = "scores"  # user attribute of a finished trial: objective -> score
_RATE = FloatDistribution(0.0, 1.0)
_RESTARTS, _RAW_SAMPLES = 4, 128  # of the acquisition's optimisation
_LEAST_TRIALS = 3  # that a Gaussian process is fitted to


class SimplexSampler(optuna.samplers.BaseSampler):
  """Proposes the rates of groups of tasks; they sum to 1.

  A Gaussian process per objective on the square roots of rates (their distance is
  Hellinger's, so that 0 and 0.01 differ more than 0.5 and 0.51), with noise inferred;
  the acquisition is noisy expected improvement (arXiv 2310.20708), in which trials that
  others run are pending points, maximised under the constraint that rates sum to 1.
  With several objectives each trial draws weights for them and scalarises by augmented
  Chebyshev (ParEGO, Knowles 2006), so that mixtures for one objective appear.

  Args:
    groups: Names of the parameters.
    objectives: Keys of the user attribute `SCORES`; all higher is better.
    seed: A proposal is a function of it, the trial's index, finished trials and those
      that others run.
    index: Of a trial in the search, whoever had it before; trials go in its order.
    fixed_rates: The mixture of a trial that is not proposed; else None.
  """

  def __init__(
    self,
    groups: Iterable[str],
    objectives: Iterable[str],
    seed: int,
    index: Callable[[FrozenTrial], int] = lambda trial: trial.number,
    fixed_rates: Callable[[FrozenTrial], Mapping[str, float] | None] = lambda _: None,
  ):
    self._groups = tuple(groups)
    self._objectives = tuple(objectives)
    self._seed = seed
    self._index = index
    self._fixed_rates = fixed_rates

  def infer_relative_search_space(
    self, study: optuna.Study, trial: FrozenTrial
  ) -> dict[str, BaseDistribution]:
    return dict.fromkeys(self._groups, _RATE)

  def sample_relative(
    self,
    study: optuna.Study,
    trial: FrozenTrial,
    search_space: Mapping[str, BaseDistribution],
  ) -> dict[str, float]:
    fixed = self._fixed_rates(trial)
    if fixed is not None:
      return dict(fixed)
    states = (TrialState.COMPLETE, TrialState.RUNNING)
    # A trial that is done again, as its worker was killed, has a later number.
    trials = sorted(study.get_trials(deepcopy=False, states=states), key=self._index)
    done = [
      t for t in trials if t.state is TrialState.COMPLETE and SCORES in t.user_attrs
    ]
    running = [
      t
      for t in trials
      if t.state is TrialState.RUNNING
      and t.number != trial.number
      and len(t.params) == len(self._groups)
    ]
    generator = np.random.default_rng([self._seed, self._index(trial)])
    if len(done) < _LEAST_TRIALS:
      rates = generator.dirichlet(np.ones(len(self._groups)))
    else:
      rates = propose(
        self._rates(done), self._scores(done), self._rates(running), generator
      )
    return {g: float(r) for g, r in zip(self._groups, rates, strict=True)}

  def sample_independent(
    self,
    study: optuna.Study,
    trial: FrozenTrial,
    param_name: str,
    param_distribution: BaseDistribution,
  ) -> Any:
    raise NotImplementedError(f"{param_name} is no group of {self._groups}")

  def _rates(self, trials: Sequence[FrozenTrial]) -> Float[np.ndarray, "n groups"]:
    rates = [[t.params[group] for group in self._groups] for t in trials]
    return np.reshape(np.asarray(rates, np.float64), (-1, len(self._groups)))

  def _scores(self, trials: Sequence[FrozenTrial]) -> Float[np.ndarray, "n objectives"]:
    return np.array(
      [[t.user_attrs[SCORES][o] for o in self._objectives] for t in trials]
    )


def propose(
  rates: Float[np.ndarray, "n groups"],
  scores: Float[np.ndarray, "n objectives"],
  pending: Float[np.ndarray, "p groups"],
  generator: np.random.Generator,
) -> Float[np.ndarray, " groups"]:
  """The mixture to try next, float64, summing to 1.

  Args:
    rates: Of finished trials.
    scores: Theirs, higher is better.
    pending: Mixtures whose scores are awaited.
    generator: Of the objectives' weights and of the optimiser's starts.
  """
  with torch.random.fork_rng(devices=()), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of fits that were tried again
    torch.manual_seed(int(generator.integers(2**31)))
    model = fitted(rates, scores)
    objective = None
    if scores.shape[1] > 1:
      weights = torch.tensor(generator.dirichlet(np.ones(scores.shape[1])))
      scalarised = get_chebyshev_scalarization(weights, torch.tensor(scores))
      objective = GenericMCObjective(lambda samples, X: scalarised(samples, X))  # noqa: N803
    improvement = acquisition.qLogNoisyExpectedImprovement(
      model,
      torch.tensor(rates),
      objective=objective,
      X_pending=torch.tensor(pending) if len(pending) else None,
    )
    groups = rates.shape[1]
    found, _ = optimize_acqf(
      improvement,
      torch.tensor([[0.0] * groups, [1.0] * groups], dtype=torch.float64),
      q=1,
      num_restarts=_RESTARTS,
      raw_samples=_RAW_SAMPLES,
      equality_constraints=[
        (torch.arange(groups), torch.ones(groups, dtype=torch.float64), 1.0)
      ],
    )
  proposed = np.clip(found[0].numpy(), 0.0, None)
  return proposed / proposed.sum()


def posterior_means(
  rates: Float[np.ndarray, "n groups"], scores: Float[np.ndarray, "n objectives"]
) -> Float[np.ndarray, "n objectives"]:
  """Scores of the trials without their noise: what Gaussian processes make of all."""
  with warnings.catch_warnings(), torch.no_grad():
    warnings.simplefilter("ignore")
    with torch.enable_grad():
      model = fitted(rates, scores)
    return model.posterior(torch.tensor(rates)).mean.numpy()


class _SquareRoots(input_transforms.InputTransform, torch.nn.Module):
  """Of rates, away from 0, where the derivative is none."""

  is_one_to_many = False

  def __init__(self):
    super().__init__()
    self.transform_on_train = True
    self.transform_on_eval = True
    self.transform_on_fantasize = True

  def transform(self, X: torch.Tensor) -> torch.Tensor:  # noqa: N803, BoTorch's name
    return X.clamp_min(1e-6).sqrt()


def fitted(
  rates: Float[np.ndarray, "n groups"], scores: Float[np.ndarray, "n objectives"]
) -> models.ModelListGP:
  """A Gaussian process per objective."""
  made = [
    models.SingleTaskGP(
      torch.tensor(rates),
      torch.tensor(column)[:, None],
      outcome_transform=Standardize(1),
      input_transform=_SquareRoots(),
    )
    for column in scores.T
  ]
  model = models.ModelListGP(*made)
  fit.fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
  return model
