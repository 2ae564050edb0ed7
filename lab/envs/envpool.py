"""envpool's environments (C++ threads); envpool is an optional package."""

import dataclasses
import difflib
import warnings
from typing import Any

import numpy as np
import torch

from lab.accelerate import physical_cores
from lab.envs.base import Transition, VecEnvConfig
from lab.envs.host import HostEnvs
from lab.envs.shard import TRAINING
from lab.envs.spec import as_env_actions, spec_of
from lab.errors import UserError


class EnvpoolEnvs(HostEnvs):
    def __init__(self, config: VecEnvConfig):
        try:
            import envpool
        except ImportError as error:
            raise UserError("--backend envpool needs a package: pip install envpool==1.2.5 "
                            "(Python 3.11, Linux)") from error
        known = envpool.list_all_envs()
        if config.env_id not in known:
            near = ", ".join(difflib.get_close_matches(config.env_id, known, n=3)) or "none"
            raise UserError(f"envpool has no environment {config.env_id!r}; similar: {near}")
        self.package, self.config = envpool, config
        self.pool = self._make([0])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*precision lowered by casting")
            spec = spec_of(self.pool, config.env_id)
            self.action_space = self.pool.action_space
        limit = self.pool.spec.config.max_episode_steps
        super().__init__(config, dataclasses.replace(spec, max_episode_steps=limit))
        self.running = np.zeros((len(self.env_keys), 2))  # return and length of the running episode

    def _make(self, seeds: list[int]) -> Any:
        return self.package.make(
            self.config.env_id, env_type="gymnasium", num_envs=len(seeds), env_seed=seeds,
            num_threads=min(len(seeds), self.config.workers or physical_cores()))

    def reset(self, *stream: int) -> torch.Tensor:
        entropy = [np.random.SeedSequence([seed, *(stream or (TRAINING,)), n])
                   for seed, n in self.env_keys]
        self.pool = self._make([int(e.generate_state(1)[0] >> 1) for e in entropy])  # fits int32
        self.rows[:] = self.running[:] = self.sums[:] = 0
        self.rows[:, self.spec.obs_dim : -3] = self.pool.reset()[0]
        self.note_broken()
        return self.transition().obs

    def send(self, actions: torch.Tensor, group: int = 0) -> None:
        self.put_actions(actions)
        self.pool.send(as_env_actions(self.actions, self.action_space))

    def receive(self) -> Transition:
        obs, rewards, terminated, truncated, info = self.pool.recv()
        rows, O, order = self.rows, self.spec.obs_dim, info["env_id"]
        rows[order, :O] = rows[order, O : 2 * O] = obs
        clipped = np.clip(rewards, *self.config.clip_reward or (-np.inf, np.inf))
        rows[order, 2 * O :] = np.stack([clipped, terminated, truncated & ~terminated], 1)
        self.running[order] += np.stack([rewards, np.ones_like(rewards)], 1)
        ended = np.flatnonzero(rows[:, -2:].any(1))
        if len(ended):
            self.returns[ended], self.running[ended] = self.running[ended], 0
            # or the next step would reset these environments and ignore their actions
            fresh, info = self.pool.reset(ended.astype(np.int32))
            rows[info["env_id"], O : 2 * O] = fresh
        return self.stepped()

    def state_dict(self) -> dict[str, Any]:
        """The statistics only: envpool cannot save the state of an environment."""
        return {"sums": torch.from_numpy(self.sums.copy())}

    def load_state_dict(self, state: dict[str, Any], *stream: int) -> tuple[torch.Tensor, int]:
        obs = self.reset(*stream)
        self.sums[:] = state["sums"].cpu().numpy()
        return obs, len(self.env_keys)

    def can_restore_exactly(self) -> bool:
        return False

    def close(self) -> None:
        self.pool.close()
