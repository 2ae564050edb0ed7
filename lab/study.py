"""A study from its options to its table: trials in processes, confirmation, what is left behind.

    runs/studies/<name>/            no name: the agent's, with a stamp
        trials.jsonl                the truth, see tuning.Journal
        config.json  versions.json  <agent>.py  best.json  study.png
        trials/<n>/                 what a run leaves, its checkpoints until it ended
        confirmed/<its name>/       what a run leaves
        tensorboard/trial_<n>/      TensorBoard: the HParams row and the curve of a trial
"""

import contextlib
import dataclasses
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from lab import agent_file, arguments, command, confirm, recorder, report, space, sweep, tuning
from lab.accelerate import physical_cores
from lab.gym_envs import UserError
from lab.progress import StudyProgress
from lab.rollout import Job
from lab.tuning import Trial

TOP = 3  # settings that are confirmed
# What may differ when a study goes on
FREE = ("trials", "workers", "confirm_seeds", "log_every", "checkpoint_every", "name", "runs",
        "config", "resume", "log", "space")


def tune(options: arguments.Tune, config: dict[str, Any]) -> int:
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
        best = tuning.recommend(searched, study.trials, TOP)
        if best:
            failures = confirm.train(study, best)
            confirm.show(study, best)
        else:
            failures = ["no trial completed"]
    for reason in lost + failures:
        print(f"FAILED {reason}", file=sys.stderr)
    return 1 if failures else 0


def check(options: arguments.Tune, config: dict[str, Any]) -> tuple[space.Space, Job]:
    """-> the space, and the job of the defaults. UserError on all that can be known beforehand;
    nothing is written."""
    [job, *_] = sweep.make_jobs(options, config, 1, None)
    if len(options.env) != 1:
        raise UserError(f"a study is of one environment, not {' '.join(options.env)}")
    searched = space.read(options.space, agent_file.load(options.agent).Config, options.agent)
    if job.eval_every > options.steps:
        raise UserError(f"--steps {options.steps} is less than one evaluation: --eval-every is "
                        f"{job.eval_every}")
    if (options.n_warmup_steps or 0) < 0:
        raise UserError(f"--n-warmup-steps must be 0 or more, not {options.n_warmup_steps}")
    if options.trials * options.seeds > confirm.HELD_OUT:
        raise UserError(f"--trials {options.trials} of --seeds {options.seeds} would train on "
                        f"held-out seeds, which start at {confirm.HELD_OUT}")
    spec = sweep.rehearse(job)
    for parameter in searched.parameters:
        for value in parameter.bounds():  # the agent itself knows what it takes
            agent_file.build(job.agent_path, config | {parameter.name: value}, spec, [0], 1, 1,
                             job.device, lambda fn: fn)
    return searched, job


def open_study(options: arguments.Tune, config: dict[str, Any], searched: space.Space, job: Job
               ) -> tuple[Path, tuning.Journal]:
    """-> its folder and its journal, new or to be gone on with. UserError if it is another's, or
    began with other settings."""
    described = command.describe(options, config, job.name)
    agent, root = Path(options.agent), options.runs / "studies"
    if not options.name and not options.resume:
        folder = recorder.new_folder(root, job.name)
    else:
        folder = options.resume or root / recorder.safe_name(job.name)
    with recorder.writable(root):
        folder.mkdir(parents=True, exist_ok=True)
        journal = tuning.Journal(folder / "trials.jsonl")
    try:
        fixed = {key: value for key, value in described["options"].items()
                 if key not in FREE}
        header = json.loads(json.dumps({"space": searched.texts(), "config": config} | fixed))
        if journal.header:
            _compare(folder, journal.header, header)
            command.check_source(folder, agent)
            recorder.write_json(folder / "config.json", described)
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

    def __init__(self, options: arguments.Tune, searched: space.Space, job: Job, folder: Path,
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
            if "step" in message:
                progress.reach(trial.number, message["step"])
            returns = [row["return/eval"] for row in message.get("rows", {}).values()
                       if "return/eval" in row]
            if returns:
                self.evaluate(trial, message["step"], returns)
                if trial.state == "running" and self.falls_behind(trial, message["step"]):
                    self.end(trial, "pruned")
                    pool.end(trial.number)

    def evaluate(self, trial: Trial, step: int, returns: list[float]) -> None:
        """A trial that goes on from its checkpoint may tell again what stands in the journal."""
        if step not in trial.evaluations:
            self.journal.append({"trial": trial.number, "step": step, "returns": returns})
            trial.evaluations[step] = returns
        if step >= self.options.steps:
            self.end(trial, "completed")

    def falls_behind(self, trial: Trial, step: int) -> bool:
        given, steps = self.options.n_warmup_steps, self.options.steps
        return self.options.prune and step == max(trial.evaluations) and tuning.prune(
            trial, self.trials, self.options.n_startup_trials,
            steps // 3 if given is None else given)

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
            self.evaluate(trial, points[0][0], [value for _, value in points])
        if trial.state == "running":
            self.end(trial, "failed", "it ended before its last evaluation")

    def draw_board(self, trial: Trial) -> None:
        """The HParams row and the curve in TensorBoard of a trial that ended with a value."""
        if trial.state not in ("completed", "pruned"):
            return
        folder = self.folder / "tensorboard" / f"trial_{trial.number:03}"
        with recorder.tensorboard(folder) as board:
            for step, mean in sorted(trial.means.items()):
                board.add_scalar("return/eval", mean, step)
            recorder.add_hparams(board, trial.settings | {"state": trial.state}, trial.final)
