"""Loading an agent's file, and the check that it keeps the contract."""

import inspect
import re
from pathlib import Path

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

from lab.agent import VERBS, build_agent, check_contract, load_agent
from lab.errors import UserError
from tests.conftest import AGENTS, make_spec

KEEPS_THE_CONTRACT = '''
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    gain: float = 1.0  # of the action


class Agent:
    def __init__(self, spec, config, seeds, num_envs, total_steps, device, accelerate):
        if config.gain < 0:
            raise ValueError(f"gain must be 0 or more, not {config.gain}")
        self.gain, self.seeds, self.action_dim = config.gain, len(seeds), spec.action_dim

    def act(self, obs, explore=True):
        return self.gain * torch.ones(*obs.shape[:2], self.action_dim)

    def observe(self, obs, actions, rewards, next_obs, terminations, truncations):
        pass

    def update(self):
        return {"loss": torch.zeros(self.seeds)}

    def state_dict(self):
        return {"gain": self.gain}

    def load_state_dict(self, state):
        self.gain = state["gain"]
'''


def write(folder, text=KEEPS_THE_CONTRACT):
    folder.mkdir(exist_ok=True)
    path = folder / "mine.py"
    path.write_text(text)
    return path


def build(path, **config):
    return build_agent(path, config, make_spec(), [0, 1], 1, 10, "cpu", lambda fn: fn)


@pytest.mark.parametrize("text, words", [
    ("x = (\n", r"mine.py:1 does not load: SyntaxError"),
    ("import torhc\n", r"does not load: ModuleNotFoundError: No module named 'torhc'"),
    ("raise RuntimeError('one line\\nof two')\n", r"RuntimeError: one line$"),
    ("x = 1\n", r"needs a class Agent and a dataclass Config"),
    (KEEPS_THE_CONTRACT.replace("class Agent", "class Agnet"), r"needs a class Agent"),
    (KEEPS_THE_CONTRACT.replace("@dataclass(frozen=True)", ""), r"a dataclass Config"),
    *[(KEEPS_THE_CONTRACT.replace(f"def {verb}(", f"def {verb}_("), rf"Agent has no {verb}\(\)")
      for verb in VERBS]])
