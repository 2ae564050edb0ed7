"""Load an agent from its file, build it, save and restore its state."""

import copy
import dataclasses
import importlib.util
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.optim import Optimizer

from lab.envs.spec import EnvSpec
from lab.errors import CodeError, RefusedError, UserError, first_line
from lab.settings import build

VERBS = ("act", "observe", "update")


def load_agent(path: str | Path, source: bytes | None = None) -> ModuleType:
    """The module at `path`, with an Agent and a Config, or what it was when its source was read.
    UserError if it is missing or broken."""
    path = Path(path)
    if source is None and not os.path.isfile(path):  # False, too, if the name is too long
        beside = sorted(str(p) for p in Path("agents").glob("*.py"))
        raise UserError(f"no agent file {str(path)!r}; agents here: {', '.join(beside) or 'none'}")
    name = re.sub(r"\W", "_", f"agent_file_{path.resolve()}")
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise UserError(f"agent file {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and tyro look the module up to read the comments
    try:
        source = path.read_bytes() if source is None else source
        exec(compile(source, path.resolve(), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        line = next((f":{e.lineno}" for e in [error] if isinstance(e, SyntaxError)), "")
        raise UserError(f"agent file {path}{line} does not load: "
                        f"{type(error).__name__}: {first_line(error)}") from error
    agent, config = getattr(module, "Agent", None), getattr(module, "Config", None)
    if agent is None or not dataclasses.is_dataclass(config):
        raise UserError(f"agent file {path} needs a class Agent and a dataclass Config")
    missing = [verb for verb in VERBS if not callable(getattr(agent, verb, None))]
    if missing:
        raise UserError(f"agent file {path}: Agent has no {missing[0]}(); it needs "
                        f"{', '.join(VERBS)}")
    if not saves_itself(agent) and not isinstance(getattr(agent, "STATE", None), tuple):
        raise UserError(f"agent file {path}: Agent needs STATE, a tuple with the names of the "
                        "attributes to save in a checkpoint")
    return module


def build_agent(path: str | Path, config: dict[str, Any], spec: EnvSpec, seeds: Sequence[int],
                num_envs: int, total_steps: int, device: str, accelerate: Callable[..., Any],
                source: bytes | None = None) -> Any:
    """The Agent at `path`, see load_agent. UserError if it refuses the environment or its
    settings."""
    module = load_agent(path, source)
    check_actions(path, module, spec)
    known = {field.name for field in dataclasses.fields(module.Config)}
    unknown = sorted(set(config) - known)
    if unknown:
        raise UserError(f"{path} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}")
    try:
        settings = build(module.Config, config)
        check_ranges(module, settings)
        agent = module.Agent(spec, settings, seeds, num_envs=num_envs, total_steps=total_steps,
                             device=device, accelerate=accelerate)
    except Exception as error:
        if isinstance(error, ValueError) and _raised_in(path, error):  # by the agent itself
            raise RefusedError(f"{Path(path).name} on {spec.id}: {first_line(error)}") from error
        place = place_of(path, error) or path
        raise CodeError(f"{place}: Agent() failed: {type(error).__name__}: "
                        f"{first_line(error)}") from error
    if not saves_itself(agent):
        for name in agent.STATE:
            if not hasattr(agent, name):
                raise UserError(f"{Path(path).name}: STATE names {name!r}, which Agent() does not "
                                "set")
    return agent


def action_kind(module: ModuleType) -> str:
    """What the agent's ACTIONS says: "discrete", or "continuous" if it has none."""
    kind = str(getattr(module.Agent, "ACTIONS", "continuous"))
    if kind not in ("continuous", "discrete"):
        raise UserError(f"ACTIONS of {Path(module.__file__ or '').name} must be continuous or "
                        f"discrete, not {kind}")
    return kind


def check_actions(path: str | Path, module: ModuleType, spec: EnvSpec) -> None:
    """UserError unless the agent is made for the environment's kind of actions."""
    takes = action_kind(module)
    if takes != ("discrete" if spec.num_actions else "continuous"):
        other = ": use agents/ppo_discrete.py" if spec.num_actions else ""
        raise UserError(f"{spec.id} has action space {spec.action_space}; {Path(path).name} is for "
                        f"{takes} actions{other}")


def check_ranges(module: ModuleType, config: Any) -> None:
    """ValueError that names the setting of `config` outside the RANGES of its agent's file."""
    for name, (low, high) in getattr(module, "RANGES", {}).items():
        for value in _numbers(getattr(config, name)):
            if value is not None and not (low <= value <= high and abs(value) < math.inf):
                raise ValueError(f"{name} must lie in [{low:g}, {high:g}], not {value}")


def _numbers(value: Any) -> list[Any]:
    """The value, or of a tuple or list all that it holds."""
    many = isinstance(value, tuple | list)
    return [x for part in value for x in _numbers(part)] if many else [value]


def save_state(agent: Any) -> dict[str, Any]:
    """What the attributes named in STATE hold, by reference: for a checkpoint. An agent's own
    state_dict() comes first, where it has one. TypeError for an attribute of another type."""
    if saves_itself(agent):
        state: dict[str, Any] = agent.state_dict()
        return state
    return {name: _save(name, getattr(agent, name)) for name in agent.STATE}


def _save(name: str, part: Any) -> Any:
    if isinstance(part, torch.Tensor):
        return part.detach()
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, nn.Module | Optimizer):
        return part.state_dict()
    if isinstance(part, list | tuple):
        return [_save(name, x) for x in part]
    if hasattr(part, "STATE"):
        return save_state(part)
    if isinstance(part, bool | int | float | str):
        return part
    raise TypeError(f"STATE names {name!r}, a {type(part).__name__}: it can hold modules, "
                    "optimizers, tensors, generators, numbers, objects with a STATE, lists of them")


def restore_state(agent: Any, state: dict[str, Any], names: Sequence[str] | None = None) -> None:
    """Restore what save_state() returned, in place; only these names of STATE, if given. ValueError
    if an entry or a shape differs."""
    if saves_itself(agent):
        agent.load_state_dict(state)
        return
    state = from_five_methods(agent, state)
    for name in agent.STATE if names is None else names:
        if name not in state:
            raise ValueError(f"the checkpoint has no {name}, which STATE names")
        if name == "replay" and isinstance(state["replay"], dict):
            state["replay"] = grown(agent.replay, state["replay"])
        setattr(agent, name, _restore(name, getattr(agent, name), state[name]))


def _restore(name: str, part: Any, saved: Any) -> Any:
    """-> the attribute's value: `part` itself, changed in place, or the saved number."""
    if isinstance(part, torch.Tensor):
        if part.shape != saved.shape:
            raise ValueError(f"{name} is {tuple(part.shape)}, the checkpoint's is "
                             f"{tuple(saved.shape)}: same steps, envs and seeds?")
        with torch.no_grad():
            part.copy_(saved)
    elif isinstance(part, torch.Generator):
        if saved.shape == part.get_state().shape:  # it fits only its kind of device
            part.set_state(saved.cpu())
    elif isinstance(part, Optimizer):
        part.load_state_dict(copy.deepcopy(saved))  # it keeps the tensors that it is given
    elif isinstance(part, nn.Module):
        try:
            part.load_state_dict(saved)
        except RuntimeError as error:
            reason = str(error).split("\n\t")[-1]  # below torch's headline
            raise ValueError(f"{name} does not fit the checkpoint: {reason}") from error
    elif isinstance(part, list | tuple):
        if len(part) != len(saved):
            raise ValueError(f"{name} has {len(part)} parts, the checkpoint's has {len(saved)}: "
                             "same seeds?")
        parts = [_restore(name, x, y) for x, y in zip(part, saved, strict=True)]
        if isinstance(part, tuple):
            return tuple(parts)
        part[:] = parts
    elif hasattr(part, "STATE"):
        restore_state(part, saved)
    else:
        return saved
    return part


def grown(replay: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """The saved state of a replay with as many rows as `replay` has: a run that is made longer has
    more. ValueError if the replay does not say where its next row goes."""
    fewer = {name: x for name, x in saved.items() if has_fewer(x, getattr(replay, name, None))}
    if not fewer:
        return saved
    rows, size = {x.shape[1] for x in fewer.values()}, saved.get("size")
    full = {size} == rows and saved.get("position") == 0
    if not full and (size is None or saved.get("position") != size):  # else it was not full yet
        raise ValueError("the replay cannot grow: it needs a size, its rows in use, and a "
                         "position, that of the next row, which is 0 when it is full")
    longer = {name: getattr(replay, name) for name in fewer}
    for name, x in fewer.items():
        longer[name][:, : x.shape[1]] = x
    return saved | longer | {"position": saved["size"]}


def has_fewer(x: Any, y: Any) -> bool:
    """Whether they are tensors of shape (S, rows, ...) that differ in rows alone, x with fewer."""
    return (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and x.dim() > 1
            and x.shape[:1] + x.shape[2:] == y.shape[:1] + y.shape[2:] and len(x[0]) < len(y[0]))


def needed_to_act(agent: Any) -> list[str]:
    """The names of STATE that act() may read: all but the replay, optimizers and generators."""
    return [name for name in getattr(agent, "STATE", ()) if name != "replay"
            and not _made_of(getattr(agent, name), Optimizer | torch.Generator)]


def weights(agent: Any) -> dict[str, Any]:
    """What the agent learned, by reference: the modules and the tensors with a gradient in STATE.
    {} for an agent that saves itself."""
    if saves_itself(agent):
        return {}
    return {name: _save(name, part) for name in agent.STATE
            if _made_of(part := getattr(agent, name), nn.Module)
            or (isinstance(part, torch.Tensor) and part.requires_grad)}


def _made_of(part: Any, kind: Any) -> bool:
    """Whether it is of this type, or a list of such."""
    parts = part if isinstance(part, list | tuple) else [part]
    return bool(parts) and all(isinstance(x, kind) for x in parts)


def restore_weights(agent: Any, saved: dict[str, Any]) -> None:
    """Restore what weights() returned, in place. ValueError if a shape differs."""
    for name, part in saved.items():
        setattr(agent, name, _restore(name, getattr(agent, name), part))


def seed_slice(x: torch.Tensor, stack: int, index: int) -> torch.Tensor:
    """A seed's share of one of the weights of a stack: equal ones, seed after seed. A tensor
    without shares, such as a counter, is the same for all."""
    return x if x.dim() == 0 or len(x) % stack else x.chunk(stack)[index]


def copy_seed(target: dict[str, Any], to: tuple[int, int], source: dict[str, Any],
              of: tuple[int, int]) -> None:
    """Copy the weights of one seed, in place; `to`, `of`: the seeds in a stack, the seed's index.
    In stacks of different sizes, a tensor of the same shape is one that all seeds share. ValueError
    if the stacks do not hold the same networks."""
    theirs = {path: x for path, x in pytree.tree_flatten_with_path(source)[0]}
    for path, mine in pytree.tree_flatten_with_path(target)[0]:
        if not isinstance(mine, torch.Tensor):
            continue
        name = "".join(map(str, path))
        if not isinstance(theirs.get(path), torch.Tensor):
            raise ValueError(f"the weights have no {name}")
        new, old = mine, theirs[path]
        if to[0] == of[0] or new.shape != old.shape:
            new, old = seed_slice(new, *to), seed_slice(old, *of)
        if new.shape != old.shape:
            raise ValueError(f"{name} is {tuple(new.shape)} for a seed, not {tuple(old.shape)}")
        new.copy_(old)


def from_five_methods(agent: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state from before STATE, when agents saved themselves: their counters and
    tensors lay in groups, and the temperature belonged to the actor's optimizer."""
    state = dict(state)
    for group in ("counters", "tensors"):
        if group not in agent.STATE:
            state |= state.pop(group, {})
    if "alpha_optimizer" in agent.STATE and "alpha_optimizer" not in state:
        state["alpha_optimizer"] = agent.alpha_optimizer.state_dict()
        actor = state["actor_optimizer"]
        if len(actor["param_groups"]) == 2:
            *groups, last = actor["param_groups"]
            moments = dict(actor["state"])
            own = moments.pop(last["params"][0], None)
            state["alpha_optimizer"] = {"state": {0: own} if own else {},
                                        "param_groups": [last | {"params": [0]}]}
            state["actor_optimizer"] = {"state": moments, "param_groups": groups}
    return state


def saves_itself(agent: Any) -> bool:
    return all(callable(getattr(agent, verb, None)) for verb in ("state_dict", "load_state_dict"))


def _raised_in(path: str | Path, error: BaseException) -> bool:
    """Whether the innermost frame is one of the agent's file, or of this one (its ranges)."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename in (str(Path(path).resolve()), __file__)


def place_of(path: str | Path, error: BaseException) -> str:
    """path:line of the innermost frame inside the agent's file; "" if it has none."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == str(Path(path).resolve())]
    return f"{path}:{lines[-1]}" if lines else ""
