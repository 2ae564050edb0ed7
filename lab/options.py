"""The options of the scripts, the values that they may have, and what they become by default."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from lab.accelerate import physical_cores
from lab.envs.base import TORCH, is_torch
from lab.envs.spec import read_kwargs
from lab.errors import UserError
from lab.matmul import Library
from lab.stopping import stops


@dataclass(frozen=True)
class Options:
    # What to train
    agent: tyro.conf.Positional[str] = "agents/sac.py"  # agent file
    env: tuple[str, ...] = ("Pendulum-v1",)  # gymnasium ids, each trained separately
    env_kwargs: tuple[str, ...] = ()  # NAME=VALUE arguments of gymnasium.make; tables state them
    seeds: int = 1  # number of seeds
    first_seed: int = 0  # the seeds are first_seed, first_seed + 1, ...
    steps: int = 6_000  # environment steps per seed
    # start from the weights of this run, each seed from its own, or all from one seed's folder;
    # tables state it
    init_from: Path | None = None
    # What to change about the task; tables and plots state it
    action_repeat: int = 1  # environment steps for each action; rewards are summed
    # clip the training reward of each environment step to [LOW, HIGH]
    clip_reward: tuple[float, float] | None = None
    # in training, a termination counts only if its last reward is below this; any other end of an
    # episode bootstraps, as a truncation does
    failure_below: float | None = None
    # What to log
    log: bool = False  # write a run folder: metrics, TensorBoard, checkpoints, plot
    name: str | None = None  # name of the run folder; none: the agent's name
    runs: Path = Path("runs")  # parent folder of the run folders
    eval_every: int | None = None  # steps between evaluations; none: ten per run
    keep_best: bool = True  # keep each seed's weights at its best evaluation, for --which best
    eval_episodes: int = 5  # deterministic episodes per seed and evaluation
    # environments of evaluation: their own, those of training (its episodes are truncated for it;
    # for a simulator that runs once), or no evaluation (tables show training returns)
    eval_env: Literal["own", "same", "none"] = "own"
    log_every: int | None = None  # steps between rows of metrics; none: 100 per run
    checkpoint_every: int | None = None  # steps; none: a tenth of the run or 5 minutes, 0: the end
    # When to stop before the last step, by the mean evaluation of the seeds
    stop_at: float | None = None  # stop once the mean evaluation of the seeds reaches this return
    stop_at_evals: int = 1  # it has to in that many evaluations in a row
    stop_plateau: int | None = None  # stop once that many evaluations bring no new best
    stop_rtol: float = 0.01  # a new best is higher than the old one by this share of it
    # How to run
    compile: bool = False  # torch.compile the update
    precision: Literal["fp32", "bf16"] = "fp32"  # precision of matrix products in the update
    # library for fp32 matrix products on a CPU: torch's BLAS or oneDNN; none: measured, the faster
    # one that computes in fp32 on this processor
    fp32_library: Library | None = None
    # train on the GPU; of several, each process takes the one with the fewest jobs
    cuda: bool = False
    # take the settings of a run's config.json, or of a YAML file with the names of flags as keys;
    # flags override it
    config: Path | None = None
    tuned: bool = False  # take the settings in tuned/<env>.json beside the agent; flags override
    # continue the run in this folder from its last checkpoints; with --steps or --seeds above its
    # own, make a finished run longer or give it more seeds
    resume: Path | None = None
    extended: tyro.conf.Suppress[tyro.conf.Fixed[tuple[int, ...]]] = ()  # steps of the run before


@dataclass(frozen=True)
class Simple(Options):
    """Options of learn_simple.py."""

    processes: int | None = None  # parallel processes; none: one per physical core, or Ray CPU
    engine: Literal["local", "ray"] = "local"  # this machine's processes, or a Ray cluster
    address: str | None = None  # HOST:PORT of the cluster; none: RAY_ADDRESS, else one for this run
    track: Literal["mlflow", "wandb"] | None = None  # also send the rows to this tracker
    plan: bool = False  # measure the fastest layout first (one minute), then train; cached


@dataclass(frozen=True)
class Vectorised(Options):
    """Options of learn_vectorised.py."""

    agent: tyro.conf.Positional[str] = "agents/ppo.py"  # agent file
    env: tuple[str, ...] = ("torch/ContinuousCartPole-v1",)  # gymnasium ids, or torch/ ones
    steps: int = 100_000  # environment steps per seed, over all its environments
    # The environments of one seed
    num_envs: int | None = None  # environments per seed; none: 32
    # how the environments step; none: torch for torch/ ids, otherwise sync
    backend: Literal["sync", "workers", "envpool", "torch"] | None = None
    # processes, including the main one, or envpool's threads; none: one per physical core
    workers: int | None = None
    # groups of environments: one steps while the agent acts on the next; none: 1
    groups: int | None = None
    threads: int | None = None  # torch threads on the CPU; none: the cores that the workers leave
    track: Literal["mlflow", "wandb"] | None = None  # also send the rows to this tracker
    plan: bool = False  # measure the fastest layout first (one minute), then train; cached


Pruner = Literal["median", "percentile", "vizier"]


@dataclass(frozen=True)
class Tune(Options):
    """Options of hypertune.py. Agent settings given as flags apply to every trial."""

    env: tuple[str, ...] = ("Pendulum-v1",)  # the environment: one gymnasium id
    seeds: int = 2  # new seeds per trial
    first_seed: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 0  # each trial has its own seeds
    steps: int = 2_000  # environment steps per seed
    name: str | None = None  # name of the study's folder; none: the agent's name and the time
    # continue the study in this folder; to change flags, run its command with the same --name
    resume: Path | None = None
    log: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = True  # always
    # The search
    space: tuple[str, ...] = (  # NAME=LOW:HIGH log:LOW:HIGH int:LOW:HIGH logint:LOW:HIGH cat:A,B,C
        "qf_lr=log:3e-4:1e-2", "batch_size=logint:32:128")
    trials: int = 8  # number of trials
    # parallel processes, one trial each; none: one per physical core, or Ray CPU
    workers: int | None = None
    engine: Literal["local", "ray"] = "local"  # this machine's processes, or a Ray cluster
    address: str | None = None  # HOST:PORT of the cluster; none: RAY_ADDRESS, else one for this run
    study_seed: int = 0  # random seed of the search
    # Pruning, with the names of Optuna's pruners
    prune: bool = True  # stop trials that fall behind the completed ones
    # the bar: a percentile of the completed trials at the step, or Vizier's median of their
    # running averages
    pruner: Pruner = "percentile"
    percentile: float = 25.0  # of --pruner percentile: the best 25% reach the bar
    n_startup_trials: int = 4  # completed trials before the first one is pruned
    n_warmup_steps: int | None = None  # no trial is pruned before it; none: two thirds of the steps
    interval_steps: int = 1  # steps between checks
    # a trial whose last PATIENCE + 1 evaluations brought a new best is not pruned; None: it may be
    patience: int | None = 1
    # Confirmation: at the end, the best three settings and the defaults train again
    confirm_seeds: int = 8  # held-out seeds to confirm the best three settings and the defaults


NUM_ENVS = 32  # default environments per seed
LAST_SEED = 2**32  # seeds are below it
SCRIPTS: dict[type[Options], str] = {
    Simple: "learn_simple.py", Vectorised: "learn_vectorised.py", Tune: "hypertune.py"}


def as_flag(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


def option_of(word: str) -> str:
    """The option that a word such as --num-envs=4 sets; of --no-compile, no_compile."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_")


