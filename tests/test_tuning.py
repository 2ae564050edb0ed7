"""The search space, the surrogate's data, suggestions, the pruner, the journal."""

import contextlib
import json
import math
import resource
from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import lognorm

from lab.errors import UserError
from lab.tuning import space, surrogate
from lab.tuning.pruner import prune
from lab.tuning.trials import Journal, Trial


@dataclass(frozen=True)
class Config:
    lr: float = 3e-4
    size: int = 128
    width: int = 64
    delay: int = 1
    kind: str = "a"
    learn: bool = True
    limit: float | None = None


EVERY = ("lr=log:1e-5:1e-2", "size=int:2:5", "width=logint:1:1024", "delay=cat:4,1,2",
         "kind=cat:a,b,c", "learn=cat:true,false", "limit=cat:none,0.5,2")


def read(*texts):
    return space.read(texts, Config, "mine.py")


def make(number, returns, state="completed", settings=None):
    """returns: step -> each seed's."""
    return Trial(number, settings or {"lr": 10 ** -(2 + number / 4)}, state, dict(returns))


# The space


def test_settings_come_back_and_their_vectors_are_exact():
    searched = read(*EVERY)
    assert searched.size == 5 + 3 + 1 + 3 - 1  # kind and limit take three axes each
    for x in np.random.default_rng(0).random((200, searched.size)):
        settings = searched.decode(x)
        vector = searched.encode(settings)
        assert vector.shape == (searched.size,) and (vector >= 0).all() and (vector <= 1).all()
        assert searched.decode(vector) == settings
        np.testing.assert_allclose(searched.snap(x), vector, atol=1e-5)
        assert json.loads(json.dumps(settings)) == settings
    assert searched.decode(np.zeros(searched.size))["lr"] == 1e-5
    assert searched.decode(np.ones(searched.size))["lr"] == 1e-2


def test_a_log_axis_and_equal_shares():
    delay, kind, learn, limit, lr, size, width = read(*EVERY).parameters  # by name
    assert lr.decode(np.array([0.5])) == pytest.approx(10**-3.5, rel=1e-5)
    values, counts = np.unique(size.numbers(np.linspace(0, 1, 4001)), return_counts=True)
    assert values.tolist() == [2, 3, 4, 5] and abs(counts - 1000).max() < 3
    assert width.decode(np.array([0.5])) == pytest.approx((0.5 * 1024.5) ** 0.5, abs=0.5)
    assert delay.choices == (1, 2, 4) and not delay.one_hot
    assert [p.size for p in (kind, learn, limit)] == [3, 1, 3]
    assert kind.encode("b").tolist() == [0, 1, 0]


@pytest.mark.parametrize("text, words", [
    ("lrr=log:1e-5:1e-2", r"mine.py has no setting 'lrr'; did you mean lr"),
    ("size=2.5:4.5", r"size must be int, not 2.5"),
    ("size=int:2.5:4", r"the bounds must be whole numbers, not 2.5:4"),
    ("learn=int:0:1", r"learn must be bool, not 0"),
    ("kind=cat:a,1", r"kind must be str, not 1"),
    ("lr=1:a", r"the bounds must be numbers, not 1:a"),
    ("lr=0.5:0.1", r"LOW must be below HIGH, not 0.5 and 0.1"),
    ("lr=0.5:0.5", r"LOW must be below HIGH"),
    ("lr=0:nan", r"LOW must be below HIGH"),
    ("lr=0:inf", r"LOW must be below HIGH"),
    ("lr=log:0:1", r"a log scale needs LOW above 0, not 0"),
    ("size=logint:-1:8", r"a log scale needs LOW above 0, not -1"),
    ("size=cat:64", r"cat needs at least two different choices"),
    ("size=cat:64,64", r"cat needs at least two different choices"),
    ("size", r"expected NAME=LOW:HIGH"),
    ("lr=exp:1:2", r"expected NAME=LOW:HIGH"),
])
def test_a_bad_parameter_is_named(text, words):
    with pytest.raises(UserError, match=words) as error:
        read(text)
    assert str(error.value).startswith(f"--space {text}: ") and "\n" not in str(error.value)


