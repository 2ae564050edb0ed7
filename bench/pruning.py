"""How much the rules for pruning would save, and how often they would be wrong.

    python bench/pruning.py --record        train the studies below without pruning; it resumes
    python bench/pruning.py                 replay the recorded studies under each rule

A replay prunes a trial where the rule would have, and counts only completed trials as history. It
keeps the settings that were suggested. A wrong cut is a trial that the rule prunes and that would
have been among the best three of its study.
"""

import argparse
import contextlib
import dataclasses
import gzip
import json
import platform
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Container
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.speed import versions  # noqa: E402
from lab import stats  # noqa: E402
from lab.options import Pruner  # noqa: E402
from lab.training.job import Job  # noqa: E402
from lab.training.loop import train  # noqa: E402
from lab.training.processes import attempt  # noqa: E402
from lab.training.recorder import processor  # noqa: E402
from lab.tuning.pruner import prune  # noqa: E402
from lab.tuning.trials import Journal, Trial, read_trials  # noqa: E402

JOURNALS = ROOT / "bench/results/pruning"
TRIALS, STUDIES = 16, 7  # trials of a study, studies of each kind below
PAIRS = 3  # of seeds of a trial, each replayed as a study; the first one guided it
SEEDS = 2 * PAIRS
WRONG = 0.02  # share of the pruned trials that may be of the best three
PPO = ("--num-steps 32 --num-minibatches 4 --width 32 --space lr=log:1e-4:1e-1 gamma=0.8:0.999 "
       "gae_lambda=0.5:1 update_epochs=int:1:10 clip_coef=log:0.05:1")
# kind -> environments of a seed, arguments of hypertune.py
KINDS = {
    "ppo-cartpole": (64, "agents/ppo.py --env torch/ContinuousCartPole-v1 --steps 20_480 " + PPO),
    "ppo-pendulum": (128, "agents/ppo.py --env torch/Pendulum-v1 --steps 81_920 " + PPO),
    "sac-pendulum": (8, "agents/sac.py --env torch/Pendulum-v1 --steps 4_000 "
                        "--replay-ratio 0.3 --policy-delay 2 --actor-width 32 --qf-width 32 "
                        "--space actor_lr=log:1e-4:1e-1 qf_lr=log:1e-4:1e-1 gamma=0.8:0.999 "
                        "batch_size=logint:16:256 tau=log:1e-3:1e-1"),
}


def record(kind: str, number: int, runs: Path) -> None:
    """Train a study in this process and store its journal. It resumes; an interrupted trial begins
    again."""
    from lab.command_line import parse_args
    from lab.options import Tune
    from lab.tuning import surrogate
    from lab.tuning.run import check

    num_envs, arguments = KINDS[kind]
    stored, path = JOURNALS / f"{kind}-{number}.jsonl.gz", runs / f"{kind}-{number}.jsonl"
    if stored.exists():
        return
    options, searched, job = check(*parse_args([*arguments.split(), "--seeds", str(SEEDS)], Tune))
    job = dataclasses.replace(job, num_envs=num_envs, log_every=job.eval_every)
    with contextlib.closing(Journal(path)) as journal:
        if not journal.header:
            journal.append({"command": arguments, "num_envs": num_envs, "steps": options.steps,
                            "seeds": SEEDS, "study_seed": number})
        trials = journal.trials()
        while len(trials) < TRIALS or trials[-1].state == "running":
            if not trials or trials[-1].state != "running":
                guide = [pair_of(trial, 0) for trial in trials]
                trials.append(Trial(len(trials), surrogate.ask(searched, guide, number)))
                journal.append({"trial": trials[-1].number, "settings": trials[-1].settings})
            first = (1000 * number + trials[-1].number) * SEEDS
            run(dataclasses.replace(job, config=job.config | trials[-1].settings,
                                    seeds=tuple(range(first, first + SEEDS))), trials[-1], journal)
            print(f"{path.stem}, trial {trials[-1].number} {trials[-1].state}", flush=True)
    JOURNALS.mkdir(exist_ok=True)
    stored.write_bytes(gzip.compress(path.read_bytes(), mtime=0))


