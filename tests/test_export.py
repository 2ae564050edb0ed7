"""python -m lab.export: what is exported acts as the agent does."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lab.errors import guarded
from lab.export import __main__ as export
from lab.export import numpy_code
from lab.policy import load_policy
from lab.training import checkpoint, recorder
from tests.conftest import AGENTS
from tests.test_evaluate import EPISODIC, STEPS, group, train

needs_onnx = pytest.mark.skipif(not all(map(importlib.util.find_spec, (
    "onnx", "onnxscript", "onnxruntime"))), reason="no onnx, onnxscript and onnxruntime")
OBS = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
EXPORTABLE = [path for path in AGENTS if path.stem != "cem"]
QUICK = ("ppo",)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(export, "DECISIONS", 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Seeds 0 and 1 in one stack, 2 in another. Not to be written into."""
    return train(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def exported(capsys, *argv):
    """-> the folder, and what is printed."""
    assert guarded(lambda: export.run([str(arg) for arg in argv])) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert not err
    return Path(out.splitlines()[-1]).parent, out


def refused(capsys, *argv):
    assert guarded(lambda: export.run([str(arg) for arg in argv])) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def without_torch(code, folder):
    """What the code makes of OBS, in a process that cannot import torch."""
    np.save(folder / "obs.npy", OBS)
    code = "\n".join(["import sys; sys.modules['torch'] = None", "import numpy as np",
                      "obs = np.load('obs.npy')", code, "np.save('actions.npy', actions)"])
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "actions.npy")


def parametrize(paths):
    return pytest.mark.parametrize("path", [
        pytest.param(path, marks=[] if path.stem in QUICK else [pytest.mark.slow])
        for path in paths], ids=[path.stem for path in paths])


@parametrize(EXPORTABLE)
def test_torchscript_and_numpy_act_as_the_agent(tmp_path, capsys, path):
    """With its normalisation and its bounds, -0.5 to 2; numpy without torch."""
    run = train(tmp_path, agent=str(path), seeds=2, processes=1)
    policy = load_policy(run, seed=1)
    wanted = policy(100 * OBS)
    assert np.ptp(wanted) > 0.01
    folder, out = exported(capsys, run, "--seed", 1, "--format", "torchscript")
    assert re.search(r"on 1000 observations: \d\.\de-\d+\n", out) or ": 0.0e+00" in out
    loaded = torch.jit.load(folder / "policy.pt")
    for rows in (OBS, OBS[:1]):
        actions = loaded(torch.from_numpy(100 * rows)).numpy()
        assert np.abs(actions - policy(100 * rows)).max() < 1e-5
    folder, _ = exported(capsys, run, "--seed", 1, "--format", "numpy")
    actions = without_torch("from policy import act; actions = act(100 * obs)\n"
                            "assert act(obs[0]).shape == (1,) and actions.dtype == np.float32\n"
                            "assert act(obs.reshape(2, 20, 3)).shape == (2, 20, 1)", folder)
    assert np.abs(actions - wanted).max() < 1e-5


@needs_onnx
@parametrize(EXPORTABLE)
def test_onnx_acts_as_the_agent_without_torch(tmp_path, capsys, path):
    run = train(tmp_path, agent=str(path), seeds=2, processes=1)
    folder, _ = exported(capsys, run, "--seed", 1)
    actions = without_torch(
        "import onnxruntime\nsession = onnxruntime.InferenceSession('policy.onnx')\n"
        "actions, = session.run(None, {'obs': 100 * obs})\n"
        "assert session.run(['actions'], {'obs': obs[:1]})[0].shape == (1, 1)", folder)
    assert np.abs(actions - load_policy(run, seed=1)(100 * OBS)).max() < 1e-5


def test_the_metadata_says_what_it_is(run, capsys):
    folder, out = exported(capsys, group(run) / "seed_1", "--format", "numpy", "--which", "best")
    assert folder == group(run) / "seed_1/policy_numpy"
    state = checkpoint.load_latest(group(run) / "stack_0_1")["best"]
    about = json.loads((folder / "policy.json").read_text())
    wanted = {"agent": "sac", "environment": EPISODIC, "run": "run", "seed": 1, "which": "best",
              "step": state["steps"][1], "evaluation": state["returns"][1], "action_repeat": 1,
              "format": "numpy"}
    assert {name: about[name] for name in wanted} == wanted
    assert about["spaces"] | {"obs_dim": 3, "action_low": [-0.5], "action_high": [2.0]} == (
        about["spaces"])
    assert about["largest_difference"] < 1e-5 and about["versions"]["torch"] == torch.__version__
    assert "seed 1 of run, best weights" in out and "seed 1 of run" in (
        folder / "policy.py").read_text()


