"""The life of a process that steps environments. No torch: it starts fast and stays small."""

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

from lab.envs.shard import REPLAY_ACTIONS, handle_command, make_shards

SPIN_SECONDS = 5e-4  # about the longest time between two steps that waking up would prolong


def serve(link: socket.socket, parent: int, env_id: str, groups: Sequence[tuple[Any, ...]],
          shared: Sequence[Any]) -> None:
    """A worker's life: step its shard of each group when told, until the link closes.

    groups: as of `make_shards`; shared: the buffers of an EnvShard's arrays with their shapes.
    Every command is answered by one byte, or by "!" and an error, which is the last word.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they are the main process's business
        signal.signal(number, signal.SIG_IGN)
    die_with(parent, signal.SIGKILL)
    link.setblocking(False)
    try:
        arrays = [np.frombuffer(buffer, dtype).reshape(shape) for buffer, dtype, shape in shared]
        shards = make_shards(env_id, groups, arrays)
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
        reason = " ".join(str(error).split())
        link.sendall(f"!{type(error).__name__}: {reason}".encode())


def recv(link: socket.socket, size: int, seconds: float | None = None) -> bytes:
    """What a link that does not block says, up to `size` bytes; TimeoutError after the seconds.

    First awake: to wake a sleeping process takes as long as a step or two of an environment
    (HalfCheetah-v5, 16 environments, 2 workers on 2 cores: 1.2 to 1.5 times the steps a second). A
    process that waits for this core gets its turn.
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
    """On Linux, a process whose parent is killed gets this signal as well: no orphans."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            sys.exit(1)
