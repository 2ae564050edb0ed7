import functools
import os
import shutil
import signal
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as learn_vectorised.py, before torch
os.environ.pop("FORCE_COLOR", None)  # for rich: tables without colours
os.environ.pop("CLICOLOR_FORCE", None)
os.environ.pop("TTY_COMPATIBLE", None)
os.environ["COLUMNS"] = "80"

import torch

from lab import train
from lab.agent import action_kind, check_ranges, load_agent, restore_state, save_state  # noqa: F401
from lab.check.driver import drive, flat_state, make_steps, same  # noqa: F401, the tests' too
from lab.envs.spec import EnvSpec, discrete_spec
from lab.errors import guarded
from lab.training import loop
from lab.training.processes import attempt

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
AGENTS = sorted(Path("agents").glob("*.py"))
# Small and fast, for the tests; an agent takes those that its Config has.
SMALL = {"batch_size": 16, "actor_width": 16, "qf_width": 16, "width": 16, "learning_starts": 8,
         "num_steps": 8, "seq_len": 2, "num_minibatches": 4, "update_epochs": 2, "lstm_width": 16}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def make_spec(obs_dim=3, low=(-1.0, 0.0), high=(1.0, 4.0)):
    return EnvSpec("tests", obs_dim, len(low), tuple(low), tuple(high), None)


def is_discrete(path):
    return action_kind(load_agent(path)) == "discrete"


def spec_for(module):
    """Of the kind of actions that the agent takes, two of them."""
    discrete = action_kind(module) == "discrete"
    return discrete_spec("tests", 3, (2, 3), None) if discrete else make_spec()


@pytest.fixture(params=AGENTS, ids=lambda path: path.stem)
def module(request):
    """Every agent in the tree, a copied one too."""
    return load_agent(request.param)


@pytest.fixture(autouse=True)
def as_if_first():
    """Whatever the test before trained with or drew."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def no_curves(monkeypatch):
    """A picture takes half a second."""
    monkeypatch.setattr(train, "draw_learning_curves", lambda *_: None)


@pytest.fixture
def jobs_here(monkeypatch, keep_threads):
    """Jobs run in this process."""
    def run_jobs(jobs, processes, report, engine=None):
        found = {index: attempt(loop.train, job, functools.partial(report, index))
                 for index, job in enumerate(jobs)}
        return {index: failure.reason for index, failure in found.items() if failure}

    monkeypatch.setattr(train, "run_jobs", run_jobs)


@pytest.fixture
def keep_threads(monkeypatch):
    """Commands leave this process's number of threads alone."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


def refusal(capsys, main, *argv):
    """-> the one line on stderr of a command that refuses its flags."""
    assert guarded(lambda: main([str(arg) for arg in argv])) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert not out and "Traceback" not in err
    return err


def timeless(row):
    """A row of metrics.jsonl without what another run of the same would change."""
    return {k: v for k, v in row.items() if k != "wall_time" and not k.startswith("perf/")}


def few_updates(path):
    """Flags of lab.check for the checks that learn no task."""
    few = {"update_epochs": 2, "replay_ratio": 0.125, "iterations": 2}
    fields = load_agent(path).Config.__dataclass_fields__
    return [word for name, value in few.items() if name in fields
            for word in (f"--{name.replace('_', '-')}", str(value))]


def small_config(module, **settings):
    fields = module.Config.__dataclass_fields__
    return module.Config(**{k: v for k, v in {**SMALL, **settings}.items() if k in fields})


def make_agent(module, seeds=(0, 1), num_envs=1, total_steps=1000, accelerate=None, spec=None,
               **settings):
    config = small_config(module, **settings)
    check_ranges(module, config)
    return module.Agent(spec or spec_for(module), config, list(seeds), num_envs=num_envs,
                        total_steps=total_steps, accelerate=accelerate or (lambda fn: fn))


def runs(pid):
    """Whether there is such a process, and it is more than a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with seeds 0 and 1 in one stack, 2 in another. Not to be written into."""
    from tests import small_run  # it imports this file

    return small_run.train(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def run(trained, tmp_path):
    """A copy, to be written into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
