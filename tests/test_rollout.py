"""The training and evaluation loops: steps, episode ends, faults and interrupts.

The scripted agent always acts 3, so the return of a Diary episode is three times its length, which
is in the first observation."""

import dataclasses
import math
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lab.agent import load_agent, restore_state
from lab.envs.base import Finished
from lab.envs.host import SyncEnvs
from lab.envs.make import make_envs
from lab.envs.shard import EVALUATION, TRAINING
from lab.envs.spec import probe
from lab.errors import UserError
from lab.training import checkpoint, logger, loop
from lab.training import evaluation as evaluation_module
from lab.training import job as job_module
from lab.training.evaluation import evaluate
from lab.training.job import Job
from lab.training.logger import due
from lab.training.loop import train
from lab.training.recorder import SeedRecorder, read_metrics
from tests import probe_envs, small_run
from tests.conftest import AGENTS, is_discrete, small_config, timeless

SAC = Path("agents/sac.py").resolve()
SMALL_SAC = dataclasses.asdict(small_config(load_agent(SAC)))
PPO, CEM = Path("agents/ppo.py").resolve(), Path("agents/cem.py").resolve()
DIARY, TARGET = "lab-tests/Diary-v0", "lab-tests/Target-v0"
ANYWHERE = f"tests.probe_envs:{DIARY}"  # a worker imports it by name
STEP, LENGTH, START = 1, 2, 3  # places in a Diary's observation

SCRIPTED = '''
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    nan_from: int = 1_000_000  # transitions after which the second seed's metric is NaN
    metric: str = "loss/scripted"


class Agent:
    STATE = ("transitions",)

    def __init__(self, spec, config, seeds, num_envs, total_steps, device, accelerate):
        self.config, self.seeds, self.transitions = config, seeds, 0

    def act(self, obs, explore=True):
        return torch.full((*obs.shape[:2], 1), 3.0)

    def observe(self, obs, *rest):
        self.transitions += obs.shape[1]

    def update(self):
        loss = torch.tensor([float(self.transitions + seed) for seed in self.seeds])
        if self.transitions >= self.config.nan_from:
            loss[1] = float("nan")
        return {self.config.metric: loss}
'''


@pytest.fixture
def scripted(tmp_path):
    path = tmp_path / "scripted.py"
    path.write_text(SCRIPTED)
    return str(path)


def make_job(agent_path=SAC, config=SMALL_SAC, **settings):
    defaults = {"env_id": TARGET, "seeds": (0, 1), "steps": 100, "eval_every": 10, "log_every": 5,
                "checkpoint_every": 0, "eval_episodes": 2}
    return Job(str(agent_path), config, **{**defaults, **settings})


def run(job):
    """Train -> every message."""
    messages = []
    train(job, messages.append)
    return messages


def rows_of(messages):
    """seed -> step -> the row, without the perf/* that depend on the clock."""
    rows = {}
    for message in messages:
        for seed, row in message.get("rows", {}).items():
            rows.setdefault(seed, {})[message["step"]] = dict(row)
    return rows


def files_of(job):
    """The same from the files."""
    rows = {}
    for seed in job.seeds:
        written = read_metrics(job.group / f"seed_{seed}" / "metrics.jsonl")
        rows[seed] = {row.pop("step"): timeless(row) for row in written}
        assert len(rows[seed]) == len(written), "a step is written twice"
    return rows


def without(rows, *tags):
    return {seed: {step: {k: v for k, v in row.items() if k not in tags}
                   for step, row in by_step.items()} for seed, by_step in rows.items()}


def interrupt_at(step, act):
    """An emit that calls `act` when the row of that step is there."""
    def emit(message):
        if message["step"] == step and "rows" in message:
            act()
    return emit


def fail():
    raise RuntimeError("the reader is gone")


class Ones:
    def __init__(self):
        self.explored = []

    def act(self, obs, explore=True):
        self.explored.append(explore)
        return torch.ones(*obs.shape[:2], 1)


def test_evaluation_is_the_mean_over_the_first_episode_of_each_environment():
    evaluation, agent = make_envs(DIARY, [0, 1, 2], 4), Ones()
    obs = evaluation.reset(EVALUATION, 7)
    assert len(set(obs[0, :, LENGTH].tolist())) > 1, "the environments end at different steps"
    assert evaluate(agent, evaluation, 7) == pytest.approx(obs[..., LENGTH].mean(1).tolist())
    assert agent.explored == [False] * int(obs[..., LENGTH].max())
    assert evaluate(agent, evaluation, 7) == evaluate(agent, evaluation, 7)
    assert evaluate(agent, evaluation, 8) != evaluate(agent, evaluation, 7)


