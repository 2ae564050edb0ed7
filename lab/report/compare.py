"""Methods across environments, steps to a threshold, and published results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lab import stats
from lab.report import published
from lab.report.runs import LATE, Method, Result

LEVELS = (0.25, 0.5, 0.75, 1.0)  # thresholds, in normalised scores
NEAR = 0.9  # compare a published point with an evaluation from 0.9 of its steps on


class Interval(NamedTuple):
    value: float
    lower: float  # nan if there are too few seeds
    upper: float


class Shared(NamedTuple):
    """An environment that the methods have in common, and the step of the comparison."""

    environment: str
    step: int


def shared(methods: Sequence[Method], left_out: list[str],
           reference: Callable[[str], Any] = lambda environment: True) -> list[Shared]:
    """The environments in which every method has evaluations, each at the last step at which all
    methods have one, if it has a reference. Of two versions of an environment, the newer one.
    Appends to `left_out` the environments that are left out, with the reason."""
    found: dict[str, Shared] = {}
    for environment in sorted({e for method in methods for e in method.results}, key=versioned):
        lacking = [m.name for m in methods if environment not in m.results]
        step = 0 if lacking else common_step([m.results[environment] for m in methods])
        if lacking:
            names = ", ".join(lacking) if len(lacking) < 4 else f"{len(lacking)} of the methods"
            left_out.append(f"{environment} (not in {names})")
        elif not step:
            left_out.append(f"{environment} (no evaluations at equal steps)")
        elif not reference(environment):
            left_out.append(f"{environment} (no reference)")
        else:
            task = versioned(environment)[0]
            if task in found:
                left_out.append(f"{found[task].environment} (an older version of {environment})")
            found[task] = Shared(environment, step)
    return list(found.values())


def common_step(results: Sequence[Result]) -> int:
    """The last step at which every result has evaluations, up to 1% apart; 0 if there is none."""
    last = min(result.step for result in results)
    steps = {e.step for result in results for seed in result.seeds.values() for e in seed.curve}
    for step in sorted((step for step in steps if step <= last), reverse=True):
        found = [result.at(step).values() for result in results]
        if all(found) and all(step <= LATE * e.step for each in found for e in each):
            return step
    return 0


def versioned(environment: str) -> tuple[str, int]:
    task, _, version = environment.rpartition("-v")
    return (task, int(version)) if version.isdecimal() else (environment, 0)


@dataclass
class Aggregate:
    """One method over all environments, in normalised scores."""

    method: str
    runs: int
    iqm: Interval
    scores: np.ndarray  # (T,), the x axis of the profile
    profile: np.ndarray  # (T,): share of runs above each score
    lower: np.ndarray
    upper: np.ndarray


def aggregates(methods: Sequence[Method], environments: Sequence[Shared]) -> list[Aggregate]:
    """IQM and performance profile of each method. The environments must have a reference."""
    strata: dict[str, list[np.ndarray]] = {}
    for method in methods:
        strata[method.name] = []
        for environment, step in environments:
            reference = published.reference(environment)
            assert reference, environment
            returns = np.array(method.results[environment].returns(step))
            strata[method.name].append(reference.normalise(returns))
    pooled = np.concatenate([x for each in strata.values() for x in each])
    scores = np.linspace(min(0.0, pooled.min()), max(1.0, pooled.max()), 201)
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
    """P(a run of `method` scores higher than a run of the baseline), mean over environments."""

    method: str
    environments: list[Shared]
    runs: tuple[int, int]  # of the method, of the baseline
    probability: Interval


def improvements(methods: Sequence[Method], baseline: Method) -> list[Improvement]:
    """Each method over the environments that it has in common with the baseline."""
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
    seeds: int  # that reached it
    median: float  # steps, over all seeds; inf for a seed that did not reach it


def steps_to(result: Result, threshold: float) -> Reached:
    """The step of each seed's first evaluation at or above the threshold, summarised."""
    steps = [next((e.step for e in seed.curve if e.value >= threshold), np.inf)
             for seed in result.seeds.values()]
    return Reached(int(np.isfinite(steps).sum()), float(np.median(steps)))


class Beside(NamedTuple):
    """A published point and the returns at that step."""

    point: published.Row
    step: int  # of the evaluations
    returns: list[float]


def beside_published(result: Result) -> list[Beside]:
    """The published points of the same algorithm and environment version that the run reached."""
    found = []
    for point in published.points(result.agent, result.environment):
        reached = result.at(point.steps)
        if reached and (step := min(e.step for e in reached.values())) >= NEAR * point.steps:
            found.append(Beside(point, step, [e.value for e in reached.values()]))
    return found
