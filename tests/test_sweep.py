"""Splitting seeds into stacks, and jobs in parallel processes."""

import hashlib
import math
import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from lab.command_line import parse_args
from lab.training import loop, processes
from lab.training.job import Job, join_stacks, make_jobs, split_seeds
from lab.training.processes import run_jobs
from lab.training.ray_processes import difference, inspection, share

SAC = Path("agents/sac.py").read_text()
FAILURES = {
    "user": ("raise UserError('no luck; try another')", r"no luck; try another"),
    "exception": ("raise ZeroDivisionError('first\\nsecond')",
                  r".*\w\.py:\d+: ZeroDivisionError: first"),
    "exit": ("raise SystemExit", r".*\w\.py:\d+: SystemExit: "),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", r"its process ended with code -9"),
}


def make_job(folder, name, line="return {}", **settings):
    """A job of SAC whose update is `line` after 20 steps; it reports every 10 steps."""
    path = folder / f"{name}.py"
    path.write_text(f"""{SAC}

import os
import signal
import time
from pathlib import Path

from lab.errors import UserError


def patch(self):
    if self.transitions >= 20:
        {line}
    return {{"loss/qf": torch.zeros(len(self.generators))}}


Agent.update = patch
del Agent.hidden_activations
""")
    small = {"actor_width": 8, "qf_width": 8, "buffer_size": 100}
    return Job(**{"agent_path": str(path), "config": small, "env_id": "Pendulum-v1", "seeds": (0,),
                  "steps": 40, "eval_every": 1_000_000, "log_every": 10, "checkpoint_every": 0,
                  "eval_episodes": 1} | settings)


def saved_steps(job):
    return [int(re.match(r"step_(\d+)-", path.name)[1]) for path in job.checkpoints.glob("*.pt")]


# Shares


def cost(largest, shares, environments, processes):
    """Rounds of the processes times the size of the largest share."""
    return math.ceil(environments * shares / processes) * largest


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("environments", [1, 2, 3, 5])
def test_shares_cover_the_seeds_at_the_least_cost_in_the_fewest_stacks(environments, processes):
    for count in range(1, 25):
        seeds = range(100, 100 + count)
        shares = split_seeds(seeds, environments, processes)
        assert [seed for share in shares for seed in share] == list(seeds)
        assert all(shares)
        ours = cost(max(map(len, shares)), len(shares), environments, processes)
        costs = {n: cost(math.ceil(count / n), n, environments, processes)
                 for n in range(1, count + 1)}
        assert ours == min(costs.values())
        assert len(shares) == min(n for n in costs if costs[n] == ours)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("count, environments, processes, sizes", [
    (8, 1, 1, [8]), (8, 1, 2, [4, 4]), (8, 2, 2, [8]), (8, 4, 2, [8]), (8, 1, 16, [1] * 8),
    (3, 1, 2, [2, 1]), (8, 3, 2, [4, 4]), (1, 1, 4, [1])])
def test_shares_known_by_hand(count, environments, processes, sizes):
    assert [len(s) for s in split_seeds(range(count), environments, processes)] == sizes


def test_new_stacks_have_no_gaps(tmp_path):
    """The name of a stack's folder is its first and its last seed."""
    for name in ("stack_0_1", "stack_4_5"):
        (tmp_path / name).mkdir()
    assert join_stacks(parse_args([])[0], tmp_path, range(8), 1, 1) == [
        (0, 1), (4, 5), (2, 3), (6, 7)]


@pytest.mark.parametrize("gpus, jobs, expected", [
    (1, 1, 1.0), (1, 3, 0.3333), (4, 2, 1.0), (2, 3, 0.5), (8, 128, 0.0625), (3, 8, 0.3333)])
def test_every_gpu_of_a_cluster_gets_as_many_jobs(gpus, jobs, expected):
    """All of them fit."""
    part = share(gpus, jobs)
    assert part == expected and int(1 / part) * gpus >= jobs


HERE = {"python": "3.11.7", "torch": "2.13.0", "gymnasium": "1.4.0", "lab": "a", "agent": "b",
        "token": True}


