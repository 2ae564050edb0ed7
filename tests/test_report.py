"""Statistics over seeds, the table and the learning curves."""

import io

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from rich.console import Console

from lab import report, stats
from lab.recorder import SeedRecorder

SAMPLES = [[3.0, 4.5], [1.0, 2.0, 3.0], [-5.0, 0.1, 7.0, 7.5, 20.0, -3.0, 0.0]]


@pytest.mark.parametrize("values", SAMPLES)
@pytest.mark.parametrize("confidence", [0.95, 0.5])
def test_the_interval_is_students(values, confidence):
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(confidence)
    mean, lower, upper = stats.t_interval(values, confidence)
    assert (mean, lower, upper) == pytest.approx((sum(values) / len(values), *expected))


def test_the_interval_of_1_2_3_by_hand():
    """Standard error 1 / sqrt(3); the table's t for two degrees of freedom is 4.303."""
    assert stats.t_interval([1, 2, 3]) == pytest.approx((2, 2 - 2.484, 2 + 2.484), abs=1e-3)


def test_a_single_value_has_a_mean_and_no_interval():
    assert stats.t_interval([4.0]) == pytest.approx((4.0, np.nan, np.nan), nan_ok=True)
    assert np.isnan(stats.t_interval([])).all() and np.isnan(stats.iqm([]))


@pytest.mark.parametrize("values, expected", [
    ([7.0], 7.0), ([1.0, 3.0], 2.0), ([100.0, 1.0, -100.0, 2.0], 1.5),
    ([0.0, 1.0, 2.0, 3.0, 1000.0], 2.0),
    ([-90.0, -80.0, 1.0, 2.0, 3.0, 4.0, 500.0, 600.0], 2.5)])
def test_iqm_is_the_mean_of_the_middle_half(values, expected):
    assert stats.iqm(values) == pytest.approx(expected)


def test_curves_and_final_returns_are_read_from_the_rows(tmp_path):
    for seed in (0, 1):
        recorder = SeedRecorder(tmp_path / f"seed_{seed}", 0)
        for step in (10, 20, 30):
            evaluation = {"return/eval": float(step + seed)} if step < 30 and seed == 0 else {}
            recorder.write({"step": step, "loss/qf": 1.0} | evaluation)
        recorder.close({}, None)
    curves = report.read_curves(tmp_path, [0, 1, 2], "return/eval")
    assert curves == {0: [(10, 10.0), (20, 20.0)], 1: [], 2: []}
    assert report.final_returns(tmp_path, [0, 1, 2], 20) == {0: 20.0}
    assert report.final_returns(tmp_path, [0, 1, 2], 30) == {}, "it did not get as far"


def test_the_band_holds_the_steps_of_every_seed_that_got_as_far():
    """A seed that failed at 20 leaves the others their 30; 25 is one seed's alone."""
    curves = {0: [(10, 1.0), (20, 2.0), (25, 5.0), (30, 9.0)], 1: [(10, 3.0), (20, 6.0)], 2: [],
              3: [(10, 2.0), (20, 4.0), (30, 7.0)]}
    band = report.band(curves)
    assert [step for step, *_ in band] == [10, 20, 30]
    expected = [(1.0, 3.0, 2.0), (2.0, 6.0, 4.0), (9.0, 7.0)]
    for (_, *interval), values in zip(band, expected, strict=True):
        assert interval == pytest.approx(stats.t_interval(values))
    assert report.band({0: [], 1: []}) == []


def test_the_table_shows_each_environment_with_its_interval_and_seeds():
    returns = {"HalfCheetah-v5": {10: 3.0, 2: 1.0, 3: 2.0}, "Pendulum-v1": {0: -150.26},
               "Ant-v5": {}}
    console = Console(file=io.StringIO(), width=200)
    console.print(report.table(returns, "a title"))
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


def draw(path, curves):
    report.draw_learning_curves(path, curves, "a title")
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
