"""Drives an agent through its public methods, for lab/check/ and the tests."""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lab.agent import (
    action_kind,
    build_agent,
    load_agent,
    needed_to_act,
    save_state,
    weights,
)
from lab.envs import probes
from lab.envs.make import make_envs
from lab.envs.spec import EnvSpec, discrete_spec
from lab.errors import RefusedError

Metrics = dict[str, torch.Tensor]
Step = tuple[torch.Tensor, ...]  # obs, rewards, next_obs, terminations, truncations

OBS_DIM = 3
SPECS = {"continuous": EnvSpec("check", OBS_DIM, 2, (-1.0, 0.0), (1.0, 4.0), None),
         "discrete": discrete_spec("check", OBS_DIM, (2, 3), None),
         "one discrete": discrete_spec("check", OBS_DIM, (5,), None)}
TASKS = {"continuous": ("lab/Fork-v0", "lab/Target-v0"),
         "discrete": ("lab/DiscreteFork-v0", "lab/DiscreteTarget-v0"),
         "one discrete": ("lab/DiscreteFork-v0", "lab/OneDiscreteTarget-v0")}
NUM_ENVS, STEPS = 4, 60  # per seed, on random transitions
ACTIONS = {"the action": False, "the exploring action": True}
SEEDS, PROBE_ENVS, PROBE_STEPS = (0, 1, 2), 32, 6_000  # on a probe environment
RING_ROWS = 2 * PROBE_ENVS

