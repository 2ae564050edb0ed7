"""Run jobs in parallel local processes; restart killed ones."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple

import torch

from lab.accelerate import out_of_memory, prepare_process
from lab.agent import place_of
from lab.envs.worker import die_with
from lab.errors import CodeError, RefusedError, UserError, first_line, guard_output
from lab.training.job import Emit, Job
from lab.training.loop import train

RETRIES = 2  # restarts of a job whose process was killed
END_SECONDS = 180.0  # for interrupted jobs to write their checkpoints: an evaluation is one step
Report = Callable[[int, dict[str, Any]], None]  # called with the job's index and a message


def run_jobs(jobs: Sequence[Job], processes: int, report: Report, engine: "Engine | None" = None
             ) -> dict[int, str]:
    """Train all jobs -> {index: reason} of those that failed. A single job runs in this process,
    unless there is an engine.

    A killed process restarts from its checkpoint, if the run writes any. KeyboardInterrupt
    propagates after the processes have written their checkpoints.
    """
    if len(jobs) == 1 and not engine:
        failure = attempt(train, jobs[0], lambda message: report(0, message))
        return {0: failure.reason} if failure else {}
    failures: dict[int, str] = {}
    waiting, retries = list(range(len(jobs))), Counter[int]()
    with engine.processes(min(processes, len(jobs))) if engine else Processes() as pool:
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
                    report(index, {"warning": f"{message.reason}; restarting"})
                else:
                    failures[index] = message.reason
    return failures


class Failure(NamedTuple):
    """Why a job did not finish."""

    reason: str
    cause: str  # "killed", "settings" (refused, or out of memory) or "error" (any other exception)


class Processes:
    """One process per job, identified by a key. Leaving the context stops all of them. Each calls
    `work(job, emit)`, which must be a module-level function. With several GPUs, each process takes
    the next one."""

    def __init__(self, work: Callable[[Job, Emit], None] = train) -> None:
        self.work = work
        self.running: dict[int, Any] = {}  # key -> the process and the pipe to it
        self.gpus: dict[int, str] = {}  # key -> the GPU of its process
        self.failures: dict[int, Failure] = {}

    def __enter__(self) -> "Processes":
        return self

    def start(self, key: int) -> None:
        """Start a process, which spends seconds on imports and then waits for its job."""
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(theirs, os.getpid(), self.work))
        process.start()
        theirs.close()
        self.running[key] = process, ours

    def give(self, key: int, job: Job) -> None:
        if job.device == "cuda":
            gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
            self.gpus[key] = min(gpus, key=[*self.gpus.values()].count)  # with the fewest jobs
            job = dataclasses.replace(job, device=self.gpus[key])
        with contextlib.suppress(OSError):  # the process was killed: receive() reports it
            self.running[key][1].send(job)

    def receive(self, timeout: float | None = None
                ) -> Iterator[tuple[int, dict[str, Any] | Failure | None]]:
        """Wait for messages -> (key, message). The last one of a process is a Failure or None."""
        ready = connection.wait([pipe for _, pipe in self.running.values()], timeout)
        for key, (process, pipe) in list(self.running.items()):
            if pipe not in ready:
                continue
            try:  # one pipe per process: a kill breaks no other
                message = pipe.recv()
            except (EOFError, OSError):
                process.join()
                pipe.close()
                del self.running[key]
                self.gpus.pop(key, None)
                reason = f"its process ended with code {process.exitcode}"
                killed = Failure(reason, "killed") if process.exitcode else None
                yield key, self.failures.pop(key, killed)
                continue
            if isinstance(message, Failure):
                self.failures[key] = message
            else:
                yield key, message

    def end(self, key: int) -> None:
        """Ask the process to write a checkpoint and exit after its current step."""
        self.running[key][0].terminate()

    def __exit__(self, *exception: object) -> None:
        for key in self.running:
            self.end(key)
        deadline = time.monotonic() + END_SECONDS
        for process, _ in self.running.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                warn_late()
                process.kill()
                process.join()


def warn_late() -> None:
    print(f"a process did not end its step in {END_SECONDS:.0f} s and was killed: "
          "what it did since its last checkpoint is lost", file=sys.stderr)


class Engine(NamedTuple):
    """What runs jobs elsewhere than in processes of this machine."""

    cpus: int  # jobs at once, by default
    processes: Callable[[int], Processes]  # called with the number of jobs at once


def _child(pipe: connection.Connection, parent: int, work: Callable[[Job, Emit], None]) -> None:
    die_with(parent)
    guard_output()

    def send(message: dict[str, Any]) -> None:
        try:
            pipe.send(message)
        except BrokenPipeError:  # the parent is gone: write a checkpoint and end
            signal.raise_signal(signal.SIGTERM)

    try:
        failure = attempt(work, pipe.recv(), send)
    except (KeyboardInterrupt, BrokenPipeError, EOFError):
        sys.exit(1)
    if failure:
        pipe.send(failure)
    pipe.close()


def attempt(work: Callable[[Job, Emit], None], job: Job, emit: Emit) -> Failure | None:
    """Run the job -> None, or why it failed. An unexpected exception prints its traceback; the
    reason begins with file and line of the agent if the exception went through its code."""
    prepare_process(job.threads, job.device)
    try:
        with contextlib.chdir(os.curdir):  # back to it: an environment may change it
            work(job, emit)
    except UserError as error:
        cause = error.__cause__ if isinstance(error, CodeError) else None
        if cause:
            traceback.print_exception(cause)
        settings = isinstance(error, RefusedError) or (cause and place_of(job.agent_path, cause))
        return Failure(str(error), "settings" if settings else "error")
    except BrokenPipeError:
        raise
    except (Exception, SystemExit) as error:  # sys.exit() in the user's code
        traceback.print_exc()
        place = place_of(job.agent_path, error)
        reason = f"{place}: " * bool(place) + f"{type(error).__name__}: {first_line(error)}"
        return Failure(reason, "settings" if out_of_memory(error) else "error")
    return None
