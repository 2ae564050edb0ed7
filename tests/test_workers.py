"""Worker processes: what they share, the order of steps, and what happens when a worker or the main
process is killed, stopped or raises."""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lab.agent import load_agent
from lab.envs import pool
from lab.envs.make import make_envs
from lab.envs.pool import WorkerError
from lab.errors import UserError
from lab.training import checkpoint
from lab.training.job import Job
from lab.training.loop import train
from lab.training.recorder import read_metrics
from tests.conftest import runs, small_config
from tests.probe_envs import EXITS, KILLED, RAISES, SLEEPS

DIARY, FAULTY = "tests.probe_envs:lab-tests/Diary-v0", "tests.probe_envs:lab-tests/Faulty-v0"
STEP = 1  # the place in a Diary's observation
SAC = Path("agents/sac.py").resolve()
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


@pytest.fixture
def make():
    """Stacks with two workers beside this process; what a test leaves behind is an error."""
    made = []

    def make(env_id=FAULTY, seeds=(0,), num_envs=3, **settings):
        made.append(make_envs(env_id, seeds, num_envs, "workers", **{"workers": 3} | settings))
        return made[-1]

    yield make
    for stack in made:
        stack.close()
    assert multiprocessing.active_children() == []


def act(*actions):
    """Of one seed; this process's environment comes first."""
    return torch.tensor([[[1.0], *([a] for a in actions)]])


def pids_of(stack):
    return [process.pid for process in stack.processes]


