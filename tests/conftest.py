"""Eight virtual devices, one thread pool each test process can share."""

import os

import hypothesis

# Before jax is imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes longer than what is compiled: without LLVM's optimisations.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if _FLAGS not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()

# Two shared cores: a slow example is no failure.
hypothesis.settings.register_profile(
  "embgemma",
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("embgemma")
