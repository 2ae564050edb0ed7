"""From the command line to a finished run: options, jobs, folders, the table at the end."""

import contextlib
import dataclasses
import io
import itertools
import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typeguard
import tyro
from rich.console import Console

from lab import accelerate, agent_file, autotune, envs, recorder, report, sweep
from lab.gym_envs import UserError
from lab.progress import SweepProgress
from lab.rollout import Job


@dataclass(frozen=True)
class Options:
    # What to train
    agent: tyro.conf.Positional[str] = "agents/sac.py"  # the agent's file
    env: tuple[str, ...] = ("Pendulum-v1",)  # gymnasium ids
    seeds: Annotated[int, tyro.conf.arg(aliases=["--seed"])] = 1  # number of seeds: 0, 1, 2, ...
    steps: int = 6_000  # environment steps of one seed
    clip_reward: tuple[float, float] | None = None  # LOW HIGH, in training only; tables declare it
    # What to keep
    log: bool = False  # leave a run folder: metrics, TensorBoard, checkpoints, picture
    name: str | None = None  # of the run's folder; none: the agent's
    runs: Path = Path("runs")  # where run folders go
    eval_every: int | None = None  # steps between evaluations; none: ten a run
    eval_episodes: int = 5  # deterministic episodes of one seed at each evaluation
    log_every: int | None = None  # steps between logged rows; none: a hundred a run
    checkpoint_every: int | None = None  # steps; none: a tenth of the run or 5 minutes, 0: the end
    # How to run
    compile: bool = False  # torch.compile the update
    precision: Literal["fp32", "bf16"] = "fp32"  # of matrix products in the update
    cuda: bool = False  # train on the GPU
    config: Path | None = None  # take the settings of a run's config.json; flags win over it
    resume: Path | None = None  # continue this run folder from its last checkpoints


@dataclass(frozen=True)
class Simple(Options):
    """Of learn_simple.py."""

    processes: int | None = None  # parallel processes; none: one for each physical core


@dataclass(frozen=True)
class Vectorised(Options):
    """Of learn_vectorised.py."""

    agent: tyro.conf.Positional[str] = "agents/ppo.py"  # the agent's file
    env: tuple[str, ...] = ("torch/ContinuousCartPole-v1",)  # gymnasium ids, or torch/ ones
    steps: int = 100_000  # environment steps of one seed, over all its environments
    # The environments of one seed
    num_envs: int | None = None  # of one seed; none: 32, or what --autotune finds fastest
    backend: Literal["sync", "workers", "envpool", "torch"] | None = None  # none: torch or sync
    workers: int | None = None  # that step, this process among them, or threads; none: cores
    groups: int | None = None  # of environments: one steps while the next is acted on; none: 1
    autotune: bool = False  # measure these four that are not given, use and remember the fastest


@dataclass(frozen=True)
class Tune(Options):
    """Of hypertune.py. Flags of the agent's settings hold for every trial."""

    seeds: Annotated[int, tyro.conf.arg(aliases=["--seed"])] = 2  # of each trial, its own
    steps: int = 2_000  # environment steps of one seed
    log: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = True  # always
    # What to try
    space: tuple[str, ...] = (  # NAME=LOW:HIGH log:LOW:HIGH int:LOW:HIGH logint:LOW:HIGH cat:A,B,C
        "qf_lr=log:3e-4:1e-2", "batch_size=logint:32:128")
    trials: int = 8  # to try
    workers: int | None = None  # processes, one trial each; none: one for each physical core
    study_seed: int = 0  # another one: another study of the same space
    # Trials that fall behind the median of the completed are pruned
    prune: bool = True
    n_startup_trials: int = 5  # that complete before any is pruned
    n_warmup_steps: int | None = None  # of each trial, which are spared; none: a third of them
    # At the end the best three settings and the defaults are trained afresh
    confirm_seeds: int = 8  # none of them is a trial's


NUM_ENVS = 32  # of a seed, unless said
SCRIPTS: dict[type[Options], str] = {
    Simple: "learn_simple.py", Vectorised: "learn_vectorised.py", Tune: "hypertune.py"}
OWN = ("name", "log", "seeds", "workers")  # of a study, whatever run it takes its settings from


def run(argv: Sequence[str], kind: type[Options] = Simple,
        do: Callable[[Any, dict[str, Any]], int] | None = None) -> int:
    """Parse and do, which is to train and report -> exit code: 0, 1 if a job failed, 2 for bad
    input, 128 + signal."""
    return guarded(lambda: (do or train)(*parse(argv, kind)))


