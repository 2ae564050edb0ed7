"""Live progress of a study; plain lines when not a terminal."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lab.tuning.trials import Trial

PLAIN_SECONDS = 10.0  # between two plain lines


class StudyProgress:
    """Shows the number of trials in each state, the best trial and the ETA."""

    def __init__(self, options: Any, trials: Sequence[Trial]):
        self.options, self.trials, self.console = options, trials, Console(markup=False)
        self.best: tuple[Trial, float] | None = None
        self.steps: dict[int, int] = {}  # trial number -> step
        self.bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=20),
                            MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
                            console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("trials", total=options.trials, state="starting")
        self.printed, self.started = (-1, 0.0), time.monotonic()
        self.before = self._work()
        self.notes = set[str]()  # printed

    def __enter__(self) -> "StudyProgress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.show()
        self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def note(self, text: str) -> None:
        """Print it once, however many trials send it."""
        if text not in self.notes:
            self.notes.add(text)
            self.say(text)

    def reach(self, number: int, step: int) -> None:
        """The first step of a resumed trial is its checkpoint's: the ETA leaves it out."""
        if number not in self.steps:
            self.before += step / self.options.steps
        self.steps[number] = step

    def _work(self) -> float:
        """Progress in trials: an ended trial counts 1, a running one its share of the steps."""
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
            state += f"; ETA {max(left, 0) * (now - self.started) / progress:.0f} s"
        self.bar.update(self.task, completed=done, state=state)
        if not self.console.is_terminal and self.trials and (
                done != self.printed[0] or now - self.printed[1] >= PLAIN_SECONDS):
            self.printed = done, now
            print(f"{done}/{self.options.trials} trials: {state}", flush=True)
