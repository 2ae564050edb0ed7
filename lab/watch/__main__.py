"""Film trained policies, seeds side by side, and print their returns.

    python -m lab.watch runs/sac-20260101-120000 --seeds 3 --episodes 3
    python -m lab.watch runs/sac-20260101-120000/Hopper-v5/sac/seed_3 --out hopper.mp4

Loads the last checkpoints, or with --which best each seed's best weights, and acts without
exploration. In gymnasium environments, the episodes are those of the run's own evaluation at that
step: the first, the second, ...
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress

from lab import accelerate
from lab.command_line import parse_flags
from lab.envs.base import Transition, VecEnvConfig, is_torch
from lab.envs.host import SyncEnvs
from lab.envs.torch_vec import TorchEnvs
from lab.errors import UserError, guarded
from lab.options import as_flag
from lab.policy import Group, PolicyStack, TrainedRun, load_stack, open_run
from lab.training.checkpoint import Which
from lab.training.evaluation import OnStep, evaluate
from lab.watch import camera, film


@dataclass(frozen=True)
class Options:
    path: tyro.conf.Positional[Path]  # run folder, or one environment, agent or seed in it
    agent: Path | None = None  # agent file; none: the run's, if it has not changed since
    which: Which = "last"  # the last checkpoints, or each seed's weights at its best evaluation
    seeds: int | None = None  # number of seeds side by side; none: 3, or fewer if the run has fewer
    episodes: int = 3  # episodes per seed, one after another
    width: int = 200  # width of one seed's tile, pixels
    max_seconds: float | None = None  # longest part of an episode to film; none: 5, in a window all
    out: Path | None = None  # .gif, or .mp4 (needs imageio-ffmpeg); none: watch.gif in the folder
    window: bool = False  # show the film in a window and write no file


def run(argv: Sequence[str]) -> int:
    """Parse the flags, film and print -> exit code."""
    options = parse_flags(Options, argv, __doc__)
    for name, least in {"seeds": 1, "episodes": 1, "width": 50, "max_seconds": 0.1}.items():
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise UserError(f"{as_flag(name)} must be at least {least}, not {value}")
    accelerate.prepare_process()
    if not options.window:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame without a display
    trained = open_run(options.path, options.agent)
    if options.out and len(trained.groups) > 1:
        ids = " ".join(group.env_id for group in trained.groups)
        raise UserError(f"--out writes one film, but {trained.folder} has several environments "
                        f"({ids}): give the folder of one of them")
    for group in trained.groups:
        watch(group, trained, options)
    return 0


def watch(group: Group, run: TrainedRun, options: Options) -> None:
    """Write or show one film and print the returns."""
    if options.seeds and options.seeds > len(group.stacks):
        raise UserError(f"--seeds {options.seeds}: {group.folder} has checkpoints of "
                        f"{len(group.stacks)} seeds")
    seeds = list(group.stacks)[: options.seeds or 3]
    out = None if options.window else options.out or group.folder / "watch.gif"
    seconds = options.max_seconds or (None if options.window else 5.0)
    output = film.open_output(out)
    trained = run.options
    with (contextlib.chdir(os.curdir),  # back to it: an environment may change it
          contextlib.closing(make_view(group.env_id, seeds, trained.env_kwargs,
                                       trained.action_repeat)) as view):
        policies = load_stack(run, group, seeds, view.spec, options.which)
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


def rollout(policies: PolicyStack, view: "Filmed | FilmedTorch", shown: film.Film,
            episodes: int) -> None:
    """Roll out the policies, show the film and print the returns."""
    console, returns, step = Console(markup=False), [], max(policies.steps.values())

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

            returns.append(evaluate(policies, view, step, number - 1, on_step=on_step))
            print_returns(title, returns[-1])
    if episodes > 1:
        print_returns("mean", np.mean(returns, 0).tolist())


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
