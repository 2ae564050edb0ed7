"""A pretend CUDA device, to test the CUDA path on a machine without a GPU.

    with PretendCuda() as cuda:
        agent = module.Agent(..., device="cuda")
        ...
        assert not cuda.events

All tensors lie in the host's memory and all operations run there, so results are equal to the
CPU's to the bit. Each storage carries the name of its device, and `x.device` gives that name. As on
CUDA, an operation on tensors of different devices raises, 0-dimensional CPU tensors aside.
`events` lists what makes the host wait or crosses between devices: "wait: <operation>" and
"copy: <device> to <device>".

CUDA graphs are recorded operation by operation. A replay runs the operations again on the memory
that they used, and no Python: numbers keep the values they had, and whatever replaces a tensor
later is not seen. Forbidden while recording: what makes the host wait, copies between devices,
generators, work on another device than the current one.
"""

import contextlib
import functools
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

CPU = torch.device("cpu")
aten = torch.ops.aten
FROM_HOST = {torch.tensor, torch.as_tensor, Tensor.new_tensor}  # their values
INDEXING = {aten.index, aten.index_put_, aten._index_put_impl_}


def device_of(x):
    return getattr(x.untyped_storage(), "place", CPU)


def put(x, device):
    """Name the device of memory that is new."""
    x.untyped_storage().place = device
    return x


def tensors_in(*values):
    """The tensors among values and lists of values; faster than pytree."""
    found = []
    for x in values:
        found += [x] if isinstance(x, Tensor) else (
            tensors_in(*x) if isinstance(x, list | tuple) else [])
    return found


