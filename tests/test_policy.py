"""lab.policy, and --init-from."""

import json
import re
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from lab import train as script
from lab.agent import build_agent, restore_state, save_state
from lab.command_line import parse_args
from lab.envs.spec import probe
from lab.errors import UserError
from lab.options import Simple
from lab.policy import load_policy
from lab.report import runs as reported
from lab.training import checkpoint, loop, recorder
from lab.training.job import make_jobs
from tests.conftest import AGENTS
from tests.small_run import EPISODIC, STEPS, group, train

pytestmark = pytest.mark.usefixtures("keep_threads")


def states(run, stack="stack_0_1", name="sac"):
    folder = recorder.group_folder(run, EPISODIC, name)
    return checkpoint.load_latest(folder / stack)


def stacked(run, agent="agents/sac.py"):
    """The agent of seeds 0 and 1 as it was trained."""
    config = json.loads((run / "config.json").read_text())["config"]
    whole = build_agent(agent, config, probe(EPISODIC), (0, 1), 1, STEPS, "cpu", lambda fn: fn)
    restore_state(whole, states(run, name=Path(agent).stem)["agent"])
    return whole


OBS = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)


@pytest.mark.parametrize("path", [
    pytest.param(path, marks=[] if path.stem in ("sac", "ppo") else [pytest.mark.slow])
    for path in AGENTS if path.stem != "ppo_discrete"], ids=lambda path: path.stem)  # no Box
def test_a_policy_acts_as_its_seed_in_the_stack(tmp_path, path):
    run = train(tmp_path, agent=str(path), seeds=2, processes=1)
    whole = stacked(run, str(path)).act(torch.tensor(OBS).expand(2, -1, -1), explore=False)
    for seed in (0, 1):
        policy = load_policy(run, seed=seed)
        assert (policy.step, policy.seed, policy.env_id) == (STEPS, seed, EPISODIC)
        assert np.abs(policy(OBS) - whole[seed].numpy()).max() < 1e-5
        if path.stem != "cem":  # its search draws numbers for all of a seed's observations at once
            assert np.abs(policy(OBS[7]) - whole[seed, 7].numpy()).max() < 1e-5
        assert policy(OBS[7].tolist()).shape == (1,) and policy(OBS).dtype == np.float32
    assert not np.allclose(whole[0].numpy(), whole[1].numpy())


def test_the_best_policy_has_the_best_weights(run):
    state = states(run)
    seeds = [list(x) for x in zip(state["best"]["steps"], state["best"]["returns"], strict=True)]
    for index, (step, value) in enumerate(seeds):
        policy = load_policy(group(run) / f"seed_{index}", which="best")
        assert (policy.step, policy.evaluation) == (step, value)
        wanted = state["best"]["weights"]["actor"]
        for name, x in save_state(policy.agent)["actor"].items():
            assert torch.equal(x, wanted[name].chunk(2)[index])


def test_weights_that_were_not_evaluated_have_no_evaluation(tmp_path):
    """A run may stop between two evaluations, or have none."""
    run = train(tmp_path / "own", seeds=1, checkpoint_every=4)
    assert load_policy(run).evaluation is not None
    max(run.rglob("step_*.pt")).unlink()
    assert load_policy(run).step == STEPS - 4 and load_policy(run).evaluation is None
    run = train(tmp_path / "none", seeds=1, eval_env="none")
    assert load_policy(run).step == STEPS and load_policy(run).evaluation is None


def test_it_is_loaded_from_any_folder_with_the_runs_copy_of_the_agent(run, monkeypatch):
    wanted = load_policy(run, seed=1)(OBS)
    copy = run / "sac.py"
    monkeypatch.chdir(run.parent)
    with pytest.raises(UserError, match=r"no agent file 'agents/sac\.py'"):
        load_policy("run", seed=1)
    assert np.array_equal(load_policy("run", seed=1, agent=copy)(OBS), wanted)


