"""Read run folders: every evaluation of every seed, by method and environment.

A method is one run folder, or several that the user gives the same name. Nothing outside the
folders is read and no code in them runs, so they may be unfinished or from someone else.
"""

import hashlib
import itertools
import json
import math
import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import typeguard

from lab.errors import UserError
from lab.training import recorder

# Options that change learning or evaluation, besides the agent's settings; older runs lack some
SHARED: dict[str, Any] = {
    "clip_reward": None, "precision": None, "num_envs": None, "eval_episodes": None,
    "action_repeat": 1, "failure_below": None, "eval_env": "own", "init_from": None, "extended": [],
    "stop_at": None, "stop_at_evals": 1, "stop_plateau": None, "stop_rtol": 0.01}
LATE = 1.01  # tolerance: with many environments, an evaluation may be up to 1% after a step
STAMP = r"-\d{8}-\d{6}(-\d+)?$"  # timestamp of a run folder
EVERY = typeguard.CollectionCheckStrategy.ALL_ITEMS  # not only the first of a list
# what a file of another shape raises
BROKEN = (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError,
          typeguard.TypeCheckError)
PAUSE = 60.0, 10.0  # the run was stopped if rows are both 60 s and 10 median gaps apart; rows with
# an evaluation have a median of their own


class Recorded(TypedDict, total=False):
    """The options in a config.json that the report reads."""

    agent: str
    env: list[str]
    env_kwargs: list[str]
    seeds: int
    first_seed: int
    steps: float
    action_repeat: int
    clip_reward: list[float] | None
    failure_below: float | None
    eval_env: str
    config: str | None
    tuned: bool
    init_from: str | None
    extended: list[int]


class Stopped(TypedDict):
    """stopped.json."""

    step: int
    reason: str


class Evaluated(TypedDict):
    """What python -m lab.evaluate writes that the report reads."""

    environment: str
    which: str
    episodes_per_seed: int
    failed_seeds: list[int]
    mean: dict[str, float]
    return_interval: list[float] | None
    seeds: dict[str, dict[str, Any]]


class Evaluation(NamedTuple):
    step: int
    value: float  # return
    seconds: float  # wall-clock time since the seed's first row, without pauses


@dataclass(frozen=True)
class Seed:
    curve: list[Evaluation]
    reached: int  # steps
    paused: float  # seconds; not in the evaluations' times
    failed: bool = False  # the seeds that it trained with went on without it


@dataclass
class Result:
    """One method in one environment."""

    method: str
    environment: str
    agent: str
    seeds: dict[int, Seed] = field(default_factory=dict)
    planned: int = 0  # steps, from config.json, or up to the stop
    stops: list[str] = field(default_factory=list)  # where and why runs stopped before their end

    @property
    def step(self) -> int:
        """The step at which the final return is taken: the end if a seed finished, else the last
        evaluation of the slowest seed that has not failed; 0 if there is none."""
        ends = [seed.curve[-1].step for seed in self.seeds.values()
                if seed.curve and not seed.failed]
        finished = [end for end in ends if end >= self.planned]
        return min(finished or ends, default=0)

    @property
    def evaluated(self) -> int:
        """Number of seeds with an evaluation."""
        return sum(bool(seed.curve) for seed in self.seeds.values())

    def at(self, step: int) -> dict[int, Evaluation]:
        """The evaluation at `step` of each seed that reached it: the last one up to it, or, if that
        is over 1% earlier, the first one up to 1% later."""
        found = {}
        for n, seed in sorted(self.seeds.items()):
            before = [e for e in seed.curve if e.step <= step]
            after = [e for e in seed.curve if step < e.step <= LATE * step]
            late = after and not (before and before[-1].step * LATE >= step)
            if (before or after) and seed.curve[-1].step >= step:
                found[n] = after[0] if late else before[-1]
        return found

    def returns(self, step: int) -> list[float]:
        return [evaluation.value for evaluation in self.at(step).values()]


@dataclass(frozen=True)
class Run:
    folder: Path
    options: dict[str, Any]  # from config.json; {} without one, as `config`
    config: dict[str, Any]
    settings: dict[str, Any]  # must be equal for runs that are pooled


@dataclass
class Method:
    name: str
    runs: list[Run] = field(default_factory=list)
    results: dict[str, Result] = field(default_factory=dict)  # by environment


def load(arguments: Sequence[str]) -> list[Method]:
    """Load run folders, given as FOLDER or NAME=FOLDER; equal names are pooled. UserError if one
    cannot be read, or if a method has a seed twice."""
    methods: dict[str, Method] = {}
    for name, folder in named(arguments):
        add_run(methods.setdefault(name, Method(name)), folder)
    return list(methods.values())