def test_one_that_differs_is_refused_and_leaves_nothing(run, capsys, monkeypatch):
    before = sorted(run.rglob("*"))
    for gap, rows in ((2e-5, 2), (2e-5, 1), (np.nan, 2)):
        def off(policy, folder, gap=gap, rows=rows):
            (folder / "policy.npz").touch()
            return lambda obs: policy(obs) + gap * (min(len(obs), 2) == rows)

        monkeypatch.setitem(export.FORMATS, "numpy", off)
        assert "its actions differ by" in refused(capsys, run, "--seed", 0, "--format", "numpy")
        assert sorted(run.rglob("*")) == before


def test_a_large_action_may_differ_by_more(run):
    policy = load_policy(run, seed=0)
    assert export.largest_difference(policy, lambda obs: policy(obs) + 1e-4) == pytest.approx(
        1e-4 / 1.25, rel=0.01)


@pytest.mark.parametrize("argv, words", [
    ("{tmp}/none", "no folder {tmp}/none"), ("{tmp}", "is not in a run folder"),
    ("{run}", "has checkpoints of seeds 0, 1, 2: choose one of them"),
    ("{run} --seed 7", "has checkpoints of seeds 0, 1, 2: choose one of them"),
    ("{run} --seed 0 --format jax", "invalid choice"),
    ("{run} --seed 0 --out {run}", "{run} exists: name another with --out"),
    ("{run} --seed 0 --agent agents/ppo.py", "config.json does not fit agents/ppo.py")])
def test_bad_input_is_one_line(run, capsys, argv, words):
    before = sorted(run.rglob("*"))
    names = {"run": run, "tmp": run.parent}
    assert words.format(**names) in refused(capsys, *argv.format(**names).split())
    assert sorted(run.rglob("*")) == before


def test_a_missing_extra_and_an_export_that_exists_are_one_line(run, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "--format onnx needs pip install onnx onnxscript onnxruntime" in refused(
        capsys, run, "--seed", 0)
    (group(run) / "seed_0/policy_onnx").mkdir()
    assert "policy_onnx exists" in refused(capsys, run, "--seed", 0)
    assert not list(group(run).glob("seed_0/export_*"))


def test_what_numpy_does_not_know_is_one_line(run, capsys, monkeypatch):
    monkeypatch.delitem(numpy_code.OPERATIONS, "tanh")
    assert "--format numpy does not know torch's tanh: use --format onnx" in refused(
        capsys, run, "--seed", 0, "--format", "numpy")


@pytest.mark.slow
def test_a_search_does_not_export(tmp_path, capsys):
    run = train(tmp_path, agent="agents/cem.py", seeds=1)
    for kind in ("numpy", "torchscript"):
        assert f"cem.py does not export to {kind}: " in refused(capsys, run, "--format", kind)
    assert not list(recorder.group_folder(run, EPISODIC, "cem").glob("seed_0/policy_*"))


@pytest.mark.parametrize("code", [
    "torch.cat([x, 2 * x], -1).neg()", "x[..., 1:] / (1 + x[..., :-1].abs())",
    "torch.sigmoid(x).permute(1, 0).sqrt()", "x.clamp(min=0) ** 2 + x.clamp(max=1)",
    "(1 + x.abs()).log()[:, -2:]",
    "x @ torch.ones(3, 2)", "(1 + x.exp()).rsqrt()[:, 1]", "x[:, None].squeeze(1).relu()",
    "x.mean(1) + x.sum(-1)"])
def test_every_operation_is_torchs(tmp_path, code):
    class Module(torch.nn.Module):
        def forward(self, x):
            return eval(code, {"torch": torch, "x": x})

    obs = torch.from_numpy(OBS)
    with torch.no_grad():
        program = torch.export.export(Module(), (obs[:2],), dynamic_shapes=(
            {0: torch.export.Dim("batch")},), strict=False).run_decompositions()
    numpy_code.write_numpy(program, tmp_path, code + '"""\n1 / 0\n"""\\')
    actions = without_torch("from policy import act; actions = act(obs)", tmp_path)
    assert actions == pytest.approx(Module()(obs).numpy().reshape(actions.shape), abs=1e-6)


def test_the_step_is_the_runs(run):
    assert load_policy(run, seed=0).step == STEPS
