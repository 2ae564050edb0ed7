"""Environments as people have them, for test_field.py. Does not import torch."""

import multiprocessing
import os
import random
import tempfile
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.wrappers import NormalizeObservation, NormalizeReward, RescaleAction


class Point(gymnasium.Env):
    """Push a point to the origin: observation (x, v), action a force in [-1, 1]."""

    observation_space = Box(-np.inf, np.inf, (2,), np.float32)
    action_space = Box(-1.0, 1.0, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 25}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.v, self.t = self.start(), 0.0, 0
        return self.obs(), {}

    def start(self):
        return self.np_random.uniform(-1, 1)

    def obs(self):
        return np.array([self.x, self.v], np.float32)

    def reward(self):
        return -self.x * self.x

    def ends(self):
        return False, False

    def step(self, action):
        self.t += 1
        self.v = 0.9 * self.v + 0.1 * float(action[0])
        self.x = float(np.clip(self.x + 0.1 * self.v, -3, 3))
        return self.obs(), self.reward(), *self.ends(), {}


def environment(limit=100):
    """Register the class or function under its name."""
    def add(entry):
        env_id = f"field/{entry.__name__}-v0"
        if env_id not in gymnasium.registry:
            gymnasium.register(env_id, entry, max_episode_steps=limit)
        return entry

    return add


environment()(Point)


@environment(limit=None)
class Endless(Point):
    """No limit."""


# What reset and step return


@environment()
class ResetObsOnly(Point):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


@environment()
class OldReset(Point):
    def reset(self):
        return super().reset()


@environment()
class ShortObs(Point):
    def obs(self):
        return np.array([self.x], np.float32)


@environment()
class TextObs(Point):
    def obs(self):
        return ["far", "near"]


@environment()
class NanObs(Point):
    def obs(self):
        return np.array([self.x, np.nan], np.float32)


@environment()
class RewardArray(Point):
    def reward(self):
        return np.array([1.0])


@environment()
class RewardNone(Point):
    def reward(self):
        return None


@environment()
class RewardInf(Point):
    def reward(self):
        return np.inf


@environment()
class EndArray(Point):
    def ends(self):
        return np.array([False]), False


@environment()
class EndNone(Point):
    def ends(self):
        return False, None


@environment()
class FourValues(Point):
    def step(self, action):
        return super().step(action)[:4]


@environment()
class Lists(Point):
    """Unusual, but as the interface says."""

    def obs(self):
        return [self.x, self.v]

    def reward(self):
        return np.array(1.0)

    def ends(self):
        return np.bool_(False), 0


class Late(Point):
    """From step 20 on it returns something else."""

    def late(self):
        return self.t >= 20


@environment()
class LateShortObs(Late):
    def obs(self):
        return super().obs()[: 1 if self.late() else 2]


@environment()
class LateRewardArray(Late):
    def reward(self):
        return np.array([1.0]) if self.late() else 1.0


@environment()
class LateRewardText(Late):
    def reward(self):
        return "1.0" if self.late() else 1.0


@environment()
class LateEndsArrays(Late):
    def reward(self):
        return np.array([1.0]) if self.late() else 1.0

    def ends(self):
        return (np.array([False]),) * 2 if self.late() else (False, False)


class Second(Late):
    """Of the seeds 0 and 1, only the environment of seed 1 breaks (its first start is known)."""

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.number = seed
        return super().reset(seed=seed)

    def late(self):
        from lab.envs.shard import seed_of

        return super().late() and self.number in (seed_of(1, (0, 0), 0), seed_of(1, (0,), 0))


@environment()
class LateNan(Second):
    def obs(self):
        return np.array([self.x, np.nan if self.late() else self.v], np.float32)


@environment()
class LateInf(Second):
    def reward(self):
        return 1e39 if self.late() else 1.0


# Seeds


@environment()
class GlobalNumpy(Point):
    def start(self):
        return np.random.uniform(-1, 1)


@environment()
class GlobalPython(Point):
    def start(self):
        return random.uniform(-1, 1)


@environment()
class GlobalBoth(Point):
    def start(self):
        return np.random.uniform(-1, 1) + random.uniform(-1, 1)


@environment()
class Unseeded(Point):
    def start(self):
        return np.random.default_rng().uniform(-1, 1)


@environment()
class FreshSeeds(Point):
    """As panda-gym: only the first episode depends on the seed."""

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=int.from_bytes(os.urandom(4)) if seed is None else seed)


@environment()
class NoisySteps(Point):
    def obs(self):
        noise = np.random.default_rng().uniform() if self.t > 2 else 0
        return super().obs() + np.float32(noise)


