"""--track: rows on their way to a tracking service. Real services only where they are installed."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from types import SimpleNamespace

import pytest

from lab import tracking, train
from lab.training.job import Job
from lab.training.recorder import read_metrics

TINY = ["--steps", "120", "--actor-width", "8", "--qf-width", "8", "--batch-size", "8",
        "--eval-episodes", "1", "--log-every", "40", "--seeds", "2", "--processes", "1", "--log"]
JOB = Job("agents/sac.py", {}, "Pendulum-v1", (0,), 10, 10, 10, None)


class Fake:
    """Keeps what it is sent."""

    made = []

    def __init__(self, folder, settings):
        self.folder, self.settings, self.sent, self.files = folder, settings, {}, None
        self.made.append(self)

    def start(self, env_id, seed):
        return env_id, seed

    def log(self, run, step, row):
        self.sent.setdefault(run, []).append((step, row))

    def finish(self, runs, files):
        self.files = sorted(path.name for path in files)


class Broken(Fake):
    def log(self, run, step, row):
        raise ConnectionError("no answer\nfrom it")


class Stuck(Fake):
    go: threading.Event  # of the test

    def log(self, run, step, row):
        self.go.wait(30)


def run(tmp_path, monkeypatch, service):
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setitem(tracking.SERVICES, "mlflow", service)
    monkeypatch.setattr(tracking, "check", lambda service: None)
    assert train.run([*TINY, "--track", "mlflow", "--runs", str(tmp_path)]) == 0
    [folder] = tmp_path.iterdir()
    return folder


def rows(folder, seed):
    return [(row["step"], {tag: value for tag, value in row.items() if tag not in
                           ("step", "wall_time")})
            for row in read_metrics(folder / f"Pendulum-v1/sac/seed_{seed}/metrics.jsonl")]


def test_every_row_of_every_seed_arrives_with_settings_and_files(tmp_path, monkeypatch):
    folder = run(tmp_path, monkeypatch, Fake)
    [service] = Fake.made
    assert service.folder == folder and service.settings["actor_width"] == 8
    assert service.settings["steps"] == 120
    assert service.sent == {("Pendulum-v1", seed): rows(folder, seed) for seed in (0, 1)}
    assert service.files == ["learning_curves.png", "sac.py"]


def test_a_service_that_fails_costs_one_warning(tmp_path, monkeypatch, capsys):
    folder = run(tmp_path, monkeypatch, Broken)
    assert rows(folder, 0)[-1][0] == 120
    assert capsys.readouterr().err.count("warning: --track: ConnectionError: no answer; tr") == 1


def test_a_slow_service_holds_nothing_up(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "WAITING", 5)
    monkeypatch.setattr(tracking, "PATIENCE", 0.1)
    (tmp_path / "config.json").write_text('{"options": {}, "config": {}}')
    with tracking.tracked("slow", None) as none:
        assert none is None, "no run folder, nothing to track"
    monkeypatch.setattr(Stuck, "go", threading.Event(), raising=False)
    monkeypatch.setitem(tracking.SERVICES, "slow", Stuck)
    with tracking.tracked("slow", tmp_path) as tracker:
        for step in range(100):
            tracker.receive(JOB, {"step": step, "rows": {0: {"x": 1.0}}})
    Stuck.go.set()
    assert capsys.readouterr().err == (
        "warning: --track: the service is too slow; some rows are dropped; training continues\n")


def test_a_service_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    assert train.run([*TINY, "--track", "wandb", "--runs", str(tmp_path)]) == 2
    assert "--track wandb needs a package: pip install wandb" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_tracking_needs_a_run_folder(capsys):
    assert train.run(["--track", "mlflow"]) == 2
    assert "--track sends what a run folder has: give --log, too" in capsys.readouterr().err


def test_mlflow_gets_a_run_a_seed_and_a_resumed_run_goes_on_in_it(tmp_path, monkeypatch, capsys):
    mlflow = pytest.importorskip("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    server = subprocess.Popen([
        sys.executable, "-m", "mlflow", "server", "--port", address.rpartition(":")[2],
        "--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db",
        "--artifacts-destination", str(tmp_path / "artifacts")], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health")
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.2)
        else:
            pytest.fail("the server does not answer")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        assert train.run([*TINY, "--track", "mlflow", "--runs", str(tmp_path / "runs")]) == 0
        [folder] = (tmp_path / "runs").iterdir()
        assert train.run(["--resume", str(folder)]) == 0
        client = mlflow.MlflowClient(address)
        experiment = client.get_experiment_by_name(tracking.PROJECT).experiment_id
        found = {each.info.run_name: each for each in client.search_runs([experiment])}
        group = found.pop(folder.name)
        assert [path.path for path in client.list_artifacts(group.info.run_id)] == [
            "learning_curves.png", "sac.py"]
        assert set(found) == {f"{folder.name} Pendulum-v1 seed {seed}" for seed in (0, 1)}
        for seed in (0, 1):
            each = found[f"{folder.name} Pendulum-v1 seed {seed}"]
            assert each.info.status == "FINISHED" and each.data.params["actor_width"] == "8"
            assert each.data.tags["mlflow.parentRunId"] == group.info.run_id
            returns = client.get_metric_history(each.info.run_id, "return/eval")
            assert [(one.step, one.value) for one in returns] == [
                (step, row["return/eval"]) for step, row in rows(folder, seed)
                if "return/eval" in row]
        assert "--track" not in capsys.readouterr().err
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def log_records(data):
    """The whole records of a LevelDB log, whose first block begins with 7 bytes of W&B's own."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:  # the end of a block is left empty
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4:at + 6], "little"), data[at + 6]
        if at + 7 + size > len(data):  # still being written
            return
        record += data[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part of one
            yield record
            record = b""


def test_a_service_that_hangs_holds_ctrl_c_only_for_a_moment(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "INTERRUPTED", 0.1)
    (tmp_path / "config.json").write_text('{"options": {}, "config": {}}')
    monkeypatch.setattr(Stuck, "go", threading.Event(), raising=False)
    monkeypatch.setitem(tracking.SERVICES, "slow", Stuck)
    with pytest.raises(KeyboardInterrupt), tracking.tracked("slow", tmp_path) as tracker:
        tracker.receive(JOB, {"step": 1, "rows": {0: {"x": 1.0}}})
        raise KeyboardInterrupt
    Stuck.go.set()
    assert capsys.readouterr().err == (
        "warning: --track: it did not take everything within 0 s\n")


def test_wandb_takes_the_id_of_a_run_in_any_environment(tmp_path, monkeypatch):
    """Its ids have no / \\ # ? % :, which an environment of one's own has."""
    ids = []

    def init(id, **settings):
        ids.append(id)
        return SimpleNamespace(define_metric=lambda *_, **__: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict))
    service = tracking.WandB(tmp_path / "sac-1", {})
    for env_id in ("Ant-v4", "torch/Pendulum-v1", "my.envs:mine/Hop-v0", "A%?#\\é-v0"):
        service.start(env_id, 3)
    assert ids == ["sac-1-Ant-v4-seed-3", "sac-1-torch-Pendulum-v1-seed-3",
                   "sac-1-my.envs-mine-Hop-v0-seed-3", "sac-1-A------v0-seed-3"]


def test_wandb_writes_a_run_a_seed_when_offline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train.run([*TINY, "--track", "wandb", "--runs", str(tmp_path)]) == 0
    assert "--track" not in capsys.readouterr().err
    [folder] = tmp_path.iterdir()
    for seed in (0, 1):
        [path] = folder.glob(f"wandb/offline-run-*-seed-{seed}/*.wandb")
        for _ in range(300):  # its service writes the file
            records = [Record.FromString(data) for data in log_records(path.read_bytes())]
            if records and records[-1].HasField("exit"):
                break
            time.sleep(0.1)
        else:
            pytest.fail(f"{path} has no end")
        history, group, settings = [], "", {}
        for record in records:
            if record.HasField("run"):
                group = record.run.run_group
                settings |= {item.key: item.value_json for item in record.run.config.update}
            if record.HasField("history"):
                row = {item.key or "/".join(item.nested_key): item.value_json
                       for item in record.history.item}
                history.append((int(row["step"]), {tag: float(value) for tag, value in row.items()
                                                   if tag != "step" and tag[0] != "_"}))
        assert group == folder.name and settings["actor_width"] == "8"
        assert history == rows(folder, seed)
