"""lab/envs/torch_tasks.py: three environments against gymnasium's, the quadrotor against rigid-body
dynamics, and the code that they share."""

import itertools
import math
import re
import sys
from collections import defaultdict

import gymnasium
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from scipy.stats import ks_2samp
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from lab.envs import torch_tasks
from lab.envs.make import make_envs
from lab.envs.spec import EnvSpec
from lab.envs.torch_tasks import ENVS, Quadrotor, TorchEnv, rotation
from lab.envs.torch_vec import BLOCK
from lab.errors import UserError
from tests.conftest import needs_compiler, needs_cuda

GYMNASIUM = {"Pendulum-v1": "Pendulum-v1", "MountainCarContinuous-v0": "MountainCarContinuous-v0",
             "ContinuousCartPole-v1": "CartPole-v1", "CartPole-v1": "CartPole-v1"}
CARTS = "ContinuousCartPole-v1", "CartPole-v1"
FALL = 12 * 2 * math.pi / 360
# Largest sizes of the random states' entries, and of the actions; values of every entry at edges.
RANGES = {"Pendulum-v1": ([20, 8], 4), "MountainCarContinuous-v0": ([1.2, 0.07], 2),
          **dict.fromkeys(CARTS, ([3, 4, 0.3, 4], 1))}
EDGES = {
    "Pendulum-v1": ([0, math.pi, -math.pi, math.pi + 1e-9, 3 * math.pi - 1e-9, -101.0],
                    [-8, -7.99, 0, 8], [-5, -2, 0, 2, 5]),
    "MountainCarContinuous-v0": ([-1.2, -1.1999, -1.15, 0.4, 0.4499, 0.45, 0.46, 0.53, 0.599, 0.6],
                                 [-0.07, -0.0699, -0.001, 0, 0.001, 0.07], [-3, -1, 0, 1, 3]),
    "ContinuousCartPole-v1": ([-2.4 - 1e-9, -2.4, 0, 2.4, 2.4 + 1e-9], [-1e-3, 0, 5],
                              [-FALL - 1e-9, -FALL, 0, FALL, FALL + 1e-9], [-0.1, 0, 4], [-1, 1]),
}
EDGES["CartPole-v1"] = (*EDGES["ContinuousCartPole-v1"][:-1], [0, 1])


def random_cases(name, count=300):
    """States (count, D) and actions (count, 1) far beyond the limits, float64."""
    rng, (sizes, action) = np.random.default_rng(0), RANGES[name]
    states = rng.uniform(-1, 1, (count, len(sizes))) * sizes
    if name == "MountainCarContinuous-v0":
        states[:, 0] = rng.uniform(-1.2, 0.6, count)
    actions = rng.uniform(-action, action, (count, 1))
    if name == "CartPole-v1":
        return states, np.where(actions > 0, 1.0, 0.0)
    return states, np.sign(actions) if name == "ContinuousCartPole-v1" else actions


def edge_cases(name):
    cases = np.array(list(itertools.product(*EDGES[name])), np.float64)
    return cases[:, :-1], cases[:, -1:]


def gymnasium_steps(name, states, actions):
    """Each from its own state -> next states, observations, rewards, terminations."""
    env, steps = gymnasium.make(GYMNASIUM[name], disable_env_checker=True).unwrapped, []
    env.reset(seed=0)
    for state, action in zip(states, actions, strict=True):
        env.state, env.steps_beyond_terminated = state.copy(), None
        obs, reward, terminated, _, _ = env.step(
            int(action[0] > 0) if name in CARTS else action)
        steps.append((env.state, obs, reward, terminated))
    return [np.array(column) for column in zip(*steps, strict=True)]


def torch_steps(name, states, actions, dtype):
    """The same as one batch (1, count, ...)."""
    env = ENVS[name]()
    state, rewards, terminated = env.step(*(torch.tensor(x, dtype=dtype)[None]
                                            for x in (states, actions)))
    assert state.dtype == rewards.dtype == dtype and terminated.dtype == torch.bool
    return [x[0].numpy() for x in (state, env.observe(state), rewards, terminated)]


@pytest.mark.parametrize("cases", [random_cases, edge_cases])
@pytest.mark.parametrize("name", GYMNASIUM)
def test_steps_equal_gymnasiums_from_equal_states(name, cases):
    """gymnasium rounds observations to float32, and in MountainCar the state."""
    states, actions = cases(name)
    theirs = gymnasium_steps(name, states, actions)
    ours = torch_steps(name, states, actions, torch.float64)
    rounded = 1e-12 if name != "MountainCarContinuous-v0" else 1e-7
    for x, y, tolerance in zip(ours, theirs, [rounded, 1e-7, 1e-12, 0], strict=True):
        np.testing.assert_allclose(x, y, tolerance, tolerance / 10)
    assert len(states) >= 100
    assert set(ours[3]) == ({False} if name == "Pendulum-v1" else {False, True})