@environment()
class Refuses(Unseeded):
    """Does not repeat, and raises at an action that was taken elsewhere."""

    taken = {}  # action -> where

    def step(self, action):
        if self.taken.setdefault(float(action[0]), self.x) != self.x:
            raise ValueError("illegal action")
        return super().step(action)


@environment()
class RandomState(Point):
    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.np_random = np.random.RandomState(seed)
        self.x, self.v, self.t = self.np_random.uniform(-1, 1), 0.0, 0
        return self.obs(), {}


@environment()
class NoRandom(Point):
    np_random = None

    def reset(self, *, seed=None, options=None):
        self.x, self.v, self.t = 0.5, 0.0, 0
        return self.obs(), {}


# Spaces and wrappers


@environment()
class Integers(Point):
    action_space = Box(-2, 2, (1,), np.int64)


@environment()
class LargestBounds(Point):
    action_space = Box(np.float32([0]), np.finfo(np.float32).max, dtype=np.float32)


@environment()
class NoRoom(Point):
    action_space = Box(np.array([1.0]), np.array([1.0 + 1e-12]), dtype=np.float64)


@environment()
def Norm(**settings):
    return NormalizeObservation(Point(**settings))


@environment()
def NormReward(**settings):
    return RescaleAction(NormalizeReward(Point(**settings)), -2.0, 2.0)


@environment()
def NormFrozen(**settings):
    env = NormalizeObservation(Point(**settings))
    env.update_running_mean = False
    return env


@environment(limit=50)
def Looks(**settings):
    env = gymnasium.make("field/Point-v0", **settings)
    assert env.spec.max_episode_steps == 100  # gymnasium keeps the spec from here on
    return RescaleAction(env, -2.0, 2.0)


@environment(limit=None)
def Inner(**settings):
    return RescaleAction(gymnasium.make("field/Point-v0", **settings), -2.0, 2.0)


# Code that raises


@environment()
class Init(Point):
    def __init__(self, render_mode=None):
        raise RuntimeError("no simulator is running")


@environment()
class NeedsPackage(Point):
    def __init__(self, render_mode=None):
        import a_simulator_that_is_not_installed  # noqa: F401


@environment()
class BadSetting(Point):
    def __init__(self, render_mode=None):
        raise ValueError("robot 'ur5' has no gripper 'x'")


@environment()
class Argument(Point):
    def __init__(self, size, render_mode=None):
        pass


@environment()
class Step(Point):
    def step(self, action):
        raise KeyError("gripper")


@environment()
class Close(Point):
    def close(self):
        raise RuntimeError("the simulator is gone")


@environment()
class ClosesOnce(Point):
    def close(self):
        if hasattr(self, "closed"):
            raise RuntimeError("not connected")
        self.closed = True


class Masked(Point):
    observation_space = gymnasium.spaces.Dict(
        {"action_mask": gymnasium.spaces.MultiBinary(2), "x": Point.observation_space})
    action_space = gymnasium.spaces.Discrete(2)


@environment()
class OnlyOne(Point):
    running = []

    def __init__(self, render_mode=None):
        if self.running:
            raise ValueError("port 2000 is in use")
        self.running.append(self)

    def close(self):
        self.running.clear()


if "field/OnlyVectors-v0" not in gymnasium.registry:
    gymnasium.register("field/OnlyVectors-v0", entry_point=None, vector_entry_point="none:None")


# Processes and directories


@environment()
class Spawns(Point):
    def __init__(self, render_mode=None):
        self.child = multiprocessing.get_context("fork").Process(target=os.getpid)
        self.child.start()

    def close(self):
        self.child.join()


@environment()
class Chdir(Point):
    """Its own files lie elsewhere, and it finds them after a reset."""

    def __init__(self, render_mode=None):
        self.folder = tempfile.mkdtemp()
        os.chdir(self.folder)

    def reset(self, *, seed=None, options=None):
        os.chdir(self.folder)
        return super().reset(seed=seed)

    def close(self):
        Path(self.folder).rmdir()


# Pictures


class Picture(Point):
    def render(self):
        return self.picture


@environment()
class Floats(Picture):
    picture = np.full((8, 8, 3), 0.8)


@environment()
class Grey(Picture):
    picture = np.full((8, 8), 204, np.uint8)


@environment()
class Rgba(Picture):
    picture = np.full((8, 8, 4), 204, np.int64)


@environment()
class NoPicture(Picture):
    picture = np.zeros((2, 8, 8, 3))


@environment()
class Talks(Point):
    metadata = {"render_modes": []}

    def __init__(self, render_mode=None):
        print("simulator 3.1, licence: academic", flush=True)
        os.write(1, b"as C code prints\n")
