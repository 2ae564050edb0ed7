"""A finished run that is made longer, or given more seeds: --resume --steps, --resume --seeds."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from lab import train as script
from lab.agent import build_agent, load_agent, restore_state, save_state
from lab.check.driver import drive, flat_state, make_steps, same
from lab.options import Simple, Tune, Vectorised
from lab.report import __main__ as report
from lab.training import checkpoint, recorder
from lab.tuning.run import tune
from tests.conftest import AGENTS, SMALL, spec_for, timeless

SAC = ("agents/sac.py --env Pendulum-v1 --actor-width 8 --qf-width 8 --batch-size 8 "
       "--learning-starts 4 --eval-every 40 --eval-episodes 1 --log-every 10 "
       "--checkpoint-every 20 --log --processes 1 --name a")


pytestmark = pytest.mark.usefixtures("jobs_here", "no_curves")


def run(folder, flags, kind=Simple):
    """-> the run folder."""
    assert script.run(f"{flags} --runs {folder}".split(), kind) == 0
    return max(folder.iterdir())


def resumed(path, flags, kind=Simple):
    return script.run(["--resume", str(path), *flags.split()], kind)


def forget(path, newest):
    """As if it was stopped before that checkpoint, but after another."""
    (file,) = path.glob(f"*/*/{newest}")
    file.unlink()
    assert list(file.parent.glob("step_*.pt"))


def state(path, stack="stack_0_1", env_id="Pendulum-v1", name="sac"):
    return checkpoint.load_latest(recorder.group_folder(path, env_id, name) / stack)


def rows(path, seed):
    return recorder.read_metrics(path / f"Pendulum-v1/sac/seed_{seed}/metrics.jsonl")


def unequal(one, other):
    one, other = (flat_state({k: x[k] for k in ("agent", "envs", "last_eval", "best")})
                  for x in (one, other))
    assert one.keys() == other.keys()
    return [name for name in one if not same(one[name], other[name])]


def test_a_longer_run_is_the_one_that_began_with_its_steps(tmp_path, capsys):
    """To the bit: the replay held the whole run, and nothing of the agent depends on its length."""
    whole = run(tmp_path / "whole", SAC + " --steps 120 --seeds 2")
    longer = run(tmp_path / "longer", SAC + " --steps 80 --seeds 2")
    assert state(longer)["agent"]["replay"]["rows"].shape[1] == 80
    capsys.readouterr()
    assert resumed(longer, "--steps 120") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "after 120 steps of each seed, extended at 80 steps" in out
    assert unequal(state(whole), state(longer)) == []
    for seed in (0, 1):
        assert [*map(timeless, rows(whole, seed))] == [*map(timeless, rows(longer, seed))]


@pytest.mark.slow
def test_it_says_so_and_can_be_extended_again_stopped_and_resumed(tmp_path, capsys):
    path = run(tmp_path, SAC + " --steps 40 --seeds 2")
    assert resumed(path, "--steps 80") == 0 and resumed(path, "--steps 120") == 0
    forget(path, "stack_0_1/step_*120-*.pt")
    assert resumed(path, "") == 0
    options = json.loads((path / "config.json").read_text())["options"]
    assert (options["steps"], options["extended"]) == (120, [40, 80])
    whole = run(tmp_path / "whole", SAC + " --steps 120 --seeds 2")
    assert unequal(state(whole), state(path)) == []
    capsys.readouterr()
    assert report.main([str(path), "--out", str(tmp_path / "report")]) == 0
    told = (tmp_path / "report/report.md").read_text()
    assert f"a was extended at 40 and 80 steps ({path})" in told.replace("\\_", "_")
    new = run(tmp_path / "new", f"--config {path}/config.json --steps 20 --seeds 1 --log")
    assert json.loads((new / "config.json").read_text())["options"]["extended"] == []


def test_a_longer_schedule_anneals_to_the_new_end(tmp_path):
    """The step size of PPO's last update, in rollouts of 32 steps; the fourth is not learned."""
    flags = ("agents/ppo.py --env Pendulum-v1 --num-envs 2 --num-steps 16 --num-minibatches 2 "
             "--update-epochs 1 --width 8 --eval-episodes 1 --log --name a --steps 64 --seeds 1 "
             "--anneal-lr")
    path = run(tmp_path, flags, Vectorised)
    assert resumed(path, "--steps 128", Vectorised) == 0
    lr = state(path, "stack_0_0", name="ppo")["agent"]["optimizer"]["param_groups"][0]["lr"]
    assert float(lr) == pytest.approx(3e-4 * (1 - 64 / 128))  # of the third rollout, from step 64


