"""The sides that bench/gpu.py measures in-process: SAC, environments in torch, PPO, and peers.

Two baselines train one seed of SAC without this lab: "plain loop" is an ordinary eager
implementation, "LeanRL's way" adds torch.compile and CUDA graphs. Both use nn.Linear, two separate
critics and a replay buffer in device memory. A step of any SAC side acts, stores, samples and
updates; it steps no environment.
"""

import importlib.util
import itertools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.accelerate import Accelerator, CudaGraph  # noqa: E402
from lab.agent import build_agent  # noqa: E402
from lab.envs.make import make_envs  # noqa: E402
from lab.envs.spec import EnvSpec  # noqa: E402
from lab.envs.torch_tasks import ENVS  # noqa: E402

SPEC = EnvSpec("HalfCheetah-v4", 17, 6, 6 * (-1.0,), 6 * (1.0,), 1000)
REPLAY = 100_000  # transitions per seed


class Side(NamedTuple):
    """One side of a comparison. A call of step() counts as `unit` updates or steps. Synchronises
    once per `chunk` calls. The first `warm` calls compile and record, and are not timed."""

    step: Callable[[], Any]
    unit: float
    chunk: int = 20
    warm: int = 10
    facts: dict[str, float] = {}


def accelerator(kind: str, device: str) -> Callable[..., Any]:
    """On a CPU all kinds run eagerly: compiling would use up the time of a smoke test."""
    if kind == "compiled" and device == "cuda":
        return torch.compile
    compiled = kind in ("graphs", "bf16") and device == "cuda"
    return Accelerator(compiled, "bf16" if kind == "bf16" else "fp32", device)


def sac(kind: str, seeds: int, device: str) -> Side:
    agent = build_agent(ROOT / "agents/sac.py", {"learning_starts": 1}, SPEC, range(seeds), 1,
                        REPLAY, device, accelerator(kind, device))
    obs, flags = torch.randn(seeds, 1, 17, device=device), torch.zeros(seeds, 1, device=device)

    def step() -> None:
        agent.observe(obs, agent.act(obs), flags, obs, flags, flags)
        agent.update()

    return Side(step, seeds)


