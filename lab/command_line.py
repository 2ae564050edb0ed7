"""From the command line of a script to its options and the settings of the agent."""

import contextlib
import dataclasses
import difflib
import io
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import tyro

from lab import settings
from lab.agent import load_agent
from lab.config_files import (
    YAML,
    check_script,
    check_source,
    check_type,
    check_types,
    read_file,
    read_source,
    read_tuned,
    refuse_code_beside,
)
from lab.errors import CodeError, UserError, first_line, one_line
from lab.options import SCRIPTS, Options, Simple, Tune, Vectorised, as_flag, option_of

WITH_RESUME = ("--resume", "--engine", "--address")  # a run may go on elsewhere
TO_EXTEND = ("--steps", "--seeds")  # and become longer, with more seeds


def parse_args(argv: Sequence[str], kind: type[Options] = Simple) -> tuple[Options, dict[str, Any]]:
    """-> the options, and the agent's settings: every field of its Config is a flag."""
    argv = with_yaml(argv, kind)
    index, values = read_line(argv, kind)
    _check_line(argv, index, values, kind)
    resume = values.get("resume")
    source, kept, config = read_source(values, kind)
    if source:
        refuse_code_beside(source, kept if index is None else {**kept, "agent": ""})
    path = kept.get("agent", kind.agent) if index is None else argv[index]
    if resume:
        check_script(resume, kept, kind)
        check_source(Path(resume), Path(path), kind)  # first: its Config may have changed too
    module = load_agent(path)
    defaults = _defaults(kind, source, kept | {"agent": path}, module.Config, config)
    script = sys.modules["__main__"].__doc__ or ""
    description = f"{script}\nThe agent:\n\n{module.__doc__ or ''}"
    options, config = read_flags(argv, index, *defaults, description)
    if resume:
        return (extend(options, kept) if kind is not Tune else options), config
    flags = given_flags(argv)
    if not options.tuned or "tuned" not in flags:  # a run's config.json has the settings already
        return options, config
    if source:
        raise UserError(f"--tuned and --config {source} both have settings: leave one out")
    words = [word for name, value in read_tuned(options).items() if name not in flags
             for word in _flag_words(name, value)]
    return read_flags([*argv, *words], index, *defaults, description)


def _check_line(argv: Sequence[str], index: int | None, values: dict[str, str],
                kind: type[Options]) -> None:
    """UserError if a path is empty, or if --resume stands beside flags that it does not take."""
    for name in ("resume", "config", "init_from"):
        if values.get(name) == "":
            raise UserError(f"{as_flag(name)} is empty: is a shell variable unset?")
    allowed = WITH_RESUME if kind is Tune else WITH_RESUME + TO_EXTEND
    if "resume" in values and any(word.split("=")[0] not in allowed for i, word in enumerate(argv)
                                  if i != index and not (i and argv[i - 1] in allowed)):
        raise UserError("--resume takes all settings from the run; give no other flag but "
                        + " and ".join(flag for flag in allowed if flag != "--resume"))


def _defaults(kind: type[Options], source: Path | None, kept: dict[str, Any],
              config_kind: type[Any], config: dict[str, Any]) -> tuple[Options, Any]:
    """-> the options and the Config that flags override. UserError if the source has a setting that
    does not fit; CodeError if the Config raises something else."""
    path = kept["agent"]
    if kind is not Vectorised and (kept.get("num_envs") or 1) > 1:
        raise UserError(f"{source} has {kept['num_envs']} environments per seed, which only "
                        f"learn_vectorised.py has: run that, or give {path} and its flags")
    names = {field.name for field in dataclasses.fields(kind)}
    others = {field.name for each in SCRIPTS for field in dataclasses.fields(each)} - names
    kept = {name: value for name, value in kept.items() if name not in others}
    try:
        kept["runs"] = Path(kept.get("runs", kind.runs))
        if kept.get("init_from"):
            kept["init_from"] = Path(kept["init_from"])
        defaults = kind(**kept), settings.build(config_kind, config)
        for default in defaults:
            for name, hint in get_type_hints(type(default)).items():
                check_type(name, getattr(default, name), hint)
    except TypeError as error:
        reason = first_line(error)
        raise UserError(f"{source or 'the default'} does not fit {path}: {reason}") from error
    except Exception as error:
        raise config_failed(path, error) from error
    return defaults