@pytest.mark.parametrize("every, num_envs, expected", [
    (10, 1, [10, 20, 30]), (10, 4, [12, 20, 32]), (10, 12, [12, 24, 36]), (3, 4, list(
        range(4, 40, 4))), (0, 4, []), (100, 4, [])])
def test_due_once_for_each_multiple_that_the_environments_cross(every, num_envs, expected):
    steps = range(num_envs, 40, num_envs)
    assert [step for step in steps if due(step, every, num_envs)] == expected


def test_rows_come_when_due_and_evaluations_ten_times(tmp_path):
    job = make_job(run=str(tmp_path / "run"))
    messages = run(job)
    rows = rows_of(messages)
    assert rows == files_of(job) and list(rows) == [0, 1]
    for by_step in rows.values():
        assert list(by_step) == list(range(5, 101, 5))
        assert [s for s, row in by_step.items() if "return/eval" in row] == list(range(10, 101, 10))
        assert all({"loss/qf", "loss/actor"} <= set(row) for s, row in by_step.items() if s > 10)
    for row in read_metrics(job.group / "seed_1" / "metrics.jsonl"):
        assert row["perf/steps_per_s"] > 0 and "perf/updates_per_s" in row
    assert messages[0] == {"step": 0} and messages[-1]["step"] == 100
    assert len(list(job.checkpoints.glob("step_*"))) == 1


def test_without_a_run_folder_no_file_is_left(tmp_path, monkeypatch):
    with_files = run(make_job(run=str(tmp_path / "run"), checkpoint_every=20))
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert rows_of(run(make_job(checkpoint_every=20))) == rows_of(with_files)
    assert list(empty.iterdir()) == []


def test_several_environments_log_evaluate_and_checkpoint_at_the_first_step_past_the_mark(tmp_path):
    job = make_job(run=str(tmp_path), num_envs=3, steps=60, log_every=10, eval_every=20,
                   checkpoint_every=50)
    rows = rows_of(run(job))[0]
    assert list(rows) == [12, 21, 30, 42, 51, 60]
    assert [step for step, row in rows.items() if "return/eval" in row] == [21, 42, 60]
    assert sorted(int(path.name[5:17]) for path in job.checkpoints.glob("step_*")) == [51, 60]


def test_a_run_ends_with_a_row_an_evaluation_and_a_checkpoint(tmp_path):
    job = make_job(run=str(tmp_path), steps=7, log_every=100, eval_every=100)
    rows = rows_of(run(job))[1]
    assert list(rows) == [7] and "return/eval" in rows[7]
    assert checkpoint.load_latest(job.checkpoints)["step"] == 7


@pytest.mark.parametrize("steps, actions", [(60, 10), (61, 11)])
def test_steps_are_the_environments_and_an_agent_counts_its_actions(
        scripted, monkeypatch, steps, actions):
    """Two environments, each action held for three steps: the rows come six steps apart, at the
    first one past the mark."""
    built, build = [], loop.build_agent
    monkeypatch.setattr(loop, "build_agent", lambda *args: built.append(args) or build(*args))
    job = make_job(scripted, {}, env_id=DIARY, num_envs=2, steps=steps, log_every=10,
                   eval_every=20, action_repeat=3, failure_below=1.0)
    rows = rows_of(run(job))[1]
    end = 6 * actions
    assert list(rows) == [12, 24, 30, 42, 54, 60, 66][:6 + (end > 60)]
    assert [s for s, row in rows.items() if "return/eval" in row] == [24, 42, 60, 66][
        :3 + (end > 60)]
    assert built[0][5] == math.ceil(steps / 3), "total_steps"
    # an update comes before the last transitions are observed
    assert rows[end]["loss/scripted"] == 2 * (actions - 1) + 1
    plain = rows_of(run(dataclasses.replace(job, action_repeat=1, num_envs=6)))[1]
    assert rows[24]["return/eval"] == plain[24]["return/eval"], "evaluation is raw"
    assert all(row["return/train"] == pytest.approx(3 * row["length/train"])
               for row in rows.values())


