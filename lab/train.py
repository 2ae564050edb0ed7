"""The main function of the scripts: from the command line to the table of results."""

import dataclasses
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lab import tracking
from lab.command_line import given_flags, parse_args, with_yaml
from lab.errors import UserError, guarded
from lab.matmul import Products
from lab.options import Options, Simple, check_options, refuse_unused, resolve_defaults
from lab.plan import candidates
from lab.report.curves import draw_learning_curves, final_returns, read_curves, table
from lab.report.runs import changes, origins, seed_names
from lab.stopping import stops
from lab.training import checkpoint, recorder
from lab.training.job import Job, choose_fp32_library, dry_run, make_jobs
from lab.training.processes import Engine, run_jobs
from lab.training.progress import SweepProgress
from lab.training.ray_processes import open_engine


def run(argv: Sequence[str], kind: type[Options] = Simple,
        do: Callable[[Any, dict[str, Any]], int] | None = None) -> int:
    """Parse argv and call `do`, by default `train` -> exit code: 0, 1 if a job failed, 2 for
    invalid input, 128 + signal."""
    def main() -> int:
        options, config = parse_args(argv, kind)
        check_options(options)
        refuse_unused(options, given_flags(with_yaml(argv, kind)))
        if getattr(options, "plan", False):
            options = candidates.apply_plan(options, config, argv)
        return (do or train)(options, config)

    return guarded(main)


def train(options: Options, config: dict[str, Any]) -> int:
    """Train all jobs, print and plot the results -> exit code."""
    options = resolve_defaults(options)
    tracking.check(getattr(options, "track", None))
    jobs = make_jobs(options, config, getattr(options, "processes", 1) or 1, options.resume)
    largest = {job.env_id: job for job in sorted(jobs, key=lambda job: job.instances)}
    products = Products()
    for job in largest.values():
        products.update(dry_run(job)[1])
    options = choose_fp32_library(options, jobs, products)
    where = options.resume or (options.runs if options.log else None)
    with open_engine(options, where) as engine:
        return _train(options, config, engine)


def _train(options: Options, config: dict[str, Any], engine: Engine | None) -> int:
    if engine and isinstance(options, Simple) and options.processes is None:
        options = dataclasses.replace(options, processes=engine.cpus)
    processes = getattr(options, "processes", 1)
    jobs = make_jobs(options, config, processes, options.resume)
    folder = options.resume
    if folder:
        with recorder.writable(folder, new=False), tempfile.TemporaryFile(dir=folder):
            extend(folder, options)
            changed = recorder.note_versions(folder)
        if changed:
            print(f"warning: resumed with {', '.join(changed)}", file=sys.stderr)
    if not folder and options.log:
        folder = recorder.create_run_folder(options.runs, jobs[0].name, Path(options.agent),
                                            describe(options, config, jobs[0].name))
        jobs = [dataclasses.replace(job, run=str(folder)) for job in jobs]
    if folder:
        print(f"run folder: {folder}\ncurves:     tensorboard --logdir {folder}", flush=True)

    summary = RunSummary(jobs, options)
    with tracking.tracked(getattr(options, "track", None), folder) as tracker:
        with SweepProgress(jobs) as progress:
            def report_message(index: int, message: dict[str, Any]) -> None:
                progress.update(index, message)
                summary.receive(jobs[index], message)
                if tracker:
                    tracker.receive(jobs[index], message)

            failures = run_jobs(jobs, processes, report_message, engine)
        for index, reason in sorted(failures.items()):
            summary.add_failure(jobs[index], jobs[index].seeds, reason)
        summary.show(folder)
    return 1 if summary.failures else 0


