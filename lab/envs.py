"""Environments behind one batch interface: S seeds x N environments, tensors (S, N, ...).

    envs = make("HalfCheetah-v5", seeds=[0, 1, 2], num_envs=1)
    obs = envs.reset()
    transition = envs.step(actions)  # or envs.send(actions), something else, envs.receive()
"""

import contextlib
import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch

from lab.gym_envs import (
    BEGIN_AGAIN,
    RESET,
    SEEDED,
    STEP_AGAIN,
    UNKNOWN,
    EnvSpec,
    Slice,
    UserError,
    make_one,
    obey,
    seed_of,
    seeded,
    spec_of,
)

TRAINING, EVALUATION = 0, 1  # streams of environment randomness that never meet
TORCH = "torch/"  # begins the ids of environments that are written in torch
REMEMBERED = 10_000  # steps of an episode at most, to take them again
BACKENDS = ("sync", "workers", "envpool", "torch")


class Transition(NamedTuple):
    """One step of every environment. next_obs succeeds the action; obs is what to act on next:
    the same, or the first observation of a new episode where one has ended."""

    next_obs: torch.Tensor  # (S, N, O) float32
    rewards: torch.Tensor  # (S, N) float32
    terminations: torch.Tensor  # (S, N) float32, 1 where the task ended
    truncations: torch.Tensor  # (S, N) float32, 1 where the time ran out and the task had not ended
    obs: torch.Tensor  # (S, N, O) float32


class Finished(NamedTuple):
    """Of the episodes that one seed finished: how many, and their mean return and length."""

    episodes: int
    episode_return: float
    length: float


class Layout(NamedTuple):
    """S seeds x N environments, and what a backend may need to make them."""

    env_id: str
    seeds: Sequence[int]
    num_envs: int = 1
    device: str = "cpu"
    clip_reward: tuple[float, float] | None = None
    workers: int | None = None  # processes, or threads; none: one for each physical core
    groups: int = 1  # that step in turn
    compile: bool = False


def make(env_id: str, seeds: Sequence[int], num_envs: int = 1, backend: str | None = None,
         device: str = "cpu", **settings: Any) -> "VectorEnvs":
    """S x N environments. UserError on an id, a space or a backend that the lab cannot use.

    No backend: torch for an id that begins with torch/, else sync. The settings are Layout's;
    clip_reward (low, high) bounds the rewards of transitions, the returns of episodes stay raw.
    """
    layout = Layout(env_id, seeds, num_envs, device, **settings)
    name = choose_backend(env_id, backend, layout.groups)
    if name == "torch":
        from lab.torch_envs import TorchEnvs

        return TorchEnvs(layout)
    if name == "workers":
        from lab.workers import WorkerEnvs

        return WorkerEnvs(layout)
    if name == "envpool":
        from lab.envpool_envs import EnvpoolEnvs

        return EnvpoolEnvs(layout)
    return SyncEnvs(layout)


def choose_backend(env_id: str, backend: str | None, groups: int = 1) -> str:
    """The one that is meant. UserError if there is none such, or not for this id or groups."""
    if backend not in (None, *BACKENDS):
        raise UserError(f"no backend {backend!r}; there are {', '.join(BACKENDS)}")
    in_torch = is_torch(env_id)
    if backend not in (None, "torch") and in_torch:
        raise UserError(f"{env_id} is written in torch: leave --backend {backend} out")
    name = "torch" if in_torch or backend == "torch" else backend or "sync"
    if groups > 1 and name != "workers":
        raise UserError(f"--groups {groups} needs --backend workers, not {name}")
    return name


def is_torch(env_id: str) -> bool:
    """Whether the id, after the module that it may name, is of an environment in torch."""
    return env_id.rpartition(":")[2].startswith(TORCH)


