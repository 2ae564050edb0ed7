"""Render gymnasium environments, with or without a display. No torch: `check` imports this in a
subprocess, which should start fast."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from lab.envs.spec import make_one
from lab.errors import UserError

GL = ("egl", "osmesa", "glfw")  # MuJoCo's backends, in the order tried; glfw needs a display
FPS = 30.0  # if the environment has no render_fps


class Camera(gymnasium.Wrapper):
    """Keeps the last frame of an episode: the reset follows before a caller could render it."""

    last: np.ndarray

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            self.last = self.frame()
        return obs, reward, terminated, truncated, info

    def frame(self) -> np.ndarray:
        """(height, width, 3) uint8."""
        frame: Any = self.render()
        if np.ndim(frame) != 3 or np.shape(frame)[2] != 3:
            raise UserError(f"{self.spec and self.spec.id} must render an array (height, width, "
                            f"3), not {type(frame).__name__}")
        return np.asarray(frame, np.uint8)

    @property
    def fps(self) -> float:
        return float(self.metadata.get("render_fps") or FPS)


def make(env_id: str, env_kwargs: Sequence[str] = ()) -> Camera:
    """UserError if the environment has no render mode "rgb_array"."""
    try:
        env = make_one(env_id, env_kwargs, render_mode="rgb_array")
    except TypeError as error:  # its constructor takes no render_mode
        raise UserError(f"{env_id} cannot be rendered: {error}") from error
    if "rgb_array" not in env.metadata.get("render_modes", ()):
        raise UserError(f'{env_id} cannot be rendered: it has no render mode "rgb_array"')
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None:
        set_scene(renderer)
    return Camera(env)


def set_scene(renderer: Any) -> None:
    """Set MuJoCo's camera, floor and quality; the dynamics do not change."""
    import mujoco

    model = renderer.model
    # gymnasium 1.4's default camera stays behind; the model's own one, if any, tracks the body
    renderer.camera_id = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    # a fast body runs off the rendered floor (40 m) within seconds
    floors = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    model.geom_size[floors, :2] *= 25
    materials = np.unique(model.geom_matid[floors])
    model.mat_texrepeat[materials[materials >= 0]] *= 25
    # Mesa on a CPU: 0.04 s per frame, not 0.13; downscaling smooths the edges
    model.vis.quality.shadowsize, model.vis.quality.offsamples = 1024, 0


def check(env_id: str, env_kwargs: Sequence[str] = ()) -> None:
    """Set MUJOCO_GL to a backend that works here. UserError if the environment cannot be rendered.

    Renders in subprocesses, because a broken GL library may kill its process, and because MuJoCo
    reads MUJOCO_GL only once, at import.
    """
    code = "import sys; from lab.watch import camera; camera.dry_run(*sys.argv[1:])"
    reasons = {}
    for gl in [os.environ["MUJOCO_GL"]] if os.environ.get("MUJOCO_GL") else GL:
        done = subprocess.run([sys.executable, "-c", code, env_id, *env_kwargs], text=True,
                              capture_output=True, env=os.environ | {"MUJOCO_GL": gl})
        if done.returncode == 0:
            os.environ["MUJOCO_GL"] = gl
            return
        if done.returncode == 2:
            raise UserError(done.stdout.strip())
        reasons[gl] = done.stdout.strip() or f"exit code {done.returncode}"
    tried = "; ".join(f"{gl}: {reason}" for gl, reason in reasons.items())
    raise UserError(f"{env_id} cannot be rendered ({tried}); without a display MuJoCo needs EGL "
                    "(apt install libegl1) or OSMesa (apt install libosmesa6)")


def dry_run(env_id: str, *env_kwargs: str) -> None:
    """Render one frame. On failure prints the reason in one line; exit code 2 for a UserError, else
    1."""
    try:
        env = make(env_id, env_kwargs)
        env.reset()
        env.frame()
        env.close()
    except Exception as error:
        reason = " ".join(str(error).split())
        refused = isinstance(error, UserError)
        print(reason if refused else f"{type(error).__name__}: {reason}")
        sys.exit(2 if refused else 1)
