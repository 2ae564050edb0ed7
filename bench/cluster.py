"""How far one driver of a Ray cluster goes: docs/cluster.md.

    .ray-venv/bin/python bench/cluster.py

1. Stub jobs that only send messages, all given at once to a local cluster that runs two at a time.
   Their processes are used again, so that the driver is measured, not the imports.
2. The driver's own work for each message of a sweep: progress and summary.
3. The surrogate's ask, with and without its limit on points.
4. A sweep of eight seeds on two nodes of one CPU, and the same on the local engine.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.tuning import time_of_an_ask  # noqa: E402
from lab import train  # noqa: E402
from lab.options import Simple, parse_args, resolve_defaults  # noqa: E402
from lab.training.job import Emit, Job, make_jobs  # noqa: E402
from lab.training.recorder import versions  # noqa: E402
from lab.tuning import surrogate  # noqa: E402

JOBS, MESSAGES = (10, 100, 1000), 20  # messages of each job
TRIALS = (100, 500, 1000)
ROW = {f"metric/{number}": 1.0 for number in range(12)}
SWEEP = ["--env", "Pendulum-v1", "--seeds", "8", "--steps", "2_000", "--processes", "2",
         "--actor-width", "64", "--qf-width", "64", "--batch-size", "64", "--log"]


def stub(job: Job, emit: Emit) -> None:
    start = time.process_time()
    for step in range(1, MESSAGES + 1):
        emit(message(job, step))
    emit({"step": MESSAGES, "cpu": (time.process_time() - start) / MESSAGES})


def message(job: Job, step: int) -> dict[str, Any]:
    """As a row of metrics."""
    return {"step": step, "rows": {seed: dict(ROW) for seed in job.seeds},
            "perf/steps_per_s": 1.0, "perf/updates_per_s": 1.0}


def memory() -> float:
    """MiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def jobs_of(count: int) -> list[Job]:
    options, config = parse_args(["--seeds", str(count), "--steps", str(MESSAGES)])
    return make_jobs(resolve_defaults(options), config, count, None)


def handle(count: int) -> dict[str, float]:
    """The driver of that many stub jobs."""
    import ray

    from lab.training.ray_processes import RayProcesses

    jobs, senders, received, first = jobs_of(count), [], 0, 0.0
    before, cpu, start = memory(), time.process_time(), time.perf_counter()
    with RayProcesses(stub) as pool:
        pool.task = pool.task.options(max_calls=0)
        for key, job in enumerate(jobs):
            pool.start(key)
            pool.give(key, job)
        given = time.perf_counter() - start
        while pool.running:
            for _, told in pool.receive():
                if isinstance(told, dict):
                    first = first or time.perf_counter() - start
                    received += 1
                    senders += [told["cpu"]] if "cpu" in told else []
        wall, spent = time.perf_counter() - start, time.process_time() - cpu
    assert received == count * (MESSAGES + 1) and ray.is_initialized()
    return {"give_s": given, "first_message_s": first, "wall_s": wall,
            "driver_cpu_ms_per_message": 1000 * spent / received,
            "job_cpu_ms_per_message": 1000 * statistics.fmean(senders),
            "driver_mib": memory() - before}


def drivers() -> dict[str, dict[str, float]]:
    from lab.training.ray_processes import connected

    options, _ = parse_args(["--engine", "ray"])
    assert isinstance(options, Simple)
    os.environ.pop("RAY_ADDRESS", None)
    results = {}
    with connected(options, None):
        handle(2)  # starts the processes
        for count in JOBS:
            results[str(count)] = handle(count)
            print(count, "jobs:", results[str(count)], flush=True)
    return results


