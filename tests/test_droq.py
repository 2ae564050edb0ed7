"""DroQ against a slow reference written from the paper; the distribution of its dropout masks."""

import itertools

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from agents import droq
from lab.training.plasticity import measure
from tests.conftest import drive, make_agent, make_steps

NETWORKS = ("qf", "qf_target")


def masks_of(agent, name):
    """-> which units of each hidden layer are kept, (S, 2, B, width)."""
    masks = []
    for layer in getattr(agent, name).modules():
        if isinstance(layer, droq.DropoutNorm):
            masks.append(torch.ones(len(layer.dropped), *layer.shape))
            masks[-1].view(len(layer.dropped), -1).scatter_(
                1, layer.dropped[:, : layer.drops], 0)
    return masks


class Dropout(nn.Module):
    """Keeps the units that it is told to, scaled so that the mean stays."""

    def __init__(self, p):
        super().__init__()
        self.p, self.kept = p, None

    def forward(self, x):
        return x * self.kept / (1 - self.p)


class Reference:
    """DroQ for one seed: algorithm 2, with the squashed Gaussian of sac.py."""

    def __init__(self, agent, seed):
        self.c, self.spec, c = agent.config, agent.spec, agent.config
        self.actor, self.critics, self.targets = networks(agent, seed)
        self.log_alpha = torch.zeros((), requires_grad=True)
        weights = [p for q in self.critics for p in q.parameters()]
        self.qf_optimizer, self.actor_optimizer, self.alpha_optimizer = (
            torch.optim.Adam(parameters, lr=lr) for parameters, lr in (
                (weights, c.qf_lr), (self.actor.parameters(), c.actor_lr),
                ([self.log_alpha], c.qf_lr)))

    def policy(self, obs, noise):
        low, high = torch.tensor(self.spec.action_low), torch.tensor(self.spec.action_high)
        mean, log_std = self.actor(obs).chunk(2, dim=1)
        std = torch.exp(-5 + 3.5 * (torch.tanh(log_std) + 1))
        x = mean + std * noise
        slope = (high - low) / 2 * (1 - torch.tanh(x) ** 2)
        log_probs = Normal(mean, std).log_prob(x).sum(1) - slope.log().sum(1)
        return (high + low) / 2 + (high - low) / 2 * torch.tanh(x), log_probs

    def values(self, critics, kept, obs, actions):
        """kept: of each hidden layer, (2, B, width)."""
        for place, critic in enumerate(critics):
            for dropout, layer in zip((critic[1], critic[5]), kept, strict=True):
                dropout.kept = layer[place]
        return [critic(torch.cat([obs, actions], 1))[:, 0] for critic in critics]

    def critic_step(self, kept, obs, actions, next_obs, rewards, terminations, noise):
        with torch.no_grad():
            next_actions, next_log_probs = self.policy(next_obs, noise)
            smaller = torch.minimum(
                *self.values(self.targets, kept["qf_target"], next_obs, next_actions))
            soft = smaller - self.log_alpha.exp() * next_log_probs
            goal = rewards + self.c.gamma * (1 - terminations) * soft
        values = self.values(self.critics, kept["qf"], obs, actions)
        self.step(self.qf_optimizer, sum(((x - goal) ** 2).mean() for x in values))
        for target, critic in zip(self.targets, self.critics, strict=True):
            for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
                slow.data = (1 - self.c.tau) * slow.data + self.c.tau * fast.data

    def actor_step(self, kept, obs, noise):
        actions, log_probs = self.policy(obs, noise)
        first, second = self.values(self.critics, kept["qf"], obs, actions)
        alpha = self.log_alpha.exp().item()
        goal = self.c.target_entropy * self.spec.action_dim
        alpha_loss = -self.log_alpha.exp() * (log_probs.detach() + goal).mean()
        self.step(self.actor_optimizer, (alpha * log_probs - (first + second) / 2).mean())
        self.step(self.alpha_optimizer, alpha_loss)

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def networks(agent, seed):
    """-> the actor, the critics and the targets of one seed as plain modules."""
    def dense(ours, place):
        theirs = nn.Linear(*ours.weight.shape[2:])
        theirs.weight.data = ours.weight.data[seed, place].T.clone()
        theirs.bias.data = ours.bias.data[seed, place, 0].clone()
        return theirs

    def critic(mlp, place):
        layers = []
        for linear, ours in (mlp.fc1, mlp.fc2):
            norm = nn.LayerNorm(ours.weight.shape[-1], eps=1e-5)
            norm.weight.data = ours.weight.data[seed, place, 0].clone()
            norm.bias.data = ours.bias.data[seed, place, 0].clone()
            layers += [dense(linear, place), Dropout(agent.config.dropout), norm, nn.ReLU()]
        return nn.Sequential(*layers, dense(mlp.head, place))

    mlp = agent.actor.mlp
    actor = nn.Sequential(dense(mlp.fc1, 0), nn.ReLU(), dense(mlp.fc2, 0), nn.ReLU(),
                          dense(mlp.head, 0))
    return actor, *([critic(network.mlp, place) for place in (0, 1)]
                    for network in (agent.qf, agent.qf_target))


