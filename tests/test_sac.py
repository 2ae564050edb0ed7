"""SAC against slow references written from the paper, in float64."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution

from agents import sac
from tests.conftest import (
    drive,
    make_agent,
    make_spec,
    make_steps,
    restore_state,
    save_state,
)


def test_log_probs_equal_the_transformed_distribution_far_into_saturation(float64):
    x = torch.linspace(-20, 20, 401).view(1, -1, 1)
    mean, log_std, scale = x * 0.9, torch.full_like(x, 0.3), torch.tensor([2.5])
    noise = (x - mean) / log_std.exp()
    ours = sac.squashed_log_probs(x, noise, log_std, scale.log())
    transforms = [TanhTransform(cache_size=1), AffineTransform(1.0, 2.5, cache_size=1)]
    reference = TransformedDistribution(Normal(mean, log_std.exp()), transforms)
    actions = transforms[1](transforms[0](x))  # caches x: a tanh of 20 cannot be inverted
    torch.testing.assert_close(ours, reference.log_prob(actions).sum(-1), rtol=1e-9, atol=1e-9)


def test_the_density_integrates_to_one_over_the_bounds(float64):
    """In environment units: the scale of the actions is part of the density."""
    agent = make_agent(sac, seeds=[0], spec=make_spec(low=(-1.0,), high=(4.0,)))
    x = torch.linspace(-12, 12, 200_001)[None, :, None]
    mean, log_std = torch.tensor(0.4), torch.tensor(-0.2)
    noise = (x - mean) / log_std.exp()
    log_probs = sac.squashed_log_probs(x, noise, log_std, agent.actor.scale.log())
    actions = agent.actor.centre + agent.actor.scale * torch.tanh(x)
    mass = torch.trapezoid(log_probs.exp()[0], actions[0, :, 0])
    torch.testing.assert_close(mass, torch.tensor(1.0), rtol=1e-6, atol=0)


def test_only_a_termination_cuts_the_bootstrap():
    target = sac.td_target(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]]),
                           torch.tensor([[10.0, 10.0]]), 0.9)
    assert target.tolist() == [[10.0, 1.0]]


@pytest.mark.parametrize("ends, value", [("truncations", 1 / (1 - 0.8)), ("terminations", 1.0)])
def test_the_value_of_an_endless_task_survives_truncation_alone(ends, value):
    """Reward 1 a step from one state; each step ends an episode, by one flag or by the other."""
    agent = make_agent(sac, seeds=[0], gamma=0.8, tau=0.2, tune_alpha=False, alpha=0.0, qf_lr=3e-2,
                       actor_lr=0.0)
    obs, ones, zeros = torch.zeros(1, 1, 3), torch.ones(1, 1), torch.zeros(1, 1)
    for _ in range(400):
        flags = {"terminations": zeros, "truncations": zeros, ends: ones}
        actions = agent.act(obs)
        metrics = agent.update()
        agent.observe(obs, actions, ones, obs, **flags)
    assert metrics["value/q"].item() == pytest.approx(value, rel=0.05)


def reference_networks(agent):
    """Plain nn modules with the weights of seed 0."""
    def copy_of(layer, place):
        dense = nn.Linear(layer.weight.shape[2], layer.weight.shape[3])
        dense.weight.data = layer.weight.data[0, place].T.clone()
        dense.bias.data = layer.bias.data[0, place, 0].clone()
        return dense

    def mlp(network, place):
        first, second, head = (copy_of(layer, place) for layer in (
            network.mlp.fc1, network.mlp.fc2, network.mlp.head))
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), head)

    return mlp(agent.actor, 0), [mlp(agent.qf, 0), mlp(agent.qf, 1)], [
        mlp(agent.qf_target, 0), mlp(agent.qf_target, 1)]


def reference_update(batch, noise, actor, critics, targets, log_alpha, optimizers, c, spec):
    """One step of SAC for one seed, term by term: a list of samples, no stacking."""
    low, high = torch.tensor(spec.action_low), torch.tensor(spec.action_high)

    def policy(obs, eps):
        mean, log_std = actor(obs).chunk(2)
        log_std = -5 + 3.5 * (torch.tanh(log_std) + 1)
        x = mean + log_std.exp() * eps
        log_prob = Normal(mean, log_std.exp()).log_prob(x).sum()
        log_prob -= torch.log((high - low) / 2 * (1 - torch.tanh(x) ** 2)).sum()
        return (high + low) / 2 + (high - low) / 2 * torch.tanh(x), log_prob

    def value(critic, obs, action):
        return critic(torch.cat([obs, action]))[0]

    alpha, size = log_alpha.exp().item(), len(batch)
    loss = 0.0
    for (obs, action, next_obs, reward, terminated), eps in zip(batch, noise[0], strict=True):
        with torch.no_grad():
            next_action, next_log_prob = policy(next_obs, eps)
            next_value = min(value(t, next_obs, next_action) for t in targets)
            goal = reward + c.gamma * (1 - terminated) * (next_value - alpha * next_log_prob)
        loss = loss + sum((value(q, obs, action) - goal) ** 2 for q in critics) / size
    optimizers["qf"].zero_grad()
    loss.backward()
    optimizers["qf"].step()
    for target, critic in zip(targets, critics, strict=True):
        for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
            slow.data = (1 - c.tau) * slow.data + c.tau * fast.data

    actor_loss, alpha_loss = 0.0, 0.0
    for (obs, *_), eps in zip(batch, noise[1], strict=True):
        action, log_prob = policy(obs, eps)
        actor_loss = actor_loss + (alpha * log_prob - min(
            value(q, obs, action) for q in critics)) / size
        goal = c.target_entropy * spec.action_dim
        alpha_loss = alpha_loss - log_alpha.exp() * (log_prob.detach() + goal) / size
    for name, objective in (("actor", actor_loss), ("alpha", alpha_loss)):
        optimizers[name].zero_grad()
        objective.backward()
        optimizers[name].step()


def test_twenty_updates_equal_a_slow_single_seed_reference(float64):
    agent = make_agent(sac, seeds=[0, 1], batch_size=8)
    actor, critics, targets = reference_networks(agent)
    log_alpha = torch.zeros((), requires_grad=True)
    c = agent.config
    optimizers = {
        "actor": torch.optim.Adam(actor.parameters(), lr=c.actor_lr),
        "qf": torch.optim.Adam([p for q in critics for p in q.parameters()], lr=c.qf_lr),
        "alpha": torch.optim.Adam([log_alpha], lr=c.qf_lr)}

    calls = []
    critic_step, actor_step = agent.update_critic, agent.update_actor
    agent.update_critic = lambda *x: (calls.append(x), critic_step(*x))[1]
    agent.update_actor = lambda *x: (calls.append(x), actor_step(*x))[1]
    drive(agent, make_steps((0, 1), 1, 28))
    assert len(calls) == 2 * 20
    for (*batch, next_noise), (_, noise) in zip(calls[::2], calls[1::2], strict=True):
        samples = list(zip(*(x[0] for x in batch), strict=True))
        reference_update(samples, (next_noise[0], noise[0]), actor, critics, targets, log_alpha,
                         optimizers, c, agent.spec)

    ours = reference_networks(agent)
    for theirs, network in zip([actor, *critics, *targets], [ours[0], *ours[1], *ours[2]],
                               strict=True):
        for name, value in theirs.named_parameters():
            torch.testing.assert_close(network.get_parameter(name), value, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(agent.log_alpha[0].detach(), log_alpha.detach())


@pytest.mark.parametrize("dimensions", [1, 2, 5])
def test_the_target_entropy_is_minus_one_for_each_action_dimension(dimensions):
    """The temperature's gradient is alpha times the entropy above the target, of each seed: it is
    read off the mean gradient that Adam begins with."""
    agent = make_agent(sac, seeds=[0, 1, 2], alpha=0.5,
                       spec=make_spec(low=dimensions * (-1.0,), high=dimensions * (3.0,)))
    assert agent.log_alpha.shape == (3,)
    metrics = agent.update_actor(torch.rand(3, 16, 3), torch.randn(3, 16, dimensions))
    gradient = agent.alpha_optimizer.state[agent.log_alpha]["exp_avg"] / (1 - 0.9)
    expected = 0.5 * (metrics["policy/entropy"] + dimensions)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert (agent.log_alpha.detach().exp() < 0.5).equal(gradient > 0)


def test_a_fixed_temperature_stays():
    agent = make_agent(sac, tune_alpha=False, alpha=0.3)
    history = drive(agent, make_steps((0, 1), 1, 40))
    assert history[-1]["policy/alpha"].tolist() == pytest.approx([0.3, 0.3])


def test_the_replay_never_joins_its_newest_row_to_its_oldest():
    """Rows are numbered; after many wraps each sampled row is one transition as it was stored."""
    generators = [torch.Generator().manual_seed(s) for s in range(2)]
    replay = sac.Replay(generators, 6, make_spec())
    for t in range(0, 50, 2):
        number = torch.tensor([t, t + 1.0]).expand(2, 2)
        replay.add(number[..., None].expand(2, 2, 3), number[..., None].expand(2, 2, 2),
                   number[..., None].expand(2, 2, 3) + 0.5, number, number)
        obs, actions, next_obs, rewards, _ = replay.sample(64)
        assert torch.equal(next_obs, obs + 0.5) and torch.equal(rewards, actions[..., 0])
        oldest = max(0, t + 2 - 6)
        assert rewards.min() == oldest and rewards.max() == t + 1


def test_replay_ratio_is_gradient_steps_for_each_transition():
    for num_envs, ratio, expected in ((1, 1, 52), (4, 1, 204), (4, 0.25, 51), (1, 3, 156)):
        agent = make_agent(sac, num_envs=num_envs, replay_ratio=ratio)
        drive(agent, make_steps((0, 1), num_envs, 60 if num_envs == 1 else 53))
        assert agent.critic_steps == expected, (num_envs, ratio)


def test_each_gradient_step_samples_its_own_batch():
    batches = []
    agent = make_agent(sac, replay_ratio=3)
    step = agent.update_critic
    agent.update_critic = lambda *x: (batches.append(x[0]), step(*x))[1]
    drive(agent, make_steps((0, 1), 1, 12))
    assert len(batches) >= 6
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(batches))


def test_the_policy_delay_counts_critic_steps():
    agent = make_agent(sac, policy_delay=3)
    steps = []
    actor_step = agent.update_actor
    agent.update_actor = lambda *x: (steps.append(agent.critic_steps), actor_step(*x))[1]
    drive(agent, make_steps((0, 1), 1, 30))
    assert steps == list(range(3, agent.critic_steps + 1, 3))


def test_the_replay_is_no_larger_than_the_run():
    assert make_agent(sac, total_steps=500).replay.rows.shape[1] == 500
    assert make_agent(sac, total_steps=500, num_envs=3).replay.rows.shape[1] == 501
    assert make_agent(sac, total_steps=500, buffer_size=100).replay.rows.shape[1] == 100


def test_infinite_bounds_are_refused():
    with pytest.raises(ValueError, match=r"action bounds must be finite, not .*inf"):
        make_agent(sac, spec=make_spec(low=(-1.0,), high=(math.inf,)))


def test_the_actors_step_reads_the_critic_after_loading_too_and_does_not_move_it():
    agent, other = make_agent(sac), make_agent(sac, seeds=(7, 8))
    restore_state(agent, save_state(other))
    drive(agent, make_steps((0, 1), 1, 20))
    obs, noise = torch.rand(2, 16, 3), torch.randn(2, 16, 2)
    with torch.no_grad():
        actions, log_probs = agent.actor(obs, noise)
        values = agent.qf(obs, actions).amin(1)
        expected = (agent.log_alpha.exp()[:, None] * log_probs - values).mean(1)
    before = [p.clone() for p in agent.qf.parameters()]
    torch.testing.assert_close(agent.update_actor(obs, noise)["loss/actor"], expected)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.qf.parameters(), strict=True))
    assert all(p.grad is None for p in agent.qf.parameters())


def test_first_actions_are_uniform_over_the_bounds():
    agent = make_agent(sac, seeds=range(4))
    actions = agent.act(torch.zeros(4, 5000, 3))
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0])
    share = (actions - low) / (high - low)
    for bound in (0.1, 0.5, 0.9):
        assert ((share < bound).float().mean((0, 1)) - bound).abs().max() < 0.02
