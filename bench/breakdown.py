"""What bounds SAC: with 32 HalfCheetah environments of one seed on two cores, and with 8 seeds.

    python bench/breakdown.py

Wall time of a vector step (32 transitions) by part of the training loop, on an otherwise idle
machine. "Waiting" is for the environments, after the update. Updates are compiled, in bf16.
Beside it, the operations of the updates on one core, by their time in the torch profiler, which
makes calls look slower than they are.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lab.accelerate import Accelerator, prepare_process  # noqa: E402
from lab.agent import build_agent  # noqa: E402
from lab.training.job import Job, make_train_envs  # noqa: E402
from lab.training.recorder import versions  # noqa: E402

ENV, NUM_ENVS, STEPS = "HalfCheetah-v5", 32, 12
PARTS = ("act", "update", "waiting", "observe")
# workers, torch threads, gradient steps per transition
CASES = [(workers, threads, ratio) for ratio in (1.0, 0.25, 1 / NUM_ENVS)
         for workers, threads in ((1, 1), (1, 2), (2, 1), (2, 2))]
# of the operations: seeds, environments per seed, precision
PROFILES = [(1, NUM_ENVS, "bf16"), (8, 1, "bf16"), (8, 1, "fp32")]
KINDS = {  # how the profiler's names begin
    "matrix products": ("aten::bmm",), "kernels of the compiler": ("## Call CompiledFxGraph",),
    "Adam": ("Optimizer", "aten::_fused_adam_"),
    "calls of compiled functions": ("CompiledFunction", "Torch-Compiled", "TorchDynamo", "AOT")}


def build(workers: int, threads: int, ratio: float, seeds: int = 1, num_envs: int = NUM_ENVS,
          precision: str = "bf16") -> tuple[Any, Any]:
    """-> environments, agent."""
    prepare_process(threads)
    job = Job(agent_path=str(ROOT / "agents/sac.py"),
              config={"replay_ratio": ratio, "learning_starts": num_envs}, env_id=ENV,
              seeds=tuple(range(seeds)),
              steps=10**6, eval_every=0, log_every=10**6, checkpoint_every=0, num_envs=num_envs,
              backend="workers" if workers > 1 else "sync", workers=workers)
    envs = make_train_envs(job)
    agent = build_agent(job.agent_path, job.config, envs.spec, job.seeds, num_envs, job.steps,
                        "cpu", Accelerator(compiled=True, precision=precision))
    return envs, agent


def measure(workers: int, threads: int, ratio: float) -> dict[str, float]:
    """Seconds of a vector step by part."""
    envs, agent = build(workers, threads, ratio)
    spent, obs = dict.fromkeys(PARTS, 0.0), envs.reset()
    for step in range(4 + STEPS):
        if step == 4:  # compiled
            spent = dict.fromkeys(PARTS, 0.0)
        times = [time.perf_counter()]
        actions = envs.act_and_send(agent.act, obs)
        times.append(time.perf_counter())
        agent.update()
        times.append(time.perf_counter())
        t = envs.receive()
        times.append(time.perf_counter())
        agent.observe(obs, actions, t.rewards, t.next_obs, t.terminations, t.truncations)
        times.append(time.perf_counter())
        obs = t.obs
        for part, start, end in zip(PARTS, times, times[1:], strict=False):
            spent[part] += (end - start) / STEPS
    envs.close()
    return spent


def operations(seeds: int, num_envs: int, precision: str) -> dict[str, float]:
    """Share of the updates' time by kind of operation."""
    envs, agent = build(1, 1, NUM_ENVS / num_envs, seeds, num_envs, precision)
    obs, zeros = envs.reset(), torch.zeros(seeds, num_envs)
    for _ in range(5):
        agent.observe(obs, agent.act(obs), zeros, obs, zeros, zeros)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:  # the last one is compiled
            agent.update()
    envs.close()
    spent: Counter[str] = Counter()
    for event in profiled.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "other")
        spent[kind] += event.self_cpu_time_total
    return {kind: seconds / spent.total() for kind, seconds in spent.most_common()}


def markdown(result: dict) -> str:
    headings = ["gradient steps a transition", "processes that step", "torch threads",
                "transitions/s", *PARTS]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for row in result["rows"]:
        total = sum(row["seconds"].values())
        shares = " | ".join(f"{row['seconds'][part] / total:.0%}" for part in PARTS)
        lines.append(f"| {row['replay_ratio']:.3g} | {row['workers']} | {row['threads']} | "
                     f"{NUM_ENVS / total:.0f} | {shares} |")
    kinds = [*KINDS, "other"]
    lines += ["", "| seeds | environments per seed | precision | " + " | ".join(kinds) + " |",
              "|---" * (3 + len(kinds)) + "|"]
    for row in result["operations"]:
        shares = " | ".join(f"{row['shares'].get(kind, 0):.0%}" for kind in kinds)
        lines.append(f"| {row['seeds']} | {row['num_envs']} | {row['precision']} | {shares} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/breakdown.json")
    options = parser.parse_args()
    rows = []
    for workers, threads, ratio in CASES:
        rows.append({"workers": workers, "threads": threads, "replay_ratio": ratio,
                     "seconds": measure(workers, threads, ratio)})
        print(rows[-1], flush=True)
    profiles = [{"seeds": seeds, "num_envs": num_envs, "precision": precision,
                 "shares": operations(seeds, num_envs, precision)}
                for seeds, num_envs, precision in PROFILES]
    result = {"command": "python bench/breakdown.py", "versions": versions(),
              "operations": profiles, "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
