"""A study from its options to its table: trials in processes, confirmation, what is left behind.

    runs/studies/<name>/            no name: the agent's, with a stamp
        trials.jsonl                the truth, see tuning.Journal
        config.json  versions.json  <agent>.py  best.json  study.png
        trials/<n>/                 what a run leaves, its checkpoints until it ended
        confirmed/<n> or defaults/  what a run leaves
        tensorboard/trial_<n>/      TensorBoard: the HParams row and the curve of a trial
"""

import contextlib
import dataclasses
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lab import (
    agent_file,
    command,
    envs,
    recorder,
    report,
    space,
    stats,
    study_report,
    sweep,
    tuning,
)
from lab.accelerate import physical_cores
from lab.gym_envs import UserError
from lab.progress import StudyProgress, SweepProgress
from lab.rollout import Job
from lab.tuning import Trial

CONFIRM_FROM = 1_000_000  # the first held-out seed; those of the trials lie below
TOP = 3  # trials that are confirmed
# What may differ when a study goes on
FREE = ("trials", "workers", "confirm_seeds", "log_every", "checkpoint_every", "name", "runs",
        "config", "resume", "log", "space")


def tune(options: command.Tune, config: dict[str, Any]) -> int:
    """-> exit code: 0; 1 if no trial completed, or a confirmation failed."""
    searched, job = check(options, config)
    folder, journal = open_study(options, config, searched, job)
    with contextlib.closing(journal):
        study = Study(options, searched, job, folder, journal)
        print(f"study folder: {folder}\nafter a stop: python hypertune.py --resume {folder}\n"
              f"watch it:     tensorboard --logdir {folder / 'tensorboard'}", flush=True)
        study.run()
        lost = [f"trial {trial.number}: {trial.reason}" for trial in study.trials
                if trial.state == "failed"]
        best = tuning.ranked(searched, study.trials)
        if best:
            failures = confirm(study, [trial for trial, _ in best[:TOP]])
            show(study, best[:TOP])
        else:
            failures = ["no trial completed"]
    for reason in lost + failures:
        print(f"FAILED {reason}", file=sys.stderr)
    return 1 if failures else 0


def check(options: command.Tune, config: dict[str, Any]) -> tuple[space.Space, Job]:
    """-> the space, and the job of the defaults. UserError on all that can be known beforehand;
    nothing is written."""
    [job, *_] = command.make_jobs(options, config, 1, None)
    if len(options.env) != 1:
        raise UserError(f"a study is of one environment, not {' '.join(options.env)}")
    searched = space.read(options.space, agent_file.load(options.agent).Config, options.agent)
    if job.eval_every > options.steps:
        raise UserError(f"--steps {options.steps} is less than one evaluation: --eval-every is "
                        f"{job.eval_every}")
    if (options.n_warmup_steps or 0) < 0:
        raise UserError(f"--n-warmup-steps must be 0 or more, not {options.n_warmup_steps}")
    if options.trials * options.seeds > CONFIRM_FROM:
        raise UserError(f"--trials {options.trials} of --seeds {options.seeds} would train on "
                        f"held-out seeds, which start at {CONFIRM_FROM}")
    with contextlib.closing(envs.make(job.env_id, [0], 1, job.backend, job.device)) as one:
        spec = one.spec
    agent_file.check_contract(job.agent_path, config, spec, 1, job.device)
    for parameter in searched.parameters:
        for value in parameter.bounds():  # the agent itself knows what it takes
            agent_file.build(job.agent_path, config | {parameter.name: value}, spec, [0], 1, 1,
                             job.device, lambda fn: fn)
    return searched, job


def open_study(options: command.Tune, config: dict[str, Any], searched: space.Space, job: Job
               ) -> tuple[Path, tuning.Journal]:
    """-> its folder and its journal, new or to be gone on with. UserError if it is another's, or
    began with other settings."""
    settings = {key: str(value) if isinstance(value, Path) else value
                for key, value in dataclasses.asdict(options).items()}
    described = {"name": job.name, "options": settings, "config": config}
    agent, root = Path(options.agent), options.runs / "studies"
    if not options.name and not options.resume:
        folder = recorder.new_folder(root, job.name)
    else:
        folder = options.resume or root / recorder.safe_name(job.name)
    with recorder.writable(root):
        folder.mkdir(parents=True, exist_ok=True)
        journal = tuning.Journal(folder / "trials.jsonl")
    try:
        fixed = {key: value for key, value in settings.items() if key not in FREE}
        header = json.loads(json.dumps({"space": searched.texts(), "config": config} | fixed))
        if journal.header:
            _compare(folder, journal.header, header)
            command.check_source(folder, agent)
        else:
            recorder.describe_run(folder, agent, described)
            journal.append(header)
    except BaseException:
        journal.close()
        raise
    return folder, journal


