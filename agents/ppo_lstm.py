"""PPO with memory: actor and critic see each observation and the output of an LSTM.

Schulman et al. 2017, arXiv 1707.06347: the clipped objective is eq. 7, the advantages are eq. 11
(GAE: arXiv 1506.02438, eq. 16). Settings and details follow CleanRL's ppo_continuous_action and
Huang et al. 2022, "The 37 Implementation Details of PPO".
Every tensor starts with S, the seeds that train side by side; read it as 1.

Departures from CleanRL, each with its reason
1. A truncated episode bootstraps from V(its true last observation): truncation does not end the
   task.
2. Observation statistics change only in updates, so that the policy learns from the inputs that it
   acted on. The first rollout is only clipped. A rollout's first action comes before the update.
   Reward statistics are those of all environments and include the rollout that they scale.
3. A seed above target_kl stops alone: its weights and Adam moments stay until the next rollout.
   Adam's step count is shared and keeps counting, so a stopped seed does not affect the others.
4. Minibatches hold whole sequences. Backpropagation stops at their start, at the stored memory.

    python learn_vectorised.py agents/ppo_lstm.py --env torch/CartPoleWithoutVelocity-v1 --log
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Config:
    gamma: float = 0.99  # discount factor of a step
    gae_lambda: float = 0.95  # GAE: 0 is the one-step TD error, 1 the Monte Carlo advantage
    # Rollout and schedule
    num_steps: int | None = None  # rollout length; none: 2048 / num_envs or more, at least 16
    seq_len: int = 16  # steps in a sequence; num_steps is a multiple of it
    num_minibatches: int = 32  # gradient steps in an epoch
    micro_batches: int = 1  # parts of a minibatch, one in memory at a time
    update_epochs: int = 10  # passes over a rollout
    # Optimisation
    lr: float = 3e-4  # Adam's learning rate
    anneal_lr: bool = True  # decrease the learning rate linearly to 0 over the run
    lr_schedule: tuple[tuple[float, float], ...] = ()  # or points (transitions, learning rate)
    clip_coef: float = 0.2  # largest change of the probability ratio from 1
    clip_vloss: bool = True  # limit the change of the value by clip_coef as well
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.0  # weight of the entropy bonus
    ent_schedule: tuple[tuple[float, float], ...] = ()  # or points (transitions, weight)
    max_grad_norm: float = 0.5  # largest gradient norm of a seed
    target_kl: float | None = None  # a seed stops after an epoch with a larger KL; none: never
    rpo_alpha: float = 0.0  # RPO: uniform noise on the mean, -this to this (arXiv 2212.07536)
    # Normalisation
    norm_obs: bool = True  # observations to mean 0 and variance 1, clipped to 10
    norm_reward: bool = True  # rewards by the deviation of the discounted return, clipped to 10
    norm_adv: bool = True  # advantages of each minibatch to mean 0 and variance 1
    # Networks
    width: int = 64  # units of each of the two hidden layers of actor and critic
    lstm_width: int = 64  # units of the LSTM


RANGES = {  # lowest and highest value, both allowed
    "gamma": (0, 1), "gae_lambda": (0, 1), "num_steps": (1, math.inf),
    "num_minibatches": (1, math.inf), "micro_batches": (1, math.inf),
    "update_epochs": (1, math.inf), "lr": (0, math.inf), "clip_coef": (0, math.inf),
    "lr_schedule": (0, math.inf), "ent_schedule": (0, math.inf),
    "vf_coef": (0, math.inf), "ent_coef": (0, math.inf), "max_grad_norm": (0, math.inf),
    "seq_len": (1, math.inf), "lstm_width": (1, math.inf),
    "target_kl": (0, math.inf), "rpo_alpha": (0, math.inf), "width": (1, math.inf)}


def rollout_length(config, num_envs):
    """-> T, steps of each environment. ValueError if its rows do not make equal minibatches."""
    T, L, parts = config.num_steps, config.seq_len, config.num_minibatches
    if T is None:  # the shortest that num_minibatches divides
        unit = L * parts // math.gcd(parts, num_envs)
        T = unit * math.ceil(max(16, 2048 / num_envs) / unit)
    if T % L or T // L * num_envs % parts or (config.norm_adv and T * num_envs == parts):
        raise ValueError(f"num_minibatches must divide num_steps / seq_len x num_envs = {T} / {L} "
                         f"x {num_envs}, with norm_adv into two rows or more: {parts} does not")
    return T


def randn(generators, *shape):
    """-> (S, *shape) standard normal noise, each seed's from its own generator."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def discounted_sums(x, discount, start):
    """y[t] = x[t] + discount[t] * y[t - 1] with y[-1] = start: (S, T, N), (S, T, N), (S, N)."""
    y, last = torch.empty_like(x), start
    for t in range(x.shape[1]):
        last = torch.addcmul(x[:, t], discount[:, t], last, out=y[:, t])
    return y