@pytest.mark.parametrize("seed", [0, 1])
def test_twenty_updates_equal_a_slow_single_seed_reference(float64, seed):
    agent = make_agent(droq, batch_size=8, dropout=0.3, replay_ratio=4.0, policy_delay=4)
    reference = Reference(agent, seed)
    calls = []

    def watch(step, theirs):
        def watched(*x):
            kept = {name: [mask[seed] for mask in masks_of(agent, name)] for name in NETWORKS}
            calls.append((theirs, kept, x))
            return step(*x)
        return watched

    agent.update_critic = watch(agent.update_critic, reference.critic_step)
    agent.update_actor = watch(agent.update_actor, reference.actor_step)
    drive(agent, make_steps((0, 1), 1, 13))
    assert len(calls) == 20 + 5
    for step, kept, tensors in calls:
        step(kept, *(x[seed] for x in tensors))

    actor, critics, targets = networks(agent, seed)
    for ours, theirs in zip([actor, *critics, *targets],
                            [reference.actor, *reference.critics, *reference.targets],
                            strict=True):
        for name, value in theirs.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name), value, rtol=1e-8, atol=1e-10,
                                       msg=name)
    torch.testing.assert_close(agent.log_alpha[seed].detach(), reference.log_alpha.detach())


@pytest.mark.parametrize("p", [0.01, 0.3])
def test_each_unit_is_dropped_with_probability_p_and_with_no_other(p):
    """Bounds of five standard deviations on the share of all units, of each unit, of neighbours
    that drop together, and on the spread of the count in a sample's layer. Two units are drawn
    apart from each other but for the draws of a whole batch being a fixed number."""
    agent = make_agent(droq, dropout=p, qf_width=64)
    masks = []
    for _ in range(750):
        agent._set_dropout(True, agent.qf, agent.qf_target)
        masks += [mask for name in NETWORKS for mask in masks_of(agent, name)]
    dropped = 1 - torch.cat(masks).flatten(1).double()  # (draws, 2 * B * width)
    draws, units = dropped.shape
    number = agent.qf.mlp.fc1[1].dropped.shape[1]
    kept, both_kept = (1 - 1 / units)**number, (1 - 2 / units)**number
    assert abs(1 - kept - p) < 1 / units and abs(both_kept - kept**2) < 1 / units
    p, both = 1 - kept, 1 - 2 * kept + both_kept

    def deviations(values, mean, variance, count):
        return (values - mean).abs().max().item() / (variance / count) ** 0.5

    assert deviations(dropped.mean(), p, p * (1 - p), draws * units) < 5
    assert deviations(dropped.mean(0), p, p * (1 - p), draws) < 5
    z = (dropped.mean(0) - p) / (p * (1 - p) / draws) ** 0.5
    assert deviations(z.square().mean(), 1, 2, units) < 5
    counts = dropped.unflatten(1, (-1, 64)).sum(2) - 64 * p
    spread = 64 * p * (1 - p) + 64 * 63 * (both - p * p)
    assert deviations(counts.square().mean() / spread, 1, 2 + 1 / spread, counts.numel()) < 5
    for gap in (1, 2, 7):
        together = (dropped[:, gap:] * dropped[:, :-gap]).mean()
        assert deviations(together, both, both + 2 * p**3, draws * units) < 5


def test_no_dropout_drops_nothing():
    agent = make_agent(droq, dropout=0.0)
    drive(agent, make_steps((0, 1), 1, 12))
    for _ in range(50):
        agent._set_dropout(True, agent.qf, agent.qf_target)
        assert all((mask == 1).all() for name in NETWORKS for mask in masks_of(agent, name))


