"""Gymnasium environments as vector environments, stepped through arrays on the host."""

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np
import torch

from lab.envs.base import Finished, Transition, VecEnvConfig, VectorEnvs, summary
from lab.envs.generators import kept_generators
from lab.envs.shard import (
    REPLAY_ACTIONS,
    RESET,
    RESTORE_START,
    SEEDED,
    TRAINING,
    UNKNOWN,
    EnvShard,
    handle_command,
    seed_of,
    seeded,
)
from lab.envs.spec import EnvSpec, make_one, probe

# Actions of the running episodes, kept to replay them on resume; at most this many steps and bytes
# for a stack. They are in memory and in each checkpoint: without a time limit, 1024 environments
# with 20 actions would need 0.8 GB for 10 000 steps.
HISTORY_STEPS = 10_000
HISTORY_BYTES = 2**26


class HostEnvs(VectorEnvs):
    """Base class of backends that write their steps into arrays on the host; see EnvShard."""

    def __init__(self, config: VecEnvConfig, spec: EnvSpec):
        super().__init__(config)
        if spec.max_episode_steps:  # in steps of an agent
            limit = math.ceil(spec.max_episode_steps / config.action_repeat)
            spec = dataclasses.replace(spec, max_episode_steps=limit)
        self.spec = spec
        total = self.shape[0] * self.shape[1]
        self.env_keys = [(seed, n) for seed in config.seeds for n in range(config.num_envs)]
        self.order = torch.arange(total)  # the row of each (seed, n), in the order of env_keys
        self.actions = np.zeros((total, spec.action_dim), np.float32)
        self.rows = np.zeros((total, 2 * spec.obs_dim + 3), np.float32)
        self.returns = np.zeros((total, 2))
        self.origins = np.zeros((total, 7), np.uint64)
        # of the running episodes: their lengths, and all actions since the oldest one started
        self.ages = np.zeros(total, np.int64)
        longest = min(HISTORY_STEPS, HISTORY_BYTES // self.actions.nbytes)
        self.history: deque[np.ndarray] = deque(maxlen=longest)
        self.sums = np.zeros((3, self.shape[0]))  # count, returns, lengths of finished episodes
        self.end_flags = np.zeros_like(self.rows)  # 1 in the columns of the ends
        self.end_flags[:, -2:] = 1
        pinned = self.device.type == "cuda"
        self.staged = torch.zeros(self.rows.shape, pin_memory=pinned) if pinned else None

    def reset(self, *stream: int) -> torch.Tensor:
        self.rows[:] = self.sums[:] = self.ages[:] = 0
        self.history.clear()
        self.command(bytes([RESET]) + json.dumps(stream or (TRAINING,)).encode())
        self.note_broken()
        return self.transition().obs

    def put_actions(self, actions: torch.Tensor, rows: Any = slice(None)) -> None:
        """Copy the actions into these rows of the array. Synchronises with a GPU."""
        flat = actions.cpu().numpy().reshape(-1, self.spec.action_dim)
        # NaN actions of a diverged seed can crash a simulator
        self.actions[rows] = np.where(np.isfinite(flat), flat, 0)

    def stepped(self) -> Transition:
        """Update history and episode statistics after a step of all environments."""
        self.history.append(self.actions.copy())
        self.ages += 1
        # one product tells the number of ends and whether all is finite: 0 times NaN is NaN
        ends = np.vdot(self.rows, self.end_flags)
        if ends != ends:
            self.note_broken()
        if ends:  # NaN as well
            ended = self.rows[:, -2] + self.rows[:, -1] > 0
            self.ages[ended] = 0
            longest = self.ages.max()
            while len(self.history) > longest:
                self.history.popleft()
            order = self.order.numpy()
            finished = np.concatenate([np.ones((len(order), 1)), self.returns], 1)
            # not a product with the mask: a stale return may be NaN
            finished = np.where(ended[:, None], finished, 0)
            self.sums += finished[order].reshape(*self.shape, 3).sum(1).T
        t = self.transition()
        return t._replace(truncations=1 - t.terminations) if self.cut else t

    def transition(self) -> Transition:
        """The rows as a Transition, in one copy that shares no memory with them."""
        rows = torch.index_select(torch.from_numpy(self.rows), 0, self.order, out=self.staged)
        # staged is pinned; it is overwritten only after actions.cpu() or lend(), which synchronise
        rows = rows.to(self.device, non_blocking=True)
        O = self.spec.obs_dim
        next_obs, obs, flags = rows.view(*self.shape, -1).split([O, O, 3], -1)
        rewards, terminations, truncations = flags.unbind(-1)
        self.obs = obs
        return Transition(next_obs, rewards, terminations, truncations, obs)

    def note_broken(self) -> None:
        """Note each seed's first value that is not finite."""
        O, rows = self.spec.obs_dim, self.rows[self.order.numpy()]
        wrong = ~np.isfinite(rows)
        for place in np.flatnonzero(wrong.any(1)).tolist():
            column = int(wrong[place].argmax())
            name = f"observation[{column % O}]" if column < 2 * O else "reward"
            self.broken.setdefault(place // self.shape[1], f"{name} = {rows[place, column]}")

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
        """Restart each episode from its origin, replay its actions, compare with the saved rows."""
        saved = {name: tensor.cpu().numpy() for name, tensor in state.items()}
        ages, past, O = saved["ages"], saved["actions"], self.spec.obs_dim
        if self.config.clip_reward and self.config.action_repeat == 1:  # older states are raw
            saved["rows"][:, 2 * O] = saved["rows"][:, 2 * O].clip(*self.config.clip_reward)
        self.origins[:] = saved["origins"].view(np.uint64)
        known = (self.origins[:, 0] != UNKNOWN) & (ages <= len(past))
        self._command_some(RESTORE_START, known, 0)
        for back in range(len(past), 0, -1):
            self._command_some(REPLAY_ACTIONS, known & (ages >= back), past[-back])
        replayed, before = (rows.copy().view(np.int32) for rows in (self.rows, saved["rows"]))
        # right after a reset, next_obs and the flags belong to the episode before
        replayed[ages == 0, :O] = before[ages == 0, :O]
        replayed[ages == 0, 2 * O :] = before[ages == 0, 2 * O :]
        self.rows[:], self.sums[:] = saved["rows"], saved["sums"]
        lost = (replayed != before).any(1) | ~known
        if lost.any():
            keys = self.row_keys()
            for row in np.flatnonzero(lost):
                seed, n = keys[row]
                self.origins[row] = seeded(seed_of(seed, stream, n))
            self._command_some(RESTORE_START, lost, 0)
        self.ages[:] = np.where(lost, 0, ages)
        self.history.clear()
        self.history.extend(past)
        self.note_broken()
        return self.transition().obs, int(lost.sum())

    def can_restore_exactly(self) -> bool | None:
        """Tried on one environment that has left its first, seeded episode; False without a try if
        an episode is longer than the history."""
        if self.ages.max() > len(self.history):
            return False
        later = np.flatnonzero(self.origins[:, 0] != SEEDED)
        if not len(later):
            return None
        state, row = self.state_dict(), later[:1]
        part = {name: state[name][row] for name in ("rows", "ages", "origins")}
        part |= {"actions": state["actions"][:, row], "sums": torch.zeros(3, 1)}
        config = self.config._replace(seeds=[0], num_envs=1, device="cpu")
        with (contextlib.chdir(os.curdir), kept_generators(),
              contextlib.closing(SyncEnvs(config)) as twin):
            return twin.load_state_dict(part)[1] == 0

    @contextlib.contextmanager
    def lend(self, *stream: int) -> Iterator[None]:
        obs, self.cut = self.obs, False
        obs.cpu()  # waits for the copy from `staged`: the reset of an evaluation overwrites it
        yield
        obs.copy_(self.reset(*stream))  # in place: the training loop holds it

    def row_keys(self) -> list[tuple[int, int]]:
        """(seed, n) of each row."""
        keys = [(0, 0)] * len(self.env_keys)
        for key, row in zip(self.env_keys, self.order.tolist(), strict=True):
            keys[row] = key
        return keys

    def _command_some(self, command: int, which: np.ndarray, actions: Any) -> None:
        """A command for the environments of a mask. The other ones get a NaN action, which excludes
        them from it."""
        self.actions[:] = np.where(which[:, None], actions, np.nan)
        self.command(bytes([command]))

    def command(self, command: bytes) -> None:
        """Send a command to every EnvShard."""
        raise NotImplementedError


class SyncEnvs(HostEnvs):
    """A loop over gymnasium environments in this process."""

    def __init__(self, config: VecEnvConfig, make: Callable[..., gymnasium.Env] = make_one):
        super().__init__(config, probe(config.env_id, config.env_kwargs))
        self.shard = EnvShard(config.env_id, self.env_keys, self.actions, self.rows, self.returns,
                              self.origins, rules=config.rules,
                              make=functools.partial(make, env_kwargs=config.env_kwargs))

    def command(self, command: bytes) -> None:
        handle_command(self.shard, command)

    def send(self, actions: torch.Tensor, group: int = 0) -> None:
        self.put_actions(actions)

    def receive(self) -> Transition:
        self.shard.step()
        return self.stepped()

    def close(self) -> None:
        self.shard.close()
