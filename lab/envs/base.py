"""Environments behind one batch interface: S seeds x N environments, tensors (S, N, ...).

    envs = make_envs("HalfCheetah-v5", seeds=[0, 1, 2], num_envs=1)
    obs = envs.reset()
    transition = envs.step(actions)  # or envs.send(actions), something else, envs.receive()
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from lab.envs.spec import EnvSpec

TRAINING, EVALUATION = 0, 1  # streams of environment randomness that never meet
TORCH = "torch/"  # begins the ids of environments that are written in torch


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


class VecEnvConfig(NamedTuple):
    """S seeds x N environments, and what a backend may need to make them."""

    env_id: str
    seeds: Sequence[int]
    num_envs: int = 1
    device: str = "cpu"
    clip_reward: tuple[float, float] | None = None
    workers: int | None = None  # processes, or threads; none: one for each physical core
    groups: int = 1  # that step in turn
    compile: bool = False


class VectorEnvs:
    """What the backends share: `shape` is (S, N), `groups` are the parts of N that step in turn."""

    spec: EnvSpec

    def __init__(self, config: VecEnvConfig):
        self.config, self.device = config, torch.device(config.device)
        self.shape = len(config.seeds), config.num_envs
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

    def can_restore_exactly(self) -> bool | None:
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


def summary(sums: Sequence[float]) -> Finished:
    """From count, sum of returns, sum of lengths."""
    count = max(1.0, sums[0])
    return Finished(int(sums[0]), sums[1] / count, sums[2] / count)


def is_torch(env_id: str) -> bool:
    """Whether the id, after the module that it may name, is of an environment in torch."""
    return env_id.rpartition(":")[2].startswith(TORCH)
