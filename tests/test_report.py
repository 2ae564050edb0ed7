"""The table and the learning curves of a run, and the report on many."""

import base64
import csv
import html.parser
import io
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lab import stats
from lab.report import __main__ as report
from lab.report import compare, curves, figures, runs
from lab.report import warnings as report_warnings
from lab.training.recorder import SeedRecorder
from tests.test_results import write_run


def test_curves_and_final_returns_are_read_from_the_rows(tmp_path):
    for seed in (0, 1):
        recorder = SeedRecorder(tmp_path / f"seed_{seed}", 0)
        for step in (10, 20, 30):
            evaluation = {"return/eval": float(step + seed)} if step < 30 and seed == 0 else {}
            recorder.write({"step": step, "loss/qf": 1.0} | evaluation)
        recorder.close({}, None)
    found = curves.read_curves(tmp_path, [0, 1, 2], "return/eval")
    assert found == {0: [(10, 10.0), (20, 20.0)], 1: [], 2: []}
    assert curves.final_returns(tmp_path, [0, 1, 2], 20) == {0: 20.0}
    assert curves.final_returns(tmp_path, [0, 1, 2], 30) == {}, "it did not get as far"


def test_the_band_holds_the_steps_of_every_seed_that_got_as_far():
    """A seed that failed at 20 leaves the others their 30; 25 is one seed's alone."""
    returns = {0: [(10, 1.0), (20, 2.0), (25, 5.0), (30, 9.0)], 1: [(10, 3.0), (20, 6.0)], 2: [],
               3: [(10, 2.0), (20, 4.0), (30, 7.0)]}
    band = curves.band(returns)
    assert [step for step, *_ in band] == [10, 20, 30]
    expected = [(1.0, 3.0, 2.0), (2.0, 6.0, 4.0), (9.0, 7.0)]
    for (_, *interval), values in zip(band, expected, strict=True):
        assert interval == pytest.approx(stats.t_interval(values))
    assert curves.band({0: [], 1: []}) == []


def test_the_table_shows_each_environment_with_its_interval_and_seeds():
    returns = {"HalfCheetah-v5": {10: 3.0, 2: 1.0, 3: 2.0}, "Pendulum-v1": {0: -150.26},
               "Ant-v5": {}}
    console = Console(file=io.StringIO(), width=200)
    console.print(curves.table(returns, "a title"))
    title, _, heading, _, *lines = console.file.getvalue().splitlines()
    assert title.strip() == "a title"
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")]
             for line in (heading, *lines)]
    assert cells[:4] == [
        ["environment", "n", "mean", "95% t interval", "IQM", "each seed"],
        ["HalfCheetah-v5", "3", "2.0", "-0.5 to 4.5", "2.0", "2:1.0 3:2.0 10:3.0"],
        ["Pendulum-v1", "1", "-150.3", "needs 2 seeds", "-150.3", "0:-150.3"],
        ["Ant-v5", "0", "nan", "needs 2 seeds", "nan", ""]]


def curve(seed, steps=(10, 20, 30)):
    return [(step, float(step * (seed + 1))) for step in steps]


def draw(path, drawn):
    curves.draw_learning_curves(path, drawn, "a title")
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def drawn(image):
    """How many pixels are bluish: curves and bands, but not frames and letters."""
    return int((image[..., 2] - image[..., 0] > 10).sum())


def test_learning_curves_are_drawn_with_a_panel_for_each_environment(tmp_path):
    one = draw(tmp_path / "1.png", {"A-v0": {0: curve(0), 1: curve(1)}})
    two = draw(tmp_path / "2.png", {e: {0: curve(0), 1: curve(1)} for e in ("A-v0", "B-v0")})
    assert two.shape == (one.shape[0], 2 * one.shape[1], 3)
    half = one.shape[1]
    assert min(drawn(two[:, :half]), drawn(two[:, half:])) > 0.5 * drawn(one) > 1000


def test_the_band_is_drawn_with_two_seeds_and_not_with_one(tmp_path):
    alone = draw(tmp_path / "1.png", {"A-v0": {0: curve(0)}})
    pair = draw(tmp_path / "2.png", {"A-v0": {0: curve(0), 1: curve(1)}})
    assert 300 < drawn(alone) < 0.1 * drawn(pair)


