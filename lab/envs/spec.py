"""EnvSpec, what an agent knows of its environment, and gymnasium.make with our errors. No torch."""

import ast
import contextlib
import difflib
import functools
import importlib
import math
import os
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs import registration

from lab.errors import CodeError, UserError, first_line

OURS = tuple(str(Path(file).parent) + os.sep for file in (
    gymnasium.__file__, Path(__file__).parent, importlib.__file__))
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})

# Old module names, as older runs have them in their environment ids
MOVED = {"lab.probe_envs": "lab.envs.probes", "lab.torch_envs": "lab.envs.torch_tasks"}


@dataclass(frozen=True)
class EnvSpec:
    """What an agent knows of its environment. Action bounds: (A,), in environment units.
    UserError unless each low bound is below its high bound; either may be infinite.

    Discrete actions: `num_actions` is the number of choices of each of the A dimensions, which are
    counted from 0 and are whole float32 numbers, as tensors of actions are. `mask_start`: where
    the action mask begins in an observation, one number for each choice, 0 if it is not allowed.
    """

    id: str
    obs_dim: int
    action_dim: int
    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    max_episode_steps: int | None
    num_actions: tuple[int, ...] = ()  # () for a Box
    mask_start: int | None = None  # None: every action is always allowed

    def __post_init__(self) -> None:
        if self.num_actions:
            return
        for i, (low, high) in enumerate(zip(self.action_low, self.action_high, strict=True)):
            # NaN as well; agents compute in float32
            if not (low < high and np.float32(low) < np.float32(high)):
                raise UserError(f"{self.id}: action {i} has bounds [{low}, {high}]; the low bound "
                                "must be below the high one")

    @property
    def action_space(self) -> str:
        """In gymnasium's words."""
        if len(self.num_actions) > 1:
            return f"MultiDiscrete({list(self.num_actions)})"
        return f"Discrete({self.num_actions[0]})" if self.num_actions else "Box"

    @property
    def mask(self) -> slice:
        """The action mask's place in an observation; empty without one."""
        start = self.mask_start or 0
        return slice(start, start + (self.mask_start is not None) * sum(self.num_actions))


def discrete_spec(env_id: str, obs_dim: int, num_actions: Sequence[int], limit: int | None,
                  mask_start: int | None = None) -> EnvSpec:
    """The spec of an environment with discrete actions; the bounds are the first and last choice.
    """
    low, high = (0.0,) * len(num_actions), tuple(float(n - 1) for n in num_actions)
    return EnvSpec(env_id, obs_dim, len(num_actions), low, high, limit, tuple(num_actions),
                   mask_start)


def make_one(env_id: str, env_kwargs: Sequence[str] = (), **settings: Any) -> gymnasium.Env:
    """One gymnasium environment. `env_kwargs`: words NAME=VALUE of --env-kwargs. UserError if its
    id is unknown, which suggests similar ids; CodeError if its code raises."""
    settings = read_kwargs(env_kwargs) | settings
    name = import_prefix(env_id)
    refuse_without_version(name, env_id)
    redirect_mujoco_warnings()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is out of date")  # v4 on purpose
            return gymnasium.make(name, disable_env_checker=True, **settings)
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv) as error:
        raise UserError(_unknown(env_id, error)) from error
    except (Exception, SystemExit) as error:
        message = f"cannot make environment {env_id!r}"
        known = (gymnasium.error.Error, ImportError, *([TypeError] if env_kwargs else []))
        if isinstance(error, known) and not places(error)[1]:
            raise UserError(f"{message}: {' '.join(str(error).split())}") from error
        raise code_error(message, error) from error


def refuse_without_version(name: str, env_id: str) -> None:
    """UserError for a name that gymnasium completes with the highest version."""
    with contextlib.suppress(gymnasium.error.Error):  # no id: gymnasium.make says so
        space, base, version = registration.parse_env_id(name)
        highest = registration.find_highest_version(space, base)
        if name not in gymnasium.registry and version is None and highest is not None:
            raise UserError(f"environment {env_id!r} has no version; use '{name}-v{highest}'")


