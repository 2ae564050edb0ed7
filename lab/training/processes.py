"""Jobs in parallel local processes, and what becomes of each."""

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple

import torch

from lab.accelerate import prepare_process
from lab.agent import place_of
from lab.envs.worker import die_with
from lab.errors import CodeError, UserError
from lab.training.job import Emit, Job
from lab.training.loop import train

RETRIES = 2  # of a job whose process was killed
Report = Callable[[int, dict[str, Any]], None]  # the job's index, and a message of its process


def run_jobs(jobs: Sequence[Job], processes: int, report: Report) -> dict[int, str]:
    """Train every job -> why each failed one failed, by its index. One job runs in this process.

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
                index = waiting.pop(0)
                pool.start(index)
                pool.give(index, jobs[index])
            for index, message in pool.receive():
                if not isinstance(message, Failure):
                    if message is not None:
                        report(index, message)
                elif message.cause == "killed" and jobs[index].run and retries[index] < RETRIES:
                    retries[index] += 1
                    waiting.insert(0, index)
                    report(index, {"warning": f"{message.reason}; it is tried again"})
                else:
                    failures[index] = message.reason
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
    """Do it -> None, or why it failed; the traceback of an unexpected failure goes to stderr. The
    reason begins with file and line of the agent if the exception went through its code."""
    prepare_process(job.threads)
    try:
        work(job, emit)
    except UserError as error:
        if isinstance(error, CodeError) and error.__cause__:
            traceback.print_exception(error.__cause__)
        return Failure(str(error), "settings")
    except BrokenPipeError:
        raise
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().splitlines()[0] if str(error) else ""
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
            "can't allocate memory" in str(error))  # what torch says of a CPU's
        place = place_of(job.agent_path, error)
        reason = f"{place}: " * bool(place) + f"{type(error).__name__}: {first}"
        return Failure(reason, "settings" if memory else "error")
    return None
