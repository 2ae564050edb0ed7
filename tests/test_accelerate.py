"""How an update step runs: compiler or none, its count, threads, device, precision."""

import shutil
from pathlib import Path

import pytest
import torch

from lab import accelerate
from lab.accelerate import Accelerator, SignForMask
from lab.envs import UserError
from tests.conftest import needs_compiler


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
    assert err == "--compile: no C++ compiler (g++) found, running eager\n" and not out
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
    assert accelerator.updates == 0
    critic_step, actor_step = accelerator(double), accelerator(double)
    assert accelerator.updates == 0
    for i in range(7):
        critic_step(torch.ones(()))
        for _ in range(i % 3):
            actor_step(torch.ones(()))
        assert accelerator.updates == i + 1


def test_a_process_computes_on_one_thread():
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    accelerate.prepare_process()
    assert torch.get_num_threads() == 1


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
        with pytest.raises(UserError, match=r"^--cuda: .*no CUDA device.*leave --cuda out"):
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


@needs_compiler
@pytest.mark.parametrize("below", [0.0, 3.0])
def test_the_gradient_of_a_compiled_relu_needs_no_mask(below):
    """And a choice of the user's own, which looks alike but for its constant, stays a choice."""
    seen = []

    class Spy(SignForMask):
        def __call__(self, graph):
            super().__call__(graph)
            seen.append(sum(node.target == torch.ops.aten.sign.default for node in graph.nodes))

        def uuid(self):
            """Not from the cache."""

    def loss(x, y):
        hidden = x.relu()
        return (hidden * y).sum() + torch.where(hidden <= 0, below, y).square().sum()

    x = torch.tensor([-1.0, 0.0, 2.0, -0.0, 5.0], requires_grad=True)
    y = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    compiled = torch.compile(loss, options={"joint_custom_post_pass": Spy()})
    for ours, theirs in zip(torch.autograd.grad(compiled(x, y), (x, y)),
                            torch.autograd.grad(loss(x, y), (x, y)), strict=True):
        assert torch.equal(ours, theirs)
    assert seen and seen[0] >= 1
