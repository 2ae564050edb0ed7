"""Learning results: run the experiments below and store their results in bench/results/.

    python bench/learning.py                       all experiments without a result
    python bench/learning.py sac-pendulum          one experiment, even if it has a result
    python bench/learning.py sac-pendulum --run runs/sac-pendulum-20260101-000000   store that run

An interrupted run is resumed. `--run` stores a run as far as it got, without training. Stored are
config, versions, learning curves, and every evaluation of every seed in scores.csv. From
scores.csv, learning.md, summary.md, bf16.md and curves.png are made. `python bench/readme.py` puts
the tables into the docs.
"""

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab import stats  # noqa: E402
from lab.options import SCRIPTS, Options, Simple, Vectorised, parse_args  # noqa: E402
from lab.report import curves, published  # noqa: E402
from lab.training import recorder  # noqa: E402

RESULTS, PICTURE = ROOT / "bench/results", "learning_curves.png"
SCORES = RESULTS / "scores.csv"
Scores = dict[str, dict[tuple[int, int], float]]  # experiment -> (seed, step) -> evaluation return
CHEETAH, HOPPER, WALKER, BIPED = (f"--env {env} --seeds 5 --steps 100_000" for env in (
    "HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "BipedalWalker-v3"))
LANDER = "--env LunarLanderContinuous-v3 --seeds 5 --steps 50_000"
MILLION = "agents/ppo.py --env {} --seeds 5 --steps 1_000_000"
HARDCORE = ("agents/{}.py --env BipedalWalkerHardcore-v3 --seeds 4 --steps 300_000 --qf-width {} "
            "--compile --precision bf16 --clip-reward -5 10 --eval-every 25_000 --eval-episodes 25")
NARROW = "agents/crossq.py {} --qf-width 256 --compile"
# name -> arguments of learn_simple.py, or with --num-envs of learn_vectorised.py, and the published
# returns at the same number of steps
EXPERIMENTS = {
    "sac-halfcheetah": (f"agents/sac.py {CHEETAH}", "6156 (SimbaV2's curves)"),
    "sac-halfcheetah-bf16": (f"agents/sac.py {CHEETAH} --precision bf16", "6156"),
    "sac-hopper": (f"agents/sac.py {HOPPER}", "1103"),
    "sac-hopper-bf16": (f"agents/sac.py {HOPPER} --precision bf16", "1103"),
    "crossq-halfcheetah": (NARROW.format(CHEETAH), "8112 (wider)"),
    "crossq-halfcheetah-bf16": (NARROW.format(CHEETAH) + " --precision bf16", "8112 (wider)"),
    "crossq-hopper": (NARROW.format(HOPPER), "2764 (wider)"),
    "crossq-hopper-bf16": (NARROW.format(HOPPER) + " --precision bf16", "2764 (wider)"),
    "sac-walker2d": (f"agents/sac.py {WALKER} --precision bf16", "690"),
    "crossq-walker2d": (NARROW.format(WALKER) + " --precision bf16", "3914 (wider)"),
    "ppo-halfcheetah": (MILLION.format("HalfCheetah-v4"), "3517; 1443 (CleanRL)"),
    "ppo-hopper": (MILLION.format("Hopper-v4"), "3392; 2383 (CleanRL)"),
    "ppo-walker2d": (MILLION.format("Walker2d-v4"), "1621; 2288 (CleanRL)"),
    "bro-halfcheetah": (
        f"agents/bro.py {CHEETAH} --qf-width 128 --compile --precision bf16",
        "6516 (BRO-Fast, wider)"),
    "droq-hopper": (
        "agents/droq.py --env Hopper-v4 --seeds 4 --steps 100_000 --qf-width 128 --actor-width 128"
        " --compile --precision bf16",
        "1813 (wider)"),
    "sac-lunarlander": (
        f"agents/sac.py {LANDER} --precision bf16", "200 counts as solved; 125 (SAC at 300 000)"),
    "crossq-lunarlander": (
        NARROW.format(LANDER) + " --precision bf16",
        "200 counts as solved; 269 (CrossQ at 300 000)"),
    "sac-biped": (
        f"agents/sac.py {BIPED} --precision bf16", "300 counts as solved; -92 (SAC)"),
    "crossq-biped": (
        NARROW.format(BIPED) + " --precision bf16", "300 counts as solved; -92 (SAC)"),
    "ppo-biped": (MILLION.format("BipedalWalker-v3"), "300 counts as solved"),
    "bro-biped": (
        "agents/bro.py --env BipedalWalker-v3 --seeds 3 --steps 200_000 --qf-width 128 --compile "
        "--precision bf16 --clip-reward -5 10",
        "300 counts as solved; -12 (SAC), 105 (TD3-FORK), both without the clip"),
    "crossq-hardcore": (HARDCORE.format("crossq", 256), "235 (TQC at 2 000 000)"),
    "bro-hardcore": (HARDCORE.format("bro", 128), "235 (TQC at 2 000 000)"),
    "cem-lunarlander": (
        "agents/cem.py --env LunarLanderContinuous-v3 --seeds 5 --steps 60_000 --qf-width 128 "
        "--compile --precision bf16", "200 counts as solved"),
    "cem-pendulum": (
        "agents/cem.py --env Pendulum-v1 --seeds 5 --steps 10_000 --qf-width 128",
        "-157 (SAC at 20 000)"),
    "ppo-torch-pendulum": (
        "agents/ppo.py --env torch/Pendulum-v1 --num-envs 1024 --seeds 5 --steps 2_000_000 "
        "--num-steps 64 --gamma 0.95 --lr 2e-3 --update-epochs 5 --eval-episodes 50",
        "-172 (PPO at 100 000, tuned)"),
    "sac-pendulum": (
        "agents/sac.py --env Pendulum-v1 --seeds 8 --steps 20_000", "-157"),
    "ppo-lunarlander-defaults": (
        "agents/ppo.py --env LunarLanderContinuous-v3 --seeds 5 --steps 500_000",
        "200 counts as solved"),
    "ppo-lunarlander": (
        "agents/ppo.py --env LunarLanderContinuous-v3 --seeds 5 --steps 500_000 --gamma 0.999 "
        "--gae-lambda 0.98 --num-steps 4096 --num-minibatches 64 --ent-coef 0.01",
        "200 counts as solved"),
}
# experiments that ran with the same seeds in fp32 and in bf16 (name + "-bf16")
PAIRS = ("sac-halfcheetah", "sac-hopper", "crossq-halfcheetah", "crossq-hopper")
# README.md's table: every agent, with the results that miss their targets
SUMMARY = ("sac-halfcheetah", "crossq-halfcheetah", "bro-halfcheetah", "crossq-walker2d",
           "ppo-walker2d", "droq-hopper", "ppo-biped", "cem-lunarlander")


def train(name: str) -> Path:
    """Start a run, or resume the last one if it is unfinished -> its folder."""
    def runs() -> list[Path]:
        return sorted(path.parent for path in ROOT.glob(f"runs/{name}-*/config.json")
                      if json.loads(path.read_text())["name"] == name)

    flags = EXPERIMENTS[name][0].split() + ["--log", "--name", name]
    if runs() and not (runs()[-1] / PICTURE).exists():
        flags = ["--resume", str(runs()[-1])]
    subprocess.run([sys.executable, SCRIPTS[kind(name)], *flags], cwd=ROOT, check=True)
    return runs()[-1]


def kind(name: str) -> type[Options]:
    """The options class of the script that runs the experiment."""
    return Vectorised if "--num-envs" in EXPERIMENTS[name][0] else Simple


def settings(name: str) -> tuple[Options, dict[str, Any]]:
    """The script's options and the agent's config that the command sets."""
    return parse_args(EXPERIMENTS[name][0].split(), kind(name))


def keep(name: str, run: Path) -> None:
    """Store a run in bench/results/<name>/ and its evaluations in scores.csv."""
    ran, (wanted, config) = json.loads((run / "config.json").read_text()), settings(name)
    options = ran["options"]
    same = ("env", "seeds", "steps", "compile", "precision", "clip_reward", "eval_episodes",
            "num_envs")
    wanted = json.loads(json.dumps({name: getattr(wanted, name, None) for name in same} | config))
    if ran["config"] | {name: options.get(name) for name in same} != wanted:
        raise SystemExit(f"{run} is not a run of {name}: {EXPERIMENTS[name][0]}")
    folder = RESULTS / name
    (env_id,) = options["env"]
    group = recorder.group_folder(run, env_id, Path(options["agent"]).stem)
    by_seed = curves.read_curves(group, range(options["seeds"]), "return/eval")
    if not (run / PICTURE).exists():  # unfinished: cut at the last step that all seeds reached
        last = min(max((step for step, _ in curve), default=0) for curve in by_seed.values())
        if not last:
            raise SystemExit(f"{run} has a seed without an evaluation")
        by_seed = {seed: [row for row in curve if row[0] <= last]
                   for seed, curve in by_seed.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "versions.json"):
        shutil.copyfile(run / file, folder / file)
    curves.draw_learning_curves(folder / PICTURE, {env_id: by_seed}, name)
    scores = read() | {name: {(seed, step): round(value, 3) for seed, curve in by_seed.items()
                              for step, value in curve}}
    with SCORES.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["experiment", "seed", "step", "return_eval"])
        writer.writerows([name, seed, step, value] for name in sorted(scores)
                         for (seed, step), value in scores[name].items())


def read() -> Scores:
    scores: Scores = {}
    with SCORES.open() as file:
        for row in csv.DictReader(file):
            scores.setdefault(row["experiment"], {})[int(row["seed"]), int(row["step"])] = float(
                row["return_eval"])
    return scores


def last(returns: dict[tuple[int, int], float]) -> tuple[int, list[float]]:
    """The last step and the returns of the seeds there; failed seeds have no row."""
    end = max(step for _, step in returns)
    return end, [value for (_, step), value in returns.items() if step == end]


def pairs(scores: Scores) -> str:
    """Table of bf16 minus fp32, paired by seed: at the end and averaged over all evaluations."""
    lines = ["| run | seeds | steps | fp32, end | bf16 - fp32, end | each seed "
             "| bf16 - fp32, mean over the run |", "|---|---|---|---|---|---|---|"]
    for name in PAIRS:
        if name not in scores or name + "-bf16" not in scores:
            continue
        fp32, bf16 = scores[name], scores[name + "-bf16"]
        both = fp32.keys() & bf16.keys()
        seeds, end = sorted({seed for seed, _ in both}), max(step for _, step in both)
        ends = [bf16[seed, end] - fp32[seed, end] for seed in seeds]
        means = [statistics.fmean(bf16[key] - fp32[key] for key in both if key[0] == seed)
                 for seed in seeds]
        cells = [f"{mean:.0f} [{low:.0f}, {high:.0f}]"
                 for mean, low, high in map(stats.t_interval, (ends, means))]
        lines.append(f"| {name} | {len(seeds)} | {end} "
                     f"| {statistics.fmean(fp32[seed, end] for seed in seeds):.0f} | {cells[0]} "
                     f"| {' '.join(f'{x:.0f}' for x in ends)} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def table(scores: Scores) -> str:
    """Table of the returns at the end of each experiment."""
    lines = ["| command (`python learn_simple.py ... --log`; with --num-envs learn_vectorised.py) "
             "| seeds | steps | mean | 95% t interval | IQM | each seed | published |",
             "|---|---|---|---|---|---|---|---|"]
    for name, (flags, others) in EXPERIMENTS.items():
        if name not in scores:
            continue
        end, final = last(scores[name])
        mean, low, high = stats.t_interval(final)
        stopped = ", stopped" * (end < settings(name)[0].steps)
        lines.append(f"| `{flags}` | {len(final)} | {end}{stopped} "
                     f"| {mean:.0f} | {low:.0f} to {high:.0f} "
                     f"| {stats.iqm(final):.0f} "
                     f"| {' '.join(f'{value:.0f}' for value in final)} | {others} |")
    return "\n".join(lines) + "\n"


def summary(scores: Scores) -> str:
    """README.md's table."""
    lines = ["| agent | environment | steps | seeds | mean | 95% t interval | published |",
             "|---|---|---|---|---|---|---|"]
    for name in SUMMARY:
        options, _ = settings(name)
        end, final = last(scores[name])
        mean, low, high = stats.t_interval(final)
        steps = f"{end:,}".replace(",", " ")
        lines.append(f"| {Path(options.agent).stem} | {options.env[0]} | {steps} | {len(final)} "
                     f"| {mean:.0f} | {low:.0f} to {high:.0f} | {EXPERIMENTS[name][1]} |")
    return "\n".join(lines) + "\n"


def draw(scores: Scores, path: Path) -> None:
    """One panel per environment and length: thin lines for seeds, their mean with its 95% t
    interval, crosses for published means. Of a pair in fp32 and bf16, only bf16."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, bool], list[tuple[str, str, str]]] = {}  # -> experiment, label, agent
    for name in sorted(scores.keys() & EXPERIMENTS.keys()):
        if name + "-bf16" not in scores:
            options, _ = settings(name)
            label = name.removesuffix("-bf16") + ", clipped reward" * bool(options.clip_reward)
            panels.setdefault((options.env[0], options.steps > 300_000), []).append(
                (name, label, Path(options.agent).stem))
    figure, axes = pyplot.subplots(-(-len(panels) // 3), 3, squeeze=False, layout="constrained",
                                   figsize=(15, 4 * -(-len(panels) // 3)))
    for axis, ((env_id, _), experiments) in zip(axes.flat, sorted(panels.items()), strict=False):
        for place, (name, label, agent) in enumerate(experiments):
            draw_curve(axis, f"C{place}", scores[name], label, published.points(agent, env_id))
        axis.set(title=env_id, xlabel="steps of one seed", ylabel="evaluation return")
        axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        axis.grid(alpha=0.3)
        axis.plot([], [], "X", color="white", markeredgecolor="black", label="published")
        axis.legend(fontsize=8)
    for axis in list(axes.flat)[len(panels):]:
        axis.remove()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def draw_curve(axis: Any, color: str, returns: dict[tuple[int, int], float], name: str,
               points: list[published.Row]) -> None:
    by_seed: curves.Curves = {}
    for (seed, step), value in returns.items():
        by_seed.setdefault(seed, []).append((step, value))
    curves.draw_curve(axis, by_seed, color, f"{name} (n = {len(by_seed)})")
    end = max(step for _, step in returns)
    reached = [point for point in points if point.steps <= 1.05 * end]
    axis.plot([p.steps for p in reached], [p.mean for p in reached], "X", color=color,
              markeredgecolor="black", markersize=9, zorder=5)


def write_tables() -> None:
    scores = read()
    for name, text in (("learning.md", table(scores)), ("summary.md", summary(scores)),
                       ("bf16.md", pairs(scores))):
        (RESULTS / name).write_text(text)
        print(text)
    draw(scores, RESULTS / "curves.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="default: all experiments without a result; "
                        f"choices: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--run", type=Path, help="store this run as far as it got; no training")
    options = parser.parse_args()
    for unknown in set(options.names) - set(EXPERIMENTS):
        parser.error(f"unknown experiment {unknown!r}; choose from {', '.join(EXPERIMENTS)}")
    if options.run and len(options.names) != 1:
        parser.error("--run needs the name of exactly one experiment")
    done = read()
    for name in options.names or [name for name in EXPERIMENTS if name not in done]:
        keep(name, options.run or train(name))
        write_tables()
