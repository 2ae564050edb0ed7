"""The CUDA path without a GPU, on the pretend device: equal to the CPU's results to the bit."""

import contextlib
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lab import train as script
from lab.accelerate import Accelerator, CudaGraph
from lab.agent import load_agent, restore_state, save_state
from lab.envs import torch_vec
from lab.envs.make import make_envs
from lab.envs.torch_tasks import ENVS
from lab.options import Simple, Tune, Vectorised
from lab.training import checkpoint, evaluation, processes
from lab.training.plasticity import measure
from lab.training.processes import Processes
from lab.training.recorder import read_metrics
from lab.tuning import run as tuning
from lab.tuning import study
from lab.watch import __main__ as watch
from tests.conftest import drive, flat_state, make_steps, small_config, spec_for, timeless
from tests.pretend_device import PretendCuda, device_of

DIARY = "tests.probe_envs:lab-tests/Diary-v0"
TINY = ["--batch-size", "8", "--actor-width", "8", "--qf-width", "8", "--learning-starts", "8"]
PPO = ["agents/ppo.py", "--num-steps", "8", "--num-minibatches", "2", "--width", "8"]
DOWN, UP = "copy: cuda:0 to cpu", "copy: cpu to cuda:0"


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def cuda():
    with PretendCuda() as cuda:
        yield cuda


def on(device):
    """The context in which it exists; the CPU has no events."""
    return PretendCuda() if device == "cuda" else contextlib.nullcontext(SimpleNamespace(events=[]))


@pytest.fixture
def short(monkeypatch):
    """No plots, short episodes, no processes that try to draw."""
    monkeypatch.setattr(script, "draw_learning_curves", lambda *_: None)
    monkeypatch.setattr(watch.camera, "check", lambda *_: None)
    monkeypatch.setattr(ENVS["Pendulum-v1"], "max_episode_steps", 20)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda fn, options=None: fn)


# The device itself


def test_tensors_of_two_devices_do_not_mix(cuda):
    here, there = torch.ones(2), torch.ones(2, device="cuda")
    assert (there * 2 + torch.tensor(1.0)).device == torch.device("cuda", 0)
    for mix in (lambda: here + there, lambda: torch.cat([here, there]),
                lambda: there.add_(here), lambda: torch._foreach_add_([there], [here])):
        with pytest.raises(RuntimeError, match="on the same device"):
            mix()
    with pytest.raises(RuntimeError, match="for generator"):
        there.uniform_(generator=torch.Generator())
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        there.numpy()
    assert not cuda.events


@pytest.mark.parametrize("event, act", [
    ("wait", lambda x: x.sum().item()), ("wait", lambda x: bool(x[0] > 0)),
    ("wait", lambda x: x.tolist()), ("wait", lambda x: torch.equal(x, x)),
    ("wait", lambda x: x[x > 0]), ("wait", lambda x: x.nonzero()),
    ("wait", lambda x: x.__setitem__(x > 0, torch.ones_like(x))),
    ("copy", lambda x: x.cpu()), ("copy", lambda x: x.to("cpu")),
    ("copy", lambda x: x.copy_(torch.ones(3))), ("copy", lambda x: x.new_tensor([1.0])),
    ("copy", lambda x: torch.tensor([1.0], device=x.device)), ("copy", lambda x: x[[0, 1]]),
    (None, lambda x: x.masked_fill_(x > 0, 0.0)), (None, lambda x: x.__setitem__(x > 0, 0.0)),
    (None, lambda x: x.double().where(x > 0, 1.0).view(3, 1).cumsum(0))])
def test_what_makes_the_host_wait_or_crosses_over_is_seen(cuda, event, act):
    x = torch.ones(3, device="cuda")
    act(x)
    assert [each.split(":")[0] for each in cuda.events] == [event] * (event is not None)


def test_a_graph_replays_operations_and_no_python(cuda):
    total, factor = torch.zeros(2, device="cuda"), 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = total.add_(1) * factor + torch.ones(2, device="cuda")
    assert not total.any() and result.isnan().all()  # recording runs nothing
    factor = 10
    for count in (1, 2):
        graph.replay()
        assert total.tolist() == [count] * 2 and result.tolist() == [2 * count + 1] * 2
    total = total.clone()
    with pytest.raises(RuntimeError, match="replaced after the recording"):
        graph.replay()


