"""Returns of uniform random actions, the zero of normalised scores. Replaces the `random` rows of
lab/report/published.csv, one per environment with a reference.

    python bench/random_policy.py
"""

import csv
import sys
from pathlib import Path

import gymnasium

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.report import published  # noqa: E402

EPISODES = 100
SOURCE = f"uniform random actions, {EPISODES} episodes (bench/random_policy.py)"


def random_return(env_id: str) -> float:
    """Mean return over EPISODES episodes."""
    env = gymnasium.make(env_id)
    env.action_space.seed(0)
    total = 0.0
    for episode in range(EPISODES):
        env.reset(seed=0 if episode == 0 else None)
        ended = False
        while not ended:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
            total += float(reward)
            ended = terminated or truncated
    env.close()
    return total / EPISODES


if __name__ == "__main__":
    rows = [row for row in published.rows() if row.algorithm != "random"]
    for row in [row for row in rows if row.algorithm == "reference"]:
        mean = round(random_return(row.environment), 1)
        rows.append(published.Row("random", row.environment, 0, mean, SOURCE))
        print(row.environment, mean, flush=True)
    with published.PATH.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(published.Row._fields)
        writer.writerows(row._replace(mean=f"{row.mean:g}") for row in rows)
