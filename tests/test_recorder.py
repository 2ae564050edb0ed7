"""The files of a run."""

import json
import math
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lab import stats
from lab.errors import UserError
from lab.training import recorder
from lab.training.recorder import AllSeeds, SeedRecorder, create_run_folder, read_metrics


@pytest.fixture
def stopped_clock(monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "20260102-030405")


@pytest.fixture
def agent_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("class Agent: ...\n")
    return path


def read_board(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    return accumulator.Reload()


def scalars(folder):
    """tag -> [(step, value)], sorted by step, as TensorBoard shows them."""
    board = read_board(folder)
    return {tag: sorted((e.step, e.value) for e in board.Scalars(tag))
            for tag in board.Tags()["scalars"]}


def rows(path):
    return [{k: v for k, v in row.items() if k != "wall_time"} for row in read_metrics(path)]


def write_rows(folder, rows, start=0):
    writer = SeedRecorder(folder, start)
    for row in rows:
        writer.write(row)
    writer.close({}, None)


@pytest.mark.parametrize("name, folder", [
    ("sac", "sac"), ("my first run!", "my_first_run"), ("../../etc/passwd", "etc_passwd"),
    ("a/b\\c:d", "a_b_c_d"), ("..", "run"), ("", "run"), ("Läufe-1.5", "Läufe-1.5")])
def test_a_runs_name_becomes_a_safe_folder(tmp_path, agent_file, stopped_clock, name, folder):
    made = create_run_folder(tmp_path / "runs", name, agent_file, {})
    assert made == tmp_path / "runs" / f"{folder}-20260102-030405" and made.is_dir()


def test_runs_of_one_second_get_a_folder_each(tmp_path, agent_file, stopped_clock):
    made = [create_run_folder(tmp_path / "runs", "sac", agent_file, {"run": k}) for k in range(3)]
    stem = "sac-20260102-030405"
    assert [folder.name for folder in made] == [stem, stem + "-2", stem + "-3"]
    assert [json.loads((f / "config.json").read_text())["run"] for f in made] == [0, 1, 2]


def test_a_run_never_writes_into_a_folder_that_stood_there(tmp_path, agent_file, stopped_clock):
    for clash in range(1, 1000):
        (tmp_path / ("sac-20260102-030405" + (f"-{clash}" if clash > 1 else ""))).mkdir()
    folder = create_run_folder(tmp_path, "sac", agent_file, {})
    assert [other for other in tmp_path.glob("sac-*") if any(other.iterdir())] == [folder]


def test_a_run_folder_holds_settings_versions_and_the_agents_source(tmp_path, agent_file):
    words = {"command": "learn_simple.py agents/sac.py --env X-v1", "gamma": 0.97, "seeds": [0, 1]}
    folder = create_run_folder(tmp_path / "runs", "sac", agent_file, words)
    assert json.loads((folder / "config.json").read_text()) == words
    versions = json.loads((folder / "versions.json").read_text())
    assert {"python", "torch", "gymnasium", "numpy", "mujoco", "processor"} <= set(versions)
    assert (folder / "mine.py").read_text() == agent_file.read_text()


def test_other_versions_on_resuming_are_told_once_and_kept(tmp_path, agent_file):
    folder = create_run_folder(tmp_path, "sac", agent_file, {})
    assert recorder.note_versions(folder) == []
    before = json.loads((folder / "versions.json").read_text())
    (folder / "versions.json").write_text(json.dumps(before | {"torch": "0.1"}))
    assert recorder.note_versions(folder) == [f"torch {before['torch']} instead of 0.1"]
    content = json.loads((folder / "versions.json").read_text())
    assert content == before | {"torch": "0.1", "resumed": [before]}
    assert recorder.note_versions(folder) == []
    (folder / "versions.json").unlink()
    assert recorder.note_versions(folder) == []


def test_versions_are_those_of_the_imported_packages():
    import gymnasium
    import torch

    versions = recorder.versions()
    assert torch.__version__.startswith(versions["torch"].split("+")[0])
    assert versions["gymnasium"] == gymnasium.__version__


@pytest.mark.parametrize("below", ["", "deeper/runs"])
def test_an_unwritable_runs_folder_is_named_in_one_line(tmp_path, agent_file, below):
    (tmp_path / "runs").write_text("a file, where a folder should be")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"cannot write .*runs.*--runs$") as caught:
        create_run_folder(tmp_path / "runs" / below, "sac", agent_file, {})
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_environments_id_is_one_folder(tmp_path):
    folder = recorder.group_folder(tmp_path, "lab-tests/Target-v0", "sac")
    assert folder == tmp_path / "lab-tests_Target-v0" / "sac"


