"""XQC against slow references written from the papers."""

import copy
import itertools
import math
from collections import deque

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from agents import xqc
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

ATOMS = [-5 + 0.1 * k for k in range(101)]


# The update


def reference_network(network, seed, place):
    """BN -> (Linear -> BN -> ReLU) x depth -> Linear with one copy's weights."""
    def norm(ours):
        theirs = nn.BatchNorm1d(ours.weight.shape[-1], eps=1e-3, momentum=0.01)
        for name, name_of_ours in (("weight", "weight"), ("bias", "bias"),
                                   ("running_mean", "mean"), ("running_var", "var")):
            getattr(theirs, name).data = getattr(ours, name_of_ours).data[seed, place, 0].clone()
        return theirs

    def dense(ours, bias=None):
        theirs = nn.Linear(*ours.weight.shape[2:], bias=bias is not None)
        theirs.weight.data = ours.weight.data[seed, place].T.clone()
        if bias is not None:
            theirs.bias.data = bias.data[seed, place, 0].clone()
        return theirs

    mlp, modules = network.mlp, [norm(network.mlp.norms[0])]
    for layer, after in zip(mlp.layers, mlp.norms[1:], strict=True):
        modules += [dense(layer), norm(after), nn.ReLU()]
    return nn.Sequential(*modules, dense(mlp.head, mlp.bias))


def unit_rows(network):
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, nn.Linear):
                for row in layer.weight:
                    row /= math.sqrt(sum(w * w for w in row.tolist()))


def slow_projection(probs, rewards, discounts, bonus):
    """One transition in plain floats, after algorithm 1 of 1707.06887."""
    target = [0.0] * 101
    for p, atom in zip(probs, ATOMS, strict=True):
        value = min(max(rewards + discounts * (atom + bonus), -5.0), 5.0)
        place = round((value + 5) / 0.1, 9)
        below, above = math.floor(place), math.ceil(place)
        if below == above:
            target[below] += p
        else:
            target[below] += p * (above - place)
            target[above] += p * (place - below)
    return target


class Reference:
    """One seed's networks, optimisers and steps, without a stack."""

    def __init__(self, agent, seed):
        self.c, self.spec, self.agent = agent.config, agent.spec, agent
        self.actor = reference_network(agent.actor, seed, 0)
        self.critics = [reference_network(agent.qf, seed, place) for place in (0, 1)]
        self.slow = [reference_network(agent.qf_target, seed, place) for place in (0, 1)]
        self.log_alpha = torch.tensor(math.log(0.01), requires_grad=True)
        weights = [p for q in self.critics for p in q.parameters()]
        self.qf_optimizer, self.actor_optimizer, self.alpha_optimizer = (
            torch.optim.Adam(parameters, lr=1e-3)
            for parameters in (weights, self.actor.parameters(), [self.log_alpha]))

    def policy(self, obs, noise):
        low, high = torch.tensor(self.spec.action_low), torch.tensor(self.spec.action_high)
        mean, log_std = self.actor(obs).chunk(2, dim=1)
        std = torch.exp(-5 + 3.5 * (torch.tanh(log_std) + 1))
        x = mean + std * noise
        log_probs = Normal(mean, std).log_prob(x).sum(1) - (1 - torch.tanh(x) ** 2).log().sum(1)
        return (high + low) / 2 + (high - low) / 2 * torch.tanh(x), log_probs

    def critic_step(self, obs, actions, next_obs, rewards, discounts, scale, noise):
        self.actor.eval()
        with torch.no_grad():
            next_actions, next_log_probs = self.policy(next_obs, noise)
        both = torch.cat([torch.cat([obs, actions], 1), torch.cat([next_obs, next_actions], 1)])
        B, alpha = len(obs), self.log_alpha.exp().item()
        with torch.no_grad():
            later = [torch.softmax(critic.train()(both)[B:], 1) for critic in self.slow]
        targets = []
        for b in range(B):
            lower = min((probs[b].tolist() for probs in later), key=mean)
            targets.append(slow_projection(lower, rewards[b].item() / scale.item(),
                                           discounts[b].item(), -alpha * next_log_probs[b].item()))
        logits = [critic.train()(both)[:B] for critic in self.critics]
        loss = sum(nn.functional.cross_entropy(x, torch.tensor(targets)) for x in logits)
        self.step(self.qf_optimizer, loss)
        for slow, critic in zip(self.slow, self.critics, strict=True):
            unit_rows(critic)
            with torch.no_grad():
                for old, new in zip(slow.parameters(), critic.parameters(), strict=True):
                    old += self.c.tau * (new - old)

    def actor_step(self, obs, noise):
        self.actor.train()
        actions, log_probs = self.policy(obs, noise)
        means = [torch.softmax(critic.eval()(torch.cat([obs, actions], 1)), 1) @ torch.tensor(ATOMS)
                 for critic in self.critics]
        alpha = self.log_alpha.exp().item()
        goal = -0.5 * self.spec.action_dim
        alpha_loss = -self.log_alpha.exp() * (log_probs.detach() + goal).mean()
        self.step(self.actor_optimizer, (alpha * log_probs - torch.minimum(*means)).mean())
        self.step(self.alpha_optimizer, alpha_loss)
        unit_rows(self.actor)

    def step(self, optimizer, loss):
        """At 3e-4 at the run's start, 3e-5 at its end."""
        share = self.agent.transitions / 1000
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - share) + 1e-4 * share
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def mean(probs):
    return sum(p * atom for p, atom in zip(probs, ATOMS, strict=True))


