"""The files of a run. metrics.jsonl is the source of truth; TensorBoard shows the same data.

    runs/<name>-<yyyymmdd-hhmmss>/
        config.json  versions.json  <agent>.py  learning_curves.png
        <env_id>/<agent>/seed_<n>/      metrics.jsonl, TensorBoard events
        <env_id>/<agent>/stopped.json   if it stopped before the last step: {"step", "reason"}
        <env_id>/<agent>/all_seeds/     TensorBoard: mean and 95% interval of return over the seeds
        <env_id>/<agent>/stack_<a>_<b>/ checkpoints of seeds a to b, which one process trains
"""

import contextlib
import functools
import itertools
import json
import math
import os
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
from types import TracebackType
from typing import Any

from lab import stats
from lab.errors import UserError

PACKAGES = ("torch", "gymnasium", "mujoco", "box2d", "numpy", "tensorboard", "scipy")
RETURNS = ("return/train", "return/eval")
STOPPED = "stopped.json"


def reported_return(eval_env: str) -> str:
    """The tag of the return in tables and curves. return/recent: of training's episodes since the
    last row that has it."""
    return "return/recent" if eval_env == "none" else "return/eval"


def safe_name(name: str) -> str:
    """The name with characters replaced that are unsafe in a folder name."""
    return re.sub(r"[^\w.-]+", "_", name).strip("._") or "run"


def printable(text: str) -> str:
    """The text without the half characters that Python makes of bytes in another encoding."""
    return text.encode(errors="replace").decode()


def create_run_folder(root: Path, name: str, agent_path: Path, config: dict[str, Any]) -> Path:
    """A new folder under root with the run's settings and source. UserError if unwritable."""
    folder = new_folder(root, name)
    describe_run(folder, agent_path, config)
    return folder


def new_folder(root: Path, name: str) -> Path:
    """Create root/<name>-<timestamp>, with -2, -3, ... if it exists. UserError if unwritable."""
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
    """Write the run's settings, package versions and agent source into the folder."""
    with writable(folder.parent):
        write_json(folder / "config.json", config)
        write_json(folder / "versions.json", versions())
        shutil.copyfile(agent_path, folder / agent_path.name)


def located(path: Path) -> Path:
    """The path, made absolute if its run folder may lie above the working directory."""
    inside = ".." not in path.parts and _run_above(path)
    return path if inside else Path(os.path.abspath(path))


def _run_above(path: Path) -> Path | None:
    """The folder with a config.json: the path or one of the three above it."""
    return next((folder for folder in [path, *path.parents][:4]
                 if os.path.isfile(folder / "config.json")), None)  # False if a name is too long


def find_run(path: Path) -> Path:
    """The run folder that contains `path`. UserError if there is none."""
    if not os.path.isdir(path):  # False, too, if the name is too long
        raise UserError(f"no folder {path}")
    folder = _run_above(located(path))
    if folder is None:
        raise UserError(f"{path} is not in a run folder: found no config.json")
    return folder


def find_stacks(path: Path) -> dict[Path, dict[int, Path]]:
    """{<environment>/<agent>: {seed: folder of its checkpoints}} of what has checkpoints in `path`,
    a run folder, or one environment, agent or seed in it. UserError if it is in no run folder."""
    found: defaultdict[Path, dict[int, Path]] = defaultdict(dict)
    run, path = find_run(path), located(path)
    one = is_seed(path)
    for stack in sorted(run.glob("*/*/stack_*_*")):
        if stack.is_relative_to(path.parent if one else path) and any(stack.glob("step_*.pt")):
            found[stack.parent] |= {seed: stack for seed in members_of(stack)
                                    if not one or path.name == f"seed_{seed}"}
    return {folder: dict(sorted(by_seed.items()))
            for folder, by_seed in sorted(found.items()) if by_seed}


def is_seed(path: Path) -> bool:
    """Whether it is the folder of one seed in a run."""
    return re.fullmatch(r"seed_\d+", path.name) is not None and not (path / "config.json").exists()


def members_of(stack: Path) -> range:
    """The seeds of a folder stack_<first>_<last>."""
    first, last = map(int, stack.name.split("_")[1:])
    return range(first, last + 1)


@contextlib.contextmanager
def writable(root: Path, new: bool = True) -> Iterator[None]:
    """Turn an OSError into a UserError; a new run could be elsewhere."""
    try:
        yield
    except OSError as error:
        what, advice = ("the runs folder ", "; choose another with --runs") if new else ("", "")
        raise UserError(f"cannot write to {what}{str(root)!r}: {error.strerror}{advice}") from error


