"""Tests that run on every agent in agents/."""

import ast
import copy
import functools
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from lab import accelerate
from lab.accelerate import Accelerator
from lab.agent import load_agent
from lab.check import __main__ as check
from lab.training.plasticity import measure
from tests.conftest import (
    AGENTS,
    drive,
    few_updates,
    flat_state,
    make_agent,
    make_steps,
    needs_compiler,
    needs_cuda,
    restore_state,
    same,
    save_state,
    small_config,
    spec_for,
)

# Training one of these takes seconds: the checks that need all their updates are slow.
LONG = [*list(check.CHECKS)[-5:], "actions stay within the bounds of each dimension"]
COSTLY = ("bro", "cem", "crossq", "droq", "xqc")


@functools.cache
def subject(path, long):
    return check.parse([str(path), *([] if long else few_updates(path))])


@pytest.mark.parametrize("path, name", [
    pytest.param(path, name, id=f"{path.stem}-{name}", marks=[
        pytest.mark.slow] if path.stem in COSTLY and name in LONG else [])
    for path in AGENTS for name in check.CHECKS])
def test_the_agent_passes_every_check(path, name):
    assert check.failure(check.CHECKS[name], subject(path, name in LONG)) is None


def parameters(agent):
    return {name: value.clone() for name, value in flat_state(save_state(agent)).items()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            and "optimizer" not in name
            and name.split("/")[0] not in ("replay", "plans", "returns", "rollout", "held",
                                           "reward_scale", "memory")}


def test_loading_a_state_leaves_the_agent_that_gave_it_alone(module):
    giver, taker = (make_agent(module, seeds=seeds, replay_ratio=1.0, policy_delay=1)
                    for seeds in ((0, 1), (2, 3)))
    drive(giver, make_steps((0, 1), 1, 30))
    restore_state(taker, save_state(giver))
    before = copy.deepcopy(flat_state(save_state(giver)))
    drive(taker, make_steps((0, 1), 1, 30))
    after = flat_state(save_state(giver))
    assert all(same(before[name], after[name]) for name in before)


def test_exploring_differs_from_step_to_step_and_from_seed_to_seed(module):
    agent = make_agent(module)
    obs = torch.zeros(2, 1, 3)
    first, second = agent.act(obs), agent.act(obs)
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])


def test_an_agent_that_learns_goes_on_exploring(module):
    agent = make_agent(module, num_envs=8)
    if hasattr(agent, "learning_starts"):
        agent.transitions = agent.learning_starts
    obs = torch.zeros(2, 8, 3)
    first, second = agent.act(obs), agent.act(obs)
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    best = agent.act(obs, explore=False)
    assert not torch.equal(first, best) and torch.equal(best, agent.act(obs, explore=False))


@pytest.mark.parametrize("num_envs", [1, 2])
def test_an_update_changes_every_parameter(module, num_envs):
    agent = make_agent(module, num_envs=num_envs, replay_ratio=1.0, policy_delay=1)
    before = parameters(agent)
    assert drive(agent, make_steps((0, 1), num_envs, 40)), "no update was due in 40 steps"
    after = parameters(agent)
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert all(hasattr(module, "BroNet") and NO_SHIFT.fullmatch(name) for name in still), still


# BRO's critics need no shift where the next batch norm takes it out again
NO_SHIFT = re.compile(r"qf/mlp\.(layers\.[0-4]|norms\.0)\.bias")


def test_a_checkpoint_of_another_shape_is_refused(module):
    state = save_state(make_agent(module, num_envs=1))
    with pytest.raises(ValueError, match=r"checkpoint"):
        restore_state(make_agent(module, seeds=(0, 1, 2), num_envs=1), state)


@pytest.mark.parametrize("field, value", [
    ("gamma", 1.5), ("batch_size", 0), ("num_steps", 0), ("num_minibatches", 3), ("qf_lr", -1.0),
    ("lr", float("nan")), ("clip_coef", -0.1), ("tau", 2.0), ("alpha", -1.0), ("beta1", 1.0),
    ("beta1", -0.1), ("micro_batches", 0)])