@pytest.mark.parametrize("name", GYMNASIUM)
def test_steps_in_float32_equal_gymnasiums_to_a_hundred_thousandth(name):
    states, actions = (x.astype(np.float32).astype(np.float64) for x in random_cases(name))
    theirs = gymnasium_steps(name, states, actions)
    ours = torch_steps(name, states, actions, torch.float32)
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, 1e-5, 1e-5)


def test_a_cart_is_pushed_in_proportion_to_the_action_up_to_its_limit():
    forces = torch.tensor([-3.0, -1, -0.5, 0, 0.5, 1, 3]).view(1, -1, 1)
    state, _, _ = ENVS["ContinuousCartPole-v1"]().step(torch.zeros(1, 7, 4), forces)
    torch.testing.assert_close(state[..., 1] / state[0, 5, 1], forces.squeeze(-1).clamp(-1, 1))


def test_a_cart_without_velocity_moves_as_the_other_and_shows_place_and_angle():
    whole, part = ENVS["ContinuousCartPole-v1"](), ENVS["CartPoleWithoutVelocity-v1"]()
    states, actions = (torch.tensor(x)[None] for x in random_cases("ContinuousCartPole-v1"))
    for ours, theirs in zip(part.step(states, actions), whole.step(states, actions), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(part.observe(states), states[..., [0, 2]])
    assert make_envs("torch/CartPoleWithoutVelocity-v1", [0]).spec.obs_dim == 2


@pytest.mark.parametrize("name", GYMNASIUM)
def test_the_spec_equals_gymnasiums(name):
    env, spec = gymnasium.make(GYMNASIUM[name]), make_envs(f"torch/{name}", [0]).spec
    assert spec.id == f"torch/{name}"
    assert (spec.obs_dim,) == env.observation_space.shape
    assert spec.max_episode_steps == env.spec.max_episode_steps
    if name in CARTS:
        low, high = ((0,), (1,)) if name == "CartPole-v1" else ((-1,), (1,))
        assert spec.num_actions == (2,) * (name == "CartPole-v1")
    else:
        low, high = env.action_space.low, env.action_space.high
    assert (spec.action_dim, spec.action_low, spec.action_high) == (1, tuple(low), tuple(high))


@pytest.mark.parametrize("name", GYMNASIUM)
def test_episodes_begin_as_gymnasiums_do(name):
    env, kind = gymnasium.make(GYMNASIUM[name], disable_env_checker=True).unwrapped, ENVS[name]()
    env.reset(seed=0)
    theirs = np.array([(env.reset(), env.state)[1] for _ in range(2000)])
    uniform = torch.rand(1, 20_000, kind.randoms, generator=torch.Generator().manual_seed(0))
    ours = kind.initial(uniform)[0].numpy()
    low, high = {"Pendulum-v1": ([-math.pi, -1], [math.pi, 1]),
                 "MountainCarContinuous-v0": ([-0.6, 0], [-0.4, 0]),
                 **dict.fromkeys(CARTS, ([-0.05] * 4, [0.05] * 4))}[name]
    assert ours.shape[1:] == theirs.shape[1:]
    assert (ours >= np.array(low) - 1e-6).all() and (ours <= np.array(high) + 1e-6).all()
    for x, y in zip(ours.T, theirs.T, strict=True):
        assert abs(x.mean() - y.mean()) <= 0.1 * y.std() and ks_2samp(x, y).pvalue > 0.001
    moving = ours[:, ours.std(0) > 0].T
    apart = np.abs(np.atleast_2d(np.corrcoef(moving)) - np.eye(len(moving)))
    assert apart.max() < 0.05


# The quadrotor. x points forward, y to the left, z up; the parts of its state, in order:
PARTS = {"position": 3, "velocity": 3, "quaternion": 4, "angular": 3, "motors": 4, "mass": 1,
         "arm": 1, "inertia": 3, "strength": 1, "yaw": 1, "drag": 1, "lag": 1, "wind": 3}
REST = {"position": 0.0, "velocity": 0.0, "quaternion": [1.0, 0, 0, 0], "angular": 0.0, "wind": 0.0}
SIDES = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)  # of the rotors
SPINS = torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)


