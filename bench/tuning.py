"""The tuner against random search, plain bayes_opt and Optuna's samplers, on noisy objectives.

    python bench/tuning.py --peers .bench-venv/bin/python       test functions, time of an ask
    python bench/tuning.py --pruning                            studies with and without pruning

Each repeat makes 40 evaluations of 3 seeds. A seed's return is the objective plus noise as in RL:
normal with a fifth of the objective's standard deviation over the space, and one seed in twenty
collapses by one standard deviation. Reported is the noise-free simple regret of the point that a
method recommends at the end: for the lab the highest posterior mean over the whole space, for the
others the highest observed mean. Methods are told which parameters are integer or logarithmic,
except plain bayes_opt, which is told neither. Objectives are maximised.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
EVALUATIONS, SEEDS = 40, 3
METHODS = ("lab", "random search", "plain bayes_opt", "Optuna TPE", "Optuna GP")
A = np.array([[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8],
              [17, 8, 0.05, 10, 0.1, 14]])
P = 1e-4 * np.array([[1312, 1696, 5569, 124, 8283, 5886], [2329, 4135, 8307, 3736, 1004, 9991],
                     [2348, 1451, 3522, 2883, 3047, 6650], [4047, 8828, 8732, 5743, 1091, 381]])


def branin(x0: float, x1: float) -> float:
    bend = x1 - 5.1 / (4 * math.pi**2) * x0**2 + 5 / math.pi * x0 - 6
    return -(bend**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x0) + 10)


def hartmann(**x: float) -> float:
    z = np.array([x[f"x{i}"] for i in range(6)])
    return float(np.array([1, 1.2, 3, 3.2]) @ np.exp(-(A * (z - P) ** 2).sum(1)))


def valley(lr: float, batch_size: int) -> float:
    """Like a learning rate: a gentle slope below the optimum, which grows with the batch size, and
    a cliff above it."""
    distance = math.log10(lr / (3e-4 * (batch_size / 128) ** 0.5))
    return 100 * math.exp(-(distance / (0.4 if distance > 0 else 1.0)) ** 2)


# name -> objective, its maximum, its standard deviation over the space, the space as in --space
OBJECTIVES = {
    "Branin": (branin, -0.397887, 51.3, ("x0=-5:10", "x1=0:15")),
    "Hartmann-6": (hartmann, 3.32237, 0.383, tuple(f"x{i}=0:1" for i in range(6))),
    "learning-rate valley": (valley, 100.0, 37.0, ("lr=log:1e-6:1e-1", "batch_size=logint:16:512")),
}


def sample(name: str, settings: dict, rng: np.random.Generator) -> list[float]:
    """A noisy return for each seed."""
    objective, _, spread, _ = OBJECTIVES[name]
    noise = 0.2 * rng.normal(size=SEEDS) - (rng.random(SEEDS) < 0.05)
    return (objective(**settings) + spread * noise).tolist()


def bounds(name: str) -> dict[str, tuple[str, float, float]]:
    """parameter -> kind, low, high."""
    parts = [text.replace("=", ":").split(":") for text in OBJECTIVES[name][3]]
    return {p[0]: (p[1] if len(p) == 4 else "", *map(float, p[-2:])) for p in parts}


def read_space(name: str):
    from dataclasses import make_dataclass

    from lab.tuning import space

    fields = [(key, int if "int" in kind else float) for key, (kind, *_) in bounds(name).items()]
    return space.read(OBJECTIVES[name][3], make_dataclass("Config", fields), name)


def run_lab(name: str, seed: int, rng: np.random.Generator) -> dict:
    from lab.tuning import surrogate
    from lab.tuning.trials import Trial

    searched, trials = read_space(name), []
    for number in range(EVALUATIONS):
        settings = surrogate.ask(searched, trials, seed)
        trials.append(Trial(number, settings, "completed",
                            {1: sample(name, settings, rng)}))
    return surrogate.recommend(searched, trials, 1)[0].settings


def run_random(name: str, seed: int, rng: np.random.Generator) -> dict:
    searched, draws = read_space(name), np.random.default_rng([seed, 1])
    tried = [searched.decode(draws.random(searched.size)) for _ in range(EVALUATIONS)]
    return max(tried, key=lambda settings: statistics.mean(sample(name, settings, rng)))


def run_bayes_opt(name: str, seed: int, rng: np.random.Generator) -> dict:
    from bayes_opt import BayesianOptimization

    def rounded(values: dict) -> dict:
        return {key: round(values[key]) if "int" in kind else values[key]
                for key, (kind, *_) in bounds(name).items()}

    optimizer = BayesianOptimization(
        lambda **values: statistics.mean(sample(name, rounded(values), rng)),
        {key: ends for key, (_, *ends) in bounds(name).items()}, random_state=seed, verbose=0,
        allow_duplicate_points=True)
    optimizer.maximize(init_points=5, n_iter=EVALUATIONS - 5)
    return rounded(optimizer.max["params"])


def run_optuna(name: str, seed: int, rng: np.random.Generator, gp: bool) -> dict:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.GPSampler if gp else optuna.samplers.TPESampler
    study = optuna.create_study(direction="maximize", sampler=sampler(seed=seed))

    def objective(trial) -> float:
        settings = {}
        for key, (kind, low, high) in bounds(name).items():
            if "int" in kind:
                settings[key] = trial.suggest_int(key, int(low), int(high), log="log" in kind)
            else:
                settings[key] = trial.suggest_float(key, low, high, log=kind == "log")
        return statistics.mean(sample(name, settings, rng))

    study.optimize(objective, n_trials=EVALUATIONS)
    return study.best_params


def measure(method: str, name: str, repeat: int) -> float:
    """Simple regret in one repeat, which has the same noise for every method."""
    run = {"lab": run_lab, "random search": run_random, "plain bayes_opt": run_bayes_opt,
           "Optuna TPE": lambda *a: run_optuna(*a, gp=False),
           "Optuna GP": lambda *a: run_optuna(*a, gp=True)}[method]
    settings = run(name, repeat, np.random.default_rng([repeat, 0]))
    objective, maximum, *_ = OBJECTIVES[name]
    return maximum - objective(**settings)


def time_of_an_ask(trials: int, repeats: int = 5) -> list[float]:
    """CPU seconds of an ask with that many completed trials in six dimensions."""
    from lab.tuning import surrogate
    from lab.tuning.trials import Trial

    rng, searched = np.random.default_rng(0), read_space("Hartmann-6")
    recorded, seconds = [], []
    for number in range(trials):
        settings = searched.decode(rng.random(searched.size))
        recorded.append(Trial(number, settings, "completed",
                              {1: sample("Hartmann-6", settings, rng)}))
    for seed in range(repeats):
        start_time = time.process_time()
        surrogate.ask(searched, recorded, seed)
        seconds.append(time.process_time() - start_time)
    return seconds


def markdown(result: dict) -> str:
    lines = [f"Simple regret after {EVALUATIONS} evaluations of {SEEDS} seeds, median and "
             f"quartiles of {result['repeats']} repeats", "",
             "| | " + " | ".join(OBJECTIVES) + " |",
             "|---" * (1 + len(OBJECTIVES)) + "|"]
    for method in METHODS:
        cells = []
        for name in OBJECTIVES:
            values = result["regret"].get(f"{method}, {name}")
            low, middle, high = np.percentile(values, [25, 50, 75]) if values else [math.nan] * 3
            cells.append(f"{middle:.3g} ({low:.3g} to {high:.3g})" if values else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    asks = ", ".join(f"{statistics.median(seconds):.1f} s of one core at {trials} recorded trials"
                     for trials, seconds in result["ask_s"].items())
    lines += ["", f"One suggestion with six parameters: {asks}"]
    return "\n".join(lines) + "\n"


def compare(options: argparse.Namespace) -> None:
    from bench.speed import versions
    from lab.training.recorder import processor

    regret: dict[str, list[float]] = {}
    if options.out.exists() and options.objectives != list(OBJECTIVES):
        regret = json.loads(options.out.read_text())["regret"]  # keep the others
    for name in options.objectives:
        for method in METHODS:
            python = options.peers if method.startswith("Optuna") else sys.executable
            if not python:
                continue
            command = [python, __file__, "--measure", method, name, str(options.repeats)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if done.returncode:
                raise SystemExit(f"{method} on {name} failed:\n{done.stderr[-2000:]}")
            regret[f"{method}, {name}"] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}, {method}: median regret "
                  f"{statistics.median(regret[f'{method}, {name}']):.3g}", flush=True)
    result = {
        "command": "python bench/tuning.py", "repeats": options.repeats, "regret": regret,
        "ask_s": {str(trials): time_of_an_ask(trials) for trials in (100, 500)},
        "processor": processor(), "python": platform.python_version(),
        "versions": versions(sys.executable, ["bayesian-optimization", "scikit-learn", "scipy"]),
        "peer_versions": versions(options.peers, ["optuna", "torch"]) if options.peers else {},
    }
    write(options.out, result, markdown(result))


def write(out: Path, result: dict, table: str) -> None:
    out.write_text(json.dumps(result, indent=1) + "\n")
    out.with_suffix(".md").write_text(table)
    print(f"{table}\nwritten: {out}")


# Pruning

STUDY = "--trials 20 --seeds 2 --workers 1 --space "
STUDIES = {
    "SAC, Pendulum-v1": (
        4_000, "agents/sac.py --env Pendulum-v1 --actor-width 64 --qf-width 64", STUDY +
        "actor_lr=log:1e-4:1e-1 qf_lr=log:1e-4:1e-1 gamma=0.8:0.999 batch_size=logint:16:256 "
        "tau=log:1e-3:1e-1"),
    "PPO, Pendulum-v1": (
        60_000, "agents/ppo.py --env Pendulum-v1 --num-steps 1024", STUDY +
        "lr=log:1e-4:1e-2 gamma=0.8:0.999 gae_lambda=0.5:1 update_epochs=int:3:20 "
        "clip_coef=log:0.05:1"),
    "PPO, CartPole-v1": (
        20_000, "agents/ppo_discrete.py --env CartPole-v1 --num-steps 256", STUDY +
        "lr=log:1e-4:1e-1 gamma=0.8:0.999 gae_lambda=0.5:1 update_epochs=int:3:20 "
        "clip_coef=log:0.05:1"),
}
RULE = "--prune --pruner percentile --patience None --n-warmup-steps {}"  # a third of the steps


def study(name: str, prune: bool) -> dict:
    """Run or resume a study -> the steps of its trials, and its confirmed returns."""
    steps, run, rest = STUDIES[name]
    flags = RULE.format(steps // 3) if prune else "--no-prune"
    label = f"pruning-{Path(run.split()[0]).stem}-{'with' if prune else 'without'}"
    command = f"{run} --steps {steps} {rest} {flags} --name {label}"
    subprocess.run([sys.executable, "hypertune.py", *command.split()], cwd=ROOT, check=True)
    from lab.tuning.trials import Journal

    folder = ROOT / "runs/studies" / label
    journal = Journal(folder / "trials.jsonl")
    trials, seeds = journal.trials(), journal.header["seeds"]
    journal.close()
    best = json.loads((folder / "best.json").read_text())["study"]
    return {"study": name, "pruning": prune, "command": f"python hypertune.py {command}",
            "steps": sum(max(t.evaluations, default=0) * seeds for t in trials),
            "pruned": sum(t.state == "pruned" for t in trials), "trials": len(trials),
            "best": best["is"], "confirmed": best["confirmed"], "defaults": best["defaults"]}


def pruning(options: argparse.Namespace) -> None:
    from lab.training.recorder import versions

    rows = [study(name, prune) for name in STUDIES for prune in (False, True)]
    write(options.out, {"command": "python bench/tuning.py --pruning", "versions": versions(),
                        "rows": rows}, pruning_table(rows))


def interval(returns: Sequence[float]) -> str:
    """The mean and its 95% t interval."""
    from lab import stats

    mean, low, high = stats.t_interval(returns)
    return f"{mean:.0f} ({low:.0f} to {high:.0f})"


def pruning_table(rows: list[dict]) -> str:
    """Each pair of studies: without pruning, and with it."""
    lines = ["| study | pruned | environment steps saved | confirmed return of the best, without "
             "pruning | with pruning | of the defaults |", "|---|---|---|---|---|---|"]
    for without, pruned in zip(rows[::2], rows[1::2], strict=True):
        saved = 1 - pruned["steps"] / without["steps"]
        cells = [pruned["study"], f"{pruned['pruned']} of {pruned['trials']}", f"{saved:.0%}",
                 *(interval(row["confirmed"]) for row in (without, pruned)),
                 interval(pruned["defaults"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", help="Python of the virtual environment with Optuna")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--objectives", nargs="*", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--pruning", action="store_true", help="studies with and without pruning")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    name = "pruning" if options.pruning else "tuning"
    options.out = options.out or ROOT / f"bench/results/{name}.json"
    if options.measure:
        method, name, repeats = options.measure
        print(json.dumps([measure(method, name, repeat) for repeat in range(int(repeats))]))
    elif options.pruning:
        pruning(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
