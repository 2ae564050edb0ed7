"""--engine ray, on a cluster of two one-CPU nodes. Skipped without ray; .ci/run installs it."""

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from lab import train
from lab.accelerate import physical_cores
from lab.command_line import parse_args
from lab.options import Tune
from lab.training import checkpoint, processes, ray_processes
from lab.training.processes import run_jobs
from lab.tuning import confirm
from lab.tuning import run as study_run
from tests.conftest import same
from tests.faults.test_killed_runs import numbers, start
from tests.test_study import SPACE, trials
from tests.test_sweep import make_job

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow
SMALL = ["--batch-size", "16", "--actor-width", "16", "--qf-width", "16", "--eval-episodes", "1"]
RUN = [*SMALL, "--seeds", "2", "--steps", "600", "--checkpoint-every", "100", "--log"]
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}
NOTICE = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500,
          "health_check_failure_threshold": 4}  # dead nodes, soon
ENDLESS = 10**9


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Its nodes start in another folder than the driver."""
    from ray.cluster_utils import Cluster

    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        cluster = Cluster(initialize_head=True, head_node_args={
            **NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": NOTICE})
        for _ in range(2):
            cluster.add_node(**NODE)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def engine(cluster):
    options, _ = parse_args(on(cluster))
    with ray_processes.open_engine(options, None) as engine:
        yield engine


def on(cluster):
    return ["--engine", "ray", "--address", cluster.address]


class Brake:
    """An agent file, and a file with the step from which the agent is slow."""

    def __init__(self, folder):
        self.path, self.file = folder / "mine.py", folder / "slow_from"
        self.path.write_text(Path("agents/sac.py").read_text() + f"""
import time
from pathlib import Path

update = Agent.update


def slow(self):
    if self.transitions > int(Path({str(self.file)!r}).read_text()):
        time.sleep(0.1)
    return update(self)


Agent.update = slow
""")

    def slow_from(self, step):
        self.file.write_text(str(step))


@pytest.fixture
def when(monkeypatch):
    """when(step, do): call `do` as soon as both jobs of the next run have told that step."""
    def set_up(step, do):
        reached, update = set(), train.SweepProgress.update

        def patched(self, index, message):
            update(self, index, message)
            if message.get("step", 0) >= step and len(reached) < 2:
                reached.add(index)
                if len(reached) == 2:
                    do()

        with_update.setattr(train.SweepProgress, "update", patched)

    with monkeypatch.context() as with_update:
        yield set_up


def only(folder):
    (found,) = folder.iterdir()
    return found


def saved(folder):
    """The last step of each stack's checkpoints."""
    return [max(int(path.name[5:17]) for path in stack.glob("*.pt"))
            for stack in folder.glob("*/*/stack_*")]


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def test_a_run_that_is_interrupted_twice_and_loses_a_node_ends_as_a_local_one(
        cluster, tmp_path, when, capfd):
    brake, folder = Brake(tmp_path), tmp_path / "ray"
    common = [str(brake.path), *RUN, "--processes", "2"]
    brake.slow_from(ENDLESS)
    assert train.run([*common, "--runs", str(tmp_path / "local")]) == 0

    def interrupt(number):
        return lambda: os.kill(os.getpid(), number)

    brake.slow_from(200)
    when(200, interrupt(signal.SIGTERM))
    ray_run = [*common, "--runs", str(folder), *on(cluster)]
    assert train.run(ray_run) == 128 + signal.SIGTERM
    run = only(folder)
    assert len(saved(run)) == 2 and min(saved(run)) >= 200
    assert not ray.is_initialized()

    again = ["--resume", str(run), *on(cluster)]
    brake.slow_from(350)
    when(350, interrupt(signal.SIGINT))
    assert train.run(again) == 128 + signal.SIGINT
    assert min(saved(run)) >= 350

    def lose_node():
        cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)
        brake.slow_from(ENDLESS)

    brake.slow_from(450)
    when(450, lose_node)
    capfd.readouterr()
    try:
        assert train.run(again) == 0
    finally:
        cluster.add_node(**NODE)
    assert "its node died on" in capfd.readouterr().out
    rows, states = numbers(only(tmp_path / "local"))
    rows_again, states_again = numbers(run)
    assert rows == rows_again and all(rows.values()) and len(states) == 2
    for stack, state in states.items():
        assert all(same(value, states_again[stack][key]) for key, value in state.items())


