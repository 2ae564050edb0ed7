"""Trained policies from run folders, for films, evaluation, export and your own program.

    policy = load_policy("runs/sac-20260101-120000", seed=3)
    action = policy(obs)
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch

from lab.agent import (
    build_agent,
    load_agent,
    needed_to_act,
    restore_state,
    restore_weights,
    saves_itself,
)
from lab.command_line import parse_args
from lab.envs.make import make_envs
from lab.envs.spec import EnvSpec
from lab.errors import UserError, first_line
from lab.options import Vectorised
from lab.training import checkpoint, recorder
from lab.training.checkpoint import Which
from lab.training.evaluation import eval_policy
from lab.training.job import agent_steps

Act = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Group:
    """The seeds of one agent on one environment."""

    folder: Path  # of this agent on this environment, or of its only seed
    env_id: str
    stacks: dict[int, Path]  # seed -> folder of the checkpoints that contain it


class TrainedRun(NamedTuple):
    folder: Path
    options: Vectorised  # of runs of learn_simple.py too
    config: dict[str, Any]  # the agent's
    groups: list[Group]


def open_run(path: Path, agent: Path | None = None) -> TrainedRun:
    """The run that contains `path`: a run folder, or one environment, agent or seed in it. `agent`:
    the file to load if the run's has changed. UserError if it has no checkpoints."""
    path = recorder.located(path)
    folder = recorder.find_run(path)
    named = [str(agent)] if agent else []
    options, config = parse_args(["--config", str(folder / "config.json"), *named], Vectorised)
    assert isinstance(options, Vectorised)
    if not named:
        refuse_changed(Path(options.agent), folder)
    return TrainedRun(folder, options, config, find(path, folder, options.env))


def find(path: Path, run: Path, env_ids: Sequence[str]) -> list[Group]:
    """The groups with checkpoints in `path`. UserError if there are none."""
    groups = []
    for folder, stacks in recorder.find_stacks(path).items():
        for env_id in env_ids:
            if recorder.group_folder(run, env_id, folder.name) == folder:
                own = path if recorder.is_seed(path) else folder
                groups.append(Group(own, env_id, stacks))
    if not groups:
        raise UserError(f"{path} has no checkpoint yet")
    return groups


def refuse_changed(agent: Path, folder: Path) -> None:
    """UserError if the agent's file has changed since the run: the weights may no longer fit it."""
    copy = folder / agent.name
    if not copy.is_file() or copy.read_bytes() != agent.read_bytes():
        raise UserError(f"{agent} has changed since {folder} started: choose the file to load, for "
                        f"example --agent {copy}")


class Part(NamedTuple):
    """The agent of one stack, and which of its seeds are wanted."""

    agent: Any
    members: range  # all seeds of the stack
    wanted: list[int]
    steps: dict[int, int]  # seed -> step of its weights
    failed: list[int]  # seeds that failed in training
    best: dict[int, float]  # seed -> the evaluation by which the best weights were picked


