"""Gymnasium environments in processes: shared arrays, one byte a step, groups that step in turn.

Each worker holds some environments of every group, so that all workers step while the agent acts
on the next group. A worker that dies, fails or hangs is named in a WorkerError.
"""

import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import socket
import weakref
from typing import Any

import numpy as np
import torch

from lab import gym_envs
from lab.accelerate import physical_cores
from lab.envs import TRAINING, HostEnvs, Layout, Transition, probe
from lab.gym_envs import RESET, UserError

START_SECONDS, STEP_SECONDS = 120.0, 60.0  # a worker that takes longer hangs


class WorkerError(UserError):
    """A worker died, failed or hangs; the environments are of no use any more."""


class WorkerEnvs(HostEnvs):
    def __init__(self, layout: Layout):
        super().__init__(layout, probe(layout.env_id))
        S, N = self.shape
        workers = min(layout.workers or physical_cores(), S * N)
        groups = min(layout.groups, N)
        bounds = [round(i * N / groups) for i in range(groups + 1)]
        self.groups = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        self.bounds = [S * bound for bound in bounds]  # rows, which lie group by group
        # seed by seed within a group; a worker takes neighbouring rows
        rows = [(s, n) for group in self.groups for s in range(S) for n in range(N)[group]]
        place = {row: number for number, row in enumerate(rows)}
        self.order = torch.tensor([place[s, n] for s in range(S) for n in range(N)])

        shared = [self._share(name) for name in ("actions", "rows", "returns")]
        self.awaited = 0  # groups that are stepping
        self.links: list[socket.socket] = []
        self.processes: list[Any] = []
        # also at the interpreter's exit, before multiprocessing waits for the workers
        self.end = weakref.finalize(self, _end, self.links, self.processes)
        context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
        for worker in range(workers):
            parts = []
            for start, end in itertools.pairwise(self.bounds):
                a, b = (start + (end - start) * (worker + i) // workers for i in (0, 1))
                parts.append(([(layout.seeds[s], n) for s, n in rows[a:b]], a))
            ours, theirs = socket.socketpair()
            process = context.Process(target=gym_envs.serve, daemon=True, args=(
                theirs, os.getpid(), layout.env_id, parts, shared))
            with theirs:
                process.start()
            ours.settimeout(START_SECONDS)
            self.links.append(ours)
            self.processes.append(process)
        self._await_all("start", 1)

    def _share(self, name: str) -> tuple[Any, np.dtype, tuple[int, ...]]:
        """Put that array into memory which the workers see as well."""
        array = getattr(self, name)
        context = multiprocessing.get_context("spawn")
        buffer = context.RawArray(ctypes.c_byte, array.nbytes)
        view = np.frombuffer(memoryview(buffer), array.dtype)
        setattr(self, name, view.reshape(array.shape))
        return buffer, array.dtype, array.shape

    def reset(self, *stream: int) -> torch.Tensor:
        self._await_all("step", self.awaited)
        self.awaited = 0
        self.rows[:] = self.sums[:] = 0
        self._command(bytes([RESET]) + json.dumps(stream or (TRAINING,)).encode(), START_SECONDS)
        self._await_all("reset", 1)
        return self.transition().obs

    def send(self, actions: torch.Tensor, group: int = 0) -> None:
        self.put_actions(actions, slice(self.bounds[group], self.bounds[group + 1]))
        self._command(bytes([group]), STEP_SECONDS)
        self.awaited += 1

    def receive(self) -> Transition:
        self._await_all("step", self.awaited)
        self.awaited = 0
        return self.transition()

    def _command(self, command: bytes, seconds: float) -> None:
        for worker, link in enumerate(self.links):
            link.settimeout(seconds)
            try:
                link.sendall(command)
            except OSError:  # it is gone; what it said before may say why
                self._await(worker, "command", 1 + self.awaited)

    def _await_all(self, what: str, answers: int) -> None:
        for worker in range(len(self.links)):
            self._await(worker, what, answers)

    def _await(self, worker: int, what: str, answers: int) -> None:
        link = self.links[worker]
        while answers:
            try:
                answer = link.recv(answers)
            except TimeoutError:
                self._fail(worker, f"did not answer to a {what} for {link.gettimeout():.0f} s")
            except OSError:
                answer = b""
            if not answer:
                self._fail(worker, "died")
            if b"!" in answer:
                self._fail(worker, "failed: " + self._last_words(answer, link))
            answers -= len(answer)

    @staticmethod
    def _last_words(answer: bytes, link: socket.socket) -> str:
        with contextlib.suppress(OSError):
            while more := link.recv(4096):
                answer += more
        return answer[answer.index(b"!") + 1 :].decode(errors="replace")

    def _fail(self, worker: int, what: str) -> None:
        process = self.processes[worker]
        if what == "died":
            process.join(5)
            code = process.exitcode
            what += f" by signal {-code}" if code and code < 0 else f" with exit code {code}"
        number, pid = worker + 1, process.pid
        total = len(self.processes)
        self.close()
        raise WorkerError(f"{self.spec.id}: environment worker {number} of {total} (process {pid}) "
                          f"{what}")

    def close(self) -> None:
        self.end()


def _end(links: list[socket.socket], processes: list[Any]) -> None:
    for link in links:
        link.close()  # a worker that waits for a command ends
    for process in processes:
        process.join(5)
        process.kill()
        process.join()