def guarded(do: Callable[[], int]) -> int:
    """-> the exit code of `do`, or 2 for a UserError, which is printed, or 128 + signal."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        return do()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Terminated:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


def _terminated(number: int, frame: Any) -> None:
    raise Terminated


def parse(argv: Sequence[str], kind: type[Options] = Simple) -> tuple[Options, dict[str, Any]]:
    """-> the options, and the agent's settings: every field of its Config is a flag."""
    words = [word for arg in argv for word in (arg.split("=", 1) if arg[:2] == "--" else [arg])]
    resume, settings = _value_after(words, "--resume"), _value_after(words, "--config")
    source = Path(resume) / "config.json" if resume else Path(settings) if settings else None
    before = _read_settings(source) if source else {"options": {}, "config": {}}
    if resume and len(words) > 2:
        raise UserError("--resume takes every setting from the run; give no other flag")
    dropped = ["config", "resume", *(() if resume else ("processes",)),
               *(OWN if kind is Tune and not resume else ())]
    kept = {k: v for k, v in before["options"].items() if k not in dropped}
    place = find_agent(argv)
    if source:
        _refuse_its_code(source, kept if place is None else {**kept, "agent": ""})
    path = kept.get("agent", kind.agent) if place is None else argv[place]
    module = agent_file.load(path)
    names = {field.name for field in dataclasses.fields(kind)}
    begun_by = Tune if "trials" in kept else Vectorised if "num_envs" in kept else Simple
    if resume and kind is not begun_by:
        raise UserError(f"{resume} is a run of {SCRIPTS[begun_by]}: resume it with that script")
    others = {field.name for each in SCRIPTS for field in dataclasses.fields(each)} - names
    kept = {key: value for key, value in kept.items() if key not in others}
    try:
        kept["agent"] = path
        kept["runs"] = Path(kept.get("runs", kind.runs))
        defaults = kind(**kept), module.Config(**before["config"])
        for default in defaults:
            for name, hint in get_type_hints(type(default)).items():
                _check_type(name, getattr(default, name), hint)
    except TypeError as error:
        raise UserError(f"{source or 'the default'} does not fit {path}: {error}") from error
    return read_flags(argv, place, *defaults, module.__doc__)


def find_agent(argv: Sequence[str]) -> int | None:
    """The place of the agent's file among the arguments."""
    return next((i for i, arg in enumerate(argv) if arg.endswith(".py") and "=" not in arg
                 and not (i and argv[i - 1] in ("--name", "--runs", "--config"))), None)


def read_flags(argv: Sequence[str], place: int | None, options: Any, config: Any,
               description: str | None) -> tuple[Any, dict[str, Any]]:
    """-> options and the agent's settings, from two dataclasses with their defaults. UserError on
    unknown flags and on a field that both have."""
    taken = {field.name for field in dataclasses.fields(options)}
    for field in dataclasses.fields(config):
        if field.name in taken:
            raise UserError(f"{options.agent}: Config's {field.name!r} is already a flag of the "
                            "script's; give it another name")
    both = dataclasses.make_dataclass("Both", [("options", type(options), options),
                                               ("config", type(config), config)], frozen=True)
    if place is not None:  # the file first: after `--env A B` it would be a third environment
        argv = [argv[place], *argv[:place], *argv[place + 1:]]
    flags = parse_flags(both, argv, description)
    return flags.options, dataclasses.asdict(flags.config)


def _check_type(name: str, value: Any, kind: Any) -> None:
    try:
        typeguard.check_type(value, kind)
    except typeguard.TypeCheckError as error:
        raise TypeError(f"{name}: {error}") from error