@pytest.mark.parametrize("there, words", [
    ({}, ""), ({"python": "3.12.1"}, "has python 3.12.1, this machine 3.11.7: install the same"),
    ({"torch": None}, "has no torch, this machine 2.13.0: install"),
    ({"gymnasium": "1.2", "token": False}, "has gymnasium 1.2, this machine 1.4.0"),
    ({"token": False, "lab": None}, "does not see the folder runs: put it on storage that all"),
    ({"lab": None}, "has no lab/: put the checkout on storage that all"),
    ({"lab": "c"}, "has another lab/: put the checkout on storage that all"),
    ({"agent": None}, "does not see this mine.py: put it on"),
    ({"agent": "d"}, "does not see this mine.py: put it on")])
def test_what_keeps_a_node_of_a_cluster_from_training(there, words):
    told = difference(HERE, HERE | there, Path("mine.py"), Path("runs"))
    assert words in told and bool(words) == bool(told)


def test_a_cluster_s_nodes_are_asked_what_this_machine_has(tmp_path):
    look = inspection("agents/sac.py", str(tmp_path))
    assert look()["token"] and look()["torch"] == torch.__version__.split("+")[0]
    assert inspection("agents/ppo.py", str(tmp_path / "no"))() == {
        **look(), "agent": hashlib.sha256(Path("agents/ppo.py").read_bytes()).hexdigest(),
        "token": False}
    assert inspection("agents/none.py", "")()["agent"] is None


# One job, in this process


def test_one_job_runs_in_this_process(tmp_path):
    messages = []
    job = make_job(tmp_path, "mine")
    assert run_jobs([job], 4, lambda place, message: messages.append((place, message))) == {}
    assert {place for place, _ in messages} == {0}
    assert messages[0][1]["step"] == 0
    assert [message["step"] for _, message in messages if "rows" in message] == [10, 20, 30, 40]
    assert "return/eval" in messages[-1][1]["rows"][0]


def test_a_job_trains_the_agent_that_the_run_began_with(tmp_path):
    """A job that waits, or starts again, may find the file edited."""
    agent = tmp_path / "mine.py"
    agent.write_text(SAC)
    options, config = parse_args([str(agent), "--steps", "10", "--actor-width", "8"])
    [job] = make_jobs(options, config, 1, None)
    agent.write_text("edited")
    assert run_jobs([job], 1, lambda *_: None) == {}


@pytest.mark.parametrize("kind", ["user", "exception", "exit"])
def test_one_job_that_fails_is_reported(tmp_path, capsys, kind):
    line, reason = FAILURES[kind]
    failures = run_jobs([make_job(tmp_path, "mine", line)], 1, lambda *_: None)
    assert list(failures) == [0] and re.fullmatch(reason, failures[0])
    assert ("Traceback" in capsys.readouterr().err) == (kind != "user")


# Several jobs, each in a process of its own


@pytest.mark.slow
def test_jobs_report_and_fail_each_for_itself(tmp_path, capfd):
    """Two processes work through five jobs, of which four fail."""
    jobs = [make_job(tmp_path, kind, line) for kind, (line, _) in FAILURES.items()]
    jobs.append(make_job(tmp_path, "good", seeds=(3, 4)))
    rows, alive = {place: [] for place in range(5)}, []

    def report(place, message):
        alive.append(len(multiprocessing.active_children()))
        if "rows" in message:
            rows[place].append((message["step"], sorted(message["rows"])))

    failures = run_jobs(jobs, 2, report)
    assert sorted(failures) == [0, 1, 2, 3]
    for place, (_, reason) in enumerate(FAILURES.values()):
        assert re.fullmatch(reason, failures[place])
        assert rows[place] == [(10, [0]), (20, [0])]
    assert rows[4] == [(10, [3, 4]), (20, [3, 4]), (30, [3, 4]), (40, [3, 4])]
    assert max(alive) <= 2 and not multiprocessing.active_children()
    assert capfd.readouterr().err.count("Traceback") == 2, "of the unexpected exceptions"


