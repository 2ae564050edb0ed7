"""Gymnasium environments in worker processes: shared arrays, one byte per command and answer,
groups that step in turn.

Each process holds some environments of every group, so all processes step while the agent acts on
the next group. The main process is one of them: with one more worker than cores, a worker would
wait for a core (HalfCheetah-v5, 16 environments on 2 cores: 1.3 times the steps/s). If a worker
dies, fails or hangs, a WorkerError names it.
"""

import contextlib
import ctypes
import functools
import itertools
import multiprocessing
import os
import socket
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lab.accelerate import physical_cores
from lab.envs.base import Transition, VecEnvConfig
from lab.envs.host import HostEnvs
from lab.envs.shard import REPLAY_ACTIONS, EnvShard, handle_command, make_shards
from lab.envs.spec import probe
from lab.envs.worker import recv, serve
from lab.errors import UserError, one_line

START_SECONDS, STEP_SECONDS = 120.0, 60.0  # a worker that takes longer counts as hung


class WorkerError(UserError):
    """A worker died, failed or hangs; the environments are closed."""


class WorkerEnvs(HostEnvs):
    def __init__(self, config: VecEnvConfig):
        super().__init__(config, probe(config.env_id, config.env_kwargs))
        S, N = self.shape
        processes = min(config.workers or physical_cores(), S * N)
        groups = min(config.groups, N, REPLAY_ACTIONS)
        bounds = [round(i * N / groups) for i in range(groups + 1)]
        self.groups = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        self.bounds = [S * bound for bound in bounds]  # first row of each group
        # ordered by group, then by seed; a process holds adjacent rows of each group
        rows = [(s, n) for group in self.groups for s in range(S) for n in range(N)[group]]
        row_of = {key: number for number, key in enumerate(rows)}
        self.order = torch.tensor([row_of[s, n] for s in range(S) for n in range(N)])

        shared = [self._share(name) for name in ("actions", "rows", "returns", "origins")]
        self.sent: list[int] = []  # groups whose step has started
        self.timeout = START_SECONDS
        self.own: list[EnvShard] = []  # this process's part of each group
        self.links: list[socket.socket] = []
        self.processes: list[Any] = []
        # runs at interpreter exit too, before multiprocessing joins the workers
        self.finalizer = weakref.finalize(self, _stop_workers, self.links, self.processes)
        context = multiprocessing.get_context("spawn")  # fork is unsafe with CUDA and threads
        # no daemons, whose environments could start no process; they end with this one all the same
        for process in range(1, processes):
            ours, theirs = socket.socketpair()
            worker = context.Process(target=serve, args=(
                theirs, os.getpid(), config.env_id, self._parts(rows, process, processes), shared,
                config.env_kwargs, config.rules))
            with theirs:
                worker.start()
            ours.setblocking(False)
            self.links.append(ours)
            self.processes.append(worker)
        arrays = self.actions, self.rows, self.returns, self.origins
        self.own = make_shards(config.env_id, self._parts(rows, 0, processes), arrays,
                               config.env_kwargs, config.rules)
        self._await_all("start", 1)

    def _parts(self, rows: list[tuple[int, int]], process: int, processes: int
               ) -> list[tuple[list[tuple[int, int]], int]]:
        """A process's part of each group: its (seed, n) keys and the first of their rows."""
        parts = []
        for start, end in itertools.pairwise(self.bounds):
            a, b = (start + (end - start) * (process + i) // processes for i in (0, 1))
            parts.append(([(self.config.seeds[s], n) for s, n in rows[a:b]], a))
        return parts

    def _share(self, name: str) -> tuple[Any, np.dtype, tuple[int, ...]]:
        """Move the array of that name to shared memory -> its buffer, dtype and shape."""
        array = getattr(self, name)
        context = multiprocessing.get_context("spawn")
        buffer = context.RawArray(ctypes.c_byte, array.nbytes)
        view = np.frombuffer(memoryview(buffer), array.dtype)
        setattr(self, name, view.reshape(array.shape))
        return buffer, array.dtype, array.shape

    def command(self, command: bytes) -> None:
        self._await_all("step", len(self.sent))
        self.sent = []
        self._command(command, START_SECONDS)
        for each in self.own:
            self._run_own(functools.partial(handle_command, each, command))
        self._await_all("reset", 1)

    def send(self, actions: torch.Tensor, group: int = 0) -> None:
        self.put_actions(actions, slice(self.bounds[group], self.bounds[group + 1]))
        self._command(bytes([group]), STEP_SECONDS)
        self.sent.append(group)

    def receive(self) -> Transition:
        for group in self.sent:
            self._run_own(self.own[group].step)
        self._await_all("step", len(self.sent))
        self.sent = []
        return self.stepped()

    def _run_own(self, fn: Callable[[], None]) -> None:
        """Run this process's environments; an exception becomes a WorkerError."""
        try:
            fn()
        except Exception as error:
            self.close()
            raise WorkerError(f"{self.spec.id} failed: {one_line(error)}") from error

    def _command(self, command: bytes, seconds: float) -> None:
        self.timeout = seconds
        for worker, link in enumerate(self.links):
            try:
                link.sendall(command)
            except OSError:  # it died; its last message may hold the reason
                self._await(worker, "command", 1 + len(self.sent))

    def _await_all(self, what: str, answers: int) -> None:
        for worker in range(len(self.links)):
            self._await(worker, what, answers)

    def _await(self, worker: int, what: str, answers: int) -> None:
        link = self.links[worker]
        while answers:
            try:
                answer = recv(link, answers, self.timeout)
            except TimeoutError:
                self._fail(worker, f"did not finish a {what} within {self.timeout:.0f} s")
            except OSError:
                answer = b""
            if not answer:
                self._fail(worker, "died")
            if b"!" in answer:
                self._fail(worker, "failed: " + self._error_text(answer, link))
            answers -= len(answer)

    @staticmethod
    def _error_text(answer: bytes, link: socket.socket) -> str:
        with contextlib.suppress(OSError):
            while more := recv(link, 4096, 5):
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
        self.finalizer()
        for each in self.own:
            each.close()
        self.own = []


def _stop_workers(links: list[socket.socket], processes: list[Any]) -> None:
    for link in links:
        link.close()  # ends a worker that waits for a command
    for process in processes:
        process.join(5)
        process.kill()
        process.join()