def parse_flags(kind: Any, argv: Sequence[str], description: str | None) -> Any:
    """tyro's parser; the box in which it puts an error becomes one line."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, args=argv, config=(tyro.conf.OmitArgPrefixes,),
                            description=description)
    except SystemExit as end:
        if not end.code:
            raise
        plain = re.sub(r"\x1b\[[\d;]*m", "", box.getvalue())
        lines = [line.strip("│| ") for line in plain.splitlines()]
        words = " ".join(line for line in lines[1:] if line.strip("─╰╯-+"))  # the title is lines[0]
        raise UserError(re.split(" Argument helptext:| For full helptext", words)[0]) from end


def _value_after(words: Sequence[str], flag: str) -> str | None:
    return next((value for word, value in itertools.pairwise(words) if word == flag), None)


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text())
        return {part: {key: tuple(value) if isinstance(value, list) else value  # JSON has no tuple
                       for key, value in dict(settings[part]).items()}
                for part in ("options", "config")}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"{path} is no run's config.json: {reason}") from error


def _refuse_its_code(source: Path, options: dict[str, Any]) -> None:
    """A run's folder may be a stranger's: code that lies in it runs only if the user names it."""
    names = [env_id.rpartition(":")[0] for env_id in options.get("env", ())]
    modules = [Path(entry or ".", *name.split(".")) for name in names if name for entry in sys.path]
    folder = source.parent.resolve()
    agent = options.get("agent", "")
    for path in [*([Path(agent)] if agent else []), *modules]:
        if path.resolve().is_relative_to(folder):
            raise UserError(f"{source} names code that lies beside it, {path}: to run what came "
                            "with it, copy it elsewhere and name it yourself")


def check(options: Options) -> None:
    """UserError on nonsense that needs no environment to see."""
    for name in ("seeds", "steps", "eval_episodes", "eval_every", "log_every", "processes",
                 "num_envs", "workers", "groups", "trials", "n_startup_trials", "confirm_seeds"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if options.checkpoint_every is not None and options.checkpoint_every < 0:
        raise UserError(f"--checkpoint-every must be 0 or more, not {options.checkpoint_every}")
    if options.clip_reward and not options.clip_reward[0] < options.clip_reward[1]:
        low, high = options.clip_reward
        raise UserError(f"--clip-reward needs LOW below HIGH, not {low} {high}")
    if len(set(options.env)) < len(options.env) or not options.env:
        given = " ".join(options.env) or "none"
        raise UserError(f"--env needs different environments, not {given}")


def make_jobs(options: Options, config: dict[str, Any], processes: int, folder: Path | None
              ) -> list[Job]:
    """UserError on nonsense; nothing is written before every job has been checked."""
    check(options)
    device = "cuda" if options.cuda else "cpu"
    accelerate.check_device(device)
    layout: dict[str, Any] = {}
    if isinstance(options, Vectorised):
        layout = {"num_envs": options.num_envs, "backend": options.backend,
                  "workers": options.workers, "groups": options.groups or 1}
        for env_id in options.env:
            envs.choose_backend(env_id, options.backend, layout["groups"])

    def every(steps: int | None, parts: int) -> int:
        return max(1, options.steps // parts) if steps is None else steps

    shares = sweep.split_seeds(range(options.seeds), len(options.env), processes)
    return [Job(
        agent_path=options.agent, config=config, env_id=env_id, seeds=share, steps=options.steps,
        eval_every=every(options.eval_every, 10), log_every=every(options.log_every, 100),
        checkpoint_every=options.checkpoint_every, eval_episodes=options.eval_episodes,
        device=device, compile=options.compile, precision=options.precision,
        clip_reward=options.clip_reward, **layout,
        run=str(folder) if folder else None, name=options.name or Path(options.agent).stem,
    ) for env_id in options.env for share in shares]


def train(options: Options, config: dict[str, Any]) -> int:
    processes = 1
    if isinstance(options, Simple):
        processes = options.processes or accelerate.physical_cores()
        saved: Options = dataclasses.replace(options, processes=processes)
    elif isinstance(options, Vectorised):
        saved = options = _settle(options, config)
    jobs = make_jobs(options, config, processes, options.resume)
    for job in {job.env_id: job for job in jobs}.values():
        rehearse(job)

    folder = options.resume
    if folder:
        check_source(folder, Path(options.agent))
    elif options.log:
        folder = recorder.create_run_folder(options.runs, jobs[0].name, Path(options.agent),
                                            describe(saved, config, jobs[0].name))
        jobs = [dataclasses.replace(job, run=str(folder)) for job in jobs]
    if folder:
        print(f"run folder: {folder}\nwatch it:   tensorboard --logdir {folder}", flush=True)

    outcome = Outcome(jobs, options)
    with SweepProgress(jobs) as progress:
        def report_message(place: int, message: dict[str, Any]) -> None:
            progress.update(place, message)
            outcome.receive(jobs[place], message)

        failures = sweep.run(jobs, processes, report_message)
    for place, reason in sorted(failures.items()):
        outcome.lose(jobs[place], jobs[place].seeds, reason)
    outcome.show(folder)
    return 1 if outcome.lost else 0


def rehearse(job: Job) -> envs.EnvSpec:
    """The agent's first steps on made-up observations -> its environment's spec. UserError if
    either cannot work; nothing is written."""
    backend = "sync" if job.backend == "workers" else job.backend
    with contextlib.closing(envs.make(job.env_id, [0], 1, backend, job.device)) as one:
        spec = one.spec
    agent_file.check_contract(job.agent_path, job.config, spec, job.num_envs, job.device)
    return spec


def measure(options: Vectorised, config: dict[str, Any]) -> int:
    """What --autotune measures, alone."""
    options = _settle(dataclasses.replace(options, autotune=True), config, autotune.measure_all)
    flags = {f"--{name.replace('_', '-')}": getattr(options, name)
             for name in autotune.Candidate._fields}
    print("fastest:", *(f"{flag} {value}" for flag, value in flags.items() if value))
    return 0


def _settle(options: Vectorised, config: dict[str, Any],
            choose: Callable[..., autotune.Candidate] = autotune.fastest) -> Vectorised:
    """The options with what was left open: ids of --backend torch, and the fastest layout."""
    check(options)
    ids = tuple(env_id if options.backend != "torch" or envs.is_torch(env_id)
                else envs.TORCH + env_id for env_id in options.env)
    options = dataclasses.replace(options, env=ids)
    if not options.autotune:
        return dataclasses.replace(options, num_envs=options.num_envs or NUM_ENVS)
    if len(ids) != 1:
        raise UserError("--autotune is for one environment, not " + " ".join(ids))
    return dataclasses.replace(options, autotune=False, **choose(options, config)._asdict())


class Outcome:
    """What becomes of the seeds: the board of all of them, final returns, losses."""

    def __init__(self, jobs: Sequence[Job], options: Options):
        self.options, self.seeds = options, range(options.seeds)
        self.title, self.declared = jobs[0].name, ""
        if options.clip_reward:
            self.declared = ", trained on rewards clipped to [{}, {}]".format(*options.clip_reward)
        self.groups = {job.env_id: job.group for job in jobs if job.group}
        self.boards = {env_id: recorder.AllSeeds(group, self.seeds)
                       for env_id, group in self.groups.items()}
        self.final: dict[str, dict[int, float]] = {env_id: {} for env_id in options.env}
        self.lost: list[str] = []

    def receive(self, job: Job, message: dict[str, Any]) -> None:
        if "failed_seed" in message:
            self.lose(job, [message["failed_seed"]], message["reason"])
        returns = {seed: row["return/eval"] for seed, row in message.get("rows", {}).items()
                   if "return/eval" in row}
        if returns and message["step"] >= job.steps:
            self.final[job.env_id].update(returns)
        if returns and self.boards:
            self.boards[job.env_id].refresh()

    def lose(self, job: Job, seeds: Sequence[int], reason: str) -> None:
        """These seeds will not get to the end."""
        names = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
        self.lost.append(f"{job.env_id} {names}: {reason}")
        if self.boards:
            self.boards[job.env_id].alive -= set(seeds)

    def show(self, folder: Path | None) -> None:
        """The table, the picture, and where to look."""
        for env_id, group in self.groups.items():
            self.boards[env_id].refresh()
            self.final[env_id] = report.final_returns(group, self.seeds, self.options.steps)
        agent_name = Path(self.options.agent).stem
        title = f"{agent_name}: evaluation return after {self.options.steps} steps of each seed"
        title += self.declared
        Console().print(report.table(self.final, title))
        if folder:
            picture = folder / "learning_curves.png"
            curves = {env_id: report.read_curves(group, self.seeds, "return/eval")
                      for env_id, group in self.groups.items()}
            try:
                report.draw_learning_curves(picture, curves, self.title + self.declared)
            except OSError as error:
                print(f"no picture: {error}", file=sys.stderr)
            print(f"run folder: {folder}\npicture:    {picture}\n"
                  f"look at it: tensorboard --logdir {folder}")
        for reason in self.lost:
            print(f"FAILED {reason}", file=sys.stderr)


def describe(options: Options, config: dict[str, Any], name: str) -> dict[str, Any]:
    """What a config.json holds."""
    settings = {key: str(value) if isinstance(value, Path) else value
                for key, value in dataclasses.asdict(options).items()}
    return {"name": name, "options": settings, "config": config}


def check_source(folder: Path, agent: Path) -> None:
    """A run goes on with the code that began it."""
    copy = folder / agent.name
    if not copy.is_file():
        raise UserError(f"{folder} holds no {agent.name}, the agent that it began with")
    if copy.read_bytes() != agent.read_bytes():
        lines = (path.read_text(errors="replace").splitlines() for path in (copy, agent))
        pairs = enumerate(itertools.zip_longest(*lines), start=1)
        line = next((number for number, (old, new) in pairs if old != new), "its last")
        raise UserError(f"{agent} is not what {folder} began with, from line {line} on; put {copy} "
                        "back in its place, or begin a new run")
