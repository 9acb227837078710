import dataclasses
import importlib.util
import io
import json

import jax
import numpy as np
import pytest
from etils import epath
from rich.console import Console

from embgemma import cli
from embgemma.data.cache import CachedTask
from embgemma.data.config import DataConfig, TextDataConfig
from embgemma.data.denoisers import Sentinels, causal_lm, t5gemma2
from embgemma.data.denoising import Corruption
from embgemma.data.reader import Shards
from embgemma.data.records import Example
from embgemma.data.schedule import RecordSchedule
from embgemma.data.tasks import builtin_tasks, builtin_text_tasks
from embgemma.data.text_reader import TextSource
from embgemma.errors import ConfigError
from embgemma.losses.denoising import Denoising
from embgemma.models.config import BackboneConfig, TransformerConfig
from embgemma.training import precompile, precompile_report, step_plan
from embgemma.training.flops import sequence_flops
from embgemma.training.hardware import parse_topology
from embgemma.training.optimizers import OptimizerConfig, Schedule
from embgemma.training.partitioning import Partitioner
from embgemma.training.roofline import Memory


@pytest.fixture(scope="module")
def run(config, objective, tmp_path_factory):
  """Arguments of `loop.train` that a step follows from."""
  return {
    "model": config,
    "objective": objective,
    "data": DataConfig(
      "mixture",
      {"query": 16, "positive": 32, "negatives": 32},
      tasks=builtin_tasks()[:1],
      vocabulary_size=64,
      cache_dir=str(tmp_path_factory.mktemp("cache")),
    ),
    "optimizer": OptimizerConfig(schedule=Schedule(peak=1e-3)),
    "train_steps": 10,
    "partitioner": Partitioner(fsdp=2),
  }


STACK = TransformerConfig(
  vocab_size=96,
  num_layers=2,
  width=16,
  mlp_width=24,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  attention_pattern=("global",),
  max_length=64,
  attention="reference",
)
DECODER = dataclasses.replace(STACK, mask="causal", window=(8, 0))


def documents(run, model, lengths, denoisers):
  """The arguments for documents in place of pairs."""
  data = TextDataConfig(
    "mixture",
    lengths,
    tasks=builtin_text_tasks()[:1],
    vocabulary_size=64,
    cache_dir=run["data"].cache_dir,
    denoisers=denoisers,
    segment_tokens=24,
  )
  return run | {"model": model, "objective": Denoising(), "data": data}


@pytest.fixture(scope="module")
def decoder_run(run):
  return documents(run, BackboneConfig(None, DECODER), {"targets": 48}, causal_lm())


@pytest.fixture(scope="module")
def backbone_run(run):
  sides = {"inputs": 64, "targets": 48}
  return documents(run, BackboneConfig(STACK, DECODER), sides, t5gemma2())


@pytest.fixture(scope="module")
def lengths(run):
  return step_plan.text_lengths(run["data"], 8, 20)


def compiled(run, lengths, topology="cpu:8", batch_size=64, **changes):
  (cost,) = precompile.precompile(
    [topology],
    lambda _: [batch_size],
    lengths.lengths,
    lambda line: None,
    **{**run, **changes},
  )
  return cost


@pytest.fixture(scope="module")
def cost(run, lengths):
  return compiled(run, lengths)


def report(show, *arguments, width=200) -> str:
  text = io.StringIO()
  show(*arguments, Console(file=text, width=width))
  return text.getvalue()


def split_bytes(run, devices: int) -> int:
  """Of the parameters that lie split over the devices."""
  state = step_plan.abstract_run(jax.devices()[:devices], **run).state
  return sum(
    leaf.size * 4
    for leaf in jax.tree.leaves(state.params)
    if not leaf.sharding.is_fully_replicated
  )


def test_a_step_gathers_parameters_and_scatters_gradients_once(run, cost):
  split = split_bytes(run, 8)
  by_key = {(e.kind, e.axes): e for e in cost.exchanges}
  assert by_key["all-gather", "fsdp"].full_bytes == split
  assert by_key["reduce-scatter", "fsdp"].full_bytes == split
  # Each device's part, once more over data.
  assert by_key["all-reduce", "data"].full_bytes == split // 2
  assert cost.unknown_loops == 0