def versions() -> dict[str, str]:
    """Versions of Python and of packages that can change results; the system and the processor."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | {"system": platform.system(), "processor": processor()}


def note_versions(folder: Path) -> list[str]:
    """What differs here from the run's versions.json, in words; written there under "resumed"."""
    path, now = folder / "versions.json", versions()
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):  # nothing to compare with
        return []
    latest = before.get("resumed", [before])[-1]
    changed = [f"{name} {value} instead of {latest.get(name, 'none')}"
               for name, value in now.items() if latest.get(name) != value]
    if changed:
        write_json(path, before | {"resumed": [*before.get("resumed", []), now]})
    return changed


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def finite(content: Any) -> Any:
    """The content with None for NaN and infinities, which JSON does not have."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A kill leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def group_folder(run: Path, env_id: str, agent_name: str) -> Path:
    """<run>/<environment>/<agent>; slashes in the id, as in "torch/Pendulum-v1", are replaced."""
    return run / re.sub(r"[^\w.-]+", "_", env_id) / agent_name


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, up to the first incomplete line, which a kill can leave."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def read_stop(group: Path) -> dict[str, Any] | None:
    """The step and the reason of a run that stopped before its last step."""
    path = group / STOPPED
    return json.loads(path.read_text()) if path.exists() else None


def tensorboard(folder: Path, **settings: Any) -> Any:
    """A SummaryWriter, whose thread finds its files by an absolute path: an environment in this
    process may change the working directory at any time."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    _silence_writer_threads()
    return SummaryWriter(str(folder.absolute()), **settings)


@functools.cache
def _silence_writer_threads() -> None:
    """No traceback when a TensorBoard thread cannot write: the next SummaryWriter call raises."""
    previous = threading.excepthook

    def hook(failure: threading.ExceptHookArgs) -> None:
        from_writer = type(failure.thread).__module__.startswith("tensorboard")
        if not (from_writer and isinstance(failure.exc_value, OSError)):
            previous(failure)

    threading.excepthook = hook


def add_hparams(board: Any, settings: dict[str, Any], final: float, tag: str = "return/eval"
                ) -> None:
    """Add an HParams row: settings and the final return."""
    flat = {name: value if isinstance(value, bool | int | float) else printable(str(value))
            for name, value in settings.items()}
    board.add_hparams(flat, {f"hparam/{tag.replace('/', '_')}": final}, run_name=".")


class ReportedOnce:
    """A context in which an OSError, such as that of a full disk, is reported the first time and
    ends nothing."""

    def __init__(self, words: str):
        self.words, self.reported = words, False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> bool:
        if not isinstance(error, OSError):
            return False
        if not self.reported:
            print(f"{self.words}: {error}", file=sys.stderr)
        self.reported = True
        return True


class SeedRecorder:
    """Writes the rows of one seed. On resume, rows after step `start` are dropped."""

    def __init__(self, folder: Path, start: int):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= start]
        temporary = path.with_suffix(".tmp")  # rename, so that a kill loses no rows
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)
        self.file = path.open("a")
        self.board = tensorboard(folder, purge_step=start + 1)
        self.disk = ReportedOnce("logging failed, training continues")

    def write(self, row: dict[str, float]) -> None:
        """Write one row. A full disk is reported once and does not stop training."""
        with self.disk:
            self.file.write(json.dumps(row | {"wall_time": time.time()}) + "\n")
            self.file.flush()
            for tag, value in row.items():
                if tag != "step":
                    self.board.add_scalar(tag, value, row["step"])

    def flush(self) -> None:
        with self.disk:
            os.fsync(self.file.fileno())
            self.board.flush()

    def close(self, settings: dict[str, Any], final: float | None,
              tag: str = "return/eval") -> None:
        """Add the HParams row, if there is a final return, and close the files."""
        try:
            if final is not None:
                add_hparams(self.board, settings, final, tag)
            self.board.close()
            self.file.close()
        except OSError as error:
            print(f"logging failed: {error}", file=sys.stderr)


class AllSeeds:
    """TensorBoard: mean and 95% t interval of the returns over seeds, as a band."""

    def __init__(self, folder: Path, seeds: Sequence[int]):
        # absolute: an environment in this process may change the working directory
        self.folder, self.alive = folder.absolute(), set(seeds)
        self.written = dict.fromkeys(RETURNS, -1)  # tag -> last written step
        self.disk = ReportedOnce("all_seeds not written")

    @functools.cached_property
    def board(self) -> Any:
        """Opened, and rebuilt on resume, by the first row: another process may train the run."""
        shutil.rmtree(self.folder / "all_seeds", ignore_errors=True)
        board = tensorboard(self.folder / "all_seeds")
        charts = {tag: ["Margin", [f"{tag}_mean", f"{tag}_lower", f"{tag}_upper"]]
                  for tag in RETURNS}
        board.add_custom_scalars({"mean and 95% interval over the seeds": charts})
        return board

    def refresh(self) -> None:
        """Append the new steps that every seed has reached, failed ones aside. A full disk is
        reported once."""
        with self.disk:
            self._append()

    def _append(self) -> None:
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
        if "board" in vars(self):
            self.board.flush()