@pytest.mark.parametrize("num_envs, replay_ratio", [(1, 1.0), (2, 0.5), (2, 2.0)])
def test_updates_are_counted_against_transitions(num_envs, replay_ratio):
    messages = run(make_job(config=SMALL_SAC | {"replay_ratio": replay_ratio}, num_envs=num_envs,
                            log_every=20, eval_every=100))
    speeds = [m for m in messages if "rows" in m]
    assert len(speeds) == 5
    for message in speeds[1:]:  # in the first 20 steps learning starts
        ratio = message["perf/updates_per_s"] / message["perf/steps_per_s"]
        assert ratio == pytest.approx(replay_ratio)


def test_a_row_holds_the_episodes_since_the_row_before(scripted):
    job = make_job(scripted, {}, env_id=DIARY, num_envs=2, steps=60, log_every=10, eval_every=60)
    rows = rows_of(run(job))
    training, lengths = make_envs(DIARY, job.seeds, 2), [[], []]
    training.reset(TRAINING, 0)
    for step in range(2, 61, 2):
        t = training.step(torch.full((2, 2, 1), 3.0))
        for seed, n in (t.terminations + t.truncations).nonzero().tolist():
            lengths[seed].append(float(t.next_obs[seed, n, LENGTH]))
        for seed in job.seeds if step % 10 == 0 else ():
            mean = sum(lengths[seed]) / len(lengths[seed])
            assert rows[seed][step]["length/train"] == pytest.approx(mean)
            assert rows[seed][step]["return/train"] == pytest.approx(3 * mean)
            assert rows[seed][step]["loss/scripted"] == step - 2 + seed
            lengths[seed] = []


def test_a_row_says_what_finished_says_of_its_seed(scripted, monkeypatch):
    """Asked once for each row; a seed that has finished no episode gets no return."""
    calls = []

    def finished(self):
        calls.append(self.config.num_envs)
        return [Finished(len(calls), 10.0 * len(calls), 7.0), Finished(0, 0.0, 0.0)]

    monkeypatch.setattr(SyncEnvs, "finished", finished)
    job = make_job(scripted, {}, env_id=DIARY, num_envs=3, steps=60, log_every=12, eval_every=60)
    rows = rows_of(run(job))
    assert calls == [3] * 5
    assert [row["return/train"] for row in rows[0].values()] == [10, 20, 30, 40, 50]
    assert [row["length/train"] for row in rows[0].values()] == [7] * 5
    assert not any({"return/train", "length/train"} & row.keys() for row in rows[1].values())
    assert list(rows[1]) == list(rows[0]) and "return/eval" in rows[1][60]


@pytest.mark.parametrize("backend, evaluates", [
    (None, "SyncEnvs"), ("sync", "SyncEnvs"), ("workers", "SyncEnvs"), ("torch", "TorchEnvs"),
    ("envpool", "EnvpoolEnvs")])
def test_evaluation_has_the_backend_of_training_but_no_worker_processes(
        monkeypatch, scripted, backend, evaluates):
    if backend == "envpool":
        pytest.importorskip("envpool")
    made, make = [], make_envs

    def spy(*arguments, **settings):
        made.append(make(*arguments, **settings))
        return made[-1]

    monkeypatch.setattr(job_module, "make_envs", spy)
    run(make_job(scripted, {}, env_id="Pendulum-v1", num_envs=3, steps=9, backend=backend,
                 workers=1, eval_episodes=2, clip_reward=(-1.0, 1.0), failure_below=-5.0,
                 action_repeat=2))
    training, evaluation = made
    trains = "WorkerEnvs" if backend == "workers" else evaluates
    assert [type(each).__name__ for each in made] == [trains, evaluates]
    assert training.shape == (2, 3) and evaluation.shape == (2, 2)
    assert training.config.rules == (2, (-1, 1), -5) and evaluation.config.rules == (2, None, None)


@pytest.mark.parametrize("rules", [{}, {"action_repeat": 2, "failure_below": 0.5}])
def test_training_with_workers_gives_the_rows_of_the_plain_loop(rules):
    """Every loss and return, to the bit."""
    plain, workers = (rows_of(run(make_job(env_id=ANYWHERE, num_envs=2, backend=backend, workers=2,
                                           clip_reward=(-1.0, 2.0), **rules)))
                      for backend in ("sync", "workers"))
    assert plain == workers and len(plain[0]) == 20
    assert {"loss/qf", "return/train", "return/eval"} <= plain[1][100].keys()


