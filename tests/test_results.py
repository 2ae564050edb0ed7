"""Reports: reading run folders, warnings, and the comparison across environments."""

import json
import math

import gymnasium
import numpy as np
import pytest
import scipy.stats

from lab.errors import UserError
from lab.report import compare, published, runs
from lab.report import warnings as report_warnings
from lab.training import recorder

V4, V5 = "HalfCheetah-v4", "HalfCheetah-v5"


def write_run(folder, returns, agent="sac", steps=30, settings=(), **options):
    """returns: environment -> seed -> the evaluation returns at 10, 20, ... steps, one a minute.
    A row without an evaluation lies 5 steps behind each."""
    for environment, by_seed in returns.items():
        for seed, values in by_seed.items():
            place = folder / environment.replace("/", "_") / agent / f"seed_{seed}"
            place.mkdir(parents=True)
            rows = []
            for n, value in enumerate(values, start=1):
                rows += [{"step": 10 * n, "return/eval": value, "wall_time": 1e9 + 60 * n},
                         {"step": 10 * n + 5, "wall_time": 1e9 + 60 * n + 30}]
            if values and 10 * len(values) >= steps:
                rows.pop()  # the run ended
            (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{agent}.py").write_text("# the agent")
    (folder / "config.json").write_text(json.dumps({
        "name": folder.name, "config": dict(settings),
        "options": {"agent": f"agents/{agent}.py", "env": list(returns), "steps": steps,
                    **options}}))
    return folder


def seeds(*finals, first=0):
    """Each seed's evaluations rise to its final return at 30."""
    return {first + n: [final - 2, final - 1, final] for n, final in enumerate(finals)}


def warnings(*arguments):
    return report_warnings.find(runs.load(list(map(str, arguments))))


# Reading


def test_a_run_is_read_at_its_end(tmp_path):
    run = write_run(tmp_path / "a-20260101-120000", {"torch/Pendulum-v1": seeds(5.0, 7.0)})
    (method,) = runs.load([str(run)])
    assert method.name == "a"
    (result,) = method.results.values()
    assert (result.environment, result.agent, result.planned) == ("torch/Pendulum-v1", "sac", 30)
    assert result.step == 30 and result.returns(30) == [5, 7]
    assert result.seeds[0].curve == [(10, 3, 0), (20, 4, 60), (30, 5, 120)]
    assert result.returns(25) == [4, 6] and result.returns(20) == [4, 6] and not result.returns(9)
    assert result.returns(31) == [], "no seed got there"


def test_many_environments_make_large_steps(tmp_path):
    """2 000 896 steps of a run of 2 000 000 are its end; they count as 2 000 000."""
    run = write_run(tmp_path / "a", {V4: seeds(1.0, 2.0)}, steps=29.8)
    result = runs.load([str(run)])[0].results[V4]
    assert result.step == 30 and result.returns(29.8) == [1, 2]


def test_a_copied_folder_needs_nothing_else(tmp_path):
    run = write_run(tmp_path / "a", {V4: seeds(5.0, 7.0)}, runs="/nowhere", resume="/nowhere/a")
    (run / "config.json").unlink()
    (run / "sac.py").unlink()
    (method,) = runs.load([str(run)])
    assert method.results[V4].step == 30 and method.results[V4].returns(30) == [5, 7]


def test_a_torn_last_line_is_no_row(tmp_path):
    run = write_run(tmp_path / "a", {V4: seeds(5.0)})
    path = run / V4 / "sac/seed_0/metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 40, "retu')
    assert runs.load([str(run)])[0].results[V4].seeds[0].reached == 30


@pytest.mark.parametrize("line", [
    "{", "[]", "7", '{"step": 1}', '{"wall_time": 1}', '{"step": "x", "wall_time": 1}',
    '{"step": 1, "wall_time": 1, "return/eval": NaN}',
    '{"step": 1, "wall_time": 1, "return/eval": null}'])
def test_an_unreadable_row_is_named(tmp_path, line):
    run = write_run(tmp_path / "a", {V4: seeds(5.0)})
    path = run / V4 / "sac/seed_0/metrics.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 6, is not a row of metrics"):
        runs.load([str(run)])


