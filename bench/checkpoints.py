"""How long a checkpoint interrupts training, with replay buffers of a million transitions.

    python bench/checkpoints.py

8 seeds of SAC on HalfCheetah-v5 with full replay buffers. Training writes a checkpoint every five
minutes, so between two of them this adds the transitions of five minutes at 400 seed-steps/s, more
than SAC reaches in bench/speed.py.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.agent import build_agent, save_state  # noqa: E402
from lab.envs.make import make_envs  # noqa: E402
from lab.training import checkpoint  # noqa: E402
from lab.training.logger import CHECKPOINT_SECONDS  # noqa: E402
from lab.training.recorder import versions  # noqa: E402

SEEDS, STEPS, SPEED = 8, 1_000_000, 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/checkpoints.json")
    options = parser.parse_args()
    stack = make_envs("HalfCheetah-v5", range(SEEDS))
    agent = build_agent(ROOT / "agents/sac.py", {}, stack.spec, range(SEEDS), 1, STEPS, "cpu",
                        lambda fn: fn)
    stack.close()
    agent.replay.rows.normal_()
    new, pauses = CHECKPOINT_SECONDS * SPEED // SEEDS, []
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        for number in range(5):
            start = number * new
            agent.replay.rows[:, start : start + new] = torch.randn(
                SEEDS, new, agent.replay.rows.shape[2])
            start_time = time.perf_counter()
            checkpoint.save(Path(folder), number, {"agent": save_state(agent)})
            pauses.append(time.perf_counter() - start_time)
            print(f"checkpoint {number}: {pauses[-1]:.1f} s", flush=True)
        start_time = time.perf_counter()
        checkpoint.load_latest(Path(folder))
        loading = time.perf_counter() - start_time
    share = max(pauses[1:]) / CHECKPOINT_SECONDS
    result = {
        "command": "python bench/checkpoints.py", "seeds": SEEDS, "versions": versions(),
        "replay_gigabytes": round(agent.replay.rows.nbytes / 1e9, 2), "new_transitions": new,
        "seconds": [round(pause, 2) for pause in pauses], "loading_seconds": round(loading, 2),
        "share_of_five_minutes": round(share, 4)}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{share:.1%} of five minutes; the first, full checkpoint {pauses[0]:.1f} s; loading "
          f"{loading:.1f} s; written: {options.out}")


if __name__ == "__main__":
    main()
