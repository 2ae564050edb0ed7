"""Live progress of a sweep, one line for each environment, and of a study; plain lines when not a
terminal."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lab.rollout import Job

if TYPE_CHECKING:  # the surrogate takes seconds to import
    from lab.tuning import Trial

PLAIN_SECONDS = 10.0  # between two plain lines of an environment


class SweepProgress:
    """Feed it every job's messages; use it as a context."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs, self.console = jobs, Console()
        self.steps = [0] * len(jobs)
        self.begun: dict[str, float] = {}  # when each environment's first job began
        self.resumed: dict[int, int] = {}  # the step from which each job goes on
        self.speeds: list[tuple[float, float]] = [(0.0, 0.0)] * len(jobs)
        self.returns: dict[str, dict[int, float]] = {job.env_id: {} for job in jobs}
        self.totals = {e: sum(j.steps * len(j.seeds) for j in jobs if j.env_id == e)
                       for e in self.returns}
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=20),
                            MofNCompleteColumn(), TimeRemainingColumn(),
                            TextColumn("{task.fields[state]}"), console=self.console,
                            disable=not self.console.is_terminal)
        self.tasks = {e: self.bar.add_task(e, total=total, state="starting")
                      for e, total in self.totals.items()}
        self.printed = dict.fromkeys(self.returns, time.monotonic())

    def __enter__(self) -> "SweepProgress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def update(self, place: int, message: dict[str, Any]) -> None:
        job = self.jobs[place]
        for kind in ("warning", "failed_seed"):
            if kind in message:
                text = message.get("reason") or message[kind]
                seed = f" seed {message[kind]}" if kind == "failed_seed" else ""
                at = f" at step {message['step']}" if "step" in message else ""
                self.console.print(f"{job.env_id}{seed}: {text}{at}", highlight=False)
        if "step" not in message or "failed_seed" in message:
            return
        self.steps[place] = message["step"]
        self.begun.setdefault(job.env_id, time.monotonic())
        self.resumed.setdefault(place, message["step"])
        if "rows" in message:
            self.speeds[place] = message["perf/steps_per_s"], message["perf/updates_per_s"]
            for seed, row in message["rows"].items():
                if "return/train" in row:
                    self.returns[job.env_id][seed] = row["return/train"]
        self._show(job.env_id)

    def _show(self, env_id: str) -> None:
        places = [i for i, job in enumerate(self.jobs) if job.env_id == env_id]
        done = sum(min(self.steps[i], self.jobs[i].steps) * len(self.jobs[i].seeds) for i in places)
        alive = [i for i in places if self.steps[i] < self.jobs[i].steps] or places
        speed, updates = (sum(self.speeds[i][k] for i in alive) for k in (0, 1))
        values = list(self.returns[env_id].values())
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        reached = f"return {np.mean(values):.1f}{spread}" if values else "no episode yet"
        state = f"{speed:.0f} steps/s, {updates:.0f} updates/s, {reached}"
        self.bar.update(self.tasks[env_id], completed=done, state=state)
        now, total = time.monotonic(), self.totals[env_id]
        before = sum(self.resumed.get(i, 0) * len(self.jobs[i].seeds) for i in places)
        finished = done >= total and self.printed[env_id] != float("inf")
        if not self.console.is_terminal and (
                finished or (done > before and now - self.printed[env_id] >= PLAIN_SECONDS)):
            self.printed[env_id] = float("inf") if finished else now
            left = (total - done) * (now - self.begun[env_id]) / max(done - before, 1)
            print(f"{env_id}: {done}/{total} steps, ETA {left:.0f} s, {state}", flush=True)


class StudyProgress:
    """Of a study: trials that ended, and how; the best; when the trials will have ended."""

    def __init__(self, options: Any, trials: "Sequence[Trial]"):
        self.options, self.trials, self.console = options, trials, Console()
        self.best: tuple[Trial, float] | None = None
        self.steps: dict[int, int] = {}  # that each running trial has reached
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=20),
                            MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
                            console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("trials", total=options.trials, state="starting")
        self.printed, self.begun = (-1, 0.0), time.monotonic()
        self.before = self._work()

    def __enter__(self) -> "StudyProgress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.show()
        self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def reach(self, number: int, step: int) -> None:
        """A trial's first step is where its checkpoint left it: not this program's work."""
        if number not in self.steps:
            self.before += step / self.options.steps
        self.steps[number] = step

    def _work(self) -> float:
        """Trials' worth of steps behind us; a pruned trial has none left."""
        return sum(self.steps.get(trial.number, 0) / self.options.steps
                   if trial.state == "running" else 1.0 for trial in self.trials)

    def show(self) -> None:
        ended = Counter(trial.state for trial in self.trials)
        running = ended.pop("running", 0)
        counts = [f"{ended[state]} {state}" for state in ("completed", "pruned", "diverged",
                                                          "failed")]
        state = ", ".join([*counts, f"{running} running"])
        if self.best:
            trial, mean = self.best
            state += f"; best {mean:.1f} (trial {trial.number}, posterior mean)"
        now, done = time.monotonic(), sum(ended.values())
        progress, left = self._work() - self.before, self.options.trials - self._work()
        if progress > 0.1:
            state += f"; ETA {max(left, 0) * (now - self.begun) / progress:.0f} s"
        self.bar.update(self.task, completed=done, state=state)
        if not self.console.is_terminal and self.trials and (
                done != self.printed[0] or now - self.printed[1] >= PLAIN_SECONDS):
            self.printed = done, now
            print(f"{done}/{self.options.trials} trials: {state}", flush=True)