class Generator(torch.Generator):
    """As on CUDA, its state fits only a generator of its kind of device."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.place = PretendCuda.active.named(device)
        return self

    @property
    def device(self):
        return self.place

    def get_state(self):
        longer = torch.zeros(16 if self.place.type == "cuda" else 0, dtype=torch.uint8)
        return torch.cat([super().get_state(), longer])

    def set_state(self, state):
        if len(state) != len(self.get_state()):
            raise RuntimeError("RNG state is wrong size")
        return super().set_state(state[: len(super().get_state())])


class PretendCuda(TorchFunctionMode):
    """The context in which there are `devices` CUDA devices."""

    active: Any = None

    def __init__(self, devices=1):
        super().__init__()
        self.devices, self.current = devices, 0
        self.events: list[str] = []
        self.graph: Graph | None = None  # the one that records
        self.new_on = CPU  # the device that a factory function was asked for
        self.replays = 0
        self.own = {
            Tensor.device.__get__: device_of,
            Tensor.is_cuda.__get__: lambda x: device_of(x).type == "cuda",
            Tensor.to: self._to, Tensor.cpu: lambda x: self._to(x, CPU),
            Tensor.type_as: lambda x, other: self._to(x, device_of(other), other.dtype),
            Tensor.tolist: self._tolist, Tensor.numpy: self._numpy, Tensor.__array__: self._numpy,
            Tensor.__deepcopy__: lambda x, memo: put(Tensor.__deepcopy__(x, memo), device_of(x))}

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            for owner, names in ((torch, self._of_torch()), (torch.cuda, self._of_cuda()),
                                 (torch.accelerator, self._of_accelerator())):
                for name, value in names.items():
                    stack.enter_context(patch.object(owner, name, value))
            group = torch._C._group_tensors_by_device_and_dtype
            stack.enter_context(patch.object(
                torch._C, group.__name__, lambda *args: {
                    (device_of(parts[0][0][0]), dtype): parts
                    for (_, dtype), parts in group(*args).items()}))
            registry = torch.serialization._package_registry
            stack.enter_context(patch.object(torch.serialization, "_package_registry", [
                (0, self._location, self._restore), *registry]))
            stack.enter_context(patch.object(PretendCuda, "active", self))
            stack.enter_context(Operations(self))
            super().__enter__()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.stack.close()

    def _of_torch(self):
        autocast = torch.autocast
        return {"Generator": Generator,
                "autocast": lambda device, *args, **kwargs: autocast("cpu", *args, **kwargs)}

    def _of_accelerator(self):
        # optimizers ask it for its stream, which torch's CUDA build has on a real device only
        return {"current_accelerator": lambda check_available=False: None}

    def _of_cuda(self):
        stream = contextlib.nullcontext()
        stream.wait_stream = lambda other: None
        return {"is_available": lambda: True, "device_count": lambda: self.devices,
                "set_device": lambda device: setattr(self, "current", self.named(device).index),
                "current_device": lambda: self.current,
                "is_current_stream_capturing": lambda: self.graph is not None,
                "synchronize": lambda: self.note("wait: synchronize"),
                "Stream": lambda: stream, "current_stream": lambda: stream,
                "stream": lambda stream: stream, "CUDAGraph": Graph, "graph": self._record}

    def named(self, device):
        """The device with its number, as tensors give it."""
        device = torch.device(device)
        if device.type != "cuda":
            return device
        index = self.current if device.index is None else device.index
        if index >= self.devices:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return torch.device("cuda", index)

    def note(self, event):
        if self.graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {event}")
        self.events.append(event)

    def copied(self, source, target):
        if source != target:
            self.note(f"copy: {source} to {target}")

    @contextlib.contextmanager
    def _record(self, graph):
        self.graph = graph
        try:
            yield
        finally:
            self.graph = None
            graph.end()

    # What torch functions do that a CPU tensor does not

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in self.own:
            return self.own[func](*args, **kwargs)
        kwargs.pop("pin_memory", None)
        device = kwargs.pop("device", None)
        if device is None and isinstance(args[0] if args else None, Tensor):
            device = device_of(args[0])
        device = self.named(device or CPU)
        if kwargs.get("generator") is not None:
            self._check_generator(kwargs["generator"], device)
        before, self.new_on = self.new_on, CPU if func in FROM_HOST else device
        try:
            result = func(*args, **kwargs)
        finally:
            self.new_on = before
        if func in FROM_HOST and device != device_of(result):
            self.copied(device_of(result), device)
            result = put(result.clone(), device)
        return result

    def _check_generator(self, generator, device):
        if generator.device.type != device.type:
            raise RuntimeError(f"Expected a '{device.type}' device type for generator but found "
                               f"'{generator.device.type}'")
        if self.graph is not None:
            raise RuntimeError("a generator that is not registered with the CUDA graph")

    def _to(self, x, *args, device=None, **kwargs):
        args = list(args)
        for i, value in enumerate(args):
            if isinstance(value, Tensor):
                device, args[i] = device_of(value), value.dtype
            elif isinstance(value, str | torch.device):
                device = args.pop(i)
                break
        result = x.to(*args, **kwargs) if args or kwargs else x
        target = device_of(x) if device is None else self.named(device)
        if target != device_of(x):
            self.copied(device_of(x), target)
            result = put(result.clone(), target)
        return result

    def _tolist(self, x):
        if device_of(x) != CPU:
            self.note("wait: tolist")
        return x.tolist()

    def _numpy(self, x, *args, **kwargs):
        if device_of(x) != CPU:
            raise TypeError(f"can't convert {device_of(x)} device type tensor to numpy")
        return x.numpy(*args, **kwargs)

    def _location(self, storage):
        """What torch.save writes; None: torch's own."""
        place = getattr(storage, "place", CPU)
        return None if place == CPU else str(place)

    def _restore(self, storage, location):
        """What torch.load gives; None: torch's own."""
        if location.startswith("cuda"):
            storage.place = self.named(location)
            return storage
        return None


