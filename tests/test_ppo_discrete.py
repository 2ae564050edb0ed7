"""PPO with discrete actions against torch.distributions, in float64, and action masks."""

import contextlib

import pytest
import torch
from torch.distributions import Categorical

from agents import ppo_discrete
from lab.agent import build_agent
from lab.envs.make import make_envs
from lab.envs.spec import discrete_spec
from lab.errors import UserError
from lab.training.evaluation import evaluate
from tests.conftest import drive, make_agent, make_spec, make_steps
from tests.test_ppo import reference_minibatch

SIZES = (2, 3)
MASKED = discrete_spec("tests", 9, (4, 3), None, mask_start=1)  # obs[1:8]


class Heads:
    """Independent Categoricals, as one distribution."""

    def __init__(self, logits, sizes):
        self.heads = [Categorical(logits=x) for x in logits.split(sizes, -1)]

    def log_prob(self, actions):
        return sum(head.log_prob(a) for head, a in zip(self.heads, actions.unbind(-1), strict=True))

    def entropy(self):
        return sum(head.entropy() for head in self.heads)


def random_logits(*shape):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def random_actions(*shape, sizes=SIZES):
    return torch.stack([torch.randint(n, shape, generator=torch.Generator().manual_seed(n))
                        for n in sizes], -1).double()


