"""A torch graph as numpy code: one line for each operation that depends on the input. What does not
depend on it is computed now and stored with the weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from lab.errors import UserError

HEAD = '''"""{about}

Needs numpy alone, and policy.npz beside it:  from policy import act
"""

from pathlib import Path

import numpy as np

w = dict(np.load(Path(__file__).with_name("policy.npz")))  # the weights


'''
ACT = '''def act(obs):
    """obs (O,) -> action (A,), or (N, O) -> (N, A)."""
    obs = np.asarray(obs, np.float32)
'''
ACT_WITH_MEMORY = '''def act(obs, memory=None):
    """obs (O,), memory (M,) -> action (A,), next memory (M,); or (N, O), (N, M) -> (N, A), (N, M).
    Without a memory, or with zeros, an episode begins."""
    obs = np.asarray(obs, np.float32)
    if memory is None:
        memory = np.zeros((*obs.shape[:-1], {width}))
    memory = np.asarray(memory, np.float32)
'''


def write_numpy(program: torch.export.ExportedProgram, folder: Path, about: str) -> None:
    """policy.py and policy.npz. UserError for an operation that OPERATIONS lacks."""
    values = constants(program)  # of the nodes that do not depend on the inputs
    inputs = [node for node in program.graph.nodes
              if node.name in program.graph_signature.user_inputs]
    code = {node: f"{name}.reshape(-1, {width_of(node)})"  # of the others
            for node, name in zip(inputs, ("obs", "memory"), strict=False)}
    stored: dict[str, np.ndarray] = {}
    lines = []

    def written(x: Any) -> str:
        if isinstance(x, Node):
            if x in code:
                return code[x]
            value = values[x]
            if not isinstance(value, torch.Tensor):
                return repr(value)
            stored[x.name] = value.detach().numpy()
            return f"w[{x.name!r}]"
        if isinstance(x, list | tuple):
            return f"[{', '.join(map(written, x))}]"
        return repr(x)

    for node in program.graph.nodes:
        if node.op == "call_function":
            if all(x in values for x in node.all_input_nodes) and node.all_input_nodes:
                values[node] = evaluate(node, values)
            elif node.users:
                code[node] = node.name
                lines.append(f"    {node.name} = {line(node, written)}")
        elif node.op == "output":
            results = [f"{written(x)}.reshape(*obs.shape[:-1], -1)" for x in node.args[0]]
            lines.append(f"    return {', '.join(results)}")
    arrays: dict[str, Any] = stored  # numpy's types take the names for its own settings
    np.savez(folder / "policy.npz", **arrays)
    about = " ".join(about.split()).replace("\\", "/").replace('"', "'")  # a name may hold any
    act = ACT if len(inputs) == 1 else ACT_WITH_MEMORY.format(width=width_of(inputs[1]))
    text = HEAD.format(about=about) + act + "\n".join(lines) + "\n"
    (folder / "policy.py").write_text(text, encoding="utf-8", errors="replace")


def width_of(node: Node) -> int:
    return int(node.meta["val"].shape[-1])


def constants(program: torch.export.ExportedProgram) -> dict[Node, Any]:
    """The weights, by their node in the graph."""
    signature, held = program.graph_signature, program.state_dict | program.constants
    names = (signature.inputs_to_parameters | signature.inputs_to_buffers
             | signature.inputs_to_lifted_tensor_constants)
    return {node: held[names[node.name]] for node in program.graph.nodes
            if node.op == "placeholder" and node.name in names}


def evaluate(node: Node, values: dict[Node, Any]) -> Any:
    assert callable(node.target)
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    with torch.no_grad():
        return node.target(*args, **kwargs)


def line(node: Node, written: Callable[[Any], str]) -> str:
    """The numpy expression of one operation."""
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    if name not in OPERATIONS:
        raise UserError(f"--format numpy does not know torch's {name}: use --format onnx")
    return OPERATIONS[name](*map(written, node.args),
                            **{key: written(x) for key, x in node.kwargs.items()})


def indexed(x: str, dim: str, index: str) -> str:
    """x[:, :, index]; a negative dim counts from the last."""
    before = f"{':, ' * int(dim)}" if int(dim) >= 0 else "..., "
    return f"{x}[{before}{index}{', :' * (-1 - int(dim))}]"


def cut(x: str, dim: str = "0", start: str = "0", end: str = "None") -> str:
    return indexed(x, dim, f"{start}:{'' if int(end) > 2**62 else end}")


def scattered(x: str, part: str, dim: str = "0", start: str = "0", end: str = "None") -> str:
    before, after = indexed(x, dim, f":{start}"), indexed(x, dim, f"{end}:")
    return f"np.concatenate([{before}, {part}, {after}], {dim})"


def split(x: str, sizes: str, dim: str = "0") -> str:
    ends = np.cumsum([int(n) for n in sizes.strip("[]").split(",")])[:-1].tolist()
    return f"np.split({x}, {ends}, {dim})"


def reduced(name: str) -> Callable[..., str]:
    return lambda x, dims, keep="False": f"np.{name}({x}, tuple({dims}), keepdims={keep})"


def function(name: str) -> Callable[..., str]:
    return lambda *args: f"{name}({', '.join(args)})"


def infix(sign: str) -> Callable[[str, str], str]:
    return lambda a, b: f"{a} {sign} {b}"


OPERATIONS: dict[str, Callable[..., str]] = {
    "add": infix("+"), "sub": infix("-"), "mul": infix("*"), "div": infix("/"), "bmm": infix("@"),
    "mm": infix("@"), "pow": infix("**"), "neg": lambda x: f"-{x}",
    "relu": lambda x: f"np.maximum({x}, 0)", "rsqrt": lambda x: f"1 / np.sqrt({x})",
    "sigmoid": lambda x: f"(1 + np.tanh({x} / 2)) / 2",  # exp would overflow
    "eq": infix("=="), "where": function("np.where"),
    "argmax": lambda x, dim, keep="False": f"np.argmax({x}, {dim}, keepdims={keep})",
    "_log_softmax": lambda x, dim, _: f"{x} - np.logaddexp.reduce({x}, {dim}, keepdims=True)",
    "clamp": lambda x, low="None", high="None": f"np.clip({x}, {low}, {high})",
    **{name: function(f"np.{name}") for name in ("tanh", "exp", "log", "sqrt", "abs")},
    "sum": reduced("sum"), "mean": reduced("mean"),
    "full": lambda shape, value, **_: f"np.full({shape}, {value}, np.float32)",
    "scalar_tensor": lambda value, **_: f"np.float32('{value}')",
    "_to_copy": lambda x, dtype, **_: f"{x}.astype('{dtype.removeprefix('torch.')}')",
    "copy": lambda x, new: f"np.broadcast_to({new}, {x}.shape)",
    "view": lambda x, shape: f"{x}.reshape({shape})",
    "unsqueeze": function("np.expand_dims"),
    "squeeze": lambda x, dims: f"np.squeeze({x}, tuple({dims}))",
    "permute": function("np.transpose"), "cat": function("np.concatenate"),
    "select": indexed, "slice": cut, "slice_scatter": scattered, "split_with_sizes": split,
    "getitem": lambda x, index: f"{x}[{index}]", "sym_size": lambda x, dim: f"{x}.shape[{dim}]",
}
