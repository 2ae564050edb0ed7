"""BRO against a slow reference, its pessimism and its full resets."""

import io
import itertools
import math

import pytest
import torch
from torch import nn

from agents import bro
from tests import test_crossq
from tests.conftest import (
    drive,
    flat_state,
    make_agent,
    make_spec,
    make_steps,
    restore_state,
    same,
    save_state,
)
from tests.test_crossq import reference_network, statistics

# The update


class BroNet(nn.Module):
    """One critic of one seed: figure 3, with BatchNorm1d for LayerNorm, and one on the inputs."""

    def __init__(self, mlp, seed, place):
        super().__init__()
        self.norms, self.layers = nn.ModuleList(), nn.ModuleList()
        for ours in mlp.norms:
            norm = nn.BatchNorm1d(ours.weight.shape[-1], eps=1e-3, momentum=0.01)
            for theirs, name in (("weight", "weight"), ("bias", "bias"),
                                 ("running_mean", "mean"), ("running_var", "var")):
                getattr(norm, theirs).data = getattr(ours, name).data[seed, place, 0].clone()
            self.norms.append(norm)
        for ours in mlp.layers:
            dense = nn.Linear(*ours.weight.shape[2:])
            dense.weight.data = ours.weight.data[seed, place].T.clone()
            dense.bias.data = ours.bias.data[seed, place, 0].clone()
            self.layers.append(dense)
        for bias in (self.norms[0].bias, *(dense.bias for dense in self.layers[:5])):
            assert not bias.any()  # the next norm takes a shift out again
            bias.requires_grad_(False)

    def forward(self, x):
        def dense_norm(k, x):
            return self.norms[k + 1](self.layers[k](x))

        x = torch.relu(dense_norm(0, self.norms[0](x)))
        x = x + dense_norm(2, torch.relu(dense_norm(1, x)))
        x = x + dense_norm(4, torch.relu(dense_norm(3, x)))
        return self.layers[5](x)


class Reference(test_crossq.Reference):
    """CrossQ for one seed with BRO's critics, pessimism and decoupled weight decay."""

    def __init__(self, agent, seed):
        self.c, self.spec, c = agent.config, agent.spec, agent.config
        self.actor = reference_network(agent.actor, seed, 0)
        self.critics = [BroNet(agent.qf.mlp, seed, place) for place in (0, 1)]
        self.log_alpha = torch.tensor(math.log(c.alpha), requires_grad=True)
        weights = [p for q in self.critics for p in q.parameters()]
        self.qf_optimizer, self.actor_optimizer = (
            torch.optim.AdamW(p, lr=lr, betas=(c.beta1, 0.999), weight_decay=c.weight_decay)
            for p, lr in ((weights, c.qf_lr), (self.actor.parameters(), c.actor_lr)))
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], c.qf_lr, betas=(c.beta1, 0.999))

    def between(self, one, other):
        return (one + other) / 2 - self.c.pessimism * (one - other).abs() / 2

    def critic_step(self, obs, actions, next_obs, rewards, terminations, noise):
        self.actor.eval()
        with torch.no_grad():
            next_actions, next_log_probs = self.policy(next_obs, noise)
        both = torch.cat([torch.cat([obs, actions], 1), torch.cat([next_obs, next_actions], 1)])
        joint = [critic.train()(both)[:, 0] for critic in self.critics]
        values, next_values = zip(*(x.split(len(obs)) for x in joint), strict=True)
        soft = self.between(*next_values).detach() - self.log_alpha.exp().item() * next_log_probs
        goal = rewards + self.c.gamma * (1 - terminations) * soft
        self.step(self.qf_optimizer, sum(((x - goal) ** 2).mean() for x in values))

    def actor_step(self, obs, noise):
        self.actor.train()
        actions, log_probs = self.policy(obs, noise)
        both = torch.cat([obs, actions], 1)
        values = self.between(*(critic.eval()(both)[:, 0] for critic in self.critics))
        alpha, goal = self.log_alpha.exp().item(), self.c.target_entropy * self.spec.action_dim
        alpha_loss = -self.log_alpha.exp() * (log_probs.detach() + goal).mean()
        self.step(self.actor_optimizer, (alpha * log_probs - values).mean())
        self.step(self.alpha_optimizer, alpha_loss)


@pytest.mark.parametrize("seed, pessimism", [(0, 0.0), (1, 0.3), (0, 0.5), (0, 1.0)])
def test_ten_updates_equal_a_slow_single_seed_reference(float64, seed, pessimism):
    agent = make_agent(bro, batch_size=8, pessimism=pessimism, weight_decay=0.1, alpha=0.3)
    assert agent.config.replay_ratio == 2
    reference = Reference(agent, seed)
    calls = []
    critic_step, actor_step = agent.update_critic, agent.update_actor
    agent.update_critic = lambda *x: (calls.append((reference.critic_step, x)), critic_step(*x))[1]
    agent.update_actor = lambda *x: (calls.append((reference.actor_step, x)), actor_step(*x))[1]
    drive(agent, make_steps((0, 1), 1, 13))
    assert len(calls) == 10 + 3
    for step, tensors in calls:
        step(*(x[seed] for x in tensors))

    pairs = [(reference_network(agent.actor, seed, 0), reference.actor)] + [
        (BroNet(agent.qf.mlp, seed, place), reference.critics[place]) for place in (0, 1)]
    for ours, theirs in pairs:
        ours, theirs = ours.state_dict(), theirs.state_dict()
        for name in (name for name in ours if "num_batches" not in name):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=1e-10, msg=name)
    torch.testing.assert_close(agent.log_alpha[seed].detach(), reference.log_alpha.detach(),
                               rtol=1e-7, atol=0)  # 1 - tanh(x)^2 costs the reference digits


