"""The faster of torch's two libraries for fp32 matrix products on a CPU, if it is exact.

torch gives fp32 products to its BLAS: MKL on x86, which is slow on AMD processors. It also carries
oneDNN, and uses it with set_float32_matmul_precision("medium"), which permits to round the factors
to bf16. With AMX, oneDNN does round them. Without, it computes in fp32, large products often faster
than MKL and small ones slower. So `choose` compares both on the products of the agent's own update.
"""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lab.errors import UserError

Library = Literal["blas", "onednn"]
BLAS: Library = "blas"
ONEDNN: Library = "onednn"
LIBRARIES = BLAS, ONEDNN
OPS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}
MORE_ERROR = 4.0  # times the error of BLAS, at most: fp32 sums in another order; bf16 has 1000
LESS_TIME = 0.9  # of the time of BLAS, at most: two runs of one command must choose the same
SECONDS = 0.003  # to time one product in
FLOPS = 1e8  # of larger products only some matrices are timed
ROWS = 32  # of a product that are compared with float64

Products = Counter["Product"]


class Product(NamedTuple):
    """A kind of matrix product: an op of torch, and size and stride of its tensors."""

    op: Any
    tensors: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    def example(self) -> tuple[list[torch.Tensor], float]:
        """-> tensors of this kind, random factors and a bias of zeros, and how many times as many
        matrices the product has."""
        generator = torch.Generator().manual_seed(0)
        *_, (left, _), (right, _) = self.tensors
        batch = left[0] if len(left) == 3 else 1
        flops = 2 * math.prod(left) * right[-1]
        timed = max(1, min(batch, int(batch * FLOPS / max(1, flops))))
        tensors = []
        for size, stride in self.tensors:
            if len(left) == 3 and len(size) == 3:
                size = (min(timed, size[0]), *size[1:])
            span = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
            tensors.append(torch.empty(span).uniform_(-1, 1, generator=generator).as_strided(
                size, stride))
        for bias in tensors[:-2]:
            bias.zero_()
        return tensors, batch / timed


SQUARE = Product(torch.ops.aten.mm.default, (((64, 64), (64, 1)),) * 2)


class RecordProducts(TorchDispatchMode):
    """Records the fp32 products on a CPU that run in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.products = Products()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in OPS and all(x.dtype == torch.float32 and x.device.type == "cpu" and x.numel()
                             for x in args):
            self.products[Product(op, tuple((tuple(x.shape), x.stride()) for x in args))] += 1
        return op(*args, **(kwargs or {}))


@contextlib.contextmanager
def computed_by(library: Library) -> Iterator[None]:
    """Compute fp32 products with this library; BLAS is torch's default."""
    if library == BLAS:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose(products: Products, given: Library | None = None, threads: int = 1) -> Library:
    """The faster exact library for these products, or the given one. UserError if that rounds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        exact = given != BLAS and all(map(is_exact, products or [SQUARE]))
        if given == ONEDNN and not exact:
            raise UserError("--fp32-library onednn: on this processor oneDNN rounds fp32 products "
                            "to bf16. Use --fp32-library blas; a run that began with onednn can "
                            "only be resumed on a processor without AMX")
        if given or not exact:
            return given or BLAS
        seconds = dict.fromkeys(LIBRARIES, 0.0)
        for product, calls in products.items():
            for library, each in time_both(product).items():
                seconds[library] += calls * each
        return ONEDNN if seconds[ONEDNN] < LESS_TIME * seconds[BLAS] else BLAS
    finally:
        torch.set_num_threads(before)


def is_exact(product: Product) -> bool:
    """Whether the error of oneDNN, against float64, is about that of BLAS."""
    tensors, _ = product.example()
    left, right = tensors[-2:]
    expected = left[..., :ROWS, :].double() @ right.double()
    errors = {}
    for library in LIBRARIES:
        with computed_by(library):
            rows = product.op(*tensors)[..., :ROWS, :]
        errors[library] = (rows - expected).abs().mean().item()
    return errors[ONEDNN] <= MORE_ERROR * errors[BLAS]


def time_both(product: Product) -> dict[Library, float]:
    """-> seconds of one call with each library, the least of several in turn."""
    tensors, parts = product.example()
    least = dict.fromkeys(LIBRARIES, math.inf)
    calls, end = 0, time.process_time() + SECONDS
    while calls < 3 or time.process_time() < end:
        for library in LIBRARIES:
            with computed_by(library):
                start_time = time.process_time()
                product.op(*tensors)
                least[library] = min(least[library], time.process_time() - start_time)
        calls += 1
    return {library: parts * seconds for library, seconds in least.items()}
