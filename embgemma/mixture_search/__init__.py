"""Which rates of a mixture give the best models: Bayesian optimisation over them."""
