"""Environments behind one batch interface: S seeds x N environments, arrays of shape (S, N, ...).

    envs = make("HalfCheetah-v5", seeds=[0, 1, 2], num_envs=1)
    obs = envs.reset()
    transition = envs.step(actions)  # or envs.send(actions), something else, envs.receive()
"""

import difflib
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch

TRAINING, EVALUATION = 0, 1  # streams of environment randomness that never meet


class UserError(ValueError):
    """What the user gave cannot work. The message is one line: what is wrong and what to do."""


@dataclass(frozen=True)
class EnvSpec:
    """What an agent may know of its environment. Bounds have shape (A,), environment units."""

    id: str
    obs_dim: int
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_episode_steps: int | None


class Episode(NamedTuple):
    """A finished episode of environment `env` (0 to S N - 1), which seed number `seed` (0 to S - 1)
    owns: undiscounted return, steps."""

    env: int
    seed: int
    episode_return: float
    length: int


class Transition(NamedTuple):
    """One step of every environment. next_obs succeeds the action; obs is what to act on next:
    the same, or the first observation of a new episode where one has ended."""

    next_obs: torch.Tensor  # (S, N, O) float32
    rewards: torch.Tensor  # (S, N) float32
    terminations: torch.Tensor  # (S, N) float32, 1 where the task ended
    truncations: torch.Tensor  # (S, N) float32, 1 where the time ran out and the task had not ended
    obs: torch.Tensor  # (S, N, O) float32
    episodes: list[Episode]


def make(env_id: str, seeds: Sequence[int], num_envs: int = 1, backend: str = "sync",
         device: str = "cpu", clip_reward: tuple[float, float] | None = None) -> "SyncEnvs":
    """S x N environments. UserError on an id, a space or a backend that the lab cannot use.

    clip_reward (low, high) bounds the rewards of the transitions; the returns of episodes stay raw.
    """
    if backend not in BACKENDS:
        raise UserError(f"no backend {backend!r}; there are {', '.join(BACKENDS)}")
    return BACKENDS[backend](env_id, seeds, num_envs, device, clip_reward)


def make_one(env_id: str) -> gymnasium.Env:
    """One gymnasium environment, or a UserError that names similar ids."""
    try:
        hear_mujoco()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date")  # v4 on purpose
            warnings.filterwarnings("ignore", message=".*latest versioned environment")
            env = gymnasium.make(env_id, disable_env_checker=True)
    except (gymnasium.error.Error, ImportError, ValueError) as error:
        ids = list(gymnasium.registry)
        by_lower = {name.lower(): name for name in ids}
        near = difflib.get_close_matches(env_id.lower(), list(by_lower), n=3, cutoff=0.6)
        if env_id in ids or not near:
            reason = " ".join(str(error).split())
            raise UserError(f"cannot make environment {env_id!r}: {reason}") from error
        names = ", ".join(by_lower[name] for name in near)
        raise UserError(f"unknown environment {env_id!r}; did you mean {names}?") from error
    if env.spec and env.spec.id != env_id.split(":")[-1]:
        raise UserError(f"environment {env_id!r} names no version; say {env.spec.id!r}")
    return env


@functools.cache
def hear_mujoco() -> None:
    """MuJoCo prints its warnings and leaves a MUJOCO_LOG.TXT where one stands: make them Python's,
    but for one about an attribute in gymnasium's own models, which comes with every environment."""
    try:
        import mujoco
    except ImportError:
        return

    def warn(message: str) -> None:
        if "settotalmass" not in message:
            warnings.warn(f"MuJoCo: {message.strip()}", RuntimeWarning, stacklevel=2)

    mujoco.set_mju_user_warning(warn)


