"""Which backend, how many environments, workers and groups are fastest, here and for this agent.

    python -m lab.autotune --env BipedalWalker-v3        measures, and changes nothing
    python learn_vectorised.py --env BipedalWalker-v3 --autotune --log

Measured is acting and stepping, without the update: what the layout decides.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from lab import agent_file, envs
from lab.accelerate import physical_cores, prepare_process
from lab.gym_envs import UserError
from lab.recorder import processor

BUDGET, EACH = 55.0, 1.0  # seconds: of all measurements, of the steps of one


class Candidate(NamedTuple):
    num_envs: int
    backend: str
    workers: int | None
    groups: int | None


def fastest(options: Any, config: dict[str, Any]) -> Candidate:
    """The remembered one for these options on this machine, or else measured and remembered.
    `options` are those of learn_vectorised.py; what they give is kept. UserError if none works."""
    memory = options.runs / "autotune.json"
    known = _remembered(memory)
    key = " | ".join(str(x) for x in (
        processor(), f"{physical_cores()} cores", options.env[0], options.agent, config,
        f"{options.seeds} seeds", "cuda" if options.cuda else "cpu", options.num_envs,
        options.backend, options.workers, options.groups))
    if key in known:
        best = Candidate(**known[key])
        print(f"fastest here, as measured before: {describe(best)} (forget it: rm {memory})")
        return best
    best = measure_all(options, config)
    with contextlib.suppress(OSError):  # it is measured again next time
        memory.parent.mkdir(parents=True, exist_ok=True)
        whole = memory.with_name(f"autotune.json.{os.getpid()}.tmp")
        whole.write_text(json.dumps(known | {key: best._asdict()}, indent=1) + "\n")
        whole.replace(memory)
    return best


def _remembered(memory: Path) -> dict[str, dict[str, Any]]:
    try:
        known = dict(json.loads(memory.read_text()))
        return {k: v for k, v in known.items() if set(v) == set(Candidate._fields)}
    except (OSError, ValueError, TypeError):
        return {}


def measure_all(options: Any, config: dict[str, Any]) -> Candidate:
    """Measure within a minute, print the table -> the fastest."""
    prepare_process()
    begun, speeds, failed = time.monotonic(), dict[Candidate, float](), dict[Candidate, str]()
    longest = 0.0
    for candidate in candidates(options, speeds):
        left = BUDGET - (time.monotonic() - begun)
        if left < longest:
            print("the minute is over: the rest is not measured")
            break
        before = time.monotonic()
        try:
            speeds[candidate] = measure(candidate, options, config)
            what = f"{speeds[candidate]:,.0f} steps/s"
        except UserError as error:
            failed[candidate] = what = str(error)
        longest = max(longest, time.monotonic() - before)
        print(f"{describe(candidate)}: {what}; at most {max(left, 0):.0f} s left", flush=True)
    if not speeds:
        raise UserError("no backend works: " + "; ".join(dict.fromkeys(failed.values())))
    best = max(speeds, key=lambda candidate: speeds[candidate])
    table = Table(title=f"{options.env[0]}, {Path(options.agent).stem}, {options.seeds} seeds: "
                        "acting and stepping")
    for heading in ("backend", "environments of a seed", "workers", "groups", "steps/s"):
        table.add_column(heading, justify="left" if heading == "backend" else "right")
    for candidate in sorted(speeds, key=lambda candidate: -speeds[candidate]):
        table.add_row(candidate.backend, str(candidate.num_envs), str(candidate.workers or ""),
                      str(candidate.groups or ""), f"{speeds[candidate]:,.0f}",
                      style="bold" if candidate == best else None)
    Console().print(table)
    return best


def candidates(options: Any, speeds: dict[Candidate, float]) -> Iterator[Candidate]:
    """First every backend at one number of environments, then other numbers with the fastest;
    of what the options give, only that. `speeds` fills while this is read."""
    env_id, cores, num_envs = options.env[0], physical_cores(), options.num_envs or 32
    if options.backend or envs.is_torch(env_id):
        backends = [envs.choose_backend(env_id, options.backend)]
    else:
        backends = ["sync", "workers"]
        backends += ["envpool"] if importlib.util.find_spec("envpool") else []
    numbers = sorted({options.workers or n for n in (max(2, cores - 1), cores, 2 * cores)})
    for backend in backends:
        if backend == "workers":
            groups = [options.groups] if options.groups else [1, 2]
            for workers, group in itertools.product(numbers, groups):
                yield Candidate(num_envs, backend, workers, group)
        elif backend == "envpool":
            yield from (Candidate(num_envs, backend, workers, None) for workers in numbers)
        else:
            yield Candidate(num_envs, backend, None, None)
    if not options.num_envs and speeds:
        best = max(speeds, key=lambda candidate: speeds[candidate])
        more = [64, 256, 1024, 4096] if best.backend == "torch" else [8, 16, 64, 128]
        yield from (best._replace(num_envs=number) for number in more)


def measure(candidate: Candidate, options: Any, config: dict[str, Any]) -> float:
    """Steps/s, summed over seeds and environments. UserError if this candidate cannot work."""
    seeds, device = list(range(options.seeds)), "cuda" if options.cuda else "cpu"
    stack = envs.make(options.env[0], seeds, candidate.num_envs, candidate.backend, device,
                      workers=candidate.workers, groups=candidate.groups or 1)
    with contextlib.closing(stack):
        agent = agent_file.build(options.agent, config, stack.spec, seeds, candidate.num_envs,
                                 100 * candidate.num_envs, device, lambda fn: fn)
        obs = stack.reset()
        for seconds in (0.2 * EACH, 0.8 * EACH):  # the first to warm up
            steps, begun = 0, time.perf_counter()
            while time.perf_counter() - begun < seconds:
                stack.send_groups(agent.act, obs)
                obs = stack.receive().obs
                steps += len(seeds) * candidate.num_envs
            stack.finished()  # the host waits for the device
            seconds = time.perf_counter() - begun
    return steps / seconds


def describe(candidate: Candidate) -> str:
    words = [candidate.backend, f"{candidate.num_envs} environments of a seed"]
    words += [f"{candidate.workers} workers"] if candidate.workers else []
    words += [f"{candidate.groups} groups"] if candidate.groups else []
    return ", ".join(words)


if __name__ == "__main__":
    from lab import command

    sys.exit(command.run(sys.argv[1:], command.Vectorised, command.measure))