def pairs_up(obs, next_obs):
    """Whether each Diary observation is followed by that of the same environment."""
    step = torch.zeros(next_obs.shape[-1])
    step[STEP] = 1
    return torch.equal(next_obs, obs + step)


def test_in_groups_ppo_stores_each_environments_action_and_its_log_prob(tmp_path):
    """Three environments in groups of two and one. The reward of a Diary step is its action."""
    module = load_agent(PPO)
    config = small_config(module, num_steps=24, norm_obs=False)
    job = make_job(PPO, dataclasses.asdict(config), env_id=ANYWHERE, num_envs=3, steps=60,
                   backend="workers", workers=2, groups=2, run=str(tmp_path))
    run(job)
    state = checkpoint.load_latest(job.checkpoints)["agent"]
    assert state["filled"] == 20  # so that the actor is still the one that acted
    rollout = state["rollout"][:, :20]
    obs, actions, log_probs, next_obs, rewards, _ = rollout.split([4, 1, 1, 4, 1, 2], -1)
    assert pairs_up(obs, next_obs) and torch.equal(rewards, actions)
    assert len(actions.unique()) == actions.numel() == 120
    spec = probe(DIARY)
    agent = module.Agent(spec, config, list(job.seeds), num_envs=3, total_steps=60)
    restore_state(agent, state)
    with torch.no_grad():
        mean = agent.actor(obs.flatten(1, 2))
    expected = module.gaussian_log_probs(actions.flatten(1, 2), mean, agent.log_std)
    torch.testing.assert_close(log_probs.flatten(1), expected)
    assert len(mean.unique()) > 100 and log_probs.std() > 0.1


def test_in_groups_cem_stores_each_environments_action_and_keeps_its_plan(tmp_path):
    """Without noise the last plan is the last action, in units of the action's range of 100."""
    config = dataclasses.asdict(small_config(
        load_agent(CEM), noise=0.0, qf_lr=0.0, samples=4, iterations=2, target_samples=2))
    job = make_job(CEM, config, env_id=ANYWHERE, num_envs=3, steps=60, backend="workers", workers=2,
                   groups=2, run=str(tmp_path))
    run(job)
    state = checkpoint.load_latest(job.checkpoints)["agent"]
    obs, actions, next_obs, rewards, _ = state["replay"]["rows"].split([4, 1, 4, 1, 1], -1)
    assert state["replay"]["size"] == 60 and pairs_up(obs, next_obs)
    assert torch.equal(rewards, actions)
    plans, last, after = state["plans"], actions[:, -3:], next_obs[:, -3:]
    goes_on = after[..., [STEP]] < after[..., [LENGTH]]
    torch.testing.assert_close(100 * plans, torch.where(goes_on, last, 0.0))
    assert 1 < goes_on.sum() < 6 and len(last[goes_on].unique()) == goes_on.sum()


def test_the_same_job_twice_gives_equal_metrics(tmp_path):
    first, second = (make_job(run=str(tmp_path / name)) for name in "ab")
    run(first)
    run(second)
    assert files_of(first) == files_of(second)
    other = rows_of(run(make_job(seeds=(0, 2))))
    assert other[0].keys() == files_of(first)[0].keys() and other[2] != files_of(first)[1]


def test_evaluation_does_not_disturb_training(tmp_path):
    often, once = (make_job(run=str(tmp_path / str(every)), eval_every=every)
                   for every in (5, 100))
    rows = [without(rows_of(run(job)), "return/eval") for job in (often, once)]
    assert rows[0] == rows[1] and len(rows[0][0]) == 20
    ends = [checkpoint.load_latest(job.checkpoints)["agent"] for job in (often, once)]
    assert torch.equal(ends[0]["replay"]["rows"], ends[1]["replay"]["rows"])
    assert all(map(torch.equal, ends[0]["generators"], ends[1]["generators"]))


def test_only_terminations_reach_the_replay_and_next_obs_is_the_true_successor(tmp_path):
    job = make_job(env_id=DIARY, run=str(tmp_path), num_envs=2)
    run(job)
    replay = checkpoint.load_latest(job.checkpoints)["agent"]["replay"]
    assert replay["size"] == 100
    obs, _, next_obs, _, terminations = replay["rows"].split([4, 1, 4, 1, 1], -1)
    episode, step, length, start = obs.unbind(-1)
    assert torch.equal(next_obs, torch.stack([episode, step + 1, length, start], -1))
    end, kind = step + 1 == length, episode % 3
    assert torch.equal(terminations[..., 0] == 1, end & (kind != 1))
    assert all((end & (kind == k)).sum() > 3 for k in range(3))


