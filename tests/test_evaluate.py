"""lab.evaluate, and the weights of each seed's best evaluation."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch

from lab import evaluate
from lab.agent import build_agent, restore_state, save_state
from lab.command_line import parse_args
from lab.envs.shard import FRESH, seed_of
from lab.envs.spec import make_one, probe
from lab.errors import guarded
from lab.report import __main__ as report
from lab.training import checkpoint, logger, loop
from lab.training.job import make_jobs
from tests.conftest import refusal
from tests.small_run import EPISODIC, STEPS, group, train

pytestmark = pytest.mark.usefixtures("keep_threads")


def evaluated(capsys, *argv):
    """-> the JSON file and what is printed."""
    assert guarded(lambda: evaluate.run([str(arg) for arg in argv])) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert not err
    as_json, as_csv = out.splitlines()[-2:]
    result = json.loads(Path(as_json).read_text())
    with open(as_csv) as file:
        rows = list(csv.DictReader(file))
    assert [{k: "" if v is None else str(v) for k, v in e.items()} for e in result["episodes"]
            ] == rows
    return result, out


def refused(capsys, *argv):
    return refusal(capsys, evaluate.run, *argv)


def plain(run, seed, stack, starts, repeat=1, env_id=EPISODIC):
    """Episodes by gymnasium and the agent alone, from reset seeds of their own."""
    config = json.loads((run / "config.json").read_text())["config"]
    agent = build_agent("agents/sac.py", config, probe(env_id), range(stack[0], stack[1] + 1), 1,
                        STEPS // repeat, "cpu", lambda fn: fn)
    folder = group(run, env_id) / f"stack_{stack[0]}_{stack[1]}"
    restore_state(agent, checkpoint.load_latest(folder)["agent"])
    for start in starts:
        env = make_one(env_id)
        obs, _ = env.reset(seed=start)
        total, length, end = 0.0, 0, False
        while not end:
            every = torch.as_tensor(obs).expand(len(agent.generators), 1, -1)
            action = agent.act(every, explore=False)[seed - stack[0], 0].numpy()
            for _ in range(repeat):
                obs, reward, terminated, truncated, info = env.step(action)
                total, length, end = total + reward, length + 1, terminated or truncated
                if end:
                    break
        yield {"episode_return": total, "length": length, "terminated": terminated,
               "last_reward": reward, "success": info.get("is_success")}


def close(episode):
    return {k: pytest.approx(v, abs=1e-5) if isinstance(v, float) else v
            for k, v in episode.items()}


def test_episodes_are_a_plain_loops_from_fresh_starts(run, capsys, monkeypatch):
    """Five of each seed, two at once."""
    monkeypatch.setattr(evaluate, "AT_ONCE", 2)
    result, out = evaluated(capsys, run, "--episodes", 5)
    assert "3 seeds" not in out and "5 fresh episodes of each seed, without exploration" in out
    for seed, stack in ((0, (0, 1)), (1, (0, 1)), (2, (2, 2))):
        starts = [seed_of(seed, (FRESH, n // 2 * 2), n % 2) for n in range(5)]
        played = [e for e in result["episodes"] if e["seed"] == seed]
        wanted = list(plain(run, seed, stack, starts))
        assert played == [{"seed": seed, "episode": n, **close(e)} for n, e in enumerate(wanted)]
        row = result["seeds"][str(seed)]
        assert row["return"] == pytest.approx(sum(e["episode_return"] for e in wanted) / 5)
        assert row["terminated"] == sum(e["terminated"] for e in wanted) / 5
        assert row["success"] == sum(e["success"] for e in wanted) / 5
    kinds = {(e["terminated"], e["success"]) for e in result["episodes"]}
    assert len(kinds) == 3, "falls, finished courses and time limits"


def test_more_episodes_begin_with_the_same(run, capsys):
    few, _ = evaluated(capsys, run, "--episodes", 3)
    more, _ = evaluated(capsys, run, "--episodes", 5, "--out", run / "more")
    first = [close(e) for e in more["episodes"] if e["episode"] < 3]
    assert few["episodes"] == first and len(first) == 9


def test_episodes_start_as_none_of_training_or_evaluation():
    starts = {seed_of(0, (FRESH, 0), n) for n in range(25)}
    seen = {seed_of(0, (stream, step), n) for stream in (0, 1) for step in range(STEPS + 1)
            for n in range(25)}
    assert len(starts) == 25 and not starts & seen


def test_a_failure_is_a_termination_below_the_runs_bound(tmp_path, capsys):
    run = train(tmp_path, seeds=1, failure_below=-9.0, action_repeat=2)
    result, out = evaluated(capsys, run, "--episodes", 8)
    starts = [seed_of(0, (FRESH, 0), n) for n in range(8)]
    wanted = list(plain(run, 0, (0, 0), starts, repeat=2))
    assert [{k: e[k] for k in wanted[0]} for e in result["episodes"]] == list(map(close, wanted))
    row = result["mean"]
    falls = sum(e["terminated"] and e["last_reward"] < -9 for e in wanted) / 8
    assert row["failure"] == falls and 0 < falls < row["terminated"]
    assert "failure: terminated with a last reward below -9" in out


def test_the_mean_and_its_interval_are_over_the_seeds_that_did_not_fail(run, capsys):
    file = next(group(run).glob("stack_0_1/step_*24-*.pt"))
    state = checkpoint.load_latest(file.parent)
    checkpoint.save(file.parent, STEPS + 1, state | {"failed": [1]})
    result, out = evaluated(capsys, run, "--episodes", 2)
    returns = [result["seeds"][seed]["return"] for seed in "02"]
    assert result["mean"]["return"] == pytest.approx(sum(returns) / 2)
    low, high = result["return_interval"]
    assert (low + high) / 2 == pytest.approx(sum(returns) / 2)
    assert result["failed_seeds"] == [1] and "1 (failed in training)" in " ".join(out.split())
    (group(run) / "seed_1").mkdir(exist_ok=True)
    assert "seed 1 failed in training" in refused(capsys, group(run) / "seed_1")


def test_exploring_and_another_environment(run, capsys):
    plain_result, _ = evaluated(capsys, run, "--episodes", 3)
    noisy, out = evaluated(capsys, run, "--episodes", 3, "--explore", "--out", run / "noisy")
    assert noisy["episodes"] != plain_result["episodes"] and "with exploration" in out
    assert (run / "noisy.csv").is_file()
    other, out = evaluated(capsys, run, "--episodes", 3, "--env", EPISODIC.replace(
        "Courses", "LongCourses"), "--out", run / "other")
    assert max(e["length"] for e in other["episodes"]) > max(
        e["length"] for e in plain_result["episodes"])


def test_exploring_agents_see_as_many_environments_as_in_training(tmp_path, capsys, monkeypatch):
    run = train(tmp_path, seeds=1, processes=1)
    monkeypatch.setattr(evaluate, "AT_ONCE", 2)
    made = []

    class Spy(evaluate.Fresh):
        def __init__(self, config):
            made.append(config.num_envs)
            super().__init__(config)

    monkeypatch.setattr(evaluate, "Fresh", Spy)
    one, _ = evaluated(capsys, run, "--episodes", 3)
    several, _ = evaluated(capsys, run, "--episodes", 3, "--explore", "--out", run / "noisy")
    assert made == [2, 1, 1, 1, 1]
    assert len(one["episodes"]) == len(several["episodes"]) == 3


def test_an_agent_that_explores_with_a_memory_is_refused(tmp_path, capsys):
    run = train(tmp_path, seeds=1, processes=1, agent="agents/ppo_lstm.py")
    assert "explores with a memory that only training" in refused(capsys, run, "--explore")


def test_success_counts_every_episode_where_only_some_tell_it():
    episode = evaluate.Episode(1.0, 5, True, 1.0, None)
    played = [episode._replace(success=True), episode, episode]
    assert evaluate.summary(played, None, True)["success"] == pytest.approx(1 / 3)
    assert evaluate.summary([episode], None, True)["success"] == 0
    assert "success" not in evaluate.summary([episode], None, False)


def test_a_run_in_torch(tmp_path, capsys):
    run = train(tmp_path, env=("torch/ContinuousCartPole-v1",), seeds=2, processes=1)
    result, _ = evaluated(capsys, run, "--episodes", 3)
    for episode in result["episodes"]:
        assert episode["episode_return"] == episode["length"]
        assert episode["terminated"] and episode["success"] is None


# The best weights


def scripted(monkeypatch, returns):
    """Evaluations return these, one list after another -> (step, actor's weights) of each."""
    seen, left = [], list(returns)

    def evaluation(agent, envs, step):
        actor = {k: x.clone() for k, x in save_state(agent)["actor"].items()}
        seen.append((step, actor))
        return left.pop(0)

    monkeypatch.setattr(logger, "evaluate", evaluation)
    return seen


def best_of(run, stack="stack_0_1"):
    return checkpoint.load_latest(group(run) / stack)["best"]


def test_each_seeds_weights_are_kept_at_its_best_evaluation(tmp_path, monkeypatch, capsys):
    seen = scripted(monkeypatch, [[3.0, 1.0], [2.0, 5.0], [float("nan"), 5.0]])
    run = train(tmp_path, seeds=2, processes=1)
    best = best_of(run)
    assert best["steps"] == [8, 16] and best["returns"] == [3.0, 5.0]
    for index, (step, actor) in enumerate([seen[0], seen[1]]):
        assert step == best["steps"][index]
        assert all(torch.equal(best["weights"]["actor"][name].chunk(2)[index], x.chunk(2)[index])
                   for name, x in actor.items())
        assert any(not torch.equal(x.chunk(2)[index], seen[2][1][name].chunk(2)[index])
                   for name, x in actor.items())
    monkeypatch.undo()
    result, out = evaluated(capsys, run, "--episodes", 2, "--which", "best")
    assert [result["seeds"][seed]["step"] for seed in "01"] == [8, 16]
    assert [result["seeds"][seed]["best evaluation"] for seed in "01"] == [3.0, 5.0]
    last, _ = evaluated(capsys, run, "--episodes", 2)
    assert last["episodes"] != result["episodes"] and "so it is optimistic" in out


def test_a_seed_that_failed_keeps_its_best_weights(tmp_path, monkeypatch):
    seen = scripted(monkeypatch, [[1.0, 1.0], [2.0, 9.0], [3.0, 9.0]])
    real = logger.TrainLogger.step

    def fails(log, step, metrics, agent):
        real(log, step, {"loss/x": torch.tensor([0.0, float("nan")])} if step == 16 else metrics,
             agent)

    monkeypatch.setattr(logger.TrainLogger, "step", fails)
    run = train(tmp_path, seeds=2, processes=1)
    (stack,) = group(run).glob("stack_*")
    assert checkpoint.load_latest(stack)["best"]["steps"] == [24, 8] and len(seen) == 3


def test_a_resumed_run_keeps_the_best_weights(tmp_path, monkeypatch):
    returns = [[3.0, 1.0], [2.0, 5.0], [1.0, 1.0]]
    scripted(monkeypatch, returns)
    whole = best_of(train(tmp_path, seeds=2, processes=1, checkpoint_every=8))
    scripted(monkeypatch, returns)
    run = train(tmp_path, seeds=2, processes=1, checkpoint_every=8)
    max(group(run).glob("stack_0_1/step_*.pt")).unlink()  # back to step 16
    scripted(monkeypatch, returns[2:])
    options, config = parse_args(["--resume", str(run)])
    loop.train(make_jobs(options, config, 1, run)[0], lambda message: None)
    again = best_of(run)
    assert again["steps"] == whole["steps"] == [8, 16]
    assert all(torch.equal(x, whole["weights"]["actor"][name])
               for name, x in again["weights"]["actor"].items())


def test_no_keep_best_keeps_none(tmp_path, capsys):
    run = train(tmp_path, seeds=1, keep_best=False)
    assert best_of(run, "stack_0_0") == {}
    assert "has no best weights" in refused(capsys, run, "--which", "best")


def test_a_report_shows_fresh_episodes_and_that_picking_is_optimistic(run, capsys, tmp_path):
    out = tmp_path / "report"
    assert report.main([str(run), "--out", str(out)]) == 0
    assert "Fresh episodes" not in (out / "report.md").read_text()
    results = [evaluated(capsys, run, "--episodes", 4, "--which", which)[0]
               for which in ("last", "best")]
    assert report.main([str(run), "--out", str(out)]) == 0
    told = (out / "report.md").read_text()
    for result, picked in zip(results, (None, results[1]["mean"]["best evaluation"]), strict=True):
        (row,) = (line for line in told.splitlines() if f"| {result['which']}, at " in line)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[3:6] == ["3", "4", f"{result['mean']['return']:.1f}"]
        assert cells[-1] == ("-" if picked is None else f"{picked:.1f}")
    assert "is the largest of many and so optimistic" in told
    path = group(run) / "evaluation_last.json"
    path.write_text(json.dumps(results[0] | {"failed_seeds": [1]}))
    assert report.main([str(run), "--out", str(out)]) == 0
    told = (out / "report.md").read_text()
    assert re.search(r"\| last, at 24 \| 2 \|", told), "failed seeds are not counted"
    path.write_text(json.dumps(results[0] | {"explore": True, "env_kwargs": ["a=1"]}))
    assert report.main([str(run), "--out", str(out)]) == 0
    told = (out / "report.md").read_text()
    assert re.search(r"Courses-v0 \(a=1\) \| \w+ \| last, at 24, exploring \|", told)
    (group(run) / "evaluation_mine.json").write_text("{}")
    capsys.readouterr()
    assert report.main([str(run), "--out", str(out)]) == 2
    assert "evaluation_mine.json is not of python -m lab.evaluate" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize("argv, words", [
    ("{tmp}/none", "no folder {tmp}/none"), ("{tmp}", "is not in a run folder"),
    ("{run} --episodes 0", "--episodes must be at least 1, not 0"),
    ("{run} --out {tmp}/none/a", "there is no folder {tmp}/none"),
    ("{run} --out .", "--out . names no file"), ("{run} --out /", "--out / names no file"),
    ("{run} --out ..", "--out .. names no file"), ("{run} --which first", "invalid choice"),
    ("{run} --env MountainCarContinuous-v0", "does not fit agents/sac.py: ValueError: actor d"),
    ("{run} --env Pendulum", "use 'Pendulum-v1'"),
    ("{run} --agent agents/ppo.py", "config.json does not fit agents/ppo.py")])
def test_bad_input_is_one_line(run, capsys, argv, words):
    before = sorted(run.rglob("*"))
    names = {"run": run, "tmp": run.parent}
    assert words.format(**names) in refused(capsys, *argv.format(**names).split())
    assert sorted(run.rglob("*")) == before


def test_a_result_is_not_overwritten(run, capsys):
    (group(run) / "evaluation_last.csv").write_text("mine")
    assert "evaluation_last.csv exists: name another with --out" in refused(capsys, run)
    assert (group(run) / "evaluation_last.csv").read_text() == "mine"


def test_of_several_environments_those_without_a_result_are_evaluated(tmp_path, capsys):
    """As after an interruption between them."""
    targets = "tests.probe_envs:lab-tests/Target-v0"
    run = train(tmp_path, env=(EPISODIC, targets), seeds=1)
    evaluated(capsys, group(run), "--episodes", 3)
    first, other = (group(run, env) / "evaluation_last.json" for env in (EPISODIC, targets))
    before = first.read_bytes()
    for flags in (("--episodes", 2), ("--episodes", 3, "--explore")):  # another evaluation's
        assert f"{first} exists: name another" in refused(capsys, run, *flags)
    _, told = evaluated(capsys, run, "--episodes", 3)
    assert f"{first} exists and stays\n" in told and told.splitlines()[-2] == str(other)
    assert first.read_bytes() == before
    assert json.loads(other.read_text())["episodes_per_seed"] == 3
    assert f"{first} exists: name another" in refused(capsys, run)
    first.with_suffix(".csv").unlink()
    assert "evaluation_last.json exists: name another" in refused(capsys, run)


def test_no_checkpoint_and_a_changed_agent_are_one_line(run, capsys):
    copy = run / "sac.py"
    copy.write_text(copy.read_text() + "\n# as it was then\n")
    assert f"--agent {copy}" in refused(capsys, run)
    for path in group(run).glob("stack_*/*.pt"):
        path.unlink()
    copy.write_text(Path("agents/sac.py").read_text())
    assert "has no checkpoint yet" in refused(capsys, run)
