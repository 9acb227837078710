"""The command line. Heavy imports happen inside commands: `--help` is instant."""

import argparse
import contextlib
import functools
import json
import os
import pathlib
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from embgemma import flags, outputs, process
from embgemma.errors import ConfigError, DataError, EmbgemmaError


def _configure(options: argparse.Namespace, bindings: Sequence[str]) -> None:
  from embgemma import gin_config

  if not options.gin_file:
    raise ConfigError(
      "no --gin_file; start from gin/stages/prefinetune.gin or gin/recipes/"
    )
  if options.on_bad_record:
    bindings = [*bindings, f"ON_BAD_RECORD={options.on_bad_record}"]
  gin_config.register()
  gin_config.parse(
    options.gin_file, bindings, [p for p in options.gin_search_paths.split(",") if p]
  )


def _data(options: argparse.Namespace, bindings: Sequence[str]) -> Any:
  """What a stage trains on; of the rest of its configuration nothing is needed."""
  from embgemma import gin_config

  _configure(options, bindings)
  gin_config.set_missing(TRAIN_STEPS=1, BATCH_SIZE=1, TEACHER=None)
  return gin_config.train_arguments(allowed=("MODEL_DIR",))["data"]


def _executor(options: argparse.Namespace) -> Any:
  """Where the shards of a cache are read."""
  from embgemma.data import executors

  if options.pipeline_options is not None:
    try:
      return executors.BeamPipeline(tuple(shlex.split(options.pipeline_options)))
    except ValueError as error:
      raise ConfigError(
        f"--pipeline_options={options.pipeline_options}: {error}; check its quotes"
      ) from error
  return executors.ProcessPool(options.workers)


def _cache(options: argparse.Namespace, bindings: Sequence[str]) -> None:
  _build(_data(options, bindings), _executor(options))


def _build(data: Any, executor: Any = None) -> None:
  """Builds what is missing of a stage's caches."""
  from embgemma.data import cache_builder

  try:
    with process.own_stderr() as stderr:
      cache_builder.build(
        data, lambda line: print(line, file=stderr, flush=True), executor
      )
  except (OSError, RuntimeError) as error:
    # ArrayRecord gives what the system said in a RuntimeError.
    if isinstance(error, RuntimeError) and "write() failed" not in str(error):
      raise
    raise DataError(
      f"{data.cache_root}: the cache cannot be written: {error}; free space or choose "
      "another CACHE_DIR. Complete caches are untouched."
    ) from error


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _teach(options: argparse.Namespace, bindings: Sequence[str]) -> None:
  from embgemma import gin_config
  from embgemma.teaching.teach import teach
  from embgemma.teaching.teachers import ApiLimits, open_teacher

  data = _pairs(options, bindings)
  if data.teacher is None:
    raise ConfigError("give the vectors a name: --gin.TEACHER=NAME")
  given = ("price", "texts_per_minute", "tokens_per_minute")
  limits = {name: getattr(options, name) for name in given}
  limits = {name: value for name, value in limits.items() if value is not None}
  process.keep_compilations()
  # What cannot work is said before anything is embedded.
  teacher = open_teacher(options.teacher, options.width, ApiLimits(**limits))
  arguments = gin_config.train_arguments(allowed=("MODEL_DIR",))
  arguments["objective"].check(arguments["model"].embedding_width, teacher.width)
  _build(data)
  with _said_errors(f"the vectors of {data.teacher!r}"):
    report = teach(
      data,
      teacher,
      data.teacher,
      options.dtype,
      _say,
      shard=(options.shard_index, options.shard_count),
      tasks=options.tasks.split(",") if options.tasks else None,
      max_cost=options.max_cost,
    )
  for task in report.tasks:
    state = task.remark or ("ready" if task.ready else "not all embedded yet")
    _say(f"{task.name}: {task.texts:,} texts, {state}")
  _say(f"{report.embedded:,} texts embedded, {report.stored:,} vectors in all")


