"""The vector environment interface: S seeds x N environments, tensors (S, N, ...).

    envs = make_envs("HalfCheetah-v5", seeds=[0, 1, 2], num_envs=1)
    obs = envs.reset()
    transition = envs.step(actions)  # or envs.send(actions), other work, envs.receive()
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from lab.envs.shard import StepRules
from lab.envs.spec import EnvSpec

TORCH = "torch/"  # id prefix of the environments written in torch


class Transition(NamedTuple):
    """One step of every environment. next_obs is the result of the action, also when it is
    terminal. obs is the input of the next action: next_obs, or the first observation of a new
    episode where one ended."""

    next_obs: torch.Tensor  # (S, N, O) float32
    rewards: torch.Tensor  # (S, N) float32
    terminations: torch.Tensor  # (S, N) float32, 1 at a terminal state
    truncations: torch.Tensor  # (S, N) float32, 1 at the time limit, 0 if also terminated
    obs: torch.Tensor  # (S, N, O) float32


class Finished(NamedTuple):
    """Statistics of one seed's finished episodes: their number, mean return and mean length."""

    episodes: int
    episode_return: float
    length: float


class VecEnvConfig(NamedTuple):
    """S seeds x N environments, and the settings of the backends."""

    env_id: str
    seeds: Sequence[int]
    num_envs: int = 1
    device: str = "cpu"
    clip_reward: tuple[float, float] | None = None  # see StepRules, for this and the next two
    action_repeat: int = 1  # only in sync and workers, as failure_below
    failure_below: float | None = None
    workers: int | None = None  # processes or threads; none: one per physical core
    groups: int = 1  # groups of environments that step in turn
    compile: bool = False
    env_kwargs: Sequence[str] = ()  # NAME=VALUE, for gymnasium.make

    @property
    def rules(self) -> StepRules:
        return StepRules(self.action_repeat, self.clip_reward, self.failure_below)


class VectorEnvs:
    """Base class of the backends. `shape`: (S, N). `groups`: slices of N that step in turn.
    `broken`: index of a seed -> the first value from its environments that was not finite; known
    after a step, in torch after finished(). `cut`: whether the next step truncates all episodes."""

    spec: EnvSpec

    def __init__(self, config: VecEnvConfig):
        self.config, self.device = config, torch.device(config.device)
        self.shape = len(config.seeds), config.num_envs
        self.groups = [slice(None)]
        self.broken: dict[int, str] = {}
        self.cut = False

    def reset(self, *stream: int) -> torch.Tensor:
        """-> obs (S, N, O). Seeds each environment with its seed, `stream` and its index n."""
        raise NotImplementedError

    def send(self, actions: torch.Tensor, group: int = 0) -> None:
        """Start a step of one group: actions (S, N in the group, A) in environment units."""
        raise NotImplementedError

    def receive(self) -> Transition:
        """Wait for the step that `send` started."""
        raise NotImplementedError

    def finished(self) -> list[Finished]:
        """Episode statistics of each seed since the last call. Synchronises with a GPU."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, and the episodes that `finished` has not returned."""
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any], *stream: int) -> tuple[torch.Tensor, int]:
        """Restore `state` -> obs (S, N, O), and the number of environments that could not be
        restored: these start a new episode, seeded from `stream`."""
        raise NotImplementedError

    def can_restore_exactly(self) -> bool | None:
        """Whether load_state_dict would restore the running episodes; None: not known yet."""
        return True

    def lend(self, *stream: int) -> AbstractContextManager[None]:
        """Within the context, an evaluation uses these environments. Then new episodes start,
        seeded from `stream`; their first observations replace the last transition's obs."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the environments' resources; may be called twice."""

    def act_and_send(self, act: Callable[[torch.Tensor], torch.Tensor], obs: torch.Tensor
                     ) -> torch.Tensor:
        """act and send, group by group -> actions. A group steps while act works on the next."""
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
    """From the number of episodes, the sum of returns and the sum of lengths."""
    count = max(1.0, sums[0])
    return Finished(int(sums[0]), sums[1] / count, sums[2] / count)


def is_torch(env_id: str) -> bool:
    """Whether the id, without its "module:" prefix, names an environment in torch."""
    return env_id.rpartition(":")[2].startswith(TORCH)
