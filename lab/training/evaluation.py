"""The evaluation loop."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lab.envs.base import VectorEnvs
from lab.envs.generators import kept_generators
from lab.envs.shard import EVALUATION
from lab.errors import UserError

OnStep = Callable[[torch.Tensor, torch.Tensor], None]  # (S, N) each: returns so far, still running
ENDLESS = 10_000  # step limit for environments without max_episode_steps
LOOK_EVERY = 25  # steps after which the host looks on a GPU whether all episodes have ended


def evaluate(agent: Any, evaluation: VectorEnvs, *stream: int, on_step: OnStep = lambda *_: None
             ) -> list[float]:
    """-> the mean return of each seed, over one deterministic episode per environment. `on_step` is
    called before the first step and after each step. UserError if an episode does not end."""
    with kept_generators():  # training's environments may draw from them
        return _evaluate(agent, evaluation, stream, on_step)


def eval_policy(agent: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """obs (S, N, O) -> deterministic actions (S, N, A), for one episode of each environment."""
    if hasattr(agent, "eval_policy"):  # an agent with memory
        policy: Callable[[torch.Tensor], torch.Tensor] = agent.eval_policy()
        return policy
    return functools.partial(agent.act, explore=False)


def _evaluate(agent: Any, evaluation: VectorEnvs, stream: Sequence[int], on_step: OnStep
              ) -> list[float]:
    policy, obs = eval_policy(agent), evaluation.reset(EVALUATION, *stream)
    returns = torch.zeros(evaluation.shape, dtype=torch.float64, device=obs.device)
    running = torch.ones_like(returns, dtype=torch.bool)
    limit = evaluation.spec.max_episode_steps or ENDLESS
    on_step(returns, running)
    for step in range(1, limit + 1):
        t = evaluation.step(policy(obs))
        obs = t.obs
        returns += torch.where(running, t.rewards, 0)
        running &= (t.terminations + t.truncations) == 0
        on_step(returns, running)
        look = step % LOOK_EVERY == 0 or step == limit or obs.device.type == "cpu"
        if look and not running.any():  # the host waits for the device
            return returns.mean(1).tolist()
    raise UserError(f"{evaluation.spec.id}: an evaluation episode does not end in {limit} steps; "
                    "register the environment with max_episode_steps")
