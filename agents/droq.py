"""DroQ: Soft Actor-Critic with many gradient steps per transition, on regularised critics.

Hiraoka et al. 2022, arXiv 2110.02034. Differences from sac.py:
1. Dropout, then layer normalisation, in the critics (section 3). Units are drawn with replacement.
2. 20 critic steps per transition and one actor step, on the mean of the critics (algorithm 2).

Every tensor starts with S, the seeds that train side by side, and inside the critics with S x 2,
two critics for each seed; read S as 1.

Departures from the paper, each with its reason
1. The first actions are uniform, so early data is not biased by an untrained policy.
2. log_std is squashed by a tanh, as in CleanRL: a hard clamp has no gradient outside its range.
3. The target entropy is that of actions in environment units, as in CleanRL, not in [-1, 1].
4. The critics and the temperature learn faster (1e-3) than the actor (3e-4), as in CleanRL.

    python learn_simple.py agents/droq.py --env Hopper-v5 --seeds 8 --steps 20_000 --log
"""

import copy
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

LOG_STD_MIN, LOG_STD_MAX = -5, 2


@dataclass(frozen=True)
class Config:
    gamma: float = 0.99  # discount factor
    # Replay and schedule
    buffer_size: int = 1_000_000  # transitions of one seed; at most the run's steps are allocated
    learning_starts: int = 5_000  # random transitions before learning; at most a tenth of the run
    replay_ratio: float = 20.0  # gradient steps per transition
    policy_delay: int = 20  # critic steps per actor step
    batch_size: int = 256  # transitions per gradient step
    # Optimisation
    actor_lr: float = 3e-4  # Adam's learning rate for the actor
    qf_lr: float = 1e-3  # Adam's learning rate for the critics and the temperature
    tau: float = 0.005  # step of the target critics towards the critics
    # Policy
    tune_alpha: bool = True  # learn the temperature; otherwise keep it at alpha
    alpha: float = 1.0  # initial temperature: the weight of entropy against reward
    target_entropy: float = -1.0  # nats per action dimension, in environment units
    # Networks
    actor_width: int = 256  # units in each of the actor's two hidden layers
    qf_width: int = 256  # units in each of a critic's two hidden layers
    dropout: float = 0.01  # fraction of the critics' hidden units that is dropped


RANGES = {  # lowest and highest value allowed
    "buffer_size": (1, 1e9), "learning_starts": (0, 1e9), "replay_ratio": (0, 1e9),
    "policy_delay": (1, 1e9), "batch_size": (1, 1e9), "gamma": (0, 1), "alpha": (0, 1e9),
    "actor_lr": (0, 1e9), "qf_lr": (0, 1e9), "actor_width": (1, 1e9), "qf_width": (1, 1e9),
    "target_entropy": (-1e9, 1e9),
    "tau": (0, 1),
    "dropout": (0, 0.9),
}


