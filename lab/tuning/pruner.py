"""When to stop a trial early."""

from collections.abc import Sequence

import numpy as np

from lab.tuning.trials import Trial


def prune(trial: Trial, trials: Sequence[Trial], n_startup_trials: int = 5, n_warmup_steps: int = 0,
          interval_steps: int = 1, n_min_trials: int = 1) -> bool:
    """Whether to stop `trial` at its last evaluation, by Vizier's median rule (Golovin et al. 2017,
    section 3.2.1): prune if its best evaluation so far is strictly below the median of the
    completed trials' running averages at that step. Arguments as in Optuna's MedianPruner."""
    steps = sorted(trial.evaluations)
    step, before = steps[-1], steps[-2] if len(steps) > 1 else -1
    due = n_warmup_steps + (step - n_warmup_steps) // interval_steps * interval_steps
    completed = [other for other in trials if other.state == "completed"]
    if step < n_warmup_steps or before >= due or len(completed) < n_startup_trials:
        return False
    reached = [[mean for s, mean in other.means.items() if s <= step] for other in completed]
    averages = [np.mean(means) for means in reached if means]
    if len(averages) < max(1, n_min_trials):
        return False
    return max(trial.means.values()) < float(np.median(averages))
