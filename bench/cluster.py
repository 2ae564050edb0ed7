"""How far one driver of a Ray cluster goes: docs/cluster.md.

    .ray-venv/bin/python bench/cluster.py

1. Stub jobs that only send messages, all given at once to a local cluster that runs two at a time.
   Their processes are used again, so that the driver is measured, not the imports.
2. The driver's own work for each message of a sweep: progress and summary.
3. The driver's work for each trial of a study.
4. Eight jobs of SAC on Pendulum-v1, two at once: on the local engine, on two nodes of one CPU.
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
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.tuning import read_space, sample  # noqa: E402
from lab.accelerate import physical_cores  # noqa: E402
from lab.command_line import parse_args  # noqa: E402
from lab.options import Simple, resolve_defaults  # noqa: E402
from lab.train import RunSummary  # noqa: E402
from lab.training.job import Emit, Job, make_jobs  # noqa: E402
from lab.training.loop import train  # noqa: E402
from lab.training.processes import Engine, Processes, run_jobs  # noqa: E402
from lab.training.progress import SweepProgress  # noqa: E402
from lab.training.recorder import versions  # noqa: E402
from lab.tuning import surrogate  # noqa: E402
from lab.tuning.pruner import prune  # noqa: E402
from lab.tuning.trials import Trial  # noqa: E402

JOBS, MESSAGES = (10, 100, 1000), 20  # messages of each job
TRIALS = (100, 500, 1000, 10_000)
SPACE = read_space("Hartmann-6")
REPEATS = 2
ROW = {f"metric/{number}": 1.0 for number in range(12)}
SWEEP = ["--seeds", "8", "--steps", "500", "--batch-size", "64"]


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

    from lab.training.ray_processes import RayProcesses, run_job

    jobs, senders, received, first = jobs_of(count), [], 0, 0.0
    before, cpu, start = memory(), time.process_time(), time.perf_counter()
    with RayProcesses(stub) as pool:
        pool.task = ray.remote(num_cpus=1, max_retries=0)(run_job)
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
            summary = RunSummary(jobs, options)
            with SweepProgress(jobs) as progress:
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


def recorded(count: int) -> list[Trial]:
    """Trials in six dimensions of ten evaluations; every second is pruned after three to seven."""
    rng, trials = np.random.default_rng(0), []
    for number in range(count):
        settings = SPACE.decode(rng.random(SPACE.size))
        last = 3 + number % 5 if number % 2 else 10
        evaluations = {step: [step / 10 * value for value in sample("Hartmann-6", settings, rng)]
                       for step in range(1, last + 1)}
        trials.append(Trial(number, settings, "pruned" if number % 2 else "completed", evaluations))
    return trials


def cpu_seconds(do: Callable[..., Any], *args: Any) -> float:
    start = time.process_time()
    do(*args)
    return time.process_time() - start


def study() -> dict[str, dict[str, float]]:
    """CPU seconds of the driver for one trial after that many: the ask, the ranking when it has
    ended, and the pruner at each of its evaluations."""
    results: dict[str, dict[str, float]] = {}
    for count in TRIALS:
        trials = recorded(count)
        results[str(count)] = {
            "ask": cpu_seconds(surrogate.ask, SPACE, trials, 0),
            "rank": cpu_seconds(surrogate.ranked, SPACE, trials),
            "prune": cpu_seconds(prune, replace(trials[1], state="running"), trials)}
        print(count, "trials:", results[str(count)], flush=True)
    return results


def train_and_tell(job: Job, emit: Emit) -> None:
    train(job, emit)
    emit({"cpu": time.process_time()})  # of its process, with the imports


def sweep() -> list[dict[str, float]]:
    """Eight jobs, two at once, on each engine: seconds, CPU seconds and messages of the jobs, and
    seconds to join the cluster and check its nodes."""
    from ray.cluster_utils import Cluster

    from lab.training.ray_processes import RayProcesses, connected

    node = {"num_cpus": 1, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={
        **node, "num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(**node)
    options, config = parse_args([*SWEEP, "--engine", "ray", "--address", cluster.address])
    assert isinstance(options, Simple)

    def timed(name: str, processes: type[Processes]) -> dict[str, float]:
        told: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as folder:
            jobs = make_jobs(options, config, options.seeds, None)
            jobs = [replace(job, run=folder) for job in jobs]
            start = time.perf_counter()
            assert not run_jobs(jobs, 2, lambda _, message: told.append(message),
                                Engine(2, lambda _: processes(train_and_tell)))
        return {f"{name}_s": time.perf_counter() - start, f"{name}_messages": len(told),
                f"{name}_cpu_s": sum(message.get("cpu", 0) for message in told)}

    results = []
    for _ in range(REPEATS):
        row = timed("local", Processes)
        start = time.perf_counter()
        with connected(options, ROOT):
            row["join_s"] = time.perf_counter() - start
            results.append(row | timed("ray", RayProcesses))
        print(results[-1], flush=True)
    cluster.shutdown()
    return results


PARTS = {"drivers": drivers, "own_work": own_work, "study": study, "sweep": sweep}


def table(head: str, columns: Sequence[str], rows: dict[str, Sequence[str]]) -> list[str]:
    return [f"| {head} | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|",
            *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()), ""]


def markdown(result: dict[str, Any]) -> str:
    jobs, trials = [str(count) for count in JOBS], [str(count) for count in TRIALS]
    drivers, own, study, sweep = (result[part] for part in PARTS)
    cpu = "driver, CPU of a message:"
    lines = table("jobs", jobs, {
        f"{cpu} Ray": [f"{drivers[n]['driver_cpu_ms_per_message']:.2f} ms" for n in jobs],
        f"{cpu} progress and summary": [f"{own[n]:.2f} ms" for n in jobs],
        "job, CPU of a message": [f"{drivers[n]['job_cpu_ms_per_message']:.2f} ms" for n in jobs],
        "driver, memory for the jobs": [f"{drivers[n]['driver_mib']:.0f} MiB" for n in jobs],
        "submitting all jobs": [f"{drivers[n]['give_s']:.2f} s" for n in jobs],
        "first message": [f"{drivers[n]['first_message_s']:.2f} s" for n in jobs],
        "messages a second": [f"{int(n) * (MESSAGES + 1) / drivers[n]['wall_s']:.0f}"
                              for n in jobs]})
    lines += table("recorded trials, half of them pruned", trials, {
        "the next suggestion": [f"{study[n]['ask']:.1f} s" for n in trials],
        "ranking, once a trial": [f"{study[n]['rank']:.1f} s" for n in trials],
        "the pruner, once an evaluation": [f"{1000 * study[n]['prune']:.1f} ms" for n in trials]})
    lines += table("eight jobs, two at once", [f"repeat {n + 1}" for n in range(len(sweep))], {
        "local engine": [f"{row['local_s']:.0f} s, CPU {row['local_cpu_s']:.1f} s"
                         for row in sweep],
        "Ray, two nodes of one CPU": [f"{row['ray_s']:.0f} s, CPU {row['ray_cpu_s']:.1f} s"
                                      for row in sweep],
        "joining the cluster before": [f"{row['join_s']:.1f} s" for row in sweep],
        "messages of a job": [f"{row['ray_messages'] / 8:.0f}" for row in sweep]})
    return "\n".join([*lines, f"{result['versions']['processor']}, {result['cores']} cores, which "
                       "trained other runs meanwhile: CPU times count."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/cluster.json")
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    for part in options.parts:
        result[part] = PARTS[part]()
        result |= {"command": "python bench/cluster.py", "versions": versions(),
                   "cores": physical_cores()}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if set(PARTS) <= set(result):
        options.out.with_suffix(".md").write_text(markdown(result))
        print(markdown(result))


if __name__ == "__main__":
    main()
