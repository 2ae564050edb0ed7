"""A study, from its options to its table: trials in parallel processes, then confirmation.

    runs/studies/<name>/            without --name: the agent's name and a timestamp
        trials.jsonl                the journal, see trials.Journal
        config.json  versions.json  <agent>.py  best.json  study.png
        trials/<n>/                 same files as a run; checkpoints are deleted when it ends
        confirmed/<name>/           same files as a run
        tensorboard/trial_<n>/      TensorBoard: the HParams row and the curve of a trial
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from lab.agent import build_agent, load_agent
from lab.config_files import check_source
from lab.errors import UserError
from lab.options import Tune
from lab.train import describe
from lab.training import recorder
from lab.training.job import Job, choose_fp32_library, dry_run, make_jobs
from lab.training.processes import Engine
from lab.training.ray_processes import open_engine
from lab.tuning import confirm, space, surrogate
from lab.tuning.space import Space
from lab.tuning.study import HELD_OUT, Study
from lab.tuning.trials import Journal

TOP = 3  # settings to confirm
# Options that may change when a study is resumed
FREE = ("trials", "workers", "engine", "address", "confirm_seeds", "log_every", "checkpoint_every",
        "name", "runs", "config", "resume", "log", "space", "fp32_library", "prune", "pruner",
        "percentile", "n_startup_trials", "n_warmup_steps", "interval_steps", "patience")


def tune(options: Tune, config: dict[str, Any]) -> int:
    """-> exit code: 0, or 1 if no trial completed or a confirmation failed."""
    options, searched, job = check(options, config)
    with open_engine(options, options.resume or options.runs) as engine:
        return _tune(options, config, searched, job, engine)


def _tune(options: Tune, config: dict[str, Any], searched: Space, job: Job, engine: Engine | None
          ) -> int:
    folder, journal = open_study(options, config, searched, job)
    with contextlib.closing(journal):
        study = Study(options, searched, job, folder, journal, engine)
        print(f"study folder: {folder}\nto resume:    python hypertune.py --resume {folder}\n"
              f"to watch:     tensorboard --logdir {folder / 'tensorboard'}", flush=True)
        study.run()
        lost = [f"trial {trial.number}: {trial.reason}" for trial in study.trials
                if trial.state == "failed"]
        best = surrogate.recommend(searched, study.trials, TOP)
        if best:
            unfinished, diverged = confirm.train(study, best)
            confirm.show(study, best, finished=not unfinished)
            failures = unfinished + diverged
        else:
            failures = ["no trial completed"]
    for reason in lost + failures:
        print(f"FAILED {reason}", file=sys.stderr)
    return 1 if failures else 0


def check(options: Tune, config: dict[str, Any]) -> tuple[Tune, Space, Job]:
    """-> the options with the library for fp32 products, the space, and the job of the defaults.
    UserError if a trial could not start; writes no files."""
    if options.init_from and not recorder.is_seed(options.init_from):
        raise UserError(f"--init-from {options.init_from}: each trial has its own seeds, so give "
                        "the folder of one seed, such as seed_0")
    [job, *_] = make_jobs(options, config, 1, None)
    if len(options.env) != 1:
        raise UserError(f"a study takes one --env, not {' '.join(options.env)}")
    searched = space.read(options.space, load_agent(options.agent).Config, options.agent)
    if options.eval_env == "none":
        raise UserError("a study compares evaluation returns: --eval-env must be own or same")
    if (options.n_warmup_steps or 0) < 0:
        raise UserError(f"--n-warmup-steps must be 0 or more, not {options.n_warmup_steps}")
    if options.trials * options.seeds > HELD_OUT:
        raise UserError(f"--trials {options.trials} x --seeds {options.seeds} reaches the held-out "
                        f"seeds, which start at {HELD_OUT}")
    spec, products = dry_run(job)
    options = choose_fp32_library(options, [job], products)
    [job] = make_jobs(options, config, 1, None)
    for parameter in searched.parameters:
        for value in parameter.bounds():  # the agent checks them
            build_agent(job.agent_path, config | {parameter.name: value}, spec, [0], 1, 1,
                        "cpu", lambda fn: fn)
    return options, searched, job


def open_study(options: Tune, config: dict[str, Any], searched: Space, job: Job
               ) -> tuple[Path, Journal]:
    """-> the study's folder and its journal, new or resumed. UserError if another tuner has it open
    or its settings differ."""
    described = describe(options, config, job.name)
    agent, root = Path(options.agent), options.runs / "studies"
    if not options.name and not options.resume:
        folder = recorder.new_folder(root, job.name)
    else:
        folder = options.resume or root / recorder.safe_name(job.name)
    with recorder.writable(root):
        folder.mkdir(parents=True, exist_ok=True)
        journal = Journal(folder / "trials.jsonl")
    try:
        if journal.header and options.name:
            _check_name(folder, options.name)
        if journal.header and agent.resolve() == (folder / agent.name).resolve():  # its own copy
            described["options"]["agent"] = journal.header["agent"]
        fixed = {key: value for key, value in described["options"].items()
                 if key not in FREE}
        header = json.loads(json.dumps({"space": searched.texts(), "config": config} | fixed))
        if journal.header:
            _compare(folder, journal.header, header)
            check_source(folder, agent, Tune)
            confirm.check_seeds(folder, options)
            recorder.write_json(folder / "config.json", described)
        else:
            recorder.describe_run(folder, agent, described)
            journal.append(header)
    except BaseException:
        journal.close()
        raise
    return folder, journal


def _check_name(folder: Path, name: str) -> None:
    """UserError if the folder belongs to a study with another name, as with "a b" and "a_b"."""
    try:
        other = json.loads((folder / "config.json").read_text())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if other != name:
        raise UserError(f"{folder} is the study {other!r}, not {name!r}; choose another --name")


def _compare(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        default = json.loads(json.dumps(getattr(Tune, key, None)))  # older studies lack the flag
        before = old.get(key, default)
        if before == value:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            before, value = (
                " ".join(f"{k}={v}" for k, v in a.items() if b.get(k) != v) or "nothing else"
                for a, b in ((before, value), (value, before)))
        raise UserError(f"{folder} was started with {key} {before}, not {value}; choose another "
                        "--name")
