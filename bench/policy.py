"""How long a trained policy takes to decide, and how late its actions are in a loop of 50 Hz: the
agent in torch, and each export of python -m lab.export.

    python bench/policy.py runs/x --seed 0      writes bench/results/policy.json and policy.md
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.accelerate import physical_cores  # noqa: E402
from lab.errors import guarded  # noqa: E402
from lab.export.__main__ import FORMATS, Exported, widths  # noqa: E402
from lab.policy import load_policy  # noqa: E402
from lab.training import recorder  # noqa: E402

RESULTS = ROOT / "bench/results"
PERIOD, TICKS, DECISIONS = 0.02, 500, 2_000  # seconds; ticks of a loop; decisions that are timed
Act = Callable[[np.ndarray], np.ndarray]


def decision_us(act: Act, obs: np.ndarray) -> dict[str, float]:
    """Of DECISIONS actions for one observation, in microseconds."""
    times = []
    for _ in range(DECISIONS):
        start = time.perf_counter()
        act(obs)
        times.append(1e6 * (time.perf_counter() - start))
    return quantiles(times)


def lateness_ms(act: Act, obs: np.ndarray) -> dict[str, float]:
    """From each tick of a loop until its action is there, in milliseconds."""
    late, tick = [], time.perf_counter()
    for _ in range(TICKS):
        tick += PERIOD
        time.sleep(max(0, tick - time.perf_counter()))
        act(obs)
        late.append(1e3 * (time.perf_counter() - tick))
    return quantiles(late)


def quantiles(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "p99": float(np.quantile(values, 0.99)),
            "largest": max(values)}


def measure(path: Path, seed: int | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    policy = load_policy(path, seed)
    obs = np.zeros((1, policy.spec.obs_dim), np.float32)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        acts = {"agent in torch": policy} | {
            kind: Exported(write(policy, Path(folder)), widths(policy)[1:])
            for kind, write in FORMATS.items()}
        for name, act in acts.items():
            rows[name] = {"decision_us": decision_us(act, obs), "late_ms": lateness_ms(act, obs)}
    about = {name: policy.about()[name] for name in ("agent", "environment", "step", "spaces")}
    about |= {"cores": physical_cores(), "load": round(os.getloadavg()[0], 1)}
    return about | {"versions": recorder.versions(), "rows": rows}


def markdown(result: dict[str, Any]) -> str:
    lines = ["| policy | one decision: median | 99% | delay: median | 99% | largest |",
             "|---|---|---|---|---|---|"]
    for name, row in result["rows"].items():
        decision, late = row["decision_us"], row["late_ms"]
        cells = [name, *(f"{decision[part]:.0f} us" for part in ("median", "p99")),
                 *(f"{late[part]:.2f} ms" for part in ("median", "p99", "largest"))]
        lines.append(f"| {' | '.join(cells)} |")
    versions, spaces = result["versions"], result["spaces"]
    lines += ["", f"{result['agent'].upper()} on {result['environment']} ({spaces['obs_dim']} "
              f"observations, {spaces['action_dim']} actions), one thread, torch "
              f"{versions['torch']}, {versions['processor']}, {result['cores']} cores with a load "
              f"of {result['load']}."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seed", type=int)
    given = parser.parse_args(argv)
    measured = measure(given.run, given.seed)
    (RESULTS / "policy.json").write_text(json.dumps(measured, indent=2) + "\n")
    (RESULTS / "policy.md").write_text(markdown(measured))
    print(markdown(measured))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
