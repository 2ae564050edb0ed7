"""Learning results: run the experiments below and store their results in bench/results/.

    python bench/learning.py                       all that are missing, fewest steps first
    python bench/learning.py --list                print these instead
    python bench/learning.py sac-pendulum          some experiments, even if they have a result
    python bench/learning.py sac-pendulum --run runs/sac-pendulum-20260101-000000   store that run

Missing are experiments without a result, or with a run in runs/ that has not ended. An interrupted
run is resumed; one that fails does not stop the others. `--run` stores a run as far as it got,
without training. Stored are config, versions, learning curves, and every evaluation of every seed
in scores.csv; of BipedalWalkerHardcore also 100 unseen terrains of each seed, in fresh.json. From
these, learning.md, summary.md, bf16.md, mujoco.md, mujoco-300k.md and curves.png are made.
`python bench/readme.py` puts the tables into the docs.
"""

import argparse
import csv
import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab import evaluate, stats  # noqa: E402
from lab.command_line import parse_args, read_line  # noqa: E402
from lab.errors import Terminated, guarded  # noqa: E402
from lab.options import SCRIPTS, Options, Simple, Vectorised  # noqa: E402
from lab.report import curves, published, runs  # noqa: E402

RESULTS, PICTURE = ROOT / "bench/results", "learning_curves.png"
FRESH = "fresh"  # name of the evaluation on unseen terrains
SCORES = RESULTS / "scores.csv"
Scores = dict[str, dict[tuple[int, int], float]]  # experiment -> (seed, step) -> evaluation return
CHEETAH, HOPPER, WALKER, ANT, HUMANOID, BIPED = (
    f"--env {env} --seeds 5 --steps 100_000" for env in (
        "HalfCheetah-v4", "Hopper-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4", "BipedalWalker-v3"))
LANDER = "--env LunarLanderContinuous-v3 --seeds 5 --steps 50_000"
MILLION = "agents/ppo.py --env {} --seeds 5 --steps 1_000_000"
HARDCORE = ("agents/{}.py --env BipedalWalkerHardcore-v3 --seeds 4 --steps 300_000 --qf-width {} "
            "--compile --precision bf16 --clip-reward -5 10 --eval-every 25_000 --eval-episodes 25")
NARROW = "agents/crossq.py {} --qf-width 256 --compile"
XQC = "agents/xqc.py {} --compile --precision bf16"
XQC_LONGER = XQC.format("--env {} --seeds 5 --steps 300_000")
RAW_BIPED = ("--env BipedalWalker-v3 --seeds 5 --steps 200_000 --gamma 0.98 --compile "
             "--precision bf16")
# two steps an action; a fall costs 1 instead of 100; only a fall terminates
WALKING = "--action-repeat 2 --clip-reward -1 10 --failure-below -99"
XQC_HARDCORE = (
    XQC.format("--env BipedalWalkerHardcore-v3 --seeds {} --steps {} " + WALKING)
    + " --eval-every 50_000 --eval-episodes 25")
POLE = ("agents/{}.py --env torch/{} --num-envs 128 --seeds 5 --steps {} --num-steps 32 "
        "--num-minibatches 16 --lr 1e-3 --threads 1 --eval-episodes 20")
