"""python -m lab.export: what is exported acts as the agent does."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lab.check import __main__ as check
from lab.errors import UserError, guarded
from lab.export import __main__ as export
from lab.export import numpy_code
from lab.policy import load_policy
from lab.training import checkpoint, recorder
from tests.conftest import AGENTS, refusal
from tests.small_run import EPISODIC, STEPS, group, train

needs_onnx = pytest.mark.skipif(not all(map(importlib.util.find_spec, (
    "onnx", "onnxscript", "onnxruntime"))), reason="no onnx, onnxscript and onnxruntime")
OBS = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
CASES = {path.stem: (path, EPISODIC) for path in AGENTS if path.stem != "cem"} | {
    name: (Path("agents/ppo_discrete.py"), env_id) for name, env_id in (
        ("ppo_discrete", "lab/DiscreteTarget-v0"),  # two choices
        ("one_choice", "tests.probe_envs:lab-tests/Choices-v0"),
        ("masked", "tests.probe_envs:lab-tests/FlatMasked-v0"))}
QUICK = [("ppo", "torchscript"), ("masked", "numpy"), ("ppo_lstm", "onnx")]
# One decision of each format: obs, and memory if it has one -> actions, and memory
STEP = {
    "numpy": """
from policy import act
def step(*args):
    result = act(*args)
    return result if isinstance(result, tuple) else [result]
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession("policy.onnx")
def step(*args):
    return session.run(list(about["outputs"]), dict(zip(about["inputs"], args)))
""",
    "torchscript": """
import torch
policy = torch.jit.load("policy.pt")
def step(*args):
    result = policy(*map(torch.from_numpy, args))
    return [x.numpy() for x in (result if isinstance(result, tuple) else [result])]
"""}
EPISODES = """
import json
about = json.load(open("policy.json"))
width = about["inputs"].get("memory", [0, 0])[1]
actions = []
for episode in obs:
    memory = [np.zeros((episode.shape[1], width), np.float32)] if width else []
    for x in episode:
        action, *memory = step(x, *memory)
        actions.append(action)
        assert action.dtype == np.float32
actions = np.array(actions)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch, keep_threads):
    monkeypatch.setattr(export, "DECISIONS", 2)


@pytest.fixture(scope="module")
def trained_as(tmp_path_factory):
    """-> the run of a case, trained at the first call. Not to be written into."""
    @functools.cache
    def trained_case(name):
        path, env_id = CASES[name]
        return train(tmp_path_factory.mktemp(name), agent=str(path), env=(env_id,), seeds=2,
                     processes=1)
    return trained_case


def exported(capsys, *argv):
    """-> the folder, and what is printed."""
    assert guarded(lambda: export.run([str(arg) for arg in argv])) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert not err
    return Path(out.splitlines()[-1]).parent, out


def refused(capsys, *argv):
    return refusal(capsys, export.run, *argv)


def without_torch(code, folder, obs=OBS):
    """What the code makes of obs, in a process that cannot import torch."""
    np.save(folder / "obs.npy", obs)
    code = "\n".join(["import sys; sys.modules['torch'] = None", "import numpy as np",
                      "obs = np.load('obs.npy')", code, "np.save('actions.npy', actions)"])
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "actions.npy")


def played(kind, folder, obs):
    """The actions of an export on obs (episodes, steps, B, O)."""
    if kind != "torchscript":
        return without_torch(STEP[kind] + EPISODES, folder, obs)
    names = {"obs": obs, "np": np}
    with contextlib.chdir(folder):
        exec(STEP[kind] + EPISODES, names)
    return names["actions"]


def observations(spec, *shape):
    draw = np.random.default_rng(2)
    obs = 100 * draw.normal(size=(*shape, spec.obs_dim))
    obs[..., spec.mask] = draw.random(obs[..., spec.mask].shape) < 0.5
    return obs.astype(np.float32)