def test_a_study_whose_driver_is_killed_goes_on_as_a_local_one(cluster, tmp_path, monkeypatch):
    argv = [*SMALL, *SPACE[:2], "--seeds", "1", "--steps", "100", "--trials", "3", "--workers", "1",
            "--confirm-seeds", "1", "--name", "mine"]
    with monkeypatch.context() as patch:
        patch.setattr(confirm, "train", lambda *_: confirm.Failures([], []))
        patch.setattr(confirm, "show", lambda *_, finished: None)
        local = [*argv, "--runs", str(tmp_path / "local")]
        assert train.run(local, Tune, study_run.tune) == 0

    argv += ["--runs", str(tmp_path / "ray"), *on(cluster)]
    journal = tmp_path / "ray/studies/mine/trials.jsonl"
    driver = start("hypertune.py", *argv)
    wait_for(lambda: journal.exists() and '"trial": 1' in journal.read_text(), driver)
    driver.kill()
    driver.communicate()
    for stack in journal.parent.glob("trials/*/*/*/stack_*"):
        with checkpoint.lock(stack):
            pass  # its job has ended
    before = journal.read_text()
    assert before.count('"completed"') == 1

    monkeypatch.setattr(study_run, "TOP", 1)
    assert train.run(argv, Tune, study_run.tune) == 0
    assert trials(tmp_path / "ray") == trials(tmp_path / "local")
    new = [json.loads(line) for line in journal.read_text()[len(before):].splitlines()]
    assert {event["trial"] for event in new} == {1, 2}, "a finished trial trained again"
    best = json.loads((journal.parent / "best.json").read_text())
    assert len(best["study"]["confirmed"]) == 1


def test_a_job_whose_worker_dies_is_tried_again_on_the_other_node(engine, tmp_path, monkeypatch):
    """One is killed once, one always, one is refused."""
    monkeypatch.setattr(processes, "RETRIES", 1)
    once, kill = tmp_path / "once", "os.kill(os.getpid(), signal.SIGKILL)"
    lines = {
        "once": f"Path({str(once)!r}).exists() or (Path({str(once)!r}).touch(), {kill})",
        "always": kill, "refused": "raise UserError('no luck')"}
    node = "__import__('ray').get_runtime_context().get_node_id()"
    jobs = [make_job(tmp_path, name, f"Path({str(tmp_path)!r}, '{name}-' + {node}).touch(); {line}",
                     run=str(tmp_path / "run"), checkpoint_every=10)
            for name, line in lines.items()]
    told = {index: [] for index in range(3)}
    failures = run_jobs(jobs, 2, lambda index, message: told[index].append(message), engine)
    assert failures.keys() == {1, 2} and failures[2] == "no luck"
    assert failures[1].startswith("its worker died on ")
    assert [len([*tmp_path.glob(f"{name}-*")]) for name in lines] == [2, 2, 1], "nodes"
    steps = [message["step"] for message in told[0] if "rows" in message]
    assert steps == [10, 20, 30, 40]
    (warning,) = [message["warning"] for message in told[0] if "warning" in message]
    assert warning.startswith("its worker died on ") and warning.endswith("; restarting")


def test_a_job_that_does_not_end_is_killed_and_named(engine, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(processes, "END_SECONDS", 0.5)
    amid, after = tmp_path / "amid", tmp_path / "after"
    job = make_job(tmp_path, "mine", f"Path({str(amid)!r}).touch(); time.sleep(5); "
                                     f"Path({str(after)!r}).touch()")

    def report(index, message):
        while message.get("step") == 10 and not amid.exists():
            time.sleep(0.01)
        if amid.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs([job], 1, report, engine)
    assert "did not end its step in 0 s and was killed" in capfd.readouterr().err
    time.sleep(6)
    assert not after.exists()


def test_without_an_address_a_cluster_is_started_for_the_run_and_stopped(tmp_path, monkeypatch):
    """One job too runs there."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    argv = [*SMALL, "--steps", "30", "--log", "--runs", str(tmp_path), "--engine", "ray"]
    assert train.run(argv) == 0 and not ray.is_initialized()
    settings = json.loads((only(tmp_path) / "config.json").read_text())["options"]
    assert (settings["engine"], settings["processes"]) == ("ray", physical_cores())


# Bad input


@pytest.mark.parametrize("flags, words", [
    ("--cuda", "has no node with a CPU and a GPU for a job"),
    ("--log --runs /proc/self/cwd/unshared", "does not see the folder /proc/self/cwd/unshared: put "
     "it on storage that all nodes share, or choose another with --runs"),
    ("/proc/self/cwd/agents/sac.py", "does not see this /proc/self/cwd/agents/sac.py"),
    ("--address 127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1; start one with"),
    ("--address ray://127.0.0.1:1", "--address takes HOST:PORT of a Ray cluster, not ray://"),
    ("--address nowhere", "--address takes HOST:PORT of a Ray cluster, not nowhere"),
])
def test_what_does_not_fit_the_cluster_is_one_line(cluster, capsys, monkeypatch, flags, words):
    """/proc/self/cwd is another folder for each process."""
    monkeypatch.setattr(ray_processes, "ANSWER_SECONDS", 2)
    before = sorted(Path().iterdir())
    assert train.run([*SMALL, *on(cluster), *flags.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and err.count("\n") == 1
    assert sorted(Path().iterdir()) == before and not ray.is_initialized()


def test_a_node_with_other_versions_or_another_lab_is_named(cluster, tmp_path, capsys):
    other = tmp_path / "gymnasium-0.1.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Name: gymnasium\nVersion: 0.1\n")
    node = cluster.add_node(**NODE, env_vars={"PYTHONPATH": str(tmp_path)})
    try:
        assert train.run([*SMALL, *on(cluster)]) == 2
    finally:
        cluster.remove_node(node)
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: node \S+ \(\S+\) has gymnasium 0.1, this machine \d\S+: "
                        r"install the same version\n", err)
