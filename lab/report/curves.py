"""The final table and the learning curves of one run."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from lab import stats
from lab.report.fitted import Fitted
from lab.training import recorder

Curves = dict[int, list[tuple[int, float]]]  # seed -> (step, return)


def final_returns(group: Path, seeds: Sequence[int], steps: int, tag: str = "return/eval"
                  ) -> dict[int, float]:
    """The return of each seed that reached `steps`, there, or the step at which the run stopped.
    Its run may be longer."""
    steps = (recorder.read_stop(group) or {}).get("step", steps)
    curves = read_curves(group, seeds, tag)
    return {seed: next(value for step, value in curve if step >= steps)
            for seed, curve in curves.items() if curve and curve[-1][0] >= steps}


def read_curves(group: Path, seeds: Sequence[int], tag: str) -> Curves:
    return {seed: [(row["step"], row[tag])
                   for row in recorder.read_metrics(group / f"seed_{seed}" / "metrics.jsonl")
                   if tag in row] for seed in seeds}


def table(returns: Mapping[str, Mapping[int, float]], title: str) -> Fitted:
    """{environment: {seed: final return}} -> a table with intervals."""
    result = Table(title=title, title_justify="left")
    for heading in ("environment", "n", "mean", "95% t interval", "IQM", "each seed"):
        name = heading == "environment"
        result.add_column(heading, justify="left" if name else "right", no_wrap=name)
    for env_id, by_seed in returns.items():
        values = list(by_seed.values())
        mean, lower, upper = stats.t_interval(values)
        interval = "needs 2 seeds" if math.isnan(lower) else f"{lower:.1f} to {upper:.1f}"
        each = " ".join(f"{seed}:{value:.1f}" for seed, value in sorted(by_seed.items()))
        result.add_row(env_id, str(len(values)), f"{mean:.1f}", interval,
                       f"{stats.iqm(values):.1f}", each)
    return Fitted(result)


def import_pyplot() -> Any:
    """matplotlib.pyplot, which draws without a display and takes names with dollars."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False
    from matplotlib import pyplot

    return pyplot


def draw_learning_curves(path: Path, curves: Mapping[str, Curves], title: str,
                         ylabel: str = "evaluation return") -> None:
    """One panel per environment."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(1, len(curves), figsize=(6 * len(curves), 4), squeeze=False,
                                   layout="constrained")
    for axis, (env_id, by_seed) in zip(axes[0], curves.items(), strict=True):
        draw_curve(axis, by_seed, "tab:blue")
        axis.set(title=f"{env_id}, {len(by_seed)} seeds", xlabel="steps of one seed",
                 ylabel=ylabel)
        axis.grid(alpha=0.3)
    figure.suptitle(textwrap.fill(recorder.printable(title), 60 * len(curves))
                    + "\nthin: seeds; thick: mean; band: 95% t interval")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_curve(axis: Any, by_seed: Curves, color: str, label: str | None = None) -> None:
    """Seeds as thin lines, their mean as a thick one, its 95% t interval as a band."""
    for curve in by_seed.values():
        steps, returns = zip(*curve, strict=True) if curve else ((), ())
        axis.plot(steps, returns, color=color, linewidth=0.8, alpha=0.4)
    points = band(by_seed)
    steps, means, lower, upper = zip(*points, strict=True) if points else [()] * 4
    axis.plot(steps, means, color=color, linewidth=2.2, label=label)
    axis.fill_between(steps, lower, upper, color=color, alpha=0.15, linewidth=0)


def band(by_seed: Curves) -> list[tuple[int, float, float, float]]:
    """(step, mean, lower, upper) over the seeds that got that far, if all have the step."""
    at_step: dict[int, list[float]] = {}
    for curve in by_seed.values():
        for step, value in curve:
            at_step.setdefault(step, []).append(value)
    ends = [curve[-1][0] for curve in by_seed.values() if curve]
    return [(step, *stats.t_interval(values)) for step, values in sorted(at_step.items())
            if len(values) == sum(end >= step for end in ends)]
