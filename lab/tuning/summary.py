"""The final table of a study and its plot, study.png."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from lab import stats
from lab.report.curves import import_pyplot
from lab.report.fitted import Fitted
from lab.tuning.space import Parameter, Space
from lab.tuning.surrogate import Surrogate
from lab.tuning.trials import Trial

GRID = 101  # points of a slice
MARKS = {"completed": ("o", "tab:blue"), "pruned": ("v", "tab:orange"),
         "diverged": ("x", "tab:red"), "failed": ("x", "tab:gray")}


class Column(NamedTuple):
    """A confirmed setting in the table. None: it was not tuned, or no trial tried it."""

    name: str
    config: dict[str, Any]
    tuned: float | None  # posterior mean
    observed: float | None  # return of its trial
    confirmed: list[float]  # returns


def table(space: Space, columns: Sequence[Column], seeds: int, declared: str = "") -> Fitted:
    """columns: the defaults first."""
    result = Table(title=f"evaluation return, confirmed on {seeds} held-out seeds"
                   + declared, title_justify="left")
    result.add_column("")
    for column in columns:
        result.add_column(column.name, justify="right")
    for parameter in space.parameters:
        result.add_row(parameter.name, *(str(column.config[parameter.name]) for column in columns))
    result.add_section()
    confirmed = [column.confirmed for column in columns]
    intervals = [stats.t_interval(returns) for returns in confirmed]
    optimism = [None if column.observed is None else column.observed - mean
                for column, (mean, *_) in zip(columns, intervals, strict=True)]
    for label, values in (("tuned (posterior mean)", [column.tuned for column in columns]),
                          ("observed in its trial", [column.observed for column in columns]),
                          ("confirmed, mean", [mean for mean, *_ in intervals]),
                          ("optimism (observed - confirmed)", optimism)):
        result.add_row(label, *("" if value is None else f"{value:.1f}" for value in values))
    result.add_row("95% t interval", *(
        "needs 2 seeds" if math.isnan(low) else f"{low:.1f} to {high:.1f}"
        for _, low, high in intervals))
    result.add_row("n", *(str(len(returns)) for returns in confirmed))
    result.add_row("P(better than defaults)", "", *(
        f"{stats.probability_of_improvement(returns, confirmed[0]):.2f}"
        if returns and confirmed[0] else "" for returns in confirmed[1:]))
    return Fitted(result)


def draw(path: Path, space: Space, trials: Sequence[Trial], title: str) -> None:
    """History, importance, and for each parameter a slice through the best trial."""
    pyplot = import_pyplot()
    count = 2 + len(space.parameters)
    columns = min(4, count)
    figure, axes = pyplot.subplots(-(-count // columns), columns, squeeze=False,
                                   figsize=(4.2 * columns, 3.6 * -(-count // columns)),
                                   layout="constrained")
    history, importance, *slices = axes.flat
    surrogate = Surrogate(space, trials, 0)
    best, best_mean = surrogate.ranked(trials)[0]
    _draw_history(history, surrogate, trials, best, best_mean)
    shares = surrogate.importance()
    importance.barh(list(shares), list(shares.values()), color="tab:blue")
    importance.invert_yaxis()
    importance.set(title="importance", xlabel="permutation importance (shares of 1)", xlim=(0, 1))
    for axis, parameter in zip(slices, space.parameters, strict=False):
        _draw_slice(axis, surrogate, parameter, trials, best)
    for axis in slices[len(space.parameters):]:
        axis.remove()
    figure.suptitle(textwrap.fill(title, 40 * columns))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_history(axis: Any, surrogate: Surrogate, trials: Sequence[Trial], best: Trial,
                  best_mean: float) -> None:
    """Small marks are seeds; failed and diverged trials are drawn at the lowest return."""
    values = [value for trial in trials if trial.state in ("completed", "pruned")
              for value in trial.evaluations[max(trial.evaluations)]]
    completed = [trial for trial in trials if trial.state == "completed"]
    for trial in completed:
        seeds = trial.evaluations[max(trial.evaluations)]
        axis.plot([trial.number] * len(seeds), seeds, "_", color="tab:blue", alpha=0.5)
    for state, (mark, color) in MARKS.items():
        shown = [(t.number, _height(t, min(values))) for t in trials if t.state == state]
        if shown:
            axis.plot(*zip(*shown, strict=True), mark, color=color, label=f"{len(shown)} {state}")
    axis.plot([t.number for t in completed], surrogate.means(completed), "o", mfc="none",
              color="black", markersize=8, label="posterior mean")
    axis.plot(best.number, best_mean, "*", color="black", markersize=14, label="best trial")
    axis.set(title="history", xlabel="trial", ylabel="last evaluation return")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def _height(trial: Trial, lowest: float) -> float:
    return trial.final if trial.state in ("completed", "pruned") else lowest


def _draw_slice(axis: Any, surrogate: Surrogate, parameter: Parameter, trials: Sequence[Trial],
                best: Trial) -> None:
    """Posterior mean +- two standard deviations through the best trial, and all trials."""
    if parameter.choices:
        values: list[Any] = list(parameter.choices)
    else:
        grid = parameter.numbers(np.linspace(0, 1, GRID))
        values = [int(v) if parameter.whole else float(v) for v in dict.fromkeys(grid.tolist())]
    encoded = [surrogate.space.encode(best.settings | {parameter.name: v}) for v in values]
    mean, std = surrogate.predict(encoded)
    xs = list(range(len(values))) if parameter.choices else values
    axis.plot(xs, mean, color="tab:blue", marker="o" if parameter.choices else "")
    axis.fill_between(xs, mean - 2 * std, mean + 2 * std, color="tab:blue", alpha=0.15,
                      linewidth=0)
    lowest = float(min(mean - 2 * std))
    for state, (mark, color) in MARKS.items():
        shown = [(t.settings[parameter.name], _height(t, lowest)) for t in trials
                 if t.state == state]
        shown = [(parameter.choices.index(v) if parameter.choices else v, y) for v, y in shown]
        if shown:
            axis.plot(*zip(*shown, strict=True), mark, color=color, markersize=4)
    if parameter.choices:
        axis.set_xticks(xs, [str(value) for value in values])
    if parameter.log:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")  # import_pyplot turns formulas off
        axis.xaxis.set_minor_formatter("")
    axis.set(title=f"{parameter.name} (others as in the best trial)", xlabel=parameter.name)
    axis.grid(alpha=0.3)
