"""What the README says is so."""

import json
import math
import re
import shlex
import shutil
import statistics
import subprocess
import textwrap
from pathlib import Path

import pytest
from scipy import stats

from bench import learning, readme, speed, throughput, tuning
from bench import plan as measured_plans
from lab import train
from lab.check import __main__ as check
from lab.options import SCRIPTS, Tune, Vectorised, parse_args, parse_flags, resolve_defaults
from lab.plan import __main__ as plan
from lab.plan import candidates
from lab.report import __main__ as report
from lab.training.job import make_jobs
from lab.tuning import run as study
from lab.watch import __main__ as watch

README = Path("README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True)[1:] for line in README.splitlines()
            if re.match(r"python (learn_\w+|hypertune)\.py", line) and "--help" not in line]


def test_the_loop_that_is_quoted_is_the_loop_that_runs():
    (loop,) = (code for code in PYTHON if "agent.act" in code)
    code = textwrap.indent(loop, 8 * " ")
    assert code in Path("lab/training/loop.py").read_text()


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_every_command_can_be_read(argv, tmp_path):
    mine = shutil.copy("agents/sac.py", tmp_path / "mine.py")
    script, *argv = [str(mine) if arg == "../mine.py" else arg for arg in argv]
    (kind,) = (kind for kind, name in SCRIPTS.items() if name == script)
    options, config = parse_args(argv, kind)
    if kind is Tune:
        assert study.check(options, config)
    assert make_jobs(resolve_defaults(options), {}, 2, None)


@pytest.mark.parametrize("module, argv", [
    (module, shlex.split(words, comments=True))
    for module, words in re.findall(r"^python -m lab\.(\w+) (.*)", README, re.MULTILINE)])
def test_every_module_that_is_called_can_read_its_flags(module, argv, tmp_path, monkeypatch):
    mine = shutil.copy("agents/sac.py", tmp_path / "mine.py")
    argv = [str(mine) if arg == "../mine.py" else arg for arg in argv]
    if module == "plan":
        planned = []
        monkeypatch.setattr(candidates, "measure", lambda options, *rest: planned.append(options))
        assert plan.run(argv) == 0 and planned[0].seeds > 1
    elif module == "check":
        assert check.parse(argv).config
    elif module == "report":
        assert report.parse(argv).runs
    else:
        assert module == "watch" and parse_flags(watch.Options, argv, "").path