def test_rows_are_read_back_as_written(tmp_path):
    written = [{"step": 10, "loss/qf": 0.1}, {"step": 20, "loss/qf": 1e-30, "return/eval": -3.5}]
    write_rows(tmp_path / "seed_0", written)
    path = tmp_path / "seed_0" / "metrics.jsonl"
    assert rows(path) == written
    assert all(row["wall_time"] > 0 for row in read_metrics(path))
    assert read_metrics(tmp_path / "missing.jsonl") == []


def test_a_torn_last_line_is_no_row(tmp_path):
    written = [{"step": step, "loss/qf": step / 7} for step in (10, 20)]
    write_rows(tmp_path, written)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text()
    for cut in range(len(whole) - 5, len(whole)):
        path.write_text(whole[:cut])
        assert rows(path) == written[:1] or cut == len(whole) - 1
    path.write_text(whole + whole.splitlines()[0][:20])
    write_rows(tmp_path, [{"step": 30, "loss/qf": 1.0}], start=20)
    assert [row["step"] for row in read_metrics(path)] == [10, 20, 30]


def test_resuming_drops_what_was_written_after_the_checkpoint(tmp_path):
    write_rows(tmp_path, [{"step": step, "loss/qf": float(step)} for step in (10, 20, 30, 40)])
    write_rows(tmp_path, [{"step": step, "loss/qf": -float(step)} for step in (30, 40)], start=25)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20, 30, 40]
    assert scalars(tmp_path) == {"loss/qf": [(10, 10.0), (20, 20.0), (30, -30.0), (40, -40.0)]}


def test_a_checkpoint_at_the_step_of_a_row_keeps_it(tmp_path):
    write_rows(tmp_path, [{"step": step, "loss/qf": float(step)} for step in (10, 20, 30)])
    write_rows(tmp_path, [{"step": 30, "loss/qf": 0.0}], start=20)
    assert scalars(tmp_path) == {"loss/qf": [(10, 10.0), (20, 20.0), (30, 0.0)]}


def test_a_board_is_written_where_it_was_begun_whatever_the_working_directory(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    board = recorder.tensorboard(Path("board"))
    monkeypatch.chdir("/")
    board.add_scalar("return", 1.0, 0)
    board.close()
    (file,) = (tmp_path / "board").iterdir()
    assert b"return" in file.read_bytes()


def test_tensorboard_shows_what_the_rows_say(tmp_path):
    write_rows(tmp_path, [{"step": step, "loss/qf": step / 7} | (
        {"return/eval": -step / 3} if step % 100 == 0 else {}) for step in range(10, 1000, 10)])
    board = scalars(tmp_path)
    assert set(board) == {"loss/qf", "return/eval"}
    for tag, points in board.items():
        expected = {row["step"]: row[tag] for row in rows(tmp_path / "metrics.jsonl")
                    if tag in row}
        assert [step for step, _ in points] == list(expected)
        assert dict(points) == pytest.approx(expected, rel=1e-6)


def test_settings_are_set_against_the_final_return(tmp_path):
    writer = SeedRecorder(tmp_path, 0)
    writer.write({"step": 10, "return/eval": 3.0})
    writer.close({"gamma": 0.97, "autotune": True, "hidden": (1, 2), "env": "X-v1"}, 3.0)
    assert scalars(tmp_path)["hparam/return_eval"][-1][1] == 3.0
    plugin = read_board(tmp_path).summary_metadata
    content = plugin["_hparams_/session_start_info"].plugin_data.content
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["gamma"].number_value == 0.97 and hparams["autotune"].number_value == 1
    assert hparams["hidden"].string_value == "(1, 2)" and hparams["env"].string_value == "X-v1"


def test_a_seed_without_a_final_return_has_no_hparams_row(tmp_path):
    write_rows(tmp_path, [{"step": 10, "return/eval": 3.0}])
    assert not any("hparam" in tag for tag in read_board(tmp_path).summary_metadata)


def test_a_full_disk_is_reported_once_and_ends_nothing(tmp_path, capsys):
    writer = SeedRecorder(tmp_path, 0)
    writer.write({"step": 10, "loss/qf": 1.0})
    writer.file.close()
    writer.file = open("/dev/full", "w")  # noqa: SIM115
    for step in (20, 30):
        writer.write({"step": step, "loss/qf": 1.0})
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and "logging failed, training continues: " in errors[0]
    writer.close({}, None)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10]


