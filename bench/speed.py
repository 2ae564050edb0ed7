"""Training speed against Stable-Baselines3, SBX and rl8: whole loops on one core.

    make bench        # or: python bench/speed.py --peers .bench-venv/bin/python
    python bench/speed.py --checkout ../before --algorithms sac --out /tmp/sac.json

Each measurement runs in its own process, pinned to the same core. Seconds are processor time of all
its threads, so that other programs cost little. A repeat runs all measurements once, so drift of
the machine affects all sides equally; ratios are taken within a repeat. The result file is written
after each repeat, and the same command goes on from there if it was cut.
Hyperparameters are equal. SAC: 256x256, batch 256, one update per step, all learning rates 3e-4.
DroQ: the same with 20 updates per step, dropout 0.01 and layer norm. CrossQ: critics 1024 wide, an
actor update every third update, learning rates 1e-3. PPO: CleanRL's settings, which are SB3's
defaults (this lab's PPO also normalises observations and rewards; the peers do not). PPO in torch:
8192 Pendulums as tensors, networks 256 wide, rollouts of 8 steps, 4 epochs of 8 minibatches, as
rl8. BRO with critics 128 wide and CEM with critics 256 wide have no peer. All others step
HalfCheetah-v5. Steps/s of the lab are summed over seeds.

The limit: the steps/s if a step took only the time of its matrix products, at the rate of the
faster library on large ones, and of the environment. The FLOPs are those of acting and of the
updates; rates and environment are measured in each repeat.

CEM's decisions are measured too: decisions/s, where a decision is one action for every seed, with
the default search, for 2 and 6 action dimensions.
"""

import argparse
import dataclasses
import json
import operator
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENV = "HalfCheetah-v5"
TORCH = "ppo-torch"  # PPO on environments in torch
NUM_ENVS, HORIZON, EPOCHS, WIDTH = 8192, 8, 4, 256  # its sizes
ROLLOUT = NUM_ENVS * HORIZON
# warm-up steps of the peers; measured steps, by number of seeds
WARM_UP = {"sac": 300, "ppo": 4096, "crossq": 130, "droq": 115}
MEASURED = {"sac": {1: 600, 4: 200, 8: 100}, "ppo": {1: 8192, 4: 4096, 8: 4096},
            TORCH: {1: ROLLOUT}, "crossq": {1: 90, 4: 30, 8: 15}, "droq": {1: 50, 4: 25, 8: 12},
            "bro": {1: 240, 4: 80, 8: 40}, "cem": {1: 60, 4: 20, 8: 10}}
WARM_UP_WINDOWS = {TORCH: 2}  # PPO learns a step after its rollout is full; others: 1
TITLES = {"sac": "SAC", "crossq": "CrossQ, critics 1024 wide", "droq": "DroQ, 20 updates a step",
          "bro": "BRO, critics 128 wide", "cem": "CEM, critics 256 wide",
          "cem-2": "CEM, critics 256 wide, 2 action dimensions: a decision",
          "cem-6": "CEM, critics 256 wide, 6 action dimensions: a decision", "ppo": "PPO",
          TORCH: "PPO, 8192 environments in torch, 256 wide"}
MODES = {"fp32-eager": "fp32, eager", "bf16-eager": "bf16, eager",
         "fp32-compiled": "fp32, compiled", "bf16-compiled": "bf16, compiled"}
ONE_CORE = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
PEERS = {"sb3": ("Stable-Baselines3", "fp32-eager"), "sbx": ("SBX (jax)", "fp32-compiled"),
         "rl8": ("rl8", "fp32-eager")}
SETTINGS = {
    "sac": {"actor_lr": 3e-4, "qf_lr": 3e-4}, "droq": {"actor_lr": 3e-4, "qf_lr": 3e-4},
    "bro": {"qf_width": 128}, "cem": {"qf_width": 256},
    TORCH: {"width": WIDTH, "num_steps": HORIZON, "num_minibatches": 8, "update_epochs": EPOCHS}}


