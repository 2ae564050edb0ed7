"""--track: the rows of a run also go to MLflow or Weights & Biases (extras, installed by the user).

One tracker run a seed, in a group that has the name of the run folder. Where it goes is said by the
service's own variables, such as MLFLOW_TRACKING_URI, WANDB_PROJECT and WANDB_MODE=offline.
"""

import contextlib
import importlib.util
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from lab.errors import UserError, first_line
from lab.training.job import Job

WAITING = 10_000  # rows that may wait
PATIENCE = 60.0  # seconds to send what waits at the end
INTERRUPTED = 5.0  # the same after Ctrl-C
PROJECT = "mini-rl-lab"


class Service(Protocol):
    """A tracker's client, used by one thread."""

    def start(self, env_id: str, seed: int) -> Any:
        """Begin or resume the run of a seed."""

    def log(self, run: Any, step: int, row: dict[str, float]) -> None: ...

    def finish(self, runs: Sequence[Any], files: Sequence[Path]) -> None:
        """Add the files and end the runs."""


class MLflow:
    """The seeds' runs are nested in a run of the group, which has the files."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        import mlflow

        for name in ("mlflow", "alembic"):  # a line for each table that is created
            logging.getLogger(name).setLevel(logging.ERROR)
        self.entities, self.client = mlflow.entities, mlflow.MlflowClient()
        found = self.client.get_experiment_by_name(PROJECT)
        self.experiment = found.experiment_id if found else self.client.create_experiment(PROJECT)
        self.settings, self.name = settings, folder.name
        self.group = self._open(folder.name, {})

    def _open(self, name: str, tags: dict[str, str]) -> str:
        found = self.client.search_runs(
            [self.experiment], f"tags.`mlflow.runName` = '{name}'", max_results=1)
        if found:
            self.client.update_run(found[0].info.run_id, "RUNNING")
            return found[0].info.run_id
        run_id = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        self.client.log_batch(run_id, params=[
            self.entities.Param(key, str(value)) for key, value in self.settings.items()])
        return run_id

    def start(self, env_id: str, seed: int) -> str:
        return self._open(f"{self.name} {env_id} seed {seed}", {
            "mlflow.parentRunId": self.group, "env": env_id, "seed": str(seed)})

    def log(self, run: str, step: int, row: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(run, metrics=[
            self.entities.Metric(tag, value, now, step) for tag, value in row.items()])

    def finish(self, runs: Sequence[str], files: Sequence[Path]) -> None:
        for path in files:
            self.client.log_artifact(self.group, str(path))
        for run in (*runs, self.group):
            self.client.set_terminated(run)


class WandB:
    """Steps are the metric "step", because those of W&B must not go back, as a resumed run does."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        import wandb

        self.wandb, self.folder, self.settings = wandb, folder, settings

    def start(self, env_id: str, seed: int) -> Any:
        name = f"{env_id} seed {seed}"
        run = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=re.sub(r"[^a-zA-Z0-9_.-]", "-", f"{self.folder.name} {name}"), name=name,
            group=self.folder.name, dir=str(self.folder), resume="allow", reinit="create_new",
            config=self.settings | {"env": env_id, "seed": seed},
            settings=self.wandb.Settings(silent=True, console="off"))
        run.define_metric("*", step_metric="step")
        return run

    def log(self, run: Any, step: int, row: dict[str, float]) -> None:
        run.log({"step": step} | row)

    def finish(self, runs: Sequence[Any], files: Sequence[Path]) -> None:
        for run in runs:
            artifact = self.wandb.Artifact(run.id, type="run")
            for path in files:
                artifact.add_file(str(path))
            run.log_artifact(artifact)
            run.finish()


SERVICES: dict[str, type[Any]] = {"mlflow": MLflow, "wandb": WandB}


def check(service: str | None) -> None:
    """UserError if its package is not installed."""
    if service and importlib.util.find_spec(service) is None:
        raise UserError(f"--track {service} needs a package: pip install {service}")


def tracked(service: str | None, folder: Path | None
            ) -> "contextlib.AbstractContextManager[Tracker | None]":
    """A tracker of the run in the folder, if there is a service."""
    return Tracker(SERVICES[service], folder) if service and folder else contextlib.nullcontext()


class Tracker:
    """Sends the rows of a run in a thread of its own. The service can neither end the run nor slow
    it: rows are dropped when too many wait, and a failure ends the tracking, with one warning."""

    def __init__(self, service: type[Any], folder: Path):
        self.service, self.folder = service, folder
        self.rows: queue.Queue[tuple[str, int, int, dict[str, float]] | None] = queue.Queue(WAITING)
        self.warned = False
        self.thread = threading.Thread(target=self._send, daemon=True)

    def __enter__(self) -> "Tracker":
        self.thread.start()
        return self

    def receive(self, job: Job, message: dict[str, Any]) -> None:
        """Take the rows of a job's message."""
        speed = {tag: value for tag, value in message.items() if tag.startswith("perf/")}
        for seed, row in message.get("rows", {}).items():
            if self.thread.is_alive():
                try:
                    self.rows.put_nowait((job.env_id, seed, message["step"], row | speed))
                except queue.Full:
                    self._warn("the service is too slow; some rows are dropped")

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Send what waits, and the files of the run; only for a moment if it was interrupted."""
        patience = PATIENCE if kind is None else INTERRUPTED
        end = time.monotonic() + patience
        sent = False
        while self.thread.is_alive() and time.monotonic() < end:
            with contextlib.suppress(queue.Full):
                if not sent:
                    self.rows.put(None, timeout=1)
                    sent = True
                self.thread.join(1)
        if self.thread.is_alive():
            self._warn(f"it did not take everything within {patience:.0f} s", then="")

    def _send(self) -> None:
        try:
            written = json.loads((self.folder / "config.json").read_text())
            service: Service = self.service(self.folder, written["options"] | written["config"])
            runs: dict[tuple[str, int], Any] = {}
            while (item := self.rows.get()) is not None:
                env_id, seed, step, row = item
                if (env_id, seed) not in runs:
                    runs[env_id, seed] = service.start(env_id, seed)
                service.log(runs[env_id, seed], step, row)
            files = [*self.folder.glob("*.png"), *self.folder.glob("*.py")]
            service.finish(list(runs.values()), files)
        except Exception as error:
            self._warn(f"{type(error).__name__}: {first_line(error)}")

    def _warn(self, reason: str, then: str = "; training continues") -> None:
        if not self.warned:
            print(f"warning: --track: {reason}{then}", file=sys.stderr)
        self.warned = True
