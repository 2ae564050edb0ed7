"""Learning results: run the experiments below and keep what they reached in bench/results/.

    python bench/learning.py                       all of them, one after another
    python bench/learning.py sac-pendulum          one
    python bench/learning.py sac-pendulum --run runs/sac-pendulum-20260101-000000   a finished one

Each leaves its config, versions, picture and returns.csv (every evaluation of every seed), and
learning.md is made anew from all of them.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab import command, recorder, report, stats  # noqa: E402

RESULTS = ROOT / "bench/results"
# name -> arguments of learn_simple.py, and what others have published at the same number of steps
EXPERIMENTS = {
    "sac-halfcheetah": (
        "agents/sac.py --env HalfCheetah-v4 --seeds 5 --steps 100_000", "6156 (SimbaV2's curves)"),
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


def train(name: str) -> Path:
    """-> the run's folder."""
    subprocess.run([sys.executable, "learn_simple.py", *EXPERIMENTS[name][0].split(), "--log",
                    "--name", name], cwd=ROOT, check=True)
    return max(ROOT.glob(f"runs/{name}-*"), key=lambda folder: folder.stat().st_mtime)


def keep(name: str, run: Path) -> None:
    """Copy what a reader needs of a run into bench/results/<name>/."""
    settings, (wanted, config) = (json.loads((run / "config.json").read_text()),
                                  command.parse(EXPERIMENTS[name][0].split()))
    options = settings["options"]
    if settings["config"] != config or (options["env"], options["seeds"], options["steps"]) != (
            list(wanted.env), wanted.seeds, wanted.steps):
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


def write_table() -> None:
    lines = ["| command (`python learn_simple.py ... --log`) | seeds | mean | 95% t interval | IQM "
             "| each seed | published |", "|---|---|---|---|---|---|---|"]
    for name, (arguments, published) in EXPERIMENTS.items():
        path = RESULTS / name / "returns.csv"
        if not path.exists():
            continue
        with path.open() as file:
            rows = list(csv.DictReader(file))
        end = max(int(row["step"]) for row in rows)  # a seed that failed has no row there
        final = {r["seed"]: float(r["return_eval"]) for r in rows if int(r["step"]) == end}
        mean, low, high = stats.t_interval(list(final.values()))
        lines.append(f"| `{arguments}` | {len(final)} | {mean:.0f} | {low:.0f} to {high:.0f} "
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
    print((RESULTS / "learning.md").read_text())