def check_options(options: Options) -> None:
    """Check the values that need no environment. UserError names the flag."""
    _check_numbers(options)
    _check_task(options)
    if stops(options) and options.eval_env == "none":
        raise UserError("--stop-at and --stop-plateau need evaluations: --eval-env must be own or "
                        "same")
    if getattr(options, "track", None) and not options.log:
        raise UserError("--track sends what a run folder has: give --log, too")
    ray = getattr(options, "engine", "local") == "ray"
    if getattr(options, "address", None) and not ray:
        raise UserError("--address is for --engine ray")
    if getattr(options, "plan", False) and ray:
        raise UserError("--plan measures this machine: leave it out with --engine ray")
    if options.fp32_library == "onednn" and ray:
        raise UserError("--fp32-library onednn is for --engine local: a node's processor may round")


def _check_numbers(options: Options) -> None:
    """UserError for a number that is out of its range."""
    for name in ("seeds", "steps", "eval_episodes", "eval_every", "log_every", "processes",
                 "num_envs", "workers", "groups", "threads", "trials", "n_startup_trials",
                 "interval_steps", "patience", "confirm_seeds", "action_repeat", "stop_at_evals",
                 "stop_plateau"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"{as_flag(name)} must be at least 1, not {value}")
    for name in ("checkpoint_every", "stop_rtol", "study_seed"):
        value = getattr(options, name, None)
        if value is not None and not value >= 0:
            raise UserError(f"{as_flag(name)} must be 0 or more, not {value}")
    for name in ("failure_below", "stop_at"):
        if math.isnan(getattr(options, name) or 0):
            raise UserError(f"{as_flag(name)} must be a number, not nan")
    percentile = getattr(options, "percentile", 0.0)
    if not 0 <= percentile <= 100:
        raise UserError(f"--percentile must lie in [0, 100], not {percentile}")
    if options.seeds > LAST_SEED:
        raise UserError(f"--seeds must be at most {LAST_SEED}, not {options.seeds}")
    if not 0 <= options.first_seed <= LAST_SEED - options.seeds:
        raise UserError(f"--first-seed must lie in [0, {LAST_SEED - options.seeds}], not "
                        f"{options.first_seed}")


