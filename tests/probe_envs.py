"""An environment with a known optimum on which every agent must learn."""

import gymnasium
import numpy as np

# Returns of an episode: the optimum is 0. The best action that ignores the observation costs the
# variance of the best one, a third of its slope squared, in units of the range, at each of 4 steps.
BEST_CONSTANT = -4 * (0.4**2 / 3 / 2**2 + 1.0**2 / 3 / 4**2)


class Target(gymnasium.Env):
    """Four steps; the best action is a known affine function of the observation, and costs nothing.

    The bounds are asymmetric and differ between the two dimensions.
    """

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(
        np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32), dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        best = np.array([0.5, 2.0]) + np.array([-0.4, 1.0]) * self.obs
        low, high = self.action_space.low, self.action_space.high
        cost = float(np.square((action - best) / (high - low)).sum())
        self.steps += 1
        return self._observe(), -cost, False, self.steps == 4, {}

    def _observe(self):
        self.obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.obs


if "lab-tests/Target-v0" not in gymnasium.registry:
    gymnasium.register("lab-tests/Target-v0", Target)
