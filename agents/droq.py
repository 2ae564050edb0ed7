"""DroQ: Soft Actor-Critic with many gradient steps a transition, on regularised critics.

Hiraoka et al. 2022, arXiv 2110.02034. Differences from sac.py:
1. Dropout, its units drawn with replacement, then layer normalisation in the critics (section 3).
2. 20 critic steps a transition and one actor step, on the mean of the critics (algorithm 2).

Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905: the soft
Q target is eq. 5-6, the reparameterised policy loss eq. 9, the temperature loss eq. 18, the density
of the squashed Gaussian appendix C.
Every tensor starts with S, the seeds that train side by side; read it as 1.

Departures from the paper, each with its reason
1. The first actions are uniform, so that the replay does not start with one policy's view.
2. log_std is squashed into [-5, 2] by a tanh, as in CleanRL: a hard clamp has no gradient outside.
3. The critics and the temperature learn faster (1e-3) than the actor (3e-4), as in CleanRL.

    python learn_simple.py agents/droq.py --env Hopper-v5 --seeds 8 --steps 20_000 --log
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
    replay_ratio: float = 20.0  # gradient steps a transition
    policy_delay: int = 20  # critic steps for each actor step
    batch_size: int = 256  # transitions a gradient step
    # Optimisation
    actor_lr: float = 3e-4  # Adam step size of the actor
    qf_lr: float = 1e-3  # Adam step size of all but the actor
    tau: float = 0.005  # share of the critics that enters their targets at each step
    # Policy
    tune_alpha: bool = True  # learn the temperature; off: keep it at alpha
    alpha: float = 1.0  # temperature: the weight of entropy against reward, or its start
    target_entropy: float = -1.0  # nats for each action dimension, in environment units
    # Networks
    dropout: float = 0.01  # share of the critics' hidden units that is dropped
    actor_width: int = 256  # units of each of the actor's two hidden layers
    qf_width: int = 256  # units of each of a critic's two hidden layers


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


class DropoutNorm(nn.Module):
    """Dropout, then layer normalisation, of each critic: (S * 2, B, units) to the same."""

    def __init__(self, generators, config):
        super().__init__()
        self.p, self.shape = config.dropout, (2, config.batch_size, config.qf_width)
        ones = torch.ones(len(generators), 2, 1, config.qf_width, device=generators[0].device)
        self.weight, self.bias = nn.Parameter(ones), nn.Parameter(torch.zeros_like(ones))
        self.drops = round(math.log(1 - self.p) / math.log(1 - 1 / math.prod(self.shape)))
        self.register_buffer("dropped", ones.new_zeros(len(ones), self.drops, dtype=int), False)

    def forward(self, x):
        x.view(len(self.dropped), -1).scatter_(1, self.dropped[:, : self.drops], 0)
        x = F.layer_norm(x.view(-1, *self.shape), self.shape[2:], eps=1e-5 * (1 - self.p)**2)
        return torch.addcmul(self.bias, x, self.weight).flatten(0, 1)


class MLP(nn.Module):
    """Two hidden layers, `copies` of them a seed: (S * copies, B, in) -> (S * copies, B, out)."""

    def __init__(self, generators, fan_in, width, fan_out, copies=1):
        super().__init__()
        self.fc1 = Linear(generators, fan_in, width, copies)
        self.fc2 = Linear(generators, width, width, copies)
        self.head = Linear(generators, width, fan_out, copies)

    def hidden(self, x):
        """-> the activations of each hidden layer, (S * copies, B, width)."""
        first = self.fc1(x).relu_()  # in place: 4% of an update on a CPU
        return first, self.fc2(first).relu_()

    def forward(self, x):
        last = self.hidden(x)[-1]
        return self.head(last).type_as(x)  # no bf16 from here on


class Actor(nn.Module):
    """obs (S, B, O), noise (S, B, A) -> actions (S, B, A), log_probs (S, B)."""

    def __init__(self, generators, spec, config):
        super().__init__()
        self.mlp = MLP(generators, spec.obs_dim, config.actor_width, 2 * spec.action_dim)
        low, high = torch.tensor([spec.action_low, spec.action_high], device=generators[0].device)
        self.register_buffer("scale", (high - low) / 2, persistent=False)
        self.register_buffer("centre", (high + low) / 2, persistent=False)

    def forward(self, obs, noise):
        mean, log_std = self.mlp(obs).chunk(2, dim=-1)
        log_std = 3.5 * torch.tanh(log_std) - 1.5  # in [-5, 2]
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

    def forward(self, obs, actions):
        x = torch.cat([obs, actions], -1).repeat_interleave(2, dim=0)
        return self.mlp(x).view(-1, 2, obs.shape[1])


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
            (0, 0.9, "dropout"),
            (0, 1, "gamma tau")):
        for name in names.split():
            value = getattr(config, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must lie in [{low}, {high:g}], not {value}")
    for name in ("action_low", "action_high"):
        if not all(map(math.isfinite, getattr(spec, name))):
            raise ValueError(f"{name} must be finite for each action, not {getattr(spec, name)}")


class Agent:
    name = "droq"

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
        self.qf_target = copy.deepcopy(self.qf).requires_grad_(False)
        self.log_alpha = torch.full([len(seeds)], config.alpha).log().to(device).requires_grad_()
        fused = {"fused": True,
                 "capturable": self.device.type == "cuda"}
        self.qf_optimizer = torch.optim.Adam(self.qf.parameters(), lr=config.qf_lr, **fused)
        groups = [{"params": list(self.actor.parameters())}]
        groups += [{"params": [self.log_alpha], "lr": config.qf_lr}] if config.tune_alpha else []
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
        for _ in range(due):
            self._drop_units(True, self.qf, self.qf_target)
            batch = self.replay.sample(self.config.batch_size)
            noise = randn(self.generators, 2, self.config.batch_size, self.spec.action_dim)
            next_noise, noise = noise.unbind(1)
            self.metrics.update(self.critic_step(*batch, next_noise))
            self.critic_steps += 1
            if self.critic_steps % self.config.policy_delay == 0:
                self._drop_units(True, self.qf_frozen)
                self.metrics.update(self.actor_step(batch[0], noise))
        metrics = dict(self.metrics) if due > 0 else {}
        if self.transitions % PLASTICITY_EVERY < self.num_envs:
            obs, actions, *_ = self.replay.sample(self.config.batch_size)
            both = torch.cat([obs, actions], -1).repeat_interleave(2, dim=0)
            self._drop_units(False, self.qf)  # a dropped unit would wake a dead one
            metrics |= plasticity("actor", self.actor, self.actor.mlp.hidden(obs))
            metrics |= plasticity("qf", self.qf, self.qf.mlp.hidden(both))
        return metrics

    def _drop_units(self, dropping, *qfs):  # with replacement: the share of all is `dropout`
        for layer in (x for qf in qfs for x in qf.modules() if isinstance(x, DropoutNorm)):
            layer.drops = dropping * layer.dropped.shape[1]
            for units, generator in zip(layer.dropped, self.generators, strict=True):
                units.random_(math.prod(layer.shape), generator=generator)

    def _update_critic(self, b_obs, b_actions, b_next_obs, b_rewards, b_terminations, noise):
        with torch.no_grad():
            next_actions, next_log_probs = self.actor(b_next_obs, noise)
            next_values = self.qf_target(b_next_obs, next_actions)
            next_values = next_values.amin(1)
            next_values = next_values - self.log_alpha.exp()[:, None] * next_log_probs
            target = td_target(b_rewards, b_terminations, next_values, self.config.gamma)
        values = self.qf(b_obs, b_actions)
        assert values.shape == (len(target), 2, target.shape[1]), (values.shape, target.shape)
        loss = (values - target[:, None]).square().mean(2).sum(1)  # (S,)
        loss.sum().backward()  # the sum over seeds gives each seed exactly its own gradient
        self.qf_optimizer.step()
        self.qf_optimizer.zero_grad()  # last: compilation needs one graph up to here
        torch._foreach_lerp_(list(self.qf_target.parameters()), list(self.qf_frozen.parameters()),
                             self.config.tau)
        return {"loss/qf": loss.detach(), "value/q": values.detach().mean((1, 2))}

    def _update_actor(self, b_obs, noise):
        actions, log_probs = self.actor(b_obs, noise)
        values = self.qf_frozen(b_obs, actions).mean(1)
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

    PARTS = ("actor", "qf", "qf_target", "actor_optimizer", "qf_optimizer")

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
