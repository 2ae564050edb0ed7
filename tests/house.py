"""Metrics of the repository: python -m tests.house

Length of the agents and cost of their forks, their longest functions, and the imports between
modules of lab/. Goals are printed, not enforced; a test fails on import cycles and upward imports.
"""

import ast
import graphlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up. A module imports its own folder and what stands in a line before its own.
FLOORS = [
    ("lab.errors", "lab.stats", "lab.stopping", "lab.inductor", "lab.settings"),
    ("lab.accelerate", "lab.matmul"), ("lab.envs",),
    ("lab.agent", "lab.options"), ("lab.contract", "lab.config_files"), ("lab.command_line",),
    ("lab.training",),
    ("lab.report", "lab.plan", "lab.policy", "lab.tracking"), ("lab.train",),
    ("lab.tuning", "lab.watch", "lab.check", "lab.evaluate", "lab.export")]
FORKS = {("sac", "droq"): 40, ("sac", "crossq"): 90, ("crossq", "bro"): 60, ("crossq", "cem"): 120,
         ("crossq", "xqc"): 140, ("ppo", "ppo_discrete"): 60, ("ppo", "ppo_lstm"): 120}
LONGEST = 40  # lines of a function, fewer

Graph = dict[str, set[str]]  # module -> the modules that it imports


def module_of(path: Path) -> str:
    """The name by which it is imported; of a package's __init__.py that of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(source: str) -> Iterator[str]:
    """Every name that is imported anywhere in it, as a path of dots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph_of(sources: dict[str, str]) -> Graph:
    """Of modules by their names. A name that is imported from a module is that module."""
    graph: Graph = {}
    for module, source in sources.items():
        found = {name if name in sources else name.rpartition(".")[0] for name in imports(source)}
        graph[module] = {name for name in found if name in sources}
    return graph


def lab() -> Graph:
    return graph_of({module_of(path): path.read_text() for path in sorted(
        (ROOT / "lab").rglob("*.py")) if path.name != "__init__.py"})


def circle(graph: Graph) -> list[str]:
    """The modules of one, the first again at its end; [] if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def floor_of(module: str) -> tuple[int, str]:
    """Its number, and the folder or file that stands there. LookupError if FLOORS lacks it."""
    for number, names in enumerate(FLOORS):
        for name in names:
            if module == name or module.startswith(name + "."):
                return number, name
    raise LookupError(f"{module} stands on no floor: FLOORS in tests/house.py lacks it")


def upward(graph: Graph) -> list[tuple[str, str]]:
    """(importing, imported): upward, or sideways into another folder."""
    found = []
    for module, imported in graph.items():
        (own, folder) = floor_of(module)
        found += [(module, other) for other in sorted(imported)
                  if floor_of(other)[0] >= own and floor_of(other)[1] != folder]
    return found


def fork_cost(old: str, new: str) -> int:
    """Lines added and removed from one agent to the other; white space and blank lines are free."""
    paths = [str(ROOT / f"agents/{name}.py") for name in (old, new)]
    done = subprocess.run(["diff", "-wB", *paths], capture_output=True, text=True)
    return sum(line[:1] in "<>" and bool(line[1:].strip()) for line in done.stdout.splitlines())


def functions(path: Path) -> list[tuple[int, str]]:
    """(lines, name) of each, the longest first."""
    found = [(node.end_lineno - node.lineno + 1, node.name)
             for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.FunctionDef) and node.end_lineno]
    return sorted(found, reverse=True)


def verdict(graph: Graph) -> str:
    round_trip, arrows = circle(graph), upward(graph)
    words = [f"a circle: {' -> '.join(round_trip)}"] if round_trip else ["no circle"]
    words += [f"upward: {', '.join(f'{a} -> {b}' for a, b in arrows)}"] if arrows else [
        "no upward import"]
    return "; ".join(words)


def lines(agents: Sequence[Path]) -> Iterator[str]:
    """What is printed."""
    for path in agents:
        yield f"{len(path.read_text().splitlines()):5}  {path.relative_to(ROOT)}"
    yield ""
    for (old, new), goal in FORKS.items():
        yield f"{fork_cost(old, new):5}  {old} -> {new} (goal {goal})"
    yield ""
    length, name, path = max((*functions(path)[0], path) for path in agents)
    yield f"{length:5}  lines of the longest function, {path.stem}'s {name} (goal < {LONGEST})"
    yield ""
    graph = lab()
    for module in sorted(graph, key=lambda module: (floor_of(module), module)):
        yield f"{module} -> {' '.join(sorted(graph[module])) or '-'}"
    yield ""
    yield verdict(graph)


if __name__ == "__main__":
    print(*lines(sorted((ROOT / "agents").glob("*.py"))), sep="\n")
