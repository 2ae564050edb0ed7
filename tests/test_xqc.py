"""XQC against slow references written from the papers."""

import math
from collections import deque

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from agents import xqc
from lab.training.plasticity import measure
from tests.conftest import drive, flat_state, make_agent, make_steps, same, save_state

ATOMS = [-5 + 0.1 * k for k in range(101)]


# The update


def reference_network(network, seed, place):
    """BN -> (Linear -> BN -> ReLU) x depth -> Linear with one copy's weights."""
    def norm(ours):
        theirs = nn.BatchNorm1d(ours.weight.shape[-1], eps=1e-3, momentum=0.01)
        for name, name_of_ours in (("weight", "weight"), ("bias", "bias"),
                                   ("running_mean", "mean"), ("running_var", "var")):
            getattr(theirs, name).data = getattr(ours, name_of_ours).data[seed, place, 0].clone()
        return theirs

    def dense(ours, bias=None):
        theirs = nn.Linear(*ours.weight.shape[2:], bias=bias is not None)
        theirs.weight.data = ours.weight.data[seed, place].T.clone()
        if bias is not None:
            theirs.bias.data = bias.data[seed, place, 0].clone()
        return theirs

    mlp, modules = network.mlp, [norm(network.mlp.norms[0])]
    for layer, after in zip(mlp.layers, mlp.norms[1:], strict=True):
        modules += [dense(layer), norm(after), nn.ReLU()]
    return nn.Sequential(*modules, dense(mlp.head, mlp.bias))


def unit_rows(network):
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, nn.Linear):
                for row in layer.weight:
                    row /= math.sqrt(sum(w * w for w in row.tolist()))


def slow_projection(probs, rewards, discounts, bonus):
    """One transition in plain floats, after algorithm 1 of 1707.06887."""
    target = [0.0] * 101
    for p, atom in zip(probs, ATOMS, strict=True):
        value = min(max(rewards + discounts * (atom + bonus), -5.0), 5.0)
        place = round((value + 5) / 0.1, 9)
        below, above = math.floor(place), math.ceil(place)
        if below == above:
            target[below] += p
        else:
            target[below] += p * (above - place)
            target[above] += p * (place - below)
    return target


class Reference:
    """One seed's networks, optimisers and steps, without a stack."""

    def __init__(self, agent, seed):
        self.c, self.spec, self.agent = agent.config, agent.spec, agent
        self.actor = reference_network(agent.actor, seed, 0)
        self.critics = [reference_network(agent.qf, seed, place) for place in (0, 1)]
        self.slow = [reference_network(agent.qf_target, seed, place) for place in (0, 1)]
        self.log_alpha = torch.tensor(math.log(0.01), requires_grad=True)
        weights = [p for q in self.critics for p in q.parameters()]
        self.qf_optimizer, self.actor_optimizer, self.alpha_optimizer = (
            torch.optim.Adam(parameters, lr=3e-4)
            for parameters in (weights, self.actor.parameters(), [self.log_alpha]))

    def policy(self, obs, noise):
        low, high = torch.tensor(self.spec.action_low), torch.tensor(self.spec.action_high)
        mean, log_std = self.actor(obs).chunk(2, dim=1)
        std = torch.exp(-5 + 3.5 * (torch.tanh(log_std) + 1))
        x = mean + std * noise
        log_probs = Normal(mean, std).log_prob(x).sum(1) - (1 - torch.tanh(x) ** 2).log().sum(1)
        return (high + low) / 2 + (high - low) / 2 * torch.tanh(x), log_probs

    def critic_step(self, obs, actions, next_obs, rewards, discounts, scale, noise):
        self.actor.eval()
        with torch.no_grad():
            next_actions, next_log_probs = self.policy(next_obs, noise)
        both = torch.cat([torch.cat([obs, actions], 1), torch.cat([next_obs, next_actions], 1)])
        B, alpha = len(obs), self.log_alpha.exp().item()
        with torch.no_grad():
            later = [torch.softmax(critic.train()(both)[B:], 1) for critic in self.slow]
        targets = []
        for b in range(B):
            lower = min((probs[b].tolist() for probs in later), key=mean)
            targets.append(slow_projection(lower, rewards[b].item() / scale.item(),
                                           discounts[b].item(), -alpha * next_log_probs[b].item()))
        logits = [critic.train()(both)[:B] for critic in self.critics]
        loss = sum(nn.functional.cross_entropy(x, torch.tensor(targets)) for x in logits)
        self.step(self.qf_optimizer, loss)
        for slow, critic in zip(self.slow, self.critics, strict=True):
            unit_rows(critic)
            with torch.no_grad():
                for old, new in zip(slow.parameters(), critic.parameters(), strict=True):
                    old += self.c.tau * (new - old)

    def actor_step(self, obs, noise):
        self.actor.train()
        actions, log_probs = self.policy(obs, noise)
        means = [torch.softmax(critic.eval()(torch.cat([obs, actions], 1)), 1) @ torch.tensor(ATOMS)
                 for critic in self.critics]
        alpha = self.log_alpha.exp().item()
        goal = -0.5 * self.spec.action_dim
        alpha_loss = -self.log_alpha.exp() * (log_probs.detach() + goal).mean()
        self.step(self.actor_optimizer, (alpha * log_probs - torch.minimum(*means)).mean())
        self.step(self.alpha_optimizer, alpha_loss)
        unit_rows(self.actor)

    def step(self, optimizer, loss):
        """At 3e-4 at the run's start, 3e-5 at its end."""
        share = self.agent.transitions / 1000
        optimizer.param_groups[0]["lr"] = 3e-4 * (1 - share) + 3e-5 * share
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def mean(probs):
    return sum(p * atom for p, atom in zip(probs, ATOMS, strict=True))


@pytest.mark.parametrize("seed, depth", [(0, 2), (1, 3)])
def test_twenty_updates_equal_a_slow_single_seed_reference(float64, seed, depth):
    agent = make_agent(xqc, batch_size=8, n_step=2, qf_depth=depth, actor_depth=depth - 1,
                       total_steps=1000)
    reference = Reference(agent, seed)
    calls = []
    critic_step, actor_step = agent.update_critic, agent.update_actor

    def watched(step, ours):
        def both(*tensors):
            step(*(x[seed] for x in tensors))
            calls.append(step)
            return ours(*tensors)
        return both

    agent.update_critic = watched(reference.critic_step, critic_step)
    agent.update_actor = watched(reference.actor_step, actor_step)
    start = reference_network(agent.actor, seed, 0).state_dict()
    drive(agent, make_steps((0, 1), 1, 28))
    assert len(calls) == 20 + 6

    for theirs, network, place in ((reference.actor, agent.actor, 0),
                                   *((reference.critics[c], agent.qf, c) for c in (0, 1)),
                                   *((reference.slow[c], agent.qf_target, c) for c in (0, 1))):
        ours, theirs = reference_network(network, seed, place).state_dict(), theirs.state_dict()
        for name in (name for name in ours if "num_batches" not in name):
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-7, atol=1e-9, msg=name)
    assert not any(torch.equal(start[name], value) for name, value in
                   reference.actor.state_dict().items())
    torch.testing.assert_close(agent.log_alpha[seed].detach(), reference.log_alpha.detach())
