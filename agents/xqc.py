"""XQC: CrossQ with weight normalisation, distributional critics, target networks, scaled rewards.

Palenicek et al. 2025, arXiv 2509.25174. Differences from crossq.py:
1. Plain batch norm before each ReLU; after every step the weights into each unit have norm 1.
2. Categorical critics (C51, 101 atoms), trained by cross-entropy, with target networks.
3. Rewards are divided by the standard deviation of their discounted return; lr falls linearly.
From FlashSAC, arXiv 2604.04539: scaled returns stay within the atoms; noise may be held.

Every tensor starts with S, the seeds that train side by side, and inside the critics with S x 2,
two critics for each seed; read S as 1.

Departures from the paper, each with its reason
1. The first actions are uniform, so early data is not biased by an untrained policy.
2. log_std is squashed by a tanh, as in CleanRL: a hard clamp has no gradient outside its range.
3. Small by default: 2 layers of 256, not the paper's 4 of 512 (actor: 256), and one update per
   transition, not two. With half as many updates, tau is twice the paper's and lr three times.

    python learn_simple.py agents/xqc.py --env Hopper-v5 --seeds 8 --steps 100_000 --log
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
ATOMS, V_MAX = 101, 5.0  # values of scaled rewards: evenly spaced on [-V_MAX, V_MAX]
LONGEST_HOLD = 16  # steps


@dataclass(frozen=True)
class Config:
    gamma: float = 0.99  # discount factor; the paper's: 1 - 5 / episode steps, in [0.95, 0.995]
    # Replay and schedule
    buffer_size: int = 1_000_000  # transitions of one seed; at most the run's steps are allocated
    learning_starts: int = 5_000  # random transitions before learning; at most a tenth of the run
    replay_ratio: float = 1.0  # gradient steps per transition
    policy_delay: int = 3  # critic steps per actor step
    batch_size: int = 256  # transitions per gradient step
    n_step: int = 1  # rewards in a target before it bootstraps
    # Optimisation
    lr: float = 1e-3  # Adam's learning rate for the networks and the temperature
    lr_end: float = 1e-4  # learning rate at the end of the run; linear in between
    tau: float = 0.01  # step of the target critics towards the critics
    # Policy
    tune_alpha: bool = True  # learn the temperature; otherwise keep it at alpha
    alpha: float = 0.01  # initial temperature: the weight of entropy against scaled reward
    target_entropy: float = -0.5  # nats per action dimension, of actions scaled to [-1, 1]
    hold_noise: bool = False  # hold exploration noise for n steps, P(n) ~ n^-2, n up to 16
    # Networks
    actor_width: int = 256  # units in each of the actor's hidden layers
    actor_depth: int = 2  # hidden layers of the actor
    qf_width: int = 256  # units in each of a critic's hidden layers
    qf_depth: int = 2  # hidden layers of a critic


RANGES = {  # lowest and highest value allowed
    "buffer_size": (1, 1e9), "learning_starts": (0, 1e9), "replay_ratio": (0, 1e9),
    "policy_delay": (1, 1e9), "batch_size": (1, 1e9), "gamma": (0, 1), "alpha": (0, 1e9),
    "lr": (0, 1e9), "lr_end": (0, 1e9), "actor_width": (1, 1e9), "qf_width": (1, 1e9),
    "target_entropy": (-1e9, 1e9),
    "actor_depth": (1, 100), "qf_depth": (1, 100), "tau": (0, 1), "n_step": (1, 1_000),
}


def randn(generators, *shape):
    """-> (S, *shape) standard normal noise, each seed's from its own generator."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def atoms_like(x):
    return torch.linspace(-V_MAX, V_MAX, ATOMS, device=x.device)


def mean_value(probs):
    """(..., ATOMS) -> (...). No matrix product: autocast would round the values to bf16."""
    return (probs * atoms_like(probs)).sum(-1)


