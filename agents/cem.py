"""CEM: CrossQ without an actor: it searches for the action with the highest value.

Differences from crossq.py (arXiv 1902.05605):
1. No actor and no entropy: the search of QT-Opt (arXiv 1806.10293, section 4.2).
2. It starts from the last result and clips its samples (iCEM, 2008.06389). Targets use fewer.
3. Its exploration noise is correlated from step to step, as DDPG's (1509.02971).

Every tensor starts with S, the seeds that train side by side, and inside the critics with S x 2,
two critics for each seed; read S as 1.

Departures from the paper, each with its reason
1. The first actions are uniform, so early data is not biased by an untrained policy.

    python learn_simple.py agents/cem.py --env Pendulum-v1 --seeds 8 --steps 10_000 --log
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Config:
    gamma: float = 0.99  # discount factor
    # Replay and schedule
    buffer_size: int = 1_000_000  # transitions of one seed; at most the run's steps are allocated
    learning_starts: int = 5_000  # random transitions before learning; at most a tenth of the run
    replay_ratio: float = 1.0  # gradient steps per transition
    batch_size: int = 256  # transitions per gradient step
    # Optimisation
    qf_lr: float = 1e-3  # Adam's learning rate for the critics
    beta1: float = 0.5  # Adam's decay of the mean gradient
    renorm: bool = True  # batch renormalisation; otherwise plain batch normalisation
    renorm_warmup: int = 100_000  # training steps before renormalisation begins
    # Policy
    iterations: int = 6  # rounds of search for each decision
    samples: int = 32  # candidates per round and action dimension
    target_iterations: int = 2  # rounds of search for each target
    target_samples: int = 8  # candidates per round and action dimension, for targets
    noise: float = 0.3  # standard deviation of exploration, in half ranges of the actions
    noise_memory: float = 0.9  # correlation of this noise from one step to the next
    # Networks
    qf_width: int = 256  # units in each of a critic's two hidden layers


RANGES = {  # lowest and highest value allowed
    "buffer_size": (1, 1e9), "learning_starts": (0, 1e9), "replay_ratio": (0, 1e9),
    "iterations": (1, 1e9), "batch_size": (1, 1e9), "gamma": (0, 1), "noise": (0, 1e9),
    "target_iterations": (1, 1e9), "qf_lr": (0, 1e9), "qf_width": (1, 1e9),
    "samples": (2, 1e9), "target_samples": (2, 1e9), "noise_memory": (0, 0.9999),
    "beta1": (0, 0.9999), "renorm_warmup": (0, 1e9),
}


def randn(generators, *shape):
    """-> (S, *shape) standard normal noise, each seed's from its own generator."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def td_target(rewards, terminations, next_values, gamma):
    """All (S, B). Only a termination stops the bootstrap; a truncation does not."""
    return rewards + gamma * (1 - terminations) * next_values


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


class BatchNorm(nn.Module):
    """Batch renormalisation of each copy, (S * copies, B, units) to the same, in fp32: 1702.03275,
    algorithm 1, r_max 3, d_max 5; plain batch normalisation for the first training steps."""

    def __init__(self, generators, config, units, copies):
        super().__init__()
        zeros = torch.zeros(len(generators), copies, 1, units, device=generators[0].device)
        self.weight, self.bias = nn.Parameter(zeros + 1), nn.Parameter(zeros.clone())
        self.register_buffer("mean", zeros.clone())
        self.register_buffer("var", zeros + 1)
        warmup = config.renorm_warmup if config.renorm else math.inf
        self.register_buffer("warmup", zeros.new_tensor(warmup))  # steps left

    def forward(self, x, train):
        weight, bias, mean, var = (
            t.flatten(0, 1) for t in (self.weight, self.bias, self.mean, self.var))
        scale, shift = (var + 1e-3).rsqrt(), bias
        if train:
            b_var, b_mean = torch.var_mean(x.type_as(var), 1, correction=0, keepdim=True)
            b_scale = (b_var + 1e-3).rsqrt()
            with torch.no_grad():
                renorm = self.warmup <= 0
                r = torch.where(renorm, (scale / b_scale).clamp(1 / 3, 3), 1.0)
                d = torch.where(renorm, ((b_mean - mean) * scale).clamp(-5, 5), 0.0)
                mean.lerp_(b_mean, 0.01)
                var.lerp_(b_var * (x.shape[1] / max(1, x.shape[1] - 1)), 0.01)  # unbiased
                self.warmup -= 1
            mean, scale, shift = b_mean, b_scale * r, bias + d * weight
        return torch.addcmul(shift - mean * scale * weight, x, scale * weight)


