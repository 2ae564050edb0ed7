"""The CUDA path without a GPU, on the pretend device: equal to the CPU's results to the bit."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lab import train as script
from lab.accelerate import Accelerator, CudaGraph, prepare_process
from lab.agent import load_agent, restore_state, save_state
from lab.envs.make import make_envs
from lab.envs.torch_tasks import ENVS
from lab.envs.torch_vec import BLOCK
from lab.options import Simple, Tune, Vectorised
from lab.training import checkpoint, evaluation, processes
from lab.training.loop import train
from lab.training.plasticity import measure
from lab.training.processes import Engine, Processes, run_jobs
from lab.training.recorder import read_metrics
from lab.tuning import run as tuning
from lab.tuning import study
from lab.watch import __main__ as watch
from tests.conftest import drive, flat_state, make_spec, make_steps, small_config
from tests.pretend_device import PretendCuda, device_of

DIARY = "tests.probe_envs:lab-tests/Diary-v0"
TINY = ["--batch-size", "8", "--actor-width", "8", "--qf-width", "8", "--learning-starts", "8"]
PPO = ["agents/ppo.py", "--num-steps", "8", "--num-minibatches", "2", "--width", "8"]
DOWN, UP = "copy: cuda:0 to cpu", "copy: cpu to cuda:0"


@pytest.fixture
def cuda():
    with PretendCuda() as cuda:
        yield cuda


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


def trained(module, device, accelerate, count=16, **settings):
    """-> the metrics of each update and of plasticity, the last actions, and the state; on the CPU.
    """
    settings = {"replay_ratio": 1.0, "policy_delay": 1, "reset_at": (12,), "target_kl": 1e-4,
                "micro_batches": 2, "width": 8, "actor_width": 8, "qf_width": 8,
                "num_steps": 4, "num_minibatches": 2, **settings}
    agent = module.Agent(make_spec(), small_config(module, **settings), [0, 1], num_envs=2,
                         total_steps=80, device=device, accelerate=accelerate)
    steps = [tuple(x.to(device) for x in step) for step in make_steps((0, 1), 2, count)]
    events = PretendCuda.active.events if device != "cpu" else []
    events.clear()
    history = drive(agent, steps)
    history += [measure(agent), {"actions": agent.act(steps[0][0], explore=False)}]
    assert not events
    state = {name: value for name, value in flat_state(save_state(agent)).items()
             if "generator" not in name}
    return agent, [{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in each.items()}
                   for each in (*history, state)]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) >= 4
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            same = torch.equal if isinstance(value, torch.Tensor) else type(value).__eq__
            assert same(one[name], value), name


def test_every_agent_equals_the_cpu_and_nothing_waits_or_is_copied(module):
    _, expected = trained(module, "cpu", lambda fn: fn)
    with PretendCuda():
        agent, seen = trained(module, "cuda", lambda fn: fn)
        assert {x.device.type for x in flat_state(save_state(agent)).values()
                if isinstance(x, torch.Tensor) and x.dtype != torch.uint8} == {"cuda"}
    assert_same(seen, expected)


def test_every_agent_equals_the_cpu_as_cuda_graphs_in_bf16(module, uncompiled):
    """Each function runs to warm up and once to be recorded, then it is replayed."""
    _, expected = trained(module, "cpu", Accelerator(False, "bf16"), target_kl=None)
    with PretendCuda() as cuda:
        ran, accelerate = Counter(), Accelerator(True, "bf16", "cuda")

        def counted(fn):
            def run(*tensors):
                ran[run] += 1
                return fn(*tensors)

            run.__name__ = fn.__name__
            return accelerate(run)

        _, seen = trained(module, "cuda", counted, target_kl=None)
        replayed = sum(accelerate.calls.values()) - CudaGraph.WARM_UP * len(ran)
        assert cuda.replays >= replayed - CudaGraph.WARM_UP > 0  # CEM searches in two shapes
    assert max(ran.values()) <= 2 * (CudaGraph.WARM_UP + 1)
    assert_same(seen, expected)


def test_a_checkpoint_crosses_devices(module, tmp_path):
    """From CUDA to the CPU and back: weights, optimizers, replay and counters."""
    with PretendCuda():
        first, _ = trained(module, "cuda", lambda fn: fn, count=8)
        state = flat_state(save_state(first))
        checkpoint.save(tmp_path / "cuda", 1, {"agent": save_state(first)})
    with pytest.raises(RuntimeError, match="CUDA"):  # the file names its device
        torch.load(next((tmp_path / "cuda").glob("*.pt")), weights_only=True)
    second, _ = trained(module, "cpu", lambda fn: fn, count=6)
    restore_state(second, checkpoint.load_latest(tmp_path / "cuda")["agent"])
    checkpoint.save(tmp_path / "cpu", 1, {"agent": save_state(second)})
    with PretendCuda():
        third, _ = trained(module, "cuda", lambda fn: fn, count=6)
        restore_state(third, checkpoint.load_latest(tmp_path / "cpu", "cuda")["agent"])
        again = flat_state(save_state(third))
        for name in state:
            if "generator" not in name and isinstance(state[name], torch.Tensor):
                assert again[name].device == state[name].device, name
                assert torch.equal(again[name], state[name]), name
        drive(third, [tuple(x.to("cuda") for x in step) for step in make_steps((0, 1), 2, 2)])


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


@pytest.mark.parametrize("bug, caught", zip(BUGS, [
    "on the same device", "wait: aten._local_scalar_dense", "replaced after the recording",
    "loss/qf"], strict=True))
def test_planted_bugs_are_caught(tmp_path, uncompiled, bug, caught):
    source, (right, wrong) = Path("agents/sac.py").read_text(), BUGS[bug]
    assert source.count(right) == 1
    path = tmp_path / "sac.py"
    path.write_text(source.replace(right, wrong))
    module = load_agent(path)
    _, expected = trained(module, "cpu", lambda fn: fn)
    with PretendCuda(), pytest.raises((RuntimeError, AssertionError), match=caught):
        _, seen = trained(module, "cuda", Accelerator(True, device="cuda"))
        assert_same(seen, expected)


# Environments


@pytest.mark.parametrize("backend, env_id, events", [
    *[(None, f"torch/{name}", []) for name in ENVS],
    ("sync", DIARY, [DOWN, UP]), ("workers", DIARY, [DOWN, UP]),
    ("envpool", "Pendulum-v1", [DOWN, UP])])
def test_every_backend_steps_as_on_the_cpu_with_a_copy_each_way_at_most(backend, env_id, events):
    """Past the ends of episodes, and past a block of random numbers."""
    if backend == "envpool":
        pytest.importorskip("envpool")
    seen = {}
    for device in ("cpu", "cuda"):
        with PretendCuda() as cuda:
            envs = make_envs(env_id, [0, 1], 2, backend, device, clip_reward=(-1, 1),
                             **{"workers": 2} if backend == "workers" else {})
            actions = torch.linspace(-1, 1, 4 * envs.spec.action_dim).view(2, 2, -1).to(device)
            steps = [(envs.reset(),)]
            cuda.events.clear()
            for _ in range(BLOCK + 1):
                steps.append(envs.step(actions))
            assert cuda.events == (BLOCK + 1) * events * (device == "cuda")
            assert {device_of(x).type for step in steps for x in step} == {device}
            seen[device] = [x.cpu() for step in steps for x in step]
            envs.finished()
            envs.close()
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def test_an_evaluation_looks_at_the_host_every_25_steps_and_gives_the_same_returns():
    returns = {}
    for device in ("cpu", "cuda"):
        with PretendCuda() as cuda:
            envs = make_envs("torch/ContinuousCartPole-v1", [0, 1], 2, device=device)
            lengths = []
            agent = SimpleNamespace(act=lambda obs, explore: obs[..., :1].sign())
            returns[device] = evaluation.evaluate(agent, envs,
                                                  on_step=lambda *step: lengths.append(step))
            steps = len(lengths) - 1
            assert len(cuda.events) == (steps // 25 + 1) * (device == "cuda")
            assert steps > 25 and (device == "cpu" or steps % 25 == 0)
    assert returns["cuda"] == returns["cpu"]


# Runs


def rows_of(folder):
    """Of each seed's metrics, without times."""
    return {str(path.relative_to(folder)): [
        {k: v for k, v in row.items() if k != "wall_time" and not k.startswith("perf/")}
        for row in read_metrics(path)] for path in sorted(folder.glob("*/*/seed_*/metrics.jsonl"))}