def test_more_seeds_in_new_stacks(tmp_path, capsys):
    path = run(tmp_path, SAC + " --steps 40 --seeds 2")
    before = {file: file.read_bytes() for file in path.rglob("stack_0_1/*.pt")}
    capsys.readouterr()
    assert resumed(path, "--seeds 4") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(f"{seed}:-" in out for seed in range(4)) and "extended" not in out
    assert {file: file.read_bytes() for file in path.rglob("stack_0_1/*.pt")} == before
    other = run(tmp_path / "other", SAC + " --steps 40 --seeds 2 --first-seed 2")
    assert unequal(state(other, "stack_2_3"), state(path, "stack_2_3")) == []
    assert json.loads((path / "config.json").read_text())["options"]["seeds"] == 4
    assert report.main([str(path), "--out", str(tmp_path / "report")]) == 0
    assert "3: -" in (tmp_path / "report/report.md").read_text()
    forget(path, "stack_2_3/step_*40-*.pt")  # it is stopped, and goes on
    assert resumed(path, "") == 0
    assert unequal(state(other, "stack_2_3"), state(path, "stack_2_3")) == []
    assert {folder.name for folder in path.glob("*/*/stack_*")} == {"stack_0_1", "stack_2_3"}
    assert resumed(path, "--seeds 5 --steps 80") == 0
    assert {folder.name for folder in path.glob("*/*/stack_*")} == {
        "stack_0_1", "stack_2_3", "stack_4_4"}
    assert [state(path, stack)["step"] for stack in ("stack_0_1", "stack_4_4")] == [80, 80]


@pytest.mark.parametrize("flags, words", [
    ("--steps 39", "has 40 steps: --steps 39 would be fewer"),
    ("--seeds 1", "has 2 seeds: --seeds 1 would be fewer"),
    ("--steps 1.5", "1.5 is not a whole number"),
    ("--gamma 0.9", "give no other flag but --engine and --address and --steps and --seeds")])
def test_fewer_is_one_line(finished, capsys, flags, words):
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    assert resumed(finished, flags) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*")} == before


def test_an_environment_that_never_began_is_finished_first(finished, capsys, tmp_path):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    path = copy / "config.json"
    content = json.loads(path.read_text())
    content["options"]["env"] = ["Pendulum-v1", "MountainCarContinuous-v0"]
    path.write_text(json.dumps(content))
    assert resumed(copy, "--steps 80") == 2
    assert "MountainCarContinuous-v0/sac is at step 0 of 40: finish" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs"), SAC + " --steps 40 --seeds 2")


def test_an_unfinished_run_is_finished_first(finished, capsys, tmp_path):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    forget(copy, "stack_0_1/step_*40-*.pt")
    assert resumed(copy, "--steps 80") == 2
    assert re.search(r"stack_0_1 is at step 20 of 40: finish the run first, with --resume alone",
                     capsys.readouterr().err)
    assert json.loads((copy / "config.json").read_text())["options"]["steps"] == 40


@pytest.mark.parametrize("path", [
    pytest.param(path, marks=[] if path.stem in ("sac", "ppo") else [pytest.mark.slow])
    for path in AGENTS], ids=[path.stem for path in AGENTS])
