"""The command line: options, errors, and the files of a run."""

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from lab import train
from lab.check import __main__ as check
from lab.command_line import parse_args
from lab.errors import UserError, guarded
from lab.options import Simple, Tune, Vectorised
from lab.training import progress
from lab.training.recorder import SeedRecorder, read_metrics
from tests import probe_envs  # noqa: F401, registers the environments
from tests.conftest import AGENTS, refusal, timeless

SAC = Path("agents/sac.py").read_text()
TINY = ["--env", "Pendulum-v1", "--steps", "300", "--actor-width", "8", "--qf-width", "8",
        "--batch-size", "8", "--processes", "1", "--eval-episodes", "1"]


@pytest.fixture(autouse=True)
def sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def tiny(folder, *flags):
    return [*TINY, "--eval-every", "150", "--runs", str(folder / "runs"), *flags]


def patched(verb, line):
    """SAC with another `verb`."""
    return f"{SAC}\n\ndef patch(self, *args, **kwargs):\n    {line}\n\n\nAgent.{verb} = patch\n"


def write(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(text)
    return str(path)


def metrics(run, env_id="Pendulum-v1", agent="sac", seed=0):
    rows = read_metrics(run / env_id / agent / f"seed_{seed}" / "metrics.jsonl")
    return [timeless(row) for row in rows]


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def refused(capsys, folder, argv):
    """-> the one line on stderr; nothing is written."""
    before = contents(folder)
    err = refusal(capsys, train.run, *argv)
    assert contents(folder) == before
    return err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short logged run of two seeds."""
    folder = tmp_path_factory.mktemp("finished")
    with contextlib.redirect_stdout(None):
        assert train.run([*TINY, "--runs", str(folder / "runs"), "--seeds", "2", "--gamma", "0.9",
                          "--name", "first", "--log"]) == 0
    return next((folder / "runs").iterdir())


# Bad input


@pytest.mark.parametrize("flags, words", [
    ("--env Pendulm-v1", r"unknown environment 'Pendulm-v1'; did you mean Pendulum-v1"),
    ("--env Pendulum-v1 Nonsense", r"environment 'Nonsense'"),
    ("--env CartPole-v1", r"CartPole-v1 has action space Discrete\(2\)"),
    ("--env lab-tests/Unbounded-v0", r"sac.py on lab-tests/Unbounded-v0: action bounds must be"),
    ("--env Pendulum-v1 Pendulum-v1", r"different environments, not Pendulum-v1 Pendulum-v1"),
    ("--env", r"different environments, not none"),
    ("agents/missing.py", r"no agent file 'agents/missing.py'; agents here: .*agents/sac.py"),
    ("--steps 0", r"--steps must be at least 1, not 0"),
    ("--seeds 0", r"--seeds must be at least 1, not 0"),
    ("--processes 0", r"--processes must be at least 1, not 0"),
    ("--eval-episodes -1", r"--eval-episodes must be at least 1, not -1"),
    ("--eval-every 0", r"--eval-every must be at least 1, not 0"),
    ("--log-every 0", r"--log-every must be at least 1, not 0"),
    ("--checkpoint-every -1", r"--checkpoint-every must be 0 or more, not -1"),
    ("--stop-rtol nan", r"--stop-rtol must be 0 or more, not nan"),
    ("--stop-at nan", r"--stop-at must be a number, not nan"),
    ("--target-entropy nan", r"target_entropy must lie in \[-1e\+09, 1e\+09\], not nan"),
    ("--steps abc", r"--steps: .*'abc'"),
    ("--steps", r"--steps"),
    ("--stepz 3", r"--stepz.*--steps"),
    ("--precision fp8", r"'fp8'.*--precision.*'fp32', 'bf16'"),
    ("--gamma 3", r"gamma must lie in \[0, 1\], not 3.0"),
    ("--gamma nan", r"gamma must lie in \[0, 1\], not nan"),
    ("--runs {folder}/file", r"cannot write to the runs folder '.*/file': .*--runs"),
    ("--runs {folder}/file/below", r"cannot write to the runs folder '.*/below': .*--runs"),
    ("--config {folder}/none.json", r"cannot read .*none.json: No such file"),
    ("--config {folder}", r"cannot read .*: Is a directory"),
    ("--config {folder}/file", r"file is not the config.json of a run: JSONDecodeError"),
    ("--config {folder}/list.json", r"list.json is not the config.json of a run"),
    ("--config {folder}/empty.json", r"empty.json is not the config.json of a run: KeyError 'o"),
    ("--config {folder}/gama.yaml", r"gama.yaml: unknown setting gama; did you mean gamma\?"),
    ("--config {folder}/other.yaml", r"unknown setting other of learn_simple.py and agents/sac.p"),
    ("--config {folder}/broken.yaml", r"broken.yaml, line 2: expected"),
    ("--config {folder}/twice.yaml", r'twice.yaml, line 2: found duplicate key "tau"'),
    ("--config {folder}/list.yaml", r"list.yaml has no settings"),
    ("--config {folder}/none.yaml", r"cannot read .*none.yaml: No such file"),
    ("--config {folder}/type.yaml", r"tau"),
    ("--config {folder}/date.yaml", r"date.yaml: month must be in 1..12"),
    ("--config {folder}/control.yaml", r"control.yaml: unacceptable character"),
    ("--config {folder}/latin.yaml", r"latin.yaml is not UTF-8"),
    ("--config {folder}/beside.yaml", r"names code in its own folder, .*mine.py"),
    ("--config {folder}/unknown.json", r"unknown.json does not fit .*sac.py: .*'gama'"),
    ("--config {folder}/type.json", r"type.json does not fit .*sac.py: gamma: str is n"),
    ("--config {folder}/agent.json", r"agent.json: agent: int is not an instance of str"),
    ("--config {folder}/env.json", r"env.json: env: item 0 of tuple is not an instance of str"),
    ("--config {folder}/envs.json", r"envs.json: num_envs: str "),
    ("--config {folder}/clip.json", r"clip.json does not fit .*sac.py: clip_reward: "),
    ("--config {folder}/blank.yaml", r"blank.yaml: env: None is not a tuple"),
    ("--config {folder}/number.yaml", r"number.yaml: env: int is not a tuple"),
    ("--config {folder}/nested.yaml", r"nested.yaml: env: item 0 of tuple is not an"),
    ("--config=", r"--config is empty: is a shell variable unset\?"),
    ("--resume=", r"--resume is empty"), ("--init-from=", r"--init-from is empty"),
    ("--seeds 5_000_000_000", r"--seeds must be at most 4294967296, not 5000000000"),
    ("--stop-at-evals 3", r"--stop-at-evals does nothing without --stop-at$"),
    ("--stop-rtol 0.5 --stop-at 3", r"--stop-rtol does nothing without --stop-plateau"),
    ("--fp32-library onednn --precision bf16", r"--fp32-library does nothing without fp32 on a C"),
    ("--name x --no-log", r"--name does nothing without --log"),
    ("--checkpoint-every 5 --no-log", r"--checkpoint-every does nothing without --log"),
])
def test_a_bad_flag_is_one_line_and_leaves_nothing(tmp_path, capsys, flags, words):
    write(tmp_path, "no json", "file")
    write(tmp_path, "[1]", "list.json")
    write(tmp_path, "{}", "empty.json")
    write(tmp_path, '{"options": {}, "config": {"gama": 0.9}}', "unknown.json")
    for name, text in {"gama": "gama: 0.9", "other": "other: 1", "broken": "a: [1\nb: 2",
                       "twice": "tau: 1\ntau: 2", "list": "- tau", "type": "tau: high",
                       "date": "tau: 2020-13-45", "control": "tau: \x07",
                       "beside": f"agent: {tmp_path}/mine.py"}.items():
        write(tmp_path, text, f"{name}.yaml")
    write(tmp_path, '{"options": {}, "config": {"gamma": "0.9"}}', "type.json")
    for name, options in {"agent": {"agent": 5}, "env": {"env": [1, 2]}, "envs": {"num_envs": "a"},
                          "clip": {"clip_reward": [1.0]}}.items():
        write(tmp_path, json.dumps({"options": options, "config": {}}), f"{name}.json")
    for name, text in {"blank": "env:", "number": "env: 5", "nested": "env: [[A], 3]"}.items():
        write(tmp_path, text, f"{name}.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"tau: \xe9")
    argv = tiny(tmp_path, "--log", *flags.format(folder=tmp_path).split())
    assert re.search(words, refused(capsys, tmp_path, argv))


@pytest.mark.parametrize("text, words", [
    ("x = (\n", r"mine.py:1 does not load: SyntaxError"),
    ("from dataclasses import dataclass\n\n\n@dataclass\nclass Config:\n    gamma: float = 0.9\n",
     r"mine.py needs a class Agent"),
    (SAC + "\n\ndel Agent.observe\n", r"Agent has no observe\(\); it needs act, observe, update"),
    (SAC.replace("class Config:", "class Config:\n    steps: int = 1"), r"Config's 'steps'"),
    (SAC.replace("class Agent:", 'class Agent:\n    ACTIONS = "box"\n', 1),
     r"ACTIONS of mine.py must be continuous or discrete, not box"),
    (patched("act", "return torch.zeros(2, 1)"),
     r"act should give a tensor \(S, N, A\) = \(3, 1, 1\), but gave \(2, 1\)"),
    (patched("update", "return {'loss/qf': torch.zeros(())}"),
     r"update should give loss/qf of shape \(S,\) = \(3,\), but gave \(\)"),
])
def test_a_bad_agent_file_is_one_line_and_leaves_nothing(tmp_path, capsys, text, words):
    argv = tiny(tmp_path, "--log", write(tmp_path, text))
    assert re.search(words, refused(capsys, tmp_path, argv))


@pytest.mark.parametrize("bound, flags", [("> 1", []), ("< 1", ["--gamma", "1"])])
def test_a_config_with_a_check_of_its_own_is_told_below_its_traceback(
        tmp_path, capsys, bound, flags):
    path = write(tmp_path, SAC.replace("    gamma: float", f"""\
    def __post_init__(self):
        assert self.gamma {bound}, "not this gamma"

    gamma: float"""))
    for command in (train.run, lambda argv: guarded(lambda: check.run(argv))):
        assert command([path, *flags]) == 2
        err = capsys.readouterr().err
        assert "Traceback" in err and err.splitlines()[-1] == (
            f"error: {path}: Config() failed: AssertionError: not this gamma")


def test_an_agent_that_raises_is_one_line_with_its_place_below_its_traceback(tmp_path, capsys):
    path = write(tmp_path, patched("observe", "raise KeyError('x')"))
    before = contents(tmp_path)
    assert train.run(tiny(tmp_path, "--log", path)) == 2
    out, err = capsys.readouterr()
    *traceback, line = err.splitlines()
    number = Path(path).read_text().splitlines().index("    raise KeyError('x')") + 1
    assert line.startswith(f"error: {path}:{number}: observe failed on tensors of shape (S, N, ")
    assert line.endswith("KeyError: 'x'") and not out and contents(tmp_path) == before
    assert traceback[0].startswith("Traceback") and traceback[-1] == "KeyError: 'x'"


def test_cuda_where_there_is_none_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(capsys, tmp_path, tiny(tmp_path, "--log", "--cuda"))
    assert line.startswith("error: --cuda: torch sees no CUDA device here; remove --cuda")


def test_resuming_what_is_no_run_is_one_line(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "none"):
        line = refused(capsys, tmp_path, ["--resume", str(folder)])
        assert f"cannot read {folder}/config.json" in line


@pytest.mark.parametrize("flags", [
    ["--resume", "{run}", "--tau", "0.1"], ["--log-every=500", "--resume", "{run}"],
    ["--resume={run}", "--steps", "500", "--log-every", "5"], ["--resume={run}", "--log-every=5"]])
def test_a_run_is_resumed_with_no_other_flag(finished, tmp_path, capsys, flags):
    run = shutil.copytree(finished, tmp_path / "run")
    argv = [flag.format(run=run) for flag in flags]
    assert "give no other flag" in refused(capsys, tmp_path, argv)


@pytest.mark.parametrize("flags, words", [
    ("--engine ray", "--engine ray needs Ray, here and on every node: pip install ray=="),
    ("--address 10.0.0.1:6379", "--address is for --engine ray"),
    ("--engine ray --plan", "--plan measures this machine: leave it out with --engine ray")])
def test_a_cluster_needs_ray(tmp_path, capsys, monkeypatch, flags, words):
    monkeypatch.setitem(sys.modules, "ray", None)  # not installed
    assert words in refused(capsys, tmp_path, tiny(tmp_path, *flags.split(), "--log"))


def test_a_run_goes_on_with_its_engine_or_another(finished, tmp_path):
    """An address belongs to one cluster, and a new run has its own engine."""
    run = shutil.copytree(finished, tmp_path / "run")
    written = json.loads((run / "config.json").read_text())
    written["options"] |= {"engine": "ray", "address": "10.0.0.1:6379"}
    (run / "config.json").write_text(json.dumps(written))

    def engine(*argv):
        options, _ = parse_args(argv)
        return options.engine, options.address

    assert engine("--resume", str(run)) == ("ray", None)
    assert engine("--resume", str(run), "--engine", "local") == ("local", None)
    assert engine(f"--resume={run}", "--address=a:1") == ("ray", "a:1")
    assert engine("--config", str(run / "config.json")) == ("local", None)


@pytest.mark.parametrize("terminal", [True, False])
def test_an_error_is_plain_words_in_a_terminal_and_a_pipe(tmp_path, capsys, monkeypatch, terminal):
    """capsys calls its encoding UTF-8, where tyro draws boxes of dashes: it knows utf-8 alone."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    line = refused(capsys, tmp_path, tiny(tmp_path, "--log", "--steps", "abc"))
    assert re.fullmatch(r"error: [\w ]*--steps: [^\x1b]*'abc'\n", line)


def test_the_script_gives_the_exit_code_and_nothing_but_the_line(tmp_path):
    argv = [sys.executable, "learn_simple.py", *tiny(tmp_path, "--log", "--env", "CartPole-v1")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert re.fullmatch(r"error: CartPole-v1 has action space Discrete\(2\); sac.py is for "
                        r"continuous actions: use agents/ppo_discrete.py\n", done.stderr)


# Good input


def test_no_argument_is_a_quick_check_of_sac():
    options, config = parse_args([])
    assert options == Simple()
    assert (options.agent, options.env, options.seeds) == ("agents/sac.py", ("Pendulum-v1",), 1)
    assert not options.log and config["actor_lr"] == 3e-4


def test_spellings_of_numbers_and_flags_are_equal():
    assert parse_args(["--seeds", "8"])[0].seeds == 8
    assert parse_args(["--steps", "20_000"])[0].steps == 20_000
    assert parse_args(["--eval_every=50"]) == parse_args(["--eval-every", "50"])


@pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)
def test_every_setting_of_an_agent_is_a_flag(path):
    _, defaults = parse_args([str(path)])
    wanted, flags = {}, []
    for name, default in defaults.items():
        flag = name.replace("_", "-")
        if isinstance(default, bool):
            wanted[name] = not default
            flags += [f"--no-{flag}" if default else f"--{flag}"]
        elif isinstance(default, str):
            wanted[name] = default
            flags += [f"--{flag}", default]
        elif name.endswith("_schedule"):
            wanted[name] = ((0.0, 7.0), (9.0, 1.0))
            flags += [f"--{flag}", *["0", "7", "9", "1"]]
        elif isinstance(default, tuple):
            wanted[name] = (*default, 7)
            flags += [f"--{flag}", *map(str, wanted[name])]
        elif default is None:
            wanted[name] = 7
            flags += [f"--{flag}", "7"]
        else:
            wanted[name] = default + 1 if isinstance(default, int) else default / 2 + 0.25
            flags += [f"--{flag}", str(wanted[name])]
    assert parse_args([str(path), *flags])[1] == wanted != defaults


def test_the_comments_of_the_settings_are_their_help(capsys):
    with pytest.raises(SystemExit) as end:
        train.run(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for words in ("Soft Actor-Critic", "--qf-width INT", "units in each of a critic's",
                  "--steps INT", "default: 6000"):
        assert words in out


@pytest.mark.parametrize("script", ["learn_vectorised.py", "hypertune.py"])
def test_the_scripts_start(script):
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: {script}" in done.stdout, done.stderr


@pytest.mark.parametrize("argv", ["agents/ppo.py --env A B", "--env A B agents/ppo.py",
                                  "--env A B --width 8 agents/ppo.py"])
def test_the_agent_may_stand_before_or_after_its_environments(argv):
    options, config = parse_args(argv.split())
    assert options.agent == "agents/ppo.py" and options.env == ("A", "B") and "gae_lambda" in config


def test_a_run_may_be_named_after_its_file():
    options, _ = parse_args(["--name", "mine.py", "agents/ppo.py"])
    assert (options.name, options.agent) == ("mine.py", "agents/ppo.py")


def test_a_config_brings_a_runs_settings_and_flags_win(finished):
    given = ["--config", str(finished / "config.json")]
    options, config = parse_args(given)
    assert options.env == ("Pendulum-v1",) and options.runs == finished.parent and options.log
    assert (options.seeds, options.steps, options.name) == (2, 300, "first")
    assert (config["gamma"], config["qf_width"], config["tau"]) == (0.9, 8, 0.005)
    changed, other = parse_args([*given, "--steps", "20", "--gamma", "0.5", "--no-log"])
    assert changed == dataclasses.replace(options, steps=20, log=False)
    assert other == config | {"gamma": 0.5}


SETTINGS = """
# a file of settings
agent: agents/ppo.py
env: [Pendulum-v1, HalfCheetah-v5]  # two
seeds: 3
clip-reward: [-1, 10]
log: true
lr: 3e-4
num_steps: 1_000
lr-schedule: [[0, 3e-4], [1e6, 0]]
norm_adv: false
name: null
"""


def test_a_yaml_file_brings_settings_by_the_names_of_their_flags(tmp_path):
    path = write(tmp_path, SETTINGS, "settings.yaml")
    options, config = parse_args(["--config", path, "--seeds", "4", "--gamma", "0.9"])
    assert (options.agent, options.env) == ("agents/ppo.py", ("Pendulum-v1", "HalfCheetah-v5"))
    assert (options.seeds, options.clip_reward, options.log) == (4, (-1.0, 10.0), True)
    assert (config["lr"], config["num_steps"], config["gamma"]) == (3e-4, 1000, 0.9)
    assert config["lr_schedule"] == ((0.0, 3e-4), (1e6, 0.0))
    assert config["norm_adv"] is False and options.name is None and options.config is None
    options, _ = parse_args(["--config", write(tmp_path, "patience: null", "n.yml")], Tune)
    assert options.patience is None
    options, config = parse_args([f"--config={write(tmp_path, 'tau: 0.1', 'other.yml')}",
                                  "agents/sac.py"])
    assert (options.agent, config["tau"]) == ("agents/sac.py", 0.1)


def test_a_runs_config_json_written_as_yaml_is_read_back_equal(finished, tmp_path):
    content = json.loads((finished / "config.json").read_text())
    text = io.StringIO()
    YAML(typ="safe").dump(content, text)
    path = write(tmp_path, f"# by hand\n{text.getvalue()}", "config.yaml")
    (yaml, config), (written, same) = (
        parse_args(["--config", given]) for given in (path, str(finished / "config.json")))
    assert dataclasses.replace(yaml, config=None) == dataclasses.replace(written, config=None)
    assert config == same


def test_a_config_brings_its_agent(tmp_path):
    path = write(tmp_path, SAC.replace("gamma: float = 0.99", "discount: float = 0.7"))
    (tmp_path / "run").mkdir()
    saved = write(tmp_path, json.dumps({"options": {"agent": path}, "config": {}}),
                  "run/config.json")
    options, config = parse_args(["--config", saved])
    assert options.agent == path and config["discount"] == 0.7


def test_a_run_without_log_leaves_no_file_and_prints_plain_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0)
    assert train.run(tiny(tmp_path)) == 0
    assert not list(tmp_path.iterdir())
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("Pendulum-v1: ")]
    done = [int(re.match(r"Pendulum-v1: (\d+)/300 steps, ETA \d+ s, ", line)[1]) for line in lines]
    assert len(done) > 50 and done == sorted(set(done)) and done[-1] == 300
    assert re.search(r"ETA 0 s, \d+ steps/s, \d+ updates/s, return -\d+\.\d$", lines[-1])
    assert "\x1b" not in out and "Pendulum-v1 ━" not in out, "a bar among the lines"
    assert not err
    assert re.search(r"Pendulum-v1\s*.\s*1 .*0:-\d+\.\d", out), "no row in the table"


