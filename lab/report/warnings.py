"""The warnings at the top of a report."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lab.report.runs import Method, Result, Run, changes, label, origins, seed_names, span_of_steps
from lab.settings import tuned_file
from lab.training import recorder

FEW = 5  # warn below this number of seeds


def find(methods: Sequence[Method]) -> list[str]:
    results = [result for method in methods for result in method.results.values()]
    few = [f"{result.method} in {result.environment} ({n})" for result in results
           if 0 < (n := len(result.at(result.step))) < FEW]
    found = []
    if few:
        found.append(f"fewer than {FEW} seeds, so the intervals are unreliable: {', '.join(few)}")
    found += [line for result in results for line in unfinished(result)]
    found += [f"{result.method} in {result.environment} stopped {stop}"
              for result in results for stop in result.stops]
    found += different_steps(results)
    for method in methods:
        found += different_settings(method)
        for run in method.runs:
            found += not_begun(method, run)
            found += [f"{method.name} was {change} ({run.folder}); returns are raw"
                      for change in changes(run.options)]
            found += [f"{method.name} was {origin} ({run.folder})"
                      for origin in origins(run.options)]
            found += evaluated_elsewhere(method, run)
            found += tuned_on(method, run)
            found += shipped_with(method, run)
    return found


def unfinished(result: Result) -> Iterator[str]:
    name, step = f"{result.method} in {result.environment}", result.step
    reached = [seed.reached for seed in result.seeds.values()]
    if max(reached) < result.planned:
        yield (f"{name} is unfinished: {span_of_steps(reached)} of {result.planned:,} steps, "
               + (f"shown at {step:,}" if step else "and no evaluation yet"))
    lost = sorted(result.seeds.keys() - result.at(step).keys()) if step else []
    if lost:
        each = ", ".join(f"{n} (at {at:,})" if (at := result.seeds[n].reached) < step
                         else f"{n} (without an evaluation)" for n in lost)
        yield (f"{name}: left out, because they did not reach {step:,} steps, are seeds {each}; if "
               "they diverged, the mean of the others is biased upwards")
    paused = max(seed.paused for seed in result.seeds.values())
    if paused:
        yield (f"{name} was apparently stopped for {paused / 60:.0f} min, which its wall-clock "
               "time leaves out")


def not_begun(method: Method, run: Run) -> Iterator[str]:
    first, count = run.options.get("first_seed", 0), run.options.get("seeds", 0)
    for environment in (label(env_id, run.options) for env_id in run.options.get("env", ())):
        result = method.results.get(environment)
        waiting = [n for n in range(first, first + count) if not result or n not in result.seeds]
        if waiting:
            yield (f"{method.name} in {environment} is unfinished: {seed_names(waiting)} of "
                   f"{run.folder} {'has' if len(waiting) == 1 else 'have'} not begun")


def different_steps(results: Sequence[Result]) -> Iterator[str]:
    for environment in sorted({result.environment for result in results}):
        steps = {r.method: r.step for r in results if r.environment == environment and r.step}
        if len(set(steps.values())) > 1:
            each = ", ".join(f"{name} at {step:,}" for name, step in steps.items())
            yield (f"{environment}: final returns are at different steps ({each}); the comparison "
                   "across environments uses equal steps")


def different_settings(method: Method) -> Iterator[str]:
    """Warn if runs with different settings are pooled under one name."""
    given = [run.settings for run in method.runs]
    names = list(dict.fromkeys(name for settings in given for name in settings))
    for name in names:
        values = list(dict.fromkeys(
            json.dumps(settings[name]) for settings in given if name in settings))
        if len(values) > 1:
            yield f"{method.name} pools runs with different {name}: {', '.join(values)}"


def evaluated_elsewhere(method: Method, run: Run) -> Iterator[str]:
    """Not in environments of their own."""
    if run.options.get("eval_env") == "none":
        yield (f"{method.name} was not evaluated ({run.folder}): its returns are those of training "
               "episodes, with exploration")
    elif run.options.get("eval_env") == "same":
        yield (f"{method.name} was evaluated in the environments of training ({run.folder}), whose "
               "episodes were truncated for it")


class Study(NamedTuple):
    folder: Path
    agent: str
    environment: str
    seeds: range  # of its trials
    best: dict[str, Any] | None  # the settings of its best.json; None: the defaults


def read_study(folder: Path) -> Study | None:
    """None if the folder has no finished study."""
    try:
        best = json.loads((folder / "best.json").read_text())
        header, *events = recorder.read_metrics(folder / "trials.jsonl")
        trials = 1 + max(event["trial"] for event in events)
        return Study(folder, Path(header["agent"]).stem, label(header["env"][0], header),
                     range(trials * header["seeds"]),
                     None if best["study"]["is"] == "defaults" else best["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tuned_on(method: Method, run: Run) -> Iterator[str]:
    """Warn if a run reports seeds that its settings were tuned on, which biases its mean upwards. A
    run has a study's settings if it was started from the study's best.json, has the same config as
    the best.json of a study in the same runs folder, or is a run of the study itself."""
    given = Path(run.options.get("config") or "")
    home = run.folder.absolute().parent
    origins = [given.parent.absolute()] if given.name == "best.json" else []
    own = [*origins, home.parent]
    studies = [study for folder in dict.fromkeys((*own, *sorted((home / "studies").glob("*"))))
               if (study := read_study(folder))]
    studies = [study for study in studies if study.folder in own or study.best == run.config]
    if origins and not studies:
        yield (f"{method.name} has the settings of {given}, but that study is missing: it may have "
               "been tuned on the seeds reported here")
    for study in studies:
        result = method.results.get(study.environment)
        if study.best is None or result is None or result.agent != study.agent:
            continue
        if overlap := sorted(result.seeds.keys() & set(study.seeds)):
            yield (f"{method.name} in {study.environment} is reported on seeds that the study "
                   f"{study.folder.name} tuned its settings on ({seed_names(overlap)}), so its "
                   f"mean is biased upwards: {study.folder / 'confirmed'} has held-out seeds")


def shipped_with(method: Method, run: Run) -> Iterator[str]:
    """Warn if a run with --tuned reports seeds that these settings were tuned on."""
    if not run.options.get("tuned"):
        return
    agent = Path(run.options["agent"])
    for env_id in run.options.get("env", ()):
        file = tuned_file(agent, env_id)
        result = method.results.get(label(env_id, run.options))
        try:
            entry = json.loads(file.read_text())[agent.stem]
            seeds, source = range(entry["seeds"]), entry["source"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if result and (overlap := sorted(result.seeds.keys() & set(seeds))):
            yield (f"{method.name} in {result.environment} is reported on seeds that its settings "
                   f"were tuned on ({seed_names(overlap)}; {source}), so its mean is biased "
                   f"upwards: --first-seed {len(seeds)} takes others")
