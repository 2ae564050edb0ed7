"""The command line as people use it, and the words that become files."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest
from rich.console import Console

from lab import settings, train
from lab.command_line import parse_args
from lab.envs.make import make_envs
from lab.envs.spec import read_kwargs
from lab.errors import UserError, guarded
from lab.options import Simple, Tune, Vectorised
from lab.report import __main__ as report
from lab.report import curves, page, runs
from lab.training import checkpoint, recorder
from lab.training.job import make_jobs
from lab.training.recorder import read_metrics
from lab.tuning import run as tuning
from lab.tuning import space, summary
from lab.watch import __main__ as watch
from lab.watch import camera
from tests.test_command import SAC, refused, tiny, write
from tests.test_results import write_run

# Which word is the agent


@pytest.mark.parametrize("before, after", [
    ("", "--steps 300"), ("--env A B", ""), ("--log", ""), ("--no-log --env A", "--gamma 0.5"),
    ("--qf-width 8", ""), ("--name mine.py", ""), ("--clip-reward -1 1", ""),
    ("--env=A --runs=x.py", "--env-kwargs file=a.py b=other.py")])
def test_the_agents_settings_are_those_of_its_file(tmp_path, before, after):
    """Whatever its folder is called, and wherever it stands."""
    folder = tmp_path / "lr=0.1 --steps=5"
    folder.mkdir()
    path = write(folder, SAC.replace("gamma: float = 0.99", "gamma: float = 0.7"))
    options, config = parse_args([*before.split(), path, *after.split()])
    assert options.agent == path and config["gamma"] == (0.5 if "--gamma" in after else 0.7)


@pytest.mark.parametrize("argv, words", [
    ("other", "unknown argument 'other': the agent is agents/sac.py"),
    ("agents/sac.py other", "other"), ("agents/sac.py agents/ppo.py", "agents/ppo.py"),
    ("--log agents/sac.py agents/ppo.py", "agents/sac.py or agents/ppo.py"),
    ("--env A agents/sac.py agents/ppo.py", "agents/sac.py or agents/ppo.py")])
def test_two_words_that_could_be_the_agent_are_refused(tmp_path, capsys, argv, words):
    assert words in refused(capsys, tmp_path, argv.split())


# Numbers and seeds


@pytest.mark.parametrize("text, number", [("1e5", 100_000), ("2.5e3", 2_500), ("20_000", 20_000),
                                          ("300.0", 300)])
def test_a_whole_number_may_be_written_in_any_way(text, number):
    options, config = parse_args(["--steps", text, "--eval-every", text, "--batch-size", text])
    assert (options.steps, options.eval_every, config["batch_size"]) == (number,) * 3
    assert type(options.steps) is int


@pytest.mark.parametrize("flag", ["--steps", "--log-every", "--batch-size"])
@pytest.mark.parametrize("text", ["1.5", "1e-3", "nan", "inf", "1e400", "abc", ""])
def test_another_number_is_refused(tmp_path, capsys, flag, text):
    assert flag in refused(capsys, tmp_path, tiny(tmp_path, flag, text))


def test_bounds_of_a_space_are_numbers_of_the_same_kind():
    searched = space.read(["batch_size=logint:1e1:1e3"], type(_config()), "agents/sac.py")
    assert searched.parameters[0].bounds() == (10, 1000)
    with pytest.raises(UserError, match=r"whole numbers, not 1\.5:8"):
        space.read(["batch_size=int:1.5:8"], type(_config()), "agents/sac.py")


def test_seed_is_no_flag(tmp_path, capsys):
    """Elsewhere it is one seed; here it was their number."""
    line = refused(capsys, tmp_path, tiny(tmp_path, "--seed", "3"))
    assert "--seeds INT number of seeds" in line and "--first-seed" in line


@pytest.mark.parametrize("first", ["-1", "4294967296"])
def test_a_first_seed_out_of_range_is_refused(tmp_path, capsys, first):
    line = refused(capsys, tmp_path, tiny(tmp_path, "--first-seed", first))
    assert "--first-seed must lie in [0, 4294967295]" in line


def test_a_finished_run_is_given_more_seeds_and_the_report_pools_them(tmp_path, capsys, no_curves):
    def trained(*flags):
        assert train.run(tiny(tmp_path, "--log", "--name", "more", "--steps", "40", *flags)) == 0
        return max((tmp_path / "runs").iterdir(), key=lambda path: path.stat().st_mtime_ns)

    def methods(*folders):
        return {method.name: {env_id: sorted(result.seeds) for env_id, result
                              in method.results.items()}
                for method in runs.load(list(map(str, folders)))}

    one = trained("--seeds", "2")
    two = trained("--config", str(one / "config.json"), "--first-seed", "2", "--seeds", "3")
    assert sorted(path.name for path in two.glob("*/sac/*")) == [
        "all_seeds", "seed_2", "seed_3", "seed_4", "stack_2_4"]
    assert re.search(r"Pendulum-v1 +. +3 .* 2:-\d+\.\d", capsys.readouterr().out)
    assert methods(one, two) == {"more": {"Pendulum-v1": [0, 1, 2, 3, 4]}}
    assert report.main([str(one), str(two), "--out", str(tmp_path / "report")]) == 0
    assert "| Pendulum-v1 | more | 5 | 40 |" in (tmp_path / "report/report.md").read_text()

    def apart(number, old, new):
        """Whether a run like `two`, with this in its config.json, is a method of its own."""
        other = shutil.copytree(two, tmp_path / str(number) / two.name)
        text = (other / "config.json").read_text()
        assert old in text
        (other / "config.json").write_text(text.replace(old, new))
        if "seed" in old:
            next(other.glob("*/sac/seed_2")).rename(next(other.glob("*/sac")) / "seed_1")
        return methods(one, other).keys() == {one.name, other.name}

    assert apart(1, '"gamma": 0.99', '"gamma": 0.5') and apart(2, '"steps": 40', '"steps": 50')
    assert apart(3, '"first_seed": 2', '"first_seed": 1')
    assert not apart(4, '"name": "more"', '"name": "more"')


def test_a_study_has_no_first_seed(tmp_path, capsys):
    assert train.run(["--first-seed", "3"], Tune) == 2
    assert "--first-seed" in capsys.readouterr().err


# Settings that JSON changes


class Kind(Enum):
    A = 1
    B = 2


@dataclass(frozen=True)
class Nested:
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Config:
    hidden: list[int] = dataclasses.field(default_factory=lambda: [64, 64])
    pairs: tuple[tuple[int, int], ...] = ((1, 2), (3, 4))
    rows: list[tuple[float, str]] = dataclasses.field(default_factory=lambda: [(0.1, "a")])
    data: Path = Path("x")
    other: Path | None = None
    kind: Kind = Kind.B
    nested: Nested = Nested()
    table: dict[str, tuple[int, int]] = dataclasses.field(default_factory=lambda: {"a": (1, 2)})
    limit: float | None = float("inf")
    missing: float = float("nan")
    steps: tuple[int, ...] | None = (5,)


def test_every_setting_comes_back_from_json():
    plain = settings.plain_config(Config())
    assert plain["hidden"] == [64, 64] and plain["pairs"] == ((1, 2), (3, 4))
    assert (plain["data"], plain["kind"]) == ("x", "B")
    assert plain["nested"] == {"rate": 0.5, "sizes": (1, 2)}
    for values in (plain, json.loads(json.dumps(plain))):
        assert repr(settings.build(Config, values)) == repr(Config())


@pytest.mark.parametrize("value, hint", [
    ({1, 2}, set[int]), ({1: 2}, dict[int, int]), ((1, (2, 3)), tuple), (Path("x"), str | Path),
    (b"x", bytes), (1j, complex), (object(), object)])
def test_a_setting_that_does_not_come_back_is_named(value, hint):
    kind = dataclasses.make_dataclass("Odd", [("odd", hint, dataclasses.field(
        default_factory=lambda: value))])
    with pytest.raises(ValueError, match=r"the setting odd (cannot be written|would change)"):
        settings.plain_config(kind())


HEAD = """import enum
from dataclasses import field
from pathlib import Path