def named(arguments: Sequence[str]) -> list[tuple[str, Path]]:
    """-> (name, folder) pairs. Without NAME=, the name is the folder's without the timestamp, or
    with it if that is ambiguous. Runs of one name that differ only in their seeds are pooled.
    UserError if a name is still ambiguous."""
    pairs = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        given = bool(equals) and not os.path.exists(argument)
        pairs.append((name, Path(path)) if given else ("", Path(argument)))
    for dropped in (STAMP, ""):
        names = [name or re.sub(dropped, "", folder.resolve().name) for name, folder in pairs]
        twice = [own for own, (name, _) in zip(names, pairs, strict=True)
                 if not name and names.count(own) > 1 and not more_seeds(
                     [folder for other, (_, folder) in zip(names, pairs, strict=True)
                      if other == own])]
        if not twice:
            return [(name, folder) for name, (_, folder) in zip(names, pairs, strict=True)]
    raise UserError(f"two runs are called {twice[0]!r}: give them as NAME=FOLDER; the same NAME "
                    "for both pools them")


def more_seeds(folders: Sequence[Path]) -> bool:
    """Whether the runs differ only in their seeds, as --first-seed gives a method more of them. A
    rule stops each run at a step of its own, so one that stopped is not a part of another."""
    methods = [Method("") for _ in folders]
    for method, folder in zip(methods, folders, strict=True):
        add_run(method, folder)
    runs = [run for method in methods for run in method.runs]
    same = all(run.options and run.settings == runs[0].settings
               and run.options.get("steps") == runs[0].options.get("steps") for run in runs)
    seeds = [(environment, seed) for method in methods
             for environment, result in method.results.items() for seed in result.seeds]
    stopped = any(result.stops for method in methods for result in method.results.values())
    return (same and not stopped and len(set(seeds)) == len(seeds)
            and all(method.results.keys() == methods[0].results.keys() for method in methods))


def find(methods: Sequence[Method], name: str) -> Method:
    """The method with this name or run folder."""
    for method in methods:
        folders = [run.folder.resolve() for run in method.runs]
        if name in (method.name, *(f.name for f in folders)) or Path(name).resolve() in folders:
            return method
    raise UserError(f"{name!r} is not one of the runs: {', '.join(m.name for m in methods)}")


def add_run(method: Method, folder: Path) -> None:
    options, config = read_config(folder)
    ids = {recorder.group_folder(folder, env_id, "").name: env_id
           for env_id in options.get("env", ())}
    paths = {path: int(match[1]) for path in sorted(folder.glob("*/*/seed_*/metrics.jsonl"))
             if (match := re.fullmatch(r"seed_(\d+)", path.parent.name))}
    if not paths:
        raise UserError(f"{folder} has no metrics: <environment>/<agent>/seed_<n>/metrics.jsonl")
    agents = set()
    for path, number in paths.items():
        environment, agent, *_ = path.relative_to(folder).parts
        environment = label(ids.get(environment, environment), options)
        agents.add(agent)
        result = method.results.setdefault(environment, Result(method.name, environment, agent))
        if number in result.seeds:
            raise UserError(f"{method.name!r} has seed {number} of {environment} twice: it is also "
                            f"in {folder}")
        tag = recorder.reported_return(options.get("eval_env", ""))
        seed = result.seeds[number] = read_seed(path, tag)
        stop = read_stop(path.parent.parent)
        planned = stop["step"] if stop else options.get("steps", seed.reached)
        result.planned = max(result.planned, planned)
        if stop and (line := f"at step {stop['step']:,}: {stop['reason']}") not in result.stops:
            result.stops.append(line)
    for stack in folder.glob("*/*/stack_*_*"):
        environment, agent, _ = stack.relative_to(folder).parts
        if group := method.results.get(label(ids.get(environment, environment), options)):
            mark_failed(group.seeds, recorder.members_of(stack))
    settings: dict[str, Any] = {"agent": " ".join(sorted(agents))}
    if options:
        source = folder / Path(options["agent"]).name
        if source.is_file():
            settings["source"] = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
        settings |= {name: options.get(name, default) for name, default in SHARED.items()} | config
    method.runs.append(Run(folder, options, config, settings))


def mark_failed(seeds: dict[int, Seed], stack: Sequence[int]) -> None:
    """Mark the seeds that are over one evaluation behind others of their stack: a kill can lose
    the last one, but no more."""
    curves = [seeds[n].curve for n in stack if n in seeds]
    most = max(map(len, curves), default=0)
    for n in stack:
        if n in seeds and len(seeds[n].curve) < most - 1:
            seeds[n] = replace(seeds[n], failed=True)


def evaluations(run: Run) -> list[dict[str, Any]]:
    """What python -m lab.evaluate wrote into the run's folder. UserError if a file is no such
    thing."""
    found = []
    for path in sorted(run.folder.glob("*/*/**/evaluation_*.json")):
        try:
            content = json.loads(path.read_text())
            check(content, Evaluated)
            float(content["mean"]["return"]), min(int(s["step"]) for s in content["seeds"].values())
        except BROKEN as error:
            raise UserError(f"{path} is not of python -m lab.evaluate: {error!r}") from error
        found.append(content)
    return found


