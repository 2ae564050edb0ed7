"""Accuracy of lab.plan: estimated and measured run times.

    python bench/plan.py

Times whole commands, one after another. The machine should be otherwise idle.
"""

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "SAC, Pendulum-v1, 1 seed": "agents/sac.py --env Pendulum-v1 --seeds 1",
    "SAC, Pendulum-v1, 2 seeds in 2 processes": "agents/sac.py --env Pendulum-v1 --seeds 2",
    "PPO, LunarLanderContinuous-v3, 4 seeds in 2 processes":
        "agents/ppo.py --env LunarLanderContinuous-v3 --seeds 4",
    "PPO, BipedalWalker-v3, 1 seed": "agents/ppo.py --env BipedalWalker-v3 --seeds 1",
    "CrossQ 256 wide, HalfCheetah-v5, 2 seeds in 2 processes":
        "agents/crossq.py --env HalfCheetah-v5 --seeds 2 --qf-width 256",
}
ONE = "--steps 20_000 --no-compile --no-cuda --precision fp32"  # a single candidate
SECONDS = {"s": 1, "min": 60, "h": 3600}


def estimate(arguments: list[str]) -> float:
    """Estimated seconds."""
    done = subprocess.run([sys.executable, "-m", "lab.plan", *arguments], cwd=ROOT, check=True,
                          capture_output=True, text=True)
    number, unit = re.search(r": about ([\d.]+) (\w+)$", done.stdout, re.MULTILINE).groups()
    return float(number) * SECONDS[unit]


def measure(arguments: list[str]) -> float:
    """Measured seconds."""
    start_time = time.perf_counter()
    subprocess.run([sys.executable, "learn_simple.py", *arguments], cwd=ROOT, check=True,
                   capture_output=True)
    return time.perf_counter() - start_time


def markdown(result: dict) -> str:
    lines = ["| 20 000 steps | estimated, s | taken, s | taken / estimated |", "|---|---|---|---|"]
    for name, row in result["runs"].items():
        lines.append(f"| {name} | {row['estimated_s']:.0f} | {row['taken_s']:.0f} "
                     f"| {row['taken_s'] / row['estimated_s']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/plan.json")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from bench.speed import versions
    from lab.accelerate import physical_cores
    from lab.training.recorder import processor

    rows = {}
    for name, flags in RUNS.items():
        processes = "2" if "2 processes" in name else "1"
        arguments = [*flags.split(), *ONE.split(), "--processes", processes]
        rows[name] = {"estimated_s": round(estimate(arguments), 1),
                      "taken_s": round(measure(arguments), 1)}
        print(f"{name}: {rows[name]}", flush=True)
    result = {
        "command": "python bench/plan.py", "processor": processor(), "cores": physical_cores(),
        "python": platform.python_version(), "runs": rows,
        "versions": versions(sys.executable, ["torch", "gymnasium", "mujoco", "numpy"])}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(result))
    errors = [abs(row["taken_s"] / row["estimated_s"] - 1) for row in rows.values()]
    print(f"{markdown(result)}\nmedian error {statistics.median(errors):.0%}, worst "
          f"{max(errors):.0%}; written: {options.out}")


if __name__ == "__main__":
    main()