def quadrotors(count=64, seed=0, **fixed):
    """Random bodies as an episode begins, some parts fixed -> dict of (count, ...) float64."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(count, Quadrotor.randoms, generator=generator, dtype=torch.float64)
    parts = unpack(Quadrotor().initial(uniform[None]))
    for name, value in fixed.items():
        parts[name] = torch.as_tensor(value, dtype=torch.float64).expand(parts[name].shape)
    return parts


def unpack(state):
    return dict(zip(PARTS, state[0].split(list(PARTS.values()), -1), strict=True))


def pack(parts):
    return torch.cat([parts[name] for name in PARTS], -1)[None]


def fly(parts, actions, steps=1, refine=1):
    """Constant actions (count, 4) or one number for that many steps of 1/refine of the usual
    length -> the parts at the end."""
    env, state = Quadrotor(), pack(parts)
    env.DT = Quadrotor.DT / refine
    actions = torch.as_tensor(actions, dtype=torch.float64).expand(1, state.shape[1], 4)
    for _ in range(steps * refine):
        state = env.step(state, actions)[0]
    return unpack(state)


def hovering(parts):
    """The action whose thrust equals the weight."""
    return (2 / parts["strength"] - 1).expand(-1, 4)


def axis_up(parts):
    x, y, z, w = parts["quaternion"][:, [1, 2, 3, 0]].T.numpy()
    return torch.from_numpy(Rotation.from_quat(np.stack([x, y, z, w], 1)).as_matrix()[:, :, 2])


def rigid_bodies(parts, actions, seconds, dt=5e-4):
    """The definition, in the world's frame, by rotation matrices and the midpoint rule: forces at
    the rotors change momentum and angular momentum. -> position, velocity, rotation matrix,
    angular velocity in the body's frame, motors, at the end."""
    p = {name: value.numpy() for name, value in parts.items()}
    rotors = np.concatenate([p["arm"][:, None] / 2**0.5 * SIDES.numpy(),
                             np.zeros((len(p["arm"]), 4, 1))], -1)
    wanted = (actions.numpy() + 1) / 2
    turned = Rotation.from_quat(p["quaternion"][:, [1, 2, 3, 0]])

    def spinning(turned, momentum):
        """Angular velocity, in the world."""
        return turned.apply(turned.inv().apply(momentum) / p["inertia"])

    def slopes(velocity, turned, momentum, motors):
        thrusts = motors * p["strength"] * p["mass"] * 9.81 / 4
        matrix = turned.as_matrix()
        up = matrix[:, :, 2]
        forces = thrusts[..., None] * up[:, None]
        at = np.einsum("bij,brj->bri", matrix, rotors)
        torque = np.cross(at, forces).sum(1) + p["yaw"] * (SPINS.numpy() * thrusts).sum(
            1, keepdims=True) * up
        force = forces.sum(1) + p["drag"] * (p["wind"] - velocity)
        return force / p["mass"] - [0, 0, 9.81], torque, (wanted - motors) / p["lag"]

    position, velocity, motors = p["position"], p["velocity"], p["motors"]
    momentum = turned.apply(p["inertia"] * p["angular"])
    for _ in range(round(seconds / dt)):
        change = slopes(velocity, turned, momentum, motors)
        middle = [x + dt / 2 * dx for x, dx in
                  zip((velocity, momentum, motors), change, strict=True)]
        half = Rotation.from_rotvec(dt / 2 * spinning(turned, momentum)) * turned
        change = slopes(middle[0], half, middle[1], middle[2])
        position = position + dt * middle[0]
        turned = Rotation.from_rotvec(dt * spinning(half, middle[1])) * turned
        velocity, momentum, motors = (x + dt * dx for x, dx in zip(
            (velocity, momentum, motors), change, strict=True))
    angular = turned.inv().apply(momentum) / p["inertia"]
    return [torch.from_numpy(x)
            for x in (position, velocity, turned.as_matrix(), angular, motors)]


