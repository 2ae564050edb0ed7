"""The candidates of --plan: generate, measure and rank the ways to run a command here."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from lab.accelerate import can_compile, physical_cores, prepare_process
from lab.command_line import given_flags, read_line, with_yaml
from lab.envs.base import is_torch
from lab.envs.make import choose_backend
from lab.errors import UserError
from lab.matmul import Products
from lab.options import SCRIPTS, Options, Simple, Vectorised, resolve_defaults
from lab.plan import benchmark
from lab.training.job import choose_fp32_library, dry_run, make_jobs
from lab.training.recorder import processor

BUDGET = 48.0  # seconds to measure in; imports, clean-up and the table take the rest of a minute
MIN_SECONDS = 4.0  # least time to measure a candidate
# the options that a plan may choose
LAYOUT = ("processes", "compile", "precision", "cuda", "backend", "workers", "groups")


class Row(NamedTuple):
    """A candidate with its estimated time, or the reason why it failed."""

    options: Options
    seeds: int = 0  # per process
    speed: float = 0.0  # steps/s, summed over seeds and processes
    start: float = 0.0  # seconds of start-up: imports, build, compilation
    seconds: float = math.inf  # of the whole run
    failure: str = ""


def apply_plan(options: Options, config: dict[str, Any], argv: Sequence[str]) -> Options:
    """The options with the fastest layout on this machine, measured, or from the cache in the runs
    folder. `argv`: the command line that gave the options. UserError if no candidate works."""
    cache = options.runs / "plan.json"
    plans, key = _read_cache(cache), _cache_key(options, config, argv)
    if key in plans:
        print(f"using the cached plan (to measure again: rm {cache})")
    else:
        best = measure(options, config, argv)
        plans[key] = {name: getattr(best, name) for name in _free(options, argv)}
        with contextlib.suppress(OSError):  # then the next run measures again
            cache.parent.mkdir(parents=True, exist_ok=True)
            part = cache.with_name(f"plan.json.{os.getpid()}.tmp")
            part.write_text(json.dumps(plans, indent=1) + "\n")
            part.replace(cache)
    planned = dataclasses.replace(options, **{"plan": False} | plans[key])
    print(f"running: {command(planned, options, argv)}", flush=True)
    return planned


def _cache_key(options: Options, config: dict[str, Any], argv: Sequence[str]) -> str:
    """All that a plan depends on, as JSON."""
    others = ("name", "runs", "log", "config", "plan")
    settings = {name: str(value) for name, value in dataclasses.asdict(options).items()
                if name not in others}
    machine = processor(), physical_cores(), torch.cuda.is_available(), torch.__version__
    source = hashlib.sha256(Path(options.agent).read_bytes()).hexdigest()
    return json.dumps([machine, source, settings, config, _free(options, argv)])


def _read_cache(cache: Path) -> dict[str, dict[str, Any]]:
    try:
        plans = dict(json.loads(cache.read_text()))
        return {key: value for key, value in plans.items() if set(value) <= set(LAYOUT)}
    except (OSError, ValueError, TypeError):
        return {}


def _free(options: Options, argv: Sequence[str]) -> list[str]:
    """Names of the options that a plan may choose: set neither by a flag nor by a --config."""
    given = given_flags(with_yaml(argv, type(options)))
    return [name for name in LAYOUT if hasattr(options, name) and name not in given
            and getattr(options, name) in (None, False, "fp32")]


def measure(options: Options, config: dict[str, Any], argv: Sequence[str]) -> Options:
    """Measure within a minute, print the table -> the best options. UserError if none works."""
    prepare_process()
    deadline, start_time = time.monotonic() + BUDGET, time.perf_counter()
    resolved, free = resolve_defaults(options), _free(options, argv)
    # each backend leaves a different number of cores
    if isinstance(options, Vectorised) and isinstance(resolved, Vectorised):
        resolved = dataclasses.replace(resolved, threads=options.threads)
    jobs, products = make_jobs(resolved, config, 1, None), Products()
    for job in jobs:
        products.update(dry_run(job)[1])
    resolved = choose_fp32_library(resolved, jobs, products)
    dry_run_seconds = time.perf_counter() - start_time
    rows, skipped = list[Row](), list[str]()
    needs = {False: MIN_SECONDS, True: MIN_SECONDS}  # expected seconds: eager, compiled
    for candidate in candidates(resolved, free, rows):
        if candidate in [row.options for row in rows]:
            continue
        before = time.monotonic()
        try:
            if before + needs[candidate.compile] > deadline:
                raise TimeoutError
            rows.append(try_out(candidate, config, dry_run_seconds, deadline))
            needs[candidate.compile] = time.monotonic() - before
        except TimeoutError:
            skipped.append(describe(candidate))
            continue
        except UserError as error:
            rows.append(Row(candidate, failure=str(error)))
        outcome = rows[-1].failure or f"about {duration(rows[-1].seconds)}"
        print(f"{describe(candidate)}: {outcome}", flush=True)
    best, fast = fastest(rows, options), min(rows, key=lambda row: row.seconds)
    show(rows, best, skipped, options)
    if resolved.fp32_library:
        print(f"library for fp32 products on the CPU: {resolved.fp32_library}")
    if fast.seconds < best.seconds:
        print("faster in bf16, which --plan does not choose for you because it rounds the matrix "
              f"products (docs/results.md):\n  {command(fast.options, options, argv)}")
    print(f"fastest in {options.precision}:\n  {command(best.options, options, argv)}")
    return best.options


def fastest(rows: Sequence[Row], options: Options) -> Row:
    """The fastest row with the given precision. UserError if there is none."""
    working = [row for row in rows
               if not row.failure and row.options.precision == options.precision]
    if not working:
        reasons = "; ".join(dict.fromkeys(row.failure for row in rows if row.failure))
        raise UserError(f"no plan works: {reasons or 'nothing was measured within the minute'}")
    return min(working, key=lambda row: row.seconds)


def candidates(options: Options, free: Sequence[str], rows: Sequence[Row]) -> Iterator[Options]:
    """The most promising first: one layout on each device, then on the faster device the backends,
    compilation, bf16, and other numbers of processes until they get slower. The caller appends the
    result of each candidate to `rows`. Options that are not in `free` keep their values. UserError
    if all fail."""
    both = "cuda" in free and torch.cuda.is_available()
    chains = {cuda: [dataclasses.replace(options, cuda=cuda, **layout)
                     for layout in layouts(options, free, cuda)]
              for cuda in ([False, True] if both else [options.cuda])}
    for chain in chains.values():
        yield chain[0]
    if all(row.failure for row in rows):  # e.g. out of memory, or not in envpool
        yield from itertools.chain(*chains.values())
    others = chains[fastest(rows, options).options.cuda][1:]
    if isinstance(options, Vectorised):
        yield from others
    eager = fastest(rows, options)
    compiler = "compile" in free and (eager.options.cuda or can_compile())
    if compiler:
        yield dataclasses.replace(eager.options, compile=True)
    if "precision" in free:
        best = fastest(rows, options).options
        for choice in [best.compile, not best.compile][: 2 if compiler else 1]:
            yield dataclasses.replace(best, compile=choice, precision="bf16")
    if isinstance(options, Simple):
        fewer = eager
        for candidate in others:
            yield candidate
            if rows[-1].options != candidate or rows[-1].seconds > fewer.seconds:
                break
            fewer = rows[-1]
        if compiler and fewer != eager:
            yield dataclasses.replace(fewer.options, compile=True)


def layouts(options: Options, free: Sequence[str], cuda: bool) -> list[dict[str, Any]]:
    """For learn_simple.py numbers of processes, descending on a CPU, ascending on a GPU; for
    learn_vectorised.py backends with workers and groups."""
    cores = physical_cores()
    if isinstance(options, Simple):
        if "processes" not in free:
            return [{}]
        most = min(cores, len(options.env) * options.seeds)
        numbers = [most >> halvings for halvings in range(most.bit_length())]
        return [{"processes": n} for n in (reversed(numbers) if cuda else numbers)]
    assert isinstance(options, Vectorised)
    if not options.backend and any(map(is_torch, options.env)):
        return [{}]
    installed = ["envpool"] if importlib.util.find_spec("envpool") else []
    several = bool(options.workers) or (options.groups or 1) > 1  # which need processes
    one = [] if several else ["sync"]
    backends = [options.backend] if options.backend else [*one, "workers", *installed]
    numbers = list(dict.fromkeys((max(2, cores), max(2, cores - 1), 2 * cores)))
    numbers = numbers if "workers" in free else [options.workers or cores]
    groups = [1, 2] if "groups" in free else [options.groups or 1]
    found: list[dict[str, Any]] = [{"backend": name} for name in backends
                                   if name in ("sync", "torch")]
    for workers, group, name in itertools.product(numbers, groups, backends):
        if name == "workers":
            found.append({"backend": name, "workers": workers, "groups": group})
        elif name == "envpool" and group == groups[0]:
            found.append({"backend": name, "workers": workers})
    return found


def try_out(candidate: Options, config: dict[str, Any], dry_run_seconds: float, deadline: float
            ) -> Row:
    """Measure the first jobs of a candidate, as many at once as in the real run. UserError if one
    fails, TimeoutError at the deadline."""
    processes = getattr(candidate, "processes", 1)
    jobs = make_jobs(candidate, config, processes, None)
    shares = len(jobs) // len(candidate.env)
    first = [job for share in range(shares) for job in jobs[share::shares]][:processes]
    imports, costs = benchmark.run(first, deadline)
    measured = list(zip(first, costs, strict=True))
    before = imports + dry_run_seconds
    waiting = imports if len(jobs) > 1 else 0.0  # a single job runs in the main process
    return Row(
        candidate, seeds=max(len(job.seeds) for job in jobs),
        speed=sum(cost.speed(job) for job, cost in measured),
        start=before + waiting + max(cost.build + cost.compile for cost in costs),
        seconds=before + benchmark.makespan(jobs, processes, measured, waiting))


def show(rows: Sequence[Row], best: Row, skipped: Sequence[str], options: Options) -> None:
    """Print the table, fastest first, and the candidates that were not measured."""
    several = ("environments", "workers", "groups") if isinstance(options, Vectorised) else ()
    table = Table(title=f"{Path(options.agent).stem} on {', '.join(options.env)}, seeds: "
                        f"{options.seeds}, steps of each: {options.steps:,}",
                  title_justify="left", box=box.SIMPLE, collapse_padding=True)
    for heading in ("processes", "seeds\nof each", "compile", "precision", "device", "backend",
                    *several, "steps/s", "start-up", "estimated\ntime"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: row.seconds):
        o: Any = row.options
        cells = [getattr(o, "processes", 1), row.seeds or "", "yes" if o.compile else "no",
                 o.precision, "cuda" if o.cuda else "cpu",
                 getattr(o, "backend", None) or choose_backend(o.env[0], None)]
        cells += [o.num_envs, o.workers or "", o.groups or ""] if several else []
        cells += [f"{row.speed:,.0f}", duration(row.start), duration(row.seconds)]
        table.add_row(*["failed" if row.failure and i > 5 + len(several) else str(cell)
                        for i, cell in enumerate(cells)], style="bold" if row == best else None)
    Console(markup=False, width=None if sys.stdout.isatty() else 160).print(table)
    if getattr(best.options, "processes", 1) < len(options.env):
        print("Environments that were not measured are estimated from the measured ones.")
    if skipped:
        print(f"not measured, the minute was over: {'; '.join(skipped)} (give some of these flags "
              "to leave more time for the others)")


def describe(options: Options) -> str:
    """The layout of a candidate, as text."""
    o: Any = options
    parts = [f"{o.processes} processes" if isinstance(o, Simple) else o.backend or "torch"]
    parts += [f"{o.workers} workers"] if getattr(o, "workers", None) else []
    parts += [f"{o.groups} groups"] if getattr(o, "groups", None) else []
    return ", ".join([*parts, "compiled" if o.compile else "eager", o.precision,
                      "cuda" if o.cuda else "cpu"])


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def command(planned: Options, options: Options, argv: Sequence[str]) -> str:
    """The command line of a plan."""
    index = read_line(argv, type(options)).agent
    parts = [] if index is None else [argv[index]]
    parts += [arg for i, arg in enumerate(argv) if i != index and arg != "--plan"]
    for name in _free(options, argv):
        value = getattr(planned, name)
        if value not in (None, False, "fp32"):
            parts += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(["python", SCRIPTS[type(options)], *parts])
