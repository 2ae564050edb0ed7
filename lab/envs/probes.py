"""Environments whose best behaviour is known, for lab/check/ and the tests. No torch: a worker
that imports this stays small."""

from typing import Any

import gymnasium
import numpy as np

Step = tuple[np.ndarray, float, bool, bool, dict[str, Any]]

# Returns of an episode of Target: the optimum is 0. The best action that ignores the observation
# costs the variance of the best one, a third of its slope squared, in units of the range, at each
# of 4 steps.
BEST_CONSTANT = -4 * (0.4**2 / 3 / 2**2 + 1.0**2 / 3 / 4**2)


class Target(gymnasium.Env):
    """Four steps; the best action is a known affine function of the observation, and costs nothing.

    The bounds are asymmetric and differ between the two dimensions.
    """

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(
        np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32), dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None
              ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> Step:
        best = np.array([0.5, 2.0]) + np.array([-0.4, 1.0]) * self.obs
        low, high = self.action_space.low, self.action_space.high
        cost = float(np.square((action - best) / (high - low)).sum())
        self.steps += 1
        return self._observe(), -cost, False, self.steps == 4, {}

    def _observe(self) -> np.ndarray:
        self.obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.obs


# States of Fork: four in which to decide, one on the way, and prizes
TRUNCATED, SUCCESSOR, TERMINATED, RING, WAY, PRIZE = range(6)
BEST = 1, 1, 1, -1  # of the actions in the first four, scaled to [-1, 1]


class Fork(gymnasium.Env):
    """Four decisions in episodes of a step or two; each has a mistake that turns it around.

    The action, scaled to u in [-1, 1], trades a small reward for a prize x that comes after: the
    state (PRIZE, x) gives 2 x and ends. So it is for every discount from 0.6 to 1.

    TRUNCATED   -0.5 u, then the prize u behind a truncation: who does not bootstrap there, takes -1
    SUCCESSOR   0.1 u, then the prize u / 2 behind a truncation, but the next episode begins at
                the prize -u: who takes that for the successor, takes -1
    TERMINATED  0.5 u, then the prize -u behind a termination: who bootstraps there, takes -1
    RING        4 - 0.5 u, and if u > 0 a way of two steps to the prize 0. Of a replay of two steps
                the oldest is RING when the newest is WAY: who joins them, gets the 4 again and
                again, and stays above 0
    """

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (6,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 3.0, (1,), np.float32)
    begin_at: float | None = None  # the prize at which the next episode begins

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None
              ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        if self.begin_at is None:
            return self._go(int(self.np_random.integers(WAY))), {}
        prize, self.begin_at = self.begin_at, None
        return self._go(PRIZE, prize), {}

    def step(self, action: np.ndarray) -> Step:
        u = float(np.clip((action[0] - 1) / 2, -1, 1))
        if self.state == TRUNCATED:
            self.begin_at = u
            return self._go(PRIZE, u), -0.5 * u, False, True, {}
        if self.state == SUCCESSOR:
            self.begin_at = -u
            return self._go(PRIZE, u / 2), 0.1 * u, False, True, {}
        if self.state == TERMINATED:
            self.begin_at = -u
            return self._go(PRIZE, -u), 0.5 * u, True, False, {}
        if self.state == RING:
            return self._go(WAY if u > 0 else PRIZE), 4 - 0.5 * u, u <= 0, False, {}
        if self.state == WAY:
            return self._go(PRIZE), 0.0, False, False, {}
        reward = 2 * self.prize
        return self._go(PRIZE), reward, True, False, {}

    def _go(self, state: int, prize: float = 0.0) -> np.ndarray:
        self.state, self.prize = state, prize
        obs = np.zeros(6, np.float32)
        obs[state] = 1.0 if state < PRIZE else prize
        return obs


for name in ("Target", "Fork"):
    gymnasium.register(f"lab/{name}-v0", f"lab.envs.probes:{name}")
