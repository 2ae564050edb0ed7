"""The trials of a study, and the journal that they stand in."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lab.errors import UserError
from lab.training.checkpoint import locked

ENDED = ("completed", "pruned", "diverged", "failed")


@dataclass
class Trial:
    """One setting and what became of it. "diverged" is whatever its settings are to blame for;
    "failed" died of something else."""

    number: int
    settings: dict[str, Any]
    state: str = "running"
    evaluations: dict[int, list[float]] = field(default_factory=dict)  # step -> each seed's return
    reason: str = ""

    @property
    def means(self) -> dict[int, float]:
        return {step: float(np.mean(returns)) for step, returns in self.evaluations.items()}

    @property
    def final(self) -> float:
        """Its last evaluation, mean over seeds."""
        return self.means[max(self.evaluations)]

    def at(self, step: int) -> float:
        """Its evaluation at `step`, or the last one before."""
        reached = [s for s in self.evaluations if s <= step]
        return self.means[max(reached, default=min(self.evaluations))]

    def noise(self) -> float:
        """The variance of the mean over seeds of its last evaluation; nan for one seed."""
        returns = self.evaluations[max(self.evaluations)]
        return float(np.var(returns, ddof=1) / len(returns)) if len(returns) > 1 else float("nan")


class Journal:
    """trials.jsonl, the only truth of a study: what was asked, every evaluation, every end.

    A line is on the disk before its consequences. The file is locked as long as it is open, so
    that a study has one tuner. UserError if it is another's, or broken before its last line.
    """

    def __init__(self, path: Path):
        self.file = path.open("a+b")
        if not locked(self.file):
            self.file.close()
            raise UserError(f"another tuner works on {path.parent}; wait for its end, or give "
                            "another --name")
        self.file.seek(0)
        content = self.file.read()
        self.torn: int | None = content.rfind(b"\n") + 1  # a kill tears the last line at most
        lines = content[:self.torn].splitlines()
        try:
            self.header, *self.events = [json.loads(line) for line in lines] or [{}]
        except ValueError as error:
            self.file.close()
            raise UserError(f"{path} is broken: {error}") from error

    def append(self, event: dict[str, Any]) -> None:
        if self.torn is not None:
            self.file.truncate(self.torn)
            self.torn = None
        self.file.write(json.dumps(event).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def trials(self) -> list[Trial]:
        """As of its opening."""
        trials: list[Trial] = []
        for event in self.events:
            if "settings" in event:
                trials.append(Trial(event["trial"], event["settings"]))
            elif "step" in event:
                trials[event["trial"]].evaluations[event["step"]] = event["returns"]
            else:
                trials[event["trial"]].state = event["state"]
                trials[event["trial"]].reason = event["reason"]
        return trials

    def close(self) -> None:
        self.file.close()