class Kind(enum.Enum):
    A = 1


"""


def with_fields(folder, *fields):
    """PPO with more settings."""
    text = Path("agents/ppo.py").read_text()
    start = text.rindex("@dataclass", 0, text.index("class Config:"))
    at = text.index("    gamma:", start)
    lines = "".join(f"    {field}  # x\n" for field in fields)
    return write(folder, text[:start] + HEAD + text[start:at] + lines + text[at:])


@pytest.mark.slow
def test_a_run_with_such_settings_is_resumed_and_read(tmp_path, capsys):
    """In processes of its own as well, which do not know its file's classes."""
    path = with_fields(tmp_path, "hidden: list[int] = field(default_factory=lambda: [64, 64])",
                       "pairs: tuple[tuple[int, int], ...] = ((1, 2), (3, 4))",
                       'data: Path = Path("x")', "kind: Kind = Kind.A")
    argv = [path, "--steps", "64", "--num-steps", "64", "--width", "8", "--eval-episodes", "1",
            "--seeds", "2", "--processes", "2", "--log", "--runs", str(tmp_path / "runs")]
    assert train.run(argv) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert train.run(["--resume", str(run)]) == 0
    assert not capsys.readouterr().err
    config = json.loads((run / "config.json").read_text())["config"]
    assert (config["kind"], config["data"], config["pairs"]) == ("A", "x", [[1, 2], [3, 4]])
    again = parse_args(["--config", str(run / "config.json")], Vectorised)  # as lab.watch does
    assert again[1] == parse_args(argv)[1]