def test_the_default_networks_have_about_five_million_parameters():
    agent = bro.Agent(make_spec(17, 6 * (-1.0,), 6 * (1.0,)), bro.Config(), [0], total_steps=10)
    count = sum(p.numel() for network in (agent.actor, agent.qf) for p in network.parameters())
    assert 4e6 < count < 6e6


@pytest.mark.parametrize("value", [-0.1, 1.5])
@pytest.mark.parametrize("field", ["pessimism", "weight_decay"])
def test_settings_out_of_their_range_are_named_with_their_value(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        make_agent(bro, **{field: value})


# Resets


def optimiser_steps(agent):
    """-> a list that fills with (transitions, steps taken) before each critic step."""
    seen, critic_step = [], agent.update_critic

    def watched(*x):
        steps = {int(state["step"]) for state in agent.qf_optimizer.state.values()} or {0}
        assert len(steps) == 1
        seen.append((agent.transitions, *steps))
        return critic_step(*x)

    agent.update_critic = watched
    return seen


def renewed(agent, **settings):
    """A new agent whose weights come from where `agent`'s generators stand, with its replay."""
    new = make_agent(bro, num_envs=agent.num_envs, reset_at=(), **settings)
    for ours, theirs in zip(new.generators, agent.generators, strict=True):
        ours.set_state(theirs.get_state())
    new.actor = bro.Actor(new.generators, new.spec, new.config)
    new.qf = bro.QFunctions(new.generators, new.spec, new.config)
    fresh = save_state(new)
    new = make_agent(bro, num_envs=agent.num_envs, reset_at=(), **settings)
    state = save_state(agent)
    restore_state(new, fresh | {name: state[name] for name in (
        "replay", "transitions", "critic_steps")})
    return new


def assert_same_state(one, other):
    one, other = flat_state(save_state(one)), flat_state(save_state(other))
    assert one.keys() == other.keys()
    assert all(same(one[name], other[name]) for name in one)


@pytest.mark.parametrize("num_envs, resets", [(1, (20, 31)), (3, (21, 33)), (3, (23, 31))])
def test_a_reset_makes_a_new_agent_with_the_old_replay_and_counters(num_envs, resets):
    """Networks, statistics, warm-up, moments, temperature; the counts may jump over reset_at."""
    settings = {"renorm_warmup": 6, "weight_decay": 0.01, "alpha": 0.5}
    agent = make_agent(bro, num_envs=num_envs, reset_at=resets, **settings)
    ends = [math.ceil(at / num_envs) * num_envs for at in resets]
    new, met = None, []
    for obs, *rest in make_steps((0, 1), num_envs, 45 // num_envs):
        actions = agent.act(obs)
        assert new is None or torch.equal(new.act(obs), actions)
        if agent.transitions in ends:
            assert (agent.log_alpha != math.log(0.5)).all()
            assert agent.qf.mlp.norms[0].warmup <= 0 and agent.actor.mlp.norms[0].warmup < 6
            assert all(x.any() for x in agent.qf_optimizer.state_dict()["state"][0].values())
            if new is not None:
                assert_same_state(agent, new)
            new = renewed(agent, **settings)
            met.append(agent.transitions)
        metrics = agent.update()
        if new is not None:
            theirs = new.update()
            assert theirs and all(torch.equal(metrics[name], theirs[name]) for name in theirs)
            new.observe(obs, actions, *rest)
        agent.observe(obs, actions, *rest)
    assert met == ends
    assert_same_state(agent, new)
    assert agent.replay.size == agent.transitions == 45


@pytest.mark.parametrize("num_envs, reset_at, at", [
    (1, (20, 31), (20, 31)), (3, (20, 31), (21, 33)), (3, (21,), (21,)), (3, (22, 24), (24,)),
    (1, (), ())])
def test_each_reset_happens_exactly_once(num_envs, reset_at, at):
    """The optimiser's own count starts again there and nowhere else."""
    agent = make_agent(bro, num_envs=num_envs, reset_at=reset_at)
    seen = optimiser_steps(agent)
    drive(agent, make_steps((0, 1), num_envs, 45 // num_envs))
    assert len(seen) == agent.critic_steps > 50
    starts = [transitions for transitions, steps in seen if steps == 0]
    assert starts[0] == (8 if num_envs == 1 else 9) and starts[1:] == list(at)
    assert all(b == a + 1 or b == 0 for (_, a), (_, b) in itertools.pairwise(seen))


def test_by_default_the_networks_start_anew_once_after_15_000_transitions():
    """As BRO-Fast's do, and never again."""
    starts = []
    for begin in (14_998, 49_998):
        agent = make_agent(bro, reset_at=bro.Config().reset_at, total_steps=100_000)
        drive(agent, make_steps((0, 1), 1, 5))
        agent.transitions, agent.critic_steps = begin, 2 * (begin - agent.learning_starts)
        seen = optimiser_steps(agent)
        drive(agent, make_steps((0, 1), 1, 6))
        assert len(seen) >= 12
        starts += [at for at, steps in seen if steps == 0 and at > seen[0][0]]
    assert starts == [15_001]


@pytest.mark.parametrize("num_envs, reset_at, ratio", [
    (20, 15, 2.0), (1, 15, 0.0), (1, 3, 1.0), (1, 8, 1.0)])
def test_a_reset_before_the_first_gradient_step_is_harmless(num_envs, reset_at, ratio):
    agent = make_agent(bro, num_envs=num_envs, reset_at=(reset_at,), replay_ratio=ratio)
    count = 3 if num_envs == 20 else 20
    drive(agent, make_steps((0, 1), num_envs, count))
    assert agent.transitions == count * num_envs > reset_at


def test_a_seeds_new_weights_are_the_same_whatever_the_stack(float64):
    def weights(seeds):
        agent, seen = make_agent(bro, seeds, reset_at=(20,)), {}
        critic_step = agent.update_critic

        def watched(*x):
            if agent.transitions == 20 and not seen:
                seen.update((f"{part} {name}", value.clone()) for part in ("actor", "qf")
                            for name, value in getattr(agent, part).named_parameters())
            return critic_step(*x)

        agent.update_critic, first = watched, agent.qf.mlp.layers[5].weight.clone()
        drive(agent, make_steps(seeds, 1, 30))
        assert len(seen) == 2 * (3 + 3) + 2 * (6 + 6)
        assert not (seen["qf mlp.layers.5.weight"] == first).any()
        return seen

    stack, alone = weights((0, 1, 2)), weights((1,))
    assert all(torch.equal(stack[name][1], alone[name][0]) for name in alone)
    differ = [n for n in alone if "norms" not in n and alone[n].any()]
    assert not any(torch.equal(stack[name][0], stack[name][1]) for name in differ)


@pytest.mark.parametrize("saved_at", [15, 20])
def test_a_run_saved_before_a_reset_continues_identically_through_it(saved_at):
    """Also from the very transition of the reset, which comes with the next update."""
    steps = make_steps((0, 1), 1, 30)
    agent, resumed = (make_agent(bro, seeds, reset_at=(20,)) for seeds in ((0, 1), (5, 6)))
    drive(agent, steps[:saved_at])
    file = io.BytesIO()
    torch.save(save_state(agent), file)
    file.seek(0)
    restore_state(resumed, torch.load(file, weights_only=True))
    seen = optimiser_steps(resumed)
    for each in (agent, resumed):
        drive(each, steps[saved_at:])
    assert (20, 0) in seen and seen[-1][1] == 2 * 10 - 1
    assert_same_state(agent, resumed)


def test_statistics_start_anew_and_move_again_after_a_reset():
    agent = make_agent(bro, reset_at=(20,), policy_delay=100)
    drive(agent, make_steps((0, 1), 1, 20))
    moved = statistics(agent.qf)
    assert agent.transitions == 20 and moved["mlp.norms.0.warmup"] == 100_000 - 24
    agent.update_critic = lambda *x: {}
    agent.update()
    for name, value in statistics(agent.qf).items():
        kind = name.split(".")[-1]
        assert (value == {"mean": 0, "var": 1, "warmup": 100_000}[kind]).all(), name
        assert not (moved[name] == value).all(), name


@pytest.mark.slow
def test_compiled_code_sees_the_new_weights(float64):
    """The critics' step alone and without code generation, to save time: it goes on as the eager
    one, in the graph that it has."""
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters["stats"]
    steps, agents = make_steps((0, 1), 1, 24), []
    for compiled in (False, True):
        agent = make_agent(bro, reset_at=(20,), accelerate=lambda fn, compiled=compiled: (
            torch.compile(fn, backend="aot_eager")
            if compiled and fn.__name__ == "_update_critic" else fn))
        before = counts["unique_graphs"]
        drive(agent, steps[:20])
        graphs = counts["unique_graphs"]
        assert (graphs > before) == compiled
        history = drive(agent, steps[20:])
        assert counts["unique_graphs"] == graphs and len(history) == 4
        agents.append((agent, history))
    (eager, theirs), (compiled, ours) = agents
    for name in theirs[-1]:
        torch.testing.assert_close(ours[-1][name], theirs[-1][name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(compiled.qf.mlp.layers[5].weight, eager.qf.mlp.layers[5].weight,
                               rtol=0, atol=1e-6)