def job(algorithm: str, seeds: int, mode: str):
    """The training that is measured: windows to compile in, one to measure, and a last step."""
    sys.path.insert(0, str(ROOT))
    from lab.training.job import Job

    precision, compiled = mode.split("-")
    window = MEASURED[algorithm][seeds]
    config = SETTINGS.get(algorithm, {})
    if "ppo" not in algorithm:
        config = config | {"learning_starts": 5}
    return Job(
        agent_path=str(ROOT / f"agents/{algorithm.split('-')[0]}.py"), config=config,
        env_id="torch/Pendulum-v1" if algorithm == TORCH else ENV,
        num_envs=NUM_ENVS if algorithm == TORCH else 1, seeds=tuple(range(seeds)),
        steps=(WARM_UP_WINDOWS.get(algorithm, 1) + 1) * window + 1, eval_every=0, log_every=window,
        checkpoint_every=0, eval_episodes=1, compile=compiled == "compiled", precision=precision)


def measure_ours(algorithm: str, seeds: int, mode: str) -> float:
    """Steps/s, summed over seeds, in the last window, after compilation."""
    measured = job(algorithm, seeds, mode)
    from lab import matmul
    from lab.accelerate import prepare_process
    from lab.training.job import dry_run
    from lab.training.loop import train

    prepare_process()
    if measured.precision == "fp32":
        library = matmul.choose(dry_run(measured)[1])
        measured = dataclasses.replace(measured, fp32_library=library)
    times = []

    def emit(message: dict) -> None:
        if message.get("perf/steps_per_s"):
            times.append(time.process_time())

    train(measured, emit)
    *_, start, end, _ = times  # the last one is after an evaluation
    return seeds * measured.log_every / (end - start)


