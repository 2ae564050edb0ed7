"""Memory that an update of PPO needs beside its rollout, by micro-batches and precision.

    python bench/memory.py

One seed, 4096 environments x 32 steps with 17 numbers an observation and 6 an action, networks 256
wide, one minibatch: the whole rollout. Each case runs in its own process, which reports by how much
its peak of resident memory passes what it held before the update.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.accelerate import Accelerator  # noqa: E402
from lab.agent import build_agent  # noqa: E402
from lab.envs.spec import EnvSpec  # noqa: E402
from lab.training.recorder import versions  # noqa: E402

NUM_ENVS, STEPS, OBS, ACTIONS = 4096, 32, 17, 6
CASES = [(parts, precision) for precision in ("fp32", "bf16") for parts in (1, 4, 16)]


def resident(name: str) -> float:
    """VmRSS, now, or VmHWM, at most so far: MiB of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def measure(parts: int, precision: str) -> float:
    torch.set_num_threads(1)
    spec = EnvSpec("memory", OBS, ACTIONS, (-1.0,) * ACTIONS, (1.0,) * ACTIONS, None)
    settings = {"num_steps": STEPS, "width": 256, "num_minibatches": 1, "update_epochs": 1,
                "micro_batches": parts}
    agent = build_agent(ROOT / "agents/ppo.py", settings, spec, [0], NUM_ENVS, 10**9, "cpu",
                        Accelerator(precision=precision))
    zeros = torch.zeros(1, NUM_ENVS)
    for _ in range(STEPS):
        obs = torch.randn(1, NUM_ENVS, OBS)
        agent.observe(obs, agent.act(obs), zeros, obs, zeros, zeros)
    before = resident("VmRSS")
    assert agent.update(), "no update"
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/memory.json")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(int(options.measure[0]), options.measure[1]))
        return
    table: dict[str, dict[int, int]] = {precision: {} for _, precision in CASES}
    for parts, precision in CASES:
        done = subprocess.run([sys.executable, __file__, "--measure", str(parts), precision],
                              capture_output=True, text=True, check=True)
        table[precision][parts] = round(float(done.stdout))
        print(f"{parts} micro-batches, {precision}: {table[precision][parts]} MiB", flush=True)
    result = {"command": "python bench/memory.py", "versions": versions(), "mib": table}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(table))


def markdown(table: dict[str, dict[int, int]]) -> str:
    counts = list(table["fp32"])
    lines = ["| " + " | ".join(["micro-batches", *map(str, counts)]) + " |",
             "|---" * (1 + len(counts)) + "|"]
    lines += ["| " + " | ".join([precision, *(f"{row[n]} MiB" for n in counts)]) + " |"
              for precision, row in table.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
