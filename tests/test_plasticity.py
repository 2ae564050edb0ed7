"""Plasticity metrics: checked by hand, on every agent, and when the harness logs them."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from agents import ppo, sac
from lab.training import plasticity as metrics_of
from lab.training.job import Job
from lab.training.loop import train
from lab.training.plasticity import measure, plasticity
from tests.conftest import (
    drive,
    flat_state,
    make_agent,
    make_steps,
    save_state,
    small_config,
)

WIDTH = 16  # of the tests' networks


def networks(agent):
    """-> hidden layers and copies of each network that is measured."""
    deep = hasattr(agent, "qf") and type(agent.qf.mlp).__name__ == "BroNet"
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


def measured(network, *hidden):
    metrics = plasticity("net", network, [torch.stack(layer) for layer in hidden])
    assert list(metrics) == [f"plasticity/net_{kind}" for kind in (
        "weight_magnitude", "dead_units", "dormant_ratio")]
    assert not any(value.requires_grad for value in metrics.values())
    return [value.tolist() for value in metrics.values()]


ALIVE, ZERO, CONSTANT = [1.0, 0.0, 5.0], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0]  # activities 2, 0, 2
FAINT, STRONG = [0.0, 3.0, 0.0], [79.0, 78.0, 80.0]  # activities 1 and 79
HUGE = [7900.0, 7800.0, 8000.0]
FAINTER, FAINT_NO_MORE = [0.0, 2.98, 0.0], [0.0, 3.02, 0.0]
SIGNED = [-3.0, 0.0, 3.0]  # activity 2, mean 0


def test_one_network_a_seed_by_hand():
    network = network_of([[1.0, -2.0, 3.0], [0.5, -0.5, 0.0]], [[[-6.0]], [[1.0]]])
    narrow = [units(ALIVE, ZERO), units(ALIVE, CONSTANT)]
    wide = [units(ALIVE, ALIVE, SIGNED, CONSTANT), units(ZERO, ZERO, ALIVE, ZERO)]
    magnitude, dead, dormant = measured(network, narrow, wide)
    assert magnitude == pytest.approx([12 / 4, 2 / 4])
    assert dead == pytest.approx([2 / 6, 4 / 6])
    assert dormant == pytest.approx([1 / 6, 3 / 6])


def test_a_unit_is_dormant_up_to_a_fortieth_of_its_layers_mean():
    """The mean of (79, 1) is 40."""
    network = network_of([[1.0], [1.0]])
    _, dead, dormant = measured(
        network, [units(STRONG, FAINT), units(STRONG, FAINT)],
        [units(STRONG, FAINTER), units(STRONG, FAINT_NO_MORE)])
    assert dead == [0, 0] and dormant == [2 / 4, 1 / 4]


def test_a_layer_of_zeros_is_dormant():
    _, dead, dormant = measured(network_of([[0.0], [0.0]]),
                                [units(ZERO, ZERO), units(CONSTANT, CONSTANT)])
    assert dead == [1, 1] and dormant == [1, 0]


def test_two_copies_a_seed_by_hand():
    """Each copy's layer has a mean of its own: a strong copy does not make a faint one dormant."""
    network = network_of([[[1.0], [-3.0]], [[0.0], [4.0]]])
    narrow = [units(HUGE, HUGE), units(FAINT, ALIVE), units(ZERO, ALIVE), units(FAINT, FAINT)]
    wide = [units(ALIVE, ALIVE, CONSTANT), units(ALIVE, ALIVE, ALIVE),
            units(STRONG, CONSTANT, ZERO), units(ALIVE, ZERO, ALIVE)]
    magnitude, dead, dormant = measured(network, narrow, wide)
    assert magnitude == [2, 2]
    assert dead == pytest.approx([1 / 10, 4 / 10])
    assert dormant == pytest.approx([0, 3 / 10])


def learnt(module, **settings):
    """An agent after some updates."""
    agent = make_agent(module, seeds=(0, 1, 2), num_envs=3, replay_ratio=1.0, policy_delay=1,
                       **settings)
    assert drive(agent, make_steps((0, 1, 2), 3, 12))
    return agent


