"""BRO: CrossQ with bigger, residual critics, scaled as in "Bigger, Regularized, Optimistic".

Nauman et al. 2024, arXiv 2405.16158. Differences from crossq.py, all of them parts of that paper:
1. Residual critics, about 5M parameters in all; decoupled weight decay; two updates a transition.
2. Pessimism between the mean of the critics, as in the paper, and the lower one; a full reset.
Not in: quantile critics, the residual and the optimistic actor, layer norm and target networks
(batch norm replaces them), its width of 512, step sizes, batch of 128, actor steps, target entropy.

Bhatt et al. 2024, arXiv 1902.05605. Differences from sac.py:
1. No target networks: the critics see (s, a) and (s', a') in one batch (section 4.1).
2. Batch renormalisation before each layer of every network.
3. Wider critics (1024 as in SBX, half of the paper's), fewer actor steps, Adam's beta1 0.5.

Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905: the soft
Q target is eq. 5-6, the reparameterised policy loss eq. 9, the temperature loss eq. 18, the density
of the squashed Gaussian appendix C.
Every tensor starts with S, the seeds that train side by side; read it as 1.

Departures from the paper, each with its reason
1. The first actions are uniform, so that the replay does not start with one policy's view.
2. log_std is squashed into [-5, 2] by a tanh, as in CleanRL: a hard clamp has no gradient outside.

    python learn_simple.py agents/bro.py --env HalfCheetah-v5 --seeds 8 --steps 100_000 --log
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

PLASTICITY_EVERY = 2_048  # transitions of one seed


@dataclass(frozen=True)
class Config:
    gamma: float = 0.99  # discount a step
    # Replay and schedule
    buffer_size: int = 1_000_000  # transitions a seed; no more than the run's steps are allocated
    learning_starts: int = 5_000  # random transitions before learning, at most a tenth of the run
    replay_ratio: float = 2.0  # gradient steps a transition
    policy_delay: int = 3  # critic steps for each actor step
    batch_size: int = 256  # transitions a gradient step
    reset_at: tuple[int, ...] = (15_001,)  # transitions at which the networks start anew
    # Optimisation
    actor_lr: float = 1e-3  # Adam step size of the actor
    qf_lr: float = 1e-3  # Adam step size of all but the actor
    weight_decay: float = 1e-4  # AdamW's, of critics and actor
    pessimism: float = 1.0  # 0: the mean of the two critics, 1: the lower one
    beta1: float = 0.5  # Adam's decay of the mean gradient
    renorm: bool = True  # batch renormalisation; off: plain batch normalisation
    renorm_warmup: int = 100_000  # a network's training steps before renormalisation begins
    # Policy
    tune_alpha: bool = True  # learn the temperature; off: keep it at alpha
    alpha: float = 1.0  # temperature: the weight of entropy against reward, or its start
    target_entropy: float = -1.0  # nats for each action dimension, in environment units
    # Networks
    actor_width: int = 256  # units of each of the actor's two hidden layers
    qf_width: int = 768  # units of a critic's hidden layers, of which there are five


def randn(generators, *shape):
    """-> (S, *shape) standard normal numbers, seed s from its own generator."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def td_target(rewards, terminations, next_values, gamma):
    """All (S, B). Only a termination cuts the bootstrap; a truncation does not. Eq. 5."""
    return rewards + gamma * (1 - terminations) * next_values


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


def squashed_log_probs(x, noise, log_std, log_scale):
    """Log-density of scale * tanh(x), x = mean + std * noise: (S, B, A) -> (S, B). Appendix C."""
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    # from x itself: exact also where tanh(x) rounds to 1
    log_slope = 2 * (math.log(2) - x - F.softplus(-2 * x)) + log_scale
    return (log_normal - log_slope).sum(-1)


class Linear(nn.Module):
    """`copies` dense layers a seed, side by side: (S * copies, B, in) -> (S * copies, B, out)."""

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
        if weight.shape[-1] == 1:  # a value, not in bf16, which counts in twos from 256 on
            return (x * weight.mT).sum(-1, keepdim=True) + bias
        return torch.baddbmm(bias, x, weight)


class BatchNorm(nn.Module):
    """Batch renormalisation of each copy by itself, (S * copies, B, units) to the same, not bf16:
    1702.03275, algorithm 1, r_max 3, d_max 5; plain normalisation for the first training steps."""

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
        scale = (var + 1e-3).rsqrt()
        if train:
            b_var, b_mean = torch.var_mean(x.type_as(var), 1, correction=0, keepdim=True)
            b_scale = (b_var + 1e-3).rsqrt()
            with torch.no_grad():
                warm = self.warmup <= 0
                r = torch.where(warm, (scale / b_scale).clamp(1 / 3, 3), 1.0)
                d = torch.where(warm, ((b_mean - mean) * scale).clamp(-5, 5), 0.0)
                mean.lerp_(b_mean, 0.01)
                var.lerp_(b_var * (x.shape[1] / max(1, x.shape[1] - 1)), 0.01)  # unbiased
                self.warmup -= 1
            mean, scale, bias = b_mean, b_scale * r, bias + d * weight
        return torch.addcmul(bias - mean * scale * weight, x, scale * weight)