def test_the_quadrotor_converges_to_a_rigid_body_as_its_steps_shrink():
    """Euler's method errs in proportion to the step: an eighth leaves an eighth."""
    parts = quadrotors()
    noise = torch.rand(64, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    actions = (hovering(parts) + 0.3 * (2 * noise - 1)).clamp(-1, 1)
    expected = rigid_bodies(parts, actions, 0.4)
    assert 3 < expected[3].abs().max() < 25 and expected[3].abs().median() > 1
    errors = []
    for refine in (1, 8, 64):
        end = fly(parts, actions, 20, refine)
        ours = [end["position"], end["velocity"], rotation(end["quaternion"]), end["angular"],
                end["motors"]]
        errors.append(torch.stack([(x - y).abs().max() for x, y in
                                   zip(ours, expected, strict=True)]))
    ratios = torch.stack([errors[0] / errors[1], errors[1] / errors[2]])
    assert (ratios > 5).all(), ratios
    assert (errors[2] < torch.tensor([0.01, 0.05, 0.02, 0.2, 0.01])).all(), errors


@pytest.mark.parametrize("more, axis, lean", [
    ([1, 0, 1, 0], 0, (1, -1)), ([0, 1, 0, 1], 0, (1, 1)),  # left: to the right; right: to the left
    ([0, 0, 1, 1], 1, (0, 1)), ([1, 1, 0, 0], 1, (0, -1)),  # back: forwards; front: backwards
])
def test_more_thrust_on_one_side_tilts_and_drives_towards_the_other(more, axis, lean):
    parts = quadrotors(8, **REST)
    actions = hovering(parts) + 0.05 * torch.tensor(more)
    expected = rigid_bodies(parts, actions, 0.2)
    end = fly(parts, actions, 10)
    way, sign = lean
    assert torch.equal(end["angular"][:, axis].sign(), expected[3][:, axis].sign())
    assert (sign * axis_up(end)[:, way] > 1e-3).all()
    assert (sign * expected[2][:, way, 2] > 1e-3).all()
    assert (sign * end["velocity"][:, way] > 1e-3).all()
    assert end["angular"][:, [k for k in range(3) if k != axis]].abs().max() < 1e-9
    assert end["velocity"][:, 1 - way].abs().max() < 1e-9


def test_a_step_turns_by_the_new_angular_velocity():
    """In the body's frame; the step is semi-implicit."""
    parts = quadrotors()
    actions = 2 * torch.rand(64, 4, generator=torch.Generator().manual_seed(2)) - 1
    end = fly(parts, actions)
    before, after = (Rotation.from_quat(p["quaternion"][:, [1, 2, 3, 0]].numpy())
                     for p in (parts, end))
    turned = torch.from_numpy((before.inv() * after).as_rotvec())
    torch.testing.assert_close(turned, Quadrotor.DT * end["angular"], rtol=1e-2, atol=1e-6)
    assert (end["angular"] - parts["angular"]).abs().max() > 0.3


def test_a_faster_diagonal_turns_the_nose_and_nothing_else():
    parts = quadrotors(8, **REST)
    end = fly(parts, hovering(parts) + 0.05 * SPINS, 10)
    assert (end["angular"][:, 2] > 1e-2).all() and end["angular"][:, :2].abs().max() < 1e-9
    assert (rotation(end["quaternion"])[:, 1, 0] > 1e-3).all()  # the nose, to the left
    assert end["position"].abs().max() < 1e-9


@pytest.mark.parametrize("wind", [[0.0, 0, 0], [1.0, -2, 0.5]])
def test_a_level_quadrotor_whose_thrust_is_its_weight_stays_or_drifts_with_the_wind(wind):
    parts = quadrotors(**{**REST, "wind": wind, "velocity": wind})
    parts["motors"] = (1 / parts["strength"]).expand(-1, 4)
    end = fly(parts, hovering(parts), 100)
    drift = 100 * Quadrotor.DT * torch.tensor(wind, dtype=torch.float64)
    torch.testing.assert_close(end["position"], drift.expand(64, 3), rtol=0, atol=1e-9)
    for name in parts.keys() - {"position"}:
        torch.testing.assert_close(end[name], parts[name], rtol=0, atol=1e-9)


def test_an_episode_begins_with_the_thrust_of_hovering_near_the_origin():
    parts = quadrotors(20_000)
    torch.testing.assert_close(parts["motors"], (1 / parts["strength"]).expand(-1, 4))
    torch.testing.assert_close(parts["quaternion"].norm(dim=-1),
                               torch.ones(20_000, dtype=torch.float64))
    for name, size in {"position": 2, "velocity": 1, "angular": 1, "wind": 2}.items():
        assert 0.99 * size < parts[name].abs().max() <= size
        assert parts[name].mean(0).abs().max() < 0.05 * size
    tilts = Rotation.from_quat(parts["quaternion"][:, [1, 2, 3, 0]].numpy()).as_rotvec()
    assert 0.49 < np.abs(tilts).max() <= 0.5 and np.abs(tilts.mean(0)).max() < 0.02
    _, _, lost = Quadrotor().step(pack(parts), hovering(parts)[None])
    assert not lost.any()


def test_a_body_without_thrust_and_drag_falls_freely():
    parts = quadrotors(motors=0.0, drag=0.0)
    end = fly(parts, -1.0, 50)
    fallen = torch.tensor([0, 0, -9.81 * 0.02], dtype=torch.float64)
    torch.testing.assert_close(end["velocity"], parts["velocity"] + 50 * fallen)
    torch.testing.assert_close(end["position"], parts["position"] + parts["velocity"]
                               + fallen * 0.02 * 50 * 51 / 2)


def test_angular_momentum_is_conserved_without_thrust_as_steps_shrink():
    parts = quadrotors(motors=0.0)
    parts["angular"] = 5 * parts["angular"]

    def momentum(parts):
        turned = Rotation.from_quat(parts["quaternion"][:, [1, 2, 3, 0]].numpy())
        return turned.apply((parts["inertia"] * parts["angular"]).numpy())

    before = momentum(parts)
    drifts = [np.abs(momentum(fly(parts, -1.0, 25, refine)) - before).max() / np.abs(before).max()
              for refine in (1, 8, 64)]
    assert (fly(parts, -1.0, 25)["angular"] - parts["angular"]).abs().max() > 0.5  # it tumbles
    assert drifts[0] < 0.2 and drifts[1] < drifts[0] / 5 and drifts[2] < drifts[1] / 5, drifts


def test_thrust_acts_along_the_bodys_z():
    parts = quadrotors(drag=0.0)
    end = fly(parts, hovering(parts))
    change = (end["velocity"] - parts["velocity"]) / Quadrotor.DT + torch.tensor([0, 0, 9.81])
    torch.testing.assert_close(change, 9.81 * axis_up(parts))
    assert axis_up(parts)[:, :2].abs().max() > 0.3


def test_full_thrust_lifts_by_thrust_to_weight_and_actions_end_at_their_bounds():
    parts = quadrotors(**REST, motors=1.0, drag=0.0)
    for action in (1.0, 7.0):
        change = fly(parts, action)["velocity"][:, 2:] / Quadrotor.DT
        torch.testing.assert_close(change, (parts["strength"] - 1) * 9.81)
    assert fly(parts, -7.0)["motors"].equal(fly(parts, -1.0)["motors"])


def test_motors_follow_the_action_with_their_lag():
    parts = quadrotors(motors=0.0)
    actions = torch.tensor([1.0, 0.5, 0, -1])
    for steps in (1, 5):
        left = (parts["lag"] / (parts["lag"] + Quadrotor.DT)) ** steps
        torch.testing.assert_close(fly(parts, actions, steps)["motors"],
                                   (actions + 1) / 2 * (1 - left))


def test_drag_pulls_the_velocity_towards_the_wind():
    parts = quadrotors(motors=0.0)
    end = fly(parts, -1.0)
    change = end["velocity"] - parts["velocity"] + 0.02 * torch.tensor([0, 0, 9.81])
    pull = parts["wind"] - parts["velocity"]
    torch.testing.assert_close(change, parts["drag"] * 0.02 / parts["mass"] * pull)
    assert ((change * pull).sum(-1) > 0).all()


def test_rotation_equals_scipys():
    q = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q = q / q.norm(dim=-1, keepdim=True)
    expected = Rotation.from_quat(q[:, [1, 2, 3, 0]].numpy()).as_matrix()
    np.testing.assert_allclose(rotation(q).numpy(), expected, atol=1e-12)


def test_the_quaternion_keeps_its_length_and_the_state_its_bounds_under_random_actions():
    env, generator = Quadrotor(), torch.Generator().manual_seed(0)
    state = pack(quadrotors(64)).float()
    before, fastest = unpack(state), 0.0
    for _ in range(500):
        bang = torch.randint(2, (1, 64, 4), generator=generator) * 2.0 - 1
        bang[:, :8] = torch.tensor([1.0, -1, 1, -1])  # rolls as fast as it can
        state, rewards, _ = env.step(state, bang)
        parts = unpack(state)
        assert (parts["quaternion"].norm(dim=-1) - 1).abs().max() < 1e-6
        assert ((parts["motors"] >= 0) & (parts["motors"] <= 1)).all()
        assert ((rewards >= -1) & (rewards <= 1)).all()
        fastest = max(fastest, float(parts["angular"].abs().max()))
    assert state.isfinite().all() and fastest == 30
    for name in ("mass", "arm", "inertia", "strength", "yaw", "drag", "lag", "wind"):
        assert torch.equal(parts[name], before[name])


def test_every_episode_has_another_body_and_other_wind():
    parts = quadrotors(1000)
    for name in ("mass", "arm", "inertia", "strength", "yaw", "drag", "lag", "wind"):
        for column in parts[name].T:
            assert len(set(column.tolist())) == 1000 and column.std() > 0.1 * column.abs().mean()
    drawn = torch.cat([parts["inertia"] / (parts["mass"] * parts["arm"] ** 2), parts["position"],
                       parts["velocity"], parts["angular"], parts["quaternion"][:, 1:]]
                      + [parts[k] for k in PARTS if k not in
                         ("inertia", "position", "velocity", "angular", "quaternion", "motors")], 1)
    apart = torch.corrcoef(drawn.T) - torch.eye(drawn.shape[1])
    assert apart.abs().max() < 0.9  # no two are drawn from one number


def test_bodies_are_physically_possible():
    """No principal moment of inertia is larger than the sum of the others."""
    parts = quadrotors(20_000)
    for name in ("mass", "arm", "inertia", "yaw", "drag", "lag"):
        assert (parts[name] > 0).all()
    assert (parts["strength"] > 1.2).all()  # it can climb
    gyration = (parts["inertia"] / parts["mass"]).sqrt()
    assert (gyration < 1.5 * parts["arm"]).all() and (gyration > 0.2 * parts["arm"]).all()
    assert (2 * parts["inertia"].amax(-1) <= parts["inertia"].sum(-1)).all()


def test_the_quadrotors_observation_has_22_entries_and_hides_the_body():
    parts = quadrotors(8, motors=[0.1, 0.2, 0.3, 0.4])
    obs = Quadrotor().observe(pack(parts))
    turned = Rotation.from_quat(parts["quaternion"][:, [1, 2, 3, 0]].numpy()).as_matrix()
    expected = torch.cat([parts["position"], parts["velocity"],
                          torch.from_numpy(turned).flatten(1), 0.1 * parts["angular"],
                          2 * parts["motors"] - 1], -1)
    torch.testing.assert_close(obs[0], expected)
    spec = make_envs("torch/Quadrotor-v0", [0]).spec
    assert obs.shape[-1] == spec.obs_dim == 22 and spec.action_dim == 4
    hidden = {name: 2 * parts[name] for name in list(PARTS)[5:]}
    assert torch.equal(Quadrotor().observe(pack({**parts, **hidden})), obs)


@pytest.mark.parametrize("way", [[1.0, 0, 0], [0, -1, 0], [0, 0, 1], [0.6, 0, -0.8]])
def test_the_quadrotor_is_lost_beyond_five_metres(way):
    away = torch.tensor(way, dtype=torch.float64)
    for metres in (4.99, 5.01):
        parts = quadrotors(4, **{**REST, "position": metres * away})
        _, _, lost = Quadrotor().step(pack(parts), hovering(parts)[None])
        assert lost.all() == lost.any() == (metres > 5)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_quadrotor_is_lost_upside_down(axis):
    for degrees in (-179, -91, -89, 0, 89, 91, 179):
        half = math.radians(degrees) / 2
        quaternion = [math.cos(half), 0, 0, 0]
        quaternion[1 + axis] = math.sin(half)
        parts = quadrotors(4, **{**REST, "quaternion": quaternion})
        _, _, lost = Quadrotor().step(pack(parts), hovering(parts)[None])
        assert lost.all() == lost.any() == (abs(degrees) > 90)


def test_the_quadrotors_reward_is_highest_for_hovering_at_the_origin():
    def reward(action=None, **fixed):
        parts = quadrotors(16, **{**REST, **fixed})
        actions = hovering(parts) if action is None else torch.full((16, 4), action)
        return Quadrotor().step(pack(parts), actions[None])[1]

    still = reward()
    assert ((still > 0.98) & (still <= 1)).all()
    assert (reward(position=0.5) < still - 0.1).all()
    assert (reward(position=2.0) < reward(position=0.5)).all()
    assert (reward(angular=3.0) < still - 0.1).all()
    assert (reward(angular=30.0) >= -1e-9).all() and (reward(angular=30.0, position=2.0) > -1).all()
    for waste in (-1.0, 1.0):
        assert (reward(waste) < still - 0.02).all()


class Diary(TorchEnv):
    """Observes its random start and its step; the reward is the action. The start says when the
    task ends: after 2, 3, 4 steps, with the time, or not before it."""

    obs_dim, action_low, action_high, max_episode_steps, randoms = 2, [-9.0], [9.0], 4, 1

    def initial(self, uniform):
        return torch.cat([uniform, torch.zeros_like(uniform)], -1)

    def step(self, state, actions):
        state = state + torch.tensor([0.0, 1.0])
        terminated = state[..., 1] >= 2 + torch.floor(4 * state[..., 0])
        return state, actions.squeeze(-1), terminated

    def observe(self, state):
        return state


class Blink(Diary):
    """Each episode is one step."""

    max_episode_steps, randoms = 1, 1


@pytest.fixture
def diary(monkeypatch):
    monkeypatch.setitem(ENVS, "Diary-v0", Diary)
    monkeypatch.setitem(ENVS, "Blink-v0", Blink)

    def make(seeds=(0, 1), num_envs=3, name="Diary-v0", **settings):
        return make_envs(f"torch/{name}", list(seeds), num_envs, **settings)

    return make


def noise(stack, steps, seed=0):
    """Actions (S, N, A) for each step."""
    shape = steps, *stack.shape, stack.spec.action_dim
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def test_episodes_end_by_termination_or_else_by_time_and_then_begin_anew(diary):
    stack = diary()
    obs, seen = stack.reset(), set()
    assert (obs[..., 1] == 0).all()
    for actions in noise(stack, 40):
        t = stack.step(actions)
        assert torch.equal(t.next_obs, obs + torch.tensor([0.0, 1.0]))
        kind, steps = torch.floor(4 * obs[..., 0]), t.next_obs[..., 1]
        terminated = steps == 2 + kind
        truncated = (steps == 4) & ~terminated
        assert torch.equal(t.terminations, terminated.float())
        assert torch.equal(t.truncations, truncated.float())
        ended = terminated | truncated
        assert torch.equal(t.obs[~ended], t.next_obs[~ended])
        assert (t.obs[ended][:, 1] == 0).all()
        assert (t.obs[ended][:, 0] != obs[ended][:, 0]).all()
        seen |= set(zip(kind[ended].tolist(), truncated[ended].tolist(), strict=True))
        obs = t.obs
    assert seen == {(0, False), (1, False), (2, False), (3, True)}


@pytest.mark.parametrize("name", ENVS)
def test_a_reset_leaves_the_states_of_running_episodes_untouched(name):
    stack = make_envs(f"torch/{name}", [0, 1], 8)
    stack.reset()
    stack.running[0, :, ::2] = stack.spec.max_episode_steps - 10  # so that some end by time
    ends = 0
    for actions in noise(stack, 30):
        expected, rewards, terminated = stack.env.step(stack.state, actions)
        t = stack.step(actions)
        ended = (t.terminations + t.truncations) > 0
        assert torch.equal(t.terminations > 0, terminated) and torch.equal(t.rewards, rewards)
        assert torch.equal(t.next_obs, stack.env.observe(expected))
        assert torch.equal(stack.state[~ended], expected[~ended])
        assert (stack.state[ended] != expected[ended]).any(-1).all()
        assert torch.equal(t.obs, stack.env.observe(stack.state))
        ends += int(ended.sum())
    assert ends >= 8


def test_no_two_episodes_begin_alike(diary):
    """Nor those on either side of the border of a block of random numbers."""
    stack = diary(range(3), 2, "Blink-v0")
    starts = [stack.reset()] + [stack.step(actions).obs for actions in noise(stack, 2 * BLOCK + 8)]
    starts = torch.stack(starts)[..., 0].flatten().tolist()
    assert len(set(starts)) == len(starts) == 6 * (2 * BLOCK + 9)


def test_seeds_alone_and_in_a_stack_begin_equal_episodes_and_streams_differ(diary):
    def starts(seeds, *stream):
        stack = diary(seeds, 2, "Blink-v0")
        stack.reset(9)
        stack.step(noise(stack, 1)[0])
        stack.reset(*stream)  # begins anew
        return torch.stack([stack.step(actions).obs for actions in noise(stack, BLOCK + 8)])

    stack = starts([5, 7, 3])
    assert torch.equal(stack, starts([5, 7, 3]))
    assert torch.equal(stack[:, 2:], starts([3])) and torch.equal(starts([3]), starts([3], 0))
    streams = [starts([3], *stream) for stream in [(0,), (1,), (1, 10), (1, 20)]]
    for a, b in itertools.combinations([*streams, stack[:, :1]], 2):
        assert not (a[..., 0] == b[..., 0]).any()


def test_finished_episodes_have_raw_returns_and_lengths_and_are_told_once(diary):
    stack = diary(num_envs=5, clip_reward=(-0.5, 0.25))
    stack.reset()
    stack.step(9 * torch.ones(2, 5, 1))
    stack.reset()  # what was running does not count
    running, done = defaultdict(list), defaultdict(list)
    assert stack.finished() == [(0, 0, 0), (0, 0, 0)]
    for k, actions in enumerate(noise(stack, 60)):
        t = stack.step(actions)
        assert torch.equal(t.rewards, actions[..., 0].clamp(-0.5, 0.25))
        ended = (t.terminations + t.truncations) > 0
        for s, n in itertools.product(range(2), range(5)):
            running[s, n].append(float(actions[s, n, 0]))
            if ended[s, n]:
                done[s].append(running.pop((s, n)))
        if k % 20 == 19:
            for s, (episodes, mean_return, length) in enumerate(stack.finished()):
                lengths, returns = map(len, done[s]), map(sum, done[s])
                assert episodes == len(done[s]) > 10
                assert length == pytest.approx(sum(lengths) / episodes, rel=1e-12)
                assert mean_return == pytest.approx(sum(returns) / episodes, rel=1e-12)
            done.clear()
    stack.step(noise(stack, 1)[0])
    stack.reset()
    assert stack.finished() == [(0, 0, 0), (0, 0, 0)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ENVS)
def test_actions_that_are_not_finite_count_as_zero(name, bad):
    calm, broken = (make_envs(f"torch/{name}", [0, 1], 2) for _ in range(2))
    calm.reset()
    broken.reset()
    for actions in noise(calm, 5):
        actions[0] = 0
        expected = calm.step(actions)
        actions[0] = bad
        for x, y in zip(broken.step(actions), expected, strict=True):
            assert torch.equal(x, y) and x.dtype == torch.float32


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: reading values, and copying constants there."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        ops = torch.ops.aten
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if (
            op is ops.index.Tensor) else []
        assert not masks and op.overloadpacket not in (
            ops.lift_fresh, ops._local_scalar_dense, ops.nonzero, ops.masked_select), (
            f"{op} waits for the device")
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ENVS)
def test_a_step_reads_no_value_and_copies_no_constant_to_the_device(name):
    """Either would make the host wait; this tells it without a GPU, where the next test needs one.
    Tensors on "meta" have no values."""
    stack = make_envs(f"torch/{name}", [0, 1], 2, clip_reward=(-1, 1))
    stack.reset()
    actions = noise(stack, 1)[0]
    with NoWaiting():
        for _ in range(BLOCK + 1):
            stack.step(actions)
    stack._advance(*(x.to("meta") for x in (stack.state, stack.running, stack.sums, actions,
                                            stack._uniform())))