def silence(agent, network, layer, seed, copy, unit):
    """A unit of that hidden layer gives 0 whatever its input."""
    network = getattr(agent, network)
    if isinstance(network, ppo.Network) or not hasattr(network, "mlp"):  # a tanh of 0
        fc = (network.fc1, network.fc2)[layer]
        fc.weight.data[seed, :, unit] = fc.bias.data[seed, :, unit] = 0
        return
    mlp = network.mlp
    if hasattr(mlp, "layers"):  # BRO's
        last = mlp.norms[(1, 2, 4)[layer]]
    else:
        fc = (mlp.fc1, mlp.fc2)[layer]
        last = fc[1] if isinstance(fc, nn.Sequential) else fc
    last.bias.data[seed, copy, 0, unit] = -1e6  # what is added last before that ReLU


def dead(hidden, row):
    """-> for each layer of a row, whether each unit gives one and the same for the whole batch."""
    return [[len(set(unit)) == 1 for unit in x[row].T.tolist()] for x in hidden]


def test_a_silenced_unit_of_any_layer_is_counted_in_its_seed_alone(module):
    """With those that it silences in later layers, or wakes there."""
    agent = learnt(module)
    before, state = measure(agent), {name: [p.clone() for p in getattr(agent, name).parameters()]
                                     for name in networks(agent)}
    assert before.keys() == names(agent)
    for network, (layers, copies) in networks(agent).items():
        for copy, layer in itertools.product(range(copies), range(layers)):
            row, name = copies + copy, f"plasticity/{network}_dead_units"
            alive = dead(agent.hidden_activations()[network], row)
            unit = alive[layer].index(False)
            silence(agent, network, layer, 1, copy, unit)
            after, hidden = measure(agent), agent.hidden_activations()[network]
            now = [flag for r in range(copies) for flags in dead(hidden, copies + r)
                   for flag in flags]
            assert dead(hidden, row)[layer] == [
                flag or u == unit for u, flag in enumerate(alive[layer])]
            assert after[name][1].item() == pytest.approx(sum(now) / len(now))
            assert len(now) == layers * copies * WIDTH
            for other in names(agent) - {f"plasticity/{network}_weight_magnitude"}:
                same_network = other.startswith(f"plasticity/{network}_")
                for seed in (0, 2) if same_network else (0, 1, 2):
                    assert after[other][seed] == before[other][seed], other
            for p, old in zip(getattr(agent, network).parameters(), state[network], strict=True):
                p.data.copy_(old)
            assert all(torch.equal(before[other], value) for other, value in
                       measure(agent).items())


def test_every_layer_of_each_network_counts_and_nothing_else(module, monkeypatch):
    """What a ReLU or a tanh gives: no sum of a residual block."""
    seen = []
    monkeypatch.setattr(metrics_of, "plasticity", lambda name, network, hidden: (
        seen.append((name, network, hidden)), plasticity(name, network, hidden))[1])
    agent = learnt(module)
    measure(agent)
    rows = 3 * 8 // 4 if "ppo" in module.Agent.name else 16  # a minibatch's
    expected = networks(agent)
    assert {name for name, *_ in seen} == expected.keys()
    for name, network, hidden in seen:
        layers, copies = expected[name]
        assert network is getattr(agent, name)
        assert [tuple(x.shape) for x in hidden] == layers * [(3 * copies, rows, WIDTH)]
        ends = [(x.amin(), x.amax()) for x in hidden]
        assert all(-1 <= low < high <= 1 for low, high in ends) or all(
            low == 0 < high for low, high in ends)


def test_each_seed_is_measured_on_its_own_batch(module):
    agent = learnt(module)
    before = measure(agent)
    if "ppo" in module.Agent.name:
        agent.last_obs[1] = 0
    else:
        for x in agent.batch:
            x[1] = 0
    after = measure(agent)
    for name in names(agent):
        assert torch.equal(after[name][[0, 2]], before[name][[0, 2]]), name
    for network in networks(agent):
        assert before[f"plasticity/{network}_dead_units"][1] < 0.5
        assert after[f"plasticity/{network}_dead_units"][1] > 0.5