@pytest.mark.parametrize("arguments, words", [
    ({"path": "{tmp}/none"}, "no folder {tmp}/none"),
    ({"path": "{run}"}, "{run} has checkpoints of seeds 0, 1, 2: choose one of them"),
    ({"path": "{run}", "seed": 3}, "{run} has checkpoints of seeds 0, 1, 2"),
    ({"path": "{run}", "seed": 1, "which": "Best"}, "which must be last or best, not 'Best'"),
    ({"path": "{run}", "seed": 1, "agent": "agents/ppo.py"}, "does not fit agents/ppo.py")])
def test_bad_input_is_a_user_error(run, arguments, words):
    names = {"run": run, "tmp": run.parent}
    with pytest.raises(UserError, match=re.escape(words.format(**names))):
        load_policy(**{k: v.format(**names) if isinstance(v, str) else v
                       for k, v in arguments.items()})


def test_observations_of_another_size_are_refused(run):
    policy = load_policy(run, seed=1)
    assert policy(OBS).shape == (*np.shape(OBS)[:-1], policy.spec.action_dim)
    for obs in (np.zeros(2 * policy.spec.obs_dim), np.zeros((policy.spec.obs_dim, 1)), 0.0):
        with pytest.raises(UserError, match=f"has observations of {policy.spec.obs_dim} numbers, "
                                            r"not of shape \("):
            policy(obs)


def test_a_failed_seed_other_networks_and_damage_are_user_errors(run):
    stack = group(run) / "stack_0_1"
    checkpoint.save(stack, STEPS + 1, states(run) | {"failed": [1]})
    assert load_policy(run, seed=0)
    with pytest.raises(UserError, match="seed 1 failed in training"):
        load_policy(run, seed=1)
    settings = json.loads((run / "config.json").read_text())
    settings["config"]["actor_width"] = 8
    (run / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"does not fit the agent: .*actor.* is .*8\)"):
        load_policy(run, seed=0)
    for file in stack.glob("*.pt"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="has no intact checkpoint"):
        load_policy(run, seed=0)


# --init-from


def started(tmp_path, source, seeds=2, agent="agents/sac.py"):
    """The agent of a run that starts from the weights of another, and the run."""
    run = train(tmp_path / "new", agent, processes=1, init_from=source, seeds=seeds, steps=1,
                eval_every=1)
    stack = f"stack_0_{seeds - 1}"
    return states(run, stack, Path(agent).stem)["agent"], run


def test_each_seed_starts_from_its_own_weights_with_a_new_replay(run, tmp_path):
    new, _ = started(tmp_path, run)
    old = states(run)["agent"]
    for name in ("actor", "qf", "qf_target"):
        assert all(torch.equal(x, old[name][key]) for key, x in new[name].items())
    assert torch.equal(new["log_alpha"], old["log_alpha"])
    assert new["transitions"] == 1 and new["critic_steps"] == 0
    assert new["replay"]["size"] == 1 and not new["qf_optimizer"]["state"]


def test_all_seeds_start_from_one(run, tmp_path):
    new, _ = started(tmp_path, group(run) / "seed_1", seeds=3)
    old = states(run)["agent"]["actor"]
    for name, x in new["actor"].items():
        assert all(torch.equal(x.chunk(3)[index], old[name].chunk(2)[1]) for index in range(3))