@contextlib.contextmanager
def _said_errors(what: str) -> Iterator[None]:
  """Has errors of the file system end in a message; what is done stays."""
  try:
    yield
  except OSError as error:
    raise DataError(
      f"{error.filename or what}: {error.strerror or error}; what is done is kept: "
      "free space or allow writing there, and run the command again"
    ) from error


def _mine(options: argparse.Namespace, bindings: Sequence[str]) -> None:
  from rich.console import Console

  from embgemma import gin_config
  from embgemma.mining.mine import mine

  data = _pairs(options, bindings)
  rules = gin_config.resolve("MiningOptions")
  process.keep_compilations()
  searcher = _searcher(options.searcher)
  judge = _teacher(options.judge) if options.judge else None
  with _said_errors(options.output):
    report = mine(
      data,
      searcher,
      judge,
      rules,
      pathlib.Path(options.output),
      _say,
      overwrite=options.overwrite,
      keep_work=options.keep_work,
    )
  console = Console()
  for table in report.tables():
    console.print(table)


def _teacher(spec: str) -> Any:
  from embgemma.teaching.teachers import open_teacher

  if spec.startswith("gemini:"):
    raise ConfigError(
      f"{spec}: costs money, and mining makes no estimate; only `embgemma teach` does"
    )
  return open_teacher(spec, None)


def _searcher(spec: str) -> Any:
  from embgemma import gin_config

  if spec == "bm25":
    return gin_config.resolve("Bm25Searcher")
  from embgemma.mining.vectors import EmbeddedTexts

  return gin_config.resolve("VectorSearcher", texts=EmbeddedTexts(_teacher(spec)))


def _pairs(options: argparse.Namespace, bindings: Sequence[str]) -> Any:
  """What a stage of pairs trains on."""
  from embgemma.data.tasks import DataConfig

  data = _data(options, bindings)
  if not isinstance(data, DataConfig):
    raise ConfigError(
      f"`embgemma {options.command}` is for pairs; give a --gin_file such as "
      "gin/stages/finetune.gin"
    )
  return data


def _ensure_cached(data: Any, command_line: Sequence[str]) -> None:
  """Runs `embgemma cache` in a process of its own, so that TensorFlow ends with it."""
  from embgemma.data import cache

  if cache.manifest(data) is not None:
    return
  print("tokenising the tasks (once)", file=sys.stderr, flush=True)
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  kept = flags.without_process_flags(command_line)
  command = [sys.executable, "-m", "embgemma", "cache", *kept]
  code = process.run_child(command, environment)
  if code < 0:
    raise DataError(
      f"caching was killed by signal {-code} (9: perhaps out of memory); complete "
      "caches are kept, the same command goes on from there"
    )
  if code:
    raise SystemExit(code)


def _wait_for_cache(data: Any) -> None:
  """Returns once the first process has built the caches; it ends with that one."""
  from embgemma.data import cache

  while cache.manifest(data) is None:
    time.sleep(1)


def _train(
  options: argparse.Namespace, bindings: Sequence[str], command_line: Sequence[str]
) -> None:
  import gin

  from embgemma import gin_config
  from embgemma.training import distributed, loop, stages
  from embgemma.training.distributed import Processes
  from embgemma.training.stopping import Stopped

  processes = Processes(
    options.coordinator_address, options.process_count, options.process_index
  )
  _configure(options, bindings)
  arguments = gin_config.train_arguments()
  # What does not belong together is said before minutes of tokenising.
  stages.make_stage(*(arguments[name] for name in ("model", "objective", "data")))
  process.keep_compilations()
  if options.multiprocess or processes.count is not None:
    distributed.initialize(processes)
  if distributed.is_first():
    _ensure_cached(arguments["data"], command_line)
  else:
    _wait_for_cache(arguments["data"])
  try:
    with distributed.lost_peers():
      loop.train(**arguments, operative_gin=gin.operative_config_str())
  except Stopped as stopped:
    print(f"embgemma: {stopped}; the same command resumes", file=sys.stderr)
    raise SystemExit(128 + stopped.signum) from None


