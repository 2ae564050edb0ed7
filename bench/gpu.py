"""GPU benchmarks, the most important first. Results are written as soon as they are measured.

    python bench/gpu.py --minutes 9 --out DIR              writes DIR/gpu.json and DIR/gpu.md
    python bench/gpu.py --device cpu --minutes 1           a smoke test: small and eager
    python bench/gpu.py --minutes 4 --out DIR --only sac envs

Sections:
tests       the CUDA tests
sac         updates/s of stacked SAC, against one seed without this lab
envs        environments in torch, PPO on them, and rl8's PPO on the same Pendulum
learning    32 seeds on HalfCheetah-v4
quadrotor   PPO on torch/Quadrotor-v0
leanrl      a plain loop of SAC beside LeanRL's way, a CUDA graph

Time that a section does not use goes to the later ones. An error is recorded in the results and
does not stop the other measurements.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from gpu_sides import Side, one_seed, ppo, rl8, sac, stepping  # noqa: E402

from lab.training.recorder import read_metrics, versions  # noqa: E402

SHARES = {"tests": 0.2, "sac": 0.28, "envs": 0.18, "learning": 0.2, "quadrotor": 0.1,
          "leanrl": 0.04}
MOST_REPEATS = 5
LAST_BUILD = 0.6  # share of a section's time, after which nothing new is built
GRACE = 20.0  # seconds that a section may exceed its time; a program gets half to stop


class OutOfTime(BaseException):
    """A section exceeded its hard limit. A BaseException, so that a compiler does not catch it."""


class Results:
    """Entries by name: unit, repeats, facts, error. Every change rewrites the files."""

    def __init__(self, out: Path, device: str, minutes: float, missing: list[str]):
        self.out, self.start_time, self.entries = out, time.monotonic(), {}
        self.head = {
            "command": " ".join(["python", "bench/gpu.py", *sys.argv[1:]]), "minutes": minutes,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "cores": os.cpu_count(), "missing": missing, "versions": versions()}
        out.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.start_time:6.1f} s  {text}", flush=True)

    def add(self, name: str, unit: str = "", repeat: float | None = None, **facts: Any) -> None:
        entry = self.entries.setdefault(name, {"unit": unit, "repeats": []})
        if repeat is not None:
            entry["repeats"].append(float(f"{repeat:.5g}"))
        entry |= facts
        self.say(f"{name}: " + (f"{repeat:,.0f} {unit}" if repeat is not None else str(facts)))
        content = {**self.head, "seconds": round(time.monotonic() - self.start_time, 1),
                 "results": self.entries}
        replace(self.out / "gpu.json", json.dumps(content, indent=1) + "\n")
        replace(self.out / "gpu.md", table(self.entries))

    @contextlib.contextmanager
    def errors_of(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            self.add(name, error=f"{type(error).__name__}: {lines[0]}"[:300])


def replace(path: Path, text: str) -> None:
    """Write atomically."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


@contextlib.contextmanager
def hard_limit(seconds: float) -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rate(side: Side, device: str, seconds: float) -> tuple[float, float]:
    """-> units per second, and the share of time in which the host was busy. A share near 1 means
    that kernel launches are the bottleneck, not the device."""
    count, issued, start_time = 0, 0.0, time.perf_counter()
    while time.perf_counter() - start_time < seconds:
        start = time.perf_counter()
        for _ in range(side.chunk):
            side.step()
        issued += time.perf_counter() - start
        wait(device)
        count += side.chunk
    spent = time.perf_counter() - start_time
    return count * side.unit / spent, issued / spent


