"""Studies with a fake trainer: states of trials, kills, bad input."""

import contextlib
import dataclasses
import errno
import io
import json
import math
import multiprocessing
import os
import re
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from lab import train as script
from lab.agent import load_agent
from lab.command_line import parse_args
from lab.errors import CodeError, RefusedError, UserError
from lab.options import Simple, Tune
from lab.report import curves
from lab.training import processes, recorder
from lab.training.job import Job
from lab.training.processes import Failure, Processes
from lab.tuning import run as study_run
from lab.tuning import space, study, summary, surrogate
from lab.tuning.progress import StudyProgress
from lab.tuning.study import HELD_OUT
from lab.tuning.trials import Journal, Trial

SMALL = ["--actor-width", "8", "--qf-width", "8", "--batch-size", "8", "--steps", "100",
         "--workers", "1", "--eval-episodes", "1", "--confirm-seeds", "3", "--name", "mine"]
DRAW = summary.draw
SPACE = ["--space", "actor_lr=log:1e-5:1e-1", "gamma=0.9:0.99"]


def value(job, seed, step):
    """The return of this setting: best at a learning rate of 1e-3."""
    noise = math.sin(1000 * seed + step)
    return -50 * (math.log10(job.config["actor_lr"]) + 3) ** 2 + step / 10 + noise


class FakeProcesses:
    """Stands in for Processes: a trial's fate is a generator of what its process tells."""

    fates = {}  # number of the trial: a function of its job
    given = []  # the jobs, in order
    told = 0  # messages, of all trials
    killed_at = None  # message at which SIGKILL comes
    by_default = staticmethod(lambda job: train(job))

    def __init__(self):
        self.running, self.ended = {}, set()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def start(self, key):
        self.running[key] = None

    def give(self, key, job):
        type(self).given.append(job)
        held_out = job.seeds[0] >= HELD_OUT
        fate = self.by_default if held_out else self.fates.get(key, self.by_default)
        self.running[key] = fate(job)

    def end(self, key):
        self.ended.add(key)

    def receive(self, timeout=None):
        for key, messages in list(self.running.items()):
            cls = type(self)
            cls.told += 1
            if cls.told == cls.killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            message = None
            if key in self.ended:
                message = Failure("its process ended with code -15", "killed")
            else:
                message = next(messages, None)
            if not isinstance(message, dict):
                del self.running[key]
                self.ended.discard(key)
            yield key, message


def train(job, last=100):
    """Ten evaluations; what is confirmed is read from the metrics."""
    folders = [job.group / f"seed_{seed}" for seed in job.seeds]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    yield {"step": 0}
    for step in range(10, last + 1, 10):
        rows = {seed: {"return/eval": value(job, seed, step)} for seed in job.seeds}
        for folder, row in zip(folders, rows.values(), strict=True):
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **row}) + "\n")
        yield {"step": step, "rows": rows, "perf/steps_per_s": 1.0, "perf/updates_per_s": 1.0}


def diverges(job):
    yield from train(job, 30)
    yield {"failed_seed": job.seeds[0], "step": 40,
           "reason": "loss/qf is not finite at step 40"}
    yield {"step": 50, "rows": {}}


def refused_settings(job):
    yield from train(job, 10)
    yield Failure("MemoryError: too large", "settings")


def crashes(job):
    yield from train(job, 20)
    yield Failure("its process ended with code -9", "killed")


def behind(job):
    """Every evaluation far below all others', and below the one before."""
    for message in train(job):
        for row in message.get("rows", {}).values():
            row["return/eval"] -= 10_000 + 10 * message["step"]
        yield message


def stops(job, tells=True):
    """It ends at step 30, and a kill may keep its last message."""
    *messages, last = train(job, 30)
    yield from messages
    recorder.write_json(job.group / recorder.STOPPED, {"step": 30, "reason": "enough"})
    if tells:
        yield last | {"stopped": "enough"}


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    for module in (study, processes):
        monkeypatch.setattr(module, "Processes", FakeProcesses)
    monkeypatch.setattr(FakeProcesses, "fates", {})
    monkeypatch.setattr(FakeProcesses, "given", [])
    monkeypatch.setattr(FakeProcesses, "told", 0)
    monkeypatch.setattr(summary, "draw", lambda path, *rest: path.touch())  # half a second


