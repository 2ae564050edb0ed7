"""What methods reached across environments, how fast, and beside published points."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lab import stats
from lab.report import published
from lab.report.runs import Method, Result

LEVELS = (0.25, 0.5, 0.75, 1.0)  # normalised scores that count as thresholds
NEAR = 0.9  # of a published point's steps: an evaluation that early is compared with it


class Interval(NamedTuple):
    value: float
    lower: float  # nan: too few seeds
    upper: float


class Shared(NamedTuple):
    """An environment that methods share, and the step at which they are compared there."""

    environment: str
    step: int


def shared(methods: Sequence[Method], left_out: list[str]) -> list[Shared]:
    """The environments in which every method has evaluations, each at the last step that all of
    them reached; of one in two versions the newer. What is left out is told, with the reason."""
    found: dict[str, Shared] = {}
    for environment in sorted({e for method in methods for e in method.results}, key=versioned):
        lacking = [m.name for m in methods if environment not in m.results]
        step = 0 if lacking else min(m.results[environment].step for m in methods)
        if lacking:
            names = ", ".join(lacking) if len(lacking) < 4 else f"{len(lacking)} of the methods"
            left_out.append(f"{environment} (not in {names})")
        elif not all(m.results[environment].at(step) for m in methods):
            left_out.append(f"{environment} (no evaluations at equal steps yet)")
        else:
            task = versioned(environment)[0]
            if task in found:
                left_out.append(f"{found[task].environment} (as {environment} is another version)")
            found[task] = Shared(environment, step)
    return list(found.values())


def versioned(environment: str) -> tuple[str, int]:
    task, _, version = environment.rpartition("-v")
    return (task, int(version)) if version.isdecimal() else (environment, 0)


@dataclass
class Aggregate:
    """One method over all environments, in normalised scores."""

    method: str
    runs: int
    iqm: Interval
    scores: np.ndarray  # (T,), where the profile is known
    profile: np.ndarray  # (T,): the share of runs above
    lower: np.ndarray
    upper: np.ndarray


def aggregates(methods: Sequence[Method], environments: Sequence[Shared]) -> list[Aggregate]:
    """Of environments that have a reference."""
    strata: dict[str, list[np.ndarray]] = {}
    for method in methods:
        strata[method.name] = []
        for environment, step in environments:
            reference = published.reference(environment)
            assert reference, environment
            returns = np.array(method.results[environment].returns(step))
            strata[method.name].append(reference.normalise(returns))
    every = np.concatenate([x for each in strata.values() for x in each])
    scores = np.linspace(min(0.0, every.min()), max(1.0, every.max()), 201)
    result = []
    for name, each in strata.items():
        bounds = stats.stratified_bootstrap(each, stats.pooled_iqm)
        lower, upper = stats.stratified_bootstrap(
            each, lambda drawn: stats.performance_profile(drawn, scores))
        result.append(Aggregate(
            name, sum(map(len, each)), Interval(float(stats.pooled_iqm(each)), *map(float, bounds)),
            scores, stats.performance_profile(each, scores), lower, upper))
    return result


class Improvement(NamedTuple):
    """That a run of `method` lies above one of the baseline, averaged over environments."""

    method: str
    environments: list[Shared]
    runs: tuple[int, int]  # of the method, of the baseline
    probability: Interval


def improvements(methods: Sequence[Method], baseline: Method) -> list[Improvement]:
    """Over the environments that each shares with the baseline, with a reference or without."""
    result = []
    for method in methods:
        environments = shared([method, baseline], [])
        if method is baseline or not environments:
            continue
        pairs = [np.array(m.results[environment].returns(step))
                 for environment, step in environments for m in (method, baseline)]
        bounds = stats.stratified_bootstrap(pairs, stats.mean_improvement)
        probability = Interval(float(stats.mean_improvement(pairs)), *map(float, bounds))
        runs = sum(map(len, pairs[::2])), sum(map(len, pairs[1::2]))
        result.append(Improvement(method.name, environments, runs, probability))
    return result


class Reached(NamedTuple):
    seeds: int  # that got there
    median: float  # steps, over all seeds, those that never got there at infinity


def steps_to(result: Result, threshold: float) -> Reached:
    """Of each seed, the first evaluation that is not below the threshold."""
    steps = [next((e.step for e in seed.curve if e.value >= threshold), np.inf)
             for seed in result.seeds.values()]
    return Reached(int(np.isfinite(steps).sum()), float(np.median(steps)))


class Beside(NamedTuple):
    """A published point and what was reached there."""

    point: published.Row
    step: int  # of the evaluations
    returns: list[float]


def beside_published(result: Result) -> list[Beside]:
    """Every point of the same algorithm and the very same environment that was got to."""
    found = []
    for point in published.points(result.agent, result.environment):
        reached = result.at(point.steps)
        if reached and (step := min(e.step for e in reached.values())) >= NEAR * point.steps:
            found.append(Beside(point, step, [e.value for e in reached.values()]))
    return found
