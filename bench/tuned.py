"""Settings that ship: tune an agent, and keep what beats its defaults on held-out seeds.

    python bench/tuned.py                  the studies below that are missing; they resume
    python bench/tuned.py ppo-lander       one of them
    python bench/tuned.py --list           print them instead

bench/results/tuned/<study>/ gets the journal, the settings, the confirmation and the picture of a
study. agents/tuned/<env>.json gets the best settings, if a run of them beats a run of the defaults
with a probability above 0.8. bench/results/tuned.md is the table of both.
"""

import argparse
import gzip
import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import learning, tuning  # noqa: E402
from lab import settings, stats  # noqa: E402
from lab.agent import load_agent  # noqa: E402
from lab.options import Options  # noqa: E402
from lab.training import recorder  # noqa: E402

RESULTS, TUNED = ROOT / "bench/results/tuned", ROOT / "agents/tuned"
LEAST = 0.8  # probability of improvement over the defaults
TASK = ("action_repeat", "clip_reward", "failure_below")  # options that change the task
PPO = ("--trials 24 --confirm-seeds 10 --space lr=log:5e-5:5e-3 gamma=0.95:0.9995 "
       "gae_lambda=0.8:1 num_steps=cat:512,1024,2048,4096 update_epochs=int:3:20 "
       "clip_coef=0.1:0.4 ent_coef=cat:0,0.001,0.01")
DISCRETE = ("--trials 24 --confirm-seeds 10 --space lr=log:1e-4:1e-2 gamma=0.9:0.999 "
            "gae_lambda=0.8:1 num_steps=cat:128,256,512,1024,2048 update_epochs=int:3:20 "
            "clip_coef=0.1:0.4 ent_coef=cat:0,0.001,0.01")
OFF_POLICY = ("--trials 16 --confirm-seeds 8 --compile --precision bf16 --space "
              "gamma=0.95:0.999 batch_size=logint:64:256 policy_delay=cat:1,2,3 ")
TWO_RATES = "actor_lr=log:1e-4:3e-3 qf_lr=log:1e-4:3e-3"
SOLVED = "{} counts as solved"
# study -> arguments of hypertune.py, published return
STUDIES = {
    "ppo-halfcheetah": ("agents/ppo.py --env HalfCheetah-v5 --steps 300_000 "
                        f"{tuning.RULE.format(100_000)} {PPO}", "1443 (CleanRL, v4, at 1 000 000)"),
    "ppo-lander": ("agents/ppo.py --env LunarLanderContinuous-v3 --steps 500_000 "
                   f"{tuning.RULE.format(166_000)} {PPO}", SOLVED.format(200)),
    "ppo-discrete-cartpole": (
        f"agents/ppo_discrete.py --env CartPole-v1 --steps 30_000 {DISCRETE}",
        SOLVED.format(475)),
    "sac-lander": ("agents/sac.py --env LunarLanderContinuous-v3 --steps 50_000 "
                   f"{tuning.RULE.format(16_000)} {OFF_POLICY}{TWO_RATES} tau=log:1e-3:5e-2",
                   SOLVED.format(200)),
    "crossq-biped": ("agents/crossq.py --env BipedalWalker-v3 --steps 60_000 --qf-width 256 "
                     f"{tuning.RULE.format(20_000)} {OFF_POLICY}{TWO_RATES}", SOLVED.format(300)),
    "xqc-biped": ("agents/xqc.py --env BipedalWalker-v3 --steps 60_000 --action-repeat 2 "
                  f"--clip-reward -1 10 --failure-below -99 {tuning.RULE.format(20_000)} "
                  f"{OFF_POLICY}lr=log:1e-4:3e-3 tau=log:1e-3:5e-2", SOLVED.format(300)),
}
# settings found by hand: agent, environment, experiments of bench/learning.py with them and with
# the defaults, published return
BY_HAND = [("ppo", "LunarLanderContinuous-v3", "ppo-lunarlander", "ppo-lunarlander-defaults",
            SOLVED.format(200))]


class Row(NamedTuple):
    agent: str
    env: str
    task: str  # flags that change it
    steps: int
    source: str  # folder of the result, in bench/results/
    what: str  # of the study: the trial, or its defaults
    tuned: Sequence[float]  # returns, empty if nothing beat the defaults
    defaults: Sequence[float]
    published: str

    @property
    def improvement(self) -> float:
        """Probability that a run beats a run of the defaults."""
        return stats.probability_of_improvement(self.tuned, self.defaults) if self.tuned else 0.0


