"""Published returns, and the references for normalised scores: published.csv.

`environment` is the full id: v4 and v5 of a task are different environments. `algorithm` is the
stem of an agent's file, or `reference` or `random` for the returns with normalised score 1 and 0.
`mean` is an evaluation return at `steps`, unless `source` says otherwise; `steps` is 0 if the
return does not depend on training.
"""

import csv
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

PATH = Path(__file__).with_name("published.csv")


class Row(NamedTuple):
    algorithm: str
    environment: str
    steps: int
    mean: float  # evaluation return
    source: str


class Reference(NamedTuple):
    random: float  # return of uniform random actions, score 0
    good: float  # reference return, score 1
    source: str  # of `good`

    def normalise(self, returns: np.ndarray) -> np.ndarray:
        return (returns - self.random) / (self.good - self.random)

    def at(self, score: float) -> float:
        """The return of a normalised score."""
        return self.random + score * (self.good - self.random)


@functools.cache
def rows() -> tuple[Row, ...]:
    with PATH.open(newline="") as file:
        return tuple(Row(row["algorithm"], row["environment"], int(row["steps"]),
                         float(row["mean"]), row["source"]) for row in csv.DictReader(file))


def points(algorithm: str, environment: str) -> list[Row]:
    return [row for row in rows() if row[:2] == (algorithm, environment)]


def reference(environment: str) -> Reference | None:
    """None if published.csv has no reference for the environment."""
    good, random = points("reference", environment), points("random", environment)
    return Reference(random[0].mean, good[0].mean, good[0].source) if good and random else None
