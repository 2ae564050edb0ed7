"""lab.plan: candidates, estimates, the choice, its cache, and leftovers."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lab import train
from lab.command_line import parse_args
from lab.errors import UserError, guarded
from lab.options import NUM_ENVS, Vectorised
from lab.plan import __main__ as plan
from lab.plan import benchmark, candidates
from lab.plan.benchmark import Cost
from lab.plan.candidates import apply_plan
from lab.training.job import Job
from tests.conftest import SMALL

TARGET = "tests.probe_envs:lab-tests/Target-v0"
COST = Cost(build=1.0, compile=2.0, early_steps=100, early_step=0.01, period=4.0, evaluation=3.0,
            update=0.08, step=0.01)
TINY = [word for name in ("batch_size", "actor_width", "qf_width")
        for word in (f"--{name.replace('_', '-')}", str(SMALL[name]))]


def make_job(**settings):
    return Job(**{"agent_path": "agents/sac.py", "config": {}, "env_id": "A", "seeds": (0, 1),
                  "steps": 1100, "eval_every": 110, "log_every": 11, "checkpoint_every": None}
               | settings)


# What a run is told to cost


def test_a_job_costs_its_start_its_early_steps_its_updates_and_its_evaluations():
    # 1 + 2, 100 steps at 0.01, 1000 at 0.01 + 0.08 / 4, 10 evaluations of 3
    assert COST.total(make_job()) == pytest.approx(3 + 1 + 30 + 30)
    # 275 steps of 4 environments, or of one with each action held for 4 steps
    for settings in ({"num_envs": 4}, {"action_repeat": 4}, {"num_envs": 2, "action_repeat": 2}):
        assert COST.total(make_job(**settings)) == pytest.approx(3 + 1 + 175 * 0.03 + 30)
    # 7 times within the run and at its end
    assert COST.total(make_job(eval_every=150)) == pytest.approx(3 + 1 + 30 + 8 * 3)
    assert COST.total(make_job(steps=60, eval_every=60)) == pytest.approx(3 + 0.6 + 3)
    never = dataclasses.replace(COST, period=float("inf"), early_steps=1100)
    assert never.total(make_job()) == pytest.approx(3 + 11 + 30)


def test_steps_per_second_are_summed_over_seeds_and_environments():
    assert COST.speed(make_job(num_envs=3)) == pytest.approx(6 / 0.03)
    assert COST.speed(make_job(num_envs=3, action_repeat=2)) == pytest.approx(12 / 0.03)


def test_the_speed_comes_from_the_steps_and_updates_that_were_counted():
    done = {"steps": 40, "updates": 20, "stepping": 8.0, "updating": 2.0}
    cost = COST.with_speed(done)
    assert (cost.step, cost.update, cost.period) == (0.2, 0.1, 2.0)
    few = COST.with_speed(done | {"updates": 1, "updating": 0.5})
    assert (few.step, few.update, few.period) == (0.2, 0.5, 4.0), "half a rollout has no period"
    none = COST.with_speed({"steps": 40, "updates": 0, "stepping": 8.0, "updating": 0.0})
    assert (none.step, none.update, none.period) == (0.2, 0.08, 4.0)


def test_processes_work_through_the_jobs_in_waves():
    cost = dataclasses.replace(COST, build=7.0, compile=0.0, early_steps=0, evaluation=0.0,
                               step=0.0, update=0.0)
    slow = dataclasses.replace(cost, build=20.0)
    pair = make_job(seeds=(0, 1)), make_job(seeds=(2, 3))
    later = [make_job(seeds=(n,)) for n in (4, 5, 6)]
    measured = [(job, cost) for job in pair]
    assert benchmark.makespan(pair[:1], 1, measured, 0.0) == 7
    assert benchmark.makespan(pair, 2, measured, 3.0) == 10
    assert benchmark.makespan([*pair, *later], 2, measured, 3.0) == 30, "three waves"
    assert benchmark.makespan([*pair, *later], 5, measured, 3.0) == 10
    # one process is busy until 23, the other does 10 + 10 + 10
    uneven = [(pair[1], cost), (pair[0], slow)]
    assert benchmark.makespan([*pair, *later[:2]], 2, uneven, 3.0) == 30
    # of two environments each costs what was measured of it, and a third what the nearest does
    both = [(pair[0], cost), (make_job(env_id="B"), slow)]
    other = [make_job(env_id=name, seeds=(0, 1, 2)) for name in "AB"]
    assert benchmark.makespan(other, 2, both, 0.0) == 20
    assert benchmark.makespan([make_job(env_id="C")], 1, both, 0.0) == 7


class Clock:
    """time.perf_counter() of a world where only what says so takes time."""

    now = 0.0

    def pass_(self, seconds, result=None):
        self.now += seconds
        return result


class World:
    """An agent that learns every 4th step from the 21st on, and its environments."""

    def __init__(self, clock, compiling):
        self.clock, self.compiling, self.observed, self.stepped = clock, compiling, 0, 0
        self.spec = SimpleNamespace(max_episode_steps=500)

    def act(self, obs, explore=True):
        return self.clock.pass_(0.001 if self.observed < 20 else 0.004, obs)

    def update(self):
        if self.observed < 20 or self.observed % 4:
            return {}
        first = self.observed == 20
        return self.clock.pass_(0.1 + first * self.compiling, {"loss/qf": 0})

    def observe(self, *transition):
        self.observed += 1
        self.clock.pass_(0.002)

    def reset(self, *stream):
        return torch.zeros(1, 1, 1)

    def act_and_send(self, act, obs):
        return act(obs)

    def receive(self):
        self.stepped += 1
        zeros = torch.zeros(1, 1)
        return self.clock.pass_(0.03, SimpleNamespace(
            rewards=zeros, next_obs=zeros, terminations=zeros, truncations=zeros, obs=zeros))


@pytest.fixture
def world(monkeypatch):
    clock = Clock()
    world = World(clock, compiling=50.0)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(benchmark, "build_agent", lambda *args: world)
    return world


def test_a_calibration_tells_the_parts_of_a_run_apart(world):
    loop = benchmark.Loop(make_job(), world)
    cost = loop.warm_up(build=1.0, compiling=2.0, evaluation=3.0)
    assert (cost.build, cost.evaluation, cost.early_steps) == (1, 3, 20)
    assert cost.early_step == pytest.approx(0.001 + 0.03 + 0.002)
    assert cost.compile == pytest.approx(2 + 50) and cost.update == pytest.approx(0.1)
    assert cost.period == 4 and world.stepped < 20, "the environments need not step all the way"
    loop.done.clear()
    for _ in range(40):
        loop.step()
    assert loop.done["stepping"] == pytest.approx(40 * (0.004 + 0.03 + 0.002))
    assert loop.done["updating"] == pytest.approx(10 * 0.1) and loop.done["updates"] == 10


def test_a_run_that_ends_before_its_first_update_has_none(world):
    cost = benchmark.Loop(make_job(steps=15), world).warm_up(0.0, 0.0, 0.0)
    assert cost.early_steps == 15 and cost.update == cost.compile == 0
    assert cost.with_speed({"steps": 9, "updates": 0, "stepping": 0.9, "updating": 0.0}).speed(
        make_job()) == pytest.approx(20)


@pytest.mark.parametrize("ends_after, seconds", [(20, 20 * 0.01), (10_000, 500 * 0.01)])
def test_an_evaluation_is_told_by_its_length_or_its_limit(monkeypatch, world, ends_after, seconds):
    def evaluate(agent, evaluation):
        for step in range(ends_after):
            agent.act(torch.zeros(1), explore=False)
            world.clock.pass_(0.009 + 5.0 * (step == 0))

    monkeypatch.setattr(benchmark, "evaluate", evaluate)
    first, whole = benchmark.sample_evaluation(world, world)
    assert first == pytest.approx(5) and whole == pytest.approx(seconds)


# What is tried


@pytest.fixture
def tried(monkeypatch):
    """Calibration in a moment -> the first job of each candidate that was tried."""
    jobs_tried = []

    def run_fake(jobs, deadline):
        job = jobs[0]
        jobs_tried.append(job)
        if job.backend == "envpool":
            raise UserError("envpool has no such environment")
        step = 1.0 + 0.4 * (len(jobs) > 1)  # two at once hinder each other, but less than double
        step *= {"workers": 0.8 - 0.1 * job.groups}.get(job.backend, 1.0)
        step *= (0.7 if job.compile else 1.0) * (0.5 if job.precision == "bf16" else 1.0)
        step *= len(job.seeds) * (0.1 if job.device == "cuda" else 1.0)
        cost = dataclasses.replace(COST, early_steps=0, step=step, update=0.0)
        return 3.0, [cost] * len(jobs)

    monkeypatch.setattr(benchmark, "run", run_fake)
    monkeypatch.setattr(candidates, "physical_cores", lambda: 4)
    monkeypatch.setattr(candidates, "can_compile", lambda: True)
    finder = SimpleNamespace(find_spec=lambda name: name == "envpool")
    monkeypatch.setattr(candidates, "importlib", SimpleNamespace(util=finder))
    return jobs_tried


def layout(job):
    return len(job.seeds), job.compile, job.precision, job.device


def test_compilation_then_bf16_then_fewer_processes_are_tried(tried, capsys):
    assert plan.run(["--agent", "agents/sac.py", "--seeds", "4", "--steps", "20_000"]) == 0
    assert [layout(job) for job in tried] == [
        (1, False, "fp32", "cpu"), (1, True, "fp32", "cpu"), (1, True, "bf16", "cpu"),
        (1, False, "bf16", "cpu"), (2, False, "fp32", "cpu")]  # which is slower: no third
    out = capsys.readouterr().out
    line = "\n  python learn_simple.py agents/sac.py --seeds 4 --steps 20_000 --processes 4 " \
           "--compile"
    assert f"fastest in fp32:{line}\n" in out and f"results.md):{line} --precision bf16\n" in out
    assert "estimated" in out and "start-up" in out


@pytest.mark.parametrize("flags, layouts", [
    ("--processes 2 --no-compile --precision fp32", {(2, False, "fp32", "cpu")}),
    ("--processes 1 --compile --precision bf16", {(4, True, "bf16", "cpu")}),
    ("--processes 2 --precision bf16", {(2, False, "bf16", "cpu"), (2, True, "bf16", "cpu")}),
    ("--processes=4 --compile", {(1, True, "fp32", "cpu"), (1, True, "bf16", "cpu")}),
])
def test_what_is_given_is_kept(tried, flags, layouts):
    plan.run(["--seeds", "4", *flags.split()])
    assert {layout(job) for job in tried} == layouts


@pytest.mark.parametrize("name, text", [
    ("config.json", '{"options": {"num_envs": 6, "backend": "sync"}, "config": {}}'),
    ("mine.yaml", "num-envs: 6\nbackend: sync")])
def test_a_config_with_many_environments_is_planned_as_their_script(tried, tmp_path, capsys, name,
                                                                    text):
    (tmp_path / name).write_text(text)
    argv = ["agents/ppo.py", "--env", TARGET, "--config", str(tmp_path / name)]
    assert plan.run(argv) == 0
    assert {job.num_envs for job in tried} == {6}
    assert "python learn_vectorised.py agents/ppo.py" in capsys.readouterr().out


def test_what_a_yaml_file_sets_is_kept(tried, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("compile: false\nprecision: fp32\nprocesses: 2\n")
    assert plan.run(["--seeds", "4", "--config", str(tmp_path / "mine.yaml")]) == 0
    assert {layout(job) for job in tried} == {(2, False, "fp32", "cpu")}
    out = capsys.readouterr().out
    assert "--compile" not in out and "--precision" not in out


def test_a_studys_settings_are_planned_for_learn_simple(tried, tmp_path, capsys):
    options = {"trials": 8, "workers": 2, "env": [TARGET], "seeds": 2}
    (tmp_path / "config.json").write_text(json.dumps({"options": options, "config": {}}))
    assert plan.run(["agents/sac.py", "--config", str(tmp_path / "config.json")]) == 0
    assert "python learn_simple.py agents/sac.py --config" in capsys.readouterr().out


def test_without_a_compiler_nothing_is_compiled(tried, monkeypatch):
    monkeypatch.setattr(candidates, "can_compile", lambda: False)
    plan.run([])
    assert [job.compile for job in tried] == [False, False]


@pytest.mark.parametrize("flags, devices", [
    ([], ["cpu", "cuda", "cuda"]), (["--no-cuda"], ["cpu", "cpu"]), (["--cuda"], ["cuda", "cuda"])])
def test_a_gpu_is_tried_where_there_is_one(tried, monkeypatch, capsys, flags, devices):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(candidates, "dry_run", lambda job: (None, {}))
    plan.run(["--seeds", "2", "--no-compile", "--precision", "fp32", *flags])
    assert [job.device for job in tried] == devices
    assert [len(job.seeds) for job in tried if job.device == "cuda"] in ([], [2, 1])
    assert ("--cuda" in capsys.readouterr().out.splitlines()[-1]) == ("cuda" in devices)


def test_backends_workers_and_groups_are_tried_for_many_environments(tried, capsys):
    argv = ["agents/ppo.py", "--env", TARGET, "--num-envs", "6", "--seeds", "2"]
    assert plan.run(argv) == 0
    eager = [(job.backend, job.workers, job.groups) for job in tried
             if not job.compile and job.precision == "fp32"]
    assert eager[:3] == [("sync", None, 1), ("workers", 4, 1), ("envpool", 4, 1)]
    assert set(eager[3:]) == {("workers", 4, 2), ("workers", 3, 1), ("envpool", 3, 1),
                              ("workers", 3, 2), ("workers", 8, 1), ("envpool", 8, 1),
                              ("workers", 8, 2)}
    assert all((job.num_envs, job.seeds) == (6, (0, 1)) for job in tried)
    best = tried[-2]
    assert (best.backend, best.groups, best.precision) == ("workers", 2, "bf16")
    out = capsys.readouterr().out
    assert "fp32:\n  python learn_vectorised.py agents/ppo.py --env" in out
    assert "--backend workers --workers 4 --groups 2" in out
    assert out.count("envpool has no such environment") == 3 and out.count("failed") == 9


@pytest.mark.parametrize("flags, kept", [
    ("--backend workers --workers 3 --groups 1", {("workers", 3, 1)}),
    ("--backend sync", {("sync", None, 1)}),
    ("--backend workers --workers 3", {("workers", 3, 1), ("workers", 3, 2)}),
    ("--backend torch --env Pendulum-v1", {("torch", None, 1)}),
])
def test_what_is_given_of_the_environments_is_kept(tried, flags, kept):
    plan.run(["--env", TARGET, "--no-compile", "--precision", "fp32", *flags.split()])
    assert {(job.backend, job.workers, job.groups) for job in tried} == kept
    assert {job.num_envs for job in tried} == {NUM_ENVS}, "another N learns otherwise"


def test_what_the_minute_has_no_time_for_is_named(tried, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "run", plan_until(2, benchmark.run))
    assert plan.run(["--seeds", "4"]) == 0
    out = capsys.readouterr().out
    assert "not measured, the minute was over: 4 processes, compiled, bf16, cpu; 4 processes" in out
    assert "--processes 4 --compile\n" in out


def plan_until(count, measure):
    """The deadline comes after this number of candidates."""
    def run_fake(jobs, deadline):
        nonlocal count
        count -= 1
        if count < 0:
            raise TimeoutError
        return measure(jobs, deadline)

    return run_fake


def test_a_minute_that_is_over_starts_no_process(tried, monkeypatch):
    monkeypatch.setattr(candidates, "BUDGET", -1.0)
    with pytest.raises(UserError, match="nothing was measured within the minute"):
        plan.run([])
    assert tried == []


def test_a_candidate_that_does_not_fit_in_what_is_left_makes_room_for_one_that_does(
        tried, monkeypatch):
    """Each compiled one takes 30 s, each eager one 5."""
    clock, fake = Clock(), benchmark.run
    monkeypatch.setattr(candidates, "time", SimpleNamespace(
        monotonic=lambda: clock.now, perf_counter=lambda: clock.now))
    monkeypatch.setattr(benchmark, "run", lambda jobs, deadline: clock.pass_(
        30 if jobs[0].compile else 5, fake(jobs, deadline)))
    plan.run(["--seeds", "4"])
    assert [layout(job) for job in tried] == [
        (1, False, "fp32", "cpu"), (1, True, "fp32", "cpu"), (1, False, "bf16", "cpu"),
        (2, False, "fp32", "cpu")]


# What fails


def test_what_is_too_large_together_is_tried_with_fewer_processes(tried, monkeypatch, capsys):
    fake = benchmark.run

    def run_fake(jobs, deadline):
        if len(jobs) > 1:
            raise UserError("MemoryError: too large")
        return fake(jobs, deadline)

    monkeypatch.setattr(benchmark, "run", run_fake)
    assert plan.run(["--seeds", "4", "--no-compile", "--precision", "fp32"]) == 0
    out = capsys.readouterr().out
    assert out.count("MemoryError: too large") == 2 and out.count("failed") == 6
    assert out.splitlines()[-1].endswith("--processes 1")


def run(argv):
    return guarded(lambda: plan.run(argv))


@pytest.mark.parametrize("argv, words", [
    (["--env", "Pendulm-v1"], "unknown environment 'Pendulm-v1'"),
    (["--agent", "agents/missing.py"], "no agent file 'agents/missing.py'"),
    (["--processes", "2", "--num-envs", "4"], "--processes"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--resume", "{folder}"], "cannot read"),
])
def test_bad_input_is_one_line(tried, capsys, tmp_path, argv, words):
    assert run([word.format(folder=tmp_path) for word in argv]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_plan_in_which_nothing_works_is_one_line(tried, monkeypatch, capsys):
    monkeypatch.setattr(candidates, "dry_run", lambda job: (None, {}))
    assert run(["--env", TARGET, "--backend", "envpool"]) == 2
    err = capsys.readouterr().err
    assert err == "error: no plan works: envpool has no such environment\n"


def test_a_minute_without_a_single_measurement_is_one_line(tried, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "run", plan_until(0, None))
    assert run([]) == 2
    assert "no plan works: nothing was measured within the minute" in capsys.readouterr().err


def test_a_process_that_is_killed_is_a_failure_and_no_end(tmp_path):
    agent = Path("agents/sac.py").read_text() + """

