"""The environments of torch_tasks.py as vector environments."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.accelerate import Accelerator
from lab.envs import torch_tasks
from lab.envs.base import TORCH, Finished, Transition, VecEnvConfig, VectorEnvs, summary
from lab.envs.shard import TRAINING
from lab.envs.spec import EnvSpec, discrete_spec, import_prefix
from lab.errors import UserError

BLOCK = 64  # steps per draw of random numbers for new episodes


class TorchEnvs(VectorEnvs):
    """S x N instances of one environment of ENVS. Only `finished` synchronises with a GPU."""

    STATE = ("state", "running", "sums", "block")

    def __init__(self, config: VecEnvConfig):
        super().__init__(config)
        name = import_prefix(config.env_id).removeprefix(TORCH)
        if name not in torch_tasks.ENVS:
            raise UserError(f"unknown environment {TORCH}{name}; choose from "
                            + ", ".join(TORCH + known for known in torch_tasks.ENVS))
        self.env = torch_tasks.ENVS[name]()
        self.spec = self._spec(TORCH + name)
        self.advance = Accelerator(config.compile, "fp32", config.device)(self._advance)

    def _spec(self, env_id: str) -> EnvSpec:
        env = self.env
        if env.num_actions:
            return discrete_spec(env_id, env.obs_dim, env.num_actions, env.max_episode_steps)
        low, high = (tuple(float(x) for x in bound) for bound in (env.action_low, env.action_high))
        return EnvSpec(env_id, env.obs_dim, len(low), low, high, env.max_episode_steps)

    def reset(self, *stream: int) -> Tensor:
        seeds = [np.random.SeedSequence([seed, *(stream or (TRAINING,))]).generate_state(1)[0]
                 for seed in self.config.seeds]
        self.generators = [torch.Generator(self.device).manual_seed(int(seed)) for seed in seeds]
        self.drawn = 0
        self.block = torch.empty(0)
        self.state = self.env.initial(self._uniform())
        # running episodes: length, return; finished episodes: number, sum of returns and lengths
        self.running = torch.zeros(2, *self.shape, device=self.device, dtype=torch.float64)
        self.sums = torch.zeros(3, self.shape[0], device=self.device, dtype=torch.float64)
        return self.env.observe(self.state)

    def send(self, actions: Tensor, group: int = 0) -> None:
        self.actions = actions

    def receive(self) -> Transition:
        self.state, self.running, self.sums, *transition = self.advance(
            self.state, self.running, self.sums, self.actions, self._uniform())
        return Transition(*transition)

    def finished(self) -> list[Finished]:
        # a NaN stays in the sums, and in the running episodes and states until these end
        parts = (self.sums.T, self.running.movedim(0, -1), self.env.observe(self.state))
        finite = torch.stack([x.isfinite().flatten(1).all(1) for x in parts]).all(0)
        sums, self.sums = self.sums.T.tolist(), torch.zeros_like(self.sums)  # synchronises
        for index, ok in enumerate(finite.tolist()):
            if not ok:
                self.broken.setdefault(index, "an observation or a reward that is not finite")
        return [summary(row) for row in sums]

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.STATE} | {
            "drawn": self.drawn, "generators": [g.get_state() for g in self.generators]}

    def load_state_dict(self, state: dict[str, Any], *stream: int) -> tuple[Tensor, int]:
        self.reset(*stream)
        for name in self.STATE:
            setattr(self, name, state[name].to(self.device))
        self.drawn = state["drawn"]
        for generator, generator_state in zip(self.generators, state["generators"], strict=True):
            generator.set_state(generator_state.cpu())
        return self.env.observe(self.state), 0

    def _uniform(self) -> Tensor:
        """(S, N, randoms) in [0, 1) for new episodes at this step, from a generator per seed."""
        index = self.drawn % BLOCK
        if index == 0:
            shape = BLOCK, self.shape[1], self.env.randoms
            self.block = torch.stack([torch.rand(shape, generator=g, device=self.device)
                                      for g in self.generators], 1)
        self.drawn += 1
        return self.block[index]

    def _advance(self, state: Tensor, running: Tensor, sums: Tensor, actions: Tensor,
                 uniform: Tensor) -> tuple[Tensor, ...]:
        actions = actions.nan_to_num(0, 0, 0)  # of a diverged seed, as in the other backends
        state, rewards, terminated = self.env.step(state, actions)
        running = running + torch.stack([torch.ones_like(rewards), rewards])
        truncated = (running[0] >= self.env.max_episode_steps) & ~terminated
        ended = terminated | truncated
        finished = torch.cat([torch.ones_like(running[:1]), running.flip(0)])
        sums = sums + torch.where(ended, finished, 0).sum(2)
        next_obs = self.env.observe(state)
        state = torch.where(ended[..., None], self.env.initial(uniform), state)
        obs = torch.where(ended[..., None], self.env.observe(state), next_obs)
        if self.config.clip_reward:
            rewards = rewards.clamp(*self.config.clip_reward)
        return (state, torch.where(ended, 0, running), sums, next_obs, rewards,
                terminated.to(rewards.dtype), truncated.to(rewards.dtype), obs)