def test_an_empty_space_and_a_parameter_twice_are_refused():
    with pytest.raises(UserError, match="--space is empty"):
        read()
    with pytest.raises(UserError, match="names 'lr' twice"):
        read("lr=0:1", "lr=log:0.1:1")


# What a trial registers

# Three completed trials: finals 10, 20, 60; at step 1 they were at 4, 16, 30.
COMPLETED = [make(0, {1: [3, 5], 2: [9, 11]}), make(1, {1: [15, 17], 2: [16, 24]}),
             make(2, {1: [30, 30], 2: [60, 60]})]


def test_what_each_state_registers_by_hand():
    trials = [*COMPLETED, make(3, {1: [1, 3]}, "pruned"), make(4, {1: [40, 40]}, "pruned"),
              make(5, {1: [5, 5]}, "diverged"), make(6, {}, "diverged"), make(7, {}, "running"),
              make(8, {1: [9, 9]}, "failed")]
    seen = {trial.number: seen for trial, seen in zip(
        [t for t in trials if t.state != "failed"], surrogate.observe(trials), strict=True)}
    values = {number: observation.value for number, observation in seen.items()}
    gain = np.median([6, 4, 30])
    assert gain == 6
    assert values == {0: 10, 1: 20, 2: 60, 3: 2 + gain, 4: 20, 5: 10, 6: 10, 7: 30}
    usual = (2 / 2 + 32 / 2 + 0) / 3  # variances of the seeds over their number
    variances = {number: observation.variance for number, observation in seen.items()}
    for number, own in ((0, 1), (1, 16), (2, 0)):
        assert variances[number] == pytest.approx((usual + own) / 2)
    assert variances[3] == variances[4] == pytest.approx(2 * usual + np.var([6, 4, 30]))
    assert variances[5] == variances[7] == usual < variances[3]


def test_the_work_for_a_pruned_trial_does_not_grow_with_the_others(monkeypatch):
    """A study may have thousands of both."""
    compared, at = [], Trial.at
    monkeypatch.setattr(Trial, "at", lambda *args: compared.append(args) or at(*args))
    pruned = [make(3 + i, {1: [i, i]}, "pruned") for i in range(20)]
    assert len(surrogate.observe([*COMPLETED, *pruned])) == 23
    assert len(compared) == len(COMPLETED)


def test_nothing_is_registered_before_one_has_completed():
    assert surrogate.observe([make(0, {1: [1, 2]}, "pruned"), make(1, {}, "running")]) == []


def test_noise_is_assumed_where_one_seed_cannot_show_it():
    trials = [make(0, {1: [0]}), make(1, {1: [10]})]
    assert [o.variance for o in surrogate.observe(trials)] == [2.5, 2.5]


# The surrogate


def drawn(searched, objective, count, noise, seed=0, seeds=3):
    rng, trials = np.random.default_rng(seed), []
    for number in range(count):
        settings = surrogate.ask(searched, trials, seed)
        returns = objective(settings) + noise * rng.normal(size=seeds)
        trials.append(Trial(number, settings, "completed", {1: returns.tolist()}))
    return trials


def test_the_same_trials_give_the_same_suggestion_and_others_another():
    searched = read("lr=log:1e-5:1e-2", "size=int:16:512")
    trials = drawn(searched, lambda s: -abs(math.log10(s["lr"]) + 3), 6, 0.1)
    assert len({json.dumps(trial.settings) for trial in trials}) == 6
    asked = surrogate.ask(searched, trials, 0)
    assert surrogate.ask(searched, [replace(trial) for trial in trials], 0) == asked
    assert surrogate.ask(searched, trials, 1) != asked
    running = [*trials, Trial(6, asked)]
    again = surrogate.ask(searched, running, 0)
    far = np.abs(searched.encode(again) - searched.encode(asked)).max()
    assert far > 0.05, "what runs is asked for again"