def compare(policy, kind, folder):
    """The export with the policy, over two episodes of 5 and of 40 steps."""
    for size in (8, 1):
        obs, wanted = observations(policy.spec, 2, 40 // size, size), []
        for episode in obs:
            policy.reset()
            wanted += [policy(x) for x in episode]
        actions = played(kind, folder, obs)
        assert np.ptp(wanted) > 0.01 and actions.shape == np.array(wanted).shape
        assert np.abs(actions - wanted).max() < 1e-5


@pytest.mark.parametrize("case, kind", [
    pytest.param(case, kind, marks=[needs_onnx] * (kind == "onnx") + [pytest.mark.slow] * (
        (case, kind) not in QUICK)) for case in CASES for kind in STEP])
def test_an_export_acts_as_the_agent(trained_as, tmp_path, capsys, case, kind):
    """With its normalisation and its bounds, without torch, for any B, and from episode to
    episode."""
    run = trained_as(case)
    folder, out = exported(capsys, run, "--seed", 1, "--format", kind, "--out", tmp_path / "out")
    if CASES[case][0].stem == "ppo_discrete":
        assert "choices that differ from the agent's on 1000 observations: 0.0%\n" in out
    else:
        assert float(re.search(r"on 1000 observations: (.*)\n", out)[1]) < 1e-5
    compare(load_policy(run, seed=1), kind, folder)


def test_a_policy_with_memory_says_how_to_step_it(trained_as, tmp_path, capsys, monkeypatch):
    """In its docstring, in policy.json and in the docs; one observation, or any leading shape."""
    folder, _ = exported(capsys, trained_as("ppo_lstm"), "--seed", 1, "--format", "numpy", "--out",
                         tmp_path / "out")
    about = json.loads((folder / "policy.json").read_text())
    wanted = {"inputs": {"obs": ["B", 3], "memory": ["B", 32]}, "first_memory": 0.0,
              "outputs": {"actions": ["B", 1], "next_memory": ["B", 32]}}
    assert about | wanted == about
    compare(load_policy(trained_as("ppo_lstm"), seed=1), "numpy", folder)
    actions = without_torch("""
from policy import act
assert "an episode begins" in act.__doc__
actions, memory = act(obs)
for x, shape in ((obs[0], ()), (obs.reshape(2, 20, 3), (2, 20))):
    first, after = act(x.tolist())
    assert first.shape == (*shape, 1) and after.shape == (*shape, 32), (first.shape, after.shape)
    second, _ = act(x, after.tolist())
    assert second.dtype == np.float32 and second.shape == first.shape and (second != first).all()
    assert (act(x, 0 * after)[0] == first).all()
assert np.abs(after.reshape(40, 32) - memory).max() < 1e-6
""", folder)
    assert np.abs(actions - load_policy(trained_as("ppo_lstm"), seed=1)(OBS)).max() < 1e-5
    page = Path("docs/policy.md").read_text()
    (block,) = re.findall(r"```python\n(import gymnasium\nfrom policy .*?)```", page, re.DOTALL)
    monkeypatch.syspath_prepend(folder)
    names = {}
    exec(block, names)
    assert names["over"] and names["memory"].any()
    del sys.modules["policy"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [
    "numpy", "torchscript", pytest.param("onnx", marks=needs_onnx)])
def test_an_agent_of_ones_own_remembers_what_it_likes(tmp_path, capsys, kind):
    """SAC, evaluated on a running mean of the observations; the checker finds nothing."""
    text = Path("agents/sac.py").read_text()
    line = "        actions, _ = self.actor(obs, noise)\n"
    assert text.count(line) == 1
    text = text.replace(line, f"        obs = obs if explore else 0.5 * obs\n{line}")
    own = tmp_path / "own.py"
    own.write_text(text + """
    def act_with_memory(self, obs, memory=None):
        memory = 0.5 * (obs + (torch.zeros_like(obs) if memory is None else memory))
        return self.act(2 * memory, explore=False), memory
""")
    subject = check.parse([str(own)])
    for name in ("act, observe and update return what the contract says",
                 "acting without exploring changes nothing"):
        assert check.failure(check.CHECKS[name], subject) is None
    run = train(tmp_path, agent=str(own), seeds=1)
    folder, _ = exported(capsys, run, "--format", kind)
    obs, policy = OBS.reshape(2, 5, 4, 3), load_policy(run)
    wanted = export.episodes(policy, obs).reshape(10, 4, 1)
    assert np.abs(played(kind, folder, obs) - wanted).max() < 1e-5
    assert np.abs(wanted - policy.agent.act(torch.from_numpy(obs.reshape(1, 40, 3)), explore=False)
                  .numpy().reshape(10, 4, 1)).max() > 1e-3


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
    assert about["largest_difference"] < 1e-5
    assert about["versions"]["torch"] == importlib.metadata.version("torch")
    assert "seed 1 of run, best weights" in out and "seed 1 of run" in (
        folder / "policy.py").read_text()
    assert about["inputs"] == {"obs": ["B", 3]} and about["outputs"] == {"actions": ["B", 1]}
    assert "first_memory" not in about
    actions = without_torch("from policy import act; actions = act(obs)\n"
                            "assert act(obs[0]).shape == (1,) and actions.dtype == np.float32\n"
                            "assert act(obs.reshape(2, 20, 3)).shape == (2, 20, 1)", folder)
    assert np.abs(actions - load_policy(run, seed=1, which="best")(OBS)).max() < 1e-5


def test_one_that_differs_is_refused_and_leaves_nothing(run, capsys, monkeypatch):
    before = sorted(run.rglob("*"))
    for gap, rows in ((2e-5, 2), (2e-5, 1), (np.nan, 2)):
        def off(policy, folder, gap=gap, rows=rows):
            (folder / "policy.npz").touch()
            return lambda obs: [policy(obs) + gap * (min(len(obs), 2) == rows)]

        monkeypatch.setitem(export.FORMATS, "numpy", off)
        assert "sac.py does not export to numpy: largest difference to the agent on 1000 " in (
            refused(capsys, run, "--seed", 0, "--format", "numpy"))
        assert sorted(run.rglob("*")) == before


def test_a_large_action_may_differ_by_more(run):
    policy = load_policy(run, seed=0)
    off = export.Exported(lambda obs: [policy(obs) + 1e-4])
    assert export.difference(policy, off) == pytest.approx(1e-4 / 1.25, rel=0.01)


def test_one_that_forgets_or_never_begins_again_is_refused(trained_as):
    policy = load_policy(trained_as("ppo_lstm"), seed=0)
    agent = export.ActModule(policy.agent)

    def step(obs, memory):
        with torch.no_grad():
            return [x.numpy() for x in agent(torch.from_numpy(obs), torch.from_numpy(memory))]

    def forgetful(obs, memory):
        return step(obs, 0 * memory)

    def endless(obs, memory):
        actions, kept[len(obs)] = step(obs, kept.get(len(obs), memory))
        return actions, kept[len(obs)]

    kept = {}
    assert export.difference(policy, export.Exported(step, [32])) < 1e-6
    for broken in (forgetful, endless):
        assert export.difference(policy, export.Exported(broken, [32])) > 1e-4


def test_rounding_may_decide_a_single_choice(trained_as):
    """Where the mask allows some choices, and in one observation of a thousand."""
    policy = load_policy(trained_as("masked"), seed=0)
    seen, flips = [], 0

    def step(obs):
        nonlocal flips
        seen.append(obs)
        actions = policy(obs)
        if flips:
            flips -= 1
            actions[0, 1] = (actions[0, 1] + 1) % 3
        return [actions]

    for n, allowed in ((0, True), (1, True), (2, False)):
        flips = n
        gap = export.difference(policy, export.Exported(step))
        assert gap == n / 1040 and (gap <= export.TIES) == allowed
    masks = np.concatenate(seen)[:, policy.spec.mask]
    assert set(np.unique(masks)) == {0, 1} and masks.shape[1] == 5


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


def test_a_search_is_refused_before_it_is_traced(tmp_path, capsys, monkeypatch):
    run = train(tmp_path, agent="agents/cem.py", seeds=1)
    monkeypatch.setattr(export, "FORMATS", {})
    assert "cem.py draws random numbers for each action, so it does not export: use " \
           "lab.policy.load_policy" in refused(capsys, run, "--format", "numpy")
    assert not list(recorder.group_folder(run, EPISODIC, "cem").glob("seed_0/policy_*"))


def test_a_memory_that_is_out_of_reach_is_one_line(trained_as, monkeypatch):
    policy = load_policy(trained_as("ppo_lstm"), seed=0)
    monkeypatch.delattr(type(policy.agent), "act_with_memory")
    policy.agent.eval_policy = lambda: policy.agent.act
    with pytest.raises(UserError, match=r"ppo_lstm\.py keeps its memory inside eval_policy\(\): an "
                                        r"export needs act_with_memory\(\)"):
        export.check_exportable(policy)


OPERATIONS = [
    "torch.cat([x, 2 * x], -1).neg()", "x[..., 1:] / (1 + x[..., :-1].abs())",
    "torch.sigmoid(x).permute(1, 0).sqrt()", "x.clamp(min=0) ** 2 + x.clamp(max=1)",
    "(1 + x.abs()).log()[:, -2:]",
    "x @ torch.ones(3, 2)", "(1 + x.exp()).rsqrt()[:, 1]", "x[:, None].squeeze(1).relu()",
    "x.mean(1) + x.sum(-1)", "x.log_softmax(-1)", "x.argmax(-1).type_as(x)",
    "x.argmax(1, keepdim=True) + x", "x.masked_fill(x[:, :1].relu() == 0, -math.inf).exp()",
    "torch.sigmoid(1e3 * x)",
    *[f"torch.slice_scatter(x, -x[:, {start}:{end}], 1, {start}, {end})"
      for start, end in ((1, 2), (0, 0), (1, 3), (-2, 3), (0, -1))]]


def traced(function):
    """Of an argument with three columns."""
    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    with torch.no_grad():
        return torch.export.export(Module(), (torch.zeros(2, 3),), dynamic_shapes=(
            {0: torch.export.Dim("batch")},), strict=False).run_decompositions()


def test_what_numpy_does_not_know_is_one_line(tmp_path):
    with pytest.raises(UserError, match="--format numpy does not know torch's erf: use --format "
                                        "onnx"):
        numpy_code.write_numpy(traced(lambda x: (x.erf(),)), tmp_path, "")


def test_every_operation_is_torchs(tmp_path):
    def all_of_them(x):
        return tuple(eval(code, {"torch": torch, "math": math, "x": x}) for code in OPERATIONS)

    about = OPERATIONS[0] + '"""\n1 / 0\n"""\\'
    numpy_code.write_numpy(traced(all_of_them), tmp_path, about)
    without_torch("import warnings; warnings.simplefilter('error')\nfrom policy import act\n"
                  "np.savez('each.npz', *act(obs)); actions = obs", tmp_path)
    each = np.load(tmp_path / "each.npz").values()
    for code, wanted, got in zip(OPERATIONS, all_of_them(torch.from_numpy(OBS)), each, strict=True):
        assert got == pytest.approx(wanted.numpy().reshape(got.shape), abs=1e-6), code


def test_the_step_is_the_runs(run):
    assert load_policy(run, seed=0).step == STEPS