def _check_task(options: Options) -> None:
    """UserError if the environments or the changes to them do not fit together."""
    if len(set(options.env)) < len(options.env) or not options.env:
        given = " ".join(options.env) or "none"
        raise UserError(f"--env needs different environments, not {given}")
    if options.clip_reward and not options.clip_reward[0] < options.clip_reward[1]:
        low, high = options.clip_reward
        raise UserError(f"--clip-reward needs LOW < HIGH, not {low} {high}")
    if options.env_kwargs:
        read_kwargs(options.env_kwargs)
    backend = getattr(options, "backend", None)
    changed = [as_flag(name) for name in ("env_kwargs", "action_repeat", "failure_below")
               if getattr(options, name) != getattr(Options, name)]
    changed += ["--eval-env same"] * (options.eval_env == "same")
    for env_id in options.env if changed else ():
        if is_torch(env_id) or backend in ("torch", "envpool"):
            raise UserError(f"{changed[0]} is for environments of gymnasium.make, which does not "
                            f"make {env_id}" + f" with --backend {backend}" * bool(backend))


def refuse_unused(options: Options, given: set[str]) -> None:
    """UserError for a flag of the command that would do nothing."""
    backend = getattr(options, "backend", None)
    many = not isinstance(options, Vectorised) or options.plan or backend in ("workers", "envpool")
    for name, used, need in (
            ("workers", many, "--backend workers or envpool"),
            ("stop_at_evals", options.stop_at is not None, "--stop-at"),
            ("stop_rtol", options.stop_plateau is not None, "--stop-plateau"),
            ("fp32_library", options.precision == "fp32" and not options.cuda, "fp32 on a CPU"),
            ("name", options.log, "--log"), ("checkpoint_every", options.log, "--log")):
        if name in given and not used:
            raise UserError(f"{as_flag(name)} does nothing without {need}")


def resolve_defaults(options: Options) -> Options:
    """Replace None by the value used, so that config.json records it: number of processes, or of
    environments and threads, and the ids of --backend torch. A Ray cluster has its own number of
    processes."""
    check_options(options)
    if isinstance(options, Simple) and options.engine == "local":
        return dataclasses.replace(options, processes=options.processes or physical_cores())
    if isinstance(options, Vectorised):
        ids = tuple(env_id if options.backend != "torch" or is_torch(env_id)
                    else TORCH + env_id for env_id in options.env)
        return dataclasses.replace(options, env=ids, num_envs=options.num_envs or NUM_ENVS,
                                   threads=options.threads or free_cores(options))
    return options


def free_cores(options: Vectorised) -> int:
    """Cores for torch's threads: those that environment workers (the main process is one) and
    envpool's threads leave, at least 1. On a GPU 1."""
    if options.cuda:
        return 1
    cores = physical_cores()
    busy = 0
    if options.backend in ("workers", "envpool"):
        total = options.seeds * (options.num_envs or NUM_ENVS)
        busy = min(options.workers or cores, total) - (options.backend == "workers")
    return max(1, cores - busy)
