"""Plasticity metrics: checked by hand, on real networks, and when they are logged."""

import itertools
import math

import pytest
import torch
from torch import nn

from agents import ppo
from lab.agent import load_agent
from tests.conftest import AGENTS, drive, flat_state, make_agent, make_steps, same

# Every agent that has the block: by hand, and measured by a clock of transitions; PPO measures at
# each update.
BLOCKS = [module for module in map(load_agent, AGENTS) if hasattr(module, "plasticity")]
every_block = pytest.mark.parametrize("module", BLOCKS, ids=lambda module: module.Agent.name)
every_agent = pytest.mark.parametrize(
    "module", [module for module in BLOCKS if hasattr(module, "PLASTICITY_EVERY")],
    ids=lambda module: module.Agent.name)
WIDTH = 16  # of the tests' networks


def networks(agent):
    """-> hidden layers and copies of each network that is measured."""
    deep = hasattr(agent.qf.mlp, "layers") if hasattr(agent, "qf") else False
    counts = {"actor": (2, 1), "qf": (3 if deep else 2, 2), "critic": (2, 1)}
    return {name: count for name, count in counts.items() if hasattr(agent, name)}


def names(agent):
    return {f"plasticity/{network}_{kind}" for network in networks(agent)
            for kind in ("weight_magnitude", "dead_units", "dormant_ratio")}


def units(*columns):
    """Each unit's activations for a batch of three -> (B, units)."""
    return torch.tensor(columns).T


def network_of(*weights):
    network = nn.Module()
    for place, weight in enumerate(weights):
        network.register_parameter(str(place), nn.Parameter(torch.tensor(weight)))
    return network


def measured(module, network, *hidden):
    metrics = module.plasticity("net", network, [torch.stack(layer) for layer in hidden])
    assert list(metrics) == [f"plasticity/net_{kind}" for kind in (
        "weight_magnitude", "dead_units", "dormant_ratio")]
    assert not any(value.requires_grad for value in metrics.values())
    return [value.tolist() for value in metrics.values()]


ALIVE, ZERO, CONSTANT = [1.0, 0.0, 5.0], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0]  # activities 2, 0, 2
FAINT, STRONG = [0.0, 3.0, 0.0], [79.0, 78.0, 80.0]  # activities 1 and 79
HUGE = [7900.0, 7800.0, 8000.0]
FAINTER, FAINT_NO_MORE = [0.0, 2.98, 0.0], [0.0, 3.02, 0.0]
SIGNED = [-3.0, 0.0, 3.0]  # activity 2, mean 0


@every_block
def test_one_network_a_seed_by_hand(module):
    network = network_of([[1.0, -2.0, 3.0], [0.5, -0.5, 0.0]], [[[-6.0]], [[1.0]]])
    narrow = [units(ALIVE, ZERO), units(ALIVE, CONSTANT)]
    wide = [units(ALIVE, ALIVE, SIGNED, CONSTANT), units(ZERO, ZERO, ALIVE, ZERO)]
    magnitude, dead, dormant = measured(module, network, narrow, wide)
    assert magnitude == pytest.approx([12 / 4, 2 / 4])
    assert dead == pytest.approx([2 / 6, 4 / 6])
    assert dormant == pytest.approx([1 / 6, 3 / 6])


@every_block
def test_a_unit_is_dormant_up_to_a_fortieth_of_its_layers_mean(module):
    """The mean of (79, 1) is 40."""
    network = network_of([[1.0], [1.0]])
    _, dead, dormant = measured(
        module, network, [units(STRONG, FAINT), units(STRONG, FAINT)],
        [units(STRONG, FAINTER), units(STRONG, FAINT_NO_MORE)])
    assert dead == [0, 0] and dormant == [2 / 4, 1 / 4]


@every_block
def test_a_layer_of_zeros_is_dormant(module):
    _, dead, dormant = measured(module, network_of([[0.0], [0.0]]),
                                [units(ZERO, ZERO), units(CONSTANT, CONSTANT)])
    assert dead == [1, 1] and dormant == [1, 0]