def test_a_file_that_is_no_agent_is_refused_with_the_reason(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(UserError, match=words) as caught:
        load_agent(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_refused_with_the_agents_that_are_there(tmp_path):
    for path in (tmp_path / "mine.py", tmp_path):
        with pytest.raises(UserError) as caught:
            load_agent(path)
        for known in (path, *AGENTS):
            assert str(known) in str(caught.value)


def test_a_file_that_is_no_python_is_refused(tmp_path):
    path = write(tmp_path).rename(tmp_path / "mine.txt")
    with pytest.raises(UserError, match="no Python file"):
        load_agent(path)


def test_an_unknown_setting_is_named_beside_the_known(tmp_path):
    with pytest.raises(UserError, match=r"mine.py has no setting 'gian'; it has gain"):
        build(write(tmp_path), gian=2.0)


def test_a_refused_setting_is_an_error_of_the_user(tmp_path):
    with pytest.raises(UserError, match=r"mine.py on tests: gain must be 0 or more, not -1"):
        build(write(tmp_path), gain=-1)


def test_the_settings_reach_the_agent(tmp_path):
    assert build(write(tmp_path), gain=0.5).gain == 0.5
    assert build(write(tmp_path)).gain == 1.0


@pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("num_envs", [1, 3])
def test_every_agent_keeps_the_contract(path, num_envs):
    check_contract(path, {}, make_spec(), num_envs, "cpu")


def test_a_rehearsal_makes_few_gradient_steps_however_many_are_owed(tmp_path):
    text = KEEPS_THE_CONTRACT.replace("import torch\n", "import torch\nfrom pathlib import Path\n")
    text = text.replace("        self.gain, self.seeds", """        def step(x):
            with Path(__file__).with_name("steps").open("a") as file:
                file.write("x")
            return x + 1
        self.step = accelerate(step)
        self.gain, self.seeds""")
    text = text.replace('return {"loss": torch.zeros(self.seeds)}', """
        for _ in range(self.owed):
            loss = self.step(torch.zeros(self.seeds))
            assert (loss == 1).all() and loss.shape == (self.seeds,)
        return {"loss": loss}""")
    text = text.replace("        pass", "        self.owed = 20 * obs.shape[1]")
    path, counts = write(tmp_path, text), []
    for num_envs in (1, 7, 50):
        check_contract(path, {}, make_spec(), num_envs, "cpu")
        steps = path.with_name("steps")
        counts.append(len(steps.read_text()))
        steps.unlink()
    assert counts[0] >= 1 and set(counts) == {counts[0]} and counts[0] <= 5


@pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)
def test_a_rehearsal_of_an_agent_makes_few_steps_of_its_optimisers(path):
    """In 24 environments, 10 a transition are 240 at once; PPO's rollout has 320 minibatches."""
    steps, known = [], load_agent(path).Config.__dataclass_fields__
    small = {"replay_ratio": 10.0, "batch_size": 16, "qf_width": 16, "actor_width": 16}
    hook = register_optimizer_step_post_hook(lambda *x: steps.append(x[0]))
    try:
        config = {name: value for name, value in small.items() if name in known}
        check_contract(path, config, make_spec(), 24, "cpu")
    finally:
        hook.remove()
    assert 1 <= len(steps) <= 5


@pytest.mark.parametrize("verb, line, words", [
    ("act", "return torch.zeros(obs.shape[0], 2)",
     r"should give a tensor \(S, N, A\) = \(2, 3, 2\), but gave \(2, 2\)"),
    ("act", "return torch.zeros(*obs.shape[:2], 1)", r"but gave \(2, 3, 1\)"),
    ("act", "return obs.numpy()[..., :2]",
     r"should give a tensor .* = \(2, 3, 2\), but gave ndarray"),
    ("act", "return torch.zeros(2, 3, 2).double()", r"of torch.float32, but gave torch.float64"),
    ("act", "return torch.zeros(2, 3, 2, requires_grad=True)",
     r"should give actions without a gradient, but gave one that has it"),
    ("act", "return torch.zeros(2, 3, 2) if explore else torch.zeros(2, 2)", r"gave \(2, 2\)"),
    ("act", "return torch.zeros(2, 3, 2) if not explore else torch.zeros(2, 2)", r"gave \(2, 2\)"),
    ("act", "return obs @ torch.ones(5, 2)",
     r"failed on tensors of shape \(S, N, ...\) = \(2, 3, ...\): RuntimeError: "),
    ("observe", "raise KeyError('rewards')", r"failed on tensors .*KeyError: 'rewards'"),
    ("observe", "assert actions.shape == (2, 3), actions.shape", r"failed .*\[2, 3, 2\]"),
    ("update", "return None", r"should give a dict of metrics, but gave NoneType"),
    ("update", "return {'loss': torch.zeros(())}",
     r"should give loss of shape \(S,\) = \(2,\), but gave \(\)"),
    ("update", "return {'loss': 0.5}", r"should give .*'loss' with a float"),
    ("update", "return {'good': torch.zeros(2), 'q': torch.zeros(2, 1)}", r"q of .* gave \(2, 1\)"),
    ("update", "return {'loss': torch.zeros(2, requires_grad=True)}",
     r"should give loss detached, but gave it with a gradient"),
    ("update", "return {'loss': torch.zeros(2).numpy()}", r"should give .*'loss' with a ndarray"),
    ("update", "return {1: torch.zeros(2)}", r"should give names .*1 with a Tensor"),
    ("update", "1 / 0", r"failed .*ZeroDivisionError: division by zero"),
    ("state_dict", "return [self.gain]", r"should give a dict, but gave list"),
    ("state_dict", "raise OSError", r"failed .*OSError"),
    ("load_state_dict", "self.gain = state['gian']", r"failed .*KeyError: 'gian'"),
])
def test_a_verb_that_breaks_the_contract_is_named(tmp_path, verb, line, words):
    text = re.sub(rf"(def {verb}\(.*\n) .*", rf"\1        {line}", KEEPS_THE_CONTRACT)
    assert line in text
    pattern = rf"^mine.py breaks the contract: {verb} .*{words}"
    with pytest.raises(UserError, match=pattern) as caught:
        check_contract(write(tmp_path, text), {}, make_spec(), 3, "cpu")
    assert "\n" not in str(caught.value)


def same_stem(tmp_path):
    second = KEEPS_THE_CONTRACT.replace("gain: float = 1.0  # of", "gain: float = 2.0  # times")
    return write(tmp_path / "a"), write(tmp_path / "b", second)


def test_files_of_the_same_name_in_two_folders_are_two_agents(tmp_path):
    paths = same_stem(tmp_path)
    modules = [load_agent(path) for path in paths]
    assert [Path(module.__file__) for module in modules] == list(paths)
    assert [module.Config().gain for module in modules] == [1.0, 2.0]
    assert [build(path).gain for path in (*paths, paths[0])] == [1.0, 2.0, 1.0]


def test_the_first_of_two_files_of_the_same_name_keeps_its_source(tmp_path):
    first, _ = [load_agent(path) for path in same_stem(tmp_path)]
    assert "# of the action" in inspect.getsource(first.Config)
