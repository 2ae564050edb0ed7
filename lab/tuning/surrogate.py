"""The surrogate over the trials, and the next suggestion.

`ask` is stateless: the same trials give the same suggestion. The surrogate is the Gaussian process
of bayesian-optimization on the encoded space of space.py: Matern 5/2 kernel, one length scale per
axis, and a separate noise variance for each point.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from bayes_opt import BayesianOptimization, acquisition
from bayes_opt.parameter import wrap_kernel
from scipy.optimize import minimize
from scipy.stats import qmc
from sklearn.gaussian_process.kernels import Matern
from threadpoolctl import threadpool_limits

from lab.tuning.space import Space
from lab.tuning.trials import ENDED, Trial

LENGTH_SCALES = (0.05, 20.0)  # in units of the cube
POINTS = 256  # of the Gaussian process: the time of a fit grows with the cube
ONE_SEED = 0.1  # assumed noise variance over the variance of y, if trials have a single seed


class Observation(NamedTuple):
    """One data point of the surrogate."""

    settings: dict[str, Any]
    value: float
    variance: float  # of the value


def observe(trials: Sequence[Trial]) -> list[Observation]:
    """Trials -> data points; [] if no trial has completed. Values: completed, the mean over seeds;
    pruned, an extrapolated final return with more noise; diverged, the worst completed value;
    running, the mean of the completed (constant liar). Failed trials are left out."""
    completed = [trial for trial in trials if trial.state == "completed"]
    if not completed:
        return []
    finals = np.array([trial.final for trial in completed])
    noises = np.array([trial.noise() for trial in completed])
    one_seed = bool(np.isnan(noises).all())
    usual = ONE_SEED * float(finals.var()) if one_seed else float(np.nanmean(noises))

    @functools.cache  # trials are pruned at few different steps
    def gains(step: int) -> np.ndarray:
        """Of the completed trials from that step to their end."""
        return np.array([other.final - other.at(step) for other in completed])

    result = []
    for trial in trials:
        value, variance = float(finals.mean()), usual
        if trial.state == "completed":
            value = trial.final
            if not one_seed:  # shrink: a variance over few seeds is noisy
                variance = (usual + trial.noise()) / 2
        elif trial.state == "pruned":
            gain = gains(max(trial.evaluations))
            value = min(float(np.median(finals)), trial.final + float(np.median(gain)))
            variance = 2 * usual + float(gain.var())
        elif trial.state == "diverged":
            value = float(finals.min())
        if trial.state != "failed":
            result.append(Observation(trial.settings, value, variance))
    return result


def chosen(values: np.ndarray) -> np.ndarray:
    """Indices of at most POINTS values, which are in the order of their trials: the newest third,
    among them the running ones, the best third, and others at even distances."""
    indices, third = np.arange(len(values)), POINTS // 3
    if len(values) <= POINTS:
        return indices
    older = indices[:-third]
    best = older[np.argsort(values[older])[-third:]]
    rest = np.setdiff1d(older, best)
    spread = np.linspace(0, len(rest) - 1, POINTS - 2 * third).round().astype(int)
    return np.sort(np.concatenate([indices[-third:], best, rest[spread]]))


class Improvement(acquisition.ExpectedImprovement):
    """Augmented expected improvement (Huang et al. 2006). The incumbent is the best posterior mean
    among the trials, because the highest observed value is often a lucky seed. A penalty favours
    points where the posterior is uncertain compared with `noise`, a standard deviation. The
    Gaussian process must be fitted before."""

    def __init__(self, noise: float):
        super().__init__(xi=0)
        self.noise, self.greedy = noise, False  # greedy: maximise the posterior mean

    def base_acq(self, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
        if self.greedy:
            return mean
        return super().base_acq(mean, std) * (1 - self.noise / np.hypot(std, self.noise))

    def suggest(self, gp: Any, target_space: Any, n_random: int = 10_000, n_smart: int = 10,
                fit_gp: bool = True, random_state: Any = None) -> np.ndarray:
        self.y_max = gp.predict(target_space.params).max()
        return acquisition.AcquisitionFunction.suggest(
            self, gp, target_space, n_random, n_smart, False, random_state)


def most_probable(objective: Callable[..., tuple[float, np.ndarray]], start: np.ndarray,
                  bounds: np.ndarray) -> tuple[np.ndarray, float]:
    """MAP estimate: -> the log length scales (size,) that maximise likelihood x prior, and the
    negative log posterior there. Called by scikit-learn as its optimizer. With few trials in many
    dimensions the likelihood alone overfits a few axes. The prior is log-normal with variance 3
    and prefers longer scales in more dimensions (Hvarfner et al. 2024, section 4)."""
    middle = 2**0.5 + np.log(len(start)) / 2

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(theta, eval_gradient=True)
        away = theta - middle
        return value + float(np.sum(away**2 / 6 + theta)), gradient + away / 3 + 1

    found = minimize(loss, start, jac=True, bounds=bounds)
    return found.x, float(found.fun)


# The matrices are small: BLAS threads would take the workers' cores (4 times the CPU time)
one_thread = threadpool_limits.wrap(limits=1)


class Surrogate:
    """The Gaussian process fitted to the trials, beyond POINTS settings to some of them. ValueError
    if no trial has completed."""

    def __init__(self, space: Space, trials: Sequence[Trial], seed: int):
        self.space = space
        points: dict[bytes, list[Observation]] = {}
        for observation in observe(trials):
            x = space.encode(observation.settings)
            points.setdefault(x.tobytes(), []).append(observation)
        if not points:
            raise ValueError("no trial has completed")
        # trials of the same setting are averaged into one point with less noise
        vectors = [space.encode(same[0].settings) for same in points.values()]
        values = np.array([np.mean([o.value for o in same]) for same in points.values()])
        variances = np.array([np.mean([o.variance for o in same]) / len(same)
                              for same in points.values()])
        kept = chosen(values)
        vectors, values, variances = [vectors[i] for i in kept], values[kept], variances[kept]
        spread = float(values.var()) or 1.0
        alpha = variances / spread + 1e-6
        self.acquisition = Improvement(float(np.median(alpha) * spread) ** 0.5)
        self.optimizer = BayesianOptimization(
            None, {f"x{axis:03}": (0.0, 1.0) for axis in range(space.size)}, self.acquisition,
            random_state=seed, verbose=0)
        kernel = Matern(np.full(space.size, 0.5), LENGTH_SCALES, nu=2.5)
        self.optimizer.set_gp_params(kernel=wrap_kernel(kernel, space.snap), alpha=alpha,
                                     optimizer=most_probable)
        for x, value in zip(vectors, values, strict=True):
            self.optimizer.register(x, value)
        self.predict(vectors[:1], fit=True)

    @one_thread
    def predict(self, points: Sequence[np.ndarray], fit: bool = False
                ) -> tuple[np.ndarray, np.ndarray]:
        """Encoded points (n, size) -> posterior means and standard deviations, (n,) each."""
        named = [dict(zip(self.optimizer.space.keys, x, strict=True)) for x in points]
        mean, std = self.optimizer.predict(  # type: ignore[misc]
            named, return_std=True, fit_gp=fit)
        return np.asarray(mean), np.asarray(std)

    def means(self, trials: Sequence[Trial]) -> list[float]:
        """The posterior mean at each trial's settings."""
        encoded = [self.space.encode(trial.settings) for trial in trials]
        return [float(mean) for mean in self.predict(encoded)[0]]

    def ranked(self, trials: Sequence[Trial]) -> list[tuple[Trial, float]]:
        """Completed trials with their posterior means, best first; one trial per setting."""
        completed = list({self.space.encode(trial.settings).tobytes(): trial for trial in trials
                          if trial.state == "completed"}.values())
        pairs = zip(completed, self.means(completed), strict=True)
        return sorted(pairs, key=lambda pair: -pair[1])

    @one_thread
    def suggest(self, greedy: bool = False) -> dict[str, Any]:
        """The settings to try next; greedy: those with the highest posterior mean, tried or not."""
        self.acquisition.greedy = greedy
        x = self.optimizer.suggest()
        return self.space.decode(np.array([x[key] for key in self.optimizer.space.keys]))

    def importance(self) -> dict[str, float]:
        """Permutation importance: the mean squared change of the posterior mean when a parameter is
        shuffled over 512 points of the space. Shares sum to 1."""
        points = self.space.snap(qmc.Sobol(self.space.size, rng=0).random_base2(9))
        means, order = self.predict(list(points))[0], np.random.default_rng(0).permutation(512)
        changes, start = {}, 0
        for parameter in self.space.parameters:
            shuffled, axes = points.copy(), slice(start, start + parameter.size)
            shuffled[:, axes] = points[order, axes]
            changed = self.predict(list(shuffled))[0] - means
            changes[parameter.name] = float(np.square(changed).mean())
            start += parameter.size
        return {name: change / (sum(changes.values()) or 1) for name, change in changes.items()}