def project(probs, rewards, discounts, bonus):
    """The distribution of rewards + discounts * (values + bonus), for values with `probs` on the
    atoms, as one on the atoms: each value's probability goes to the two nearest, in proportion
    (1707.06887, algorithm 1). (S, B, ATOMS) and (S, B) each -> (S, B, ATOMS)."""
    values = rewards[..., None] + discounts[..., None] * (atoms_like(rewards) + bonus[..., None])
    b = (values.clamp(-V_MAX, V_MAX) + V_MAX) * ((ATOMS - 1) / (2 * V_MAX))
    lower = b.nan_to_num().floor().clamp(max=ATOMS - 2)  # the index of a NaN must exist
    to_upper = probs * (b - lower)
    lower = lower.long()
    target = torch.zeros_like(probs).scatter_add(-1, lower, probs - to_upper)
    return target.scatter_add(-1, lower + 1, to_upper)


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
        shape = (copies, max(fan_in, fan_out), min(fan_in, fan_out))
        q, r = torch.linalg.qr(randn(generators, *shape))
        q = q * r.diagonal(dim1=2, dim2=3).sign()[:, :, None]  # uniform over orthogonal matrices
        weight = q if fan_in >= fan_out else q.mT
        self.weight = nn.Parameter(weight.contiguous())  # (S, copies, in, out)

    def forward(self, x):
        return torch.bmm(x, self.weight.flatten(0, 1))


class BatchNorm(nn.Module):
    """Batch normalisation of each copy, (S * copies, B, units) to the same, in fp32."""

    def __init__(self, generators, units, copies):
        super().__init__()
        zeros = torch.zeros(len(generators), copies, 1, units, device=generators[0].device)
        self.weight, self.bias = nn.Parameter(zeros + 1), nn.Parameter(zeros.clone())
        self.register_buffer("mean", zeros.clone())
        self.register_buffer("var", zeros + 1)

    def forward(self, x, train):
        weight, bias, mean, var = (
            t.flatten(0, 1) for t in (self.weight, self.bias, self.mean, self.var))
        if train:
            b_var, b_mean = torch.var_mean(x.type_as(var), 1, correction=0, keepdim=True)
            with torch.no_grad():
                mean.lerp_(b_mean, 0.01)
                var.lerp_(b_var * (x.shape[1] / max(1, x.shape[1] - 1)), 0.01)  # unbiased
            mean, var = b_mean, b_var
        scale = (var + 1e-3).rsqrt() * weight
        return torch.addcmul(bias - mean * scale, x, scale)


class MLP(nn.Module):
    """Hidden layers and a head, `copies` for each seed: (S * copies, B, in) to (.., out)."""

    def __init__(self, generators, fan_in, width, depth, fan_out, copies=1):
        super().__init__()
        n = [fan_in] + depth * [width]
        self.norms = nn.ModuleList(BatchNorm(generators, units, copies) for units in n)
        self.layers = nn.ModuleList(
            Linear(generators, *n[k : k + 2], copies) for k in range(depth))
        self.head = Linear(generators, width, fan_out, copies)
        self.bias = nn.Parameter(torch.zeros_like(self.head.weight[:, :, :1]))  # of the head
        self.normalise()

    def hidden(self, x, train=False):
        """-> the activations of the hidden layers, (S * copies, B, width)."""
        h = [self.norms[0](x, train)]
        for layer, norm in zip(self.layers, self.norms[1:], strict=True):
            h.append(norm(layer(h[-1]), train).relu_())  # in place: 4% of an update on a CPU
        return h[1:]

    def forward(self, x, train, rows=slice(None)):
        """Only `rows` of the batch go through the head."""
        h = self.hidden(x, train)[-1][:, rows]
        return self.head(h).type_as(x) + self.bias.flatten(0, 1)

    @torch.no_grad()
    def normalise(self):
        for layer in (*self.layers, self.head):
            layer.weight.div_(layer.weight.norm(dim=2, keepdim=True))


