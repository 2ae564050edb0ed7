"""What holds for every backend of lab/envs.py. The Diary environment says in its observation in
which episode and at which step it is."""

import os
from collections import defaultdict

import pytest
import torch

from lab import envs
from lab.envs import EVALUATION, TRAINING, Episode, UserError

DIARY = "tests.probe_envs:lab-tests/Diary-v0"  # imported by name, in any process
EPISODE, STEP, LENGTH, START = range(4)


@pytest.fixture(params=envs.BACKENDS)
def make(request):
    made = []

    def make(env_id, seeds, num_envs=1, **settings):
        made.append(envs.make(env_id, seeds, num_envs, backend=request.param, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def play(stack, steps, *stream, first_place=0):
    """Actions that depend on the step and the place -> the first obs, actions, transitions."""
    obs = stack.reset(*stream)
    (S, N), A = stack.shape, stack.spec.action_dim
    places = first_place + torch.arange(S * N * A, dtype=torch.float32).view(S, N, A)
    actions = [torch.sin(places + 10.0 * k) for k in range(steps)]
    return obs, actions, [stack.step(a) for a in actions]


def trajectory(stack, steps, *stream, first_place=0):
    obs, _, transitions = play(stack, steps, *stream, first_place=first_place)
    return torch.stack([obs] + [t.next_obs for t in transitions])


def test_shapes_and_dtypes(make):
    obs, _, transitions = play(make(DIARY, [0, 1], 3), 8)
    assert obs.shape == (2, 3, 4) and obs.dtype == torch.float32
    for t in transitions:
        assert t.obs.shape == t.next_obs.shape == (2, 3, 4)
        assert t.rewards.shape == t.terminations.shape == t.truncations.shape == (2, 3)
        assert all(x.dtype == torch.float32 for x in t[:5])


def test_the_spec_says_what_an_agent_may_know(make):
    spec = make("lab-tests/Target-v0", [0]).spec
    assert (spec.obs_dim, spec.action_dim, spec.max_episode_steps) == (2, 2, None)
    assert spec.action_low == (-1.0, 0.0) and spec.action_high == (1.0, 4.0)
    assert make("Pendulum-v1", [0]).spec.max_episode_steps == 200


def test_next_obs_succeeds_the_action_and_obs_begins_the_next_episode(make):
    obs, _, transitions = play(make(DIARY, [0, 1], 3), 40)
    assert (obs[..., EPISODE] == 0).all() and (obs[..., STEP] == 0).all()
    ends = 0
    for t in transitions:
        assert torch.equal(t.next_obs[..., STEP], obs[..., STEP] + 1)
        for column in (EPISODE, LENGTH, START):
            assert torch.equal(t.next_obs[..., column], obs[..., column])
        end = t.next_obs[..., STEP] == t.next_obs[..., LENGTH]
        assert torch.equal(end, (t.terminations + t.truncations) == 1)
        assert torch.equal(t.obs[~end], t.next_obs[~end])
        assert (t.obs[end][:, STEP] == 0).all()
        assert torch.equal(t.obs[end][:, EPISODE], t.next_obs[end][:, EPISODE] + 1)
        ends, obs = ends + int(end.sum()), t.obs
    assert ends > 20


def test_an_end_by_time_is_a_truncation_unless_the_task_ended_as_well(make):
    _, _, transitions = play(make(DIARY, [0, 1], 3), 40)
    seen = set()
    for t in transitions:
        for obs, terminated, truncated in zip(
                t.next_obs.flatten(0, 1), t.terminations.flatten(), t.truncations.flatten(),
                strict=True):
            end, kind = bool(obs[STEP] == obs[LENGTH]), int(obs[EPISODE]) % 3
            assert (terminated, truncated) == (end and kind != 1, end and kind == 1)
            seen.add((end, kind))
    assert len(seen) == 6


def test_a_time_limit_truncates(make):
    _, _, transitions = play(make("Pendulum-v1", [0]), 200)
    assert [float(t.truncations) for t in transitions] == [0] * 199 + [1]
    assert not any(t.terminations.any() for t in transitions)
    assert [e.length for e in transitions[-1].episodes] == [200]


def test_each_environment_gets_its_own_action(make):
    _, actions, transitions = play(make(DIARY, [0, 1], 3), 8)
    for a, t in zip(actions, transitions, strict=True):
        torch.testing.assert_close(t.rewards, a[..., 0])


def test_episodes_carry_their_environment_seed_return_and_length(make):
    _, _, transitions = play(make(DIARY, [5, 6], 3), 40)
    rewards = defaultdict(list)
    for t in transitions:
        expected = []
        ends = (t.terminations + t.truncations).flatten()
        for i in range(6):
            rewards[i].append(float(t.rewards.flatten()[i]))
            if ends[i]:
                episode = rewards.pop(i)
                expected.append(Episode(i, i // 3, pytest.approx(sum(episode)), len(episode)))
        assert list(t.episodes) == expected


def test_clipped_rewards_lie_within_bounds_and_returns_stay_raw(make):
    """The reward of a Diary step is its action."""
    raw, clipped = make(DIARY, [0, 1], 2), make(DIARY, [0, 1], 2, clip_reward=(-0.5, 0.25))
    ended = 0
    for ours, theirs in zip(play(clipped, 20)[2], play(raw, 20)[2], strict=True):
        assert torch.equal(ours.rewards, theirs.rewards.clamp(-0.5, 0.25))
        assert ours.episodes == theirs.episodes
        ended += len(ours.episodes)
    assert ended > 8 and theirs.rewards.abs().max() > 0.5


def test_consecutive_episodes_start_differently(make):
    _, _, transitions = play(make(DIARY, [0]), 60)
    starts = [float(t.obs[0, 0, START]) for t in transitions if t.episodes]
    assert len(starts) > 10 and len(set(starts)) == len(starts)


@pytest.mark.parametrize("env_id", [DIARY, "Pendulum-v1", "HalfCheetah-v5"])
def test_equal_seeds_give_equal_trajectories(make, env_id):
    first, second = (trajectory(make(env_id, [0, 1], 2), 30) for _ in range(2))
    assert torch.equal(first, second)


def test_a_reset_begins_anew(make):
    stack = make(DIARY, [0, 1], 2)
    assert torch.equal(trajectory(stack, 25), trajectory(stack, 25))


def test_a_return_does_not_reach_over_a_reset(make):
    stack = make(DIARY, [0])
    stack.reset()
    stack.step(torch.full((1, 1, 1), 50.0))
    _, _, transitions = play(stack, 5)
    first = next(e for t in transitions for e in t.episodes)
    assert first.length == transitions[0].next_obs[0, 0, LENGTH] and first.episode_return < 50


@pytest.mark.parametrize("env_id", [DIARY, "Pendulum-v1"])
def test_a_seed_in_a_stack_sees_what_it_sees_alone(make, env_id):
    stack = trajectory(make(env_id, [0, 7, 3], 2), 30)
    action_dim = make(env_id, [0]).spec.action_dim
    alone = trajectory(make(env_id, [3], 2), 30, first_place=2 * 2 * action_dim)
    assert torch.equal(stack[:, 2:], alone)


def test_seeds_places_and_streams_differ(make):
    stack = make("Pendulum-v1", range(4), 3)
    starts = [tuple(obs.tolist())
              for stream in [(TRAINING, 0), (TRAINING, 10), (EVALUATION, 0), (EVALUATION, 10)]
              for obs in stack.reset(*stream).flatten(0, 1)]
    assert len(set(starts)) == len(starts) == 48


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "BipedalWalker-v3", "Pendulum-v1"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_seed_does_not_break_its_simulator(make, env_id, bad):
    """Its neighbour, and itself after a reset, go on as if nothing had happened."""
    stack = make(env_id, [0, 1])
    calm = trajectory(stack, 10)
    stack.reset()
    for k in range(10):
        actions = torch.sin(torch.arange(2.0 * stack.spec.action_dim) + 10.0 * k).view(2, 1, -1)
        actions[0] = bad
        t = stack.step(actions)
        assert torch.equal(t.next_obs[1], calm[k + 1, 1])
        assert t.next_obs.isfinite().all()
    assert torch.equal(trajectory(stack, 10), calm)


def test_a_walkers_episode_does_not_depend_on_the_ones_before(make):
    """Without a new Box2D world at each reset, contacts leak from an episode into the next."""
    def two_episodes(stack):
        obs, generator = [stack.reset()], torch.Generator().manual_seed(7)
        for _ in range(2):
            episodes = []
            while not episodes:
                t = stack.step(2 * torch.rand(1, 1, 4, generator=generator) - 1)
                obs.append(t.next_obs)
                episodes = t.episodes
        return torch.stack(obs)

    stack = make("BipedalWalker-v3", [0])
    assert torch.equal(two_episodes(stack), two_episodes(stack))


def test_mujoco_warns_through_python_and_leaves_no_log(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stack = make("HalfCheetah-v5", [0])
    stack.reset()
    env = envs.make_one("HalfCheetah-v5")
    env.reset(seed=0)
    with pytest.warns(RuntimeWarning, match="MuJoCo: Nan"):
        env.step([float("nan")] * 6)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("env_id, words", [
    ("HalfChetah-v5", "unknown environment 'HalfChetah-v5'; did you mean HalfCheetah-v5"),
    ("halfcheetah-v5", "did you mean HalfCheetah-v5"),
    ("HalfCheetah-v9", "did you mean HalfCheetah-v5"),
    ("HalfCheetah", "names no version; say 'HalfCheetah-v5'"),
    ("nothing-like-it", "cannot make environment 'nothing-like-it'"),
    ("no_such_module:Pendulum-v1", "cannot make environment 'no_such_module:Pendulum-v1'"),
    ("CartPole-v1", "CartPole-v1 has actions Discrete"),
    ("lab-tests/DictObservations-v0", "lab-tests/DictObservations-v0 has observations Dict"),
    ("CarRacing-v3", "CarRacing-v3 has observations Box"),
    ("lab-tests/WideDictObservations-v0", "has observations Dict"),
    ("a:b:c-v0", "cannot make environment 'a:b:c-v0'"),
])
def test_an_environment_that_cannot_work_is_named_in_one_line(make, env_id, words):
    with pytest.raises(UserError) as caught:
        make(env_id, [0])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_backend_is_named_with_those_that_exist():
    with pytest.raises(UserError, match=r"no backend 'asink'; there are .*sync"):
        envs.make(DIARY, [0], backend="asink")
