"""Checkpoints that are whole or absent: step_<step>-<sha256>.pt, the last two are kept.

Written beside their final name, flushed to the disk, then renamed: a kill at any moment leaves the
checkpoint before. The name carries the hash of the bytes, because torch.load does not notice
flipped ones; the file itself is what torch.save wrote. Loading never runs code (weights_only).
"""

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

KEPT = 2
NAME = re.compile(r"step_(\d+)-([0-9a-f]{64})\.pt")


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` (tensors, numbers, strings in dicts and lists) -> its file."""
    folder.mkdir(parents=True, exist_ok=True)
    for left_behind in folder.glob("unfinished_*.tmp"):
        left_behind.unlink()
    temporary = folder / f"unfinished_{step}.tmp"
    with open(temporary, "w+b") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    final = folder / f"step_{step:012d}-{digest}.pt"
    os.replace(temporary, final)
    _sync(folder)
    others = _newest_first(folder)
    kept = [p for p in others if p.name <= final.name][:KEPT]  # later ones were broken: passed over
    for old in set(others) - set(kept):
        old.unlink()
    return final


def load_latest(folder: Path, device: str = "cpu") -> dict[str, Any] | None:
    """The newest whole checkpoint, or None. A broken one is named on stderr and passed over."""
    for path in _newest_first(folder):
        try:
            with open(path, "rb") as file:
                match = NAME.fullmatch(path.name)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if match is None or match[2] != digest:
                    raise ValueError("its bytes are not those that were written")
                file.seek(0)
                return torch.load(file, map_location=device, weights_only=True)
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            print(f"checkpoint {path} is passed over: {reason}", file=sys.stderr)
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step_*.pt") if NAME.fullmatch(p.name)), reverse=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
