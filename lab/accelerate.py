"""Run an agent's update eagerly, compiled or as a CUDA graph, in fp32 or bf16."""

import contextlib
import ctypes
import itertools
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from lab.errors import UserError

PRECISIONS = ("fp32", "bf16")


def prepare_process(threads: int = 1, device: str = "cpu") -> None:
    """Set the number of torch threads: one by default, since parallel processes would compete for
    cores. Make a numbered GPU the current one: CUDA graphs record on that. Make malloc keep freed
    memory: returning it to the system causes page faults at every update (8 seeds of SAC on one
    core: 3 to 7% in fp32, 2 to 17% in bf16)."""
    torch.set_num_threads(threads)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    if sys.platform == "linux":
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
        with contextlib.suppress(AttributeError):  # not glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_THRESHOLD, 2**30)
            mallopt(M_TRIM_THRESHOLD, 2**30)
            mallopt(M_TOP_PAD, 2**26)


def physical_cores() -> int:
    """Physical cores that this process may use; hyper-threads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.exists() else str(cpu))
    return len(siblings)


def check_device(device: str) -> None:
    """UserError if this machine has no such device."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--cuda: torch sees no CUDA device here; remove --cuda to run on the CPU "
                        f"(torch {torch.__version__})")


def out_of_memory(error: BaseException) -> bool:
    """Whether memory could not be allocated; on a CPU, torch raises a RuntimeError."""
    return (isinstance(error, MemoryError | torch.OutOfMemoryError)
            or "can't allocate memory" in str(error))


def can_compile() -> bool:
    """Whether the C++ compiler that torch.compile needs on a CPU is installed."""
    usual = "clang++" if sys.platform == "darwin" else "g++"
    return shutil.which(os.environ.get("CXX", usual)) is not None


class CudaGraph:
    """A function of tensors as a CUDA graph: recorded once per input shapes, then replayed.

    The function may update tensors in place, as an optimiser does. Results are copies, because the
    next replay overwrites the outputs of the graph.
    """

    WARM_UP = 3  # calls before recording: compile, allocate optimiser state, load libraries

    def __init__(self, fn: Callable[..., Any]):
        self.fn = fn
        self.calls: Counter[tuple[torch.Size, ...]] = Counter()
        self.inputs: dict[tuple[torch.Size, ...], list[torch.Tensor]] = {}
        self.recordings: dict[tuple[torch.Size, ...], tuple[Any, Any]] = {}

    def __call__(self, *tensors: torch.Tensor) -> Any:
        shapes = tuple(x.shape for x in tensors)
        if shapes not in self.inputs:
            # Warm up on the tensors that the recording will read: torch.compile guards on strides,
            # storage offsets and aliasing, and must not recompile during the recording.
            self.inputs[shapes] = [x.clone(memory_format=torch.contiguous_format) for x in tensors]
        inputs = self.inputs[shapes]
        torch._foreach_copy_(inputs, list(tensors))
        self.calls[shapes] += 1
        if self.calls[shapes] <= self.WARM_UP:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                results = self.fn(*inputs)
            torch.cuda.current_stream().wait_stream(side)
        else:
            if shapes not in self.recordings:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):  # records without running
                    results = self.fn(*inputs)
                self.recordings[shapes] = graph, results
            graph, results = self.recordings[shapes]
            graph.replay()
        return pytree.tree_map_only(torch.Tensor, torch.clone, results)


class Accelerator:
    """accelerate(fn) for an agent. `calls` counts the calls of each wrapped function by its name:
    accelerator.calls["_update_critic"]; a repeated name gets a number, "_step 2"."""

    def __init__(self, compiled: bool = False, precision: str = "fp32", device: str = "cpu"):
        if compiled and not device.startswith("cuda") and not can_compile():
            print("--compile: found no C++ compiler (g++); running eagerly", file=sys.stderr)
            compiled = False
        self.compiled, self.precision = compiled, precision
        self.device_type = torch.device(device).type
        self.calls: dict[str, int] = {}

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        run = self._compile(fn) if self.compiled else fn
        name = plain = getattr(fn, "__name__", type(fn).__name__)
        for number in itertools.count(2):
            if name not in self.calls:
                break
            name = f"{plain} {number}"
        self.calls[name] = 0

        def step(*tensors: torch.Tensor) -> Any:
            self.calls[name] += 1
            if self.precision == "fp32":
                return run(*tensors)
            with torch.autocast(self.device_type, torch.bfloat16):
                return run(*tensors)

        return step

    def _compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        options: dict[str, Any] = {}
        if self.device_type == "cpu":
            from lab import inductor  # takes a second to import

            if hasattr(fn, "__self__"):  # a method of the agent
                inductor.leave_fused_optimizers(fn.__self__)
            options["joint_custom_post_pass"] = inductor.GraphPass()
        compiled = torch.compile(fn, options=options)
        return CudaGraph(compiled) if self.device_type == "cuda" else compiled

    @property
    def gradient_steps(self) -> int:
        """Calls of the function that was wrapped first: by the contract (docs/own-agent.md) the
        agent's main update, such as the critic's."""
        return next(iter(self.calls.values()), 0)