def test_a_logged_run_leaves_its_metrics_events_picture_and_settings(finished):
    assert finished.name.startswith("first-")
    assert (finished / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (finished / "sac.py").read_text() == SAC
    settings = json.loads((finished / "config.json").read_text())
    assert settings["name"] == "first" and settings["options"]["seeds"] == 2
    assert settings["options"]["processes"] == 1 and settings["config"]["gamma"] == 0.9
    assert "torch" in json.loads((finished / "versions.json").read_text())
    group = finished / "Pendulum-v1" / "sac"
    folders = ("seed_0", "seed_1", "all_seeds", "stack_0_1")
    assert sorted(path.name for path in group.iterdir()) == sorted(folders)
    assert all(list((group / name).glob("events.out.tfevents.*")) for name in folders[:3])
    assert [path.name[:17] for path in sorted(group.glob("stack_0_1/*"))][-1] == "step_000000000300"
    for seed in (0, 1):
        rows = metrics(finished, seed=seed)
        assert [row["step"] for row in rows] == list(range(3, 301, 3))
        evaluated = [row["step"] for row in rows if "return/eval" in row]
        assert evaluated == list(range(30, 301, 30)) and "loss/qf" in rows[-1]
    assert metrics(finished, seed=0) != metrics(finished, seed=1)


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_the_same_command_twice_gives_the_same_metrics(finished, tmp_path, no_curves, processes):
    """Also where its seeds are split over two processes."""
    again = ["--config", str(finished / "config.json"), "--runs", str(tmp_path), "--processes",
             processes]
    assert train.run(again) == 0
    for seed in (0, 1):
        assert metrics(next(tmp_path.iterdir()), seed=seed) == metrics(finished, seed=seed)


def test_an_agent_of_ones_own_trains(tmp_path, no_curves):
    path = write(tmp_path, SAC.replace("gamma: float = 0.99", "gamma: float = 0.7"))
    assert train.run([path, *tiny(tmp_path, "--log", "--steps", "40")]) == 0
    run = next((tmp_path / "runs").iterdir())
    assert run.name.startswith("mine-") and (run / "mine.py").read_text() == Path(path).read_text()
    assert json.loads((run / "config.json").read_text())["config"]["gamma"] == 0.7
    assert metrics(run, agent="mine")[-1]["step"] == 40


# Interruption, resumption, failure


def interrupt(monkeypatch, number, at):
    """Send this process a signal when the progress reaches a step."""
    def update(self, place, message):
        if message["step"] == at:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train.SweepProgress, "update", update)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_with_its_exit_code(tmp_path, monkeypatch, number, code):
    interrupt(monkeypatch, number, at=30)
    assert train.run(tiny(tmp_path)) == code


