"""--tuned, and the settings that ship with it."""

import dataclasses
import json
import re
import shutil

import pytest

from bench import tuned
from lab.agent import load_agent
from lab.command_line import parse_args
from lab.errors import UserError
from lab.options import Simple, Tune
from lab.tuning import space

LANDER = ["agents/ppo.py", "--env", "LunarLanderContinuous-v3"]
SHIPPED = [(path.stem, agent, entry) for path in sorted(tuned.TUNED.glob("*.json"))
           for agent, entry in json.loads(path.read_text()).items()]


@pytest.mark.parametrize("env, agent, entry", SHIPPED)
def test_what_ships_is_taken_and_comes_from_a_result_that_beats_the_defaults(env, agent, entry):
    argv = [f"agents/{agent}.py", "--env", env]
    options, config = parse_args([*argv, "--tuned"])
    both = json.loads(json.dumps(vars(options) | config, default=str))  # tuples are lists there
    assert both == both | entry["settings"] and config != parse_args(argv)[1]
    path = tuned.ROOT / entry["source"]
    source = json.loads((path / ("best.json" if "tuned/" in entry["source"] else "config.json"))
                        .read_text())
    in_json = json.loads(json.dumps(config))
    assert in_json == in_json | source["config"]
    (row,) = (row for row in tuned.rows() if f"bench/results/{row.source}" == entry["source"])
    assert (row.agent, row.env) == (agent, env) and row.improvement > tuned.LEAST


def test_what_ships_follows_from_the_results(tmp_path, monkeypatch):
    committed = {path.name: path.read_text() for path in tuned.TUNED.iterdir()}
    monkeypatch.setattr(tuned, "TUNED", tmp_path)
    tuned.ship(tuned.rows())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == committed


def test_flags_override_what_is_tuned():
    _, config = parse_args(["--gamma", "0.5", "--tuned", *LANDER, "--num-steps=64"])
    assert (config["gamma"], config["num_steps"], config["ent_coef"]) == (0.5, 64, 0.01)
    assert parse_args([*LANDER, "--no-tuned"])[1] == parse_args(LANDER)[1]


def test_a_config_json_that_was_tuned_keeps_the_settings_of_its_run(tmp_path):
    options, config = parse_args([*LANDER, "--tuned"])
    assert options.tuned
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"options": dataclasses.asdict(options) | {"runs": "runs"},
                                "config": config | {"gamma": 0.5}}))
    assert parse_args(["--config", str(path)])[1] == config | {"gamma": 0.5}


@pytest.mark.parametrize("argv, words", [
    ([*LANDER, "Pendulum-v1", "--tuned"], r"--tuned takes one --env, since each"),
    (["agents/ppo.py", "--tuned"], r"Pendulum-v1.json has no settings of ppo; leave it out, or "
     r"take .*ppo on LunarLanderContinuous-v3"),
    (["--tuned", "--config", "bench/results/ppo-lunarlander/config.json"],
     r"--tuned and --config bench/\S+ both have settings: leave one out"),
    (["agents/bro.py", *LANDER[1:], "--tuned"], r"v3.json has no settings of bro; leave it"),
    (["{folder}/mine.py", "--tuned"], r"it out, or take an agent with a folder tuned/ beside"),
])
def test_what_was_not_tuned_is_refused_in_a_line(argv, words, tmp_path):
    shutil.copy("agents/sac.py", tmp_path / "mine.py")
    with pytest.raises(UserError, match=words) as error:
        parse_args([word.format(folder=tmp_path) for word in argv], Simple)
    assert "\n" not in str(error.value)


# The studies