def _explain(options: argparse.Namespace, bindings: Sequence[str]) -> None:
  from rich.console import Console

  from embgemma import gin_config
  from embgemma.training.explain import explain

  _configure(options, bindings)
  explain(**gin_config.train_arguments(allowed=("MODEL_DIR",)), console=Console())


def _counts(flag: str, value: str) -> list[int]:
  """Positive numbers separated by commas."""
  if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", value):
    raise ConfigError(f"--{flag}={value}: write 1024,4096")
  return [int(number) for number in value.split(",")]


def _precompile(options: argparse.Namespace, bindings: Sequence[str]) -> None:
  topologies = options.topology.split(",")
  process.use_virtual_devices(topologies)
  from rich.console import Console

  from embgemma import gin_config
  from embgemma.training import precompile, precompile_report
  from embgemma.training.step_plan import text_lengths

  _configure(options, bindings)
  per_chip = options.batch_per_chip
  given = options.batch_size or per_chip
  flag = "batch_per_chip" if per_chip else "batch_size"
  counts = _counts(flag, given) if given else []
  # The number of steps shapes no program.
  gin_config.set_missing(TRAIN_STEPS=10**6, **({"BATCH_SIZE": 1} if given else {}))
  unread = gin_config.set_missing_data()
  arguments = gin_config.train_arguments(allowed=("MODEL_DIR",))
  batch_size = arguments.pop("batch_size")
  counts = counts or [batch_size]
  lengths = text_lengths(
    arguments["data"], options.query_tokens, options.passage_tokens, cached=not unread
  )
  costs = precompile.precompile(
    topologies,
    lambda topology: [n * topology.devices if per_chip else n for n in counts],
    lengths.lengths,
    lambda line: print(line, file=sys.stderr, flush=True),
    **arguments,
  )
  if options.output:
    values = {"lengths": lengths.name, "steps": [cost.to_json() for cost in costs]}
    with outputs.new_file(pathlib.Path(options.output)) as file:
      file.write(json.dumps(values, indent=1).encode() + b"\n")
  console = Console()
  if options.compare:
    precompile_report.print_comparison(costs, lengths.name, console)
  else:
    for cost in costs:
      precompile_report.print_step(cost, lengths.name, console)


def _input_texts(options: argparse.Namespace, skipped: list[str]) -> Iterator[str]:
  """Texts of --input, line by line."""
  from embgemma.data import sources

  path = options.input
  is_jsonl = path.removesuffix(".gz").endswith((".jsonl", ".json"))
  for number, line in sources.read_lines(path):
    try:
      if is_jsonl:
        record = sources.parse_json_line(path, number, line)
        text = sources.string_field(record, options.field, f"{path}:{number}")
      else:
        text = sources.decode_line(path, number, line)
      if not text.strip():
        raise DataError(f"{path}:{number}: empty text")
    except DataError as error:
      if options.on_bad_record == "fail":
        raise DataError(f"{error} (--on_bad_record=skip leaves it out)") from error
      skipped.append(str(error))
      continue
    yield text


def _embed(options: argparse.Namespace) -> None:
  from embgemma.data import sources
  from embgemma.inference import vector_files
  from embgemma.inference.embedder import CheckpointEmbedder

  process.keep_compilations()
  output = pathlib.Path(options.output)
  vector_files.check_name(output)
  embedder = CheckpointEmbedder(
    options.checkpoint, options.max_length, options.tokens_per_batch
  )
  _print_notes(embedder.notes)
  prompt = embedder.prompt(options.prompt)
  width = embedder.check_width(options.dim)
  skipped: list[str] = []
  texts = (prompt + text for text in _input_texts(options, skipped))
  with outputs.new_file(output) as file:
    count = vector_files.write(file, output, embedder.stream(texts, width), width)
  print(f"{count:,} vectors of width {width}: {output}", file=sys.stderr)
  if skipped:
    print(f"skipped {len(skipped)} records:", file=sys.stderr)
    for line in skipped[: sources.MAX_LISTED_SKIPS]:
      print(f"  {line}", file=sys.stderr)