def run(job: Job, trial: Trial, journal: Journal) -> None:
    """Train the trial; its evaluations and its end go to the journal."""
    messages: list[dict[str, Any]] = []
    lost = attempt(train, job, messages.append) or next(
        (message["reason"] for message in messages if "failed_seed" in message), None)
    for message in messages:
        returns = [round(row["return/eval"], 2) for row in message.get("rows", {}).values()]
        if len(returns) == SEEDS:
            trial.record(message["step"], returns)
            journal.append({"trial": trial.number, "step": message["step"], "returns": returns})
    trial.state, trial.reason = "diverged" if lost else "completed", str(lost or "")
    journal.append({"trial": trial.number, "state": trial.state, "reason": trial.reason})


def pair_of(trial: Trial, first: int) -> Trial:
    """The trial as two of its seeds saw it."""
    return Trial(trial.number, trial.settings, trial.state, {
        step: returns[first:first + 2] for step, returns in trial.evaluations.items()})


# The replay


class Study(NamedTuple):
    """A recorded study, as one pair of seeds saw it."""

    kind: str
    steps: int  # of a trial
    trials: list[Trial]
    others: dict[int, float]  # number of a completed trial -> last return of the other seeds, mean

    def best(self, count: int, without: Container[int] = ()) -> list[int]:
        """Numbers of the completed trials with the best last evaluations, best first."""
        completed = [trial for trial in self.trials
                     if trial.state == "completed" and trial.number not in without]
        return [t.number for t in sorted(completed, key=lambda t: -t.final)[:count]]


def read(path: Path) -> list[Study]:
    """A journal -> the studies of its pairs of seeds."""
    header, *events = map(json.loads, gzip.decompress(path.read_bytes()).splitlines())
    recorded, found = read_trials(events), []
    for pair in range(0, header["seeds"], 2):
        trials = [pair_of(trial, pair) for trial in recorded]
        others = {t.number: statistics.fmean(np.delete(
            t.evaluations[max(t.evaluations)], [pair, pair + 1]))
            for t in recorded if t.state == "completed"}
        found.append(Study(path.name.rpartition("-")[0], header["steps"], trials, others))
    return found


class Rule(NamedTuple):
    pruner: Pruner
    percentile: float | None
    warmup: str  # share of a trial's steps before which it is not pruned
    startup: int  # completed trials
    patience: int | None

    def cuts(self, study: Study) -> dict[int, int]:
        """Number of a trial that the rule prunes -> step."""
        history: list[Trial] = []
        cuts = {}
        for recorded in study.trials:
            trial = Trial(recorded.number, recorded.settings)
            for step, returns in recorded.evaluations.items():
                trial.record(step, returns)
                if step < study.steps and prune(
                        trial, history, self.pruner, self.percentile or 50, self.startup,
                        int(study.steps * Fraction(self.warmup)), 1, self.patience):
                    cuts[trial.number], trial.state = step, "pruned"
                    break
            else:
                trial.state = recorded.state
            history.append(trial)
        return cuts


RULES = [Rule(pruner, percentile, warmup, startup, patience)
         for pruner, percentile in [("vizier", None), ("median", None), *(
             ("percentile", share) for share in (25, 40, 60, 75, 90))]
         for warmup in ("1/6", "1/3", "1/2", "2/3") for startup in (4, 5)
         for patience in (None, 1, 2)]


