"""An agent that learns nothing: a run of it, written before lab/ was moved, lies beside it."""

import signal
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Config:
    gain: float = 0.5  # of the actions


class Agent:
    def __init__(self, spec, config, seeds, num_envs=1, total_steps=1_000_000, device="cpu",
                 accelerate=lambda fn: fn):
        self.gain, self.device = config.gain, device
        self.action_dim = spec.action_dim
        self.updates = torch.zeros(len(seeds), device=device)
        self.count = accelerate(lambda updates: updates + 1)

    def act(self, obs, explore=True):
        return (self.gain * obs[..., :1]).clamp(-1, 1).expand(*obs.shape[:-1], self.action_dim)

    def observe(self, obs, actions, rewards, next_obs, terminations, truncations):
        pass

    def update(self):
        self.updates = self.count(self.updates)
        if len(self.updates) == 2 and self.updates[0] == 30 and Path("stop").exists():
            signal.raise_signal(signal.SIGTERM)
        return {"debug/updates": self.updates.clone()}

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"].to(self.device)
