"""PPO with memory against plain loops over time, in float64."""

import copy
import itertools

import pytest
import torch
from torch import nn

from agents import ppo_lstm
from lab.envs.make import make_envs
from lab.training.evaluation import eval_policy, evaluate
from tests.conftest import drive, make_agent, make_steps, restore_state, save_state
from tests.test_ppo import gaussian

H, L = 16, 2  # the tests' lstm_width and seq_len


def reference_cell(agent, place):
    """torch's LSTMCell with one seed's weights. Its gates are in the order i, f, g, o."""
    gates = agent.lstm.gates
    (weight, bias), fan_in = (gates.weight[place], gates.bias[place, 0]), gates.weight.shape[1] - H
    keep, write, show, new = weight.detach().chunk(4, 1)
    keep_bias, write_bias, show_bias, new_bias = bias.detach().chunk(4)
    weight = torch.cat([write, keep, new, show], 1).T  # (4 H, in + H)
    cell = nn.LSTMCell(fan_in, H)
    for name, value in (("weight_ih", weight[:, :fan_in]), ("weight_hh", weight[:, fan_in:]),
                        ("bias_ih", torch.cat([write_bias, keep_bias + 1, new_bias, show_bias])),
                        ("bias_hh", torch.zeros(4 * H))):
        getattr(cell, name).data = value.clone()
    return cell


def reference_inputs(agent, place, x, starts, memory):
    """One sequence (L, O), step by step -> inputs of actor and critic (L, O + H), the memory."""
    cell, (h, c), rows = reference_cell(agent, place), memory, []
    for obs, start in zip(x, starts, strict=True):
        if start:
            h, c = torch.zeros(H), torch.zeros(H)
        h, c = cell(obs, (h, c))
        rows.append(torch.cat([obs, h]))
    return torch.stack(rows), (h, c)


