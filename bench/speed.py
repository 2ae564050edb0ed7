"""Training speed against Stable-Baselines3 and SBX: whole loops on HalfCheetah-v5, on one core.

    make bench        # or: python bench/speed.py --peers .bench-venv/bin/python

Each measurement runs in its own process, pinned to the same core. A repeat runs all measurements
once, so drift of the machine affects all sides equally; ratios are taken within a repeat.
Hyperparameters are equal. SAC: 256x256, batch 256, one update per step, all learning rates 3e-4.
DroQ: the same with 20 updates per step, dropout 0.01 and layer norm. CrossQ: critics 1024 wide, an
actor update every third update, learning rates 1e-3. PPO: CleanRL's settings, which are SB3's
defaults (this lab's PPO also normalises observations and rewards; the peers do not). Steps/s of the
lab are summed over seeds. CEM has no peer: it reports decisions/s, where a decision is one action
for every seed, with critics 256 wide and the default search, for 2 and 6 action dimensions.
"""

import argparse
import json
import operator
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENV = "HalfCheetah-v5"
# warm-up steps of the peers; measured steps, by number of seeds
WARM_UP = {"sac": 300, "ppo": 4096, "crossq": 130, "droq": 115}
MEASURED = {"sac": {1: 600, 4: 200, 8: 100}, "ppo": {1: 8192, 4: 4096, 8: 4096},
            "crossq": {1: 90, 4: 30}, "droq": {1: 50, 4: 25}}
TITLES = {"sac": "SAC", "crossq": "CrossQ, critics 1024 wide", "droq": "DroQ, 20 updates a step",
          "cem-2": "CEM, critics 256 wide, 2 action dimensions: a decision",
          "cem-6": "CEM, critics 256 wide, 6 action dimensions: a decision", "ppo": "PPO"}
MODES = {"fp32-eager": "fp32, eager", "bf16-eager": "bf16, eager",
         "fp32-compiled": "fp32, compiled", "bf16-compiled": "bf16, compiled"}
ONE_CORE = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
PEERS = {"sb3": ("Stable-Baselines3", "fp32-eager"), "sbx": ("SBX (jax)", "fp32-compiled")}
EQUAL = {"sac": {"actor_lr": 3e-4, "qf_lr": 3e-4}, "droq": {"actor_lr": 3e-4, "qf_lr": 3e-4}}


def measure_ours(algorithm: str, seeds: int, mode: str) -> float:
    """Steps/s, summed over seeds, in the second half of training, after compilation."""
    sys.path.insert(0, str(ROOT))
    from lab.training.job import Job
    from lab.training.loop import train

    precision, compiled = mode.split("-")
    window = MEASURED[algorithm][seeds]
    config = EQUAL.get(algorithm, {}) | ({} if algorithm == "ppo" else {"learning_starts": 5})
    speeds = []
    train(Job(
        agent_path=str(ROOT / f"agents/{algorithm}.py"), config=config, env_id=ENV,
        seeds=tuple(range(seeds)), steps=2 * window, eval_every=0, log_every=window,
        checkpoint_every=0, eval_episodes=1, compile=compiled == "compiled", precision=precision,
    ), lambda message: speeds.append(message.get("perf/steps_per_s")))
    return [speed for speed in speeds if speed][-1]


