"""Statements in README.md and docs/ are true."""

import json
import math
import re
import shlex
import shutil
import statistics
import textwrap
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bench import (
    breakdown,
    cluster,
    learning,
    memory,
    pruning,
    readme,
    speed,
    throughput,
    tuned,
    tuning,
)
from bench import plan as measured_plans
from bench import policy as measured_policies
from lab import evaluate, train
from lab import stats as lab_stats
from lab.check import __main__ as check
from lab.check.checks import CHECKS
from lab.command_line import given_flags, parse_args, parse_flags
from lab.export import __main__ as export
from lab.options import SCRIPTS, Tune, Vectorised, refuse_unused, resolve_defaults
from lab.plan import __main__ as plan
from lab.plan import candidates
from lab.report import __main__ as report
from lab.training.job import make_jobs
from lab.tuning import run as tuning_run
from lab.watch import __main__ as watch
from tests import house
from tests.small_run import train as trained

PAGES = {str(path.relative_to(readme.ROOT)): path.read_text() for path in readme.PAGES}
README, ALL = PAGES["README.md"], "\n".join(PAGES.values())
PYTHON = re.findall(r"```python\n(.*?)```", ALL, re.DOTALL)
COMMANDS = list(dict.fromkeys(re.findall(
    r"^python ((?:learn_\w+|hypertune)\.py(?: (?!#).*)?)$", ALL, re.MULTILINE)))
MODULES = list(dict.fromkeys(re.findall(r"^python -m lab\.(\w+) (.*)", ALL, re.MULTILINE)))
LOOP = Path("lab/training/loop.py")


def test_the_pages_are_read():
    assert len(PAGES) > 10 and len(COMMANDS) > 6
    assert {module for module, _ in MODULES} == {
        "plan", "check", "report", "watch", "evaluate", "export"}
    assert all(any(line.startswith(f"python {name}") for line in README.splitlines())
               for name in ("learn_simple.py", "learn_vectorised.py", "hypertune.py"))


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 170


def without_blocks(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text):
    """GitHub's: lower case, no punctuation, hyphens for spaces, a number on one that repeats."""
    found = []
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", without_blocks(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None
                     for other in found)
        found.append(f"{slug}-{number}" if number else slug)
    return found


def test_anchors_are_githubs():
    text = "# A b, c\n## `x_y` of a [link](z.md)\n## A b, c\n```\n# no heading\n```\n"
    assert anchors(text) == ["a-b-c", "x_y-of-a-link", "a-b-c-1"]


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", without_blocks(text)))


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_anchor_resolves(page):
    for link in links(PAGES[page]):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        path = (readme.ROOT / page).parent / target if target else readme.ROOT / page
        assert path.is_file(), f"{page} links to {link}"
        if anchor:
            assert path.suffix == ".md" and anchor in anchors(path.read_text()), f"{page}: {link}"


def test_every_page_of_docs_is_linked_from_the_readme():
    assert set(PAGES) - {"README.md"} <= {link.partition("#")[0] for link in links(README)}


def test_the_loop_that_is_quoted_is_the_loop_that_runs():
    (loop,) = (code for code in PYTHON if "agent.act" in code)
    code = textwrap.indent(loop, 8 * " ")
    assert code in LOOP.read_text()


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """For the commands that need a run."""
    return str(trained(tmp_path_factory.mktemp("runs"), env=("Pendulum-v1",), eval_env="none"))


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_can_be_read(line, tmp_path, walk):
    line = line.replace("runs/walk", walk)
    mine = shutil.copy("agents/sac.py", tmp_path / "mine.py")
    script, *argv = [str(mine) if arg == "../mine.py" else arg
                     for arg in shlex.split(line, comments=True)]
    (kind,) = (kind for kind, name in SCRIPTS.items() if name == script)
    options, config = parse_args(argv, kind)
    refuse_unused(options, given_flags(argv))
    if kind is Tune:
        assert tuning_run.check(options, config)
    assert make_jobs(resolve_defaults(options), {}, 2, None)


