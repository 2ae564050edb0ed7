"""Main loop of a worker process. No torch, so that workers start fast and stay small."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from multiprocessing import connection
from typing import Any

import numpy as np

from lab.envs.shard import REPLAY_ACTIONS, EnvShard, StepRules, handle_command, make_shards
from lab.errors import guard_output, one_line

SPIN_SECONDS = 5e-4  # waking up costs little against a longer wait


def serve(link: socket.socket, parent: int, env_id: str, groups: Sequence[tuple[Any, ...]],
          shared: Sequence[Any], env_kwargs: Sequence[str], rules: StepRules) -> None:
    """Worker main loop: run commands for its shard of each group until the link closes.

    groups: see `make_shards`; shared: (buffer, dtype, shape) of each array of EnvShard. The answer
    to a command is one byte; after an error it is "!" and the message, and the worker ends.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process handles them
        signal.signal(number, signal.SIG_IGN)
    die_with(parent, signal.SIGKILL)
    guard_output()
    link.setblocking(False)
    shards: list[EnvShard] = []
    try:
        arrays = [np.frombuffer(buffer, dtype).reshape(shape) for buffer, dtype, shape in shared]
        shards = make_shards(env_id, groups, arrays, env_kwargs, rules)
        link.sendall(b".")
        while command := recv(link, 4096):
            if command[0] >= REPLAY_ACTIONS:
                for each in shards:
                    handle_command(each, command)
                link.sendall(b".")
                continue
            for group in command:
                shards[group].step()
                link.sendall(b".")
    except (BrokenPipeError, ConnectionResetError):
        return  # the main process is gone
    except Exception as error:
        link.sendall(f"!{one_line(error)}".encode())
    finally:
        for each in shards:
            with contextlib.suppress(Exception):
                each.close()


def recv(link: socket.socket, size: int, seconds: float | None = None) -> bytes:
    """Receive up to `size` bytes from a non-blocking socket. TimeoutError after `seconds`.

    Spins before it sleeps: waking a process takes as long as one or two environment steps
    (HalfCheetah-v5, 16 environments, 2 workers on 2 cores: 1.2 to 1.5 times the steps/s).
    sched_yield lets other processes use the core meanwhile.
    """
    end = time.perf_counter() + SPIN_SECONDS
    while time.perf_counter() < end:
        with contextlib.suppress(BlockingIOError):
            return link.recv(size)
        os.sched_yield()
    if not connection.wait([link], seconds):
        raise TimeoutError
    return link.recv(size)


def die_with(parent: int, number: signal.Signals = signal.SIGTERM) -> None:
    """On Linux, get this signal when the parent dies, so that no orphan is left."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            sys.exit(1)