def test_a_setting_that_cannot_be_written_is_refused_before_training(tmp_path, capsys):
    path = with_fields(tmp_path, "odd: frozenset[int] = frozenset((1, 2))")
    line = refused(capsys, tmp_path, [path, "--log", "--runs", str(tmp_path / "runs")])
    assert "mine.py: the setting odd cannot be written to config.json" in line


# Words that become files


def test_two_environments_of_one_folder_are_refused():
    jobs = make_jobs(Simple(env=("A/B-v0", "A-B-v0")), {}, 1, None)
    assert len({job.env_id for job in jobs}) == 2
    with pytest.raises(UserError, match="A/B-v0 and A_B-v0 would write to the same folder"):
        make_jobs(Simple(env=("A/B-v0", "A_B-v0")), {}, 1, None)


def test_two_studies_of_one_folder_are_refused(tmp_path):
    def opened(name):
        options = Tune(name=name, runs=tmp_path)
        _, config = parse_args([], Tune)
        searched = space.read(options.space, type(_config()), options.agent)
        [job, *_] = make_jobs(options, config, 1, None)
        folder, journal = tuning.open_study(options, config, searched, job)
        journal.close()
        return folder

    assert opened("a b") == opened("a b") == tmp_path / "studies" / "a_b"
    with pytest.raises(UserError, match="a_b is the study 'a b', not 'a_b'; choose another --name"):
        opened("a_b")


def _config():
    from lab.agent import load_agent

    return load_agent("agents/sac.py").Config()


def test_two_environments_of_a_report_have_two_pictures(tmp_path, capsys):
    for name, env_id in (("a", "A/B-v0"), ("b", "A_B-v0")):
        write_run(tmp_path / name, {env_id: {0: [1.0, 2.0, 3.0]}})
    out = tmp_path / "report"
    assert report.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)]) == 0
    assert {path.name for path in out.glob("curves*.png")} == {
        "curves_A_B-v0.png", "curves_A_B-v0-2.png"}


LONG = "x" * 300


@pytest.mark.parametrize("flags", [
    f"--log --name {LONG}", f"--log --runs {LONG}", f"{LONG}.py", f"--config {LONG}",
    f"--resume {LONG}", f"--env {LONG}-v0"])
def test_a_name_of_300_letters_is_one_line(tmp_path, capsys, flags):
    given = flags.split()
    argv = given if given[0] == "--resume" else [*tiny(tmp_path, "--log"), *given]
    assert LONG[:200] in (line := refused(capsys, tmp_path, argv)) or "too long" in line


