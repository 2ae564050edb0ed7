"""PPO against slow references written from the definitions, in float64."""

import copy
import dataclasses
import itertools
import math

import gymnasium
import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal

from agents import ppo
from lab.agent import check_ranges, load_agent
from lab.training.job import Job
from lab.training.loop import train
from tests.conftest import (
    drive,
    make_agent,
    make_spec,
    make_steps,
    restore_state,
    save_state,
    small_config,
)


def rollout(S, T, N, generator):
    rewards, values, next_values, ends = torch.rand(4, S, T, N, generator=generator)
    return rewards, values, next_values, (ends < 0.15).double(), (ends > 0.85).double()


def test_gae_equals_its_definition_with_ends_inside_the_rollout(float64):
    """A_t is the sum over k of (gamma lambda)^k delta_{t+k}, up to the end of t's episode."""
    rewards, values, next_values, terms, truncs = rollout(2, 12, 3, torch.Generator())
    gamma, lam = 0.9, 0.8
    ours = ppo.gae(rewards, values, next_values, terms, truncs, gamma, lam)
    for s in range(2):
        for n in range(3):
            for t in range(12):
                advantage = 0.0
                for k in range(t, 12):
                    successor = 0.0 if terms[s, k, n] else next_values[s, k, n]
                    delta = rewards[s, k, n] + gamma * successor - values[s, k, n]
                    advantage += (gamma * lam) ** (k - t) * delta
                    if terms[s, k, n] or truncs[s, k, n]:
                        break
                assert ours[s, t, n] == pytest.approx(float(advantage), abs=1e-12)


def test_a_truncation_bootstraps_from_the_true_last_observation(float64):
    agent = make_agent(ppo, norm_reward=False, norm_obs=False, gae_lambda=0.0, gamma=0.9)
    steps = make_steps((0, 1), 1, 8)
    steps = [(o, r, n, torch.zeros(2, 1), torch.ones(2, 1)) for o, r, n, _, _ in steps]
    drive(agent, steps)
    inputs, samples, _ = agent._prepare_rollout()
    advantages = samples[..., -3]
    for t, (obs, rewards, next_obs, _, _) in enumerate(steps):
        expected = rewards + 0.9 * agent.critic(next_obs.double())[..., 0] - agent.critic(
            obs.double())[..., 0]
        torch.testing.assert_close(advantages[:, t], expected[:, 0].detach())
    assert inputs.shape == (2, 8, 3)


def test_reward_normalisation_restarts_at_every_episode_and_uses_gamma(float64):
    agent = make_agent(ppo, seeds=[0], num_envs=2, gamma=0.9)
    generator = torch.Generator()
    running, returns = [0.0, 0.0], []
    for _ in range(3):  # the running return passes from a rollout to the next
        rewards, _, _, terms, truncs = rollout(1, 8, 2, generator)
        ends = torch.maximum(terms, truncs)
        ours = agent._normalise_rewards(rewards, ends)
        for t in range(8):
            for n in range(2):
                running[n] = rewards[0, t, n].item() + 0.9 * running[n]
                returns.append(running[n])
                if ends[0, t, n]:
                    running[n] = 0.0
        deviation = torch.tensor(returns).var(correction=0).sqrt()
        torch.testing.assert_close(ours, rewards / deviation, rtol=1e-6, atol=1e-6)


def test_normaliser_statistics_equal_those_of_all_the_data(float64):
    normaliser, parts = ppo.Normaliser(2, 3, "cpu"), [torch.randn(2, n, 3) for n in (5, 1, 40)]
    for part in parts:
        normaliser.update(part)
    data = torch.cat(parts, 1)
    torch.testing.assert_close(normaliser.mean, data.mean(1, keepdim=True))
    torch.testing.assert_close(normaliser.var, data.var(1, keepdim=True, correction=0))


@pytest.mark.parametrize("path", ["agents/ppo.py", "agents/ppo_discrete.py", "agents/ppo_lstm.py"])
def test_normalised_observations_and_rewards_are_within_10(path):
    normaliser = load_agent(path).Normaliser(1, 1, "cpu")
    normaliser.update(torch.tensor([[[-1.0], [1.0]]]))
    scaled = normaliser.scale(torch.tensor([-1e3, -9.0, 9.0, 1e3]))
    torch.testing.assert_close(scaled.flatten(), torch.tensor([-10.0, -9.0, 9.0, 10.0]))


