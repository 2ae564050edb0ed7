"""Settings from files: the config.json of a run, a YAML file, and the tuned ones of an agent."""

import itertools
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import typeguard

from lab import settings
from lab.errors import UserError, first_line, one_line
from lab.options import SCRIPTS, Options, Simple, Tune, Vectorised

YAML = (".yaml", ".yml")
# options that a study does not take from the --config of a run
NOT_INHERITED = ("name", "log", "seeds", "first_seed", "workers")
# what runs and studies had before they recorded these options
OLDER = {"threads": 1, "fp32_library": "blas", "pruner": "vizier", "patience": None}


def read_source(values: dict[str, str], kind: type[Options]
                 ) -> tuple[Path | None, dict[str, Any], dict[str, Any]]:
    """-> the config.json of --resume or --config, if one is given, the options in it that are
    kept, and the agent's settings."""
    if "resume" in values:
        source = Path(values["resume"]) / "config.json"
    elif "config" in values:
        source = Path(values["config"])
    else:
        return None, {}, {}
    before = _read_settings(source)
    options, dropped = before["options"], ["config", "resume", "autotune", "address"]
    if "resume" in values:
        options = OLDER | options
    else:
        dropped += ["processes", "threads", "fp32_library", "engine", "extended"]
        dropped += NOT_INHERITED if kind is Tune else ()
    kept = {name: value for name, value in options.items() if name not in dropped}
    check_types(source, kept, ("agent", "env", "num_envs", "steps", "seeds"))
    return source, kept, before["config"]


def check_script(resume: str, options: dict[str, Any], kind: type[Options]) -> None:
    """UserError if another script started the run."""
    started_by = Tune if "trials" in options else Vectorised if "num_envs" in options else Simple
    if kind is not started_by:
        raise UserError(f"{resume} is a run of {SCRIPTS[started_by]}: resume it with that script")


def check_source(folder: Path, agent: Path, kind: type[Options]) -> None:
    """UserError if the agent file has changed since the run or study in the folder started."""
    copy = folder / agent.name
    if not copy.is_file():
        raise UserError(f"{folder} has no copy of its agent, {agent.name}: cannot resume")
    old, new = (path.read_bytes() if path.is_file() else None for path in (copy, agent))
    if old == new:
        return
    changed = "is missing"
    if new is not None:
        lines = (path.read_text(errors="replace").splitlines() for path in (copy, agent))
        pairs = enumerate(itertools.zip_longest(*lines), start=1)
        line = next((number for number, (a, b) in pairs if a != b), "its last")
        changed = f"differs from {copy} from line {line} on"
    resume = shlex.join(["python", SCRIPTS[kind], str(copy), "--resume", str(folder)])
    raise UserError(f"{agent} {changed}; resume with the code that the run started with "
                    f"({resume}), or start a new run")


def refuse_code_beside(source: Path, options: dict[str, Any]) -> None:
    """UserError if the settings name code in the run folder. The folder may come from somebody
    else, so its code runs only if the user names it."""
    names = [env_id.rpartition(":")[0] for env_id in options.get("env", ())]
    modules = [Path(entry or ".", *name.split(".")) for name in names if name for entry in sys.path]
    folder = source.parent.resolve()
    agent = options.get("agent", "")
    for path in [*([Path(agent)] if agent else []), *modules]:
        if path.resolve().is_relative_to(folder):
            raise UserError(f"{source} names code in its own folder, {path}, which may be unsafe: "
                            "to run it, copy it elsewhere and name the copy")


def read_tuned(options: Options) -> dict[str, Any]:
    """The agent's settings for the environment, from tuned/ beside its file. UserError if there are
    none."""
    path, (env_id, *others) = Path(options.agent), options.env
    if others:
        raise UserError("--tuned takes one --env, since each environment has its own settings")
    file = settings.tuned_file(path, env_id)
    try:
        found = read_file(file) if file.is_file() else {}
        if path.stem in found:
            return dict(found[path.stem]["settings"])
        known = sorted({f"{agent} on {other.stem}" for other in file.parent.glob("*.json")
                        for agent in read_file(other)})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--tuned: a file in {file.parent} is broken: {one_line(error)}") from error
    raise UserError(f"--tuned: {file} has no settings of {path.stem}; leave it out, or take "
                    f"{' or '.join(known) or 'an agent with a folder tuned/ beside it'}")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        content = read_file(path)
        options = {key: tuple(value) if isinstance(value, list) else value  # JSON has no tuple
                   for key, value in dict(content["options"]).items()}
        return {"options": options, "config": dict(content["config"])}
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"{path} is not the config.json of a run: {reason}") from error


def read_file(path: Path) -> Any:
    """The contents of a JSON or YAML file. UserError if it cannot be read."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error
    if path.suffix not in YAML:
        return json.loads(text)
    from ruamel.yaml import YAML as Reader
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        return Reader(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem}") from error
    except (YAMLError, ValueError) as error:  # such as the 45th of a month
        raise UserError(f"{path}: {first_line(error)}") from error


def check_types(source: Path, options: dict[str, Any], names: Sequence[str]) -> None:
    """UserError if one of these options, where the file has it, has another type."""
    hints = get_type_hints(Vectorised)
    try:
        for name in names:
            if name in options:
                check_type(name, options[name], hints[name])
    except TypeError as error:
        raise UserError(f"{source}: {first_line(error)}") from error


def check_type(name: str, value: Any, kind: Any) -> None:
    try:
        typeguard.check_type(value, kind)
    except typeguard.TypeCheckError as error:
        raise TypeError(f"{name}: {error}") from error