def replay(rule: Rule, studies: list[Study]) -> dict[str, Any]:
    """saved: share of the environment steps, mean over studies; cut: pruned trials; wrong: those of
    the best three; lost: what the best trial's other seeds return less, in standard deviations
    over the trials, mean and 95% t interval over studies."""
    row: dict[str, Any] = {**rule._asdict(), "cut": 0, "wrong": 0, "best_cut": 0}
    saved, lost = defaultdict[str, list[float]](list), list[float]()
    for study in studies:
        cuts = rule.cuts(study)
        row["cut"] += len(cuts)
        row["wrong"] += len(cuts.keys() & study.best(3))
        row["best_cut"] += len(cuts.keys() & study.best(1))
        with_it, without = study.best(1, cuts)[0], study.best(1)[0]
        spread = statistics.pstdev(study.others.values())
        lost.append((study.others[without] - study.others[with_it]) / spread)
        ends = {t.number: max(t.evaluations, default=0) for t in study.trials}
        share = sum(ends[number] - step for number, step in cuts.items()) / sum(ends.values())
        for kind in ("all", study.kind):
            saved[kind].append(share)
    means = [statistics.fmean(lost[first:first + PAIRS]) for first in range(0, len(lost), PAIRS)]
    return row | {"saved": {kind: round(statistics.fmean(shares), 4)
                            for kind, shares in saved.items()},
                  "lost": [round(value, 4) for value in stats.t_interval(means)]}


def wrong(row: dict[str, Any]) -> float:
    """Share of the pruned trials."""
    return row["wrong"] / max(1, row["cut"])


def chosen(result: dict[str, Any]) -> dict[str, Any]:
    """The rule that saves most with less than 2% wrong cuts: the default of hypertune.py."""
    return max((row for row in result["rules"] if wrong(row) < WRONG),
               key=lambda row: row["saved"]["all"])


def table(result: dict[str, Any]) -> str:
    """The rules that no other one beats in both saved steps and wrong cuts, and those in use."""
    rows, kinds = result["rules"], result["replays"]
    front = [row for row in rows if not any(
        other["saved"]["all"] >= row["saved"]["all"] and wrong(other) <= wrong(row)
        and (other["saved"]["all"], wrong(other)) != (row["saved"]["all"], wrong(row))
        for other in rows)]
    usual = [row for row in rows if (row["startup"], row["patience"]) == (5, None)
             and row["warmup"] == "1/3"]
    best = chosen(result)
    shown = {tuple(row[key] for key in Rule._fields): row for row in [*front, *usual, best]}
    lines = [f"{sum(kinds.values())} replays of {sum(kinds.values()) // PAIRS} studies of {TRIALS} "
             f"trials ({', '.join(f'{kind}: {count}' for kind, count in kinds.items())})", "",
             "| rule | warm-up | start-up | patience | saved | " + " | ".join(kinds)
             + " | pruned | of the best 3 | the best | lost |",
             "|---" * (9 + len(kinds)) + "|"]
    for row in sorted(shown.values(), key=lambda row: -row["saved"]["all"]):
        name = row["pruner"] + (f" {row['percentile']}" if row["percentile"] else "")
        name = f"**{name}**" if row == best else name
        cells = [name, row["warmup"], row["startup"], row["patience"] or "",
                 *(f"{row['saved'][kind]:.0%}" for kind in ("all", *kinds)), row["cut"],
                 f"{row['wrong']} ({wrong(row):.1%})", row["best_cut"],
                 "{:.2f} ({:.2f} to {:.2f})".format(*row["lost"])]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="train the studies that are missing")
    options = parser.parse_args()
    if options.record:
        runs = ROOT / "runs/pruning"
        runs.mkdir(parents=True, exist_ok=True)
        for number in range(STUDIES):
            for kind in KINDS:
                record(kind, number, runs)
        return
    studies = [study for path in sorted(JOURNALS.glob("*.gz")) for study in read(path)]
    result = {"command": "python bench/pruning.py", "trials": TRIALS,
              "processor": processor(), "python": platform.python_version(),
              "versions": versions(sys.executable, ["torch", "numpy", "bayesian-optimization"]),
              "replays": dict(Counter(study.kind for study in studies)),
              "rules": [replay(rule, studies) for rule in RULES]}
    out = JOURNALS.with_name("pruning-replay.json")
    out.write_text(json.dumps(result) + "\n")
    out.with_suffix(".md").write_text(table(result))
    print(f"{table(result)}\nwritten: {out}")


if __name__ == "__main__":
    main()
