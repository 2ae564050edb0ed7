"""Plasticity: how well a network can still learn, from the activations of its hidden layers."""

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def measure(agent: Any) -> dict[str, Tensor]:
    """-> metrics, (S,) each, of the networks in agent.hidden_activations(); {} without that method.

    Call it after an update. It draws no random numbers and does not affect training.
    """
    if not hasattr(agent, "hidden_activations"):
        return {}
    metrics: dict[str, Tensor] = {}
    for name, hidden in agent.hidden_activations().items():
        metrics |= plasticity(name, getattr(agent, name), hidden)
    return metrics


@torch.no_grad()
def plasticity(name: str, network: nn.Module, hidden: list[Tensor]) -> dict[str, Tensor]:
    """hidden: the activations (S * copies, B, units) of each hidden layer -> metrics, (S,) each.

    A dead unit has the same output for the whole batch. A dormant unit has a mean absolute output
    of at most 0.025 times the mean of its layer: arXiv 2302.12902, definition 3.1.
    """
    weights = torch.cat([p.flatten(1) for p in network.parameters()], 1)  # (S, ...)
    activity = [x.abs().mean(1) for x in hidden]  # (S * copies, units)
    dead = [x.amax(1) == x.amin(1) for x in hidden]
    dormant = [x <= 0.025 * x.mean(1, keepdim=True) for x in activity]

    def share(units: list[Tensor]) -> Tensor:
        return torch.cat([x.view(len(weights), -1) for x in units], 1).to(weights.dtype).mean(1)

    return {f"plasticity/{name}_weight_magnitude": weights.abs().mean(1),
            f"plasticity/{name}_dead_units": share(dead),
            f"plasticity/{name}_dormant_ratio": share(dormant)}
