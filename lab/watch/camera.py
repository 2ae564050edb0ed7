"""Pictures of gymnasium's environments, with or without a display. No torch: see `check`."""

import os
import subprocess
import sys
from typing import Any

import gymnasium
import numpy as np

from lab.envs.spec import make_one
from lab.errors import UserError

GL = ("egl", "osmesa", "glfw")  # what MuJoCo may draw with; the last one needs a display
FPS = 30.0  # of an environment that does not say


class Camera(gymnasium.Wrapper):
    """Keeps an episode's last picture, because the next episode begins before anyone could ask."""

    last: np.ndarray

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            self.last = self.picture()
        return obs, reward, terminated, truncated, info

    def picture(self) -> np.ndarray:
        """(height, width, 3) uint8."""
        picture: Any = self.render()
        if np.ndim(picture) != 3 or np.shape(picture)[2] != 3:
            raise UserError(f"{self.spec and self.spec.id} draws no array (height, width, 3) but "
                            f"{type(picture).__name__}")
        return np.asarray(picture, np.uint8)

    @property
    def fps(self) -> float:
        return float(self.metadata.get("render_fps") or FPS)


def make(env_id: str) -> Camera:
    """UserError if the environment has no pictures."""
    try:
        env = make_one(env_id, render_mode="rgb_array")
    except TypeError as error:  # it takes no render_mode
        raise UserError(f"{env_id} has no picture: {error}") from error
    if "rgb_array" not in env.metadata.get("render_modes", ()):
        raise UserError(f'{env_id} has no picture: it has no render mode "rgb_array"')
    renderer = getattr(env.unwrapped, "mujoco_renderer", None)
    if renderer is not None:
        set_scene(renderer)
    return Camera(env)


def set_scene(renderer: Any) -> None:
    """What MuJoCo draws; how the bodies move stays the same."""
    import mujoco

    model = renderer.model
    # gymnasium 1.4 looks on from where the body was; the model's own camera, if any, follows it
    renderer.camera_id = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    # a fast one leaves the floor that is drawn, 40 m, within seconds
    floors = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    model.geom_size[floors, :2] *= 25
    materials = np.unique(model.geom_matid[floors])
    model.mat_texrepeat[materials[materials >= 0]] *= 25
    # Mesa on a CPU: 0.04 s a picture, not 0.13; edges become smooth when it is made smaller
    model.vis.quality.shadowsize, model.vis.quality.offsamples = 1024, 0


def check(env_id: str) -> None:
    """Find what MuJoCo can draw with here. UserError if the environment cannot be drawn.

    In a process of its own, because a GL that does not work may end it, and because MuJoCo reads
    MUJOCO_GL once, when it is imported.
    """
    code = "import sys; from lab.watch import camera; camera.dry_run(sys.argv[1])"
    reasons = {}
    for gl in [os.environ["MUJOCO_GL"]] if os.environ.get("MUJOCO_GL") else GL:
        done = subprocess.run([sys.executable, "-c", code, env_id], text=True, capture_output=True,
                              env=os.environ | {"MUJOCO_GL": gl})
        if done.returncode == 0:
            os.environ["MUJOCO_GL"] = gl
            return
        if done.returncode == 2:
            raise UserError(done.stdout.strip())
        reasons[gl] = done.stdout.strip() or f"exit code {done.returncode}"
    said = "; ".join(f"{gl}: {reason}" for gl, reason in reasons.items())
    raise UserError(f"{env_id} cannot be drawn ({said}); without a display MuJoCo needs EGL, "
                    "apt install libegl1, or OSMesa, apt install libosmesa6")


def dry_run(env_id: str) -> None:
    """One picture. Exit code 2 if there is none, 1 if drawing it fails; one line says why."""
    try:
        env = make(env_id)
        env.reset()
        env.picture()
        env.close()
    except Exception as error:
        reason = " ".join(str(error).split())
        refused = isinstance(error, UserError)
        print(reason if refused else f"{type(error).__name__}: {reason}")
        sys.exit(2 if refused else 1)