def trains(kind, folder, *words):
    """-> the folder of the run that the command makes."""
    assert script.run([*words, "--eval-episodes", "2", "--log", "--runs", str(folder), "--name",
                       "run"], kind) == 0
    return next(folder.glob("run-*"))


@pytest.mark.parametrize("kind, words", [
    (Vectorised, [*PPO, "--env", "torch/Pendulum-v1", "--num-envs", "4", "--steps", "128"]),
    (Vectorised, ["agents/cem.py", "--env", "torch/Pendulum-v1", "--num-envs", "4", "--steps",
                  "32", *TINY[:2], *TINY[4:]]),
    (Simple, [*PPO, "--env", "Pendulum-v1", "--steps", "48", "--processes", "1"])])
def test_a_run_with_cuda_writes_the_rows_of_one_on_the_cpu(tmp_path, kind, words):
    words = [*words, "--seeds", "2"]
    plain = trains(kind, tmp_path / "cpu", *words, "--fp32-library", "blas")
    with PretendCuda():
        run = trains(kind, tmp_path / "cuda", *words, "--cuda")
    rows = rows_of(plain)
    assert rows == rows_of(run) and len(rows) == 2
    assert all("return/eval" in each[-1] for each in rows.values())


@pytest.mark.parametrize("env_id", ["torch/Pendulum-v1", "Pendulum-v1"])
def test_a_run_with_cuda_is_watched_without_a_gpu(tmp_path, monkeypatch, env_id):
    monkeypatch.setattr(watch.camera, "check", lambda *_: None)  # a process of its own: seconds
    with PretendCuda():
        run = trains(Vectorised, tmp_path, *PPO, "--env", env_id, "--num-envs", "4", "--steps",
                     "64", "--cuda")
    assert not torch.cuda.is_available()
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
        del self.running[key], self.gpus[key]
        yield key, failure

    def end(self, key):
        """A pruned trial has ended already."""