def test_an_interrupted_run_is_resumed_to_its_end(tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, signal.SIGINT, at=99)
        argv = tiny(tmp_path, "--log", "--checkpoint-every", "0")
        assert train.run(argv) == 128 + signal.SIGINT
    run = next((tmp_path / "runs").iterdir())
    before = metrics(run)
    assert before[-1]["step"] == 99 and not (run / "learning_curves.png").exists()
    assert [path.name[:17] for path in run.glob("*/*/stack_0_0/s*")] == ["step_000000000099"]
    assert train.run(["--resume", str(run)]) == 0
    rows = metrics(run)
    assert rows[:len(before)] == before
    assert [row["step"] for row in rows] == list(range(3, 301, 3))
    assert list((tmp_path / "runs").iterdir()) == [run] and (run / "learning_curves.png").exists()
    assert not capsys.readouterr().err


def test_a_run_is_not_resumed_with_a_changed_agent(tmp_path, capsys, monkeypatch, no_curves):
    path = write(tmp_path, SAC)
    with monkeypatch.context() as patch:
        interrupt(patch, signal.SIGINT, at=9)
        assert train.run([path, *tiny(tmp_path, "--log")]) == 128 + signal.SIGINT
    capsys.readouterr()
    write(tmp_path, SAC + "\n# another\n")
    run = next((tmp_path / "runs").iterdir())
    line = refused(capsys, tmp_path, ["--resume", str(run)])
    lines = len(SAC.splitlines())
    assert f"{path} differs from {run}/mine.py from line {lines + 1} on" in line
    again = f"python learn_simple.py {run}/mine.py --resume {run}"
    assert f"({again}), or start a new run" in line
    Path(path).unlink()
    assert f"{path} is missing" in refused(capsys, tmp_path, ["--resume", str(run)])
    assert train.run(again.split()[2:]) == 0
    assert metrics(run, agent="mine")[-1]["step"] == 300