def test_it_starts_with_sobol_points_and_falls_back_to_them():
    searched = read("lr=0:1", "limit=0:1")
    trials = []
    for number in range(8):  # none of them completes
        trials.append(Trial(number, surrogate.ask(searched, trials, 0), "failed"))
    cells = {(int(t.settings["lr"] * 2), int(t.settings["limit"] * 2)) for t in trials[:4]}
    assert len(cells) == 4, "four points of a Sobol sequence lie one in each quarter"
    assert len({t.settings["lr"] for t in trials}) == 8


def test_it_closes_in_on_a_learning_rate_in_noise():
    """Half of random points would lie more than 1.5 decades from it."""
    searched = read("lr=log:1e-6:1", "size=int:16:512")
    trials = drawn(searched, lambda s: -(math.log10(s["lr"]) + 3) ** 2, 12, 0.6)
    distances = [abs(math.log10(trial.settings["lr"]) + 3) for trial in trials]
    assert np.median(distances[6:]) < 0.75
    assert abs(math.log10(surrogate.ranked(searched, trials)[0][0].settings["lr"]) + 3) < 0.5


def test_a_lucky_trial_is_not_the_best():
    """Its neighbours say otherwise, and its seeds differ."""
    searched = read("lr=0:1")
    trials = [make(i, {1: [10 * x, 10 * x + 0.1]}, settings={"lr": x})
              for i, x in enumerate((0.0, 0.1, 0.2, 0.3, 0.6, 0.7, 0.8, 0.9, 1.0))]
    trials.append(make(9, {1: [0.0, 22.0]}, settings={"lr": 0.25}))
    assert max(trials, key=lambda trial: trial.final).number == 9
    best, mean = surrogate.ranked(searched, trials)[0]
    assert best.number == 8 and mean == pytest.approx(10, abs=2)


@pytest.mark.parametrize("size", [1, 6])
def test_length_scales_are_the_most_probable(size):
    """Against scipy's density, with a likelihood that is known."""
    wanted = np.linspace(-1, 1, size)

    def likelihood(theta, eval_gradient):
        assert eval_gradient
        return 5 * np.sum((theta - wanted) ** 2), 10 * (theta - wanted)

    bounds = np.tile(np.log([0.05, 20]), (size, 1))
    theta, loss = surrogate.most_probable(likelihood, np.zeros(size), bounds)
    prior = lognorm(s=3**0.5, scale=np.exp(2**0.5) * size**0.5)

    def slow(theta):
        return likelihood(theta, True)[0] - prior.logpdf(np.exp(theta)).sum()

    found = minimize(slow, np.zeros(size), method="Nelder-Mead",
                     options={"maxiter": 10_000, "maxfev": 10_000, "xatol": 1e-7, "fatol": 1e-12})
    assert theta == pytest.approx(found.x, abs=1e-4)
    assert loss == pytest.approx(slow(theta) - size * math.log(6 * math.pi) / 2, abs=1e-6)


def test_what_is_recommended_may_lie_between_the_trials():
    searched = read("lr=0:1")
    trials = [make(i, {1: [y - 0.01, y + 0.01]}, settings={"lr": x}) for i, (x, y) in enumerate(
        (x, -(x - 0.5) ** 2) for x in (0.0, 0.2, 0.4, 0.6, 0.9, 1.0))]
    best, second = surrogate.recommend(searched, trials, 2)
    assert best.name == "optimum of 6" and best.settings["lr"] == pytest.approx(0.5, abs=0.05)
    assert second.name in ("trial 2", "trial 3") and best.mean > second.mean
    assert best.observed is None and second.observed == trials[int(second.name[-1])].final
    assert surrogate.recommend(searched, trials, 2) == [best, second], "a study that goes on agrees"
    assert surrogate.ask(searched, trials, 0) != best.settings