def test_a_full_disk_at_a_flush_ends_nothing_either(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    writer, band = SeedRecorder(tmp_path / "seed_0", 0), AllSeeds(tmp_path, [0])
    writer.write({"step": 10, "return/eval": 1.0})
    monkeypatch.setattr(writer.board, "flush", full)
    monkeypatch.setattr(band.board, "add_scalar", full)
    for _ in range(2):
        writer.flush()
        band.refresh()
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == [
        "logging failed, training continues", "all_seeds not written"]


def test_a_command_that_is_refused_leaves_the_board_of_the_run(tmp_path):
    write_seeds(tmp_path)
    AllSeeds(tmp_path, [0, 1, 2]).refresh()
    (board,) = (tmp_path / "all_seeds").iterdir()
    AllSeeds(tmp_path, [0, 1, 2])  # another process has the lock: no row comes
    assert board.exists()


RETURNS = {0: [1.0, 2.0, 3.0], 1: [3.0, 5.0, 6.5], 2: [8.0, 5.0, -1.0]}


def write_seeds(folder, seeds=(0, 1, 2), steps=(10, 20, 30), tag="return/eval"):
    for seed in seeds:
        write_rows(folder / f"seed_{seed}", [
            {"step": step, tag: value} for step, value in zip(steps, RETURNS[seed], strict=False)])


@pytest.mark.parametrize("tag", ["return/train", "return/eval"])
def test_all_seeds_show_mean_and_interval(tmp_path, tag):
    write_seeds(tmp_path, tag=tag)
    AllSeeds(tmp_path, [0, 1, 2]).refresh()
    board = scalars(tmp_path / "all_seeds")
    assert set(board) == {f"{tag}_{part}" for part in ("mean", "lower", "upper")}
    columns = zip(*RETURNS.values(), strict=True)
    intervals = {10 * (k + 1): stats.t_interval(column) for k, column in enumerate(columns)}
    for place, part in enumerate(("mean", "lower", "upper")):
        expected = {step: interval[place] for step, interval in intervals.items()}
        assert dict(board[f"{tag}_{part}"]) == pytest.approx(expected, rel=1e-6)


def test_the_band_of_one_seed_is_its_curve(tmp_path):
    write_seeds(tmp_path, [1])
    AllSeeds(tmp_path, [1]).refresh()
    board = scalars(tmp_path / "all_seeds")
    for part in ("mean", "lower", "upper"):
        assert [value for _, value in board[f"return/eval_{part}"]] == RETURNS[1]


def test_all_seeds_have_a_margin_chart_of_each_return(tmp_path):
    write_seeds(tmp_path, [0, 1])
    AllSeeds(tmp_path, [0, 1]).refresh()
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    board = read_board(tmp_path / "all_seeds")
    content = board.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    charts = {chart.title: chart.margin.series[0]
              for category in Layout.FromString(content).category for chart in category.chart}
    assert set(charts) == {"return/train", "return/eval"}
    for tag, series in charts.items():
        assert (series.value, series.lower, series.upper) == (
            f"{tag}_mean", f"{tag}_lower", f"{tag}_upper")


def test_a_step_is_shown_once_and_when_every_seed_has_it(tmp_path):
    def steps():
        return [step for step, _ in scalars(tmp_path / "all_seeds").get("return/eval_mean", [])]

    band = AllSeeds(tmp_path, [0, 1, 2])
    write_seeds(tmp_path, [0, 1])
    band.refresh()
    assert not (tmp_path / "all_seeds").exists()
    write_seeds(tmp_path, [2], steps=(10, 20))
    band.refresh()
    band.refresh()
    assert steps() == [10, 20]
    write_seeds(tmp_path, [2])
    band.refresh()
    assert steps() == [10, 20, 30]


def test_the_band_is_made_anew_on_resuming(tmp_path):
    write_seeds(tmp_path)
    for _ in range(2):
        AllSeeds(tmp_path, [0, 1, 2]).refresh()
    assert [s for s, _ in scalars(tmp_path / "all_seeds")["return/eval_mean"]] == [10, 20, 30]


def test_a_failed_seed_does_not_end_the_band_of_the_others(tmp_path):
    band = AllSeeds(tmp_path, [0, 1, 2])
    write_seeds(tmp_path, [0, 1])
    write_seeds(tmp_path, [2], steps=(10,))
    band.alive.discard(2)
    band.refresh()
    means = scalars(tmp_path / "all_seeds")["return/eval_mean"]
    assert means == [(10, 2.0), (20, 3.5), (30, 4.75)]


def test_a_band_without_seeds_leaves_the_board_of_the_run(tmp_path):
    """All of them are refused, since another process trains them."""
    write_seeds(tmp_path)
    AllSeeds(tmp_path, [0, 1, 2]).refresh()
    (board,) = (tmp_path / "all_seeds").iterdir()
    band = AllSeeds(tmp_path, [0, 1, 2])
    band.alive.clear()
    band.refresh()
    assert board.exists()


def test_what_json_does_not_have_becomes_null():
    content = {"high": (math.inf, 1.0), "mean": {"return": math.nan, "n": 3, "name": "x"}}
    assert recorder.finite(content) == {
        "high": [None, 1.0], "mean": {"return": None, "n": 3, "name": "x"}}
