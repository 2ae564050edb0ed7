"""Gymnasium environments as arrays, in this process or in a worker's. No torch: a worker that
imports this module alone starts fast and stays small."""

import contextlib
import ctypes
import difflib
import functools
import importlib
import json
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

import gymnasium
import numpy as np


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


def make_one(env_id: str, **settings: Any) -> gymnasium.Env:
    """One gymnasium environment, or a UserError that names similar ids."""
    try:
        hear_mujoco()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date")  # v4 on purpose
            warnings.filterwarnings("ignore", message=".*latest versioned environment")
            env = gymnasium.make(env_id, disable_env_checker=True, **settings)
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


def import_prefix(env_id: str) -> str:
    """Import what "module:Name-v0" begins with, as gymnasium does -> the rest of the id."""
    module, colon, name = env_id.rpartition(":")
    try:
        if colon:
            importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot make environment {env_id!r}: {error}") from error
    return name


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
    limit = getattr(env.spec, "max_episode_steps", None)  # without a spec there is none
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


class Slice:
    """Some gymnasium environments and the arrays in which they leave their steps.

    A place is (seed, n): environment n of that seed, whose random stream it names.
    actions (n, A) is read; rows (n, 2 O + 3) gets next_obs, obs, reward, termination, truncation;
    returns (n, 2) gets the undiscounted return and the length of an episode when it ends;
    origins (n, 7) says how the running episode began.
    """

    def __init__(self, env_id: str, places: Sequence[tuple[int, int]], actions: np.ndarray,
                 rows: np.ndarray, returns: np.ndarray, origins: np.ndarray,
                 *, make: Callable[[str], gymnasium.Env] = make_one):
        self.places, self.actions, self.rows, self.returns = places, actions, rows, returns
        self.origins = origins
        self.envs = [make(env_id) for _ in places]
        self.obs_dim = (rows.shape[1] - 3) // 2
        self.action_dtype = self.envs[0].action_space.dtype if self.envs else actions.dtype
        self.running = [[0.0, 0] for _ in places]  # return and length so far

    def reset(self, stream: Sequence[int]) -> None:
        """Into obs. The one seeded reset: later episodes go on in the random stream that the seed,
        the stream's numbers and the environment's n name."""
        for i, (seed, n) in enumerate(self.places):
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

    def begin_again(self) -> None:
        """The episodes that origins name, where an action is a number."""
        for i in self._named():
            self._begin(i, recall(self.envs[i], self.origins[i].tolist()))

    def step_again(self) -> None:
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


SPIN_SECONDS = 5e-4  # about the longest time between two steps that waking up would prolong


def hear(link: socket.socket, size: int, seconds: float | None = None) -> bytes:
    """What a link that does not block says, up to `size` bytes; TimeoutError after the seconds.

    First awake: to wake a sleeping process takes as long as a step or two of an environment
    (HalfCheetah-v5, 16 environments, 2 workers on 2 cores: 1.2 to 1.5 times the steps a second). A
    process that waits for this core gets its turn.
    """
    end = time.perf_counter() + SPIN_SECONDS
    while time.perf_counter() < end:
        with contextlib.suppress(BlockingIOError):
            return link.recv(size)
        os.sched_yield()
    if not connection.wait([link], seconds):
        raise TimeoutError
    return link.recv(size)


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


# the first byte of a command; any other is the number of a group that steps
RESET, BEGIN_AGAIN, STEP_AGAIN = 255, 254, 253


def slices(env_id: str, groups: Sequence[tuple[Sequence[tuple[int, int]], int]],
           arrays: Sequence[np.ndarray]) -> list[Slice]:
    """One of each group: its places, and their rows of the arrays from the first one on."""
    return [Slice(env_id, places, *(x[start : start + len(places)] for x in arrays))
            for places, start in groups]


def obey(part: Slice, command: bytes) -> None:
    """A command that is for every group."""
    if command[0] == RESET:
        part.reset(json.loads(command[1:]))
    elif command[0] == BEGIN_AGAIN:
        part.begin_again()
    else:
        part.step_again()


def serve(link: socket.socket, parent: int, env_id: str, groups: Sequence[tuple[Any, ...]],
          shared: Sequence[Any]) -> None:
    """A worker's life: step its slice of each group when told, until the link closes.

    groups: as of `slices`; shared: the buffers of a Slice's arrays with their shapes. Every
    command is answered by one byte, or by "!" and an error, which is the last word.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they are the main process's business
        signal.signal(number, signal.SIG_IGN)
    die_with(parent, signal.SIGKILL)
    link.setblocking(False)
    try:
        arrays = [np.frombuffer(buffer, dtype).reshape(shape) for buffer, dtype, shape in shared]
        parts = slices(env_id, groups, arrays)
        link.sendall(b".")
        while command := hear(link, 4096):
            if command[0] >= STEP_AGAIN:
                for each in parts:
                    obey(each, command)
                link.sendall(b".")
                continue
            for group in command:
                parts[group].step()
                link.sendall(b".")
    except (BrokenPipeError, ConnectionResetError):
        return  # the main process is gone
    except Exception as error:
        reason = " ".join(str(error).split())
        link.sendall(f"!{type(error).__name__}: {reason}".encode())


def die_with(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """On Linux, a process whose parent is killed gets this signal as well: no orphans."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            sys.exit(1)