def test_a_seed_without_a_curve_leaves_the_others_as_they_are(tmp_path):
    pair = draw(tmp_path / "1.png", {"A-v0": {0: curve(0), 1: curve(1)}})
    with_empty = draw(tmp_path / "2.png", {"A-v0": {0: curve(0), 1: curve(1), 2: []}})
    body = slice(pair.shape[0] // 4, None)  # below the title, which counts the seeds
    assert np.array_equal(pair[body], with_empty[body])
    assert drawn(draw(tmp_path / "3.png", {"A-v0": {0: []}})) == 0


def test_a_seed_that_ends_early_shortens_the_band(tmp_path):
    early = draw(tmp_path / "1.png", {"A-v0": {0: curve(0), 1: curve(1, (10, 20))}})
    whole = draw(tmp_path / "2.png", {"A-v0": {0: curve(0), 1: curve(1)}})
    late = slice(int(0.7 * whole.shape[1]), None)
    assert 50 < drawn(early[:, late]) < 0.1 * drawn(whole[:, late])


def test_curves_without_a_common_step_are_drawn(tmp_path):
    draw(tmp_path / "1.png", {"A-v0": {0: curve(0, (10, 30)), 1: curve(1, (20, 40))}})


# Of many runs: python -m lab.report


def make_report(tmp_path, *arguments):
    return report.main([*map(str, arguments), "--out", str(tmp_path / "out")])


@pytest.fixture
def two_runs(tmp_path):
    """Returns by hand. HalfCheetah-v4 has published points at 100 000 steps, v5 none."""
    cheetah = {n: [1000.0 + n, 2000.0 + n, 3000.0 + 10 * n * n] for n in range(5)}
    hopper = {n: [100.0, 200.0, 300.0 + n] for n in range(5)}
    a = write_run(tmp_path / "a", {"HalfCheetah-v4": cheetah, "Hopper-v5": hopper})
    b = write_run(tmp_path / "b", {"HalfCheetah-v4": hopper, "Walker2d-v5": hopper}, "crossq")
    for run in (a, b):
        for path in run.glob("*/*/*/metrics.jsonl"):
            path.write_text(path.read_text().replace('"step": 30', '"step": 100000'))
    return a, b


def test_the_report_says_what_the_runs_reached(two_runs, tmp_path, capsys):
    assert make_report(tmp_path, *two_runs, "--against", "b") == 0
    markdown = (tmp_path / "out/report.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in markdown.splitlines() if line.startswith("| ")]
    mean, lower, upper = stats.t_interval([3000, 3010, 3040, 3090, 3160])
    assert rows[2] == ["HalfCheetah-v4", "a", "5", "100,000", "120 s", f"{mean:,.0f}",
                       f"{lower:,.0f} to {upper:,.0f}", "3,040"]
    assert ["HalfCheetah-v4", "a",
            "0: 3,000; 1: 3,010; 2: 3,040; 3: 3,090; 4: 3,160"] in rows
    assert ["a", "HalfCheetah-v4", "5 and 5", "1.00", "1.00 to 1.00"] in rows
    assert ["HalfCheetah-v4", "a", "5", "100,000 (5/5)", "- (0/5)", "- (0/5)", "- (0/5)"] in rows
    beside = [row for row in rows if "[1]" in row and len(row) == 9]
    assert [row[:5] + row[5:7] for row in beside] == [
        ["HalfCheetah-v4", "a", "100,000", "6,156", "[1]", "100,000", "3,060"],
        ["HalfCheetah-v4", "b", "100,000", "8,112", "[1]", "100,000", "302.0"]]
    assert "(return - random) / (reference - random)" in markdown
    assert "Left out: Hopper-v5 (not in b); Walker2d-v5 (not in a)." in markdown
    assert "Without a reference: Walker2d-v5." in markdown and "Warning" not in markdown
    for picture in re.findall(r"\]\((.*?)\)", markdown):
        with Image.open(tmp_path / "out" / picture) as image:
            assert image.format == "PNG"
    shown = capsys.readouterr().out
    assert f"{lower:,.0f} to {upper:,.0f}" in shown and str(tmp_path / "out/report.html") in shown


class Page(html.parser.HTMLParser):
    """What a page asks for, and what it says."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes
                       if name in ("src", "href", "srcset", "data", "poster")]

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_no_other_file(two_runs, tmp_path):
    assert make_report(tmp_path, *two_runs, "--against", two_runs[1]) == 0
    text = (tmp_path / "out/report.html").read_text()
    page = Page(text)
    pictures = sorted((tmp_path / "out").glob("*.png"))
    assert len(page.links) == len(pictures) == 5, "three environments, all of them, against b"
    head = "data:image/png;base64,"
    assert all(link.startswith(head) for link in page.links)
    assert sorted(base64.b64decode(link[len(head):]) for link in page.links) == sorted(
        path.read_bytes() for path in pictures)
    assert not page.tags & {"link", "script", "iframe", "object"}
    assert "url(" not in text and "@import" not in text and "://" not in text


def test_names_are_text_in_every_form(tmp_path, capsys):
    run = write_run(tmp_path / "a", {"Hopper-v5": {n: [1.0, 2.0, 3.0] for n in range(2)}})
    name = "[red]<b>|&"
    assert make_report(tmp_path, f"{name}={run}") == 0
    assert name in capsys.readouterr().out
    page = Page((tmp_path / "out/report.html").read_text())
    assert name in page.text and "b" not in page.tags
    assert r"| [red]<b>\|& |" in (tmp_path / "out/report.md").read_text()


def test_an_unfinished_run_of_one_seed_is_reported(tmp_path, capsys):
    run = write_run(tmp_path / "a", {"Hopper-v4": {0: [1.0]}, "Ant-v4": {0: []}}, steps=1000)
    assert make_report(tmp_path, run) == 0
    shown = capsys.readouterr().out
    assert "warning: a in Hopper-v4 is unfinished: 15 of 1,000 steps, shown at 10" in shown
    assert "warning: a in Ant-v4 is unfinished: 0 of 1,000 steps, and no evaluation yet" in shown
    assert "10 of 1,000" in shown and "needs 2 seeds" in shown
    assert "Ant-v4 (no evaluations at equal steps)" in " ".join(shown.split())  # any width


def test_bad_input_is_told_in_a_line(tmp_path, capsys):
    run = write_run(tmp_path / "a", {"Hopper-v4": {0: [1.0]}})
    broken = write_run(tmp_path / "broken", {"Hopper-v4": {0: [1.0]}})
    (broken / "Hopper-v4/sac/seed_0/metrics.jsonl").write_text("nothing\n")
    settings = write_run(tmp_path / "settings", {"Hopper-v4": {0: [1.0]}})
    (settings / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for arguments, reason in {
            (tmp_path / "none",): f"no such run folder: {tmp_path / 'none'}",
            (tmp_path / "empty",): "has no metrics",
            (run, "--against", "c"): "'c' is not one of the runs: a",
            (run, run): "two runs are called 'a'",
            (broken,): "metrics.jsonl, line 1, is not a row of metrics",
            (settings,): "config.json is not a run's config.json",
            (): "the following arguments are required",
            (run, "--inn"): "unrecognized arguments: --inn",
            (run, "--out", run / "sac.py"): "cannot write to"}.items():
        assert report.main(list(map(str, arguments))) == 2, arguments
        out, err = capsys.readouterr()
        assert not out and err.startswith("error: ") and err.count("\n") == 1, err
        assert reason in err


def test_legends_have_every_method_with_the_seeds_that_were_evaluated(tmp_path, monkeypatch):
    """matplotlib leaves out labels that begin with _. Seed 2 has no evaluation."""
    legends = []

    def savefig(figure, *_, **__):
        of_axes = [axis.get_legend() for axis in figure.axes]
        legends.extend([text.get_text().strip() for text in legend.get_texts()]
                       for legend in [*figure.legends, *of_axes] if legend)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    returns = {"Hopper-v4": {n: [1.0, 2.0, 3.0] if n < 2 else [] for n in range(3)}}
    a, b = (write_run(tmp_path / name, returns) for name in "ab")
    row = json.dumps({"step": 30, "wall_time": 1e9}) + "\n"
    (a / "Hopper-v4/sac/seed_2/metrics.jsonl").write_text(row)
    methods = runs.load([f"_tau={a}", f"base={b}"])
    colors = {"_tau": figures.COLORS[0], "base": figures.COLORS[1]}
    figures.learning_curves(tmp_path / "1.png", [m.results["Hopper-v4"] for m in methods], colors)
    shared = compare.shared(methods, [])
    figures.across_environments(tmp_path / "2.png", compare.aggregates(methods, shared), colors)
    assert legends == [["_tau (n = 2)", "base (n = 2)"], ["_tau", "base"]]
    assert "seeds 2 (without an evaluation)" in " ".join(report_warnings.find(methods))
    assert len(set(figures.COLORS)) == 20


OPTIONS = {"agent": "sac.py", "env": ["Hopper-v4"], "steps": 10}
EVALUATION = {"environment": "Hopper-v4", "which": "last", "episodes_per_seed": 5,
              "failed_seeds": [], "mean": {"return": 1.0}, "return_interval": None,
              "seeds": {"0": {"step": 10, "return": 1.0}}}


@pytest.mark.parametrize("file, content", [
    ("config.json", [5, {"options": 5, "config": {}}, {"options": OPTIONS, "config": 5}] + [
        {"options": OPTIONS | {name: value}, "config": {}} for name, value in (
            ("steps", None), ("agent", None), ("env", "Hopper-v4"), ("env", [5]), ("config", 5),
            ("clip_reward", [1.0]), ("seeds", "2"), ("first_seed", None), ("extended", 5),
            ("env_kwargs", [1]), ("failure_below", "x"), ("init_from", 5))]),
    ("Hopper-v4/sac/stopped.json", [5, {}, {"step": 10}, {"step": "x", "reason": "y"}]),
    ("Hopper-v4/sac/evaluation_last.json", [5, EVALUATION | {"seeds": {}}] + [
        EVALUATION | {name: value} for name, value in (
            ("environment", None), ("seeds", {"0": {}}), ("seeds", {"0": {"step": None}}),
            ("mean", {}), ("mean", {"return": 1.0, "terminated": None}), ("which", 5),
            ("return_interval", [1.0]), ("failed_seeds", 5), ("episodes_per_seed", None))]),
    ("Hopper-v4/sac/seed_0/metrics.jsonl", [
        {"step": math.inf, "wall_time": 1.0}, {"step": 1, "wall_time": math.nan}])])
def test_a_damaged_file_is_told_in_a_line(tmp_path, capsys, file, content):
    run = write_run(tmp_path / "a", {"Hopper-v4": {0: [1.0]}})
    (run / "config.json").write_text(json.dumps({"options": OPTIONS, "config": {}}))
    assert make_report(tmp_path, run) == 0
    for each in content:
        (run / file).write_text(json.dumps(each) + "\n")
        capsys.readouterr()
        assert make_report(tmp_path, run) == 2, each
        out, err = capsys.readouterr()
        assert not out and str(run / file) in err and err.count("\n") == 1, err
    (run / file).write_text('{"ste')
    assert make_report(tmp_path, run) == (0 if file.endswith("jsonl") else 2), "torn"


def test_an_evaluation_and_a_config_need_no_more_than_the_report_reads(tmp_path):
    run = write_run(tmp_path / "a", {"Hopper-v4": {0: [1.0]}}, tuned=True)
    content = {"options": {"agent": "agents/sac.py", "tuned": True}, "config": {}}
    (run / "config.json").write_text(json.dumps(content))
    (run / "Hopper-v4/sac/evaluation_last.json").write_text(json.dumps(EVALUATION))
    assert make_report(tmp_path, run) == 0
    assert "Fresh episodes" in (tmp_path / "out/report.md").read_text()


def test_it_is_a_command(tmp_path):
    run = write_run(tmp_path / "a", {"Hopper-v4": {0: [1.0]}})
    argv = [sys.executable, "-m", "lab.report", run, "--out", tmp_path / "out"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Report on a\n"), done.stderr


def test_all_metrics_are_exported_as_one_value_a_row(tmp_path):
    run = tmp_path / "a-20260101-000000"
    for seed in (0, 1):
        recorder = SeedRecorder(run / f"Pendulum-v1/sac/seed_{seed}", 0)
        recorder.write({"step": 10, "return/eval": 1.5 + seed})
        recorder.write({"step": 20, "return/eval": 2.5, "loss/qf": 0.1})
        recorder.close({}, None)
    theirs = tmp_path / "theirs" / run.name
    shutil.copytree(run, theirs)
    assert make_report(tmp_path, f"mine={run}", f"theirs={theirs}", "--export", "csv") == 0
    with (tmp_path / "out/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    where = {"method": "mine", "run": run.name, "env": "Pendulum-v1", "agent": "sac", "seed": "1"}
    of_one = [row for row in rows if row["seed"] == "1" and row["method"] == "mine"
              and row["tag"] != "wall_time"]
    assert of_one == [where | {"step": step, "tag": tag, "value": value} for step, tag, value in (
        ("10", "return/eval", "2.5"), ("20", "return/eval", "2.5"), ("20", "loss/qf", "0.1"))]
    assert sum(row["tag"] == "wall_time" for row in rows) == 8
    assert {row["method"] for row in rows} == {"mine", "theirs"}, "in folders of the same name"


def test_a_name_may_have_dollars(tmp_path):
    """Which matplotlib would read as mathematics."""
    path = tmp_path / "plot.png"
    curves.draw_learning_curves(path, {"lr_$HOME_$USER": {0: [(1, 2.0)]}}, "lr_$HOME_$USER")
    assert path.exists()


def test_a_long_title_fits_into_the_picture(tmp_path, monkeypatch):
    boxes = []

    def savefig(figure, *_, **__):
        figure.canvas.draw()
        boxes.extend((figure.get_suptitle(), figure._suptitle.get_window_extent(), figure.bbox))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    title = "testing X " + "with another feature " * 6 + "-" * 100
    curves.draw_learning_curves(tmp_path / "plot.png", {"A-v0": {0: curve(0)}}, title)
    text, title_box, picture = boxes
    assert "thin: seeds" in text and text.startswith("testing X with")
    assert picture.x0 <= title_box.x0 and title_box.x1 <= picture.x1
