"""Atomic, checksummed checkpoints: step_<step>-<sha256>.pt; the last two are kept.

Each is written to a temporary file, flushed to disk and renamed, so a kill at any moment leaves the
previous one intact. The name holds the SHA-256 of the file, because torch.load does not detect
flipped bits. The file is what torch.save wrote. Loading never runs code (weights_only).

Large tensors, such as a replay, are stored in blocks/, each named by its hash. Blocks that have not
changed since the last checkpoint are not written again.
"""

import contextlib
import errno
import hashlib
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import torch
import torch.utils._pytree as pytree

from lab.accelerate import out_of_memory
from lab.agent import copy_seed, weights
from lab.errors import UserError, first_line
from lab.training import recorder

Which = Literal["last", "best"]  # weights: of the last step, or of each seed's best evaluation
KEPT = 2
LOCK_SECONDS = 120.0  # NFS frees the lock of a lost node after 90
BLOCK = 2**22  # bytes; smaller tensors stay in the file
NAME = re.compile(r"step_(\d+)-([0-9a-f]{64})\.pt")


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on the folder. Waits up to LOCK_SECONDS, because the child of a killed
    run needs a moment to exit; then UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "wb") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while not locked(file):
            if time.monotonic() > deadline:
                raise UserError(f"another process is training in {folder}: wait until it ends")
            time.sleep(0.1)
        yield


def locked(file: IO[bytes]) -> bool:
    """Try to lock the file -> success. The lock lasts until the file is closed."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        return True  # no fcntl on this system: no locks
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        print(f"warning: {file.name}: the file system has no locks ({error.strerror}), so nothing "
              "keeps two processes from one run", file=sys.stderr)
    return True


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` (tensors, numbers, strings in dicts and lists) -> the file."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = folder / "blocks"
    for leftover in (*folder.glob("*.tmp"), *blocks.glob("*.tmp")):
        leftover.unlink()
    state = pytree.tree_map_only(
        torch.Tensor, lambda x: _put(blocks, x) if x.nbytes >= BLOCK else x, state)
    temporary = folder / f"unfinished_{step}.tmp"
    with open(temporary, "w+b") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # what torch makes of a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    final = folder / f"step_{step:012d}-{digest}.pt"
    os.replace(temporary, final)
    _sync(folder)
    others = _newest_first(folder)
    kept = [p for p in others if p.name <= final.name][:KEPT]  # later ones are corrupt
    for old in set(others) - set(kept):
        old.unlink()
    if blocks.exists():
        _sweep(blocks, kept)
    return final


def load_latest(folder: Path, device: str = "cpu", replay: bool = True) -> dict[str, Any] | None:
    """The newest intact checkpoint, or None; `replay`: with the agent's replay. A corrupt one is
    reported on stderr and skipped."""
    for path in _newest_first(folder):
        try:
            with open(path, "rb") as file:
                match = NAME.fullmatch(path.name)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if match is None or match[2] != digest:
                    raise ValueError("its hash does not match")
                file.seek(0)
                state: Any = torch.load(file, map_location=device, weights_only=True)
            if not replay:
                state["agent"].pop("replay", None)
            return pytree.tree_map(
                lambda x: _get(folder / "blocks", x, device) if _in_blocks(x) else x, state,
                is_leaf=_in_blocks)
        except Exception as error:
            if out_of_memory(error):
                raise  # the checkpoint may be intact
            print(f"skipping checkpoint {path}: {first_line(error)}", file=sys.stderr)
    return None


def load_seed(folder: Path, seed: int, which: Which, agent: Any, to: tuple[int, int]
              ) -> tuple[int, float | None]:
    """Copy the weights of one seed of the stack in `folder` into the agent; `to`: seeds of its
    stack, the seed's index -> the weights' step and evaluation. UserError if that fails."""
    state = load_latest(folder, replay=False)
    if state is None:
        raise UserError(f"{folder} has no intact checkpoint")
    members = recorder.members_of(folder)
    index = members.index(seed)
    if index in state["failed"]:
        raise UserError(f"{folder}: seed {seed} failed in training")
    saved, steps, returns = state["agent"], [state["step"]] * len(members), state["last_eval"]
    if not state.get("evaluated", True):
        returns = []  # of earlier weights
    if which == "best":
        saved, steps, returns = best_of(state, folder).values()
    try:
        copy_seed(weights(agent), to, saved, (len(members), index))
    except ValueError as error:
        raise UserError(f"{folder} does not fit the agent: {first_line(error)}") from error
    return steps[index], returns[index] if returns else None


def init_agent(agent: Any, one: Any, seeds: Sequence[int], source: Path) -> None:
    """Copy the last weights of another run into an agent that has trained nothing yet, through
    `one`, an agent of one seed: stacks of equal size would not tell what seeds share. UserError if
    a seed has none, or if they do not fit."""
    for index, (stack, seed) in enumerate(find_sources(source, seeds)):
        load_seed(stack, seed, "last", one, (1, 0))
        copy_seed(weights(agent), (len(seeds), index), weights(one), (1, 0))


def find_sources(path: Path, seeds: Sequence[int]) -> list[tuple[Path, int]]:
    """The stack and the seed there whose weights each seed starts from: in a run its own, in a
    seed's folder that one. UserError if a seed has none."""
    path = recorder.located(path)
    groups = list(recorder.find_stacks(path).values())
    if not groups:
        raise UserError(f"{path} has no checkpoint yet")
    if len(groups) > 1:
        raise UserError(f"{path} has several environments: give the folder of one of them")
    (stacks,) = groups
    if recorder.is_seed(path):
        return [(stack, seed) for seed, stack in stacks.items()] * len(seeds)
    for seed in seeds:
        if seed not in stacks:
            raise UserError(f"{path} has no seed {seed} to start from: it has {len(stacks)} seeds; "
                            f"to start all from one, give its folder, such as seed_{min(stacks)}")
    return [(stacks[seed], seed) for seed in seeds]