import os
import signal


def patch(self, *transition):
    os.kill(os.getpid(), signal.SIGKILL)


Agent.observe = patch
"""
    (tmp_path / "mine.py").write_text(agent)
    job = make_job(agent_path=str(tmp_path / "mine.py"), env_id="Pendulum-v1")
    with pytest.raises(UserError, match="its process ended with code -9"):
        benchmark.run([job], deadline=benchmark.time.monotonic() + 1000)


# The whole


@pytest.mark.slow
def test_a_real_calibration_leaves_nothing_behind(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "WINDOW", 0.1)
    monkeypatch.setattr(candidates, "BUDGET", 1000.0)
    argv = ["--env", "Pendulum-v1", "--seeds", "2", "--steps", "400", "--processes", "2", *TINY,
            "--no-compile", "--precision", "fp32", "--log", "--runs", str(tmp_path / "runs")]
    assert plan.run(argv) == 0
    out = capsys.readouterr().out
    (row,) = (line.split() for line in out.splitlines() if " sync " in line)
    assert row[:6] == ["2", "1", "no", "fp32", "cpu", "sync"] and float(row[6]) > 10
    assert out.splitlines()[-1] == "  python learn_simple.py " + " ".join(argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_real_calibration_of_rollouts_and_workers(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "WINDOW", 0.1)
    monkeypatch.setattr(candidates, "BUDGET", 1000.0)
    argv = ["agents/ppo.py", "--env", TARGET, "--num-envs", "4", "--backend", "workers",
            "--workers", "2", "--groups", "2", "--num-steps", "16", "--num-minibatches", "4",
            "--no-compile", "--precision", "fp32"]
    assert plan.run(argv) == 0
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if "  fp32  " in line)
    assert row[5:9] == ["workers", "4", "2", "2"] and float(row[9].replace(",", "")) > 10


def test_a_planned_run_uses_the_best_and_remembers_it(tried, tmp_path, capsys):
    argv = ["agents/sac.py", "--env", TARGET, "--seeds", "2", "--steps", "3", "--plan", "--log",
            "--runs", str(tmp_path), "--eval-episodes", "1", "--no-compile", *TINY]
    assert train.run(argv) == 0
    assert "running: python learn_simple.py agents/sac.py" in capsys.readouterr().out
    folder, = tmp_path.glob("sac-*")
    options = json.loads((folder / "config.json").read_text())["options"]
    assert options["processes"] == 1 and options["plan"] is False, "no process for 3 steps"
    assert (options["compile"], options["precision"]) == (False, "fp32")
    again, _ = parse_args(["--resume", str(folder)])
    assert again.processes == 1 and not again.plan
    count = len(tried)
    assert train.run(argv) == 0 and len(tried) == count
    assert "using the cached plan" in capsys.readouterr().out
    assert train.run([*argv, "--gamma", "0.9"]) == 0 and len(tried) > count, "another question"
    agent, count = tmp_path / "sac.py", len(tried)
    for code in ("", "# slower"):
        agent.write_text(Path("agents/sac.py").read_text() + code)
        assert train.run([str(agent), *argv[1:]]) == 0 and len(tried) > count, "other code"
        count = len(tried)
    (tmp_path / "plan.json").write_text("{torn")
    assert train.run(argv) == 0 and len(tried) > count, "a broken memory is measured again"


def test_a_plan_of_many_environments_lands_in_the_settings(tried, tmp_path):
    argv = ["agents/ppo.py", "--env", TARGET, "--steps", "64", "--plan", "--log", "--runs",
            str(tmp_path), "--num-envs", "4", "--num-steps", "8", "--num-minibatches", "4",
            "--no-compile"]
    assert train.run(argv, Vectorised) == 0
    folder, = tmp_path.glob("ppo-*")
    options = json.loads((folder / "config.json").read_text())["options"]
    assert (options["backend"], options["workers"], options["groups"]) == ("workers", 4, 2)
    assert options["num_envs"] == 4 and options["precision"] == "fp32" and not options["compile"]


def test_bf16_is_used_only_where_it_is_given(tried, tmp_path):
    argv = ["--env", TARGET, "--seeds", "4", "--steps", "20_000", "--plan", "--runs", str(tmp_path)]
    for flags, precision in ([], "fp32"), (["--precision", "bf16"], "bf16"):
        options, config = parse_args([*argv, *flags])
        planned = apply_plan(options, config, [*argv, *flags])
        assert planned.precision == precision and planned.compile and planned.processes == 4


def test_the_agent_may_stand_as_a_flag_or_alone(tried, capsys):
    commands = []
    for argv in (["--agent", "agents/ppo.py"], ["--agent=agents/ppo.py"], ["agents/ppo.py"]):
        assert plan.run([*argv, "--seeds", "2"]) == 0
        commands.append(capsys.readouterr().out.splitlines()[-1])
    assert len(set(commands)) == 1 and " learn_simple.py agents/ppo.py --seeds 2 " in commands[0]


def test_an_interrupted_plan_leaves_no_process(monkeypatch):
    pids = []

    class Noting(benchmark.Processes):
        def receive(self, timeout=None):
            pids.extend(process.pid for process, _ in self.running.values())
            os.kill(os.getpid(), signal.SIGINT)
            yield from super().receive(timeout)

    monkeypatch.setattr(benchmark, "Processes", Noting)
    assert run(["--env", "Pendulum-v1", *TINY]) == 128 + signal.SIGINT
    assert pids and not any(os.path.exists(f"/proc/{pid}") for pid in pids)