def _evaluation_entries(data: Iterable[str]) -> dict[str, dict[str, str]]:
  """NAME=PATH[:KIND] as entries of `evaluation.suite.evaluators`."""
  entries = {}
  for item in data:
    name, separator, path = item.partition("=")
    if not separator or not name or not path:
      raise ConfigError(f"--data={item}: write NAME=PATH or NAME=PATH:KIND")
    head, colon, kind = path.rpartition(":")
    if colon and head and head != "builtin" and "/" not in kind:
      entries[name] = {"path": head, "kind": kind}
    else:
      entries[name] = {"path": path}
  return entries


def _evaluate(options: argparse.Namespace) -> None:
  from rich.console import Console

  from embgemma.evaluation import suite
  from embgemma.evaluation.report import results_table
  from embgemma.inference.embedder import CheckpointEmbedder

  process.keep_compilations()
  embedder = CheckpointEmbedder(
    options.checkpoint, options.max_length, options.tokens_per_batch
  )
  _print_notes(embedder.notes)
  widths = embedder.description.embedder.matryoshka_widths
  if options.widths:
    try:
      widths = tuple(int(width) for width in options.widths.split(","))
    except ValueError as error:
      raise ConfigError(f"--widths={options.widths}: write 768,128") from error
  evaluators = suite.evaluators(_evaluation_entries(options.data), widths)
  for evaluator in evaluators:
    evaluator.check()
  columns = {embedder.name: {e.name: e.evaluate(embedder.encode) for e in evaluators}}
  if options.bm25:
    columns["BM25"] = suite.bm25_results(evaluators)
  if options.output:
    with outputs.new_file(pathlib.Path(options.output)) as file:
      file.write(json.dumps(columns, indent=1).encode() + b"\n")
  Console().print(results_table(columns))


def _import(options: argparse.Namespace) -> None:
  from embgemma.interop import conversion

  source, output = pathlib.Path(options.source), pathlib.Path(options.output)
  outputs.check_directory(output, options.overwrite, source)
  tokenizer = pathlib.Path(options.tokenizer) if options.tokenizer else None
  model = conversion.load(options.source_format, source, tokenizer)
  with outputs.new_directory(output) as directory:
    conversion.write_checkpoint(model, directory)
  _print_converted(model, model.notes, output)


def _soup(options: argparse.Namespace) -> None:
  from embgemma import soup

  output = pathlib.Path(options.output)
  for path in options.checkpoints:
    outputs.check_directory(output, options.overwrite, path)
  ingredients = soup.choose(options.checkpoints, options.last)
  model = soup.uniform(ingredients)
  with outputs.new_directory(output) as directory:
    soup.write(model, ingredients, directory)
  print("the mean of", *ingredients, sep="\n  ")
  _print_converted(model, model.notes, output)


def _extract(options: argparse.Namespace) -> None:
  from embgemma.interop import extraction
  from embgemma.models.adaptation import report_text
  from embgemma.models.extraction import embedder_config

  output = pathlib.Path(options.output)
  outputs.check_directory(output, options.overwrite, options.checkpoint)
  if not 0 <= options.seed < 2**32:
    raise ConfigError(f"--seed={options.seed}: write a number from 0 to {2**32 - 1}")
  configure = functools.partial(
    embedder_config,
    hidden_width=_hidden_width(options.hidden_width),
    embedding_width=options.embedding_width,
    matryoshka_widths=_counts("widths", options.widths) if options.widths else None,
    pooler=options.pooler,
  )
  extracted = extraction.extract(options.checkpoint, configure, options.seed)
  with outputs.new_directory(output) as directory:
    extraction.write(extracted, directory)
  print(report_text(extracted.report))
  _print_converted(extracted.model, (), output)


