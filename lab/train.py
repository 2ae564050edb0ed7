"""What the scripts do: a run from its options to the table at the end."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lab.errors import guarded
from lab.options import Options, Simple, parse_args, resolve_defaults
from lab.plan import candidates
from lab.report.curves import draw_learning_curves, final_returns, read_curves, table
from lab.training import recorder
from lab.training.job import Job, dry_run, make_jobs
from lab.training.processes import run_jobs
from lab.training.progress import SweepProgress


def run(argv: Sequence[str], kind: type[Options] = Simple,
        do: Callable[[Any, dict[str, Any]], int] | None = None) -> int:
    """Parse and do, which is to train and report -> exit code: 0, 1 if a job failed, 2 for bad
    input, 128 + signal."""
    def whole() -> int:
        options, config = parse_args(argv, kind)
        if getattr(options, "plan", False):
            options = candidates.apply_plan(options, config, argv)
        return (do or train)(options, config)

    return guarded(whole)


def train(options: Options, config: dict[str, Any]) -> int:
    options = resolve_defaults(options)
    processes = getattr(options, "processes", 1)
    jobs = make_jobs(options, config, processes, options.resume)
    for job in {job.env_id: job for job in jobs}.values():
        dry_run(job)

    folder = options.resume
    if not folder and options.log:
        folder = recorder.create_run_folder(options.runs, jobs[0].name, Path(options.agent),
                                            describe(options, config, jobs[0].name))
        jobs = [dataclasses.replace(job, run=str(folder)) for job in jobs]
    if folder:
        print(f"run folder: {folder}\nwatch it:   tensorboard --logdir {folder}", flush=True)

    summary = RunSummary(jobs, options)
    with SweepProgress(jobs) as progress:
        def report_message(index: int, message: dict[str, Any]) -> None:
            progress.update(index, message)
            summary.receive(jobs[index], message)

        failures = run_jobs(jobs, processes, report_message)
    for index, reason in sorted(failures.items()):
        summary.lose(jobs[index], jobs[index].seeds, reason)
    summary.show(folder)
    return 1 if summary.lost else 0


class RunSummary:
    """What becomes of the seeds: the board of all of them, final returns, losses."""

    def __init__(self, jobs: Sequence[Job], options: Options):
        self.options = options
        self.seeds = range(options.first_seed, options.first_seed + options.seeds)
        self.title, self.declared = jobs[0].name, declared(options)
        self.groups = {job.env_id: job.group for job in jobs if job.group}
        self.boards = {env_id: recorder.AllSeeds(group, self.seeds)
                       for env_id, group in self.groups.items()}
        self.final: dict[str, dict[int, float]] = {env_id: {} for env_id in options.env}
        self.lost: list[str] = []

    def receive(self, job: Job, message: dict[str, Any]) -> None:
        if "failed_seed" in message:
            self.lose(job, [message["failed_seed"]], message["reason"])
        returns = {seed: row["return/eval"] for seed, row in message.get("rows", {}).items()
                   if "return/eval" in row}
        if returns and message["step"] >= job.steps:
            self.final[job.env_id].update(returns)
        if returns and self.boards:
            self.boards[job.env_id].refresh()

    def lose(self, job: Job, seeds: Sequence[int], reason: str) -> None:
        """These seeds will not get to the end."""
        names = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
        self.lost.append(f"{job.env_id} {names}: {reason}")
        if self.boards:
            self.boards[job.env_id].alive -= set(seeds)

    def show(self, folder: Path | None) -> None:
        """The table, the picture, and where to look."""
        for env_id, group in self.groups.items():
            self.boards[env_id].refresh()
            self.final[env_id] = final_returns(group, self.seeds, self.options.steps)
        agent_name = Path(self.options.agent).stem
        title = f"{agent_name}: evaluation return after {self.options.steps} steps of each seed"
        title += self.declared
        Console().print(table(self.final, title))
        if folder:
            picture = folder / "learning_curves.png"
            curves = {env_id: read_curves(group, self.seeds, "return/eval")
                      for env_id, group in self.groups.items()}
            try:
                draw_learning_curves(picture, curves, self.title + self.declared)
            except OSError as error:
                print(f"no picture: {error}", file=sys.stderr)
            print(f"run folder: {folder}\npicture:    {picture}\n"
                  f"look at it: tensorboard --logdir {folder}")
        for reason in self.lost:
            print(f"FAILED {reason}", file=sys.stderr)


def declared(options: Options) -> str:
    """What changes the task or the training reward, for the titles of tables and pictures."""
    text = ""
    if options.env_kwargs:
        text += f", environment made with {' '.join(options.env_kwargs)}"
    if options.clip_reward:
        text += ", trained on rewards clipped to [{}, {}]".format(*options.clip_reward)
    return text


def describe(options: Options, config: dict[str, Any], name: str) -> dict[str, Any]:
    """What a config.json holds."""
    settings = {key: str(value) if isinstance(value, Path) else value
                for key, value in dataclasses.asdict(options).items()}
    return {"name": name, "options": settings, "config": config}
