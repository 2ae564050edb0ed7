"""Find the fastest way to run a command here: measure processes, compilation, device, backend.

    python -m lab.plan --agent agents/crossq.py --env Ant-v5 --seeds 8 --steps 1_000_000
    python -m lab.plan agents/ppo.py --env BipedalWalker-v3 --num-envs 32
    python learn_simple.py agents/crossq.py --env Ant-v5 --seeds 8 --plan --log

Takes about a minute. Each candidate runs for a few seconds, with as many parallel processes as the
real run, and the time of the whole run is estimated. Given flags stay fixed; the others are varied.
--plan takes the fastest candidate with the given precision: bf16 changes the numerics, so it is
only measured unless you give --precision bf16.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.command_line import given_flags, parse_args, read_line
from lab.config_files import read_file
from lab.errors import UserError, guarded
from lab.options import Simple, Vectorised
from lab.plan import candidates


def run(argv: Sequence[str]) -> int:
    """Parse the flags, measure and print -> exit code."""
    args = [part for arg in argv for part in (  # the agent is positional
        arg.split("=", 1) if arg.startswith("--agent=") else [arg]) if part != "--agent"]
    vectorised_only = {field.name for field in dataclasses.fields(Vectorised)} - {
        field.name for field in dataclasses.fields(Simple)}
    given = given_flags(args) | names_in_config(args)
    options, config = parse_args(args, Vectorised if vectorised_only & given else Simple)
    if options.resume:
        raise UserError("--resume: a resumed run keeps its settings, so there is nothing to plan")
    candidates.measure(options, config, args)
    return 0


def names_in_config(args: Sequence[str]) -> set[str]:
    """The options in the file of --config. parse_args says if it cannot be read. None of a study's,
    whose trials are planned as runs of learn_simple.py."""
    path = read_line(args, Simple)[1].get("config")
    with contextlib.suppress(ValueError):
        content = read_file(Path(path)) if path else {}
        if isinstance(content, dict):
            names = {str(name).replace("-", "_") for name in content.get("options", content)}
            return set() if "trials" in names else names
    return set()


if __name__ == "__main__":
    sys.exit(guarded(lambda: run(sys.argv[1:])))
