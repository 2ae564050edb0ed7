"""One check for each common bug, using only the agent's public methods and its state."""

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

from lab.agent import copy_seed, restore_state, save_state, weights
from lab.check.driver import (
    ACTIONS,
    NUM_ENVS,
    OBS_DIM,
    RING_ROWS,
    SEEDS,
    STEPS,
    TASKS,
    AgentUnderTest,
    Metrics,
    differing,
    drive,
    equal,
    flat_state,
    make_steps,
    seed_slices,
)
from lab.contract import check_contract
from lab.envs import probes
from lab.envs.make import make_envs
from lab.envs.spec import EnvSpec, discrete_spec
from lab.training.evaluation import evaluate

Check = Callable[[AgentUnderTest], None]
CHECKS: dict[str, Check] = {}  # name -> check, in the order of a run


class Failed(Exception):
    """A check failed; the message is one line."""


def require(ok: bool, reason: str) -> None:
    if not ok:
        raise Failed(reason)


def require_same(ours: dict[str, Any], theirs: dict[str, Any], reason: str) -> None:
    """A {} in `reason` is replaced by the name of the first difference."""
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
def _contract(subject: AgentUnderTest) -> None:
    check_contract(subject.path, subject.config, subject.spec, NUM_ENVS, subject.device)


@check("act takes any number of environments")
def _any_number(subject: AgentUnderTest) -> None:
    agent = subject.make()
    for n in (NUM_ENVS, 1, 7):
        for explore in (True, False):
            obs = torch.zeros(len(SEEDS), n, OBS_DIM, device=subject.device)
            shape = tuple(agent.act(obs, explore=explore).shape)
            expected = len(SEEDS), n, subject.spec.action_dim
            require(shape == expected, f"act returned shape {shape}, not {expected}")


@check("actions stay within the bounds of each dimension")
def _bounds(subject: AgentUnderTest) -> None:
    """Before and after updates. In float32, centre + scale can exceed the bound."""
    if subject.actions != "continuous":
        return require_allowed(subject)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        edges = torch.rand(2, 50, generator=generator) * 10 - 5
        low, high = edges.amin(0), edges.amax(0)
        spec = EnvSpec("check", 3, 50, tuple(low.tolist()), tuple(high.tolist()), None)
        agent = subject.make(spec=spec, total_steps=10 * NUM_ENVS)
        for steps in (0, 3):
            drive(agent, subject.steps(SEEDS, steps))
            for explore, scale in ((True, 1.0), (True, 1e6), (False, 1.0), (False, 1e6)):
                obs = scale * torch.randn(len(SEEDS), NUM_ENVS, OBS_DIM, generator=generator)
                actions = agent.act(obs.to(subject.device), explore=explore).cpu()
                beyond = torch.maximum(low - actions, actions - high).amax().item()
                require(beyond <= 0, f"act(obs, explore={explore}) exceeds them by {beyond:.2g}")


def require_allowed(subject: AgentUnderTest) -> None:
    """Discrete actions are whole numbers, counted from 0, that the mask in the obs allows."""
    sizes = (2, 5) if subject.actions == "discrete" else (5,)
    agent = subject.make(spec=discrete_spec("check", 9, sizes, None, mask_start=1))
    generator = torch.Generator().manual_seed(0)
    for steps in (0, 20):
        drive(agent, [tuple(x.to(subject.device) for x in step)
                      for step in make_steps(SEEDS, NUM_ENVS, steps, 9)])
        for explore in (True, False):
            obs = torch.randn(len(SEEDS), 50, 9, generator=generator)
            masks = [torch.rand(len(SEEDS), 50, n, generator=generator).argsort(-1) < 1 + n // 2
                     for n in sizes]
            obs[..., 1 : 1 + sum(sizes)] = torch.cat(masks, -1).float()
            actions = agent.act(obs.to(subject.device), explore=explore).cpu()
            for chosen, mask in zip(actions.unbind(-1), masks, strict=True):
                known = (chosen >= 0) & (chosen < mask.shape[-1]) & (chosen == chosen.round())
                require(bool(known.all()), f"act(obs, explore={explore}) chose "
                                           f"{chosen[~known][:1].tolist()} of {mask.shape[-1]}")
                allowed = mask.gather(-1, chosen[..., None].long())
                require(bool(allowed.all()), f"act(obs, explore={explore}) chose an action that "
                                             "the mask in its observation forbids")


@check("acting without exploring changes nothing")
def _frozen(subject: AgentUnderTest) -> None:
    agent, _ = subject.trained(SEEDS)
    before = copy.deepcopy(flat_state(save_state(agent)))
    obs = torch.rand(len(SEEDS), 5, OBS_DIM).to(subject.device)
    first, second = agent.act(obs, explore=False), agent.act(obs, explore=False)
    require(torch.equal(first, second), "two calls with the same obs gave different actions")
    if hasattr(agent, "act_with_memory"):
        require_pure_memory(agent, obs)
    require(not first.requires_grad, "the action has a gradient")
    require_same(before, flat_state(save_state(agent)), "it changed {} in the agent's state")


