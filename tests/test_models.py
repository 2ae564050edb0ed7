"""The diffs of docs/own-agent.md: they apply to agents/ppo.py, pass the checks, and their maths is
that of torch.distributions and torch.nn, in float64."""

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import distributions, nn

from agents import ppo
from lab.agent import load_agent
from lab.check import __main__ as check
from tests.conftest import drive, few_updates, make_agent, make_spec, make_steps

DIFFS = {re.search(r"^\+\+\+ \.\./(\w+)\.py$", text, re.MULTILINE)[1]: text
         for text in re.findall(r"```diff\n(.*?)```", Path("docs/own-agent.md").read_text(),
                                re.DOTALL)}
QUICK = "a seed trains the same in a stack as alone", "a restored agent continues exactly"
pytestmark = pytest.mark.skipif(shutil.which("patch") is None, reason="no patch")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> the patched file."""
    folder, paths = tmp_path_factory.mktemp("models"), {}
    for name, text in DIFFS.items():
        paths[name] = Path(shutil.copy("agents/ppo.py", folder / f"{name}.py"))
        done = subprocess.run(["patch", "--fuzz=0", paths[name]], input=text, text=True,
                              capture_output=True)
        assert done.returncode == 0 and "offset" not in done.stdout, done.stdout + done.stderr
    return paths


@pytest.fixture
def build(models, float64):
    def make(name, **settings):
        return make_agent(load_agent(models[name]), num_envs=4, **settings)

    return make


def test_there_are_four():
    assert set(DIFFS) == {"beta", "squashed", "mixture", "transformer"}


@pytest.mark.parametrize("name, each", [
    pytest.param(name, each, marks=[] if each in QUICK else [pytest.mark.slow])
    for name in DIFFS for each in check.CHECKS])
def test_a_model_passes_every_check(models, name, each):
    flags = ["--frames", "1"] if name == "transformer" else []
    flags += few_updates(models[name]) if each in QUICK else []
    subject = check.parse([str(models[name]), *flags])
    assert check.failure(check.CHECKS[each], subject) is None


def stored(agent):
    """Acts and observes once -> obs, what is stored of the actions, their log-probs, and what the
    environment got."""
    obs, *rest = make_steps((0, 1), 4, 1, agent.spec.obs_dim)[0]
    actions = agent.act(obs.double())
    agent.observe(obs, actions, *rest)
    O, A = agent.spec.obs_dim, agent.spec.action_dim
    row = agent.rollout[:, 0]
    return obs.double(), row[..., O : O + A], row[..., O + A], actions


def test_a_beta_policys_actions_are_scaled_samples_with_their_density(build):
    agent = build("beta")
    obs, unit, log_probs, actions = stored(agent)
    alpha, beta = (1 + nn.functional.softplus(agent.actor(obs))).chunk(2, -1)
    policy = distributions.Independent(distributions.Beta(alpha, beta), 1)
    torch.testing.assert_close(log_probs, policy.log_prob(unit).detach())
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0])
    torch.testing.assert_close(actions, low + (high - low) * unit)
    torch.testing.assert_close(agent.act(obs, explore=False),
                               (low + (high - low) * alpha / (alpha + beta)).detach())
    many = agent.act(obs[:, :1].expand(2, 20_000, 3))
    error = (high - low) * (policy.variance[:, :1] / 20_000).sqrt()
    assert ((many.mean(1, keepdim=True) - low) / (high - low) - policy.mean[:, :1]).abs().le(
        5 * error).all()


def test_a_squashed_normals_ratio_is_that_of_the_actions_that_the_environment_gets(build):
    agent = build("squashed")
    obs, before, log_probs, actions = stored(agent)
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 4.0])

    def squashed():
        normal = distributions.Normal(agent.actor(obs), agent.log_std.exp())
        return normal, distributions.TransformedDistribution(normal, [
            distributions.TanhTransform(cache_size=1),
            distributions.AffineTransform((low + high) / 2, (high - low) / 2)])

    normal, policy = squashed()
    torch.testing.assert_close(actions, low + (high - low) * (before.tanh() + 1) / 2)
    torch.testing.assert_close(log_probs, normal.log_prob(before).sum(-1).detach())
    old = policy.log_prob(actions).sum(-1)
    with torch.no_grad():
        agent.actor.head.weight += 0.1
        agent.log_std += 0.3
    new = ppo.gaussian_log_probs(before, agent.actor(obs), agent.log_std)
    torch.testing.assert_close(new - log_probs, squashed()[1].log_prob(actions).sum(-1) - old)


def test_a_mixtures_log_probs_and_samples_are_torchs(build):
    agent = build("mixture", components=3)
    with torch.no_grad():
        agent.log_std += torch.randn(agent.log_std.shape) - 1
        agent.actor.head.weight *= 50
    obs, actions, log_probs, _ = stored(agent)
    weights, means = agent.actor(obs).tensor_split([3], -1)
    normals = distributions.Normal(means.unflatten(-1, (3, 2)), agent.log_std.exp()[:, None])
    policy = distributions.MixtureSameFamily(distributions.Categorical(logits=weights),
                                             distributions.Independent(normals, 1))
    torch.testing.assert_close(log_probs, policy.log_prob(actions).detach())
    best = weights.argmax(-1)[..., None, None].expand(2, 4, 1, 2)
    expected = normals.mean.gather(2, best).squeeze(2)
    torch.testing.assert_close(agent.act(obs, explore=False), expected.clamp(
        agent.low, agent.high).detach())
    agent.low, agent.high = agent.low - math.inf, agent.high + math.inf
    many = agent.act(obs[:, :1].expand(2, 40_000, 3))
    for moment, theirs in ((many.mean(1), policy.mean[:, 0]), (many.var(1), policy.variance[:, 0])):
        torch.testing.assert_close(moment, theirs.detach(), rtol=0.05, atol=0.05)


def test_a_transformer_is_torchs_attention_over_the_last_observations(build):
    agent = build("transformer", frames=3, spec=make_spec(obs_dim=6))
    network, x = agent.actor, torch.randn(2, 5, 6)
    outputs = network(x)
    for place in (0, 1):
        def linear(layer, place=place):
            return lambda y: y @ layer.weight[place] + layer.bias[place]

        attention = nn.MultiheadAttention(16, 4, batch_first=True)
        weight, bias = network.qkv.weight[place], network.qkv.bias[place, 0]
        order = torch.arange(48).view(4, 3, 4).transpose(0, 1).flatten()  # q, k, v of each head
        attention.in_proj_weight.data, attention.in_proj_bias.data = weight.T[order], bias[order]
        attention.out_proj.weight.data = network.mix.weight[place].T
        attention.out_proj.bias.data = network.mix.bias[place, 0]
        tokens = linear(network.embed)(x[place].view(5, 3, 2)) + network.position[place]
        normed = nn.functional.layer_norm(tokens, (16,))
        newest = tokens[:, -1] + attention(normed, normed, normed)[0][:, -1]
        hidden = linear(network.fc1)(nn.functional.layer_norm(newest, (16,))).relu()
        output = nn.functional.layer_norm(newest + linear(network.fc2)(hidden), (16,))
        torch.testing.assert_close(outputs[place], linear(network.head)(output))
    with pytest.raises(ValueError, match="frames must divide the 6 numbers of an observation"):
        build("transformer", frames=4, spec=make_spec(obs_dim=6))
    assert drive(agent, make_steps((0, 1), 4, 20, 6))


@pytest.mark.parametrize("name", ["beta", "squashed"])
def test_infinite_bounds_are_refused_where_actions_are_scaled(build, name):
    with pytest.raises(ValueError, match="action bounds must be finite"):
        build(name, spec=make_spec(low=(-1.0,), high=(math.inf,)))
