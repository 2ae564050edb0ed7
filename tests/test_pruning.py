"""The replay of recorded studies under the rules for pruning, by hand."""

import gzip
import json
from fractions import Fraction

import pytest

from bench import pruning
from lab.options import Tune
from lab.tuning import study

# Means at steps 10, 20, ..., 100 of seven trials. The bar of the median at 50 is 3, of the first
# five trials; the sixth stays below it and the seventh rises after it, to the best return of all
CURVES = [[float(level)] * 10 for level in (1, 2, 3, 4, 5)] + [[0.0] * 10, [0.0] * 6 + [9.0] * 4]


@pytest.fixture
def studies(tmp_path):
    """Seeds 0 and 1 see the curves, 2 and 3 ten times as much, 4 and 5 have 1 in all trials but the
    last, which has 3 there."""
    lines = [{"steps": 100, "seeds": 6}]
    for number, curve in enumerate(CURVES):
        lines.append({"trial": number, "settings": {}})
        other = 3.0 if number == 6 else 1.0
        lines += [{"trial": number, "step": 10 * (i + 1), "returns": [
            value - 1, value + 1, 10 * value, 10 * value, other, other]}
            for i, value in enumerate(curve)]
        lines.append({"trial": number, "state": "completed", "reason": ""})
    path = tmp_path / "ppo-pendulum-0.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    return pruning.read(path)


def test_a_journal_is_read_as_a_study_for_each_pair_of_seeds(studies):
    first, second, _ = studies
    assert [study.kind for study in studies] == ["ppo-pendulum"] * 3
    assert first.trials[4].means[50] == 5 and second.trials[4].means[50] == 50
    assert first.best(3) == [6, 4, 3] and first.best(1, {6}) == [4]
    assert first.others[4] == (50 + 50 + 1 + 1) / 4  # of the seeds 2 to 5


def test_what_a_rule_cuts_saves_and_loses(studies):
    rule = pruning.Rule("median", None, "1/2", 5, None)
    assert rule.cuts(studies[0]) == {5: 50, 6: 50}
    row = pruning.replay(rule, studies[:1])
    assert (row["cut"], row["wrong"], row["best_cut"]) == (2, 1, 1)
    assert row["saved"] == pytest.approx({"all": 1 / 7, "ppo-pendulum": 1 / 7}, abs=1e-4)
    others = [5.5, 10.5, 15.5, 20.5, 25.5, 0.5, 46.5]  # 46.5 is lost, and 25.5 the best left
    mean = sum(others) / 7
    spread = (sum((value - mean) ** 2 for value in others) / 7) ** 0.5
    assert row["lost"][0] == pytest.approx((46.5 - 25.5) / spread, abs=1e-4)


def test_no_trial_is_pruned_at_its_last_evaluation(studies):
    assert pruning.Rule("median", None, "1", 5, None).cuts(studies[0]) == {}


@pytest.mark.parametrize("rule", [
    pruning.Rule("median", None, "1/2", 6, None),  # one trial less: the sixth completes
    pruning.Rule("percentile", 90, "1/2", 5, None),  # a bar of 1.4
    pruning.Rule("vizier", None, "1/2", 5, None)])
def test_a_pruned_trial_sets_no_bar(studies, rule):
    cuts = rule.cuts(studies[0])
    assert cuts == ({6: 50} if rule.startup == 6 else {5: 50, 6: 50})


def test_no_rule_is_shown_that_another_one_beats():
    def row(pruner, saved, wrong, warmup="1/6"):
        return {"pruner": pruner, "percentile": None, "warmup": warmup, "startup": 4,
                "patience": None, "saved": {"all": saved, "x": saved}, "cut": 10, "wrong": wrong,
                "best_cut": 0, "lost": [0.0] * 3}

    text = pruning.table({"replays": {"x": 3}, "rules": [
        row("median", 0.3, 1), row("vizier", 0.2, 1), row("percentile", 0.1, 0)]})
    assert [line.split()[1] for line in text.splitlines()[4:]] == ["median", "**percentile**"]


def test_the_default_rule_is_the_one_that_saves_most_with_few_wrong_cuts():
    best = pruning.chosen(json.loads((pruning.JOURNALS.parent / "pruning-replay.json").read_text()))
    options = Tune(steps=36_000)
    assert options.pruner == best["pruner"] and options.patience == best["patience"]
    assert best["percentile"] in (None, options.percentile)
    assert options.n_startup_trials == best["startup"]
    assert study.warmup(options) == int(36_000 * Fraction(best["warmup"]))


def test_a_recorded_study_goes_on_after_a_kill(tmp_path, monkeypatch):
    """Killed while its second trial trains: the same lines come of it."""
    def fake(work, job, emit):
        if len(jobs) == kill_at:
            raise KeyboardInterrupt
        jobs.append(job)
        for step in (10, 20):
            emit({"step": step, "rows": {seed: {"return/eval": seed % 7 + step}
                                         for seed in job.seeds}})

    monkeypatch.setattr(pruning, "attempt", fake)
    monkeypatch.setattr(pruning, "TRIALS", 3)
    texts = []
    for number, kill_at in enumerate((None, 1)):
        jobs = []
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.setattr(pruning, "JOURNALS", folder / "stored")
        if kill_at:
            with pytest.raises(KeyboardInterrupt):
                pruning.record("sac-pendulum", 5, folder)
            kill_at = None
        pruning.record("sac-pendulum", 5, folder)
        texts.append(gzip.decompress((folder / "stored/sac-pendulum-5.jsonl.gz").read_bytes()))
        assert [job.seeds[0] for job in jobs] == [30_000, 30_006, 30_012]
        assert {job.num_envs for job in jobs} == {8}
    assert texts[0] == texts[1]
    assert texts[0].count(b"\n") == 1 + 3 * 4
