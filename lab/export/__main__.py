"""Export one seed's policy, to run without the lab.

    python -m lab.export runs/sac-20260101-120000 --seed 3 --format onnx
    python -m lab.export runs/sac-20260101-120000/Hopper-v5/sac/seed_3 --format numpy --which best

Everything is inside: normalisation of the observation, squashing, scaling to the bounds. Input:
observations (B, O), any B; output: actions (B, A) in environment units, without exploration. The
export is compared with the agent before it is kept. Beside it, policy.json says what it is.
"""

import importlib.util
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import nn

from lab import accelerate
from lab.errors import UserError, first_line, guarded
from lab.export.numpy_code import write_numpy
from lab.options import parse_flags
from lab.policy import Policy, load_policy
from lab.training import recorder
from lab.training.checkpoint import Which

OBSERVATIONS, TOLERANCE = 1_000, 1e-5  # of the comparison with the agent
DECISIONS = 300  # timed
Act = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Options:
    path: tyro.conf.Positional[Path]  # run folder, or one environment, agent or seed in it
    agent: Path | None = None  # agent file; none: the run's, if it has not changed since
    seed: int | None = None  # of the run; none: its only one
    which: Which = "last"  # the last checkpoint's weights, or those of the seed's best evaluation
    # onnx needs pip install onnx onnxscript onnxruntime; numpy is a policy.py with its weights
    format: Literal["onnx", "torchscript", "numpy"] = "onnx"
    out: Path | None = None  # a new folder; none: policy_<format> in the seed's folder


def run(argv: Sequence[str]) -> int:
    """Parse the flags, export, compare and print -> exit code."""
    options = parse_flags(Options, argv, __doc__)
    accelerate.prepare_process()
    policy = load_policy(options.path, options.seed, options.which, options.agent)
    if hasattr(policy.agent, "eval_policy"):
        raise UserError(f"{policy.run.options.agent} has a memory, which no export holds yet: "
                        "use lab.policy.load_policy")
    out = options.out or policy.folder / f"policy_{options.format}"
    if out.exists():
        raise UserError(f"{out} exists: name another with --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix="export_") as folder:
            result = export(policy, options.format, Path(folder) / "policy")
            (Path(folder) / "policy").rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    print(policy.describe())
    print(f"largest difference to the agent on {OBSERVATIONS} observations: "
          f"{result['largest_difference']:.1e}")
    print(f"one decision: {result['decision_us']:.0f} us, by the agent in torch "
          f"{result['torch_decision_us']:.0f} us")
    print(*sorted(out.iterdir()), sep="\n")
    return 0


def export(policy: Policy, kind: str, folder: Path) -> dict[str, Any]:
    """Write the policy into a new folder -> what its policy.json says. UserError if it cannot be
    exported, or if it differs from the agent."""
    name = Path(policy.run.options.agent).name
    folder.mkdir()
    try:
        act = FORMATS[kind](policy, folder)
        gap = largest_difference(policy, act)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name} does not export to {kind}: {type(error).__name__}: "
                        f"{first_line(error)}") from error
    if not gap <= TOLERANCE:
        raise UserError(f"{name} does not export to {kind}: its actions differ by {gap:.1e} from "
                        "the agent's")
    about = policy.about() | {
        "format": kind, "largest_difference": gap, "decision_us": decision_us(policy, act),
        "torch_decision_us": decision_us(policy, policy), "versions": recorder.versions()}
    recorder.write_json(folder / "policy.json", about)
    return about


def largest_difference(policy: Policy, act: Act) -> float:
    """On observations of three sizes, together and one by one; relative to half the range of an
    action if that is above 1."""
    draw = np.random.default_rng(0).standard_normal((OBSERVATIONS, policy.spec.obs_dim))
    obs = (draw * np.resize([0.1, 1, 10], (OBSERVATIONS, 1))).astype(np.float32)
    half = (np.array(policy.spec.action_high) - policy.spec.action_low) / 2
    scale = np.where(np.isfinite(half), half, 1).clip(1)
    together = np.abs(act(obs) - policy(obs)).max(0)
    alone = np.abs([act(x[None])[0] - policy(x) for x in obs[:30]]).max(0)
    return float((np.maximum(together, alone) / scale).max())


def decision_us(policy: Policy, act: Act) -> float:
    """Median time of an action for one observation, in microseconds."""
    obs, times = np.zeros((1, policy.spec.obs_dim), np.float32), []
    for _ in range(DECISIONS):
        start = time.perf_counter()
        act(obs)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


class ActModule(nn.Module):
    """act(explore=False) of a single seed as a module: obs (B, O) -> actions (B, A)."""

    def __init__(self, agent: Any):
        super().__init__()
        self.agent = agent
        for name, part in vars(agent).items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        actions: torch.Tensor = self.agent.act(obs[None], explore=False)[0]
        return actions


def exported_program(policy: Policy) -> torch.export.ExportedProgram:
    """Any B: its example has 2 rows, since torch takes a size of 1 for a constant."""
    example = torch.zeros(2, policy.spec.obs_dim)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about itself
        return torch.export.export(
            ActModule(policy.agent), (example,), strict=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},)).run_decompositions()


def to_onnx(policy: Policy, folder: Path) -> Act:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError("--format onnx needs pip install onnx onnxscript onnxruntime")
    import onnxruntime

    path = str(folder / "policy.onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(exported_program(policy), input_names=["obs"], output_names=["actions"],
                          dynamo=True, verbose=False, external_data=False, f=path)
    one_thread = onnxruntime.SessionOptions()
    one_thread.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, one_thread, providers=["CPUExecutionProvider"])
    return lambda obs: session.run(None, {"obs": obs})[0]


def to_torchscript(policy: Policy, folder: Path) -> Act:
    path = str(folder / "policy.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ActModule(policy.agent), torch.zeros(2, policy.spec.obs_dim))
        torch.jit.freeze(traced.eval()).save(path)  # without what act does not use
        loaded = torch.jit.load(path)
    return lambda obs: loaded(torch.from_numpy(obs)).numpy()


def to_numpy(policy: Policy, folder: Path) -> Act:
    write_numpy(exported_program(policy), folder, policy.describe())
    spec = importlib.util.spec_from_file_location("exported_policy", folder / "policy.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda obs: module.act(obs)


FORMATS: dict[str, Callable[[Policy, Path], Act]] = {
    "onnx": to_onnx, "torchscript": to_torchscript, "numpy": to_numpy}

if __name__ == "__main__":
    sys.exit(guarded(lambda: run(sys.argv[1:])))
