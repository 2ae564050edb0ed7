"""What a run leaves on disk. metrics.jsonl is the truth; TensorBoard is a view of it.

    runs/<name>-<yyyymmdd-hhmmss>/
        config.json  versions.json  <agent>.py  learning_curves.png
        <env_id>/<agent>/seed_<n>/      metrics.jsonl, TensorBoard events
        <env_id>/<agent>/all_seeds/     TensorBoard: mean and 95% interval of return over the seeds
        <env_id>/<agent>/stack_<a>_<b>/ checkpoints of the seeds a to b, which one process trains
"""

import contextlib
import functools
import itertools
import json
import math
import platform
import re
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lab import stats
from lab.errors import UserError

PACKAGES = ("torch", "gymnasium", "mujoco", "box2d", "numpy", "tensorboard", "scipy")
RETURNS = ("return/train", "return/eval")


def safe_name(name: str) -> str:
    """The words of a name, fit for a folder."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "run"


def create_run_folder(root: Path, name: str, agent_path: Path, config: dict[str, Any]) -> Path:
    """A new folder under root with the run's settings and sources. UserError if unwritable."""
    folder = new_folder(root, name)
    describe_run(folder, agent_path, config)
    return folder


def new_folder(root: Path, name: str) -> Path:
    """root/<name>-<stamp>, which was not there before. UserError if it cannot be."""
    safe, stamp = safe_name(name), time.strftime("%Y%m%d-%H%M%S")
    with writable(root):
        root.mkdir(parents=True, exist_ok=True)
        for clash in itertools.count(1):
            folder = root / (f"{safe}-{stamp}" + (f"-{clash}" if clash > 1 else ""))
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
    return folder


def describe_run(folder: Path, agent_path: Path, config: dict[str, Any]) -> None:
    """Its settings, versions and source."""
    with writable(folder.parent):
        write_json(folder / "config.json", config)
        write_json(folder / "versions.json", versions())
        shutil.copyfile(agent_path, folder / agent_path.name)


@contextlib.contextmanager
def writable(root: Path) -> Iterator[None]:
    """A UserError in place of what the system says."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to the runs folder {str(root)!r}: {error.strerror}; choose "
                        "another with --runs") from error


def versions() -> dict[str, str]:
    """Of Python, the packages that decide a result, and the processor."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | {"system": platform.system(), "processor": processor()}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def group_folder(run: Path, env_id: str, agent_name: str) -> Path:
    """Where the seeds of one environment lie; an id like "torch/Pendulum-v1" stays one folder."""
    return run / re.sub(r"[^\w.-]+", "_", env_id) / agent_name


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a torn last line, left by a kill, is no row."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def tensorboard(folder: Path, **settings: Any) -> Any:
    """A SummaryWriter."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    _quieten_its_threads()
    return SummaryWriter(str(folder), **settings)


@functools.cache
def _quieten_its_threads() -> None:
    """When one cannot write, the next call on its SummaryWriter says so: once is enough."""
    before = threading.excepthook

    def quieter(failure: threading.ExceptHookArgs) -> None:
        theirs = type(failure.thread).__module__.startswith("tensorboard")
        if not (theirs and isinstance(failure.exc_value, OSError)):
            before(failure)

    threading.excepthook = quieter


def add_hparams(board: Any, settings: dict[str, Any], final: float) -> None:
    """The row of these settings against the final evaluation return."""
    flat = {name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in settings.items()}
    board.add_hparams(flat, {"hparam/return_eval": final}, run_name=".")


class SeedRecorder:
    """The rows of one seed. What an interrupted run wrote after the step `start` is dropped."""

    def __init__(self, folder: Path, start: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= start]
        whole = path.with_suffix(".tmp")  # a kill must not cut the rows that are kept
        whole.write_text("".join(json.dumps(row) + "\n" for row in kept))
        whole.replace(path)
        self.file = path.open("a")
        self.board = tensorboard(folder, purge_step=start + 1)
        self.failed = False

    def write(self, row: dict[str, float]) -> None:
        """One row with its step. A full disk is reported once and does not end the training."""
        try:
            self.file.write(json.dumps(row | {"wall_time": time.time()}) + "\n")
            self.file.flush()
            for tag, value in row.items():
                if tag != "step":
                    self.board.add_scalar(tag, value, row["step"])
        except OSError as error:
            if not self.failed:
                print(f"logging failed, training goes on: {error}", file=sys.stderr)
            self.failed = True

    def close(self, settings: dict[str, Any], final: float | None) -> None:
        """Add the HParams row, settings against the final evaluation return."""
        try:
            if final is not None:
                add_hparams(self.board, settings, final)
            self.board.close()
            self.file.close()
        except OSError as error:
            print(f"logging failed: {error}", file=sys.stderr)


class AllSeeds:
    """The TensorBoard run with mean and interval of the returns over the seeds, as a band."""

    def __init__(self, folder: Path, seeds: Sequence[int]):
        self.folder, self.alive = folder, set(seeds)
        self.written = dict.fromkeys(RETURNS, -1)  # the last step of each tag
        shutil.rmtree(folder / "all_seeds", ignore_errors=True)  # a view, made anew on resuming
        self.board = tensorboard(folder / "all_seeds")
        charts = {tag: ["Margin", [f"{tag}_mean", f"{tag}_lower", f"{tag}_upper"]]
                  for tag in RETURNS}
        self.board.add_custom_scalars({"mean and 95% interval over the seeds": charts})

    def refresh(self) -> None:
        """Append the steps that every seed still alive has reached since the last call."""
        rows = [read_metrics(self.folder / f"seed_{seed}" / "metrics.jsonl")
                for seed in sorted(self.alive)]
        for tag in RETURNS:
            values = defaultdict(list)
            for row in (row for seed_rows in rows for row in seed_rows if tag in row):
                values[row["step"]].append(row[tag])
            complete = [s for s, v in values.items() if len(v) == len(self.alive)]
            for step in sorted(s for s in complete if s > self.written[tag]):
                mean, lower, upper = stats.t_interval(values[step])
                bounds = (mean, mean, mean) if math.isnan(lower) else (mean, lower, upper)
                for part, value in zip(("mean", "lower", "upper"), bounds, strict=True):
                    self.board.add_scalar(f"{tag}_{part}", value, step)
                self.written[tag] = step
        self.board.flush()