def done(name: str) -> bool:
    return (RESULTS / name / "best.json").exists()


def rows() -> list[Row]:
    scores, found = learning.read(), []
    for agent, env, tuned, defaults, published in BY_HAND:
        (steps, with_them), (_, without) = (learning.last(scores[n]) for n in (tuned, defaults))
        found.append(Row(agent, env, "", steps, tuned, "by hand", with_them, without,
                         published))
    return found + [row(name) for name in STUDIES if done(name)]


def row(name: str) -> Row:
    best = json.loads((RESULTS / name / "best.json").read_text())
    options, study = best["options"], best["study"]
    tuned = [] if study["is"] == "defaults" else study["confirmed"]
    task = " ".join(re.findall(learning.CHANGES, STUDIES[name][0]))
    return Row(Path(options["agent"]).stem, options["env"][0], task, options["steps"],
               f"tuned/{name}", study["is"], tuned, study["defaults"],
               STUDIES[name][1])


def shipped(found: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """Agent and environment -> the row whose settings ship: the best of those that beat the
    defaults."""
    best: dict[tuple[str, str], Row] = {}
    for each in found:
        key = each.agent, each.env
        if each.improvement > LEAST and (key not in best or statistics.fmean(each.tuned)
                                         > statistics.fmean(best[key].tuned)):
            best[key] = each
    return best


def table(found: Sequence[Row]) -> str:
    def cell(returns: Sequence[float]) -> str:
        return f"{tuning.interval(returns)}, n={len(returns)}" if returns else ""

    lines = ["| agent | environment | steps | defaults | tuned | P(better) | ships | published | "
             "result |", "|---|---|---|---|---|---|---|---|---|"]
    ships = shipped(found).values()
    for each in found:
        env = f"{each.env} `{each.task}`" if each.task else each.env
        cells = [each.agent, env, each.steps, cell(each.defaults), cell(each.tuned),
                 f"{each.improvement:.2f}", "yes" if each in ships else "no", each.published,
                 f"{each.source}, {each.what}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    missing = [name for name in STUDIES if not done(name)]
    return "\n".join(lines) + (f"\n\nStudies still to run: {', '.join(missing)}" * bool(missing)
                               ) + "\n"


def store(name: str, folder: Path) -> None:
    """Keep a finished study."""
    kept = RESULTS / name
    kept.mkdir(parents=True, exist_ok=True)
    journal = (folder / "trials.jsonl").read_bytes()
    (kept / "trials.jsonl.gz").write_bytes(gzip.compress(journal, mtime=0))
    for file in ("config.json", "versions.json", "study.png", "best.json"):  # best.json: it is done
        shutil.copy(folder / file, kept / file)


def ship(found: Sequence[Row]) -> None:
    """Write agents/tuned/ anew: what differs from the defaults, of the task too, and how many seeds
    it was tuned on, from 0."""
    files: dict[Path, dict[str, Any]] = {}
    for (agent, env), each in sorted(shipped(found).items()):
        folder, by_hand = RESULTS.parent / each.source, each.what == "by hand"
        of_run = json.loads((folder / "config.json").read_text())
        best = of_run if by_hand else json.loads((folder / "best.json").read_text())
        defaults = json.loads(json.dumps(settings.plain_config(
            load_agent(f"agents/{agent}.py").Config())))
        differ = {key: best["options"][key] for key in TASK
                  if best["options"].get(key, getattr(Options, key)) != getattr(Options, key)}
        differ |= {key: value for key, value in best["config"].items() if value != defaults[key]}
        seeds = of_run["options"]["seeds"] * of_run["options"].get("trials", 1)
        files.setdefault(TUNED / settings.tuned_file(Path(), env).name, {})[agent] = {
            "settings": differ, "seeds": seeds, "source": f"bench/results/{each.source}"}
    TUNED.mkdir(exist_ok=True)
    for path in TUNED.glob("*.json"):
        path.unlink()
    for path, content in files.items():
        recorder.write_json(path, content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--list", action="store_true", help="print the commands")
    options = parser.parse_args()
    if unknown := set(options.studies) - set(STUDIES):
        parser.error(f"no study {' or '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    for name in options.studies or [n for n in STUDIES if not done(n)]:
        command = ["hypertune.py", *STUDIES[name][0].split(), "--name", name]
        print("python", *command, flush=True)
        if not options.list:
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
            store(name, ROOT / "runs/studies" / name)
    if not options.list:
        ship(rows())
        (RESULTS.parent / "tuned.md").write_text(table(rows()))


if __name__ == "__main__":
    main()
