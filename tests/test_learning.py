"""bench/learning.py: which rows of a run go into the results."""

import csv
import json

import pytest

from bench import learning
from lab import train
from lab.command_line import parse_args
from lab.errors import UserError
from lab.options import Simple
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
    path.write_text("".join(json.dumps({
        "step": step, "return/eval": seed + step / 1e6, "wall_time": step / 100}) + "\n"
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


def test_a_failed_seed_does_not_cut_the_others(run):
    for seed in range(SEEDS):
        evaluate(run, seed, 100_000 if seed else 25_000)
    (run / "BipedalWalkerHardcore-v3/crossq/stack_0_3").mkdir()
    learning.keep(NAME, run)
    assert kept().count((NAME, 0, 25_000)) == kept().count((NAME, 1, 100_000)) == 1
    assert "| 3 | 100000, stopped |" in learning.table(learning.read())


def test_a_run_that_is_not_there_is_told_in_a_line(run):
    with pytest.raises(UserError, match="no such run folder: nowhere"):
        learning.main([NAME, "--run", "nowhere"])


def test_a_comparison_in_bf16_is_of_the_seeds_that_both_have(monkeypatch):
    monkeypatch.setattr(learning, "PAIRS", ("a",))
    fp32 = {(seed, step): float(step) for seed in range(3) for step in (1, 2)}
    bf16 = {key: value + key[0] for key, value in fp32.items() if key != (1, 2)}  # 1 failed
    row = learning.pairs({"a": fp32, "a-bf16": bf16}).splitlines()[-1]
    assert [cell.strip() for cell in row.split("|")][1:7] == [
        "a", "2", "2", "2", "1 [-12, 14]", "0 2"]


def test_a_run_that_stopped_early_is_not_beside_the_published_results():
    scores = {f"xqc-{task}": {(0, 100_000): 1000.0} for task in ("hopper", "ant")}
    scores["xqc-ant"] = {(0, 90_000): 1000.0}
    (row,) = (line for line in learning.mujoco(scores).splitlines() if "xqc, here" in line)
    assert [cell.strip() for cell in row.split("|")][2:-1] == ["-", "1000", "-", "-", "-", "-"]


def test_a_hardcore_row_is_of_unseen_terrains(run, monkeypatch):
    """Its seeds' returns there, without the failed one, and the share of courses with an end that
    is no fall."""
    for seed in range(SEEDS):
        evaluate(run, seed, STEPS)
    learning.keep(NAME, run)
    called = []

    def evaluated(argv):
        called.append(argv)
        ends = [(True, -100.0), (True, 0.3), (False, 0.1), (True, 0.2)]
        result = {"failed_seeds": [3], "seeds": {str(n): {"return": 100.0 + n} for n in range(4)},
                  "episodes": [{"seed": n, "terminated": end, "last_reward": last}
                               for n in range(4) for end, last in ends[:4 if n < 3 else 1]]}
        recorder.write_json(learning.RESULTS / NAME / "fresh.json", result)

    monkeypatch.setattr(learning.evaluate, "run", evaluated)
    for _ in range(2):  # again in the place of the first
        learning.evaluate_fresh(NAME, run)
    assert called[0] == [str(run), "--agent", str(run / "crossq.py"),
                         "--out", str(learning.RESULTS / NAME / "fresh")]
    row = f"| 3 | {STEPS} | 101 on 100 unseen terrains a seed, 50% finished | 99 to 103 |"
    assert row in learning.table(learning.read())
    learning.evaluate_fresh("sac-pendulum", run)
    assert len(called) == 2


def test_a_run_without_an_evaluation_is_not_kept(run):
    for seed in range(SEEDS):
        evaluate(run, seed, 100_000 if seed else 0)
    with pytest.raises(SystemExit, match="without an evaluation"):
        learning.keep(NAME, run)


def test_the_seeds_of_a_run_may_begin_at_another_than_0(run, monkeypatch):
    flags, published = learning.EXPERIMENTS[NAME]
    monkeypatch.setitem(learning.EXPERIMENTS, NAME, (f"{flags} --first-seed 5", published))
    for seed in range(5, 5 + SEEDS):
        evaluate(run, seed, STEPS)
    with pytest.raises(SystemExit, match="is not a run of crossq-hardcore"):
        learning.keep(NAME, run)  # its config says 0
    settings = json.loads((run / "config.json").read_text())
    settings["options"]["first_seed"] = 5
    (run / "config.json").write_text(json.dumps(settings))
    learning.keep(NAME, run)
    assert {seed for name, seed, _ in kept() if name == NAME} == {5, 6, 7, 8}


def test_a_run_of_something_else_is_not_kept(run):
    settings = json.loads((run / "config.json").read_text())
    settings["config"]["gamma"] = 0.5
    (run / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="is not a run of crossq-hardcore"):
        learning.keep(NAME, run)


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """An empty list of runs, and a script in place of learn_simple.py: as --seeds says, it ends
    (1), ends without a seed (2), is refused (3), is stopped (4), or is killed half-way once (5)."""
    script = tmp_path / "learn.py"
    script.write_text("""
import json, os, pathlib, signal, sys
words = sys.argv[1:]
resumed = words[0] == "--resume"
name = words[1].split("/")[-1].removesuffix("-1") if resumed else words[words.index("--name") + 1]
kind = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}[name]
print(name, *words[:1] * resumed, file=open("trained", "a"))
if kind == 3:
    sys.exit(2)
run = pathlib.Path("runs", name + "-1")
run.mkdir(parents=True, exist_ok=resumed)
(run / "config.json").write_text(json.dumps({"name": name}))
if kind == 4:
    sys.exit(143)
if kind == 5 and not resumed:
    os.kill(os.getpid(), signal.SIGKILL)
(run / "learning_curves.png").touch()
sys.exit(kind == 2)
""")
    monkeypatch.setattr(learning, "ROOT", tmp_path)
    monkeypatch.setattr(learning, "SCORES", tmp_path / "scores.csv")
    learning.SCORES.write_text("experiment,seed,step,return_eval\n")
    monkeypatch.setattr(learning, "SCRIPTS", {Simple: str(script)})
    kept = []
    monkeypatch.setattr(learning, "keep", lambda name, run: kept.append((name, run.name)))
    monkeypatch.setattr(learning, "write_tables", lambda: None)

    def start(**steps):
        monkeypatch.setattr(learning, "EXPERIMENTS", {
            name: (f"agents/sac.py --seeds 2 --steps {n}", "") for name, n in steps.items()})
        return kept, tmp_path / "trained"

    return start


def test_the_queue_trains_what_is_missing_with_the_fewest_steps_first(queue, capsys):
    """One that is refused does not stop it, and one without a seed has ended."""
    kept, trained = queue(b="2_000", c=300, a=1000)
    assert learning.main(["--list"]) == 0 and capsys.readouterr().out == "c\na\nb\n"
    assert learning.main([]) == 1 and capsys.readouterr().err == "did not end: c\n"
    assert trained.read_text() == "c\na\nb\n" and kept == [("a", "a-1"), ("b", "b-1")]
    learning.SCORES.write_text("experiment,seed,step,return_eval\na,0,10,1.0\nb,0,10,1.0\n")
    assert learning.missing() == ["c"]


def test_a_run_that_was_killed_goes_on_even_if_its_part_is_a_result(queue):
    kept, trained = queue(e=300, a=1000)
    with pytest.raises(KeyboardInterrupt):
        learning.main([])
    learning.SCORES.write_text("experiment,seed,step,return_eval\ne,0,10,1.0\n")
    assert learning.main([]) == 0
    assert trained.read_text() == "e\ne --resume\na\n" and kept == [("e", "e-1"), ("a", "a-1")]


def test_a_run_that_is_stopped_stops_the_queue(queue):
    kept, trained = queue(d=300, a=1000)
    with pytest.raises(KeyboardInterrupt):
        learning.main([])
    assert trained.read_text() == "d\n" and kept == []


def test_what_a_run_changed_about_the_task_must_be_the_experiments(run, monkeypatch):
    flags, published = learning.EXPERIMENTS[NAME]
    monkeypatch.setitem(learning.EXPERIMENTS, NAME, (f"{flags} --action-repeat 2", published))
    with pytest.raises(SystemExit, match="is not a run of crossq-hardcore"):
        learning.keep(NAME, run)


def test_the_summary_says_what_was_changed_about_the_task(monkeypatch):
    monkeypatch.setitem(learning.EXPERIMENTS, "sac-pendulum", (
        "agents/sac.py --env Pendulum-v1 --action-repeat 2 --clip-reward -1 10", "-157"))
    monkeypatch.setattr(learning, "SUMMARY", ("sac-pendulum",))
    assert ("| Pendulum-v1 `--action-repeat 2 --clip-reward -1 10` |"
            in learning.summary(learning.read()))


def test_every_experiment_can_be_parsed():
    for name in learning.EXPERIMENTS:
        if (learning.ROOT / learning.EXPERIMENTS[name][0].split()[0]).exists():
            assert learning.settings(name)[0].steps


def test_the_picture_can_be_drawn_from_what_is_committed(tmp_path):
    scores = learning.read()
    few = {name: scores[name] for name in ("sac-hopper", "crossq-hopper", "ppo-walker2d")}
    learning.draw(few, tmp_path / "curves.png")  # all take ten times as long
    assert (tmp_path / "curves.png").stat().st_size > 0