def test_a_pause_is_not_wall_clock(tmp_path):
    """Rows a minute apart; a gap of 9 minutes may be a long evaluation, one of 3 hours is not."""
    run = write_run(tmp_path / "a", {V4: {0: [1.0] * 9}}, steps=1000)
    path = run / V4 / "sac/seed_0/metrics.jsonl"
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if "return/eval" in row]
    for row in rows:
        row["wall_time"] += 480 * (row["step"] >= 30) + 10_800 * (row["step"] >= 70)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seed = runs.load([str(run)])[0].results[V4].seeds[0]
    assert seed.paused == 10_800
    assert [e.seconds for e in seed.curve] == [0, 60, 600, 660, 720, 780, 840, 900, 960]
    assert warnings(run)[-1] == (f"a in {V4} was apparently stopped for 180 min, which its "
                                 "wall-clock time leaves out")


# Names


def test_names_are_given_or_the_folders(tmp_path):
    a, b = (write_run(tmp_path / f"{name}-20260101-120000", {V4: seeds(1.0)}) for name in "ab")
    again = write_run(tmp_path / "a-20260102-120000-2", {V4: seeds(1.0)})

    def names(*arguments):
        return [name for name, _ in runs.named(list(map(str, arguments)))]

    assert names(a, b) == ["a", "b"]
    assert names(a, again) == ["a-20260101-120000", "a-20260102-120000-2"]
    assert names(f"x={a}", f"x={again}", b) == ["x", "x", "b"]
    assert names(a, f"a={again}") == ["a-20260101-120000", "a"]
    with pytest.raises(UserError, match="two runs are called 'a-20260101-120000'"):
        names(a, a)
    methods = runs.load([f"x={a}", str(b)])
    for name, place in (("x", 0), (a.name, 0), (str(a), 0), ("b", 1)):
        assert runs.find(methods, name) is methods[place]
    with pytest.raises(UserError, match="'c' is not one of the runs: x, b"):
        runs.find(methods, "c")


def test_one_name_pools_seeds_and_environments(tmp_path):
    a = write_run(tmp_path / "a", {V4: seeds(1.0, 2.0)})
    b = write_run(tmp_path / "b", {V4: seeds(3.0, first=2), V5: seeds(9.0)})
    (method,) = runs.load([f"x={a}", f"x={b}"])
    assert method.results[V4].returns(30) == [1, 2, 3]
    assert method.results[V5].returns(30) == [9], "v4 and v5 are never pooled"
    with pytest.raises(UserError, match="'x' has seed 0 of HalfCheetah-v5 twice"):
        runs.load([f"x={b}", f"x={write_run(tmp_path / 'c', {V5: seeds(1.0)})}"])


def test_runs_that_stopped_by_a_rule_are_not_pooled_unless_the_user_says_so(tmp_path):
    """Each stopped at a step of its own: the last evaluations would be of some of the seeds."""
    a = write_run(tmp_path / "a-20260101-120000", {V4: seeds(1.0, 2.0)}, stop_at=5.0)
    b = write_run(tmp_path / "a-20260102-120000", {V4: seeds(3.0, first=2)}, stop_at=5.0)
    assert len(runs.load([str(a), str(b)])) == 1
    (a / V4 / "sac/stopped.json").write_text('{"step": 30, "reason": "return 5, at least 5"}')
    assert len(runs.load([str(a), str(b)])) == 2
    assert len(runs.load([f"x={a}", f"x={b}"])) == 1
    c = write_run(tmp_path / "a-20260103-120000", {V4: seeds(3.0, first=9)})
    assert len(runs.load([str(b), str(c)])) == 2, "one without the rule is another method"