def test_a_bad_setting_is_named_with_its_value(module, field, value):
    if field not in module.Config.__dataclass_fields__:
        pytest.skip("not a setting of this agent")
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        make_agent(module, **{field: value})


@needs_compiler
@pytest.mark.parametrize("path", [
    pytest.param(path, id=path.stem, marks=[] if path.stem == "sac" else [pytest.mark.slow])
    for path in AGENTS])
def test_compiled_and_eager_updates_agree(path):
    """100 steps in float32; both round, so that a drift of 1e-3 is allowed, not one of 1e-2. XQC
    takes smaller steps than by default: where a gradient is near 0, rounding turns a whole one."""
    torch._dynamo.reset()
    steps, module = make_steps((0, 1), 1, 100), load_agent(path)
    steps_of_xqc = {"lr": 3e-4, "lr_end": 3e-5} if path.stem == "xqc" else {}
    histories = [drive(make_agent(module, accelerate=Accelerator(compiled), replay_ratio=1.0,
                                  **steps_of_xqc), steps) for compiled in (False, True)]
    assert len(histories[0]) == len(histories[1]) > 10
    for eager, compiled in zip(*histories, strict=True):
        for name in eager:
            torch.testing.assert_close(eager[name], compiled[name], rtol=1e-3, atol=1e-3, msg=name)


def test_a_value_is_not_rounded_to_bf16(module):
    if hasattr(module, "ATOMS"):
        pytest.skip("its values are means over atoms")
    layer = module.Linear([torch.Generator().manual_seed(0)], 8, 1)
    x = 300 + torch.rand(1, 100, 8)
    with torch.autocast("cpu", torch.bfloat16):
        values = layer(x)
    torch.testing.assert_close(values, x @ layer.weight.view(8, 1) + layer.bias.view(1))


# bf16 has 8 bits: 0.4% a number. How far a metric of the first updates may lie from fp32's, of its
# own size or of 1; measured: at most 0.045 in any agent, above 1.8 with outputs ten times larger.
BF16_TOLERANCE = 0.1


def test_bf16_learns_close_to_fp32(module):
    """In each metric of the first updates from the same state; and not to the bit, or it is not
    used."""
    steps = make_steps((0, 1), 1, 24)
    histories = [drive(make_agent(module, accelerate=Accelerator(False, precision),
                                  policy_delay=1, replay_ratio=1.0), steps)
                 for precision in ("fp32", "bf16")]
    fp32, bf16 = (history[:8] for history in histories)
    assert len(fp32) == len(bf16) >= 2
    for ours, theirs in zip(bf16, fp32, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.dtype == torch.float32 and value.isfinite().all()
            torch.testing.assert_close(value, theirs[name], rtol=BF16_TOLERANCE,
                                       atol=BF16_TOLERANCE, msg=name)
    assert not all(torch.equal(bf16[-1][name], fp32[-1][name]) for name in fp32[-1])


@needs_cuda
def test_the_agent_trains_on_cuda(module):
    agent = module.Agent(spec_for(module), module.Config(), [0, 1], total_steps=3000, device="cuda")
    for obs, *rest in make_steps((0, 1), 1, 400):
        tensors = [x.cuda() for x in rest]
        actions = agent.act(obs.cuda())
        agent.update()
        agent.observe(obs.cuda(), actions, tensors[0], tensors[1], *tensors[2:])
    assert actions.device.type == "cuda" and actions.isfinite().all()


def cuda_agent(module, accelerate=lambda fn: fn):
    config = small_config(module, replay_ratio=1.0, policy_delay=1)
    return module.Agent(spec_for(module), config, [0, 1], num_envs=2, total_steps=1000,
                        device="cuda", accelerate=accelerate)


def cuda_steps(count):
    return [tuple(x.cuda() for x in step) for step in make_steps((0, 1), 2, count)]


@needs_cuda
def test_compiled_cuda_graphs_and_eager_updates_agree(module, monkeypatch, float64):
    """80 gradient steps or 5 rollouts in float64, to 1e-6: kernels differ in their last digits. And
    graphs were replayed: each step's function ran to warm up, once for its recording, no more."""
    made, ran = [], Counter()

    class Watched(accelerate.CudaGraph):
        def __init__(self, fn):
            super().__init__(lambda *x: (ran.update([self]), fn(*x))[1])
            made.append(self)

    monkeypatch.setattr(accelerate, "CudaGraph", Watched)
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        agent = cuda_agent(module, Accelerator(compiled, device="cuda"))
        history = drive(agent, cuda_steps(44))
        results.append((history, parameters(agent)))
    (eager, theirs), (graphed, ours) = results
    assert made
    for graph in made:
        ((shapes, calls),) = graph.calls.items()
        assert calls >= 30 and ran[graph] == graph.WARM_UP + 1 and shapes in graph.recordings
    assert len(graphed) == len(eager) >= 5
    for a, b in zip(eager, graphed, strict=True):
        for name in a:
            torch.testing.assert_close(b[name], a[name], rtol=1e-6, atol=1e-6, msg=name)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6, msg=name)