class MLP(nn.Module):
    """Two hidden layers, `copies` of them a seed: (S * copies, B, in) -> (S * copies, B, out)."""

    def __init__(self, generators, config, fan_in, width, fan_out, copies=1):
        super().__init__()
        self.norms = nn.ModuleList(
            BatchNorm(generators, config, units, copies) for units in (fan_in, width, width))
        self.fc1 = Linear(generators, fan_in, width, copies)
        self.fc2 = Linear(generators, width, width, copies)
        self.head = Linear(generators, width, fan_out, copies)

    def hidden(self, x, train=False):
        """-> the activations of each hidden layer, (S * copies, B, width)."""
        first = self.fc1(self.norms[0](x, train)).relu_()  # in place: 4% of an update on a CPU
        return first, self.fc2(self.norms[1](first, train)).relu_()

    def forward(self, x, train):
        last = self.norms[2](self.hidden(x, train)[-1], train)
        return self.head(last).type_as(x)  # no bf16 from here on


class BroNet(nn.Module):
    """Figure 3 with batch norm for layer norm: (S * copies, B, in) -> (S * copies, B, out)."""

    def __init__(self, generators, config, fan_in, width, fan_out, copies):
        super().__init__()
        n = [fan_in] + 5 * [width] + [fan_out]
        self.norms = nn.ModuleList(BatchNorm(generators, config, m, copies) for m in n[:-1])
        self.layers = nn.ModuleList(Linear(generators, *n[k : k + 2], copies) for k in range(6))
        for shift in (self.norms[0].bias, *(layer.bias for layer in self.layers[:5])):
            shift.requires_grad_(False).zero_()  # the next norm takes a shift out again

    def hidden(self, x, train=False):
        """-> what each ReLU gives, and the last sum, (S * copies, B, width)."""
        norms, layers = self.norms, self.layers
        first = norms[1](layers[0](norms[0](x, train)), train).relu_()
        second = norms[2](layers[1](first), train).relu_()
        x = first + norms[3](layers[2](second), train)
        third = norms[4](layers[3](x), train).relu_()
        return first, second, third, x + norms[5](layers[4](third), train)

    def forward(self, x, train):
        return self.layers[5](self.hidden(x, train)[-1]).type_as(x)


class Actor(nn.Module):
    """obs (S, B, O), noise (S, B, A) -> actions (S, B, A), log_probs (S, B)."""

    def __init__(self, generators, spec, config):
        super().__init__()
        self.mlp = MLP(generators, config, spec.obs_dim, config.actor_width, 2 * spec.action_dim)
        low, high = torch.tensor([spec.action_low, spec.action_high], device=generators[0].device)
        self.register_buffer("scale", (high - low) / 2, persistent=False)
        self.register_buffer("centre", (high + low) / 2, persistent=False)

    def forward(self, obs, noise, train=False):
        mean, log_std = self.mlp(obs, train).chunk(2, dim=-1)
        log_std = 3.5 * torch.tanh(log_std) - 1.5  # in [-5, 2]
        x = mean + log_std.exp() * noise
        actions = self.centre + self.scale * torch.tanh(x)
        return actions, squashed_log_probs(x, noise, log_std, self.scale.log())


class QFunctions(nn.Module):
    """Two critics: obs (S, B, O), actions (S, B, A) -> values (S, 2, B)."""

    def __init__(self, generators, spec, config):
        super().__init__()
        fan_in = spec.obs_dim + spec.action_dim
        self.mlp = BroNet(generators, config, fan_in, config.qf_width, 1, copies=2)

    def forward(self, obs, actions, train=False):
        x = torch.cat([obs, actions], -1).repeat_interleave(2, dim=0)
        return self.mlp(x, train).view(-1, 2, obs.shape[1])


def frozen(module):
    """The same weights read without gradient: the actor's step needs none for the critics."""
    twin = copy.deepcopy(module).requires_grad_(False)
    for name, theirs in twin.state_dict(keep_vars=True).items():
        theirs.data = module.state_dict()[name]
    return twin


