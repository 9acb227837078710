"""The command line. Heavy imports happen inside commands: `--help` is instant."""

import signal
import sys
from collections.abc import Sequence

from embgemma import flags, process
from embgemma.commands import (
  data,
  embedding,
  evaluation,
  models,
  recipe,
  report,
  search,
  training,
)
from embgemma.errors import ConfigError, EmbgemmaError

_CONFIGURED = {
  "eval": evaluation.run_eval,
  "cache": data.run_cache,
  "teach": data.run_teach,
  "mine": data.run_mine,
  "recipe": recipe.run_recipe,
  "explain": training.run_explain,
  "precompile": training.run_precompile,
}
_OF_MODELS = {
  "embed": embedding.run_embed,
  "import": models.run_import,
  "export": models.run_export,
  "soup": models.run_soup,
  "extract": models.run_extract,
  "quantize": models.run_quantize,
  "report": report.run_report,
}
# What is unfinished when they are terminated is removed on the way.
_CLEARED = frozenset(
  {
    "cache",
    "teach",
    "mine",
    "search",
    "recipe",
    "import",
    "export",
    "soup",
    "extract",
    "quantize",
  }
)


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs one command; exits with 1 and one message on bad input."""
  command_line = list(sys.argv[1:] if arguments is None else arguments)
  process.quieten_libraries()
  try:
    kept, bindings = flags.split_gin_overrides(command_line)
    options = flags.parser().parse_args(kept)
    command = options.command
    if bindings and not hasattr(options, "gin_file"):
      raise ConfigError(f"`embgemma {command}` takes no --gin flags")
    if command in _CLEARED:
      signal.signal(signal.SIGTERM, process.end)
    if command == "train":
      # Ctrl-C wherever training does not listen.
      with process.handling((signal.SIGINT,), process.leave):
        training.run_train(options, bindings, command_line[1:])
    elif command == "search":
      search.run_search(options, bindings, command_line[1:])
    elif command in _CONFIGURED:
      _CONFIGURED[command](options, bindings)
    else:
      _OF_MODELS[command](options)
  except EmbgemmaError as error:
    print(f"embgemma: error: {error}", file=sys.stderr)
    raise SystemExit(1) from None
  except KeyboardInterrupt:
    print("embgemma: interrupted", file=sys.stderr)
    raise SystemExit(128 + signal.SIGINT) from None