@pytest.mark.parametrize("seeds", [2, 4])  # as many in a stack as dimensions of an action
def test_a_buffer_that_all_seeds_share_comes_along_whole(tmp_path, seeds):
    """CleanRL registers the scale of the actions, which are two here, as a persistent buffer."""
    path = tmp_path / "mine.py"
    source = Path("agents/sac.py").read_text()
    path.write_text(source.replace('(high - low) / 2, persistent=False)', '(high - low) / 2)'))
    assert path.read_text() != source
    target = "lab.envs.probes:lab/Target-v0"
    run = train(tmp_path, agent=str(path), env=(target,), seeds=seeds, processes=1)
    folder = recorder.group_folder(run, target, "mine")
    policy = load_policy(run, seed=1)
    assert policy.agent.actor.scale.tolist() == [1, 2]
    for source, same in ((folder / "seed_1", [1, 1]), (run, [0, 1])):
        config = json.loads((run / "config.json").read_text())["config"]
        new, one = (build_agent(path, config, probe(target), range(count), 1, STEPS, "cpu",
                                lambda fn: fn) for count in (2, 1))
        checkpoint.init_agent(new, one, [0, 1], source)
        assert new.actor.scale.tolist() == [1, 2]
        old = checkpoint.load_latest(folder / f"stack_0_{seeds - 1}")["agent"]["actor"]
        for name, x in new.actor.state_dict().items():
            for index, seed in enumerate(same) if name != "scale" else ():
                assert torch.equal(x.chunk(2)[index], old[name].chunk(seeds)[seed])


@pytest.mark.slow
def test_statistics_of_the_observations_come_along(tmp_path):
    run = train(tmp_path, agent="agents/ppo.py", seeds=2, processes=1)
    new, _ = started(tmp_path, run, agent="agents/ppo.py")
    old = states(run, name="ppo")["agent"]
    assert old["obs_normaliser"]["count"].min() > 0
    assert torch.equal(new["obs_normaliser"]["mean"], old["obs_normaliser"]["mean"])


def test_tables_and_reports_declare_it(run, tmp_path):
    _, new = started(tmp_path, run)
    options, _ = parse_args(["--config", str(new / "config.json")])
    assert options.init_from == run
    assert f", started from the weights of {run}" in script.declared(options)
    assert reported.origins(reported.read_config(new)[0]) == [
        f"started from the weights of {run}"]


def test_a_resumed_run_does_not_start_again(run, tmp_path):
    """Its weights are its checkpoint's, and the other run may be gone."""
    _, new = started(tmp_path, run)
    shutil.rmtree(run)
    options, config = parse_args(["--resume", str(new)])
    (job,) = make_jobs(options, config, 1, new)
    loop.train(job, lambda message: None)


@pytest.mark.parametrize("flags, words", [
    ("--init-from {tmp}/none", "no folder {tmp}/none"),
    ("--init-from {run} --seeds 4", "{run} has no seed 3 to start from"),
    ("--init-from {run} --actor-width 16 --qf-width 16 --env MountainCarContinuous-v0",
     "does not fit the agent"),
    ("--init-from {run} --actor-width 8", "does not fit the agent")])
def test_what_cannot_be_started_from_is_one_line(run, capsys, tmp_path, flags, words):
    names = {"run": run, "tmp": tmp_path}
    argv = f"--env {EPISODIC} --log --runs {tmp_path}/runs {flags}".format(**names).split()
    assert script.run(argv, Simple) == 2
    err = capsys.readouterr().err
    assert words.format(**names) in err and err.count("\n") == 1, err
    assert not (tmp_path / "runs").exists()


def test_the_code_in_the_docs_runs(tmp_path, monkeypatch):
    """A client asks the server; the loop at 50 Hz sends each action."""
    run = train(tmp_path, env=("Pendulum-v1",), eval_every=STEPS, eval_episodes=1)
    page = Path("docs/policy.md").read_text().replace("runs/walk", str(run))
    names, sent = {}, []
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        if "from policy import" not in block:  # an export, in test_export.py
            exec(block, names)
    policy, obs = names["policy"], [0.5, 0.5, 1.0]
    assert policy.seed == 1 and names["over"] and names["score"] < 0
    names["control"](lambda: obs, sent.append, seconds=0.06)
    assert len(sent) == 3 and np.array_equal(sent[0], policy(obs))
    with names["server"] as server:
        threading.Thread(target=server.handle_request).start()
        with socket.create_connection(server.server_address, timeout=60) as client:
            client.sendall(json.dumps(obs).encode() + b"\n")
            answer = client.makefile().readline()
    assert json.loads(answer) == policy(obs).tolist()