@needs_cuda
@pytest.mark.parametrize("name", ENVS)
def test_the_host_waits_for_nothing_between_two_finished_on_cuda(name):
    stack = make_envs(f"torch/{name}", [0, 1], 16, device="cuda", clip_reward=(-1, 1))
    stack.reset()
    actions = noise(stack, 2 * BLOCK).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for k in range(2 * BLOCK):
            t = stack.step(actions[k])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.device.type == "cuda" and x.isfinite().all() for x in t)
    assert len(stack.finished()) == 2


@needs_compiler
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ContinuousCartPole-v1", "Quadrotor-v0"])
def test_compiled_and_eager_steps_agree(name, device):
    """From equal seeds, over the ends of episodes, to 1e-4. All steps are one compiled graph."""
    torch._dynamo.reset()  # of another task's shapes, which would count as a second graph
    counters.clear()
    eager, compiled = (make_envs(f"torch/{name}", [0, 1], 4, device=device, compile=compile)
                       for compile in (False, True))
    torch.testing.assert_close(compiled.reset(), eager.reset())
    ends = 0
    for actions in noise(eager, 70).to(device):
        x, y = (stack.step(actions - 0.8) for stack in (compiled, eager))
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        ends += int((y.terminations + y.truncations).sum())
    assert ends >= 4 and counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for x, y in zip(compiled.finished(), eager.finished(), strict=True):
        assert x == pytest.approx(y, rel=1e-4) and sum(y) > 0