def ask(space: Space, trials: Sequence[Trial], study_seed: int) -> dict[str, Any]:
    """The settings of trial number len(trials). The first two trials per parameter, and all until
    two have completed, follow a Sobol sequence."""
    number = len(trials)
    completed = sum(trial.state == "completed" for trial in trials)
    if number < 2 * len(space.parameters) or completed < 2:
        sequence = qmc.Sobol(space.size, rng=study_seed)
        return space.decode(sequence.random_base2(number.bit_length())[number])
    seed = int(np.random.SeedSequence([study_seed, number]).generate_state(1)[0])
    return Surrogate(space, trials, seed).suggest()


def judge(space: Space, trials: Sequence[Trial]) -> Surrogate | None:
    """The surrogate of the trials that have ended; None if none has completed."""
    ended = [trial for trial in trials if trial.state in ENDED]
    completed = any(trial.state == "completed" for trial in ended)
    return Surrogate(space, ended, 0) if completed else None


def ranked(space: Space, trials: Sequence[Trial]) -> list[tuple[Trial, float]]:
    """As Surrogate.ranked; [] if no trial has completed."""
    surrogate = judge(space, trials)
    return surrogate.ranked(trials) if surrogate else []


def near_best(trials: Sequence[Trial]) -> str:
    """How many completed trials are within one standard error of the best observed return."""
    completed = [trial for trial in trials if trial.state == "completed"]
    if np.isnan([trial.noise() for trial in completed]).all():
        return "how many trials are near the best: needs two seeds a trial"
    observations = observe(completed)
    best = max(observations, key=lambda o: o.value)
    number = completed[observations.index(best)].number
    error = best.variance**0.5
    near = sum(o.value >= best.value - error for o in observations)
    return (f"{near} of {len(completed)} completed trials are within one standard error "
            f"({error:.1f}, from its seeds and those of all trials) of the best observed return, "
            f"{best.value:.1f} (trial {number})")


class Candidate(NamedTuple):
    """A setting that a study recommends."""

    name: str
    settings: dict[str, Any]
    mean: float  # posterior mean
    observed: float | None  # return of its trial, None if it was not tried


def recommend(space: Space, trials: Sequence[Trial], count: int) -> list[Candidate]:
    """The settings with the highest posterior means, best first: completed trials and the
    surrogate's optimum, which has usually not been tried. [] if no trial has completed."""
    surrogate = judge(space, trials)
    if surrogate is None:
        return []
    found = {space.encode(trial.settings).tobytes(): Candidate(
        f"trial {trial.number}", trial.settings, mean, trial.final)
        for trial, mean in surrogate.ranked(trials)}
    optimum = surrogate.suggest(greedy=True)
    encoded = space.encode(optimum)
    mean = float(surrogate.predict([encoded])[0][0])
    found.setdefault(encoded.tobytes(), Candidate(f"optimum of {len(trials)}", optimum, mean,
                                                   None))
    return sorted(found.values(), key=lambda candidate: -candidate.mean)[:count]
