"""Export one seed's policy, to run without the lab.

    python -m lab.export runs/sac-20260101-120000 --seed 3 --format onnx
    python -m lab.export runs/sac-20260101-120000/Hopper-v5/sac/seed_3 --format numpy --which best

Everything is inside: normalisation of the observation, squashing, scaling to the bounds. Input:
observations (B, O), any B; output: actions (B, A) in environment units, without exploration. A
policy with memory also takes the memory (B, M) and returns the next. The export is compared with
the agent before it is kept. Beside it, policy.json says what it is.
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
from torch.utils._python_dispatch import TorchDispatchMode

from lab import accelerate
from lab.command_line import parse_flags
from lab.errors import UserError, first_line, guarded
from lab.export.numpy_code import write_numpy
from lab.policy import Policy, load_policy
from lab.training import recorder
from lab.training.checkpoint import Which

OBSERVATIONS, TOLERANCE = 1_000, 1e-5  # of the comparison with the agent
TIES = 1e-3  # of discrete choices may differ: rounding decides between two of equal probability
DECISIONS = 300  # timed
Step = Callable[..., Sequence[np.ndarray]]  # arrays as interface() names them, in and out


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
    check_exportable(policy)
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
    print(compared(policy, result[measure(policy)]))
    print(f"one decision: {result['decision_us']:.0f} us, by the agent in torch "
          f"{result['torch_decision_us']:.0f} us")
    print(*sorted(out.iterdir()), sep="\n")
    return 0


def check_exportable(policy: Policy) -> None:
    """UserError for a policy that depends on more than observations and a memory."""
    name = Path(policy.run.options.agent).name
    if hasattr(policy.agent, "eval_policy") and not hasattr(policy.agent, "act_with_memory"):
        raise UserError(f"{name} keeps its memory inside eval_policy(): an export needs "
                        "act_with_memory() (docs/own-agent.md); or use lab.policy.load_policy")
    with RefuseDraws(f"{name} draws random numbers for each action, so it does not export: "
                     "use lab.policy.load_policy"):
        policy(np.zeros(policy.spec.obs_dim))
    policy.reset()


class RefuseDraws(TorchDispatchMode):
    """UserError with this message where torch draws random numbers."""

    def __init__(self, message: str):
        super().__init__()
        self.message = message

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in op.tags:
            raise UserError(self.message)
        return op(*args, **(kwargs or {}))


def export(policy: Policy, kind: str, folder: Path) -> dict[str, Any]:
    """Write the policy into a new folder -> what its policy.json says. UserError if it cannot be
    exported, or if it differs from the agent."""
    refused = f"{Path(policy.run.options.agent).name} does not export to {kind}"
    folder.mkdir()
    try:
        exported = Exported(FORMATS[kind](policy, folder), widths(policy)[1:])
        gap = difference(policy, exported)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{refused}: {type(error).__name__}: {first_line(error)}") from error
    if not gap <= (TIES if policy.spec.num_actions else TOLERANCE):
        raise UserError(f"{refused}: {compared(policy, gap)}")
    about = policy.about() | interface(policy) | {
        "format": kind, measure(policy): gap, "decision_us": decision_us(policy, exported),
        "torch_decision_us": decision_us(policy, policy), "versions": recorder.versions()}
    recorder.write_json(folder / "policy.json", recorder.finite(about))
    return about


def interface(policy: Policy) -> dict[str, Any]:
    """Names and shapes of inputs and outputs. A policy with memory begins an episode with zeros,
    and then takes the memory that it returned."""
    found: dict[str, Any] = {"inputs": {"obs": ["B", policy.spec.obs_dim]},
                             "outputs": {"actions": ["B", policy.spec.action_dim]}}
    if hasattr(policy.agent, "act_with_memory"):
        _, memory = policy.agent.act_with_memory(torch.zeros(1, 1, policy.spec.obs_dim))
        found["inputs"]["memory"] = found["outputs"]["next_memory"] = ["B", memory.shape[-1]]
        found["first_memory"] = 0.0
    return found


def widths(policy: Policy) -> list[int]:
    """The second size of each input."""
    return [width for _, width in interface(policy)["inputs"].values()]


class Exported:
    """What was written, read back: acts on obs (B, O) and is reset as a Policy."""

    def __init__(self, step: Step, memory: Sequence[int] = ()):
        """`memory`: its width, for a policy that has one."""
        self.step, self.widths = step, memory
        self.reset()

    def reset(self) -> None:
        self.memory: list[np.ndarray] | None = None

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        if self.memory is None:
            self.memory = [np.zeros((len(obs), width), np.float32) for width in self.widths]
        actions, *self.memory = self.step(obs, *self.memory)
        return actions


def difference(policy: Policy, exported: Exported) -> float:
    """The largest difference of an action over two episodes, in batches and one by one, relative to
    half its range if that is above 1; of discrete actions, the share of observations with another
    choice."""
    spec, draw = policy.spec, np.random.default_rng(0)
    obs = draw.standard_normal((OBSERVATIONS, spec.obs_dim))
    obs *= np.resize([0.1, 1, 10], (OBSERVATIONS, 1))
    obs[:, spec.mask] = draw.random(obs[:, spec.mask].shape) < 0.7
    obs = obs.astype(np.float32)
    batches, singles = (x.reshape(2, -1, size, spec.obs_dim)
                        for x, size in ((obs, 50), (obs[:40], 1)))
    gaps = np.concatenate([
        np.abs(episodes(exported, x) - episodes(policy, x)).reshape(-1, spec.action_dim)
        for x in (batches, singles)])
    if spec.num_actions:
        return float((gaps != 0).any(1).mean())
    half = (np.array(spec.action_high) - spec.action_low) / 2
    return float((gaps.max(0) / np.where(np.isfinite(half), half, 1).clip(1)).max())


def episodes(policy: Policy | Exported, obs: np.ndarray) -> np.ndarray:
    """obs (episodes, steps, B, O) -> actions (episodes, steps, B, A)."""
    actions = []
    for episode in obs:
        policy.reset()
        actions.append([policy(x) for x in episode])
    policy.reset()
    return np.array(actions)


def measure(policy: Policy) -> str:
    """The name of difference() in policy.json."""
    return "different_choices" if policy.spec.num_actions else "largest_difference"


def compared(policy: Policy, gap: float) -> str:
    """The same in words."""
    if policy.spec.num_actions:
        return f"choices that differ from the agent's on {OBSERVATIONS} observations: {gap:.1%}"
    return f"largest difference to the agent on {OBSERVATIONS} observations: {gap:.1e}"


def decision_us(policy: Policy, act: Policy | Exported) -> float:
    """Median time of an action for one observation, in microseconds."""
    obs, times = np.zeros((1, policy.spec.obs_dim), np.float32), []
    for _ in range(DECISIONS):
        start = time.perf_counter()
        act(obs)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


class ActModule(nn.Module):
    """act(explore=False) of a single seed as a module: obs (B, O) -> actions (B, A); or
    act_with_memory, with memory (B, M) -> actions, memory."""

    def __init__(self, agent: Any):
        super().__init__()
        self.agent = agent
        for name, part in vars(agent).items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)

    def forward(self, obs: torch.Tensor, memory: torch.Tensor | None = None) -> Any:
        if memory is None:
            return self.agent.act(obs[None], explore=False)[0]
        actions, memory = self.agent.act_with_memory(obs[None], memory[None])
        return actions[0], memory[0]


def examples(policy: Policy) -> tuple[torch.Tensor, ...]:
    """An example of each input. Two rows, since torch takes a size of 1 for a constant."""
    return tuple(torch.zeros(2, width) for width in widths(policy))


def exported_program(policy: Policy) -> torch.export.ExportedProgram:
    """The policy as a torch.export program for any B."""
    args, batch = examples(policy), torch.export.Dim("batch")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about itself
        return torch.export.export(
            ActModule(policy.agent), args, strict=False,
            dynamic_shapes=tuple({0: batch} for _ in args)).run_decompositions()


def to_onnx(policy: Policy, folder: Path) -> Step:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError("--format onnx needs pip install onnx onnxscript onnxruntime")
    import onnxruntime

    path, names = str(folder / "policy.onnx"), interface(policy)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            exported_program(policy), input_names=[*names["inputs"]],
            output_names=[*names["outputs"]], dynamo=True, verbose=False, external_data=False,
            f=path)
    one_thread = onnxruntime.SessionOptions()
    one_thread.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, one_thread, providers=["CPUExecutionProvider"])
    return lambda *args: session.run(None, dict(zip(names["inputs"], args, strict=True)))


def to_torchscript(policy: Policy, folder: Path) -> Step:
    path = str(folder / "policy.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(ActModule(policy.agent), examples(policy))
        torch.jit.freeze(traced.eval()).save(path)  # without what act does not use
        loaded = torch.jit.load(path)
    return lambda *args: [x.numpy() for x in in_tuple(loaded(*map(torch.from_numpy, args)))]


def to_numpy(policy: Policy, folder: Path) -> Step:
    write_numpy(exported_program(policy), folder, policy.describe())
    spec = importlib.util.spec_from_file_location("exported_policy", folder / "policy.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *args: in_tuple(module.act(*args))


def in_tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


FORMATS: dict[str, Callable[[Policy, Path], Step]] = {
    "onnx": to_onnx, "torchscript": to_torchscript, "numpy": to_numpy}

if __name__ == "__main__":
    sys.exit(guarded(lambda: run(sys.argv[1:])))
