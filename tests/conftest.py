import shutil
import signal
from pathlib import Path

import pytest
import torch

from lab import agent_file
from lab.gym_envs import EnvSpec

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
AGENTS = sorted(Path("agents").glob("*.py"))
# Small and fast, for the tests; an agent takes those that its Config has.
SMALL = {"batch_size": 16, "actor_width": 16, "qf_width": 16, "width": 16, "learning_starts": 8,
         "num_steps": 8, "num_minibatches": 4, "update_epochs": 2}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def make_spec(obs_dim=3, low=(-1.0, 0.0), high=(1.0, 4.0)):
    return EnvSpec("tests", obs_dim, len(low), tuple(low), tuple(high), None)


@pytest.fixture(params=AGENTS, ids=lambda path: path.stem)
def module(request):
    """Every agent in the tree, a copied one too."""
    return agent_file.load(request.param)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small_config(module, **settings):
    fields = module.Config.__dataclass_fields__
    return module.Config(**{k: v for k, v in {**SMALL, **settings}.items() if k in fields})


def make_agent(module, seeds=(0, 1), num_envs=1, total_steps=1000, accelerate=None, spec=None,
               **settings):
    return module.Agent(spec or make_spec(), small_config(module, **settings), list(seeds),
                        num_envs=num_envs, total_steps=total_steps,
                        accelerate=accelerate or (lambda fn: fn))


def make_steps(seeds, num_envs, count, obs_dim=3):
    """Transitions of made-up environments, each seed's its own whatever the stack: a list of
    (obs, rewards, next_obs, terminations, truncations)."""
    generators = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]

    def draw(*shape):
        return torch.stack([torch.rand(num_envs, *shape, generator=g) for g in generators])

    obs, steps = draw(obs_dim), []
    for _ in range(count):
        next_obs, ends = draw(obs_dim), draw()
        steps.append((obs, draw(), next_obs, (ends < 0.1).float(), (ends > 0.9).float()))
        obs = torch.where(((ends < 0.1) | (ends > 0.9))[..., None], draw(obs_dim), next_obs)
    return steps


def drive(agent, steps, spoil=None):
    """The loop of lab/rollout.py on made-up transitions -> the metrics of every update.

    `spoil` puts a NaN into the rewards of that place in the stack."""
    history = []
    for obs, rewards, next_obs, terminations, truncations in steps:
        actions = agent.act(obs)
        metrics = agent.update()
        if metrics:
            history.append({name: value.clone() for name, value in metrics.items()})
        if spoil is not None:
            rewards = rewards.clone()
            rewards[spoil] = float("nan")
        agent.observe(obs, actions, rewards, next_obs, terminations, truncations)
    return history


def flat_state(state, prefix=""):
    """Every leaf of a state_dict by its path."""
    if isinstance(state, dict) or hasattr(state, "items"):
        return {k: v for key, value in state.items()
                for k, v in flat_state(value, f"{prefix}{key}/").items()}
    if isinstance(state, list | tuple):
        return flat_state(dict(enumerate(state)), prefix)
    return {prefix[:-1]: state}


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