def in_turn(results: Results, sides: dict[str, Callable[[], Side]], unit: str, device: str,
            seconds: float, end: float) -> None:
    """Build and measure each side; then repeat in rounds over all sides, so that drift of the
    machine affects them equally."""
    built: dict[str, Side] = {}
    last_build = time.monotonic() + LAST_BUILD * (end - time.monotonic())

    def measure(name: str, **facts: Any) -> None:
        speed, host = rate(built[name], device, seconds)
        facts |= {"host_share": round(host, 3)}
        if "bytes" in built[name].facts:
            facts["GB_per_s"] = round(speed * built[name].facts["bytes"] / 1e9, 1)
        results.add(name, unit, speed, **facts)

    for name, build in sides.items():
        if time.monotonic() > last_build:
            results.add(name, unit, error="not started: no time left")
            continue
        with results.errors_of(name):
            before, start_time = allocated(), time.monotonic()
            side = build()
            for _ in range(side.warm):
                side.step()
            wait(device)
            built[name] = side
            facts = {"build_s": round(time.monotonic() - start_time, 1)}
            if device == "cuda":
                facts["memory_GB"] = round(
                    (torch.cuda.max_memory_allocated() - before) / 1e9, 3)
            measure(name, **facts)
    for _ in range(MOST_REPEATS - 1):
        for name in built:
            if time.monotonic() > end - seconds:
                return
            with results.errors_of(name):
                measure(name)


def allocated() -> int:
    """Bytes allocated on the GPU. Also resets the peak."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def sac_section(results: Results, device: str, end: float) -> None:
    cuda = device == "cuda"
    sizes, most, seconds = ((1, 8, 32, 128), 32, 1.0) if cuda else ((1, 2), 2, 0.2)
    sides: dict[str, Callable[[], Side]] = {
        "SAC, plain loop": lambda: one_seed(device, False, cuda),
        f"SAC, bf16, S={most}": lambda: sac("bf16", most, device)}
    order = [("bf16", s) for s in reversed(sizes)]
    order += [(kind, most) for kind in ("eager", "graphs", "compiled")]
    order += [(kind, s) for s in reversed(sizes) for kind in ("eager", "graphs", "compiled")]
    for kind, seeds in order:
        sides.setdefault(f"SAC, {kind}, S={seeds}", lambda k=kind, s=seeds: sac(k, s, device))
    in_turn(results, sides, "updates/s", device, seconds, end)


def leanrl_section(results: Results, device: str, end: float) -> None:
    """Runs last: on an H100 with torch 2.11, capturing LeanRL's CUDA graph failed, and afterwards
    the process could not capture any other graph."""
    cuda = device == "cuda"
    in_turn(results, {"SAC, plain loop, beside LeanRL's way": lambda: one_seed(device, False, cuda),
                      "SAC, LeanRL's way": lambda: one_seed(device, True, cuda)},
            "updates/s", device, 1.0 if cuda else 0.2, end)


def envs_section(results: Results, device: str, end: float) -> None:
    cuda = device == "cuda"
    seeds, sizes, seconds = (8, (4096, 32768, 131072), 1.0) if cuda else (2, (8, 16, 32), 0.2)
    small, middle, large = sizes
    sides: dict[str, Callable[[], Side]] = {}
    for n in sizes:
        sides[f"torch/Pendulum-v1, {seeds} x {n}"] = lambda n=n: stepping(
            "Pendulum-v1", seeds, n, device)
    ppos = [("bf16", seeds, small), ("bf16", seeds, middle), ("graphs", seeds, small),
            ("bf16", 1, seeds * small), ("bf16", seeds, large)]
    for place, (kind, s, n) in enumerate(ppos):
        sides[f"PPO, {kind}, {s} x {n}"] = lambda k=kind, s=s, n=n: ppo(k, s, n, device)
        if place < 2:
            sides[f"rl8's PPO, 1 x {s * n}"] = lambda n=s * n: rl8(n, device)
    for n in (small, middle):
        sides[f"torch/Quadrotor-v0, {seeds} x {n}"] = lambda n=n: stepping(
            "Quadrotor-v0", seeds, n, device)
    in_turn(results, sides, "steps/s", device, seconds, end)


# Sections that run subprocesses: tests and training


class Program:
    """A subprocess with a time limit: SIGINT, then SIGKILL for its process group."""

    def __init__(self, command: list[str], log: Path):
        self.command, self.log, self.start_time = command, log, time.monotonic()
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})

    def end(self, deadline: float, grace: float = GRACE / 2) -> dict[str, Any]:
        """Wait until `deadline`, then `grace` seconds after SIGINT -> how it ended."""
        try:
            self.process.wait(max(0.1, deadline - time.monotonic()))
            how = f"exit code {self.process.returncode}"
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            how = "stopped at its time"
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace)
        self.kill()
        return {"command": " ".join(self.command), "end": how,
                "seconds": round(time.monotonic() - self.start_time, 1)}

    def kill(self) -> None:
        """Kill the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def tests_section(results: Results, device: str, end: float) -> None:
    command = ["-m", "pytest", "-k", "cuda or gpu", "--ignore", "tests/test_gpu_bench.py",
               "--ignore", "tests/test_cuda_path.py", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "4", "--dist", "worksteal"]
    log = results.out / "tests.log"
    program = Program(command, log)
    try:
        facts = program.end(end)
    finally:
        program.kill()
    lines = log.read_text().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    results.add("tests", **facts, summary=lines[-1] if lines else "", failed=failed)


