"""Statistics over seeds: the seed is the unit of replication, never the episode."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """-> mean, lower and upper bound of Student's t interval; nan bounds for a single value."""
    x = np.asarray(values, float)
    mean = float(x.mean()) if len(x) else float("nan")
    if len(x) < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5)
    return mean, mean - half, mean + half


def iqm(values: Sequence[float]) -> float:
    """The mean of the middle half (Agarwal et al. 2021, section 4.3)."""
    return float(stats.trim_mean(np.asarray(values, float), 0.25)) if len(values) else float("nan")


def probability_of_improvement(x: Sequence[float], y: Sequence[float]) -> float:
    """That a draw of x lies above one of y, ties by half (Agarwal et al. 2021, section 4.3)."""
    return float(stats.mannwhitneyu(x, y).statistic / (len(x) * len(y)))
