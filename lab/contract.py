"""The dry run of an agent: whether it keeps the contract of docs/own-agent.md."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lab.agent import build_agent, place_of, restore_state, save_state
from lab.envs.spec import EnvSpec
from lab.errors import CodeError, UserError, first_line
from lab.matmul import Products, RecordProducts


def check_contract(path: str | Path, config: dict[str, Any], spec: EnvSpec, num_envs: int,
                   device: str) -> Products:
    """Dry run: the first steps of a small stack, up to its first update (or a long rollout) -> the
    matrix products of that update. UserError names the method, what it should return and what it
    returned."""
    run = DryRun(path, config, spec, num_envs, device)
    actions = run.act()
    if hasattr(run.agent, "act_with_memory"):
        run.act_with_memory(actions)
    metrics = run.learn(actions)
    if metrics and hasattr(run.agent, "hidden_activations"):
        run.hidden_activations()
    run.save_and_restore()
    return run.accelerate.products


class DryRun:
    """A small stack of the agent; each method calls the agent's and checks what it returns."""

    def __init__(self, path: str | Path, config: dict[str, Any], spec: EnvSpec, num_envs: int,
                 device: str):
        self.path, self.spec = path, spec
        self.S, self.N = 3, num_envs  # 3: with 2, as many as critics, a wrong broadcast can fit
        self.accelerate = FirstCalls()
        self.agent = build_agent(path, config, spec, range(self.S), num_envs, num_envs, device,
                                 self.accelerate)
        self.obs = torch.zeros(self.S, self.N, spec.obs_dim, device=device)

    def call(self, verb: str, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except Exception as error:
            place = place_of(self.path, error) or self.path
            raise CodeError(f"{place}: {verb} failed on tensors of shape (S, N, ...) = ({self.S}, "
                            f"{self.N}, ...): {type(error).__name__}: {first_line(error)}"
                            ) from error

    def expect(self, verb: str, wanted: str, ok: bool, got: object) -> None:
        if not ok:
            raise UserError(f"{Path(self.path).name} breaks the contract: {verb} should give "
                            f"{wanted}, but gave {got}")

    def act(self) -> torch.Tensor:
        shape = (self.S, self.N, self.spec.action_dim)
        wanted = f"a tensor (S, N, A) = {shape}"
        for explore in (False, True):
            actions: torch.Tensor = self.call("act", self.agent.act, self.obs, explore=explore)
            self.expect("act", wanted, isinstance(actions, torch.Tensor), type(actions).__name__)
            self.expect("act", wanted, tuple(actions.shape) == shape, tuple(actions.shape))
            self.expect("act", f"actions of {self.obs.dtype}", actions.dtype == self.obs.dtype,
                        actions.dtype)
            self.expect("act", "actions without a gradient", not actions.requires_grad,
                        "one that has it")
        return actions

    def act_with_memory(self, actions: torch.Tensor) -> None:
        result = self.call("act_with_memory", self.agent.act_with_memory, self.obs)
        got = [tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
               for x in (result if isinstance(result, tuple) else [result])]
        self.expect("act_with_memory", f"actions and a memory, (S, N, A) = {tuple(actions.shape)} "
                    "and (S, N, M)", len(got) == 2 and got[0] == actions.shape
                    and got[1][:-1] == (self.S, self.N), got)

    def learn(self, actions: torch.Tensor) -> dict[str, torch.Tensor]:
        """Observe steps until an update gives metrics."""
        zeros, metrics = torch.zeros_like(self.obs[..., 0]), {}
        for _ in range(5_000):
            self.call("observe", self.agent.observe, self.obs, actions, zeros, self.obs, zeros,
                      zeros)
            metrics = self.call("update", self.agent.update)
            self.expect("update", "a dict of metrics", isinstance(metrics, dict),
                        type(metrics).__name__)
            if metrics:
                break
            self.call("act", self.agent.act, self.obs)
        for name, value in metrics.items():
            self.expect("update", "names with tensors", isinstance(name, str)
                        and isinstance(value, torch.Tensor), f"{name!r} with a "
                        f"{type(value).__name__}")
            self.expect("update", f"{name} of shape (S,) = ({self.S},)",
                        tuple(value.shape) == (self.S,), tuple(value.shape))
            self.expect("update", f"{name} detached", not value.requires_grad, "it with a gradient")
        return metrics

    def hidden_activations(self) -> None:
        hidden = self.call("hidden_activations", self.agent.hidden_activations)
        self.expect("hidden_activations", "a dict of lists of tensors", isinstance(hidden, dict)
                    and all(isinstance(x, torch.Tensor) for layers in hidden.values()
                            for x in layers), hidden)
        for name in hidden:
            self.expect("hidden_activations", "keys that name the agent's networks",
                        isinstance(getattr(self.agent, name, None), nn.Module), repr(name))

    def save_and_restore(self) -> None:
        state = self.call("saving its state", save_state, self.agent)
        self.expect("state_dict", "a dict", isinstance(state, dict), type(state).__name__)
        self.call("restoring its state", restore_state, self.agent, state)


class FirstCalls:
    """An accelerate for a dry run: many environments owe many gradient steps, a few will do.
    `products`: the matrix products of all the steps that were owed."""

    def __init__(self, calls: int = 2):
        self.calls, self.products = calls, Products()

    def __call__(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        results: dict[tuple[torch.Size, ...], list[Any]] = {}
        products: dict[tuple[torch.Size, ...], Products] = {}

        def step(*tensors: torch.Tensor) -> Any:
            shapes = tuple(x.shape for x in tensors)
            seen = results.setdefault(shapes, [])
            if len(seen) < self.calls:
                with RecordProducts() as recorded:
                    seen.append(fn(*tensors))
                products[shapes] = recorded.products
            self.products.update(products[shapes])
            return seen[-1]

        return step
