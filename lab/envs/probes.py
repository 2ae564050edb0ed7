"""Environments with a known optimal policy, for lab/check/ and the tests. No torch, to keep workers
that import this small."""

from typing import Any

import gymnasium
import numpy as np

Step = tuple[np.ndarray, float, bool, bool, dict[str, Any]]


class Target(gymnasium.Env):
    """Four steps. The optimal action is an affine function of the observation, with reward 0.

    The action bounds are asymmetric and differ between the two dimensions.
    """

    centre, slope = np.array([0.5, 2.0]), np.array([-0.4, 1.0])
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(
        np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None
              ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> Step:
        best = self.centre + self.slope * self.obs[-len(self.slope):]
        low, high = self.action_space.low, self.action_space.high
        cost = float(np.square((action - best) / (high - low)).sum())
        self.steps += 1
        return self._observe(), -cost, False, self.steps == 4, {}

    def _observe(self) -> np.ndarray:
        self.obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.obs


class OneTarget(Target):
    """With the second dimension alone."""

    centre, slope = Target.centre[1:], Target.slope[1:]
    action_space = gymnasium.spaces.Box(0.0, 4.0, (1,), np.float32)


def best_constant(task: type[Target]) -> float:
    """Episode return of the best constant action, where the optimum is 0. At each of 4 steps it
    costs the variance of the optimal action: slope^2 / 3 per dimension (observations are uniform in
    [-1, 1]), with the slope in units of the action range."""
    box: Any = task.action_space
    return -4 * float((task.slope**2 / 3 / (box.high - box.low)**2).sum())


# States of Fork: five decisions, one intermediate state (WAY), and two that pay
TRUNCATED, SUCCESSOR, TERMINATED, TRACE, RING, WAY, HIDDEN, PRIZE = range(8)
BEST = 1, 1, 1, 1, -1  # optimal actions in the decision states, scaled to [-1, 1]


class Fork(gymnasium.Env):
    """Five decision states in episodes of at most three steps. In each state, one common bug of an
    agent reverses the sign of the best action.

    The action, scaled to u in [-1, 1], trades the immediate reward against a later prize: the state
    (PRIZE, x) gives reward 2 x and terminates. The optimal actions are BEST for every discount from
    0.6 to 1.

    TRUNCATED   reward -0.5 u, then a truncation with the successor (PRIZE, u). An agent that does
                not bootstrap there chooses -1
    SUCCESSOR   reward 0.1 u, then a truncation with the successor (PRIZE, u / 2); the next episode
                starts at (PRIZE, -u). An agent that bootstraps from the new episode chooses -1
    TERMINATED  reward 0.5 u, then a termination with the successor (PRIZE, -u). An agent that
                bootstraps there chooses -1
    TRACE       reward 0.5 u, then a termination; the next episode starts at (HIDDEN, -u), which
                gives reward -2 u and terminates, and whose observation does not show u. An agent
                whose advantages run on into the next episode chooses -1
    RING        reward 4 - 0.5 u; if u > 0, the successor is WAY and then (PRIZE, 0), otherwise the
                episode terminates. In a replay of two transitions, the oldest is RING when the
                newest is WAY. An agent that links the two collects the 4 again and again and keeps
                u > 0
    """

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (PRIZE + 1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 3.0, (1,), np.float32)
    begin_at: tuple[int, float] | None = None  # state and prize at which the next episode starts

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None
              ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if self.begin_at is None:
            return self._go(int(self.np_random.integers(WAY))), {}
        (state, prize), self.begin_at = self.begin_at, None
        return self._go(state, prize), {}

    def step(self, action: np.ndarray) -> Step:
        u = float(np.clip((action[0] - 1) / 2, -1, 1))
        if self.state == TRUNCATED:
            self.begin_at = PRIZE, u
            return self._go(PRIZE, u), -0.5 * u, False, True, {}
        if self.state == SUCCESSOR:
            self.begin_at = PRIZE, -u
            return self._go(PRIZE, u / 2), 0.1 * u, False, True, {}
        if self.state == TERMINATED:
            self.begin_at = PRIZE, -u
            return self._go(PRIZE, -u), 0.5 * u, True, False, {}
        if self.state == TRACE:
            self.begin_at = HIDDEN, -u
            return self._go(PRIZE), 0.5 * u, True, False, {}
        if self.state == RING:
            return self._go(WAY if u > 0 else PRIZE), 4 - 0.5 * u, u <= 0, False, {}
        if self.state == WAY:
            return self._go(PRIZE), 0.0, False, False, {}
        reward = 2 * self.prize
        return self._go(PRIZE), reward, True, False, {}

    def _go(self, state: int, prize: float = 0.0) -> np.ndarray:
        self.state, self.prize = state, prize
        obs = np.zeros(PRIZE + 1, np.float32)
        obs[state] = 1.0 if state < PRIZE else prize
        return obs


class Discretised(gymnasium.ActionWrapper):
    """With `bins` evenly spaced choices, from the low to the high bound, of each action."""

    def __init__(self, env: gymnasium.Env, bins: list[int]):
        super().__init__(env)
        self.box: Any = env.action_space
        self.bins = np.array(bins)
        self.action_space = gymnasium.spaces.MultiDiscrete(self.bins)

    def action(self, action: np.ndarray) -> np.ndarray:
        share = action / (self.bins - 1)
        return (self.box.low + share * (self.box.high - self.box.low)).astype(np.float32)


for name in ("Target", "Fork"):
    gymnasium.register(f"lab/{name}-v0", f"lab.envs.probes:{name}")
gymnasium.register("lab/DiscreteTarget-v0", lambda **_: Discretised(Target(), [5, 9]))
gymnasium.register("lab/OneDiscreteTarget-v0", lambda **_: Discretised(OneTarget(), [9]))
gymnasium.register("lab/DiscreteFork-v0", lambda **_: Discretised(Fork(), [2]))
