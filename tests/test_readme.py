"""What the README says is so."""

import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from lab import arguments, command, plan, study, sweep

README = Path("README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True)[1:] for line in README.splitlines()
            if re.match(r"python (learn_\w+|hypertune)\.py", line) and "--help" not in line]


def test_the_loop_that_is_quoted_is_the_loop_that_runs():
    (loop,) = (code for code in PYTHON if "agent.act" in code)
    code = textwrap.indent(loop, 8 * " ")
    assert code in Path("lab/rollout.py").read_text()


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_every_command_can_be_read(argv, tmp_path):
    mine = shutil.copy("agents/sac.py", tmp_path / "mine.py")
    script, *argv = [str(mine) if arg == "../mine.py" else arg for arg in argv]
    (kind,) = (kind for kind, name in arguments.SCRIPTS.items() if name == script)
    options, config = arguments.parse(argv, kind)
    if kind is arguments.Tune:
        assert study.check(options, config)
    assert sweep.make_jobs(arguments.settle(options), {}, 2, None)


def test_the_plan_that_is_quoted_can_be_made(monkeypatch):
    planned = []
    monkeypatch.setattr(plan, "measure", lambda options, *rest: planned.append(options))
    (words,) = re.findall(r"^python -m lab.plan (.*)", README, re.MULTILINE)
    assert plan.run(words.split()) == 0 and planned[0].seeds > 1


def test_the_environment_that_is_quoted_trains(tmp_path, monkeypatch):
    (code,) = (code for code in PYTHON if "torch_envs" in code)
    (tmp_path / "my_envs.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    argv = "agents/ppo.py --env my_envs:torch/Push-v0 --num-envs 64 --steps 4096 --update-epochs 1"
    assert command.run(argv.split(), arguments.Vectorised) == 0


def test_every_path_that_is_named_exists():
    for path in re.findall(r"\b(?:agents|lab|bench|tests)/[\w/.-]*\w", README):
        assert Path(path).exists(), path


@pytest.mark.skipif(shutil.which("diff") is None, reason="no diff")
@pytest.mark.parametrize("fork, base, most", [
    ("droq", "sac", 40), ("crossq", "sac", 90), ("bro", "crossq", 60), ("cem", "crossq", 120)])
def test_a_fork_costs_what_the_readme_says(fork, base, most):
    diff = subprocess.run(["diff", "-wB", f"agents/{base}.py", f"agents/{fork}.py"],
                          capture_output=True, text=True).stdout
    lines = sum(line[:1] in "<>" and bool(line[1:].strip()) for line in diff.splitlines())
    assert 20 < lines <= most
    assert re.search(rf"agents/{fork}.py` .* \| {base} \| {lines} \|", README)
