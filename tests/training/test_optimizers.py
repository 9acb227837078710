import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from embgemma.errors import ConfigError
from embgemma.training.optimizers import OptimizerConfig, Schedule


def rates(schedule: Schedule, train_steps: int) -> list[float]:
  built = schedule.build(train_steps)
  return [float(built(step)) for step in range(train_steps)]


def test_constant():
  found = rates(Schedule("constant", peak=0.5, warmup_steps=0), 4)
  assert found == [0.5] * 4


def test_warmup_moves_on_the_first_step_and_reaches_the_peak():
  found = rates(Schedule("constant", peak=0.8, warmup_steps=4), 6)
  np.testing.assert_allclose(found, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rtol=1e-6)


def test_a_fraction_is_of_the_run():
  found = rates(Schedule("constant", peak=0.8, warmup_steps=0.25), 16)
  np.testing.assert_allclose(found[:5], [0.2, 0.4, 0.6, 0.8, 0.8], rtol=1e-6)


def test_one_is_a_step_not_the_whole_run():
  found = rates(Schedule("linear", peak=1.0, warmup_steps=1), 5)
  np.testing.assert_allclose(found, [1.0, 1.0, 0.75, 0.5, 0.25], rtol=1e-6)


def test_cosine():
  found = rates(Schedule("cosine", peak=2.0, warmup_steps=2, final_ratio=0.5), 6)
  # From step 2: 1 + 0.5 + 0.5 cos(pi t / 4), the peak scaled between 1 and 0.5.
  after = 2 * (0.5 + 0.5 * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2)
  np.testing.assert_allclose(found, [1.0, 2.0, *after], rtol=1e-6)


def test_linear():
  found = rates(Schedule("linear", peak=1.0, warmup_steps=0, final_ratio=0.2), 4)
  np.testing.assert_allclose(found, [1.0, 0.8, 0.6, 0.4], rtol=1e-6)


def test_wsd():
  schedule = Schedule("wsd", peak=1.0, warmup_steps=2, decay_steps=0.4, final_ratio=0.2)
  expected = [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]
  np.testing.assert_allclose(rates(schedule, 10), expected, rtol=1e-6)
  assert float(schedule.build(10)(10)) == pytest.approx(0.2)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"kind": "step"}, "Schedule.kind"),
    ({"peak": 0.0}, "Schedule.peak"),
    ({"peak": -1e-3}, "Schedule.peak"),
    ({"peak": float("nan")}, "Schedule.peak"),
    ({"peak": float("inf")}, "Schedule.peak"),
  ],
)
def test_schedule_refuses(arguments, message):
  with pytest.raises(ConfigError, match=message):
    Schedule(**arguments)


@pytest.mark.parametrize(
  "schedule",
  [
    Schedule(warmup_steps=11),
    Schedule(warmup_steps=-1),
    Schedule("wsd", warmup_steps=6, decay_steps=5),
  ],
)
def test_schedule_refuses_what_does_not_fit_the_run(schedule):
  with pytest.raises(ConfigError, match="TRAIN_STEPS 10"):
    schedule.build(10)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"name": "sgd"}, "OptimizerConfig.name"),
    ({"clip_norm": 0.0}, "clip_norm"),
    ({"rate_multipliers": {"(": 2.0}}, "is no pattern"),
    ({"alone": ("(",)}, r"OptimizerConfig.alone: '\(' is no pattern"),
    ({"alone": "projection"}, "alone must be a list of patterns"),
    ({"alone_steps": -1}, "alone_steps must be >= 0"),
  ],
)
def test_optimizer_refuses(arguments, message):
  with pytest.raises(ConfigError, match=message):
    OptimizerConfig(**arguments)


def some_params() -> dict:
  rng = np.random.default_rng(0)
  return {
    "model": {
      "table": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
      "norm": {"scale": jnp.asarray(rng.normal(size=(4,)), jnp.float32)},
      "projection_up": {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)},
      "mlp": {"kernel": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)},
    }
  }


CONSTANT = Schedule("constant", peak=0.1, warmup_steps=0)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_decay_spares_scales_and_table(name):
  config = OptimizerConfig(name, schedule=CONSTANT, weight_decay=0.5)
  optimizer = config.build(10)
  params = some_params()
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  model = updates["model"]
  assert not model["table"].any()
  assert not model["norm"]["scale"].any()
  kernel = params["model"]["projection_up"]["kernel"]
  np.testing.assert_allclose(
    model["projection_up"]["kernel"], -0.1 * 0.5 * kernel, rtol=1e-6
  )


def test_adamw_is_torchs():
  config = OptimizerConfig(
    schedule=Schedule("linear", peak=0.05, warmup_steps=2),
    clip_norm=1.0,
    weight_decay=0.1,
    b1=0.8,
    b2=0.9,
  )
  steps = 6
  optimizer, rate = config.build(steps), config.schedule.build(steps)
  params = some_params()
  state = optimizer.init(params)
  leaves, structure = jax.tree.flatten(params)
  names = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
  ]
  theirs = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in leaves]
  decayed = [p for p, n in zip(theirs, names, strict=True) if n.endswith("kernel")]
  others = [p for p, n in zip(theirs, names, strict=True) if not n.endswith("kernel")]
  torch_optimizer = torch.optim.AdamW(
    [
      {"params": decayed, "weight_decay": 0.1},
      {"params": others, "weight_decay": 0.0},
    ],
    betas=(0.8, 0.9),
  )
  rng = np.random.default_rng(1)
  for step in range(steps):
    # Some gradients are clipped, some are not.
    scale = 0.05 if step % 2 else 3.0
    gradients = [
      np.asarray(scale * rng.normal(size=x.shape), np.float32) for x in leaves
    ]
    updates, state = optimizer.update(
      jax.tree.unflatten(structure, gradients), state, params
    )
    params = optax.apply_updates(params, updates)
    for parameter, gradient in zip(theirs, gradients, strict=True):
      parameter.grad = torch.tensor(gradient)
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    for group in torch_optimizer.param_groups:
      group["lr"] = float(rate(step))
    torch_optimizer.step()
    for ours, parameter in zip(jax.tree.leaves(params), theirs, strict=True):
      np.testing.assert_allclose(ours, parameter.detach().numpy(), atol=2e-6)