def perturbed(**settings):
    """An agent whose biases are not zero, either."""
    agent = make_agent(ppo_lstm, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in agent.parameters:
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return agent


def random_samples(agent, sequences, starts=0.3):
    """(S, sequences x L, ...), as an epoch shuffles them."""
    generator = torch.Generator().manual_seed(1)
    samples = torch.randn(2, sequences * L, agent.seen + 2 + 4, generator=generator)
    samples[..., 3] = (torch.rand(2, sequences * L, generator=generator) < starts).double()
    samples.unflatten(1, (-1, L))[:, :, 1:, 4 : agent.seen] = 7.0  # only the first memory is read
    return samples


def test_a_step_equals_torchs_cell(float64):
    agent, x, memory = perturbed(), torch.randn(2, 5, 3), torch.randn(2, 5, 2 * H)
    inputs, after = agent.lstm(x, memory)
    for place in (0, 1):
        h, c = reference_cell(agent, place)(x[place], tuple(memory[place].split(H, -1)))
        torch.testing.assert_close(inputs[place], torch.cat([x[place], h], -1))
        torch.testing.assert_close(after[place], torch.cat([h, c], -1))
    zero, _ = agent.lstm(x)
    assert torch.equal(zero, agent.lstm(x, torch.zeros(2, 5, 2 * H))[0])


def test_sequences_equal_a_loop_over_time_that_forgets_where_an_episode_begins(float64):
    agent = perturbed(seq_len=5, num_steps=20, num_minibatches=1)
    samples = torch.randn(2, 30, agent.seen)
    samples[..., 3] = (torch.rand(2, 30) < 0.3).double()
    inputs = agent.inputs(samples)
    assert 0 < samples[..., 3].sum() < 60
    for place in (0, 1):
        for rows in torch.arange(30).split(5):
            x = samples[place, rows]
            expected, _ = reference_inputs(agent, place, x[:, :3], x[:, 3], x[0, 4:].split(H))
            torch.testing.assert_close(inputs[place, rows], expected)


def test_acting_equals_a_loop_over_time_and_keeps_the_memory_before_each_step(float64):
    """Episodes end by termination and by truncation, and both forget."""
    agent, steps = perturbed(num_envs=3, norm_obs=False), make_steps((0, 1), 3, 8)
    for obs, *rest in steps:
        agent.observe(obs, agent.act(obs), *rest)
    ends = torch.stack([terms + truncs for *_, terms, truncs in steps], 2) > 0  # (S, N, T)
    assert ends.any() and not ends.all()
    for place in (0, 1):
        for n in range(3):
            memory = torch.zeros(H), torch.zeros(H)
            for t, (obs, *_) in enumerate(steps):
                row = agent.rollout[place, t, n]
                torch.testing.assert_close(row[: 2 * H], torch.cat(memory).detach())
                obs = obs[place, n, None].double()
                x, memory = reference_inputs(agent, place, obs, [0], memory)
                mean = agent.actor(x.expand(2, 1, -1))[place, 0]
                policy = gaussian(agent, place)[1](mean)
                actions, log_prob = row[2 * H + 3 :][:2], row[2 * H + 5]
                torch.testing.assert_close(log_prob, policy.log_prob(actions)[0].detach())
                if ends[place, n, t]:
                    memory = torch.zeros(H), torch.zeros(H)


@pytest.mark.parametrize("bounds", [(0, 5), (0, 2, 5), (0, 1, 4, 5)])
def test_environments_that_act_in_groups_keep_their_own_memory(float64, bounds):
    whole, parted = perturbed(num_envs=5), perturbed(num_envs=5)
    for obs, *rest in make_steps((0, 1), 5, 8):
        whole.observe(obs, whole.act(obs), *rest)
        parts = [obs[:, a:b] for a, b in itertools.pairwise(bounds)]
        actions = torch.cat([parted.act(part) for part in parts], 1)
        parted.act(obs, explore=False)
        parted.observe(obs, actions, *rest)
    assert whole.memory.abs().max() > 0.1
    torch.testing.assert_close(whole.memory, parted.memory)
    torch.testing.assert_close(whole.rollout[..., : 2 * H], parted.rollout[..., : 2 * H])


def test_values_of_successors_follow_in_the_same_episode(float64):
    """At a truncation too: its successor sees the memory of the episode that it ends."""
    agent = perturbed(num_envs=2, norm_obs=False, norm_reward=False, gae_lambda=0.0, gamma=0.9)
    steps = make_steps((0, 1), 2, 8)
    for obs, *rest in steps:
        agent.observe(obs, agent.act(obs), *rest)
    advantages = agent._prepare_rollout()[1][..., -3].view(2, 8, 2)
    truncated = 0
    for place in (0, 1):
        for n in (0, 1):
            memory = torch.zeros(H), torch.zeros(H)
            for t, step in enumerate(steps):
                obs, reward, next_obs, term, trunc = (x[place, n].double() for x in step)
                x, memory = reference_inputs(agent, place, obs[None], [0], memory)
                y, _ = reference_inputs(agent, place, next_obs[None], [0], memory)
                value, next_value = (agent.critic(z.expand(2, 1, -1))[place, 0, 0] for z in (x, y))
                expected = reward + 0.9 * (1 - term) * next_value - value
                torch.testing.assert_close(advantages[place, t, n], expected.detach())
                truncated += int(trunc)
                if term + trunc:
                    memory = torch.zeros(H), torch.zeros(H)
    assert truncated


def test_a_sample_has_the_start_and_the_memory_of_its_row(float64):
    agent, steps = perturbed(num_envs=2, norm_obs=False), make_steps((0, 1), 2, 8)
    for obs, *rest in steps:
        agent.observe(obs, agent.act(obs), *rest)
    samples = agent._prepare_rollout()[1].view(2, 8, 2, -1)
    assert torch.equal(samples[..., 4 : agent.seen], agent.rollout[..., : 2 * H])
    ends = torch.stack([step[3] + step[4] for step in steps], 1)
    assert not samples[:, 0, :, 3].any()
    assert torch.equal(samples[:, 1:, :, 3], ends[:, :-1].double())
    recomputed = agent.inputs(samples.unflatten(1, (-1, L)).transpose(2, 3).flatten(1, 3)[
        ..., : agent.seen])[..., 3:]
    after = agent.lstm(samples[..., :3].flatten(1, 2), samples[..., 4 : agent.seen].flatten(1, 2))
    outputs = after[0][..., 3:].view(2, 4, L, 2, H).transpose(2, 3).flatten(1, 3)
    torch.testing.assert_close(recomputed, outputs)


def test_minibatches_are_of_whole_sequences_each_once_an_epoch():
    agent, seen = make_agent(ppo_lstm, num_envs=3), []
    agent.minibatch_step = lambda samples: (seen.append(samples[..., 0]), {})[1]
    agent.inputs = lambda x: x
    numbers = torch.arange(24.0).expand(2, 24)  # step x 3 + environment
    agent._update_epoch(numbers[..., None].expand(2, 24, agent.seen + 6).contiguous())
    assert [x.shape for x in seen] == 4 * [(2, 6)]
    sequences = torch.cat(seen, 1).view(2, 12, L)
    assert torch.equal(sequences[..., 1], sequences[..., 0] + 3)  # the next step there
    assert (sequences[..., 0] // 3 % L == 0).all()
    assert torch.equal(sequences.flatten(1).sort(1).values, numbers)
    assert not torch.equal(*sequences)


def test_a_minibatch_gives_each_seed_its_own_gradient_through_its_sequences(float64):
    """torch's cell, a loop over time and the loss of eq. 7, of every parameter."""
    agent = perturbed(ent_coef=0.01, max_grad_norm=1e9, norm_adv=False, clip_vloss=False)
    samples, grads = random_samples(agent, 6), {}
    agent.optimizer.step = lambda: grads.update(
        {i: p.grad.clone() for i, p in enumerate(agent.parameters)})
    agent._update_minibatch(samples)
    twin, c = copy.deepcopy(agent), agent.config
    for place in (0, 1):
        for p in twin.parameters:
            p.grad = None
        gates = twin.lstm.gates
        losses = []
        for rows in samples[place].split(L):
            h, cell = rows[0, 4 : agent.seen].split(H)
            for row in rows:
                h, cell = h * (1 - row[3]), cell * (1 - row[3])
                sums = torch.cat([row[:3], h]) @ gates.weight[place] + gates.bias[place, 0]
                keep, write, show, new = sums.split(H)
                cell = torch.sigmoid(keep + 1) * cell + torch.sigmoid(write) * torch.tanh(new)
                h = torch.sigmoid(show) * torch.tanh(cell)
                x = torch.cat([row[:3], h]).expand(2, 1, -1)
                actions, (old, advantage, goal, _) = row[agent.seen :][:2], row[agent.seen + 2 :]
                std = twin.log_std[place, 0].exp()
                policy = torch.distributions.Normal(twin.actor(x)[place, 0], std)
                ratio = (policy.log_prob(actions).sum() - old).exp()
                clipped = ratio.clamp(1 - c.clip_coef, 1 + c.clip_coef)
                surrogate = torch.minimum(ratio * advantage, clipped * advantage)
                error = (twin.critic(x)[place, 0, 0] - goal) ** 2
                losses.append(-surrogate + c.vf_coef * 0.5 * error
                              - c.ent_coef * policy.entropy().sum())
        torch.stack(losses).mean().backward()
        for i, p in enumerate(twin.parameters):
            torch.testing.assert_close(grads[i][place], p.grad[place], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("parts", [2, 4, 5, 99])
def test_micro_batches_of_sequences_give_the_update_of_the_whole_minibatch(float64, parts):
    results = []
    for micro_batches in (1, parts):
        agent = perturbed(micro_batches=micro_batches)
        grads = {}
        agent.optimizer.step = lambda agent=agent, grads=grads: grads.update(
            {i: p.grad.clone() for i, p in enumerate(agent.parameters)})
        results.append(agent._update_minibatch(random_samples(agent, 5)) | grads)
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=str(name))


def test_evaluation_remembers_on_its_own_and_leaves_training_alone():
    agent, plain = (perturbed(num_envs=2) for _ in range(2))
    before = copy.deepcopy(save_state(agent)["memory"])
    obs = torch.ones(2, 7, 3)
    policy = eval_policy(agent)
    actions = [policy(obs) for _ in range(3)]
    assert not torch.equal(actions[0], actions[1])  # it remembers
    assert torch.equal(actions[0], agent.act(obs, explore=False))
    assert torch.equal(agent.memory, before)
    for obs, *rest in make_steps((0, 1), 2, 12):
        eval_policy(agent)(obs)
        drawn = agent.act(obs)
        assert torch.equal(drawn, plain.act(obs))
        for each in (agent, plain):
            each.update()
            each.observe(obs, drawn, *rest)
        assert torch.equal(agent.memory, plain.memory)


def test_an_evaluation_is_a_loop_with_memory(float64):
    """Of a whole episode in the environment."""
    agent = perturbed(num_envs=1, spec=make_envs("torch/CartPoleWithoutVelocity-v1", [0]).spec)
    stack = [make_envs("torch/CartPoleWithoutVelocity-v1", [0, 1], 3) for _ in range(2)]
    returns = evaluate(agent, stack[0], 5)
    obs, policy = stack[1].reset(1, 5), eval_policy(agent)  # EVALUATION
    total, running = torch.zeros(2, 3), torch.ones(2, 3)
    for _ in range(500):
        t = stack[1].step(policy(obs))
        total += running * t.rewards
        running *= 1 - t.terminations
        obs = t.obs
    assert returns == total.mean(1).tolist()


def test_an_agent_given_all_of_its_state_goes_on_exactly():
    """In the middle of a rollout, of a sequence and of episodes."""
    giver, taker = (perturbed(seeds=seeds, num_envs=2) for seeds in ((0, 1), (2, 3)))
    steps = make_steps((0, 1), 2, 45)
    drive(giver, steps[:13])
    drive(taker, make_steps((2, 3), 2, 12))
    assert giver.memory.any()
    restore_state(taker, copy.deepcopy(save_state(giver)))
    histories = [drive(agent, steps[13:]) for agent in (giver, taker)]
    assert len(histories[0]) == len(histories[1]) >= 2
    for ours, theirs in zip(*histories, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(giver.memory, taker.memory) and torch.equal(giver.rollout, taker.rollout)


@pytest.mark.parametrize("settings", [{"num_steps": 7}, {"num_minibatches": 3}, {"seq_len": 8}])
def test_a_rollout_must_be_of_whole_sequences_that_make_equal_minibatches(settings):
    with pytest.raises(ValueError, match=r"num_minibatches must divide num_steps / seq_len"):
        make_agent(ppo_lstm, **settings)


@pytest.mark.parametrize("num_envs", [1, 3, 32, 1024])
def test_by_default_a_rollout_is_of_whole_sequences(num_envs):
    agent = make_agent(ppo_lstm, seeds=[0], num_envs=num_envs, num_steps=None, num_minibatches=32,
                       seq_len=16)
    T = agent.rollout.shape[1]
    assert T % 16 == 0 and T * num_envs >= 2048 and T // 16 * num_envs % 32 == 0