RAW = " --no-norm-obs --no-norm-reward --no-clip-vloss"
TQC_TARGET = "235 (TQC at 2 000 000, one run, no action repeat)"
LANDER_TARGET = "200 counts as solved; 269 (CrossQ at 300 000, SLM-Lab)"
BIPED_TARGET = "300 counts as solved; -12 (SAC), 105 (TD3-FORK)"
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
    "crossq-ant": (NARROW.format(ANT) + " --precision bf16", "2299 (wider)"),
    "crossq-humanoid": (NARROW.format(HUMANOID) + " --precision bf16", "2603 (wider)"),
    "xqc-halfcheetah": (XQC.format(CHEETAH), "8597; 9815 (FlashSAC); both wider"),
    "xqc-hopper": (XQC.format(HOPPER), "2828; 2121 (FlashSAC); both wider"),
    "xqc-walker2d": (XQC.format(WALKER), "3612; 3299 (FlashSAC); both wider"),
    "xqc-ant": (XQC.format(ANT), "3018; 3196 (FlashSAC); both wider"),
    "xqc-humanoid": (XQC.format(HUMANOID), "3265; 6138 (FlashSAC); both wider"),
    "xqc-halfcheetah-300k": (
        XQC_LONGER.format("HalfCheetah-v4"), "10622; 11481 (FlashSAC); both wider"),
    "xqc-hopper-300k": (XQC_LONGER.format("Hopper-v4"), "3580; 3674 (FlashSAC); both wider"),
    "xqc-walker2d-300k": (XQC_LONGER.format("Walker2d-v4"), "5668; 6050 (FlashSAC); both wider"),
    "xqc-ant-300k": (XQC_LONGER.format("Ant-v4"), "4892; 6087 (FlashSAC); both wider"),
    "xqc-humanoid-300k": (XQC_LONGER.format("Humanoid-v4"), "9088; 10570 (FlashSAC); both wider"),
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
        f"agents/sac.py {LANDER} --precision bf16",
        "200 counts as solved; 125 (SAC at 300 000, SLM-Lab)"),
    "crossq-lunarlander": (
        NARROW.format(LANDER) + " --precision bf16", LANDER_TARGET),
    "xqc-lunarlander": (XQC.format(LANDER), LANDER_TARGET),
    "xqc-lunarlander-fast-targets": (XQC.format(LANDER) + " --tau 0.05", LANDER_TARGET),
    "xqc-lunarlander-held-noise": (XQC.format(LANDER) + " --hold-noise", LANDER_TARGET),
    "sac-biped": (
        f"agents/sac.py {BIPED} --precision bf16", "300 counts as solved; -92 (SAC)"),
    "crossq-biped": (
        NARROW.format(BIPED) + " --precision bf16", "300 counts as solved; -92 (SAC)"),
    "ppo-biped": (MILLION.format("BipedalWalker-v3"), "300 counts as solved"),
    "bro-biped": (
        "agents/bro.py --env BipedalWalker-v3 --seeds 3 --steps 200_000 --qf-width 128 --compile "
        "--precision bf16 --clip-reward -5 10",
        "300 counts as solved; -12 (SAC), 105 (TD3-FORK), both without the clip"),
    "sac-biped-raw": (f"agents/sac.py {RAW_BIPED}", BIPED_TARGET),
    "crossq-biped-raw": (f"agents/crossq.py {RAW_BIPED} --qf-width 256", BIPED_TARGET),
    "bro-biped-raw": (f"agents/bro.py {RAW_BIPED} --qf-width 128", BIPED_TARGET),
    "xqc-biped-raw": (f"agents/xqc.py {RAW_BIPED}", BIPED_TARGET),
    "xqc-biped": (
        XQC.format(f"--env BipedalWalker-v3 --seeds 5 --steps 200_000 {WALKING}"),
        BIPED_TARGET + ", both on the raw task"),
    "xqc-hardcore": (XQC_HARDCORE.format("5 --first-seed 5", "1_000_000"), TQC_TARGET),
    "xqc-hardcore-seeds-0-to-4": (XQC_HARDCORE.format(5, "1_000_000"), TQC_TARGET),
    "xqc-hardcore-500k": (XQC_HARDCORE.format(5, "500_000"), TQC_TARGET),
    "xqc-hardcore-small-steps": (  # XQC's defaults until its learning rate was raised
        XQC_HARDCORE.format(5, "1_000_000") + " --lr 3e-4 --lr-end 3e-5", TQC_TARGET),
    "crossq-hardcore": (HARDCORE.format("crossq", 256), TQC_TARGET),
    "bro-hardcore": (HARDCORE.format("bro", 128), TQC_TARGET),
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
    "ppo-discrete-torch-cartpole": (
        "agents/ppo_discrete.py --env torch/CartPole-v1 --num-envs 1024 --seeds 5 --steps 800_000 "
        "--num-steps 32 --lr 3e-3 --update-epochs 4 --no-norm-obs --no-norm-reward "
        "--no-clip-vloss --threads 1 --eval-episodes 50", "475 counts as solved"),
    "ppo-discrete-cartpole": (
        "agents/ppo_discrete.py --env CartPole-v1 --num-envs 8 --seeds 5 --steps 100_000 "
        "--num-steps 32 --num-minibatches 1 --update-epochs 20 --gamma 0.98 --gae-lambda 0.8 "
        "--lr 1e-3 --no-norm-obs --no-norm-reward --no-clip-vloss --threads 1 --eval-episodes 20",
        "500 (SB3's zoo, one run)"),
    "ppo-discrete-acrobot": (
        "agents/ppo_discrete.py --env Acrobot-v1 --num-envs 16 --seeds 5 --steps 1_000_000 "
        "--num-steps 256 --num-minibatches 64 --update-epochs 4 --gae-lambda 0.94 --threads 1 "
        "--eval-episodes 20", "-74 (SB3's zoo, one run)"),
    "ppo-discrete-lunarlander": (
        "agents/ppo_discrete.py --env LunarLander-v3 --num-envs 16 --seeds 5 --steps 1_000_000 "
        "--num-steps 1024 --num-minibatches 256 --update-epochs 4 --gamma 0.999 "
        "--gae-lambda 0.98 --ent-coef 0.01 --no-norm-obs --no-norm-reward --no-clip-vloss "
        "--threads 1 --eval-episodes 20",
        "242 (SB3's zoo, one run, LunarLander-v2)"),
    "ppo-cartpole": (
        POLE.format("ppo", "ContinuousCartPole-v1", "200_000") + RAW, "475 counts as solved"),
    "ppo-cartpole-hidden": (
        POLE.format("ppo", "CartPoleWithoutVelocity-v1", "200_000") + RAW, "475 counts as solved"),
    "ppo-lstm-cartpole-hidden": (
        POLE.format("ppo_lstm", "CartPoleWithoutVelocity-v1", "300_000"), "475 counts as solved"),
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
# random and TD3's returns by which papers normalise (SimbaV2, arXiv 2502.15280)
TD3 = {"HalfCheetah-v4": (-289.4, 10574), "Hopper-v4": (18.8, 3226), "Walker2d-v4": (2.8, 3946),
       "Ant-v4": (-70.3, 3942), "Humanoid-v4": (120.4, 5165)}
