"""python -m lab.check on broken agents, on agents with other names, and its probe environments."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lab.check import __main__ as check
from lab.check import driver
from lab.envs import probes
from lab.errors import guarded
from tests.conftest import few_updates
from tests.test_agent_file import KEEPS_THE_CONTRACT

TRUNCATION, TERMINATION, TRACE, SUCCESSOR, RING, LEARNS = list(check.CHECKS)[-6:]
TRAINING = TRUNCATION, TERMINATION, TRACE, SUCCESSOR, RING
QUICK = list(check.CHECKS)[:-6]
(IMPORTS, VERBS, NUMBER, BOUNDS, FROZEN, METRICS, WEIGHTS, SEEDS, ALONE, NAN, RESUME,
 POLICY) = QUICK

ADDED = "self.rows[:, self.position : end] = torch.cat([obs, actions, next_obs, flags], -1)"
# The row before gets the next observation that is acted on for its successor.
NEXT_REPLACED = f"""{ADDED}
        N, O = obs.shape[1:]
        start = (self.position or self.rows.shape[1]) - N
        self.rows[:, start : start + N, -2 - O : -2] = obs"""
# Until the next row comes, the newest row's successor is the oldest one's observation.
JOINED = f"""N, O = obs.shape[1:]
        if self.size:
            start = (self.position or self.rows.shape[1]) - N
            self.rows[:, start : start + N, -2 - O : -2] = self.late
        {ADDED}
        self.late, oldest = next_obs, end % self.rows.shape[1]
        self.rows[:, self.position : end, -2 - O : -2] = self.rows[:, oldest : oldest + N, :O]
        """
REMEMBERS = """        inputs, memory = self.lstm(self.normalise(obs), memory)
        return"""

# name: agent, what is replaced, by what, the checks that run, those that must fail
BROKEN = {
    "termination ignored": ("sac", "gamma * (1 - terminations) * next_values",
                            "gamma * next_values", TRAINING, {TERMINATION}),
    "truncation cuts": ("sac", "self.replay.add(obs, actions, next_obs, rewards, terminations)",
                        "self.replay.add(obs, actions, next_obs, rewards, terminations + "
                        "truncations)", TRAINING, {TRUNCATION}),
    "truncation cuts the advantage": (
        "ppo", "gamma * (1 - terminations) * next_values",
        "gamma * (1 - terminations - truncations) * next_values", TRAINING, {TRUNCATION}),
    "trace through all ends": (
        "ppo", "(1 - torch.maximum(terminations, truncations))\n", "(1 - 0 * terminations)\n",
        TRAINING, {TRACE}),
    "next_obs replaced": ("sac", ADDED, NEXT_REPLACED, TRAINING, {SUCCESSOR}),
    "newest joined to oldest": ("sac", ADDED, JOINED, TRAINING, {RING}),
    "gradients shared": ("sac", "self.qf_optimizer.step()\n", """for p in self.qf.parameters():
            p.grad[:] = p.grad.mean(0, keepdim=True)
        self.qf_optimizer.step()
