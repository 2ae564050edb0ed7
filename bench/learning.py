"""Learning results: run the experiments below and keep what they reached in bench/results/.

    python bench/learning.py                       all of them, one after another
    python bench/learning.py sac-pendulum          one
    python bench/learning.py sac-pendulum --run runs/sac-pendulum-20260101-000000   a finished one

Each leaves its config, versions, picture and returns.csv (every evaluation of every seed), and
learning.md and bf16.md are made anew from all of them.
"""

import argparse
import csv
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab import arguments, recorder, report, stats  # noqa: E402

RESULTS = ROOT / "bench/results"
CHEETAH, HOPPER = (f"--env {env} --seeds 5 --steps 100_000" for env in (
    "HalfCheetah-v4", "Hopper-v4"))
NARROW = "agents/crossq.py {} --qf-width 256 --compile"
# name -> arguments of learn_simple.py, or with --num-envs of learn_vectorised.py, and what others
# have published at the same number of steps
EXPERIMENTS = {
    "sac-halfcheetah": (f"agents/sac.py {CHEETAH}", "6156 (SimbaV2's curves)"),
    "sac-halfcheetah-bf16": (f"agents/sac.py {CHEETAH} --precision bf16", "6156"),
    "sac-hopper": (f"agents/sac.py {HOPPER}", "1103"),
    "sac-hopper-bf16": (f"agents/sac.py {HOPPER} --precision bf16", "1103"),
    "crossq-halfcheetah": (NARROW.format(CHEETAH), "8112 (wider)"),
    "crossq-halfcheetah-bf16": (NARROW.format(CHEETAH) + " --precision bf16", "8112 (wider)"),
    "crossq-hopper": (NARROW.format(HOPPER), "2764 (wider)"),
    "crossq-hopper-bf16": (NARROW.format(HOPPER) + " --precision bf16", "2764 (wider)"),
    "bro-halfcheetah": (
        f"agents/bro.py {CHEETAH} --qf-width 128 --compile --precision bf16",
        "6516 (BRO-Fast, wider)"),
    "crossq-hardcore": (
        "agents/crossq.py --env BipedalWalkerHardcore-v3 --seeds 4 --steps 300_000 --qf-width 256 "
        "--compile --precision bf16 --clip-reward -5 10 --eval-every 25_000 --eval-episodes 25",
        "235 (TQC at 2 000 000)"),
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
# the same seeds in fp32 and, name + "-bf16", in bf16
PAIRS = ("sac-halfcheetah", "sac-hopper", "crossq-halfcheetah", "crossq-hopper")


def train(name: str) -> Path:
    """-> the run's folder."""
    subprocess.run([sys.executable, arguments.SCRIPTS[kind(name)], *EXPERIMENTS[name][0].split(),
                    "--log", "--name", name], cwd=ROOT, check=True)
    return max(ROOT.glob(f"runs/{name}-*"), key=lambda folder: folder.stat().st_mtime)


def kind(name: str) -> type[arguments.Options]:
    """The options of the script that runs it."""
    return arguments.Vectorised if "--num-envs" in EXPERIMENTS[name][0] else arguments.Simple


def keep(name: str, run: Path) -> None:
    """Copy what a reader needs of a run into bench/results/<name>/."""
    settings, (wanted, config) = (json.loads((run / "config.json").read_text()),
                                  arguments.parse(EXPERIMENTS[name][0].split(), kind(name)))
    options = settings["options"]
    same = ("env", "seeds", "steps", "compile", "precision", "clip_reward", "eval_episodes",
            "num_envs")
    wanted = json.loads(json.dumps({name: getattr(wanted, name, None) for name in same} | config))
    if settings["config"] | {name: options.get(name) for name in same} != wanted:
        raise SystemExit(f"{run} is not a run of {name}: {EXPERIMENTS[name][0]}")
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "versions.json", "learning_curves.png"):
        shutil.copyfile(run / file, folder / file)
    group = recorder.group_folder(run, options["env"][0], Path(options["agent"]).stem)
    curves = report.read_curves(group, range(options["seeds"]), "return/eval")
    with (folder / "returns.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "step", "return_eval"])
        writer.writerows([seed, step, round(value, 3)]
                         for seed, curve in curves.items() for step, value in curve)


def read(name: str) -> dict[tuple[int, int], float]:
    """(seed, step) -> evaluation return; {} if the experiment has no result yet."""
    path = RESULTS / name / "returns.csv"
    if not path.exists():
        return {}
    with path.open() as file:
        return {(int(row["seed"]), int(row["step"])): float(row["return_eval"])
                for row in csv.DictReader(file)}


def write_pairs() -> None:
    """bf16 minus fp32, seed by seed: at the end, and as the mean over all evaluations."""
    lines = ["| run | seeds | steps | fp32, end | bf16 - fp32, end | each seed "
             "| bf16 - fp32, mean over the run |", "|---|---|---|---|---|---|---|"]
    for name in PAIRS:
        fp32, bf16 = read(name), read(name + "-bf16")
        if not fp32 or not bf16:
            continue
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
    (RESULTS / "bf16.md").write_text("\n".join(lines) + "\n")


def write_table() -> None:
    lines = ["| command (`python learn_simple.py ... --log`; with --num-envs learn_vectorised.py) "
             "| seeds | mean | 95% t interval | IQM | each seed | published |",
             "|---|---|---|---|---|---|---|"]
    for name, (flags, published) in EXPERIMENTS.items():
        returns = read(name)
        if not returns:
            continue
        end = max(step for _, step in returns)  # a seed that failed has no row there
        final = {seed: value for (seed, step), value in returns.items() if step == end}
        mean, low, high = stats.t_interval(list(final.values()))
        lines.append(f"| `{flags}` | {len(final)} | {mean:.0f} | {low:.0f} to {high:.0f} "
                     f"| {stats.iqm(list(final.values())):.0f} "
                     f"| {' '.join(f'{value:.0f}' for value in final.values())} | {published} |")
    (RESULTS / "learning.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; none: all")
    parser.add_argument("--run", type=Path, help="keep this finished run; no training")
    options = parser.parse_args()
    for unknown in set(options.names) - set(EXPERIMENTS):
        parser.error(f"no experiment {unknown!r}; there are {', '.join(EXPERIMENTS)}")
    if options.run and len(options.names) != 1:
        parser.error("--run needs the name of its one experiment")
    for name in options.names or EXPERIMENTS:
        keep(name, options.run or train(name))
    write_table()
    write_pairs()
    for table in ("learning.md", "bf16.md"):
        print((RESULTS / table).read_text())
