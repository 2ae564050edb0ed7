"""Film trained policies, seeds side by side, and print their returns.

    python -m lab.watch runs/sac-20260101-120000 --seeds 3 --episodes 3
    python -m lab.watch runs/sac-20260101-120000/Hopper-v5/sac/seed_3 --out hopper.mp4

Loads the last checkpoints and acts without exploration. In gymnasium environments, the episodes
are those of the run's own evaluation at that step: the first, the second, ...
"""

import contextlib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from lab import accelerate
from lab.agent import build_agent, restore_state
from lab.envs.base import Transition, VecEnvConfig, is_torch
from lab.envs.host import SyncEnvs
from lab.envs.torch_vec import TorchEnvs
from lab.errors import UserError, first_line, guarded
from lab.options import Vectorised, parse_args, parse_flags
from lab.training import checkpoint, recorder
from lab.training.evaluation import OnStep, eval_policy, evaluate
from lab.training.job import agent_steps
from lab.watch import camera, film


@dataclass(frozen=True)
class Options:
    path: tyro.conf.Positional[Path]  # run folder, or one environment, agent or seed in it
    agent: Path | None = None  # agent file; none: the run's, if it has not changed since
    seeds: int | None = None  # number of seeds side by side; none: 3, or fewer if the run has fewer
    episodes: int = 3  # episodes per seed, one after another
    width: int = 200  # width of one seed's tile, pixels
    max_seconds: float | None = None  # longest part of an episode to film; none: 5, in a window all
    out: Path | None = None  # .gif, or .mp4 (needs imageio-ffmpeg); none: watch.gif in the folder
    window: bool = False  # show the film in a window and write no file


@dataclass(frozen=True)
class Group:
    """The seeds of one agent on one environment."""

    folder: Path  # where the film goes
    env_id: str
    stacks: dict[int, Path]  # seed -> folder of the checkpoints that contain it


def run(argv: Sequence[str]) -> int:
    """Parse the flags, film and print -> exit code."""
    options = parse_flags(Options, argv, __doc__)
    for name, least in {"seeds": 1, "episodes": 1, "width": 50, "max_seconds": 0.1}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    accelerate.prepare_process()
    if not options.window:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame without a display
    folder = find_run(options.path)
    named = [str(options.agent)] if options.agent else []
    trained, config = parse_args(["--config", str(folder / "config.json"), *named],
                                 Vectorised)  # reads runs of learn_simple.py too
    assert isinstance(trained, Vectorised)
    if not named:
        check_source(folder, Path(trained.agent))
    groups = find(options.path, folder, trained.env)
    if options.out and len(groups) > 1:
        ids = " ".join(group.env_id for group in groups)
        raise UserError(f"--out writes one film, but {folder} has several environments ({ids}): "
                        "give the folder of one of them")
    for group in groups:
        watch(group, trained, config, options)
    return 0


def find_run(path: Path) -> Path:
    """The run folder that contains `path`."""
    if not os.path.isdir(path):  # False, too, if the name is too long
        raise UserError(f"no folder {path}")
    for folder in [path, *path.parents][:4]:
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"{path} is not in a run folder: found no config.json")


def find(path: Path, run: Path, env_ids: Sequence[str]) -> list[Group]:
    """The groups with checkpoints in `path`. UserError if there are none."""
    one = re.fullmatch(r"seed_(\d+)", path.name)
    stacks: defaultdict[Path, dict[int, Path]] = defaultdict(dict)
    for stack in run.glob("*/*/stack_*_*"):
        if stack.is_relative_to(path.parent if one else path) and any(stack.glob("step_*.pt")):
            stacks[stack.parent] |= dict.fromkeys(seeds_of(stack), stack)
    groups = []
    for folder, by_seed in sorted(stacks.items()):
        for env_id in env_ids:
            if recorder.group_folder(run, env_id, folder.name) == folder:
                chosen = {s: by_seed[s] for s in sorted(by_seed) if not one or s == int(one[1])}
                groups += [Group(path if one else folder, env_id, chosen)] if chosen else []
    if not groups:
        raise UserError(f"{path} has no checkpoint yet")
    return groups