def test_an_optimum_that_was_tried_is_a_trial():
    searched = read("size=cat:1,2")
    trials = [make(i, {1: [i, i + 1.0]}, settings={"size": 1 + i}) for i in range(2)]
    assert [c.name for c in surrogate.recommend(searched, trials, 3)] == ["trial 1", "trial 0"]
    assert surrogate.recommend(searched, [], 3) == []


def test_a_setting_that_was_tried_again_is_one_point_and_surer(capsys):
    searched = read("size=cat:1,2")
    trials = [make(i, {1: [y, y + 4]}, settings={"size": 1 + i % 2})
              for i, y in enumerate((0, 10, 2, 10, 1, 10))]
    once, thrice = (surrogate.Surrogate(searched, some, 0) for some in (trials[:2], trials))
    assert len(thrice.optimizer.space) == 2 and len(surrogate.ranked(searched, trials)) == 2
    assert thrice.predict([searched.encode({"size": 1})])[1] < once.predict(
        [searched.encode({"size": 1})])[1]
    assert surrogate.ask(searched, trials, 0)["size"] in (1, 2)
    assert not capsys.readouterr().out, "bayes_opt prints what it does not like"


def test_of_many_points_the_newest_the_best_and_some_between_are_kept(monkeypatch):
    monkeypatch.setattr(surrogate, "POINTS", 9)
    values = np.array([0, 9, 1, 0, 8, 0, 0, 7, 0, 0, 0, 0, 99, 0, 0])
    assert surrogate.chosen(values).tolist() == [0, 1, 4, 6, 7, 11, 12, 13, 14]
    assert surrogate.chosen(values[:9]).tolist() == list(range(9))
    for n in range(10, 60):
        kept = surrogate.chosen(np.random.default_rng(n).random(n))
        assert len(set(kept)) == 9 and (np.diff(kept) > 0).all()


def test_a_study_beyond_the_points_of_the_surrogate_ranks_all_trials(monkeypatch):
    """It is fitted to no more points, the running trial among them."""
    monkeypatch.setattr(surrogate, "POINTS", 9)
    searched = read("lr=log:1e-8:1e-2")
    trials = [make(n, {10: [float(n % 7), n % 7 + 0.5]}) for n in range(20)]
    trials.append(make(20, {}, "running"))
    registered = []
    register = surrogate.BayesianOptimization.register
    monkeypatch.setattr(surrogate.BayesianOptimization, "register", lambda self, x, y: (
        registered.append(searched.decode(np.array(x))["lr"]), register(self, x, y)))
    suggested = surrogate.ask(searched, trials, 0)
    assert len(registered) == 9
    assert any(lr == pytest.approx(trials[20].settings["lr"]) for lr in registered)
    assert suggested == surrogate.ask(searched, trials, 0)
    assert len(surrogate.ranked(searched, trials)) == 20


def test_how_many_trials_are_near_the_best_by_hand():
    """The variances of their means are 4, 0 and 2: 2 on average, so 3 for the best's own 4, as the
    surrogate has it, and an error of 1.7."""
    trials = [make(0, {10: [8.0, 12.0]}), make(1, {10: [8.5, 8.5]}),
              make(2, {10: [6.0, 6.0 + 8**0.5]}), make(3, {10: [99.0, 99.0]}, "pruned"),
              make(4, {}, "failed")]
    assert surrogate.near_best(trials) == (
        "2 of 3 completed trials are within one standard error (1.7, from its seeds and those of "
        "all trials) of the best observed return, 10.0 (trial 0)")
    assert "needs two seeds" in surrogate.near_best([make(0, {10: [8.0]}), make(1, {10: [9.0]})])


def test_a_parameter_that_matters_is_told_from_one_that_does_not():
    searched = read("lr=log:1e-5:1e-2", "size=int:16:512", "kind=cat:a,b,c")
    trials = drawn(searched, lambda s: 10 * (s["kind"] == "b") + math.log10(s["lr"]), 10, 0.1)
    importance = surrogate.Surrogate(searched, trials, 0).importance()
    assert importance["kind"] > importance["lr"] > 5 * importance["size"]
    assert sum(importance.values()) == pytest.approx(1)