@pytest.mark.slow
def test_a_killed_process_is_tried_again_from_its_checkpoint(tmp_path, monkeypatch):
    """One is killed once, the other whenever it gets to 20 steps."""
    monkeypatch.setattr(processes, "RETRIES", 1)
    once, always = tmp_path / "once", "os.kill(os.getpid(), signal.SIGKILL)"
    line = f"Path({str(once)!r}).exists() or (Path({str(once)!r}).touch(), {always})"
    jobs = [make_job(tmp_path, name, line, run=str(tmp_path / "run"), checkpoint_every=10)
            for name, line in (("once", line), ("always", always))]
    messages = {0: [], 1: []}
    failures = run_jobs(jobs, 2, lambda place, message: messages[place].append(message))
    assert failures == {1: "its process ended with code -9"}
    told = {place: [message.get("warning", message.get("step")) for message in all_of_it
                    if "warning" in message or "rows" in message]
            for place, all_of_it in messages.items()}
    again = "its process ended with code -9; restarting"
    assert told == {0: [10, 20, again, 30, 40], 1: [10, 20, again]}


@pytest.mark.slow
def test_an_interrupted_sweep_leaves_checkpoints_and_no_processes(tmp_path):
    endless = {"steps": 1_000_000, "run": str(tmp_path), "log_every": 10}
    jobs = [make_job(tmp_path, "mine", seeds=seeds, **endless) for seeds in ((0,), (1, 2))]
    for job in jobs:
        assert not job.checkpoints.exists()
    reached, children = {}, []

    def report(place, message):
        reached[place] = message["step"]
        if len(reached) == 2 and all(reached.values()):
            children.extend(multiprocessing.active_children())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, 2, report)
    assert len(children) == 2 and not any(child.is_alive() for child in children)
    for place, job in enumerate(jobs):
        [step] = saved_steps(job)
        assert reached[place] <= step < job.steps


def saves_when_told_to_end(job, emit):
    with loop.Interrupts() as interrupts:
        emit({"step": 1})
        if interrupts.received:
            Path(job.run).touch()


def test_a_job_whose_parent_is_gone_writes_its_checkpoint(tmp_path):
    """The signal of its parent's end may come after the first message that nobody takes."""
    job = Job("agents/sac.py", {}, "Pendulum-v1", (0,), 1, 1, 1, 1, run=str(tmp_path / "saved"))
    ours, theirs = multiprocessing.Pipe()

    def train():
        ours.close()  # the fork's copy
        processes._child(theirs, os.getppid(), saves_when_told_to_end)

    child = multiprocessing.get_context("fork").Process(target=train)
    ours.send(job)
    child.start()
    theirs.close()
    ours.close()
    child.join(60)
    assert (tmp_path / "saved").exists() and child.exitcode == -signal.SIGTERM


def test_a_process_that_does_not_end_is_killed_and_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "END_SECONDS", 0.5)
    amid = tmp_path / "amid"
    job = make_job(tmp_path, "mine", f"Path({str(amid)!r}).touch(); time.sleep(100)")

    def report(place, message):
        while message["step"] == 10 and not amid.exists():
            assert multiprocessing.active_children(), "it ended early"
            time.sleep(0.01)
        if amid.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs([job, job], 1, report)
    assert "did not end its step in 0 s and was killed" in capsys.readouterr().err
    assert not multiprocessing.active_children()


def test_ctrl_c_in_a_terminal_leaves_checkpoints(tmp_path):
    """The terminal signals parent and child alike; the child is amid a step that lasts."""
    line = f"Path({str(tmp_path / 'amid')!r}).touch(); time.sleep(1)"
    job = make_job(tmp_path, "mine", line, steps=1000, run=str(tmp_path))

    def report(place, message):
        if message["step"] == 20:
            [child] = multiprocessing.active_children()
            while child.is_alive() and not (tmp_path / "amid").exists():
                time.sleep(0.01)
            os.kill(child.pid, signal.SIGINT)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_jobs([job, job], 1, report)
    assert len(saved_steps(job)) == 1
