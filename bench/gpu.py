"""What a GPU gives: environments in torch stepping alone, PPO on them, and SAC's stacked updates
beside a plain eager loop of one seed.

    python bench/gpu.py                  on a GPU
    python bench/gpu.py --device cpu     small, to see that it runs

The plain loop is written as one does without this lab: nn.Linear, one optimiser for each network,
two critics one after the other, a replay in device memory, no compilation, one seed.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.accelerate import Accelerator  # noqa: E402
from lab.agent import build_agent  # noqa: E402
from lab.envs.make import make_envs  # noqa: E402
from lab.envs.spec import EnvSpec  # noqa: E402
from lab.training.recorder import versions  # noqa: E402

SPEC = EnvSpec("HalfCheetah-v5", 17, 6, 6 * (-1.0,), 6 * (1.0,), 1000)


def per_second(step, device: str, seconds: float) -> float:
    """Calls of step() in a second, after a warm-up that compiles and records."""
    for duration in (seconds / 2, seconds):
        count, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < duration:
            for _ in range(20):
                step()
            count += 20
            if device == "cuda":
                torch.cuda.synchronize()
        speed = count / (time.perf_counter() - begun)
    return speed


def stepping(device: str, seeds: int, num_envs: int, seconds: float) -> float:
    """Environment steps/s of Pendulum alone, its actions drawn beforehand."""
    stack = make_envs("torch/Pendulum-v1", range(seeds), num_envs, device=device, compile=True)
    stack.reset()
    actions = itertools.cycle(4 * torch.rand(16, seeds, num_envs, 1, device=device) - 2)
    return seeds * num_envs * per_second(lambda: stack.step(next(actions)), device, seconds)


def ppo(device: str, seeds: int, num_envs: int, seconds: float) -> float:
    """Transitions/s of PPO on Pendulum with its updates: rollouts of 32 steps, 8 minibatches, one
    pass."""
    stack = make_envs("torch/Pendulum-v1", range(seeds), num_envs, device=device, compile=True)
    config = {"num_steps": 32, "num_minibatches": 8, "update_epochs": 1}
    agent = build_agent(ROOT / "agents/ppo.py", config, stack.spec, range(seeds), num_envs,
                        10**9, device, Accelerator(True, "bf16", device))
    obs = stack.reset()

    def step() -> None:
        nonlocal obs
        actions = agent.act(obs)
        agent.update()
        t = stack.step(actions)
        agent.observe(obs, actions, t.rewards, t.next_obs, t.terminations, t.truncations)
        obs = t.obs

    return seeds * num_envs * per_second(step, device, seconds)


def sac(device: str, seeds: int, seconds: float) -> float:
    """Updates/s, summed over seeds, compiled and in bf16; on a GPU as CUDA graphs."""
    agent = build_agent(ROOT / "agents/sac.py", {"learning_starts": 1}, SPEC, range(seeds), 1,
                        50_000, device, Accelerator(True, "bf16", device))
    obs, flags = torch.randn(seeds, 1, 17, device=device), torch.zeros(seeds, 1, device=device)

    def step() -> None:
        agent.observe(obs, agent.act(obs), flags, obs, flags, flags)
        agent.update()

    return seeds * per_second(step, device, seconds)


def mlp(fan_in: int, fan_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(fan_in, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
                         nn.Linear(256, fan_out))


def plain(device: str, seconds: float) -> float:
    """Updates/s of the plain loop."""
    actor = mlp(17, 12).to(device)
    critics, targets = ([mlp(23, 1).to(device) for _ in range(2)] for _ in range(2))
    alpha = torch.zeros(1, device=device, requires_grad=True)
    weights = [*critics[0].parameters(), *critics[1].parameters()]
    q_optimizer, actor_optimizer, alpha_optimizer = (
        torch.optim.Adam(p, lr=3e-4) for p in (weights, actor.parameters(), [alpha]))
    replay = torch.randn(50_000, 17 + 6 + 17 + 2, device=device)

    def act(obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = actor(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())
        x = normal.rsample()
        log_prob = normal.log_prob(x) - torch.log(1 - x.tanh().square() + 1e-6)
        return x.tanh(), log_prob.sum(-1, keepdim=True)

    def lowest(networks: list[nn.Sequential], obs: torch.Tensor, actions: torch.Tensor
               ) -> torch.Tensor:
        both = torch.cat([obs, actions], -1)
        return torch.minimum(networks[0](both), networks[1](both))

    def step() -> None:
        batch = replay[torch.randint(len(replay), (256,), device=device)]
        obs, actions, next_obs, rewards, ends = batch.split([17, 6, 17, 1, 1], -1)
        with torch.no_grad():
            next_actions, log_prob = act(next_obs)
            value = lowest(targets, next_obs, next_actions) - alpha.exp() * log_prob
            target = rewards + 0.99 * (1 - (ends > 2).float()) * value
        both = torch.cat([obs, actions], -1)
        loss = sum(nn.functional.mse_loss(critic(both), target) for critic in critics)
        q_optimizer.zero_grad()
        loss.backward()
        q_optimizer.step()
        new, log_prob = act(obs)
        loss = (alpha.exp().detach() * log_prob - lowest(critics, obs, new)).mean()
        actor_optimizer.zero_grad()
        loss.backward()
        actor_optimizer.step()
        loss = -(alpha.exp() * (log_prob.detach() - 6)).mean()
        alpha_optimizer.zero_grad()
        loss.backward()
        alpha_optimizer.step()
        for critic, slow in zip(critics, targets, strict=True):
            for p, q in zip(critic.parameters(), slow.parameters(), strict=True):
                q.data.copy_(0.005 * p.data + 0.995 * q.data)

    return per_second(step, device, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="none on a CPU: it only shows that it runs")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu shows that it runs")
    device, seconds = options.device, options.seconds
    seeds, num_envs = (8, 4096) if device == "cuda" else (2, 64)
    sides = {
        "environment steps/s, torch/Pendulum-v1, alone": lambda: stepping(
            device, seeds, num_envs, seconds),
        "transitions/s, PPO with its updates": lambda: ppo(device, seeds, num_envs, seconds),
        "updates/s, SAC, stacked, summed over seeds": lambda: sac(device, seeds, seconds),
        "updates/s, SAC, plain eager loop, one seed": lambda: plain(device, seconds)}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, side in sides.items():
            speeds[name].append(round(side(), 1))
            print(f"{name}: {speeds[name][-1]:,.0f}", flush=True)
    if device == "cuda" or options.out:
        out = options.out or ROOT / "bench/results/gpu.json"
        out.write_text(json.dumps({
            "command": "python bench/gpu.py", "seeds": seeds, "environments": num_envs,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "versions": versions(), "speeds": speeds}, indent=1) + "\n")
        print(f"written: {out}")


if __name__ == "__main__":
    main()