def measure_peer(library: str, algorithm: str) -> float:
    """Steps/s of the library's learn() after the warm-up."""
    import gymnasium
    from stable_baselines3.common.callbacks import BaseCallback

    if library == "sb3":
        import stable_baselines3 as peer
        import torch

        torch.set_num_threads(1)
    else:
        import sbx as peer
    env, device = gymnasium.make(ENV), "cpu"
    if algorithm == "ppo":
        model = peer.PPO("MlpPolicy", env, device=device)
    elif algorithm == "crossq":
        model = peer.CrossQ("MlpPolicy", env, learning_starts=100, device=device)
    else:
        settings, network = {"learning_rate": 3e-4}, {"net_arch": [256, 256]}
        if algorithm == "droq":
            settings |= {"gradient_steps": 20, "policy_delay": 20}
            network |= {"dropout_rate": 0.01, "layer_norm": True}
        model = peer.SAC("MlpPolicy", env, batch_size=256, learning_starts=100,
                         policy_kwargs=network, device=device, **settings)
    warm_up, window = WARM_UP[algorithm], MEASURED[algorithm][1]

    class Clock(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == warm_up + 1:  # the update of the previous step is done
                self.start_time = time.perf_counter()
            return True

    clock = Clock()
    model.learn(warm_up + window, callback=clock)
    return (model.num_timesteps - warm_up - 1) / (time.perf_counter() - clock.start_time)


def measure_decisions(actions: int, seeds: int, mode: str) -> float:
    """Decisions/s of CEM while exploring; a decision is one action for every seed."""
    sys.path.insert(0, str(ROOT))
    import torch

    from agents import cem
    from lab.accelerate import Accelerator
    from lab.envs.spec import EnvSpec

    precision, compiled = mode.split("-")
    spec = EnvSpec("bench", 17, actions, (-1.0,) * actions, (1.0,) * actions, None)
    agent = cem.Agent(spec, cem.Config(qf_width=256, learning_starts=1), list(range(seeds)),
                      total_steps=10, accelerate=Accelerator(compiled == "compiled", precision))
    agent.transitions = agent.learning_starts
    obs = torch.randn(200, seeds, 1, 17)
    for x in obs[:20]:
        agent.act(x)
    start_time = time.perf_counter()
    for x in obs:
        agent.act(x)
    return len(obs) / (time.perf_counter() - start_time)


def measure_memory() -> float:
    """Peak MiB of a process with 8 seeds of SAC and 100 000 transitions in each replay buffer."""
    sys.path.insert(0, str(ROOT))
    import torch

    from agents import sac
    from lab.accelerate import prepare_process
    from lab.envs.make import make_envs

    prepare_process()
    seeds, steps = list(range(8)), 100_000
    training = make_envs(ENV, seeds)
    agent = sac.Agent(training.spec, sac.Config(), seeds, total_steps=steps)
    obs = training.reset()
    flags, chunk = torch.rand(8, 1000), obs.expand(8, 1000, -1)
    actions = torch.rand(8, 1000, training.spec.action_dim)
    for _ in range(steps // 1000):  # write every row, so that all pages are resident
        agent.observe(chunk, actions, flags, chunk, flags, flags)
    agent.critic_steps = agent.transitions - agent.learning_starts - 30
    agent.update()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_pinned(script: str, python: str, cores: Sequence[int], environment: dict[str, str],
               *arguments: str) -> float:
    """Run a script of bench/ on these cores -> the last number that it prints."""
    done = subprocess.run(
        [python, script, "--measure", *arguments], capture_output=True, text=True, cwd=ROOT,
        preexec_fn=lambda: os.sched_setaffinity(0, cores), env=os.environ | environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def versions(python: str, packages: list[str]) -> dict[str, str]:
    code = ("import json, sys; from importlib.metadata import version;"
            "print(json.dumps({p: version(p) for p in sys.argv[1:]}))")
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True)
    return json.loads(done.stdout)


def cases(algorithms: list[str]) -> list[tuple[str, ...]]:
    """(algorithm, side, seeds, mode). SB3 has neither DroQ nor CrossQ."""
    modes = [f"{p}-{c}" for c in ("eager", "compiled") for p in ("fp32", "bf16")]
    peers = {"sac": ("sb3", "sbx"), "ppo": ("sb3", "sbx"), "cem-2": (), "cem-6": ()}
    stacks = {"sac": "148", "ppo": "148", "cem-2": "4", "cem-6": "4"}
    return [case for algorithm in algorithms for case in [
        *((algorithm, peer, "1", "fp32") for peer in peers.get(algorithm, ("sbx",))),
        *((algorithm, "lab", n, mode) for n in stacks.get(algorithm, "14") for mode in modes)]]


def summary(result: dict) -> str:
    """The tables of docs/speed.md from the result file: one per algorithm, a column per mode."""
    lines = []
    for algorithm, title in TITLES.items():
        rows: dict[str, dict[str, list[float]]] = {}  # side -> mode -> speeds
        for (name, side, seeds, mode), values in (
                (row["case"], row["steps_per_s"]) for row in result["rows"]):
            if name == algorithm:
                label, mode = PEERS.get(side, (f"lab, {seeds} seed{'s' * (seeds != '1')}", mode))
                rows.setdefault(label, {})[mode] = values
        if not rows:
            continue
        peers = [rows[label][mode] for label, mode in PEERS.values() if label in rows]
        lines += ["", "| " + " | ".join([title, *MODES.values()]) + " |", "|---" * 5 + "|"]
        for label, modes in rows.items():
            ratios = {} if label in dict(PEERS.values()) else {
                mode: ", ".join(f"{median_ratio(values, peer):.2f}" for peer in peers)
                for mode, values in modes.items()}
            cells = [shown(modes[mode], algorithm) if mode in modes else "" for mode in MODES]
            cells = [f"{cell} ({ratios[mode]})" if ratios.get(mode) else cell
                     for mode, cell in zip(MODES, cells, strict=True)]
            lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines[1:]) + "\n"


def median_ratio(values: list[float], others: list[float]) -> float:
    return statistics.median(map(operator.truediv, values, others))


def shown(values: list[float], algorithm: str) -> str:
    """The median: steps/s, or for CEM milliseconds per decision."""
    middle = statistics.median(values)
    if algorithm.startswith("cem"):
        return f"{1000 / middle:.2g} ms"
    return f"{middle:.0f}" if middle >= 50 else f"{middle:.1f}"


def markdown(result: dict) -> str:
    """All cases with their spread, from the result file."""
    lines = ["| algorithm | side | seeds | mode | steps/s (CEM: decisions/s), median (min to max) "
             "| x SB3 | x SBX |",
             "|---|---|---|---|---|---|---|"]
    speeds = {tuple(row["case"]): row["steps_per_s"] for row in result["rows"]}
    for case, values in speeds.items():
        algorithm, side, seeds, mode = case
        peers = [speeds.get((algorithm, peer, "1", "fp32")) for peer in ("sb3", "sbx")]
        ratios = [f"{median_ratio(values, peer):.2f}" if peer else "" for peer in peers]
        digits = 0 if min(values) >= 50 else 1
        low, middle, high = (f"{x:.{digits}f}" for x in (
            min(values), statistics.median(values), max(values)))
        lines.append(f"| {algorithm.upper()} | {side} | {seeds} | {mode} | {middle} "
                     f"({low} to {high}) | {ratios[0]} | {ratios[1]} |")
    return "\n".join(lines) + "\n"


def kept_rows(options: argparse.Namespace, processor: str) -> list[dict]:
    """Rows of the result file for the algorithms that are not measured in this run."""
    if not options.out.exists():
        return []
    result = json.loads(options.out.read_text())
    rows = [row for row in result["rows"] if row["case"][0] not in options.algorithms]
    if rows and result["processor"] != processor:
        raise SystemExit(f"{options.out} was measured on another processor, {result['processor']}: "
                         "measure all algorithms, or choose another --out")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", help="Python of the virtual environment with SB3 and SBX")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--algorithms", nargs="+", default=[*MEASURED, "cem-2", "cem-6"])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/speed.json")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        side, *rest = options.measure
        if side == "memory":
            print(measure_memory())
        elif side == "lab" and rest[0].startswith("cem"):
            print(measure_decisions(int(rest[0][4:]), int(rest[1]), rest[2]))
        elif side == "lab":
            print(measure_ours(rest[0], int(rest[1]), rest[2]))
        else:
            print(measure_peer(side, rest[0]))
        return
    if not options.peers:
        parser.error("--peers is required; `make bench` creates that virtual environment")

    sys.path.insert(0, str(ROOT))
    from lab.training.recorder import processor

    kept = kept_rows(options, processor())
    rows = {case: [] for case in cases(options.algorithms)}
    start_time, total = time.monotonic(), len(rows) * options.repeats
    for repeat in range(options.repeats):
        for number, (algorithm, side, seeds, mode) in enumerate(rows):
            python = sys.executable if side == "lab" else options.peers
            speed = run_pinned(__file__, python, [options.core], ONE_CORE, side, algorithm, seeds,
                               mode)
            rows[algorithm, side, seeds, mode].append(speed)
            done = repeat * len(rows) + number + 1
            left = (time.monotonic() - start_time) / done * (total - done)
            print(f"{done}/{total} {algorithm} {side} {seeds} {mode}: {speed:.0f} steps/s, "
                  f"ETA {left:.0f} s", flush=True)
    memory = run_pinned(__file__, sys.executable, [options.core], ONE_CORE, "memory")
    result = {
        "command": f"python bench/speed.py --peers PYTHON --repeats {options.repeats} "
                   f"--algorithms {' '.join(options.algorithms)} "
                   f"--out bench/results/{options.out.name}",
        "environment": ENV, "repeats": options.repeats, "cores": 1, "processor": processor(),
        "python": platform.python_version(),
        "versions": versions(sys.executable, ["torch", "gymnasium", "mujoco", "numpy"]),
        "peer_versions": versions(options.peers, ["torch", "stable-baselines3", "sbx-rl", "jax",
                                                  "gymnasium", "mujoco", "numpy"]),
        "memory_mib_8_seeds_sac_100k_steps": round(memory),
        "rows": kept + [
            {"case": case, "steps_per_s": [round(v, 1) for v in values]}
            for case, values in rows.items()],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    table = summary(result)
    options.out.with_suffix(".md").write_text(table)
    options.out.with_name(f"{options.out.stem}-spread.md").write_text(markdown(result))
    print(f"{table}\n8 seeds of SAC with 100 000 steps: {memory:.0f} MiB\nwritten: {options.out}")


if __name__ == "__main__":
    main()
