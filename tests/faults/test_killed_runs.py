"""Fault 1: a run that is killed anywhere and resumed ends as one that was never killed."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from lab.training import checkpoint
from tests.conftest import flat_state, same, timeless

SMALL = "--batch-size 32 --learning-starts 100 --qf-width 32 --actor-width 32"
COMMANDS = {
    "sac on Pendulum": "learn_simple.py agents/sac.py --env Pendulum-v1 --steps 1_000 "
                       f"--processes 1 {SMALL}",
    "sac on Pendulum, two processes": "learn_simple.py agents/sac.py --env Pendulum-v1 "
                                      f"--steps 1_000 --processes 2 {SMALL}",
    "crossq on HalfCheetah": "learn_simple.py agents/crossq.py --env HalfCheetah-v5 --steps 3_000 "
                             f"{SMALL}",
    "sac on BipedalWalker": f"learn_simple.py --env BipedalWalker-v3 --steps 4_000 {SMALL}",
    "ppo on Pendulum, workers": "learn_vectorised.py agents/ppo.py --env Pendulum-v1 --num-envs 4 "
                                "--backend workers --workers 2 --groups 2 --steps 12_000 "
                                "--num-steps 100 --num-minibatches 4 --update-epochs 2",
    "ppo on torch/Pendulum": "learn_vectorised.py agents/ppo.py --env torch/Pendulum-v1 "
                             "--num-envs 8 --steps 40_000 --update-epochs 2",
}


def start(*argv):
    return subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(*argv):
    """-> what it prints."""
    process = start(*argv)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def last_step(folder):
    steps = [json.loads(line)["step"] for path in folder.glob("*/*/seed_*/metrics.jsonl")
             for line in path.read_text().splitlines()[-1:] if line.endswith("}")]
    return min(steps, default=0)


def kill_after(process, folder_of, step, moment):
    """SIGKILL within `moment` seconds after that step was logged -> whether it still ran."""
    while process.poll() is None and not (folder_of() and last_step(folder_of()) >= step):
        time.sleep(0.01)
    time.sleep(moment)
    alive = process.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # and the processes of its seeds
    process.communicate()
    return alive


def numbers(folder):
    """All that a run leaves behind, but for times."""
    rows = {str(path.relative_to(folder)): [
        timeless(json.loads(line)) for line in path.read_text().splitlines()]
        for path in folder.glob("*/*/seed_*/metrics.jsonl")}
    states = {str(path.relative_to(folder)): flat_state(checkpoint.load_latest(path))
              for path in stacks(folder)}
    return rows, states


def stacks(folder):
    found = list(folder.glob("*/*/stack_*"))
    assert found
    return found


def first_rows(folder):
    """With their times, which training them again would change."""
    return {path: path.read_text().split("\n", 1)[0]
            for path in folder.glob("*/*/seed_*/metrics.jsonl")}


def table_of(out):
    return [line for line in out.splitlines() if line.startswith("│")]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_killed_three_times_ends_as_one_that_was_not(name, tmp_path):
    script, *argv = COMMANDS[name].split()
    steps = int(argv[argv.index("--steps") + 1])
    argv += ["--seeds", "2", "--log", "--log-every", str(steps // 20)]
    out = finish(script, *argv, "--runs", str(tmp_path / "whole"))
    (whole,) = (tmp_path / "whole").iterdir()

    dice = random.Random(name)
    process = start(script, *argv, "--runs", str(tmp_path / "killed"))
    kills, firsts = 0, []
    for part in (0.25, 0.5, 0.8):
        def folder():
            return next(iter((tmp_path / "killed").glob("*-*")), None)
        kills += kill_after(process, folder, part * steps, dice.uniform(0, 0.3))
        assert all(map(checkpoint.last_step, stacks(folder()))), "no checkpoint to go on from"
        firsts.append(first_rows(folder()))
        process = start(script, "--resume", str(folder()))
    out_again, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out_again
    assert kills >= 2, "it was too fast to be killed"
    assert "start again" not in out_again
    assert firsts == [first_rows(folder())] * 3, "it was trained again from the first step"

    (rows, states), (rows_again, states_again) = numbers(whole), numbers(folder())
    assert rows == rows_again and all(rows.values())
    assert states.keys() == states_again.keys() and states
    for file, state in states.items():
        for key, value in state.items():
            assert same(value, states_again[file][key]), (file, key)
    assert table_of(out) == table_of(out_again) and table_of(out)