def masks_of(count, sizes=(4, 3)):
    """(2, count, 7): at least one choice of each action is allowed, and one is not."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.rand(2, count, n, generator=generator).argsort(-1) < n // 2 for n in sizes]
    return torch.cat(parts, -1)


def masked_obs(count):
    obs = torch.randn(2, count, 9, generator=torch.Generator().manual_seed(2))
    obs[..., 1:8] = masks_of(count)
    return obs


def test_log_probs_equal_torch_distributions(float64):
    logits, actions = random_logits(2, 7, 5), random_actions(2, 7)
    heads = [x.log_softmax(-1) for x in logits.split(SIZES, -1)]
    torch.testing.assert_close(ppo_discrete.categorical_log_probs(actions, heads),
                               Heads(logits, SIZES).log_prob(actions))


def test_a_minibatch_gives_each_seed_its_own_clipped_gradient(float64):
    agent = make_agent(ppo_discrete, ent_coef=0.1)
    samples = torch.cat([torch.randn(2, 16, 3), random_actions(2, 16), torch.randn(2, 16, 4)], -1)
    grads = {}
    agent.optimizer.step = lambda: grads.update(
        {i: p.grad.clone() for i, p in enumerate(agent.parameters)})
    metrics = agent._update_minibatch(samples)
    for place in (0, 1):
        reference = reference_minibatch(agent, place, samples,
                                        lambda *_: ([], lambda logits: Heads(logits, SIZES)))
        for i, theirs in enumerate(reference):
            torch.testing.assert_close(grads[i][place], theirs, rtol=1e-4, atol=1e-9)
    logits = agent.actor(samples[..., :3])
    torch.testing.assert_close(metrics["policy/entropy"],
                               Heads(logits, SIZES).entropy().mean(1).detach())


def test_actions_are_drawn_with_their_probabilities():
    """Within five standard errors, of each seed, and the actions are independent."""
    agent = make_agent(ppo_discrete)
    agent.actor.head.weight.data *= 300
    obs, count = torch.ones(2, 1, 3), 40_000
    actions = agent.act(obs.expand(2, count, 3))
    first, second = (x.exp()[:, 0].detach() for x in agent.policy(obs))
    joint = first[:, :, None] * second[:, None]  # (S, 2, 3)
    assert joint.amax() < 0.9 and not torch.allclose(*joint, atol=0.05)
    for place in (0, 1):
        seen = torch.histogramdd(actions[place], [2, 3], range=[-0.5, 1.5, -0.5, 2.5]).hist / count
        error = (joint[place] * (1 - joint[place]) / count).sqrt()
        assert ((seen - joint[place]).abs() < 5 * error + 1e-6).all()


def test_not_exploring_takes_the_most_probable_action():
    agent = make_agent(ppo_discrete)
    obs = torch.randn(2, 50, 3)
    actions = agent.act(obs, explore=False)
    for chosen, head in zip(actions.unbind(-1), agent.policy(obs), strict=True):
        assert torch.equal(chosen, head.argmax(-1).float())
    assert len(actions.flatten(0, 1).unique(dim=0)) > 2


def test_the_drawn_actions_are_stored_with_their_log_probs(float64):
    agent = make_agent(ppo_discrete, num_envs=3)
    for row, (obs, rewards, next_obs, *ends) in enumerate(make_steps((0, 1), 3, 8)):
        actions = agent.act(obs)
        agent.observe(obs, actions, rewards, next_obs, *ends)
        assert torch.equal(agent.rollout[:, row, :, 3:5], actions.to(agent.rollout.dtype))
        reference = Heads(agent.actor(obs.double()), SIZES).log_prob(actions).detach()
        torch.testing.assert_close(agent.rollout[:, row, :, 5], reference, rtol=1e-6, atol=1e-6)
    assert agent.update()


def test_a_masked_policy_is_the_distribution_over_what_is_allowed(float64):
    agent = make_agent(ppo_discrete, spec=MASKED)
    obs, mask = masked_obs(20), masks_of(20)
    reference = Heads(agent.actor(obs).masked_fill(~mask, -torch.inf), (4, 3)).heads
    for head, theirs in zip(agent.policy(obs), reference, strict=True):
        torch.testing.assert_close(head.exp(), theirs.probs)
        assert head.isfinite().all()
        entropy = -(theirs.probs * theirs.logits).nan_to_num(0).sum(-1)
        torch.testing.assert_close(-(head.exp() * head).sum(-1), entropy)


def test_a_mask_is_read_as_it_is_where_observations_are_normalised():
    """And learned with: a gradient of a forbidden choice is 0."""
    agent = make_agent(ppo_discrete, spec=MASKED, num_envs=4)
    steps = make_steps((0, 1), 4, 20, 9)
    for place, (obs, _, next_obs, *_) in enumerate(steps):
        for x in (obs, next_obs):
            x[..., 1:8] = masks_of(20)[:, place : place + 1]  # the same in all environments
    assert drive(agent, steps)
    assert agent.obs_normaliser.mean[..., 1:8].abs().max() > 0.1
    obs, mask = masked_obs(50), masks_of(50)
    assert torch.equal(agent.normalise(obs)[..., 1:8], mask.float())
    for explore in (True, False):
        for chosen, allowed in zip(agent.act(obs, explore=explore).unbind(-1),
                                   mask.split((4, 3), -1), strict=True):
            assert allowed.gather(-1, chosen[..., None].long()).all()


@pytest.mark.parametrize("settings", [{}, {"backend": "workers", "workers": 2}])
def test_a_masked_environment_is_learned_and_never_gets_a_forbidden_action(settings):
    """It raises on one. The reward is for the last choice, which is allowed in 2 of 3 steps."""
    env_id = "tests.probe_envs:lab-tests/FlatMasked-v0"
    training = make_envs(env_id, [0, 1], 8, **settings)
    with contextlib.closing(training), contextlib.closing(make_envs(env_id, [0, 1], 20)) as tests:
        assert training.spec == discrete_spec(env_id, 7, (2, 3), None, mask_start=0)
        agent = make_agent(ppo_discrete, num_envs=8, spec=training.spec, num_steps=16, lr=1e-2,
                           update_epochs=8)
        obs = training.reset()
        for _ in range(100):
            actions = agent.act(obs)
            agent.update()
            t = training.step(actions)
            agent.observe(obs, actions, t.rewards, t.next_obs, t.terminations, t.truncations)
            obs = t.obs
        assert min(evaluate(agent, tests)) > 5.5  # of 10 steps; by chance 3.3


@pytest.mark.parametrize("agent, spec, words", [
    ("sac", discrete_spec("Own-v0", 3, (2,), None), r"Own-v0 has action space Discrete\(2\); "
     r"sac.py is for continuous actions: use agents/ppo_discrete.py"),
    ("ppo", discrete_spec("Own-v0", 3, (2, 4), None), r"MultiDiscrete\(\[2, 4\]\); ppo.py is for"),
    ("ppo_discrete", make_spec(), r"tests has action space Box; ppo_discrete.py is for discrete "
     "actions$")])
def test_an_agent_refuses_the_other_kind_of_actions_in_one_line(agent, spec, words):
    with pytest.raises(UserError, match=words) as caught:
        build_agent(f"agents/{agent}.py", {}, spec, [0], 1, 10, "cpu", lambda fn: fn)
    assert "\n" not in str(caught.value)