class VectorEnvs:
    """What the backends share: `shape` is (S, N), `groups` are the parts of N that step in turn."""

    spec: EnvSpec

    def __init__(self, layout: Layout):
        self.layout, self.device = layout, torch.device(layout.device)
        self.shape = len(layout.seeds), layout.num_envs
        self.groups = [slice(None)]

    def reset(self, *stream: int) -> torch.Tensor:
        """-> obs (S, N, O). The one seeded reset, by seed, stream and the environment's n."""
        raise NotImplementedError

    def send(self, actions: torch.Tensor, group: int = 0) -> None:
        """actions (S, N, A) in environment units, of one group: the step begins."""
        raise NotImplementedError

    def receive(self) -> Transition:
        """The end of the step that `send` began."""
        raise NotImplementedError

    def finished(self) -> list[Finished]:
        """Of each seed, since the last call. On a GPU the host waits here for the device."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What the next steps depend on, and episodes that `finished` has not told."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any], *stream: int) -> tuple[torch.Tensor, int]:
        """Go on where `state` was taken -> obs (S, N, O), and the number of environments that could
        not: they begin an episode of that stream."""
        raise NotImplementedError

    def goes_on(self) -> bool | None:
        """Whether load_state_dict would find the running episode; none: it is too early to say."""
        return True

    def close(self) -> None:
        """Free what the environments hold; calling twice is fine."""

    def send_groups(self, act: Callable[[torch.Tensor], torch.Tensor], obs: torch.Tensor
                    ) -> torch.Tensor:
        """act and send, group by group: the first steps while the next is acted on -> actions."""
        parts = []
        for number, group in enumerate(self.groups):
            parts.append(act(obs[:, group]))
            self.send(parts[-1], number)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def step(self, actions: torch.Tensor) -> Transition:
        for number, group in enumerate(self.groups):
            self.send(actions[:, group], number)
        return self.receive()


class HostEnvs(VectorEnvs):
    """Environments that write their steps into arrays on the host, as gym_envs.Slice says."""

    def __init__(self, layout: Layout, spec: EnvSpec):
        super().__init__(layout)
        self.spec = spec
        total = self.shape[0] * self.shape[1]
        self.places = [(seed, n) for seed in layout.seeds for n in range(layout.num_envs)]
        self.order = torch.arange(total)  # the row of each place, seed by seed
        self.actions = np.zeros((total, spec.action_dim), np.float32)
        self.rows = np.zeros((total, 2 * spec.obs_dim + 3), np.float32)
        self.returns = np.zeros((total, 2))
        self.origins = np.zeros((total, 7), np.uint64)
        # the running episodes: their lengths, and the actions since the oldest began
        self.ages = np.zeros(total, np.int64)
        self.history: deque[np.ndarray] = deque(maxlen=REMEMBERED)
        self.sums = np.zeros((3, self.shape[0]))  # count, returns, lengths of finished episodes
        pinned = self.device.type == "cuda"
        self.staged = torch.zeros(self.rows.shape, pin_memory=pinned) if pinned else None

    def reset(self, *stream: int) -> torch.Tensor:
        self.rows[:] = self.sums[:] = self.ages[:] = 0
        self.history.clear()
        self.command(bytes([RESET]) + json.dumps(stream or (TRAINING,)).encode())
        return self.transition().obs

    def put_actions(self, actions: torch.Tensor, rows: Any = slice(None)) -> None:
        """Into the array, rows of it; the host waits for the device here."""
        flat = actions.cpu().numpy().reshape(-1, self.spec.action_dim)
        # a broken seed must not break a simulator's process
        self.actions[rows] = np.where(np.isfinite(flat), flat, 0)

    def stepped(self) -> Transition:
        """After a step of all environments."""
        self.history.append(self.actions.copy())
        self.ages += 1
        ended = self.rows[:, -2] + self.rows[:, -1] > 0
        if ended.any():
            self.ages[ended] = 0
            longest = self.ages.max()
            while len(self.history) > longest:
                self.history.popleft()
            order = self.order.numpy()
            done = np.concatenate([np.ones((len(order), 1)), self.returns], 1)
            done = np.where(ended[:, None], done, 0)  # not a product: an old return may be NaN
            self.sums += done[order].reshape(*self.shape, 3).sum(1).T
        return self.transition()

    def transition(self) -> Transition:
        """From the rows, by one copy, of which nothing else holds a part."""
        rows = torch.index_select(torch.from_numpy(self.rows), 0, self.order, out=self.staged)
        rows = rows.to(self.device, non_blocking=True)  # pinned: overwritten only after actions.cpu
        O = self.spec.obs_dim
        next_obs, obs, flags = rows.view(*self.shape, -1).split([O, O, 3], -1)
        rewards, terminations, truncations = flags.unbind(-1)
        if self.layout.clip_reward:
            rewards = rewards.clamp(*self.layout.clip_reward)
        return Transition(next_obs, rewards, terminations, truncations, obs)

    def finished(self) -> list[Finished]:
        sums, self.sums = self.sums, np.zeros_like(self.sums)
        return [summary(column) for column in sums.T.tolist()]

    def state_dict(self) -> dict[str, Any]:
        arrays = {name: getattr(self, name) for name in ("rows", "ages", "sums")}
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()} | {
            "origins": torch.from_numpy(self.origins.view(np.int64).copy()),
            "actions": torch.from_numpy(
                np.array(self.history, np.float32).reshape(-1, *self.actions.shape))}

    def load_state_dict(self, state: dict[str, Any], *stream: int) -> tuple[torch.Tensor, int]:
        """The episodes begin as they did and take the same actions again."""
        saved = {name: tensor.cpu().numpy() for name, tensor in state.items()}
        ages, past, O = saved["ages"], saved["actions"], self.spec.obs_dim
        self.origins[:] = saved["origins"].view(np.uint64)
        known = (self.origins[:, 0] != UNKNOWN) & (ages <= len(past))
        self._again(BEGIN_AGAIN, known, 0)
        for back in range(len(past), 0, -1):
            self._again(STEP_AGAIN, known & (ages >= back), past[-back])
        again, before = (rows.copy().view(np.int32) for rows in (self.rows, saved["rows"]))
        again[ages == 0, :O] = before[ages == 0, :O]  # of an episode that has ended
        again[ages == 0, 2 * O :] = before[ages == 0, 2 * O :]
        self.rows[:], self.sums[:] = saved["rows"], saved["sums"]
        lost = (again != before).any(1) | ~known
        if lost.any():
            places = self.row_places()
            for row in np.flatnonzero(lost):
                seed, n = places[row]
                self.origins[row] = seeded(seed_of(seed, stream, n))
            self._again(BEGIN_AGAIN, lost, 0)
        self.ages[:] = np.where(lost, 0, ages)
        self.history.clear()
        self.history.extend(past)
        return self.transition().obs, int(lost.sum())

    def goes_on(self) -> bool | None:
        """Tried on one environment that is no longer in its first, seeded, episode."""
        later = np.flatnonzero(self.origins[:, 0] != SEEDED)
        if not len(later):
            return None
        state, row = self.state_dict(), later[:1]
        part = {name: state[name][row] for name in ("rows", "ages", "origins")}
        part |= {"actions": state["actions"][:, row], "sums": torch.zeros(3, 1)}
        with contextlib.closing(SyncEnvs(Layout(self.layout.env_id, [0]))) as twin:
            return twin.load_state_dict(part)[1] == 0

    def row_places(self) -> list[tuple[int, int]]:
        """(seed, n) of each row."""
        places = [(0, 0)] * len(self.places)
        for place, row in zip(self.places, self.order.tolist(), strict=True):
            places[row] = place
        return places

    def _again(self, command: int, which: np.ndarray, actions: Any) -> None:
        """A command for those environments, which know by their actions that they are meant."""
        self.actions[:] = np.where(which[:, None], actions, np.nan)
        self.command(bytes([command]))

    def command(self, command: bytes) -> None:
        """Every Slice obeys."""
        raise NotImplementedError


def summary(sums: Sequence[float]) -> Finished:
    """From count, sum of returns, sum of lengths."""
    count = max(1.0, sums[0])
    return Finished(int(sums[0]), sums[1] / count, sums[2] / count)


class SyncEnvs(HostEnvs):
    """The plain loop over gymnasium environments, in this process."""

    def __init__(self, layout: Layout, make: Callable[[str], gymnasium.Env] = make_one):
        super().__init__(layout, probe(layout.env_id))
        self.slice = Slice(layout.env_id, self.places, self.actions, self.rows, self.returns,
                           self.origins, make=make)

    def command(self, command: bytes) -> None:
        obey(self.slice, command)

    def send(self, actions: torch.Tensor, group: int = 0) -> None:
        self.put_actions(actions)

    def receive(self) -> Transition:
        self.slice.step()
        return self.stepped()

    def close(self) -> None:
        self.slice.close()


def probe(env_id: str) -> EnvSpec:
    """The spec of a gymnasium environment. UserError if the lab cannot use it."""
    with contextlib.closing(make_one(env_id)) as env:
        return spec_of(env, env_id)
