"""lab/ is layered: no import cycles, no upward imports, and every module can be imported first."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import house

FOLDERS = sorted({name.split(".")[1] for name in house.lab() if name.count(".") > 1})
# without torch: a worker process, and what it imports to make its environments; a report; an actor
LIGHT = ["lab.envs.worker", "lab.envs.probes", "lab.report.__main__", "lab.watch.camera",
         "lab.training.mailbox"]


def python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_there_is_no_circle():
    assert house.circle(house.lab()) == []


def test_no_import_goes_upward():
    assert house.upward(house.lab()) == []


@pytest.mark.parametrize("sources, words", [
    ({"lab.envs.a": "from lab.envs import b", "lab.envs.b": "def f():\n    import lab.envs.a"},
     "a circle: lab.envs.a -> lab.envs.b -> lab.envs.a; no upward import"),
    ({"lab.errors": "if True:\n    from lab.train import run", "lab.train": ""},
     "no circle; upward: lab.errors -> lab.train"),
    ({"lab.watch.film": "from lab.check.checks import CHECKS", "lab.check.checks": ""},
     "no circle; upward: lab.watch.film -> lab.check.checks"),
    ({"lab.train": "import lab.errors\nfrom lab.envs.a import b", "lab.errors": "",
      "lab.envs.a": ""}, "no circle; no upward import")])
def test_circles_and_upward_imports_are_found(sources, words):
    """Whichever module a circle is told from."""
    told = house.verdict(house.graph_of(sources))
    assert told in (words, words.replace("a -> lab.envs.b -> lab.envs.a",
                                         "b -> lab.envs.a -> lab.envs.b"))


def test_a_module_that_stands_on_no_floor_is_named():
    with pytest.raises(LookupError, match=r"lab\.attic"):
        house.upward({"lab.attic": set()})


def test_every_package_is_empty():
    """A worker process imports the packages of its module: what they held, it would pay for."""
    packages = [*Path("lab").rglob("__init__.py")]
    assert sorted(path.parent.name for path in packages) == sorted(["lab", *FOLDERS])
    assert not any(path.read_text() for path in packages)


@pytest.mark.slow
def test_every_module_can_be_imported_first():
    """In one process, which forgets what it imported of lab before the next."""
    modules = sorted(house.lab())
    code = """
import importlib, sys
for module in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] == "lab"]:
        del sys.modules[name]
    importlib.import_module(module)
    print(module)
"""
    assert python(code, *modules) == modules


@pytest.mark.parametrize("module", LIGHT)
def test_what_should_start_fast_imports_no_torch(module):
    assert python(f"import sys, {module}; print('torch' in sys.modules)") == ["False"]


def test_a_process_that_does_not_compile_imports_no_compiler():
    """torch._inductor takes more than a second."""
    code = "import sys, lab.accelerate; print('torch' in sys.modules, 'torch._inductor' in " \
           "sys.modules)"
    assert python(code) == ["True", "False"]


def test_the_house_is_described():
    """python -m tests.house"""
    told = [*house.lines(sorted(Path.cwd().glob("agents/*.py")))]
    assert told[-1] == "no circle; no upward import"
    assert any(line.startswith("lab.errors -> -") for line in told)
    assert any("sac -> droq (goal 40)" in line for line in told)


def test_a_fork_costs_its_changed_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(house, "ROOT", tmp_path)
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents/a.py").write_text("one\ntwo\nthree\n")
    (tmp_path / "agents/b.py").write_text("one\n\n  two\nfour\n\nfive\n")
    assert house.fork_cost("a", "b") == 3 and house.fork_cost("a", "a") == 0
