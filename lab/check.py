"""Whether an agent's file keeps the contract and falls into none of the known traps.

    python -m lab.check agents/mine.py                        one line for each check
    python -m lab.check agents/mine.py --tau 0.01 --cuda      its own settings are flags

The agent is seen through its five verbs alone. It is made small, where its Config has fields of
usual names; flags win over that. Exit code 0: all passed, 1: some failed, 2: bad input.
"""

import ast
import copy
import dataclasses
import io
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from lab import accelerate, agent_file, arguments, command, envs, probe_envs, rollout
from lab.gym_envs import EnvSpec, UserError
from lab.probing import (
    ACTIONS,
    NUM_ENVS,
    RING_ROWS,
    SEEDS,
    SPEC,
    STEPS,
    Metrics,
    Subject,
    differing,
    drive,
    flat_state,
    seed_slices,
    small,
)

CHECKS: dict[str, Callable[[Subject], None]] = {}  # by what they assert, in the order of a run


class Failed(Exception):
    """A check's reason, in one line."""


def require(ok: bool, reason: str) -> None:
    if not ok:
        raise Failed(reason)


def require_same(ours: dict[str, Any], theirs: dict[str, Any], reason: str) -> None:
    """In `reason` a {} stands for the name of what differs."""
    for name in differing(ours, theirs):
        raise Failed(reason.format(name))


def check(name: str) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    def add(fn: Callable[[Subject], None]) -> Callable[[Subject], None]:
        CHECKS[name] = fn
        return fn

    return add


