"""What a report says: the tables and figures, from the methods."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from lab import stats
from lab.report import compare, figures, published, warnings
from lab.report.page import Block, Figure, Heading, Table, Text, Warnings
from lab.report.runs import Method, Result
from lab.training import recorder

T_INTERVAL = "95% t interval"


def blocks(methods: Sequence[Method], baseline: Method | None, out: Path) -> list[Block]:
    """The figures are written to `out`."""
    by_environment: dict[str, list[Result]] = {}
    for environment in sorted({e for m in methods for e in m.results}, key=compare.versioned):
        by_environment[environment] = [m.results[environment] for m in methods
                                       if environment in m.results]
    palette = figures.COLORS
    colors = {m.name: palette[index % len(palette)] for index, m in enumerate(methods)}
    results = [result for each in by_environment.values() for result in each]
    found = warnings.find(methods)
    return [*([Warnings(found)] if found else []),
            Heading("Final returns"), final_returns(results), each_seed(results),
            *learning_curves(by_environment, out, colors),
            *across_environments(methods, out, colors),
            *(improvements(methods, baseline, out, colors) if baseline else []),
            *thresholds(by_environment), *beside_published(results),
            Heading("Runs"), runs(methods)]


def final_returns(results: Sequence[Result]) -> Table:
    rows = []
    for result in results:
        found = result.at(result.step).values()
        returns = [evaluation.value for evaluation in found]
        mean, *bounds = stats.t_interval(returns)
        of_all = f" of {result.planned:,}" if result.step < result.planned else ""
        seconds = max((evaluation.seconds for evaluation in found), default=math.nan)
        rows.append([result.environment, result.method, str(len(found)), f"{result.step:,}{of_all}",
                     duration(seconds), number(mean), span(bounds), number(stats.median(returns))])
    return Table(
        ("environment", "method", "n", "steps", "wall-clock", "mean", T_INTERVAL, "median"), rows,
        "Evaluation return: deterministic actions, the mean over a seed's episodes, at the last "
        "evaluation. n is the number of seeds; mean, Student's t interval and median are over "
        "seeds. Steps are transitions of one seed. Wall-clock is of the stack that a seed was "
        "trained in, evaluation included, from its first logged row.", 2)


def each_seed(results: Sequence[Result]) -> Table:
    rows = [[result.environment, result.method,
             "; ".join(f"{n}: {number(evaluation.value)}" for n, evaluation in found.items())]
            for result in results if (found := result.at(result.step))]
    return Table(("environment", "method", "each seed: its return"), rows,
                 "The same evaluations, seed by seed.", 3)


def learning_curves(by_environment: dict[str, list[Result]], out: Path, colors: dict[str, str]
                    ) -> list[Block]:
    drawn: list[Block] = []
    for environment, results in by_environment.items():
        path = out / f"curves_{recorder.safe_name(environment)}.png"
        figures.learning_curves(path, results, colors)
        counts = "; ".join(f"{r.method}: n = {len(r.seeds)}" for r in results)
        drawn.append(Figure(path, (
            f"{environment}. {counts}. Thin lines: seeds; thick lines: their mean; bands: its 95% "
            "t interval at each step; crosses, if any: published means of the same algorithm and "
            "version of the environment. Left over the steps of one seed, right over the "
            "wall-clock of its stack.")))
    return [Heading("Learning curves"), *drawn]


def across_environments(methods: Sequence[Method], out: Path, colors: dict[str, str]
                        ) -> list[Block]:
    left_out: list[str] = []
    shared = compare.shared(methods, left_out)
    left_out += [f"{e} (no reference)" for e, _ in shared if not published.reference(e)]
    shared = [each for each in shared if published.reference(each.environment)]
    without = f" Left out: {'; '.join(left_out)}." if left_out else ""
    if not shared:
        return [Heading("Across environments"),
                Text(f"No environment with a reference is in every method.{without}")]
    aggregates = compare.aggregates(methods, shared)
    path = out / "across_environments.png"
    figures.across_environments(path, aggregates, colors)
    where = ", ".join(f"{environment} at {step:,} steps" for environment, step in shared)
    rows = [[each.method, str(len(shared)), str(each.runs), f"{each.iqm.value:.2f}",
             span(each.iqm[1:], "{:.2f}".format)] for each in aggregates]
    return [
        Heading("Across environments"),
        Text("Normalised score = (return - random) / (reference - random), so that random actions "
             f"have 0 and the reference 1. Over {where}.{without}"),
        Table(("method", "environments", "n", "IQM", "95% bootstrap interval"), rows,
              "n is the number of runs, one a seed and environment. IQM: the mean of the middle "
              "half of their scores. The interval is a percentile bootstrap that draws the runs of "
              f"each environment anew, {stats.RESAMPLES:,} times (Agarwal et al. 2021)."),
        Figure(path, "Left: IQM (tick) and its interval (bar). Right: performance profiles, the "
                     "share of runs above each score, averaged over environments; the curve that "
                     "lies higher is better, and the bands are 95% bootstrap intervals at each "
                     f"score. {', '.join(f'{a.method}: n = {a.runs}' for a in aggregates)}.")]


def improvements(methods: Sequence[Method], baseline: Method, out: Path, colors: dict[str, str]
                 ) -> list[Block]:
    heading = Heading(f"Probability of improvement over {baseline.name}")
    found = compare.improvements(methods, baseline)
    left_out = {m.name for m in methods} - {baseline.name} - {each.method for each in found}
    without = [Text("Left out, without evaluations at equal steps in the same environment: "
                    f"{', '.join(sorted(left_out))}.")] if left_out else []
    if not found:
        return [heading, *without]
    path = out / "improvement.png"
    figures.improvements(path, found, baseline.name, colors)
    rows = [[each.method, ", ".join(environment for environment, _ in each.environments),
             " and ".join(map(str, each.runs)), f"{each.probability.value:.2f}",
             span(each.probability[1:], "{:.2f}".format)] for each in found]
    caption = (f"That a random run lies above a random run of {baseline.name}, ties counting half, "
               "averaged over the environments that both have, at equal steps. ")
    return [
        heading, *without,
        Table(("method", "environments", "n of both", "probability",
               "95% bootstrap interval"), rows,
              f"{caption}0.5 is no difference. It says how often, not how much (Agarwal et al. "
              "2021).", 2),
        Figure(path, f"{caption}Tick: the estimate; bar: its 95% stratified bootstrap interval; an "
                     "interval that holds 0.5 (dashed) leaves open which is better.")]


def thresholds(by_environment: dict[str, list[Result]]) -> list[Block]:
    rows, without = [], []
    for environment, results in by_environment.items():
        reference = published.reference(environment)
        if reference is None:
            without.append(environment)
            continue
        for result in results:
            cells = []
            for level in compare.LEVELS:
                reached = compare.steps_to(result, reference.at(level))
                steps = f"{reached.median:,.0f}" if math.isfinite(reached.median) else "-"
                cells.append(f"{steps} ({reached.seeds}/{len(result.seeds)})")
            rows.append([environment, result.method, str(len(result.seeds)), *cells])
    named = f" Without a reference: {', '.join(without)}." if without else ""
    if not rows:
        return [Heading("Steps to threshold"), Text(f"No environment has a reference.{named}")]
    heads = [f"score {level:g}" for level in compare.LEVELS]
    return [
        Heading("Steps to threshold"),
        Table(("environment", "method", "n", *heads), rows,
              "The steps of a seed until its first evaluation at or above the return of that "
              "normalised score: the median over seeds, and how many of n got there. A seed that "
              "never did counts as later than any other; - where the median seed never did."
              f"{named}", 2),
        references([environment for environment in by_environment if environment not in without])]


def references(environments: Sequence[str]) -> Table:
    """The returns of the scores."""
    notes, rows = Notes(), []
    for environment in environments:
        reference = published.reference(environment)
        assert reference
        rows.append([environment, notes.mark(reference.source), number(reference.random),
                     *(number(reference.at(level)) for level in compare.LEVELS)])
    return Table(("environment", "reference", "score 0",
                  *(f"score {level:g}" for level in compare.LEVELS)), rows,
                 "The returns that normalised scores stand for. Score 0 is the mean of uniform "
                 "random actions over 100 episodes (bench/random_policy.py), score 1 the "
                 f"reference. {notes}")


class Notes:
    """Long texts, once each below a table, and their marks in it."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"

    def __str__(self) -> str:
        return " ".join(f"[{n}] {text}." for n, text in enumerate(self.texts, start=1))


