"""Accelerator: compilation, the update count, threads, device, precision."""

import contextlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch.fx.experimental.proxy_tensor import make_fx

from lab import accelerate
from lab.accelerate import Accelerator, CudaGraph
from lab.agent import load_agent
from lab.errors import UserError
from lab.inductor import GraphPass, split_bias
from tests.conftest import drive, make_agent, make_steps, needs_compiler, needs_cuda


@pytest.fixture
def compilations(monkeypatch):
    """What torch.compile was called with, without compiling it."""
    compiled = []

    def record(fn, options):
        compiled.append(fn)
        return fn

    monkeypatch.setattr(torch, "compile", record)
    return compiled


def double(x):
    return 2 * x


def test_without_a_compiler_the_update_runs_eager_and_one_line_says_so(monkeypatch, capsys,
                                                                      compilations):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    accelerator = Accelerator(compiled=True)
    steps = [accelerator(double) for _ in range(2)]
    assert all(torch.equal(step(torch.ones(3)), 2 * torch.ones(3)) for step in steps)
    out, err = capsys.readouterr()
    assert err == "--compile: found no C++ compiler (g++); running eagerly\n" and not out
    assert not compilations and not accelerator.compiled


def test_with_a_compiler_every_function_is_compiled_once(monkeypatch, capsys, compilations):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    accelerator = Accelerator(compiled=True)
    steps = [accelerator(fn) for fn in (double, abs)]
    for _ in range(3):
        assert [step(-torch.ones(())) for step in steps] == [-2, 1]
    assert compilations == [double, abs] and not capsys.readouterr().err


def test_nothing_is_compiled_or_said_unless_asked(monkeypatch, capsys, compilations):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    Accelerator()(double)(torch.ones(()))
    assert not compilations and not capsys.readouterr().err


@pytest.mark.parametrize("name, variable, found", [
    (None, None, False), ("g++", None, True), ("clang++", None, False), ("cc", None, False),
    ("my-cc", "my-cc", True), ("g++", "my-cc", False)])
def test_a_compiler_is_looked_for_where_torch_does(tmp_path, monkeypatch, name, variable, found):
    monkeypatch.setattr(accelerate.sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if name:
        (tmp_path / name).touch(mode=0o755)
    if variable:
        monkeypatch.setenv("CXX", variable)
    assert accelerate.can_compile() is found


@pytest.mark.parametrize("precision", accelerate.PRECISIONS)
def test_updates_count_the_function_that_was_wrapped_first(precision):
    accelerator = Accelerator(precision=precision)
    assert accelerator.gradient_steps == 0
    critic_step, actor_step = accelerator(double), accelerator(double)
    assert accelerator.gradient_steps == 0
    for i in range(7):
        critic_step(torch.ones(()))
        for _ in range(i % 3):
            actor_step(torch.ones(()))
        assert accelerator.gradient_steps == i + 1


def test_a_process_computes_on_one_thread():
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    accelerate.prepare_process()
    assert torch.get_num_threads() == 1
    accelerate.prepare_process(2)
    assert torch.get_num_threads() == 2


def test_calls_are_counted_by_the_functions_names():
    accelerator = Accelerator()
    steps = [accelerator(fn) for fn in (double, double, torch.nn.Identity(), double)]
    for times, step in enumerate(steps):
        for _ in range(times):
            step(torch.ones(()))
    assert accelerator.calls == {"double": 0, "double 2": 1, "Identity": 2, "double 3": 3}
    assert accelerator.gradient_steps == 0
    agent = make_agent(load_agent("agents/sac.py"), accelerate=(sac := Accelerator()))
    drive(agent, make_steps([0, 1], 1, 20))
    assert sac.calls["_update_critic"] == sac.gradient_steps > 0


def test_a_compiled_step_leaves_its_fused_optimizers_eager(monkeypatch, compilations):
    class Agent:
        def __init__(self, compiled):
            accelerate = Accelerator(compiled)
            self.fused, self.plain = (
                torch.optim.Adam([torch.ones(1, requires_grad=True)], fused=fused)
                for fused in (True, False))
            self.steps = [accelerate(self.act), accelerate(self.update)]

        def act(self):
            """Nothing."""

        def update(self):
            self.fused.step()

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    for compiled in (False, True):
        agent = Agent(compiled)
        assert ("step" in vars(agent.fused)) == compiled and "step" not in vars(agent.plain)
        (weight,) = agent.fused.param_groups[0]["params"]
        weight.grad = torch.ones(1)
        agent.steps[1]()
        assert weight.item() == pytest.approx(1 - 1e-3)
    assert len(compilations) == 2


@pytest.mark.parametrize("files, cores", [(True, 2), (False, 4)])
def test_two_hyper_threads_of_a_core_count_once_where_the_system_tells(monkeypatch, files, cores):
    def siblings(path):
        cpu = int(path.parts[5].removeprefix("cpu"))
        return f"{cpu % 2},{cpu % 2 + 2}\n"

    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(Path, "exists", lambda path: files)
    monkeypatch.setattr(Path, "read_text", siblings)
    assert accelerate.physical_cores() == cores


def test_a_missing_cuda_device_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=r"^--cuda: .*no CUDA device.*remove --cuda"):
            accelerate.check_device(device)
    accelerate.check_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    accelerate.check_device("cuda")


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_matrix_products_have_the_precision_inside_the_step_alone(precision, dtype):
    def product(x):
        return torch.is_autocast_enabled("cpu"), x @ x

    inside, y = Accelerator(precision=precision)(product)(torch.ones(4, 4))
    assert inside == (precision == "bf16") and y.dtype == dtype
    outside, y = product(torch.ones(4, 4))
    assert not outside and y.dtype == torch.float32