def test_an_environment_of_the_users_works_by_name_and_with_its_module(
        diary, tmp_path, monkeypatch):
    assert diary().spec == EnvSpec("torch/Diary-v0", 2, 1, (-9.0,), (9.0,), 4)
    monkeypatch.setattr(torch_tasks, "ENVS", dict(ENVS))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tests_of_users.py").write_text(
        "from lab.envs import torch_tasks\n"
        "class Own(torch_tasks.Pendulum):\n    max_episode_steps = 3\n"
        "torch_tasks.ENVS['Own-v0'] = Own\n")
    try:
        stack = make_envs("tests_of_users:torch/Own-v0", [0])
    finally:
        sys.modules.pop("tests_of_users", None)
    assert stack.spec.id == "torch/Own-v0" and stack.spec.max_episode_steps == 3
    stack.reset()
    assert [float(stack.step(a).truncations) for a in noise(stack, 6)] == [0, 0, 1, 0, 0, 1]
    with pytest.raises(UserError, match="no_such_module"):
        make_envs("no_such_module:torch/Own-v0", [0])


@pytest.mark.parametrize("env_id, backend, near", [
    ("torch/Pendulum-v0", None, "torch/Pendulum-v1"), ("torch/quadrotor", None, "torch/Quadrotor"),
    ("torch/CartPole-v2", None, "torch/CartPole-v1"), ("torch/", None, "torch/"),
    ("Pendulum-v2", "torch", "torch/Pendulum-v1")])
def test_an_unknown_id_is_named_in_one_line_with_those_that_exist(env_id, backend, near):
    with pytest.raises(UserError) as caught:
        make_envs(env_id, [0], backend=backend)
    line = str(caught.value)
    unknown, known = line.split(";")
    assert "\n" not in line and unknown.endswith("torch/" + env_id.removeprefix("torch/"))
    named = re.findall(r"torch/[\w-]+", known)
    assert near in known and named and set(named) <= {f"torch/{name}" for name in ENVS}
