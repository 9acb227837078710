"""Public training sets that the paper's sources name, as tasks over local files.

Where each comes from and how its files get below one directory: docs/data.md. Kinds
are ours: the paper lists task types (arXiv 2509.20354, section 2.3), not which set is
of which.
"""

import collections
import dataclasses
import os
import types
from collections.abc import Mapping, Sequence

from embgemma.data import files, sources
from embgemma.data.tasks import Task
from embgemma.errors import ConfigError, DataError

_BEIR = "beir"
_MIRACL = "ar bn en es fa fi fr hi id ja ko ru sw te th zh"
_MR_TYDI = (
  "arabic bengali english finnish indonesian japanese korean russian swahili telugu "
  "thai"
)
_CODE = "go java javascript php python ruby"


@dataclasses.dataclass(frozen=True)
class PublicSet:
  """A public set of pairs.

  Attributes:
    name: Of its task.
    family: What it is a part of, such as all languages of MIRACL; else its name.
    kind: Which prompts it gets, a key of `prompts.TASK_PROMPTS`.
    path: Below the directory of public data: a folder in the layout of BEIR, or a glob
      of JSONL files, which may be compressed.
    format: "beir", or a key of `record_formats.FORMATS`.
    symmetric: Whether query and positive may change places.
  """

  name: str
  family: str
  kind: str
  path: str
  format: str
  symmetric: bool = False

  def task(self, directory: str, rate: float) -> Task:
    """The task that reads the set.

    Args:
      directory: Of public data, local or remote.
      rate: Of the task.

    Raises:
      DataError: its files are not there.
    """
    path = os.path.join(directory, self.path)
    source: sources.Source
    try:
      if self.format == _BEIR:
        source = sources.BeirSource(path)
        source.shards()
      else:
        found = files.match_compressed(path)
        if not found:
          raise DataError(f"{path}: no such file, plain or compressed")
        source = sources.JsonlSource(tuple(found), format=self.format)
    except DataError as error:
      raise DataError(
        f"{error}; docs/data.md, section {self.family!r}, says how to get it; or leave "
        f"{self.name!r} out of PUBLIC_SETS"
      ) from error
    return Task(self.name, source, self.kind, rate, symmetric=self.symmetric)


def _one(
  name: str, kind: str, path: str, layout: str, symmetric: bool = False
) -> PublicSet:
  """A set that is a family of its own."""
  return PublicSet(name, name, kind, path, layout, symmetric)


def _all() -> tuple[PublicSet, ...]:
  """The sets, by family."""

  title_answer, duplicates = "stack_exchange_title_answer", "stack_exchange_duplicates"
  pairs = "embedding_training_data"
  return (
    _one("msmarco", "search", "msmarco", _BEIR),
    _one("nq", "qa", "nq-train", _BEIR),
    _one("hotpotqa", "qa", "hotpotqa", _BEIR),
    _one("fever", "fact_checking", "fever", _BEIR),
    _one("snli", "similarity", "snli_1.0/snli_1.0_train.jsonl", "nli", True),
    _one("mnli", "similarity", "multinli_1.0/multinli_1.0_train.jsonl", "nli", True),
    *(
      PublicSet(
        f"miracl_{code}", "miracl", "search", f"miracl/{code}/train*.jsonl", "tevatron"
      )
      for code in _MIRACL.split()
    ),
    *(
      PublicSet(
        f"mr_tydi_{language}",
        "mr_tydi",
        "search",
        f"mr-tydi/mrtydi-v1.1-{language}/train*.jsonl",
        "tevatron",
      )
      for language in _MR_TYDI.split()
    ),
    *(
      PublicSet(
        f"code_search_net_{language}",
        "code_search_net",
        "code",
        f"code_search_net/{language}/final/jsonl/train/*.jsonl",
        "code_search_net",
      )
      for language in _CODE.split()
    ),
    _one(
      "stack_exchange_title_body", "search", "stack_exchange/title_body/*.jsonl", pairs
    ),
    _one(title_answer, "qa", "stack_exchange/title_answer/*.jsonl", pairs),
    _one(duplicates, "similarity", "stack_exchange/duplicates/*.jsonl", pairs, True),
    _one("web_title_body", "search", "web_title_body/*.jsonl", "title_body"),
  )


PUBLIC_SETS: Mapping[str, PublicSet] = types.MappingProxyType(
  {public.name: public for public in _all()}
)
"""The sets by name."""

_TFDS = {"msmarco": "beir/msmarco", "hotpotqa": "beir/hotpotqa", "fever": "beir/fever"}
_BALANCES = ("sets", "kinds")


def _chosen(names: Sequence[str] | None) -> list[PublicSet]:
  """The sets of names and of families, each once."""
  families = {public.family for public in PUBLIC_SETS.values()}
  unknown = set(names or ()) - families - set(PUBLIC_SETS)
  if unknown or (names is not None and not names):
    raise ConfigError(
      f"PUBLIC_SETS: no sets {sorted(unknown)}; there are {sorted(families)}, and "
      "single languages such as 'miracl_sw'"
    )
  wanted = families if names is None else set(names)
  return [p for p in PUBLIC_SETS.values() if {p.name, p.family} & wanted]


def _rates(chosen: Sequence[PublicSet], balance: str) -> dict[str, float]:
  """Rates of the sets, by name."""
  if balance not in _BALANCES:
    raise ConfigError(f"balance {balance!r} of public tasks: one of {_BALANCES}")
  if balance == "sets":
    return {public.name: 1.0 for public in chosen}
  families: dict[str, set[str]] = collections.defaultdict(set)
  for public in chosen:
    families[public.kind].add(public.family)
  members = collections.Counter((public.kind, public.family) for public in chosen)
  return {
    p.name: 1.0 / len(families[p.kind]) / members[p.kind, p.family] for p in chosen
  }


def public_tasks(
  directory: str, names: Sequence[str] | None = None, balance: str = "sets"
) -> tuple[Task, ...]:
  """Tasks of public sets whose files lie below a directory.

  Args:
    directory: Local or remote.
    names: Of sets, or of families ("miracl": all its languages); None is all sets.
    balance: How rates are shared: "sets" gives every set the same; "kinds" every kind
      of task, of a kind every family, of a family every set (the paper weighs its four
      task types evenly in pre-finetuning: arXiv 2509.20354, section 2.3).

  Raises:
    DataError: a set's files are not there; the message says where docs/data.md tells
      how to get them.
    ConfigError: an unknown set or balance.
  """
  chosen = _chosen(names)
  rates = _rates(chosen, balance)
  return tuple(public.task(directory, rates[public.name]) for public in chosen)


def public_tfds_tasks(
  names: Sequence[str] = tuple(_TFDS), data_dir: str | None = None
) -> tuple[Task, ...]:
  """Tasks of the public sets that TFDS has in a form to train on: its builder `beir`.

  TFDS leaves out titles. Its `nq` has no training split; its `snli` and `multi_nli`
  have single labelled sentence pairs, which only files can be grouped from.

  Args:
    names: Of sets.
    data_dir: TFDS's data directory; None is TFDS's default.

  Raises:
    ConfigError: a set that TFDS does not have.
  """
  unknown = sorted(set(names) - set(_TFDS))
  if unknown:
    raise ConfigError(f"not in TFDS: {unknown}; there are {sorted(_TFDS)}")
  fields = {"query": "query", "positive": "passage"}
  return tuple(
    Task(
      name,
      sources.TfdsSource(f"{_TFDS[name]}:1.0.0", fields, data_dir),
      PUBLIC_SETS[name].kind,
    )
    for name in names
  )