# Warnings


def test_five_finished_seeds_alone_need_no_warning(tmp_path):
    assert warnings(write_run(tmp_path / "a", {V4: seeds(*range(5))})) == []


def test_few_seeds_are_told(tmp_path):
    run = write_run(tmp_path / "a", {V4: seeds(*range(4)), V5: seeds(*range(5))})
    assert warnings(run) == [
        f"fewer than 5 seeds, so the intervals are unreliable: a in {V4} (4)"]


def test_an_unfinished_run_is_shown_as_far_as_every_seed_got(tmp_path):
    values = {n: [1.0, 2.0, 3.0][:2 + (n < 2)] for n in range(5)}
    run = write_run(tmp_path / "a", {V4: values}, steps=100)
    result = runs.load([str(run)])[0].results[V4]
    assert result.step == 20 and result.returns(20) == [2] * 5
    assert warnings(run) == [f"a in {V4} is unfinished: 25 to 35 of 100 steps, shown at 20"]


def test_an_unfinished_run_is_shown_without_a_seed_that_failed(tmp_path):
    """The others of its stack are over one evaluation ahead; seed 2 lost one in a kill, and seed 9
    trains in another stack, which is behind."""
    rising = [float(n) for n in range(1, 7)]
    values = {0: rising, 1: rising[:1], 2: rising[:5], 3: rising, 4: rising, 9: rising[:4]}
    run = write_run(tmp_path / "a", {V4: values}, steps=100)
    for stack in ("stack_0_4", "stack_9_9"):
        (run / V4 / "sac" / stack).mkdir()
    result = runs.load([str(run)])[0].results[V4]
    assert [n for n, seed in result.seeds.items() if seed.failed] == [1]
    assert result.step == 40 and result.returns(40) == [4] * 5
    assert warnings(run)[-1] == (
        f"a in {V4}: left out, because they did not reach 40 steps, are seeds 1 (at 15); if they "
        "diverged, the mean of the others is biased upwards")


def test_seeds_and_environments_that_have_not_begun_are_told(tmp_path):
    run = write_run(tmp_path / "a", {V4: seeds(*range(5), first=2)}, first_seed=2, seeds=7,
                    env=[V4, V5])
    assert warnings(run) == [
        f"a in {V4} is unfinished: seeds 7 to 8 of {run} have not begun",
        f"a in {V5} is unfinished: seeds 2 to 8 of {run} have not begun"]
    more = write_run(tmp_path / "b", {V4: seeds(*range(2), first=7)}, first_seed=7, seeds=2)
    assert not any(V4 in line and "not begun" in line for line in warnings(f"x={run}", f"x={more}"))


def test_a_run_without_an_evaluation_is_told(tmp_path):
    run = write_run(tmp_path / "a", {V4: {n: [] for n in range(5)}}, steps=100)
    assert runs.load([str(run)])[0].results[V4].step == 0
    assert warnings(run) == [f"a in {V4} is unfinished: 0 of 100 steps, and no evaluation yet"]


def test_a_seed_that_did_not_get_to_the_end_is_left_out_and_told(tmp_path):
    run = write_run(tmp_path / "a", {V4: seeds(*range(5)) | {7: [50.0]}})
    assert runs.load([str(run)])[0].results[V4].returns(30) == [0, 1, 2, 3, 4]
    assert warnings(run) == [
        f"a in {V4}: left out, because they did not reach 30 steps, are seeds 7 (at 15); if "
        "they diverged, the mean of the others is biased upwards"]


def test_final_returns_at_different_steps_are_told(tmp_path):
    a = write_run(tmp_path / "a", {V4: seeds(*range(5))})
    b = write_run(tmp_path / "b", {V4: {n: [0.0, 1.0] for n in range(5)}}, steps=20)
    (line,) = warnings(a, b)
    assert line.startswith(f"{V4}: final returns are at different steps (a at 30, b at 20)")
    assert warnings(a) == warnings(b) == []