def beside_published(results: Sequence[Result]) -> list[Block]:
    notes, rows = Notes(), []
    for result in results:
        for point, step, returns in compare.beside_published(result):
            mean, *bounds = stats.t_interval(returns)
            rows.append([result.environment, result.method, f"{point.steps:,}", number(point.mean),
                         notes.mark(point.source), f"{step:,}", number(mean), span(bounds),
                         str(len(returns))])
    if not rows:
        return []
    return [Heading("Beside published results"), Table(
        ("environment", "method", "published at", "mean", "by", "here at", "mean", T_INTERVAL, "n"),
        rows, "Published means of the same algorithm in the same version of the environment, and "
        "the runs' evaluation at those steps. Networks and other settings may differ. "
        f"{notes}", 2)]


def runs(methods: Sequence[Method]) -> Table:
    rows = []
    for method in methods:
        for run in method.runs:
            others = [other.settings for m in methods for other in m.runs
                      if other.settings["agent"] == run.settings["agent"]]
            differing = [f"{name} {value}" for name, value in run.settings.items()
                         if any(other.get(name, value) != value for other in others)]
            rows.append([method.name, run.settings["agent"], str(run.folder),
                         ", ".join(differing)])
    return Table(("method", "agent", "folder", "settings"), rows,
                 "Settings are those in which runs of the same agent differ; all of them lie in "
                 "each folder's config.json.", 4)


def number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.1f}"


def span(bounds: Sequence[float], show: Callable[[float], str] = number) -> str:
    return "needs 2 seeds" if math.isnan(bounds[0]) else " to ".join(map(show, bounds))


def duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    unit, size = figures.time_unit(seconds)
    return f"{seconds / size:.{1 if unit == 'h' else 0}f} {unit}"