CHANGES = r"--(?:action-repeat|clip-reward|failure-below)(?: -?[\d.]+)+"  # of the task
# README.md's table: every agent, with the results that miss their targets
SUMMARY = ("sac-halfcheetah", "crossq-halfcheetah", "bro-halfcheetah", "crossq-walker2d",
           "ppo-walker2d", "ppo-discrete-cartpole", "ppo-lstm-cartpole-hidden", "droq-hopper",
           "xqc-hardcore", "xqc-biped-raw", "cem-lunarlander")


def missing() -> list[str]:
    """The experiments to train, fewest steps over all seeds first."""
    def steps(name: str) -> int:
        values = read_line(EXPERIMENTS[name][0].split(), kind(name)).values
        return int(values["seeds"]) * int(values["steps"])

    done = read()
    return sorted((name for name in EXPERIMENTS if name not in done or unfinished(name)), key=steps)


def last_run(name: str) -> Path | None:
    return max((path.parent for path in ROOT.glob(f"runs/{name}-*/config.json")
                if json.loads(path.read_text())["name"] == name), default=None)


def unfinished(name: str) -> bool:
    run = last_run(name)
    return run is not None and not (run / PICTURE).exists()


def train(name: str) -> Path | None:
    """Start a run, or resume the last one if it is unfinished -> its folder, or None if it did not
    end. It also ends if some of its seeds failed. KeyboardInterrupt if it was stopped."""
    flags = EXPERIMENTS[name][0].split() + ["--log", "--name", name]
    before = last_run(name)
    resumed = unfinished(name)
    if resumed:
        flags = ["--resume", str(before)]
    process = subprocess.Popen([sys.executable, SCRIPTS[kind(name)], *flags], cwd=ROOT)
    try:
        code = process.wait()
    except KeyboardInterrupt as stop:
        if isinstance(stop, Terminated):  # Ctrl-C reaches the run by itself
            process.terminate()
        process.wait()  # for its checkpoint
        raise
    if code < 0 or code > 128:
        raise KeyboardInterrupt
    run = last_run(name)
    return None if unfinished(name) or (run == before and not resumed) else run


def kind(name: str) -> type[Options]:
    """The options class of the script that runs the experiment."""
    return Vectorised if "--num-envs" in EXPERIMENTS[name][0] else Simple


def settings(name: str) -> tuple[Options, dict[str, Any]]:
    """The script's options and the agent's config that the command sets."""
    return parse_args(EXPERIMENTS[name][0].split(), kind(name))