def test_a_changed_setting_of_the_agent_names_the_way_to_resume_as_well(
        tmp_path, capsys, no_curves):
    """Its Config would not take what the run holds."""
    path = write(tmp_path, SAC)
    assert train.run([path, *tiny(tmp_path, "--log", "--steps", "10")]) == 0
    run = next((tmp_path / "runs").iterdir())
    capsys.readouterr()
    write(tmp_path, SAC.replace("tau", "polyak"))
    line = refused(capsys, tmp_path, ["--resume", str(run)])
    assert f"{run}/mine.py --resume {run}" in line
    assert "give no other flag" in refused(
        capsys, tmp_path, [f"{run}/mine.py", "--resume", str(run), "--tau", "0.1"])


@pytest.mark.parametrize("steps, note", [
    (300, "learning_starts 5000 becomes 30 in a run of 300 steps"), (None, "")])
def test_a_setting_that_a_short_run_changes_is_said_once(tmp_path, capsys, jobs_here, steps, note):
    """Not by each of two jobs."""
    flags = ["--seeds", "2", "--processes", "2"] if steps else ["--learning-starts", "30"]
    assert train.run(tiny(tmp_path, *flags)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "learning_starts" in line]
    assert lines == [note] * bool(note)


@pytest.mark.parametrize("flag", ["--resume", "--config"])
@pytest.mark.parametrize("options", [
    {"agent": "{run}/sac.py"}, {"agent": "agents/../{run}/sac.py"},
    {"env": ["stranger.evil:Evil-v0"]}, {"env": ["Pendulum-v1", "stranger:Evil-v0"]}])
