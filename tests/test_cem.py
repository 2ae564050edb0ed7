"""CEM: the search against a slow loop, the stored plans, and the update."""

import copy
import io
import itertools
import math
import statistics as plain

import pytest
import torch

from agents import cem
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

SPEC = make_spec(low=(-1.0, 0.0), high=(1.0, 4.0))
CENTRE, SCALE = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0])


class Hills:
    """A stand-in for two critics, a steep and a flat one; the lower one's top is elsewhere than
    the top of either or of the mean, by about `apart`.

    tops (S, A): in half ranges from the centre, moved by the first entry of the observation."""

    def __init__(self, tops, apart=0.0):
        self.tops, self.apart, self.seen = torch.tensor(tops), apart, []

    def goals(self, obs):
        return self.tops[:, None] + obs[..., :1]

    def __call__(self, obs, actions, train=False):
        assert not train and obs.shape[:2] == actions.shape[:2]
        self.seen.append(actions)
        gaps = (actions - CENTRE) / SCALE - self.goals(obs)
        steep, flat = 2 * (gaps - 2 * self.apart), gaps + 4 * self.apart
        return -torch.stack([steep, flat], 1).square().sum(-1)


def inside(actions):
    return (actions - CENTRE) / SCALE


def ready(**settings):
    """An agent past its random actions."""
    agent = make_agent(cem, spec=SPEC, **settings)
    agent.transitions = agent.learning_starts
    return agent


def rows(*shape, spread=0.2):
    return (2 * torch.rand(*shape, 3, generator=torch.Generator().manual_seed(4)) - 1) * spread


# The search


@pytest.mark.parametrize("explore", [False, True])
@pytest.mark.parametrize("apart", [0.0, 0.15])
def test_the_search_finds_the_top_of_the_lower_critic(apart, explore):
    """Of each seed and of each row; with few candidates, some rows agree elsewhere."""
    agent, obs = ready(noise=0.0, samples=256), rows(2, 40)
    agent.qf = Hills([[-0.7, 0.4], [0.6, -0.3]], apart)
    actions = agent.act(obs, explore=explore)
    assert ((inside(actions) - agent.qf.goals(obs)).abs() < 0.05).all()
    assert len(agent.qf.seen) == agent.config.iterations


def test_the_default_search_is_close_in_most_rows():
    agent, obs = ready(noise=0.0), rows(2, 200)
    agent.qf = Hills([[-0.7, 0.4], [0.6, -0.3]])
    gaps = (inside(agent.act(obs)) - agent.qf.goals(obs)).abs()
    assert (gaps < 0.05).all(-1).float().mean() > 0.8


def test_a_top_outside_the_bounds_gives_the_bound():
    agent = ready(samples=256)
    agent.qf = Hills([[-3.0, 0.2], [1.4, 1.5]])
    actions = agent.act(torch.zeros(2, 20, 3), explore=False)
    for place, goal in ((0, (-1.0, 2.4)), (1, (1.0, 4.0))):
        gaps = inside(actions[place]) - inside(torch.tensor(goal))
        assert (gaps.abs() < 0.05).all()


@pytest.mark.parametrize("tops", [[[-3.0, 3.0], [0.9, -0.9]], [[0.0, 0.0], [1.0, -1.0]]])
def test_all_candidates_lie_within_the_bounds_and_reach_them(tops):
    agent = ready()
    agent.qf = Hills(tops)
    for explore in (True, False, True):
        agent.act(rows(2, 1), explore=explore)
    seen = torch.cat([x.flatten(0, 1) for x in agent.qf.seen])
    low, high = torch.tensor(SPEC.action_low), torch.tensor(SPEC.action_high)
    assert (seen >= low).all() and (seen <= high).all()
    assert (seen == low).any(0).all() and (seen == high).any(0).all()


