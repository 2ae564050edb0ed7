"""Proximal Policy Optimisation: an on-policy agent: it learns from a rollout, then drops it.

Schulman et al. 2017, arXiv 1707.06347: the clipped objective is eq. 7, advantages are eq. 11 (GAE,
arXiv 1506.02438, eq. 16). Settings and details as in CleanRL's ppo_continuous_action and in Huang
et al. 2022, "The 37 Implementation Details of PPO". RPO: Rahman and Xue, arXiv 2212.07536.
Every tensor starts with S, the seeds that train side by side; read it as 1.

Departures, each with its reason
1. A truncated episode bootstraps from V(its true last observation): the task did not end there.
2. Statistics move only between updates: a rollout is read as it was acted, the first one raw.
3. A seed that passes target_kl keeps its weights for the rest of the update while the others go on;
   Adam's step count goes on for all, so that no seed feels its neighbours.

    python learn_simple.py agents/ppo.py --env LunarLanderContinuous-v3 --steps 500_000 --log
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Config:
    gamma: float = 0.99  # discount a step
    gae_lambda: float = 0.95  # weight of long advantages against short ones
    # Rollout and schedule
    num_steps: int | None = None  # of each environment in a rollout; none: 2048 over all, 16 each
    num_minibatches: int = 32  # gradient steps in an epoch
    micro_batches: int = 1  # parts in which a minibatch is read, where memory is short
    update_epochs: int = 10  # passes over a rollout
    # Optimisation
    lr: float = 3e-4  # Adam step size
    anneal_lr: bool = True  # step size falls linearly to 0 over the run
    clip_coef: float = 0.2  # range of the probability ratio around 1
    clip_vloss: bool = True  # clip the value's change as well
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.0  # weight of the entropy bonus
    max_grad_norm: float = 0.5  # gradient norm of one seed
    target_kl: float | None = None  # a seed above it stops its update after the epoch; none: never
    rpo_alpha: float = 0.0  # RPO: half-width of the uniform noise on the mean while updating
    # Normalisation
    norm_obs: bool = True  # observations to mean 0, variance 1, clipped to 10
    norm_reward: bool = True  # rewards by the deviation of the discounted return, clipped to 10
    norm_adv: bool = True  # advantages of each minibatch to mean 0, variance 1
    # Networks
    width: int = 64  # units of each of the two hidden layers of actor and critic


def randn(generators, *shape):
    """-> (S, *shape) standard normal numbers, seed s from its own generator."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def scan(x, decay, start):
    """y[t] = x[t] + decay[t] * y[t - 1] with y[-1] = start: (S, T, N), (S, T, N), (S, N)."""
    y = torch.empty_like(x)
    for t in range(x.shape[1]):
        start = torch.addcmul(x[:, t], decay[:, t], start, out=y[:, t])
    return y


def gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
    """All (S, T, N) -> advantages (S, T, N). 1506.02438, eq. 16.

    next_values are those of the true successors: a termination cuts the bootstrap, a truncation
    does not; either ends the trace, because the next row belongs to another episode.
    """
    deltas = rewards + gamma * (1 - terminations) * next_values - values
    trace = gamma * gae_lambda * (1 - torch.maximum(terminations, truncations))
    return scan(deltas.flip(1), trace.flip(1), torch.zeros_like(deltas[:, 0])).flip(1)


@torch.no_grad()
def plasticity(name, network, hidden):
    """How well a network can still learn: metrics (S,) from the activations of its hidden layers.

    hidden: (S * copies, B, units) each. A dead unit has one output for the whole batch; a dormant
    one is active no more than 0.025 times as much as its layer's mean: 2302.12902, definition 3.1.
    """
    weights = torch.cat([p.flatten(1) for p in network.parameters()], 1)
    activity = [x.abs().mean(1) for x in hidden]
    dead = [x.amax(1) == x.amin(1) for x in hidden]
    dormant = [x <= 0.025 * x.mean(1, keepdim=True) for x in activity]
    return {f"plasticity/{name}_weight_magnitude": weights.abs().mean(1)} | {
        f"plasticity/{name}_{kind}": torch.cat(
            [x.view(len(weights), -1) for x in units], 1).to(weights.dtype).mean(1)
        for kind, units in (("dead_units", dead), ("dormant_ratio", dormant))}