@needs_cuda
def test_an_update_on_cuda_never_waits_for_the_device(module):
    """After the first ones, which make optimiser states; plasticity is measured as well. A reset of
    BRO does wait, once in a run, and is none of these."""
    agent, steps = cuda_agent(module), cuda_steps(60)
    drive(agent, steps[:20])
    update, seen = agent.update, set()

    def watched():
        torch.cuda.set_sync_debug_mode("error")
        try:
            metrics = update()
            seen.update(metrics | measure(agent))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return metrics

    agent.update = watched
    assert len(drive(agent, steps[20:])) >= 4
    assert any("plasticity" in name for name in seen) and any("loss" in name for name in seen)
    agent.update = update
    torch.cuda.set_sync_debug_mode("error")  # which does see what waits
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            agent.act(steps[0][0]).sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_functions_of_agents_stay_under_50_lines_and_the_name_is_the_stem():
    for path in AGENTS:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, (path, node.name)
        assert f'name = "{path.stem}"' in path.read_text()


# Blocks that agents repeat are equal to the letter, but for these, which differ on purpose; agents
# that are named together are equal among themselves.
DIFFERENT = {
    "Config": "every agent's own", "Agent": "every agent's own", "validate": "the Config's ranges",
    "rollout_length": {"ppo_lstm": "whole sequences"},
    "Linear": {"ppo ppo_discrete ppo_lstm": "orthogonal initialisation, and no copies",
               "xqc": "weights of length 1"},
    "BatchNorm": {"xqc": "no renormalisation"},
    "MLP": {"crossq bro cem": "batch norm before each layer, so that it must know if it trains",
            "xqc": "batch norm before each ReLU; any depth"},
    "Actor": {"crossq bro": "it must know if it trains", "xqc": "any depth; entropy of tanh"},
    "QFunctions": {"crossq cem": "it must know if it trains", "bro": "residual critics",
                   "droq": "dropout and layer norm", "xqc": "distributions"},
    "Replay": {"xqc": "targets of several steps"},
}


def test_repeated_blocks_are_equal_to_the_letter():
    blocks = defaultdict(dict)
    for path in AGENTS:
        text = path.read_text()
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                groups = DIFFERENT.get(node.name, {})
                if not isinstance(groups, str):
                    group = next((g for g in groups if path.stem in g.split()), "the others")
                    blocks[node.name, group][path.stem] = ast.get_source_segment(text, node)
    assert len(blocks["randn", "the others"]) == len(AGENTS)
    for (name, _), sources in blocks.items():
        assert len(set(sources.values())) == 1, f"{name} differs between {', '.join(sources)}"


def test_no_agent_touches_global_state():
    for path in AGENTS:
        for word in ("manual_seed_all", "torch.manual_seed(", "set_default", "cudnn", ".train()",
                     ".eval()", "np.random.seed"):
            assert word not in Path(path).read_text(), (path, word)


@pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)
def test_every_setting_has_a_help_text(path):
    """The comment on its line, or on the line above."""
    lines = path.read_text().splitlines()
    (config,) = (node for node in ast.parse(path.read_text()).body
                 if isinstance(node, ast.ClassDef) and node.name == "Config")
    for field in config.body:
        above = lines[field.lineno - 2].strip()
        assert "  # " in lines[field.lineno - 1] or above.startswith("# "), field.target.id