def test_costs_of_virtual_devices(cost):
  assert cost.mesh == {"data": 4, "fsdp": 2, "tensor": 1}
  assert cost.memory.peak > cost.memory.arguments > 0
  assert (cost.memory.fits, cost.times, cost.chip) == (None, None, None)
  assert cost.slots == 8 * sum(group.tokens for group in cost.groups)
  assert 0.5 * cost.slots < cost.tokens <= cost.slots
  assert cost.flops > cost.model_flops > 0
  json.dumps(cost.to_json())


@pytest.mark.slow
def test_microbatches_cost_the_forward_pass_again(run, lengths, cost):
  """Gradient caching embeds twice: 4 passes for 3, where a group is cached."""
  cached = compiled(run, lengths, microbatch_tokens=64)
  assert max(group.microbatches for group in cached.groups) > 1
  assert 1.1 < (cached.flops / cached.slots) / (cost.flops / cost.slots) < 1.4
  assert cached.memory.temporaries < cost.memory.temporaries
  # What is sent does not grow with microbatches.
  sent = {(e.kind, e.axes): e.sent_bytes for e in cost.exchanges}
  assert {(e.kind, e.axes): e.sent_bytes for e in cached.exchanges} == sent


def test_reports(cost, lengths):
  text = report(precompile_report.print_step, cost, lengths.name)
  for part in (
    "cpu:8, batch 64",
    "data 4 x fsdp 2 x tensor 1",
    "drawn, mean tokens: query 8, positive 20, negatives 20",
    "memory of a chip: peak",
    "all-gather",
    "reduce-scatter",
  ):
    assert part in text
  table = report(precompile_report.print_comparison, [cost, cost], lengths.name)
  assert table.count("cpu:8") == 2


@pytest.mark.slow
def test_documents(backbone_run):
  """The step of an encoder-decoder; microbatches compute nothing twice."""
  lengths = step_plan.text_lengths(backbone_run["data"])
  cost = compiled(backbone_run, lengths, "cpu:4", microbatch_tokens=224)
  (group,) = cost.groups
  assert (group.inputs, group.targets) == (64, 48)
  assert group.microbatches > 1
  assert group.rows == 2
  assert cost.slots == 4 * group.tokens
  assert 0.5 * cost.slots < cost.tokens <= cost.slots
  assert cost.model_flops < cost.flops
  # As written: every row as one example that fills it, and causal rows as square ones.
  rows = np.full((4 * group.microbatches * group.rows, 2), (64, 48))
  masked = len(rows) * 48 * 47 // 2 * 4 * DECODER.num_layers * 2 * 8
  full = sequence_flops(backbone_run["model"], rows) + masked
  assert cost.flops == pytest.approx(3 * full, rel=0.01)
  by_key = {(e.kind, e.axes): e for e in cost.exchanges}
  split = split_bytes(backbone_run, 4)
  assert by_key["all-gather", "fsdp"].full_bytes == split
  assert by_key["reduce-scatter", "fsdp"].full_bytes == split
  assert cost.unknown_loops == 0
  text = report(precompile_report.print_step, cost, lengths.name)
  assert "segments of 24 tokens" in text
  assert f"{group.microbatches} x 2 rows of 64 + 48" in text
  assert json.loads(json.dumps(cost.to_json()))["groups"][0]["targets"] == 48


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_typical_batch_of_documents_is_one_that_is_read(
  kind, decoder_run, backbone_run, tmp_path, write_examples
):
  run = decoder_run if kind == "decoder" else backbone_run
  rng = np.random.default_rng(0)
  segments = [np.full(n, 5, np.int32) for n in rng.integers(2, 25, 800)]
  examples = (Example((s,), np.array([1], np.uint64)) for s in segments)
  statistics = write_examples(tmp_path, examples, None)
  task = CachedTask("task", 1.0, epath.Path(tmp_path), statistics)
  data = run["data"]
  corruption = Corruption(
    data.denoisers, data.lengths, data.longest, Sentinels(40, 20), 2, 1
  )
  schedule = RecordSchedule([task], 256, 0, 96)
  source = TextSource(schedule, corruption, Shards(4), microbatch_tokens=448)
  abstract = step_plan.abstract_run(jax.devices()[:4], **run)
  lengths = np.asarray(task.lengths(), int)
  plan = step_plan.plan_step(abstract, None, 256, lengths, **run, microbatch_tokens=448)
  batches = [source.batch(step) for step in range(12)]
  (group,) = plan.batch.groups
  assert group == source.plans[0].typical
  alike = next(batch for batch in batches if batch.slots == plan.slots)
  expected = jax.tree.map(lambda x: (x.shape, x.dtype), alike.arrays)
  arrays = precompile.abstract_batch(plan)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), arrays) == expected
  assert {x.sharding.shard_shape(x.shape)[:2] for x in jax.tree.leaves(arrays)} == {
    (group.microbatches, group.rows)
  }
  mean = np.mean([batch.real_tokens for batch in batches])
  assert plan.batch.tokens == pytest.approx(mean, rel=0.02)


