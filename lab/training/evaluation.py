"""The evaluation loop."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lab.envs.base import VectorEnvs
from lab.envs.generators import kept_generators
from lab.envs.shard import EVALUATION
from lab.errors import UserError

OnStep = Callable[[torch.Tensor, torch.Tensor], None]  # (S, N) each: returns so far, still running
ENDLESS = 10_000  # step limit for environments without max_episode_steps
LOOK_EVERY = 25  # steps after which the host looks on a GPU whether all episodes have ended


class Episodes(NamedTuple):
    """One episode of each environment, (S, N) each."""

    returns: torch.Tensor  # float64
    lengths: torch.Tensor  # steps of the agent
    terminated: torch.Tensor


def evaluate(agent: Any, evaluation: VectorEnvs, *stream: int, on_step: OnStep = lambda *_: None
             ) -> list[float]:
    """-> the mean return of each seed, over one deterministic episode per environment. `on_step` is
    called before the first step and after each step. UserError if an episode does not end."""
    with kept_generators():  # training's environments may draw from them
        episodes = run_episodes(agent, evaluation, EVALUATION, *stream, on_step=on_step)
    return episodes.returns.mean(1).tolist()


def eval_policy(agent: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """obs (S, N, O) -> deterministic actions (S, N, A), for one episode of each environment."""
    if hasattr(agent, "eval_policy"):  # several stacks, or an agent of before act_with_memory
        policy: Callable[[torch.Tensor], torch.Tensor] = agent.eval_policy()
        return policy
    if not hasattr(agent, "act_with_memory"):
        return functools.partial(agent.act, explore=False)
    memory = None

    def act(obs: torch.Tensor) -> torch.Tensor:
        nonlocal memory
        actions: torch.Tensor
        actions, memory = agent.act_with_memory(obs, memory)
        return actions

    return act


def run_episodes(agent: Any, envs: VectorEnvs, *stream: int, explore: bool = False,
                 on_step: OnStep = lambda *_: None) -> Episodes:
    """One episode of each environment, seeded from `stream`."""
    policy = functools.partial(agent.act, explore=True) if explore else eval_policy(agent)
    obs = envs.reset(*stream)
    returns = torch.zeros(envs.shape, dtype=torch.float64, device=obs.device)
    lengths, terminated = torch.zeros_like(returns), torch.zeros_like(returns, dtype=torch.bool)
    running = ~terminated
    limit = envs.spec.max_episode_steps or ENDLESS
    on_step(returns, running)
    for step in range(1, limit + 1):
        t = envs.step(policy(obs))
        obs = t.obs
        returns += torch.where(running, t.rewards, 0)
        lengths += running
        terminated |= running & (t.terminations > 0)
        running &= (t.terminations + t.truncations) == 0
        on_step(returns, running)
        look = step % LOOK_EVERY == 0 or step == limit or obs.device.type == "cpu"
        if look and not running.any():  # the host waits for the device
            return Episodes(returns, lengths, terminated)
    raise UserError(f"{envs.spec.id}: an evaluation episode does not end in {limit} steps; "
                    "register the environment with max_episode_steps")
