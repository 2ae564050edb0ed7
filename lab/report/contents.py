"""The contents of a report: tables, figures and their captions."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from lab import stats
from lab.report import compare, figures, published, warnings
from lab.report.page import Block, Figure, Heading, Table, Text, Warnings
from lab.report.runs import Method, Result, evaluations, label, span_of_steps
from lab.training import recorder

T_INTERVAL = "95% t interval"


def blocks(methods: Sequence[Method], baseline: Method | None, out: Path) -> list[Block]:
    """All parts of the report, in order. Writes the figures to `out`."""
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
            *fresh_episodes(methods),
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
        "Return of the last evaluation: deterministic actions, mean over the episodes of a seed. "
        "n is the number of seeds; mean, Student's t interval and median are over seeds. Steps "
        "are the environment's, of one seed. Wall-clock is the training time of the stack of "
        "seeds since the first logged row, with evaluations.", 2)


def each_seed(results: Sequence[Result]) -> Table:
    rows = [[result.environment, result.method,
             "; ".join(f"{n}: {number(evaluation.value)}" for n, evaluation in found.items())]
            for result in results if (found := result.at(result.step))]
    return Table(("environment", "method", "return of each seed"), rows,
                 "The same evaluations for each seed.", 3)


def learning_curves(by_environment: dict[str, list[Result]], out: Path, colors: dict[str, str]
                    ) -> list[Block]:
    drawn, paths = list[Block](), list[Path]()
    for environment, results in by_environment.items():
        name = f"curves_{recorder.safe_name(environment)[:150]}"
        path = next(path for number in itertools.count(1) if (
            path := out / (name + f"-{number}" * (number > 1) + ".png")) not in paths)
        paths.append(path)
        figures.learning_curves(path, results, colors)
        counts = "; ".join(f"{r.method}: n = {r.evaluated}" for r in results)
        drawn.append(Figure(path, (
            f"{environment}. {counts}. Thin lines: seeds; thick lines: mean over seeds; bands: 95% "
            "t interval of the mean; crosses: published means of the same algorithm on the same "
            "version of the environment. Left: over steps of one seed; right: over wall-clock "
            "time of the stack.")))
    return [Heading("Learning curves"), *drawn]


def fresh_episodes(methods: Sequence[Method]) -> list[Block]:
    rows = []
    for method in methods:
        for found in (each for run in method.runs for each in evaluations(run)):
            mean, bounds = found["mean"], found["return_interval"] or [math.nan] * 2
            shares = [f"{mean[name]:.0%}" if name in mean else "-"
                      for name in ("terminated", "success")]
            best = mean.get("best evaluation", mean.get("picked on"))  # its name until 2026-11
            at = span_of_steps([seed["step"] for seed in found["seeds"].values()])
            exploring = ", exploring" * bool(found.get("explore"))
            rows.append([label(found["environment"], found), method.name,
                         f"{found['which']}, at {at}{exploring}",
                         str(len(found["seeds"]) - len(found["failed_seeds"])),
                         str(found["episodes_per_seed"]),
                         number(mean["return"]), span(bounds), *shares,
                         "-" if best is None else number(best)])
    if not rows:
        return []
    return [Heading("Fresh episodes"), Table(
        ("environment", "method", "weights", "n", "episodes", "mean", T_INTERVAL, "terminated",
         "success", "best evaluation"), rows,
        "Evaluations by python -m lab.evaluate, on starts that neither training nor the run's own "
        "evaluations used. Episodes are of each seed. The best weights are those of each seed's "
        "best evaluation, which is the largest of many and so optimistic; the mean on fresh "
        "episodes is not.", 3)]


def across_environments(methods: Sequence[Method], out: Path, colors: dict[str, str]
                        ) -> list[Block]:
    left_out: list[str] = []
    shared = compare.shared(methods, left_out, published.reference)
    without = f" Left out: {'; '.join(left_out)}." if left_out else ""
    if not shared:
        return [Heading("Across environments"),
                Text(f"The methods have no environment with a reference in common.{without}")]
    aggregates = compare.aggregates(methods, shared)
    path = out / "across_environments.png"
    figures.across_environments(path, aggregates, colors)
    where = ", ".join(f"{environment} at {step:,} steps" for environment, step in shared)
    rows = [[each.method, str(len(shared)), str(each.runs), f"{each.iqm.value:.2f}",
             span(each.iqm[1:], "{:.2f}".format)] for each in aggregates]
    return [
        Heading("Across environments"),
        Text("Normalised score = (return - random) / (reference - random): 0 is random actions, 1 "
             f"the reference. Environments: {where}.{without}"),
        Table(("method", "environments", "n", "IQM", "95% bootstrap interval"), rows,
              "n is the number of runs, one per seed and environment. IQM (interquartile mean): "
              "mean of the middle half of the scores. The interval is a percentile bootstrap, "
              f"stratified by environment, with {stats.RESAMPLES:,} resamples (Agarwal et al. "
              "2021)."),
        Figure(path, "Left: IQM (tick) and its interval (bar). Right: performance profiles, the "
                     "share of runs above each score, averaged over environments, with 95% "
                     "pointwise bootstrap bands. Higher is better. "
                     f"{', '.join(f'{a.method}: n = {a.runs}' for a in aggregates)}.")]


def improvements(methods: Sequence[Method], baseline: Method, out: Path, colors: dict[str, str]
                 ) -> list[Block]:
    heading = Heading(f"Probability of improvement over {baseline.name}")
    found = compare.improvements(methods, baseline)
    left_out = {m.name for m in methods} - {baseline.name} - {each.method for each in found}
    without = [Text("Left out, because there are no evaluations at equal steps in a common "
                    f"environment: {', '.join(sorted(left_out))}.")] if left_out else []
    if not found:
        return [heading, *without]
    path = out / "improvement.png"
    figures.improvements(path, found, baseline.name, colors)
    rows = [[each.method, ", ".join(environment for environment, _ in each.environments),
             " and ".join(map(str, each.runs)), f"{each.probability.value:.2f}",
             span(each.probability[1:], "{:.2f}".format)] for each in found]
    caption = ("Probability that a random run scores higher than a random run of "
               f"{baseline.name} at equal steps, ties counting half, averaged over the common "
               "environments. ")
    return [
        heading, *without,
        Table(("method", "environments", "n of each", "probability",
               "95% bootstrap interval"), rows,
              f"{caption}0.5 means no difference. It does not measure the size of the difference "
              "(Agarwal et al. 2021).", 2),
        Figure(path, f"{caption}Tick: estimate; bar: 95% stratified bootstrap interval. If the "
                     "interval contains 0.5 (dashed), the data do not show which is better.")]


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
              "Steps until the first evaluation at or above that normalised score: median over "
              "seeds and, in brackets, how many of the n seeds reached it. A seed that did not "
              f"reach it counts as infinity; - means that the median is infinite.{named}", 2),
        references([environment for environment in by_environment if environment not in without])]


def references(environments: Sequence[str]) -> Table:
    """The return that each normalised score stands for."""
    notes, rows = Notes(), []
    for environment in environments:
        reference = published.reference(environment)
        assert reference
        rows.append([environment, notes.mark(reference.source), number(reference.random),
                     *(number(reference.at(level)) for level in compare.LEVELS)])
    return Table(("environment", "reference", "score 0",
                  *(f"score {level:g}" for level in compare.LEVELS)), rows,
                 "Returns of the normalised scores. Score 0 is the mean return of uniform random "
                 "actions over 100 episodes (bench/random_policy.py), score 1 the reference. "
                 f"{notes}")


class Notes:
    """Footnotes of a table: mark() returns the number, str() the list."""

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
    return [Heading("Published results"), Table(
        ("environment", "method", "published steps", "published mean", "source", "run steps",
         "run mean", T_INTERVAL, "n"),
        rows, "Published means of the same algorithm on the same version of the environment, and "
        "these runs at about the same step. Networks and other settings may differ. "
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
                 "Only settings in which runs of the same agent differ. Each folder's config.json "
                 "has all of them.", 4)


def number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.1f}"


def span(bounds: Sequence[float], show: Callable[[float], str] = number) -> str:
    return "needs 2 seeds" if math.isnan(bounds[0]) else " to ".join(map(show, bounds))


def duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    unit, size = figures.time_unit(seconds)
    return f"{seconds / size:.{1 if unit == 'h' else 0}f} {unit}"