def test_different_settings_under_one_name_are_told(tmp_path):
    a = write_run(tmp_path / "a", {V4: seeds(*range(5))}, settings={"gamma": 0.99, "tau": 1})
    b = write_run(tmp_path / "b", {V5: seeds(*range(5))}, settings={"gamma": 0.98, "tau": 1},
                  precision="bf16")
    assert warnings(a, b) == [], "two methods may differ"
    assert warnings(f"x={a}", f"x={b}") == [
        'x pools runs with different precision: null, "bf16"',
        "x pools runs with different gamma: 0.99, 0.98"]
    same = write_run(tmp_path / "c", {V5: seeds(*range(5))}, settings={"gamma": 0.99, "tau": 1})
    assert warnings(f"x={a}", f"x={same}") == []
    (same / "sac.py").write_text("# changed")
    assert [line.split(":")[0] for line in warnings(f"x={a}", f"x={same}")] == [
        "x pools runs with different source"]


def test_clipped_rewards_are_declared(tmp_path):
    run = write_run(tmp_path / "a", {V4: seeds(*range(5))}, clip_reward=[-5.0, 10.0])
    (line,) = warnings(run)
    assert line == f"a was trained on rewards clipped to [-5.0, 10.0] ({run}); returns are raw"


def test_what_was_changed_about_the_task_is_declared_and_an_older_run_changed_nothing(tmp_path):
    run = write_run(tmp_path / "a", {V4: seeds(*range(5))}, action_repeat=2, failure_below=-99.0)
    assert warnings(run) == [
        f"a was trained and evaluated with each action repeated for 2 steps ({run}); returns are "
        "raw",
        f"a was trained with terminations only where the last reward is below -99.0 ({run}); "
        "returns are raw"]
    old = write_run(tmp_path / "old", {V4: seeds(*range(5))})
    new = write_run(tmp_path / "new", {V5: seeds(*range(5))}, action_repeat=1, failure_below=None)
    assert warnings(f"x={old}", f"x={new}") == []


def test_an_evaluation_at_the_step_is_taken_before_one_that_is_later():
    curve = [runs.Evaluation(step, float(step), 0.0) for step in range(100, 1_001, 100)]

    def at(step, of=curve):
        result = runs.Result("a", "E", "sac", {0: runs.Seed(of, of[-1].step, 0.0)})
        return result.at(step)[0].step

    assert at(500) == 500
    curve = [curve[0], curve[4]._replace(step=504), *curve[5:]]
    assert at(500, curve) == 504 and at(496, curve) == 100


def test_long_evaluations_are_no_stops(tmp_path):
    rows, now = [], 0.0
    for step in range(10, 101, 10):
        now += 70 if step % 50 == 0 else 3
        rows.append({"step": step, "wall_time": now} | (
            {"return/eval": 1.0} if step % 50 == 0 else {}))
    rows.append({"step": 110, "wall_time": now + 1_000})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    seed = runs.read_seed(path, "return/eval")
    assert seed.paused == pytest.approx(997)
    assert seed.curve[-1].seconds == pytest.approx(7 * 3 + 2 * 70)


def test_a_version_without_a_reference_does_not_displace_one_that_has_it(tmp_path):
    returns = {"Walker2d-v4": seeds(*range(5)), "Walker2d-v5": seeds(*range(5))}
    methods, left_out = runs.load([str(write_run(tmp_path / "a", returns))]), []
    assert compare.shared(methods, left_out, lambda env_id: env_id.endswith("v4")) == [
        ("Walker2d-v4", 30)]
    assert left_out == ["Walker2d-v5 (no reference)"]


