"""Gymnasium environments stepped through arrays, in the main process or in a worker. No torch:
workers that do not import it start fast and stay small."""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from lab.envs.check import check_reset, check_step
from lab.envs.generators import seed_generators
from lab.envs.spec import as_env_actions, make_one, renew_box2d_world

# independent random streams of the environments; FRESH is that of lab.evaluate
TRAINING, EVALUATION, FRESH = 0, 1, 2
# first byte of a command; any other byte is the number of a group to step
RESET, RESTORE_START, REPLAY_ACTIONS = 255, 254, 253


class StepRules(NamedTuple):
    """How a step of an agent is made of frames, the steps of the environment. The returns and
    lengths of episodes stay those of the environment."""

    action_repeat: int  # frames for which an action is repeated, fewer at an episode's end
    clip_reward: tuple[float, float] | None  # bounds of each frame's reward, before the sum
    failure_below: float | None  # a termination with a last reward of this or more is a truncation


class EnvShard:
    """Some gymnasium environments and the arrays that they read and write, one row each.

    env_keys: (seed, n) of each environment, the n-th of that seed; they select its random stream.
    Reads actions (rows, A). Writes rows (rows, 2 O + 3): next_obs, obs, reward, termination,
    truncation; returns (rows, 2): raw undiscounted return and frames of an episode when it ends;
    origins (rows, 7): how the running episode started (`origin`).
    """

    def __init__(self, env_id: str, env_keys: Sequence[tuple[int, int]], actions: np.ndarray,
                 rows: np.ndarray, returns: np.ndarray, origins: np.ndarray,
                 *, rules: StepRules, make: Callable[[str], gymnasium.Env] = make_one):
        self.env_id, self.env_keys, self.actions = env_id, env_keys, actions
        self.rows, self.returns, self.origins, self.rules = rows, returns, origins, rules
        self.envs = [make(env_id) for _ in env_keys]
        self.obs_dim = (rows.shape[1] - 3) // 2
        self.action_space = self.envs[0].action_space if self.envs else None
        self.running = [[0.0, 0] for _ in env_keys]  # return and frames of the running episode
        self.stream = TRAINING
        self.repeats = True  # False once an environment refused an action that it took before

    def reset(self, stream: Sequence[int]) -> None:
        """Reset all environments, seeded with seed, stream and n; writes obs. Later resets are not
        seeded and continue the environment's random stream. Rewards of EVALUATION are raw."""
        self.stream = stream[0]
        if self.env_keys:
            seed_generators([self.env_keys[0][0], *stream, self.env_keys[0][1]])
        for i, (seed, n) in enumerate(self.env_keys):
            self._begin(i, seed_of(seed, stream, n))

    def step(self, indices: Sequence[int] | None = None) -> None:
        """Step these environments; None: all. UserError if one returns something unexpected."""
        which: Any = range(len(self.envs)) if indices is None else indices
        if not len(which) or self.action_space is None:
            return
        O, actions = self.obs_dim, as_env_actions(self.actions, self.action_space)
        outcomes = [self._act(i, actions[i]) for i in which]
        try:
            ends = np.array(outcomes)
            if ends.ndim != 2 or ends.dtype.char == "O":  # a None would become NaN
                raise TypeError(f"{self.env_id}: step returned {outcomes}")
        except (TypeError, ValueError):
            for i, outcome in zip(which, outcomes, strict=True):
                self._check((self.rows[i, :O], *outcome, {}))
            raise
        rows = slice(None) if indices is None else indices
        self.rows[rows, O : 2 * O] = self.rows[rows, :O]
        self.rows[rows, 2 * O :] = ends
        for i, (_, terminated, truncated) in zip(which, outcomes, strict=True):
            if terminated or truncated:
                self._begin(i)

    def _act(self, i: int, action: Any) -> tuple[Any, bool, bool]:
        """Step one environment for the frames of an action; writes its next_obs, and its return and
        length if the episode ends -> reward, terminated, truncated."""
        env, running, (repeat, clip, failure_below) = self.envs[i], self.running[i], self.rules
        if self.stream == EVALUATION:
            clip = None
        rewards: list[Any] = []
        result: Any = None
        try:
            for _ in range(repeat):
                result = env.step(action)
                obs, reward, terminated, truncated, _ = result
                running[0] += float(reward)
                running[1] += 1
                rewards.append(min(max(reward, clip[0]), clip[1]) if clip else reward)
                if terminated or truncated:
                    self.returns[i] = running
                    break
            if len(obs) != self.obs_dim:  # numpy would spread a shorter one
                self._check(result)
            self.rows[i, : self.obs_dim] = obs
            if terminated and failure_below is not None:
                terminated, truncated = reward < failure_below, True
            return sum(rewards[1:], rewards[0]), terminated, truncated and not terminated
        except (TypeError, ValueError):
            if result is not None:
                self._check(result)
            raise

    def _check(self, result: Any) -> None:
        check_step(self.env_id, self.obs_dim, result, finite=False)

    def restore_start(self) -> None:
        """Restart the selected environments (action not NaN) from their origins."""
        selected = self._selected()
        if selected:
            seed_generators(self.origins[selected[0]].tolist())
        for i in selected:
            self._begin(i, recall(self.envs[i], self.origins[i].tolist()))

    def replay_actions(self) -> None:
        """Step the selected environments (action not NaN). If one raises, its rows and those beside
        it become NaN, which no saved row equals, and are not stepped any more."""
        try:
            if self.repeats:
                self.step(self._selected())
        except Exception:
            self.repeats = False
            self.rows[:] = np.nan

    def _selected(self) -> list[int]:
        return np.flatnonzero(~np.isnan(self.actions[:, 0])).tolist()

    def _begin(self, i: int, seed: int | None = None) -> None:
        env = self.envs[i]
        renew_box2d_world(env)
        self.running[i], self.origins[i] = [0.0, 0], origin(env, seed)
        result = env.reset(seed=seed)
        if type(result) is not tuple or getattr(result[0], "shape", None) != (self.obs_dim,):
            check_reset(self.env_id, self.obs_dim, result, finite=False)
        self.rows[i, self.obs_dim : 2 * self.obs_dim] = result[0]

    def close(self) -> None:
        envs, self.envs = self.envs, []
        for env in envs:
            env.close()


