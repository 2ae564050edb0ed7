"""An agent is a file named by its path: load it, and check that it keeps the contract."""

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lab.envs.spec import EnvSpec
from lab.errors import UserError

VERBS = ("act", "observe", "update", "state_dict", "load_state_dict")


def load_agent(path: str | Path) -> ModuleType:
    """The module at `path`, with an Agent and a Config. UserError if it is missing or broken."""
    path = Path(path)
    if not path.is_file():
        beside = sorted(str(p) for p in Path("agents").glob("*.py"))
        raise UserError(f"no agent file {str(path)!r}; agents here: {', '.join(beside) or 'none'}")
    name = re.sub(r"\W", "_", f"agent_file_{path.resolve()}")
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise UserError(f"agent file {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and tyro look the module up to read the comments
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        line = next((f":{e.lineno}" for e in [error] if isinstance(e, SyntaxError)), "")
        raise UserError(f"agent file {path}{line} does not load: "
                        f"{type(error).__name__}: {_first_line(error)}") from error
    agent, config = getattr(module, "Agent", None), getattr(module, "Config", None)
    if agent is None or not dataclasses.is_dataclass(config):
        raise UserError(f"agent file {path} needs a class Agent and a dataclass Config")
    missing = [verb for verb in VERBS if not callable(getattr(agent, verb, None))]
    if missing:
        raise UserError(f"agent file {path}: Agent has no {missing[0]}(); the five verbs are "
                        f"{', '.join(VERBS)}")
    return module


def build_agent(path: str | Path, config: dict[str, Any], spec: EnvSpec, seeds: Sequence[int],
                num_envs: int, total_steps: int, device: str, accelerate: Callable[..., Any]
                ) -> Any:
    """The Agent at `path`. UserError if it refuses the environment or its configuration."""
    module = load_agent(path)
    known = {field.name for field in dataclasses.fields(module.Config)}
    unknown = sorted(set(config) - known)
    if unknown:
        raise UserError(f"{path} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    try:
        return module.Agent(spec, module.Config(**config), seeds, num_envs=num_envs,
                            total_steps=total_steps, device=device, accelerate=accelerate)
    except ValueError as error:
        raise UserError(f"{Path(path).name} on {spec.id}: {_first_line(error)}") from error


def check_contract(path: str | Path, config: dict[str, Any], spec: EnvSpec, num_envs: int,
                   device: str) -> None:
    """The first steps of a small stack, up to its first update (or a rollout that long).
    UserError names the verb, what it should give and what came."""
    S, N = 2, num_envs
    agent = build_agent(path, config, spec, [0, 1], N, N, device, _first_calls)
    stem = Path(path).name

    def expect(verb: str, wanted: str, ok: bool, got: object) -> None:
        if not ok:
            raise UserError(f"{stem} breaks the contract: {verb} should give {wanted}, "
                            f"but gave {got}")

    def call(verb: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return getattr(agent, verb)(*args, **kwargs)
        except Exception as error:
            raise UserError(f"{stem} breaks the contract: {verb} failed on tensors of shape (S, N, "
                            f"...) = ({S}, {N}, ...): {type(error).__name__}: "
                            f"{_first_line(error)}") from error

    obs = torch.zeros(S, N, spec.obs_dim, device=device)
    for explore in (False, True):
        actions = call("act", obs, explore=explore)
        wanted = f"a tensor (S, N, A) = ({S}, {N}, {spec.action_dim})"
        expect("act", wanted, isinstance(actions, torch.Tensor), type(actions).__name__)
        expect("act", wanted, tuple(actions.shape) == (S, N, spec.action_dim),
               tuple(actions.shape))
        expect("act", f"actions of {obs.dtype}", actions.dtype == obs.dtype, actions.dtype)
        expect("act", "actions without a gradient", not actions.requires_grad, "one that has it")
    zeros, metrics = torch.zeros(S, N, device=device), {}
    for _ in range(5_000):
        call("observe", obs, actions, zeros, obs, zeros, zeros)
        metrics = call("update")
        expect("update", "a dict of metrics", isinstance(metrics, dict), type(metrics).__name__)
        if metrics:
            break
        call("act", obs)
    for name, value in metrics.items():
        expect("update", "names with tensors", isinstance(name, str)
               and isinstance(value, torch.Tensor), f"{name!r} with a {type(value).__name__}")
        shape = tuple(getattr(value, "shape", ()))
        expect("update", f"{name} of shape (S,) = ({S},)", shape == (S,), shape)
        expect("update", f"{name} detached", not value.requires_grad, "it with a gradient")
    state = call("state_dict")
    expect("state_dict", "a dict", isinstance(state, dict), type(state).__name__)
    call("load_state_dict", state)


def _first_calls(fn: Callable[..., Any], calls: int = 2) -> Callable[..., Any]:
    """An accelerate for a dry run: many environments owe many gradient steps, a few will do."""
    results: dict[tuple[torch.Size, ...], list[Any]] = {}

    def step(*tensors: torch.Tensor) -> Any:
        seen = results.setdefault(tuple(x.shape for x in tensors), [])
        if len(seen) < calls:
            seen.append(fn(*tensors))
        return seen[-1]

    return step


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