def write_study(folder, environment=V4, agent="sac", trials=3, best=None, is_="trial 2"):
    """Each trial has two seeds: 0 to 5 were tuned on."""
    folder.mkdir(parents=True)
    events = [{"agent": f"agents/{agent}.py", "env": [environment], "seeds": 2}]
    events += [{"trial": n, "settings": {}} for n in range(trials)]
    events += [{"trial": 0, "step": 10, "returns": [1.0, 2.0]}]
    (folder / "trials.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (folder / "best.json").write_text(json.dumps(
        {"config": best or {"gamma": 0.9}, "options": {}, "study": {"is": is_}}))
    return folder


def test_seeds_that_tuned_the_settings_are_told(tmp_path):
    study = write_study(tmp_path / "studies/s")
    tuned = write_run(tmp_path / "tuned", {V4: seeds(*range(8))}, settings={"gamma": 0.9})
    (line,) = warnings(tuned)
    assert line.startswith(f"tuned in {V4} is reported on seeds that the study s tuned its "
                           "settings on (seeds 0 to 5)") and str(study / "confirmed") in line
    given = study / "best.json"  # with a flag that won over it
    named = write_run(tmp_path / "elsewhere/named", {V4: seeds(*range(5))},
                      settings={"gamma": 0.8}, config=str(given))
    assert len(warnings(named)) == 1 and "(seeds 0 to 4)" in warnings(named)[0]
    given.rename(tmp_path / "best.json")
    assert warnings(named) == [
        f"named has the settings of {given}, but that study is missing: it may "
        "have been tuned on the seeds reported here"]


def test_what_no_study_tuned_on_these_seeds_is_not_told(tmp_path):
    write_study(tmp_path / "studies/s")
    defaults = write_study(tmp_path / "studies/defaults", best={"gamma": 0.99}, is_="defaults")
    (tmp_path / "studies/broken").mkdir()
    (tmp_path / "studies/broken/best.json").write_text("{")
    tuned = {"gamma": 0.9}
    for name, run in {
            "other seeds": ({V4: seeds(*range(5), first=6)}, "sac", tuned),
            "other settings": ({V4: seeds(*range(5))}, "sac", {"gamma": 0.8}),
            "the defaults": ({V4: seeds(*range(5))}, "sac", {"gamma": 0.99}),
            "another agent": ({V4: seeds(*range(5))}, "crossq", tuned),
            "another version": ({V5: seeds(*range(5))}, "sac", tuned)}.items():
        returns, agent, config = run
        assert warnings(write_run(tmp_path / name, returns, agent, settings=config)) == [], name
    given = write_run(tmp_path / "given", {V4: seeds(*range(5))}, settings={"gamma": 0.99},
                      config=str(defaults / "best.json"))
    assert warnings(given) == [], "nothing beat the defaults"


def test_seeds_that_settings_which_ship_were_tuned_on_are_told(tmp_path):
    agent = tmp_path / "sac.py"
    shipped = {"sac": {"settings": {}, "seeds": 4, "source": "a/study"}}
    (tmp_path / "tuned").mkdir()
    recorder.write_json(tmp_path / f"tuned/{V4}.json", shipped)
    first, other = (write_run(tmp_path / str(n), {V4: seeds(*range(5), first=n)}, tuned=True)
                    for n in (2, 4))
    for run in (first, other):
        content = json.loads((run / "config.json").read_text())
        content["options"]["agent"] = str(agent)
        recorder.write_json(run / "config.json", content)
    assert warnings(first) == [
        f"2 in {V4} is reported on seeds that its settings were tuned on (seeds 2 to 3; a/study), "
        "so its mean is biased upwards: --first-seed 4 takes others"]
    assert warnings(other) == []


def test_a_studys_own_trials_are_told_and_its_confirmation_is_not(tmp_path):
    study = write_study(tmp_path / "studies/s")
    trial = write_run(study / "trials/001", {V4: seeds(1.0, 2.0, first=2)})
    held_out = write_run(study / "confirmed/001", {V4: seeds(*range(5), first=1_000_000)})
    for run in (trial, held_out):
        (run / "config.json").unlink()  # they have none of their own
    assert "tuned its settings on (seeds 2 to 3)" in warnings(trial)[-1]
    assert warnings(held_out) == []