def best_of(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The best weights, steps and returns of a checkpoint. UserError if it has none."""
    if not state.get("best"):
        raise UserError(f"{folder} has no best weights: no evaluation yet, or --no-keep-best")
    return {name: state["best"][name] for name in ("weights", "steps", "returns")}


def last_step(folder: Path) -> int:
    """The step of the newest checkpoint, intact or not; 0 if there is none."""
    newest = [path.name.split("-")[0] for path in _newest_first(folder)[:1]]
    return int(newest[0].removeprefix("step_")) if newest else 0


def exist(folder: Path) -> bool:
    """Whether the folder holds checkpoints, intact or not."""
    return bool(_newest_first(folder))


def _put(blocks: Path, tensor: torch.Tensor) -> dict[str, Any]:
    """Write the tensor as blocks -> the dict that replaces it in the file."""
    blocks.mkdir(exist_ok=True)
    content, digests = _bytes_of(tensor.detach().cpu().contiguous()), []
    for start in range(0, len(content), BLOCK):
        block = content[start : start + BLOCK]
        digests.append(hashlib.sha256(block).hexdigest())
        path = blocks / digests[-1]
        if not path.exists() or path.stat().st_size != len(block):
            temporary = path.with_suffix(".tmp")
            with open(temporary, "wb") as file:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    _sync(blocks)
    return {"blocks": digests, "block": BLOCK, "like": torch.empty(0, dtype=tensor.dtype),
            "shape": list(tensor.shape)}


def _in_blocks(x: Any) -> bool:
    return isinstance(x, dict) and x.keys() == {"blocks", "block", "like", "shape"}


def _get(blocks: Path, x: dict[str, Any], device: str) -> torch.Tensor:
    size, length = math.prod(x["shape"]) * x["like"].element_size(), x["block"]
    if math.ceil(size / length) != len(x["blocks"]):
        raise ValueError("blocks are missing")
    tensor = torch.empty(x["shape"], dtype=x["like"].dtype)
    content = _bytes_of(tensor)
    for number, digest in enumerate(x["blocks"]):
        block, path = content[number * length :][:length], blocks / Path(digest).name
        with open(path, "rb") as file:
            complete = file.readinto(block) == len(block)
        if not complete or hashlib.sha256(block).hexdigest() != digest:
            path.unlink()  # the next checkpoint writes it again
            raise ValueError(f"block {path.name[:8]} is corrupt")
    return tensor.to(device)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(array)


def _sweep(blocks: Path, kept: list[Path]) -> None:
    """Remove blocks that no kept checkpoint uses; if one cannot be read, remove none."""
    try:
        used = {digest for path in kept for digest in _blocks_used_by(
            torch.load(path, map_location="cpu", weights_only=True, mmap=True))}
    except Exception:
        return
    for block in blocks.iterdir():
        if block.name not in used:
            block.unlink()


def _blocks_used_by(state: Any) -> Iterator[str]:
    for x in pytree.tree_leaves(state, is_leaf=_in_blocks):
        if _in_blocks(x):
            yield from x["blocks"]


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step_*.pt") if NAME.fullmatch(p.name)), reverse=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
