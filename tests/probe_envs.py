"""Environments for the tests: one with a known optimum, some whose observations hold the episode
and the step, some that fail, and some that the lab rejects. Does not import torch, so workers stay
small."""

import multiprocessing
import os
import signal
import sys
import time

import gymnasium
import numpy as np

from lab.envs.probes import Discretised, Target


class Diary(gymnasium.Env):
    """Observes (episode, step, the episode's length, a random start); the reward is the action.

    Episodes last 2 to 5 steps and end in turn by termination, by truncation and by both at once.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-100.0, 100.0, (1,), np.float32)
    episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.steps = (0 if seed is not None else self.episode + 1), 0
        self.length, self.start = int(self.np_random.integers(2, 6)), self.np_random.uniform()
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        end, kind = self.steps == self.length, self.episode % 3
        return self._observe(), float(action[0]), end and kind != 1, end and kind != 0, {}

    def _observe(self):
        return np.array([self.episode, self.steps, self.length, self.start], np.float32)


# Actions of a Faulty step
KILLED, RAISES, EXITS, SLEEPS = -1.0, -2.0, -3.0, -4.0


class Faulty(Diary):
    """Some actions break the process that steps it: for workers only."""

    def step(self, action):
        if action[0] == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        elif action[0] == RAISES:
            raise ZeroDivisionError("the motor\n  burns")
        elif action[0] == EXITS:
            sys.exit(3)
        elif action[0] == SLEEPS:
            time.sleep(600)
        return super().step(action)


class OnlyInTheMainProcess(Diary):
    def __init__(self):
        if multiprocessing.parent_process() is not None:
            raise RuntimeError("no licence\n  here")


class DictObservations(Diary):
    observation_space = gymnasium.spaces.Dict({"position": Diary.observation_space})


class WideDictObservations(Diary):
    """The representation of its space takes more than one line."""

    observation_space = gymnasium.spaces.Dict({"position": gymnasium.spaces.Box(
        np.zeros(40, np.float32), np.arange(1, 41, dtype=np.float32))})


class Unbounded(Diary):
    action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)


class Frozen(Diary):
    """Its second action cannot be chosen."""

    action_space = gymnasium.spaces.Box(np.float32([-1, 2]), np.float32([1, 2]))


class Painted(Diary):
    """Its colour is its start, the step and the episode's length."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.full((10, 20, 3), self.colour(), np.uint8)

    def colour(self):
        return int(255 * self.start), 40 * self.steps, 40 * self.length


class Crashing(Painted):
    """As a GL that does not work may."""

    def render(self):
        os.kill(os.getpid(), signal.SIGKILL)


class NeedsSecondGL(Painted):
    """As where the first GL that is tried does not work."""

    def render(self):
        if os.environ["MUJOCO_GL"] == "egl":
            raise RuntimeError("no EGL device")
        return super().render()


class Ragged(Painted):
    def render(self):
        return [1, 2]


class Choices(Painted):
    """Painted with discrete actions that do not begin at 0; the reward is the action."""

    action_space = gymnasium.spaces.Discrete(3, start=-1)

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step([action])


class ManyChoices(Diary):
    """The reward names both actions."""

    action_space = gymnasium.spaces.MultiDiscrete([3, 4], start=[0, 10])

    def step(self, action):
        assert self.action_space.contains(action), action
        return super().step([100 * action[0] + action[1]])


class Masked(gymnasium.Env):
    """Two actions, of 2 and 3 choices; at each step some are forbidden, and may not be chosen."""

    observation_space = gymnasium.spaces.Dict({
        "action_mask": gymnasium.spaces.MultiBinary(5),
        "before": gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)})
    action_space = gymnasium.spaces.MultiDiscrete([2, 3])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        assert self.mask[action[0]] and self.mask[2 + action[1]], (action, self.mask)
        self.steps += 1
        return self._observe(), float(action[1] == 2), False, self.steps == 10, {}

    def _observe(self):
        self.mask = np.ones(5, np.int8)
        self.mask[[self.np_random.integers(2), 2 + self.np_random.integers(3)]] = 0
        return {"action_mask": self.mask, "before": np.zeros(2, np.float32)}


class DiscreteTarget(Discretised):
    def __init__(self):
        super().__init__(Target(), [5, 9])


class FlatMasked(gymnasium.wrappers.FlattenObservation):
    def __init__(self):
        super().__init__(Masked())


class WrongMask(gymnasium.wrappers.FlattenObservation):
    def __init__(self):
        env = Masked()
        env.action_space = gymnasium.spaces.Discrete(3)
        super().__init__(env)


class Tables(Diary):
    action_space = gymnasium.spaces.MultiDiscrete([[2, 2], [2, 2]])


class Courses(gymnasium.Env):
    """Of three courses, one ends in a fall, one at its goal and one at the time limit, unless that
    comes first. The info says which was a success."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-0.5, 2.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.kind = 0, int(self.np_random.integers(3))
        self.length, self.start = int(self.np_random.integers(3, 8)), self.np_random.uniform()
        return self._observe(), {}

    def step(self, action):
        self.steps += 1
        end = self.steps == self.length and self.kind != 2
        fall = end and self.kind == 0
        reward = -10.0 if fall else float(action[0]) + self.start
        return self._observe(), reward, end, False, {"is_success": end and not fall}

    def _observe(self):
        return np.array([self.steps, self.kind, self.start], np.float32)


for name, limit in (("Courses", 9), ("LongCourses", 15)):
    if f"lab-tests/{name}-v0" not in gymnasium.registry:
        gymnasium.register(f"lab-tests/{name}-v0", Courses, max_episode_steps=limit)
for kind in (Target, Diary, Faulty, OnlyInTheMainProcess, DictObservations, WideDictObservations,
             Unbounded, Frozen, Painted, Crashing, NeedsSecondGL, Ragged, Choices, ManyChoices,
             DiscreteTarget, FlatMasked, WrongMask, Tables):
    if f"lab-tests/{kind.__name__}-v0" not in gymnasium.registry:
        gymnasium.register(f"lab-tests/{kind.__name__}-v0", kind)