def config_failed(path: str, error: Exception) -> CodeError:
    """To raise from what the Config of the agent's file raised."""
    return CodeError(f"{path}: Config() failed: {one_line(error)}")


def extend(options: Options, before: dict[str, Any]) -> Options:
    """The options of a resumed run, which may be longer or have more seeds than `before`."""
    before = {"steps": type(options).steps, "seeds": type(options).seeds} | before
    for name in ("steps", "seeds"):
        if getattr(options, name) < before[name]:
            raise UserError(f"{options.resume} has {before[name]} {name}: --{name} "
                            f"{getattr(options, name)} would be fewer")
    if options.steps == before["steps"]:
        return options
    return dataclasses.replace(options, extended=(*options.extended, before["steps"]))


def with_yaml(argv: Sequence[str], kind: type[Options]) -> Sequence[str]:
    """The command line with the settings of --config FILE.yaml as flags, unless they are those of a
    run's config.json. Flags that are given win. UserError on a key that is no flag."""
    index, values = read_line(argv, kind)
    path = Path(values.get("config", ""))
    if path.suffix not in YAML or values.get("resume"):
        return argv
    content = read_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} has no settings: lines such as `gamma: 0.98`")
    if content.keys() >= {"options", "config"}:
        return argv
    content = {str(key).replace("-", "_"): value for key, value in content.items()}
    named = content.pop("agent", None)
    agent = str(named or kind.agent) if index is None else argv[index]
    env = content.get("env", ())
    env = (env,) if isinstance(env, str) else tuple(env) if isinstance(env, list) else env
    check_types(path, {"env": env}, ("env",))
    refuse_code_beside(path, {"agent": agent if index is None and named else "", "env": env})
    known = {field.name for field in dataclasses.fields(kind)}
    known |= set(settings.names(settings.build(load_agent(agent).Config, {})))
    for name in content.keys() - known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else f" of {SCRIPTS[kind]} and {agent}"
        raise UserError(f"{path}: unknown setting {name}{hint}")
    given = given_flags(argv)
    flags = [word for name, value in content.items() if name not in given
             for word in _flag_words(name, value)]
    at = next(i for i, word in enumerate(argv) if word.split("=")[0] == "--config")
    rest = [*argv[:at], *argv[at + 2 - ("=" in argv[at]):]]
    return [*([agent] if index is None else []), *rest, *flags]


def _flag_words(name: str, value: Any) -> list[str]:
    """The words of a flag with this value."""
    if isinstance(value, bool):
        return [as_flag(name if value else f"no_{name}")]
    return [as_flag(name), *_words(value)]


def _words(value: Any) -> Iterator[str]:
    """The words of a number, a text or a nested list of them."""
    if isinstance(value, list):
        for each in value:
            yield from _words(each)
    else:
        yield str(value)


def given_flags(argv: Sequence[str]) -> set[str]:
    """Names of the options given as flags; --no-compile counts as compile."""
    return {option_of(word).removeprefix("no_") for word in argv if word.startswith("--")}


class Line(NamedTuple):
    """What a command line says before the agent's flags are known."""

    agent: int | None  # index of the agent's file
    values: dict[str, str]  # of the script's flags that take one value


def read_line(argv: Sequence[str], kind: Any) -> Line:
    """The agent's file is the first argument, or else the only one that ends in .py and is not the
    value of a flag of `kind`. UserError if there are several."""
    counts = {name: _values_of(hint) for name, hint in get_type_hints(kind).items()}
    sure, unsure = list[int](), list[int]()  # unsure: after a flag that may be the agent's
    values: dict[str, str] = {}
    flag, left = "", 0
    for index, word in enumerate(argv):
        if word.startswith("--"):
            flag = option_of(word)
            _, equals, value = word.partition("=")
            yes_or_no = counts.get(flag.removeprefix("no_")) == 0
            left = 0 if equals or yes_or_no else counts.get(flag, 1)
            if equals and counts.get(flag) == 1:
                values[flag] = value
        elif left and flag in counts and not (left > 2 and _is_file(word, flag)):
            left -= 1
            if counts[flag] == 1:
                values[flag] = word
        elif word.endswith(".py"):
            (unsure if left and flag not in counts else sure).append(index)
            left = 0
        else:
            left = 0
    found = sure[:1] if sure[:1] == [0] else sure or unsure
    if len(found) > 1:
        names = " or ".join(argv[index] for index in found)
        raise UserError(f"which file is the agent, {names}? Give it as the first argument")
    return Line(found[0] if found else None, values)