def test_statistics_stand_still_while_a_rollout_is_collected_and_read():
    """The first ratio of an update is exactly 1 for what the current policy has acted."""
    agent = make_agent(ppo, num_envs=2)
    ratios = []
    step = agent.minibatch_step

    def spy(samples):
        obs, actions, log_probs, _ = samples.split([3, 2, 1, 3], -1)
        new = ppo.gaussian_log_probs(actions, agent.actor(obs), agent.log_std)
        ratios.append((new - log_probs[..., 0]).exp().detach())
        return step(samples)

    agent.minibatch_step = spy
    for number in range(2):
        before = agent.obs_normaliser.mean.clone()
        for place, transition in enumerate(make_steps((0, 1), 2, 8)):
            agent.update()
            actions = agent.act(transition[0])
            obs, rewards, next_obs, terminations, truncations = transition
            agent.observe(obs, actions, rewards, next_obs, terminations, truncations)
            assert torch.equal(agent.obs_normaliser.mean, before) or (number, place) == (1, 0)
            before = agent.obs_normaliser.mean.clone()
        ratios.clear()
        agent.update()
        torch.testing.assert_close(ratios[0], torch.ones_like(ratios[0]), rtol=1e-5, atol=1e-5)


def test_an_action_drawn_before_an_update_keeps_the_log_prob_that_it_was_drawn_with():
    """The harness acts, updates, then observes: the first row of a rollout is the old policy's."""
    agent = make_agent(ppo, lr=0.1, norm_obs=False)
    steps = make_steps((0, 1), 1, 9)
    drive(agent, steps[:8])
    old_actor, old_log_std = copy.deepcopy(agent.actor), agent.log_std.detach().clone()
    drive(agent, steps[8:])
    actions, log_probs = agent.rollout[:, 0, :, 3:5], agent.rollout[:, 0, :, 5]
    mean = old_actor(steps[8][0])
    torch.testing.assert_close(log_probs, ppo.gaussian_log_probs(actions, mean, old_log_std))
    assert (mean - agent.actor(steps[8][0])).abs().max() > 0.01


def test_evaluating_leaves_the_statistics_alone():
    agent = make_agent(ppo)
    drive(agent, make_steps((0, 1), 1, 20))
    before = agent.obs_normaliser.mean.clone()
    agent.act(torch.randn(2, 9, 3) + 5, explore=False)
    assert torch.equal(agent.obs_normaliser.mean, before)


def test_minibatches_cover_every_sample_of_every_seed_once_an_epoch():
    agent = make_agent(ppo, num_envs=3)
    seen = []
    agent.minibatch_step = lambda samples: (seen.append(samples[..., 0]), {})[1]
    numbers = torch.arange(24.0).expand(2, 24)
    agent._update_epoch(numbers[..., None].expand(2, 24, 9).contiguous())
    assert len(seen) == 4
    epoch = torch.cat(seen, 1)
    assert torch.equal(epoch.sort(1).values, numbers)
    assert not torch.equal(epoch[0], epoch[1])  # each seed in its own order


def test_the_unclipped_action_is_stored_and_the_clipped_one_returned():
    agent = make_agent(ppo, spec=make_spec(low=(-0.01, -0.01), high=(0.01, 0.01)))
    obs, zeros = torch.zeros(2, 1, 3), torch.zeros(2, 1)
    actions = agent.act(obs)
    unclipped = agent.acted[..., :2].clone()
    agent.observe(obs, actions, zeros, obs, zeros, zeros)
    assert actions.abs().max() <= 0.01 < unclipped.abs().max()
    assert torch.equal(agent.rollout[:, 0, :, 3:5], unclipped)


