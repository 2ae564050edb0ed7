"""CrossQ and its batch renormalisation against slow references written from the papers."""

import copy
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from agents import crossq
from lab.training.plasticity import measure
from tests.conftest import (
    drive,
    flat_state,
    make_agent,
    make_steps,
    restore_state,
    same,
    save_state,
)

S, COPIES, B = 2, 2, 6


def statistics(network):
    """Running means, variances and warm-up counters, by name."""
    return {name: value.clone() for name, value in network.named_buffers()
            if name.split(".")[-1] in ("mean", "var", "warmup")}


def unchanged(before, network):
    after = statistics(network)
    assert len(before) == 9 and before.keys() == after.keys()
    return {name: torch.equal(before[name], after[name]) for name in before}


# The update


def reference_network(network, seed, place):
    """BN -> Linear -> ReLU -> BN -> Linear -> ReLU -> BN -> Linear with one copy's weights."""
    def norm(ours):
        theirs = nn.BatchNorm1d(ours.weight.shape[-1], eps=1e-3, momentum=0.01)
        for name, name_of_ours in (("weight", "weight"), ("bias", "bias"),
                                   ("running_mean", "mean"), ("running_var", "var")):
            getattr(theirs, name).data = getattr(ours, name_of_ours).data[seed, place, 0].clone()
        return theirs

    def dense(ours):
        theirs = nn.Linear(*ours.weight.shape[2:])
        theirs.weight.data = ours.weight.data[seed, place].T.clone()
        theirs.bias.data = ours.bias.data[seed, place, 0].clone()
        return theirs

    mlp = network.mlp
    return nn.Sequential(norm(mlp.norms[0]), dense(mlp.fc1), nn.ReLU(),
                         norm(mlp.norms[1]), dense(mlp.fc2), nn.ReLU(),
                         norm(mlp.norms[2]), dense(mlp.head))


class Reference:
    """CrossQ for one seed: section 4.1, with the squashed Gaussian of sac.py."""

    def __init__(self, agent, seed):
        self.c, self.spec, c = agent.config, agent.spec, agent.config
        self.actor = reference_network(agent.actor, seed, 0)
        self.critics = [reference_network(agent.qf, seed, place) for place in (0, 1)]
        self.log_alpha = torch.zeros((), requires_grad=True)
        weights = [p for q in self.critics for p in q.parameters()]
        self.qf_optimizer, self.actor_optimizer, self.alpha_optimizer = (
            torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.999))
            for parameters, lr in ((weights, c.qf_lr), (self.actor.parameters(), c.actor_lr),
                                   ([self.log_alpha], c.qf_lr)))

    def policy(self, obs, noise):
        low, high = torch.tensor(self.spec.action_low), torch.tensor(self.spec.action_high)
        mean, log_std = self.actor(obs).chunk(2, dim=1)
        std = torch.exp(-5 + 3.5 * (torch.tanh(log_std) + 1))
        x = mean + std * noise
        slope = (high - low) / 2 * (1 - torch.tanh(x) ** 2)
        log_probs = Normal(mean, std).log_prob(x).sum(1) - slope.log().sum(1)
        return (high + low) / 2 + (high - low) / 2 * torch.tanh(x), log_probs

    def critic_step(self, obs, actions, next_obs, rewards, terminations, noise):
        self.actor.eval()
        with torch.no_grad():
            next_actions, next_log_probs = self.policy(next_obs, noise)
        both = torch.cat([torch.cat([obs, actions], 1), torch.cat([next_obs, next_actions], 1)])
        joint = [critic.train()(both)[:, 0] for critic in self.critics]
        values, next_values = zip(*(x.split(len(obs)) for x in joint), strict=True)
        smaller = torch.minimum(*next_values).detach()
        soft = smaller - self.log_alpha.exp().item() * next_log_probs
        goal = rewards + self.c.gamma * (1 - terminations) * soft
        self.step(self.qf_optimizer, sum(((x - goal) ** 2).mean() for x in values))

    def actor_step(self, obs, noise):
        self.actor.train()
        actions, log_probs = self.policy(obs, noise)
        values = torch.minimum(
            *(critic.eval()(torch.cat([obs, actions], 1))[:, 0] for critic in self.critics))
        alpha = self.log_alpha.exp().item()
        goal = self.c.target_entropy * self.spec.action_dim
        alpha_loss = -self.log_alpha.exp() * (log_probs.detach() + goal).mean()
        self.step(self.actor_optimizer, (alpha * log_probs - values).mean())
        self.step(self.alpha_optimizer, alpha_loss)

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("seed", [0, 1])
def test_twenty_updates_equal_a_slow_single_seed_reference(float64, seed):
    agent = make_agent(crossq, batch_size=8)
    reference = Reference(agent, seed)
    calls = []
    critic_step, actor_step = agent.update_critic, agent.update_actor
    agent.update_critic = lambda *x: (calls.append((reference.critic_step, x)), critic_step(*x))[1]
    agent.update_actor = lambda *x: (calls.append((reference.actor_step, x)), actor_step(*x))[1]
    start = reference_network(agent.actor, seed, 0).state_dict()
    drive(agent, make_steps((0, 1), 1, 28))
    assert len(calls) == 20 + 6
    for step, tensors in calls:
        step(*(x[seed] for x in tensors))

    for theirs, network, place in ((reference.actor, agent.actor, 0),
                                   (reference.critics[0], agent.qf, 0),
                                   (reference.critics[1], agent.qf, 1)):
        ours, theirs = reference_network(network, seed, place).state_dict(), theirs.state_dict()
        for name in (name for name in ours if "num_batches" not in name):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=1e-10, msg=name)
    assert not any(torch.equal(start[name], value) for name, value in
                   reference.actor.state_dict().items())
    torch.testing.assert_close(agent.log_alpha[seed].detach(), reference.log_alpha.detach())


