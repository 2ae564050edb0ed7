"""Gymnasium environments as arrays, in this process or in a worker's. No torch: a worker that
imports these modules alone starts fast and stays small."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np

from lab.envs.spec import make_one

# the first byte of a command; any other is the number of a group that steps
RESET, RESTORE_START, REPLAY_ACTIONS = 255, 254, 253


class EnvShard:
    """Some gymnasium environments and the arrays in which they leave their steps.

    A key is (seed, n): environment n of that seed, whose random stream it names.
    actions (n, A) is read; rows (n, 2 O + 3) gets next_obs, obs, reward, termination, truncation;
    returns (n, 2) gets the undiscounted return and the length of an episode when it ends;
    origins (n, 7) says how the running episode began.
    """

    def __init__(self, env_id: str, env_keys: Sequence[tuple[int, int]], actions: np.ndarray,
                 rows: np.ndarray, returns: np.ndarray, origins: np.ndarray,
                 *, make: Callable[[str], gymnasium.Env] = make_one):
        self.env_keys, self.actions, self.rows, self.returns = env_keys, actions, rows, returns
        self.origins = origins
        self.envs = [make(env_id) for _ in env_keys]
        self.obs_dim = (rows.shape[1] - 3) // 2
        self.action_dtype = self.envs[0].action_space.dtype if self.envs else actions.dtype
        self.running = [[0.0, 0] for _ in env_keys]  # return and length so far

    def reset(self, stream: Sequence[int]) -> None:
        """Into obs. The one seeded reset: later episodes go on in the random stream that the seed,
        the stream's numbers and the environment's n name."""
        for i, (seed, n) in enumerate(self.env_keys):
            self._begin(i, seed_of(seed, stream, n))

    def step(self, among: Sequence[int] | None = None) -> None:
        """All of them, or those."""
        O, actions = self.obs_dim, self.actions.astype(self.action_dtype)
        outcomes: list[tuple[Any, bool, bool]] = []
        fresh = []
        which: Any = slice(None) if among is None else among
        for i in range(len(self.envs)) if among is None else among:
            self.rows[i, :O], reward, terminated, truncated, _ = self.envs[i].step(actions[i])
            outcomes.append((reward, terminated, truncated and not terminated))
            running = self.running[i]
            running[0] += float(reward)
            running[1] += 1
            if terminated or truncated:
                self.returns[i] = running
                fresh.append(i)
        self.rows[which, O : 2 * O] = self.rows[which, :O]
        self.rows[which, 2 * O :] = np.array(outcomes).reshape(-1, 3)  # there may be none
        for i in fresh:
            self._begin(i)

    def restore_start(self) -> None:
        """The episodes that origins name, where an action is a number."""
        for i in self._named():
            self._begin(i, recall(self.envs[i], self.origins[i].tolist()))

    def replay_actions(self) -> None:
        """Where an action is a number."""
        self.step(self._named())

    def _named(self) -> list[int]:
        return np.flatnonzero(~np.isnan(self.actions[:, 0])).tolist()

    def _begin(self, i: int, seed: int | None = None) -> None:
        env = self.envs[i]
        renew_box2d_world(env)
        self.running[i], self.origins[i] = [0.0, 0], origin(env, seed)
        self.rows[i, self.obs_dim : 2 * self.obs_dim] = env.reset(seed=seed)[0]

    def close(self) -> None:
        for env in self.envs:
            env.close()


def make_shards(env_id: str, groups: Sequence[tuple[Sequence[tuple[int, int]], int]],
                arrays: Sequence[np.ndarray]) -> list[EnvShard]:
    """One of each group: its keys, and their rows of the arrays from the first one on."""
    return [EnvShard(env_id, env_keys, *(x[start : start + len(env_keys)] for x in arrays))
            for env_keys, start in groups]


def handle_command(shard: EnvShard, command: bytes) -> None:
    """A command that is for every group."""
    if command[0] == RESET:
        shard.reset(json.loads(command[1:]))
    elif command[0] == RESTORE_START:
        shard.restore_start()
    else:
        shard.replay_actions()


def seed_of(seed: int, stream: Sequence[int], n: int) -> int:
    """Of an environment's reset: the seed's, in that stream of randomness, for its n-th."""
    return int(np.random.SeedSequence([seed, *stream, n]).generate_state(1)[0])


UNKNOWN, SEEDED, CONTINUED = 0, 1, 2  # how an episode began: the first of the words of its origin
WORD = 2**64


def origin(env: gymnasium.Env, seed: int | None) -> list[int]:
    """7 words of 64 bits that say what the reset which follows draws from: a seed, or the random
    numbers after those of the episode before, if they come from numpy's PCG64."""
    if seed is not None:
        return seeded(seed)
    state: Any = env.unwrapped.np_random.bit_generator.state
    if state["bit_generator"] != "PCG64":
        return [UNKNOWN] * 7
    position, increment = state["state"]["state"], state["state"]["inc"]
    return [CONTINUED, *divmod(position, WORD), *divmod(increment, WORD), state["has_uint32"],
            state["uinteger"]]


def seeded(seed: int) -> list[int]:
    """The origin of an episode that begins from that seed."""
    return [SEEDED, seed, 0, 0, 0, 0, 0]


def recall(env: gymnasium.Env, words: Sequence[int]) -> int | None:
    """Put the environment where that origin was taken -> the seed of its reset, if there is one."""
    kind, *rest = words
    if kind == CONTINUED:
        high, low, inc_high, inc_low, has_uint32, uinteger = rest
        generator = np.random.PCG64()
        generator.state = {
            "bit_generator": "PCG64", "has_uint32": has_uint32, "uinteger": uinteger,
            "state": {"state": high * WORD + low, "inc": inc_high * WORD + inc_low}}
        env.unwrapped.np_random = np.random.Generator(generator)
    return rest[0] if kind == SEEDED else None


def renew_box2d_world(env: gymnasium.Env) -> None:
    """BipedalWalker keeps one b2World, whose contact caches leak from an episode into the next
    (gymnasium issue 728): with a new world an episode depends on the random state alone."""
    walker: Any = env.unwrapped
    if type(walker).__module__ == "gymnasium.envs.box2d.bipedal_walker":
        from Box2D import b2World

        walker._destroy()
        walker.world = b2World()