# Published


def test_every_reference_is_published_or_gymnasiums():
    rows = published.rows()
    assert len(set(rows)) == len(rows)
    references = [row for row in rows if row.algorithm == "reference"]
    for row in references:
        reference = published.reference(row.environment)
        assert reference.random < reference.good == row.mean
        if row.steps:
            algorithm = row.source.split(" at ")[0].lower()
            assert (row.environment, row.steps, row.mean) in {
                point[1:4] for point in published.points(algorithm, row.environment)}
        else:
            assert row.source == "gymnasium's reward_threshold"
            assert gymnasium.spec(row.environment).reward_threshold == row.mean
    assert len(references) == len({row.environment for row in references}) == 13


@pytest.mark.parametrize("algorithm, environment, steps, means", [
    ("ppo", "HalfCheetah-v4", 100_000, [-41]), ("sac", "Walker2d-v4", 1_000_000, [4536]),
    ("crossq", "Humanoid-v4", 300_000, [9039]), ("flashsac", "Humanoid-v4", 1_000_000, [12606]),
    ("bro", "Hopper-v4", 300_000, [1138, 1250]), ("droq", "Ant-v4", 100_000, [1365]),
    ("sac", "BipedalWalker-v3", 500_000, [198, 298]), ("sac", "Pendulum-v1", 20_000, [-157]),
    ("xqc", "Hopper-v4", 100_000, [2828]), ("dr_q", "Walker2d-v4", 300_000, [3670]),
    ("td3_fork", "BipedalWalker-v3", 1_000_000, [297]),
    ("td3_fork", "BipedalWalkerHardcore-v3", 500_000, [171])])
def test_published_points_are_as_published(algorithm, environment, steps, means):
    assert [row.mean for row in published.points(algorithm, environment)
            if row.steps == steps] == means


def test_no_point_of_one_version_is_anothers():
    assert published.points("sac", V4) and not published.points("sac", V5)
    assert published.reference("Walker2d-v4") and not published.reference("Walker2d-v5")


def test_scores_are_0_at_random_and_1_at_the_reference():
    reference = published.reference("Hopper-v4")
    assert reference[:2] == (19.4, 2787)
    assert reference.normalise(np.array([19.4, 2787, 1403.2])) == pytest.approx([0, 1, 0.5])
    assert reference.at(0.5) == pytest.approx(1403.2)


# Comparison


def load(tmp_path, **methods):
    return runs.load([f"{name}={write_run(tmp_path / name, returns)}"
                      for name, returns in methods.items()])


def test_environments_are_compared_at_the_last_step_that_all_reached(tmp_path):
    two = {n: [0.0, 1.0] for n in range(2)}
    methods = load(tmp_path, a={V4: seeds(5.0), "Ant-v4": seeds(5.0)},
                   b={V4: two, "Hopper-v5": seeds(1.0)})
    left_out = []
    assert compare.shared(methods, left_out) == [(V4, 20)]
    assert left_out == ["Ant-v4 (not in b)", "Hopper-v5 (not in a)"]


def test_equal_steps_are_steps_at_which_all_have_an_evaluation(tmp_path):
    """Not an old evaluation beside a new one: a has them every 10, b every 20 up to 60, c late."""
    a, b, c = load(tmp_path, a={V4: {0: [float(n) for n in range(1, 6)]}},
                   b={V4: {0: [2.0, 4.0, 6.0]}}, c={V4: {0: [1.0] * 7}})
    b.results[V4].seeds[0] = runs.Seed(
        [e._replace(step=2 * e.step) for e in b.results[V4].seeds[0].curve], 60, 0.0)
    assert compare.shared([a, b], []) == [(V4, 40)]
    (found,) = compare.improvements([a, b], b)
    assert found.environments == [(V4, 40)] and found.probability.value == 0.5
    c.results[V4].seeds[0] = runs.Seed(
        [e._replace(step=e.step + 5) for e in c.results[V4].seeds[0].curve], 75, 0.0)
    left_out = []
    assert compare.shared([a, c], left_out) == []
    assert left_out == [f"{V4} (no evaluations at equal steps)"]
    assert compare.improvements([a, c], c) == []