def tune(folder, *flags):
    return script.run([*SMALL, "--runs", str(folder), *SPACE, *flags], Tune, study_run.tune)


def trials(folder):
    journal = Journal(folder / "studies/mine/trials.jsonl")
    with contextlib.closing(journal):
        return journal.trials()


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


# What becomes of a trial


@pytest.mark.parametrize("tells", [True, False])
def test_a_trial_that_stopped_early_is_completed(tmp_path, tells):
    FakeProcesses.fates = {1: lambda job: stops(job, tells)}
    assert tune(tmp_path, "--trials", "3", "--no-prune", "--stop-plateau", "3") == 0
    trial = trials(tmp_path)[1]
    assert (trial.state, trial.reason) == ("completed", "stopped at step 30: enough")
    assert max(trial.evaluations) == 30



def test_each_trial_ends_in_its_state_and_registers_what_that_tells(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(summary, "draw", DRAW)
    FakeProcesses.fates = {1: diverges, 2: crashes, 4: refused_settings, 8: behind}
    assert tune(tmp_path, "--trials", "9") == 0
    done = trials(tmp_path)
    assert [trial.state for trial in done] == [
        "completed", "diverged", "failed", "completed", "diverged", *["completed"] * 3, "pruned"]
    assert done[1].reason == f"seed {done[1].number * 2}: loss/qf is not finite at step 40"
    assert done[4].reason == "MemoryError: too large"
    assert [len(t.evaluations) for t in done] == [10, 3, 2, 10, 1, 10, 10, 10, 7]
    assert max(done[8].evaluations) == 70, "the first evaluation after two thirds of the steps"
    jobs = [job for job in FakeProcesses.given if job.seeds[0] < HELD_OUT]
    assert [job.seeds[0] // 2 for job in jobs] == [0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8]
    worst = min(trial.final for trial in done if trial.state == "completed")
    registered = {o.settings["actor_lr"]: o.value for o in surrogate.observe(done)}
    assert registered[done[1].settings["actor_lr"]] == worst
    assert registered[done[4].settings["actor_lr"]] == worst
    assert done[2].settings["actor_lr"] not in registered
    assert registered[done[8].settings["actor_lr"]] < -9_000
    out, err = capsys.readouterr()
    assert err == "FAILED trial 2: its process ended with code -9\n"
    assert "trial 2: its process ended with code -9; restarting" in out
    assert re.search(r"\d of 5 completed trials are within one standard error \(\d", out)
    assert "9/9 trials: 5 completed, 1 pruned, 2 diverged, 1 failed, 0 running; best " in out


def test_a_trial_that_is_killed_once_goes_on_and_counts(tmp_path):
    fates = iter([crashes, train])
    FakeProcesses.fates = {1: lambda job: next(fates)(job)}
    assert tune(tmp_path, "--trials", "3") == 0
    assert [trial.state for trial in trials(tmp_path)] == ["completed"] * 3
    assert len(trials(tmp_path)[1].evaluations) == 10


@pytest.mark.parametrize("flag, steps", [
    ("--prune", 70), ("--no-prune", 100), ("--n-warmup-steps=51", 60),
    ("--n-startup-trials=2", 100), ("--patience=8", 100), ("--patience=7", 90),
    ("--n-warmup-steps=5 --patience=None", 10)])
def test_where_pruning_begins_and_that_it_can_be_left_out(tmp_path, flag, steps):
    FakeProcesses.fates = {1: behind}
    flags = ["--trials", "2", "--n-startup-trials", "1", *re.split("[= ]", flag)]
    assert tune(tmp_path, *flags) == 0
    behind_all = trials(tmp_path)[1]
    assert behind_all.state == ("completed" if steps == 100 else "pruned")
    assert max(behind_all.evaluations) == steps


def test_the_flags_of_pruning_reach_the_pruner(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(study.pruner, "prune", lambda trial, trials, *rest: asked.append(rest))
    rules = {"--pruner": "percentile", "--percentile": 60.0, "--n-startup-trials": 2,
             "--n-warmup-steps": 5, "--interval-steps": 7, "--patience": 3}
    flags = [str(word) for pair in rules.items() for word in pair]
    assert tune(tmp_path, "--trials", "1", *flags) == 0
    assert set(asked) == {tuple(rules.values())}


def test_a_study_may_go_on_with_another_rule(tmp_path):
    FakeProcesses.fates = {1: behind}
    assert tune(tmp_path, "--trials", "1", "--no-prune") == 0
    assert tune(tmp_path, "--trials", "2", "--n-startup-trials", "1") == 0
    assert trials(tmp_path)[1].state == "pruned"


@pytest.mark.parametrize("error, cause", [
    (UserError("no intact checkpoint"), "error"), (RefusedError("gamma is too high"), "settings")])
def test_only_what_the_agent_refuses_is_the_settings_fault(error, cause):
    def work(job, emit):
        raise error

    job = Job("agents/sac.py", {}, "Pendulum-v1", (0,), 10, 10, 1, 0)
    assert processes.attempt(work, job, print) == Failure(str(error), cause)


def test_an_environment_that_cannot_be_made_is_not_the_settings_fault(tmp_path):
    """A simulator that does not start says nothing of them: only an exception that went through
    the agent's code does."""
    path = tmp_path / "mine.py"
    path.write_text("def build():\n    raise OSError('port in use')\n")
    build = runpy.run_path(str(path))["build"]

    def work(job, emit):
        try:
            build()
        except OSError as error:
            raise CodeError("cannot make it") from error

    for agent, cause in ((str(path), "settings"), ("agents/sac.py", "error")):
        job = Job(agent, {}, "Pendulum-v1", (0,), 10, 10, 1, 0)
        assert processes.attempt(work, job, print) == Failure("cannot make it", cause)


def test_a_reason_may_have_brackets(capsys):
    """Which rich would read as markup, and an unknown [/tag] as an error."""
    with StudyProgress(parse_args([], Tune)[0], []) as progress:
        progress.say("trial 3: cannot reach [/127.0.0.1:80], keys [a, b] missing; restarting")
    assert "reach [/127.0.0.1:80], keys [a, b] missing" in capsys.readouterr().out


def test_no_completed_trial_is_a_failure(tmp_path, capsys):
    FakeProcesses.fates = dict.fromkeys(range(3), crashes)
    assert tune(tmp_path, "--trials", "3") == 1
    assert capsys.readouterr().err.endswith("FAILED no trial completed\n")
    assert not (tmp_path / "studies/mine/best.json").exists()


# Its end


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(None):
        for module in (study, processes):
            patch.setattr(module, "Processes", FakeProcesses)
        patch.setattr(FakeProcesses, "given", [])
        assert tune(folder, "--trials", "5", "--tau", "0.01") == 0
        jobs = list(FakeProcesses.given)
    return folder, jobs


def test_the_best_and_the_defaults_are_confirmed_on_seeds_that_no_trial_saw(finished):
    folder, jobs = finished
    tuned = {seed for job in jobs[:5] for seed in job.seeds}
    confirmed = jobs[5:]
    assert tuned == set(range(10)) and len(confirmed) == 4
    for job in confirmed:
        assert job.seeds == (1_000_000, 1_000_001, 1_000_002) and job.config["tau"] == 0.01
    assert confirmed[0].config["actor_lr"] == 3e-4, "the defaults"
    done = {json.dumps(trial.settings) for trial in trials(folder)}
    tried = [json.dumps({k: job.config[k] for k in ("actor_lr", "gamma")}) for job in confirmed]
    assert len(set(tried)) == 4 and len(set(tried[1:]) - done) <= 1, "but for the optimum, trials"


def test_what_a_study_leaves(finished):
    folder = finished[0] / "studies/mine"
    best = json.loads((folder / "best.json").read_text())
    options, config = parse_args(["--config", str(folder / "best.json")])
    assert isinstance(options, Simple) and not options.log and options.seeds == 1
    assert options.steps == 100 and config == best["config"] and config["tau"] == 0.01
    means = {name: sum(curves.final_returns(
        recorder.group_folder(folder / "confirmed" / name, "Pendulum-v1", "sac"),
        best["study"]["seeds"], 100).values()) / 3
        for name in (path.name for path in (folder / "confirmed").iterdir())}
    name = max(means, key=means.get)
    assert best["study"]["is"] == name.replace("_", " ")
    assert sum(best["study"]["confirmed"]) / 3 == pytest.approx(means[name])
    assert (folder / "study.png").read_bytes()[:4] == b"\x89PNG"
    for path in ("config.json", "versions.json", "sac.py"):
        assert (folder / path).exists()


def test_more_held_out_seeds_train_beside_those_that_are_done(tmp_path):
    assert tune(tmp_path, "--trials", "1", "--confirm-seeds", "2") == 0
    runs = [Path(job.run) for job in FakeProcesses.given if job.seeds[0] >= HELD_OUT]
    for run in runs:
        (run / "Pendulum-v1/sac/stack_1000000_1000001").mkdir()
    FakeProcesses.given.clear()
    assert tune(tmp_path, "--trials", "1", "--confirm-seeds", "3") == 0
    assert [(job.run, job.seeds) for job in FakeProcesses.given] == [
        (str(run), (1_000_002,)) for run in runs]
    for run in runs:
        assert json.loads((run / "config.json").read_text())["options"]["seeds"] == 3


def test_a_setting_that_loses_a_held_out_seed_does_not_win(tmp_path, capsys, monkeypatch):
    """The others' mean would: it says nothing about the lost one."""
    def loses_one(job):
        if job.config["actor_lr"] != 3e-4:  # the defaults
            seeds = job.seeds[:1] if job.seeds[0] >= HELD_OUT else job.seeds
            if lost := set(job.seeds) - set(seeds):
                yield {"failed_seed": max(lost), "reason": "loss/qf is not finite", "step": 10}
            job = dataclasses.replace(job, seeds=seeds)
        yield from train(job)

    monkeypatch.setattr(sys.modules[__name__], "value", lambda job, *_: -job.config["gamma"])
    monkeypatch.setattr(FakeProcesses, "by_default", staticmethod(loses_one))
    assert tune(tmp_path, "--trials", "2", "--gamma", "0.995") == 1
    best = json.loads((tmp_path / "studies/mine/best.json").read_text())
    assert best["study"]["is"] == "defaults" and best["study"]["confirmed"] == [-0.995] * 3
    out, err = capsys.readouterr()
    assert "nothing beat the defaults" in out
    assert "FAILED trial_1, seed 1000002: loss/qf is not finite\n" in err
    assert "FAILED trial_1, seed 1000001: no last evaluation\n" in err


def test_a_killed_confirmation_is_no_verdict_and_goes_on(tmp_path, capsys, monkeypatch):
    """best.json stays as it was: what was killed says nothing of its settings."""
    def killed(job):
        yield from crashes(job) if job.seeds[0] >= HELD_OUT else train(job)

    assert tune(tmp_path, "--trials", "1", "--confirm-seeds", "2") == 0
    best = tmp_path / "studies/mine/best.json"
    before = best.read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(FakeProcesses, "by_default", staticmethod(killed))
        assert tune(tmp_path, "--trials", "1", "--confirm-seeds", "3") == 1
    out, err = capsys.readouterr()
    assert "FAILED defaults: its process ended with code -9\n" in err
    assert "not confirmed: some held-out seeds" in out and "nothing beat" not in out
    assert f"python hypertune.py --resume {best.parent}\n" in out and best.read_bytes() == before
    assert tune(tmp_path, "--trials", "1", "--confirm-seeds", "3") == 0
    assert json.loads(best.read_text())["study"]["seeds"] == list(range(HELD_OUT, HELD_OUT + 3))


def test_a_rule_to_stop_keeps_its_held_out_seeds(tmp_path, capsys):
    flags = ["--trials", "1", "--stop-plateau", "3"]
    assert tune(tmp_path, *flags, "--confirm-seeds", "2") == 0
    before = contents(tmp_path)
    assert tune(tmp_path, *flags, "--confirm-seeds", "3") == 2
    assert "needs the mean of all seeds: give --confirm-seeds 2, as before" in (
        capsys.readouterr().err)
    assert contents(tmp_path) == before
    assert tune(tmp_path, *flags, "--confirm-seeds", "2") == 0


def test_confirmed_runs_have_the_agent_of_the_studys_start(tmp_path):
    agent = tmp_path / "mine.py"
    source = Path("agents/sac.py").read_bytes()
    agent.write_bytes(source)

    def edits(job):
        agent.write_bytes(source + b"# edited meanwhile\n")
        yield from train(job)

    FakeProcesses.fates = {0: edits}
    assert tune(tmp_path, str(agent), "--trials", "1") == 0
    copies = [*tmp_path.glob("studies/mine/confirmed/*/mine.py")]
    assert len(copies) == 3 and all(copy.read_bytes() == source for copy in copies)
    assert all(job.source == source for job in FakeProcesses.given)


def test_a_study_starts_from_the_weights_of_one_seed_and_tells_its_best_settings(tmp_path, capsys):
    runs = ["--runs", str(tmp_path)]
    argv = [*SMALL[:6], "--steps", "20", "--log", "--eval-episodes", "1", "--name", "before", *runs]
    assert script.run(argv) == 0
    (run,) = tmp_path.glob("before-*")
    assert tune(tmp_path, "--trials", "1", "--init-from", str(run)) == 2
    assert "each trial has its own seeds, so give the folder of one" in capsys.readouterr().err
    seed = run / "Pendulum-v1/sac/seed_0"
    assert tune(tmp_path, "--trials", "1", "--init-from", str(seed)) == 0
    options, _ = parse_args(["--config", str(tmp_path / "studies/mine/best.json")])
    assert options.init_from == seed


def test_the_table_by_hand():
    """In 80 columns, with more parameters than would fit beside each other."""
    names = ("actor_lr", "qf_lr", "tau", "alpha", "gamma", "batch_size")
    searched = space.read([*(f"{name}=0:0.9" for name in names[:5]), "batch_size=int:2:64"],
                          load_agent("agents/sac.py").Config, "sac")
    config = dict.fromkeys(names[:5], 0.123456) | {"batch_size": 32}
    columns = [summary.Column("defaults", config, None, None, [1.0, 2.0, 3.0]),
               summary.Column("trial 7", config, 4.25, 6.0, [2.0, 3.0]),
               summary.Column("optimum of 9", config, 3.0, None, [5.0])]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary.table(searched, columns, 3))
    rows = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in (
        line.strip("│┃").split("│") for line in console.export_text().splitlines()
        if line.startswith("│"))}
    assert rows["qf_lr"] == ["0.123456"] * 3 and rows["batch_size"] == ["32"] * 3
    assert rows["tuned (posterior mean)"] == ["", "4.2", "3.0"]
    assert rows["observed in its trial"] == ["", "6.0", ""]
    assert rows["optimism (observed - confirmed)"] == ["", "3.5", ""]
    assert rows["confirmed, mean"] == ["2.0", "2.5", "5.0"] and rows["n"] == ["3", "2", "1"]
    assert rows["95% t interval"] == ["-0.5 to 4.5", "-3.9 to 8.9", "needs 2 seeds"]
    assert rows["P(better than defaults)"] == ["", "0.67", "1.00"]  # 4 of 6 pairs, ties by half


def test_tensorboard_has_a_row_and_a_curve_for_each_trial(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    runs = sorted((finished[0] / "studies/mine/tensorboard").iterdir())
    assert [run.name for run in runs] == [f"trial_{number:03}" for number in range(5)]
    for run, trial in zip(runs, trials(finished[0]), strict=True):
        events = EventAccumulator(str(run)).Reload()
        assert [e.step for e in events.Scalars("return/eval")] == list(range(10, 101, 10))
        assert events.Scalars("hparam/return_eval")[0].value == pytest.approx(trial.final, rel=1e-5)
        content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        info = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
        assert info.hparams["actor_lr"].number_value == trial.settings["actor_lr"]
        assert set(info.hparams) == {"actor_lr", "gamma", "state"}


def test_a_finished_study_trains_nothing_again(finished):
    folder, _ = finished
    before = trials(folder)
    assert tune(folder, "--trials", "5", "--tau", "0.01") == 0
    assert not FakeProcesses.given
    assert script.run(["--resume", str(folder / "studies/mine")], Tune, study_run.tune) == 0
    assert not FakeProcesses.given and trials(folder) == before


# Kills and other tuners


def test_checkpoints_that_a_kill_left_behind_are_removed(tmp_path):
    assert tune(tmp_path, "--trials", "2") == 0
    left = tmp_path / "studies/mine/trials/001/Pendulum-v1/sac/stack_2_3"
    left.mkdir()
    (left / "step_000000100.pt").touch()
    assert tune(tmp_path, "--trials", "2") == 0 and not left.exists()


def test_a_full_disk_is_told_in_a_line_and_the_study_goes_on(tmp_path, capsys, monkeypatch):
    synced, fsync = [], os.fsync

    def full(file):
        synced.append(file)
        if len(synced) == 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert tune(tmp_path, "--trials", "2") == 2
    err = capsys.readouterr().err
    assert "trials.jsonl': No space left on device" in err and err.count("\n") == 1
    assert tune(tmp_path, "--trials", "2") == 0
    assert [trial.state for trial in trials(tmp_path)] == ["completed"] * 2


def test_a_killed_study_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, capsys):
    """The fifth trial is the surrogate's; killed while the second runs, and just before the fifth
    ends: the same trials come of it, and none that had ended is given again."""
    assert tune(tmp_path / "whole", "--trials", "5") == 0
    whole = trials(tmp_path / "whole")
    for number, moment in enumerate((17, 58)):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch:
            patch.setattr(FakeProcesses, "killed_at", moment)
            patch.setattr(FakeProcesses, "told", 0)
            child = multiprocessing.get_context("fork").Process(
                target=tune, args=(folder, "--trials", "5"))
            child.start()
            child.join(60)
        assert child.exitcode == -signal.SIGKILL
        with (folder / "studies/mine/trials.jsonl").open("ab") as file:
            file.write(b'{"trial": 0, "st')
        ended = [t.number for t in trials(folder) if t.state != "running"]
        assert len(ended) == moment // 12
        FakeProcesses.given.clear()
        assert tune(folder, "--trials", "5") == 0
        assert trials(folder) == whole
        again = [job.seeds[0] // 2 for job in FakeProcesses.given
                 if job.seeds[0] < HELD_OUT]
        assert again == list(range(len(ended), 5))


def test_what_was_evaluated_but_not_journaled_before_a_kill_is_read_from_the_files(tmp_path):
    """The trial's last checkpoint was its end: its process has nothing to tell any more."""
    def silent(job):
        for _ in train(job):
            pass
        yield {"step": 100}

    FakeProcesses.fates = {1: silent}
    assert tune(tmp_path, "--trials", "3") == 0
    assert [trial.state for trial in trials(tmp_path)] == ["completed"] * 3
    assert len(trials(tmp_path)[1].evaluations) == 10


@pytest.mark.parametrize("torn", [1, 2])
def test_a_kill_between_two_lines_of_the_journal_loses_nothing(tmp_path, torn):
    """Before the line that says that the last trial has completed, or its last evaluation."""
    assert tune(tmp_path, "--trials", "2") == 0
    path, before = tmp_path / "studies/mine/trials.jsonl", trials(tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-torn]))
    assert trials(tmp_path)[1].state == "running"
    FakeProcesses.fates = {1: lambda job: iter([{"step": 100}])}  # it has nothing left to tell
    assert tune(tmp_path, "--trials", "2") == 0 and trials(tmp_path) == before


