"""What an environment returns: a dry run before training, and the error of a later step that
returns something else. No torch."""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from lab.envs.generators import generator_states, kept_generators, seed_generators
from lab.envs.spec import (
    EnvSpec,
    as_env_actions,
    code_error,
    make_one,
    renew_box2d_world,
    spec_of,
)
from lab.errors import UserError, first_line

DRY_STEPS = 10


def dry_run(env_id: str, env_kwargs: Sequence[str] = (), several: bool = True
            ) -> tuple[EnvSpec, list[str]]:
    """Run an environment twice, with the same seed and random actions -> its spec, warnings.
    UserError says what it returned and what it should return, or that `several` cannot exist at a
    time; CodeError where it raised."""
    with contextlib.chdir(os.curdir), kept_generators():
        env = make_one(env_id, env_kwargs)
        try:
            spec = spec_of(env, env_id)
            warnings = check_twice(env, spec)
            if several:
                check_second_instance(env_id, env_kwargs)
        except BaseException:
            with contextlib.suppress(Exception):
                env.close()
            raise
        close(env, env_id)
    return spec, warnings


def check_twice(env: gymnasium.Env, spec: EnvSpec) -> list[str]:
    """Warnings about episodes that a run could not repeat."""
    seed_generators([0])
    before, first = generator_states(), rollout(env, spec)
    warnings = []
    if generator_states() != before:
        warnings.append(f"{spec.id} draws from the global random generators of Python or numpy: "
                        "a process has one of each, so the results of a seed depend on the "
                        "seeds that share its process")
    seed_generators([0])
    second = rollout(env, spec)
    differs = (first != second).any(1)
    if differs.any():
        episode, step = divmod(int(differs.argmax()), DRY_STEPS + 1)
        which = ("after an episode with seed 0, the next ones (reset without a seed)" if episode
                 else "two episodes with seed 0 and the same actions")
        where = f"at step {step}" if step else "in their first observations"
        warnings.append(f"{spec.id} is not reproducible: {which} differ {where}; another run with "
                        "the same seeds gives other results")
    return warnings


def rollout(env: gymnasium.Env, spec: EnvSpec) -> np.ndarray:
    """A seeded reset and random steps, then a reset without a seed and steps, all checked
    -> rows (2 * (DRY_STEPS + 1), O + 1): obs, reward."""
    def reset(seed: int | None = None) -> Any:
        renew_box2d_world(env)
        try:
            result = env.reset(seed=seed)
        except Exception as error:
            if "unexpected keyword argument 'seed'" in str(error):
                raise UserError(f"{spec.id}: reset should take (*, seed=None, options=None): "
                                f"{error}") from error
            raise code_error(f"{spec.id}: reset(seed={seed}) failed", error) from error
        check_reset(spec.id, spec.obs_dim, result)
        return result[0]

    def step(action: np.ndarray) -> Any:
        try:
            result = env.step(action)
        except Exception as error:
            if isinstance(error, ValueError) and "to unpack (expected 5" in str(error):
                raise UserError(f"{spec.id}: step should return (obs, reward, terminated, "
                                f"truncated, info): {error}") from error
            raise code_error(f"{spec.id}: step failed", error) from error
        check_step(spec.id, spec.obs_dim, result)
        return result

    generator = np.random.default_rng(0)
    rows = []
    for seed in (0, None):
        obs = reset(seed)
        rows.append(np.array([*obs, 0]))
        for _ in range(DRY_STEPS):
            action = random_action(spec, np.asarray(obs), generator)[None]
            (action,) = as_env_actions(action, env.action_space)
            obs, reward, terminated, truncated, _ = step(action)
            rows.append(np.array([*obs, reward]))
            if terminated or truncated:
                obs = reset()
    return np.array(rows)


def random_action(spec: EnvSpec, obs: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """(A,): uniform within its bounds, normal without; of discrete choices one that is allowed."""
    if spec.num_actions:
        mask = np.ones(sum(spec.num_actions))
        if spec.mask_start is not None:
            mask = obs[spec.mask_start : spec.mask_start + mask.size]
        allowed = np.split(mask, np.cumsum(spec.num_actions)[:-1])
        return np.array([generator.choice(np.flatnonzero(part)) if part.any() else 0
                         for part in allowed])
    low, high = np.array(spec.action_low), np.array(spec.action_high)
    bounded = np.isfinite(high - low)
    action = np.clip(generator.normal(size=low.shape), low, high)
    uniform = generator.uniform(np.where(bounded, low, 0), np.where(bounded, high, 1))
    return np.where(bounded, uniform, action)


def check_second_instance(env_id: str, env_kwargs: Sequence[str]) -> None:
    """UserError if there cannot be two at a time."""
    try:
        env = make_one(env_id, env_kwargs)
    except UserError as error:
        reason = error.__cause__ or error
        raise UserError(f"{env_id} cannot be made twice at a time: {type(reason).__name__}: "
                        f"{first_line(reason)}; use --eval-env same, with one seed and one "
                        "environment per process") from error
    close(env, env_id)


def close(env: gymnasium.Env, env_id: str) -> None:
    try:
        env.close()
    except Exception as error:
        raise code_error(f"{env_id}: close() failed", error) from error


def check_reset(env_id: str, obs_dim: int, result: Any, finite: bool = True) -> None:
    """UserError unless it is (obs, info)."""
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise UserError(f"{env_id}: reset should return (obs, info), but returned "
                        f"{describe(result)}")
    _check_obs(env_id, obs_dim, "reset", result[0], finite)


def check_step(env_id: str, obs_dim: int, result: Any, finite: bool = True) -> None:
    """UserError unless it is (obs, reward, terminated, truncated, info)."""
    if not isinstance(result, tuple) or len(result) != 5:
        raise UserError(f"{env_id}: step should return (obs, reward, terminated, truncated, "
                        f"info), but returned {describe(result)}")
    obs, reward, *ends, _ = result
    _check_obs(env_id, obs_dim, "step", obs, finite)
    _check_value(env_id, "reward", "a number", reward, "biuf")
    if finite and not np.isfinite(reward):
        raise UserError(f"{env_id}: step returned the reward {reward}; it should be finite")
    for name, end in zip(("terminated", "truncated"), ends, strict=True):
        _check_value(env_id, name, "True or False", end, "biu")


def _check_obs(env_id: str, obs_dim: int, verb: str, obs: Any, finite: bool) -> None:
    wanted = f"numbers of shape ({obs_dim},), as its observation_space says"
    try:
        array = np.asarray(obs)
    except ValueError:  # ragged
        array = np.array(None)
    if array.dtype.kind not in "biuf" or array.shape != (obs_dim,):
        raise UserError(f"{env_id}: {verb} returned as observation {describe(obs)}; it should be "
                        f"{wanted}")
    if finite and not np.isfinite(array).all():
        place = int(np.flatnonzero(~np.isfinite(array))[0])
        raise UserError(f"{env_id}: {verb} returned an observation with {array[place]} at index "
                        f"{place}; it should be finite")


def _check_value(env_id: str, name: str, wanted: str, value: Any, kinds: str) -> None:
    if np.ndim(value) or np.asarray(value).dtype.kind not in kinds:
        raise UserError(f"{env_id}: step returned as {name} {describe(value)}; it should be "
                        f"{wanted}")


def describe(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape} and type {value.dtype}"
    if isinstance(value, tuple):
        return f"{len(value)} values ({', '.join(type(x).__name__ for x in value)})"
    text = " ".join(repr(value).split())
    kind = type(value).__name__
    return text if value is None else f"a {kind}" if len(text) > 40 else f"{text} (a {kind})"
