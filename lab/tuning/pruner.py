"""When to stop a trial early. Names and rules as Optuna's pruners, besides Vizier's."""

from collections.abc import Sequence

import numpy as np

from lab.options import Pruner
from lab.tuning.trials import Trial


def prune(trial: Trial, trials: Sequence[Trial], pruner: Pruner = "median",
          percentile: float = 25.0, n_startup_trials: int = 5, n_warmup_steps: int = 0,
          interval_steps: int = 1, patience: int | None = None) -> bool:
    """Whether to stop `trial` at its last evaluation: if its best evaluation so far is strictly
    below the bar that the completed trials set, and if the last `patience` + 1 evaluations brought
    no new best. Arguments as in Optuna's PercentilePruner and PatientPruner."""
    steps = sorted(trial.evaluations)
    step, before = steps[-1], steps[-2] if len(steps) > 1 else -1
    due = n_warmup_steps + (step - n_warmup_steps) // interval_steps * interval_steps
    completed = [other for other in trials if other.state == "completed"]
    if step < n_warmup_steps or before >= due or len(completed) < n_startup_trials:
        return False
    means = [trial.means[s] for s in steps]
    if patience is not None and (len(means) < patience + 2 or
                                 max(means[-patience - 1:]) >= max(means[:-patience - 1])):
        return False
    return max(means) < bar(completed, step, pruner, percentile)


def bar(completed: Sequence[Trial], step: int, pruner: Pruner, percentile: float) -> float:
    """The return that a trial must reach by this step.

    median, percentile: that of the completed trials at the step; the best `percentile` percent of
    them reach it. vizier: the median of their running averages (Golovin et al. 2017, section
    3.2.1)."""
    if pruner == "vizier":
        reached = [[mean for s, mean in other.means.items() if s <= step] for other in completed]
        averages = [np.mean(means) for means in reached if means]
        return float(np.median(averages)) if averages else -np.inf
    share = 50.0 if pruner == "median" else percentile
    return float(np.percentile([other.at(step) for other in completed], 100 - share))