@pytest.fixture(autouse=True)
def sigterm_is_an_interrupt():
    """As in the command: by itself it would end pytest, once train has passed it on."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_run_whose_checkpoints_are_all_corrupt_is_refused_and_keeps_its_metrics(tmp_path):
    """From step 0 it would begin its metrics anew."""
    job = make_job(run=str(tmp_path))
    run(job)
    before = files_of(job)
    for path in job.checkpoints.glob("step_*.pt"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        run(job)
    assert files_of(job) == before and before[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_job_leaves_a_checkpoint_and_goes_on_from_it(tmp_path, number):
    job = make_job(run=str(tmp_path))
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(job, interrupt_at(45, lambda: signal.raise_signal(number)))
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert checkpoint.load_latest(job.checkpoints)["step"] == 45
    before = files_of(job)
    assert list(before[0]) == list(range(5, 46, 5))
    messages = run(job)
    assert messages[0] == {"step": 45}
    after = files_of(job)
    for seed in job.seeds:
        assert list(after[seed]) == list(range(5, 101, 5))
        assert all(after[seed][step] == row for step, row in before[seed].items())
    for m in messages:
        if "rows" in m:
            assert m["perf/updates_per_s"] / m["perf/steps_per_s"] == pytest.approx(1)
    assert checkpoint.load_latest(job.checkpoints)["agent"]["transitions"] == 100


@pytest.mark.parametrize("rules", [
    {}, {"action_repeat": 3, "failure_below": 0.0, "clip_reward": (-2.0, 0.0)}])
def test_an_interrupted_job_ends_as_one_that_was_not(tmp_path, rules):
    """With each action held for three steps, step 45 lies in the middle of an episode of four."""
    whole, halves = (make_job(run=str(tmp_path / name), **rules) for name in ("whole", "halves"))
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        train(halves, interrupt_at(45, lambda: signal.raise_signal(signal.SIGTERM)))
    run(halves)
    assert files_of(whole) == files_of(halves)


@pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)
def test_a_killed_runs_rows_are_those_of_one_that_was_not_plasticity_too(tmp_path, path):
    """PPO updates at steps 9, 17, 25, ..., the others at 8, 12, 16, ...; rows come every 5 steps,
    checkpoints every 9. A kill at 15 or 20 resumes between an update and its row, a kill at 30
    between two rows with nothing to report."""
    config = dataclasses.asdict(small_config(load_agent(path), replay_ratio=0.25, num_steps=8))
    task = TARGET.replace("Target", "DiscreteTarget" if is_discrete(path) else "Target")
    whole, *killed = (make_job(path.resolve(), config, run=str(tmp_path / name), steps=40,
                               eval_every=20, checkpoint_every=9, env_id=task)
                      for name in "abcd")
    run(whole)
    rows = files_of(whole)
    assert list(rows[1]) == list(range(5, 41, 5))
    tags = {tag for row in rows[1].values() for tag in row}
    assert sum(tag.startswith("plasticity/") for tag in tags) >= 3
    for job, at, resumed in zip(killed, (15, 20, 30), (9, 18, 27), strict=True):
        with pytest.raises(RuntimeError, match="reader"):
            train(job, interrupt_at(at, fail))
        assert run(job)[0] == {"step": resumed}
        assert files_of(job) == rows


def test_a_job_that_was_cut_off_goes_on_from_its_last_checkpoint(tmp_path):
    job = make_job(run=str(tmp_path), checkpoint_every=20)
    with pytest.raises(RuntimeError, match="reader"):
        train(job, interrupt_at(55, fail))
    assert list(files_of(job)[0])[-1] == 55
    messages = run(job)
    assert messages[0] == {"step": 40} and list(rows_of(messages)[0]) == list(range(45, 101, 5))
    assert list(files_of(job)[0]) == list(files_of(job)[1]) == list(range(5, 101, 5))


def test_a_job_that_was_done_is_not_trained_again(tmp_path):
    job = make_job(run=str(tmp_path))
    run(job)
    before = files_of(job)
    assert run(job) == [{"step": 100}]
    assert files_of(job) == before


def test_a_second_interrupt_ends_at_once_without_a_checkpoint(tmp_path):
    job, after = make_job(run=str(tmp_path)), []

    def twice():
        signal.raise_signal(signal.SIGINT)
        after.append("the first was noted")
        signal.raise_signal(signal.SIGINT)
        after.append("the second was not")

    with pytest.raises(KeyboardInterrupt):
        train(job, interrupt_at(45, twice))
    assert after == ["the first was noted"] and checkpoint.load_latest(job.checkpoints) is None


def test_an_interrupt_that_the_shell_ignores_is_ignored(tmp_path):
    """As in a script's `command &`: the run is finished, not ended in silence."""
    job, before = make_job(run=str(tmp_path)), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(job, interrupt_at(45, lambda: signal.raise_signal(signal.SIGINT)))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert checkpoint.load_latest(job.checkpoints)["step"] == 100