def test_the_environment_that_is_quoted_trains(tmp_path, monkeypatch):
    (code,) = (code for code in PYTHON if "torch_tasks" in code)
    (tmp_path / "my_envs.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    argv = "agents/ppo.py --env my_envs:torch/Push-v0 --num-envs 64 --steps 4096 --update-epochs 1"
    assert train.run(argv.split(), Vectorised) == 0


def test_every_path_that_is_named_exists():
    for path in re.findall(r"\b(?:agents|lab|bench|tests)/[\w/.-]*\w", README):
        assert Path(path).exists(), path


def result(name):
    return json.loads((learning.RESULTS / f"{name}.json").read_text())


TABLES = {
    "learning.md": lambda: learning.table(learning.read()),
    "bf16.md": lambda: learning.pairs(learning.read()),
    "speed.md": lambda: speed.summary(result("speed")),
    "speed-spread.md": lambda: speed.markdown(result("speed")),
    "speed-amx.md": lambda: speed.summary(result("speed-amx")),
    "speed-amx-spread.md": lambda: speed.markdown(result("speed-amx")),
    "throughput.md": lambda: throughput.markdown(result("throughput")),
    "tuning.md": lambda: tuning.markdown(result("tuning")),
    "plan.md": lambda: measured_plans.markdown(result("plan")),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_follows_from_its_result_file(name):
    assert (learning.RESULTS / name).read_text() == TABLES[name]()


def test_the_tables_are_the_committed_ones():
    assert readme.filled(README) == README
    marked = re.findall(r"<!-- bench/results/(\S+) -->", README)
    assert sorted(marked) == sorted(name for name in TABLES if not name.endswith("spread.md"))


def ratio(name, one, other):
    """Of two cases of a result file."""
    speeds = {tuple(row["case"]): row["steps_per_s"] for row in result(name)["rows"]}
    return speed.median_ratio(speeds[one], speeds[other])


def ours(algorithm, seeds, mode, peer, name="speed"):
    return ratio(name, (algorithm, "lab", seeds, mode), (algorithm, peer, "1", "fp32"))


def last(name):
    return learning.last(learning.read()[name])[1]


def mean_at(name, step):
    return statistics.fmean(
        value for (_, at), value in learning.read()[name].items() if at == step)


def standard_error(name):
    return stats.sem(last(name))


def mean_over_run(name):
    return statistics.fmean(learning.read()[name].values())


# What the README says in words, and the figures in it.
PROSE = {
    "PPO {:.1f} and SAC {:.1f} times as many seed-steps a second on one core (8 seeds; SAC in "
    "bf16, {:.1f} in fp32)": lambda: [
        ours("ppo", "8", "fp32-compiled", "sb3"), ours("sac", "8", "bf16-compiled", "sb3"),
        ours("sac", "8", "fp32-compiled", "sb3")],
    "PPO {:.1f}, SAC {:.1f}, CrossQ {:.1f}, DroQ {:.1f} times as many (all but PPO in bf16), with "
    "AMX CrossQ {:.1f} and DroQ {:.1f}; in fp32 {:.2f}, {:.2f} and {:.2f}": lambda: [
        ours("ppo", "8", "fp32-compiled", "sbx"), ours("sac", "8", "bf16-compiled", "sbx"),
        *(ours(name, "4", "bf16-compiled", "sbx") for name in ("crossq", "droq")),
        *(ours(name, "4", "bf16-compiled", "sbx", "speed-amx") for name in ("crossq", "droq")),
        ours("sac", "8", "fp32-compiled", "sbx"),
        *(ours(name, "4", "fp32-compiled", "sbx") for name in ("crossq", "droq"))],
    "one seed of SAC in fp32 is faster there ({:.2f})": lambda: [
        ours("sac", "1", "fp32-compiled", "sbx")],
    "passes 2.5 x with 4 seeds, not with one ({:.2f})": lambda: [
        ours("droq", "1", "bf16-compiled", "sbx", "speed-amx")],
    "stops training for {:.2%} of the five minutes": lambda: [
        result("checkpoints")["share_of_five_minutes"]],
    "Workers step HalfCheetah {:.0f} times as fast as gymnasium's AsyncVectorEnv, at {:.0%} of "
    "twice a bare loop": lambda: [
        ratio("throughput", ("HalfCheetah", "lab workers"), ("HalfCheetah", "gymnasium async")),
        ratio("throughput", ("HalfCheetah", "lab workers"),
              ("HalfCheetah", "bare loop, one core")) / 2],
    "32 environments of one seed train {:.1f} times as fast as SB3's, 4 seeds of 8 environments "
    "each {:.1f} times": lambda: [
        ratio("throughput", ("training", side), ("training", "sb3 SubprocVecEnv"))
        for side in ("lab, 1 seed x 32", "lab, 4 seeds x 8")],
    "it saved {:.1%} of the environment steps, at confirmed returns of {:.0f} with it and {:.0f} "
    "without": lambda: [
        1 - result("pruning")["rows"][0]["steps"] / result("pruning")["rows"][1]["steps"],
        *(sum(row["confirmed"]) / len(row["confirmed"]) for row in result("pruning")["rows"])],
    "take {} MiB in all": lambda: [result("speed")["memory_mib_8_seeds_sac_100k_steps"]],
    "one standard error ({:.0f} on HalfCheetah, {:.0f} on Hopper)": lambda: [
        standard_error("crossq-halfcheetah"), standard_error("crossq-hopper")],
    "in bf16 on Walker2d just outside ({:.0f})": lambda: [standard_error("crossq-walker2d")],
    "DroQ on Hopper reaches the published mean ({:.0f})": lambda: [
        statistics.fmean(last("droq-hopper"))],
    "two of its four seeds hop, two never pass {:.0f}": lambda: [10 * math.ceil(max(
        value for (seed, _), value in learning.read()["droq-hopper"].items()
        if seed in (0, 2)) / 10)],
    "PPO's walker on BipedalWalker-v3 scores {:.0f}, not 300": lambda: [
        statistics.fmean(last("ppo-biped"))],
    "its three seeds average {:.0f} on BipedalWalker-v3 after 80 000 steps and {:.0f} after "
    "160 000": lambda: [mean_at("bro-biped", 80_000), mean_at("bro-biped", 160_000)],
    "the run ends at {:.0f}: the critics' weights": lambda: [statistics.fmean(last("bro-biped"))],
    "BRO after {} 000, at {:.0f},": lambda: [
        learning.last(learning.read()["bro-hardcore"])[0] // 1000,
        statistics.fmean(last("bro-hardcore"))],
    "CrossQ on Hopper is {:.0%} lower in bf16": lambda: [
        1 - mean_over_run("crossq-hopper-bf16") / mean_over_run("crossq-hopper")],
}


def test_with_amx_the_goals_are_passed_that_the_readme_names():
    def amx(algorithm, seeds, mode):
        return ours(algorithm, seeds, mode, "sbx", "speed-amx")

    assert amx("crossq", "1", "bf16-compiled") > 3 and amx("crossq", "1", "fp32-compiled") > 1.2
    assert amx("droq", "1", "fp32-compiled") > 1.5 and amx("droq", "4", "bf16-compiled") > 2.5


@pytest.mark.parametrize("sentence", PROSE)
def test_a_figure_in_words_is_the_result_files(sentence):
    assert sentence.format(*PROSE[sentence]()) in " ".join(README.split())


def test_every_result_has_its_settings_and_its_picture():
    for name in learning.read():
        for file in ("config.json", "versions.json", learning.PICTURE):
            assert (learning.RESULTS / name / file).exists(), f"{name}/{file}"


@pytest.mark.parametrize("name", learning.read())
def test_a_results_settings_are_its_commands_and_can_be_taken(name):
    argv = ["--config", str(learning.RESULTS / name / "config.json")]
    taken, command = parse_args(argv, learning.kind(name)), learning.settings(name)
    assert {key: value for key, value in taken[1].items()
            if command[1][key] is not None} == {  # what a command leaves open the run has settled
        key: value for key, value in command[1].items() if value is not None}
    for option in ("agent", "env", "seeds", "steps", "clip_reward", "compile", "precision"):
        assert getattr(taken[0], option) == getattr(command[0], option), option


@pytest.mark.skipif(shutil.which("diff") is None, reason="no diff")
@pytest.mark.parametrize("fork, base, most", [
    ("droq", "sac", 40), ("crossq", "sac", 90), ("bro", "crossq", 60), ("cem", "crossq", 120)])
def test_a_fork_costs_what_the_readme_says(fork, base, most):
    diff = subprocess.run(["diff", "-wB", f"agents/{base}.py", f"agents/{fork}.py"],
                          capture_output=True, text=True).stdout
    lines = sum(line[:1] in "<>" and bool(line[1:].strip()) for line in diff.splitlines())
    assert 20 < lines <= most
    assert re.search(rf"agents/{fork}.py` .* \| {base} \| {lines} \|", README)