def gaussian_log_probs(actions, mean, log_std):
    """(S, B, A) -> (S, B)."""
    z = (actions - mean) * (-log_std).exp()
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


class Linear(nn.Module):
    """One dense layer a seed, orthogonal with the given gain: (S, B, in) -> (S, B, out)."""

    def __init__(self, generators, fan_in, fan_out, gain=2**0.5):
        super().__init__()
        q, r = torch.linalg.qr(randn(generators, max(fan_in, fan_out), min(fan_in, fan_out)))
        q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None]  # uniform over orthogonal matrices
        q = q if fan_in >= fan_out else q.mT
        self.weight = nn.Parameter(gain * q.contiguous())  # (S, in, out)
        self.bias = nn.Parameter(torch.zeros_like(self.weight[:, :1]))  # (S, 1, out)

    def forward(self, x):
        weight, bias = self.weight, self.bias
        if weight.shape[-1] == 1:  # a value, not in bf16, which counts in twos from 256 on
            return (x * weight.mT).sum(-1, keepdim=True) + bias
        return torch.baddbmm(bias, x, weight)


class Network(nn.Module):
    """(S, B, O) -> (S, B, out)."""

    def __init__(self, generators, obs_dim, width, out_dim, gain):
        super().__init__()
        self.fc1 = Linear(generators, obs_dim, width)
        self.fc2 = Linear(generators, width, width)
        self.head = Linear(generators, width, out_dim, gain)

    def hidden(self, x):
        """-> the activations of each hidden layer, (S, B, width)."""
        first = torch.tanh(self.fc1(x))
        return first, torch.tanh(self.fc2(first))

    def forward(self, x):
        return self.head(self.hidden(x)[-1]).type_as(x)  # not in bf16


class Normaliser(nn.Module):
    """Running mean and variance of each seed. The parallel update is Chan et al. 1979, eq. 2.1."""

    def __init__(self, seeds, dim, device):
        super().__init__()
        self.register_buffer("mean", torch.zeros(seeds, 1, dim, device=device))
        self.register_buffer("var", torch.ones(seeds, 1, dim, device=device))
        self.register_buffer("count", torch.zeros(seeds, 1, 1, device=device))

    def update(self, x):
        """x (S, B, dim)."""
        var, mean = torch.var_mean(x, 1, keepdim=True, correction=0)
        share = x.shape[1] / (self.count + x.shape[1])
        step = mean - self.mean
        # in place: compiled code and checkpoints hold on to these tensors
        self.var.copy_((1 - share) * self.var + share * var + share * (1 - share) * step.square())
        self.mean.add_(share * step)
        self.count.add_(x.shape[1])

    def scale(self, x):
        return (x * (self.var + 1e-8).rsqrt()).clamp(-10, 10)


def validate(config, num_envs):
    """-> steps of each environment in a rollout. ValueError that names the field and the value."""
    for low, high, names in (
            (1, 1e9, "num_steps num_minibatches micro_batches update_epochs width"),
            (0, 1, "gamma gae_lambda"),
            (0, 1e9, "lr clip_coef vf_coef ent_coef max_grad_norm rpo_alpha")):
        for name in names.split():
            value = getattr(config, name)
            if (value is not None or name != "num_steps") and not low <= value <= high:
                raise ValueError(f"{name} must lie in [{low}, {high:g}], not {value}")
    steps, parts = config.num_steps, config.num_minibatches
    if steps is None:  # whole minibatches of it
        unit = parts // math.gcd(parts, num_envs)
        steps = unit * math.ceil(max(16, 2048 / num_envs) / unit)
    if config.norm_adv and parts >= steps * num_envs:
        raise ValueError(f"num_minibatches must leave norm_adv two rows in each of them, "
                         f"{parts} does not")
    if steps * num_envs % parts:
        raise ValueError(f"num_minibatches must divide num_steps x num_envs = "
                         f"{steps} x {num_envs}, {parts} does not")
    return steps