def keep(name: str, run: Path) -> None:
    """Store a run in bench/results/<name>/ and its evaluations in scores.csv."""
    (options, ran), (wanted, config) = runs.read_config(run), settings(name)
    same = ("env", "seeds", "first_seed", "steps", "compile", "precision", "clip_reward",
            "eval_episodes", "num_envs", "action_repeat", "failure_below")
    older = {"action_repeat": 1}  # of runs from before the flag
    wanted = json.loads(json.dumps({name: getattr(wanted, name, None) for name in same} | config))
    if ran | {name: options.get(name, older.get(name)) for name in same} != wanted:
        raise SystemExit(f"{run} is not a run of {name}: {EXPERIMENTS[name][0]}")
    folder = RESULTS / name
    (env_id,) = options["env"]
    (method,) = runs.load([str(run)])
    (result,) = method.results.values()
    by_seed = {number: [(e.step, e.value) for e in seed.curve]
               for number, seed in sorted(result.seeds.items())}
    if not (run / PICTURE).exists():  # unfinished: cut at the last step that all seeds reached
        alive = [seed for seed in result.seeds.values() if not seed.failed]
        if len(by_seed) < options["seeds"] or not all(seed.curve for seed in alive):
            raise SystemExit(f"{run} has a seed without an evaluation")
        by_seed = {seed: [row for row in curve if row[0] <= result.step]
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


def evaluate_fresh(name: str, run: Path) -> None:
    """Store the returns on 100 unseen terrains a seed, for a task with a terrain of its own in each
    episode."""
    if "Hardcore" not in EXPERIMENTS[name][0]:
        return
    for path in evaluate.files_of(RESULTS / name / FRESH):
        path.unlink(missing_ok=True)
    agent = run / Path(settings(name)[0].agent).name  # as it was then
    evaluate.run([str(run), "--agent", str(agent), "--out", str(RESULTS / name / FRESH)])


def read_fresh(name: str) -> tuple[list[float], float] | None:
    """-> the mean return of each seed on unseen terrains, and the share of finished courses: those
    that end, but not in a fall, which costs 100. None without such an evaluation."""
    path = RESULTS / name / f"{FRESH}.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    finished = [row["terminated"] and row["last_reward"] > -99 for row in result["episodes"]
                if row["seed"] not in result["failed_seeds"]]
    return [row["return"] for seed, row in result["seeds"].items()
            if int(seed) not in result["failed_seeds"]], statistics.fmean(finished)


def final(name: str, scores: Scores) -> tuple[int, list[float], str]:
    """The last step, the returns of the seeds there, and a note on how they were evaluated."""
    end, values = last(scores[name])
    if fresh := read_fresh(name):
        values, finished = fresh
        return end, values, f" on 100 unseen terrains a seed, {finished:.0%} finished"
    return end, values, ""


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
        end = max(step for _, step in both)
        seeds = sorted(seed for seed, step in both if step == end)
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
        end, values, note = final(name, scores)
        mean, low, high = stats.t_interval(values)
        stopped = ", stopped" * (end < settings(name)[0].steps)
        lines.append(f"| `{flags}` | {len(values)} | {end}{stopped} "
                     f"| {mean:.0f}{note} | {low:.0f} to {high:.0f} "
                     f"| {stats.iqm(values):.0f} "
                     f"| {' '.join(f'{value:.0f}' for value in values)} | {others} |")
    return "\n".join(lines) + "\n"


def summary(scores: Scores) -> str:
    """README.md's table."""
    lines = ["| agent | environment | steps | seeds | mean | 95% t interval | published |",
             "|---|---|---|---|---|---|---|"]
    for name in SUMMARY:
        options, _ = settings(name)
        end, values, note = final(name, scores)
        mean, low, high = stats.t_interval(values)
        steps = f"{end:,}".replace(",", " ")
        flags = " ".join(re.findall(CHANGES, EXPERIMENTS[name][0]))
        task = options.env[0] + f" `{flags}`" * bool(flags)
        lines.append(f"| {Path(options.agent).stem} | {task} | {steps} | {len(values)} "
                     f"| {mean:.0f}{note} | {low:.0f} to {high:.0f} | {EXPERIMENTS[name][1]} |")
    return "\n".join(lines) + "\n"


def on_mujoco(agent: str, env: str, steps: int) -> str:
    """The experiment's name."""
    length = "" if steps == 100_000 else f"-{steps // 1000}k"
    return f"{agent}-{env[:-3].lower()}{length}"