# The pruner

# Means at steps 10, 20, 30, 40 of five completed trials, and so their running averages by hand:
#   at 20:  2,  3,  4,  5, 10  -> median 4          at 30: 3, 4, 5, 6, 10 -> median 5
CURVES = ((1, 3, 5, 7), (2, 4, 6, 8), (3, 5, 7, 9), (4, 6, 8, 10), (10, 10, 10, 10))
FIVE = [make(i, {10 * (k + 1): [v] for k, v in enumerate(curve)}) for i, curve in enumerate(CURVES)]


def running(curve):
    return make(9, {10 * (k + 1): [value] for k, value in enumerate(curve)}, "running")


@pytest.mark.parametrize("curve, settings, pruned", [
    ((3,), {}, False),  # 3 is the median of 1, 2, 3, 4, 10: not strictly below
    ((2.9,), {}, True),
    ((0, 4), {}, False),  # its best so far counts, not its average
    ((0, 3.9), {}, True),
    ((4.5, 0), {}, False),  # also if it was reached before
    ((0, 0, 4.9), {}, True),
    ((0, 0, 5), {}, False),
    ((0,), {"n_warmup_steps": 11}, False),
    ((0,), {"n_warmup_steps": 10}, True),
    ((0, 0), {"n_warmup_steps": 11}, True),
    ((0, 0), {"interval_steps": 20}, True),  # due at 0, 20, 40
    ((0, 0, 0), {"interval_steps": 20}, False),
    ((0, 0, 0, 0), {"interval_steps": 20}, True),
    ((0,), {"n_startup_trials": 6}, False),
])
def test_viziers_rule_by_hand(curve, settings, pruned):
    trial = running(curve)
    others = [make(10, {10: [99]}, "pruned"), make(11, {10: [99]}, "diverged"), trial]
    assert prune(trial, FIVE + others, "vizier", **settings) == pruned
    assert not prune(trial, FIVE[1:] + others, "vizier", **settings), "four have completed"


# The five trials at the steps themselves: 1, 2, 3, 4, 10 at 10; 3, 4, 5, 6, 10 at 20
@pytest.mark.parametrize("curve, settings, pruned", [
    ((3,), {"pruner": "median"}, False),
    ((2.9,), {"pruner": "median"}, True),
    ((0, 4.9), {"pruner": "median"}, True),  # Vizier's bar is 4
    ((0, 5), {"pruner": "median"}, False),
    ((5, 0), {"pruner": "median"}, False),  # its best so far counts
    ((0, 4.9), {"pruner": "median", "percentile": 100.0}, True),  # which is for percentile
    ((0, 5.9), {"pruner": "percentile", "percentile": 25.0}, True),  # the best quarter has 6
    ((0, 6), {"pruner": "percentile", "percentile": 25.0}, False),
    ((0, 3.9), {"pruner": "percentile", "percentile": 75.0}, True),  # the best three quarters
    ((0, 4), {"pruner": "percentile", "percentile": 75.0}, False),
    ((0, 2.9), {"pruner": "percentile", "percentile": 100.0}, True),
    ((0, 4.4), {"pruner": "percentile", "percentile": 60.0}, True),  # 4 + 0.6 x (5 - 4) = 4.6
    ((0, 4.7), {"pruner": "percentile", "percentile": 60.0}, False),
    # as Optuna's PatientPruner: no new best in the last two evaluations and the one before them
    ((2, 2.5, 1, 1), {"pruner": "median", "patience": 2}, False),
    ((2.5, 2, 1, 1), {"pruner": "median", "patience": 2}, True),
    ((2.5, 2, 1), {"pruner": "median", "patience": 2}, False),
    ((2.5, 2.5, 1, 1), {"pruner": "median", "patience": 2}, False),  # equal: no worse
    ((2.5, 2, 1), {"pruner": "median", "patience": 1}, True),
    ((9.5, 2, 1, 1), {"pruner": "median", "patience": 2}, False),  # above the bar, 9
])
def test_the_percentile_rule_by_hand(curve, settings, pruned):
    trial = running(curve)
    others = [make(10, {10: [99]}, "pruned"), make(11, {10: [99]}, "diverged"), trial]
    assert prune(trial, FIVE + others, **settings) == pruned