def test_code_that_came_with_a_run_does_not_run(tmp_path, monkeypatch, capsys, flag, options):
    """A run's folder may be a stranger's."""
    run = tmp_path / "stranger"
    run.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("sac.py", "evil.py", "__init__.py"):
        (run / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    where = os.path.relpath(run)
    filled = {k: v.format(run=where) if isinstance(v, str) else v for k, v in options.items()}
    settings = {"agent": "agents/sac.py", "env": ["Pendulum-v1"], "steps": 10} | filled
    (run / "config.json").write_text(json.dumps(
        {"name": "x", "options": settings, "config": {}}))
    source = run if flag == "--resume" else run / "config.json"
    assert train.run([flag, str(source)]) == 2
    line = capsys.readouterr().err
    assert "names code in its own folder" in line and line.count("\n") == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", [Simple, Tune])
def test_the_environments_of_a_vectorised_run_are_not_dropped(tmp_path, kind):
    path = tmp_path / "config.json"
    options = {"agent": "agents/ppo.py", "num_envs": 8}
    path.write_text(json.dumps({"options": options, "config": {}}))
    with pytest.raises(UserError, match="8 environments per seed, which only learn_vec"):
        parse_args(["--config", str(path)], kind)
    assert parse_args(["--config", str(path)], Vectorised)[0].num_envs == 8


def test_a_failed_end_is_a_failure(tmp_path, capsys, no_curves, monkeypatch):
    """The table has what the disk did not take, and the exit code is 1."""
    monkeypatch.setattr(SeedRecorder, "write", lambda *_: None)
    assert train.run(tiny(tmp_path, "--log")) == 1
    out, err = capsys.readouterr()
    assert "FAILED Pendulum-v1 seed 0: the last row was not written" in err
    assert "nan" not in out

    def full(*_):
        raise OSError("no space left")

    monkeypatch.undo()
    monkeypatch.setattr("lab.training.checkpoint.save", full)
    monkeypatch.setattr(train, "draw_learning_curves", full)
    assert train.run(tiny(tmp_path, "--log")) == 1
    out, err = capsys.readouterr()
    assert "FAILED Pendulum-v1 seed 0: checkpoint not written: no space left" in err
    assert "cannot write the plot: no space left" in err and "plot:  " not in out


def test_a_run_that_learns_nothing_says_so(capsys):
    argv = ["agents/ppo.py", "--steps", "32", "--eval-episodes", "1", "--num-minibatches", "2"]
    assert train.run([*argv, "--num-steps", "32"]) == 0
    assert "nothing was learned" in capsys.readouterr().out
    assert train.run([*argv, "--num-steps", "16"]) == 0
    assert "nothing was learned" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_failed_job_is_named_and_the_others_finish(tmp_path, capfd):
    fails = """if self.spec.id == "Pendulum-v1" and self.transitions > 100 and self.replay.size > 1:
        raise RuntimeError("the update broke")
    return {}"""
    argv = tiny(tmp_path, "--log", "--processes", "2", "--seeds", "2", "--eval-every", "300",
                "--env", "Pendulum-v1", "MountainCarContinuous-v0",
                write(tmp_path, patched("update", fails)))
    assert train.run(argv) == 1
    out, err = capfd.readouterr()
    failed = [line for line in err.splitlines() if line.startswith("FAILED ")]
    path, line = f"{tmp_path}/mine.py", len(SAC.splitlines()) + 5
    assert failed == [f"FAILED Pendulum-v1 seeds 0 to 1: {path}:{line}: RuntimeError: the update "
                      "broke"]
    run = next((tmp_path / "runs").iterdir())
    last = {env_id: metrics(run, env_id, "mine", seed=1)[-1]["step"]
            for env_id in ("Pendulum-v1", "MountainCarContinuous-v0")}
    assert last == {"Pendulum-v1": 99, "MountainCarContinuous-v0": 300}
    assert (run / "learning_curves.png").exists()
    assert "MountainCarContinuous-v0: 600/600 steps" in out and "Pendulum-v1: 600/600" not in out


@pytest.mark.parametrize("log", ["--log", "--no-log"])
def test_a_seed_that_diverges_is_named_and_counts_in_no_mean(tmp_path, capsys, no_curves, log):
    diverges = """loss = torch.zeros(len(self.generators))
    if self.transitions > 150 and self.replay.size > 1:
        loss[1] = float("nan")
    return {"loss/qf": loss}"""
    path = write(tmp_path, patched("update", diverges) + "del Agent.hidden_activations\n")
    assert train.run([path, *tiny(tmp_path, log, "--seeds", "3")]) == 1
    out, err = capsys.readouterr()
    assert err == "FAILED Pendulum-v1 seed 1: the agent's loss/qf is not finite at step 153\n"
    row = next(line for line in out.splitlines() if re.search(r"Pendulum-v1\s*.\s*2 ", line))
    assert "0:" in out.split(row[:20])[-1] and not re.search(r"\b1:-", out)


def test_a_clipped_training_reward_is_declared_and_evaluation_is_raw(tmp_path, capsys, no_curves):
    """Pendulum's rewards are negative: an agent that is trained on 0 alone is judged by them."""
    argv = tiny(tmp_path, "agents/sac.py", "--log", "--clip-reward", "0", "1")
    assert train.run(argv) == 0
    assert "trained on rewards clipped to [0.0, 1.0]" in " ".join(capsys.readouterr().out.split())
    (run,) = (tmp_path / "runs").iterdir()
    assert json.loads((run / "config.json").read_text())["options"]["clip_reward"] == [0.0, 1.0]
    rows = metrics(run)
    assert all(row[tag] < -100 for row in rows for tag in ("return/train", "return/eval")
               if tag in row)
    again, _ = parse_args(["--config", str(run / "config.json")])
    assert again.clip_reward == (0.0, 1.0)


def test_a_held_action_and_the_failures_are_declared_and_kept(tmp_path, capsys, no_curves):
    argv = tiny(tmp_path, "agents/sac.py", "--log", "--action-repeat", "2", "--failure-below", "-9")
    assert train.run(argv) == 0
    words = ("trained and evaluated with each action repeated for 2 steps, trained with "
             "terminations only where the last reward is below -9.0")
    assert words in " ".join(capsys.readouterr().out.split())
    (run,) = (tmp_path / "runs").iterdir()
    again, _ = parse_args(["--config", str(run / "config.json")])
    assert (again.action_repeat, again.failure_below) == (2, -9.0)
    assert metrics(run)[-1]["step"] == again.steps
    assert {row["length/train"] for row in metrics(run) if "length/train" in row} == {200.0}


def test_an_action_is_held_for_a_step_at_least(capsys, tmp_path):
    line = refused(capsys, tmp_path, tiny(tmp_path, "--action-repeat", "0"))
    assert "--action-repeat must be at least 1, not 0" in line


def test_bounds_of_the_reward_in_the_wrong_order_are_refused(capsys, tmp_path):
    line = refused(capsys, tmp_path, tiny(tmp_path, "--clip-reward", "1", "-5"))
    assert "--clip-reward needs LOW < HIGH, not 1.0 -5.0" in line
