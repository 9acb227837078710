"""The process of a command: what it lets libraries do, and how it ends."""

import contextlib
import hashlib
import logging
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any


def quieten_libraries() -> None:
  """Keeps stderr to what the user can act on."""
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  handler = logging.StreamHandler()
  handler.setLevel(logging.WARNING)  # bm25s logs at DEBUG, whatever the root's level
  handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
  handler.addFilter(_is_news)
  logging.basicConfig(level=logging.WARNING, handlers=[handler])
  # Likewise what an asynchronous write leaves behind when it fails.
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
  sys.unraisablehook = _report_unraisable


def _is_news(record: logging.LogRecord) -> bool:
  # Orbax warns of its own options; it and asyncio log errors that also reach us.
  if record.name == "asyncio" or record.exc_info:
    return False
  return record.name != "absl" or record.levelno >= logging.ERROR


def _report_unraisable(unraisable: Any) -> None:
  # Tensorstore's threads go on when one has failed and Orbax has left its event loop.
  if str(unraisable.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def own_stderr() -> Iterator[IO[str]]:
  """The process's stderr, while what libraries write there is dropped.

  TensorFlow's C++ heeds no log level, and prints the traceback of a bad record.
  """
  sys.stderr.flush()
  with os.fdopen(os.dup(2), "w") as stderr, open(os.devnull, "wb") as null:
    os.dup2(null.fileno(), 2)
    try:
      yield stderr
    finally:
      sys.stderr.flush()
      os.dup2(stderr.fileno(), 2)


def keep_compilations() -> None:
  """Compiled programs stay on disk, unless JAX's own variable says where or not.

  Programs for CPUs use what the machine has: each kind has a directory of its own.
  """
  import jax

  from embgemma.data.cache_dirs import default_cache_dir

  if jax.config.values["jax_compilation_cache_dir"] is None:
    kind = hashlib.sha256(f"{platform.machine()} {_cpu_features()}".encode())
    directory = os.path.join(default_cache_dir(), "compiled", kind.hexdigest()[:12])
    jax.config.update("jax_compilation_cache_dir", directory)
    # JAX leaves out what compiles within a second: of small models, nearly all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _cpu_features() -> str:
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor()
  return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def use_virtual_devices(topologies: Sequence[str]) -> None:
  """Keeps JAX off accelerators, with as many CPU devices as the largest cpu:N."""
  os.environ["JAX_PLATFORMS"] = "cpu"
  counts = [int(n) for n in re.findall(r"\bcpu:(\d+)", ",".join(topologies))]
  flag = "--xla_force_host_platform_device_count"
  flags = os.environ.get("XLA_FLAGS", "")
  if counts and flag not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {flag}={max(counts)}".strip()


def run_child(command: Sequence[str], environment: Mapping[str, str]) -> int:
  """The exit status of a command that ends with this process.

  However this process is stopped short of SIGKILL; negative as `Popen.returncode`.
  """
  # In a group of its own a terminal's Ctrl-C reaches it through this process alone.
  process = subprocess.Popen(command, env=environment, process_group=0)
  with handling((signal.SIGINT, signal.SIGTERM), _ending_with(process)):
    return process.wait()


def _ending_with(process: subprocess.Popen[bytes]) -> Callable[[int, Any], None]:
  """A handler that ends a child and then this process."""

  def end(signum, frame):
    del frame
    process.terminate()
    with contextlib.suppress(ChildProcessError):
      deadline = time.monotonic() + 10
      while os.waitpid(process.pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
          process.kill()
        time.sleep(0.05)
    leave(signum)

  return end


@contextlib.contextmanager
def handling(signums: Sequence[int], handler: Callable[..., None]) -> Iterator[None]:
  """Has a handler for signals while the block runs."""
  previous = {signum: signal.signal(signum, handler) for signum in signums}
  try:
    yield
  finally:
    for signum, earlier in previous.items():
      signal.signal(signum, earlier)


def end(signum: int, frame: Any) -> None:
  """Ends as an exception does: what is unfinished is removed on the way."""
  del frame
  raise SystemExit(128 + signum)


def leave(signum: int, frame: Any = None) -> None:
  """Ends at once: there is nothing to save.

  What Python's own handler raises is swallowed by imports and callbacks of libraries.
  """
  del frame
  if signum == signal.SIGINT:
    os.write(2, b"embgemma: interrupted\n")
  os._exit(128 + signum)