def mujoco(scores: Scores, steps: int = 100_000) -> str:
    """Returns of XQC and CrossQ in bf16 after `steps` beside the published ones, and their mean in
    units of TD3: (return - random's) / (TD3's - random's). A dash where we have no run."""
    found: dict[str, dict[str, float]] = {}  # label -> environment -> return
    for row in published.rows():
        if row.steps == steps and row.environment in TD3:
            label = row.source.split(", ")[0] if row.algorithm == "bro" else row.algorithm
            found.setdefault(label, {})[row.environment] = row.mean
    found = {label: returns for label, returns in found.items() if len(returns) == len(TD3)}
    for agent in ("xqc", "crossq"):
        names = {env: on_mujoco(agent, env, steps) for env in TD3}
        ends = {env: last(scores.get(name + "-bf16") or scores[name])
                for env, name in names.items() if name in scores}
        ours = {env: statistics.fmean(values) for env, (end, values) in ends.items()
                if end >= steps}
        if ours:
            found[f"**{agent}, here**"] = ours
    rows = []
    for label, returns in found.items():
        norms = [(returns[env] - random) / (td3 - random)
                 for env, (random, td3) in TD3.items() if env in returns]
        mean = statistics.fmean(norms) if len(norms) == len(TD3) else None
        cells = [label, *(f"{returns[env]:.0f}" if env in returns else "-" for env in TD3),
                 "-" if mean is None else f"{mean:.2f}"]
        rows.append((mean or 0, "| " + " | ".join(cells) + " |"))
    head = ["agent", *(env[:-3] for env in TD3), "mean / TD3"]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|",
                      *(line for _, line in sorted(rows, reverse=True))]) + "\n"


def draw(scores: Scores, path: Path) -> None:
    """One panel per environment and length: thin lines for seeds, their mean with its 95% t
    interval, crosses for published means. Of a pair in fp32 and bf16, only bf16."""
    from matplotlib.ticker import EngFormatter

    pyplot = curves.import_pyplot()
    panels: dict[tuple[str, bool], list[tuple[str, str, str]]] = {}  # -> experiment, label, agent
    for name in sorted(scores.keys() & EXPERIMENTS.keys()):
        if name + "-bf16" not in scores:
            options, _ = settings(name)
            label = name.removesuffix("-bf16") + ", clipped reward" * bool(options.clip_reward)
            label += f", {options.action_repeat} steps an action" * (options.action_repeat > 1)
            long = options.steps > 300_000 or name.endswith("-300k")
            panels.setdefault((options.env[0], long), []).append(
                (name, label, Path(options.agent).stem))
    figure, axes = pyplot.subplots(-(-len(panels) // 3), 3, squeeze=False, layout="constrained",
                                   figsize=(15, 4 * -(-len(panels) // 3)))
    for axis, ((env_id, _), experiments) in zip(axes.flat, sorted(panels.items()), strict=False):
        for place, (name, label, agent) in enumerate(experiments):
            draw_curve(axis, f"C{place}", scores[name], label, published.points(agent, env_id))
        axis.set(title=env_id, xlabel="steps of one seed", ylabel="evaluation return")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
        axis.plot([], [], "X", color="white", markeredgecolor="black", label="published")
        below = {"loc": "upper left", "bbox_to_anchor": (0, -0.18)}  # it would hide the curves
        large = len(experiments) > 5 or any(len(label) > 50 for _, label, _ in experiments)
        axis.legend(fontsize=8, **(below if large else {}))
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
                       ("bf16.md", pairs(scores)), ("mujoco.md", mujoco(scores)),
                       ("mujoco-300k.md", mujoco(scores, 300_000))):
        (RESULTS / name).write_text(text)
        print(text)
    draw(scores, RESULTS / "curves.png")


def main(argv: Sequence[str]) -> int:
    """-> exit code: 0, or 1 if an experiment did not end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="default: all that are missing, fewest steps "
                        f"first; choices: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--list", action="store_true", help="print the missing ones; no training")
    parser.add_argument("--run", type=Path, help="store this run as far as it got; no training")
    options = parser.parse_args(argv)
    for unknown in set(options.names) - set(EXPERIMENTS):
        parser.error(f"unknown experiment {unknown!r}; choose from {', '.join(EXPERIMENTS)}")
    if options.run and len(options.names) != 1:
        parser.error("--run needs the name of exactly one experiment")
    names, failed = options.names or missing(), []
    if options.list:
        print(*names, sep="\n")
        return 0
    for name in names:
        run = options.run or train(name)
        if run:
            keep(name, run)
            evaluate_fresh(name, run)
            write_tables()
        else:
            failed.append(name)
    if failed:
        print(f"did not end: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