@every_block
def test_two_copies_a_seed_by_hand(module):
    """Each copy's layer has a mean of its own: a strong copy does not make a faint one dormant."""
    network = network_of([[[1.0], [-3.0]], [[0.0], [4.0]]])
    narrow = [units(HUGE, HUGE), units(FAINT, ALIVE), units(ZERO, ALIVE), units(FAINT, FAINT)]
    wide = [units(ALIVE, ALIVE, CONSTANT), units(ALIVE, ALIVE, ALIVE),
            units(STRONG, CONSTANT, ZERO), units(ALIVE, ZERO, ALIVE)]
    magnitude, dead, dormant = measured(module, network, narrow, wide)
    assert magnitude == [2, 2]
    assert dead == pytest.approx([1 / 10, 4 / 10])
    assert dormant == pytest.approx([0, 3 / 10])


def replay_measure(agent):
    """-> a function that measures again on the rows of the same batch."""
    agent.update()
    states = [g.get_state() for g in agent.generators]

    def measure():
        for generator, state in zip(agent.generators, states, strict=True):
            generator.set_state(state)
        return agent.update()
    return measure


def learnt(module, monkeypatch, **settings):
    """An agent that has learnt, and measures at each update."""
    monkeypatch.setattr(module, "PLASTICITY_EVERY", 1)
    agent = make_agent(module, seeds=(0, 1, 2), replay_ratio=1.0, policy_delay=1, **settings)
    drive(agent, make_steps((0, 1, 2), 1, 20))
    return agent


def last_bias(network, layer):
    """What is added last before that ReLU, (S, copies, 1, units)."""
    mlp = network.mlp
    if hasattr(mlp, "layers"):  # BRO's
        return mlp.norms[(1, 2, 4)[layer]].bias.data
    fc = (mlp.fc1, mlp.fc2)[layer]
    return (fc[1] if isinstance(fc, nn.Sequential) else fc).bias.data


def dead(hidden, row):
    """-> for each layer of a row, whether each unit gives one and the same for the whole batch."""
    return [[len(set(unit)) == 1 for unit in x[row].T.tolist()] for x in hidden]


@every_agent
def test_a_silenced_unit_of_any_layer_is_counted_in_its_seed_alone(module, monkeypatch):
    """With those that it silences in later layers, or wakes there."""
    agent, seen = learnt(module, monkeypatch), {}
    measure, plasticity = replay_measure(agent), module.plasticity
    monkeypatch.setattr(module, "plasticity", lambda name, network, hidden: (
        seen.update({name: hidden}), plasticity(name, network, hidden))[1])
    before = measure()
    for network, (layers, copies) in networks(agent).items():
        for place, layer in itertools.product(range(copies), range(layers)):
            row, name = copies + place, f"plasticity/{network}_dead_units"
            alive = dead(seen[network], row)
            unit = alive[layer].index(False)
            bias = last_bias(getattr(agent, network), layer)[1, place, 0]
            kept = bias[unit].item()
            bias[unit] = -1e6
            after = measure()
            bias[unit] = kept
            now = [flag for r in range(copies) for flags in dead(seen[network], copies + r)
                   for flag in flags]
            assert dead(seen[network], row)[layer] == [
                flag or u == unit for u, flag in enumerate(alive[layer])]
            assert after[name][1].item() == pytest.approx(sum(now) / len(now))
            assert len(now) == layers * copies * WIDTH
            for other in names(agent) - {f"plasticity/{network}_weight_magnitude"}:
                same_network = other.startswith(f"plasticity/{network}_")
                for seed in (0, 2) if same_network else (0, 1, 2):
                    assert after[other][seed] == before[other][seed], other
            assert all(torch.equal(before[other], value) for other, value in measure().items())


@every_block
def test_every_layer_of_each_network_counts_and_nothing_else(module, monkeypatch):
    """What a ReLU or a tanh gives: no sum of a residual block."""
    monkeypatch.setattr(module, "PLASTICITY_EVERY", 1, raising=False)
    seen, plasticity = [], module.plasticity
    monkeypatch.setattr(module, "plasticity", lambda name, network, hidden: (
        seen.append((name, network, hidden)), plasticity(name, network, hidden))[1])
    agent = make_agent(module, seeds=(0, 1, 2), replay_ratio=1.0, num_envs=3)
    drive(agent, make_steps((0, 1, 2), 3, 12))
    rows = 3 * 8 // 4 if module.Agent.name == "ppo" else 16  # a minibatch's
    expected = networks(agent)
    assert seen and {name for name, *_ in seen} == expected.keys()
    for name, network, hidden in seen:
        layers, copies = expected[name]
        assert network is getattr(agent, name)
        assert [tuple(x.shape) for x in hidden] == layers * [(3 * copies, rows, WIDTH)]
        ends = [(x.amin(), x.amax()) for x in hidden]
        assert all(-1 <= low < high <= 1 for low, high in ends) or all(
            low == 0 < high for low, high in ends)


