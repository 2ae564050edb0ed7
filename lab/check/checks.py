"""The known traps, a check for each. The agent is seen through its methods alone."""

import ast
import copy
import io
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lab.agent import check_contract, restore_state, save_state
from lab.check.driver import (
    ACTIONS,
    NUM_ENVS,
    RING_ROWS,
    SEEDS,
    SPEC,
    STEPS,
    AgentUnderTest,
    Metrics,
    differing,
    drive,
    flat_state,
    seed_slices,
)
from lab.envs import probes
from lab.envs.make import make_envs
from lab.envs.spec import EnvSpec
from lab.training.evaluation import evaluate

Check = Callable[[AgentUnderTest], None]
CHECKS: dict[str, Check] = {}  # by what they assert, in the order of a run


class Failed(Exception):
    """A check's reason, in one line."""


def require(ok: bool, reason: str) -> None:
    if not ok:
        raise Failed(reason)


def require_same(ours: dict[str, Any], theirs: dict[str, Any], reason: str) -> None:
    """In `reason` a {} stands for the name of what differs."""
    for name in differing(ours, theirs):
        raise Failed(reason.format(name))


def check(name: str) -> Callable[[Check], Check]:
    def add(fn: Check) -> Check:
        CHECKS[name] = fn
        return fn

    return add