def test_a_second_tuner_on_a_study_is_refused(tmp_path, capsys):
    assert tune(tmp_path, "--trials", "1") == 0
    with contextlib.closing(Journal(tmp_path / "studies/mine/trials.jsonl")):
        before = contents(tmp_path)
        assert tune(tmp_path, "--trials", "2") == 2
    assert "another tuner is running on" in capsys.readouterr().err and contents(tmp_path) == before


def test_ctrl_c_leaves_a_study_that_goes_on(tmp_path, capsys):
    def interrupted(job):
        yield from train(job, 30)
        raise KeyboardInterrupt

    FakeProcesses.fates = {1: interrupted}
    assert tune(tmp_path, "--trials", "2") == 128 + signal.SIGINT
    assert [trial.state for trial in trials(tmp_path)] == ["completed", "running"]
    FakeProcesses.fates = {}
    assert tune(tmp_path, "--trials", "2") == 0
    assert not capsys.readouterr().err


# Bad input


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A study of one trial. Not to be written into."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(None):
        for module in (study, processes):
            patch.setattr(module, "Processes", FakeProcesses)
        patch.setattr(FakeProcesses, "given", [])
        assert tune(folder, "--trials", "1") == 0
    return folder


@pytest.mark.parametrize("flags, words", [
    ("--space actr_lr=0:1", r"--space actr_lr=0:1: agents/sac.py has no setting 'actr_lr'; did you"
                            r" mean actor_lr"),
    ("--space batch_size=8.5:64", r"batch_size must be int, not 8.5"),
    ("--space", r"--space is empty"),
    ("--space gamma=0.99:0.9", r"LOW must be below HIGH, not 0.99 and 0.9"),
    ("--space actor_lr=log:0:1e-2", r"a log scale needs LOW above 0, not 0"),
    ("--space gamma=0.9:1.5", r"sac.py on Pendulum-v1: gamma must lie in \[0, 1\], not 1.5"),
    ("--gamma 0.9 --space actor_lr=log:1e-5:1e-2", r"mine was started with space "
     r"actor_lr=log:1e-5:1e-1 gamma=0.9:0.99, not actor_lr=log:1e-5:1e-2; choose another --name"),
    ("--tau 0.5", r"mine was started with config tau=0.005, not tau=0.5; choose another"),
    ("--steps 200", r"mine was started with steps 100, not 200; choose another --name"),
    ("--trials 0", r"--trials must be at least 1, not 0"),
    ("--workers 0", r"--workers must be at least 1, not 0"),
    ("--confirm-seeds 0", r"--confirm-seeds must be at least 1, not 0"),
    ("--pruner mean", r"invalid choice 'mean' for argument '--pruner'"),
    ("--percentile 101", r"--percentile must lie in \[0, 100\], not 101.0"),
    ("--interval-steps 0", r"--interval-steps must be at least 1, not 0"),
    ("--patience 0", r"--patience must be at least 1, not 0"),
    ("--n-warmup-steps -1", r"--n-warmup-steps must be 0 or more, not -1"),
    ("--trials 500_001", r"--trials 500001 x --seeds 2 reaches the held-out seeds"),
    ("--env Pendulum-v1 MountainCarContinuous-v0", r"a study takes one --env, not Pendulum"),
    ("--no-log", r"--no-log"),
])
def test_bad_input_is_one_line_and_leaves_the_journal_alone(begun, capsys, flags, words):
    before = contents(begun)
    argv = [*SMALL, "--runs", str(begun), "--trials", "1"]
    argv += [] if "--space" in flags else SPACE
    assert script.run([*argv, *flags.split()], Tune, study_run.tune) == 2
    out, err = capsys.readouterr()
    assert re.search(words, err) and err.startswith("error: ") and err.count("\n") == 1
    assert not out and contents(begun) == before