MANY = 1_000_000  # values of a flag that takes any number


def _values_of(hint: Any) -> int:
    """How many values the flag of an option takes."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not NoneType)
    if get_origin(hint) is tuple:
        return MANY if get_args(hint)[-1] is Ellipsis else len(get_args(hint))
    return 0 if hint is bool else 1


def _is_file(word: str, flag: str) -> bool:
    """Whether the word is the agent's file, not another value of a flag that takes any number."""
    named = flag in ("space", "env_kwargs") and re.match(r"[\w-]+=", word)
    return word.endswith(".py") and not named


def read_flags(argv: Sequence[str], index: int | None, options: Any, config: Any,
               description: str) -> tuple[Any, dict[str, Any]]:
    """-> options and the agent's settings; `options` and `config` give the fields and defaults.
    UserError on unknown flags and on a field that is in both."""
    taken = {field.name for field in dataclasses.fields(options)}
    for name in settings.names(config):
        if name in taken:
            raise UserError(f"{options.agent}: Config's {name!r} is already a flag of the "
                            "script; rename it")
        taken.add(name)
    path = options.agent if index is None else argv[index]
    panels = {"options": "run", "config": f"agent ({Path(options.agent).stem})"}  # + " options"
    both = dataclasses.make_dataclass("Both", [
        (name, Annotated[type(default), tyro.conf.arg(name=panels[name])], default)
        for name, default in (("options", options), ("config", config))], frozen=True)
    if index is not None:  # move the file to the front: `--env A B agent.py` would be three ids
        argv = [argv[index], *argv[:index], *argv[index + 1:]]
    try:
        flags = parse_flags(both, argv, description)
    except UserError:
        raise
    except Exception as error:  # of a Config with a check of its own
        raise config_failed(path, error) from error
    if flags.options.agent != path:  # the settings would be another agent's
        raise UserError(f"unknown argument {flags.options.agent!r}: the agent is {path}")
    try:
        return flags.options, settings.plain_config(flags.config)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def parse_flags(kind: Any, argv: Sequence[str], description: str | None) -> Any:
    """tyro.cli, but an error is a UserError of one line instead of a box."""
    stderr, script = io.StringIO(), Path(sys.argv[0])
    module = script.parent.name if script.name == "__main__.py" else script.stem
    prog = f"python -m lab.{module}" if "lab" in script.parts else None
    try:
        with contextlib.redirect_stderr(stderr), INTEGERS:
            return tyro.cli(kind, prog=prog, args=argv, config=(tyro.conf.OmitArgPrefixes,),
                            description=description)
    except SystemExit as end:
        if not end.code:
            raise
        plain = re.sub(r"\x1b\[[\d;]*m", "", stderr.getvalue())
        lines = [line.strip("│| ") for line in plain.splitlines()]
        text = " ".join(line for line in lines[1:] if line.strip("─╰╯-+"))  # lines[0] is the title
        raise UserError(re.split(" Argument helptext:| For full helptext", text)[0]) from end


INTEGERS = tyro.constructors.ConstructorRegistry()


@INTEGERS.primitive_rule
def _integer(info: tyro.constructors.PrimitiveTypeInfo
             ) -> tyro.constructors.PrimitiveConstructorSpec[int] | None:
    """Flags of type int take 100_000 and 1e5, but not 1.5."""
    if info.type is not int:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar="INT", instance_from_str=lambda words: whole(words[0]),
        is_instance=lambda x: isinstance(x, int) and not isinstance(x, bool),
        str_from_instance=lambda x: [str(x)])


def whole(text: str) -> int:
    """ValueError unless the text is a whole number."""
    try:
        return int(text)
    except ValueError:
        if not float(text).is_integer():
            raise ValueError(f"{text} is not a whole number") from None
        return int(float(text))