@pytest.mark.parametrize("bounds", [(0, 5), (0, 2, 5), (0, 1, 4, 5)])
@pytest.mark.parametrize("others", [None, 2, 5, 9])
def test_each_environment_keeps_its_own_action_where_they_act_in_groups(float64, bounds, others):
    """Unclipped, with the log-prob under what the policy made of its own observation; also where
    other environments are acted in without exploring in between."""
    agent = make_agent(ppo, num_envs=5, spec=make_spec(low=(-0.1, -0.1), high=(0.1, 0.1)))
    agent.actor.head.weight.data *= 100
    for row, (obs, rewards, next_obs, *ends) in enumerate(make_steps((0, 1), 5, 8)):
        parts = []
        for part in itertools.starmap(slice, itertools.pairwise(bounds)):
            parts.append(agent.act(obs[:, part]))
            if others:
                agent.act(torch.randn(2, others, 3), explore=False)
        clipped = torch.cat(parts, 1)
        agent.observe(obs, clipped, rewards, next_obs, *ends)
        stored, log_probs = agent.rollout[:, row, :, 3:5], agent.rollout[:, row, :, 5]
        assert torch.equal(stored.clamp(-0.1, 0.1), clipped) and (stored.abs() > 0.1).any()
        policy = Independent(Normal(agent.actor(obs), agent.log_std.exp()), 1)
        torch.testing.assert_close(log_probs, policy.log_prob(stored).detach())
    assert agent.actor(obs).std(1).min() > 0.01  # so that a neighbour's log-prob would differ
    assert agent.update()


def test_log_probs_equal_torch_distributions(float64):
    mean, log_std, actions = torch.randn(3, 2, 5, 4)
    reference = Independent(Normal(mean, log_std.exp()), 1).log_prob(actions)
    torch.testing.assert_close(ppo.gaussian_log_probs(actions, mean, log_std), reference)


def gaussian(agent, place):
    """-> log_std, a leaf, and the policy of an output of the actor."""
    log_std = agent.log_std[place].detach().clone().requires_grad_()
    return [log_std], lambda mean: Independent(Normal(mean, log_std.exp()), 1)