def test_a_chip_has_times_and_a_verdict(cost, lengths):
  """The same counts, as if they were of a v5e slice."""
  chip = parse_topology("v5e:4x4").chip
  assert chip is not None
  memory = dataclasses.replace(cost.memory, capacity=chip.hbm_bytes)
  exchanges = tuple(dataclasses.replace(e, seconds=1e-3) for e in cost.exchanges)
  cost = dataclasses.replace(cost, chip=chip, memory=memory, exchanges=exchanges)
  text = report(precompile_report.print_step, cost, lengths.name)
  for part in ("of 16.00 GiB: fits", "bound by network", "MFU", "1 µs a hop"):
    assert part in text
  table = report(precompile_report.print_comparison, [cost], lengths.name, width=40)
  for part in ("micro-", "scaling", "network", f"{cost.mfu:.1%}"):
    assert part in table


@pytest.mark.parametrize(
  "message",
  [
    "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
    "20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.",
    "Ran out of memory on HBM, the total memory required for HLO temporaries (20.50G) "
    "exceeds available HBM (15.75G).",
  ],
)
def test_programs_that_xla_finds_too_large(message, cost, lengths):
  class Refused:
    def lower(self):
      raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

  memory, costs = precompile._compiled(Refused(), parse_topology("v5e:4x4"), 16)
  assert memory == Memory(capacity=2**34, needed=int(20.5 * 2**30))
  assert costs.collectives == ()
  cost = dataclasses.replace(cost, memory=memory)
  text = report(precompile_report.print_step, cost, lengths.name)
  assert "at least 20.50 GiB of 16.00 GiB: does not fit" in text
  assert "collectives" not in text
  assert " no " in report(precompile_report.print_comparison, [cost], lengths.name)


def test_meshes_and_batches_that_do_not_divide(run, lengths):
  with pytest.raises(ConfigError, match="does not divide 8 devices"):
    compiled(run, lengths, partitioner=Partitioner(fsdp=3))
  with pytest.raises(ConfigError, match="60 is not divided by the mesh's 8"):
    compiled(run, lengths, batch_size=60)


def test_more_virtual_devices_than_there_are():
  count = len(jax.devices("cpu")) + 1
  with pytest.raises(ConfigError, match=f"host_platform_device_count={count}"):
    precompile.topology_devices(parse_topology(f"cpu:{count}"))


def test_tpus_need_libtpu(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"pip install embgemma\[tpu\]"):
    precompile.topology_devices(parse_topology("v5e:4x4"))


def test_drawn_lengths(run):
  found = step_plan.text_lengths(run["data"], 8, None).lengths
  assert found.shape[1] == 3
  assert found[:, 0].mean() == pytest.approx(8, rel=0.1)
  assert found[:, 0].max() == 16
  assert set(found[:, 1]) == {32}
  with pytest.raises(ConfigError, match="--passage_tokens=40: .* cuts positive at 32"):
    step_plan.text_lengths(run["data"], None, 40)


def test_cached_lengths_are_of_the_longest_task(run, monkeypatch):
  class Task:
    def __init__(self, name, tokens):
      self.name = name
      self._lengths = np.full((100_000, 3), tokens, np.uint32)

    def lengths(self):
      return self._lengths

  class Manifest:
    tasks = (Task("short", 5), Task("long", 9))

  monkeypatch.setattr(step_plan, "complete_caches", lambda data: Manifest)
  found = step_plan.text_lengths(run["data"])
  assert found.name == "task 'long'"
  assert found.lengths.shape[0] <= 8192
  assert set(found.lengths.ravel()) == {9}
  assert step_plan.text_lengths(run["data"], cached=False).name.startswith("drawn")