class Operations(TorchDispatchMode):
    """Checks and records every operation, those of the backward pass too."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            return self._run(func, args, kwargs or {})

    def _run(self, func, args, kwargs):
        cuda, inputs = self.cuda, tensors_in(*args, *kwargs.values())
        device = self._device(func, args, inputs)
        if device == CPU:
            return func(*args, **kwargs)
        if waits(func, args):
            cuda.note(f"wait: {func}")
        graph = cuda.graph
        if graph is not None:
            if device.index != cuda.current:
                raise RuntimeError(f"{func} on {device}, recorded on cuda:{cuda.current}")
            graph.before(func, inputs)
        result = func(*args, **kwargs)
        new = [x for x in tensors_in(result) if not hasattr(x.untyped_storage(), "place")]
        for x in new:
            put(x, device)
        if graph is not None:
            graph.after(func, args, kwargs, result, new)
        return result

    def _device(self, func, args, inputs):
        """RuntimeError if the inputs are on several."""
        if not inputs:
            return self.cuda.new_on
        if func.overloadpacket in INDEXING | {aten.copy_}:  # the source or indices may be elsewhere
            others = tensors_in(args[1])
            for x in others:
                self.cuda.copied(device_of(x), device_of(args[0]))
            inputs = [x for x in inputs if all(x is not other for other in others)]
        devices = {device_of(x) for x in inputs if x.dim() or device_of(x) != CPU} or {CPU}
        if len(devices) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} found "
                               f"{' and '.join(sorted(map(str, devices)))}")
        return devices.pop()


@functools.cache
def reads_values(func):
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags})


def waits(func, args):
    """Whether the host waits for a value or a shape."""
    if func.overloadpacket in INDEXING:
        masks = any(x.dtype in (torch.bool, torch.uint8) for x in tensors_in(args[1]))
        return masks and not (len(args) > 2 and args[2].numel() == 1)  # one value: a masked fill
    return reads_values(func)


# CUDA graphs


@contextlib.contextmanager
def on_host():
    """What the device does, unseen."""
    with torch.no_grad(), torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


class Memory(NamedTuple):
    """Where a tensor lies. The graph keeps its own memory; other memory may be freed."""

    storage: Any
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self):
        storage = self.storage
        if isinstance(storage, StorageWeakRef):
            if storage.expired():
                raise RuntimeError("the CUDA graph uses memory that was freed: a tensor was "
                                   "replaced after the recording")
            storage = torch.UntypedStorage._new_with_weak_ptr(storage.cdata)
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class Graph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations: list[tuple[Any, ...]] = []
        self.memory: dict[int, Any] = {}  # its own, by address
        self.changed: dict[int, Any] = {}  # other memory that it changes, as it was before

    def before(self, func, inputs):
        for storage in (x.untyped_storage() for x in inputs if func._schema.is_mutable):
            if storage._cdata not in self.memory and storage._cdata not in self.changed:
                self.changed[storage._cdata] = storage, storage.clone()

    def after(self, func, args, kwargs, result, new):
        self.memory |= {x.untyped_storage()._cdata: x.untyped_storage() for x in new}
        if new or func._schema.is_mutable:  # else a view
            self.operations.append(
                (func, *pytree.tree_map_only(Tensor, self._memory, (args, kwargs, result))))

    def _memory(self, x):
        if device_of(x) == CPU:
            return x.clone()  # a number
        storage = x.untyped_storage()
        owned = storage._cdata in self.memory
        return Memory(storage if owned else StorageWeakRef(storage), x.dtype, x.size(), x.stride(),
                      x.storage_offset())

    def end(self):
        """Recording runs nothing: undo what has changed, and leave no results."""
        with on_host():
            for storage, before in self.changed.values():
                storage.copy_(before)
            for storage in self.memory.values():
                storage.fill_(255)  # NaN
        self.changed.clear()

    def replay(self):
        PretendCuda.active.replays += 1
        with on_host(), torch.autocast("cpu", enabled=False):
            for operation in self.operations:
                func, args, kwargs, result = pytree.tree_map_only(
                    Memory, Memory.tensor, operation, is_leaf=lambda x: isinstance(x, Memory))
                again = tensors_in(func(*args, **kwargs))
                for x, recorded in zip(again, tensors_in(result), strict=True):
                    if x.data_ptr() != recorded.data_ptr():
                        recorded.copy_(x)