def train(results: Results, device: str, end: float, runs: dict[str, list[str]]) -> None:
    """Train the runs in parallel until `end`; add mean evaluation returns and training steps/s."""
    on_gpu = ["--cuda", "--compile", "--precision", "bf16"] if device == "cuda" else []
    last = end - min(5.0, 0.1 * (end - time.monotonic()))
    programs: dict[str, Program] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for name, command in runs.items():
            slug = name.split(",")[0].lower()
            programs[name] = Program(
                [*command, *on_gpu, "--log", "--name", slug, "--runs", folder,
                 "--checkpoint-every", "0"], results.out / f"{slug}.log")
            stack.callback(programs[name].kill)
        for name, program in programs.items():
            facts = program.end(last, 2.0)  # metrics are on disk; the checkpoint is not needed
            facts["command"] = facts["command"].replace(folder, "RUNS")
            slug = name.split(",")[0].lower()
            results.add(name, "steps/s", **facts | read_run(Path(folder), slug))


def read_run(folder: Path, slug: str) -> dict[str, Any]:
    """-> the curve, rows of [steps per seed, seconds, mean return, seeds], and steps/s in all."""
    seeds = [read_metrics(path) for path in folder.glob(f"{slug}-*/*/*/seed_*/metrics.jsonl")]
    rows = [row for seed in seeds for row in seed]
    if not rows:
        return {"error": "no row of metrics"}
    start_time, curve = min(row["wall_time"] for row in rows), []
    for step in sorted({row["step"] for row in rows if "return/eval" in row}):
        of_step = [row for row in rows if row["step"] == step and "return/eval" in row]
        curve.append([step, round(max(row["wall_time"] for row in of_step) - start_time, 1),
                      round(statistics.fmean(row["return/eval"] for row in of_step), 2),
                      len(of_step)])
    speeds = [row["perf/steps_per_s"] for row in seeds[0] if row.get("perf/updates_per_s")]
    return {"curve": curve, "repeats": [round(speed) for speed in speeds[-5:]],
            "last_step": max(row["step"] for row in rows)}


