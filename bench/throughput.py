"""Environment steps/s of every backend against gymnasium, and training steps/s against SB3.

    make throughput        # or: python bench/throughput.py --peers .bench-venv/bin/python

Each measurement runs in its own process, pinned to --cores ("one core": the first of them). A
repeat runs all measurements once; ratios are taken within a repeat.

Stepping: 16 environments, for torch also 1024. Actions are random and drawn beforehand; episodes
end and restart as in training. CartPole is gymnasium's with a continuous action: negative pushes
left, positive right. envpool's discrete CartPole is not measured.
Training: PPO on 32 BipedalWalker environments, rollouts of 2048 transitions per seed, minibatches
of 64, otherwise SB3's defaults. Steps/s are summed over seeds.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.speed import median_ratio, run_pinned, versions  # noqa: E402

CARTPOLE = "bench.throughput:bench/CartPole-v1"
ENVIRONMENTS = {"CartPole": CARTPOLE, "HalfCheetah": "HalfCheetah-v5",
                "BipedalWalker": "BipedalWalker-v3", "Pendulum": "Pendulum-v1"}
IN_TORCH = {"CartPole": "torch/ContinuousCartPole-v1", "Pendulum": "torch/Pendulum-v1"}
STEPPING = ("bare loop, one core", "gymnasium sync, one core", "gymnasium sync", "gymnasium async",
            "lab sync", "lab workers", "lab envpool", "lab torch", "lab torch, 1024",
            "lab torch, 1024, compiled")
TRAINING = ("sb3 SubprocVecEnv", "lab, 1 seed x 32", "lab, 4 seeds x 8",
            "lab, 4 seeds x 8, compiled")
NUM_ENVS, SECONDS = 16, 2.0


class Push(gymnasium.ActionWrapper):
    """CartPole with a continuous action, so that every backend can run it."""

    def __init__(self):
        super().__init__(gymnasium.make("CartPole-v1", disable_env_checker=True))
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def action(self, action):
        return int(action[0] > 0)


if "bench/CartPole-v1" not in gymnasium.registry:
    gymnasium.register("bench/CartPole-v1", "bench.throughput:Push")


def steps_per_second(step, count: int) -> float:
    """Of step(k), which makes `count` environment steps; warms up for 0.3 s first."""
    for seconds in (0.3, SECONDS):
        k, start_time = 0, time.perf_counter()
        while time.perf_counter() - start_time < seconds:
            step(k)
            k += 1
    return k * count / (time.perf_counter() - start_time)


def random_actions(space, *shape: int) -> np.ndarray:
    """64 arrays of that shape, uniform within the bounds."""
    uniform = np.random.default_rng(0).random((64, *shape, *space.shape))
    return (space.low + uniform * (space.high - space.low)).astype(space.dtype)


def measure_gymnasium(side: str, env_id: str) -> float:
    from lab.envs.spec import redirect_mujoco_warnings

    redirect_mujoco_warnings()
    if side.startswith("bare"):
        env = gymnasium.make(env_id, disable_env_checker=True)
        env.reset(seed=0)
        actions = random_actions(env.action_space)

        def step(k: int) -> None:
            _, _, terminated, truncated, _ = env.step(actions[k % 64])
            if terminated or truncated:
                env.reset()

        return steps_per_second(step, 1)
    vectorised = gymnasium.make_vec(
        env_id, NUM_ENVS, vectorization_mode=side.split()[1].removesuffix(","))
    vectorised.reset(seed=0)
    actions = random_actions(vectorised.single_action_space, NUM_ENVS)
    speed = steps_per_second(lambda k: vectorised.step(actions[k % 64]), NUM_ENVS)
    vectorised.close()
    return speed


def measure_lab(side: str, name: str) -> float:
    import torch

    from lab.accelerate import prepare_process
    from lab.envs.make import make_envs

    prepare_process()
    env_id, num_envs, backend, settings = ENVIRONMENTS[name], NUM_ENVS, side.split()[1], {}
    if "torch" in side:
        env_id, num_envs = IN_TORCH[name], 1024 if "1024" in side else NUM_ENVS
        settings = {"compile": "compiled" in side}
    stack = make_envs(env_id, [0], num_envs, backend.removesuffix(","), **settings)
    stack.reset()
    low, high = torch.tensor([stack.spec.action_low, stack.spec.action_high])
    actions = low + (high - low) * torch.rand(
        64, 1, num_envs, stack.spec.action_dim, generator=torch.Generator().manual_seed(0))
    speed = steps_per_second(lambda k: stack.step(actions[k % 64]), num_envs)
    stack.close()
    return speed


def measure_training(side: str) -> float:
    """Steps/s, summed over seeds, in the second half of a run."""
    if side.startswith("sb3"):
        return measure_sb3()
    from lab.training.job import Job
    from lab.training.loop import train

    seeds, num_envs = (1, 32) if "1 seed" in side else (4, 8)
    speeds = []
    train(Job(
        agent_path=str(ROOT / "agents/ppo.py"), env_id="BipedalWalker-v3",
        seeds=tuple(range(seeds)),
        config={"num_steps": 2048 // num_envs, "norm_obs": False, "norm_reward": False},
        num_envs=num_envs, backend="workers", workers=2, steps=16_384, eval_every=0,
        log_every=8_192, checkpoint_every=0, eval_episodes=1, compile="compiled" in side,
    ), lambda message: speeds.append(message.get("perf/steps_per_s")))
    return [speed for speed in speeds if speed][-1]


def measure_sb3() -> float:
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import SubprocVecEnv

    stack = make_vec_env("BipedalWalker-v3", 32, seed=0, vec_env_cls=SubprocVecEnv)
    model = PPO("MlpPolicy", stack, n_steps=64, device="cpu", seed=0)

    class Clock(BaseCallback):
        start_time = 0.0

        def _on_step(self) -> bool:
            if self.num_timesteps == 8_192 + 32:  # the previous update is done
                self.start_time = time.perf_counter()
            return True

    clock = Clock()
    model.learn(16_384, callback=clock)
    speed = (model.num_timesteps - 8_192 - 32) / (time.perf_counter() - clock.start_time)
    stack.close()
    return speed


def cases() -> list[tuple[str, str]]:
    """(environment or "training", side)."""
    stepping = [(name, side) for name in ENVIRONMENTS for side in STEPPING
                if not ("torch" in side and name not in IN_TORCH)
                and not ("envpool" in side and name == "CartPole")]
    return stepping + [("training", side) for side in TRAINING]


def markdown(result: dict) -> str:
    """The tables of docs/vectorised.md, from the result file."""
    speeds = {tuple(row["case"]): row["steps_per_s"] for row in result["rows"]}

    def cell(name: str, side: str, base: str) -> str:
        values = speeds.get((name, side))
        if not values:
            return ""
        ratio = median_ratio(values, speeds[name, base])
        return f"{statistics.median(values):,.0f} ({ratio:.2f})"

    lines = ["| steps/s (ratio to gymnasium sync on one core) | " + " | ".join(ENVIRONMENTS) + " |",
             "|---" * (1 + len(ENVIRONMENTS)) + "|"]
    lines += ["| " + " | ".join([side, *(cell(name, side, "gymnasium sync, one core")
                                         for name in ENVIRONMENTS)]) + " |" for side in STEPPING]
    lines += ["", "| PPO, 32 BipedalWalker environments | training steps/s (ratio to SB3) |",
              "|---|---|"]
    lines += [f"| {side} | {cell('training', side, TRAINING[0])} |" for side in TRAINING]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", help="Python of the virtual environment with SB3")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/throughput.json")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, side = options.measure
        if name == "training":
            print(measure_training(side))
        elif side.startswith("lab"):
            print(measure_lab(side, name))
        else:
            print(measure_gymnasium(side, ENVIRONMENTS[name]))
        return
    if not options.peers:
        parser.error("--peers is required; `make throughput` creates that virtual environment")
    rows: dict[tuple[str, str], list[float]] = {case: [] for case in cases()}
    start_time, total = time.monotonic(), len(rows) * options.repeats
    for repeat in range(options.repeats):
        for number, (name, side) in enumerate(rows):
            cores = options.cores[:1] if side.endswith("one core") else options.cores
            python = options.peers if side.startswith("sb3") else sys.executable
            speed = run_pinned(__file__, python, cores, {"PYTHONPATH": str(ROOT)}, name, side)
            rows[name, side].append(speed)
            done = repeat * len(rows) + number + 1
            left = (time.monotonic() - start_time) / done * (total - done)
            print(f"{done}/{total} {name}, {side}: {speed:,.0f} steps/s, "
                  f"ETA {left:.0f} s", flush=True)
    from lab.training.recorder import processor

    result = {
        "command": "make throughput", "repeats": options.repeats, "cores": len(options.cores),
        "processor": processor(), "python": platform.python_version(),
        "versions": versions(sys.executable, ["torch", "gymnasium", "mujoco", "numpy", "envpool"]),
        "peer_versions": versions(options.peers, ["torch", "stable-baselines3", "gymnasium"]),
        "rows": [{"case": case, "steps_per_s": [round(v) for v in values]}
                 for case, values in rows.items()],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    table = markdown(result)
    options.out.with_suffix(".md").write_text(table)
    print(f"{table}\nwritten: {options.out}")


if __name__ == "__main__":
    main()
