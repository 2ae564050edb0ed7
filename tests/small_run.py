"""A small run in stacks, trained in this process."""

from pathlib import Path

from lab import train as script
from lab.command_line import parse_args
from lab.options import Simple
from lab.training import loop, recorder
from lab.training.job import make_jobs
from tests.conftest import SMALL

EPISODIC = "tests.probe_envs:lab-tests/Courses-v0"
STEPS = 24


def train(folder, agent="agents/sac.py", processes=2, **options):
    """-> the run's folder."""
    _, config = parse_args([str(agent)])
    config |= {k: v for k, v in {**SMALL, "replay_ratio": 1.0}.items() if k in config}
    options = {"env": (EPISODIC,), "seeds": 3, "steps": STEPS, "eval_every": 8,
               "eval_episodes": 2} | options
    options = Simple(agent=str(agent), log=True, name="trained", **options)
    run = recorder.create_run_folder(folder, "trained", Path(agent),
                                     script.describe(options, config, "trained"))
    for job in make_jobs(options, config, processes, run):
        loop.train(job, lambda message: None)
    return run


def group(run, env_id=EPISODIC):
    """The folder of SAC's seeds."""
    return recorder.group_folder(run, env_id, "sac")
