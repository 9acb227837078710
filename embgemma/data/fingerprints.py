"""Short names for contents: what a cache is keyed by."""

import hashlib
import importlib.util
import json
import pathlib
from typing import Any

from embgemma.errors import ConfigError


def digest(value: Any) -> str:
  """16 hexadecimal digits that identify a JSON value."""
  encoded = json.dumps(value, sort_keys=True).encode()
  return hashlib.blake2b(encoded, digest_size=8).hexdigest()


def source_fingerprint(*parts: Any) -> str:
  """32 hexadecimal digits that identify values, by their text where JSON has none."""
  encoded = json.dumps(parts, sort_keys=True, default=str).encode()
  return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def module_fingerprint(name: str) -> str:
  """Hash of a Python module's file, or of all of a package's, found without importing.

  What the module reads or imports beside is not watched.

  Raises:
    ConfigError: no such module.
  """
  try:
    spec = importlib.util.find_spec(name)
  except ModuleNotFoundError:
    spec = None
  if spec is None or not spec.origin:
    raise ConfigError(
      f"module {name!r}, named in MODULES, cannot be found; put it on PYTHONPATH"
    )
  own = pathlib.Path(spec.origin)
  paths = [own] if spec.submodule_search_locations is None else own.parent.rglob("*.py")
  contents = {str(p.relative_to(own.parent)): p.read_bytes().hex() for p in paths}
  return source_fingerprint("module", name, contents)