def _unknown(env_id: str, error: Exception) -> str:
    by_lower = {name.lower(): name for name in gymnasium.registry}
    near = difflib.get_close_matches(env_id.lower(), list(by_lower), n=3, cutoff=0.6)
    if not near:
        return f"cannot make environment {env_id!r}: {' '.join(str(error).split())}"
    names = ", ".join(by_lower[name] for name in near)
    return f"unknown environment {env_id!r}; did you mean {names}?"


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
    if not colon:
        return name
    module = MOVED.get(module, module)
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:
        message = f"cannot make environment {env_id!r}"
        missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module}.".startswith(f"{missing}."):  # the module itself
            raise UserError(f"{message}: {error}") from error
        raise code_error(message, error) from error
    return name


def code_error(message: str, error: BaseException) -> CodeError:
    """The message with the place in the user's code and what it raised there; raise it from the
    error."""
    error, place = places(error)
    kind = type(error).__name__
    return CodeError(f"{message}: {place + ': ' if place else ''}{kind}: {first_line(error)}")


def places(error: BaseException) -> tuple[BaseException, str]:
    """-> the error that gymnasium.make may have wrapped, and file:line of the innermost frame in
    the user's code, else in that of a package; "" if there is none but gymnasium's and the lab's.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return error, f"{error.filename}:{error.lineno}"
    own, others = "", ""
    for each in chain(error):
        for frame in traceback.extract_tb(each.__traceback__):
            if not frame.filename.startswith((*OURS, "<")):
                others = f"{frame.filename}:{frame.lineno}"
                if not frame.filename.startswith(LIBRARIES):
                    own = others
        if own or others:
            return each, own or others
    return error, ""


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that caused it."""
    while error:
        yield error
        error = error.__cause__


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


def renew_box2d_world(env: gymnasium.Env) -> None:
    """BipedalWalker reuses one b2World, whose contact caches leak into the next episode (gymnasium
    issue 728). With a new world, an episode depends only on the random state."""
    walker: Any = env.unwrapped
    if type(walker).__module__ == "gymnasium.envs.box2d.bipedal_walker":
        from Box2D import b2World

        walker._destroy()
        walker.world = b2World()


def spec_of(env: gymnasium.Env, env_id: str) -> EnvSpec:
    """UserError unless observations are a one-dimensional Box, and actions another or discrete."""
    obs_space, action_space = env.observation_space, env.action_space
    num_actions = choices(action_space)
    boxed = isinstance(action_space, gymnasium.spaces.Box) and len(action_space.shape) == 1
    if not num_actions and not (boxed and np.dtype(action_space.dtype).kind == "f"):
        space = " ".join(str(action_space).split())
        raise UserError(f"{env_id} has action space {space}; supported are Discrete, "
                        "MultiDiscrete and a one-dimensional Box of floats")
    if not isinstance(obs_space, gymnasium.spaces.Box) or len(obs_space.shape) != 1:
        space = " ".join(str(obs_space).split())
        raise UserError(f"{env_id} has observation space {space}; only a one-dimensional Box is "
                        "supported: register it with gymnasium's FlattenObservation")
    limit = getattr(env.spec, "max_episode_steps", None)  # env.spec may be None
    for wrapper in wrappers(env):
        refuse_statistics(wrapper, env_id)
        if isinstance(wrapper, gymnasium.wrappers.TimeLimit):
            limit = min(limit or math.inf, wrapper._max_episode_steps)
    if num_actions:
        return discrete_spec(env_id, obs_space.shape[0], num_actions, limit,
                             find_mask(env, env_id, sum(num_actions)))
    box: Any = action_space
    low, high = (tuple(map(as_bound, bound)) for bound in (box.low, box.high))
    return EnvSpec(env_id, obs_space.shape[0], len(low), low, high, limit)


