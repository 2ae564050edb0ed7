"""Environments as people have them: each kind of docs/reliability.md's second table."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config

from lab.agent import load_agent
from lab.envs import check
from lab.envs.base import EVALUATION, TRAINING
from lab.envs.make import make_envs
from lab.envs.spec import make_one, probe
from lab.errors import CodeError, UserError
from lab.options import Simple
from lab.train import run
from lab.training import loop
from lab.training.job import Job
from lab.watch import camera

PPO = "agents/ppo.py"
SHORT = ("--steps=128", "--num-steps=32", "--num-minibatches=2", "--update-epochs=1",
         "--eval-episodes=1")


def field(name):
    return f"tests.field_envs:field/{name}-v0"


def command(capfd, *argv):
    """-> exit code, stdout, stderr."""
    code = run([PPO, *SHORT, *argv], Simple)
    return code, *capfd.readouterr()


def make_job(name, **settings):
    config = dataclasses.asdict(small_config(load_agent(PPO)))
    return Job(**{"agent_path": PPO, "config": config, "env_id": field(name), "seeds": (0, 1),
                  "steps": 64, "eval_every": 32, "log_every": 8, "checkpoint_every": 0,
                  "eval_episodes": 1} | settings)


def rows_and_failures(job):
    messages = []
    loop.train(job, messages.append)
    rows = {(seed, message["step"]): {k: v for k, v in row.items() if "perf" not in k}
            for message in messages for seed, row in message.get("rows", {}).items()}
    return rows, [m for m in messages if "failed_seed" in m]


@contextlib.contextmanager
def stack(name, *args, **settings):
    with contextlib.closing(make_envs(field(name), *args, **settings)) as envs:
        yield envs


# What an environment returns


REFUSED = {
    "ResetObsOnly": r"reset should return \(obs, info\), but returned an array of shape \(2,\)",
    "OldReset": r"reset should take \(\*, seed=None, options=None\): .*keyword argument 'seed'",
    "ShortObs": r"reset returned as observation an array of shape \(1,\).*numbers of shape \(2,\)",
    "TextObs": r"reset returned as observation \['far', 'near'\] \(a list\).*shape \(2,\)",
    "NanObs": "reset returned an observation with nan at index 1; it should be finite",
    "RewardArray": r"step returned as reward an array of shape \(1,\).*should be a number",
    "RewardNone": "step returned as reward None; it should be a number",
    "RewardInf": "step returned the reward inf; it should be finite",
    "EndArray": r"step returned as terminated an array of shape \(1,\).*should be True or False",
    "EndNone": "step returned as truncated None; it should be True or False",
    "FourValues": r"step should return \(obs, reward, terminated, truncated, info\)",
    "Norm": "wrapped in NormalizeObservation, whose running statistics .*--norm-obs",
    "NormReward": "wrapped in NormalizeReward, whose running statistics .*--norm-reward",
    "Integers": r"action space Box\(-2, 2, \(1,\), int64\); .* one-dimensional Box of floats",
    "NoRoom": r"action 0 has bounds \[1.0, 1.0.*the low bound must be below",
    "OnlyOne": "cannot be made twice at a time.*ValueError: port 2000 is in use",
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_environment_that_cannot_be_trained_on_is_one_line_and_nothing_is_written(
        name, tmp_path, capfd):
    code, out, err = command(capfd, "--env", field(name), "--log", "--runs", str(tmp_path / "r"))
    assert (code, out) == (2, "") and not list(tmp_path.iterdir())
    assert err.startswith("error: ") and err.count("\n") == 1
    with pytest.raises(UserError, match=f"^{field(name)}.*{REFUSED[name]}"):
        check.dry_run(field(name))


def test_the_dry_run_accepts_what_the_interface_allows():
    for name in ("Point", "Lists", "NoRandom", "NormFrozen"):
        spec, warnings = check.dry_run(field(name))
        assert (spec.obs_dim, spec.action_dim, warnings) == (2, 1, [])
    assert rows_and_failures(make_job("Lists"))[1] == []


def test_the_dry_run_has_no_complaint_about_gymnasiums_own_environments():
    for env_id in ("HalfCheetah-v5", "Humanoid-v5", "BipedalWalker-v3", "Pendulum-v1",
                   "LunarLanderContinuous-v3"):
        assert check.dry_run(env_id)[1] == []


@pytest.mark.parametrize("name", ["ResetObsOnly", "ShortObs", "RewardArray", "EndNone"])
@pytest.mark.parametrize("backend", ["sync", "workers"])
def test_without_a_dry_run_the_first_step_says_the_same(name, backend):
    with (pytest.raises(UserError, match=REFUSED[name].split(" returned")[0]),
          stack(name, [0], 2, backend=backend, workers=1) as envs):
        envs.reset()
        envs.step(torch.zeros(1, 2, 1))


@pytest.mark.parametrize("name, words", [
    ("LateShortObs", r"step returned as observation an array of shape \(1,\)"),
    ("LateRewardArray", r"step returned as reward an array of shape \(1,\)"),
    ("LateEndsArrays", r"step returned as reward an array of shape \(1,\)")])
@pytest.mark.parametrize("num_envs, backend", [(1, "sync"), (3, "sync"), (2, "workers")])
def test_a_later_step_that_returns_something_else_is_named(name, words, num_envs, backend):
    assert check.dry_run(field(name))[1] == []
    with stack(name, [0], num_envs, backend=backend, workers=2) as envs:
        envs.reset()
        for _ in range(19):
            envs.step(torch.zeros(1, num_envs, 1))
        with pytest.raises(UserError, match=words):
            envs.step(torch.zeros(1, num_envs, 1))


@pytest.mark.parametrize("name, value", [("LateNan", r"observation\[1\] = nan"),
                                         ("LateInf", "reward = inf")])
@pytest.mark.parametrize("backend", ["sync", "workers"])
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_a_value_that_is_not_finite_fails_its_seed_and_names_the_environment(name, value, backend):
    job = make_job(name, backend=backend, workers=2)
    rows, failures = rows_and_failures(job)
    assert [(m["failed_seed"], m["step"]) for m in failures] == [(1, 20)]
    assert value.replace("\\", "") in failures[0]["reason"]
    assert failures[0]["reason"].endswith("at step 20")
    assert {step for seed, step in rows if seed == 0} == set(range(8, 65, 8))
    assert {step for seed, step in rows if seed == 1} == {8, 16}


def test_a_torch_environment_whose_state_turns_nan_is_named():
    with contextlib.closing(make_envs("torch/Pendulum-v1", [0, 1], 2)) as envs:
        envs.reset()
        envs.state[1, 0] = torch.nan
        envs.step(torch.zeros(2, 2, 1))
        envs.finished()
        assert list(envs.broken) == [1]


# Seeds


@pytest.mark.parametrize("name", ["GlobalNumpy", "GlobalPython"])
def test_an_environment_on_a_global_generator_repeats_with_a_warning(name):
    (warning,) = check.dry_run(field(name))[1]
    assert "global random generators" in warning and "share its process" in warning
    first, second = (rows_and_failures(make_job(name))[0] for _ in range(2))
    assert first == second and first


@pytest.mark.parametrize("name", ["GlobalNumpy", "GlobalPython"])
@pytest.mark.parametrize("settings", [{"backend": "sync"}, {"backend": "workers", "workers": 2},
                                      {"backend": "workers", "workers": 2, "groups": 2}])
def test_each_process_seeds_its_global_generators_at_a_reset(name, settings):
    starts = []
    for _ in range(2):
        with stack(name, [0, 1], 2, **settings) as envs:
            starts += [envs.reset(*s) for s in ((TRAINING, 0), (EVALUATION, 0), (TRAINING, 0))]
    assert torch.equal(torch.stack(starts[:3]), torch.stack(starts[3:]))
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])
    assert len(set(starts[0][..., 0].flatten().tolist())) == 4


def test_evaluation_and_dry_runs_leave_the_global_generators_alone():
    few, many = (rows_and_failures(make_job("GlobalNumpy", eval_every=n))[0] for n in (8, 64))
    assert all(few[key].items() >= row.items() for key, row in many.items())
    before = np.random.get_state()[1].tolist()
    check.dry_run(field("GlobalNumpy"))
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("name, where", [
    ("Unseeded", "two episodes with seed 0 and the same actions differ in their first obs"),
    ("NoisySteps", "two episodes with seed 0 and the same actions differ at step 3"),
    ("FreshSeeds", "the next ones (reset without a seed) differ in their first observations")])
def test_an_environment_that_does_not_repeat_is_a_warning(name, where, capfd):
    (warning,) = check.dry_run(field(name))[1]
    assert "is not reproducible" in warning and where in warning
    code, _, err = command(capfd, "--env", field(name))
    assert code == 0 and f"warning: {warning}" in err


@pytest.mark.parametrize("name", ["RandomState", "NoRandom"])
def test_an_environment_without_numpys_generator_trains_and_resumes_with_new_episodes(
        name, tmp_path):
    messages = []
    job = make_job(name, steps=256, checkpoint_every=128, run=str(tmp_path))
    loop.train(job, messages.append)
    warnings = {m["warning"] for m in messages if "warning" in m}
    assert warnings == {"the environment cannot be restored: a resumed run starts new episodes"}


# Spaces and wrappers


def test_a_wrapped_environment_has_the_limit_that_ends_its_episodes():
    assert probe(field("Point")).max_episode_steps == 100
    assert probe(field("Looks")).max_episode_steps == 50
    assert probe(field("Inner")).max_episode_steps == 100
    assert rows_and_failures(make_job("Looks"))[1] == []


def test_bounds_of_the_largest_float_are_infinite():
    assert probe(field("LargestBounds")).action_high == (np.inf,)
    with pytest.raises(UserError, match=r"sac.py on .*LargestBounds-v0: .*finite"):
        agent = load_agent("agents/sac.py")
        config = dataclasses.asdict(small_config(agent))
        loop.train(make_job("LargestBounds", agent_path="agents/sac.py", config=config), print)


# Code that raises


RAISES = {
    "Init": "RuntimeError: no simulator is running",
    "NeedsPackage": "ModuleNotFoundError: No module named 'a_simulator_that_is_not_installed'",
    "BadSetting": "ValueError: robot 'ur5' has no gripper 'x'",
    "Step": "KeyError: 'gripper'",
    "Close": "RuntimeError: the simulator is gone",
}


@pytest.mark.parametrize("name", [*RAISES, "Argument"])
def test_code_that_raises_is_named_with_its_place_below_its_traceback(name, tmp_path, capfd):
    code, out, err = command(capfd, "--env", field(name), "--log", "--runs", str(tmp_path / "r"))
    assert (code, out) == (2, "") and not list(tmp_path.iterdir())
    traceback, _, line = err.rstrip().rpartition("\n")
    assert "Traceback" in traceback and line.startswith("error: ") and field(name) in line
    if name == "Argument":
        assert "TypeError: Argument.__init__() missing 1 required positional argument" in line
        return
    assert line.endswith(RAISES[name])
    source = Path("tests/field_envs.py").read_text().splitlines()
    number = int(line.split("field_envs.py:")[1].split(":")[0])
    assert source[number - 1].strip().startswith(("raise", "import"))


@pytest.mark.parametrize("text, words", [
    ("class E(object", r"broken.py:1: SyntaxError: '\(' was never closed"),
    ("\nraise RuntimeError('set SIM_HOME first')", "broken.py:2: RuntimeError: set SIM_HOME first"),
    ("import sys; sys.exit('no licence')", "broken.py:1: SystemExit: no licence"),
    ("import no_such_package", "broken.py:1: ModuleNotFoundError: No module named 'no_such")])
def test_a_module_that_cannot_be_imported_gives_its_reason(text, words, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CodeError, match=f"cannot make environment 'broken:X-v0': .*{words}"):
        make_one("broken:X-v0")


def test_a_module_that_is_not_there_is_no_code_error():
    for env_id in ("no_such_module:X-v0", "tests.no_such_module:X-v0"):
        with pytest.raises(UserError) as caught:
            make_one(env_id)
        assert str(caught.value).startswith(f"cannot make environment '{env_id}': No module")
        assert not isinstance(caught.value, CodeError)


def test_an_environment_for_vectors_alone_is_not_called_unknown():
    with pytest.raises(UserError, match=r"OnlyVectors-v0': .*entry_point is not specified"):
        make_one(field("OnlyVectors"))


# Processes and directories


def test_an_environment_may_start_a_process_in_a_worker():
    with stack("Spawns", [0], 4, backend="workers", workers=2) as envs:
        envs.reset()
        assert torch.isfinite(envs.step(torch.zeros(1, 4, 1)).next_obs).all()


def test_paths_are_those_of_the_command_whatever_the_environment_changes(
        tmp_path, monkeypatch, capfd):
    here = Path.cwd()
    (tmp_path / "agents").symlink_to(here / "agents")
    monkeypatch.syspath_prepend(here)
    monkeypatch.chdir(tmp_path)
    argv = "--env", field("Chdir"), "--log", "--seeds", "2", "--name", "moved"
    assert command(capfd, *argv, "--processes", "1")[0] == 0
    assert Path.cwd() == tmp_path
    (folder,) = (tmp_path / "runs").iterdir()
    for seed in (0, 1):
        rows = next(folder.glob(f"*/ppo/seed_{seed}")).joinpath("metrics.jsonl").read_text()
        assert json.loads(rows.splitlines()[-1])["step"] == 128
    assert (folder / "learning_curves.png").exists() and any(folder.glob("*/ppo/stack_0_1/*.pt"))


# Pictures


def picture_of(name):
    one = camera.make(field(name))
    one.reset()
    return one.frame()


@pytest.mark.parametrize("name", ["Floats", "Grey", "Rgba"])
def test_pictures_of_floats_of_grey_and_with_alpha_are_shown(name):
    frame = picture_of(name)
    assert frame.shape == (8, 8, 3) and frame.dtype == np.uint8
    assert Counter(frame.flatten().tolist()) == {204: 8 * 8 * 3}


def test_what_is_no_picture_is_named_with_its_shape():
    with pytest.raises(UserError, match=r"not an array of shape \(2, 8, 8, 3\) and type float64"):
        picture_of("NoPicture")


def test_what_an_environment_prints_does_not_hide_the_reason():
    with pytest.raises(UserError) as caught:
        camera.check(field("Talks"))
    assert str(caught.value) == (f"{field('Talks')} cannot be rendered: it has no render mode "
                                 '"rgb_array"')


def test_the_checks_do_not_import_torch():
    code = "import sys, lab.envs.check, tests.field_envs; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ)
    assert done.stdout == "False\n"