@pytest.mark.parametrize("message, act", [
    ("capturing: wait", lambda x: x.sum().item()), ("capturing: copy", lambda x: x.cpu()),
    ("not registered", lambda x: x.uniform_(generator=torch.Generator("cuda"))),
    ("recorded on cuda:0", lambda x: torch.ones(2, device="cuda:1") + 1)])
def test_a_graph_forbids_what_cuda_does(message, act):
    with PretendCuda(2):
        x = torch.ones(2, device="cuda")
        with (pytest.raises(RuntimeError, match=message),
              torch.cuda.graph(torch.cuda.CUDAGraph())):
            act(x)


# Agents


def trained(module, device, accelerate, count=10, **settings):
    """-> the agent; and on the CPU the metrics of each update and of plasticity, the last actions
    and the state."""
    settings = {"replay_ratio": 1.0, "policy_delay": 1, "micro_batches": 2, "width": 8,
                "actor_width": 8, "qf_width": 8, "num_steps": 4, "num_minibatches": 2, **settings}
    agent = module.Agent(spec_for(module), small_config(module, **settings), [0, 1], num_envs=2,
                         total_steps=80, device=device, accelerate=accelerate)
    steps = [tuple(x.to(device) for x in step) for step in make_steps((0, 1), 2, count)]
    if device != "cpu":
        PretendCuda.active.events.clear()
    history = drive(agent, steps)
    history += [measure(agent), {"actions": agent.act(steps[0][0], explore=False)}]
    waited = PretendCuda.active.events[:] if device != "cpu" else []
    history += [{name: value for name, value in flat_state(save_state(agent)).items()
                 if "generator" not in name and isinstance(value, torch.Tensor)}]
    return agent, [{k: v.cpu() for k, v in each.items()} for each in history], waited


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) >= 4
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert torch.equal(one[name], value), name


def test_every_agent_equals_the_cpu_and_nothing_waits_or_is_copied(module):
    _, expected, _ = trained(module, "cpu", lambda fn: fn, count=7, target_kl=1e-4)
    with PretendCuda():
        agent, seen, waited = trained(module, "cuda", lambda fn: fn, count=7, target_kl=1e-4)
        assert not waited
        assert {x.device.type for x in flat_state(save_state(agent)).values()
                if isinstance(x, torch.Tensor) and x.dtype != torch.uint8} == {"cuda"}
    assert_same(seen, expected)


def test_every_agent_equals_the_cpu_as_cuda_graphs_in_bf16(module, uncompiled):
    """Each function runs to warm up and once to be recorded, then it is replayed; also after a
    reset of BRO, which alone waits."""
    _, expected, _ = trained(module, "cpu", Accelerator(False, "bf16"), reset_at=(16,))
    with PretendCuda() as cuda:
        ran, accelerate = Counter(), Accelerator(True, "bf16", "cuda")

        def counted(fn):
            def run(*tensors):
                ran[run] += 1
                return fn(*tensors)

            run.__name__ = fn.__name__
            return accelerate(run)

        _, seen, waited = trained(module, "cuda", counted, reset_at=(16,))
        assert bool(waited) == (module.Agent.name == "bro")
        replayed = sum(accelerate.calls.values()) - CudaGraph.WARM_UP * len(ran)
        assert cuda.replays >= replayed - CudaGraph.WARM_UP > 0  # CEM searches in two shapes
    assert max(ran.values()) <= 2 * (CudaGraph.WARM_UP + 1)
    assert_same(seen, expected)


def test_a_checkpoint_crosses_devices(module, tmp_path):
    """From CUDA to the CPU and back: weights, optimizers, replay and counters."""
    with PretendCuda():
        first, _, _ = trained(module, "cuda", lambda fn: fn, count=5)
        state = flat_state(save_state(first))
        checkpoint.save(tmp_path / "cuda", 1, {"agent": save_state(first)})
    with pytest.raises(RuntimeError, match="CUDA"):  # the file names its device
        torch.load(next((tmp_path / "cuda").glob("*.pt")), weights_only=True)
    second, _, _ = trained(module, "cpu", lambda fn: fn, count=5)
    restore_state(second, checkpoint.load_latest(tmp_path / "cuda")["agent"])
    checkpoint.save(tmp_path / "cpu", 1, {"agent": save_state(second)})
    with PretendCuda():
        third, _, _ = trained(module, "cuda", lambda fn: fn, count=5)
        restore_state(third, checkpoint.load_latest(tmp_path / "cpu", "cuda")["agent"])
        again = flat_state(save_state(third))
        for name in state:
            if "generator" not in name and isinstance(state[name], torch.Tensor):
                assert again[name].device == state[name].device, name
                assert torch.equal(again[name], state[name]), name