def mlp(fan_in: int, fan_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(fan_in, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
                         nn.Linear(256, fan_out))


class OneSeed:
    """SAC of one seed without this lab: plain, or `lean`, with LeanRL's optimisations."""

    def __init__(self, device: str, lean: bool, compiled: bool):
        self.device, self.lean = device, lean
        self.actor = mlp(17, 12).to(device)
        self.critics, self.targets = (
            [mlp(23, 1).to(device) for _ in range(2)] for _ in range(2))
        self.alpha = torch.zeros(1, device=device, requires_grad=True)
        self.slow, self.fast = ([p for net in nets for p in net.parameters()]
                                for nets in (self.targets, self.critics))
        for p, q in zip(self.slow, self.fast, strict=True):
            p.requires_grad_(False).copy_(q)
        kind = {"fused": True, "capturable": device == "cuda"} if lean else {}
        self.q_optimizer, self.actor_optimizer, self.alpha_optimizer = (
            torch.optim.Adam(p, lr=3e-4, **kind)
            for p in (self.fast, self.actor.parameters(), [self.alpha]))
        self.replay = torch.randn(REPLAY, 17 + 6 + 17 + 2, device=device)
        self.place = itertools.count()
        self.obs = torch.randn(1, 17, device=device)
        self.flags = torch.zeros(1, 2, device=device)
        self.policy, self.updates = self.act, [self.update_critics, self.update_actor]
        if lean and compiled:
            self.policy = torch.compile(self.act)
            self.updates = [
                CudaGraph(torch.compile(fn)) if device == "cuda" else torch.compile(fn)
                for fn in self.updates]

    def act(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = self.actor(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp(),
                                            validate_args=False if self.lean else None)
        x = normal.rsample()
        log_prob = normal.log_prob(x) - torch.log(1 - x.tanh().square() + 1e-6)
        return x.tanh(), log_prob.sum(-1, keepdim=True)

    def update_critics(self, batch: torch.Tensor) -> torch.Tensor:
        obs, actions, next_obs, rewards, ends = batch.split([17, 6, 17, 1, 1], -1)
        with torch.no_grad():
            next_actions, log_prob = self.act(next_obs)
            value = lowest(self.targets, next_obs, next_actions) - self.alpha.exp() * log_prob
            target = rewards + 0.99 * (1 - (ends > 2).float()) * value
        both = torch.cat([obs, actions], -1)
        loss = sum(nn.functional.mse_loss(critic(both), target) for critic in self.critics)
        loss.backward()
        self.q_optimizer.step()
        self.q_optimizer.zero_grad()
        return loss.detach()

    def update_actor(self, batch: torch.Tensor) -> torch.Tensor:
        obs = batch[:, :17]
        new, log_prob = self.act(obs)
        loss = (self.alpha.exp().detach() * log_prob - lowest(self.critics, obs, new)).mean()
        loss.backward()
        self.actor_optimizer.step()
        self.actor_optimizer.zero_grad()
        self.q_optimizer.zero_grad()
        alpha_loss = -(self.alpha.exp() * (log_prob.detach() - 6)).mean()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        self.alpha_optimizer.zero_grad()
        return loss.detach()

    def step(self) -> None:
        with torch.no_grad():
            actions, _ = self.policy(self.obs)
            row = torch.cat([self.obs, actions, self.obs, self.flags], -1)[0]
            self.replay[next(self.place) % REPLAY] = row
        batch = self.replay[torch.randint(REPLAY, (256,), device=self.device)]
        for update in self.updates:
            update(batch)
        with torch.no_grad():
            if self.lean:
                torch._foreach_lerp_(self.slow, self.fast, 0.005)
            else:
                for p, q in zip(self.slow, self.fast, strict=True):
                    p.copy_(0.995 * p + 0.005 * q)


def lowest(critics: list[nn.Sequential], obs: torch.Tensor, actions: torch.Tensor
           ) -> torch.Tensor:
    both = torch.cat([obs, actions], -1)
    return torch.minimum(critics[0](both), critics[1](both))


def one_seed(device: str, lean: bool, compiled: bool) -> Side:
    return Side(OneSeed(device, lean, compiled).step, 1)


def stepping(name: str, seeds: int, num_envs: int, device: str) -> Side:
    """An environment without an agent; actions are drawn beforehand. Bytes moved: inputs are copied
    (read and write) and read; outputs are written and copied (read and write)."""
    stack = make_envs(f"torch/{name}", range(seeds), num_envs, device=device,
                      compile=device == "cuda")
    stack.reset()
    actions = torch.rand(4, seeds, num_envs, stack.spec.action_dim, device=device) - 0.5
    turns = itertools.cycle(actions)
    outputs = [x for x in stack.step(next(turns)) if x.dim() > 1] + [stack.state, stack.running]
    inputs = [stack.state, stack.running, actions[0], stack.block[0]]
    moved = 3 * sum(x.numel() * x.element_size() for x in inputs + outputs)
    return Side(lambda: stack.step(next(turns)), seeds * num_envs, warm=70,
                facts={"bytes": moved / (seeds * num_envs)})


def ppo(kind: str, seeds: int, num_envs: int, device: str) -> Side:
    """PPO on Pendulum, updates included: rollouts of 32 steps, 8 minibatches, one epoch."""
    stack = make_envs("torch/Pendulum-v1", range(seeds), num_envs, device=device,
                      compile=device == "cuda")
    config = {"num_steps": 32, "num_minibatches": 8, "update_epochs": 1}
    agent = build_agent(ROOT / "agents/ppo.py", config, stack.spec, range(seeds), num_envs,
                        10**12, device, accelerator(kind, device))
    obs = stack.reset()

    def step() -> None:
        nonlocal obs
        actions = agent.act(obs)
        agent.update()
        t = stack.step(actions)
        agent.observe(obs, actions, t.rewards, t.next_obs, t.terminations, t.truncations)
        obs = t.obs

    return Side(step, seeds * num_envs, chunk=32, warm=70)


def rl8(num_envs: int, device: str, horizon: int = 32, epochs: int = 1, width: int = 64) -> Side:
    """rl8's PPO with one seed on the same Pendulum; settings of `ppo` above, fp32 as by default."""
    # rl8 imports mlflow, but only its trainers, unused here, need it
    if "mlflow" not in sys.modules and importlib.util.find_spec("mlflow") is None:
        pyfunc = types.ModuleType("mlflow.pyfunc")
        pyfunc.PythonModel = pyfunc.PythonModelContext = object
        sys.modules |= {"mlflow": types.ModuleType("mlflow"), "mlflow.pyfunc": pyfunc}
        sys.modules["mlflow"].pyfunc = pyfunc
    from rl8 import AlgorithmConfig
    from rl8.env import Env
    from tensordict import TensorDict
    from torchrl.data import Unbounded

    env = ENVS["Pendulum-v1"]()

    class Pendulum(Env):
        def __init__(self, num_envs, /, horizon=None, *, device="cpu"):
            super().__init__(num_envs, horizon, device=device)
            self.observation_spec = Unbounded(3, device=device)
            self.action_spec = Unbounded(1, device=device)

        def reset(self, *, config=None):
            self.state = env.initial(torch.rand(self.num_envs, 2, device=self.device))
            return env.observe(self.state)

        def step(self, action):
            self.state, rewards, _ = env.step(self.state, action)
            return TensorDict({"obs": env.observe(self.state), "rewards": rewards[:, None]},
                              batch_size=self.num_envs, device=self.device)

    algorithm = AlgorithmConfig(
        num_envs=num_envs, horizon=horizon, horizons_per_env_reset=-1, num_sgd_iters=epochs,
        sgd_minibatch_size=num_envs * horizon // 8, device=device,
        model_config={"hiddens": (width, width), "activation_fn": "tanh"}).build(Pendulum)

    def step() -> None:
        algorithm.collect()
        algorithm.step()

    return Side(step, horizon * num_envs, chunk=1, warm=3)