@pytest.mark.parametrize("seed, depth", [(0, 2), (1, 3)])
def test_twenty_updates_equal_a_slow_single_seed_reference(float64, seed, depth):
    agent = make_agent(xqc, batch_size=8, n_step=2, qf_depth=depth, actor_depth=depth - 1,
                       total_steps=1000)
    reference = Reference(agent, seed)
    calls = []
    critic_step, actor_step = agent.update_critic, agent.update_actor

    def watched(step, ours):
        def both(*tensors):
            step(*(x[seed] for x in tensors))
            calls.append(step)
            return ours(*tensors)
        return both

    agent.update_critic = watched(reference.critic_step, critic_step)
    agent.update_actor = watched(reference.actor_step, actor_step)
    start = reference_network(agent.actor, seed, 0).state_dict()
    drive(agent, make_steps((0, 1), 1, 28))
    assert len(calls) == 20 + 6

    for theirs, network, place in ((reference.actor, agent.actor, 0),
                                   *((reference.critics[c], agent.qf, c) for c in (0, 1)),
                                   *((reference.slow[c], agent.qf_target, c) for c in (0, 1))):
        ours, theirs = reference_network(network, seed, place).state_dict(), theirs.state_dict()
        for name in (name for name in ours if "num_batches" not in name):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-7, atol=1e-9, msg=name)
    assert not any(torch.equal(start[name], value) for name, value in
                   reference.actor.state_dict().items())
    torch.testing.assert_close(agent.log_alpha[seed].detach(), reference.log_alpha.detach())


def test_a_critics_weights_have_length_1_and_its_biases_are_free():
    agent = make_agent(xqc, qf_depth=3)
    for updates in (0, 12):
        drive(agent, make_steps((0, 1), 1, 8 + updates) if updates else [])
        for network, depth in ((agent.actor, 2), (agent.qf, 3)):
            layers = [*network.mlp.layers, network.mlp.head]
            assert len(layers) == depth + 1
            for layer in layers:
                lengths = layer.weight.square().sum(2).sqrt()
                torch.testing.assert_close(lengths, torch.ones_like(lengths))
            assert (network.mlp.bias != 0).any() == (updates > 0)


def test_weights_start_orthogonal(float64):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    weight = xqc.Linear(generators, 9, 5, copies=2).weight
    torch.testing.assert_close(weight.mT @ weight, torch.eye(5).expand(2, 2, 5, 5))
    assert len({round(x, 9) for x in weight[:, :, 0, 0].flatten().tolist()}) == 4
    signs = [xqc.Linear([torch.Generator().manual_seed(k)], 3, 2).weight[0, 0, 0].sign().tolist()
             for k in range(100)]
    assert all(30 < column.count(1.0) < 70 for column in zip(*signs, strict=True))


# Values


def test_the_projection_equals_a_plain_loop(float64):
    generator = torch.Generator().manual_seed(0)
    probs = (3 * torch.randn(2, 40, 101, generator=generator)).softmax(-1)
    rewards, discounts, bonus = (torch.rand(2, 40, generator=generator) for _ in range(3))
    rewards = 12 * rewards - 6  # some beyond the atoms
    discounts[:, ::5], bonus[:, ::3] = 0, 0
    rewards[:, ::10] = torch.tensor([-5.0, 0.3, 5.0, 7.0])  # on an atom, at the ends and beyond
    target = xqc.project(probs, rewards, discounts, bonus)
    for index in torch.cartesian_prod(torch.arange(2), torch.arange(40)):
        s, b = index.tolist()
        expected = slow_projection(*(x[s, b].tolist() for x in (probs, rewards, discounts, bonus)))
        torch.testing.assert_close(target[s, b], torch.tensor(expected))
    torch.testing.assert_close(target.sum(-1), torch.ones(2, 40))
    inside = xqc.project(probs, rewards / 12, 0.5 * discounts, bonus)
    torch.testing.assert_close(
        xqc.mean_value(inside), rewards / 12 + 0.5 * discounts * (xqc.mean_value(probs) + bonus))