@every_agent
def test_each_seed_is_measured_on_its_own_replay(module, monkeypatch):
    agent = learnt(module, monkeypatch)
    measure = replay_measure(agent)
    before = measure()
    agent.replay.rows[1] = 0
    after = measure()
    for name in names(agent):
        assert torch.equal(after[name][[0, 2]], before[name][[0, 2]]), name
    for network in networks(agent):
        assert before[f"plasticity/{network}_dead_units"][1] < 0.5
        assert after[f"plasticity/{network}_dead_units"][1] > 0.5


@every_agent
def test_measuring_changes_nothing_but_the_generators(module, monkeypatch):
    """No gradient step is due, and no statistics move."""
    agent = learnt(module, monkeypatch)
    agent.update()
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value
              for name, value in flat_state(agent.state_dict()).items()}
    assert agent.update().keys() == names(agent)
    after = flat_state(agent.state_dict())
    changed = {name.split("/")[0] for name in before if not same(before[name], after[name])}
    assert changed == {"generators"}


@every_agent
def test_the_weights_are_those_of_each_seeds_whole_network(module, monkeypatch):
    agent = learnt(module, monkeypatch)
    metrics = agent.update() or agent.update()
    for name in networks(agent):
        for seed in (0, 1):
            weights = [w for p in getattr(agent, name).parameters() for w in p[seed].flatten()]
            mean = sum(abs(w.item()) for w in weights) / len(weights)
            assert metrics[f"plasticity/{name}_weight_magnitude"][seed].item() == pytest.approx(
                mean, rel=1e-4)


@every_agent
@pytest.mark.parametrize("num_envs, replay_ratio", [(1, 1.0), (3, 1.0), (1, 0.25), (3, 0.25)])
def test_plasticity_is_measured_once_in_so_many_transitions(module, monkeypatch, num_envs,
                                                            replay_ratio):
    """At the first update at or after each multiple, whether or not a gradient step is due."""
    monkeypatch.setattr(module, "PLASTICITY_EVERY", 10)
    agent = make_agent(module, num_envs=num_envs, replay_ratio=replay_ratio, policy_delay=1)
    history, update = [], agent.update
    agent.update = lambda: (history.append((agent.transitions, agent.critic_steps, update())),
                            history[-1][-1])[1]
    drive(agent, make_steps((0, 1), num_envs, 60 // num_envs + 1))
    expected = {math.ceil(10 * k / num_envs) * num_envs for k in range(1, 7)}
    measured_at = [transitions for transitions, _, metrics in history
                   if names(agent) & metrics.keys()]
    assert measured_at == sorted(expected)
    learnt = [steps < later for (_, steps, _), (_, later, _) in zip(
        history, history[1:] + [(0, agent.critic_steps, {})], strict=True)]
    assert replay_ratio == 1 or not all(
        step for step, (at, *_) in zip(learnt, history, strict=True) if at in expected)
    for step, (transitions, _, metrics) in zip(learnt, history, strict=True):
        found = {name for name in metrics if name.startswith("plasticity/")}
        assert found == (names(agent) if transitions in expected else set())
        assert ("loss/qf" in metrics) == step
        for name in found:
            value = metrics[name]
            assert value.shape == (2,) and not value.requires_grad and value.isfinite().all()
            assert "magnitude" in name or ((value >= 0) & (value <= 1)).all()


def test_a_silenced_unit_of_ppo_is_counted_once_in_its_seed_alone():
    """Whose weights do not move. A tanh is silent where all that reaches it is 0."""
    def measure(*silent):
        agent = make_agent(ppo, seeds=(0, 1, 2), lr=0.0)
        if silent:
            network, layer = silent
            fc = getattr(getattr(agent, network), layer)
            fc.weight.data[1, :, 5] = fc.bias.data[1, :, 5] = 0
        return drive(agent, make_steps((0, 1, 2), 1, 9))[0]

    before = measure()
    assert names(make_agent(ppo)) < before.keys()
    for network in ("actor", "critic"):
        for layer in ("fc1", "fc2"):
            after = measure(network, layer)
            for name in (name for name in before if "dead" in name or "dormant" in name):
                change = (after[name] - before[name]) * 2 * WIDTH
                assert change.tolist() == ([0, 1, 0] if network in name else [0, 0, 0]), name
