"""Trials in parallel processes."""

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from lab.accelerate import physical_cores
from lab.options import Tune
from lab.report.curves import read_curves
from lab.training import recorder
from lab.training.job import Job
from lab.training.processes import RETRIES, Engine, Failure, Processes
from lab.tuning import pruner, surrogate
from lab.tuning.progress import StudyProgress
from lab.tuning.space import Space
from lab.tuning.trials import Journal, Trial

HELD_OUT = 1_000_000  # the first held-out seed; trials use seeds below it


class Study:
    """The trials of a study and the processes that train them."""

    def __init__(self, options: Tune, searched: Space, job: Job, folder: Path, journal: Journal,
                 engine: Engine | None):
        self.options, self.space, self.folder = options, searched, folder
        self.defaults, self.journal = job, journal
        self.engine = engine
        self.workers = options.workers or (engine.cpus if engine else physical_cores())
        self.trials = journal.trials()
        self.waiting = [trial for trial in self.trials if trial.state == "running"]
        self.retries = Counter[int]()
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)  # rebuilt from the journal
        for trial in self.trials:
            self.draw_board(trial)
            if trial.state != "running":  # a kill may have come in between
                self.remove_checkpoints(trial)

    def job(self, trial: Trial) -> Job:
        """Each trial has its own seeds, so repeating a setting adds information."""
        first = trial.number * self.options.seeds
        return dataclasses.replace(
            self.defaults, config=self.defaults.config | trial.settings,
            seeds=tuple(range(first, first + self.options.seeds)),
            run=str(self.folder / "trials" / f"{trial.number:03}"))

    def processes(self) -> Processes:
        if self.engine:
            return self.engine.processes(min(self.workers, self.options.trials))
        return Processes()

    def run(self) -> None:
        """Run trials until all have ended. The study can be resumed after a KeyboardInterrupt."""
        ranked = -1
        with (self.processes() as pool,
              StudyProgress(self.options, self.trials) as progress):
            while True:
                while len(pool.running) < self.workers and (
                        self.waiting or len(self.trials) < self.options.trials):
                    key = self.waiting[0].number if self.waiting else len(self.trials)
                    pool.start(key)  # imports while the surrogate is fitted
                    trial = self.waiting.pop(0) if self.waiting else self.ask()
                    pool.give(key, self.job(trial))
                if not pool.running:
                    return
                ended = sum(trial.state != "running" for trial in self.trials)
                if ended > ranked:
                    ranked, best = ended, surrogate.ranked(self.space, self.trials)
                    progress.best = best[0] if best else None
                progress.show()
                for key, message in pool.receive():
                    self.receive(self.trials[key], message, pool, progress)

    def ask(self) -> Trial:
        """A new trial, written to the journal before it trains."""
        settings = surrogate.ask(self.space, self.trials, self.options.study_seed)
        trial = Trial(len(self.trials), settings)
        self.journal.append({"trial": trial.number, "settings": settings})
        self.trials.append(trial)
        return trial

    def receive(self, trial: Trial, message: dict[str, Any] | Failure | None,
                pool: Processes, progress: StudyProgress) -> None:
        if not isinstance(message, dict):
            self.process_ended(trial, message, progress)
        elif trial.state != "running":
            return  # already stopped
        elif "failed_seed" in message:
            self.end(trial, "diverged", f"seed {message['failed_seed']}: {message['reason']}")
            pool.end(trial.number)
        else:
            for note in message.get("notes", ()):
                progress.note(note)
            if "warning" in message:
                progress.note(f"trial {trial.number}: {message['warning']}")
            if "step" in message:
                progress.reach(trial.number, message["step"])
            returns = [row["return/eval"] for row in message.get("rows", {}).values()
                       if "return/eval" in row]
            if returns:
                self.evaluate(trial, message["step"], returns, message.get("stopped"))
                if trial.state == "running" and self.should_prune(trial, message["step"]):
                    self.end(trial, "pruned")
                    pool.end(trial.number)

    def evaluate(self, trial: Trial, step: int, returns: list[float],
                 stopped: str | None = None) -> None:
        """A resumed trial may repeat evaluations that are already in the journal."""
        if step not in trial.evaluations:
            self.journal.append({"trial": trial.number, "step": step, "returns": returns})
            trial.record(step, returns)
        if step >= self.options.steps or stopped:
            self.end(trial, "completed", f"stopped at step {step}: {stopped}" if stopped else "")

    def should_prune(self, trial: Trial, step: int) -> bool:
        given = self.options
        return given.prune and step == max(trial.evaluations) and pruner.prune(
            trial, self.trials, given.pruner, given.percentile, given.n_startup_trials,
            warmup(given), given.interval_steps, given.patience)

    def end(self, trial: Trial, state: str, reason: str = "") -> None:
        self.journal.append({"trial": trial.number, "state": state, "reason": reason})
        trial.state, trial.reason = state, reason
        self.draw_board(trial)

    def process_ended(self, trial: Trial, failure: Failure | None,
                      progress: StudyProgress) -> None:
        """Mark the trial or queue it again, and remove its checkpoints once it has ended."""
        if trial.state == "running":
            if failure is None:
                self.catch_up(trial)
            elif failure.cause == "settings":
                self.end(trial, "diverged", failure.reason)
            elif self.retries[trial.number] < RETRIES:
                self.retries[trial.number] += 1
                self.waiting.insert(0, trial)
                progress.say(f"trial {trial.number}: {failure.reason}; restarting")
                return
            else:
                self.end(trial, "failed", failure.reason)
        if trial.reason:
            progress.say(f"trial {trial.number} {trial.state}: {trial.reason}")
        self.remove_checkpoints(trial)

    def remove_checkpoints(self, trial: Trial) -> None:
        if checkpoints := self.job(trial).checkpoints:
            shutil.rmtree(checkpoints, ignore_errors=True)

    def catch_up(self, trial: Trial) -> None:
        """Read evaluations that a kill kept out of the journal from the trial's metrics.jsonl."""
        job = self.job(trial)
        curves = read_curves(job.group, job.seeds, "return/eval") if job.group else {}
        stop = recorder.read_stop(job.group) if job.group else None
        for points in zip(*curves.values(), strict=False):
            step = points[0][0]
            self.evaluate(trial, step, [value for _, value in points],
                          stop["reason"] if stop and step >= stop["step"] else None)
        if trial.state == "running":
            self.end(trial, "failed", "ended before its last evaluation")

    def draw_board(self, trial: Trial) -> None:
        """TensorBoard: HParams row and curve of a completed or pruned trial."""
        if trial.state not in ("completed", "pruned"):
            return
        folder = self.folder / "tensorboard" / f"trial_{trial.number:03}"
        with recorder.tensorboard(folder) as board:
            for step, mean in sorted(trial.means.items()):
                board.add_scalar("return/eval", mean, step)
            recorder.add_hparams(board, trial.settings | {"state": trial.state}, trial.final)


def warmup(options: Tune) -> int:
    """The step before which no trial is pruned."""
    given = options.n_warmup_steps
    return 2 * options.steps // 3 if given is None else given
