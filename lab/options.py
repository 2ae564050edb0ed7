"""The command lines of the scripts: their options, and how they are parsed."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import typeguard
import tyro

from lab import settings
from lab.accelerate import physical_cores
from lab.agent import load_agent
from lab.envs.base import TORCH, is_torch
from lab.envs.spec import read_kwargs
from lab.errors import CodeError, UserError, first_line, one_line
from lab.matmul import Library
from lab.stopping import stops


@dataclass(frozen=True)
class Options:
    # What to train
    agent: tyro.conf.Positional[str] = "agents/sac.py"  # agent file
    env: tuple[str, ...] = ("Pendulum-v1",)  # gymnasium ids, each trained separately
    env_kwargs: tuple[str, ...] = ()  # NAME=VALUE arguments of gymnasium.make; tables state them
    seeds: int = 1  # number of seeds
    first_seed: int = 0  # the seeds are first_seed, first_seed + 1, ...
    steps: int = 6_000  # environment steps per seed
    # start from the weights of this run, each seed from its own, or all from one seed's folder;
    # tables state it
    init_from: Path | None = None
    # What to change about the task; tables and plots state it
    action_repeat: int = 1  # environment steps for each action; rewards are summed
    # clip the training reward of each environment step to [LOW, HIGH]
    clip_reward: tuple[float, float] | None = None
    # in training, a termination counts only if its last reward is below this; any other end of an
    # episode bootstraps, as a truncation does
    failure_below: float | None = None
    # What to log
    log: bool = False  # write a run folder: metrics, TensorBoard, checkpoints, plot
    name: str | None = None  # name of the run folder; none: the agent's name
    runs: Path = Path("runs")  # parent folder of the run folders
    eval_every: int | None = None  # steps between evaluations; none: ten per run
    keep_best: bool = True  # keep each seed's weights at its best evaluation, for --which best
    eval_episodes: int = 5  # deterministic episodes per seed and evaluation
    # environments of evaluation: their own, those of training (its episodes are truncated for it;
    # for a simulator that runs once), or no evaluation (tables show training returns)
    eval_env: Literal["own", "same", "none"] = "own"
    log_every: int | None = None  # steps between rows of metrics; none: 100 per run
    checkpoint_every: int | None = None  # steps; none: a tenth of the run or 5 minutes, 0: the end
    # When to stop before the last step, by the mean evaluation of the seeds
    stop_at: float | None = None  # stop once the mean evaluation of the seeds reaches this return
    stop_at_evals: int = 1  # it has to in that many evaluations in a row
    stop_plateau: int | None = None  # stop once that many evaluations bring no new best
    stop_rtol: float = 0.01  # a new best is higher than the old one by this share of it
    # How to run
    compile: bool = False  # torch.compile the update
    precision: Literal["fp32", "bf16"] = "fp32"  # precision of matrix products in the update
    # library for fp32 matrix products on a CPU: torch's BLAS or oneDNN; none: measured, the faster
    # one that computes in fp32 on this processor
    fp32_library: Library | None = None
    # train on the GPU; of several, each process takes the one with the fewest jobs
    cuda: bool = False
    # take the settings of a run's config.json, or of a YAML file with the names of flags as keys;
    # flags override it
    config: Path | None = None
    tuned: bool = False  # take the settings in tuned/<env>.json beside the agent; flags override
    # continue the run in this folder from its last checkpoints; with --steps or --seeds above its
    # own, make a finished run longer or give it more seeds
    resume: Path | None = None
    extended: tyro.conf.Suppress[tyro.conf.Fixed[tuple[int, ...]]] = ()  # steps of the run before


@dataclass(frozen=True)
class Simple(Options):
    """Options of learn_simple.py."""

    processes: int | None = None  # parallel processes; none: one per physical core, or Ray CPU
    engine: Literal["local", "ray"] = "local"  # this machine's processes, or a Ray cluster
    address: str | None = None  # HOST:PORT of the cluster; none: RAY_ADDRESS, else one for this run
    track: Literal["mlflow", "wandb"] | None = None  # also send the rows to this tracker
    plan: bool = False  # measure the fastest layout first (one minute), then train; cached


@dataclass(frozen=True)
class Vectorised(Options):
    """Options of learn_vectorised.py."""

    agent: tyro.conf.Positional[str] = "agents/ppo.py"  # agent file
    env: tuple[str, ...] = ("torch/ContinuousCartPole-v1",)  # gymnasium ids, or torch/ ones
    steps: int = 100_000  # environment steps per seed, over all its environments
    # The environments of one seed
    num_envs: int | None = None  # environments per seed; none: 32
    # how the environments step; none: torch for torch/ ids, otherwise sync
    backend: Literal["sync", "workers", "envpool", "torch"] | None = None
    # processes, including the main one, or envpool's threads; none: one per physical core
    workers: int | None = None
    # groups of environments: one steps while the agent acts on the next; none: 1
    groups: int | None = None
    threads: int | None = None  # torch threads on the CPU; none: the cores that the workers leave
    track: Literal["mlflow", "wandb"] | None = None  # also send the rows to this tracker
    plan: bool = False  # measure the fastest layout first (one minute), then train; cached


Pruner = Literal["median", "percentile", "vizier"]


@dataclass(frozen=True)
class Tune(Options):
    """Options of hypertune.py. Agent settings given as flags apply to every trial."""

    env: tuple[str, ...] = ("Pendulum-v1",)  # the environment: one gymnasium id
    seeds: int = 2  # new seeds per trial
    first_seed: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 0  # each trial has its own seeds
    steps: int = 2_000  # environment steps per seed
    name: str | None = None  # name of the study's folder; none: the agent's name and the time
    # continue the study in this folder; to change flags, run its command with the same --name
    resume: Path | None = None
    log: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = True  # always
    # The search
    space: tuple[str, ...] = (  # NAME=LOW:HIGH log:LOW:HIGH int:LOW:HIGH logint:LOW:HIGH cat:A,B,C
        "qf_lr=log:3e-4:1e-2", "batch_size=logint:32:128")
    trials: int = 8  # number of trials
    # parallel processes, one trial each; none: one per physical core, or Ray CPU
    workers: int | None = None
    engine: Literal["local", "ray"] = "local"  # this machine's processes, or a Ray cluster
    address: str | None = None  # HOST:PORT of the cluster; none: RAY_ADDRESS, else one for this run
    study_seed: int = 0  # random seed of the search
    # Pruning, with the names of Optuna's pruners
    prune: bool = True  # stop trials that fall behind the completed ones
    # the bar: a percentile of the completed trials at the step, or Vizier's median of their
    # running averages
    pruner: Pruner = "percentile"
    percentile: float = 25.0  # of --pruner percentile: the best 25% reach the bar
    n_startup_trials: int = 4  # completed trials before the first one is pruned
    n_warmup_steps: int | None = None  # no trial is pruned before it; none: two thirds of the steps
    interval_steps: int = 1  # steps between checks
    # a trial whose last PATIENCE + 1 evaluations brought a new best is not pruned; None: it may be
    patience: int | None = 1
    # Confirmation: at the end, the best three settings and the defaults train again
    confirm_seeds: int = 8  # held-out seeds to confirm the best three settings and the defaults


YAML = (".yaml", ".yml")
NUM_ENVS = 32  # default environments per seed
LAST_SEED = 2**32  # seeds are below it
SCRIPTS: dict[type[Options], str] = {
    Simple: "learn_simple.py", Vectorised: "learn_vectorised.py", Tune: "hypertune.py"}
# options that a study does not take from the --config of a run
NOT_INHERITED = ("name", "log", "seeds", "first_seed", "workers")
# what runs and studies had before they recorded these options
OLDER = {"threads": 1, "fp32_library": "blas", "pruner": "vizier", "patience": None}
WITH_RESUME = ("--resume", "--engine", "--address")  # a run may go on elsewhere
TO_EXTEND = ("--steps", "--seeds")  # and become longer, with more seeds


def parse_args(argv: Sequence[str], kind: type[Options] = Simple) -> tuple[Options, dict[str, Any]]:
    """-> the options, and the agent's settings: every field of its Config is a flag."""
    argv = with_yaml(argv, kind)
    index, values = read_line(argv, kind)
    _check_line(argv, index, values, kind)
    resume = values.get("resume")
    source, kept, config = _read_source(values, kind)
    if source:
        _refuse_code_beside(source, kept if index is None else {**kept, "agent": ""})
    path = kept.get("agent", kind.agent) if index is None else argv[index]
    if resume:
        _check_script(resume, kept, kind)
        check_source(Path(resume), Path(path), kind)  # first: its Config may have changed too
        kept = OLDER | kept
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
             for word in _flag(name, value)]
    return read_flags([*argv, *words], index, *defaults, description)