class Actor(nn.Module):
    """obs (S, B, O), noise (S, B, A) -> actions (S, B, A), log_probs (S, B)."""

    def __init__(self, generators, spec, config):
        super().__init__()
        self.mlp = MLP(generators, spec.obs_dim, config.actor_width, config.actor_depth,
                       2 * spec.action_dim)
        low, high = torch.tensor([spec.action_low, spec.action_high], device=generators[0].device)
        self.register_buffer("scale", (high - low) / 2, persistent=False)
        self.register_buffer("centre", (high + low) / 2, persistent=False)
        if not (self.scale + self.centre).isfinite().all():
            raise ValueError(f"action bounds must be finite, not {spec.action_low} to "
                             f"{spec.action_high}")

    def forward(self, obs, noise, train=False):
        mean, raw_log_std = self.mlp(obs, train).chunk(2, dim=-1)
        middle, half_range = (LOG_STD_MAX + LOG_STD_MIN) / 2, (LOG_STD_MAX - LOG_STD_MIN) / 2
        log_std = middle + half_range * torch.tanh(raw_log_std)
        x = mean + log_std.exp() * noise
        actions = self.centre + self.scale * torch.tanh(x)
        return actions, squashed_log_probs(x, noise, log_std, log_scale=0)  # of tanh(x)


class QFunctions(nn.Module):
    """Two critics: obs (S, B, O), actions (S, B, A) -> logits of the values (S, 2, B, ATOMS)."""

    def __init__(self, generators, spec, config):
        super().__init__()
        fan_in = spec.obs_dim + spec.action_dim
        self.mlp = MLP(generators, fan_in, config.qf_width, config.qf_depth, ATOMS, copies=2)

    def inputs(self, obs, actions):
        return torch.cat([obs, actions], -1).repeat_interleave(2, dim=0)  # (S * 2, B, O + A)

    def forward(self, obs, actions, train=False, rows=slice(None)):
        return self.mlp(self.inputs(obs, actions), train, rows).unflatten(0, (-1, 2))


class Replay:
    """The last `capacity` transitions of each seed; one row is one transition."""

    STATE = ("rows", "position", "size")

    def __init__(self, generators, capacity, spec, num_envs):
        self.widths = [spec.obs_dim, spec.action_dim, spec.obs_dim, 1, 1, 1]
        shape = (len(generators), capacity, sum(self.widths))
        self.rows = torch.zeros(shape, device=generators[0].device)
        self.generators, self.position, self.size = generators, 0, 0
        self.num_envs = num_envs  # rows from one step of an environment to its next

    def add(self, obs, actions, next_obs, rewards, terminations, truncations):
        """Each (S, N, ...): N new rows for each seed; the capacity is a multiple of N."""
        end = self.position + obs.shape[1]
        flags = torch.stack([x.to(rewards.dtype) for x in (rewards, terminations, truncations)], -1)
        self.rows[:, self.position : end] = torch.cat([obs, actions, next_obs, flags], -1)
        self.position, self.size = end % self.rows.shape[1], max(self.size, end)

    def sample(self, batch_size, n_step, gamma):
        """-> obs, actions, next_obs (S, B, ...), rewards, discounts (S, B), with replacement. Of up
        to n steps: fewer where an episode ends or the newest row is reached."""
        seeds, capacity, width = self.rows.shape
        picks = torch.cat([
            torch.randint(self.size, (batch_size,), generator=g, device=g.device) + s * capacity
            for s, g in enumerate(self.generators)])
        k = torch.arange(n_step, device=picks.device)[:, None]  # each step after a pick
        index = picks - picks % capacity + (picks + k * self.num_envs) % capacity
        batch = self.rows.view(-1, width).index_select(0, index.flatten())
        obs, actions, next_obs, rewards, terminations, truncations = (
            batch.view(n_step, -1, width).split(self.widths, -1))
        newest = (self.position - 1 - picks) % capacity // self.num_envs  # steps to it
        ends = ((terminations + truncations).squeeze(-1) > 0) | (k >= newest)
        used = ends.cumsum(0) - ends.int() == 0  # no end before
        last = used.sum(0) - 1
        rewards = (rewards.squeeze(-1) * used * gamma**k).sum(0)
        next_obs, terminations = (x.take_along_dim(last[None, :, None], 0)[0]
                                  for x in (next_obs, terminations))
        discounts = (1 - terminations.squeeze(-1)) * gamma ** (1 + last)
        return [x.unflatten(0, (seeds, batch_size))
                for x in (obs[0], actions[0], next_obs, rewards, discounts)]