def test_the_first_actions_stay_those_of_the_shorter_run(path):
    """With 40 steps, learning starts at 4 of them; with 4000 it would at 400."""
    spec = spec_for(load_agent(path))
    config = {k: v for k, v in (SMALL | {"learning_starts": 1000}).items()
              if k in build_agent(path, {}, spec, [0], 1, 1, "cpu", lambda f: f
                                  ).config.__dataclass_fields__}
    short, longer = (build_agent(path, config, spec, [0, 1], 4, steps, "cpu", lambda f: f)
                     for steps in (40, 4000))
    drive(short, make_steps([0, 1], 4, 10))
    restore_state(longer, save_state(short))
    history = drive(longer, make_steps([0, 1], 4, 10))
    assert history
    if hasattr(longer, "replay"):
        assert len(history) == 10
        assert (longer.replay.size, longer.replay.position) == (80, 80)
        assert torch.equal(longer.replay.rows[:, :40], short.replay.rows)


def test_a_replay_that_is_not_full_yet_grows_too():
    """If the newest checkpoint is damaged, the one before it is loaded."""
    path, spec = "agents/sac.py", spec_for(load_agent("agents/sac.py"))
    short, longer = (build_agent(path, {}, spec, [0, 1], 4, steps, "cpu", lambda f: f)
                     for steps in (40, 4000))
    short.replay.rows.normal_()
    short.replay.size = short.replay.position = 24
    restore_state(longer, save_state(short))
    assert (longer.replay.size, longer.replay.position) == (24, 24)
    assert torch.equal(longer.replay.rows[:, :24], short.replay.rows[:, :24])


def test_a_replay_without_a_position_cannot_grow():
    class Replay:
        STATE = ("rows",)

        def __init__(self, rows):
            self.rows = torch.zeros(2, rows, 3)

    class Agent:
        STATE = ("replay",)

        def __init__(self, rows):
            self.replay = Replay(rows)

    with pytest.raises(ValueError, match="the replay cannot grow: it needs a size"):
        restore_state(Agent(8), save_state(Agent(4)))


@pytest.mark.slow
def test_a_studys_confirmed_runs_can_be_made_longer(tmp_path, capsys):
    flags = ("agents/sac.py --env Pendulum-v1 --actor-width 8 --qf-width 8 --learning-starts 4 "
             "--space batch_size=int:8:16 --trials 1 --seeds 1 --steps 20 --eval-episodes 1 "
             f"--confirm-seeds 2 --workers 1 --name study --runs {tmp_path}")
    assert script.run(flags.split(), Tune, tune) == 0
    confirmed = tmp_path / "studies/study/confirmed/defaults"
    before = (tmp_path / "studies/study/best.json").read_text()
    assert resumed(confirmed, "--steps 40") == 0, capsys.readouterr().err
    (stack,) = confirmed.glob("*/*/stack_*")
    assert checkpoint.load_latest(stack)["step"] == 40
    assert script.run(["--resume", str(tmp_path / "studies/study")], Tune, tune) == 0
    assert Path(tmp_path / "studies/study/best.json").read_text() == before


def test_more_seeds_than_the_run_it_starts_from_are_refused_before_anything_changes(
        finished, capsys, tmp_path):
    path = run(tmp_path, SAC + f" --steps 20 --seeds 2 --init-from {finished}")
    before = (path / "config.json").read_text()
    assert resumed(path, "--seeds 3") == 2
    assert "has no seed 2 to start from" in capsys.readouterr().err
    assert (path / "config.json").read_text() == before and resumed(path, "") == 0
    shutil.copytree(finished, tmp_path / "source")
    path = run(tmp_path / "b", SAC + f" --steps 20 --seeds 2 --init-from {tmp_path / 'source'}")
    shutil.rmtree(tmp_path / "source")
    assert resumed(path, "--steps 40") == 0, "its seeds have begun"


def test_a_run_whose_seeds_all_failed_gets_others(finished, tmp_path, capsys):
    """Its replay is not full, so it could not grow."""
    path = Path(shutil.copytree(finished, tmp_path / "run"))
    stack = recorder.group_folder(path, "Pendulum-v1", "sac") / "stack_0_1"
    broken = state(path) | {"step": 20, "failed": [0, 1]}
    broken["agent"]["replay"]["size"] = 20
    for file in stack.glob("step_*"):
        file.unlink()
    checkpoint.save(stack, 20, broken)
    assert resumed(path, "--steps 80 --seeds 3") == 1
    assert capsys.readouterr().err.count("failed before") == 2
    assert state(path, "stack_2_2")["step"] == 80
