"""make_envs: environments by id and backend. The only module that knows all backends."""

from collections.abc import Sequence
from typing import Any

from lab.envs.base import VecEnvConfig, VectorEnvs, is_torch
from lab.envs.host import SyncEnvs
from lab.errors import UserError

BACKENDS = ("sync", "workers", "envpool", "torch")


def make_envs(env_id: str, seeds: Sequence[int], num_envs: int = 1, backend: str | None = None,
              device: str = "cpu", **settings: Any) -> VectorEnvs:
    """S x N environments. UserError if the id, a space or the backend is not supported.

    backend None: torch for an id that starts with torch/, else sync. `settings`: the other fields
    of VecEnvConfig.
    """
    config = VecEnvConfig(env_id, seeds, num_envs, device, **settings)
    name = choose_backend(env_id, backend, config.groups)
    if name == "torch":
        from lab.envs.torch_vec import TorchEnvs

        return TorchEnvs(config)
    if name == "workers":
        from lab.envs.pool import WorkerEnvs

        return WorkerEnvs(config)
    if name == "envpool":
        from lab.envs.envpool import EnvpoolEnvs

        return EnvpoolEnvs(config)
    return SyncEnvs(config)


def choose_backend(env_id: str, backend: str | None, groups: int = 1) -> str:
    """The name of the backend. UserError if it is unknown or does not fit the id or the groups."""
    if backend not in (None, *BACKENDS):
        raise UserError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    in_torch = is_torch(env_id)
    if backend not in (None, "torch") and in_torch:
        raise UserError(f"{env_id} is written in torch: remove --backend {backend}")
    name = "torch" if in_torch or backend == "torch" else backend or "sync"
    if groups > 1 and name != "workers":
        raise UserError(f"--groups {groups} needs --backend workers, not {name}")
    return name
