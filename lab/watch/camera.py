"""Render gymnasium environments, with or without a display. No torch: `check` imports this in a
subprocess, which should start fast."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import gymnasium
import numpy as np

from lab.envs.check import describe
from lab.envs.spec import make_one
from lab.errors import CodeError, UserError, one_line

PATIENCE = 60  # seconds for a backend to draw one frame
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
        rendered = self.render()
        frame = as_picture(rendered)
        if frame is None:
            raise UserError(f"{self.spec and self.spec.id} must render an array (height, width, "
                            f"3), not {describe(rendered)}")
        return frame

    @property
    def fps(self) -> float:
        return float(self.metadata.get("render_fps") or FPS)


def as_picture(frame: Any) -> np.ndarray | None:
    """(height, width, 3) uint8, also from grey or RGBA pixels and from floats in [0, 1]; None if it
    is no picture."""
    try:
        pixels = np.asarray(frame)
    except ValueError:  # ragged
        return None
    if pixels.dtype.kind not in "biuf" or pixels.size == 0:
        return None
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        return None
    if pixels.dtype.kind in "bf" and pixels.max() <= 1:
        pixels = 255.0 * pixels
    if pixels.dtype != np.uint8:
        pixels = np.nan_to_num(pixels).clip(0, 255).round().astype(np.uint8)
    return np.broadcast_to(pixels[..., :3], (*pixels.shape[:2], 3))


def make(env_id: str, env_kwargs: Sequence[str] = ()) -> Camera:
    """UserError if the environment has no render mode "rgb_array"."""
    try:
        env = make_one(env_id, env_kwargs, render_mode="rgb_array")
    except CodeError as error:
        if isinstance(error.__cause__, TypeError):  # its constructor takes no render_mode
            raise UserError(f"{env_id} cannot be rendered: {error.__cause__}") from error
        raise
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
    # the reason goes to the stdout of the subprocess, what the environment prints to stderr
    code = ("import os, sys; out = os.fdopen(os.dup(1), 'w'); os.dup2(2, 1); "
            "from lab.watch import camera; camera.dry_run(sys.argv[1], sys.argv[2:], out)")
    reasons = {}
    for gl in [os.environ["MUJOCO_GL"]] if os.environ.get("MUJOCO_GL") else GL:
        try:
            done = subprocess.run([sys.executable, "-c", code, env_id, *env_kwargs], text=True,
                                  capture_output=True, env=os.environ | {"MUJOCO_GL": gl},
                                  timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            reasons[gl] = f"no answer in {PATIENCE} s"
            continue
        if done.returncode == 0:
            os.environ["MUJOCO_GL"] = gl
            return
        if done.returncode == 2:
            raise UserError(done.stdout.strip())
        reasons[gl] = done.stdout.strip() or f"exit code {done.returncode}"
    tried = "; ".join(f"{gl}: {reason}" for gl, reason in reasons.items())
    raise UserError(f"{env_id} cannot be rendered ({tried}); without a display MuJoCo needs EGL "
                    "(apt install libegl1) or OSMesa (apt install libosmesa6)")


def dry_run(env_id: str, env_kwargs: Sequence[str], out: TextIO) -> None:
    """Render one frame. On failure writes the reason in one line to `out`; exit code 2 for a
    UserError, else 1."""
    try:
        env = make(env_id, env_kwargs)
        env.reset()
        env.frame()
        env.close()
    except Exception as error:
        print(one_line(error), file=out, flush=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