def test_a_nan_projects_to_nan_in_its_own_transition_alone():
    probs = torch.full((1, 3, 101), 1 / 101)
    rewards = torch.tensor([[0.0, float("nan"), 1.0]])
    target = xqc.project(probs, rewards, torch.ones(1, 3), torch.zeros(1, 3))
    assert target.isnan().any(-1).tolist() == [[False, True, False]]


def test_a_mean_is_not_rounded_to_bf16():
    probs = torch.randn(2, 50, 101, generator=torch.Generator().manual_seed(0)).softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        values = xqc.mean_value(probs)
    torch.testing.assert_close(values.double(), probs.double() @ torch.tensor(ATOMS).double(),
                               rtol=1e-6, atol=1e-6)


# The reward's scale


def slow_scale(returns):
    average = sum(returns) / len(returns)
    std = math.sqrt(sum((x - average) ** 2 for x in returns) / len(returns))
    return max(std, max(abs(x) for x in returns) / 5)


@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_scale_equals_a_slow_one_from_every_step_so_far(float64, num_envs):
    agent = make_agent(xqc, num_envs=num_envs, gamma=0.9)
    running, seen = torch.zeros(2, num_envs), ([], [])
    larger = set()
    for step, (obs, rewards, next_obs, *ends) in enumerate(make_steps((0, 1), num_envs, 40)):
        rewards = 30 * rewards - 15
        rewards[:, 0] += 300 * (step == 30)
        agent.observe(obs, obs[..., :2], rewards, next_obs, *ends)
        running = 0.9 * running + rewards
        for seed in (0, 1):
            seen[seed].extend(running[seed].tolist())
        running[(ends[0] + ends[1]) > 0] = 0
        expected = [slow_scale(returns) for returns in seen]
        torch.testing.assert_close(agent.reward_scale.value(), torch.tensor(expected))
        larger |= {scale > max(abs(x) for x in returns) / 5 + 1e-9
                   for scale, returns in zip(expected, seen, strict=True)}
    assert larger == {False, True}


def test_scaled_rewards_are_finite_while_all_are_0_and_bounded_ever_after():
    agent = make_agent(xqc)
    for step, (obs, _, next_obs, *ends) in enumerate(make_steps((0, 1), 1, 40)):
        rewards = torch.full((2, 1), 1e6 if step == 20 else 1e-3 if step > 20 else 0.0)
        agent.observe(obs, obs[..., :2], rewards, next_obs, *ends)
        scaled = agent.replay.rows[..., -3] / agent.reward_scale.value()[:, None]
        assert scaled.isfinite().all() and scaled.abs().max() <= 10
    assert scaled.max() == 5


# Targets of several steps


@pytest.mark.parametrize("num_envs, steps", [(1, 5), (1, 40), (2, 40), (3, 50)])
def test_targets_of_several_steps_equal_slow_ones(float64, num_envs, steps):
    """Before the replay is full and after it has wrapped round."""
    n, gamma, rows = 3, 0.9, 16 * num_envs
    agent = make_agent(xqc, num_envs=num_envs, buffer_size=rows, gamma=gamma, n_step=n)
    history = [[deque(maxlen=16) for _ in range(num_envs)] for _ in range(2)]
    for obs, rewards, next_obs, terminations, truncations in make_steps((0, 1), num_envs, steps):
        agent.observe(obs, obs[..., :2], rewards, next_obs, terminations, truncations)
        for s in (0, 1):
            for e in range(num_envs):
                history[s][e].append([x[s, e] for x in (obs, rewards, next_obs, terminations,
                                                        truncations)])
    expected, lengths = [{}, {}], set()
    for s in (0, 1):
        for episodes in history[s]:
            for start in range(len(episodes)):
                total, length = 0.0, 0
                for row in list(episodes)[start:start + n]:
                    _, reward, next_obs, termination, truncation = row
                    total += gamma**length * reward.item()
                    length += 1
                    if termination or truncation:
                        break
                lengths.add((length, bool(termination), bool(truncation)))
                expected[s][tuple(episodes[start][0].tolist())] = (
                    next_obs.tolist(), total, 0.0 if termination else gamma**length)
    obs, actions, next_obs, rewards, discounts = agent.replay.sample(500, n, gamma)
    for s in (0, 1):
        rows = {tuple(x) for x in obs[s].tolist()}
        assert rows == expected[s].keys()
        for b, row in enumerate(map(tuple, obs[s].tolist())):
            successor, total, discount = expected[s][row]
            assert next_obs[s, b].tolist() == successor
            assert rewards[s, b].item() == pytest.approx(total)
            assert discounts[s, b].item() == pytest.approx(discount)
    assert torch.equal(actions, obs[..., :2])
    if steps > 5:
        assert {(n, False, False), (1, False, False), (2, True, False), (2, False, True)} <= lengths