def read_stop(group: Path) -> Stopped | None:
    """The step and the reason of a run that stopped before its last step. UserError if they cannot
    be read."""
    try:
        stop: Any = recorder.read_stop(group)
        if stop is not None:
            check(stop, Stopped)
        return stop
    except BROKEN as error:
        raise UserError(f"{group / recorder.STOPPED} is broken: {error!r}") from error


def check(content: Any, kind: Any) -> None:
    """TypeCheckError if a key of this TypedDict has another type, ValueError if a pair of bounds
    has other than two."""
    known = {key: value for key, value in dict(content).items() if key in kind.__annotations__}
    typeguard.check_type(known, kind, collection_check_strategy=EVERY)
    for name in ("clip_reward", "return_interval"):
        if known.get(name) and len(known[name]) != 2:
            raise ValueError(f"{name} must be two numbers, not {known[name]}")


def seed_names(seeds: Sequence[int]) -> str:
    """"seed 3", "seeds 0 to 4" or "seeds 0, 2": they are in order."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    if seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seeds {', '.join(map(str, seeds))}"


def span_of_steps(steps: Sequence[int]) -> str:
    """The lowest and the highest: "1,000 to 2,000", or "1,000" if they are equal."""
    return " to ".join(f"{step:,}" for step in sorted({min(steps), max(steps)}))


def label(environment: str, options: dict[str, Any]) -> str:
    """The id with its --env-kwargs, since other kwargs make another environment, and whether the
    returns are those of training, since they are not comparable."""
    words = options.get("env_kwargs")
    environment += f" ({' '.join(words)})" if words else ""
    return environment + " (training returns)" * (options.get("eval_env") == "none")


def changes(options: Mapping[str, Any]) -> list[str]:
    """What the options change of the task, in words. Older runs lack some of them."""
    found = []
    if (repeat := options.get("action_repeat", 1)) > 1:
        found.append(f"trained and evaluated with each action repeated for {repeat} steps")
    if clip := options.get("clip_reward"):
        found.append("trained on rewards clipped to [{}, {}]".format(*clip))
    if (bound := options.get("failure_below")) is not None:
        found.append(f"trained with terminations only where the last reward is below {bound}")
    return found


def origins(options: Mapping[str, Any]) -> list[str]:
    """What a run was before, in words."""
    found = []
    if source := options.get("init_from"):
        found.append(f"started from the weights of {source}")
    if before := options.get("extended"):
        found.append(f"extended at {' and '.join(f'{steps:,}' for steps in before)} steps")
    return found


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> options, agent config. Both are empty without a config.json, as in trials of a study."""
    if not os.path.isdir(folder):  # False, too, if the name is too long
        raise UserError(f"no such run folder: {folder}")
    path = folder / "config.json"
    if not path.exists():
        return {}, {}
    try:
        content = json.loads(path.read_text())
        check(content["options"], Recorded)
        return {"agent": "", "eval_env": "own", **content["options"]}, dict(content["config"])
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except BROKEN as error:
        raise UserError(f"{path} is not a run's config.json: {error!r}") from error


def read_seed(path: Path, tag: str) -> Seed:
    rows = list(read_rows(path, tag))
    gaps = [max(0.0, now - before)
            for (_, before, _), (_, now, _) in itertools.pairwise(rows)]
    kinds = [value is not None for _, _, value in rows]  # an evaluation takes its own time
    usual = {kind: statistics.median(
        [gap for gap, other in zip(gaps, kinds[1:], strict=False) if other == kind] or [0.0])
        for kind in (False, True)}
    curve, seconds, paused = [], 0.0, 0.0
    for (step, _, value), gap in zip(rows, [0.0, *gaps], strict=False):
        normal = usual[value is not None]
        if gap > max(PAUSE[0], PAUSE[1] * normal):
            paused += gap - normal
            gap = normal
        seconds += gap
        if value is not None:
            curve.append(Evaluation(step, value, seconds))
    return Seed(curve, rows[-1][0] if rows else 0, paused)


def read_rows(path: Path, tag: str) -> Iterator[tuple[int, float, float | None]]:
    """-> step, wall time, return or None. UserError if a row is invalid. An incomplete last line,
    after a kill or while it is being written, is skipped."""
    try:
        lines = path.read_text().splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            return
        try:
            row = json.loads(line)
            value = float(row[tag]) if tag in row else None
            step, wall_time = int(row["step"]), float(row["wall_time"])
            if not math.isfinite(wall_time if value is None else wall_time + value):
                raise ValueError(f"wall_time {wall_time}, {tag} {value}")
            yield step, wall_time, value
        except BROKEN as error:
            raise UserError(f"{path}, line {number}, is not a row of metrics: {error!r}") from error