def reference_minibatch(agent, place, samples, make_policy=gaussian):
    """Gradients of one seed's loss, from the paper's terms, clipped by their joint norm."""
    c = agent.config
    names = ("fc1", "fc2", "head")
    weights = {f"{net}.{layer}.{kind}": getattr(getattr(getattr(agent, net), layer), kind)[place]
               .detach().clone().requires_grad_() for net in ("actor", "critic")
               for layer in names for kind in ("weight", "bias")}
    more, policy_of = make_policy(agent, place)

    def forward(net, x):
        for layer in names[:2]:
            x = torch.tanh(x @ weights[f"{net}.{layer}.weight"] + weights[f"{net}.{layer}.bias"])
        return x @ weights[f"{net}.head.weight"] + weights[f"{net}.head.bias"]

    obs, actions, *scalars = samples[place].split([3, 2, 1, 1, 1, 1], -1)
    old, advantages, returns, old_values = scalars
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy = policy_of(forward("actor", obs))
    ratio = (policy.log_prob(actions)[:, None] - old).exp()
    losses = []
    for r, a, v, v_old, goal in zip(ratio, advantages, forward("critic", obs), old_values, returns,
                                    strict=True):
        surrogate = min(r * a, r.clamp(1 - c.clip_coef, 1 + c.clip_coef) * a)
        near = v_old + (v - v_old).clamp(-c.clip_coef, c.clip_coef)
        losses.append(-surrogate + c.vf_coef * 0.5 * max((v - goal) ** 2, (near - goal) ** 2))
    entropy = policy.entropy().mean()
    loss = sum(losses) / len(losses) - c.ent_coef * entropy
    loss.backward()
    leaves = [*weights.values(), *more]
    torch.nn.utils.clip_grad_norm_(leaves, c.max_grad_norm)
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("norm_adv", [True, False])
def test_micro_batches_give_the_update_of_the_whole_minibatch(float64, norm_adv):
    """A minibatch has 11 rows, so that the parts are uneven, and one row has no deviation. Of every
    seed, in 3 rollouts of 6 updates each."""
    steps, results = make_steps(range(3), 3, 34), []
    for parts, largest in ((1, 11), (2, 6), (4, 3), (5, 3), (11, 1), (99, 1)):
        agent = make_agent(ppo, seeds=range(3), num_envs=3, num_steps=11, num_minibatches=3,
                           lr=1e-2, norm_adv=norm_adv, ent_coef=0.01, rpo_alpha=0.1,
                           micro_batches=parts)
        rows = set()
        agent.actor.register_forward_hook(
            lambda actor, x, y, rows=rows: rows.add(x[0].shape[1]) if y.requires_grad else None)
        history = drive(agent, steps)
        assert len(history) == 3 and max(rows) == largest
        results.append({f"{i} {name}": value for i, metrics in enumerate(history)
                        for name, value in metrics.items()})
        results[-1] |= {str(i): x.clone() for i, x in enumerate(agent._learned())}
    for parted in results[1:]:
        assert parted.keys() == results[0].keys()
        for name, value in results[0].items():
            torch.testing.assert_close(parted[name], value, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("max_grad_norm", [1e3, 0.05])
def test_a_minibatch_gives_each_seed_its_own_clipped_gradient(float64, max_grad_norm):
    agent = make_agent(ppo, ent_coef=0.01, max_grad_norm=max_grad_norm)
    samples = torch.randn(2, 16, 9)
    grads = {}
    agent.optimizer.step = lambda: grads.update(
        {i: p.grad.clone() for i, p in enumerate(agent.parameters)})
    agent._update_minibatch(samples)
    for place in (0, 1):
        reference = reference_minibatch(agent, place, samples)
        for i, theirs in enumerate(reference):
            torch.testing.assert_close(grads[i][place], theirs, rtol=1e-4, atol=1e-9)


def test_one_seed_with_a_huge_gradient_does_not_shrink_the_others():
    agent = make_agent(ppo)
    samples = torch.randn(2, 16, 9)
    norms = []
    agent.optimizer.step = lambda: norms.append(torch.stack(
        [p.grad.flatten(1).square().sum(1) for p in agent.parameters]).sum(0).sqrt())
    samples[0, :, -2] = 1e6  # returns
    agent._update_minibatch(samples)
    assert norms[0][0] == pytest.approx(0.5, rel=1e-3) and norms[0][1] > 0.05


def test_the_step_size_falls_linearly_to_zero():
    agent = make_agent(ppo, total_steps=32, lr=1.0)
    rates = []
    step = agent.minibatch_step
    agent.minibatch_step = lambda *x: (
        rates.append(agent.optimizer.param_groups[0]["lr"].item()), step(*x))[1]
    drive(agent, make_steps((0, 1), 1, 33))
    assert sorted(set(rates), reverse=True) == [1.0, 0.75, 0.5, 0.25]


def test_the_points_of_a_schedule_may_come_in_any_order():
    agent = make_agent(ppo, total_steps=32, lr_schedule=((32, 0.0), (0, 1.0)), ent_coef=0,
                       ent_schedule=((32, 0.5), (0, 0.5)))
    drive(agent, make_steps((0, 1), 1, 17))
    assert agent.optimizer.param_groups[0]["lr"] == 0.75, "of the rollout from step 8"
    assert agent.ent_coef == 0.5


def test_schedules_set_the_step_size_and_the_entropys_weight_of_each_rollout():
    """Straight lines between points in transitions of a seed; two points at one place: a step."""
    agent = make_agent(ppo, total_steps=32, lr_schedule=((0, 1.0), (16, 0.5), (16, 0.1)),
                       ent_schedule=((8, 0.0), (24, 0.4)))
    used = []
    step = agent.minibatch_step
    agent.minibatch_step = lambda *x: (used.append((
        agent.optimizer.param_groups[0]["lr"].item(), agent.ent_coef.item())), step(*x))[1]
    drive(agent, make_steps((0, 1), 1, 33))
    assert sorted(set(used), reverse=True) == [
        pytest.approx(pair) for pair in [(1.0, 0.0), (0.75, 0.0), (0.1, 0.4), (0.1, 0.2)]]


def test_the_entropys_weight_scales_its_gradient():
    gradients = []
    for weight in (0.0, 0.5):
        agent = make_agent(ppo, ent_schedule=((0, weight),))
        drive(agent, make_steps((0, 1), 1, 9))
        agent.optimizer.step = lambda: None
        agent.optimizer.zero_grad = lambda: None
        agent.log_std.grad = None
        loss, _ = agent._losses(*(torch.zeros(2, 4, n) for n in (3, 2)),
                                *torch.zeros(4, 2, 4), 4)
        loss.sum().backward()
        gradients.append(agent.log_std.grad.clone())
    assert torch.allclose(gradients[0] - gradients[1], torch.tensor(0.5))  # d entropy / d log_std


def test_a_seed_past_target_kl_stops_and_the_other_goes_on(float64):
    """Alone or stacked: a stopped seed's weights are those after the epoch that passed."""
    steps = make_steps((0, 1), 1, 9)
    settings = {"lr": 3e-2, "update_epochs": 6}
    free = make_agent(ppo, **settings)
    kls = []
    epoch = free._update_epoch
    free._update_epoch = lambda s: (kls.append(epoch(s)), kls[-1])[1]
    drive(free, steps)
    values = torch.stack([k["policy/approx_kl"] for k in kls])  # (epochs, S)
    limit = values[:3].max(0).values.mean().item()  # one seed passes it early
    stopped = [next((e for e, v in enumerate(values[:, s]) if v > limit), 99) for s in (0, 1)]
    assert stopped[0] != stopped[1] and min(stopped) < 5
    first = stopped.index(min(stopped))

    limited = make_agent(ppo, target_kl=limit, **settings)
    history = []
    inner = limited._update_epoch

    def watch(samples):
        history.append([x[first].clone() for x in limited._learned()])
        return inner(samples)

    limited._update_epoch = watch
    drive(limited, steps)
    final = [x[first] for x in limited._learned()]
    after_passing = history[min(stopped) + 1]
    assert all(torch.equal(a, b) for a, b in zip(final, after_passing, strict=True))
    alone = make_agent(ppo, seeds=[first], target_kl=limit, **settings)
    drive(alone, [tuple(x[first : first + 1] for x in step) for step in steps])
    for ours, theirs in zip(limited._learned(), alone._learned(), strict=True):
        torch.testing.assert_close(ours[first], theirs[0])


def test_the_metrics_of_a_stopped_seed_are_of_its_last_epoch():
    agent = make_agent(ppo, target_kl=0.5, update_epochs=4)
    kls = iter(torch.tensor([[0.1, 0.1], [0.6, 0.2], [0.3, 0.3], [0.9, 0.4]]))
    agent._learned = lambda: []
    agent._update_epoch = lambda samples: {"policy/approx_kl": next(kls)}
    (metrics,) = drive(agent, make_steps((0, 1), 1, 9))
    torch.testing.assert_close(metrics["policy/approx_kl"], torch.tensor([0.6, 0.4]))


@pytest.mark.parametrize("num_envs", [1, 2, 3, 24, 100, 128, 129, 1000, 1024, 5000])
@pytest.mark.parametrize("num_minibatches", [1, 4, 32, 33])
def test_by_default_a_rollout_is_the_shortest_of_2048_rows_and_16_steps(num_envs, num_minibatches):
    """In whole minibatches."""
    settings = {"num_steps": ppo.Config().num_steps, "num_minibatches": num_minibatches}
    expected = next(steps for steps in itertools.count(16) if steps * num_envs >= 2048
                    and steps * num_envs % num_minibatches == 0)
    agent = make_agent(ppo, seeds=[0], num_envs=num_envs, **settings)
    assert agent.rollout.shape[:3] == (1, expected, num_envs)


@pytest.mark.parametrize("num_envs, num_steps", [(24, 88), (1024, 16)])
def test_many_environments_learn_with_the_default_rollout_and_minibatches(num_envs, num_steps):
    agent = make_agent(ppo, num_envs=num_envs, num_steps=None, num_minibatches=32, update_epochs=1)
    sizes, step = [], agent.minibatch_step
    agent.minibatch_step = lambda *x: (sizes.append(x[0].shape[1]), step(*x))[1]
    transitions = make_steps((0, 1), num_envs, 3)
    for _ in range(num_steps):
        assert not drive(agent, transitions[:1])
    (metrics,) = drive(agent, transitions[1:])
    assert sizes == 32 * [num_steps * num_envs // 32]
    assert all(value.isfinite().all() for value in metrics.values())


def test_a_minibatch_of_one_row_cannot_be_normalised():
    with pytest.raises(ValueError, match=r"num_minibatches .* 8 does not"):
        make_agent(ppo, num_steps=8, num_minibatches=8)
    make_agent(ppo, num_steps=8, num_minibatches=8, norm_adv=False)


def test_rpo_shifts_the_mean_within_its_bounds_and_only_while_updating():
    """By a shift of the actions the other way, another one in each epoch."""
    agent = make_agent(ppo, rpo_alpha=0.5, num_envs=16)
    seen, epoch, step = [], agent._update_epoch, agent.minibatch_step
    agent._update_epoch = lambda samples: (seen.append([samples]), epoch(samples))[1]
    agent.minibatch_step = lambda samples: (seen[-1].append(samples), step(samples))[1]
    drive(agent, make_steps((0, 1), 16, 9))
    shifts = []
    for samples, *minibatches in seen:
        before, after = ([x[s][x[s, :, 0].argsort()] for s in (0, 1)]  # by the first observation
                         for x in (samples, torch.cat(minibatches, 1)))
        shifts.append(torch.stack(before) - torch.stack(after))
        assert not shifts[-1][..., :3].any() and not shifts[-1][..., 5:].any()
    drawn = torch.stack(shifts)[..., 3:5]
    assert len(seen) == 2 and not torch.equal(*drawn)
    assert drawn.abs().max() <= 0.5 and drawn.abs().max() > 0.45 and drawn.mean().abs() < 0.05


def test_observing_without_acting_is_an_error():
    agent = make_agent(ppo)
    obs, zeros = torch.zeros(2, 1, 3), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="act"):
        agent.observe(obs, torch.zeros(2, 1, 2), zeros, obs, zeros, zeros)
    agent.act(obs)
    agent.observe(obs, torch.zeros(2, 1, 2), zeros, obs, zeros, zeros)
    with pytest.raises(ValueError, match="act"):  # the same action again
        agent.observe(obs, torch.zeros(2, 1, 2), zeros, obs, zeros, zeros)


def test_observing_all_environments_after_acting_in_a_part_of_them_is_an_error():
    agent, (step,) = make_agent(ppo, num_envs=3), make_steps((0, 1), 3, 1)
    agent.act(step[0][:, :2])
    agent.act(step[0], explore=False)
    with pytest.raises(ValueError, match="act"):
        agent.observe(step[0], torch.zeros(2, 3, 2), *step[1:])


def test_infinite_bounds_are_fine_without_squashing():
    agent = make_agent(ppo, spec=make_spec(low=(-math.inf,), high=(math.inf,)))
    assert agent.act(torch.zeros(2, 1, 3)).isfinite().all()


def test_initial_weights_are_orthogonal_with_their_gains(float64):
    agent = make_agent(ppo)
    for weight, gain in ((agent.actor.fc2.weight, 2**0.5), (agent.actor.head.weight, 0.01),
                         (agent.critic.head.weight, 1.0)):
        gram = weight[0].T @ weight[0] / gain**2
        torch.testing.assert_close(gram, torch.eye(gram.shape[0]))


@pytest.mark.parametrize("reward", [0.0, 1.0, -3.0])
def test_constant_returns_leave_the_explained_variance_alone_undefined(reward):
    """NaN there, and in that seed only; losses and weights stay finite and the others learn on."""
    agent, other = (make_agent(ppo, norm_adv=norm_adv) for norm_adv in (True, False))
    steps = [tuple(x.clone() for x in step) for step in make_steps((0, 1), 1, 25)]
    for obs, rewards, next_obs, terminations, truncations in steps:
        obs[0] = next_obs[0] = truncations[0] = 0
        rewards[0], terminations[0] = reward, 1
    for trained in (agent, other):
        history = drive(trained, steps)
        assert len(history) == 3
        for metrics in history:
            explained = metrics.pop("value/explained_variance")
            assert explained[0].isnan() and explained[1].isfinite()
            assert metrics.keys() >= {"loss/policy", "loss/value"}
            assert all(value.isfinite().all() for value in metrics.values())
        assert all(x.isfinite().all() for x in trained._learned())
    alone = drive(make_agent(ppo, seeds=[1]), [tuple(x[1:] for x in step) for step in steps])
    stacked = drive(make_agent(ppo), steps)
    for a, b in zip(alone, stacked, strict=True):
        for name in a:
            torch.testing.assert_close(a[name][0], b[name][1])


class Constant(gymnasium.Env):
    """Each step ends an episode, with the same reward."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, reward):
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}

    def step(self, action):
        return np.zeros(3, np.float32), self.reward, True, False, {}


@pytest.mark.parametrize("reward, failed", [(1.0, []), (math.nan, [0, 1])])
def test_the_harness_fails_a_seed_for_a_nan_in_its_loss_alone(reward, failed):
    """Constant rewards leave the explained variance undefined: it is left out of the rows."""
    gymnasium.register("lab-tests/Constant-v0", Constant, kwargs={"reward": reward})
    messages = []
    try:
        train(Job("agents/ppo.py", dataclasses.asdict(small_config(ppo)), "lab-tests/Constant-v0",
                  seeds=(0, 1), steps=32, eval_every=32, log_every=9, checkpoint_every=0,
                  eval_episodes=1), messages.append)
    finally:
        del gymnasium.registry["lab-tests/Constant-v0"]
    failures = [m for m in messages if "failed_seed" in m]
    assert [m["failed_seed"] for m in failures] == failed
    rows = [row for m in messages for row in m.get("rows", {}).values() if "loss/value" in row]
    assert bool(rows) != bool(failed)
    assert all(m["reason"].startswith("the environment returned reward = nan") for m in failures)
    assert not any("value/explained_variance" in row for row in rows)


def test_explained_variance_is_the_share_of_the_returns_that_the_values_explain(float64):
    agent = make_agent(ppo, num_envs=3)
    drive(agent, make_steps((0, 1), 3, 8))
    _, samples, explained = agent._prepare_rollout()
    returns, values = samples[..., -2], samples[..., -1]
    torch.testing.assert_close(explained, 1 - (returns - values).var(1) / returns.var(1))


def test_hidden_activations_are_those_of_the_last_minibatch_and_measuring_changes_nothing():
    steps, last = make_steps((0, 1), 3, 30), []
    measured, plain = make_agent(ppo, num_envs=3), make_agent(ppo, num_envs=3)
    step = measured.minibatch_step
    measured.minibatch_step = lambda *x: (last.append(x[0][..., :3].clone()), step(*x))[1]
    for transition in steps:
        due = measured.filled == 8
        drive(measured, [transition])
        activations = measured.hidden_activations() if last else {}
        assert activations.keys() == ({"actor", "critic"} if last else set())
        if due:
            for name, layers in activations.items():
                network = getattr(measured, name)
                first = torch.tanh(torch.baddbmm(network.fc1.bias, last[-1], network.fc1.weight))
                second = torch.tanh(torch.baddbmm(network.fc2.bias, first, network.fc2.weight))
                assert [x.shape for x in layers] == 2 * [(2, 6, 16)]
                for ours, expected in zip(layers, (first, second), strict=True):
                    torch.testing.assert_close(ours, expected)
    drive(plain, steps)
    for ours, theirs in zip(measured._learned(), plain._learned(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(a.get_state(), b.get_state())
               for a, b in zip(measured.generators, plain.generators, strict=True))


@pytest.mark.parametrize("count", [5, 8, 21])
def test_an_agent_given_all_of_its_state_goes_on_exactly(count):
    """Between observe and act, where checkpoints are written: `acted` is empty there."""
    settings = {"num_envs": 2, "target_kl": 0.01, "rpo_alpha": 0.1}
    giver, taker = (make_agent(ppo, seeds=seeds, **settings) for seeds in ((0, 1), (2, 3)))
    steps = make_steps((0, 1), 2, 45)
    drive(giver, steps[:count])
    drive(taker, make_steps((2, 3), 2, 12))
    assert giver.acted.shape[1] == 0
    restore_state(taker, copy.deepcopy(save_state(giver)))
    histories = [drive(agent, steps[count:]) for agent in (giver, taker)]
    assert len(histories[0]) == len(histories[1]) >= 2
    for ours, theirs in zip(*histories, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(giver.rollout, taker.rollout)
    for ours, theirs in zip(giver._learned(), taker._learned(), strict=True):
        assert torch.equal(ours, theirs)


def test_every_range_is_of_a_setting_and_holds_its_default():
    fields = ppo.Config.__dataclass_fields__
    assert ppo.RANGES.keys() == {
        name for name, field in fields.items() if field.type not in (bool, "bool")}
    check_ranges(ppo, ppo.Config())
