"""Evaluate trained policies on as many fresh episodes as you like.

    python -m lab.evaluate runs/sac-20260101-120000 --episodes 100
    python -m lab.evaluate runs/sac-20260101-120000/Hopper-v5/sac/seed_3 --which best --explore

Each seed plays other starts (and terrains) than in its training and in the run's own evaluations,
the same ones at each call. Writes a JSON file with every episode and a CSV file with one row each.
"""

import contextlib
import csv
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lab import accelerate, stats
from lab.command_line import parse_flags
from lab.envs.base import Transition, VecEnvConfig, is_torch
from lab.envs.host import SyncEnvs
from lab.envs.shard import FRESH
from lab.envs.spec import make_one
from lab.envs.torch_vec import TorchEnvs
from lab.errors import UserError, guarded
from lab.policy import Group, PolicyStack, TrainedRun, load_stack, open_run
from lab.report.fitted import Fitted
from lab.training import recorder
from lab.training.checkpoint import Which
from lab.training.evaluation import run_episodes

AT_ONCE = 25  # episodes of a seed that run side by side


@dataclass(frozen=True)
class Options:
    path: tyro.conf.Positional[Path]  # run folder, or one environment, agent or seed in it
    agent: Path | None = None  # agent file; none: the run's, if it has not changed since
    which: Which = "last"  # the last checkpoints, or each seed's weights at its best evaluation
    episodes: int = 100  # per seed
    # another environment to evaluate in, made without the run's --env-kwargs; none: the run's own
    env: str | None = None
    explore: bool = False  # act as in training, with exploration
    # name of the .json and .csv files; none: evaluation_<which>, in the folder of each agent on its
    # environment, or of the seed
    out: Path | None = None


class Episode(NamedTuple):
    """Raw, without the run's changes of the task; lengths in steps of the environment."""

    episode_return: float
    length: int
    terminated: bool  # otherwise truncated
    last_reward: float | None  # None: unknown, as in torch environments
    success: bool | None  # is_success of the last info; None: it has none


def run(argv: Sequence[str]) -> int:
    """Parse the flags, evaluate, print and write -> exit code."""
    options = parse_flags(Options, argv, __doc__)
    if options.out and options.out.name in ("", ".."):
        raise UserError(f"--out {options.out} names no file")
    if options.episodes < 1:
        raise UserError(f"--episodes must be at least 1, not {options.episodes}")
    accelerate.prepare_process()
    trained = open_run(options.path, options.agent)
    if options.out and len(trained.groups) > 1:
        ids = " ".join(group.env_id for group in trained.groups)
        raise UserError(f"--out names one result, but {trained.folder} has several environments "
                        f"({ids}): give the folder of one of them")
    outs = [options.out or group.folder / f"evaluation_{options.which}" for group in trained.groups]
    done = [out for out in outs if was_evaluated(out, options)]
    stays = done if len(done) < len(outs) else []  # evaluated before an interruption
    for out in outs:
        if out not in stays:
            check_free(out)
    for out in stays:
        print(f"{out}.json exists and stays")
    for group, out in zip(trained.groups, outs, strict=True):
        if out not in stays:
            result = evaluate_group(trained, group, options)
            show(result)
            write(result, out)
    return 0