def test_an_interrupted_job_is_no_finished_one_whatever_the_handler_does(tmp_path):
    signal.signal(signal.SIGTERM, lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        train(make_job(), interrupt_at(45, lambda: signal.raise_signal(signal.SIGTERM)))


def test_tensorboard_shows_each_step_of_an_interrupted_job_once(tmp_path):
    job = make_job(run=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        train(job, interrupt_at(45, lambda: signal.raise_signal(signal.SIGTERM)))
    run(job)
    for seed, rows in files_of(job).items():
        board = EventAccumulator(str(job.group / f"seed_{seed}")).Reload()
        for tag in ("return/train", "return/eval", "loss/qf"):
            expected = [step for step, row in rows.items() if tag in row]
            assert sorted(event.step for event in board.Scalars(tag)) == expected


def test_a_seed_whose_metrics_turn_nan_fails_once_and_the_others_go_on(tmp_path, scripted):
    job = make_job(scripted, {"nan_from": 42}, env_id=DIARY, seeds=(3, 5, 4), run=str(tmp_path),
                   checkpoint_every=20)
    with pytest.raises(RuntimeError):
        train(job, interrupt_at(75, fail))
    whole = run(dataclasses.replace(job, run=None))
    failures = [m for m in whole if "failed_seed" in m]
    reason = "the agent's loss/scripted is not finite at step 45"
    assert failures == [{"failed_seed": 5, "step": 45, "reason": reason}]
    steps = {seed: list(rows) for seed, rows in rows_of(whole).items()}
    assert steps == {seed: list(range(5, 101 if seed != 5 else 45, 5)) for seed in (3, 5, 4)}
    resumed = run(job)
    failures = [m for m in resumed if "failed_seed" in m]
    assert failures == resumed[:1] == [{"failed_seed": 5, "reason": "failed before"}]
    assert [m["step"] for m in resumed[1:3]] == [60, 60] and "start again" in resumed[1]["warning"]
    assert {seed: list(rows) for seed, rows in files_of(job).items()} == steps


@pytest.mark.parametrize("metric, fails", [
    ("value/explained_variance", False), ("policy/entropy", False),
    ("plasticity/actor_dead_units", False), ("plasticity/actor_dormant_ratio", False),
    ("plasticity/actor_weight_magnitude", True), ("loss/qf", True)])
def test_a_diagnostic_that_is_nan_is_left_out_and_a_loss_or_a_weight_fails_the_seed(
        scripted, metric, fails):
    config = {"nan_from": 42, "metric": metric}
    messages = run(make_job(scripted, config, env_id=DIARY, seeds=(3, 5, 4)))
    failures = [m for m in messages if "failed_seed" in m]
    assert failures == [
        {"failed_seed": 5, "step": 45,
         "reason": f"the agent's {metric} is not finite at step 45"}] * fails
    for seed, rows in rows_of(messages).items():
        broken = seed == 5
        assert list(rows) == list(range(5, 45 if broken and fails else 101, 5))
        assert [step for step, row in rows.items() if metric in row] == list(
            range(5, 45 if broken else 101, 5))


def test_a_seeds_failure_leaves_the_rows_of_the_others_as_they_were(scripted):
    clean, broken = (rows_of(run(make_job(scripted, {"nan_from": n}, env_id=DIARY,
                                          seeds=(3, 5, 4)))) for n in (1000, 42))
    assert clean[3] == broken[3] and clean[4] == broken[4] and clean[5] != broken[5]


def test_a_checkpoint_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    messages = run(make_job(run=str(tmp_path), checkpoint_every=60))
    warnings = [m for m in messages if "warning" in m]
    assert [m["step"] for m in warnings] == [60, 100]
    assert "checkpoint not written" in warnings[0]["warning"]
    assert list(rows_of(messages)[0])[-1] == 100


@pytest.mark.parametrize("settings, words", [
    ({"env_id": "lab-tests/Unbounded-v0"}, "sac.py on lab-tests/Unbounded-v0: action bounds"),
    ({"env_id": "lab-tests/DictObservations-v0"}, "has observation space Dict"),
    ({"config": {"gama": 0.9}}, "has no setting 'gama'"),
    ({"config": {"gamma": 1.5}}, "gamma must lie in"),
    ({"agent_path": "agents/missing.py"}, "no agent file"),
    ({"backend": "asink"}, "unknown backend"),
])
def test_a_job_that_cannot_work_is_refused_in_one_line_before_it_writes(tmp_path, settings, words):
    with pytest.raises(UserError) as caught:
        train(make_job(run=str(tmp_path / "run"), **settings), print)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_that_does_not_end_is_an_error(scripted, monkeypatch):
    monkeypatch.setattr(evaluation_module, "ENDLESS", 50)
    monkeypatch.setattr(probe_envs.Target, "step", lambda self, action: (
        self._observe(), 0.0, False, False, {}))
    with pytest.raises(UserError, match=r"does not end in 50 steps; register .* max_episode_steps"):
        train(make_job(SAC, SMALL_SAC, env_id=TARGET), lambda message: None)


@pytest.mark.parametrize("name, settings", [
    ("gamma", {"config": {"gamma": 0.5}}), ("num_envs", {"num_envs": 2}),
    ("clip_reward", {"clip_reward": (-1.0, 1.0)}), ("action_repeat", {"action_repeat": 2}),
    ("failure_below", {"failure_below": -1.0}), ("precision", {"precision": "bf16"}),
    ("eval_env", {"eval_env": "same"})])
def test_a_run_does_not_go_on_with_other_settings(tmp_path, name, settings):
    job = make_job(run=str(tmp_path), steps=20, checkpoint_every=10)
    run(job)
    config = job.config | settings.pop("config", {})
    with pytest.raises(UserError, match=f"started with {name} = .* not .*: restore") as caught:
        run(dataclasses.replace(job, config=config, **settings))
    assert "\n" not in str(caught.value)


def test_a_run_that_another_process_trains_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "LOCK_SECONDS", 0.2)
    job = make_job(run=str(tmp_path), steps=20)
    with checkpoint.lock(job.checkpoints), pytest.raises(UserError, match="another process"):
        run(job)
    assert run(job)


def test_checkpoints_are_a_tenth_of_the_run_apart_or_five_minutes(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, state: saved.append(step))
    run(make_job(run=str(tmp_path / "short"), checkpoint_every=None))
    assert saved == list(range(10, 101, 10))
    saved.clear()
    monkeypatch.setattr(logger, "CHECKPOINT_SECONDS", 0)  # each step is late
    run(make_job(run=str(tmp_path / "long"), checkpoint_every=None))
    assert saved == list(range(1, 101))


def test_a_rule_to_stop_leaves_a_failed_seed_out(scripted):
    """Its first evaluation is before it fails."""
    messages = run(make_job(scripted, {"nan_from": 15, "metric": "loss/scripted"}, env_id=DIARY,
                            stop_at=-1e9, stop_at_evals=3))
    assert [m["failed_seed"] for m in messages if "failed_seed" in m] == [1]
    assert [m["step"] for m in messages if "stopped" in m] == [30]


def test_all_environments_are_closed_when_training_raises(monkeypatch):
    """Of training and evaluation: one may have started a process."""
    closed = []
    monkeypatch.setattr(SyncEnvs, "close", lambda envs: closed.append(envs))
    monkeypatch.setattr(loop.TrainLogger, "begin", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(Job(str(SAC), SMALL_SAC, "Pendulum-v1", (0,), 10, 10, 1, 0), print)
    assert len(closed) == 2


def test_rows_are_on_the_disk_before_the_checkpoint_after_them(tmp_path, monkeypatch):
    """After a power cut they would not be written again."""
    order, save = [], checkpoint.save
    monkeypatch.setattr(SeedRecorder, "flush", lambda recorder: order.append("rows"))
    monkeypatch.setattr(checkpoint, "save", lambda *rest: (order.append("state"), save(*rest)))
    small_run.train(tmp_path, seeds=1, processes=1, checkpoint_every=8)
    assert order == ["rows", "state"] * 3
