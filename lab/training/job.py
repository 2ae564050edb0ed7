"""Job: what one process trains. make_jobs: command-line options -> jobs."""

import contextlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from lab import matmul
from lab.accelerate import check_device, physical_cores
from lab.agent import build_agent
from lab.contract import check_contract
from lab.envs import check
from lab.envs.base import VectorEnvs
from lab.envs.make import choose_backend, make_envs
from lab.envs.spec import EnvSpec
from lab.errors import UserError
from lab.options import Options, Vectorised, check_options, free_cores
from lab.stopping import stops
from lab.training import checkpoint
from lab.training.evaluation import ENDLESS
from lab.training.recorder import find_stacks, group_folder, members_of, printable, safe_name

MAX_NAME = 200  # bytes of a run's name; file systems allow 255 with the timestamp
Emit = Callable[[dict[str, Any]], None]
AnyOptions = TypeVar("AnyOptions", bound=Options)


@dataclass(frozen=True)
class Job:
    """One process: a stack of seeds on one environment."""

    agent_path: str
    config: dict[str, Any]  # the agent's
    env_id: str
    seeds: tuple[int, ...]
    steps: int  # environment steps of one seed; the intervals below too
    eval_every: int
    log_every: int
    checkpoint_every: int | None  # None: a tenth of the run or 5 minutes; 0: only at the end
    source: bytes | None = None  # of the agent when the run began; None: the file as it is
    eval_episodes: int = 5  # per seed and evaluation
    eval_env: str = "own"  # own, same: training's, none
    keep_best: bool = True  # each seed's weights at its best evaluation
    num_envs: int = 1
    backend: str | None = None  # None: torch for a torch/ id, else sync
    workers: int | None = None  # processes or threads of the backend; None: physical cores
    groups: int = 1  # groups of environments that step in turn
    threads: int = 1  # torch threads in this process
    device: str = "cpu"
    compile: bool = False
    precision: str = "fp32"
    fp32_library: matmul.Library = matmul.BLAS
    action_repeat: int = 1  # environment steps of each action, see StepRules
    # in training only, not in evaluation
    clip_reward: tuple[float, float] | None = None
    failure_below: float | None = None
    env_kwargs: tuple[str, ...] = ()  # NAME=VALUE, for gymnasium.make
    # when to stop before the last step, see stopping.py
    stop_at: float | None = None
    stop_at_evals: int = 1
    stop_plateau: int | None = None
    stop_rtol: float = 0.01
    init_from: str | None = None  # run, or folder of a seed, whose weights it starts from
    run: str | None = None  # the run folder; None: write no files
    name: str = ""  # of the run, as given by --name

    @property
    def steps_per_act(self) -> int:
        """Environment steps of one seed per call of act."""
        return self.num_envs * self.action_repeat

    @property
    def group(self) -> Path | None:
        """The subfolder of this environment and agent."""
        name = Path(self.agent_path).stem
        return group_folder(Path(self.run), self.env_id, name) if self.run else None

    @property
    def checkpoints(self) -> Path | None:
        return self.group / f"stack_{self.seeds[0]}_{self.seeds[-1]}" if self.group else None

    @property
    def eval_backend(self) -> str | None:
        """Evaluation takes too few steps to make up for starting worker processes."""
        return "sync" if self.backend == "workers" else self.backend

    @property
    def eval_rounds(self) -> int:
        """How often an evaluation resets its environments."""
        return math.ceil(self.eval_episodes / self.num_envs) if self.eval_env == "same" else 1

    @property
    def instances(self) -> int:
        """Environments that exist at a time in one process."""
        training = len(self.seeds) * self.num_envs
        if self.backend == "workers":
            training = math.ceil(training / (self.workers or physical_cores()))
        return training + (len(self.seeds) * self.eval_episodes if self.eval_env == "own" else 0)


def make_train_envs(job: Job) -> VectorEnvs:
    return make_envs(
        job.env_id, job.seeds, job.num_envs, job.backend, job.device, workers=job.workers,
        groups=job.groups, compile=job.compile, clip_reward=job.clip_reward,
        failure_below=job.failure_below, action_repeat=job.action_repeat,
        env_kwargs=job.env_kwargs)


