"""All metrics of the runs as one CSV file in long form, for pandas and R."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from lab.report.runs import Method
from lab.training.recorder import read_metrics

COLUMNS = ("method", "run", "env", "agent", "seed", "step", "tag", "value")


def write(path: Path, methods: Sequence[Method]) -> None:
    """A row for each value. `env` is the folder's name, where slashes of the id are replaced;
    `wall_time` is a tag too."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for name, run in ((method.name, run) for method in methods for run in method.runs):
            for metrics in sorted(run.folder.glob("*/*/seed_*/metrics.jsonl")):
                env, agent, seed, _ = metrics.relative_to(run.folder).parts
                if not re.fullmatch(r"seed_\d+", seed):
                    continue
                for row in read_metrics(metrics):
                    rows.writerows((name, run.folder.resolve().name, env, agent, seed[5:],
                                    row["step"], tag, value)
                                   for tag, value in row.items() if tag != "step")
