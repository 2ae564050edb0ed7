"""EnvSpec, what an agent knows of its environment, and gymnasium.make with our errors. No torch."""

import ast
import contextlib
import difflib
import functools
import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium

from lab.errors import UserError

# Old module names, as older runs have them in their environment ids
MOVED = {"lab.probe_envs": "lab.envs.probes", "lab.torch_envs": "lab.envs.torch_tasks"}


@dataclass(frozen=True)
class EnvSpec:
    """What an agent knows of its environment. Action bounds: (A,), in environment units.
    UserError unless each low bound is below its high bound; either may be infinite."""

    id: str
    obs_dim: int
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_episode_steps: int | None

    def __post_init__(self) -> None:
        for i, (low, high) in enumerate(zip(self.action_low, self.action_high, strict=True)):
            if not low < high:  # NaN as well
                raise UserError(f"{self.id}: action {i} has bounds [{low}, {high}]; the low bound "
                                "must be below the high one")


def make_one(env_id: str, env_kwargs: Sequence[str] = (), **settings: Any) -> gymnasium.Env:
    """One gymnasium environment. `env_kwargs`: NAME=VALUE words of --env-kwargs. UserError if it
    cannot be made; it suggests similar ids."""
    settings = read_kwargs(env_kwargs) | settings
    try:
        redirect_mujoco_warnings()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date")  # v4 on purpose
            warnings.filterwarnings("ignore", message=".*latest versioned environment")
            module, colon, name = env_id.rpartition(":")
            env = gymnasium.make(MOVED.get(module, module) + colon + name,
                                 disable_env_checker=True, **settings)
    except (gymnasium.error.Error, ImportError, ValueError, TypeError) as error:
        if isinstance(error, TypeError) and not env_kwargs:
            raise
        ids = list(gymnasium.registry)
        by_lower = {name.lower(): name for name in ids}
        near = difflib.get_close_matches(env_id.lower(), list(by_lower), n=3, cutoff=0.6)
        if env_id in ids or not near:
            reason = " ".join(str(error).split())
            raise UserError(f"cannot make environment {env_id!r}: {reason}") from error
        names = ", ".join(by_lower[name] for name in near)
        raise UserError(f"unknown environment {env_id!r}; did you mean {names}?") from error
    if env.spec and env.spec.id != env_id.split(":")[-1]:
        raise UserError(f"environment {env_id!r} has no version; use {env.spec.id!r}")
    return env


def read_kwargs(words: Sequence[str]) -> dict[str, Any]:
    """The words NAME=VALUE of --env-kwargs -> keyword arguments of gymnasium.make. A value is a
    Python literal, or else a string. UserError if a word has another form or a name comes twice."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier() or name in found:
            raise UserError(f"--env-kwargs needs NAME=VALUE, each name once, not {' '.join(words)}")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found[name] = text
    return found


def import_prefix(env_id: str) -> str:
    """Import the module of "module:Name-v0", as gymnasium does -> the id without it."""
    module, colon, name = env_id.rpartition(":")
    try:
        if colon:
            importlib.import_module(MOVED.get(module, module))
    except (ImportError, ValueError) as error:
        raise UserError(f"cannot make environment {env_id!r}: {error}") from error
    return name


@functools.cache
def redirect_mujoco_warnings() -> None:
    """Make MuJoCo's warnings Python warnings; it would print them and write a MUJOCO_LOG.TXT to the
    working directory. Drops the one about settotalmass, which gymnasium's own models cause each
    time."""
    try:
        import mujoco
    except ImportError:
        return

    def warn(message: str) -> None:
        if "settotalmass" not in message:
            warnings.warn(f"MuJoCo: {message.strip()}", RuntimeWarning, stacklevel=2)

    mujoco.set_mju_user_warning(warn)


def spec_of(env: gymnasium.Env, env_id: str) -> EnvSpec:
    """UserError unless both spaces are one-dimensional Boxes."""
    obs_space, action_space = env.observation_space, env.action_space
    if not isinstance(action_space, gymnasium.spaces.Box) or len(action_space.shape) != 1:
        space = " ".join(str(action_space).split())
        raise UserError(f"{env_id} has action space {space}; only continuous control is "
                        "supported: a one-dimensional Box")
    if not isinstance(obs_space, gymnasium.spaces.Box) or len(obs_space.shape) != 1:
        space = " ".join(str(obs_space).split())
        raise UserError(f"{env_id} has observation space {space}; only a one-dimensional Box is "
                        "supported: register it with gymnasium's FlattenObservation")
    limit = getattr(env.spec, "max_episode_steps", None)  # env.spec may be None
    low, high = (tuple(float(x) for x in bound) for bound in (action_space.low, action_space.high))
    return EnvSpec(env_id, obs_space.shape[0], action_space.shape[0], low, high, limit)


def probe(env_id: str, env_kwargs: Sequence[str] = ()) -> EnvSpec:
    """The EnvSpec of a gymnasium environment. UserError if it is not supported."""
    with contextlib.closing(make_one(env_id, env_kwargs)) as env:
        return spec_of(env, env_id)