@check("imports only the standard library, numpy and torch")
def _imports(subject: Subject) -> None:
    allowed = sys.stdlib_module_names | {"numpy", "torch"}
    for node in ast.walk(ast.parse(Path(subject.path).read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = ["." * node.level + (node.module or "")]
            for name in names:
                require(name.split(".")[0] in allowed, f"line {node.lineno} imports {name}")


@check("the five verbs give what the contract says")
def _verbs(subject: Subject) -> None:
    agent_file.check_contract(subject.path, subject.config, SPEC, NUM_ENVS, subject.device)


@check("act takes any number of environments")
def _any_number(subject: Subject) -> None:
    agent = subject.make()
    for n in (NUM_ENVS, 1, 7):
        for explore in (True, False):
            obs = torch.zeros(2, n, SPEC.obs_dim, device=subject.device)
            shape, right = tuple(agent.act(obs, explore=explore).shape), (2, n, SPEC.action_dim)
            require(shape == right, f"act gave {shape} where {right} is right")


@check("actions stay within the bounds of each dimension")
def _bounds(subject: Subject) -> None:
    """Before learning and in it. In float32, centre + scale is not always the bound."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        edges = torch.rand(2, 50, generator=generator) * 10 - 5
        low, high = edges.amin(0), edges.amax(0)
        spec = EnvSpec("check", 3, 50, tuple(low.tolist()), tuple(high.tolist()), None)
        agent = subject.make(spec=spec, total_steps=10 * NUM_ENVS)
        for steps in (0, 3):
            drive(agent, subject.steps((0, 1), steps))
            for explore, scale in ((True, 1.0), (True, 1e6), (False, 1.0), (False, 1e6)):
                obs = scale * torch.randn(2, NUM_ENVS, SPEC.obs_dim, generator=generator)
                actions = agent.act(obs.to(subject.device), explore=explore).cpu()
                beyond = torch.maximum(low - actions, actions - high).amax().item()
                require(beyond <= 0, f"act(obs, explore={explore}) left them by {beyond:.2g}")


@check("acting without exploring changes nothing")
def _frozen(subject: Subject) -> None:
    agent, _ = subject.trained((0, 1))
    before = copy.deepcopy(flat_state(agent.state_dict()))
    obs = torch.rand(2, 5, SPEC.obs_dim).to(subject.device)
    first, second = agent.act(obs, explore=False), agent.act(obs, explore=False)
    require(torch.equal(first, second), "the second action on the same observation was another")
    require(not first.requires_grad, "the action has a gradient")
    require_same(before, flat_state(agent.state_dict()), "it changed {} of the state_dict")


@check("metrics are finite, detached, one for each seed")
def _metrics(subject: Subject) -> None:
    history = drive(subject.make(), subject.steps((0, 1)))
    require(bool(history), f"update gave none in {NUM_ENVS * STEPS} transitions of each seed")
    for metrics in history:
        for name, value in metrics.items():
            require(tuple(value.shape) == (2,), f"{name} has shape {tuple(value.shape)}, not (2,)")
            require(not value.requires_grad, f"{name} has a gradient")
            require(bool(value.isfinite().all()), f"{name} is {value.tolist()}")


@check("updates change every weight matrix")
def _learning(subject: Subject) -> None:
    """A target network's, too."""
    agent = subject.make()
    before = copy.deepcopy(flat_state(agent.state_dict()))
    matrices = [name for name, x in before.items() if isinstance(x, torch.Tensor)
                and x.dim() > 2 and min(x.shape[-2:]) > 1 and len(x) % 2 == 0]
    require(bool(matrices), "state_dict holds none of shape (S, ..., in, out)")
    drive(agent, subject.steps((0, 1)))
    after = flat_state(agent.state_dict())
    for name in matrices:
        for place in (0, 1):
            old, new = (state[name].chunk(2)[place] for state in (before, after))
            require(not torch.equal(old, new), f"{name} of the state_dict stays as it was")


@check("the same seeds give the same, other seeds something else")
def _repeatable(subject: Subject) -> None:
    (_, first), (_, second), (_, other) = map(subject.trained, ((0, 1), (0, 1), (2, 3)))
    require_same(first, second, "{} was another in a second run of the same seeds")
    require("the exploring action" in differing(first, other), "seeds 2 and 3 explore as 0 and 1")
    explored = first["the exploring action"]
    require(not torch.equal(*explored), "seed 1 explores as seed 0 does")


@check("a seed in a stack trains as it does alone")
def _alone(subject: Subject) -> None:
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


def _stack_and_alone(subject: Subject, dtype: torch.dtype) -> list[tuple[Any, Metrics]]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return [subject.trained(seeds) for seeds in (range(8), (3,))]
    finally:
        torch.set_default_dtype(default)


@check("a NaN stays in its seed, and its metrics show it")
def _nan(subject: Subject) -> None:
    clean, spoilt = (subject.trained(SEEDS, spoil) for spoil in (None, 1))
    for place in (0, 2):
        one, other = (seed_slices(trained, place, len(SEEDS)) for trained in (clean, spoilt))
        require_same(one, other, f"a NaN in the rewards of seed 1 changed {{}} of seed {place}")
    shown = any(x[1].isnan() for name, x in spoilt[1].items() if name not in ACTIONS)
    require(shown, "no metric of that seed became NaN, by which a run would see it")


@check("a saved agent continues exactly")
def _resume(subject: Subject) -> None:
    steps, agents = subject.steps((0, 1)), [subject.make(), subject.make((5, 6))]
    first, second = steps[: STEPS // 2 + 3], steps[STEPS // 2 + 3 :]  # amid a rollout
    drive(agents[0], first)
    file = io.BytesIO()
    torch.save(agents[0].state_dict(), file)
    file.seek(0)
    agents[1].load_state_dict(torch.load(file, map_location=subject.device, weights_only=True))
    for agent in agents:
        drive(agent, second)
    ours, theirs = (subject.acts(x, 2) | flat_state(x.state_dict()) for x in agents)
    require_same(ours, theirs, "loaded and driven on, {} is not what it would have been")


def require_best(subject: Subject, state: int, mistake: str) -> None:
    chosen = subject.decisions[0][state]
    scale = f"from -1, wrong, to 1, best, it chose {chosen:.2f}"
    require(math.isfinite(chosen) and abs(chosen) > 0.2, f"it did not learn to decide: {scale}")
    require(chosen > 0, f"{mistake}: {scale}")


@check("a truncation bootstraps")
def _truncation(subject: Subject) -> None:
    require_best(subject, probe_envs.TRUNCATED, "what lies behind a truncation had no value")


@check("a termination does not bootstrap")
def _termination(subject: Subject) -> None:
    require_best(subject, probe_envs.TERMINATED, "what lies behind a termination had a value")


@check("the successor is the true next_obs")
def _successor(subject: Subject) -> None:
    require_best(subject, probe_envs.SUCCESSOR,
                 "the next episode's beginning was taken for the successor")


@check("a full replay does not join its newest to its oldest")
def _ring(subject: Subject) -> None:
    rows = subject.decisions[1]
    require(rows <= RING_ROWS, f"not seen, because its replay has {rows} rows and no setting "
                               f"buffer_size that bounds it to {RING_ROWS}")
    require_best(subject, probe_envs.RING,
                 "the oldest observation was taken for the newest one's successor")


@check("learns where the optimum is known")
def _learns(subject: Subject) -> None:
    """To less than half of the cost of the best constant action, each seed."""
    evaluation = envs.make("lab/Target-v0", SEEDS, 20, device=subject.device)
    reached = [-math.inf]

    def learnt(agent: object) -> bool:
        reached[:] = rollout.evaluate(agent, evaluation, 1)
        return min(reached) > probe_envs.BEST_CONSTANT / 2

    require(subject.train("lab/Target-v0", learnt),
            f"return {min(reached):.3f} in its worst seed, where the optimum is 0 and "
            f"{probe_envs.BEST_CONSTANT:.3f} needs no observation")


@dataclass(frozen=True)
class Options:
    agent: tyro.conf.Positional[str] = "agents/sac.py"  # the agent's file
    cuda: bool = False  # check it on the GPU


def parse(argv: Sequence[str]) -> Subject:
    """Small, unless the agent refuses such settings. UserError on flags that it refuses."""
    place = arguments.find_agent(argv)
    path = Options.agent if place is None else argv[place]
    module = agent_file.load(path)
    try:
        defaults = module.Config()
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: every field of Config needs a default: {error}") from error
    reduced = small(dataclasses.asdict(defaults))
    try:
        return _subject(argv, place, dataclasses.replace(defaults, **reduced))
    except ValueError:
        return _subject(argv, place, defaults)


def _subject(argv: Sequence[str], place: int | None, defaults: Any) -> Subject:
    options, config = arguments.read_flags(argv, place, Options(), defaults, __doc__)
    device = "cuda" if options.cuda else "cpu"
    accelerate.check_device(device)
    subject = Subject(options.agent, config, device)
    try:
        subject.make()
    except UserError:
        raise
    except Exception:
        pass  # the checks will say it
    return subject


def run(argv: Sequence[str]) -> int:
    """Check, print -> exit code."""
    accelerate.prepare_process()
    subject, begun, passed = parse(argv), time.monotonic(), 0
    defaults = dataclasses.asdict(agent_file.load(subject.path).Config())
    changed = [f"{name} {x}" for name, x in subject.config.items() if x != defaults[name]]
    print(f"{subject.path} with {', '.join(changed) or 'its own settings'}", flush=True)
    live = sys.stdout.isatty()
    for name, fn in CHECKS.items():
        print(f"        {name} ...\r" if live else "", end="", flush=True)
        reason = failure(fn, subject)
        passed += reason is None
        line = f"FAILED  {name}: {reason}" if reason else f"passed  {name}"
        print(line + "    " * live, flush=True)
    print(f"{passed} of {len(CHECKS)} checks passed in {time.monotonic() - begun:.0f} s")
    return 0 if passed == len(CHECKS) else 1


def failure(fn: Callable[[Subject], None], subject: Subject) -> str | None:
    """Why the check fails, in one line; None if it passes."""
    try:
        fn(subject)
        return None
    except (Failed, UserError) as error:
        return str(error).removeprefix(f"{Path(subject.path).name} breaks the contract: ")
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "")
        return f"{type(error).__name__}: {line}"


if __name__ == "__main__":
    sys.exit(command.guarded(lambda: run(sys.argv[1:])))