def test_lengths_of_documents(backbone_run):
  data = backbone_run["data"]
  found = step_plan.text_lengths(data)
  assert found.name == "segments of 24 tokens"
  assert found.lengths.shape[1] == 1
  assert set(found.lengths.ravel()) == {24}
  for means in ((8, None), (None, 8)):
    with pytest.raises(ConfigError, match="_tokens are of pairs"):
      step_plan.text_lengths(data, *means)


GIN = ("--gin_file=gin/models/tiny.gin", "--gin_file=gin/stages/finetune.gin")


def test_the_command(run, cost, monkeypatch, tmp_path, capsys):
  """It needs neither data nor a vocabulary, and writes what it prints."""
  asked = {}

  def stand_in(topologies, batch_sizes, lengths, say, **arguments):
    asked.update(arguments, topologies=topologies, lengths=lengths)
    asked["sizes"] = [batch_sizes(parse_topology(name)) for name in topologies]
    return [cost]

  monkeypatch.setattr(precompile, "precompile", stand_in)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  output = tmp_path / "costs.json"
  flags = ("--topology=cpu:4,cpu:8", f"--output={output}", "--query_tokens=32")
  cli.main(["precompile", *GIN, *flags, "--batch_per_chip=16,32", "--compare"])
  assert asked["topologies"] == ["cpu:4", "cpu:8"]
  assert asked["sizes"] == [[64, 128], [128, 256]]
  assert asked["model"].transformer.width == 128
  assert asked["lengths"].shape[1] == 3  # finetuning has a hard negative
  assert "drawn, mean tokens: query 32" in capsys.readouterr().out
  values = json.loads(output.read_text())
  assert values["steps"][0]["topology"] == "cpu:8"
  cli.main(["precompile", *GIN, *flags[:1], "--batch_size=1024"])
  assert asked["sizes"] == [[1024], [1024]]
  assert "collectives" in capsys.readouterr().out


DOCUMENTS = (
  GIN[0],
  "--gin_file=gin/models/encoder_decoder.gin",
  "--gin_file=gin/stages/adapt.gin",
  "--topology=cpu:8",
  "--batch_size=64",
)


def test_the_command_for_documents(cost, monkeypatch, capsys):
  """It needs neither, too; lengths of pairs are refused."""
  asked = {}

  def stand_in(topologies, batch_sizes, lengths, say, **arguments):
    asked.update(arguments, lengths=lengths)
    return [cost]

  monkeypatch.setattr(precompile, "precompile", stand_in)
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  cli.main(["precompile", *DOCUMENTS])
  assert asked["model"].encoder.width == 128
  assert set(asked["lengths"].ravel()) == {512}
  assert "segments of 512 tokens" in capsys.readouterr().out
  with pytest.raises(SystemExit):
    cli.main(["precompile", *DOCUMENTS, "--query_tokens=32"])
  assert "--query_tokens and --passage_tokens are of pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--batch_size=64", "--topology=v5e:4"), "no such topology"),
    (("--batch_size=0", "--topology=cpu:8"), "--batch_size=0: write 1024,4096"),
    (("--topology=cpu:8",), "--gin.BATCH_SIZE"),
  ],
)
def test_flags_that_cannot_work(flags, message, monkeypatch, capsys):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  with pytest.raises(SystemExit):
    cli.main(["precompile", *GIN, *flags])
  assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_tpu_that_is_not_there(run, lengths):
  pytest.importorskip("libtpu")
  with pytest.raises(ConfigError, match="no such slice"):
    precompile.topology_devices(parse_topology("v5e:3x3"))
  cost = compiled(run, lengths, "v5e:2x2", batch_size=16)
  assert cost.memory.fits
  assert cost.hbm_bytes > 0
  assert cost.unknown_loops == 0
  assert {e.kind for e in cost.exchanges} >= {"all-gather", "all-reduce"}
  assert all(e.seconds > 0 for e in cost.exchanges)
  assert 0 < cost.mfu < 1
