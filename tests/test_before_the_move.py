"""Resume a run and a study that were written when lab/ had no subfolders. Their environment id has
the old module lab.probe_envs, now lab.envs.probes; 6 of the run's 60 steps are left."""

import json
import shutil
from pathlib import Path

import pytest

from lab import train
from lab.options import Tune
from lab.report import __main__ as report
from lab.training import checkpoint
from lab.training.recorder import read_metrics
from lab.tuning.run import tune
from lab.watch import __main__ as watch

pytestmark = pytest.mark.usefixtures("no_curves")
HERE = Path(__file__).with_name("before_the_move")
TARGET = "lab.probe_envs_lab_Target-v0/tiny"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(HERE / "run", "run")
    shutil.copy(HERE / "run/tiny.py", "tiny.py")
    return Path("run")


def test_an_old_run_goes_on_and_is_reported(run, capsys):
    stacks = sorted(run.glob("*/tiny/stack_0_1"))
    assert [checkpoint.load_latest(stack)["step"] for stack in stacks] == [54, 54]
    assert train.run(["--resume", str(run)]) == 0, capsys.readouterr().err
    assert "cannot be restored" not in capsys.readouterr().out
    for stack in stacks:
        assert checkpoint.load_latest(stack)["step"] == 60
        rows = read_metrics(stack.parent / "seed_1/metrics.jsonl")
        assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
        assert rows[-1]["debug/updates"] == 60
    assert report.main([str(run), "--out", "report"]) == 0
    assert "lab.probe_envs:lab/Target-v0" in Path("report/report.md").read_text()


@pytest.mark.slow
def test_an_old_run_goes_on_with_its_own_copy_of_the_agent(run, capsys):
    """The five methods of that time, while the agent beside the runs has changed."""
    shutil.copy(Path(__file__).parents[1] / "agents/sac.py", "tiny.py")
    assert train.run(["--resume", "run"]) == 2
    assert "(python learn_simple.py run/tiny.py --resume run)" in capsys.readouterr().err
    assert train.run(["run/tiny.py", "--resume", "run"]) == 0, capsys.readouterr().err
    stacks = list(run.glob("*/tiny/stack_0_1"))
    assert stacks
    for stack in stacks:
        assert checkpoint.load_latest(stack)["step"] == 60
        assert read_metrics(stack.parent / "seed_1/metrics.jsonl")[-1]["debug/updates"] == 60


@pytest.mark.slow
def test_an_old_study_goes_on_with_its_own_copy_of_the_agent(run, capsys):
    study = Path("runs/studies/before")
    shutil.copytree(HERE / "study", study)
    shutil.rmtree(study / "confirmed/defaults")
    Path("tiny.py").write_text("changed = True\n")
    begun_with = json.loads((study / "config.json").read_text())["options"]["agent"]
    assert train.run(["--resume", str(study)], Tune, tune) == 2
    assert f"(python hypertune.py {study}/tiny.py --resume {study})" in capsys.readouterr().err
    argv = [f"{study}/tiny.py", "--resume", str(study)]
    assert train.run(argv, Tune, tune) == 0, capsys.readouterr().err
    assert list(study.glob(f"confirmed/defaults/{TARGET}/seed_*"))
    assert json.loads((study / "config.json").read_text())["options"]["agent"] == begun_with


@pytest.mark.slow
def test_an_old_run_continues_with_an_agent_of_today_in_its_place(run, capsys):
    """One with STATE, where the old one saved itself; also in place of the run's copy of it."""
    text = Path("tiny.py").read_text()
    assert "    def state_dict" in text
    Path("tiny.py").write_text(text.partition("    def state_dict")[0].replace(
        "class Agent:\n", 'class Agent:\n    STATE = ("updates",)\n\n'))
    shutil.copy("tiny.py", run / "tiny.py")
    assert train.run(["--resume", str(run)]) == 0, capsys.readouterr().err
    for stack in sorted(run.glob("*/tiny/stack_0_1")):
        latest = checkpoint.load_latest(stack)
        assert latest["step"] == 60 and latest["agent"]["updates"].tolist() == [60, 60]
        rows = read_metrics(stack.parent / "seed_1/metrics.jsonl")
        assert [row["debug/updates"] for row in rows] == [10, 20, 30, 40, 50, 60]


def test_an_old_run_can_be_watched(run, monkeypatch, capsys):
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    folder = run / "torch_ContinuousCartPole-v1"
    assert watch.run([str(folder), "--episodes", "1", "--width", "50"]) == 0
    assert "after 54 steps of 60" in capsys.readouterr().out
    assert (folder / "tiny/watch.gif").exists()


def test_an_old_study_goes_on(run, capsys):
    shutil.copytree(HERE / "study", "runs/studies/before")
    shutil.rmtree("runs/studies/before/confirmed/defaults")  # which is what is left to do
    assert train.run(["--resume", "runs/studies/before"], Tune, tune) == 0, capsys.readouterr().err
    options = json.loads(Path("runs/studies/before/config.json").read_text())["options"]
    assert (options["pruner"], options["patience"]) == ("vizier", None), "the rule of that time"
    best = json.loads(Path("runs/studies/before/best.json").read_text())
    assert best["study"]["seeds"] == [1_000_000, 1_000_001] and len(best["study"]["confirmed"]) == 2
    assert list(Path("runs/studies/before/confirmed").glob(f"defaults/{TARGET}/seed_*"))
