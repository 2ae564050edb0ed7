"""Faults 2, 5, 6 and 11, in real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lab.training import checkpoint
from lab.training.recorder import read_metrics
from tests.conftest import runs

SMALL = ["--batch-size", "8", "--learning-starts", "20", "--qf-width", "8", "--actor-width", "8",
         "--eval-episodes", "1"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def train(folder, *argv, steps="100_000"):
    return subprocess.Popen(
        [sys.executable, "learn_simple.py", "--env", "Pendulum-v1", "--steps", steps, "--log",
         "--runs", str(folder), "--log-every", "50", *SMALL, *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(process, condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def logged(folder, seeds=1):
    """Whether each of the seeds has a row."""
    return len([1 for path in folder.glob("*/*/sac/seed_*/metrics.jsonl")
                if read_metrics(path)]) == seeds


def children_of(process):
    out = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True,
                         text=True).stdout
    return [int(word) for word in out.split()]


def test_killed_between_write_and_rename_the_checkpoint_before_is_there(tmp_path):
    """Fault 2."""
    script = f"""
import os, signal
from pathlib import Path
import torch
from lab.training import checkpoint

checkpoint.BLOCK = 1024
folder, state = Path({str(tmp_path)!r}), {{"rows": torch.arange(1000.0)}}
checkpoint.save(folder, 1, state)
replace = os.replace

def kill_at_the_last(source, target):
    if str(target).endswith(".pt"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = kill_at_the_last
checkpoint.save(folder, 2, {{"rows": -state["rows"]}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    assert checkpoint.load_latest(tmp_path)["rows"][1] == 1


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_no_process(tmp_path, number, code):
    """Fault 5: a sweep of two processes, as a terminal or a scheduler ends it."""
    process = train(tmp_path, "--seeds", "2", "--processes", "2", "--checkpoint-every", "0")
    wait_for(process, lambda: logged(tmp_path, 2))
    children = children_of(process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err
    stacks = list(tmp_path.glob("*/*/sac/stack_*"))
    assert len(stacks) == 2 and all(checkpoint.load_latest(stack)["step"] for stack in stacks)
    assert len(children) >= 2
    deadline = time.monotonic() + 60  # Python's resource tracker ends after its parent
    while any(map(runs, children)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@linux
def test_no_child_outlives_a_killed_parent(tmp_path):
    """Fault 6."""
    process = train(tmp_path, "--seeds", "2", "--processes", "2")
    wait_for(process, lambda: logged(tmp_path, 2))
    children = children_of(process)
    assert len(children) >= 2
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 30  # 5 s on a machine that does nothing else
    while any(map(runs, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(runs, children))


@linux
@pytest.mark.slow
def test_a_full_disk_does_not_end_training_and_the_checkpoint_before_survives(tmp_path):
    """Fault 11: the limit on the size of files falls to what they have."""
    import resource

    process = train(tmp_path, "--checkpoint-every", "200", steps="2_000")
    wait_for(process, lambda: list(tmp_path.glob("*/*/sac/stack_0_0/step_*.pt")))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, 1))
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err and "2000/2000" in out, (out, err)
    assert "checkpoint not written" in out and "logging failed, training continues" in err
    assert process.returncode == 1 and "the last row was not written" in err
    assert "nan" not in out and "plot:  " not in out
    (stack,) = tmp_path.glob("*/*/sac/stack_*")
    assert 200 <= checkpoint.load_latest(stack)["step"] < 2_000