def await_end(pids, seconds=20):
    """-> those that still run then: on an idle machine no time at all would do."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(runs, pids)):
        time.sleep(0.05)
    return [pid for pid in pids if runs(pid)]


def fails(pids, number, words, env_id=FAULTY):
    """The error names the environment, the worker and its process; then no process is left."""
    message = (f"{env_id}: environment worker {number} of {len(pids)} "
               f"(process {pids[number - 1]}) {words}")
    return pytest.raises(WorkerError, match=f"^{re.escape(message)}$")


def gone(pids):
    return not any(map(runs, pids)) and multiprocessing.active_children() == []


# Steps


@pytest.mark.parametrize("layout, parts", [
    ({"num_envs": 5, "groups": 2}, [2, 3]), ({"num_envs": 3, "groups": 3, "workers": 1}, [1] * 3),
    ({"num_envs": 2, "groups": 7}, [1, 1])])
def test_the_groups_are_neighbours_of_about_one_size(make, layout, parts):
    stack = make(DIARY, [3, 4], **layout)
    places = [list(range(stack.shape[1]))[group] for group in stack.groups]
    assert list(itertools.chain(*places)) == list(range(stack.shape[1]))
    assert sorted(map(len, places)) == parts


def test_there_are_no_more_workers_than_environments(make):
    assert len(make(DIARY, [0], 2, workers=9).processes) == 1


def test_a_group_steps_while_the_next_is_acted_on(make):
    stack = make(DIARY, [0, 1], 2, groups=2)
    obs, parts = stack.reset(), []

    def act_late(part):
        deadline = time.monotonic() + 60
        while parts and time.monotonic() < deadline:  # until the first group has stepped
            if (stack.rows[:2, STEP] == 1).all():
                break
        assert (stack.rows[:, STEP] == 1).tolist() == [bool(parts)] * 2 + [False] * 2
        parts.append(part)
        return torch.ones(2, 1, 1)

    stack.act_and_send(act_late, obs)
    assert len(parts) == 2
    assert (stack.receive().next_obs[..., STEP] == 1).all()


def test_a_reset_waits_for_a_step_that_has_begun(make):
    stack = make(DIARY, [0, 1], 2, groups=2)
    first = stack.reset()
    stack.send(torch.ones(2, 1, 1), 0)
    stack.send(torch.ones(2, 1, 1), 1)
    assert torch.equal(stack.reset(), first)
    stack.send(torch.ones(2, 1, 1), 1)
    assert torch.equal(stack.reset(), first)
    assert (stack.step(torch.ones(2, 2, 1)).next_obs[..., STEP] == 1).all()


@linux
def test_a_worker_does_not_import_torch(make):
    for pid in pids_of(make(DIARY)):
        assert "numpy" in (maps := Path(f"/proc/{pid}/maps").read_text())
        assert "libtorch" not in maps


def test_the_environments_alone_do_not_import_torch():
    code = "import sys, lab.envs.worker, tests.probe_envs; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout == "False\n"


# An environment breaks


def test_an_environment_that_breaks_in_this_process_is_named_with_the_reason(make):
    stack = make()
    stack.reset()
    pids = pids_of(stack)
    with pytest.raises(WorkerError, match=f"^{FAULTY} failed: ZeroDivisionError: the motor burns$"):
        stack.step(torch.tensor([[[RAISES], [1.0], [1.0]]]))
    assert gone(pids)


# A worker breaks


@pytest.mark.parametrize("waits", [False, True])
def test_a_worker_killed_between_steps_is_named(make, waits):
    stack = make()
    stack.reset()
    stack.step(act(1.0, 1.0))
    pids = pids_of(stack)
    os.kill(pids[1], signal.SIGKILL)
    if waits:
        stack.processes[1].join()
    with fails(pids, 2, "died by signal 9"):
        stack.step(act(1.0, 1.0))
    assert gone(pids)


@pytest.mark.parametrize("actions, number, words", [
    ((KILLED, 1.0), 1, "died by signal 9"), ((1.0, KILLED), 2, "died by signal 9"),
    ((1.0, EXITS), 2, "died with exit code 3"),
    ((RAISES, 1.0), 1, "failed: ZeroDivisionError: the motor burns")])
def test_a_worker_that_breaks_in_a_step_is_named_with_the_reason(make, actions, number, words):
    stack = make()
    stack.reset()
    pids = pids_of(stack)
    with fails(pids, number, words):
        stack.step(act(*actions))
    assert gone(pids)


def test_a_worker_that_breaks_in_one_group_is_named_after_both_were_sent(make):
    """The answer to the first group comes before the error."""
    stack = make(num_envs=4, workers=2, groups=2)
    stack.reset()
    pids = pids_of(stack)
    os.kill(pids[0], signal.SIGSTOP)  # so that both commands are there when it goes on
    stack.send(act(1.0), 0)
    stack.send(act(RAISES), 1)
    os.kill(pids[0], signal.SIGCONT)
    with fails(pids, 1, "failed: ZeroDivisionError: the motor burns"):
        stack.receive()
    assert gone(pids)


def test_a_worker_that_broke_before_the_next_send_is_named_with_the_reason(make):
    stack = make(num_envs=4, workers=2, groups=2)
    stack.reset()
    pids = pids_of(stack)
    stack.send(act(RAISES), 0)
    stack.processes[0].join()
    with fails(pids, 1, "failed: ZeroDivisionError: the motor burns"):
        stack.send(act(1.0), 1)
        stack.receive()


def test_a_stopped_worker_is_a_timeout(make, monkeypatch):
    stack = make()
    stack.reset()
    pids = pids_of(stack)
    monkeypatch.setattr(pool, "STEP_SECONDS", 1.0)
    os.kill(pids[0], signal.SIGSTOP)
    with fails(pids, 1, "did not finish a step within 1 s"):
        stack.step(act(1.0, 1.0))
    assert gone(pids)


def test_a_step_that_does_not_end_is_a_timeout(make, monkeypatch):
    monkeypatch.setattr(pool, "STEP_SECONDS", 1.0)
    stack = make()
    stack.reset()
    pids = pids_of(stack)
    with fails(pids, 1, "did not finish a step within 1 s"):
        stack.step(act(SLEEPS, 1.0))
    assert gone(pids)


def test_a_worker_stopped_before_a_reset_is_a_timeout(make, monkeypatch):
    monkeypatch.setattr(pool, "STEP_SECONDS", 600.0)
    stack = make(workers=2)
    pids = pids_of(stack)
    monkeypatch.setattr(pool, "START_SECONDS", 1.0)
    os.kill(pids[0], signal.SIGSTOP)
    with fails(pids, 1, "did not finish a reset within 1 s"):
        stack.reset()
    assert gone(pids)


def test_a_worker_that_does_not_start_is_a_timeout(make, monkeypatch):
    monkeypatch.setattr(pool, "START_SECONDS", 0.01)  # sooner than an interpreter starts
    with pytest.raises(WorkerError, match=r"worker 1 of 2 \(process \d+\) did not finish a "
                       "start within 0 s$"):
        make()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("env_id, words", [
    ("tests.probe_envs:lab-tests/OnlyInTheMainProcess-v0",
     r"failed: cannot make environment .*probe_envs.py:\d+: RuntimeError: no licence"),
    ("lab-tests/Diary-v0", "failed: cannot make environment 'lab-tests/Diary-v0'")])
def test_an_environment_that_a_worker_cannot_make_is_an_error_with_its_reason(make, env_id, words):
    """The second is registered in this process alone."""
    with pytest.raises(WorkerError, match=rf"worker 1 of 2 \(process \d+\) {words}") as caught:
        make(env_id)
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)
    assert multiprocessing.active_children() == []


def test_workers_are_deaf_to_interrupts(make):
    """Ctrl-C goes to the whole group of processes, and the main one wants to finish its step."""
    stack = make()
    stack.reset()
    for pid in pids_of(stack):
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    for step in (1, 2):
        assert (stack.step(act(1.0, 1.0)).next_obs[..., STEP] == step).all()


# The end


def test_closing_leaves_no_process_and_closing_twice_is_fine(make, monkeypatch):
    stack = make(DIARY, groups=2)
    stack.reset()
    stack.send(act(1.0))  # a step that nobody waits for
    pids, processes = pids_of(stack), list(stack.processes)
    assert all(map(runs, pids)) and len(pids) == 2
    for process in processes:  # however slow the machine, none is killed
        join = functools.partial(multiprocessing.process.BaseProcess.join, process, 60)
        monkeypatch.setattr(process, "join", lambda *seconds, join=join: join())
    stack.close()
    assert gone(pids)
    assert [process.exitcode for process in processes] == [0, 0], "they ended by themselves"
    stack.close()


@contextlib.contextmanager
def running(script):
    """A process in a group of its own -> it and its workers, whose numbers it prints. At the end
    the whole group is killed, whatever a test has found."""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        pids = [int(word) for word in line.split()]
        assert len(pids) == 2 and all(map(runs, pids))
        yield process, pids
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


MAKES = f"""
import time
import torch
from lab.agent import load_agent
from lab.envs import pool
from lab.envs.make import make_envs
from lab.training import checkpoint
stacks = [make_envs({FAULTY!r}, [0], 2, "workers", workers=2) for _ in range(2)]
for stack in stacks:
    stack.reset()
    stack.step(torch.ones(1, 2, 1))
