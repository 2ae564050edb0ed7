"""Live progress of a run, one line per environment; plain lines when not a terminal."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lab.training.job import Job

PLAIN_SECONDS = 10.0  # between two plain lines of one environment


class SweepProgress:
    """A context manager; pass every job's messages to update()."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs, self.console = jobs, Console(markup=False)
        self.steps = [0] * len(jobs)
        self.started: dict[str, float] = {}  # environment -> start time of its first job
        self.resumed: dict[int, int] = {}  # job -> the step that it resumed from
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
        self.notes = set[str]()  # printed, once for all processes

    def __enter__(self) -> "SweepProgress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def update(self, index: int, message: dict[str, Any]) -> None:
        job = self.jobs[index]
        for note in message.get("notes", ()):
            if note not in self.notes:
                self.notes.add(note)
                self.console.print(note, highlight=False, soft_wrap=True)
        if "warning" in message:
            at = f" at step {message['step']}" if "step" in message else ""
            self.console.print(f"{job.env_id}: {message['warning']}{at}", highlight=False)
        if "failed_seed" in message:
            self.console.print(f"{job.env_id} seed {message['failed_seed']}: {message['reason']}",
                               highlight=False)
        if "step" not in message or "failed_seed" in message:
            return
        self.steps[index] = message["step"]
        if "stopped" in message:
            self.console.print(f"{job.env_id}: stopped at step {message['step']}: "
                               f"{message['stopped']}", highlight=False)
            self.steps[index] = job.steps  # complete
        self.started.setdefault(job.env_id, time.monotonic())
        self.resumed.setdefault(index, message["step"])
        if "rows" in message:
            self.speeds[index] = message["perf/steps_per_s"], message["perf/updates_per_s"]
            for seed, row in message["rows"].items():
                if "return/train" in row:
                    self.returns[job.env_id][seed] = row["return/train"]
        self._show(job.env_id)

    def _show(self, env_id: str) -> None:
        indices = [i for i, job in enumerate(self.jobs) if job.env_id == env_id]
        done = sum(min(self.steps[i], self.jobs[i].steps) * len(self.jobs[i].seeds)
                   for i in indices)
        alive = [i for i in indices if self.steps[i] < self.jobs[i].steps] or indices
        speed, updates = (sum(self.speeds[i][k] for i in alive) for k in (0, 1))
        values = list(self.returns[env_id].values())
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        reached = f"return {np.mean(values):.1f}{spread}" if values else "no episode yet"
        state = f"{speed:.0f} steps/s, {updates:.0f} updates/s, {reached}"
        self.bar.update(self.tasks[env_id], completed=done, state=state)
        now, total = time.monotonic(), self.totals[env_id]
        before = sum(self.resumed.get(i, 0) * len(self.jobs[i].seeds) for i in indices)
        finished = done >= total and self.printed[env_id] != float("inf")
        if not self.console.is_terminal and (
                finished or (done > before and now - self.printed[env_id] >= PLAIN_SECONDS)):
            self.printed[env_id] = float("inf") if finished else now
            left = (total - done) * (now - self.started[env_id]) / max(done - before, 1)
            print(f"{env_id}: {done}/{total} steps, ETA {left:.0f} s, {state}", flush=True)
