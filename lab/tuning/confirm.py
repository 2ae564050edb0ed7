"""The end of a study: train the best settings and the defaults on held-out seeds."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lab import stats
from lab.options import Options, Simple
from lab.report import curves
from lab.train import declared, describe
from lab.training import recorder
from lab.training.job import Job, shares_of
from lab.training.processes import run_jobs
from lab.training.progress import SweepProgress
from lab.tuning import summary
from lab.tuning.study import HELD_OUT, Study
from lab.tuning.surrogate import Candidate, near_best


def train(study: Study, best: Sequence[Candidate]) -> list[str]:
    """Train the best settings and the defaults on held-out seeds -> the failures, a line each."""
    seeds = held_out(study)
    jobs = [dataclasses.replace(study.defaults, seeds=share, config=config, run=str(run))
            for run, config in entries(study, best).items()
            for share in shares_of(study.options, seeds, 1 + len(best), study.workers)]
    jobs = [job for job in jobs if len(finals(job)) < len(job.seeds)]  # the rest are done
    for run, config in entries(study, best).items():
        describe_run(study, run, config)
    names = ", ".join(candidate.name for candidate in best)
    print(f"training the defaults, {names} on {len(seeds)} held-out seeds:", flush=True)
    with SweepProgress(jobs) as progress:
        failures = run_jobs(jobs, study.workers, progress.update, study.engine) if jobs else {}
    lost = [f"{Path(jobs[index].run or '').name}: {why}" for index, why in failures.items()]
    diverged = [job for index, job in enumerate(jobs) if index not in failures
                and len(finals(job)) < len(job.seeds)]
    return lost + [f"{Path(job.run or '').name}: a seed diverged" for job in diverged]


def describe_run(study: Study, run: Path, config: dict[str, Any]) -> None:
    """Write what a run folder needs to be resumed, made longer, watched and evaluated."""
    if (run / "config.json").exists():
        return
    job, kept = study.defaults, {field.name for field in dataclasses.fields(Options)}
    options = dataclasses.replace(
        Simple(**{name: getattr(study.options, name) for name in kept}),
        seeds=study.options.confirm_seeds, first_seed=HELD_OUT, processes=study.workers,
        eval_every=job.eval_every, log_every=job.log_every, runs=run.parent, name=run.name,
        config=None, resume=None)
    run.mkdir(parents=True, exist_ok=True)
    recorder.describe_run(run, Path(options.agent), describe(options, config, run.name))


def held_out(study: Study) -> range:
    return range(HELD_OUT, HELD_OUT + study.options.confirm_seeds)


def entries(study: Study, best: Sequence[Candidate]) -> dict[Path, dict[str, Any]]:
    """Run folder -> the agent's config: the defaults, then the best settings."""
    folder, config = study.folder / "confirmed", study.defaults.config
    return {folder / "defaults": config} | {
        folder / name.replace(" ", "_"): config | settings for name, settings, *_ in best}


def finals(job: Job) -> dict[int, float]:
    """Seed -> final return, of the seeds that finished."""
    return curves.final_returns(job.group, job.seeds, job.steps) if job.group else {}


def show(study: Study, best: Sequence[Candidate]) -> None:
    """Print the table; write best.json and study.png."""
    options, seeds = study.options, tuple(held_out(study))
    jobs = [dataclasses.replace(study.defaults, seeds=seeds, run=str(run))
            for run in entries(study, best)]
    confirmed = [list(finals(job).values()) for job in jobs]
    rows = [summary.Column("defaults", study.defaults.config, None, None, confirmed[0])] + [
        summary.Column(name, study.defaults.config | settings, mean, observed, returns)
        for (name, settings, mean, observed), returns in zip(best, confirmed[1:], strict=True)]
    Console().print(summary.table(study.space, rows, len(seeds), declared(options)))
    print(near_best(study.trials))
    winner = max(rows, key=lambda row: stats.t_interval(row.confirmed)[0] if row.confirmed
                 else float("-inf"))
    kept = ("agent", "env", "env_kwargs", "steps", "action_repeat", "clip_reward", "failure_below",
            "eval_every", "eval_episodes", "eval_env", "stop_at", "stop_at_evals", "stop_plateau",
            "stop_rtol", "compile", "precision", "cuda")
    recorder.write_json(study.folder / "best.json", {
        "name": f"best of {study.defaults.name}",
        "options": {key: getattr(options, key) for key in kept}, "config": winner.config,
        "study": {"is": winner.name, "confirmed": winner.confirmed, "defaults": confirmed[0],
                  "seeds": list(seeds)}})
    plot = study.folder / "study.png"
    title = (f"{study.defaults.name}: {Path(options.agent).stem} on {options.env[0]}, "
             f"{options.steps} steps{declared(options)}")
    summary.draw(plot, study.space, study.trials, title)
    verdict = "nothing beat the defaults" if winner.name == "defaults" else f"best: {winner.name}"
    print(f"{verdict} on the held-out seeds\nplot:     {plot}\ntrain it: python learn_simple.py "
          f"--config {study.folder / 'best.json'} --seeds 4 --log")