def gae(rewards, values, next_values, terminations, truncations, gamma, gae_lambda):
    """All (S, T, N) -> advantages (S, T, N). next_values are those of the true successors.

    A termination cuts the bootstrap, a truncation does not; both cut the trace to the next row.
    """
    td_errors = rewards + gamma * (1 - terminations) * next_values - values
    decay = gamma * gae_lambda * (1 - torch.maximum(terminations, truncations))
    start = torch.zeros_like(td_errors[:, 0])
    return discounted_sums(td_errors.flip(1), decay.flip(1), start).flip(1)  # last step first


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
        weight = gain * (q if fan_in >= fan_out else q.mT)
        self.weight = nn.Parameter(weight.contiguous())  # (S, in, out)
        self.bias = nn.Parameter(torch.zeros_like(self.weight[:, :1]))  # (S, 1, out)

    def forward(self, x):
        if self.weight.shape[-1] == 1:  # bf16 rounds values above 256 to even numbers
            return (x * self.weight.mT).sum(-1, keepdim=True) + self.bias  # in fp32
        return torch.baddbmm(self.bias, x, self.weight)


class Network(nn.Module):
    """Two hidden layers: (S, B, O) -> (S, B, out)."""

    def __init__(self, generators, obs_dim, width, out_dim, gain):
        super().__init__()
        self.fc1 = Linear(generators, obs_dim, width)
        self.fc2 = Linear(generators, width, width)
        self.head = Linear(generators, width, out_dim, gain)

    def hidden(self, x):
        """-> the activations of each hidden layer, (S, B, width)."""
        first = torch.tanh(self.fc1(x))
        second = torch.tanh(self.fc2(first))
        return [first, second]

    def forward(self, x):
        return self.head(self.hidden(x)[-1]).type_as(x)  # the losses are never in bf16


class LSTM(nn.Module):
    """One step of H units with forget gates: Gers et al. 2000, doi 10.1162/089976600300015015."""

    def __init__(self, generators, fan_in, units):
        super().__init__()
        self.gates, self.units = Linear(generators, fan_in + units, 4 * units, gain=1.0), units

    def forward(self, x, memory=None):
        """x (S, B, in), memory (S, B, 2 H) -> x and output (S, B, in + H), new memory. It is output
        and cell; no memory, or one of another B, counts as zeros."""
        if memory is None or memory.shape[1] != x.shape[1]:
            memory = x.new_zeros(*x.shape[:2], 2 * self.units)
        output, cell = memory.chunk(2, -1)
        gates = self.gates(torch.cat([x, output], -1)).type_as(x)  # cells are never in bf16
        forget, write, out, new = gates.chunk(4, -1)  # forget, input, output gate; candidate
        cell = (forget + 1).sigmoid() * cell + write.sigmoid() * new.tanh()  # forget bias 1
        output = out.sigmoid() * cell.tanh()
        return torch.cat([x, output], -1), torch.cat([output, cell], -1)


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
        # in place, because checkpoints refer to these tensors
        self.var.copy_((1 - share) * self.var + share * var + share * (1 - share) * step.square())
        self.mean.add_(share * step)
        self.count.add_(x.shape[1])

    def scale(self, x):
        return (x * (self.var + 1e-8).rsqrt()).clamp(-10, 10)