@check("imports only the standard library, numpy and torch")
def _imports(subject: AgentUnderTest) -> None:
    allowed = sys.stdlib_module_names | {"numpy", "torch"}
    for node in ast.walk(ast.parse(Path(subject.path).read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = ["." * node.level + (node.module or "")]
            for name in names:
                require(name.split(".")[0] in allowed, f"line {node.lineno} imports {name}")


@check("act, observe and update return what the contract says")
def _verbs(subject: AgentUnderTest) -> None:
    check_contract(subject.path, subject.config, SPEC, NUM_ENVS, subject.device)


@check("act takes any number of environments")
def _any_number(subject: AgentUnderTest) -> None:
    agent = subject.make()
    for n in (NUM_ENVS, 1, 7):
        for explore in (True, False):
            obs = torch.zeros(len(SEEDS), n, SPEC.obs_dim, device=subject.device)
            shape = tuple(agent.act(obs, explore=explore).shape)
            right = len(SEEDS), n, SPEC.action_dim
            require(shape == right, f"act gave {shape} where {right} is right")


@check("actions stay within the bounds of each dimension")
def _bounds(subject: AgentUnderTest) -> None:
    """Before learning and in it. In float32, centre + scale is not always the bound."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        edges = torch.rand(2, 50, generator=generator) * 10 - 5
        low, high = edges.amin(0), edges.amax(0)
        spec = EnvSpec("check", 3, 50, tuple(low.tolist()), tuple(high.tolist()), None)
        agent = subject.make(spec=spec, total_steps=10 * NUM_ENVS)
        for steps in (0, 3):
            drive(agent, subject.steps(SEEDS, steps))
            for explore, scale in ((True, 1.0), (True, 1e6), (False, 1.0), (False, 1e6)):
                obs = scale * torch.randn(len(SEEDS), NUM_ENVS, SPEC.obs_dim, generator=generator)
                actions = agent.act(obs.to(subject.device), explore=explore).cpu()
                beyond = torch.maximum(low - actions, actions - high).amax().item()
                require(beyond <= 0, f"act(obs, explore={explore}) left them by {beyond:.2g}")


@check("acting without exploring changes nothing")
def _frozen(subject: AgentUnderTest) -> None:
    agent, _ = subject.trained(SEEDS)
    before = copy.deepcopy(flat_state(save_state(agent)))
    obs = torch.rand(len(SEEDS), 5, SPEC.obs_dim).to(subject.device)
    first, second = agent.act(obs, explore=False), agent.act(obs, explore=False)
    require(torch.equal(first, second), "the second action on the same observation was another")
    require(not first.requires_grad, "the action has a gradient")
    require_same(before, flat_state(save_state(agent)), "it changed {} of its state")


@check("metrics are finite, detached, one for each seed")
def _metrics(subject: AgentUnderTest) -> None:
    history = drive(subject.make(), subject.steps(SEEDS))
    require(bool(history), f"update gave none in {NUM_ENVS * STEPS} transitions of each seed")
    for metrics in history:
        for name, value in metrics.items():
            require(tuple(value.shape) == (len(SEEDS),),
                    f"{name} has shape {tuple(value.shape)}, not ({len(SEEDS)},)")
            require(not value.requires_grad, f"{name} has a gradient")
            require(bool(value.isfinite().all()), f"{name} is {value.tolist()}")


@check("updates change every weight matrix")
def _learning(subject: AgentUnderTest) -> None:
    """A target network's, too; not those of a module frozen on purpose (requires_grad=False) that
    no other module of the agent has the shape of a target for."""
    agent = subject.make()
    before = copy.deepcopy(flat_state(save_state(agent)))
    S, frozen = len(SEEDS), frozen_on_purpose(agent)
    matrices = [name for name, x in before.items() if isinstance(x, torch.Tensor)
                and x.dim() > 2 and min(x.shape[-2:]) > 1 and len(x) % S == 0
                and name.split("/")[0] not in frozen]
    require(bool(matrices), "its state holds none of shape (S, ..., in, out)")
    drive(agent, subject.steps(SEEDS))
    after = flat_state(save_state(agent))
    for name in matrices:
        for index in range(S):
            old, new = (state[name].chunk(S)[index] for state in (before, after))
            require(not torch.equal(old, new), f"{name} of its state stays as it was")


def frozen_on_purpose(agent: Any) -> set[str]:
    """Attributes that are modules without a trainable parameter, and no target network: none of
    the agent's trained modules has the same parameters."""
    modules = {name: x for name, x in vars(agent).items() if isinstance(x, torch.nn.Module)}
    shapes = {name: [p.shape for p in x.parameters()] for name, x in modules.items()}
    trained = {name for name, x in modules.items() if any(p.requires_grad for p in x.parameters())}
    return {name for name in modules.keys() - trained
            if not any(shapes[name] == shapes[other] for other in trained)}


@check("the same seeds give the same, other seeds something else")
def _repeatable(subject: AgentUnderTest) -> None:
    (_, first), (_, second), (_, other) = map(subject.trained, (SEEDS, SEEDS, (3, 4, 5)))
    require_same(first, second, "{} was another in a second run of the same seeds")
    require("the exploring action" in differing(first, other), "seeds 3 to 5 explore as 0 to 2")
    explored = first["the exploring action"]
    require(not torch.equal(*explored[:2]), "seed 1 explores as seed 0 does")


@check("a seed in a stack trains as it does alone")
def _alone(subject: AgentUnderTest) -> None:
    """In float64, where nothing but a mistake shows; in float32 where the agent is bound to it."""
    try:
        stack, alone = _stack_and_alone(subject, torch.float64)
    except Exception:
        stack, alone = _stack_and_alone(subject, torch.float32)
    ours, theirs = seed_slices(stack, 3, 8), seed_slices(alone, 0, 1)
    for name in ours.keys() & theirs.keys():
        x, y = ours[name], theirs[name]
        exact = x.dtype == y.dtype == torch.float64
        if not exact and name not in alone[1]:
            continue  # Adam scales rounding up where a gradient is 0
        error = torch.where(x == y, 0.0, (x - y).abs().double() / (1 + y.abs()))
        worst = error.amax().item() if error.numel() else 0.0
        require(worst < (1e-9 if exact else 1e-2),
                f"{name} of seed 3 is another among 8 seeds, by {worst:.1g}")


def _stack_and_alone(subject: AgentUnderTest, dtype: torch.dtype) -> list[tuple[Any, Metrics]]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return [subject.trained(seeds) for seeds in (range(8), (3,))]
    finally:
        torch.set_default_dtype(default)


@check("a NaN stays in its seed, and its metrics show it")
def _nan(subject: AgentUnderTest) -> None:
    clean, spoilt = (subject.trained(SEEDS, nan_seed) for nan_seed in (None, 1))
    for index in (0, 2):
        one, other = (seed_slices(trained, index, len(SEEDS)) for trained in (clean, spoilt))
        require_same(one, other, f"a NaN in the rewards of seed 1 changed {{}} of seed {index}")
    shown = any(x[1].isnan() for name, x in spoilt[1].items() if name not in ACTIONS)
    require(shown, "no metric of that seed became NaN, by which a run would see it")


@check("a saved agent continues exactly")
def _resume(subject: AgentUnderTest) -> None:
    steps, agents = subject.steps(SEEDS), [subject.make(), subject.make((5, 6, 7))]
    first, second = steps[: STEPS // 2 + 3], steps[STEPS // 2 + 3 :]  # amid a rollout
    drive(agents[0], first)
    forgotten = not_in_state(agents[0], subject.make())
    file = io.BytesIO()
    torch.save(save_state(agents[0]), file)
    file.seek(0)
    restore_state(agents[1], torch.load(file, map_location=subject.device, weights_only=True))
    for agent in agents:
        drive(agent, second)
    ours, theirs = (subject.acts(x, len(SEEDS)) | flat_state(save_state(x)) for x in agents)
    hint = f"; STATE does not name {', '.join(forgotten)}, which changed" if forgotten else ""
    require_same(ours, theirs, f"after a restored checkpoint {{}} differs from the original{hint}")


def not_in_state(agent: Any, fresh: Any) -> list[str]:
    """Attributes that training changed and that STATE does not name."""
    def leaves(owner: Any, name: str) -> dict[str, Any]:
        try:
            return flat_state(save_state(SimpleNamespace(STATE=("x",), x=getattr(owner, name))))
        except TypeError:  # nothing that a STATE can hold
            return {}

    return [name for name, x in vars(agent).items()
            if name not in getattr(agent, "STATE", vars(agent))
            and (isinstance(x, torch.nn.Module) or not callable(x))
            and any(True for _ in differing(leaves(agent, name), leaves(fresh, name)))]


def require_best(subject: AgentUnderTest, state: int, mistake: str) -> None:
    chosen = subject.decisions[0][state]
    scale = f"from -1, wrong, to 1, best, it chose {chosen:.2f}"
    require(math.isfinite(chosen) and abs(chosen) > 0.2, f"it did not learn to decide: {scale}")
    require(chosen > 0, f"{mistake}: {scale}")


@check("a truncation bootstraps")
def _truncation(subject: AgentUnderTest) -> None:
    require_best(subject, probes.TRUNCATED, "what lies behind a truncation had no value")


@check("a termination does not bootstrap")
def _termination(subject: AgentUnderTest) -> None:
    require_best(subject, probes.TERMINATED, "what lies behind a termination had a value")


@check("the successor is the true next_obs")
def _successor(subject: AgentUnderTest) -> None:
    require_best(subject, probes.SUCCESSOR,
                 "the next episode's beginning was taken for the successor")


@check("a full replay does not join its newest to its oldest")
def _ring(subject: AgentUnderTest) -> None:
    rows = subject.decisions[1]
    require(rows <= RING_ROWS, f"not seen, because its replay has {rows} rows and no setting "
                               f"buffer_size that bounds it to {RING_ROWS}")
    require_best(subject, probes.RING,
                 "the oldest observation was taken for the newest one's successor")


@check("learns where the optimum is known")
def _learns(subject: AgentUnderTest) -> None:
    """To less than half of the cost of the best constant action, each seed."""
    evaluation = make_envs("lab/Target-v0", SEEDS, 20, device=subject.device)
    reached = [-math.inf]

    def learnt(agent: object) -> bool:
        reached[:] = evaluate(agent, evaluation, 1)
        return min(reached) > probes.BEST_CONSTANT / 2

    require(subject.train("lab/Target-v0", learnt),
            f"return {min(reached):.3f} in its worst seed, where the optimum is 0 and "
            f"{probes.BEST_CONSTANT:.3f} needs no observation")