def choices(space: gymnasium.Space) -> tuple[int, ...]:
    """The number of choices of each dimension of a discrete space; () for other spaces."""
    if isinstance(space, gymnasium.spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, gymnasium.spaces.MultiDiscrete) and len(space.shape) == 1:
        return tuple(map(int, space.nvec))
    return ()


def as_env_actions(actions: np.ndarray, space: gymnasium.Space) -> np.ndarray:
    """Float actions (rows, A), discrete ones counted from 0 -> one action of `space` a row. A NaN
    becomes any action."""
    if not choices(space):
        box: Any = space
        exact = actions.astype(space.dtype)
        if space.dtype != np.float32:  # float32's nearest to a bound may lie beyond it
            for bound in (box.low, box.high):
                exact = np.where(actions == bound.astype(np.float32), bound, exact)
        return exact
    with np.errstate(invalid="ignore"):
        numbers = actions.astype(space.dtype) + space.start  # type: ignore[attr-defined]
    return numbers[:, 0] if isinstance(space, gymnasium.spaces.Discrete) else numbers


def find_mask(env: gymnasium.Env, env_id: str, size: int) -> int | None:
    """Where FlattenObservation put the key "action_mask" of a Dict. UserError if the mask has
    another size than the actions have choices, or if a wrapper around it may move it."""
    outside: list[gymnasium.Wrapper] = []
    for wrapper in wrappers(env):
        inner = wrapper.env.observation_space
        if (isinstance(wrapper, gymnasium.wrappers.FlattenObservation)
                and isinstance(inner, gymnasium.spaces.Dict) and "action_mask" in inner.spaces):
            names = list(inner.spaces)
            sizes = [gymnasium.spaces.flatdim(inner[name]) for name in names]
            at = names.index("action_mask")
            if sizes[at] != size:
                raise UserError(f"{env_id}: action_mask has {sizes[at]} numbers, but the actions "
                                f"have {size} choices")
            for other in reversed(outside):
                if (isinstance(other, gymnasium.ObservationWrapper)
                        or other.observation_space.shape != wrapper.observation_space.shape):
                    raise UserError(f"{env_id}: {type(other).__name__} changes the observation "
                                    "that has the action_mask: apply it to the Dict's other keys, "
                                    "before FlattenObservation")
            return sum(sizes[:at])
        outside.append(wrapper)
    return None


def as_bound(value: float) -> float:
    """The largest float32 and above stand for infinity."""
    infinite = abs(value) >= np.finfo(np.float32).max
    return math.copysign(math.inf, value) if infinite else float(value)


def wrappers(env: gymnasium.Env) -> Iterator[gymnasium.Wrapper]:
    """From the outermost to the innermost."""
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env


def refuse_statistics(wrapper: gymnasium.Wrapper, env_id: str) -> None:
    """UserError if the wrapper normalises with statistics that it still updates: each environment
    has its own ones, those of evaluation start empty, and a checkpoint does not hold them."""
    running = [name for name, value in vars(wrapper).items()
               if type(value).__name__ == "RunningMeanStd"]
    if running and getattr(wrapper, "update_running_mean", True):
        flag = "--norm-reward" if "return_rms" in running else "--norm-obs"
        raise UserError(f"{env_id} is wrapped in {type(wrapper).__name__}, whose running "
                        "statistics evaluation and checkpoints would not share: remove the wrapper "
                        f"and let the agent normalise (agents/ppo.py {flag})")


def probe(env_id: str, env_kwargs: Sequence[str] = ()) -> EnvSpec:
    """The EnvSpec of a gymnasium environment. UserError if it is not supported."""
    with contextlib.chdir(os.curdir), contextlib.closing(make_one(env_id, env_kwargs)) as env:
        return spec_of(env, env_id)
