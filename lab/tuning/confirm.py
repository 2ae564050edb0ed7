"""The end of a study: train the best settings and the defaults on held-out seeds."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from lab import stats
from lab.errors import UserError
from lab.options import Options, Simple, Tune
from lab.report import curves
from lab.stopping import stops
from lab.train import declared, describe
from lab.training import recorder
from lab.training.job import Job, join_stacks
from lab.training.processes import run_jobs
from lab.training.progress import SweepProgress
from lab.tuning import summary
from lab.tuning.study import HELD_OUT, Study
from lab.tuning.surrogate import Candidate, near_best


def check_seeds(folder: Path, options: Tune) -> None:
    """UserError if a rule to stop, which needs the mean of all seeds, would have to bear more."""
    if not stops(options):
        return
    for path in sorted(folder.glob("confirmed/*/config.json")):
        seeds = json.loads(path.read_text())["options"]["seeds"]
        if options.confirm_seeds > seeds:
            raise UserError(f"{folder} has a rule to stop, which needs the mean of all seeds: give "
                            f"--confirm-seeds {seeds}, as before")


class Failures(NamedTuple):
    """A line for each."""

    unfinished: list[str]  # jobs
    diverged: list[str]  # seeds


def train(study: Study, best: Sequence[Candidate]) -> Failures:
    """Train the best settings and the defaults on held-out seeds."""
    seeds = held_out(study)
    jobs = [dataclasses.replace(job, seeds=stack) for job in confirmed_jobs(study, best)
            for stack in join_stacks(study.options, job.group or Path(), seeds, 1 + len(best),
                                     study.workers)]
    jobs = [job for job in jobs if len(finals(job)) < len(job.seeds)]  # the rest are done
    for job in confirmed_jobs(study, best):
        describe_run(study, Path(job.run or ""), job.config)
    if not jobs:
        return Failures([], [])
    names = [Path(job.run or "").name for job in jobs]
    print(f"training {', '.join(dict.fromkeys(names))} on {len(seeds)} held-out seeds:", flush=True)
    reasons: dict[tuple[int, int], str] = {}  # of the job's seed
    with SweepProgress(jobs) as progress:
        def report(index: int, message: dict[str, Any]) -> None:
            progress.update(index, message)
            if "failed_seed" in message:
                reasons[index, message["failed_seed"]] = message["reason"]

        failures = run_jobs(jobs, study.workers, report, study.engine)
    return Failures(
        [f"{names[index]}: {reason}" for index, reason in failures.items()],
        [f"{names[index]}, seed {seed}: {reasons.get((index, seed), 'no last evaluation')}"
         for index, job in enumerate(jobs) if index not in failures
         for seed in job.seeds if seed not in finals(job)])


def describe_run(study: Study, run: Path, config: dict[str, Any]) -> None:
    """Write what a run folder needs to be resumed, made longer, watched and evaluated."""
    path, seeds = run / "config.json", study.options.confirm_seeds
    if path.exists():
        content = json.loads(path.read_text())
        content["options"]["seeds"] = max(seeds, content["options"]["seeds"])
        recorder.write_json(path, content)
        return
    job, kept = study.defaults, {field.name for field in dataclasses.fields(Options)}
    options = dataclasses.replace(
        Simple(**{name: getattr(study.options, name) for name in kept}),
        seeds=seeds, first_seed=HELD_OUT, processes=study.workers,
        eval_every=job.eval_every, log_every=job.log_every, runs=run.parent, name=run.name,
        config=None, resume=None)
    run.mkdir(parents=True, exist_ok=True)
    agent = study.folder / Path(options.agent).name  # as it was when the study began
    recorder.describe_run(run, agent, describe(options, config, run.name))


def held_out(study: Study) -> range:
    return range(HELD_OUT, HELD_OUT + study.options.confirm_seeds)


def confirmed_jobs(study: Study, best: Sequence[Candidate]) -> list[Job]:
    """One with all held-out seeds for the defaults, then for each of the best settings."""
    entries: list[tuple[str, dict[str, Any]]] = [("defaults", {})]
    entries += [(each.name, each.settings) for each in best]
    return [dataclasses.replace(
        study.defaults, seeds=tuple(held_out(study)), config=study.defaults.config | settings,
        run=str(study.folder / "confirmed" / name.replace(" ", "_"))) for name, settings in entries]


def finals(job: Job) -> dict[int, float]:
    """Seed -> final return, of the seeds that finished."""
    return curves.final_returns(job.group, job.seeds, job.steps) if job.group else {}


def show(study: Study, best: Sequence[Candidate], finished: bool) -> None:
    """Print the table; write study.png and, if the confirmation has finished, best.json. A setting
    that lost a seed does not win: the mean of the others would be better than its own."""
    options, seeds = study.options, held_out(study)
    confirmed = [list(finals(job).values()) for job in confirmed_jobs(study, best)]
    rows = [summary.Column("defaults", study.defaults.config, None, None, confirmed[0])] + [
        summary.Column(name, study.defaults.config | settings, mean, observed, returns)
        for (name, settings, mean, observed), returns in zip(best, confirmed[1:], strict=True)]
    Console(markup=False).print(summary.table(study.space, rows, len(seeds), declared(options)))
    print(near_best(study.trials))
    plot = study.folder / "study.png"
    title = (f"{study.defaults.name}: {Path(options.agent).stem} on {options.env[0]}, "
             f"{options.steps} steps{declared(options)}")
    summary.draw(plot, study.space, study.trials, title)
    print(f"plot:     {plot}")
    if not finished:
        print("not confirmed: some held-out seeds were not trained to the end. To train them:\n  "
              f"python hypertune.py --resume {study.folder}")
        return
    whole = [row for row in rows if len(row.confirmed) == len(seeds)]
    winner = max(whole or rows[:1], key=lambda row: stats.t_interval(row.confirmed)[0])
    kept = ("agent", "env", "env_kwargs", "steps", "action_repeat", "clip_reward", "failure_below",
            "eval_every", "eval_episodes", "eval_env", "stop_at", "stop_at_evals", "stop_plateau",
            "stop_rtol", "compile", "precision", "cuda")
    new = {"first_seed": len(study.trials) * options.seeds}  # the trials had those before
    source = {"init_from": str(options.init_from)} if options.init_from else {}
    recorder.write_json(study.folder / "best.json", {
        "name": f"best of {study.defaults.name}",
        "options": {key: getattr(options, key) for key in kept} | new | source,
        "config": winner.config,
        "study": {"is": winner.name, "confirmed": winner.confirmed, "defaults": confirmed[0],
                  "seeds": list(seeds)}})
    verdict = "nothing beat the defaults" if winner.name == "defaults" else f"best: {winner.name}"
    print(f"{verdict} on the held-out seeds\ntrain it: python learn_simple.py {options.agent} "
          f"--config {study.folder / 'best.json'} --seeds 4 --log")
