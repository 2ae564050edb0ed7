"""Jobs: made of the options, run in parallel local processes, and what becomes of each."""

import contextlib
import itertools
import math
import multiprocessing
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lab import accelerate, agent_file, envs
from lab.arguments import Options, Vectorised, check
from lab.gym_envs import UserError, die_with
from lab.rollout import Emit, Job, train

RETRIES = 2  # of a job whose process was killed
Report = Callable[[int, dict[str, Any]], None]  # the job's place, and a message of its process


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

    shares = split_seeds(range(options.seeds), len(options.env), processes)
    return [Job(
        agent_path=options.agent, config=config, env_id=env_id, seeds=share, steps=options.steps,
        eval_every=every(options.eval_every, 10), log_every=every(options.log_every, 100),
        checkpoint_every=options.checkpoint_every, eval_episodes=options.eval_episodes,
        device=device, compile=options.compile, precision=options.precision,
        clip_reward=options.clip_reward, **layout,
        run=str(folder) if folder else None, name=options.name or Path(options.agent).stem,
    ) for env_id in options.env for share in shares]


def rehearse(job: Job) -> envs.EnvSpec:
    """The agent's first steps on made-up observations -> its environment's spec. UserError if
    either cannot work; nothing is written."""
    with contextlib.closing(envs.make(job.env_id, [0], 1, job.own_backend, job.device)) as one:
        spec = one.spec
    agent_file.check_contract(job.agent_path, job.config, spec, job.num_envs, job.device)
    return spec


def split_seeds(seeds: Sequence[int], environments: int, processes: int) -> list[tuple[int, ...]]:
    """Shares of the seeds, one stack each, so that the processes end early and stacks stay large.

    A share of size n costs about n; the processes work through environments x shares of them.
    """
    def cost(shares: int) -> int:
        rounds = math.ceil(environments * shares / processes)
        return rounds * math.ceil(len(seeds) / shares)

    shares = min(range(1, len(seeds) + 1), key=lambda n: (cost(n), n))
    bounds = [round(i * len(seeds) / shares) for i in range(shares + 1)]
    return [tuple(seeds[a:b]) for a, b in itertools.pairwise(bounds)]


def run(jobs: Sequence[Job], processes: int, report: Report) -> dict[int, str]:
    """Train every job -> why each failed one failed, by its place. One job runs in this process.

    A process that is killed is tried again from its job's checkpoint, if the run leaves any.
    KeyboardInterrupt passes through after the processes have written their checkpoints.
    """
    if len(jobs) == 1:
        failure = _attempt(train, jobs[0], lambda message: report(0, message))
        return {0: failure.reason} if failure else {}
    failures: dict[int, str] = {}
    waiting, retries = list(range(len(jobs))), Counter[int]()
    with Processes() as pool:
        while waiting or pool.running:
            while waiting and len(pool.running) < processes:
                place = waiting.pop(0)
                pool.start(place)
                pool.give(place, jobs[place])
            for place, message in pool.receive():
                if not isinstance(message, Failure):
                    if message is not None:
                        report(place, message)
                elif message.cause == "killed" and jobs[place].run and retries[place] < RETRIES:
                    retries[place] += 1
                    waiting.insert(0, place)
                    report(place, {"warning": f"{message.reason}; it is tried again"})
                else:
                    failures[place] = message.reason
    return failures


class Failure(NamedTuple):
    """Why a job did not get to its end."""

    reason: str
    cause: str  # "killed" its process; "settings": refused, or too large for memory; "error"


class Processes:
    """One process for each job, which is known by a key; leaving the context stops them all.
    `work(job, emit)` is what they do, a function of a module."""

    def __init__(self, work: Callable[[Job, Emit], None] = train) -> None:
        self.work = work
        self.running: dict[int, tuple[Any, connection.Connection]] = {}
        self.failures: dict[int, Failure] = {}

    def __enter__(self) -> "Processes":
        return self

    def start(self, key: int) -> None:
        """A process that imports what it needs (seconds) until it is given its job."""
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(theirs, os.getpid(), self.work))
        process.start()
        theirs.close()
        self.running[key] = process, ours

    def give(self, key: int, job: Job) -> None:
        with contextlib.suppress(OSError):  # it was killed: receive tells
            self.running[key][1].send(job)

    def receive(self, timeout: float | None = None
                ) -> Iterator[tuple[int, dict[str, Any] | Failure | None]]:
        """Wait for messages -> each with its key; at the end of a process its Failure, or None."""
        ready = connection.wait([pipe for _, pipe in self.running.values()], timeout)
        for key, (process, pipe) in list(self.running.items()):
            if pipe not in ready:
                continue
            try:  # each process has its own pipe, so a kill breaks only that
                message = pipe.recv()
            except (EOFError, OSError):
                process.join()
                pipe.close()
                del self.running[key]
                reason = f"its process ended with code {process.exitcode}"
                killed = Failure(reason, "killed") if process.exitcode else None
                yield key, self.failures.pop(key, killed)
                continue
            if isinstance(message, Failure):
                self.failures[key] = message
            else:
                yield key, message

    def end(self, key: int) -> None:
        """Ask for a checkpoint and an end, after the step that it is at."""
        self.running[key][0].terminate()

    def __exit__(self, *exception: object) -> None:
        for key in self.running:
            self.end(key)
        for process, _ in self.running.values():
            process.join(30)
            process.kill()


def _child(pipe: connection.Connection, parent: int, work: Callable[[Job, Emit], None]) -> None:
    die_with(parent)
    try:
        failure = _attempt(work, pipe.recv(), pipe.send)
    except (KeyboardInterrupt, BrokenPipeError, EOFError):
        sys.exit(1)
    if failure:
        pipe.send(failure)
    pipe.close()


def _attempt(work: Callable[[Job, Emit], None], job: Job, emit: Emit) -> Failure | None:
    """Do it -> None, or why it failed; the traceback of an unexpected failure goes to stderr."""
    try:
        work(job, emit)
    except UserError as error:
        return Failure(str(error), "settings")
    except BrokenPipeError:
        raise
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().splitlines()[0] if str(error) else ""
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
            "can't allocate memory" in str(error))  # what torch says of a CPU's
        return Failure(f"{type(error).__name__}: {first}", "settings" if memory else "error")
    return None
