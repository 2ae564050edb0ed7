"""Statistics over seeds: the unit of replication is the seed, not the episode.

Across environments as in Agarwal et al. 2021, arXiv 2108.13264: `strata` has one array (..., n) per
environment, the scores of its n runs; n may differ.
"""

from collections.abc import Callable, Sequence

import numpy as np

Strata = Sequence[np.ndarray]
RESAMPLES = 2_000  # bootstrap resamples


def t_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """-> mean, lower and upper bound of Student's t interval; nan bounds below two values."""
    from scipy.special import stdtrit  # here, since every training process imports this module

    x = np.asarray(values, float)
    mean = float(x.mean()) if len(x) else float("nan")
    if len(x) < 2:
        return mean, float("nan"), float("nan")
    half = float(stdtrit(len(x) - 1, (1 + confidence) / 2) * x.std(ddof=1) / len(x) ** 0.5)
    return mean, mean - half, mean + half


def median(values: Sequence[float]) -> float:
    return float(np.median(values)) if len(values) else float("nan")


def iqm(values: Sequence[float]) -> float:
    """The mean of the middle half (Agarwal et al. 2021, section 4.3)."""
    return float(pooled_iqm([np.asarray(values, float)])) if len(values) else float("nan")


def pooled_iqm(strata: Strata) -> np.ndarray:
    """-> (...): the mean of the middle half of the runs, pooled over environments."""
    from scipy.stats import trim_mean  # slow to import

    return np.asarray(trim_mean(np.concatenate(strata, axis=-1), 0.25, axis=-1))


def performance_profile(strata: Strata, scores: np.ndarray) -> np.ndarray:
    """-> (..., T): share of runs above each of the scores (T,), averaged over environments (section
    4.2)."""
    return np.mean([(x[..., None, :] > scores[:, None]).mean(-1) for x in strata], axis=0)


def probability_of_improvement(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray
                               ) -> np.ndarray:
    """-> (...): P(X > Y) for draws from x (..., n) and y (..., m), ties counting half (section
    4.3)."""
    a, b = np.asarray(x, float)[..., :, None], np.asarray(y, float)[..., None, :]
    return ((a > b) + 0.5 * (a == b)).mean((-2, -1))


def mean_improvement(pairs: Strata) -> np.ndarray:
    """-> (...): probability of improvement, averaged over environments. pairs: x, y, x, y, ..."""
    return np.mean([probability_of_improvement(x, y)
                    for x, y in zip(pairs[::2], pairs[1::2], strict=True)], axis=0)


def stratified_bootstrap(strata: Strata, statistic: Callable[[Strata], np.ndarray],
                         confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """-> lower and upper bound of the percentile interval of statistic(strata), resampling the runs
    of each environment with replacement (section 4.1). The bootstrap has a fixed seed. nan bounds
    if an environment has a single run."""
    rng = np.random.default_rng(0)
    drawn = [x[rng.integers(len(x), size=(RESAMPLES, len(x)))] for x in strata]
    values = statistic(drawn)
    tails = (1 - confidence) / 2, (1 + confidence) / 2
    lower, upper = np.quantile(values, tails, axis=0)
    if min(map(len, strata)) < 2:
        return np.full_like(lower, np.nan), np.full_like(upper, np.nan)
    return lower, upper