""", QUICK, {ALONE, NAN}),
    "normaliser shared": (
        "ppo", "var, mean = torch.var_mean(x, 1, keepdim=True, correction=0)",
        "var, mean = torch.var_mean(x, (0, 1), keepdim=True, correction=0)",
        (SEEDS, ALONE, NAN), {ALONE, NAN}),
    "generators not saved": ("sac", '"replay", "generators", "transitions"',
                             '"replay", "transitions"', QUICK, {RESUME}),
    "a counter not saved": ("crossq", '"transitions", "critic_steps", ', '"transitions", ',
                            (FROZEN, RESUME), {RESUME}),
    "not clamped": ("sac", "return actions.clamp(self.low, self.high)", "return actions", QUICK,
                    {BOUNDS}),
    "mask ignored": ("ppo_discrete", "if self.spec.mask_start is not None:", "if False:",
                     (NUMBER, BOUNDS), {BOUNDS}),
    "evaluation remembers in the agent": (
        "ppo_lstm", REMEMBERS, REMEMBERS.replace("\n", "\n        self.memory = memory\n", 1),
        (BOUNDS, FROZEN), {FROZEN}),
    "evaluation does not begin with zeros": (
        "ppo_lstm", REMEMBERS, "        if memory is None:\n            memory = "
        f"obs.new_ones(*obs.shape[:2], 2 * self.lstm.units)\n{REMEMBERS}", (BOUNDS, FROZEN),
        {FROZEN}),
    "evaluation overwrites the memory": (
        "ppo_lstm", REMEMBERS, "        old = memory\n" + REMEMBERS.replace(
            "\n", "\n        memory = memory if old is None else old.copy_(memory)\n", 1),
        (BOUNDS, FROZEN), {FROZEN}),
    "noise not clamped": ("cem", "return actions.clamp(self.low, self.high)", "return actions",
                          (NUMBER, BOUNDS), {BOUNDS}),
    "normalised while acting": (
        "ppo", "        mean = self.actor(self.normalise(obs))\n",
        "        self.obs_normaliser.update(obs)\n"
        "        mean = self.actor(self.normalise(obs))\n", (BOUNDS, FROZEN), {FROZEN}),
    "noise of all": ("sac", "torch.randn(shape, generator=g, device=g.device)",
                     "torch.randn(shape, device=g.device)", QUICK, {SEEDS, ALONE, NAN, RESUME}),
    "target at rest": ("sac", "self.config.tau)\n", "0.0)\n", QUICK,
                       {WEIGHTS}),
    "loss attached": ("sac", '{"loss/qf": qf_loss.detach(),', '{"loss/qf": qf_loss,', QUICK,
                      {VERBS, METRICS}),
    "one number of environments": (
        "droq", "torch.zeros(*obs.shape[:2], self.spec",
        "torch.zeros(len(obs), self.num_envs, self.spec", (VERBS, NUMBER, BOUNDS),
        {NUMBER}),
    "imports the lab": ("sac", "import copy\n", "import copy\nfrom lab import stats\n", QUICK,
                        {IMPORTS}),
}


def broken(folder, name):
    agent, old, new, *_ = BROKEN[name]
    text = Path(f"agents/{agent}.py").read_text()
    assert text.count(old) == 1
    path = folder / "mine.py"
    path.write_text(text.replace(old, new))
    return path


def broken_subject(folder, name):
    path = broken(folder, name)
    return check.parse([str(path), *([] if name in TRAINED else few_updates(path))])


# One that trains is quick, the others are slow; and one is seen by every quick check.
TRAINED = [name for name, (*_, checks, _) in BROKEN.items() if checks == TRAINING]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] if name in TRAINED[1:] else []) for name in BROKEN])
def test_a_broken_agent_is_caught(tmp_path, name):
    *_, wanted = BROKEN[name]
    subject = broken_subject(tmp_path, name)
    for each in wanted:
        reason = check.failure(check.CHECKS[each], subject)
        assert reason and "\n" not in reason, each


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name == "target at rest" else [pytest.mark.slow])
    for name in BROKEN])
def test_a_broken_agent_is_caught_by_name_and_by_no_other_check(tmp_path, name):
    *_, checks, wanted = BROKEN[name]
    subject = broken_subject(tmp_path, name)
    reasons = {each: check.failure(check.CHECKS[each], subject) for each in checks}
    assert {each for each, reason in reasons.items() if reason} == wanted, reasons
    assert not any("\n" in reason for reason in reasons.values() if reason)


def changed_sac(folder, *changes):
    text = Path("agents/sac.py").read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = folder / "mine.py"
    path.write_text(text)
    return check.parse([str(path)])


def test_statistics_outside_a_module_are_caught(tmp_path):
    """Mean observations in a tensor without a gradient: in a checkpoint, but no weights."""
    subject = changed_sac(
        tmp_path, ("        self.batch = None", "        self.seen = torch.zeros(len(seeds), 1, "
                   "spec.obs_dim)\n        self.batch = None"),
        ('STATE = ("actor",', 'STATE = ("seen", "actor",'),
        ("actions, _ = self.actor(obs, noise)", "actions, _ = self.actor(obs - self.seen, noise)"),
        ("        self.transitions += obs", "        self.seen.lerp_(obs.mean(1)[:, None], 0.1)\n"
         "        self.transitions += obs"))
    reasons = {each: check.failure(check.CHECKS[each], subject) for each in (RESUME, POLICY)}
    assert reasons[RESUME] is None
    assert re.match(r"with the weights of seed 0, a new agent acts \S+ off", reasons[POLICY])


@pytest.mark.parametrize("name", ["critic_steps", "qf_target", "log_alpha"])
def test_an_attribute_that_changed_and_is_in_no_state_is_named(tmp_path, name):
    state = ast.literal_eval(re.search(
        r"STATE = (\([^)]*\))\n\n    def __init__\(self, spec, config, seeds",
        Path("agents/sac.py").read_text())[1])
    subject = changed_sac(tmp_path, ("    def __init__(self, spec, config, seeds", f"""\
    STATE = {tuple(x for x in state if x != name)}

    def __init__(self, spec, config, seeds"""))
    reason = check.failure(check.CHECKS[RESUME], subject)
    assert re.search(rf"STATE lacks .*\b{name}\b.*, which changed", reason), reason
    assert not re.search(r"\b(actor|replay|spec|config|update_critic)\b",
                         reason.partition("STATE")[2])


def test_a_network_that_is_frozen_on_purpose_may_stay_as_it_is(tmp_path):
    """A random encoder; a target network may not, though it needs no gradient either."""
    encoder = [
        ('STATE = ("actor", ', 'STATE = ("encoder", "actor", '),
        ("        self.actor = Actor(", """\
        self.encoder = Linear(self.generators, spec.obs_dim, spec.obs_dim).requires_grad_(False)
        self.actor = Actor("""),
        ("        actions, _ = self.actor(obs, noise)\n",
         "        actions, _ = self.actor(self.encoder(obs), noise)\n"),
        ("        self.replay.add(obs, actions, next_obs,",
         "        self.replay.add(self.encoder(obs), actions, self.encoder(next_obs),")]
    subject = changed_sac(tmp_path, *encoder)
    for name in (VERBS, WEIGHTS, ALONE, RESUME):
        assert check.failure(check.CHECKS[name], subject) is None
    subject = changed_sac(tmp_path, *encoder, ("self.config.tau)\n", "0.0)\n"))
    assert "qf_target" in check.failure(check.CHECKS[WEIGHTS], subject)


def test_a_fixed_layer_of_a_trained_module_is_told_where_to_go(tmp_path):
    subject = changed_sac(tmp_path, (
        "        self.actor_optimizer = ",
        "        self.actor.mlp.fc2.requires_grad_(False)\n        self.actor_optimizer = "))
    assert "must be an attribute of its own" in check.failure(check.CHECKS[WEIGHTS], subject)


def test_a_nan_that_stays_is_no_change(tmp_path):
    subject = changed_sac(tmp_path, (
        'STATE = ("actor", ', 'STATE = ("last", "number", "actor", '),
        ("        self.actor = Actor(", """\
        self.last, self.number = torch.full([len(seeds)], math.nan), math.nan
        self.actor = Actor("""))
    for name in (FROZEN, ALONE, NAN, RESUME):
        assert check.failure(check.CHECKS[name], subject) is None


def test_an_agent_for_one_discrete_action_is_checked_with_one(tmp_path, monkeypatch):
    text = Path("agents/ppo_discrete.py").read_text()
    place = "        self.actor = Network("
    path = tmp_path / "mine.py"
    path.write_text(text.replace(place, f"""\
        if len(spec.num_actions) != 1:
            raise ValueError(f"one discrete action, not {{spec.num_actions}}")
{place}"""))
    assert path.read_text() != text
    subject = check.parse([str(path)])
    assert subject.spec.num_actions == (5,)
    for name in (VERBS, NUMBER, BOUNDS, FROZEN, LEARNS):
        assert check.failure(check.CHECKS[name], subject) is None, name
    assert check.parse(["agents/ppo_discrete.py"]).spec.num_actions == (2, 3)


@pytest.mark.parametrize("task", [probes.Target, probes.OneTarget])
def test_the_best_constant_action_by_hand(task):
    env = task()
    box = env.action_space
    returns = []
    for seed in range(4000):
        env.reset(seed=seed)
        returns.append(sum(env.step(task.centre)[1] for _ in range(4)))
    assert sum(returns) / 4000 == pytest.approx(probes.best_constant(task), rel=0.03)
    env.reset(seed=0)
    best = task.centre + task.slope * env.obs[-len(task.slope):]
    assert (box.low <= best).all() and (best <= box.high).all() and env.step(best)[1] == 0


def test_the_command_says_passed_or_failed_and_exits_so(tmp_path, monkeypatch, capsys):
    def raises(subject):
        raise ZeroDivisionError("the second\nline")

    monkeypatch.setattr(check, "CHECKS", {VERBS: check.CHECKS[VERBS], IMPORTS: raises})
    path = broken(tmp_path, "loss attached")
    assert guarded(lambda: check.run([str(path), "--gamma", "0.7"])) == 1
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{path} with gamma 0.7, ") and "batch_size 64" in first
    assert lines == [f"FAILED  {VERBS}: update should give loss/qf detached, but gave it with a "
                     "gradient", f"FAILED  {IMPORTS}: ZeroDivisionError: the second"]
    assert last.startswith("0 of 2 checks passed in ")
    monkeypatch.setattr(check, "CHECKS", {VERBS: check.CHECKS[VERBS]})
    assert check.run(["agents/sac.py"]) == 0
    assert capsys.readouterr().out.splitlines()[1].rstrip() == f"passed  {VERBS}"


@pytest.mark.parametrize("argv, words", [
    (["agents/sac.py", "--gama", "0.9"], "--gama"),
    (["agents/sac.py", "--gamma", "2"], r"sac.py on check: gamma must lie in \[0, 1\], not 2"),
    (["nowhere.py"], "no agent file 'nowhere.py'"),
    (["tests/house.py"], "house.py needs a class Agent"),
    (["agents/sac.py", "--steps", "10"], "--steps"),
    pytest.param(["agents/sac.py", "--cuda"], "--cuda: torch sees no CUDA device",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"))])
def test_bad_input_is_one_line_and_exit_code_2(argv, words, capsys):
    assert guarded(lambda: check.run(argv)) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(rf"error: .*{words}.*\n", captured.err) and not captured.out


def test_settings_are_made_small_by_their_names_and_flags_win(tmp_path):
    text = KEEPS_THE_CONTRACT.replace("    gain: float = 1.0  # of the action\n", """
    gain: float = 1.0
    critic_learning_rate: float = 1e-3
    minibatch_size: int = 256
    hidden_size: tuple[int, ...] = (400, 300)
    world_width: int = 512
    replay_ratio: int = 4
    gamma: float = 0.99
""")
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert check.parse([str(path), "--gamma", "0.99"]).config == {
        "gain": 1.0, "critic_learning_rate": 3e-3, "minibatch_size": 256, "world_width": 32,
        "hidden_size": (400, 300), "replay_ratio": 4, "gamma": 0.99}
    path.write_text(text.replace("if config.gain < 0:", "if config.world_width < 100:"))
    assert check.parse([str(path)]).config["world_width"] == 512


def test_an_agent_that_only_raises_fails_check_by_check(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(KEEPS_THE_CONTRACT.replace("self.gain, self.seeds,", "_, _,"))
    subject = check.parse([str(path)])
    reasons = [check.failure(fn, subject) for fn in list(check.CHECKS.values())[1:]]
    assert all("AttributeError: 'Agent' object has no attribute" in x for x in reasons), reasons


def test_an_agent_that_learns_nothing_is_told_so(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(KEEPS_THE_CONTRACT)
    subject = check.parse([str(path), "--gain", "1"])
    failed = {name: reason for name, fn in check.CHECKS.items()
              if (reason := check.failure(fn, subject))}
    assert {*TRAINING, LEARNS, WEIGHTS, SEEDS, NAN} <= set(failed)
    assert "could not decide" in failed[TRUNCATION] or "did not learn" in failed[TRUNCATION]


def test_a_replay_that_cannot_wrap_is_not_passed(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "PROBE_STEPS", 640)  # what it learns does not matter
    text = Path("agents/sac.py").read_text()
    path = tmp_path / "mine.py"
    path.write_text(text.replace("buffer_size", "memory"))
    subject = check.parse([str(path)])
    assert "not tested" in check.failure(check.CHECKS[RING], subject)
    path.write_text(text.replace("buffer_size", "memory").replace("self.replay", "self.store")
                    .replace('"replay"', '"store"'))
    subject = check.parse([str(path)])  # whatever the replay is called
    assert "not tested: its replay has 640 rows" in check.failure(check.CHECKS[RING], subject)


@pytest.mark.parametrize("gamma", [0.6, 0.8, 1.0])
def test_what_is_best_in_a_fork_follows_from_its_steps(gamma):
    """And each mistake turns round its own decision and no other."""
    def value(mistake, state, u):
        env = probes.Fork()
        env.reset(seed=0)
        env._go(state)
        obs, reward, terminated, truncated, _ = env.step([1 + 2 * u])
        if truncated and mistake == probes.SUCCESSOR:
            obs = env.reset()[0]
        after = 2 * obs[probes.PRIZE]
        if obs[probes.WAY] and mistake == probes.RING:
            after = gamma / 2 * 4  # half of the time it leads to RING
        over = (terminated and mistake != probes.TERMINATED) or (
            truncated and mistake == probes.TRUNCATED)
        surprise = 0.0
        if (terminated or truncated) and mistake == probes.TRACE:  # by the next episode's reward
            shown = 2 * env.reset()[0][probes.PRIZE]
            surprise = env.step([0.0])[1] - shown
        return reward + gamma * (after * (not over) + surprise)

    for mistake in (None, *range(probes.WAY)):
        for state in range(probes.WAY):
            actions = [-1.0, -0.01, 0.01, 1.0]
            best = max(actions, key=lambda u, s=state: value(mistake, s, u))
            wrong = best * probes.BEST[state] <= 0
            assert wrong == (state == mistake), (mistake, state, best)


def test_a_fork_ends_and_begins_as_it_says():
    env = probes.Fork()
    begun = {int(env.reset(seed=seed)[0].argmax()) for seed in range(40)}
    assert begun == set(range(probes.WAY))
    for state, ends, begins in ((probes.TRUNCATED, (False, True), 0.5),
                                (probes.SUCCESSOR, (False, True), -0.5),
                                (probes.TERMINATED, (True, False), -0.5)):
        env._go(state)
        assert env.step([2.0])[2:4] == ends
        assert env.reset()[0].tolist() == [*[0] * probes.PRIZE, begins]
        assert env.step([0.0])[1:4] == (2 * begins, True, False)
    env._go(probes.TRACE)
    assert env.step([2.0])[1:4] == (0.25, True, False)
    assert env.reset()[0].argmax() == probes.HIDDEN and env.step([0.0])[1:4] == (-1, True, False)
    env._go(probes.RING)
    flags = [env.step([2.0])[2] for _ in range(3)]
    assert flags == [False, False, True]


def test_made_up_transitions_hold_every_kind_of_end():
    steps = driver.make_steps((0, 1), 4, 60)
    _, _, next_obs, terminations, truncations = map(torch.stack, zip(*steps, strict=True))
    obs = torch.stack([step[0] for step in steps])
    assert terminations.any() and truncations.any() and not (terminations * truncations).any()
    fresh = (obs[1:] != next_obs[:-1]).all(-1)
    assert torch.equal(fresh, (terminations + truncations)[:-1] > 0)


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(tmp_path):
    mine = shutil.copy("agents/ppo.py", tmp_path / "mine.py")
    done = subprocess.run([sys.executable, "-m", "lab.check", str(mine)], capture_output=True,
                          text=True)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.count("\npassed  ") == len(check.CHECKS)
