"""The trials of a study and their journal."""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import UserError
from lab.training import recorder
from lab.training.checkpoint import locked

ENDED = ("completed", "pruned", "diverged", "failed")


@dataclass
class Trial:
    """One setting and its results. State "diverged": the settings are to blame (NaN, out of memory,
    refused); "failed": anything else, such as a killed process."""

    number: int
    settings: dict[str, Any]
    state: str = "running"
    evaluations: dict[int, list[float]] = field(default_factory=dict)  # step -> each seed's return
    reason: str = ""

    def __post_init__(self) -> None:
        self.means = {step: float(np.mean(returns)) for step, returns in self.evaluations.items()}

    def record(self, step: int, returns: list[float]) -> None:
        self.evaluations[step] = returns
        self.means[step] = float(np.mean(returns))

    @property
    def final(self) -> float:
        """The last evaluation, mean over seeds."""
        return self.means[max(self.evaluations)]

    def at(self, step: int) -> float:
        """The last evaluation up to `step`, or the first one if there is none; mean over seeds."""
        reached = [s for s in self.evaluations if s <= step]
        return self.means[max(reached, default=min(self.evaluations))]

    def noise(self) -> float:
        """Variance of the last evaluation's mean over seeds; nan for one seed."""
        returns = self.evaluations[max(self.evaluations)]
        return float(np.var(returns, ddof=1) / len(returns)) if len(returns) > 1 else float("nan")


class Journal:
    """trials.jsonl, the write-ahead log of a study: suggestions, evaluations and ends of trials.

    A line is flushed to disk before the tuner acts on it. The file stays locked while it is open,
    so a study has one tuner. UserError if another process holds the lock, if a line other than the
    last is corrupt, or if the disk is full.
    """

    def __init__(self, path: Path):
        self.path, self.file = path, path.open("a+b")
        if not locked(self.file):
            self.file.close()
            raise UserError(f"another tuner is running on {path.parent}; wait until it ends, or "
                            "choose another --name")
        self.file.seek(0)
        content = self.file.read()
        self.torn: int | None = content.rfind(b"\n") + 1  # a kill can truncate the last line
        lines = content[:self.torn].splitlines()
        try:
            self.header, *self.events = [dict(json.loads(line)) for line in lines] or [{}]
            self.begun = read_trials(self.events)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            self.file.close()
            raise UserError(f"{path} is corrupt: {error!r}") from error

    def append(self, event: dict[str, Any]) -> None:
        with recorder.writable(self.path, new=False):
            if self.torn is not None:
                self.file.truncate(self.torn)
                self.torn = None
            self.file.write(json.dumps(event).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    def trials(self) -> list[Trial]:
        """The trials as of opening the file."""
        return self.begun

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take
            self.file.close()


def read_trials(events: Sequence[dict[str, Any]]) -> list[Trial]:
    """The lines of a journal after its header -> the trials. ValueError, TypeError, KeyError or
    IndexError if they are no such lines."""
    trials: list[Trial] = []
    for event in events:
        number = event["trial"]
        if "settings" in event:
            if number != len(trials):
                raise ValueError(f"trial {number} follows trial {len(trials) - 1}")
            trials.append(Trial(number, dict(event["settings"])))
        elif "step" in event:
            trials[number].record(int(event["step"]), event["returns"])
        elif event["state"] in ENDED:
            trials[number].state, trials[number].reason = event["state"], event["reason"]
        else:
            raise ValueError(f"unknown state {event['state']}")
    return trials