def test_a_long_name_is_one_line_in_the_other_commands(tmp_path, capsys):
    assert report.main([LONG, "--out", str(tmp_path / "out")]) == 2
    assert report.main([str(tmp_path), "--out", LONG]) == 2
    assert guarded(lambda: watch.run([LONG])) == 2
    assert train.run(["--name", LONG, "--runs", str(tmp_path)], Tune, tuning.tune) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == err.count("error: ") == 4 and "Traceback" not in err
    assert not list(tmp_path.iterdir())


# Arguments of the environment


def test_values_are_python_literals_or_strings():
    words = ["a=1", "b=0.5", "c=None", "d=[1, 2]", "e=file.xml", "f=x=y", "g='1'", "h=", "i=(0, 1)"]
    assert read_kwargs(words) == {"a": 1, "b": 0.5, "c": None, "d": [1, 2], "e": "file.xml",
                                  "f": "x=y", "g": "1", "h": "", "i": (0, 1)}


@pytest.mark.parametrize("flags, words", [
    ("g", "--env-kwargs needs NAME=VALUE"), ("g=1 g=2", "each name once, not g=1 g=2"),
    ("1=2", "NAME=VALUE"), ("=2", "NAME=VALUE"), ("gg=1", "unexpected keyword argument 'gg'"),
    ("g=1 --env torch/Pendulum-v1", "gymnasium.make, which does not make torch/Pendulum-v1")])
def test_arguments_that_do_not_fit_are_one_line(tmp_path, capsys, flags, words):
    line = refused(capsys, tmp_path, tiny(tmp_path, "--log", "--env-kwargs", *flags.split()))
    assert words in line


@pytest.mark.parametrize("flags", [
    "--env-kwargs g=1", "--action-repeat 2", "--failure-below 0"])
@pytest.mark.parametrize("backend", ["envpool", "torch"])
def test_a_backend_that_gymnasium_does_not_make_takes_none(tmp_path, capsys, backend, flags):
    argv = ["--env", "Pendulum-v1", *flags.split(), "--backend", backend]
    assert train.run(argv, Vectorised) == 2
    assert capsys.readouterr().err == (
        f"error: {flags.split()[0]} is for environments of gymnasium.make, which does not make "
        f"Pendulum-v1 with --backend {backend}\n")


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """A run on a pendulum with less gravity, and one on the usual pendulum."""
    found = []
    for name, flags in (("light", ["--env-kwargs", "g=1.5"]), ("usual", [])):
        folder = tmp_path_factory.mktemp(name)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            argv = ["--steps", "250", "--eval-every", "250", "--log", "--name", name, *flags]
            assert train.run(tiny(folder, *argv)) == 0
        found.append((next((folder / "runs").iterdir()), " ".join(out.getvalue().split())))
    return found


def rows(run, tag):
    return [row[tag] for row in read_metrics(run / "Pendulum-v1/sac/seed_0/metrics.jsonl")
            if tag in row]


def test_training_and_evaluation_take_the_arguments_and_tables_declare_them(light):
    (run, out), (usual, usual_out) = light
    assert json.loads((run / "config.json").read_text())["options"]["env_kwargs"] == ["g=1.5"]
    for tag in ("return/train", "return/eval"):
        assert rows(run, tag)[0] != rows(usual, tag)[0]
    assert "environment made with g=1.5" in out and "made with" not in usual_out


def test_a_run_is_resumed_with_its_arguments_alone(light, tmp_path, capsys):
    (run, _), _ = light
    assert train.run(["--resume", str(run)]) == 0
    again, _ = parse_args(["--config", str(run / "config.json")])
    assert again.env_kwargs == ("g=1.5",)
    path = run / "config.json"
    before = path.read_text()
    path.write_text(before.replace("g=1.5", "g=2.5"))
    try:
        capsys.readouterr()
        assert train.run(["--resume", str(run)]) == 1
        assert "was started with env_kwargs = ('g=1.5',)" in capsys.readouterr().err
    finally:
        path.write_text(before)