class Agent:
    name = "ppo_lstm"
    STATE = ("actor", "critic", "log_std", "optimizer", "obs_normaliser", "return_normaliser",
             "returns", "rollout", "filled", "transitions", "generators", "lstm", "memory")

    def __init__(self, spec, config, seeds, num_envs=1, total_steps=1_000_000, device="cpu",
                 accelerate=lambda fn: fn):
        self.spec, self.config, self.num_envs = spec, config, num_envs
        self.total_steps, self.device = total_steps, torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(int(seed)) for seed in seeds]
        S, T, O, A = len(seeds), rollout_length(config, num_envs), spec.obs_dim, spec.action_dim
        H = config.lstm_width
        self.lstm = LSTM(self.generators, O, H)
        self.actor = Network(self.generators, O + H, config.width, A, gain=0.01)
        self.critic = Network(self.generators, O + H, config.width, 1, gain=1.0)
        self.log_std = torch.zeros(S, 1, A, device=self.device, requires_grad=True)
        self.parameters = [*self.actor.parameters(), *self.critic.parameters(), self.log_std]
        self.parameters += self.lstm.parameters()
        # a tensor, so that compiled code follows its change; CUDA's fused Adam takes fp32 alone
        lr = torch.tensor(config.lr, dtype=torch.float32, device=self.device)
        self.optimizer = torch.optim.Adam(self.parameters, lr=lr, eps=1e-5, fused=True,
                                          capturable=self.device.type == "cuda")
        self.ent_coef = torch.tensor(float(config.ent_coef), device=self.device)
        self.minibatch_step = accelerate(self._update_minibatch)
        self.obs_normaliser = Normaliser(S, O, self.device)
        self.return_normaliser = Normaliser(S, 1, self.device)
        self.returns = torch.zeros(S, num_envs, device=self.device)  # discounted, so far
        self.memory = torch.zeros(S, num_envs, 2 * H, device=self.device)
        self.seen = O + 1 + 2 * H  # columns of a sample: obs, whether an episode begins, memory
        # a row: memory, obs, actions, log_probs, next_obs, rewards, terminations, truncations
        self.rollout = torch.zeros(S, T, num_envs, 2 * H + O + A + 1 + O + 3, device=self.device)
        self.filled = self.transitions = 0  # steps in the rollout; transitions of one seed
        # actions as drawn and their log_probs from act() to observe(); an update may come between
        self.acted = torch.zeros(S, 0, A + 1 + 2 * H, device=self.device)  # and the new memory
        self.last_obs = None  # the last minibatch's, as the networks read them
        self.low, self.high = torch.tensor([spec.action_low, spec.action_high], device=self.device)

    def normalise(self, obs):
        if not self.config.norm_obs:
            return obs
        return self.obs_normaliser.scale(obs - self.obs_normaliser.mean)

    def inputs(self, x):
        """x (S, B L, seen), L steps of a sequence side by side -> the networks' (S, B L, O + H)."""
        steps = x.unflatten(1, (-1, self.config.seq_len)).unbind(2)
        O, memory, inputs = self.spec.obs_dim, steps[0][..., self.spec.obs_dim + 1 :], []
        for step in steps:
            x, memory = self.lstm(step[..., :O], memory * (1 - step[..., O : O + 1]))
            inputs.append(x)
        return torch.stack(inputs, 2).flatten(1, 2)

    @torch.no_grad()
    def act_with_memory(self, obs, memory=None):
        """As act(obs, explore=False), with memory (S, N, 2 H) -> actions, the memory after them."""
        inputs, memory = self.lstm(self.normalise(obs), memory)
        return self.actor(inputs).clamp(self.low, self.high), memory

    @torch.no_grad()
    def act(self, obs, explore=True):
        """obs (S, N, O) -> actions (S, N, A), clipped to the bounds; the mean if not exploring."""
        first = self.acted.shape[1] % self.num_envs
        memory = self.memory[:, first : first + obs.shape[1]] if explore else None
        inputs, memory = self.lstm(self.normalise(obs), memory)
        mean = self.actor(inputs)
        if not explore:
            return mean.clamp(self.low, self.high)
        noise = randn(self.generators, obs.shape[1], self.spec.action_dim)
        actions = mean + self.log_std.exp() * noise
        log_probs = gaussian_log_probs(actions, mean, self.log_std)
        # environments may be acted in group by group: keep the last num_envs
        acted = torch.cat([actions, log_probs[..., None], memory], -1)
        self.acted = torch.cat([self.acted, acted], 1)[:, -self.num_envs :]
        return actions.clamp(self.low, self.high)  # the environment's; the drawn ones are stored

    def observe(self, obs, actions, rewards, next_obs, terminations, truncations):
        """One step, each (S, N, ...); actions are stored as the last acts drew them."""
        if self.acted.shape[1] != self.num_envs:
            raise ValueError("observe needs an act(explore=True) on its environments before it")
        scalars = torch.stack([rewards, terminations, truncations], -1)
        acted, memory = self.acted.tensor_split([self.spec.action_dim + 1], -1)
        self.rollout[:, self.filled] = torch.cat([self.memory, obs, acted, next_obs, scalars], -1)
        self.memory.copy_(memory * (1 - torch.maximum(terminations, truncations))[..., None])
        self.acted = self.acted[:, :0]
        self.filled += 1
        self.transitions += self.num_envs

    def update(self):
        """Learn from a full rollout, a step after it is full -> metrics, each (S,); else {}."""
        c, (S, T, N, _) = self.config, self.rollout.shape
        if self.filled < T:
            return {}
        self.filled = 0
        begun, lr = self.transitions - T * N, self.optimizer.param_groups[0]["lr"]
        if c.anneal_lr:
            lr.fill_(c.lr * max(0.0, 1 - begun / self.total_steps))
        for value, points in ((lr, c.lr_schedule), (self.ent_coef, c.ent_schedule)):
            if points:  # straight lines between them
                points = sorted(points, key=lambda point: point[0])
                value.fill_(np.interp(begun, *zip(*points, strict=True)))
        obs, samples, explained_variance = self._prepare_rollout()

        stopped, metrics = torch.zeros(S, dtype=torch.bool, device=self.device), {}
        for _ in range(c.update_epochs):
            learned = self._learned() if c.target_kl is not None else []
            before = [(x, x.clone()) for x in learned]
            epoch_metrics = self._update_epoch(samples)
            for new, old in before:  # seeds that an earlier epoch stopped stay as they were
                new.copy_(torch.where(stopped[:, None, None], old, new))
            for name, value in epoch_metrics.items():
                metrics[name] = torch.where(stopped, metrics.get(name, value), value)
            if c.target_kl is not None:
                stopped |= metrics["policy/approx_kl"] > c.target_kl

        self.obs_normaliser.update(obs)  # last: this rollout was acted with the old statistics
        return metrics | {"value/explained_variance": explained_variance}

    @torch.no_grad()
    def _prepare_rollout(self):
        """-> raw obs (S, T N, O), samples (S, T N, ...), explained variance (S,)."""
        c, O, A = self.config, self.spec.obs_dim, self.spec.action_dim
        M = self.memory.shape[2]
        memory, obs, actions, log_probs, next_obs, _ = self.rollout.split([M, O, A, 1, O, 3], -1)
        rewards, terminations, truncations = self.rollout[..., -3:].unbind(-1)  # (S, T, N)
        ends = torch.maximum(terminations, truncations)
        if c.norm_reward:
            rewards = self._normalise_rewards(rewards, ends)

        # Values of each observation and of its true successor
        b_obs = self.normalise(obs.flatten(1, 2))
        inputs, next_memory = self.lstm(b_obs, memory.flatten(1, 2))
        next_inputs, _ = self.lstm(self.normalise(next_obs.flatten(1, 2)), next_memory)
        values = self.critic(inputs).view_as(rewards)
        next_values = self.critic(next_inputs).view_as(rewards)

        # Advantages, and the returns that the critic learns to predict
        advantages = gae(rewards, values, next_values, terminations, truncations, c.gamma,
                         c.gae_lambda)
        returns = advantages + values
        targets = torch.stack([advantages, returns, values], -1)
        starts = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1)[..., None]
        others = torch.cat([starts, memory, actions, log_probs, targets], -1).flatten(1, 2)
        samples = torch.cat([b_obs, others], -1)

        # Share of the returns' variance that the critic explains; NaN where they are constant
        error_variance, variance = (x.flatten(1).var(1) for x in (advantages, returns))
        explained_variance = (1 - error_variance / variance).masked_fill(variance == 0, math.nan)
        return obs.flatten(1, 2), samples, explained_variance

    def _normalise_rewards(self, rewards, episode_ends):
        """Divide by the standard deviation of the discounted return. Both (S, T, N)."""
        starts = torch.cat([torch.zeros_like(episode_ends[:, :1]), episode_ends[:, :-1]], 1)
        returns = discounted_sums(rewards, self.config.gamma * (1 - starts), self.returns)
        self.returns = returns[:, -1] * (1 - episode_ends[:, -1])
        self.return_normaliser.update(returns.flatten(1)[..., None])
        return self.return_normaliser.scale(rewards)

    def _update_epoch(self, samples):
        """Every sequence of every seed once, in minibatches. samples (S, T N, ...)."""
        (S, rows, _), L = samples.shape, self.config.seq_len
        sequences = torch.arange(rows, device=self.device).view(-1, L, self.num_envs)
        sequences = sequences.mT.reshape(-1, L)  # the rows of each
        order = torch.stack([sequences[torch.randperm(rows // L, generator=g, device=self.device)]
                             for g in self.generators]).flatten(1)
        shuffled = samples[torch.arange(S, device=self.device)[:, None], order]
        if self.config.rpo_alpha:  # noise on the mean, taken from the actions instead
            O, A = self.seen, self.spec.action_dim
            uniform = torch.special.ndtr(randn(self.generators, rows, A))
            shuffled[..., O : O + A] -= self.config.rpo_alpha * (2 * uniform - 1)

        size = rows // self.config.num_minibatches
        for part in shuffled.split(size, 1):
            metrics = self.minibatch_step(part)
        self.last_obs = self.inputs(part[..., : self.seen]).detach()
        return metrics

    def _update_minibatch(self, samples):
        """One gradient step on samples (S, B, ...) -> metrics, each (S,)."""
        O, A, rows = self.seen, self.spec.action_dim, samples.shape[1]
        mb_obs, mb_actions, *scalars = samples.split([O, A, 1, 1, 1, 1], -1)
        mb_log_probs, mb_advantages, mb_returns, mb_values = (x.squeeze(-1) for x in scalars)
        if self.config.norm_adv:
            centred = mb_advantages - mb_advantages.mean(1, keepdim=True)
            mb_advantages = centred / (centred.std(1, keepdim=True) + 1e-8)

        # Gradients, of a micro-batch at a time
        size = math.ceil(rows / self.config.seq_len / self.config.micro_batches)  # sequences
        chunks = (x.split(size * self.config.seq_len, 1) for x in (
            mb_obs, mb_actions, mb_log_probs, mb_advantages, mb_returns, mb_values))
        *others, last = zip(*chunks, strict=True)
        metrics = [self._accumulate(part, rows) for part in others]
        loss, last_metrics = self._losses(*last, rows)
        loss.sum().backward()  # the sum over seeds gives each seed exactly its own gradient

        # One step of Adam
        self._clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()  # last: compilation needs one graph up to here
        return {name: sum([x[name] for x in metrics], last_metrics[name]) for name in last_metrics}

    def _accumulate(self, part, rows):
        """The gradients of a micro-batch; compilation needs those of the last one in the caller."""
        loss, metrics = self._losses(*part, rows)
        loss.sum().backward()
        return metrics

    def _losses(self, mb_obs, mb_actions, mb_log_probs, mb_advantages, mb_returns, mb_values, rows):
        """What (S, B, ...) of a minibatch's `rows` add to its loss (S,) and its metrics (S,)."""
        c, (S, B, _) = self.config, mb_obs.shape

        # Policy loss: eq. 7
        inputs = self.inputs(mb_obs)
        mean = self.actor(inputs)
        log_probs = gaussian_log_probs(mb_actions, mean, self.log_std)
        assert log_probs.shape == mb_log_probs.shape == mb_advantages.shape == (S, B), (
            log_probs.shape, mb_log_probs.shape, mb_advantages.shape)
        log_ratio = log_probs - mb_log_probs
        ratio = log_ratio.exp()
        clipped_ratio = ratio.clamp(1 - c.clip_coef, 1 + c.clip_coef)
        surrogate = torch.minimum(mb_advantages * ratio, mb_advantages * clipped_ratio)
        policy_loss = -surrogate.mean(1)

        # Value loss: half the squared error, or that of the clipped value where it is larger
        values = self.critic(inputs).squeeze(-1)
        assert values.shape == mb_returns.shape == mb_values.shape == (S, B), (
            values.shape, mb_returns.shape, mb_values.shape)
        squared_errors = (values - mb_returns).square()
        if c.clip_vloss:
            clipped_values = mb_values + (values - mb_values).clamp(-c.clip_coef, c.clip_coef)
            clipped_errors = (clipped_values - mb_returns).square()
            squared_errors = torch.maximum(squared_errors, clipped_errors)
        value_loss = 0.5 * squared_errors.mean(1)

        # Entropy bonus, and their sum
        entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum((1, 2))
        assert policy_loss.shape == value_loss.shape == entropy.shape == (S,), entropy.shape
        loss = policy_loss + c.vf_coef * value_loss - self.ent_coef * entropy

        approx_kl = (ratio - 1 - log_ratio).mean(1)  # Schulman's k3, never negative
        metrics = {"loss/policy": policy_loss, "loss/value": value_loss,
                   "policy/entropy": entropy, "policy/approx_kl": approx_kl}
        share = B / rows
        return share * loss, {name: share * x.detach() for name, x in metrics.items()}

    def _clip_gradients(self):
        """Scale each seed's gradient down to max_grad_norm, by itself."""
        grads = [p.grad for p in self.parameters]
        norms = torch.stack([torch.linalg.vector_norm(g, dim=(1, 2), keepdim=True) for g in grads])
        scale = self.config.max_grad_norm / (norms.square().sum(0).sqrt() + 1e-6)  # (S, 1, 1)
        torch._foreach_mul_(grads, [scale.clamp(max=1)] * len(grads))

    def _learned(self):
        """What target_kl stops: weights and Adam's moments, each (S, in, out)."""
        moments = [x for p in self.parameters for x in self.optimizer.state.get(p, {}).values()]
        return [p.detach() for p in self.parameters] + [x for x in moments if x.dim() == 3]

    def hidden_activations(self):
        """Of each network's hidden layers, (S, B, width), for the last minibatch of an update."""
        return {"actor": self.actor.hidden(self.last_obs),
                "critic": self.critic.hidden(self.last_obs)}
