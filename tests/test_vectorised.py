"""learn_vectorised.py: options and files."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lab import options as lab_options
from lab import train
from lab.agent import load_agent
from lab.command_line import parse_args
from lab.options import Vectorised, resolve_defaults
from lab.training import checkpoint, processes
from lab.training.job import make_jobs
from lab.training.loop import train as loop_train
from lab.training.recorder import read_metrics
from tests.conftest import AGENTS, SMALL, flat_state, is_discrete, needs_cuda, same

DIARY = "tests.probe_envs:lab-tests/Diary-v0"
TARGET = "tests.probe_envs:lab-tests/Target-v0"


def parse(*argv):
    return parse_args(argv, Vectorised)


def run(*argv):
    return train.run(list(map(str, argv)), Vectorised)


def small(path):
    fields = load_agent(path).Config.__dataclass_fields__
    return [word for name, value in {**SMALL, "replay_ratio": 1.0}.items() if name in fields
            for word in (f"--{name.replace('_', '-')}", str(value))]


def tasks_for(path):
    """In torch, and for workers."""
    if is_discrete(path):
        return "CartPole-v1", TARGET.replace("Target", "DiscreteTarget")
    return "Pendulum-v1", TARGET


def test_no_argument_is_ppo_on_an_environment_in_torch():
    options, config = parse()
    (job,) = make_jobs(resolve_defaults(options), config, 1, None)
    assert job.agent_path == "agents/ppo.py" and job.env_id.startswith("torch/")
    assert job.num_envs > 8 and job.backend is None and job.seeds == (0,)


@pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("layout", ["--backend torch --env {}",
                                    "--env {} --backend workers --workers 2 --groups 2"])
def test_every_agent_trains_on_many_environments(path, layout, tmp_path, no_curves):
    in_torch, by_workers = tasks_for(path)
    task = in_torch if "torch" in layout else by_workers
    flags = [*layout.format(task).split(), "--num-envs", 4, "--seeds", 2, "--steps", 60, "--log",
             "--eval-every", 60, "--eval-episodes", 1, "--runs", tmp_path]
    assert run(path, *flags, *small(path)) == 0
    folder, = tmp_path.glob(f"{path.stem}-*")
    env_id = json.loads((folder / "config.json").read_text())["options"]["env"][0]
    assert env_id == (f"torch/{task}" if "torch" in layout else task)
    for seed in (0, 1):
        file, = folder.glob(f"*/{path.stem}/seed_{seed}/metrics.jsonl")
        rows = read_metrics(file)
        assert rows[-1]["step"] == 60 and "return/eval" in rows[-1]
        assert any(tag.startswith("loss/") for row in rows for tag in row)


@pytest.mark.parametrize("flags, words", [
    ("--num-envs 0", "--num-envs must be at least 1, not 0"),
    ("--workers 0", "--workers must be at least 1"),
    ("--groups 2", "--groups 2 needs --backend workers, not torch"),
    ("--backend workers", "torch/ContinuousCartPole-v1 is written in torch: remove --backend"),
    ("--env torch/Pendulum-v2", "environment torch/Pendulum-v2; choose from torch/Pendulum-v1"),
    ("--backend torch --env Hopper-v5", "unknown environment torch/Hopper-v5"),
    ("--processes 2", "processes"),
    ("--workers 2", "--workers does nothing without --backend workers or envpool"),
    ("--env Pendulum-v1 --backend sync --workers 2", "--workers does nothing without --backend"),
])
def test_bad_input_is_one_line(flags, words, capsys, tmp_path):
    assert run(*flags.split(), "--log", "--runs", tmp_path / "runs") == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags, threads", [
    ("", 8), ("--env Hopper-v5", 8), ("--env Hopper-v5 --backend sync", 8),
    ("--env Pendulum-v1 --backend torch", 8), ("--env Hopper-v5 --backend workers", 1),
    ("--env Hopper-v5 --backend workers --workers 3", 6),  # this process is one of them
    ("--env Hopper-v5 --backend workers --workers 20", 1),
    ("--env Hopper-v5 --backend workers --workers 20 --num-envs 2", 7),
    ("--env Hopper-v5 --backend envpool --workers 3", 5), ("--threads 2", 2)])
def test_torch_gets_the_cores_that_the_workers_leave(monkeypatch, flags, threads):
    monkeypatch.setattr(lab_options, "physical_cores", lambda: 8)
    options, config = parse(*flags.split())
    settled = resolve_defaults(options)
    jobs = [make_jobs(each, config, 1, None)[0] for each in (options, settled)]
    assert [job.threads for job in jobs] == [threads, threads] and settled.threads == threads
    assert make_jobs(*parse_args([]), 1, None)[0].threads == 1


def test_a_gpus_run_keeps_one_thread(monkeypatch):
    monkeypatch.setattr(lab_options, "physical_cores", lambda: 8)
    assert resolve_defaults(parse("--cuda")[0]).threads == 1


@pytest.mark.slow
def test_runs_with_the_same_number_of_threads_are_equal_and_a_resumed_one_keeps_it(
        tmp_path, monkeypatch):
    """Batches large enough to be shared by two threads."""
    seen, measured = [], []

    def train_and_look(job, emit):
        seen.append(torch.get_num_threads())
        loop_train(job, emit)
        seen.append(torch.get_num_threads())

    monkeypatch.setattr(processes, "train", train_and_look)
    for name in "ab":
        assert run("--env", "torch/Pendulum-v1", "--num-envs", 256, "--width", 256, "--threads", 2,
                   "--update-epochs", 1, "--num-minibatches", 4, "--steps", 8192, "--log",
                   "--eval-episodes", 1, "--runs", tmp_path, "--name", name) == 0
        folder, = tmp_path.glob(f"{name}-*")
        state = checkpoint.load_latest(*folder.glob("*/ppo/stack_0_0"))
        measured.append(flat_state(state["agent"]))
    a, b = measured
    assert a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    assert seen == [2] * 4
    assert json.loads((folder / "config.json").read_text())["options"]["threads"] == 2
    monkeypatch.setattr(lab_options, "physical_cores", lambda: 8)
    assert parse("--resume", str(folder))[0].threads == 2
    assert parse("--config", str(folder / "config.json"))[0].threads is None
    settings = json.loads((folder / "config.json").read_text())
    del settings["options"]["threads"]  # a run from before there was a choice
    (folder / "config.json").write_text(json.dumps(settings))
    assert parse("--resume", str(folder))[0].threads == 1


def test_envpool_that_is_missing_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "envpool", None)
    assert run("--env", "Pendulum-v1", "--backend", "envpool") == 2
    assert "pip install envpool==" in capsys.readouterr().err


def test_each_script_resumes_its_own_runs(tmp_path, capsys):
    short = ["--env", TARGET, "--steps", "64", "--log", "--runs", str(tmp_path),
             *small("agents/ppo.py")]
    assert train.run(["agents/ppo.py", *short, "--name", "simple"]) == 0
    assert run("agents/ppo.py", *short, "--name", "many", "--num-envs", 4) == 0
    simple, many = (next(tmp_path.glob(f"{name}-*")) for name in ("simple", "many"))
    assert run("--resume", simple) == 2
    assert "is a run of learn_simple.py" in capsys.readouterr().err
    assert train.run(["--resume", str(many)]) == 2
    assert "is a run of learn_vectorised.py" in capsys.readouterr().err
    assert run("--resume", many) == 0
    options, _ = parse("--config", str(simple / "config.json"))
    assert (options.env, options.steps, options.num_envs) == ((TARGET,), 64, None)
    assert parse("--config", str(many / "config.json"))[0].num_envs == 4


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_with_an_error_and_a_checkpoint(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "learn_vectorised.py", "agents/ppo.py", "--env", TARGET, "--num-envs", "4",
         "--backend", "workers", "--workers", "3", "--steps", "10_000_000", "--log", "--runs",
         str(tmp_path), "--checkpoint-every", "100", *small("agents/ppo.py")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("ppo-*/*/ppo/stack_0_0/step_*.pt")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        children = subprocess.run(["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)],
                                  capture_output=True, text=True).stdout.splitlines()
        workers = [int(line.split()[0]) for line in children if "spawn_main" in line]
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith("FAILED")]
    assert "worker 2 of 2" in line and f"process {workers[1]}" in line and "signal 9" in line
    assert "Traceback" not in err
    folder, = tmp_path.glob("ppo-*/*/ppo/stack_0_0")
    assert checkpoint.load_latest(folder)["step"] > 0
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)


@needs_cuda
@pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("compiled", [[], ["--compile"]], ids=["eager", "graphs"])
def test_every_agent_trains_on_a_gpu(path, compiled, tmp_path):
    in_torch, by_workers = tasks_for(path)
    for layout in (f"--env torch/{in_torch}", f"--env {by_workers} --backend workers --workers 2"):
        assert run(path, *layout.split(), "--num-envs", 4, "--seeds", 2, "--steps", 400, "--cuda",
                   "--eval-episodes", 1, *compiled, *small(path)) == 0
