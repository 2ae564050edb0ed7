"""What others have published, and the scores that returns are normalised by: published.csv.

An environment is its whole id: v4 and v5 of a task are two. The algorithm is the stem of an agent's
file; `reference` and `random` are the returns at which a normalised score is 1 and 0. Means are of
evaluation returns at `steps`; 0 where they depend on none.
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
    random: float  # return of uniform random actions: score 0
    good: float  # score 1
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
    """None where no good return is stated."""
    good, random = points("reference", environment), points("random", environment)
    return Reference(random[0].mean, good[0].mean, good[0].source) if good and random else None
