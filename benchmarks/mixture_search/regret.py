"""How close to the best mixture a search comes, where the best is known.

    python benchmarks/mixture_search/regret.py [--groups 5 10 15] [--searches NAME …]

Objectives are synthetic: development sets that gain from each group of tasks in shares
drawn at random, with diminishing returns, less what too much of one group costs; all
concave, so that the best mixture is found to machine precision. Every search has the
seed, ten Dirichlet mixtures and 20 more; its choice is the mixture of the best
posterior mean of a Gaussian process. Regret is the best score less the choice's, in
the points of a score of about 10, where noise has a standard deviation of 0.2.
"""

import argparse
import functools
import time
import warnings
from collections.abc import Callable

import numpy as np
import optuna
from scipy.optimize import minimize

from embgemma.mixture_search import simplex

SEEDS, PROPOSED = 11, 20
Quality = Callable[[np.ndarray], float]


def problem(generator: np.random.Generator, groups: int) -> tuple[Quality, float]:
  """A concave quality of mixtures, and its highest value."""
  sets = 6
  shares = generator.dirichlet(np.full(groups, 0.5), size=sets) * groups
  scale = generator.uniform(0.15, 1.5, sets)
  amplitude = generator.uniform(5, 15, sets)
  cost = generator.uniform(0, 4, groups)

  def quality(rates: np.ndarray) -> float:
    gain = amplitude * (1 - np.exp(-(shares @ rates) / scale))
    return float(np.mean(gain) - cost @ np.square(rates))

  found = minimize(
    lambda rates: -quality(rates),
    np.full(groups, 1 / groups),
    bounds=[(0, 1)] * groups,
    constraints=[{"type": "eq", "fun": lambda rates: rates.sum() - 1}],
    method="SLSQP",
    options={"ftol": 1e-12, "maxiter": 1000},
  )
  return quality, -found.fun


def drawn(rates, scores, generator):
  del scores
  return generator.dirichlet(np.ones(rates.shape[1]))


def uniform(rates, scores, generator):
  """Independent rates, normalised."""
  del scores
  values = generator.uniform(size=rates.shape[1])
  return values / values.sum()


def bayesian(rates, scores, generator):
  return simplex.propose(rates, scores, rates[:0], generator)


def optuna_gp(rates, scores, generator):
  """Optuna's own sampler, over u of (0, 1) where rates are normalised -log u."""
  groups = rates.shape[1]
  space = {
    str(g): optuna.distributions.FloatDistribution(1e-3, 1) for g in range(groups)
  }
  sampler = optuna.samplers.GPSampler(
    seed=int(generator.integers(2**31)),
    n_startup_trials=0,
    deterministic_objective=False,
  )
  study = optuna.create_study(direction="maximize", sampler=sampler)
  for row, score in zip(rates, scores[:, 0], strict=True):
    gaps = row / row.max() * -np.log(1e-3)
    values = {str(g): float(u) for g, u in enumerate(np.clip(np.exp(-gaps), 1e-3, 1))}
    study.add_trial(
      optuna.create_trial(params=values, distributions=space, value=float(score))
    )
  trial = study.ask(space)
  gaps = -np.log([trial.params[str(g)] for g in range(groups)]) + 1e-9
  return gaps / gaps.sum()


SEARCHES = {
  "uniform": uniform,
  "dirichlet": drawn,
  "optuna GPSampler": optuna_gp,
  "embgemma": bayesian,
}


@functools.cache
def regret(search: str, groups: int, repeat: int, noise: float) -> float:
  generator = np.random.default_rng([repeat, groups])
  quality, best = problem(generator, groups)
  even = np.full((1, groups), 1 / groups)
  rates = np.concatenate([even, generator.dirichlet(np.ones(groups), SEEDS - 1)])
  errors = noise * generator.standard_normal(SEEDS + PROPOSED)
  scores = np.array([[quality(row)] for row in rates]) + errors[:SEEDS, None]
  for error in errors[SEEDS:]:
    proposed = SEARCHES[search](rates, scores, generator)
    rates = np.concatenate([rates, proposed[None]])
    scores = np.concatenate([scores, [[quality(proposed) + error]]])
  chosen = rates[simplex.posterior_means(rates, scores)[:, 0].argmax()]
  return best - quality(chosen)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--groups", type=int, nargs="+", default=(5, 10, 15))
  parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=SEARCHES)
  parser.add_argument("--repeats", type=int, default=20)
  parser.add_argument("--noise", type=float, default=0.2)
  options = parser.parse_args()
  warnings.simplefilter("ignore")
  optuna.logging.set_verbosity(optuna.logging.ERROR)
  print("| groups | search | regret: mean, median | standard error | s a search |")
  print("|---:|---|---:|---:|---:|")
  for groups in options.groups:
    for search in options.searches:
      began = time.monotonic()
      found = [
        regret(search, groups, repeat, options.noise)
        for repeat in range(options.repeats)
      ]
      seconds = (time.monotonic() - began) / options.repeats
      error = np.std(found, ddof=1) / np.sqrt(options.repeats)
      print(
        f"| {groups} | {search} | {np.mean(found):.3f}, {np.median(found):.3f} "
        f"| {error:.3f} | {seconds:.1f} |",
        flush=True,
      )


if __name__ == "__main__":
  main()