def slow_search(value, mean, draws):
    """QT-Opt, section 4.2, of one state; value(action in half ranges) -> float, draws: a list of
    rounds of lists of candidates -> the mean, the rounds that it took."""
    std = [1.0] * len(mean)
    for done, noises in enumerate(draws):
        if sum(std) / len(std) < 0.025:
            return mean, done
        candidates = [[min(max(m + s * n, -1.0), 1.0) for m, s, n in
                       zip(mean, std, noise, strict=True)] for noise in noises]
        ranked = sorted(candidates, key=value, reverse=True)
        top = list(zip(*ranked[:max(2, len(ranked) // 8)], strict=True))
        mean = [sum(x) / len(x) for x in top]
        std = [max(plain.pstdev(x), 0.01) for x in top]
    return mean, len(draws)


def slow_values(agent, seed):
    """-> value(obs (O,)) -> value(action in half ranges): the lower critic, evaluating."""
    critics = [reference_network(agent.qf, seed, place).eval() for place in (0, 1)]
    low, high = torch.tensor(agent.spec.action_low), torch.tensor(agent.spec.action_high)

    def of_state(obs):
        @torch.no_grad()
        def value(x):
            action = (high + low) / 2 + (high - low) / 2 * torch.tensor(x)
            both = torch.cat([obs, action])[None]
            return min(critic(both).item() for critic in critics)
        return value
    return of_state


@pytest.mark.parametrize("candidates, rounds", [(5, 4), (40, 9)])
def test_the_search_equals_a_slow_loop_on_the_same_draws(float64, candidates, rounds):
    """Of 5 candidates, 2 are elite; in 9 rounds of 40, rows agree at different times."""
    agent = make_agent(cem, spec=SPEC)
    drive(agent, make_steps((0, 1), 1, 20))
    generator = torch.Generator().manual_seed(0)
    obs = 3 * torch.randn(2, 3, 3, generator=generator)
    guess = torch.rand(2, 3, 2, generator=generator) - 0.5
    draws = torch.randn(2, rounds, 3, candidates, 2, generator=generator)
    with torch.no_grad():
        ours = agent.search(obs, guess, draws)
    took = []
    for s in range(2):
        of_state = slow_values(agent, s)
        for b in range(3):
            theirs, count = slow_search(
                of_state(obs[s, b]), guess[s, b].tolist(), draws[s, :, b].tolist())
            torch.testing.assert_close(ours[s, b], torch.tensor(theirs), rtol=1e-9, atol=1e-10)
            took.append(count)
    assert len({tuple(x) for x in ours.flatten(0, 1).tolist()}) > 3
    assert rounds == 4 or (min(took) < rounds and len(set(took)) > 1)


def test_a_row_that_has_agreed_keeps_its_mean():
    agent, obs = ready(), rows(2, 30)
    agent.qf = Hills([[-0.7, 0.4], [0.6, -0.3]])
    draws = torch.randn(2, 14, 30, 64, 2, generator=torch.Generator().manual_seed(1))
    means = torch.stack([agent.search(obs, torch.zeros(2, 30, 2), draws[:, :count])
                         for count in range(1, 15)])
    moves = (means[1:] != means[:-1]).any(-1)
    assert not (moves[1:] & ~moves[:-1]).any()  # no row starts again
    ends = moves.sum(0)
    assert ends.min() > 0 and ends.max() < 13 and ends.unique().numel() > 1


def test_a_row_affects_neither_other_rows_nor_other_seeds():
    agent = make_agent(cem, spec=SPEC)
    drive(agent, make_steps((0, 1), 1, 20))
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(2, 4, 3, generator=generator), torch.zeros(2, 4, 2),
              torch.randn(2, 5, 4, 32, 2, generator=generator)]
    with torch.no_grad():
        before = agent.search(*inputs)
        inputs[0][1, 2] += 3
        inputs[1][1, 2] += 0.5
        inputs[2][1, :, 2] *= -1
        after = agent.search(*inputs)
    assert (before != after).any(-1).nonzero().tolist() == [[1, 2]]


# The plans


def spied(agent):
    """-> a list of (guess, plan) that fills as `act` searches."""
    seen, search = [], agent.search

    def watched(obs, guess, draws):
        plans = search(obs, guess, draws)
        seen.append((guess.clone(), plans.clone()))
        return plans

    agent.search = watched
    return seen


def test_each_environment_starts_from_its_last_plan_within_an_episode():
    agent = make_agent(cem, num_envs=3, spec=SPEC)
    seen, steps = spied(agent), make_steps((0, 1), 3, 30)
    drive(agent, steps)
    steps = steps[-len(seen):]
    assert len(seen) > 20 and not seen[0][0].any()
    kinds = set()
    for (_, plans), (guess, _), (*_, terminations, truncations) in zip(seen, seen[1:], steps,
                                                                       strict=False):
        for s, n in ((s, n) for s in range(2) for n in range(3)):
            ended = bool(terminations[s, n]), bool(truncations[s, n])
            kinds.add(ended)
            assert torch.equal(guess[s, n], torch.zeros(2) if any(ended) else plans[s, n])
            assert plans[s, n].any()
    assert kinds == {(False, False), (True, False), (False, True)}


def test_not_exploring_neither_uses_nor_changes_the_plans_nor_the_generators():
    agent = make_agent(cem, num_envs=3, spec=SPEC)
    steps = make_steps((0, 1), 3, 12)
    drive(agent, steps)
    agent.act(steps[-1][0])
    before, obs = copy.deepcopy(flat_state(save_state(agent))), rows(2, 3, spread=2.0)
    assert before["plans"].any(-1).all()
    seen = spied(agent)
    first, second = (agent.act(obs, explore=False) for _ in range(2))
    for others in (1, 2, 7):  # an action depends on the observation alone, not on its row
        equal = agent.act(obs[:, :1].expand(2, others, 3), explore=False)
        torch.testing.assert_close(equal, first[:, :1].expand_as(equal))
    assert torch.equal(first, second) and not any(guess.any() for guess, _ in seen)
    assert all(same(before[name], value) for name, value in flat_state(save_state(agent)).items())
    assert torch.equal(first, CENTRE + SCALE * seen[0][1])  # no noise
    other = make_agent(cem, seeds=(5, 6), num_envs=3, spec=SPEC)
    other.qf = agent.qf
    assert torch.equal(other.act(obs, explore=False), first)  # neither seeds nor plans count


@pytest.mark.parametrize("bounds", [(0, 5), (0, 2, 5), (0, 1, 4, 5)])
@pytest.mark.parametrize("others", [None, 2, 5, 9])
def test_acting_in_groups_starts_each_environment_from_its_own_plan(bounds, others):
    """As acting in all of them at once, also where other environments are acted in without
    exploring in between."""
    agents, guesses = [ready(num_envs=5, noise=0.0) for _ in range(2)], ([], [])
    for agent, seen in zip(agents, guesses, strict=True):
        agent.search = lambda obs, guess, draws, seen=seen: (
            seen.append(guess.clone()), 0.8 * guess + 0.2 * obs[..., :2])[1]
    together, apart = agents
    for obs, *rest in make_steps((0, 1), 5, 12):
        expected = together.act(obs)
        parts = []
        for part in itertools.starmap(slice, itertools.pairwise(bounds)):
            parts.append(apart.act(obs[:, part]))
            if others:
                apart.act(rows(2, others), explore=False)
                guesses[1].pop()
        assert torch.equal(torch.cat(parts, 1), expected)
        for agent in agents:
            agent.observe(obs, expected, *rest)
        assert torch.equal(apart.plans, together.plans)
        count = len(bounds) - 1
        assert torch.equal(torch.cat(guesses[1][-count:], 1), guesses[0][-1])
    assert len(guesses[0]) == 12 and len(guesses[1]) == 12 * count
    last = guesses[0][-1].flatten(0, 1)
    assert last.any(1).sum() > 5 and len(last[last.any(1)].unique(dim=0)) == last.any(1).sum()


@pytest.mark.parametrize("others", [4, 7])
def test_acting_in_more_environments_than_its_own_leaves_the_plans_alone(others):
    agent = make_agent(cem, num_envs=3, spec=SPEC)
    steps = make_steps((0, 1), 3, 12)
    drive(agent, steps)
    agent.act(steps[-1][0])
    seen, plans = spied(agent), agent.plans.clone()
    agent.act(rows(2, others))
    assert plans.any(-1).all() and torch.equal(agent.plans, plans)
    assert not seen[0][0].any()
    agent.act(rows(2, 3))
    assert torch.equal(seen[1][0], plans) and not torch.equal(agent.plans, plans)


def test_a_run_resumed_within_an_episode_continues_identically():
    endless = [(*rest, torch.zeros(2, 2), torch.zeros(2, 2))
               for *rest, _, _ in make_steps((0, 1), 2, 30)]
    agent, resumed = (make_agent(cem, seeds, 2, spec=SPEC) for seeds in ((0, 1), (5, 6)))
    drive(agent, endless[:15])
    drive(resumed, endless[:9])  # its plans must be dropped
    file = io.BytesIO()
    torch.save(save_state(agent), file)
    file.seek(0)
    restore_state(resumed, torch.load(file, weights_only=True))
    plans = spied(resumed)
    start = agent.plans.clone()
    for obs, *rest in endless[15:]:
        actions = agent.act(obs)
        assert torch.equal(actions, resumed.act(obs))
        for each in (agent, resumed):
            each.update()
            each.observe(obs, actions, *rest)
    assert start.any(-1).all() and torch.equal(plans[0][0], start)
    theirs, ours = flat_state(save_state(agent)), flat_state(save_state(resumed))
    assert theirs.keys() == ours.keys() and all(same(theirs[name], ours[name]) for name in theirs)


# Exploration


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2])
def test_the_noise_of_exploration_has_zero_mean_and_the_deviation_asked_for(noise):
    """In half ranges, around the plan; 4000 rows, so that 5 standard errors are 0.08 of it."""
    agent = ready(noise=noise, noise_memory=0.0, iterations=1, samples=2, num_envs=4000)
    plan = torch.tensor([-0.1, 0.15])
    agent.search = lambda obs, mean, draws: plan.expand(*obs.shape[:2], 2)
    gaps = inside(agent.act(torch.zeros(2, 4000, 3))) - plan
    assert (gaps.mean(1).abs() <= 0.08 * noise + 1e-6).all()
    assert ((gaps.std(1) - noise).abs() <= 0.06 * noise + 1e-6).all()
    if noise:
        pairs = gaps.transpose(0, 1).flatten(1).T  # the noise of seeds and dimensions
        assert (torch.corrcoef(pairs) - torch.eye(4)).abs().max() < 0.08


def test_noise_lasts_from_one_step_to_the_next():
    """With the deviation and the correlation asked for; each environment has its own, and only
    exploring in as many environments or fewer draws it."""
    agent = ready(noise=0.1, noise_memory=0.8, iterations=1, samples=2, num_envs=4000)
    agent.search = lambda obs, mean, draws: torch.zeros_like(mean)
    for _ in range(20):
        before = inside(agent.act(torch.zeros(2, 4000, 3)))
    agent.act(torch.zeros(2, 5, 3), explore=False)
    agent.act(torch.zeros(2, 4001, 3))
    parts = [inside(agent.act(torch.zeros(2, size, 3))) for size in (1000, 3000)]
    for gap, last in ((before, before), (torch.cat(parts, 1), before)):
        assert ((gap.std(1) - 0.1).abs() < 0.006).all()
        wanted = 1 if gap is last else 0.8
        products = (gap * last).mean(1) / (gap.std(1) * last.std(1))
        assert ((products - wanted).abs() < 0.05).all()


def test_noisy_actions_are_clamped_to_the_bounds():
    agent = ready(noise=0.5, iterations=1, samples=2)
    agent.search = lambda obs, mean, draws: torch.tensor([-1.0, 0.9]).expand(*obs.shape[:2], 2)
    actions = agent.act(torch.zeros(2, 200, 3))
    for dimension, bound in ((0, -1.0), (1, 4.0)):
        share = (actions[..., dimension] == bound).float().mean()
        assert 0.3 < share < 0.7
    assert (actions >= torch.tensor(SPEC.action_low)).all()
    assert (actions <= torch.tensor(SPEC.action_high)).all()


# The update


def test_targets_and_actions_are_searched_with_settings_of_their_own():
    """In evaluation, which moves no statistics; the one joint pass trains."""
    agent = make_agent(cem, spec=SPEC, iterations=5, samples=7, target_iterations=3,
                       target_samples=4, batch_size=16)
    qf, seen = agent.qf, []

    def watched(obs, actions, train=False):
        before = statistics(qf)
        values = qf(obs, actions, train=train)
        moved = {not torch.equal(before[name], value) for name, value in statistics(qf).items()}
        assert moved == {train}
        seen.append((tuple(obs.shape), tuple(actions.shape), train))
        return values

    drive(agent, make_steps((0, 1), 1, 12))
    agent.qf = watched
    agent.act(rows(2, 1))
    assert seen == 5 * [((2, 14, 3), (2, 14, 2), False)]
    seen.clear()
    agent.act(rows(2, 9), explore=False)
    assert seen == 5 * [((2, 126, 3), (2, 126, 2), False)]
    seen.clear()
    assert agent.update()
    assert seen == 3 * [((2, 128, 3), (2, 128, 2), False)] + [((2, 32, 3), (2, 32, 2), True)]


class Reference(test_crossq.Reference):
    """CrossQ's critics for one seed, with searched next actions and no entropy."""

    def __init__(self, agent, seed):
        self.agent, self.seed, self.c, self.spec = agent, seed, agent.config, agent.spec
        self.critics = [reference_network(agent.qf, seed, place) for place in (0, 1)]
        self.qf_optimizer = torch.optim.Adam(
            [p for q in self.critics for p in q.parameters()], self.c.qf_lr, betas=(0.5, 0.999))

    def critic_step(self, obs, actions, next_obs, rewards, terminations, draws):
        low, high = torch.tensor(self.spec.action_low), torch.tensor(self.spec.action_high)

        @torch.no_grad()
        def value(state, x):
            both = torch.cat([state, (high + low) / 2 + (high - low) / 2 * torch.tensor(x)])[None]
            return min(critic.eval()(both).item() for critic in self.critics)

        plans = [slow_search(lambda x, state=state: value(state, x), [0.0] * len(low),
                             draws[:, b].tolist())[0] for b, state in enumerate(next_obs)]
        next_actions = (high + low) / 2 + (high - low) / 2 * torch.tensor(plans)
        both = torch.cat([torch.cat([obs, actions], 1), torch.cat([next_obs, next_actions], 1)])
        joint = [critic.train()(both)[:, 0] for critic in self.critics]
        values, next_values = zip(*(x.split(len(obs)) for x in joint), strict=True)
        goal = rewards + self.c.gamma * (1 - terminations) * torch.minimum(*next_values).detach()
        self.step(self.qf_optimizer, sum(((x - goal) ** 2).mean() for x in values))


@pytest.mark.parametrize("seed", [0, 1])
def test_updates_equal_a_slow_single_seed_reference(float64, seed):
    agent = make_agent(cem, spec=SPEC, batch_size=6, samples=4, target_samples=9,
                       target_iterations=3)
    reference, calls = Reference(agent, seed), []
    critic_step = agent.update_critic
    agent.update_critic = lambda *x: (calls.append(x), critic_step(*x))[1]
    drive(agent, [(obs, rewards, next_obs, (rewards > 0.6).double(), truncations)
                  for obs, rewards, next_obs, _, truncations in make_steps((0, 1), 1, 13)])
    assert len(calls) == 5 and 0 < sum(x[4][seed].sum() for x in calls) < 30
    for tensors in calls:
        reference.critic_step(*(x[seed] for x in tensors))
    for place in (0, 1):
        ours = reference_network(agent.qf, seed, place).state_dict()
        theirs = reference.critics[place].state_dict()
        for name in (name for name in ours if "num_batches" not in name):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("ends, value", [("truncations", 1 / (1 - 0.8)), ("terminations", 1.0)])
def test_the_value_of_an_endless_task_survives_truncation_alone(ends, value):
    """Reward 1 a step from one state; each step ends an episode, by one flag or by the other."""
    agent = make_agent(cem, seeds=[0], gamma=0.8, qf_lr=1e-2, iterations=1, samples=4)
    obs, ones, zeros = torch.zeros(1, 1, 3), torch.ones(1, 1), torch.zeros(1, 1)
    for _ in range(400):
        flags = {"terminations": zeros, "truncations": zeros, ends: ones}
        actions = agent.act(obs)
        metrics = agent.update()
        agent.observe(obs, actions, ones, obs, **flags)
    assert metrics["value/q"].item() == pytest.approx(value, rel=0.05)


# Settings


@pytest.mark.parametrize("field, value", [
    ("samples", 1), ("iterations", 0), ("target_samples", 1), ("target_iterations", 0),
    ("noise", -1.0), ("noise", math.nan)])
def test_a_bad_setting_is_named_with_its_value(field, value):
    with pytest.raises(ValueError, match=rf"^{field} .*{value}"):
        make_agent(cem, **{field: value})