def make_shards(env_id: str, groups: Sequence[tuple[Sequence[tuple[int, int]], int]],
                arrays: Sequence[np.ndarray], env_kwargs: Sequence[str], rules: StepRules
                ) -> list[EnvShard]:
    """One shard per group, from its (seed, n) keys and the first of their rows in the arrays."""
    make = functools.partial(make_one, env_kwargs=env_kwargs)
    return [EnvShard(env_id, env_keys, *(x[start : start + len(env_keys)] for x in arrays),
                     make=make, rules=rules)
            for env_keys, start in groups]


def handle_command(shard: EnvShard, command: bytes) -> None:
    """Run a command that applies to every group."""
    if command[0] == RESET:
        shard.reset(json.loads(command[1:]))
    elif command[0] == RESTORE_START:
        shard.restore_start()
    else:
        shard.replay_actions()


def seed_of(seed: int, stream: Sequence[int], n: int) -> int:
    """The reset seed of the n-th environment of a seed, in that random stream."""
    return int(np.random.SeedSequence([seed, *stream, n]).generate_state(1)[0])


UNKNOWN, SEEDED, CONTINUED = 0, 1, 2  # how an episode started: word 0 of its origin
WORD = 2**64


def origin(env: gymnasium.Env, seed: int | None) -> list[int]:
    """The random state that the next reset draws from, as 7 words of 64 bits: its seed, or the
    state of the environment's generator if that is numpy's PCG64."""
    if seed is not None:
        return seeded(seed)
    generator = getattr(env.unwrapped, "np_random", None)  # may be a RandomState
    state: Any = getattr(getattr(generator, "bit_generator", None), "state", {})
    if state.get("bit_generator") != "PCG64":
        return [UNKNOWN] * 7
    position, increment = state["state"]["state"], state["state"]["inc"]
    return [CONTINUED, *divmod(position, WORD), *divmod(increment, WORD), state["has_uint32"],
            state["uinteger"]]


def seeded(seed: int) -> list[int]:
    """The origin of an episode that starts with a seeded reset."""
    return [SEEDED, seed, 0, 0, 0, 0, 0]


def recall(env: gymnasium.Env, words: Sequence[int]) -> int | None:
    """Restore the random state of an origin -> the seed for the reset, or None."""
    kind, *rest = words
    if kind == CONTINUED:
        high, low, inc_high, inc_low, has_uint32, uinteger = rest
        generator = np.random.PCG64()
        generator.state = {
            "bit_generator": "PCG64", "has_uint32": has_uint32, "uinteger": uinteger,
            "state": {"state": high * WORD + low, "inc": inc_high * WORD + inc_low}}
        env.unwrapped.np_random = np.random.Generator(generator)
    return rest[0] if kind == SEEDED else None