class Replay:
    """The last `capacity` transitions of each seed: one row holds one whole transition."""

    def __init__(self, generators, capacity, spec):
        self.widths = [spec.obs_dim, spec.action_dim, spec.obs_dim, 1, 1]
        shape = (len(generators), capacity, sum(self.widths))
        self.rows = torch.zeros(shape, device=generators[0].device)
        self.generators, self.position, self.size = generators, 0, 0

    def add(self, obs, actions, next_obs, rewards, terminations):
        """Each (S, N, ...): N new rows a seed; the capacity is a multiple of N."""
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


def validate(spec, config):
    """ValueError that names the field and the value."""
    for low, high, names in (
            (1, 1e9, "buffer_size policy_delay batch_size actor_width qf_width"),
            (0, 1e9, "learning_starts replay_ratio actor_lr qf_lr"),
            (1e-6 if config.tune_alpha else 0, 1e9, "alpha"),
            (0, 0.9999, "beta1"), (0, 1, "gamma weight_decay pessimism")):
        for name in names.split():
            value = getattr(config, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must lie in [{low}, {high:g}], not {value}")
    for name in ("action_low", "action_high"):
        if not all(map(math.isfinite, getattr(spec, name))):
            raise ValueError(f"{name} must be finite for each action, not {getattr(spec, name)}")


class Agent:
    name = "bro"

    def __init__(self, spec, config, seeds, num_envs=1, total_steps=1_000_000, device="cpu",
                 accelerate=lambda fn: fn):
        validate(spec, config)
        self.spec, self.config, self.num_envs = spec, config, num_envs
        self.device = torch.device(device)
        self.generators = [torch.Generator(self.device).manual_seed(int(seed)) for seed in seeds]
        self.learning_starts = max(1, min(config.learning_starts, total_steps // 10))
        self.transitions = self.critic_steps = 0  # of one seed

        self.low, self.high = torch.tensor([spec.action_low, spec.action_high], device=self.device)
        self.actor = Actor(self.generators, spec, config)
        self.qf = QFunctions(self.generators, spec, config)
        self.qf_frozen = frozen(self.qf)
        self.log_alpha = torch.full([len(seeds)], config.alpha).log().to(device).requires_grad_()
        fused = {"fused": True, "betas": (config.beta1, 0.999),
                 "weight_decay": config.weight_decay, "decoupled_weight_decay": True,
                 "capturable": self.device.type == "cuda"}
        self.qf_optimizer = torch.optim.Adam(self.qf.parameters(), lr=config.qf_lr, **fused)
        groups = [{"params": list(self.actor.parameters())}]
        temperature = {"params": [self.log_alpha], "lr": config.qf_lr, "weight_decay": 0.0}
        groups += [temperature] if config.tune_alpha else []
        self.actor_optimizer = torch.optim.Adam(groups, lr=config.actor_lr, **fused)

        capacity = math.ceil(min(config.buffer_size, total_steps) / num_envs) * num_envs
        self.replay = Replay(self.generators, capacity, spec)
        self.metrics = {}
        self.critic_step = accelerate(self._update_critic)
        self.actor_step = accelerate(self._update_actor)

    @torch.no_grad()
    def act(self, obs, explore=True):
        """obs (S, N, O) -> actions (S, N, A) in environment units; no noise if not exploring."""
        noise = torch.zeros(*obs.shape[:2], self.spec.action_dim, device=self.device)
        if explore:
            noise = randn(self.generators, obs.shape[1], self.spec.action_dim)
        if explore and self.transitions < self.learning_starts:
            uniform = torch.special.ndtr(noise)  # the normal's distribution function
            return self.low + (self.high - self.low) * uniform
        return self.actor(obs, noise)[0].clamp(self.low, self.high)  # rounding may pass them

    def observe(self, obs, actions, rewards, next_obs, terminations, truncations):
        """One step, each (S, N, ...). A truncation is no end of the task: it is not stored."""
        self.replay.add(obs, actions, next_obs, rewards, terminations)
        self.transitions += obs.shape[1]

    def update(self):
        """The gradient steps due since the last call -> the last one's metrics, each (S,)."""
        if self.transitions < self.learning_starts:
            return {}
        seen = self.transitions - self.learning_starts + self.num_envs
        due = int(seen * self.config.replay_ratio) - self.critic_steps
        if any(0 <= self.transitions - at < self.num_envs for at in self.config.reset_at):
            self._reset()
        for _ in range(due):
            batch = self.replay.sample(self.config.batch_size)
            noise = randn(self.generators, 2, self.config.batch_size, self.spec.action_dim)
            next_noise, noise = noise.unbind(1)
            self.metrics.update(self.critic_step(*batch, next_noise))
            self.critic_steps += 1
            if self.critic_steps % self.config.policy_delay == 0:
                self.metrics.update(self.actor_step(batch[0], noise))
        metrics = dict(self.metrics) if due > 0 else {}
        if self.transitions % PLASTICITY_EVERY < self.num_envs:
            obs, actions, *_ = self.replay.sample(self.config.batch_size)
            both = torch.cat([obs, actions], -1).repeat_interleave(2, dim=0)
            metrics |= plasticity("actor", self.actor, self.actor.mlp.hidden(obs))
            metrics |= plasticity("qf", self.qf, self.qf.mlp.hidden(both)[:-1])
        return metrics

    def _reset(self):  # in place: compiled code holds on to the tensors
        self.actor.load_state_dict(Actor(self.generators, self.spec, self.config).state_dict())
        self.qf.load_state_dict(QFunctions(self.generators, self.spec, self.config).state_dict())
        self.log_alpha.data.fill_(math.log(self.config.alpha) if self.config.alpha else -math.inf)
        for state in (*self.actor_optimizer.state.values(), *self.qf_optimizer.state.values()):
            torch._foreach_zero_(list(state.values()))

    def _update_critic(self, b_obs, b_actions, b_next_obs, b_rewards, b_terminations, noise):
        with torch.no_grad():
            next_actions, next_log_probs = self.actor(b_next_obs, noise)
        both = torch.cat([b_obs, b_next_obs], 1), torch.cat([b_actions, next_actions], 1)
        values, next_values = self.qf(*both, train=True).chunk(2, dim=2)
        with torch.no_grad():
            next_values = next_values.mean(1).lerp(next_values.amin(1), self.config.pessimism)
            next_values = next_values - self.log_alpha.exp()[:, None] * next_log_probs
            target = td_target(b_rewards, b_terminations, next_values, self.config.gamma)
        assert values.shape == (len(target), 2, target.shape[1]), (values.shape, target.shape)
        loss = (values - target[:, None]).square().mean(2).sum(1)  # (S,)
        loss.sum().backward()  # the sum over seeds gives each seed exactly its own gradient
        self.qf_optimizer.step()
        self.qf_optimizer.zero_grad()  # last: compilation needs one graph up to here
        return {"loss/qf": loss.detach(), "value/q": values.detach().mean((1, 2))}

    def _update_actor(self, b_obs, noise):
        actions, log_probs = self.actor(b_obs, noise, train=True)
        values = self.qf_frozen(b_obs, actions)
        values = values.mean(1).lerp(values.amin(1), self.config.pessimism)
        assert values.shape == log_probs.shape, (values.shape, log_probs.shape)
        alpha = self.log_alpha.exp()
        actor_loss = (alpha.detach()[:, None] * log_probs - values).mean(1)  # (S,)
        entropy = -log_probs.detach().mean(1)  # (S,)
        surplus = entropy - self.config.target_entropy * self.spec.action_dim
        (actor_loss + alpha * surplus if self.config.tune_alpha else actor_loss).sum().backward()
        self.actor_optimizer.step()
        self.actor_optimizer.zero_grad()
        return {"loss/actor": actor_loss.detach(), "policy/entropy": entropy,
                "policy/alpha": alpha.detach()}

    PARTS = ("actor", "qf", "actor_optimizer", "qf_optimizer")

    def state_dict(self):
        """Everything that the future depends on, by reference."""
        return {name: getattr(self, name).state_dict() for name in self.PARTS} | {
            "log_alpha": self.log_alpha.detach(),
            "replay": {"rows": self.replay.rows, "position": self.replay.position,
                       "size": self.replay.size},
            "counters": {"transitions": self.transitions, "critic_steps": self.critic_steps},
            "generators": [g.get_state() for g in self.generators],
        }

    def load_state_dict(self, state):
        """Continue exactly where `state` was taken. ValueError if the replay has another shape."""
        if state["replay"]["rows"].shape != self.replay.rows.shape:
            raise ValueError(f"replay is {tuple(self.replay.rows.shape)}, the checkpoint's is "
                             f"{tuple(state['replay']['rows'].shape)}: same steps, envs and seeds?")
        for name in self.PARTS:
            getattr(self, name).load_state_dict(copy.deepcopy(state[name]))  # Adam keeps it
        self.log_alpha.data.copy_(state["log_alpha"])
        self.replay.rows.copy_(state["replay"]["rows"])
        self.replay.position, self.replay.size = (state["replay"][k] for k in ("position", "size"))
        self.transitions, self.critic_steps = (
            state["counters"][k] for k in ("transitions", "critic_steps"))
        for generator, generator_state in zip(self.generators, state["generators"], strict=True):
            generator.set_state(generator_state.cpu())