def measure_rate(precision: str) -> float:
    """FLOP/s of large matrix products with the faster exact library."""
    sys.path.insert(0, str(ROOT))
    import torch

    from lab import matmul

    torch.set_num_threads(1)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    fastest = 0.0
    for n in (256, 512, 1024):
        a, b = torch.randn(2, n, n).to(dtype)
        for library in (matmul.BLAS, matmul.ONEDNN):
            if precision == "fp32" and library == matmul.ONEDNN and not matmul.is_exact(
                    matmul.SQUARE):
                continue
            with matmul.computed_by(library):
                for _ in range(max(5, 2 * 1024**3 // n**3)):
                    start_time = time.process_time()
                    torch.mm(a, b)
                    fastest = max(fastest, 2 * n**3 / (time.process_time() - start_time))
    return fastest


def measure_environment(algorithm: str) -> float:
    """Steps/s of the environment with random actions."""
    sys.path.insert(0, str(ROOT))
    import torch

    from lab.accelerate import prepare_process
    from lab.training.job import make_train_envs

    prepare_process()
    measured = job(algorithm, 1, "fp32-eager")
    envs = make_train_envs(measured)
    envs.reset()
    actions = 2 * torch.rand(200, 1, measured.num_envs, envs.spec.action_dim) - 1
    for x in actions[:20]:
        envs.step(x)
    start_time = time.process_time()
    for x in actions:
        envs.step(x)
    return len(actions) * measured.num_envs / (time.process_time() - start_time)


def count_flops(algorithm: str) -> float:
    """FLOPs of the matrix products of a step of one seed: acting and its share of the updates."""
    measured = job(algorithm, 1, "fp32-eager")
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lab.agent import build_agent
    from lab.training.job import make_train_envs

    envs = make_train_envs(measured)
    N, spec = measured.num_envs, envs.spec
    agent = build_agent(measured.agent_path, measured.config, spec, [0], N, 10**6, "cpu",
                        lambda fn: fn)
    obs, zeros = torch.zeros(1, N, spec.obs_dim), torch.zeros(1, N)
    # a rollout of PPO; else a multiple of every policy delay, after the first updates
    steps, first = (agent.rollout.shape[1], 0) if hasattr(agent, "rollout") else (6, 6)
    total = 0
    for step in range(first + steps):
        agent.observe(obs, agent.act(obs), zeros, obs, zeros, zeros)
        with FlopCounterMode(display=False) as updating:
            agent.update()
        total += updating.get_total_flops() if step >= first else 0
    with FlopCounterMode(display=False) as acting:
        agent.act(obs)
    return (acting.get_total_flops() + total / steps) / N


def measure_rl8() -> float:
    """Steps/s of its second rollout and update."""
    sys.path.insert(0, str(ROOT / "bench"))
    import torch
    from gpu_sides import rl8

    torch.set_num_threads(1)
    side = rl8(NUM_ENVS, "cpu", HORIZON, EPOCHS, WIDTH)
    side.step()
    start_time = time.process_time()
    side.step()
    return side.unit / (time.process_time() - start_time)


def measure_peer(library: str, algorithm: str) -> float:
    """Steps/s of the library's learn() after the warm-up."""
    if library == "rl8":
        return measure_rl8()
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
                self.start_time = time.process_time()
            return True

    clock = Clock()
    model.learn(warm_up + window, callback=clock)
    return (model.num_timesteps - warm_up - 1) / (time.process_time() - clock.start_time)


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
    start_time = time.process_time()
    for x in obs:
        agent.act(x)
    return len(obs) / (time.process_time() - start_time)


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


def run_pinned(script: str | Path, python: str, cores: Sequence[int],
               environment: dict[str, str], *arguments: str) -> float:
    """Run a script of some bench/ on these cores -> the last number that it prints."""
    root = Path(script).resolve().parents[1]
    done = subprocess.run(
        [python, script, "--measure", *arguments], capture_output=True, text=True, cwd=root,
        preexec_fn=lambda: os.sched_setaffinity(0, cores), env=os.environ | environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def versions(python: str, packages: list[str]) -> dict[str, str]:
    code = ("import json, sys; from importlib.metadata import version;"
            "print(json.dumps({p: version(p) for p in sys.argv[1:]}))")
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True)
    return json.loads(done.stdout)


def cases(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """(algorithm, side, seeds, mode). SB3 has neither DroQ nor CrossQ."""
    peers = {"sac": ("sb3", "sbx"), "ppo": ("sb3", "sbx"), "crossq": ("sbx",), "droq": ("sbx",),
             TORCH: ("rl8",)}
    found = []
    for name in options.algorithms:
        found += [(name, peer, "1", "fp32") for peer in peers.get(name, ()) if options.peers]
        stacks = [n for n in map(str, MEASURED.get(name, [4])) if n in (options.seeds or n)]
        found += [(name, side, n, mode) for n in stacks for mode in options.modes
                  for side in (["checkout", "lab"] if options.checkout else ["lab"])]
    return found


def summary(result: dict) -> str:
    """The tables of docs/speed.md from the result file: one per algorithm, a column per mode, and
    one for the share of the limit where that was measured."""
    lines = []
    for algorithm, title in TITLES.items():
        rows: dict[str, dict[str, list[float]]] = {}  # side -> mode -> speeds
        limits: dict[str, list[float]] = {}  # mode -> steps/s
        for row in result["rows"]:
            name, side, seeds, mode = row["case"]
            if name == algorithm:
                label, mode = PEERS.get(side, (f"{side}, {seeds} seed{'s' * (seeds != '1')}", mode))
                rows.setdefault(label, {})[mode] = row["steps_per_s"]
                if "limit" in row:
                    limits[mode] = row["limit"]
        if not rows:
            continue
        peers = [rows[label][mode] for label, mode in PEERS.values() if label in rows]
        columns = [mode for mode in MODES if any(mode in modes for modes in rows.values())]
        headings = [title, *(MODES[mode] for mode in columns)]
        headings += ["of the limit: fp32, bf16"] * bool(limits)
        lines += ["", "| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
        for label, modes in rows.items():
            ratios = {} if label in dict(PEERS.values()) else {
                mode: ", ".join(f"{median_ratio(values, peer):.2f}" for peer in peers)
                for mode, values in modes.items()}
            cells = [shown(modes[mode], algorithm) if mode in modes else "" for mode in columns]
            cells = [f"{cell} ({ratios[mode]})" if ratios.get(mode) else cell
                     for mode, cell in zip(columns, cells, strict=True)]
            if limits:
                cells.append(shares(modes, limits))
            lines.append("| " + " | ".join([label, *cells]) + " |")
        if limits:
            cells = [shown(limits[mode], algorithm) if mode in limits else "" for mode in columns]
            lines.append("| " + " | ".join(["the limit", *cells, ""]) + " |")
    return "\n".join(lines[1:]) + "\n"


def shares(modes: dict[str, list[float]], limits: dict[str, list[float]]) -> str:
    """The share of the limit that the faster mode of each precision reaches."""
    best = {}
    for mode, values in modes.items():
        precision = mode.split("-")[0]
        best[precision] = max(best.get(precision, 0.0), median_ratio(values, limits[mode]))
    return ", ".join(f"{best[name]:.0%}" for name in ("fp32", "bf16") if name in best)


def median_ratio(values: list[float], others: list[float]) -> float:
    return statistics.median(map(operator.truediv, values, others))


def shown(values: list[float], algorithm: str) -> str:
    """The median: steps/s, or for a decision of CEM milliseconds."""
    middle = statistics.median(values)
    if algorithm.startswith("cem-"):
        return f"{1000 / middle:.2g} ms"
    return f"{middle:.0f}" if middle >= 50 else f"{middle:.1f}"


def markdown(result: dict) -> str:
    """All cases with their spread, from the result file."""
    rows = {tuple(row["case"]): row for row in result["rows"]}
    sides = {side for _, side, *_ in rows}
    peers = {"sb3": "x SB3", "sbx": "x SBX"} | ({"rl8": "x rl8"} if "rl8" in sides else {})
    limited = any("limit" in row for row in result["rows"])
    headings = ["algorithm", "side", "seeds", "mode",
                "steps/s (cem-2, cem-6: decisions/s), median (min to max)", *peers.values()]
    headings += ["of the limit"] * limited
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for (algorithm, side, seeds, mode), row in rows.items():
        values = row["steps_per_s"]
        digits = 0 if min(values) >= 50 else 1
        low, middle, high = (f"{x:.{digits}f}" for x in (
            min(values), statistics.median(values), max(values)))
        cells = [algorithm.upper(), side, seeds, mode, f"{middle} ({low} to {high})"]
        for peer in peers:
            theirs = rows.get((algorithm, peer, "1", "fp32"))
            cells.append(f"{median_ratio(values, theirs['steps_per_s']):.2f}" if theirs else "")
        if limited:
            share = median_ratio(values, row["limit"]) if "limit" in row else None
            cells.append("" if share is None else f"{share:.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def kept_rows(result: dict, options: argparse.Namespace, processor: str) -> list[dict]:
    """Rows of the result file for the algorithms that are not measured in this run."""
    rows = [row for row in result.get("rows", []) if row["case"][0] not in options.algorithms]
    if rows and result["processor"] != processor:
        raise SystemExit(f"{options.out} was measured on another processor, {result['processor']}: "
                         "measure all algorithms, or choose another --out")
    return rows


def begun_rows(result: dict, options: argparse.Namespace, setting: dict
               ) -> dict[tuple[str, ...], dict]:
    """Rows of the result file, if the same measurement was cut after some of its repeats."""
    if result | setting != result:
        return {}
    rows = {tuple(row["case"]): row for row in result["rows"]}
    rows = {case: rows[case] for case in cases(options)}
    return rows if repeats_done(rows) < options.repeats else {}


def repeats_done(rows: dict[tuple[str, ...], dict]) -> int:
    return min(len(row["steps_per_s"]) for row in rows.values())


def measured_with(options: argparse.Namespace) -> dict:
    """What must be equal for two repeats to belong to one result."""
    sys.path.insert(0, str(ROOT))
    from lab.training.recorder import processor

    peers = ["torch", "stable-baselines3", "sbx-rl", "rl8", "jax", "gymnasium", "mujoco", "numpy"]
    return {
        "command": shlex.join(["python", "bench/speed.py", *map(shortened, sys.argv[1:])]),
        "environment": ENV, "cores": 1, "processor": processor(),
        "python": platform.python_version(),
        "versions": versions(sys.executable, ["torch", "gymnasium", "mujoco", "numpy"]),
        "peer_versions": versions(options.peers, peers) if options.peers else {},
    }


def measure(side: str, *rest: str) -> float:
    """What a process of its own measures."""
    if side == "memory":
        return measure_memory()
    if side == "rate":
        return measure_rate(*rest)
    if side == "environment":
        return measure_environment(*rest)
    if side == "flops":
        return count_flops(*rest)
    if side != "lab":
        return measure_peer(side, rest[0])
    algorithm, seeds, mode = rest
    if algorithm.startswith("cem-"):
        return measure_decisions(int(algorithm[4:]), int(seeds), mode)
    return measure_ours(algorithm, int(seeds), mode)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", help="Python of the virtual environment with SB3, SBX and rl8")
    parser.add_argument("--checkout", type=Path, help="another checkout, measured beside this one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--algorithms", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--seeds", nargs="+", help="only these numbers of seeds")
    parser.add_argument("--modes", nargs="+", choices=MODES,
                        default=[mode for mode in MODES if mode != "bf16-eager"])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/speed.json")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.measure and not options.peers and not options.checkout:
        parser.error("--peers is required; `make bench` creates that virtual environment")
    return options


def main() -> None:
    options = read_options()
    if options.measure:
        print(measure(*options.measure))
        return
    setting = measured_with(options)
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    kept = kept_rows(before, options, setting["processor"])
    rows = begun_rows(before, options, setting) or {
        case: {"steps_per_s": [], "limit": []} for case in cases(options)}
    repeats = options.repeats - repeats_done(rows)
    if repeats < options.repeats:
        print(f"{repeats} of {options.repeats} repeats are left", flush=True)
    limited = [name for name in options.algorithms if name in MEASURED]

    def pinned(*arguments: str, script: str | Path = __file__, python: str = sys.executable
               ) -> float:
        return run_pinned(script, python, [options.core], ONE_CORE, *arguments)

    flops = {name: pinned("flops", name) for name in limited}
    memory = pinned("memory")
    start_time, total = time.monotonic(), len(rows) * repeats
    for repeat in range(repeats):
        rates = {precision: pinned("rate", precision) for precision in ("fp32", "bf16")}
        steps = {name: pinned("environment", name) for name in limited}
        for number, ((algorithm, side, seeds, mode), row) in enumerate(rows.items()):
            if side == "checkout":
                script = options.checkout.resolve() / "bench/speed.py"
                speed = pinned("lab", algorithm, seeds, mode, script=script)
            else:
                python = sys.executable if side == "lab" else options.peers
                speed = pinned(side, algorithm, seeds, mode, python=python)
            row["steps_per_s"].append(round(speed, 1))
            if algorithm in limited:
                rate = rates[mode.split("-")[0]]
                row["limit"].append(round(1 / (flops[algorithm] / rate + 1 / steps[algorithm]), 1))
            done = repeat * len(rows) + number + 1
            left = (time.monotonic() - start_time) / done * (total - done)
            print(f"{done}/{total} {algorithm} {side} {seeds} {mode}: {speed:.0f} steps/s, "
                  f"ETA {left:.0f} s", flush=True)
        write(options, setting, kept, rows, flops, memory)
    print(f"{options.out.with_suffix('.md').read_text()}\nwritten: {options.out}")


def write(options: argparse.Namespace, setting: dict, kept: list[dict], rows: dict,
          flops: dict[str, float], memory: float) -> None:
    """Write the result file and its tables, after each repeat: a cut loses only the rest."""
    result = setting | {
        "repeats": repeats_done(rows), "memory_mib_8_seeds_sac_100k_steps": round(memory),
        "flops_per_step": flops,
        "rows": kept + [{"case": case} | {name: values for name, values in row.items() if values}
                        for case, row in rows.items()],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(summary(result))
    options.out.with_name(f"{options.out.stem}-spread.md").write_text(markdown(result))


def shortened(argument: str) -> str:
    """A path without its folders, which are this machine's."""
    return Path(argument).name if os.sep in argument else argument


if __name__ == "__main__":
    main()