def _compare(folder: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    for key, value in now.items():
        before = begun.get(key)
        if before == value:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            before, value = (" ".join(f"{k}={v}" for k, v in a.items() if b.get(k) != v) or "less"
                             for a, b in ((before, value), (value, before)))
        raise UserError(f"{folder} is a study with another {key}: {before}, not {value}; give "
                        "another --name")


class Study:
    """Its trials, and the processes that train them."""

    def __init__(self, options: command.Tune, searched: space.Space, job: Job, folder: Path,
                 journal: tuning.Journal):
        self.options, self.space, self.folder = options, searched, folder
        self.defaults, self.journal = job, journal
        self.workers = options.workers or physical_cores()
        self.trials = journal.trials()
        self.waiting = [trial for trial in self.trials if trial.state == "running"]
        self.retries = Counter[int]()
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # a view, made anew
        for trial in self.trials:
            self.draw_board(trial)

    def job(self, trial: Trial) -> Job:
        """Each trial has seeds of its own, so that one tried again tells something new."""
        first = trial.number * self.options.seeds
        return dataclasses.replace(
            self.defaults, config=self.defaults.config | trial.settings,
            seeds=tuple(range(first, first + self.options.seeds)),
            run=str(self.folder / "trials" / f"{trial.number:03}"))

    def run(self) -> None:
        """Until every trial has ended. KeyboardInterrupt leaves a study that can go on."""
        ranked = -1
        with sweep.Processes() as pool, StudyProgress(self.options, self.trials) as progress:
            while True:
                while len(pool.running) < self.workers and (
                        self.waiting or len(self.trials) < self.options.trials):
                    key = self.waiting[0].number if self.waiting else len(self.trials)
                    pool.start(key)  # it takes longer to start than the surrogate to think
                    trial = self.waiting.pop(0) if self.waiting else self.ask()
                    pool.give(key, self.job(trial))
                if not pool.running:
                    return
                ended = sum(trial.state != "running" for trial in self.trials)
                if ended > ranked:
                    ranked, best = ended, tuning.ranked(self.space, self.trials)
                    progress.best = best[0] if best else None
                progress.show()
                for key, message in pool.receive():
                    self.receive(self.trials[key], message, pool, progress)

    def ask(self) -> Trial:
        """A new trial; it stands in the journal before it trains."""
        settings = tuning.ask(self.space, self.trials, self.options.study_seed)
        trial = Trial(len(self.trials), settings)
        self.journal.append({"trial": trial.number, "settings": settings})
        self.trials.append(trial)
        return trial

    def receive(self, trial: Trial, message: dict[str, Any] | sweep.Failure | None,
                pool: sweep.Processes, progress: StudyProgress) -> None:
        if not isinstance(message, dict):
            self.over(trial, message, progress)
        elif trial.state != "running":
            return  # it has been told to end
        elif "failed_seed" in message:
            self.end(trial, "diverged", f"seed {message['failed_seed']}: {message['reason']}")
            pool.end(trial.number)
        else:
            progress.steps[trial.number] = message.get("step", 0)
            returns = [row["return/eval"] for row in message.get("rows", {}).values()
                       if "return/eval" in row]
            if returns and message["step"] not in trial.evaluations:
                self.evaluate(trial, message["step"], returns)
                if trial.state == "running" and self.options.prune and tuning.prune(
                        trial, self.trials, self.options.n_startup_trials, self.warmup):
                    self.end(trial, "pruned")
                    pool.end(trial.number)

    @property
    def warmup(self) -> int:
        given = self.options.n_warmup_steps
        return self.options.steps // 3 if given is None else given

    def evaluate(self, trial: Trial, step: int, returns: list[float]) -> None:
        self.journal.append({"trial": trial.number, "step": step, "returns": returns})
        trial.evaluations[step] = returns
        if step >= self.options.steps:
            self.end(trial, "completed")

    def end(self, trial: Trial, state: str, reason: str = "") -> None:
        self.journal.append({"trial": trial.number, "state": state, "reason": reason})
        trial.state, trial.reason = state, reason
        self.draw_board(trial)

    def over(self, trial: Trial, failure: sweep.Failure | None, progress: StudyProgress) -> None:
        """Its process has ended, in whatever state."""
        if trial.state == "running":
            if failure is None:
                self.catch_up(trial)
            elif failure.cause == "settings":
                self.end(trial, "diverged", failure.reason)
            elif self.retries[trial.number] < sweep.RETRIES:
                self.retries[trial.number] += 1
                self.waiting.insert(0, trial)
                progress.say(f"trial {trial.number}: {failure.reason}; it is tried again")
                return
            else:
                self.end(trial, "failed", failure.reason)
        if trial.reason:
            progress.say(f"trial {trial.number} {trial.state}: {trial.reason}")
        checkpoints = self.job(trial).checkpoints
        if checkpoints:
            shutil.rmtree(checkpoints, ignore_errors=True)

    def catch_up(self, trial: Trial) -> None:
        """It was resumed at its end: what was not journaled before a kill lies in its files."""
        job = self.job(trial)
        curves = report.read_curves(job.group, job.seeds, "return/eval") if job.group else {}
        for points in zip(*curves.values(), strict=False):
            step = points[0][0]
            if step not in trial.evaluations:
                self.evaluate(trial, step, [value for _, value in points])
        if trial.state == "running":
            self.end(trial, "failed", "it ended before its last evaluation")

    def draw_board(self, trial: Trial) -> None:
        """The HParams row and the curve in TensorBoard of a trial that ended with a value."""
        if trial.state not in ("completed", "pruned"):
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        with SummaryWriter(str(self.folder / "tensorboard" / f"trial_{trial.number:03}")) as board:
            for step, mean in sorted(trial.means.items()):
                board.add_scalar("return/eval", mean, step)
            shown = {name: value if isinstance(value, bool | int | float | str) else str(value)
                     for name, value in trial.settings.items()}
            board.add_hparams(shown | {"state": trial.state}, {"hparam/return_eval": trial.final},
                              run_name=".")


def confirm(study: Study, best: Sequence[Trial]) -> list[str]:
    """Train the best and the defaults on seeds that no trial has seen -> what failed."""
    seeds = held_out(study.options)
    jobs = [dataclasses.replace(study.defaults, seeds=share, config=config, run=str(run))
            for run, config in entries(study, best).items()
            for share in sweep.split_seeds(seeds, 1 + len(best), study.workers)]
    jobs = [job for job in jobs if len(finals(job)) < len(job.seeds)]  # confirmed before
    numbers = ", ".join(str(trial.number) for trial in best)
    print(f"the defaults and trials {numbers}, afresh on {len(seeds)} held-out seeds:", flush=True)
    with SweepProgress(jobs) as progress:
        failures = sweep.run(jobs, study.workers, progress.update) if jobs else {}
    lost = [f"{Path(jobs[place].run or '').name}: {why}" for place, why in failures.items()]
    diverged = [job for place, job in enumerate(jobs) if place not in failures
                and len(finals(job)) < len(job.seeds)]
    return lost + [f"{Path(job.run or '').name}: a seed is not finite" for job in diverged]


def held_out(options: command.Tune) -> range:
    return range(CONFIRM_FROM, CONFIRM_FROM + options.confirm_seeds)


def entries(study: Study, best: Sequence[Trial]) -> dict[Path, dict[str, Any]]:
    """The folder of each confirmation, and the agent's config: the defaults, then the best."""
    folder, config = study.folder / "confirmed", study.defaults.config
    return {folder / "defaults": config} | {
        folder / f"{trial.number:03}": config | trial.settings for trial in best}


def finals(job: Job) -> dict[int, float]:
    """The final return of each of its seeds that has got there."""
    return report.final_returns(job.group, job.seeds, job.steps) if job.group else {}


def show(study: Study, best: Sequence[tuple[Trial, float]]) -> None:
    """The table, best.json and the picture."""
    options, seeds = study.options, tuple(held_out(study.options))
    jobs = [dataclasses.replace(study.defaults, seeds=seeds, run=str(run))
            for run in entries(study, [trial for trial, _ in best])]
    confirmed = [list(finals(job).values()) for job in jobs]
    rows = [("defaults", study.defaults.config, None, confirmed[0])] + [
        (f"trial {trial.number}", study.defaults.config | trial.settings, mean, returns)
        for (trial, mean), returns in zip(best, confirmed[1:], strict=True)]
    Console().print(study_report.table(study.space, rows, len(seeds)))
    named = max(rows, key=lambda row: stats.t_interval(row[3])[0] if row[3] else float("-inf"))
    kept = ("agent", "env", "steps", "clip_reward", "eval_every", "eval_episodes", "compile",
            "precision", "cuda")
    recorder.write_json(study.folder / "best.json", {
        "name": f"best of {study.defaults.name}",
        "options": {key: getattr(options, key) for key in kept}, "config": named[1],
        "study": {"is": named[0], "confirmed": named[3], "seeds": list(seeds)}})
    picture = study.folder / "study.png"
    study_report.draw(picture, study.space, study.trials, f"{study.defaults.name}: "
                      f"{Path(options.agent).stem} on {options.env[0]}, {options.steps} steps")
    verdict = "nothing beat the defaults" if named[0] == "defaults" else f"best: {named[0]}"
    print(f"{verdict} on the held-out seeds\npicture: {picture}\ntrain it: python learn_simple.py "
          f"--config {study.folder / 'best.json'} --seeds 4 --log")