def _hidden_width(value: str | None) -> int | Literal["default"] | None:
  """What `embedder_config` takes for --hidden_width."""
  if value is None:
    return "default"
  if value == "none":
    return None
  if not re.fullmatch(r"[1-9]\d*", value):
    raise ConfigError(f"--hidden_width={value}: write 3072, or none for no heads")
  return int(value)


def _print_notes(notes: Iterable[str]) -> None:
  for note in notes:
    print(f"note: {note}", file=sys.stderr)


def _print_converted(model: Any, notes: Iterable[str], output: pathlib.Path) -> None:
  _print_notes(notes)
  print(f"{model.size:,} parameters: {output}", file=sys.stderr)


def _export(options: argparse.Namespace) -> None:
  if options.target_format == "hf":
    _export_hf(options)
  else:
    _export_gguf(options)


def _export_hf(options: argparse.Namespace) -> None:
  from embgemma.evaluation import model_card
  from embgemma.interop import conversion, sentence_transformers_writer

  output = pathlib.Path(options.output)
  if options.dtype not in ("float32", "bfloat16"):
    raise ConfigError(
      f"--dtype={options.dtype}: hf has float32 and bfloat16; q8_0 is a type of gguf, "
      "and Gemma 3's activations exceed the largest float16 (65,504)"
    )
  outputs.check_directory(output, options.overwrite, options.checkpoint)

  def check(config: Any) -> None:
    sentence_transformers_writer.check_exportable(config, options.max_length)

  model = conversion.open_embedder(options.checkpoint, check)
  length = options.max_length or model.description.max_length
  card = model_card.model_card(model, output.resolve().name, options.dtype, length)
  with outputs.new_directory(output) as directory:
    notes = sentence_transformers_writer.write(
      model, directory, options.dtype, length, card
    )
  _print_converted(model, (*model.notes, *notes), output)


def _export_gguf(options: argparse.Namespace) -> None:
  from embgemma.interop import conversion, gguf_file

  output = pathlib.Path(options.output)
  if options.max_length is not None:
    raise ConfigError("--max_length is for hf; llama.cpp takes its context's length")
  outputs.check_file(output, options.overwrite)
  weight_type = gguf_file.TYPE_OF_DTYPE[options.dtype]

  def check(config: Any) -> None:
    gguf_file.check_exportable(config, weight_type)

  model = conversion.open_embedder(options.checkpoint, check)
  with outputs.new_path(output) as path:
    gguf_file.write(model, path, weight_type)
  _print_converted(model, model.notes, output)


_WRITERS = {"import": _import, "export": _export, "soup": _soup, "extract": _extract}


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs one command; exits with 1 and one message on bad input."""
  command_line = list(sys.argv[1:] if arguments is None else arguments)
  process.quieten_libraries()
  try:
    kept, bindings = flags.split_gin_overrides(command_line)
    options = flags.parser().parse_args(kept)
    if bindings and not hasattr(options, "gin_file"):
      raise ConfigError(f"`embgemma {options.command}` takes no --gin flags")
    if options.command == "train":
      # Ctrl-C wherever training does not listen.
      with process.handling((signal.SIGINT,), process.leave):
        _train(options, bindings, command_line[1:])
    elif options.command == "cache":
      signal.signal(signal.SIGTERM, process.end)
      _cache(options, bindings)
    elif options.command in ("teach", "mine"):
      signal.signal(signal.SIGTERM, process.end)
      (_teach if options.command == "teach" else _mine)(options, bindings)
    elif options.command == "explain":
      _explain(options, bindings)
    elif options.command == "precompile":
      _precompile(options, bindings)
    elif options.command == "embed":
      _embed(options)
    elif options.command == "eval":
      _evaluate(options)
    else:
      signal.signal(signal.SIGTERM, process.end)
      _WRITERS[options.command](options)
  except EmbgemmaError as error:
    print(f"embgemma: error: {error}", file=sys.stderr)
    raise SystemExit(1) from None
  except KeyboardInterrupt:
    print("embgemma: interrupted", file=sys.stderr)
    raise SystemExit(128 + signal.SIGINT) from None