def seeds_of(stack: Path) -> range:
    """The seeds of a folder stack_<first>_<last>."""
    first, last = map(int, stack.name.split("_")[1:])
    return range(first, last + 1)


def check_source(folder: Path, agent: Path) -> None:
    """UserError if the agent file has changed since the run: the weights may no longer fit it."""
    copy = folder / agent.name
    if not copy.is_file() or copy.read_bytes() != agent.read_bytes():
        raise UserError(f"{agent} has changed since {folder} started: choose the file to load, for "
                        f"example --agent {copy}")


def watch(group: Group, trained: Vectorised, config: dict[str, Any], options: Options) -> None:
    """Write or show one film and print the returns."""
    if options.seeds and options.seeds > len(group.stacks):
        raise UserError(f"--seeds {options.seeds}: {group.folder} has checkpoints of "
                        f"{len(group.stacks)} seeds")
    seeds = list(group.stacks)[: options.seeds or 3]
    out = None if options.window else options.out or group.folder / "watch.gif"
    seconds = options.max_seconds or (None if options.window else 5.0)
    output = film.open_output(out)
    with (contextlib.chdir(os.curdir),  # back to it: an environment may change it
          contextlib.closing(make_view(group.env_id, seeds, trained.env_kwargs,
                                       trained.action_repeat)) as view):
        policies = PolicyStack([
            load(group, stack, [seed for seed in seeds if group.stacks[seed] == stack], view,
                 trained, config)
            for stack in dict.fromkeys(group.stacks[seed] for seed in seeds)])
        print(f"{Path(trained.agent).stem} on {group.env_id}, {policies.describe(trained.steps)}",
              flush=True)
        shown = film.Film(output, seeds, view.fps, options.width, seconds)
        with contextlib.suppress(film.Closed):
            rollout(policies, view, shown, options.episodes)
    try:
        output.close()
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    if out:
        cut = f" (--max-seconds {seconds:g} of each episode)" if shown.cut else ""
        print(f"{out}: {shown.seconds:.1f} s{cut}, {out.stat().st_size / 1e6:.1f} MB")


def rollout(policies: "PolicyStack", view: "Filmed | FilmedTorch", shown: film.Film,
            episodes: int) -> None:
    """Roll out the policies, show the film and print the returns."""
    console, returns = Console(), []

    def print_row(title: str, cells: Sequence[str]) -> None:
        row = f"{title:12}" + "".join(f"{cell:>10}" for cell in cells)
        console.print(row, highlight=False, soft_wrap=True)

    def print_returns(title: str, values: Sequence[float]) -> None:
        print_row(title, [f"{value:.1f}" for value in [*values, np.mean(values)]])

    print_row("return", [*(f"seed {seed}" for seed in shown.seeds), "mean"])
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=view.spec.max_episode_steps)
        for number in range(1, episodes + 1):
            title = f"episode {number}"
            bar.reset(task, description=f"{title} of {episodes}")
            show = shown.episode(view.draw, f", {title}" if episodes > 1 else "")

            def on_step(so_far: torch.Tensor, running: torch.Tensor, show: OnStep = show) -> None:
                show(so_far, running)
                bar.advance(task)

            returns.append(evaluate(policies, view, policies.step, number - 1, on_step=on_step))
            print_returns(title, returns[-1])
    if episodes > 1:
        print_returns("mean", np.mean(returns, 0).tolist())


class Part(NamedTuple):
    """The agent of one stack, and which of its seeds to show."""

    agent: Any
    members: range  # all seeds of the stack
    wanted: list[int]  # the seeds to show
    step: int  # of the checkpoint
    failed: list[int]  # seeds that failed in training


