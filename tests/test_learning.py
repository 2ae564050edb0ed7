"""bench/learning.py: which rows of a run go into the results."""

import csv
import json

import pytest

from bench import learning
from lab import train
from lab.options import Simple, parse_args
from lab.training import recorder

NAME = "crossq-hardcore"
SEEDS, STEPS = 4, 300_000


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The folder of a run of NAME without rows, and results that are elsewhere."""
    monkeypatch.setattr(learning, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(learning, "SCORES", tmp_path / "scores.csv")
    learning.SCORES.write_text("experiment,seed,step,return_eval\nold,0,10,1.0\n")
    options, config = parse_args(learning.EXPERIMENTS[NAME][0].split(), Simple)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "versions.json").write_text("{}")
    recorder.write_json(folder / "config.json", train.describe(options, config, NAME))
    return folder


def evaluate(run, seed, last):
    path = run / "BipedalWalkerHardcore-v3" / "crossq" / f"seed_{seed}" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps({"step": step, "return/eval": seed + step / 1e6}) + "\n"
                            for step in range(25_000, last + 1, 25_000)))


def kept():
    with learning.SCORES.open() as file:
        return [(row["experiment"], int(row["seed"]), int(row["step"]))
                for row in csv.DictReader(file)]


def test_a_run_that_ended_is_kept_whole(run):
    for seed in range(SEEDS):
        evaluate(run, seed, STEPS if seed else 50_000)  # seed 0 failed on its way
    (run / learning.PICTURE).touch()
    learning.keep(NAME, run)
    assert kept().count((NAME, 0, 50_000)) == kept().count((NAME, 1, STEPS)) == 1
    assert ("old", 0, 10) in kept()
    assert f"| 3 | {STEPS} |" in learning.table(learning.read())


def test_a_run_that_stopped_is_kept_as_far_as_all_seeds_got(run):
    for seed in range(SEEDS):
        evaluate(run, seed, 100_000 if seed else 75_000)
    learning.keep(NAME, run)
    assert max(step for name, _, step in kept() if name == NAME) == 75_000
    assert f"| {SEEDS} | 75000, stopped |" in learning.table(learning.read())
    assert (learning.RESULTS / NAME / learning.PICTURE).read_bytes()[:4] == b"\x89PNG"


def test_a_run_without_an_evaluation_is_not_kept(run):
    for seed in range(SEEDS):
        evaluate(run, seed, 100_000 if seed else 0)
    with pytest.raises(SystemExit, match="without an evaluation"):
        learning.keep(NAME, run)


def test_a_run_of_something_else_is_not_kept(run):
    settings = json.loads((run / "config.json").read_text())
    settings["config"]["gamma"] = 0.5
    (run / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="is not a run of crossq-hardcore"):
        learning.keep(NAME, run)


def test_the_picture_can_be_drawn_from_what_is_committed(tmp_path):
    learning.draw(learning.read(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0