@pytest.mark.parametrize("name", tuned.STUDIES)
def test_the_commands_of_the_studies_can_be_read(name):
    options, _ = parse_args(tuned.STUDIES[name][0].split(), Tune)
    searched = space.read(options.space, load_agent(options.agent).Config, options.agent)
    assert len(searched.parameters) > 4


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A finished study: its best setting and the returns are the arguments."""
    monkeypatch.setattr(tuned, "RESULTS", tmp_path / "results/tuned")
    monkeypatch.setattr(tuned, "TUNED", tmp_path / "tuned")
    monkeypatch.setattr(tuned, "BY_HAND", [])
    folder = tmp_path / "study"
    folder.mkdir()
    for name in ("trials.jsonl", "versions.json", "study.png"):
        (folder / name).write_text(name)
    (folder / "config.json").write_text(json.dumps({"options": {"seeds": 2, "trials": 16}}))

    def finish(best, confirmed, defaults, name="sac-lander"):
        options, config = parse_args([*tuned.STUDIES[name][0].split()], Tune)
        options = json.loads(json.dumps(vars(options), default=str))
        (folder / "best.json").write_text(json.dumps({
            "options": options, "config": config | {"gamma": 0.98, "tau": 0.02},
            "study": {"is": best, "confirmed": confirmed, "defaults": defaults}}))
        tuned.store(name, folder)
        tuned.ship(tuned.rows())
        return tuned.table(tuned.rows())

    return finish


def test_the_best_settings_of_a_study_ship(study, tmp_path):
    text = study("trial 3", [200.0, 220.0, 240.0], [100.0, 120.0, 210.0])  # 8 of 9 pairs
    entries = json.loads((tmp_path / "tuned/LunarLanderContinuous-v3.json").read_text())
    assert entries == {"sac": {"settings": {"gamma": 0.98, "tau": 0.02}, "seeds": 32,
                               "source": "bench/results/tuned/sac-lander"}}
    assert re.search(r"\| sac .*\| 220 \(.* n=3 \| 0.8[0-9] \| yes \|", text)
    assert sorted(p.name for p in (tmp_path / "results/tuned/sac-lander").iterdir()) == [
        "best.json", "config.json", "study.png", "trials.jsonl.gz", "versions.json"]


def test_what_a_study_changed_of_the_task_ships_with_its_settings(study, tmp_path):
    text = study("trial 3", [300.0] * 3, [100.0] * 3, "xqc-biped")
    entries = json.loads((tmp_path / "tuned/BipedalWalker-v3.json").read_text())
    assert entries["xqc"]["settings"] == {
        "action_repeat": 2, "clip_reward": [-1.0, 10.0], "failure_below": -99.0,
        "gamma": 0.98, "tau": 0.02}
    assert "| xqc | BipedalWalker-v3 `--action-repeat 2 --clip-reward -1 10 " in text
    shutil.copy("agents/xqc.py", tmp_path)
    options, config = parse_args([str(tmp_path / "xqc.py"), "--env", "BipedalWalker-v3", "--tuned"])
    assert (options.action_repeat, options.clip_reward, config["tau"]) == (2, (-1, 10), 0.02)


def test_of_two_results_the_better_one_ships():
    row = tuned.Row("sac", "E", "", 1, "a", "trial 1", [2.0, 2.0], [0.0, 0.0], "")
    better, worse = (row._replace(source=s, tuned=t) for s, t in (("b", [9.0, 1.5]), ("c", [0, 9])))
    assert tuned.shipped([row, better, worse]) == {("sac", "E"): better}
    assert [line.split(" | ")[6] for line in tuned.table([row, better]).splitlines()[2:4]] == [
        "no", "yes"]


def test_a_study_that_loses_the_second_time_ships_no_longer(study, tmp_path):
    study("trial 3", [300.0] * 3, [100.0] * 3)
    study("trial 3", [100.0] * 3, [300.0] * 3)
    assert not list((tmp_path / "tuned").iterdir())


def test_a_broken_file_is_told(tmp_path):
    shutil.copy("agents/sac.py", tmp_path)
    (tmp_path / "tuned").mkdir()
    for text in ("{", '{"sac": 3}', "[]"):
        (tmp_path / "tuned/Pendulum-v1.json").write_text(text)
        with pytest.raises(UserError, match=r"--tuned: a file in \S+ is broken|has no settings"):
            parse_args([str(tmp_path / "sac.py"), "--tuned"])


@pytest.mark.parametrize("best, confirmed", [
    ("defaults", [100.0, 120.0, 230.0]), ("trial 3", [110.0, 220.0, 240.0])])  # 6 of 9 pairs
def test_a_study_that_does_not_beat_the_defaults_is_listed_and_ships_nothing(
        study, tmp_path, best, confirmed):
    text = study(best, confirmed, [100.0, 120.0, 230.0])
    assert re.search(r"\| sac .*\| no \|", text) and not list((tmp_path / "tuned").iterdir())