def require_pure_memory(agent: Any, obs: torch.Tensor) -> None:
    """An episode begins with zeros as with None, and depends on nothing but obs and memory."""
    actions, memory = agent.act_with_memory(obs)
    require(torch.equal(actions, agent.act(obs, explore=False)),
            "act_with_memory begins an episode with other actions than act(obs, explore=False)")
    kept = memory.clone()
    for _ in range(2):
        again = agent.act_with_memory(obs, torch.zeros_like(memory))
        require(all(map(torch.equal, again, (actions, kept))),
                "act_with_memory with zeros does not begin an episode as without a memory")
        later = agent.act_with_memory(obs, memory)
        repeated = agent.act_with_memory(obs, memory)
        require(all(map(torch.equal, later, repeated)) and torch.equal(memory, kept),
                "act_with_memory gave other results for the same memory, or changed it")


@check("metrics are finite, detached and of shape (S,)")
def _metrics(subject: AgentUnderTest) -> None:
    history = drive(subject.make(), subject.steps(SEEDS))
    require(bool(history), f"update returned none in {NUM_ENVS * STEPS} transitions per seed")
    for metrics in history:
        for name, value in metrics.items():
            require(tuple(value.shape) == (len(SEEDS),),
                    f"{name} has shape {tuple(value.shape)}, not ({len(SEEDS)},)")
            require(not value.requires_grad, f"{name} has a gradient")
            require(bool(value.isfinite().all()), f"{name} is {value.tolist()}")


@check("updates change every weight matrix")
def _learning(subject: AgentUnderTest) -> None:
    """Target networks included. Frozen modules (requires_grad=False) are left out, unless they have
    the shapes of a trained module and are therefore taken for target networks."""
    agent = subject.make()
    before = copy.deepcopy(flat_state(save_state(agent)))
    S, frozen = len(SEEDS), frozen_on_purpose(agent)
    fixed = {f"{name}/{path}" for name, x in vars(agent).items() if isinstance(x, torch.nn.Module)
             for path, p in x.named_parameters() if not p.requires_grad}
    matrices = [name for name, x in before.items() if isinstance(x, torch.Tensor)
                and x.dim() > 2 and min(x.shape[-2:]) > 1 and len(x) % S == 0
                and name.split("/")[0] not in frozen]
    require(bool(matrices), "its state has none of shape (S, ..., in, out)")
    drive(agent, subject.steps(SEEDS))
    after = flat_state(save_state(agent))
    for name in matrices:
        for index in range(S):
            old, new = (state[name].chunk(S)[index] for state in (before, after))
            require(not torch.equal(old, new), f"{name} in its state did not change" + (
                "; a layer that is to stay fixed must be an attribute of its own"
                if name in fixed else ""))


def frozen_on_purpose(agent: Any) -> set[str]:
    """Attributes that are modules without trainable parameters and not target networks: no trained
    module has the same parameter shapes."""
    modules = {name: x for name, x in vars(agent).items() if isinstance(x, torch.nn.Module)}
    shapes = {name: [p.shape for p in x.parameters()] for name, x in modules.items()}
    trained = {name for name, x in modules.items() if any(p.requires_grad for p in x.parameters())}
    return {name for name in modules.keys() - trained
            if not any(shapes[name] == shapes[other] for other in trained)}


@check("the same seeds repeat exactly, other seeds differ")
def _repeatable(subject: AgentUnderTest) -> None:
    (_, first), (_, second), (_, other) = map(subject.trained, (SEEDS, SEEDS, (3, 4, 5)))
    require_same(first, second, "{} differs between two runs of the same seeds")
    require("the exploring action" in differing(first, other), "seeds 3 to 5 explore like 0 to 2")
    explored = first["the exploring action"]
    require(not torch.equal(*explored[:2]), "seed 1 explores like seed 0")


@check("a seed trains the same in a stack as alone")
def _alone(subject: AgentUnderTest) -> None:
    """In float64, where rounding is negligible; in float32 if the agent does not run in float64."""
    try:
        stack, alone = _stack_and_alone(subject, torch.float64)
    except Exception:
        stack, alone = _stack_and_alone(subject, torch.float32)
    ours, theirs = seed_slices(stack, 3, 8), seed_slices(alone, 0, 1)
    for name in ours.keys() & theirs.keys():
        x, y = ours[name], theirs[name]
        exact = x.dtype == y.dtype == torch.float64
        if not exact and name not in alone[1]:
            continue  # Adam amplifies rounding where a gradient is 0
        error = torch.where(equal(x, y), 0.0, (x - y).abs().double() / (1 + y.abs()))
        worst = error.amax().item() if error.numel() else 0.0
        require(worst < (1e-9 if exact else 1e-2),
                f"{name} of seed 3 is different in a stack of 8 seeds, by {worst:.1g}")


