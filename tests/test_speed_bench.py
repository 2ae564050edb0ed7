"""bench/speed.py: a measurement that was cut goes on with the repeats that are left."""

import argparse
import json

import pytest

from bench import speed

SETTING = {"command": "python bench/speed.py", "processor": "one", "versions": {"torch": "2.13"}}


@pytest.fixture
def result():
    rows = [{"case": ["cem-2", "lab", "4", mode], "steps_per_s": [180.0, 190.0]}
            for mode in ("fp32-eager", "bf16-compiled")]
    return json.loads(json.dumps(SETTING | {"repeats": 2, "rows": rows}))


@pytest.fixture
def options():
    return argparse.Namespace(algorithms=["cem-2"], seeds=None, peers=None, checkout=None,
                              modes=["fp32-eager", "bf16-compiled"], repeats=3)


def test_a_cut_measurement_keeps_its_repeats(result, options):
    rows = speed.begun_rows(result, options, SETTING)
    assert list(rows) == speed.cases(options) and speed.repeats_done(rows) == 2


def test_a_finished_one_or_one_made_otherwise_begins_anew(result, options):
    assert speed.begun_rows(result, options, SETTING | {"versions": {"torch": "2.14"}}) == {}
    options.repeats = 2
    assert speed.begun_rows(result, options, SETTING) == {}