def test_a_study_does_not_go_on_with_another_agent(tmp_path, capsys):
    path = tmp_path / "mine.py"
    source = Path("agents/sac.py").read_text()
    path.write_text(source)
    assert tune(tmp_path, str(path), "--trials", "1") == 0
    path.write_text(source + "\n# another\n")
    assert tune(tmp_path, str(path), "--trials", "2") == 2
    assert "differs from" in capsys.readouterr().err
    assert script.run(["--resume", str(tmp_path / "studies/mine")]) == 2
    assert "is a run of hypertune.py" in capsys.readouterr().err


def test_a_study_takes_a_runs_settings_but_not_its_name_and_seeds(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"options": {"name": "run", "seeds": 8, "steps": 70, "log": False},
                                "config": {"tau": 0.5}}))
    options, config = parse_args(["--config", str(path)], Tune)
    assert (options.name, options.seeds, options.steps, options.log) == (None, 2, 70, True)
    assert config["tau"] == 0.5


# With processes


@pytest.mark.parametrize("confirmation", ["fake", pytest.param("real", marks=pytest.mark.slow)])
def test_a_real_study_survives_the_kill_of_a_worker(tmp_path, monkeypatch, capfd, confirmation):
    """Its trial trains in processes; so do, where it is real, the three jobs that confirm."""
    monkeypatch.undo()
    if confirmation == "fake":
        monkeypatch.setattr(FakeProcesses, "given", [])
        monkeypatch.setattr(processes, "Processes", FakeProcesses)
    begun, give, receive = [], Processes.give, Processes.receive

    def note(self, key, job):
        begun.append(job)
        give(self, key, job)

    def kill_once(self, timeout=None):
        for key, message in receive(self, timeout):
            yield key, message
            if len(begun) == 1 and isinstance(message, dict) and message.get("step", 0) >= 50:
                os.kill(self.running[key][0].pid, signal.SIGKILL)
                time.sleep(0.1)
                begun.append(None)

    monkeypatch.setattr(Processes, "give", note)
    monkeypatch.setattr(Processes, "receive", kill_once)
    flags = ["--trials", "1", "--seeds", "1", "--confirm-seeds", "1", "--eval-every",
             "25"]
    assert tune(tmp_path, *flags) == 0
    (trial,) = trials(tmp_path)
    assert trial.state == "completed" and sorted(trial.evaluations) == [25, 50, 75, 100]
    assert "trial 0: its process ended with code -9; restarting" in capfd.readouterr().out
    folder = tmp_path / "studies/mine"
    assert begun[0] == begun[2] and not list(folder.glob("trials/*/*/*/stack*"))
    assert (folder / "study.png").exists() and (folder / "best.json").exists()


def test_the_ticks_of_a_log_axis_are_plain_numbers(tmp_path, monkeypatch):
    labels = []

    def savefig(figure, *_, **__):
        figure.canvas.draw()
        labels.extend(tick.get_text() for axis in figure.axes for tick in axis.get_xticklabels())

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    searched = space.read(["lr=log:1e-4:1e-2"], load_agent("agents/xqc.py").Config, "agents/xqc.py")
    trials = [Trial(n, {"lr": lr}, "completed", {10: [n, n + 1.0]})
              for n, lr in enumerate((1e-4, 1e-3, 1e-2))]
    DRAW(tmp_path / "study.png", searched, trials, "a study")
    assert "0.001" in labels and not any("$" in label for label in labels)