def learning_section(results: Results, device: str, end: float) -> None:
    """A stack of 32 seeds per agent; each agent's environments get half of the cores."""
    cores = len(os.sched_getaffinity(0))
    size = ["--seeds", "32", "--steps", "100_000", "--eval-every", "5_000", "--log-every", "1_000"]
    if device == "cpu":
        size = ["--seeds", "2", "--steps", "200", "--eval-every", "100", "--log-every", "50",
                "--batch-size", "16"]
    shared = ["--env", "HalfCheetah-v4", "--num-envs", "1", "--backend", "workers", "--workers",
              str(max(1, cores // 2)), *size, "--eval-episodes", "1"]
    train(results, device, end, {
        "SAC, HalfCheetah-v4": ["learn_vectorised.py", "agents/sac.py", *shared],
        "XQC, HalfCheetah-v4": ["learn_vectorised.py", "agents/xqc.py", *shared]})


def quadrotor_section(results: Results, device: str, end: float) -> None:
    size = ["--seeds", "4", "--num-envs", "4096", "--steps", "50_000_000",
            "--eval-every", "2_500_000", "--log-every", "500_000"]
    if device == "cpu":
        size = ["--seeds", "2", "--num-envs", "16", "--steps", "2048", "--eval-every", "1024",
                "--log-every", "512"]
    train(results, device, end, {"PPO, torch/Quadrotor-v0": [
        "learn_vectorised.py", "agents/ppo.py", "--env", "torch/Quadrotor-v0", *size,
        "--num-steps", "32", "--num-minibatches", "8", "--update-epochs", "4", "--lr", "1e-3",
        "--eval-episodes", "16"]})


SECTIONS = {"tests": tests_section, "sac": sac_section, "envs": envs_section,
            "learning": learning_section, "quadrotor": quadrotor_section, "leanrl": leanrl_section}


def table(entries: dict[str, Any]) -> str:
    """Markdown of all results and the ratios of interest."""
    medians = {name: statistics.median(entry["repeats"])
               for name, entry in entries.items() if entry["repeats"]}
    lines = ["| measurement | median | lowest to highest | repeats | remarks |",
             "|---|---|---|---|---|"]
    for name, entry in entries.items():
        numbers, facts = entry["repeats"], []
        for key in ("host_share", "GB_per_s", "memory_GB", "build_s", "last_step", "summary",
                    "end", "error"):
            facts += [f"{key} {entry[key]}"] if key in entry else []
        facts += [f"return {entry['curve'][-1][2]}"] if entry.get("curve") else []
        cells = [f"{medians[name]:,.0f} {entry['unit']}",
                 f"{min(numbers):,.0f} to {max(numbers):,.0f}"] if numbers else ["", ""]
        lines.append("| " + " | ".join([name, *cells, str(len(numbers)), "; ".join(facts)]) + " |")
    lines += ["", "| ratio | |", "|---|---|"]
    peers = [name for name in ("SAC, plain loop", "SAC, LeanRL's way") if name in medians]
    bounds = [(over, under) for over in medians for under in peers if over.startswith("SAC, bf16")]
    bounds += [(over, under) for over in medians for under in medians
               if over.startswith("PPO, ") and under.startswith("rl8")
               and instances(over) == instances(under)]
    lines += [f"| {over} / {under} | {medians[over] / medians[under]:.1f} |"
              for over, under in bounds]
    return "\n".join(lines) + "\n"


def instances(name: str) -> int | None:
    """Number of environments of a name that ends in "8 x 4096"."""
    first, cross, second = name.split(", ")[-1].partition(" x ")
    return int(first) * int(second) if cross else None


def missing(device: str) -> list[str]:
    """Packages and versions of the tested GPU setup that are not installed here."""
    found = []
    if sys.version_info[:2] != (3, 12):
        found.append("Python 3.12 (this is {}.{})".format(*sys.version_info[:2]))
    if not torch.__version__.startswith("2.11"):
        found.append(f"torch 2.11 (this is {torch.__version__})")
    for package in ("gymnasium", "mujoco", "tensorboard", "pytest", "xdist", "rl8", "torchrl",
                    "tensordict"):
        if importlib.util.find_spec(package) is None:
            found.append(package)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0, help="time budget of all sections")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; --device cpu is a smoke test")
    torch.set_num_threads(1)
    # compile each size separately, and allow for many sizes
    torch._dynamo.config.automatic_dynamic_shapes = False
    torch._dynamo.config.recompile_limit = 64
    absent = missing(options.device)
    results = Results(options.out, options.device, options.minutes, absent)
    results.say("missing: " + (", ".join(absent) or "nothing"))
    last = results.start_time + 60 * options.minutes
    sections = [name for name in SECTIONS if name in options.only]
    for place, name in enumerate(sections):
        share = SHARES[name] / sum(SHARES[later] for later in sections[place:])
        seconds = share * (last - time.monotonic())
        results.say(f"{name}: {seconds:.0f} s")
        try:
            with results.errors_of(name), hard_limit(seconds + GRACE):
                SECTIONS[name](results, options.device, time.monotonic() + seconds)
        except OutOfTime:
            results.add(name, error="stopped: exceeded its hard limit")
        torch._dynamo.reset()
        if options.device == "cuda":
            torch.cuda.empty_cache()
    results.say("end")
    print(table(results.entries))


if __name__ == "__main__":
    main()