def test_a_report_shows_it_as_another_environment(light, tmp_path, capsys):
    (run, _), (usual, _) = light
    assert report.main([str(run), str(usual), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| Pendulum-v1 (g=1.5) | light | 1 |" in text and "| Pendulum-v1 | usual | 1 |" in text


def test_workers_films_and_twins_take_the_arguments():
    settings = {"env_kwargs": ("g=1.5",)}
    sync = make_envs("Pendulum-v1", [0, 1], 2, **settings)
    with contextlib.closing(make_envs("Pendulum-v1", [0, 1], 2, "workers", workers=2,
                                      **settings)) as workers:
        assert sync.reset().equal(workers.reset())
        actions = sync.reset()[..., :1] * 0
        for _ in range(3):
            assert sync.step(actions).rewards.equal(workers.step(actions).rewards)
        states = sync.shard.envs + [env for each in workers.own for env in each.envs]
        assert {env.unwrapped.g for env in states} == {1.5}
    for _ in range(200):
        sync.step(actions)
    assert sync.can_restore_exactly() is True
    with contextlib.closing(camera.make("Pendulum-v1", ("g=1.5", "render_mode=human"))) as filmed:
        assert filmed.unwrapped.g == 1.5 and filmed.frame is not None
        assert filmed.unwrapped.render_mode == "rgb_array"


def test_a_study_fixes_the_arguments(tmp_path, capsys):
    """A study from before the flag has none."""
    options, config = parse_args(["--env-kwargs", "g=2"], Tune)
    [job, *_] = make_jobs(options, config, 1, None)
    assert job.env_kwargs == ("g=2",)
    tuning._compare(tmp_path, {"steps": 3}, {"steps": 3, "env_kwargs": [], "first_seed": 0})
    with pytest.raises(UserError, match=r"was started with env_kwargs \[\], not \['g=2'\]"):
        tuning._compare(tmp_path, {"steps": 3}, {"steps": 3, "env_kwargs": ["g=2"]})


# Narrow terminals


def printed(shown, columns):
    console = Console(file=io.StringIO(), width=columns)
    console.print(shown)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= columns for line in lines)
    return " ".join(" ".join(lines).replace("│", " ").split()).split()


def run_table():
    returns = {"HalfCheetah-v5": {n: 12345.6 - 101 * n for n in range(8)}, "Ant-v5": {0: -150.26}}
    return curves.table(returns, "a title"), [
        "HalfCheetah-v5", *(f"{n}:{12345.6 - 101 * n:.1f}" for n in range(8)), "0:-150.3"]


def study_table():
    parameters = space.read(["actor_lr=log:1e-4:1e-2", "batch_size=int:64:512"],
                            type(_config()), "agents/sac.py")
    config = dataclasses.asdict(_config()) | {"actor_lr": 0.00012345}
    columns = [summary.Column(name, config, -1234.5, -1200.5, [-1200.5 - n, -1300.5])
               for n, name in enumerate(("defaults", "best", "second", "third"))]
    return summary.table(parameters, columns, 8), ["0.00012345", "256", "-1234.5", "-1250.5",
                                                   "-1251.0", "-1251.5", "-1252.0"]


def report_table():
    heads = ("environment", "method", "n", "steps", "wall-clock", "mean", "95% t interval")
    rows = [["HalfCheetah-v5", "crossq", "8", "1,000,000", "2.5 h", "12,345", "11,111 to 13,333"]]
    return page._rich(page.Table(heads, rows, "caption", 2)), [
        word for cell in rows[0] for word in cell.split()]


@pytest.mark.parametrize("columns", [40, 50, 60, 70, 80, 100, 200])
@pytest.mark.parametrize("made", [run_table, study_table, report_table])
def test_every_number_can_be_read_in_a_narrow_terminal(made, columns):
    table, words = made()
    assert set(words) <= set(printed(table, columns))


def test_a_table_that_fits_is_a_table():
    assert "│" in _text(run_table()[0], 80) and "│" not in _text(run_table()[0], 40)


def _text(table, columns):
    console = Console(file=io.StringIO(), width=columns)
    console.print(table)
    return console.file.getvalue()


# Pipes and locales


def script(folder, *flags, **environment):
    argv = [sys.executable, "learn_simple.py", *tiny(folder, "--steps", "40", *flags)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            errors="replace", env=os.environ | environment)


@pytest.mark.slow
def test_a_pipe_that_closes_does_not_end_a_run(tmp_path):
    with script(tmp_path, "--log", "--seeds", "2", "--processes", "2") as process:
        assert process.stdout.readline().startswith("run folder")
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 0 and not err
    assert len(list(tmp_path.glob("runs/*/*/sac/stack_*/step_*40-*.pt"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("environment", [
    {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}])
def test_a_name_beyond_ascii_in_an_ascii_locale(tmp_path, environment):
    with script(tmp_path, "--log", "--name", "Läufe ±", **environment) as process:
        out, err = process.communicate()
    assert process.returncode == 0 and not err
    assert "Pendulum-v1" in out and (next(tmp_path.glob("runs/*")) / "learning_curves.png").exists()


def test_a_path_that_the_locale_cannot_spell_is_refused(tmp_path, capsys):
    """Python reads bytes that are no letters of the locale as half characters."""
    folder = tmp_path / os.fsdecode(b"l\xe4ufe")
    for flags in (["--runs", str(folder)], [write(tmp_path, SAC, os.fsdecode(b"l\xe4ufer.py"))]):
        assert "PYTHONUTF8=1" in refused(capsys, tmp_path, [*tiny(tmp_path, "--log"), *flags])


PRINTS = """
import sys
from lab.errors import guarded

def work():
    for number in range(3000):
        print(number, flush=number % 2 == 0)
        print(number, file=sys.stderr)
    open("ended", "w").close()
    return 0

sys.exit(guarded(work))
"""


def printing(tmp_path, **streams):
    """-> the exit code of a program that prints, and whether it got to its end."""
    code = subprocess.run([sys.executable, "-c", PRINTS], cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": os.getcwd()}, **streams).returncode
    return code, (tmp_path / "ended").exists()


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_that_a_full_disk_does_not_take_ends_nothing(tmp_path, name):
    """--log > out.txt on the disk that fills."""
    with open("/dev/full", "w") as full:
        assert printing(tmp_path, **{"stdout": subprocess.DEVNULL, name: full}) == (0, True)


def test_a_terminal_that_is_gone_ends_nothing(tmp_path):
    ours, theirs = os.openpty()
    os.close(ours)
    assert printing(tmp_path, stdout=theirs, stderr=theirs) == (0, True)
    os.close(theirs)


def test_output_goes_on_once_the_disk_has_space_again(tmp_path, monkeypatch):
    full = [True]

    class Stream(io.StringIO):
        def write(self, text):
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    def work():
        print("lost", end="")
        full.clear()
        print("kept", end="")
        return 0

    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    assert guarded(work) == 0 and stream.getvalue() == "kept"


def test_paths_inside_a_run_may_be_relative_to_its_folders(tmp_path, monkeypatch):
    run = tmp_path / "run"
    stack = run / "Pendulum-v1/sac/stack_0_1"
    stack.mkdir(parents=True)
    (stack.parent / "seed_0").mkdir()
    (stack / "step_5.pt").touch()
    (run / "config.json").write_text("{}")
    monkeypatch.chdir(stack.parent)
    whole = {stack.parent: {0: stack, 1: stack}}
    for path, found in ((".", whole), ("seed_0", {stack.parent: {0: stack}}), ("..", whole),
                        ("./seed_0", {stack.parent: {0: stack}}), ("../..", whole)):
        assert recorder.find_run(Path(path)).resolve() == run
        assert {group.resolve(): {seed: stack.resolve() for seed, stack in stacks.items()}
                for group, stacks in recorder.find_stacks(Path(path)).items()} == found, path
    assert checkpoint.find_sources(Path("seed_0"), [7, 8]) == [(stack, 0)] * 2