def load(group: Group, stack: Path, wanted: list[int], view: "Filmed | FilmedTorch",
         trained: Vectorised, config: dict[str, Any]) -> Part:
    """UserError if the last checkpoint is damaged or does not fit the agent."""
    state = checkpoint.load_latest(stack)
    if state is None:
        raise UserError(f"{stack} has no intact checkpoint")
    members = seeds_of(stack)
    agent = build_agent(trained.agent, config, view.spec, members, trained.num_envs or 1,
                        agent_steps(trained), "cpu", lambda fn: fn)
    try:
        restore_state(agent, state["agent"])
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{stack} does not fit {trained.agent}: {type(error).__name__}: {reason}"
                        ) from error
    return Part(agent, members, wanted, state["step"], [members[i] for i in state["failed"]])


class PolicyStack:
    """The agents of several stacks as one policy for the wanted seeds."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = parts
        self.step = max(part.step for part in parts)

    def eval_policy(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """-> a function: obs (S, N, O) of the wanted seeds -> actions (S, N, A). The other seeds of
        a stack get zeros, and their actions are discarded."""
        policies = [eval_policy(part.agent) for part in self.parts]
        sizes = [len(part.wanted) for part in self.parts]

        def act(obs: torch.Tensor) -> torch.Tensor:
            actions = []
            for part, policy, part_obs in zip(self.parts, policies, obs.split(sizes), strict=True):
                indices = [part.members.index(seed) for seed in part.wanted]
                padded = obs.new_zeros(len(part.members), *obs.shape[1:])
                padded[indices] = part_obs
                actions.append(policy(padded)[indices])
            return torch.cat(actions)

        return act

    def describe(self, steps: int) -> str:
        reached = sorted({part.step for part in self.parts})
        text = f"after {' and '.join(map(str, reached))} steps"
        text += f" of {steps}" if reached[0] < steps else ""
        failed = [seed for part in self.parts for seed in part.wanted if seed in part.failed]
        return text + "".join(f"; seed {seed} failed in training" for seed in failed)


def make_view(env_id: str, seeds: Sequence[int], env_kwargs: Sequence[str] = (),
              action_repeat: int = 1) -> "Filmed | FilmedTorch":
    """One environment per seed on the CPU, with a camera. UserError if it cannot be rendered."""
    config = VecEnvConfig(env_id, seeds, env_kwargs=env_kwargs, action_repeat=action_repeat)
    if is_torch(env_id):
        return FilmedTorch(config)
    camera.check(env_id, env_kwargs)
    with contextlib.chdir(os.curdir):
        return Filmed(config)


class Filmed(SyncEnvs):
    def __init__(self, config: VecEnvConfig):
        super().__init__(config, camera.make)
        self.cameras: list[Any] = [*self.shard.envs]
        self.fps = self.cameras[0].fps / config.action_repeat  # a film shows each action once

    def reset(self, *stream: int) -> torch.Tensor:
        """The last number of the stream is the environment's index n within its seed."""
        self.shard.env_keys = [(seed, stream[-1]) for seed in self.config.seeds]
        return super().reset(*stream[:-1])

    def draw(self, index: int, running: bool) -> np.ndarray:
        one = self.cameras[index]
        return one.frame() if running else one.last


class FilmedTorch(TorchEnvs):
    """A torch environment, rendered by the gymnasium environment with the same state."""

    def __init__(self, config: VecEnvConfig):
        super().__init__(config)
        if self.env.twin is None:
            raise UserError(f"{config.env_id} cannot be rendered: no gymnasium environment has "
                            "the same state")
        self.camera = camera.make(self.env.twin)
        self.camera.reset()
        self.fps = self.camera.fps

    def reset(self, *stream: int) -> torch.Tensor:
        obs = super().reset(*stream)
        self.seen = self.state
        return obs

    def receive(self) -> Transition:
        # the state before a reset; NaN actions of a failed seed become 0
        self.seen = self.env.step(self.state, self.actions.nan_to_num(0, 0, 0))[0]
        return super().receive()

    def draw(self, index: int, running: bool) -> np.ndarray:
        scene: Any = self.camera.unwrapped
        scene.state = self.seen[index, 0].cpu().numpy()
        return self.camera.frame()

    def close(self) -> None:
        self.camera.close()


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(sys.argv[1:])))
