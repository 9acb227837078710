"""The flags of every command."""

import argparse
import re
from collections.abc import Sequence

from embgemma import __version__
from embgemma.errors import ConfigError
from embgemma.models.config import POOLERS, VECTOR_FORMATS


def _add_gin_flags(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group("configuration (as in t5x)")
  group.add_argument(
    "--gin_file", action="append", default=[], help="gin file; repeatable, in order"
  )
  group.add_argument(
    "--gin_search_paths",
    default="",
    help="directories to look in for gin files, separated by commas",
  )
  group.add_argument(
    "--gin.NAME=VALUE",
    dest="unused",
    metavar="",
    help="override a macro or parameter, e.g. --gin.TRAIN_STEPS=100; repeatable",
  )


def _add_stage_flags(parser: argparse.ArgumentParser) -> None:
  _add_gin_flags(parser)
  parser.add_argument(
    "--on_bad_record",
    choices=("fail", "skip"),
    help="what to do with a record that cannot be used (default: fail)",
  )


def _add_process_flags(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group("several processes (one a host)")
  group.add_argument(
    "--multiprocess",
    action="store_true",
    help="join the processes that the cluster knows (Cloud TPU, Slurm, GKE, …)",
  )
  group.add_argument("--coordinator_address", help="HOST:PORT of the first process")
  group.add_argument("--process_count", type=int)
  group.add_argument("--process_index", type=int, help="of this process, from 0")


_EMBEDDER = "a checkpoint or Hugging Face directory, or sentence_transformers:DIR"


def _add_teach_flags(parser: argparse.ArgumentParser) -> None:
  _add_stage_flags(parser)
  parser.add_argument("--teacher", required=True, help=f"{_EMBEDDER}, or gemini:MODEL")
  parser.add_argument(
    "--width", type=int, help="Matryoshka width of its vectors; default is full"
  )
  parser.add_argument(
    "--dtype", choices=("float16", "float32"), default="float16", help="of the vectors"
  )
  parser.add_argument("--tasks", help="names of those to teach, with commas; else all")
  parser.add_argument("--shard_index", type=int, default=0, help="of this process")
  parser.add_argument(
    "--shard_count", type=int, default=1, help="processes that share the texts"
  )
  api = parser.add_argument_group("a teacher that costs money")
  api.add_argument("--max_cost", type=float, help="most USD; it starts with this only")
  api.add_argument("--price", type=float, help="USD a million tokens")
  api.add_argument("--texts_per_minute", type=float)
  api.add_argument("--tokens_per_minute", type=float)


def _add_mine_flags(parser: argparse.ArgumentParser) -> None:
  _add_stage_flags(parser)
  parser.add_argument("--searcher", required=True, help=f"bm25, or {_EMBEDDER}")
  parser.add_argument(
    "--judge",
    help=f"whose similarities the rules compare: {_EMBEDDER}; default is the searcher",
  )
  parser.add_argument("--output", required=True, help="directory of JSONL to make")
  parser.add_argument("--overwrite", action="store_true", help="replace --output")
  parser.add_argument(
    "--keep_work", action="store_true", help="keep vectors and indexes for other rules"
  )


def parser() -> argparse.ArgumentParser:
  """What reads a command line without its --gin.NAME=VALUE."""
  root = argparse.ArgumentParser(
    prog="embgemma", description="Train text embedding models in JAX."
  )
  root.add_argument("--version", action="version", version=__version__)
  commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

  def command(name: str, help_text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=help_text, description=help_text)

  train = command("train", "train one stage; resumes if MODEL_DIR has checkpoints")
  _add_stage_flags(train)
  _add_process_flags(train)
  cached = command(
    "cache", "tokenise the tasks of a stage once; goes on where it ended"
  )
  _add_stage_flags(cached)
  where = cached.add_mutually_exclusive_group()
  where.add_argument(
    "--workers", type=int, default=1, help="processes of this machine (default: 1)"
  )
  where.add_argument(
    "--pipeline_options",
    help="run as an Apache Beam pipeline (needs embgemma[beam]) with these options, "
    "such as '--runner=DataflowRunner --region=us-central1'; '' is Beam's local runner",
  )
  _add_teach_flags(command("teach", "embed the cached texts of a stage with a teacher"))
  _add_mine_flags(command("mine", "find hard negatives for the pairs of a stage"))
  _add_stage_flags(
    command(
      "search", "find the best mixtures of a stage's tasks; workers may share one"
    )
  )
  recipe = command("recipe", "run the stages of a recipe that are not complete")
  _add_gin_flags(recipe)
  recipe.add_argument(
    "--jobs", type=int, default=1, help="stages that run at a time (default: 1)"
  )
  recipe.add_argument(
    "--stages", help="names of those to run, with commas, and what they need; else all"
  )
  recipe.add_argument(
    "--dry_run",
    action="store_true",
    help="print the commands and what they need, as a shell script",
  )
  _add_stage_flags(command("explain", "show the resolved run before any compute"))

  precompile = command("precompile", "compile a stage's step for devices not at hand")
  _add_stage_flags(precompile)
  precompile.add_argument(
    "--topology",
    required=True,
    help="such as v5e:4x4, v5p:4x4x4, v6e:16x16 (needs embgemma[tpu]) or cpu:8; "
    "several separated by commas",
  )
  sizes = precompile.add_mutually_exclusive_group()
  sizes.add_argument(
    "--batch_size", help="in place of BATCH_SIZE; several separated by commas"
  )
  sizes.add_argument("--batch_per_chip", help="likewise, examples a chip")
  precompile.add_argument(
    "--query_tokens", type=int, help="mean of drawn lengths, in place of cached ones"
  )
  precompile.add_argument("--passage_tokens", type=int, help="likewise")
  precompile.add_argument(
    "--compare", action="store_true", help="one table, a line a step"
  )
  precompile.add_argument("--output", help="JSON file for the results")

  checkpoint_help = "MODEL_DIR, one of its steps, or a Hugging Face directory"
  embed = command("embed", "embed the lines of a text or JSONL file")
  embed.add_argument("--checkpoint", required=True, help=checkpoint_help)
  embed.add_argument("--input", required=True, help="text or .jsonl file, plain or .gz")
  embed.add_argument("--output", required=True, help=".npy or .parquet")
  embed.add_argument(
    "--prompt", default="none", help="name of a prompt, such as query or document"
  )
  embed.add_argument("--field", default="text", help="JSONL key that holds the text")
  embed.add_argument("--dim", type=int, help="Matryoshka width; default is full")
  embed.add_argument(
    "--vectors",
    choices=VECTOR_FORMATS,
    default="float32",
    help="how they are kept: int8 and uint8 by the range of each component, whose "
    "file lies beside the output; binary and ubinary are signs, eight to a byte",
  )
  embed.add_argument(
    "--ranges", help=".npy of int8 and uint8: those of the documents, for queries"
  )
  embed.add_argument("--max_length", type=int, help="tokens a text is cut to")
  embed.add_argument(
    "--tokens_per_batch", type=int, help="token slots that a device embeds at once"
  )
  embed.add_argument("--on_bad_record", choices=("fail", "skip"), default="fail")

  evaluate = command("eval", "evaluate a checkpoint on retrieval and similarity sets")
  evaluate.add_argument("--checkpoint", required=True, help=checkpoint_help)
  _add_gin_flags(evaluate)
  evaluate.add_argument(
    "--data",
    action="append",
    default=[],
    metavar="NAME=PATH[:KIND]",
    help="BEIR folder, JSONL pairs or builtin:TASK; KIND picks prompts (search, qa, "
    "code, bitext, …) or is sts or pair_classification; repeatable; beside those of "
    "EVALUATIONS in a --gin_file",
  )
  evaluate.add_argument("--widths", help="Matryoshka widths, separated by commas")
  evaluate.add_argument(
    "--vectors",
    default="float32",
    help=f"formats in which vectors are kept, separated by commas: "
    f"{', '.join(VECTOR_FORMATS)}; the best are rescored by the query's own",
  )
  evaluate.add_argument("--bm25", action="store_true", help="add BM25 beside it")
  evaluate.add_argument(
    "--against", metavar="DIR", help="another checkpoint, compared example by example"
  )
  evaluate.add_argument(
    "--intervals", action="store_true", help="add bootstrap intervals over examples"
  )
  evaluate.add_argument("--output", help="JSON file for the results")
  evaluate.add_argument("--max_length", type=int, help="tokens a text is cut to")
  evaluate.add_argument(
    "--tokens_per_batch", type=int, help="token slots that a device embeds at once"
  )
  _add_benchmark_flags(evaluate)
  report = command("report", "make a page of runs, searches, soups and recipes")
  report.add_argument(
    "directories",
    nargs="*",
    metavar="DIR",
    help="RECIPE_DIR, MODEL_DIR, SEARCH_DIR, or a file of `embgemma eval --output`",
  )
  report.add_argument("--output", required=True, help=".html file to make")
  report.add_argument(
    "--benchmark", help='standings in it, such as "MTEB(Multilingual, v2)"'
  )
  report.add_argument(
    "--results",
    action="append",
    default=[],
    help="folder of results in mteb's layout, or a table as --csv makes it; repeatable",
  )
  report.add_argument("--csv", help="file of the benchmark's scores by task, too")
  report.add_argument("--markdown", help="file of its tables, too")
  report.add_argument("--title", help="default is the first DIR's name")
  report.add_argument("--checkpoint", help="whose vectors --map shows")
  report.add_argument(
    "--map",
    action="append",
    default=[],
    metavar="NAME=PATH[:KIND]",
    help="draw passages of a retrieval set in a plane, as of `eval --data`; repeatable",
  )

  imported = command("import", "take over weights of another format")
  imported.add_argument(
    "--from",
    dest="source_format",
    required=True,
    choices=("hf", "gemma", "t5gemma2"),
    help="hf: a Hugging Face EmbeddingGemma or Gemma 3 text model; gemma: DeepMind's "
    "Orbax checkpoint; t5gemma2: both stacks of a T5Gemma 2",
  )
  imported.add_argument("--source", required=True, help="directory with the weights")
  imported.add_argument("--output", required=True, help="MODEL_DIR to make")
  imported.add_argument(
    "--tokenizer", help="SentencePiece model, where the source has none"
  )
  imported.add_argument("--overwrite", action="store_true", help="replace --output")

  extract = command("extract", "make an embedder of a pretrained encoder or decoder")
  extract.add_argument(
    "--checkpoint",
    required=True,
    help="MODEL_DIR, or one of its steps, of an encoder-decoder, an encoder or a "
    "decoder, which is made bidirectional",
  )
  extract.add_argument("--output", required=True, help="MODEL_DIR to make")
  extract.add_argument(
    "--embedding_width", type=int, help="of the vectors; default is the stack's width"
  )
  extract.add_argument(
    "--hidden_width",
    help="between the two heads, which are random; default is 4 times the stack's "
    "width; none is a model without heads",
  )
  extract.add_argument(
    "--widths",
    help="Matryoshka widths, separated by commas; default is the embedding width and "
    "those of 512,256,128 below it",
  )
  extract.add_argument("--pooler", choices=POOLERS, default="mean")
  extract.add_argument("--seed", type=int, default=0, help="of what is random")
  extract.add_argument("--overwrite", action="store_true", help="replace --output")

  soup = command("soup", "average the weights of checkpoints of one model")
  soup.add_argument(
    "checkpoints",
    nargs="+",
    metavar="CHECKPOINT",
    help="MODEL_DIR, or one of its steps",
  )
  soup.add_argument("--output", required=True, help="MODEL_DIR to make")
  soup.add_argument(
    "--last",
    type=int,
    metavar="K",
    help="the last K steps that the one MODEL_DIR keeps, in place of its newest",
  )
  soup.add_argument("--weights", help="of each, separated by commas; default is alike")
  soup.add_argument(
    "--greedy",
    action="store_true",
    help="from the best to the worst, keep what makes the mean no worse on --data",
  )
  soup.add_argument(
    "--data",
    action="append",
    default=[],
    metavar="NAME=PATH[:KIND]",
    help="held-out data of --greedy, as of `embgemma eval`; repeatable",
  )
  soup.add_argument(
    "--allow_different_init",
    action="store_true",
    help="average models that were not trained from the same parameters, too",
  )
  soup.add_argument("--overwrite", action="store_true", help="replace --output")

  quantize = command("quantize", "keep a checkpoint's weights in 4 or 8 bits")
  quantize.add_argument("--checkpoint", required=True, help=checkpoint_help)
  quantize.add_argument("--output", required=True, help="MODEL_DIR to make")
  quantize.add_argument(
    "--format",
    default="trained",
    choices=("trained", "int8_block32", "int4_block32", "mixed_channel"),
    help="default is that of quantization-aware training",
  )
  quantize.add_argument("--overwrite", action="store_true", help="replace --output")

  export = command("export", "write a checkpoint for other tools")
  export.add_argument(
    "--to",
    dest="target_format",
    required=True,
    choices=("hf", "gguf", "onnx", "litert"),
    help="hf: a sentence-transformers directory; gguf: a file for llama.cpp; onnx: a "
    "directory for onnxruntime and browsers; litert: one for phones",
  )
  export.add_argument("--checkpoint", required=True, help=checkpoint_help)
  export.add_argument("--output", required=True, help="directory, or .gguf file")
  export.add_argument(
    "--dtype",
    default="float32",
    choices=(
      *("float32", "bfloat16", "float16", "int8", "q8_0", "q4_0"),
      *("mixed_channel", "trained"),
    ),
    help="of the weights; int8 is for onnx, mixed_channel for litert, q8_0 and q4_0 "
    "(token table q8_0) for gguf, trained (the formats of quantization-aware training) "
    "for gguf and litert",
  )
  export.add_argument(
    "--max_length",
    type=int,
    help="tokens a text is cut to (hf, onnx), or of every input (litert); default is "
    "the longest in training",
  )
  export.add_argument("--overwrite", action="store_true", help="replace --output")
  return root


def _add_benchmark_flags(parser: argparse.ArgumentParser) -> None:
  """Of evaluation by mteb."""
  group = parser.add_argument_group("benchmarks of mteb")
  group.add_argument("--benchmark", help='such as "MTEB(Multilingual, v2)"')
  group.add_argument("--tasks", help="single tasks, separated by commas")
  group.add_argument(
    "--task_modules", help="Python modules with tasks of one's own, separated by commas"
  )
  group.add_argument(
    "--mteb_data", help="directory with a copy of a task's data set in DIR/TASK"
  )
  group.add_argument("--results", help="where results go, in mteb's layout")
  group.add_argument(
    "--model_name", help="ORGANISATION/MODEL of the results; default: the checkpoint's"
  )
  group.add_argument(
    "--task_lengths",
    help="TASK=TOKENS,… where texts are cut elsewhere than at --max_length, which is "
    "512 here",
  )
  group.add_argument(
    "--joined_titles",
    action="store_true",
    help="title and text of a document as one text, as mteb has it for models of "
    "sentence-transformers; without, in the prompt's place for a title",
  )
  group = parser.add_argument_group(
    "XOR-Retrieve and XTREME-UP, from the original files"
  )
  group.add_argument(
    "--xor_retrieve", help="questions, such as xor_dev_retrieve_eng_span_v1_1.jsonl"
  )
  group.add_argument(
    "--corpus", help="passages of XOR-Retrieve: DPR's TSV, or JSONL with title and text"
  )
  group.add_argument("--xtreme_up", help="the folder retrieval_cross_lang")
  group.add_argument(
    "--split", choices=("test", "validation", "train"), help="default: test"
  )
  group.add_argument(
    "--query_prompt", help="name of the prompt of questions; default: query"
  )


def split_gin_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
  """Arguments without --gin.NAME=VALUE, and those as NAME=VALUE."""
  kept, bindings = [], []
  for argument in arguments:
    if argument.startswith("--gin."):
      binding = argument.removeprefix("--gin.")
      if "=" not in binding:
        raise ConfigError(f"{argument}: write --gin.NAME=VALUE")
      bindings.append(binding)
    else:
      kept.append(argument)
  return kept, bindings


def counts(flag: str, value: str) -> list[int]:
  """Positive numbers separated by commas, of a flag.

  Raises:
    ConfigError: they are not.
  """
  if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", value):
    raise ConfigError(f"--{flag}={value}: write 1024,4096")
  return [int(number) for number in value.split(",")]


def without_process_flags(command_line: Sequence[str]) -> list[str]:
  """The flags of `train` that its other commands do not take left out."""
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
  _add_process_flags(parser)
  return parser.parse_known_args(command_line)[1]