def _check_line(argv: Sequence[str], index: int | None, values: dict[str, str],
                kind: type[Options]) -> None:
    """UserError if a path is empty, or if --resume stands beside flags that it does not take."""
    for name in ("resume", "config", "init_from"):
        if values.get(name) == "":
            raise UserError(f"--{name.replace('_', '-')} is empty: is a shell variable unset?")
    allowed = WITH_RESUME if kind is Tune else WITH_RESUME + TO_EXTEND
    if "resume" in values and any(word.split("=")[0] not in allowed for i, word in enumerate(argv)
                                  if i != index and not (i and argv[i - 1] in allowed)):
        raise UserError("--resume takes all settings from the run; give no other flag but "
                        + " and ".join(flag for flag in allowed if flag != "--resume"))


def _read_source(values: dict[str, str], kind: type[Options]
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
    dropped = ["config", "resume", "autotune", "address"]
    if "resume" not in values:
        dropped += ["processes", "threads", "fp32_library", "engine", "extended"]
        dropped += NOT_INHERITED if kind is Tune else ()
    kept = {name: value for name, value in before["options"].items() if name not in dropped}
    _check_types(source, kept, ("agent", "env", "num_envs", "steps", "seeds"))
    return source, kept, before["config"]


def _check_script(resume: str, options: dict[str, Any], kind: type[Options]) -> None:
    """UserError if another script started the run."""
    started_by = Tune if "trials" in options else Vectorised if "num_envs" in options else Simple
    if kind is not started_by:
        raise UserError(f"{resume} is a run of {SCRIPTS[started_by]}: resume it with that script")


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
                _check_type(name, getattr(default, name), hint)
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
    _check_types(path, {"env": env}, ("env",))
    _refuse_code_beside(path, {"agent": agent if index is None and named else "", "env": env})
    known = {field.name for field in dataclasses.fields(kind)}
    known |= set(settings.names(settings.build(load_agent(agent).Config, {})))
    for name in content.keys() - known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else f" of {SCRIPTS[kind]} and {agent}"
        raise UserError(f"{path}: unknown setting {name}{hint}")
    given = given_flags(argv)
    flags = [word for name, value in content.items() if name not in given
             for word in _flag(name, value)]
    at = next(i for i, word in enumerate(argv) if word.split("=")[0] == "--config")
    rest = [*argv[:at], *argv[at + 2 - ("=" in argv[at]):]]
    return [*([agent] if index is None else []), *rest, *flags]


def _flag(name: str, value: Any) -> list[str]:
    """The words of a flag with this value."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *_words(value)]


def _words(value: Any) -> Iterator[str]:
    """The words of a number, a text or a nested list of them."""
    if isinstance(value, list):
        for each in value:
            yield from _words(each)
    else:
        yield str(value)


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
            flag, equals, value = word[2:].partition("=")
            flag = flag.replace("-", "_")
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


def _check_types(source: Path, options: dict[str, Any], names: Sequence[str]) -> None:
    """UserError if one of these options, where the file has it, has another type."""
    hints = get_type_hints(Vectorised)
    try:
        for name in names:
            if name in options:
                _check_type(name, options[name], hints[name])
    except TypeError as error:
        raise UserError(f"{source}: {first_line(error)}") from error


def _check_type(name: str, value: Any, kind: Any) -> None:
    try:
        typeguard.check_type(value, kind)
    except typeguard.TypeCheckError as error:
        raise TypeError(f"{name}: {error}") from error


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


def _refuse_code_beside(source: Path, options: dict[str, Any]) -> None:
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


def check_options(options: Options) -> None:
    """Check the values that need no environment. UserError names the flag."""
    for name in ("seeds", "steps", "eval_episodes", "eval_every", "log_every", "processes",
                 "num_envs", "workers", "groups", "threads", "trials", "n_startup_trials",
                 "interval_steps", "patience", "confirm_seeds", "action_repeat", "stop_at_evals",
                 "stop_plateau"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    for name in ("checkpoint_every", "stop_rtol", "study_seed"):
        value = getattr(options, name, None)
        if value is not None and not value >= 0:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {value}")
    for name in ("failure_below", "stop_at"):
        if math.isnan(getattr(options, name) or 0):
            raise UserError(f"--{name.replace('_', '-')} must be a number, not nan")
    percentile = getattr(options, "percentile", 0.0)
    if not 0 <= percentile <= 100:
        raise UserError(f"--percentile must lie in [0, 100], not {percentile}")
    if options.clip_reward and not options.clip_reward[0] < options.clip_reward[1]:
        low, high = options.clip_reward
        raise UserError(f"--clip-reward needs LOW < HIGH, not {low} {high}")
    if stops(options) and options.eval_env == "none":
        raise UserError("--stop-at and --stop-plateau need evaluations: --eval-env must be own or "
                        "same")
    if getattr(options, "track", None) and not options.log:
        raise UserError("--track sends what a run folder has: give --log, too")
    if len(set(options.env)) < len(options.env) or not options.env:
        given = " ".join(options.env) or "none"
        raise UserError(f"--env needs different environments, not {given}")
    if options.seeds > LAST_SEED:
        raise UserError(f"--seeds must be at most {LAST_SEED}, not {options.seeds}")
    if not 0 <= options.first_seed <= LAST_SEED - options.seeds:
        raise UserError(f"--first-seed must lie in [0, {LAST_SEED - options.seeds}], not "
                        f"{options.first_seed}")
    ray = getattr(options, "engine", "local") == "ray"
    if getattr(options, "address", None) and not ray:
        raise UserError("--address is for --engine ray")
    if getattr(options, "plan", False) and ray:
        raise UserError("--plan measures this machine: leave it out with --engine ray")
    if options.fp32_library == "onednn" and ray:
        raise UserError("--fp32-library onednn is for --engine local: a node's processor may round")
    if options.env_kwargs:
        read_kwargs(options.env_kwargs)
    backend = getattr(options, "backend", None)
    changed = [f"--{name.replace('_', '-')}" for name in ("env_kwargs", "action_repeat",
               "failure_below") if getattr(options, name) != getattr(Options, name)]
    changed += ["--eval-env same"] * (options.eval_env == "same")
    for env_id in options.env if changed else ():
        if is_torch(env_id) or backend in ("torch", "envpool"):
            raise UserError(f"{changed[0]} is for environments of gymnasium.make, which does not "
                            f"make {env_id}" + f" with --backend {backend}" * bool(backend))


def refuse_unused(options: Options, given: set[str]) -> None:
    """UserError for a flag of the command that would do nothing."""
    backend = getattr(options, "backend", None)
    many = not isinstance(options, Vectorised) or options.plan or backend in ("workers", "envpool")
    for name, used, need in (
            ("workers", many, "--backend workers or envpool"),
            ("stop_at_evals", options.stop_at is not None, "--stop-at"),
            ("stop_rtol", options.stop_plateau is not None, "--stop-plateau"),
            ("fp32_library", options.precision == "fp32" and not options.cuda, "fp32 on a CPU"),
            ("name", options.log, "--log"), ("checkpoint_every", options.log, "--log")):
        if name in given and not used:
            raise UserError(f"--{name.replace('_', '-')} does nothing without {need}")


def resolve_defaults(options: Options) -> Options:
    """Replace None by the value used, so that config.json records it: number of processes, or of
    environments and threads, and the ids of --backend torch. A Ray cluster has its own number of
    processes."""
    check_options(options)
    if isinstance(options, Simple) and options.engine == "local":
        return dataclasses.replace(options, processes=options.processes or physical_cores())
    if isinstance(options, Vectorised):
        ids = tuple(env_id if options.backend != "torch" or is_torch(env_id)
                    else TORCH + env_id for env_id in options.env)
        return dataclasses.replace(options, env=ids, num_envs=options.num_envs or NUM_ENVS,
                                   threads=options.threads or free_cores(options))
    return options


def free_cores(options: Vectorised) -> int:
    """Cores for torch's threads: those that environment workers (the main process is one) and
    envpool's threads leave, at least 1. On a GPU 1."""
    if options.cuda:
        return 1
    cores = physical_cores()
    busy = 0
    if options.backend in ("workers", "envpool"):
        total = options.seeds * (options.num_envs or NUM_ENVS)
        busy = min(options.workers or cores, total) - (options.backend == "workers")
    return max(1, cores - busy)


def given_flags(argv: Sequence[str]) -> set[str]:
    """Names of the options given as flags; --no-compile counts as compile."""
    flags = [arg.split("=")[0].removeprefix("--") for arg in argv if arg.startswith("--")]
    return {flag.replace("-", "_").removeprefix("no_") for flag in flags}