@pytest.mark.parametrize("measured", [False, True])
def test_no_two_masks_are_the_same(measured):
    """Neither of two networks, layers, seeds, critics nor steps; also where plasticity, which drops
    nothing, has been measured in between."""
    agent = make_agent(droq, dropout=0.3, replay_ratio=4.0, policy_delay=2)
    masks = []

    def watch(step, *names):
        def watched(*x):
            masks.extend(mask for name in names for layer in masks_of(agent, name)
                         for mask in layer.flatten(0, 1))
            return step(*x)
        return watched

    agent.update_critic = watch(agent.update_critic, "qf", "qf_target")
    agent.update_actor = watch(agent.update_actor, "qf")
    for step in make_steps((0, 1), 1, 11):
        drive(agent, [step])
        if measured and masks:
            assert measure(agent)
    assert len(masks) == (12 * 2 + 6) * 2 * 2 * 2
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))
    assert all((mask == 0).any() for mask in masks)


def test_a_dead_unit_counts_as_dead_whatever_was_dropped_last():
    """Where its layer drops others or itself, layer normalisation would wake it."""
    agent = make_agent(droq, dropout=0.5)
    drive(agent, make_steps((0, 1), 1, 20))
    for index, linear in enumerate([agent.qf.mlp.fc1[0], agent.qf.mlp.fc2[0]]):
        alive = agent.hidden_activations()["qf"][index][2]  # of seed 1's first critic
        unit = alive.any(0).nonzero()[0]
        linear.bias.data[1, 0, 0, unit] = -50.0
        agent._set_dropout(True, agent.qf)
        first = measure(agent)
        agent._set_dropout(True, agent.qf)  # other units
        second, hidden = measure(agent), agent.hidden_activations()["qf"]
        assert not hidden[index][2][:, unit].any()
        assert all(torch.equal(first[name], second[name]) for name in first)
        units = torch.cat([x.unflatten(0, (2, 2)).movedim(2, 1).flatten(2) for x in hidden], 2)
        same = (units == units[:, :1]).all(1).float().mean(1)
        assert same[1] > 0
        torch.testing.assert_close(first["plasticity/qf_dead_units"], same)


def test_only_batches_of_the_size_of_its_masks_can_be_dropped_from():
    """Measuring, which drops nothing, takes any."""
    agent = make_agent(droq, dropout=0.5)
    obs, actions = torch.rand(2, 7, 3), torch.rand(2, 7, 2)
    agent._set_dropout(True, agent.qf)
    with pytest.raises(AssertionError, match=r"2, 7, 16.*2, 16, 16"):
        agent.qf(obs, actions)
    assert agent.qf(*(x.repeat(1, 3, 1)[:, :16] for x in (obs, actions))).shape == (2, 2, 16)
    agent._set_dropout(False, agent.qf)
    assert agent.qf(obs, actions).shape == (2, 2, 7)


def test_a_seeds_masks_are_the_same_in_any_stack():
    stack, alone = (make_agent(droq, seeds=seeds, dropout=0.1) for seeds in ((0, 1, 2), (1,)))
    for steps in (10, 1):
        drive(stack, make_steps((0, 1, 2), 1, steps))
        drive(alone, make_steps((1,), 1, steps))
        for name in NETWORKS:
            for ours, theirs in zip(masks_of(stack, name), masks_of(alone, name), strict=True):
                assert torch.equal(ours[1], theirs[0]) and (theirs == 0).any()


def test_each_transition_of_each_environment_gives_twenty_critic_steps_and_one_actor_step():
    agent = make_agent(droq, num_envs=3)
    counts, totals = [0, 0], []
    critic_step, actor_step, update = agent.update_critic, agent.update_actor, agent.update

    def count(place, step, *x):
        counts[place] += 1
        return step(*x)

    agent.update_critic = lambda *x: count(0, critic_step, *x)
    agent.update_actor = lambda *x: count(1, actor_step, *x)
    agent.update = lambda: (update(), totals.append(tuple(counts)))[0]
    drive(agent, make_steps((0, 1), 3, 8))
    begun = [total for total in totals if total != (0, 0)]
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(begun)]
    assert len(steps) >= 4 and set(steps) == {(60, 3)}