# Batch renormalisation: 1702.03275, algorithm 1


class Renorm:
    """One unit of one copy in plain floats; `reached` collects every r and d."""

    def __init__(self, weight, bias):
        self.weight, self.bias, self.mean, self.var, self.reached = weight, bias, 0.0, 1.0, []

    def step(self, x, grads, plain):
        """x, dl/dy: lists of B floats -> y, dl/dx, dl/dweight, dl/dbias, as section 3 has them."""
        size = len(x)
        b_mean = sum(x) / size
        b_var = sum((value - b_mean) ** 2 for value in x) / size
        b_std, std = math.sqrt(b_var + 1e-3), math.sqrt(self.var + 1e-3)
        r = min(max(b_std / std, 1 / 3), 3.0)
        d = min(max((b_mean - self.mean) / std, -5.0), 5.0)
        self.reached.append((r, d))
        if plain:
            r, d = 1.0, 0.0
        x_hat = [(value - b_mean) / b_std * r + d for value in x]
        y = [self.weight * value + self.bias for value in x_hat]
        to_x_hat = [g * self.weight for g in grads]
        to_std = sum(-g * r * (value - b_mean) / b_std**2
                     for g, value in zip(to_x_hat, x, strict=True))
        to_mean = sum(-g * r / b_std for g in to_x_hat)
        to_x = [g * r / b_std + to_std * (value - b_mean) / (size * b_std) + to_mean / size
                for g, value in zip(to_x_hat, x, strict=True)]
        to_weight = sum(g * value for g, value in zip(grads, x_hat, strict=True))
        self.mean += 0.01 * (b_mean - self.mean)
        self.var += 0.01 * (b_var * size / (size - 1) - self.var)
        return y, to_x, to_weight, sum(grads)


SPREAD = torch.tensor([1.3, 40.0, 0.05, 0.7, 0.7])  # of a unit in a batch: around r's bounds
CENTRE = torch.tensor([0.4, 0.0, 0.0, 9.0, -9.0])  # around d's bounds


def make_norm(**settings):
    config = SimpleNamespace(**{"renorm": True, "renorm_warmup": 0, **settings})
    norm = crossq.BatchNorm([torch.Generator()] * S, config, len(SPREAD), COPIES)
    generator = torch.Generator().manual_seed(0)
    for p in norm.parameters():
        p.data = torch.rand(p.shape, generator=generator) + 0.5
    return norm


def batches(count):
    generator = torch.Generator().manual_seed(1)
    return [CENTRE + SPREAD * torch.randn(S * COPIES, B, len(SPREAD), generator=generator)
            for _ in range(count)]


