"""Where what can be made again is kept."""

import os


def default_cache_dir() -> str:
  """$EMBGEMMA_CACHE, or embgemma/ in the user's cache directory."""
  return os.environ.get("EMBGEMMA_CACHE") or user_cache_dir()


def user_cache_dir() -> str:
  """embgemma/ in the user's cache directory, on this machine."""
  base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  return os.path.join(base, "embgemma")
