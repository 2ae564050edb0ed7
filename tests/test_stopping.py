"""Runs that stop before their last step: --stop-at and --stop-plateau."""

import re
from types import SimpleNamespace

import pytest

from lab import train
from lab.command_line import parse_args
from lab.options import Simple, Tune
from lab.report import runs, warnings
from lab.stopping import reason_to_stop
from lab.training import recorder
from lab.training.job import make_jobs

pytestmark = pytest.mark.usefixtures("no_curves")
TINY = ["--actor-width", "8", "--qf-width", "8", "--batch-size", "8", "--steps", "60",
        "--eval-every", "20", "--eval-episodes", "1", "--log-every", "10", "--log"]


def stop(means, at=None, evals=1, plateau=None, rtol=0.01):
    rules = SimpleNamespace(stop_at=at, stop_at_evals=evals, stop_plateau=plateau, stop_rtol=rtol)
    return reason_to_stop(rules, means)


def test_a_run_without_a_rule_goes_on():
    assert stop([1.0, 1.0, 1.0]) is None


def test_the_return_has_to_be_reached_in_evaluations_in_a_row():
    assert stop([9.0], at=10) is None
    assert stop([10.0], at=10) == "return 10.0, at least 10"
    assert stop([10.0], at=10, evals=2) is None, "only one evaluation"
    assert stop([12.0, 9.0, 12.0], at=10, evals=2) is None, "not in a row"
    assert stop([9.0, 12.0, 11.0], at=10, evals=2) == (
        "return 11.0, at least 10 in 2 evaluations in a row")


def test_a_plateau_is_no_better_best_in_the_last_evaluations():
    assert stop([100.0, 90.0], plateau=2) is None, "no evaluation before the last two"
    assert stop([100.0, 90.0, 100.5], plateau=2), "0.5% above is not 1% above"
    assert stop([100.0, 90.0, 101.5], plateau=2) is None
    assert stop([100.0, 102.0, 90.0], plateau=2) is None, "the first of the two is the new best"
    assert stop([-100.0, -99.5], plateau=1), "1% of 100 above -100 is -99"
    assert stop([-100.0, -98.5], plateau=1) is None
    assert stop([0.0, 1e-9], plateau=1, rtol=0.0) is None


def run(tmp_path, *flags):
    assert train.run([*TINY, "--runs", str(tmp_path), *flags]) == 0
    [folder] = tmp_path.iterdir()
    return folder, folder / "Pendulum-v1/sac"


def steps(group):
    return [row["step"] for row in recorder.read_metrics(group / "seed_0/metrics.jsonl")]


def test_a_stopped_run_is_complete(tmp_path, capsys):
    folder, group = run(tmp_path, "--stop-at", "-1e9", "--stop-at-evals", "2", "--seeds", "3",
                        "--processes", "2")
    assert steps(group) == [10, 20, 30, 40]
    assert len(list(group.glob("stack_*"))) == 1, "one process has all seeds, whose mean counts"
    table = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "after at most 60 steps of each seed; Pendulum-v1, stopped at step 40: return" in table
    before = (group / "seed_2/metrics.jsonl").read_text()
    assert train.run(["--resume", str(folder)]) == 0, "resuming it trains no step"
    assert (group / "seed_2/metrics.jsonl").read_text() == before
    again = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert again[again.index("sac:"):] == table[table.index("sac:"):]


def test_the_report_says_where_and_why_it_stopped(tmp_path):
    folder, _ = run(tmp_path, "--stop-at", "-1e9")
    found = warnings.find(runs.load([str(folder)]))
    assert any(re.search(r"sac in Pendulum-v1 stopped at step 20: return -\d.*, at least -1e", line)
               for line in found)
    assert not any("unfinished" in line for line in found)


def test_a_kill_after_the_stop_was_decided_loses_nothing(tmp_path):
    folder, group = run(tmp_path, "--stop-at", "-1e9", "--stop-at-evals", "2",
                        "--checkpoint-every", "20")
    rows = recorder.read_metrics(group / "seed_0/metrics.jsonl")
    [last] = group.glob("stack_*/step_*40-*.pt")
    last.unlink()  # the file that says why it stopped is there, the checkpoint is not
    assert train.run(["--resume", str(folder)]) == 0
    again = recorder.read_metrics(group / "seed_0/metrics.jsonl")
    assert [row["return/eval"] for row in again if "return/eval" in row] == [
        row["return/eval"] for row in rows if "return/eval" in row]
    assert steps(group) == [10, 20, 30, 40]
    assert recorder.read_stop(group)["step"] == 40


def test_a_stop_at_the_last_step_is_a_finished_run(tmp_path):
    _, group = run(tmp_path, "--stop-at", "-1e9", "--stop-at-evals", "3")
    assert steps(group)[-1] == 60
    assert recorder.read_stop(group) is None


def test_a_run_with_a_rule_gets_no_more_seeds(tmp_path, capsys):
    """A stack of new seeds would stop by its own mean, and cut the others' results there."""
    folder, group = run(tmp_path, "--stop-at", "1e9")
    assert recorder.read_stop(group) is None
    assert train.run(["--resume", str(folder), "--seeds", "2"]) == 2
    assert "has a rule to stop, which needs the mean of all seeds" in capsys.readouterr().err
    assert not (group / "seed_1").exists()


@pytest.mark.parametrize("flags, line", [
    (["--stop-at-evals", "0"], "--stop-at-evals must be at least 1, not 0"),
    (["--stop-plateau", "0"], "--stop-plateau must be at least 1, not 0"),
    (["--stop-rtol", "-1"], "--stop-rtol must be 0 or more, not -1"),
    (["--failure-below", "nan"], "--failure-below must be a number, not nan"),
    (["--stop-at", "5", "--eval-env", "none"], "need evaluations: --eval-env must be own or same"),
])
def test_bad_rules_are_refused(flags, line, capsys):
    assert train.run(flags) == 2
    assert line in capsys.readouterr().err


def test_trials_stop_too():
    options, config = parse_args(["--stop-plateau", "3", "--stop-rtol", "0.1"], Tune)
    [job] = make_jobs(options, config, 1, None)
    assert (job.stop_plateau, job.stop_rtol) == (3, 0.1)
    assert len(make_jobs(Simple(seeds=4), {}, 2, None)) == 2, "without a rule seeds are shared out"