# Fast settings, by patterns of their names; a setting of another type is left alone.
SMALL: dict[str, int | float] = {
    r"(\w+_)?batch_size": 64, r"(\w+_)?(width|units|hidden_(dim|size))": 32,
    r"(\w+_)?(lr|learning_rate)": 3e-3, "gamma": 0.8, "tau": 0.02, "learning_starts": 100,
    "replay_ratio": 0.25, "policy_delay": 1, "num_steps": 8, "seq_len": 4,
    "num_minibatches": 4, "update_epochs": 10}


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that match SMALL, with its values."""
    return {name: value for name, old in config.items() for pattern, value in SMALL.items()
            if re.fullmatch(pattern, name) and (old is None or type(old) is type(value))}


@dataclass
class AgentUnderTest:
    """Makes, trains and runs the agent at `path`."""

    path: str
    config: dict[str, Any]
    device: str = "cpu"

    @functools.cached_property
    def actions(self) -> str:
        """"one discrete" of an agent for discrete actions that refuses two at a time."""
        kind = action_kind(load_agent(self.path))
        try:
            self.make(spec=SPECS[kind])
        except RefusedError:
            return "one discrete" if kind == "discrete" else kind
        return kind

    @property
    def spec(self) -> EnvSpec:
        return SPECS[self.actions]

    def make(self, seeds: Sequence[int] = SEEDS, num_envs: int = NUM_ENVS,
             total_steps: int = NUM_ENVS * STEPS, spec: EnvSpec | None = None, **settings: Any
             ) -> Any:
        """Build an agent without settings that its Config lacks. UserError if it rejects one."""
        config = self.config | {k: v for k, v in settings.items() if k in self.config}
        return build_agent(self.path, config, spec or self.spec, seeds, num_envs, total_steps,
                           self.device, lambda fn: fn)

    def steps(self, seeds: Sequence[int], count: int = STEPS) -> list[Step]:
        return [tuple(x.to(self.device) for x in step)
                for step in make_steps(seeds, NUM_ENVS, count)]

    def trained(self, seeds: Sequence[int], nan_seed: int | None = None) -> tuple[Any, Metrics]:
        """-> an agent after its first updates, and its last metrics and actions, (S, ...) each."""
        agent = self.make(seeds)
        *_, last = [{}, *drive(agent, self.steps(seeds), nan_seed)]
        return agent, last | self.acts(agent, len(seeds))

    def acts(self, agent: Any, stack: int) -> Metrics:
        """Its actions (S, N, A), with and without exploration, on the same obs for every seed."""
        obs = torch.linspace(-1, 1, NUM_ENVS * OBS_DIM).view(1, NUM_ENVS, -1)
        obs = obs.repeat(stack, 1, 1).to(self.device)
        return {name: agent.act(obs, explore=explore) for name, explore in ACTIONS.items()}

    def train(self, env_id: str, done: Callable[[Any], bool], **settings: Any) -> bool:
        """Train until `done(agent)`, called up to sixteen times -> whether it returned True."""
        envs = make_envs(env_id, SEEDS, PROBE_ENVS, device=self.device)
        agent = self.make(SEEDS, PROBE_ENVS, PROBE_STEPS, envs.spec, **settings)
        obs = envs.reset()
        for step in range(1, PROBE_STEPS // PROBE_ENVS + 1):
            actions = agent.act(obs)
            agent.update()
            t = envs.step(actions)
            agent.observe(obs, actions, t.rewards, t.next_obs, t.terminations, t.truncations)
            obs = t.obs
            if step * PROBE_ENVS % (PROBE_STEPS // 16) < PROBE_ENVS and done(agent):
                return True
        return False

    @functools.cached_property
    def decisions(self) -> tuple[list[float], int]:
        """Train on Fork -> its decisions there, from -1 (wrong) to 1 (best), mean over seeds; and
        the number of rows of its replay, see replay_rows.

        The replay holds only two steps, so half of its rows are newest rows next to the oldest.
        """
        space, reached, rows = probes.Fork.action_space, list[float](), 0
        low, high = float(space.low[0]), float(space.high[0])
        if self.actions != "continuous":
            low, high = 0.0, 1.0

        def decided(agent: Any) -> bool:
            nonlocal rows
            obs = torch.eye(probes.PRIZE + 1, device=self.device)[: len(probes.BEST)]
            actions = agent.act(obs.repeat(len(SEEDS), 1, 1), explore=False).squeeze(-1)
            scaled = (2 * (actions - low) / (high - low) - 1).mean(0).tolist()
            reached[:] = [u * best for u, best in zip(scaled, probes.BEST, strict=True)]
            rows = replay_rows(agent)
            return min(reached) > 0.4

        self.train(TASKS[self.actions][0], decided, buffer_size=RING_ROWS)
        return reached, rows


def replay_rows(agent: Any) -> int:
    """The most rows, (S, rows, ...), of what an agent keeps in STATE beside networks and
    optimizers; 0 for none. Of one that saves itself, those in "replay"."""
    state = save_state(agent)
    names = {"replay", *needed_to_act(agent)} - weights(agent).keys()
    kept = [state[name] for name in names if name in state]
    return max((x.shape[1] for part in kept for x in flat_state(part).values()
                if getattr(x, "ndim", 0) > 1 and len(x) == len(SEEDS)), default=0)


def make_steps(seeds: Sequence[int], num_envs: int, count: int, obs_dim: int = 3) -> list[Step]:
    """Random transitions: a list of (obs, rewards, next_obs, terminations, truncations). Those of a
    seed do not depend on the other seeds in the stack."""
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]

    def draw(*shape: int) -> torch.Tensor:
        return torch.stack([torch.rand(num_envs, *shape, generator=g) for g in generators])

    obs, steps = draw(obs_dim), list[Step]()
    for _ in range(count):
        next_obs, ends = draw(obs_dim), draw()
        steps.append((obs, draw(), next_obs, (ends < 0.1).float(), (ends > 0.9).float()))
        obs = torch.where(((ends < 0.1) | (ends > 0.9))[..., None], draw(obs_dim), next_obs)
    return steps


def drive(agent: Any, steps: Sequence[Step], nan_seed: int | None = None) -> list[Metrics]:
    """The loop of training/loop.py on the given transitions -> the metrics of every update.

    `nan_seed`: set the rewards of the seed at this index in the stack to NaN."""
    history = []
    for obs, rewards, next_obs, terminations, truncations in steps:
        actions = agent.act(obs)
        metrics = agent.update()
        if metrics:
            history.append({name: value.clone() for name, value in metrics.items()})
        if nan_seed is not None:
            rewards = rewards.clone()
            rewards[nan_seed] = float("nan")
        agent.observe(obs, actions, rewards, next_obs, terminations, truncations)
    return history


def flat_state(state: Any, prefix: str = "") -> dict[str, Any]:
    """Nested state -> {path: leaf}."""
    if isinstance(state, dict) or hasattr(state, "items"):
        return {k: v for key, value in state.items()
                for k, v in flat_state(value, f"{prefix}{key}/").items()}
    if isinstance(state, list | tuple):
        return flat_state(dict(enumerate(state)), prefix)
    return {prefix[:-1]: state}


def seed_slices(trained: tuple[Any, Metrics], index: int, stack: int) -> Metrics:
    """The slice of the seed at `index` from each stacked tensor of the agent's state, metrics and
    actions."""
    agent, seen = trained
    return {name: x[index] for name, x in (flat_state(save_state(agent)) | seen).items()
            if isinstance(x, torch.Tensor) and x.shape[:1] == (stack,)}


def equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where they are equal; a NaN is equal to another."""
    return (a == b) | (a.isnan() & b.isnan())


def same(a: Any, b: Any) -> bool:
    """Bit-identical on a CPU; close on a GPU, which may sum in a different order. A NaN is the same
    as another."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and bool(a == b or (a != a and b != b))
    if a.shape != b.shape:
        return False
    if a.device.type == "cpu" or not a.is_floating_point():
        return bool(equal(a, b).all())
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)


def differing(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """The names of the entries that differ."""
    yield from sorted(a.keys() ^ b.keys())
    yield from (name for name in a if name in b and not same(a[name], b[name]))