@pytest.fixture
def here(monkeypatch):
    HereProcesses.jobs = []
    for module in (processes, study):
        monkeypatch.setattr(module, "Processes", HereProcesses)
    return HereProcesses.jobs


def test_each_process_takes_the_next_gpu_and_graphs_are_recorded_there(tmp_path, here, uncompiled):
    words = ["agents/sac.py", "--env", DIARY, "--seeds", "5", "--steps", "40", "--processes", "3",
             *TINY]
    plain = trains(Simple, tmp_path / "cpu", *words, "--fp32-library", "blas")
    here.clear()
    with PretendCuda(2) as cuda:
        run = trains(Simple, tmp_path / "cuda", *words, "--cuda", "--compile")
        assert cuda.replays
    assert [job.device for job in here] == ["cuda:0", "cuda:1", "cuda:0"]
    assert rows_of(run) == rows_of(plain) and len(rows_of(run)) == 5
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


def test_a_study_trains_its_trials_on_the_gpus(tmp_path, here):
    with PretendCuda(2):
        code = script.run(
            ["agents/sac.py", "--env", DIARY, "--steps", "20", "--eval-every", "10",
             "--eval-episodes", "1", "--trials", "2", "--workers", "2", "--confirm-seeds", "1",
             "--runs", str(tmp_path), "--space", "gamma=0.9:0.99", "--cuda", *TINY], Tune,
            tuning.tune)
    assert code == 0 and [job.device for job in here[:2]] == ["cuda:0", "cuda:1"]
    best, = tmp_path.glob("studies/*/best.json")
    assert json.loads(best.read_text())["cuda"] is True


def train_pretending(job, emit):
    """The work of a process with two pretend devices."""
    torch.compile = lambda fn, options=None: fn
    with PretendCuda(2) as cuda:
        prepare_process(device=job.device)
        train(job, emit)
        emit({"device": job.device, "current": cuda.current, "replays": cuda.replays})


@pytest.mark.slow
def test_processes_train_on_their_gpus(here, tmp_path):
    """Real ones: each pretends for itself."""
    jobs, told = [], {}
    with PretendCuda(2):
        options, config = script.parse_args(
            ["agents/sac.py", "--env", DIARY, "--seeds", "2", "--steps", "40", "--processes", "2",
             "--cuda", "--compile", *TINY], Simple)
        jobs = script.make_jobs(options, config, 2, None)
        failures = run_jobs(
            jobs, 2, lambda index, message: told.setdefault(index, {}).update(message),
            Engine(2, lambda number: Processes(train_pretending)))
    assert not failures
    for index, device in enumerate(["cuda:0", "cuda:1"]):
        assert told[index]["device"] == device and told[index]["current"] == index
        assert told[index]["replays"]