def spec_of(env: gymnasium.Env, env_id: str) -> EnvSpec:
    """UserError unless observations and actions are flat boxes."""
    obs_space, action_space = env.observation_space, env.action_space
    if not isinstance(action_space, gymnasium.spaces.Box) or len(action_space.shape) != 1:
        space = " ".join(str(action_space).split())
        raise UserError(f"{env_id} has actions {space}; the lab is for continuous control "
                        "and needs a one-dimensional Box")
    if not isinstance(obs_space, gymnasium.spaces.Box) or len(obs_space.shape) != 1:
        space = " ".join(str(obs_space).split())
        raise UserError(f"{env_id} has observations {space}; the lab needs a one-dimensional "
                        "Box: register it with gymnasium's FlattenObservation")
    limit = env.spec.max_episode_steps if env.spec else None
    low, high = (tuple(float(x) for x in bound) for bound in (action_space.low, action_space.high))
    return EnvSpec(env_id, obs_space.shape[0], action_space.shape[0], low, high, limit)


def renew_box2d_world(env: gymnasium.Env) -> None:
    """BipedalWalker keeps one b2World, whose contact caches leak from an episode into the next
    (gymnasium issue 728): with a new world an episode depends on the random state alone."""
    walker: Any = env.unwrapped
    if type(walker).__module__ == "gymnasium.envs.box2d.bipedal_walker":
        from Box2D import b2World

        walker._destroy()
        walker.world = b2World()


class SyncEnvs:
    """The plain loop over gymnasium environments, in this process."""

    def __init__(self, env_id: str, seeds: Sequence[int], num_envs: int, device: str,
                 clip_reward: tuple[float, float] | None):
        self.shape, self.device = (len(seeds), num_envs), torch.device(device)
        self.seeds, self.clip_reward = seeds, clip_reward
        self.envs = [make_one(env_id) for _ in range(len(seeds) * num_envs)]
        self.spec = spec_of(self.envs[0], env_id)
        self.action_dtype = self.envs[0].action_space.dtype
        self.returns, self.lengths = [0.0] * len(self.envs), [0] * len(self.envs)

    def reset(self, *stream: int) -> torch.Tensor:
        """-> obs (S, N, O). The one seeded reset: later episodes go on in the random stream that
        the seed, the stream's numbers and the environment's place in 0..N-1 name."""
        obs = self._empty()
        for i, env in enumerate(self.envs):
            seed, n = self.seeds[i // self.shape[1]], i % self.shape[1]
            entropy = np.random.SeedSequence([seed, *(stream or (TRAINING,)), n])
            obs[i] = self._begin(i, env, int(entropy.generate_state(1)[0]))
        return self._batch(obs)

    def step(self, actions: torch.Tensor) -> Transition:
        self.send(actions)
        return self.receive()

    def send(self, actions: torch.Tensor) -> None:
        """actions (S, N, A) in environment units."""
        flat = actions.cpu().numpy().reshape(len(self.envs), -1).astype(self.action_dtype)
        # a broken seed must not break a simulator's process
        self.actions = np.where(np.isfinite(flat), flat, 0)

    def receive(self) -> Transition:
        next_obs, flags, episodes = self._empty(), np.zeros((3, len(self.envs)), np.float32), []
        fresh = {}
        for i, env in enumerate(self.envs):
            next_obs[i], reward, terminated, truncated, _ = env.step(self.actions[i])
            flags[:, i] = reward, terminated, truncated and not terminated
            self.returns[i] += float(reward)
            self.lengths[i] += 1
            if terminated or truncated:
                episodes.append(Episode(i, i // self.shape[1], self.returns[i], self.lengths[i]))
                fresh[i] = self._begin(i, env)
        if self.clip_reward:
            flags[0] = flags[0].clip(*self.clip_reward)
        obs = next_obs
        if fresh:
            obs = next_obs.copy()
            obs[list(fresh)] = list(fresh.values())
        rewards, terminations, truncations = map(self._batch, flags)
        return Transition(self._batch(next_obs), rewards, terminations, truncations,
                          self._batch(obs), episodes)

    def close(self) -> None:
        for env in self.envs:
            env.close()

    def _begin(self, i: int, env: gymnasium.Env, seed: int | None = None) -> np.ndarray:
        renew_box2d_world(env)
        self.returns[i], self.lengths[i] = 0.0, 0
        return env.reset(seed=seed)[0]

    def _empty(self) -> np.ndarray:
        return np.empty((len(self.envs), self.spec.obs_dim), np.float32)

    def _batch(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).view(*self.shape, *x.shape[1:]).to(self.device)


BACKENDS = {"sync": SyncEnvs}