def test_measuring_draws_no_number_builds_no_graph_and_changes_no_state(module):
    """So that what is logged does not decide what is learnt: also the next updates are the same."""
    agents = learnt(module), learnt(module)
    before = [flat_state(save_state(agent)) for agent in agents]
    before = [{name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in state.items()}
              for state in before]
    hidden_activations, graphs = agents[0].hidden_activations, []

    def watched():
        hidden = hidden_activations()
        graphs.extend(x.requires_grad for layers in hidden.values() for x in layers)
        return hidden

    agents[0].hidden_activations = watched
    state = torch.get_rng_state()
    metrics = measure(agents[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert metrics.keys() == names(agents[0]) and graphs and not any(graphs)
    for value in metrics.values():
        assert value.shape == (3,) and not value.requires_grad and value.isfinite().all()
    for agent, old in zip(agents, before, strict=True):
        new = flat_state(save_state(agent))
        assert new.keys() == old.keys()
        assert all(torch.equal(x, new[name]) if isinstance(x, torch.Tensor) else x == new[name]
                   for name, x in old.items())
        assert not any(p.grad is not None for name in networks(agent)
                       for p in getattr(agent, name).parameters())
    histories = [drive(agent, make_steps((3, 4, 5), 3, 10)) for agent in agents]
    assert histories[0] and len(histories[0]) == len(histories[1])
    for ours, theirs in zip(*histories, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_agent_without_hidden_activations_is_not_measured():
    assert measure(object()) == {}


def test_the_weights_are_those_of_each_seeds_whole_network(module):
    agent = learnt(module)
    metrics = measure(agent)
    for name in networks(agent):
        for seed in (0, 1):
            weights = torch.cat([p[seed].flatten() for p in getattr(agent, name).parameters()])
            mean = sum(map(abs, weights.tolist())) / len(weights)
            assert metrics[f"plasticity/{name}_weight_magnitude"][seed].item() == pytest.approx(
                mean, rel=1e-4)


def test_the_harness_measures_when_it_writes_a_row_that_an_update_came_before(monkeypatch):
    """A step in three has an update, a step in two a row."""
    calls, messages = [], []
    monkeypatch.setattr(metrics_of, "measure", lambda agent: (
        calls.append(agent.transitions), measure(agent))[1])
    config = dataclasses.asdict(small_config(sac, replay_ratio=1 / 3))
    train(Job("agents/sac.py", config, "torch/Pendulum-v1", seeds=(0, 1), steps=60, eval_every=60,
              log_every=2, checkpoint_every=0, eval_episodes=1, num_envs=1), messages.append)
    rows = [(m["step"], row) for m in messages for row in m.get("rows", {}).values()]
    found = {step: {name for name in row if name.startswith("plasticity/")} for step, row in rows}
    wanted = {f"plasticity/{network}_{kind}" for network in ("actor", "qf")
              for kind in ("weight_magnitude", "dead_units", "dormant_ratio")}
    assert all(found[step] == (wanted if "loss/qf" in row else set()) for step, row in rows)
    measured_at = [step for step, names in found.items() if names]
    assert calls == measured_at and 10 < len(measured_at) < 20


def test_the_harness_does_not_measure_before_the_first_update_of_a_resumed_run(
        tmp_path, monkeypatch):
    """The last batch is no part of a checkpoint. An update in three steps, rows at all of them."""
    batches, messages = [], []
    monkeypatch.setattr(metrics_of, "measure", lambda agent: (
        batches.append(agent.batch), measure(agent))[1])
    job = Job("agents/sac.py", dataclasses.asdict(small_config(sac, replay_ratio=1 / 3)),
              "torch/Pendulum-v1", seeds=(0, 1), steps=21, eval_every=60, log_every=1,
              checkpoint_every=0, eval_episodes=1, run=str(tmp_path))
    train(job, messages.append)
    before, batches[:] = len(batches), []
    messages.clear()
    train(dataclasses.replace(job, steps=42), messages.append)
    rows = [row for m in messages for row in m.get("rows", {}).values()]
    assert before and batches and all(batch is not None for batch in batches)
    assert len(rows) == 2 * 21 and 0 < sum("loss/qf" in row for row in rows) < len(rows)
    assert "loss/qf" not in rows[0], "the first row comes before an update"
