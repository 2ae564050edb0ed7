"""Environments in plain torch: all instances step at once, on the agent's device.

An environment is a class of pure functions on states (S, N, D). TorchEnvs applies the time limit,
starts new episodes and sums returns. To add an environment, put its class into ENVS; see
docs/vectorised.md.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class TorchEnv:
    obs_dim: int
    action_low: Sequence[float]
    action_high: Sequence[float]
    num_actions: Sequence[int] = ()  # instead of bounds: the choices of each discrete action
    max_episode_steps: int
    randoms: int  # uniform numbers that a new episode needs
    twin: str | None = None  # the gymnasium environment that renders the same state

    def initial(self, uniform: Tensor) -> Tensor:
        """uniform (S, N, randoms) in [0, 1) -> initial states (S, N, D)."""
        raise NotImplementedError

    def step(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> next states (S, N, D), rewards (S, N), terminations (S, N) bool."""
        raise NotImplementedError

    def observe(self, state: Tensor) -> Tensor:
        """-> obs (S, N, O)."""
        raise NotImplementedError


class Pendulum(TorchEnv):
    """gymnasium's Pendulum-v1. State: angle from upright, angular velocity."""

    twin = "Pendulum-v1"
    obs_dim, action_low, action_high, max_episode_steps, randoms = 3, [-2.0], [2.0], 200, 2

    def initial(self, uniform: Tensor) -> Tensor:
        angle, velocity = (2 * uniform - 1).unbind(-1)
        return torch.stack([math.pi * angle, velocity], -1)

    def step(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gravity, mass, length, dt = 10.0, 1.0, 1.0, 0.05
        angle, velocity = state.unbind(-1)
        torque = actions.squeeze(-1).clamp(-2, 2)
        centred = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        cost = centred.square() + 0.1 * velocity.square() + 0.001 * torque.square()
        acceleration = 1.5 * gravity / length * angle.sin() + 3 / (mass * length**2) * torque
        velocity = (velocity + acceleration * dt).clamp(-8, 8)
        state = torch.stack([angle + velocity * dt, velocity], -1)
        return state, -cost, torch.zeros_like(cost, dtype=torch.bool)

    def observe(self, state: Tensor) -> Tensor:
        angle, velocity = state.unbind(-1)
        return torch.stack([angle.cos(), angle.sin(), velocity], -1)


class MountainCar(TorchEnv):
    """gymnasium's MountainCarContinuous-v0. State: position, velocity."""

    twin = "MountainCarContinuous-v0"
    obs_dim, action_low, action_high, max_episode_steps, randoms = 2, [-1.0], [1.0], 999, 1

    def initial(self, uniform: Tensor) -> Tensor:
        return torch.cat([-0.6 + 0.2 * uniform, torch.zeros_like(uniform)], -1)

    def step(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position, velocity = state.unbind(-1)
        action = actions.squeeze(-1)
        force = 0.0015 * action.clamp(-1, 1)
        velocity = (velocity + force - 0.0025 * (3 * position).cos()).clamp(-0.07, 0.07)
        position = (position + velocity).clamp(-1.2, 0.6)
        velocity = torch.where((position <= -1.2) & (velocity < 0), 0.0, velocity)  # the wall
        terminated = (position >= 0.45) & (velocity >= 0)
        rewards = 100.0 * terminated - 0.1 * action.square()
        return torch.stack([position, velocity], -1), rewards, terminated

    def observe(self, state: Tensor) -> Tensor:
        return state


class CartPole(TorchEnv):
    """gymnasium's CartPole-v1 with a continuous force in [-10, 10] N instead of its -10 or 10 N.
    State: position and velocity of the cart, angle and angular velocity of the pole."""

    twin = "CartPole-v1"
    obs_dim, action_low, action_high, max_episode_steps, randoms = 4, [-1.0], [1.0], 500, 4

    def initial(self, uniform: Tensor) -> Tensor:
        return 0.1 * uniform - 0.05

    def step(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gravity, cart, pole, half_length, dt = 9.8, 1.0, 0.1, 0.5, 0.02
        x, speed, angle, turn = state.unbind(-1)
        force = 10 * actions.squeeze(-1).clamp(-1, 1)
        sin, cos = angle.sin(), angle.cos()
        push = (force + pole * half_length * turn.square() * sin) / (cart + pole)
        inertia = half_length * (4 / 3 - pole * cos.square() / (cart + pole))
        angular = (gravity * sin - cos * push) / inertia
        linear = push - pole * half_length * angular * cos / (cart + pole)
        state = state + dt * torch.stack([speed, linear, turn, angular], -1)
        fallen = (state[..., 0].abs() > 2.4) | (state[..., 2].abs() > 12 * math.pi / 180)
        return state, torch.ones_like(x), fallen

    def observe(self, state: Tensor) -> Tensor:
        return state


class DiscreteCartPole(CartPole):
    """gymnasium's CartPole-v1: action 0 pushes with -10 N, 1 with 10 N."""

    num_actions = [2]

    def step(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().step(state, 2 * actions - 1)


class CartPoleWithoutVelocity(CartPole):
    """Only the cart's position and the pole's angle are observed: balancing needs memory."""

    obs_dim = 2

    def observe(self, state: Tensor) -> Tensor:
        return state[..., ::2]


class Quadrotor(TorchEnv):
    """Fly a quadrotor to the origin and hover; every episode samples another body and wind.

    Mass, size, inertia, thrust, drag, motor lag and wind are sampled per episode and not observed.
    The policy has to fly all of them, so train on thousands of instances. Rigid body, z up,
    semi-implicit Euler at 50 Hz, motors in an x layout, SI units. State: position 3, velocity 3,
    quaternion (w, x, y, z), angular velocity 3 in the body frame, motors 4 (front left, front
    right, back left, back right), mass, arm, inertia 3, thrust to weight, yaw gain, drag, lag, wind
    3. Observed: position, velocity, rotation matrix, angular velocity / 10, 2 motors - 1. The
    episode terminates beyond 5 m from the origin or upside down.
    """

    obs_dim, action_low, action_high = 22, [-1.0] * 4, [1.0] * 4
    max_episode_steps, randoms = 500, 24
    GRAVITY, DT = 9.81, 0.02

    def initial(self, uniform: Tensor) -> Tensor:
        signed = 2 * uniform - 1
        position, velocity, axis, angular = signed[..., :12].split(3, -1)
        tilt = 0.5 * axis  # rotation vector, rad
        angle = tilt.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        quaternion = torch.cat([(angle / 2).cos(), tilt / angle * (angle / 2).sin()], -1)
        body = uniform[..., 12:]
        mass = 0.5 + body[..., :1]  # kg
        arm = 0.1 + 0.1 * body[..., 1:2]  # m
        level = mass * arm.square() * (0.3 + 0.2 * body[..., 2:4])  # kg m^2, about x and y
        upright = level.sum(-1, keepdim=True) * (0.8 + 0.2 * body[..., 4:5])
        strength, yaw, drag, lag = body[..., 5:9].split(1, -1)
        strength = 1.7 + 0.8 * strength  # thrust to weight
        gains = [strength, 0.01 + 0.02 * yaw, 0.05 + 0.25 * drag, 0.02 + 0.06 * lag]  # m, kg/s, s
        wind = 2 * (2 * body[..., 9:12] - 1)  # m/s
        hover = (1 / strength).expand(*strength.shape[:-1], 4)
        return torch.cat([2 * position, velocity, quaternion, angular, hover, mass, arm, level,
                          upright, *gains, wind], -1)

    def step(self, state: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position, velocity, q, angular, motors, mass, arm, inertia, gains, wind = state.split(
            [3, 3, 4, 3, 4, 1, 1, 3, 4, 3], -1)
        strength, yaw, drag, lag = gains.split(1, -1)
        wanted = 0.5 * (actions.clamp(-1, 1) + 1)
        motors = motors + (wanted - motors) * (self.DT / (lag + self.DT))
        thrusts = motors * strength * mass * self.GRAVITY / 4  # N each
        front_left, front_right, back_left, back_right = thrusts.unbind(-1)
        lever = arm.squeeze(-1) / 2**0.5
        torque = torch.stack([
            lever * (front_left + back_left - front_right - back_right),
            lever * (back_left + back_right - front_left - front_right),
            yaw.squeeze(-1) * (front_left + back_right - front_right - back_left)], -1)
        middle = angular  # midpoint rule for Euler's equations: an Euler step makes a spin wobble
        for step in (self.DT / 2, self.DT):
            turned = torque - torch.linalg.cross(middle, inertia * middle)
            middle = angular + step * turned / inertia
        angular = middle.clamp(-30, 30)
        up = rotation(q)[..., 2]  # z axis of the body in the world frame
        force = thrusts.sum(-1, keepdim=True) * up + drag * (wind - velocity)
        velocity = velocity + self.DT * (force / mass)
        velocity = torch.cat([velocity[..., :2], velocity[..., 2:] - self.DT * self.GRAVITY], -1)
        position = position + self.DT * velocity
        w, v = q[..., :1], q[..., 1:]
        change = torch.cat([-(v * angular).sum(-1, keepdim=True),
                            w * angular + torch.linalg.cross(v, angular)], -1)
        q = q + 0.5 * self.DT * change
        q = q / q.norm(dim=-1, keepdim=True)
        distance = position.norm(dim=-1)
        tilt = rotation(q)[..., 2, 2]
        effort = 0.01 * (actions.clamp(-1, 1).square().sum(-1) + angular.square().sum(-1))
        lost = (distance > 5) | (tilt < 0)
        rewards = 1 / (1 + distance.square()) - effort.clamp(max=1)
        return torch.cat([position, velocity, q, angular, motors, mass, arm, inertia, gains, wind],
                         -1), rewards, lost

    def observe(self, state: Tensor) -> Tensor:
        position, velocity, q, angular, motors, _ = state.split([3, 3, 4, 3, 4, 12], -1)
        turned = rotation(q).flatten(-2)
        return torch.cat([position, velocity, turned, 0.1 * angular, 2 * motors - 1], -1)


def rotation(q: Tensor) -> Tensor:
    """Unit quaternions (..., 4), (w, x, y, z) -> rotation matrices (..., 3, 3), body to world."""
    w, x, y, z = q.unbind(-1)
    return torch.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ], -1).unflatten(-1, (3, 3))


ENVS: dict[str, type[TorchEnv]] = {
    "Pendulum-v1": Pendulum, "MountainCarContinuous-v0": MountainCar,
    "ContinuousCartPole-v1": CartPole, "CartPole-v1": DiscreteCartPole,
    "CartPoleWithoutVelocity-v1": CartPoleWithoutVelocity, "Quadrotor-v0": Quadrotor}
