"""Tests that run on every backend of lab/envs. Observations of the Diary environments hold the
episode and the step; a pendulum is compared with its equation of motion."""

import math
import os
import sys
import warnings

import gymnasium
import numpy as np
import pytest
import torch

from lab.envs import host, torch_tasks
from lab.envs.base import Finished
from lab.envs.host import SyncEnvs
from lab.envs.make import make_envs
from lab.envs.shard import EVALUATION, TRAINING
from lab.envs.spec import EnvSpec, as_env_actions, make_one
from lab.envs.torch_vec import TorchEnvs
from lab.errors import UserError

DIARY = "tests.probe_envs:lab-tests/Diary-v0"  # imported by name, in any process
EPISODE, STEP, LENGTH, START = range(4)
SETTINGS = {
    "sync": {"backend": "sync"},
    "workers": {"backend": "workers", "workers": 2},
    "groups": {"backend": "workers", "workers": 2, "groups": 2},
    "crowd": {"backend": "workers", "workers": 9, "groups": 2},  # more workers than environments
    "envpool": {"backend": "envpool"},
    "torch": {"backend": "torch"},
}
PROCESSES = ("workers", "groups", "crowd")


class TorchDiary(torch_tasks.TorchEnv):
    """Observes (kind, step, the episode's length, a random start); the reward is the action.

    By its kind an episode ends by termination (0), by truncation (1) or by both at once (2)."""

    obs_dim, action_low, action_high, max_episode_steps, randoms = 4, [-100.0], [100.0], 5, 3

    def initial(self, uniform):
        kind, length, start = uniform.unbind(-1)
        kind = (3 * kind).floor()
        length = torch.where(kind == 0, 2 + (3 * length).floor(), 5)
        return torch.stack([kind, torch.zeros_like(kind), length, start], -1)

    def step(self, state, actions):
        state = state + state.new_tensor([0, 1, 0, 0])
        kind, step, length, _ = state.unbind(-1)
        return state, actions.squeeze(-1), (step == length) & (kind != 1)

    def observe(self, state):
        return state


class Maker:
    """Makes stacks of one backend: two seeds, and a few environments of each."""

    def __init__(self, name):
        self.name, self.num_envs = name, 2 if name == "crowd" else 3
        self.diary = "torch/Diary-v0" if name == "torch" else DIARY
        self.ending = "InvertedPendulum-v5" if name == "envpool" else self.diary  # soon and often
        self.pendulum = "torch/Pendulum-v1" if name == "torch" else "Pendulum-v1"
        self.made, self.kept = [], {}

    def __call__(self, env_id, seeds=(0, 1), num_envs=None, **settings):
        self.made.append(make_envs(env_id, seeds, num_envs or self.num_envs,
                                   **SETTINGS[self.name], **settings))
        return self.made[-1]

    def shared(self, env_id):
        """One for all tests: processes start slowly, and a reset begins anew."""
        if env_id not in self.kept:
            self.kept[env_id] = self(env_id)
        return self.kept[env_id]