def randn(generators, *shape):
    """-> (S, *shape) standard normal noise, each seed's from its own generator."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def td_target(rewards, terminations, next_values, gamma):
    """All (S, B). Only a termination stops the bootstrap; a truncation does not."""
    return rewards + gamma * (1 - terminations) * next_values


def squashed_log_probs(x, noise, log_std, log_scale):
    """Log-density of scale * tanh(x), x = mean + std * noise: (S, B, A) -> (S, B)."""
    # Change of variables, 1812.05905, appendix C: log p(x) - log |d(scale * tanh(x)) / dx|
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    # computed from x, it stays exact where tanh(x) rounds to 1
    log_jacobian = 2 * (math.log(2) - x - F.softplus(-2 * x)) + log_scale
    return (log_normal - log_jacobian).sum(-1)


class Linear(nn.Module):
    """`copies` dense layers for each seed: (S * copies, B, in) -> (S * copies, B, out)."""

    def __init__(self, generators, fan_in, fan_out, copies=1):
        super().__init__()
        bound = fan_in**-0.5  # as nn.Linear
        shape = (copies, fan_in + 1, fan_out)
        draws = [torch.empty(shape, device=g.device).uniform_(-bound, bound, generator=g)
                 for g in generators]
        bias, weight = torch.stack(draws).split([1, fan_in], dim=2)
        self.weight = nn.Parameter(weight.contiguous())  # (S, copies, in, out)
        self.bias = nn.Parameter(bias.contiguous())  # (S, copies, 1, out)

    def forward(self, x):
        weight, bias = self.weight.flatten(0, 1), self.bias.flatten(0, 1)
        if weight.shape[-1] == 1:  # bf16 rounds values above 256 to even numbers: sum in fp32
            return (x * weight.mT).sum(-1, keepdim=True) + bias
        return torch.baddbmm(bias, x, weight)


class MLP(nn.Module):
    """Two hidden layers, `copies` for each seed: (S * copies, B, in) -> (S * copies, B, out)."""

    def __init__(self, generators, fan_in, width, fan_out, copies=1):
        super().__init__()
        self.fc1 = Linear(generators, fan_in, width, copies)
        self.fc2 = Linear(generators, width, width, copies)
        self.head = Linear(generators, width, fan_out, copies)

    def hidden(self, x):
        """-> the activations of both hidden layers, (S * copies, B, width)."""
        h1 = self.fc1(x).relu_()  # in place: 4% of an update on a CPU
        h2 = self.fc2(h1).relu_()
        return h1, h2

    def forward(self, x):
        _, h2 = self.hidden(x)
        return self.head(h2).type_as(x)  # fp32 again, under autocast too


class DropoutNorm(nn.Module):
    """Dropout, then layer normalisation, in both critics: (S * 2, B, units) to the same."""

    def __init__(self, generators, config):
        super().__init__()
        self.p, self.shape = config.dropout, (2, config.batch_size, config.qf_width)
        ones = torch.ones(len(generators), 2, 1, config.qf_width, device=generators[0].device)
        self.weight, self.bias = nn.Parameter(ones), nn.Parameter(torch.zeros_like(ones))
        # this many draws with replacement drop each unit with probability p
        self.drops = round(math.log(1 - self.p) / math.log(1 - 1 / math.prod(self.shape)))
        self.register_buffer("dropped", ones.new_zeros(len(ones), self.drops, dtype=int), False)

    def forward(self, x):
        stack = x.view(-1, 2, *x.shape[1:])
        assert self.drops == 0 or stack.shape[1:] == self.shape, (stack.shape, self.shape)
        stack.flatten(1).scatter_(1, self.dropped[:, : self.drops], 0)
        # the norm cancels dropout's division by 1 - p, except in its eps
        normed = F.layer_norm(stack, self.shape[2:], eps=1e-5 * (1 - self.p) ** 2)
        return torch.addcmul(self.bias, normed, self.weight).flatten(0, 1)


class Actor(nn.Module):
    """obs (S, B, O), noise (S, B, A) -> actions (S, B, A), log_probs (S, B)."""

    def __init__(self, generators, spec, config):
        super().__init__()
        self.mlp = MLP(generators, spec.obs_dim, config.actor_width, 2 * spec.action_dim)
        low, high = torch.tensor([spec.action_low, spec.action_high], device=generators[0].device)
        self.register_buffer("scale", (high - low) / 2, persistent=False)
        self.register_buffer("centre", (high + low) / 2, persistent=False)
        if not (self.scale + self.centre).isfinite().all():
            raise ValueError(f"action bounds must be finite, not {spec.action_low} to "
                             f"{spec.action_high}")

    def forward(self, obs, noise):
        mean, raw_log_std = self.mlp(obs).chunk(2, dim=-1)
        middle, half_range = (LOG_STD_MAX + LOG_STD_MIN) / 2, (LOG_STD_MAX - LOG_STD_MIN) / 2
        log_std = middle + half_range * torch.tanh(raw_log_std)
        x = mean + log_std.exp() * noise
        actions = self.centre + self.scale * torch.tanh(x)
        return actions, squashed_log_probs(x, noise, log_std, self.scale.log())


class QFunctions(nn.Module):
    """Two critics: obs (S, B, O), actions (S, B, A) -> values (S, 2, B)."""

    def __init__(self, generators, spec, config):
        super().__init__()
        fan_in = spec.obs_dim + spec.action_dim
        self.mlp = MLP(generators, fan_in, config.qf_width, 1, copies=2)
        self.mlp.fc1 = nn.Sequential(self.mlp.fc1, DropoutNorm(generators, config))
        self.mlp.fc2 = nn.Sequential(self.mlp.fc2, DropoutNorm(generators, config))

    def inputs(self, obs, actions):
        return torch.cat([obs, actions], -1).repeat_interleave(2, dim=0)  # (S * 2, B, O + A)

    def forward(self, obs, actions):
        return self.mlp(self.inputs(obs, actions)).view(-1, 2, obs.shape[1])


class Replay:
    """The last `capacity` transitions of each seed; one row is one transition."""

    STATE = ("rows", "position", "size")

    def __init__(self, generators, capacity, spec):
        self.widths = [spec.obs_dim, spec.action_dim, spec.obs_dim, 1, 1]
        shape = (len(generators), capacity, sum(self.widths))
        self.rows = torch.zeros(shape, device=generators[0].device)
        self.generators, self.position, self.size = generators, 0, 0

    def add(self, obs, actions, next_obs, rewards, terminations):
        """Each (S, N, ...): N new rows for each seed; the capacity is a multiple of N."""
        end = self.position + obs.shape[1]
        flags = torch.stack([rewards, terminations.to(rewards.dtype)], -1)
        self.rows[:, self.position : end] = torch.cat([obs, actions, next_obs, flags], -1)
        self.position, self.size = end % self.rows.shape[1], max(self.size, end)

    def sample(self, batch_size):
        """-> obs, actions, next_obs (S, B, ...), rewards, terminations (S, B), with replacement."""
        seeds, capacity, width = self.rows.shape
        picks = torch.cat([
            torch.randint(self.size, (batch_size,), generator=g, device=g.device) + s * capacity
            for s, g in enumerate(self.generators)])
        batch = self.rows.view(-1, width).index_select(0, picks).view(seeds, batch_size, width)
        obs, actions, next_obs, rewards, terminations = batch.split(self.widths, -1)
        return obs, actions, next_obs, rewards.squeeze(-1), terminations.squeeze(-1)


class Agent:
    name = "droq"
    STATE = ("actor", "qf", "log_alpha", "actor_optimizer", "qf_optimizer", "alpha_optimizer",
             "qf_target",
             "replay", "generators", "transitions", "critic_steps", "learning_starts")

    def __init__(self, spec, config, seeds, num_envs=1, total_steps=1_000_000, device="cpu",
                 accelerate=lambda fn: fn):
        self.spec, self.config, self.num_envs = spec, config, num_envs
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(int(seed)) for seed in seeds]
        self.learning_starts = max(1, min(config.learning_starts, total_steps // 10))
        self.transitions = self.critic_steps = 0  # of one seed
        self.batch = None  # the last one sampled

        self.low, self.high = torch.tensor([spec.action_low, spec.action_high], device=self.device)
        self.actor = Actor(self.generators, spec, config)
        self.qf = QFunctions(self.generators, spec, config)
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        if config.tune_alpha and config.alpha == 0:
            raise ValueError("alpha must be above 0 to be tuned, not 0.0: its logarithm is learned")
        self.log_alpha = torch.full([len(seeds)], config.alpha, device=self.device).log()
        self.log_alpha.requires_grad_(config.tune_alpha)

        adam = functools.partial(
            torch.optim.Adam,
            fused=True, capturable=self.device.type == "cuda")
        self.actor_optimizer = adam(self.actor.parameters(), lr=config.actor_lr)
        self.qf_optimizer = adam(self.qf.parameters(), lr=config.qf_lr)
        self.alpha_optimizer = adam([self.log_alpha], lr=config.qf_lr)

        capacity = math.ceil(min(config.buffer_size, total_steps) / num_envs) * num_envs
        self.replay = Replay(self.generators, capacity, spec)
        self.update_critic = accelerate(self._update_critic)
        self.update_actor = accelerate(self._update_actor)

    @torch.no_grad()
    def act(self, obs, explore=True):
        """obs (S, N, O) -> actions (S, N, A) in environment units; no noise if not exploring."""
        noise = randn(self.generators, obs.shape[1], self.spec.action_dim) if explore else (
            torch.zeros(*obs.shape[:2], self.spec.action_dim, device=self.device))
        if explore and self.transitions < self.learning_starts:
            uniform = torch.special.ndtr(noise)  # the normal's distribution function
            return self.low + (self.high - self.low) * uniform
        actions, _ = self.actor(obs, noise)
        return actions.clamp(self.low, self.high)  # float rounding can overshoot the bounds

    def observe(self, obs, actions, rewards, next_obs, terminations, truncations):
        """Store one step, each (S, N, ...). Truncation does not end the task: it is not stored."""
        self.replay.add(obs, actions, next_obs, rewards, terminations)
        self.transitions += obs.shape[1]

    def update(self):
        """Take the gradient steps that are due -> metrics of the last ones, each (S,)."""
        if self.transitions < self.learning_starts:
            return {}
        seen = self.transitions - self.learning_starts + self.num_envs
        due = int(seen * self.config.replay_ratio) - self.critic_steps
        metrics = {}
        for _ in range(due):
            self._set_dropout(True, self.qf, self.qf_target)
            self.batch = self.replay.sample(self.config.batch_size)
            noise = randn(self.generators, 2, self.config.batch_size, self.spec.action_dim)
            metrics |= self.update_critic(*self.batch, noise[:, 0])
            self.critic_steps += 1
            if self.critic_steps % self.config.policy_delay == 0:
                self._set_dropout(True, self.qf)
                metrics |= self.update_actor(self.batch[0], noise[:, 1])
        return metrics

    def _set_dropout(self, dropping, *qfs):  # and draw the units to drop
        for layer in (m for qf in qfs for m in qf.modules() if isinstance(m, DropoutNorm)):
            layer.drops = layer.dropped.shape[1] if dropping else 0
            if dropping:
                for units, generator in zip(layer.dropped, self.generators, strict=True):
                    units.random_(math.prod(layer.shape), generator=generator)

    def _update_critic(self, b_obs, b_actions, b_next_obs, b_rewards, b_terminations, noise):
        # Target (1812.05905, eq. 5-6): the lower critic, plus the entropy bonus
        with torch.no_grad():
            next_actions, next_log_probs = self.actor(b_next_obs, noise)
            next_values = self.qf_target(b_next_obs, next_actions)  # (S, 2, B)
            soft_values = next_values.amin(1) - self.log_alpha.exp()[:, None] * next_log_probs
            target = td_target(b_rewards, b_terminations, soft_values, self.config.gamma)
            target = target[:, None].expand(-1, 2, -1)  # the same for both critics

        # Loss: squared error, summed over the two critics
        values = self.qf(b_obs, b_actions)  # (S, 2, B)
        assert values.shape == target.shape, (values.shape, target.shape)
        qf_loss = (values - target).square().mean(2).sum(1)  # (S,)
        metrics = {"loss/qf": qf_loss.detach(), "value/q": values.detach().mean((1, 2))}

        # Step: the sum over seeds gives each seed exactly its own gradient
        qf_loss.sum().backward()  # last to read the loss: compilation needs one graph
        self.qf_optimizer.step()
        self.qf_optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.qf_target.parameters()), list(self.qf.parameters()),
                                 self.config.tau)
        return metrics

    def _update_actor(self, b_obs, noise):
        # Policy loss (eq. 9): gradients flow through the actions; the critics' weights are fixed
        actions, log_probs = self.actor(b_obs, noise)
        frozen = {name: p.detach() for name, p in self.qf.named_parameters()}
        values = functional_call(self.qf, frozen, (b_obs, actions)).mean(1)  # (S, B)
        assert values.shape == log_probs.shape, (values.shape, log_probs.shape)
        alpha = self.log_alpha.exp()  # (S,)
        actor_loss = (alpha.detach()[:, None] * log_probs - values).mean(1)  # (S,)

        # Temperature loss (eq. 18): alpha falls while the entropy is above its target
        entropy = -log_probs.detach().mean(1)  # (S,)
        target_entropy = self.config.target_entropy * self.spec.action_dim
        alpha_loss = alpha * (entropy - target_entropy)  # (S,)
        metrics = {"loss/actor": actor_loss.detach(), "policy/entropy": entropy,
                   "policy/alpha": alpha.detach()}

        # Step: neither loss has a gradient for the other's parameters
        (actor_loss + alpha_loss).sum().backward()
        self.actor_optimizer.step()
        self.alpha_optimizer.step()
        self.actor_optimizer.zero_grad()
        self.alpha_optimizer.zero_grad()
        return metrics

    def hidden_activations(self):
        """Of the last batch, for the harness's plasticity metrics."""
        b_obs, b_actions, *_ = self.batch
        self._set_dropout(False, self.qf)  # layer norm gives a dropped unit a value again
        return {"qf": self.qf.mlp.hidden(self.qf.inputs(b_obs, b_actions)),
                "actor": self.actor.mlp.hidden(b_obs)}
