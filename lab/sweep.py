"""Jobs in parallel local processes, one process a job, and what becomes of each."""

import itertools
import math
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from typing import Any

from lab.gym_envs import UserError, die_with
from lab.rollout import Job, train

Report = Callable[[int, dict[str, Any]], None]  # the job's place, and a message of its process


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

    KeyboardInterrupt passes through after the processes have written their checkpoints.
    """
    if len(jobs) == 1:
        failure = _attempt(jobs[0], lambda message: report(0, message))
        return {0: failure} if failure else {}
    return _Processes(jobs, processes, report).run()


class _Processes:
    def __init__(self, jobs: Sequence[Job], processes: int, report: Report):
        self.jobs, self.processes, self.report = jobs, processes, report
        self.waiting = list(range(len(jobs)))
        self.running: dict[int, tuple[Any, connection.Connection]] = {}
        self.failures: dict[int, str] = {}

    def run(self) -> dict[int, str]:
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.processes:
                    self._start(self.waiting.pop(0))
                ready = connection.wait([pipe for _, pipe in self.running.values()])
                for place, (_, pipe) in list(self.running.items()):
                    if pipe in ready:
                        self._receive(place)
        except BaseException:
            self._stop()
            raise
        return self.failures

    def _start(self, place: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(self.jobs[place], theirs, os.getpid()))
        process.start()
        theirs.close()
        self.running[place] = process, ours

    def _receive(self, place: int) -> None:
        """A message, or the end of the pipe: each process has its own, so a kill breaks only it."""
        process, pipe = self.running[place]
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            process.join()
            del self.running[place]
            if process.exitcode and place not in self.failures:
                self.failures[place] = f"its process ended with code {process.exitcode}"
            return
        if "failure" in message:
            self.failures[place] = message["failure"]
        else:
            self.report(place, message)

    def _stop(self) -> None:
        for process, _ in self.running.values():
            process.terminate()  # asks for a checkpoint
        for process, _ in self.running.values():
            process.join(30)
            process.kill()


def _child(job: Job, pipe: connection.Connection, parent: int) -> None:
    die_with(parent)
    try:
        failure = _attempt(job, pipe.send)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(1)
    if failure:
        pipe.send({"failure": failure})
    pipe.close()


def _attempt(job: Job, emit: Callable[[dict[str, Any]], None]) -> str | None:
    """Train -> None, or why it failed; the traceback of an unexpected failure goes to stderr."""
    try:
        train(job, emit)
    except UserError as error:
        return str(error)
    except BrokenPipeError:
        raise
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return None