@pytest.fixture(scope="module")
def make(request):
    if request.param == "envpool":
        pytest.importorskip("envpool")
    maker = Maker(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(torch_tasks.ENVS, "Diary-v0", TorchDiary)
        yield maker
    for stack in maker.made:
        stack.close()


def on(*names):
    return pytest.mark.parametrize("make", names, indirect=True, scope="module")


everywhere = on(*SETTINGS)
diaries = on("sync", *PROCESSES, "torch")
cheaply = on("sync", "workers", "groups", "envpool", "torch")  # where a test makes its own stacks


def on_each(*pairs):
    return pytest.mark.parametrize("make, env_id", pairs, indirect=["make"], scope="module")


def actions_at(stack, step, first_place=0):
    """They depend on the step and the place."""
    (S, N), A = stack.shape, stack.spec.action_dim
    places = first_place + torch.arange(S * N * A, dtype=torch.float32).view(S, N, A)
    return torch.sin(places + 10.0 * step)


def play(stack, steps, *stream, first_place=0):
    """-> the first obs, actions, transitions."""
    obs = stack.reset(*stream)
    actions = [actions_at(stack, k, first_place) for k in range(steps)]
    return obs, actions, [stack.step(a) for a in actions]


def trajectory(stack, steps, *stream, first_place=0):
    obs, _, transitions = play(stack, steps, *stream, first_place=first_place)
    return torch.stack([obs] + [t.next_obs for t in transitions])


def ends_of(t):
    return (t.terminations + t.truncations) > 0


def pendulum(obs, actions):
    """gymnasium's Pendulum-v1 in float64 -> next_obs, rewards."""
    cos, sin, velocity = obs.double().unbind(-1)
    angle, torque = torch.atan2(sin, cos), actions.double().squeeze(-1).clamp(-2, 2)
    cost = angle.square() + 0.1 * velocity.square() + 0.001 * torque.square()
    velocity = (velocity + 0.05 * (15 * sin + 3 * torque)).clamp(-8, 8)
    angle = angle + 0.05 * velocity
    return torch.stack([angle.cos(), angle.sin(), velocity], -1), -cost


class Tally:
    """What finished() should say, from the transitions."""

    def __init__(self, shape):
        self.running, self.sums = torch.zeros(2, *shape), torch.zeros(3, shape[0])

    def add(self, t):
        self.running += torch.stack([t.rewards, torch.ones_like(t.rewards)])
        done = torch.cat([torch.ones_like(self.running[:1]), self.running])
        self.sums += (done * ends_of(t)).sum(2)
        self.running *= ~ends_of(t)

    def finished(self):
        counts, returns, lengths = self.sums.tolist()
        self.sums *= 0
        return [Finished(int(n), pytest.approx(r / max(n, 1), abs=1e-5),
                         pytest.approx(k / max(n, 1)))
                for n, r, k in zip(counts, returns, lengths, strict=True)]


# What a step gives


@everywhere
def test_shapes_and_dtypes(make):
    stack = make.shared(make.ending)
    obs, _, transitions = play(stack, 8)
    S, N = stack.shape
    assert stack.shape == (2, make.num_envs)
    assert obs.shape == (S, N, 4) and obs.dtype == torch.float32
    for t in transitions:
        assert t.obs.shape == t.next_obs.shape == (S, N, 4)
        assert t.rewards.shape == t.terminations.shape == t.truncations.shape == (S, N)
        assert all(x.dtype == torch.float32 for x in t)


@everywhere
def test_the_spec_says_what_an_agent_may_know(make):
    spec = make.shared(make.pendulum).spec
    assert spec == EnvSpec(make.pendulum, 3, 1, (-2.0,), (2.0,), 200)


@on("sync", "workers")
def test_a_spec_has_the_bounds_of_each_action_and_may_have_no_limit(make):
    spec = make("tests.probe_envs:lab-tests/Target-v0", [0], 1).spec
    assert (spec.obs_dim, spec.action_dim, spec.max_episode_steps) == (2, 2, None)
    assert spec.action_low == (-1.0, 0.0) and spec.action_high == (1.0, 4.0)


@diaries
def test_next_obs_succeeds_the_action_and_obs_begins_the_next_episode(make):
    obs, _, transitions = play(make.shared(make.diary), 40)
    assert (obs[..., STEP] == 0).all()
    ends = 0
    for t in transitions:
        assert torch.equal(t.next_obs[..., STEP], obs[..., STEP] + 1)
        for column in (EPISODE, LENGTH, START):
            assert torch.equal(t.next_obs[..., column], obs[..., column])
        end = t.next_obs[..., STEP] == t.next_obs[..., LENGTH]
        assert torch.equal(end, (t.terminations + t.truncations) == 1)
        assert torch.equal(t.obs[~end], t.next_obs[~end])
        assert (t.obs[end][:, STEP] == 0).all()
        assert (t.obs[end][:, START] != t.next_obs[end][:, START]).all()
        if make.name != "torch":  # whose diaries do not count
            assert torch.equal(t.obs[end][:, EPISODE], t.next_obs[end][:, EPISODE] + 1)
        ends, obs = ends + int(end.sum()), t.obs
    assert ends > 20


@diaries
def test_an_end_by_time_is_a_truncation_unless_the_task_ended_as_well(make):
    _, _, transitions = play(make.shared(make.diary), 40)
    seen = set()
    for t in transitions:
        for obs, terminated, truncated in zip(
                t.next_obs.flatten(0, 1), t.terminations.flatten(), t.truncations.flatten(),
                strict=True):
            end, kind = bool(obs[STEP] == obs[LENGTH]), int(obs[EPISODE]) % 3
            assert (terminated, truncated) == (end and kind != 1, end and kind == 1)
            seen.add((end, kind))
    assert len(seen) == 6


@everywhere
def test_a_pendulum_moves_by_its_equation_and_only_the_time_limit_ends_it(make):
    """So next_obs is the true successor at the limit, and the next episode goes on from obs."""
    obs, actions, transitions = play(make.shared(make.pendulum), 210)
    for k, (a, t) in enumerate(zip(actions, transitions, strict=True)):
        next_obs, rewards = pendulum(obs, a)
        torch.testing.assert_close(t.next_obs.double(), next_obs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(t.rewards.double(), rewards, atol=1e-3, rtol=1e-4)
        assert (t.terminations == 0).all() and (t.truncations == (k == 199)).all()
        if k == 199:
            assert (t.obs != t.next_obs).any(-1).all() and (t.obs[..., 2].abs() <= 1).all()
        else:
            assert torch.equal(t.obs, t.next_obs)
        obs = t.obs


@on("envpool")
def test_a_pole_of_envpool_that_falls_ends_by_termination(make):
    _, _, transitions = play(make.shared("InvertedPendulum-v5"), 60)
    for t in transitions:
        fallen = t.next_obs[..., 1].abs() > 0.2
        assert torch.equal(t.terminations == 1, fallen) and (t.truncations == 0).all()
        assert torch.equal(t.obs[~fallen], t.next_obs[~fallen])
        assert (t.obs[fallen].abs() <= 0.01).all()
    assert sum(int(t.terminations.sum()) for t in transitions) > 10


@on("envpool")
def test_rows_of_envpool_go_to_the_environments_that_they_name(make):
    """Its answers may come in any order, and an end may have both flags."""
    class Pool:
        def recv(self):
            ids = torch.tensor([2, 0, 3, 1]).numpy()
            obs = 10.0 * ids[:, None] + torch.arange(3).numpy()
            return obs, ids / 10, ids == 2, ids > 1, {"env_id": ids}

        def reset(self, ended):
            assert ended.tolist() == [2, 3]
            ids = ended[::-1]
            return -10.0 * ids[:, None] - torch.arange(3).numpy(), {"env_id": ids}

        def close(self):
            pass

    stack = make("Pendulum-v1", [0, 1], 2)
    stack.reset()
    stack.pool.close()
    stack.pool = Pool()
    t = stack.receive()
    assert t.next_obs[..., 1].tolist() == [[1, 11], [21, 31]]
    assert t.obs[..., 1].tolist() == [[1, 11], [-21, -31]]
    assert t.rewards.flatten().tolist() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert t.terminations.tolist() == [[0, 0], [1, 0]]
    assert t.truncations.tolist() == [[0, 0], [0, 1]]
    assert stack.finished() == [Finished(0, 0, 0), Finished(2, pytest.approx(0.25), 1)]


@diaries
def test_each_environment_gets_its_own_action(make):
    """The reward of a Diary step is its action."""
    _, actions, transitions = play(make.shared(make.diary), 8)
    for a, t in zip(actions, transitions, strict=True):
        assert torch.equal(t.rewards, a[..., 0])


@diaries
def test_groups_are_acted_on_one_by_one_and_get_their_own_actions(make):
    stack = make.shared(make.diary)
    obs, seen = stack.reset(), []

    def act(part):
        seen.append(part)
        return 100 * part[..., [START]]

    for _ in range(12):
        seen.clear()
        actions = stack.act_and_send(act, obs)
        t = stack.receive()
        assert len(seen) == SETTINGS[make.name].get("groups", 1) == len(stack.groups)
        assert torch.equal(torch.cat(seen, 1), obs)
        assert torch.equal(actions, 100 * obs[..., [START]])
        assert torch.equal(t.rewards, actions[..., 0])
        assert torch.equal(t.next_obs[..., STEP], obs[..., STEP] + 1)
        obs = t.obs


@cheaply
def test_clipped_rewards_lie_within_bounds_and_returns_stay_raw(make):
    low, high = (0.0, 0.25) if make.name == "envpool" else (-0.5, 0.25)
    raw, clipped = make.shared(make.ending), make(make.ending, clip_reward=(low, high))
    ours, theirs = play(clipped, 40)[2], play(raw, 40)[2]
    for t, other in zip(ours, theirs, strict=True):
        assert torch.equal(t.rewards, other.rewards.clamp(low, high))
    assert max(float(t.rewards.max()) for t in ours) == high
    finished = clipped.finished()
    assert finished == raw.finished() and all(each.episodes > 1 for each in finished)


# A step of several frames, and what ends an episode

@on("sync", "groups")
def test_an_action_is_held_for_its_frames_or_to_the_end_of_the_episode(make):
    """Each frame of a Diary rewards the action; returns and lengths are those of the frames."""
    stack = make(make.diary, action_repeat=3)
    obs, actions, transitions = play(stack, 30)
    seen, returns = set(), torch.zeros(stack.shape)
    lengths, sums = [[], []], [0.0, 0.0]
    for a, t in zip(actions, transitions, strict=True):
        frames = (obs[..., LENGTH] - obs[..., STEP]).clamp(max=3)
        seen |= set(frames.flatten().tolist())
        torch.testing.assert_close(t.rewards, frames * a[..., 0])
        assert torch.equal(t.next_obs[..., STEP], obs[..., STEP] + frames)
        ends = t.next_obs[..., STEP] == t.next_obs[..., LENGTH]
        assert torch.equal(ends, ends_of(t)) and (t.obs[ends][:, STEP] == 0).all()
        assert torch.equal(t.obs[~ends], t.next_obs[~ends])
        returns += t.rewards
        for s, n in ends.nonzero().tolist():
            lengths[s].append(float(t.next_obs[s, n, LENGTH]))
            sums[s] += float(returns[s, n])
        returns *= ~ends
        obs = t.obs
    assert seen == {1, 2, 3}
    assert stack.finished() == [
        Finished(len(each), pytest.approx(total / len(each), abs=1e-5),
                 pytest.approx(sum(each) / len(each)))
        for each, total in zip(lengths, sums, strict=True)]


@on("sync", "workers")
def test_frames_of_a_pendulum_are_a_plain_loops_and_the_time_limit_counts_them(make):
    held, plain = make(make.pendulum, action_repeat=3), make.shared(make.pendulum)
    assert held.spec.max_episode_steps == 67, "66 of three frames, one of two"
    assert torch.equal(held.reset(), plain.reset())
    for k in range(70):
        rewards = []
        for _ in range(2 if k == 66 else 3):
            t = plain.step(actions_at(held, k))
            rewards.append(t.rewards.double())
        ours = held.step(actions_at(held, k))
        assert torch.equal(ours.next_obs, t.next_obs) and torch.equal(ours.obs, t.obs)
        torch.testing.assert_close(ours.rewards.double(), sum(rewards))
        assert torch.equal(ours.truncations, t.truncations) and not ours.terminations.any()
        assert (ours.truncations == (k == 66)).all()
    assert held.finished() == plain.finished()


@on("sync", "groups")
@pytest.mark.parametrize("repeat", [1, 3])
def test_the_last_raw_reward_decides_whether_a_termination_counts_and_each_frames_is_clipped(
        make, repeat):
    """The bound lies above the clip, so a clipped reward would always be below it."""
    raw = make(make.diary, action_repeat=repeat)
    ours = make(make.diary, action_repeat=repeat, clip_reward=(-0.5, 0.25), failure_below=0.4)
    obs, actions, transitions = play(raw, 40)
    assert torch.equal(ours.reset(), obs)
    kinds = set()
    for a, t in zip(actions, transitions, strict=True):
        own, action = ours.step(a), a[..., 0]
        assert torch.equal(own.next_obs, t.next_obs) and torch.equal(own.obs, t.obs)
        frames = t.next_obs[..., STEP] - obs[..., STEP]
        torch.testing.assert_close(own.rewards, frames * action.clamp(-0.5, 0.25))
        assert torch.equal(own.terminations == 1, (t.terminations == 1) & (action < 0.4))
        assert torch.equal(ends_of(own), ends_of(t)), "and any other end is a truncation"
        assert not (own.terminations * own.truncations).any()
        kinds |= set(zip(t.terminations.flatten().tolist(), own.terminations.flatten().tolist(),
                         (action < 0.4).flatten().tolist(), strict=True))
        obs = t.obs
    assert kinds >= {(1, 1, True), (1, 0, False), (0, 0, True), (0, 0, False)}
    assert ours.finished() == raw.finished()


@on("sync")
def test_a_walker_that_falls_fails_and_one_that_arrives_does_not(make):
    """BipedalWalker sets the reward of a fall to -100; a finish terminates with the usual one."""
    def end(arrives, failure_below=-99):
        stack = make("BipedalWalker-v3", [0], 1, action_repeat=2, clip_reward=(-1, 10),
                     failure_below=failure_below)
        stack.reset()
        walker = stack.shard.envs[0].unwrapped
        for k in range(1000):
            if arrives and k == 3:
                for body in (walker.hull, *walker.legs):
                    body.position = (body.position[0] + 85, body.position[1])
            t = stack.step(torch.tensor([[[1.0, -1.0, 1.0, 1.0]]]))
            if ends_of(t):
                return t.rewards.item(), t.terminations.item(), t.truncations.item()

    reward, *flags = end(arrives=False)
    assert flags == [1, 0] and -3 < reward < -0.9
    assert end(arrives=True)[1:] == (0, 1) and end(True, failure_below=None)[1:] == (1, 0)


# Finished episodes


@everywhere
def test_finished_tells_of_each_seeds_episodes_since_the_last_call(make):
    stack = make.shared(make.ending)
    stack.reset()
    tally, counts = Tally(stack.shape), []
    for begin, end in ((0, 30), (30, 45), (45, 46), (46, 46)):
        for k in range(begin, end):
            tally.add(stack.step(actions_at(stack, k)))
        finished = stack.finished()
        assert finished == tally.finished()
        counts += [each.episodes for each in finished]
    assert min(counts[:4]) > 0 and counts[-2:] == [0, 0]
    assert stack.finished() == [Finished(0, 0.0, 0.0)] * 2


@everywhere
def test_a_reset_forgets_the_episodes_before(make):
    stack = make.shared(make.ending)
    play(stack, 33)
    stack.reset()
    assert stack.finished() == [Finished(0, 0.0, 0.0)] * 2
    tally = Tally(stack.shape)
    for t in play(stack, 30)[2]:
        tally.add(t)
    assert stack.finished() == tally.finished()


# Seeds


@everywhere
def test_consecutive_episodes_start_differently(make):
    stack = make.shared(make.ending)
    first, _, transitions = play(stack, 60)
    starts = [tuple(row) for row in first.flatten(0, 1).tolist()]
    for t in transitions:
        starts += [tuple(row) for row in t.obs[ends_of(t)].tolist()]
    assert len(starts) > 10 and len(set(starts)) == len(starts)


@everywhere
def test_a_reset_begins_anew(make):
    stack = make.shared(make.ending)
    first = trajectory(stack, 25)
    assert torch.equal(first, trajectory(stack, 25))
    assert torch.equal(first, trajectory(stack, 25, TRAINING))


@cheaply
def test_equal_seeds_give_equal_trajectories(make):
    assert torch.equal(trajectory(make.shared(make.ending), 40), trajectory(make(make.ending), 40))


@on("sync", "envpool")
def test_equal_seeds_give_equal_cheetahs(make):
    first, second = (trajectory(make("HalfCheetah-v5"), 30) for _ in range(2))
    assert torch.equal(first, second)


@cheaply
def test_a_seed_in_a_stack_sees_what_it_sees_alone(make):
    stack, alone = make.shared(make.ending), make(make.ending, [1])
    assert stack.spec.action_dim == 1
    whole, own = trajectory(stack, 40), trajectory(alone, 40, first_place=make.num_envs)
    assert torch.equal(whole[:, 1:], own)
    assert stack.finished()[1:] == alone.finished() and not torch.equal(whole[:, :1], own)


@everywhere
def test_seeds_places_and_streams_differ(make):
    stack = make.shared(make.pendulum)
    starts = [tuple(obs.tolist())
              for stream in [(TRAINING, 0), (TRAINING, 10), (EVALUATION, 0), (EVALUATION, 10)]
              for obs in stack.reset(*stream).flatten(0, 1)]
    assert len(set(starts)) == len(starts) == 4 * 2 * make.num_envs


@on_each(*((name, env_id) for name in PROCESSES for env_id in (DIARY, "Pendulum-v1")),
         ("groups", "HalfCheetah-v5"), ("groups", "BipedalWalker-v3"))
def test_workers_give_what_the_plain_loop_gives_to_the_bit(make, env_id):
    stack = make.shared(env_id)
    plain = make_envs(env_id, [0, 1], make.num_envs, backend="sync")
    steps = 30 if env_id == "HalfCheetah-v5" else 210
    for stream in [(), (TRAINING, 5)]:
        first, actions, transitions = play(plain, steps, *stream)
        assert torch.equal(stack.reset(*stream), first)
        for a, expected in zip(actions, transitions, strict=True):
            assert all(map(torch.equal, stack.step(a), expected))
        finished = plain.finished()
        assert stack.finished() == finished
        assert env_id == "HalfCheetah-v5" or sum(each.episodes for each in finished) > 1
    assert stack.spec == plain.spec
    plain.close()


# Faults


@on_each(*((name, "torch/Pendulum-v1" if name == "torch" else "Pendulum-v1") for name in SETTINGS),
         *((name, env_id) for name in ("sync", "workers", "envpool")
           for env_id in ("HalfCheetah-v5", "BipedalWalker-v3")),
         *(("torch", f"torch/{name}") for name in torch_tasks.ENVS if name != "Pendulum-v1"))
def test_a_broken_seed_does_not_break_its_simulator(make, env_id):
    """It acts with zeros, and its neighbour goes on as if nothing had happened; so does it itself
    after a reset."""
    stack = make.shared(env_id)

    def trajectory_with(action):
        obs = [stack.reset()]
        for k in range(10):
            actions = actions_at(stack, k)
            actions[0] = action
            obs.append(stack.step(actions).next_obs)
        return torch.stack(obs)

    calm, still = trajectory(stack, 10), trajectory_with(0.0)
    assert not torch.equal(calm[:, 0], still[:, 0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert torch.equal(trajectory_with(bad), still) and still.isfinite().all()
    assert torch.equal(still[:, 1], calm[:, 1])
    assert torch.equal(trajectory(stack, 10), calm)


@everywhere
def test_closing_twice_is_fine(make):
    stack = make(make.pendulum, [0], 1)
    stack.reset()
    stack.close()
    stack.close()


@on("sync", "workers")
def test_a_walkers_episode_does_not_depend_on_the_ones_before(make):
    """Without a new Box2D world at each reset, contacts leak from an episode into the next."""
    def two_episodes(stack):
        obs, generator, ends = [stack.reset()], torch.Generator().manual_seed(7), 0
        while ends < 2:
            t = stack.step(2 * torch.rand(1, 1, 4, generator=generator) - 1)
            obs.append(t.next_obs)
            ends += int(ends_of(t))
        return torch.stack(obs)

    stack = make("BipedalWalker-v3", [0], 1)
    assert torch.equal(two_episodes(stack), two_episodes(stack))


def test_mujoco_warns_through_python_and_leaves_no_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stack = make_envs("HalfCheetah-v5", [0])
    stack.reset()
    env = make_one("HalfCheetah-v5")
    env.reset(seed=0)
    with pytest.warns(RuntimeWarning, match="MuJoCo: Nan"):
        env.step([float("nan")] * 6)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("backend", ["sync", "workers"])
@pytest.mark.parametrize("env_id, words", [
    ("HalfChetah-v5", "unknown environment 'HalfChetah-v5'; did you mean HalfCheetah-v5"),
    ("halfcheetah-v5", "did you mean HalfCheetah-v5"),
    ("HalfCheetah-v9", "did you mean HalfCheetah-v5"),
    ("HalfCheetah", "has no version; use 'HalfCheetah-v5'"),
    ("nothing-like-it", "cannot make environment 'nothing-like-it'"),
    ("no_such_module:Pendulum-v1", "cannot make environment 'no_such_module:Pendulum-v1'"),
    ("tests.probe_envs:lab-tests/Tables-v0", "lab-tests/Tables-v0 has action space MultiDiscrete"),
    ("tests.probe_envs:lab-tests/WrongMask-v0",
     "action_mask has 5 numbers, but the actions have 3 choices"),
    ("tests.probe_envs:lab-tests/DictObservations-v0",
     "lab-tests/DictObservations-v0 has observation space Dict"),
    ("CarRacing-v3", "CarRacing-v3 has observation space Box"),
    ("tests.probe_envs:lab-tests/WideDictObservations-v0", "has observation space Dict"),
    ("a:b:c-v0", "cannot make environment 'a:b:c-v0'"),
    ("tests.probe_envs:lab-tests/Frozen-v0", "lab-tests/Frozen-v0: action 1 has bounds [2.0, 2.0]"),
])
def test_an_environment_that_cannot_work_is_named_in_one_line(backend, env_id, words):
    with pytest.raises(UserError) as caught:
        make_envs(env_id, [0], backend=backend)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("low, high, words", [
    ((-1, 2), (1, 2), "action 1 has bounds [2, 2]"), ((3,), (-3,), "action 0 has bounds [3, -3]"),
    ((0, math.nan), (1, 1), "action 1 has bounds [nan, 1]"),
    ((math.inf,), (math.inf,), "action 0 has bounds [inf, inf]")])
def test_action_bounds_without_room_are_refused(monkeypatch, low, high, words):
    class Own(torch_tasks.Pendulum):
        action_low, action_high = low, high

    monkeypatch.setitem(torch_tasks.ENVS, "Own-v0", Own)
    for make in (lambda: EnvSpec("torch/Own-v0", 3, len(low), low, high, None),
                 lambda: make_envs("torch/Own-v0", [0])):
        with pytest.raises(UserError) as caught:
            make()
        line = str(caught.value)
        assert f"torch/Own-v0: {words}" in line.replace(".0", "") and "\n" not in line


def test_a_bound_in_float64_is_met_exactly():
    """float32's nearest to 0.3 is above it: an environment may refuse it."""
    space = gymnasium.spaces.Box(-0.3, 0.3, (3,), np.float64)
    actions = np.array([[0.3, -0.3, 0.1], [0.5, math.nan, 0.2]], np.float32)
    exact = as_env_actions(actions, space)
    assert exact[0, 0] == 0.3 and exact[0, 1] == -0.3 and space.contains(exact[0])
    assert exact[1, 0] == 0.5 and math.isnan(exact[1, 1]), "what lies beyond them stays"


def test_infinite_action_bounds_are_the_agents_to_refuse():
    assert EnvSpec("own", 3, 1, (-math.inf,), (math.inf,), None).action_high == (math.inf,)


@on("sync", "workers", "groups")
@pytest.mark.parametrize("name, sizes, reward", [
    ("Choices", (3,), lambda a: a[..., 0] - 1), ("ManyChoices", (3, 4),
                                                 lambda a: 100 * a[..., 0] + a[..., 1] + 10)])
def test_discrete_actions_are_counted_from_0_and_reach_the_environment_as_it_counts(
        make, name, sizes, reward):
    """The environment checks that its action space has them. A resumed one continues its first
    episode (a later Diary knows its number); where some replay, nothing warns of the others."""
    env_id = f"tests.probe_envs:lab-tests/{name}-v0"
    stack, other = make(env_id), make(env_id)
    spec = stack.spec
    assert (spec.num_actions, spec.action_dim) == (sizes, len(sizes))
    assert spec.action_low == (0,) * len(sizes) and spec.action_high == tuple(n - 1 for n in sizes)
    shape, generator = stack.shape, torch.Generator().manual_seed(0)
    stack.reset()
    for step in range(7):
        actions = torch.stack([torch.randint(n, shape, generator=generator) for n in sizes], -1)
        t = stack.step(actions.float())
        assert torch.equal(t.rewards, reward(actions).float())
        if step in (0, 6):
            other.reset()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                obs, lost = other.load_state_dict(stack.state_dict())
            assert step or (lost == 0 and torch.equal(obs, t.obs))


@on("torch", "envpool")
def test_discrete_actions_of_the_other_backends_are_counted_from_0(make):
    stack = make("torch/CartPole-v1" if make.name == "torch" else "CartPole-v1")
    assert stack.spec.num_actions == (2,) and stack.spec.action_high == (1,)
    stack.reset()
    left, right = (stack.step(torch.full((2, 3, 1), a)).next_obs[..., 1] for a in (0.0, 1.0))
    assert (left < -0.1).all() and ((right - left) > 0.1).all()


@on_each(("envpool", "HalfChetah-v5"), ("envpool", "nothing-like-it"),
         ("torch", "torch/Pendulm-v1"), ("torch", "no_such_module:torch/Pendulum-v1"))
def test_the_other_backends_name_one_that_cannot_work_as_well(make, env_id):
    words = {"HalfChetah-v5": "envpool has no environment 'HalfChetah-v5'; similar: HalfCheetah-v5",
             "nothing-like-it": "envpool has no environment 'nothing-like-it'; similar: none",
             "torch/Pendulm-v1": "environment torch/Pendulm-v1; choose from torch/Pendulum-v1",
             "no_such_module:torch/Pendulum-v1": "cannot make environment 'no_such_module:"}[env_id]
    with pytest.raises(UserError) as caught:
        make(env_id, [0])
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("settings, words", [
    ({"backend": "asink"}, r"unknown backend 'asink'; choose from sync, workers, envpool, torch"),
    ({"backend": "sync", "groups": 2}, "--groups 2 needs --backend workers, not sync"),
    ({"groups": 2}, "--groups 2 needs --backend workers, not sync"),
    ({"backend": "envpool", "groups": 3}, "--groups 3 needs --backend workers, not envpool"),
    ({"backend": "torch", "groups": 2}, "--groups 2 needs --backend workers, not torch"),
])
def test_a_layout_that_cannot_work_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        make_envs("Pendulum-v1", [0], 4, **settings)


@pytest.mark.parametrize("backend", ["sync", "workers", "envpool"])
def test_an_environment_in_torch_is_for_the_torch_backend_alone(backend):
    with pytest.raises(UserError, match=f"written in torch: remove --backend {backend}$"):
        make_envs("torch/Pendulum-v1", [0], backend=backend)


def test_the_id_names_the_backend_unless_it_is_given():
    for env_id, backend, kind in (
            ("torch/Pendulum-v1", None, TorchEnvs), ("Pendulum-v1", None, SyncEnvs),
            ("Pendulum-v1", "torch", TorchEnvs)):
        stack = make_envs(env_id, [0], backend=backend)
        assert type(stack) is kind
        stack.close()


def test_a_missing_envpool_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(UserError, match="needs a package: pip install envpool"):
        make_envs("Pendulum-v1", [0], backend="envpool")


# Going on


ON_EACH = [("sync", "Pendulum-v1"), ("workers", "HalfCheetah-v5"), ("sync", "BipedalWalker-v3"),
           ("groups", "LunarLanderContinuous-v3"), ("torch", "torch/Pendulum-v1"),
           ("groups", "Pendulum-v1")]


RULES = {"action_repeat": 3, "clip_reward": (-1.0, 1.0), "failure_below": -99.0}


@on_each(*ON_EACH)
@pytest.mark.parametrize("before", [0, 130, 400])
def test_a_stack_goes_on_where_another_was(make, env_id, before):
    """400 is the end of an episode in Pendulum-v1; walkers and landers have fallen before."""
    goes_on(make, env_id, before)


@on_each(("sync", "BipedalWalker-v3"), ("groups", "Pendulum-v1"))
def test_a_stack_of_repeated_actions_goes_on_as_well(make, env_id):
    """In the middle of an episode of Pendulum-v1, whose episodes take 67 actions."""
    goes_on(make, env_id, 150, **RULES)


@on("sync")
def test_a_stack_whose_rewards_are_clipped_goes_on_from_an_older_state_with_raw_ones(make):
    raw, clipped = (make("Pendulum-v1", clip_reward=bounds) for bounds in (None, (-0.5, 0.0)))
    for stack in (raw, clipped):
        t = play(stack, 30)[2][-1]
    assert clipped.load_state_dict(raw.state_dict(), 9)[1] == 0
    assert torch.equal(clipped.transition().obs, t.obs)


def goes_on(make, env_id, before, **rules):
    whole, other = (make(env_id, [3, 4], 2, **rules) for _ in range(2))
    latest, _ = whole.reset(), other.reset(7)  # what the other did before does not matter
    low, high = torch.tensor([whole.spec.action_low, whole.spec.action_high])
    generator = torch.Generator().manual_seed(0)
    actions = low + (high - low) * torch.rand(before + 120, 2, 2, len(low), generator=generator)
    for each in actions[:before]:
        latest = whole.step(each).obs
    state = whole.state_dict()
    going_on = [whole.step(each) for each in actions[before:]], whole.finished()
    obs, lost = other.load_state_dict(state, 9)
    assert lost == 0 and torch.equal(obs, latest)
    again = [other.step(each) for each in actions[before:]], other.finished()
    for ours, theirs in zip(going_on[0], again[0], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
    assert going_on[1] == again[1]
    if env_id != "HalfCheetah-v5" and make.name != "torch" and before in (150, 400):
        assert whole.can_restore_exactly() is True


@diaries
def test_episodes_that_do_not_come_out_the_same_begin_anew(make):
    """A Diary counts its episodes, which nobody can put back."""
    whole, other = (make(make.diary) for _ in range(2))
    whole.reset()
    assert whole.can_restore_exactly() is (True if make.name == "torch" else None)
    actions = torch.ones(*whole.shape, 1)
    for _ in range(12):  # it takes two episodes or more
        t = whole.step(actions)
    state = whole.state_dict()
    other.reset()
    obs, lost = other.load_state_dict(state, 9)
    if make.name == "torch":
        assert lost == 0 and torch.equal(obs, t.obs)
        return
    assert whole.can_restore_exactly() is False and lost == len(obs.view(-1, 4))
    assert torch.equal(obs, other.reset(9)) and not torch.equal(obs, other.reset())


@on("sync", "groups")
def test_an_episode_that_begins_anew_leaves_the_others_as_they_were(make):
    """They go on, and can be put back once more."""
    stacks = [make("Pendulum-v1", [3, 4], 2) for _ in range(3)]
    for stack in stacks:
        stack.reset()
    actions = torch.linspace(-2, 2, 4).view(2, 2, 1)
    for _ in range(250):
        stacks[0].step(actions)
    state = stacks[0].state_dict()
    lost = stacks[0].order[1]  # the row of seed 3's environment 1
    state["origins"][lost] = 0
    for stack, (begun, number) in zip(stacks[1:], ((state, 1), (None, 0)), strict=True):
        _, anew = stack.load_state_dict(begun or stacks[1].state_dict(), 9)
        assert anew == number
    for _ in range(3):
        transitions = [stack.step(actions).next_obs for stack in stacks]
        assert torch.equal(transitions[1], transitions[2])
        same = (transitions[0] == transitions[1]).all(-1)
        assert same.tolist() == [[True, False], [True, True]]


@on("sync", "groups")
def test_the_actions_kept_for_a_resume_have_a_bound_in_bytes(make, monkeypatch):
    """An episode that outlasts them begins anew; one that does not goes on."""
    monkeypatch.setattr(host, "HISTORY_BYTES", 100 * 4 * 4)  # 100 steps of 4 environments
    whole, other = (make("Pendulum-v1", [3, 4], 2) for _ in range(2))
    whole.reset()
    before = 0
    for steps, lost, exact in ((100, 0, None), (101, 4, False), (230, 0, True)):  # 200 end one
        for _ in range(steps - before):
            whole.step(torch.zeros(2, 2, 1))
        state, before = whole.state_dict(), steps
        assert state["actions"].nbytes <= host.HISTORY_BYTES
        assert whole.can_restore_exactly() is exact
        obs, anew = other.load_state_dict(state, 9)
        assert anew == lost and (not lost or torch.equal(obs, other.reset(9)))


def test_an_envpool_begins_anew_and_says_so():
    pytest.importorskip("envpool")
    pools = [make_envs("Pendulum-v1", [0, 1], 2, "envpool") for _ in range(2)]
    pools[0].reset()
    for _ in range(250):
        pools[0].step(torch.zeros(2, 2, 1))
    obs, lost = pools[1].load_state_dict(pools[0].state_dict(), 9)
    assert lost == 4 and torch.equal(obs, pools[0].reset(9))
    assert pools[0].can_restore_exactly() is False
    assert [each.episodes for each in pools[1].finished()] == [2, 2]
    for pool in pools:
        pool.close()

