"""How a run is fastest on this machine: processes, compilation, device and backend, by measuring.

    python -m lab.plan --agent agents/crossq.py --env Ant-v5 --seeds 8 --steps 1_000_000
    python -m lab.plan agents/ppo.py --env BipedalWalker-v3 --num-envs 32
    python learn_simple.py agents/crossq.py --env Ant-v5 --seeds 8 --plan --log

Within a minute every candidate runs for some seconds, in as many processes at once as the run would
have, and is told what the whole run will take. What is given is kept, only the rest is tried. Of
the rows, --plan takes the fastest that leaves the numbers what they are: bf16 only if it is given.
"""

import dataclasses
import sys
from collections.abc import Sequence

from lab.errors import UserError, guarded
from lab.options import Simple, Vectorised, given_flags, parse_args
from lab.plan import candidates


def run(argv: Sequence[str]) -> int:
    """Plan and print -> exit code."""
    words = [word for arg in argv for word in (
        arg.split("=", 1) if arg.startswith("--agent=") else [arg]) if word != "--agent"]
    own = {field.name for field in dataclasses.fields(Vectorised)} - {
        field.name for field in dataclasses.fields(Simple)}
    options, config = parse_args(words, Vectorised if own & given_flags(words) else Simple)
    if options.resume:
        raise UserError("--resume: a run goes on as it began")
    candidates.measure(options, config, words)
    return 0

if __name__ == "__main__":
    sys.exit(guarded(lambda: run(sys.argv[1:])))