def test_of_two_versions_of_an_environment_one_counts(tmp_path):
    methods = load(tmp_path, a={V4: seeds(1.0), V5: seeds(2.0), "Ant-v4": seeds(1.0)})
    left_out = []
    assert compare.shared(methods, left_out) == [("Ant-v4", 30), (V5, 30)]
    assert left_out == [f"{V4} (an older version of {V5})"]


def test_aggregates_are_of_normalised_scores(tmp_path):
    """With 19.4 and 2787, and 2.7 and 4536: scores 0 0.5 1, and 0.25 0.75; the middle half of the
    five are 0.25 0.5 0.75."""
    hopper, walker = (published.reference(e) for e in ("Hopper-v4", "Walker2d-v4"))
    methods = load(tmp_path, a={
        "Hopper-v4": seeds(*map(hopper.at, (0.0, 0.5, 1.0))),
        "Walker2d-v4": seeds(*map(walker.at, (0.25, 0.75)))})
    (found,) = compare.aggregates(methods, compare.shared(methods, []))
    assert found.runs == 5 and found.iqm.value == pytest.approx(0.5)
    assert 0 <= found.iqm.lower < 0.5 < found.iqm.upper <= 1
    above = dict(zip(found.scores.round(6), found.profile, strict=True))
    assert (above[0.4], above[0.6]) == pytest.approx(((2 / 3 + 1 / 2) / 2, (1 / 3 + 1 / 2) / 2))
    assert (found.lower <= found.profile).all() and (found.profile <= found.upper).all()


def test_improvement_needs_no_reference_and_is_over_the_baseline(tmp_path):
    methods = load(tmp_path, base={"Walker2d-v5": seeds(1.0, 2.0), V4: seeds(1.0, 1.0)},
                   new={"Walker2d-v5": seeds(1.0, 3.0), V4: seeds(0.0, 0.0)},
                   other={"Ant-v4": seeds(1.0)})
    (found,) = compare.improvements(methods, methods[0])
    walker = scipy.stats.mannwhitneyu([1, 3], [1, 2]).statistic / 4  # 0.625
    assert found.method == "new" and found.runs == (4, 4)
    assert found.probability.value == pytest.approx((walker + 0) / 2)
    assert found.probability.lower <= found.probability.value <= found.probability.upper


def test_steps_to_a_threshold_by_hand(tmp_path):
    """First there at 10, 30, never: the median is 30. At a height that one seed reached, the
    median seed never did."""
    (method,) = load(tmp_path, a={V4: {0: [5.0, 1.0, 9.0], 1: [0.0, 4.9, 5.0], 2: [1.0, 1.0, 1.0]}})
    assert compare.steps_to(method.results[V4], 5) == (2, 30)
    assert compare.steps_to(method.results[V4], 6) == (1, math.inf)
    assert compare.steps_to(method.results[V4], 0) == (3, 10)


def test_points_of_the_same_algorithm_and_version_are_beside(tmp_path, monkeypatch):
    rows = tuple(published.Row(*row, "them") for row in (
        ("sac", V4, 20, 100.0), ("sac", V4, 26, 150.0), ("sac", V4, 30, 200.0),
        ("sac", V4, 40, 300.0), ("sac", V5, 30, 400.0), ("ppo", V4, 30, 500.0)))
    monkeypatch.setattr(published, "rows", lambda: rows)
    (method,) = load(tmp_path, a={V4: seeds(5.0, 7.0)})
    found = compare.beside_published(method.results[V4])
    assert found == [(rows[0], 20, [4, 6]), (rows[2], 30, [5, 7])], "26 is too far from 20"
