"""The measures of plasticity: by hand, on real networks, and when they are taken."""

import math

import pytest
import torch
from torch import nn

from agents import crossq, droq, sac
from tests.conftest import drive, make_agent, make_steps

NAMES = {f"plasticity/{network}_{kind}" for network in ("actor", "qf")
         for kind in ("weight_magnitude", "dead_units", "dormant_ratio")}
every_agent = pytest.mark.parametrize("agent_file", [sac, crossq, droq],
                                      ids=lambda module: module.Agent.name)


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


@every_agent
def test_one_network_a_seed_by_hand(agent_file):
    network = network_of([[1.0, -2.0, 3.0], [0.5, -0.5, 0.0]], [[[-6.0]], [[1.0]]])
    narrow = [units(ALIVE, ZERO), units(ALIVE, CONSTANT)]
    wide = [units(ALIVE, ALIVE, SIGNED, CONSTANT), units(ZERO, ZERO, ALIVE, ZERO)]
    magnitude, dead, dormant = measured(agent_file, network, narrow, wide)
    assert magnitude == pytest.approx([12 / 4, 2 / 4])
    assert dead == pytest.approx([2 / 6, 4 / 6])
    assert dormant == pytest.approx([1 / 6, 3 / 6])


@every_agent
def test_a_unit_is_dormant_up_to_a_fortieth_of_its_layers_mean(agent_file):
    """The mean of (79, 1) is 40."""
    network = network_of([[1.0], [1.0]])
    _, dead, dormant = measured(
        agent_file, network, [units(STRONG, FAINT), units(STRONG, FAINT)],
        [units(STRONG, FAINTER), units(STRONG, FAINT_NO_MORE)])
    assert dead == [0, 0] and dormant == [2 / 4, 1 / 4]


@every_agent
def test_a_layer_of_zeros_is_dormant(agent_file):
    _, dead, dormant = measured(agent_file, network_of([[0.0], [0.0]]),
                                [units(ZERO, ZERO), units(CONSTANT, CONSTANT)])
    assert dead == [1, 1] and dormant == [1, 0]


@every_agent
def test_two_copies_a_seed_by_hand(agent_file):
    """Each copy's layer has a mean of its own: a strong copy does not make a faint one dormant."""
    network = network_of([[[1.0], [-3.0]], [[0.0], [4.0]]])
    narrow = [units(HUGE, HUGE), units(FAINT, ALIVE), units(ZERO, ALIVE), units(FAINT, FAINT)]
    wide = [units(ALIVE, ALIVE, CONSTANT), units(ALIVE, ALIVE, ALIVE),
            units(STRONG, CONSTANT, ZERO), units(ALIVE, ZERO, ALIVE)]
    magnitude, dead, dormant = measured(agent_file, network, narrow, wide)
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


def silence(agent, network, seed, place, unit):
    """The bias before the last ReLU, so low that nothing passes."""
    layer = getattr(agent, network).mlp.fc2
    layer = layer[1] if isinstance(layer, nn.Sequential) else layer
    layer.bias.data[seed, place, 0, unit] = -1e6


@every_agent
@pytest.mark.parametrize("network, place, count", [("actor", 0, 32), ("qf", 0, 64), ("qf", 1, 64)])
def test_a_silenced_unit_is_counted_once_in_its_seed_alone(agent_file, monkeypatch, network, place,
                                                           count):
    """count: the hidden units of a seed."""
    monkeypatch.setattr(agent_file, "PLASTICITY_EVERY", 1)
    agent = make_agent(agent_file, seeds=(0, 1, 2))
    drive(agent, make_steps((0, 1, 2), 1, 20))
    measure, hits = replay_measure(agent), 0
    before = measure()
    for unit in range(4):
        silence(agent, network, 1, place, unit)
        after = measure()
        for name in NAMES - {f"plasticity/{network}_weight_magnitude"}:
            change = (after[name] - before[name]) * count
            assert change[0] == change[2] == 0
            if name == f"plasticity/{network}_dead_units":
                assert round(change[1].item(), 4) in (0, 1)  # 0: it was dead before
                hits += round(change[1].item())
            elif network not in name:
                assert change[1] == 0
        before = after
    assert hits >= 2 and after[f"plasticity/{network}_dormant_ratio"][1] >= 4 / count


@every_agent
def test_each_seed_is_measured_on_its_own_replay(agent_file, monkeypatch):
    monkeypatch.setattr(agent_file, "PLASTICITY_EVERY", 1)
    agent = make_agent(agent_file, seeds=(0, 1, 2), dropout=0.0)
    drive(agent, make_steps((0, 1, 2), 1, 20))
    measure = replay_measure(agent)
    before = measure()
    agent.replay.rows[1] = 0
    after = measure()
    for name in NAMES:
        assert torch.equal(after[name][[0, 2]], before[name][[0, 2]]), name
    for network in ("actor", "qf"):
        assert before[f"plasticity/{network}_dead_units"][1] < 0.5
        assert after[f"plasticity/{network}_dead_units"][1] > 0.5


@every_agent
def test_the_weights_are_those_of_each_seeds_whole_network(agent_file, monkeypatch):
    monkeypatch.setattr(agent_file, "PLASTICITY_EVERY", 1)
    agent = make_agent(agent_file)
    drive(agent, make_steps((0, 1), 1, 12))
    metrics = agent.update() or agent.update()
    for name in ("actor", "qf"):
        for seed in (0, 1):
            weights = [w for p in getattr(agent, name).parameters() for w in p[seed].flatten()]
            mean = sum(abs(w.item()) for w in weights) / len(weights)
            assert metrics[f"plasticity/{name}_weight_magnitude"][seed].item() == pytest.approx(
                mean, rel=1e-4)


@every_agent
@pytest.mark.parametrize("num_envs, replay_ratio", [(1, 1.0), (3, 1.0), (1, 0.25), (3, 0.25)])
def test_plasticity_is_measured_once_in_so_many_transitions(agent_file, monkeypatch, num_envs,
                                                            replay_ratio):
    """At the first update at or after each multiple, whether or not a gradient step is due."""
    monkeypatch.setattr(agent_file, "PLASTICITY_EVERY", 10)
    agent = make_agent(agent_file, num_envs=num_envs, replay_ratio=replay_ratio, policy_delay=1)
    history, update = [], agent.update
    agent.update = lambda: (history.append((agent.transitions, agent.critic_steps, update())),
                            history[-1][-1])[1]
    drive(agent, make_steps((0, 1), num_envs, 60 // num_envs + 1))
    expected = {math.ceil(10 * k / num_envs) * num_envs for k in range(1, 7)}
    measured_at = [transitions for transitions, _, metrics in history if NAMES & metrics.keys()]
    assert measured_at == sorted(expected)
    learnt = [steps < later for (_, steps, _), (_, later, _) in zip(
        history, history[1:] + [(0, agent.critic_steps, {})], strict=True)]
    assert replay_ratio == 1 or not all(
        step for step, (at, *_) in zip(learnt, history, strict=True) if at in expected)
    for step, (transitions, _, metrics) in zip(learnt, history, strict=True):
        found = {name for name in metrics if name.startswith("plasticity/")}
        assert found == (NAMES if transitions in expected else set())
        assert ("loss/qf" in metrics) == step
        for name in found:
            value = metrics[name]
            assert value.shape == (2,) and not value.requires_grad and value.isfinite().all()
            assert "magnitude" in name or ((value >= 0) & (value <= 1)).all()