def test_an_update_that_fails_leaves_the_precision_as_it_was():
    def fail():
        raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        Accelerator(precision="bf16")(fail)()
    assert not torch.is_autocast_enabled("cpu")


# Gradients of compiled ReLUs


@pytest.fixture(params=["graph", pytest.param("C++", marks=[pytest.mark.slow, needs_compiler])])
def compiled(request):
    """-> compile(fn), and (choices, signs) in each graph after the pass. The graph itself runs, or
    what inductor writes for it in C++, which takes seconds."""
    ops, seen = torch.ops.aten, []

    class Spy(GraphPass):
        def __call__(self, graph):
            super().__call__(graph)
            targets = [node.target for node in graph.nodes]
            seen.append((targets.count(ops.where.self), targets.count(ops.sign.default)))

        def uuid(self):
            """Not from the cache."""

    def graph_alone(graph, inputs):
        return compile_fx(graph, inputs, config_patches=options,
                          inner_compile=lambda graph, *_, **__: make_boxed_func(graph))

    torch._dynamo.reset()
    options = {"joint_custom_post_pass": Spy()}
    how = {"backend": graph_alone} if request.param == "graph" else {"options": options}
    return lambda fn: torch.compile(fn, **how), seen


def edges():
    """-> x around 0 and y, both with a gradient."""
    return (torch.tensor([-1.0, 0.0, 2.0, -0.0, 5.0], requires_grad=True),
            torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True))


@pytest.mark.parametrize("below", [0.0, 3.0])
def test_the_gradient_of_a_compiled_relu_needs_no_mask(compiled, below):
    """And a choice of the user's own, which may look alike, stays a choice: its gradient alone is
    a product with a sign too."""
    def loss(x, y):
        hidden = x.relu()
        return (hidden * y).sum() + torch.where(hidden <= 0, below, y).square().sum()

    compile, seen = compiled
    x, y = edges()
    for ours, theirs in zip(torch.autograd.grad(compile(loss)(x, y), (x, y)),
                            torch.autograd.grad(loss(x, y), (x, y)), strict=True):
        assert torch.equal(ours, theirs)
    assert seen == [(1, 2)]


def test_choices_of_the_forward_pass_stay_as_they_are(compiled):
    """Of numbers that a product with 0 would not make 0, and of other types. Where such a number
    comes as a gradient to a ReLU that is shut, it shows, as the docstring says."""
    def choices(x, y):
        hidden = x.relu()
        shut, count = hidden <= 0, torch.arange(1, 6)
        return (torch.where(shut, 0.0, 1 / hidden) * y, torch.where(shut, 0, count),
                torch.where(shut, 0.0, y.double()), hidden * y)

    compile, seen = compiled
    x, y = edges()
    ours, theirs = compile(choices)(x, y), choices(x, y)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    ours, theirs = (torch.autograd.grad((z[0] + z[2] + z[3]).sum(), (x, y)) for z in (ours, theirs))
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[0][x > 0], theirs[0][x > 0])
    assert ours[0][x <= 0].isnan().all()
    assert len(seen) == 1 and seen[0][1] >= 1