# Three planted bugs

CRITIC_LOSS = "qf_loss = (values - target).square().mean(2).sum(1)  # (S,)"
BUGS = {
    "a CPU tensor in the loss": (CRITIC_LOSS, f"weights = torch.ones(2)\n        {CRITIC_LOSS}\n"
                                 "        qf_loss = qf_loss * weights"),
    "an item() in update": ("self.critic_steps += 1", "self.critic_steps += 1\n            "
                            "assert metrics['loss/qf'].sum().item() >= 0"),
    "a tensor replaced after recording": (
        "self.critic_steps += 1", "self.critic_steps += 1\n            "
        "self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)"),
    "a number that changes": (CRITIC_LOSS, f"{CRITIC_LOSS}\n        "
                              "qf_loss = qf_loss / (1 + self.critic_steps)")}


@pytest.mark.parametrize("bug, caught", [*zip(BUGS, [
    "on the same device", "wait: aten._local_scalar_dense", "replaced after the recording",
    "loss/qf"], strict=True)])
def test_planted_bugs_are_caught(tmp_path, uncompiled, bug, caught):
    source, (right, wrong) = Path("agents/sac.py").read_text(), BUGS[bug]
    assert source.count(right) == 1
    path = tmp_path / "sac.py"
    path.write_text(source.replace(right, wrong))
    module = load_agent(path)
    _, expected, _ = trained(module, "cpu", lambda fn: fn)
    with PretendCuda(), pytest.raises((RuntimeError, AssertionError), match=caught):
        _, seen, waited = trained(module, "cuda", Accelerator(True, device="cuda"))
        assert not waited
        assert_same(seen, expected)


# Environments


@pytest.mark.parametrize("backend, env_id, events", [
    *[(None, f"torch/{name}", []) for name in ENVS],
    ("sync", DIARY, [DOWN, UP]), ("workers", DIARY, [DOWN, UP]),
    ("envpool", "Pendulum-v1", [DOWN, UP])])
def test_every_backend_steps_as_on_the_cpu_with_a_copy_each_way_at_most(
        monkeypatch, backend, env_id, events):
    """Past the ends of episodes, and past a block of random numbers."""
    monkeypatch.setattr(torch_vec, "BLOCK", 4)
    for task in ENVS.values():
        monkeypatch.setattr(task, "max_episode_steps", 5)
    if backend == "envpool":
        pytest.importorskip("envpool")
    seen = {}
    for device in ("cpu", "cuda"):
        with on(device) as cuda:
            envs = make_envs(env_id, [0, 1], 2, backend, device, clip_reward=(-1, 1),
                             **{"workers": 2} if backend == "workers" else {})
            actions = torch.linspace(-1, 1, 4 * envs.spec.action_dim).view(2, 2, -1).to(device)
            steps = [(envs.reset(),)]
            cuda.events.clear()
            steps += [envs.step(actions) for _ in range(6)]
            assert cuda.events == 6 * events * (device == "cuda")
            assert {device_of(x).type for step in steps for x in step} == {device}
            seen[device] = [x.cpu() for step in steps for x in step]
            envs.finished()
            envs.close()
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def test_an_evaluation_looks_at_the_host_every_25_steps_and_gives_the_same_returns():
    agent, returns, steps = SimpleNamespace(act=lambda obs, explore: obs[..., 2:3].sign()), {}, {}
    for device in ("cpu", "cuda"):
        with on(device) as cuda:
            envs, steps[device] = make_envs("torch/ContinuousCartPole-v1", [0, 1], 2,
                                            device=device), []
            returns[device] = evaluation.evaluate(
                agent, envs, on_step=lambda *x, seen=steps[device]: seen.append(x))
    assert returns["cuda"] == returns["cpu"]
    ended, looked = (len(steps[device]) - 1 for device in ("cpu", "cuda"))
    assert ended > 25 and looked == 25 * math.ceil(ended / 25)
    assert len(cuda.events) == looked / 25 + 1  # the last one gives the returns


# Runs


def rows_of(folder):
    """Of each seed's metrics, without times."""
    return {str(path.relative_to(folder)): [timeless(row) for row in read_metrics(path)]
            for path in sorted(folder.glob("*/*/seed_*/metrics.jsonl"))}