def test_without_clipping_a_gradient_keeps_its_size():
  gradients = jax.tree.map(lambda x: 100.0 * jnp.ones_like(x), some_params())
  moved = {}
  for clip_norm in (None, 1.0):
    # epsilon as large as the gradient: AdamW alone would hide its size.
    config = OptimizerConfig(
      schedule=CONSTANT, clip_norm=clip_norm, weight_decay=0.0, epsilon=100.0
    )
    optimizer = config.build(10)
    params = some_params()
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    moved[clip_norm] = float(optax.tree.norm(updates))
  assert moved[1.0] < 0.02 * moved[None]


def test_rate_multipliers():
  factors = {"projection_(up|down)": 4.0, "^model/": 0.5}
  gradients = jax.tree.map(jnp.ones_like, some_params())
  updates = []
  for multipliers in ({}, factors):
    optimizer = OptimizerConfig(
      schedule=CONSTANT, rate_multipliers=multipliers, weight_decay=0.1
    ).build(10)
    params = some_params()
    updates.append(optimizer.update(gradients, optimizer.init(params), params)[0])
  ratios = jax.tree.map(lambda plain, scaled: scaled / plain, *updates)["model"]
  np.testing.assert_allclose(ratios["projection_up"]["kernel"], 2.0, rtol=1e-6)
  np.testing.assert_allclose(ratios["table"], 0.5, rtol=1e-6)
  np.testing.assert_allclose(ratios["norm"]["scale"], 0.5, rtol=1e-6)


def test_rate_multipliers_without_match():
  optimizer = OptimizerConfig(rate_multipliers={"projection": 2.0, "lora": 3.0})
  with pytest.raises(ConfigError, match=r"\['lora'\] match no parameter"):
    optimizer.build(10).init(some_params())


def test_adafactor_lowers_a_loss():
  config = OptimizerConfig("adafactor", schedule=CONSTANT, weight_decay=0.0)
  optimizer = config.build(50)
  target = some_params()
  params = jax.tree.map(jnp.zeros_like, target)

  def loss(params):
    return sum(
      jnp.sum((a - b) ** 2)
      for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True)
    )

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  first, state = float(loss(params)), optimizer.init(params)
  for _ in range(50):
    params, state = step(params, state)
  assert float(loss(params)) < 0.05 * first


def updated(optimizer: optax.GradientTransformation):
  """One jitted update: parameters and state of after it."""

  @jax.jit
  def step(gradients, params, state):
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return step


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_some_parameters_train_alone_at_first(name):
  """As if there were no others: these add nothing to the norm that is clipped."""
  settings = {"schedule": CONSTANT, "weight_decay": 0.5, "clip_norm": 0.1}
  both = OptimizerConfig(name, alone=["projection_"], alone_steps=3, **settings)
  optimizer, single = both.build(10), OptimizerConfig(name, **settings).build(10)
  params = some_params()
  own = {"model": {"projection_up": params["model"]["projection_up"]}}
  state, own_state = optimizer.init(params), single.init(own)
  step, own_step = updated(optimizer), updated(single)
  rng = np.random.default_rng(2)
  for number in range(5):
    gradients = jax.tree.map(
      lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params
    )
    before, (params, state) = params["model"], step(gradients, params, state)
    after = params["model"]
    same = jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), before, after)
    held = number < 3
    assert same == {
      "table": held,
      "norm": {"scale": held},
      "mlp": {"kernel": held},  # weight decay alone would move it
      "projection_up": {"kernel": False},
    }
    if held:
      gradients = {"model": {"projection_up": gradients["model"]["projection_up"]}}
      own, own_state = own_step(gradients, own, own_state)
      np.testing.assert_allclose(
        after["projection_up"]["kernel"],
        own["model"]["projection_up"]["kernel"],
        rtol=1e-6,
        atol=1e-7,
      )


@pytest.mark.parametrize("changes", [{"alone": ("table",)}, {"alone_steps": 3}])
def test_without_patterns_or_steps_nothing_trains_alone(changes):
  params = some_params()
  plain = OptimizerConfig(schedule=CONSTANT).build(10)
  optimizer = OptimizerConfig(schedule=CONSTANT, **changes).build(10)
  state = optimizer.init(params)
  assert jax.tree.structure(state) == jax.tree.structure(plain.init(params))
  params_after, _ = updated(optimizer)(params, params, state)
  for before, after in zip(
    jax.tree.leaves(params), jax.tree.leaves(params_after), strict=True
  ):
    assert not np.array_equal(before, after)


def test_what_trains_alone_without_match():
  optimizer = OptimizerConfig(alone=("projection", "cross_attention"), alone_steps=1)
  with pytest.raises(ConfigError, match=r"alone: \['cross_attention'\] match no"):
    optimizer.build(10).init(some_params())