def own_work() -> dict[str, float]:
    """CPU ms of a message in progress and summary, in a sweep of so many jobs of one seed, each of
    which tells one row with an evaluation and nine without."""
    results = {}
    for count in JOBS:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            options, config = parse_args(["--seeds", str(count), "--steps", str(MESSAGES)])
            jobs = make_jobs(resolve_defaults(options), config, count, Path(folder))
            row = json.dumps({"step": 1, "return/train": 0.0, "return/eval": 0.0, **ROW})
            for job in jobs:
                path = Path(job.group or "", f"seed_{job.seeds[0]}/metrics.jsonl")
                path.parent.mkdir(parents=True)
                path.write_text(100 * f"{row}\n")
            summary = train.RunSummary(jobs, options)
            with train.SweepProgress(jobs) as progress:
                start = time.process_time()
                for step in range(1, 11):
                    for index, job in enumerate(jobs):
                        told = message(job, step)
                        told["rows"][job.seeds[0]] |= {"return/train": 0.0} | (
                            {"return/eval": 0.0} if step == 10 else {})
                        progress.update(index, told)
                        summary.receive(job, told)
                results[str(count)] = 1000 * (time.process_time() - start) / count / 10
        print(count, "jobs, own work:", results[str(count)], flush=True)
    return results


def asks() -> dict[str, dict[str, float]]:
    """CPU seconds."""
    limit, results = surrogate.POINTS, {}
    for name, points in (("256 points", limit), ("all points", 10**9)):
        surrogate.POINTS = points
        results[name] = {}
        for trials in TRIALS:
            results[name][str(trials)] = statistics.median(time_of_an_ask(trials, 1))
            print(name, trials, "trials:", results[name][str(trials)], flush=True)
    surrogate.POINTS = limit
    return results


def sweep(repeats: int) -> dict[str, list[float]]:
    """Seconds of the local engine, of Ray on two nodes, and of joining and checking them."""
    from ray.cluster_utils import Cluster

    from lab.training.ray_processes import connected

    node = {"num_cpus": 1, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={
        **node, "num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(**node)
    on = ["--engine", "ray", "--address", cluster.address]
    seconds: dict[str, list[float]] = {"local": [], "ray": [], "start": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for engine, flags in (("local", []), ("ray", on)):
                start = time.perf_counter()
                assert train.run([*SWEEP, *flags, "--runs", folder]) == 0
                seconds[engine].append(time.perf_counter() - start)
            options, _ = parse_args(on)
            assert isinstance(options, Simple)
            start = time.perf_counter()
            with connected(options, Path(folder)):
                seconds["start"].append(time.perf_counter() - start)
    cluster.shutdown()
    print(seconds, flush=True)
    return seconds


PARTS = {"drivers": drivers, "own_work": own_work, "asks": asks, "sweep": lambda: sweep(3)}


def markdown(result: dict[str, Any]) -> str:
    jobs = [str(count) for count in JOBS]
    drivers, own, asks = result["drivers"], result["own_work"], result["asks"]
    rows = [
        ("driver, CPU of a message: Ray", [f"{drivers[n]['driver_cpu_ms_per_message']:.2f} ms"
                                           for n in jobs]),
        ("driver, CPU of a message: progress and summary", [f"{own[n]:.2f} ms" for n in jobs]),
        ("job, CPU of a message", [f"{drivers[n]['job_cpu_ms_per_message']:.2f} ms" for n in jobs]),
        ("driver, memory for them", [f"{drivers[n]['driver_mib']:.0f} MiB" for n in jobs]),
        ("giving all of them", [f"{drivers[n]['give_s']:.2f} s" for n in jobs])]
    lines = ["| jobs at once | " + " | ".join(jobs) + " |", "|---" * (1 + len(jobs)) + "|"]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows]
    lines += ["", "| recorded trials | " + " | ".join(map(str, TRIALS)) + " |",
              "|---" * (1 + len(TRIALS)) + "|"]
    lines += [f"| an ask, {name} | " + " | ".join(
        f"{asks[name][str(n)]:.1f} s" for n in TRIALS) + " |" for name in asks]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/cluster.json")
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts:
        result[part] = PARTS[part]()
        result |= {"command": "python bench/cluster.py", "versions": versions()}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if set(PARTS) <= set(result):
        options.out.with_suffix(".md").write_text(markdown(result))
        print(markdown(result))


if __name__ == "__main__":
    main()
