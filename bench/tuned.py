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
import shutil
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
from lab.training import recorder  # noqa: E402

RESULTS, TUNED = ROOT / "bench/results/tuned", ROOT / "agents/tuned"
LEAST = 0.8  # probability of improvement over the defaults
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
    steps: int
    source: str
    tuned: Sequence[float]  # returns, empty if nothing beat the defaults
    defaults: Sequence[float]
    published: str

    @property
    def improvement(self) -> float:
        """Probability that a run beats a run of the defaults."""
        return stats.probability_of_improvement(self.tuned, self.defaults) if self.tuned else 0.0


def rows() -> list[Row]:
    scores, found = learning.read(), []
    for agent, env, tuned, defaults, published in BY_HAND:
        (steps, with_them), (_, without) = (learning.last(scores[n]) for n in (tuned, defaults))
        found.append(Row(agent, env, steps, f"{tuned}, by hand", with_them, without, published))
    return found + [row(name) for name in STUDIES if (RESULTS / name).exists()]


def row(name: str) -> Row:
    best = json.loads((RESULTS / name / "best.json").read_text())
    options, study = best["options"], best["study"]
    tuned = [] if study["is"] == "defaults" else study["confirmed"]
    return Row(Path(options["agent"]).stem, options["env"][0], options["steps"],
               f"tuned/{name}, {study['is']}", tuned, study["defaults"], STUDIES[name][1])


def table(found: Sequence[Row]) -> str:
    def cell(returns: Sequence[float]) -> str:
        return f"{tuning.interval(returns)}, n={len(returns)}" if returns else ""

    lines = ["| agent | environment | steps | defaults | tuned | P(better) | ships | published | "
             "result |", "|---|---|---|---|---|---|---|---|---|"]
    for each in found:
        cells = [each.agent, each.env, each.steps, cell(each.defaults), cell(each.tuned),
                 f"{each.improvement:.2f}", "yes" if each.improvement > LEAST else "no",
                 each.published, each.source]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    missing = [name for name in STUDIES if not (RESULTS / name).exists()]
    return "\n".join(lines) + (f"\n\nStudies still to run: {', '.join(missing)}" * bool(missing)
                               ) + "\n"


def store(name: str, folder: Path) -> None:
    """Keep a finished study, and its best settings if they beat the defaults."""
    kept = RESULTS / name
    kept.mkdir(parents=True, exist_ok=True)
    journal = (folder / "trials.jsonl").read_bytes()
    (kept / "trials.jsonl.gz").write_bytes(gzip.compress(journal, mtime=0))
    for file in ("config.json", "versions.json", "study.png", "best.json"):
        shutil.copy(folder / file, kept / file)
    if row(name).improvement > LEAST:
        ship(json.loads((kept / "best.json").read_text()), f"bench/results/tuned/{name}")


def ship(best: dict[str, Any], source: str) -> None:
    """Write the settings that differ from the defaults of the agent's Config."""
    agent, env = best["options"]["agent"], best["options"]["env"][0]
    defaults = json.loads(json.dumps(settings.plain_config(load_agent(agent).Config())))
    differ = {key: value for key, value in best["config"].items() if value != defaults[key]}
    path = TUNED / f"{recorder.safe_name(env)}.json"
    path.parent.mkdir(exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    recorder.write_json(path, before | {Path(agent).stem: {"settings": differ, "source": source}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--list", action="store_true", help="print the commands")
    options = parser.parse_args()
    for name in options.studies or [n for n in STUDIES if not (RESULTS / n).exists()]:
        command = ["hypertune.py", *STUDIES[name][0].split(), "--name", name]
        print("python", *command, flush=True)
        if not options.list:
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
            store(name, ROOT / "runs/studies" / name)
    if not options.list:
        (RESULTS.parent / "tuned.md").write_text(table(rows()))


if __name__ == "__main__":
    main()