class RewardScale:
    """What the rewards of a seed are divided by: the standard deviation of its discounted return at
    all steps so far, or its largest size / V_MAX if that is more. Scaled returns fit the atoms."""

    STATE = ("returns", "sums", "largest")

    def __init__(self, seeds, num_envs, device):
        self.returns = torch.zeros(seeds, num_envs, dtype=torch.float64, device=device)
        self.sums = self.returns.new_zeros(seeds, 3)  # of their powers 0, 1 and 2
        self.largest = self.returns.new_zeros(seeds)

    def add(self, rewards, ends, gamma):
        """One step, (S, N) each; where an episode ends, the next return starts at 0."""
        returns = gamma * self.returns + rewards
        self.sums += torch.stack([returns**k for k in range(3)], -1).sum(1)
        self.largest = torch.maximum(self.largest, returns.abs().amax(1))
        self.returns = returns * (ends == 0)

    def value(self):
        """(S,)"""
        count, total, squares = self.sums.unbind(1)
        std = (squares / count - (total / count).square()).clamp(min=0).sqrt()
        scale = torch.maximum(std, self.largest / V_MAX).clamp(min=1e-8)  # no reward yet: 0 / 1e-8
        return scale.to(torch.get_default_dtype())


class Agent:
    name = "xqc"
    STATE = ("actor", "qf", "log_alpha", "actor_optimizer", "qf_optimizer", "alpha_optimizer",
             "qf_target", "reward_scale", "held",
             "replay", "generators", "transitions", "critic_steps", "learning_starts")

    def __init__(self, spec, config, seeds, num_envs=1, total_steps=1_000_000, device="cpu",
                 accelerate=lambda fn: fn):
        self.spec, self.config, self.num_envs = spec, config, num_envs
        self.total_steps = total_steps
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
            lr=torch.tensor(config.lr, device=self.device),  # a tensor: compiled code reads it
            fused=True, capturable=self.device.type == "cuda")
        self.actor_optimizer = adam(self.actor.parameters())
        self.qf_optimizer = adam(self.qf.parameters())
        self.alpha_optimizer = adam([self.log_alpha])

        capacity = math.ceil(min(config.buffer_size, total_steps) / num_envs) * num_envs
        self.replay = Replay(self.generators, capacity, spec, num_envs)
        self.reward_scale = RewardScale(len(seeds), num_envs, self.device)
        holders = num_envs if config.hold_noise else 0
        self.held = torch.zeros(len(seeds), holders, spec.action_dim + 1, device=self.device)
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
        if explore and obs.shape[1] <= self.held.shape[1]:
            noise = self._hold(noise)
        actions, _ = self.actor(obs, noise)
        return actions.clamp(self.low, self.high)  # float rounding can overshoot the bounds

    def _hold(self, noise):
        """noise (S, N, A), replaced where an environment still holds its own. `held` has a row of
        each, its noise and the steps left; each call is for the next N."""
        N = noise.shape[1]
        sums = torch.arange(1.0, LONGEST_HOLD + 1, device=self.device).pow(-2).cumsum(0)
        uniform = torch.special.ndtr(randn(self.generators, N, 1))
        length = torch.bucketize(sums[-1] * uniform, sums[:-1]) + 1  # P(n) ~ n^-2
        old, left = self.held[:, :N].split([self.spec.action_dim, 1], -1)
        noise, left = torch.where(left > 0, old, noise), torch.where(left > 0, left, length) - 1
        self.held.copy_(torch.cat([self.held[:, N:], torch.cat([noise, left], -1)], 1))
        return noise

    def observe(self, obs, actions, rewards, next_obs, terminations, truncations):
        """Store one step, each (S, N, ...)."""
        self.replay.add(obs, actions, next_obs, rewards, terminations, truncations)
        self.reward_scale.add(rewards, terminations + truncations, self.config.gamma)
        self.transitions += obs.shape[1]

    def update(self):
        """Take the gradient steps that are due -> metrics of the last ones, each (S,)."""
        if self.transitions < self.learning_starts:
            return {}
        seen = self.transitions - self.learning_starts + self.num_envs
        due = int(seen * self.config.replay_ratio) - self.critic_steps
        metrics = {}
        progress = self.transitions / self.total_steps
        lr = self.config.lr + (self.config.lr_end - self.config.lr) * min(1, progress)
        for optimizer in (self.actor_optimizer, self.qf_optimizer, self.alpha_optimizer):
            optimizer.param_groups[0]["lr"].fill_(lr)
        for _ in range(due):
            self.batch = self.replay.sample(
                self.config.batch_size, self.config.n_step, self.config.gamma)
            noise = randn(self.generators, 2, self.config.batch_size, self.spec.action_dim)
            metrics |= self.update_critic(*self.batch, self.reward_scale.value(), noise[:, 0])
            self.critic_steps += 1
            if self.critic_steps % self.config.policy_delay == 0:
                metrics |= self.update_actor(self.batch[0], noise[:, 1])
        return metrics

    def _update_critic(self, b_obs, b_actions, b_next_obs, b_rewards, b_discounts, scale, noise):
        # One pass over both batches, so that they share the statistics of batch normalisation
        with torch.no_grad():
            next_actions, next_log_probs = self.actor(b_next_obs, noise)
        both = torch.cat([b_obs, b_next_obs], 1), torch.cat([b_actions, next_actions], 1)
        now, later = slice(0, b_obs.shape[1]), slice(b_obs.shape[1], None)
        log_probs = self.qf(*both, train=True, rows=now).log_softmax(-1)  # (S, 2, B, ATOMS)

        # Target: the distribution of the lower slow critic, plus the entropy bonus
        with torch.no_grad():
            next_probs = self.qf_target(*both, train=True, rows=later).softmax(-1)
            q1, q2 = mean_value(next_probs).unbind(1)  # (S, B)
            next_probs = torch.where((q1 < q2)[..., None], *next_probs.unbind(1))
            bonus = -self.log_alpha.exp()[:, None] * next_log_probs
            target = project(next_probs, b_rewards / scale[:, None], b_discounts, bonus)
            target = target[:, None].expand(-1, 2, -1, -1)  # the same for both critics
            values = mean_value(log_probs.exp()).mean((1, 2)) * scale  # (S,), in environment units

        # Loss: cross-entropy, summed over the two critics
        assert log_probs.shape == target.shape, (log_probs.shape, target.shape)
        qf_loss = -(target * log_probs).sum(-1).mean(2).sum(1)  # (S,)
        metrics = {"loss/qf": qf_loss.detach(), "value/q": values}

        # Step: the sum over seeds gives each seed exactly its own gradient
        qf_loss.sum().backward()  # last to read the loss: compilation needs one graph
        self.qf_optimizer.step()
        self.qf.mlp.normalise()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.qf_target.parameters()), list(self.qf.parameters()),
                                 self.config.tau)
        self.qf_optimizer.zero_grad()
        return metrics

    def _update_actor(self, b_obs, noise):
        # Policy loss (eq. 9): gradients flow through the actions; the critics' weights are fixed
        actions, log_probs = self.actor(b_obs, noise, train=True)
        frozen = {name: p.detach() for name, p in self.qf.named_parameters()}
        probs = functional_call(self.qf, frozen, (b_obs, actions)).softmax(-1)
        values = mean_value(probs).amin(1)  # (S, B)
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
        self.actor.mlp.normalise()
        self.actor_optimizer.zero_grad()
        self.alpha_optimizer.zero_grad()
        return metrics

    def hidden_activations(self):
        """Of the last batch, for the harness's plasticity metrics."""
        b_obs, b_actions, *_ = self.batch
        return {"qf": self.qf.mlp.hidden(self.qf.inputs(b_obs, b_actions)),
                "actor": self.actor.mlp.hidden(b_obs)}