def make_eval_envs(job: Job, envs: VectorEnvs) -> VectorEnvs | None:
    if job.eval_env != "own":
        return envs if job.eval_env == "same" else None
    return make_envs(job.env_id, job.seeds, job.eval_episodes, job.eval_backend, job.device,
                     action_repeat=job.action_repeat, env_kwargs=job.env_kwargs)


def agent_steps(run: Job | Options) -> int:
    """An agent's total_steps: its transitions of one seed."""
    return math.ceil(run.steps / run.action_repeat)


def make_jobs(options: Options, config: dict[str, Any], processes: int, folder: Path | None
              ) -> list[Job]:
    """One job per environment and share of the seeds. UserError on bad options; writes no files."""
    check_options(options)
    check_names(options)
    device = "cuda" if options.cuda else "cpu"
    if getattr(options, "engine", "local") == "local":
        check_device(device)
    vectorised: dict[str, Any] = {}
    if isinstance(options, Vectorised):
        vectorised = {"num_envs": options.num_envs, "backend": options.backend,
                      "workers": options.workers, "groups": options.groups or 1,
                      "threads": options.threads or free_cores(options)}
        for env_id in options.env:
            choose_backend(env_id, options.backend, vectorised["groups"])

    def every(steps: int | None, parts: int) -> int:
        return max(1, options.steps // parts) if steps is None else steps

    seeds = range(options.first_seed, options.first_seed + options.seeds)
    stacks = {env_id: stacks_of(options, env_id, seeds, processes) for env_id in options.env}
    if options.init_from and (new := not_begun(options, folder, seeds)):
        checkpoint.find_sources(options.init_from, new)
    source = Path(options.agent).read_bytes()
    return [Job(
        agent_path=options.agent, config=config, env_id=env_id, seeds=share, steps=options.steps,
        eval_every=every(options.eval_every, 10), log_every=every(options.log_every, 100),
        checkpoint_every=options.checkpoint_every, source=source,
        eval_episodes=options.eval_episodes,
        eval_env=options.eval_env, keep_best=options.keep_best, device=device,
        compile=options.compile, precision=options.precision,
        fp32_library=(fp32_on_cpu(options) and options.fp32_library) or matmul.BLAS,
        action_repeat=options.action_repeat, clip_reward=options.clip_reward,
        failure_below=options.failure_below, env_kwargs=options.env_kwargs,
        stop_at=options.stop_at, stop_at_evals=options.stop_at_evals,
        stop_plateau=options.stop_plateau, stop_rtol=options.stop_rtol, **vectorised,
        init_from=str(options.init_from) if options.init_from else None,
        run=str(folder) if folder else None, name=options.name or Path(options.agent).stem,
    ) for env_id, shares in stacks.items() for share in shares]


def not_begun(options: Options, folder: Path | None, seeds: range) -> list[int]:
    """The seeds that have no checkpoint in one of the environments of the run in the folder."""
    if not folder:
        return [*seeds]
    found = find_stacks(folder)
    groups = [group_folder(folder, env_id, Path(options.agent).stem) for env_id in options.env]
    return [seed for seed in seeds if not all(seed in found.get(group, ()) for group in groups)]


def stacks_of(options: Options, env_id: str, seeds: range, processes: int
              ) -> list[tuple[int, ...]]:
    """The seeds in stacks. A resumed run keeps its own."""
    if options.resume:
        group = group_folder(options.resume, env_id, Path(options.agent).stem)
        return join_stacks(options, group, seeds, len(options.env), processes)
    return shares_of(options, seeds, len(options.env), processes)


def join_stacks(rules: Any, group: Path, seeds: range, environments: int, processes: int
                ) -> list[tuple[int, ...]]:
    """The seeds in stacks, where some have been trained: these keep their stacks, unless they are
    among the new ones."""
    new = shares_of(rules, seeds, environments, processes)
    old = [tuple(members_of(stack)) for stack in group.glob("stack_*_*")]
    if set(old) <= set(new):
        return new
    rest = [seed for seed in seeds if not any(seed in stack for stack in old)]
    # a stack's folder has its first and its last seed: no gaps
    ranges = [[seed for _, seed in pairs] for _, pairs in itertools.groupby(
        enumerate(rest), lambda pair: pair[1] - pair[0])]
    return sorted(old) + [stack for each in ranges
                          for stack in split_seeds(each, environments, processes)]


def check_names(options: Options) -> None:
    """UserError if the run's name is too long for a folder, if two environments would share one,
    or if the locale cannot spell a path."""
    name = options.name or Path(options.agent).stem
    if (size := len(os.fsencode(safe_name(name)))) > MAX_NAME:
        raise UserError(f"--name is too long for a folder: {size} bytes, at most {MAX_NAME}")
    for path in (options.agent, str((options.resume or options.runs).absolute())):
        if options.log and printable(path) != path:  # TensorBoard cannot write there
            raise UserError(f"{path}: the locale has no such letters; set PYTHONUTF8=1")
    folders: dict[Path, str] = {}
    for env_id in options.env:
        other = folders.setdefault(group_folder(Path(), env_id, ""), env_id)
        if other != env_id:
            raise UserError(f"{other} and {env_id} would write to the same folder: train them in "
                            "two runs")


def shares_of(rules: Any, seeds: Sequence[int], environments: int, processes: int
              ) -> list[tuple[int, ...]]:
    """The seeds in stacks: a single one if a rule may stop the run, since it needs all seeds."""
    return [tuple(seeds)] if stops(rules) else split_seeds(seeds, environments, processes)


def split_seeds(seeds: Sequence[int], environments: int, processes: int) -> list[tuple[int, ...]]:
    """Split the seeds into stacks so that the run ends early; on a tie, into fewer, larger stacks.

    A stack of n seeds is assumed to cost n. The processes work through environments x shares.
    """
    def cost(shares: int) -> int:
        rounds = math.ceil(environments * shares / processes)
        return rounds * math.ceil(len(seeds) / shares)

    shares = min(range(1, len(seeds) + 1), key=lambda n: (cost(n), n))
    bounds = [round(i * len(seeds) / shares) for i in range(shares + 1)]
    return [tuple(seeds[a:b]) for a, b in itertools.pairwise(bounds)]


def dry_run(job: Job) -> tuple[EnvSpec, matmul.Products]:
    """Run the environment for some random steps, and the agent on constant observations up to its
    first update -> the environment's spec, the update's matrix products. Prints warnings. UserError
    if the environment or the agent fails; writes no files. Where only the nodes of a cluster have a
    GPU, it runs on the CPU."""
    device = job.device if torch.cuda.is_available() else "cpu"
    if choose_backend(job.env_id, job.eval_backend) == "sync":
        spec, warnings = check.dry_run(job.env_id, job.env_kwargs, job.instances > 1)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
    else:
        stack = make_envs(job.env_id, [0], 1, job.eval_backend, device)
        with contextlib.closing(stack) as one:
            spec = one.spec
    if job.init_from and not job.run:
        init_agent(job, spec, device, build_agent(
            job.agent_path, job.config, spec, job.seeds, job.num_envs, job.num_envs, device,
            lambda fn: fn))
    products = check_contract(job.agent_path, job.config, spec, job.num_envs, device)
    if job.eval_env != "none" and spec.max_episode_steps is None:
        print(f"warning: {job.env_id} has no time limit: an evaluation episode of more than "
              f"{ENDLESS} steps would end the run; register it with max_episode_steps",
              file=sys.stderr)
    return spec, products


def init_agent(job: Job, spec: EnvSpec, device: str, agent: Any) -> None:
    """Copy the weights of --init-from into the agent. UserError if they do not fit."""
    one = build_agent(job.agent_path, job.config, spec, job.seeds[:1], job.num_envs, job.num_envs,
                      device, lambda fn: fn, job.source)
    checkpoint.init_agent(agent, one, job.seeds, Path(job.init_from or ""))


def choose_fp32_library(options: AnyOptions, jobs: Sequence[Job], products: matmul.Products
                        ) -> AnyOptions:
    """The options with the library for the fp32 products of all the jobs: on a CPU the given one,
    or else the faster exact one. On a cluster it is BLAS, since processors may differ. UserError if
    the given one rounds here."""
    if not fp32_on_cpu(options):
        return options
    if getattr(options, "engine", "local") == "ray":
        return replace(options, fp32_library=matmul.BLAS)  # recorded: a run may go on elsewhere
    library = matmul.choose(products, options.fp32_library, jobs[0].threads)
    return replace(options, fp32_library=library)


def fp32_on_cpu(options: Options) -> bool:
    return options.precision == "fp32" and not options.cuda