"""
PRINTS = """
print(*(stack.processes[0].pid for stack in stacks), flush=True)
"""


@linux
def test_workers_end_when_the_main_process_is_killed():
    """One waits, one is in the middle of a step."""
    sends = f"stack.send(torch.tensor([[[1.0], [{SLEEPS}]]]))"
    with running(MAKES + sends + PRINTS + "time.sleep(600)") as (process, pids):
        process.kill()
        process.wait()
        assert await_end(pids) == []


def test_a_program_that_does_not_close_its_workers_ends_all_the_same():
    with running(MAKES + PRINTS) as (process, pids):
        assert process.wait(60) == 0 and await_end(pids) == []


# Training


def make_job(folder, **settings):
    small = small_config(load_agent(SAC), buffer_size=40)
    return Job(**{"agent_path": str(SAC), "config": dataclasses.asdict(small), "env_id": DIARY,
                  "seeds": (0, 1), "steps": 100, "eval_every": 50, "log_every": 10,
                  "checkpoint_every": 0, "eval_episodes": 1, "num_envs": 2, "backend": "workers",
                  "workers": 3, "run": str(folder)} | settings)


@pytest.mark.parametrize("groups", [1, 2])
def test_training_whose_worker_is_killed_leaves_a_checkpoint_and_goes_on_from_it(tmp_path, groups):
    job, pids = make_job(tmp_path, groups=groups, checkpoint_every=40), []

    def kill_at_50(message):
        if message["step"] == 50 and "rows" in message:
            children = multiprocessing.active_children()
            pids.extend(child.pid for child in children)
            children[0].kill()
            children[0].join()

    with pytest.raises(WorkerError, match=r"environment worker \d of 2 .* died by signal 9"):
        train(job, kill_at_50)
    assert len(pids) == 2 and gone(pids)
    state = checkpoint.load_latest(job.checkpoints)
    assert state["step"] == state["agent"]["transitions"] == 40
    messages = []
    train(job, messages.append)
    assert messages[0]["step"] == 40 and messages[-1]["step"] == 100
    assert checkpoint.load_latest(job.checkpoints)["agent"]["transitions"] == 100
    for seed in job.seeds:
        rows = read_metrics(job.group / f"seed_{seed}" / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(10, 101, 10))
    assert multiprocessing.active_children() == []


def test_training_that_cannot_begin_leaves_no_worker(tmp_path):
    with pytest.raises(UserError, match="no agent file"):
        train(make_job(tmp_path, agent_path="agents/missing.py"), print)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_an_interrupt_of_the_whole_group_leaves_a_checkpoint_and_no_orphan(tmp_path):
    job = make_job(tmp_path, steps=10_000_000, eval_every=10_000_000)
    script = f"""
import multiprocessing
from lab.training.job import Job
from lab.training.loop import train

def emit(message):
    if message["step"] == 40:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)

train({job!r}, emit)
"""
    with running(script) as (process, pids):
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        assert process.returncode == -signal.SIGINT
        assert await_end(pids) == []
    state = checkpoint.load_latest(job.checkpoints)
    assert state["step"] == state["agent"]["transitions"] >= 40
    messages = []
    train(dataclasses.replace(job, steps=state["step"] + 10), messages.append)
    assert messages[0]["step"] == state["step"]