def test_the_gradient_of_a_choice_keeps_its_type(compiled):
    """The sign would be of the ReLU's."""
    def loss(x, y):
        hidden = x.relu()
        return (hidden * y).sum() + torch.where(hidden <= 0, 0.0, y.bfloat16()).float().sum()

    compile, seen = compiled
    x, y = edges()
    for ours, theirs in zip(torch.autograd.grad(compile(loss)(x, y), (x, y)),
                            torch.autograd.grad(loss(x, y), (x, y)), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert seen == [(2, 1)]


# Biases of compiled products


def test_the_bias_of_a_compiled_product_is_added_by_the_kernel_after_it():
    """Unless a factor is on one of the two."""
    def layers(x, w, b):
        return torch.baddbmm(b, x, w).relu() + torch.baddbmm(b, x, w, beta=2, alpha=3)

    inputs = [torch.randn(2, *shape) for shape in ((5, 4), (4, 3), (1, 3))]
    traced = make_fx(layers)(*inputs)
    split_bias(traced.graph)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    torch.testing.assert_close(traced(*inputs), layers(*inputs))
    names = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    ops = torch.ops.aten
    assert names.count(ops.bmm.default) == names.count(ops.baddbmm.default) == 1


# CUDA graphs


@pytest.fixture(params=["stand-in", pytest.param("cuda", marks=needs_cuda)])
def gpu(request, monkeypatch):
    """`device`, and launch(kernel). The stand-in runs what is launched at once, except while a
    graph records: that runs at each replay."""
    if request.param == "cuda":
        return SimpleNamespace(device="cuda", launch=lambda kernel: kernel())
    state = SimpleNamespace(device="cpu", recording=None)

    class Graph:
        def __init__(self):
            self.kernels = []

        def replay(self):
            for kernel in self.kernels:
                kernel()

    @contextlib.contextmanager
    def record(graph):
        assert state.recording is None
        state.recording = graph
        yield
        state.recording = None

    stream = SimpleNamespace(wait_stream=lambda other: None)
    state.launch = lambda kernel: (
        state.recording.kernels.append(kernel) if state.recording else kernel())
    for name, value in (("Stream", lambda: stream), ("current_stream", lambda: stream),
                        ("stream", contextlib.nullcontext), ("CUDAGraph", Graph),
                        ("graph", record)):
        monkeypatch.setattr(torch.cuda, name, value)
    return state


class Sums:
    """A step that changes what it holds, and gives what it writes into memory of its own."""

    def __init__(self, gpu):
        self.gpu, self.calls, self.total = gpu, 0, torch.zeros((), device=gpu.device)

    def __call__(self, x, y):
        self.calls += 1
        out = torch.full_like(x, torch.nan)

        def kernel():
            torch.add(x, y, out=out)
            self.total.add_(x.sum())

        self.gpu.launch(kernel)
        return {"sum": out, "parts": [out]}


@pytest.mark.parametrize("shapes", [[(4,)], [(4,), (7, 2)]])
def test_a_graph_is_recorded_once_for_each_shape_and_replayed(gpu, shapes):
    """Every call changes what the step holds once; its results stay as they are, and so do the
    tensors that it was given."""
    sums, total, results, given = Sums(gpu), 0.0, [], []
    graph = CudaGraph(sums)
    for i in range(10):
        for shape in shapes:
            x, y = (torch.full(shape, float(value), device=gpu.device) for value in (i, 100 * i))
            results.append((graph(x, y), x + y))
            total += x.sum().item()
            assert sums.total.item() == total
            given.append(x.zero_())
    assert not any(x.any() for x in given)
    assert sums.calls == len(shapes) * (CudaGraph.WARM_UP + 1)
    for result, expected in results:
        assert torch.equal(result["sum"], expected) and torch.equal(result["parts"][0], expected)


def test_a_compiled_step_on_cuda_is_a_graph_and_each_call_counts(monkeypatch, gpu, compilations):
    made = {}
    for compiled in (False, True):
        accelerator, sums = Accelerator(compiled, device="cuda"), Sums(gpu)
        step = accelerator(sums)
        for _ in range(9):
            step(*torch.ones(2, 3, device=gpu.device))
        assert accelerator.gradient_steps == 9 and sums.total == 9 * 3
        made[compiled] = sums.calls
    assert made == {False: 9, True: CudaGraph.WARM_UP + 1} and len(compilations) == 1


def test_recording_a_graph_compiles_nothing(gpu):
    """It may not: whatever a call brings, also parts of a batch as Replay.sample gives, all that
    needs compilation is met while warming up."""
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = CudaGraph(torch.compile(lambda x, y: x + 2 * y, backend=backend))
    for i in range(CudaGraph.WARM_UP + 2):
        x, y = torch.full((2, 5, 6), float(i), device=gpu.device).split(3, -1)
        step(x, y)
        assert len(compilations) == 1, i


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_recording_compiles_nothing_when_shapes_and_storage_offsets_vary(gpu, offset):
    """After another shape dynamo compiles for any size, and guards on the storage offset: the rows
    of a block, one a step, have it 0 only once in a while (seen on an H100, torch 2.11)."""
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = CudaGraph(torch.compile(lambda x, y: x + 2 * y, backend=backend))
    for size in (3, 5):
        block = torch.randn(6, 2, size, device=gpu.device)
        for i in range(CudaGraph.WARM_UP + 2):
            before = len(compilations)
            step(block[(i + offset) % 6], block[(i + offset) % 6])
            assert i < CudaGraph.WARM_UP or len(compilations) == before, i


@needs_cuda
def test_a_compiled_graph_of_two_shapes_on_cuda():
    """In turns, through the Accelerator, with a state that it changes."""
    total = torch.zeros((), device="cuda")

    def step(x, y):
        total.add_(x.sum())
        return {"z": (x * y).tanh()}

    accelerator, expected = Accelerator(True, device="cuda"), 0.0
    torch._dynamo.reset()
    run = accelerator(step)
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(8):
        for shape in ((5,), (3, 4)):
            x, y = torch.randn(2, *shape, device="cuda", generator=generator)
            torch.testing.assert_close(run(x, y)["z"], (x * y).tanh(), rtol=1e-5, atol=1e-6)
            expected += x.sum().item()
            assert total.item() == pytest.approx(expected, abs=1e-4)
    assert accelerator.gradient_steps == 16