def test_a_trial_that_stopped_early_sets_the_bar_by_its_last_evaluation():
    trials = [make(i, {10: [float(10 + i)]}) for i in range(5)]
    assert prune(running((0, 11.9)), trials, "median")
    assert not prune(running((0, 12)), trials, "median")


# The journal


def test_a_journal_gives_back_its_trials_and_tolerates_a_torn_line(tmp_path):
    path = tmp_path / "trials.jsonl"
    journal = Journal(path)
    assert journal.header == {} and journal.trials() == []
    for event in ({"space": {}}, {"trial": 0, "settings": {"lr": 1e-3}},
                  {"trial": 1, "settings": {"lr": 1e-4}},
                  {"trial": 0, "step": 10, "returns": [1.0, 2.0]},
                  {"trial": 0, "state": "pruned", "reason": ""}):
        journal.append(event)
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"trial": 1, "st')
    journal = Journal(path)
    first, second = journal.trials()
    assert first == Trial(0, {"lr": 1e-3}, "pruned", {10: [1.0, 2.0]})
    assert second == Trial(1, {"lr": 1e-4}) and journal.header == {"space": {}}
    assert path.read_bytes() != whole, "reading changes nothing"
    journal.append({"trial": 1, "state": "failed", "reason": "x"})
    journal.close()
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 6
    assert Journal(path).trials()[1].state == "failed"


def test_a_line_that_a_full_disk_did_not_take_is_dropped(tmp_path):
    """Here a limit on the size of files, which the second line exceeds."""
    path = tmp_path / "trials.jsonl"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.closing(Journal(path)) as journal:
        journal.append({"space": {}})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limit[1]))
            with pytest.raises(UserError, match=r"cannot write to '.*jsonl': File too large"):
                journal.append({"trial": 0, "settings": {"lr": 1e-3}})
            journal.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with contextlib.closing(Journal(path)) as journal:
        assert journal.header == {"space": {}} and journal.trials() == []
        journal.append({"trial": 0, "settings": {"lr": 1e-3}})
    with contextlib.closing(Journal(path)) as journal:
        assert journal.trials() == [Trial(0, {"lr": 1e-3})]


def test_a_second_tuner_is_refused_until_the_first_has_ended(tmp_path):
    first = Journal(tmp_path / "trials.jsonl")
    with pytest.raises(UserError, match="another tuner is running on"):
        Journal(tmp_path / "trials.jsonl")
    first.close()
    Journal(tmp_path / "trials.jsonl").close()


@pytest.mark.parametrize("line", [
    "nonsense", "5", '"settings"', '{"trial": 1, "settings": {}}', '{"settings": {}}',
    '{"trial": 0, "settings": 5}', '{"trial": 0, "step": 10, "returns": [1.0]}',
    '{"trial": 0, "settings": {}}\n{"trial": 0, "step": 10}',
    '{"trial": 0, "settings": {}}\n{"trial": 0, "step": 10, "returns": ["x"]}',
    '{"trial": 0, "settings": {}}\n{"trial": 0, "state": "gone", "reason": ""}'])
def test_a_journal_that_is_broken_before_its_end_is_refused(tmp_path, line):
    path = tmp_path / "trials.jsonl"
    for head in ('{"space": {}}\n', ""):
        path.write_text(head + line + '\n{"trial": 0, "settings": {}}\n')
        if head or line in ("nonsense", "5", '"settings"'):
            with pytest.raises(UserError, match=r"trials\.jsonl is corrupt"):
                Journal(path)
