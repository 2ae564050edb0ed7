"""Loading an agent's file, and the check that it keeps the contract."""

import copy
import inspect
import io
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lab import settings
from lab.agent import VERBS, build_agent, check_ranges, load_agent, restore_state, save_state
from lab.contract import check_contract
from lab.errors import CodeError, UserError, guarded
from tests.conftest import AGENTS, drive, make_agent, make_spec, make_steps, spec_for

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
      for verb in VERBS],
    (KEEPS_THE_CONTRACT.replace("def state_dict(", "def state_dict_("),
     r"Agent needs STATE, a tuple with the names of the attributes to save")])
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
@pytest.mark.parametrize("num_envs", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_every_agent_keeps_the_contract(path, num_envs):
    """With its own settings; lab.check has small ones and 4 environments."""
    check_contract(path, {}, spec_for(load_agent(path)), num_envs, "cpu")


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
        check_contract(path, config, spec_for(load_agent(path)), 24, "cpu")
    finally:
        hook.remove()
    assert 1 <= max(Counter(map(id, steps)).values()) <= 2


@pytest.mark.parametrize("verb, line, words", [
    ("act", "return torch.zeros(obs.shape[0], 2)",
     r"should give a tensor \(S, N, A\) = \(3, 3, 2\), but gave \(3, 2\)"),
    ("act", "return torch.zeros(*obs.shape[:2], 1)", r"but gave \(3, 3, 1\)"),
    ("act", "return obs.numpy()[..., :2]",
     r"should give a tensor .* = \(3, 3, 2\), but gave ndarray"),
    ("act", "return torch.zeros(3, 3, 2).double()", r"of torch.float32, but gave torch.float64"),
    ("act", "return torch.zeros(3, 3, 2, requires_grad=True)",
     r"should give actions without a gradient, but gave one that has it"),
    ("act", "return torch.zeros(3, 3, 2) if explore else torch.zeros(3, 2)", r"gave \(3, 2\)"),
    ("act", "return torch.zeros(3, 3, 2) if not explore else torch.zeros(3, 2)", r"gave \(3, 2\)"),
    ("update", "return None", r"should give a dict of metrics, but gave NoneType"),
    ("update", "return {'loss': torch.zeros(())}",
     r"should give loss of shape \(S,\) = \(3,\), but gave \(\)"),
    ("update", "return {'loss': 0.5}", r"should give .*'loss' with a float"),
    ("update", "return {'good': torch.zeros(3), 'q': torch.zeros(3, 1)}", r"q of .* gave \(3, 1\)"),
    ("update", "return {'loss': torch.zeros(3, requires_grad=True)}",
     r"should give loss detached, but gave it with a gradient"),
    ("update", "return {'loss': torch.zeros(3).numpy()}", r"should give .*'loss' with a ndarray"),
    ("update", "return {1: torch.zeros(2)}", r"should give names .*1 with a Tensor"),
    ("state_dict", "return [self.gain]", r"should give a dict, but gave list"),
    ("act_with_memory", "return obs[..., :2]",
     r"should give actions and a memory, .*= \(3, 3, 2\) and \(.*M\), but gave \[\(3, 3, 2\)\]"),
    ("act_with_memory", "return obs[..., :2], (obs, obs)", r"gave \[\(3, 3, 2\), 'tuple'\]"),
    ("act_with_memory", "return obs[..., :2], obs.mean(1)", r"gave \[\(3, 3, 2\), \(3, 3\)\]"),
    ("act_with_memory", "return obs[..., :1], obs", r"gave \[\(3, 3, 1\), \(3, 3, 3\)\]"),
])
def test_a_verb_that_breaks_the_contract_is_named(tmp_path, verb, line, words):
    text = KEEPS_THE_CONTRACT
    if verb == "act_with_memory":
        text += "\n    def act_with_memory(self, obs, memory=None):\n        pass\n"
    text = re.sub(rf"(def {verb}\(.*\n) .*", rf"\1        {line}", text)
    assert line in text
    pattern = rf"^mine.py breaks the contract: {verb} .*{words}"
    with pytest.raises(UserError, match=pattern) as caught:
        check_contract(write(tmp_path, text), {}, make_spec(), 3, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("verb, line, words", [
    ("act", "return obs @ torch.ones(5, 2)",
     r"act failed on tensors of shape \(S, N, ...\) = \(3, 3, ...\): RuntimeError: "),
    ("observe", "raise KeyError('rewards')", r"observe failed on tensors .*KeyError: 'rewards'"),
    ("observe", "assert actions.shape == (3, 3), actions.shape", r"failed .*\[3, 3, 2\]"),
    ("update", "1 / 0", r"update failed .*ZeroDivisionError: division by zero"),
    ("state_dict", "raise OSError", r"saving its state failed .*OSError"),
    ("load_state_dict", "self.gain = state['gian']",
     r"restoring its state failed .*KeyError: 'gian'"),
    ("__init__", "None.item()", r"Agent\(\) failed: AttributeError: "),
    ("__init__", "torch.optim.Adam([torch.zeros(1)], lr=-1.0)",
     r"Agent\(\) failed: ValueError: Invalid learning rate: -1.0"),  # no setting's: torch said it
])
def test_a_verb_that_raises_is_placed_and_its_traceback_is_printed(tmp_path, capsys, verb, line,
                                                                   words):
    """File and line of the innermost frame in the agent's file, though torch raised deeper."""
    text = re.sub(rf"(def {verb}\(.*\n) .*", rf"\1        {line}", KEEPS_THE_CONTRACT)
    if verb == "__init__":
        start = "        if config.gain"
        text = KEEPS_THE_CONTRACT.replace(start, f"        {line}\n{start}")
    number = text[: text.index(line)].count("\n") + 1
    path = write(tmp_path, text)
    with pytest.raises(CodeError, match=rf"^{path}:{number}: .*{words}") as caught:
        check_contract(path, {}, make_spec(), 3, "cpu")
    assert "\n" not in str(caught.value)
    assert guarded(lambda: check_contract(path, {}, make_spec(), 3, "cpu")) == 2
    *above, last = capsys.readouterr().err.splitlines()
    assert last == f"error: {caught.value}"
    assert above[0].startswith("Traceback") and any(f'"{path}", line {number}' in x for x in above)
    assert above[-1].startswith(type(caught.value.__cause__).__name__)


def test_a_target_without_its_dimension_of_critics_is_refused_with_the_place(tmp_path):
    """With two seeds, as many as critics, it would broadcast."""
    text, line = Path("agents/sac.py").read_text(), "            target = target[:, None].expand("
    before, _, after = text.partition(line)
    path = write(tmp_path, before + after.partition("\n")[2])
    check = "assert values.shape == target.shape"
    number = path.read_text().partition(check)[0].count("\n") + 1
    with pytest.raises(CodeError, match=rf"^{path}:{number}: update failed .*AssertionError: "
                       r".*\[3, 2, 16\].*\[3, 16\]"):
        check_contract(path, {"batch_size": 16, "qf_width": 16, "actor_width": 16}, make_spec(), 1,
                       "cpu")


def test_a_setting_that_the_agent_refuses_is_no_bug_in_it(tmp_path):
    with pytest.raises(UserError) as caught:
        build(write(tmp_path), gain=-1)
    assert not isinstance(caught.value, CodeError)


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


# State


class Inner:
    STATE = ("count", "rows")

    def __init__(self, value):
        self.count, self.rows = value, torch.full((2, 3), float(value))


class Everything:
    STATE = ("network", "optimizer", "tensor", "generator", "count", "rate", "flag", "inner",
             "numbers", "generators", "pair")

    def __init__(self, value):
        self.network = nn.Linear(2, 2)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=value)
        self.network(torch.ones(1, 2)).sum().backward()
        self.optimizer.step()
        self.tensor = torch.full((2,), float(value), requires_grad=True)
        self.generator = torch.Generator().manual_seed(value)
        self.count, self.rate, self.flag, self.inner = value, value / 2, value > 5, Inner(value)
        self.numbers, self.pair = [value, 2.5 * value], (torch.full((2,), float(value)), value)
        self.generators = [torch.Generator().manual_seed(value + i) for i in range(2)]
        self.unsaved = value


def test_every_type_of_state_is_saved_by_reference_and_restored_in_place():
    giver, taker = Everything(3), Everything(7)
    parts = {name: getattr(taker, name) for name in Everything.STATE}
    pointers = [x.data_ptr() for x in (taker.network.weight, taker.tensor, taker.inner.rows)]
    state = save_state(giver)
    assert state["tensor"].data_ptr() == giver.tensor.data_ptr()
    assert not state["tensor"].requires_grad
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    restore_state(taker, torch.load(file, weights_only=True))
    assert torch.equal(taker.network.weight, giver.network.weight)
    assert taker.optimizer.param_groups[0]["lr"] == 3
    moments = [next(iter(x.optimizer.state.values()))["exp_avg"] for x in (giver, taker)]
    assert torch.equal(*moments) and moments[0].data_ptr() != moments[1].data_ptr()
    assert taker.tensor.tolist() == [3, 3] and taker.tensor.requires_grad
    assert torch.equal(*(torch.rand(3, generator=x.generator) for x in (giver, taker)))
    for index in range(2):
        assert torch.equal(*(torch.rand(3, generator=x.generators[index])
                             for x in (giver, taker)))
    assert (taker.count, taker.rate, taker.flag) == (3, 1.5, False)
    assert taker.inner.count == 3 and taker.inner.rows.unique() == 3
    assert taker.numbers == [3, 7.5] and taker.pair[0].tolist() == [3, 3] and taker.pair[1] == 3
    assert taker.unsaved == 7
    for name in ("network", "optimizer", "tensor", "generator", "inner", "numbers", "generators"):
        assert getattr(taker, name) is parts[name], name
    assert pointers == [x.data_ptr() for x in (taker.network.weight, taker.tensor,
                                               taker.inner.rows)]


@pytest.mark.parametrize("change, words", [
    (lambda x: setattr(x, "tensor", torch.zeros(5)), r"tensor is \(2,\), .*checkpoint's is \(5,\)"),
    (lambda x: setattr(x.inner, "rows", torch.zeros(2, 9)), r"rows is \(2, 3\), .* \(2, 9\)"),
    (lambda x: setattr(x, "network", nn.Linear(2, 4)),
     r"(?s)network does not fit the checkpoint: .*\[4(, 2)?\].*\[2(, 2)?\]"),
    (lambda x: setattr(x, "pair", (torch.zeros(4), 1)), r"pair is \(2,\), .* \(4,\)"),
    (lambda x: x.generators.pop(), r"generators has 2 parts, the checkpoint's has 1"),
    (lambda x: setattr(x, "STATE", x.STATE[1:]), r"the checkpoint has no network, which STATE")])
def test_a_state_that_does_not_fit_is_refused_by_name_with_both_shapes(change, words):
    giver = Everything(3)
    change(giver)
    with pytest.raises(ValueError, match=words):
        restore_state(Everything(7), save_state(giver))


@pytest.mark.parametrize("value, kind", [({}, "dict"), (None, "NoneType"), (object(), "object"),
                                         ([1, {}], "dict")])
def test_a_state_of_another_type_is_refused_by_name(value, kind):
    agent = Everything(3)
    agent.count = value
    with pytest.raises(TypeError, match=rf"STATE names 'count', a {kind}"):
        save_state(agent)


def test_an_agents_own_methods_come_before_its_state(tmp_path):
    text = KEEPS_THE_CONTRACT.replace("class Agent:\n", "class Agent:\n    STATE = ('seeds',)\n")
    agent = build(write(tmp_path, text), gain=0.5)
    assert save_state(agent) == {"gain": 0.5}
    restore_state(agent, {"gain": 0.25})
    assert agent.gain == 0.25


def test_a_state_that_names_no_attribute_is_an_error_of_the_user(tmp_path):
    text = KEEPS_THE_CONTRACT.partition("    def state_dict")[0].replace(
        "class Agent:\n", "class Agent:\n    STATE = ('gain', 'gian')\n")
    with pytest.raises(UserError, match=r"^mine.py: STATE names 'gian', which Agent\(\)"):
        build(write(tmp_path, text))
    agent = build(write(tmp_path, text.replace(", 'gian'", ",")), gain=0.5)
    assert save_state(agent) == {"gain": 0.5}


def before_state(agent):
    """The agent's state as it saved itself before STATE: counters and tensors in groups, the
    temperature as the last parameter of the actor's optimizer."""
    state = copy.deepcopy(save_state(agent))
    for group, members in (("counters", ("transitions", "critic_steps", "filled")),
                           ("tensors", ("log_std", "returns", "rollout", "plans"))):
        grouped = {name: state.pop(name) for name in members if name in state}
        state |= {group: grouped} if grouped else {}
    alpha = state.pop("alpha_optimizer", None)
    if alpha and agent.config.tune_alpha:
        actor, (group,) = state["actor_optimizer"], alpha["param_groups"]
        last = sum(len(x["params"]) for x in actor["param_groups"])
        actor["param_groups"].append(group | {"params": [last]})
        for moments in alpha["state"].values():
            actor["state"][last] = moments
    return state


@pytest.mark.parametrize("count, tune_alpha", [(25, True), (25, False), (4, True)])
def test_a_checkpoint_from_before_state_continues_exactly(module, count, tune_alpha):
    """Also one from before the first update, whose optimizers are empty."""
    steps = make_steps((0, 1), 1, 45)
    giver, taker = (make_agent(module, seeds=seeds, tune_alpha=tune_alpha, replay_ratio=1.0)
                    for seeds in ((0, 1), (5, 6)))
    drive(giver, steps[:count])
    drive(taker, steps[:12])
    state = before_state(giver)
    assert "counters" in state and "alpha_optimizer" not in state and "transitions" not in state
    restore_state(taker, state)
    histories = [drive(agent, steps[count:]) for agent in (giver, taker)]
    assert len(histories[0]) == len(histories[1]) >= 2
    for ours, theirs in zip(*histories, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(*x) for x in zip(
        *(agent.generators[0].get_state()[None] for agent in (giver, taker)), strict=True))


def test_every_range_is_of_a_setting_and_holds_its_default(module):
    check_ranges(module, module.Config())
    assert module.RANGES.keys() <= module.Config.__dataclass_fields__.keys()
    for low, high in module.RANGES.values():
        assert low < high


@pytest.mark.parametrize("line, words", [
    ("return {'qf': self.gone}", r"hidden_activations failed .*no attribute 'gone'"),
    ("return [self.gain]", r"hidden_activations should give a dict of lists of tensors"),
    ("return {'critics': []}", r"keys that name the agent's networks, but gave 'critics'")])
def test_hidden_activations_are_tried_before_the_run(tmp_path, line, words):
    method = f"\n    def hidden_activations(self):\n        {line}\n"
    path = write(tmp_path, KEEPS_THE_CONTRACT + method)
    with pytest.raises(UserError, match=words):
        check_contract(path, {}, make_spec(), 3, "cpu")


def test_an_agent_that_never_updates_has_no_hidden_activations(tmp_path):
    """With a replay ratio of 0, for example."""
    idle = KEEPS_THE_CONTRACT.replace('return {"loss": torch.zeros(self.seeds)}', "return {}")
    path = write(tmp_path, f"{idle}\n    def hidden_activations(self):\n        return self.gone\n")
    check_contract(path, {}, make_spec(), 3, "cpu")


def test_a_whole_number_in_a_setting_of_type_float_becomes_one():
    """As a search space or a JSON file has them."""
    config = settings.build(load_agent("agents/crossq.py").Config, {"beta1": 0, "batch_size": 7})
    assert (type(config.beta1), type(config.batch_size)) == (float, int)
    schedule = settings.build(load_agent("agents/ppo.py").Config, {"lr_schedule": [[0, 1]]})
    assert repr(schedule.lr_schedule) == "((0.0, 1.0),)"


def test_a_default_may_be_a_whole_number_in_a_setting_of_type_float():
    @dataclass(frozen=True)
    class Config:
        alpha: float = 1

    assert settings.plain_config(Config()) == {"alpha": 1}


def test_the_numbers_in_a_tuple_are_in_range_too():
    module = load_agent("agents/ppo.py")
    check_ranges(module, module.Config(lr_schedule=((0, 1e-3), (10, 0))))
    for points in ((0, 1e-3), (10, math.nan)), ((-1, 1e-3),):
        with pytest.raises(ValueError, match=r"lr_schedule must lie in \[0, inf\], not (nan|-1)"):
            check_ranges(module, module.Config(lr_schedule=points))