class MLP(nn.Module):
    """Two hidden layers, `copies` for each seed: (S * copies, B, in) -> (S * copies, B, out)."""

    def __init__(self, generators, config, fan_in, width, fan_out, copies=1):
        super().__init__()
        self.norms = nn.ModuleList(
            BatchNorm(generators, config, units, copies) for units in (fan_in, width, width))
        self.fc1 = Linear(generators, fan_in, width, copies)
        self.fc2 = Linear(generators, width, width, copies)
        self.head = Linear(generators, width, fan_out, copies)

    def hidden(self, x, train=False):
        """-> the activations of both hidden layers, (S * copies, B, width)."""
        h1 = self.fc1(self.norms[0](x, train)).relu_()  # in place: 4% of an update on a CPU
        h2 = self.fc2(self.norms[1](h1, train)).relu_()
        return h1, h2

    def forward(self, x, train):
        _, h2 = self.hidden(x, train)
        return self.head(self.norms[2](h2, train)).type_as(x)  # fp32 again, under autocast too


class QFunctions(nn.Module):
    """Two critics: obs (S, B, O), actions (S, B, A) -> values (S, 2, B)."""

    def __init__(self, generators, spec, config):
        super().__init__()
        fan_in = spec.obs_dim + spec.action_dim
        self.mlp = MLP(generators, config, fan_in, config.qf_width, 1, copies=2)

    def inputs(self, obs, actions):
        return torch.cat([obs, actions], -1).repeat_interleave(2, dim=0)  # (S * 2, B, O + A)

    def forward(self, obs, actions, train=False):
        return self.mlp(self.inputs(obs, actions), train).view(-1, 2, obs.shape[1])


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
    name = "cem"
    STATE = ("qf", "qf_optimizer", "plans", "noise",
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
        self.centre, self.scale = (self.high + self.low) / 2, (self.high - self.low) / 2
        if not (self.scale + self.centre).isfinite().all():
            raise ValueError(f"action bounds must be finite, not {spec.action_low} to "
                             f"{spec.action_high}")
        self.plans = torch.zeros(len(seeds), num_envs, spec.action_dim, device=self.device)
        self.noise = torch.zeros_like(self.plans)  # of the last actions
        self.qf = QFunctions(self.generators, spec, config)
        adam = functools.partial(
            torch.optim.Adam,
            betas=(config.beta1, 0.999),
            fused=True, capturable=self.device.type == "cuda")
        self.qf_optimizer = adam(self.qf.parameters(), lr=config.qf_lr)

        capacity = math.ceil(min(config.buffer_size, total_steps) / num_envs) * num_envs
        self.replay = Replay(self.generators, capacity, spec)
        self.update_critic = accelerate(self._update_critic)
        self.search = accelerate(self._search)

    @torch.no_grad()
    def act(self, obs, explore=True):
        """obs (S, N, O) -> actions (S, N, A) in environment units; no noise if not exploring."""
        noise = randn(self.generators, obs.shape[1], self.spec.action_dim) if explore else (
            torch.zeros(*obs.shape[:2], self.spec.action_dim, device=self.device))
        if explore and self.transitions < self.learning_starts:
            uniform = torch.special.ndtr(noise)  # the normal's distribution function
            return self.low + (self.high - self.low) * uniform
        # Exploring, the search starts from the last plan; otherwise from 0 with
        # the same samples for every observation
        c, (_, N, A) = self.config, noise.shape
        warm = explore and self.num_envs >= N
        if warm:
            noise = c.noise_memory * self.noise[:, :N] + (1 - c.noise_memory**2) ** 0.5 * noise
            self.noise.copy_(torch.cat([self.noise[:, N:], noise], 1))
        generators = self.generators if explore else [torch.Generator(self.device).manual_seed(0)]
        draws = randn(generators, c.iterations, N if explore else 1, c.samples * A, A)
        plans = self.search(obs, self.plans[:, :N] if warm else torch.zeros_like(noise), draws)
        self.plans.copy_(torch.cat([self.plans[:, N:], plans], 1) if warm else self.plans)
        actions = self.centre + self.scale * (plans + c.noise * noise)
        return actions.clamp(self.low, self.high)

    def _search(self, obs, mean, draws):
        """obs (S, B, O), guess (S, B, A), draws (S, rounds, B, K, A), S and B or 1 -> (S, B, A)."""
        std, obs = torch.ones_like(mean), obs.repeat_interleave(draws.shape[3], dim=1)
        for noise in draws.unbind(1):
            x = (mean[:, :, None] + std[:, :, None] * noise).clamp(-1, 1)  # (S, B, K, A)
            values = self.qf(obs, self.centre + self.scale * x.flatten(1, 2)).amin(1)
            best = values.view(x.shape[:3]).topk(max(2, x.shape[2] // 8)).indices
            elites = x.gather(2, best[..., None].expand(-1, -1, -1, x.shape[3]))
            converged = std.mean(-1, keepdim=True) < 0.025  # the search of this row is over
            mean = mean.where(converged, elites.mean(2))
            std = std.where(converged, elites.std(2, correction=0).clamp(min=0.01))
        return mean

    def observe(self, obs, actions, rewards, next_obs, terminations, truncations):
        """Store one step, each (S, N, ...). Truncation does not end the task: it is not stored."""
        self.plans.masked_fill_((terminations + truncations)[..., None] > 0, 0.0)
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
            self.batch = self.replay.sample(self.config.batch_size)
            c, A = self.config, self.spec.action_dim
            noise = randn(self.generators, c.target_iterations, c.batch_size,
                          c.target_samples * A, A)
            metrics |= self.update_critic(*self.batch, noise)
            self.critic_steps += 1
        return metrics

    def _update_critic(self, b_obs, b_actions, b_next_obs, b_rewards, b_terminations, noise):
        # One pass over both batches, so that they share the statistics of batch normalisation
        with torch.no_grad():
            plans = self._search(b_next_obs, torch.zeros_like(b_actions), noise)
            next_actions = self.centre + self.scale * plans
        both = torch.cat([b_obs, b_next_obs], 1), torch.cat([b_actions, next_actions], 1)
        values, next_values = self.qf(*both, train=True).chunk(2, dim=2)

        # Target: the lower critic
        with torch.no_grad():
            target = td_target(b_rewards, b_terminations, next_values.amin(1), self.config.gamma)
            target = target[:, None].expand(-1, 2, -1)  # the same for both critics

        # Loss: squared error, summed over the two critics
        assert values.shape == target.shape, (values.shape, target.shape)
        qf_loss = (values - target).square().mean(2).sum(1)  # (S,)
        metrics = {"loss/qf": qf_loss.detach(), "value/q": values.detach().mean((1, 2))}

        # Step: the sum over seeds gives each seed exactly its own gradient
        qf_loss.sum().backward()  # last to read the loss: compilation needs one graph
        self.qf_optimizer.step()
        self.qf_optimizer.zero_grad()
        return metrics

    def hidden_activations(self):
        """Of the last batch, for the harness's plasticity metrics."""
        b_obs, b_actions, *_ = self.batch
        return {"qf": self.qf.mlp.hidden(self.qf.inputs(b_obs, b_actions))}