def assert_steps_equal_the_reference(norm, plain_steps, count=6):
    """-> every (r, d) of algorithm 1, those of plain steps too."""
    generator = torch.Generator().manual_seed(2)
    places = list(itertools.product(range(S), range(COPIES), range(len(SPREAD))))
    references = {(s, c, u): Renorm(norm.weight[s, c, 0, u].item(), norm.bias[s, c, 0, u].item())
                  for s, c, u in places}
    for step, x in enumerate(batches(count)):
        x.requires_grad_(True)
        norm.zero_grad()
        y = norm(x, True)
        grads = torch.randn(y.shape, generator=generator)
        y.backward(grads)
        for (s, c, u), reference in references.items():
            row = s * COPIES + c
            ours = (y[row, :, u], x.grad[row, :, u], norm.weight.grad[s, c, 0, u],
                    norm.bias.grad[s, c, 0, u])
            theirs = reference.step(x[row, :, u].tolist(), grads[row, :, u].tolist(),
                                    step < plain_steps)
            for a, b in zip([*ours, norm.mean[s, c, 0, u], norm.var[s, c, 0, u]],
                            [*theirs, reference.mean, reference.var], strict=True):
                torch.testing.assert_close(a.detach(), torch.tensor(b), rtol=1e-9, atol=1e-10)
    return [pair for reference in references.values() for pair in reference.reached]


@pytest.mark.parametrize("warmup", [0, 3])
def test_batch_renormalisation_equals_algorithm_1_after_the_warm_up(float64, warmup):
    """And plain batch normalisation before it."""
    reached = assert_steps_equal_the_reference(make_norm(renorm_warmup=warmup), warmup)
    rs, ds = zip(*reached, strict=True)
    assert {min(rs), max(rs)} == {1 / 3, 3.0} and {min(ds), max(ds)} == {-5.0, 5.0}
    assert any(1 / 3 < r < 3 for r in rs) and any(0 < abs(d) < 5 for d in ds)


def test_without_renormalisation_the_norm_stays_plain_for_ever(float64):
    norm, loaded = (make_norm(renorm=False, renorm_warmup=w) for w in (0, 2))
    start = copy.deepcopy(norm.state_dict())
    assert_steps_equal_the_reference(norm, plain_steps=6)
    loaded.load_state_dict(start | {"warmup": norm.warmup})
    assert_steps_equal_the_reference(loaded, plain_steps=6)
    assert loaded.warmup == math.inf


def test_evaluation_reads_the_running_statistics_and_changes_nothing(float64):
    norm = make_norm(renorm_warmup=2)
    for x in batches(4):
        norm(x, True)
        before = copy.deepcopy(norm.state_dict())
        y = norm(x, False)
        assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())
        mean, var, weight, bias = (
            before[name].view(S * COPIES, 1, -1) for name in ("mean", "var", "weight", "bias"))
        torch.testing.assert_close(y, (x - mean) / torch.sqrt(var + 1e-3) * weight + bias)


def test_the_warm_up_goes_on_after_loading(float64):
    steps = batches(6)
    norm, loaded = make_norm(renorm_warmup=4), make_norm(renorm_warmup=40)
    for x in steps[:2]:
        norm(x, True)
    loaded.load_state_dict(norm.state_dict())
    assert "warmup" in norm.state_dict() and loaded.warmup == 2
    for x in steps[2:]:
        assert torch.equal(loaded(x, True), norm(x, True))
    plain = make_norm(renorm=False)
    outputs = [plain(x, True) for x in steps]
    twice = make_norm(renorm_warmup=4)
    assert [torch.equal(twice(x, True), y) for x, y in zip(steps, outputs, strict=True)] == [
        True] * 4 + [False] * 2


def test_each_copy_of_each_seed_has_statistics_of_its_own():
    """A batch that changes in one place changes the output and the statistics there alone."""
    steps = batches(3)
    for changed in range(S * COPIES):
        norms = [make_norm(renorm_warmup=1) for _ in range(2)]
        for x in steps:
            other = x.clone()
            other[changed] = 3 * x[changed] + 1
            ys = [norm(batch, True) for norm, batch in zip(norms, (x, other), strict=True)]
        for a, b in (ys, *([getattr(norm, name).flatten(0, 1) for norm in norms]
                           for name in ("mean", "var"))):
            assert [torch.equal(*rows) for rows in zip(a, b, strict=True)] == [
                place != changed for place in range(S * COPIES)]


# The agent's statistics


def test_a_critics_statistics_ignore_the_other_critic_and_the_other_seed():
    agents = [make_agent(crossq) for _ in range(2)]
    obs, actions = torch.rand(2, 16, 3), torch.rand(2, 16, 2)
    agents[1].qf.mlp.fc1.weight.data[1, 0] *= -2
    for agent in agents:
        agent.qf(obs, actions, train=True)
    for name in ("mean", "var"):
        for layer in (1, 2):
            a, b = (getattr(agent.qf.mlp.norms[layer], name) for agent in agents)
            assert torch.equal(a[0], b[0]) and torch.equal(a[1, 1], b[1, 1])
            assert not torch.equal(a[1, 0], b[1, 0])