def was_evaluated(out: Path, options: Options) -> bool:
    """Whether the files are there, of a command with these options."""
    if not all(path.exists() for path in files_of(out)):
        return False
    try:
        found = json.loads(files_of(out)[0].read_text())
        return (options.env in (None, found["environment"]) and options.which == found["which"]
                and (options.episodes, options.explore) == (
                    found["episodes_per_seed"], found["explore"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_free(out: Path) -> None:
    """UserError if the files exist or cannot be written."""
    for path in files_of(out):
        if path.exists():
            raise UserError(f"{path} exists: name another with --out")
        if not path.parent.is_dir():
            raise UserError(f"--out: there is no folder {path.parent}")


def files_of(out: Path) -> list[Path]:
    return [out.with_name(out.name + ending) for ending in (".json", ".csv")]


def evaluate_group(run: TrainedRun, group: Group, options: Options) -> dict[str, Any]:
    """-> what the JSON file holds."""
    env_id, kwargs = options.env or group.env_id, () if options.env else run.options.env_kwargs
    seeds, policies = list(group.stacks), None
    episodes: dict[int, list[Episode]] = {seed: [] for seed in seeds}
    # an agent that explores with what it did before counts on the number in training
    at_once = (run.options.num_envs or 1) if options.explore else AT_ONCE
    rounds = range(0, options.episodes, at_once)
    for first in track(rounds, "evaluating", transient=True, disable=not sys.stdout.isatty()):
        number = at_once if options.explore else min(at_once, options.episodes - first)
        config = VecEnvConfig(env_id, seeds, number, action_repeat=run.options.action_repeat,
                              env_kwargs=kwargs)
        with contextlib.closing(FreshTorch(config) if is_torch(env_id) else Fresh(config)) as envs:
            if policies is None:
                policies = load_stack(run, group, seeds, envs.spec, options.which)
                if options.explore and policies.with_memory:
                    raise UserError(f"--explore: {run.options.agent} explores with a memory that "
                                    "only training advances; leave it out")
                if not set(seeds) - set(policies.failed):
                    raise UserError(f"{group.folder}: seed {seeds[0]} failed in training")
            for seed, played in zip(seeds, envs.play(policies, first, options.explore),
                                    strict=True):
                episodes[seed] += played[:options.episodes - first]
            for index, value in envs.broken.items():
                raise UserError(f"{env_id} returned {value} to seed {seeds[index]}")
    assert policies
    return describe(run, env_id, kwargs, policies, episodes, options)


class Ending(gymnasium.Wrapper):
    """Keeps the end of the first episode after a seeded reset."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if seed is not None:
            self.total, self.length, self.ended = 0.0, 0, None
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.total += float(reward)
        self.length += 1
        if terminated or truncated:
            success = info.get("is_success")
            self.ended = Episode(self.total, self.length, bool(terminated), float(reward),
                                 None if success is None else bool(success))
        return obs, reward, terminated, truncated, info

    total: float
    length: int
    ended: Episode | None


def make_ending(env_id: str, **settings: Any) -> Ending:
    return Ending(make_one(env_id, **settings))


class Fresh(SyncEnvs):
    """Gymnasium environments that each play one episode."""

    def __init__(self, config: VecEnvConfig):
        super().__init__(config, make_ending)
        self.endings: list[Any] = [*self.shard.envs]

    def receive(self) -> Transition:
        """Step those whose episode still runs."""
        self.shard.step([i for i, one in enumerate(self.endings) if one.ended is None])
        return self.stepped()

    def play(self, policies: PolicyStack, first: int, explore: bool) -> list[list[Episode]]:
        """-> the episodes of each seed."""
        run_episodes(policies, self, FRESH, first, explore=explore)
        N = self.config.num_envs
        return [[one.ended for one in self.endings[i * N : (i + 1) * N]]
                for i in range(len(self.config.seeds))]


class FreshTorch(TorchEnvs):
    def play(self, policies: PolicyStack, first: int, explore: bool) -> list[list[Episode]]:
        """-> the episodes of each seed."""
        played = run_episodes(policies, self, FRESH, first, explore=explore)
        rows = torch.stack([x.double() for x in played], -1).tolist()
        return [[Episode(value, int(length), bool(terminated), None, None)
                 for value, length, terminated in row] for row in rows]


def describe(run: TrainedRun, env_id: str, kwargs: Sequence[str], policies: PolicyStack,
             episodes: dict[int, list[Episode]], options: Options) -> dict[str, Any]:
    """-> what the JSON file holds."""
    bound = run.options.failure_below if env_id in run.options.env else None
    # some environments have is_success only where it is True
    tells_success = any(e.success is not None for played in episodes.values() for e in played)
    seeds = {seed: {"step": policies.steps[seed]} | summary(played, bound, tells_success)
             | ({"best evaluation": policies.best[seed]} if policies.best else {})
             for seed, played in episodes.items()}
    counted = [row for seed, row in seeds.items() if seed not in policies.failed]
    _, low, high = stats.t_interval([row["return"] for row in counted])
    return {
        "run": run.folder.name, "agent": Path(run.options.agent).stem, "environment": env_id,
        "env_kwargs": list(kwargs), "action_repeat": run.options.action_repeat,
        "failure_below": bound, "which": options.which, "explore": options.explore,
        "episodes_per_seed": options.episodes, "failed_seeds": policies.failed,
        "mean": {name: statistics.fmean(row[name] for row in counted)
                 for name in counted[0] if name != "step"},
        "return_interval": None if len(counted) < 2 else [low, high], "seeds": seeds,
        "versions": recorder.versions(),
        "episodes": [{"seed": seed, "episode": number} | episode._asdict()
                     for seed, played in episodes.items() for number, episode in enumerate(played)]}


def summary(episodes: Sequence[Episode], failure_below: float | None, tells_success: bool
            ) -> dict[str, float]:
    """Means over the episodes of a seed; of yes or no, their share."""
    found = {"return": statistics.fmean(e.episode_return for e in episodes),
             "length": statistics.fmean(e.length for e in episodes),
             "terminated": statistics.fmean(e.terminated for e in episodes)}
    if failure_below is not None:
        found["failure"] = statistics.fmean(
            e.terminated and e.last_reward is not None and e.last_reward < failure_below
            for e in episodes)
    if tells_success:
        found["success"] = statistics.fmean(bool(e.success) for e in episodes)
    return found


def show(result: dict[str, Any]) -> None:
    """Print what was evaluated, and a table with a row for each seed and their mean."""
    names = list(result["mean"])
    table = Table()
    for name in ("seed", "step", *names):
        table.add_column(name, justify="right")
    for seed, row in result["seeds"].items():
        failed = " (failed in training)" * (seed in result["failed_seeds"])
        table.add_row(f"{seed}{failed}", str(row["step"]), *cells(row, names))
    table.add_section()
    table.add_row("mean", "", *cells(result["mean"], names))
    print(f"{result['agent']} on {result['environment']}, {result['which']} weights, "
          f"{result['episodes_per_seed']} fresh episodes of each seed, with"
          f"{'' if result['explore'] else 'out'} exploration")
    Console(markup=False).print(Fitted(table))
    if result["return_interval"]:
        low, high = result["return_interval"]
        print(f"95% t interval of the mean return over the seeds: {low:.1f} to {high:.1f}")
    if result["failure_below"] is not None:
        print(f"failure: terminated with a last reward below {result['failure_below']:g}")
    if result["which"] == "best":
        print("best evaluation: the one that chose these weights, so it is optimistic")


def cells(row: dict[str, float], names: Sequence[str]) -> list[str]:
    return [f"{row[name]:.{1 if name in ('return', 'length', 'best evaluation') else 2}f}"
            for name in names]


def write(result: dict[str, Any], out: Path) -> None:
    """Write the JSON and the CSV file. UserError if that fails."""
    as_json, as_csv = files_of(out)
    try:
        recorder.write_json(as_json, recorder.finite(result))
        with as_csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(result["episodes"][0]))
            writer.writeheader()
            writer.writerows(result["episodes"])
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    print(f"{as_json}\n{as_csv}")


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(sys.argv[1:])))
