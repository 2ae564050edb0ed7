"""Environments as people have them: each kind of docs/reliability.md's second table."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.wrappers import FlattenObservation, FrameStackObservation

from lab import train
from lab.agent import load_agent
from lab.command_line import parse_args
from lab.envs import check, spec
from lab.envs.host import SyncEnvs
from lab.envs.make import make_envs
from lab.envs.shard import EVALUATION, TRAINING
from lab.envs.spec import make_one, probe
from lab.errors import CodeError, UserError
from lab.options import Simple, Tune, Vectorised
from lab.plan import benchmark
from lab.report import __main__ as report
from lab.train import run
from lab.training import checkpoint, logger, loop
from lab.training.job import Job, dry_run, make_jobs
from lab.training.recorder import read_metrics
from lab.tuning import run as tuning
from lab.watch import camera
from tests import field_envs
from tests.conftest import small_config, timeless

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
                  "steps": 64, "eval_every": 64, "log_every": 8, "checkpoint_every": 0,
                  "eval_episodes": 1} | settings)


def rows_and_failures(job):
    messages = []
    loop.train(job, messages.append)
    rows = {(seed, message["step"]): timeless(row)
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
    "OnlyOne": "cannot be made twice at a time: ValueError: port 2000 is in use; use --eval-env",
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


def test_an_environment_without_a_time_limit_is_named_before_the_run(capsys):
    for name, words in (("Point", ""), ("Endless", "Endless-v0 has no time limit")):
        options, config = parse_args(["--env", field(name)])
        dry_run(make_jobs(options, config, 1, None)[0])
        err = capsys.readouterr().err
        assert words in err and bool(words) == bool(err)


def test_the_dry_run_has_no_complaint_about_gymnasiums_own_environments():
    for env_id in ("HalfCheetah-v5", "Humanoid-v5", "BipedalWalker-v3", "Pendulum-v1",
                   "LunarLanderContinuous-v3"):
        assert check.dry_run(env_id)[1] == []


@pytest.mark.parametrize("name", ["ResetObsOnly", "ShortObs", "RewardArray", "EndNone"])
@pytest.mark.parametrize("backend", ["sync", "workers"])
def test_without_a_dry_run_the_first_step_says_the_same(name, backend):
    with (pytest.raises(UserError, match=REFUSED[name]),
          stack(name, [0], 2, backend=backend, workers=1) as envs):
        envs.reset()
        envs.step(torch.zeros(1, 2, 1))


@pytest.mark.parametrize("name, words", [
    ("LateShortObs", r"step returned as observation an array of shape \(1,\)"),
    ("LateRewardArray", r"step returned as reward an array of shape \(1,\)"),
    ("LateRewardText", "step returned as reward '?1.0"),
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


def test_a_run_ends_when_no_seed_is_left_and_so_does_its_resumption(tmp_path):
    job = make_job("LateNan", seeds=(1,), run=str(tmp_path))
    for _ in range(2):
        messages = []
        loop.train(job, messages.append)
        assert sum("failed_seed" in m for m in messages) == 1
    state = checkpoint.load_latest(job.checkpoints)
    assert (state["step"], state["failed"]) == (20, [0])


def test_an_environment_that_refuses_its_replay_starts_anew():
    with stack("Refuses", [0, 1], 1) as envs, stack("Refuses", [0, 1], 1) as again:
        envs.reset(TRAINING, 0)
        for _ in range(120):
            envs.step(torch.rand(2, 1, 1))
        assert envs.can_restore_exactly() is False
        obs, lost = again.load_state_dict(envs.state_dict(), TRAINING, 120)
        assert lost == 2 and obs.isfinite().all()
        assert again.step(torch.rand(2, 1, 1)).obs.isfinite().all()


def test_an_environment_is_closed_once():
    messages = []
    loop.train(make_job("ClosesOnce", eval_env="same"), messages.append)
    assert not any("failed_seed" in m for m in messages)


@pytest.mark.parametrize("outside, known", [(False, True), (True, False)])
def test_a_mask_that_a_wrapper_moves_is_refused(outside, known):
    def make():
        env = FlattenObservation(field_envs.Masked())
        return FlattenObservation(FrameStackObservation(env, 3)) if outside else env

    if known:
        assert spec.find_mask(make(), "e", 2) == 0
    else:
        with pytest.raises(UserError, match="FrameStackObservation changes the observation that"):
            spec.find_mask(make(), "e", 2)


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


@pytest.mark.parametrize("settings", [{"backend": "sync"}, {"backend": "workers", "workers": 2},
                                      {"backend": "workers", "workers": 2, "groups": 2}])
def test_each_process_seeds_its_global_generators_at_a_reset(settings):
    starts = []
    for _ in range(2):
        with stack("GlobalBoth", [0, 1], 2, **settings) as envs:
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
    if name == "Unseeded":
        code, _, err = command(capfd, "--env", field(name))
        assert code == 0 and f"warning: {warning}" in err


@pytest.mark.parametrize("name", ["RandomState", "NoRandom"])
def test_an_environment_without_numpys_generator_trains_and_resumes_with_new_episodes(
        name, tmp_path):
    messages = []
    job = make_job(name, steps=130, eval_every=130, run=str(tmp_path))  # amid second episodes
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


# A simulator that runs once


@pytest.fixture
def only_one():
    """Whatever a test before left open."""
    field_envs.OnlyOne.running.clear()
    yield field("OnlyOne")
    assert not field_envs.OnlyOne.running


def rows_of(folder):
    return [timeless(row)
            for row in read_metrics(next(folder.glob("*/ppo/seed_0")) / "metrics.jsonl")]


@pytest.mark.parametrize("eval_env, kind", [("same", "evaluation"), ("none", "training")])
def test_a_simulator_that_runs_once_is_trained_resumed_and_reported(
        only_one, eval_env, kind, tmp_path, capfd):
    """To the bit, with one instance in the whole process."""
    argv = ["--env", only_one, "--eval-env", eval_env, "--eval-every=150", "--steps=300", "--log",
            "--runs", str(tmp_path)]
    code, out, _ = command(capfd, *argv)
    assert code == 0 and f"ppo: {kind} return after 300 steps of each seed" in " ".join(out.split())
    (whole,) = tmp_path.iterdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.SweepProgress, "update", interrupt_at(220))  # amid an episode
        assert command(capfd, *argv)[0] == 128 + signal.SIGINT
    (killed,) = set(tmp_path.iterdir()) - {whole}
    assert rows_of(killed)[-1]["step"] < 240
    assert run(["--resume", str(killed)]) == 0 and "again" not in capfd.readouterr().out
    rows = rows_of(whole)
    assert rows_of(killed) == rows and rows[-1]["step"] == 300
    tag = "return/eval" if eval_env == "same" else "return/recent"
    assert {name for row in rows for name in row if "return" in name} == {"return/train", tag}
    assert [row["step"] for row in rows if tag in row] == [150, 300]
    assert report.main([str(whole), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report/report.md").read_text()
    assert ("(training returns) | ppo | 1 | 300 |" in text) == (eval_env == "none")
    assert ("was evaluated in the environments of training" in text) == (eval_env == "same")


def interrupt_at(step):
    def update(self, index, message):
        if message.get("step", 0) >= step:
            os.kill(os.getpid(), signal.SIGINT)

    return update


def test_without_evaluation_the_return_is_the_mean_of_the_episodes_since_the_last_one(only_one):
    job = make_job("OnlyOne", seeds=(0,), eval_env="none", steps=500, eval_every=250, log_every=1)
    rows, _ = rows_and_failures(job)
    ends = {step: row["return/train"] for (_, step), row in rows.items() if "return/train" in row}
    assert list(ends) == [100, 200, 300, 400, 500]
    recent = {step: row["return/recent"] for (_, step), row in rows.items()
              if "return/recent" in row}
    assert recent == {250: pytest.approx((ends[100] + ends[200]) / 2),
                      500: pytest.approx((ends[300] + ends[400] + ends[500]) / 3)}


@pytest.mark.parametrize("backend", ["sync", "workers"])
def test_an_evaluation_in_the_environments_of_training_lies_between_their_episodes(backend):
    """Its returns are raw, and training goes on with what the environments show."""
    actions = torch.full((2, 2, 1), 0.5)
    settings = {"backend": backend, "workers": 2, "clip_reward": (-0.1, 0.1)}
    with stack("Point", [0, 1], 2, **settings) as envs, stack("Point", [0, 1], 2) as fresh:
        envs.reset(TRAINING, 0)
        assert not envs.step(actions).truncations.any()
        envs.cut = True
        t = envs.step(actions)
        assert t.truncations.all() and envs.finished()[0].episodes == 0
        with envs.lend(TRAINING, 2):
            envs.reset(EVALUATION, 2)
            evaluated = [envs.step(actions) for _ in range(100)]
            assert not evaluated[0].truncations.any() and evaluated[-1].truncations.all()
            assert torch.stack([each.rewards for each in evaluated]).min() < -0.1
        assert torch.equal(t.obs, fresh.reset(TRAINING, 2)) and envs.finished()[0].episodes == 0
        after, expected = envs.step(actions), fresh.step(actions)
        assert torch.equal(after.next_obs, expected.next_obs) and not after.truncations.any()
        assert torch.equal(after.rewards, expected.rewards.clamp(-0.1, 0.1))


def test_training_is_truncated_where_an_evaluation_follows_and_nowhere_else(monkeypatch):
    steps, seen, receive = itertools.count(1), [], SyncEnvs.receive

    def spy(self):
        t, step = receive(self), next(steps)
        if t.truncations.all():
            seen.append(step)
        return t

    monkeypatch.setattr(SyncEnvs, "receive", spy)
    monkeypatch.setattr(logger, "evaluate", lambda *_: [0.0, 0.0])
    rows_and_failures(make_job("Point", eval_env="same", steps=90, eval_every=40))
    assert seen == [40, 80, 90]


def test_one_instance_per_process_is_enough_for_workers(only_one):
    job = make_job("OnlyOne", seeds=(0,), num_envs=2, backend="workers", workers=2, eval_env="same",
                   eval_episodes=3)
    assert job.instances == 1 and job.eval_rounds == 2
    dry_run(job)
    rows, failures = rows_and_failures(job)
    assert rows[0, 64]["return/eval"] < 0 and not failures


@pytest.mark.parametrize("eval_env", ["same", "none"])
def test_a_plan_measures_a_simulator_that_runs_once(only_one, eval_env):
    costs = []

    def stop(message):
        if "cost" in message:
            costs.append(message["cost"])
            raise InterruptedError

    job = make_job("OnlyOne", seeds=(0,), eval_env=eval_env, eval_every=32, eval_episodes=3)
    with pytest.raises(InterruptedError):
        benchmark.measure(job, stop)
    without = dataclasses.replace(costs[0], evaluation=0.0).total(job)
    evaluations = {"same": 2 * 3, "none": 0}[eval_env]  # two, of one episode three times
    assert costs[0].total(job) == pytest.approx(without + evaluations * costs[0].evaluation)
    assert (costs[0].evaluation > 0) == (eval_env == "same")


@pytest.mark.parametrize("script, argv, words", [
    (Simple, "--eval-env same --seeds 2 --processes 1", "with one seed and one environment per"),
    (Vectorised, "--eval-env none --num-envs 2", "with one seed and one environment per"),
    (Vectorised, "--eval-env same --env torch/Pendulum-v1", "does not make torch/Pendulum-v1"),
    (Tune, "--eval-env none", "a study compares evaluation returns")])
def test_what_does_not_fit_one_instance_is_one_line(only_one, script, argv, words, capfd):
    given = argv.split() if "--env" in argv.split() else ["--env", only_one, *argv.split()]
    agent, do = (["agents/sac.py"], tuning.tune) if script is Tune else ([PPO], None)
    assert run([*agent, "--steps=128", *given], script, do) == 2
    assert words in (err := capfd.readouterr().err) and err.count("\n") == 1


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