@pytest.mark.parametrize("module, words", MODULES)
def test_every_module_that_is_called_can_read_its_flags(module, words, tmp_path, monkeypatch):
    mine = shutil.copy("agents/sac.py", tmp_path / "mine.py")
    argv = [str(mine) if arg == "../mine.py" else arg for arg in shlex.split(words, comments=True)]
    if module == "plan":
        planned = []
        monkeypatch.setattr(candidates, "measure", lambda options, *rest: planned.append(options))
        assert plan.run(argv) == 0 and planned[0].seeds > 1
    elif module == "check":
        assert check.parse(argv).config
    elif module == "report":
        assert report.parse(argv).runs
    else:
        options = {"watch": watch, "evaluate": evaluate, "export": export}[module].Options
        assert parse_flags(options, argv, "").path


def test_the_environment_that_is_quoted_trains(tmp_path, monkeypatch):
    (code,) = (code for code in PYTHON if "torch_tasks" in code)
    (tmp_path / "my_envs.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    argv = "agents/ppo.py --env my_envs:torch/Push-v0 --num-envs 64 --steps 4096 --update-epochs 1"
    assert train.run(argv.split(), Vectorised) == 0


def test_the_environments_that_are_quoted_train(tmp_path, monkeypatch):
    """Those that need no other library."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, agent, env_id in (("masked", "ppo_discrete", "masked:MaskedTaxi-v0"),
                                ("stacked", "ppo", "stacked:Stacked-v0")):
        (code,) = (code for code in PYTHON if code.startswith(f"# {name}.py"))
        (tmp_path / f"{name}.py").write_text(code)
        argv = f"agents/{agent}.py --env {env_id} --steps 64 --num-steps 32 --num-minibatches 4"
        assert train.run([*argv.split(), "--eval-episodes", "1"]) == 0


def test_the_checks_that_are_quoted_are_those_of_the_checker():
    lines = re.findall(r"^(?:passed|FAILED)  ([^:\n]*)", PAGES["docs/own-agent.md"], re.MULTILINE)
    assert len(lines) > 4 and set(lines) <= set(CHECKS)
    ((passed, all_of_them),) = re.findall(r"(\d+) of (\d+) checks passed", ALL)
    assert int(all_of_them) == len(CHECKS) == int(passed) + 1


def test_every_path_that_is_named_exists():
    for path in re.findall(r"\b(?:agents|lab|bench|tests|docs)/[\w/.-]*\w", ALL):
        assert Path(path).exists(), path


def test_every_module_has_its_place_in_the_architecture():
    for path in Path("lab").rglob("*.py"):
        assert path.name == "__init__.py" or f"`{path}`" in PAGES["docs/architecture.md"], path


def result(name):
    return json.loads((learning.RESULTS / f"{name}.json").read_text())


TABLES = {
    "learning.md": lambda: learning.table(learning.read()),
    "summary.md": lambda: learning.summary(learning.read()),
    "mujoco.md": lambda: learning.mujoco(learning.read()),
    "mujoco-300k.md": lambda: learning.mujoco(learning.read(), 300_000),
    "bf16.md": lambda: learning.pairs(learning.read()),
    "speed.md": lambda: speed.summary(result("speed")),
    "speed-spread.md": lambda: speed.markdown(result("speed")),
    "speed-amd.md": lambda: speed.summary(result("speed-amd")),
    "speed-amd-spread.md": lambda: speed.markdown(result("speed-amd")),
    "breakdown.md": lambda: breakdown.markdown(result("breakdown")),
    "throughput.md": lambda: throughput.markdown(result("throughput")),
    "tuning.md": lambda: tuning.markdown(result("tuning")),
    "pruning.md": lambda: tuning.pruning_table(result("pruning")["rows"]),
    "pruning-replay.md": lambda: pruning.table(result("pruning-replay")),
    "tuned.md": lambda: tuned.table(tuned.rows()),
    "plan.md": lambda: measured_plans.markdown(result("plan")),
    "memory.md": lambda: memory.markdown(result("memory")["mib"]),
    "cluster.md": lambda: cluster.markdown(result("cluster")),
    "policy.md": lambda: measured_policies.markdown(result("policy")),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_follows_from_its_result_file(name):
    assert (learning.RESULTS / name).read_text() == TABLES[name]()


def test_the_tables_are_the_committed_ones():
    for page, text in PAGES.items():
        assert readme.filled(text) == text, f"{page}: run python bench/readme.py"
    marked = re.findall(r"<!-- bench/results/(\S+) -->", ALL)
    assert sorted(marked) == sorted(name for name in TABLES if not name.endswith("spread.md"))


def ratio(name, one, other):
    """Of two cases of a result file."""
    speeds = {tuple(row["case"]): row["steps_per_s"] for row in result(name)["rows"]}
    return speed.median_ratio(speeds[one], speeds[other])


def transitions(replay_ratio=1.0, **case):
    """SAC's per second with 32 environments."""
    case = case | {"replay_ratio": replay_ratio}
    (row,) = (row for row in result("breakdown")["rows"] if case.items() <= row.items())
    return breakdown.NUM_ENVS / sum(row["seconds"].values())


def operations(**case):
    """Shares of SAC's update."""
    (row,) = (row for row in result("breakdown")["operations"] if case.items() <= row.items())
    return row["shares"]


def ours(algorithm, seeds, mode, peer, name="speed"):
    return ratio(name, (algorithm, "lab", seeds, mode), (algorithm, peer, "1", "fp32"))


def test_what_one_driver_of_a_cluster_manages():
    measured, text = result("cluster"), PAGES["docs/cluster.md"]
    times = [f"{sum(row[key] for row in measured['sweep']):.0f} s"
             for key in ("local_s", "ray_s", "local_cpu_s", "ray_cpu_s")]
    assert "{} on the local engine and {} on Ray over both repeats, and {} and {} of CPU".format(
        *times) in text
    work = measured["study"]["10000"]
    seconds = work["ask"] + work["rank"] + 10 * work["prune"]
    assert round(seconds) == 7 and "about 7 s of CPU for each trial" in text
    assert 3600 / seconds == pytest.approx(490, rel=0.01) and "no more than 490 workers" in text
    assert max(trials["ask"] for trials in measured["study"].values()) < 5


def last(name):
    return learning.last(learning.read()[name])[1]


def mean_at(name, step, *others):
    """Over the seeds of these runs."""
    return statistics.fmean(value for run in (name, *others)
                            for (_, at), value in learning.read()[run].items() if at == step)


def standard_error(name):
    return stats.sem(last(name))


def mean_over_run(name):
    return statistics.fmean(learning.read()[name].values())


def on_gpu(part):
    """The mean of the repeats."""
    (speeds,) = (values for name, values in result("gpu")["speeds"].items() if part in name)
    return statistics.fmean(speeds)


def h100(name):
    """Of the second run: the entry of that name."""
    return result("gpu-h100")["results"][name]


def h100_median(name):
    return statistics.median(h100(name)["repeats"])


def h100_point(name, step):
    """-> seconds since the start and mean return, at the first evaluation from `step` on."""
    return next((seconds, value) for at, seconds, value, _ in h100(name)["curve"] if at >= step)


def of_td3(steps=100_000):
    """Over all tasks of mujoco.md or mujoco-300k.md: XQC's mean here with its 95% interval, and the
    best published one."""
    rows = [line.split("|") for line in learning.mujoco(learning.read(), steps).splitlines()[2:]]
    here = [float(row[-2]) for row in rows if "xqc, here" in row[1]]
    scores = [(np.array(last(learning.on_mujoco("xqc", env, steps))) - random) / (td3 - random)
              for env, (random, td3) in learning.TD3.items()]
    bounds = lab_stats.stratified_bootstrap(
        scores, lambda tasks: np.mean([task.mean(-1) for task in tasks], 0))
    return [*here, *bounds, max(float(row[-2]) for row in rows if "here" not in row[1])]


def fresh(name, fell):
    """The fresh episodes that ended so."""
    return [row for row in result(f"{name}/fresh")["episodes"]
            if row["terminated"] and (row["last_reward"] < -99) == fell]


def fresh_return(name, fell):
    return statistics.fmean(row["episode_return"] for row in fresh(name, fell))


def hardcore_500k():
    """On unseen terrains after 500 000 steps: the mean, its 95% interval, the share finished."""
    returns, finished = learning.read_fresh("xqc-hardcore-500k")
    return [*lab_stats.t_interval(returns), finished]


# The fastest mode of each agent.
BEST = [("ppo", "8", "fp32-compiled"), ("sac", "8", "bf16-compiled"),
        ("crossq", "4", "bf16-compiled"), ("droq", "4", "bf16-compiled")]
# What the pages say in words, and the figures in it.
PROSE = {
    "PPO {:.1f} and SAC {:.1f} times the steps/s, summed over seeds, on one core with AMX (8 "
    "seeds; SAC in bf16, {:.1f} in fp32), {:.1f} and {:.1f} on one without": lambda: [
        *(ours(*case, "sb3") for case in (*BEST[:2], ("sac", "8", "fp32-compiled"))),
        *(ours(*case, "sb3", "speed-amd") for case in BEST[:2])],
    "PPO {:.1f}, SAC {:.1f}, CrossQ {:.1f}, DroQ {:.1f} times as many with AMX (PPO and SAC: 8 "
    "seeds, CrossQ and DroQ: 4; all but PPO in bf16), {:.1f}, {:.1f}, {:.1f} and {:.1f} without":
    lambda: [ours(*case, "sbx", name) for name in ("speed", "speed-amd") for case in BEST],
    "Eight seeds of PPO make {:.1f} times the steps/s, summed over seeds, of four, and {:.1f} "
    "times as many as one": lambda: [
        ratio("speed", ("ppo", "lab", "8", "fp32-eager"), ("ppo", "lab", n, "fp32-eager"))
        for n in ("4", "1")],
    "a second torch thread {:.0%}": lambda: [
        transitions(workers=1, threads=2) / transitions(workers=1, threads=1) - 1],
    "the products are only {:.0%} of the update": lambda: [
        operations(seeds=8, precision="bf16")["matrix products"]],
    "faster to step them in two processes ({:.2f} times": lambda: [
        transitions(workers=2, threads=1, replay_ratio=1 / 32)
        / transitions(workers=1, threads=1, replay_ratio=1 / 32)],
    "CrossQ makes {:.2f} of the steps/s with one seed and {:.2f} with eight": lambda: [
        ratio("speed-templates", *(("crossq", side, seeds, "bf16-compiled")
                                   for side in ("checkout", "lab"))) for seeds in ("1", "8")],
    "SAC makes {:.2f} of the steps/s with one seed and {:.2f} with eight, CrossQ {:.2f} and {:.2f}":
    lambda: [ratio("speed-medium", (name, "checkout", seeds, "fp32-compiled"),
                   (name, "lab", seeds, "bf16-compiled"))
             for name in ("sac", "crossq") for seeds in ("1", "8")],
    "one seed of SAC in fp32 runs here at {:.2f} of its speed": lambda: [
        ours("sac", "1", "fp32-compiled", "sbx")],
    "Eight seeds make {:.1f} times as many steps, summed over them, as SBX in bf16 (target 2) and "
    "{:.1f} times in fp32 (target 1.4)": lambda: [
        ours("sac", "8", f"{precision}-compiled", "sbx") for precision in ("bf16", "fp32")],
    "Eight seeds make {:.2f} times as many steps as SB3 in eager mode (target 5) and {:.2f} times "
    "compiled (target 7)": lambda: [
        ours("ppo", "8", f"fp32-{how}", "sb3") for how in ("eager", "compiled")],
    "passes 2.5 x with 4 seeds, not with one ({:.2f})": lambda: [
        ours("droq", "1", "bf16-compiled", "sbx")],
    "8 stacked seeds of PPO run at {:.1f} times the steps/s of Stable-Baselines3, summed over "
    "seeds, and of SAC (bf16) at {:.1f} times":
    lambda: [ours("ppo", "8", "fp32-compiled", "sb3"), ours("sac", "8", "bf16-compiled", "sb3")],
    "{} seeds, means of two repeats": lambda: [result("gpu")["seeds"]],
    "with {} environments per seed, compiled, random actions: {:.0f} million environment steps/s":
    lambda: [result("gpu")["environments"], on_gpu("torch/Pendulum") / 1e6],
    "(rollouts of 32 steps, 8 minibatches, one epoch): {:.0f} million transitions/s": lambda: [
        on_gpu("PPO") / 1e6],
    "CUDA graphs: {:.0f} updates/s summed over {} seeds. A plain eager loop of one seed makes "
    "{:.0f} updates/s. The stack makes {:.0f} times as many in total, and {:.0f} times as many per "
    "seed": lambda: [
        round(on_gpu("SAC, stacked"), -2), result("gpu")["seeds"], on_gpu("SAC, plain"),
        on_gpu("SAC, stacked") / on_gpu("SAC, plain"),
        on_gpu("SAC, stacked") / on_gpu("SAC, plain") / result("gpu")["seeds"]],
    "CUDA graphs: {:.0f} updates/s in total, {:.0f} times a plain eager loop of one seed ({:.0f} "
    "updates/s, one repeat; {:.0f} in the first run). It needs {:.1f} GB": lambda: [
        h100_median("SAC, bf16, S=32"),
        h100_median("SAC, bf16, S=32") / h100_median("SAC, plain loop"),
        h100_median("SAC, plain loop"), on_gpu("SAC, plain"),
        h100("SAC, bf16, S=32")["memory_GB"]],
    "{:.1f} times rl8's transitions/s at 8 x 4096 environments, {:.1f} times at 8 x 32768":
    lambda: [
        h100_median("PPO, bf16, 8 x 4096") / h100_median("rl8's PPO, 1 x 32768"),
        h100_median("PPO, bf16, 8 x 32768") / h100_median("rl8's PPO, 1 x 262144")],
    "At 8 x 131072 it makes {:.0f} million transitions/s": lambda: [
        h100_median("PPO, bf16, 8 x 131072") / 1e6],
    "CrossQ returns {1:.0f} after 15000 steps of each seed, {0:.0f} s after its first row":
    lambda: [*h100_point("CrossQ, HalfCheetah-v4", 15_000)],
    "SAC {1:.0f} after 20000 steps in {0:.0f} s": lambda: [
        *h100_point("SAC, HalfCheetah-v4", 20_000)],
    "Both together make {:.0f} steps/s": lambda: [
        h100_median("SAC, HalfCheetah-v4") + h100_median("CrossQ, HalfCheetah-v4")],
    "mean return {1:.0f} of at most 500 after 5 million steps of each seed, {0:.1f} s": lambda: [
        *h100_point("PPO, torch/Quadrotor-v0", 5_000_000)],
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
    "All five seeds walk: {:.0f} on average after 60 000 steps, each above {:.0f}, and {:.0f} "
    "after 200 000": lambda: [
        mean_at("xqc-biped", 60_000), math.floor(min(
            value for (_, step), value in learning.read()["xqc-biped"].items() if step == 60_000)),
        statistics.fmean(last("xqc-biped"))],
    "HalfCheetah returns {:.0f} on average ({:.0f} to {:.0f}), Hopper {:.0f} ({:.0f} to {:.0f}), "
    "Walker2d {:.0f} ({:.0f} to {:.0f}), Ant {:.0f} ({:.0f} to {:.0f}) and Humanoid {:.0f} ("
    "{:.0f} to {:.0f})": lambda: [
        of(last(learning.on_mujoco("xqc", env, 300_000))) for env in learning.TD3
        for of in (statistics.fmean, min, max)],
    "After 300 000 steps our mean is {:.2f} ({:.2f} to {:.2f} by the same bootstrap)":
    lambda: of_td3(300_000)[:3],
    "FlashSAC, the best published one, {:.2f}": lambda: of_td3(300_000)[3:],
    "XQC's is {:.2f}. Humanoid falls furthest short of the paper's XQC: {:.0f}": lambda: [
        of_td3(300_000)[0], statistics.fmean(last("xqc-humanoid-300k"))],
    "fall, one of Walker2d to {:.0f} after 210 000 steps and one of Hopper to {:.0f} after 180 000":
    lambda: [min(value for (_, at), value in learning.read()[f"xqc-{name}-300k"].items()
                 if at == step) for name, step in (("walker2d", 210_000), ("hopper", 180_000))],
    "all five seeds walk as well: {:.0f} on average after 200 000 steps": lambda: [
        statistics.fmean(last("xqc-biped-raw"))],
    "return {:.0f} on 500 such terrains and finish {:.0%} of them": lambda: [
        statistics.fmean(learning.read_fresh("xqc-hardcore")[0]),
        learning.read_fresh("xqc-hardcore")[1]],
    "A finished course returns {:.0f} on average and a fall {:.0f}": lambda: [
        fresh_return("xqc-hardcore", fell=False), fresh_return("xqc-hardcore", fell=True)],
    "seeds 0 to 4 return {:.0f} on 500 unseen terrains (95% interval {:.0f} to {:.0f}) and finish "
    "{:.0%} of them": hardcore_500k,
    "Four of them return {:.0f} to {:.0f}. Seed 2 returns {:.0f}": lambda: [
        sorted(learning.read_fresh("xqc-hardcore-500k")[0])[k] for k in (1, -1, 0)],
    "no evaluation of it is above {:.0f}, and it falls on {} of its 100 terrains": lambda: [
        max(value for (seed, _), value in learning.read()["xqc-hardcore-500k"].items()
            if seed == 2),
        sum(row["seed"] == 2 for row in fresh("xqc-hardcore-500k", fell=True))],
    "it has {:.0f} and, with the smaller learning rate, {:.0f} after 500 000 steps, but {:.0f} "
    "after 700 000 and {:.0f} after a million": lambda: [
        *(learning.read()[f"xqc-hardcore-{run}"][2, step] for run, step in (
            ("seeds-0-to-4", 500_000), ("small-steps", 500_000), ("seeds-0-to-4", 700_000))),
        result("xqc-hardcore-small-steps/fresh")["seeds"]["2"]["return"]],
    "Trained for as long, they have {:.0f}, with one seed": lambda: hardcore_500k()[:1],
    "seeds 0 to 4 have {:.0f}, seeds 5 to 9 {:.0f}": lambda: [
        mean_at(f"xqc-hardcore{which}", 500_000) for which in ("-seeds-0-to-4", "")],
    "All ten have {:.0f} after 500 000 steps and {:.0f} after 700 000": lambda: [
        mean_at("xqc-hardcore", step, "xqc-hardcore-seeds-0-to-4") for step in (500_000, 700_000)],
    "With a learning rate of 3e-4 to 3e-5, five seeds had {:.0f} after 500 000 steps and {:.0f} "
    "after 700 000; after a million they return {:.0f}":
    lambda: [*(mean_at("xqc-hardcore-small-steps", step) for step in (500_000, 700_000)),
             statistics.fmean(learning.read_fresh("xqc-hardcore-small-steps")[0])],
    "hardcore course ({:.0f} on average; {:.0f} with 3e-4 to 3e-5)": lambda: [
        mean_at(f"xqc-hardcore-{run}", 300_000) for run in ("seeds-0-to-4", "small-steps")],
    "XQC returns {:.0f} on average after 50 000 steps, where CrossQ has {:.0f}": lambda: [
        statistics.fmean(last(f"{agent}-lunarlander")) for agent in ("xqc", "crossq")],
    "with `--tau 0.05` the mean is {:.0f}": lambda: [
        statistics.fmean(last("xqc-lunarlander-fast-targets"))],
    "all five seeds land, {:.0f} on average ({:.0f} to {:.0f})": lambda: [
        of(last("xqc-lunarlander-held-noise")) for of in (statistics.fmean, min, max)],
    "SAC ends at {:.0f} and CrossQ at {:.0f} after 200 000 steps": lambda: [
        statistics.fmean(last(f"{agent}-biped-raw")) for agent in ("sac", "crossq")],
    "later ({:.0f} after 80 000 steps, where the changed task has {:.0f})": lambda: [
        mean_at(name, 80_000) for name in ("xqc-biped-raw", "xqc-biped")],
    "XQC has a mean score of {:.2f} ({:.2f} to {:.2f}) and the best published agent {:.2f}; after "
    "300 000 steps, {:.2f} and {:.2f}": lambda: [*of_td3(), *of_td3(300_000)[::3]],
    "by a bootstrap over the seeds of each task, is {:.2f} to {:.2f}": lambda: of_td3()[1:3],
    "take {} MiB in all": lambda: [result("speed")["memory_mib_8_seeds_sac_100k_steps"]],
    "one standard error ({:.0f} on HalfCheetah, {:.0f} on Hopper)": lambda: [
        standard_error("crossq-halfcheetah"), standard_error("crossq-hopper")],
    "and so is the one in bf16 on Walker2d ({:.0f})": lambda: [
        standard_error("crossq-walker2d")],
    "DroQ on Hopper reaches the published mean ({:.0f})": lambda: [
        statistics.fmean(last("droq-hopper"))],
    "two of its four seeds hop, two never pass {:.0f}": lambda: [10 * math.ceil(max(
        value for (seed, _), value in learning.read()["droq-hopper"].items()
        if seed in (0, 2)) / 10)],
    "PPO's walker on BipedalWalker-v3 scores {:.0f}, not 300": lambda: [
        statistics.fmean(last("ppo-biped"))],
    "its three seeds average {:.0f} on BipedalWalker-v3 after 80 000 steps and {:.0f} after "
    "160 000": lambda: [mean_at("bro-biped", 80_000), mean_at("bro-biped", 160_000)],
    "The run ends at {:.0f}: the critics' weights": lambda: [statistics.fmean(last("bro-biped"))],
    "it does not walk: {:.0f} on average after 200 000 steps": lambda: [
        statistics.fmean(last("bro-biped-raw"))],
    "BRO after {} 000, at {:.0f}, with": lambda: [
        learning.last(learning.read()["bro-hardcore"])[0] // 1000,
        statistics.fmean(last("bro-hardcore"))],
    "CrossQ on HalfCheetah is {:.0%} lower in bf16. CrossQ on Hopper is {:.0%} lower in bf16":
    lambda: [1 - mean_over_run(f"crossq-{env}-bf16") / mean_over_run(f"crossq-{env}")
             for env in ("halfcheetah", "hopper")],
}


def test_with_amx_the_goals_are_passed_that_the_docs_name():
    def amx(algorithm, seeds, mode):
        return ours(algorithm, seeds, mode, "sbx")

    assert amx("crossq", "1", "bf16-compiled") > 3 and amx("crossq", "1", "fp32-compiled") > 1.2
    assert amx("droq", "1", "fp32-compiled") > 1.5 and amx("droq", "4", "fp32-compiled") > 1.6
    assert amx("droq", "4", "bf16-compiled") > 2.5
    assert amx("sac", "8", "bf16-compiled") > 2 and amx("sac", "1", "bf16-compiled") < 1.5
    assert amx("sac", "8", "fp32-compiled") < 1.4 and amx("crossq", "1", "fp32-compiled") < 1.3


def test_without_amx_the_goals_are_missed_that_the_docs_name():
    best = {(name, precision): max(ours(name, n, f"{precision}-{how}", "sbx", "speed-amd")
                                   for n in "14" for how in ("eager", "compiled"))
            for name in ("crossq", "droq") for precision in ("bf16", "fp32")}
    assert best["crossq", "bf16"] < 3 and best["crossq", "fp32"] < 1.2
    assert best["droq", "fp32"] < 1.5 and best["droq", "bf16"] < 2.5


@pytest.mark.parametrize("sentence", PROSE)
def test_a_figure_in_words_is_the_result_files(sentence):
    words = sentence.format(*PROSE[sentence]())
    assert any(words in " ".join(text.split()) for text in PAGES.values()), words


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


# Lines changed, measured. Each misses its goal in house.FORKS (40, 90, 60, 120, 140): the losses
# stand in stanzas with a heading each, and XQC has parts of its own: the projection, the rewards'
# scale, targets of several steps, held noise. CEM needs noise that lasts. A change that adds to
# one of them fails here.
COSTS = {("sac", "droq"): 46, ("sac", "crossq"): 96, ("crossq", "bro"): 64, ("crossq", "cem"): 151,
         ("crossq", "xqc"): 274, ("ppo", "ppo_discrete"): 60, ("ppo", "ppo_lstm"): 120}


@pytest.mark.skipif(shutil.which("diff") is None, reason="no diff")
@pytest.mark.parametrize("base, fork", house.FORKS)
def test_a_fork_costs_what_the_readme_says(base, fork):
    lines, goal = house.fork_cost(base, fork), house.FORKS[base, fork]
    assert 20 < lines <= max(goal, COSTS[base, fork])
    assert re.search(rf"agents/{fork}.py` .* \| {base} \| {lines} \| {goal} \|", README)