class Agent:
    name = "ppo"

    def __init__(self, spec, config, seeds, num_envs=1, total_steps=1_000_000, device="cpu",
                 accelerate=lambda fn: fn):
        T = validate(config, num_envs)
        self.spec, self.config, self.num_envs = spec, config, num_envs
        self.total_steps, self.device = total_steps, torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(int(seed)) for seed in seeds]
        S, O, A = len(seeds), spec.obs_dim, spec.action_dim

        self.actor = Network(self.generators, O, config.width, A, gain=0.01)
        self.critic = Network(self.generators, O, config.width, 1, gain=1.0)
        self.log_std = torch.zeros(S, 1, A, device=self.device, requires_grad=True)
        self.parameters = [*self.actor.parameters(), *self.critic.parameters(), self.log_std]
        self.optimizer = torch.optim.Adam(
            self.parameters, fused=True, capturable=self.device.type == "cuda", eps=1e-5,
            lr=torch.tensor(config.lr, dtype=torch.float32, device=self.device))
        self.obs_normaliser = Normaliser(S, O, self.device)
        self.return_normaliser = Normaliser(S, 1, self.device)
        self.returns = torch.zeros(S, num_envs, device=self.device)  # of the running episodes

        self.low, self.high = (torch.tensor(bound, device=self.device)
                               for bound in (spec.action_low, spec.action_high))
        self.rollout = torch.zeros(S, T, num_envs, O + A + 1 + O + 3, device=self.device)
        self.filled = self.transitions = 0  # rows of the rollout; transitions of one seed
        # unclipped actions and log-probs, between act and observe: an update may come between, and
        # acts for other environments before
        self.acted = torch.zeros(S, 0, A + 1, device=self.device)
        self.minibatch_step = accelerate(self._update_minibatch)

    def normalise(self, obs):
        stats = self.obs_normaliser
        return stats.scale(obs - stats.mean) if self.config.norm_obs else obs

    @torch.no_grad()
    def act(self, obs, explore=True):
        """obs (S, N, O) -> actions (S, N, A), clipped to the bounds; the mean if not exploring."""
        actions = self.actor(self.normalise(obs))
        if explore:
            noise = randn(self.generators, obs.shape[1], self.spec.action_dim)
            mean, actions = actions, actions + self.log_std.exp() * noise
            log_probs = gaussian_log_probs(actions, mean, self.log_std)
            acted = torch.cat([actions, log_probs[..., None]], -1)
            self.acted = torch.cat([self.acted, acted], 1)[:, -self.num_envs :]
        return actions.clamp(self.low, self.high)

    def observe(self, obs, actions, rewards, next_obs, terminations, truncations):
        """One step, each (S, N, ...), after the last exploring acts for these environments: it
        stores their unclipped actions."""
        if self.acted.shape[1] != self.num_envs:
            raise ValueError("observe needs an act(explore=True) on its environments before it")
        flags = torch.stack([rewards, terminations, truncations], -1)
        self.rollout[:, self.filled] = torch.cat([obs, self.acted, next_obs, flags], -1)
        self.acted = self.acted[:, :0]
        self.filled += 1
        self.transitions += self.num_envs

    def update(self):
        """Learn from a full rollout, a step after it is full -> metrics, each (S,); else {}."""
        if self.filled < self.rollout.shape[1]:
            return {}
        self.filled = 0
        if self.config.anneal_lr:
            done = (self.transitions - self.rollout[0, :, :, 0].numel()) / self.total_steps
            self.optimizer.param_groups[0]["lr"].fill_(self.config.lr * max(0.0, 1 - done))
        obs, samples, explained = self._prepare_rollout()
        stopped = torch.zeros(len(obs), 1, 1, dtype=torch.bool, device=self.device)
        kept, metrics = [], {}
        for _ in range(self.config.update_epochs):
            latest = self._update_epoch(samples)
            for new, old in kept:
                new.copy_(torch.where(stopped, old, new))
            metrics = {name: torch.where(stopped[:, 0, 0], metrics.get(name, value), value)
                       for name, value in latest.items()}
            if self.config.target_kl is not None:
                stopped |= (metrics["policy/approx_kl"] > self.config.target_kl)[:, None, None]
                kept = [(x, x.clone()) for x in self._learned()]
        inputs = samples[:, : len(samples[0]) // self.config.num_minibatches, : self.spec.obs_dim]
        for name, network in (("actor", self.actor), ("critic", self.critic)):
            metrics |= plasticity(name, network, network.hidden(inputs))
        self.obs_normaliser.update(obs)
        return metrics | {"value/explained_variance": explained}

    @torch.no_grad()
    def _prepare_rollout(self):
        """-> raw obs (S, T N, O), rows to learn from (S, T N, ...), explained variance (S,)."""
        O, A = self.spec.obs_dim, self.spec.action_dim
        obs, acted, next_obs, _ = self.rollout.flatten(1, 2).split([O, A + 1, O, 3], -1)
        rewards, terminations, truncations = self.rollout[..., -3:].unbind(-1)
        if self.config.norm_reward:
            rewards = self._normalise_rewards(rewards, torch.maximum(terminations, truncations))
        inputs = self.normalise(obs)
        values = self.critic(inputs)
        next_values = self.critic(self.normalise(next_obs)).view_as(rewards)
        advantages = gae(rewards, values.view_as(rewards), next_values, terminations, truncations,
                         self.config.gamma, self.config.gae_lambda).view_as(values)
        returns = advantages + values
        explained = 1 - advantages.var(1) / returns.var(1)
        samples = torch.cat([inputs, acted, advantages, returns, values], -1)
        return obs, samples, explained.squeeze(1)

    def _normalise_rewards(self, rewards, ends):
        """Divide by the deviation of the discounted return, which starts anew at each episode."""
        goes_on = 1 - torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)
        returns = scan(rewards, self.config.gamma * goes_on, self.returns)
        self.returns = returns[:, -1] * (1 - ends[:, -1])
        self.return_normaliser.update(returns.flatten(1)[..., None])
        return self.return_normaliser.scale(rewards)

    def _update_epoch(self, samples):
        """Every row of every seed once, in minibatches. samples (S, T N, ...)."""
        rows, size = samples.shape[1], samples.shape[1] // self.config.num_minibatches
        order = torch.stack([torch.randperm(rows, generator=g, device=self.device)
                             for g in self.generators])
        shuffled = samples.gather(1, order[..., None].expand_as(samples))
        shifts = torch.zeros_like(shuffled[..., : self.spec.action_dim])
        if self.config.rpo_alpha:
            uniform = torch.special.ndtr(randn(self.generators, *shifts.shape[1:]))
            shifts = self.config.rpo_alpha * (2 * uniform - 1)
        for start in range(0, rows, size):
            part = slice(start, start + size)
            metrics = self.minibatch_step(shuffled[:, part], shifts[:, part])
        return metrics

    def _update_minibatch(self, samples, shifts):
        if self.config.norm_adv:
            *others, mb_advantages, mb_returns, mb_values = samples.split(
                [samples.shape[2] - 3, 1, 1, 1], -1)
            mb_advantages = mb_advantages - mb_advantages.mean(1, keepdim=True)
            mb_advantages = mb_advantages / (mb_advantages.std(1, keepdim=True) + 1e-8)
            samples = torch.cat([*others, mb_advantages, mb_returns, mb_values], -1)
        rows, parts = samples.shape[1], self.config.micro_batches
        *before, last = zip(samples.chunk(parts, 1), shifts.chunk(parts, 1), strict=True)
        metrics = [self._accumulate(*part, rows) for part in before]
        loss, latest = self._losses(*last, rows)
        loss.sum().backward()  # the sum over seeds gives each seed exactly its own gradient
        self._clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()  # last: compilation needs one graph up to here
        return {name: sum([x[name] for x in metrics], value) for name, value in latest.items()}

    def _accumulate(self, samples, shifts, rows):
        """Add to the gradients those of one micro-batch; not the last, which ends the update."""
        loss, metrics = self._losses(samples, shifts, rows)
        loss.sum().backward()
        return metrics

    def _losses(self, samples, shifts, rows):
        """What samples (S, B, ...) add to the loss (S,) of a minibatch of `rows`, and its parts."""
        c, O, A = self.config, self.spec.obs_dim, self.spec.action_dim
        mb_inputs, mb_actions, *scalars = samples.split([O, A, 1, 1, 1, 1], -1)
        mb_log_probs, mb_advantages, mb_returns, mb_values = (x.squeeze(-1) for x in scalars)
        log_probs = gaussian_log_probs(mb_actions, self.actor(mb_inputs) + shifts, self.log_std)
        assert log_probs.shape == mb_log_probs.shape, (log_probs.shape, mb_log_probs.shape)
        log_ratio = log_probs - mb_log_probs
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - c.clip_coef, 1 + c.clip_coef)
        policy_loss = -torch.minimum(mb_advantages * ratio, mb_advantages * clipped).mean(1)

        values = self.critic(mb_inputs).squeeze(-1)
        assert values.shape == mb_returns.shape, (values.shape, mb_returns.shape)
        errors = (values - mb_returns).square()
        if c.clip_vloss:
            near = mb_values + (values - mb_values).clamp(-c.clip_coef, c.clip_coef)
            errors = torch.maximum(errors, (near - mb_returns).square())
        value_loss = 0.5 * errors.mean(1)
        entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum((1, 2))

        loss = policy_loss + c.vf_coef * value_loss - c.ent_coef * entropy  # (S,)
        approx_kl = (ratio - 1 - log_ratio).mean(1)  # Schulman's k3, never negative
        share = samples.shape[1] / rows
        return share * loss, {name: share * x.detach() for name, x in {
            "loss/policy": policy_loss, "loss/value": value_loss, "policy/entropy": entropy,
            "policy/approx_kl": approx_kl}.items()}

    def _clip_gradients(self):
        """Scale each seed's gradient down to max_grad_norm, by itself."""
        grads = [p.grad for p in self.parameters]
        norms = torch.stack([torch.linalg.vector_norm(g, dim=(1, 2), keepdim=True) for g in grads])
        scale = self.config.max_grad_norm / (norms.square().sum(0).sqrt() + 1e-6)  # (S, 1, 1)
        torch._foreach_mul_(grads, [scale.clamp(max=1)] * len(grads))

    def _learned(self):
        """What a stopped seed keeps: its weights and Adam's moments, each (S, in, out)."""
        return [x for p in self.parameters for x in (p.data, *self.optimizer.state[p].values())
                if x.dim() == 3]

    PARTS = ("actor", "critic", "optimizer", "obs_normaliser", "return_normaliser")
    TENSORS = ("log_std", "returns", "rollout")

    def state_dict(self):
        """Everything that the future depends on, by reference."""
        return {name: getattr(self, name).state_dict() for name in self.PARTS} | {
            "tensors": {name: getattr(self, name).detach() for name in self.TENSORS},
            "counters": {"filled": self.filled, "transitions": self.transitions},
            "generators": [g.get_state() for g in self.generators],
        }

    def load_state_dict(self, state):
        """Continue exactly where `state` was taken. ValueError if the rollout has another shape."""
        if state["tensors"]["rollout"].shape != self.rollout.shape:
            raise ValueError(f"rollout is {tuple(self.rollout.shape)}, the checkpoint's is "
                             f"{tuple(state['tensors']['rollout'].shape)}: same envs and seeds?")
        for name in self.PARTS:
            getattr(self, name).load_state_dict(copy.deepcopy(state[name]))  # Adam keeps it
        for name in self.TENSORS:
            getattr(self, name).data.copy_(state["tensors"][name])
        self.filled, self.transitions = (state["counters"][k] for k in ("filled", "transitions"))
        for generator, generator_state in zip(self.generators, state["generators"], strict=True):
            generator.set_state(generator_state.cpu())