# Exploration


def exploring(num_envs, steps, groups=1, **settings):
    """Noise of each step, (steps, S, N, A): the actions of an actor with mean 0 and std 1."""
    agent = make_agent(xqc, num_envs=num_envs, learning_starts=1, **settings)
    agent.transitions = 1
    agent.actor.forward = lambda obs, noise: (noise, None)
    agent.low, agent.high = torch.tensor(-math.inf), torch.tensor(math.inf)
    obs = torch.zeros(2, num_envs // groups, 3)
    return torch.stack([torch.cat([agent.act(obs) for _ in range(groups)], 1)
                        for _ in range(steps)])


def holds(noise):
    """The lengths of its constant stretches, without the last; noise (steps, A)."""
    changes = [0] + [t for t in range(1, len(noise)) if not torch.equal(noise[t], noise[t - 1])]
    return [b - a for a, b in itertools.pairwise(changes)]


@pytest.mark.parametrize("groups", [1, 2])
def test_noise_is_held_for_n_steps_with_a_probability_of_1_over_n_squared(groups):
    noise = exploring(4, 800, groups, hold_noise=True)
    lengths = [n for s in (0, 1) for e in range(4) for n in holds(noise[:, s, e])]
    total = sum(k**-2 for k in range(1, 17))
    assert max(lengths) == 16 and len(lengths) > 2_000
    for n in range(1, 17):
        p = n**-2 / total
        error = math.sqrt(p * (1 - p) / len(lengths))
        assert abs(lengths.count(n) / len(lengths) - p) < 4 * error, n
    draws = torch.cat([noise[:, s, e][[0, *torch.tensor(holds(noise[:, s, e])).cumsum(0)]]
                       for s in (0, 1) for e in range(4)])
    assert abs(draws.mean()) < 0.05 and abs(draws.std() - 1) < 0.05
    assert abs(torch.corrcoef(draws.T)[0, 1]) < 0.05


def test_noise_is_not_held_unless_asked_for():
    assert set(holds(exploring(1, 100)[:, 0, 0])) == {1}


def test_more_environments_than_it_has_are_explored_without_holding():
    agent = make_agent(xqc, num_envs=2, hold_noise=True, learning_starts=1)
    agent.transitions = 1
    before = agent.held.clone()
    assert agent.act(torch.zeros(2, 7, 3)).shape == (2, 7, 2)
    assert torch.equal(before, agent.held)
    agent.act(torch.zeros(2, 2, 3), explore=False)
    assert torch.equal(before, agent.held)
    agent.act(torch.zeros(2, 2, 3))
    assert not torch.equal(before, agent.held)


# State


@pytest.mark.parametrize("look", [lambda agent: agent.act(torch.randn(2, 5, 3)), measure])
def test_acting_and_measuring_change_no_statistics(look):
    agent = make_agent(xqc, qf_depth=3)
    drive(agent, make_steps((0, 1), 1, 20))
    before = {name: value.clone() for network in ("actor", "qf", "qf_target")
              for name, value in flat_state(getattr(agent, network).state_dict(), network).items()
              if isinstance(value, torch.Tensor)}
    look(agent)
    for network in ("actor", "qf", "qf_target"):
        for name, value in flat_state(getattr(agent, network).state_dict(), network).items():
            assert torch.equal(before[name], value), name


def test_a_resumed_run_goes_on_with_its_step_size_and_its_noise():
    steps = make_steps((0, 1), 2, 24)
    agent, resumed = (make_agent(xqc, seeds=seeds, num_envs=2, total_steps=48, hold_noise=True)
                      for seeds in ((0, 1), (5, 6)))
    drive(agent, steps[:14])
    restore_state(resumed, copy.deepcopy(save_state(agent)))
    for each in (agent, resumed):
        drive(each, steps[14:])
        lr = each.qf_optimizer.param_groups[0]["lr"].item()
        assert lr == pytest.approx(1e-3 - 9e-4 * 46 / 48)
    theirs, ours = flat_state(save_state(agent)), flat_state(save_state(resumed))
    assert all(same(theirs[name], ours[name]) for name in theirs)
