"""The plots of a report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib import colors as mpl_colors
from matplotlib.ticker import EngFormatter

from lab.report import curves, published
from lab.report.compare import Aggregate, Improvement
from lab.report.runs import Result

# ten colours, then lighter ones
COLORS = [mpl_colors.to_hex(colormaps["tab20"](i)) for i in (*range(0, 20, 2), *range(1, 20, 2))]
BEYOND = 1.05  # no published points beyond this multiple of the longest curve
pyplot = curves.import_pyplot()
pyplot.rcParams.update({
    "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 10, "legend.frameon": False, "savefig.dpi": 130})


def learning_curves(path: Path, results: Sequence[Result], colors: dict[str, str]) -> None:
    """All methods in one environment, over steps and over wall-clock time."""
    figure, (by_step, by_time) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained",
                                                 sharey=True)
    unit, seconds = time_unit(max((seed.curve[-1].seconds for result in results
                                   for seed in result.seeds.values() if seed.curve), default=0))
    for result in results:
        color = colors[result.method]
        for seed in result.seeds.values():
            steps, returns, times = zip(*seed.curve, strict=True) if seed.curve else [()] * 3
            by_step.plot(steps, returns, color=color, linewidth=0.7, alpha=0.45)
            by_time.plot(np.divide(times, seconds), returns, color=color, linewidth=0.7, alpha=0.45)
        band = curves.band({n: [(e.step, e.value) for e in seed.curve]
                            for n, seed in result.seeds.items()})
        steps, means, lower, upper = zip(*band, strict=True) if band else [()] * 4
        elapsed = [np.mean([e.seconds for e in result.at(step).values()]) for step in steps]
        for axis, xs in ((by_step, steps), (by_time, np.divide(elapsed, seconds))):
            axis.plot(xs, means, color=color, linewidth=2.2,
                      label=shown(f"{result.method} (n = {result.evaluated})"))
            axis.fill_between(xs, lower, upper, color=color, alpha=0.15, linewidth=0)
    _published(by_step, results, colors)
    by_step.set(xlabel="steps of one seed", ylabel="evaluation return")
    by_step.xaxis.set_major_formatter(EngFormatter(sep=""))
    by_time.set(xlabel=f"wall-clock ({unit})")
    figure.suptitle(results[0].environment, fontweight="bold")
    figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path)
    pyplot.close(figure)


def shown(label: str) -> str:
    """The label of a curve: matplotlib leaves those that begin with _ out of a legend."""
    return f" {label}" if label.startswith("_") else label


def _published(axis: Any, results: Sequence[Result], colors: dict[str, str]) -> None:
    """Crosses, once per algorithm, in the colour of its first method."""
    ends = [seed.curve[-1].step for result in results for seed in result.seeds.values()
            if seed.curve]
    drawn = set()
    for result in results:
        points = [point for point in published.points(result.agent, result.environment)
                  if point.steps <= BEYOND * max(ends, default=0)]
        if points and result.agent not in drawn:
            drawn.add(result.agent)
            axis.plot([p.steps for p in points], [p.mean for p in points], "X", markersize=9,
                      color=colors[result.method], markeredgecolor="black", clip_on=False, zorder=5,
                      label=f"{result.agent}, published")


def time_unit(seconds: float) -> tuple[str, float]:
    """-> a suitable unit for this duration, and its length in seconds."""
    return next((pair for pair in (("h", 3600.0), ("min", 60.0)) if seconds > 2 * pair[1]),
                ("s", 1.0))


def across_environments(path: Path, aggregates: Sequence[Aggregate], colors: dict[str, str]
                        ) -> None:
    """Interquartile means and performance profiles."""
    figure, (means, profiles) = pyplot.subplots(
        1, 2, figsize=(10, max(3.2, 1.6 + 0.4 * len(aggregates))), layout="constrained",
        width_ratios=(2, 3))
    for index, each in enumerate(aggregates):
        color = colors[each.method]
        _interval(means, index, each.iqm, color)
        profiles.plot(each.scores, each.profile, color=color, linewidth=2, label=shown(each.method),
                      drawstyle="steps-post")
        profiles.fill_between(each.scores, each.lower, each.upper, color=color, alpha=0.15,
                              linewidth=0, step="post")
    _names(means, [each.method for each in aggregates])
    means.set(xlabel="IQM of normalised scores")
    profiles.set(xlabel="normalised score", ylabel="share of runs above it", ylim=(-0.02, 1.02))
    profiles.legend(loc="lower left")
    figure.savefig(path)
    pyplot.close(figure)


def improvements(path: Path, found: Sequence[Improvement], baseline: str, colors: dict[str, str]
                 ) -> None:
    figure, axis = pyplot.subplots(figsize=(10, 1.4 + 0.4 * len(found)), layout="constrained")
    for index, each in enumerate(found):
        _interval(axis, index, each.probability, colors[each.method])
    axis.axvline(0.5, color="black", linewidth=1, linestyle="--")
    _names(axis, [each.method for each in found])
    axis.set(xlabel=f"P(a run scores higher than one of {baseline})", xlim=(-0.02, 1.02))
    figure.savefig(path)
    pyplot.close(figure)


def _interval(axis: Any, index: int, interval: tuple[float, float, float], color: str) -> None:
    value, lower, upper = interval
    axis.plot([lower, upper], [index, index], color=color, linewidth=7, alpha=0.35,
              solid_capstyle="butt")
    axis.plot(value, index, "|", color=color, markersize=16, markeredgewidth=3)


def _names(axis: Any, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