def trains(kind, folder, *words):
    """-> the folder of the run that the command makes."""
    assert script.run([*words, "--eval-episodes", "1", "--log", "--runs", str(folder), "--name",
                       "run"], kind) == 0
    return next(folder.glob("run-*"))


@pytest.mark.parametrize("words", [
    [*PPO, "--env", "torch/Pendulum-v1"], [*PPO, "--env", "Pendulum-v1", "--backend", "sync"],
    pytest.param(["agents/cem.py", "--env", "torch/Pendulum-v1", "--iterations", "1", "--samples",
                  "8", *TINY[:2], *TINY[4:]], marks=pytest.mark.slow)])
def test_a_run_with_cuda_equals_one_on_the_cpu_is_resumed_and_is_watched_without_a_gpu(
        tmp_path, short, words):
    words = [*words, "--num-envs", "2", "--steps", "48", "--eval-every", "48", "--seeds", "2"]
    plain = trains(Vectorised, tmp_path / "cpu", *words, "--fp32-library", "blas")
    with PretendCuda():
        run = trains(Vectorised, tmp_path / "cuda", *words, "--cuda")
        rows = rows_of(plain)
        assert rows == rows_of(run) and len(rows) == 2
        assert all("return/eval" in each[-1] for each in rows.values())
        *_, before_last, last = sorted(run.glob("*/*/stack_*/step_*.pt"))
        assert before_last.parent == last.parent
        last.unlink()
        assert script.run(["--resume", str(run)], Vectorised) == 0
    assert rows == rows_of(run)
    assert watch.run([str(run), "--max-seconds", "0.2"]) == 0
    assert list(run.glob("*/*/watch.gif"))


# Several GPUs


class HereProcesses(Processes):
    """Jobs that wait in turn for this process."""

    jobs: list = []

    def start(self, key):
        self.running[key] = None, SimpleNamespace(
            send=lambda job: self.given.append((key, job)))

    def __enter__(self):
        self.given = []
        return self

    def receive(self, timeout=None):
        key, job = self.given.pop(0)
        self.jobs.append(job)
        messages = []
        failure = processes.attempt(self.work, job, messages.append)
        yield from ((key, message) for message in messages)
        del self.running[key]
        self.gpus.pop(key, None)
        yield key, failure

    def end(self, key):
        """A pruned trial has ended already."""


@pytest.fixture
def here(monkeypatch):
    HereProcesses.jobs = []
    for module in (processes, study):
        monkeypatch.setattr(module, "Processes", HereProcesses)
    return HereProcesses.jobs


def test_each_process_takes_the_next_gpu_and_graphs_are_recorded_there(
        tmp_path, short, here, uncompiled):
    words = ["agents/sac.py", "--env", DIARY, "--seeds", "3", "--steps", "20", "--processes", "3",
             "--eval-every", "20", *TINY]
    plain = trains(Simple, tmp_path / "cpu", *words, "--fp32-library", "blas")
    here.clear()
    with PretendCuda(2) as cuda:
        run = trains(Simple, tmp_path / "cuda", *words, "--cuda", "--compile")
        assert cuda.replays
    assert [job.device for job in here] == ["cuda:0", "cuda:1", "cuda:0"]
    assert rows_of(run) == rows_of(plain) and len(rows_of(run)) == 3
    assert "cuda:" not in (run / "config.json").read_text()


def test_a_gpu_that_is_free_again_is_taken_first():
    with PretendCuda(2):
        pool, given = Processes(), []
        for key in range(3):
            pool.running[key] = None, SimpleNamespace(send=given.append)
            pool.give(key, processes.Job("", {}, "", (0,), 1, 1, 1, 1, device="cuda"))
            if key == 1:
                pool.gpus.pop(1)
    assert [job.device for job in given] == ["cuda:0", "cuda:1", "cuda:1"]


def test_a_study_trains_its_trials_on_the_gpus(tmp_path, monkeypatch, here):
    monkeypatch.setattr(tuning.confirm, "train", lambda *_: tuning.confirm.Failures([], []))
    monkeypatch.setattr(tuning.confirm, "show", lambda *_, finished: None)
    with PretendCuda(2):
        code = script.run(
            ["agents/sac.py", "--env", DIARY, "--steps", "20", "--eval-every", "10",
             "--eval-episodes", "1", "--trials", "2", "--workers", "2", "--runs", str(tmp_path),
             "--space", "gamma=0.9:0.99", "--cuda", *TINY], Tune, tuning.tune)
    assert code == 0 and [job.device for job in here] == ["cuda:0", "cuda:1"]