class PolicyStack:
    """The agents of several stacks as one policy for the wanted seeds."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts
        self.seeds = [seed for part in parts for seed in part.wanted]
        self.steps = {seed: part.steps[seed] for part in parts for seed in part.wanted}
        self.best = {seed: part.best[seed] for part in parts for seed in part.wanted if part.best}
        self.failed = [seed for part in parts for seed in part.wanted if seed in part.failed]
        self.with_memory = any(hasattr(part.agent, "act_with_memory") for part in parts)

    def act(self, obs: torch.Tensor, explore: bool) -> torch.Tensor:
        """obs (S, N, O) of the wanted seeds -> actions (S, N, A)."""
        return self._act(obs, [functools.partial(part.agent.act, explore=explore)
                               for part in self.parts])

    def eval_policy(self) -> Act:
        """The same without exploration, for one episode of each environment."""
        return functools.partial(self._act, acts=[eval_policy(part.agent) for part in self.parts])

    def _act(self, obs: torch.Tensor, acts: Sequence[Act]) -> torch.Tensor:
        """The other seeds of a stack get zeros, and their actions are discarded."""
        actions = []
        sizes = [len(part.wanted) for part in self.parts]
        for part, act, part_obs in zip(self.parts, acts, obs.split(sizes), strict=True):
            indices = [part.members.index(seed) for seed in part.wanted]
            padded = obs.new_zeros(len(part.members), *obs.shape[1:])
            padded[indices] = part_obs
            actions.append(act(padded)[indices])
        return torch.cat(actions)

    def describe(self, steps: int) -> str:
        reached = sorted(set(self.steps.values()))
        text = f"after {' and '.join(map(str, reached))} steps"
        text += f" of {steps}" if reached[0] < steps else ""
        text += ", each seed at its best evaluation" if self.best else ""
        return text + "".join(f"; seed {seed} failed in training" for seed in self.failed)


def load_stack(run: TrainedRun, group: Group, seeds: Sequence[int], spec: EnvSpec,
               which: Which = "last") -> PolicyStack:
    """The policies of these seeds of a group. UserError if a checkpoint is damaged or does not fit
    the agent."""
    return PolicyStack([
        load(run, stack, [seed for seed in seeds if group.stacks[seed] == stack], spec, which)
        for stack in dict.fromkeys(group.stacks[seed] for seed in seeds)])


def load(run: TrainedRun, stack: Path, wanted: list[int], spec: EnvSpec, which: Which) -> Part:
    members, path = recorder.members_of(stack), run.options.agent
    num_envs = run.options.num_envs or 1
    # only an agent that saves itself needs room for the replay
    steps = agent_steps(run.options) if saves_itself(load_agent(path).Agent) else num_envs
    agent = build_agent(path, run.config, spec, members, num_envs, steps, "cpu", lambda fn: fn)
    state = checkpoint.load_latest(stack, replay=saves_itself(agent))
    if state is None:
        raise UserError(f"{stack} has no intact checkpoint")
    best = checkpoint.best_of(state, stack) if which == "best" else {}
    try:
        restore_state(agent, state["agent"], needed_to_act(agent))
        if best:
            restore_weights(agent, best["weights"])
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{stack} does not fit {path}: {type(error).__name__}: {reason}") from error
    reached = best.get("steps") or [state["step"]] * len(members)
    return Part(agent, members, wanted, dict(zip(members, reached, strict=True)),
                [members[i] for i in state["failed"]],
                dict(zip(members, best.get("returns", ()), strict=False)))


class Policy:
    """One seed's policy, without exploration: obs (O,) -> action (A,), or (N, O) -> (N, A). Takes
    what numpy takes, gives float32 arrays in environment units. A policy with memory needs reset()
    where an episode begins."""

    def __init__(self, run: TrainedRun, group: Group, seed: int, which: Which, device: str):
        self.run, self.env_id, self.seed, self.which = run, group.env_id, seed, which
        self.spec = spec_of(run, group.env_id)
        self.device = torch.device(device)
        num_envs = run.options.num_envs or 1
        self.agent = build_agent(run.options.agent, run.config, self.spec, [seed], num_envs,
                                 num_envs, device, lambda fn: fn)
        if saves_itself(self.agent):
            raise UserError(f"{run.options.agent} saves itself: a single seed needs an agent with "
                            "STATE")
        self.step, self.evaluation = checkpoint.load_seed(
            group.stacks[seed], seed, which, self.agent, (1, 0))
        self.reset()
        self.folder = group.folder if recorder.is_seed(group.folder) else (
            group.folder / f"seed_{seed}")

    def reset(self) -> None:
        """Forget what came before, where an episode begins."""
        self.act = eval_policy(self.agent)

    def describe(self) -> str:
        value = "" if self.evaluation is None else f", evaluated at {self.evaluation:.1f}"
        return (f"{Path(self.run.options.agent).stem} on {self.env_id}, seed {self.seed} of "
                f"{self.run.folder.name}, {self.which} weights, step {self.step}{value}")

    def about(self) -> dict[str, Any]:
        """The same for a program, with the spaces and the number of steps an action is held."""
        options = self.run.options
        return {"agent": Path(options.agent).stem, "environment": self.env_id,
                "env_kwargs": list(options.env_kwargs), "run": self.run.folder.name,
                "seed": self.seed, "which": self.which, "step": self.step,
                "evaluation": self.evaluation, "action_repeat": options.action_repeat,
                "spaces": dataclasses.asdict(self.spec)}

    def __call__(self, obs: Any) -> np.ndarray:
        x = torch.as_tensor(np.asarray(obs, np.float32), device=self.device)
        if x.shape[-1:] != (self.spec.obs_dim,):
            raise UserError(f"{self.env_id} has observations of {self.spec.obs_dim} numbers, not "
                            f"of shape {tuple(x.shape)}")
        actions = self.act(x.reshape(1, -1, self.spec.obs_dim))
        return actions.reshape(*x.shape[:-1], -1).cpu().numpy()


def load_policy(path: str | Path, seed: int | None = None, which: Which = "last",
                agent: str | Path | None = None, device: str = "cpu") -> Policy:
    """The policy of one seed of a run; `path` may be the folder of an environment, agent or seed in
    it. `agent`: its file, if the run's has changed or lies elsewhere. UserError if there is no such
    policy."""
    if which not in get_args(Which):
        raise UserError(f"which must be {' or '.join(get_args(Which))}, not {which!r}")
    run = open_run(Path(path), Path(agent) if agent else None)
    if len(run.groups) > 1:
        folders = " or ".join(str(group.folder) for group in run.groups)
        raise UserError(f"{path} has several environments: give {folders}")
    (group,) = run.groups
    seeds = list(group.stacks)
    if (seed is None and len(seeds) > 1) or seed not in (None, *seeds):
        raise UserError(f"{path} has checkpoints of seeds {', '.join(map(str, seeds))}: choose one "
                        "of them")
    return Policy(run, group, seeds[0] if seed is None else seed, which, device)


def spec_of(run: TrainedRun, env_id: str) -> EnvSpec:
    """What the agent knew of its environment, which is made for it."""
    rules = {name: getattr(run.options, name) for name in ("action_repeat", "env_kwargs")}
    with (contextlib.chdir(os.curdir),
          contextlib.closing(make_envs(env_id, [0], **rules)) as envs):
        return envs.spec