@pytest.mark.parametrize("explore", [True, False])
def test_acting_changes_no_statistics(explore):
    agent = make_agent(crossq)
    drive(agent, make_steps((0, 1), 1, 20))
    assert agent.transitions >= agent.learning_starts
    actor, qf = statistics(agent.actor), statistics(agent.qf)
    agent.act(torch.randn(2, 5, 3), explore=explore)
    assert all(unchanged(actor, agent.actor).values()) and all(unchanged(qf, agent.qf).values())


def test_measuring_plasticity_changes_no_statistics():
    agent = make_agent(crossq)
    drive(agent, make_steps((0, 1), 1, 20))
    actor, qf = statistics(agent.actor), statistics(agent.qf)
    metrics = measure(agent)
    assert len(metrics) == 6 and all("plasticity/" in name for name in metrics)
    assert all(unchanged(actor, agent.actor).values()) and all(unchanged(qf, agent.qf).values())


def test_each_step_moves_the_statistics_of_its_own_networks_once():
    agent = make_agent(crossq, renorm_warmup=100)

    def watch(step, moves, rests, calls):
        def watched(*x):
            moving, resting = statistics(moves), statistics(rests)
            metrics = step(*x)
            assert not any(unchanged(moving, moves).values())
            assert all(unchanged(resting, rests).values())
            for name, value in statistics(moves).items():
                before = moving[name]
                assert value == before - 1 if value.dim() == 0 else (value != before).any(-1).all()
            calls.append(1)
            return metrics
        return watched

    critic_calls, actor_calls = [], []
    agent.update_critic = watch(agent.update_critic, agent.qf, agent.actor, critic_calls)
    agent.update_actor = watch(agent.update_actor, agent.actor, agent.qf, actor_calls)
    drive(agent, make_steps((0, 1), 1, 20))
    assert (len(critic_calls), len(actor_calls)) == (12, 4)
    state = flat_state(save_state(agent))
    left = {name: value.item() for name, value in state.items() if name.endswith("warmup")}
    assert len(left) == 6
    assert all(value == (100 - 4 if "actor/" in name else 100 - 12) for name, value in left.items())


def test_a_run_resumed_within_the_warm_up_ends_it_in_time():
    """The taker's own counter would end it elsewhere."""
    steps = make_steps((0, 1), 1, 40)
    agent = make_agent(crossq, renorm_warmup=10)
    drive(agent, steps[:14])
    resumed = make_agent(crossq, seeds=(5, 6), renorm_warmup=10)
    restore_state(resumed, save_state(agent))
    left = resumed.qf.mlp.norms[0].warmup.item()
    assert 0 < left < 10
    for each in (agent, resumed):
        drive(each, steps[14:])
        assert each.qf.mlp.norms[0].warmup < 0 and each.actor.mlp.norms[0].warmup < 10
    theirs, ours = flat_state(save_state(agent)), flat_state(save_state(resumed))
    assert all(same(theirs[name], ours[name]) for name in theirs)


def test_the_actors_step_reads_the_critics_that_are_there_and_moves_none_of_them():
    """After updates and after loading: their weights and statistics, without a gradient for them.
    A critic that were copied once would give the loss of old weights."""
    agent, other = make_agent(crossq), make_agent(crossq, seeds=(7, 8))
    drive(other, make_steps((7, 8), 1, 20))
    obs, noise, losses = torch.rand(2, 16, 3), torch.randn(2, 16, 2), []

    def check():
        with torch.no_grad():
            actions, log_probs = copy.deepcopy(agent.actor)(obs, noise, train=True)
            values = agent.qf(obs, actions).amin(1)
            expected = (agent.log_alpha.exp()[:, None] * log_probs - values).mean(1)
        before = copy.deepcopy(agent.qf.state_dict())
        losses.append(agent.update_actor(obs, noise)["loss/actor"])
        torch.testing.assert_close(losses[-1], expected)
        assert all(p.grad is None for p in agent.qf.parameters())
        assert all(torch.equal(before[name], x) for name, x in agent.qf.state_dict().items())

    check()
    drive(agent, make_steps((0, 1), 1, 20))
    check()
    restore_state(agent, save_state(other))
    check()
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(losses, 2))