def _stack_and_alone(subject: AgentUnderTest, dtype: torch.dtype) -> list[tuple[Any, Metrics]]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return [subject.trained(seeds) for seeds in (range(8), (3,))]
    finally:
        torch.set_default_dtype(default)


@check("a NaN stays in its seed and shows in its metrics")
def _nan(subject: AgentUnderTest) -> None:
    clean, broken = (subject.trained(SEEDS, nan_seed) for nan_seed in (None, 1))
    for index in (0, 2):
        one, other = (seed_slices(trained, index, len(SEEDS)) for trained in (clean, broken))
        require_same(one, other, f"a NaN in the rewards of seed 1 changed {{}} of seed {index}")
    shown = any(x[1].isnan() for name, x in broken[1].items() if name not in ACTIONS)
    require(shown, "no metric of seed 1 became NaN, so a run would not notice")


@check("a restored agent continues exactly")
def _resume(subject: AgentUnderTest) -> None:
    steps, agents = subject.steps(SEEDS), [subject.make(), subject.make((5, 6, 7))]
    first, second = steps[: STEPS // 2 + 3], steps[STEPS // 2 + 3 :]  # in the middle of a rollout
    drive(agents[0], first)
    forgotten = not_in_state(agents[0], subject.make())
    file = io.BytesIO()
    torch.save(save_state(agents[0]), file)
    file.seek(0)
    restore_state(agents[1], torch.load(file, map_location=subject.device, weights_only=True))
    for agent in agents:
        drive(agent, second)
    ours, theirs = (subject.acts(x, len(SEEDS)) | flat_state(save_state(x)) for x in agents)
    hint = f"; STATE lacks {', '.join(forgotten)}, which changed" if forgotten else ""
    require_same(ours, theirs, f"{{}} differs after restoring a checkpoint{hint}")


@check("its weights alone are its policy")
def _policy(subject: AgentUnderTest) -> None:
    """As --which best, --init-from and an export take them: one seed's, without the rest of STATE.
    """
    trained, S = subject.trained(SEEDS)[0], len(SEEDS)
    if not weights(trained):  # it saves itself
        return
    stacked = subject.acts(trained, S)["the action"]
    for index, seed in enumerate(SEEDS):
        alone = subject.make([seed])
        copy_seed(weights(alone), (1, 0), weights(trained), (S, index))
        gap = (subject.acts(alone, 1)["the action"][0] - stacked[index]).abs().amax().item()
        require(gap < 1e-3, f"with the weights of seed {seed}, a new agent acts {gap:.2g} off: "
                "what act reads must be in STATE, in a module or a tensor with a gradient")


def not_in_state(agent: Any, fresh: Any) -> list[str]:
    """Attributes that training changed and that STATE lacks."""
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
    scale = f"from -1 (wrong) to 1 (best), it chose {chosen:.2f}"
    require(math.isfinite(chosen) and abs(chosen) > 0.2, f"it did not learn the task: {scale}")
    require(chosen > 0, f"{mistake}: {scale}")


@check("a truncation bootstraps")
def _truncation(subject: AgentUnderTest) -> None:
    require_best(subject, probes.TRUNCATED, "it cut the bootstrap at a truncation")


@check("a termination does not bootstrap")
def _termination(subject: AgentUnderTest) -> None:
    require_best(subject, probes.TERMINATED, "it bootstrapped at a termination")


@check("advantages stop at the end of an episode")
def _trace(subject: AgentUnderTest) -> None:
    require_best(subject, probes.TRACE, "it counted rewards of the next episode")


@check("the successor is the true next_obs")
def _successor(subject: AgentUnderTest) -> None:
    require_best(subject, probes.SUCCESSOR,
                 "it used the first observation of the next episode as next_obs")


@check("a full replay does not pair its newest row with its oldest")
def _ring(subject: AgentUnderTest) -> None:
    rows = subject.decisions[1]
    require(rows <= RING_ROWS, f"not tested: its replay has {rows} rows, and no setting "
                               f"buffer_size limits it to {RING_ROWS}")
    require_best(subject, probes.RING,
                 "it used the oldest observation as next_obs of the newest row")


@check("learns a task with a known optimum")
def _learns(subject: AgentUnderTest) -> None:
    """Each seed reaches less than half the cost of the best constant action."""
    task = TASKS[subject.actions][1]
    constant = probes.best_constant(
        probes.OneTarget if subject.actions == "one discrete" else probes.Target)
    evaluation = make_envs(task, SEEDS, 20, device=subject.device)
    reached = [-math.inf]

    def learnt(agent: object) -> bool:
        reached[:] = evaluate(agent, evaluation, 1)
        return min(reached) > constant / 2

    require(subject.train(task, learnt),
            f"the worst seed reached return {min(reached):.3f}; the optimum is 0, the best "
            f"constant action reaches {constant:.3f}")