def extend(folder: Path, options: Options) -> None:
    """Note in its config.json that a run is longer or has more seeds than before. UserError if it
    has not finished."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    before = content["options"]
    if (options.steps, options.seeds) == (before["steps"], before["seeds"]):
        return
    if options.seeds > before["seeds"] and stops(options):
        raise UserError(f"{folder} has a rule to stop, which needs the mean of all seeds: it gets "
                        "no more seeds; start a new run with --config")
    found = recorder.find_stacks(folder)
    seeds = range(before["first_seed"], before["first_seed"] + before["seeds"])
    for env_id in before["env"]:
        group = recorder.group_folder(folder, env_id, Path(options.agent).stem)
        stacks = found.get(group, {})
        if stop := recorder.read_stop(group):
            raise UserError(f"{group} stopped at step {stop['step']} by its rule: it gets no "
                            "more steps or seeds: start a new run with --config")
        for stack in dict.fromkeys(map(stacks.get, seeds)):  # None: not begun
            step = checkpoint.last_step(stack) if stack else 0
            if step < before["steps"] and not (stack and _all_failed(stack)):
                raise UserError(f"{stack or group} is at step {step} of {before['steps']}: finish "
                                "the run first, with --resume alone")
    content["options"] = before | {"steps": options.steps, "seeds": options.seeds,
                                   "extended": options.extended}
    recorder.write_json(path, content)


def _all_failed(stack: Path) -> bool:
    """Whether a stack ended early because all its seeds failed."""
    state = checkpoint.load_latest(stack, replay=False)
    return state is not None and len(state["failed"]) == len(recorder.members_of(stack))


class RunSummary:
    """Collects final returns and failures of the seeds, and updates the means over all seeds."""

    def __init__(self, jobs: Sequence[Job], options: Options):
        self.options = options
        self.seeds = range(options.first_seed, options.first_seed + options.seeds)
        self.title, self.declared = jobs[0].name, declared(options)
        self.tag = recorder.reported_return(options.eval_env)
        self.kind = "training return" if options.eval_env == "none" else "evaluation return"
        self.groups = {job.env_id: job.group for job in jobs if job.group}
        self.all_seeds = {env_id: recorder.AllSeeds(group, self.seeds)
                          for env_id, group in self.groups.items()}
        self.evaluated = {env_id: defaultdict[int, set[int]](set) for env_id in options.env}
        self.final: dict[str, dict[int, float]] = {env_id: {} for env_id in options.env}
        self.stops: dict[str, dict[str, Any]] = {}  # environment -> step, reason
        self.failures: list[str] = []
        self.failed: dict[str, set[int]] = {env_id: set() for env_id in options.env}

    def receive(self, job: Job, message: dict[str, Any]) -> None:
        if "failed_seed" in message:
            self.add_failure(job, [message["failed_seed"]], message["reason"])
        if message.get("unsaved"):
            self.failures.append(f"{job.env_id} {seed_names(job.seeds)}: {message['warning']}")
        returns = {seed: row[self.tag] for seed, row in message.get("rows", {}).items()
                   if self.tag in row}
        if "stopped" in message:
            self.stops[job.env_id] = {"step": message["step"], "reason": message["stopped"]}
        if returns and (message["step"] >= job.steps or job.env_id in self.stops):
            self.final[job.env_id].update(returns)
        if returns and self.all_seeds:
            band, evaluated = self.all_seeds[job.env_id], self.evaluated[job.env_id]
            evaluated[message["step"]] |= set(returns)
            if band.alive <= evaluated[message["step"]]:  # it reads the files of all seeds
                band.refresh()

    def add_failure(self, job: Job, seeds: Sequence[int], reason: str) -> None:
        """Seeds that stopped before the last step. A job that starts again names its own again."""
        if self.failed[job.env_id].issuperset(seeds):
            return
        self.failed[job.env_id] |= set(seeds)
        self.failures.append(f"{job.env_id} {seed_names(seeds)}: {reason}")
        if self.all_seeds:
            self.all_seeds[job.env_id].alive -= set(seeds)

    def label(self, env_id: str) -> str:
        stop = self.stops.get(env_id)
        return f"{env_id}, stopped at step {stop['step']}" if stop else env_id

    def show(self, folder: Path | None) -> None:
        """Print the table, the paths and the failures; draw the learning curves."""
        for env_id, group in self.groups.items():
            band = self.all_seeds[env_id]
            if self.evaluated[env_id] or len(band.alive) == len(self.seeds):
                band.refresh()  # otherwise another process may train the run
            if stop := recorder.read_stop(group):
                self.stops[env_id] = stop
            written = final_returns(group, self.seeds, self.options.steps, self.tag)
            self.final[env_id] |= written  # keeps what a full disk did not take
            lost = sorted(self.final[env_id].keys() - written.keys() - self.failed[env_id])
            if lost:
                self.failures.append(f"{env_id} {seed_names(lost)}: the last row was not written")
        agent_name = Path(self.options.agent).stem
        most = "at most " if self.stops else ""
        title = f"{agent_name}: {self.kind} after {most}{self.options.steps} steps of each seed"
        title += self.declared
        for env_id, stop in self.stops.items():
            title += f"; {self.label(env_id)}: {stop['reason']}"
        Console(markup=False).print(table(self.final, title))
        if folder:
            plot = folder / "learning_curves.png"
            curves = {self.label(env_id): read_curves(group, self.seeds, self.tag)
                      for env_id, group in self.groups.items()}
            print(f"run folder: {folder}")
            try:
                draw_learning_curves(plot, curves, self.title + self.declared, self.kind)
                print(f"plot:       {plot}")
            except OSError as error:
                print(f"cannot write the plot: {error}", file=sys.stderr)
            print(f"curves:     tensorboard --logdir {folder}")
        for reason in self.failures:
            print(f"FAILED {reason}", file=sys.stderr)


def declared(options: Options) -> str:
    """What changes the task, for the titles of tables and pictures."""
    text = ""
    if options.env_kwargs:
        text += f", environment made with {' '.join(options.env_kwargs)}"
    if options.eval_env != "own":
        text += {"same": ", evaluated in the environments of training", "none": ", no evaluation"
                 }[options.eval_env]
    told = changes(vars(options)) + origins(vars(options))
    return text + "".join(f", {each}" for each in told)


def describe(options: Options, config: dict[str, Any], name: str) -> dict[str, Any]:
    """The contents of config.json."""
    settings = {key: str(value) if isinstance(value, Path) else value
                for key, value in dataclasses.asdict(options).items()}
    return {"name": name, "options": settings, "config": config}
